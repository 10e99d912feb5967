"""
Points and tracks of records in the forms of other tools.

    results.csv     file, t, x, y, id, label: t in seconds, x and y in shares of the sides
    mot/NAME.txt    for each video NAME: frame and id from 1, then a box around the point, in pixels
    coco.json       images, and videos in the manner of CocoVID: frame_id from 0, a track_id for each object

`python -m tools.labels FILE --media results/media --out results/my.jsonl` reads them back to the same points.
"""
import bisect
import csv
import functools
import json
import os
from collections import Counter

from lib.media import frame_times, image_size, inside_folder, video_size
from lib.records import media_kind

BOX = 0.05  # of the shorter side: the box that stands for a point where a format has boxes alone


def objects(records):
    """(kind, media, label, points) of each annotation, also of those without points. Other tools take an id for one
    object of a file: the points of a second question about it get other ids."""
    next_id = Counter()
    for record in records:
        kind = media_kind(record)
        for a in record["annotations"] if kind in ("image", "video") else ():
            points = [dict(p, id=p["id"] + next_id[record[kind]]) for p in a.get("points", ())]
            next_id[record[kind]] = max([next_id[record[kind]], *(p["id"] + 1 for p in points)])
            yield kind, record[kind], a.get("label", "object"), points


@functools.cache
def frames_and_size(path, kind):
    """(when each frame begins, (width, height)); an image is one frame."""
    return ([0.0], image_size(path)) if kind == "image" else (frame_times(path), video_size(path))


def boxes(points, frames, size):
    """[(frame from 0, id, [left, top, width, height])] of points, in pixels. The frame is the one that is shown at the
    time of a point; of two points of an id that fall on one frame the first counts."""
    side = BOX * min(size)
    found = {}  # (frame, id) -> its box
    for p in sorted(points, key=lambda p: (p.get("t", 0), p["id"])):
        frame = max(bisect.bisect_right(frames, p.get("t", 0) + 0.006) - 1, 0)  # times have two decimals
        corner = [round(p["x"] * size[0] - side / 2, 4), round(p["y"] * size[1] - side / 2, 4)]
        found.setdefault((frame, p["id"]), corner + [round(side, 4)] * 2)
    return [(frame, i, box) for (frame, i), box in found.items()]


def write_csv(records, folder):
    path = os.path.join(folder, "results.csv")
    with open(path, "w", encoding="utf-8", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(["file", "t", "x", "y", "id", "label"])
        for _, media, label, points in objects(records):
            table.writerows([media, p.get("t", ""), p["x"], p["y"], p["id"], label] for p in points)
    return path


def write_mot(records, folder):
    """A file for each video, of its name. MOT has no columns for a label or an image."""
    os.makedirs(os.path.join(folder, "mot"), exist_ok=True)
    rows = {}  # video -> its boxes
    for kind, media, _, points in objects(records):
        if kind == "video":
            rows.setdefault(media, []).extend(boxes(points, *frames_and_size(inside_folder(folder, media), kind)))
    stem = lambda media: os.path.splitext(os.path.basename(media))[0]
    stems = Counter(map(stem, rows))
    for media, found in rows.items():
        name = stem(media) if stems[stem(media)] == 1 else os.path.basename(media)
        with open(os.path.join(folder, "mot", name + ".txt"), "w", encoding="utf-8") as f:
            for frame, i, box in sorted(found):
                f.write(",".join(map(str, [frame + 1, i + 1, *box, 1, -1, -1, -1])) + "\n")
    return os.path.join(folder, "mot", "")


def write_coco(records, folder):
    videos, images, categories = {}, {}, {}  # media, (media, frame), label -> the entry
    annotations = []
    for kind, media, label, points in objects(records):
        frames, (width, height) = frames_and_size(inside_folder(folder, media), kind)
        size = dict(width=width, height=height)
        if points:
            category = categories.setdefault(label, dict(id=len(categories) + 1, name=label))
        if kind == "video":
            video = videos.setdefault(media, dict(id=len(videos) + 1, name=media, **size))
        else:
            images.setdefault((media, 0), dict(id=len(images) + 1, file_name=media, **size))
        for frame, i, box in boxes(points, frames, (width, height)):
            image = dict(id=len(images) + 1, file_name=media, **size)
            if kind == "video":
                file = f"{os.path.splitext(media)[0]}/{frame:06d}.jpg"  # as CocoVID names them; there is none
                image |= dict(file_name=file, video_id=video["id"], frame_id=frame)
            image = images.setdefault((media, frame), image)
            annotations.append(dict(id=len(annotations) + 1, image_id=image["id"], category_id=category["id"], bbox=box,
                                    area=round(box[2] * box[3], 4), iscrowd=0, track_id=i))
    path = os.path.join(folder, "coco.json")
    tables = dict(videos=videos, images=images, categories=categories)
    with open(path, "w", encoding="utf-8") as f:
        json.dump({name: list(table.values()) for name, table in tables.items()} | dict(annotations=annotations), f)
    return path


FORMATS = dict(csv=write_csv, mot=write_mot, coco=write_coco)  # each takes (records, folder), returns what it wrote
