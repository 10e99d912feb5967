"""Labels of other tools: a sample of each format after its public specification, about media whose objects were drawn
at known places; and files in which something is broken.

Every image shows a red square and a blue disk, every video a red square that moves to the right and a blue disk that
stands still and goes after 1.2 seconds. Whatever the format, the points must be where the objects were drawn.
"""
import base64
import io
import json
import math
import os
import re
import shutil
import tempfile
import time
import unicodedata
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from eval import load_questions
from data import find_datasets
from lib.records import parse_record
from tools import show
from tools.labels import __main__ as labels
from tools.labels import formats

SIZE = 96, 64                          # of all media
SQUARE = 12, 20, 16, 16                # left, top, width, height; in videos at the start
DISK = 66, 34, 12                      # centre and radius
DISK_BOX = 54, 22, 24, 24
SQUARE_AT, DISK_AT = (20 / 96, 28 / 64), (66 / 96, 34 / 64)
FRAMES, RATE, GONE = 20, 10, 12        # of a video; the disk is there before frame GONE


def draw(k=0, has_disk=True):
    image = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(image)
    left, top, width, height = SQUARE
    pen.rectangle([left + 2 * k, top, left + 2 * k + width - 1, top + height - 1], "red")
    x, y, radius = DISK
    if has_disk:
        pen.ellipse([x - radius, y - radius, x + radius - 1, y + radius - 1], "blue")
    return image


