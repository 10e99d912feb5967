r"""
Labels of other tools become JSONL, which every other command reads.

    python -m tools.labels instances.json --media photos --out photos/my.jsonl     # COCO, LabelMe, Label Studio
    python -m tools.labels dataset --media dataset --out dataset/my.jsonl          # YOLO, or a folder of LabelMe's JSON
    python -m tools.labels a.xml gt.txt p.csv --media clips --out clips/my.jsonl   # CVAT, MOT, a table

    label file ─► reader ─► Label: a box, a point or a mask, as the file has it
                              │ place      the media are found under --media, x and y become shares of the sides
                            points of one class in one image or video
                              │ thin       of a track: two a second
                            record ─► my.jsonl, and what was left out, counted by reason

A box becomes its centre (or with --point bottom the middle of its lower side), a mask the point in it that is
farthest from its edge; the mask itself is kept for `eval.py`. Of a track the label nearest to each half second is
taken, up to a quarter of a second away. Keyframes of CVAT and Label Studio are joined by straight lines. Tracks too
long for a sequence (`tools.show` tells) become several records with --clip 20, of so many seconds each.

A table has the columns file, t, x, y, id, label: t in seconds, empty for an image; id may be empty; x and y in [0, 1].
Every label is written or counted: read + interpolated = written + left out.
"""
import argparse
import json
import math
import os
import sys
import unicodedata
from collections import Counter
from typing import NamedTuple

import av
import numpy as np
from PIL import Image, ImageDraw

from lib.errors import BadMedia, BadRecord, UserError
from lib.media import (MAX_PIXELS, frame_times, image_size, inside_folder, sample_times, video_duration,
                       video_size)
from lib.tasks import EDGE
from tools.labels.formats import BROKEN, NOT_IN_VIEW, YOLO_CLASSES, broken, read_labels

ENDINGS = {"image": frozenset("jpg jpeg png webp gif bmp tif tiff".split()),
           "video": frozenset("mp4 mov m4v mkv webm avi mpg mpeg flv ogv ogg wmv asf ts mts m2ts 3gp gif".split())}

THINNED = "between the half seconds"
LISTED = 3  # labels of each other reason that are named


# ---- masks -------------------------------------------------------------------------------------------------

def to_runs(mask):
    """The runs of a mask, down its columns as COCO and `eval.py` have them."""
    flat = np.concatenate([[False], mask.T.ravel()])  # the first run is one of 0, perhaps of no length
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff([0, *changes, mask.size]).tolist()


def draw_polygons(polygons, width, height):
    """Polygons in pixels -> the part of the media with them as a mask: (bool (h, w), left, top)."""
    corners = np.concatenate(polygons)
    left, top = np.maximum(np.floor(corners.min(0)), 0).astype(int).tolist()
    right, bottom = np.minimum(np.ceil(corners.max(0)) + 1, (width, height)).astype(int).tolist()
    if right <= left or bottom <= top:
        raise BadRecord("mask outside the media")
    image = Image.new("1", (right - left, bottom - top))
    for polygon in polygons:
        ImageDraw.Draw(image).polygon((polygon - (left, top)).ravel().tolist(), 1)
    return np.array(image), left, top


