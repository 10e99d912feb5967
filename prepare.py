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
import functools
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
GROWTH = 1 << 30           # bytes that even a small archive may unpack to
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


def fetch(net, url, path, size=None, sha256=None, most=None, mark="", headers=None, trust=None, tries=TRIES):
    """One file: continued where an earlier try stopped, compared with its size and sha256, looked at by `trust`, renamed.

    mark: what makes the contents what they are (a revision); a partial file of another one is not continued.
    """
    what, part, failed, problem = url[:200], f"{path}{mark and '.'}{mark}.part", 0, ""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    while failed < tries:
        if failed:
            time.sleep(PAUSE * 2 ** failed * random.uniform(0.5, 1))
        have = os.path.getsize(part) if os.path.exists(part) else 0
        sent = (headers or {}) | ({"Range": f"bytes={have}-"} if have else {})
        with net.slot(url), net.get(url, what, sent, tries) as r:
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
        failed = 0 if os.path.exists(part) and os.path.getsize(part) > have else failed + 1
    raise NetError(f"{what}: gave up after {tries} tries, the last: {problem}")


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
        if not most:  # a weight file must outlive a power cut, a picture need not
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


def is_picture(path, sha256=None):
    """BadMedia unless a file is a picture, and the one whose sha256 was published: a notice that it is gone is not."""
    image_size(path)
    if sha256 and file_digest(path) != sha256:
        raise BadMedia("not the picture that was annotated")


def fetch_all(net, manifest, jobs, what, fresh=False):
    """Fetch [(url, path, options of fetch)] side by side: {path: reason} of those that could not be had. Links that are
    known to be dead are not asked for, unless they are fresh; what may be the network's fault is, the next time."""
    failed = {}

    def one(job):
        url, path, options = job
        if path in manifest.dead and not fresh:
            failed[path] = manifest.dead[path]
            return
        try:
            fetch(net, url, path, **options)
            manifest.note(path, url)
        except (NetError, BadMedia) as e:
            failed[path] = reason = str(e).removeprefix(f"{path}.part: ").removeprefix(f"{url[:200]}: ")
            manifest.note(path, url, reason, again=net.offline or any(
                t in reason for t in ("gave up", "HF_TOKEN", "no such host")))

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

def unpack(path, folder):
    """A zip or tar into a folder: plain files under it alone. Links and devices are left out, a name that leads elsewhere is
    an error, and so is an archive that grows more than twenty times (and 1 GiB): a bomb. Archives inside are unpacked too."""
    room, inner = os.path.getsize(path) * 20 + GROWTH, []
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
                        raise BadMedia(f"{path}: unpacks to more than 20 times its size")
                    f.write(chunk)
            os.replace(f"{target}.part", target)
            inner += [target] if name.lower().endswith((".tar", ".zip", ".tar.gz", ".tgz")) else []
    for target in inner:
        unpack(target, os.path.dirname(target))
        os.remove(target)


# ---- media -------------------------------------------------------------------------------------------------

def is_video(path):
    open_video(path)[0].close()


class Embedded:
    """Pictures that come inside the rows of the hub: put on the disk, their names put into the rows."""

    def __init__(self, net, manifest, root, name):
        self.net, self.manifest, self.root, self.name, self.label, self.asked = net, manifest, root, name, "", 0

    def __call__(self, rows):
        """Whether to ask for the same rows once more, because links to their pictures have expired."""
        jobs, named, failed = [], [], {}
        for r in rows:
            for column, cell in r["row"].items():
                for k, c in enumerate(cell if isinstance(cell, list) else [cell]):
                    if isinstance(c, dict) and ("src" in c or "bytes" in c):
                        rel = f"{self.label}/{r['row_idx']:07d}-{column}-{k}"
                        path = inside_folder(self.root, f"media/{self.name}/{rel}")
                        if c.get("bytes") and not os.path.exists(path):
                            save(path, c["bytes"])
                        elif c.get("src"):
                            jobs.append((c["src"], path, dict(most=PICTURE_BYTES, trust=is_picture)))
                        named.append((r["row"], column, k, rel, path))
        if jobs:
            failed = fetch_all(self.net, self.manifest, jobs, "pictures", fresh=True)
            self.asked += 1
            if any("status 403" in reason for reason in failed.values()) and self.asked < 3:
                return True
        self.asked = 0
        for row, column, k, rel, path in named:
            here = rel if os.path.exists(path) else f"{rel}: {failed.get(path, 'no picture in the row')}"
            if isinstance(row[column], list):
                row[column][k] = here
            else:
                row[column] = here
        return False


