"""
Published rows -> items: what the rows of each published data set look like, and what they become in JSONL.

    a row as published ─► converter ─► items: {image | images | video, start, end, subtitles, annotations}
                                       media: a URL, or a name under the set's own folder

This is the leaf of `tools.prepare` that holds knowledge and no machinery: no file is opened here and nothing is
fetched. Sets of one shape share a converter; RECIPES at the end has one line for each set of datasets.tsv.

Points become shares of the sides. Times count from the start of the file, as everywhere in a record; `start`
and `end` give the clip of it that is meant, and `data.py` makes times count from the clip's start.
"""
import hashlib
import re
from collections import Counter
from typing import NamedTuple

MOST_POINTS = 60  # of an annotation; rows with more are left out


class Skip(Exception):
    """A row that is left out on purpose; the message is what it is counted under."""


# ---- small pieces ------------------------------------------------------------------------------------------

outside = Counter()  # coordinates seen, and those that are not shares of a side after conversion


def share(value, side):
    """A coordinate as a share of its side, in [0, 1]. Slips of the annotators' mouse are clipped, and
    counted: `tools.prepare` stops a set whose coordinates are in another unit than this file thinks."""
    value = float(value) / side
    outside["seen"] += 1
    if not -0.01 <= value <= 1.01:
        outside["outside"] += 1
    return round(min(max(value, 0.0), 1.0), 4)


def pick(n, *key):
    """A number below n that depends on the key alone: the same on every machine and in every run."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % n


def structs(value):
    """A list of structs, which the hub stores so or as a struct of lists: {x: [1, 2]} -> [{x: 1}, {x: 2}]."""
    if isinstance(value, dict):
        return [dict(zip(value, cells)) for cells in zip(*value.values())]
    return value or []


def numbered(points, width=100, height=100):
    """[{x, y}] in per cent, or in pixels of an image of this size -> shares of the sides, numbered from the left
    to the right of the image."""
    places = sorted((share(point["x"], width), share(point["y"], height)) for point in structs(points))
    return [dict(x=x, y=y, id=i) for i, (x, y) in enumerate(places)]


def answer_of(value):
    """An answer: text, a number, or a list of people's answers, of which the most frequent counts."""
    if value is None or value == []:
        raise Skip("no answer")
    if isinstance(value, list):
        value, _ = Counter(map(str, value)).most_common(1)[0]
    value = str(value).strip()
    if not value:
        raise Skip("empty answer")
    return value


def qa(task, question, answer):
    """An annotation of a question and its answer; Skip if either is empty."""
    if not str(question).strip():
        raise Skip("empty question")
    return dict(task=task, prompt=str(question).strip(), answer=answer_of(answer))


def choice(task, question, options, correct):
    """Multiple choice; options as published, `correct` the index of the right one."""
    options = [str(option).strip() for option in options]
    correct = int(correct)
    if len(options) == 1:
        return qa(task, question, options[0])
    if not 0 <= correct < len(options):
        raise Skip("no right option")
    return dict(task=task, question=str(question).strip(), options=options, correct=correct)


def choice_among(task, question, right, wrong):
    """Multiple choice of a right answer and distractors. The slot is drawn: a right answer that is always
    first would be learned as such."""
    options = list(map(str, wrong))
    slot = pick(len(wrong) + 1, question, right)
    options.insert(slot, str(right))
    return choice(task, question, options, slot)


def dialogue(turns):
    """[(role, text)] as messages; Skip unless user and assistant take turns, the assistant last."""
    messages = [dict(role=role, content=text.strip()) for role, text in turns]
    if not messages or len(messages) % 2:
        raise Skip("not a dialogue")
    for i, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[i % 2] or not message["content"]:
            raise Skip("not a dialogue")
    return messages


