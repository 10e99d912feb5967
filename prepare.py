"""
Real data and weights: from the registry (datasets.tsv) to data/NAME.jsonl and weights/NAME, on a connection that breaks.

    python prepare.py list                                  # every set: what it is, where from, what is here already
    python prepare.py data pixmo-points --limit 1000        # the first 1,000 rows of one set, with their pictures
    python prepare.py data pretrain                         # all of stage 1; a group of `list` or `eval` goes as well
    python prepare.py weights stage1                        # OLMo-2 1B and SigLIP 2; or Molmo2-8B, Qwen3-8B, ...
    python prepare.py check data/                           # every line, every picture, every video

    hub, files ─► rows ─► convert.py ─► items ─► spool, 64 files by media ─► one item of media, all its annotations
                                                                               │
                  data/NAME.jsonl ◄─ checked by data.py ◄─ sizes, durations ◄─ media here? else fetched

Memory does not grow with a set: rows go through one at a time, and what is known about one picture meets in one spool
file. Whatever stops it, the same command again does what is missing: rows are in the spool, media on the disk, partial
files are continued, and links that are dead are listed in data/media/manifest.jsonl and not asked for again.

Environment: HF_TOKEN (sets behind terms), HF_ENDPOINT (a mirror; on this machine it may be http and serves everything),
HF_HUB_OFFLINE=1 (only what is here), GOOGLE_CLOUD_PROJECT and GOOGLE_OAUTH_TOKEN (the video mirror bills its readers).
"""
import argparse
import contextlib
import csv
import email.utils
import fnmatch
import glob
import hashlib
import importlib.util
import ipaddress
import json
import os
import random
import shutil
import socket
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote, urlencode, urljoin, urlsplit

import av
import requests
from PIL import Image
from tqdm import tqdm

import convert
from convert import EVALS, RECIPES, Skip, clip
from data import BadRow, find_datasets, line_index, parse_row, read_registry
from media import (BadMedia, image_size, inside_folder, load_frames, load_image, open_image, open_video,
                   video_duration)

TRIES, PAUSE = 5, 1.0   # of a request; seconds before the second try
PER_HOST, WORKERS = 4, 16  # requests at a time
PICTURE_BYTES = 64 << 20   # a picture's file may have
RESERVE = 1 << 30          # bytes of disk that stay free
WHOLE = 20_000             # rows that are read a page at a time; more come as parquet
BUCKETS = 64
PLACEHOLDER = 5            # pictures of the same bytes are not pictures but a notice that they are gone


class UserError(Exception):
    """A mistake in the command or around it: one line, exit 2."""


class NetError(Exception):
    """A request that failed for good: what was asked for, how often, and the last reason."""


# ---- requests ----------------------------------------------------------------------------------------------

def retry_after(response):
    """Seconds a server asks to wait (a number, or a date), at most 300; None where it does not say."""
    said = response.headers.get("Retry-After", "").strip()
    if said.isdigit():
        return min(int(said), 300)
    try:
        return min(max(email.utils.parsedate_to_datetime(said).timestamp() - time.time(), 0), 300)
    except ValueError:
        return None


def patiently(send, what, tries=5, pause=1.0):
    """send() -> requests.Response, sent again with exponential back-off and jitter after transport errors, 408, 429
    and 5xx; honours Retry-After (seconds or a date, at most 300 s). Returns the first response with any other
    status; raises NetError naming `what`, the number of tries and the last reason."""
    for n in range(tries):
        wait = pause * 2 ** n * random.uniform(0.5, 1.0)
        try:
            response = send()
        except requests.RequestException as e:
            if isinstance(e, ValueError):
                raise NetError(f"{what}: {e}") from None  # no URL at all: asking again will not help
            reason = f"{type(e).__name__}: {e}"
        else:
            if response.status_code not in (408, 429) and response.status_code < 500:
                return response
            reason, told = f"status {response.status_code} {response.reason}", retry_after(response)
            reason += f" {response.headers.get('X-Error-Code', '')}".rstrip()
            wait = wait if told is None else told
            response.close()
        if n + 1 < tries:
            time.sleep(wait)
    raise NetError(f"{what}: gave up after {tries} tries, the last: {reason}")


def origin(url):
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port
    except ValueError:
        raise NetError(f"{url[:200]!r} is no URL") from None