def save(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.part", "wb") as f:
        f.write(data)
    os.replace(f"{path}.part", path)


class Shelf:
    """The media of one set that are on this disk, by the names rows use: with or without folder, with or without
    extension, some with the prefix of where they came from."""
    KINDS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif", ".mpg", ".jpg", ".jpeg", ".png", ".webp")

    def __init__(self, root, *folders):
        self.root, self.files, self.frames = root, defaultdict(list), defaultdict(list)
        for folder in folders:
            for at, dirs, names in os.walk(os.path.join(root, folder)):
                dirs.sort()
                rel = os.path.relpath(at, root)
                pictures = 0
                for n in sorted(names):
                    stem, kind = os.path.splitext(n)
                    if not n.endswith(".part"):
                        pictures += kind.lower() in (".jpg", ".jpeg", ".png")
                        self.files[stem if kind.lower() in self.KINDS else n].append(os.path.join(rel, n))
                if pictures > 1:
                    self.frames[os.path.basename(at)].append(rel)

    def pick(self, table, ref, stems):
        """The one entry of a table whose path ends like `ref`. NAME is also sought as v_NAME, ytb_NAME and the like."""
        tail = os.path.splitext(ref)[0] if os.path.splitext(ref)[1].lower() in self.KINDS else ref
        base = os.path.basename(tail)
        for stem in (base, *stems(base)):
            want = "/" + os.path.join(os.path.dirname(tail), stem).strip("/")
            found = [p for p in table.get(stem, ()) if ("/" + p).endswith(want) or ("/" + os.path.splitext(p)[0]).endswith(want)]
            found = found or table.get(stem, ()) if len(table.get(stem, ())) == 1 else found
            if found:
                return min(found, key=lambda p: (p.count("/"), p))
        return None

    def file(self, ref):
        return self.pick(self.files, ref, lambda s: (f"v_{s}", f"ytb_{s}", f"vimeo_{s}", f"{s}_2fps"))

    def folder(self, ref):
        return self.pick(self.frames, ref, lambda s: ())


def encode(root, folder, rate, first, last):
    """A folder of frames, or some of them, as an H.264 clip at `rate` a second; its path under root."""
    rel = os.path.join("media", "encoded", hashlib.sha256(f"{folder} {first} {last} {rate}".encode()).hexdigest()[:24] + ".mp4")
    path = os.path.join(root, rel)
    if os.path.exists(path):
        return rel
    names = sorted(n for n in os.listdir(os.path.join(root, folder)) if n.lower().endswith((".jpg", ".jpeg", ".png")))
    names = names[first:None if last is None else last + 1]
    if not names:
        raise BadMedia(f"{folder}: has no frames {first} to {last}")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with av.open(f"{path}.part", "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=round(rate), options={"crf": "20"})
        width, height = image_size(os.path.join(root, folder, names[0]))
        stream.width, stream.height, stream.pix_fmt = width // 2 * 2, height // 2 * 2, "yuv420p"
        for n in names:
            frame = av.VideoFrame.from_ndarray(load_image(os.path.join(root, folder, n)), format="rgb24")
            container.mux(stream.encode(frame.reformat(stream.width, stream.height)))
        container.mux(stream.encode())
    os.replace(f"{path}.part", path)
    return rel


# ---- one set -----------------------------------------------------------------------------------------------

def refs_of(item):
    """What an item's media are called, as a list."""
    return item.get("images") or [item[k] for k in ("image", "video") if k in item]


class Spool:
    """Items on the disk, in files by their media: what is said about one picture on rows far apart meets in one file,
    which fits into memory."""

    def __init__(self, folder):
        self.folder, self.done = folder, os.path.join(folder, "done.json")

    def fill(self, items, key):
        """Write all items; `key` says what they were made of, and a spool of the same is not written again."""
        with contextlib.suppress(OSError, ValueError, KeyError), open(self.done) as f:
            kept = json.load(f)
            if kept["key"] == key:
                return Counter(kept["counts"])
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        counts = Counter()
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(os.path.join(self.folder, f"{i:02d}"), "w", encoding="utf-8")) for i in range(BUCKETS)]
            for n, item in enumerate(items(counts)):
                bucket = zlib.crc32(json.dumps(refs_of(item) or n).encode()) % BUCKETS
                files[bucket].write(json.dumps(item, ensure_ascii=False, separators=(",", ":")) + "\n")
        with open(f"{self.done}.part", "w") as f:
            json.dump(dict(key=key, counts=counts), f)
        os.replace(f"{self.done}.part", self.done)
        return counts

    def buckets(self):
        """The items of one file after another, each list holding one item per picture, clip or text."""
        for i in range(BUCKETS):
            with open(os.path.join(self.folder, f"{i:02d}"), encoding="utf-8") as f:
                yield merge(map(json.loads, f))


