"""
Upstream rows -> the project's rows: what each published data set looks like, and how it is said in JSONL.

    a row as published ─► converter ─► items: {image | images | video, start, end, subtitles, annotations}
                                       media: a URL, or a name under the set's own folder

This is the leaf of `tools.prepare` that holds knowledge and no machinery: no file is opened here and nothing is
fetched. Sets of one shape share a converter; RECIPES at the end has one line for each set of datasets.tsv.

Points become shares of the sides. Times count from the start of the file, as everywhere in a line; `start`
and `end` say which clip of it is meant, and `data.py` makes times count from the clip's start.
"""
import hashlib
import re
from collections import Counter
from typing import NamedTuple


class Skip(Exception):
    """A row that is left out on purpose; the message is what it is counted under."""


# ---- small pieces ------------------------------------------------------------------------------------------

outside = Counter()  # coordinates seen, and those that are not shares of a side after conversion


def share(value, side):
    """A coordinate as a share of its side, in [0, 1]. Slips of the annotators' mouse are clipped, and
    counted: `tools.prepare` stops a set whose coordinates are in another unit than this file thinks."""
    value = float(value) / side
    outside["seen"] += 1
    outside["outside"] += not -0.01 <= value <= 1.01
    return round(min(max(value, 0.0), 1.0), 4)


def pick(n, *key):
    """A number below n that depends on the key alone: the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") % n


def records(value):
    """A list of structs, which the hub stores so or as a struct of lists: {x: [1, 2]} -> [{x: 1}, {x: 2}]."""
    if isinstance(value, dict):
        return [dict(zip(value, cells)) for cells in zip(*value.values())]
    return value or []


def numbered(points, width=100, height=100):
    """[{x, y}] in per cent, or in pixels of a picture of this size -> shares of the sides, numbered from left
    to right."""
    places = sorted((share(p["x"], width), share(p["y"], height)) for p in records(points))
    return [dict(x=x, y=y, id=i) for i, (x, y) in enumerate(places)]


def said(value):
    """An answer: text, a number, or a list of people's answers, of which the most frequent counts."""
    if value is None or value == []:
        raise Skip("no answer")
    if isinstance(value, list):
        value = Counter(map(str, value)).most_common(1)[0][0]
    value = str(value).strip()
    if not value:
        raise Skip("empty answer")
    return value


def qa(task, question, answer):
    """An annotation that asks and is answered; Skip if either is empty."""
    if not str(question).strip():
        raise Skip("empty question")
    return dict(task=task, prompt=str(question).strip(), answer=said(answer))


def choice(task, question, options, correct):
    """Multiple choice; options as published, `correct` their right one."""
    options = [str(o).strip() for o in options]
    correct = int(correct)
    if len(options) == 1:
        return qa(task, question, options[0])
    if not 0 <= correct < len(options):
        raise Skip("no right option")
    return dict(task=task, question=str(question).strip(), options=options, correct=correct)


def choice_among(task, question, right, wrong):
    """Multiple choice of a right answer and distractors. The slot is drawn: a right answer that is always
    first would be learned as such."""
    options, slot = [str(w) for w in wrong], pick(len(wrong) + 1, question, right)
    options.insert(slot, str(right))
    return choice(task, question, options, slot)


def dialogue(turns):
    """[(role, text)] as messages; Skip unless user and assistant take turns, the assistant last."""
    messages = [dict(role=role, content=text.strip()) for role, text in turns]
    if not messages or len(messages) % 2 or any(m["role"] != ("user", "assistant")[i % 2] or not m["content"]
                                                for i, m in enumerate(messages)):
        raise Skip("not a dialogue")
    return messages


