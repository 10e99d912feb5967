"""The toy world is real files, answers follow from its geometry, and its scores can go wrong."""
import json
import os
import re

import numpy as np
import pytest
import toy
from data import Dataset, format_points, parse_row
from media import load_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.write_world(str(tmp_path_factory.mktemp("world") / "toy"), scenes=40, held_out=20, texts=10)


def rows(path):
    return [json.loads(line) for line in open(path)]


def test_every_line_is_a_row_with_its_picture(folder):
    for name in ("captions", "points", "text", "eval/scenes"):
        d = Dataset(name, [os.path.join(folder, name + ".jsonl")])
        for i in range(len(d)):
            line, where, _ = d.line(i)
            row = parse_row(line)
            if "image" in row:
                assert load_image(os.path.join(where, row["image"])).shape[2] == 3
    # the README and pretrain.py ask about this one
    assert os.path.exists(os.path.join(folder, "eval/images/00003.png"))
    assert {f.rsplit(".")[-1] for f in os.listdir(os.path.join(folder, "images"))} == {"png", "jpg"}


def test_the_same_seed_draws_the_same_world(folder, tmp_path):
    again = toy.write_world(str(tmp_path / "toy"), scenes=40, held_out=20, texts=10)
    for name in ("points.jsonl", "eval/geometry.json", "images/00025." + ("png" if os.path.exists(
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


class Oracle:
    """Stands in for generation: answers from the annotations, wrongly where it is told to."""

    def __init__(self, folder, spoil):
        self.known = {}
        for r in rows(os.path.join(folder, "eval", "scenes.jsonl")):
            for a in r["annotations"]:
                self.known[r["image"], a["prompt"]] = a
        self.spoil = spoil

    def answers(self, model, planner, asked, limit, batch, world):
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
    monkeypatch.setattr(toy, "answers", oracle.answers)
    scores = toy.evaluate(None, oracle, os.path.join(folder, "eval"), 20)
    for name, value in expected.items():
        assert scores[name] == value, name
    doubled = spoil(dict(points=[1], task=""), "<point 0.5, 0.5, 0>") != "<point 0.5, 0.5, 0>"
    assert (scores["point_precision"] < 0.9) == (doubled or not scores["point_hit"])


def test_a_phrase_names_one_object():
    two = [dict(colour="red", shape="star")] * 2
    assert toy.named("a red star", two) == [True, False] and toy.named("a red star and a red star", two) == [True, True]
