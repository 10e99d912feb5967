"""tools/show: the page of a run says what its log says; the page of data shows first what cannot be used."""
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from conftest import QUICK, log_of, picture, run, video, words, write_lines
from PIL import Image

from lib.distributed import Log
from lib.errors import UserError
from pretrain import Config, PRESETS, parse
from tools import show
from lib.report import report_on, smooth, write_report

RNG = np.random.default_rng(0)


def write_run(folder, losses, state=None, more=(), samples=0):
    """A folder as training leaves it."""
    os.makedirs(folder / "samples")
    rows = []
    for step, loss in enumerate(losses, 1):
        rows.append(dict(step=step, loss=loss, lr=1e-4 * step, grad_norm=2 * loss, tokens_per_s=900.0 + step % 7,
                         wait=0.01, memory_gb=0.5, skipped=0, bad={}))
    write_lines(folder / "log.jsonl", [*rows, *more])
    for k in range(samples):
        Image.fromarray(RNG.integers(0, 255, (240, 240, 3), np.uint8)).save(folder / "samples" / f"step_{k:07d}.png")
    if state:
        os.makedirs(folder / "step_0000001" / "train_state")
        with open(folder / "step_0000001" / "train_state" / "state.json", "w") as f:
            json.dump(state, f)
        os.symlink("step_0000001", folder / "latest")
    return str(folder)


def page_of(*folders, out, defaults=Config()):
    write_report(folders, {"pretrain": defaults}, str(out))
    return out.read_text(encoding="utf-8")


def figure(page, title):
    return next(part for part in page.split("<figure>") if f"<figcaption>{title}" in part)


def values_of(figure, style):
    """The points of a line, read off as a person would: by the ticks of the axes. [(step, value)]"""
    number = lambda text: float(text.replace(",", ""))
    ticks = re.findall(r'd="M([\d.]+),20V190"/><text[^>]*>([^<]*)<', figure)
    levels = re.findall(r'd="M62,([\d.]+)H380"/><text[^>]*>([^<]*)<', figure)
    x0, x1 = (float(ticks[k][0]) for k in (0, -1))
    y0, y1 = (float(levels[k][0]) for k in (0, -1))
    step0, step1 = (number(ticks[k][1]) for k in (0, -1))
    low, high = (number(levels[k][1]) for k in (0, -1))
    points = []
    for point in re.search(rf'class="c0 ?{style}" d="M([^"]*)"', figure)[1].split(" L"):
        x, y = map(float, point.split(","))
        step = step0 + (x - x0) / (x1 - x0) * (step1 - step0)
        share = (y - y0) / (y1 - y0)
        value = low * (high / low) ** share if "log scale" in figure else low + share * (high - low)
        points.append((step, value))
    return points


# ---- the page of a run -------------------------------------------------------------------------------------

def test_values_read_off_the_curves_are_those_of_the_log(tmp_path):
    losses = (7 * np.exp(-np.arange(250) / 40) + RNG.uniform(0.02, 0.05, 250)).tolist()
    page = page_of(write_run(tmp_path / "run", losses), out=tmp_path / "page.html")
    loss = figure(page, "Loss")
    assert "log scale" in loss and "optimiser steps" in loss and "nats" in loss
    read = values_of(loss, "raw")
    assert [step for step, _ in read] == pytest.approx(range(1, 251), abs=0.02)
    assert [value for _, value in read] == pytest.approx(losses, rel=2e-3)
    assert f"from {losses[0]:.4g} at 1 to {losses[-1]:.4g} at 250 optimiser steps" in loss  # for who cannot see it
    rates = values_of(figure(page, "Learning rate"), "")  # linear, and equally far apart
    assert [value for _, value in rates] == pytest.approx([1e-4 * step for step in range(1, 251)], abs=5e-6)
    mean = values_of(loss, "")
    means = [np.mean(losses[max(k - 5, 0):k]) for k in range(1, 251)]
    assert [value for _, value in mean] == pytest.approx(means, rel=2e-3)


def test_a_hundred_thousand_steps_are_thinned_and_every_peak_stays(tmp_path):
    losses = RNG.uniform(1, 2, 100_000).tolist()
    losses[77_700] = 9.0
    losses[12_400] = 0.5
    folder = write_run(tmp_path / "run", losses, more=[dict(step=k, eval={f"score {n}": k / 1e5 for n in range(20)})
                                                       for k in range(1000, 100_001, 1000)])
    began = time.process_time()
    page = page_of(folder, out=tmp_path / "page.html")
    assert time.process_time() - began < 20 and len(page) < 3_000_000  # below 5 s where nothing else runs
    read = values_of(figure(page, "Loss"), "raw")
    assert len(read) < 1500
    values = [value for _, value in read]
    assert max(values) == pytest.approx(9, abs=0.01) and min(values) == pytest.approx(0.5, abs=0.01)
    assert read[int(np.argmax(values))][0] == pytest.approx(77_701, abs=10)
    assert read[0][0] == pytest.approx(1, abs=5) and read[-1][0] == pytest.approx(100_000, abs=5)


