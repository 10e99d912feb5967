"""Real data: every shape from request to training steps, and the ways in which a connection and its other end
misbehave.

The other end is Python's own server on loopback; `published.py` has what it serves and what must come of it.
"""
import collections
import glob
import hashlib
import http.server
import importlib.machinery
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import types
import urllib.parse
import zipfile
from types import SimpleNamespace

import pytest
import requests
from PIL import Image
from conftest import HERE, QUICK, ROOT, log_of, picture, shared, stage_2, tiny_model, video, write_lines
from published import CASES
from test_media import TURNS, turned_video

from tools.prepare import convert
import data
from tools import show
from tools.prepare import fetch
from tools.prepare import __main__ as prepare
from lib.records import read_registry
from eval import load_questions
from lib.records import parse_record
from model import Molmo2


def drawn_picture(name):
    """A PNG of 40 x 20 whose colour is its name's."""
    out = io.BytesIO()
    Image.new("RGB", (40, 20), tuple(hashlib.sha256(name.encode()).digest()[:3])).save(out, "png")
    return out.getvalue()


class ParquetFile:
    """A stand-in for pyarrow's, as tests need no package: rows in lines of JSON, {"IMAGE": name} for an image."""

    def __init__(self, path):
        with open(path, encoding="utf-8") as f:
            self.rows = [self.cell(json.loads(line)) for line in f]

    def cell(self, value):
        if isinstance(value, dict) and "IMAGE" in value:
            return dict(bytes=value["IMAGE"] and drawn_picture(value["IMAGE"]), path="x.png")
        if isinstance(value, dict):
            return {k: self.cell(v) for k, v in value.items()}
        return [self.cell(v) for v in value] if isinstance(value, list) else value

    def iter_batches(self, n):
        for at in range(0, len(self.rows), n):
            yield SimpleNamespace(to_pylist=lambda: self.rows[at:at + n])


class Hub(http.server.ThreadingHTTPServer):
    """A hub, its viewer, a video mirror and a web of pictures, with answers in the shapes of the real ones. `faults`
    are asked first: fault(request, n) answers the n-th request itself and returns True, or leaves it.

    rows: of each table; a parquet file has `shard` of them. renamed: repositories. partial: tables of which there
    is but the beginning. broken: rows that the viewer cannot read."""

    def __init__(self, film):
        super().__init__(("127.0.0.1", 0), Request)
        self.url, self.film = f"http://127.0.0.1:{self.server_port}", film
        self.rows, self.files, self.faults, self.log = {}, {}, [], []
        self.shard, self.renamed, self.partial, self.broken, self.agents = 100, {}, set(), set(), set()
        self.sent, self.lock, self.busy, self.most = collections.Counter(), threading.Lock(), 0, 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, address):
        pass  # a client that was killed

    def fill(self, value):
        """Placeholders of `published.py` -> values."""
        if isinstance(value, dict):
            return {k: self.fill(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.fill(v) for v in value]
        if isinstance(value, str) and value.startswith("SHA("):
            return hashlib.sha256(drawn_picture(value[4:-1])).hexdigest()
        return value.replace("URL/", self.url + "/") if isinstance(value, str) else value

    def content(self, path, value):
        """Bytes of a file: as they are, text, JSON, or an archive of {name: content, "folder/": number of
        frames}."""
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            named = self.film if value == "film" else drawn_picture(value)
            return named if value == "film" or len(value) == 1 else value.encode()
        if path.endswith((".json", ".jsonl")):
            value = self.fill(value)
            return "\n".join(map(json.dumps, value if path.endswith("l") else [value])).encode()
        members = {}
        for name, inner in value.items():
            members |= {f"{name}{i:05d}.png": drawn_picture(str(i))
                        for i in range(inner)} if name.endswith("/") else \
                {name: self.content(name, inner)}
        out = io.BytesIO()
        if path.endswith(".zip"):
            with zipfile.ZipFile(out, "w") as z:
                for name, content in members.items():
                    z.writestr(name, content)
        else:
            with tarfile.open(fileobj=out, mode="w:gz" if path.endswith("gz") else "w") as t:
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    t.addfile(info, io.BytesIO(content))
        return out.getvalue()

    def blurred(self, value):
        """Cells as the viewer has them: images are made anew, as JPEGs, and come as links."""
        if isinstance(value, dict) and "IMAGE" in value:
            return dict(src=f"{self.url}/cached-assets/{value['IMAGE']}/image.jpg?Expires=1", height=20, width=40)
        return [self.blurred(v) for v in value] if isinstance(value, list) else value

    def publish(self, served):
        for key, rows in served.get("rows", {}).items():
            self.rows[key] = self.fill(rows)
        for key, value in served.get("files", {}).items():
            self.files[key] = self.content(key[1], value)


class Request(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", 1 << 16

    def log_message(self, *args):
        pass

    def do_GET(self):
        with self.server.lock:
            self.server.log.append(self.path)
            self.server.agents.add(self.headers["User-Agent"])
            n = len(self.server.log)
            self.server.busy += 1
            self.counted = 1
            self.server.most = max(self.server.most, self.server.busy)
        try:
            if not any(fault(self, n) for fault in self.server.faults):
                self.answer()
        finally:
            self.answered()

    def answered(self):
        """Before the last of an answer is sent: whoever has it may ask again at once."""
        with self.server.lock:
            self.server.busy -= self.counted
            self.counted = 0

    def reply(self, body=b"", status=200, length=None, **headers):
        self.send_response(status)
        for k, v in headers.items():
            self.send_header(k.replace("_", "-"), v)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.answered()
        self.wfile.write(body)
        with self.server.lock:
            self.server.sent[self.path] += len(body)

    def ranged(self, body, **headers):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start >= len(body) and start:
            self.reply(status=416, Content_Range=f"bytes */{len(body)}")
        elif start:
            self.reply(body[start:], 206, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}",
                       **headers)
        else:
            self.reply(body, **headers)

    def answer(self):
        hub, url = self.server, urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(url.path), dict(urllib.parse.parse_qsl(url.query))
        if path in ("/rows", "/parquet", "/splits"):
            return self.view(path, query)
        if path.removeprefix("/api/datasets/") in hub.renamed:
            return self.reply(status=307, Location=f"/api/datasets/{hub.renamed[path.removeprefix('/api/datasets/')]}")
        if path.removeprefix("/api/datasets/") in hub.renamed.values():
            return self.reply(json.dumps(dict(id=path.removeprefix("/api/datasets/"), sha="c0ffee00aa")).encode())
        if path.startswith("/shard/"):
            _, _, repo, config, split, at = map(urllib.parse.unquote, url.path.split("/"))
            rows = hub.rows[repo, config, split][int(at):][:hub.shard]
            return self.ranged("\n".join(map(json.dumps, rows)).encode())
        for (repo, name), body in hub.files.items():
            for kind, head in (("datasets", "/datasets/"), ("models", "/")):
                if path == f"/api/{kind}/{repo}":
                    return self.reply(json.dumps(dict(sha="c0ffee00aa")).encode())
                if path == f"/api/{kind}/{repo}/tree/c0ffee00aa":
                    return self.reply(json.dumps([dict(type="file", path=n, size=len(b),
                                                       lfs=dict(oid=hashlib.sha256(b).hexdigest()))
                                                  for (r, n), b in hub.files.items() if r == repo]).encode())
                if path == f"{head}{repo}/resolve/c0ffee00aa/{name}":
                    return self.ranged(body)
        kind, _, name = path[1:].partition("/")
        if kind == "cached-assets":
            out = io.BytesIO()
            Image.open(io.BytesIO(drawn_picture(name.split("/")[0]))).save(out, "jpeg", quality=75)
            return self.ranged(out.getvalue())
        if kind == "pic" and name != "gone":
            return self.ranged(drawn_picture(name))
        if kind == "cc-2fps" and name in ("v1_2fps.mp4", "v2_2fps.mp4"):
            return self.ranged(hub.film)
        self.reply(b"<html>not here</html>", 404)

    def refuse(self, status, code, message):
        self.reply(json.dumps(dict(error=message)).encode(), status, X_Error_Code=code)

    def view(self, path, query):
        """What the viewer says of a table."""
        hub, repo = self.server, query["dataset"]
        if repo in hub.renamed:
            return self.refuse(404, "RenamedDatasetError",
                               "The dataset has been renamed. Please use the current dataset name.")
        if path == "/splits":
            tables = [dict(dataset=r, config=c, split=s) for r, c, s in hub.rows if r == repo]
            return self.reply(json.dumps(dict(splits=tables, pending=[], failed=[])).encode())
        key = repo, query["config"], query["split"]
        if key not in hub.rows:
            return self.refuse(404, "ResponseNotFound", "Not found.")
        rows, partial = hub.rows[key], key in hub.partial
        if path == "/parquet":
            files = []  # of all tables of the repository: the one that was asked for has to be picked
            for other in [k for k in hub.rows if k[0] == repo]:
                name = "/".join(urllib.parse.quote(part, safe="") for part in other)
                files += [dict(dataset=repo, config=other[1], split=other[2], url=f"{hub.url}/shard/{name}/{at}",
                               size=None, filename=f"{at:04d}.parquet")
                          for at in range(0, len(hub.rows[other]) or 1, hub.shard)]
            return self.reply(json.dumps(dict(parquet_files=files, pending=[], failed=[], partial=partial)).encode())
        at, n = int(query["offset"]), int(query["length"])
        if n > 100:
            return self.refuse(422, "InvalidParameter", "Parameter 'length' must not be greater than 100")
        for i in range(at, min(at + n, len(rows))):
            if (*key, i) in hub.broken:
                return self.refuse(500, "TransformRowsProcessingError",
                                   f"Server error while post-processing the rows. This occured on row {i}.")
        page = [dict(row_idx=i, row={k: hub.blurred(v) for k, v in rows[i].items()}, truncated_cells=[])
                for i in range(at, min(at + n, len(rows)))]
        self.reply(json.dumps(dict(features=[], rows=page, num_rows_total=len(rows), num_rows_per_page=100,
                                   partial=partial)).encode())


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    with open(video(tmp_path_factory.mktemp("film") / "film.mp4"), "rb") as f:
        return f.read()


def without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)


