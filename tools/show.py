"""
Show data: is every record usable, and what will the model see of it. Show runs: their curves, samples and data.

    python -m tools.show data/my.jsonl              # plans every record and says what is wrong with which
    python -m tools.show data/my.jsonl --show 8     # and writes data.html: what is in it, bad records, eight good ones
    python -m tools.show out/small/sft              # writes report.html into the folder of that run
    python -m tools.show out/small/pretrain out/small/sft     # several over each other: runs.html
    python -m tools.show --figures out/small        # draws the pictures of the README, into assets/

It judges data as training would: with the tokens, crops and frames of --config and --stage.
"""
import argparse
import html
import os
import random
import sys
from collections import Counter

import lib  # noqa: F401: before torch, which reads the environment that it sets
import numpy as np
import torch
from PIL import Image, ImageDraw

import longctx
import pretrain
import sft
from data import Packer, Planner, Stream, find_datasets
from lib.errors import BadMedia, BadRecord, UserError
from lib.media import load_crops
from lib.page import STYLE, image_tag, table
from lib.progress import progress
from lib.records import AT_FRAME, count, media_kind, parse_record
from lib.report import run_folder, write_report
from lib.text import SMALL_TOKENIZER, Tokenizer
from model import PRESETS, is_vision, may_attend
from sample import bounded


def colour_of(k, saturation, lightness):
    """The colour of the k-th annotation, neighbours far apart."""
    return f"hsl({k * 67 % 360}, {saturation}%, {lightness}%)"


# ---- images ------------------------------------------------------------------------------------------------

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
        pen.text((x + 8, y - 9), str(p["id"]), colour_of(a, 90, 50), stroke_width=1, stroke_fill="black", font_size=18)
    return image


def frames_html(layout, crops, n, patch, points):
    """The frames of a video and their points; then those points that no frame shows."""
    points_of_frame = [[] for _ in layout.times]
    between = []  # times of the others
    for a, p in points:
        distance = np.abs(np.array(layout.times) - p["t"])
        if distance.min() <= AT_FRAME:
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
        out.append(f"<p>{name}, crops: {len(crops)}, visual tokens: {len(layout.pool)}</p>")
        if layout.times:
            out += ['<div class="strip">', *frames_html(layout, crops, n, cfg.patch, points), "</div>"]
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
    return (f"<h2>Packed</h2><table><tr><td>examples: {len(plans)}, sequences: {len(sequences)}"
            f"<td>tokens {tokens:.0f} of {planner.seq_len} a sequence"
            f"<td>crops {crops:.1f} of {planner.max_crops}<td>tokens trained on: {trained}</table>"
            f"<p>The mask of the sequence that holds most of them, white where a token (down) sees "
            "another (across):</p>" + image_tag(mask_image(fullest, planner.cfg.vocab)))


def index_html(dataset, sizes, limits):
    """What is in a file. sizes: {file:line: (tokens, crops)} of the records that can be used; limits: of a sequence."""
    found = Counter()  # media and tasks
    points = []        # of each record
    for i in range(len(dataset)):
        line, _, where = dataset.line(i)
        if where in sizes:
            record = parse_record(line)
            tasks = [annotation["task"] for annotation in record["annotations"]]
            found.update([media_kind(record) or "no media", *tasks])
            points.append(sum(len(annotation.get("points", ())) for annotation in record["annotations"]))
    tokens, crops = zip(*sizes.values())
    rows = []
    for name, values, limit in (("tokens", tokens, limits[0]), ("crops", crops, limits[1]), ("points", points, None)):
        middle = int(np.median(values))
        share = f"{middle / limit:.0%}, at most {max(values) / limit:.0%} of {limit:,}" if limit else ""
        rows.append((name, min(values), middle, max(values), share))
    boxes = []
    counts, edges = np.histogram(tokens, 10)
    for n, low, high in zip(counts, edges, edges[1:]):
        boxes.append((f"{low:.0f} to {high:.0f}", "\u2588" * round(12 * n / max(counts)), n))
    return (table(("media, tasks", "records, annotations"), found.items())
            + table(("of a record", "least", "middle", "most", "share of the limit: middle, most"), rows)
            + table(("tokens", "", "records"), boxes))


