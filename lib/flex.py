"""
The attention mask in two forms that do less work than T x T, for training on packed sequences.

    block_mask       for FlexAttention on CUDA: pairs of blocks of 128 tokens that hold nothing are left out
    example_masks    for a CPU, where FlexAttention cannot train: one attention for each packed example

    install(model)   # before ulysses.install, which wraps the mask and the attention that it finds

Both come from the rule in model.py, and tests hold them equal to its dense mask.

Shapes:  B sequences, T tokens, H heads, G key/value heads, hd head width, n blocks of a sequence
"""
import functools

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model import attend as attend_dense, dense_mask, is_vision, may_attend


# ---- on CUDA: blocks of pairs --------------------------------------------------------------------------------------

def key_blocks(pairs):
    """Pairs of blocks (B, n, n) as FlexAttention reads them: how many key blocks each query block has, (B, 1, n), and
    the indices of all key blocks, those first, (B, 1, n, n). The 1 stands for all heads."""
    indices = pairs.int().argsort(dim=-1, descending=True, stable=True).int()
    return pairs.sum(-1, dtype=torch.int32)[:, None], indices[:, None]


def block_mask(example, branch, vision, block=128):
    """The rule for packed sequences as a FlexAttention BlockMask: for every pair of a query block and a key block,
    whether some of its pairs of tokens may attend and whether all may. Never T x T. example, branch, vision: (B, T).

    A sequence holds examples 1, 2, ... in order, each its trunk (branch 0, with all its vision tokens) and then its
    branches 1, 2, ...; last comes padding, example 0. So two blocks share at most one example: the last one of the
    earlier block, which is the first one of the later. And they share at most one branch of it, besides the trunk.
    """
    T = example.shape[1]
    example, branch, vision = (F.pad(x, (0, -T % block)) for x in (example, branch, vision))
    e, b, v = (x.unflatten(1, (-1, block)) for x in (example, branch, vision))  # (B, n, 128)

    # 1. What each block holds, (B, n). Where nothing is selected the smallest is NONE and the largest 0.
    NONE = 1 << 60
    smallest = lambda x, selected: x.masked_fill(~selected, NONE).amin(2)
    largest = lambda x, selected: x.masked_fill(~selected, 0).amax(2)
    real = e > 0
    first_example = smallest(e, real)
    last_example = largest(e, real)
    one_example = (first_example == last_example) & real.all(2)  # and no padding
    in_last = real & (e == last_example[..., None])
    min_branch = smallest(b, in_last)  # of the last example
    max_branch = largest(b, in_last)
    min_own_branch = smallest(b, in_last & (b > 0))  # the trunk left out
    first_vision = smallest(e, v)  # the first example with vision tokens
    last_vision = largest(e, v)
    all_vision = v.all(2)

    # 2. Pairs of blocks, (B, n, n): query blocks down, key blocks across.
    query = lambda x: x[:, :, None]
    key = lambda x: x[:, None, :]
    n = e.shape[1]
    key_first = torch.ones(n, n, dtype=torch.bool, device=e.device).tril(-1)  # the key block is the earlier one
    reachable = (key(min_branch) == 0) | (key(max_branch) == query(b[..., 0]))  # in the trunk or the query's branch
    some = key_first & (key(last_example) == query(first_example)) & reachable
    some |= key_first.T & (query(last_vision) == key(first_vision))  # the only way to see a later block
    some |= torch.eye(n, dtype=torch.bool, device=e.device)  # a token sees itself, padding too
    one_branch = (query(min_branch) == key(max_branch)) & (query(max_branch) == key(max_branch))
    trunk_or_that = (key(max_branch) == 0) | one_branch & (key(min_own_branch) == key(max_branch))
    full = key_first & trunk_or_that | query(all_vision) & key(all_vision)
    full &= (key(last_example) == query(last_example)) & query(one_example) & key(one_example)

    # 3. For pairs in which only some may attend FlexAttention asks the rule, token by token.
    def rule(sequence, head, q, k):
        return may_attend(q, k, example[sequence], branch[sequence], vision[sequence])
    return BlockMask.from_kv_blocks(*key_blocks(some & ~full), *key_blocks(full), BLOCK_SIZE=block,
                                    mask_mod=rule, seq_lengths=(T, T))


