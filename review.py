"""
A page on which people look at the lines of a JSONL file and decide: `python annotate.py review FILE` serves it.

    FILE.work/rows.jsonl        every line as it was made, also what was left out, and why
    FILE.work/decisions.jsonl   what people said of it, who and when; only ever appended to
              │
              ▼
    FILE                        what passed, with the decisions applied: it trains as it is

An annotation is known by a hash of what it was when it was made; its last decision counts. So nothing is ever
overwritten, and FILE can be written again at any time. The page itself is review.html.
"""
import datetime
import hashlib
import http.server
import io
import json
import os
import re
import threading
import urllib.parse

from PIL import Image

from data import MEDIA, BadRow, check_annotation, parse_row
from media import BadMedia, inside_folder, load_frames, load_image, sample_times, video_duration

HERE = os.path.dirname(os.path.abspath(__file__))


def digest(*parts):
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def write_whole(path, text):
    """A file that is there to the end or not at all."""
    aside = f"{path}.{os.getpid()}.{threading.get_ident()}"
    with open(aside, "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(aside, path)


def jpeg(pixels, side=768):
    image, out = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(out, "jpeg", quality=90)
    return out.getvalue()


# ---- lines, decisions, and the file that trains --------------------------------------------------------------

class Work:
    """What lies beside FILE.jsonl in FILE.work/: every line, also those left out, and the decisions of people."""

    def __init__(self, file):
        self.file, self.folder = file, os.path.splitext(file)[0] + ".work"
        self.rows_path, self.log = (os.path.join(self.folder, n) for n in ("rows.jsonl", "decisions.jsonl"))
        os.makedirs(self.folder, exist_ok=True)

    def rows(self):
        """Every line as it was made; of a file made elsewhere, a copy of its lines."""
        if not os.path.exists(self.rows_path):
            with open(self.file, "rb") as f:
                write_whole(self.rows_path, "".join(json.dumps(parse_row(line)) + "\n" for line in f if line.strip()))
        with open(self.rows_path, encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        for row in rows:
            row.setdefault("id", next((str(row[k]) for k in MEDIA if k in row), "text"))
            for a in row["annotations"]:
                a["key"] = digest(row["id"], a)[:16]
        return rows

    def decisions(self):
        """{(row id, key): the last decision}."""
        last = {}
        if os.path.exists(self.log):
            with open(self.log, encoding="utf-8") as f:
                for n, line in enumerate(f, 1):
                    try:
                        d = json.loads(line)
                        last[d["row"], d["key"]] = d
                    except ValueError:  # what a crash left of the decision under way
                        print(f"{self.log}:{n} is cut short and does not count")
        return last

    def append(self, decision):
        with open(self.log, "a+b") as f:
            f.seek(max(f.seek(0, 2) - 1, 0))
            torn = f.read(1) not in (b"", b"\n")  # what a crash left stays a line of its own
            f.write(b"\n" * torn + json.dumps(decision).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())

    def finish(self):
        """Write FILE: what passed and what people said of it, as training reads it. (lines, annotations) in it."""
        lines, decisions = [], self.decisions()
        for row in self.rows():
            made, names = [], []
            for a in settled(row, decisions):
                if "left_out" not in a:
                    made.append({k: v for k, v in a.items() if k not in ("key", "status")})
                names += [(d["who"], d["when"][:10]) for d in [decisions.get((row["id"], a["key"]))] if d]
            people = [dict(step="review", by="people", who=who, date=when) for who, when in sorted(set(names))]
            if made:
                lines.append(dict(row, annotations=made, **({"provenance": row.get("provenance", []) + people}
                                                            if people or "provenance" in row else {})))
        write_whole(self.file, "".join(json.dumps(line) + "\n" for line in lines))
        return len(lines), sum(len(line["annotations"]) for line in lines)


def settled(row, decisions):
    """The annotations of a row after people's decisions, each with its key and status; those turned away with left_out."""
    mine = {key: d for (name, key), d in decisions.items() if name == row["id"]}
    out = row["annotations"] + [dict(d["annotation"], key=key) for key, d in mine.items() if key.startswith("new ")]
    for a in out:
        d = mine.get(a["key"], {"verdict": "undecided"})
        if d["verdict"] == "edit":
            a = dict(d["annotation"], key=a["key"])
        if d["verdict"] == "accept":
            a = {k: v for k, v in a.items() if k != "left_out"}
        if d["verdict"] == "reject":
            a = dict(a, left_out="review: rejected")
        yield dict(a, status=d["verdict"])


# ---- the page ------------------------------------------------------------------------------------------------

class Reviewer(http.server.ThreadingHTTPServer):
    """The page, the rows, their frames and the decisions, for browsers on this machine."""
    daemon_threads = True

    def __init__(self, file, who, port):
        self.work, self.who, self.lock = Work(file), who, threading.Lock()
        self.rows, self.decisions = self.work.rows(), self.work.decisions()
        self.media = os.path.dirname(os.path.abspath(file))
        super().__init__(("127.0.0.1", port), Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}

    def overview(self):
        """What the list shows of each row."""
        return dict(file=self.work.file, who=self.who, rows=[dict(id=row["id"], sample=row.get("sample", False), annotations=[
            {k: a.get(k) for k in ("key", "status", "task", "left_out")} for a in settled(row, self.decisions)])
            for row in self.rows])

    def row(self, i):
        """A row, its annotations as they stand now, and its views: the moments or pictures a point can be in."""
        row = self.rows[i]
        views = [dict(image=k) for k in range(len(row.get("images", ())))] or [{}]
        if "video" in row:
            path, start = inside_folder(self.media, row["video"]), row.get("start", 0.0)
            length = min(row.get("end", 1e9), video_duration(path)) - start
            views = [dict(t=round(float(t) + start, 2)) for t in sample_times(max(length - 0.05, 0), 2000)]
        return dict(row, annotations=list(settled(row, self.decisions)), views=views,
                    kind=next((k for k in MEDIA if k in row), None))

    def picture(self, i, view):
        """JPEG bytes of a moment of a video, or of a picture."""
        row = self.rows[i]
        if "video" in row:
            return jpeg(load_frames(inside_folder(self.media, row["video"]), [float(view.get("t", 0))])[0], 960)
        names = row.get("images") or [row["image"]]
        return jpeg(load_image(inside_folder(self.media, names[int(view.get("image", 0))])), 960)

    def decide(self, d):
        """Append a decision that training could read; returns its key."""
        row = self.rows[int(d["i"])]
        kind = next((k for k in MEDIA if k in row), None)
        key, verdict, when = d.get("key"), d["verdict"], datetime.datetime.now().astimezone().isoformat()
        with self.lock:
            if verdict not in ("accept", "edit", "reject", "undecided"):
                raise BadRow("wrong field", f"verdict {verdict!r}")
            if key is None:
                key = "new " + digest(self.who, when)[:12]
            elif key not in {a["key"] for a in settled(row, self.decisions)}:
                raise BadRow("wrong field", f"no annotation {key!r} in row {row['id']}")
            decision = dict(row=row["id"], key=key, verdict=verdict, who=self.who, when=when)
            now = next((a for a in settled(row, self.decisions) if a["key"] == key), None)
            if verdict == "edit" or key.startswith("new "):
                a = d["annotation"] if verdict == "edit" else now
                decision["annotation"] = {k: v for k, v in a.items() if k not in ("key", "status", "left_out")
                                          and (v != "" or k not in ("prompt", "label"))}
                check_annotation(decision["annotation"], kind, len(row.get("images", [0])))
                now = decision["annotation"]
            if verdict in ("accept", "edit") and now.get("answer") == "":
                raise BadRow("wrong field", "nothing is said in it yet")
            self.work.append(decision)
            self.decisions[row["id"], key] = decision
        return dict(key=key)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the page alone: another site's page cannot ask (Origin), nor under another name (Host)."""
    protocol_version = "HTTP/1.1"

    def respond(self, status, body, kind="application/json", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k, v in {"Content-Type": kind, "Content-Length": len(body), "Cache-Control": "no-store",
                     "X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin",
                     "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
                     **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
            self.send_header(k, str(v))
        self.end_headers()
        self.wfile.write(body)

    def handle_safely(self, work):
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        if host not in self.server.hosts or origin is not None and origin.removeprefix("http://") not in self.server.hosts \
                or self.headers.get("Sec-Fetch-Site") == "cross-site":
            self.close_connection = True
            return self.respond(403, dict(error=f"Host {host}, Origin {origin}: this page is for this machine alone"))
        url = urllib.parse.urlsplit(self.path)
        try:
            work(url.path, dict(urllib.parse.parse_qsl(url.query)))
        except (BadRow, BadMedia) as e:
            self.respond(422, dict(error=str(e)))
        except (LookupError, ValueError, TypeError, AttributeError) as e:
            self.respond(400, dict(error=f"{type(e).__name__}: {e}"))
        except ConnectionError:
            self.close_connection = True  # the browser went to the next row

    def do_GET(self):
        self.handle_safely(self.get)

    def do_POST(self):
        self.handle_safely(self.post)

    def get(self, path, query):
        server = self.server
        if path == "/":
            with open(os.path.join(HERE, "review.html"), "rb") as f:
                return self.respond(200, f.read(), "text/html; charset=utf-8")
        if path == "/rows":
            return self.respond(200, server.overview())
        if path == "/row":
            return self.respond(200, server.row(int(query["i"])))
        if path == "/picture":
            return self.respond(200, server.picture(int(query["i"]), query), "image/jpeg", Cache_Control="max-age=300")
        if path == "/video":
            return self.video(inside_folder(server.media, server.rows[int(query["i"])]["video"]))
        return self.respond(404, dict(error=f"{path}: not here"))

    def video(self, path):
        """A file, or the range of it that a player asks for."""
        size = os.path.getsize(path)
        m = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(m[1]), min(int(m[2] or size), size - 1)) if m else (0, size - 1)
        last = min(last, first + (8 << 20) - 1) if m else last
        with open(path, "rb") as f:
            f.seek(first)
            body = f.read(max(last - first + 1, 0))
        ranged = dict(Content_Range=f"bytes {first}-{last}/{size}") if m else {}
        self.respond(206 if m else 200, body, "video/mp4", Accept_Ranges="bytes", **ranged)

    def post(self, path, query):
        length = int(self.headers.get("Content-Length", -1))
        if not 0 <= length < 1 << 24:
            self.close_connection = True
            raise ValueError(f"a body of {length} bytes")
        body = self.rfile.read(length)
        if path != "/decide" or self.headers.get("Content-Type") != "application/json":
            return self.respond(404, dict(error=f"{path}: not here"))
        self.respond(200, self.server.decide(json.loads(body)))

    def log_message(self, *args):
        pass
