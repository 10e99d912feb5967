"""
The round trip, measured: an object that a checkpoint has never seen is labelled in another tool, learned, found in new
files by the model itself, corrected, and learned again.

    python tests/round_trip.py --init_from out/small/sft/latest --seed 0 1 2

    200 clips of squares, which the toy world does not have, with tracks as CVAT writes them
      │ tools.labels              labelled/my.jsonl
      │ sft.py                    first/: what it learns from them
      │ sample.py                 results/results.jsonl: its answers about 100 new clips
      │ tools.annotate review     wrong points are moved, through the page's own requests
      │ sft.py                    second/: again from --init_from, in as many steps, from all 300 clips
      ▼ eval.py                   both on 200 clips that neither saw

Every step is the command that a user types, and is printed. All files of a seed stay in OUT/seed_N; a seed that is
done is not run again.
"""
import argparse
import glob
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from collections import Counter

import numpy as np
import requests

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from lib import toy  # noqa: E402
from lib.media import video_size  # noqa: E402
from tools.annotate.review import Reviewer  # noqa: E402

NEW = "square"
QUESTION = f"Track the {NEW}."
RATE = 4  # frames a second, two from look to look


# ---- clips with an object that lib/toy.py does not draw ----------------------------------------------------

outline_of_known_shapes = toy.outline


