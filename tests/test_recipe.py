"""The training loop against one written plainly: every number of the recipe does what its flag says, a stopped run
goes on as if it had not been stopped, and what is written while training goes on is the step it says."""
import dataclasses
import json
import math
import os
import shutil
import socket
import threading

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from conftest import SIZES, STYLES, picture, png, tiny_model, write_lines

import distributed
import model as M
import pretrain
from data import Dataset, Planner, Stream, collate, decode
from distributed import UserError
from model import Molmo2, ModelConfig
from points import SMALL_TOKENIZER, Tokenizer
from pretrain import Config

# No two of these are equal, and none is a default: a number that is ignored or taken for another one shows.
ODD = dict(config="small", seed=3, steps=5, global_batch=5, micro_batch=2, seq_len=176, tiles=2, max_crops=7, max_frames=3,
           lr_vit=3e-3, lr_connector=5e-3, lr_decoder=2e-3, warmup_vit=3, warmup_connector=2, warmup_decoder=4,
           lr_end=0.23, beta1=0.83, beta2=0.91, adam_eps=3e-4, clip=1.7, z_loss=0.013, residual_dropout=0.11,
           response_dropout=0.31, adam_share=0.37, token_weights="spec", mixture="sft", rebalance=("more=3",),
           save_every=2, eval_every=2, workers=0, device="cpu", dtype="fp32", max_bad=1.0)
MORE = [dict(annotations=[dict(task="text", prompt=f"{n} times?", answer="yes " * n)]) for n in (1, 31, 7)]


@pytest.fixture
def odd(tmp_path, world, monkeypatch):
    """odd(style, **changes): a Config of odd numbers that starts from a tiny model in which every weight is at work."""
    def make(style="olmo", **changes):
        monkeypatch.setitem(M.PRESETS, "small", ModelConfig(**SIZES, **STYLES[style]))
        begin = tmp_path / f"begin {style}"
        if not begin.exists():
            tiny_model(style).save_pretrained(begin)
            Tokenizer(SMALL_TOKENIZER, 1024).save(begin)
        more = write_lines(tmp_path / "more.jsonl", MORE)
        return Config(**ODD | dict(data=(world, more), eval_data=(world,), init_from=(str(begin),),
                                   out=str(tmp_path / "out")) | changes)
    return make


def train(cfg, stop=()):
    """One run: its folder."""
    return pretrain.train(cfg, Config(), stop)


def log_of(run, name="log.jsonl"):
    with open(os.path.join(run, name)) as f:
        return [json.loads(line) for line in f]


def weights_of(run, checkpoint="latest"):
    return dict(Molmo2.from_pretrained(os.path.join(run, checkpoint)).named_parameters())


def optimizer_of(folder):
    """What a checkpoint holds of the optimisers, {key: tensor}."""
    reader = dcp.FileSystemReader(os.path.join(folder, "train_state"))
    state = {k: torch.empty(t.size) for k, t in reader.read_metadata().state_dict_metadata.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


# ---- the loop, written plainly -----------------------------------------------------------------------------

def planner_of(cfg):
    return Planner(Tokenizer(SMALL_TOKENIZER, 1024), M.PRESETS["small"], 176, 2, cfg.token_weights, 3, 7)


def nll_of(model, batch, z_loss=0.0):
    """The summed weighted loss of a batch, from its logits."""
    logits = model(**{k: v for k, v in batch.items() if k != "targets"})
    each = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten() % 1024, reduction="none")
    return (batch["weights"].flatten() * (each + z_loss * logits.logsumexp(-1).flatten() ** 2)).sum()


def part_of(name):
    if "image_vit" in name:
        return "vit"
    return "connector" if "vision_backbone" in name or "new_embedding" in name else "decoder"


def orthogonal(g):
    """Newton and Schulz's iteration of Muon, in fp32."""
    x = g.T if len(g) > g.shape[1] else g
    x = x / x.norm()
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.775 * s + 2.0315 * s @ s) @ x
    return x.T if len(g) > g.shape[1] else x


