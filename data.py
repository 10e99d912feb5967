"""
Data: lines of JSONL in, packed batches out.

    record     one line: an image, some images, a video or a text, with its annotations: a message tree
      │ plan      media become the trunk, annotations the branches; only the headers of media files are read
    plan       tokens, targets and loss weights of one example, and the crops it will need
      │ pack      lengths are all that matters here
    sequence   several plans side by side: T tokens, the rest is padding
      │ decode    images and video frames become crops of patches, in the DataLoader's workers
    batch      what Molmo2.forward takes

One record with two annotations, as `--config small` sees it: an image, "What do you see?" and "Point to the circle."
The trunk costs 19 tokens, however many annotations there are. Each branch goes on from its last position, and sees the
trunk and itself (model.may_attend). Only answers are trained on, captions with weight 1 and points with weight 2:

  tokens  bos <low_res_image_start> <image>x16 <image_end> | ..   assistant\n A      circle | ..   assistant\n <point
  branch  0   0                     0          0           | 1    1           1      1      | 2    2           2
  pos     0   1                     2..17      18          | 19.. 29          30     31     | 19.. 29          30
  target                                                   |      A           circle eos    |      <point      0.
  weight  0   0                     0          0           | 0    1           1      1      | 0    2           2

The order of the data depends on (files, mixture, seed) and on nothing else: not on ranks, not on workers. The state
of the stream is a small JSON object that travels with each sequence; `Stream.sequences(state)` goes on after it.

Where to look, in the order in which data passes:

    lib/records.parse_record, lib/tasks.TASKS   what a line may say; what each task is: prompts, weight, answer, metric
    Planner.trunk, video_trunk    what media cost in tokens: lib/media.image_layout, sample_times, frame_layout (`pool`)
    lib/tasks.prompt_of, answer_of              words; lib/text.format_points: points as text, number by number
    Planner.encode_chat, assemble               tokens of a branch; targets, shifted by one; positions; weights
    mix                           which dataset a draw takes
    Packer.emit                   which plans share a sequence: as many tokens and crops as fit, the oldest first
    decode, collate               pixels, a batch; what is broken gets weight 0 and is counted (lib/records.BadRecords)
    Stream.start, sequences       all that an exact resume needs of the data

Shapes:  B sequences, T tokens, N crops, P patches per crop, M visual tokens, K patches pooled into one
"""
import copy
import math
import os
import random
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from lib.errors import BadCheckpoint, BadMedia, BadRecord
from lib.media import (CropCache, Layout, frame_layout, image_layout, image_size, inside_folder, load_crops,
                       sample_times, video_duration)
from lib.records import (CLOSED, Lines, NOT_BAD, NO_VIDEO, check_files, clip_of, count, find_files, in_clip, is_closed,
                         media_kind, on_frames, parse_record, shuffled)
from lib.tasks import TASKS, answer_of, clip_points, mode_of, multiple_choice, prompt_of, released_weight, styled
from lib.text import WRITABLE, chat_pieces, number, subtitle_text
from lib.text import format_points, parse_points  # noqa: F401: points as text, which others look for here


# ---- planning: a record becomes tokens, before any pixel is decoded ----------------------------------------

def to_messages(annotation, kind, rng, grammar="spec"):
    """An annotation as a chat, [{role, content}]: its own, a multiple choice, or a prompt and an answer.

    The released models also read the annotation's style, the finer kind of its task, before a prompt (see `styled`).
    """
    if "messages" in annotation:
        messages = annotation["messages"]
    else:
        if "options" in annotation:
            options = annotation["options"]
            prompt, answer = multiple_choice(annotation["question"], options, annotation["correct"], rng)
        else:
            prompt = prompt_of(annotation, kind, rng, grammar)
            answer = answer_of(annotation, kind, grammar)
        messages = [dict(role="user", content=prompt), dict(role="assistant", content=answer)]
    style = annotation.get("style") if grammar == "released" else None
    return [dict(m, content=styled(m["content"], style)) if m["role"] == "user" else m for m in messages]


@dataclass
class Plan:
    """One example: a trunk of media, its branches, and where its pixels will come from. Arrays of one length <= T."""
    tokens: np.ndarray   # input ids
    targets: np.ndarray  # the id each position must predict: the shift by one happens here, so any cut is fine later
    weights: np.ndarray  # loss weight of the target, 0 = not trained on
    pos: np.ndarray      # position for RoPE
    branch: np.ndarray   # 0 = trunk, 1, 2, ... = one annotation each
    media: list = field(default_factory=list)  # [(path, Layout)]
    ref: tuple = ()      # (dataset, draw, part): enough to make this plan again
    where: str = ""      # file:line, for messages

    @property
    def n_tokens(self):
        return len(self.tokens)

    @property
    def n_crops(self):
        return sum(layout.n_crops for _, layout in self.media)


