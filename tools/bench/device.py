"""
What the device does: right numbers, and how fast. Parts env, correct, speed, compiled, decode, files and long.
"""
import json
import math
import os
import subprocess
import sys
import time

import av
import numpy as np
import torch
from PIL import Image, ImageChops
from torch.utils.benchmark import Timer

import pretrain
from data import collate, decode, to_device
from lib import budget, distributed, flex
from lib.weights import read_safetensors
from model import Molmo2, attend, dense_mask, empty_model, is_vision
from tools.bench.common import ROOT, noise, off, photo, photo_batches, planner_for, random_model, read_lines

PRETRAIN = [sys.executable, os.path.join(ROOT, "pretrain.py")]


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
        late = times[n // 2:]  # the first half is the warm-up
        ms = (late[-1] - late[0]) / (len(late) - 1) * 1e3
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
