"""
The attention mask in blocks, for FlexAttention on CUDA, and example by example, for long sequences on CPU.
"""
import functools

import torch
import torch.nn.functional as F

import model
from model import dense_mask, is_vision, may_attend


def example_masks(example, branch, vision):
    """The rule for whole rows, example by example: for each row [(length n of an example, (1, 1, n, n) bool)], with
    None for padding. Ten packed examples attended to one after the other are a tenth of the work of T x T."""
    rows = []
    for ids in zip(example, branch, vision):
        parts, begin = [], 0
        for e, n in zip(*(x.tolist() for x in ids[0].unique_consecutive(return_counts=True))):
            t, own = torch.arange(n, device=example.device), (x[begin:begin + n] for x in ids)
            parts.append((n, may_attend(t[:, None], t[None], *own)[None, None] if e else None))
            begin += n
        rows.append(parts)
    return rows


def block_mask(example, branch, vision, block=128):
    """The rule for whole rows as a FlexAttention BlockMask: which blocks of 128 x 128 pairs hold any that may attend,
    and which hold no other. Never T x T: a packed row is in order, so the ends of its blocks tell.

    A row is examples one after the other, each its trunk (branch 0, where all vision tokens are) and its branches one
    after the other, then padding (0). So of two blocks, only the last example of the earlier can also be in the
    later one, where it is the first; and of its branches, only the last.
    """
    from torch.nn.attention.flex_attention import BlockMask
    B, T = example.shape
    ids = [F.pad(x, (0, -T % block)) for x in (example, branch, vision)]
    e, b, v = (x.unflatten(1, (-1, block)) for x in ids)  # (B, n, 128)
    none, n = e.new_tensor(1 << 60), e.shape[1]
    first, last = torch.where(e > 0, e, none).amin(2), e.amax(2)  # examples of a block, (B, n)
    one = (first == last) & (e > 0).all(2)                        # there is but one, and no padding
    of_last = (e == last[..., None]) & (e > 0)
    lowest, highest = torch.where(of_last, b, none).amin(2), torch.where(of_last, b, 0).amax(2)  # its branches
    lowest_own = torch.where(of_last & (b > 0), b, none).amin(2)                                 # without the trunk
    sees, shown = torch.where(v, e, 0).amax(2), torch.where(v, e, none).amin(2)  # last and first example with vision
    q, k = (slice(None), slice(None), None), (slice(None), None)  # x[q]: of the queries' block, x[k]: of the keys'
    before = torch.ones(n, n, dtype=torch.bool, device=e.device).tril(-1)
    some = before & (last[k] == first[q]) & ((lowest[k] == 0) | (highest[k] == b[..., 0][q]))
    some |= before.T & (sees[q] == shown[k])
    some |= torch.diag_embed(last > 0)
    own = (lowest_own[k] == highest[k]) & (lowest[q] == highest[k]) & (highest[q] == highest[k])
    full = before & (last[k] == last[q]) & ((highest[k] == 0) | own)
    full |= (v.all(2)[q] & v.all(2)[k]) & (last[k] == last[q])
    full &= one[q] & one[k]
    listed = []
    for kind in (some & ~full, full):
        count = kind.sum(-1, dtype=torch.int32)[:, None]  # (B, 1, n): the same for all heads
        listed += [count, kind.int().argsort(dim=-1, descending=True, stable=True).int()[:, None]]
    e, b, v = ids

    def rule(row, head, i, j):
        return may_attend(i, j, e[row], b[row], v[row])
    return BlockMask.from_kv_blocks(*listed, BLOCK_SIZE=block, mask_mod=rule, seq_lengths=(T, T))


@functools.cache
def compiled_flex():
    """FlexAttention, compiled once for all layers and masks. Uncompiled it would quietly make T x T scores; a length
    too many, and it is an error instead."""
    from torch.nn.attention.flex_attention import flex_attention
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention, dynamic=False)


def flex(q, k, v, mask):
    """FlexAttention: within a compiled block as a part of it, else compiled by itself."""
    from torch.nn.attention.flex_attention import flex_attention
    run = flex_attention if torch.compiler.is_compiling() else compiled_flex()
    # PyTorch 2.13 compiles it wrongly for CPUs where q and k are made in the same graph and are not dense in memory.
    q, k, v = (x.contiguous() for x in (q, k, v))
    return run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def attend(q, k, v, mask=None):
    """`model.attend` that also takes `example_masks` and a `block_mask`."""
    if isinstance(mask, list):
        return attend_examples(q, k, v, mask)
    if hasattr(mask, "kv_indices"):
        return flex(q, k, v, mask)
    return model.attend(q, k, v, mask)


def attend_examples(q, k, v, masks):
    """Attention example by example. masks: `example_masks`."""
    def one(mask, q, k, v):
        if mask is not None:
            return model.attend(q, k, v, mask)
        # Nothing, and yet q, k and v have a gradient: under FSDP a weight has one on all ranks or on none.
        return 0 * (q + (k + v).repeat_interleave(q.shape[1] // k.shape[1], 1))
    rows = []
    for parts, *qkv in zip(masks, *(x.split(1) for x in (q, k, v))):
        lengths, masks_of_row = zip(*parts)
        # split, not sliced: the gradient of a slice is as large as the whole it was cut from
        rows.append(torch.cat([one(*each) for each in zip(masks_of_row, *(x.split(lengths, 2) for x in qkv))], 2))
    return torch.cat(rows)


def install(network):
    """Set the mask and the attention of a Molmo2 for training: in blocks on CUDA; where FlexAttention cannot train,
    example by example. In short rows many small calls would cost more than they save."""
    cfg = network.cfg
    if cfg.window:  # windows are added to a dense mask
        return

    def mask(tokens, example, branch):
        vision = is_vision(tokens, cfg.vocab)
        if tokens.shape[1] <= 256:
            return dense_mask(example, branch, vision)
        return block_mask(example, branch, vision) if tokens.is_cuda else example_masks(example, branch, vision)
    network.mask = mask
    for block in network.transformer.blocks:
        block.self_attn.attend = attend
