"""Real data: every shape from request to training steps, and the ways in which a connection and its other end misbehave.

The other end is Python's own server on loopback; `published.py` has what it serves and what must come of it.
"""
import collections
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.parse
import zipfile

import pytest
import requests
from conftest import HERE, picture, tiny_model, video, write_lines
from PIL import Image
from published import CASES
from test_pretrain import QUICK, ROOT
from test_sft import stage_2

import convert
import data
import prepare
from data import find_datasets, parse_row, read_registry
from model import Molmo2


def drawn_picture(name):
    """A PNG of 40 x 20 whose colour is its name's."""
    out = io.BytesIO()
    Image.new("RGB", (40, 20), tuple(hashlib.sha256(name.encode()).digest()[:3])).save(out, "png")
    return out.getvalue()


class Hub(http.server.ThreadingHTTPServer):
    """A hub, its rows, a video mirror and a web of pictures. `faults` are asked first: fault(request, n) answers the n-th
    request itself and returns True, or leaves it."""

    def __init__(self, film):
        super().__init__(("127.0.0.1", 0), Request)
        self.url, self.film = f"http://127.0.0.1:{self.server_port}", film
        self.rows, self.files, self.faults, self.log, self.sent, self.lock = {}, {}, [], [], collections.Counter(), threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, address):
        pass  # a client that was killed

    def fill(self, value):
        """Placeholders of `published.py` -> values."""
        if isinstance(value, dict) and "IMAGE" in value:
            return dict(src=f"{self.url}/pic/{value['IMAGE']}", height=20, width=40)
        if isinstance(value, dict):
            return {k: self.fill(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.fill(v) for v in value]
        if isinstance(value, str) and value.startswith("SHA("):
            return hashlib.sha256(drawn_picture(value[4:-1])).hexdigest()
        return value.replace("URL/", self.url + "/") if isinstance(value, str) else value

    def content(self, path, value):
        """Bytes of a file: as they are, text, JSON, or an archive of {name: content, "folder/": number of frames}."""
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            return self.film if value == "film" else drawn_picture(value) if len(value) == 1 else value.encode()
        if path.endswith(".json"):
            return json.dumps(self.fill(value)).encode()
        members = {}
        for name, inner in value.items():
            members |= {f"{name}{i:05d}.png": drawn_picture(str(i)) for i in range(inner)} if name.endswith("/") else \
                {name: self.content(name, inner)}
        out = io.BytesIO()
        if path.endswith(".zip"):
            with zipfile.ZipFile(out, "w") as z:
                for name, data in members.items():
                    z.writestr(name, data)
        else:
            with tarfile.open(fileobj=out, mode="w:gz" if path.endswith("gz") else "w") as t:
                for name, data in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    t.addfile(info, io.BytesIO(data))
        return out.getvalue()

    def publish(self, served):
        for key, rows in served.get("rows", {}).items():
            self.rows[key] = self.fill(rows)
        for key, value in served.get("files", {}).items():
            self.files[key] = self.content(key[1], value)


class Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        with self.server.lock:
            self.server.log.append(self.path)
            n = len(self.server.log)
        if not any(fault(self, n) for fault in self.server.faults):
            self.answer()

    def reply(self, body=b"", status=200, length=None, **headers):
        self.send_response(status)
        for k, v in headers.items():
            self.send_header(k.replace("_", "-"), v)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        with self.server.lock:
            self.server.sent[self.path] += len(body)

    def ranged(self, body, **headers):
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in self.headers else 0
        if start >= len(body) and start:
            self.reply(status=416, Content_Range=f"bytes */{len(body)}")
        elif start:
            self.reply(body[start:], 206, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}", **headers)
        else:
            self.reply(body, **headers)

    def answer(self):
        hub, url = self.server, urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(url.path), dict(urllib.parse.parse_qsl(url.query))
        if path == "/rows":
            key = query["dataset"], query["config"], query["split"]
            rows, at, n = hub.rows.get(key), int(query["offset"]), int(query["length"])
            if rows is None or n > 100:
                return self.reply(b'{"error": "no such set"}', 404)
            page = [dict(row_idx=i, row=rows[i], truncated_cells=[]) for i in range(at, min(at + n, len(rows)))]
            return self.reply(json.dumps(dict(features=[], rows=page, num_rows_total=len(rows), partial=False)).encode())
        for (repo, name), body in hub.files.items():
            for kind, head in (("datasets", "/datasets/"), ("models", "/")):
                if path == f"/api/{kind}/{repo}":
                    return self.reply(json.dumps(dict(sha="c0ffee00aa")).encode())
                if path == f"/api/{kind}/{repo}/tree/c0ffee00aa":
                    return self.reply(json.dumps([dict(type="file", path=n, size=len(b), lfs=dict(oid=hashlib.sha256(b).hexdigest()))
                                                  for (r, n), b in hub.files.items() if r == repo]).encode())
                if path == f"{head}{repo}/resolve/c0ffee00aa/{name}":
                    return self.ranged(body)
        kind, _, name = path[1:].partition("/")
        if kind == "pic" and name != "gone":
            return self.ranged(drawn_picture(name))
        if kind == "cc-2fps" and name in ("v1_2fps.mp4", "v2_2fps.mp4"):
            return self.ranged(hub.film)
        self.reply(b"<html>not here</html>", 404)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    with open(video(tmp_path_factory.mktemp("film") / "film.mp4"), "rb") as f:
        return f.read()


@pytest.fixture
def hub(film, monkeypatch):
    server = Hub(film)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(prepare, "PAUSE", 0.01)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def lines(path):
    return [parse_row(line) for line in open(path, "rb")]


# ---- conversion --------------------------------------------------------------------------------------------

def places(value, hub, name):
    """"@a", "here/..." and ENCODED in lines written by hand -> paths."""
    if isinstance(value, dict):
        return {k: places(v, hub, name) for k, v in value.items()}
    if isinstance(value, list):
        return [places(v, hub, name) for v in value]
    if not isinstance(value, str):
        return value
    digest = hashlib.sha256(f"{hub.url}/pic/{value[1:]}".encode()).hexdigest()
    value = f"media/url/{digest[:2]}/{digest}" if value.startswith("@") else value
    return "media/encoded/" if value == "ENCODED" else f"media/{name}/{value[5:]}" if value.startswith("here/") else value


def in_order(row):
    media = json.dumps(row.get("image") or row.get("images") or row.get("video"))
    return media[:15] if "/encoded/" in media else media, row.get("start", -1), row["annotations"][0].get("label", "")


LOTS = {"STYLE": ("pointing", "point_count", "multi_image_pointing", "multi_image_point_then_count", "video_point",
                  "video_point_count"), "LABEL": ("cup", "Cup"), "TASK": ("counting", "image_pointing")}


def same(found, wanted, where=""):
    """Whether a line is what was written by hand; capitals stand for what is drawn by lot, and must be one of its values."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), (where, found)
        if wanted.get("options") == "OPTIONS":
            assert sorted(found["options"]) == ["a cat", "a cow", "a dog", "a hen"], where
            assert found["options"][found["correct"]] == wanted["correct"], where
            wanted = {k: v for k, v in wanted.items() if k not in ("options", "correct")}
        if wanted.get("task") == "TASK":
            assert found["task"] == ("counting" if found["style"] == "point_count" else "image_pointing"), where
        for k in wanted:
            same(found[k], wanted[k], f"{where}.{k}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), (where, found)
        for i, (f, w) in enumerate(zip(found, wanted)):
            same(f, w, f"{where}[{i}]")
    elif wanted == "media/encoded/":
        assert found.startswith(wanted), (where, found)
    else:
        assert found in LOTS.get(wanted, (wanted,)) and type(found) is type(wanted), (where, found, wanted)


def put_by_hand(hub, folder, files):
    """What a user downloaded, into the set's folder."""
    for name, value in files.items():
        names = [f"{name}{i:05d}.png" for i in range(value)] if name.endswith("/") else [name]
        for n in names:
            os.makedirs(os.path.dirname(os.path.join(folder, n)), exist_ok=True)
            with open(os.path.join(folder, n), "wb") as f:
                f.write(drawn_picture(n) if name.endswith("/") else hub.content(n, value))


def test_every_shape_goes_from_the_hub_to_two_training_steps(hub, tmp_path, capsys, monkeypatch):
    """A user would lose a set: each converter's lines are as written by hand, `data.py` takes them, stage 2 trains on them."""
    out = tmp_path / "data"
    for name, served, by_hand, _ in CASES:
        hub.publish(served)
        put_by_hand(hub, os.path.join(out, "eval" * name.startswith("eval/"), "media", name.removeprefix("eval/")), by_hand)
    names = [name for name, *_ in CASES]
    code = prepare.main(["data", *names, "--out", str(out)])
    text = capsys.readouterr()
    assert code == 0, text.err + text.out
    for name, _, _, wanted in CASES:
        found, wanted = lines(out / f"{name}.jsonl"), places(wanted, hub, name.removeprefix("eval/"))
        assert len({row.pop("id") for row in found}) == len(found)
        for f, w in zip(sorted(found, key=in_order), sorted(wanted, key=in_order), strict=True):
            same(f, w, name)
    used = {r.convert for table, prefix in ((convert.RECIPES, ""), (convert.EVALS, "eval/")) for n, r in table.items()
            if prefix + n in names}
    assert used == {r.convert for table in (convert.RECIPES, convert.EVALS) for r in table.values()}
    for needle in ("count and points differ", "picture is held out for evaluation", "annotator unsure", "status 404 Not Found",
                   "fps is no multiple", "not the picture that was annotated", "more than 60 points", "annotation score below 3"):
        assert needle in text.out, needle
    monkeypatch.setattr(sys, "argv", ["data.py", str(out), "--max_frames", "4"])
    data.main()
    told = capsys.readouterr().out.splitlines()
    assert len(told) == sum(not n.startswith("eval/") for n in names) and all("rows not used: none" in t for t in told), told
    flags = [*QUICK, "--seq_len", "512", "--steps", "2", "--save_every", "2", "--data", str(out)]
    code, text = stage_2(tmp_path, *flags)
    assert code == 0 and "molmo2-videotrack" in text, text
