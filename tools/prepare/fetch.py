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

from lib.errors import BadMedia, UserError
from lib.media import image_size, inside_folder, open_video


TRIES = 5               # of a request
PAUSE = 1.0             # seconds before the second try; then twice as many, and so on
PER_HOST = 4            # requests at a time to one host
WORKERS = 16            # requests at a time
IMAGE_BYTES = 64 << 20  # an image's file may have
RESERVE = 1 << 30       # bytes of disk that stay free
WHOLE = 20_000          # rows that are read a page at a time; more come as parquet


class NetError(Exception):
    """A request that failed for good: what was asked for, how often, and the last reason."""


# ---- requests ----------------------------------------------------------------------------------------------

def retry_after(response):
    """Seconds a server asks to wait (a number, or a date), at most 300; None where it does not say. The hub
    also says so in a header of its own: RateLimit: "api";r=0;t=55."""
    wait = response.headers.get("Retry-After", "").strip()
    limit = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
    if limit and not wait:
        wait = limit[1]
    if wait.isdigit():
        return min(int(wait), 300)
    try:
        seconds = email.utils.parsedate_to_datetime(wait).timestamp() - time.time()
        return min(max(seconds, 0), 300)
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
            code = response.headers.get("X-Error-Code", "")
            reason = f"status {response.status_code} {response.reason} {code}".rstrip()
            asked = retry_after(response)
            if asked is not None:
                wait = asked
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


def linked_file(response):
    """(size or None, sha256) of the file that the hub's answer leads to, or None where it reports none."""
    size = response.headers.get("X-Linked-Size", "")
    sha256 = response.headers.get("X-Linked-Etag", "").strip('W/"')
    if len(sha256) != 64:
        return None
    return int(size) if size.isdigit() else None, sha256


