"""The toy world is real files, answers follow from its geometry, and its scores can go wrong."""
import json
import math
import os
import random
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
from lib import toy
from data import Dataset, format_points
from lib.draw import contact_sheet
from lib.media import load_frames, load_image, video_duration
from lib.records import parse_record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.write_world(str(tmp_path_factory.mktemp("world") / "toy"), scenes=40, held_out=20, texts=10)


def rows(path):
    return [json.loads(line) for line in open(path)]


def test_every_line_is_a_row_with_its_picture(folder):
    for name in ("captions", "points", "text", "pairs", "eval/scenes", "eval/pairs"):
        d = Dataset(name, [os.path.join(folder, name + ".jsonl")])
        for i in range(len(d)):
            line, where, _ = d.line(i)
            row = parse_record(line)
            for image in row.get("images") or [row[k] for k in ("image",) if k in row]:
                pixels = load_image(os.path.join(where, image))
                assert pixels.shape == (row.get("height", len(pixels)), row.get("width", pixels.shape[1]), 3)
    # the README and pretrain.py ask about this one
    assert os.path.exists(os.path.join(folder, "eval/images/00003.png"))
    assert {f.rsplit(".")[-1] for f in os.listdir(os.path.join(folder, "images"))} == {"png", "jpg"}


def test_the_same_seed_draws_the_same_world(folder, tmp_path):
    again = toy.write_world(str(tmp_path / "toy"), scenes=40, held_out=20, texts=10)
    for name in ("points.jsonl", "eval/scenes.jsonl", "images/00025." + ("png" if os.path.exists(
            os.path.join(folder, "images/00025.png")) else "jpg")):
        assert open(os.path.join(again, name), "rb").read() == open(os.path.join(folder, name), "rb").read()
    other = toy.write_world(str(tmp_path / "other"), scenes=40, held_out=20, texts=10, seed=1)
    assert open(os.path.join(other, "points.jsonl")).read() != open(os.path.join(folder, "points.jsonl")).read()


def test_held_out_scenes_are_not_trained_on(folder):
    key = lambda r: json.dumps(sorted({(a["label"], json.dumps(a["points"]))
                                       for a in r["annotations"] if a.get("points")}))
    train = {key(r) for r in rows(os.path.join(folder, "points.jsonl"))}
    assert not train & {key(r) for r in rows(os.path.join(folder, "eval", "scenes.jsonl"))}


def test_what_is_drawn_is_what_is_said(folder):
    """The pixel at each labelled point has the colour that was asked for; other pixels of the picture mostly
    do not."""
    checked = 0
    for r in rows(os.path.join(folder, "eval", "scenes.jsonl")):
        pixels = load_image(os.path.join(folder, "eval", r["image"])).astype(int)
        for a in r["annotations"]:
            colour = next((c for c in toy.COLOURS if a["task"] == "image_pointing" and c in a["label"]), None)
            for p in a["points"] if colour else []:
                y, x = int(p["y"] * pixels.shape[0]), int(p["x"] * pixels.shape[1])
                distance = lambda c: np.abs(pixels[y, x] - toy.COLOURS[c]).sum()
                assert min(toy.COLOURS, key=distance) == colour
                checked += 1
    assert checked > 30


def test_which_of_two_pictures_follows_from_what_is_in_each(folder):
    seen, single = set(), {toy.plural(s): s for s in (*toy.SHAPES, "shape")}
    for r in rows(os.path.join(folder, "pairs.jsonl")):
        said = [a["answer"].lower().rstrip(".") for a in r["annotations"] if a["prompt"].startswith("What is in")]
        things = [[thing.split()[1:] for thing in re.split(", | and ", text)] for text in said]
        holds = lambda k, label: any({single.get(w, w) for w in label.split()} - {"shape"} <= {*t} for t in things[k])
        for a in r["annotations"]:
            if a["prompt"].startswith("Which image shows a "):
                label = a["prompt"].removeprefix("Which image shows a ").rstrip("?")
                where = [k for k in (0, 1) if holds(k, label)]
                assert a["answer"] == ("Both." if len(where) == 2 else f"Image {where[0]}.")
                seen.add(a["answer"])
            elif a["task"] == "multi_image_pointing":
                one = re.search(r"image (\d)", a["prompt"])
                asked = [int(one[1])] if one else [0, 1]
                assert {p["image"] for p in a["points"]} == {k for k in asked if holds(k, a["label"])}
                seen.add(len(asked))
    assert seen == {"Both.", "Image 0.", "Image 1.", 1, 2}


