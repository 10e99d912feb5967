"""
Ask a checkpoint about a picture or a video. The answer is printed as it is written; points in it are drawn
onto a copy.

    python sample.py out/small/pretrain/latest data/toy/eval/images/00003.png "Point to all shapes."
    python sample.py weights/Molmo2-8B kitchen.jpg "Point to the mugs." --out mugs.png --device cuda
    python sample.py weights/Molmo2-8B clip.mp4 "Track the red cup." --out answer.mp4
"""
import argparse
import colorsys
import os
import sys

import av
import numpy as np
import torch
from PIL import Image, ImageDraw

from data import BadRow, Planner, parse_points, prompt_batch, to_device
from media import BadMedia, load_frames, load_image, open_image
from model import Molmo2
from points import Tokenizer
from weights import BadCheckpoint

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".ogv")


def load(folder, device="cpu", tiles=None, max_frames=128):
    """(model in eval mode, planner for questions) of a checkpoint folder. tiles: high-resolution crops per
    picture; by default 8, or none for a model too small to have seen any. max_frames: of a video."""
    model = Molmo2.from_pretrained(folder).to(device)
    tokenizer = Tokenizer(os.path.join(folder, "tokenizer.json"), model.cfg.vocab)
    tiles = tiles if tiles is not None else 8 if model.cfg.crop >= 378 else 0
    return model, Planner(tokenizer, model.cfg, model.cfg.max_positions, tiles, max_frames=max_frames)


def question(planner, path, text):
    """(kind, plan) of a question about the picture or video at `path`; kind is "image" or "video"."""
    try:
        open_image(path).close()
        kind = "image"
    except BadMedia as e:
        if not os.path.splitext(path)[1].lower() in VIDEOS:
            raise BadMedia(f"{e}; a video is known by its ending: {' '.join(VIDEOS)}") from None
        kind = "video"
    row = {kind: os.path.basename(path), "annotations": []}
    return kind, planner.question(row, os.path.dirname(os.path.abspath(path)),
                                  [dict(role="user", content=text)])


def ask(model, planner, plan, max_new_tokens=256, temperature=0.0, seed=0):
    """Yields the answer piece by piece. plan: of a `question`."""
    batch, failed = prompt_batch([plan], planner.cfg)
    if failed:
        raise BadMedia(failed[0][3])
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tok, ids, said = planner.tokenizer, [], ""
    for new in model.generate(**to_device(batch, device), max_new_tokens=max_new_tokens,
                              temperature=temperature, stop=(tok.eos,),
                              generator=generator):
        if int(new) == tok.eos:
            break
        ids.append(int(new))
        text = tok.decode(ids)
        if not text.endswith("\ufffd"):  # half a character: wait for the rest of its bytes
            yield text[len(said):]
            said = text
    yield tok.decode(ids)[len(said):]


def colour_of(i):
    """A colour per id, neighbours far apart."""
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(i * 0.381966 % 1, 0.9, 1.0))


def draw_points(pixels, points):
    """A copy of a picture (H, W, 3) with its points drawn, numbered by id: PIL image."""
    image = Image.fromarray(pixels)
    scale = max(1, round(360 / min(image.size)))  # small pictures are enlarged until a number can be read
    image = image.resize((image.width * scale, image.height * scale), Image.NEAREST)
    pen, r = ImageDraw.Draw(image), max(min(image.size) / 60, 5)
    for p in points:
        x, y = p["x"] * image.width, p["y"] * image.height
        pen.ellipse([x - r, y - r, x + r, y + r], colour_of(p["id"]), "black", max(int(r / 4), 1))
        pen.text((x + r, y + r / 2), str(p["id"]), "white", stroke_width=2, stroke_fill="black",
                 font_size=2.4 * r)
    return image


def draw_video(path, times, points, out):
    """Write the frames the model saw to `out`, two a second, each with the points of its time: the nearest
    frame's."""
    nearest = lambda p: min(range(len(times)), key=lambda i: abs(times[i] - p.get("t", 0)))
    drawn = [draw_points(f, [p for p in points if nearest(p) == i])
             for i, f in enumerate(load_frames(path, times))]
    with av.open(out, "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height = (n // 2 * 2 for n in drawn[0].size)
        stream.bit_rate, stream.pix_fmt = 4_000_000, "yuv420p"
        for image in drawn:
            frame = np.asarray(image)[:stream.height, :stream.width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame),
                                                                   format="rgb24")))
        container.mux(stream.encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder with config.json, model.safetensors and tokenizer.json")
    parser.add_argument("media",
                        help=f"picture (PNG, JPEG, WebP, GIF, BMP or TIFF) or video ({' '.join(VIDEOS)})")
    parser.add_argument("question")
    parser.add_argument("--out", help="where the copy with the points goes [answer.png, answer.mp4]")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="length limit of the answer [256]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = always the likeliest token [0]")
    parser.add_argument("--seed", type=int, default=0, help="for temperatures above 0 [0]")
    parser.add_argument("--tiles", type=int, help="high-resolution crops [8; none for small]")
    parser.add_argument("--max_frames", type=int, default=128, help="of a video, at 2 per second [128]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps [cpu]")
    args = parser.parse_args()
    try:
        model, planner = load(args.checkpoint, args.device, args.tiles, args.max_frames)
        kind, plan = question(planner, args.media, args.question)
        answer = ""
        for piece in ask(model, planner, plan, args.max_new_tokens, args.temperature, args.seed):
            print(piece, end="", flush=True)
            answer += piece
        print()
        points = parse_points(answer, kind)
        out = args.out or ("answer.png" if kind == "image" else "answer.mp4")
        if points and kind == "image":
            draw_points(load_image(args.media), points).save(out)
        elif points:
            draw_video(args.media, plan.media[0][1].times, points, out)
        if points:
            print(f"{len(points)} point{'s' * (len(points) > 1)} drawn into {out}")
    except (BadCheckpoint, BadMedia, BadRow, OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