def field(row, *names):
    """The first of these fields that the row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise KeyError(" or ".join(names))


def image_item(refs, annotations, **more):
    """An item about one image or several."""
    if isinstance(refs, str):
        refs = [refs]
    if not refs or not all(refs):
        raise Skip("no image")
    media = dict(image=refs[0]) if len(refs) == 1 else dict(images=refs)
    return dict(media, annotations=annotations, **more)


def video_item(ref, annotations, start=None, end=None, **more):
    """An item about a video, or the part of it from start to end."""
    if not ref:
        raise Skip("no video")
    times = {}
    if start not in (None, ""):
        times["start"] = round(float(start), 3)
    if end not in (None, ""):
        times["end"] = round(float(end), 3)
    if times == {"start": 0}:
        times = {}
    return dict(video=str(ref), **times, annotations=annotations, **more)


# ---- images ------------------------------------------------------------------------------------------------

def pixmo_caption(row, name):
    """A caption, and one of the spoken descriptions it was written from."""
    annotations = [dict(task="image_caption", answer=answer_of(row["caption"]))]
    spoken = [text for text in row.get("transcripts") or [] if text.strip()]
    if spoken:
        text = spoken[pick(len(spoken), row["caption"])].strip()
        annotations.append(dict(task="image_caption", prompt="Describe the image as if you were speaking.",
                                answer=text))
    yield image_item(row["image_url"], annotations)


def pixmo_question(row, name):
    """A question of a person, and the answer they agreed to."""
    yield image_item(row["image_url"], [qa("image_qa", row["question"], row["answer"])],
                     sha256=[row.get("image_sha256")])


def pixmo_dialogue(row, name):
    """`question` is a dialogue, "[USER] ... [ASSISTANT] ... [USER] ... [ASSISTANT]", `answer` its last turn."""
    _, *parts = re.split(r"\[(USER|ASSISTANT)\]", row["question"] + row["answer"])
    roles = map(str.lower, parts[::2])
    messages = dialogue(zip(roles, parts[1::2]))
    yield image_item(row["image_url"], [dict(task="image_qa", messages=messages)])


def pixmo_points(row, name):
    """A label's points. Half of the labels are counted as well, the other half only pointed to."""
    points = structs(row["points"])
    if len(points) > MOST_POINTS:
        raise Skip(f"more than {MOST_POINTS} points")
    task = "image_pointing"
    style = ("pointing", "point_count")[pick(2, row["image_sha256"], row["label"])]
    more = {}
    if name == "pixmo-count":  # in pixels of the image, whose size is known once it is here
        points = [dict(x=float(point["x"]), y=float(point["y"])) for point in points]
        more["pixels"] = True
        if style == "point_count":
            task = "counting"
    else:
        points = numbered(points)
    annotation = dict(task=task, style=style, label=row["label"].strip(), points=points)
    yield image_item(row["image_url"], [annotation], sha256=[row.get("image_sha256")], **more)


def cosyn_points(row, name):
    """Three lists side by side: questions, points, names."""
    annotations = []
    for question, points, label in zip(row["questions"], row["answer_points"], row["names"], strict=True):
        annotations.append(dict(task="image_pointing", prompt=question.strip(), label=str(label),
                                points=numbered(points)))
    yield image_item(row["image"], annotations)


def qa_task(images):
    return "image_qa" if len(images) == 1 else "multi_image_qa"


def pairs(row, name):
    """One or more drawn images and a list of question, explanation, answer. All but documents are answered
    with the explanation first."""
    images = field(row, "images", "image", "image_urls")
    if isinstance(images, str):
        images = [images]
    if len(images) > 5:
        raise Skip("more than 5 images")
    if "image_urls" in row and len(images) < 2:
        raise Skip("fewer than 2 images")
    annotations = []
    for pair in structs(row["qa_pairs"]):
        answer = answer_of(pair["answer"])
        explanation = (pair.get("explanation") or "").strip()
        if name != "cosyn-document" and explanation and explanation != answer:
            answer = f"{explanation} Answer: {answer}"
        annotations.append(qa(qa_task(images), pair["question"], answer))
    yield image_item(images, annotations, sha256=row.get("image_sha256s"))


