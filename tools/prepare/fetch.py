"""
Getting files and rows over a connection that breaks, from hosts that are busy, gone, or not what they say.

    patiently   one request, again after transport errors, 408, 429 and 5xx: when the server says, or soon
    Net         https to public addresses alone; redirects by hand; the token for the hub alone; 4 to a host
    fetch       one file: continued where it broke, size and sha256 compared, written aside and renamed
    fetch_all   many side by side; the manifest knows what was had and what was not, and why
    hub_files   what a repository has, at one revision
    hub_rows    the rows of a table: as parquet, or 100 to a page of the viewer (datasets-server)

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
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
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
WHOLE = 20_000          # rows that are read a page at a time; more come as parquet where pyarrow is installed
PROJECT = "https://github.com/search?q=nanoMolmo2"  # who asks; put the address of your copy here
GATED = ("GatedRepo", "ExternalUnauthenticatedError", "ExternalAuthenticatedError")  # X-Error-Code of the hub
PARTIAL = "rows are all that the hub offers of"


class NetError(Exception):
    """A request that failed: what was asked for, how often, and the last reason.

    status: of the last answer, 0 where there was none. code: its X-Error-Code. again: another day it may succeed.
    """

    def __init__(self, text, status=0, code="", again=False):
        super().__init__(text)
        self.status = status
        self.code = code
        self.again = again


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


def patiently(send, what, tries=5, pause=1.0, explain=lambda response: ""):
    """send() -> requests.Response, sent again with exponential back-off and jitter after transport errors,
    408, 429 and 5xx; honours Retry-After (seconds or a date, at most 300 s). Returns the first response with
    any other status (501 is one: the server will never do it); raises NetError naming `what`, the number of tries
    and the last reason, with what `explain` reads in the response."""
    for n in range(tries):
        status = 0
        code = ""
        wait = pause * 2 ** n * random.uniform(0.5, 1.0)
        try:
            response = send()
        except requests.RequestException as e:
            if isinstance(e, ValueError):
                raise NetError(f"{what}: {e}") from None  # no URL at all: asking again will not help
            reason = f"{type(e).__name__}: {e}"
        else:
            status = response.status_code
            code = response.headers.get("X-Error-Code", "")
            if status not in (408, 429) and (status < 500 or status == 501):
                return response
            reason = f"status {status} {response.reason}{explain(response)}"
            asked = retry_after(response)
            if asked is not None:
                wait = asked
            response.close()
        if n + 1 < tries:
            time.sleep(wait)
    raise NetError(f"{what}: gave up after {tries} tries, the last: {reason}", status, code, again=True)


def user_agent():
    """The name under which we ask. Hosts such as Wikimedia's refuse that of a library, and want an address."""
    contact = os.environ.get("NANOMOLMO2_CONTACT", "")
    if not (contact.isascii() and contact.isprintable()):
        raise UserError(f"NANOMOLMO2_CONTACT {contact!r}: must be an address in plain ASCII")
    return f"nanoMolmo2/1 (+{PROJECT}{contact and f'; {contact}'})"


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
        self.agent = user_agent()
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
            raise NetError(f"{url[:200]}: no such host ({e})", again=True) from None
        if not all(map(is_public, found)):
            raise NetError(f"{url[:200]}: {host} is a private address")

    def get(self, url, what, headers=None, tries=None):
        """The response to a GET, its body not yet read; its `linked` is (size, sha256) of a file of the hub."""
        if self.offline:
            raise NetError(f"{what}: not here, and HF_HUB_OFFLINE is set", again=True)
        return patiently(lambda: self.follow(url, what, headers or {}), what, tries or TRIES, PAUSE, self.explain)

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
        """What a host may know. Where a redirect of `url` leads elsewhere, no secret goes along."""
        allowed = {"Accept-Encoding": "identity", "User-Agent": self.agent} | headers
        if origin(target) != origin(url):
            allowed = {k: v for k, v in allowed.items() if k in ("Accept-Encoding", "User-Agent", "Range")}
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
        raise NetError(f"{what}: the connection broke {TRIES} times", again=True)

    def explain(self, response):
        """What the hub says is wrong, as ", CODE: message"; "" where it says nothing, or another host answers."""
        if origin(response.url) not in self.trusted:
            return ""
        code = response.headers.get("X-Error-Code", "")
        message = response.headers.get("X-Error-Message", "")
        with contextlib.suppress(requests.RequestException, ValueError, RecursionError, LookupError, TypeError):
            message = str(json.loads(response.content)["error"])
        message = "".join(filter(str.isprintable, " ".join(message.split())))[:300]
        return (code and f", {code}"[:100]) + (message and f": {message}")

    def must(self, response, what):
        """NetError unless a response carries what was asked for. A host that refuses (403) may not do so for ever;
        what is gone (404, 410) or no request at all (400) is not asked for again."""
        status = response.status_code
        if status in (200, 206):
            return
        text = f"{what}: status {status} {response.reason}{self.explain(response)}"
        code = response.headers.get("X-Error-Code", "")
        is_closed = status in (401, 403) or code in GATED
        if is_closed and origin(response.url) in self.trusted:
            text += (f"; there is no such name, or it is private or behind terms: look at its page at {self.hub}, "
                     "accept the terms there and set HF_TOKEN to a token that may read it")
        raise NetError(text, status, code, again=is_closed or status not in (400, 404, 410))


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
    raise NetError(f"{what}: gave up after {tries} tries, the last: {problem}", again=True)


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
    if response.status_code == 403 and response.url != url and origin(url) in net.trusted:
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
            manifest.note(path, url, reason, getattr(e, "again", False))

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