def first(row, *names):
    """The first of these fields that the row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise KeyError(" or ".join(names))


def picture(refs, annotations, **more):
    """An item about one picture or several."""
    refs = [refs] if isinstance(refs, str) else refs
    if not refs or not all(refs):
        raise Skip("no picture")
    return dict(dict(image=refs[0]) if len(refs) == 1 else dict(images=refs), annotations=annotations, **more)


def clip(ref, annotations, start=None, end=None, **more):
    """An item about a video, or the part of it from start to end."""
    if not ref:
        raise Skip("no video")
    times = {k: round(float(t), 3) for k, t in (("start", start), ("end", end)) if t not in (None, "")}
    times = {} if times == {"start": 0} else times
    return dict(video=str(ref), **times, annotations=annotations, **more)


# ---- pictures ----------------------------------------------------------------------------------------------

def pixmo_caption(row, name):
    """A caption, and one of the spoken descriptions it was written from."""
    annotations = [dict(task="image_caption", answer=said(row["caption"]))]
    if spoken := [t for t in row.get("transcripts") or [] if t.strip()]:
        annotations.append(dict(task="image_caption", prompt="Describe the image as if you were speaking.",
                                answer=spoken[pick(len(spoken), row["caption"])].strip()))
    yield picture(row["image_url"], annotations)


def pixmo_question(row, name):
    """A question of a person, and the answer they agreed to."""
    yield picture(row["image_url"], [qa("image_qa", row["question"], row["answer"])],
                  sha256=[row.get("image_sha256")])


def pixmo_dialogue(row, name):
    """`question` is a dialogue, "[USER] ... [ASSISTANT] ... [USER] ... [ASSISTANT]", `answer` its last
    turn."""
    _, *turns = re.split(r"\[(USER|ASSISTANT)\]", row["question"] + row["answer"])
    messages = dialogue([(who.lower(), text) for who, text in zip(turns[::2], turns[1::2])])
    yield picture(row["image_url"], [dict(task="image_qa", messages=messages)])


def pixmo_points(row, name):
    """A label's points. Half of the labels are counted as well, the other half only pointed to."""
    points, most = records(row["points"]), 60
    if len(points) > most:
        raise Skip(f"more than {most} points")
    style = ("pointing", "point_count")[pick(2, row["image_sha256"], row["label"])]
    pixels = name == "pixmo-count"  # pixels of the picture, whose size is known once it is here
    task = "counting" if pixels and style == "point_count" else "image_pointing"
    marks = [dict(x=float(p["x"]), y=float(p["y"])) for p in points] if pixels else numbered(points)
    yield picture(row["image_url"], [dict(task=task, style=style, label=row["label"].strip(), points=marks)],
                  sha256=[row.get("image_sha256")], **({"pixels": True} if pixels else {}))


def cosyn_points(row, name):
    """Three lists side by side: questions, points, names."""
    yield picture(row["image"], [
        dict(task="image_pointing", prompt=q.strip(), label=str(label), points=numbered(points))
        for q, points, label in zip(row["questions"], row["answer_points"], row["names"], strict=True)])


def pairs(row, name):
    """One or more drawn pictures and a list of question, explanation, answer. All but documents are answered
    with the explanation first."""
    images = first(row, "images", "image", "image_urls")
    if len(images) > 5 and not isinstance(images, str):
        raise Skip("more than 5 pictures")
    if "image_urls" in row and len(images) < 2:
        raise Skip("fewer than 2 pictures")
    task, annotations = "image_qa" if isinstance(images, str) or len(images) == 1 else "multi_image_qa", []
    for p in records(row["qa_pairs"]):
        why = (p.get("explanation") or "").strip() if name != "cosyn-document" else ""
        answer = said(p["answer"])
        annotations.append(qa(task, p["question"],
                              f"{why} Answer: {answer}" if why and why != answer else answer))
    yield picture(images, annotations, sha256=row.get("image_sha256s"))


def conversations(row, name):
    """Pictures and a list of {user, assistant}: the shape that one collection gives to dozens of sets."""
    images = row["images"]
    task = "counting" if name == "tallyqa" else "image_qa" if len(images) == 1 else "multi_image_qa"
    yield picture(images, [qa(task, t["user"], t["assistant"]) for t in records(row["texts"])])


def asked(row, name):
    """One picture, one question: with an answer, with people's answers, or with choices."""
    question = first(row, "question", "query").strip()
    if hint := (row.get("hint") or "").strip():
        question = f"{hint}\n{question}"
    if not row.get("image"):
        raise Skip("no picture")
    annotations = []
    if "choices" in row:
        right = first(row, "correct_choice_idx", "answer")
        annotations.append(choice("image_qa", question, row["choices"], right))
    if "choices" not in row or "direct_answers" in row:
        answer = first(row, "direct_answers", "answers", "label", "answer")
        if "direct_answers" in row and isinstance(answer, str):  # a list as text: "['a', 'b']"
            answer = [a or b for a, b in re.findall(r"'(.*?)'(?=[,\]])|\"(.*?)\"(?=[,\]])", answer)]
        annotations.append(qa("image_qa", question, answer))
    yield picture(row["image"], annotations)