@pytest.fixture
def hub(film, monkeypatch):
    server = Hub(film)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(fetch, "PAUSE", 0.01)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    pyarrow = types.ModuleType("pyarrow")
    pyarrow.__spec__ = importlib.machinery.ModuleSpec("pyarrow", None)
    pyarrow.parquet = SimpleNamespace(ParquetFile=ParquetFile)
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", pyarrow.parquet)
    yield server
    server.shutdown()
    server.server_close()


def lines(path):
    return [parse_record(line) for line in open(path, "rb")]


# ---- conversion --------------------------------------------------------------------------------------------

def places(value, hub, name):
    """"@a", "&a", "here/..." and ENCODED in lines written by hand -> paths."""
    if isinstance(value, dict):
        return {k: places(v, hub, name) for k, v in value.items()}
    if isinstance(value, list):
        return [places(v, hub, name) for v in value]
    if not isinstance(value, str):
        return value
    digest = hashlib.sha256(f"{hub.url}/pic/{value[1:]}".encode()).hexdigest()
    value = f"media/url/{digest[:2]}/{digest}" if value.startswith("@") else value
    digest = hashlib.sha256(drawn_picture(value[1:])).hexdigest()
    value = f"media/{name}/{digest[:2]}/{digest}" if value.startswith("&") else value
    value = f"media/{name}/{value[5:]}" if value.startswith("here/") else value
    return "media/encoded/" if value == "ENCODED" else value


def in_order(row):
    media = json.dumps(row.get("image") or row.get("images") or row.get("video"))
    media = media[:15] if "/encoded/" in media else media
    return media, row.get("start", -1), row["annotations"][0].get("label", "")


STYLES = {"image_pointing": ("pointing", "point_count"), "counting": ("point_count",),
          "multi_image_pointing": ("multi_image_pointing", "multi_image_point_then_count"),
          "video_pointing": ("video_point", "video_point_count")}


def same(found, wanted, where=""):
    """Whether a line is what was written by hand; capitals stand for what is drawn by lot, and must be one of
    its values."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), (where, found)
        if wanted.get("options") == "OPTIONS":
            assert sorted(found["options"]) == ["a cat", "a cow", "a dog", "a hen"], where
            assert found["options"][found["correct"]] == wanted["correct"], where
            wanted = {k: v for k, v in wanted.items() if k not in ("options", "correct")}
        if wanted.get("task") == "TASK":  # of pixmo-count
            task = "counting" if found["style"] == "point_count" else "image_pointing"
            wanted = wanted | dict(task=task)
        if wanted.get("style") == "STYLE":
            assert found["style"] in STYLES[found["task"]], (where, found)
            wanted = wanted | dict(style=found["style"])
        if wanted.get("label") == "LABEL":
            assert found["label"] in ("cup", "Cup"), where
            wanted = wanted | dict(label=found["label"])
        for k in wanted:
            same(found[k], wanted[k], f"{where}.{k}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), (where, found)
        for i, (f, w) in enumerate(zip(found, wanted)):
            same(f, w, f"{where}[{i}]")
    elif wanted == "media/encoded/":
        assert found.startswith(wanted), (where, found)
    else:
        assert found == wanted and isinstance(found, str) == isinstance(wanted, str), (where, found, wanted)


def put_by_hand(hub, folder, files):
    """What a user downloaded, into the set's folder."""
    for name, value in files.items():
        names = [f"{name}{i:05d}.png" for i in range(value)] if name.endswith("/") else [name]
        for n in names:
            os.makedirs(os.path.dirname(os.path.join(folder, n)), exist_ok=True)
            with open(os.path.join(folder, n), "wb") as f:
                f.write(drawn_picture(n) if name.endswith("/") else hub.content(n, value))


def test_every_shape_goes_from_the_hub_to_two_training_steps(hub, tmp_path, capsys, monkeypatch):
    """A user would lose a set: each converter's lines are as written by hand, `data.py` takes them, stage 2
    trains on them."""
    out = tmp_path / "data"
    for name, served, by_hand, _ in CASES:
        hub.publish(served)
        put_by_hand(hub, os.path.join(out, "eval" * name.startswith("eval/"), "media",
                                      name.removeprefix("eval/")), by_hand)
    names = [name for name, *_ in CASES]
    code = prepare.main(["data", *names, "--out", str(out)])
    text = capsys.readouterr()
    assert code == 0, text.err + text.out
    for name, _, _, wanted in CASES:
        found, wanted = lines(out / f"{name}.jsonl"), places(wanted, hub, name.removeprefix("eval/"))
        assert len({row.pop("id") for row in found}) == len(found)
        for f, w in zip(sorted(found, key=in_order), sorted(wanted, key=in_order), strict=True):
            same(f, w, name)
    used = {r.convert for table, prefix in ((convert.RECIPES, ""), (convert.EVALS, "eval/")) for n,
            r in table.items()
            if prefix + n in names}
    assert used == {r.convert for table in (convert.RECIPES, convert.EVALS) for r in table.values()}
    for needle in ("count and points differ", "image is held out for evaluation", "annotator unsure",
                   "status 404 Not Found", "fps is no multiple", "not the image that was annotated",
                   "more than 60 points", "annotation score below 3", "the video ends before the clip begins",
                   "not in the published schema, the first: ZeroDivisionError"):
        assert needle in text.out, needle
    questions = load_questions(data.find_datasets([str(out / "eval")])[0])
    assert len(questions) == 8 and all(q.masks and q.hits(p, p) for q in questions for p in q.points)
    monkeypatch.setattr(sys, "argv", ["show", str(out), "--max_frames", "4"])
    show.main()
    limits, *told = capsys.readouterr().out.splitlines()
    assert limits.startswith("as sft of small: ")
    assert len(told) == sum(not n.startswith("eval/") for n in names), told
    assert all("records not used: none" in t for t in told), told
    flags = [*QUICK, "--seq_len", "512", "--steps", "2", "--global_batch", "8", "--save_every", "2",
             "--data", str(out)]
    code, text = stage_2(tmp_path, *flags)
    assert code == 0 and "molmo2-videotrack" in text, text
    assert len([row for row in log_of(tmp_path, stage="sft") if row.get("loss", 0) > 0]) == 2


# ---- a connection that breaks ------------------------------------------------------------------------------

ASKED = "allenai/pixmo-ask-model-anything"


def questions(hub, names, sha256=False):
    """A set of one question per picture, and nothing held out."""
    hub.publish({"rows": {(ASKED, "default", "train"): [
        dict(image_url=f"URL/pic/{n}", image_sha256=f"SHA({n})" if sha256 else None, question="Colour?",
             answer=n) for n in names]}})
    for repo, split in (("allenai/pixmo-points-eval", "test"), ("allenai/pixmo-count", "validation"),
                        ("allenai/pixmo-count", "test")):
        hub.rows[repo, "default", split] = []


def ask(out, *more):
    return prepare.main(["data", "pixmo-ask-model-anything", "--out", str(out), *more])


