"""
A page on which people look at the lines of a JSONL file and decide: `python -m tools.annotate review FILE`.

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
import http.server
import io
import json
import os
import re
import sys
import threading
import urllib.parse

from PIL import Image

from lib.media import BadMedia, inside_folder, load_frames, load_image, sample_times, video_duration
from lib.records import BadRecord, MEDIA, check_annotation, parse_record
from tools.prepare.fetch import UserError


HERE = os.path.dirname(os.path.abspath(__file__))
OWN = ("key", "status", "left_out")  # what an annotation carries here and not in the file that trains


def digest(*parts):
    """32 hexadecimal digits by which equal parts are known, in any run."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def write_whole(path, text):
    """A file that is there to the end or not at all."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    aside = f"{path}.{os.getpid()}.{threading.get_ident()}"
    with open(aside, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def jpeg(pixels, side):
    """JPEG bytes of (H, W, 3) uint8, its longer side at most `side`."""
    image, out = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(out, "jpeg", quality=90)
    return out.getvalue()


def kind_of(row):
    """Which of image, images and video a row is about, or None."""
    return next((k for k in MEDIA if k in row), None)


def read_records(path):
    """[(line number from 1, row)] of a JSONL file; UserError names the line that cannot be used."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    rows = []
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            try:
                rows += [(n, parse_record(line))] if line.strip() else []
            except BadRecord as e:
                raise UserError(f"{path}:{n}: {e}; put it right, or take the line out") from None
    return rows


# ---- lines, decisions, and the file that trains ------------------------------------------------------------

class Work:
    """What lies beside FILE.jsonl in FILE.work/."""

    def __init__(self, file):
        self.file, self.folder = file, os.path.splitext(file)[0] + ".work"
        self.made, self.log, self.mark = (os.path.join(self.folder, name)
                                          for name in ("rows.jsonl", "decisions.jsonl", "written"))

    def rows(self):
        """Every line as it was made, with a name of its own, its annotations with theirs. The lines of a file
        made elsewhere are copied first."""
        if not os.path.exists(self.made):
            write_whole(self.made, "".join(json.dumps(row) + "\n" for _, row in read_records(self.file)))
            write_whole(self.mark, self.contents())
        with open(self.made, encoding="utf-8") as f:
            rows, names = [json.loads(line) for line in f], collections.Counter()
        for row in rows:
            name = str(row.get("id") or row.get(kind_of(row), "text"))
            names[name] += 1
            row["name"] = name if names[name] == 1 else f"{name} #{names[name]}"
            for a in row["annotations"]:
                a["key"] = digest(a)[:16]
        return rows

    def decisions(self):
        """{row's name: {annotation's key: the last decision}}."""
        last = collections.defaultdict(dict)
        if os.path.exists(self.log):
            with open(self.log, encoding="utf-8") as f:
                for n, line in enumerate(f, 1):
                    try:
                        d = json.loads(line)
                        last[d["row"]][d["key"]] = d
                    except ValueError:  # what a crash left of the decision under way
                        print(f"{self.log}:{n} is cut short and does not count")
        return last

    def append(self, decision):
        """A decision, at the end of the log and on disk before this returns."""
        with open(self.log, "a+b") as f:
            f.seek(max(f.seek(0, 2) - 1, 0))
            torn = f.read(1) not in (b"", b"\n")  # what a crash left stays a line of its own
            f.write(b"\n" * torn + json.dumps(decision).encode() + b"\n")
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
        lines, decisions = [], self.decisions()
        for row in self.rows():
            mine = decisions.get(row.pop("name"), {})
            passed = [a for a in settled(row, mine) if "left_out" not in a]
            passed = [{k: v for k, v in a.items() if k not in OWN} for a in passed]
            people = sorted({(d["who"], d["when"][:10]) for d in mine.values()})
            if people:
                row["provenance"] = row.get("provenance", []) + [
                    dict(step="review", by="people", who=who, date=date) for who, date in people]
            lines += [dict(row, annotations=passed)] if passed else []
        write_whole(self.file, "".join(json.dumps(line) + "\n" for line in lines))
        write_whole(self.mark, self.contents())
        return len(lines), sum(len(line["annotations"]) for line in lines)


def settled(row, decisions):
    """The annotations of a row after people's decisions {key: decision}, each with its status; those turned
    away have left_out."""
    new = [dict(d["annotation"], key=key) for key, d in decisions.items() if key.startswith("new ")]
    for a in row["annotations"] + new:
        d = decisions.get(a["key"], {"verdict": "undecided"})
        if d["verdict"] == "edit":
            a = dict(d["annotation"], key=a["key"])
        elif d["verdict"] == "accept":
            a = {k: v for k, v in a.items() if k != "left_out"}
        elif d["verdict"] == "reject":
            a = dict(a, left_out="review: rejected")
        yield dict(a, status=d["verdict"])


# ---- the page ----------------------------------------------------------------------------------------------

