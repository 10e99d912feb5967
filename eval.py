"""
Evaluation: a checkpoint answers, the answers are compared with what is known, every one of them is kept.

    python eval.py out/small/sft/latest                                  # the toy world's held-out pictures and clips
    python eval.py out/small/pretrain/latest out/small/sft/latest        # two checkpoints side by side
    python eval.py weights/Molmo2-8B --data eval/my.jsonl --device cuda  # your own lines, in the form you train on
    python eval.py ... --segmenter my_sam:segment --judge_url http://localhost:8000/v1 --judge_model some-judge

    JSONL ─► question ─► answer ─► points, number, words ─► score, by task ─► table, eval.json

The four Molmo2 evaluations are metrics of one task each, with the published definitions:

    captions   precision, recall, F1 over atomic statements: needs a judge; without one a proxy, word overlap, said so
    pointing   precision, recall, F1: predictions matched to true points (least distance in all), then hit by mask
    counting   equal; close: within 1 + 5 % of the truth
    tracking   points as above in every frame; HOTA; with a segmenter that turns points into masks J, F and J&F

An annotation may carry the masks of its points: {"id": 0, "t" or "image": ..., "polygon": [[x, y], ...] as
shares of the sides, or "rle": {"size": [h, w], "counts": [...]} by columns}. Without them a point hits within
5 % of its place.
"""
import argparse
import functools
import importlib
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter

import numpy as np
import requests
from PIL import Image, ImageDraw

import sample
from lib import toy
from data import find_datasets, in_clip, parse_points, prompt_of
from lib.media import BadMedia, image_size, inside_folder, load_frames, open_video, video_duration
from lib.records import BadRecord, MEDIA, parse_record
from lib.text import NOTHING, multiple_choice
from lib.weights import BadCheckpoint
from sample import answers


# Longest answers, in tokens, by task: the published limits.
LIMITS = dict(image_caption=448, video_caption=2048, image_pointing=192, multi_image_pointing=192,
              counting=192,
              video_pointing=2048, video_tracking=4096)


# ---- metrics: plain functions of predictions and truths ----------------------------------------------------

def assign(cost):
    """The one-to-one matching of least total cost: cost (n, m) -> [(row, column)], min(n, m) of them.

    Shortest augmenting paths (Jonker and Volgenant 1987): rows enter one by one, prices keep reduced costs >=
    0.
    """
    cost = np.asarray(cost, float)
    if 0 in cost.shape:
        return []
    if cost.shape[0] > cost.shape[1]:
        return sorted((i, j) for j, i in assign(cost.T))
    n, m = cost.shape
    u, v, row_of = np.zeros(n), np.zeros(m), np.full(m, -1)
    for start in range(n):
        least, came, done, i, j = np.full(m, np.inf), np.full(m, -1), np.zeros(m, bool), start, -1
        while True:  # grow a tree of tight edges from `start` until it meets a free column
            if j >= 0:
                done[j], i = True, row_of[j]
            reach = (least[j] if j >= 0 else 0) + cost[i] - u[i] - v
            better = ~done & (reach < least)
            least[better], came[better] = reach[better], j
            k = int(np.where(done, np.inf, least).argmin())
            if row_of[k] < 0:
                break
            j = k
        bound = least[k]
        u[start] += bound
        for c in np.flatnonzero(done):
            u[row_of[c]] += bound - least[c]
            v[c] -= bound - least[c]
        while k >= 0:  # turn the path around
            before = came[k]
            row_of[k] = row_of[before] if before >= 0 else start
            k = before
    return sorted((int(i), j) for j, i in enumerate(row_of) if i >= 0)


def in_mask(mask, x, y):
    """Whether the pixel nearest to (x, y), in pixels, is inside the picture and set in mask (H, W)."""
    i, j = round(y), round(x)
    return 0 <= i < mask.shape[0] and 0 <= j < mask.shape[1] and bool(mask[i, j])


def harmonic(p, r):
    """F1 of a precision and a recall."""
    return 2 * p * r / (p + r) if p + r else 0.0


def precision_recall_f1(hits, predicted, true):
    """Nothing asked for and nothing said is right."""
    if not predicted and not true:
        return 1.0, 1.0, 1.0
    p, r = hits / predicted if predicted else 0.0, hits / true if true else 0.0
    return p, r, harmonic(p, r)


