"""
The page of a run, or of several over each other. Training writes it at each evaluation.

    log.jsonl ─► curves, a table    samples/*.png ─► pictures in the page, under a slider
    state.json of the last checkpoint ─► the mixture, what was left out, the configuration
"""
import glob
import html
import json
import math
import os
import re
import sys
from typing import NamedTuple

import numpy as np
from PIL import Image

from lib.media import load_image
from lib.page import STYLE, Line, curves, image_tag, table
from lib.weights import read_json

PICTURES = 1_200_000  # characters that the sample pictures of a page may take

# (title, unit, whether the axis may be logarithmic, {field of log.jsonl: style}); raw: pale, with its mean over it
PANELS = [("Loss, and its mean over a fiftieth of the run", "nats per unit of loss weight", True, {"loss": "raw"}),
          ("Learning rates: vit solid, connector dashed, decoder dotted", "per step", False,
           {"lr_vit": "", "lr_connector": "line1", "lr_decoder": "line2"}),
          ("Learning rate", "per step", False, {"lr": ""}),
          ("Gradient norm, before clipping", "norm over all parts", True, {"grad_norm": "raw"}),
          ("Speed", "tokens per second", False, {"tokens_per_s": "raw"}),
          ("Waiting for data", "share of the time", False, {"wait": "raw"}),
          ("Memory", "GiB, the most so far", False, {"memory_gb": ""}),
          ("MFU", "share of the cards' peak", False, {"mfu": "raw"})]
SLIDER = """<script>for (const box of document.querySelectorAll(".samples")) {
  const input = box.querySelector("input"), figures = box.querySelectorAll("figure")
  input.oninput = () => figures.forEach((figure, i) => {figure.hidden = i != input.value})
  input.oninput()}</script>"""


class Run(NamedTuple):
    folder: str
    series: dict  # field of log.jsonl, or "eval NAME" -> ([steps], [finite values])
    state: dict   # state.json of the last checkpoint; empty without one


def run_folder(path):
    """The folder of a run, given as that, as its log.jsonl or as one of its checkpoints; None if it is no run."""
    is_inside = os.path.basename(path) == "log.jsonl" or os.path.exists(os.path.join(path, "COMPLETE"))
    folder = os.path.dirname(os.path.normpath(path)) if is_inside else path
    return folder if os.path.isfile(os.path.join(folder, "log.jsonl")) else None


def read_run(folder):
    series = {}
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                entry = json.loads(line)
                scores = entry.get("eval", {})
                entry |= {f"eval {name}": scores[name] for name in scores if name != "scenes"}  # which is their number
                step = int(entry["step"])
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # the last line of a killed run may be cut
            for name, value in entry.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    steps, values = series.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(value)
    if any(name.startswith("lr_") for name in series):
        series.pop("lr", None)  # is one of them
    path = os.path.join(folder, "latest", "train_state", "state.json")
    return Run(folder, series, read_json(path) if os.path.exists(path) else {})


