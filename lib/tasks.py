r"""
Tasks: what can be asked about media, and how it is answered. An annotation is one question of a task and its answer.

    {"task": "image_pointing", "label": "wheels", "points": [{"x": 0.31, "y": 0.62, "id": 0}]}
         │                          │                 └ check_points, then write_points ─► <point 0.31, 0.62, 0>
         │                          └ one of its prompts, drawn ─► "Point to the wheels."
         └ TASKS: media, kind of answer, loss weight, share in a mixture, length and metric of an answer

A new task is one more entry of TASKS; its metric stands in eval.METRICS (lib/README.md).
"""
import math
from typing import Callable, NamedTuple

from lib.errors import BadRecord
from lib.text import format_points, number

# What a record may be about; the same words name the kinds of points that `format_points` knows.
MEDIA = ("image", "images", "video")


# ---- values ------------------------------------------------------------------------------------------------

def wrong_field(detail):
    return BadRecord("wrong field", detail)


def is_text(value):
    return isinstance(value, str)


def is_number(value):
    """Whether a JSON value is a number. Python counts True as 1, a record may not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_index(value):
    """Whether a JSON value is a whole number from 0."""
    return is_number(value) and isinstance(value, int) and 0 <= value < 2 ** 31


def is_time(value):
    """Whether a JSON value is a number of seconds from 0."""
    return is_number(value) and 0 <= value < 1e9


def is_unit(value):
    """Whether a JSON value is a finite number in [0, 1]."""
    return is_number(value) and 0 <= value <= 1


def is_list_of(value, is_fine):
    return isinstance(value, list) and all(map(is_fine, value))


# ---- kinds of answers --------------------------------------------------------------------------------------

class Answer(NamedTuple):
    """A kind of answer. Any annotation may spell its answer out as "answer"; or a field holds what it is made of."""
    field: str = "answer"   # of an annotation
    check: Callable = None  # check(value of the field, kind of media, number of media): BadRecord says what is wrong
    write: Callable = None  # write(annotation, kind of media, grammar) -> the answer as text


EDGE = 0.0005  # x and y are written with 3 decimals: so far outside [0, 1] is on the edge


def clip_points(annotation):
    """Move points that lie outside [0, 1] by less than a rounding error onto the edge, in place: how many."""
    n = 0
    for field, check in PLACES.items():
        for p in annotation.get(field, ()) if check is check_points else ():
            if not (is_unit(p["x"]) and is_unit(p["y"])):
                p |= dict(x=min(max(p["x"], 0), 1), y=min(max(p["y"], 0), 1))
                n += 1
    return n


def check_points(points, kind, n_media):
    if not isinstance(points, list) or kind is None:
        raise wrong_field("points must be a list, in a record with an image or a video")
    for p in points:
        if not isinstance(p, dict) or not is_index(p.get("id")):
            raise wrong_field(f"point {p!r} needs a whole number id from 0")
        sides = [p.get("x"), p.get("y")]
        if not all(is_number(side) and -EDGE <= side <= 1 + EDGE for side in sides):
            unit = ""
            if all(map(is_number, sides)) and 0 <= min(sides) and max(sides) < math.inf:
                unit = ": in per cent?" if max(sides) <= 100 else ": in pixels?"
            raise BadRecord("point outside [0, 1]", f"x {p.get('x')!r}, y {p.get('y')!r}{unit}")
        if kind == "images" and not (is_index(p.get("image")) and p["image"] < n_media):
            raise wrong_field(f"point names image {p.get('image')!r} of {n_media}")
        if kind == "video" and not is_time(p.get("t")):
            raise wrong_field(f"point at time {p.get('t')!r}")


def mode_of(annotation):
    """How an annotation's points are written, by its style or task: a mode of `format_points`."""
    form = FORMS.get(annotation.get("style"))
    return (form.mode if form else "") or TASKS[annotation["task"]].mode or "point"


def write_points(annotation, kind, grammar, tracks=False):
    """The points of an annotation as its style wants them: all of them, the ends of each track, or what follows the
    given ones; where they are, how many there are, or both."""
    points = annotation["points"]
    style = annotation.get("style") or annotation["task"]
    if kind == "video" and "ground_start_end" in style:
        times = {}  # id -> times at which the object is seen
        for p in points:
            times.setdefault(p["id"], []).append(p["t"])
        points = [p for p in points if p["t"] in (min(times[p["id"]]), max(times[p["id"]]))]
    if kind == "video" and annotation.get("input_points"):
        last_given = max(p["t"] for p in annotation["input_points"])
        points = [p for p in points if p["t"] > last_given]
    mode = mode_of(annotation)
    if mode == "count" and not points:
        return "0"
    return format_points(points, kind, grammar, annotation.get("label", ""), tracks, mode)


