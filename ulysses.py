"""
Context parallelism by hand: one packed sequence, cut over several devices (DeepSpeed-Ulysses, arXiv 2309.14509).

A sequence of 36,864 tokens does not fit one card's memory, so P ranks hold T/P tokens each. Everything in the model
works on one token at a time and does not notice, except for two places:

- **Attention** mixes tokens. But its heads do not mix, so before it the ranks do an all-to-all: each sends away all
  heads but its own share, and receives its heads of all other tokens. After it a second one brings the outputs back.

    rank 0   tokens 0..T/2, heads a b c d          all tokens, heads a b        tokens 0..T/2, heads a b c d
                                          ─ all ─►  attention, as  ─ all ─►
    rank 1   tokens T/2..T, heads a b c d   to all  on one device    to all     tokens T/2..T, heads a b c d
                                                    all tokens, heads c d

- **Images** are encoded where there is time and needed where their tokens are. Each rank encodes a share of the
  crops, and sends the features of every visual token to the rank that holds it.

Both are one primitive, the all-to-all: a rank cuts what it has into P pieces and sends the p-th to rank p. It is a
permutation of numbers over ranks, so its gradient is the same exchange the other way round.

    install(model, group)        # replaces attention, mask and vision of a Molmo2; after lib/flex.install
    loss = model(**shard_batch(batch, model.cfg.image_token, rank, P))  # losses and gradients add up over ranks

Where to look: `shard_batch` cuts tokens and windows; `ulysses_attend` and `all_to_all` exchange heads for tokens;
`assign_crops` and `shared_features` share out the crops; `AllToAll.backward` is why the gradient is right.

What it costs. Per layer and rank, forward, in elements: q, k, v in one message and the output in another,

    B · T/P · (2H + 2G') · hd · (P-1)/P,        G' = max(G, P) key/value heads

and as much again backward: divided by P, unlike a ring, which passes all keys and values by every rank. H must be a
multiple of P, and G a multiple or a divisor of it: fewer key/value heads than ranks are repeated before the message.

Every rank gathers the ids of the whole sequence, three integers a token, and builds the mask: any mask works.

Shapes:  B sequences, T tokens of the whole sequence, P ranks, H heads, G key/value heads, hd head width, M visual
         tokens, m of them on this rank, K patches pooled into one, D width
"""
import functools

import torch
import torch.distributed as dist


class AllToAll(torch.autograd.Function):
    """All-to-all along the first axis. x: the pieces for rank 0, 1, ... one after the other, sent[p] rows for rank p;
    returns the pieces from rank 0, 1, ..., got[p] rows from rank p."""

    @staticmethod
    def forward(ctx, x, sent, got, group):
        ctx.back = got, sent, group
        out = x.new_empty(sum(got), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(got), list(sent), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return AllToAll.apply(grad, *ctx.back), None, None, None


# ---- attention -----------------------------------------------------------------------------------------------------

def all_to_all(x, group, back=False):
    """All heads of some tokens -> some heads of all tokens, (B, H, T/P, hd) -> (B, H/P, T, hd), or `back`."""
    P = dist.get_world_size(group)
    cut, joined = (2, 1) if back else (1, 2)  # axis 1 is the heads, 2 the tokens
    x = x.unflatten(cut, (P, -1)).movedim(cut, 0)  # (P, B, H/P, T/P, hd): a piece for each rank
    x = AllToAll.apply(x, [1] * P, [1] * P, group)  # a piece from each rank
    return x.movedim(0, joined).flatten(joined, joined + 1)


def ulysses_attend(q, k, v, mask, attend, group):
    """`attend`, the attention of one device, over a group. q: (B, H, T/P, hd); k, v: (B, G, T/P, hd);
    mask: of the whole sequence."""
    P = dist.get_world_size(group)
    H, G = q.shape[1], k.shape[1]
    if G < P:  # rank p needs the key/value head of its own query heads, and several ranks the same one
        k = k.repeat_interleave(P // G, 1)
        v = v.repeat_interleave(P // G, 1)
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
        raise ValueError(f"{kv_heads} key/value heads and {cp} ranks: one must divide the other; choose another --cp")


# ---- images --------------------------------------------------------------------------------------------------------

def assign_crops(n_crops, pool, patches, ranks):
    """Which rank encodes which crops: (bounds, encoder). Rank r encodes crops bounds[r] to bounds[r + 1], perhaps
    none; encoder: (M,), the rank that encodes a window. pool: (M, K) indices of patches.

    A window may gather patches of several crops, and one rank must encode them all. So a cut is allowed only where
    no window spans it; those nearest to equal shares are taken.

        crops          0 1 2 3 4 5
        windows        === =====           one over crops 0 and 1, one over 2 to 4
        allowed cuts  |   |     | |        of 2 ranks, the one before crop 2 (equal shares: before 3)
    """
    crop = pool // patches
    first = crop.masked_fill(pool < 0, n_crops).amin(1)  # (M,): of a window
    last = crop.masked_fill(pool < 0, -1).amax(1)
    # spans[c]: windows that span the cut before crop c. A window from crop a to crop b does so for a < c <= b.
    change = torch.zeros(n_crops + 1, dtype=torch.long, device=pool.device)
    real = last >= 0  # not a window of padding alone
    change.index_add_(0, first[real] + 1, torch.ones_like(first[real]))
    change.index_add_(0, last[real] + 1, -torch.ones_like(last[real]))
    spans = change.cumsum(0)
    allowed = (spans == 0).nonzero()[:, 0]
    equal = torch.arange(1, ranks, device=pool.device) * n_crops / ranks
    cuts = allowed[(allowed - equal[:, None]).abs().argmin(1)]  # (ranks - 1,)
    encoder = torch.bucketize(last.clamp(min=0), cuts, right=True)
    return [0, *cuts.tolist(), n_crops], encoder


def all_gather_rows(x, group):
    """What every rank holds, however many rows each: a list of P tensors. No gradient."""
    P = dist.get_world_size(group)
    counts = torch.zeros(P, 1, dtype=torch.long, device=x.device)
    dist.all_gather(list(counts), torch.tensor([len(x)], device=x.device), group=group)
    counts = counts.flatten().tolist()
    # An all-gather takes tensors of one size, so all are padded to the longest.
    padded = x.new_empty(P, max(counts), *x.shape[1:])
    dist.all_gather(list(padded), torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])]), group=group)
    return [tensor[:n] for tensor, n in zip(padded, counts)]


