"""Metrics against their published definitions, and what an evaluation does with answers and data that are
wrong."""
import itertools
import json
import math
import os
from json import dumps
from types import SimpleNamespace

import numpy as np
import pytest
import requests
from conftest import HERE, picture, video, write_lines

import eval as evaluation
from lib import toy
from data import find_datasets, format_points
from eval import (Question, assign, boundary_f, count_accuracy, hota, in_mask, j_and_f,
                  load_questions, point_f1, region_j, parse_number, score, score_track, word_overlap)
from lib.errors import BadRecord
from lib.judge import Judge, JudgeError
from lib.tasks import TASKS


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
    assert parse_number(text) == number


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
    with pytest.raises(BadRecord, match="rows.jsonl:1: a mask of 9x9 on media of 48x32"):
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


def test_only_objects_with_masks_are_compared_by_masks(tmp_path):
    """A point without a mask beside one with: the other's track cannot lower J."""
    points = [dict(t=t, x=x, y=0.5, id=i) for t in (0, 0.5) for i, x in ((0, 0.5), (1, 0.9))]
    q = question(tmp_path, "video_tracking", points=points, masks=[dict(t=0, id=0, polygon=SQUARE)])
    square = q.mask(points[0])
    said = "<point 0, 0.5, 0.5, 0> <point 0, 0.9, 0.5, 1> <point 0.5, 0.5, 0.5, 0>"
    once = lambda frames, points: {0: np.stack([square, square & False])}  # seen in the frame that has a mask
    assert score_track(q, said, once)["j&f"] == 1


def test_clips_that_start_later_keep_their_masks(tmp_path):
    """In the file times count from its start; the model answers from the start of the clip."""
    true = [dict(t=t, x=0.5, y=0.5, id=0) for t in (1.0, 1.5)]
    masks = [dict(t=t, id=0, polygon=SQUARE) for t in (1.0, 1.5)]
    q = question(tmp_path, "video_tracking", row=dict(start=1.0, end=1.9), points=true, masks=masks)
    assert score_track(q, "<point 0, 0.4, 0.6, 0> <point 0.5, 0.4, 0.6, 0>", toy.segment)["accuracy"] == 1
    assert score_track(q, "<point 1, 0.4, 0.6, 0> <point 1.5, 0.4, 0.6, 0>")["accuracy"] == 0
    write_lines(tmp_path / "rows.jsonl", [dict(video="a.mp4", start=1.0, end=1.2, annotations=[
        dict(task="video_tracking", prompt="?", points=true, masks=masks)])])
    with pytest.raises(BadRecord, match="rows.jsonl:1: a point at 1.5 s of a clip of 1 to 1.2 s"):
        load_questions(find_datasets([str(tmp_path / "rows.jsonl")])[0])


def test_data_that_contradicts_itself_is_named(tmp_path):
    twice = [dict(t=0.5, x=0, y=0, id=1), dict(t=0.5, x=1, y=1, id=1)]
    with pytest.raises(BadRecord, match="rows.jsonl:1: two points of id 1 at 0.5 s"):
        question(tmp_path, "video_tracking", points=twice)
    with pytest.raises(BadRecord, match="a point at 5 s of a clip of 1 s"):
        question(tmp_path, "video_tracking", row=dict(end=1), points=[dict(t=5, x=0, y=0, id=0)])
    with pytest.raises(BadRecord, match="belongs to no point"):
        question(tmp_path, "video_tracking", points=twice[:1], masks=[dict(t=0, id=0, polygon=SQUARE)])
    write_lines(tmp_path / "rows.jsonl", [dict(image="a.png", annotations=[dict(task="sing")])])
    with pytest.raises(BadRecord, match="rows.jsonl:1: 'sing'"):
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
    assert judge.score("said", "true") == (0.5, 0.75)
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


# ---- scores by hand: other numerators than denominators everywhere -----------------------------------------

@pytest.mark.parametrize("true, within", [(0, 1), (1, 1), (10, 1), (19, 1), (20, 2), (29, 2), (30, 2), (39, 2),
                                          (40, 3), (50, 3), (59, 3), (60, 4), (99, 5), (100, 6), (110, 6), (130, 7)])
def test_a_close_count_is_that_of_the_published_table(true, within):
    """1 + floor(true / 20): at 10, 30 and 50 a rounded share would forgive one more."""
    for said in range(max(true - within - 2, 0), true + within + 3):
        assert count_accuracy(said, true) == (said == true, abs(said - true) <= within)