def write_tracks(annotation, kind, grammar):
    return write_points(annotation, kind, grammar, tracks=True)


TEXT = Answer()
NUMBER = Answer("points", check_points, write_points)  # how many points there are
POINTS = Answer("points", check_points, write_points)
TRACKS = Answer("points", check_points, write_tracks)  # an object keeps its id from frame to frame


# ---- the table ---------------------------------------------------------------------------------------------

class Task(NamedTuple):
    """What the project knows of a task. Points are a few tokens beside a caption's hundreds, and matter more."""
    media: tuple                   # kinds of media it may be about, of MEDIA; None is text alone
    answer: Answer
    weight: float                  # loss weight of an answer token
    metric: str                    # how an answer is scored: a key of eval.METRICS
    groups: dict                   # mixture -> the group that its datasets belong to, where a mixture has groups
    prompts: tuple = ()            # templates for an annotation without a prompt
    mode: str = ""                 # of `format_points`, where it is not "point"
    limit: int = 64                # most tokens of an answer in an evaluation: the published limits
    released_weight: float = None  # loss weight as published, where it does not depend on the answer's length


# Groups of datasets in the mixtures that have some: data.MIXTURES has their shares.
TALK = dict(pretrain="captions", released="demo")
POINTING = dict(pretrain="pointing", released="image_pointing")

TASKS = {
    "image_caption": Task(
        ("image",), TEXT, 1.0, "caption", TALK, limit=448,
        prompts=("Describe the image.", "What is in this picture?", "Write a detailed caption.", "What do you see?")),
    "image_qa": Task(("image",), TEXT, 1.0, "words", TALK),
    "image_pointing": Task(
        ("image",), POINTS, 2.0, "points", POINTING, limit=192, released_weight=0.2,
        prompts=("Point to the {label}.", "Where is the {label}?", "Find the {label}.", "Show me every {label}.")),
    "counting": Task(
        (*MEDIA, None), NUMBER, 1.5, "count", POINTING, limit=192, mode="count",
        prompts=("How many {label} are there?", "Count the {label}.", "What is the number of {label}?")),
    "multi_image_qa": Task(("images",), TEXT, 1.0, "words", TALK),
    "multi_image_pointing": Task(
        ("images",), POINTS, 2.0, "points", POINTING, limit=192, released_weight=0.2,
        prompts=("Point to the {label} in {selected_images}.", "Find {selected_label}.")),
    "video_caption": Task(
        ("video",), TEXT, 1.0, "caption", TALK, limit=2048, released_weight=0.1,
        prompts=("Describe the video.", "What happens in this video?", "Write a detailed caption of the clip.")),
    "video_qa": Task(("video",), TEXT, 1.0, "words", TALK),
    "video_pointing": Task(
        ("video",), POINTS, 2.0, "points", dict(POINTING, released="video_pointing"), limit=2048, released_weight=0.2,
        prompts=("Point to the {label} in the video.", "When and where does the {label} appear?")),
    "video_tracking": Task(
        ("video",), TRACKS, 2.0, "tracks", dict(POINTING, released="tracking"), limit=4096, released_weight=0.2,
        prompts=("Track the {label}.", "Follow the {label} through the video.", "Where does the {label} go?")),
    "text": Task((None,), TEXT, 1.0, "words", dict(pretrain="text", released="nlp")),
}


class Style(NamedTuple):
    """A finer kind of a task, that an annotation names as "style": its own prompts, and perhaps a mode."""
    prompts: tuple
    mode: str = ""


