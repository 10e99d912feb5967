"""
Evaluation: a checkpoint answers, the answers are compared with the truth, and every one of them is saved.

    python eval.py out/small/sft/latest                                  # the toy world's held-out images and clips
    python eval.py out/small/pretrain/latest out/small/sft/latest        # two checkpoints side by side
    python eval.py weights/Molmo2-8B --data eval/my.jsonl --device cuda  # your own records, in the form you train on
    python eval.py ... --segmenter my_sam:segment --judge_url http://localhost:8000/v1 --judge_model some-judge

    JSONL ─► question ─► answer ─► points, number, words ─► score, by task ─► table, eval.json

Each of the four Molmo2 evaluations is a score of one task, with the published definition:

    captions   precision, recall, F1 over atomic statements, which needs a judge; without one a proxy, word overlap
    pointing   precision, recall, F1: predictions matched to true points (least distance in all), then hit by mask
    counting   equal; close: within 1 + 5 % of the truth
    tracking   points as above in every frame; HOTA; with a segmenter that turns points into masks J, F and J&F

Where to look: `load_questions` makes a Question of each annotation; sample.answers asks them in batches; METRICS has a
score for each metric that lib/tasks.TASKS names; `point_f1`, `hota`, `j_and_f`, `word_overlap` are plain functions.

An annotation may carry the masks of its points: {"id": 0, "t" or "image": ..., "polygon": [[x, y], ...] in shares of
the sides, or "rle": {"size": [h, w], "counts": [...]} by columns}. Without them a point hits within 5 % of its place.
"""
import argparse
import functools
import itertools
import json
import math
import os
import random
import re
import sys
from collections import Counter

import numpy as np
from PIL import Image, ImageDraw

import sample  # which imports lib before torch
from data import find_datasets, in_clip, parse_points
from lib import toy
from lib.draw import contact_sheet, load_segmenter
from lib.errors import BadRecord, UserError
from lib.judge import Judge, JudgeError
from lib.media import image_size, inside_folder, load_frames, video_duration, video_size
from lib.progress import progress
from lib.records import media_kind, parse_record
from lib.tasks import TASKS, multiple_choice, prompt_of
from lib.text import NOTHING
from sample import Prompt, answers


# ---- metrics: plain functions of predictions and truths ----------------------------------------------------

def assign(cost):
    """The one-to-one matching of least total cost: cost (n, m) -> [(row, column)], min(n, m) of them.

    Shortest augmenting paths (Jonker and Volgenant 1987): rows enter one by one, and prices of rows and columns keep
    each reduced cost, cost - row_price - column_price, at or above 0.
    """
    cost = np.asarray(cost, float)
    if 0 in cost.shape:
        return []
    if cost.shape[0] > cost.shape[1]:
        columns, rows = zip(*assign(cost.T))
        return sorted(zip(rows, columns))
    n, m = cost.shape
    row_price, column_price = np.zeros(n), np.zeros(m)
    row_of = np.full(m, -1)  # the row matched with each column, -1 = free
    for start in range(n):
        distance = np.full(m, np.inf)  # of the shortest path from `start` to each column, in reduced costs
        previous = np.full(m, -1)      # the column before it on that path
        visited = np.zeros(m, bool)
        row = start
        column = -1  # none yet
        travelled = 0.0
        while True:  # visit the nearest columns until one is free
            path = travelled + cost[row] - row_price[row] - column_price
            shorter = ~visited & (path < distance)
            distance[shorter] = path[shorter]
            previous[shorter] = column
            nearest = int(np.where(visited, np.inf, distance).argmin())
            if row_of[nearest] < 0:
                break
            column = nearest
            visited[column] = True
            row = row_of[column]
            travelled = distance[column]
        row_price[start] += distance[nearest]
        rest = distance[nearest] - distance[visited]
        row_price[row_of[visited]] += rest
        column_price[visited] -= rest
        column = nearest
        while column >= 0:  # each column on the path takes the row of the one before it
            before = previous[column]
            row_of[column] = row_of[before] if before >= 0 else start
            column = before
    columns = np.flatnonzero(row_of >= 0)
    return sorted(zip(row_of[columns].tolist(), columns.tolist()))