def merge(items):
    """Items about the same media become one. One that asks nothing (a clip's subtitles, a video's link) completes all of
    its media's."""
    groups, more = {}, defaultdict(dict)
    for n, item in enumerate(items):
        media = json.dumps(refs_of(item) or n)
        if not item["annotations"]:
            more[media] |= {k: v for k, v in item.items() if k not in ("annotations", "video")}
            continue
        group = groups.setdefault((media, json.dumps([item.get(k) for k in ("start", "end", "cut")])), item)
        if group is not item:
            group["annotations"] += [a for a in item["annotations"] if a not in group["annotations"]]
    return [item | more.get(media, {}) for (media, _), item in groups.items()]


class Maker:
    """One set, from where it is published to root/NAME.jsonl."""

    def __init__(self, net, manifest, root, name, recipe, entry, limit, held_out=()):
        self.net, self.manifest, self.root, self.name, self.recipe, self.limit = net, manifest, root, name, recipe, limit
        self.entry, self.held_out, self.here = entry, held_out, os.path.join(root, "media", name)
        self.work = os.path.join(root, ".work", name)
        splits = [c.strip() for c in (entry.get("config") or "default").split(",")]
        self.sources = recipe.rows or tuple(("hub", entry["source"], config, entry["split"]) for config in splits)
        if recipe.media == "youtube":
            self.sources += (("file", self.sources[0][1], "youtube_id_to_urls_mapping.json"),)

    def rows(self):
        """(row, where it is from) of all sources, `limit` of each at most."""
        keep = Embedded(self.net, self.manifest, self.root, self.name)
        keep.cache = lambda repo: os.path.join(self.root, ".work", "hub", repo.replace("/", "--"))
        for kind, *where in self.sources:
            if kind == "hub":
                keep.label = f"{where[1]}-{where[2]}"
                for row in hub_rows(self.net, *where[:3], self.limit, keep, *where[3:]):
                    yield row | {"_config": where[1]}, where
                continue
            if kind == "file":
                files = fetch_files(self.net, hub_files(self.net, where[0], where[1:]), keep.cache(where[0]))
            else:
                files = sorted(glob.glob(os.path.join(glob.escape(self.here), *where)))
                if not files:
                    raise UserError(self.by_hand())
            rows = (row for path in files for row in file_rows(path))
            # a list of links or subtitles is read whole: it does not say which of them the rows need
            side = "mapping" in where[-1] or "subtitles" in where[-1]
            for n, row in enumerate(rows):
                if self.limit and n >= self.limit and not side:
                    break
                yield row, where

    def items(self, counts):
        """Converted rows; `counts` gets what was read and what was left out, by reason."""
        convert.outside.clear()
        seen, bad = set(), None
        for row, where in tqdm(self.rows(), f"{self.name} rows", leave=False, disable=None):
            if where[-1].startswith("youtube_id"):
                if row["_key"] in seen:
                    yield dict(video=row["_key"], link=row.get("gcp_url"), annotations=[])
                continue
            counts["rows"] += 1
            try:
                items = list(self.recipe.convert(row, self.name))
            except Skip as e:
                counts[f"left out: {e}"] += 1
                continue
            except (LookupError, TypeError, ValueError, AttributeError) as e:
                counts["left out: not in the published schema"] += 1
                bad = bad or f"{type(e).__name__} {e}; its columns: {', '.join(map(str, row))}"
                continue
            for item in items:
                if self.recipe.media == "youtube":
                    seen.add(item["video"])
                if self.held_out and any(r in self.held_out for r in refs_of(item) + (item.get("sha256") or [])):
                    counts["left out: picture is held out for evaluation"] += 1
                elif item["annotations"] or "video" in item:
                    yield item
        if bad:
            print(f"{self.name}: rows not in the published schema, the first: {bad}")
        out, n = convert.outside["outside"], convert.outside["seen"]
        if out > 3 + 0.001 * n:
            raise UserError(f"{self.name}: {out:,} of {n:,} coordinates are off the picture: published in another unit than "
                            "convert.py takes them to be")

    def by_hand(self):
        files = f" and {self.recipe.rows[0][1]}" if self.recipe.rows[:1] and self.recipe.rows[0][0] == "here" else ""
        text = (f"{self.name} is in part by hand. Where from: {self.recipe.note}. Licence: {self.entry.get('license') or 'see there'}. "
                f"Put the media{files} under {self.here}/ (names as in the rows, any folders) and run this again.")
        if files and self.recipe.convert is convert.plain:
            text += (" annotations.jsonl (or .json, .csv): a row per question with video (or image, images), question, answer or "
                     "options and correct, start and end in seconds if it is a clip; without a question a row is a caption.")
        return text

    def run(self):
        """(lines written, Counter of everything else)"""
        spool = Spool(os.path.join(self.work, "spool"))
        counts = spool.fill(self.items, repr((self.limit, self.sources, len(self.held_out))))
        self.shelf = Shelf(self.root, os.path.join("media", self.name), os.path.join("media", "youtube"))
        if self.recipe.archives and any(self.place(item) is None for items in spool.buckets() for item in items):
            self.unpack_archives()
            self.shelf = Shelf(self.root, os.path.join("media", self.name), os.path.join("media", "youtube"))
        out, written = os.path.join(self.root, self.name + ".jsonl"), 0
        with open(f"{out}.part", "wb") as f, tqdm(total=BUCKETS, desc=f"{self.name} media", leave=False, disable=None) as bar:
            for items in spool.buckets():
                failed = self.fetch(items)
                for item in items:
                    try:
                        line = json.dumps(self.line(item, failed), ensure_ascii=False).encode() + b"\n"
                        parse_row(line)
                    except (BadMedia, BadRow, OSError) as e:
                        counts[f"left out: {reason_of(e)}"] += 1
                    else:
                        f.write(line)
                        written += 1
                bar.update()
        if written:
            os.replace(f"{out}.part", out)
        else:
            os.remove(f"{out}.part")
        return written, counts

    def unpack_archives(self):
        for repo, pattern in self.recipe.archives:
            for file in hub_files(self.net, repo, [pattern]):
                mark = os.path.join(self.work, "unpacked-" + hashlib.sha256(file["url"].encode()).hexdigest()[:16])
                if os.path.exists(mark):
                    continue
                path, = fetch_files(self.net, [file], os.path.join(self.root, ".work", "hub", repo.replace("/", "--")))
                try:
                    unpack(path, self.here)
                except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as e:
                    raise BadMedia(f"{path}: a broken archive ({e})") from None
                save(mark, b"")
                os.remove(path)

    def place(self, item):
        """Where the media of an item are, as paths under root; None if one is not here yet."""
        refs, paths = refs_of(item), []
        for ref in refs:
            if "://" in ref:
                rel = url_path(ref)
                paths.append(rel if os.path.exists(os.path.join(self.root, rel)) else None)
            elif self.recipe.media == "embedded":
                paths.append(f"media/{self.name}/{ref}")
            else:
                found = self.shelf.file(ref)
                if "cut" in item and (ref == item["cut"][0] or not found):
                    found = None if self.cut(item) is None else ref
                paths.append(found)
        return None if None in paths else paths

    def cut(self, item):
        """Of a clip that is not a file of its own: (path under root, seconds its times are shifted by, its end)."""
        source, first, last = item["cut"]
        if whole := self.shelf.file(source):
            rate = item["fps"]
            return whole, first / rate, None if last is None else (last + 1) / rate
        if folder := self.shelf.folder(item["video"]):
            alone = item["video"] != source and os.path.basename(folder) != os.path.basename(source)
            return folder, None, (0, None) if alone else (first, last)
        if folder := self.shelf.folder(source):
            return folder, None, (first, last)
        return None

    def fetch(self, items):
        """Fetch what these items lack: {path under root or name: why it could not be had}."""
        jobs, videos = [], {}
        for item in items:
            checks = item.get("sha256") or []
            for k, ref in enumerate(refs_of(item)):
                if "://" in ref:  # hosts that had only http when the rows were written have https by now
                    jobs.append((ref.replace("http://", "https://", 1) if not self.net.mirror else ref, os.path.join(self.root, url_path(ref)),
                                 dict(most=PICTURE_BYTES, tries=3, trust=functools.partial(
                                     is_picture, sha256=checks[k] if k < len(checks) else None))))
                elif item.get("link") and not self.shelf.file(ref):
                    videos[ref] = item["link"]
        failed = {os.path.relpath(p, self.root): why
                  for p, why in fetch_all(self.net, self.manifest, jobs, "pictures").items()}
        # The frames people saw are in a smaller copy of 2 a second, of most videos.
        for copy in (lambda u: slow_copy(u), lambda u: u):
            rest = {ref: copy(link) for ref, link in videos.items() if copy(link)}
            paths = {ref: inside_folder(self.root, "media/youtube/" + ref + os.path.splitext(urlsplit(u).path)[1]) for ref, u in rest.items()}
            why = fetch_all(self.net, self.manifest, [(rest[ref], path, dict(trust=is_video, headers=billing(rest[ref])))
                                                      for ref, path in paths.items()], "videos", fresh=True)
            for ref, path in paths.items():
                if path in why:
                    failed[ref] = why[path]
                else:
                    videos.pop(ref)
                    failed.pop(ref, None)
                    self.shelf.files[os.path.splitext(os.path.basename(path))[0]].append(os.path.relpath(path, self.root))
        return failed

    def line(self, item, failed):
        """The row of an item whose media are here; BadMedia says why they are not."""
        refs, paths = refs_of(item), self.place(item)
        if paths is None or not all(paths):
            why = next((failed[k] for ref in refs for k in (ref, "://" in ref and url_path(ref)) if k in failed), None)
            raise BadMedia(why or ("media not here" if self.recipe.note or self.recipe.archives else "not on the mirror"))
        row = dict(id=f"{self.name}-{hashlib.sha256(json.dumps([refs, item.get('start'), item.get('cut'), item['annotations']][:3 if refs else 4]).encode()).hexdigest()[:12]}")
        annotations = item["annotations"]
        if "image" in item:
            row["image"] = paths[0]
            row["width"], row["height"] = image_size(inside_folder(self.root, paths[0]))
            if item.get("pixels"):
                annotations = [in_shares(a, row["width"], row["height"]) for a in annotations]
        elif "images" in item:
            row["images"] = paths
            for path in paths:
                image_size(inside_folder(self.root, path))
        elif "video" in item:
            row, annotations = self.video_line(row, item, paths[0])
        if "width" in row:
            annotations = [dict(a, masks=[m for m in a["masks"] if m["rle"]["size"] == [row["height"], row["width"]]])
                           if "masks" in a else a for a in annotations]
        return row | dict(annotations=annotations)

    def video_line(self, row, item, found):
        shift, end, annotations = 0, None, item["annotations"]
        if "cut" in item and found == item["video"]:
            found, shift, end = self.cut(item)
            if shift is None:
                found, shift, end = encode(self.root, found, item["fps"], *end), 0, None
        container, stream = open_video(inside_folder(self.root, found))
        with container:
            row |= dict(video=found, width=stream.width, height=stream.height,
                        duration=round(video_duration(container.name), 3), fps=round(float(stream.average_rate or 0), 3))
        row |= {k: item[k] for k in ("start", "end", "subtitles") if k in item}
        if shift or end:
            row |= dict(start=round(shift, 3), end=round(end or row["duration"], 3))
            later = lambda points: [dict(p, t=round(p["t"] + shift, 3)) for p in points]
            annotations = [dict(a, **{k: later(a[k]) for k in ("points", "input_points", "masks") if k in a}) for a in annotations]
        if row.get("start", 0) >= row["duration"]:
            raise BadMedia("the video ends before the clip begins")
        if "end" in row:
            row["end"] = min(row["end"], row["duration"])
        return row, annotations