def is_loopback(host):
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Net:
    """Requests as this file makes them: https to public addresses alone, redirects followed by hand, the token sent to
    the hub alone, four at a time to one host."""

    def __init__(self):
        self.hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        mirror = is_loopback(origin(self.hub)[1])
        if not mirror and not self.hub.startswith("https://"):
            raise UserError(f"HF_ENDPOINT {self.hub}: must be https, or on this machine")
        self.viewer = self.hub if mirror else "https://datasets-server.huggingface.co"
        self.own, self.mirror = {origin(self.hub), origin(self.viewer)}, mirror
        self.token, self.offline = os.environ.get("HF_TOKEN"), os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        self.local, self.hosts, self.lock = threading.local(), {}, threading.Lock()

    def slot(self, url):
        """At most so many requests to one host at a time."""
        with self.lock:
            return self.hosts.setdefault(origin(url)[1], threading.BoundedSemaphore(PER_HOST))

    def allow(self, url):
        """NetError unless a URL is https and its host public: data and redirects must not reach into a network."""
        scheme, host, port = origin(url)
        if self.mirror and (scheme, host, port) in self.own:
            return
        if scheme != "https" or not host:
            raise NetError(f"{url[:200]}: only https is read")
        if any(requests.utils.get_environ_proxies(url)) and not host.replace(".", "").isdigit() and ":" not in host:
            return  # names are the proxy's to resolve
        try:
            found = {a[4][0] for a in socket.getaddrinfo(host, port or 443, type=socket.SOCK_STREAM)}
        except (OSError, UnicodeError) as e:
            raise NetError(f"{url[:200]}: no such host ({e})") from None
        if not all(ipaddress.ip_address(a.split("%")[0]).is_global for a in found):
            raise NetError(f"{url[:200]}: {host} is a private address")

    def get(self, url, what, headers=None, tries=None):
        """The response to a GET, its body not yet read; `linked`: (size, sha256) of a hub file, as far as told."""
        if self.offline:
            raise NetError(f"{what}: not here, and HF_HUB_OFFLINE is set")
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()

        def send():
            target, linked = url, (None, None)
            for _ in range(6):
                self.allow(target)
                more = {"Authorization": f"Bearer {self.token}"} if self.token and origin(target) in self.own else {}
                r = self.local.session.get(target, headers={"Accept-Encoding": "identity"} | (headers or {}) | more,
                                           stream=True, timeout=(10, 60), allow_redirects=False)
                etag = r.headers.get("X-Linked-Etag", "").strip('W/"')
                if origin(target) in self.own and len(etag) == 64:
                    linked = int(r.headers.get("X-Linked-Size", -1)), etag
                if not r.is_redirect:
                    r.linked = linked
                    return r
                target = urljoin(target, r.headers["Location"])
                r.close()
            raise NetError(f"{what}: more than 5 redirects")

        return patiently(send, what, tries or TRIES, PAUSE)

    def json(self, url, what, tries=None):
        """(parsed answer, the next page's URL or None)"""
        for _ in range(TRIES):
            with self.slot(url), self.get(url, what, tries=tries) as r:
                self.must(r, what)
                with contextlib.suppress(requests.RequestException):  # it broke in the middle: again
                    body = r.content
                    try:
                        return json.loads(body), r.links.get("next", {}).get("url")
                    except ValueError:
                        raise NetError(f"{what}: the answer is not JSON: {body[:80]!r}") from None
        raise NetError(f"{what}: the connection broke {TRIES} times")

    def must(self, r, what):
        """NetError unless a response carries what was asked for."""
        if r.status_code in (401, 403) and origin(r.url) in self.own:
            raise NetError(f"{what}: status {r.status_code}, behind terms or private: accept them on its page at {self.hub} and "
                           f"set HF_TOKEN{' to a token that may read it' if self.token else ''}")
        if r.status_code not in (200, 206):
            raise NetError(f"{what}: status {r.status_code} {r.reason}")


def room_for(path, size=0):
    """UserError when a file of so many bytes would fill the disk."""
    free = shutil.disk_usage(os.path.dirname(path)).free
    if free < size + RESERVE:
        raise UserError(f"{os.path.dirname(path)}: {free / 1e9:.1f} GB free, {(size + RESERVE) / 1e9:.1f} needed; "
                        "make room, or take less with --limit")


