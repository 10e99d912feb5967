"""Metrics against their published definitions, and what an evaluation does with answers and data that are
wrong."""
import itertools
import json
import os
from json import dumps

import numpy as np
import pytest
import requests
from conftest import HERE, picture, video, write_lines

import eval as evaluation
import toy
from data import BadRow, find_datasets, format_points
from eval import (Judge, JudgeError, Question, assign, boundary_f, count_accuracy, hota, j_and_f,
                  load_questions, point_f1, region_j, said_number, score, score_track, word_overlap)

JF = os.path.join(HERE, "golden", "jf-metric")


def test_j_and_f_are_those_of_davis():
    with open(os.path.join(JF, "jf.json")) as f:
        pairs = json.load(f)["pairs"]
    packed = np.load(os.path.join(JF, "masks_packed.npz"))
    assert len(pairs) == 30
    for p in pairs:
        size = p["height"], p["width"]
        a, b = (np.unpackbits(packed[f"{p['index']:02d}_{k}"])[:size[0] * size[1]].reshape(size).astype(bool)
                for k in ("annotation", "segmentation"))
        assert region_j(b, a) == pytest.approx(p["J"], abs=1e-6), p
        assert boundary_f(b, a) == pytest.approx(p["F"], abs=1e-6), p
    assert j_and_f([a, a], [a, ~a])[0] == pytest.approx(0.5, abs=1e-6)


def test_assignment_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(500):
        n, m = rng.integers(0, 6, 2)
        cost = rng.random((n, m)) if rng.random() < 0.7 else rng.integers(0, 3, (n, m))
        pairs = assign(cost)
        small, large = sorted((n, m))
        assert len(pairs) == small and all(len(set(side)) == small for side in zip(*pairs))
        wide = cost if n <= m else cost.T
        best = min(sum(wide[i, j] for i, j in enumerate(p))
                   for p in itertools.permutations(range(large), int(small)))
        assert sum(cost[i, j] for i, j in pairs) == pytest.approx(best)


def test_point_f1_is_that_of_trying_every_matching():
    rng = np.random.default_rng(1)
    for _ in range(500):
        n, m = rng.integers(0, 5, 2)
        p, t, hit = rng.random((n, 2)), rng.random((m, 2)), rng.random((n, m)) < 0.6
        got = point_f1(p, t, lambda i, j: hit[i, j])
        if not n and not m:
            assert got == (1, 1, 1)
            continue
        options = ([(i, j) for i, j in enumerate(c)] if n <= m else [(i, j) for j, i in enumerate(c)]
                   for c in itertools.permutations(range(max(n, m)), int(min(n, m))))
        best = min(options, key=lambda o: sum(np.linalg.norm(p[i] - t[j]) for i, j in o))
        hits = sum(hit[i, j] for i, j in best)
        precision, recall = hits / n if n else 0, hits / m if m else 0
        assert got == pytest.approx((precision, recall, 2 * hits / (n + m)))


def test_hota_of_cases_worked_by_hand():
    yes, both = [[True]], [[True, False], [False, True]]
    assert hota([([0], [7], yes)] * 4) == (1, 1, 1)
    # Half of the frames have no prediction: TP 2, FN 2, so DetA 1/2; the two matches share 2 of 4 frames:
    # AssA 1/2.
    assert hota([([0], [7], yes)] * 2 + [([0], [], [[]])] * 2) == pytest.approx((0.5, 0.5, 0.5))
    # One object, called by another number half-way: all found, but each name holds for 2 of 4 frames.
    assert hota([([0], [1], yes)] * 2 + [([0], [2], yes)] * 2) == pytest.approx((0.5 ** 0.5, 1, 0.5))
    # Two objects whose names are swapped half-way: as above.
    assert hota([([0, 1], [0, 1], both)] * 2 + [([0, 1], [1, 0], both)] * 2)[1:] == pytest.approx((1, 1 / 3))
    # Points beside everything: nothing is found. A point where nothing is: one false among two right.
    assert hota([([0], [0], [[False]])] * 3) == (0, 0, 0)
    assert hota([([0], [0], yes)] * 2 + [([], [0], np.zeros((0, 1)))])[1] == pytest.approx(2 / 3)
    assert hota([]) == (1, 1, 1)


@pytest.mark.parametrize("text, number",
                         [("3", 3), ("There are none.", 0), ("Counting the cups shows a total of 12.", 12),
                                          ("<point 0.1, 0.2, 0> <point 0.3, 0.2, 1>", 2), ("I see 4 cups", 4),
                                          ("many", None),
                                          ('<points coords="1 1 100 100 2 200 200">cups</points>', 2)])
def test_numbers_in_answers(text, number):
    assert said_number(text) == number


def test_counts_are_close_within_one_and_five_percent():
    assert count_accuracy(3, 3) == (1, 1) and count_accuracy(4, 3) == (0, 1) and count_accuracy(5, 3) == (0,
                                                                                                          0)
    assert count_accuracy(42, 40) == (0, 1) and count_accuracy(44, 40) == (0, 0) and count_accuracy(None, 0) == (0, 0)


