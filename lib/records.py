"""
Records: one line of JSONL is one record, and is checked here before anything else sees it.

    {"image": "truck.jpg", "annotations": [{"task": "image_pointing", "label": "wheels", "points": [...]}, ...]}

    file ─► line_index ─► a line ─► parse_record ─► a dict that every later step can rely on
                                         └► BadRecord, counted by its reason, listed once by BadRecords
"""
import csv
import glob
import hashlib
import json
import math
import os

import numpy as np

from lib.errors import BadRecord
from lib.media import MAX_PIXELS
from lib.progress import progress
from lib.tasks import MEDIA, PLACES, check_annotation, is_index, is_list_of, is_number, is_text, is_time, wrong_field

# Reasons to leave a record out on purpose: it is counted, but does not stop a run.
NO_VIDEO = "no reader for video in this stage"
CLOSED = "from a closed model"
NOT_BAD = (NO_VIDEO, CLOSED)

AT_FRAME = 0.05  # seconds; times are rounded, and a point so near to a frame is at it

MAX_LINE = 32 << 20  # bytes; a longer line is not read

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REGISTRY = os.path.join(ROOT, "tools", "prepare", "datasets.tsv")


# ---- a record, from its fields to the whole ----------------------------------------------------------------

def given_values(record, keys):
    return [record[key] for key in keys if key in record]


def check_size(record):
    """width and height save reading an image's header; one without the other is a slip."""
    given = given_values(record, ("width", "height"))
    if not given:
        return
    if len(given) == 1 or not all(map(is_index, given)) or not 0 < given[0] * given[1] <= MAX_PIXELS:
        raise wrong_field("width and height are pixels, both or neither: "
                          f"{record.get('width')!r}, {record.get('height')!r}")


def check_clip(record):
    """duration saves reading a video's header; start, end and every other time count from the start of the file."""
    def is_subtitle(s):
        return isinstance(s, dict) and is_time(s.get("start")) and is_time(s.get("end")) and is_text(s.get("text"))

    times = given_values(record, ("start", "end", "duration", "fps"))
    if not is_list_of(record.get("subtitles", []), is_subtitle) or not all(map(is_time, times)):
        raise wrong_field("start, end, duration are seconds, fps a number; subtitles are [{start, end, text}]")


def whole_or_float(text):
    value = float(text)
    return int(value) if value.is_integer() else value