def outline(shape, radius, angle):
    """`toy.outline`, and the corners of the new shape."""
    if shape != NEW:
        return outline_of_known_shapes(shape, radius, angle)
    corners = np.array([(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return corners @ rotation * radius


def draw_clip(rng):
    """A clip of the toy world with two or three objects, one of which is a square that is seen."""
    while True:
        clip = toy.draw_clip(rng)
        square = clip["objects"][0]
        if len(clip["objects"]) > 1 and any(toy.there(square, k) for k in range(clip["looks"])):
            square["shape"] = NEW
            return clip


def film(folder, n, seed):
    """Write n clips into a folder; returns {file name: clip}."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    clips = {}
    for i in range(n):
        name = f"{os.path.basename(folder)}_{i:03d}.mp4"
        clips[name] = draw_clip(random.Random(f"round trip {seed} {name}"))
        toy.write_clip(os.path.join(folder, name), clips[name], RATE)
    return clips


# ---- labels, as a tool of the trade has them ---------------------------------------------------------------

def cvat_video(name, size, clip):
    """The square of a clip as "CVAT for video 1.1": a box at each look and at the last frame, outside where it is not
    in view."""
    root = ET.Element("annotations")
    ET.SubElement(root, "version").text = "1.1"
    task = ET.SubElement(ET.SubElement(root, "meta"), "task")
    ET.SubElement(task, "source").text = name
    original = ET.SubElement(task, "original_size")
    for side, pixels in zip(("width", "height"), size):
        ET.SubElement(original, side).text = str(pixels)
    track = ET.SubElement(root, "track", id="0", label=NEW)
    square = clip["objects"][0]
    for k in range(clip["looks"]):
        corners = np.array(toy.polygon(square, clip["size"], k)) * size
        left, top = corners.min(0)
        right, bottom = corners.max(0)
        frame = k * RATE // 2 if k < clip["looks"] - 1 else (clip["looks"] - 1) * RATE // 2 - 1
        ET.SubElement(track, "box", frame=str(frame), keyframe="1", outside=str(int(not toy.there(square, k))),
                      xtl=f"{left:.2f}", ytl=f"{top:.2f}", xbr=f"{right:.2f}", ybr=f"{bottom:.2f}")
    return ET.ElementTree(root)


def write_labels(folder, media, clips):
    os.makedirs(folder, exist_ok=True)
    for name, clip in clips.items():
        cvat_video(name, video_size(os.path.join(media, name)), clip).write(
            os.path.join(folder, name + ".xml"), "utf-8", xml_declaration=True)


def write_held_out(path, clips):
    """The truth about clips, with outlines: what eval.py compares with."""
    records = []
    for name, clip in clips.items():
        track = toy.track(random.Random(0), clip, clip["objects"][:1], NEW)
        records.append(dict(video=name, annotations=[dict(track, prompt=QUESTION)]))
    toy.write_lines(path, records)


# ---- the review, by rule -----------------------------------------------------------------------------------

def corrected(points, clip, counts):
    """The points of an answer as somebody corrects them who looks at each half second: those on the square stay, those
    beside it are moved, missing ones are set, others deleted."""
    square = clip["objects"][0]
    given = {}  # look -> the first point there
    for p in points:
        if p["t"] % 0.5 == 0:
            given.setdefault(int(2 * p["t"]), p)
    right = []
    visible = [k for k in range(clip["looks"]) if toy.there(square, k)]
    for k in visible:
        p = given.get(k)
        if p and toy.inside(toy.polygon(square, clip["size"], k), p["x"], p["y"]):
            right.append(dict(p, id=0))
            counts["kept"] += 1
        else:
            right.append(toy.point(square, k))
            counts["moved" if p else "set"] += 1
    counts["deleted"] += len(points) - len(given.keys() & visible)
    return right


def review(file, clips):
    """Correct the answers of a results.jsonl through the requests of the page of `tools.annotate review FILE`, and
    write it again. Returns how many points were kept, moved, set and deleted, and how many clips were right."""
    server = Reviewer(file, "the rule", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    browser = requests.Session()
    browser.trust_env = False  # no proxy to this machine itself
    counts = Counter()
    for i in range(len(browser.get(f"{url}/rows").json()["rows"])):
        record = browser.get(f"{url}/row", params=dict(i=i)).json()
        annotation, = record["annotations"]
        points = annotation.get("points", [])
        edited = dict(task="video_tracking", prompt=QUESTION, label=NEW,
                      points=corrected(points, clips[os.path.basename(record["video"])], counts))
        decision = dict(i=i, key=annotation["key"], verdict="accept")
        if edited["points"] != points:
            decision |= dict(verdict="edit", annotation=edited)
        counts["clips right"] += decision["verdict"] == "accept"
        reply = browser.post(f"{url}/decide", json=decision)
        assert reply.status_code == 200, reply.text
    server.shutdown()
    server.server_close()
    server.work.finish()
    return counts


# ---- one seed ----------------------------------------------------------------------------------------------

def run(folder, *words):
    """Run a command of this repository in `folder`, and print it; what it prints goes to FOLDER/log.txt."""
    files = [word for word in words if word.endswith((".mp4", ".xml"))]
    shown = [os.path.join(os.path.dirname(word), "*") if word in files[:1] else word.removeprefix(ROOT + os.sep)
             for word in words if word not in files[1:]]
    print("$ python", *shown, flush=True)
    with open(os.path.join(folder, "log.txt"), "a") as log:
        done = subprocess.run([sys.executable, *words], cwd=folder, stdout=log,
                              env=os.environ | dict(PYTHONPATH=ROOT))
    if done.returncode:  # it has said why
        sys.exit(done.returncode)


def round_trip(args, seed, folder):
    """All of it for one seed. Returns the row of the table."""
    os.makedirs(folder, exist_ok=True)
    inside = lambda *names: os.path.join(folder, *names)
    command = lambda name: os.path.join(ROOT, name)
    labelled = film(inside("labelled"), args.labelled, seed)
    new = film(inside("new"), args.new, seed)
    write_held_out(inside("held_out", "held_out.jsonl"), film(inside("held_out"), args.held_out, seed))
    for path in ("labels", "first", "second", "results"):  # of an earlier run with other flags
        shutil.rmtree(inside(path), ignore_errors=True)
    write_labels(inside("labels"), inside("labelled"), labelled)

    train = [command("sft.py"), "--init_from", args.init_from, "--steps", str(args.steps), "--seed", str(seed),
             "--no-eval_first", "--no-report", "--data", "labelled/my.jsonl"]
    xml_files = sorted(glob.glob("labels/*.xml", root_dir=folder))
    run(folder, "-m", "tools.labels", *xml_files, "--media", "labelled", "--out", "labelled/my.jsonl")
    run(folder, *train, "--out", "first")
    videos = sorted(glob.glob("new/*.mp4", root_dir=folder))
    run(folder, command("sample.py"), "first/small/sft/latest", *videos, QUESTION, "--out", "results")
    counts = review(inside("results", "results.jsonl"), new)
    print(f"reviewed: {dict(counts)}", flush=True)
    run(folder, *train, "results/results.jsonl", "--out", "second")
    checkpoints = [args.init_from, "first/small/sft/latest", "second/small/sft/latest"]
    run(folder, command("eval.py"), *checkpoints, "--data", "held_out/held_out.jsonl", "--out", "eval.json")
    with open(inside("eval.json")) as f:
        scores = json.load(f)["scores"]
    before, first, second = [scores[checkpoint]["video_tracking accuracy"] for checkpoint in checkpoints]
    n_true = counts["kept"] + counts["moved"] + counts["set"]
    return dict(before=before, first=first, kept=counts["kept"] / n_true, second=second, gain=second - first)


# ---- the command -------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--init_from", required=True, help="checkpoint of --config small after stage 2")
    add("--seed", type=int, nargs="+", default=[0], help="of clips and training [0]")
    add("--steps", type=int, default=300, help="of each of the two trainings [300]")
    add("--labelled", type=int, default=200, help="clips labelled in the other tool [200]")
    add("--new", type=int, default=100, help="clips that the model labels [100]")
    add("--held_out", type=int, default=200, help="clips to measure on [200]")
    add("--out", default="out/round_trip", help="folder [out/round_trip]")
    args = parser.parse_args()
    args.init_from = os.path.abspath(args.init_from)
    toy.outline = outline  # what toy.write_clip and toy.mask draw and measure with
    settings = {name: value for name, value in vars(args).items() if name not in ("seed", "out")}
    rows = []
    for seed in args.seed:
        folder = os.path.join(args.out, f"seed_{seed}")
        done = os.path.join(folder, "row.json")
        row = None
        if os.path.exists(done):
            with open(done) as f:
                row = json.load(f)
        if not row or row["settings"] != settings:
            row = round_trip(args, seed, folder) | dict(settings=settings)
            with open(done, "w") as f:
                json.dump(row, f)
        rows.append(row)
    n_all = args.labelled + args.new
    print("\nshare of the true points that are met: inside the square, at the right half second\n\n"
          f"| seed | before | first round, {args.labelled} clips | of its points on the {args.new} new clips right | "
          f"second round, {n_all} clips | gain |\n|---|---|---|---|---|---|")
    columns = ("before", "first", "kept", "second", "gain")
    for name, of_row in [*zip(args.seed, rows), ("mean", None)]:
        values = [of_row[c] if of_row else sum(row[c] for row in rows) / len(rows) for c in columns]
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")


if __name__ == "__main__":
    main()