def fetch(net, url, path, size=None, sha256=None, most=None, mark="", headers=None, trust=None):
    """One file: continued where an earlier try stopped, compared with its size and sha256, looked at by `trust`, renamed.

    mark: what makes the contents what they are (a revision); a partial file of another one is not continued.
    """
    what, part, tries, problem = url[:200], f"{path}{mark and '.'}{mark}.part", 0, ""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    while tries < TRIES:
        if tries:
            time.sleep(PAUSE * 2 ** tries * random.uniform(0.5, 1))
        have = os.path.getsize(part) if os.path.exists(part) else 0
        with net.slot(url), net.get(url, what, (headers or {}) | ({"Range": f"bytes={have}-"} if have else {})) as r:
            size, sha256 = r.linked[0] if size is None else size, sha256 or r.linked[1]
            problem = receive(net, r, part, have, what, most, url)
        if not problem and size not in (None, os.path.getsize(part)):
            problem = f"{os.path.getsize(part)} bytes instead of {size}"
            os.remove(part)
        elif not problem and sha256 and file_digest(part) != sha256:
            problem = "its sha256 is not the one published"
            os.remove(part)
        if not problem:
            try:
                if trust:
                    trust(part)
            except BadMedia:
                os.remove(part)
                raise
            os.replace(part, path)
            return
        # What brought something new is no failure: a long file may break any number of times.
        tries = 0 if os.path.exists(part) and os.path.getsize(part) > have else tries + 1
    raise NetError(f"{what}: gave up after {TRIES} tries, the last: {problem}")


def receive(net, r, part, have, what, most, url):
    """The body of a response into a partial file that has `have` bytes: what went wrong, or ""."""
    if r.status_code == 416:  # nothing after what is here: all of it, or too much
        if r.headers.get("Content-Range", "").endswith(f"/{have}"):
            return ""
        os.remove(part)
        return "the server has less than was here"
    if r.status_code == 403 and r.url != url:
        return "status 403: the signed link has expired"  # what led there leads to a new one
    net.must(r, what)
    go_on = r.status_code == 206 and r.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    length = r.headers.get("Content-Length", "")
    total = int(length) + have * go_on if length.isdigit() else None
    room_for(part, total or 0)
    with open(part, "ab" if go_on else "wb") as f, \
            tqdm(total=total, initial=f.tell(), unit="B", unit_scale=True, leave=False,
                 disable=None if (total or 0) > 50 << 20 else True) as bar:
        try:
            for chunk in r.iter_content(1 << 20):
                f.write(chunk)
                bar.update(len(chunk))
                if most and f.tell() > most:
                    raise NetError(f"{what}: more than {most} bytes")
        except requests.RequestException as e:
            return f"the connection broke ({type(e).__name__})"
        f.flush()
        os.fsync(f.fileno())
    return "" if total in (None, os.path.getsize(part)) else f"{os.path.getsize(part)} bytes came instead of {total}"


def file_digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Manifest:
    """data/media/manifest.jsonl: one line for everything fetched or not, and why."""

    def __init__(self, path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.path, self.lock, self.dead = path, threading.Lock(), {}
        if os.path.exists(path):
            with open(path, "rb") as f:
                for line in f:
                    with contextlib.suppress(ValueError):  # the line that a kill cut short
                        entry = json.loads(line)
                        self.dead.pop(entry["file"], None)
                        if not entry["done"] and not entry["again"]:
                            self.dead[entry["file"]] = entry["reason"]
            with open(path, "rb+") as f:
                if f.seek(0, os.SEEK_END):
                    f.seek(-1, os.SEEK_END)
                    f.write(b"\n" if f.read(1) != b"\n" else b"")

    def note(self, file, url, reason="", again=False):
        with self.lock, open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(dict(file=file, url=url, done=not reason, reason=reason, again=again)) + "\n")


def is_picture(path):
    image_size(path)


