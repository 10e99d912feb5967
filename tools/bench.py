"""
Checks that the project computes the right numbers, and measures how fast it is: on a CUDA GPU, else on the CPU.

    python -m tools.bench                                  # at most 15 minutes; figures go to out/bench
    python -m tools.bench --parts env speed --out DIR      # DIR/results.jsonl and DIR/log.txt are appended to
    python -m tools.bench --cpu_rehearsal                  # all parts, tiny sizes, three minutes: does this file work?

On any machine:
    env        versions; matrix product and copy: the two ceilings that later shares refer to, so run it first
    correct    golden outputs; the mask of training against the dense mask; pretrain.py on the CPU and on the card
    transformers   a training step and an answer beside transformers' own Molmo2, if that is installed
    packing    answers trained on in a second: message trees, packed, against a row for each question
    data       ms on one core: JPEG and MP4 to crops, beside Pillow and FFmpeg alone; planning a record
On a card:
    speed      training steps of the 1B model, eager; where the ms go; the kernels that take most of them
    compiled   the same with --compile; whether batches of other images compile again
    decode     tokens a second of an answer, against what the memory bandwidth allows
    files      the 1B model trained from JPEG and MP4: the share of time it waits for data
    long       one sequence of 36,864 tokens that a video fills

Each part is a process with a time limit, so what fails, hangs or runs out of memory costs that part alone. The 1B
model needs a card of 80 GB. A figure is a line of results.jsonl as soon as it is known. How to read them: `ok` must
be true. Errors are relative: fp32 is off by less than 1e-4, bf16 by about as much as on a CPU (bf16_cpu). `of_matmul`
is a step's share of the measured matrix product, `mfu` its share of what the card's maker states: an H200 had 0.31
and 0.24 eager, 0.39 and 0.31 compiled. `forecast_gb` is what --dry_run says, `peak_gb` what was used. `busy_share` is
the share of a step in which the card works: far below 1, the CPU does not launch kernels fast enough. `graphs`,
compiled so far, stops growing after two batches. `floor_ms` is the time to read the decoder's weights and its cache
once. `wait` near 0: the workers keep up. `ratio` is our time as a share of transformers', both of one thread on a CPU;
`gain` is what trees and packing do for our own model, `beside_transformers` is gain / ratio. A line with `error` or
`skipped` has the reason; the exit status is 1 where something failed or is not ok.
"""
import argparse
import gc
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from functools import partial

import lib  # noqa: F401: before torch, which reads the environment that it sets
import av
import numpy as np
import torch
from PIL import Image, ImageChops
from torch.utils.benchmark import Timer

import pretrain
from data import Packer, Plan, Planner, Stream, collate, decode, to_device
from lib import budget, distributed, flex, media, toy
from lib.text import SMALL_TOKENIZER, Tokenizer
from lib.weights import read_safetensors
from model import Molmo2, ModelConfig, PRESETS, attend, dense_mask, empty_model, is_vision

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PRETRAIN = [sys.executable, os.path.join(ROOT, "pretrain.py")]
LEAST, MOST = 25, 180  # seconds: with fewer left nothing is begun, and no part may take more


class Bench:
    """What a part needs: a device, the size of the model, a file for the figures. tiny: --cpu_rehearsal. Parts that
    are for a card alone take it that whatever is not tiny is on one."""

    def __init__(self, out, tiny, part, until):
        self.tiny, self.part, self.until = tiny, part, until  # until: when this process will be stopped
        self.cuda = torch.cuda.is_available() and not tiny
        self.device, self.config = ("cuda", "1b") if self.cuda else ("cpu", "small")
        self.cfg = PRESETS[self.config]
        self.results = os.path.join(out, "results.jsonl")

    def say(self, what, **figures):
        """Write a line of results, without the figures that are NaN: those need another one that is not known."""
        machine = torch.cuda.get_device_name() if torch.cuda.is_initialized() else f"CPU, {os.cpu_count()} cores"
        known = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in figures.items() if v == v}
        with open(self.results, "a") as f:
            f.write(json.dumps(dict(part=self.part, what=what, **known, machine=machine)) + "\n")

    def known(self, what, key):
        """The last such figure in the file, or NaN."""
        figures = [line[key] for line in read_lines(self.results) if line["what"] == what and key in line]
        return figures[-1] if figures else math.nan

    def attempt(self, what, do, *args):
        """do(bench, what, *args). If it fails a line of results has the reason."""
        gc.collect()  # an earlier model and its hooks refer to each other
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if self.until - time.time() < LEAST:
            return self.say(what, skipped="no time left")
        try:
            do(self, what, *args)
        except Exception as error:
            traceback.print_exc()
            self.say(what, error=f"{type(error).__name__}: {str(error)[:300]}")


def read_lines(path):
    """The objects of a JSONL file, none if it does not exist. A last line that is half written is left out."""
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def photo(i):
    """The record of a photo that does not exist."""
    width, height = ((800, 600), (600, 800), (1024, 512), (500, 375))[i % 4]
    points = [dict(x=k / 10, y=0.5, id=k) for k in range(i % 8 + 1)]
    return dict(id=f"photo {i}", image=f"{i}.jpg", width=width, height=height, annotations=[
        dict(task="image_caption", answer="a round thing near the other blue wall " * 15),
        dict(task="image_pointing", prompt="Point to the discs.", points=points)])