STATE = dict(
    step=40, failed={"points": {"failed to decode": 2}},
    fingerprint={"seed": 0, "dataset captions": "400 rows at 60.000000%, contents ab",
                 "dataset points": "50 rows at 40.000000%, contents c"},
    stream=dict(taken=dict(captions=70, points=30), bad={"points": {"malformed <JSON>": 3}}, skipped={}),
    config=dict(stage="pretrain", steps=50, data=["a.jsonl"], seed=0, freeze=[]))


def rows_of(page):
    """The cells of all tables."""
    return [[html.unescape(re.sub("<.*?>", "", cell)) for cell in re.split("<t[hd]>", row)[1:]]
            for row in re.findall(r"<tr>(.*?)(?=<tr>|</table>)", page, re.S)]


def test_mixture_configuration_and_what_was_left_out(tmp_path):
    folder = write_run(tmp_path / "a <b> run", [3.0, 2.0, 1.0], STATE)
    page = page_of(folder, out=tmp_path / "page.html")
    rows = rows_of(page)
    assert ["captions", "60.00%", "70.00%", "70", "0.17"] in rows
    assert ["points", "40.00%", "30.00%", "30", "0.60"] in rows
    assert ["points", "malformed <JSON>", "3"] in rows and ["points", "failed to decode", "2"] in rows
    assert ["steps", "50", "32000"] in rows and ["data", "a.jsonl", "none"] in rows
    assert ["seed", "0", ""] in rows and ["freeze", "none", ""] in rows  # as by default
    assert rows.index(["data", "a.jsonl", "none"]) < rows.index(["stage", "pretrain", ""])
    assert "<b>" not in page and "<JSON>" not in page
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(?!data:|#)""", page) and "http" not in page  # one file


def test_runs_over_each_other_and_a_log_that_is_cut(tmp_path):
    first = write_run(tmp_path / "first", [4.0, float("nan"), 2.0], more=[dict(step=3, eval=dict(hit=0.25, scenes=9))])
    second = write_run(tmp_path / "second", [3.0, 2.0, 1.0], more=[
        dict(step=0, eval=dict(hit=0.5)), dict(step=3, eval=dict(hit=0.75)), "[]", '{"step": 4, "lo'])
    page = page_of(first, second, out=tmp_path / "page.html")
    loss = figure(page, "Loss")
    assert [round(value, 2) for _, value in values_of(loss, "raw")] == [4.0, 2.0] and 'class="c1 raw"' in loss
    hit = figure(page, "eval hit")
    assert 'class="c0  dots"' in hit and "first eval hit from 0.25 at 3 to" in hit
    rows = rows_of(page)
    assert ["eval hit", "0.25", "0.5 \u2192 0.75"] in rows and ["loss", "2", "1"] in rows
    assert "scenes" not in page and "not there yet" in page
    empty = write_run(tmp_path / "empty", [])
    assert "empty" in page_of(empty, out=tmp_path / "page.html")  # before the first step


def test_smooth_is_a_mean_over_what_there_is():
    assert smooth([4.0, 2.0]).tolist() == [4.0, 2.0]
    values = RNG.uniform(0, 1, 150)
    assert smooth(values) == pytest.approx([values[max(k - 3, 0):k].mean() for k in range(1, 151)])


def test_many_pictures_are_spread_over_the_run_and_fit(tmp_path):
    folder = write_run(tmp_path / "run", [1.0], samples=60)
    page = page_of(folder, out=tmp_path / "page.html")
    shown = list(map(int, re.findall(r"<figcaption>step_(\d+)<", page)))
    assert len(page) < 2_000_000 and 10 < len(shown) < 60 and shown[-1] == 59 and shown == sorted(shown)
    assert f"{len(shown)} of 60 evaluations" in page and f'max="{len(shown) - 1}"' in page
    assert max(np.diff(shown)) - min(np.diff(shown)) <= 1


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium (Debian package chromium)")
def test_in_a_browser_one_picture_is_seen_and_no_script_fails(tmp_path):
    page = page_of(write_run(tmp_path / "run", [2.0, 1.0], STATE, samples=3), out=tmp_path / "page.html")
    look = "[...document.querySelectorAll('.samples figure')].map(figure => figure.offsetHeight > 99)"
    (tmp_path / "page.html").write_text(f"{page}<script>document.body.dataset.before = {look}\n"
                                        "const slider = document.querySelector('.samples input'); slider.value = 0\n"
                                        f"slider.oninput(); document.body.dataset.after = {look}</script>")
    seen = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         f"--user-data-dir={tmp_path}", f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120)
    assert 'data-before="false,false,true"' in seen.stdout and 'data-after="true,false,false"' in seen.stdout
    assert "CONSOLE" not in seen.stderr


# ---- the command, and training -----------------------------------------------------------------------------

