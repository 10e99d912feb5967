"""
Data: JSONL lines in, packed batches out.

    mixture ─► draw (dataset, row) ─► plan ─► pack ─► decode ─► collate ─► batch ─► Molmo2
               integers only          │       │       │         crops of all rows side by side
                                      │       │       pixels, in the DataLoader's workers
                                      │       plans that fill a row of T tokens; lengths are all it looks at
                                      tokens, targets, weights, branches, and which crops will be needed: headers only

One line is one picture, set of pictures, video or text with all its annotations: a message tree. The media are the trunk,
each annotation is a branch that sees the trunk and itself, so five questions about a picture cost one picture.

Everything up to the pixels is a function of (files, mixture, seed): the stream is the same for any number of workers and
ranks, and where it stands is a small JSON that travels with each row.

    python data.py data/my.jsonl          # check every line, and print what the rows become

Shapes:  B rows, T tokens, N crops, P patches per crop, M visual tokens, K patches pooled into one
"""
import argparse
import glob
import hashlib
import json
import math
import os
import random
import sys
from dataclasses import dataclass, field

import numpy as np
import torch

from media import BadMedia, Layout, frame_layout, image_layout, image_size, inside_folder, load_crops, sample_times, video_duration
from points import (CHAT, PROMPTS, SMALL_TOKENIZER, WRITABLE, Tokenizer, chat_pieces, is_unit, multiple_choice, number, styled,
                    write_points, write_prompt)
from points import format_points, parse_points  # noqa: F401  public under this name too
from weights import BadCheckpoint

# task -> (media it is about, weight of an answer token). None: any media, or none.
TASKS = {"image_caption": ("image", 1.0), "image_qa": ("image", 1.0), "image_pointing": ("image", 2.0),
         "counting": (None, 1.5), "multi_image_qa": ("images", 1.0), "multi_image_pointing": ("images", 2.0),
         "video_caption": ("video", 1.0), "video_qa": ("video", 1.0), "video_pointing": ("video", 2.0),
         "video_tracking": ("video", 2.0), "text": (None, 1.0)}
MEDIA = ("image", "images", "video")  # what a line may be about, and the kinds of points `format_points` knows


class BadRow(Exception):
    """A line that cannot be used. `reason` is what it is counted under."""

    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


# ---- rows: one JSONL line, checked ----------------------------------------------------------------------------------

def parse_row(line):
    """Bytes of one line -> the row as a dict; BadRow says what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
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
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names) or kind == "images" and not names:
        raise BadRow("wrong field", f"{kind} is {row[kind]!r}")
    check_size(row)
    if kind == "video":
        check_clip(row)
    if not isinstance(row.get("annotations"), list) or not row["annotations"]:
        raise BadRow("wrong field", "annotations must be a list with something in it")
    for a in row["annotations"]:
        check_annotation(a, kind, len(names))
    return row


def is_time(value):
    """Whether a JSON value is a number of seconds from 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9


def check_size(row):
    """width and height save reading a picture's header; one without the other is a slip."""
    size = row.get("width"), row.get("height")
    given = [n for n, key in zip(size, ("width", "height")) if key in row]
    if len(given) == 1 or not all(isinstance(n, int) and n > 0 for n in given):
        raise BadRow("wrong field", f"width and height are pixels, both or neither: {size[0]!r}, {size[1]!r}")


def check_clip(row):
    lines = row.get("subtitles", [])
    fine = isinstance(lines, list) and all(isinstance(s, dict) and is_time(s.get("start")) and is_time(s.get("end"))
                                           and isinstance(s.get("text"), str) for s in lines)
    if not (fine and is_time(row.get("start", 0)) and is_time(row.get("end", 0))):
        raise BadRow("wrong field", "start and end are seconds; subtitles are [{start, end, text}]")