def conversations(row, name):
    """Images and a list of {user, assistant}: the shape that one collection gives to dozens of sets."""
    task = "counting" if name == "tallyqa" else qa_task(row["images"])
    yield image_item(row["images"], [qa(task, turn["user"], turn["assistant"]) for turn in structs(row["texts"])])


def image_question(row, name):
    """One image, one question: with an answer, with people's answers, or with choices."""
    question = field(row, "question", "query").strip()
    hint = (row.get("hint") or "").strip()
    if hint:
        question = f"{hint}\n{question}"
    if not row.get("image"):
        raise Skip("no image")
    annotations = []
    if "choices" in row:
        correct = field(row, "correct_choice_idx", "answer")
        annotations.append(choice("image_qa", question, row["choices"], correct))
    if "choices" not in row or "direct_answers" in row:
        answer = field(row, "direct_answers", "answers", "label", "answer")
        if "direct_answers" in row and isinstance(answer, str):  # a list as text: "['a', 'b']"
            quoted = re.findall(r"'(.*?)'(?=[,\]])|\"(.*?)\"(?=[,\]])", answer)
            answer = list(map("".join, quoted))  # one of the two groups is empty
        annotations.append(qa("image_qa", question, answer))
    yield image_item(row["image"], annotations)


def mantis(row, name):
    """Several images and lists side by side: questions with choices, without, and answers."""
    if len(row["images"]) < 2:
        raise Skip("fewer than 2 images")
    annotations = []
    for question, options, correct, open_question, answer in zip(
            row["mc_question"], row["choices"], row["correct_choice_idx"], row["oe_question"],
            row["direct_answer"], strict=True):
        if options:
            annotations.append(choice("multi_image_qa", question, options, correct))
        else:
            annotations.append(qa("multi_image_qa", open_question, answer))
    yield image_item(row["images"], annotations)


def several_points(row, name):
    """One human label per image, points in per cent; one of the labels is asked for in all images.
    `normalized_labels`, where given, tells which labels mean the same; else only equal words do."""
    labels = row["labels"]
    meanings = row.get("normalized_labels") or [label.strip().lower() for label in labels]
    if len(labels) < 2:
        raise Skip("fewer than 2 images")
    chosen = pick(len(labels), labels, row["image_sha256s"])
    points = []
    for image, (meaning, marks) in enumerate(zip(meanings, row["points"], strict=True)):
        if meaning == meanings[chosen]:
            points += [dict(point, image=image) for point in numbered(marks)]
    if len(points) > MOST_POINTS:
        raise Skip(f"more than {MOST_POINTS} points")
    for i, point in enumerate(points):
        point["id"] = i
    style = ("multi_image_pointing", "multi_image_point_then_count")[pick(2, row["image_sha256s"], labels)]
    annotation = dict(task="multi_image_pointing", style=style, label=labels[chosen].strip(), points=points)
    yield image_item(row["image_urls"], [annotation], sha256=row.get("image_sha256s"))


def clock_face(row, name):
    """The rows give the time on a face that somebody else has to draw."""
    yield image_item(f"{row['example_id']}.png", [qa("image_qa", "What time is shown?", row["watch_time"])])


# ---- text --------------------------------------------------------------------------------------------------

def category_of(row, text):
    """The published column of the Tulu 4 mixture; Tulu 2 has none: fences and letters of other scripts decide."""
    if "category" in row:
        return row["category"]
    if "```" in text:
        return "code"
    return "non-english" if len(re.findall(r"[^\x00-\x7f]", text)) > 0.1 * len(text) else ""


def chat(row, name):
    """A conversation. The system's words open the first question. Left out, as published: canned identities,
    puzzles, code, and text that is not English."""
    turns = [(message["role"], message["content"].strip()) for message in row["messages"]]
    source = str(row.get("dataset") or row.get("source"))
    if re.search("hard_?code", source):
        raise Skip("canned identity")
    if re.search("puzzle_data|verifiable-reasoning", source):
        raise Skip("puzzles")
    if row.get("has_special_token") or row.get("empty_messages"):
        raise Skip("special token or empty message")
    if (row.get("first_message_qwen3_tokens") or 0) > 4096:
        raise Skip("first message above 4,096 tokens")
    if len(turns) > 1 and turns[0][0] == "system":
        (_, system), (role, question), *rest = turns
        turns = [(role, f"{system}\n\n{question}"), *rest]
    category = category_of(row, "".join(content for _, content in turns))
    if category in ("code", "non-english"):
        raise Skip(category)
    if len(turns) % 2:
        turns.pop()  # a question nobody answered
    yield dict(annotations=[dict(task="text", messages=dialogue(turns))])


