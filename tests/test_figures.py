"""tools/figures: the pictures of the README show what the code does, read off as a person would."""
import json
import os
import re
import sys
import types

import numpy as np
import pytest
from conftest import picture, video, write_lines
from PIL import Image, ImageDraw

import eval as evaluation
from data import Dataset
from lib.draw import contact_sheet
from tools import figures, show


def boxes(svg, style):
    """[(x, y, width, height)] of the rectangles of a style."""
    found = re.findall(r'<rect x="([^"]*)" y="([^"]*)" width="([^"]*)" height="([^"]*)" class="([^"]*)"', svg)
    return [tuple(map(float, numbers)) for *numbers, name in found if name == style]


def words(svg):
    return re.findall(r">([^<>]+)</text>", svg)


def test_the_mask_of_the_tree_is_the_rule_told_by_hand(tmp_path):
    figures.tree(str(tmp_path / "tree.svg"), cell=8, left=300, top=60)
    svg = (tmp_path / "tree.svg").read_text()
    extents = {}  # colour -> tokens from and to, by the bars on the left
    sees = {}     # (row, column) -> colour
    for colour in ("pale", "c0", "c1", "c2"):
        (_, y, _, height), = [box for box in boxes(svg, colour) if box[0] == 288]
        extents[colour] = int((y - 60) / 8), int((y + height + 1 - 60) / 8)
        for x, y, width, height in boxes(svg, colour):
            if x >= 300 and height == 8:
                for column in range(int((x - 300) / 8), int((x + width - 300) / 8)):
                    sees[int((y - 60) / 8), column] = colour
    assert extents["pale"] == (0, 19)  # bos, start, 16 tokens of the image, end
    T = extents["c2"][1]
    ends = [end for _, end in extents.values()]
    assert [begin for begin, _ in extents.values()] == [0, *ends[:-1]]  # side by side
    group = {token: colour for colour, (begin, end) in extents.items() for token in range(begin, end)}
    for row in range(T):
        for column in range(T):
            causal = column <= row
            is_image = 1 <= row < 19 and 1 <= column < 19
            same = group[row] == group[column] or group[column] == "pale" and group[row] != "c2"
            assert ((row, column) in sees) == (same and (causal or is_image)), (row, column)
            assert sees.get((row, column), group[column]) == group[column]
    assert "3" in words(svg) and "7" in words(svg) and any("&lt;point" in word for word in words(svg))


def test_the_packed_sequences_hold_all_their_tokens(tmp_path, world, monkeypatch):
    monkeypatch.setattr(figures.pretrain, "open_data", lambda cfg: ([(Dataset("rows", [world]), 1.0)], []))
    figures.packed(str(tmp_path / "packed.svg"), n=3, left=16)
    svg = (tmp_path / "packed.svg").read_text()
    bars = [box for box in boxes(svg, "pale") if box[2] == 768]
    assert len(bars) == 3
    covered = 0
    for _, top, _, height in bars:
        for colour in ("c0", "c1", "c2", "c3"):
            covered += sum(width + 0.5 for x, y, width, tall in boxes(svg, colour) if (y, tall) == (top, height))
    told = next(word for word in words(svg) if "examples fill" in word)
    assert f"fill {covered / (3 * 768):.1%}." in told and 0.9 < covered / (3 * 768) <= 1
    n_examples = sum(box[2] == 1 for box in boxes(svg, "bare"))
    assert told.startswith(f"{n_examples} examples")


def test_two_ranks_exchange_heads_for_tokens(tmp_path):
    figures.ulysses_exchange(str(tmp_path / "ulysses.svg"))
    svg = (tmp_path / "ulysses.svg").read_text()
    cells = [word for word in words(svg) if re.fullmatch("[abcd][0-7]", word)]
    held = lambda heads, tokens: [f"{head}{token}" for head in heads for token in tokens]
    first = held("abcd", range(4)) + held("ab", range(8)) + held("abcd", range(4))
    second = held("abcd", range(4, 8)) + held("cd", range(8)) + held("abcd", range(4, 8))
    assert cells == first + second


def test_scores_over_minutes(tmp_path):
    goals = dict(point_hit=0.5, count_accuracy=0.25, none_accuracy=0.75, caption_recall=1.0)
    write_lines(tmp_path / "log.jsonl", [dict(step=1, loss=4.0, seconds=30), dict(step=2, loss=1.0, seconds=90),
                                         dict(step=2, eval=goals), dict(step=3, loss=0.5, seconds=60),
                                         dict(step=3, eval=dict(goals, point_hit=0.9, scenes=9))])
    figures.scores(str(tmp_path), str(tmp_path / "scores.svg"))
    svg = (tmp_path / "scores.svg").read_text()
    assert "loss from 4 at 0.5 to 0.5 at 3 minutes" in svg and "point_hit from 0.5 at 2 to 0.9 at 3 minutes" in svg
    assert {*goals, "minutes"} <= set(words(svg)) and "scenes from" not in svg


