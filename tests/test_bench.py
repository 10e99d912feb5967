"""tools/bench where there is no GPU: its parts run, and leave their figures."""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import pretrain
from data import Plan
from lib.records import parse_record
from model import Molmo2
from tools.bench import __main__ as bench, beside, common, device

STEP = ("ms", "tokens_per_s", "of_matmul", "forecast_gb", "peak_gb")
FIGURES = {  # part: {beginning of a line's name: figures that it must have}
    "env": {"matmul bf16": ("tflops",), "matmul fp32": ("tflops",), "copy on the device": ("gb_per_s",)},
    "correct": {"golden qwen3 video": ("ok", "fp32", "bf16"), "golden olmo3 image": ("ok", "fp32", "bf16"),
                "mask of training, 32/8 heads": ("ok", "out", "dq", "dk", "dv"), "five steps, cpu": ("ok", "losses")},
    "speed": {"1 x 512 tokens, recompute True, compile False": STEP},
    "compiled": {"1 x 512 tokens, recompute True, compile True": STEP},
    "decode": {"answer, torch.float32": ("tokens_per_s", "of_bandwidth"), "answer, torch.bfloat16": ("tokens_per_s",)},
    "files": {"training from files": ("wait", "tokens_per_s")},
    "long": {"1024 tokens": STEP},
    "transformers": {"small: training step": ("ok", "ratio"), "small: answer": ("ok", "ratio", "same_ids")},
    "packing": {"toy world": ("ok", "gain"), "published mixture": ("ok", "gain", "answers_per_s", "alone_per_s")},
    "data": {"image of 160x120": ("ms", "pillow_ms", "draft_off"), "video of 160x96": ("ok", "ms_per_frame"),
             "planning a photo": ("ms", "headers_ms"), "planning a video": ("ms", "headers_ms")}}


def lines_of(folder):
    with open(folder / "results.jsonl") as f:
        return [json.loads(line) for line in f]