def identity(row, name):
    """Several ways to ask who the model is, and one answer."""
    yield dict(annotations=[qa("text", question, row["response"]) for question in row["questions"]])


# ---- videos ------------------------------------------------------------------------------------------------

CAPTIONS = {"video_caption": "video_short_caption", "merged_caption": "video_caption",
            "video_frame_merged_caption": "video_long_caption"}  # column -> style


def video_captions(row, name):
    """Up to three captions of a video, short, whole, and with every frame's details."""
    if row.get("annotation_score") is not None and row["annotation_score"] < 3:
        raise Skip("annotation score below 3")
    annotations = []
    for column, style in CAPTIONS.items():
        text = (row.get(column) or "").strip()
        if text:
            annotations.append(dict(task="video_caption", style=style, answer=text))
    yield video_item(row["video_id"], annotations, row.get("video_start"), row.get("video_end"))


VIDEO_NAMES = ("video", "video_id", "vid_name", "vid_filename", "video_path", "video_filename", "gif_name",
               "vid", "uni_clipped_id", "visual_input", "youtube_id", "_key")


def options_of(row):
    """Choices and the place of the right one, in any of the spellings around: ([...], i), or None. Of columns
    a0, a1, ... the answer is the number; of a list it may be the text."""
    in_columns = []
    for stem in ("a", "option"):
        for i in range(6):
            if f"{stem}{i}" in row:
                in_columns.append(row[f"{stem}{i}"])
    options = in_columns or row.get("options") or row.get("choices") or []
    for name in ("correct", "answer_idx", "answer_id", "answer_key_position", "correct_choice_idx", "answer"):
        answer = row.get(name)
        if isinstance(answer, str) and answer in options and not in_columns:
            return options, options.index(answer)
        if options and answer is not None and str(answer).strip().isdigit():
            return options, int(answer)
    return None


def subtitles(lines):
    """[{start, end, text}] of what came as such; lines without times are no subtitles here."""
    return [{k: line[k] for k in ("start", "end", "text")} for line in lines or () if isinstance(line, dict)]


def video_question(row, name, video=None):
    """One question about a video: with choices, with distractors, or open."""
    question = field(row, "question", "Question", "q", "q_body", "query", "instruction")
    found = options_of(row)
    if "NegativeAnswers" in row:
        annotation = choice_among("video_qa", question, row["Answer"], row["NegativeAnswers"])
    elif found:
        annotation = choice("video_qa", question, *found)
    else:
        annotation = qa("video_qa", question, field(row, "answer", "output"))
    lines = subtitles(row.get("subtitle") or row.get("subtitles"))
    more = dict(subtitles=lines) if lines else {}
    start = row.get("start")
    end = row.get("end")
    if re.fullmatch(r"[\d.]+-[\d.]+", row.get("ts") or ""):  # TVQA
        start, end = row["ts"].split("-")
    yield video_item(video or field(row, *VIDEO_NAMES), [annotation], start, end, **more)


FUNQA_LEFT_OUT = ("H1", "M1", "C1", "C4", "C5")  # tasks whose answers are frame numbers, titles and scores