def mantis(row, name):
    """Several pictures and lists side by side: questions with choices, without, and answers."""
    if len(row["images"]) < 2:
        raise Skip("fewer than 2 pictures")
    lists = ("mc_question", "choices", "correct_choice_idx", "oe_question", "direct_answer")
    yield picture(row["images"], [
        choice("multi_image_qa", lettered, options, right) if options else qa("multi_image_qa", open_, answer)
        for lettered, options, right, open_, answer in zip(*(row[k] for k in lists), strict=True)])


def several_points(row, name):
    """One human label per picture, points in per cent; asked about all pictures under one of the wordings.
    `normalized_labels`, where given, says which wordings mean the same; else only equal words do."""
    labels, points = row["labels"], row["points"]
    meant = row.get("normalized_labels") or [label.strip().lower() for label in labels]
    if len(labels) < 2:
        raise Skip("fewer than 2 pictures")
    one = pick(len(labels), labels, row["image_sha256s"])
    marks = []
    for i, (m, here) in enumerate(zip(meant, points, strict=True)):
        marks += [dict(p, image=i) for p in numbered(here)] if m == meant[one] else []
    if len(marks) > 60:
        raise Skip("more than 60 points")
    style = ("multi_image_pointing", "multi_image_point_then_count")[pick(2, row["image_sha256s"], labels)]
    yield picture(row["image_urls"], [dict(task="multi_image_pointing", style=style,
                                           label=labels[one].strip(),
                                           points=[dict(p, id=i) for i, p in enumerate(marks)])],
                  sha256=row.get("image_sha256s"))


def clock_face(row, name):
    """The rows say what time it is on a face that somebody else has to draw."""
    yield picture(f"{row['example_id']}.png", [qa("image_qa", "What time is shown?", row["watch_time"])])


# ---- text --------------------------------------------------------------------------------------------------

def chat(row, name):
    """A conversation. The system's words open the first question. Left out, as published: canned identities,
    code, and text that is not English; the published columns for that are missing here, so fences and letters
    have to tell."""
    turns = [(m["role"], m["content"].strip()) for m in row["messages"]]
    if re.search("hard_?coded", str(row.get("dataset") or row.get("source"))):
        raise Skip("canned identity")
    if len(turns) > 1 and turns[0][0] == "system":
        turns = [(turns[1][0], f"{turns[0][1]}\n\n{turns[1][1]}"), *turns[2:]]
    text = "".join(said for _, said in turns)
    if "```" in text:
        raise Skip("code")
    if sum(c > "\x7f" for c in text) > 0.1 * len(text):
        raise Skip("not English")
    if len(turns) % 2:
        turns.pop()  # a question nobody answered
    yield dict(annotations=[dict(task="text", messages=dialogue(turns))])


def identity(row, name):
    """Several ways to ask who the model is, and one answer."""
    yield dict(annotations=[qa("text", q, row["response"]) for q in row["questions"]])


# ---- videos ------------------------------------------------------------------------------------------------

def video_captions(row, name):
    """Up to three captions of a video, short, whole, and with every frame's details."""
    if row.get("annotation_score") is not None and row["annotation_score"] < 3:
        raise Skip("annotation score below 3")
    kinds = (("video_caption", "video_short_caption"), ("merged_caption", "video_caption"),
             ("video_frame_merged_caption", "video_long_caption"))
    annotations = [dict(task="video_caption", style=style, answer=row[key].strip())
                   for key, style in kinds if (row.get(key) or "").strip()]
    yield clip(row["video_id"], annotations, row.get("video_start"), row.get("video_end"))


VIDEO_NAMES = ("video", "video_id", "vid_name", "vid_filename", "video_path", "video_filename", "gif_name",
               "vid", "uni_clipped_id", "visual_input", "youtube_id", "_key")


def options_of(row):
    """Choices and the place of the right one, in any of the spellings around: ([...], i), or None. Of columns
    a0, a1, ... the answer is the number; of a list it may be the text."""
    columns = [row[k] for stem in ("a", "option") for k in (f"{stem}{i}" for i in range(6)) if k in row]
    options = columns or row.get("options") or row.get("choices") or []
    for field in ("correct", "answer_idx", "answer_id", "answer_key_position", "correct_choice_idx",
                  "answer"):
        at = row.get(field)
        if at in options and isinstance(at, str) and not columns:
            return options, options.index(at)
        if options and at is not None and str(at).strip().isdigit():
            return options, int(at)
    return None