def noise(path, layout, side, patch):
    """Crops of a file that does not exist. Not zeros, which would be cheaper to compute with."""
    return np.random.default_rng(0).integers(0, 256, (layout.n_crops, side ** 2, patch ** 2 * 3), dtype=np.uint8)


def planner_for(cfg, seq_len, tiles=0, crops=48):
    return Planner(Tokenizer(SMALL_TOKENIZER, cfg.vocab), cfg, seq_len, tiles, max_frames=crops, max_crops=crops)


def photo_batches(cfg, seq_len, tiles, sequences, n):
    """n batches of photos, planned and packed as in training."""
    planner = planner_for(cfg, seq_len, tiles)
    packer = Packer(seq_len, planner.max_crops)
    decoded = []
    i = 0
    while len(decoded) < sequences * n:
        plans, _ = planner.plan(photo(i), ".", random.Random(i))
        decoded += [decode(packed, cfg, seq_len, noise) for packed in packer.add(plans[0])]
        i += 1
    return [collate(decoded[k:k + sequences]) for k in range(0, len(decoded), sequences)]


def random_model(bench, cfg=None):
    """A model on the device all of whose weights are random: training starts with some at zero."""
    torch.manual_seed(0)
    with torch.device(bench.device):
        model = Molmo2(cfg or bench.config)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1 if p.ndim == 1 else 0.02)
    return model


def off(x, wanted):
    """|x - wanted| / |wanted|, infinite and not NaN where x is not finite, for max() may pass over a NaN."""
    wanted = wanted.double().cpu()
    error = float((x.double().cpu() - wanted).norm() / wanted.norm())
    return error if math.isfinite(error) else math.inf


@torch.no_grad()
def golden(bench, what, name, case):
    """The device's outputs, in fp32 and bf16, against those of the published code (fp32, on a CPU)."""
    folder = os.path.join(ROOT, "tests", "golden")
    model = Molmo2.from_pretrained(os.path.join(folder, f"molmo2-{name}-tiny", "hub"))
    x = read_safetensors(os.path.join(folder, "molmo2-inputs", f"{case}.safetensors"))
    wanted = read_safetensors(os.path.join(folder, f"molmo2-{name}-tiny", f"{case}_outputs.safetensors"))
    kind, pixels = ("video", "pixel_values_videos") if case == "video" else ("image", "pixel_values")
    inputs = [x["input_ids"], x[pixels], x[f"{kind}_token_pooling"]]
    error = lambda: off(model(*inputs)[:, wanted["logit_positions"]], wanted["logits"])
    with torch.autocast("cpu", torch.bfloat16):
        bf16_cpu = error()
    model.to(bench.device)
    tokens, crops, pool = inputs = [tensor.to(bench.device) for tensor in inputs]
    fp32 = max(off(model.vision_backbone.image_vit(crops), wanted["vit_features"]),
               off(model.vision_backbone(crops, pool), wanted["connector_features"]), error())
    with torch.autocast(bench.device, torch.bfloat16):
        bf16 = error()
    ids = list(model.generate(tokens[:, :int(x["prompt_len"])], crops, pool, max_new_tokens=12))
    same_answer = torch.equal(torch.stack(ids, dim=1).cpu(), wanted["generated"])
    ok = fp32 < 1e-4 and bf16 < 2 * bf16_cpu and same_answer
    bench.say(what, ok=ok, fp32=fp32, bf16=bf16, bf16_cpu=bf16_cpu, same_answer=same_answer)


def masks_agree(bench, what, heads, kv_heads, head_dim, dtype):
    """Attention and its gradients with the mask of training (on CUDA in blocks), against the dense mask in fp64."""
    network = empty_model("small")
    flex.install(network)
    batch = to_device(photo_batches(network.cfg, 1024, 0, 4, 1)[0], bench.device)
    tokens, example, branch = batch["tokens"], batch["example"], batch["branch"]
    real = (example > 0)[:, None, :, None]
    torch.manual_seed(0)
    q, k, v, gradient = [torch.randn(4, n, 1024, head_dim, device=bench.device).to(dtype)
                         for n in (heads, kv_heads, kv_heads, heads)]

    def outputs(attention, mask, dtype):
        qkv = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        output = attention(*qkv, mask)
        gradients = torch.autograd.grad(output, qkv, (gradient * real).to(dtype))  # padding is not trained on
        return torch.where(real, output, 0).detach(), *gradients
    exact = outputs(attend, dense_mask(example, branch, is_vision(tokens, network.cfg.vocab)), torch.float64)
    block = network.transformer.blocks[0]
    in_training = outputs(block.self_attn.attend, network.mask(tokens, example, branch), dtype)
    out, dq, dk, dv = [off(x, wanted) for x, wanted in zip(in_training, exact)]
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    bench.say(what, ok=max(out, dq, dk, dv) < limit, out=out, dq=dq, dk=dk, dv=dv)


def five_steps(bench, what, device, dtype):
    """pretrain.py itself has the losses it has on the CPU."""
    # For sequences of up to 256 tokens, as --config small has them, training uses the dense mask.
    flags = (f"--config small --seq_len 512 --global_batch 4 --micro_batch 4 --eval_scenes 4 --device {device} "
             f"--dtype {dtype} --steps {2 if bench.tiny else 5} --out {device}_{dtype}")
    subprocess.run(PRETRAIN + flags.split(), check=True)
    log = f"{device}_{dtype}/small/pretrain/log.jsonl"
    losses = [line["loss"] for line in read_lines(log) if "loss" in line]
    wanted = losses if device == "cpu" else bench.known("five steps, cpu fp32", "losses")
    error = off(torch.tensor(losses), torch.tensor(wanted))
    bench.say(what, ok=error < (1e-4 if dtype == "fp32" else 1e-3), losses=losses, off=error)