def save(path, content):
    """Bytes to a file that is there whole or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.part", "wb") as f:
        f.write(content)
    os.replace(f"{path}.part", path)


class Table(NamedTuple):
    """A table of the hub."""
    repo: str
    config: str
    split: str

    def __str__(self):
        return " ".join(self)


def ask_viewer(net, endpoint, table, what, needs, **more):
    """The viewer's answer about a table; `needs` is a field that it must have."""
    query = urlencode(dict(dataset=table.repo, config=table.config, split=table.split, **more))
    answer, _ = net.json(f"{net.viewer}/{endpoint}?{query}", what, needs, tries=3)
    return answer


def moved_table(net, table, error, search):
    """Where a table is that the viewer did not find: under the repository's new name, to which the hub leads but the
    viewer does not; or, if `search`, in the one config that has its split, or bears its name. Else the error again."""
    if error.code == "RenamedDatasetError":
        info, _ = net.json(f"{net.hub}/api/datasets/{table.repo}", f"datasets {table.repo}", "id")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(info["id"])) or info["id"] == table.repo:
            raise error
        return table._replace(repo=info["id"])
    if error.status != 404 or error.code in GATED or not search:
        raise error
    try:
        query = urlencode(dict(dataset=table.repo))
        listed, _ = net.json(f"{net.viewer}/splits?{query}", f"splits of {table.repo}", "splits", tries=3)
    except NetError:
        raise error from None
    tables = [Table(table.repo, str(entry["config"]), str(entry["split"])) for entry in listed["splits"]]
    found = [t for t in tables if t.split == table.split] or [t for t in tables if t.config == table.split]
    if len(found) != 1 or found == [table]:
        names = ", ".join(f"{t.config} {t.split}" for t in tables[:20])
        raise NetError(f"{error}; its configs and splits: {names or 'none'}", error.status, error.code)
    return found[0]


def find_table(net, table, ask, search=True):
    """(table, ask(table)), under the name that the table has today."""
    for may_move in (True, True, False):  # another repository, and another config in it
        try:
            return table, ask(table)
        except NetError as e:
            if not may_move:
                raise
            found = moved_table(net, table, e, search)
            print(f"{table}: is now {found}")
            table = found


