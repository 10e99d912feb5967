"""One question about many files: what is written, in which forms, and that nothing is asked twice."""
import csv
import json
import os
import random
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from conftest import picture, png, tiny_model, video, write_lines

import round_trip
import sample
from data import Planner, find_datasets
from eval import load_questions
from lib import toy
from lib.draw import colour_of
from lib.errors import UserError
from lib.export import boxes, write_coco, write_csv, write_mot
from lib.media import sample_times, video_duration
from lib.records import parse_record
from lib.results import Results, label_of, to_annotation
from lib.tasks import answer_of
from lib.text import format_points
from sample import main
from tools.annotate.review import Work
from tools.labels.__main__ import main as read_labels


# ---- an answer becomes a record ----------------------------------------------------------------------------

@pytest.mark.parametrize("question, label", [
    ("Track the ball.", "ball"), ("Follow my dog through the video", "dog"), ("Point to all shapes.", "shapes"),
    ("How many red mugs are there?", "red mugs"), ("Where does the Golf 3.5 go?", "Golf 3.5"),
    ("Show me every one of the cafés!", "one of the cafés"), ("please point at each of the wheels", "wheels"),
    ("Count the stars in this image.", "stars"), ("Was ist das?", "Was ist das"), ("Where are the\nkeys?", "keys"),
    ("Point to the red mugs in all images.", "red mugs"), ("How many cats are there in both of the images?", "cats"),
    ("Find the mugs in image 0, image 2 and image 3.", "mugs"), ("Point to the cup in image_1 and image_2", "cup"),
    ("Where is the man in the picture frame?", "man in the picture frame"), ("Count the images.", "images")])
def test_the_label_is_what_the_question_asks_for(question, label):
    assert label_of(question) == label


P = dict(x=0.5, y=0.25, id=0)
Q = dict(x=0.1, y=1.0, id=1)


@pytest.mark.parametrize("kind, question, answer, want", [
    ("image", "Point to the mugs.", "<point 0.5, 0.25, 0> <point 0.1, 1, 1>",
     dict(task="image_pointing", label="mugs", points=[P, Q])),
    ("image", "Point to the mugs.", "There are none.", dict(task="image_pointing", label="mugs", points=[])),
    ("image", "Find the mugs and say how many.", "<point 0.5, 0.25, 0> <point 0.1, 1, 1> A total of 2.",
     dict(task="image_pointing", label="mugs and say how many", style="point_count", points=[P, Q])),
    ("image", "How many mugs are there?", "3", dict(task="counting", label="mugs", answer="3")),
    ("image", "Which year?", "1998", dict(task="image_qa", answer="1998")),
    ("image", "Describe the image.", "A <point is not one.", dict(task="image_caption", answer="A <point is not one.")),
    ("video", "Describe it.", "", dict(task="video_caption", answer="")),
    ("video", "Track the ball.", "<point 0.5, 0.5, 0.25, 0>",
     dict(task="video_tracking", label="ball", points=[dict(P, t=0.5)])),
    ("video", "Where is the ball?", "<point 0, 0.5, 0.25, 0> <point 0.5, 0.1, 1, 0>",
     dict(task="video_tracking", label="ball", points=[dict(P, t=0.0), dict(Q, id=0, t=0.5)])),
    ("video", "Point to the goals.", "There are 2: <point 1, 0.5, 0.25, 0> <point 9.5, 0.1, 1, 1>",
     dict(task="video_pointing", label="goals", style="video_count_point", points=[dict(P, t=1.0), dict(Q, t=9.5)])),
    ("video", "Track it.", "<point 0.5, 0.25, 0>", dict(task="video_qa", answer="<point 0.5, 0.25, 0>")),
    ("images", "Point to the mugs in all images.", "<point 0, 0.5, 0.25, 0> <point 1, 0.1, 1, 1>",
     dict(task="multi_image_pointing", label="mugs", points=[dict(P, image=0), dict(Q, image=1)])),
    ("images", "Find the mugs.", "<point 1, 0.5, 0.25, 0> <point 1, 0.1, 1, 1> A total of 2.",
     dict(task="multi_image_pointing", label="mugs", style="multi_image_point_then_count",
          points=[dict(P, image=1), dict(Q, image=1)])),
    ("images", "Count the mugs in both images.", "There are 1: <point 1, 0.5, 0.25, 0>",
     dict(task="multi_image_pointing", label="mugs", style="multi_image_count_then_point", points=[dict(P, image=1)])),
    ("images", "Find the mugs.", "There are none.", dict(task="multi_image_pointing", label="mugs", points=[])),
    ("images", "How many mugs are there in all images?", "3", dict(task="counting", label="mugs", answer="3")),
    ("images", "Describe the images.", "Two walls.", dict(task="multi_image_qa", answer="Two walls.")),
    # of two images there is no third, and a point without an image is nowhere
    ("images", "Find a.", "<point 2, 0.5, 0.25, 0>", dict(task="multi_image_qa", answer="<point 2, 0.5, 0.25, 0>")),
    ("images", "Find a.", "<point 0.5, 0.25, 0>", dict(task="multi_image_qa", answer="<point 0.5, 0.25, 0>")),
    ("images", "Find a.", "<point 0, 0.5, 0.25, 0> <point 9, 0.1, 1, 0>",
     dict(task="multi_image_pointing", label="a", points=[dict(P, image=0)])),
    ("images", "Find a.", "<point 0, 0.5, 0.25, 0> <point 1, 0.1, 1, 0>",
     dict(task="multi_image_pointing", label="a", points=[dict(P, image=0), dict(Q, id=0, image=1)])),
    ("images", "Find a.", "<point 1, 0.5, 0.25, 0> <point 1, 0.1, 1, 0>",
     dict(task="multi_image_pointing", label="a", points=[dict(P, image=1), dict(Q, image=1)])),
    # a weak model repeats an id: a record has each once at a time
    ("image", "Find a.", "<point 0.5, 0.25, 0> <point 0.1, 1, 0>", dict(task="image_pointing", label="a",
                                                                       points=[P, Q])),
    ("video", "Find a.", "<point 1, 0.5, 0.25, 0> <point 1, 0.1, 1, 0>",
     dict(task="video_pointing", label="a", points=[dict(P, t=1.0), dict(Q, t=1.0)]))])