def square_at(t):
    """Where the square is at t seconds, up to the last frame."""
    return (20 + 2 * RATE * min(t, (FRAMES - 1) / RATE)) / 96, 28 / 64


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder of media; tests write their label files and results beside them under names of their own."""
    folder = tmp_path_factory.mktemp("labels")
    write_media(folder)
    return folder


def write_media(folder):
    os.makedirs(folder / "images" / "train")
    for name in ("a.png", "b b.png", "train/café.png", "f0.png"):
        draw().save(folder / "images" / name)
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height = SIZE
        stream.bit_rate = 2_000_000
        stream.pix_fmt = "yuv420p"
        for k in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_image(draw(k, k < GONE))))
        container.mux(stream.encode())


def converted(media, capsys, files, *flags):
    """({path of media: {label: annotation}} , counts as printed, lines of stderr) of label files {name: contents}."""
    paths = []
    for name, contents in files.items():
        path = media / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(contents, bytes):
            path.write_bytes(contents)
        else:
            path.write_text(contents if isinstance(contents, str) else json.dumps(contents), encoding="utf-8")
        paths.append(str(path))
    return run_on(media, capsys, paths, *flags)


def run_on(media, capsys, paths, *flags):
    out = media / "out.jsonl"
    out.unlink(missing_ok=True)
    try:
        labels.main([*paths, "--media", str(media), "--out", str(out), *flags])
    except SystemExit as e:
        assert e.code == 2
    printed, told = capsys.readouterr()
    records = {}
    written = 0
    for line in out.read_bytes().splitlines() if out.exists() else ():
        record = parse_record(line)
        by_label = records[record.get("image") or record["video"]] = {}
        for a in record["annotations"]:
            is_count = a["task"] == "counting"
            by_label[("count", a["label"]) if is_count else a["label"]] = a
            written += 0 if is_count else len(a["points"])
    if out.exists():
        summary, *reasons = printed.splitlines()[1:]
        numbers = list(map(int, re.findall(r"\d+", summary)))
        assert numbers[0] + numbers[1] == numbers[2] + numbers[3] and numbers[2] == written
        assert numbers[3] == sum(int(line.split()[0]) for line in reasons)
        load_questions(find_datasets([str(out)])[0])  # evaluation takes it
    return records, printed, told.splitlines()


def places(annotation):
    return [(p["x"], p["y"]) for p in annotation["points"]]


def near(a, b, pixels=0.51):
    return abs(a[0] - b[0]) * SIZE[0] <= pixels and abs(a[1] - b[1]) * SIZE[1] <= pixels


def check_image(by_label, square="red square", disk="blue disk", pixels=0.51):
    assert near(places(by_label[square])[0], SQUARE_AT, pixels)
    assert near(places(by_label[disk])[0], DISK_AT, pixels)


def check_tracks(by_label, square="red square", disk="blue disk", until=1.9):
    """The square at every half second, the disk at those at which it is there."""
    track = by_label[square]
    assert track["task"] == "video_tracking" and {p["id"] for p in track["points"]} == {0}
    assert [p["t"] for p in track["points"]] == [t for t in (0, 0.5, 1, 1.5, 2) if t <= until + 0.25]
    for p in track["points"]:
        assert near((p["x"], p["y"]), square_at(p["t"]))
    if disk:
        assert [p["t"] for p in by_label[disk]["points"]] == [0, 0.5, 1]
        assert all(near(place, DISK_AT) for place in places(by_label[disk]))


def circle_points(n=24):
    x, y, radius = DISK
    return [(x + radius * math.cos(2 * math.pi * k / n), y + radius * math.sin(2 * math.pi * k / n)) for k in range(n)]


SQUARE_POINTS = [(12, 20), (28, 20), (28, 36), (12, 36)]


def flat(points):
    return [value for point in points for value in point]


def disk_mask():
    return np.array(draw())[..., 0] < 128  # red is 255 everywhere else


def column_runs(mask):
    """Runs of a mask down its columns, by counting pixel by pixel."""
    runs = [0]
    value = False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


# ---- COCO --------------------------------------------------------------------------------------------------

def coco(annotations, **more):
    return {"info": {"version": "1.0"}, "licenses": [],
            "images": [{"id": 7, "file_name": "a.png", "width": 96, "height": 64},
                       {"id": 9, "file_name": "train2017/b b.png", "width": 192, "height": 128}],
            "categories": [{"id": 1, "name": "red_square", "supercategory": "shape",
                            "keypoints": ["left_corner", "right_corner", "middle"], "skeleton": [[1, 2]]},
                           {"id": 5, "name": "blue disk"}],
            "annotations": [dict(id=k + 1, **a) for k, a in enumerate(annotations)], **more}


def test_coco_images(media, capsys):
    """Boxes, polygons, runs, keypoints, a crowd; the second image was labelled at twice its size."""
    mask = disk_mask()
    twice = np.repeat(np.repeat(mask, 2, 0), 2, 1)
    records, printed, _ = converted(media, capsys, {"instances.json": coco([
        dict(image_id=7, category_id=1, bbox=list(SQUARE), iscrowd=0, area=256, num_keypoints=2,
             keypoints=[12, 20, 2, 0, 0, 0, 20, 28, 1]),
        dict(image_id=7, category_id=5, segmentation=[flat(circle_points())], bbox=list(DISK_BOX), iscrowd=0),
        dict(image_id=9, category_id=5, segmentation={"size": [128, 192], "counts": column_runs(twice)}, iscrowd=0,
             bbox=[2 * side for side in DISK_BOX]),
        dict(image_id=9, category_id=1, bbox=[24, 40, 32, 32], iscrowd=1)])}, "--counting")
    a, b = records["images/a.png"], records["images/b b.png"]
    check_image(a, pixels=1)
    assert near(places(b["blue disk"])[0], DISK_AT, 1) and "red square" not in b
    assert "6 labels read + 0 interpolated = 5 written + 1 left out" in printed and "a crowd" in printed
    assert places(a["left corner of the red square"]) == [(round(12 / 96, 4), round(20 / 64, 4))]
    assert "right corner of the red square" not in a  # not labelled
    # Masks are kept, of the media's own size; a point lies in its own.
    polygon = np.array(a["blue disk"]["masks"][0]["polygon"]) * SIZE
    assert np.abs(polygon - circle_points()).max() < 0.01
    rle = b["blue disk"]["masks"][0]["rle"]
    assert rle == {"size": [64, 96], "counts": column_runs(mask)}
    # Asked for numbers, but not of an image that lacks an object.
    assert len(a["count", "red squares"]["points"]) == len(a["count", "blue disks"]["points"]) == 1
    assert not any(name[0] == "count" for name in b)
    assert not any("corner" in name[1] for name in a if name[0] == "count")
    questions = load_questions(find_datasets([str(media / "out.jsonl")])[0])
    masked = [(q, p) for q in questions for p in q.points if q.mask(p) is not None]
    assert len(masked) == 2 and all(q.hits(p, p) for q, p in masked)


def test_coco_runs_that_are_compressed():
    """The published worked form: 5 bits a character, from the fourth run on differences. By hand: 7 is chr(55), 5 is
    chr(53), 36 = 4 + 32 is two characters (4 | 32, then 1), -3 is 29, with its sign bit set."""
    assert formats.unpack_runs("75" + chr(48 + 36) + "1" + chr(48 + 29)) == [7, 5, 36, 2]
    assert formats.unpack_runs("") == []


def test_coco_videos(media, capsys):
    """As YouTube-VIS has them, lists over the frames; and as CocoVID, images of videos."""
    def boxes(k):
        return [12 + 2 * k, 20, 16, 16]
    runs = {"size": [64, 96], "counts": column_runs(disk_mask())}
    vis = {"videos": [{"id": 3, "width": 96, "height": 64, "length": FRAMES,
                       "file_names": [f"clip/{k:05d}.jpg" for k in range(FRAMES)]}],
           "categories": [{"id": 1, "name": "red square"}, {"id": 2, "name": "blue disk"}],
           "annotations": [
               {"id": 11, "video_id": 3, "category_id": 1, "iscrowd": 0, "bboxes": [boxes(k) for k in range(FRAMES)],
                "segmentations": [None] * FRAMES, "areas": [256] * FRAMES},
               {"id": 12, "video_id": 3, "category_id": 2, "iscrowd": 0, "bboxes": None,
                "segmentations": [runs if k < GONE else None for k in range(FRAMES)]}]}
    vis["annotations"][0]["segmentations"] = None
    records, printed, _ = converted(media, capsys, {"vis.json": vis}, "--counting")
    check_tracks(records["clip.mp4"])
    assert [m["t"] for m in records["clip.mp4"]["blue disk"]["masks"]] == [0, 0.5, 1]
    assert "32 labels read + 0 interpolated = 8 written + 24 left out" in printed
    assert len(records["clip.mp4"]["count", "red squares"]["points"]) == 1

    cocovid = {"videos": [{"id": 1, "name": "clip"}, {"id": 2, "name": "frames only"}],
               "images": [{"id": k, "video_id": 1, "frame_id": k, "file_name": f"clip/{k}.jpg", "width": 96,
                           "height": 64} for k in range(FRAMES)],
               "categories": [{"id": 1, "name": "red square"}],
               "annotations": [{"id": k, "image_id": k, "video_id": 1, "category_id": 1, "bbox": boxes(k),
                                "instance_id": 4711} for k in range(FRAMES)]}
    frame = {"id": 99, "video_id": 2, "frame_id": 0, "file_name": "x/f0.png", "width": 96, "height": 64}
    cocovid["images"].append(frame)
    cocovid["annotations"].append({"id": 99, "image_id": 99, "category_id": 1, "bbox": list(SQUARE), "instance_id": 1})
    records, _, _ = converted(media, capsys, {"vid.json": cocovid})
    check_tracks(records["clip.mp4"], disk=None)
    assert near(places(records["images/f0.png"]["red square"])[0], SQUARE_AT)  # frames without a video are images


# ---- YOLO --------------------------------------------------------------------------------------------------

def yolo_row(number, left, top, width, height):
    return f"{number} {(left + width / 2) / 96} {(top + height / 2) / 64} {width / 96} {height / 64}"


def test_yolo_folders(media, capsys):
    """labels/ beside images/, names in a data.yaml; boxes, a polygon, and a Unicode name."""
    polygon = " ".join(f"{x / 96} {y / 64}" for x, y in circle_points())
    (media / "set").mkdir()
    files = {"set/data.yaml": "path: ../set  # root\ntrain: images/train\nval: images/train\n\nnc: 2\nnames:\n"
                              "  0: 'red square'\n  1: \"blue disk\"  # round\n",
             "set/labels/train/café.txt": yolo_row(0, *SQUARE) + "\n1 " + polygon + "\n"}
    for name, text in files.items():
        (media / name).parent.mkdir(parents=True, exist_ok=True)
        (media / name).write_text(text, encoding="utf-8")
    (media / "crops" / "train").mkdir(parents=True)
    draw().save(media / "crops" / "train" / "café.png")  # labels/train/ stands for images/train/, not for this
    records, printed, _ = run_on(media, capsys, [str(media / "set")])
    check_image(records["images/train/café.png"], pixels=1)
    assert "2 labels read + 0 interpolated = 2 written + 0 left out" in printed and "masks" in \
        records["images/train/café.png"]["blue disk"]

    (media / "beside").mkdir()
    (media / "beside" / "classes.txt").write_text("red square\nblue disk\n")
    (media / "beside" / "a.txt").write_text(yolo_row(1, *DISK_BOX) + " 0.93\n" + yolo_row(0, *SQUARE) + "\n")
    records, _, _ = run_on(media, capsys, [str(media / "beside" / "classes.txt")], "--point", "bottom")
    assert near(places(records["images/a.png"]["red square"])[0], (20 / 96, 36 / 64))
    assert near(places(records["images/a.png"]["blue disk"])[0], (66 / 96, 46 / 64))

    (media / "pose").mkdir()
    (media / "pose" / "data.yaml").write_text("names: [red square]\nkpt_shape: [2, 3]\n")
    (media / "pose" / "a.txt").write_text(yolo_row(0, *SQUARE) + f" {12 / 96} {20 / 64} 2 0 0 0\n")
    records, _, _ = run_on(media, capsys, [str(media / "pose")])
    assert set(records["images/a.png"]) == {"red square", "keypoint 0 of the red square"}


@pytest.mark.parametrize("text, names", [
    ("names: ['a', \"b c\", d]\nnc: 3", ["a", "b c", "d"]), ("names:\n- a\n- b: c\nnc: 2", ["a", "b: c"]),
    ("nc: 2\nnames: {0: a, 1: 'b, c'}", ["a", "b, c"]), ("names:\n  0: a # x\n  1: it's\n", ["a", "it's"]),
    ("names: [\n  'a',\n  'b'\n]\n", ["a", "b"]), ("names:\n    - 'Füße'\n    - 犬\n\nval: x", ["Füße", "犬"]),
    ("names:\n  1: b\n  0: a\nkpt_shape: [17, 3]", ["a", "b"])])
def test_names_of_a_data_yaml(text, names):
    assert formats.yaml_names(text) == formats.numbered(names, 0)


# ---- LabelMe -----------------------------------------------------------------------------------------------

def labelme(shapes, path="a.png"):
    return {"version": "5.5.0", "flags": {}, "imagePath": path, "imageData": None, "imageWidth": 96, "imageHeight": 64,
            "shapes": [dict(dict(group_id=None, description="", flags={}, mask=None), **shape) for shape in shapes]}


def test_labelme(media, capsys):
    x, y, radius = DISK
    file = io.BytesIO()
    Image.fromarray(disk_mask()[22:46, 54:78]).save(file, "PNG")
    png = base64.b64encode(file.getvalue()).decode()
    records, printed, _ = converted(media, capsys, {"lm/a.json": labelme([
        dict(label="red square", shape_type="rectangle", points=[[28, 20], [12, 36]]),  # drawn from the other corner
        dict(label="blue disk", shape_type="circle", points=[[x, y], [x, y + radius]]),
        dict(label="polygon", shape_type="polygon", points=SQUARE_POINTS),
        dict(label="mask", shape_type="mask", points=[[54, 22], [77, 45]], mask=png),
        dict(label="dot", shape_type="point", points=[[5, 6]]),
        dict(label="line", shape_type="linestrip", points=[[5, 6], [7, 8]])], "..\\images\\a.png"),
        "lm/b.json": labelme([dict(label="red square", shape_type="rectangle", points=[[12, 20], [28, 36]])],
                             "C:\\Users\\x\\b b.png")})
    check_image(records["images/a.png"])
    check_image(records["images/a.png"], "polygon", "mask", 1)
    assert places(records["images/a.png"]["dot"]) == [(round(5 / 96, 4), round(6 / 64, 4))]
    assert near(places(records["images/b b.png"]["red square"])[0], SQUARE_AT)
    assert "7 labels read + 0 interpolated = 6 written + 1 left out" in printed
    assert "1 left out: no reader for this shape" in printed
    assert run_on(media, capsys, [str(media / "lm")])[0] == records  # a folder of them


# ---- CVAT --------------------------------------------------------------------------------------------------

def cvat(body, meta="", version="1.1"):
    return (f'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>{version}</version>\n<meta><task>'
            f"<id>1</id><name>t</name>{meta}<source>clip.mp4</source></task></meta>\n{body}</annotations>\n")


def cvat_box(left, top, width, height, **more):
    fields = dict(more, xtl=left, ytl=top, xbr=left + width, ybr=top + height, occluded=0)
    written = " ".join(f'{key}="{value}"' for key, value in fields.items())
    return f'<box {written}><attribute name="a">b</attribute></box>'


def test_cvat_images(media, capsys):
    points = ";".join(f"{x:.2f},{y:.2f}" for x, y in circle_points())
    mask = disk_mask()[22:46, 54:78]
    rows = ", ".join(map(str, column_runs(mask.T)))
    body = (f'<image id="0" name="images/a.png" width="96" height="64">{cvat_box(*SQUARE, label="red square")}'
            f'<polygon label="blue disk" points="{points}" z_order="0"/><tag label="sunny"/>'
            f'<mask label="mask" rle="{rows}" left="54" top="22" width="24" height="24"/>'
            '<ellipse label="ellipse" cx="66" cy="34" rx="12" ry="12"/>'
            '<points label="dots" points="5,6;20,28"/></image>'
            '<image id="1" name="b b.png" width="96" height="64"/>')
    records, printed, _ = converted(media, capsys, {"images.xml": cvat(body)})
    assert list(records) == ["images/a.png"]
    check_image(records["images/a.png"], pixels=1)
    check_image(records["images/a.png"], disk="mask", pixels=1)
    check_image(records["images/a.png"], disk="ellipse")
    assert len(places(records["images/a.png"]["dots"])) == 2
    assert "7 labels read + 0 interpolated = 6 written + 1 left out" in printed


def test_cvat_video(media, capsys):
    """The square has keyframes at its ends alone: a straight line between them. The disk leaves at a keyframe that is
    outside, and is not seen after it."""
    square = cvat_box(*SQUARE, frame=0, keyframe=1, outside=0)
    square += cvat_box(12 + 2 * 19, 20, 16, 16, frame=19, keyframe=1, outside=0)
    disk = cvat_box(*DISK_BOX, frame=0, keyframe=1, outside=0) + cvat_box(*DISK_BOX, frame=12, keyframe=1, outside=1)
    body = f'<track id="3" label="red square">{square}</track><track id="4" label="blue disk">{disk}</track>'
    meta = "<original_size><width>96</width><height>64</height></original_size>"
    records, printed, _ = converted(media, capsys, {"video.xml": cvat(body, meta)})
    check_tracks(records["clip.mp4"])
    assert "4 labels read + 5 interpolated = 8 written + 1 left out" in printed and "not in view" in printed
    # The same, every frame listed as newer versions do.
    square = "".join(cvat_box(12 + 2 * k, 20, 16, 16, frame=k, keyframe=int(k in (0, 19)), outside=0)
                     for k in range(FRAMES))
    body = f'<track id="3" label="red square">{square}</track><track id="4" label="blue disk">{disk}</track>'
    records, printed, _ = converted(media, capsys, {"video.xml": cvat(body, meta)})
    check_tracks(records["clip.mp4"])
    assert "15 left out: between the half seconds" in printed


def test_xml_with_entities_is_refused(media, capsys):
    """A billion laughs, and a file of the machine's: in one line, whatever the encoding."""
    laughs = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><annotations>&b;</annotations>'
    outer = '<!DOCTYPE x SYSTEM "file:///etc/passwd"><annotations/>'
    for k, contents in enumerate((laughs, outer, laughs.encode("utf-16"), laughs.encode("utf-7"))):
        _, _, told = converted(media, capsys, {f"e{k}.xml": contents})
        assert len(told) == 1 and ("refused" in told[0] or "UTF-8" in told[0] or "broken" in told[0])