def url_path(url):
    digest = hashlib.sha256(url.encode()).hexdigest()
    return f"media/url/{digest[:2]}/{digest}"


def slow_copy(url):
    """.../TOP/ID/ID.ext -> .../TOP-2fps/ID_2fps.mp4, the mirror's copy at 2 frames a second."""
    parts = url.split("/")
    return "/".join([*parts[:-3], parts[-3] + "-2fps", os.path.splitext(parts[-1])[0] + "_2fps.mp4"])


def billing(url):
    """Headers for the video mirror, whose readers pay for the traffic; they go there alone."""
    project, token = os.environ.get("GOOGLE_CLOUD_PROJECT"), os.environ.get("GOOGLE_OAUTH_TOKEN")
    if project and token and origin(url) == ("https", "storage.googleapis.com", None):
        return {"x-goog-user-project": project, "Authorization": f"Bearer {token}"}
    return {}


def in_shares(a, width, height):
    """Points in pixels of a picture whose size is known now -> numbered shares of its sides."""
    places = sorted((convert.share(p["x"], width), convert.share(p["y"], height)) for p in a["points"])
    return dict(a, points=[dict(x=x, y=y, id=i) for i, (x, y) in enumerate(places)])


def reason_of(e):
    """What a failure is counted under: without the names in it."""
    text = str(e).split(" (")[0]
    return text.rsplit("/", 1)[-1].split(": ", 1)[-1] if text.startswith("/") else text