def subtitles(lines):
    """[{start, end, text}] of what came as such; lines without times are no subtitles here."""
    return [{k: s[k] for k in ("start", "end", "text")} for s in lines or () if isinstance(s, dict)]


def asked_of_video(row, name, video=None):
    """One question about a video: with choices, with distractors, or open."""
    question = first(row, "question", "Question", "q", "q_body", "query", "instruction")
    if "NegativeAnswers" in row:
        annotation = choice_among("video_qa", question, row["Answer"], row["NegativeAnswers"])
    elif found := options_of(row):
        annotation = choice("video_qa", question, *found)
    else:
        annotation = qa("video_qa", question, first(row, "answer", "output"))
    lines = subtitles(row.get("subtitle") or row.get("subtitles"))
    more = dict(subtitles=lines) if lines else {}
    start, end = row.get("start"), row.get("end")
    if re.fullmatch(r"[\d.]+-[\d.]+", row.get("ts") or ""):  # TVQA
        start, end = row["ts"].split("-")
    yield clip(video or first(row, *VIDEO_NAMES), [annotation], start, end, **more)


def tvqa(row, name):
    """Questions in one file, subtitles in another: a line of the second asks nothing."""
    if "sub" in row:
        yield clip(row["vid_name"], [], subtitles=subtitles(row["sub"]))
    else:
        yield from asked_of_video(row, name)


def listed(row, name):
    """A video with a list of questions."""
    video = first(row, *VIDEO_NAMES)
    for q in first(row, "examples", "mc_question", "mc_qa_list", "questions"):
        if q.get("choices") and isinstance(q["choices"][0], dict):
            right = [c["choice"] for c in q["choices"] if c["answer"] == "correct"]
            if len(right) != 1:
                continue  # CLEVRER: several or none are right
            q = dict(q, choices=[c["choice"] for c in q["choices"]], answer=right[0])
        yield from asked_of_video({"subtitles": row.get("subtitles"), **q}, name, video)


def star(row, name):
    """Choices come as {choice_id, choice}, the answer as its text."""
    yield from asked_of_video(dict(row, choices=[c["choice"] for c in row["choices"]]), name)


def dialogue_of_video(row, name):
    """[{from: human | gpt, value}]; the first value opens with a line that stands for the video."""
    turns = [({"human": "user", "gpt": "assistant"}[t["from"]], t["value"].replace("<image>", ""))
             for t in row["conversations"]]
    yield clip(row["video"], [dict(task="video_qa", messages=dialogue(turns))])


def moments(row, name):
    """When does it happen? Windows in seconds."""
    windows = row["relevant_windows"]
    if not 0 < len(windows) <= 5:
        raise Skip("more than 5 windows")
    question = f"When does this happen: {row['query']}? Give start and end in seconds."
    yield clip(row["vid"], [qa("video_qa", question, ", ".join(f"{a} - {b}" for a, b in windows))])


def motion_caption(row, name):
    """What moves, and how."""
    yield clip(row["video_path"], [dict(task="video_caption", answer=said(row["motion_caption"]))])


def repetitions(row, name):
    """How often a movement is repeated; the rows have its name and the number."""
    question = f"How many times is this done: {row['class']}?"
    yield clip(row["video_path"], [qa("video_qa", question, row["count"])])


def plain(row, name):
    """The layout asked for where the published one is not known: a row per question or caption, in the fields
    a line of this project has. All of these sets are videos."""
    if "question" in row:
        yield from asked_of_video(row, name)
    else:
        yield clip(first(row, *VIDEO_NAMES),
                   [dict(task="video_caption", answer=said(first(row, "answer", "caption")))],
                   row.get("start"), row.get("end"))