def point_f1(predicted, true, hits):
    """(precision, recall, F1) of points: (n, d) and (m, d) coordinates, and hits(i, j): whether the i-th lies
    in what the j-th marks. Matched by least total distance first, as published; a match that misses is no
    hit."""
    pairs = assign([[math.dist(p, t) for t in true] for p in predicted]) if len(predicted) and len(true) else []
    return precision_recall_f1(sum(bool(hits(i, j)) for i, j in pairs), len(predicted), len(true))


def parse_number(text):
    """The number an answer gives: points, "a total of 3", a number first or alone; None where there is
    none."""
    points = parse_points(text)
    if points:
        return len(points)
    if NOTHING in text:
        return 0
    m = re.search(r"total of (\d{1,6})", text) or re.search(r"\b(\d{1,6})\b", text)
    return int(m[1]) if m else None


def count_accuracy(predicted, true):
    """(equal, close) of two counts, close being within 1 + floor(0.05 · true); a missing prediction is
    wrong."""
    if predicted is None:
        return 0.0, 0.0
    return float(predicted == true), float(abs(predicted - true) <= 1 + math.floor(0.05 * true))


def region_j(a, b):
    """Jaccard index of two masks (H, W) bool; two empty ones agree."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def boundary(mask):
    """Pixels of mask (H, W) whose right, lower or lower right neighbour differs, as DAVIS draws a
    boundary."""
    right, down, both = mask.copy(), mask.copy(), mask.copy()
    right[:, :-1], down[:-1], both[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    edge = (mask ^ right) | (mask ^ down) | (mask ^ both)
    edge[-1], edge[:, -1] = mask[-1] ^ right[-1], mask[:, -1] ^ down[:, -1]
    edge[-1, -1] = False
    return edge


def dilate(mask, radius):
    """mask (H, W) grown by a disk: row by row of the disk, a window sum along the row, shifted."""
    h, out = mask.shape[0], np.zeros_like(mask)
    for dy in range(-radius, radius + 1):
        wide = math.isqrt(radius ** 2 - dy ** 2)
        total = np.cumsum(np.pad(mask, ((0, 0), (wide + 1, wide))), 1)
        row = total[:, 2 * wide + 1:] - total[:, :-2 * wide - 1] > 0
        out[max(dy, 0):h + min(dy, 0)] |= row[max(-dy, 0):h + min(-dy, 0)]
    return out


def boundary_f(a, b, width=0.008):
    """Boundary F of two masks (H, W) bool: boundaries that meet within `width` of the diagonal (DAVIS
    2016)."""
    edge_a, edge_b = boundary(a), boundary(b)
    n, m = np.count_nonzero(edge_a), np.count_nonzero(edge_b)
    if not n or not m:
        return float(n == m)
    radius = math.ceil(width * math.hypot(*a.shape))
    p = np.count_nonzero(edge_a & dilate(edge_b, radius)) / n
    r = np.count_nonzero(edge_b & dilate(edge_a, radius)) / m
    return harmonic(p, r)


def j_and_f(pred_masks, true_masks):
    """(J, F, J&F) of an object's masks, frame by frame, (H, W) bool each; the mean over frames."""
    j = float(np.mean([region_j(a, b) for a, b in zip(pred_masks, true_masks, strict=True)]))
    f = float(np.mean([boundary_f(a, b) for a, b in zip(pred_masks, true_masks)]))
    return j, f, (j + f) / 2