def test_a_point_beside_a_shape_is_no_hit():
    square = [[0.2, 0.2], [0.4, 0.2], [0.4, 0.4], [0.2, 0.4]]
    assert toy.inside(square, 0.3, 0.3) and not toy.inside(square, 0.5, 0.3) and not toy.inside(square, 0.3,
                                                                                                0.1)


def scene_question(folder, task, **a):
    Image.new("RGB", (100, 80), (90, 90, 90)).save(folder / "a.png")
    return evaluation.Question(dict(image="a.png"), dict(a, task=task, prompt="Where?"), str(folder), "f:1")


class Oracle:
    """Stands in for generation: answers from the annotations, wrongly where it is told to."""

    def __init__(self, folder, spoil):
        self.known = {}
        for r in rows(os.path.join(folder, "eval", "scenes.jsonl")):
            for a in r["annotations"]:
                self.known[r["image"], a["prompt"]] = a
        self.spoil = spoil

    def answers(self, model, planner, asked, limit, batch, world, unusable):
        known = [self.known[row["image"], prompt] for _, _, row, _, prompt in asked]
        return [self.spoil(a, format_points(a["points"], "image") if "points" in a else a["answer"]) for a in known]


@pytest.mark.parametrize("spoil, expected", [
    (lambda a, text: text, dict(point_hit=1, point_precision=1, count_accuracy=1, none_accuracy=1,
                                caption_recall=1)),
    (lambda a, text: text + " <point 0.01, 0.01, 9>" if a.get("points") else text, dict(point_hit=1,
                                                                                        none_accuracy=1)),
    (lambda a, text: text * 2, dict(point_hit=1, count_accuracy=0, none_accuracy=0, caption_recall=1)),
    (lambda a, text: "", dict(point_hit=0, point_precision=0, count_accuracy=0, none_accuracy=0, caption_recall=0))])
def test_wrong_answers_lower_the_toy_scores_and_right_ones_do_not(folder, monkeypatch, spoil, expected):
    oracle = Oracle(folder, spoil)
    monkeypatch.setattr(evaluation, "answers", oracle.answers)
    scores = evaluation.evaluate_scenes(None, oracle, os.path.join(folder, "eval"), 20)
    for name, value in expected.items():
        assert scores[name] == value, name
    doubled = spoil(dict(points=[1], task=""), "<point 0.5, 0.5, 0>") != "<point 0.5, 0.5, 0>"
    assert (scores["point_precision"] < 0.9) == (doubled or not scores["point_hit"])


def test_a_phrase_names_one_object(tmp_path):
    q = scene_question(tmp_path, "image_caption", answer="There is a red star, a red star and a blue bar.")
    recall = lambda text: evaluation.scene_scores([q], [text])["caption_recall"]
    assert recall("a red star") == 1 / 3 and recall("a red star and a red star") == 2 / 3
    assert recall("three times a red star, a red star, a red star") == 2 / 3 and recall("a blue star") == 0


# ---- the whole world, as every run trains on it ------------------------------------------------------------

ONE_OF = {"circles": "circle", "stars": "star", "bars": "bar", "shapes": "shape"}
THING = rf"(?:(?:{'|'.join(toy.COLOURS)}) )?(?:circle|star|bar|shape)s?"


