"""
An estimate of what a run needs, before anything is loaded: parameters, memory of each device, operations of a step.

    python longctx.py --config 7b --cp 8 --world 16 --dry_run    # on a laptop: the model is 15 GB of nothing
    python -m lib.budget                                         # which GPU asking and training need, as a table
    python -m lib.budget --scaling                               # 1 to 64 cards: tokens a second, on paper

    --data, planned but not decoded    ─┐
    or one long video that fills T     ─┴─► the micro-batch with most crops ─► a model on the meta device,
                                            forward and backward ─► the most bytes that live at once

On the meta device tensors have shapes and no numbers. So the very code that trains runs, one block after the other,
and every storage is counted when it is made and when it is freed. What FSDP adds is arithmetic, written out below.

Shapes:  B sequences, T tokens, N crops, P patches per crop, M visual tokens, K patches pooled into one, D width
"""
import argparse
import functools
import math
import os
import random
import sys
import weakref
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

try:
    import resource
except ImportError:  # Windows
    resource = None

from lib import lora
from model import ChunkedNLL, PRESETS, RMSNorm, empty_model, is_vision


# ---- bytes that live at once ---------------------------------------------------------------------------------------

class Alive(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on: `now` of those still alive, `peak` the most."""

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:  # so not a view
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        self.seen.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, n):
        self.now -= n


class Attended(torch.autograd.Function):
    """The memory of a fused attention, no numbers: it keeps its inputs, its output, and one number per query."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def attended(q, k, v, mask=None):
    return Attended.apply(q, k, v)


def autocast(model):
    """What torch.autocast does to a model with fp32 weights: only matrix products take and give bf16."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.bfloat16().register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))


class Normed(torch.autograd.Function):
    """The memory of RMSNorm on CUDA, where it is one kernel: it keeps its input and one number per row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def count_bytes(model, recompute, sharded, cuda):
    """Make a model on the meta device take and free memory as in training. Attention is a fused one, and on CUDA a
    norm; with `recompute` blocks run under activation checkpointing; if `sharded`, FSDP frees a gradient as soon as it
    is made."""
    for module in model.modules():
        if cuda and isinstance(module, RMSNorm):
            module.forward = functools.partial(lambda norm, x: Normed.apply(x, norm.weight), module)
        if hasattr(module, "attend"):
            module.attend = attended
    if recompute:
        for block in model.blocks():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    for p in model.parameters():
        if sharded and p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def activations(model, sequences, tokens, crops, windows, has_loss, recompute, sharded, cuda=False):
    """Bytes of a forward and a backward pass on the meta device: {"activations": what the blocks keep for the
    backward pass, "loss": head and logits on top, "way back": what the backward pass needs beyond both}.
    windows: (M, K); has_loss: tokens trained on. Gradients that stay are counted elsewhere, and subtracted here."""
    cfg = model.cfg
    parameters = list(model.parameters())
    ids = functools.partial(torch.empty, dtype=torch.long)
    most = ChunkedNLL.LOGITS["cuda" if cuda else "cpu"]  # numbers of logits
    count_bytes(model, recompute, sharded, cuda)
    with torch.device("meta"), Alive(parameters) as alive:
        pos = ids(sequences, tokens)
        x = model.transformer.wte(pos).flatten(0, 1).to(model.lm_head.weight.dtype)  # (B·T, D)
        pixels = torch.empty(crops, cfg.patches, cfg.patch ** 2 * 3, dtype=torch.uint8)
        features = model.vision_backbone(pixels, ids(*windows))
        x = x.index_add(0, ids(len(features)), features.to(x.dtype)).view(sequences, tokens, -1)
        x = model.transformer(x, pos, None, wanted=ids(has_loss))
        after_blocks = alive.now
        loss = ChunkedNLL.apply(x, model.lm_head.weight, ids(has_loss), torch.empty(has_loss), 1e-4, most)
        forward_peak = alive.peak
        loss.backward()
        gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    return {"activations": after_blocks, "loss": forward_peak - after_blocks,
            "way back": max(alive.peak - gradients - forward_peak, 0)}


# ---- what FSDP and the optimiser add -------------------------------------------------------------------------------

def count_numbers(parameters):
    return sum(p.numel() for p in parameters)


def trained_parameters(module):
    return [p for p in module.parameters() if p.requires_grad]


def memory(model, optimizers, shape, bf16=False, recompute=False, ranks=1, cp=1):
    """Bytes of one rank, {what: n}. model: on the meta device, used up; optimizers: of its parameters; shape:
    dict(rows=B, tokens=T, crops, windows=(M, K), learned) of a micro-batch before it is cut for `cp` ranks."""
    numbers = count_numbers(model.parameters())
    kept = sum(p.nbytes for p in model.parameters())  # frozen ones are in bf16 already, where products are
    trained = moments = 0
    for optimizer in optimizers:
        copies = 2 if isinstance(optimizer, torch.optim.AdamW) else 1  # Muon keeps momentum alone
        for group in optimizer.param_groups:
            n = count_numbers(group["params"])
            trained += n
            moments += n * copies
    shards = 8 if ranks % 8 == 0 else ranks  # a node's ranks, or all of them (lib/distributed.py)
    use = {"weights": kept // shards, "gradients": 4 * trained // shards, "optimiser": 4 * moments // shards}
    if ranks > 1:
        sizes = [count_numbers(block.parameters()) for block in model.blocks()]
        outside = numbers - sum(sizes)  # in no block: embedding, head, connector
        gradients = [count_numbers(trained_parameters(block)) for block in model.blocks()]
        outside_gradients = trained - sum(gradients)
        wide = 2 if bf16 else 4
        # FSDP gathers this block and the next one. A gradient is as it was made, then in fp32 to be summed.
        use["gathered weights"] = wide * (outside + 2 * max(sizes))
        use["gradients to share"] = (wide + 4) * max(outside_gradients, max(gradients)) + wide * outside_gradients
    elif bf16:
        use["bf16 weights"] = 2 * trained
    model.float()  # the casts of frozen weights are counted
    if bf16 and ranks > 1:
        model.bfloat16()
    elif bf16:
        autocast(model)
    m, k = shape["windows"]
    rank_tokens = shape["tokens"] // cp
    windows = (math.ceil(m / cp), k)
    has_loss = min(shape["learned"], shape["rows"] * rank_tokens)
    return use | activations(model, shape["rows"], rank_tokens, math.ceil(shape["crops"] / cp), windows, has_loss,
                             recompute, ranks > 1, bf16)


# ---- operations of a step ------------------------------------------------------------------------------------------

def allowed_pairs(example, branch, vision):
    """How many (query, key) pairs the rule allows in (B, T) ids, without padding: from the lengths of trunks and
    branches."""
    real = example > 0
    sequence = torch.arange(len(example), device=example.device)[:, None].expand_as(example)
    ids = torch.stack([sequence[real], example[real], branch[real]], 1)
    pieces, length = ids.unique(dim=0, return_counts=True)  # a piece is a trunk or a branch
    trees, tree_of_piece = pieces[:, :2].unique(dim=0, return_inverse=True)
    is_trunk = pieces[:, 2] == 0
    trunk_length = length.new_zeros(len(trees)).index_add(0, tree_of_piece, length * is_trunk)
    # Backwards: a token sees those before it in its piece and itself, and in a branch the whole trunk too.
    backwards = length * (length + 1) // 2 + length * trunk_length[tree_of_piece] * ~is_trunk
    # Forwards: of each two vision tokens of an example the earlier one sees the later.
    vision_ids = sequence[vision & real] * (1 << 32) + example[vision & real]
    _, n_vision = vision_ids.unique(return_counts=True)
    forwards = n_vision * (n_vision - 1) // 2
    return int(backwards.sum() + forwards.sum())


def flops(cfg, crops, windows, tokens, pairs, has_loss):
    """Floating-point operations of one forward pass, {part: n}; a step in which all trains takes three times as many.
    windows: (M, K); pairs: (query, key), as the mask allows; has_loss: tokens trained on, where the head runs, and the
    last block's MLP."""
    # A matrix product takes 2 operations a weight and token, attention 4 a pair and channel (q kᵀ, and the sum).
    P = cfg.patches
    width = cfg.vit_width
    vit_heads = cfg.vit_heads * cfg.vit_head_dim  # channels of all heads
    vit_block = 8 * P * width * vit_heads + 4 * P * width * cfg.vit_mlp + 4 * P * P * vit_heads
    vit = 2 * P * cfg.patch ** 2 * 3 * width + (max(cfg.vit_features) + 1) * vit_block

    M, K = windows
    features = len(cfg.vit_features) * width
    pooling = 2 * features * vit_heads + K * (4 * features * vit_heads + 4 * vit_heads) + 2 * vit_heads ** 2
    projector = 4 * vit_heads * cfg.projector_mlp + 2 * cfg.projector_mlp * cfg.width

    heads = cfg.heads * cfg.head_dim
    kv_heads = cfg.kv_heads * cfg.head_dim
    mlp = 3 * cfg.width * cfg.mlp
    others = cfg.layers * (cfg.width * (2 * heads + 2 * kv_heads) + mlp) - mlp
    return dict(vit=crops * vit, connector=M * (pooling + projector), decoder=2 * (tokens * others + has_loss * mlp),
                attention=cfg.layers * 4 * heads * pairs, head=2 * cfg.width * cfg.vocab * has_loss)


def passes(freeze, lora=False):
    """How often a step takes the operations of a forward pass, {part: n}, parts as of `flops`. One time is the forward
    pass itself; one the gradient of the inputs, where something trains in the part or before it; and one that of its
    weights, if they train. With LoRA they do not, and the adapters beside them are too small to count."""
    n = {}
    anything = False  # that trains, up to here
    for part in ("vit", "connector", "decoder"):
        trains = part not in freeze
        anything = anything or trains
        n[part] = 1 + anything + (trains and not lora)
    # Attention has no weights, but two inputs to each of its products. The head is a part of the decoder.
    return n | dict(attention=3 if anything else 1, head=n["decoder"])


def step_flops(batch, cfg, freeze, lora=False):
    """Operations of a forward and a backward pass. freeze, lora: as of `passes`."""
    pairs = allowed_pairs(batch["example"], batch["branch"], is_vision(batch["tokens"], cfg.vocab))
    tokens = int((batch["example"] > 0).sum())
    has_loss = int((batch["weights"] > 0).sum())
    forward = flops(cfg, len(batch["crops"]), tuple(batch["pool"].shape), tokens, pairs, has_loss)
    times = passes(freeze, lora)
    return sum(n * times[part] for part, n in forward.items())


def fits(gigabytes, card):
    """Whether a card of so many gigabytes has room for them: CUDA and what lies between tensors take some too."""
    return gigabytes < 0.95 * card


# ---- workers -------------------------------------------------------------------------------------------------------

# Milliseconds of one core, for a crop of a JPEG of 1800 x 1200 and a frame of an MP4 of 1280 x 720 at 2 of 30 a second
# (`python -m tools.bench --parts data` on an x86 server of 2 cores, 2026).
CROP_MS = 3.5
FRAME_MS = 14.0
# Shares of an H100's peak that training reaches: as published for stage 1 (4B: 5,900 tokens a second), and as the 1B
# model did on an H200 with --compile. The faster a step, the more workers it needs.
MFU = {"published": 0.17, "measured": 0.31}


def decoding_seconds(sequences):
    """Seconds of one core to decode a packed sequence, [Plan], on average."""
    ms = 0.0
    for plans in sequences:
        for plan in plans:
            for _, layout in plan.media:
                ms += layout.n_crops * (FRAME_MS if layout.times else CROP_MS)
    return ms / 1e3 / len(sequences)


def workers_needed(step, decoding, planning):
    """How many workers keep up with steps of `step` seconds, 0 = no number does: one alone does the `planning` too,
    several share the `decoding` while one more process plans; seconds a step, of a rank."""
    if planning >= step:
        return 0
    if planning + decoding <= step:
        return 1
    return max(math.ceil(decoding / step), 2)


def show_workers(work, decoding, planning):
    """Print how many workers a rank needs. work: operations of a step, of this rank; the rest as above."""
    print(f"decoding a rank's images and videos takes {decoding:.2f} s of one core a step, planning all records "
          f"{planning:.2f} s of one process")
    for source, mfu in MFU.items():
        step = work / (mfu * PEAK_FLOPS["H100"])
        n = workers_needed(step, decoding, planning)
        verdict = f"{n} worker{'s' if n > 1 else ''} a rank" if n else (
            "no number of workers keeps up; width, height and duration in the records make planning faster")
        print(f"  at {mfu:.0%} of an H100's peak ({source}) a step takes {step:.2f} s: {verdict}")


# ---- the estimate --------------------------------------------------------------------------------------------------

def long_video(planner):
    """Plans of one sequence: a video of as many frames as leave room for an answer of an eighth of the sequence."""
    annotation = dict(task="video_caption", prompt="Describe.", answer="x" * (planner.seq_len // 8))
    video = dict(id="v", video="v.mp4", duration=planner.max_frames / 2, annotations=[annotation])
    plans, _ = planner.plan(video, ".", random.Random(0))
    return plans


def show(cfg, model, optimizers, sequences, planning, batches, ranks, cuda, empty_step):
    """Print parameters, operations and memory of the steps of a run. model: on the meta device, used up; sequences: of
    plans; planning: seconds that one took; batches: of the sequences, as a rank may get them at a time, before they are
    cut; empty_step(): the least a process does."""
    dp = ranks // cfg.cp
    micro_batch = len(batches[0]["tokens"])
    largest = max(batches, key=lambda batch: len(batch["crops"]))
    shape = dict(rows=micro_batch, tokens=cfg.seq_len, crops=len(largest["crops"]),
                 windows=tuple(largest["pool"].shape), learned=int((largest["weights"] > 0).sum()))
    per_batch = sum(step_flops(batch, model.cfg, cfg.freeze, cfg.lora) for batch in batches) / len(batches)
    work = per_batch / micro_batch * cfg.global_batch
    turns = math.ceil(cfg.global_batch / (dp * micro_batch))
    sizes = []
    for part, named in model.parts().items():
        sizes.append(f"{part} {count_numbers(dict(named).values()):,}")
    print(f"{model.num_params():,} parameters: " + ", ".join(sizes))
    print(f"{count_numbers(trained_parameters(model)):,} of them train")
    print(f"a step: {cfg.global_batch} sequences of {cfg.seq_len:,} tokens; {micro_batch} at a time on each of "
          f"{dp} x {cfg.cp} ranks, {turns} times; {work:.3g} operations, {work / ranks:.3g} a rank")
    print(f"most at a time: {shape['crops']} crops, {shape['windows'][0]:,} visual tokens, "
          f"{shape['learned']:,} tokens trained on")
    if cuda:
        decoding = decoding_seconds(sequences) * math.ceil(cfg.global_batch / dp)
        show_workers(work / ranks, decoding, planning * cfg.global_batch)
    use = memory(model, optimizers, shape, cuda, cfg.recompute, ranks, cfg.cp)
    if not cuda:
        use = {"python and torch": resident(empty_step)} | use
        use["held by malloc"] = use["activations"] // 3  # measured: stages 1 and 2 of small, glibc, 40 to 1,000 steps
    for what, n in use.items():
        print(f"  {what:<20}{n / 2 ** 30:8.3f} GB")
    total = sum(use.values()) / 2 ** 30
    verdict = "fits" if fits(total, cfg.gpu_memory) else "does not fit"
    print(f"  {'together':<20}{total:8.3f} GB a rank" + (f": {verdict} in {cfg.gpu_memory:g} GB" if cuda else ""))


# ---- what a run took, and what a card could do ---------------------------------------------------------------------

def resident(step):
    """Bytes this process takes after `step()`, which loads all code of a step (not on Linux: the most it took)."""
    step()
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory("cpu")


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
    if not resource:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- which GPU -----------------------------------------------------------------------------------------------------

CARDS = (12, 24, 48, 80, 141)  # gigabytes
ASK = {"ask, 1 image": 0, "ask, 384 frames": 384}  # frames; 0 = an image with all its high-resolution crops
TRAIN = {"`--lora 64`": SimpleNamespace(lora=64, lora_alpha=32.0, lora_parts=("decoder", "connector"), freeze=()),
         "connector alone": SimpleNamespace(lora=0, freeze=("vit", "decoder", "embedding")),
         "everything": SimpleNamespace(lora=0, freeze=())}


def memory_of_asking(config, frames):
    """Bytes of a model in bf16 that reads a long prompt and answers, on a card of its own."""
    cfg = PRESETS[config]
    side = cfg.crop // cfg.patch  # patches
    crops = frames or (1 if config == "small" else 9)
    pooled = 3 if frames else 2  # patches a visual token has on each side
    windows = crops * math.ceil(side / pooled) ** 2
    tokens = windows + 8 * frames + 256  # the time of each frame, and a question
    longest = tokens + 2048  # with the answer
    caches = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * longest * 2
    model = empty_model(config).bfloat16()
    weights = sum(p.nbytes for p in model.parameters())
    count_bytes(model, recompute=False, sharded=False, cuda=True)
    with torch.device("meta"), torch.inference_mode(), Alive(model.parameters()) as alive:
        pixels = torch.empty(crops, cfg.patches, cfg.patch ** 2 * 3, dtype=torch.uint8)
        features = model.vision_backbone(pixels, torch.empty(windows, pooled ** 2, dtype=torch.long))
        pos = torch.empty(1, tokens, dtype=torch.long)
        x = model.transformer.wte.embedding[pos]
        model.transformer(x, pos, None)
        del features
    return weights + caches + alive.peak


def memory_of_training(config, cfg, cards):
    """Bytes of each card in stage 2: one sequence at a time, which a video fills, with activation checkpointing."""
    sizes = PRESETS[config]
    tokens = 512 if config == "small" else 4096
    windows_per_frame = math.ceil(sizes.crop // sizes.patch / 3) ** 2
    frames = tokens * 7 // 8 // (windows_per_frame + 8)
    shape = dict(rows=1, tokens=tokens, crops=frames, windows=(frames * windows_per_frame, 9), learned=tokens // 8)
    model = lora.freeze(lora.install(empty_model(config), cfg), cfg, bf16=True)
    optimizers = [torch.optim.AdamW(trained_parameters(model))]
    return sum(memory(model, optimizers, shape, bf16=True, recompute=True, ranks=cards).values())


def smallest_card(n):
    """The smallest card that has room for n bytes, and in brackets how many gigabytes that is."""
    gigabytes = n / 2 ** 30
    card = next((card for card in CARDS if fits(gigabytes, card)), "none")
    return f"{card} ({gigabytes:.1f})"


def gpu_table():
    """A table in Markdown: the smallest card that does, and for training also the smallest of which eight do."""
    lines = ["| | " + " | ".join([*ASK, *TRAIN]) + " |", "|---" * (1 + len(ASK) + len(TRAIN)) + "|"]
    for config in PRESETS:
        cells = [smallest_card(memory_of_asking(config, frames)) for frames in ASK.values()]
        for cfg in TRAIN.values():
            one, eight = [smallest_card(memory_of_training(config, cfg, cards)) for cards in (1, 8)]
            cells.append(f"{one}, 8 x {eight}")
        lines.append(f"| {config} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- many cards, on paper ------------------------------------------------------------------------------------------

# Bytes per second of a rank, one way: NVLink within a node of 8; its own 400 Gbit/s to other nodes. Assumed: copies
# from card to computer, and a disk that all nodes share.
NVLINK, NETWORK, TO_HOST, DISK = 450e9, 50e9, 6e9, 2e9
# mfu: as an H200 reached it with the 1B model, in stage 3 for one sequence of 36,864 tokens in 6.0 s.
STAGES = {"pretrain": dict(tokens=4096, sequences=256, at_a_time=4, crops=24, windows=24 * 140, cp=1, mfu=0.31),
          "sft": dict(tokens=4096, sequences=128, at_a_time=4, crops=46, windows=46 * 81, cp=1, mfu=0.31),
          "longctx": dict(tokens=36864, sequences=32, at_a_time=1, crops=384, windows=384 * 81, cp=8, mfu=0.19)}


def step_on_paper(cfg, numbers, stage, cards):
    """Seconds of a step, {what: s}. numbers: parameters; each is computed as written, and nothing else is counted.

        compute      operations of all sequences / (cards · MFU · peak)
        NVLink       micro-batches · bytes of all weights, in bf16 forward and backward, and of all gradients, in fp32
        network      micro-batches · all-reduce of a rank's shard of the gradients, which crosses twice
        all-to-all   layers · (q, k, v and the output) of a rank's tokens; forward, recomputed and backward
    """
    cp = min(stage["cp"], cards)
    shards = min(cards, 8)
    nodes = cards // shards
    micro_batches = math.ceil(stage["sequences"] / (cards // cp * stage["at_a_time"]))
    parts = flops(cfg, stage["crops"], (stage["windows"], 4), stage["tokens"], stage["tokens"] ** 2 // 2,
                  stage["tokens"] // 4)
    operations = 3 * sum(parts.values()) * stage["sequences"]
    sent = 2 * (cfg.heads + max(cfg.kv_heads, cp)) * cfg.head_dim * 2 * stage["tokens"] / cp * stage["at_a_time"]
    return {"compute": operations / (cards * stage["mfu"] * PEAK_FLOPS["H100"]),
            "NVLink": micro_batches * (2 + 2 + 4) * numbers * (shards - 1) / shards / NVLINK,
            "network": micro_batches * 2 * (nodes - 1) / nodes * 4 * numbers / shards / NETWORK,
            "all-to-all": micro_batches * 3 * cfg.layers * sent * (cp - 1) / cp / NVLINK}


def scaling_table(configs=("1b", "8b")):
    """Steps of all stages on 1 to 64 cards, and what evaluating and saving take; whether they fit is --dry_run's."""
    lines = []
    for config in configs:
        cfg = PRESETS[config]
        numbers = count_numbers(empty_model(config).parameters())
        for name, stage in STAGES.items():
            lines += ["", f"{config}, {name}: {stage['sequences']} sequences of {stage['tokens']:,} tokens and "
                      f"{stage['crops']} crops, cp {stage['cp']}, MFU of a card alone {stage['mfu']:.0%}",
                      "cards   compute    NVLink   network  all-to-all   tokens/s a card, nothing to all overlapped"]
            for cards in (1, 8, 16, 32, 64):
                step = step_on_paper(cfg, numbers, stage, cards)
                tokens = stage["sequences"] * stage["tokens"] / cards
                slow = tokens / sum(step.values())
                fast = tokens / (max(step["compute"], step["NVLink"], step["network"]) + step["all-to-all"])
                seconds = "  ".join(f"{s:6.2f} s" for s in step.values())
                lines.append(f"{cards:5}  {seconds}    {slow:10,.0f} {fast:10,.0f}")
            # A forward pass is a third of a step, and the evaluating process itself decodes. 512 records fill about 128
            # sequences.
            turns = math.ceil(128 / (64 // stage["cp"]))
            forward = step["compute"] / 3 * 64 / stage["cp"] / stage["sequences"]
            decoding = stage["crops"] * (CROP_MS if name == "pretrain" else FRAME_MS) / 1e3
            lines.append(f"evaluating 128 sequences on 64 cards: {turns} times {forward:.1f} s and {decoding:.1f} s of "
                         f"decoding, together {turns * (forward + decoding):.0f} s")
        copied = 4 * numbers + 8 * numbers / 8  # by rank 0: all weights, and its shard of AdamW's two moments
        waits = 4 * numbers / NVLINK + copied / TO_HOST
        lines.append(f"saving {config} on 64 cards: training waits {waits:.0f} s until "
                     f"{copied / 1e9:.0f} GB are copied; then a thread writes {12 * numbers / 1e9:.0f} GB, "
                     f"{12 * numbers / DISK:.0f} s")
    return "\n".join(lines[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scaling", action="store_true", help="1 to 64 cards: tokens a second, on paper")
    print(scaling_table() if parser.parse_args().scaling else gpu_table())
