"""
Context parallelism by hand: one packed row, cut over several devices (DeepSpeed-Ulysses, arXiv 2309.14509).

A row of 36,864 tokens does not fit one card's memory, so P ranks hold T/P tokens each. Everything in the
model works on one token at a time and does not notice, except for two places:

- **attention** mixes tokens. But its heads do not mix, so before it the ranks all_to_all: each gives away all
  heads but its own share, and gets its heads' share of all other tokens. After it they all_to_all back.

    rank 0   tokens 0..T/2, heads a b c d          all tokens, heads a b        tokens 0..T/2, heads a b c d
                                          ─ all ─►  attention, as  ─ all ─►
    rank 1   tokens T/2..T, heads a b c d   to all  on one device    to all     tokens T/2..T, heads a b c d
                                                    all tokens, heads c d

- **pictures** are encoded where there is time and needed where their tokens are. The ranks share out the
  crops, and send the features of every visual token to the rank that holds it.

Both are one primitive, the all-to-all: a rank cuts what it has into P pieces and sends the p-th to rank p. It
is a permutation of numbers over ranks, so its gradient is the same exchange the other way round.

    install(model, group)        # a plain Molmo2: its attention, mask and vision are patched
    loss = model(**shard_batch(batch, model.cfg.image_token, rank, P))  # losses, gradients add up over ranks

What it costs. Per layer and rank, forward, in elements: q, k, v in one message and the output in another,

    B · T/P · (2H + 2G') · hd · (P-1)/P,        G' = max(G, P) key/value heads

and as much again backward: divided by P, unlike a ring that passes all keys and values by every rank. H must
be a multiple of P, and G a multiple or a divisor of it: fewer key/value heads than ranks are repeated before
the all_to_all.

The mask is built from the ids of the whole row, which every rank gathers (three integers a token): any mask
works.

Shapes:  B rows, T tokens of the whole row, P ranks, H heads, G key/value heads, hd head width, M visual
         tokens
"""
import functools

import torch
import torch.distributed as dist