def funqa(row, name):
    """Two files: open questions, of which the published recipe leaves out five tasks; and multiple choice, which is
    text: "... The Question is: ... The Options are: ['Options 1: ...', 'Options 2: ...']", the answer a number."""
    if row.get("task") in FUNQA_LEFT_OUT:
        raise Skip("a task that the published recipe does not use")
    if "gt" not in row:
        yield from video_question(row, name)
        return
    asked, _, listed = row["instruction"].partition("The Options are:")
    question = asked.split("The Question is:")[-1]
    options = re.findall(r"Options? *(\d+): *(.*?)(?=['\"], *['\"]Options? *\d+:|['\"]\s*\]|$)", listed, re.S)
    numbers = [int(number) for number, _ in options]
    right = int(re.search(r"\d+", str(row["gt"]))[0])
    annotation = choice("video_qa", question, [text for _, text in options], numbers.index(right))
    yield video_item(row["visual_input"], [annotation])


def tvqa(row, name):
    """Questions in one file, subtitles in another: a line of the second has no annotation."""
    if "sub" in row:
        yield video_item(row["vid_name"], [], subtitles=subtitles(row["sub"]))
    else:
        yield from video_question(row, name)


def texts_of(choices):
    return [choice["choice"] for choice in choices]


def question_list(row, name):
    """A video with a list of questions."""
    video = field(row, *VIDEO_NAMES)
    for question in field(row, "examples", "mc_question", "mc_qa_list", "questions"):
        choices = question.get("choices")
        if choices and isinstance(choices[0], dict):
            right = [choice for choice in choices if choice["answer"] == "correct"]
            if len(right) != 1:
                continue  # CLEVRER: several or none are right
            question = dict(question, choices=texts_of(choices), answer=right[0]["choice"])
        yield from video_question({"subtitles": row.get("subtitles"), **question}, name, video)


def star(row, name):
    """Choices come as {choice_id, choice}, the answer as its text."""
    yield from video_question(dict(row, choices=texts_of(row["choices"])), name)


def video_dialogue(row, name):
    """[{from: human | gpt, value}]; the first value opens with a line that stands for the video."""
    roles = {"human": "user", "gpt": "assistant"}
    turns = [(roles[turn["from"]], turn["value"].replace("<image>", "")) for turn in row["conversations"]]
    yield video_item(row["video"], [dict(task="video_qa", messages=dialogue(turns))])


def time_windows(row, name):
    """When does it happen? Windows in seconds."""
    windows = row["relevant_windows"]
    if not 0 < len(windows) <= 5:
        raise Skip("more than 5 windows")
    question = f"When does this happen: {row['query']}? Give start and end in seconds."
    answer = ", ".join(f"{start} - {end}" for start, end in windows)
    yield video_item(row["vid"], [qa("video_qa", question, answer)])


def motion_caption(row, name):
    """What moves, and how."""
    yield video_item(row["video_path"], [dict(task="video_caption", answer=answer_of(row["motion_caption"]))])


def repetitions(row, name):
    """How often a movement is repeated; the rows have its name and the number."""
    question = f"How many times is this done: {row['class']}?"
    yield video_item(row["video_path"], [qa("video_qa", question, row["count"])])


def plain(row, name):
    """The layout asked for where the published one is not known: a row per question or caption, in the fields
    of a record of this project. All of these sets are videos."""
    if "question" in row:
        yield from video_question(row, name)
    else:
        caption = answer_of(field(row, "answer", "caption"))
        yield video_item(field(row, *VIDEO_NAMES), [dict(task="video_caption", answer=caption)],
                         row.get("start"), row.get("end"))


def video_points(row, name):
    """points[i] are those at the time timestamps[i], in per cent; every point is an object of its own."""
    if row.get("annotator_unsure"):
        raise Skip("annotator unsure")
    places = []  # (time, x, y)
    for t, marks in zip(field(row, "two_fps_timestamps", "timestamps"), row["points"] or [], strict=True):
        places += [(float(t), share(mark["x"], 100), share(mark["y"], 100)) for mark in structs(marks)]
    places.sort()
    start = row.get("clip_start", row.get("clip_start_time"))
    end = row.get("clip_end", row.get("clip_end_time"))
    if (row.get("video_duration") or 0) > 63:
        if end is None:
            raise Skip("longer than 63 s and no clip of it given")
    elif start in (None, 0):  # the whole video
        start = None
        end = None
    if end is not None:
        places = [place for place in places if start <= place[0] <= end]
    if len(places) > MOST_POINTS:
        raise Skip(f"more than {MOST_POINTS} points")
    if row["count"] != len(places):
        raise Skip("count and points differ")
    label = field(row, "label", "category").strip()
    video = field(row, "video_id", "video_name")
    style = ("video_point", "video_point_count")[pick(2, video, label)]
    points = [dict(t=t, x=x, y=y, id=i) for i, (t, x, y) in enumerate(places)]
    yield video_item(video, [dict(task="video_pointing", style=style, label=label, points=points)], start, end)