class Net:
    """Requests as this file makes them: https to public addresses alone, redirects followed by hand, the
    token sent to the hub alone, four at a time to one host."""

    def __init__(self):
        self.hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self.mirror = is_loopback(origin(self.hub)[1])
        if not self.mirror and not self.hub.startswith("https://"):
            raise UserError(f"HF_ENDPOINT {self.hub}: must be https, or on this machine")
        self.viewer = self.hub if self.mirror else "https://datasets-server.huggingface.co"
        self.trusted = {origin(self.hub), origin(self.viewer)}  # as the user set them
        self.token = os.environ.get("HF_TOKEN")
        self.offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        self.local = threading.local()  # a session for each thread
        self.lock = threading.Lock()
        self.hosts = {}                 # host -> semaphore

    def slot(self, url):
        """At most so many requests to one host at a time."""
        with self.lock:
            return self.hosts.setdefault(origin(url)[1], threading.BoundedSemaphore(PER_HOST))

    def allow(self, url):
        """NetError unless a URL is https and its host public: no data, no redirect reaches into a network.
        A name may lead elsewhere a moment later (DNS rebinding): a private host then has no certificate for it,
        and learns nothing from us."""
        scheme, host, port = origin(url)
        if (scheme, host, port) in self.trusted:
            return
        if scheme != "https" or not host:
            raise NetError(f"{url[:200]}: only https is read")
        is_name = re.search(r"[a-z]", host) and ":" not in host
        if is_name and host != "localhost" and requests.utils.get_environ_proxies(url):
            return  # names are the proxy's to resolve
        try:
            # each entry: family, type, protocol, name, (address, port)
            found = {entry[4][0] for entry in socket.getaddrinfo(host, port or 443, type=socket.SOCK_STREAM)}
        except (OSError, UnicodeError) as e:
            raise NetError(f"{url[:200]}: no such host ({e})") from None
        if not all(map(is_public, found)):
            raise NetError(f"{url[:200]}: {host} is a private address")

    def get(self, url, what, headers=None, tries=None):
        """The response to a GET, its body not yet read; its `linked` is (size, sha256) of a file of the hub."""
        if self.offline:
            raise NetError(f"{what}: not here, and HF_HUB_OFFLINE is set")
        return patiently(lambda: self.follow(url, what, headers or {}), what, tries or TRIES, PAUSE)

    def follow(self, url, what, headers):
        """One GET, through up to 5 redirects."""
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()
        target = url
        linked = None, None
        for _ in range(6):
            self.allow(target)
            response = self.local.session.get(target, headers=self.headers_for(target, url, headers), stream=True,
                                              timeout=(10, 60), allow_redirects=False)
            if origin(target) in self.trusted:
                linked = linked_file(response) or linked
            if not response.is_redirect:
                response.linked = linked
                return response
            response.close()
            try:
                target = urljoin(target, response.headers["Location"])
            except ValueError:
                raise NetError(f"{what}: redirected to what is no URL") from None
        raise NetError(f"{what}: more than 5 redirects")

    def headers_for(self, target, url, headers):
        """What a host may know. Where a redirect of `url` leads elsewhere, nobody learns who asks."""
        allowed = {"Accept-Encoding": "identity"} | headers
        if origin(target) != origin(url):
            allowed = {k: v for k, v in allowed.items() if k in ("Accept-Encoding", "Range")}
        if self.token and origin(target) in self.trusted:
            allowed["Authorization"] = f"Bearer {self.token}"
        return allowed

    def json(self, url, what, needs=None, tries=None):
        """(parsed answer, the next page's URL or None); `needs` is a field that the answer must have."""
        for _ in range(TRIES):
            with self.slot(url), self.get(url, what, tries=tries) as response:
                self.must(response, what)
                try:
                    body = response.content
                except requests.RequestException:  # it broke in the middle: again
                    continue
                try:
                    answer = json.loads(body)
                except (ValueError, RecursionError):
                    raise NetError(f"{what}: the answer is not JSON: {body[:80]!r}") from None
                if needs and not (isinstance(answer, dict) and needs in answer):
                    raise NetError(f"{what}: the answer has no {needs}: {body[:80]!r}")
                return answer, response.links.get("next", {}).get("url")
        raise NetError(f"{what}: the connection broke {TRIES} times")

    def must(self, response, what):
        """NetError unless a response carries what was asked for."""
        status = response.status_code
        if status in (401, 403) and origin(response.url) in self.trusted:
            raise NetError(f"{what}: status {status}, behind terms or private: accept them on its "
                           f"page at {self.hub} and set HF_TOKEN to a token that may read it")
        if status not in (200, 206):
            raise NetError(f"{what}: status {status} {response.reason}")


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
    what = url[:200]
    part = f"{path}.{mark}.part" if mark else f"{path}.part"
    failed = 0   # tries in a row that brought nothing
    thrown = 0   # files that were thrown away
    os.makedirs(os.path.dirname(path), exist_ok=True)
    while max(failed, thrown) < tries:
        if failed:
            time.sleep(PAUSE * 2 ** failed * random.uniform(0.5, 1))
        have = os.path.getsize(part) if os.path.exists(part) else 0
        sent = dict(headers or {})
        if have:
            sent["Range"] = f"bytes={have}-"
        with net.slot(url), net.get(url, what, sent, tries) as response:
            linked_size, linked_sha256 = response.linked
            size = linked_size if size is None else size
            sha256 = sha256 or linked_sha256
            problem = receive(net, response, part, have, what, most, url)
        problem = problem or wrong_contents(part, size, sha256)
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
        if not os.path.exists(part):
            thrown += 1
            failed += 1
        elif os.path.getsize(part) > have:
            failed = 0
        else:
            failed += 1
    raise NetError(f"{what}: gave up after {tries} tries, the last: {problem}")


def wrong_contents(part, size, sha256):
    """Remove a file that is not the published one, and say why; "" if it is."""
    if size is not None and os.path.getsize(part) != size:
        problem = f"{os.path.getsize(part)} bytes instead of {size}"
    elif sha256 and file_digest(part) != sha256:
        problem = "its sha256 is not the one published"
    else:
        return ""
    os.remove(part)
    return problem