def parse_record(line):
    """The bytes of one line -> the record as a dict; BadRecord says what is wrong with it. A field that is null is not
    there, and a whole number is one however it is written: table programs write null and 3.0 where lines differ."""
    if len(line) >= MAX_LINE:
        raise BadRecord("line too long", f"more than {MAX_LINE >> 20} MiB")
    try:
        record = json.loads(line.decode("utf-8-sig"), parse_float=whole_or_float,
                            object_pairs_hook=lambda pairs: {key: value for key, value in pairs if value is not None})
        if b"\\ud" in line.lower():
            json.dumps(record, ensure_ascii=False).encode()  # JSON can spell half a character, which is no text
    except UnicodeError:
        raise BadRecord("not UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise BadRecord("malformed JSON", str(e)) from None
    if not isinstance(record, dict):
        raise wrong_field(f"a line must be an object, not {type(record).__name__}")
    kinds = [kind for kind in MEDIA if kind in record]
    if len(kinds) > 1:
        raise wrong_field(f"{' and '.join(kinds)} in one record")
    kind = kinds[0] if kinds else None
    names = []  # of the media files
    if kind:
        names = record[kind] if kind == "images" else [record[kind]]
        if not names or not is_list_of(names, lambda name: is_text(name) and name):
            raise wrong_field(f"{kind} is {record[kind]!r}")
    check_size(record)
    if not is_list_of(record.get("provenance", []), lambda source: isinstance(source, dict)):
        raise wrong_field("provenance must be a list of objects")
    if kind == "video":
        check_clip(record)
    if not isinstance(record.get("annotations"), list) or not record["annotations"]:
        raise wrong_field("annotations must be a list with something in it")
    for a in record["annotations"]:
        if isinstance(a, dict) and is_number(a.get("answer")):
            a["answer"] = str(a["answer"])  # of a count, say
        check_annotation(a, kind, len(names))
    return record


def media_kind(record):
    """Which of MEDIA a record is about; None of a text."""
    return next((kind for kind in MEDIA if kind in record), None)


def is_closed(record):
    """Whether a closed model made a part of it: its terms may forbid to train on that."""
    return any(source.get("closed") for source in record.get("provenance", ()))


def clip_of(record, length):
    """(start, end) of the part of a video that a record is about. length: of the file; all in seconds."""
    start = record.get("start", 0.0)
    end = min(record.get("end", length), length)
    if not start <= end:  # a clip of no length is one frame
        raise wrong_field(f"clip from {start} to {end} s of a video of {length:.2f} s")
    return start, end


def in_clip(annotation, record):
    """An annotation whose times count from the start of the record's clip, as the model counts. Places outside the
    clip are left out."""
    if "video" not in record or "start" not in record and "end" not in record:
        return annotation
    start = record.get("start", 0)
    end = record.get("end", math.inf)
    moved = dict(annotation)
    for key in PLACES:
        if key in moved:
            inside = []
            for p in moved[key]:
                if start - 0.01 <= p["t"] <= end + 0.01:
                    inside.append(dict(p, t=max(p["t"] - start, 0)))
            moved[key] = inside
    for key in ("start_time", "end_time", "timestamp"):
        if key in moved:
            moved[key] = max(moved[key] - start, 0)
    return moved


def on_frames(points, times):
    """The points of a video as its frames can show them: (points, number moved, number left out).

    A point up to a quarter of a second from a frame, the most there is at two frames a second, moves to the nearest.
    One further away is left out, and so is one whose object has a point there already. times: of the frames.
    """
    distances = np.abs(np.array([p["t"] for p in points])[:, None] - times)  # (points, frames)
    nearest = distances.argmin(1)
    distance = distances.min(1)
    kept = []
    n_moved = 0
    taken = set()  # (frame, id)
    for i in np.argsort(distance, kind="stable"):
        p = points[i]
        place = int(nearest[i]), p["id"]
        if distance[i] <= AT_FRAME:
            kept.append(p)
        elif distance[i] <= 0.25 + 1e-6 and place not in taken:
            kept.append(dict(p, t=float(times[nearest[i]])))
            n_moved += 1
        taken.add(place)
    return kept, n_moved, len(points) - len(kept)


# ---- files -------------------------------------------------------------------------------------------------

def line_index(path):
    """Where the lines of a file start that are not blank, and their numbers: (2 + n, 2) int64, memory-mapped. The
    first two rows are (size, time of change) of the file and (hash of its contents, n).

    Built once and kept beside the file as .NAME.index.npy, so that ten million lines cost no time and no memory when
    a run starts.
    """
    stat = os.stat(path)
    version = (stat.st_size, stat.st_mtime_ns)
    folder, name = os.path.split(os.path.abspath(path))
    cache = os.path.join(folder, f".{name}.index.npy")
    try:
        table = np.load(cache, mmap_mode="r", allow_pickle=False)
        if table.dtype == np.int64 and table.ndim == 2 and table.shape[1] == 2 and tuple(table[0]) == version:
            return table
    except (OSError, ValueError, EOFError):
        pass  # not there yet, or damaged
    table = build_index(path, version)
    try:
        with open(f"{cache}.{os.getpid()}", "wb") as f:
            np.save(f, table)
        os.replace(f"{cache}.{os.getpid()}", cache)
    except OSError:
        pass  # a folder one may not write to: built again next time
    return table


def build_index(path, version):
    digest = hashlib.blake2b(digest_size=8)
    newlines = []  # positions, an array for each chunk
    written = []   # how many bytes before each of them are no blanks
    size = 0
    n_written = 0
    with open(path, "rb") as f:
        chunks = iter(lambda: f.read(1 << 24), b"")
        for chunk in progress(chunks, f"pieces of {path} indexed", math.ceil(version[0] / (1 << 24))):
            digest.update(chunk)
            codes = np.frombuffer(chunk, np.uint8)
            places = np.flatnonzero(codes == 10)
            so_far = np.cumsum((codes > 32) | (codes < 9) | (codes > 13) & (codes < 32)) + n_written
            newlines.append(places + size)
            written.append(so_far[places])
            n_written = int(so_far[-1])
            size += len(chunk)
    ends = np.concatenate([*newlines, np.array([size], np.int64)])
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])
    blank = np.diff(np.concatenate([np.zeros(1, np.int64), *written, np.array([n_written])])) == 0
    numbers = np.arange(1, len(starts) + 1)
    lines = np.stack([starts, numbers], 1)[~blank]  # (n, 2)
    contents = int.from_bytes(digest.digest(), "little", signed=True)
    return np.concatenate([np.array([version, (contents, len(lines))], np.int64), lines])


