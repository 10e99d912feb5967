"""
Real data and weights: from the registry (datasets.tsv) to data/NAME.jsonl and weights/NAME with one command.

    python -m tools.prepare list                             # every set: what it is, where from, what is here
    python -m tools.prepare data pixmo-points --limit 1000   # the first 1,000 rows of a set, with their pictures
    python -m tools.prepare data pretrain                    # all of stage 1; a group of `list`, or `eval`, too
    python -m tools.prepare weights stage1                   # OLMo-2 1B and SigLIP 2; or Molmo2-8B, Qwen3-8B, ...
    python -m tools.prepare check data/                      # every line, every picture, every video

    rows of the hub, files ─► convert.py ─► items ─► spool, sorted by media ─► one item per picture, video
                                                                                 │ or text, with all that is
                                                                                 ▼ said about it
          data/NAME.jsonl ◄─ as data.py accepts it ◄─ size, duration ◄─ its media: here, or fetched (fetch.py)

Memory does not grow with a set: rows go through one at a time, and what is known about one picture meets in
one spool file. Whatever stops it, the same command again does what is missing: rows are in the spool, media
on the disk, partial files are continued, dead links are in data/media/manifest.jsonl and not asked again.

Environment: HF_TOKEN (sets behind terms), HF_ENDPOINT (a mirror; one on this machine may be http, and serves
everything), HF_HUB_OFFLINE=1 (only what is here), GOOGLE_CLOUD_PROJECT and GOOGLE_OAUTH_TOKEN (the video
mirror bills those who read it).
"""
import argparse
import contextlib
import csv
import functools
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import av
from tqdm import tqdm

from tools.prepare import convert
from data import find_datasets
from lib.media import BadMedia, image_size, inside_folder, load_frames, load_image, open_video, video_duration
from lib.records import BadRecord, line_index, parse_record, read_registry
from tools.prepare.convert import EVALS, RECIPES, Skip
from tools.prepare.fetch import (Manifest, Net, NetError, PICTURE_BYTES, UserError, fetch_all, fetch_files,
                                 file_digest, hub_files, hub_rows, is_picture, is_video, origin, room_for)


BUCKETS = 64       # files a spool has
AT_ONCE = 1 << 20  # bytes of them that are looked at together; in memory ten times as much
GROWTH = 1 << 30   # bytes that even a small archive may unpack to
PLACEHOLDER = 5    # pictures of the same bytes are not pictures but a notice that they are gone


class ByHand(Exception):
    """A set of which something has to be put there by hand; the message says what, and where from."""


# ---- files of rows, archives -------------------------------------------------------------------------------

class JsonReader:
    """A JSON file in pieces: memory is that of one entry and one piece, however large the file."""

    def __init__(self, f, path, chunk):
        self.f, self.path, self.chunk, self.text, self.at = f, path, chunk, "", 0
        self.decoder = json.JSONDecoder()

    def more(self):
        new = self.f.read(max(self.chunk, len(self.text) - self.at))
        self.text, self.at = self.text[self.at:] + new, 0
        if not new:
            raise BadRecord("malformed JSON", f"{self.path} ends early, or near {self.text[:60]!r}")

    def peek(self, between=" \r\n\t,:"):
        """The next character that is none of those between values."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in between:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            self.more()

    def value(self):
        self.peek()
        while True:
            with contextlib.suppress(ValueError):  # not all of it read yet
                found, end = self.decoder.raw_decode(self.text, self.at)
                if end < len(self.text):  # else a number might go on
                    self.at = end
                    return found
            self.more()


def json_items(path, chunk=1 << 20):
    """The entries of a JSON file: of a list its objects; of an object of objects the same with their name as
    `_key`; {"data": [...]} is a list."""
    with open(path, encoding="utf-8-sig") as f:
        reader = JsonReader(f, path, chunk)
        opening = reader.peek()
        if opening not in "[{":
            raise BadRecord("malformed JSON", f"{path} is neither a list nor an object")
        reader.at += 1
        while reader.peek() not in "]}":
            name = {} if opening == "[" else {"_key": reader.value()}
            if name and reader.peek() == "[" and name["_key"] in ("data", "annotations"):
                opening, reader.at = "[", reader.at + 1
            elif isinstance(entry := reader.value(), dict):
                yield name | entry


def file_rows(path):
    """The rows of a JSON, JSONL, CSV or TSV file."""
    try:
        if path.endswith((".csv", ".tsv")):
            with open(path, newline="", encoding="utf-8-sig") as f:
                tabs = "\t" in f.readline()
                f.seek(0)
                yield from csv.DictReader(f, delimiter="\t" if tabs else ",")
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
    except (ValueError, csv.Error, RecursionError) as e:
        raise BadRecord("unreadable", f"{path}: {e}") from None


def unpack(path, folder, room=None):
    """A zip or tar into a folder: plain files under it alone. Links and devices are left out, a name that
    leads elsewhere is an error, and so is a bomb: an archive that grows more than twenty times (and 1 GiB).
    Archives within it are unpacked too, those within them not. Returns what is left of the bytes allowed."""
    within, room, inner = room is None, os.path.getsize(path) * 20 + GROWTH if room is None else room, []
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
    for target in inner if within else ():
        room = unpack(target, os.path.dirname(target), room)
        os.remove(target)
    return room


# ---- media on this disk ------------------------------------------------------------------------------------

def save(path, content):
    """Bytes to a file that is there whole or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.part", "wb") as f:
        f.write(content)
    os.replace(f"{path}.part", path)