ACADEMIC = {  # name -> (subset of the published table, frames a second where they are known)
    "academic-video-point-mevis": ("mevis", 6), "academic-video-point-refvos": ("refyoutube", 6),
    "academic-video-point-lv-vis": ("lvvis", 4), "academic-video-point-ovis": ("ovis", None),
    "academic-video-point-burst": ("burst", 6), "academic-video-point-ref-davis17": ("refdavis17", None)}


def academic_points(row, name):
    """One published table holds six sets. Videos may be folders of frames where their rate is known."""
    subset, rate = ACADEMIC[name]
    if row["subset"] != subset:
        raise Skip("of another set")
    label = row.get("category") or row.get("label")
    for item in video_points(dict(row, label=label), name):
        if rate:
            item |= dict(fps=rate, cut=[item["video"], 0, None])
        yield item


STYLES = {"track": "video_point_track_per_frame", "ground": "video_point_ground_start_end",
          "single_point_track": "video_single_point_track_per_frame"}
SINGLE_OBJECT = {"trackingnet", "vasttrack", "got10k", "webuav", "lasot", "tnl2k", "webuot", "lvosv2",
                 "latot", "uwcot", "lvosv1", "tnnlt"}


def ids_of(row):
    """{name of an object: its number}"""
    return {str(mask): i for i, mask in enumerate(row["mask_id"])}


def cut_of(row):
    """Where the clip is, if it is no file of its own: frames start_frame to end_frame of the video."""
    return [str(row["video"]), row.get("start_frame") or 0, row.get("end_frame")]


def tracks(row, name):
    """The tracking schema: pixels, in the frames of a clip taken at sampling_fps; id = place in mask_id. The
    config tells what is asked for: all of it, where each object comes and goes, or what follows a given first
    point of one object."""
    rate = row["fps"]
    sampled = row.get("sampling_fps") or rate
    if rate % sampled:
        raise Skip("fps is no multiple of sampling_fps")
    ids = ids_of(row)
    points = []
    for frame in row["frame_trajectories"]:
        for point in structs(frame["points"]):
            if not point.get("occluded") and point.get("point") and str(point["id"]) in ids:
                t = round(float(frame["time"]), 3)
                x, y = point["point"][:2]
                points.append(dict(t=t, x=share(x, row["width"]), y=share(y, row["height"]),
                                   id=ids[str(point["id"])]))
    variant = "single_point_track" if row["_config"] in SINGLE_OBJECT else row["_config"]
    annotation = dict(task="video_tracking", style=STYLES[variant],
                      label=field(row, "expression", "exp").strip(), fps=sampled, points=points)
    if variant == "single_point_track":
        if not points:
            raise Skip("never visible")
        annotation["input_points"] = points[:1]
    yield video_item(row.get("clip") or row["video"], [annotation], fps=rate, cut=cut_of(row))


# ---- held-out evaluation -----------------------------------------------------------------------------------

def unpacked(rle):
    """A run-length mask with its runs as numbers. COCO writes them as text: 5 bits a character, least first,
    the sixth bit means that more follow; from the fourth on a run is given as the difference from the one
    before the one before it."""
    text = rle["counts"]
    if not isinstance(text, str):
        return dict(size=list(rle["size"]), counts=list(text))
    counts = []
    value = 0
    shift = 0
    for letter in text:
        bits = ord(letter) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # the sign
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value = 0
        shift = 0
    if shift:
        raise ValueError("a mask is cut short")
    return dict(size=list(rle["size"]), counts=counts)


