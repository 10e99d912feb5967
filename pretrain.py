"""
Stage 1, and the one training loop: a vision encoder and a language model learn to describe, to count and to point.

    python pretrain.py --config small                          # a laptop: the toy world, from random weights
    python pretrain.py --config small --data photos/my.jsonl   # your own data (README: a few lines of JSONL)
    python pretrain.py --config 1b --data data/ \\
        --init_from weights/OLMo-2-0425-1B weights/siglip2-so400m-patch14-384
    python pretrain.py --resume                                # go on where the last checkpoint was written

On a CPU --resume repeats the losses of a run that was never stopped bit for bit. On CUDA some kernels add up in an
order that varies, as attention does in its backward pass: there losses repeat to rounding, unless --deterministic.

A stage is data: a `Config`. The loop below has no notion of stages; sft.py and longctx.py hand it other numbers.

    stream ─► samples of this rank ─► micro-batches ─► forward, backward ─► clip ─► optimisers ─► log, evaluate, save
                                          │                ▲
                                        Report ─► all ranks exchange theirs: W, the loss weight by which all divide

Where to look, in the order in which data passes:

    Config, PRESETS, parse        every number of a run, and what overrides what; lib/flags makes flags of them
    load_model, open_data         the weights to start from (lib/weights.load); the mixture (data.mix)
    make_optimizers, schedule     groups of parameters (model.parts), peaks; warm-up, then a cosine
    train, 3                      lib/distributed.shard_model: what is recomputed (--recompute), compiled, sharded
    prepare_step                  batches of a step, and what the other ranks must know of them
    train, 5 and 6                W; the loss is a sum over all sequences of all ranks, divided by W; the z-loss
    lib/records.BadRecords        what could not be used, counted; too much of it ends the run (--max_bad)
    train, 9                      what is saved: lib/distributed.Saver.save, and `about` with the stream's state
    lib/distributed.check_resume  what --resume compares before it goes on
"""
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass

import lib  # noqa: F401: before torch, which reads the environment that it sets
import numpy as np
import torch

import eval as evaluation
import ulysses
from data import (MIXTURES, Packer, Planner, RankStream, Stream, collate, decode, decode_packed, find_datasets, mix,
                  show_mixture, to_device)
from lib import budget, distributed, flex, lora, toy, weights
from lib.distributed import (Log, Progress, Report, check_init_from, check_resume, check_same_data,
                             check_same_model, clip_gradients, gather_full_model, make_loader, next_samples,
                             show_config, start_over, throughput)
from lib.errors import BadRecord, UserError
from lib.flags import check_each, check_together, flag, read_flags
from lib.media import CropCache, load_crops
from lib.muon import Muon
from lib.progress import progress
from lib.records import BadRecords
from lib.report import report_on
from lib.text import SMALL_TOKENIZER, Tokenizer
from model import Molmo2, PRESETS as MODELS, empty_model


# ---- configuration: one flat dataclass, from which the flags are made ----------------------------------------------