@pytest.fixture
def one_thread():
    """Parts on a CPU set the number of threads: the next test has the old one again."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        bench.main(["--parts", "env", "sped"])
    assert e.value.code == 2 and "sped" in capsys.readouterr().err
    # Without time nothing is begun, and the figures say so.
    assert bench.main(["--cpu_rehearsal", "--seconds", "0", "--out", str(tmp_path / "new")]) == 0
    assert [line["part"] for line in lines_of(tmp_path / "new")] == list(FIGURES) == list(bench.PARTS)
    assert all("skipped" in line for line in lines_of(tmp_path / "new"))
    assert bench.main(["--cpu_rehearsal", "--seconds", "0", "--out", str(tmp_path / "new"), "--parts", "long"]) == 0
    assert len(lines_of(tmp_path / "new")) == len(FIGURES) + 1


def test_a_failure_costs_its_measurement_alone(tmp_path):
    run = common.Bench(str(tmp_path), True, "env", 1e12)
    run.attempt("broken", lambda bench, what: 1 / 0)
    run.attempt("whole", lambda bench, what: bench.say(what, ms=1.0, share=float("nan")))
    broken, whole = lines_of(tmp_path)
    assert broken["error"] == "ZeroDivisionError: division by zero"
    assert whole["ms"] == 1 and "share" not in whole and "error" not in whole
    assert run.known("whole", "ms") == 1 and run.known("other", "ms") != run.known("other", "ms")


def test_without_a_card_the_parts_for_any_machine_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--seconds", "0", "--out", str(tmp_path)]) == 0
    assert [line["part"] for line in lines_of(tmp_path)] == ["env", "correct", "transformers", "packing", "data"]
    for part in ("speed", "compiled", "decode", "files", "long"):  # asked for by name: the reason, and no failure
        assert bench.main(["--parts", part, "--out", str(tmp_path)]) == 0
        assert "no CUDA device" in lines_of(tmp_path)[-1]["skipped"]


def test_a_timed_step_copies_a_batch_as_training_does(tmp_path, monkeypatch):
    copied = []
    monkeypatch.setattr(pretrain, "prepared", lambda model, batch, device: copied.append(batch) or
                        model.prepare(**batch))
    run = common.Bench(str(tmp_path), True, "speed", 1e12)
    cfg = pretrain.parse(pretrain.Config(), pretrain.PRESETS, ["--config", "small", "--data", "none.jsonl"])
    batch, = common.photo_batches(run.cfg, 512, 0, 1, 1)
    phases = device.make_step(run, cfg, False, False)(batch)
    assert copied == [batch] and {"copy to device", "forward decoder", "backward head", "optimizer"} <= phases.keys()


def test_taking_turns(monkeypatch):
    """Medians of the rounds after the first; a round that would not end in time does not begin."""
    clock = iter([0, 9, 10, 11,  20, 22, 30, 34,  40, 43, 50, 54,  60, 61, 70, 74])  # begin and end of ours, the other
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    figures, ours, other = common.take_turns(lambda: "a", lambda: "b", 3, 1e12)
    assert (ours, other) == ("a", "b") and figures["ms"] == 2000 and figures["other_ms"] == 4000
    assert (figures["lowest"], figures["ratio"], figures["highest"]) == (0.25, 0.5, 0.75)
    clock = iter([0, 9, 10, 11,  20, 22, 30, 34])
    figures, *_ = common.take_turns(lambda: "a", lambda: "b", 3, common.time.time() + 11)  # the round took 6 s
    assert figures["ratio"] == 0.5


def test_an_annotation_alone():
    """Worked by hand: a trunk of three tokens with two branches, of two tokens and of one."""
    arrays = dict(tokens=[1, 2, 3, 10, 11, 20], targets=[2, 3, 10, 11, 9, 9], weights=[0, 0, 0, 0, 1, 2],
                  pos=[0, 1, 2, 3, 4, 3], branch=[0, 0, 0, 1, 1, 2])
    media = [("a.jpg", None)]
    first, second = beside.alone(Plan(**{name: np.array(x) for name, x in arrays.items()}, media=media))
    assert first.tokens.tolist() == [1, 2, 3, 10, 11] and second.tokens.tolist() == [1, 2, 3, 20]
    assert first.targets.tolist() == [2, 3, 10, 11, 9] and second.targets.tolist() == [2, 3, 10, 9]
    assert first.weights.tolist() == [0, 0, 0, 0, 1] and second.weights.tolist() == [0, 0, 0, 2]
    assert first.pos.tolist() == [0, 1, 2, 3, 4] and second.pos.tolist() == [0, 1, 2, 3]
    assert first.media == second.media == media


def test_the_published_mixture(tmp_path, monkeypatch):
    """Its records are valid, and have about as many annotations as published: 4 an example, 3.6 by the data sets."""
    monkeypatch.chdir(tmp_path)
    records = beside.published_records(2000, 8)
    for record in records[:200]:
        parse_record(json.dumps(record).encode())
    assert sum(share for _, share, _, _ in beside.PUBLISHED) == pytest.approx(100)
    assert 3 < np.mean([len(record["annotations"]) for record in records]) < 4.2
    videos = [record for record in records if "video" in record]
    assert 0.46 < len(videos) / len(records) < 0.54  # half of the published draws


def test_packing(tmp_path, monkeypatch, one_thread):
    """In trees and alone the same answers are learned, or the losses would differ; trees take fewer tokens."""
    monkeypatch.chdir(tmp_path)
    run = common.Bench(str(tmp_path), True, "packing", 1e12)
    run.say("small: training step, cpu", ratio=0.5)
    run.attempt("packing", beside.part_packing)
    _, toy_world, published = lines_of(tmp_path)
    for line in (toy_world, published):
        assert line["ok"] and line["answers"] > 5 and line["tokens"] < line["tokens_alone"]
        assert line["gain"] == pytest.approx(line["answers_per_s"] / line["alone_per_s"], rel=1e-3)
    assert toy_world["beside_transformers"] == pytest.approx(2 * toy_world["gain"], rel=1e-3)
    assert "beside_transformers" not in published  # nobody has measured that step


def test_without_transformers_its_part_says_so(tmp_path, monkeypatch, one_thread):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    common.Bench(str(tmp_path), True, "transformers", 1e12).attempt("transformers", beside.part_transformers)
    line, = lines_of(tmp_path)
    assert "transformers 5" in line["skipped"]


class Other(torch.nn.Module):
    """What transformers' class can do, written with this project's own logits, for where it is not installed."""

    @classmethod
    def from_pretrained(cls, folder, attn_implementation, dtype):
        other = cls()
        other.model = Molmo2.from_pretrained(folder).to(dtype)
        return other

    def logits(self, input_ids, pixel_values, image_token_pooling, **kw):
        assert kw["attention_mask"].all() and kw["image_num_crops"].tolist() == [1] * len(input_ids)
        rows, columns = kw["image_grids"].unbind(1)[2:]  # of the low-resolution crop; there are no others
        assert kw["image_grids"][:, :2].sum() == 0 and (rows * columns).sum() == len(image_token_pooling)
        return self.model(input_ids, pixel_values, image_token_pooling)

    def forward(self, labels, **inputs):
        logits = self.logits(**inputs)[:, :-1].flatten(0, 1)
        return SimpleNamespace(loss=F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100))

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, min_new_tokens, do_sample, eos_token_id, pad_token_id, **inputs):
        for _ in range(max_new_tokens):
            inputs["attention_mask"] = torch.ones_like(input_ids)
            new = self.logits(input_ids, **inputs)[:, -1].argmax(-1)
            input_ids = torch.cat([input_ids, new[:, None]], 1)
        return input_ids


@pytest.mark.parametrize("broken", [False, True])
def test_side_by_side(tmp_path, monkeypatch, broken):
    """The two get the same inputs: losses and ids agree with a plain forward pass. And they do not where weights do."""
    monkeypatch.chdir(tmp_path)
    load = Other.from_pretrained

    def damaged(*args, **kw):
        other = load(*args, **kw)
        torch.nn.init.normal_(other.model.lm_head.weight)
        return other
    if broken:
        monkeypatch.setattr(Other, "from_pretrained", damaged)
    run = common.Bench(str(tmp_path), True, "transformers", 1e12)
    run.attempt("small", beside.beside_transformers, Other, *beside.SIDE_BY_SIDE["small"])
    answer, step = lines_of(tmp_path)
    assert (answer["what"], step["what"]) == ("small: answer of 8 tokens", "small: training step, cpu")
    assert answer["ok"] is step["ok"] is not broken and (answer["same_ids"] == 8) is not broken
    assert step.keys() >= {"ratio", "lowest", "highest", "ms", "other_ms", "loss", "wanted", "compiled"}


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """All parts at tiny sizes: each leaves its figures, and none an error."""
    installed = dict(compiled=shutil.which("g++"), transformers=importlib.util.find_spec("transformers"))
    parts = [part for part in FIGURES if installed.get(part, True)]
    command = [sys.executable, "-m", "tools.bench", "--cpu_rehearsal", "--seconds", "3000", "--out", str(tmp_path)]
    done = subprocess.run(command + ["--parts", *parts], cwd=tmp_path, env=dict(os.environ, PYTHONPATH=ROOT),
                          capture_output=True, text=True)
    lines = lines_of(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [line for line in lines if "error" in line or "skipped" in line]
    for part in parts:
        for what, figures in FIGURES[part].items():
            line = next(line for line in lines if line["part"] == part and line["what"].startswith(what))
            assert line.keys() >= set(figures), line
        for line in lines:
            assert line["what"] in done.stdout
    for part in {"speed", "compiled", "long"} & set(parts):
        names = [line["what"].rpartition(": ")[2] for line in lines if line["part"] == part]
        assert {"where the ms go", "kernels"} <= set(names)
    if "compiled" in parts:
        assert any(line.get("graphs") for line in lines)