whole = lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**31
is_text = lambda v: isinstance(v, str)
# What an annotation may say: (fields, whether a value is fine, what it should be).
ANNOTATION_FIELDS = ((("prompt", "answer", "label", "style", "question"), is_text, "text"),
                     (("fps", "start_time", "end_time", "timestamp"), is_time, "a number from 0"),
                     (("options",), lambda v: isinstance(v, list) and all(map(is_text, v)), "a list of texts"),
                     (("images",), lambda v: isinstance(v, list) and v and all(map(whole, v)), "a list of picture numbers"))


def check_annotation(a, kind, n_media):
    if not isinstance(a, dict) or a.get("task") not in TASKS:
        raise BadRow("unknown task", f"{a.get('task') if isinstance(a, dict) else a!r}; one of {', '.join(TASKS)}")
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
            isinstance(x, dict) and isinstance(x.get("content"), str) and x.get("role") == ("user", "assistant")[i % 2]
            for i, x in enumerate(m))
        if not fine:
            raise BadRow("wrong field", "messages must alternate user and assistant, with content, and end with an answer")
    elif "options" in a:
        if not (a.get("question") and isinstance(a.get("correct"), int) and 0 <= a["correct"] < len(a["options"]) > 1):
            raise BadRow("wrong field", "options need a question, and correct: the place of the right one, from 0")
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
    """An annotation as a chat. What it does not word itself, prompt or answer, is written from its fields by its task, or by
    its "style": the finer kind of task, in the released models' names. To them alone a style is also told (see `styled`)."""
    style = a.get("style") if point_format == "released" else None
    if "messages" in a:
        return [dict(m, content=styled(m["content"], style)) if m["role"] == "user" else m for m in a["messages"]]
    if "options" in a:
        prompt, answer = multiple_choice(a["question"], a["options"], a["correct"], rng)
    else:
        prompt = a.get("prompt") or write_prompt(a, kind, rng, point_format)
        answer = a["answer"] if "answer" in a else write_points(a, kind, point_format)
    return [dict(role="user", content=styled(prompt, style)), dict(role="assistant", content=answer)]