# ---- Label Studio ------------------------------------------------------------------------------------------

def studio_value(left, top, width, height):
    return dict(x=left / 0.96, y=top / 0.64, width=width / 0.96, height=height / 0.64)


def test_label_studio_images(media, capsys):
    """Boxes (one turned about its corner), points, polygons, ellipses; the class in a result of its own; an upload's
    prefix; a second annotator."""
    def region(kind, name, **value):
        return dict(id=name, type=kind, original_width=96, original_height=64, image_rotation=0, from_name="l",
                    to_name="image", value=dict(value, **{kind: [name]}))
    # turned by 90 degrees about (28, 20): what was to the right is below, what was below is to the left
    turned = region("rectanglelabels", "turned", **studio_value(28, 20, 16, 16), rotation=90)
    bare = [dict(region("rectangle", "r1", **studio_value(*SQUARE)), value=studio_value(*SQUARE)),
            dict(id="r1", type="labels", from_name="c", to_name="image", value=dict(labels=["bare"]))]
    circle = [[x / 0.96, y / 0.64] for x, y in circle_points()]
    result = [region("rectanglelabels", "red square", **studio_value(*SQUARE), rotation=0), turned, *bare,
              region("ellipselabels", "blue disk", x=66 / 0.96, y=34 / 0.64, radiusX=12 / 0.96, radiusY=12 / 0.64),
              region("polygonlabels", "polygon", points=circle), region("keypointlabels", "dot", x=50, y=25, width=1),
              region("brushlabels", "brush", format="rle", rle=[1, 2]),
              dict(type="choices", from_name="q", to_name="image", value=dict(choices=["sunny"]))]
    task = {"id": 5, "data": {"image": "/data/upload/1/0a1b2c3d-b%20b.png"}, "predictions": [],
            "annotations": [dict(id=0, was_cancelled=True, result=[turned]), dict(id=1, result=result),
                            dict(id=2, was_cancelled=False, result=[turned])]}
    records, printed, _ = converted(media, capsys, {"ls.json": [task]})
    found = records["images/b b.png"]
    check_image(found)
    check_image(found, "turned", "polygon", 1)
    check_image(found, "bare")
    assert places(found["dot"]) == [(0.5, 0.25)]
    assert "9 labels read + 0 interpolated = 6 written + 3 left out" in printed and "second annotator" in printed
    for url in ("s3://bucket/x/b b.png", "/data/local-files/?d=b%20b.png", "https://host/b%20b.png?X=1"):
        task["data"]["image"] = url
        assert converted(media, capsys, {"ls.json": [task]})[0] == records


