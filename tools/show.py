"""
Show data: is every record usable, and what will the model see of it.

    python -m tools.show data/my.jsonl              # plans every record and says what is wrong with which
    python -m tools.show data/my.jsonl --show 8     # and writes data.html, a page with the first eight

It judges as training would: with the tokens, crops and frames of --config and --stage.
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

import longctx
import pretrain
import sft
from data import Packer, Planner, Stream, find_datasets
from lib.errors import BadMedia, BadRecord, UserError
from lib.media import load_crops
from lib.records import count, parse_record
from lib.text import SMALL_TOKENIZER, Tokenizer
from model import PRESETS, is_vision, may_attend
from sample import at_least


STYLE = """<meta charset="utf-8"><style>body {font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 1250px}
figure {display: inline-block; margin: 2px; font-size: 11px; text-align: center}
.tokens {font: 13px/1.9 monospace; padding: 4px 8px; white-space: pre-wrap; overflow-wrap: anywhere; margin: 2px 0}
.bad {color: #c00} td {padding: 0 1em 0 0}</style>"""


def colour_of(k, saturation, lightness):
    """The colour of the k-th annotation, neighbours far apart."""
    return f"hsl({k * 67 % 360}, {saturation}%, {lightness}%)"


# ---- images ------------------------------------------------------------------------------------------------

def image_tag(image, title=""):
    """An <img> that carries its data, so that the page is one file. image: PIL."""
    scale = max(1, 192 // max(image.size))
    kind = "png" if image.mode == "L" else "jpeg"
    file = io.BytesIO()
    image.resize((image.width * scale, image.height * scale), Image.NEAREST).save(file, kind)
    data = base64.b64encode(file.getvalue()).decode()
    return (f'<figure><img src="data:image/{kind};base64,{data}"><figcaption>{html.escape(title)}</figcaption>'
            "</figure>")


def draw_crop(patches, n, patch, window, points=()):
    """A crop as the model gets it, a grid around what is pooled into one token, and points: [(annotation, point)].

    patches: (n * n, patch * patch * 3) uint8; window: patches pooled on a side.
    """
    pixels = patches.reshape(n, n, patch, patch, 3).transpose(0, 2, 1, 3, 4).reshape(n * patch, n * patch, 3)
    scale = max(1, 378 // (n * patch))
    side = n * patch * scale
    image = Image.fromarray(pixels).resize((side, side), Image.NEAREST)
    pen = ImageDraw.Draw(image, "RGBA")
    for line in range(0, side, window * patch * scale):
        pen.line([line, 0, line, side], (255, 255, 255, 90))
        pen.line([0, line, side, line], (255, 255, 255, 90))
    for a, p in points:
        x, y = p["x"] * side, p["y"] * side
        pen.ellipse([x - 6, y - 6, x + 6, y + 6], None, colour_of(a, 90, 50), 3)
        pen.text((x + 7, y - 6), str(p["id"]), colour_of(a, 90, 50), stroke_width=1, stroke_fill="black")
    return image


def frames_html(layout, crops, n, patch, points):
    """The frames of a video and their points; then those points that no frame shows."""
    points_of_frame = [[] for _ in layout.times]
    between = []  # times of the others
    for a, p in points:
        distance = np.abs(np.array(layout.times) - p["t"])
        if distance.min() <= 0.05:
            points_of_frame[int(distance.argmin())].append((a, p))
        else:
            between.append(f"{p['t']:g} s (id {p['id']})")
    out = []
    for t, crop, frame_points in zip(layout.times, crops, points_of_frame):
        image = draw_crop(crop, n, patch, 3, frame_points).resize((189, 189))
        out.append(image_tag(image, f"{t:.2f} s"))
    if between:
        out.append(f'<p class="bad">points between these frames, not drawn: {", ".join(between)}</p>')
    return out


def crops_html(layout, crops, n, patch, points):
    """The low-resolution crop of an image, then the rows of its high-resolution ones."""
    out = [image_tag(draw_crop(crops[0], n, patch, 2, points), "the whole, low resolution")]
    rows, columns = layout.tiling
    if rows:
        out.append("<br>")
    for row in range(rows):
        for crop in crops[1 + row * columns:1 + (row + 1) * columns]:
            out.append(image_tag(draw_crop(crop, n, patch, 2).resize((189, 189))))
        out.append("<br>")
    return out


def media_html(plan, record, cfg):
    """The crops of a plan, with the points of its record on them."""
    n = cfg.crop // cfg.patch
    points = []  # (annotation, point)
    for a, annotation in enumerate(record["annotations"]):
        for p in annotation.get("points", ()):
            points.append((a, p))
    out = []
    for k, (path, layout) in enumerate(plan.media):
        crops = load_crops(path, layout, n, cfg.patch)
        name = html.escape(os.path.basename(path))
        out.append(f"<p>{name}: {len(crops)} crops, {len(layout.pool)} visual tokens</p>")
        if layout.times:
            out += frames_html(layout, crops, n, cfg.patch, points)
        else:
            image_points = [(a, p) for a, p in points if p.get("image", 0) == k]
            out += crops_html(layout, crops, n, cfg.patch, image_points)
    return "".join(out)


# ---- tokens ------------------------------------------------------------------------------------------------

def tokens_html(plan, tokenizer):
    """The tokens of a plan: a colour per branch; what is trained on is underlined, the heavier the thicker."""
    out = []
    for b in range(int(plan.branch.max()) + 1):
        in_branch = plan.branch == b
        ids = plan.tokens[in_branch].tolist()
        weights = [0.0, *plan.weights[in_branch].tolist()]  # a weight stands at the token before the one it is of
        if b:
            ids.append(int(plan.targets[in_branch][-1]))  # the last token of a branch is only predicted
        colour = colour_of(b - 1, 70, 90) if b else "#eee"
        out.append(f'<p class="tokens" style="background:{colour}">{"".join(spans(ids, weights, tokenizer))}</p>')
    return "".join(out)


def spans(ids, weights, tokenizer):
    """A <span> for each token; those of an image are one, with their number."""
    names = {i: name for name, i in tokenizer.ids.items()}
    image, column = tokenizer.ids["<image>"], tokenizer.ids["<image_col>"]
    out = []
    run = []  # tokens of an image so far
    for i, (token, weight) in enumerate(zip(ids, weights)):
        text = names.get(token) or tokenizer.decode([token])
        if token in (image, column):
            run.append(token)
            if ids[i + 1:i + 2] in ([image], [column]):
                continue
            text = f"<image> \u00d7{run.count(image)}"
            if column in run:
                text += f" in {run.count(column)} rows"
            run = []
        style = f"border-bottom: {min(2 * weight, 5):.1f}px solid #c00"
        text = html.escape(text).replace("\n", "\u23ce")
        out.append(f'<span title="{token}, weight {weight:.3g}" style="{style}">{text}</span>')
    return out


def mask_image(plans, vocab):
    """The attention mask of a packed sequence, white where a query (down) sees a key (across)."""
    example = torch.cat([torch.full((plan.n_tokens,), e) for e, plan in enumerate(plans, 1)])
    branch = torch.from_numpy(np.concatenate([plan.branch for plan in plans]))
    tokens = torch.from_numpy(np.concatenate([plan.tokens for plan in plans]))
    place = torch.arange(len(tokens))
    mask = may_attend(place[:, None], place[None], example, branch, is_vision(tokens, vocab))  # (T, T)
    image = Image.fromarray((mask.numpy() * 255).astype(np.uint8))
    return image.resize((min(len(tokens), 900),) * 2, Image.BOX)


# ---- the page and the check --------------------------------------------------------------------------------

def packed_html(plans, planner):
    """How well the plans pack, and the mask of the sequence that holds most of them."""
    packer = Packer(planner.seq_len, planner.max_crops)
    sequences = []
    for plan in plans:
        sequences += packer.add(plan)
    sequences += packer.flush()
    if not sequences:
        return ""
    tokens = sum(plan.n_tokens for plan in plans) / len(sequences)
    crops = sum(plan.n_crops for plan in plans) / len(sequences)
    trained = sum(int((plan.weights > 0).sum()) for plan in plans)
    fullest = max(sequences, key=len)
    return (f"<h2>Packed</h2><table><tr><td>{len(plans)} examples in {len(sequences)} sequences"
            f"<td>tokens {tokens:.0f} of {planner.seq_len} a sequence"
            f"<td>crops {crops:.1f} of {planner.max_crops}<td>{trained} tokens trained on</table>"
            f"<p>The mask of the sequence that holds {len(fullest)} examples, white where a token (down) sees "
            "another (across):</p>" + image_tag(mask_image(fullest, planner.cfg.vocab)))


def write_page(datasets, planner, n, out):
    """The first n records of each dataset as the model will see them, then how they pack."""
    page = [STYLE, f"<h1>{html.escape(', '.join(dataset.name for dataset in datasets))}</h1>"]
    page.append("<p>Grey: the trunk, which every branch sees. A colour per branch. Underlined in red: trained on, "
                "the thicker the heavier. Lines over an image: what is pooled into one token.</p>")
    shown = []
    for dataset in datasets:
        for i in range(min(n, len(dataset))):
            line, folder, where = dataset.line(i)
            page.append(f"<h2>{html.escape(where)}</h2>")
            try:
                record = parse_record(line)
                plans, left_out = planner.plan(record, folder, random.Random(i))
                if plans:
                    page.append(media_html(plans[0], record, planner.cfg))
            except (BadRecord, BadMedia) as e:
                page.append(f'<p class="bad">{html.escape(str(e))}</p>')
                continue
            for reason in left_out:
                page.append(f'<p class="bad">left out: {html.escape(reason)}</p>')
            for plan in plans:
                trained = int((plan.weights > 0).sum())
                page.append(f"<p>{plan.n_tokens} tokens, {plan.n_crops} crops, {trained} trained on</p>")
                page.append(tokens_html(plan, planner.tokenizer))
            shown += plans
    page.append(packed_html(shown, planner))
    with open(out, "w", encoding="utf-8") as f:
        f.write("\n".join(page))


def check(dataset, planner):
    """Plan every record of a dataset; print the first five of each kind that cannot be used, and the counts."""
    stream = Stream([(dataset, 1.0)], planner, 0)
    examples = 0
    counts = {"bad": {}, "left out": {}}  # {reason: n}
    for k in range(len(dataset)):
        try:
            plans, left_out = stream.plans(dataset.name, k)
        except BadRecord as e:
            count(counts, "bad", e.reason)
            if counts["bad"][e.reason] <= 5:
                print(e)
            continue
        examples += len(plans)
        for reason in left_out:
            count(counts, "left out", reason)
    print(f"{dataset.name}: {len(dataset)} records, {examples} examples, "
          f"records not used: {counts['bad'] or 'none'}, annotations or points left out or moved: {counts['left out'] or 'none'}")


STAGES = dict(pretrain=(pretrain.Config(), pretrain.PRESETS), sft=(sft.DEFAULTS, sft.PRESETS),
              longctx=(longctx.DEFAULTS, longctx.PRESETS))
LIMITS = dict(seq_len="tokens per packed sequence", max_crops="crops per packed sequence",
              max_frames="frames a video may get, at 2 per second", tiles="high-resolution crops an image may get")


def has_video(dataset):
    """Whether one of the first records of a dataset is about a video."""
    return any(b'"video"' in dataset.line(i)[0] for i in range(min(len(dataset), 20)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("data", nargs="+", help="JSONL files, or folders of them")
    parser.add_argument("--show", type=int, default=0, metavar="N",
                        help="write a page with the first N records of each file")
    parser.add_argument("--out", default="data.html", help="where the page goes [data.html]")
    parser.add_argument("--config", default="small", choices=list(PRESETS), help="whose crops and patches [small]")
    parser.add_argument("--tokenizer", default=SMALL_TOKENIZER, help="tokenizer.json of that model [the small one]")
    parser.add_argument("--stage", choices=list(STAGES), help="whose limits [sft of videos, else pretrain]")
    for name, text in LIMITS.items():
        parser.add_argument(f"--{name}", type=at_least(0), help=f"{text} [as the stage]")
    args = parser.parse_args()
    cfg = PRESETS[args.config]
    try:
        datasets, _ = find_datasets(args.data)
        stage = args.stage or ("sft" if any(map(has_video, datasets)) else "pretrain")
        defaults, presets = STAGES[stage]
        given = []
        for name in LIMITS:
            if getattr(args, name) is not None:
                given += [f"--{name}", str(getattr(args, name))]
        limits = pretrain.parse(defaults, presets, ["--config", args.config, "--data", *args.data, *given])
        planner = Planner(Tokenizer(args.tokenizer, cfg.vocab), cfg, limits.seq_len, limits.tiles,
                          max_frames=limits.max_frames, max_crops=limits.max_crops)
        print(f"as {stage} of {args.config}: " + ", ".join(f"--{name} {getattr(limits, name)}" for name in LIMITS))
    except (UserError, OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    for dataset in datasets:
        check(dataset, planner)
    if args.show:
        write_page(datasets, planner, args.show, args.out)
        print(f"{args.out} shows the first {args.show} records of each")


if __name__ == "__main__":
    main()