@functools.cache
def compiled_flex():
    """FlexAttention, compiled once for all layers and masks of one shape. Not compiled it would quietly make T x T
    scores, so more shapes than the compiler keeps are an error; `mask_for` asks for fewer."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention, dynamic=False)


def attend_blocks(q, k, v, mask):
    """FlexAttention: within a compiled block as a part of it, else compiled by itself."""
    run = flex_attention if torch.compiler.is_compiling() else compiled_flex()
    # PyTorch 2.13 compiles it wrongly for CPUs where q and k are made in the same graph and are not dense in memory.
    return run(q.contiguous(), k.contiguous(), v.contiguous(), block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


# ---- on a CPU: one example after the other -------------------------------------------------------------------------

def example_masks(example, branch, vision):
    """The rule for packed sequences, example by example: for each sequence a list of (length, mask), the mask
    (1, 1, length, length) bool, or None for padding. Ten examples of one length are a tenth of the work of T x T."""
    masks = []
    for ids in zip(example, branch, vision):
        numbers, lengths = ids[0].unique_consecutive(return_counts=True)
        masks_of_sequence = []
        begin = 0
        for number, length in zip(numbers.tolist(), lengths.tolist()):
            ids_of_example = [x[None, begin:begin + length] for x in ids]
            masks_of_sequence.append((length, dense_mask(*ids_of_example) if number > 0 else None))
            begin += length
        masks.append(masks_of_sequence)
    return masks


def no_attention(q, k, v):
    """Zeros, for padding. q, k and v have a gradient all the same: FSDP waits for a weight's on every rank."""
    return 0 * (q + (k + v).repeat_interleave(q.shape[1] // k.shape[1], dim=1))


def attend_examples(q, k, v, masks):
    """Attention in packed sequences, one example after the other. masks: what `example_masks` returns."""
    outputs = []
    for examples, *qkv in zip(masks, q.split(1), k.split(1), v.split(1)):
        lengths, masks_of_examples = zip(*examples)
        # split, not slices: the gradient of a slice is as large as the tensor it was cut from
        parts = [x.split(lengths, dim=2) for x in qkv]
        outputs_of_examples = []
        for mask, *part in zip(masks_of_examples, *parts):
            outputs_of_examples.append(no_attention(*part) if mask is None else attend_dense(*part, mask))
        outputs.append(torch.cat(outputs_of_examples, dim=2))
    return torch.cat(outputs)


# ---- which of them, and where they go ------------------------------------------------------------------------------

SHAPES = 4  # (B, T) for which FlexAttention is compiled. Training has three: micro-batch, rest of a step, evaluation


def mask_for(shape, head_dim, cuda, compiled):
    """The function that makes the mask of (B, T) tokens: dense_mask, block_mask or example_masks. compiled: the shapes
    that have had a block_mask; this one is added if it gets one."""
    # FlexAttention on CUDA does not compile for fewer than 128 queries: it takes its decoding kernel, which has no
    # valid choice of blocks there. And on a CPU many small calls cost more in short sequences than they save.
    if shape[1] <= 256:
        return dense_mask
    if not cuda:
        return example_masks
    if head_dim < 16:  # FlexAttention refuses narrower heads
        return dense_mask
    # It compiles for each shape anew, up to a limit. Whoever calls the model with sequences of any length stays below.
    if len(compiled) < SHAPES:
        compiled.add(shape)
    return block_mask if shape in compiled else dense_mask


def attend(q, k, v, mask=None):
    """`model.attend` for a mask of any form. q: (B, H, T, hd); k, v: (B, G, T, hd)."""
    if isinstance(mask, list):
        return attend_examples(q, k, v, mask)
    if isinstance(mask, BlockMask):
        return attend_blocks(q, k, v, mask)
    return attend_dense(q, k, v, mask)


def install(model):
    """Set the mask of a Molmo2 and the attention of its decoder blocks for training, before ulysses.install."""
    if model.cfg.window:  # a window is combined with a dense mask
        return

    compiled = set()

    def mask(tokens, example, branch):
        make_mask = mask_for(tuple(tokens.shape), model.cfg.head_dim, tokens.is_cuda, compiled)
        return make_mask(example, branch, is_vision(tokens, model.cfg.vocab))
    model.mask = mask
    for block in model.transformer.blocks:
        plain = block.self_attn.attend in (attend_dense, attend)
        assert plain, "the attention is replaced already: call lib/flex.install before ulysses.install"
        block.self_attn.attend = attend
