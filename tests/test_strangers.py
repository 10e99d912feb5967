"""What strangers bring: lines as other programs write them, files of another form, data that fits nowhere."""
import json
import os
import random
import re

import numpy as np
import pytest
from PIL import Image
from conftest import QUICK, picture, run, tiny_model, video, write_lines

import eval as evaluation
import sample
from data import (Dataset, POINT_CLIPPED, POINT_OUTSIDE, Planner, Stream, TOO_LONG, find_datasets, left_out_so_far)
from lib.errors import BadRecord
from lib.records import build_index, line_index, parse_record
from lib.text import SMALL_TOKENIZER, Tokenizer
from model import PRESETS


@pytest.fixture(scope="module")
def planner():
    cfg = PRESETS["small"]
    return Planner(Tokenizer(SMALL_TOKENIZER, cfg.vocab), cfg, 256, max_frames=16, max_crops=16)


def parsed(**record):
    return parse_record(json.dumps(record).encode())


CAPTION = dict(task="image_caption", answer="A thing.")


def pointing(**point):
    return dict(image="a.png", annotations=[dict(task="image_pointing", label="it", points=[dict(id=0) | point])])


# ---- lines -------------------------------------------------------------------------------------------------

def test_a_field_that_is_null_is_not_there():
    empty = dict.fromkeys(("images", "video", "start", "end", "duration", "width", "height", "subtitles", "provenance",
                           "fps"))
    asked = dict.fromkeys(("prompt", "style", "question", "options", "correct", "messages", "images", "answer",
                           "input_points", "timestamp"))
    record = parsed(**empty, image="a.png", annotations=[
        dict(asked, task="image_pointing", label="it", points=[dict(x=.5, y=.5, id=0, t=None, image=None)]),
        dict(asked, task="image_caption", label=None, answer="A thing.", points=None)])
    assert record == dict(image="a.png", annotations=[
        dict(task="image_pointing", label="it", points=[dict(x=.5, y=.5, id=0)]), CAPTION])
    film = parsed(video="a.mp4", image=None, subtitles=[dict(start=0, end=1, text="a", speaker=None)],
                  annotations=[dict(task="video_caption", answer="b")])
    assert film["subtitles"] == [dict(start=0, end=1, text="a")]
    with pytest.raises(BadRecord, match="image_caption without answer"):
        parsed(image="a.png", annotations=[dict(CAPTION, answer=None)])


@pytest.mark.parametrize("record, want", [
    (pointing(x=0.5, y=1.0, id=3.0), lambda r: r["annotations"][0]["points"][0]["id"] == 3),
    (dict(image="a.png", width=30.0, height=60.0, annotations=[CAPTION]), lambda r: r["width"] == 30),
    (dict(images=["a.png", "b.png"], annotations=[dict(task="multi_image_pointing", label="it", images=[1.0], points=[
        dict(x=0, y=1, id=0.0, image=1.0)])]), lambda r: r["annotations"][0]["images"] == [1]),
    (dict(image="a.png", annotations=[dict(task="image_qa", question="?", options=["a", "b"], correct=1.0)]),
     lambda r: r["annotations"][0]["correct"] == 1),
    (dict(image="a.png", annotations=[dict(task="counting", prompt="How many?", answer=3)]),
     lambda r: r["annotations"][0]["answer"] == "3"),
    (dict(image="a.png", annotations=[dict(task="counting", prompt="How many?", answer=3.0)]),
     lambda r: r["annotations"][0]["answer"] == "3"),
    (dict(image="a.png", annotations=[dict(task="image_qa", prompt="How long?", answer=2.5)]),
     lambda r: r["annotations"][0]["answer"] == "2.5")])
def test_numbers_as_table_programs_write_them(record, want):
    assert want(parsed(**record))


