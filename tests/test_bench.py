"""tools/bench.py where there is no GPU: its parts run, and leave their figures."""
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from tools import bench

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
    "data": {"image of 160x120": ("ms", "pillow_ms", "draft_off"), "video of 160x96": ("ok", "ms_per_frame"),
             "planning a photo": ("ms", "headers_ms"), "planning a video": ("ms", "headers_ms")}}


def lines_of(folder):
    with open(folder / "results.jsonl") as f:
        return [json.loads(line) for line in f]


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
    run = bench.Bench(str(tmp_path), True, "env", 1e12)
    run.attempt("broken", lambda bench, what: 1 / 0)
    run.attempt("whole", lambda bench, what: bench.say(what, ms=1.0, share=float("nan")))
    broken, whole = lines_of(tmp_path)
    assert broken["error"] == "ZeroDivisionError: division by zero"
    assert whole["ms"] == 1 and "share" not in whole and "error" not in whole
    assert run.known("whole", "ms") == 1 and run.known("other", "ms") != run.known("other", "ms")


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """All parts at tiny sizes: each leaves its figures, and none an error."""
    parts = [part for part in FIGURES if part != "compiled" or shutil.which("g++")]
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