def write_page(checked, planner, n, out):
    """An index of each dataset, and n records of it as the model will see them, after as many that cannot be used;
    then how they pack. checked: [(dataset, what `check` returned)]."""
    page = [STYLE, f"<h1>{html.escape(', '.join(dataset.name for dataset, _, _ in checked))}</h1>"]
    page.append("<p>Grey: the trunk, which every branch sees. A colour per branch. Underlined in red: trained on, "
                "the thicker the heavier. Lines over an image: what is pooled into one token.</p>")
    packed = []
    for dataset, sizes, refused in checked:
        usable = [i for i in range(len(dataset)) if dataset.line(i)[2] in sizes]
        others = sorted(set(range(len(dataset))) - set(usable))
        name = html.escape(dataset.name)
        page.append(f"<h2>{name}: of {len(dataset):,} records {len(usable):,} can be used</h2>")
        if usable:
            page.append(index_html(dataset, sizes, (planner.seq_len, planner.max_crops)))
        page.append("<ul>")
        sections = []
        for i in others[:n] + usable[:n]:
            line, folder, where = dataset.line(i)
            name = html.escape(where)
            told = f"<span class=bad>{html.escape(refused.get(where, 'all of it is left out'))}</span>"
            if where in sizes:
                told = "tokens: {}, crops: {}".format(*sizes[where])
            page.append(f'<li><a href="#{name}">{name}</a>: {told}')
            sections.append(f'<h2 id="{name}">{name}</h2>')
            try:
                record = parse_record(line)
                plans, left_out = planner.plan(record, folder, random.Random(i))
                if plans:
                    sections.append(media_html(plans[0], record, planner.cfg))
            except (BadRecord, BadMedia) as e:
                sections.append(f'<p class="bad">{html.escape(str(e))}</p>')
                continue
            for reason in left_out:
                sections.append(f'<p class="bad">left out: {html.escape(reason)}</p>')
            for plan in plans:
                trained = int((plan.weights > 0).sum())
                sections.append(f"<p>tokens: {plan.n_tokens}, crops: {plan.n_crops}, trained on: {trained}</p>")
                sections.append(tokens_html(plan, planner.tokenizer))
            packed += plans
        page += ["</ul>", *sections]
    page.append(packed_html(packed, planner))
    with open(out, "w", encoding="utf-8") as f:
        f.write("\n".join(page))


def check(dataset, planner):
    """Plan every record of a dataset; print the first five of each kind that cannot be used, and the counts. Returns
    {file:line: (tokens, crops)} of those that can be used, {file:line: what is wrong} of the others."""
    stream = Stream([(dataset, 1.0)], planner, 0)
    sizes, refused = {}, {}
    examples = 0
    counts = {"bad": {}, "left out": {}}  # {reason: n}
    for k in progress(range(len(dataset)), f"records of {dataset.name} planned"):
        try:
            plans, left_out = stream.plans(dataset.name, k)
        except BadRecord as e:
            count(counts, "bad", e.reason)
            if counts["bad"][e.reason] <= 5:
                print(e)
            where, _, detail = e.detail.partition(": ")
            refused[where] = f"{e.reason}: {detail}"
            continue
        examples += len(plans)
        for reason in left_out:
            count(counts, "left out", reason)
        for plan in plans:
            tokens, crops = sizes.get(plan.where, (0, 0))
            sizes[plan.where] = tokens + plan.n_tokens, crops + plan.n_crops
    print(f"{dataset.name}: {len(dataset)} records, {examples} examples, "
          f"records not used: {counts['bad'] or 'none'}, annotations or points left out or moved: "
          f"{counts['left out'] or 'none'}")
    return sizes, refused


STAGES = dict(pretrain=(pretrain.Config(), pretrain.PRESETS), sft=(sft.DEFAULTS, sft.PRESETS),
              longctx=(longctx.DEFAULTS, longctx.PRESETS))
LIMITS = dict(seq_len="tokens per packed sequence", max_crops="crops per packed sequence",
              max_frames="frames a video may get, at 2 per second", tiles="high-resolution crops an image may get")


def has_video(dataset):
    """Whether one of the first records of a dataset is about a video."""
    return any(b'"video"' in dataset.line(i)[0] for i in range(min(len(dataset), 20)))


def main():
    parser = argparse.ArgumentParser("python -m tools.show", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", help="JSONL files, or folders of them; or the folders of runs")
    parser.add_argument("--figures", metavar="RUNS", help="draw the pictures of the README from the runs in RUNS")
    parser.add_argument("--show", type=int, default=0, metavar="N",
                        help="write a page with N records of each file, and N that cannot be used before them")
    parser.add_argument("--out", help="where the page goes [data.html; report.html in the run, runs.html of several], "
                        "or the pictures [assets]")
    parser.add_argument("--config", default="small", choices=list(PRESETS), help="whose crops and patches [small]")
    parser.add_argument("--tokenizer", default=SMALL_TOKENIZER, help="tokenizer.json of that model [the small one]")
    parser.add_argument("--stage", choices=list(STAGES), help="whose limits [sft of videos, else pretrain]")
    for name, text in LIMITS.items():
        parser.add_argument(f"--{name}", type=bounded(int, 0), help=f"{text} [as the stage]")
    args = parser.parse_args()
    cfg = PRESETS[args.config]
    runs = list(map(run_folder, args.data))
    if not args.data and not args.figures:
        parser.error("name JSONL files, folders of them, or the folders of runs")
    try:
        if args.figures:
            from tools.figures import write_figures  # here alone: it loads all that trains
            print(f"{write_figures(args.figures, args.out or 'assets')} has the pictures")
            return
        if any(runs):
            if not all(runs):
                raise UserError(f"{args.data[runs.index(None)]}: not a run (there is no log.jsonl); runs and data have "
                                "pages of their own")
            out = args.out or (os.path.join(runs[0], "report.html") if len(runs) == 1 else "runs.html")
            write_report(runs, {stage: defaults for stage, (defaults, _) in STAGES.items()}, out)
            print(f"{out} shows {', '.join(runs)}")
            return
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
    checked = [(dataset, *check(dataset, planner)) for dataset in datasets]
    if args.show:
        out = args.out or "data.html"
        write_page(checked, planner, args.show, out)
        print(f"{out} shows the first {args.show} records of each, and before them those that cannot be used")


if __name__ == "__main__":
    main()