def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["show", *map(str, args)])
    show.main()


def test_the_command_finds_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out"
    write_run(folder, [1.0, 2.0], STATE)
    (folder / "latest" / "COMPLETE").write_text("")
    for path in ("out", "out/", "out/log.jsonl", "out/latest", "out/step_0000001/"):
        command(monkeypatch, path)
        assert "out/report.html shows out" in capsys.readouterr().out
        os.remove("out/report.html")
    command(monkeypatch, "out", "out")
    assert "runs.html shows out, out" in capsys.readouterr().out
    write_lines("my.jsonl", [dict(annotations=[dict(task="text", prompt="?", answer="yes")])])
    with pytest.raises(SystemExit):
        command(monkeypatch, "out", "my.jsonl")
    assert "error: my.jsonl: not a run" in capsys.readouterr().err
    (folder / "latest" / "train_state" / "state.json").write_text("{")
    with pytest.raises(SystemExit):
        command(monkeypatch, "out")
    assert "state.json: not readable" in capsys.readouterr().err


def test_training_writes_the_page(tmp_path, world):
    flags = [*QUICK, "--data", world, "--steps", "3", "--eval_every", "2"]
    _, text = run(tmp_path, *flags)
    page = os.path.join("out", "small", "pretrain", "report.html")
    assert f"curves and samples in {page}" in text
    log = [row for row in log_of(tmp_path) if "loss" in row]
    cfg = parse(Config(), PRESETS, flags)
    for part in ("vit", "connector", "decoder"):  # before the warm-up has ended
        rates = [getattr(cfg, f"lr_{part}") * step / getattr(cfg, f"warmup_{part}") for step in (1, 2, 3)]
        assert [row[f"lr_{part}"] for row in log] == pytest.approx(rates)
    content = (tmp_path / page).read_text()
    assert figure(content, "Learning rates") and ["step", "3"] in rows_of(content) and "train_loss" in content
    assert "Mixture, after 3 steps" in content  # of the last checkpoint: the page is written once more after it
    _, text = run(tmp_path, *flags, "--no-report", "--out", "none")
    assert "report.html" not in text and not os.path.exists(tmp_path / "none/small/pretrain/report.html")


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    folder = write_run(tmp_path / "run", [1.0])
    os.mkdir(tmp_path / "run" / "report.html")
    report_on(folder, {})
    assert "report.html cannot be written: " in capsys.readouterr().err


def test_tensorboard_gets_the_numbers_or_is_asked_for(tmp_path, monkeypatch):
    written = []
    board = types.SimpleNamespace(add_scalar=lambda *args: written.append(args), flush=lambda: None)
    fake = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: written.append((folder, purge_step)) or board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    log = Log(str(tmp_path / "log.jsonl"), 0, to="tensorboard")
    log.write(step=1, loss=2.0, bad={})
    log.write(step=1, eval=dict(hit=0.5))
    assert written == [(str(tmp_path / "tensorboard"), 1), ("step", 1, 1), ("loss", 2.0, 1), ("hit", 0.5, 1)]
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    with pytest.raises(UserError, match="--log_to tensorboard: that package is not installed"):
        parse(Config(), PRESETS, ["--log_to", "tensorboard"])


# ---- the page of data --------------------------------------------------------------------------------------

def test_refused_records_come_first_and_videos_are_strips(tmp_path, monkeypatch, capsys):
    picture(tmp_path / "a.png", "red")
    video(tmp_path / "v.mp4")
    dot = dict(task="image_pointing", label="dot", points=[dict(x=0.5, y=0.5, id=0)])
    good = dict(image="a.png", annotations=[dot])
    film = dict(video="v.mp4", annotations=[dict(task="video_caption", answer="It moves.")])
    write_lines(tmp_path / "my.jsonl", [good, good, film, "{", dict(good, image="no <b>.png"), good,
                                        dict(annotations=[dict(task="text", prompt="?", answer=words(3000))])])
    command(monkeypatch, tmp_path / "my.jsonl", "--show", "3", "--out", tmp_path / "data.html")
    page = (tmp_path / "data.html").read_text()
    links = re.findall(r'<li><a href="#([^"]*)">[^<]*</a>: (<span class=bad>)?', page)
    assert [(int(where.rpartition(":")[2]), bool(bad)) for where, bad in links] == [
        (4, True), (5, True), (7, True), (1, False), (2, False), (3, False)]
    assert all(f'id="{where}"' in page for where, _ in links)
    assert page.count('<div class="strip">') == 1 and "<b>" not in page
    assert "of 7 records 4 can be used" in page and "all of it is left out" in page
    rows = rows_of(page)
    assert ["image", "3"] in rows and ["video", "1"] in rows and ["image_pointing", "3"] in rows
    assert ["points", "0", "1", "1", ""] in rows
    assert sum(int(row[2]) for row in rows if len(row) == 3 and " to " in row[0]) == 4  # of the histogram of tokens