@pytest.mark.parametrize("record, said", [
    (pointing(x=0.5, y=0.5, id=0.5), "whole number id"), (pointing(x=0.5, y=0.5, id=True), "whole number id"),
    (dict(image="a.png", annotations=[dict(CAPTION, answer=True)]), "answer is True, not text"),
    (pointing(x=31.25, y=62, id=0), "in per cent"), (pointing(x=100, y=0, id=0), "in per cent"),
    (pointing(x=1.001, y=0.5, id=0), "in per cent"), (pointing(x=640, y=20.5, id=0), "in pixels"),
    (pointing(x=-3, y=0.5, id=0), r"x -3, y 0.5$"), (pointing(x="0.5", y=0.5, id=0), "x '0.5'"),
    (pointing(y=0.5), "x None")])
def test_other_values_are_named(record, said):
    with pytest.raises(BadRecord, match=said):
        parsed(**record)


@pytest.mark.parametrize("x, y, n", [(1.0000001, 0.5, 1), (-1e-9, 1.0004, 1), (-0.0005, 0, 1), (0, 1, 0)])
def test_points_beside_the_edge_by_a_rounding_error_are_on_it(planner, tmp_path, x, y, n):
    picture(tmp_path / "a.png", "red")
    (plan,), left_out = planner.plan(parsed(**pointing(x=x, y=y)), str(tmp_path), random.Random(0))
    clipped = parsed(**pointing(x=min(max(x, 0), 1), y=min(max(y, 0), 1)))
    on_edge = planner.plan(clipped, str(tmp_path), random.Random(0))
    assert left_out == [POINT_CLIPPED] * n and np.array_equal(plan.tokens, on_edge[0][0].tokens)


def test_points_outside_a_clip_are_counted(planner):
    points = [dict(t=t, x=0.5, y=0.5, id=0) for t in (0, 1, 1.5, 2, 9)]
    record = parsed(video="a.mp4", duration=10, start=1, end=2, annotations=[
        dict(task="video_tracking", label="it", points=points)])
    (plan,), left_out = planner.plan(record, ".", random.Random(0))
    assert left_out == [POINT_OUTSIDE] * 2


@pytest.mark.parametrize("text, numbers", [
    (b"a\n \n\t\n\r\nb\n  \t \r\n", [1, 5]), (b"\n\n\n", []), (b"", []), (b"   ", []), (b"a", [1]), (b"a\nb", [1, 2]),
    (b" a \n\x0b\x0c\nb \n", [1, 3]), (b"\xef\xbb\xbfa\n\xc2\xa0\n", [1, 2])])
def test_a_blank_line_is_no_line(tmp_path, text, numbers):
    path = tmp_path / "a.jsonl"
    path.write_bytes(text)
    for _ in range(2):  # made, then read
        assert line_index(str(path))[2:, 1].tolist() == numbers


def test_blank_lines_across_chunks(tmp_path, monkeypatch):
    rng = random.Random(0)
    text = b"".join(rng.choice((b"a", b" ", b"\n", b"\n", b"\r\n", b"  bc ")) for _ in range(3000))
    path = tmp_path / "a.jsonl"
    path.write_bytes(text)
    want, start = [], 0
    for i, line in enumerate(text.split(b"\n"), 1):
        if line.strip():
            want.append([start, i])
        start += len(line) + 1

    class Small:  # reads 7 bytes at a time
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def read(self, n):
            return self.file.read(7)
    monkeypatch.setattr("builtins.open", lambda *a, open=open: Small(open(*a)))
    assert build_index(str(path), (0, 0))[2:].tolist() == want


@pytest.mark.parametrize("text", [
    '[{"image": "a.png", "annotations": []}]', '[\n {"image": "a.png"}\n]', '\ufeff [1]', "\n\n[\n", "[]",
    '{\n "image": "a.png",\n "annotations": []\n}\n', "{ \r\n}", "\ufeff{\n"])
def test_json_of_another_form_gets_one_message(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match='a.json:[13]: JSON over several lines, or an array; one record.*"image"'):
        find_datasets([str(path)])