def pairwise(function, a, b):
    """function(x, y) of each x of a and each y of b: (len(a), len(b))."""
    table = np.zeros((len(a), len(b)))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i, j] = function(x, y)
    return table


def in_mask(mask, x, y):
    """Whether the pixel nearest to (x, y), in pixels, is inside the image and set in mask (H, W)."""
    row, column = round(y), round(x)
    return 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and bool(mask[row, column])


def harmonic(precision, recall):
    """F1 of a precision and a recall."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def precision_recall_f1(hits, predicted, true):
    """Of three counts. No prediction where nothing is true is right."""
    if not predicted and not true:
        return 1.0, 1.0, 1.0
    precision = hits / predicted if predicted else 0.0
    recall = hits / true if true else 0.0
    return precision, recall, harmonic(precision, recall)


def point_f1(predicted, true, hits):
    """(precision, recall, F1) of points: (n, d) and (m, d) coordinates, and hits(i, j): whether the i-th lies in what
    the j-th marks. First matched by least total distance, as published; a match that misses is no hit."""
    n_hits = 0
    for i, j in assign(pairwise(math.dist, predicted, true)):
        if hits(i, j):
            n_hits += 1
    return precision_recall_f1(n_hits, len(predicted), len(true))


def parse_number(text):
    """The number an answer gives: of its points, "a total of 3", or the first number; None without any."""
    points = parse_points(text)
    if points:
        return len(points)
    if NOTHING in text:
        return 0
    match = re.search(r"total of (\d{1,6})", text) or re.search(r"\b(\d{1,6})\b", text)
    return int(match[1]) if match else None


def count_accuracy(predicted, true):
    """(equal, close) of two counts, close being within 1 + floor(0.05 · true); a missing prediction is wrong."""
    if predicted is None:
        return 0.0, 0.0
    return float(predicted == true), float(abs(predicted - true) <= 1 + math.floor(0.05 * true))


def region_j(a, b):
    """Jaccard index of two masks (H, W) bool; two empty ones agree."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def boundary(mask):
    """Pixels of mask (H, W) whose right, lower or lower right neighbour differs, as DAVIS draws a boundary."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def dilate(mask, radius):
    """mask (H, W) grown by a disk: for each row of the disk, a window sum along the rows of the mask, shifted."""
    h = mask.shape[0]
    out = np.zeros_like(mask)
    for dy in range(-radius, radius + 1):
        wide = math.isqrt(radius ** 2 - dy ** 2)
        total = np.cumsum(np.pad(mask, ((0, 0), (wide + 1, wide))), 1)
        near = total[:, 2 * wide + 1:] - total[:, :-2 * wide - 1] > 0
        out[max(dy, 0):h + min(dy, 0)] |= near[max(-dy, 0):h + min(-dy, 0)]
    return out


def boundary_f(a, b, width=0.008):
    """Boundary F of two masks (H, W) bool: boundaries that meet within `width` of the diagonal (DAVIS 2016)."""
    edge_a, edge_b = boundary(a), boundary(b)
    n, m = np.count_nonzero(edge_a), np.count_nonzero(edge_b)
    if not n or not m:
        return float(n == m)
    radius = math.ceil(width * math.hypot(*a.shape))
    precision = np.count_nonzero(edge_a & dilate(edge_b, radius)) / n
    recall = np.count_nonzero(edge_b & dilate(edge_a, radius)) / m
    return harmonic(precision, recall)


def j_and_f(pred_masks, true_masks):
    """(J, F, J&F) of an object's masks, frame by frame, (H, W) bool each; the mean over frames."""
    j = float(np.mean([region_j(a, b) for a, b in zip(pred_masks, true_masks, strict=True)]))
    f = float(np.mean([boundary_f(a, b) for a, b in zip(pred_masks, true_masks)]))
    return j, f, (j + f) / 2