def test_an_answer_becomes_an_annotation(kind, question, answer, want):
    annotation = to_annotation(kind, question, answer, n_media=2)
    assert annotation == want | dict(prompt=question)
    record = {kind: ["a", "b"] if kind == "images" else "a", "annotations": [annotation]}
    assert parse_record(json.dumps(record).encode()) == record
    if answer.count(", 0>") < 2 or kind == "video" and "t" in want:
        assert answer_of(annotation, kind) == answer  # it trains to say the same


def test_an_answer_in_the_released_grammar_is_trained_on_as_it_was():
    points = [dict(x=0.25, y=0.5, id=0), dict(x=0.75, y=0.5, id=1)]
    several = [dict(points[0], image=0), dict(points[1], image=1)]
    for kind, points in dict(image=points, images=several).items():
        text = format_points(points, kind, "released", "mugs")
        annotation = to_annotation(kind, "Point to the mugs.", text, "released", len(points))
        assert annotation["points"] == points and answer_of(annotation, kind, "released") == text


# ---- many files --------------------------------------------------------------------------------------------

class Teller:
    """Stands in for a model's answers: each file is answered by its name; asked: the names, in batches."""

    def __init__(self, texts):
        self.texts = texts
        self.asked = []
        self.crash_at = None

    def __call__(self, model, planner, plans, longest, **sampling):
        names = [os.path.basename(plan.media[0][0]) for plan in plans]
        if self.crash_at is not None and len(self.asked) == self.crash_at:
            raise KeyboardInterrupt
        self.asked.append(names)
        failed = sample.prompt_batch(plans, planner.cfg)[1]
        return [self.texts[name] for name in names], failed


TEXTS = {"a.png": "<point 0.5, 0.5, 0> <point 0.1, 0.5, 1>", "b.png": "There are none.", "c.mp4": "A ball.",
         "d.mp4": "<point 0, 0.25, 0.5, 0> <point 0.5, 0.5, 0.5, 0> <point 2, 0.7, 0.5, 0> <point 2, 0.2, 0.1, 2>",
         "e.mp4": "<point 1, 0.3, 0.5, 0>"}