class Shelf:
    """The media of one set that are on this disk, by the names rows use: with or without folder, with or
    without extension, some with the prefix of where they came from."""
    KINDS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif", ".mpg", ".jpg", ".jpeg", ".png", ".webp")

    def __init__(self, root, *folders):
        # last part of a name -> paths under root
        self.files, self.folders = defaultdict(list), defaultdict(list)
        for at, _, names in (walked for folder in folders for walked in os.walk(os.path.join(root, folder))):
            place = os.path.relpath(at, root)
            for n in names:
                if not n.endswith(".part"):
                    self.files[self.stem(n)].append(os.path.join(place, n))
            if sum(n.lower().endswith((".jpg", ".jpeg", ".png")) for n in names) > 1:
                self.folders[os.path.basename(at)].append(place)

    def stem(self, name):
        return os.path.splitext(name)[0] if name.lower().endswith(self.KINDS) else name

    def pick(self, table, ref, spellings):
        """The path whose end is `ref`, or the only one whose last part is."""
        folder, base = os.path.split(self.stem(ref))
        for spelling in spellings:
            name = spelling.format(base)
            paths, want = table.get(name, []), "/" + os.path.join(folder, name).strip("/")
            exact = [p for p in paths if f"/{self.stem(p)}".endswith(want)]
            if exact or len(paths) == 1:
                return min(exact or paths, key=lambda p: (p.count("/"), p))
        return None

    def file(self, ref):
        """A picture or a video."""
        return self.pick(self.files, ref, ("{}", "v_{}", "ytb_{}", "vimeo_{}", "{}_2fps"))

    def folder(self, ref):
        """A folder of frames."""
        return self.pick(self.folders, ref, ("{}",))