# ---- the commands ------------------------------------------------------------------------------------------

def held_out(net, root):
    """URLs and sha256 of the pictures that are evaluated on; no training set may have them."""
    path, keys = os.path.join(root, ".work", "held_out.json"), set()
    if not os.path.exists(path):
        for recipe in (EVALS["pixmo-points-eval"], EVALS["pixmo-count"]):
            for _, *where in recipe.rows:
                for row in hub_rows(net, *where[:3], None, lambda rows: False, *where[3:]):
                    keys |= {row["image_url"], row.get("image_sha256") or row["image_url"]}
        save(path, json.dumps(sorted(keys)).encode())
    with open(path) as f:
        return frozenset(json.load(f))


def select(names, registry):
    """[(name, whether it is an evaluation)] of names, groups and stages."""
    chosen = []
    for name in names:
        found = [(n, False) for n, e in registry.items()
                 if name in (n, e["group"], e["sft_group"]) or name in e["stage"].split(",")]
        found = [(n, True) for n in EVALS if name in ("eval", f"eval/{n}")] or found
        if not found:
            raise UserError(f"{name}: no set, group or stage of datasets.tsv; `python prepare.py list` shows them")
        chosen += [c for c in found if c not in chosen]
    return chosen


def data(args):
    registry, net, code = read_registry(), Net(), 0
    for name, evaluation in select(args.names, registry):
        root = os.path.join(args.out, "eval") if evaluation else args.out
        os.makedirs(os.path.join(root, "media", name), exist_ok=True)
        recipe, entry = (EVALS[name], EVAL_ENTRY) if evaluation else (RECIPES[name], registry[name])
        try:
            barred = held_out(net, args.out) if recipe.media == "url" and not evaluation else ()
            maker = Maker(net, Manifest(os.path.join(root, "media", "manifest.jsonl")), root, name, recipe, entry, args.limit, barred)
            written, counts = maker.run()
        except (NetError, BadMedia, BadRow, UserError) as e:
            print(f"{name}: {e}", file=sys.stderr)
            code = max(code, 2 if isinstance(e, UserError) else 1)
            continue
        print(f"{name}: {counts.pop('rows', 0):,} rows read, {written:,} lines written to {os.path.join(root, name)}.jsonl")
        for reason, n in sorted(counts.items(), key=lambda c: -c[1]):
            print(f"  {n:,} {reason}")
        if recipe.note and any("media not here" in reason for reason in counts):
            print(maker.by_hand())
        code = code if written else max(code, 1)
    return code