def receive(net, response, part, have, what, most, url):
    """The body of a response into a partial file that has `have` bytes: what went wrong, or ""."""
    content_range = response.headers.get("Content-Range", "")
    if response.status_code == 416:  # nothing after what is here: all of it, or too much
        if content_range.endswith(f"/{have}"):
            return ""
        os.remove(part)
        return "the server has less than was here"
    if response.status_code == 403 and response.url != url:
        return "status 403: the signed link has expired"  # what led there leads to a new one
    net.must(response, what)
    continues = response.status_code == 206
    if continues and not content_range.startswith(f"bytes {have}-"):
        return "the server sent another range than it was asked for"
    length = response.headers.get("Content-Length", "")
    total = None
    if length.isdigit():
        total = int(length) + have if continues else int(length)
    room_for(part, total or 0)
    is_large = (total or 0) > 50 << 20
    # a server that ignores the range sends all of it: from the start
    with open(part, "ab" if continues else "wb") as f, \
            tqdm(total=total, initial=f.tell(), unit="B", unit_scale=True, leave=False,
                 disable=None if is_large else True) as bar:
        try:
            for chunk in response.iter_content(1 << 16):
                f.write(chunk)
                bar.update(len(chunk))
                if most and f.tell() > most:
                    raise NetError(f"{what}: more than {most} bytes")
        except requests.RequestException as e:
            return f"the connection broke ({type(e).__name__})"
        if not most:  # a weight file must outlive a power cut, an image need not
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
        self.path = path
        self.lock = threading.Lock()
        self.why = {}      # file -> why it could not be had
        self.dead = set()  # files that are not tried again
        with open(path, "ab+") as f:
            f.seek(0)
            line = b"\n"
            for line in f:
                with contextlib.suppress(ValueError):  # the line that a kill cut short
                    self.learn(json.loads(line))
            if not line.endswith(b"\n"):
                f.write(b"\n")

    def learn(self, entry):
        file = entry["file"]
        self.why.pop(file, None)
        self.dead.discard(file)
        if entry["reason"]:
            self.why[file] = entry["reason"]
            if not entry["again"]:
                self.dead.add(file)

    def note(self, file, url, reason="", again=False):
        """Write down what became of a file; `again` if it may be there the next time."""
        entry = dict(file=file, url=url, done=not reason, reason=reason, again=again)
        with self.lock, open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")
            self.learn(entry)


def is_image(path):
    """BadMedia unless a file is an image: hosts send pages in place of those that are gone."""
    image_size(path)


def is_video(path):
    """BadMedia unless a file is a video."""
    open_video(path)[0].close()


def fetch_all(net, manifest, jobs, what, fresh=False):
    """Fetch [(url, path, options of `fetch`)] side by side; the manifest says which could not be had. Links
    known to be dead are not tried, unless they are fresh. What may be the network's fault is not
    known to be dead: the next run tries it again."""
    def fetch_one(job):
        url, path, options = job
        try:
            fetch(net, url, path, **options)
            manifest.note(path, url)
        except (NetError, BadMedia) as e:
            reason = str(e).removeprefix(f"{path}.part: ").removeprefix(f"{url[:200]}: ")
            again = net.offline or any(text in reason for text in ("gave up", "HF_TOKEN", "no such host"))
            manifest.note(path, url, reason, again)

    wanted = {}  # each path once
    for job in jobs:
        _, path, _ = job
        if not os.path.exists(path) and (fresh or path not in manifest.dead):
            wanted[path] = job
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in tqdm(pool.map(fetch_one, wanted.values()), what, len(wanted), leave=False,
                      disable=None if len(wanted) > 1 else True):
            pass


# ---- the hub -----------------------------------------------------------------------------------------------

def hub_files(net, repo, patterns, kind="datasets"):
    """The files of a hub repository that match, at its newest revision, each as a dict of url,
    name, size, sha256 and mark."""
    api = f"{net.hub}/api/{kind}/{repo}"
    info, _ = net.json(api, f"{kind} {repo}", "sha")
    revision = info["sha"]
    folder = "datasets/" if kind == "datasets" else ""
    head = f"{net.hub}/{folder}{repo}/resolve/{quote(revision)}/"
    found = []
    page = f"{api}/tree/{quote(revision)}?recursive=true"
    while page:
        entries, page = net.json(page, f"files of {repo}")
        for entry in entries:
            path = entry["path"]
            if entry["type"] == "file" and any(fnmatch.fnmatch(path, pattern) for pattern in patterns):
                sha256 = (entry.get("lfs") or {}).get("oid")
                found.append(dict(url=head + quote(path), name=path, size=entry["size"], sha256=sha256,
                                  mark=revision[:8]))
    if not found:
        raise NetError(f"{repo}: has no file {' or '.join(patterns)}")
    return found


