"""
Real data and weights: from the registry (datasets.tsv) to data/NAME.jsonl and weights/NAME with one command.

    python -m tools.prepare list                             # every set: what it is, where from, what is here
    python -m tools.prepare data pixmo-points --limit 1000   # the first 1,000 rows of a set, with their images
    python -m tools.prepare data pretrain                    # all of stage 1; a group of `list`, or `eval`, too
    python -m tools.prepare weights stage1                   # OLMo-2 1B and SigLIP 2; or Molmo2-8B, Qwen3-8B, ...
    python -m tools.prepare check data/                      # every line, every image, every video

    rows of the hub, files ─► convert.py ─► items ─► spool, by media ─► one item per image, video or
                                                                          │ text, with all its annotations
                                                                          ▼
          data/NAME.jsonl ◄─ as data.py accepts it ◄─ size, duration ◄─ its media: here, or fetched (fetch.py)

A row is a line of a published table, an item what convert.py makes of it, a record a line of our JSONL. Rows go
through one at a time, and the items of one image meet in one of the spool's 64 files: memory holds one file.
Whatever stops it, the same command again does what is missing: items are in the spool, media on the disk, partial
files are continued, dead links are in data/media/manifest.jsonl and not tried again.

`pip install pyarrow` is worth it: images inside rows need it, and large tables take minutes instead of hours.

Environment: HF_TOKEN (sets behind terms, and higher limits), HF_ENDPOINT (a mirror; one on this machine may be http,
and serves everything), HF_HUB_OFFLINE=1 (only what is here), NANOMOLMO2_CONTACT (your address, told to the hosts of
images: some refuse who names none), GOOGLE_CLOUD_PROJECT and GOOGLE_OAUTH_TOKEN (the video mirror bills those who
read it).
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
from typing import NamedTuple

import lib  # noqa: F401: before torch, which reads the environment that it sets
import av
from tqdm import tqdm

from data import find_datasets
from lib.errors import BadMedia, BadRecord, UserError
from lib.media import (image_size, inside_folder, load_frames, load_image, open_video, video_duration,
                       video_size)
from lib.records import line_index, parse_record, read_registry
from tools.prepare import convert
from tools.prepare.convert import EVALS, RECIPES, Skip
from tools.prepare.fetch import (GATED, IMAGE_BYTES, PARTIAL, Manifest, Net, NetError, fetch_all, fetch_files,
                                 file_digest, hub_files, hub_rows, is_image, is_video, origin, room_for, save)


BUCKETS = 64       # files a spool has
AT_ONCE = 256      # items, or more, whose media are fetched side by side
GROWTH = 1 << 30   # bytes that even a small archive may unpack to
PLACEHOLDER = 5    # images of the same bytes are a notice that they are gone


class ByHand(Exception):
    """A set of which something has to be put there by hand; the message says what, and where from."""


# ---- files of rows, archives -------------------------------------------------------------------------------

def json_items(path):
    """The objects of a JSON file: those of a list, or of {"data": [...]}; or those of an object, each with its
    name as `_key`. The file is read whole, in four to five times its size of memory."""
    with open(path, encoding="utf-8-sig") as f:
        found = json.load(f)
    if not isinstance(found, (list, dict)):
        raise BadRecord("malformed JSON", f"{path} is neither a list nor an object")
    for name in ("data", "annotations"):
        if isinstance(found, dict) and isinstance(found.get(name), list):
            found = found[name]
    if isinstance(found, dict):
        return [{"_key": name} | entry for name, entry in found.items() if isinstance(entry, dict)]
    return [entry for entry in found if isinstance(entry, dict)]


def table_rows(path):
    """The rows of a CSV or TSV file; some that are named .csv have tabs."""
    with open(path, newline="", encoding="utf-8-sig") as f:
        delimiter = "\t" if "\t" in f.readline() else ","
        f.seek(0)
        yield from csv.DictReader(f, delimiter=delimiter)


def jsonl_rows(path):
    """The rows of a JSONL file. Where they are lists, the first names the columns."""
    names = None
    with open(path, encoding="utf-8-sig") as f:
        for line in f:
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, list):
                yield row
            elif names is None:
                names = row
            else:
                yield dict(zip(names, row))


def file_rows(path):
    """The rows of a JSON, JSONL, CSV or TSV file."""
    try:
        if path.endswith((".csv", ".tsv")):
            yield from table_rows(path)
        elif path.endswith(".jsonl"):
            yield from jsonl_rows(path)
        else:
            yield from json_items(path)
    except (ValueError, csv.Error, RecursionError) as e:
        raise BadRecord("unreadable", f"{path}: {e}") from None


def members_of(archive):
    """(name, size, function that opens it) of the plain files in a zip or tar; no links, no devices."""
    if isinstance(archive, tarfile.TarFile):
        for member in archive:
            if member.isfile():
                yield member.name, member.size, functools.partial(archive.extractfile, member)
    else:
        for member in archive.infolist():
            kind = member.external_attr >> 28  # of a Unix file mode: 8 is a plain file, 0 not given
            if not member.is_dir() and kind in (0, 8):
                yield member.filename, member.file_size, functools.partial(archive.open, member)


def unpack_one(path, folder, allowed):
    """(files of an archive, bytes that are still allowed of `allowed`)"""
    files = []
    opener = zipfile.ZipFile if zipfile.is_zipfile(path) else tarfile.open
    with opener(path) as archive:
        for name, size, open_member in members_of(archive):
            target = inside_folder(folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            room_for(target, size)
            with open_member() as source, open(f"{target}.part", "wb") as f:
                while chunk := source.read(1 << 20):
                    allowed -= len(chunk)
                    if allowed < 0:
                        raise BadMedia(f"{path}: unpacks to more than 20 times its size")
                    f.write(chunk)
            os.replace(f"{target}.part", target)
            files.append(target)
    return files, allowed


def unpack(path, folder):
    """A zip or tar into a folder, plain files under it alone. A name that leads elsewhere is an error, and so is
    a bomb: an archive that grows more than twenty times (and 1 GiB). Archives within it are unpacked too, and
    count towards its growth; those within them are not."""
    allowed = os.path.getsize(path) * 20 + GROWTH
    files, allowed = unpack_one(path, folder, allowed)
    for file in files:
        if file.lower().endswith((".tar", ".zip", ".tar.gz", ".tgz")):
            _, allowed = unpack_one(file, os.path.dirname(file), allowed)
            os.remove(file)


# ---- media on this disk ------------------------------------------------------------------------------------

FRAME_ENDINGS = (".jpg", ".jpeg", ".png")


def frames_among(names):
    return sorted(name for name in names if name.lower().endswith(FRAME_ENDINGS))


def common_tail(path, other):
    """How many parts of two paths agree, counted from their ends."""
    n = 0
    for part, part_of_other in zip(reversed(path.split("/")), reversed(other.split("/"))):
        if part != part_of_other:
            break
        n += 1
    return n


class Shelf:
    """The media of one set that are on this disk, by the names rows use: with or without folder, with or
    without extension, some with the prefix of where they came from."""
    ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif", ".mpg", *FRAME_ENDINGS, ".webp")
    SPELLINGS = ("{}", "v_{}", "ytb_{}", "vimeo_{}", "{}_2fps")

    def __init__(self, root, *folders):
        self.files = defaultdict(list)    # last part of a name, without extension -> paths under root
        self.folders = defaultdict(list)  # the same of folders of frames
        for top in folders:
            for folder, _, names in os.walk(os.path.join(root, top)):
                self.add(os.path.relpath(folder, root), names)

    def add(self, folder, names):
        for name in names:
            if not name.endswith(".part"):
                self.files[self.stem(name)].append(os.path.join(folder, name))
        if len(frames_among(names)) > 1:
            self.folders[os.path.basename(folder)].append(folder)

    def stem(self, name):
        return os.path.splitext(name)[0] if name.lower().endswith(self.ENDINGS) else name

    def pick(self, table, ref, spellings):
        """The path that has more of the end of `ref` than any other: "a/b/v1" beats "c/v1" for the name "x/b/v1".
        Several that have the same part of it, but not all, are different things: None."""
        folder, base = os.path.split(self.stem(ref))
        for spelling in spellings:
            name = spelling.format(base)
            wanted = os.path.join(folder, name).strip("/")
            by_tail = defaultdict(list)  # parts that agree, from the end -> paths
            for path in table.get(name, []):
                by_tail[common_tail(self.stem(path), wanted)].append(path)
            if by_tail:
                longest = max(by_tail)
                if len(by_tail[longest]) == 1 or longest == wanted.count("/") + 1:
                    return min(by_tail[longest], key=lambda path: (path.count("/"), path))
        return None

    def file(self, ref):
        """An image or a video."""
        return self.pick(self.files, ref, self.SPELLINGS)

    def folder(self, ref):
        """A folder of frames."""
        return self.pick(self.folders, ref, ("{}",))


def encode(root, folder, rate, first=0, last=None):
    """A folder of frames, or some of them, as an H.264 clip at `rate` a second; its path under root."""
    source = os.path.join(root, folder)
    names = frames_among(os.listdir(source))
    key = f"{folder} {rate} {first} {last} {len(names)}"  # if frames are added or thinned, again
    name = f"media/encoded/{hashlib.sha256(key.encode()).hexdigest()[:24]}.mp4"
    path = os.path.join(root, name)
    if os.path.exists(path):
        return name
    names = names[first:None if last is None else last + 1]
    if not names:
        raise BadMedia(f"{folder}: has no frames {first} to {last}")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with av.open(f"{path}.part", "w", format="mp4") as container:
        # crf 20: hardly to be told from the frames
        stream = container.add_stream("libx264", rate=round(rate), options={"crf": "20"})
        width, height = image_size(os.path.join(source, names[0]))
        stream.width = width // 2 * 2  # yuv420p has a colour for every 2 x 2 pixels
        stream.height = height // 2 * 2
        stream.pix_fmt = "yuv420p"
        for file in names:
            frame = av.VideoFrame.from_ndarray(load_image(os.path.join(source, file)), format="rgb24")
            container.mux(stream.encode(frame.reformat(stream.width, stream.height)))
        container.mux(stream.encode())
    os.replace(f"{path}.part", path)
    return name


def url_path(url):
    """Where under root the image behind a URL is kept, for all sets."""
    digest = hashlib.sha256(url.encode()).hexdigest()
    return f"media/url/{digest[:2]}/{digest}"


def slow_copy(url):
    """.../TOP/ID/ID.ext -> .../TOP-2fps/ID_2fps.mp4, the mirror's copy at 2 frames a second."""
    *head, folder, _, file = url.split("/")
    stem, _ = os.path.splitext(file)
    return "/".join([*head, f"{folder}-2fps", f"{stem}_2fps.mp4"])


