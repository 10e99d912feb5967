"""Context parallelism is the same computation: attention, loss and gradients, on any tree of messages and
media."""
import copy

import pytest
import torch
import torch.distributed as dist
from conftest import V, random_batch, run_ranks, tiny_model

import ulysses
from model import IMAGE, attend


def check_attention(rank, ranks):
    """(must show 1) to rounding, whatever the numbers of heads, of key/value heads and of tokens."""
    for seed in range(60):
        rng = torch.Generator().manual_seed(seed)
        pick = lambda *xs: xs[int(torch.randint(0, len(xs), (1,), generator=rng))]
        H, B, T, hd = pick(4, 8), pick(1, 2), ranks * pick(1, 3, 8, 16), pick(4, 8)
        G = pick(*[g for g in (1, 2, 4, 8) if H % g == 0])
        q, k, v = (torch.randn(B, n, T, hd, generator=rng, requires_grad=True) for n in (H, G, G))
        mask = (torch.rand(B, 1, T, T, generator=rng) < 0.5) | torch.eye(T, dtype=torch.bool)
        out = attend(q, k, v, mask)
        seed_grad = torch.randn(out.shape, generator=rng)
        out.backward(seed_grad)
        here = slice(rank * T // ranks, (rank + 1) * T // ranks)
        mine = [x.detach()[:, :, here].requires_grad_() for x in (q, k, v)]
        sent = []
        send = dist.all_to_all_single
        dist.all_to_all_single = lambda out, x, *a, **k: (sent.append(x.numel() * (ranks - 1) // ranks),
                                                          send(out, x, *a, **k))
        got = ulysses.ulysses_attend(*mine, mask, attend, None)
        dist.all_to_all_single = send
        # (must show 3) the docstring's formula
        assert sum(sent) == B * (T // ranks) * (2 * H + 2 * max(G, ranks)) * hd * (ranks - 1) // ranks
        assert len(sent) == 2
        got.backward(seed_grad[:, :, here])
        pairs = [(got, out[:, :, here])] + [(a.grad, b.grad[:, :, here]) for a, b in zip(mine, (q, k, v))]
        for i, (a, b) in enumerate(pairs):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max(), (seed, i)


def loss_and_gradients(model, batch):
    """All in one vector."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch, z_loss=1e-3)
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([x.detach().flatten() for x in (loss, *grads)])


def check_model(rank, ranks, style):
    """(must show 1) the ranks' losses and gradients add up to those of one process."""
    torch.use_deterministic_algorithms(True)
    plain = tiny_model(style).train()
    parallel = copy.deepcopy(plain)
    ulysses.install(parallel, dist.group.WORLD)
    for seed in range(24):
        rng = torch.Generator().manual_seed(seed)
        draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=rng))
        batch = random_batch(rng, draw(1, 3), ranks * draw(1, 40 // ranks))
        got = loss_and_gradients(parallel, ulysses.shard_batch(batch, V + IMAGE, rank, ranks))
        dist.all_reduce(got)
        if seed % ranks == rank:  # each in turn compares for all
            want = loss_and_gradients(plain, batch)
            off = (got - want).abs()
            assert off[0] <= 1e-5 * want[0].abs() and off[1:].max() <= 3e-6 * want[1:].norm(), seed


def test_every_window_lies_with_its_crops():
    """The published code loses this where pictures differ in size (FACTS 9.1, 15): 9, 1, 1, 16 and 1
    crops."""
    patches, sizes = 4, [9, 1, 1, 16, 1]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pool = torch.tensor([[patches * s, patches * (s + n) - 1, -1] for s, n in zip(starts, sizes)])
    bounds, encoder = ulysses.assign_crops(sum(sizes), pool, patches, 4)
    assert bounds == [0, 9, 11, 27, 28] and encoder.tolist() == [0, 1, 1, 2, 3]
    rng = torch.Generator().manual_seed(0)
    for _ in range(300):
        n, ranks = int(torch.randint(1, 12, (1,), generator=rng)), int(torch.randint(1, 9, (1,), generator=rng))
        first = torch.randint(0, n, (7, 1), generator=rng)
        span = (first + torch.randint(0, 3, (7, 1), generator=rng)).clamp(max=n - 1)
        pool = torch.cat([first * patches, torch.full((7, 1), -1), span * patches + 1], 1)
        bounds, encoder = ulysses.assign_crops(n, pool, patches, ranks)
        assert len(bounds) == ranks + 1 and bounds[0] == 0 and bounds[-1] == n and bounds == sorted(bounds)
        for (a, _, b), r in zip(pool.tolist(), encoder.tolist()):
            assert bounds[r] <= a // patches and b // patches < bounds[r + 1]


def check_published_case(rank, ranks):
    """Pictures of 9, 1, 1, 16 and 1 crops, each with windows over all of it, the tokens elsewhere than the
    crops."""
    backbone, rng, sizes = tiny_model().vision_backbone, torch.Generator().manual_seed(0), (9, 1, 1, 16, 1)
    crops, windows, start = torch.randint(0, 256, (28, 25, 48), generator=rng).byte(), [], 0
    for n in sizes:
        windows += [torch.randint(25 * start, 25 * (start + n), (4, 4), generator=rng),
                    torch.tensor([[25 * start, 25 * (start + n) - 1, -1, -1]] * 4)]
        start += n
    pool = torch.cat(windows)[torch.randperm(40, generator=rng)]
    mine = pool[rank * 10:rank * 10 + 10]
    with torch.no_grad():
        got, want = ulysses.shared_features(backbone.forward, crops, mine, None), backbone(crops, pool)
    want = want[rank * 10:rank * 10 + 10]
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    bounds, _ = ulysses.assign_crops(28, pool, 25, ranks)
    assert len({b - a for a, b in zip(bounds, bounds[1:])}) > 1  # shares differ, and that is where it went wrong


def check_few_crops(rank, ranks):
    """Fewer crops than ranks: each encodes one, or, sharded, the others would wait for it for ever."""
    backbone, calls = tiny_model().vision_backbone, []
    rng = torch.Generator().manual_seed(0)
    for n in (1, 2, 3):
        crops = torch.randint(0, 256, (n, 25, 48), generator=rng).byte()
        pool = torch.randint(0, 25 * n, (ranks, 4), generator=rng) if n < 3 else torch.zeros(0, 4, dtype=torch.long)
        mine = pool[rank:rank + 1]

        def encode(crops, pool):
            calls.append(len(crops))
            return backbone(crops, pool)
        calls.clear()
        with torch.no_grad():
            got, want = ulysses.shared_features(encode, crops, mine, None), backbone(crops, pool)[rank:rank + 1]
        assert got.shape == want.shape and (got - want).norm() <= 1e-5 * want.norm()  # none at all where n is 3
        assert len(calls) == 1 and calls[0] >= 1, (n, calls)
        per_rank = [None] * ranks
        dist.all_gather_object(per_rank, calls[0])
        assert sum(per_rank) <= n + ranks - 1


def check_all(rank, ranks, style):
    check_attention(rank, ranks)
    if ranks == 4:
        check_published_case(rank, ranks)
        check_few_crops(rank, ranks)
    check_model(rank, ranks, style)


@pytest.mark.parametrize("ranks, style", [(2, "olmo"), pytest.param(4, "qwen", marks=pytest.mark.slow)])
def test_ranks_compute_what_one_does(ranks, style):
    """Attention; features, which come back to their tokens, also from a rank without crops; loss and gradients."""
    run_ranks(check_all, ranks, style)


def test_heads_that_cannot_be_shared_are_refused():
    ulysses.check_heads(32, 8, 8), ulysses.check_heads(32, 8, 16), ulysses.check_heads(8, 8, 1)
    with pytest.raises(ValueError, match="4 heads .* 3 ranks"):
        ulysses.check_heads(4, 4, 3)
    with pytest.raises(ValueError, match="6 key/value heads and 4 ranks"):
        ulysses.check_heads(12, 6, 4)