def deepest(mask):
    """(row, column) of the pixel of a mask (H, W) bool that is farthest from all pixels outside: the middle one of
    several. A side of more than 128 pixels is first divided into blocks, of which those wholly inside count."""
    padded = np.pad(mask, 1)
    block = math.ceil(max(padded.shape) / 128)
    inside = np.pad(padded, [(0, -side % block) for side in padded.shape])
    inside = inside.reshape(inside.shape[0] // block, block, -1, block).all((1, 3))
    if not inside.any():  # thinner than a block
        block = 1
        inside = padded
    # Squared distances: up or down a column first, then from column to column while that can make one smaller.
    row = np.arange(len(inside))[:, None]
    above = row - np.maximum.accumulate(np.where(inside, -1, row))
    below = np.minimum.accumulate(np.where(inside, 10 ** 6, row)[::-1])[::-1] - row
    in_column = np.minimum(above, below).astype(np.int32) ** 2
    squares = in_column.copy()
    step = 1
    while step ** 2 < squares.max() and step < inside.shape[1]:
        np.minimum(squares[:, step:], in_column[:, :-step] + step ** 2, out=squares[:, step:])
        np.minimum(squares[:, :-step], in_column[:, step:] + step ** 2, out=squares[:, :-step])
        step += 1
    best = np.argwhere(squares == squares.max())
    middle = np.abs(best - best.mean(0)).sum(1).argmin()
    return (best[middle] * block + block // 2 - 1).tolist()  # - 1: the padding


# ---- media -------------------------------------------------------------------------------------------------

class Medium(NamedTuple):
    """A file that labels are about."""
    kind: str           # image or video
    path: str           # as the record says it
    size: tuple         # (width, height), upright
    duration: float     # of a video, seconds
    frames: list        # when each begins
    looks: tuple        # the half seconds and the end: when a model may look at it


class Shelf:
    """The media under a folder. Labels name them by paths of other machines: what counts is the file's own name, and
    where several have it as many folders above it as are needed."""

    def __init__(self, folder, out):
        self.folder = os.path.realpath(folder)
        self.out = os.path.realpath(out)  # the folder of the JSONL: media are named from there
        self.files = {}  # (kind, name with or without its ending) -> [parts of a path]
        self.media = {}  # (kind, name in a label) -> Medium or BadRecord
        for base, folders, files in os.walk(self.folder):
            folders.sort()
            for file in sorted(files):
                stem, ending = os.path.splitext(file)
                parts = os.path.relpath(os.path.join(base, file), self.folder).split(os.sep)
                for kind in ENDINGS:
                    for name in (file, stem) if ending[1:].lower() in ENDINGS[kind] else ():
                        # accents are written in two ways, and differently on a Mac
                        self.files.setdefault((kind, unicodedata.normalize("NFC", name)), []).append(parts)

    def find(self, kind, name):
        """The path of a file; BadRecord if there is none, or one cannot tell which."""
        *folders, file = unicodedata.normalize("NFC", name).replace("\\", "/").rstrip("/").split("/")
        found = self.files.get((kind, file), [])
        for k in range(1, len(folders) + 1):
            nearer = [c for c in found if unicodedata.normalize("NFC", c[-k - 1:][0]) == folders[-k] and len(c) > k]
            found = nearer or found
        if len(found) != 1:
            raise BadRecord("media not found", f"{len(found) or 'no'} {kind}s called {name!r} under {self.folder}")
        return inside_folder(self.folder, os.path.join(*found[0]))

    def load(self, kind, name):
        path = self.find(kind, name)
        relative = os.path.relpath(path, self.out).replace(os.sep, "/")
        relative.encode()  # a name that is not UTF-8 cannot stand in JSON
        if kind == "image":
            return Medium(kind, relative, image_size(path), 0, (), ())
        duration = video_duration(path)
        looks = np.unique(sample_times(duration, 10 ** 9).round(2))
        try:
            return Medium(kind, relative, video_size(path), duration, frame_times(path), looks)
        except av.FFmpegError as e:
            raise BadMedia(f"{path}: broken video ({e})") from None

    def get(self, kind, name):
        """The Medium of a name; BadRecord if there is none or it cannot be read. Both are remembered."""
        if not isinstance(name, str) or not name:
            raise BadRecord("media not found", "the label does not name any")
        if (kind, name) not in self.media:
            try:
                self.media[kind, name] = self.load(kind, name)
            except BadRecord as e:
                self.media[kind, name] = e
            except BadMedia as e:
                self.media[kind, name] = BadRecord("media cannot be read", str(e))
        if isinstance(self.media[kind, name], BadRecord):
            raise self.media[kind, name]
        return self.media[kind, name]


# ---- where a label is --------------------------------------------------------------------------------------

class Point(NamedTuple):
    x: float      # shares of the sides
    y: float
    mask: dict    # as a record has it, or None
    t: float      # of a video
    id: object


def between(a, b, share, t):
    """The label at t on the way from keyframe a to b; None of masks that cannot be mixed."""
    if a.kind == "bitmap" or [p.shape for p in a.shape] != [p.shape for p in b.shape]:
        return None
    return a._replace(shape=[(1 - share) * p + share * q for p, q in zip(a.shape, b.shape)], t=t, until=None)


def box_place(low, high, where):
    """The point of a box in shares of the sides. Where its centre is outside the media, the part inside counts."""
    if (high <= low).any():
        raise BadRecord("box of no or negative size", f"{high[0] - low[0]:g} x {high[1] - low[1]:g} of the sides")
    if (low >= 1).any() or (high <= 0).any():
        raise BadRecord("box outside the media", f"at {low[0]:g}, {low[1]:g} of the sides")
    middle = (low + high) / 2
    x, y = np.where((middle >= 0) & (middle <= 1), middle, (low.clip(0) + high.clip(None, 1)) / 2).tolist()
    return x, float(min(high[1], 1)) if where == "bottom" else y


def mask_place(label, unit, size):
    """((x, y), mask as a record has it) of a label with a mask."""
    width, height = size
    if label.kind == "polygons":
        shares = [(polygon / unit).round(5) for polygon in label.shape]
        mask, left, top = draw_polygons([polygon * size for polygon in shares], width, height)
    else:
        mask, corner = label.shape
        scale = np.array(size) / unit
        left, top = (corner * scale).round().astype(int).tolist()
        if (scale != 1).any():  # labelled on a copy of another size
            wide, high = np.maximum(mask.shape[::-1] * scale, 1).round().astype(int).tolist()
            if wide * high > MAX_PIXELS:
                raise broken(f"a mask of {wide}x{high}")
            mask = np.array(Image.fromarray(mask).resize((wide, high), Image.NEAREST))
        mask = mask[max(-top, 0):max(height - top, 0), max(-left, 0):max(width - left, 0)]
        left, top = max(left, 0), max(top, 0)
    if not mask.any():
        raise BadRecord("empty mask")
    row, column = deepest(mask)
    place = (left + column + 0.5) / width, (top + row + 0.5) / height
    if label.kind == "polygons" and len(shares) == 1:
        return place, dict(polygon=shares[0].tolist())
    whole = np.zeros((height, width), bool)
    whole[top:top + mask.shape[0], left:left + mask.shape[1]] = mask
    return place, dict(rle=dict(size=[height, width], counts=to_runs(whole)))


def position(label, size, where):
    """(x, y, mask or None) of a label in media of `size`, in shares of the sides."""
    unit = np.array(label.unit or size, float) * (1, 1)
    if not (unit > 0).all():
        raise broken(f"media of {unit[0]:g}x{unit[1]:g}")
    if isinstance(label.unit, tuple) and abs(unit[0] * size[1] / (unit[1] * size[0]) - 1) > 0.02:
        raise BadRecord("media of another shape", f"labelled at {unit[0]:g}x{unit[1]:g}, upright they are "
                                                  f"{size[0]}x{size[1]}")
    if label.kind in ("polygons", "bitmap"):
        place, mask = mask_place(label, unit, size)
        return *place, mask
    if label.kind == "box":
        return *box_place(*(label.shape[0] / unit), where), None
    x, y = (label.shape[0][0] / unit).tolist()
    if not (-EDGE <= x <= 1 + EDGE and -EDGE <= y <= 1 + EDGE):
        raise BadRecord("point outside the media", f"{x:g}, {y:g} of the sides"
                                                   f"{': in pixels? --pixels' if label.unit == 1 else ''}")
    return x, y, None


# ---- labels become records ---------------------------------------------------------------------------------

def same_end(a, b):
    """Whether two paths can be one file's: names without their endings, and the folders that both name, are equal."""
    a, b = (os.path.splitext(unicodedata.normalize("NFC", path).replace("\\", "/"))[0].split("/") for path in (a, b))
    n = min(len(a), len(b))
    return a[-n:] == b[-n:]


def thin(points, medium):
    """Of each object the point nearest to each time at which a model may look, moved to that time. A point on the
    frame that is shown at such a time, which may have begun before, is there already."""
    nearest = {}  # (id, look) -> (how far away, point)
    ends = np.append(medium.frames[1:], math.inf)
    for n, p in enumerate(points):
        end = ends[min(np.searchsorted(ends, p.t + 0.006, "right"), len(ends) - 1)]  # of its frame; looks are rounded
        shown = medium.looks[(medium.looks > p.t - 0.006) & (medium.looks < end - 0.006)]
        look = float(shown[0] if len(shown) else medium.looks[np.abs(medium.looks - p.t).argmin()])
        key = (p.id, look) if p.id is not None else (n, "an object of its own")
        distance = 0 if len(shown) else abs(p.t - look)
        if key not in nearest or distance < nearest[key][0]:
            nearest[key] = distance, p._replace(t=look)
    return [p for _, p in nearest.values()]


def numbered(points):
    """Points with ids from 0, by time: the given ones where they count from 0, else by their order, else from left to
    right."""
    points = sorted(points, key=lambda p: (p.t or 0, p.x, p.y))
    ids = list(dict.fromkeys(p.id for p in points))
    if None in ids:
        return [p._replace(id=n) for n, p in enumerate(points)]
    if all(isinstance(i, int) for i in ids):
        ids = sorted(ids)
        if ids[0] == 0 and ids[-1] < 100:
            ids = list(range(100))
    order = {i: n for n, i in enumerate(ids)}
    points = [p._replace(id=order[p.id]) for p in points]
    return sorted(points, key=lambda p: (p.t or 0, p.id))


class Collection:
    """Labels on the way to records, and the count of them."""

    def __init__(self, shelf, args):
        self.shelf = shelf
        self.args = args
        self.groups = {}      # (Medium's path, class) -> {(id, t): Point}
        self.media = {}       # path -> (Medium, its names in labels)
        self.parts = set()    # groups of keypoints
        self.flawed = set()   # names of media that lack a label, so that counts would be wrong
        self.read = 0
        self.made = 0         # interpolated
        self.reasons = Counter()

    def add(self, where, media, make, *arguments):
        """Make the labels that stand at a place of a file, and keep their points. An error is counted and told."""
        try:
            labels = make(*arguments)
        except (BadRecord, *BROKEN) as e:
            self.read += 1
            self.leave_out(where, media, e)
            return
        self.read += len(labels)
        for label in labels:  # it grows by the interpolated ones
            try:
                more = self.place(label)
                self.made += len(more)
                labels += more
            except (BadRecord, *BROKEN) as e:
                self.leave_out(where, label.media, e)

    def leave_out(self, where, media, e):
        if not isinstance(e, BadRecord):
            e = broken(f"{type(e).__name__}: {e}")
        self.reasons[e.reason] += 1
        if e.reason != NOT_IN_VIEW:
            self.flawed.add(str(media))
            if self.reasons[e.reason] <= LISTED:
                print(f"{where}: {e}", file=sys.stderr)

    def medium(self, label):
        """(Medium, label), the label being one of a still image where its video is not there."""
        if label.frame is None and label.t is None:
            return self.shelf.get("image", label.still or label.media), label
        try:
            return self.shelf.get("video", label.media), label
        except BadRecord:
            if not label.still:
                raise
        return self.shelf.get("image", label.still), label._replace(t=None, frame=None, id=None, media=label.still)

    def time(self, label, medium):
        """Seconds of a label in its video, infinite after the last frame."""
        if label.t is not None:
            return label.t
        if label.frame < 0:
            raise broken(f"frame {label.frame}")
        if self.args.fps:
            return label.frame / self.args.fps
        return medium.frames[label.frame] if label.frame < len(medium.frames) else math.inf

    def place(self, label):
        """Keep the point of a label; returns the labels between it and the next keyframe."""
        medium, label = self.medium(label)
        name = " ".join(label.name.replace("_", " ").split())
        name.encode()  # half a character is no text
        if label.refuse:
            raise BadRecord(label.refuse)
        if not name:
            raise broken("no class")
        t = None
        if medium.kind == "video":
            t = self.time(label, medium)
            if not -0.01 <= t <= medium.duration + 0.25:
                raise BadRecord("after the end of the video", f"{t:g} s, and it has {medium.duration:g} s")
        _, names = self.media.setdefault(medium.path, (medium, set()))
        for other in names - {label.media}:
            if not same_end(other, label.media):
                raise BadRecord("media not found", f"{label.media!r} would be {medium.path}, but so is {other!r}")
        names.add(label.media)
        points = self.groups.get((medium.path, name), {})
        key = (label.id, t) if label.id is not None else (len(points), "no id")
        if key in points:
            raise BadRecord("two labels of one id at one time", f"{name}, id {label.id}")
        points[key] = Point(*position(label, medium.size, self.args.point), t, label.id)
        self.groups[medium.path, name] = points
        if label.is_part:
            self.parts.add(name)
        more = []
        if label.until and medium.kind == "video":
            end = self.time(label.until, medium)
            for look in medium.looks[(medium.looks > t) & (medium.looks < end)].tolist():
                more.append(between(label, label.until, (look - t) / (end - t), look))
        return [label for label in more if label]

    def annotations(self, name, points, medium, names):
        """The annotations of one class in one record."""
        is_track = len({p.id for p in points}) < len(points) and points[0].id is not None
        task = "image_pointing"
        if medium.kind == "video":
            task = "video_tracking" if is_track else "video_pointing"
        annotation = dict(task=task, label=name, points=[])
        masks = []
        for p in numbered(points):
            key = dict(t=p.t, id=p.id) if medium.kind == "video" else dict(id=p.id)
            annotation["points"].append(key | dict(x=round(min(max(p.x, 0), 1), 4), y=round(min(max(p.y, 0), 1), 4)))
            if p.mask:
                masks.append(key | p.mask)
        if masks:
            annotation["masks"] = masks
        if not self.args.counting or name in self.parts or names & self.flawed:
            return [annotation]
        objects = {p["id"]: p for p in reversed(annotation["points"])}  # where each is seen first
        several = name if name.endswith("s") or not name.isascii() else name + "s"
        return [annotation, dict(task="counting", label=several, points=list(objects.values())[::-1])]

    def records(self):
        """(records, one for each image and each clip of a video, how many labels they hold)."""
        records = {}  # (path, clip) -> record
        written = 0
        for (path, name), points in self.groups.items():
            medium, names = self.media[path]
            points = list(points.values())
            clips = {0: points}
            if medium.kind == "video":
                thinned = thin(points, medium)
                self.reasons[THINNED] += len(points) - len(thinned)
                clips = {}
                for p in thinned:
                    clips.setdefault(int(p.t // self.args.clip), []).append(p)
            for clip, points in clips.items():
                if (path, clip) not in records:
                    records[path, clip] = {"id": path, medium.kind: path, "annotations": []}
                    if len(medium.looks) and medium.looks[-1] >= self.args.clip:
                        start = clip * self.args.clip
                        end = start + self.args.clip - 0.5  # so that each half second is in one clip
                        is_last = end + 0.5 > medium.looks[-1]
                        records[path, clip] |= dict(start=start, end=medium.duration if is_last else end)
                records[path, clip]["annotations"] += self.annotations(name, points, medium, names)
                written += len(points)
        return [records[key] for key in sorted(records)], written


# ---- the command -------------------------------------------------------------------------------------------

def label_files(paths):
    """The files that are meant: a folder is one of YOLO if it lists classes, else its JSON files are."""
    files = []
    for path in paths:
        if os.path.basename(path) in YOLO_CLASSES:
            path = os.path.dirname(path) or "."
        names = sorted(os.listdir(path)) if os.path.isdir(path) else ()
        if not os.path.isdir(path) or not set(YOLO_CLASSES).isdisjoint(names):
            files.append(path)
            continue
        of_folder = [os.path.join(path, name) for name in names if name.endswith(".json")]
        if not of_folder:
            raise UserError(f"{path}: a folder with neither data.yaml or classes.txt, as YOLO has, nor JSON files")
        files += of_folder
    return files


def convert(args):
    """Read label files, write records, print the counts; returns how many files could not be read."""
    out = os.path.dirname(os.path.abspath(args.out))
    if not os.path.isdir(args.media):
        raise UserError(f"--media {args.media}: no such folder")
    if not os.path.isdir(out) or not os.path.join(os.path.realpath(args.media), "").startswith(
            os.path.join(os.path.realpath(out), "")):
        raise UserError(f"--out {args.out}: must lie in --media {args.media} or in a folder above it: media are named "
                        "from there")
    files = label_files(args.files)
    if os.path.realpath(args.out) in map(os.path.realpath, files):
        raise UserError(f"--out {args.out}: is one of the label files, and would be overwritten")
    collection = Collection(Shelf(args.media, out), args)
    failed = 0
    for path in files:
        try:
            for label in read_labels(path, args):
                collection.add(*label)
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            failed += 1
        except BROKEN as e:
            print(f"error: {path}: not built as its format is ({type(e).__name__}: {e})", file=sys.stderr)
            failed += 1
    records, written = collection.records()
    left = collection.reasons.total()
    assert collection.read + collection.made == written + left, (collection.read, collection.made, written, left)
    if not records and failed == len(files):
        return failed
    if not records:
        reasons = ", ".join(f"{n} {reason}" for reason, n in collection.reasons.most_common())
        raise UserError(f"--out {args.out}: not written, as no label can be used: {reasons or 'the files have none'}")
    with open(args.out, "w", encoding="utf-8") as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
    print(f"{args.out}: {len(records)} records, {sum(len(r['annotations']) for r in records)} annotations")
    print(f"{collection.read} labels read + {collection.made} interpolated = {written} written + {left} left out")
    for reason, n in collection.reasons.most_common():
        if n:
            print(f"  {n} left out: {reason}")
    return failed


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("files", nargs="+", metavar="FILE", help="label files; of YOLO the folder")
    parser.add_argument("--media", required=True, metavar="FOLDER", help="where the images and videos are")
    parser.add_argument("--out", required=True, metavar="JSONL", help="where the records go")
    parser.add_argument("--point", default="centre", choices=["centre", "bottom"], help="of a box [centre]")
    parser.add_argument("--counting", action="store_true", help="ask for numbers too, where no label was left out")
    parser.add_argument("--label", default="object", help="the class of MOT files that name none [object]")
    parser.add_argument("--pixels", action="store_true", help="x and y of a CSV are pixels, not shares")
    parser.add_argument("--clip", type=float, default=math.inf, metavar="SECONDS",
                        help="make records of so much of a video, for tracks longer than a sequence [whole videos]")
    parser.add_argument("--fps", type=float, help="labelled frames a second [those of the video itself]")
    args = parser.parse_args(argv)
    try:
        if args.fps is not None and not 0 < args.fps < 1e6:
            raise UserError(f"--fps {args.fps}: frames a second, more than 0")
        if not args.clip >= 1 or args.clip % 0.5 and args.clip < math.inf:
            raise UserError(f"--clip {args.clip}: seconds, 1 or more, in halves")
        failed = convert(args)
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    main()