def runs(mask):
    """A mask as rows of booleans -> run lengths by columns, the first run being of what is outside."""
    counts = [0]
    inside = False
    for column in zip(*mask, strict=True):
        for cell in column:
            if bool(cell) != inside:
                counts.append(0)
                inside = not inside
            counts[-1] += 1
    return dict(size=[len(mask), len(mask[0])], counts=counts)


def eval_points(row, name):
    """Points in per cent, and a mask for each."""
    points = []
    for i, point in enumerate(structs(row["points"])):
        points.append(dict(x=share(point["x"], 100), y=share(point["y"], 100), id=i))
    masks = []
    for i, mask in enumerate((row.get("masks") or [])[:len(points)]):
        masks.append(dict(id=i, rle=runs(mask)))
    annotation = dict(task="image_pointing", style="pointing", label=row["label"].strip(), points=points,
                      masks=masks)
    yield image_item(row["image_url"], [annotation], sha256=[row.get("image_sha256")])


def eval_count(row, name):
    """A number of things, in an image or in a clip."""
    count = str(row["count"])
    if "image_url" in row:
        annotation = dict(task="counting", label=row["label"].strip(), answer=count)
        yield image_item(row["image_url"], [annotation], sha256=[row.get("image_sha256")])
    else:
        annotation = dict(task="counting", prompt=row["question"], label=row["label"], answer=count,
                          category=row.get("category"))
        yield video_item(row["video_id"], [annotation], row.get("clip_start"), row.get("clip_end"))


def eval_captions(row, name):
    """A caption, and the statements it is made of, which a judge looks for."""
    annotation = dict(task="video_caption", answer=answer_of(row["aggregated_caption"]),
                      statements=list(row["atomic_statements"]))
    yield video_item(row["video_id"], [annotation], row.get("video_start"), row.get("video_end"))


def eval_video_points(row, name):
    """A point and masks half a second apart for each instance; of them the one at the point's time."""
    points = []
    masks = []
    for i, (t, point, shapes) in enumerate(zip(row["two_fps_timestamps"], structs(row["points"]), row["masks"],
                                               strict=True)):
        x = share(point["x"], row["width"])
        y = share(point["y"], row["height"])
        points.append(dict(t=float(t), x=x, y=y, id=i))
        distance = lambda shape: abs(shape["frame_id"] / 2 - t)
        nearest = min(structs(shapes), key=distance, default=None)
        if nearest and distance(nearest) < 0.25:
            masks.append(dict(t=float(t), id=i, rle=unpacked(nearest["rle"])))
    yield video_item(row["video_id"], [dict(task="video_pointing", label=row["label"].strip(), points=points,
                                            masks=masks)])


EVALUATED = ("aptv2", "personpath22", "sportsmot", "dancetrack", "sav")  # videos of, in the table of all


