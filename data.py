"""
Data: JSONL lines in, packed batches out.

    mixture ─► draw (dataset, row) ─► plan ─► pack ─► decode ─► collate ─► batch ─► Molmo2
               integers only          │       │       │         crops of all rows side by side
                                      │       │       pixels, in the DataLoader's workers
                                      │       plans that fill a row of T tokens; lengths are all it looks at
                                      tokens, targets, weights, branches, and which crops will be needed: headers only

One line is one picture, set of pictures, video or text with all its annotations: a message tree. The media
are the trunk, each annotation is a branch that sees the trunk and itself, so five questions about a picture
cost one picture.

Everything up to the pixels is a function of (files, mixture, seed): the stream is the same for any number of
workers and ranks, and where it stands is a small JSON that travels with each row.

    python data.py data/my.jsonl --show 8     # check every line; a page with what the model will see of the first eight

Shapes:  B rows, T tokens, N crops, P patches per crop, M visual tokens, K patches pooled into one
"""
import argparse
import base64
import contextlib
import csv
import ctypes
import glob
import hashlib
import html
import io
import itertools
import json
import math
import os
import random
import signal
import sys
import threading
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw

from media import (MAX_PIXELS, BadMedia, Kept, Layout, frame_layout, image_layout, image_size, inside_folder,
                   load_crops, sample_times, video_duration)
from points import (CHAT, PROMPTS, SMALL_TOKENIZER, WRITABLE, Tokenizer, chat_pieces, is_unit,
                    multiple_choice, number, styled,
                    write_points, write_prompt)
from points import format_points, parse_points  # noqa: F401  public under this name too
from weights import BadCheckpoint

# task -> (media it is about, weight of an answer token). None: any media, or none.
TASKS = {"image_caption": ("image", 1.0), "image_qa": ("image", 1.0), "image_pointing": ("image", 2.0),
         "counting": (None, 1.5), "multi_image_qa": ("images", 1.0), "multi_image_pointing": ("images", 2.0),
         "video_caption": ("video", 1.0), "video_qa": ("video", 1.0), "video_pointing": ("video", 2.0),
         "video_tracking": ("video", 2.0), "text": (None, 1.0)}
# what a line may be about, and the kinds of points `format_points` knows
MEDIA = ("image", "images", "video")
# Rows left out on purpose: counted, but they do not stop a run.
NOT_BAD = NO_VIDEO, CLOSED = "no reader for video in this stage", "from a closed model"
MAX_LINE = 32 << 20  # bytes; a longer line is not read
REGISTRY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "datasets.tsv")


class BadRow(Exception):
    """A line that cannot be used. `reason` is what it is counted under."""

    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


# ---- rows: one JSONL line, checked -------------------------------------------------------------------------