def billing(url):
    """Headers for the video mirror, whose readers pay for the traffic; they go there alone."""
    project = os.environ.get("GOOGLE_CLOUD_PROJECT")
    token = os.environ.get("GOOGLE_OAUTH_TOKEN")
    if project and token and origin(url) == ("https", "storage.googleapis.com", None):
        return {"x-goog-user-project": project, "Authorization": f"Bearer {token}"}
    return {}


# ---- one set -----------------------------------------------------------------------------------------------

def refs_of(item):
    """The names of the media of an item, or of a record."""
    return item.get("images") or [item[k] for k in ("image", "video") if k in item]


def clip_key(item):
    """What items have in common that become one record: their media, and the part of a video."""
    return json.dumps([refs_of(item)] + [item.get(k) for k in ("start", "end", "cut")])


class Spool:
    """Items on the disk, in files by a hash of their media: annotations of one image, on rows far apart, meet in
    one file. A file of the largest set has some 30 MB, and takes three times that in memory."""

    def __init__(self, folder):
        self.folder = folder
        self.done = os.path.join(folder, "done.json")
        self.paths = [os.path.join(folder, f"{i:02d}") for i in range(BUCKETS)]

    def fill(self, items, key):
        """Write all items, unless it was done; `key` says what they are made of. Returns their counts."""
        with contextlib.suppress(OSError, ValueError, KeyError), open(self.done) as f:
            cached = json.load(f)
            if cached["key"] == key:
                return Counter(cached["counts"])
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        counts = Counter()
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "w", encoding="utf-8")) for path in self.paths]
            for n, item in enumerate(items(counts)):
                # text without media goes to any file
                media = json.dumps(refs_of(item) or n)
                try:
                    files[zlib.crc32(media.encode()) % BUCKETS].write(json.dumps(item, ensure_ascii=False) + "\n")
                except UnicodeError:  # JSON can spell half a character, which is no text
                    counts["left out: not UTF-8"] += 1
        # written last: a spool that was left half full is begun again
        save(self.done, json.dumps(dict(key=key, counts=counts)).encode())
        return counts

    def pieces(self, what="media"):
        """Lists of items, `AT_ONCE` or more in each but the last; each image, clip or text is one item."""
        items = []
        for path in tqdm(self.paths, what, leave=False, disable=None):
            with open(path, encoding="utf-8") as f:
                items += merge(map(json.loads, f))
            if len(items) >= AT_ONCE or path == self.paths[-1]:
                yield items
                items = []


