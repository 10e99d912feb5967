"""
Label files -> Labels: what each tool writes. No media are opened here and no label is judged.

    reader(file) ─► (where a label stands, its media or None, function that makes the Labels, its arguments)

The function is called in one place, `Collection.add`, where an error costs this label and no other.

    COCO            JSON  boxes, masks as polygons and runs, keypoints; videos as YouTube-VIS, CocoVID and TAO have them
    YOLO            a folder with data.yaml or classes.txt: boxes, polygons, poses
    LabelMe         JSON  rectangles, polygons, circles, points, masks
    CVAT            XML   for images and for video, version 1.1: boxes, ellipses, polygons, points, masks
    Label Studio    JSON  boxes, ellipses, polygons, points; boxes in videos
    MOT             text  boxes in videos
    a table         CSV   file, t, x, y, id, label
"""
import base64
import csv
import io
import json
import math
import os
import re
import urllib.parse
import xml.etree.ElementTree
from typing import NamedTuple

import numpy as np
from PIL import Image

from lib.errors import BadRecord, UserError
from lib.media import MAX_PIXELS, PIL_ERRORS

NOT_IN_VIEW = "not in view"  # the object is known not to be there

# What Python raises where a label has not the fields, types and values that its format promises.
BROKEN = (*PIL_ERRORS, RecursionError, csv.Error)


class Label(NamedTuple):
    """One label as its file has it."""
    media: str               # name or path of the image or video, as it is spelled there
    name: str                # of the class
    unit: object = None      # (width, height) that x and y are measured in; 1 or 100: shares, per cent; None: pixels
    kind: str = ""           # point: (1, 2); box: its corners (2, 2); polygons: (n, 2) each; bitmap
    shape: list = None       # the arrays of the kind; of a bitmap [mask (h, w) bool, (left, top)]
    frame: int = None        # of a video, from 0
    t: float = None          # of a video, in seconds
    id: object = None        # of an object, the same in every frame
    still: str = None        # the image of this frame, in case that there is no video
    until: "Label" = None    # the next keyframe, if the object is in view up to it
    is_part: bool = False    # a keypoint: no object to count
    refuse: str = None       # why to leave it out


def broken(detail):
    return BadRecord("broken label", detail)


def refuse(detail):
    raise broken(detail)


def look_up(table, key, what):
    """The entry of a table whose keys are ids as text: some tools write 7, others "7"."""
    if str(key) not in table:
        refuse(f"{what} {key!r} is not in the file")
    return table[str(key)]


def numbered(names, start):
    return {str(n): name for n, name in enumerate(names, start)}


def places(values):
    """x, y, x, y, ... as numbers or text -> (n, 2)."""
    array = np.array([float(value) for value in values]).reshape(-1, 2)
    if not np.isfinite(array).all():
        raise broken("a place that is not a number")
    return array


def box(left, top, width, height):
    left, top, width, height = map(float, (left, top, width, height))
    return dict(kind="box", shape=[places([left, top, left + width, top + height])])


def around(x, y, rx, ry):
    """The box around an ellipse."""
    return box(float(x) - float(rx), float(y) - float(ry), 2 * float(rx), 2 * float(ry))