EVAL_ENTRY = {"license": "ODC-BY-1.0"}  # all of them; the videos under their own
MEDIA_FROM = {"url": "URLs in the rows", "embedded": "in the rows", "youtube": "video mirror (billed)", "archive": "archives of the hub",
              "hand": "by hand", "none": "text alone"}


def show_list(args):
    registry = read_registry()
    chosen = select([args.group], registry) if args.group else [(n, False) for n in registry] + [(n, True) for n in EVALS]
    print(f"{'name':35}{'stage':14}{'task':22}{'rows':>10}  {'media':23}{'licence':18}here")
    for name, evaluation in chosen:
        e, root = (EVAL_ENTRY, os.path.join(args.out, "eval")) if evaluation else (registry[name], args.out)
        recipe, path = (EVALS if evaluation else RECIPES)[name], os.path.join(root, name + ".jsonl")
        here = f"{line_index(path)[1][1]:,} lines" if os.path.exists(path) else "media" if glob.glob(
            os.path.join(glob.escape(os.path.join(root, "media", name)), "*")) else "-"
        stage = "eval" if evaluation else "+".join(s[:3] for s in e["stage"].split(","))
        rows = f"{int(e['size']):,}" if e.get("size") else ""
        print(f"{('eval/' if evaluation else '') + name:35}{stage:14}{e.get('task', ''):22}{rows:>10}  {MEDIA_FROM[recipe.media]:23}"
              f"{e.get('license') or 'see there':18}{here}")
    print(f"{sum(not e for _, e in chosen)} sets, {sum(e for _, e in chosen)} evaluations; pre, sft, lon: the stages")
    return 0