def merge(items):
    """Items about the same media become one. One without annotations (a clip's subtitles, a video's link)
    completes all of its media's."""
    merged = {}
    more = defaultdict(dict)
    for n, item in enumerate(items):
        media = tuple(refs_of(item)) or n
        if not item["annotations"]:
            more[media] |= {k: v for k, v in item.items() if k not in ("annotations", "video")}
        # two clips of one video stay two items
        elif (media, clip_key(item)) not in merged:
            merged[media, clip_key(item)] = item
        else:
            annotations = merged[media, clip_key(item)]["annotations"]
            annotations += [a for a in item["annotations"] if a not in annotations]
    return [item | more.get(media, {}) for (media, _), item in merged.items()]


def shifted(annotation, seconds):
    """An annotation whose times are later by so many seconds."""
    annotation = dict(annotation)
    for field in ("points", "input_points", "masks"):
        if field in annotation:
            annotation[field] = [dict(entry, t=round(entry["t"] + seconds, 3)) for entry in annotation[field]]
    return annotation


def reason_of(e):
    """What a failure is counted under: without the names in it."""
    if isinstance(e, BadRecord):
        return e.reason
    text = re.sub(r"[('].*", "", str(e), flags=re.S).strip()
    return text.split(": ", 1)[-1] if text.startswith(("/", "http")) else text