def test_word_overlap_is_a_proxy():
    assert word_overlap("A red star.", "a red star") == (1, 1, 1) and word_overlap("", "a") == (0, 0, 0)
    assert word_overlap("a red circle", "a red star moves") == pytest.approx((2 / 3, 1 / 2, 4 / 7))


# ---- answers -----------------------------------------------------------------------------------------------

SQUARE = [[0.25, 0.25], [0.75, 0.25], [0.75, 0.75], [0.25, 0.75]]


def question(folder, task, kind="video", row=None, **a):
    (folder / "a.mp4").exists() or video(folder / "a.mp4", size=(48, 32))
    picture(folder / "a.png", "red", (48, 32))
    media = dict(video="a.mp4") if kind == "video" else dict(image="a.png")
    return Question(dict(media, **(row or {})), dict(a, task=task, prompt="?"), str(folder), "rows.jsonl:1")


def test_points_are_scored_by_mask_and_moment(tmp_path):
    q = question(tmp_path, "video_pointing", points=[dict(t=0.5, x=0.5, y=0.5, id=0)],
                 masks=[dict(t=0.5, id=0, polygon=SQUARE)])
    f1 = lambda text: score(q, text)["f1"]
    assert f1("<point 0.5, 0.5, 0.5, 0>") == f1("<point 0.5, 0.3, 0.7, 4>") == 1
    assert f1("<point 1, 0.5, 0.5, 0>") == f1("<point 0.5, 0.9, 0.5, 0>") == f1("no idea") == f1("") == 0
    assert f1("<point 0.5, 0.5, 0.5, 0> <point 1, 0.5, 0.5, 1>") == pytest.approx(2 / 3)
    q = question(tmp_path, "image_pointing", "image", points=[dict(x=0.5, y=0.5, id=0)])
    assert score(q, "<point 0.53, 0.5, 0>")["f1"] == 1 and score(q, "<point 0.56, 0.5, 0>")["f1"] == 0
    none = question(tmp_path, "image_pointing", "image", points=[])
    assert score(none, "There are none.")["f1"] == 1 and score(none, "<point 0.5, 0.5, 0>")["f1"] == 0


def test_run_length_masks_and_polygons_agree(tmp_path):
    counts, mask = [], np.zeros((32, 48), bool)
    mask[8:25, 12:37] = True
    last = False
    for v in mask.T.ravel():
        if not counts or v != last:
            counts.append(0)
        counts[-1] += 1
        last = v
    points, rle = [dict(x=0.5, y=0.5, id=0)], dict(size=[32, 48], counts=counts)
    q = question(tmp_path, "image_pointing", "image", points=points, masks=[dict(id=0, rle=rle)])
    assert np.array_equal(q.mask(points[0]), mask)
    p = question(tmp_path, "image_pointing", "image", points=points, masks=[dict(id=0, polygon=SQUARE)])
    assert np.array_equal(p.mask(points[0]), mask)
    with pytest.raises(BadRow, match="rows.jsonl:1: a mask of 9x9 on media of 48x32"):
        question(tmp_path, "image_pointing", "image", points=points,
                 masks=[dict(id=0, rle=dict(size=[9, 9], counts=[81]))]
                 ).mask(points[0])


def test_tracks_are_scored_frame_by_frame(tmp_path):
    times = (0, 0.5, 1.0, 1.5)
    q = question(tmp_path, "video_tracking", points=[dict(t=t, x=0.5, y=0.5, id=0) for t in times],
                 masks=[dict(t=t, id=0, polygon=SQUARE) for t in times])
    right = " ".join(f"<point {t:g}, 0.4, 0.6, 0>" for t in times)
    square = q.mask(q.points[0])
    perfect = lambda frames, points: {i: np.stack([square * (k in {p[0] for p in points if p[3] == i})
                                                   for k in range(len(frames))]) > 0
                                                   for i in {p[3] for p in points}}
    assert set(score_track(q, right, perfect).values()) == {1.0}
    half = score_track(q, " ".join(f"<point {t:g}, 0.4, 0.6, 3>" for t in times[:2]), perfect)
    assert half["accuracy"] == half["recall"] == half["f1"] == half["hota"] == half["j"] == half["f"] == 0.5
    wrong = score_track(q, "no points at all", perfect)
    assert set(wrong.values()) == {0.0}
    more = score_track(q, right + " <point 3, 0.5, 0.5, 0>", perfect)
    assert more["accuracy"] == 1 and more["j"] == pytest.approx(0.8) and more["precision"] == pytest.approx(0.8)