def part_correct(bench, what):
    for name in ("qwen3", "olmo3"):
        for case in ("image", "multi_image", "video"):
            bench.attempt(f"golden {name} {case}", golden, name, case)
    for sizes in ((8, 8, 64, torch.float32), (16, 16, 128, torch.bfloat16), (32, 8, 128, torch.bfloat16)):
        bench.attempt("mask of training, {}/{} heads of {}, {}".format(*sizes), masks_agree, *sizes)
    for run in ("cpu fp32", "cuda fp32", "cuda bf16") if bench.cuda else ("cpu fp32",):
        bench.attempt(f"five steps, {run}", five_steps, *run.split())


def make_step(bench, cfg, compile, recompute):
    """A step of pretrain.train: step(batch) trains on it and returns the ms of each phase."""
    torch._dynamo.reset()  # what was compiled before would count against the compiler's limit
    model = random_model(bench).train()
    model.residual_dropout, model.response_dropout = cfg.residual_dropout, cfg.response_dropout
    flex.install(model)
    distributed.shard_model(model, distributed.World(bench.device), compile, recompute, not bench.tiny)
    optimizers, _ = pretrain.make_optimizers(model, cfg)
    marks = []  # on the device's time line: (end of a phase, event)

    def mark(phase):
        event = time.perf_counter() if bench.tiny else torch.cuda.Event(enable_timing=True)
        if not bench.tiny:
            event.record()
        marks.append((phase, event))

    def watch(module, forward, backward):
        def hook(module, inputs, output):
            mark(forward)
            output.register_hook(lambda gradient: mark(backward))
        module.register_forward_hook(hook)
    watch(model.vision_backbone.image_vit, "forward ViT", "backward connector")
    watch(model.vision_backbone, "forward connector", "backward decoder")
    watch(model.transformer, "forward decoder", "backward head")

    def step(batch):
        marks.clear()
        mark("begin")
        weight = float(batch["weights"].sum())
        batch = pretrain.on_device(model, batch, bench.device)
        mark("copy to device")
        with torch.autocast(bench.device, torch.bfloat16, enabled=not bench.tiny):
            loss = model(**batch, z_loss=cfg.z_loss) / weight
        mark("head and loss")
        loss.backward()
        mark("backward ViT")
        assert math.isfinite(float(loss.detach())), "the loss is not a number"
        for named in model.parts().values():
            float(torch.nn.utils.clip_grad_norm_([p for _, p in named], cfg.clip))
        mark("clip")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mark("optimizer")
        if not bench.tiny:
            torch.cuda.synchronize()  # until then the events have no time
        return {phase: (end - begin) * 1e3 if bench.tiny else begin.elapsed_time(end)
                for (_, begin), (phase, end) in zip(marks, marks[1:])}
    return step


def profile(bench, what, do):
    """How busy the device is in do(), and the kernels that take most of its time: [[ms, calls, name]]."""
    with torch.profiler.profile(acc_events=True) as profiler:
        began = time.perf_counter()
        do()
        wall_ms = (time.perf_counter() - began) * 1e3
    spans = ("Optimizer.", "ProfilerStep", "##", "Torch-Compiled", "Compiled")  # around kernels, not kernels
    kernels = []
    for row in profiler.key_averages():
        if ("CPU" if bench.tiny else "CUDA") in str(row.device_type) and not row.key.startswith(spans):
            microseconds = row.self_cpu_time_total if bench.tiny else row.self_device_time_total
            kernels.append([round(microseconds / 1e3, 2), row.count, " ".join(row.key.split())[:80]])
    busy_ms = sum(ms for ms, _, _ in kernels)
    bench.say(what, wall_ms=wall_ms, busy_share=busy_ms / wall_ms, top=sorted(kernels, reverse=True)[:8])