class Maker:
    """One set, from where it is published to root/NAME.jsonl."""

    def __init__(self, net, root, name, recipe, entry, limit, held_out=()):
        self.net = net
        self.root = root
        self.name = name
        self.recipe = recipe
        self.entry = entry        # its line of datasets.tsv
        self.limit = limit        # rows of each source; None = all
        self.held_out = held_out  # URLs and sha256 of images that no training set may have
        self.folder = os.path.join(root, "media", name)
        os.makedirs(self.folder, exist_ok=True)
        self.places = [f"media/{name}"]
        if name in convert.ACADEMIC:  # points in videos of a tracking set, which may be there already
            self.places.append("media/" + name.removeprefix("academic-video-point-"))
        self.manifest = Manifest(os.path.join(root, "media", "manifest.jsonl"))
        self.sources = recipe.rows
        if not self.sources:
            configs = (entry.get("config") or "default").split(",")
            self.sources = tuple(("hub", entry["source"], config.strip(), entry["split"]) for config in configs)
        # where rows name videos, a file of the same repository has their links
        if recipe.media == "youtube" and all(kind == "hub" for kind, *_ in self.sources):
            self.sources += convert.links(self.sources[0][1])

    def cache(self, repo):
        return os.path.join(self.root, ".work", "hub", repo.replace("/", "--"))

    def by_hand(self):
        """The message that says what a user has to do, and why."""
        patterns = [where[0] for kind, *where in self.sources if kind == "here"]
        files = f" and {patterns[0]}" if patterns else ""
        text = (f"{self.name}: in part by hand. Where from: {self.entry['by_hand']}. Licence: "
                f"{self.entry.get('license') or 'see there'}. Put the media{files} under {self.folder}/ (names as "
                "in the rows, any folders) and run this again.")
        if patterns and self.recipe.convert is convert.plain:
            text += (" annotations.jsonl (or .json, .csv): a row per question with video, question, answer "
                     "or options and correct, start and end in seconds if it is a clip; without a question a "
                     "row is a caption.")
        return text

    # -- rows and items

    def rows(self, counts):
        """(row, whether it is but a video's link) of all sources, `limit` of each at most; of the recipe's other
        tables if the hub does not have the usual ones."""
        try:
            yield from self.rows_of(self.sources, counts)
        except NetError as e:
            is_missing = e.status in (404, 500, 501) and e.code not in GATED
            if counts["rows"] or not self.recipe.instead or not is_missing:
                raise
            print(f"{e}\n{self.name}: reads the tables {', '.join(self.recipe.instead)} instead")
            _, repo, _, *more = self.sources[0]
            others = [("hub", repo, config, *more) for config in self.recipe.instead]
            yield from self.rows_of(others + [source for source in self.sources if source[0] != "hub"], counts)

    def rows_of(self, sources, counts):
        images = self.recipe.media == "embedded"
        for kind, *where in sources:
            if kind == "hub":
                repo, config, *_ = where
                for row in hub_rows(self.net, *where, limit=self.limit, images=images, cache=self.cache(repo),
                                    counts=counts, search=not self.recipe.instead):
                    if images:
                        row = {column: self.store_images(value) for column, value in row.items()}
                    yield row | {"_config": config}, False
                continue
            if kind == "file":
                repo, pattern = where
                paths = fetch_files(self.net, hub_files(self.net, repo, [pattern]), self.cache(repo))
            else:
                pattern, = where
                paths = self.files_by_hand(pattern)
                if not paths:
                    raise ByHand(self.by_hand())
            # a list of links or subtitles is read to its end: it does not say which of them the rows need
            is_link = "mapping" in pattern
            limit = None if is_link or "subtitles" in pattern else self.limit
            for row in itertools.islice(itertools.chain.from_iterable(map(file_rows, paths)), limit):
                yield row, is_link

    def files_by_hand(self, pattern):
        return sorted(glob.glob(os.path.join(glob.escape(self.folder), pattern)))

    def store_images(self, value):
        """A cell of a row, or a list of them, with the name of its file in place of an image {bytes, path}. It is the
        name of the contents: tables repeat an image for each question about it, and all of them are one record."""
        if isinstance(value, list):
            return [self.store_images(cell) for cell in value]
        if not (isinstance(value, dict) and "bytes" in value):
            return value
        if not value["bytes"]:
            return None
        digest = hashlib.sha256(value["bytes"]).hexdigest()
        name = f"{digest[:2]}/{digest}"
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            save(path, value["bytes"])
        return name

    def items(self, counts):
        """Converted rows; `counts` gets what was read and what was left out, by reason."""
        convert.outside.clear()
        videos = set()
        first_bad = None
        for row, is_link in tqdm(self.rows(counts), f"{self.name} rows", leave=False, disable=None):
            if is_link:
                if row.get("_key") in videos and re.match("https?://.+/.+/.+/", str(row.get("gcp_url"))):
                    yield dict(video=row["_key"], link=row["gcp_url"], annotations=[])
                continue
            counts["rows"] += 1
            try:
                items = list(self.recipe.convert(row, self.name))
            except Skip as e:
                counts[f"left out: {e}"] += 1
                continue
            # whatever a converter trips over costs its row alone; the first one is printed
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
                counts["left out: not in the published schema"] += 1
                if first_bad is None:
                    first_bad = f"{type(e).__name__} {e}; its columns: {', '.join(map(str, row))}"
                continue
            for item in items:
                if self.recipe.media == "youtube":
                    videos.add(item["video"])
                keys = refs_of(item) + (item.get("sha256") or [])
                if self.held_out and not self.held_out.isdisjoint(keys):
                    counts["left out: image is held out for evaluation"] += 1
                else:
                    yield item
        if first_bad:
            print(f"{self.name}: rows not in the published schema, the first: {first_bad}")
        # a few slips are clipped; more mean pixels where per cent were expected
        outside = convert.outside["outside"]
        total = convert.outside["seen"]
        if outside > 3 + 0.001 * total:
            raise UserError(f"{self.name}: {outside:,} of {total:,} coordinates are off the image: published "
                            "in another unit than convert.py takes them to be")

    # -- the whole

    def run(self):
        """(lines written, Counter of everything else)"""
        if self.recipe.media == "hand":
            patterns = [os.path.join(glob.escape(self.root), place, "*") for place in self.places]
            if not any(map(glob.glob, patterns)):
                raise ByHand(self.by_hand())
        spool = Spool(os.path.join(self.root, ".work", self.name))
        counts = spool.fill(self.items, self.fingerprint())
        for _, repo, *_ in self.sources:  # all that was in there is in the spool
            shutil.rmtree(self.cache(repo), ignore_errors=True)
        self.shelf = Shelf(self.root, *self.places, "media/youtube")
        if self.recipe.archives and self.lacks_media(spool):
            self.unpack_archives()
            self.shelf = Shelf(self.root, *self.places, "media/youtube")
        written = 0
        # a set that was there stays until the new one is complete
        out = os.path.join(self.root, self.name + ".jsonl")
        with open(f"{out}.part", "wb") as f:
            for items in spool.pieces(f"{self.name} media"):
                self.fetch(items)
                for item in items:
                    try:
                        line = json.dumps(self.record(item), ensure_ascii=False).encode() + b"\n"
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

    def fingerprint(self):
        """What the items are made of, in short: if it changes, they are made again."""
        files = []
        for kind, *where in self.sources:
            if kind == "here":
                files += [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns)
                          for path in self.files_by_hand(where[0])]
        return repr(("items", self.limit, self.sources, len(self.held_out), files))

    def lacks_media(self, spool):
        for items in spool.pieces():
            for item in items:
                paths, _ = self.find(item)
                if None in paths:
                    return True
        return False

    def unpack_archives(self):
        """Fetch, unpack and remove the set's archives one after another, those not unpacked before."""
        for repo, pattern in self.recipe.archives:
            for file in hub_files(self.net, repo, [pattern]):
                digest = hashlib.sha256(file["url"].encode()).hexdigest()
                mark = os.path.join(self.folder, ".unpacked", digest[:16])
                if os.path.exists(mark):
                    continue
                path, = fetch_files(self.net, [file], self.cache(repo))
                try:
                    unpack(path, self.folder)
                except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as e:
                    raise BadMedia(f"{path}: a broken archive ({e})") from None
                save(mark, b"")
                os.remove(path)

    # -- media

    def find(self, item):
        """(paths under root of an item's media, None for what is not here; the frames (first, last) that are
        meant, if what is here is more than the clip). A clip is a file of its own, part of a file, or a
        folder of frames."""
        if "cut" in item:
            clip = item["video"]
            source, first, last = item["cut"]
            # the clip itself is better than the video it is part of: its frames are those that were annotated
            for find in (self.shelf.file, self.shelf.folder):
                found = find(clip) if clip != source else None
                if found:
                    return [found], None
                found = find(source)
                if found:
                    return [found], (first, last)
            return [None], None
        if self.recipe.media == "url":
            paths = [url_path(ref) for ref in refs_of(item)]
        elif self.recipe.media == "embedded":
            paths = [f"media/{self.name}/{ref}" for ref in refs_of(item)]
        else:
            return [self.shelf.file(ref) for ref in refs_of(item)], None
        return [path if os.path.exists(os.path.join(self.root, path)) else None for path in paths], None

    def fetch(self, items):
        """Fetch what these items lack, as far as it can be had."""
        if self.recipe.media == "url":
            jobs = []
            for item in items:
                for ref in refs_of(item):
                    # hosts that once had http alone have https by now
                    url = ref if self.net.mirror else ref.replace("http://", "https://", 1)
                    path = os.path.join(self.root, url_path(ref))
                    jobs.append((url, path, dict(most=IMAGE_BYTES, tries=3, trust=is_image)))
            fetch_all(self.net, self.manifest, jobs, "images")
        else:
            # Of most videos there is a smaller copy of 2 frames a second: those that annotators saw.
            self.fetch_videos(items, slow_copy)
            self.fetch_videos(items, str)

    def fetch_videos(self, items, copy):
        """Fetch the copies, copy(link), of the linked videos that are not here."""
        jobs = {}  # name of a video -> what `fetch_all` takes
        for item in items:
            if "link" in item and not self.shelf.file(item["video"]):
                url = copy(item["link"])
                options = dict(trust=is_video, headers=billing(item["link"]))
                jobs[item["video"]] = (url, self.youtube(item["video"], url), options)
        fetch_all(self.net, self.manifest, jobs.values(), "videos", fresh=True)
        for ref, (_, path, _) in jobs.items():
            if os.path.exists(path):
                self.shelf.files[os.path.basename(ref)].append(os.path.relpath(path, self.root))

    def youtube(self, ref, url):
        return inside_folder(self.root, f"media/youtube/{ref}{os.path.splitext(url)[1]}")

    def check_media(self, item, ref, path, sha256):
        """BadMedia if one of an item's media is not here, or has other contents than were annotated."""
        if path is None:
            raise BadMedia(self.reason_missing(item, ref))
        file = os.path.join(self.root, path)
        if sha256 and file_digest(file) != sha256:
            problem = "not the image that was annotated"  # a set without sha256 may have use for it
            if self.manifest.why.get(file) != problem:
                self.manifest.note(file, ref, problem)
            raise BadMedia(problem)

    def reason_missing(self, item, ref):
        if self.recipe.media == "url":
            path = os.path.join(self.root, url_path(ref))
        elif self.recipe.media == "youtube" and not self.recipe.archives and "link" not in item:
            return "not on the mirror"
        else:
            path = self.youtube(ref, item.get("link", ""))
        return self.manifest.why.get(path, "media not here")

    # -- records

    def record(self, item):
        """The record of an item whose media are here; BadMedia says why they are not."""
        refs = refs_of(item)
        paths, frames = self.find(item)
        hashes = item.get("sha256") or [None] * len(refs)
        for ref, path, sha256 in zip(refs, paths, hashes):
            self.check_media(item, ref, path, sha256)
        annotations = item["annotations"]
        key = clip_key(item) if refs else json.dumps(annotations)
        digest = hashlib.sha256(key.encode()).hexdigest()
        record = dict(id=f"{self.name}-{digest[:12]}")
        if "video" in item:
            more, annotations = self.video_fields(item, paths[0], frames)
            record |= more
        else:
            sizes = [image_size(inside_folder(self.root, path)) for path in paths]
            if "image" in item:
                width, height = sizes[0]
                record |= dict(image=paths[0], width=width, height=height)
            elif "images" in item:
                record["images"] = paths
            if item.get("pixels"):
                annotations = [dict(a, points=convert.numbered(a["points"], width, height)) for a in annotations]
        for annotation in annotations:
            if "masks" in annotation:  # they do not fit a copy in another size
                size = [record["height"], record["width"]]
                annotation["masks"] = [mask for mask in annotation["masks"] if mask["rle"]["size"] == size]
        return record | dict(annotations=annotations)

    def video_fields(self, item, found, frames):
        """(fields of a video's record, from its header and first frame; the annotations). Where the clip is part of
        the file, times are shifted: they count from the start of the file."""
        if os.path.isdir(os.path.join(self.root, found)):
            found = encode(self.root, found, item["fps"], *(frames or ()))
            frames = None
        path = inside_folder(self.root, found)
        width, height = video_size(path)  # as it is seen: a phone held upright writes it lying, with a note to turn it
        container, stream = open_video(path)
        with container:
            rate = float(stream.average_rate or 0)
        fields = dict(video=found, width=width, height=height, duration=round(video_duration(path), 3),
                      fps=round(rate, 3))
        for field in ("start", "end", "subtitles"):
            if field in item:
                fields[field] = item[field]
        annotations = item["annotations"]
        if frames and frames != (0, None):
            first, last = frames
            start = first / item["fps"]
            fields["start"] = round(start, 3)
            fields["end"] = fields["duration"] if last is None else round((last + 1) / item["fps"], 3)
            annotations = [shifted(annotation, start) for annotation in annotations]
        # copies of videos may be shorter than those that were annotated
        if fields.get("start", 0) >= fields["duration"]:
            raise BadMedia("the video ends before the clip begins")
        if "end" in fields:
            fields["end"] = min(fields["end"], fields["duration"])
        return fields, annotations