def hota(frames):
    """HOTA, DetA, AssA (Luiten et al. 2020) where a prediction is either in an object's mask or not.

    frames: [(true ids, predicted ids, hits)], hits: (true, predicted) bool, whether the point lies in the mask.
    """
    true_frames = Counter()  # how many frames each object is in
    pred_frames = Counter()  # and each track
    for true_ids, pred_ids, _ in frames:
        true_frames.update(true_ids)
        pred_frames.update(pred_ids)
    row = dict(zip(true_frames, itertools.count()))     # of an object in the tables below
    column = dict(zip(pred_frames, itertools.count()))  # of a track
    # (objects, tracks): the frames of both, added
    lengths = np.add.outer(np.array(list(true_frames.values()), float), np.array(list(pred_frames.values()), float))

    def each_frame():
        for true_ids, pred_ids, hits in frames:
            hits = np.asarray(hits, float).reshape(len(true_ids), len(pred_ids))
            yield list(map(row.get, true_ids)), list(map(column.get, pred_ids)), hits

    # 1. How alike each object and each track are over the whole clip: a Jaccard index. A hit shared with others
    # counts less: one over all hits of its object and of its point in that frame.
    overlap = np.zeros_like(lengths)
    for rows, columns, hits in each_frame():
        competing = hits.sum(0, keepdims=True) + hits.sum(1, keepdims=True) - hits
        overlap[np.ix_(rows, columns)] += np.divide(hits, competing, out=np.zeros_like(hits), where=competing > 0)
    similarity = overlap / np.maximum(lengths - overlap, 1e-9)

    # 2. In each frame, the one-to-one matching of the hits that are most alike.
    matched = np.zeros_like(lengths)  # frames in which an object and a track are matched
    for rows, columns, hits in each_frame():
        for i, j in assign(-similarity[np.ix_(rows, columns)] * hits):
            matched[rows[i], columns[j]] += hits[i, j]

    # 3. Detection: matches among all objects and predictions. Association: how pure the matched tracks are.
    n_points = true_frames.total() + pred_frames.total()
    n_matched = matched.sum()
    if n_points == 0:
        return 1.0, 1.0, 1.0
    detection = n_matched / (n_points - n_matched)
    association = (matched * matched / np.maximum(lengths - matched, 1e-9)).sum() / max(n_matched, 1)
    return math.sqrt(detection * association), float(detection), float(association)


def words(text):
    return re.findall(r"\w+", text.lower())


def word_overlap(predicted, true):
    """(precision, recall, F1) of the words of two texts: no measure of truth, but a proxy without a judge."""
    a, b = Counter(words(predicted)), Counter(words(true))
    return precision_recall_f1((a & b).total(), a.total(), b.total())


# ---- the truth about a record ------------------------------------------------------------------------------

def key(p):
    """What tells the points of an annotation apart, and their masks: (time, image, id)."""
    return p.get("t"), p.get("image"), p.get("id")