def hota(frames):
    """HOTA, DetA, AssA (Luiten et al. 2020) where a prediction is either in an object's mask or not.

    frames: [(true ids, predicted ids, (true, predicted) bool: whether the point lies in the mask)].
    """
    true_n, pred_n = Counter(i for t, _, _ in frames for i in t), Counter(i for _, p, _ in frames for i in p)
    rows, cols = ({key: k for k, key in enumerate(n)} for n in (true_n, pred_n))
    sizes = [np.array(list(n.values()), float) for n in (true_n, pred_n)]
    overlap, matched = np.zeros((len(rows), len(cols))), np.zeros((len(rows), len(cols)))
    at = lambda t, p: np.ix_([rows[i] for i in t], [cols[i] for i in p])
    for t, p, hit in frames:
        hit = np.asarray(hit, float).reshape(len(t), len(p))
        either = hit.sum(0, keepdims=True) + hit.sum(1, keepdims=True) - hit
        overlap[at(t, p)] += np.divide(hit, either, out=np.zeros_like(hit), where=either > 0)
    alike = overlap / np.maximum(sizes[0][:, None] + sizes[1][None] - overlap, 1e-9)
    for t, p, hit in frames:  # who is who over the whole clip decides whom a frame matches
        hit = np.asarray(hit, float).reshape(len(t), len(p))
        for i, j in assign(-alike[at(t, p)] * hit):
            matched[rows[t[i]], cols[p[j]]] += hit[i, j]
    tp, true, pred = matched.sum(), sum(true_n.values()), sum(pred_n.values())
    if not true + pred:
        return 1.0, 1.0, 1.0
    det = tp / (true + pred - tp)
    union = np.maximum(sizes[0][:, None] + sizes[1][None] - matched, 1e-9)
    ass = (matched * matched / union).sum() / max(tp, 1)
    return math.sqrt(det * ass), float(det), float(ass)


def words(text):
    return re.findall(r"\w+", text.lower())


def word_overlap(predicted, true):
    """(precision, recall, F1) of the words of two texts: no measure of truth, a proxy where there is no
    judge."""
    a, b = Counter(words(predicted)), Counter(words(true))
    return precision_recall_f1((a & b).total(), a.total(), b.total())


class JudgeError(Exception):
    """The judge did not answer."""