WEIGHTS = {"Molmo2-8B": "allenai/Molmo2-8B", "Molmo2-4B": "allenai/Molmo2-4B", "Molmo2-O-7B": "allenai/Molmo2-O-7B",
           "OLMo-2-0425-1B": "allenai/OLMo-2-0425-1B", "Olmo-3-7B-Instruct": "allenai/Olmo-3-7B-Instruct",
           "Qwen3-4B": "Qwen/Qwen3-4B", "Qwen3-8B": "Qwen/Qwen3-8B",
           "siglip2-so400m-patch14-384": "google/siglip2-so400m-patch14-384"}


def get_weights(args):
    net, code = Net(), 0
    names = ["OLMo-2-0425-1B", "siglip2-so400m-patch14-384"] if args.names == ["stage1"] else args.names
    for name in names:
        if name not in WEIGHTS:
            raise UserError(f"{name}: not one of stage1, {', '.join(WEIGHTS)}")
    for name in names:
        folder = os.path.join(args.out, name)
        # Of a repository only what is read: no pickles, no code.
        files = [f for f in hub_files(net, WEIGHTS[name], ("*.safetensors", "*.json", "*.jinja", "merges.txt"), "models")
                 if "/" not in f["name"]]
        fetch_files(net, files, folder)
        print(f"{folder}: {len(files)} files, {sum(f['size'] or 0 for f in files) / 1e9:.2f} GB")
    print(f"--init_from {' '.join(os.path.join(args.out, name) for name in names)}")
    return code


def look(path, video):
    """What a media file is: (width, height, seconds or None, digest of its bytes). BadMedia if it cannot be decoded."""
    if not video:
        height, width, _ = load_image(path).shape
        return width, height, None, file_digest(path)
    container, stream = open_video(path)
    with container:
        width, height = stream.width, stream.height
    seconds = video_duration(path)
    load_frames(path, [0.0, seconds])
    return width, height, seconds, file_digest(path)


class Checked:
    """The media that were looked at, each once."""

    def __init__(self, pool):
        self.pool, self.known, self.names = pool, {}, defaultdict(set)

    def look(self, wanted):
        """{path: what it is, or why it is none} of [(path, whether it is a video)]."""
        fresh = {path: video for path, video in wanted if path not in self.known}

        def one(job):
            try:
                return look(*job)
            except (BadMedia, OSError, MemoryError) as e:
                return reason_of(e)

        for path, found in zip(fresh, self.pool.map(one, fresh.items())):
            self.known[path] = found
            if not isinstance(found, str):
                self.names[found[3]].add(path)
        return self.known