class Question:
    """One annotation of a record, to be answered and scored. lenient: read points in any form, `parse_points` has."""

    def __init__(self, record, annotation, folder, where, lenient=False):
        self.record = record
        self.folder = folder
        self.where = where  # file:line
        self.lenient = lenient
        self.task = annotation["task"]
        self.kind = media_kind(record)
        self.path = None if self.kind in (None, "images") else inside_folder(folder, record[self.kind])
        self.check(annotation)
        # from here on times count from the start of the clip, as the model counts
        self.annotation = annotation = in_clip(annotation, record)
        if "messages" in annotation:
            question, answer, *_ = annotation["messages"]  # of a longer conversation the first turn
            self.prompt = question["content"]
            self.truth = answer["content"]
        elif "options" in annotation:
            self.prompt, self.truth = multiple_choice(annotation["question"], annotation["options"],
                                                      annotation["correct"])
        else:
            self.prompt = prompt_of(annotation, self.kind, random.Random(where))
            self.truth = annotation.get("answer", "")
        self.points = annotation.get("points", [])
        masks = in_clip(dict(points=annotation.get("masks", [])), record)["points"]
        self.masks = {key(m): m for m in masks}
        self.size = functools.cache(self.size)  # both are needed at every point
        self.drawn = functools.cache(self.drawn)

    def check(self, annotation):
        """BadRecord for points and masks that contradict each other or the media."""
        points = annotation.get("points", [])
        keys = [key(p) for p in points]
        for (t, _, i), n in Counter(keys).items():
            if n > 1:
                when = "" if t is None else f" at {t} s"
                raise BadRecord("wrong field", f"{self.where}: two points of id {i}{when}")
        start, end = self.record.get("start", 0), self.record.get("end", math.inf)
        for p in points if self.kind == "video" else ():
            if not start - 0.01 <= p["t"] <= end + 0.01:
                clip = f"{start} to {end} s" if start else f"{end} s"
                raise BadRecord("wrong field", f"{self.where}: a point at {p['t']} s of a clip of {clip}")
        for m in annotation.get("masks", []):
            if not isinstance(m, dict) or key(m) not in keys:
                raise BadRecord("wrong field", f"{self.where}: mask {str(m)[:60]} belongs to no point")

    def size(self, image=None):
        """(width, height) of the media, in pixels."""
        if self.kind == "video":
            return video_size(self.path)
        return image_size(self.path or inside_folder(self.folder, self.record["images"][image]))

    def mask(self, p):
        """The mask of a true point (H, W) bool, or None."""
        return self.drawn(key(p)) if key(p) in self.masks else None

    def drawn(self, which):
        """The mask of a key, from its polygon or its runs."""
        mask = self.masks[which]
        w, h = self.size(which[1])
        if "polygon" in mask:
            image = Image.new("1", (w, h))
            corners = np.array(mask["polygon"]) * (w, h)
            ImageDraw.Draw(image).polygon(corners.ravel().tolist(), 1)
            return np.array(image)
        rows, columns = mask["rle"]["size"]
        if (rows, columns) != (h, w):
            raise BadRecord("wrong field", f"{self.where}: a mask of {columns}x{rows} on media of {w}x{h}")
        counts = mask["rle"]["counts"]  # runs of 0 and 1 in turn, down one column after the other
        return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(w, h).T

    def hits(self, p, true):
        """Whether a predicted point lies in the mask of a true one, or without a mask within 5 % of it."""
        if p.get("image") != true.get("image"):
            return False
        mask = self.mask(true)
        if mask is None:
            return math.hypot(p["x"] - true["x"], p["y"] - true["y"]) <= 0.05
        return in_mask(mask, p["x"] * mask.shape[1] - 0.5, p["y"] * mask.shape[0] - 0.5)


def load_questions(datasets, limit=None, lenient=False):
    """The questions of the first `limit` records of each dataset: [Question]. A bad record is an error."""
    questions = []
    for dataset in datasets:
        for i in range(len(dataset) if limit is None else min(len(dataset), limit)):
            line, folder, where = dataset.line(i)
            try:
                record = parse_record(line)
                questions += [Question(record, a, folder, where, lenient) for a in record["annotations"]]
            except BadRecord as e:
                detail = e.detail if where in e.detail else f"{where}: {e.detail}"
                raise BadRecord(e.reason, detail) from None
    return questions


# ---- scoring one answer ------------------------------------------------------------------------------------

def predicted_points(q, text):
    """The points of an answer; of a video those with a time."""
    return [p for p in parse_points(text, q.kind, q.lenient) if q.kind != "video" or "t" in p]


def score_points(q, text, segmenter=None, judge=None):
    """Pointing: matched in space, with the image or the time as a third dimension, all on a scale of 0 to 100."""
    if "points" not in q.annotation:  # answered in words, as in a conversation
        return score_words(q, text)
    predicted = predicted_points(q, text)
    last = max([p.get("t", 0) for p in predicted + q.points], default=0) or 1  # in seconds

    def place(p):
        if q.kind == "video":
            return [round(100 * (p["t"] / last), 1), round(100 * p["x"], 1), round(100 * p["y"], 1)]
        return [1e4 * p.get("image", 0), 100 * p["x"], 100 * p["y"]]  # images are too far apart to be matched

    def hits(i, j):
        # times may be rounded: a twentieth of a second apart is another half second
        same_time = q.kind != "video" or abs(predicted[i]["t"] - q.points[j]["t"]) < 0.05
        return same_time and q.hits(predicted[i], q.points[j])

    values = point_f1([place(p) for p in predicted], [place(p) for p in q.points], hits)
    scores = dict(zip(("precision", "recall", "f1"), values))
    if not q.points:
        scores["none"] = float(text.strip() == NOTHING)
    return scores