def from_runs(runs, width, height):
    """Runs of 0 and 1 in turn, row by row -> mask (height, width) bool. COCO's go down the columns: swap the sides."""
    runs = np.array(runs, np.int64)
    size = width * height
    if runs.ndim != 1 or (runs < 0).any() or (runs > size).any() or runs.sum() != size or not 0 < size <= MAX_PIXELS:
        raise broken(f"the runs of a mask do not make {width}x{height} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)


def unpack_runs(text):
    """COCO's compressed runs. A character holds 5 bits of a number, the lowest first; 32 marks that more follow, 16 in
    the last one that it is negative. From the fourth run on it is the difference to the run two before."""
    runs = []
    number = 0
    shift = 0
    for character in text.encode("ascii"):
        bits = character - 48
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32 and shift < 60:
            continue
        if bits & 16:
            number -= 1 << shift
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number = 0
        shift = 0
    return runs


# ---- one reader for each format ----------------------------------------------------------------------------

def read_text(path):
    try:
        with open(path, encoding="utf-8-sig") as f:
            return f.read()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None


def coco_shape(segmentation, bbox):
    """COCO's polygons or runs, else its box -> fields of a Label; None without any."""
    if isinstance(segmentation, dict):
        height, width = segmentation["size"]
        runs = segmentation["counts"]
        mask = from_runs(unpack_runs(runs) if isinstance(runs, str) else runs, height, width).T
        return dict(kind="bitmap", shape=[mask, (0, 0)], unit=(width, height))
    polygons = [places(polygon) for polygon in segmentation or () if len(polygon) >= 6]
    if polygons:
        return dict(kind="polygons", shape=polygons)
    return box(*bbox) if bbox else None


def coco_labels(a, tables, k=None):
    """The object of an annotation and its keypoints. k: place of a frame in a video's lists, None of an image."""
    categories, images, videos = tables
    category = look_up(categories, a.get("category_id"), "category")
    if k is None:
        media = look_up(images, a.get("image_id"), "image")
        video = videos.get(str(media.get("video_id")))
        shape = coco_shape(a.get("segmentation"), a.get("bbox"))
    else:
        media = video = look_up(videos, a.get("video_id"), "video")
        masks = a.get("segmentations")
        shape = coco_shape(masks[k] if masks else None, a["bboxes"][k] if a.get("bboxes") else None)
    label = Label(media.get("file_name"), category["name"], (media["width"], media["height"]),
                  id=a.get("track_id", a.get("instance_id")))
    if a.get("iscrowd"):
        label = label._replace(refuse="a crowd, not one object")
    if video:
        files = video.get("file_names") or [media.get("file_name")]
        name = video.get("name") or video.get("file_name") or os.path.dirname(str(files[0]).replace("\\", "/"))
        frame = media.get("frame_id", media.get("frame_index")) if k is None else k
        label = label._replace(media=name, frame=frame, still=files[k or 0], id=label.id if k is None else a["id"])
    labels = [label._replace(**shape)] if shape else []
    keypoints = a.get("keypoints") or ()
    for name, x, y, visible in zip(category.get("keypoints", ()), keypoints[::3], keypoints[1::3], keypoints[2::3]):
        if visible:
            labels.append(label._replace(name=f"{name} of the {label.name}", kind="point", shape=[places([x, y])],
                                         is_part=True))
    if not labels:
        raise broken("no box, mask or keypoint")
    return labels


def read_coco(data, path):
    """COCO, and its extensions to video: lists over the frames (YouTube-VIS), or images of videos (CocoVID, TAO)."""
    tables = []
    for name in ("categories", "images", "videos"):
        tables.append({str(item.get("id")): item for item in data.get(name, ()) if isinstance(item, dict)})
    for n, a in enumerate(data["annotations"]):
        fields = a if isinstance(a, dict) else {}
        where = f"{path}: annotation {fields.get('id', n)}"
        frames = fields.get("segmentations") or fields.get("bboxes")
        if not frames or not isinstance(frames, list):
            media = tables[1].get(str(fields.get("image_id")), {}).get("file_name")
            yield where, media, coco_labels, a, tables
            continue
        for k, shape in enumerate(frames):
            if shape:
                yield f"{where}, frame {k}", None, coco_labels, a, tables, k


def labelme_labels(shape, label):
    kind = shape.get("shape_type", "polygon")
    corners = places(np.ravel(shape["points"]))
    label = label._replace(name=shape["label"])
    if kind == "mask":
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"])), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise broken(f"a mask of {image.width}x{image.height}")
            mask = np.array(image.convert("L")) > 0
        return [label._replace(kind="bitmap", shape=[mask, corners[0].round().astype(int).tolist()])]
    if kind == "polygon" and len(corners) > 2:
        return [label._replace(kind="polygons", shape=[corners])]
    if kind == "rectangle" and len(corners) > 1:  # two corners in any order, or all four
        return [label._replace(kind="box", shape=[np.stack([corners.min(0), corners.max(0)])])]
    if kind == "circle":
        radius = math.dist(*corners)
        return [label._replace(**around(*corners[0], radius, radius))]
    if kind in ("point", "points"):
        return [label._replace(kind="point", shape=[corner[None]]) for corner in corners]
    raise BadRecord("no reader for this shape", f"{kind} of {len(corners)} points")


def read_labelme(data, path):
    size = data.get("imageWidth"), data.get("imageHeight")  # the oldest versions do not write them
    label = Label(data["imagePath"], "", size if all(size) else None)
    for n, shape in enumerate(data["shapes"]):
        yield f"{path}: shape {n}", label.media, labelme_labels, shape, label


def studio_media(task):
    """The file of a Label Studio task: the end of its URL, without what an upload puts before the name."""
    texts = [value for value in task["data"].values() if isinstance(value, str)]
    value = next((text for text in texts if re.search(r"\.\w*[a-z]\w*($|\?)", text, re.I)), "")  # others are notes
    url = urllib.parse.urlsplit(value)
    local = urllib.parse.parse_qs(url.query).get("d")  # /data/local-files/?d=folder/name.jpg
    if local:
        return local[0]
    return re.sub(r"(upload/(?:\d+/)?)[0-9a-f]{8}-", r"\1", urllib.parse.unquote(url.path if url.scheme else value))


def studio_shape(kind, value, aspect):
    """Fields of a Label. A box is turned clockwise about its first corner; aspect: width of the media over height."""
    if kind in ("rectangle", "videorectangle"):
        x, y, width, height = (float(value[side]) for side in ("x", "y", "width", "height"))
        angle = math.radians(float(value.get("rotation") or 0))
        # the centre of the turned box; the turn is one of pixels, x and y are shares of sides of other lengths
        middle_x = x + (math.cos(angle) * width - math.sin(angle) * height / aspect) / 2
        middle_y = y + (math.sin(angle) * width * aspect + math.cos(angle) * height) / 2
        return box(middle_x - width / 2, middle_y - height / 2, width, height)
    if kind == "ellipse":
        return around(value["x"], value["y"], value["radiusX"], value["radiusY"])
    if kind == "keypoint":
        return dict(kind="point", shape=[places([value["x"], value["y"]])])
    if kind == "polygon":
        return dict(kind="polygons", shape=[places(np.ravel(value["points"]))])
    raise BadRecord("no reader for this shape", kind)


def studio_labels(region, label):
    """The labels of a region; of a track its keyframes."""
    kind = region["type"].removesuffix("labels")
    value = region["value"]
    aspect = float(region.get("original_width") or 1) / float(region.get("original_height") or 1)
    if kind != "videorectangle":
        return [label._replace(**studio_shape(kind, value, aspect))]
    seconds = value["duration"] / value["framesCount"]  # of a frame, as Label Studio counted them, from 1
    labels = []
    for entry in value["sequence"]:
        t = (int(entry["frame"]) - 1) * seconds
        labels.append(label._replace(**studio_shape(kind, entry, aspect), id=region["id"], t=t))
    following = [*labels[1:], labels[-1]._replace(t=value["duration"] + 1)]  # the last keyframe holds to the end
    return [label._replace(until=after if entry.get("enabled", True) else None)
            for label, after, entry in zip(labels, following, value["sequence"])]


def studio_regions(task, where):
    media = studio_media(task)
    given = [a for a in task["annotations"] if not a.get("was_cancelled")]
    for a in given:
        names = {}  # id of a region -> its class, which may be a result of its own
        for region in a["result"]:
            value = region.get("value") or {}
            names |= {region.get("id"): name for name in value.get(region["type"]) or value.get("labels") or ()}
        for region in a["result"]:
            if region["type"] not in ("labels", "relation"):
                label = Label(media, names.get(region.get("id")), 100)
                if a is not given[0]:
                    label = label._replace(refuse="of a second annotator")
                yield f"{where}, region {region.get('id')}", media, studio_labels, region, label


def read_studio(data, path):
    for n, task in enumerate(data):
        if "annotations" not in task:
            raise UserError(f"{path}: task {n} has no annotations: export from Label Studio 1.0 or later as JSON, not "
                            "as JSON-MIN")
        where = f"{path}: task {task.get('id', n)}"
        try:
            yield from studio_regions(task, where)
        except BROKEN as e:  # what is left of this task counts as one label
            yield where, None, refuse, f"{type(e).__name__}: {e}"


def cvat_labels(shape, label, following=None):
    """The label of a shape, an XML element. following: the next one of its track."""
    field = shape.attrib
    if field.get("outside") == "1":
        raise BadRecord(NOT_IN_VIEW)
    label = label._replace(name=field.get("label", label.name), frame=int(field["frame"]) if "frame" in field else None)
    if shape.tag == "box":  # one that is turned has the same centre
        (left, top), (right, bottom) = places(field[side] for side in ("xtl", "ytl", "xbr", "ybr"))
        label = label._replace(**box(left, top, right - left, bottom - top))
    elif shape.tag == "ellipse":
        label = label._replace(**around(field["cx"], field["cy"], field["rx"], field["ry"]))
    elif shape.tag == "polygon":
        label = label._replace(kind="polygons", shape=[places(re.split("[,;]", field["points"]))])
    elif shape.tag == "points":
        corners = places(re.split("[,;]", field["points"]))
        return [label._replace(kind="point", shape=[corner[None]]) for corner in corners]
    elif shape.tag == "mask":
        mask = from_runs([int(n) for n in field["rle"].split(",")], int(field["width"]), int(field["height"]))
        label = label._replace(kind="bitmap", shape=[mask, (int(field["left"]), int(field["top"]))])
    else:
        raise BadRecord("no reader for this shape", shape.tag)
    if following is not None and following.tag == shape.tag and int(following.get("frame")) > label.frame + 1:
        in_view = xml.etree.ElementTree.Element(following.tag, following.attrib | {"outside": "0"})
        try:
            label = label._replace(until=cvat_labels(in_view, label)[0])
        except (BadRecord, *BROKEN):
            pass  # the next shape has a message of its own
    return [label]


def read_cvat(root, path):
    """CVAT for images and for video, version 1.1."""
    version = root.findtext("version")
    if root.tag != "annotations" or version != "1.1":
        raise UserError(f"{path}: <{root.tag}> of version {version}, but only CVAT's <annotations> of version 1.1 are "
                        'read: export as "CVAT for images 1.1" or "CVAT for video 1.1"')
    for image in root.iter("image"):
        label = Label(image.get("name"), "", (image.get("width"), image.get("height")))
        for n, shape in enumerate(image):
            yield f"{path}: {label.media}, shape {n}", label.media, cvat_labels, shape, label
    size = root.find(".//original_size")
    unit = None if size is None else (size.findtext("width"), size.findtext("height"))
    sources = {task.findtext("id"): task.findtext("source") for task in root.iter("task")}
    for track in root.iter("track"):  # of a project, each track names its task
        source = sources.get(track.get("task_id")) or root.findtext(".//source")
        where = f"{path}: track {track.get('id')}"
        try:
            label = Label(source, track.get("label"), unit, id=int(track.get("id")))
            shapes = sorted(track, key=lambda shape: int(shape.get("frame", -1)))
        except BROKEN as e:  # the track counts as one label
            yield where, source, refuse, f"{type(e).__name__}: {e}"
            continue
        for shape, following in zip(shapes, [*shapes[1:], None]):
            yield f"{where}, frame {shape.get('frame')}", source, cvat_labels, shape, label, following


def yaml_names(text):
    """The classes of a data.yaml, {number as text: name}: `names` as a list or a mapping, on one line or on several; {}
    if there are none."""
    text = re.sub(r"(^|\s)#.*", "", text, flags=re.M)
    *found, after = re.split(r"^names:", text, maxsplit=1, flags=re.M)
    block = re.split(r"\n(?=\w)", after)[0].strip()  # up to the next key
    items = block.split("\n")
    if not found or block[:1] in ("[", "{") and block[-1] not in "]}":
        return {}  # the file was cut
    if block[:1] in ("[", "{"):
        items = re.findall(r"""(?:"[^"]*"|'[^']*'|[^,"'])+""", block[1:-1])
    names = {}
    for item in items:
        number, name = re.match(r"\s*(?:-|(\d+)\s*:)?\s*(.*)", item).groups()
        if name:
            names[number or str(len(names))] = name.strip().strip("\"'")
    return names


YOLO_CLASSES = ("data.yaml", "dataset.yaml", "classes.txt", "obj.names")


def yolo_labels(line, label, names, n_keypoints, n_fields):
    """A row: class and box, then keypoints where data.yaml has kpt_shape; or class and polygon. Shares of the sides."""
    number, *values = line.split()
    label = label._replace(name=look_up(names, int(number), "class"))
    values = [float(value) for value in values]
    if len(values) > 5 and len(values) != 4 + n_keypoints * n_fields:
        return [label._replace(kind="polygons", shape=[places(values)])]
    x, y, width, height = values[:4]
    labels = [label._replace(**box(x - width / 2, y - height / 2, width, height))]
    keypoints = np.reshape(values[4:], (-1, n_fields)) if len(values) > 5 else ()  # a fifth value is a confidence
    for k, keypoint in enumerate(keypoints):
        if keypoint[2:].all() and keypoint.any():
            labels.append(label._replace(name=f"keypoint {k} of the {label.name}", kind="point",
                                         shape=[places(keypoint[:2])], is_part=True))
    return labels


def read_yolo(folder):
    """A folder with data.yaml or classes.txt, and a .txt for each image: beside it, or under labels/ for images/."""
    listed = next(os.path.join(folder, name) for name in YOLO_CLASSES if os.path.isfile(os.path.join(folder, name)))
    text = read_text(listed)
    names = yaml_names(text) if listed.endswith("yaml") else numbered(text.split("\n"), 0)
    if not names:
        raise UserError(f"{listed}: no classes under names: is the file whole?")
    keypoints = re.search(r"^kpt_shape:\s*\[\s*(\d+)\s*,\s*([23])\s*\]", text, re.M)
    n_keypoints, n_fields = map(int, keypoints.groups() if keypoints else (0, 2))
    for base, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            if not file.endswith(".txt") or file.startswith(("classes.", "train.", "val.", "test.", "README")):
                continue
            path = os.path.join(base, file)
            parts = os.path.relpath(path, folder).removesuffix(".txt").split(os.sep)
            label = Label("/".join("images" if part == "labels" else part for part in parts), "", 1)
            try:
                lines = read_text(path).split("\n")
            except UserError as e:  # it counts as one label
                yield path, label.media, refuse, str(e).removeprefix(f"{path}: ")
                continue
            for n, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{n}", label.media, yolo_labels, line, label, names, n_keypoints, n_fields


MOT_CLASSES = ("person", "person on a vehicle", "car", "bicycle", "motorbike", "vehicle without a motor",
               "person standing still", "distractor", "occluder", "occluder on the ground", "occluder", "reflection")


def mot_labels(line, label, names):
    """frame, id, left, top, width, height; of the truth then whether it counts, its class and how much is visible."""
    values = [float(value) for value in line.split(",")]
    frame, number = map(int, values[:2])
    label = label._replace(frame=frame - 1, id=number if number >= 0 else None, **box(*values[2:6]))
    if len(values) in (8, 9) and values[7] > 0:
        refuse = "marked to be ignored" if values[6] == 0 else None
        label = label._replace(name=look_up(names, int(values[7]), "class"), refuse=refuse)
    return [label]


def read_mot(path, name):
    """SEQUENCE/gt/gt.txt or SEQUENCE.txt, of the video SEQUENCE. name: the class of rows that have none."""
    folder, file = os.path.split(os.path.abspath(path))
    is_part = os.path.basename(folder) in ("gt", "det")
    label = Label(os.path.basename(os.path.dirname(folder)) if is_part else file.removesuffix(".txt"), name)
    names = os.path.join(folder, "labels.txt")  # CVAT writes them
    names = numbered(read_text(names).split("\n") if os.path.isfile(names) else MOT_CLASSES, 1)
    for n, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{n}", label.media, mot_labels, line, label, names


def csv_labels(row, unit):
    t = (row.get("t") or "").strip()
    number = (row.get("id") or "").strip()
    return [Label(row["file"], row["label"], unit, "point", [places([row["x"], row["y"]])], t=float(t) if t else None,
                  id=int(number) if number else None)]


def read_csv(path, unit):
    text = read_text(path)
    head = text.split("\n", 1)[0]
    rows = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=head.count), strict=True)
    missing = {"file", "x", "y", "label"} - set(rows.fieldnames or ())
    if missing:
        raise UserError(f"{path}: no column {', '.join(sorted(missing))}: a table has file, t, x, y, id, label")
    try:
        for row in rows:
            yield f"{path}:{rows.line_num}", row["file"], csv_labels, row, unit
    except csv.Error as e:  # a quotation mark without its second one would take all that follows for one label
        raise UserError(f"{path}:{rows.line_num}: {e}; nothing after this line was read") from None


