"""
The embedded default data: a drawn world of coloured shapes, written once as real PNG and JPEG files and
JSONL, in the very form in which users write their own (README). A model that starts from nothing learns to
describe it, to count in it and to point at things in it within minutes on a laptop, and nothing has to be
downloaded.

    data/toy/captions.jsonl  points.jsonl  text.jsonl     what stage 1 trains on
    data/toy/eval/scenes.jsonl  geometry.json             held-out scenes, and the exact outline of every shape in them

    python -m lib.toy data/toy       # write it (pretrain.py does so by itself on first use)

Nothing can be answered without looking: colour, shape, size, angle, place, number, background and wording are
all drawn at random, and queries for what is not there name a colour or a shape that is. What makes it
learnable in minutes was measured:

- every shape has a dark outline. A model that starts from nothing knows no edges; without the line a circle
  differs from a star by the product of a colour and a contrast, and in 400 steps the shape was never learned;
- centres lie on a grid of 0.05, three pixels of what the model sees. Finer digits are noise to it, and noise in
  most of the tokens of an answer drowns the one that says "circle".
"""
import functools
import itertools
import json
import math
import os
import random
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import av
import numpy as np
from PIL import Image, ImageDraw



COLOURS = {"red": (214, 40, 40), "green": (38, 150, 60), "blue": (40, 80, 215), "yellow": (240, 205, 40),
           "purple": (150, 50, 180), "white": (246, 246, 246)}
SHAPES = ("circle", "star", "bar")
FOLDER = os.path.join("data", "toy")  # where every stage looks for it
VERSION = 33  # part of the done-file: a toy world drawn by older code is drawn again


# ---- scenes ------------------------------------------------------------------------------------------------

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


def ground(rng, w, h, tilted):
    """A canvas of w x h pixels to draw on, twice as large: one colour, if tilted() a gradient, and some noise."""
    base, tilt = rng.uniform(85, 165) + rng.uniform(-10, 10, 3), rng.uniform(-15, 15, (2, 1))
    y, x = np.mgrid[0:h, 0:w][..., None] / (h, w)[0]
    canvas = base + (tilt[0] * (x - 0.5) + tilt[1] * (y - 0.5)) * tilted()
    canvas = canvas + rng.normal(0, rng.uniform(0, 3), (h, w, 1))
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).resize((2 * w, 2 * h), Image.NEAREST)


def draw_shape(pen, polygon, w, h, colour):
    """A filled polygon of [0, 1] with its dark outline, on a canvas twice w x h."""
    corners = [(2 * w * x, 2 * h * y) for x, y in polygon]
    pen.polygon(corners, colour)
    pen.line(corners + corners[:2], (15, 15, 15), width=6, joint="curve")


def paint(scene):
    """Draw a scene: background (plain, gradient or noise), clutter that is no answer to anything, then the
    shapes."""
    (w, h), rng = scene["size"], np.random.default_rng(scene["look"])
    image = ground(rng, w, h, lambda: rng.random() < 0.5)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 4)):  # clutter: thin lines and specks, in muted colours
        colour = tuple(rng.integers(60, 190, 3).tolist())
        (a, b), (c, d) = rng.uniform(0, 1, (2, 2)) * image.size
        if rng.random() < 0.5:
            pen.line([a, b, c, d], colour, width=2)
        else:
            pen.ellipse([a - 2, b - 2, a + 2, b + 2], colour)
    for o in scene["objects"]:
        colour = np.array(COLOURS[o["colour"]]) + rng.uniform(-12, 12, 3)
        draw_shape(pen, o["polygon"], w, h, tuple(int(c) for c in colour.clip(0, 255)))
    return image.resize((w, h), Image.BOX)


def inside(polygon, x, y):
    """Whether (x, y) lies in a polygon, by counting the edges to its right."""
    hit = False
    for (x1, y1), (x2, y2) in zip(polygon, polygon[1:] + polygon[:1]):
        if (y1 > y) != (y2 > y) and x < (x2 - x1) * (y - y1) / (y2 - y1) + x1:
            hit = not hit
    return hit