class Here:
    """A pool that does its work in this process."""

    def __init__(self, *a):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *a):
        pass

    def map(self, fn, jobs, chunksize=1):
        return map(fn, jobs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, training files, held-out files) of everything there is by default. Images, clips and outlines are not
    drawn, which would take minutes: what they show is known from the lines."""
    nothing = lambda *a, **k: None
    folder = str(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "paint", lambda scene: SimpleNamespace(save=nothing))
        patch.setattr(toy, "write_clip", nothing)
        patch.setattr(toy, "outline", lambda *a: np.zeros((1, 2)))
        patch.setattr(toy, "mask", lambda *a: {})
        patch.setattr(toy, "ProcessPoolExecutor", Here)
        train = toy.files(folder, "longctx")
        held = [os.path.join(folder, "eval", "scenes.jsonl")]
        held += [f for stage in ("sft", "longctx") for f in toy.held_out(folder, stage)]
    return folder, {f: rows(f) for f in train}, {f: rows(f) for f in held}


def named_in(whole, ending):
    """The rows of the files, training or held out, whose name ends so."""
    return [r for f, lines in whole.items() if f.endswith(ending) for r in lines]


def shapes_of(*annotations):
    """What a scene shows, [(colour, shape, x, y)]: its caption and the points of all shapes name it from left to
    right."""
    caption = next(a["answer"] for a in annotations if a["task"] == "image_caption")
    places = next(a["points"] for a in annotations if a.get("label") in ("shape", "shapes"))
    names = re.findall(rf"a ({'|'.join(toy.COLOURS)}) (circle|star|bar)", caption)
    assert len(names) == len(places)
    return [(*name, p["x"], p["y"]) for name, p in zip(names, places)]


def scenes_of(whole):
    """{image: its shapes} of the scenes to train on, and of those held out."""
    _, train, held = whole
    said = {r["image"]: r["annotations"] for r in named_in(train, "captions.jsonl")}
    trained = {r["image"]: shapes_of(*said[r["image"]], *r["annotations"]) for r in named_in(train, "points.jsonl")}
    return trained, {r["image"]: shapes_of(*r["annotations"]) for r in named_in(held, "scenes.jsonl")}


@pytest.mark.slow
def test_no_held_out_scene_can_be_learned_by_heart(whole):
    trained, kept = ([tuple(s) for s in scenes.values()] for scenes in scenes_of(whole))
    assert len(trained) == 10000 and len(kept) == 320
    assert not set(trained) & set(kept) and len({*trained, *kept}) == 10320


@pytest.mark.slow
def test_no_held_out_clip_can_be_learned_by_heart(whole):
    def seen(clips, tracks):
        moments = [(a["label"], json.dumps(a["points"])) for a in clips["annotations"]
                   if a.get("points") and "when it" in a["label"]]
        ways = [json.dumps(a["points"]) for a in tracks["annotations"] if a["label"] != "shapes"]
        colours = [(re.search("|".join(toy.COLOURS), label)[0], label.split("when")[1], p) for label, p in moments]
        return clips["annotations"][0]["answer"], tuple(sorted(colours)), tuple(sorted(ways))
    for kind, n, n_held in (("clips/", 8000, 200), ("long_", 1500, 100)):
        trained, kept = ([seen(c, t) for c, t in zip(named_in(files, kind + "clips.jsonl"),
                                                     named_in(files, kind + "tracks.jsonl"), strict=True)]
                         for files in ({f.replace("eval/", ""): r for f, r in part.items()} for part in whole[1:]))
        assert len(trained) == n and len(kept) == n_held
        assert not set(trained) & set(kept)


@pytest.mark.slow
def test_training_reads_no_file_of_the_evaluation(whole):
    folder, train, held = whole
    media = lambda f, r: [os.path.join(os.path.dirname(f), name) for name in r.get("images") or
                          [r[k] for k in ("image", "video") if k in r]]
    trained, kept = ({path for f, lines in part.items() for r in lines for path in media(f, r)}
                     for part in (train, held))
    assert all("/eval/" in f for f in held) and all("/eval/" in path for path in kept)
    assert not any("/eval/" in path.removeprefix(folder) for path in [*train, *trained])
    assert len(trained) == 10000 + 8000 + 1500 and len(kept) == 320 + 200 + 100
    assert {os.path.basename(f)[:-6] for f in train} == {"captions", "points", "text", "pairs", "clips", "tracks",
                                                         "stills", "long_clips", "long_tracks"} == {*toy.FACTORS}
    for f, lines in (train | held).items():
        assert len({r["id"] for r in lines}) == len(lines), f


@pytest.mark.slow
def test_lines_of_clips_say_what_is_shown_of_them(whole):
    """Seconds, the one moment of a still, who is meant; masks are for the evaluation alone."""
    _, train, held = whole
    assert not any("masks" in a for lines in train.values() for r in lines for a in r["annotations"])
    for f, lines in (train | held).items():
        for r in (r for r in lines if "video" in r):
            assert r["duration"] == (7.5 if "long_" in f else 2.5)
            moments = {p["t"] for a in r["annotations"] for p in a.get("points", [])}
            if "still" in f:
                assert moments == {r["start"]} == {r["end"]} and r["annotations"]
            else:
                assert not {"start", "end"} & r.keys() and max(moments, default=0) <= r["duration"]
            people = {n for a in r["annotations"] for n in re.findall(r"does (Ann|Ben|Eve) move", a["prompt"])}
            told = {s["text"].split()[0] for s in r.get("subtitles", [])}
            assert people == told if f.endswith("clips.jsonl") else not people
    for f, lines in held.items():
        if "pairs" in f or "tracks" in f:
            assert all(len(a["masks"]) == len(a["points"]) for r in lines for a in r["annotations"] if "points" in a)


def found(shapes, label):
    """The shapes that a label means, from left to right."""
    *colour, shape = label.split()
    shape = ONE_OF.get(shape, shape)
    return sorted((s for s in shapes if colour in ([], [s[0]]) and shape in (s[1], "shape")), key=lambda s: s[2:])


@pytest.mark.slow
def test_points_and_counts_follow_from_where_the_shapes_are(whole):
    trained, kept = scenes_of(whole)
    none, counts = 0, set()
    for part, scenes in (("points.jsonl", trained), ("scenes.jsonl", kept)):
        for r in named_in(whole[1 + (scenes is kept)], part):
            shapes = scenes[r["image"]]
            assert shapes == sorted(shapes, key=lambda s: s[2:]) and 1 <= len(shapes) <= 3
            for a in r["annotations"]:
                if a["task"] == "image_pointing":
                    right = found(shapes, a["label"])
                    assert a["label"] in a["prompt"]
                    assert a["points"] == [dict(x=x, y=y, id=i) for i, (_, _, x, y) in enumerate(right)]
                    assert len(right) == 0 or (len(right) > 1) == (a["label"].split()[-1] in ONE_OF)
                    if not right:  # a colour or a shape that is there, but not the two together
                        colour, shape = a["label"].split()
                        assert found(shapes, f"{colour} shape") or found(shapes, shape)
                        none += 1
                elif a["task"] == "counting":
                    label, = re.findall(THING, a["prompt"])
                    assert a["answer"] == str(len(found(shapes, label)))
                    counts.add(a["answer"])
    assert none > 4200 and counts == {"0", "1", "2", "3"}
    for r in named_in(whole[1], "captions.jsonl"):
        listed = next(a["answer"] for a in r["annotations"] if a["task"] == "image_qa")
        assert listed == ", ".join(shape for _, shape, _, _ in trained[r["image"]]) + "."


@pytest.mark.slow
def test_questions_about_two_images_follow_from_what_is_in_each(whole):
    said = set()
    for part, scenes in zip(whole[1:], scenes_of(whole)):
        for r in named_in(part, "pairs.jsonl"):
            two = [scenes[name] for name in r["images"]]
            for a in r["annotations"]:
                asked = re.search(r"image ([01])\b", a["prompt"])
                if a["prompt"].startswith("What is in"):
                    things = re.findall(r"a (\w+) (\w+)", a["answer"].lower())
                    assert things == [s[:2] for s in two[int(asked[1])]]
                elif a["prompt"].startswith("Which image"):
                    label, = re.findall(THING, a["prompt"])
                    where = [k for k in (0, 1) if found(two[k], label)]
                    assert a["answer"] == {1: f"Image {where[0]}.", 2: "Both."}[len(where)]
                    said.add(a["answer"])
                else:
                    images = [int(asked[1])] if asked else [0, 1]
                    right = [(k, s) for k in images for s in found(two[k], a["label"])]
                    assert right and a["label"] in a["prompt"]
                    assert a["points"] == [dict(image=k, x=s[2], y=s[3], id=i) for i, (k, s) in enumerate(right)]
                    said.add(len(images))
    assert said == {"Image 0.", "Image 1.", "Both.", 1, 2}


@pytest.mark.slow
def test_answers_without_an_image_are_right(whole):
    week, sides = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Monday".split(), dict(
        triangle="Three.", square="Four.", pentagon="Five.", hexagon="Six.", circle="None.")
    kinds = set()
    for r in named_in(whole[1], "text.jsonl"):
        asked, said = (m["content"] for m in r["annotations"][0]["messages"])
        numbers = re.findall(r"\d+", asked)
        if numbers:
            assert said == str(sum(map(int, numbers)))
        elif "day" in asked:
            after, day = re.search(r"(after|before) (\w+)", asked).groups()
            assert ([day, said[:-1]] if after == "after" else [said[:-1], day]) in map(list, zip(week, week[1:]))
        else:
            assert said == sides[asked[:-1].split()[-1]]
        kinds.add(asked.split()[0])
    assert kinds == {"What", "Which", "How"}


def wraps(polygon, x, y):
    """Whether a polygon goes once around (x, y): the angles of its sides add up to a full turn."""
    around = np.unwrap([math.atan2(b - y, a - x) for a, b in [*polygon, polygon[0]]])
    return abs(abs(around[-1] - around[0]) - 2 * math.pi) < 1e-6


def test_points_lie_in_the_outlines_that_score_them(folder):
    checked = 0
    for r in rows(os.path.join(folder, "eval", "scenes.jsonl")):
        outlines = [m["polygon"] for m in next(a["masks"] for a in r["annotations"]
                                               if a.get("label") in ("shape", "shapes"))]
        for a in r["annotations"]:
            assert [m["id"] for m in a.get("masks", [])] == [p["id"] for p in a.get("points", [])]
            for p, m in zip(a.get("points", []), a.get("masks", [])):
                assert [o for o in outlines if wraps(o, p["x"], p["y"])] == [m["polygon"]]
                checked += 1
    assert not any("masks" in a for r in rows(os.path.join(folder, "points.jsonl")) for a in r["annotations"])
    for r in rows(os.path.join(folder, "eval", "pairs.jsonl")):
        for a in r["annotations"]:
            masks = {(m["image"], m["id"]): m["polygon"] for m in a.get("masks", [])}
            assert len(masks) == len(a.get("points", []))
            for p in a.get("points", []):
                assert wraps(masks[p["image"], p["id"]], p["x"], p["y"])
    assert checked > 60


# ---- clips -------------------------------------------------------------------------------------------------

def seen_of(o):
    """{look: (x, y, colour)} of an object of a clip, while it has come and its centre is inside."""
    turn, colour = o["turns"] or (math.inf, None)
    return {k: (x / 20, y / 20, colour if k >= turn else o["colour"]) for k, (x, y) in enumerate(o["path"])
            if k >= o["since"] and 0 < x < 20 and 0 < y < 20}


def who(clip, name, k=0):
    """The object that a name means at look k: its colour then, and its shape or "shape"."""
    colour, shape = name.split()
    one, = [o for o in clip["objects"] if shape in (o["shape"], "shape")
            and colour == (o["turns"][1] if o["turns"] and k >= o["turns"][0] else o["colour"])]
    return one


def goes(o):
    """Where an object goes, by its places alone."""
    steps = [(c - a, d - b) for (a, b), (c, d) in zip(o["path"], o["path"][1:])]
    if not any(map(any, steps)):
        return "stays"
    axes = [[s[axis] for s in steps] for axis in (0, 1)]
    ways = [name for axis, names in zip(axes, (("right", "left"), ("down", "up")))
            for name, sign in zip(names, (1, -1)) if all(sign * d > 0 for d in axis)]
    return ways or ["returns"]


@pytest.fixture(scope="module")
def clips():
    out = []
    for seconds, n in ((2.5, 400), (7.5, 200)):
        for i in range(n):
            rng = random.Random(f"clip {i}")
            out.append((toy.draw_clip(rng, seconds), rng))
    return out


def at(k, o, i=0):
    x, y, _ = seen_of(o)[k]
    return dict(t=k / 2, x=x, y=y, id=i)


def test_tracks_and_moments_of_a_clip_are_where_the_shape_is(clips):
    for clip, rng in clips:
        objects, looks = clip["objects"], range(clip["looks"])
        for a in toy.tracking(rng, clip):
            several = a["label"] == "shapes"
            group = sorted(objects, key=lambda o: o["path"][0]) if several else [who(clip, a["label"])]
            assert a["points"] == [at(k, o, i) for k in looks for i, o in enumerate(group) if k in seen_of(o)]
            assert [(m["t"], m["id"]) for m in a["masks"]] == [(p["t"], p["id"]) for p in a["points"]]
            assert all(wraps(m["polygon"], p["x"], p["y"]) for m, p in zip(a["masks"][:3], a["points"]))
        k, asked = toy.still(rng, clip)
        there = [o for o in objects if k in seen_of(o)]
        assert there and [a["points"] for a in asked] == [[at(k, o)] for o in there]
        assert [who(clip, a["label"], k) for a in asked] == there
        *places, colour = toy.lookups(rng, clip)
        for a in places:
            k = round(2 * float(re.search(r"at ([\d.]+) seconds", a["prompt"])[1]))
            assert a["label"] in a["prompt"] and a["points"] == [at(k, who(clip, a["label"], k))]
        shape, t = re.search(r"is the (\w+) at ([\d.]+) seconds", colour["prompt"]).groups()
        one, = [o for o in objects if o["shape"] == shape]
        assert colour["answer"].lower() == seen_of(one)[round(2 * float(t))][2] + "."


def test_answers_about_a_clip_follow_from_how_its_shapes_move(clips):
    kinds = Counter()
    for clip, rng in clips:
        said, subtitles = toy.about_clip(rng, clip)
        objects, last = clip["objects"], clip["looks"] - 1
        events = [(o["turns"][0], o, "turns " + o["turns"][1]) for o in objects if o["turns"]]
        events += [(o["since"], o, "comes") for o in objects if o["since"]]
        caption = re.findall(r"an? (\w+ \w+) (stays|leaves and comes back|moves \w+)(?: and turns (\w+))?",
                             said[0]["answer"].lower())
        assert [who(clip, name) for name, *_ in caption] == sorted(objects, key=lambda o: o["path"][0])
        for name, way, colour in caption:
            o = who(clip, name)
            assert way.removeprefix("moves ") in goes(o) or way.startswith("leaves") and goes(o) == ["returns"]
            assert colour == (o["turns"][1] if o["turns"] else "")
        for a in said[1:]:
            asked, answer = a["prompt"], a.get("answer", "").lower().rstrip(".")
            kind = " ".join(asked.split()[:2])
            if kind == "Which way":
                name = re.search(r"does (?:the )?(.+) move", asked)[1]
                if " " not in name:  # a person
                    kind, name = "who", re.search(rf"{name} is the (.+)\.", subtitles[0]["text"])[1]
                way = {"it stays": "stays", "it leaves and comes back": "returns"}.get(answer, answer)
                assert way in goes(who(clip, name))
            elif kind == "How many":
                k = 0 if "start" in asked else last
                assert answer == str(sum(k in seen_of(o) for o in objects))
            elif kind == "What colour":
                name = re.search(r"does the (.+) turn", asked)[1]
                assert answer == who(clip, name)["turns"][1]
            elif kind == "What happens":
                first = [e for e in events if e[0] == min(e[0] for e in events)]
                assert [f"the {o['colour']} {o['shape']} {event}" for _, o, event in first] == [answer]
            else:
                name, event = a["label"].split(" when it ")
                k = [k for k, o, what in events if o is who(clip, name) and what == event]
                kind = f"points {len(k)}"
                assert a["label"] in asked and a["points"] == [at(k, who(clip, name)) for k in k]
                assert all(wraps(m["polygon"], p["x"], p["y"]) for m, p in zip(a["masks"], a["points"], strict=True))
            kinds[kind] += 1
    assert kinds.keys() == {"Which way", "who", "How many", "What colour", "What happens", "points 0", "points 1"}
    assert min(kinds.values()) > 20, kinds


def test_a_film_shows_each_shape_where_and_when_the_clip_says(clips, tmp_path):
    """The pixel at each point has the colour that is said; just before a shape turns or comes it has not."""
    checked = Counter()
    for clip, _ in clips[:24]:
        path, (w, h), looks = str(tmp_path / "clip.mp4"), clip["size"], clip["looks"]
        toy.write_clip(path, clip)
        times = [k / 4 for k in range(2 * looks - 1)]
        frames = load_frames(path, times)
        assert video_duration(path) == (looks - 1) / 2
        for o in clip["objects"]:
            others = [u for u in clip["objects"] if u is not o]
            turn = o["turns"][0] if o["turns"] else o["since"]
            for f in range(2 * looks - 1):
                (a, b), (c, d) = o["path"][f // 2], o["path"][(f + 1) // 2]
                x, y, k = (a + c) / 40, (b + d) / 40, f / 2
                covered = any(math.hypot((x - u / 20) * w, (y - v / 20) * h) < o["radius"] + other["radius"] + 4
                              for other in others for u, v in other["path"][f // 2:f // 2 + 2])
                if covered or not (0.1 < x < 0.9 and 0.1 < y < 0.9) or k == looks - 1.5:
                    continue
                pixel = frames[f][int(y * frames[f].shape[0]), int(x * frames[f].shape[1])].astype(int)
                near = {name: np.abs(pixel - rgb).sum() for name, rgb in toy.COLOURS.items()}
                if k < o["since"]:
                    assert near[o["colour"]] > 60
                else:
                    colour = o["turns"][1] if o["turns"] and k >= turn else o["colour"]
                    assert min(near, key=near.get) == colour, (k, o)
                checked[(k > turn) - (k < turn)] += bool(turn)
                checked["plain"] += 1
    assert min(checked[s] for s in (-1, 0, 1)) > 5 and checked["plain"] > 100, checked


def test_every_share_of_the_scores_has_its_own_denominator(tmp_path, monkeypatch):
    box = lambda x: [[x - 0.1, 0.4], [x + 0.1, 0.4], [x + 0.1, 0.6], [x - 0.1, 0.6]]
    at = lambda *xs: dict(points=[dict(x=x, y=0.5, id=i) for i, x in enumerate(xs)],
                          masks=[dict(id=i, polygon=box(x)) for i, x in enumerate(xs)])
    # Scene a has a red circle at 0.2 and a red star at 0.6, scene b a blue bar at 0.5.
    said, asked = [], dict(a=[], b=[])
    for scene, answer, task, true in (
            ("a", "a red circle and a green star", "image_caption", dict(answer="A red circle and a red star.")),
            ("b", "a blue star", "image_caption", dict(answer="There is a blue bar.")),
            # two in the circle count once, and the star was missed
            ("a", "<point 0.2, 0.5, 0> <point 0.22, 0.5, 1> <point 0.4, 0.5, 2>", "image_pointing", at(0.2, 0.6)),
            # in a shape that was not asked for
            ("a", "<point 0.2, 0.5, 0>", "image_pointing", at(0.6)),
            ("b", "<point 0.5, 0.55, 0>", "image_pointing", at(0.5)),
            ("a", "There are none.", "image_pointing", at()),
            ("b", "<point 0.5, 0.55, 0>", "image_pointing", at()),
            ("b", "There are none.", "image_pointing", at()),
            ("b", "There are none.", "image_pointing", at()),
            ("a", "2", "counting", dict(answer="2")), ("a", "2", "counting", dict(answer="3")),
            ("b", "0", "counting", dict(answer="1")), ("b", "", "counting", dict(answer="1")),
            ("b", "11", "counting", dict(answer="1"))):
        prompt = f"{len(said)}?"
        asked[scene].append(dict(true, task=task, prompt=prompt))
        said.append((f"{scene}.png", prompt, answer))
    for scene in asked:
        Image.new("RGB", (100, 80)).save(tmp_path / f"{scene}.png")
    (tmp_path / "scenes.jsonl").write_text("".join(json.dumps(dict(id=s, image=f"{s}.png", annotations=a)) + "\n"
                                                   for s, a in asked.items()))
    known = {(image, prompt): answer for image, prompt, answer in said}
    monkeypatch.setattr(evaluation, "answers", lambda model, planner, prompts, *_: [
        known[p.record["image"], p.text] for p in prompts])
    assert evaluation.evaluate_scenes(None, None, str(tmp_path), 9) == pytest.approx(dict(
        point_hit=2 / 4, point_precision=2 / 5, count_accuracy=1 / 5, none_accuracy=3 / 4, caption_recall=1 / 3,
        scenes=2))
    first = evaluation.evaluate_scenes(None, None, str(tmp_path), 1)  # the first scene alone
    assert first["scenes"] == 1 and first["point_hit"] == 1 / 3 and first["caption_recall"] == 1 / 2
    none = evaluation.evaluate_scenes(None, None, str(tmp_path), 0)
    assert none["scenes"] == 0 and none["point_hit"] == 0


def test_a_contact_sheet_marks_what_is_true_and_what_was_said(tmp_path):
    q = scene_question(tmp_path, "image_pointing", points=[dict(x=0.2, y=0.3, id=0)])
    contact_sheet(evaluation.scene_cells([q], ["<point 0.7, 0.6, 0>"]), str(tmp_path / "sub" / "sheet.png"))
    page = np.asarray(Image.open(tmp_path / "sub" / "sheet.png"))[3:153, 5:155].astype(int)
    marked = np.abs(page - 90).sum(-1) > 60
    y, x = np.nonzero(marked)
    left = x < 75
    assert abs(x[left].mean() - 30) < 1.5 and abs(y[left].mean() - 45) < 1.5 and not marked[45, 30]  # a ring
    assert abs(x[~left].mean() - 105) < 1.5 and abs(y[~left].mean() - 90) < 1.5 and marked[90, 105]  # a cross


def test_a_world_is_drawn_again_only_when_it_would_be_another(tmp_path, monkeypatch, capsys):
    folder = str(tmp_path / "toy")
    draw = lambda **k: toy.write_world(folder, **dict(dict(scenes=4, held_out=2, texts=1), **k))
    mark = os.path.join(folder, "mark")
    drawn_again = lambda **k: (open(mark, "w").close(), draw(**k), not os.path.exists(mark))[-1]
    draw()
    assert not drawn_again()
    assert drawn_again(seed=1) and drawn_again() and drawn_again(scenes=5) and drawn_again(held_out=3)
    monkeypatch.setattr(toy, "VERSION", toy.VERSION + 1)
    assert drawn_again(held_out=3) and not drawn_again(held_out=3)
    os.remove(os.path.join(folder, "done.json"))  # not drawn to the end
    assert drawn_again(held_out=3) and os.listdir(tmp_path) == ["toy"]


def test_the_toy_segmenter_takes_the_shape_and_never_the_background():
    frame = np.full((80, 100, 3), 120, np.uint8)
    frame[20:50, 30:70] = 15
    frame[23:47, 33:67] = toy.COLOURS["red"]
    other = np.roll(frame, 10, 1)
    points = [(0, 0.5, 0.45, 3), (1, 0.6, 0.45, 3), (1, 0.999, 1.0, 7), (0, 0.02, 0.02, 8)]
    masks = toy.segment([frame, other], points)
    assert masks.keys() == {3, 7, 8} and all(m.shape == (2, 80, 100) and m.dtype == bool for m in masks.values())
    true = np.zeros((80, 100), bool)
    true[21:49, 31:69] = True  # out to the middle of the line
    for k, mask in enumerate(masks[3]):
        here = np.roll(true, 10 * k, 1)
        assert (mask & here).sum() / (mask | here).sum() > 0.93
    assert not masks[7].any() and not masks[8].any()