def hang_up(request, length=100, body=b"\x89PNG half of it"):
    """The connection ends in the middle of an answer."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + body)
    request.wfile.flush()
    request.connection.shutdown(2)
    request.close_connection = True
    return True


def vanish(request):
    """The connection ends before there is an answer."""
    request.connection.shutdown(2)
    request.close_connection = True
    return True


def later(request, n):
    """Too busy, said in both ways there are."""
    request.reply(status=(429, 503)[n % 2], Retry_After=("0", "Wed, 21 Oct 2015 07:28:00 GMT")[n % 2])
    return True


def test_a_connection_that_breaks_and_a_busy_server_cost_nothing_but_time(hub, tmp_path, capsys):
    questions(hub, [f"{i:03d}" for i in range(120)], sha256=True)
    struck = collections.Counter()

    def fault(r, n):
        """Every 10th and every 7th request, though not thrice the same: a picture has three tries."""
        if struck[r.path] == 2 or n % 10 and n % 7:
            return False
        struck[r.path] += 1
        return later(r, n) if n % 10 else (hang_up, vanish)[n % 20 == 0](r)

    hub.faults = [fault]
    assert ask(tmp_path) == 0
    assert "120 rows read, 120 lines written" in capsys.readouterr().out and struck.total() > 20
    rows = lines(tmp_path / "pixmo-ask-model-anything.jsonl")
    assert sorted(r["annotations"][0]["answer"] for r in rows) == [f"{i:03d}" for i in range(120)]
    for r in rows:
        assert open(tmp_path / r["image"], "rb").read() == drawn_picture(r["annotations"][0]["answer"])
    hub.faults, before = [], len(hub.log)
    assert ask(tmp_path) == 0 and len(hub.log) == before  # all is here: nothing is asked for


def test_a_host_is_asked_for_a_few_files_at_a_time(hub, tmp_path):
    together = threading.Event()  # nobody has an answer before so many have asked

    def fault(r, n):
        if hub.busy >= fetch.PER_HOST:
            together.set()
        assert together.wait(300)
        time.sleep(0.03)  # for those who would come although they should not

    hub.faults = [fault]
    jobs = [(f"{hub.url}/pic/{i}", str(tmp_path / str(i)), {}) for i in range(40)]
    fetch.fetch_all(prepare.Net(), fetch.Manifest(str(tmp_path / "manifest.jsonl")), jobs, "pictures")
    assert len(os.listdir(tmp_path)) == 41
    assert hub.most == fetch.PER_HOST < fetch.WORKERS


def test_retry_after_is_honoured(hub, monkeypatch):
    answers = iter([dict(status=429, Retry_After="7"), dict(status=200)])
    hub.faults = [lambda r, n: r.reply(**next(answers)) or True]
    waited = []
    monkeypatch.setattr(fetch, "time", SimpleNamespace(sleep=waited.append, time=time.time))
    assert fetch.patiently(lambda: requests.get(hub.url), "a page", pause=0.01).status_code == 200
    assert waited == [7]
    answer = lambda **headers: fetch.retry_after(SimpleNamespace(headers=headers))
    assert answer(RateLimit='"api";r=0;t=55') == 55 and answer(**{"Retry-After": "9999"}) == 300
    assert answer() is None and answer(**{"Retry-After": "soon"}) is None
    hub.faults = [lambda r, n: r.reply(status=503) or True]
    with pytest.raises(prepare.NetError,
                       match="a page: gave up after 3 tries, the last: status 503 Service Unavailable"):
        fetch.patiently(lambda: requests.get(hub.url), "a page", tries=3, pause=4)
    assert len(waited) == 3 and 2 <= waited[1] <= 4 <= waited[2] <= 8  # without a word from the server


def test_what_cannot_be_had_is_counted_by_name_and_not_asked_for_again(hub, tmp_path, capsys, monkeypatch):
    """Dead links, notices in place of pictures and ways into the network cost their rows, never the run."""
    answers = {
        "dead": lambda r: r.reply(b"", 404), "html": lambda r: r.reply(b"<html>We have moved</html>" * 20),
        "inside": lambda r: r.reply(status=302, Location="https://10.0.0.1/secret"),
        "metadata": lambda r: r.reply(status=302, Location="https://169.254.169.254/latest"),
        "plain": lambda r: r.reply(status=302, Location="http://example.com/a.png"),
        "port": lambda r: r.reply(status=302, Location=f"http://127.0.0.1:{hub.server_port - 1}/"),
        "loop": lambda r: r.reply(status=302, Location=r.path), "busy": lambda r: r.reply(status=503),
        "large": lambda r: r.reply(bytes(5000)), "other": lambda r: r.reply(drawn_picture("another"))}
    monkeypatch.setattr(prepare, "IMAGE_BYTES", 4000)
    questions(hub, ["a", *answers], sha256=True)
    for url in ("https://[no URL", "https:///nowhere", "https://nowhere.invalid/a.png", "//a.png"):
        hub.rows[ASKED, "default", "train"].append(dict(image_url=url, question="Colour?", answer="x"))
    known = socket.getaddrinfo

    def without_name_server(host, *more, **options):
        if host == "nowhere.invalid":
            raise socket.gaierror("unknown name")
        return known(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", without_name_server)
    hub.faults = [lambda r, n: (answers.get(r.path.removeprefix("/pic/"), lambda r: None)(r),
                                r.path.removeprefix("/pic/") in answers)[1]]
    assert ask(tmp_path) == 0
    text = capsys.readouterr().out
    assert "15 rows read, 1 lines written" in text
    for reason in ("1 left out: is no URL", "1 left out: no such host", "1 left out: more than 4000 bytes",
                   "1 left out: status 404", "1 left out: not a readable image",
                   "10.0.0.1 is a private address", "169.254.169.254 is a private address",
                   "4 left out: only https is read", "1 left out: more than 5 redirects",
                   "1 left out: gave up after 3 tries, the last: status 503",
                   "1 left out: not the image that was annotated"):
        assert reason in text, text
    manifest = {m["file"]: m for m in map(json.loads, open(tmp_path / "media/manifest.jsonl"))}.values()
    assert len(manifest) == 15 and sum(m["done"] for m in manifest) == 1
    assert all(m["reason"] for m in manifest if not m["done"])
    hub.log.clear()
    assert ask(tmp_path) == 0
    assert set(hub.log) == {"/pic/busy"}  # it may be back; the others are not asked for again
    assert "1 left out: not the image that was annotated" in capsys.readouterr().out


def test_the_token_goes_to_the_hub_and_addresses_are_checked(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    net, seen = prepare.Net(), []
    hub.faults = [lambda r, n: seen.append(r.headers.get("Authorization")) or r.reply(b"{}") or True]
    net.get(hub.url + "/x", "x").close()
    assert seen == ["Bearer hf_secret"]
    elsewhere, told = Hub(b""), lambda r: [r.headers[k] for k in ("Authorization", "x-bill-to", "Range", "User-Agent")]
    hub.faults = [lambda r, n: seen.append(told(r)) or r.reply(status=302, Location=elsewhere.url) or True]
    elsewhere.faults = [lambda r, n: seen.append(told(r)) or r.reply(b"{}") or True]
    with monkeypatch.context() as m:
        m.setattr(net, "allow", lambda url: None)
        net.get(hub.url + "/x", "x", {"x-bill-to": "me", "Range": "bytes=5-"}).close()
    assert seen[1:] == [["Bearer hf_secret", "me", "bytes=5-", net.agent], [None, None, "bytes=5-", net.agent]]
    elsewhere.shutdown()
    elsewhere.server_close()
    for url in ("http://example.com/", "https://127.0.0.1/", "https://localhost/", "https://[::1]/",
                "https://192.168.1.1/", "ftp://a/",
                "file:///etc/passwd", "https://[::ffff:10.0.0.1]/", "https:///x", "https://0.0.0.0/",
                "https://[bad"):
        with pytest.raises(prepare.NetError):
            net.allow(url)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    with pytest.raises(prepare.NetError):
        prepare.Net().allow(hub.url)  # without a mirror on this machine nothing on it is asked
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example")
    with pytest.raises(prepare.UserError, match="must be https"):
        prepare.Net()


def test_a_host_that_never_gives_the_right_file_is_given_up(hub, tmp_path, capsys):
    """Every answer brings something, breaks, and is damaged in the end: that is no progress."""
    size = 1 << 20
    path, asked = put_weights(hub, b"y" * size), []

    def fault(r, n):
        if r.path != path:
            return False
        start = int((r.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        asked.append(start)
        if start:
            return r.reply(bytes(size - start), 206, Content_Range=f"bytes {start}-{size - 1}/{size}") or True
        return hang_up(r, size, bytes(size // 2))

    hub.faults = [fault]
    assert weights(tmp_path) == 1 and "its sha256 is not the one published" in capsys.readouterr().err
    assert [at > 0 for at in asked] == [False, True] * fetch.TRIES


def test_a_host_that_knows_no_ranges_sends_all_of_it_again(hub, tmp_path):
    body = os.urandom(1 << 20)
    path, asked = put_weights(hub, body), []

    def fault(r, n):
        if r.path != path:
            return False
        asked.append(r.headers["Range"])
        return hang_up(r, len(body), body[:len(body) // 2]) if len(asked) == 1 else r.reply(body) or True

    hub.faults = [fault]
    assert weights(tmp_path) == 0 and asked[0] is None and asked[1] > "bytes=1" and len(asked) == 2
    assert open(tmp_path / "Molmo2-8B" / "model.safetensors", "rb").read() == body


@pytest.mark.parametrize("most, refused", [(100, True), (30, False)])
def test_pages_too_large_for_the_server_lose_no_row(hub, tmp_path, most, refused):
    """Large rows make pages the server refuses, or cuts short."""
    hub.rows["allenai/molmo2-hardcodes", "default", "train"] = [dict(questions=[f"Q{i}?"], response="A.")
                                                                for i in range(230)]

    def fault(r, n):
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(r.path).query))
        if refused and int(query["length"]) > 10:
            return r.reply(status=500, X_Error_Code="TooBigContentError") or True
        r.path = r.path.replace(f"length={query['length']}", f"length={min(int(query['length']), most)}")

    hub.faults = [fault]
    assert prepare.main(["data", "molmo2-hardcodes", "--out", str(tmp_path)]) == 0
    asked = [int(r["annotations"][0]["prompt"][1:-1]) for r in lines(tmp_path / "molmo2-hardcodes.jsonl")]
    assert sorted(asked) == list(range(230))


def test_one_picture_in_many_rows_is_one_line(hub, tmp_path, capsys):
    """Tables repeat a picture for each question about it. Also half a character; no picture; a limit."""
    rows = [dict(image={"IMAGE": "abc"[i % 3]}, query=f"Q{i}?", label=[str(i)]) for i in range(15)]
    rows += [dict(rows[0], query="\ud800?"), dict(rows[0], image={"IMAGE": None}), dict(rows[0], image=None)]
    hub.rows["HuggingFaceM4/ChartQA", "default", "train"] = rows
    hub.rows["HuggingFaceM4/ChartQA", "default", "test"] = rows[:1]
    hub.shard = 8
    for limit, told in (([], "18 rows read, 3 lines written"), (["--limit", "15"], "15 rows read, 3 lines")):
        out = tmp_path / str(len(limit))
        hub.log.clear()
        assert prepare.main(["data", "chartqa", "--out", str(out), *limit]) == 0
        assert told in (text := capsys.readouterr().out)
        assert limit or "1 left out: not UTF-8" in text and "2 left out: no image" in text
        assert sum(path.startswith("/shard/") for path in hub.log) == (2 if limit else 3)  # as many as it needs
        found = {r["annotations"][0]["prompt"]: r for r in lines(out / "chartqa.jsonl")}
        assert found.keys() == {"Q0?", "Q1?", "Q2?"}
        for i, r in enumerate(found.values()):
            first = int(r["annotations"][0]["answer"])
            assert open(out / r["image"], "rb").read() == drawn_picture("abc"[first])
            assert [a["answer"] for a in r["annotations"]] == [str(k) for k in range(first, 15, 3)]
        assert len(glob.glob(str(out / "media/chartqa/*/*"))) == 3  # each picture once, though it came five times
        assert prepare.main(["check", str(out), "--bad_rows", str(tmp_path / "bad.jsonl")]) == 0


def test_a_picture_another_set_fetched_is_compared_too(hub, tmp_path, capsys):
    """pixmo-cap has no sha256: what it took for the picture may not be the one whose points are known."""
    questions(hub, ["a", "b"], sha256=True)
    hub.rows["allenai/pixmo-cap", "default", "train"] = [
        dict(image_url=f"{hub.url}/pic/{n}", caption="x", transcripts=[]) for n in "ab"]
    hub.faults = [lambda r, n: r.path == "/pic/a" and (r.reply(drawn_picture("notice")), True)[1]]
    assert prepare.main(["data", "pixmo-cap", "pixmo-ask-model-anything", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "2 rows read, 2 lines written" in text and "2 rows read, 1 lines written" in text
    assert "1 left out: not the image that was annotated" in text and hub.log.count("/pic/a") == 1


def test_terms_that_are_not_accepted_are_said(hub, tmp_path, capsys, monkeypatch):
    """The viewer answers 401 without a token, 404 with one that may not; the hub 401 even if there is nothing."""
    questions(hub, ["a"])
    for status, code, message in ((401, "", ""), (401, "ExternalUnauthenticatedError", "The dataset does not exist"),
                                  (404, "ExternalAuthenticatedError", "not accessible with these credentials"),
                                  (403, "GatedRepo", "Access is restricted")):
        hub.faults = [lambda r, n: r.path.startswith("/rows") and (r.refuse(status, code, message), True)[1]]
        assert ask(tmp_path) == 1
        text = capsys.readouterr().err
        assert all(part in text for part in (f"status {status}", code, message, "behind terms", "HF_TOKEN")), text
    hub.faults = [lambda r, n: "Authorization" not in r.headers and r.path.startswith("/rows")
                  and (r.reply(status=401), True)[1]]
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert ask(tmp_path) == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ask(tmp_path) == 0  # all is here
    assert ask(tmp_path / "elsewhere") == 1 and "HF_HUB_OFFLINE is set" in capsys.readouterr().err


# ---- what the hub really serves ----------------------------------------------------------------------------

HARD = "allenai/molmo2-hardcodes"


def identities(hub, n, config="default", split="train"):
    hub.rows[HARD, config, split] = [dict(questions=[f"Q{i}?"], response="A.") for i in range(n)]


def hardcodes(out, *more):
    """(exit code, the numbers of the rows that came)"""
    code = prepare.main(["data", "molmo2-hardcodes", "--out", str(out), *more])
    path = out / "molmo2-hardcodes.jsonl"
    found = lines(path) if path.exists() else []
    return code, sorted(int(r["annotations"][0]["prompt"][1:-1]) for r in found)


def test_a_set_that_was_renamed_is_followed(hub, tmp_path, capsys):
    """Rows and parquet files; the hub leads to the new name, the viewer only says that there is one."""
    identities(hub, 30)
    hub.rows["new-owner/hardcodes_2.0", "default", "train"] = hub.rows.pop((HARD, "default", "train"))
    hub.rows["new/ChartQA", "default", "train"] = [dict(image={"IMAGE": "a"}, query="How many?", label=["1"])]
    hub.renamed = {HARD: "new-owner/hardcodes_2.0", "HuggingFaceM4/ChartQA": "new/ChartQA"}
    assert hardcodes(tmp_path) == (0, list(range(30)))
    assert "is now new-owner/hardcodes_2.0 default train" in capsys.readouterr().out
    assert sum(path.startswith("/api/") for path in hub.log) == 2  # asked once, and led on
    assert prepare.main(["data", "chartqa", "--out", str(tmp_path)]) == 0
    for name in (HARD, "../../secret"):  # renamed to itself, and to no name
        hub.log.clear()
        hub.renamed = {HARD: name}
        answer = json.dumps(dict(id=name)).encode()
        hub.faults = [lambda r, n: r.path.startswith("/api/") and (r.reply(answer), True)[1]]
        assert hardcodes(tmp_path / "again")[0] == 1 and len(hub.log) == 2
        assert "RenamedDatasetError: The dataset has been renamed" in capsys.readouterr().err


def test_one_row_that_the_viewer_cannot_read_costs_that_row(hub, tmp_path, capsys):
    identities(hub, 230)
    hub.broken = {(HARD, "default", "train", i) for i in (7, 110, 111, 229)}
    wanted = [i for i in range(230) if i not in (7, 110, 111, 229)]
    assert hardcodes(tmp_path / "a") == (0, wanted)
    text = capsys.readouterr().out
    assert "226 rows read" in text and "4 left out: the hub cannot read the row" in text
    # with others of its kind: no code at all; a page that the server cuts short; the only row
    def fault(r, n):
        r.path = r.path.replace("offset=0&length=100", "offset=0&length=5")
        return r.path.endswith("offset=50&length=1") and (r.reply(status=500), True)[1]

    hub.faults = [fault]
    hub.broken.add((HARD, "default", "train", 50))
    assert hardcodes(tmp_path / "b") == (0, [i for i in wanted if i != 50])
    assert "5 left out: the hub cannot read the row" in capsys.readouterr().out
    # a server that is busy for one row: the row is not lost, the next run has it
    hub.faults = [lambda r, n: r.path.endswith("offset=112&length=1")
                  and (r.refuse(500, "ResponseNotReady", "busier than usual"), True)[1]]
    assert hardcodes(tmp_path / "d") == (1, []) and "ResponseNotReady: busier" in capsys.readouterr().err
    hub.broken, hub.faults = {(HARD, "default", "train", 0)}, []
    assert hardcodes(tmp_path / "c", "--limit", "1")[0] == 1
    assert "1 left out: the hub cannot read the row" in capsys.readouterr().out


@pytest.mark.parametrize("status, code", [(500, "TransformRowsProcessingError"), (500, "ResponseNotReady"), (503, ""),
                                          (501, "DatasetWithScriptNotSupportedError")])
def test_a_server_in_trouble_is_no_broken_row(hub, tmp_path, capsys, monkeypatch, status, code):
    """What fails for every row is said, not counted away row by row; and what will never work is not tried again."""
    identities(hub, 230)
    hub.faults = [lambda r, n: r.path.startswith("/rows") and (r.refuse(status, code, "no rows"), True)[1]]
    monkeypatch.setattr(fetch, "PAUSE", 0.001)
    assert hardcodes(tmp_path) == (1, [])
    text = capsys.readouterr().err
    assert f"status {status}" in text and f"{code}: no rows".removeprefix(": ") in text
    assert len(hub.log) < 40 and (status != 501 or len(hub.log) == 12)


def test_a_config_of_another_name_is_found_by_its_split(hub, tmp_path, capsys):
    identities(hub, 5, "main")
    identities(hub, 9, "other", "validation")
    assert hardcodes(tmp_path / "a") == (0, list(range(5)))
    assert f"{HARD} default train: is now {HARD} main train" in capsys.readouterr().out
    identities(hub, 9, "second")  # two have it: nobody chooses for the user
    assert hardcodes(tmp_path / "b")[0] == 1
    text = capsys.readouterr().err
    assert "ResponseNotFound" in text and "its configs and splits: main train, other validation, second train" in text
    hub.rows.clear()
    hub.rows["allenai/Molmo2-VideoCapQA", "CapQA", "train"] = [dict(
        video_id="v1", Question="What?", Answer="a dog", NegativeAnswers=["a cat"], Category="x")]
    hub.rows["allenai/Molmo2-VideoCapQA", "LongCapQA", "train"] = [dict(video_id="v1", qa_list=[])]
    hub.files["allenai/Molmo2-VideoCapQA", "youtube_id_to_urls_mapping.json"] = json.dumps(
        dict(v1=dict(gcp_url=f"{hub.url}/cc/v1/v1.mkv"))).encode()
    assert prepare.main(["data", "molmo2-videocapqa", "--out", str(tmp_path)]) == 0
    assert "1 rows read, 1 lines" in capsys.readouterr().out
    hub.rows["HuggingFaceM4/ChartQA", "main", "train"] = [dict(image={"IMAGE": "a"}, query="How many?", label=["1"])]
    assert prepare.main(["data", "chartqa", "--out", str(tmp_path)]) == 0  # by its parquet files, too


def test_tables_that_other_tables_make_up(hub, tmp_path, capsys):
    """VideoPoint without its default: its eight parts. VideoTrackEval without its five: the default, filtered."""
    repo = "allenai/Molmo2-VideoPoint"
    row = dict(question="?", label="dog", count=1, two_fps_timestamps=[0.5], points=[[dict(x=40.1, y=60.2)]],
               annotator_unsure=False, video_duration=2.0, video_source="youtube", clip_start=None, clip_end=None)
    for config in ("action_or_event", "animal", "anomaly", "comparative reference", "indirect reference", "object",
                   "referring expression", "spatial reference", "count 0-5"):
        hub.rows[repo, config, "train"] = [dict(row, video_id="v1", label=config)]
    hub.files[repo, "youtube_id_to_urls_mapping.json"] = json.dumps(
        dict(v1=dict(gcp_url=f"{hub.url}/cc/v1/v1.mkv"))).encode()
    hub.files[repo, "generated_videos/sora2.tar.gz"] = hub.content("a.tar.gz", {})
    assert prepare.main(["data", "molmo2-videopoint", "--out", str(tmp_path)]) == 0
    assert "8 rows read, 1 lines" in capsys.readouterr().out
    labels = {a["label"] for r in lines(tmp_path / "molmo2-videopoint.jsonl") for a in r["annotations"]}
    assert len(labels) == 8 and "count 0-5" not in labels
    track = dict(video="w", clip="w_0", exp="the dog", mask_id=["0"], start_frame=0, end_frame=19, w=48, h=32, fps=10,
                 points=[dict(object_id="0", points=[[24.0, 8.0]])], masks=[])
    hub.rows["allenai/Molmo2-VideoTrackEval", "default", "test"] = [
        dict(track, video_dataset=name, exp=name) for name in ("APTv2", "dancetrack", "mose", "sav")]
    put_by_hand(hub, str(tmp_path / "eval/media/molmo2-videotrackeval"), {"w_0.mp4": "film"})
    assert prepare.main(["data", "eval/molmo2-videotrackeval", "--out", str(tmp_path)]) == 0
    labels = [a["label"] for r in lines(tmp_path / "eval/molmo2-videotrackeval.jsonl") for a in r["annotations"]]
    assert labels == ["APTv2", "dancetrack", "sav"] and "1 left out: of another set" in capsys.readouterr().out


def test_what_is_only_a_part_of_a_table_is_said(hub, tmp_path, capsys):
    identities(hub, 20)
    hub.rows["HuggingFaceM4/ChartQA", "default", "train"] = [dict(image={"IMAGE": "a"}, query="?", label=["1"])] * 3
    hub.partial = set(hub.rows)
    assert prepare.main(["data", "molmo2-hardcodes", "chartqa", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"20 rows are all that the hub offers of {HARD} default train: partial" in text
    assert "3 rows are all that the hub offers of HuggingFaceM4/ChartQA default train: partial" in text
    assert prepare.main(["list", "--out", str(tmp_path)]) == 0
    partial = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("lines, partial")]
    assert partial == ["chartqa", "molmo2-hardcodes"]
    assert prepare.main(["data", "molmo2-hardcodes", "--out", str(tmp_path), "--limit", "5"]) == 0
    assert "partial" not in capsys.readouterr().out  # of five nothing is missing


def test_images_in_rows_are_those_of_the_set_or_none(hub, tmp_path, capsys, monkeypatch):
    """The viewer's are made anew, at JPEG quality 75: text in charts would be blurred."""
    hub.rows["HuggingFaceM4/ChartQA", "default", "train"] = [
        dict(image={"IMAGE": f"p{i}"}, query="How many?", label=["1"]) for i in range(3)]
    with monkeypatch.context() as m:
        without_pyarrow(m)
        for limit in ([], ["--limit", "1"]):
            assert prepare.main(["data", "chartqa", "--out", str(tmp_path), *limit]) == 2
            assert "needs pyarrow (pip install pyarrow)" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "chartqa.jsonl") and not hub.log
    assert prepare.main(["data", "chartqa", "--out", str(tmp_path)]) == 0
    images = {open(tmp_path / r["image"], "rb").read() for r in lines(tmp_path / "chartqa.jsonl")}
    assert images == {drawn_picture(f"p{i}") for i in range(3)}
    assert not any("cached-assets" in path or path.startswith("/rows") for path in hub.log)
    assert "status 404" in fetch_failure(lambda: list(fetch.hub_rows(prepare.Net(), "no/where", "default", "train",
                                                                     images=True)))