def fetch_all(net, manifest, jobs, what):
    """Fetch [(url, path, options of fetch)] side by side: {path: reason} of those that could not be had. Links that are
    known to be dead are not asked for; what may be the network's fault is, the next time."""
    failed = {}

    def one(job):
        url, path, options = job
        if path in manifest.dead:
            failed[path] = manifest.dead[path]
            return
        try:
            fetch(net, url, path, **options)
            manifest.note(path, url)
        except (NetError, BadMedia) as e:
            failed[path] = reason = str(e).removeprefix(f"{path}.part: ").removeprefix(f"{url[:200]}: ")
            manifest.note(path, url, reason, again=net.offline or "gave up" in reason or "HF_TOKEN" in reason)

    jobs = list({path: (url, path, options) for url, path, options in jobs if not os.path.exists(path)}.values())
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in tqdm(pool.map(one, jobs), what, len(jobs), leave=False, disable=None if len(jobs) > 1 else True):
            pass
    return failed


# ---- the hub -----------------------------------------------------------------------------------------------

def hub_files(net, repo, patterns, kind="datasets"):
    """The files of a hub repository that match, at its newest revision: [dict(url, name, size, sha256, mark)]."""
    where = f"{net.hub}/api/{kind}/{repo}"
    revision = net.json(where, f"{kind} {repo}")[0]["sha"]
    page, found = f"{where}/tree/{quote(revision)}?recursive=true", []
    while page:
        entries, page = net.json(page, f"files of {repo}")
        found += [e for e in entries if e["type"] == "file" and any(fnmatch.fnmatch(e["path"], p) for p in patterns)]
    if not found:
        raise NetError(f"{repo}: has no file {' or '.join(patterns)}")
    head = f"{net.hub}/{'datasets/' if kind == 'datasets' else ''}{repo}/resolve/{quote(revision)}/"
    return [dict(url=head + quote(e["path"]), name=e["path"], size=e["size"], sha256=(e.get("lfs") or {}).get("oid"),
                 mark=revision[:8]) for e in found]


def fetch_files(net, files, folder):
    """Those of `files` that are not in `folder` yet; their paths. NetError names the first that cannot be had."""
    os.makedirs(folder, exist_ok=True)
    paths = [inside_folder(folder, f["name"]) for f in files]
    jobs = [(f, path) for f, path in zip(files, paths) if not os.path.exists(path)]
    room_for(os.path.join(folder, "x"), sum(f["size"] or 0 for f, _ in jobs))
    with ThreadPoolExecutor(PER_HOST) as pool:
        list(pool.map(lambda job: fetch(net, job[0]["url"], job[1], job[0]["size"], job[0]["sha256"], mark=job[0]["mark"]),
                      jobs))
    return paths