def video_points(row, name):
    """points[i] are those of the moment timestamps[i], in per cent; every point is an object of its own."""
    if row.get("annotator_unsure"):
        raise Skip("annotator unsure")
    at = first(row, "two_fps_timestamps", "timestamps")
    places = sorted((float(t), share(p["x"], 100), share(p["y"], 100))
                    for t, here in zip(at, row["points"] or [], strict=True) for p in records(here))
    start, end = (row.get(f"clip_{k}", row.get(f"clip_{k}_time")) for k in ("start", "end"))
    if (row.get("video_duration") or 0) > 63:
        if end is None:
            raise Skip("longer than 63 s and no clip of it given")
    elif start in (None, 0):
        start = end = None  # the whole video
    places = [p for p in places if end is None or start <= p[0] <= end]
    if len(places) > 60:
        raise Skip("more than 60 points")
    if row["count"] != len(places):
        raise Skip("count and points differ")
    label, ref = first(row, "label", "category").strip(), first(row, "video_id", "video_name")
    style = ("video_point", "video_point_count")[pick(2, ref, label)]
    points = [dict(t=t, x=x, y=y, id=i) for i, (t, x, y) in enumerate(places)]
    yield clip(ref, [dict(task="video_pointing", style=style, label=label, points=points)], start, end)


def academic_points(row, name):
    """One published table holds six sets. Videos may be folders of frames where their rate is known."""
    subset, rate = ACADEMIC[name]
    if row["subset"] != subset:
        raise Skip("of another set")
    for item in video_points(dict(row, label=row.get("category") or row.get("label")), name):
        yield item | (dict(fps=rate, cut=[item["video"], 0, None]) if rate else {})


ACADEMIC = {"academic-video-point-" + name: known for name, *known in (  # subset, frames a second
    ("mevis", "mevis", 6), ("refvos", "refyoutube", 6), ("lv-vis", "lvvis", 4), ("ovis", "ovis", None),
    ("burst", "burst", 6), ("ref-davis17", "refdavis17", None))}


def tracks(row, name):
    """The tracking schema: pixels, in the frames of a clip taken at sampling_fps; id = place in mask_id. The
    config says what is asked for: all of it, where each object comes and goes, or what follows a given first
    point."""
    rate, wanted = row["fps"], row.get("sampling_fps") or row["fps"]
    if rate % wanted:
        raise Skip("fps is no multiple of sampling_fps")
    ids, points = {str(m): i for i, m in enumerate(row["mask_id"])}, []
    for frame in row["frame_trajectories"]:
        for p in records(frame["points"]):
            if not p.get("occluded") and p.get("point") and str(p["id"]) in ids:
                points.append(dict(t=round(float(frame["time"]), 3), x=share(p["point"][0], row["width"]),
                                   y=share(p["point"][1], row["height"]), id=ids[str(p["id"])]))
    variant = "single_point_track" if row["_config"] in SINGLE_OBJECT else row["_config"]
    label = first(row, "expression", "exp").strip()
    a = dict(task="video_tracking", style=STYLES[variant], label=label, fps=wanted, points=points)
    if variant == "single_point_track":
        if not points:
            raise Skip("never visible")
        a["input_points"] = points[:1]
    # The clip is a file of its own, or frames start_frame to end_frame of the video.
    yield clip(row.get("clip") or row["video"], [a], fps=rate,
               cut=[str(row["video"]), row.get("start_frame") or 0, row.get("end_frame")])


STYLES = {"track": "video_point_track_per_frame", "ground": "video_point_ground_start_end",
          "single_point_track": "video_single_point_track_per_frame"}
SINGLE_OBJECT = {"trackingnet", "vasttrack", "got10k", "webuav", "lasot", "tnl2k", "webuot", "lvosv2",
                 "latot", "uwcot", "lvosv1", "tnnlt"}


# ---- held-out evaluation -----------------------------------------------------------------------------------

def unpacked(rle):
    """A run-length mask with its runs as numbers. COCO writes them as text: 5 bits a character, least first,
    the sixth says that more follow; from the fourth on a run is told as the difference from the one before
    the last."""
    counts, text = [], rle["counts"]
    if not isinstance(text, str):
        return dict(size=list(rle["size"]), counts=list(text))
    at = 0
    while at < len(text):
        value, shift, more = 0, 0, True
        while more:
            c = ord(text[at]) - 48
            value |= (c & 31) << shift
            more, at, shift = c & 32, at + 1, shift + 5
        if c & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return dict(size=list(rle["size"]), counts=counts)


def runs(mask):
    """A mask as rows of booleans -> run lengths by columns, the first run being of what is outside."""
    cells, counts, state = [row[j] for j in range(len(mask[0])) for row in mask], [0], False
    for cell in cells:
        if bool(cell) != state:
            counts.append(0)
            state = not state
        counts[-1] += 1
    return dict(size=[len(mask), len(mask[0])], counts=counts)