def shared_features(encode, crops, pool, group):
    """`VisionBackbone.forward` over a group. crops: of the whole sequences, the same on all ranks; pool: (m, K), the
    windows of the tokens on this rank -> (m, D)."""
    rank = dist.get_rank(group)
    P = dist.get_world_size(group)
    patches = crops.shape[1]
    pools = all_gather_rows(pool, group)
    holder = torch.cat([torch.full((len(p),), r, device=p.device) for r, p in enumerate(pools)])  # who needs a window
    pool = torch.cat(pools)  # (M, K)
    bounds, encoder = assign_crops(len(crops), pool, patches, P)  # encoder: who encodes it
    begin, end = bounds[rank], bounds[rank + 1]
    # A rank without a crop encodes one for nobody: under FSDP all ranks run the same modules.
    rank_crops = crops[begin:end] if begin < end else crops[:1]
    rank_pool = pool[encoder == rank]
    features = encode(rank_crops, torch.where(rank_pool >= 0, rank_pool - begin * patches, -1))

    # Send every feature to the rank that holds its token. An all-to-all sends what is sorted by receiver, and what
    # arrives is sorted by sender; sender and receiver list the windows in the same order, that of `pool`.
    receiver = holder[encoder == rank]
    sender = encoder[holder == rank]
    sent = torch.bincount(receiver, minlength=P).tolist()
    got = torch.bincount(sender, minlength=P).tolist()
    received = AllToAll.apply(features[receiver.argsort(stable=True)], sent, got, group)
    window_of_row = sender.argsort(stable=True)  # the i-th row received is this window of the rank's
    return torch.zeros_like(received).index_copy(0, window_of_row, received)


# ---- a model and a batch -------------------------------------------------------------------------------------------

def install(model, group):
    """Make each rank of `group` compute its part of a batch (`shard_batch`). Wraps the mask and the attention that
    the model has, so whoever replaces these goes first."""
    cfg = model.cfg
    check_heads(cfg.heads, cfg.kv_heads, dist.get_world_size(group))
    assert not cfg.window, "windowed layers compare positions with the whole sequence's: Molmo2 has none"
    for block in model.transformer.blocks:
        block.self_attn.attend = functools.partial(ulysses_attend, attend=block.self_attn.attend, group=group)
    mask_of_sequence = model.mask

    def mask(tokens, example, branch):
        ids = torch.stack([tokens, example, branch], -1).movedim(1, 0)  # (T/P, B, 3)
        ids = torch.cat(all_gather_rows(ids, group)).movedim(0, 1)  # (B, T, 3)
        return mask_of_sequence(*ids.unbind(-1))
    model.mask = mask
    backbone = model.vision_backbone
    backbone.forward = functools.partial(shared_features, backbone.forward, group=group)


def shard_batch(batch, image_token, rank, ranks):
    """This rank's part of a batch: T/P tokens of every sequence with their windows, and all crops."""
    tokens = batch["tokens"]
    T = tokens.shape[1]
    assert T % ranks == 0, f"{T} tokens cannot be cut into {ranks} equal parts: choose --seq_len accordingly"
    span = slice(rank * T // ranks, (rank + 1) * T // ranks)
    part = {k: v[:, span] for k, v in batch.items() if k not in ("crops", "pool") and v is not None}
    if batch.get("crops") is not None:
        is_image = tokens == image_token
        window = is_image.flatten().cumsum(0).view_as(tokens) - 1  # (B, T): at the k-th <image> token of all, k
        part |= dict(crops=batch["crops"], pool=batch["pool"][window[:, span][is_image[:, span]]])
    return part
