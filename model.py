"""
Molmo2, the whole network, in one file that needs torch alone.

    pixels of a crop ─► ViT ─► two block outputs, side by side ─► pool 2x2 or 3x3 patches by attention ─► SwiGLU
                                                                                                      │ added
    token ids ─► embedding ──────────────────────────────────────────────────────────────────► x[<image>] +=
                                                                                                      ▼
                                                       decoder blocks (one mask rule) ─► norm ─► head ─► next token

Three published decoders are covered by one `Block` and two switches: `norm_after` (OLMo normalises what a
sub-layer puts out, Qwen3 what it takes in) and `qk_norm` (OLMo over the whole projection, Qwen3 per head).
Module names are those of the released checkpoints, so that loading one is a dictionary look-up and no
translation (lib/weights.py).

    python model.py              # parameters of every preset, counted without allocating them

Shapes:  B rows, T tokens, N crops, P patches per crop, M visual tokens, K patches pooled into one visual token,
         D width, H heads, G key/value heads, hd head width, V vocabulary
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F



EXTRA = 128  # input-only embedding rows after the base vocabulary: what the model reads but never writes
# Their order is the released one: the k-th name has id V + k. The first nine but <|image|> make up the vision
# tokens.
READ_ONLY = ("<image_start>", "<image_end>", "<image>", "<image_col>", "<low_res_image_start>", "<|image|>",
             "<image_low>", "<frame_start>", "<frame_end>", "<|video|>")
IMAGE = READ_ONLY.index("<image>")


@dataclass
class ModelConfig:
    """Sizes of one network. The defaults are the vision half every released model shares (SigLIP 2
    so400m/14)."""
    layers: int = 16                # decoder blocks
    width: int = 2048               # D of the decoder
    heads: int = 16
    kv_heads: int = 16              # G; fewer than heads = grouped-query attention
    head_dim: int = 128
    mlp: int = 8192                 # inner width of the decoder's SwiGLU
    # inner width of the connector's SwiGLU; 0 = as the decoder's, as in every released model
    projector_mlp: int = 0
    vocab: int = 100352             # V: rows of the base table and of the head; the EXTRA rows come on top
    norm_after: bool = True         # True: x + norm(f(x)) (OLMo); False: x + f(norm(x)) (Qwen3)
    # "full": one RMSNorm over all heads (OLMo); "head": per head (Qwen3); "none"
    qk_norm: str = "full"
    eps: float = 1e-6               # of every RMSNorm
    rope_theta: float = 5e5
    yarn: dict | None = None        # {"factor", "original", "beta_fast", "beta_slow", "attention_factor"}
    yarn_layers: tuple = ()         # decoder layers that use it; the others keep plain RoPE
    # tokens a query looks back in `window_layers`; only plain OLMo-3 has that, Molmo2 never
    window: int = 0
    window_layers: tuple = ()
    tie: bool = False               # the head is the base embedding table
    max_positions: int = 36864      # written to config.json for other readers; RoPE itself needs no limit
    crop: int = 378                 # side of a crop, pixels
    patch: int = 14                 # side of a patch, pixels
    vit_width: int = 1152
    vit_heads: int = 16
    vit_head_dim: int = 72
    vit_mlp: int = 4304
    vit_eps: float = 1e-6
    # block outputs handed on, in this order; blocks after the last one do not exist
    vit_features: tuple = (24, 18)
    # how the model was taught to write points and times: "spec" or "released" (data.py)
    point_format: str = "spec"
    # video frames stand between <frame_start> and <frame_end>, else the tokens of a picture
    frame_tokens: bool = True

    def __post_init__(self):
        self.projector_mlp = self.projector_mlp or self.mlp

    @property
    def patches(self):
        """P, patches of one crop."""
        return (self.crop // self.patch) ** 2

    @property
    def image_token(self):
        """Id of `<image>`, the only token that receives image features."""
        return self.vocab + IMAGE


OLMO3_YARN = dict(factor=8.0, original=8192, beta_fast=32.0, beta_slow=1.0,
                  attention_factor=1.2079441541679836)
QWEN3 = dict(norm_after=False, qk_norm="head", vocab=151936, layers=36, heads=32, kv_heads=8)
PRESETS = {
    "small": ModelConfig(layers=3, width=128, heads=8, kv_heads=8, head_dim=16, mlp=256, vocab=1024,
                         rope_theta=1e4, norm_after=False, qk_norm="head", max_positions=6912, crop=64,
                         patch=8, vit_width=128, vit_heads=8, vit_head_dim=16, vit_mlp=256,
                         vit_features=(2, 1)),
    "1b": ModelConfig(),
    "4b": ModelConfig(**QWEN3, width=2560, mlp=9728, rope_theta=5e6),
    "7b": ModelConfig(layers=32, width=4096, heads=32, kv_heads=32, mlp=11008, vocab=100278, yarn=OLMO3_YARN,
                      yarn_layers=tuple(range(3, 32, 4)), max_positions=65536),
    "8b": ModelConfig(**QWEN3, width=4096, mlp=12288, rope_theta=1e6),
}


# ---- the attention mask: one rule, used by every path ------------------------------------------------------

def is_vision(tokens, vocab):
    """Which ids are vision tokens (patches, columns, starts and ends): bool, the shape of `tokens`."""
    k = tokens - vocab
    return (k >= 0) & (k <= READ_ONLY.index("<frame_end>")) & (k != READ_ONLY.index("<|image|>"))


def may_attend(q, k, example, branch, vision):
    """The rule. q, k: positions in one row (any shapes that broadcast); example, branch, vision: (T,) of that
    row.

    A query sees a key of its own example, in the trunk or in its own branch, if the key is not in the future.
    Vision tokens of one example see each other in both directions, across all its pictures and frames.
    """
    same = (example[q] == example[k]) & (example[q] > 0)
    family = (branch[k] == 0) | (branch[k] == branch[q])
    return same & family & ((k <= q) | (vision[q] & vision[k]))


def dense_mask(example, branch, vision):
    """The rule for whole rows: (B, T) ids -> (B, 1, T, T) bool, True = may attend. For SDPA."""
    t = torch.arange(example.shape[1], device=example.device)
    rows = [may_attend(t[:, None], t[None], *ids) for ids in zip(example, branch, vision)]
    return torch.stack(rows)[:, None]


# ---- small parts -------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        y = x.float()  # in bf16 the mean of squares would lose most of its digits
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_frequencies(cfg, yarn, device=None):
    """Rotation per position for each pair of channels: ((hd/2,) fp32, factor on cos and sin).

    YaRN (arXiv 2309.00071) stretches the slow pairs by `factor`, leaves the fast ones alone and blends in
    between.
    """
    d = cfg.head_dim
    inv = cfg.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)
    if not yarn:
        return inv, 1.0
    pair_that_turns = lambda n: d * math.log(yarn["original"] / (n * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))
    # pairs below turn often enough: kept as they are
    low = max(math.floor(pair_that_turns(yarn["beta_fast"])), 0)
    # pairs above never finish a turn: stretched
    high = min(math.ceil(pair_that_turns(yarn["beta_slow"])), d - 1)
    ramp = ((torch.arange(d // 2, device=device) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return inv / yarn["factor"] * ramp + inv * (1 - ramp), yarn["attention_factor"]


def rope_table(cfg, pos, yarn):
    """cos and sin for positions (B, T): two (B, 1, T, hd) fp32, the second half of the channels repeating the
    first."""
    inv, factor = rope_frequencies(cfg, yarn, pos.device)
    angle = pos[:, None, :, None].float() * inv  # (B, 1, T, hd/2)
    angle = torch.cat([angle, angle], -1)
    return angle.cos() * factor, angle.sin() * factor


def rotate(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def attend(q, k, v, mask=None):
    """softmax(q kᵀ / √hd) v.  q: (B, H, T, hd); k, v: (B, G, S, hd); mask: bool, broadcastable to (B, H, T, S)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def random_drop(x, p):
    """Dropout with a probability per position. x: (B, T, D); p: (B, T, 1), or None for none."""
    return x if p is None else x * (torch.rand_like(x) >= p) / (1 - p)