def score_count(q, text, segmenter=None, judge=None):
    if q.truth.strip().isdigit():
        true = int(q.truth)
    elif "points" in q.annotation:
        true = len(q.points)
    else:
        true = parse_number(q.truth) or 0
    equal, close = count_accuracy(parse_number(text), true)
    return dict(accuracy=equal, close=close)


def score_words(q, text, segmenter=None, judge=None):
    """Short answers: the same words; with options the same letter or the same words."""
    right = words(text) == words(q.truth)
    if "options" in q.annotation:
        letter = re.match(r"\W*([A-Z])\b", text)
        option = q.annotation["options"][q.annotation["correct"]]
        right = letter[1] == q.truth[0] if letter else words(text) == words(option)
    return dict(accuracy=float(right))


def score_caption(q, text, segmenter=None, judge=None):
    if judge:
        precision, recall = judge.score(text, q.truth, q.annotation.get("statements"))
        return dict(precision=precision, recall=recall, f1=harmonic(precision, recall))
    return dict(zip(("overlap_precision", "overlap_recall", "overlap_f1"), word_overlap(text, q.truth)))


def half_second(p):
    """The half second of a point, counted from 0."""
    return round(2 * p["t"], 1)


def xy(points):
    return [(p["x"], p["y"]) for p in points]


def score_track(q, text, segmenter=None, judge=None):
    """Tracking: points of every frame that has a true or a predicted one, HOTA, and J, F with a segmenter."""
    predicted = predicted_points(q, text)
    times = sorted({half_second(p) for p in predicted + q.points})
    frames = []  # for `hota`
    scores = []  # (precision, recall, F1) of each frame
    n_hits = 0
    for t in times:
        true = [p for p in q.points if half_second(p) == t]
        first_of_id = {p["id"]: p for p in reversed(predicted) if half_second(p) == t}
        points = list(first_of_id.values())  # an id that comes twice in a frame counts once
        hits = pairwise(q.hits, points, true)
        scores.append(point_f1(xy(points), xy(true), lambda i, j: hits[i, j]))
        frames.append(([o["id"] for o in true], list(first_of_id), hits.T))
        n_hits += round(scores[-1][1] * len(true))
    precision, recall, f1 = np.mean(scores, 0).tolist() if scores else (1.0, 1.0, 1.0)
    out = dict(accuracy=n_hits / max(len(q.points), 1), precision=precision, recall=recall, f1=f1,
               hota=hota(frames)[0])
    if segmenter and q.masks:
        out |= score_masks(q, predicted, times, segmenter)
    return out


def score_masks(q, predicted, times, segmenter):
    """J, F, J&F, the mean over true objects: each is compared with the predicted track that suits it best."""
    # a predicted time after the end is just wrong: it gets the last frame
    seconds = np.minimum(np.array(times) / 2 + q.record.get("start", 0), video_duration(q.path))
    frames = load_frames(q.path, seconds.tolist())
    segmented = segmenter(frames, [(times.index(half_second(p)), p["x"], p["y"], p["id"]) for p in predicted])
    true_masks = {}  # object -> {half second: mask}
    for o in q.points:
        if key(o) in q.masks:  # others are not compared
            true_masks.setdefault(o["id"], {})[half_second(o)] = q.mask(o)
    empty = np.zeros(frames[0].shape[:2], bool)
    scores = np.zeros((len(true_masks), len(segmented), 3))  # J, F, J&F
    for i, (_, mask_at) in enumerate(sorted(true_masks.items())):
        for j, masks in enumerate(segmented.values()):
            # the frames in which either is visible
            pairs = [(masks[k], mask_at.get(t, empty)) for k, t in enumerate(times) if t in mask_at or masks[k].any()]
            scores[i, j] = j_and_f(*zip(*pairs))
    total = np.zeros(3)
    for i, j in assign(-scores[:, :, 2]):
        total += scores[i, j]
    j, f, both = (total / len(true_masks)).tolist()
    return {"j": j, "f": f, "j&f": both}


# How the answers of a task are scored: Task.metric names one of these. Each takes a Question and an answer and returns
# {name: value}; a judge of captions and a segmenter, for masks, are there if they were asked for.
METRICS = {"words": score_words, "caption": score_caption, "count": score_count, "points": score_points,
           "tracks": score_track}