def hub_page(net, table, offset, length):
    """`length` rows from `offset` on, as the viewer answers; `broken` counts those that it cannot read itself."""
    what = f"rows {offset} of {table.repo}"
    try:
        page = ask_viewer(net, "rows", table, what, "rows", offset=offset, length=length)
    except NetError as e:
        if e.status < 500 and not (e.again and e.status in (0, 408)):
            raise
        if length == 1:
            if e.status not in (500, 501) or e.code == "ResponseNotReady":
                raise  # the server's trouble, not the row's
            return dict(rows=[], broken=1)
        # it may be too much for the server, or one row of these is broken
        part = max(length // 10, 1)
        end = offset + length
        pages = [hub_page(net, table, start, min(part, end - start)) for start in range(offset, end, part)]
        rows = list(itertools.chain.from_iterable(page["rows"] for page in pages))
        if not rows and length >= 10:
            raise  # so many in a row: the table is broken
        merged = {}
        for page in pages:
            merged |= page
        return merged | dict(rows=rows, broken=sum(page.get("broken", 0) for page in pages))
    came = len(page["rows"])
    if 0 < came < length and offset + came < page.get("num_rows_total", 0):
        rest = hub_page(net, table, offset + came, length - came)
        page["rows"] += rest["rows"]
        page["broken"] = rest.get("broken", 0)
    return page


def hub_rows(net, repo, config, split, length=100, limit=None, images=False, cache=None, counts=None, search=True):
    """The rows of a table on the hub, `limit` of them at most, each a dict.

    Small tables come from the viewer, `length` rows to a page; large ones as parquet files, into the folder `cache`,
    or, without pyarrow, from the viewer too. Tables with `images` inside are read from parquet alone: the viewer makes
    their images anew, as JPEGs of quality 75 with halved colour and no EXIF. `counts` gets the rows that the
    hub cannot read, and whether it has but a part of the table. search: `moved_table`. NetError; UserError where
    pyarrow is needed.
    """
    table = Table(repo, config, split)
    counts = Counter() if counts is None else counts
    has_pyarrow = importlib.util.find_spec("pyarrow") is not None
    if images and not has_pyarrow:
        raise UserError(f"{table}: its images are read from parquet files, which needs pyarrow (pip install pyarrow): "
                        "without it there are only blurred copies of them")
    if images:
        table, listed = find_table(net, table, lambda t: parquet_files(net, t), search)
        yield from parquet_rows(net, table, *listed, limit, cache, counts)
        return
    began = time.monotonic()
    table, page = find_table(net, table, lambda t: hub_page(net, t, 0, min(length, limit or length)), search)
    seconds = time.monotonic() - began
    offered = page.get("num_rows_total", len(page["rows"]))  # the first page tells how many rows there are
    total = min(offered, limit or offered)
    if total > WHOLE and has_pyarrow:
        yield from parquet_rows(net, table, *parquet_files(net, table), limit, cache, counts)
        return
    if total > WHOLE:
        minutes = seconds * total / length / PER_HOST / 60
        duration = f"{minutes / 60:.1f} h" if minutes > 90 else f"{max(round(minutes), 1)} min"
        print(f"{table}: {total:,} rows, {length} to a page: about {duration}, longer if the server is busy. The fast "
              "way is `pip install pyarrow` and this command again: parquet files, a few minutes")
    else:
        cache = None  # it is soon read again
    yield from page_rows(net, table, page, total, length, cache, counts)
    if page.get("partial") and total == offered:
        counts[f"{PARTIAL} {table}: partial"] = total


def page_rows(net, table, first_page, total, length, cache, counts):
    """The rows of a table page by page, some pages ahead. In the folder `cache`, if there is one, pages outlive a run
    that was stopped."""
    def get_page(start):
        end = min(start + length, total)
        path = os.path.join(cache or "", "pages", quote(f"{table.config} {table.split} {start}-{end}", safe=""))
        if cache and os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                return json.load(f)
        page = hub_page(net, table, start, end - start)
        if cache:
            save(path, json.dumps(page).encode())
        return page

    waiting = deque()  # pages that are being fetched
    next_start = length
    with ThreadPoolExecutor(PER_HOST) as pool:
        for start in range(0, max(total, 1), length):
            while next_start < total and len(waiting) < 2 * PER_HOST:
                waiting.append(pool.submit(get_page, next_start))
                next_start += length
            page = waiting.popleft().result() if start else first_page
            if page.get("broken"):
                counts["left out: the hub cannot read the row"] += page["broken"]
            yield from (entry["row"] for entry in page["rows"])


def parquet_files(net, table):
    """(files of a table as `fetch_files` takes them, whether they are but a part of it)"""
    listed = ask_viewer(net, "parquet", table, f"parquet files of {table.repo}", "parquet_files")
    files = []
    for file in listed["parquet_files"]:
        if (file["config"], file["split"]) == (table.config, table.split):
            name = f"{table.config}/{table.split}/{os.path.basename(file['filename'])}"
            files.append(dict(url=file["url"], name=name, size=file["size"], sha256=None, mark=""))
    if not files:
        raise NetError(f"{table}: the hub has no parquet files of it", 404)
    return files, bool(listed.get("partial"))


def read_parquet(path):
    """The rows of a parquet file; NetError if it is none."""
    import pyarrow.parquet
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(64):
            yield from batch.to_pylist()
    except (OSError, ValueError) as e:  # pyarrow's own errors are of these kinds
        raise NetError(f"{path}: not a readable parquet file ({e}); remove it to fetch it again") from None


def parquet_rows(net, table, files, is_partial, limit, cache, counts):
    """The rows of a table's parquet files; with a limit, of as many files as it needs."""
    read = 0
    for group in [[file] for file in files] if limit else [files]:
        for path in fetch_files(net, group, cache):
            for row in read_parquet(path):
                if read == limit:
                    return
                read += 1
                yield row
    if is_partial:
        counts[f"{PARTIAL} {table}: partial"] = read
