"""
The embedded default data: a drawn world of coloured shapes, written once as real PNG and JPEG files and
JSONL, in the very form in which users write their own (README). A model that starts from nothing learns to
describe it, to count in it and to point at things in it within minutes on a laptop, and nothing has to be
downloaded.

    data/toy/captions.jsonl  points.jsonl  text.jsonl     what stage 1 trains on
    data/toy/eval/scenes.jsonl  geometry.json             held-out scenes, and the exact outline of every shape in them

    python toy.py data/toy       # write it (pretrain.py does so by itself on first use)

Nothing can be answered without looking: colour, shape, size, angle, place, number, background and wording are
all drawn at random, and queries for what is not there name a colour or a shape that is. What makes it
learnable in minutes was measured:

- every shape has a dark outline. A model that starts from nothing knows no edges; without the line a circle differs from a
  star by the product of a colour and a contrast, and in 400 steps the shape was never learned at all;
- centres lie on a grid of 0.05, three pixels of what the model sees. Finer digits are noise to it, and noise in most of the
  tokens of an answer drowns the one that says "circle".
"""
import json
import math
import os
import random
import re
import shutil
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw

from data import prompt_batch, to_device
from points import NOTHING, format_points, parse_points

COLOURS = {"red": (214, 40, 40), "green": (38, 150, 60), "blue": (40, 80, 215), "yellow": (240, 205, 40),
           "purple": (150, 50, 180), "white": (246, 246, 246)}
SHAPES = ("circle", "star", "bar")
VERSION = 18  # part of the done-file: a toy world drawn by older code is drawn again


# ---- scenes -------------------------------------------------------------------------------------------------

def outline(shape, radius, angle):
    """Corner points of a shape around (0, 0), in the units of `radius`: (n, 2)."""
    if shape == "bar":
        corners = np.array([(-1.3, -0.35), (1.3, -0.35), (1.3, 0.35), (-1.3, 0.35)])
    else:  # corners around a circle, of one distance or of two in turn
        n, radii = {"circle": (32, (0.85, 0.85)), "star": (10, (1.25, 0.45))}[shape]
        corners = np.array([(radii[k % 2] * math.sin(2 * math.pi * k / n),
                             -radii[k % 2] * math.cos(2 * math.pi * k / n)) for k in range(n)])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return corners @ turn * radius


def draw_scene(rng):
    """One scene: {"size": (w, h), "objects": [{"colour", "shape", "x", "y", "polygon"}], ...}, left to right,
    in [0, 1]."""
    w, h = rng.randint(80, 128), rng.randint(80, 128)
    kinds = [(rng.choice(list(COLOURS)), rng.choice(SHAPES))
             for _ in range(rng.choice((1, 1, 1, 2, 2, 2, 3)))]
    for i in range(1, len(kinds)):  # several of a kind, so that "the red circles" is a question worth asking
        if rng.random() < 0.3:
            kinds[i] = kinds[rng.randrange(i)]
    at, tries = [], 0
    while len(at) < len(kinds):
        x, y, r = rng.randint(2, 18) / 20, rng.randint(2, 18) / 20, rng.uniform(0.18, 0.25) * min(w, h)
        # x apart too: "from left to right" is then clear
        if 1.1 * r < min(x * w, y * h, w - x * w, h - y * h) and all(
                math.hypot((x - a) * w, (y - b) * h) > 1.2 * (r + c) and abs(x - a) > 0.07 for a, b, c in at):
            at.append((x, y, r))
        tries += 1
        if tries % 60 == 0:  # no room left for the next one
            at = []
    objects = [dict(colour=colour, shape=shape, x=x, y=y,
                    polygon=(outline(shape, r, rng.uniform(-0.15, 0.15)) / (w, h) + (x, y)).round(4).tolist())
               for (colour, shape), (x, y, r) in zip(kinds, at)]
    return dict(size=(w, h), objects=sorted(objects, key=lambda o: (o["x"], o["y"])),
                look=rng.getrandbits(32))