class AllToAll(torch.autograd.Function):
    """All-to-all along the first axis. x: the pieces for rank 0, 1, ... one after the other, sent[p] rows for
    rank p; returns what the ranks sent here, got[p] rows from rank p."""

    @staticmethod
    def forward(ctx, x, sent, got, group):
        ctx.back = got, sent, group
        out = x.new_empty(sum(got), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(got), list(sent), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return AllToAll.apply(grad, *ctx.back), None, None, None


# ---- attention ---------------------------------------------------------------------------------------------

def all_to_all(x, group, back=False):
    """All heads of some tokens -> some heads of all tokens, (B, H, T/P, hd) -> (B, H/P, T, hd), or `back`."""
    P = dist.get_world_size(group)
    # the axis that is given away, cut into P, goes first
    x = x.unflatten(2 if back else 1, (P, -1)).movedim(2 if back else 1, 0)  # (P, B, H/P, T/P, hd)
    x = AllToAll.apply(x, [1] * P, [1] * P, group)
    # and the axis that was received, in the order of the ranks, closes up
    return x.movedim(0, 1 if back else 2).flatten(*((1, 2) if back else (2, 3)))


def ulysses_attend(q, k, v, mask, attend, group):
    """`attend`, the attention of one device, over a group. q: (B, H, T/P, hd); k, v: (B, G, T/P, hd); mask:
    of the whole row."""
    P, (H, G) = dist.get_world_size(group), (q.shape[1], k.shape[1])
    if G < P:  # rank p needs the key/value head of its own query heads, and several ranks the same one
        k, v = (x.repeat_interleave(P // G, 1) for x in (k, v))
        G = P
    # One message for q, k and v: the heads of rank p stand together.
    qkv = torch.cat([x.unflatten(1, (P, -1)) for x in (q, k, v)], 2).flatten(1, 2)  # (B, H + 2G, T/P, hd)
    q, k, v = all_to_all(qkv, group).split([H // P, G // P, G // P], 1)  # (B, ·, T, hd)
    return all_to_all(attend(q, k, v, mask), group, back=True)


def check_heads(heads, kv_heads, cp):
    """Raise ValueError where `cp` ranks cannot share the heads."""
    if heads % cp:
        raise ValueError(f"{heads} heads cannot be shared by {cp} ranks: --cp must divide them")
    if kv_heads % cp and cp % kv_heads:
        raise ValueError(f"{kv_heads} key/value heads and {cp} ranks: one must divide the other; choose "
                         "another --cp")


# ---- pictures ----------------------------------------------------------------------------------------------

def assign_crops(n_crops, pool, patches, ranks):
    """Which rank encodes which crops: a list of `ranks + 1` ascending bounds, and for each window its rank
    (M,).

    A window may gather patches of several crops of one picture, so these stay together; what can be parted is
    shared as evenly as whole pieces allow. A rank may get nothing.
    """
    first = torch.where(pool >= 0, pool // patches, n_crops).amin(1)  # the crops a window begins and ends in
    last = torch.where(pool >= 0, pool // patches, -1).amax(1)
    # windows that span the cut before a crop
    open_ = torch.zeros(n_crops + 1, dtype=torch.long, device=pool.device)
    some = last >= 0
    open_.index_add_(0, first[some] + 1, torch.ones_like(first[some]))
    open_.index_add_(0, last[some] + 1, -torch.ones_like(last[some]))
    cuts = (open_.cumsum(0) == 0).nonzero()[:, 0]
    # the cut nearest to each even share
    ideal = torch.arange(1, ranks, device=pool.device) * n_crops / ranks
    bounds = cuts[(cuts[None] - ideal[:, None]).abs().argmin(1)].tolist() if len(cuts) else []
    bounds = [0, *bounds, n_crops]
    owner = torch.bucketize(last.clamp(min=0), torch.tensor(bounds[1:-1], device=pool.device), right=True)
    return bounds, owner


def all_gather_rows(x, group):
    """What every rank holds, however many rows each: a list of P tensors. No gradient."""
    P = dist.get_world_size(group)
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(P)]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device), group=group)
    n = max(int(c) for c in counts)
    padded = [x.new_empty(n, *x.shape[1:]) for _ in range(P)]
    dist.all_gather(padded, torch.cat([x, x.new_zeros(n - len(x), *x.shape[1:])]), group=group)
    return [p[:int(c)] for p, c in zip(padded, counts)]


def shared_features(encode, crops, pool, group):
    """`VisionBackbone.forward` over a group. crops: of the whole rows, the same on all ranks; pool: (m, K),
    the windows of the tokens held here -> (m, D)."""
    rank, P, patches = dist.get_rank(group), dist.get_world_size(group), crops.shape[1]
    pools = all_gather_rows(pool, group)
    holder = torch.cat([torch.full((len(p),), r, device=p.device) for r, p in enumerate(pools)])
    pool = torch.cat(pools)
    bounds, encoder = assign_crops(len(crops), pool, patches, P)
    here = encoder == rank
    # A rank without a crop encodes one for nobody: under FSDP all ranks run the same modules.
    mine = crops[bounds[rank]:bounds[rank + 1]] if bounds[rank] < bounds[rank + 1] else crops[:1]
    features = encode(mine, torch.where(pool[here] >= 0, pool[here] - bounds[rank] * patches, -1))
    # Sent in the order of the ranks that hold the tokens. Received in the order of those that encoded:
    # whatever the split was, each goes back to its place.
    to, of = holder[here], encoder[holder == rank]
    sent, got = (torch.bincount(r, minlength=P).tolist() for r in (to, of))
    received = AllToAll.apply(features[to.argsort(stable=True)], sent, got, group)
    return received[of.argsort(stable=True).argsort()]


# ---- a model and a batch -----------------------------------------------------------------------------------

def install(model, group):
    """Patch a plain Molmo2 so that each rank of `group` may be given its part of a batch (`shard_batch`)."""
    cfg, P = model.cfg, dist.get_world_size(group)
    check_heads(cfg.heads, cfg.kv_heads, P)
    assert not cfg.window, "windowed layers compare positions with the whole row's: Molmo2 has none"
    for block in model.transformer.blocks:
        block.self_attn.attend = functools.partial(ulysses_attend, attend=block.self_attn.attend, group=group)
    plain_mask = model.mask

    def mask(tokens, example, branch):
        ids = torch.stack([tokens, example, branch], -1).movedim(1, 0)  # (T/P, B, 3)
        return plain_mask(*torch.cat(all_gather_rows(ids, group)).movedim(0, 1).unbind(-1))
    model.mask = mask
    backbone = model.vision_backbone
    backbone.forward = functools.partial(shared_features, backbone.forward, group=group)


def shard_batch(batch, image_token, rank, ranks):
    """This rank's part of a batch: T/P tokens of every row with their windows, and all crops."""
    T, tokens = batch["tokens"].shape[1], batch["tokens"]
    assert T % ranks == 0, f"{T} tokens cannot be cut into {ranks} equal parts: choose --seq_len accordingly"
    here = slice(rank * T // ranks, (rank + 1) * T // ranks)
    part = {k: v[:, here] for k, v in batch.items() if k not in ("crops", "pool") and v is not None}
    if batch.get("crops") is not None:
        window = (tokens == image_token).flatten().cumsum(0).view_as(tokens)[:, here] - 1
        part |= dict(crops=batch["crops"], pool=batch["pool"][window[part["tokens"] == image_token]])
    return part
