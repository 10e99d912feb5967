"""
Getting files and rows over a connection that breaks, from hosts that are busy, gone, or not what they say.

    patiently   one request, again after transport errors, 408, 429 and 5xx: when the server says, or soon
    Net         https to public addresses alone; redirects by hand; the token for the hub alone; 4 to a host
    fetch       one file: continued where it broke, size and sha256 compared, written aside and renamed
    fetch_all   many side by side; the manifest knows what was had and what was not, and why
    hub_files   what a repository has, at one revision
    hub_rows    the rows of a set, 100 to a page, or as parquet

A leaf of `tools.prepare`: it knows nothing of any data set.
"""
import contextlib
import email.utils
import fnmatch
import functools
import hashlib
import importlib.util
import ipaddress
import itertools
import json
import os
import random
import re
import shutil
import socket
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote, urlencode, urljoin, urlsplit

import requests
from tqdm import tqdm

from lib.media import BadMedia, image_size, inside_folder, open_video


TRIES, PAUSE = 5, 1.0      # of a request; seconds before the second try
PER_HOST, WORKERS = 4, 16  # requests at a time
IMAGE_BYTES = 64 << 20   # an image's file may have
RESERVE = 1 << 30          # bytes of disk that stay free
WHOLE = 20_000             # rows that are read a page at a time; more come as parquet


class UserError(Exception):
    """A mistake in the command or around it: one line, exit 2."""


class NetError(Exception):
    """A request that failed for good: what was asked for, how often, and the last reason."""


# ---- requests ----------------------------------------------------------------------------------------------

def retry_after(response):
    """Seconds a server asks to wait (a number, or a date), at most 300; None where it does not say. The hub
    also says so in a header of its own: RateLimit: "api";r=0;t=55."""
    said = response.headers.get("Retry-After", "").strip()
    limit = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
    said = said or limit and limit[1] or ""
    if said.isdigit():
        return min(int(said), 300)
    try:
        return min(max(email.utils.parsedate_to_datetime(said).timestamp() - time.time(), 0), 300)
    except ValueError:
        return None


def patiently(send, what, tries=5, pause=1.0):
    """send() -> requests.Response, sent again with exponential back-off and jitter after transport errors,
    408, 429 and 5xx; honours Retry-After (seconds or a date, at most 300 s). Returns the first response with
    any other status; raises NetError naming `what`, the number of tries and the last reason."""
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
    """(scheme, host, port) of a URL; NetError if it is none."""
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port
    except ValueError:
        raise NetError(f"is no URL ({url[:200]!r})") from None