def fetch_failure(do):
    with pytest.raises(prepare.NetError) as e:
        do()
    return str(e.value)


def test_real_parquet_files_are_read(hub, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow, which the project does not")
    import pyarrow.parquet
    rows = [dict(image=dict(bytes=drawn_picture("a"), path="a.png"), query=f"Q{i}?", label=["1"]) for i in range(70)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), str(tmp_path / "x.parquet"), row_group_size=30)
    body = (tmp_path / "x.parquet").read_bytes()
    hub.rows["HuggingFaceM4/ChartQA", "default", "train"] = []
    hub.faults = [lambda r, n: r.path.startswith("/shard/") and (r.ranged(body), True)[1]]
    assert prepare.main(["data", "chartqa", "--out", str(tmp_path), "--limit", "65"]) == 0
    row, = lines(tmp_path / "chartqa.jsonl")
    assert len(row["annotations"]) == 65 and (tmp_path / row["image"]).read_bytes() == drawn_picture("a")
    body = b"<html>"
    assert prepare.main(["data", "chartqa", "--out", str(tmp_path / "b")]) == 1


def test_a_large_table_without_pyarrow_comes_by_pages_that_outlive_a_stop(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetch, "WHOLE", 50)
    identities(hub, 1230)
    with monkeypatch.context() as m:
        without_pyarrow(m)
        hub.faults = [lambda r, n: "offset=700" in r.path and (r.reply(status=429), True)[1]]
        assert hardcodes(tmp_path) == (1, [])
        out, err = capsys.readouterr()
        assert "1,230 rows, 100 to a page: about 1 min," in out and "`pip install pyarrow`" in out
        assert "status 429" in err
        hub.faults = []
        before = sum("offset=300" in path for path in hub.log)
        assert hardcodes(tmp_path) == (0, list(range(1230)))
        assert before == 1 == sum("offset=300" in path for path in hub.log)  # what had come is not asked for again
        assert not os.path.exists(tmp_path / ".work/hub/allenai--molmo2-hardcodes")
        assert hardcodes(tmp_path / "b", "--limit", "210") == (0, list(range(210)))
    hub.log.clear()
    assert hardcodes(tmp_path / "c") == (0, list(range(1230)))
    assert sum(path.startswith("/rows") for path in hub.log) == 1  # the rest are parquet files
    assert "page" not in capsys.readouterr().out.splitlines()[-1]