def score(q, text, judge=None, segmenter=None):
    """{name: value} of one answer, by the metric of its task."""
    return METRICS[TASKS[q.task].metric](q, text, segmenter, judge)


# ---- all answers of a checkpoint ---------------------------------------------------------------------------

def evaluate(model, planner, questions, judge=None, segmenter=None, batch=32, max_new_tokens=None, world=None,
             unusable=None):
    """({"task metric": mean}, [one result per question: where, task, prompt, answer, truth, scores]). unusable: as of
    sample.answers."""
    prompts = [Prompt(q.task, q.where, q.record, q.folder, q.prompt) for q in questions]
    limit = lambda task: max_new_tokens or TASKS[task].limit
    texts = answers(model, planner, prompts, limit, batch, world, unusable)
    values = {}  # "task metric" -> a value per question
    results = []
    for q, text in progress(zip(questions, texts), "answers scored", len(questions), shown=not world):
        if text is None:
            continue
        try:
            scores = score(q, text, judge, segmenter)
        except JudgeError as e:
            print(f"error: {e}; {q.where} and what follows is not judged", file=sys.stderr)
            scores = dict(not_judged=1.0)
            judge = None  # the rest gets word overlap
        for name, value in scores.items():
            values.setdefault(f"{q.task} {name}", []).append(value)
        results.append(dict(where=q.where, task=q.task, prompt=q.prompt, answer=text,
                            truth=q.truth or q.annotation.get(TASKS[q.task].answer.field, []),
                            scores={name: round(value, 4) for name, value in scores.items()}))
    return {name: sum(v) / len(v) for name, v in sorted(values.items())}, results


# ---- stage 1's scores: toy scenes --------------------------------------------------------------------------

def objects_named(text):
    """How often a text names each kind of object by colour and shape: {"red circle": n}."""
    return Counter(re.findall(rf"(?:{'|'.join(toy.COLOURS)}) (?:{'|'.join(toy.SHAPES)})", text))


def points_inside(q, points):
    """How many points lie inside an outline of the question, each outline counted once. Shapes do not overlap, so a
    point can lie in one alone: no matching is needed."""
    masks = list(q.masks.values())
    for p in points:
        for mask in masks:
            if toy.inside(mask["polygon"], p["x"], p["y"]):
                masks.remove(mask)
                break
    return len(q.masks) - len(masks)


def scene_scores(questions, texts):
    """{name: share} of answers about toy scenes, each over all of them and stricter than the means of `evaluate`.

    point_hit: true points with a predicted one inside their outline; point_precision: predicted points that hit;
    count_accuracy: the very number; none_accuracy: "There are none." where it is true; caption_recall: objects of the
    true caption that the predicted one names, each as often as it is there.
    """
    n_hits = n_true = n_predicted = n_named = n_objects = 0
    counts_right = []
    nones_right = []
    for q, text in zip(questions, texts):
        if TASKS[q.task].metric == "count":
            counts_right.append(text == q.truth)
        elif TASKS[q.task].metric == "caption":
            objects = objects_named(q.truth)
            n_named += (objects & objects_named(text)).total()
            n_objects += objects.total()
        elif not q.points:
            nones_right.append(text == NOTHING)
        else:
            points = parse_points(text)
            n_hits += points_inside(q, points)
            n_true += len(q.points)
            n_predicted += len(points)
    return dict(point_hit=n_hits / max(n_true, 1), point_precision=n_hits / max(n_predicted, 1),
                count_accuracy=sum(counts_right) / max(len(counts_right), 1),
                none_accuracy=sum(nones_right) / max(len(nones_right), 1),
                caption_recall=n_named / max(n_objects, 1))


