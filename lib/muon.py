"""
The Muon optimiser: momentum, and of its matrix only the directions count: all singular values become about 1.

    optimizer = Muon(groups)          # groups as of every torch optimiser, of matrices alone
    orthogonalize(matrix)             # U Vᵀ, roughly, of a matrix U S Vᵀ

By Keller Jordan, https://kellerjordan.github.io/posts/muon/. A step has the size of one of AdamW's, as in
arXiv 2502.16982, so that one learning rate serves both. torch.optim.Muon computes the same, but always in bf16.
"""
import torch


def orthogonalize(matrix, steps=5):
    """A matrix with the same singular vectors whose singular values are near 1 (0.7 to 1.2): bf16, on a CPU fp32.

    Each step replaces a singular value s by 3.4445 s - 4.775 s³ + 2.0315 s⁵, which drives any value in (0, 1] there.
    """
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix  # the products below are of its shorter side
    # A processor without instructions for bf16, as many laptops have, takes twenty times as long for it.
    x = wide.float() if wide.device.type == "cpu" else wide.bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.mT
        square = torch.addmm(square, square, square, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, square, x, beta=3.4445)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    def __init__(self, groups, momentum=0.95):
        super().__init__(groups, dict(lr=0.0, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"])  # Nesterov's: where the average will be
                p.add_(orthogonalize(ahead), alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)