def paint(scene):
    """Draw a scene: background (plain, gradient or noise), clutter that is no answer to anything, then the
    shapes."""
    (w, h), rng, big = scene["size"], np.random.default_rng(scene["look"]), 2
    base, tilt = rng.uniform(85, 165) + rng.uniform(-10, 10, 3), rng.uniform(-15, 15, (2, 1))
    y, x = np.mgrid[0:h, 0:w][..., None] / (h, w)[0]
    canvas = base + (tilt[0] * (x - 0.5) + tilt[1] * (y - 0.5)) * (rng.random() < 0.5)
    canvas = canvas + rng.normal(0, rng.uniform(0, 3), (h, w, 1))
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).resize((w * big, h * big), Image.NEAREST)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 4)):  # clutter: thin lines and specks, in muted colours
        colour = tuple(rng.integers(60, 190, 3).tolist())
        (a, b), (c, d) = rng.uniform(0, 1, (2, 2)) * (w * big, h * big)
        if rng.random() < 0.5:
            pen.line([a, b, c, d], colour, width=big)
        else:
            pen.ellipse([a - 2, b - 2, a + 2, b + 2], colour)
    for o in scene["objects"]:
        colour = np.array(COLOURS[o["colour"]]) + rng.uniform(-12, 12, 3)
        corners = [(px * w * big, py * h * big) for px, py in o["polygon"]]
        pen.polygon(corners, tuple(int(c) for c in colour.clip(0, 255)))
        pen.line(corners + corners[:2], (15, 15, 15), width=3 * big, joint="curve")
    return image.resize((w, h), Image.BOX)


def inside(polygon, x, y):
    """Whether (x, y) lies in a polygon, by counting the edges to its right."""
    hit = False
    for (x1, y1), (x2, y2) in zip(polygon, polygon[1:] + polygon[:1]):
        if (y1 > y) != (y2 > y) and x < (x2 - x1) * (y - y1) / (y2 - y1) + x1:
            hit = not hit
    return hit


# ---- what is asked about them -------------------------------------------------------------------------------

CAPTION_PROMPTS = ("Describe the image.", "What is in this picture?", "Write a caption.", "What do you see?",
                   "Tell me about this image.", "List the shapes from left to right.")
SHAPE_PROMPTS = ("What shapes are there?", "Which shapes do you see, from left to right?")
POINT_PROMPTS = ("Point to the {}.", "Where is the {}?", "Find the {}.", "Show me the {}.",
                 "Click on the {}.")
POINT_ALL_PROMPTS = ("Point to all {}.", "Where are the {}?", "Find every one of the {}.", "Mark the {}.",
                     "Point to the {}.")
COUNT_PROMPTS = ("How many {} are there?", "Count the {}.", "What is the number of {}?",
                 "How many {} can you see?")


def plural(name):
    return name + ("es" if name.endswith("s") else "s")


def listing(parts):
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def captions(rng, scene):
    """A description from left to right, and the shapes alone."""
    frame = rng.choice(("There is {}.", "From left to right: {}.", "The picture shows {}.", "I see {}."))
    names = listing([f"a {o['colour']} {o['shape']}" for o in scene["objects"]])
    return [dict(task="image_caption", prompt=rng.choice(CAPTION_PROMPTS), answer=frame.format(names)),
            dict(task="image_qa", prompt=rng.choice(SHAPE_PROMPTS),
                 answer=", ".join(o["shape"] for o in scene["objects"]) + ".")]


def select(scene, colour, shape):
    return [o for o in scene["objects"] if colour in (None, o["colour"]) and shape in (None, o["shape"])]


def pointing(rng, scene, colour, shape):
    """A query for all objects of a colour, a shape or both; None leaves one open."""
    found = select(scene, colour, shape)
    name = f"{colour or ''} {shape or 'shape'}".strip()
    one = len(found) == 1 or not found and rng.random() < 0.5
    label, prompts = (name, POINT_PROMPTS) if one else (plural(name), POINT_ALL_PROMPTS)
    points = [dict(x=o["x"], y=o["y"], id=i) for i, o in enumerate(found)]
    return dict(task="image_pointing", prompt=rng.choice(prompts).format(label), label=label, points=points)


def pointing_tree(rng, scene):
    """Branches: up to two kinds of shape, everything, a colour alone, a shape alone, and one kind that is not
    there."""
    kinds = sorted({(o["colour"], o["shape"]) for o in scene["objects"]})
    some, other = rng.choice(scene["objects"]), rng.choice(scene["objects"])
    queries = rng.sample(kinds, min(len(kinds), 2)) + [(None, None), (some["colour"], None),
                                                       (None, other["shape"])]
    c, s = rng.choice(kinds)
    near = [(c, x) for x in SHAPES] if rng.random() < 0.5 else [(x, s) for x in COLOURS]
    absent = [q for q in near if not select(scene, *q)]  # not there, but half of it is
    queries += [rng.choice(absent)] if absent else []
    return [pointing(rng, scene, *q) for q in queries]