@pytest.fixture
def files(tmp_path, tokenizer, monkeypatch):
    """A folder with media, a model that answers by TEXTS, and `ask(*files, *flags)`, which runs sample.py there."""
    os.makedirs(tmp_path / "in")
    for name in TEXTS:
        if name.endswith("png"):
            picture(tmp_path / "in" / name, "red" if name == "a.png" else "blue")
        else:
            video(tmp_path / "in" / name, n=20 + (name == "c.mp4") + 2 * (name == "e.mp4"))
    model = tiny_model()
    loaded = []
    planner = Planner(tokenizer, model.cfg, 400, max_frames=3)
    monkeypatch.setattr(sample, "load", lambda *a, **k: loaded.append(a) or (model, planner))
    teller = Teller(TEXTS)
    monkeypatch.setattr(sample, "answer", teller)
    monkeypatch.chdir(tmp_path)

    def ask(*names, question="Track the ball.", checkpoint="run/step_1"):
        paths = [name if name.startswith(("-", "out", "in", "csv", "mot", "coco", "1", "2")) or ":" in name
                 else f"in/{name}" for name in names]
        n = next((i for i, path in enumerate(paths) if path.startswith("--")), len(paths))
        monkeypatch.setattr("sys.argv", ["sample.py", checkpoint, *paths[:n], question, "--out", "out", *paths[n:]])
        main()
    ask.teller, ask.loaded, ask.folder = teller, loaded, tmp_path
    return ask


def lines(folder):
    with open(folder / "out" / "results.jsonl", "rb") as f:
        return f.read()


def test_each_file_is_asked_by_itself_and_its_record_can_be_used(files, capsys):
    files(*TEXTS, "--batch", "2")
    assert files.teller.asked == [["a.png", "b.png"], ["c.mp4", "d.mp4"], ["e.mp4"]]
    assert capsys.readouterr().out == "5 files asked about, 0 done before; written: out/results.jsonl\n"
    records = [json.loads(line) for line in lines(files.folder).splitlines()]
    assert [r.get("image") or r["video"] for r in records] == [f"media/{name}" for name in TEXTS]
    assert records[0] == {"id": "a.png", "image": "media/a.png", "annotations": [
        dict(task="image_pointing", prompt="Track the ball.", label="ball",
             points=[dict(x=0.5, y=0.5, id=0), dict(x=0.1, y=0.5, id=1)])],
        "provenance": [dict(step="answer", by="/".join([*str(files.folder).split("/")[-1:], "run/step_1"]))]}
    assert sorted(os.listdir("out/drawn")) == ["a.png", "d.mp4", "d.mp4.png", "e.mp4", "e.mp4.png"]
    questions = load_questions(find_datasets(["out/results.jsonl"])[0])  # eval.py and training take it
    assert [q.task for q in questions] == ["image_pointing", "image_pointing", "video_qa", "video_tracking",
                                           "video_tracking"]
    work = Work("out/results.jsonl")  # tools.annotate review, too
    work.append(dict(row="a.png", key=work.records()[0]["annotations"][0]["key"], verdict="edit", who="ann",
                     when="2026-01-01T00", annotation=dict(records[0]["annotations"][0], points=[])))
    work.finish()
    assert json.loads(lines(files.folder).splitlines()[0])["annotations"][0]["points"] == []
    files(*TEXTS)  # what people corrected is done
    assert len(files.teller.asked) == 3 and len(files.loaded) == 1  # and no model is loaded for nothing