# ---- what is asked about them ------------------------------------------------------------------------------

CAPTION_PROMPTS = ("Describe the image.", "What is in this picture?", "Write a caption.", "What do you see?",
                   "Tell me about this image.", "List the shapes from left to right.")
SHAPE_PROMPTS = ("What shapes are there?", "Which shapes do you see, from left to right?")
POINT_PROMPTS = ("Point to the {}.", "Where is the {}?", "Find the {}.", "Show me the {}.",
                 "Click on the {}.")
POINT_ALL_PROMPTS = ("Point to all {}.", "Where are the {}?", "Find every one of the {}.", "Mark the {}.",
                     "Point to the {}.")
COUNT_PROMPTS = ("How many {} are there?", "Count the {}.", "What is the number of {}?",
                 "How many {} can you see?")


def kind(colour, shape):
    """What objects of a colour, a shape or both are called."""
    return f"{colour or ''} {shape or 'shape'}".strip()


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
    name = kind(colour, shape)
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
                 prompt=rng.choice(COUNT_PROMPTS).format(plural(kind(c, s))),
                 answer=str(len(select(scene, c, s)))) for c, s in asked]


def pair(rng, scenes, trains=False):
    """Questions about two pictures: which one shows something, where it is in each, where in one of them; in training
    also what is in each, from which it is learned what belongs to which."""
    in_it = lambda s: listing([f"a {o['colour']} {o['shape']}" for o in s["objects"]]).capitalize() + "."
    out = [dict(task="multi_image_qa", prompt=f"What is in image {k}?", answer=in_it(s))
           for k, s in enumerate(scenes)] if trains else []
    find = lambda colour, shape: [(k, o) for k, s in enumerate(scenes) for o in select(s, colour, shape)]
    for _ in range(2):
        some = rng.choice(scenes[rng.randrange(2)]["objects"])
        where = sorted({k for k, _ in find(some["colour"], some["shape"])})
        out.append(dict(task="multi_image_qa", prompt=f"Which image shows a {kind(some['colour'], some['shape'])}?",
                        answer="Both." if len(where) == 2 else f"Image {where[0]}."))
        colour = some["colour"] if rng.random() < 0.7 else None
        label, found = plural(kind(colour, some["shape"])), find(colour, some["shape"])
        one = rng.choice(where) if rng.random() < 0.3 else None
        found = [(k, o) for k, o in found if one in (None, k)]
        out.append(dict(task="multi_image_pointing", label=label,
                        prompt=f"Point to the {label} in {'all images' if one is None else f'image {one}'}.",
                        points=[dict(image=k, x=o["x"], y=o["y"], id=i) for i, (k, o) in enumerate(found)],
                        masks=[dict(image=k, id=i, polygon=o["polygon"]) for i, (k, o) in enumerate(found)]))
    return out


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
        answer_day = DAYS[(k + (1 if after else -1)) % 7]
        return f"Which day comes {'after' if after else 'before'} {DAYS[k]}?", answer_day + "."
    shape = rng.choice(list(SIDES))
    return f"How many sides has a {shape}?", SIDES[shape] + "."


# ---- clips: the same shapes, moving ------------------------------------------------------------------------
#
# Positions are known every half second, when the model looks, and lie on the grid there; between them shapes
# glide. A clip of 2.5 seconds is six looks. A shape may leave the picture, come back, turn another colour, or
# not be there at first.

WAYS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}