def fetch_files(net, files, folder):
    """Those of `files` that are not in `folder` yet; their paths. NetError names the first that cannot be had."""
    os.makedirs(folder, exist_ok=True)
    paths = [inside_folder(folder, file["name"]) for file in files]
    missing = [(file, path) for file, path in zip(files, paths) if not os.path.exists(path)]
    room_for(os.path.join(folder, "x"), sum(file["size"] or 0 for file, _ in missing))

    def fetch_one(job):
        file, path = job
        fetch(net, file["url"], path, file["size"], file["sha256"], mark=file["mark"])

    with ThreadPoolExecutor(PER_HOST) as pool:
        list(pool.map(fetch_one, missing))
    return paths


def hub_page(net, repo, config, split, offset, length):
    """`length` rows from `offset` on, as the hub answers."""
    query = urlencode(dict(dataset=repo, config=config, split=split, offset=offset, length=length))
    tries = TRIES if length == 1 else 3
    try:
        page, _ = net.json(f"{net.viewer}/rows?{query}", f"rows {offset} of {repo}", "rows", tries)
    except NetError as e:
        if "gave up" not in str(e) or "status 429" in str(e) or length == 1:
            raise
        # it may be too much for the server
        part = max(length // 10, 1)
        end = offset + length
        pages = [hub_page(net, repo, config, split, start, min(part, end - start))
                 for start in range(offset, end, part)]
        rows = list(itertools.chain.from_iterable(page["rows"] for page in pages))
        return pages[0] | dict(rows=rows)
    came = len(page["rows"])
    if 0 < came < length and offset + came < page.get("num_rows_total", 0):
        page["rows"] += hub_page(net, repo, config, split, offset + came, length - came)["rows"]
    return page


def hub_rows(net, repo, config, split, length=100, limit=None, keep=lambda rows, may_ask_again: False, cache=None):
    """The rows of a set on the hub, each a dict, `length` to a page, some pages ahead. keep(rows, may_ask_again)
    puts images inside them on the disk; it returns True to have the page again, as links in it have expired.
    Large sets come as parquet files, into `cache`."""
    # the first page tells how many rows there are
    page = hub_page(net, repo, config, split, 0, min(length, limit or length))
    total = page.get("num_rows_total", len(page["rows"]))
    if page.get("partial"):
        print(f"{repo} {config}: the hub offers only the first {total:,} rows this way")
    if not limit and total > WHOLE:
        yield from parquet_rows(net, repo, config, split, keep, cache)
        return
    total = min(total, limit or total)

    def get_page(start):
        return hub_page(net, repo, config, split, start, min(length, total - start))

    waiting = deque()  # pages that are being fetched
    next_start = length
    with ThreadPoolExecutor(PER_HOST) as pool:
        for start in range(0, max(total, 1), length):
            while next_start < total and len(waiting) < 2 * PER_HOST:
                waiting.append(pool.submit(get_page, next_start))
                next_start += length
            if start > 0:
                page = waiting.popleft().result()
            for may_ask_again in (True, True, False):
                if not keep(page["rows"], may_ask_again):
                    break
                page = get_page(start)
            yield from (entry["row"] for entry in page["rows"])


def parquet_rows(net, repo, config, split, keep, cache):
    """All rows of a large set, from the hub's parquet files, by pyarrow if it is there."""
    if not importlib.util.find_spec("pyarrow"):
        raise UserError(f"{repo} {config} {split}: more than {WHOLE:,} rows are read as parquet, which needs "
                        "pyarrow (pip install pyarrow); or take some, with --limit")
    import pyarrow.parquet
    query = urlencode(dict(dataset=repo, config=config, split=split))
    listed, _ = net.json(f"{net.viewer}/parquet?{query}", f"parquet files of {repo}", "parquet_files")
    files = []
    for file in listed["parquet_files"]:
        if (file["config"], file["split"]) == (config, split):
            name = f"{config}/{split}/{os.path.basename(file['filename'])}"
            files.append(dict(url=file["url"], name=name, size=file["size"], sha256=None, mark=""))
    number = 0
    for path in fetch_files(net, files, cache):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256):
            rows = [dict(row_idx=i, row=row) for i, row in enumerate(batch.to_pylist(), number)]
            number += len(rows)
            keep(rows, False)
            yield from (entry["row"] for entry in rows)