def encode(root, folder, rate, first=0, last=None):
    """A folder of frames, or some of them, as an H.264 clip at `rate` a second; its path under root."""
    source = os.path.join(root, folder)
    names = sorted(n for n in os.listdir(source) if n.lower().endswith((".jpg", ".jpeg", ".png")))
    key = f"{folder} {rate} {first} {last} {len(names)}"  # if frames are added or thinned, again
    rel = f"media/encoded/{hashlib.sha256(key.encode()).hexdigest()[:24]}.mp4"
    path = os.path.join(root, rel)
    if os.path.exists(path):
        return rel
    names = names[first:None if last is None else last + 1]
    if not names:
        raise BadMedia(f"{folder}: has no frames {first} to {last}")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with av.open(f"{path}.part", "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=round(rate), options={"crf": "20"})
        width, height = image_size(os.path.join(source, names[0]))
        stream.width, stream.height, stream.pix_fmt = width // 2 * 2, height // 2 * 2, "yuv420p"
        for n in names:
            frame = av.VideoFrame.from_ndarray(load_image(os.path.join(source, n)), format="rgb24")
            container.mux(stream.encode(frame.reformat(stream.width, stream.height)))
        container.mux(stream.encode())
    os.replace(f"{path}.part", path)
    return rel


def url_path(url):
    """Where under root the picture behind a URL is kept, for all sets."""
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


# ---- one set -----------------------------------------------------------------------------------------------

def refs_of(item):
    """What the media of an item, or of a line, are called."""
    return item.get("images") or [item[k] for k in ("image", "video") if k in item]


def same(item):
    """What items have in common that become one line: their media, or the part of a video."""
    return json.dumps([refs_of(item)] + [item.get(k) for k in ("start", "end", "cut")])


class Spool:
    """Items on the disk, in files by a number that their media have: what is said about one picture on rows
    far apart meets in one file."""

    def __init__(self, folder):
        self.folder, self.done = folder, os.path.join(folder, "done.json")

    def fill(self, items, key):
        """Write all items, unless it was done; `key` says what they are made of."""
        with contextlib.suppress(OSError, ValueError, KeyError), open(self.done) as f:
            kept = json.load(f)
            if kept["key"] == key:
                return Counter(kept["counts"])
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        counts = Counter()
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "w", encoding="utf-8")) for path in self.paths()]
            for n, item in enumerate(items(counts)):
                number, bucket = divmod(zlib.crc32(json.dumps(refs_of(item) or n).encode()), BUCKETS)
                try:
                    files[bucket].write(f"{number} {json.dumps(item, ensure_ascii=False)}\n")
                except UnicodeError:  # JSON can spell half a character, which is no text
                    counts["left out: not UTF-8"] += 1
        with open(f"{self.done}.part", "w") as f:
            json.dump(dict(key=key, counts=counts), f)
        os.replace(f"{self.done}.part", self.done)
        return counts

    def paths(self):
        return [os.path.join(self.folder, f"{i:02d}") for i in range(BUCKETS)]

    def __len__(self):
        return 1 + sum(map(os.path.getsize, self.paths())) // AT_ONCE

    def pieces(self):
        """Lists of items, about len(self) of them; each picture, clip or text is one item of one list. Small
        files go together, large ones in shares, by number."""
        lines, size = [], 0
        for path in self.paths():
            shares = 1 + os.path.getsize(path) // AT_ONCE
            for share in range(shares):
                with open(path, encoding="utf-8") as f:
                    for number, item in (line.split(" ", 1) for line in f):
                        if int(number) % shares == share:
                            lines.append(item)
                            size += len(item)
                if size >= AT_ONCE // 2:
                    yield merge(map(json.loads, lines))
                    lines, size = [], 0
        yield merge(map(json.loads, lines))


def merge(items):
    """Items about the same media become one. One that asks nothing (a clip's subtitles, a video's link)
    completes all of its media's."""
    groups, more = {}, defaultdict(dict)
    for n, item in enumerate(items):
        media = tuple(refs_of(item)) or n
        if not item["annotations"]:
            more[media] |= {k: v for k, v in item.items() if k not in ("annotations", "video")}
            continue
        group = groups.setdefault((media, same(item)), item)
        if group is not item:
            group["annotations"] += [a for a in item["annotations"] if a not in group["annotations"]]
    return [item | more.get(media, {}) for (media, _), item in groups.items()]