@dataclass
class Config:
    config: str = flag("small", f"model and its recipe: {', '.join(MODELS)}")
    stage: str = flag("pretrain", "name of the stage, part of the output folder")
    previous: str = flag("", "stage whose last checkpoint this one starts from, unless --init_from names another")
    data: tuple = flag((), "JSONL files, folders with the registry's NAME.jsonl or NAME/*.jsonl, or toy (toy world)")
    eval_data: tuple = flag((), "held-out JSONL files, for a loss and answers; the toy world brings its own questions")
    mixture: str = flag("pretrain", "pretrain (60/30/10 captions, pointing, text), sft, released or equal")
    rebalance: tuple = flag((), "NAME=FACTOR: that dataset is drawn so much more often than its size says")
    init_from: tuple = flag((), "checkpoint folder, or those of an OLMo or Qwen3 and a SigLIP; none = random weights")
    resume: bool = flag(False, "continue this run from its last checkpoint")
    out: str = flag("out", "folder of all runs; this one goes to OUT/CONFIG/STAGE")
    steps: int = flag(32000, "optimiser steps")
    epochs: float = flag(0.0, "instead of --steps: so often is each record drawn on average, by the first 64 draws")
    seed: int = flag(0, "of weights, data order and dropout")
    global_batch: int = flag(256, "sequences per optimiser step, over all devices")
    micro_batch: int = flag(4, "sequences per forward pass; gradient accumulation follows from it")
    seq_len: int = flag(4096, "tokens per sequence")
    tiles: int = flag(8, "high-resolution crops an image may get on top of the low-resolution one")
    max_crops: int = flag(48, "crops per sequence")
    max_frames: int = flag(128, "frames a video may get, at 2 per second, if they fit; 0 = videos are left out")
    point_format: str = flag("auto", "of points and times: spec (ours), released, or auto: as --init_from, else spec")
    token_weights: str = flag("auto", "loss of an answer token: spec (by task), released (by length), auto: likewise")
    optimizer: str = flag("adamw", "adamw, or muon (on hidden matrices; the rest stays on AdamW)")
    adam_share: float = flag(0.25, "with muon: learning rate of the parameters left to AdamW, as a share of Muon's")
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
    freeze: tuple = flag((), "parts that do not train: vit connector decoder embedding (the base token table), or none")
    lora: int = flag(0, "rank of adapters (lib/lora.py) that train alone, say 64; 0 = off. Sets lr_* and warmup_* too")
    lora_alpha: float = flag(32.0, "an adapter is added times LORA_ALPHA / LORA")
    lora_parts: tuple = flag(("decoder", "connector"), "parts whose linear layers get adapters: decoder connector vit")
    save_every: int = flag(500, "steps between checkpoints; the last step is always saved")
    keep: int = flag(3, "newest checkpoints to keep; earlier ones are deleted. 0 = keep all")
    report: bool = flag(True, "at each evaluation write report.html, a page with curves and samples (tools.show RUN)")
    log_to: str = flag("none", "tensorboard: write what log.jsonl gets there too, if that package is installed")
    eval_every: int = flag(1000, "steps between evaluations; the last step is always evaluated")
    eval_scenes: int = flag(320, "held-out toy scenes to ask about at the end; a quarter of them in between")
    eval_clips: int = flag(0, "records of the toy world's held-out clips, tracks and pairs to ask about, likewise")
    eval_answers: int = flag(64, "records of each file of --eval_data to ask about at the end; a quarter in between")
    eval_first: bool = flag(False, "evaluate before the first step too, for comparison")
    cp: int = flag(1, "ranks that share a sequence (context parallelism, ulysses.py); divides ranks and heads")
    recompute: bool = flag(False, "activation checkpointing: run each block twice; a third more work, far less memory")
    workers: int | None = flag(None, "processes of a rank that decode media, from 2 on with one more that plans; 0 = "
                                     "the training process itself, auto (None) = 1 to 8, by its share of the cores; "
                                     "--dry_run says how many it needs")
    device: str = flag("auto", "auto (CUDA if there is one, else CPU), cpu, cuda or mps")
    dtype: str = flag("auto", "of the matrix products: auto (bf16 on CUDA, else fp32), fp32 or bf16")
    cache: float = flag(0.0, "gigabytes for decoded crops in each worker, and for the features of a frozen ViT")
    compile: bool | None = flag(None, "torch.compile each block; None = on CUDA alone")
    deterministic: bool = flag(False, "on CUDA take kernels that repeat their sums bit for bit, which are slower")
    dry_run: bool = flag(False, "print parameters, memory and operations of a step, and stop")
    world: int = flag(0, "with --dry_run: number of ranks to assume, eight a node; 0 = as many as run")
    gpu_memory: float = flag(80.0, "with --dry_run: gigabytes of a card")
    max_bad: float = flag(0.05, "share of unusable records above which the run stops")
    allow_closed: bool = flag(False, "train on records marked as made by a closed model too (tools.annotate)")


# A preset is what --config NAME changes in the stage's defaults, beside the model.
PRESETS = {
    "small": dict(data=("toy",), steps=550, global_batch=24, micro_batch=12, seq_len=256, tiles=0, max_crops=16,
                  max_frames=16, optimizer="muon", adam_share=1.0, lr_vit=4e-3, lr_connector=2e-3, lr_decoder=2e-3,
                  warmup_vit=30, warmup_connector=30, warmup_decoder=30, lr_end=0.0, response_dropout=0.0,
                  save_every=200, eval_every=100, workers=1, cache=1.0),
    # Without --recompute a sequence of 46 frames alone takes 41 GB of an 80 GB card (--dry_run shows it). A language
    # model that knows its words keeps their table, as published; the rows of new tokens train with the connector.
    **dict.fromkeys(("1b", "4b", "7b", "8b"), dict(recompute=True, freeze=("embedding",)))}


def lora_recipe(config):
    """What --lora changes in the recipe of --config, as {field: value}.

    Full fine-tuning moves every number of a matrix by some 1e-5 a step. An adapter has a hundredth of the numbers, and
    its B starts at zero: to get as far it takes about ten times the rate, whatever its rank is, since alpha is divided
    by the rank. (`small` on 200 captions in a new wording, loss after 100 steps: AdamW on all numbers at 3e-4 0.65;
    rank 16 at 3e-3 0.65, at 3e-4 4.8; rank 64 at 5e-3 0.42.) B = 0 is a warm-up by itself: A moves only as B grows. And
    the optimiser is AdamW: Muon would give all directions of A and B one size, right for a matrix that starts at
    random, not for a correction.
    """
    rate = 5e-3 if config == "small" else 1e-4
    return dict(optimizer="adamw", lr_vit=rate, lr_connector=rate, lr_decoder=rate,
                warmup_vit=10, warmup_connector=10, warmup_decoder=10, eval_first=True)