# ---- the commands ------------------------------------------------------------------------------------------

def read_held_out(net, root):
    """URLs and sha256 of the images that are evaluated on; no training set may have them."""
    path = os.path.join(root, ".work", "held_out.json")
    if not os.path.exists(path):
        keys = set()
        counts = Counter()
        for source in EVALS["pixmo-points-eval"].rows + EVALS["pixmo-count"].rows:
            _, *where = source
            for row in hub_rows(net, *where, counts=counts):
                keys |= {row["image_url"], row.get("image_sha256") or row["image_url"]}
        for reason, n in counts.items():
            print(f"held out for evaluation: {n:,} {reason}")
        save(path, json.dumps(sorted(keys)).encode())
    with open(path) as f:
        return frozenset(json.load(f))


def eval_entry(name):
    """What datasets.tsv would say of an evaluation; the licence is that of all, their videos have their own."""
    return {"license": "ODC-BY-1.0", "by_hand": convert.EVALS_BY_HAND.get(name, "")}


def select(names, registry):
    """[(name, whether it is an evaluation)] of names, groups and stages."""
    chosen = []
    for name in names:
        found = [(n, True) for n in EVALS if name in ("eval", f"eval/{n}")]
        if not found:
            found = [(n, False) for n, e in registry.items()
                     if name in (n, e["group"], e["sft_group"], *e["stage"].split(","))]
        if not found:
            raise UserError(f"{name}: no set, group or stage of datasets.tsv; `python -m tools.prepare list` "
                            "shows them")
        chosen += [c for c in found if c not in chosen]
    return chosen