# ---- vision: pixels of crops -> features of patches --------------------------------------------------------

class MHA(nn.Module):
    """Attention with biases, as the ViT and the pooling use it: `dim_in` -> heads x head_dim -> heads x
    head_dim."""

    def __init__(self, dim_in, heads, head_dim):
        super().__init__()
        dim, self.head_dim = heads * head_dim, head_dim
        self.wq, self.wk, self.wv = (nn.Linear(dim_in, dim) for _ in range(3))
        self.wo = nn.Linear(dim, dim)

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, hd)
                   for y in (self.wq(x), self.wk(context), self.wv(context)))
        # The published code computes this in fp32 even under bf16. SDPA keeps its softmax and sums in fp32 by
        # itself.
        return self.wo(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class ViTMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.w1, self.w2 = nn.Linear(cfg.vit_width, cfg.vit_mlp), nn.Linear(cfg.vit_mlp, cfg.vit_width)

    def forward(self, x):
        return self.w2(F.gelu(self.w1(x), approximate="tanh"))


class ViTBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.attention = MHA(cfg.vit_width, cfg.vit_heads, cfg.vit_head_dim)
        self.feed_forward = ViTMLP(cfg)
        self.attention_norm = nn.LayerNorm(cfg.vit_width, cfg.vit_eps)
        self.ffn_norm = nn.LayerNorm(cfg.vit_width, cfg.vit_eps)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class ViT(nn.Module):
    """SigLIP 2 without its last blocks and its head: every patch sees every patch of the same crop."""

    def __init__(self, cfg):
        super().__init__()
        self.features = cfg.vit_features
        # a patch is (row, column, channel)
        self.patch_embedding = nn.Linear(cfg.patch * cfg.patch * 3, cfg.vit_width)
        self.positional_embedding = nn.Parameter(torch.zeros(cfg.patches, cfg.vit_width))
        blocks = nn.ModuleList(ViTBlock(cfg) for _ in range(max(cfg.vit_features) + 1))
        self.transformer = nn.ModuleDict({"resblocks": blocks})

    def forward(self, crops):
        """(N, P, patch·patch·3) uint8 or already in [-1, 1] -> (N, P, features · width)."""
        # pixels travel as bytes and are normalised here: a quarter of the traffic
        if crops.dtype == torch.uint8:
            crops = crops.to(self.patch_embedding.weight.dtype) / 255 * 2 - 1
        x = self.patch_embedding(crops) + self.positional_embedding
        outputs = []
        for block in self.transformer["resblocks"]:
            x = block(x)
            outputs.append(x)
        return torch.cat([outputs[i] for i in self.features], -1)


class Projector(nn.Module):
    """SwiGLU from the pooled features into the decoder's width."""

    def __init__(self, cfg):
        super().__init__()
        self.w1 = nn.Linear(cfg.vit_heads * cfg.vit_head_dim, cfg.projector_mlp, bias=False)  # gate
        self.w2 = nn.Linear(cfg.projector_mlp, cfg.width, bias=False)
        self.w3 = nn.Linear(cfg.vit_heads * cfg.vit_head_dim, cfg.projector_mlp, bias=False)  # up

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class VisionBackbone(nn.Module):
    """ViT, then the connector: each visual token gathers K patches (4 of a picture, 9 of a video frame) by
    attention."""

    def __init__(self, cfg):
        super().__init__()
        self.image_vit = ViT(cfg)
        self.image_pooling_2d = MHA(len(cfg.vit_features) * cfg.vit_width, cfg.vit_heads, cfg.vit_head_dim)
        self.image_projector = Projector(cfg)

    def forward(self, crops, pool):
        """crops: (N, P, ·); pool: (M, K) indices into the N·P patches, -1 = none -> (M, D)."""
        patches = self.image_vit(crops).flatten(0, 1)  # (N·P, F)
        valid = pool >= 0
        windows = patches[pool.clamp(min=0)] * valid[..., None]  # (M, K, F)
        # The query is the mean of the patches that are there: a window over the edge of a crop has fewer than
        # K.
        query = windows.sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None]
        pooled = self.image_pooling_2d(query, windows, valid[:, None, None])  # (M, 1, ·)
        return self.image_projector(pooled[:, 0])