def eval_points(row, name):
    """Points in per cent, and a mask for each."""
    places = [dict(x=share(p["x"], 100), y=share(p["y"], 100), id=i)
              for i, p in enumerate(records(row["points"]))]
    masks = [dict(id=i, rle=runs(m)) for i, m in enumerate(row.get("masks") or [])][:len(places)]
    yield picture(row["image_url"], [dict(task="image_pointing", style="pointing", label=row["label"].strip(),
                                          points=places, masks=masks)], sha256=[row.get("image_sha256")])


def eval_count(row, name):
    """A number of things, in a picture or in a clip."""
    if "image_url" in row:
        yield picture(row["image_url"], [dict(task="counting", label=row["label"].strip(),
                                              answer=str(row["count"]))],
                      sha256=[row.get("image_sha256")])
    else:
        yield clip(row["video_id"], [dict(task="counting", prompt=row["question"], label=row["label"],
                                          answer=str(row["count"]), category=row.get("category"))],
                   row.get("clip_start"), row.get("clip_end"))


def eval_captions(row, name):
    """A caption, and the statements it is made of, which a judge looks for."""
    yield clip(row["video_id"], [dict(task="video_caption", answer=said(row["aggregated_caption"]),
                                      statements=list(row["atomic_statements"]))],
               row.get("video_start"), row.get("video_end"))


def eval_video_points(row, name):
    """A point and masks half a second apart for each instance; of them the one at the point's time."""
    points, masks = [], []
    for i, (t, p, around) in enumerate(zip(row["two_fps_timestamps"], records(row["points"]), row["masks"],
                                           strict=True)):
        points.append(dict(t=float(t), x=share(p["x"], row["width"]), y=share(p["y"], row["height"]), id=i))
        near = min(records(around), key=lambda m: abs(m["frame_id"] / 2 - t), default=None)
        if near and abs(near["frame_id"] / 2 - t) < 0.25:
            masks.append(dict(t=float(t), id=i, rle=unpacked(near["rle"])))
    yield clip(row["video_id"], [dict(task="video_pointing", label=row["label"].strip(), points=points,
                                      masks=masks)])


def eval_tracks(row, name):
    """A slot per frame of the clip: [x, y] in pixels, or null. One frame a second is evaluated, and kept."""
    rate, ids = round(row["fps"]), {str(o): i for i, o in enumerate(row["mask_id"])}
    points, masks = [], []
    shapes = {str(m["object_id"]): m["masks"] for m in records(row["masks"])}
    for o in records(row["points"]):
        i, shape = ids[str(o["object_id"])], shapes.get(str(o["object_id"]))
        for f in range(0, len(o["points"]), rate):
            if o["points"][f]:
                x, y = o["points"][f]
                points.append(dict(t=f / row["fps"], x=share(x, row["w"]), y=share(y, row["h"]), id=i))
                if shape and shape[f]:
                    masks.append(dict(t=f / row["fps"], id=i, rle=unpacked(shape[f])))
    a = dict(task="video_tracking", label=row["exp"].strip(), fps=1, points=points, masks=masks)
    yield clip(row.get("clip") or row["video"], [a], fps=row["fps"],
               cut=[str(row["video"]), row.get("start_frame") or 0, row.get("end_frame")])


# ---- the table ---------------------------------------------------------------------------------------------

class Recipe(NamedTuple):
    """How one set is made. What a user has to get by hand, and where from, is in datasets.tsv.

    media: "url" in the rows, "embedded" in the rows, "youtube" (a mirror that the repository lists), "archive"
    of a repository, by "hand", or "none".
    rows: where its annotations are. ("hub", repo, config, split[, rows to a page]): rows of the hub; ("file",
    repo, pattern): files in a repository; ("here", pattern): files put into the set's own folder. None given
    means what datasets.tsv names.
    """
    convert: callable
    media: str
    rows: tuple = ()
    archives: tuple = ()  # (repo, pattern): unpacked into the set's folder


def hub(repo, config="default", split="train", *page):
    """A table of the hub; `page` rows at a time where rows are large."""
    return (("hub", repo, config, split, *page),)


def files(repo, *patterns):
    """Files of a hub repository."""
    return tuple(("file", repo, pattern) for pattern in patterns)