def test_hosts_learn_who_asks_and_those_that_refuse_are_asked_another_day(hub, tmp_path, capsys, monkeypatch):
    """Wikimedia's host refuses a library's default name; what it refused is there once it has another."""
    questions(hub, ["a", "b"])
    hub.faults = [lambda r, n: r.path == "/pic/b" and "me@example.org" not in r.headers["User-Agent"]
                  and (r.reply(status=403), True)[1]]
    assert ask(tmp_path) == 0 and "2 rows read, 1 lines written" in (text := capsys.readouterr().out)
    assert "1 left out: status 403" in text
    assert hub.agents == {fetch.user_agent()} and f"(+{fetch.PROJECT})" in fetch.user_agent()
    monkeypatch.setenv("NANOMOLMO2_CONTACT", "me@example.org")
    assert ask(tmp_path) == 0 and "2 rows read, 2 lines written" in capsys.readouterr().out
    monkeypatch.setenv("NANOMOLMO2_CONTACT", "me\r\nX-Evil: 1")
    with pytest.raises(prepare.UserError, match="NANOMOLMO2_CONTACT"):
        prepare.Net()


def test_the_longest_common_tail_decides_among_files_of_one_name(tmp_path):
    for path in ("gqa/images/7.jpg", "vg/VG_100K/7.jpg", "vg/other/8.jpg", "coco/8.png", "a/b/v1.mp4", "b/v1.mp4"):
        os.makedirs(os.path.dirname(tmp_path / "m" / path), exist_ok=True)
        (tmp_path / "m" / path).touch()
    shelf = prepare.Shelf(str(tmp_path), "m")
    for ref, found in (("root/train/gqa/images/7.jpg", "m/gqa/images/7.jpg"), ("VG_100K/7", "m/vg/VG_100K/7.jpg"),
                       ("x/y/7.jpg", None), ("train2017/8.jpg", None), ("other/8.jpg", "m/vg/other/8.jpg"),
                       ("v1", "m/b/v1.mp4"), ("x/a/b/v1.mp4", "m/a/b/v1.mp4"), ("x/b/v1.mp4", None), ("9.jpg", None)):
        assert shelf.file(ref) == found, ref