def test_clips_that_start_later_keep_their_masks(tmp_path):
    """In the file times count from its start; the model answers from the start of the clip."""
    true = [dict(t=t, x=0.5, y=0.5, id=0) for t in (1.0, 1.5)]
    masks = [dict(t=t, id=0, polygon=SQUARE) for t in (1.0, 1.5)]
    q = question(tmp_path, "video_tracking", row=dict(start=1.0, end=1.9), points=true, masks=masks)
    assert score_track(q, "<point 0, 0.4, 0.6, 0> <point 0.5, 0.4, 0.6, 0>", toy.segment)["accuracy"] == 1
    assert score_track(q, "<point 1, 0.4, 0.6, 0> <point 1.5, 0.4, 0.6, 0>")["accuracy"] == 0
    write_lines(tmp_path / "rows.jsonl", [dict(video="a.mp4", start=1.0, end=1.2, annotations=[
        dict(task="video_tracking", prompt="?", points=true, masks=masks)])])
    with pytest.raises(BadRow, match="rows.jsonl:1: a point at 1.5 s of a clip of 1.0 to 1.2 s"):
        load_questions(find_datasets([str(tmp_path / "rows.jsonl")])[0])


def test_data_that_contradicts_itself_is_named(tmp_path):
    twice = [dict(t=0.5, x=0, y=0, id=1), dict(t=0.5, x=1, y=1, id=1)]
    with pytest.raises(BadRow, match="rows.jsonl:1: two points of id 1 at 0.5 s"):
        question(tmp_path, "video_tracking", points=twice)
    with pytest.raises(BadRow, match="a point at 5 s of a clip of 1 s"):
        question(tmp_path, "video_tracking", row=dict(end=1), points=[dict(t=5, x=0, y=0, id=0)])
    with pytest.raises(BadRow, match="belongs to no point"):
        question(tmp_path, "video_tracking", points=twice[:1], masks=[dict(t=0, id=0, polygon=SQUARE)])
    write_lines(tmp_path / "rows.jsonl", [dict(image="a.png", annotations=[dict(task="sing")])])
    with pytest.raises(BadRow, match="rows.jsonl:1: 'sing'"):
        load_questions(find_datasets([str(tmp_path / "rows.jsonl")])[0])


class Answers:
    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def __call__(self, url, json=None, headers=None, timeout=None):
        self.asked.append((url, json))
        text = self.texts.pop(0)
        if isinstance(text, Exception):
            raise text
        reply = requests.Response()
        reply.status_code = 200
        reply._content = dumps(dict(choices=[dict(message=dict(content=text))])).encode()
        return reply


def test_the_judge_is_asked_for_statements_and_retried(monkeypatch):
    post = Answers(requests.ConnectionError("down"), '["a", "b"]', '["c", "d", "e", "f"]',
                   "Sure: [true, false]",
                   "[true, true, true, false]")
    monkeypatch.setattr(requests, "post", post)
    judge = Judge("http://localhost:1/v1/", "some", pause=0)
    assert judge.score("said", "true") == pytest.approx((0.5, 0.75, 0.6))
    assert post.asked[0][0] == "http://localhost:1/v1/chat/completions" and post.asked[0][1]["model"] == "some"
    monkeypatch.setattr(requests, "post", Answers(*["no list here"] * 5))
    with pytest.raises(JudgeError, match="no usable answer in 5 tries"):
        judge.score("said", "true")


def test_a_judge_that_falls_silent_keeps_what_was_scored(tmp_path, monkeypatch, capsys):
    q = [question(tmp_path, "image_caption", "image", answer="A red wall.") for _ in range(3)]
    monkeypatch.setattr(evaluation, "answers", lambda *a: ["A wall."] * 3)
    monkeypatch.setattr(requests, "post",
                        Answers('["a"]', '["b"]', "[true]", "[true]", *[requests.Timeout()] * 5))
    table, records = evaluation.evaluate(None, None, q, Judge("http://localhost:1/v1", "some", pause=0))
    assert table["image_caption f1"] == 1 and "not judged" in capsys.readouterr().err
    assert [set(r["scores"]) for r in records][1:] == [{"not_judged"},
                                                       {"overlap_precision", "overlap_recall", "overlap_f1"}]


# ---- the toy world's clips ---------------------------------------------------------------------------------

def test_toy_segmenter_finds_the_shape_under_a_point(tmp_path):
    """With perfect points J&F is what the segmenter leaves to be had; with none it is nothing."""
    toy.write_clips(str(tmp_path / "clips"), clips=2, held_out=24)
    questions = load_questions(find_datasets([str(tmp_path / "clips" / "eval" / "tracks.jsonl")])[0])
    assert len(questions) >= 24
    scores = [score(q, format_points(q.points, "video"), segmenter=toy.segment)
              for q in questions]
    mean = {k: np.mean([s[k] for s in scores if k in s]) for k in ("accuracy", "f1", "hota", "j&f")}
    assert mean["accuracy"] > 0.97 and mean["f1"] > 0.97 and mean["hota"] > 0.97 and mean["j&f"] > 0.88, mean
    assert score(questions[0], "", segmenter=toy.segment)["j&f"] == 0