def scene_cells(questions, texts, n=24):
    """What the contact sheet shows of the scenes, for `contact_sheet`: n answers, three of four with points."""
    cells_of = {"image_pointing": [], "image_caption": []}
    for q, text in zip(questions, texts):
        if q.task in cells_of:
            points = parse_points(text)
            summary = f"{len(points)} {'point' if len(points) == 1 else 'points'}" if points else text
            drawn = points if q.task == "image_pointing" else []
            cells_of[q.task].append((q.path, q.prompt, summary, q.points, drawn))
    pointing, captions = cells_of.values()
    chosen = pointing[::max(len(pointing) * 4 // (3 * n), 1)][:n * 3 // 4]
    return chosen + captions[::max(len(captions) * 4 // n, 1)][:n - len(chosen)]


def evaluate_scenes(model, planner, folder, n, sheet=None, world=None):
    """`evaluate` on the toy world's first n held-out scenes, as stage 1's scores; a contact sheet goes to `sheet`."""
    datasets, _ = find_datasets([os.path.join(folder, "scenes.jsonl")])
    questions = load_questions(datasets, n)
    _, results = evaluate(model, planner, questions, batch=64, max_new_tokens=96, world=world)
    texts = [result["answer"] for result in results]
    if sheet:
        contact_sheet(scene_cells(questions, texts), sheet)
    return scene_scores(questions, texts) | dict(scenes=len({q.where for q in questions}))


# ---- the command -------------------------------------------------------------------------------------------

def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("checkpoints", nargs="+", help="folders with config.json, model.safetensors and tokenizer.json")
    add("--data", nargs="+", help="JSONL files or folders [the toy world's held-out clips and pairs]")
    add("--limit", type=sample.bounded(int, 1), help="records of each file [all]")
    add("--out", default="eval.json", help="every prediction beside its truth [eval.json]")
    add("--segmenter", help="MODULE:FUNCTION(frames, points) -> masks, for J and F [lib.toy:segment for toy]")
    add("--judge_url", help="OpenAI-compatible server that judges captions, up to /v1; key in JUDGE_API_KEY")
    add("--judge_model", default="gpt-4.1-2025-04-14", help="its model [gpt-4.1-2025-04-14]")
    add("--lenient", action="store_true", help="read points in any form [as the published evaluation reads them]")
    add("--max_new_tokens", type=sample.bounded(int, 1), help="length limit of answers [by task]")
    add("--max_frames", type=sample.bounded(int, 1), help="of a video [as in training, at most 128]")
    add("--tiles", type=sample.bounded(int, 0), help="high-resolution crops of an image [24; none for small]")
    add("--batch", type=sample.bounded(int, 1), default=32, help="questions at a time [32]")
    sample.add_device_flags(add)
    return parser.parse_args()


def print_table(scores, names):
    """{checkpoint: {name: value}} side by side."""
    for folder in scores:
        print(f"{'':34}{folder}")
    for name in names:
        print(f"{name:34}" + "".join(f"{values.get(name, math.nan):10.3f}" for values in scores.values()))


def main():
    args = parse_flags()
    scores = {}       # checkpoint -> {"task metric": mean}
    predictions = {}  # checkpoint -> what `evaluate` says of each question
    unusable = {}     # file:line -> why its media cannot be read
    try:
        judge = Judge(args.judge_url, args.judge_model) if args.judge_url else None
        segmenter = load_segmenter(args.segmenter) or (None if args.data else toy.segment)
        datasets, _ = find_datasets(args.data or toy.held_out(toy.FOLDER, "sft"))
        questions = load_questions(datasets, args.limit, args.lenient)
        for folder in args.checkpoints:
            model, planner = sample.load(folder, args.device, args.tiles, args.max_frames, usual_tiles=24,
                                         dtype=args.dtype)
            limit = args.max_new_tokens
            if limit is None and not args.data:
                limit = 256  # the toy world's answers are short, and a model may not have learned yet to end one
            scores[folder], predictions[folder] = evaluate(model, planner, questions, judge, segmenter, args.batch,
                                                           limit, unusable=unusable)
    except (UserError, OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    names = sorted(set().union(*scores.values()))
    print_table(scores, names)
    if not judge and "overlap" in " ".join(names):
        print("overlap: shared words, a proxy; --judge_url scores captions by their statements")
    with open(args.out, "w") as f:
        reader = "lenient" if args.lenient else "published expression"
        json.dump(dict(points_read_by=reader, scores=scores, predictions=predictions), f, indent=1)
    print(f"{args.out} holds every answer beside its truth")
    for where, reason in unusable.items():
        print(f"error: {where} was left out: {reason}", file=sys.stderr)
    if unusable:
        sys.exit(1)


if __name__ == "__main__":
    main()