def smooth(values):
    """At each step the mean of the fiftieth of all steps that ends there."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - max(len(values) // 50, 1), 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


# ---- the parts of the page ---------------------------------------------------------------------------------

def numbers_html(runs):
    """What the log ends with, a column for each run: the means of what is noisy; of evaluations the first value too."""
    noisy = [field for _, _, _, fields in PANELS for field, style in fields.items() if style == "raw"]
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.series):
        row = [name]
        for run in runs:
            _, values = run.series.get(name, ((), ()))
            shown = [f"{value:,.4g}" for value in values[:1] if name.startswith("eval ") and len(values) > 1]
            shown += [f"{value:,.4g}" for value in (smooth(values) if name in noisy else values)[-1:]]
            row.append(" \u2192 ".join(shown))
        rows.append(row)
    return table(("at the end of", *[run.folder for run in runs]), rows)


def curves_html(runs):
    """The curves of the log and of the evaluations: a colour for each run."""
    names = dict.fromkeys(name for run in runs for name in run.series if name.startswith("eval "))
    out = []
    for title, unit, log, fields in PANELS + [(name, "score", False, {name: ""}) for name in names]:
        lines = []
        for k, run in enumerate(runs):
            for field, style in fields.items():
                if field in run.series:
                    line = Line(f"{run.folder} {field}", f"c{k % 4} {style}", *run.series[field])
                    lines.append(line)
                    if style == "raw":
                        lines.append(line._replace(name=f"{line.name}, mean", style=f"c{k % 4}", y=smooth(line.y)))
        if any(len(line.x) > 1 for line in lines):
            out.append(curves(title, unit, lines, log))
    return f'<div class="plots">{"".join(out)}</div>'


def samples_html(run, room):
    """The pictures of the evaluations under a slider; of many as many, evenly spread, as `room` characters hold."""
    show = lambda path: image_tag(Image.fromarray(load_image(path)), os.path.basename(path).removesuffix(".png"))
    paths = sorted(glob.glob(os.path.join(glob.escape(run.folder), "samples", "*.png")))
    if not paths:
        return ""
    n = min(len(paths), max(room // len(show(paths[-1])), 1))
    chosen = sorted(np.linspace(len(paths) - 1, 0, n).astype(int))  # the last is always one
    hidden = " hidden" if n == 1 else ""
    return (f'<h3>Answers about held-out images: {n} of {len(paths)} evaluations</h3><div class="samples">'
            f'<input type="range" aria-label="evaluation" max="{n - 1}" value="{n - 1}"{hidden}><br>'
            f'{"".join(show(paths[k]) for k in chosen)}</div>')


def mixture_html(run):
    """The mixture as drawn against as planned, and what was left out."""
    stream = run.state["stream"]
    draws = max(sum(stream["taken"].values()), 1)
    rows = []
    for name, n in stream["taken"].items():
        planned = re.match(r"(\d+) rows at ([\d.]+)%", run.state["fingerprint"][f"dataset {name}"])
        rows.append((name, f"{float(planned[2]):.2f}%", f"{n / draws:.2%}", f"{n:,}", f"{n / int(planned[1]):.2f}"))
    left_out = []
    for counts in (stream["bad"], run.state["failed"], stream["skipped"]):
        for name, reasons in counts.items():
            left_out += [(name, reason, f"{n:,}") for reason, n in reasons.items()]
    return (f"<h3>Mixture, after {run.state['step']:,} steps</h3>"
            + table(("dataset", "planned", "drawn", "records", "epochs"), rows)
            + "<h3>Not used, left out or moved</h3>"
            + table(("dataset", "reason", "times"), left_out or [("nothing", "", "")]))


def config_html(run, defaults):
    """The configuration, first what differs from the defaults of its stage."""
    text = lambda value: (" ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)) or "none"
    rows = []
    for name, value in run.state["config"].items():
        default = text(getattr(defaults, name, value))
        rows.append((name, text(value), default if default != text(value) else ""))
    rows.sort(key=lambda row: not row[2])
    return "<h3>Configuration</h3>" + table(("flag", "value", "default, if it differs"), rows)


def write_report(folders, defaults, out):
    """Write the page of some runs. defaults: {stage: Config}. UserError if a file cannot be read."""
    runs = [read_run(folder) for folder in folders]
    names = [f'<span class="c{k % 4}">\u25a0 {html.escape(folder)}</span>' for k, folder in enumerate(folders)]
    page = [STYLE, f"<title>{html.escape(', '.join(folders))}</title><h1>{'<br>'.join(names)}</h1>",
            curves_html(runs), "<h2>Numbers</h2>", numbers_html(runs)]
    for name, run in zip(names, runs):
        page += [f"<h2>{name}</h2>", samples_html(run, PICTURES // len(runs))]
        if run.state:
            page += [mixture_html(run), config_html(run, defaults.get(run.state["config"]["stage"]))]
        else:
            page.append("<p>Mixture and configuration are in its first checkpoint, which is not there yet.</p>")
    with open(out + ".tmp", "w", encoding="utf-8") as f:
        f.write("\n".join([*page, SLIDER]))
    os.replace(out + ".tmp", out)


def report_on(run, defaults):
    """Write RUN/report.html in the midst of training. What goes wrong is printed: no run should end for its page."""
    path = os.path.join(run, "report.html")
    try:
        write_report([run], defaults, path)
    except Exception as e:
        print(f"{path} cannot be written: {e!r}", file=sys.stderr)