def test_a_broken_task_costs_itself(media, capsys):
    def task(n, *results):
        return {"id": n, "data": {"image": "a.png"}, "annotations": [{"result": list(results)}]}
    dot = dict(id="x", type="keypointlabels", value=dict(x=50, y=25, keypointlabels=["dot"]))
    broken = [task(1, 7), task(2, {}), dict(task(3), data=None), task(4, dict(dot, value=None)),
              task(5, dict(dot, id=[])), task(6, dict(dot, value={"x": 1, "y": None}))]
    records, printed, _ = converted(media, capsys, {"ls.json": [*broken, task(7, dot)]})
    assert "7 labels read + 0 interpolated = 1 written + 6 left out" in printed
    assert places(records["images/a.png"]["dot"]) == [(0.5, 0.25)]


def test_label_studio_video(media, capsys):
    def keyframe(frame, enabled, *sides):
        return dict(studio_value(*sides), frame=frame, enabled=enabled, rotation=0, time=(frame - 1) / 10)

    def region(name, *sequence):
        return dict(id=name, type="videorectangle", from_name="box", to_name="video",
                    value=dict(framesCount=FRAMES, duration=2.0, labels=[name], sequence=list(sequence)))
    result = [region("red square", keyframe(1, True, *SQUARE), keyframe(20, True, 12 + 38, 20, 16, 16)),
              region("blue disk", keyframe(1, True, *DISK_BOX), keyframe(12, False, *DISK_BOX))]
    task = {"id": 1, "data": {"video": "/data/upload/clip.mp4"}, "annotations": [{"id": 1, "result": result}]}
    records, printed, _ = converted(media, capsys, {"ls.json": [task]})
    check_tracks(records["clip.mp4"])
    assert "4 labels read" in printed


# ---- MOT and tables ----------------------------------------------------------------------------------------

def test_mot(media, capsys):
    """The truth, nine columns with classes and rows that do not count; and results, ten without a class."""
    rows = []
    for k in range(FRAMES):
        rows.append(f"{k + 1},1,{12 + 2 * k},20,16,16,1,3,1")
        rows.append(f"{k + 1},2,{54},22,24,24,{int(k < GONE)},1,0.5")
    records, printed, _ = converted(media, capsys, {"clip/gt/gt.txt": "\n".join(rows)})
    check_tracks(records["clip.mp4"], "car", "person")
    assert f"{FRAMES - GONE} left out: marked to be ignored" in printed and "40 labels read" in printed
    rows = [f"{k + 1},{n},{left},{top},{w},{h},0.9,-1,-1,-1" for k in range(FRAMES)
            for n, (left, top, w, h) in ((1, (12 + 2 * k, 20, 16, 16)), (2, DISK_BOX))]
    records, _, _ = converted(media, capsys, {"clip.txt": "\n".join(rows)}, "--label", "shape")
    track = records["clip.mp4"]["shape"]["points"]
    assert [(p["t"], p["id"]) for p in track] == [(t, i) for t in (0, 0.5, 1, 1.5, 2) for i in (0, 1)]
    assert all(near((p["x"], p["y"]), DISK_AT if p["id"] else square_at(p["t"])) for p in track)


def test_a_table(media, capsys):
    """Images and videos; a spreadsheet's semicolons and mark at the front; pixels when they are said to be."""
    text = f"file,t,x,y,id,label\nimages/a.png,,{20 / 96},{28 / 64},,red square\n"
    text += f"a.png,,{66 / 96},{34 / 64},0,blue disk\n"
    for k in range(FRAMES):
        text += f"clip.mp4,{k / RATE},{(20 + 2 * k) / 96},{28 / 64},0,red square\n"
        text += f"clip.mp4,{k / RATE},{66 / 96},{34 / 64},1,blue disk\n" if k < GONE else ""
    records, _, _ = converted(media, capsys, {"t.csv": text})
    check_image(records["images/a.png"])
    check_tracks({"red square": records["clip.mp4"]["red square"]}, disk=None)
    pixels = "\ufefffile;t;x;y;id;label\r\na.png;;20;28;;red square\r\na.png;;66;34;;blue disk\r\n"
    records, _, told = converted(media, capsys, {"p.csv": pixels})
    assert not records and "in pixels? --pixels" in told[0]
    check_image(converted(media, capsys, {"p.csv": pixels}, "--pixels")[0]["images/a.png"])
    events = "file,t,x,y,id,label\nclip.mp4,1.4,0.5,0.5,,hit\nclip.mp4,0.1,0.25,0.5,,hit\n"
    hits = converted(media, capsys, {"c.csv": events})[0]["clip.mp4"]["hit"]
    assert hits["points"] == [dict(t=0, id=0, x=0.25, y=0.5), dict(t=1.5, id=1, x=0.5, y=0.5)]
    assert hits["task"] == "video_pointing"


