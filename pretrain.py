"""
Stage 1, and the one training loop: a vision encoder and a language model learn to describe, to count and to
point.

    python pretrain.py --config small                          # a laptop: the toy world, from random weights
    python pretrain.py --config small --data photos/my.jsonl   # your own data (README: a few lines of JSONL)
    python pretrain.py --config 1b --data data/ \\
        --init_from weights/OLMo-2-0425-1B weights/siglip2-so400m-patch14-384
    python pretrain.py --resume                                # go on where the last checkpoint was written

What a stage is, is data: a `Config`. The loop below has no notion of stages; sft.py and longctx.py hand it
other numbers.
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from lib import budget
from lib import distributed
from lib import flex
import eval as evaluation
from lib import toy
import ulysses
from lib import weights
from data import (Batches, MIXTURES, Packer, Planner, Stream, collate, decode, find_datasets, mix, show_mixture,
                  to_device)
from lib.distributed import Log, UserError, check_resume, check_same_data, start_over
from lib.records import BadRecord, BadRecords
from lib.text import SMALL_TOKENIZER, Tokenizer
from model import Molmo2, PRESETS as MODELS


# ---- configuration: one flat dataclass, from which the flags are made --------------------------------------

def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    config: str = flag("small", f"model and its recipe: {', '.join(MODELS)}")
    stage: str = flag("pretrain", "name of the stage, part of the output folder")
    previous: str = flag("",
                         "stage whose last checkpoint this one starts from, unless --init_from names another")
    data: tuple = flag((),
                       "JSONL files, or folders with the registry's NAME.jsonl or NAME/*.jsonl; "
                       "'toy' is the embedded toy world")
    eval_data: tuple = flag((), "held-out JSONL files, for a loss; the toy world brings its own and is asked "
                                "questions")
    mixture: str = flag("pretrain",
                        "how datasets are mixed: pretrain (60/30/10 captions, pointing, text), sft, released "
                        "or equal")
    rebalance: tuple = flag((), "NAME=FACTOR: that dataset is drawn so much more often than its size says")
    init_from: tuple = flag((),
                            "checkpoint folder to start from, or a plain OLMo or Qwen3 and a SigLIP folder; "
                            "none = random weights")
    resume: bool = flag(False, "continue this run from its last checkpoint")
    out: str = flag("out", "folder of all runs; this one goes to OUT/CONFIG/STAGE")
    steps: int = flag(32000, "optimiser steps")
    seed: int = flag(0, "of weights, data order and dropout")
    global_batch: int = flag(256, "packed rows per optimiser step, over all devices")
    micro_batch: int = flag(4, "packed rows per forward pass; accumulation follows from it")
    seq_len: int = flag(4096, "tokens per packed row")
    tiles: int = flag(8, "high-resolution crops a picture may get on top of the low-resolution one")
    max_crops: int = flag(48, "crops per packed row")
    max_frames: int = flag(128, "frames a video may get, at 2 per second, if the row holds them; 0 = videos "
                                "are left out")
    point_format: str = flag("auto", "how points and times are written: spec, released, or auto: as "
                                     "--init_from, else spec")
    token_weights: str = flag("auto",
                              "loss weight of an answer token: spec (by task), released (by length), or "
                              "auto, likewise")
    optimizer: str = flag("adamw", "adamw, or muon (on hidden matrices; the rest stays on AdamW)")
    adam_share: float = flag(0.25,
                             "with muon: learning rate of the parameters left to AdamW, as a share of Muon's")
    lr_vit: float = flag(6e-6, "peak learning rate of the vision encoder")
    lr_connector: float = flag(2e-4, "peak learning rate of the connector and of the new embedding rows")
    lr_decoder: float = flag(2e-5, "peak learning rate of the decoder")
    warmup_vit: int = flag(2000, "steps of linear warm-up")
    warmup_connector: int = flag(200, "steps of linear warm-up")
    warmup_decoder: int = flag(2000, "steps of linear warm-up")
    lr_end: float = flag(0.1, "learning rate of the last step, as a share of the peak")
    beta1: float = flag(0.9, "AdamW")
    beta2: float = flag(0.95, "AdamW")
    adam_eps: float = flag(1e-6, "AdamW")
    clip: float = flag(1.0, "largest gradient norm, of each part by itself")
    z_loss: float = flag(1e-4, "weight of logsumexp² in the loss; keeps logits from drifting")
    residual_dropout: float = flag(0.0, "dropout on what a sub-layer adds, every position")
    response_dropout: float = flag(0.1, "more of it where an answer is predicted")
    freeze: tuple = flag((), "parts that do not train: vit connector decoder embedding")
    save_every: int = flag(500, "steps between checkpoints; the last step is always saved")
    eval_every: int = flag(1000, "steps between evaluations; the last step is always evaluated")
    eval_scenes: int = flag(320, "held-out toy scenes asked about at the end; a quarter of them in between")
    eval_clips: int = flag(0,
                           "lines of the toy world's held-out clips, tracks and pairs asked about, likewise")
    eval_first: bool = flag(False, "evaluate before the first step too, for comparison")
    cp: int = flag(1, "ranks that share each row (context parallelism, ulysses.py); divides the ranks and "
                      "the heads")
    recompute: bool = flag(False, "keep only the blocks' inputs and compute each block again going back: a "
                                  "third more work, a fraction of the memory")
    workers: int = flag(2, "processes that decode pictures; 0 = the training process itself")
    device: str = flag("auto", "auto (CUDA if there is one, else CPU), cpu, cuda or mps")
    dtype: str = flag("auto", "of the matrix products: auto (bf16 on CUDA, else fp32), fp32 or bf16")
    cache: float = flag(0.0, "gigabytes in which each worker keeps decoded crops, and the training process "
                             "what a frozen vision encoder says of them")
    compile: bool = flag(False, "torch.compile each block (worth it on CUDA)")
    dry_run: bool = flag(False, "print parameters, memory and operations of a step, and stop")
    world: int = flag(0, "with --dry_run: ranks to reckon with, eight a node; 0 = as many as run")
    gpu_memory: float = flag(80.0, "with --dry_run: gigabytes of a card")
    max_bad: float = flag(0.05, "share of unusable rows above which the run stops")
    allow_closed: bool = flag(False, "train on rows marked as made by a closed model too (tools.annotate), else "
                                     "left out")


PRESETS = {
    "small": dict(data=("toy",), steps=1000, global_batch=24, micro_batch=12, seq_len=256, tiles=0,
                  max_crops=16, max_frames=16, optimizer="muon", lr_vit=4e-3, lr_connector=2e-3,
                  lr_decoder=1e-3, warmup_vit=30, warmup_connector=30, warmup_decoder=30,
                  lr_end=0.0, response_dropout=0.0, save_every=200, eval_every=10**6, workers=1, cache=1.0),
    # without --recompute a row of 46 frames alone takes 41 GB of an 80 GB card (--dry_run shows it)
    **{name: dict(recompute=True) for name in ("1b", "4b", "7b", "8b")},
}


def parse(defaults, presets, argv=None):
    """Flags -> Config: default < --config preset < flags. Every field is a flag; -h lists them; unknown ones
    are errors."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        default = getattr(defaults, f.name)
        args = dict(default=argparse.SUPPRESS, help=f"{f.metadata['help']} [{default}]")
        if f.type is bool:
            parser.add_argument("--" + f.name, action=argparse.BooleanOptionalAction, **args)
        elif f.type is tuple:
            parser.add_argument("--" + f.name, nargs="+", metavar="X", **args)
        else:
            parser.add_argument("--" + f.name, type=f.type, metavar=f.type.__name__.upper(), **args)
    given = vars(parser.parse_args(argv))
    name = given.get("config", defaults.config)
    if name not in presets:
        parser.error(f"--config {name}: not a preset; choose from {', '.join(presets)}")
    cfg = dataclasses.replace(defaults, **{**presets[name], **{k: tuple(v) if isinstance(v, list) else v
                                                               for k, v in given.items()}})
    check_config(cfg)
    return cfg