def waves(n, dim):
    """Sines and cosines of row and column over an n x n grid, half a turn to 4 turns across it: (n·n,
    dim)."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, n), torch.linspace(-1, 1, n), indexing="ij")
    f = math.pi / 2 * 2 ** torch.linspace(0, 3, dim // 4)
    return torch.cat([g(c.flatten()[:, None] * f) for c in (x, y) for g in (torch.sin, torch.cos)], 1)


# ---- decoder -----------------------------------------------------------------------------------------------

class Embedding(nn.Module):
    """Two tables, one index: ids below V look up the language model's table, the next EXTRA the read-only
    tokens."""

    def __init__(self, cfg):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(cfg.vocab, cfg.width))
        self.new_embedding = nn.Parameter(torch.empty(EXTRA, cfg.width))

    def forward(self, tokens):
        return F.embedding(tokens, torch.cat([self.embedding, self.new_embedding]))


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.heads, cfg.kv_heads, cfg.head_dim
        q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.att_proj = nn.Linear(cfg.width, q + 2 * kv, bias=False)  # rows are q, k, v
        self.attn_out = nn.Linear(q, cfg.width, bias=False)
        self.qk_norm = cfg.qk_norm
        if cfg.qk_norm != "none":
            self.q_norm = RMSNorm(q if cfg.qk_norm == "full" else cfg.head_dim, cfg.eps)
            self.k_norm = RMSNorm(kv if cfg.qk_norm == "full" else cfg.head_dim, cfg.eps)
        self.attend = attend  # context parallelism puts its own here (ulysses.py)

    def forward(self, x, rope, mask, cache=None):
        q, k, v = self.att_proj(x).split([n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)], -1)
        if self.qk_norm == "full":  # over all heads at once, so before they part
            q, k = self.q_norm(q), self.k_norm(k)
        # (B, H or G, T, hd)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.attn_out(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        # rows are up, then gate: the reverse of most code
        self.ff_proj = nn.Linear(cfg.width, 2 * cfg.mlp, bias=False)
        self.ff_out = nn.Linear(cfg.mlp, cfg.width, bias=False)

    def forward(self, x):
        up, gate = self.ff_proj(x).chunk(2, -1)
        return self.ff_out(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm_after = cfg.norm_after
        self.self_attn, self.mlp = Attention(cfg), MLP(cfg)
        self.attn_norm, self.ff_norm = RMSNorm(cfg.width, cfg.eps), RMSNorm(cfg.width, cfg.eps)

    def forward(self, x, rope, mask, drop=None, cache=None):
        if self.norm_after:
            x = x + random_drop(self.attn_norm(self.self_attn(x, rope, mask, cache)), drop)
            return x + random_drop(self.ff_norm(self.mlp(x)), drop)
        x = x + random_drop(self.self_attn(self.attn_norm(x), rope, mask, cache), drop)
        return x + random_drop(self.mlp(self.ff_norm(x)), drop)


class KVCache:
    """Keys and values of one layer for tokens already read, in buffers as long as the answer may get."""

    def __init__(self, length):
        self.length, self.used, self.k, self.v = length, 0, None, None

    def append(self, k, v):
        if self.k is None:
            self.k, self.v = (y.new_empty(*y.shape[:2], self.length, y.shape[3]) for y in (k, v))
        end = self.used + k.shape[2]
        self.k[:, :, self.used:end], self.v[:, :, self.used:end] = k, v
        self.used = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = Embedding(cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.ln_f = RMSNorm(cfg.width, cfg.eps)

    def forward(self, x, pos, mask, drop=None, caches=None, key_pos=None):
        """x: (B, T, D) embedded tokens with the image features added -> (B, T, D) after the last norm.
        key_pos: (B, S) positions of all keys, where the cache holds some already."""
        ropes, local = {False: rope_table(self.cfg, pos, None)}, None
        if self.cfg.yarn_layers:
            ropes[True] = rope_table(self.cfg, pos, self.cfg.yarn)
        if self.cfg.window:
            key_pos = pos if key_pos is None else key_pos
            local = mask & (pos[:, None, :, None] - key_pos[:, None, None] < self.cfg.window)
        for i, block in enumerate(self.blocks):
            x = block(x, ropes[i in self.cfg.yarn_layers], local if i in self.cfg.window_layers else mask,
                      drop,
                      caches[i] if caches else None)
        return self.ln_f(x)


# ---- the loss: only where something is to be learned, and never T x V numbers at once ----------------------

class ChunkedNLL(torch.autograd.Function):
    """sum_i w_i · (nll_i + z_loss · logsumexp_i²) for n hidden states, `LOGITS` numbers of logits at a time.

    A large vocabulary makes the logits the biggest tensor of the whole step. As the loss is a plain sum, the
    gradient of a chunk is known as soon as its logits are: it is taken in the forward pass and nothing of
    size V is kept.
    """
    LOGITS = 1 << 23  # 32 MB

    @staticmethod
    def forward(ctx, x, head, targets, weights, z_loss):
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dhead = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total, rows = x.new_zeros((), dtype=torch.float32), min(max(ChunkedNLL.LOGITS // len(head), 1), 1024)
        for i in range(0, len(x), rows):
            part = slice(i, i + rows)
            h, t, w = x[part], targets[part, None], weights[part, None]
            logits = (h @ head.T).float()  # (n, V)
            lse = logits.logsumexp(1, keepdim=True)
            total += (w * (lse - logits.gather(1, t) + z_loss * lse ** 2)).sum()
            if dx is None and dhead is None:
                continue
            # d nll = softmax - onehot(target);  d lse² = 2 · lse · softmax
            grad = logits.sub_(lse).exp_().mul_(w * (1 + 2 * z_loss * lse)).scatter_add_(1, t, -w).to(h.dtype)
            if dx is not None:
                dx[part] = grad @ head
            if dhead is not None:
                dhead += grad.T @ h
            del logits, grad  # or they would be there while the next ones are made
        ctx.save_for_backward(dx, dhead)
        ctx.dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx, g):
        dx, dhead = ctx.saved_tensors
        return (None if dx is None else dx * g.to(dx.dtype),
                None if dhead is None else (dhead * g).to(ctx.dtype), None, None, None)


# ---- the model ---------------------------------------------------------------------------------------------

class Molmo2(nn.Module):
    """Molmo2(ModelConfig or preset name). Weights are random; `Molmo2.from_pretrained(folder)` reads a
    checkpoint."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg = replace(PRESETS[cfg]) if isinstance(cfg, str) else cfg
        self.transformer = Decoder(cfg)
        self.vision_backbone = VisionBackbone(cfg)
        self.lm_head = nn.Linear(cfg.width, cfg.vocab, bias=False)
        if cfg.tie:
            self.lm_head.weight = self.transformer.wte.embedding
        self.residual_dropout = 0.0  # on every position, in training
        self.response_dropout = 0.0  # on top of that where an answer is predicted
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, only=None):
        """Random weights from which training starts fast: N(0, 0.02) at published widths, and three aids.
        only: their names.

        - 0.02 suits widths of thousands. In a narrow matrix it would shrink whatever passes: the picture would
          reach the decoder a million times fainter than the `<image>` embedding it is added to. There,
          1/sqrt(inputs) keeps its size.
        - What a sub-layer adds starts at zero, so that pixels and their places are not drowned in random mixing
          at first.
        - The ViT's places start as sines and cosines of row and column, so that it need not learn first what is
          next to what.
        """
        for name, p in self.named_parameters():
            if only is not None and name not in only:
                continue
            if p.ndim == 1:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
            elif name.endswith("positional_embedding"):
                p.copy_(waves(self.cfg.crop // self.cfg.patch, p.shape[1]) / 2)
            else:
                nn.init.normal_(p, std=0.02 if "wte." in name or p.shape[1] >= 1024 else p.shape[1] ** -0.5)
        if only is not None:  # blocks are only new where all is
            return
        for block in self.vision_backbone.image_vit.transformer["resblocks"]:
            nn.init.zeros_(block.attention.wo.weight)
            nn.init.zeros_(block.feed_forward.w2.weight)
        # a norm of zeros has no gradient, so a norm that comes last starts at 0 itself
        for block in self.transformer.blocks:
            for norm, last in ((block.attn_norm, block.self_attn.attn_out),
                               (block.ff_norm, block.mlp.ff_out)):
                nn.init.zeros_(norm.weight if self.cfg.norm_after else last.weight)

    def num_params(self):
        """Parameters, a tied head counted as if it were its own tensor (the released files store it so)."""
        return sum(p.numel() for p in self.parameters()) + self.cfg.tie * self.lm_head.weight.numel()

    def parts(self):
        """{"vit", "connector", "decoder"}: the parameters that share a learning rate. The EXTRA rows are new,
        as the connector is, and train with it."""
        parts = {"vit": [], "connector": [], "decoder": []}
        for name, p in self.named_parameters():
            new = name.startswith("vision_backbone") or name.endswith("new_embedding")
            parts["vit" if ".image_vit." in name else "connector" if new else "decoder"].append((name, p))
        return parts

    def blocks(self):
        """Decoder and ViT blocks: what is sharded, compiled and computed again one by one."""
        return [*self.transformer.blocks, *self.vision_backbone.image_vit.transformer["resblocks"]]

    def check(self, tokens, crops, pool, others, features=None):
        """Fail with the numbers in hand before a shape error fails without them."""
        for name, x in others.items():
            assert x is None or x.shape == tokens.shape, f"{name} is {tuple(x.shape)}, tokens are {tuple(tokens.shape)}"
        n, m = int((tokens == self.cfg.image_token).sum()), 0 if pool is None else len(pool)
        assert n == m, f"{n} <image> tokens but {m} pooled windows: was a row cut, or media left out?"
        top, rows = int(tokens.max()), self.cfg.vocab + EXTRA
        assert top < rows, f"token id {top}, but the table has {rows} rows: is this another model's tokenizer?"
        if features is not None:
            assert features.shape == (m, self.cfg.width), f"features are {tuple(features.shape)}, of {m} windows"
        elif m:
            assert crops.shape[1:] == (self.cfg.patches, self.cfg.patch ** 2 * 3), \
                f"crops are {tuple(crops.shape)}, expected (N, {self.cfg.patches}, {self.cfg.patch ** 2 * 3})"
            assert int(pool.max()) < crops.shape[0] * crops.shape[1], "pool points past the last patch"

    def embed(self, tokens, crops=None, pool=None, features=None):
        """(B, T) ids and their pictures -> (B, T, D): image features are added to the `<image>` embedding.

        features: (M, D) of the <image> tokens in row-major order, if the vision backbone has made them before.
        """
        x = self.transformer.wte(tokens)
        # Crops are encoded even if none of their windows is wanted here: under FSDP and context parallelism all
        # ranks run the same modules.
        if crops is not None or features is not None:
            features = self.vision_backbone(crops, pool) if features is None else features
            at = (tokens.flatten() == self.cfg.image_token).nonzero()[:, 0]
            x = x.flatten(0, 1).index_add(0, at, features.to(x.dtype))
        return x.view(*tokens.shape, -1)

    def mask(self, tokens, example, branch):
        """Who may attend to whom, as `attend` takes it. Training puts a mask in blocks here (lib/flex.py), and context
        parallelism one of all ranks' tokens (ulysses.py)."""
        return dense_mask(example, branch, is_vision(tokens, self.cfg.vocab))

    def forward(self, tokens, crops=None, pool=None, pos=None, example=None, branch=None, targets=None,
                weights=None, z_loss=0.0):
        """Logits (B, T, V), or, with targets and weights, the sum of weight · (nll + z_loss · lse²).

        tokens, pos, example, branch, targets: (B, T) int64; weights: (B, T) float; crops: (N, P,
        patch·patch·3); pool: (M, K). Without pos, example and branch each row is one plain causal example.
        """
        self.check(tokens, crops, pool,
                   dict(pos=pos, example=example, branch=branch, targets=targets, weights=weights))
        pos, example, branch = self.plain(tokens, pos, example, branch)
        mask, drop = self.mask(tokens, example, branch), None
        if self.training and (self.residual_dropout or self.response_dropout):
            drop = self.residual_dropout + self.response_dropout * (weights > 0).float()[..., None]
        x = self.transformer(self.embed(tokens, crops, pool), pos, mask, drop)
        if targets is None:
            return self.lm_head(x)
        learn = weights > 0  # the head, the largest matrix of all, only runs where something is to be learned
        head = self.lm_head.weight.to(x.dtype) if torch.is_autocast_enabled(x.device.type) else self.lm_head.weight
        return ChunkedNLL.apply(x[learn], head, targets[learn], weights[learn], z_loss)

    @staticmethod
    def plain(tokens, pos, example, branch):
        """Fill in what a caller left out: positions 0, 1, ..., one example per row, no branches."""
        pos = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens) if pos is None else pos
        example = torch.ones_like(tokens) if example is None else example
        return pos, example, torch.zeros_like(tokens) if branch is None else branch

    @torch.inference_mode()
    def generate(self, tokens, crops=None, pool=None, max_new_tokens=256, temperature=0.0, stop=(), pos=None,
                 example=None, branch=None, generator=None, features=None):
        """Continue B prompts; yields one (B,) tensor of ids per step, as they come. Greedy at temperature 0.

        Prompts of different lengths are padded on the right with example = 0. A row that has produced an id
        in `stop` repeats it until all rows are done.
        """
        assert not self.training, "call model.eval() first: dropout would be on"
        self.check(tokens, crops, pool, dict(pos=pos, example=example, branch=branch), features)
        pos, example, branch = self.plain(tokens, pos, example, branch)
        B, T = tokens.shape
        caches = [KVCache(T + max_new_tokens) for _ in self.transformer.blocks]
        mask = dense_mask(example, branch, is_vision(tokens, self.cfg.vocab))
        x = self.transformer(self.embed(tokens, crops, pool, features), pos, mask, caches=caches)
        last = (example > 0).sum(1) - 1  # where each prompt ends
        rows = torch.arange(B, device=tokens.device)
        x, next_pos = x[rows, last], pos[rows, last] + 1
        all_pos = torch.cat([pos, next_pos[:, None] + torch.arange(max_new_tokens, device=tokens.device)], 1)
        # From here on every new token sees its whole prompt (what it may see there) and all tokens after it.
        seen = torch.cat([mask[rows, 0, last], mask.new_ones(B, max_new_tokens)], 1)[:, None, None]  # (B, 1, 1, S)
        stop_ids = torch.tensor(tuple(stop), dtype=torch.long, device=tokens.device)
        done = torch.zeros(B, dtype=torch.bool, device=tokens.device)
        ids = None
        for step in range(max_new_tokens):
            logits = self.lm_head(x).float()  # (B, V)
            if temperature > 0:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            else:
                new = logits.argmax(-1)
            ids = new if ids is None else torch.where(done, ids, new)
            done = done | torch.isin(ids, stop_ids)
            yield ids.clone()
            if step + 1 == max_new_tokens or bool(done.all()):
                return
            x = self.transformer(self.embed(ids[:, None]), next_pos[:, None], seen[..., :T + step + 1],
                                 caches=caches, key_pos=all_pos[:, :T + step + 1])
            x, next_pos = x[:, 0], next_pos + 1

    @classmethod
    def from_pretrained(cls, folder, vision=None):
        """A model from a checkpoint folder in any published layout (lib/weights.py does the reading), or from a
        plain language model and the folder of a SigLIP, `vision`."""
        from lib import weights
        return weights.load(folder, vision)

    def save_pretrained(self, folder, frames=384):
        """config.json and model.safetensors in the published layout, so that other tools can load them too. frames: the
        most it was shown of a video."""
        from lib import weights
        weights.save(self, folder, frames)


# ---- what it costs -----------------------------------------------------------------------------------------


if __name__ == "__main__":
    for name in PRESETS:
        with torch.device("meta"):
            model = Molmo2(name)
        sizes = {part: sum(p.numel() for _, p in ps) for part, ps in model.parts().items()}
        print(f"{name:>6} {model.num_params():>14,}  " + "  ".join(f"{k} {v:,}" for k, v in sizes.items()))