def parse_row(line):
    """Bytes of one line -> the row as a dict; BadRow says what is wrong with it."""
    if len(line) >= MAX_LINE:
        raise BadRow("line too long", f"more than {MAX_LINE >> 20} MiB")
    try:
        row = json.loads(line.decode("utf-8-sig"))
        if b"\\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()  # JSON can spell half a character, which is no text
    except UnicodeError:
        raise BadRow("not UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise BadRow("malformed JSON", str(e)) from None
    if not isinstance(row, dict):
        raise BadRow("wrong field", f"a line must be an object, not {type(row).__name__}")
    kinds = [k for k in MEDIA if k in row]
    if len(kinds) > 1:
        raise BadRow("wrong field", f"{' and '.join(kinds)} in one line")
    kind = kinds[0] if kinds else None
    names = row[kind] if kind == "images" else [row[kind]] if kind else []
    named = isinstance(names, list) and all(isinstance(n, str) and n for n in names)
    if not named or kind == "images" and not names:
        raise BadRow("wrong field", f"{kind} is {row[kind]!r}")
    check_size(row)
    by = row.get("provenance", [])
    if not isinstance(by, list) or not all(isinstance(p, dict) for p in by):
        raise BadRow("wrong field", "provenance must be a list of objects")
    if kind == "video":
        check_clip(row)
    if not isinstance(row.get("annotations"), list) or not row["annotations"]:
        raise BadRow("wrong field", "annotations must be a list with something in it")
    for a in row["annotations"]:
        check_annotation(a, kind, len(names))
    return row


whole = lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**31
is_text = lambda v: isinstance(v, str)


def is_time(value):
    """Whether a JSON value is a number of seconds from 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9


def check_size(row):
    """width and height save reading a picture's header; one without the other is a slip."""
    size = row.get("width"), row.get("height")
    given = [n for n, key in zip(size, ("width", "height")) if key in row]
    if len(given) == 1 or not all(map(whole, given)) or given and not 0 < given[0] * given[1] <= MAX_PIXELS:
        raise BadRow("wrong field", f"width and height are pixels, both or neither: {size[0]!r}, {size[1]!r}")


def check_clip(row):
    """duration saves reading a video's header; start, end and every other time count from the start of the
    file."""
    lines = row.get("subtitles", [])
    fine = isinstance(lines, list) and all(isinstance(s, dict) and is_time(s.get("start"))
                                           and is_time(s.get("end"))
                                           and isinstance(s.get("text"), str) for s in lines)
    if not (fine and all(is_time(row.get(key, 1)) for key in ("start", "end", "duration", "fps"))):
        raise BadRow("wrong field",
                     "start, end, duration are seconds, fps a number; subtitles are [{start, end, text}]")


# What an annotation may say: (fields, whether a value is fine, what it should be).
ANNOTATION_FIELDS = ((("prompt", "answer", "label", "style", "question"), is_text, "text"),
                     (("fps", "start_time", "end_time", "timestamp"), is_time, "a number from 0"),
                     (("options",),
                      lambda v: isinstance(v, list) and all(map(is_text, v)), "a list of texts"),
                     (("images",), lambda v: isinstance(v, list) and v and all(map(whole, v)),
                      "a list of picture numbers"))


def check_annotation(a, kind, n_media):
    if not isinstance(a, dict) or not is_text(a.get("task")) or a["task"] not in TASKS:
        raise BadRow("unknown task",
                     f"{a.get('task') if isinstance(a, dict) else a!r}; one of {', '.join(TASKS)}")
    about = TASKS[a["task"]][0]
    if about and about != kind or a["task"] == "text" and kind:
        raise BadRow("wrong field", f"task {a['task']} on a line with {kind or 'no media'}")
    for keys, fine, what in ANNOTATION_FIELDS:
        for key in keys:
            if key in a and not fine(a[key]):
                raise BadRow("wrong field", f"{key} is {a[key]!r}, not {what}")
    if "messages" in a:
        m = a["messages"]
        fine = isinstance(m, list) and m and len(m) % 2 == 0 and all(
            isinstance(x, dict) and isinstance(x.get("content"), str)
            and x.get("role") == ("user", "assistant")[i % 2]
            for i, x in enumerate(m))
        if not fine:
            raise BadRow("wrong field",
                         "messages must alternate user and assistant, with content, and end with an answer")
    elif "options" in a:
        if not (a.get("question") and isinstance(a.get("correct"), int)
                and 0 <= a["correct"] < len(a["options"]) > 1):
            raise BadRow("wrong field",
                         "options need a question, and correct: the place of the right one, from 0")
    elif "points" not in a and "answer" not in a:
        raise BadRow("wrong field", f"task {a['task']} without answer, points, options or messages")
    elif not (a.get("prompt") or a["task"] in PROMPTS or a.get("style") in PROMPTS):
        raise BadRow("wrong field", f"task {a['task']} without a prompt")
    for key in ("points", "input_points"):
        if key in a:
            check_points(a[key], kind, n_media)
    if "images" in a and not all(i < n_media for i in a["images"]):
        raise BadRow("wrong field", f"images {a['images']} of {n_media}")


def check_points(points, kind, n_media):
    if not isinstance(points, list) or kind is None:
        raise BadRow("wrong field", "points must be a list, on a line with a picture or a video")
    for p in points:
        if not isinstance(p, dict) or not whole(p.get("id")):
            raise BadRow("wrong field", f"point {p!r} needs a whole number id from 0")
        if not is_unit(p.get("x")) or not is_unit(p.get("y")):
            raise BadRow("point outside [0, 1]", f"x {p.get('x')!r}, y {p.get('y')!r}")
        if kind == "images" and not (whole(p.get("image")) and p["image"] < n_media):
            raise BadRow("wrong field", f"point names image {p.get('image')!r} of {n_media}")
        if kind == "video" and not is_time(p.get("t")):
            raise BadRow("wrong field", f"point at time {p.get('t')!r}")


def to_messages(a, kind, rng, point_format="spec"):
    """An annotation as a chat. What it does not word itself, prompt or answer, is written from its fields by
    its task, or by its "style": the finer kind of task, in the released models' names. To them alone a style
    is also told (see `styled`)."""
    style = a.get("style") if point_format == "released" else None
    if "messages" in a:
        return [dict(m, content=styled(m["content"], style)) if m["role"] == "user" else m
                for m in a["messages"]]
    if "options" in a:
        prompt, answer = multiple_choice(a["question"], a["options"], a["correct"], rng)
    else:
        prompt = a.get("prompt") or write_prompt(a, kind, rng, point_format)
        answer = a["answer"] if "answer" in a else write_points(a, kind, point_format)
    return [dict(role="user", content=styled(prompt, style)), dict(role="assistant", content=answer)]


def in_clip(a, row):
    """An annotation of a row whose times count from the start of its clip, as the model counts; points outside
    the clip are left out."""
    if "video" not in row or "start" not in row and "end" not in row:
        return a
    a, start, end = dict(a), row.get("start", 0), row.get("end", math.inf)
    for key in ("points", "input_points"):
        if key in a:
            a[key] = [dict(p, t=max(p["t"] - start, 0))
                      for p in a[key] if start - 0.01 <= p["t"] <= end + 0.01]
    for key in ("start_time", "end_time", "timestamp"):
        if key in a:
            a[key] = max(a[key] - start, 0)
    return a


# ---- plan: a row as tokens, before any pixel is decoded ----------------------------------------------------

@dataclass
class Plan:
    """One example: a trunk of media and some branches, and where its pixels will come from."""
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    pos: np.ndarray
    branch: np.ndarray
    media: list = field(default_factory=list)   # [(path, Layout)]
    ref: tuple = ()                             # (dataset, draw, part): enough to plan it again
    where: str = ""                             # file:line

    @property
    def n_tokens(self):
        return len(self.tokens)

    @property
    def n_crops(self):
        return sum(layout.n_crops for _, layout in self.media)


class Planner:
    """Turns rows into plans for one model and sequence length."""

    def __init__(self, tokenizer, model_cfg, seq_len, tiles=0, token_weights="spec", max_frames=0,
                 max_crops=10**9):
        self.tokenizer, self.cfg, self.seq_len = tokenizer, model_cfg, seq_len
        self.tiles = tiles  # high-resolution crops a picture may get; 0 = the low-resolution one alone
        self.max_frames = max_frames  # of a video; 0 = videos are not read
        self.max_crops = max_crops  # of a row
        self.token_weights = token_weights
        self.released = model_cfg.point_format == "released"
        if not self.released and any(name not in tokenizer.ids for name in WRITABLE):
            raise BadCheckpoint(f"{tokenizer.path}: no unused id below {tokenizer.vocab} for {' and '.join(WRITABLE)}; "
                                "--point_format released needs none")
        self.n = model_cfg.crop // model_cfg.patch

    def trunk(self, row, folder, room=None):
        """BOS and the media, as fine as `room` tokens allow: (ids, [(path, Layout)])."""
        tok, room = self.tokenizer, room or self.seq_len
        if "video" in row:
            return self.video_trunk(row, folder, room)
        names = row.get("images") or ([row["image"]] if "image" in row else [])
        paths, known = [inside_folder(folder, name) for name in names], "width" in row and len(names) == 1
        sizes = [(row["width"], row["height"])] if known else [image_size(path) for path in paths]
        tiles = self.tiles
        while True:
            ids, media = [tok.bos], []
            for i, (path, (w, h)) in enumerate(zip(paths, sizes)):
                layout = image_layout(w, h, self.n, self.cfg.patch, tiles)
                if len(paths) > 1:  # introduced by its index, by which points name it
                    ids += tok.encode(f"Image {i + self.released}")
                ids += [tok.ids[t] for t in layout.tokens]
                media.append((path, layout))
            if not tiles or len(ids) <= room and sum(layout.n_crops for _, layout in media) <= self.max_crops:
                return ids, media
            tiles //= 2  # coarser pictures rather than no pictures

    def video_trunk(self, row, folder, room):
        """BOS and the frames of a clip, each after its time in seconds; then the subtitles of moments that
        are shown.

            <timestamp> 0.5 <frame_start> <image>... <frame_end>        released:  " 0.5 " in plain text

        Two frames a second and the last one; of a longer clip as many evenly spread ones as fit.
        """
        if not self.max_frames:
            raise BadRow(NO_VIDEO, "--max_frames above 0 reads it")
        tok, path = self.tokenizer, inside_folder(folder, row["video"])
        length, start = row.get("duration") or video_duration(path), row.get("start", 0.0)
        end = min(row.get("end", length), length)
        if not start <= end:  # a clip of no length is one frame
            raise BadRow("wrong field", f"clip from {start} to {end} s of a video of {length:.2f} s")
        pool = frame_layout(self.n)
        around = "frame" if self.cfg.frame_tokens else "image"
        opening, closing = tok.ids[f"<{around}_start>"], tok.ids[f"<{around}_end>"]
        most = min(self.max_frames, self.max_crops)
        while True:
            times, ids = sample_times(end - start, most), [tok.bos]
            for i, t in enumerate(times):
                ids += tok.encode(" " * (i > 0) + f"{t:.1f} ") if self.released else \
                    [tok.ids["<timestamp>"]] + tok.encode(number(t, 2))
                ids += [opening] + [tok.ids["<image>"]] * len(pool) + [closing]
            lines = [s for s in row.get("subtitles", ())
                     if any(s["start"] - 1 <= t + start <= s["end"] + 1 for t in times)]
            if lines:
                ids += tok.encode("subtitle\n" + "".join(
                    f"{s['start'] - start:.1f} - {s['end'] - start:.1f} {s['text']}\n" for s in lines))
            if len(ids) <= room or len(times) == 1:
                break
            most = max(len(times) - max((len(ids) - room) // (len(pool) + 3), 1), 1)
        windows = np.concatenate([np.where(pool >= 0, pool + i * self.n ** 2, -1) for i in range(len(times))])
        return ids, [(path, Layout([], windows, len(times), times=tuple(float(t + start) for t in times)))]

    def branch(self, messages):
        """A chat as (ids, which of them are learned); every answer ends with a learned EOS."""
        ids, learn, ours = [], [], () if self.released else WRITABLE
        for text, learned in chat_pieces(messages):
            piece = self.tokenizer.encode(text, special=ours if learned else ours + CHAT)
            piece += [self.tokenizer.eos] if learned else []
            ids += piece
            learn += [learned] * len(piece)
        return ids, learn

    def plan(self, row, folder, rng):
        """A checked row -> ([plans], [reasons of annotations left out]).

        A tree too long for a row becomes several, each with the whole trunk and some of the branches; an
        annotation too long by itself is left out. Pixels are never cut.
        """
        kind = next((k for k in MEDIA if k in row), None)
        annotations = [in_clip(a, row) for a in row["annotations"]]
        branches = [(a["task"], *self.branch(to_messages(a, kind, rng, self.cfg.point_format)))
                    for a in annotations]
        # The media leave room for the longest annotation, and for all of them if that takes no more than an
        # eighth of the row.
        lengths = [len(ids) for _, ids, _ in branches]
        need = max(min(sum(lengths), self.seq_len // 8),
                   max([n for n in lengths if n <= self.seq_len * 7 // 8], default=0))
        trunk, media = self.trunk(row, folder, self.seq_len - need)
        groups, left_out, room = [], [], 0
        for task, ids, learn in branches:
            if len(trunk) + len(ids) - 1 > self.seq_len:
                left_out.append("annotation too long")
                continue
            if not groups or room < len(ids) - 1:
                groups.append([])
                room = self.seq_len - len(trunk)
            groups[-1].append((task, ids, learn))
            room -= len(ids) - 1
        return [self.assemble(trunk, media, g) for g in groups], left_out

    def assemble(self, trunk, media, branches):
        """Trunk and branches side by side, targets already shifted by one: the row can be cut anywhere
        afterwards."""
        n = len(trunk)
        tokens, targets, weights = [trunk], [trunk[1:] + branches[0][1][:1]], [[0.0] * n]
        pos, branch = [np.arange(n)], [np.zeros(n)]
        # The released models saw trees of text alone restart at 0: there the trunk, which is BOS, was not
        # counted.
        start = 0 if self.released and not media and len(branches) > 1 else n
        for b, (task, ids, learn) in enumerate(branches, 1):
            w = self.weight(task, sum(learn), len(branches))
            tokens.append(ids[:-1])
            targets.append(ids[1:])
            weights.append([w * l for l in learn[1:]])
            pos.append(start + np.arange(len(ids) - 1))  # every branch restarts where the trunk ends
            branch.append(np.full(len(ids) - 1, b))
        cat = lambda parts, dtype: np.concatenate([np.asarray(p, dtype) for p in parts])
        return Plan(cat(tokens, np.int64), cat(targets, np.int64), cat(weights, np.float32),
                    cat(pos, np.int64),
                    cat(branch, np.int64), media)

    def weight(self, task, n_learned, n_branches):
        """Loss weight of each answer token. "spec": by task. "released": long answers and full trees count
        less each."""
        if self.token_weights == "spec":
            return TASKS[task][1]
        if "pointing" in task or "tracking" in task:
            return 0.2
        if task == "video_caption":
            return 0.1
        # As published: the answer's length counts its EOS in a single chat, but not in a tree.
        n = max(n_learned - (n_branches > 1), 1)
        return 2 / math.sqrt(n) / math.sqrt(n_branches)

    def question(self, row, folder, messages):
        """A plan that ends where the model's answer begins. messages: [{role, content}], ending with the
        user's."""
        ids, _ = self.branch(messages)
        trunk, media = self.trunk(row, folder, self.seq_len - len(ids) - min(512, self.seq_len // 8))
        return self.assemble(trunk, media, [("text", ids + [self.tokenizer.eos], [False] * (len(ids) + 1))])


# ---- pack: plans into rows of T tokens ---------------------------------------------------------------------

class Packer:
    """Fills rows of `seq_len` tokens and `max_crops` crops from a buffer of waiting items (n_tokens,
    n_crops).

    Whenever the buffer is full one row leaves: the item that has waited longest, so that none starves, and
    those of the others that fill the rest best. A beam search finds them: of all ways to add one more item to
    the 64 best sets so far, the 64 fullest are kept, tokens and crops counting as shares of their limits.
    Nothing is ever cut.
    """

    def __init__(self, seq_len, max_crops, buffer=48):
        self.seq_len, self.max_crops, self.size = seq_len, max_crops, buffer
        self.waiting = []
        self.refused = 0

    def add(self, item):
        """Take an item in; returns the rows (lists of items) that leave: none or one. What fits no row is
        refused and counted."""
        if item.n_tokens > self.seq_len or item.n_crops > self.max_crops:
            self.refused += 1
            return []
        self.waiting.append(item)
        return [self.emit()] if len(self.waiting) >= self.size else []

    def flush(self):
        """The rows that are left at the end of a stream."""
        rows = []
        while self.waiting:
            rows.append(self.emit())
        return rows

    def emit(self, beam=64):
        first, others = self.waiting[0], self.waiting[1:]
        tokens, crops = (np.array([getattr(i, key) for i in others], np.int64)
                         for key in ("n_tokens", "n_crops"))
        share = tokens / self.seq_len + crops / max(self.max_crops, 1)
        # a set is built from its largest item down, so in one way only
        order = np.argsort(-share, kind="stable")
        tokens, crops, share = tokens[order], crops[order], share[order]
        room, free = np.array([self.seq_len - first.n_tokens]), np.array([self.max_crops - first.n_crops])
        last, full, added, best = np.array([-1]), np.zeros(1), [], (0.0, -1, -1)
        while True:  # level by level: sets of one more item. s: the set it extends, k: the item
            s, k = np.nonzero((tokens <= room[:, None]) & (crops <= free[:, None])
                              & (np.arange(len(order)) > last[:, None]))
            if not len(s):
                break
            fuller = full[s] + share[k]
            if len(s) > beam:
                top = np.argsort(fuller, kind="stable")[-beam:]  # a partition leaves ties to the processor
                s, k, fuller = s[top], k[top], fuller[top]
            added.append((s, k))
            if fuller.max() > best[0]:
                best = (fuller.max(), len(added) - 1, int(fuller.argmax()))
            room, free, last, full = room[s] - tokens[k], free[s] - crops[k], k, fuller
        chosen, (_, level, i) = set(), best
        while level >= 0:
            s, k = added[level]
            chosen.add(int(order[k[i]]))
            level, i = level - 1, int(s[i])
        self.waiting = [item for i, item in enumerate(others) if i not in chosen]
        return [first] + [others[i] for i in sorted(chosen)]


# ---- decode and collate ------------------------------------------------------------------------------------

def decode(plans, cfg, seq_len, load=load_crops):
    """One packed row with its pixels: (arrays of T, crops, pools, events). Events: [dataset, file:line,
    reason, detail].

    When a picture cannot be decoded its tokens stay, its pixels are zeros and its example is not trained on:
    the other examples of the row, and the order of the stream, are as they would have been.
    """
    row = {k: np.zeros(seq_len, np.int64) for k in ("tokens", "targets", "pos", "example", "branch")}
    row["weights"] = np.zeros(seq_len, np.float32)
    n, crops, pool, failed, start, offset = cfg.crop // cfg.patch, [], [], [], 0, 0
    for e, plan in enumerate(plans, 1):
        part = slice(start, start + plan.n_tokens)
        for k in ("tokens", "targets", "pos", "branch", "weights"):
            row[k][part] = getattr(plan, k)
        row["example"][part] = e
        start += plan.n_tokens
        for path, layout in plan.media:
            try:
                pixels = load(path, layout, n, cfg.patch)
            except (BadMedia, OSError, MemoryError) as error:
                failed.append([plan.ref[0] if plan.ref else "", plan.where, "failed to decode", str(error)])
                row["weights"][part] = 0
                pixels = np.zeros((layout.n_crops, n * n, cfg.patch ** 2 * 3), np.uint8)
            crops.append(pixels)
            pool.append(np.where(layout.pool >= 0, layout.pool + offset, -1))
            offset += pixels.shape[0] * pixels.shape[1]
    return row, crops, pool, failed


def collate(rows):
    """Decoded rows -> one batch: (B, T) ids and weights, crops (N, P, ·) uint8, pool (M, K); None without
    pictures."""
    batch = {k: torch.from_numpy(np.stack([row[k] for row, *_ in rows])) for k in rows[0][0]}
    crops, pools, offset = [], [], 0
    for _, row_crops, row_pool, *_ in rows:
        pools += [np.where(p >= 0, p + offset, -1) for p in row_pool]
        offset += sum(c.shape[0] * c.shape[1] for c in row_crops)
        crops += row_crops
    if crops:
        k = max(p.shape[1] for p in pools)  # pictures pool 4 patches, video frames 9: fill up with "none"
        batch["pool"] = torch.from_numpy(np.concatenate(
            [np.pad(p, ((0, 0), (0, k - p.shape[1])), constant_values=-1) for p in pools]))
        batch["crops"] = torch.from_numpy(np.concatenate(crops))
    else:
        batch["crops"] = batch["pool"] = None
    return batch


def to_device(batch, device):
    """The batch on a device; crops and pool of a batch without pictures stay None."""
    return {k: v if v is None else v.to(device, non_blocking=True) for k, v in batch.items()}


def prompt_batch(plans, cfg):
    """Questions as one batch for `Molmo2.generate`, one per row, padded on the right."""
    longest = max(p.n_tokens for p in plans)
    rows = [decode([p], cfg, longest) for p in plans]
    batch, failed = collate(rows), [f for *_, failed in rows for f in failed]
    return {k: batch[k] for k in ("tokens", "crops", "pool", "pos", "example", "branch")}, failed


def answer(model, planner, plans, max_new_tokens):
    """Greedy answers to a batch of questions: (texts, events of media that failed to decode)."""
    batch, failed = prompt_batch(plans, planner.cfg)
    tok, batch = planner.tokenizer, to_device(batch, model.lm_head.weight.device)
    ids = torch.stack(list(model.generate(**batch, max_new_tokens=max_new_tokens, stop=(tok.eos,))), 1).tolist()
    return [tok.decode(row[:row.index(tok.eos)] if tok.eos in row else row) for row in ids], failed


def answers(model, planner, asked, limit, batch=32, world=None):
    """Greedy answers to [(task, file:line, row, folder, prompt)], in order; limit(task): tokens. Questions of a task go
    together, as their answers end at about the same time; the ranks of a `world` share them. Media that cannot be
    decoded are an error."""
    order, texts = sorted(range(len(asked)), key=lambda i: asked[i][0]), [None] * len(asked)
    parts = [group[k:k + batch] for _, g in itertools.groupby(order, key=lambda i: asked[i][0])
             for group in [list(g)] for k in range(0, len(group), batch)]
    for part in parts[world.rank::world.size] if world else parts:
        plans = [planner.question(row, folder, [dict(role="user", content=prompt)])
                 for _, _, row, folder, prompt in (asked[i] for i in part)]
        for plan, i in zip(plans, part):
            plan.where = asked[i][1]
        room = planner.seq_len - max(p.n_tokens for p in plans)
        said, failed = answer(model, planner, plans, min(limit(asked[part[0]][0]), room))
        if failed:
            raise BadMedia(f"{failed[0][1]}: {failed[0][3]}")
        for i, text in zip(part, said):
            texts[i] = text
    return [next(t for t in of if t is not None) for of in zip(*world.gather(texts))] if world else texts


# ---- datasets and mixtures ---------------------------------------------------------------------------------

def line_index(path):
    """Where the lines of a file start that are not blank, and their numbers: (2 + n, 2) int64, memory-mapped.
    The first two rows are (size, time of change) of the file and (hash of its contents, n).

    Built once and kept beside the file as .NAME.index.npy, so that ten million lines cost no time and no
    memory at start.
    """
    stat, (folder, name) = os.stat(path), os.path.split(os.path.abspath(path))
    kept, key = os.path.join(folder, f".{name}.index.npy"), (stat.st_size, stat.st_mtime_ns)
    try:
        table = np.load(kept, mmap_mode="r", allow_pickle=False)
        if table.dtype == np.int64 and table.ndim == 2 and table.shape[1] == 2 and tuple(table[0]) == key:
            return table
    except (OSError, ValueError, EOFError):
        pass  # none yet, or not one
    digest, ends, at = hashlib.blake2b(digest_size=8), [], 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + at)
            at += len(chunk)
    ends = np.concatenate(ends + [np.empty(0, np.int64)])
    starts, stops = np.append(0, ends + 1), np.append(ends, at)
    lone = np.flatnonzero(stops - starts == 1)  # one byte: the first half of a Windows line end?
    blank = stops <= starts
    if len(lone):
        blank[lone] = np.memmap(path, np.uint8, "r")[starts[lone]] == 13
    rows = np.stack([starts, np.arange(1, len(starts) + 1)], 1)[~blank]
    head = [key, (int.from_bytes(digest.digest(), "little", signed=True), len(rows))]
    table = np.concatenate([np.array(head, np.int64), rows])
    try:
        with open(f"{kept}.{os.getpid()}", "wb") as f:
            np.save(f, table)
        os.replace(f"{kept}.{os.getpid()}", kept)
    except OSError:
        pass  # a folder one may not write to: built again next time
    return table


class Dataset:
    """The lines of some JSONL files. name: what the mixture calls it; entry: its line of the registry, if it
    has one."""

    def __init__(self, name, files, entry=None):
        self.name, self.files, self.entry, self.open = name, files, entry or {}, {}
        self.factor = 1.0  # of this run's own rebalancing
        heads = [line_index(path)[1].tolist() for path in files]
        self.ends = np.cumsum([n for _, n in heads])
        self.contents = hashlib.blake2b(repr(heads).encode(), digest_size=8).hexdigest()

    def __len__(self):
        return int(self.ends[-1])

    def line(self, i):
        """The i-th row: (bytes, folder its media are under, "file:line")."""
        shard = int(np.searchsorted(self.ends, i, side="right"))
        path, key = self.files[shard], (os.getpid(), shard)  # a forked worker must not share a file position
        if key not in self.open:
            if len(self.open) >= 64:  # of thousands of shards, no more files than a process may open
                self.open.clear()
            self.open[key] = line_index(path), open(path, "rb")
        index, f = self.open[key]
        start, number = index[2 + i - (int(self.ends[shard - 1]) if shard else 0)].tolist()
        f.seek(start)
        return f.readline(MAX_LINE), os.path.dirname(os.path.abspath(path)), f"{path}:{number}"

    def task(self):
        """What it is about: as the registry says, else its first annotation's task."""
        try:
            return self.entry.get("task") or parse_row(self.line(0)[0])["annotations"][0]["task"]
        except BadRow:
            return "image_qa"

    def weight(self):
        """sqrt(rows), at most those of its cap, times its multiplier: large sets get more draws, but not in
        proportion."""
        rows = min(len(self), int(self.entry.get("size_cap") or len(self)))
        return self.factor * float(self.entry.get("multiplier") or 1) * math.sqrt(rows)


def shuffled(i, n, key):
    """Where the i-th of n lands in a pseudo-random order: a bijection that needs no memory, whatever n.

    A Feistel network permutes the next power of four above n; what falls outside is permuted again.
    """
    half = max((n - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        a, b = i >> half, i & mask
        for r in range(4):
            digest = hashlib.blake2b(f"{key} {r} {b}".encode(), digest_size=8).digest()
            a, b = b, a ^ (int.from_bytes(digest, "little") & mask)
        i = a << half | b
        if i < n:
            return i


def read_registry():
    """{name: its line} of datasets.tsv."""
    with open(REGISTRY, newline="", encoding="utf-8") as f:
        return {entry["name"]: entry for entry in csv.DictReader(f, delimiter="\t")}


def find_datasets(paths, stage=None):
    """JSONL files, or folders of them -> ([Dataset], names of the registry's sets that are not there).

    In a folder NAME.jsonl or NAME/*.jsonl is the registry's set NAME, taken if it is of this stage; any other
    *.jsonl is a set of its own.
    """
    registry, found = read_registry(), []
    for path in paths:
        before = len(found)
        if os.path.isdir(path):
            files = set(glob.glob(os.path.join(path, "*.jsonl")))
            for name, entry in registry.items():
                mine = sorted(f for pattern in (name + ".jsonl", os.path.join(name, "*.jsonl"))
                              for f in glob.glob(os.path.join(path, pattern)))
                files -= set(mine)
                if mine and (stage is None or stage in entry["stage"].split(",")):
                    found.append((name, mine, entry))
        else:
            files = {path} if os.path.isfile(path) else set()
        found += [(os.path.basename(f).removesuffix(".jsonl"), [f], None) for f in sorted(files)]
        if len(found) == before:
            raise FileNotFoundError(f"--data {path}: no such JSONL file, or no *.jsonl of this stage in it")
    names = [name for name, *_ in found]
    datasets = [Dataset(name if names.count(name) == 1 else files[0], files, entry)
                for name, files, entry in found]
    for d in datasets:
        if not len(d):
            raise ValueError(f"--data {d.files[0]}: not a single line in it")
    missing = [name for name, entry in registry.items() if name not in names
               and (stage is None or stage in entry["stage"].split(","))]
    return datasets, missing if any(entry for *_, entry in found) else []


# Groups of datasets and their shares of the draws; inside a group sets share by `Dataset.weight`. pretrain:
# the report's stage 1. sft: one group. released: the published recipe's groups (its numbers add up to 1.1).
MIXTURES = {
    "pretrain": {"captions": 0.6, "pointing": 0.3, "text": 0.1},
    "sft": {"all": 1.0},
    "released": {"demo": 0.15, "video_academic": 0.20, "image_academic": 0.25, "tracking": 0.15,
                 "video_pointing": 0.15, "image_pointing": 0.10, "nlp": 0.0995, "hardcodes": 0.0005},
    "equal": {"all": 1.0}}


def group_of(dataset, mixture):
    """Which group of a mixture a dataset belongs to."""
    task = dataset.task()
    pointing = task == "counting" or "pointing" in task or task == "video_tracking"
    if mixture == "pretrain":
        return "text" if task == "text" else "pointing" if pointing else "captions"
    if mixture == "released":
        return dataset.entry.get("sft_group") or {"text": "nlp", "video_tracking": "tracking",
                                                  "video_pointing": "video_pointing"
                                                  }.get(task, "image_pointing" if pointing else "demo")
    return "all"


def mix(datasets, mixture):
    """[(Dataset, rate)], rates adding up to 1. Groups of which nothing is there leave their share to the
    others."""
    groups = [group_of(d, mixture) for d in datasets]
    weights = [1.0 if mixture == "equal" else d.weight() for d in datasets]
    inside = {g: sum(w for w, other in zip(weights, groups) if other == g) for g in groups}
    total = sum(MIXTURES[mixture][g] for g in inside)
    return [(d, MIXTURES[mixture][g] / total * w / inside[g]) for d, w, g in zip(datasets, weights, groups)]


def show_mixture(mixture, draws, missing=()):
    """Print the table of a mixture. draws: rows that will be drawn in the whole run."""
    width = max(len(d.name) for d, _ in mixture) + 2
    print(f"{'dataset':{width}}{'rows':>11}{'weight':>10}{'rate':>9}{'epochs':>10}")
    for d, rate in sorted(mixture, key=lambda m: -m[1]):
        print(f"{d.name:{width}}{len(d):11,}{d.weight():10.1f}{rate:9.2%}{draws * rate / len(d):10.2f}")
    if missing:
        print(f"not there, and left out: {', '.join(missing)}")


# ---- the stream --------------------------------------------------------------------------------------------

# Raise it with every change after which the same files and settings give other draws, plans or sequences: a run that
# was started before is then refused at --resume, and does not go on with other data.
ORDER = 1


class Stream:
    """The one global sequence of packed rows: draws, plans and packs. `rows(state)` yields (plans, state
    after them).

    mixture: [(Dataset, rate)]. The state is JSON; `rows(state)` continues right after the row it came with.
    allow_closed: whether rows whose provenance names a closed model are used (annotate.py marks them).
    """

    def __init__(self, mixture, planner, seed, allow_closed=False):
        total = sum(rate for _, rate in mixture)
        self.sets = {d.name: d for d, _ in mixture}
        assert len(self.sets) == len(mixture), f"two datasets of one name: {[d.name for d, _ in mixture]}"
        self.rates = {d.name: rate / total for d, rate in mixture}
        self.names, self.edges = list(self.sets), np.cumsum(list(self.rates.values()))
        self.planner, self.seed, self.allow_closed = planner, seed, allow_closed

    def fingerprint(self):
        """Everything the order depends on, for the check at resume."""
        p = self.planner
        return {"version of the order": ORDER} | dict(
            seed=self.seed, seq_len=p.seq_len, tiles=p.tiles, max_frames=p.max_frames, max_crops=p.max_crops,
            point_format=p.cfg.point_format, token_weights=p.token_weights) | {
            f"dataset {name}": f"{len(d)} rows at {self.rates[name]:.6%}, contents {d.contents}"
            for name, d in self.sets.items()}

    def draw(self, number):
        """Which dataset the number-th draw takes: one random number, seeded by the draw."""
        u = random.Random(f"{self.seed} draw {number}").random()
        return self.names[min(int(np.searchsorted(self.edges, u, side="right")), len(self.names) - 1)]

    def plans(self, name, k):
        """The k-th draw from dataset `name`: ([plans], [annotations left out]), or BadRow, whose detail
        starts with file:line."""
        d = self.sets[name]
        epoch, i = divmod(k, len(d))
        i = shuffled(i, len(d), f"{self.seed} {name} {epoch}")
        line, folder, where = d.line(i)
        try:
            row = parse_row(line)
            if not self.allow_closed and any(p.get("closed") for p in row.get("provenance", ())):
                raise BadRow(CLOSED, "--allow_closed trains on it")
            plans, left_out = self.planner.plan(row, folder, random.Random(f"{self.seed} {name} {i} {epoch}"))
        except BadMedia as e:
            raise BadRow("unreadable media", f"{where}: {e}") from None
        except BadRow as e:
            raise BadRow(e.reason, f"{where}: {e.detail}") from None
        for part, p in enumerate(plans):
            p.ref, p.where = (name, k, part), where
        fits = [p for p in plans if p.n_crops <= self.planner.max_crops]
        return fits, left_out + ["too many crops for a row"] * (len(plans) - len(fits))

    def start(self):
        return dict(draw=0, part=0, taken={n: 0 for n in self.names}, waiting=[], seen=0, empty=0, rows=0,
                    bad={}, skipped={})

    def rows(self, state=None):
        s, events = json.loads(json.dumps(state or self.start())), []
        packer = Packer(self.planner.seq_len, self.planner.max_crops)
        for name, k, part in s["waiting"]:
            packer.waiting += [p for p in self.plans(name, k)[0] if p.ref[2] == part]
        while True:
            name = self.draw(s["draw"])
            plans = self.take(name, s, events)
            for part in range(s["part"], len(plans)):
                for row in packer.add(plans[part]):
                    s.update(waiting=[p.ref for p in packer.waiting], rows=s["rows"] + 1, part=part + 1)
                    yield row, json.loads(json.dumps(dict(s, events=events, row=[p.where for p in row])))
                    events.clear()
            s.update(draw=s["draw"] + 1, part=0)
            s["taken"][name] += 1

    def take(self, name, s, events):
        """Plans of the current draw; a bad row is counted and gives none. What a resumed run repeats (`part`)
        counts once."""
        first = s["part"] == 0
        def count(kind, reason):
            mine = s[kind].setdefault(name, {})
            mine[reason] = mine.get(reason, 0) + 1

        s["seen"] += first
        try:
            plans, left_out = self.plans(name, s["taken"][name])
            why = ", ".join(left_out)
        except BadRow as e:
            plans, left_out, why = [], [], e
            count("skipped" if e.reason in NOT_BAD else "bad", e.reason)
            where, _, detail = e.detail.partition(": ")
            events.append([name, where, e.reason, detail])
        for reason in left_out * first:
            count("skipped", reason)
        s["empty"] += not plans
        if s["empty"] == s["seen"] >= 200:
            raise ValueError(f"none of the first {s['seen']} rows can be used, e.g. {why}")
        return plans

    def rows_per_draw(self, sample=64):
        """How many packed rows a draw fills, judged by the first ones: for what a run will see of each
        dataset."""
        s, tokens, crops = self.start(), 0, 0
        for number in range(sample):
            name = self.draw(number)
            plans = self.take(name, s, [])
            s["taken"][name] += 1
            tokens, crops = tokens + sum(p.n_tokens for p in plans), crops + sum(p.n_crops for p in plans)
        return max(tokens / self.planner.seq_len, crops / self.planner.max_crops, 1e-3) / sample


def die_with_parent():
    """Ask Linux to end this worker when its training process ends, however that ends: a worker that waits for a lock
    the dead process held would stay for ever."""
    with contextlib.suppress(OSError, AttributeError):  # elsewhere the loader's own watchdog has to do
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def obey_the_parent_alone():
    """Ctrl-C, torchrun and job queues signal all processes of a run, but the training process wants to finish its
    step and needs this worker for it: only a signal that it sends itself ends the worker."""
    signals = {signal.SIGINT, signal.SIGTERM}

    def listen():
        while signal.sigwaitinfo(signals).si_pid != parent:
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # not on a Mac
        parent = os.getppid()
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=listen, daemon=True).start()


class Batches(torch.utils.data.IterableDataset):
    """Decoded rows for a DataLoader (batch_size=None): this rank's share, in order, each as (row, crops,
    pools), the stream's state after it, and the events on the way: what could not be used.

    Every worker walks the whole stream of plans, which is cheap, and decodes every W-th row of its rank's.
    """

    def __init__(self, stream, state=None, rank=0, world=1, step=None, keep=0):
        self.load = Kept(keep) if keep else load_crops
        self.stream, self.state, self.rank, self.world, self.step = stream, state, rank, world, step or world

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if info:
            torch.set_num_threads(1)
            os.nice(10)  # where cores are few, training goes first
            die_with_parent()
            obey_the_parent_alone()
        events, mine = [], itertools.count()
        for i, (plans, state) in enumerate(self.stream.rows(self.state)):
            events += state.pop("events")
            if i % self.step % self.world == self.rank and next(mine) % workers == worker:
                *row, failed = decode(plans, self.stream.planner.cfg, self.stream.planner.seq_len, self.load)
                yield tuple(row), state, events + failed
                events = []


class BadRows:
    """What could not be used: counted by dataset and reason, and listed once each in `log`, bad_rows.jsonl."""

    def __init__(self, log, failed):
        self.log, self.last = log, []
        self.listed = {(r["where"], r["reason"]) for r in map(json.loads, log.kept)}
        self.failed = failed  # {dataset: {reason: n}} of what was planned and then could not be decoded

    def note(self, step, events):
        for name, where, reason, detail in events:
            if reason == "failed to decode":
                mine = self.failed.setdefault(name, {})
                mine[reason] = mine.get(reason, 0) + 1
            if (where, reason) not in self.listed:
                self.listed.add((where, reason))
                self.log.write(step=step, dataset=name, where=where, reason=reason, detail=detail)
                self.last = [*self.last[-4:], f"  {where}: {reason}: {detail}"]

    def counts(self, state):
        """{dataset: {reason: n}}"""
        return {name: state["bad"].get(name, {}) | self.failed.get(name, {})
                for name in state["bad"] | self.failed}

    def too_many(self, state, max_bad):
        """Why to stop: more than `max_bad` of what was seen could not be used. Rows without a reader yet are not bad
        ones."""
        counts = self.counts(state)
        bad, seen = sum(n for c in counts.values() for n in c.values()), max(state["seen"], 100)
        return bad > max_bad * seen and "\n".join([
            f"{bad} of {seen} rows cannot be used, more than --max_bad {max_bad}: {counts}", *self.last,
            f"{self.log.path} lists them all"])


# ---- a page to look at -------------------------------------------------------------------------------------

def picture_tag(image, title=""):
    """An <img> that carries its picture, so that the page is one file. image: PIL, or (H, W) or (H, W, 3)
    uint8."""
    image, file = image if isinstance(image, Image.Image) else Image.fromarray(image), io.BytesIO()
    scale = max(1, 192 // max(image.size))
    kind = "png" if image.mode == "L" else "jpeg"
    image.resize((image.width * scale, image.height * scale), Image.NEAREST).save(file, kind)
    data = base64.b64encode(file.getvalue()).decode()
    return (f'<figure><img src="data:image/{kind};base64,{data}"><figcaption>{html.escape(title)}</figcaption>'
            "</figure>")


def draw_crop(patches, n, patch, window, points=()):
    """A crop as the model gets it, with the grid of what is pooled into one token, and points: [(annotation,
    point)]."""
    pixels = patches.reshape(n, n, patch, patch, 3).transpose(0, 2, 1, 3, 4).reshape(n * patch, n * patch, 3)
    scale = max(1, 378 // (n * patch))
    image = Image.fromarray(pixels).resize((n * patch * scale,) * 2, Image.NEAREST)
    pen, side = ImageDraw.Draw(image, "RGBA"), n * patch * scale
    for at in range(0, side, window * patch * scale):
        pen.line([at, 0, at, side], (255, 255, 255, 90))
        pen.line([0, at, side, at], (255, 255, 255, 90))
    for a, p in points:
        x, y, colour = p["x"] * side, p["y"] * side, f"hsl({a * 67 % 360}, 90%, 50%)"
        pen.ellipse([x - 6, y - 6, x + 6, y + 6], None, colour, 3)
        pen.text((x + 7, y - 6), str(p["id"]), colour, stroke_width=1, stroke_fill="black")
    return image


def media_html(plan, row, cfg):
    """The crops of a plan, the points of its row on them."""
    n, out = cfg.crop // cfg.patch, []
    marked = [(a, p) for a, annotation in enumerate(row["annotations"]) for p in annotation.get("points", ())]
    for k, (path, layout) in enumerate(plan.media):
        crops = load_crops(path, layout, n, cfg.patch)
        name = html.escape(os.path.basename(path))
        out.append(f"<p>{name}: {len(crops)} crops, {len(layout.pool)} visual tokens</p>")
        if layout.times:
            nearest = lambda p: min(range(len(layout.times)), key=lambda i: abs(layout.times[i] - p["t"]))
            frames = [(t, draw_crop(c, n, cfg.patch, 3, [(a, p) for a, p in marked if nearest(p) == i]))
                      for i, (t, c) in enumerate(zip(layout.times, crops))]
            out += [picture_tag(image.resize((189, 189)), f"{t:.2f} s") for t, image in frames]
        else:
            mine = [(a, p) for a, p in marked if p.get("image", 0) == k]
            out.append(picture_tag(draw_crop(crops[0], n, cfg.patch, 2, mine), "the whole, low resolution"))
            rows, cols = layout.tiling
            for i in range(rows):
                tiles = [picture_tag(draw_crop(crops[1 + i * cols + j], n, cfg.patch, 2).resize((189, 189)))
                         for j in range(cols)]
                out.append("<br>" * (i == 0) + "".join(tiles) + "<br>")
    return "".join(out)


def tokens_html(plan, tokenizer):
    """The tokens of a plan: a colour per branch, what is learned underlined, the more the heavier its
    weight."""
    names, out = {i: name for name, i in tokenizer.ids.items()}, []
    image, column = tokenizer.ids["<image>"], tokenizer.ids["<image_col>"]
    for b in range(int(plan.branch.max()) + 1):
        mine = plan.branch == b  # a branch's last token is never read, only predicted
        ids, learned = plan.tokens[mine].tolist(), [0.0, *plan.weights[mine].tolist()]
        ids += [int(plan.targets[mine][-1])] if b else []
        spans, run = [], []
        for i, (token, w) in enumerate(zip(ids, learned)):
            if token in (image, column):  # a picture's tokens are told by their number
                run.append(token)
                if ids[i + 1:i + 2] in ([image], [column]):
                    continue
                text = f"<image> \u00d7{run.count(image)}" + f" in {run.count(column)} rows" * (column in run)
                run = []
            else:
                text = names.get(token) or tokenizer.decode([token])
            style = f"border-bottom: {min(2 * w, 5):.1f}px solid #c00"
            spans.append(f'<span title="{token}, weight {w:.3g}" style="{style}">'
                         + html.escape(text).replace("\n", "\u23ce") + "</span>")
        colour = f"hsl({(b - 1) * 67 % 360}, 70%, 90%)" if b else "#eee"
        out.append(f'<p class="tokens" style="background:{colour}">{"".join(spans)}</p>')
    return "".join(out)


def mask_picture(plans, vocab):
    """The attention mask of a packed row, white where a query (row) sees a key (column)."""
    from model import is_vision, may_attend
    example = torch.cat([torch.full((p.n_tokens,), e) for e, p in enumerate(plans, 1)])
    branch, tokens = (torch.from_numpy(np.concatenate([getattr(p, key) for p in plans]))
                      for key in ("branch", "tokens"))
    at = torch.arange(len(tokens))
    mask = may_attend(at[:, None], at[None], example, branch, is_vision(tokens, vocab))
    image = Image.fromarray((mask.numpy() * 255).astype(np.uint8))
    return image.resize((min(len(tokens), 900),) * 2, Image.BOX)


STYLE = """<meta charset="utf-8"><style>body {font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 1250px}
figure {display: inline-block; margin: 2px; font-size: 11px; text-align: center}
.tokens {font: 13px/1.9 monospace; padding: 4px 8px; white-space: pre-wrap; overflow-wrap: anywhere; margin: 2px 0}
.bad {color: #c00} td {padding: 0 1em 0 0}</style>"""


def write_page(datasets, planner, n, out):
    """The first n lines of each dataset as the model will see them, one packed row's mask and the packing's
    statistics."""
    page, shown = [STYLE, f"<h1>{html.escape(', '.join(d.name for d in datasets))}</h1>"], []
    page.append("<p>Grey: the trunk, which every branch sees. A colour per branch. Underlined in red: learned, "
                "the thicker the heavier. Lines over a picture: what is pooled into one token.</p>")
    for d in datasets:
        for i in range(min(n, len(d))):
            line, folder, where = d.line(i)
            page.append(f"<h2>{html.escape(where)}</h2>")
            try:
                row = parse_row(line)
                plans, left_out = planner.plan(row, folder, random.Random(i))
                page += [media_html(plans[0], row, planner.cfg)] if plans else []
            except (BadRow, BadMedia) as e:
                page.append(f'<p class="bad">{html.escape(str(e))}</p>')
                continue
            page += [f'<p class="bad">left out: {html.escape(reason)}</p>' for reason in left_out]
            for p in plans:
                page.append(f"<p>{p.n_tokens} tokens, {p.n_crops} crops, {int((p.weights > 0).sum())} learned</p>")
                page.append(tokens_html(p, planner.tokenizer))
            shown += plans
    packer = Packer(planner.seq_len, planner.max_crops)
    rows = [row for p in shown for row in packer.add(p)] + packer.flush()
    total = lambda key: sum(getattr(p, key) for p in shown) / max(len(rows), 1)
    if rows:
        row, learned = max(rows, key=len), sum(int((p.weights > 0).sum()) for p in shown)
        page.append(f"<h2>Packed</h2><table><tr><td>{len(shown)} examples in {len(rows)} rows"
                    f"<td>tokens {total('n_tokens'):.0f} of {planner.seq_len} a row"
                    f"<td>crops {total('n_crops'):.1f} of {planner.max_crops}<td>{learned} tokens learned</table>"
                    f"<p>The mask of the row that holds {len(row)} examples, white where a token (down) sees "
                    "another (across):</p>" + picture_tag(mask_picture(row, planner.cfg.vocab)))
    with open(out, "w", encoding="utf-8") as f:
        f.write("\n".join(page))


def main():
    from model import PRESETS
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("data", nargs="+", help="JSONL files, or folders of them")
    parser.add_argument("--show", type=int, default=0, metavar="N",
                        help="write a page with the first N lines of each file")
    parser.add_argument("--out", default="data.html", help="where the page goes [data.html]")
    parser.add_argument("--config", default="small", choices=list(PRESETS),
                        help="whose crops and patches [small]")
    parser.add_argument("--tokenizer", default=SMALL_TOKENIZER,
                        help="tokenizer.json of that model [the small one]")
    parser.add_argument("--seq_len", type=int, default=4096, help="tokens per packed row [4096]")
    parser.add_argument("--max_crops", type=int, default=128, help="crops per packed row [128]")
    parser.add_argument("--max_frames", type=int, default=128,
                        help="frames a video may get, at 2 per second [128]")
    parser.add_argument("--tiles", type=int,
                        help="high-resolution crops a picture may get [8; none for small]")
    args = parser.parse_args()
    cfg = PRESETS[args.config]
    try:
        planner = Planner(Tokenizer(args.tokenizer, cfg.vocab), cfg, args.seq_len, max_frames=args.max_frames,
                          max_crops=args.max_crops,
                          tiles=args.tiles if args.tiles is not None else 0 if args.config == "small" else 8)
        datasets, missing = find_datasets(args.data)
    except (OSError, ValueError, BadCheckpoint) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    for d in datasets:
        stream, reasons, examples, left_out = Stream([(d, 1.0)], planner, 0), {}, 0, {}
        for k in range(len(d)):
            try:
                plans, left = stream.plans(d.name, k)
                examples += len(plans)
                left_out |= {reason: left_out.get(reason, 0) + 1 for reason in left}
            except BadRow as e:
                reasons[e.reason] = reasons.get(e.reason, 0) + 1
                if reasons[e.reason] <= 5:
                    print(e)
        print(f"{d.name}: {len(d)} rows, {examples} examples, rows not used: {reasons or 'none'}, "
              f"annotations left out: {left_out or 'none'}")
    if args.show:
        write_page(datasets, planner, args.show, args.out)
        print(f"{args.out} shows the first {args.show} lines of each")


if __name__ == "__main__":
    main()