def hub_page(net, repo, config, split, offset, length):
    query = urlencode(dict(dataset=repo, config=config, split=split, offset=offset, length=length))
    try:
        return net.json(f"{net.viewer}/rows?{query}", f"rows {offset} of {repo}", TRIES if length == 1 else 3)[0]
    except NetError as e:
        if "gave up" not in str(e) or length == 1 or "429" in str(e):
            raise
        return hub_page(net, repo, config, split, offset, max(length // 10, 1))  # a page may be too big for the server


def hub_rows(net, repo, config, split, limit, keep, length=100):
    """The rows of a set on the hub, each a dict; keep(row, number, again) puts pictures inside it on the disk, and asks
    for the page once more when their links have expired."""
    offset, total = 0, None
    while total is None or offset < total:
        again = True
        while again:
            page = hub_page(net, repo, config, split, offset, min(length, (limit or length) - offset if limit else length))
            again = keep(page["rows"])
        total = min(page["num_rows_total"], limit or page["num_rows_total"])
        if not limit and total > WHOLE:
            yield from parquet_rows(net, repo, config, split, keep)
            return
        if page.get("partial") and not offset:
            print(f"{repo} {config}: the hub offers only the first {page['num_rows_total']:,} rows this way")
        if not page["rows"]:
            return
        yield from (r["row"] for r in page["rows"])
        offset += len(page["rows"])


def parquet_rows(net, repo, config, split, keep):
    """All rows of a large set, from the hub's parquet files, by pyarrow if it is there."""
    if not importlib.util.find_spec("pyarrow"):
        raise UserError(f"{repo} {config} {split}: more than {WHOLE:,} rows are read as parquet, which needs pyarrow "
                        "(pip install pyarrow); or take some, with --limit")
    import pyarrow.parquet
    query = urlencode(dict(dataset=repo, config=config, split=split))
    listed = net.json(f"{net.viewer}/parquet?{query}", f"parquet files of {repo}")[0]["parquet_files"]
    files = [dict(url=f["url"], name=f"{config}/{split}/{os.path.basename(f['filename'])}", size=f["size"], sha256=None, mark="")
             for f in listed if (f["config"], f["split"]) == (config, split)]
    number = 0
    for path in fetch_files(net, files, keep.cache(repo)):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256):
            rows = [dict(row_idx=number + i, row=row) for i, row in enumerate(batch.to_pylist())]
            number += len(rows)
            keep(rows)
            yield from (r["row"] for r in rows)


# ---- files of rows -----------------------------------------------------------------------------------------

def json_items(path, chunk=1 << 20):
    """The entries of a JSON file, one at a time however large it is: of a list its objects; of an object of objects the
    same with their name as `_key`; {"data": [...]} is a list."""
    decoder, text, at = json.JSONDecoder(), "", 0
    with open(path, encoding="utf-8-sig") as f:
        def skip(characters):
            nonlocal text, at
            while True:
                while at < len(text) and text[at] in characters:
                    at += 1
                if at < len(text):
                    return text[at]
                text, at = f.read(chunk), 0
                if not text:
                    raise BadRow("malformed JSON", f"{path} ends early")

        def value():
            nonlocal text, at
            while True:
                try:
                    found, end = decoder.raw_decode(text, at)
                    if end < len(text):  # a number may go on behind the end
                        at = end
                        return found
                except ValueError:
                    pass  # not all of it read yet
                more = f.read(max(chunk, len(text)))
                if not more:
                    raise BadRow("malformed JSON", f"{path}: near {text[at:at + 60]!r}")
                text, at = text[at:] + more, 0

        opening = skip(" \r\n\t")
        closing = {"[": "]", "{": "}"}.get(opening)
        if not closing:
            raise BadRow("malformed JSON", f"{path} is neither a list nor an object")
        at += 1
        while skip(" \r\n\t,") not in "]}":
            if opening == "[":
                yield value()
                continue
            key = value()
            if skip(" \r\n\t:") == "[" and key in ("data", "annotations"):
                opening, at = "[", at + 1
                continue
            entry = value()
            if isinstance(entry, dict):
                yield {"_key": key, **entry}


def file_rows(path):
    """The rows of a JSON, JSONL, CSV or TSV file."""
    if path.endswith((".csv", ".tsv")):
        with open(path, newline="", encoding="utf-8-sig") as f:
            head = f.readline()
            f.seek(0)
            yield from csv.DictReader(f, delimiter="\t" if "\t" in head else ",")
    elif path.endswith(".jsonl"):
        names = None
        with open(path, encoding="utf-8-sig") as f:
            for line in filter(str.strip, f):
                row = json.loads(line)
                if isinstance(row, list):  # the first line names the columns
                    names, row = names or row, names and dict(zip(names, row))
                if row:
                    yield row
    else:
        yield from json_items(path)


# ---- archives ----------------------------------------------------------------------------------------------

def unpack(path, folder, most=20.0):
    """A zip or tar into a folder: plain files under it alone. Links and devices are left out, a name that leads elsewhere is
    an error, and so is an archive that grows more than `most` times (and 1 GiB): a bomb. Archives inside are unpacked too."""
    room, inner = os.path.getsize(path) * most + (1 << 30), []
    with contextlib.ExitStack() as stack:
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            members = ((m.filename, m.file_size, lambda m=m: archive.open(m)) for m in archive.infolist()
                       if not m.is_dir() and (m.external_attr >> 28) in (0, 8))
        else:
            archive = stack.enter_context(tarfile.open(path))
            members = ((m.name, m.size, lambda m=m: archive.extractfile(m)) for m in archive if m.isfile())
        for name, size, opened in members:
            target = inside_folder(folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            room_for(target, size)
            with opened() as source, open(f"{target}.part", "wb") as f:
                while chunk := source.read(1 << 20):
                    room -= len(chunk)
                    if room < 0:
                        raise BadMedia(f"{path}: unpacks to more than {most:.0f} times its size")
                    f.write(chunk)
            os.replace(f"{target}.part", target)
            inner += [target] if name.lower().endswith((".tar", ".zip", ".tar.gz", ".tgz")) else []
    for target in inner:
        unpack(target, os.path.dirname(target), most)
        os.remove(target)
