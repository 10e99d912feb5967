"""
Parts of HTML pages that are one file each and need nothing else: their style, tables, pictures, and curves as SVG;
and SVG files.

    steps, values ─► thin: two points a column ─► axis: where they lie, in pixels ─► <path>
"""
import base64
import html
import io
from math import ceil, floor, log10
from typing import NamedTuple

import numpy as np
from PIL import Image

# Colours, light and dark, and lines: pictures that are files of their own need them too.
DRAWN = """
:root {color-scheme: light dark; --line: #ccc; --bad: #b00; --c0: #1f63c9; --c1: #c2560a; --c2: #1a7a48; --c3: #8440c4}
@media (prefers-color-scheme: dark) {
  :root {--line: #555; --bad: #ff8080; --c0: #78abff; --c1: #ffa25c; --c2: #58cf92; --c3: #c79bff}}
.c0 {color: var(--c0)} .c1 {color: var(--c1)} .c2 {color: var(--c2)} .c3 {color: var(--c3)} .bad {color: var(--bad)}
path {fill: none; stroke: currentColor; stroke-width: 1.6} .dots {stroke-width: 5; stroke-linecap: round}
.grid {color: var(--line); stroke-width: 1} .raw {stroke-width: 1; opacity: .35}
.line1 {stroke-dasharray: 7 4} .line2 {stroke-dasharray: 2 3}
"""
STYLE = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{DRAWN}""" + """\
body {font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 1250px; padding: 0 1em; overflow-wrap: anywhere}
table {display: block; overflow-x: auto; border-collapse: collapse; margin: 1em 0; overflow-wrap: break-word}
tr {border-bottom: 1px solid var(--line)} th, td {padding: 2px 1em 2px 0; text-align: left; vertical-align: top}
@media (max-width: 600px) {th, td {font-size: 12px; padding-right: .6em}}
figure {display: inline-block; margin: 2px; font-size: 11px; text-align: center} img, input {max-width: 100%}
[hidden] {display: none !important}
.strip {overflow-x: auto; white-space: nowrap}
.tokens {font: 13px/1.9 monospace; padding: 4px 8px; white-space: pre-wrap; margin: 2px 0; color: #111}
.plots {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 1em}
.plots figure {margin: 0; font-size: 13px; text-align: left; break-inside: avoid}
svg {width: 100%; overflow: visible; font: 11px sans-serif; fill: currentColor}</style>"""


def table(head, rows):
    """An HTML table. head, rows: cells, which are escaped."""
    lines = []
    for tag, cells in [("th", head), *(("td", row) for row in rows)]:
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}" for cell in cells))
    return f"<table>{''.join(lines)}</table>"


def image_tag(image, title=""):
    """An <img> that carries its data, so that the page is one file. image: PIL."""
    scale = max(1, 192 // max(image.size))
    kind = "png" if image.mode == "L" else "webp"
    file = io.BytesIO()
    image.resize((image.width * scale, image.height * scale), Image.NEAREST).save(file, kind, quality=75)
    data = base64.b64encode(file.getvalue()).decode()
    title = html.escape(title)
    return f'<figure><img alt="{title}" src="data:image/{kind};base64,{data}"><figcaption>{title}</figcaption></figure>'


# ---- curves --------------------------------------------------------------------------------------------------------

LEFT, RIGHT, TOP, BOTTOM = 62, 380, 20, 190  # ends of the axes, in pixels of a figure of 400 x 230


class Line(NamedTuple):
    name: str
    style: str  # classes of STYLE: a colour, and how it is drawn
    x: list     # steps or minutes, in order
    y: list     # finite values


def axis(values, begin, end, log=False):
    """(a function from values to pixels, round values for the ticks). A linear axis goes from 0 to a tick."""
    low = min(values)
    high = max(values)
    scale = np.log10 if log else np.asarray
    if log:
        exponents = range(floor(log10(low)), ceil(log10(high)) + 1)
        digits = (1, 2, 5) if len(exponents) < 4 else (1,)
        ticks = [digit * 10.0 ** k for k in exponents for digit in digits if low <= digit * 10.0 ** k <= high]
    else:
        low = min(low, 0)
        least = (high - low or 1) / 6  # between two ticks
        unit = 10.0 ** floor(log10(least))
        step = next(digit * unit for digit in (1, 2, 5, 10) if digit * unit >= least)
        ticks = [k * step for k in range(floor(low / step), ceil(high / step) + 1)]
        low = ticks[0]
        high = ticks[-1]

    def place(values):
        return begin + (scale(values) - scale(low)) / (scale(high) - scale(low)) * (end - begin)

    return place, ticks


def thin(x, y):
    """Which points to draw: the lowest and the highest of each half pixel, in their order, and the two ends."""
    columns = (2 * x).astype(int)
    order = np.lexsort((y, columns))
    begins = np.flatnonzero(np.diff(columns[order], prepend=-1))
    lasts = np.append(begins[1:], len(order)) - 1
    return np.unique(np.concatenate([[0], order[begins], order[lasts], [len(order) - 1]]))


def curves(title, unit, lines, log=False):
    """A <figure> of some Lines. log: on a logarithmic axis, if they reach over more than a factor of 30."""
    parts = plot(title, unit, lines, log)
    return (f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 400 230" role="img">{parts}'
            "</svg></figure>")


def plot(title, unit, lines, log=False, along="optimiser steps"):
    """What is inside the <svg> of `curves`. along: what x counts."""
    lows = [min(line.y) for line in lines]
    highs = [max(line.y) for line in lines]
    log = log and 0 < 30 * min(lows) < max(highs)
    across, steps = axis([line.x[-1] for line in lines], LEFT, RIGHT)
    up, levels = axis([min(lows), max(highs)], BOTTOM, TOP, log)
    told = [f"{line.name} from {line.y[0]:.4g} at {line.x[0]:,.7g} to {line.y[-1]:.4g} at {line.x[-1]:,.7g} {along}, "
            f"between {low:.4g} and {high:.4g}" for line, low, high in zip(lines, lows, highs)]
    out = [f"<title>{html.escape(title)}: {html.escape('; '.join(told))}</title>"]
    for step in steps:
        out.append(f'<path class="grid" d="M{across(step):.2f},{TOP}V{BOTTOM}"/>'
                   f'<text x="{across(step):.2f}" y="{BOTTOM + 15}" text-anchor="middle">{step:,.7g}</text>')
    for level in levels:
        out.append(f'<path class="grid" d="M{LEFT},{up(level):.2f}H{RIGHT}"/>'
                   f'<text x="{LEFT - 5}" y="{up(level) + 4:.1f}" text-anchor="end">{level:,.7g}</text>')
    out.append(f'<text x="{LEFT}" y="{TOP - 8}">{html.escape(unit)}{", log scale" if log else ""}</text>'
               f'<text x="{RIGHT}" y="{BOTTOM + 32}" text-anchor="end">{along}</text>')
    for line in lines:
        x = across(np.array(line.x, float))
        y = up(np.array(line.y, float))
        points = [f"{x[i]:.2f},{y[i]:.2f}" for i in thin(x, y)]
        name = html.escape(line.name)
        out.append(f'<path class="{line.style}" d="M{" L".join(points)}"><title>{name}</title></path>')
        if len(points) < 30:
            out.append(f'<path class="{line.style} dots" d="{"".join(f"M{point}h0" for point in points)}"/>')
    return "".join(out)


# ---- pictures that are files of their own --------------------------------------------------------------------------

# On paper of its own a picture can be read on any page.
PAPER = """:root {--paper: #fff; --ink: #1f2328; --pale: #6a737d}
@media (prefers-color-scheme: dark) {:root {--paper: #161b22; --ink: #e6edf3; --pale: #9aa4af}}
svg {font: 13px sans-serif; color: var(--ink)} text, rect, polygon {fill: currentColor} .code {font: 12px monospace}
.head {font-weight: bold} .pale {color: var(--pale)} .bare {color: var(--paper)} .card {stroke: var(--line)}"""


def text(x, y, words, style="", anchor="start"):
    """Words whose baseline begins at (x, y). style: classes of DRAWN and PAPER."""
    return f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{html.escape(words)}</text>'


def box(x, y, width, height, style="", opacity=1.0):
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{style}" opacity="{opacity:g}"/>'


def save_svg(path, width, height, title, parts):
    with open(path, "w", encoding="utf-8") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                f'height="{height}" role="img"><title>{html.escape(title)}</title><style>{DRAWN}{PAPER}</style>\n'
                f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="6" class="bare card"/>\n')
        f.write("\n".join([text(16, 28, title, "head"), *parts, "</svg>\n"]))
