"""
Ask a checkpoint about a picture. The answer is printed as it is written; points in it are drawn onto a copy of the picture.

    python sample.py out/small/pretrain/latest data/toy/eval/images/00000.png "Point to all shapes."
    python sample.py weights/Molmo2-8B kitchen.jpg "Point to the mugs." --out mugs.png --device cuda
"""
import argparse
import colorsys
import os
import sys

import torch
from PIL import Image, ImageDraw

from data import BadRow, Planner, parse_points, prompt_batch, to_device
from media import BadMedia, load_image
from model import Molmo2
from points import Tokenizer
from weights import BadCheckpoint


def load(folder, device="cpu", tiles=None):
    """(model in eval mode, planner for questions) of a checkpoint folder. tiles: high-resolution crops per picture; by
    default 8, or none for a model too small to have seen any."""
    model = Molmo2.from_pretrained(folder).to(device)
    tokenizer = Tokenizer(os.path.join(folder, "tokenizer.json"), model.cfg.vocab)
    tiles = tiles if tiles is not None else 8 if model.cfg.crop >= 378 else 0
    return model, Planner(tokenizer, model.cfg, model.cfg.max_positions, tiles)


def ask(model, planner, picture, question, max_new_tokens=256, temperature=0.0, seed=0):
    """Yields the answer piece by piece. picture: path."""
    row = dict(image=os.path.basename(picture), annotations=[])
    plan = planner.question(row, os.path.dirname(os.path.abspath(picture)), [dict(role="user", content=question)])
    batch, failed = prompt_batch([plan], planner.cfg)
    if failed:
        raise BadMedia(failed[0].lstrip(": "))
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tok, ids, said = planner.tokenizer, [], ""
    for new in model.generate(**to_device(batch, device), max_new_tokens=max_new_tokens, temperature=temperature, stop=(tok.eos,),
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
        pen.text((x + r, y + r / 2), str(p["id"]), "white", stroke_width=2, stroke_fill="black", font_size=2.4 * r)
    return image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder with config.json, model.safetensors and tokenizer.json")
    parser.add_argument("picture", help="PNG, JPEG, WebP, GIF, BMP or TIFF")
    parser.add_argument("question")
    parser.add_argument("--out", default="answer.png", help="where the picture with the points goes [answer.png]")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="length limit of the answer [256]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = always the likeliest token [0]")
    parser.add_argument("--seed", type=int, default=0, help="for temperatures above 0 [0]")
    parser.add_argument("--tiles", type=int, help="high-resolution crops [8; none for small]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps [cpu]")
    args = parser.parse_args()
    try:
        pixels = load_image(args.picture)
        model, planner = load(args.checkpoint, args.device, args.tiles)
        answer = ""
        for piece in ask(model, planner, args.picture, args.question, args.max_new_tokens, args.temperature, args.seed):
            print(piece, end="", flush=True)
            answer += piece
        print()
        points = parse_points(answer, "image")
        if points:
            draw_points(pixels, points).save(args.out)
            print(f"{len(points)} point{'s' * (len(points) > 1)} drawn into {args.out}")
    except (BadCheckpoint, BadMedia, BadRow, OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
