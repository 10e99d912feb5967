"""
The pictures of the README. They show what the code itself computes, and what the runs of the small model have become:

    python -m tools.show --figures out/small      # writes them into assets/, from out/small/pretrain and out/small/sft

    scores.svg    log.jsonl of stage 1 over minutes           packed.svg    data.Stream, Packer: sequences of stage 2
    tree.svg      model.may_attend: who sees whom             crops.jpg     lib.media.image_layout, image_crops
    ulysses.svg   ulysses.all_to_all on two ranks             toy.png, track.gif    answers of both models
"""
import glob
import itertools
import json
import os
import random
import tempfile

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

import pretrain
import sample
import sft
import ulysses
from data import Planner, Stream, decode
from lib import toy
from lib.draw import draw
from lib.errors import UserError
from lib.media import image_crops, image_layout
from lib.page import Line, box, plot, save_svg, text
from lib.records import parse_record
from lib.report import smooth
from lib.results import points_of
from lib.text import SMALL_TOKENIZER, Tokenizer
from model import PRESETS, is_vision, may_attend

SMALL = PRESETS["small"]
TOKENIZER = Tokenizer(SMALL_TOKENIZER, SMALL.vocab)


def spans(marked):
    """[(begin, end)] of the ones in a row of zeros and ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(marked, int), [0]])))
    return zip(edges[::2].tolist(), edges[1::2].tolist())


def scores(run, out):
    """The loss and the scores on held-out scenes over the minutes of a run of stage 1, evaluations not counted."""
    minutes = 0.0
    points = {}  # name -> ([minutes], [values])
    with open(os.path.join(run, "log.jsonl"), encoding="utf-8") as f:
        for row in map(json.loads, f):
            minutes += row.get("seconds", 0) / 60
            for name in ("loss", *toy.GOALS):
                if name in row or name in row.get("eval", {}):
                    x, y = points.setdefault(name, ([], []))
                    x.append(minutes)
                    y.append(row[name] if name in row else row["eval"][name])
    x, y = points.pop("loss")
    losses = [Line("loss", "c0 raw", x, y), Line("loss, mean", "c0", x, smooth(y))]
    lines = [Line(name, f"c{k}", *values) for k, (name, values) in enumerate(points.items())]
    names = [text(190, 110 + 18 * k, line.name, line.style) for k, line in enumerate(lines)]
    left = plot("Loss, and its mean", "loss, nats per unit of loss weight", losses, True, "minutes")
    right = plot("Scores", "share, of scenes that it has never seen", lines, False, "minutes")
    save_svg(out, 840, 280, "Stage 1 of the small model, from random weights", [
        f'<g transform="translate(0 46)">{left}</g><g transform="translate(420 46)">{right}{"".join(names)}</g>'])


def tree(out, cell=7, left=336, top=62):
    """The mask of a small sequence: an image with two branches, and a text beside it."""
    shapes = [("red", "star", 0.25, 0.7), ("purple", "star", 0.4, 0.25), ("yellow", "circle", 0.75, 0.65)]
    points = [dict(x=x, y=y, id=i) for i, (_, _, x, y) in enumerate(shapes[:2])]
    records = [
        dict(image="scene.png", width=96, height=96, annotations=[
            dict(task="counting", prompt="Count the shapes.", answer=str(len(shapes))),
            dict(task="image_pointing", prompt="Point to the stars.", points=points)]),
        dict(annotations=[dict(task="text", prompt="What is 3 plus 4?", answer="7")])]
    planner = Planner(TOKENIZER, SMALL, seq_len=100)
    plans = [planner.plan(parse_record(json.dumps(record).encode()), ".", random.Random(0))[0][0] for record in records]
    T = sum(plan.n_tokens for plan in plans)
    ids, *_ = decode(plans, SMALL, T, load=lambda *_: np.zeros((1, SMALL.patches, 1), np.uint8))  # no pixel is needed
    tokens, example, branch = (torch.from_numpy(ids[name]) for name in ("tokens", "example", "branch"))
    place = torch.arange(T)
    sees = may_attend(place[:, None], place, example, branch, is_vision(tokens, SMALL.vocab)).numpy()  # (T, T)

    parts = [text(left, top - 8, "Each token, a row, sees the coloured ones, the columns.", "pale"),
             text(left + T * cell + 16, top + T * cell - 3, "learned", "pale"),
             box(left, top, T * cell, T * cell, "pale", 0.1)]
    # the image, which is the same on a dark page
    parts.append(f'<rect x="{left - 122}" y="{top + 24}" width="100" height="100" style="fill: #c3c7cb"/>')
    for colour, shape, x, y in shapes:
        corners = (toy.outline(shape, 16, 0.1) + (left - 122 + 100 * x, top + 24 + 100 * y)).round(1)
        points = " ".join(map(str, corners.ravel()))
        parts.append(f'<polygon points="{points}" style="fill: {colour}; stroke: #111; stroke-width: 2"/>')
    groups = [("pale", 1, (0,), "The trunk: an image"), ("c0", 1, (1,), "Branch 1: Count the shapes."),
              ("c1", 1, (2,), "Branch 2: Point to the stars."), ("c2", 2, (0, 1), "A text: What is 3 plus 4?")]
    for colour, e, branches, name in groups:
        group = (ids["example"] == e) & np.isin(ids["branch"], branches)
        (begin, end), = spans(group)
        y = top + begin * cell
        parts += [box(left - 12, y, 5, (end - begin) * cell - 1, colour), text(left - 22, y + 12, name, colour, "end")]
        for row in range(T):
            for first, last in spans(sees[row] & group):
                parts.append(box(left + first * cell, top + row * cell, (last - first) * cell, cell, colour))
        for first, last in spans(group & (ids["weights"] > 0)):  # its last target ends the answer
            parts += [box(left + T * cell + 6, top + first * cell, 5, (last - first) * cell - 1, colour),
                      text(left - 22, y + 30, TOKENIZER.decode(ids["targets"][first:last - 1].tolist()), "code", "end")]
    lines = "".join(f"M{left + k * cell},{top}v{T * cell}M{left},{top + k * cell}h{T * cell}" for k in range(T + 1))
    parts.append(f'<path d="{lines}" class="bare" style="stroke-width: 1"/>')
    save_svg(out, left + T * cell + 80, top + T * cell + 20, "A message tree in a sequence, and its mask", parts)


def packed(out, n=8, left=16, token=1.5):
    """The first sequences of the small model's stage 2; below the first one, what is learned. token: its pixels."""
    cfg = pretrain.parse(sft.DEFAULTS, sft.PRESETS, [])
    planner = Planner(TOKENIZER, SMALL, cfg.seq_len, max_frames=cfg.max_frames, max_crops=cfg.max_crops)
    stream = Stream(pretrain.open_data(cfg)[0], planner, cfg.seed)
    sequences = [packed.plans for packed in itertools.islice(stream.sequences(), n)]
    parts = [text(left + 440, 55, "solid: the media; pale: questions and answers", "pale")]
    for k, name in enumerate(("an image", "a clip", "a text", "two images")):
        parts += [box(left + 110 * k, 45, 10, 10, f"c{k}"), text(left + 110 * k + 15, 55, name, "pale")]
    y = 68
    for k, plans in enumerate(sequences):
        height = 14 if k else 44
        x = left
        parts.append(box(x, y, cfg.seq_len * token, height, "pale", 0.15))
        for plan in plans:
            colour = "c2"  # text
            if plan.media:
                colour = "c1" if plan.media[0][1].times else "c3" if len(plan.media) > 1 else "c0"
            for b in range(plan.branch.max() + 1):
                for begin, end in spans(plan.branch == b):
                    width = (end - begin) * token - 0.5
                    parts.append(box(x + begin * token, y, width, height, colour, 0.45 if b else 1))
            for begin, end in spans(plan.weights > 0) if k == 0 else ():
                parts.append(box(x + begin * token, y + height + 3, (end - begin) * token, 4, colour))
            x += plan.n_tokens * token
            parts.append(box(x - 1, y, 1, height, "bare"))
        y += height + 4 if k else height + 36
    parts.append(text(left, 134, "Learned of the first one: the answers. The others:", "pale"))
    plans = sum(sequences, [])
    fill = sum(plan.n_tokens for plan in plans) / (n * cfg.seq_len)
    parts.append(text(left, y + 14, f"{len(plans)} examples fill {fill:.1%}. As many sequences with one example each "
                      f"would be filled to {fill * n / len(plans):.0%}."))
    title = f"{n} sequences of {cfg.seq_len} tokens, as stage 2 packs them"
    save_svg(out, round(cfg.seq_len * token) + 2 * left, y + 30, title, parts)