def make_set(net, args, name, evaluation, registry):
    """Make one set, print what came of it; the number of records, or None if it has to be begun by hand."""
    root = os.path.join(args.out, "eval") if evaluation else args.out
    recipe = EVALS[name] if evaluation else RECIPES[name]
    entry = eval_entry(name) if evaluation else registry[name]
    held_out = frozenset()
    if recipe.media == "url" and not evaluation:
        held_out = read_held_out(net, args.out)
    maker = Maker(net, root, name, recipe, entry, args.limit, held_out)
    try:
        written, counts = maker.run()
    except ByHand as e:
        print(e)
        return None
    print(f"{name}: {counts.pop('rows', 0):,} rows read, {written:,} lines written to "
          f"{os.path.join(root, name)}.jsonl")
    for reason, n in counts.most_common():
        print(f"  {n:,} {reason}")
    if entry.get("by_hand") and any("media not here" in reason for reason in counts):
        print(maker.by_hand())
    if recipe.media == "youtube" and any("status 40" in reason for reason in counts):
        print("The video mirror bills those who read it: set GOOGLE_CLOUD_PROJECT and "
              f"GOOGLE_OAUTH_TOKEN, or put videos under {root}/media/youtube/, named by their id.")
    return written


def data(args):
    """`python -m tools.prepare data`: set after set. 2 after a user's mistake, 1 if nothing came of a set."""
    registry = read_registry()
    net = Net()
    code = 0
    total = 0
    for name, evaluation in select(args.names, registry):
        try:
            written = make_set(net, args, name, evaluation, registry)
        except (NetError, BadMedia, BadRecord, UserError) as e:
            print(f"{name}: {e}", file=sys.stderr)
            code = max(code, 1 if isinstance(e, (NetError, BadMedia, BadRecord)) else 2)
            continue
        if written == 0:
            code = max(code, 1)
        # a set that waits for its user is no failure, if another one was made
        total += written or 0
    return code if total else max(code, 1)