def counting(rng, scene):
    """How many there are of everything, of a colour that is there and of one that may be, of a shape
    likewise."""
    some, other = rng.choice(scene["objects"]), rng.choice(scene["objects"])
    asked = [(None, None), (some["colour"], None), (None, other["shape"]), (rng.choice(list(COLOURS)), None),
             (None, rng.choice(SHAPES))]
    return [dict(task="counting",
                 prompt=rng.choice(COUNT_PROMPTS).format(plural(f"{c or ''} {s or 'shape'}".strip())),
                 answer=str(len(select(scene, c, s)))) for c, s in asked]


DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SIDES = {"triangle": "Three", "square": "Four", "pentagon": "Five", "hexagon": "Six", "circle": "None"}


def text_row(rng):
    """Text without a picture: sums, days, sides."""
    kind = rng.randrange(3)
    if kind == 0:
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        return f"What is {a} plus {b}?", str(a + b)
    if kind == 1:
        k, after = rng.randrange(7), rng.random() < 0.5
        return f"Which day comes {'after' if after else 'before'} {DAYS[k]}?", DAYS[(k + (1 if after else -1)) % 7] + "."
    shape = rng.choice(list(SIDES))
    return f"How many sides has a {shape}?", SIDES[shape] + "."


# ---- files --------------------------------------------------------------------------------------------------

def write_world(folder, scenes=4000, held_out=320, texts=1000, seed=0):
    """Write the toy world under `folder` unless it is there. An interrupted run leaves nothing that looks
    finished."""
    done = os.path.join(folder, "done.json")
    recipe = dict(version=VERSION, scenes=scenes, held_out=held_out, texts=texts, seed=seed)
    try:
        with open(done) as f:
            if json.load(f) == recipe:
                return folder
    except (OSError, ValueError):
        pass
    print(f"drawing the toy world: {scenes} scenes to train on, {held_out} held out -> {folder}", flush=True)
    aside = folder.rstrip("/") + f".{os.getpid()}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    for sub in ("images", "eval/images"):
        os.makedirs(os.path.join(aside, sub))
    seen, geometry, rows = set(), {}, {"captions": [], "points": [], "eval/scenes": []}
    for i in range(held_out + scenes):  # held-out scenes are drawn first; whatever repeats one is drawn again
        rng, retry = random.Random(f"toy {seed} scene {i}"), 0
        while True:
            scene = draw_scene(rng)
            look = tuple((o["colour"], o["shape"], o["x"], o["y"]) for o in scene["objects"])
            if scene["objects"] and look not in seen:
                break
        seen.add(look)
        name = f"images/{i:05d}.{'png' if rng.random() < 0.5 else 'jpg'}"
        folder_of = os.path.join(aside, "eval") if i < held_out else aside
        paint(scene).save(os.path.join(folder_of, name),
                          **({"compress_level": 1} if name.endswith("png") else {"quality": 92}))
        described = captions(rng, scene)
        points = pointing_tree(rng, scene) + counting(rng, scene)
        # known, so that no header need be read
        picture = dict(image=name, width=scene["size"][0], height=scene["size"][1])
        if i < held_out:
            rows["eval/scenes"].append(dict(id=f"held-out-{i}", **picture,
                                            annotations=described[:1] + points))
            geometry[f"held-out-{i}"] = scene["objects"]
        else:
            rows["captions"].append(dict(id=f"scene-{i}", **picture, annotations=described))
            rows["points"].append(dict(id=f"scene-{i}", **picture, annotations=points))
    rng = random.Random(f"toy {seed} text")
    rows["text"] = [dict(id=f"text-{i}", annotations=[dict(task="text", messages=[
        dict(role="user", content=q), dict(role="assistant", content=a)])]) for i in range(texts)
        for q, a in [text_row(rng)]]
    for name, lines in rows.items():
        with open(os.path.join(aside, name + ".jsonl"), "w") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines)
    for name, content in (("eval/geometry.json", geometry), ("done.json", recipe)):
        with open(os.path.join(aside, name), "w") as f:
            json.dump(content, f)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(aside, folder)
    return folder


# ---- evaluation: ask about held-out scenes, compare with their geometry -------------------------------------

