"""Stage 2 is stage 1's loop with other numbers: where it starts, what it reads."""
import json
import os

from conftest import QUICK, run, stage_2, video, write_lines

from lib import toy
from data import find_datasets
from eval import load_questions
from lib.records import parse_record


def test_stage_2_goes_on_from_stage_1_and_learns_from_video(tmp_path, world):
    video(tmp_path / "clip.mp4")
    row = dict(video="clip.mp4", annotations=[dict(task="video_tracking", label="dot", points=[
        dict(t=t / 2, x=0.5, y=0.5, id=0) for t in range(4)]),
        dict(task="video_caption", answer="It gets lighter.")])
    clips = write_lines(tmp_path / "clips.jsonl", [row])
    flags = [*QUICK, "--steps", "4", "--save_every", "4"]
    code, text = stage_2(tmp_path, *flags, "--data", clips, "--out", "alone")
    assert code == 0 and "starting from random weights" in text and os.path.isdir(tmp_path / "alone/small/sft/latest")
    run(tmp_path, *flags, "--data", world)
    code, text = stage_2(tmp_path, *flags, "--data", clips, world, "--rebalance", "clips=3")
    assert code == 0 and "*init_from=out/small/pretrain/latest" in text and "starting from random" not in text
    rows = [json.loads(line) for line in open(tmp_path / "out/small/sft/log.jsonl")]
    first = next(r["loss"] for r in rows if "loss" in r)
    fresh = next(json.loads(line)["loss"] for line in open(tmp_path / "alone/small/sft/log.jsonl"))
    assert first < fresh  # four steps of stage 1 are little, but more than nothing
    code, text = stage_2(tmp_path, *flags, "--data", clips, "--rebalance", "dips=3")
    assert code == 2 and "--rebalance dips=3: NAME=FACTOR" in text


def test_the_toy_worlds_clips_can_be_asked_about(tmp_path):
    """Every line trains, every held-out line is a question with masks; the same seed films the same clips."""
    folder = toy.write_clips(str(tmp_path / "clips"), clips=12, held_out=10)
    for path in ("clips.jsonl", "tracks.jsonl"):
        rows = [parse_record(line) for line in open(os.path.join(folder, path), "rb")]
        assert len(rows) == 12 and not any("masks" in a for r in rows for a in r["annotations"])
    questions = load_questions(find_datasets([os.path.join(folder, "eval")])[0])
    tracks = [q for q in questions if q.task == "video_tracking"]
    assert {q.task for q in questions} == {"video_caption", "video_qa", "video_pointing", "video_tracking"}
    assert tracks and all(len(q.masks) == len(q.points) for q in tracks)
    assert all(q.hits(p, p) for q in tracks for p in q.points[:1])
    again = toy.write_clips(str(tmp_path / "again"), clips=12, held_out=10)
    assert open(os.path.join(again, "tracks.jsonl")).read() == open(os.path.join(folder, "tracks.jsonl")).read()