class Judge:
    """A language model behind an OpenAI-compatible URL that splits captions into statements and checks
    them."""

    def __init__(self, url, model, tries=5, pause=2.0):
        self.url, self.model, self.tries, self.pause = url.rstrip("/") + "/chat/completions", model, tries, pause
        key = os.environ.get("JUDGE_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask(self, prompt):
        """The answer as parsed JSON; after `tries` failures with growing pauses JudgeError."""
        body = dict(model=self.model, temperature=0, messages=[dict(role="user", content=prompt)])
        for k in range(self.tries):
            try:
                r = requests.post(self.url, json=body, headers=self.headers, timeout=120)
                r.raise_for_status()
                text = r.json()["choices"][0]["message"]["content"]
                return json.loads(text[text.index("["):text.rindex("]") + 1])
            except (requests.RequestException, ValueError, LookupError, TypeError) as e:
                trouble = f"{type(e).__name__}: {e}"
                time.sleep(self.pause * 2 ** k if k + 1 < self.tries else 0)
        raise JudgeError(f"--judge_url {self.url}: no usable answer in {self.tries} tries ({trouble})")

    def statements(self, caption):
        return [str(s) for s in self.ask(
            "Split this description into short statements that can each be true or false by themselves. "
            f"Answer with a JSON list of strings.\n\n{caption}")]

    def stated(self, statements, caption):
        """For each statement, whether the caption says it."""
        if not statements:
            return []
        listed = "\n".join(f"{i + 1}. {s}" for i, s in enumerate(statements))
        yes = self.ask(f"Description:\n{caption}\n\nStatements:\n{listed}\n\nFor each statement: does the "
                       "description say so? Answer with a JSON list of true and false, in order.")
        if len(yes) != len(statements):
            raise JudgeError(f"--judge_url {self.url}: {len(yes)} verdicts on {len(statements)} statements")
        return [v is True for v in yes]

    def score(self, predicted, true, statements=None):
        """(precision, recall, F1): of what was said, the share that the true caption says; of the true
        statements, the share that was said."""
        said, right = self.statements(predicted), statements or self.statements(true)
        p, r = self.stated(said, true), self.stated(right, predicted)
        p, r = sum(p) / max(len(p), 1), sum(r) / max(len(r), 1)
        return p, r, harmonic(p, r)


# ---- what is true of a row ---------------------------------------------------------------------------------

def key(p):
    """What tells the points of an annotation apart, and their masks: (time, picture, id)."""
    return p.get("t"), p.get("image"), p.get("id")


class Question:
    """One annotation of a row to be asked and scored."""

    def __init__(self, row, a, folder, where):
        self.row, self.folder, self.where, self.task = row, folder, where, a["task"]
        self.kind = next((k for k in MEDIA if k in row), None)
        self.path = None if self.kind in (None, "images") else inside_folder(folder, row[self.kind])
        self.check(a)
        self.a = a = in_clip(a, row)  # from here on times count from the start of the clip, as the model counts
        if "messages" in a:
            self.prompt, self.truth = a["messages"][0]["content"], a["messages"][1]["content"]
        elif "options" in a:
            self.prompt, self.truth = multiple_choice(a["question"], a["options"], a["correct"])
        else:
            self.prompt = a.get("prompt") or prompt_of(a, self.kind, random.Random(where))
            self.truth = a.get("answer", "")
        self.points, masks = a.get("points", []), in_clip(dict(points=a.get("masks", [])), row)["points"]
        self.masks = {key(m): m for m in masks}
        self.size, self.drawn = functools.cache(self.size), functools.cache(self.drawn)  # asked for at every point

    def check(self, a):
        """Points and masks that contradict each other or the media are the data's mistake, and said to be
        one."""
        points, keys = a.get("points", []), [key(p) for p in a.get("points", [])]
        if len(set(keys)) < len(keys):
            twice = next(k for k in keys if keys.count(k) > 1)
            at = "" if twice[0] is None else f" at {twice[0]} s"
            raise BadRecord("wrong field", f"{self.where}: two points of id {twice[2]}{at}")
        if self.kind == "video":
            start, end = self.row.get("start", 0), self.row.get("end", math.inf)
            outside = [p["t"] for p in points if not start - 0.01 <= p["t"] <= end + 0.01]
            if outside:
                clip = f"{end} s" if not start else f"{start} to {end} s"
                raise BadRecord("wrong field", f"{self.where}: a point at {outside[0]} s of a clip of {clip}")
        for m in a.get("masks", []):
            if not isinstance(m, dict) or key(m) not in keys:
                raise BadRecord("wrong field", f"{self.where}: mask {str(m)[:60]} belongs to no point")

    def size(self, image=None):
        """(width, height) of the media, in pixels."""
        if self.kind == "video":
            container, stream = open_video(self.path)
            with container:
                return stream.width, stream.height
        return image_size(self.path or inside_folder(self.folder, self.row["images"][image]))

    def mask(self, p):
        """The mask of a true point (H, W) bool, or None."""
        return self.drawn(key(p)) if key(p) in self.masks else None

    def drawn(self, which):
        m, (w, h) = self.masks[which], self.size(which[1])
        if "polygon" in m:
            image = Image.new("1", (w, h))
            ImageDraw.Draw(image).polygon([(x * w, y * h) for x, y in m["polygon"]], 1)
            return np.array(image)
        (rows, columns), counts = m["rle"]["size"], m["rle"]["counts"]
        if (rows, columns) != (h, w):
            raise BadRecord("wrong field", f"{self.where}: a mask of {columns}x{rows} on media of {w}x{h}")
        return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(w, h).T

    def hits(self, p, true):
        """Whether a predicted point lies in what a true one marks: its mask, or without one 5 % around it."""
        if p.get("image") != true.get("image"):
            return False
        mask = self.mask(true)
        if mask is None:
            return math.hypot(p["x"] - true["x"], p["y"] - true["y"]) <= 0.05
        return in_mask(mask, p["x"] * mask.shape[1] - 0.5, p["y"] * mask.shape[0] - 0.5)


def load_questions(datasets, limit=None):
    """The questions of the first `limit` lines of each dataset: [Question]. What is wrong in them is an
    error."""
    out = []
    for d in datasets:
        for i in range(min(len(d), limit or len(d))):
            line, folder, where = d.line(i)
            try:
                row = parse_record(line)
                out += [Question(row, a, folder, where) for a in row["annotations"]]
            except BadRecord as e:
                raise BadRecord(e.reason, f"{where}: {e.detail}" if where not in e.detail else e.detail) from None
    return out


# ---- scoring one answer ------------------------------------------------------------------------------------

def score_points(q, text):
    """Pointing: matched in space, with the picture or the time as one more dimension, all on a scale of 0 to
    100."""
    predicted = parse_points(text, q.kind)
    if q.kind == "video":
        length = max([p["t"] for p in [*predicted, *q.points] if "t" in p], default=1) or 1
        predicted = [p for p in predicted if "t" in p]
        place = lambda p: [round(100 * v, 1) for v in (p["t"] / length, p["x"], p["y"])]
        same = lambda p, t: abs(p["t"] - t["t"]) < 0.05  # the same half second, whatever the digits
    else:
        place = lambda p: [1e4 * p.get("image", 0), 100 * p["x"], 100 * p["y"]]
        same = lambda p, t: True
    hits = lambda i, j: same(predicted[i], q.points[j]) and q.hits(predicted[i], q.points[j])
    p, r, f = point_f1([place(p) for p in predicted], [place(t) for t in q.points], hits)
    none = {} if q.points else dict(none=float(text.strip() == NOTHING))
    return dict(precision=p, recall=r, f1=f) | none


def score_count(q, text):
    true = int(q.truth) if q.truth.strip().isdigit() else len(q.points) if "points" in q.a else parse_number(q.truth)
    equal, close = count_accuracy(parse_number(text), true or 0)
    return dict(accuracy=equal, close=close)


def score_words(q, text):
    """Questions: the same words; of options the same letter or the same words."""
    if "options" in q.a:
        letter = re.match(r"\W*([A-Z])\b", text)
        right = letter[1] == q.truth[0] if letter else words(text) == words(q.a["options"][q.a["correct"]])
        return dict(accuracy=float(right))
    return dict(accuracy=float(words(text) == words(q.truth)))


def score_caption(q, text, judge=None):
    if judge:
        p, r, f = judge.score(text, q.truth, q.a.get("statements"))
        return dict(precision=p, recall=r, f1=f)
    p, r, f = word_overlap(text, q.truth)
    return dict(overlap_precision=p, overlap_recall=r, overlap_f1=f)


def half(p):
    """The half second a point is said for, counted from 0."""
    return round(2 * p["t"], 1)


def score_track(q, text, segmenter=None):
    """Tracking: points of every frame that has a true or a predicted one, HOTA, and J, F with a segmenter."""
    predicted = [p for p in parse_points(text, "video") if "t" in p]
    times = sorted({half(p) for p in [*predicted, *q.points]})
    frames, scores, hit_n = [], [], 0
    for t in times:
        mine, true = [p for p in predicted if half(p) == t], [p for p in q.points if half(p) == t]
        mine = list({p["id"]: p for p in reversed(mine)}.values())  # an id said twice counts once
        hit = np.array([[q.hits(p, o) for p in mine] for o in true]).reshape(len(true), len(mine))
        scores.append(point_f1([(p["x"], p["y"]) for p in mine], [(o["x"], o["y"]) for o in true],
                               lambda i, j: hit[j, i]))
        frames.append(([o["id"] for o in true], [p["id"] for p in mine], hit))
        hit_n += round(scores[-1][1] * len(true))
    p, r, f = np.mean(scores, 0).tolist() if scores else (1.0, 1.0, 1.0)
    out = dict(accuracy=hit_n / max(len(q.points), 1), precision=p, recall=r, f1=f, hota=hota(frames)[0])
    if segmenter and q.masks:
        out |= dict(zip(("j", "f", "j&f"), score_masks(q, predicted, times, segmenter)))
    return out


def score_masks(q, predicted, times, segmenter):
    """(J, F, J&F), the mean over true objects: each is compared with the predicted one that suits it best."""
    start, end = q.row.get("start", 0), video_duration(q.path)
    # a time said beyond the end is just wrong
    frames = load_frames(q.path, [min(t / 2 + start, end) for t in times])
    h, w = frames[0].shape[:2]
    points = [(times.index(half(p)), p["x"], p["y"], p["id"]) for p in predicted]
    segmented, ids = segmenter(frames, points), sorted({o["id"] for o in q.points})
    empty, table = np.zeros((h, w), bool), {}
    for i in ids:
        own = {half(o): q.mask(o) for o in q.points if o["id"] == i}
        for j, masks in segmented.items():
            both = [(masks[k], own.get(t, empty)) for k, t in enumerate(times) if t in own or masks[k].any()]
            table[i, j] = j_and_f(*zip(*both)) if both else (1.0, 1.0, 1.0)
    pairs = assign([[-table[i, j][2] for j in segmented] for i in ids]) if segmented else []
    best = [table[ids[i], list(segmented)[j]] for i, j in pairs]
    return (np.sum(best, 0) / len(ids)).tolist() if best else (0.0, 0.0, 0.0)


def score(q, text, judge=None, segmenter=None):
    """{metric: value} of one answer."""
    if q.task == "video_tracking":
        return score_track(q, text, segmenter)
    if q.task == "counting":
        return score_count(q, text)
    if "points" in q.a:
        return score_points(q, text)
    if q.task.endswith("caption"):
        return score_caption(q, text, judge)
    return score_words(q, text)


# ---- asking and averaging ----------------------------------------------------------------------------------

def evaluate(model, planner, questions, judge=None, segmenter=None, batch=32, max_new_tokens=None, world=None):
    """({"task metric": mean}, [one record per question: where, task, prompt, answer, truth, scores])."""
    texts = answers(model, planner, [(q.task, q.where, q.row, q.folder, q.prompt) for q in questions],
                    lambda task: max_new_tokens or LIMITS.get(task, 64), batch, world)
    sums, records = {}, []
    for q, text in zip(questions, texts):
        try:
            scores = score(q, text, judge, segmenter)
        except JudgeError as e:
            print(f"error: {e}; {q.where} and what follows is not judged", file=sys.stderr)
            scores, judge = dict(not_judged=1.0), None
        for name, value in scores.items():
            sums.setdefault(f"{q.task} {name}", []).append(value)
        records.append(dict(where=q.where, task=q.task, prompt=q.prompt, answer=text,
                            truth=q.truth or q.points, scores={k: round(v, 4) for k, v in scores.items()}))
    return {name: sum(v) / len(v) for name, v in sorted(sums.items())}, records


def evaluate_scenes(model, planner, folder, n, sheet=None, world=None):
    """Scores of generated answers about the first n held-out scenes, {name: share}; a contact sheet goes to
    `sheet`.

    point_hit: asked-for objects with a predicted point inside (each point used once); point_precision: points
    that hit; count_accuracy; none_accuracy: "There are none." where it is true; caption_recall: objects named
    by colour and shape.
    """
    with open(os.path.join(folder, "geometry.json")) as f:
        geometry = json.load(f)
    with open(os.path.join(folder, "scenes.jsonl")) as f:
        scenes = [json.loads(line) for line in f][:n]
    asked = [(s, a) for s in scenes for a in s["annotations"]]
    texts = answers(model, planner, [(a["task"], s["id"], s, folder, a["prompt"]) for s, a in asked],
                    lambda task: 96, 64, world)
    answered = [(s, a, text) for (s, a), text in zip(asked, texts)]
    hits, truths, predicted, tally = 0, 0, 0, {"count": [], "none": [], "caption": []}
    for s, a, text in answered:
        if a["task"] == "counting":
            tally["count"].append(text == a["answer"])
        elif a["task"] == "image_caption":
            tally["caption"] += named(text, geometry[s["id"]])
        elif not a["points"]:
            tally["none"].append(text == NOTHING)
        else:
            targets = [o["polygon"] for p in a["points"]
                       for o in geometry[s["id"]] if (o["x"], o["y"]) == (p["x"], p["y"])]
            points = parse_points(text)
            for p in points:  # shapes do not overlap, so a point can only hit one: no matching is needed
                hit = [t for t in targets if toy.inside(t, p["x"], p["y"])][:1]
                targets = [t for t in targets if t not in hit]
                hits += len(hit)
            truths, predicted = truths + len(a["points"]), predicted + len(points)
    if sheet:
        contact_sheet(folder, [x for x in answered if x[1]["task"] != "counting"], geometry, sheet)
    mean = lambda xs: sum(xs) / max(len(xs), 1)
    return dict(point_hit=hits / max(truths, 1), point_precision=hits / max(predicted, 1),
                count_accuracy=mean(tally["count"]), none_accuracy=mean(tally["none"]),
                caption_recall=mean(tally["caption"]), scenes=len(scenes))


def named(text, objects):
    """For each object, whether the text names its colour and shape; a phrase counts for one object."""
    phrases = [" ".join(m) for m in re.findall(rf"({'|'.join(toy.COLOURS)}) ({'|'.join(toy.SHAPES)})", text)]
    found = []
    for o in objects:
        phrase = f"{o['colour']} {o['shape']}"
        found.append(phrase in phrases)
        if found[-1]:
            phrases.remove(phrase)
    return found


def contact_sheet(folder, answers, geometry, path, columns=6, cells=24, side=150, text_height=46):
    """A page of held-out scenes: true centres as circles, predicted points as crosses, question and answer
    below."""
    by_kind = [[x for x in answers if x[1]["task"] == t] for t in ("image_pointing", "image_caption")]
    chosen = by_kind[0][::max(len(by_kind[0]) * 4 // (3 * cells), 1)][:cells * 3 // 4]
    chosen += by_kind[1][::max(len(by_kind[1]) * 4 // cells, 1)][:cells - len(chosen)]
    page = Image.new("RGB", (columns * (side + 10), -(-len(chosen) // columns) * (side + text_height)),
                     "white")
    pen = ImageDraw.Draw(page)
    for k, (s, a, text) in enumerate(chosen):
        left, top = k % columns * (side + 10) + 5, k // columns * (side + text_height) + 3
        with Image.open(os.path.join(folder, s["image"])) as image:
            page.paste(image.convert("RGB").resize((side, side)), (left, top))
        at = lambda p: (left + p["x"] * side, top + p["y"] * side)
        for p in a.get("points", []):
            x, y = at(p)
            pen.ellipse([x - 7, y - 7, x + 7, y + 7], outline="black", width=3)
            pen.ellipse([x - 6, y - 6, x + 6, y + 6], outline="white", width=1)
        for p in parse_points(text) if "points" in a else []:
            x, y = at(p)
            for colour, w in (("black", 4), ("white", 2)):
                pen.line([x - 5, y, x + 5, y], colour, w)
                pen.line([x, y - 5, x, y + 5], colour, w)
        said = f"{len(parse_points(text))} points" if parse_points(text) else text
        for line, words in enumerate([a["prompt"]] + [said[i:i + 27] for i in range(0, 54, 27)]):
            pen.text((left, top + side + 1 + 13 * line), words[:27], fill="black" if line else (0, 80, 160))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    page.save(path)


def load_function(name):
    """module:function of --segmenter."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("checkpoints", nargs="+",
                        help="folders with config.json, model.safetensors and tokenizer.json")
    parser.add_argument("--data", nargs="+",
                        help="JSONL files or folders [the toy world's held-out clips and pairs]")
    parser.add_argument("--limit", type=int, help="lines of each file [all]")
    parser.add_argument("--out", default="eval.json", help="every prediction beside its truth [eval.json]")
    parser.add_argument("--segmenter",
                        help="MODULE:FUNCTION(frames, points) -> masks, for J and F [toy:segment for toy]")
    parser.add_argument("--judge_url",
                        help="OpenAI-compatible server that judges captions, up to /v1; key in JUDGE_API_KEY")
    parser.add_argument("--judge_model", default="gpt-4.1-2025-04-14", help="its model [gpt-4.1-2025-04-14]")
    parser.add_argument("--max_new_tokens", type=int, help="length limit of answers [by task]")
    parser.add_argument("--max_frames", type=int, help="of a video [as in training, at most 128]")
    parser.add_argument("--tiles", type=int, help="high-resolution crops of a picture [24; none for small]")
    parser.add_argument("--batch", type=int, default=32, help="questions at a time [32]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps [cpu]")
    args = parser.parse_args()
    try:
        judge = Judge(args.judge_url, args.judge_model) if args.judge_url else None
        segmenter = load_function(args.segmenter) if args.segmenter else None if args.data else toy.segment
        paths = args.data or toy.held_out(toy.FOLDER, "sft")
        questions = load_questions(find_datasets(paths)[0], args.limit)
        table, kept = {}, {}
        for folder in args.checkpoints:
            model, planner = sample.load(folder, args.device, args.tiles, args.max_frames, usual_tiles=24)
            limit = args.max_new_tokens or (256 if model.cfg.crop < 378 else None)
            table[folder], kept[folder] = evaluate(model, planner, questions, judge, segmenter, args.batch,
                                                   limit)
    except (OSError, ValueError, BadRecord, BadMedia, BadCheckpoint, ImportError, AttributeError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    names = sorted({n for scores in table.values() for n in scores})
    for folder in table:
        print(f"{'':34}{folder}")
    for name in names:
        print(f"{name:34}" + "".join(f"{table[f].get(name, float('nan')):10.3f}" for f in table))
    if not judge and any("overlap" in n for n in names):
        print("overlap: shared words, a proxy; --judge_url scores captions by their statements")
    with open(args.out, "w") as f:
        json.dump(dict(scores=table, predictions=kept), f, indent=1)
    print(f"{args.out} holds every answer beside its truth")


if __name__ == "__main__":
    main()