def wrong(row, folder, checked):
    """What is wrong with the media of a row, or ""."""
    for name in refs_of(row):
        found = checked.known[inside_folder(folder, name)]
        if isinstance(found, str):
            return found
        if "images" not in row and "width" in row and (row["width"], row["height"]) != found[:2]:
            return "another size than the line says"
        if len(checked.names[found[3]]) >= PLACEHOLDER and found[2] is None:
            return "placeholder picture"
        if found[2] is not None and abs(row.get("duration", found[2]) - found[2]) > 0.1:
            return "another duration than the line says"
        if found[2] is not None and any(p["t"] > found[2] + 0.1 for a in row["annotations"] for p in a.get("points", ())):
            return "point after the end of the video"
    return ""


def check(args):
    paths = [args.path] + [p for p in [os.path.join(args.path, "eval")] if glob.glob(os.path.join(glob.escape(p), "*.jsonl"))]
    try:
        sets = [d for path in paths for d in find_datasets([path])[0]]
    except (OSError, ValueError) as e:
        raise UserError(str(e).replace("--data ", "")) from None
    total, reports = 0, []
    with ThreadPoolExecutor(args.workers) as pool, open(args.bad_rows, "w", encoding="utf-8") as bad:
        checked = Checked(pool)
        for d in sets:  # media first: a placeholder is known by how many look like it
            for _, row, folder, _ in parsed(d):
                with contextlib.suppress(BadMedia):
                    checked.look([(inside_folder(folder, name), "video" in row) for name in (refs_of(row) if row else ())])
        for d in sets:
            reasons, lines = Counter(), set()
            for where, row, folder, problem in parsed(d):
                if row:
                    text = json.dumps({k: v for k, v in row.items() if k != "id"}, sort_keys=True)
                    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
                    try:
                        problem = wrong(row, folder, checked) or ("duplicate line" if digest in lines else "")
                    except BadMedia as e:
                        problem = reason_of(e)
                    lines.add(digest)
                if problem:
                    reasons[problem] += 1
                    bad.write(json.dumps(dict(file=where.rpartition(":")[0], line=int(where.rpartition(":")[2]), reason=problem)) + "\n")
            reports.append((d, reasons))
            total += sum(reasons.values())
    print(f"{'set':40}{'lines':>10}{'bad':>8}")
    for d, reasons in reports:
        print(f"{d.name:40}{len(d):10,}{sum(reasons.values()):8,}  {', '.join(f'{n} {r}' for r, n in reasons.most_common())}")
    print(f"{len(checked.known):,} media files looked at; " + (f"{total:,} bad lines, listed in {args.bad_rows}" if total else "all is well"))
    return 1 if total else 0


def parsed(dataset):
    """(file:line, row or None, folder, what is wrong) of every line."""
    for i in range(len(dataset)):
        line, folder, where = dataset.line(i)
        try:
            yield where, parse_row(line), folder, ""
        except BadRow as e:
            yield where, None, folder, e.reason


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, text):
        p = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        p.set_defaults(run=run)
        return p

    p = command("list", show_list, "the registry, and what of it is here")
    p.add_argument("group", nargs="?", help="a set, group or stage; `eval` for the evaluations [all]")
    p.add_argument("--out", default="data", help="where data are kept [data]")
    p = command("data", data, "annotations and media as JSONL")
    p.add_argument("names", nargs="+", help="sets, groups or stages; `eval` for the held-out sets")
    p.add_argument("--limit", type=int, help="rows of each published table, from its start [all]")
    p.add_argument("--out", default="data", help="where to: OUT/NAME.jsonl, OUT/media, OUT/eval [data]")
    p = command("weights", get_weights, "published weights, for --init_from")
    p.add_argument("names", nargs="+", help=f"stage1, or some of {', '.join(WEIGHTS)}")
    p.add_argument("--out", default="weights", help="where to: OUT/NAME [weights]")
    p = command("check", check, "every line against the schema, every media file decoded")
    p.add_argument("path", help="a JSONL file, or a folder of them")
    p.add_argument("--bad_rows", default="bad_rows.jsonl", help="where lines that cannot be used are listed [bad_rows.jsonl]")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that decode [one per core]")
    args = parser.parse_args(argv)
    try:
        if getattr(args, "limit", None) is not None and args.limit < 1:
            raise UserError(f"--limit {args.limit}: at least 1")
        return args.run(args)
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except (NetError, BadMedia) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