def draw_path(rng, looks):
    """(way, [(x, y)] in twentieths of the picture, one per look): a shape that stays, moves, leaves, or leaves
    and comes back. How far it gets from look to look is drawn each time: who wants to know where it is must look,
    and cannot go on from where it was.
    """
    manner = rng.choice(("stays", "moves", "moves", "moves", "leaves", "returns"))
    x, y = rng.randint(3, 17), rng.randint(3, 17)
    if manner == "stays":
        return "stays", [(x, y)] * looks
    way, top = rng.choice(list(WAYS)), 4 if looks < 9 else 2
    steps = [rng.randint(top // 2, top) for _ in range(looks - 1)]
    if manner == "returns":  # past the edge at 20 and back
        turn = looks // 2 - rng.randint(0, 1)
        steps = [rng.randint(2, 4) * (1 if k < turn else -1) for k in range(looks - 1)]
    along = [0, *itertools.accumulate(steps)]
    if manner == "moves":  # from somewhere to somewhere, both inside
        first = rng.randint(2, max(18 - along[-1], 2))
    else:  # the edge is passed on the way
        first = 21 - max(rng.choice(along[2:]), 2) if manner == "leaves" else 22 - max(along)
    along, across, drift = [first + a for a in along], [], rng.randint(4, 16)
    for _ in range(looks):
        across.append(drift)
        drift = min(max(drift + rng.choice((-1, 0, 0, 1)), 2), 18)
    dx, dy = WAYS[way]
    if dx + dy < 0:
        along = [20 - a for a in along]
    return "returns" if manner == "returns" else way, list(zip(along, across) if dx else zip(across, along))


def draw_clip(rng, seconds=2.5):
    """One clip: its size, its objects, each with a name, a path, when it is there, and what becomes of it."""
    w, h, looks = rng.randint(80, 128), rng.randint(80, 128), round(2 * seconds) + 1
    # no two share a colour, even after one has turned: "the red shape" is a name
    n = rng.choice((1, 1, 1, 1, 2, 2, 2, 2, 3))
    colours, shapes, covered = rng.sample(list(COLOURS), 2 * n), rng.sample(SHAPES, n), looks
    while covered > looks // 6:  # shapes may cross, not travel on top of each other
        objects = []
        for colour, shape in zip(colours, shapes):
            way, path = draw_path(rng, looks)
            objects.append(dict(colour=colour, shape=shape, way=way, path=path, since=0, turns=None,
                                radius=rng.uniform(0.19, 0.25) * min(w, h), angle=rng.uniform(-0.15, 0.15)))
        covered = sum(math.hypot((p - u) / 20 * w, (q - v) / 20 * h) < a["radius"] + b["radius"]
                      for a, b in itertools.combinations(objects, 2)
                      for (p, q), (u, v) in zip(a["path"], b["path"]))
    for o, colour in zip(objects, colours[n:]):  # at most one thing happens to each besides its way
        fate = rng.random()
        if fate < 0.3:
            o["turns"] = (rng.randint(1, looks - 2), colour)
        elif fate < 0.5 and o["way"] != "returns":
            o["since"] = rng.choice([k for k in range(looks - 2) if there(o, k)] or [0])
    return dict(size=(w, h), looks=looks, objects=objects, look=rng.getrandbits(32))


def there(o, k):
    """Whether an object is seen at look k: it has come, and its centre is in the picture."""
    return k >= o["since"] and all(1 <= c <= 19 for c in o["path"][k])


def colour_at(o, k):
    return o["turns"][1] if o["turns"] and k >= o["turns"][0] else o["colour"]


def name_of(rng, o, k=0):
    """What an object is called at look k; its colour alone tells it from the others."""
    return f"{colour_at(o, k)} {rng.choice((o['shape'], o['shape'], 'shape'))}"


def polygon(o, size, k):
    """Its outline at look k, which may be a fraction: [(x, y)] in [0, 1]."""
    a, b = o["path"][math.floor(k)], o["path"][math.ceil(k)]
    centre = [(p + (q - p) * (k % 1)) / 20 for p, q in zip(a, b)]
    return (outline(o["shape"], o["radius"], o["angle"]) / size + centre).round(4).tolist()


def point(o, k, i=0):
    """Where an object is at look k, as an annotation says it."""
    x, y = o["path"][k]
    return dict(t=k / 2, x=x / 20, y=y / 20, id=i)


def mask(o, size, k, i=0):
    """What of the picture it is there, for the evaluation."""
    return dict(t=k / 2, id=i, polygon=polygon(o, size, k))


def write_clip(path, clip, rate=4):
    """The clip as an H.264 file of `rate` frames a second."""
    (w, h), rng = clip["size"], np.random.default_rng(clip["look"])
    w, h = w // 2 * 2, h // 2 * 2  # yuv420p halves them
    empty = ground(rng, w, h, lambda: True)
    with av.open(path, "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "crf": "18"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_type = w, h, "yuv420p", "NONE"
        frames = (clip["looks"] - 1) * rate // 2
        for f in range(frames):  # the last one is what is seen when the file ends
            image, k = empty.copy(), f * 2 / rate if f < frames - 1 else clip["looks"] - 1
            pen = ImageDraw.Draw(image)
            for o in clip["objects"]:
                if k >= o["since"]:
                    draw_shape(pen, polygon(o, clip["size"], k), w, h, COLOURS[colour_at(o, k)])
            container.mux(stream.encode(av.VideoFrame.from_image(image.resize((w, h), Image.BOX))))
        container.mux(stream.encode())


def motion(o):
    went = {"stays": "stays", "returns": "leaves and comes back"}.get(o["way"], f"moves {o['way']}")
    after = f" and turns {o['turns'][1]}" if o["turns"] else " once it has come" if o["since"] else ""
    return f"a {o['colour']} {o['shape']} {went}{after}"


def about_clip(rng, clip):
    """Caption, questions and moments of a clip: (annotations, subtitles)."""
    objects, looks, out, subtitles = clip["objects"], clip["looks"], [], []
    ask = lambda prompt, answer: out.append(dict(task="video_qa", prompt=prompt, answer=answer))
    said = listing([motion(o) for o in sorted(objects, key=lambda o: o["path"][0])])
    out.append(dict(task="video_caption",
                    prompt=rng.choice(("Describe the video.", "What happens in this video?")),
                    answer=said[0].upper() + said[1:] + "."))
    still = {"stays": "It stays.", "returns": "It leaves and comes back."}
    way = lambda o: still.get(o["way"], o["way"].capitalize() + ".")
    for o in objects:
        ask(f"Which way does the {name_of(rng, o)} move?", way(o))
    if len(objects) > 1 and rng.random() < 0.5:  # who is meant is only said
        o, name = rng.choice(objects), rng.choice(("Ann", "Ben", "Eve"))
        subtitles = [dict(start=0, end=1, text=f"{name} is the {o['colour']} {o['shape']}.")]
        ask(f"Which way does {name} move?", way(o))
    at, when = rng.choice(((0, "at the start"), (looks - 1, "at the end")))
    ask(f"How many shapes are there {when}?", str(sum(there(o, at) for o in objects)))
    happens = [(o["turns"][0], o, f"turns {o['turns'][1]}") for o in objects if o["turns"]]
    happens += [(o["since"], o, "comes") for o in objects if o["since"]]
    for k, o, event in happens:
        if there(o, k):
            label = f"{name_of(rng, o)} when it {event}"
            out.append(dict(task="video_pointing", prompt=f"Point to the {label}.", label=label,
                            points=[point(o, k)], masks=[mask(o, clip["size"], k)]))
    for o in objects:
        if o["turns"]:
            ask(f"What colour does the {name_of(rng, o)} turn?", o["turns"][1].capitalize() + ".")
    happens.sort(key=lambda e: e[0])
    if len(happens) > 1 and happens[0][0] != happens[1][0]:
        _, o, event = happens[0]
        ask("What happens first?", f"The {o['colour']} {o['shape']} {event}.")
    if rng.random() < 0.3:
        o, colour = rng.choice(objects), rng.choice(list(COLOURS))
        if colour != colour_at(o, looks):
            label = f"{name_of(rng, o)} when it turns {colour}"
            out.append(dict(task="video_pointing", prompt=f"Point to the {label}.", label=label, points=[],
                            masks=[]))
    return out, subtitles


def lookups(rng, clip, n=2):
    """Where something is at a given moment, and what colour: a track is many of these, and one by one they are
    learned sooner."""
    seen = [(k, o) for k in range(clip["looks"]) for o in clip["objects"] if there(o, k)]
    asked = [(k, o, name_of(rng, o, k)) for k, o in rng.sample(seen, min(n, len(seen)))]
    out = [dict(task="video_pointing", prompt=f"Point to the {name} at {k / 2:g} seconds.", label=name,
                points=[point(o, k)]) for k, o, name in asked]
    k, o = rng.choice([(k, o) for k, o in seen if o["turns"]] or seen)
    return out + [dict(task="video_qa", prompt=f"What colour is the {o['shape']} at {k / 2:g} seconds?",
                       answer=colour_at(o, k).capitalize() + ".")]


def still(rng, clip):
    """One look of a clip, and where everything in it is: (look, annotations). To find a thing by its name among
    others has to be learned anew in a frame, where one visual token holds nine patches and not four."""
    k = rng.choice([k for k in range(clip["looks"]) if any(there(o, k) for o in clip["objects"])])
    asked = [(name_of(rng, o, k), o) for o in clip["objects"] if there(o, k)]
    return k, [dict(task="video_pointing", prompt=f"Point to the {name}.", label=name, points=[point(o, k)])
               for name, o in asked]


def tracking(rng, clip):
    """A track of each object, and now and then of all together."""
    def track(objects, label):
        seen = [(k, i, o) for k in range(clip["looks"]) for i, o in enumerate(objects) if there(o, k)]
        return dict(task="video_tracking", label=label,
                    prompt=rng.choice(("Track the {}.", "Follow the {}.", "Where does the {} go?")).format(label),
                    points=[point(o, k, i) for k, i, o in seen],
                    masks=[mask(o, clip["size"], k, i) for k, i, o in seen])
    out = [track([o], name_of(rng, o)) for o in clip["objects"]]
    if len(out) == 2 and rng.random() < 0.3:
        out.append(track(sorted(clip["objects"], key=lambda o: o["path"][0]), "shapes"))
    return out


# ---- files -------------------------------------------------------------------------------------------------

def is_written(folder, recipe):
    """Whether a folder was written by this very recipe, to the end."""
    try:
        with open(os.path.join(folder, "done.json")) as f:
            return json.load(f) == recipe
    except (OSError, ValueError):
        return False


def begin(folder, *subs):
    """A folder to write in until `finish` gives it its name: an interrupted run leaves nothing that looks
    finished."""
    aside = folder.rstrip("/") + f".{os.getpid()}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    for sub in subs:
        os.makedirs(os.path.join(aside, sub))
    return aside


def finish(aside, folder, recipe):
    with open(os.path.join(aside, "done.json"), "w") as f:
        json.dump(recipe, f)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(aside, folder)
    return folder


def write_lines(path, rows):
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def write_world(folder, scenes=4000, held_out=320, texts=1000, seed=0):
    """Write the toy world under `folder` unless it is there."""
    recipe = dict(version=VERSION, scenes=scenes, held_out=held_out, texts=texts, seed=seed)
    if is_written(folder, recipe):
        return folder
    print(f"drawing the toy world: {scenes} scenes to train on, {held_out} held out -> {folder}", flush=True)
    aside = begin(folder, "images", "eval/images")
    seen, geometry, drawn = set(), {}, []
    rows = {"captions": [], "points": [], "eval/scenes": [], "pairs": [], "eval/pairs": []}
    for i in range(held_out + scenes):  # held-out scenes are drawn first; whatever repeats one is drawn again
        rng = random.Random(f"toy {seed} scene {i}")
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
        drawn.append((name, scene))
        if i < held_out:
            rows["eval/scenes"].append(dict(id=f"held-out-{i}", **picture,
                                            annotations=described[:1] + points))
            geometry[f"held-out-{i}"] = scene["objects"]
        else:
            rows["captions"].append(dict(id=f"scene-{i}", **picture, annotations=described))
            rows["points"].append(dict(id=f"scene-{i}", **picture, annotations=points))
    trained, alike = drawn[held_out:], {}
    for name, scene in trained:
        for o in scene["objects"]:
            alike.setdefault((o["colour"], o["shape"]), []).append((name, scene))
    for i in range(held_out, held_out + scenes):
        rng = random.Random(f"toy {seed} pair {i}")
        first = rng.choice(trained)  # at least a quarter share something: "Both." else is too rare to be learned
        o = rng.choice(first[1]["objects"])
        two = [first, rng.choice(alike[o["colour"], o["shape"]] if rng.random() < 0.25 else trained)]
        rows["pairs"].append(dict(id=f"pair-{i}", images=[n for n, _ in two],
                                  annotations=pair(rng, [s for _, s in two], True)))
    for i in range(held_out // 2):
        two = drawn[2 * i:2 * i + 2]
        rows["eval/pairs"].append(dict(id=f"held-out-pair-{i}", images=[n for n, _ in two],
                                       annotations=pair(random.Random(f"toy {seed} pair {i}"),
                                                        [s for _, s in two])))
    rng = random.Random(f"toy {seed} text")
    rows["text"] = [dict(id=f"text-{i}", annotations=[dict(task="text", messages=[
        dict(role="user", content=q), dict(role="assistant", content=a)])]) for i in range(texts)
        for q, a in [text_row(rng)]]
    for name, lines in rows.items():
        write_lines(os.path.join(aside, name + ".jsonl"),
                    map(without_masks, lines) if name == "pairs" else lines)
    with open(os.path.join(aside, "eval/geometry.json"), "w") as f:
        json.dump(geometry, f)
    return finish(aside, folder, recipe)


def shown(clip):
    """What is seen of a clip: its shapes, where and in which colour at every look."""
    return frozenset((o["shape"], *((k, o["path"][k], colour_at(o, k)) for k in range(clip["looks"]) if there(o, k)))
                     for o in clip["objects"])


@functools.cache
def held_out_clips(key, held_out, seconds):
    """What is seen of the first clips drawn from this key: they are drawn first, and held out."""
    return {shown(draw_clip(random.Random(f"{key} {i}"), seconds)) for i in range(held_out)}


def clip_rows(job):
    """Write one clip's file; returns its three lines, of questions, of tracks and of a still. A clip to train on that
    shows what one of the held-out clips shows is drawn again."""
    folder, name, key, i, held_out, seconds = job
    rng, trains = random.Random(f"{key} {i}"), i >= held_out
    clip = draw_clip(rng, seconds)
    while trains and shown(clip) in held_out_clips(key, held_out, seconds):
        clip = draw_clip(rng, seconds)
    write_clip(os.path.join(folder, name), clip)
    said, subtitles = about_clip(rng, clip)
    said += lookups(rng, clip) if trains else []
    video = dict(video=name, duration=seconds)
    video |= dict(subtitles=subtitles) if subtitles else {}
    rows = [dict(id=f"{name} {what}", **video, annotations=a)
            for what, a in (("clip", said), ("track", tracking(rng, clip)))]
    k, asked = still(rng, clip)
    return rows + [dict(id=f"{name} still", video=name, start=k / 2, end=k / 2, duration=video["duration"],
                        annotations=asked)]


def write_clips(folder, clips=4000, held_out=200, seconds=2.5, seed=0, prefix=""):
    """Write the toy world's clips under `folder` unless they are there: clips.jsonl, tracks.jsonl, stills.jsonl and
    eval/ with the first two, which also hold the outline of every object at every moment it is asked for."""
    recipe = dict(version=VERSION, clips=clips, held_out=held_out, seconds=seconds, seed=seed)
    if is_written(folder, recipe):
        return folder
    print(f"filming the toy world: {clips} clips of {seconds} s to train on, {held_out} held out -> {folder}",
          flush=True)
    aside = begin(folder, "video", "eval/video")
    jobs = [(os.path.join(aside, "eval") if i < held_out else aside, f"video/{i:05d}.mp4",
             f"toy {seed} clip {seconds}", i, held_out, seconds) for i in range(held_out + clips)]
    # started afresh, for a copy of a process with threads can wait for ever for what one of them held
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), get_context("spawn")) as pool:
        lines = list(pool.map(clip_rows, jobs, chunksize=64))
    for k, name in enumerate(("clips", "tracks", "stills")):
        name = f"{prefix}{name}.jsonl"
        write_lines(os.path.join(aside, name), [without_masks(rows[k]) for rows in lines[held_out:]])
        if k < 2:
            write_lines(os.path.join(aside, "eval", name), [rows[k] for rows in lines[:held_out]])
    return finish(aside, folder, recipe)


def without_masks(row):
    return dict(row, annotations=[{k: v for k, v in a.items() if k != "masks"} for a in row["annotations"]])


# Stage 2 on the toy world: how much more or less often than its size says each set is drawn. What is new gets
# most.
FACTORS = dict(captions=0.35, points=0.7, text=0.3, pairs=2.4, clips=2.4, tracks=2.1, stills=0.7,
               long_clips=3.0, long_tracks=6.0)


def files(folder, stage):
    """The toy world's JSONL files for a stage, written on first use: pictures, then clips too, then clips three
    times as long."""
    write_world(folder)
    names = [os.path.join(folder, n) for n in ("captions", "points", "text")]
    if stage != "pretrain":
        write_clips(os.path.join(folder, "clips"))
        names += [os.path.join(folder, n) for n in ("pairs", "clips/clips", "clips/tracks", "clips/stills")]
    if stage == "longctx":
        write_clips(os.path.join(folder, "long"), 1500, 100, 7.5, prefix="long_")
        names += [os.path.join(folder, n) for n in ("long/long_clips", "long/long_tracks")]
    return [n + ".jsonl" for n in names]


def held_out(folder, stage):
    """The JSONL files of a stage's held-out clips and pairs, with masks."""
    files(folder, stage)
    names = dict(sft=("eval/pairs", "clips/eval/clips", "clips/eval/tracks"),
                 longctx=("long/eval/long_clips", "long/eval/long_tracks"))[stage]
    return [os.path.join(folder, n + ".jsonl") for n in names]


# ---- from points to masks: the toy world's own segmenter ---------------------------------------------------

def segment(frames, points):
    """Masks of what lies under points: {id: (frames, H, W) bool}. frames: [(H, W, 3) uint8]; points: [(frame,
    x, y, id)].

    A shape is one colour inside a dark line: the region of like colour around the point, and half of the line.
    It stands here for SAM 2 or the like, and has the signature that eval.py --segmenter asks for.
    """
    h, w = frames[0].shape[:2]
    masks = {p[3]: np.zeros((len(frames), h, w), bool) for p in points}
    for k, x, y, i in points:
        image = Image.fromarray(np.ascontiguousarray(frames[k]))
        seed = min(int(x * w), w - 1), min(int(y * h), h - 1)
        ImageDraw.floodfill(image, seed, (255, 0, 255), thresh=130)
        found = (np.asarray(image) == (255, 0, 255)).all(-1)
        if found.mean() < 0.4:  # not the background
            line = frames[k].max(-1) < 80
            for _ in range(6):  # out to the line, and along it into the tips of a star
                found |= grown(found) & line
            # the line is three pixels wide, and its middle is where the shape ends
            masks[i][k] |= ~grown(grown(~grown(found)))
    return masks


def grown(mask):
    """A mask (H, W) and the pixels left, right, above and below it."""
    pad = np.pad(mask, 1)
    return mask | pad[:-2, 1:-1] | pad[2:, 1:-1] | pad[1:-1, :-2] | pad[1:-1, 2:]


if __name__ == "__main__":
    write_world(sys.argv[1] if len(sys.argv) > 1 else FOLDER)