def plain_training(cfg, ranks=1, left_out=()):
    """(the model after all steps, rows of a log). left_out: steps that are not applied."""
    model = Molmo2.from_pretrained(cfg.init_from[0]).train()
    sets = [Dataset("rows", [cfg.data[0]]), Dataset("more", [cfg.data[1]])]
    stream = Stream(list(zip(sets, (8 ** 0.5, 3 * 3 ** 0.5))), planner_of(cfg), 3).rows()
    asked = Stream([(sets[0], 1.0)], planner_of(cfg), 0)
    named = {n: p for n, p in model.named_parameters() if part_of(n) not in cfg.freeze
             and not ("embedding" in cfg.freeze and n == "transformer.wte.embedding")}
    moments, log, t = {n: [0.0, 0.0] for n in named}, [], 0
    for step in range(5):
        model.residual_dropout, model.response_dropout = cfg.residual_dropout, cfg.response_dropout
        rows = [decode(next(stream)[0], model.cfg, 176) for _ in range(5)]
        W, loss = float(sum(row["weights"].sum() for row, *_ in rows)), 0.0
        for rank in range(ranks):
            torch.manual_seed((3 * 1_000_003 + step) * ranks + rank)
            mine = rows[rank::ranks]
            for some in (mine[i:i + 2] for i in range(0, len(mine), 2)):
                part = nll_of(model, collate(some), cfg.z_loss) / W
                part.backward()
                loss += float(part)
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
        norms = {part: math.sqrt(sum(float(g.square().sum()) for n, g in grads.items() if part_of(n) == part))
                 for part in ("vit", "connector", "decoder")}
        t += step not in left_out
        for n, p in named.items() if step not in left_out else ():
            peak, warmup = {"vit": (3e-3, 3), "connector": (5e-3, 2), "decoder": (2e-3, 4)}[part_of(n)]
            turn = math.cos(math.pi * (step - warmup) / (5 - warmup))
            lr = peak * ((step + 1) / warmup if step < warmup else 0.23 + 0.77 * (1 + turn) / 2)
            g = grads[n] * min(1.0, cfg.clip / norms[part_of(n)])
            m, v = moments[n]
            matrix = p.ndim == 2 and not any(x in n for x in ("wte", "positional", "lm_head"))
            if cfg.optimizer == "muon" and matrix:
                m = 0.95 * m + 0.05 * g
                change = lr * 0.2 * max(p.shape) ** 0.5 * orthogonal(0.05 * g + 0.95 * m)
            else:
                m, v = 0.83 * m + 0.17 * g, 0.91 * v + 0.09 * g ** 2
                change = lr * (0.37 if cfg.optimizer == "muon" else 1) * (m / (1 - 0.83 ** t))
                change = change / ((v / (1 - 0.91 ** t)).sqrt() + 3e-4)
            moments[n] = [m, v]
            p.data -= change
        model.zero_grad()
        decoder = 2e-3 * ((step + 1) / 4 if step < 4 else 0.23 + 0.77)
        log.append(dict(loss=loss, norms=norms, lr=decoder, fill=sum(int((r["example"] > 0).sum())
                                                                     for r, *_ in rows) / 5 / 176))
        if step in (1, 3, 4):
            plans = [asked.plans("rows", k)[0] for k in range(8)]
            batches = [collate([decode([p], model.cfg, 176)]) for ps in plans for p in ps]
            model.residual_dropout = model.response_dropout = 0.0
            with torch.no_grad():
                log[-1]["eval"] = float(sum(nll_of(model, b) for b in batches) / sum(b["weights"].sum() for b in batches))
    return model, log


def same_training(run, cfg, **kw):
    """A run did what the plain loop does: weights, and what it logged."""
    model, want = plain_training(cfg, **kw)
    begin, got, log = weights_of(cfg.init_from[0], ""), weights_of(run), log_of(run)
    for n, p in model.named_parameters():
        moved = float((p - begin[n]).norm())
        off = float((got[n] - p).abs().max())
        fp32 = cfg.optimizer == "adamw" or p.ndim == 1 or any(x in n for x in ("wte", "positional", "lm_head"))
        assert off <= 1e-6 if fp32 else float((got[n] - p).norm()) <= 0.03 * moved, (n, off)
        frozen = part_of(n) in cfg.freeze or "embedding" in cfg.freeze and n == "transformer.wte.embedding"
        assert torch.equal(got[n], begin[n]) if frozen else moved > 1e-3, (n, moved)
    steps = [r for r in log if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    for r, w in zip(steps, want):
        assert r["loss"] == pytest.approx(w["loss"], rel=1e-5) and r["fill"] == pytest.approx(w["fill"], abs=1e-4)
        if math.isfinite(r["grad_norm"]):
            assert r["grad_norm"] == pytest.approx(math.hypot(*w["norms"].values()), rel=1e-4)
    evals = {r["step"]: r["eval"]["loss"] for r in log if "eval" in r}
    assert evals == pytest.approx({k + 1: w["eval"] for k, w in enumerate(want) if "eval" in w}, abs=2e-4)
    return steps, want


@pytest.mark.parametrize("style, changes", [
    ("olmo", dict(freeze=("embedding",), token_weights="released")), ("qwen", dict(optimizer="muon")),
    ("qwen", dict(freeze=("vit",))), ("olmo", dict(freeze=("connector", "decoder")))])
def test_every_number_of_the_recipe_is_obeyed(odd, style, changes):
    cfg = odd(style, **changes)
    steps, want = same_training(train(cfg), cfg)
    if cfg.optimizer == "adamw" and "decoder" not in cfg.freeze:
        assert [r["lr"] for r in steps] == pytest.approx([w["lr"] for w in want])
    norms = [n for w in want for n in w["norms"].values() if n]
    assert min(norms) < cfg.clip < max(norms)  # it bites, but not everywhere
