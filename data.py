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

    python -m tools.show data/my.jsonl --show 8     # check every line; a page with what the model will see of the first eight

Shapes:  B rows, T tokens, N crops, P patches per crop, M visual tokens, K patches pooled into one
"""
import csv
import glob
import hashlib
import itertools
import json
import math
import os
import random
import re
from dataclasses import dataclass, field

import numpy as np
import torch

from lib.distributed import die_with_parent, obey_the_parent_alone
from lib.media import (BadMedia, CropCache, Layout, frame_layout, image_layout, image_size, inside_folder, load_crops,
                       sample_times, video_duration)
from lib.records import BadRecord, CLOSED, MAX_LINE, MEDIA, NOT_BAD, NO_VIDEO, TASKS, parse_record
from lib.text import (CHAT, NOTHING, WRITABLE, chat_pieces, multiple_choice, number, parse_released, released_points,
                      released_tracks, points_of_answer, styled, write_prompt)
from lib.weights import BadCheckpoint


REGISTRY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools", "prepare", "datasets.tsv")


# ---- rows: one JSONL line, checked -------------------------------------------------------------------------


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
        prompt = a.get("prompt") or prompt_of(a, kind, rng, point_format)
        answer = a["answer"] if "answer" in a else answer_of(a, kind, point_format)
    return [dict(role="user", content=styled(prompt, style)), dict(role="assistant", content=answer)]


def prompt_of(a, kind, rng, point_format="spec"):
    """The prompt of an annotation that has none."""
    points = format_points(a.get("input_points", []), kind, point_format, a.get("label", "objects"))
    return write_prompt(a, rng, point_format, points)


def answer_of(a, kind, point_format="spec"):
    """The answer of an annotation that has points."""
    points, mode = points_of_answer(a, kind)
    text = format_points(points, kind, point_format, a.get("label", ""), a["task"] == "video_tracking", mode)
    return "0" if mode == "count" and not points else text


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
            raise BadRecord(NO_VIDEO, "--max_frames above 0 reads it")
        tok, path = self.tokenizer, inside_folder(folder, row["video"])
        length, start = row.get("duration") or video_duration(path), row.get("start", 0.0)
        end = min(row.get("end", length), length)
        if not start <= end:  # a clip of no length is one frame
            raise BadRecord("wrong field", f"clip from {start} to {end} s of a video of {length:.2f} s")
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
            return self.entry.get("task") or parse_record(self.line(0)[0])["annotations"][0]["task"]
        except BadRecord:
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
    allow_closed: whether rows whose provenance names a closed model are used (tools.annotate marks them).
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
        """The k-th draw from dataset `name`: ([plans], [annotations left out]), or BadRecord, whose detail
        starts with file:line."""
        d = self.sets[name]
        epoch, i = divmod(k, len(d))
        i = shuffled(i, len(d), f"{self.seed} {name} {epoch}")
        line, folder, where = d.line(i)
        try:
            row = parse_record(line)
            if not self.allow_closed and any(p.get("closed") for p in row.get("provenance", ())):
                raise BadRecord(CLOSED, "--allow_closed trains on it")
            plans, left_out = self.planner.plan(row, folder, random.Random(f"{self.seed} {name} {i} {epoch}"))
        except BadMedia as e:
            raise BadRecord("unreadable media", f"{where}: {e}") from None
        except BadRecord as e:
            raise BadRecord(e.reason, f"{where}: {e.detail}") from None
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
        except BadRecord as e:
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

    def sequences_per_draw(self, sample=64):
        """How many packed rows a draw fills, judged by the first ones: for what a run will see of each
        dataset."""
        s, tokens, crops = self.start(), 0, 0
        for number in range(sample):
            name = self.draw(number)
            plans = self.take(name, s, [])
            s["taken"][name] += 1
            tokens, crops = tokens + sum(p.n_tokens for p in plans), crops + sum(p.n_crops for p in plans)
        return max(tokens / self.planner.seq_len, crops / self.planner.max_crops, 1e-3) / sample


class Batches(torch.utils.data.IterableDataset):
    """Decoded rows for a DataLoader (batch_size=None): this rank's share, in order, each as (row, crops,
    pools), the stream's state after it, and the events on the way: what could not be used.

    Every worker walks the whole stream of plans, which is cheap, and decodes every W-th row of its rank's.
    """

    def __init__(self, stream, state=None, rank=0, world=1, step=None, keep=0):
        self.load = CropCache(keep) if keep else load_crops
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


# ---- a page to look at -------------------------------------------------------------------------------------


def format_points(points, kind, grammar="spec", label="", tracks=False, mode="point"):
    """[{x, y, id, t | image}] -> "<point x, y, id> <point ...>", ordered by (t or image, id); no point:
    "There are none."

    kind: "image" (x, y, id), "images" (image, x, y, id, images from 0) or "video" (t in seconds, x, y, id).
    x, y in [0, 1] with at most 3 decimals, t with at most 2. mode: point, count (their number alone),
    point_count or count_point (both). grammar "released" writes what the published checkpoints do; label and
    tracks matter to it alone.
    """
    if not points:
        return NOTHING
    first = {"image": None, "images": "image", "video": "t"}[kind]
    if grammar == "released":
        groups = {}
        for p in sorted(points, key=lambda p: p[first] if first else 0):
            prefix = f"{p['t']:.1f}" if kind == "video" else str(p["image"] + 1) if kind == "images" else "1"
            groups.setdefault(prefix, []).append((p["id"], p["x"], p["y"]))
        if tracks:
            return released_tracks([(float(t), {i: (x, y) for i, x, y in g}) for t, g in groups.items()],
                                   label)
        return released_points([(prefix, [(x, y) for _, x, y in g]) for prefix, g in groups.items()], label,
                               mode)
    out = []
    for p in sorted(points, key=lambda p: (p[first] if first else 0, p["id"])):
        where = [number(p["t"], 2)] if kind == "video" else [str(p["image"])] if kind == "images" else []
        out.append("<point " + ", ".join([*where, number(p["x"], 3), number(p["y"], 3), str(p["id"])]) + ">")
    text, n = " ".join(out), len(points)
    return {"point": text, "count": str(n), "point_count": f"{text} A total of {n}.",
            "count_point": f"There are {n}: {text}"}[mode]


def parse_points(text, kind="video"):
    """The points written in `text`, in either grammar: [{x, y, id}], with `t` (or, of kind "images", `image`)
    where one is given; kind "image" ignores it.

    Never raises: what is malformed is dropped, x and y are clipped to [0, 1]. Ids and images count from 0.
    """
    points = []
    for body in re.findall(r"<point ([^<>]{1,80})>", text):
        fields = body.split(", ")
        if len(fields) not in (3, 4) or not all(re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?", f) for f in fields):
            continue
        *first, x, y, i = fields
        if "." in i or i.startswith("-") or first and (first[0].startswith("-") or kind == "images"
                                                       and "." in first[0]):
            continue
        points.append((float(first[0]) if first else None, float(x), float(y), int(i)))
    for prefix, i, x, y in parse_released(text):
        points.append((prefix - (kind == "images"), x / 1000, y / 1000, max(i - 1, 0)))
    out = []
    for first, x, y, i in points:
        p = dict(x=min(max(x, 0.0), 1.0), y=min(max(y, 0.0), 1.0), id=i)
        if first is not None and kind != "image":
            p |= {"image": int(first)} if kind == "images" else {"t": first}
        out.append(p)
    return out