def is_loopback(host):
    """Whether a host's name or address is this machine, without asking anyone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_public(address):
    """Whether an IP address is one of the public internet."""
    return ipaddress.ip_address(address.split("%")[0]).is_global


class Net:
    """Requests as this file makes them: https to public addresses alone, redirects followed by hand, the
    token sent to the hub alone, four at a time to one host."""

    def __init__(self):
        self.hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        mirror = is_loopback(origin(self.hub)[1])
        if not mirror and not self.hub.startswith("https://"):
            raise UserError(f"HF_ENDPOINT {self.hub}: must be https, or on this machine")
        self.viewer = self.hub if mirror else "https://datasets-server.huggingface.co"
        self.own, self.mirror = {origin(self.hub), origin(self.viewer)}, mirror
        self.token = os.environ.get("HF_TOKEN")
        self.offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        self.local, self.hosts, self.lock = threading.local(), {}, threading.Lock()

    def slot(self, url):
        """At most so many requests to one host at a time."""
        with self.lock:
            return self.hosts.setdefault(origin(url)[1], threading.BoundedSemaphore(PER_HOST))

    def allow(self, url):
        """NetError unless a URL is https and its host public: no data, no redirect reaches into a network.
        A name may lead elsewhere a moment later (DNS rebinding): a private host then has no certificate for it,
        and is told nothing."""
        scheme, host, port = origin(url)
        if (scheme, host, port) in self.own:
            return  # as the user set it
        if scheme != "https" or not host:
            raise NetError(f"{url[:200]}: only https is read")
        if requests.utils.get_environ_proxies(url) and re.search(r"[a-z]", host) and ":" not in host \
                and host != "localhost":
            return  # names are the proxy's to resolve
        try:
            found = {a[4][0] for a in socket.getaddrinfo(host, port or 443, type=socket.SOCK_STREAM)}
        except (OSError, UnicodeError) as e:
            raise NetError(f"{url[:200]}: no such host ({e})") from None
        if not all(map(is_public, found)):
            raise NetError(f"{url[:200]}: {host} is a private address")

    def get(self, url, what, headers=None, tries=None):
        """The response to a GET, its body not yet read; `linked`: (size, sha256) of a hub file, as far as
        told."""
        if self.offline:
            raise NetError(f"{what}: not here, and HF_HUB_OFFLINE is set")
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()

        def send():
            target, linked = url, (None, None)
            for _ in range(6):
                self.allow(target)
                own, sent = origin(target) in self.own, {"Accept-Encoding": "identity"} | (headers or {})
                if origin(target) != origin(url):  # elsewhere nobody is told who asks
                    sent = {k: v for k, v in sent.items() if k in ("Accept-Encoding", "Range")}
                if self.token and own:
                    sent["Authorization"] = f"Bearer {self.token}"
                r = self.local.session.get(target, headers=sent, stream=True, timeout=(10, 60),
                                           allow_redirects=False)
                size, etag = (r.headers.get(f"X-Linked-{k}", "").strip('W/"') for k in ("Size", "Etag"))
                if own and len(etag) == 64:
                    linked = int(size) if size.isdigit() else None, etag
                if not r.is_redirect:
                    r.linked = linked
                    return r
                r.close()
                try:
                    target = urljoin(target, r.headers["Location"])
                except ValueError:
                    raise NetError(f"{what}: redirected to what is no URL") from None
            raise NetError(f"{what}: more than 5 redirects")

        return patiently(send, what, tries or TRIES, PAUSE)

    def json(self, url, what, needs=None, tries=None):
        """(parsed answer, the next page's URL or None); `needs` is a field that the answer must have."""
        for _ in range(TRIES):
            with self.slot(url), self.get(url, what, tries=tries) as r:
                self.must(r, what)
                with contextlib.suppress(requests.RequestException):  # it broke in the middle: again
                    body = r.content
                    try:
                        answer = json.loads(body)
                    except (ValueError, RecursionError):
                        raise NetError(f"{what}: the answer is not JSON: {body[:80]!r}") from None
                    if needs and not (isinstance(answer, dict) and needs in answer):
                        raise NetError(f"{what}: the answer has no {needs}: {body[:80]!r}")
                    return answer, r.links.get("next", {}).get("url")
        raise NetError(f"{what}: the connection broke {TRIES} times")

    def must(self, r, what):
        """NetError unless a response carries what was asked for."""
        if r.status_code in (401, 403) and origin(r.url) in self.own:
            raise NetError(f"{what}: status {r.status_code}, behind terms or private: accept them on its "
                           f"page at {self.hub} and set HF_TOKEN to a token that may read it")
        if r.status_code not in (200, 206):
            raise NetError(f"{what}: status {r.status_code} {r.reason}")


def room_for(path, size=0):
    """UserError when a file of so many bytes would fill the disk."""
    free = shutil.disk_usage(os.path.dirname(path)).free
    if free < size + RESERVE:
        raise UserError(f"{os.path.dirname(path)}: {free / 1e9:.1f} GB free, {(size + RESERVE) / 1e9:.1f} "
                        "needed: make room, or take less with --limit")


def fetch(net, url, path, size=None, sha256=None, most=None, mark="", headers=None, trust=None, tries=TRIES):
    """One file: continued where an earlier try stopped, compared with its size and sha256, looked at by
    `trust`, renamed.

    mark: what makes the contents what they are (a revision); a partial file of another one is not continued.
    most: bytes that are too many. NetError after `tries` in a row that brought nothing, or as many files that
    were thrown away; BadMedia of `trust`.
    """
    what, part, failed, wasted = url[:200], f"{path}{mark and '.'}{mark}.part", 0, 0
    os.makedirs(os.path.dirname(path), exist_ok=True)
    while max(failed, wasted) < tries:
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
        wasted += not os.path.exists(part)
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
    go_on = r.status_code == 206
    if go_on and not r.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        return "the server sent another range than it was asked for"
    length = r.headers.get("Content-Length", "")
    total = int(length) + have * go_on if length.isdigit() else None
    room_for(part, total or 0)
    with open(part, "ab" if go_on else "wb") as f, \
            tqdm(total=total, initial=f.tell(), unit="B", unit_scale=True, leave=False,
                 disable=None if (total or 0) > 50 << 20 else True) as bar:
        try:
            for chunk in r.iter_content(1 << 16):
                f.write(chunk)
                bar.update(len(chunk))
                if most and f.tell() > most:
                    raise NetError(f"{what}: more than {most} bytes")
        except requests.RequestException as e:
            return f"the connection broke ({type(e).__name__})"
        if not most:  # a weight file must outlive a power cut, a picture need not
            f.flush()
            os.fsync(f.fileno())
    came = os.path.getsize(part)
    return "" if total in (None, came) else f"{came} bytes came instead of {total}"


def file_digest(path):
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Manifest:
    """OUT/media/manifest.jsonl: a line for every file fetched, or not, and why; the last one counts."""

    def __init__(self, path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.path, self.lock, self.why, self.dead = path, threading.Lock(), {}, set()
        with open(path, "ab+") as f:
            f.seek(0)
            line = b"\n"
            for line in f:
                with contextlib.suppress(ValueError):  # the line that a kill cut short
                    self.learn(json.loads(line))
            if not line.endswith(b"\n"):
                f.write(b"\n")

    def learn(self, entry):
        file, reason = entry["file"], entry["reason"]
        self.why.pop(file, None)
        self.dead.discard(file)
        if reason:
            self.why[file] = reason
            self.dead |= set() if entry["again"] else {file}

    def note(self, file, url, reason="", again=False):
        """Write down what became of a file; `again` if it may be there the next time."""
        entry = dict(file=file, url=url, done=not reason, reason=reason, again=again)
        with self.lock, open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")
            self.learn(entry)


def is_image(path):
    """BadMedia unless a file is a picture: hosts send pages in place of those that are gone."""
    image_size(path)


def is_video(path):
    """BadMedia unless a file is a video."""
    open_video(path)[0].close()


def fetch_all(net, manifest, jobs, what, fresh=False):
    """Fetch [(url, path, options of `fetch`)] side by side; the manifest says which could not be had. Links
    known to be dead are not asked for, unless they are fresh; what may be the network's fault is asked for
    the next time."""
    def one(job):
        url, path, options = job
        try:
            fetch(net, url, path, **options)
            manifest.note(path, url)
        except (NetError, BadMedia) as e:
            reason = str(e).removeprefix(f"{path}.part: ").removeprefix(f"{url[:200]}: ")
            again = net.offline or any(t in reason for t in ("gave up", "HF_TOKEN", "no such host"))
            manifest.note(path, url, reason, again)

    jobs = list({job[1]: job for job in jobs if not os.path.exists(job[1])
                 and (fresh or job[1] not in manifest.dead)}.values())
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in tqdm(pool.map(one, jobs), what, len(jobs), leave=False,
                      disable=None if len(jobs) > 1 else True):
            pass


# ---- the hub -----------------------------------------------------------------------------------------------

def hub_files(net, repo, patterns, kind="datasets"):
    """The files of a hub repository that match, at its newest revision: [dict(url, name, size, sha256,
    mark)]."""
    where = f"{net.hub}/api/{kind}/{repo}"
    revision = net.json(where, f"{kind} {repo}", "sha")[0]["sha"]
    page, found = f"{where}/tree/{quote(revision)}?recursive=true", []
    while page:
        entries, page = net.json(page, f"files of {repo}")
        found += [e for e in entries if e["type"] == "file"
                  and any(fnmatch.fnmatch(e["path"], p) for p in patterns)]
    if not found:
        raise NetError(f"{repo}: has no file {' or '.join(patterns)}")
    head = f"{net.hub}/{'datasets/' if kind == 'datasets' else ''}{repo}/resolve/{quote(revision)}/"
    return [dict(url=head + quote(e["path"]), name=e["path"], size=e["size"],
                 sha256=(e.get("lfs") or {}).get("oid"), mark=revision[:8]) for e in found]


def fetch_files(net, files, folder):
    """Those of `files` that are not in `folder` yet; their paths. NetError names the first that cannot be
    had."""
    os.makedirs(folder, exist_ok=True)
    paths = [inside_folder(folder, f["name"]) for f in files]
    jobs = [(f, path) for f, path in zip(files, paths) if not os.path.exists(path)]
    room_for(os.path.join(folder, "x"), sum(f["size"] or 0 for f, _ in jobs))
    with ThreadPoolExecutor(PER_HOST) as pool:
        list(pool.map(lambda job: fetch(net, job[0]["url"], job[1], job[0]["size"], job[0]["sha256"],
                                        mark=job[0]["mark"]), jobs))
    return paths


def hub_page(net, repo, config, split, offset, length):
    """`length` rows from `offset` on, as the hub answers."""
    query = urlencode(dict(dataset=repo, config=config, split=split, offset=offset, length=length))
    again = functools.partial(hub_page, net, repo, config, split)
    try:
        page = net.json(f"{net.viewer}/rows?{query}", f"rows {offset} of {repo}", "rows",
                        TRIES if length == 1 else 3)[0]
    except NetError as e:
        if "gave up" not in str(e) or "status 429" in str(e) or length == 1:
            raise
        part = max(length // 10, 1)  # a page may be too much for the server
        parts = [again(at, min(part, offset + length - at)) for at in range(offset, offset + length, part)]
        return parts[0] | dict(rows=[row for p in parts for row in p["rows"]])
    came = len(page["rows"])
    if 0 < came < length and offset + came < page.get("num_rows_total", 0):
        page["rows"] += again(offset + came, length - came)["rows"]
    return page


def hub_rows(net, repo, config, split, length=100, limit=None, keep=lambda rows, may_ask_again: False, cache=None):
    """The rows of a set on the hub, each a dict, `length` to a page, some pages ahead. keep(rows) puts
    pictures inside them on the disk, and asks for the page once more when their links have expired. Large
    sets come as parquet files, into `cache`."""
    first = hub_page(net, repo, config, split, 0, min(length, limit or length))
    total = first.get("num_rows_total", len(first["rows"]))
    if first.get("partial"):
        print(f"{repo} {config}: the hub offers only the first {total:,} rows this way")
    if not limit and total > WHOLE:
        yield from parquet_rows(net, repo, config, split, keep, cache)
        return
    total = min(total, limit or total)
    starts, waiting = iter(range(length, total, length)), deque()
    with ThreadPoolExecutor(PER_HOST) as pool:
        while True:
            for at in itertools.islice(starts, 2 * PER_HOST - len(waiting)):
                waiting.append((at, pool.submit(hub_page, net, repo, config, split, at,
                                                min(length, total - at))))
            at, page = (0, first) if first else (waiting[0][0], waiting.popleft()[1].result())
            first = None
            for may_ask_again in (True, True, False):
                if not keep(page["rows"], may_ask_again):
                    break
                page = hub_page(net, repo, config, split, at, min(length, total - at))
            yield from (r["row"] for r in page["rows"])
            if not waiting:
                return


def parquet_rows(net, repo, config, split, keep, cache):
    """All rows of a large set, from the hub's parquet files, by pyarrow if it is there."""
    if not importlib.util.find_spec("pyarrow"):
        raise UserError(f"{repo} {config} {split}: more than {WHOLE:,} rows are read as parquet, which needs "
                        "pyarrow (pip install pyarrow); or take some, with --limit")
    import pyarrow.parquet
    query = urlencode(dict(dataset=repo, config=config, split=split))
    listed = net.json(f"{net.viewer}/parquet?{query}", f"parquet files of {repo}", "parquet_files")[0][
        "parquet_files"]
    files = [dict(url=f["url"], name=f"{config}/{split}/{os.path.basename(f['filename'])}", size=f["size"],
                  sha256=None, mark="") for f in listed if (f["config"], f["split"]) == (config, split)]
    number = 0
    for path in fetch_files(net, files, cache):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256):
            rows = [dict(row_idx=number + i, row=row) for i, row in enumerate(batch.to_pylist())]
            number += len(rows)
            keep(rows, False)
            yield from (r["row"] for r in rows)