def test_the_same_file_twice_is_said(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [dict(image="a.png", annotations=[CAPTION])])
    for again in (path, str(tmp_path / "x" / ".." / "a.jsonl")):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="named twice"):
            find_datasets([path, again])


# ---- nothing waits for ever --------------------------------------------------------------------------------

LONG = dict(annotations=[dict(task="text", prompt="?", answer="word " * 300)])
SHORT = dict(annotations=[dict(task="text", prompt="?", answer="yes")])
FILM = dict(video="a.mp4", duration=5, annotations=[dict(task="video_caption", answer="b")])


def stream_of(planner, tmp_path, records):
    return Stream([(Dataset("mine", [write_lines(tmp_path / "mine.jsonl", records)]), 1.0)], planner, 0)


def test_two_hundred_draws_without_an_example_end_a_run_wherever_they_come(planner, tmp_path):
    stream = stream_of(planner, tmp_path, [SHORT] + [LONG] * 5000)
    with pytest.raises(ValueError, match=r"not one of 200 records in a row can be used, the last of them: annotation "
                       r"too long; so far \d+ annotation too long \(--seq_len\)$"):
        for _ in zip(range(10 ** 5), stream.sequences()):
            pass


def test_what_a_run_will_leave_out_is_told_at_its_start(planner, tmp_path):
    some = stream_of(planner, tmp_path, [SHORT, SHORT, LONG, FILM])
    without = Planner(planner.tokenizer, planner.cfg, 256)  # no --max_frames
    some.planner = without
    _, told = some.first_look()
    assert "of the first 64 records give nothing to train on: " in told
    assert "annotation too long (--seq_len)" in told and "no reader for video in this stage (--max_frames)" in told
    assert stream_of(planner, tmp_path, [SHORT] * 20 + [LONG]).first_look()[1] == ""


def test_a_cap_of_crops_below_the_frames_is_told(planner, tmp_path):
    tight = Planner(planner.tokenizer, planner.cfg, 768, max_frames=48, max_crops=16)
    assert "at most 16 frames: --max_crops 16 ends before --max_frames 48" in stream_of(
        tight, tmp_path, [SHORT]).first_look()[1]


def test_reasons_come_with_the_flag_that_makes_room():
    state = dict(bad=dict(a={"malformed JSON": 2}), skipped=dict(a={TOO_LONG: 3}, b={TOO_LONG: 4}))
    assert left_out_so_far(state) == "7 annotation too long (--seq_len), 2 malformed JSON"


# ---- what is named on the command line ---------------------------------------------------------------------

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    tiny_model().save_pretrained(folder, 3, 0)
    Tokenizer(SMALL_TOKENIZER, 1024).save(folder)
    return folder


def command(module, monkeypatch, capsys, *argv):
    """(exit code, output, errors) of a command."""
    monkeypatch.setattr("sys.argv", [module.__file__, *map(str, argv)])
    code = 0
    try:
        module.main()
    except SystemExit as e:
        code = e.code
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    return code, told.out, told.err


def test_files_in_any_folder_and_links_are_asked_about(checkpoint, tmp_path, monkeypatch, capsys):
    for name in ("a/x.png", "b/y.png", "blobs/abc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), "red").save(tmp_path / name, "PNG")
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "photo.png").symlink_to("../blobs/abc")
    ask = ["What?", "--max_new_tokens", 1, "--out", tmp_path / "o.png"]
    for media in (["a/x.png", "b/y.png"], ["snapshots/photo.png"]):
        assert command(sample, monkeypatch, capsys, checkpoint, *[tmp_path / m for m in media], *ask)[0] == 0
    monkeypatch.chdir("/")
    assert command(sample, monkeypatch, capsys, checkpoint, str(tmp_path / "a/x.png").lstrip("/"), *ask)[0] == 0