def check_config(cfg):
    """Refuse what cannot work, before anything is loaded."""
    for name in ("steps", "global_batch", "micro_batch", "seq_len", "max_crops", "save_every", "eval_every"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be at least 1")
    if cfg.cp < 1 or cfg.seq_len % cfg.cp:
        raise UserError(f"--cp {cfg.cp}: must be at least 1 and divide --seq_len {cfg.seq_len}")
    formats = ("auto", "spec", "released")
    choices = dict(mixture=tuple(MIXTURES), token_weights=formats, point_format=formats,
                   optimizer=("adamw", "muon"), device=("auto", "cpu", "cuda", "mps"),
                   dtype=("auto", "fp32", "bf16"))
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            raise UserError(f"--{name} {getattr(cfg, name)}: choose from {', '.join(allowed)}")
    for part in cfg.freeze:
        if part not in ("vit", "connector", "decoder", "embedding"):
            raise UserError(f"--freeze {part}: choose from vit, connector, decoder, embedding")
    try:
        ulysses.check_heads(MODELS[cfg.config].heads, MODELS[cfg.config].kv_heads, cfg.cp)
    except ValueError as e:
        raise UserError(str(e)) from None
    if not cfg.data and not cfg.dry_run:
        raise UserError(f"--config {cfg.config} needs --data: JSONL files or a folder of them "
                        "(README, \"Your own data\"); --data toy tries the machinery on the toy world")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device found; --device cpu works everywhere")


def show_config(cfg, defaults):
    """The resolved configuration, what differs from the stage's default marked with *."""
    rows = [(f.name, getattr(cfg, f.name), getattr(defaults, f.name)) for f in dataclasses.fields(cfg)]
    items = [f"{'*' if a != b else ' '}{n}={' '.join(map(str, a)) if isinstance(a, tuple) else a}"
             for n, a, b in rows]
    width = max(map(len, items)) + 2
    per_line = max(1, 110 // width)
    for i in range(0, len(items), per_line):
        print("".join(x.ljust(width) for x in items[i:i + per_line]).rstrip())


# ---- pieces of the loop ------------------------------------------------------------------------------------

def load_model(cfg, folder=None):
    """The model of a run's checkpoint `folder`, of --init_from, or with random weights of the preset."""
    torch.manual_seed(cfg.seed)
    if folder:
        return Molmo2.from_pretrained(folder)
    if cfg.init_from:
        if len(cfg.init_from) > 2:
            raise UserError(f"--init_from {' '.join(cfg.init_from)}: one checkpoint, or a language model and "
                            "a SigLIP")
        for path in cfg.init_from:
            ours = os.path.exists(os.path.join(path, "COMPLETE"))
            if ours and (wrong := distributed.damage(path, leave_out="train_state")):
                raise UserError(f"--init_from {path}: {wrong}; an earlier step_* beside it may be whole")
        model = Molmo2.from_pretrained(*cfg.init_from)
        # Molmo2 lets every layer of an OLMo-3 see everything
        model.cfg.window, model.cfg.window_layers = 0, ()
        # a checkpoint may differ in these
        free = ("point_format", "frame_tokens", "max_positions", "yarn_layers", "tie")
        was, want = dataclasses.asdict(model.cfg), dataclasses.asdict(MODELS[cfg.config])
        odd = [k for k in want if k not in free and was[k] != want[k]]
        if odd:
            raise UserError(f"--init_from {cfg.init_from[0]}: not of --config {cfg.config}: "
                            + ", ".join(f"{k} is {was[k]}, not {want[k]}" for k in odd[:3]))
        if len(cfg.init_from) == 2:
            model.cfg.point_format = "spec"
    else:
        print("starting from random weights (no --init_from)")
        model = Molmo2(cfg.config)
    if cfg.point_format != "auto":
        model.cfg.point_format = cfg.point_format
    return model


def open_data(cfg):
    """The training mixture [(Dataset, rate)], and which sets of the registry are not there."""
    paths = [p for d in cfg.data
             for p in (toy.files(toy.FOLDER, cfg.stage) if d == "toy" else [d])]
    try:
        datasets, missing = find_datasets(paths, cfg.stage)
    except (OSError, ValueError) as e:
        raise UserError(str(e)) from None
    if "toy" in cfg.data and cfg.mixture == "sft":
        for d in datasets:
            d.factor = toy.FACTORS.get(d.name, 1.0)
    for text in cfg.rebalance:
        name, _, factor = text.partition("=")
        try:
            {d.name: d for d in datasets}[name].factor = float(factor)
        except (KeyError, ValueError):
            raise UserError(f"--rebalance {text}: NAME=FACTOR, with a number and one of "
                            + ", ".join(d.name for d in datasets)) from None
    return mix(datasets, cfg.mixture), missing


def make_optimizers(model, cfg):
    """Optimisers and their groups, each with its peak learning rate and warm-up.

    AdamW on everything, as published; or Muon on the hidden matrices: from random weights it needs a fraction
    of the steps. Muon's step is scaled to AdamW's size (0.2 · sqrt of the longer side), so that one learning
    rate serves both.
    """
    adam, muon, names = [], [], {}
    tables = ("wte.", "positional", "lm_head")
    for part, named in model.parts().items():
        frozen = lambda n: part in cfg.freeze or "embedding" in cfg.freeze and n.endswith("wte.embedding")
        named = [(n, p) for n, p in named if not frozen(n)]
        names |= {p: n for n, p in named}
        peak, warmup = getattr(cfg, f"lr_{part}"), getattr(cfg, f"warmup_{part}")
        if cfg.optimizer == "adamw":
            split = [(adam, peak, [p for _, p in named])]
        else:
            hidden = {p for n, p in named if p.ndim == 2 and not any(t in n for t in tables)}
            split = [(muon, peak, [p for _, p in named if p in hidden]),
                     (adam, peak * cfg.adam_share, [p for _, p in named if p not in hidden])]
        for groups, lr, params in split:
            if params:
                groups.append(dict(params=params, peak=lr, warmup=warmup))
    for p in model.parameters():
        p.requires_grad_(p in names)
    optimizers = []
    if adam:
        optimizers.append(torch.optim.AdamW(adam, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps,
                                            weight_decay=0.0))
    if muon:
        optimizers.append(torch.optim.Muon(muon, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers, names


def schedule(step, steps, warmup, end=0.1):
    """Learning rate as a share of its peak: linear from 0, then a cosine down to `end`. step: from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return end + (1 - end) / 2 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def write_files(tokenizer, about, model, folder):
    """What a checkpoint holds besides the optimiser: weights, tokenizer and what --resume needs to know."""
    model.save_pretrained(folder, about["config"]["max_frames"])
    tokenizer.save(folder)
    weights.write_json(os.path.join(folder, "train_state", "state.json"), about)


def next_samples(loader, n):
    """The next n rows of the loader: [(row, state, events)]."""
    try:
        return [next(loader) for _ in range(n)]
    except ValueError as e:  # raised in a worker, it carries the worker's traceback
        raise UserError(str(e).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
    except RuntimeError as e:
        if "DataLoader worker" not in str(e):
            raise
        raise UserError(f"{e}: a process that decodes pictures died, perhaps for want of memory; --resume "
                        "goes on, --workers 0 decodes in the training process") from None


def ready(rows, cfg):
    """Decoded rows as a batch in which every part of the model takes part: where there is no picture it gets
    a blank crop of which nothing is used. A rank that left a module out would leave the others waiting."""
    batch = collate(rows)
    if batch["crops"] is None:
        batch["crops"] = torch.zeros(1, cfg.patches, cfg.patch ** 2 * 3, dtype=torch.uint8)
        batch["pool"] = torch.zeros(0, 4, dtype=torch.long)
    return batch


def cut(batch, cfg, world):
    """This rank's part of rows that it shares with others."""
    return batch if world.cp == 1 else ulysses.shard_batch(batch, cfg.image_token, world.cp_rank, world.cp)


def held_out_sequences(cfg, planner):
    """The first 512 lines of each file of --eval_data, packed to the length for which training compiles."""
    packer, rows = Packer(cfg.seq_len, cfg.max_crops), []
    try:
        for d in find_datasets(cfg.eval_data)[0] if cfg.eval_data and "toy" not in cfg.data else ():
            stream = Stream([(d, 1.0)], planner, 0, True)
            for k in range(min(len(d), 512)):
                for plan in stream.plans(d.name, k)[0]:
                    rows += packer.add(plan)
    except (OSError, ValueError, BadRecord) as e:
        raise UserError(f"--eval_data {' '.join(cfg.eval_data)}: {e}") from None
    return rows + packer.flush()


def evaluate(cfg, model, planner, rows, step, run, losses, world):
    """{name: value} on held-out data: answers about toy scenes, a loss on the `rows` of --eval_data, else the
    recent training loss. The ranks share the questions."""
    model.eval()
    scores = {}
    if "toy" in cfg.data:
        plain = distributed.whole(model, lambda: Molmo2(model.cfg))
        part = 1 if step in (0, cfg.steps) else 4
        # answers grow by a token at a time: nothing to compile for
        with torch.compiler.set_stance("force_eager") if cfg.compile else contextlib.nullcontext():
            sheet = world.rank == 0 and os.path.join(run, "samples", f"step_{step:07d}.png")
            scores = evaluation.evaluate_scenes(plain, planner, os.path.join(toy.FOLDER, "eval"), cfg.eval_scenes // part,
                                  sheet, world)
            if cfg.eval_clips:
                questions = evaluation.load_questions(
                    find_datasets(toy.held_out(toy.FOLDER, cfg.stage))[0], cfg.eval_clips // part)
                table, records = evaluation.evaluate(plain, planner, questions, segmenter=toy.segment,
                                                     max_new_tokens=min(cfg.seq_len // 3, 512), world=world)
                scores |= table
                if world.rank == 0:
                    weights.write_json(os.path.join(run, "samples", f"step_{step:07d}.json"), records)
    elif rows:
        sums = torch.zeros(2, device=world.device)
        for i in range(0, len(rows), world.dp):  # all ranks run the model equally often
            mine = rows[i + world.dp_rank] if i + world.dp_rank < len(rows) else []
            row = decode(mine, planner.cfg, cfg.seq_len)
            for _, where, reason, detail in row[-1]:
                print(f"--eval_data: {where}: {reason}: {detail}", file=sys.stderr)
            batch = cut(ready([row], planner.cfg), planner.cfg, world)
            with torch.no_grad():
                sums[0] += model(**to_device(batch, world.device))
            sums[1] += batch["weights"].sum().to(world.device)
        total, weight = world.add(sums).tolist()
        scores = {"loss": total / max(weight, 1e-9)}
    elif losses:
        scores = {"train_loss": sum(losses[-20:]) / len(losses[-20:])}
    model.train()
    return {k: round(v, 4) for k, v in scores.items()}


# ---- the loop ----------------------------------------------------------------------------------------------

def empty_step(cfg):
    """A step of the loop on a row without content."""
    model = Molmo2(cfg.config)
    optimizers, _ = make_optimizers(model, cfg)
    model(**ready([decode([], model.cfg, 16)], model.cfg)).backward()
    for o in optimizers:
        o.step()


def dry_run(cfg):
    """Print what a run will need, from shapes alone (budget.py): of rows of --data, else of a long video."""
    cuda = (cfg.dtype == "bf16"
            or cfg.config != "small" and cfg.dtype == "auto" and cfg.device in ("auto", "cuda"))
    ranks = cfg.world or int(os.environ.get("WORLD_SIZE", 1))
    if ranks % cfg.cp:
        raise UserError(f"--cp {cfg.cp}: --world {ranks} cannot be parted into groups of {cfg.cp}")
    with torch.device("meta"):
        model = Molmo2(cfg.config)
    micro = min(cfg.micro_batch, -(-cfg.global_batch // (ranks // cfg.cp)))
    planner = Planner(Tokenizer(SMALL_TOKENIZER, model.cfg.vocab), model.cfg, cfg.seq_len, cfg.tiles, "spec",
                      cfg.max_frames, cfg.max_crops)
    rows = Stream(open_data(cfg)[0], planner, cfg.seed).sequences() if cfg.data else None
    plans = [next(rows).plans for _ in range(50 * micro)] if rows else [budget.long_video(planner)] * micro
    blank = lambda path, layout, n, patch: np.zeros((layout.n_crops, n * n, patch ** 2 * 3), np.uint8)
    batches = [ready([decode(p, model.cfg, cfg.seq_len, blank) for p in plans[i:i + micro]], model.cfg)
               for i in range(0, len(plans), micro)]
    budget.show(cfg, model, make_optimizers(model, cfg)[0], batches, ranks, cuda, lambda: empty_step(cfg))


def train(cfg, defaults, stop, cache_features=None):
    """Run one stage from the first step, or from the last checkpoint, to the end or until `stop` notes a signal.
    Returns the run's folder. Under torchrun every rank is here; what they do differently is what `world`
    says."""
    run, earlier = (os.path.join(cfg.out, cfg.config, s) for s in (cfg.stage, cfg.previous))
    if cfg.previous and not cfg.init_from and os.path.isdir(os.path.join(earlier, "latest")):
        cfg = dataclasses.replace(cfg, init_from=(os.path.join(earlier, "latest"),))

    # 1. Device, precision, ranks. Weights, gradients and optimiser are fp32; bf16 is for the matrix products.
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    bf16 = cfg.dtype == "bf16" or cfg.dtype == "auto" and device == "cuda"
    autocast = lambda: torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext()
    world = distributed.start(device, cfg.cp)
    first = world.rank == 0
    if not first:  # all ranks do all of the following, the first one tells
        sys.stdout = open(os.devnull, "w")
    lock = distributed.lock(f"{run}.lock", world)
    show_config(cfg, defaults)

    # 2. Data and model: fresh, from --init_from, or as the run left them.
    for turn in (True, False):  # the first rank draws the toy world and indexes files; the others find both
        if first == turn:
            mixture, missing = open_data(cfg)
        world.gather(None)
    step, state, skipped, failed = 0, None, 0, {}
    folder = cfg.init_from[0] if cfg.init_from else None
    if cfg.resume:
        folder, saved = world.first(lambda: check_resume(run, cfg))
        step, state, failed = saved["step"], saved["stream"], saved["failed"]
        print(f"resuming after step {step}")
    model = world.first(lambda: load_model(cfg, folder if cfg.resume else None), tell=lambda model: model.cfg)
    if not first:
        with torch.device("meta"):  # the weights come from the first rank, block by block
            model = Molmo2(model)
    tokenizer = Tokenizer(os.path.join(folder, "tokenizer.json") if folder else SMALL_TOKENIZER,
                          model.cfg.vocab)
    model.residual_dropout, model.response_dropout = cfg.residual_dropout, cfg.response_dropout
    n_params = model.num_params()
    flex.install(model)
    if world.cp > 1:
        ulysses.install(model, world.cp_group)
    distributed.shard_model(model, world, cfg.compile, cfg.recompute, bf16)
    optimizers, names = make_optimizers(model, cfg)
    if cache_features and cfg.cache and "vit" in cfg.freeze and world.size == 1:  # sharded, ranks must call it together
        cache_features(model.vision_backbone.image_vit, model.cfg, cfg.cache)
    if cfg.resume:
        distributed.load_optimizers(folder, optimizers, names, world)

    # 3. The stream is a function of files, mixture and seed alone; `state` says where in it we are. A step
    # has global_batch rows; of these each rank takes every dp-th one, a few at a time.
    token_weights = model.cfg.point_format if cfg.token_weights == "auto" else cfg.token_weights
    planner = Planner(tokenizer, model.cfg, cfg.seq_len, cfg.tiles, token_weights, cfg.max_frames,
                      cfg.max_crops)
    stream, held_out = Stream(mixture, planner, cfg.seed, cfg.allow_closed), held_out_sequences(cfg, planner)
    if cfg.resume:
        check_same_data(saved["fingerprint"], stream.fingerprint())
    elif first:
        start_over(run)
    world.gather(None)
    mine = len(range(world.dp_rank, cfg.global_batch, world.dp))
    most = -(-cfg.global_batch // world.dp)
    micro = min(cfg.micro_batch, most)
    parts = {part: [p for _, p in ps if p.requires_grad] for part, ps in model.parts().items()}
    print(f"{n_params:,} parameters on {device}{f' x {world.size}' * (world.size > 1)}; a step is "
          f"{cfg.global_batch} rows of {cfg.seq_len} tokens, {micro} at a time"
          f"{f' on each of {world.dp} ranks' * (world.dp > 1)}"
          f"{f', each row on {world.cp} ranks' * (world.cp > 1)}")
    show_mixture(mixture, cfg.steps * cfg.global_batch / stream.sequences_per_draw(), missing)
    log, saver = Log(os.path.join(run, "log.jsonl"), step, first), distributed.Saver(run, world)
    bad = BadRecords(Log(os.path.join(run, "bad_rows.jsonl"), step, first), failed)
    # collate_fn=tuple leaves rows as they are: by default every array would become a tensor in a shared file
    # of its own.
    rows_of_rank = Batches(stream, state, world.dp_rank, world.dp, cfg.global_batch,
                           round(cfg.cache * 2 ** 30))
    loader = iter(torch.utils.data.DataLoader(rows_of_rank, batch_size=None, num_workers=cfg.workers,
                                              collate_fn=tuple,
                                              prefetch_factor=most if cfg.workers else None))
    peak = budget.peak_flops(device, bf16)
    losses = [row["loss"] for row in map(json.loads, log.kept) if "loss" in row]
    bar, nan_rows, started = Progress(cfg.steps, step), [], time.time()
    before = {}
    if cfg.eval_first and not step:
        with autocast():
            before = evaluate(cfg, model, planner, held_out, 0, run, losses, world)
    if before:
        log.write(step=0, eval=before)
    model.train()

    while step < cfg.steps:
        tick = time.time()
        # dropout depends on the step and the rank alone, so a resumed run repeats it
        torch.manual_seed((cfg.seed * 1_000_003 + step) * world.size + world.rank)

        # 4. The rows of this step. What all ranks must know of each other goes round once: W, the weight by
        # which the sum of all losses is divided; where the stream stands; who could not go on.
        rows = next_samples(loader, mine)
        batches = [ready([r[0] for r in rows[i:i + micro]] or [decode([], model.cfg, cfg.seq_len)], model.cfg)
                   for i in range(0, most, micro)]
        wait = time.time() - tick
        work = sum(budget.step_flops(b, model.cfg, cfg.freeze) for b in batches) if device != "cpu" else 0
        batches = [cut(b, model.cfg, world) for b in batches]
        all_ranks = world.gather(dict(
            weight=sum(float(b["weights"].sum()) for b in batches),
            tokens=sum(int((b["example"] > 0).sum()) for b in batches),
            crops=sum(len(b["crops"]) for b in batches), wait=wait, work=work,
            events=[e for *_, events in rows for e in events],
            state=rows[-1][1] if rows else None, stop=bool(stop), error=saver.error))
        readers = all_ranks[::world.cp]  # ranks that share rows read the same, and decode the same pictures
        state = readers[(cfg.global_batch - 1) % world.dp]["state"]
        W = max(sum(r["weight"] for r in all_ranks), 1e-9)
        stopping, wait = any(r["stop"] for r in all_ranks), max(r["wait"] for r in all_ranks)
        saver.check([r["error"] for r in all_ranks])
        bad.note(step + 1, [e for r in readers for e in r["events"]])
        if why := bad.too_many(state, cfg.max_bad):
            raise UserError(why)

        # 5. Learning rates of this step.
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = group["peak"] * schedule(step, cfg.steps, group["warmup"], cfg.lr_end)

        # 6. Gradients of all micro-batches add up; over ranks FSDP takes their mean.
        loss = torch.zeros((), device=device)
        for b in batches:
            with autocast():
                total = model(**to_device(b, device), z_loss=cfg.z_loss) / (W / world.size)
            total.backward()
            loss += total.detach()
        loss = float(world.add(loss)) / world.size

        # 7. Clip each part by itself; all ranks leave out a step whose loss or gradient is not finite.
        norms = {part: distributed.number(torch.nn.utils.clip_grad_norm_(ps, cfg.clip))
                 for part, ps in parts.items() if ps}
        if math.isfinite(loss) and all(map(math.isfinite, norms.values())):
            for o in optimizers:
                o.step()
            nan_rows = []
        else:
            skipped += 1
            nan_rows.append(sorted({w for _, s, _ in rows for w in s["row"]})[:4])
            if len(nan_rows) == 10:
                raise UserError("10 steps in a row had a loss or gradient that is not finite; "
                                f"the last rows: {nan_rows}")
        for o in optimizers:
            o.zero_grad(set_to_none=True)
        step += 1

        # 8. Log what was optimised: every micro-batch of every rank, divided by the global weight.
        losses.append(loss)
        took, real = time.time() - tick, sum(r["tokens"] for r in all_ranks)
        work = sum(r["work"] for r in readers)
        log.write(step=step, loss=loss, lr=optimizers[0].param_groups[-1]["lr"],
                  grad_norm=math.hypot(*norms.values()), tokens_per_s=round(real / took, 1),
                  padded_tokens_per_s=round(cfg.global_batch * cfg.seq_len / took, 1),
                  crops_per_s=round(sum(r["crops"] for r in readers) / took, 1),
                  fill=round(real / (cfg.global_batch * cfg.seq_len), 4), wait=round(wait / took, 4),
                  **({"tflops_per_s": round(work / took / 1e12, 1)} if work else {}),
                  **({"mfu": round(work / took / world.size / peak, 4)} if peak else {}),
                  memory_gb=round(budget.peak_memory(device) / 2 ** 30, 3), skipped=skipped,
                  bad=bad.counts(state))
        bar.show(step, loss, real / took, took)
        world.pulse.step = step

        # 9. Evaluate by answering, then save: a resumed run has the evaluations of its past.
        last = step == cfg.steps
        if last or step % cfg.eval_every == 0:
            with autocast():
                scores = evaluate(cfg, model, planner, held_out, step, run, losses, world)
            log.write(step=step, eval=scores)
            bar.line(f"step {step}: " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items())
                     if not before else
                     "\n".join([f"{'':34}{'before':>8}{f'step {step}':>12}"]
                               + [f"{k:34}{before.get(k, math.nan):8.3f}{v:12.3f}"
                                  for k, v in scores.items()]))
        if last or stopping or step % cfg.save_every == 0:
            about = dict(step=step, stream=state, fingerprint=stream.fingerprint(), failed=bad.failed,
                         config=dataclasses.asdict(cfg))
            saver.save(step, model, lambda: Molmo2(model.cfg), optimizers, names,
                       functools.partial(write_files, tokenizer, json.loads(json.dumps(about))))
        if stopping and not last:
            break

    # 10. Say what was left out and what to do next.
    saver.finish()
    world.close()
    bar.close()
    if state and (state["bad"] or state["skipped"] or bad.failed):
        print(f"not used, by dataset: {bad.counts(state)}, {bad.log.path} lists them; "
              f"left out: {state['skipped']}")
    print(f"{(time.time() - started) / 60:.1f} minutes; checkpoint in {os.path.join(run, 'latest')}")
    if step < cfg.steps:
        print(f"stopped by a signal after step {step}; --resume goes on")
        sys.exit(0)
    return run


class Progress:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self, steps, start):
        self.steps, self.tty, self.began = steps, sys.stdout.isatty(), time.time()
        if self.tty:
            from tqdm import tqdm
            self.bar = tqdm(total=steps, initial=start, dynamic_ncols=True)

    def show(self, step, loss, tokens_per_s, took):
        if self.tty:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tok/s", refresh=False)
            self.bar.update()
        elif step <= 3 or step % 25 == 0 or step == self.steps:
            print(f"step {step:5d}/{self.steps}  loss {loss:.4f}  {took * 1000:6.0f} ms  "
                  f"{tokens_per_s:8,.0f} tok/s  {time.time() - self.began:5.0f} s", flush=True)

    def line(self, text):
        self.bar.write(text) if self.tty else print(text, flush=True)

    def close(self):
        if self.tty:
            self.bar.close()


def main(defaults, presets, argv=None, cache_features=None):
    try:
        cfg = parse(defaults, presets, argv)
        if cfg.dry_run:
            dry_run(cfg)
            sys.exit(0)
        with distributed.stop_signals() as stop:
            return cfg, train(cfg, defaults, stop, cache_features)
    except (UserError, weights.BadCheckpoint) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as e:
        distributed.end_if_a_rank_is_lost(e)
        raise


if __name__ == "__main__":
    cfg, run = main(Config(), PRESETS)
    picture = "data/toy/eval/images/00003.png" if "toy" in cfg.data else "PICTURE"
    print(f'next: python sample.py {run}/latest {picture} "Point to all shapes."')