@pytest.mark.parametrize("crash_at", [1, 4])
def test_a_killed_run_goes_on_where_it_was(files, crash_at, capsys):
    files(*TEXTS, "--batch", "1")
    want = lines(files.folder)
    os.remove("out/results.jsonl")
    files.teller.asked.clear()
    files.teller.crash_at = crash_at
    files(*TEXTS, "--batch", "1")
    files.teller.crash_at = None
    done = lines(files.folder) if crash_at else b""
    assert done.count(b"\n") == crash_at
    if crash_at:
        with open("out/results.jsonl", "ab") as f:
            f.write(want[len(done):][:50])  # the line that was being written
    files(*TEXTS, "--batch", "1")
    assert [name for batch in files.teller.asked for name in batch] == list(TEXTS)  # each once
    assert lines(files.folder) == want
    files(*TEXTS)
    assert capsys.readouterr().out.endswith("0 files asked about, 5 done before; written: out/results.jsonl\n")


def test_a_line_without_its_end_is_kept_if_it_is_whole(files):
    files("a.png", "b.png")
    want = lines(files.folder)
    with open("out/results.jsonl", "wb") as f:
        f.write(want[:-1])
    files("a.png", "b.png")
    assert lines(files.folder) == want and len(files.teller.asked) == 1


def test_results_of_others_are_not_mixed(files, capsys):
    files("a.png")
    with pytest.raises(SystemExit):
        files("b.png", checkpoint="run/step_2")
    assert "line 1 of its results.jsonl is no answer of" in capsys.readouterr().err
    with open("out/results.jsonl", "ab") as f:
        f.write(b"{]\n")
    with pytest.raises(SystemExit):
        files("b.png")
    assert capsys.readouterr().err.startswith("error: out/results.jsonl:2: malformed JSON")
    assert len(files.teller.asked) == 1


def test_another_question_is_asked_about_the_same_files(files):
    files("a.png", "e.mp4")
    files("a.png", "e.mp4", question="Where is it?")
    assert len(lines(files.folder).splitlines()) == 4 and len(os.listdir("out/media")) == 2