class Lines:
    """The lines of some JSONL files, one file after the other, without the blank ones."""

    def __init__(self, files):
        self.files = files
        self.open = {}  # (process, place of a file) -> (index, file, folder)
        heads = [line_index(path)[1].tolist() for path in files]  # (hash of the contents, number of lines)
        self.ends = np.cumsum([n for _, n in heads])
        self.contents = hashlib.blake2b(repr(heads).encode(), digest_size=8).hexdigest()

    def __len__(self):
        return int(self.ends[-1])

    def __getstate__(self):
        return self.__dict__ | dict(open={})  # an open file does not go to a worker, which macOS starts afresh

    def read(self, i):
        """The i-th line: (bytes, folder its media are under, "file:line")."""
        place = int(np.searchsorted(self.ends, i, side="right"))
        path = self.files[place]
        key = (os.getpid(), place)  # a forked worker must not share a file position
        if key not in self.open:
            if len(self.open) >= 64:  # a process may not open thousands of files
                self.open.clear()
            folder = os.path.dirname(os.path.realpath(path))  # media lie beside the file, not beside a link to it
            self.open[key] = line_index(path), open(path, "rb"), folder
        index, file, folder = self.open[key]
        before = int(self.ends[place - 1]) if place else 0
        start, line_number = index[2 + i - before].tolist()
        file.seek(start)
        return file.readline(MAX_LINE), folder, f"{path}:{line_number}"