# ---- weights: large files ----------------------------------------------------------------------------------

def put_weights(hub, body):
    hub.files = {("allenai/Molmo2-8B", "model.safetensors"): body,
                 ("allenai/Molmo2-8B", "pytorch_model.bin"): b"a pickle",
                 ("allenai/Molmo2-8B", "modeling.py"): b"code"}
    return "/allenai/Molmo2-8B/resolve/c0ffee00aa/model.safetensors"


def weights(out):
    return prepare.main(["weights", "Molmo2-8B", "--out", str(out)])


def test_a_large_file_survives_what_connections_do(hub, tmp_path, capsys):
    """Broken every 400 kB, a range ignored, a signed link expired, once damaged on the way: whole and right
    in the end."""
    body = os.urandom(1 << 20)
    path, seen = put_weights(hub, body), []

    def fault(r, n):
        if r.path not in (path, "/signed"):
            return False
        at = int((r.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        seen.append(at)
        if r.path == path:
            return r.reply(status=302, Location="/signed") or True
        if len(seen) in (6, 8):
            return r.reply(status=403) or True
        start = 0 if len(seen) == 14 else at  # the range is ignored: all from the start
        r.send_response(206 if start else 200)
        if start:
            r.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        r.send_header("Content-Length", str(len(body) - start))
        r.end_headers()
        part = body[start:start + 400_000]
        r.wfile.write(bytes(5) + part[5:] if len(seen) < 5 else part)  # the first parts are damaged
        r.wfile.flush()
        if start + 400_000 < len(body):
            r.connection.shutdown(2)
            r.close_connection = True
        return True

    hub.faults = [fault]
    assert weights(tmp_path) == 0
    folder = tmp_path / "Molmo2-8B"
    assert open(folder / "model.safetensors", "rb").read() == body
    assert os.listdir(folder) == ["model.safetensors"]  # no pickle, no code
    # Three pieces, the last refused twice; damaged, so again from the start; the second piece came as the
    # first.
    assert [at // 393_216 for at in seen[::2]] == [0, 1, 2, 2, 2, 0, 1, 1, 2]
    assert f"--init_from {folder}" in capsys.readouterr().out


@pytest.mark.parametrize("left, sent", [(0, 0), (5, 1000)])
def test_a_file_that_was_whole_before_it_was_renamed(hub, tmp_path, left, sent):
    """Killed at the very end, all of it is there and nothing is sent; what is longer is thrown away."""
    path = put_weights(hub, b"y" * 1000)
    os.makedirs(tmp_path / "Molmo2-8B")
    (tmp_path / "Molmo2-8B" / "model.safetensors.c0ffee00.part").write_bytes(b"y" * (1000 + left))
    assert weights(tmp_path) == 0 and hub.sent[path] == sent
    assert open(tmp_path / "Molmo2-8B" / "model.safetensors", "rb").read() == b"y" * 1000


@pytest.mark.parametrize("answer, told", [
    (b"<html>", "the answer is not JSON: b'<html>'"), (b'{"error": "?"}', "the answer has no rows"),
    (b"[" * 100_000, "the answer is not JSON"), (None, "the connection broke 5 times")])
def test_rows_that_are_none_are_named(hub, tmp_path, capsys, answer, told):
    hub.faults = [lambda r, n: hang_up(r) if answer is None else r.reply(answer) or True]
    assert prepare.main(["data", "molmo2-hardcodes", "--out", str(tmp_path)]) == 1
    assert f"molmo2-hardcodes: rows 0 of allenai/molmo2-hardcodes: {told}" in capsys.readouterr().err


def test_the_video_mirror_is_told_who_pays_and_nobody_else(hub, tmp_path, capsys, monkeypatch):
    repo = "allenai/Molmo2-AskModelAnything"
    hub.rows[repo, "default", "HumanQA"] = [dict(video_id="v1", question="What?", answer="A dog.")]
    hub.files[repo, "youtube_id_to_urls_mapping.json"] = json.dumps(
        dict(v1=dict(gcp_url=f"{hub.url}/cc/v1/v1.mkv"))).encode()
    hub.faults = [lambda r, n: r.path.startswith("/cc") and (r.reply(b"UserProjectMissing", 400), True)[1]]
    assert prepare.main(["data", "molmo2-askmodelanything", "--out", str(tmp_path)]) == 1
    assert "set GOOGLE_CLOUD_PROJECT and GOOGLE_OAUTH_TOKEN" in (text := capsys.readouterr().out)
    assert "1 left out: status 400" in text
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "mine")
    monkeypatch.setenv("GOOGLE_OAUTH_TOKEN", "secret")
    assert prepare.billing("https://storage.googleapis.com/b/cc/v1/v1.mkv") == {
        "x-goog-user-project": "mine", "Authorization": "Bearer secret"}
    for url in (f"{hub.url}/cc/v1/v1.mkv", "https://storage.googleapis.com.evil.example/x",
                "http://storage.googleapis.com/x"):
        assert prepare.billing(url) == {}


@pytest.mark.parametrize("what, served, told", [
    ("size", b"short", "5 bytes instead of 1000"),
    ("sha256", b"x" * 1000, "its sha256 is not the one published"),
    ("gated", None, "behind terms")])
def test_a_large_file_that_is_not_the_published_one_is_no_file(hub, tmp_path, capsys, what, served, told):
    path = put_weights(hub, b"y" * 1000)
    hub.faults = [lambda r, n: r.path == path and (r.reply(served) if served else r.reply(status=403),
                                                   True)[1]]
    assert weights(tmp_path) == 1
    assert told in capsys.readouterr().err and os.listdir(tmp_path / "Molmo2-8B") == []


def test_killed_in_the_middle_the_next_run_fetches_the_rest(hub, tmp_path):
    """kill -9: what was written counts. The server counts the bytes it is asked for."""
    body, gate = os.urandom(6 << 20), threading.Event()
    path = put_weights(hub, body)

    def fault(r, n):
        if r.path != path or gate.is_set():
            return False
        r.send_response(200)
        r.send_header("Content-Length", str(len(body)))
        r.end_headers()
        r.wfile.write(body[:4 << 20])
        r.wfile.flush()
        gate.wait(300)  # and not a byte more
        return True

    hub.faults = [fault]
    p = subprocess.Popen([sys.executable, "-m", "tools.prepare", "weights", "Molmo2-8B", "--out",
                          str(tmp_path)], cwd=ROOT)
    part = tmp_path / "Molmo2-8B" / "model.safetensors.c0ffee00.part"
    until = time.monotonic() + 300
    while not (os.path.exists(part) and os.path.getsize(part) >= 3 << 20) and time.monotonic() < until:
        time.sleep(0.05)
    p.send_signal(signal.SIGKILL)
    p.wait()
    have = os.path.getsize(part)
    gate.set()
    hub.sent.clear()
    assert 3 << 20 <= have < len(body) and weights(tmp_path) == 0
    assert hub.sent[path] == len(body) - have
    assert open(tmp_path / "Molmo2-8B" / "model.safetensors", "rb").read() == body


def test_weights_that_were_fetched_load(hub, tmp_path):
    """A folder fetched file by file is one that --init_from takes."""
    tiny_model().save_pretrained(str(tmp_path / "made"))
    hub.files = {("allenai/Molmo2-8B", n): open(tmp_path / "made" / n, "rb").read()
                 for n in os.listdir(tmp_path / "made")}
    assert weights(tmp_path / "w") == 0
    Molmo2.from_pretrained(str(tmp_path / "w" / "Molmo2-8B"))


def test_stage_1_starts_from_a_language_model_and_siglip_as_fetched(hub, tmp_path, capsys):
    for repo, made in (("allenai/OLMo-2-0425-1B", "olmo2-tiny"),
                       ("google/siglip2-so400m-patch14-384", "siglip-tiny")):
        for n in ("config.json", "model.safetensors"):
            hub.files[repo, n] = open(os.path.join(HERE, "golden", made, n), "rb").read()
    assert prepare.main(["weights", "stage1", "--out", str(tmp_path)]) == 0
    flag, *folders = capsys.readouterr().out.splitlines()[-1].split()
    assert flag == "--init_from" and len(folders) == 2
    Molmo2.from_pretrained(*folders)


def test_a_full_disk_is_said_before(hub, tmp_path, capsys, monkeypatch):
    put_weights(hub, b"y" * 1000)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda p: collections.namedtuple("Usage", "free")(10_000))
    assert weights(tmp_path) == 2 and "GB free" in capsys.readouterr().err


# ---- files that are not what they seem ---------------------------------------------------------------------

def archive(path, members, kind="zip"):
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for name, content in members:
                z.writestr(name, content)
    else:
        with tarfile.open(path, "w") as t:
            for name, content in members:
                info = tarfile.TarInfo(name)
                if isinstance(content, str):
                    info.type, info.linkname = tarfile.SYMTYPE, content
                    t.addfile(info)
                else:
                    info.size = len(content)
                    t.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", ["../out.png", "/out.png", "a/../../out.png"])
def test_archives_stay_in_their_folder(tmp_path, kind, name):
    os.makedirs(tmp_path / "in")
    with pytest.raises(prepare.BadMedia):
        prepare.unpack(archive(tmp_path / "a", [(name, b"x")], kind), str(tmp_path / "in"))
    assert os.listdir(tmp_path / "in") == []


def test_a_broken_archive_is_named(hub, tmp_path, capsys):
    hub.rows["allenai/molmo2-mantis-instruct-nlvr2", "default", "train"] = [dict(
        images=["a.png", "b.png"], mc_question=[""], choices=[[]], correct_choice_idx=[None],
        oe_question=["Why?"], direct_answer=["so"])]
    hub.files["TIGER-Lab/Mantis-Instruct", "nlvr2/train_images.zip"] = b"PK\x03\x04" + bytes(100)
    assert prepare.main(["data", "nlvr2", "--out", str(tmp_path)]) == 1
    assert "train_images.zip: a broken archive" in capsys.readouterr().err


def test_archives_bring_no_links_and_no_bombs(tmp_path, monkeypatch):
    folder = str(tmp_path / "in")
    prepare.unpack(archive(tmp_path / "a", [("link", "/etc/passwd"), ("a.txt", b"x")], "tar"), folder)
    assert os.listdir(folder) == ["a.txt"]
    with pytest.raises(prepare.BadMedia):  # through a link that lies there
        os.symlink(tmp_path, os.path.join(folder, "way"))
        prepare.unpack(archive(tmp_path / "b", [("way/out", b"x")], "tar"), folder)
    monkeypatch.setattr(prepare, "GROWTH", 0)
    with pytest.raises(prepare.BadMedia, match="times its size"):
        prepare.unpack(archive(tmp_path / "c", [("big", bytes(5 << 20))]), folder)
    monkeypatch.setattr(prepare, "GROWTH", 3 << 20)  # many small ones in one: together they may not either
    inner = open(archive(tmp_path / "d", [("big", bytes(1 << 20))]), "rb").read()
    many = archive(tmp_path / "e", [(f"{i}/x.zip", inner) for i in range(5)])
    with pytest.raises(prepare.BadMedia, match="times its size"):
        prepare.unpack(many, str(tmp_path / "f"))
    assert len(glob.glob(str(tmp_path / "f/*/big"))) == 3


def test_json_is_read_in_each_of_its_layouts(tmp_path):
    rows = [dict(a=[1, {"b": "},]{"}], c="\u00e9\\\""), dict(a=2)]
    named = [dict(_key="x", **rows[0]), dict(_key="y", **rows[1])]
    for value, wanted in ((rows, rows), (dict(info="x", data=rows), rows), (dict(x=rows[0], y=rows[1]), named),
                          ([], [])):
        (tmp_path / "x.json").write_text(json.dumps(value))
        assert prepare.json_items(str(tmp_path / "x.json")) == wanted
    for text in ("[{", '[{"a": 1}', "3", "", "[" * 100_000):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(prepare.BadRecord):
            list(prepare.file_rows(str(tmp_path / "x.json")))


def test_masks_written_as_text_are_read():
    """COCO's text, from hand: 5, 3, 2 as they are; 10 as 7 more than 3; 1 as one less than 2; 100 in two
    characters."""
    assert convert.unpacked(dict(size=[3, 7], counts="5327O"))["counts"] == [5, 3, 2, 10, 1]
    assert convert.unpacked(dict(size=[10, 10], counts="T3"))["counts"] == [100]
    assert convert.runs([[False, True], [True, True]]) == dict(size=[2, 2], counts=[1, 3])
    assert convert.runs([[True, False]]) == dict(size=[1, 2], counts=[0, 1, 1])


# ---- the whole ---------------------------------------------------------------------------------------------

def test_no_set_of_the_registry_is_neither_converted_nor_explained(hub, tmp_path, capsys):
    """All 103: a recipe for each; by hand means that it is said where from, and under which licence."""
    registry = read_registry()
    assert len(registry) == 103 and registry.keys() == convert.RECIPES.keys()
    for name, recipe in convert.RECIPES.items():
        assert callable(recipe.convert) and recipe.media in prepare.MEDIA_FROM, name
        assert recipe.media != "hand" or len(registry[name]["by_hand"]) > 10, name
        assert recipe.media != "archive" or recipe.archives, name
        assert recipe.rows or registry[name]["source"] != "manual", name
    assert prepare.main(["list", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in text[1:104]] == list(registry) and text[-1].startswith("103 sets")
    by_hand = [n for n, r in convert.RECIPES.items() if r.media == "hand"]
    assert prepare.main(["data", *by_hand, "--out", str(tmp_path)]) == 1  # nothing to train on yet
    told, err = capsys.readouterr()
    assert [line.split(":")[0] for line in told.splitlines()] == by_hand and not err and not hub.log
    assert all(w in line for line in told.splitlines() for w in ("Where from:", "Licence:", "Put the media"))


@pytest.mark.parametrize("argv, told", [
    (["data", "pixmo"], "pixmo: no set, group or stage"),
    (["weights", "GPT"], "GPT: not one of stage1, Molmo2-8B"),
    (["data", "pixmo-cap", "--limit", "0"], "--limit 0"), (["check", "nowhere"], "nowhere"),
    (["check", ".", "--workers", "0"], "--workers 0"),
    (["data", "pixmo-cap", "--lim", "1"], "--lim"),
    (["lst"], "lst")])
def test_mistakes_are_one_line(argv, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = prepare.main(argv)
    except SystemExit as e:
        code = e.code
    assert code == 2 and told in capsys.readouterr().err


def test_another_unit_than_expected_stops_a_set(hub, tmp_path, capsys):
    """Points in pixels where per cent are published would train a model to point into corners."""
    questions(hub, [])
    hub.rows["allenai/pixmo-points", "default", "train"] = [hub.fill(dict(
        image_url="URL/pic/a", image_sha256="SHA(a)", label="cup", points=[dict(x=300.0 + i, y=200.0)],
        count=1)) for i in range(5)]
    assert prepare.main(["data", "pixmo-points", "--out", str(tmp_path)]) == 2
    assert "10 of 10 coordinates are off the image" in capsys.readouterr().err


def test_columns_that_changed_are_named(hub, tmp_path, capsys):
    hub.rows["HuggingFaceM4/ChartQA", "default", "train"] = [dict(picture=None, asks="?")]
    assert prepare.main(["data", "chartqa", "--out", str(tmp_path)]) == 1
    assert "its columns: picture, asks" in capsys.readouterr().out


def test_a_spool_gives_each_image_once(tmp_path, monkeypatch):
    """Or annotations of one image would not be on one line; and many together, as they are fetched together."""
    items = [dict(image=f"{i % 97}", annotations=[dict(answer=i)]) for i in range(970)]
    spool = prepare.Spool(str(tmp_path / "spool"))
    spool.fill(lambda counts: items, "key")
    assert [len(piece) for piece in spool.pieces()] == [97]
    monkeypatch.setattr(prepare, "AT_ONCE", 5)
    pieces = list(spool.pieces())
    assert len(pieces) > 10 and min(map(len, pieces[:-1])) >= 5
    found = {item["image"]: [a["answer"] for a in item["annotations"]] for piece in pieces for item in piece}
    assert found == {f"{k}": list(range(k, 970, 97)) for k in range(97)} and sum(map(len, pieces)) == 97


def test_many_rows_convert_in_little_memory(hub, tmp_path):
    """3,000 rows of 1.6 KB in 6 MB, the hub's side included: they are not held; a page takes 4 MB. Nothing of it is
    what the first conversion of a process loads, which differs between PyTorch's builds."""
    messages = lambda i: [dict(role="user", content=f"{i} " + "word " * 100),
                          dict(role="assistant", content="answer " * 150)]
    hub.rows["allenai/tulu-v2-sft-mixture", "default", "train"] = [
        dict(dataset="flan", id=str(i), messages=messages(i)) for i in range(3000)]
    before = ["data", "tulu-v2-sft-mixture", "--out", str(tmp_path / "before"), "--limit", "3"]
    assert prepare.main(before) == 0
    tracemalloc.start()
    try:
        assert prepare.main(["data", "tulu-v2-sft-mixture", "--out", str(tmp_path), "--limit", "3000"]) == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20
    with open(tmp_path / "tulu-v2-sft-mixture.jsonl") as f:
        assert sum(1 for _ in f) == 3000


# ---- check -------------------------------------------------------------------------------------------------

def test_check_counts_what_is_wrong(tmp_path, capsys):
    """A user would train on broken, doubled or empty pictures."""
    film, rows = video(tmp_path / "a.mp4"), []
    for n in "abcdefgh":
        picture(str(tmp_path / f"{n}.png"), (10 * ord(n) % 255, 0, 0))
        rows.append(dict(id=n, image=f"{n}.png", width=30, height=24,
                         annotations=[dict(task="image_caption", answer=n)]))
    point = dict(task="video_pointing", label="dot", points=[dict(t=1.0, x=0, y=0, id=0)])
    rows.append(dict(id="v", video="a.mp4", width=48, height=32, duration=2.0, annotations=[point]))
    bad = tmp_path / "bad.jsonl"
    write_lines(tmp_path / "rows.jsonl", rows)
    check = lambda: prepare.main(["check", str(tmp_path / "rows.jsonl"), "--bad_rows", str(bad)])
    assert check() == 0 and "all is well" in capsys.readouterr().out and os.path.getsize(bad) == 0
    with open(tmp_path / "a.png", "rb+") as f:
        f.truncate(60)
    with open(tmp_path / "b.png", "wb") as f:
        f.write(b"<html>")
    os.remove(tmp_path / "c.png")
    picture(str(tmp_path / "d.png"), "red", (31, 24))
    for n in "12345":
        picture(str(tmp_path / f"gone{n}.png"), "gray")
    rows += [dict(rows[4], id="twice"), dict(rows[0], image="../out.png"), "{",
             dict(rows[8], id="longer", duration=3.0),
             dict(rows[8], id="late", annotations=[dict(point, points=[dict(t=9, x=0, y=0, id=0)])])]
    rows += [dict(rows[0], id=n, image=f"gone{n}.png") for n in "12345"]
    write_lines(tmp_path / "rows.jsonl", rows)
    assert check() == 1
    found = collections.Counter((r["line"], r["reason"]) for r in map(json.loads, open(bad)))
    reasons = collections.Counter(reason.split(" ")[0] for _, reason in found)
    assert reasons == {"truncated": 1, "not": 1, "no": 1, "another": 2, "duplicate": 1, "media": 1,
                       "malformed": 1, "point": 1,
                       "placeholder": 5}, found
    assert sorted(line for line, _ in found) == [1, 2, 3, 4,
                                                 *range(10, 20)] and "14 bad lines" in capsys.readouterr().out
    assert film


@pytest.mark.parametrize("turn", TURNS)
def test_the_size_of_a_video_is_that_in_which_it_is_seen(tmp_path, capsys, turn):
    """A phone held upright writes its frames lying: masks and points are in those that stand."""
    matrix, (height, width), _ = TURNS[turn]
    turned_video(tmp_path / "a.mp4", matrix)
    caption = dict(task="video_caption", answer="a")
    prepared = SimpleNamespace(root=str(tmp_path))
    fields, _ = prepare.Maker.video_fields(prepared, dict(annotations=[caption]), "a.mp4", None)
    assert fields == dict(video="a.mp4", width=width, height=height, duration=1.1, fps=10.0)
    for size, said in ((dict(width=width, height=height), "all is well"),
                       (dict(width=height, height=width), "another size")):
        path = write_lines(tmp_path / "rows.jsonl", [dict(fields, **size, annotations=[caption])])
        prepare.main(["check", path, "--bad_rows", str(tmp_path / "bad.jsonl")])
        assert said in capsys.readouterr().out


def test_the_real_media_pass_and_a_corrupted_copy_fails(tmp_path, capsys):
    copy = str(tmp_path / "media")
    prepare.shutil.copytree(shared("media"), copy)
    bad = ["--bad_rows", str(tmp_path / "bad.jsonl")]
    assert prepare.main(["check", copy, *bad]) == 0
    with open(os.path.join(copy, "truck.jpg"), "rb+") as f:
        f.truncate(20_000)
    with open(os.path.join(copy, "juggle.mp4"), "rb+") as f:
        f.truncate(os.path.getsize(os.path.join(copy, "juggle.mp4")) // 2)
    uses = sum("truck.jpg" in line or "juggle.mp4" in line for line in open(os.path.join(copy, "real.jsonl")))
    assert prepare.main(["check", copy, *bad]) == 1
    assert f"{uses} bad lines" in capsys.readouterr().out and uses == 3
