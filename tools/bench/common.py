"""
What all parts of the benchmark share: a file for the figures, photos that do not exist, a random model, taking turns.
"""
import gc
import json
import math
import os
import random
import time
import traceback

import numpy as np
import torch

from data import Packer, Planner, collate, decode
from lib.text import SMALL_TOKENIZER, Tokenizer
from model import Molmo2, PRESETS

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
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