def test_what_we_write_is_read_back(media, capsys):
    """Points of a record -> a table, MOT, COCO -> the same points."""
    points = [dict(t=t, id=i, x=round(0.1 + 0.2 * i + t / 10, 4), y=round(0.9 - t / 5, 4)) for t in (0, 0.5, 1, 2)
              for i in (0, 2) if i < 2 or t]
    rows = "".join(f"clip.mp4,{p['t']},{p['x']},{p['y']},{p['id']},ball\n" for p in points)
    rows = "file,t,x,y,id,label\n" + rows
    assert converted(media, capsys, {"r.csv": rows})[0]["clip.mp4"]["ball"]["points"] == points
    side = 4
    boxes = []
    for p in points:
        frame = min(round(p["t"] * RATE), FRAMES - 1)
        boxes.append((frame, p["id"], p["x"] * 96 - side / 2, p["y"] * 64 - side / 2))
    points = [dict(p, id=p["id"] // 2) for p in points]  # MOT counts ids from 1, so that none needs to be the first
    rows = "".join(f"{frame + 1},{i + 1},{left},{top},{side},{side},1,-1,-1,-1\n" for frame, i, left, top in boxes)
    assert converted(media, capsys, {"clip.txt": rows})[0]["clip.mp4"]["object"]["points"] == points
    images = [{"id": k, "video_id": 1, "frame_id": k, "width": 96, "height": 64} for k in range(FRAMES)]
    annotations = [{"id": k, "image_id": frame, "category_id": 1, "track_id": i, "bbox": [left, top, side, side]}
                   for k, (frame, i, left, top) in enumerate(boxes)]
    written = {"videos": [{"id": 1, "name": "clip.mp4"}], "images": images, "annotations": annotations,
               "categories": [{"id": 1, "name": "ball"}]}
    read = converted(media, capsys, {"r.json": written})[0]["clip.mp4"]["ball"]["points"]
    assert [dict(p, id=p["id"] // 2) for p in read] == points


# ---- what is broken ----------------------------------------------------------------------------------------

def test_broken_files_get_one_line(media, capsys):
    good = json.dumps(labelme([dict(label="x", shape_type="point", points=[[5, 6]])]))
    cases = {"truncated.json": (good[:-20], "truncated or broken"), "empty.json": ("", "truncated or broken"),
             "list.json": ("[]", "neither COCO"), "other.json": ('{"a": 1}', "neither COCO"),
             "deep.json": ("[" * 100_000, "truncated or broken"), "bytes.json": (b"\xff\xfe\x00", "not UTF-8"),
             "old.xml": (cvat("", version="1.0"), "version 1.0"), "voc.xml": ("<annotation/>", "<annotation>"),
             "cut.xml": (cvat("")[:-9], "truncated or broken"), "head.csv": ("a,b\n1,2\n", "no column file"),
             "old.json": ([{"data": {}, "completions": []}], "1.0 or later"), "a.zip": (b"PK", "unpack"),
             "min.json": ([{"id": 1, "image": "a.png", "label": []}], "JSON-MIN"),
             "results.json": ([{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}], "neither COCO"),
             "ansi.csv": ("file,x,y,label\na.png,.5,.5,Füße\n".encode("cp1252"), "save it as UTF-8"),
             "shapes.json": ({"shapes": 3, "imagePath": "a.png", "imageWidth": 1, "imageHeight": 1}, "not built as"),
             "coco.json": ({"annotations": 7, "images": []}, "not built as")}
    for name, (contents, says) in cases.items():
        records, _, told = converted(media, capsys, {name: contents})
        assert not records and says in told[0] and name in told[0] and len(told) == 1, told
    # A file that cannot be read costs itself; the exit status tells.
    records, _, told = converted(media, capsys, {"truncated.json": good[:-20], "good.json": good})
    assert list(records) == ["images/a.png"] and len(told) == 1
    for path in ("/nowhere.json", str(media / "images" / "train")):
        assert "error: " in run_on(media, capsys, [path])[2][0]


def test_broken_labels_cost_themselves(media, capsys):
    (media / "images" / "cut.png").write_bytes((media / "images" / "a.png").read_bytes()[:20])
    (media / "again").mkdir()
    draw().save(media / "again" / "f0.png")
    images = [{"id": 7, "file_name": "a.png", "width": 96, "height": 64},
              {"id": 8, "file_name": "missing.png", "width": 96, "height": 64},
              {"id": 9, "file_name": "b b.png", "width": 64, "height": 96},
              {"id": 10, "file_name": "cut.png", "width": 96, "height": 64},
              {"id": 11, "file_name": "../../etc/passwd", "width": 96, "height": 64},
              {"id": 12, "file_name": "other/f0.png", "width": 96, "height": 64},
              {"id": 13, "file_name": "C:\\data\\again\\f0.png", "width": 96, "height": 64}]
    cases = [(7, SQUARE, ""), (7, (-8, -8, 20, 20), ""), (13, SQUARE, ""), (7, (200, 20, 16, 16), "box outside"),
             (7, (12, 20, -16, 16), "negative size"), (7, (12, 20, 0, 0), "negative size"),
             (8, SQUARE, "media not found"),
             (9, SQUARE, "another shape"), (10, SQUARE, "cannot be read"), (11, SQUARE, "media not found"),
             (12, SQUARE, "media not found"), (77, SQUARE, "broken label"), (7, "text", "broken label"),
             (7, (1, 2), "broken label"), (7, (float("nan"), 1, 2, 3), "broken label"), (7, None, "broken label"),
             (7, (10 ** 400, 1, 2, 3), "broken label"), ([7], SQUARE, "broken label")]
    annotations = [dict(image_id=i, category_id=1, bbox=box, iscrowd=0) for i, box, _ in cases]
    data = coco(annotations, images=images)
    data["annotations"] += [7, None, {"id": 5}, dict(image_id=7, category_id=[1], bbox=list(SQUARE)),
                            dict(image_id=7, category_id=5, segmentation={"size": [64, 96], "counts": [5]}),
                            dict(image_id=7, category_id=5,
                                 segmentation={"size": [1, 5], "counts": [2 ** 63 - 1, 2 ** 63 - 1, 7]}),
                            dict(image_id=7, category_id=5, segmentation={"size": [64, 96], "counts": "\u00e9"}),
                            dict(image_id=7, category_id=5, segmentation=[[900, 900, 910, 900, 900, 910]])]
    records, printed, told = converted(media, capsys, {"broken.json": data}, "--counting")
    assert f"{len(cases) + 8} labels read + 0 interpolated = 3 written + {len(cases) + 5} left out" in printed
    assert set(records) == {"images/a.png", "again/f0.png"}
    assert ("count", "red squares") in records["again/f0.png"]
    assert ("count", "red squares") not in records["images/a.png"]  # it would be wrong
    assert all("broken.json: annotation" in line for line in told) and len(told) < 20
    for _, _, says in cases:
        assert says in printed
    # the box over the corner: of the part inside
    assert min(places(records["images/a.png"]["red square"])) == (round(2 / 96, 4), round(2 / 64, 4))


def test_two_labels_of_one_id_at_one_time(media, capsys):
    for contents, name in (("1,1,12,20,16,16\n1,1,13,20,16,16\n6,1,12,20,16,16\n", "clip.txt"),
                           ("file,t,x,y,id,label\nclip.mp4,0,.1,.1,3,a\nclip.mp4,0,.2,.2,3,a\n"
                            "clip.mp4,0,.2,.2,3,b\n", "d.csv"),
                           (cvat(f'<track id="0" label="a">{cvat_box(*SQUARE, frame=1) * 2}</track>'), "d.xml")):
        _, printed, told = converted(media, capsys, {name: contents})
        assert "1 left out: two labels of one id at one time" in printed and len(told) == 1


def test_times_outside_a_video(media, capsys):
    _, printed, _ = converted(media, capsys, {"clip.txt": "0,1,1,1,9,9\n21,1,1,1,9,9\n999999,2,1,1,9,9\n1,1,1,1,9,9\n"})
    assert "2 left out: after the end of the video" in printed and "1 left out: broken label" in printed
    # keyframes a billion frames apart are no work
    far = cvat_box(*SQUARE, frame=0, outside=0) + cvat_box(*SQUARE, frame=10 ** 9, outside=0)
    records, _, _ = converted(media, capsys, {"far.xml": cvat(f'<track id="0" label="a">{far}</track>')})
    assert len(records["clip.mp4"]["a"]["points"]) == 5


def test_long_videos_become_clips(media, capsys, monkeypatch):
    """Each half second is in one clip; ids count from 0 in each, and every clip can be planned."""
    rows = [f"{k + 1},{i},{12 + 2 * k},20,16,16\n" for k in range(FRAMES) for i in ((1, 2) if k < 8 else (2,))]
    converted(media, capsys, {"clip.txt": "".join(rows)}, "--clip", "1", "--counting")
    found = list(map(json.loads, (media / "out.jsonl").read_text().splitlines()))
    assert [(r["start"], r["end"]) for r in found] == [(0, 0.5), (1, 1.5), (2, 2)]
    points = [[(p["t"], p["id"]) for p in r["annotations"][0]["points"]] for r in found]
    assert points == [[(0, 0), (0, 1), (0.5, 0), (0.5, 1)], [(1, 0), (1.5, 0)], [(2, 0)]]
    assert [len(r["annotations"][1]["points"]) for r in found] == [2, 1, 1]
    planned_by_show(media, capsys, monkeypatch)
    assert "--clip 0.7" in run_on(media, capsys, [str(media / "clip.txt")], "--clip", "0.7")[2][0]


def test_two_names_are_not_taken_for_one_file(media, capsys):
    """Where only one of two files is there, the labels of the other must not go to it."""
    text = "file,t,x,y,id,label\ntrain/f0.png,,.5,.5,,x\nf0.png,,.7,.7,,x\nval/f0.png,,.2,.2,,x\n"
    (media / "one").mkdir()
    draw().save(media / "one" / "unique.png")
    records, _, told = converted(media, capsys, {"two.csv": text.replace("f0", "unique")})
    assert places(records["one/unique.png"]["x"]) == [(0.5, 0.5), (0.7, 0.7)] and len(told) == 1
    assert "'val/unique.png' would be one/unique.png, but so is 'train/unique.png'" in told[0]


def test_names_with_accents_and_masks_of_tiny_images(media, capsys):
    """A Mac writes an accent as a letter of its own. A mask far larger than its image would be enlarged for ever."""
    records, _, _ = converted(media, capsys, {"mac.csv": "file,x,y,label\nimages/train/cafe\u0301.png,.5,.5,x\n"})
    assert list(records) == ["images/train/café.png"]
    file = io.BytesIO()
    Image.new("1", (4000, 4000), 1).save(file, "PNG")
    mask = base64.b64encode(file.getvalue()).decode()
    huge = labelme([dict(label="x", shape_type="mask", points=[[0, 0], [3, 2]], mask=mask)])
    _, _, told = converted(media, capsys, {"huge.json": huge | dict(imageWidth=3, imageHeight=2)})
    assert "a mask of 128000x128000" in told[0]


def test_label_files_are_not_overwritten(media, capsys):
    (media / "out.csv").write_text("file,x,y,label\na.png,.5,.5,x\n")
    with pytest.raises(SystemExit):
        labels.main([str(media / "out.csv"), "--media", str(media), "--out", str(media / "out.csv")])
    assert "overwritten" in capsys.readouterr().err and "a.png" in (media / "out.csv").read_text()


def test_media_stay_in_their_folder(media, capsys, tmp_path):
    draw().save(tmp_path / "secret.png")
    (media / "secret.png").symlink_to(tmp_path / "secret.png")
    text = "file,t,x,y,id,label\nsecret.png,,.5,.5,,x\na.png,,.5,.5,,x\n"
    records, printed, _ = converted(media, capsys, {"s.csv": text})
    (media / "secret.png").unlink()
    assert list(records) == ["images/a.png"] and "1 left out: media cannot be read" in printed
    with pytest.raises(SystemExit):
        labels.main([str(media / "s.csv"), "--media", str(media), "--out", str(tmp_path / "x.jsonl")])
    assert "--out" in capsys.readouterr().err


def test_numbers_of_ids_and_frames():
    def point(x, t, i):
        return labels.Point(x, 0.5, None, t, i)
    ids = lambda points: [(p.t, p.id) for p in labels.numbered(points)]  # noqa: E731
    assert ids([point(0.1, 0, 17), point(0.2, 0, 9), point(0.3, 1, 17)]) == [(0, 0), (0, 1), (1, 1)]
    assert ids([point(0.1, 0, 2), point(0.2, 0, 0)]) == [(0, 0), (0, 2)]
    assert ids([point(0.1, 0, "b"), point(0.2, 0, "a"), point(0.1, 1, "b")]) == [(0, 0), (0, 1), (1, 0)]


# ---- every format, every flaw ------------------------------------------------------------------------------
#
# For each format a function (media, [(label, box, id)]) -> {file: contents}, the first of which is given to the
# command. Of a video the labels are those of its first frame.

def coco_tables(media, rows):
    names = list(dict.fromkeys(name for name, _, _ in rows))
    annotations = [dict(id=n, image_id=7, category_id=names.index(name), bbox=list(box), iscrowd=0)
                   for n, (name, box, _) in enumerate(rows)]
    return {"images": [{"id": 7, "file_name": media, "width": 96, "height": 64}], "annotations": annotations,
            "categories": [{"id": n, "name": name} for n, name in enumerate(names)]}


def coco_files(media, rows):
    return {"coco.json": json.dumps(coco_tables(media, rows))}


def cocovid_files(media, rows):
    tables = coco_tables("0.jpg", rows)
    tables["videos"] = [{"id": 1, "name": media}]
    tables["images"][0] |= dict(video_id=1, frame_id=0)
    for annotation, (_, _, i) in zip(tables["annotations"], rows):
        annotation["instance_id"] = i
    return {"cocovid.json": json.dumps(tables)}


def vis_files(media, rows):
    tables = coco_tables("", rows)
    del tables["images"]
    separator = "\\" if "\\" in media else "/"
    frames = [f"{os.path.splitext(media)[0]}{separator}{k:05d}.jpg" for k in range(FRAMES)]
    tables["videos"] = [{"id": 7, "width": 96, "height": 64, "file_names": frames}]
    for annotation, (_, box, i) in zip(tables["annotations"], rows):
        annotation |= dict(id=i, video_id=7, bboxes=[box] + [None] * (FRAMES - 1))
    return {"vis.json": json.dumps(tables)}


def yolo_files(media, rows):
    names = list(dict.fromkeys(name for name, _, _ in rows))
    lines = [yolo_row(names.index(name), *box) for name, box, _ in rows]
    stem = os.path.splitext(media.replace("\\", "/").removeprefix("C:/images/"))[0]  # it is a path of this machine
    return {"yolo/data.yaml": f"names: {json.dumps(names, ensure_ascii=False)}",
            f"yolo/labels/{stem}.txt": "\n".join(lines)}


def labelme_files(media, rows):
    shapes = []
    for name, (left, top, width, height), _ in rows:
        shapes.append(dict(label=name, shape_type="rectangle", points=[[left, top], [left + width, top + height]]))
    return {"labelme.json": json.dumps(labelme(shapes, media))}


def cvat_files(media, rows):
    boxes = "".join(cvat_box(*box, label=name) for name, box, _ in rows)
    return {"cvat.xml": cvat(f'<image id="0" name="{media}" width="96" height="64">{boxes}</image>').strip()}


def cvat_video_files(media, rows):
    tracks = "".join(f'<track id="{i}" label="{name}">{cvat_box(*box, frame=0, keyframe=1, outside=0)}</track>'
                     for name, box, i in rows)
    return {"cvat_video.xml": cvat(tracks).replace("clip.mp4", media).strip()}


def studio_files(media, rows):
    result = []
    for n, (name, box, _) in enumerate(rows):
        result.append(dict(id=f"r{n}", type="rectanglelabels", original_width=96, original_height=64,
                           value=dict(studio_value(*box), rectanglelabels=[name])))
    return {"studio.json": json.dumps([{"id": 1, "data": {"image": media}, "annotations": [{"result": result}]}])}


def studio_video_files(media, rows):
    result = []
    for name, box, i in rows:  # the object goes after the first frame: nothing is interpolated
        value = dict(framesCount=FRAMES, duration=2.0, labels=[name],
                     sequence=[dict(studio_value(*box), frame=1, enabled=False)])
        result.append(dict(id=f"r{i}", type="videorectangle", value=value))
    return {"studio_video.json": json.dumps([{"id": 1, "data": {"video": media}, "annotations": [{"result": result}]}])}


def mot_files(media, rows):
    names = list(dict.fromkeys(name for name, _, _ in rows))
    lines = [",".join(map(str, [1, i, *box, 1, names.index(name) + 1, 1])) for name, box, i in rows]
    stem = os.path.splitext(media.replace("\\", "/").removeprefix("C:/videos/"))[0]  # it is a path of this machine
    return {f"{stem}/gt/gt.txt": "\n".join(lines), f"{stem}/gt/labels.txt": "\n".join(names)}


def table_files(media, rows):
    lines = ["file,t,x,y,id,label"]
    for name, (left, top, width, height), i in rows:
        t = "0" if media.endswith("mp4") else ""
        lines.append(f"{media},{t},{(left + width / 2) / 96},{(top + height / 2) / 64},{i},{name}")
    return {"table.csv": "\n".join(lines)}


IMAGE_FORMATS = (coco_files, yolo_files, labelme_files, cvat_files, studio_files, table_files)
VIDEO_FORMATS = (cocovid_files, vis_files, cvat_video_files, studio_video_files, mot_files, table_files)
EVERY_FORMAT = [(make, "a.png") for make in IMAGE_FORMATS] + [(make, "clip.mp4") for make in VIDEO_FORMATS]
every_format = pytest.mark.parametrize("make, name", EVERY_FORMAT)
HAS_IDS = (*VIDEO_FORMATS, table_files)


def convert_files(media, capsys, *made, flags=()):
    """`run_on` of what functions of formats made; the first file of each is given to the command."""
    paths = []
    for files in made:
        for file, contents in files.items():
            path = media / "broken" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(contents, encoding="utf-8")
        paths.append(str(media / "broken" / next(iter(files))))
    try:
        return run_on(media, capsys, paths, *flags)
    finally:
        shutil.rmtree(media / "broken")


@every_format
def test_each_flaw_of_a_label_costs_that_label(media, capsys, make, name):
    """Outside, of negative size, of no size, a second one of an id, without its media; the good one is written."""
    outside = 200, 20, 16, 16
    negative = 12, 20, -16, 16
    rows = [("red square", SQUARE, 1), ("red square", outside, 2)]
    reasons = {"point outside the media" if make is table_files else "box outside the media": 1,
               "media not found": 1}
    if make is not table_files:  # a point has no size
        rows += [("red square", (12, 20, 0, 16), 3)]
        rows += [("red square", negative, 4)] * (make is not labelme_files)  # there it was drawn from the right
        reasons["box of no or negative size"] = len(rows) - 2
    if name == "clip.mp4" or make is table_files:
        rows += [("red square", DISK_BOX, 1)]
        reasons["two labels of one id at one time"] = 1
    made = [make(name, rows), make("missing" + name[-4:], [("red square", SQUARE, 1)])]
    made[1] = {file.replace(".", "2.", 1) if make not in (yolo_files, mot_files) else file: contents
               for file, contents in made[1].items()}
    if make is yolo_files:  # one folder has them all
        made = [made[1] | made[0]]
    records, printed, told = convert_files(media, capsys, *made)
    (path, by_label), = records.items()
    assert os.path.basename(path) == name and near(places(by_label["red square"])[0], SQUARE_AT)
    assert f"{len(rows) + 1} labels read + 0 interpolated = 1 written + {len(rows)} left out" in printed
    counted = {reason: int(n) for n, reason in re.findall(r"  (\d+) left out: (.+)", printed)}
    assert counted == reasons
    assert len(told) == len(rows) and all(line.startswith(str(media / "broken")) for line in told)


@every_format
def test_names_of_any_script_and_of_windows(media, capsys, make, name):
    """The label is not ASCII, the media are named by a path of another machine, with its accent in either form."""
    (media / "videos").mkdir(exist_ok=True)
    target = media / ("images/Übersicht é.png" if name == "a.png" else "videos/клип é.mp4")
    (media / ("images/a.png" if name == "a.png" else "clip.mp4")).rename(target)
    try:
        file = os.path.basename(target)
        for spelled in (file, unicodedata.normalize("NFD", file)):
            windows = f"C:\\{os.path.basename(target.parent)}\\{spelled}"
            records, printed, told = convert_files(media, capsys, make(windows, [("Füße 犬", SQUARE, 1)]))
            (path, by_label), = records.items()
            assert path == str(target.relative_to(media)) and near(places(by_label["Füße 犬"])[0], SQUARE_AT)
            assert not told and "= 1 written + 0 left out" in printed
    finally:
        target.rename(media / ("images/a.png" if name == "a.png" else "clip.mp4"))


@every_format
def test_files_cut_anywhere(media, capsys, make, name):
    """JSON and XML: one line for the file. Text: a line for the label that was cut, and the others are read."""
    rows = [("red square", SQUARE, 1), ("blue disk", DISK_BOX, 2)]
    files = make(name, rows)
    for file, contents in files.items():
        for cut in sorted({0, 1, len(contents) // 3, len(contents) // 2, len(contents) - 9, len(contents) - 1}):
            records, printed, told = convert_files(media, capsys, files | {file: contents[:cut]})
            if file.endswith((".json", ".xml")):
                assert not records and len(told) == 1 and "truncated or broken" in told[0] and file in told[0]
            for line in told:
                assert any(reason in line for reason in ("broken", "no classes", "no column", "have none")), line


def test_a_broken_part_costs_itself(media, capsys):
    """A track, a list of frames, a file of a folder: what stands after it is read."""
    track = f'<track id="1" label="a">{cvat_box(*SQUARE, frame=0, outside=0)}</track>'
    broken = [track.replace('id="1"', "id='x'"), track.replace(' id="1"', ""), track.replace('frame="0"', 'frame="?"')]
    records, printed, told = converted(media, capsys, {"tracks.xml": cvat("".join([*broken, track]))})
    assert "4 labels read + 0 interpolated = 1 written + 3 left out" in printed and len(told) == 3
    assert near(places(records["clip.mp4"]["a"])[0], SQUARE_AT)

    tables = json.loads(vis_files("clip.mp4", [("a", SQUARE, 1)])["vis.json"])
    good = tables["annotations"][0]
    values = 7, "x", [], [7], {"0": 1}
    tables["annotations"] = [*(dict(good, id=n, bboxes=value) for n, value in enumerate(values)), good]
    records, printed, _ = converted(media, capsys, {"vis.json": tables})
    assert "6 labels read + 0 interpolated = 1 written + 5 left out" in printed

    folder = media / "yolo"
    for file, contents in (yolo_files("a.png", [("a", SQUARE, 1)]) | yolo_files("f0.png", [("a", SQUARE, 1)])).items():
        (media / file).parent.mkdir(parents=True, exist_ok=True)
        (media / file).write_text(contents)
    (folder / "labels" / "a.txt").write_bytes(b"\xff\xfe0 \x000")
    records, printed, told = run_on(media, capsys, [str(folder)])
    shutil.rmtree(folder)
    assert list(records) == ["images/f0.png"] and "2 labels read" in printed and "not UTF-8" in told[0]

    rows = "file,x,y,label\na.png,.5,.5,a\na.png,.2,.2,\"5 inches\na.png,.3,.3,b\n"
    records, _, told = converted(media, capsys, {"quote.csv": rows})
    assert list(records["images/a.png"]) == ["a"] and len(told) == 1 and "nothing after this line" in told[0]
    records, _, _ = converted(media, capsys, {"quote.csv": rows.replace('"5 inches', '5" wide')})
    assert list(records["images/a.png"]) == ["a", '5" wide', "b"]


def test_older_forms_and_notes_beside_the_media(media, capsys):
    old = labelme([dict(label="red square", shape_type="rectangle", points=[[12, 20], [28, 36]])])
    del old["imageWidth"], old["imageHeight"]
    assert near(places(converted(media, capsys, {"old.json": old})[0]["images/a.png"]["red square"])[0], SQUARE_AT)
    task = json.loads(studio_files("a.png", [("red square", SQUARE, 1)])["studio.json"])
    task[0]["data"] = {"note": "Camera 2. At night.", "url": "https://host/data/a.png?X=1.2"}
    assert near(places(converted(media, capsys, {"s.json": task})[0]["images/a.png"]["red square"])[0], SQUARE_AT)


# ---- the point in a mask -----------------------------------------------------------------------------------

def test_the_point_farthest_from_the_edge():
    """Against trying every pixel; of large masks up to a block."""
    rng = np.random.default_rng(0)
    for n in range(60):
        h, w = rng.integers(1, 24, 2)
        mask = rng.random((h, w)) < rng.choice([0.3, 0.9, 0.99])
        mask[rng.integers(h), rng.integers(w)] = True
        padded = np.pad(mask, 1)
        outside = np.argwhere(~padded)
        distance = {tuple(p - 1): ((outside - p) ** 2).sum(1).min() for p in np.argwhere(padded)}
        assert distance[tuple(labels.deepest(mask))] == max(distance.values())
    y, x = np.mgrid[:700, :500]
    ring = (np.hypot(x - 250, y - 300) < 240) & (np.hypot(x - 250, y - 300) > 100)
    row, column = labels.deepest(ring)
    assert ring[row, column] and abs(math.hypot(column - 250, row - 300) - 170) < 8
    thin = np.zeros((900, 900), bool)
    thin[np.arange(900), np.arange(900)] = True
    row, column = labels.deepest(thin)
    assert row == column and 300 < row < 600  # the middle of those that are as deep


# ---- speed, and what comes after ---------------------------------------------------------------------------

def seconds_for(make, name, folder, n):
    """Seconds of the processor for a file of a format with n boxes, each an object of its own, about a medium."""
    rng = np.random.default_rng(0)
    rows = [("red square", (x, y, 5.0, 5.0), i) for i, (x, y) in enumerate(rng.uniform(0, 50, (n, 2)).tolist())]
    files = make(name, rows)
    for file, contents in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(contents)
    began = time.process_time()
    labels.main([str(folder / next(iter(files))), "--media", str(folder), "--out", str(folder / "many.jsonl")])
    seconds = time.process_time() - began
    for file in files:
        (folder / file).unlink()
    return seconds


@every_format
def test_thousands_of_boxes(media, capsys, make, name):
    """Ten thousand take less than 5 seconds where nothing else runs: `python -m tests.test_labels` measures it."""
    assert seconds_for(make, name, media, 2000) < 3
    assert "2000 labels read + 0 interpolated = 2000 written" in capsys.readouterr().out


def planned_by_show(media, capsys, monkeypatch):
    """`tools.show` plans every record and leaves none out."""
    monkeypatch.setattr("sys.argv", ["show", str(media / "out.jsonl")])
    show.main()
    assert "records not used: none, annotations or points left out or moved: none" in capsys.readouterr().out


def test_other_commands_take_it(media, capsys, monkeypatch):
    for run in (test_cvat_video, test_coco_images):
        run(media, capsys)
        planned_by_show(media, capsys, monkeypatch)


if __name__ == "__main__":  # seconds of 10,000 boxes in each format
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        write_media(folder)
        for make, name in EVERY_FORMAT:
            print(f"{make.__name__.removesuffix('_files')}, {name}: {seconds_for(make, name, folder, 10_000):.2f} s")
