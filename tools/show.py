"""
Look at data: a page with what the model will see.

    python -m tools.show data/my.jsonl
"""
import argparse
import base64
import html
import io
import os
import random
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw

from data import Packer, Planner, Stream, find_datasets
from lib.media import BadMedia, load_crops
from lib.records import BadRecord, parse_record
from lib.text import SMALL_TOKENIZER, Tokenizer
from lib.weights import BadCheckpoint


def image_tag(image, title=""):
    """An <img> that carries its picture, so that the page is one file. image: PIL, or (H, W) or (H, W, 3)
    uint8."""
    image, file = image if isinstance(image, Image.Image) else Image.fromarray(image), io.BytesIO()
    scale = max(1, 192 // max(image.size))
    kind = "png" if image.mode == "L" else "jpeg"
    image.resize((image.width * scale, image.height * scale), Image.NEAREST).save(file, kind)
    data = base64.b64encode(file.getvalue()).decode()
    return (f'<figure><img src="data:image/{kind};base64,{data}"><figcaption>{html.escape(title)}</figcaption>'
            "</figure>")


def draw_crop(patches, n, patch, window, points=()):
    """A crop as the model gets it, with the grid of what is pooled into one token, and points: [(annotation,
    point)]."""
    pixels = patches.reshape(n, n, patch, patch, 3).transpose(0, 2, 1, 3, 4).reshape(n * patch, n * patch, 3)
    scale = max(1, 378 // (n * patch))
    image = Image.fromarray(pixels).resize((n * patch * scale,) * 2, Image.NEAREST)
    pen, side = ImageDraw.Draw(image, "RGBA"), n * patch * scale
    for at in range(0, side, window * patch * scale):
        pen.line([at, 0, at, side], (255, 255, 255, 90))
        pen.line([0, at, side, at], (255, 255, 255, 90))
    for a, p in points:
        x, y, colour = p["x"] * side, p["y"] * side, f"hsl({a * 67 % 360}, 90%, 50%)"
        pen.ellipse([x - 6, y - 6, x + 6, y + 6], None, colour, 3)
        pen.text((x + 7, y - 6), str(p["id"]), colour, stroke_width=1, stroke_fill="black")
    return image


def media_html(plan, row, cfg):
    """The crops of a plan, the points of its row on them."""
    n, out = cfg.crop // cfg.patch, []
    marked = [(a, p) for a, annotation in enumerate(row["annotations"]) for p in annotation.get("points", ())]
    for k, (path, layout) in enumerate(plan.media):
        crops = load_crops(path, layout, n, cfg.patch)
        name = html.escape(os.path.basename(path))
        out.append(f"<p>{name}: {len(crops)} crops, {len(layout.pool)} visual tokens</p>")
        if layout.times:
            nearest = lambda p: min(range(len(layout.times)), key=lambda i: abs(layout.times[i] - p["t"]))
            frames = [(t, draw_crop(c, n, cfg.patch, 3, [(a, p) for a, p in marked if nearest(p) == i]))
                      for i, (t, c) in enumerate(zip(layout.times, crops))]
            out += [image_tag(image.resize((189, 189)), f"{t:.2f} s") for t, image in frames]
        else:
            mine = [(a, p) for a, p in marked if p.get("image", 0) == k]
            out.append(image_tag(draw_crop(crops[0], n, cfg.patch, 2, mine), "the whole, low resolution"))
            rows, cols = layout.tiling
            for i in range(rows):
                tiles = [image_tag(draw_crop(crops[1 + i * cols + j], n, cfg.patch, 2).resize((189, 189)))
                         for j in range(cols)]
                out.append("<br>" * (i == 0) + "".join(tiles) + "<br>")
    return "".join(out)


def tokens_html(plan, tokenizer):
    """The tokens of a plan: a colour per branch, what is learned underlined, the more the heavier its
    weight."""
    names, out = {i: name for name, i in tokenizer.ids.items()}, []
    image, column = tokenizer.ids["<image>"], tokenizer.ids["<image_col>"]
    for b in range(int(plan.branch.max()) + 1):
        mine = plan.branch == b  # a branch's last token is never read, only predicted
        ids, learned = plan.tokens[mine].tolist(), [0.0, *plan.weights[mine].tolist()]
        ids += [int(plan.targets[mine][-1])] if b else []
        spans, run = [], []
        for i, (token, w) in enumerate(zip(ids, learned)):
            if token in (image, column):  # a picture's tokens are told by their number
                run.append(token)
                if ids[i + 1:i + 2] in ([image], [column]):
                    continue
                text = f"<image> \u00d7{run.count(image)}" + f" in {run.count(column)} rows" * (column in run)
                run = []
            else:
                text = names.get(token) or tokenizer.decode([token])
            style = f"border-bottom: {min(2 * w, 5):.1f}px solid #c00"
            spans.append(f'<span title="{token}, weight {w:.3g}" style="{style}">'
                         + html.escape(text).replace("\n", "\u23ce") + "</span>")
        colour = f"hsl({(b - 1) * 67 % 360}, 70%, 90%)" if b else "#eee"
        out.append(f'<p class="tokens" style="background:{colour}">{"".join(spans)}</p>')
    return "".join(out)


def mask_image(plans, vocab):
    """The attention mask of a packed row, white where a query (row) sees a key (column)."""
    from model import is_vision, may_attend
    example = torch.cat([torch.full((p.n_tokens,), e) for e, p in enumerate(plans, 1)])
    branch, tokens = (torch.from_numpy(np.concatenate([getattr(p, key) for p in plans]))
                      for key in ("branch", "tokens"))
    at = torch.arange(len(tokens))
    mask = may_attend(at[:, None], at[None], example, branch, is_vision(tokens, vocab))
    image = Image.fromarray((mask.numpy() * 255).astype(np.uint8))
    return image.resize((min(len(tokens), 900),) * 2, Image.BOX)

STYLE = """<meta charset="utf-8"><style>body {font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 1250px}
figure {display: inline-block; margin: 2px; font-size: 11px; text-align: center}
.tokens {font: 13px/1.9 monospace; padding: 4px 8px; white-space: pre-wrap; overflow-wrap: anywhere; margin: 2px 0}
.bad {color: #c00} td {padding: 0 1em 0 0}</style>"""


def write_page(datasets, planner, n, out):
    """The first n lines of each dataset as the model will see them, one packed row's mask and the packing's
    statistics."""
    page, shown = [STYLE, f"<h1>{html.escape(', '.join(d.name for d in datasets))}</h1>"], []
    page.append("<p>Grey: the trunk, which every branch sees. A colour per branch. Underlined in red: learned, "
                "the thicker the heavier. Lines over a picture: what is pooled into one token.</p>")
    for d in datasets:
        for i in range(min(n, len(d))):
            line, folder, where = d.line(i)
            page.append(f"<h2>{html.escape(where)}</h2>")
            try:
                row = parse_record(line)
                plans, left_out = planner.plan(row, folder, random.Random(i))
                page += [media_html(plans[0], row, planner.cfg)] if plans else []
            except (BadRecord, BadMedia) as e:
                page.append(f'<p class="bad">{html.escape(str(e))}</p>')
                continue
            page += [f'<p class="bad">left out: {html.escape(reason)}</p>' for reason in left_out]
            for p in plans:
                page.append(f"<p>{p.n_tokens} tokens, {p.n_crops} crops, {int((p.weights > 0).sum())} learned</p>")
                page.append(tokens_html(p, planner.tokenizer))
            shown += plans
    packer = Packer(planner.seq_len, planner.max_crops)
    rows = [row for p in shown for row in packer.add(p)] + packer.flush()
    total = lambda key: sum(getattr(p, key) for p in shown) / max(len(rows), 1)
    if rows:
        row, learned = max(rows, key=len), sum(int((p.weights > 0).sum()) for p in shown)
        page.append(f"<h2>Packed</h2><table><tr><td>{len(shown)} examples in {len(rows)} rows"
                    f"<td>tokens {total('n_tokens'):.0f} of {planner.seq_len} a row"
                    f"<td>crops {total('n_crops'):.1f} of {planner.max_crops}<td>{learned} tokens learned</table>"
                    f"<p>The mask of the row that holds {len(row)} examples, white where a token (down) sees "
                    "another (across):</p>" + image_tag(mask_image(row, planner.cfg.vocab)))
    with open(out, "w", encoding="utf-8") as f:
        f.write("\n".join(page))


def main():
    from model import PRESETS
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("data", nargs="+", help="JSONL files, or folders of them")
    parser.add_argument("--show", type=int, default=0, metavar="N",
                        help="write a page with the first N lines of each file")
    parser.add_argument("--out", default="data.html", help="where the page goes [data.html]")
    parser.add_argument("--config", default="small", choices=list(PRESETS),
                        help="whose crops and patches [small]")
    parser.add_argument("--tokenizer", default=SMALL_TOKENIZER,
                        help="tokenizer.json of that model [the small one]")
    parser.add_argument("--seq_len", type=int, default=4096, help="tokens per packed row [4096]")
    parser.add_argument("--max_crops", type=int, default=128, help="crops per packed row [128]")
    parser.add_argument("--max_frames", type=int, default=128,
                        help="frames a video may get, at 2 per second [128]")
    parser.add_argument("--tiles", type=int,
                        help="high-resolution crops a picture may get [8; none for small]")
    args = parser.parse_args()
    cfg = PRESETS[args.config]
    try:
        planner = Planner(Tokenizer(args.tokenizer, cfg.vocab), cfg, args.seq_len, max_frames=args.max_frames,
                          max_crops=args.max_crops,
                          tiles=args.tiles if args.tiles is not None else 0 if args.config == "small" else 8)
        datasets, missing = find_datasets(args.data)
    except (OSError, ValueError, BadCheckpoint) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    for d in datasets:
        stream, reasons, examples, left_out = Stream([(d, 1.0)], planner, 0), {}, 0, {}
        for k in range(len(d)):
            try:
                plans, left = stream.plans(d.name, k)
                examples += len(plans)
                left_out |= {reason: left_out.get(reason, 0) + 1 for reason in left}
            except BadRecord as e:
                reasons[e.reason] = reasons.get(e.reason, 0) + 1
                if reasons[e.reason] <= 5:
                    print(e)
        print(f"{d.name}: {len(d)} rows, {examples} examples, rows not used: {reasons or 'none'}, "
              f"annotations left out: {left_out or 'none'}")
    if args.show:
        write_page(datasets, planner, args.show, args.out)
        print(f"{args.out} shows the first {args.show} lines of each")


if __name__ == "__main__":
    main()
