"""Pages to look at, each one file that needs nothing else: of data (__main__.py) and of runs (run.py)."""
import base64
import html
import io

from PIL import Image

STYLE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {color-scheme: light dark; --line: #ccc; --bad: #b00; --c0: #1f63c9; --c1: #c2560a; --c2: #1a7a48; --c3: #8440c4}
@media (prefers-color-scheme: dark) {
  :root {--line: #555; --bad: #ff8080; --c0: #78abff; --c1: #ffa25c; --c2: #58cf92; --c3: #c79bff}}
.c0 {color: var(--c0)} .c1 {color: var(--c1)} .c2 {color: var(--c2)} .c3 {color: var(--c3)} .bad {color: var(--bad)}
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
svg {width: 100%; overflow: visible; font: 11px sans-serif; fill: currentColor}
path {fill: none; stroke: currentColor; stroke-width: 1.6} .dots {stroke-width: 5; stroke-linecap: round}
.grid {color: var(--line); stroke-width: 1} .raw {stroke-width: 1; opacity: .35}
.line1 {stroke-dasharray: 7 4} .line2 {stroke-dasharray: 2 3}</style>"""


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


def main():
    """The command, imported late: it needs pretrain.py, which writes the page of its run by this package."""
    from tools.show.__main__ import main
    main()