STYLES = {
    "short_caption": Style(("Describe the image in a sentence.", "Write a short caption.")),
    "point_count": Style(("Count the {label} by pointing.", "Point to the {label} and say how many there are."),
                         "point_count"),
    "multi_image_counting": Style(("How many {label} are there in {selected_images}?", "Count {selected_label}."),
                                  "count"),
    "multi_image_point_then_count": Style(("Point to {selected_label}, then say how many there are.",), "point_count"),
    "multi_image_count_then_point": Style(
        ("How many {label} are there in {selected_images}? Then point to each.",), "count_point"),
    "video_short_caption": Style(("Describe the video in a sentence.", "Write a short caption of the clip.")),
    "video_short_answer": Style(("{question}", "{question} Answer briefly.", "Give a short answer: {question}")),
    "video_clip_caption_start_end": Style(("What happens between {start_time} and {end_time}?",
                                           "Describe the video from {start_time} to {end_time}.")),
    "video_clip_transcript_start_end": Style(("What is said between {start_time} and {end_time}?",)),
    "video_frame_caption_timestamp": Style(("What can be seen at {timestamp}?", "Describe the frame at {timestamp}.")),
    "video_transcript": Style(("What is said in this video?", "Write down what is said.")),
    "video_point_count": Style(("Point to the {label} in the video, then say how many there are.",), "point_count"),
    "video_count": Style(("How many {label} are there in the video?", "Count the {label} in the clip."), "count"),
    "video_count_point": Style(("How many {label} are there in the video? Then point to each.",), "count_point"),
    "video_point_track_per_frame": Style(("Track the {label} at {fps} frames per second.",
                                          "Follow the {label}, {fps} times a second.")),
    "video_point_ground_start_end": Style(("Where does the {label} first and last appear?",
                                           "Point to the {label} when it comes and when it goes.")),
    "video_single_point_track_per_frame": Style(("Track the {label} from {input_points}.",
                                                 "Where does {input_points} go from here?")),
}
STYLES |= {  # the released names of the same
    "long_caption": Style(TASKS["image_caption"].prompts), "pointing": Style(TASKS["image_pointing"].prompts),
    "cosyn_point": Style(TASKS["image_pointing"].prompts), "video_long_caption": Style(TASKS["video_caption"].prompts),
    "video_point": Style(TASKS["video_pointing"].prompts),
    "video_single_point_track_start_end": STYLES["video_single_point_track_per_frame"]}

FORMS = TASKS | STYLES  # a task's name is the style of its plain form


def released_weight(task, n_trained, n_branches):
    """Loss weight of an answer token, as published: less in a long answer and in a tree of many branches. n_trained:
    tokens of the answer and its EOS."""
    if TASKS[task].released_weight is not None:
        return TASKS[task].released_weight
    if n_branches > 1:
        n_trained -= 1  # the published code counts EOS in a single chat, but not in a tree
    return 2 / math.sqrt(max(n_trained, 1)) / math.sqrt(n_branches)


# ---- an annotation: checked, asked, answered ---------------------------------------------------------------

def is_chat(messages):
    """Whether these are messages of user and assistant in turn, the last one an answer."""
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        return False
    for i, message in enumerate(messages):
        role = ("user", "assistant")[i % 2]
        if not isinstance(message, dict) or not is_text(message.get("content")) or message.get("role") != role:
            return False
    return True


# Optional fields of an annotation: (names, whether a value is fine, what it should be).
OPTIONAL_FIELDS = (
    (("prompt", "answer", "label", "style", "question"), is_text, "text"),
    (("fps", "start_time", "end_time", "timestamp"), is_time, "a number from 0"),
    (("options",), lambda value: is_list_of(value, is_text), "a list of texts"),
    (("images",), lambda value: value and is_list_of(value, is_index), "a list of image numbers"))

# Fields about places in media, and what checks them: those that answers are made of, and points that are given.
PLACES = {task.answer.field: task.answer.check for task in TASKS.values() if task.answer.check}
PLACES["input_points"] = check_points


def prompts_of(annotation):
    """The templates of an annotation's style or task; () if neither has any."""
    form = FORMS.get(annotation.get("style"))
    return form.prompts if form and form.prompts else TASKS[annotation["task"]].prompts


def check_annotation(a, kind, n_media):
    """BadRecord if annotation `a` is not one, or not one of a record with `n_media` media of this kind."""
    task = a.get("task") if isinstance(a, dict) else a
    if not isinstance(a, dict) or not is_text(task) or task not in TASKS:
        raise BadRecord("unknown task", f"{task!r}; one of {', '.join(TASKS)}")
    if kind not in TASKS[task].media:
        raise wrong_field(f"task {task} in a record with {kind or 'no media'}")
    for names, is_fine, meaning in OPTIONAL_FIELDS:
        for name in names:
            if name in a and not is_fine(a[name]):
                raise wrong_field(f"{name} is {a[name]!r}, not {meaning}")

    # What is asked and what is answered: a chat, a multiple choice, or a prompt with an answer.
    field = TASKS[task].answer.field
    if "messages" in a:
        if not is_chat(a["messages"]):
            raise wrong_field("messages must alternate user and assistant, with content, and end with an answer")
    elif "options" in a:
        correct = a.get("correct")
        if not (a.get("question") and isinstance(correct, int) and 0 <= correct < len(a["options"]) > 1):
            raise wrong_field("options need a question, and correct: the place of the right one, from 0")
    elif field not in a and "answer" not in a:
        raise wrong_field(f"task {task} without answer, {'' if field == 'answer' else f'{field}, '}options or messages")
    elif not (a.get("prompt") or prompts_of(a)):
        raise wrong_field(f"task {task} without a prompt")

    for name, check in PLACES.items():
        if name in a:
            check(a[name], kind, n_media)
    if "images" in a and max(a["images"]) >= n_media:
        raise wrong_field(f"images {a['images']} of {n_media}")