def evaluate(model, planner, folder, n, sheet=None, batch=64):
    """Scores of generated answers about the first n held-out scenes, {name: share}; a contact sheet goes to
    `sheet`.

    point_hit: asked-for objects with a predicted point inside (each point used once); point_precision: points
    that hit; count_accuracy; none_accuracy: "There are none." where it is true; caption_recall: objects named
    by colour and shape.
    """
    with open(os.path.join(folder, "geometry.json")) as f:
        geometry = json.load(f)
    with open(os.path.join(folder, "scenes.jsonl")) as f:
        scenes = [json.loads(line) for line in f][:n]
    asked = [(s, a) for s in scenes for a in s["annotations"]]
    asked.sort(key=lambda sa: sa[1]["task"])  # answers of like length finish together
    answers = []
    for i in range(0, len(asked), batch):
        part = asked[i:i + batch]
        plans = [planner.question(s, folder, [dict(role="user", content=a["prompt"])]) for s, a in part]
        answers += [(s, a, text) for (s, a), text in zip(part, answer(model, planner, plans))]
    hits, truths, predicted, tally = 0, 0, 0, {"count": [], "none": [], "caption": []}
    for s, a, text in answers:
        if a["task"] == "counting":
            tally["count"].append(text == a["answer"])
        elif a["task"] == "image_caption":
            tally["caption"] += named(text, geometry[s["id"]])
        elif not a["points"]:
            tally["none"].append(text == NOTHING)
        else:
            targets = [o["polygon"] for p in a["points"]
                       for o in geometry[s["id"]] if (o["x"], o["y"]) == (p["x"], p["y"])]
            points = parse_points(text)
            for p in points:  # shapes do not overlap, so a point can only hit one: no matching is needed
                hit = [t for t in targets if inside(t, p["x"], p["y"])][:1]
                targets = [t for t in targets if t not in hit]
                hits += len(hit)
            truths, predicted = truths + len(a["points"]), predicted + len(points)
    if sheet:
        contact_sheet(folder, [x for x in answers if x[1]["task"] != "counting"], geometry, sheet)
    mean = lambda xs: sum(xs) / max(len(xs), 1)
    return dict(point_hit=hits / max(truths, 1), point_precision=hits / max(predicted, 1),
                count_accuracy=mean(tally["count"]), none_accuracy=mean(tally["none"]),
                caption_recall=mean(tally["caption"]), scenes=len(scenes))


def answer(model, planner, plans, max_new_tokens=96):
    """Greedy answers to a batch of questions, as texts."""
    tok, device = planner.tokenizer, model.lm_head.weight.device
    inputs = to_device(prompt_batch(plans, planner.cfg)[0], device)
    ids = torch.stack(list(model.generate(**inputs, max_new_tokens=max_new_tokens, stop=(tok.eos,))), 1).tolist()
    return [tok.decode(row[:row.index(tok.eos)] if tok.eos in row else row) for row in ids]


def named(text, objects):
    """For each object, whether the text names its colour and shape; a phrase counts for one object."""
    phrases = [" ".join(m) for m in re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", text)]
    found = []
    for o in objects:
        phrase = f"{o['colour']} {o['shape']}"
        found.append(phrase in phrases)
        if found[-1]:
            phrases.remove(phrase)
    return found


def contact_sheet(folder, answers, geometry, path, columns=6, cells=24, side=150, text_height=46):
    """A page of held-out scenes: true centres as circles, predicted points as crosses, question and answer
    below."""
    by_kind = [[x for x in answers if x[1]["task"] == t] for t in ("image_pointing", "image_caption")]
    chosen = by_kind[0][::max(len(by_kind[0]) * 4 // (3 * cells), 1)][:cells * 3 // 4]
    chosen += by_kind[1][::max(len(by_kind[1]) * 4 // cells, 1)][:cells - len(chosen)]
    page = Image.new("RGB", (columns * (side + 10), -(-len(chosen) // columns) * (side + text_height)),
                     "white")
    pen = ImageDraw.Draw(page)
    for k, (s, a, text) in enumerate(chosen):
        left, top = k % columns * (side + 10) + 5, k // columns * (side + text_height) + 3
        with Image.open(os.path.join(folder, s["image"])) as image:
            page.paste(image.convert("RGB").resize((side, side)), (left, top))
        at = lambda p: (left + p["x"] * side, top + p["y"] * side)
        for p in a.get("points", []):
            x, y = at(p)
            pen.ellipse([x - 7, y - 7, x + 7, y + 7], outline="black", width=3)
            pen.ellipse([x - 6, y - 6, x + 6, y + 6], outline="white", width=1)
        for p in parse_points(text) if "points" in a else []:
            x, y = at(p)
            for colour, w in (("black", 4), ("white", 2)):
                pen.line([x - 5, y, x + 5, y], colour, w)
                pen.line([x, y - 5, x, y + 5], colour, w)
        said = f"{len(parse_points(text))} points" if parse_points(text) else text
        for line, words in enumerate([a["prompt"]] + [said[i:i + 27] for i in range(0, 54, 27)]):
            pen.text((left, top + side + 1 + 13 * line), words[:27], fill="black" if line else (0, 80, 160))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    page.save(path)


if __name__ == "__main__":
    write_world(sys.argv[1] if len(sys.argv) > 1 else "data/toy")