def landscape(w, h):
    """A picture to cut up: the sun over some hills, (h, w, 3) uint8."""
    y, x = np.mgrid[0:h, 0:w][..., None] / h  # (h, w, 1) each
    image = np.array([70, 130, 205]) * (1 - y) + np.array([255, 215, 165]) * y
    sun = np.exp(-((x - 1.1) ** 2 + (y - 0.3) ** 2) / 0.012).clip(0, 0.6) / 0.6
    image = image * (1 - sun) + np.array([255, 250, 225]) * sun
    for k, colour in enumerate([(150, 165, 190), (105, 130, 140), (60, 100, 80), (30, 62, 45)]):
        ridge = 0.5 + 0.13 * k + 0.07 * np.sin(x * (3 + 1.3 * k) + 2 * k) + 0.02 * np.sin(x * (13 + 4 * k) + k)
        image = np.where(y > ridge, np.array(colour) * (1 + 0.5 * (y - ridge)), image)
    return image.clip(0, 255).astype(np.uint8)


def crops(out, side=189, gap=8, left=232, top=58):
    """A picture as Molmo2 gets it: crops, and in each the windows of patches that become one token."""
    cfg = PRESETS["8b"]
    n = cfg.crop // cfg.patch
    photo = landscape(900, 600)
    layout = image_layout(900, 600, n, cfg.patch, 8)
    rows, columns = layout.tiling
    pixels = image_crops(photo, n, cfg.patch, layout.tiling).reshape(-1, n, n, cfg.patch, cfg.patch, 3)
    pixels = pixels.swapaxes(2, 3).reshape(-1, cfg.crop, cfg.crop, 3)
    page = Image.new("RGB", (left + columns * (side + gap) + 8, top + rows * (side + gap) + 62), "white")
    pen = ImageDraw.Draw(page, "RGBA")
    page.paste(Image.fromarray(photo).resize((side, side * 2 // 3)), (16, top))
    corners = [(16, top + side * 2 // 3 + 40)]  # of the crops: the low-resolution one, then the others
    for row, column in np.ndindex(rows, columns):
        corners.append((left + column * (side + gap), top + row * (side + gap)))
    for crop, corner in zip(pixels, corners):
        page.paste(Image.fromarray(crop).resize((side, side), Image.LANCZOS), corner)

    patch = side / n
    i = np.arange(len(pixels) * n ** 2)  # patches
    places = np.array(corners)[i // n ** 2] + np.stack([i % n, i // n % n], 1) * patch  # (patches, 2)
    for x, y in places[~np.isin(i, layout.pool)]:
        pen.rectangle([x, y, x + patch - 1, y + patch - 1], (255, 255, 255, 150))
    for window in layout.pool:
        for crop in np.unique(window[window >= 0] // n ** 2):  # a window may lie over the edge of two crops
            part = places[window[window // n ** 2 == crop]]
            pen.rectangle([*part.min(0), *(part.max(0) + patch)], None, (255, 255, 255, 110))
    low = (n + 1) // 2
    write = lambda x, y, words: pen.text((x, y), words, "#1f2328", font_size=13)
    write(16, 14, f"A picture becomes {len(pixels)} crops of {cfg.crop} x {cfg.crop} pixels")
    write(16, top - 20, "the picture, 900 x 600")
    write(16, corners[0][1] - 20, f"all of it: {low} x {low} tokens")
    write(left, top - 20, f"{rows} x {columns} crops that overlap: {len(layout.pool) - low ** 2:,} tokens")
    write(16, page.height - 44, f"A square is a token: what 2 x 2 patches of {cfg.patch} x {cfg.patch} pixels show.")
    write(16, page.height - 24, "What is pale is taken from the neighbour, in which it lies further inside.")
    page.save(out, quality=88, subsampling=0)


def exchange(rank, folder):
    """Save what one of two ranks holds of 4 heads and 8 tokens before, in and after attention: 8 · head + token."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    tokens = ulysses.shard_batch(dict(tokens=torch.arange(8)[None]), -1, rank, 2)["tokens"]  # (1, T/P)
    before = (8 * torch.arange(4)[:, None] + tokens)[None, ..., None]  # (1, H, T/P, 1)
    during = ulysses.all_to_all(before, None)
    after = ulysses.all_to_all(during, None, back=True)
    for name, x in dict(before=before, during=during, after=after).items():
        np.save(os.path.join(folder, f"{name}{rank}.npy"), x[0, :, :, 0].numpy())
    dist.destroy_process_group()


def ulysses_exchange(out, cell=26):
    """Heads for tokens and back, on two ranks."""
    stations = dict(before=(90, "half of the tokens, all heads"), during=(310, "all tokens, half of the heads"),
                    after=(634, "as before"))
    tops = (84, 246)  # of the ranks
    parts = [text(310, 375, "between the exchanges: attention, as on one device", "pale")]
    for rank, piece in np.ndindex(2, 2):  # its tokens with the heads of rank `piece`
        x = stations["during"][0] + (4 * rank + 2) * cell
        y = tops[piece] + (3 * cell + 3 if rank else cell - 5)
        bend = y + (34 if rank else -34)
        for side, turn in ((stations["before"][0] + 4 * cell + 3, 80), (stations["after"][0] - 5, -80)):
            begin = tops[rank] + (2 * piece + 1) * cell
            parts.append(f'<path class="c{rank}" d="M{side},{begin}C{side + turn},{begin} {x},{bend} {x},{y}"/>')
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(exchange, (folder,), 2, start_method="forkserver")
        for rank, name in itertools.product((0, 1), stations):
            left, words = stations[name]
            top = tops[rank] + (cell if name == "during" else 0)
            parts += [text(16, tops[rank] + 2 * cell + 4, f"rank {rank}"), text(left, 62, words, "pale")]
            for (row, column), number in np.ndenumerate(np.load(os.path.join(folder, f"{name}{rank}.npy"))):
                head, token = divmod(int(number), 8)
                x, y = left + column * cell, top + row * cell
                solid = head < 2
                parts += [box(x, y, cell - 2, cell - 2, f"c{token // 4}", 1 if solid else 0.3),
                          text(x + 12, y + 17, f"{'abcd'[head]}{token}", "bare code" if solid else "code", "middle")]
    save_svg(out, 770, 395, "Ulysses: two ranks exchange heads, a to d, for tokens, 0 to 7, and back", parts)


def write_figures(runs, out):
    """Write all pictures into a folder, which is returned. runs: a folder with the runs pretrain and sft."""
    sheets = sorted(glob.glob(os.path.join(glob.escape(runs), "pretrain", "samples", "*.png")))
    if not sheets or not os.path.exists(os.path.join(runs, "sft", "latest")):
        raise UserError(f"--figures {runs}: must hold the runs pretrain and sft of the toy world, as out/small does")
    os.makedirs(out, exist_ok=True)
    scores(os.path.join(runs, "pretrain"), os.path.join(out, "scores.svg"))
    tree(os.path.join(out, "tree.svg"))
    packed(os.path.join(out, "packed.svg"))
    crops(os.path.join(out, "crops.jpg"))
    ulysses_exchange(os.path.join(out, "ulysses.svg"))
    Image.open(sheets[-1]).quantize(128).save(os.path.join(out, "toy.png"), optimize=True)  # a third of the bytes
    clip = os.path.join(toy.FOLDER, "clips", "eval", "video", "00024.mp4")
    said = "".join(sample.Chat(*sample.load(os.path.join(runs, "sft", "latest")), [clip]).ask("Track the red circle."))
    _, sheet = draw("video", [clip], points_of(said, "video"), os.path.join(out, "track.gif"))
    os.remove(sheet)
    return out