CHOICES = dict(mixture=tuple(MIXTURES), token_weights=("auto", "spec", "released"),
               point_format=("auto", "spec", "released"), optimizer=("adamw", "muon"),
               device=("auto", "cpu", "cuda", "mps"), dtype=("auto", "fp32", "bf16"), log_to=("none", "tensorboard"),
               freeze=("vit", "connector", "decoder", "embedding", "none"), lora_parts=("vit", "connector", "decoder"))


def parse(defaults, presets, argv=None):
    """Flags -> Config. A flag overrides the --config preset, which overrides the default of the stage."""
    given = read_flags(defaults, argv)
    name = given.get("config", defaults.config)
    if name not in presets:
        raise UserError(f"--config {name}: not a preset; choose from {', '.join(presets)}")
    recipe = presets[name] | (lora_recipe(name) if given.get("lora") else {})
    cfg = dataclasses.replace(defaults, **(recipe | given))
    check_each(cfg, CHOICES)
    try:
        ulysses.check_heads(MODELS[name].heads, MODELS[name].kv_heads, cfg.cp)
    except ValueError as e:
        raise UserError(str(e)) from None
    if "seq_len" in given and "max_crops" not in given:  # more tokens show more frames
        usual = dataclasses.replace(defaults, **presets[name])
        cfg.max_crops = max(usual.max_crops, usual.max_crops * cfg.seq_len // usual.seq_len)
    previous = os.path.join(cfg.out, cfg.config, cfg.previous, "latest")
    if cfg.previous and not cfg.init_from and os.path.isdir(previous):
        cfg.init_from = (previous,)
    check_together(cfg, given)
    if cfg.lora:
        cfg.freeze = tuple(part for part in CHOICES["lora_parts"] if part not in cfg.lora_parts)
    elif "none" in cfg.freeze:
        cfg.freeze = ()
    elif "freeze" not in given and not (cfg.init_from or cfg.resume or cfg.dry_run):
        cfg.freeze = tuple(part for part in cfg.freeze if part != "embedding")  # random weights know no words yet
    return cfg


# ---- model, data, optimisers ---------------------------------------------------------------------------------------

def load_model(cfg, checkpoint=None):
    """The model of a run's folder `checkpoint`, else of --init_from, else of the preset with random weights.
    With --lora it is the first folder of --init_from, and `checkpoint` or the second folder has the adapter."""
    torch.manual_seed(cfg.seed)  # also for adapters, and the new rows and the connector of a plain language model
    if checkpoint and not cfg.lora:
        return Molmo2.from_pretrained(checkpoint)
    folders = cfg.init_from[:1] if cfg.lora else cfg.init_from
    if cfg.init_from:
        check_init_from(folders if checkpoint else cfg.init_from, cfg.lora)
        model = Molmo2.from_pretrained(*folders)
        model.cfg.window, model.cfg.window_layers = 0, ()  # in Molmo2 every layer of an OLMo-3 sees everything
        check_same_model(folders[0], model.cfg, cfg.config, MODELS[cfg.config])
    else:
        print("starting from random weights (no --init_from)")
        model = Molmo2(cfg.config)
    if len(folders) == 2:
        model.cfg.point_format = "spec"  # a plain language model knows no grammar of points
    if cfg.lora:
        lora.install(model, cfg)
        adapters = [checkpoint] if checkpoint else cfg.init_from[1:]
        for adapter in adapters:  # one, or none: then they are new
            lora.load(model, adapter)
    if cfg.point_format != "auto":
        model.cfg.point_format = cfg.point_format
    return model


def open_data(cfg):
    """The training mixture [(Dataset, rate)], and the names of the registry's datasets that were not found."""
    paths = []
    for path in cfg.data:
        paths += toy.files(toy.FOLDER, cfg.stage) if path == "toy" else [path]
    try:
        datasets, missing = find_datasets(paths, cfg.stage)
    except (OSError, ValueError) as e:
        raise UserError(str(e)) from None
    if "toy" in cfg.data:
        multipliers = {"sft": toy.FACTORS}.get(cfg.mixture, {})  # by mixture: what is new is drawn more often
        for dataset in datasets:
            dataset.factor = multipliers.get(dataset.name, 1.0)
    by_name = {dataset.name: dataset for dataset in datasets}
    for text in cfg.rebalance:
        name, _, factor = text.partition("=")
        try:
            by_name[name].factor = float(factor)
        except (KeyError, ValueError):
            raise UserError(f"--rebalance {text}: NAME=FACTOR, a number and one of {', '.join(by_name)}") from None
    return mix(datasets, cfg.mixture), missing


def make_optimizers(model, cfg):
    """([optimizers], {parameter: name} of all that train). A group also has its peak learning rate and its warm-up.
    What trains is chosen before, by lib/lora.freeze.

    AdamW on everything, as published; or Muon on the hidden matrices: from random weights it needs a fraction of the
    steps. A step of Muon has the size of one of AdamW, so one learning rate serves both.
    """
    groups, names = {"adamw": [], "muon": []}, {}
    for part, named in model.parts().items():
        split = {"adamw": [], "muon": []}
        for name, p in named:
            if p.requires_grad:
                names[p] = name
                # a table is no hidden matrix: each of its rows belongs to a token or a position
                hidden = p.ndim == 2 and not re.search(r"wte\.|positional|lm_head", name)
                split["muon" if cfg.optimizer == "muon" and hidden else "adamw"].append(p)
        for optimizer, params in split.items():
            share = 1.0 if optimizer == cfg.optimizer else cfg.adam_share  # AdamW beside Muon takes smaller steps
            peak = getattr(cfg, f"lr_{part}") * share
            if params:
                groups[optimizer].append(dict(params=params, part=part, peak=peak,
                                              warmup=getattr(cfg, f"warmup_{part}")))
    optimizers = []
    if groups["adamw"]:
        fused = all(p.is_cuda for p in names) or None  # None: as PyTorch likes
        optimizers.append(torch.optim.AdamW(groups["adamw"], betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps,
                                            weight_decay=0.0, fused=fused))
    if groups["muon"]:
        optimizers.append(Muon(groups["muon"]))
    return optimizers, names


def schedule(step, steps, warmup, end=0.1):
    """Learning rate as a share of its peak: linear from 0, then a cosine down to `end`. step: from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return end + (1 - end) / 2 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


# ---- batches and evaluation ----------------------------------------------------------------------------------------

def make_batches(sequences, micro_batch, n, cfg, seq_len):
    """Decoded sequences -> as many batches as n sequences take, each of up to `micro_batch` of them.

    Every part of the model has work in every batch. Where there is no sequence or no image, it gets an empty one, of
    which nothing is used: a rank that leaves out a module would keep the others waiting.
    """
    batches = []
    for i in range(0, n, micro_batch):
        batch = collate(sequences[i:i + micro_batch] or [decode([], cfg, seq_len)])
        if batch["crops"] is None:
            batch["crops"] = torch.zeros(1, cfg.patches, cfg.patch ** 2 * 3, dtype=torch.uint8)
            batch["pool"] = torch.zeros(0, 4, dtype=torch.long)
        batches.append(batch)
    return batches


def prepared(model, batch, device):
    """A batch as `model` takes it, checked on the CPU. A GPU copies from pinned memory while it computes."""
    batch = model.prepare(**batch)
    if device == "cuda":
        batch = {name: x if x is None else x.pin_memory() for name, x in batch.items()}
    return batch


def on_device(model, batch, device):
    """The same on the device, for one that is used at once."""
    return to_device(prepared(model, batch, device), device)


def prepare_step(cfg, model, samples, micro_batch, n, world):
    """All that a step needs before the first kernel runs: ([this rank's part of each micro-batch], its Report).
    n: sequences of a step, of the rank that has most."""
    batches = make_batches([sample.decoded for sample in samples], micro_batch, n, model.cfg, cfg.seq_len)
    flops = 0
    if world.device != "cpu":
        flops = sum(budget.step_flops(batch, model.cfg, cfg.freeze, cfg.lora) for batch in batches)
    batches = [ulysses.shard_batch(batch, model.cfg.image_token, world.cp_rank, world.cp) for batch in batches]
    report = Report(flops).add(samples, batches)
    return [prepared(model, batch, world.device) for batch in batches], report


def held_out_sequences(cfg, planner):
    """The first 512 records of each file of --eval_data, packed to the length for which training compiles."""
    if not cfg.eval_data or "toy" in cfg.data:
        return []
    packer, sequences = Packer(cfg.seq_len, cfg.max_crops), []
    try:
        datasets, _ = find_datasets(cfg.eval_data)
        evaluation.load_questions(datasets, cfg.eval_answers)  # asked later: what is wrong with them is said now
        for dataset in datasets:
            stream = Stream([(dataset, 1.0)], planner, 0, True)  # seed 0: the same records in every run
            for k in range(min(len(dataset), 512)):  # of draws: all of a smaller file once, in shuffled order
                for plan in stream.plans(dataset.name, k)[0]:
                    sequences += packer.add(plan)
    except (OSError, ValueError, BadRecord) as e:
        raise UserError(f"--eval_data {' '.join(cfg.eval_data)}: {e}") from None
    sequences += packer.flush()
    if not sequences:
        raise UserError(f"--eval_data {' '.join(cfg.eval_data)}: nothing of it fits a sequence; --seq_len "
                        f"{cfg.seq_len}, --max_crops {cfg.max_crops} and --max_frames {cfg.max_frames} make room")
    return sequences


def held_out_loss(cfg, model, planner, sequences, world):
    """The loss per unit of loss weight, over all ranks."""
    sums = torch.zeros(2, device=world.device)  # loss, weight
    missing = -len(sequences) % world.dp
    rank_sequences = [*sequences, *[[]] * missing][world.dp_rank::world.dp]  # all ranks run the model equally often
    workers = min(cfg.workers, len(rank_sequences))
    convert = functools.partial(decode, cfg=planner.cfg, seq_len=cfg.seq_len)
    loader = make_loader(rank_sequences, workers, workers, convert)
    for decoded in progress(loader, "held-out sequences evaluated", len(rank_sequences), world.is_main):
        for _, where, reason, detail in decoded[-1]:
            print(f"--eval_data: {where}: {reason}: {detail}", file=sys.stderr)
        batch, = make_batches([decoded], 1, 1, planner.cfg, cfg.seq_len)
        batch = ulysses.shard_batch(batch, planner.cfg.image_token, world.cp_rank, world.cp)
        with torch.no_grad():
            sums[0] += model(**on_device(model, batch, world.device))
        sums[1] += batch["weights"].sum().to(world.device)
    loss, weight = world.all_reduce_sum(sums).tolist()  # ratio of sums, not a mean of ratios
    return loss / max(weight, 1e-9)


def answer_scores(cfg, model, planner, paths, n, samples, world, segmenter=None):
    """{"task metric": mean} of answers about the first n records of held-out files; rank 0 leaves them in `samples`."""
    datasets, _ = find_datasets(paths)
    questions = evaluation.load_questions(datasets, n)
    table, records = evaluation.evaluate(model, planner, questions, segmenter=segmenter,
                                         max_new_tokens=min(cfg.seq_len // 2, 512), world=world, unusable={})
    if world.is_main:
        os.makedirs(os.path.dirname(samples), exist_ok=True)
        weights.write_json(samples + ".json", records)
    return table


def toy_scores(cfg, model, planner, divisor, samples, world):
    """{name: share} of answers about the toy world's held-out records; rank 0 leaves them in `samples`."""
    scores = evaluation.evaluate_scenes(model, planner, os.path.join(toy.FOLDER, "eval"), cfg.eval_scenes // divisor,
                                        samples + ".png" if world.is_main else None, world)
    if cfg.eval_clips:
        scores |= answer_scores(cfg, model, planner, toy.held_out(toy.FOLDER, cfg.stage), cfg.eval_clips // divisor,
                                samples, world, toy.segment)
    return scores


def count_steps(cfg, stream, mixture, missing):
    """The steps of a run: --steps, or as many as draw --epochs times as many records as there are. Print what is drawn,
    and which datasets are `missing`."""
    sequences_per_draw, told = stream.first_look()
    draws_per_step = cfg.global_batch / sequences_per_draw
    steps = cfg.steps
    if cfg.epochs:
        steps = math.ceil(cfg.epochs * sum(len(dataset) for dataset, _ in mixture) / draws_per_step)
        print(f"--epochs {cfg.epochs:g} takes {steps} steps: {draws_per_step:.1f} records fill one")
    show_mixture(mixture, steps * draws_per_step, missing, told)
    return steps


def evaluate(cfg, model, planner, held_out, step, run, losses, world):
    """{name: value} on held-out data: shares of right answers on the toy world, a loss on the sequences of
    --eval_data and answers, else the recent training loss. All ranks call it and share the work."""
    model.eval()
    scores = {}
    divisor = 1 if step in (0, cfg.steps) else 4  # in between, a quarter of the questions is enough
    samples = os.path.join(run, "samples", f"step_{step:07d}")
    # an answer grows by one token at a time: nothing to compile for
    eager = lambda: torch.compiler.set_stance("force_eager") if cfg.compile else contextlib.nullcontext()
    if "toy" in cfg.data:
        with eager():
            scores = toy_scores(cfg, gather_full_model(model), planner, divisor, samples, world)
    elif held_out:
        scores = {"loss": held_out_loss(cfg, model, planner, held_out, world)}
        if cfg.eval_answers:
            with eager():
                scores |= answer_scores(cfg, gather_full_model(model), planner, cfg.eval_data,
                                        math.ceil(cfg.eval_answers / divisor), samples, world)
    elif losses:
        scores = {"train_loss": sum(losses[-20:]) / len(losses[-20:])}
    model.train()
    return {name: round(value, 4) for name, value in scores.items()}


# ---- the loop ------------------------------------------------------------------------------------------------------

def train(cfg, defaults, stop, cache_features=None):
    """Run one stage from the first step, or from the last checkpoint, to the end or until `stop` holds a signal.
    Under torchrun every rank runs all of this. Returns the run's folder, on rank 0 and if it was not stopped."""
    # 1. Device, precision, ranks. Weights, gradients and optimiser are fp32; bf16 is for the matrix products.
    run = os.path.join(cfg.out, cfg.config, cfg.stage)
    device, dtype = weights.pick_device(cfg.device, cfg.dtype)
    bf16 = dtype == torch.bfloat16
    cfg = dataclasses.replace(cfg, compile=device == "cuda" if cfg.compile is None else cfg.compile,
                              workers=distributed.auto_workers() if cfg.workers is None else cfg.workers)
    autocast = lambda: torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext()
    world = distributed.start(device, cfg.cp)
    distributed.set_deterministic(cfg.deterministic)
    distributed.lock(f"{run}.lock", world)
    torch.set_num_threads(min(torch.get_num_threads(), distributed.cores()))
    if world.is_main:
        show_config(cfg, defaults)

    # 2. Data and model: fresh, from --init_from, or as the run left them. Rank 0 draws the toy world and indexes the
    # files; the others find both. Rank 0 loads the weights; the others get theirs in shard_model, block by block.
    mixture, missing = world.on_main(lambda: open_data(cfg), broadcast=lambda opened: None) or open_data(cfg)
    checkpoint, saved = world.on_main(lambda: check_resume(run, cfg))
    torch.set_num_threads(saved.get("threads", torch.get_num_threads()))  # of them depend the last bits of a sum
    loaded = world.on_main(lambda: load_model(cfg, checkpoint), broadcast=lambda model: model.cfg)
    model = lora.freeze(loaded if world.is_main else lora.install(empty_model(loaded), cfg), cfg, bf16)
    model.residual_dropout, model.response_dropout = cfg.residual_dropout, cfg.response_dropout
    source = checkpoint or "".join(cfg.init_from[:1])
    tokenizer = Tokenizer(os.path.join(source, "tokenizer.json") if source else SMALL_TOKENIZER, model.cfg.vocab)

    # 3. What replaces parts of the model, and in which order. flex.install sets attention and mask. ulysses.install
    # wraps both, and the vision backbone, so it comes second. shard_model wraps each block in activation
    # checkpointing, then torch.compile, then FSDP2. Optimisers hold the parameters that FSDP2 makes, so they come
    # after it. cache_features wraps the ViT with all of that, on one rank alone: sharded ranks call the ViT together.
    flex.install(model)
    if world.cp > 1:
        ulysses.install(model, world.cp_group)
    distributed.shard_model(model, world, cfg.compile, cfg.recompute, bf16)
    optimizers, names = make_optimizers(model, cfg)
    if cache_features and cfg.cache and "vit" in cfg.freeze and world.size == 1:
        cache_features(model.vision_backbone.image_vit, model.cfg, cfg.cache)

    # 4. The stream is a function of files, mixture and seed alone; `state` says where in it we are. A step has
    # global_batch sequences. Rank r takes r, r + dp, r + 2 dp, ..., and runs micro_batch of them at a time. Where dp
    # does not divide global_batch some ranks have one less, and run an empty one: FSDP2 wants all to take part.
    token_weights = model.cfg.point_format if cfg.token_weights == "auto" else cfg.token_weights
    planner = Planner(tokenizer, model.cfg, cfg.seq_len, cfg.tiles, token_weights, cfg.max_frames, cfg.max_crops)
    stream = Stream(mixture, planner, cfg.seed, cfg.allow_closed)
    held_out = held_out_sequences(cfg, planner)
    if cfg.resume:
        check_same_data(saved["fingerprint"], stream.fingerprint())
        distributed.load_optimizers(checkpoint, optimizers, names, world)
    else:
        world.on_main(lambda: start_over(run))
    rank_sequences = len(range(world.dp_rank, cfg.global_batch, world.dp))
    most_sequences = math.ceil(cfg.global_batch / world.dp)  # of any rank
    last_reader = (cfg.global_batch - 1) % world.dp  # the rank that takes a step's last sequence
    micro_batch = min(cfg.micro_batch, most_sequences)
    step, state = saved["step"], saved["stream"]
    rank_stream = RankStream(stream, state, world.dp_rank, world.dp, cfg.global_batch)
    load = CropCache(round(cfg.cache * 2 ** 30)) if cfg.cache else load_crops
    convert = functools.partial(decode_packed, cfg=model.cfg, seq_len=cfg.seq_len, load=load)
    # A step ahead, but not more than 64 sequences: one of 48 crops is 20 MB.
    loader = make_loader(rank_stream, cfg.workers, min(most_sequences, 64), convert)
    world.print(f"{model.num_params():,} parameters on {device}; a step is {cfg.global_batch} sequences of "
                f"{cfg.seq_len} tokens, {micro_batch} at a time on each of {world.dp} x {world.cp} ranks")
    cfg.steps = world.on_main(lambda: count_steps(cfg, stream, mixture, missing))
    log = Log(os.path.join(run, "log.jsonl"), step, world.is_main, cfg.log_to)
    bad = BadRecords(Log(os.path.join(run, "bad_rows.jsonl"), step, world.is_main), saved["failed"])
    saver = distributed.Saver(run, world, step, cfg.keep)
    progress = Progress(cfg.steps, step, world)
    losses = [row["loss"] for row in map(json.loads, log.kept) if "loss" in row]  # of the steps before --resume
    save = lambda: saver.save(step, model, tokenizer, optimizers, names, dict(
        step=step, stream=state, fingerprint=stream.fingerprint(), failed=bad.failed, threads=torch.get_num_threads(),
        config=dataclasses.asdict(cfg)))
    write_page = lambda: report_on(run, {cfg.stage: defaults}) if cfg.report and world.is_main else None
    skipped, unstable = 0, []  # steps left out; where the records of the last ones in a row are
    before = {}                # scores before the first step
    if cfg.eval_first and step == 0:
        with autocast():
            before = evaluate(cfg, model, planner, held_out, 0, run, losses, world)
        if before:
            log.write(step=0, eval=before)
            write_page()
    model.train()

    while step < cfg.steps:
        tick = time.time()
        # dropout depends on the step and the rank alone, so a resumed run repeats it
        torch.manual_seed((cfg.seed * 1_000_003 + step) * world.size + world.rank)

        # 5. The sequences of this step. The ranks exchange what all must know: W, the loss weight of all sequences,
        # by which the sum of all losses is divided; where the stream is; who could not use a record or has to stop.
        samples = None
        with distributed.interruptible(stop, world):
            samples = next_samples(loader, rank_sequences)
        if samples is None:
            break
        wait = time.time() - tick
        batches, report = prepare_step(cfg, model, samples, micro_batch, most_sequences, world)
        reports = world.all_gather(dataclasses.replace(report, wait=wait, stop=bool(stop), error=saver.error))
        data_reports = reports[::world.cp]  # the ranks of a cp group hold parts of the same sequences
        state = data_reports[last_reader].state  # --resume would go on after this step's last sequence
        W = max(sum(report.weight for report in reports), 1e-9)  # where nothing is trained on, the loss is 0
        saver.check([report.error for report in reports])
        for report in data_reports:
            bad.note(step + 1, report.events)
        reason = bad.too_many(state, cfg.max_bad)
        if reason:
            raise UserError(reason)

        # 6. Gradients of all micro-batches add up; over ranks FSDP2 takes their mean, so a loss is times world.size.
        loss = torch.zeros((), device=device)
        for batch in batches:
            with autocast():
                part_of_loss = model(**to_device(batch, device), z_loss=cfg.z_loss) / (W / world.size)
            part_of_loss.backward()
            loss += part_of_loss.detach()
        loss = world.all_reduce_sum(loss) / world.size

        # 7. Clip each part by itself, then step. All ranks leave out a step whose loss or gradient is not finite.
        # To read loss and norms, all at once, is the only time that this process waits for a GPU.
        loss, *norms = torch.stack([loss, *clip_gradients(model, cfg.clip)]).tolist()
        finite = all(map(math.isfinite, [loss, *norms]))
        learning_rates = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, cfg.steps, group["warmup"], cfg.lr_end)
                learning_rates[f"lr_{group['part']}"] = group["lr"]  # Muon's, where a part has both
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        unstable = [] if finite else [*unstable, reports[world.rank].records]
        skipped = skipped if finite else skipped + 1
        if len(unstable) == 10:
            raise UserError(f"10 steps in a row had a loss or gradient that is not finite; their records: {unstable}")

        # 8. Log what was optimised: every micro-batch of every rank, divided by the global loss weight.
        losses.append(loss)
        seconds = time.time() - tick
        rates = throughput(cfg, reports, world, seconds, bf16)
        log.write(step=step, loss=loss, lr=optimizers[0].param_groups[-1]["lr"], grad_norm=math.hypot(*norms),
                  **learning_rates, **rates, skipped=skipped, bad=bad.counts(state))
        progress.show(step, loss, rates["tokens_per_s"], seconds)
        world.heartbeat.step = step

        # 9. Evaluate, then save, in this order: a resumed run has the evaluations of its past.
        last = step == cfg.steps
        if last or step % cfg.eval_every == 0:
            with distributed.interruptible(stop, world), autocast():
                scores = evaluate(cfg, model, planner, held_out, step, run, losses, world)
                log.write(step=step, eval=scores)
                progress.scores(step, before, scores)
                if not last:  # then the page is written below, with the last checkpoint
                    write_page()
        if last or step % cfg.save_every == 0:
            save()
        # All ranks stop in the same step, or one would wait for the others in the next.
        if any(report.stop for report in reports) or world.size == 1 and stop:
            break

    # 10. After a signal save here. Wait for the last checkpoint; print what was left out and what to do next.
    if step > saver.step:
        save()
    saver.finish()
    write_page()
    world.close()
    progress.end(run, step, state, bad)
    return run if world.is_main and step == cfg.steps else None


def dry_run(cfg):
    """Print what a run will need, from shapes alone (lib/budget.py): of sequences of --data, else of a long video."""
    # small is for a laptop, and all else is meant for a card, also where --dry_run finds none
    on_card = cfg.device == "cuda" or cfg.device == "auto" and cfg.config != "small"
    cuda = cfg.dtype == "bf16" or cfg.dtype == "auto" and on_card
    ranks = cfg.world or int(os.environ.get("WORLD_SIZE", 1))  # WORLD_SIZE is torchrun's
    if ranks % cfg.cp:
        raise UserError(f"--cp {cfg.cp}: --world {ranks} cannot be split into groups of {cfg.cp}")
    micro_batch = min(cfg.micro_batch, math.ceil(cfg.global_batch / (ranks // cfg.cp)))
    model = lora.freeze(lora.install(empty_model(cfg.config), cfg), cfg, cuda)
    planner = Planner(Tokenizer(SMALL_TOKENIZER, model.cfg.vocab), model.cfg, cfg.seq_len, cfg.tiles, "spec",
                      cfg.max_frames, cfg.max_crops)
    planning = 0.0  # seconds a sequence
    if cfg.data:
        stream = Stream(open_data(cfg)[0], planner, cfg.seed).sequences()
        next(stream)  # fills the packer first
        began = time.perf_counter()
        sequences = [next(stream).plans for _ in range(50 * micro_batch)]  # enough to meet one with many crops
        planning = (time.perf_counter() - began) / len(sequences)
    else:
        sequences = [budget.long_video(planner)] * micro_batch
    blank = lambda path, layout, n, patch: np.zeros((layout.n_crops, n * n, patch ** 2 * 3), np.uint8)
    decoded = [decode(plans, model.cfg, cfg.seq_len, blank) for plans in sequences]  # opens no media
    batches = make_batches(decoded, micro_batch, len(decoded), model.cfg, cfg.seq_len)

    def empty_step():  # on a CPU the code of a step takes memory too; this loads all of it
        small = lora.freeze(lora.install(Molmo2(cfg.config), cfg), cfg)
        optimizers, _ = make_optimizers(small, cfg)
        small(**make_batches([], 1, 1, small.cfg, 16)[0]).backward()
        for optimizer in optimizers:
            optimizer.step()

    budget.show(cfg, model, make_optimizers(model, cfg)[0], sequences, planning, batches, ranks, cuda, empty_step)


def main(defaults, presets, argv=None, cache_features=None, example=""):
    """Train, or print what training needs. example: what to ask the result, if it was trained on the toy world."""
    try:
        cfg = parse(defaults, presets, argv)
        if cfg.dry_run:
            dry_run(cfg)
            sys.exit(0)
        with distributed.stop_signals() as stop, distributed.worker_errors():
            run = train(cfg, defaults, stop, cache_features)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped before the first step: there is nothing to save", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as e:
        distributed.end_if_a_rank_is_lost(e)
        raise
    if run:
        if "toy" in cfg.data and cfg.stage == "pretrain":
            with open(os.path.join(run, "log.jsonl")) as log:
                print(toy.show_goals(map(json.loads, log)))
        print(f"next: python sample.py {run}/latest", example if "toy" in cfg.data else 'FILE "QUESTION"')


if __name__ == "__main__":
    main(Config(), PRESETS, example='data/toy/eval/images/00003.png "Point to all shapes."')