def read_labels(path, args):
    """The reader of a label file, chosen by what it holds. UserError if it is none that we know, or broken."""
    ending = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        return read_yolo(path)
    if ending == ".txt":
        return read_mot(path, args.label)
    if ending == ".csv":
        return read_csv(path, None if args.pixels else 1)
    if ending not in (".json", ".xml"):
        raise UserError(f"{path}: a label file is .json, .xml, .txt, .csv or a folder; unpack an archive first")
    text = read_text(path)
    try:
        if ending == ".xml":
            # Entities can make a gigabyte of a line, or name other files. Label tools write none.
            if "<!DOCTYPE" in text or "<!ENTITY" in text:
                raise UserError(f"{path}: XML with a DOCTYPE or entities is refused; label tools write none")
            return read_cvat(xml.etree.ElementTree.fromstring(text), path)
        data = json.loads(text)
    except (xml.etree.ElementTree.ParseError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: truncated or broken: {e}") from None
    if isinstance(data, dict) and "shapes" in data:
        return read_labelme(data, path)
    if isinstance(data, dict) and "annotations" in data and ("images" in data or "videos" in data):
        return read_coco(data, path)
    if isinstance(data, list) and data and all(isinstance(task, dict) and "data" in task for task in data):
        return read_studio(data, path)
    raise UserError(f"{path}: neither COCO (annotations with images or videos) nor LabelMe (shapes) nor Label Studio "
                    "(a list of tasks with data; its export as JSON-MIN lacks them)")