# ---- plan: a row as tokens, before any pixel is decoded -------------------------------------------------------------

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

    def __init__(self, tokenizer, model_cfg, seq_len, tiles=0, token_weights="spec", max_frames=0):
        self.tokenizer, self.cfg, self.seq_len = tokenizer, model_cfg, seq_len
        self.tiles = tiles  # high-resolution crops a picture may get; 0 = the low-resolution one alone
        self.multi_tiles = 0  # the same for each of several pictures
        self.max_frames = max_frames  # of a video; 0 = videos are not read
        self.token_weights = token_weights
        self.released = model_cfg.point_format == "released"
        if not self.released and any(name not in tokenizer.ids for name in WRITABLE):
            raise BadCheckpoint(f"{tokenizer.path}: no unused id below {tokenizer.vocab} for {' and '.join(WRITABLE)}; "
                             "--point_format released needs none")
        self.n = model_cfg.crop // model_cfg.patch

    def trunk(self, row, folder):
        """BOS and the media: (ids, [(path, Layout)])."""
        tok, ids, media = self.tokenizer, [self.tokenizer.bos], []
        if "video" in row:
            return self.video_trunk(row, folder)
        names = row.get("images") or ([row["image"]] if "image" in row else [])
        for i, name in enumerate(names):
            path = inside_folder(folder, name)
            w, h = (row["width"], row["height"]) if "width" in row and len(names) == 1 else image_size(path)
            layout = image_layout(w, h, self.n, self.cfg.patch, self.tiles if len(names) == 1 else self.multi_tiles)
            if len(names) > 1:  # introduced by its index, by which points name it
                ids += tok.encode(f"Image {i + self.released}")
            ids += [tok.ids[t] for t in layout.tokens]
            media.append((path, layout))
        return ids, media

    def video_trunk(self, row, folder):
        """BOS and the frames of a clip, each after its time in seconds; then the subtitles of moments that are shown.

            <timestamp> 0.5 <frame_start> <image>... <frame_end>        released:  " 0.5 " in plain text
        """
        if not self.max_frames:
            raise BadRow("no reader for video in this stage", "--max_frames above 0 reads it")
        tok, path = self.tokenizer, inside_folder(folder, row["video"])
        length, start = video_duration(path), row.get("start", 0.0)
        end = min(row.get("end", length), length)
        if not 0 <= start < end:
            raise BadRow("wrong field", f"clip from {start} to {end} s of a video of {length:.2f} s")
        pool = frame_layout(self.n)
        # As many frames as leave half a thousand tokens, or an eighth of a short row, for what is said about them.
        room = self.seq_len - min(512, self.seq_len // 8)
        times = sample_times(end - start, max(min(self.max_frames, room // (len(pool) + 9)), 1))
        opening, closing = (tok.ids[t] for t in (("<frame_start>", "<frame_end>") if self.cfg.frame_tokens else
                                                 ("<image_start>", "<image_end>")))
        ids = [tok.bos]
        for i, t in enumerate(times):
            ids += tok.encode(" " * (i > 0) + f"{t:.1f} ") if self.released else \
                [tok.ids["<timestamp>"]] + tok.encode(number(t, 2))
            ids += [opening] + [tok.ids["<image>"]] * len(pool) + [closing]
        lines = [s for s in row.get("subtitles", ()) if any(s["start"] - 1 <= t + start <= s["end"] + 1 for t in times)]
        if lines:
            ids += tok.encode("subtitle\n" + "".join(
                f"{s['start'] - start:.1f} - {s['end'] - start:.1f} {s['text']}\n" for s in lines))
        windows = np.concatenate([pool + i * self.n ** 2 for i in range(len(times))])
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

        A tree too long for a row becomes several, each with the whole trunk and some of the branches; an annotation too
        long by itself is left out. Pixels are never cut.
        """
        trunk, media = self.trunk(row, folder)
        kind = next((k for k in MEDIA if k in row), None)
        groups, left_out, room = [], [], 0
        for a in row["annotations"]:
            ids, learn = self.branch(to_messages(a, kind, rng, self.cfg.point_format))
            if len(trunk) + len(ids) - 1 > self.seq_len:
                left_out.append("annotation too long")
                continue
            if not groups or room < len(ids) - 1:
                groups.append([])
                room = self.seq_len - len(trunk)
            groups[-1].append((a["task"], ids, learn))
            room -= len(ids) - 1
        return [self.assemble(trunk, media, g) for g in groups], left_out

    def assemble(self, trunk, media, branches):
        """Trunk and branches side by side, targets already shifted by one: the row can be cut anywhere afterwards."""
        n = len(trunk)
        tokens, targets, weights = [trunk], [trunk[1:] + branches[0][1][:1]], [[0.0] * n]
        pos, branch = [np.arange(n)], [np.zeros(n)]
        # The released models saw trees of text alone restart at 0: there the trunk, which is BOS, was not counted.
        start = 0 if self.released and not media and len(branches) > 1 else n
        for b, (task, ids, learn) in enumerate(branches, 1):
            w = self.weight(task, sum(learn), len(branches))
            tokens.append(ids[:-1])
            targets.append(ids[1:])
            weights.append([w * l for l in learn[1:]])
            pos.append(start + np.arange(len(ids) - 1))  # every branch restarts where the trunk ends
            branch.append(np.full(len(ids) - 1, b))
        cat = lambda parts, dtype: np.concatenate([np.asarray(p, dtype) for p in parts])
        return Plan(cat(tokens, np.int64), cat(targets, np.int64), cat(weights, np.float32), cat(pos, np.int64),
                    cat(branch, np.int64), media)

    def weight(self, task, n_learned, n_branches):
        """Loss weight of each answer token. "spec": by task. "released": long answers and full trees count less each."""
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
        """A plan that ends where the model's answer begins. messages: [{role, content}], ending with the user's."""
        trunk, media = self.trunk(row, folder)
        ids, _ = self.branch(messages)
        return self.assemble(trunk, media, [("text", ids + [self.tokenizer.eos], [False] * (len(ids) + 1))])


# ---- pack: plans into rows of T tokens ------------------------------------------------------------------------------

class Packer:
    """Fills rows of `seq_len` tokens and `max_crops` crops from a buffer of waiting items (n_tokens, n_crops).

    Whenever the buffer is full, one row leaves: the item that has waited longest, and of the others those that fill the
    rest best (exact subset-sum over tokens). So nothing starves, and nothing is ever cut.
    """

    def __init__(self, seq_len, max_crops, buffer=48):
        self.seq_len, self.max_crops, self.size = seq_len, max_crops, buffer
        self.waiting = []
        self.refused = 0

    def add(self, item):
        """Take an item in; returns the rows (lists of items) that leave: none or one."""
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

    def emit(self):
        first, others = self.waiting[0], self.waiting[1:]
        tokens, crops = self.seq_len - first.n_tokens, self.max_crops - first.n_crops
        # reach[i]: bit s is set if some subset of the first i others has s tokens. Python's integers are the bit sets.
        reach, limit = [1], (1 << (tokens + 1)) - 1
        for item in others:
            reach.append((reach[-1] | reach[-1] << item.n_tokens) & limit)
        best, left = [], reach[-1]
        for _ in range(64):  # the fullest sum whose items also have few enough crops
            total = left.bit_length() - 1
            if total <= 0:
                break
            chosen, s = [], total
            for i in range(len(others), 0, -1):
                if not reach[i - 1] >> s & 1:  # only reached with item i
                    chosen.append(i - 1)
                    s -= others[i - 1].n_tokens
            if sum(others[i].n_crops for i in chosen) <= crops:
                best = chosen
                break
            left ^= 1 << total
        else:
            for i in sorted(range(len(others)), key=lambda i: -others[i].n_tokens):  # crops bind: take what fits
                if others[i].n_tokens <= tokens and others[i].n_crops <= crops:
                    best.append(i)
                    tokens, crops = tokens - others[i].n_tokens, crops - others[i].n_crops
        best = set(best)
        self.waiting = [item for i, item in enumerate(others) if i not in best]
        return [first] + [others[i] for i in sorted(best)]


# ---- decode and collate ---------------------------------------------------------------------------------------------

def decode(plans, cfg, seq_len):
    """One packed row with its pixels: (arrays of T, crops, pools, sources that failed).

    When a picture cannot be decoded its tokens stay, its pixels are zeros and its example is not trained on: the other
    examples of the row, and the order of the stream, are as they would have been.
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
                pixels = load_crops(path, layout, n, cfg.patch)
            except (BadMedia, OSError, MemoryError) as error:
                failed.append(f"{plan.where}: {error}")
                row["weights"][part] = 0
                pixels = np.zeros((layout.n_crops, n * n, cfg.patch ** 2 * 3), np.uint8)
            crops.append(pixels)
            pool.append(np.where(layout.pool >= 0, layout.pool + offset, -1))
            offset += pixels.shape[0] * pixels.shape[1]
    return row, crops, pool, failed


def collate(rows):
    """Decoded rows -> one batch: (B, T) ids and weights, crops (N, P, ·) uint8, pool (M, K); None without pictures."""
    batch = {k: torch.from_numpy(np.stack([row[k] for row, *_ in rows])) for k in rows[0][0]}
    crops, pools, offset = [], [], 0
    for _, row_crops, row_pool, _ in rows:
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
    batch = collate(rows)
    return {k: batch[k] for k in ("tokens", "crops", "pool", "pos", "example", "branch")}, [f for r in rows for f in r[3]]


# ---- datasets and mixtures ------------------------------------------------------------------------------------------

class Dataset:
    """The lines of some JSONL files, read by byte offset. name: what the mixture calls it."""

    def __init__(self, name, files):
        self.name, self.files, self.offsets, self.lines = name, files, [], []
        for path in files:
            with open(path, "rb") as f:
                at, offsets, lines = 0, [], []
                for number, line in enumerate(f, 1):
                    if line.strip():
                        offsets.append(at)
                        lines.append(number)
                    at += len(line)
            self.offsets.append(np.array(offsets, np.int64))
            self.lines.append(np.array(lines, np.int64))
        self.ends = np.cumsum([len(o) for o in self.offsets])
        self.handles = {}

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def line(self, i):
        """The i-th row: (bytes, folder its media are under, "file:line")."""
        shard = int(np.searchsorted(self.ends, i, side="right"))
        k = i - (int(self.ends[shard - 1]) if shard else 0)
        path, key = self.files[shard], (os.getpid(), shard)  # a forked worker must not share a file position
        if key not in self.handles:
            self.handles[key] = open(path, "rb")
        f = self.handles[key]
        f.seek(int(self.offsets[shard][k]))
        return f.readline(), os.path.dirname(os.path.abspath(path)), f"{path}:{int(self.lines[shard][k])}"

    def fingerprint(self):
        """What must not change between a run and its continuation: names, sizes and number of rows."""
        return [self.name, len(self), [[os.path.basename(p), os.path.getsize(p)] for p in self.files]]


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


def find_datasets(paths):
    """JSONL files, or folders of them, -> [Dataset], one per file."""
    datasets = []
    for path in paths:
        files = sorted(glob.glob(os.path.join(path, "*.jsonl"))) if os.path.isdir(path) else [path]
        if not files or not os.path.isfile(files[0]):
            raise FileNotFoundError(f"--data {path}: no such JSONL file, or no *.jsonl in that folder")
        datasets += [Dataset(os.path.basename(f)[:-len(".jsonl")] if f.endswith(".jsonl") else f, [f]) for f in files]
    empty = [d.files[0] for d in datasets if not len(d)]
    if empty:
        raise ValueError(f"--data {empty[0]}: not a single line in it")
    return datasets


# ---- the stream -----------------------------------------------------------------------------------------------------

class Stream:
    """The one global sequence of packed rows: draws, plans and packs. `rows(state)` yields (plans, state after them).

    mixture: [(Dataset, rate)]. The state is JSON; `rows(state)` continues right after the row it came with.
    """

    def __init__(self, mixture, planner, max_crops, seed):
        total = sum(rate for _, rate in mixture)
        self.sets = {d.name: d for d, _ in mixture}
        assert len(self.sets) == len(mixture), f"two datasets of one name: {[d.name for d, _ in mixture]}"
        self.names = [d.name for d, _ in mixture]
        self.edges = np.cumsum([rate / total for _, rate in mixture])
        self.planner, self.max_crops, self.seed = planner, max_crops, seed

    def fingerprint(self):
        """Everything the order depends on, for the check at resume."""
        return dict(seed=self.seed, seq_len=self.planner.seq_len, tiles=self.planner.tiles, max_crops=self.max_crops,
                    rates=[round(float(e), 9) for e in self.edges], data=[d.fingerprint() for d in self.sets.values()])

    def draw(self, number):
        """Which dataset the number-th draw takes: one random number, seeded by the draw."""
        u = random.Random(f"{self.seed} draw {number}").random()
        return self.names[min(int(np.searchsorted(self.edges, u, side="right")), len(self.names) - 1)]

    def plans(self, name, k):
        """The k-th draw from dataset `name`: ([plans], [annotations left out]), or BadRow or BadMedia."""
        d = self.sets[name]
        epoch, i = divmod(k, len(d))
        i = shuffled(i, len(d), f"{self.seed} {name} {epoch}")
        line, folder, where = d.line(i)
        try:
            plans, left_out = self.planner.plan(parse_row(line), folder, random.Random(f"{self.seed} {name} {i} {epoch}"))
        except BadMedia as e:
            raise BadRow("unreadable media", f"{where}: {e}") from None
        except BadRow as e:
            raise BadRow(e.reason, f"{where}: {e.detail}" if e.detail else where) from None
        for part, p in enumerate(plans):
            p.ref, p.where = (name, k, part), where
        return plans, left_out

    def start(self):
        return dict(draw=0, part=0, taken={n: 0 for n in self.names}, waiting=[], seen=0, rows=0, bad={}, skipped={},
                    examples=[])

    def rows(self, state=None):
        s = json.loads(json.dumps(state or self.start()))
        packer = Packer(self.planner.seq_len, self.max_crops)
        packer.waiting = [self.plans(name, k)[0][part] for name, k, part in s["waiting"]]
        plans = None
        while True:
            if plans is None:
                name = self.draw(s["draw"])
                plans = self.take(name, s)
            while s["part"] < len(plans):
                for row in packer.add(plans[s["part"]]):
                    s.update(waiting=[p.ref for p in packer.waiting], rows=s["rows"] + 1, part=s["part"] + 1)
                    yield row, json.loads(json.dumps(s)) | dict(row=[p.where for p in row])
                    s["part"] -= 1
                s["part"] += 1
            s.update(draw=s["draw"] + 1, part=0)
            s["taken"][name] += 1
            plans = None

    def take(self, name, s):
        """Plans of the current draw; a bad one counts and gives none. Counting again after a resume is undone by `part`."""
        first = s["part"] == 0
        s["seen"] += first
        try:
            plans, left_out = self.plans(name, s["taken"][name])
        except BadRow as e:
            kind = "skipped" if e.reason.startswith("no reader") else "bad"
            s[kind][e.reason] = s[kind].get(e.reason, 0) + 1
            if kind == "bad" and len(s["examples"]) < 20 and str(e) not in s["examples"]:
                s["examples"].append(str(e))
            if s["seen"] >= 200 and s["rows"] == 0 and sum(s["bad"].values()) + sum(s["skipped"].values()) == s["seen"]:
                raise ValueError(f"none of the first {s['seen']} rows can be used, e.g. {e}")
            return []
        for reason in left_out * first:
            s["skipped"][reason] = s["skipped"].get(reason, 0) + 1
        return plans


class Batches(torch.utils.data.IterableDataset):
    """Decoded rows for a DataLoader (batch_size=None): this rank's share, in order, each with the stream's state.

    Every worker walks the whole stream of plans, which is cheap, and decodes every W-th row of its rank's.
    """

    def __init__(self, stream, state=None, rank=0, world=1):
        self.stream, self.state, self.rank, self.world = stream, state, rank, world

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if info:
            torch.set_num_threads(1)
        for i, (plans, state) in enumerate(self.stream.rows(self.state)):
            if i % self.world == self.rank and i // self.world % workers == worker:
                yield decode(plans, self.stream.planner.cfg, self.stream.planner.seq_len), state


if __name__ == "__main__":
    from model import PRESETS
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], allow_abbrev=False)
    parser.add_argument("data", nargs="+", help="JSONL files, or folders of them")
    args = parser.parse_args()
    try:
        found = find_datasets(args.data)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    planner = Planner(Tokenizer(SMALL_TOKENIZER, PRESETS["small"].vocab), PRESETS["small"], 512)
    for dataset in found:
        stream = Stream([(dataset, 1.0)], planner, 16, 0)
        reasons, examples = {}, 0
        for k in range(len(dataset)):
            try:
                examples += len(stream.plans(dataset.name, k)[0])
            except BadRow as error:
                reasons[error.reason] = reasons.get(error.reason, 0) + 1
                if reasons[error.reason] <= 5:
                    print(error)
        print(f"{dataset.name}: {len(dataset)} rows, {examples} examples, not used: {reasons or 'none'}")