MEDIA_FROM = {"url": "URLs in the rows", "embedded": "in the rows", "youtube": "video mirror (billed)",
              "archive": "archives of the hub", "hand": "by hand", "none": "text alone"}


def is_partial(root, name):
    """Whether the hub had but a part of a set when it was made."""
    path = os.path.join(root, ".work", name, "done.json")
    with contextlib.suppress(OSError, ValueError, LookupError), open(path) as f:
        return any(PARTIAL in reason for reason in json.load(f)["counts"])
    return False


def show_list(args):
    """`python -m tools.prepare list`: a line for each set."""
    registry = read_registry()
    chosen = select([args.group] if args.group else [*registry, "eval"], registry)
    print(f"{'name':35}{'stage':14}{'task':22}{'rows':>10}  {'media':23}{'licence':18}here")
    for name, evaluation in chosen:
        if evaluation:
            label = f"eval/{name}"
            stage = "eval"
            root = os.path.join(args.out, "eval")
            entry = eval_entry(name)
            recipe = EVALS[name]
        else:
            label = name
            root = args.out
            entry = registry[name]
            recipe = RECIPES[name]
            stage = "+".join(s[:3] for s in entry["stage"].split(","))
        path = os.path.join(root, name + ".jsonl")
        media = os.path.join(root, "media", name)
        if os.path.exists(path):
            here = f"{line_index(path)[1][1]:,} lines{', partial' if is_partial(root, name) else ''}"
        else:
            here = "media" if os.path.isdir(media) and os.listdir(media) else "-"
        rows = f"{int(entry['size']):,}" if entry.get("size") else ""
        print(f"{label:35}{stage:14}{entry.get('task', ''):22}{rows:>10}  {MEDIA_FROM[recipe.media]:23}"
              f"{entry.get('license') or 'see there':18}{here}")
    evaluations = sum(evaluation for _, evaluation in chosen)
    print(f"{len(chosen) - evaluations} sets, {evaluations} evaluations; pre, sft, lon: the stages")
    return 0


WEIGHTS = {os.path.basename(repo): repo for repo in (
    "allenai/Molmo2-8B", "allenai/Molmo2-4B", "allenai/Molmo2-O-7B", "allenai/OLMo-2-0425-1B",
    "allenai/Olmo-3-7B-Instruct", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "google/siglip2-so400m-patch14-384")}


def get_weights(args):
    """`python -m tools.prepare weights`: folders for --init_from, which is printed."""
    net = Net()
    names = args.names
    if names == ["stage1"]:
        names = ["OLMo-2-0425-1B", "siglip2-so400m-patch14-384"]
    for name in names:
        if name not in WEIGHTS:
            raise UserError(f"{name}: not one of stage1, {', '.join(WEIGHTS)}")
    patterns = ("*.safetensors", "*.json", "*.jinja", "merges.txt")  # what is read: no pickles, no code
    folders = []
    for name in names:
        folder = os.path.join(args.out, name)
        files = [f for f in hub_files(net, WEIGHTS[name], patterns, "models") if "/" not in f["name"]]
        fetch_files(net, files, folder)
        size = sum(f["size"] or 0 for f in files)
        print(f"{folder}: {len(files)} files, {size / 1e9:.2f} GB")
        folders.append(folder)
    print(f"--init_from {' '.join(folders)}")
    return 0


class MediaFile(NamedTuple):
    """What a media file was found to be."""
    width: int
    height: int
    seconds: float | None  # of a video
    digest: str            # of its bytes


def inspect(path, as_video):
    """The MediaFile of a file that can be decoded to its end, or the reason why not."""
    try:
        if not as_video:
            height, width, _ = load_image(path).shape
            return MediaFile(width, height, None, file_digest(path))
        seconds = video_duration(path)
        # both ends: a file that was cut short fails at its last frame
        height, width, _ = load_frames(path, [0.0, seconds])[0].shape
        return MediaFile(width, height, seconds, file_digest(path))
    except (BadMedia, OSError, MemoryError) as e:
        return reason_of(e)


def parse_lines(dataset):
    """(file:line, record or None, folder, the problem) of every line."""
    for i in range(len(dataset)):
        line, folder, where = dataset.line(i)
        try:
            yield where, parse_record(line), folder, ""
        except BadRecord as e:
            yield where, None, folder, e.reason