def prompt_of(annotation, kind, rng, grammar="spec"):
    """The prompt of an annotation, or a template of its style or task, drawn with `rng` and filled from its fields."""
    def clock(seconds):  # half of the times as people would type a clock
        if rng.random() < 0.5:
            return f"{seconds:.1f}"
        return f"{int(seconds // 3600):02d}:{int(seconds // 60 % 60):02d}:{seconds % 60:04.1f}"

    if annotation.get("prompt"):
        return annotation["prompt"]
    label = annotation.get("label", "objects")
    images = "all images"
    if "images" in annotation:
        names = [f"image_{i + 1}" if grammar == "released" else f"image {i}" for i in annotation["images"]]
        images = " and ".join(names)
    template = rng.choice(prompts_of(annotation))
    return template.format(
        label=label, fps=number(annotation.get("fps", 2), 2), question=annotation.get("question", ""),
        input_points=format_points(annotation.get("input_points", []), kind, grammar, label),
        selected_images=images, selected_label=f"the {label} in {images}",
        start_time=clock(annotation.get("start_time", 0)), end_time=clock(annotation.get("end_time", 0)),
        timestamp=clock(annotation.get("timestamp", 0)))


def answer_of(annotation, kind, grammar="spec"):
    """The answer of an annotation as text: its own, or what its task makes of the field that holds it."""
    if "answer" in annotation:
        return annotation["answer"]
    return TASKS[annotation["task"]].answer.write(annotation, kind, grammar)


# Templates of multiple choice: the first for evaluation, the others for training.
OPTIONS = ("{question}\nOnly return the correct answer option.\n{options}",
           "{question}\n{options}", "{question} Choose from:\n{options}", "{options}\n\n{question}",
           "{question}\nWhich of these is right?\n{options}")


def multiple_choice(question, options, correct, rng=None):
    """(prompt, answer) of a question whose `correct`-th option is right. Without an rng the one template of
    evaluation; with it template and order are drawn, and one list in five has no letters."""
    order = list(range(len(options)))
    template = OPTIONS[0]
    lettered = True
    if rng:
        rng.shuffle(order)
        if rng.random() > 0.1:
            template = rng.choice(OPTIONS[1:])
            lettered = rng.random() < 0.8 or not options[correct].strip()
    lines = []
    for k, i in enumerate(order):
        letter = f"{chr(ord('A') + k)}. " if lettered else ""
        lines.append(letter + options[i])
    return template.format(question=question, options="\n".join(lines)), lines[order.index(correct)]


# The released models were given the set that an academic question comes from ("vqa2: What is ..."), which makes their
# answers as short as that set's. The styles in which people talk have no such prefix, nor has multiple choice.
NO_PREFIX = frozenset("""
    point_count pointing cosyn_point user_qa long_caption short_caption video_long_caption video_short_caption
    text_sft video_point_track_per_frame video_point_track_start_end video_single_point_track_start_end
    video_transcript video_clip_caption_start_end video_clip_caption_start_end_in_seconds
    video_clip_transcript_start_end video_clip_transcript_start_end_in_seconds video_frame_caption_timestamp
    video_frame_caption_timestamp_in_seconds correction_qa video_point video_point_count video_count
    video_count_point multi_image_pointing multi_image_counting multi_image_point_then_count
    multi_image_count_then_point video_multiple_choice a_okvqa_mc ai2_diagram ai2_diagram_no_letter science_qa
    eval_multiple_choice multi_image_mc multi_image_mc_exp mantis_instruct_mc eval_multi_image_mc""".split())


def styled(prompt, style):
    """A prompt as the released models saw it: "style: prompt", or as it is for a style without a prefix."""
    return prompt if not style or style in NO_PREFIX else f"{style}: {prompt}".rstrip()