def eval_tracks(row, name):
    """A slot per frame of the clip: [x, y] in pixels, or null. One frame a second is evaluated, and kept."""
    if (row.get("video_dataset") or EVALUATED[0]).lower() not in EVALUATED:
        raise Skip("of another set")
    ids = ids_of(row)
    shapes = {str(mask["object_id"]): mask["masks"] for mask in structs(row["masks"])}
    points = []
    masks = []
    for track in structs(row["points"]):
        object_id = str(track["object_id"])
        i = ids[object_id]
        for frame in range(0, len(track["points"]), round(row["fps"])):
            if not track["points"][frame]:
                continue
            x, y = track["points"][frame]
            t = frame / row["fps"]
            points.append(dict(t=t, x=share(x, row["w"]), y=share(y, row["h"]), id=i))
            if shapes.get(object_id) and shapes[object_id][frame]:
                masks.append(dict(t=t, id=i, rle=unpacked(shapes[object_id][frame])))
    annotation = dict(task="video_tracking", label=row["exp"].strip(), fps=1, points=points, masks=masks)
    yield video_item(row.get("clip") or row["video"], [annotation], fps=row["fps"], cut=cut_of(row))


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
    instead: tuple = ()   # configs of the hub's table, if the usual ones are not there


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
    return Recipe(video_dialogue, "archive", questions, tuple((repo, f"*_{s}/*.tar.gz") for s in sets))


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
    "chartqa": Recipe(image_question, "embedded"),
    "scienceqa": Recipe(image_question, "embedded"),
    "docvqa": Recipe(image_question, "embedded", hub("HuggingFaceM4/DocumentVQA")),
    "textvqa": Recipe(image_question, "embedded", hub("lmms-lab-encoder/textvqa")),
    "a-okvqa": Recipe(image_question, "embedded", hub("HuggingFaceM4/A-OKVQA")),
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
    "molmo2-askmodelanything": Recipe(video_question, "youtube"),
    "molmo2-videocapqa": Recipe(video_question, "youtube"),
    "molmo2-videosubtitleqa": Recipe(video_question, "youtube"),
    "molmo2-videopoint": Recipe(
        video_points, "youtube", (), (("allenai/Molmo2-VideoPoint", "generated_videos/*.tar.gz"),),
        ("action_or_event", "animal", "anomaly", "comparative reference", "indirect reference", "object",
         "referring expression", "spatial reference")),  # the default table is all of these
    # videos in archives of the hub
    "funqa": Recipe(funqa, "archive", files("fesvhtr/FunQA", "*FunQA_train.json", "*Funqa_mcqa_v1.json"),
                    (("fesvhtr/FunQA", "*train.zip"),)),
    "llava-video-academic-mc": llava_video("mc", "nextqa", "perceptiontest"),
    "llava-video-academic-oe": llava_video("oe", "nextqa", "activitynetqa"),
    "mevis": Recipe(tracks, "archive", (), (("FudanCVL/MeViS", "MeViS_release.zip"),)),
    "molmopoint-tracksyn": Recipe(tracks, "archive", (), (("allenai/MolmoPoint-TrackSyn", "*.tar"),)),
    # annotations from the hub, videos by hand
    "molmo2-cap": Recipe(video_captions, "hand"),
    "cinepile": Recipe(question_list, "hand"),
    "social-iq2": Recipe(video_question, "hand"),
    "camerabench": Recipe(question_list, "hand", hub("allenai/Molmo2-CameraBenchTrain")),
    "tgif": Recipe(video_question, "hand", files("allenai/Molmo2-TGIF", "Train_*_question.csv")),
    "tvqa": Recipe(tvqa, "hand", files("allenai/Molmo2-TVQA", "*train*.jsonl", "*subtitles*.jsonl")),
    "countix": Recipe(repetitions, "hand", files("allenai/Molmo2-Countix", "countix_train*.csv")),
    "newsvideoqa": Recipe(video_question, "hand", files("allenai/Molmo2-NewsVideoQA", "*train*.json")),
    "motionbench-train": Recipe(motion_caption, "hand", files("zai-org/MotionBench", "*aption*train*.jsonl")),
    # annotations by hand too, in the form they are published in
    "next-qa": by_hand(video_question, "train.csv"),
    "intentqa": by_hand(video_question, "train.csv"),
    "sutd-trafficqa": by_hand(video_question, "R2_train.jsonl"),
    "clevrer": by_hand(question_list, "train.json"),
    "star": by_hand(star, "STAR_train.json"),
    "perception-test": by_hand(question_list, "all_train.json"),
    "qvhighlights": by_hand(time_windows, "highlight_train_release.jsonl"),
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
        for domain in ("animal", "person", "sports", "dance", "misc")), (), ("default",)),
}
EVALS_BY_HAND = {  # datasets.tsv has training sets alone
    "molmo2-capeval": "whole videos of BDD100K and Ego4D, which are not in the repository",
    "molmo2-videocounteval": "YouTube, of which some are gone; name the files by their ids",
    "molmo2-videotrackeval": "APTv2, PersonPath22, SportsMOT, DanceTrack and SA-V, several after a form",
}
