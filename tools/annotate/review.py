"""
A page on which people view the records of a JSONL file and decide: `python -m tools.annotate review FILE`.

    FILE.work/rows.jsonl        every line as it was made, also what was left out, and why
    FILE.work/decisions.jsonl   what people said of it, who and when; only ever appended to
              │
              ▼
    FILE                        what passed, with the decisions applied: it trains as it is

An annotation is known by a hash of what it was when it was made; its last decision counts. Nothing is ever
overwritten, so FILE can be written again at any time. The page itself is review.html.
"""
import collections
import datetime
import hashlib
import json
import os
import re
import threading

from lib.errors import BadRecord, UserError
from lib.media import inside_folder, load_frames, load_image, sample_times, video_duration
from lib.records import parse_record
from lib.server import LocalServer, PageHandler, jpeg
from lib.tasks import MEDIA, check_annotation


HERE = os.path.dirname(os.path.abspath(__file__))
OWN = ("key", "status", "left_out")  # what an annotation carries here and not in the file that trains


def digest(*parts):
    """32 hexadecimal digits by which equal parts are known, in any run."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def write_whole(path, text):
    """A file that is there to the end or not at all."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    # two threads, or two runs, may write at a time
    aside = f"{path}.{os.getpid()}.{threading.get_ident()}"
    with open(aside, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def kind_of(record):
    """Which of image, images and video a record is about, or None."""
    for kind in MEDIA:
        if kind in record:
            return kind
    return None


def read_records(path):
    """[(line number from 1, record)] of a JSONL file; UserError names the line that cannot be used."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    records = []
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                records.append((n, parse_record(line)))
            except BadRecord as e:
                raise UserError(f"{path}:{n}: {e}; put it right, or take the line out") from None
    return records


def to_lines(records):
    """Records as the text of a JSONL file."""
    return "".join(json.dumps(record) + "\n" for record in records)


def without(annotation, fields):
    return {k: v for k, v in annotation.items() if k not in fields}


# ---- lines, decisions, and the file that trains ------------------------------------------------------------

class Work:
    """What lies beside FILE.jsonl in FILE.work/."""

    def __init__(self, file):
        self.file = file
        self.folder = os.path.splitext(file)[0] + ".work"
        self.made = os.path.join(self.folder, "rows.jsonl")
        self.log = os.path.join(self.folder, "decisions.jsonl")
        self.mark = os.path.join(self.folder, "written")  # a hash of FILE as it was last written

    def records(self):
        """Every record as it was made, with a name of its own, its annotations with their keys. The lines of a
        file made elsewhere are copied first."""
        if not os.path.exists(self.made):
            write_whole(self.made, to_lines(record for _, record in read_records(self.file)))
            write_whole(self.mark, self.contents())
        with open(self.made, encoding="utf-8") as f:
            records = [json.loads(line) for line in f]
        # two records may be about one video, and have no id
        names = collections.Counter()
        for record in records:
            name = str(record.get("id") or record.get(kind_of(record), "text"))
            names[name] += 1
            record["name"] = name if names[name] == 1 else f"{name} #{names[name]}"
            for annotation in record["annotations"]:
                annotation["key"] = digest(annotation)[:16]
        return records

    def decisions(self):
        """{record's name: {annotation's key: the last decision}}."""
        last = collections.defaultdict(dict)
        if os.path.exists(self.log):
            with open(self.log, encoding="utf-8") as f:
                for n, line in enumerate(f, 1):
                    try:
                        decision = json.loads(line)
                        last[decision["row"]][decision["key"]] = decision
                    except ValueError:  # what a crash left of the decision under way
                        print(f"{self.log}:{n} is cut short and does not count")
        return last

    def append(self, decision):
        """A decision, at the end of the log and on disk before this returns."""
        # one write of a line that ends: a crash leaves at most half a line
        line = json.dumps(decision).encode() + b"\n"
        with open(self.log, "a+b") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(size - 1, 0))
            if f.read(1) not in (b"", b"\n"):  # what a crash left stays a line of its own
                f.write(b"\n")
            f.write(line)
            f.flush()
            os.fsync(f.fileno())

    def contents(self):
        """A hash of FILE, or nothing where there is none."""
        if not os.path.exists(self.file):
            return ""
        with open(self.file, "rb") as f:
            return hashlib.blake2b(f.read()).hexdigest()

    def check(self):
        """Refuse to replace a FILE that someone else wrote or changed."""
        ours = ""
        if os.path.exists(self.mark):
            with open(self.mark) as f:
                ours = f.read()
        if self.contents() not in ("", ours):
            raise UserError(f"{self.file}: is not what was last written here, and would be lost; move it "
                             f"away, or remove {self.made} and review it as it is now")

    def finish(self):
        """Write FILE: what passed and what people said of it. Returns (lines, annotations) of it."""
        self.check()
        finished = []
        n_annotations = 0
        decisions = self.decisions()
        for record in self.records():
            of_record = decisions.get(record.pop("name"), {})
            passed = [a for a in settled(record, of_record) if "left_out" not in a]
            if not passed:
                continue
            for who, date in sorted({(d["who"], d["when"][:10]) for d in of_record.values()}):
                reviewed = dict(step="review", by="people", who=who, date=date)
                record["provenance"] = [*record.get("provenance", []), reviewed]
            finished.append(dict(record, annotations=[without(a, OWN) for a in passed]))
            n_annotations += len(passed)
        write_whole(self.file, to_lines(finished))
        write_whole(self.mark, self.contents())
        return len(finished), n_annotations


def settled(record, decisions):
    """The annotations of a record after people's decisions {key: decision}, each with its status; those turned
    away have left_out."""
    # what people added has a key that the page made: "new ..."
    added = [dict(decision["annotation"], key=key) for key, decision in decisions.items() if key.startswith("new ")]
    for annotation in record["annotations"] + added:
        decision = decisions.get(annotation["key"], {"verdict": "undecided"})
        verdict = decision["verdict"]
        if verdict == "edit":
            annotation = dict(decision["annotation"], key=annotation["key"])
        elif verdict == "accept":
            annotation = without(annotation, ("left_out",))
        elif verdict == "reject":
            annotation = dict(annotation, left_out="review: rejected")
        yield dict(annotation, status=verdict)


# ---- the page ----------------------------------------------------------------------------------------------

class Reviewer(LocalServer):
    """The page, the records, their frames and the decisions, for browsers on this machine."""

    def __init__(self, file, who, port):
        self.work = Work(file)
        self.who = who
        self.lock = threading.Lock()
        self.records = self.work.records()
        self.decisions = self.work.decisions()
        self.media = os.path.dirname(os.path.realpath(file))
        super().__init__(Handler, port)

    def settled(self, record):
        return list(settled(record, self.decisions.get(record["name"], {})))

    def overview(self):
        """What the list shows of each record."""
        rows = []
        for record in self.records:
            annotations = [{k: a.get(k) for k in ("key", "status", "task", "left_out")}
                           for a in self.settled(record)]
            rows.append(dict(name=record["name"], sample=record.get("sample", False), annotations=annotations))
        return dict(file=self.work.file, who=self.who, rows=rows)

    def record(self, i):
        """A record, its annotations as they stand now, and its views: the times or images to point in."""
        record = self.records[i]
        if "video" in record:
            start = record.get("start", 0.0)
            seconds = video_duration(inside_folder(self.media, record["video"]))
            length = min(record.get("end", 1e9), seconds) - start
            # short of the end, where the last frame is still shown
            times = sample_times(max(length - 0.05, 0), 2000)
            views = [dict(t=round(float(t) + start, 2)) for t in times]
        elif "images" in record:
            views = [dict(image=k) for k in range(len(record["images"]))]
        else:
            views = [{}]
        return dict(record, annotations=self.settled(record), views=views, kind=kind_of(record))

    def image(self, i, view):
        """JPEG bytes of a frame of a video, or of an image."""
        record = self.records[i]
        if "video" in record:
            path = inside_folder(self.media, record["video"])
            pixels = load_frames(path, [float(view["t"])])[0]
        else:
            names = record.get("images") or [record["image"]]
            pixels = load_image(inside_folder(self.media, names[int(view.get("image", 0))]))
        return jpeg(pixels, 960)

    def decide(self, request):
        """Append a decision, if training could read what comes of it. A new annotation comes with its key."""
        record = self.records[int(request["i"])]
        verdict = request["verdict"]
        key = request["key"]
        if verdict not in ("accept", "edit", "reject", "undecided"):
            raise BadRecord("wrong field", f"verdict {verdict!r}")
        with self.lock:
            # under the lock: two windows may decide at a time
            annotations = {a["key"]: a for a in self.settled(record)}
            is_new = verdict == "edit" and re.fullmatch(r"new [\w-]{8,40}", key)
            if key not in annotations and not is_new:
                raise BadRecord("wrong field", f"no annotation {key!r} in row {record['name']}")
            annotation = request["annotation"] if verdict == "edit" else annotations[key]
            if verdict in ("accept", "edit") and annotation.get("answer") == "":
                raise BadRecord("wrong field", "nothing is said in it yet")
            when = datetime.datetime.now().astimezone().isoformat()
            decision = dict(row=record["name"], key=key, verdict=verdict, who=self.who, when=when)
            if verdict == "edit" or key.startswith("new "):
                annotation = without(annotation, OWN)
                for field in ("prompt", "label"):
                    if annotation.get(field) == "":
                        del annotation[field]
                check_annotation(annotation, kind_of(record), len(record.get("images", [0])))
                decision["annotation"] = annotation
            self.work.append(decision)
            self.decisions[record["name"]][key] = decision


class Handler(PageHandler):
    """What the page asks for."""

    def get(self, path, query):
        server = self.server
        if path == "/":
            self.page(os.path.join(HERE, "review.html"))
        elif path == "/rows":
            self.respond(200, server.overview())
        elif path == "/row":
            self.respond(200, server.record(int(query["i"])))
        elif path == "/picture":
            self.respond(200, server.image(int(query["i"]), query), "image/jpeg")
        elif path == "/video":
            self.video(inside_folder(server.media, server.records[int(query["i"])]["video"]))
        else:
            self.not_here(path)

    def video(self, path):
        """A file, or the part of it that a player asks for, at most 8 MiB of it at a time."""
        size = os.path.getsize(path)
        # a player asks for "bytes=0-" first and goes on from where the answer ended
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        first = int(match[1])
        last = min(int(match[2] or size), first + (8 << 20), size - 1)
        with open(path, "rb") as f:
            f.seek(first)
            body = f.read(max(last - first + 1, 0))
        self.respond(206, body, "video/mp4", Content_Range=f"bytes {first}-{last}/{size}")

    def post(self, path, query):
        request = self.json_body()
        if path != "/decide":
            return self.not_here(path)
        self.server.decide(request)
        self.respond(200, {})