def test_the_crops_show_the_picture_at_both_resolutions(tmp_path):
    figures.crops(str(tmp_path / "crops.jpg"), side=189, gap=8, left=232, top=58)
    page = np.asarray(Image.open(tmp_path / "crops.jpg").convert("L")).astype(float)
    photo = figures.landscape(900, 600)
    whole = np.asarray(Image.fromarray(photo).convert("L").resize((189, 189))).astype(float)
    low = page[58 + 126 + 40:][:189, 16:16 + 189]
    assert np.abs(low - whole).mean() < 25  # under its grid
    assert page.shape == (58 + 2 * 197 + 62, 232 + 3 * 197 + 8)  # 2 x 3 crops


def test_figures_want_the_runs(tmp_path, monkeypatch, capsys):
    for args, message in ((["--figures", str(tmp_path)], "must hold the runs pretrain and sft of the toy world"),
                          ([], "name JSONL files, folders of them, or the folders of runs")):
        monkeypatch.setattr(sys, "argv", ["show", *args])
        with pytest.raises(SystemExit) as stopped:
            show.main()
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    written = []
    for name in ("scores", "tree", "packed", "crops", "ulysses_exchange"):
        monkeypatch.setattr(figures, name, lambda *args, name=name: written.append((name, *args)))
    chat = types.SimpleNamespace(ask=lambda question: ["<point 0, 0.5, 0.5, 0> <point 0.5, 0.9, 0.5, 0>"])
    monkeypatch.setattr(figures.sample, "load", lambda path: [path])
    monkeypatch.setattr(figures.sample, "Chat", lambda path, clip: chat)
    os.makedirs(tmp_path / "toy/clips/eval/video")
    video(tmp_path / "toy/clips/eval/video/00024.mp4")
    monkeypatch.setattr(figures.toy, "FOLDER", str(tmp_path / "toy"))
    os.makedirs(tmp_path / "sft" / "latest")
    for k in (100, 200):
        picture(str(tmp_path / f"pretrain/samples/step_{k:07d}.png"), (k, 0, 0))
    monkeypatch.setattr(sys, "argv", ["show", "--figures", str(tmp_path), "--out", str(tmp_path / "new")])
    show.main()
    assert len(written) == 5 and capsys.readouterr().out == f"{tmp_path}/new has the pictures\n"
    assert json.dumps(written).count(str(tmp_path / "new")) == 5
    assert sorted(os.listdir(tmp_path / "new")) == ["toy.png", "track.gif"]
    assert Image.open(tmp_path / "new" / "toy.png").convert("RGB").getpixel((0, 0)) == (200, 0, 0)  # the last one


# ---- contact sheets ----------------------------------------------------------------------------------------

def test_a_contact_sheet_cuts_no_word(tmp_path, monkeypatch):
    file = picture(tmp_path / "a.png", "red")
    asked = [("Where are the yellow circles?", "2 points"),
             ("Which shapes do you see, from left to right?",
              "The picture shows a yellow star, a purple bar and a yellow circle."),
             ("List the shapes from left to right.", "purple " * 90)]
    drawn = {}  # left edge -> lines

    def write(pen, place, line, *_):
        assert pen.textlength(line) <= 150
        assert place[1] + 13 <= pen.im.size[1]
        drawn.setdefault(place[0], []).append(line)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", write)
    contact_sheet([(file, *words, [], []) for words in asked], str(tmp_path / "sheets" / "sheet.png"))
    told = [" ".join(lines) for lines in drawn.values()]
    assert told[:2] == [" ".join(words) for words in asked[:2]]
    assert re.fullmatch(r"List the shapes from left to right\.( purple)+ \.\.\.", told[2])


@pytest.mark.parametrize("answer, told", [("<point 0.2, 0.3, 0>", "1 point"), ("There are none.", "There are none."),
                                          ("<point 0.2, 0.3, 0> <point 0.5, 0.3, 1>", "2 points")])
def test_one_point_is_no_points(tmp_path, answer, told):
    record = dict(image="a.png", annotations=[dict(task="image_pointing", prompt="Where?", points=[])])
    question = evaluation.Question(record, record["annotations"][0], str(tmp_path), "a:1")
    assert evaluation.scene_cells([question], [answer])[0][2] == told