# Reasons to leave out an annotation, or to leave out or move a point, which are counted one by one.
TOO_LONG = "annotation too long"
TOO_MANY_CROPS = "too many crops for a sequence"
POINT_CLIPPED = "points beside the image by a rounding error: moved onto its edge"
POINT_OUTSIDE = "points outside the clip: left out"
POINT_MOVED = "points between two frames: moved to the nearest"
POINT_LEFT_OUT = "points that no frame shows: left out"
# What makes room for more of them.
REMEDIES = {TOO_LONG: "--seq_len", TOO_MANY_CROPS: "--max_crops", NO_VIDEO: "--max_frames", CLOSED: "--allow_closed"}

Branch = NamedTuple("Branch", [("task", str), ("ids", list), ("has_loss", list)])  # has_loss: is an id trained on


class Planner:
    """Turns records into plans, for one model and one sequence length."""

    def __init__(self, tokenizer, model_cfg, seq_len, tiles=0, token_weights="spec", max_frames=0, max_crops=10**9):
        self.tokenizer, self.cfg, self.seq_len = tokenizer, model_cfg, seq_len
        self.tiles = tiles            # high-resolution crops an image may get; 0 = the low-resolution one alone
        self.max_frames = max_frames  # of a video; 0 = videos are left out
        self.max_crops = max_crops    # of a sequence
        self.token_weights = token_weights
        self.released = model_cfg.point_format == "released"
        self.n = model_cfg.crop // model_cfg.patch  # patches on a side of a crop
        if not self.released and not tokenizer.ids.keys() >= set(WRITABLE):
            raise BadCheckpoint(f"{tokenizer.path}: no unused id below {tokenizer.vocab} for "
                                f"{' and '.join(WRITABLE)}; --point_format released needs none")

    def trunk(self, record, folder, room=None):
        """BOS and the media of a record, as fine as `room` tokens allow: (ids, [(path, Layout)])."""
        room = room or self.seq_len
        if "video" in record:
            return self.video_trunk(record, folder, room)
        names = [record["image"]] if "image" in record else record.get("images", [])
        paths = [inside_folder(folder, name) for name in names]
        is_known = "width" in record and len(names) == 1
        sizes = [(record["width"], record["height"])] if is_known else list(map(image_size, paths))
        tok = self.tokenizer
        tiles = self.tiles
        while True:
            ids = [tok.bos]
            media = []
            n_crops = 0
            for i, (path, (width, height)) in enumerate(zip(paths, sizes)):
                layout = image_layout(width, height, self.n, self.cfg.patch, tiles)
                layout.on_white = not self.released  # released models saw what transparent parts hide
                if len(paths) > 1:  # points refer to an image by its index, which the released models count from 1
                    ids += tok.encode(f"Image {i + 1 if self.released else i}")
                ids += [tok.ids[name] for name in layout.tokens]
                media.append((path, layout))
                n_crops += layout.n_crops
            if tiles == 0 or len(ids) <= room and n_crops <= self.max_crops:
                return ids, media
            tiles //= 2  # coarser images rather than none

    def video_trunk(self, record, folder, room):
        """BOS, the frames of a clip, two a second and the last one, or as many as fit, evenly spread; then subtitles.

            <timestamp> 0.5 <frame_start> <image>... <frame_end>        released: " 0.5 " in plain text
        """
        if not self.max_frames:
            raise BadRecord(NO_VIDEO, "--max_frames above 0 reads it")
        path = inside_folder(folder, record["video"])
        start, end = clip_of(record, record.get("duration") or video_duration(path))
        tok = self.tokenizer
        pool = frame_layout(self.n)  # (m, K) of one frame
        around = "frame" if self.cfg.frame_tokens else "image"
        frame = [tok.ids[f"<{around}_start>"], *[tok.ids["<image>"]] * len(pool), tok.ids[f"<{around}_end>"]]
        n_frames = min(self.max_frames, self.max_crops)
        while True:
            times = sample_times(end - start, n_frames)  # seconds from the start of the clip
            ids = [tok.bos]
            for i, t in enumerate(times):
                if self.released:
                    ids += tok.encode(f" {t:.1f} " if i else f"{t:.1f} ")
                else:
                    ids += [tok.ids["<timestamp>"], *tok.encode(number(t, 2))]
                ids += frame
            ids += tok.encode(subtitle_text(record.get("subtitles", ()), start, times))
            if len(ids) <= room or len(times) == 1:
                break
            # Leave out the frames that are too many, by their smallest cost: a time takes one token or more.
            excess = (len(ids) - room) // (len(frame) + 1)
            n_frames = max(len(times) - max(excess, 1), 1)
        offsets = np.arange(len(times)).reshape(-1, 1, 1) * self.n ** 2  # patches in the frames before
        pools = np.where(pool >= 0, pool + offsets, -1).reshape(-1, pool.shape[1])  # (frames * m, K)
        return ids, [(path, Layout([], pools, len(times), times=tuple((times + start).tolist())))]

    def encode_chat(self, messages):
        """A chat as (ids, which of them are trained on). Every answer ends with EOS, which is trained on too."""
        # What a text may spell as a token: points. Whatever else looks like one is letters.
        writable = {"question": ("<point",), "answer": WRITABLE}
        ids, has_loss = [], []
        for text, kind in chat_pieces(messages, self.tokenizer.ids):
            if kind == "control" and text in self.tokenizer.ids:
                piece = [self.tokenizer.ids[text]]
            else:
                piece = self.tokenizer.encode(text, special=() if self.released else writable.get(kind, ()))
            if kind == "answer":
                piece.append(self.tokenizer.eos)
            ids += piece
            has_loss += [kind == "answer"] * len(piece)
        return ids, has_loss

    def plan(self, record, folder, rng):
        """A checked record -> ([plans], [reasons of annotations left out]). A tree too long for a sequence becomes
        several plans, each with the whole trunk and some of the branches. An annotation too long by itself is left
        out. Pixels are never cut."""
        kind = media_kind(record)
        annotations, left_out = [], []
        for annotation in record["annotations"]:
            left_out += [POINT_CLIPPED] * clip_points(annotation)
            inside = in_clip(annotation, record)
            left_out += [POINT_OUTSIDE] * (len(annotation.get("points", ())) - len(inside.get("points", ())))
            annotations.append(inside)
        chats = [to_messages(annotation, kind, rng, self.cfg.point_format) for annotation in annotations]
        branches = []
        for annotation, messages in zip(annotations, chats):
            branches.append(Branch(annotation["task"], *self.encode_chat(messages)))

        # Media and annotations share the sequence. The annotations get an eighth of it, or less if they need less; or
        # more, if the longest one needs more, but never more than seven eighths.
        lengths = [len(branch.ids) for branch in branches]
        eighth = min(sum(lengths), self.seq_len // 8)
        longest = max(filter(lambda n: n <= self.seq_len * 7 // 8, lengths), default=0)
        trunk, media = self.trunk(record, folder, self.seq_len - max(eighth, longest))
        if kind == "video":  # only now it is known which frames there are
            for b, (annotation, messages) in enumerate(zip(annotations, chats)):
                branches[b] = self.points_on_frames(branches[b], annotation, messages, media[0][1].times, left_out)

        groups = []  # a group of branches for each plan
        free_tokens = 0  # in the last group
        for branch in filter(None, branches):
            length = len(branch.ids) - 1  # the last token of a branch is only predicted: it takes no position
            if len(trunk) + length > self.seq_len:
                left_out.append(TOO_LONG)
                continue
            if not groups or length > free_tokens:
                groups.append([])
                free_tokens = self.seq_len - len(trunk)
            groups[-1].append(branch)
            free_tokens -= length
        return [self.assemble(trunk, media, group) for group in groups], left_out

    def points_on_frames(self, branch, annotation, messages, times, left_out):
        """The branch of a video's annotation with the points that its frames can show, at their times; None if there
        are none. What was moved or left out goes to the list `left_out`, point by point."""
        is_made_of_points = TASKS[annotation["task"]].answer.field == "points" and mode_of(annotation) != "count"
        if not is_made_of_points or {"answer", "messages", "options"} & annotation.keys() or not annotation["points"]:
            return branch
        points, n_moved, n_left_out = on_frames(annotation["points"], np.array(times) - times[0])
        if not n_moved and not n_left_out:
            return branch
        left_out += [POINT_MOVED] * n_moved + [POINT_LEFT_OUT] * n_left_out
        if not points:
            return None
        answer = answer_of(dict(annotation, points=points), "video", self.cfg.point_format)
        return Branch(branch.task, *self.encode_chat([*messages[:-1], dict(messages[-1], content=answer)]))

    def assemble(self, trunk, media, branches):
        """The plan of a trunk and its branches, side by side."""
        n = len(trunk)
        targets = trunk[1:] + branches[0].ids[:1]
        parts = [(trunk, targets, np.zeros(n), np.arange(n), np.zeros(n))]  # in the order of Plan's fields
        # A branch starts where the trunk ends; in the released models' trees of text alone at 0, as if without BOS.
        start = 0 if self.released and not media and len(branches) > 1 else n
        for b, branch in enumerate(branches, 1):
            positions = start + np.arange(len(branch.ids) - 1)
            weights = self.weight(branch.task, sum(branch.has_loss), len(branches)) * np.array(branch.has_loss[1:])
            parts.append((branch.ids[:-1], branch.ids[1:], weights, positions, np.full(len(positions), b)))
        types = (np.int64, np.int64, np.float32, np.int64, np.int64)
        columns = zip(*parts)
        arrays = [np.concatenate(column).astype(dtype) for column, dtype in zip(columns, types)]
        return Plan(*arrays, media)

    def weight(self, task, n_trained, n_branches):
        """Loss weight of an answer token: by task, or as released."""
        if self.token_weights == "released":
            return released_weight(task, n_trained, n_branches)
        return TASKS[task].weight

    def question(self, record, folder, messages):
        """A plan that ends where the model's answer begins. messages: [{role, content}], the last one the user's."""
        ids, _ = self.encode_chat(messages)
        room_for_answer = min(512, self.seq_len // 8)
        trunk, media = self.trunk(record, folder, self.seq_len - len(ids) - room_for_answer)
        if len(trunk) + len(ids) + 1 > self.seq_len:
            raise BadRecord("question too long", f"{len(ids)} tokens, and {len(trunk)} of the media before it; the "
                            f"model reads {self.seq_len}")
        ids.append(self.tokenizer.eos)  # the last token of a branch is only predicted
        return self.assemble(trunk, media, [Branch("text", ids, [False] * len(ids))])


# ---- mixtures: which dataset a draw takes ------------------------------------------------------------------

class Dataset:
    """The records of some JSONL files. name: what the mixture calls it; entry: its line of the registry, if any."""

    def __init__(self, name, files, entry=None):
        self.name = name
        self.entry = entry or {}
        self.factor = 1.0  # multiplies its weight: this run's own rebalancing
        self.lines = Lines(files)

    def __len__(self):
        return len(self.lines)

    def line(self, i):
        """The i-th record, unchecked: (bytes, folder its media are under, "file:line")."""
        return self.lines.read(i)

    def task(self):
        """What it is about: the registry's word for it, else the task of its first annotation."""
        try:
            return self.entry.get("task") or parse_record(self.line(0)[0])["annotations"][0]["task"]
        except BadRecord:
            return "image_qa"

    def weight(self):
        """sqrt(records up to a cap) times a multiplier: a large set is drawn more often, each of its records less."""
        n = min(len(self), int(self.entry.get("size_cap") or len(self)))
        return self.factor * float(self.entry.get("multiplier") or 1) * math.sqrt(n)


# Groups of datasets and their shares of the draws. Inside a group the sets share by weight, sqrt(records). pretrain:
# the report's stage 1. sft: one group. released: the published recipe's groups, whose numbers add up to 1.1.
MIXTURES = {
    "pretrain": {"captions": 0.6, "pointing": 0.3, "text": 0.1},
    "sft": {"all": 1.0},
    "released": {"demo": 0.15, "video_academic": 0.20, "image_academic": 0.25, "tracking": 0.15,
                 "video_pointing": 0.15, "image_pointing": 0.10, "nlp": 0.0995, "hardcodes": 0.0005},
    "equal": {"all": 1.0}}


def group_of(dataset, mixture):
    """Which group of a mixture a dataset belongs to."""
    if mixture == "released" and dataset.entry.get("sft_group"):
        return dataset.entry["sft_group"]
    return TASKS[dataset.task()].groups.get(mixture, "all")


def mix(datasets, mixture):
    """[(Dataset, rate)], rates adding up to 1. A group without any dataset leaves its share to the others."""
    groups = [group_of(dataset, mixture) for dataset in datasets]
    weights = [1.0 if mixture == "equal" else dataset.weight() for dataset in datasets]
    in_group = {}  # group -> weights of its datasets
    for group, weight in zip(groups, weights):
        in_group.setdefault(group, []).append(weight)
    shares = MIXTURES[mixture]
    total = sum(map(shares.get, in_group))  # of the groups that have a dataset
    rates = [shares[group] / total * weight / sum(in_group[group]) for group, weight in zip(groups, weights)]
    return list(zip(datasets, rates))


def show_mixture(mixture, draws, missing=(), told=""):
    """Print the table of a mixture. draws: records that will be drawn in the whole run; told: of the first of them."""
    width = max(len(dataset.name) for dataset, _ in mixture) + 2
    print(f"{'dataset':{width}}{'records':>11}{'weight':>10}{'rate':>9}{'epochs':>10}")
    for dataset, rate in sorted(mixture, key=lambda pair: -pair[1]):
        epochs = draws * rate / len(dataset)
        print(f"{dataset.name:{width}}{len(dataset):11,}{dataset.weight():10.1f}{rate:9.2%}{epochs:10.2f}")
    if missing:
        print(f"not there, and left out: {', '.join(missing)}")
    if told:
        print(told)


def find_datasets(paths, stage=None):
    """JSONL files, or folders of them -> ([Dataset], names of the registry's sets of this stage that are missing)."""
    found, missing = find_files(paths, stage)
    return check_files([Dataset(name, files, entry) for name, files, entry in found]), missing


# ---- packing: plans side by side in sequences of T tokens --------------------------------------------------

class Packer:
    """Fills sequences of `seq_len` tokens and `max_crops` crops from a buffer of items (n_tokens, n_crops). Whenever
    it is full one sequence leaves: the item that has waited longest, so that none starves, and those that fill the
    rest best. Nothing is ever cut."""

    def __init__(self, seq_len, max_crops, buffer=48):
        assert buffer <= 64, f"a buffer of {buffer}: `emit` keeps one bit of an int64 per waiting item"
        self.seq_len, self.max_crops, self.size = seq_len, max_crops, buffer
        self.waiting = []
        self.refused = 0  # items that fit no sequence

    def add(self, item):
        """Take an item in. Returns the sequences (lists of items) that leave: none or one."""
        if item.n_tokens > self.seq_len or item.n_crops > self.max_crops:
            self.refused += 1
            return []
        self.waiting.append(item)
        return [self.emit()] if len(self.waiting) >= self.size else []

    def flush(self):
        """The sequences that are left at the end of a stream."""
        sequences = []
        while self.waiting:
            sequences.append(self.emit())
        return sequences

    def emit(self, beam=64):
        """One sequence: the oldest item, and the set of others that fills the rest best.

        A beam search. Every round grows each set by one item and keeps the `beam` fullest sets. A set only grows by
        items after its newest in the order of size, so none is built twice. In the arrays below one entry is one set,
        and bit i of its `members` says whether it holds others[i].
        """
        oldest, *others = self.waiting
        tokens = np.array([item.n_tokens for item in others], np.int64)
        crops = np.array([item.n_crops for item in others], np.int64)
        size = tokens / self.seq_len + crops / max(self.max_crops, 1)
        order = np.argsort(-size, kind="stable")  # largest first
        tokens, crops, size = tokens[order], crops[order], size[order]
        bit = 1 << order

        # One set at first, the empty one.
        free_tokens = np.array([self.seq_len - oldest.n_tokens])
        free_crops = np.array([self.max_crops - oldest.n_crops])
        fill = np.zeros(1)
        newest = np.array([-1])  # the item added last
        members = np.array([0])
        best_fill = 0.0
        best_members = 0
        while True:
            smaller = np.arange(len(order)) > newest[:, None]  # (sets, items)
            fits = (tokens <= free_tokens[:, None]) & (crops <= free_crops[:, None])
            parent, newest = np.nonzero(smaller & fits)  # a new set is an old one and one item more
            if not len(newest):
                break
            fill = fill[parent] + size[newest]
            if len(fill) > beam:
                fullest = np.argsort(fill, kind="stable")[-beam:]  # a partition leaves ties to the processor
                parent, newest, fill = parent[fullest], newest[fullest], fill[fullest]
            free_tokens = free_tokens[parent] - tokens[newest]
            free_crops = free_crops[parent] - crops[newest]
            members = members[parent] | bit[newest]
            if fill.max() > best_fill:
                best_fill = fill.max()
                best_members = int(members[fill.argmax()])
        sequence = [oldest]
        self.waiting = []
        for i, item in enumerate(others):
            leaves = best_members >> i & 1
            (sequence if leaves else self.waiting).append(item)
        return sequence


# ---- decoding: the pixels of a sequence, and a batch of sequences ------------------------------------------

def shift(pool, n_patches):
    """Pooling windows (M, K) over patches that come after `n_patches` others; -1 still means none."""
    return np.where(pool >= 0, pool + n_patches, -1)


def decode(plans, cfg, seq_len, load=load_crops):
    """One packed sequence with its pixels: ({name: array of T}, crops, pools, events). crops and pools have an array
    for each image or video, (n, P, ·) uint8 and (m, K). events: [[dataset, file:line, reason, detail]].

    If media cannot be decoded, their tokens stay, their pixels are zeros and their example is not trained on: the
    stream and the other examples are as they would have been.
    """
    arrays = {name: np.zeros(seq_len, np.int64) for name in ("tokens", "targets", "pos", "example", "branch")}
    arrays["weights"] = np.zeros(seq_len, np.float32)
    n = cfg.crop // cfg.patch
    crops, pools, events = [], [], []
    begin = 0
    n_patches = 0  # in the crops so far
    for e, plan in enumerate(plans, 1):
        span = slice(begin, begin + plan.n_tokens)
        begin += plan.n_tokens
        for name in ("tokens", "targets", "pos", "branch", "weights"):
            arrays[name][span] = getattr(plan, name)
        arrays["example"][span] = e
        for path, layout in plan.media:
            try:
                pixels = load(path, layout, n, cfg.patch)
            except (BadMedia, OSError, MemoryError) as error:
                events.append([plan.ref[0] if plan.ref else "", plan.where, "failed to decode", str(error)])
                arrays["weights"][span] = 0
                pixels = np.zeros((layout.n_crops, n * n, cfg.patch ** 2 * 3), np.uint8)
            crops.append(pixels)
            pools.append(shift(layout.pool, n_patches))
            n_patches += pixels.shape[0] * pixels.shape[1]
    return arrays, crops, pools, events


def collate(sequences):
    """Decoded sequences -> one batch: (B, T) ids and weights, crops (N, P, ·), pool (M, K); None if all is text."""
    batch = dict(crops=None, pool=None)
    for name in sequences[0][0]:
        batch[name] = torch.from_numpy(np.stack([arrays[name] for arrays, *_ in sequences]))
    all_crops = []
    all_pools = []
    n_patches = 0
    K = 0  # images pool 4 patches, video frames 9: the narrower windows are filled up with "none"
    for _, crops, pools, *_ in sequences:
        before = n_patches  # in the sequences before this one
        for pixels, pool in zip(crops, pools):
            all_crops.append(pixels)
            all_pools.append(shift(pool, before))
            n_patches += pixels.shape[0] * pixels.shape[1]
            K = max(K, pool.shape[1])
    if all_crops:
        padded = [np.pad(pool, ((0, 0), (0, K - pool.shape[1])), constant_values=-1) for pool in all_pools]
        batch["pool"] = torch.from_numpy(np.concatenate(padded))
        batch["crops"] = torch.from_numpy(np.concatenate(all_crops))
    return batch


def to_device(batch, device):
    """The batch on a device; crops and pool stay None if there are no images."""
    return {name: x if x is None else x.to(device, non_blocking=True) for name, x in batch.items()}


# ---- the stream: all of it, in one order -------------------------------------------------------------------

class Packed(NamedTuple):
    """One packed sequence, and where the stream stands after it."""
    plans: list   # [Plan]
    state: dict   # JSON; Stream.sequences(state) yields the next one
    events: list  # what could not be used on the way: [dataset, file:line, reason, detail]


# Raise it with a change after which the same files and settings give other sequences: --resume then refuses older runs.
ORDER = 1


class Stream:
    """The one global order of packed sequences: draws, plans and packs. mixture: [(Dataset, rate)]. allow_closed: use
    records that a closed model made, too (tools/annotate marks them)."""

    def __init__(self, mixture, planner, seed, allow_closed=False):
        self.planner, self.seed, self.allow_closed = planner, seed, allow_closed
        self.sets = {dataset.name: dataset for dataset, _ in mixture}
        self.names = list(self.sets)
        assert len(self.names) == len(mixture), f"two datasets of one name: {self.names} are {len(mixture)}"
        total = sum(rate for _, rate in mixture)
        self.rates = {dataset.name: rate / total for dataset, rate in mixture}
        self.edges = np.cumsum(list(self.rates.values()))

    def fingerprint(self):
        """Everything the order depends on, for the check at resume."""
        p = self.planner
        used = {"version of the order": ORDER, "seed": self.seed, "seq_len": p.seq_len, "tiles": p.tiles,
                "max_frames": p.max_frames, "max_crops": p.max_crops, "point_format": p.cfg.point_format,
                "token_weights": p.token_weights}
        for name, data in self.sets.items():
            used[f"dataset {name}"] = f"{len(data)} rows at {self.rates[name]:.6%}, contents {data.lines.contents}"
        return used

    def draw(self, k):
        """Which dataset the k-th draw takes: one random number, seeded by the draw."""
        u = random.Random(f"{self.seed} draw {k}").random()
        place = int(np.searchsorted(self.edges, u, side="right"))
        return self.names[min(place, len(self.names) - 1)]  # rates may add up to a little less than 1

    def plans(self, name, k):
        """The k-th draw from dataset `name`: ([plans], [reasons of annotations left out]), or BadRecord, whose detail
        starts with file:line. A pure function: every epoch has its own order and draws its own prompts."""
        dataset = self.sets[name]
        epoch, i = divmod(k, len(dataset))
        i = shuffled(i, len(dataset), f"{self.seed} {name} {epoch}")
        line, folder, where = dataset.line(i)
        try:
            record = parse_record(line)
            if not self.allow_closed and is_closed(record):
                raise BadRecord(CLOSED, "--allow_closed trains on it")
            plans, left_out = self.planner.plan(record, folder, random.Random(f"{self.seed} {name} {i} {epoch}"))
        except BadMedia as e:
            raise BadRecord("unreadable media", f"{where}: {e}") from None
        except BadRecord as e:
            raise BadRecord(e.reason, f"{where}: {e.detail}") from None
        for part, plan in enumerate(plans):
            plan.ref = (name, k, part)
            plan.where = where
        fitting = [plan for plan in plans if plan.n_crops <= self.planner.max_crops]
        return fitting, left_out + [TOO_MANY_CROPS] * (len(plans) - len(fitting))

    def start(self):
        """The state before the first sequence. Its names are in checkpoints, so they stay."""
        return dict(draw=0,      # number of the current draw
                    part=0,      # plans of it that went to the packer; a split message tree gives several
                    taken=dict.fromkeys(self.names, 0),  # draws so far, by dataset
                    waiting=[],  # refs of the plans in the packer's buffer
                    rows=0,      # sequences so far
                    row=[],      # file:line of the examples in the last of them
                    seen=0,      # records drawn so far
                    empty=0,     # how many of these could not be used
                    bad={}, skipped={})  # {dataset: {reason: count}}

    def sequences(self, state=None):
        """The packed sequences after `state`, as Packed. Each has a copy of the state after it."""
        state = copy.deepcopy(state or self.start())
        events = []
        in_a_row = 0  # draws that gave nothing to train on
        packer = Packer(self.planner.seq_len, self.planner.max_crops)
        for name, k, wanted in state["waiting"]:
            plans, _ = self.plans(name, k)  # planned again: a checkpoint holds refs, not plans
            packer.waiting += [plan for plan in plans if plan.ref[2] == wanted]
        while True:
            name = self.draw(state["draw"])
            plans, why = self.plans_of_draw(name, state, events)
            in_a_row = 0 if plans else in_a_row + 1
            if in_a_row == 200:
                raise ValueError(f"not one of 200 records in a row can be used, the last of them: {why}; so far "
                                 f"{left_out_so_far(state)}")
            while state["part"] < len(plans):
                ready = packer.add(plans[state["part"]])
                state["part"] += 1
                for packed_plans in ready:
                    state["rows"] += 1
                    state["row"] = [plan.where for plan in packed_plans]
                    state["waiting"] = [list(plan.ref) for plan in packer.waiting]
                    yield Packed(packed_plans, snapshot(state), events)
                    events = []
            state["draw"] += 1
            state["part"] = 0
            state["taken"][name] += 1

    def plans_of_draw(self, name, state, events):
        """The plans of the current draw, and what was left out of it: no plans of a record that cannot be used, which
        goes to `state` and `events`."""
        is_new = state["part"] == 0  # else a resumed stream repeats a draw that it has counted before
        if is_new:
            state["seen"] += 1
        try:
            plans, left_out = self.plans(name, state["taken"][name])
            why = ", ".join(left_out)
        except BadRecord as e:
            plans, left_out, why = [], [], e
            count(state["skipped" if e.reason in NOT_BAD else "bad"], name, e.reason)
            where, _, detail = e.detail.partition(": ")
            events.append([name, where, e.reason, detail])
        if is_new:
            for reason in left_out:
                count(state["skipped"], name, reason)
            state["empty"] += not plans
        return plans, why

    def first_look(self, sample=64):
        """(how many sequences a draw fills, what to tell of it or ""), judged by the first draws."""
        p = self.planner
        state = self.start()
        tokens = crops = n_without = 0
        for k in range(sample):
            name = self.draw(k)
            plans, _ = self.plans_of_draw(name, state, [])
            tokens += sum(plan.n_tokens for plan in plans)
            crops += sum(plan.n_crops for plan in plans)
            n_without += not plans
            state["taken"][name] += 1
        told = []
        if n_without > sample / 10:
            told.append(f"{n_without} of the first {sample} records give nothing to train on: {left_out_so_far(state)}")
        n_frames = p.seq_len // (len(frame_layout(p.n)) + 3)  # that the tokens would hold
        if p.max_crops < min(p.max_frames, n_frames):
            told.append(f"a video gets at most {p.max_crops} frames: --max_crops {p.max_crops} ends before "
                        f"--max_frames {p.max_frames}, and --seq_len {p.seq_len} holds {n_frames}")
        return max(tokens / p.seq_len, crops / p.max_crops, 1e-3) / sample, "\n".join(told)


def snapshot(state):
    """A copy of a stream's state that later draws leave as it is: they change these three, and replace the rest."""
    return state | {name: copy.deepcopy(state[name]) for name in ("taken", "bad", "skipped")}


def left_out_so_far(state):
    """What a stream could not use, by reason, and the flags that make room for more of it."""
    totals = {}
    for reasons in (*state["bad"].values(), *state["skipped"].values()):
        for reason, n in reasons.items():
            totals[reason] = totals.get(reason, 0) + n
    said = []
    for reason, n in sorted(totals.items(), key=lambda pair: -pair[1]):
        said.append(f"{n} {reason}" + (f" ({REMEDIES[reason]})" if reason in REMEDIES else ""))
    return ", ".join(said)


class Sample(NamedTuple):
    """A decoded sequence as it leaves the DataLoader, if its collate_fn is the identity (`tuple` drops the names)."""
    decoded: tuple  # arrays, crops, pools: what `collate` takes
    state: dict     # of the stream after it; state["row"]: file:line of its examples
    events: list    # what could not be used since this worker's last sequence


class Batches(torch.utils.data.IterableDataset):
    """This rank's sequences, decoded, in order, as Sample: for a DataLoader with batch_size=None.

    A step takes `global_batch` sequences. Rank r of the `world` data-parallel ranks takes r, r + world, ... of them,
    and its DataLoader workers take turns. Every worker plans and packs the whole stream, which is cheap, and decodes
    only its own sequences:

        sequence   0 1 2 3 4 | 5 6 7 8 9 |      global_batch 5
        rank       0 1 0 1 0 | 0 1 0 1 0 |      world 2
        worker     0 0 1 1 0 | 1 0 0 1 1 |      2 workers a rank, each counting its rank's sequences alone
    """

    def __init__(self, stream, state=None, rank=0, world=1, global_batch=None, cache_bytes=0):
        self.stream, self.state, self.rank, self.world = stream, state, rank, world
        self.global_batch = global_batch or world
        self.load = CropCache(cache_bytes) if cache_bytes else load_crops

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if info:
            torch.set_num_threads(1)
            getattr(os, "nice", int)(10)  # where cores are few, training goes first
            # here alone: who asks one question need not load all that is for many ranks, which takes 49 MB
            from lib.distributed import die_with_parent, obey_the_parent_alone
            die_with_parent()
            obey_the_parent_alone()
        planner = self.stream.planner
        of_rank = 0  # sequences of this rank so far
        events = []  # since this worker's last sequence
        for i, packed in enumerate(self.stream.sequences(self.state)):
            events += packed.events
            if i % self.global_batch % self.world != self.rank:
                continue
            of_rank += 1
            if (of_rank - 1) % workers == worker:
                *decoded, failed = decode(packed.plans, planner.cfg, planner.seq_len, self.load)
                yield Sample(tuple(decoded), packed.state, events + failed)
                events = []
