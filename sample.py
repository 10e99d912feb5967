"""
Ask a checkpoint about pictures or a video. The answer is printed as it is written; points and tracks in it
are drawn.

    python sample.py out/small/pretrain/latest data/toy/eval/images/00003.png "Point to all shapes."
    python sample.py out/small/sft/latest data/toy/clips/eval/video/00003.mp4 "Track the star." --out answer.mp4
    python sample.py weights/Molmo2-8B kitchen.jpg hall.jpg "Point to the mugs in all images." --device cuda
    python sample.py weights/Molmo2-8B clip.mp4 "What happens?" --chat     # and go on; the video is encoded once
"""
import argparse
import colorsys
import itertools
import math
import os
import sys

import av
import numpy as np
import torch
from PIL import Image, ImageDraw

from data import Planner, collate, decode, parse_points, to_device
from lib.media import BadMedia, load_frames, load_image, open_image, video_duration
from lib.records import BadRecord
from lib.text import Tokenizer
from lib.weights import BadCheckpoint, read_json
from model import Molmo2


VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".ogv")


def load(folder, device="cpu", tiles=None, max_frames=None, usual_tiles=8):
    """(model in eval mode, planner for questions) of a checkpoint folder. tiles: high-resolution crops per
    picture; by default the usual ones, or none for a model too small to have seen any. max_frames: of a video; by
    default as many as in training, at most 128."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:  # as torch says that there is no such device
        raise ValueError(f"--device {device}: {str(e).splitlines()[0]}") from None
    model = Molmo2.from_pretrained(folder).to(device)
    tokenizer = Tokenizer(os.path.join(folder, "tokenizer.json"), model.cfg.vocab)
    tiles = tiles if tiles is not None else usual_tiles if model.cfg.crop >= 378 else 0
    if max_frames is None:
        path = os.path.join(folder, "video_preprocessor_config.json")
        told = read_json(path).get("num_frames") if os.path.exists(path) else None
        max_frames = min(told, 128) if isinstance(told, int) and told > 0 else 128
    return model, Planner(tokenizer, model.cfg, model.cfg.max_positions, tiles, max_frames=max_frames)


class Chat:
    """Questions about the same media, one after the other. kind: "image", "images" or "video"."""

    def __init__(self, model, planner, paths):
        self.model, self.planner, self.messages, self.features = model, planner, [], None
        self.folder = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in paths])
        names = [os.path.relpath(os.path.abspath(p), self.folder) for p in paths]
        try:
            for p in paths:
                open_image(p).close()
            self.kind = "image" if len(paths) == 1 else "images"
        except BadMedia as e:
            if len(paths) > 1 or os.path.splitext(paths[0])[1].lower() not in VIDEOS:
                raise BadMedia(f"{e}; a video is known by its ending: {' '.join(VIDEOS)}, "
                               "and asked about alone") from None
            self.kind = "video"
        self.row = {self.kind: names if self.kind == "images" else names[0], "annotations": []}

    def ask(self, text, max_new_tokens=256, temperature=0.0, seed=0):
        """Yields the answer piece by piece. What the pictures look like is worked out at the first question
        only."""
        self.messages.append(dict(role="user", content=text))
        plan = self.planner.question(self.row, self.folder, self.messages)
        if self.features is None or len(self.features) != sum(len(layout.pool) for _, layout in plan.media):
            batch, failed = prompt_batch([plan], self.planner.cfg)
            if failed:
                raise BadMedia(failed[0][3])
            self.batch = to_device(batch, self.model.lm_head.weight.device)
            with torch.inference_mode():
                self.features = self.model.vision_backbone(self.batch["crops"], self.batch["pool"])
        device, tok, ids, said = self.features.device, self.planner.tokenizer, [], ""
        tokens, pos = (torch.from_numpy(x)[None].to(device) for x in (plan.tokens, plan.pos))
        branch = torch.from_numpy(plan.branch)[None].to(device)
        generator = torch.Generator(device).manual_seed(seed)
        for new in self.model.generate(tokens, None, self.batch["pool"], max_new_tokens, temperature,
                                       (tok.eos,), pos, branch=branch, generator=generator,
                                       features=self.features):
            if int(new) == tok.eos:
                break
            ids.append(int(new))
            text = tok.decode(ids)
            if not text.endswith("\ufffd"):  # half a character: wait for the rest of its bytes
                yield text[len(said):]
                said = text
        text = tok.decode(ids)
        self.messages.append(dict(role="assistant", content=text))
        yield text[len(said):]


# ---- drawing -----------------------------------------------------------------------------------------------

def colour_of(i):
    """A colour per id, neighbours far apart."""
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(i * 0.381966 % 1, 0.9, 1.0))


def draw_points(pixels, points, trails=(), side=640):
    """A copy of a picture (H, W, 3) with its points drawn, numbered by id, and trails: [(id, [(x, y)])]. PIL
    image whose longer side is `side`, or as it is if it is larger than twice that."""
    image = Image.fromarray(pixels)
    longest = max(image.size)  # small pictures are enlarged until a number can be read
    scale = side // longest if longest < side else side / longest if longest < 2 * side else 1
    image = image.resize([max(round(n * scale), 2) for n in image.size],
                         Image.NEAREST if scale > 1 else Image.BILINEAR)
    pen, r = ImageDraw.Draw(image), max(min(image.size) / 40, 5)
    for i, places in trails:
        line = [(x * image.width, y * image.height) for x, y in places]
        if len(line) > 1:
            pen.line(line, "black", max(int(r * 0.7), 3), joint="curve")
            pen.line(line, colour_of(i), max(int(r * 0.4), 1), joint="curve")
    for p in points:
        x, y = p["x"] * image.width, p["y"] * image.height
        pen.ellipse([x - r, y - r, x + r, y + r], colour_of(p["id"]), "black", max(int(r / 4), 1))
        pen.text((x + r, y + r / 2), str(p["id"]), "white", stroke_width=2, stroke_fill="black",
                 font_size=2.4 * r)
    return image


def at_time(points, t, gap=1.0):
    """Where tracks are at t: between two points of one id at most `gap` seconds apart, on the line between
    them."""
    out = []
    for i in sorted({p["id"] for p in points}):
        track = sorted((p for p in points if p["id"] == i and "t" in p), key=lambda p: p["t"])
        before, after = [p for p in track if p["t"] <= t + 1e-6][-1:], [p for p in track if p["t"] > t + 1e-6][:1]
        if before and t - before[0]["t"] < 0.25 and not (after and after[0]["t"] - before[0]["t"] <= gap):
            out.append(before[0])  # a moment is shown for a quarter of a second
        elif before and after and after[0]["t"] - before[0]["t"] <= gap:
            (a,), (b,) = before, after
            s = (t - a["t"]) / (b["t"] - a["t"])
            out.append(dict(a, x=a["x"] + s * (b["x"] - a["x"]), y=a["y"] + s * (b["y"] - a["y"])))
    return out


def ways(past, i):
    """The ways of an id over some moments, [[(x, y)]]: a new one after each time it was away."""
    out = [[]]
    for now in past:
        here = [(p["x"], p["y"]) for p in now if p["id"] == i]
        if here:
            out[-1] += here
        elif out[-1]:
            out.append([])
    return out


def draw_video(path, points, out, rate=10):
    """Write the video to `out` at `rate` frames a second with its points, each with the way it came in the
    last two seconds; and beside it a sheet of up to twelve moments, OUT.png."""
    length = video_duration(path)
    times = np.arange(0, length, 1 / rate)
    # a point belongs to the frame nearest to its time, so that the frame shows it; what is said later than the end is
    # not drawn
    points = [dict(p, t=min(round(p["t"] * rate), len(times) - 1) / rate) for p in points
              if p.get("t", math.inf) < length + 1 / rate]
    moments = sorted({round(p["t"] * rate) for p in points}) or [0]
    moments = [moments[round(k * (len(moments) - 1) / 11)] for k in range(12)] if len(moments) > 12 else moments
    seen = [at_time(points, t) for t in times]
    sheet, ids = {}, sorted({p["id"] for p in points})
    with av.open(out, "w") as container:
        stream = container.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
        for k, (t, pixels) in enumerate(zip(times, load_frames(path, times))):
            past = seen[max(k - 2 * rate, 0):k + 1]
            image = draw_points(pixels, seen[k], [(i, way) for i in ids for way in ways(past, i)])
            image = image.crop((0, 0, image.width // 2 * 2, image.height // 2 * 2))  # yuv420p halves them
            if not k:
                (stream.width, stream.height), stream.bit_rate, stream.pix_fmt = image.size, 4_000_000, "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
            if k in moments:
                sheet[k] = image.resize((image.width // 2, image.height // 2))
                ImageDraw.Draw(sheet[k]).text((4, 2), f"{t:.1f} s", "white", stroke_width=2,
                                              stroke_fill="black",
                                              font_size=16)
        container.mux(stream.encode())
    w, h = next(iter(sheet.values())).size
    page = Image.new("RGB", (w * min(len(sheet), 4), h * -(-len(sheet) // 4)), "white")
    for k, image in enumerate(sheet.values()):
        page.paste(image, (k % 4 * w, k // 4 * h))
    page.save(out + ".png")


def draw(kind, paths, points, out):
    """Draw the points of an answer; returns the files written."""
    if kind == "video":
        draw_video(paths[0], points, out)
        return [out, out + ".png"]
    files = [out] if kind == "image" else [f"{os.path.splitext(out)[0]}_{k}.png" for k in range(len(paths))]
    for k, (path, file) in enumerate(zip(paths, files)):
        draw_points(load_image(path), [p for p in points if p.get("image", k) == k]).save(file)
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder with config.json, model.safetensors and tokenizer.json")
    parser.add_argument("media", nargs="+",
                        help=f"pictures (PNG, JPEG, WebP, GIF, BMP, TIFF) or one video ({' '.join(VIDEOS)})")
    parser.add_argument("question")
    parser.add_argument("--chat", action="store_true",
                        help="then go on asking, a line at a time, about the same media")
    parser.add_argument("--out", help="where the copy with the points goes [answer.png, answer.mp4]")
    parser.add_argument("--max_new_tokens", type=int,
                        help="length limit of the answer [256; of a video 2048]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = always the likeliest token [0]")
    parser.add_argument("--seed", type=int, default=0, help="for temperatures above 0 [0]")
    parser.add_argument("--tiles", type=int, help="high-resolution crops [8; none for small]")
    parser.add_argument("--max_frames", type=int,
                        help="of a video, at 2 per second [as in training, at most 128]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps [cpu]")
    args = parser.parse_args()
    try:
        chat = Chat(*load(args.checkpoint, args.device, args.tiles, args.max_frames), args.media)
        out = args.out or ("answer.mp4" if chat.kind == "video" else "answer.png")
        longest, question = args.max_new_tokens or (2048 if chat.kind == "video" else 256), args.question
        while question:
            answer = ""
            for piece in chat.ask(question, longest, args.temperature, args.seed):
                print(piece, end="", flush=True)
                answer += piece
            print()
            points = parse_points(answer, chat.kind)
            if points:
                files = draw(chat.kind, args.media, points, out)
                print(f"{len(points)} point{'s' * (len(points) > 1)} drawn into {' and '.join(files)}")
            question = input("> ").strip() if args.chat else None
    except (EOFError, KeyboardInterrupt):
        print()
    except (BadCheckpoint, BadMedia, BadRecord, OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


def prompt_batch(plans, cfg):
    """Questions as one batch for `Molmo2.generate`, one per row, padded on the right."""
    longest = max(p.n_tokens for p in plans)
    rows = [decode([p], cfg, longest) for p in plans]
    batch, failed = collate(rows), [f for *_, failed in rows for f in failed]
    return {k: batch[k] for k in ("tokens", "crops", "pool", "pos", "example", "branch")}, failed


def answer(model, planner, plans, max_new_tokens):
    """Greedy answers to a batch of questions: (texts, events of media that failed to decode)."""
    batch, failed = prompt_batch(plans, planner.cfg)
    tok, batch = planner.tokenizer, to_device(batch, model.lm_head.weight.device)
    ids = torch.stack(list(model.generate(**batch, max_new_tokens=max_new_tokens, stop=(tok.eos,))), 1).tolist()
    return [tok.decode(row[:row.index(tok.eos)] if tok.eos in row else row) for row in ids], failed


def answers(model, planner, asked, limit, batch=32, world=None):
    """Greedy answers to [(task, file:line, row, folder, prompt)], in order; limit(task): tokens. Questions of a task go
    together, as their answers end at about the same time; the ranks of a `world` share them. Media that cannot be
    decoded are an error."""
    order, texts = sorted(range(len(asked)), key=lambda i: asked[i][0]), [None] * len(asked)
    parts = [group[k:k + batch] for _, g in itertools.groupby(order, key=lambda i: asked[i][0])
             for group in [list(g)] for k in range(0, len(group), batch)]
    for part in parts[world.rank::world.size] if world else parts:
        plans = [planner.question(row, folder, [dict(role="user", content=prompt)])
                 for _, _, row, folder, prompt in (asked[i] for i in part)]
        for plan, i in zip(plans, part):
            plan.where = asked[i][1]
        room = planner.seq_len - max(p.n_tokens for p in plans)
        said, failed = answer(model, planner, plans, min(limit(asked[part[0]][0]), room))
        if failed:
            raise BadMedia(f"{failed[0][1]}: {failed[0][3]}")
        for i, text in zip(part, said):
            texts[i] = text
    return [next(t for t in of if t is not None) for of in zip(*world.all_gather(texts))] if world else texts


if __name__ == "__main__":
    main()
