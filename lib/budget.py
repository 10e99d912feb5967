"""
What a run will need, told before anything is loaded: parameters, memory of each device, operations of a step.

    python longctx.py --config 7b --cp 8 --world 16 --dry_run    # on a laptop: the model is 15 GB of nothing

    --data, planned but not decoded    ─┐
    or one long video that fills a row ─┴─► the micro-batch with most crops ─► a model on the meta device,
                                            there and back ─► the most bytes that live at once

On the meta device tensors have shapes and no numbers. So the very code that trains runs, one block after the
other, and every storage is counted when it is made and when it is freed. What FSDP adds is arithmetic, and is
written out below.
"""
import functools
import random
import resource
import sys
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import model as network
from model import ChunkedNLL, is_vision


# ---- bytes that live at once -------------------------------------------------------------------------------

class Alive(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on: `now` of those still there, `peak` the most."""

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(t.untyped_storage() for t in known)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if storage not in self.seen:  # not a view
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, n):
        self.now -= n


class Attended(torch.autograd.Function):
    """The memory of a fused attention, no numbers: it keeps inputs, output, and one number per query."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, g):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def attended(q, k, v, mask=None):
    return Attended.apply(q, k, v)


def autocast(model):
    """What torch.autocast does to a model with fp32 weights: only matrix products take and give bf16."""
    for m in model.modules():
        if isinstance(m, torch.nn.Linear):
            m.bfloat16().register_forward_pre_hook(lambda m, args: (args[0].bfloat16(),))


def activations(model, rows, tokens, crops, windows, learned, recompute, sharded):
    """Bytes of a forward and a backward pass on the meta device: {"activations": what the blocks leave for
    the way back, "loss": head and logits on top, "way back": what that needs beyond both}. windows: (M, K).
    `sharded`: gradients go as soon as they are made, as FSDP has it; else they are counted, and subtracted
    here."""
    cfg, long, counted = model.cfg, functools.partial(torch.empty, dtype=torch.long), [*model.parameters()]
    for block in model.blocks():
        if recompute:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    for block in model.transformer.blocks:
        block.self_attn.attend = attended
    for p in counted:
        if sharded and p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    plain, network.attend = network.attend, attended  # the ViT's
    try:
        with torch.device("meta"), Alive(counted) as alive:
            ids = long(rows, tokens)
            x = model.transformer.wte.embedding[ids].flatten(0, 1)
            pixels = torch.empty(crops, cfg.patches, cfg.patch ** 2 * 3, dtype=torch.uint8)
            features = model.vision_backbone(pixels, long(*windows))
            x = x.index_add(0, long(len(features)), features.to(x.dtype)).view(rows, tokens, -1)
            x = model.transformer(x, ids, None).flatten(0, 1)[long(learned)]
            kept = alive.now
            loss = ChunkedNLL.apply(x, model.lm_head.weight, long(learned), torch.empty(learned), 1e-4)
            top = alive.peak
            loss.backward()
            gradients = sum(p.grad.nbytes for p in counted if p.grad is not None)
    finally:
        network.attend = plain
    return {"activations": kept, "loss": top - kept, "way back": max(alive.peak - gradients - top, 0)}


# ---- what FSDP and the optimiser add -----------------------------------------------------------------------

def memory(model, optimizers, shape, bf16=False, recompute=False, ranks=1, cp=1):
    """Bytes of one rank, {what: n}. model: on the meta device, used up; optimizers: of its parameters; shape:
    dict(rows, tokens, crops, windows (M, K), learned) of a micro-batch before it is cut for `cp` ranks."""
    ours = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    moments = sum(p.numel() * (2 if isinstance(o, torch.optim.AdamW) else 1)
                  for o in optimizers for g in o.param_groups for p in g["params"])
    shards = min(ranks, 8) if ranks % min(ranks, 8) == 0 else ranks  # the ranks of a node (distributed.py)
    numbers = sum(p.numel() for p in model.parameters())
    use = {"weights": 4 * numbers // shards, "gradients": 4 * sum(p.numel() for p in ours) // shards,
           "optimiser": 4 * moments // shards}
    if ranks > 1:
        blocks = [sum(p.numel() for p in b.parameters()) for b in model.blocks()]
        rest, wide = numbers - sum(blocks), 2 if bf16 else 4
        # this block, the next one, what is in no block
        use["gathered weights"] = wide * (rest + 2 * max(blocks))
        # as made, and in fp32 to be summed
        use["gradients to share"] = (wide + 4) * max(rest, max(blocks)) + wide * rest
    elif bf16:
        use["bf16 weights"] = 2 * numbers
    if bf16:
        model.bfloat16() if ranks > 1 else autocast(model)
    crops, (m, k) = shape["crops"], shape["windows"]
    use |= activations(model, shape["rows"], shape["tokens"] // cp, -(-crops // cp), (-(-m // cp), k),
                       min(shape["learned"], shape["rows"] * shape["tokens"] // cp), recompute, ranks > 1)
    return use


def step_flops(batch, cfg, freeze):
    """Operations of a forward and a backward pass; a frozen ViT is passed once, the rest three times."""
    ids = batch["example"], batch["branch"], is_vision(batch["tokens"], cfg.vocab)
    of = flops(cfg, len(batch["crops"]), tuple(batch["pool"].shape), int((batch["example"] > 0).sum()),
               allowed_pairs(*ids), int((batch["weights"] > 0).sum()))
    return sum(n * (1 if part == "vit" and part in freeze else 3) for part, n in of.items())


def long_video(planner):
    """A row's plan: a video of as many frames as leave room for an answer of an eighth of the row."""
    video = dict(id="v", video="v.mp4", duration=planner.max_frames / 2, annotations=[
        dict(task="video_caption", prompt="Describe.", answer="x" * (planner.seq_len // 8))])
    return planner.plan(video, ".", random.Random(0))[0]


def show(cfg, model, optimizers, batches, ranks, cuda, empty_step):
    """Print parameters, operations and memory of the steps of a run. model: on the meta device, used up;
    batches: what a rank may get at a time, before it is cut; empty_step(): the least a process does."""
    dp, micro, b = ranks // cfg.cp, len(batches[0]["tokens"]), max(batches, key=lambda b: len(b["crops"]))
    per_row = sum(step_flops(b, model.cfg, cfg.freeze) for b in batches) / len(batches) / micro
    work = per_row * cfg.global_batch
    shape = dict(rows=micro, tokens=cfg.seq_len, crops=len(b["crops"]), windows=tuple(b["pool"].shape),
                 learned=int((b["weights"] > 0).sum()))
    sizes = {part: sum(p.numel() for _, p in ps) for part, ps in model.parts().items()}
    print(f"{model.num_params():,} parameters: " + ", ".join(f"{part} {n:,}" for part, n in sizes.items()))
    print(f"a step: {cfg.global_batch} rows of {cfg.seq_len:,} tokens; {micro} at a time on each of "
          f"{dp} x {cfg.cp} ranks, {-(-cfg.global_batch // dp // micro)} times; {work:.3g} operations, "
          f"{work / ranks:.3g} a rank")
    print(f"most at a time: {shape['crops']} crops, {shape['windows'][0]:,} visual tokens, "
          f"{shape['learned']:,} learned")
    use = memory(model, optimizers, shape, cuda, cfg.recompute, ranks, cfg.cp)
    if not cuda:
        use = {"python and torch": resident(empty_step)} | use
        # as seen in stages 1 and 2 of small: glibc, 40 to 1,000 steps
        use["held by malloc"] = use["activations"] // 3
    total = sum(use.values()) / 2 ** 30
    for what, n in use.items():
        print(f"  {what:<20}{n / 2 ** 30:8.3f} GB")
    fits = f": {'fits' if total < 0.95 * cfg.gpu_memory else 'does not fit'} in {cfg.gpu_memory:g} GB"
    print(f"  {'together':<20}{total:8.3f} GB a rank" + fits * cuda)


def resident(step):
    """Bytes this process takes after `step()`, which loads all code of a step (elsewhere than on Linux: the
    most it took)."""
    step()
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory("cpu")


# ---- what a run took, and what a card could do -------------------------------------------------------------

# Dense bf16 products per second, as the makers state them. Another card gets no MFU rather than a wrong one.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def peak_flops(device, bf16):
    """What this card could do at most, or None."""
    name = torch.cuda.get_device_name() if device == "cuda" and bf16 else ""
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name and "PCIe" not in name), None)


def peak_memory(device):
    """The most memory this process had so far, bytes: of the card, or of the computer."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def allowed_pairs(example, branch, vision):
    """How many (query, key) pairs the rule allows in rows (B, T), counted from the lengths of trunks and branches."""
    rows = torch.arange(len(example), device=example.device)[:, None].expand_as(example)
    here = example > 0
    ids = torch.stack([rows[here], example[here], branch[here]], 1)
    pieces, length = ids.unique(dim=0, return_counts=True)  # a trunk or a branch each
    trees, tree = pieces[:, :2].unique(dim=0, return_inverse=True)
    trunk = length.new_zeros(len(trees)).index_add(0, tree, length * (pieces[:, 2] == 0))
    seen = rows[vision & here] * (1 << 32) + example[vision & here]
    v = seen.unique(return_counts=True)[1]
    behind = length * (length + 1) // 2 + length * trunk[tree] * (pieces[:, 2] > 0)
    return int(behind.sum() + (v * (v - 1) // 2).sum())


def flops(cfg, crops, windows, tokens, pairs, learned):
    """Floating-point operations of one forward pass, {part: n}; a training step takes three times as many.
    windows: (M, K); pairs: what the mask allows; learned: positions where the head runs."""
    p, d, a = cfg.patches, cfg.vit_width, cfg.vit_heads * cfg.vit_head_dim
    blocks = max(cfg.vit_features) + 1
    vit = 2 * p * cfg.patch ** 2 * 3 * d + blocks * (8 * p * d * a + 4 * p * d * cfg.vit_mlp + 4 * p * p * a)
    f, (m, k) = len(cfg.vit_features) * d, windows
    pooling, inner = 2 * f * a + k * (4 * f * a + 4 * a) + 2 * a * a, cfg.projector_mlp
    window = pooling + 4 * a * inner + 2 * inner * cfg.width
    heads, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    linears = cfg.layers * 2 * cfg.width * (2 * heads + 2 * kv + 3 * cfg.mlp)
    return dict(vit=crops * vit, connector=m * window, decoder=tokens * linears,
                attention=cfg.layers * 4 * heads * pairs, head=2 * cfg.width * cfg.vocab * learned)