def links(repo):
    """Where a repository says which of its videos the mirror has."""
    return files(repo, "youtube_id_to_urls_mapping.json")


def cauldron(config):
    """Academic sets that need logins or archives elsewhere: here with their images inside the rows."""
    return Recipe(conversations, "embedded", hub("HuggingFaceM4/the_cauldron", config))


def mantis_of(folder):
    """Sets of several images: rows in one repository, images in an archive of another."""
    images = ("TIGER-Lab/Mantis-Instruct", f"{folder}/train_images.zip")
    return Recipe(mantis, "archive", hub(f"allenai/molmo2-mantis-instruct-{folder}"), (images,))


def llava_video(kind, *sets):
    """Folders by length and set, each with its questions and its videos."""
    repo = "lmms-lab/LLaVA-Video-178K"
    questions = files(repo, *(f"*_{s}/*_{kind}_*.json" for s in sets))
    return Recipe(dialogue_of_video, "archive", questions, tuple((repo, f"*_{s}/*.tar.gz") for s in sets))


def by_hand(convert=plain, file="annotations.*"):
    """Annotations and videos both put there by the user."""
    return Recipe(convert, "hand", (("here", file),))


RECIPES = {
    # images behind URLs
    "pixmo-cap": Recipe(pixmo_caption, "url"),
    "pixmo-ask-model-anything": Recipe(pixmo_question, "url"),
    "pixmo-cap-qa": Recipe(pixmo_dialogue, "url"),
    "pixmo-points": Recipe(pixmo_points, "url"),
    "pixmo-count": Recipe(pixmo_points, "url"),
    "molmo2-multiimageqa": Recipe(pairs, "url"),
    "molmo2-multiimagepoint": Recipe(several_points, "url"),
    # images inside the rows
    "cosyn-point": Recipe(cosyn_points, "embedded"),
    "molmo2-synmultiimageqa": Recipe(pairs, "embedded"),
    "chartqa": Recipe(asked, "embedded"),
    "scienceqa": Recipe(asked, "embedded"),
    "docvqa": Recipe(asked, "embedded", hub("HuggingFaceM4/DocumentVQA")),
    "textvqa": Recipe(asked, "embedded", hub("lmms-lab/textvqa")),
    "a-okvqa": Recipe(asked, "embedded", hub("HuggingFaceM4/A-OKVQA")),
    "vqa-v2": cauldron("vqav2"),
    "tallyqa": cauldron("tallyqa"),
    "st-vqa": cauldron("st_vqa"),
    "ok-vqa": cauldron("okvqa"),
    "ai2d": cauldron("ai2d"),
    "infographicvqa": cauldron("infographic_vqa"),
    "tabmwp": cauldron("tabmwp"),
    "plotqa": cauldron("plotqa"),
    "dvqa": cauldron("dvqa"),
    "figureqa": cauldron("figureqa"),
    # images in archives of the hub, or by hand
    "llava-665k-multi": mantis_of("llava_665k_multi"),
    "nlvr2": mantis_of("nlvr2"),
    "spot-the-difference": mantis_of("spot-the-diff"),
    "pixmo-clocks": Recipe(clock_face, "hand"),
    # text
    "tulu-v2-sft-mixture": Recipe(chat, "none"),
    "molmo2-hardcodes": Recipe(identity, "none"),
    # videos from the mirror
    "molmo2-askmodelanything": Recipe(asked_of_video, "youtube"),
    "molmo2-videocapqa": Recipe(asked_of_video, "youtube"),
    "molmo2-videosubtitleqa": Recipe(asked_of_video, "youtube"),
    "molmo2-videopoint": Recipe(video_points, "youtube", (),
                                (("allenai/Molmo2-VideoPoint", "generated_videos/*.tar.gz"),)),
    # videos in archives of the hub
    "funqa": Recipe(asked_of_video, "archive", files("fesvhtr/FunQA", "*FunQA_train.json"),
                    (("fesvhtr/FunQA", "*train.zip"),)),
    "llava-video-academic-mc": llava_video("mc", "nextqa", "perceptiontest"),
    "llava-video-academic-oe": llava_video("oe", "nextqa", "activitynetqa"),
    "mevis": Recipe(tracks, "archive", (), (("FudanCVL/MeViS", "MeViS_release.zip"),)),
    # annotations from the hub, videos by hand
    "molmo2-cap": Recipe(video_captions, "hand"),
    "cinepile": Recipe(listed, "hand"),
    "social-iq2": Recipe(asked_of_video, "hand"),
    "camerabench": Recipe(listed, "hand", hub("allenai/Molmo2-CameraBenchTrain")),
    "tgif": Recipe(asked_of_video, "hand", files("allenai/Molmo2-TGIF", "Train_*_question.csv")),
    "tvqa": Recipe(tvqa, "hand", files("allenai/Molmo2-TVQA", "*train*.jsonl", "*subtitles*.jsonl")),
    "countix": Recipe(repetitions, "hand", files("allenai/Molmo2-Countix", "countix_train*.csv")),
    "newsvideoqa": Recipe(asked_of_video, "hand", files("allenai/Molmo2-NewsVideoQA", "*train*.json")),
    "motionbench-train": Recipe(motion_caption, "hand", files("zai-org/MotionBench", "*aption*train*.jsonl")),
    # annotations by hand too, in the form they are published in
    "next-qa": by_hand(asked_of_video, "train.csv"),
    "intentqa": by_hand(asked_of_video, "train.csv"),
    "sutd-trafficqa": by_hand(asked_of_video, "R2_train.jsonl"),
    "clevrer": by_hand(listed, "train.json"),
    "star": by_hand(star, "STAR_train.json"),
    "perception-test": by_hand(listed, "all_train.json"),
    "qvhighlights": by_hand(moments, "highlight_train_release.jsonl"),
}
# and in the form asked for here
for name in ("paxion", "sports-qa", "video-localized-narratives", "video-localized-narratives-caption",
             "kinetics", "moments-in-time", "ego4d", "epic-kitchens", "charades-sta", "coin", "activitynet",
             "youcook2", "how2qa", "roadtextvqa"):
    RECIPES[name] = by_hand()