class Inspected:
    """The media that were inspected, each once."""

    def __init__(self, workers):
        self.workers = workers
        self.files = {}           # path -> MediaFile, or the reason why it is none
        self.copies = Counter()   # digest -> files of these bytes

    def inspect(self, wanted):
        """wanted: {path: whether it is a video}"""
        new = {path: as_video for path, as_video in wanted.items() if path not in self.files}
        with ThreadPoolExecutor(self.workers) as pool:
            self.files |= zip(new, pool.map(inspect, new.keys(), new.values()))
        for path in new:
            if isinstance(self.files[path], MediaFile):
                self.copies[self.files[path].digest] += 1

    def problem(self, record, folder):
        """The problem of the media of a record, or ""."""
        for name in refs_of(record):
            file = self.files[inside_folder(folder, name)]
            if isinstance(file, str):
                return file
            if "images" not in record and "width" in record:
                if (record["width"], record["height"]) != (file.width, file.height):
                    return "another size than the line says"
            if file.seconds is None:
                if self.copies[file.digest] >= PLACEHOLDER:
                    return "placeholder image"
                continue
            # containers round durations
            if abs(record.get("duration", file.seconds) - file.seconds) > 0.1:
                return "another duration than the line says"
            for annotation in record["annotations"]:
                if any(point["t"] > file.seconds + 0.1 for point in annotation.get("points", ())):
                    return "point after the end of the video"
        return ""


def problems(dataset, inspected):
    """(file:line, the problem) of every line that cannot be used."""
    seen = set()  # digests of lines
    for where, record, folder, problem in parse_lines(dataset):
        if record:
            content = {k: v for k, v in record.items() if k != "id"}
            # lines that differ in their id alone are the same to training
            text = json.dumps(content, sort_keys=True)
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            try:
                problem = inspected.problem(record, folder)
            except BadMedia as e:
                problem = reason_of(e)
            if not problem and digest in seen:
                problem = "duplicate line"
            seen.add(digest)
        if problem:
            yield where, problem


def inspect_media(datasets, workers):
    """Inspect all media before any line is judged: a placeholder is known by how many are the same."""
    inspected = Inspected(workers)
    wanted = {}
    for dataset in datasets:
        for _, record, folder, _ in tqdm(parse_lines(dataset), dataset.name, len(dataset), leave=False,
                                         disable=None):
            for name in refs_of(record) if record else ():
                with contextlib.suppress(BadMedia):  # `problems` will name it
                    wanted[inside_folder(folder, name)] = "video" in record
            if len(wanted) >= 256:
                inspected.inspect(wanted)
                wanted.clear()
    inspected.inspect(wanted)
    return inspected


def check(args):
    """`python -m tools.prepare check`: 1 if a line cannot be used. Each is counted by its first problem."""
    paths = [args.path]
    held_out = os.path.join(args.path, "eval")
    if glob.glob(os.path.join(glob.escape(held_out), "*.jsonl")):
        paths.append(held_out)
    datasets = []
    try:
        for path in paths:
            datasets += find_datasets([path])[0]
    except (OSError, ValueError) as e:
        raise UserError(str(e).replace("--data ", "")) from None
    inspected = inspect_media(datasets, args.workers)
    total = 0
    print(f"{'set':40}{'lines':>10}{'bad':>8}")
    with open(args.bad_rows, "w", encoding="utf-8") as bad:
        for dataset in datasets:
            reasons = Counter()
            for where, problem in problems(dataset, inspected):
                file, _, line = where.rpartition(":")
                bad.write(json.dumps(dict(file=file, line=int(line), reason=problem)) + "\n")
                reasons[problem] += 1
            total += reasons.total()
            named = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
            print(f"{dataset.name:40}{len(dataset):10,}{reasons.total():8,}  {named}")
    result = f"{total:,} bad lines, listed in {args.bad_rows}" if total else "all is well"
    print(f"{len(inspected.files):,} media files inspected; {result}")
    return 1 if total else 0


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, text):
        subparser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        subparser.set_defaults(run=run)
        return subparser.add_argument

    flag = command("list", show_list, "the registry, and what of it is here")
    flag("group", nargs="?", help="a set, group or stage; `eval` for the evaluations [all]")
    flag("--out", default="data", help="where data are kept [data]")
    flag = command("data", data, "annotations and media as JSONL")
    flag("names", nargs="+", help="sets, groups or stages; `eval` for the held-out sets")
    flag("--limit", type=int, help="rows of each published table, from its start [all]")
    flag("--out", default="data", help="where to: OUT/NAME.jsonl, OUT/media, OUT/eval [data]")
    flag = command("weights", get_weights, "published weights, for --init_from")
    flag("names", nargs="+", help=f"stage1, or any of {', '.join(WEIGHTS)}")
    flag("--out", default="weights", help="where to: OUT/NAME [weights]")
    flag = command("check", check, "every line against the schema, every media file decoded")
    flag("path", help="a JSONL file, or a folder of them")
    flag("--bad_rows", default="bad_rows.jsonl",
         help="where lines that cannot be used are listed [bad_rows.jsonl]")
    flag("--workers", type=int, default=os.cpu_count(), help="threads that decode [one per core]")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    try:
        for name in ("limit", "workers"):
            value = getattr(args, name, None)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: at least 1")
        return args.run(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (NetError, BadMedia) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