def time_steps(bench, what, compile, recompute, batch, *others):
    """Steps on a batch and where their ms go, with a step on each of the others in between."""
    cfg = pretrain.parse(pretrain.Config(), pretrain.PRESETS, ["--config", bench.config, "--data", "none.jsonl"])
    empty = empty_model(bench.config)
    optimizers = pretrain.make_optimizers(empty, cfg)[0]
    shape = dict(rows=len(batch["tokens"]), tokens=batch["tokens"].shape[1], crops=len(batch["crops"]),
                 windows=tuple(batch["pool"].shape), learned=int((batch["weights"] > 0).sum()))
    forecast = sum(budget.memory(empty, optimizers, shape, not bench.tiny, recompute).values()) / 2 ** 30
    if not bench.tiny and forecast > 1.1 * torch.cuda.mem_get_info()[1] / 2 ** 30:
        return bench.say(what, skipped=f"the forecast is {forecast:.0f} GB, more than the card has")
    step = make_step(bench, cfg, compile, recompute)
    steps = [step(batch) for _ in range(5)][2:]  # the first two are the warm-up
    ms = float(np.median([sum(phases.values()) for phases in steps]))
    tflops = budget.step_flops(batch, bench.cfg, ()) / ms / 1e9
    bench.say(what, ms=ms, tokens_per_s=int((batch["example"] > 0).sum()) / ms * 1e3, tflops=tflops,
              of_matmul=tflops / bench.known("matmul bf16", "tflops"),
              mfu=tflops * 1e12 / (budget.peak_flops(bench.device, True) or math.nan), forecast_gb=forecast,
              peak_gb=budget.peak_memory(bench.device) / 2 ** 30, crops=len(batch["crops"]))
    medians = {phase: np.median([phases[phase] for phases in steps]) for phase in steps[0]}  # np.float64 is a float
    bench.say(f"{what}: where the ms go", **medians)
    for i, other in enumerate(others, 1):
        ms = sum(step(other).values())
        bench.say(f"{what}: other images {i}", ms=ms, crops=len(other["crops"]),
                  graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"])
    profile(bench, f"{what}: kernels", lambda: step(batch))


def part_speed(bench, what):
    seq_len, tiles, n_batches = (512, 0, 2) if bench.tiny else (4096, 8, 5)
    compile = bench.part == "compiled"
    for sequences, recompute in [(1, True)] if bench.tiny else [(4, True), (1, False), (2, False)]:
        batches = photo_batches(bench.cfg, seq_len, tiles, sequences, n_batches if compile and recompute else 1)
        name = f"{sequences} x {seq_len} tokens, recompute {recompute}, compile {compile}"
        bench.attempt(name, time_steps, compile, recompute, *batches)


def part_long(bench, what):
    frames, seq_len = (6, 1024) if bench.tiny else (384, 36864)
    plans = budget.long_video(planner_for(bench.cfg, seq_len, crops=frames))
    batch = collate([decode(plans, bench.cfg, seq_len, noise)])
    for compile in [False] if bench.tiny else [False, True]:
        bench.attempt(f"{seq_len} tokens, {frames} frames, compile {compile}", time_steps, compile, True, batch)


def part_decode(bench, what):
    """An answer about a video, with weights in fp32, as sample.py has them, and in bf16."""
    frames, n = (4, 8) if bench.tiny else (46, 128)
    video = dict(video="none.mp4", duration=(frames - 1) / 2, annotations=[])
    plan = planner_for(bench.cfg, 4096, crops=frames).question(video, ".", [dict(role="user", content="What?")])
    batch = to_device(collate([decode([plan], bench.cfg, plan.n_tokens, noise)]), bench.device)
    model = random_model(bench).eval()
    # A token takes all weights of the decoder and the head, and the keys and values of all tokens before it.
    numbers = sum(p.numel() for p in model.transformer.blocks.parameters()) + model.lm_head.weight.numel()
    numbers += 2 * bench.cfg.layers * bench.cfg.kv_heads * bench.cfg.head_dim * (plan.n_tokens + n // 2)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        times = []
        for ids in model.generate(batch["tokens"], batch["crops"], batch["pool"], n, pos=batch["pos"]):
            int(ids)  # waits for the device
            times.append(time.perf_counter())
        ms = (times[-1] - times[3]) / (n - 4) * 1e3  # the first four are the warm-up
        floor_ms = numbers * dtype.itemsize / bench.known("copy on the device", "gb_per_s") / 1e6
        bench.say(f"answer, {dtype}", tokens_per_s=1e3 / ms, ms=ms, floor_ms=floor_ms, of_bandwidth=floor_ms / ms)


def part_files(bench, what):
    n_photos, n_clips, seconds = (8, 2, 2) if bench.tiny else (60, 60, 20)
    records = [photo(i) for i in range(n_photos)]
    for record in records:
        Image.effect_noise((record["width"], record["height"]), 20).convert("RGB").save(record["image"])
    texture = Image.effect_noise((640, 360), 50).convert("RGB")
    with av.open("clip.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=30, width=640, height=360, options={"preset": "ultrafast"})
        for k in range(30 * seconds):
            container.mux(stream.encode(av.VideoFrame.from_image(ImageChops.offset(texture, 3 * k, 0))))
        container.mux(stream.encode())
    caption = dict(task="video_caption", answer="a thing moves past a wall " * 20)
    records += [dict(id=f"clip {i}", video="clip.mp4", annotations=[caption]) for i in range(n_clips)]
    with open("media.jsonl", "w") as f:
        f.writelines(json.dumps(record) + "\n" for record in records)
    n_steps, flags = (3, "--global_batch 2 --seq_len 512") if bench.tiny else (20, "--global_batch 8 --workers 8")
    # The last step would write a checkpoint, of 23 GB for the 1B model: the run is stopped before.
    flags += f" --config {bench.config} --device {bench.device} --data media.jsonl --steps 10000 --save_every 10000"
    child = subprocess.Popen(PRETRAIN + flags.split())
    steps = []
    while child.poll() is None and time.time() < bench.until - 5 and len(steps) < n_steps:
        time.sleep(0.5)
        steps = read_lines(os.path.join("out", bench.config, "pretrain", "log.jsonl"))
    child.kill()
    assert steps, "no step in time; log.txt has what pretrain.py printed"
    late = steps[len(steps) // 4:]  # the first steps wait for the workers to start
    keys = ("wait", "tokens_per_s", "crops_per_s", "fill", "mfu", "memory_gb")
    medians = {key: np.median([step.get(key, math.nan) for step in late]) for key in keys}
    bench.say("training from files", steps=len(steps), **medians)


def part_env(bench, what):
    bench.say("software", python=sys.version.split()[0], torch=torch.__version__, av=av.__version__)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        n = 256 if bench.tiny else 8192 if bench.cuda else 1024
        a, b = torch.randn(2, n, n, device=bench.device).to(dtype)
        seconds = Timer("a @ b", globals=dict(a=a, b=b)).blocked_autorange().median
        bench.say(f"matmul {name}", n=n, ms=seconds * 1e3, tflops=2 * n ** 3 / seconds / 1e12)
    n = 2 ** 20 if bench.tiny else 2 ** 30 if bench.cuda else 2 ** 28
    x = torch.randint(0, 256, (n,), dtype=torch.uint8, device=bench.device)
    seconds = Timer("y.copy_(x)", globals=dict(x=x, y=torch.empty_like(x))).blocked_autorange().median
    bench.say("copy on the device", gb_per_s=2 * len(x) / seconds / 1e9)  # read and write


# ---- data: what the workers do, on one core ------------------------------------------------------------------------

def milliseconds(do):
    return Timer("do()", globals=dict(do=do)).blocked_autorange().median * 1e3  # with one thread


def scenery(width, height):
    """An image whose JPEG takes as long to decode as a photo's: coarse noise and a little fine noise."""
    bands = []
    for _ in range(3):
        coarse = Image.effect_noise((width // 16, height // 16), 100).resize((width, height), Image.BICUBIC)
        bands.append(Image.blend(coarse, Image.effect_noise((width, height), 20), 0.25))
    return Image.merge("RGB", bands)


def image_speed(bench, what, width, height):
    """JPEG to crops; Pillow's decoding alone; draft mode, which decodes at a fraction of the size, and what it changes;
    the published processor, if transformers and torchvision are installed."""
    path = f"{width}x{height}.jpg"
    scenery(width, height).save(path, quality=85)
    layout = media.image_layout(width, height, 27, 14, 8)

    def in_draft():
        with Image.open(path) as image:
            image.draft("RGB", (378, 378))
            return media.image_crops(np.array(image), 27, 14, (0, 0))

    def published():
        return processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
    try:
        from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor
        processor = Molmo2ImageProcessor()
        published_ms = milliseconds(published)
    except Exception:  # without torchvision it is a TypeError
        published_ms = math.nan
    ms = milliseconds(lambda: media.load_crops(path, layout, 27, 14))
    low = media.image_crops(media.load_image(path), 27, 14, (0, 0))
    low_ms = milliseconds(lambda: media.image_crops(media.load_image(path), 27, 14, (0, 0)))
    bench.say(what, ms=ms, images_per_s=1e3 / ms, crops=layout.n_crops, ms_per_crop=ms / layout.n_crops,
              pillow_ms=milliseconds(lambda: Image.open(path).load()), published_ms=published_ms,
              low_res_alone_ms=low_ms, draft_ms=milliseconds(in_draft),
              draft_off=int(np.abs(low.astype(int) - in_draft()).max()))


def video_speed(bench, what, width, height, seconds, gop):
    """The frames of a video of 30 a second as crops, at 2 a second, against decoding all of them. gop: frames between
    two key frames."""
    scene = scenery(width, height)
    with av.open("video.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=30, width=width, height=height,
                                      options={"preset": "veryfast", "g": str(gop)})
        for k in range(30 * seconds):
            container.mux(stream.encode(av.VideoFrame.from_image(ImageChops.offset(scene, 3 * k, k))))
        container.mux(stream.encode())
    times = media.sample_times(media.video_duration("video.mp4"), 128)
    layout = media.Layout([], media.frame_layout(27), len(times), times=tuple(times))
    to_crops = lambda frame: media.image_crops(frame.to_ndarray(format="rgb24", threads=1), 27, 14, (0, 0))
    all_frames = lambda: np.concatenate(media.load_frames_in_turn("video.mp4", times, to_crops))
    ours = lambda: media.load_crops("video.mp4", layout, 27, 14)
    ms = milliseconds(ours)
    bench.say(what, ok=np.array_equal(ours(), all_frames()), ms_per_frame=ms / len(times),
              frames_per_s=len(times) / ms * 1e3, frames=len(times), ms=ms,
              decoding_ms=milliseconds(lambda: media.load_frames("video.mp4", times, lambda rgb: None)),
              all_frames_ms=milliseconds(all_frames))


def planning_speed(bench, what, record, known):
    """A record to a plan, with what is known of its media in the record, and where their headers have to be read."""
    planner = planner_for(PRESETS["4b"], 16384, tiles=8, crops=128)
    plan = lambda record: planner.plan(json.loads(json.dumps(record)), ".", random.Random(0))
    bench.say(what, ms=milliseconds(lambda: plan(record | known)), headers_ms=milliseconds(lambda: plan(record)),
              tokens=plan(record)[0][0].n_tokens)


def part_data(bench, what):
    images, video = [(800, 534), (1800, 1200)], (1280, 720, 20, 30)
    if bench.tiny:
        images, video = [(160, 120)], (160, 96, 2, 30)
    for width, height in images:
        bench.attempt(f"image of {width}x{height}", image_speed, width, height)
    bench.attempt("video of {}x{}, {} s, a key frame every {}".format(*video), video_speed, *video)
    caption = dict(photo(0), image=f"{width}x{height}.jpg")
    size = dict(width=caption.pop("width"), height=caption.pop("height"))
    bench.attempt("planning a photo, 2 annotations", planning_speed, caption, size)
    questions = [dict(task="video_qa", prompt="where is the thing that moves " * 3, answer="at the wall")] * 6
    bench.attempt("planning a video, 6 annotations", planning_speed, dict(video="video.mp4", annotations=questions),
                  dict(duration=float(video[2])))


# ---- beside transformers ------------------------------------------------------------------------------------------

def take_turns(ours, other, rounds, until):
    """A B A B, so that what disturbs the machine disturbs both. Returns (figures, last result of ours, of the other).
    The figures are medians, that of the ratios among them. A round that would not end before `until` does not begin."""
    times = []  # [ms of ours, of the other]; the first ones are the warm-up, and one round has to be
    while len(times) < 2 or len(times) <= rounds and time.time() + 2e-3 * sum(times[-1]) < until:
        times.append([])
        results = []
        for do in (ours, other):
            began = time.perf_counter()
            results.append(do())  # numbers: they are on the CPU once the device has done all before
            times[-1].append((time.perf_counter() - began) * 1e3)
    ms, other_ms = np.array(times[1:]).T
    ratios = ms / other_ms
    figures = dict(ratio=np.median(ratios), lowest=ratios.min(), highest=ratios.max(), ms=np.median(ms),
                   other_ms=np.median(other_ms))
    return figures, *results


def train_on(bench, model, **batch):
    """Forward and backward: the loss."""
    model.train().zero_grad(set_to_none=True)
    with torch.autocast(bench.device, torch.bfloat16, enabled=bench.cuda):
        output = model(**batch)
    loss = output if torch.is_tensor(output) else output.loss  # the latter is transformers'
    loss.backward()
    return float(loss.detach())


SIDE_BY_SIDE = {  # name: (model, tokens of a row)
    "small": (replace(PRESETS["small"], point_format="released"), 256),
    "85m": (ModelConfig(layers=8, width=512, heads=8, kv_heads=8, head_dim=64, mlp=1536, vocab=50304, norm_after=False,
                        qk_norm="head", crop=126, vit_width=256, vit_heads=4, vit_head_dim=64, vit_mlp=1024,
                        vit_features=(5, 2), point_format="released"), 512)}


def image_rows(bench, cfg, n, seq_len):
    """A batch of n rows, for us and for transformers: an image, then random ids. The last quarter is learned."""
    trunk, media = planner_for(cfg, seq_len).trunk(photo(0), ".")
    ids = np.random.default_rng(0).integers(10, cfg.vocab - 10, (n, seq_len + 1 - len(trunk)))
    pos = np.arange(seq_len)
    learned = ((pos >= seq_len * 3 // 4) & (pos < seq_len - 1)).astype(np.float32)  # there the last id has no target
    rows = [np.concatenate([trunk, text]) for text in ids]
    plans = [Plan(row[:-1], row[1:], learned / learned.sum() / n, pos, np.zeros_like(pos), media) for row in rows]
    batch = collate([decode([plan], cfg, seq_len, noise) for plan in plans])
    tokens = batch["tokens"]
    labels = torch.where(batch["weights"] > 0, batch["targets"], -100).roll(1, 1)  # here targets are shifted before
    k = math.isqrt(len(media[0][1].pool))  # k x k windows
    theirs = dict(input_ids=tokens, labels=labels, attention_mask=torch.ones_like(tokens),
                  mm_token_type_ids=is_vision(tokens, cfg.vocab).long(), image_token_pooling=batch["pool"],
                  pixel_values=batch["crops"] / 127.5 - 1, image_grids=torch.tensor([[0, 0, k, k]] * n),
                  image_num_crops=torch.ones(n, dtype=torch.long))
    return to_device(batch, bench.device), to_device(theirs, bench.device)


def beside_transformers(bench, what, reference, cfg, seq_len):
    """An answer and a step with the same weights and inputs as `reference`, transformers' class. On CUDA in bf16."""
    model = random_model(bench, cfg)
    model.save_pretrained("both")
    dtype = torch.bfloat16 if bench.cuda else torch.float32
    other = reference.from_pretrained("both", attn_implementation="sdpa", dtype=dtype).to(bench.device)
    batch, inputs = image_rows(bench, cfg, 1, seq_len // 2)
    del inputs["labels"]
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    n = 8 if bench.tiny else 64
    fixed = dict(max_new_tokens=n, min_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.to(dtype).eval()
    other.eval()
    our_answer = lambda: torch.cat(list(model.generate(batch["tokens"], batch["crops"], batch["pool"], n))).tolist()
    their_answer = lambda: other.generate(**inputs, **fixed)[0, -n:].tolist()
    figures, ids, wanted = take_turns(our_answer, their_answer, 1 if bench.tiny else 5, bench.until)
    same_ids = sum(a == b for a, b in zip(ids, wanted))
    bench.say(f"{what}: answer of {n} tokens", ok=same_ids == n or bench.cuda, **figures, same_ids=same_ids)

    torch._dynamo.reset()  # a model before may have been compiled
    other.float()
    flex.install(model.float())
    distributed.shard_model(model, distributed.World(bench.device), bench.cuda, False, bench.cuda)
    batch, inputs = image_rows(bench, cfg, 4, seq_len)
    batch = model.prepare(**batch)
    our_step = lambda: train_on(bench, model, **batch)
    their_step = lambda: train_on(bench, other, **inputs)
    figures, loss, wanted = take_turns(our_step, their_step, 1 if bench.tiny else 9, bench.until)
    limit = 1e-2 if bench.cuda else 1e-5
    bench.say(f"{what}: training step, {bench.device}", ok=abs(loss / wanted - 1) < limit, **figures, loss=loss,
              wanted=wanted, compiled=bench.cuda)


def part_transformers(bench, what):
    try:
        from transformers import Molmo2ForConditionalGeneration, __version__
    except ImportError as error:
        return bench.say(what, skipped=f"no transformers 5 with Molmo2 is installed: {error}")
    if not bench.cuda:
        torch.set_num_threads(1)
    bench.say("software", transformers=__version__)
    for name in ["small"] if bench.tiny else SIDE_BY_SIDE:
        bench.attempt(name, beside_transformers, Molmo2ForConditionalGeneration, *SIDE_BY_SIDE[name])


# Stage 2 as published: a record's medium, its share of the draws in % (sft_rate_pct of tools/prepare/datasets.tsv), its
# annotations (per example, from the list of data sets in arXiv 2601.10611), and tokens of an answer. PixMo-Cap has 200
# words an image, Molmo2-Cap 924 a clip; the other lengths are guesses. An example has 3.5 annotations on average.
PUBLISHED = (
    ("image", 2.3, 1, 260),   # PixMo-Cap
    ("image", 16.5, 1, 16),   # PixMo-Clocks, PixMo-Count, PixMo-CapQA (1.4), TallyQA (1.9), PixMo-AskModelAnything
    ("image", 12.3, 8, 20),   # VQA v2 (5), PixMo-Points (9), CoSyn charts, documents, tables (9), FigureQA (13)
    ("image", 0.5, 125, 8),   # PlotQA
    ("images", 4.9, 1, 30),   # Molmo2-MultiImagePoint, NLVR2, Molmo2-MultiImageQA (1.6)
    ("images", 4.2, 12, 12),  # Molmo2-SynMultiImageQA (10), LLaVA-665k, several images (16)
    ("video", 13.6, 1, 300),  # tracks
    ("video", 23.4, 1, 30),   # Molmo2-VideoPoint (1.4), Kinetics, Moments in Time, Paxion, TVQA
    ("video", 3.4, 3, 400),   # Molmo2-Cap
    ("video", 9.7, 6, 12),    # Molmo2-AskModelAnything (3), Molmo2-VideoCapQA (5), NExT-QA (9), CinePile (33)
    ("text", 9.2, 1, 400))    # Tulu


def published_records(n, shorter):
    """n records of this mixture. Their texts, not their media, are so many times shorter."""
    # With clips of 30 s 3.8 examples fill 16,384 tokens, as published. None of these files is decoded; of several
    # images the planner reads the sizes.
    media = dict(image=dict(image="photo.jpg", width=800, height=600), images=dict(images=["photo.jpg"] * 2),
                 video=dict(video="none.mp4", duration=30), text={})
    Image.new("RGB", (800, 600)).save("photo.jpg")
    words = lambda tokens: " ".join(["red"] * math.ceil(tokens / shorter))
    records = []
    for medium, _, size, tokens in random.Random(0).choices(PUBLISHED, [row[1] for row in PUBLISHED], k=n):
        chat = [dict(role="user", content=words(16)), dict(role="assistant", content=words(tokens))]
        task = dict(image="image_qa", images="multi_image_qa", video="video_qa", text="text")[medium]
        records.append(dict(media[medium], annotations=[dict(task=task, messages=chat)] * size))
    return records


def alone(plan):
    """The annotations of a plan, each in a plan of its own, with the media."""
    plans = []
    for branch in range(1, plan.branch.max() + 1):
        kept = np.isin(plan.branch, (0, branch))
        names = ("tokens", "targets", "weights", "pos", "branch")
        plans.append(replace(plan, **{name: getattr(plan, name)[kept] for name in names}))
    return plans


def packing(bench, what, flags, model_cfg, n_sequences, n_rows, beside):
    """The same answers trained on twice: in message trees, packed, as in training; and each in a row of its own with
    its image, n_rows at a time, padded to the longest. beside: the line with the ratio to transformers."""
    cfg = pretrain.parse(pretrain.Config(), pretrain.PRESETS, flags)
    planner = planner_for(model_cfg, cfg.seq_len, cfg.tiles, cfg.max_crops)
    stream = Stream(pretrain.open_data(cfg)[0], planner, cfg.seed).sequences()
    sequences = [next(stream).plans for _ in range(n_sequences)]
    decoded = [decode(plans, model_cfg, cfg.seq_len, noise) for plans in sequences]
    trees = pretrain.make_batches(decoded, cfg.micro_batch, n_sequences, model_cfg, cfg.seq_len)
    singles = []
    for plan in sum(sequences, []):
        singles += alone(plan)
    random.Random(0).shuffle(singles)
    rows = []
    for i in range(0, len(singles), n_rows):
        plans = singles[i:i + n_rows]
        longest = max(plan.n_tokens for plan in plans)
        decoded = [decode([plan], model_cfg, longest, noise) for plan in plans]
        rows += pretrain.make_batches(decoded, n_rows, len(plans), model_cfg, longest)

    model = random_model(bench, model_cfg)
    flex.install(model)
    distributed.shard_model(model, distributed.World(bench.device), False, cfg.recompute, bench.cuda)
    mask = model.mask
    # On a card each length would compile FlexAttention again: there rows have the dense mask, as in transformers.
    row_mask = partial(Molmo2.mask, model) if bench.cuda else mask

    def train(batches, mask):
        model.mask = mask
        batches = [pretrain.on_device(model, batch, bench.device) for batch in batches]
        return sum(train_on(bench, model, **batch) for batch in batches)
    figures, loss, wanted = take_turns(lambda: train(trees, mask), lambda: train(rows, row_mask),
                                       1 if bench.tiny else 2, bench.until)
    gain = 1 / figures["ratio"]
    n_tokens = lambda batches: sum(batch["tokens"].numel() for batch in batches)
    bench.say(what, ok=abs(loss / wanted - 1) < (1e-2 if bench.cuda else 1e-4), gain=gain,
              beside_transformers=gain / bench.known(beside, "ratio"), answers_a_sequence=len(singles) / n_sequences,
              answers_per_s=len(singles) / figures["ms"] * 1e3, alone_per_s=len(singles) / figures["other_ms"] * 1e3,
              answers=len(singles), tokens=n_tokens(trees), tokens_alone=n_tokens(rows))


def part_packing(bench, what):
    if not bench.cuda:
        torch.set_num_threads(1)
    world = toy.write_world("toy", 60, 1, 20) if bench.tiny else toy.write_world(os.path.join(ROOT, toy.FOLDER))
    flags = ["--config", "small", "--data", *toy.paths(world, toy.IMAGES)]
    bench.attempt("toy world", packing, flags, PRESETS["small"], 2 if bench.tiny else 48, 32,
                  f"small: training step, {bench.device}")
    # On a card the published length of stage 2. On a CPU an eighth, for there an image has an eighth of the tokens; and
    # a ViT that takes a quarter of the work, as it does in the published runs.
    shorter = 32 if bench.tiny else 1 if bench.cuda else 8
    cfg = bench.cfg if bench.cuda else replace(bench.cfg, layers=4, width=256, heads=8, kv_heads=8, mlp=768, crop=126,
                                               patch=14, vit_width=64, vit_head_dim=16, vit_mlp=128)
    toy.write_lines("published.jsonl", published_records(400, shorter))
    flags = (f"--config {bench.config} --data published.jsonl --micro_batch 1 --seq_len {16384 // shorter} --tiles 8 "
             f"--max_crops {16 if bench.tiny else 128}")
    bench.attempt("published mixture", packing, flags.split(), cfg, 1 if bench.tiny else 12, 4,
                  f"85m: training step, {bench.device}")


PARTS = dict(env=part_env, correct=part_correct, speed=part_speed, compiled=part_speed, decode=part_decode,
             files=part_files, long=part_long, transformers=part_transformers, packing=part_packing, data=part_data)
ON_A_CPU = ("env", "correct", "transformers", "packing", "data")  # the others would take hours there


def run_part(part, until, out, tiny):
    """Run a part in a process and a folder of its own. Returns the exit status."""
    command = [sys.executable, "-m", "tools.bench", "--out", out, "--parts", part, "--until", str(until)]
    command += ["--cpu_rehearsal"] if tiny else []
    # Offline: what transformers reads is in a folder here.
    environment = dict(os.environ, HF_HUB_OFFLINE="1", PYTHONPATH=os.pathsep.join([ROOT, *sys.path]))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, open(f"{out}/log.txt", "a") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True,
                                   env=environment)
        try:
            return process.wait(until - time.time())
        except subprocess.TimeoutExpired:
            return "none, it was stopped at its time limit"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
                process.wait()


def main(argv=None):
    """Run the parts and print their figures. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.path.join("out", "bench"), help="folder for the figures [out/bench]")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="[all; without a card those for any machine]")
    parser.add_argument("--seconds", type=float, default=900, help="for all parts together [900]")
    parser.add_argument("--cpu_rehearsal", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of a part's process: when it will be stopped
    args = parser.parse_args(argv)
    out = os.path.abspath(args.out)
    bench = Bench(out, args.cpu_rehearsal, "", args.until)
    parts = args.parts or list(PARTS if bench.cuda or bench.tiny else ON_A_CPU)
    if args.until:
        bench.part, = parts
        bench.attempt(bench.part, PARTS[bench.part])
        return 0
    os.makedirs(out, exist_ok=True)
    n_lines_before, end = len(read_lines(bench.results)), time.time() + args.seconds
    for bench.part in parts:
        until = min(end, time.time() + (MOST if bench.cuda else 10 * MOST))
        if not (bench.cuda or bench.tiny or bench.part in ON_A_CPU):
            bench.say("part", skipped="no CUDA device found; --cpu_rehearsal tries this part with tiny sizes")
            continue
        if until - time.time() < LEAST:
            bench.say("part", skipped="no time left")
            continue
        status = run_part(bench.part, until, out, bench.tiny)
        if status != 0:
            bench.say("part", error=f"exit status {status}")
    lines = read_lines(bench.results)[n_lines_before:]
    for line in lines:
        figures = [f"{key} {value}" for key, value in line.items() if key not in ("part", "what", "machine")]
        print(f"{line['part']:13}{line['what']}: {'  '.join(figures)}"[:170])
    return int(any("error" in line or line.get("ok") is False for line in lines))


if __name__ == "__main__":
    sys.exit(main())