@pytest.mark.parametrize("text, number", [
    ("0", 0), ("none", None), ("two", None), ("", None), ("In 12 images a total of 3.", 3), ("A total of 15.", 15),
    ("3 of 7", 3), ("There are 21 cups.", 21), ("cup7", None), ("1234567", None), ("123456", 123456),
    ("There are none. I looked 3 times.", 0), ("There are 5: <point 0.1, 0.2, 0> <point 0.3, 0.2, 1>", 2),
    ("<point 0.1, 0.2, 0> A total of 4.", 1), ("<point 1.5, 0.1, 0.2, 0> <point 2, 0.1, 0.2, 0>", 2)])
def test_a_count_is_read_from_what_is_said(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize("truth, said, scores", [
    (dict(answer="7"), "7", (1, 1)), (dict(answer=" 7 "), "8", (0, 1)),
    (dict(answer="There are 3 cups."), "3", (1, 1)),
    (dict(answer="There are none."), "0", (1, 1)), (dict(answer="0"), "There are none.", (1, 1)),
    (dict(answer="0"), "no idea", (0, 0)), (dict(answer="0"), "1", (0, 1)), (dict(answer="0"), "2", (0, 0)),
    (dict(points=[dict(x=0.1, y=0.1, id=i) for i in range(4)]), "4", (1, 1)),
    (dict(points=[]), "There are none.", (1, 1)), (dict(points=[]), "2", (0, 0)),
    (dict(answer="4", points=[dict(x=0.1, y=0.1, id=0)]), "4", (1, 1))])
def test_counts_are_compared_with_the_number_of_the_line(tmp_path, truth, said, scores):
    q = question(tmp_path, "counting", "image", **truth)
    assert score(q, said) == dict(accuracy=scores[0], close=scores[1])


@pytest.mark.parametrize("said, right", [("Red.", 1), ("red", 1), (" RED! ", 1), ("a red", 0), ("", 0),
                                         ("reddish", 0)])
def test_a_short_answer_is_right_by_its_words_alone(tmp_path, said, right):
    assert score(question(tmp_path, "image_qa", "image", answer="red."), said) == dict(accuracy=right)
    assert score(question(tmp_path, "image_qa", "image", answer="It is two."), "two is it") == dict(accuracy=0)


@pytest.mark.parametrize("said, right", [("C", 1), ("C. a cat", 1), ("(C)", 1), ("B", 0), ("a cat", 1), ("A cat!", 0),
                                         ("the cat", 0), ("", 0), ("Cat", 0), ("c", 0), ("D", 0)])
def test_an_option_is_named_by_its_letter_or_its_words(tmp_path, said, right):
    q = question(tmp_path, "image_qa", "image", question="Who?", options=["a dog", "a fox", "a cat"], correct=2)
    assert q.prompt == "Who?\nOnly return the correct answer option.\nA. a dog\nB. a fox\nC. a cat"
    assert q.truth == "C. a cat" and score(q, said) == dict(accuracy=right)


def test_j_and_f_are_means_over_frames():
    square, none = np.zeros((100, 100), bool), np.zeros((100, 100), bool)
    square[30:70, 30:70] = True
    holed, two = square.copy(), square.copy()
    holed[45:55, 45:55] = False  # J 1500/1600; the border has 160 pixels, that of the hole 40: F of 160/200 and 1
    two[5:25, 5:25] = True  # J 1600/2000; 80 more: F of 160/240 and 1
    assert region_j(square, holed) == 15 / 16 and boundary_f(holed, square) == pytest.approx(8 / 9)
    assert boundary_f(square, holed) == pytest.approx(8 / 9) and boundary_f(square, two) == pytest.approx(4 / 5)
    j, f, both = j_and_f([square, square, none, none, square], [holed, two, none, square, square])
    assert j == pytest.approx((15 / 16 + 4 / 5 + 1 + 0 + 1) / 5)
    assert f == pytest.approx((8 / 9 + 4 / 5 + 1 + 0 + 1) / 5) and both == pytest.approx((j + f) / 2)
    with pytest.raises(ValueError):
        j_and_f([square] * 2, [square] * 3)


def test_a_boundary_may_be_off_by_a_share_of_the_diagonal():
    a, far = np.zeros((300, 400), bool), np.zeros((300, 400), bool)  # diagonal 500: 0.8 % are 4 pixels
    a[100:200, 100:200], far[100:200, 104:204] = True, True
    assert boundary_f(a, far) == 1 and boundary_f(a, np.roll(far, 1, 1)) < 1 and boundary_f(a, far, 0.004) < 1
    a, near = np.zeros((100, 100), bool), np.zeros((100, 100), bool)  # diagonal 141: 1.13 pixels, so 2
    a[30:70, 30:70], near[30:70, 32:72] = True, True
    assert boundary_f(a, near) == 1 and boundary_f(a, np.roll(near, 1, 1)) < 1


def test_a_point_in_two_masks_belongs_to_the_object_it_follows():
    # 5 follows 0 and 6 follows 1; at first both points lie in both masks, and are listed the other way round.
    both, own = np.ones((2, 2)), np.eye(2)
    assert hota([([0, 1], [6, 5], both), ([0, 1], [5, 6], own), ([0, 1], [5, 6], own)]) == (1, 1, 1)
    # 5 follows 0 for three moments; at the fourth it lies in 1 as well. Found are 4 of 4 and 0 of 2, nothing is said
    # wrongly: DetA 4/6; the name of 0 holds throughout: AssA 1. By the moment alone it would be 0.5.
    frames = [([0], [5], [[1]])] * 3 + [([1, 0], [5], [[1], [1]]), ([1], [], [[]])]
    assert hota(frames) == pytest.approx((math.sqrt(4 / 6), 4 / 6, 1))
    # Whom a point does not lie in it cannot be, though it is his all the rest of the clip: 5 is 1 at the end.
    # 4 right of 3 + 2 true ones and 4 said: DetA 4/5; 0: 3 of 3 + 4 - 3, 1: 1 of 2 + 4 - 1: AssA (9/4 + 1/5) / 4.
    frames = [([0], [5], [[1]])] * 3 + [([1], [], [[]]), ([1], [5], [[1]])]
    assert hota(frames) == pytest.approx((math.sqrt(4 / 5 * 49 / 80), 4 / 5, 49 / 80))
    frames = [([0], [5], [[1]])] * 3 + [([0, 1], [5], [[0], [1]])]
    assert hota(frames)[1:] == pytest.approx((4 / 5, (9 / 5 + 1 / 4) / 4))


def slow_hota(frames):
    """HOTA by its definition, trying every matching; None where two are equally good."""
    ids = [sorted({i for f in frames for i in f[side]}) for side in (0, 1)]
    count = [{i: sum(i in f[side] for f in frames) for i in ids[side]} for side in (0, 1)]
    share = dict.fromkeys(itertools.product(*ids), 0.0)
    for t, p, hit in frames:
        for (i, a), (j, b) in itertools.product(enumerate(t), enumerate(p)):
            if hit[i][j]:
                share[a, b] += 1 / (sum(hit[i]) + sum(row[j] for row in hit) - 1)
    alike = {(a, b): s / (count[0][a] + count[1][b] - s) for (a, b), s in share.items()}
    matched = dict.fromkeys(share, 0)
    for t, p, hit in frames:
        pairs = [(a, b) for i, a in enumerate(t) for j, b in enumerate(p) if hit[i][j]]
        sets = [s for n in range(len(pairs) + 1) for s in itertools.combinations(pairs, n)
                if len({a for a, _ in s}) == len({b for _, b in s}) == n]
        sets.sort(key=lambda s: -sum(alike[pair] for pair in s))
        if len(sets) > 1 and sum(alike[p] for p in sets[0]) - sum(alike[p] for p in sets[1]) < 1e-9:
            return None
        for pair in sets[0]:
            matched[pair] += 1
    tp, true, said = sum(matched.values()), sum(count[0].values()), sum(count[1].values())
    ass = sum(m * m / (count[0][a] + count[1][b] - m) for (a, b), m in matched.items())
    return math.sqrt(tp / (true + said - tp) * ass / max(tp, 1)), tp / (true + said - tp), ass / max(tp, 1)


def test_hota_is_that_of_trying_every_matching():
    rng, checked = np.random.default_rng(3), 0
    for _ in range(400):
        frames = []
        for _ in range(rng.integers(1, 6)):
            t, p = (rng.permutation(3)[:n].tolist() for n in rng.integers(0, 4, 2))
            frames.append((t, [10 + i for i in p], (rng.random((len(t), len(p))) < 0.5).tolist()))
        slow = slow_hota(frames) if any(t or p for t, p, _ in frames) else None
        if slow:
            assert hota(frames) == pytest.approx(slow), frames
            checked += slow[0] > 0
    assert checked > 100


def test_in_a_mask_is_the_pixel_under_the_point(tmp_path):
    mask = np.zeros((4, 6), bool)
    mask[1, 5] = mask[3, 0] = True
    assert all(in_mask(mask, x, y) for x, y in ((5, 1), (4.6, 1.4), (5.4, 0.6)))
    assert not any(in_mask(mask, x, y) for x, y in ((4.4, 1), (5, 1.6), (5.6, 1), (1, 5), (-1, 1), (0, -1)))
    # 48 x 32 pixels, one of them marked: column 12, row 8
    q = question(tmp_path, "image_pointing", "image", points=[dict(x=0.9, y=0.9, id=0)],
                 masks=[dict(id=0, rle=dict(size=[32, 48], counts=[12 * 32 + 8, 1, 48 * 32 - 12 * 32 - 9]))])
    hit = lambda column, row: score(q, f"<point {column / 48:.3f}, {row / 32:.3f}, 0>")["f1"] == 1
    assert hit(12.5, 8.5) and hit(12.1, 8.1) and hit(12.9, 8.9)
    assert not (hit(11.9, 8.5) or hit(13.1, 8.5) or hit(12.5, 7.9) or hit(12.5, 9.1) or hit(8.5, 12.5))


def box(x, y, w=0.1, h=0.1):
    return [[x - w, y - h], [x + w, y - h], [x + w, y + h], [x - w, y + h]]


def test_points_of_unequal_number_and_points_that_are_nearest_to_another(tmp_path):
    true = [dict(x=x, y=0.5, id=i) for i, x in enumerate((0.1, 0.3, 0.5, 0.7, 0.9))]
    q = question(tmp_path, "image_pointing", "image", points=true)
    assert score(q, "<point 0.1, 0.5, 0> <point 0.7, 0.9, 1>") == pytest.approx(dict(precision=1 / 2, recall=1 / 5,
                                                                                   f1=2 / 7))
    assert score(q, "<point 0.14, 0.46, 0>")["f1"] == 0 and score(q, "<point 0.13, 0.53, 0>")["recall"] == 1 / 5
    q = question(tmp_path, "image_pointing", "image", points=true[:1])
    assert score(q, "<point 0.1, 0.5, 0> <point 0.1, 0.5, 1> <point 0.5, 0.5, 2>") == pytest.approx(
        dict(precision=1 / 3, recall=1, f1=1 / 2))
    # Inside the large one, but nearest to the small one's point: matched first, then no hit.
    q = question(tmp_path, "image_pointing", "image", points=[dict(x=0.2, y=0.5, id=0), dict(x=0.9, y=0.5, id=1)],
                 masks=[dict(id=0, polygon=box(0.4, 0.5, 0.4, 0.4)), dict(id=1, polygon=box(0.9, 0.5, 0.05, 0.05))])
    assert score(q, "<point 0.7, 0.5, 0>")["f1"] == 0 and score(q, "<point 0.5, 0.5, 0>")["precision"] == 1
    none = question(tmp_path, "image_pointing", "image", points=[])
    assert score(none, " There are none. ") == dict(precision=1, recall=1, f1=1, none=1)
    assert score(none, "") == dict(precision=1, recall=1, f1=1, none=0)
    assert score(none, "There are none. <point 0.1, 0.1, 0>") == dict(precision=0, recall=0, f1=0, none=0)
    assert "none" not in score(q, "There are none.")


def test_a_point_on_another_image_is_no_hit(tmp_path):
    picture(tmp_path / "b.png", "blue", (30, 24))
    ask = lambda points, **a: Question(dict(images=["a.png", "b.png"]), dict(task="multi_image_pointing", prompt="?",
                                                                           points=points, **a), str(tmp_path), "f:1")
    picture(tmp_path / "a.png", "red", (48, 32))
    q = ask([dict(image=1, x=0.5, y=0.5, id=0)])
    assert score(q, "<point 1, 0.5, 0.5, 0>")["f1"] == 1 and score(q, "<point 0, 0.5, 0.5, 0>")["f1"] == 0
    assert score(q, "<point 0, 0.5, 0.5, 0> <point 1, 0.52, 0.5, 1>") == dict(precision=0.5, recall=1, f1=2 / 3)
    # The image decides who is matched with whom, not the place; masks have the size of their own image.
    both = [dict(image=0, x=0.2, y=0.2, id=0), dict(image=1, x=0.8, y=0.8, id=0)]
    q = ask(both, masks=[dict(image=k, id=0, polygon=box(0.5, 0.5, 0.4, 0.4)) for k in (0, 1)])
    assert score(q, "<point 1, 0.2, 0.2, 0> <point 0, 0.8, 0.8, 1>")["f1"] == 1
    assert score(q, "<point 1, 0.2, 0.2, 0> <point 1, 0.8, 0.8, 1>")["f1"] == 0.5
    assert [q.mask(p).shape for p in both] == [(32, 48), (24, 30)]


def test_a_point_counts_at_its_own_moment_alone(tmp_path):
    at = lambda t, x=0.5, i=0: dict(t=t, x=x, y=0.5, id=i)
    q = question(tmp_path, "video_pointing", points=[at(0.5), at(1.5, i=1)])
    hits = lambda *points: score(q, " ".join(f"<point {t:g}, {x:g}, 0.5, {i}>" for i, (t, x) in enumerate(points)))
    for right in (((0.5, 0.5), (1.5, 0.5)), ((1.5, 0.5), (0.5, 0.5)), ((0.54, 0.5), (1.46, 0.5))):
        assert hits(*right)["f1"] == 1
    assert hits((0.56, 0.5))["f1"] == hits((0.44, 0.5))["f1"] == hits((1, 0.5))["f1"] == 0
    assert hits((0.5, 0.5)) == pytest.approx(dict(precision=1, recall=0.5, f1=2 / 3))
    assert hits((0.5, 0.5), (0.5, 0.5), (0.5, 0.9)) == pytest.approx(dict(precision=1 / 3, recall=1 / 2, f1=2 / 5))
    assert score(q, "<point 0.5, 0.5, 0>")["f1"] == 0  # without a time
    # A tenth of the clip is as far as a tenth of the picture: the first is matched in time, and lies beside.
    q = question(tmp_path, "video_pointing", points=[at(0), at(10, 0.9)])
    assert score(q, "<point 10, 0.5, 0.5, 0>")["f1"] == 0 and score(q, "<point 0, 0.5, 0.5, 0>")["recall"] == 0.5
    # A second of ten is nearer than four tenths: matched with what is there later, though inside the first.
    q = question(tmp_path, "video_pointing", points=[at(0, 0.1), at(1), at(10, 0.9)],
                 masks=[dict(t=0, id=0, polygon=box(0.3, 0.5, 0.3, 0.3))])
    assert score(q, "<point 0, 0.5, 0.5, 0>")["f1"] == 0 and score(q, "<point 0, 0.25, 0.5, 0>")["recall"] == 1 / 3


# Two objects at 0, 0.5 and 1 s: 0 in a box to the left, 1 in one to the right.
LEFT, RIGHT, ASIDE = "0.25, 0.5", "0.75, 0.5", "0.5, 0.9"


def two_tracks(folder, times=(0, 0.5, 1), start=None):
    at = [dict(t=t + (start or 0), x=x, y=0.5, id=i) for t in times for i, x in ((0, 0.25), (1, 0.75))]
    return question(folder, "video_tracking", row=None if start is None else dict(start=start, end=1.9), points=at,
                    masks=[dict(t=p["t"], id=p["id"], polygon=box(p["x"], 0.5, 0.125, 0.25)) for p in at])


def said(*points):
    return " ".join(f"<point {t:g}, {place}, {i}>" for t, place, i in points)


def test_tracks_by_hand_with_an_id_said_twice_and_a_moment_too_late(tmp_path):
    q = two_tracks(tmp_path)
    got = score_track(q, said((0, LEFT, 0), (0, RIGHT, 0), (0, ASIDE, 0), (0.5, RIGHT, 1), (0.5, LEFT, 0),
                              (0.5, ASIDE, 2), (1.5, LEFT, 0)))
    # 0 s: the first of id 0 alone, 1 of 1 said and of 2 true; 0.5 s: 2 of 3 and of 2; 1 s: 0 of 2; 1.5 s: 0 of 1.
    assert got == pytest.approx(dict(accuracy=3 / 6, precision=(1 + 2 / 3) / 4, recall=(1 / 2 + 1) / 4,
                                     f1=(2 / 3 + 4 / 5) / 4, hota=math.sqrt(3 / 8 * 4 / 9)))
    # DetA 3 of 6 + 5 - 3; object 0 is id 0 in 2 of 3 + 3 - 2, 1 is id 1 in 1 of 3 + 1 - 1: AssA (2/2 + 1/3) / 3.
    assert score_track(q, said((0, ASIDE, 0), (0, LEFT, 0)))["accuracy"] == 0  # the first it was, not the best
    assert score_track(q, said((0, LEFT, 0), (0.5, LEFT, 0)))["accuracy"] == 2 / 6  # of what is true
    right = [(t, place, i) for t in (0, 0.5, 1) for place, i in ((LEFT, 3), (RIGHT, 4))]
    assert set(score_track(q, said(*right)).values()) == {1}
    late = score_track(q, said(*[(t + 0.5, place, i) for t, place, i in right]))
    assert late["accuracy"] == 4 / 6 and late["precision"] == late["recall"] == 2 / 4
    assert score_track(q, said(*[(t + 0.02, place, i) for t, place, i in right]))["accuracy"] == 1
    assert score_track(q, said(*[(t + 0.1, place, i) for t, place, i in right]))["accuracy"] == 0
    nothing = question(tmp_path, "video_tracking", points=[])
    assert score_track(nothing, "There are none.")["f1"] == score_track(nothing, "")["hota"] == 1
    assert score_track(nothing, said((0, LEFT, 0))) == dict(accuracy=0, precision=0, recall=0, f1=0, hota=0)


def boxes(q, wide=()):
    """A segmenter that knows the boxes: the one a point lies in, or a spot; of ids in `wide` with as much again in
    another place."""
    def segment(frames, points):
        out = {p[3]: np.zeros((len(frames), 32, 48), bool) for p in points}
        for k, x, y, i in points:
            if y == 0.5:
                out[i][k][8:24, 6:18] |= x < 0.5
                out[i][k][8:24, 30:42] |= x > 0.5
            else:
                out[i][k][28:30, 22:26] = True
            if i in wide and not k:
                out[i][k][8:24, 30:42] = True
        return out
    own = q.mask(q.points[0])
    q.drawn = lambda which: np.roll(segment([0], [(0, 0.25, 0.5, 0)])[0][0], 24 * which[2], 1)
    assert np.count_nonzero(own ^ q.drawn((0, None, 0))) < 60  # polygons are drawn with their far sides
    return segment


def jf(q, text, **k):
    got = score_track(q, text, boxes(q, **k))
    return [got["j"], got["f"], got["j&f"]]


def test_j_and_f_count_an_object_nobody_tracked_and_forgive_an_extra_track(tmp_path):
    q = two_tracks(tmp_path)
    left, right = [(t, LEFT, 5) for t in (0, 0.5, 1)], [(t, RIGHT, 6) for t in (0, 0.5, 1)]
    extra = [(t, ASIDE, 7) for t in (0, 0.5, 1)]
    assert jf(q, said(*left, *right)) == jf(q, said(*extra, *left, *right)) == [1, 1, 1]
    assert jf(q, said(*left)) == jf(q, said(*left, *extra)) == [0.5, 0.5, 0.5]  # object 1 was found by nobody
    assert jf(q, "nothing") == [0, 0, 0]
    assert jf(q, said(*left, *right[:1])) == pytest.approx([2 / 3] * 3)  # (1 + 1/3) / 2
    assert jf(q, said(*left, *right[:1], (1.5, LEFT, 5))) == pytest.approx([(3 / 4 + 1 / 3) / 2] * 3)
    # At 0 s as much again elsewhere: J 1/2, F of 1/2 and 1. Three moments, two objects, one of them not tracked:
    assert jf(q, said(*left), wide=(5,)) == pytest.approx([2.5 / 6, (2 + 2 / 3) / 6, (5 / 2 + 8 / 3) / 12])


def test_j_and_f_pair_objects_and_tracks_for_the_best_sum(tmp_path):
    """1 is the left one in three moments of five and the right one in two, 2 the left one in two: each alone would
    take 1."""
    times = (0, 0.3, 0.6, 0.9, 1.2)
    q = two_tracks(tmp_path, times)
    one = [(t, LEFT if t < 0.9 else RIGHT, 1) for t in times]
    assert jf(q, said(*one, *[(t, LEFT, 2) for t in times[3:]])) == pytest.approx([2 / 5] * 3)


def test_the_segmenter_gets_the_frames_and_points_of_the_clip(tmp_path):
    q, got = two_tracks(tmp_path, (0, 0.5), start=1.0), []
    segment = boxes(q)
    spy = lambda frames, points: got.append((frames, points)) or segment(frames, points)
    score_track(q, said((0.5, RIGHT, 4), (0.5, LEFT, 3), (99, LEFT, 3)), spy)
    (frames, points), = got
    assert [abs(np.median(f) - grey) < 6 for f, grey in zip(frames, (100, 150, 190))] == [True] * 3
    assert points == [(1, 0.75, 0.5, 4), (1, 0.25, 0.5, 3), (2, 0.25, 0.5, 3)]
    without = question(tmp_path, "video_tracking", points=[dict(t=0, x=0.5, y=0.5, id=0)])
    assert "j" not in score_track(without, "", spy) and len(got) == 1  # no masks to compare with


def test_a_caption_is_scored_by_the_words_it_shares_each_as_often_as_it_is_said(tmp_path):
    q = question(tmp_path, "image_caption", "image", answer="A red star and a bar.")
    assert score(q, "a star a star a") == pytest.approx(dict(overlap_precision=3 / 5, overlap_recall=3 / 6,
                                                           overlap_f1=6 / 11))
    assert score(question(tmp_path, "video_caption", answer="It moves."), "") == dict(
        overlap_precision=0, overlap_recall=0, overlap_f1=0)


def test_a_judge_uses_the_statements_of_the_line_and_counts_only_true(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    pauses, headers = [], []
    monkeypatch.setattr("lib.judge.time.sleep", pauses.append)
    post = Answers(requests.ConnectionError("down"), "no list", '["a star", "a bar", "a dog"]', '[true, "true", 1]',
                   "[true, true, false, true]")
    monkeypatch.setattr(requests, "post", lambda url, headers=None, **k: headers_of.append(headers) or post(url, **k))
    headers_of = headers
    q = question(tmp_path, "image_caption", "image", answer="The true caption.", statements=["s1", "s2", "s3", "s4"])
    got = score(q, "What was said.", Judge("http://localhost:1/v1", "some", pause=3))
    assert got == pytest.approx(dict(precision=1 / 3, recall=3 / 4, f1=6 / 13))
    assert pauses == [3, 6] and all(h == {"Authorization": "Bearer secret"} for h in headers)
    split, first, second = [body["messages"][0]["content"] for _, body in post.asked[2:]]
    assert split.endswith("What was said.")
    assert "The true caption." in first and "1. a star\n2. a bar\n3. a dog" in first
    assert "What was said." in second and "1. s1\n2. s2\n3. s3\n4. s4" in second
    monkeypatch.setattr(requests, "post", Answers('["a", "b"]', "[true]"))
    with pytest.raises(JudgeError, match="1 verdicts on 2 statements"):
        score(q, "What was said.", Judge("http://localhost:1/v1", "some"))
    monkeypatch.setattr(requests, "post", Answers("[]", "[false, false, true, false]"))
    assert Judge("http://localhost:1/v1", "some").score("", "t", ["a", "b", "c", "d"]) == (0, 1 / 4)


# ---- asking and averaging ----------------------------------------------------------------------------------

def test_each_question_counts_once_in_the_mean_of_its_task(tmp_path, monkeypatch):
    wall = question(tmp_path, "image_caption", "image", answer="a red wall")
    qa = [question(tmp_path, "image_qa", "image", answer=a) for a in ("red", "blue", "red")]
    count = question(tmp_path, "counting", "image", answer="3")
    points = [question(tmp_path, "image_pointing", "image", points=p) for p in ([dict(x=0.5, y=0.5, id=0)], [])]
    questions = [qa[0], wall, count, qa[1], points[0], qa[2], points[1]]
    texts = ["red", "a blue wall", "4", "red", "<point 0.5, 0.5, 0> <point 0.9, 0.5, 1>", "no", "There are none."]
    asked = []
    monkeypatch.setattr(evaluation, "answers", lambda *a: asked.append(a) or texts)
    table, records = evaluation.evaluate("model", "planner", questions, batch=5, world="world")
    assert table == pytest.approx({
        "counting accuracy": 0, "counting close": 1, "image_qa accuracy": 1 / 3,
        "image_caption overlap_precision": 2 / 3, "image_caption overlap_recall": 2 / 3,
        "image_caption overlap_f1": 2 / 3, "image_pointing precision": 3 / 4,
        "image_pointing recall": 1, "image_pointing f1": (2 / 3 + 1) / 2, "image_pointing none": 1})
    assert list(table) == sorted(table)
    assert [(r["task"], r["answer"]) for r in records] == [(q.task, t) for q, t in zip(questions, texts)]
    assert records[0] == dict(where="rows.jsonl:1", task="image_qa", prompt="?", answer="red", truth="red",
                              scores=dict(accuracy=1))
    assert records[4]["truth"] == [dict(x=0.5, y=0.5, id=0)] and records[4]["scores"]["f1"] == 0.6667
    model, planner, said, limit, batch, world, _ = asked[0]
    assert (model, planner, batch, world) == ("model", "planner", 5, "world")
    assert said == [(q.task, q.where, q.record, q.folder, q.prompt) for q in questions]
    assert {task: limit(task) for task in TASKS} == dict(
        image_caption=448, image_pointing=192, multi_image_pointing=192, counting=192, image_qa=64, multi_image_qa=64,
        video_caption=2048, video_qa=64, video_pointing=2048, video_tracking=4096, text=64)
    evaluation.evaluate("model", "planner", questions, max_new_tokens=9)
    assert {asked[1][3](task) for task in TASKS} == {9}


def test_a_question_is_worded_by_its_line(tmp_path):
    folder = str(tmp_path)
    row = dict(annotations=[])
    ask = lambda where="f:1", **a: Question(row, a, folder, where)
    turns = [dict(role=r, content=c) for r, c in (("user", "One?"), ("assistant", "1"), ("user", "Two?"),
                                                  ("assistant", "2"))]
    q = ask(task="text", messages=turns)
    assert (q.prompt, q.truth) == ("One?", "1")
    q = ask(task="text", prompt="2 plus 2?", answer="4")
    assert (q.prompt, q.truth, q.points) == ("2 plus 2?", "4", [])
    prompts = [ask(f"f:{i}", task="counting", label="cups", answer="4").prompt for i in range(20)]
    assert prompts == [ask(f"f:{i}", task="counting", label="cups", answer="4").prompt for i in range(20)]
    assert len(set(prompts)) > 1 and all("cups" in p for p in prompts)


def test_a_limit_is_of_each_file(tmp_path):
    files = [write_lines(tmp_path / f"{name}.jsonl", [dict(annotations=[
        dict(task="text", prompt=f"{name}{i}{k}?", answer="4") for k in range(2)]) for i in range(n)])
        for name, n in (("a", 3), ("b", 1), ("c", 4))]
    datasets = find_datasets(files)[0]
    assert [q.prompt for q in load_questions(datasets, 2)] == [
        "a00?", "a01?", "a10?", "a11?", "b00?", "b01?", "c00?", "c01?", "c10?", "c11?"]
    assert len(load_questions(datasets)) == 16 and load_questions(datasets, 0) == []
    assert {q.where.split("/")[-1] for q in load_questions(datasets, 1)} == {"a.jsonl:1", "b.jsonl:1", "c.jsonl:1"}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """eval.py with checkpoints that answer as they are told: run(flags), and what `evaluate` was given."""
    seen, evaluate = [], evaluation.evaluate
    write_lines(tmp_path / "rows.jsonl", [dict(annotations=[dict(task="text", prompt=f"{i}?", answer="red")])
                                          for i in range(4)])
    says = dict(good=["red", "red", "red", "no"], poor=["no", "no", "red", "no"])
    model = lambda folder: SimpleNamespace(cfg=SimpleNamespace(crop=378 if "large" in folder else 20))
    monkeypatch.setattr(evaluation.sample, "load",
                        lambda folder, *a, **k: seen.append((a, k)) or (model(folder), folder))
    monkeypatch.setattr(evaluation, "answers",
                        lambda model, planner, asked, *_: says.get(planner, ["no"] * len(asked)))
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: seen.append(a) or evaluate(*a, **k))
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        monkeypatch.setattr("sys.argv", ["eval.py", *flags])
        evaluation.main()
        return seen
    return run


def test_checkpoints_are_compared_side_by_side(command, tmp_path, capsys):
    command("good", "poor", "--data", "rows.jsonl")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [["good"], ["poor"], ["text", "accuracy", "0.750", "0.250"]]
    assert lines[3:] == ["eval.json holds every answer beside its truth"]
    kept = json.load(open(tmp_path / "eval.json"))
    assert kept["scores"] == {"good": {"text accuracy": 0.75}, "poor": {"text accuracy": 0.25}}
    assert [p["answer"] for p in kept["predictions"]["poor"]] == ["no", "no", "red", "no"]


def test_the_command_evaluates_as_its_flags_say(command, tmp_path):
    """Device, crops, frames, questions at a time, length of answers."""
    given, (_, _, questions, judge, segmenter, batch, limit) = command("good", "--data", "rows.jsonl")
    assert given == (("auto", None, None), dict(usual_tiles=24, dtype="auto"))
    assert (len(questions), judge, segmenter, batch, limit) == (4, None, None, 32, None)
    *_, given, (_, _, questions, judge, segmenter, batch, limit) = command(
        "good", "--data", "rows.jsonl", "--limit", "3", "--batch", "2", "--max_new_tokens", "5", "--tiles", "7",
        "--max_frames", "9", "--segmenter", "lib.toy:segment", "--judge_url", "http://localhost:1/v1",
        "--judge_model", "m", "--device", "cpu", "--dtype", "bf16")
    assert given == (("cpu", 7, 9), dict(usual_tiles=24, dtype="bf16")) and segmenter is toy.segment
    assert (len(questions), judge.model, batch, limit) == (3, "m", 2, 5)
    *_, (*_, limit) = command("large", "--data", "rows.jsonl", "--out", "e.json")
    assert limit is None and os.path.exists(tmp_path / "e.json")


def test_without_data_the_toy_worlds_held_out_lines_are_asked(command, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(toy, "held_out", lambda *a: asked.append(a) or ["rows.jsonl"])
    *_, (_, _, questions, _, segmenter, _, _) = command("good")
    assert asked == [(toy.FOLDER, "sft")] and len(questions) == 4 and segmenter is toy.segment


@pytest.mark.parametrize("flags, message", [(["--data", "none.jsonl"], "none.jsonl"),
                                            (["--data", "rows.jsonl", "--segmenter", "lib.toy:nothing"], "nothing"),
                                            (["--data", "rows.jsonl", "--segmenter", "nowhere:f"], "nowhere")])
def test_what_cannot_be_evaluated_is_said_in_one_line(command, capsys, flags, message):
    with pytest.raises(SystemExit) as e:
        command("good", *flags)
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


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
