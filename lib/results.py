"""
Results: the answers to one question about many files, as records of this project.

    results/results.jsonl    a record for each answer: trained on, shown, reviewed and evaluated like any other
    results/media/           the files asked about, as links, or copies on another disk: records name them from here
    results/drawn/           their points and tracks, on copies (lib/draw.py)
    results/results.csv, mot/, coco.json       for other tools (lib/export.py)

    question, answer ─► to_annotation: its task, label and points ─► Results.add ─► a line of results.jsonl
"""
import filecmp
import itertools
import json
import os
import re
import shutil

from lib.draw import WRITABLE, draw
from lib.errors import BadMedia, BadRecord, UserError
from lib.records import media_kind, parse_record
from lib.tasks import TASKS, answer_of
from lib.text import NOTHING, parse_points


# ---- an answer becomes a record ----------------------------------------------------------------------------

WHERE = (r"(?:in|through) (?:(?:the|this|these|all|both|each|of) )*(?:image|picture|video|clip)s?(?:[ _]\d+)?"
         r"(?:,?(?: and)? image[ _]\d+)*")  # "in the video", "in both images", "in image 0 and image 2"
LABEL = re.compile(r"(?:.*\b(?:point (?:to|at)|track|follow|find|count|mark|show me|click on|locate|how many"
                   r"|where (?:is|are|does|do)))\s+(?:(?:all|every|each|of|the|a|an|my)\s+)*(.+?)"
                   rf"(?:\s+(?:are there|go|move|appear|{WHERE}))*\W*", re.I | re.S)


def label_of(question):
    """What a question asks for: "Track the red ball." -> "red ball". Of other questions all of it."""
    match = LABEL.fullmatch(question)
    return match[1] if match else question.strip(" .?!")


def points_of(text, kind, n_media=1):
    """The points of an answer, as a record may have them: of a video those with a time, of several images those that
    name one of the `n_media`. Of two with one id at one time or in one image the second gets the next free id."""
    points = []
    taken = set()  # (time or image, id)
    for p in parse_points(text, kind):
        place = p.get("image" if kind == "images" else "t")
        is_nowhere = kind != "image" and place is None
        if is_nowhere or kind == "images" and place >= n_media:
            continue
        while (place, p["id"]) in taken:
            p["id"] += 1
        taken.add((place, p["id"]))
        points.append(p)
    return points


# Styles of an answer that has points and their number, before or after them. One image has no style of its own for the
# number before.
COUNTING_STYLES = dict(image=("point_count", "video_count_point"), video=("video_point_count", "video_count_point"),
                       images=("multi_image_point_then_count", "multi_image_count_then_point"))


def to_annotation(kind, question, text, grammar="spec", n_media=1):
    """The annotation that a question about `n_media` media and its answer make. kind: "image", "images" or "video";
    grammar: the model's."""
    family = "multi_image" if kind == "images" else kind
    annotation = dict(task=f"{family}_qa", prompt=question)
    points = points_of(text, kind, n_media)
    if not points and text.strip() != NOTHING:
        if f"{family}_caption" in TASKS and re.search(r"\b(describe|caption)", question, re.I):
            annotation["task"] = f"{family}_caption"
        elif text.strip().isdigit() and re.search(r"\b(how many|count|number of)\b", question, re.I):
            annotation |= dict(task="counting", label=label_of(question))
        return dict(annotation, answer=text)
    is_track = len({p["id"] for p in points}) < len(points) or re.search(r"\b(track|follow)", question, re.I)
    annotation["task"] = "video_tracking" if kind == "video" and is_track else f"{family}_pointing"
    annotation |= dict(label=label_of(question), points=points)
    for style in COUNTING_STYLES[kind]:
        styled = dict(annotation, style=style)
        if answer_of(annotation, kind, grammar) != text == answer_of(styled, kind, grammar):
            return styled
    return annotation


def name_of(checkpoint):
    """A checkpoint by its last names, "small/sft/step_0002650": the others are of this machine alone."""
    return "/".join(os.path.realpath(checkpoint).split(os.sep)[-3:])


def answer_record(kind, media, annotation, name, checkpoint):
    """The record of an answer. name: of the media; checkpoint: of `name_of`."""
    return {"id": name, kind: media, "annotations": [annotation], "provenance": [dict(step="answer", by=checkpoint)]}


class Results:
    """The folder of one checkpoint's answers. Each is a line as soon as it is there, so that a run that was killed goes
    on where it was."""

    def __init__(self, folder, checkpoint):
        self.folder = folder
        self.path = os.path.join(folder, "results.jsonl")
        self.checkpoint = name_of(checkpoint)
        os.makedirs(os.path.join(folder, "media"), exist_ok=True)
        self.records = self.read() if os.path.exists(self.path) else []
        self.done = set()  # (media, question)
        for record in self.records:
            self.done |= {(record.get(media_kind(record)), a.get("prompt")) for a in record["annotations"]}

    def read(self):
        """The records of results.jsonl. A last line that was cut short is removed from it."""
        records = []
        with open(self.path, "r+b") as f:
            begin = 0  # of a line
            for n, line in enumerate(f.readlines(), 1):
                try:
                    record = parse_record(line)
                except BadRecord as e:
                    if line.endswith(b"\n"):
                        raise UserError(f"{self.path}:{n}: {e}; put it right, or take the line out") from None
                    f.truncate(begin)
                    break
                if self.checkpoint not in [source.get("by") for source in record.get("provenance", ())]:
                    raise UserError(f"--out {self.folder}: line {n} of its results.jsonl is no answer of "
                                    f"{self.checkpoint}; name another folder")
                records.append(record)
                begin += len(line)
                if not line.endswith(b"\n"):
                    f.seek(begin)
                    f.write(b"\n")
        return records

    def keep(self, path):
        """Where a file lies under the folder, "media/NAME": it is linked, or on another disk copied. Another file of
        the same name gets a number."""
        path = os.path.realpath(path)
        stem, ending = os.path.splitext(os.path.basename(path))
        try:
            stem.encode()
        except UnicodeError:
            raise BadMedia(f"{path!r}: its name is not UTF-8; records cannot hold it") from None
        for n in itertools.count(1):
            name = f"media/{stem}{f'_{n}' if n > 1 else ''}{ending}"
            kept = os.path.join(self.folder, name)
            if not os.path.exists(kept):
                break
            if filecmp.cmp(path, kept, shallow=False):
                return name
        try:
            os.link(path, kept)
        except OSError:
            shutil.copy2(path, kept + ".part")
            os.replace(kept + ".part", kept)
        return name

    def add(self, record, question, text, grammar="spec", segmenter=None):
        """Draw the points of an answer, then write its line. record: {kind: media}."""
        kind = media_kind(record)
        media = record[kind]
        annotation = to_annotation(kind, question, text, grammar)
        if annotation.get("points"):
            drawn = os.path.join(self.folder, "drawn", os.path.basename(media))
            if not drawn.lower().endswith(WRITABLE[kind]):
                drawn += WRITABLE[kind][0]
            os.makedirs(os.path.dirname(drawn), exist_ok=True)
            draw(kind, [os.path.join(self.folder, media)], annotation["points"], drawn, segmenter)
        record = answer_record(kind, media, annotation, os.path.basename(media), self.checkpoint)
        with open(self.path, "ab") as f:
            f.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.records.append(record)