def test_broken_files_cost_themselves(files, capsys):
    """No file, no medium, a header alone, a video of half its bytes: a line each, and the others are answered."""
    (files.folder / "in" / "notes.png").write_text("no image")
    (files.folder / "in" / "head.png").write_bytes(png(30, 24))
    whole = (files.folder / "in" / "d.mp4").read_bytes()
    (files.folder / "in" / "cut.mp4").write_bytes(whole[:len(whole) // 2])
    broken = ["none.png", "notes.png", "head.png", "cut.mp4"]
    files.teller.texts = TEXTS | dict.fromkeys(broken, "It.")
    with pytest.raises(SystemExit) as e:
        files(*broken[:2], "a.png", *broken[2:], "d.mp4")
    told = capsys.readouterr().err.splitlines()
    assert e.value.code == 1 and [line.split()[:5] for line in sorted(told)] == [
        ["error:", f"in/{name}", "was", "left", "out:"] for name in sorted(broken)]
    assert [json.loads(line)["id"] for line in lines(files.folder).splitlines()] == ["a.png", "d.mp4"]


def test_files_of_one_name_are_told_apart(files):
    picture(files.folder / "in2" / "a.png", "green")
    files.teller.texts = TEXTS | {"a_2.png": "It."}
    files("a.png", "in2/a.png")
    files("in2/a.png", "a.png", "in2/../in/a.png")  # in any order, and by any path
    ids = [json.loads(line)["id"] for line in lines(files.folder).splitlines()]
    assert ids == ["a.png", "a_2.png"] and sorted(os.listdir("out/media")) == ids
    for name, path in (("a.png", "in/a.png"), ("a_2.png", "in2/a.png")):
        assert os.path.samefile(f"out/media/{name}", path)  # no bytes are copied


def test_on_another_disk_media_are_copied(files, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    files("a.png")
    files("a.png")
    assert os.listdir("out/media") == ["a.png"] and not os.path.samefile("out/media/a.png", "in/a.png")


def red(frames, points):
    """A segmenter whose masks are the lower halves."""
    masks = {}
    for k, _, _, i in points:
        masks.setdefault(i, np.zeros((len(frames), *frames[0].shape[:2]), bool))[k, frames[0].shape[0] // 2:] = True
    return masks


def test_a_segmenter_adds_masks_to_the_drawing(files, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "red", red)
    files("b.png", "e.mp4", "--segmenter", f"{__name__}:red")
    assert not os.path.exists("out/drawn/b.png")  # there is no point
    files.teller.texts = {"a.png": "<point 0.5, 0.2, 0>"}
    files("a.png", "--segmenter", f"{__name__}:red")
    drawn = np.asarray(Image.open("out/drawn/a.png"))
    height, width, _ = drawn.shape
    half = tuple(255 // 2 + c // 2 if k == 0 else c // 2 for k, c in enumerate(colour_of(0)))
    assert tuple(drawn[height * 3 // 4, width // 5]) == half and tuple(drawn[height // 4, width // 5]) == (255, 0, 0)
    sheet = np.asarray(Image.open("out/drawn/e.mp4.png")).astype(int)
    rows = np.abs(sheet - sheet[..., :1]).sum((1, 2))  # how coloured the grey film is
    assert rows[150:].mean() > 5 * rows[30:90].mean()


@pytest.mark.parametrize("flags, told", [
    (["--chat"], "--out out: a folder is for one question"),
    (["--segmenter", "no_module:f"], "--segmenter no_module:f"),
    (["--segmenter", "json"], "give MODULE:FUNCTION"), (["--segmenter", "json:nothing"], "give MODULE:FUNCTION")])
def test_mistakes_are_one_line(files, capsys, flags, told):
    with pytest.raises(SystemExit) as e:
        files("a.png", *flags)
    err = capsys.readouterr().err
    assert e.value.code == 2 and told in err and err.count("\n") == 1 and not files.loaded


def test_a_format_needs_a_folder(files, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sample.py", "c", "in/a.png", "What?", "--out", "a.png", "--format", "csv"])
    with pytest.raises(SystemExit):
        main()
    assert "give one as --out" in capsys.readouterr().err


def test_several_images_and_a_file_as_out_are_one_question(files, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(sample.Chat, "ask", lambda self, *a, **k: asked.append(self.record) or iter(["It."]))
    for out in ([], ["--out", "x.png"]):
        monkeypatch.setattr("sys.argv", ["sample.py", "c", "in/a.png", "in/b.png", "What?", *out])
        main()
    assert [record["images"] for record in asked] == [["in/a.png", "in/b.png"]] * 2


# ---- other tools -------------------------------------------------------------------------------------------

def by_media(path):
    """{(media, label): points} of a JSONL file."""
    found = {}
    with open(path, "rb") as f:
        for record in map(parse_record, f):
            for a in record["annotations"]:
                if a.get("points"):
                    found[record.get("image") or record["video"], a["label"]] = sorted(
                        a["points"], key=lambda p: (p.get("t", 0), p["id"]))
    return found


def test_what_is_written_for_other_tools_is_read_back(files, capsys):
    files(*TEXTS, "--format", "csv", "mot", "coco")
    assert capsys.readouterr().out.endswith("results.jsonl, out/results.csv, out/mot/, out/coco.json\n")
    want = by_media("out/results.jsonl")
    assert len(want) == 3 and sum(map(len, want.values())) == 7
    for file in ("results.csv", "coco.json"):
        read_labels([f"out/{file}", "--media", "out/media", "--out", "out/back.jsonl"])
        assert by_media("out/back.jsonl") == want
    read_labels([*(f"out/mot/{name}" for name in os.listdir("out/mot")), "--media", "out/media", "--out",
                 "out/back.jsonl", "--label", "ball"])
    tracks = {key: points for key, points in want.items() if key[0].endswith("mp4")}
    tracks["media/d.mp4", "ball"][-1]["id"] = 1  # MOT counts ids from 1, so that none is known to be left out
    assert by_media("out/back.jsonl") == tracks


def test_the_forms_are_those_of_the_trade(files):
    """By hand: clips of 48 x 32 at 10 frames a second, a box of 5 % of the shorter side."""
    files("d.mp4", "a.png", "--format", "csv", "mot", "coco")
    with open("out/results.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert rows[0] == dict(file="media/a.png", t="", x="0.5", y="0.5", id="0", label="ball")
    assert rows[3] == dict(file="media/d.mp4", t="0.5", x="0.5", y="0.5", id="0", label="ball")
    with open("out/mot/d.txt") as f:
        mot = f.read().splitlines()
    assert mot == ["1,1,11.2,15.2,1.6,1.6,1,-1,-1,-1", "6,1,23.2,15.2,1.6,1.6,1,-1,-1,-1",
                   "20,1,32.8,15.2,1.6,1.6,1,-1,-1,-1", "20,3,8.8,2.4,1.6,1.6,1,-1,-1,-1"]  # the last frame is the 20th
    with open("out/coco.json") as f:
        coco = json.load(f)
    assert coco["videos"] == [dict(id=1, name="media/d.mp4", width=48, height=32)]
    assert coco["images"][:2] == [dict(id=1, file_name="media/a.png", width=30, height=24),
                                  dict(id=2, file_name="media/d/000000.jpg", width=48, height=32, video_id=1,
                                       frame_id=0)]
    assert coco["annotations"][3] == dict(id=4, image_id=3, category_id=1, bbox=[23.2, 15.2, 1.6, 1.6], area=2.56,
                                          iscrowd=0, track_id=0)
    assert [a["track_id"] for a in coco["annotations"]] == [0, 1, 0, 0, 0, 2]
    assert coco["categories"] == [dict(id=1, name="ball")]


@pytest.mark.parametrize("fps", [2.5, 3, 4, 10, 29.97])
@pytest.mark.parametrize("n", [5, 10])
def test_tracks_come_back_at_any_rate(tmp_path, fps, n):
    """Whatever frames there are, a point goes to the one that is shown at its time, and back from it."""
    os.makedirs(tmp_path / "media")
    path = video(tmp_path / "media" / "a.mp4", n=n, fps=Fraction(30000, 1001) if fps == 29.97 else Fraction(fps))
    times = np.unique(sample_times(video_duration(path), 10 ** 9).round(2)).tolist()
    frames = np.arange(n) / float(fps)
    shown = [int(np.flatnonzero(frames <= t + 0.006)[-1]) for t in times]
    points = [dict(t=t, x=round(0.1 + k / 20, 4), y=0.5, id=0) for k, t in enumerate(times)
              if k == 0 or shown[k] > shown[k - 1]]  # a frame can be said once
    annotation = dict(task="video_tracking", label="ball", points=points)
    records = [dict(video="media/a.mp4", annotations=[annotation])]
    write_lines(tmp_path / "want.jsonl", records)
    write_mot(records, str(tmp_path))
    write_coco(records, str(tmp_path))
    write_csv(records, str(tmp_path))
    for file in ("mot/a.txt", "coco.json", "results.csv"):
        read_labels([str(tmp_path / file), "--media", str(tmp_path / "media"), "--out", str(tmp_path / "back.jsonl"),
                     "--label", "ball"])
        assert by_media(tmp_path / "back.jsonl") == by_media(tmp_path / "want.jsonl"), file


def test_names_of_any_kind_and_two_questions_about_one_file(tmp_path):
    """Commas, quotes and accents; videos that differ in their ending; one object per id for a tool without labels."""
    os.makedirs(tmp_path / "media")
    names = ['a, "b" é.mp4', "same.mp4", "same.mov"]
    for name in names:
        video(tmp_path / "media" / name)
    track = lambda label, x: dict(task="video_tracking", label=label, points=[dict(t=t, x=x, y=0.5, id=0)
                                                                              for t in (0, 0.5)])
    records = [dict(video=f"media/{name}", annotations=[track("ball", 0.25)]) for name in names]
    records.append(dict(video=f"media/{names[0]}", annotations=[track('dog, "Rex"', 0.75)]))
    write_lines(tmp_path / "want.jsonl", records)
    for write in (write_csv, write_coco, write_mot):
        write(records, str(tmp_path))
    assert sorted(os.listdir(tmp_path / "mot")) == ['a, "b" é.txt', "same.mov.txt", "same.mp4.txt"]
    for file in ("results.csv", "coco.json"):
        read_labels([str(tmp_path / file), "--media", str(tmp_path / "media"), "--out", str(tmp_path / "back.jsonl")])
        assert by_media(tmp_path / "back.jsonl") == by_media(tmp_path / "want.jsonl")
    read_labels([str(tmp_path / "mot" / name) for name in os.listdir(tmp_path / "mot")]
                + ["--media", str(tmp_path / "media"), "--out", str(tmp_path / "back.jsonl")])
    back = by_media(tmp_path / "back.jsonl")
    assert [(p["t"], p["id"], p["x"]) for p in back[f"media/{names[0]}", "object"]] == [
        (0, 0, 0.25), (0, 1, 0.75), (0.5, 0, 0.25), (0.5, 1, 0.75)]
    assert len(back) == 3


def test_of_two_points_on_one_frame_the_first_counts():
    points = [dict(t=0.5, x=0.5, y=0.5, id=0), dict(t=0.0, x=0.25, y=0.5, id=0), dict(t=0.5, x=0.5, y=0.5, id=1)]
    assert boxes(points, [0.0, 1.0], (40, 20)) == [(0, 0, [9.5, 9.5, 1.0, 1.0]), (0, 1, [19.5, 9.5, 1.0, 1.0])]


def test_results_of_a_folder_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, OSError)):
        Results(str(tmp_path / "file"), "c")


# ---- the round trip ----------------------------------------------------------------------------------------

@pytest.fixture
def clips(tmp_path, monkeypatch):
    """Clips with an object that the toy world does not have: {name: clip}, in a folder "clips"."""
    monkeypatch.setattr(toy, "outline", round_trip.outline)
    return round_trip.film(str(tmp_path / "clips"), 4, seed=0)


def true_points(clip):
    return toy.track(random.Random(0), clip, clip["objects"][:1], "square")["points"]


def test_labels_of_the_round_trip_are_where_the_squares_are(tmp_path, clips):
    round_trip.write_labels(str(tmp_path / "xml"), str(tmp_path / "clips"), clips)
    files = [str(tmp_path / "xml" / name) for name in os.listdir(tmp_path / "xml")]
    read_labels([*files, "--media", str(tmp_path / "clips"), "--out", str(tmp_path / "clips" / "my.jsonl")])
    found = by_media(tmp_path / "clips" / "my.jsonl")
    assert found.keys() == {(name, "square") for name in clips}
    for name, clip in clips.items():
        want = true_points(clip)
        assert [(p["t"], p["id"]) for p in found[name, "square"]] == [(p["t"], 0) for p in want]
        for p, true in zip(found[name, "square"], want):
            assert abs(p["x"] - true["x"]) < 2e-4 and abs(p["y"] - true["y"]) < 2e-4


def test_the_review_leaves_what_is_right(tmp_path, clips, monkeypatch):
    """Answers that are right, beside the square, without one of its points and at a time without it; words; nothing."""
    monkeypatch.setattr("lib.results.draw", lambda *a: None)
    results = Results(str(tmp_path / "out"), "run/small/sft/latest")
    want = []
    first, second, third, fourth = clips
    right = [dict(p, x=round(p["x"] + 0.01, 3)) for p in true_points(clips[first])]  # inside, if not in the middle
    want.append(right)
    beside = [dict(p, id=7) for p in true_points(clips[second])]
    beside[0]["x"] = round((beside[0]["x"] + 0.5) % 1, 3)
    want.append(true_points(clips[second]))
    answers = [format_points(right, "video"), format_points([*beside, dict(t=0.25, x=0.5, y=0.5, id=0)], "video"),
               "The square.", "There are none."]
    want += [true_points(clips[third]), true_points(clips[fourth])]
    for name, answer in zip(clips, answers):
        media = results.keep(str(tmp_path / "clips" / name))
        results.add({"video": media, "annotations": []}, round_trip.QUESTION, answer)
    counts = round_trip.review(results.path, clips)
    with open(results.path, "rb") as f:
        records = [parse_record(line) for line in f]
    for record, points in zip(records, want, strict=True):
        annotation, = record["annotations"]
        assert annotation == dict(task="video_tracking", prompt="Track the square.", label="square", points=points)
    n_set = len(want[2]) + len(want[3])
    assert counts == {"kept": len(right) + len(beside) - 1, "moved": 1, "set": n_set, "deleted": 1, "clips right": 1}