def shuffled(i, n, key):
    """Where the i-th of n lands in a pseudo-random order: a bijection that needs no memory, whatever n is.

    A Feistel network permutes the next power of four above n: a round exchanges the halves of the number's bits and
    scrambles one with a hash of the other, which can be undone. What falls outside n is permuted again.
    """
    half = max((n - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(4):
            digest = hashlib.blake2b(f"{key} {r} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        i = left << half | right
        if i < n:
            return i


def read_registry():
    """{name: its line} of datasets.tsv: task, stage, group, size cap and multiplier of the real datasets."""
    with open(REGISTRY, newline="", encoding="utf-8") as f:
        return {entry["name"]: entry for entry in csv.DictReader(f, delimiter="\t")}


def find_files(paths, stage=None):
    """JSONL files, or folders of them -> ([(dataset's name, files, entry of the registry or None)], names of the
    registry's sets of this stage that are missing).

    In a folder NAME.jsonl or NAME/*.jsonl is the registry's set NAME, taken if it is of this stage. Any other *.jsonl
    is a set of its own.
    """
    registry = read_registry()
    of_stage = [name for name, entry in registry.items() if stage is None or stage in entry["stage"].split(",")]
    found = []
    seen = set()
    for path in paths:
        before = len(found)
        if os.path.realpath(path) in seen:
            raise ValueError(f"--data {path}: named twice; --rebalance NAME=2 draws from a dataset twice as often")
        seen.add(os.path.realpath(path))
        unknown = {path} if os.path.isfile(path) else set(glob.glob(os.path.join(path, "*.jsonl")))
        for name, entry in registry.items() if os.path.isdir(path) else ():
            files = glob.glob(os.path.join(path, f"{name}.jsonl")) + glob.glob(os.path.join(path, name, "*.jsonl"))
            unknown -= set(files)
            if files and name in of_stage:
                found.append((name, sorted(files), entry))
        for file in sorted(unknown):
            found.append((os.path.basename(file).removesuffix(".jsonl"), [file], None))
        if len(found) == before:
            raise FileNotFoundError(f"--data {path}: no such JSONL file, or no *.jsonl of this stage in it")
    names = [name for name, _, _ in found]
    datasets = []
    for name, files, entry in found:
        # Datasets are known by their names; two of one name by the paths of their files.
        unique_name = name if names.count(name) == 1 else files[0]
        datasets.append((unique_name, files, entry))
    missing = [name for name in of_stage if name not in names]
    if not any(entry for _, _, entry in found):
        missing = []  # whoever has only files of his own does not miss the registry's
    return datasets, missing


def check_files(datasets):
    """The same datasets; ValueError for one without a line, from which nothing could be drawn, and for JSON of another
    form: an array, or objects over several lines."""
    for dataset in datasets:
        if not len(dataset):
            raise ValueError(f"--data {dataset.lines.files[0]}: not a single line in it")
        line, _, where = dataset.line(0)
        if line.lstrip(b"\xef\xbb\xbf \t")[:1] == b"[" or line.strip(b"\xef\xbb\xbf \t\r\n") == b"{":
            raise ValueError(f"--data {where}: JSON over several lines, or an array; one record a line is wanted, each "
                             'like {"image": "a.jpg", "annotations": [{"task": "image_caption", "answer": "..."}]}')
    return datasets


# ---- what could not be used --------------------------------------------------------------------------------

def count(counts, name, reason):
    """Add one to counts[name][reason]."""
    reasons = counts.setdefault(name, {})
    reasons[reason] = reasons.get(reason, 0) + 1


class BadRecords:
    """What could not be used: counted by dataset and reason, and listed once each in `log`, bad_rows.jsonl."""

    def __init__(self, log, failed):
        self.log = log
        self.listed = {(entry["where"], entry["reason"]) for entry in map(json.loads, log.kept)}
        self.latest = []      # the last five, for the message that ends a run
        self.failed = failed  # {dataset: {reason: n}} of records that were planned and then could not be decoded

    def note(self, step, events):
        """events: [[dataset, file:line, reason, detail]]. What cannot be planned is counted in the stream's state."""
        for name, where, reason, detail in events:
            if reason == "failed to decode":
                count(self.failed, name, reason)
            if (where, reason) not in self.listed:
                self.listed.add((where, reason))
                self.log.write(step=step, dataset=name, where=where, reason=reason, detail=detail)
                self.latest = [*self.latest[-4:], f"  {where}: {reason}: {detail}"]

    def counts(self, state):
        """{dataset: {reason: n}}"""
        return {name: state["bad"].get(name, {}) | self.failed.get(name, {})
                for name in state["bad"] | self.failed}

    def too_many(self, state, max_bad):
        """Why to stop, or None: more than `max_bad` of the records seen could not be used. Those left out on purpose
        (NOT_BAD) do not count."""
        counts = self.counts(state)
        bad = sum(sum(reasons.values()) for reasons in counts.values())
        seen = max(state["seen"], 100)
        if bad <= max_bad * seen:
            return None
        return "\n".join([f"{bad} of {seen} records cannot be used, more than --max_bad {max_bad}: {counts}",
                          *self.latest, f"{self.log.path} lists them all"])