@pytest.mark.parametrize("name, kind", [("clip", "video"), ("clip.png", "video"), ("moving.gif", "video"),
                                        ("still.gif", "image"), ("image.mp4", "image"), ("pair", "images")])
def test_a_file_is_what_its_first_bytes_say(tmp_path, name, kind):
    image = Image.new("RGB", (30, 20), "red")
    path = str(tmp_path / name)
    if name == "moving.gif":
        image.save(path, save_all=True, append_images=[Image.new("RGB", (30, 20), "blue")])
    elif kind == "video":
        os.rename(video(tmp_path / "made.mp4"), path)
    else:
        image.save(path, "GIF" if name.endswith("gif") else "PNG")
    assert sample.kind_of([path, path] if kind == "images" else [path]) == kind


@pytest.mark.parametrize("argv, said", [
    (["--max_new_tokens", "-1"], "--max_new_tokens: -1: must be at least 1"), (["--tiles", "-2"], "at least 0"),
    (["--max_frames", "0"], "at least 1"), (["--out", "answer.txt"], "--out answer.txt: must end in one of .png"),
    (["--out", "answer.mp4"], "must end in one of .png"),
    (["--out", "no/such/answer.png"], "there is no folder no/such")])
def test_wrong_flags_are_one_line_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.setattr(sample, "load", None)
    code, _, err = command(sample, monkeypatch, capsys, "none", picture(tmp_path / "a.png", "red"), "What?", *argv)
    assert code == 2 and said in err.splitlines()[-1]


@pytest.mark.parametrize("question, said", [("", "the question is empty"), (" \n", "the question is empty"),
                                            ("why " * 70000, "question too long: [0-9]+ tokens, and 12 of the media")])
def test_questions_that_cannot_be_asked(checkpoint, tmp_path, monkeypatch, capsys, question, said):
    code, _, err = command(sample, monkeypatch, capsys, checkpoint, picture(tmp_path / "a.png", "red"), question)
    assert code == 2 and re.fullmatch(f"error: {said}.*\n", err)


def test_one_bad_image_costs_an_evaluation_its_own_questions(checkpoint, tmp_path, monkeypatch, capsys):
    for name in "ac":
        picture(tmp_path / f"{name}.png", "red")
    whole = open(tmp_path / "a.png", "rb").read()
    (tmp_path / "b.png").write_bytes(whole[:len(whole) // 2])
    asked = dict(task="image_qa", prompt="What?", answer="It.")
    records = [dict(image=f"{name}.png", annotations=[asked, asked]) for name in "abcd"]
    rows = write_lines(tmp_path / "rows.jsonl", records)
    code, out, err = command(evaluation, monkeypatch, capsys, checkpoint, "--data", rows, "--out", tmp_path / "e.json",
                             "--max_new_tokens", 2)
    assert code == 1 and "image_qa accuracy" in out
    lines = sorted(err.splitlines())
    assert len(lines) == 2 and all(f"rows.jsonl:{n} was left out: " in line for n, line in zip((2, 4), lines))
    kept = json.load(open(tmp_path / "e.json"))["predictions"][checkpoint]
    assert [p["where"].rsplit(":", 1)[1] for p in kept] == ["1", "1", "3", "3"]


@pytest.mark.parametrize("lines, said", [
    ([LONG], "not one of 200 records in a row .* annotation too long .*--seq_len"),
    ([SHORT], "--eval_data .*long.jsonl: nothing of it fits a sequence; --seq_len 192")])
def test_a_run_on_what_fits_nowhere_ends_with_a_reason(tmp_path, lines, said):
    mine, long = write_lines(tmp_path / "mine.jsonl", lines), write_lines(tmp_path / "long.jsonl", [LONG])
    held_out = ["--eval_data", long] if lines == [SHORT] else []
    code, text = run(tmp_path, *QUICK, "--steps", "3", "--data", mine, *held_out, check=False)
    assert code == 2 and re.search(f"error: .*{said}", text) and "Traceback" not in text, text