for kind in ("chart", "document", "math", "table", "diagram", "music", "chemical"):
    RECIPES[f"cosyn-{kind}"] = Recipe(pairs, "embedded")
# points in videos
for name in ACADEMIC:
    RECIPES[name] = Recipe(academic_points, "hand", hub("allenai/molmo2-academic-video-points"))
# tracks: a clip is a video, part of one, or a folder of frames
for name in ("molmo2-videotrack", "refvos", "revos", "vicas", "lv-vis", "yt-vis", "burst", "ref-davis17",
             "moca-video", "trackingnet", "lasot", "got-10k", "webuav", "vasttrack", "tnl2k", "tnllt", "latot",
             "webuot", "lvos-v1", "lvos-v2", "uw-cot220"):
    RECIPES[name] = Recipe(tracks, "hand")

# Held out: what `python -m tools.prepare data eval` makes. No training set may have an image of the first two.
EVALS = {
    "pixmo-points-eval": Recipe(eval_points, "url", hub("allenai/pixmo-points-eval", "default", "test", 2)),
    "pixmo-count": Recipe(eval_count, "url", hub("allenai/pixmo-count", "default", "validation")
                          + hub("allenai/pixmo-count", "default", "test")),
    "molmo2-capeval": Recipe(eval_captions, "archive", hub("allenai/Molmo2-CapEval", "default", "test"),
                             (("allenai/Molmo2-CapEval", "vimeo_videos.zip"),)),
    "molmo2-videopointeval": Recipe(eval_video_points, "youtube",
                                    hub("allenai/Molmo2-VideoPointEval", "default", "val", 10)),
    # without links of its own; those of its training set are the nearest
    "molmo2-videocounteval": Recipe(
        eval_count, "youtube", hub("allenai/Molmo2-VideoCountEval", "default", "val")
        + links("allenai/Molmo2-VideoPoint")),
    "molmo2-videotrackeval": Recipe(eval_tracks, "hand", tuple(
        hub("allenai/Molmo2-VideoTrackEval", domain, "test", 10)[0]
        for domain in ("animal", "person", "sports", "dance", "misc"))),
}
EVALS_BY_HAND = {  # datasets.tsv has training sets alone
    "molmo2-capeval": "whole videos of BDD100K and Ego4D, which are not in the repository",
    "molmo2-videocounteval": "YouTube, of which some are gone; name the files by their ids",
    "molmo2-videotrackeval": "APTv2, PersonPath22, SportsMOT, DanceTrack and SA-V, several after a form",
}