class Reviewer(http.server.ThreadingHTTPServer):
    """The page, the rows, their frames and the decisions, for browsers on this machine."""
    daemon_threads = True

    def __init__(self, file, who, port):
        self.work, self.who, self.lock = Work(file), who, threading.Lock()
        self.rows, self.decisions = self.work.rows(), self.work.decisions()
        self.media = os.path.dirname(os.path.abspath(file))
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as e:
            raise UserError(f"--port {port}: {e.strerror}; without --port a free one is taken") from None
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}

    def handle_error(self, request, client_address):
        """A browser that went on to another row and did not wait is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def settled(self, row):
        return list(settled(row, self.decisions.get(row["name"], {})))

    def overview(self):
        """What the list shows of each row."""
        brief = lambda a: {k: a.get(k) for k in ("key", "status", "task", "left_out")}
        rows = [dict(name=row["name"], sample=row.get("sample", False),
                     annotations=[brief(a) for a in self.settled(row)]) for row in self.rows]
        return dict(file=self.work.file, who=self.who, rows=rows)

    def row(self, i):
        """A row, its annotations as they stand now, and its views: the moments or pictures to point in."""
        row = self.rows[i]
        views = [dict(image=k) for k in range(len(row.get("images", ())))] or [{}]
        if "video" in row:
            path, start = inside_folder(self.media, row["video"]), row.get("start", 0.0)
            length = min(row.get("end", 1e9), video_duration(path)) - start
            # short of the end, where the last frame is still shown
            views = [dict(t=round(float(t) + start, 2)) for t in sample_times(max(length - 0.05, 0), 2000)]
        return dict(row, annotations=self.settled(row), views=views, kind=kind_of(row))

    def picture(self, i, view):
        """JPEG bytes of a moment of a video, or of a picture."""
        row = self.rows[i]
        if "video" in row:
            path = inside_folder(self.media, row["video"])
            return jpeg(load_frames(path, [float(view["t"])])[0], 960)
        names = row.get("images") or [row["image"]]
        return jpeg(load_image(inside_folder(self.media, names[int(view.get("image", 0))])), 960)

    def decide(self, d):
        """Append a decision, if training could read what comes of it. A new annotation comes with its key."""
        row, verdict, key = self.rows[int(d["i"])], d["verdict"], d["key"]
        if verdict not in ("accept", "edit", "reject", "undecided"):
            raise BadRecord("wrong field", f"verdict {verdict!r}")
        with self.lock:
            when = datetime.datetime.now().astimezone().isoformat()
            now = next((a for a in self.settled(row) if a["key"] == key), None)
            if now is None and not (verdict == "edit" and re.fullmatch(r"new [\w-]{8,40}", key)):
                raise BadRecord("wrong field", f"no annotation {key!r} in row {row['name']}")
            a = d["annotation"] if verdict == "edit" else now
            if verdict in ("accept", "edit") and a.get("answer") == "":
                raise BadRecord("wrong field", "nothing is said in it yet")
            decision = dict(row=row["name"], key=key, verdict=verdict, who=self.who, when=when)
            if verdict == "edit" or key.startswith("new "):
                a = {k: v for k, v in a.items() if k not in OWN and (v != "" or k not in ("prompt", "label"))}
                check_annotation(a, kind_of(row), len(row.get("images", [0])))
                decision["annotation"] = a
            self.work.append(decision)
            self.decisions[row["name"]][key] = decision


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the page alone: no other site's page may ask (Origin), nor anyone under another name (Host)."""
    protocol_version = "HTTP/1.1"

    def respond(self, status, body, kind="application/json", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = dict(Content_Type=kind, Content_Length=len(body), X_Content_Type_Options="nosniff",
                       Cross_Origin_Resource_Policy="same-origin", Cache_Control="no-store", **headers,
                       Content_Security_Policy="default-src 'self' 'unsafe-inline'; frame-ancestors 'none'")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def guarded(self, work):
        """Do it, if it may be done; what is wrong with a request goes back to the page as one line."""
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        foreign = origin is not None and origin.removeprefix("http://") not in self.server.hosts
        if host not in self.server.hosts or foreign or self.headers.get("Sec-Fetch-Site") == "cross-site":
            self.close_connection = True
            error = f"Host {host}, Origin {origin}: this is for this machine alone"
            return self.respond(403, dict(error=error))
        url = urllib.parse.urlsplit(self.path)
        try:
            work(url.path, dict(urllib.parse.parse_qsl(url.query)))
        except (BadRecord, BadMedia) as e:
            self.respond(422, dict(error=str(e)))
        except (LookupError, ValueError, TypeError, AttributeError) as e:
            self.respond(400, dict(error=f"{type(e).__name__}: {e}"))

    def do_GET(self):
        self.guarded(self.get)

    def do_POST(self):
        self.guarded(self.post)

    def get(self, path, query):
        server = self.server
        if path == "/":
            with open(os.path.join(HERE, "review.html"), "rb") as f:
                self.respond(200, f.read(), "text/html; charset=utf-8")
        elif path == "/rows":
            self.respond(200, server.overview())
        elif path == "/row":
            self.respond(200, server.row(int(query["i"])))
        elif path == "/picture":
            self.respond(200, server.picture(int(query["i"]), query), "image/jpeg")
        elif path == "/video":
            self.video(inside_folder(server.media, server.rows[int(query["i"])]["video"]))
        else:
            self.respond(404, dict(error=f"{path}: not here"))

    def video(self, path):
        """A file, or the part of it that a player asks for, at most 8 MiB of it at a time."""
        size = os.path.getsize(path)
        m = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        first, last = int(m[1]), min(int(m[2] or size), int(m[1]) + (8 << 20), size - 1)
        with open(path, "rb") as f:
            f.seek(first)
            body = f.read(max(last - first + 1, 0))
        self.respond(206, body, "video/mp4", Content_Range=f"bytes {first}-{last}/{size}")

    def post(self, path, query):
        length = int(self.headers.get("Content-Length", -1))
        if not 0 <= length < 1 << 24:
            self.close_connection = True
            raise ValueError(f"a body of {length} bytes")
        body = self.rfile.read(length)
        if path != "/decide" or self.headers.get("Content-Type") != "application/json":
            return self.respond(404, dict(error=f"{path}: not here"))
        self.server.decide(json.loads(body))
        self.respond(200, {})

    def log_message(self, *args):
        """Say nothing: the terminal is for people."""