class Maker:
    """One set, from where it is published to root/NAME.jsonl."""

    def __init__(self, net, root, name, recipe, entry, limit, barred=()):
        self.net, self.root, self.name, self.recipe, self.entry = net, root, name, recipe, entry
        self.limit, self.barred, self.here = limit, barred, os.path.join(root, "media", name)
        self.places = [f"media/{name}"]  # and, for points in videos of a tracking set, where those are
        self.places += ["media/" + name.removeprefix("academic-video-point-")] * (name in convert.ACADEMIC)
        os.makedirs(self.here, exist_ok=True)
        self.asked = Counter()  # how often the page at hand
        self.manifest = Manifest(os.path.join(root, "media", "manifest.jsonl"))
        configs = (entry.get("config") or "default").split(",")
        self.sources = recipe.rows or tuple(("hub", entry["source"], c.strip(), entry["split"])
                                            for c in configs)
        if recipe.media == "youtube" and all(kind == "hub" for kind, *_ in self.sources):
            self.sources += convert.links(self.sources[0][1])

    def cache(self, repo):
        return os.path.join(self.root, ".work", "hub", repo.replace("/", "--"))

    def rows(self):
        """(row, whether it is but a video's link) of all sources, `limit` of each at most."""
        for kind, *where in self.sources:
            if kind == "hub":
                repo, config, split, *_ = where
                keep = functools.partial(self.keep, f"{config}-{split}")
                for row in hub_rows(self.net, *where, limit=self.limit, keep=keep, cache=self.cache(repo)):
                    yield row | {"_config": config}, False
                continue
            if kind == "file":
                paths = fetch_files(self.net, hub_files(self.net, where[0], where[1:]), self.cache(where[0]))
            else:
                paths = sorted(glob.glob(os.path.join(glob.escape(self.here), where[0])))
                if not paths:
                    raise ByHand(self.by_hand())
            # a list of links or subtitles is read whole: it does not say which of them the rows need
            links = "mapping" in where[-1]
            limit = None if links or "subtitles" in where[-1] else self.limit
            for row in itertools.islice((row for path in paths for row in file_rows(path)), limit):
                yield row, links

    def keep(self, label, rows):
        """Put the pictures inside rows of the hub on the disk, and their names into the rows. Whether to ask
        for the rows once more, because links to their pictures have expired."""
        jobs, named = [], []
        for row, number in ((r["row"], r["row_idx"]) for r in rows):
            for column, cell in row.items():
                for k, c in enumerate(cell if isinstance(cell, list) else [cell]):
                    if isinstance(c, dict) and ("src" in c or "bytes" in c):
                        path = inside_folder(self.here, f"{label}/{number}-{column}-{k}")
                        if "src" in c:
                            jobs.append((c["src"], path, dict(most=PICTURE_BYTES, trust=is_picture)))
                        elif c["bytes"] and not os.path.exists(path):
                            save(path, c["bytes"])
                        named.append((row, column, k, path, "src" in c))
        fetch_all(self.net, self.manifest, jobs, "pictures", fresh=True)
        self.asked[label] += 1
        refused = any("status 403" in self.manifest.why.get(path, "") for _, path, _ in jobs)
        if refused and self.asked[label] < 3:
            return True
        self.asked[label] = 0
        for row, column, k, path, fetched in named:
            if isinstance(row[column], list):
                row[column][k] = self.by_contents(path, fetched)
            else:
                row[column] = self.by_contents(path, fetched)
        return False

    def by_contents(self, path, link):
        """A picture out of a row under the name of its contents, as tables repeat a picture for each question
        about it; its name below self.here. A link left behind says that this cell's need not be fetched."""
        if os.path.isfile(path) and not os.path.islink(path):
            digest = file_digest(path)
            name = os.path.join(digest[:2], digest)
            target = os.path.join(self.here, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.replace(path, target)
            if not link:
                return name
            os.symlink(os.path.relpath(target, os.path.dirname(path)), path)
        return os.path.relpath(os.path.realpath(path), os.path.realpath(self.here))

    def items(self, counts):
        """Converted rows; `counts` gets what was read and what was left out, by reason."""
        convert.outside.clear()
        seen, bad = set(), None
        for row, is_link in tqdm(self.rows(), f"{self.name} rows", leave=False, disable=None):
            if is_link:
                if row.get("_key") in seen and re.match("https?://.+/.+/.+/", str(row.get("gcp_url"))):
                    yield dict(video=row["_key"], link=row["gcp_url"], annotations=[])
                continue
            counts["rows"] += 1
            try:
                items = list(self.recipe.convert(row, self.name))
            except Skip as e:
                counts[f"left out: {e}"] += 1
                continue
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
                counts["left out: not in the published schema"] += 1
                bad = bad or f"{type(e).__name__} {e}; its columns: {', '.join(map(str, row))}"
                continue
            for item in items:
                if self.recipe.media == "youtube":
                    seen.add(item["video"])
                if self.barred and any(r in self.barred for r in refs_of(item) + (item.get("sha256") or [])):
                    counts["left out: picture is held out for evaluation"] += 1
                else:
                    yield item
        if bad:
            print(f"{self.name}: rows not in the published schema, the first: {bad}")
        outside, n = convert.outside["outside"], convert.outside["seen"]
        if outside > 3 + 0.001 * n:
            raise UserError(f"{self.name}: {outside:,} of {n:,} coordinates are off the picture: published "
                            "in another unit than convert.py takes them to be")

    def by_hand(self):
        """What a user has to do, and why."""
        here = [where for kind, *where in self.sources if kind == "here"]
        licence, files = self.entry.get("license") or "see there", f" and {here[0][0]}" if here else ""
        text = (f"{self.name}: in part by hand. Where from: {self.recipe.note}. Licence: {licence}. Put the "
                f"media{files} under {self.here}/ (names as in the rows, any folders) and run this again.")
        if here and self.recipe.convert is convert.plain:
            text += (" annotations.jsonl (or .json, .csv): a row per question with video, question, answer "
                     "or options and correct, start and end in seconds if it is a clip; without a question a "
                     "row is a caption.")
        return text

    def run(self):
        """(lines written, Counter of everything else)"""
        if self.recipe.media == "hand" and not any(glob.glob(os.path.join(glob.escape(self.root), p, "*"))
                                                   for p in self.places):
            raise ByHand(self.by_hand())
        spool = Spool(os.path.join(self.root, ".work", self.name))
        mine = [(p, os.stat(p).st_size, os.stat(p).st_mtime_ns) for kind, *where in self.sources
                for p in glob.glob(os.path.join(glob.escape(self.here), where[0])) if kind == "here"]
        counts = spool.fill(self.items, repr((self.limit, self.sources, len(self.barred), mine)))
        for _, repo, *_ in self.sources:  # all that was in there is in the spool
            shutil.rmtree(self.cache(repo), ignore_errors=True)
        self.shelf = Shelf(self.root, *self.places, "media/youtube")
        if self.recipe.archives and any(None in self.find(i)[0] for items in spool.pieces() for i in items):
            self.unpack_archives()
            self.shelf = Shelf(self.root, *self.places, "media/youtube")
        out, written = os.path.join(self.root, self.name + ".jsonl"), 0
        with open(f"{out}.part", "wb") as f:
            for items in tqdm(spool.pieces(), f"{self.name} media", len(spool), leave=False, disable=None):
                self.fetch(items)
                for item in items:
                    try:
                        line = json.dumps(self.line(item), ensure_ascii=False).encode() + b"\n"
                        parse_record(line)
                    except (BadMedia, BadRecord, OSError) as e:
                        counts[f"left out: {reason_of(e)}"] += 1
                    else:
                        f.write(line)
                        written += 1
        if written:
            os.replace(f"{out}.part", out)
        else:
            os.remove(f"{out}.part")
        return written, counts

    def unpack_archives(self):
        """Fetch, unpack and remove the set's archives one after another, those not unpacked before."""
        for repo, pattern in self.recipe.archives:
            for file in hub_files(self.net, repo, [pattern]):
                mark = os.path.join(self.here, ".unpacked",
                                    hashlib.sha256(file["url"].encode()).hexdigest()[:16])
                if not os.path.exists(mark):
                    path, = fetch_files(self.net, [file], self.cache(repo))
                    try:
                        unpack(path, self.here)
                    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as e:
                        raise BadMedia(f"{path}: a broken archive ({e})") from None
                    save(mark, b"")
                    os.remove(path)

    def find(self, item):
        """(paths under root of an item's media, None for what is not here; the frames (first, last) that are
        meant, if what is here is more than the clip). A clip is a file of its own, part of a file, or a
        folder of frames."""
        if "cut" in item:
            ref, (source, first, last) = item["video"], item["cut"]
            for look in (self.shelf.file, self.shelf.folder):
                if ref != source and (found := look(ref)):
                    return [found], None
                if found := look(source):
                    return [found], (first, last)
            return [None], None
        if self.recipe.media in ("url", "embedded"):
            paths = [url_path(r) if self.recipe.media == "url" else f"media/{self.name}/{r}"
                     for r in refs_of(item)]
            return [p if os.path.exists(os.path.join(self.root, p)) else None for p in paths], None
        return [self.shelf.file(r) for r in refs_of(item)], None

    def fetch(self, items):
        """Fetch what these items lack, as far as it can be."""
        jobs, links = [], {}
        for item in items:
            for ref in refs_of(item):
                if self.recipe.media == "url":  # hosts that once had http alone have https by now
                    url = ref if self.net.mirror else ref.replace("http://", "https://", 1)
                    jobs.append((url, os.path.join(self.root, url_path(ref)),
                                 dict(most=PICTURE_BYTES, tries=3, trust=is_picture)))
                elif item.get("link") and not self.shelf.file(ref):
                    links[ref] = item["link"]
        fetch_all(self.net, self.manifest, jobs, "pictures")
        # Of most videos there is a smaller copy of 2 frames a second: those that people saw who annotated.
        for copy in (slow_copy, str):
            links = {ref: url for ref, url in links.items() if not self.shelf.file(ref)}
            paths = {ref: self.youtube(ref, copy(url)) for ref, url in links.items()}
            jobs = [(copy(links[ref]), path, dict(trust=is_video, headers=billing(links[ref])))
                    for ref, path in paths.items()]
            fetch_all(self.net, self.manifest, jobs, "videos", fresh=True)
            for ref, path in paths.items():
                if os.path.exists(path):
                    self.shelf.files[os.path.basename(ref)].append(os.path.relpath(path, self.root))

    def youtube(self, ref, url):
        return inside_folder(self.root, f"media/youtube/{ref}{os.path.splitext(url)[1]}")

    def line(self, item):
        """The row of an item whose media are here; BadMedia says why they are not."""
        refs, (paths, frames) = refs_of(item), self.find(item)
        for ref, path, sha256 in zip(refs, paths, item.get("sha256") or itertools.repeat(None)):
            if path is None:
                raise BadMedia(self.why(item, ref))
            if sha256 and file_digest(file := os.path.join(self.root, path)) != sha256:
                problem = "not the picture that was annotated"  # a set without sha256 may have use for it
                if self.manifest.why.get(file) != problem:
                    self.manifest.note(file, ref, problem)
                raise BadMedia(problem)
        annotations = item["annotations"]
        digest = hashlib.sha256((same(item) if refs else json.dumps(annotations)).encode()).hexdigest()
        row, sizes = dict(id=f"{self.name}-{digest[:12]}"), []
        if "video" not in item:
            sizes = [image_size(inside_folder(self.root, path)) for path in paths]
        if "image" in item:
            row |= dict(image=paths[0], width=sizes[0][0], height=sizes[0][1])
            if item.get("pixels"):
                annotations = [dict(a, points=convert.numbered(a["points"], row["width"], row["height"]))
                               for a in annotations]
        elif "images" in item:
            row["images"] = paths
        elif "video" in item:
            row, annotations = self.video_line(row, item, paths[0], frames)
        for a in annotations:
            if "masks" in a:  # of a copy in another size they say nothing
                a["masks"] = [m for m in a["masks"] if m["rle"]["size"] == [row["height"], row["width"]]]
        return row | dict(annotations=annotations)

    def why(self, item, ref):
        """Why media that are not here are not."""
        if self.recipe.media == "url":
            path = os.path.join(self.root, url_path(ref))
        elif self.recipe.media == "embedded":
            path = os.path.join(self.here, ref)
        elif self.recipe.media == "youtube" and not self.recipe.archives and "link" not in item:
            return "not on the mirror"
        else:
            path = self.youtube(ref, item.get("link", ""))
        return self.manifest.why.get(path, "media not here")

    def video_line(self, row, item, found, frames):
        """A video's row with what its header says, and the annotations; times shifted where the clip is part
        of it."""
        if os.path.isdir(os.path.join(self.root, found)):
            found, frames = encode(self.root, found, item["fps"], *frames or ()), None
        path = inside_folder(self.root, found)
        container, stream = open_video(path)
        with container:
            size = dict(width=stream.width, height=stream.height, duration=round(video_duration(path), 3),
                        fps=round(float(stream.average_rate or 0), 3))
        row |= dict(video=found) | size | {k: item[k] for k in ("start", "end", "subtitles") if k in item}
        annotations = item["annotations"]
        if frames and frames != (0, None):
            first, last = frames
            shift = first / item["fps"]
            row |= dict(start=round(shift, 3),
                        end=row["duration"] if last is None else round((last + 1) / item["fps"], 3))
            annotations = [dict(a, **{k: [dict(p, t=round(p["t"] + shift, 3)) for p in a[k]]
                                      for k in ("points", "input_points", "masks") if k in a})
                           for a in annotations]
        if row.get("start", 0) >= row["duration"]:
            raise BadMedia("the video ends before the clip begins")
        if "end" in row:
            row["end"] = min(row["end"], row["duration"])
        return row, annotations


def reason_of(e):
    """What a failure is counted under: without the names in it."""
    if isinstance(e, BadRecord):
        return e.reason
    text = re.sub(r"[('].*", "", str(e), flags=re.S).strip()
    return text.split(": ", 1)[-1] if text.startswith(("/", "http")) else text


# ---- the commands ------------------------------------------------------------------------------------------

def held_out(net, root):
    """URLs and sha256 of the pictures that are evaluated on; no training set may have them."""
    path, keys = os.path.join(root, ".work", "held_out.json"), set()
    if not os.path.exists(path):
        for recipe in (EVALS["pixmo-points-eval"], EVALS["pixmo-count"]):
            for _, *where in recipe.rows:
                for row in hub_rows(net, *where):
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
            raise UserError(f"{name}: no set, group or stage of datasets.tsv; `python -m tools.prepare list` shows them")
        chosen += [c for c in found if c not in chosen]
    return chosen


def data(args):
    """`python -m tools.prepare data`: set after set; 2 after a user's mistake, 1 if nothing came of one, 0 otherwise."""
    registry, net, code, total = read_registry(), Net(), 0, 0
    for name, evaluation in select(args.names, registry):
        root = os.path.join(args.out, "eval") if evaluation else args.out
        recipe, entry = (EVALS[name], EVAL_ENTRY) if evaluation else (RECIPES[name], registry[name])
        try:
            barred = held_out(net, args.out) if recipe.media == "url" and not evaluation else ()
            maker = Maker(net, root, name, recipe, entry, args.limit, barred)
            written, counts = maker.run()
        except ByHand as e:
            print(e)
            continue
        except (NetError, BadMedia, BadRecord, UserError) as e:
            print(f"{name}: {e}", file=sys.stderr)
            code = max(code, 2 if isinstance(e, UserError) else 1)
            continue
        print(f"{name}: {counts.pop('rows', 0):,} rows read, {written:,} lines written to "
              f"{os.path.join(root, name)}.jsonl")
        for reason, n in sorted(counts.items(), key=lambda c: -c[1]):
            print(f"  {n:,} {reason}")
        if recipe.note and any("media not here" in reason for reason in counts):
            print(maker.by_hand())
        if recipe.media == "youtube" and any("status 40" in reason for reason in counts):
            print("The video mirror bills those who read it: set GOOGLE_CLOUD_PROJECT and "
                  f"GOOGLE_OAUTH_TOKEN, or put videos under {maker.root}/media/youtube/, named by their id.")
        total += written
        code = code if written else max(code, 1)
    return code if total else max(code, 1)


EVAL_ENTRY = {"license": "ODC-BY-1.0"}  # all of them; the videos under their own
MEDIA_FROM = {"url": "URLs in the rows", "embedded": "in the rows", "youtube": "video mirror (billed)",
              "archive": "archives of the hub", "hand": "by hand", "none": "text alone"}


def show_list(args):
    """`python -m tools.prepare list`: a line for each set."""
    registry, root = read_registry(), {True: os.path.join(args.out, "eval"), False: args.out}
    chosen = select([args.group] if args.group else [*registry, "eval"], registry)
    print(f"{'name':35}{'stage':14}{'task':22}{'rows':>10}  {'media':23}{'licence':18}here")
    for name, held in chosen:
        e, recipe = (EVAL_ENTRY, EVALS[name]) if held else (registry[name], RECIPES[name])
        path, media = os.path.join(root[held], name + ".jsonl"), os.path.join(root[held], "media", name)
        here = "media" if os.path.isdir(media) and os.listdir(media) else "-"
        here = f"{line_index(path)[1][1]:,} lines" if os.path.exists(path) else here
        stage = "eval" if held else "+".join(s[:3] for s in e["stage"].split(","))
        print(f"{'eval/' * held + name:35}{stage:14}{e.get('task', ''):22}"
              f"{format(int(e['size']), ',') if e.get('size') else '':>10}  {MEDIA_FROM[recipe.media]:23}"
              f"{e.get('license') or 'see there':18}{here}")
    held = sum(h for _, h in chosen)
    print(f"{len(chosen) - held} sets, {held} evaluations; pre, sft, lon: the stages")
    return 0


WEIGHTS = {os.path.basename(repo): repo for repo in (
    "allenai/Molmo2-8B", "allenai/Molmo2-4B", "allenai/Molmo2-O-7B", "allenai/OLMo-2-0425-1B",
    "allenai/Olmo-3-7B-Instruct", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "google/siglip2-so400m-patch14-384")}


def get_weights(args):
    """`python -m tools.prepare weights`: folders for --init_from, which is printed."""
    net = Net()
    names = ["OLMo-2-0425-1B", "siglip2-so400m-patch14-384"] if args.names == ["stage1"] else args.names
    for name in names:
        if name not in WEIGHTS:
            raise UserError(f"{name}: not one of stage1, {', '.join(WEIGHTS)}")
    for name in names:
        folder = os.path.join(args.out, name)
        # Of a repository only what is read: no pickles, no code.
        files = [f for f in hub_files(net, WEIGHTS[name],
                                      ("*.safetensors", "*.json", "*.jinja", "merges.txt"), "models")
                 if "/" not in f["name"]]
        fetch_files(net, files, folder)
        print(f"{folder}: {len(files)} files, {sum(f['size'] or 0 for f in files) / 1e9:.2f} GB")
    print(f"--init_from {' '.join(os.path.join(args.out, name) for name in names)}")
    return 0


def look(path, video):
    """What a media file is: (width, height, seconds or None, digest of its bytes). BadMedia if it cannot be
    decoded."""
    if not video:
        height, width, _ = load_image(path).shape
        return width, height, None, file_digest(path)
    container, stream = open_video(path)
    with container:
        width, height = stream.width, stream.height
    seconds = video_duration(path)
    load_frames(path, [0.0, seconds])
    return width, height, seconds, file_digest(path)


def parsed(dataset):
    """(file:line, row or None, folder, what is wrong) of every line."""
    for i in range(len(dataset)):
        line, folder, where = dataset.line(i)
        try:
            yield where, parse_record(line), folder, ""
        except BadRecord as e:
            yield where, None, folder, e.reason


class Checked:
    """The media that were looked at, each once: {path: what it is, or why it is none}."""

    def __init__(self, workers):
        self.workers, self.known, self.alike = workers, {}, Counter()

    def look(self, wanted):
        """wanted: {path: whether it is a video}"""
        def one(job):
            try:
                return look(*job)
            except (BadMedia, OSError, MemoryError) as e:
                return reason_of(e)

        fresh = {path: video for path, video in wanted.items() if path not in self.known}
        with ThreadPoolExecutor(self.workers) as pool:
            self.known |= zip(fresh, pool.map(one, fresh.items()))
        self.alike.update(self.known[path][3] for path in fresh if not isinstance(self.known[path], str))

    def wrong(self, row, folder):
        """What is wrong with the media of a row, or ""."""
        for name in refs_of(row):
            found = self.known[inside_folder(folder, name)]
            if isinstance(found, str):
                return found
            width, height, seconds, digest = found
            if "images" not in row and "width" in row and (row["width"], row["height"]) != (width, height):
                return "another size than the line says"
            if seconds is None and self.alike[digest] >= PLACEHOLDER:
                return "placeholder picture"
            if seconds is not None and abs(row.get("duration", seconds) - seconds) > 0.1:
                return "another duration than the line says"
            if seconds is not None and any(p["t"] > seconds + 0.1 for a in row["annotations"]
                                           for p in a.get("points", ())):
                return "point after the end of the video"
        return ""


def problems(dataset, checked):
    """(file:line, what is wrong) of every line that cannot be used."""
    lines = set()
    for where, row, folder, problem in parsed(dataset):
        if row:
            text = json.dumps({k: v for k, v in row.items() if k != "id"}, sort_keys=True)
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            try:
                problem = checked.wrong(row, folder) or "duplicate line" * (digest in lines)
            except BadMedia as e:
                problem = reason_of(e)
            lines.add(digest)
        if problem:
            yield where, problem


def check(args):
    """`python -m tools.prepare check`: 1 if a line cannot be used. Each is counted by its first problem."""
    held_out = os.path.join(args.path, "eval")
    paths = [args.path] + [held_out] * bool(glob.glob(os.path.join(glob.escape(held_out), "*.jsonl")))
    try:
        sets = [d for path in paths for d in find_datasets([path])[0]]
    except (OSError, ValueError) as e:
        raise UserError(str(e).replace("--data ", "")) from None
    checked, total, wanted = Checked(args.workers), 0, {}
    for d in sets:  # all media before any line: a placeholder is known by how many look like it
        for _, row, folder, _ in tqdm(parsed(d), d.name, len(d), leave=False, disable=None):
            for name in refs_of(row) if row else ():
                with contextlib.suppress(BadMedia):  # the line will be told
                    wanted[inside_folder(folder, name)] = "video" in row
            if len(wanted) >= 256:
                checked.look(wanted)
                wanted.clear()
    checked.look(wanted)
    print(f"{'set':40}{'lines':>10}{'bad':>8}")
    with open(args.bad_rows, "w", encoding="utf-8") as bad:
        for d in sets:
            reasons = Counter()
            for where, problem in problems(d, checked):
                file, _, line = where.rpartition(":")
                bad.write(json.dumps(dict(file=file, line=int(line), reason=problem)) + "\n")
                reasons[problem] += 1
            total += reasons.total()
            print(f"{d.name:40}{len(d):10,}{reasons.total():8,}  "
                  + ", ".join(f"{n} {r}" for r, n in reasons.most_common()))
    print(f"{len(checked.known):,} media files looked at; "
          + (f"{total:,} bad lines, listed in {args.bad_rows}" if total else "all is well"))
    return 1 if total else 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
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
    p.add_argument("--bad_rows", default="bad_rows.jsonl",
                   help="where lines that cannot be used are listed [bad_rows.jsonl]")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that decode [one per core]")
    args = parser.parse_args(argv)
    try:
        for flag in ("limit", "workers"):
            if (n := getattr(args, flag, None)) is not None and n < 1:
                raise UserError(f"--{flag} {n}: at least 1")
        return args.run(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except (NetError, BadMedia) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
