"""
Records: one line of JSONL, checked before anything else sees it.
"""
import json

from lib.media import MAX_PIXELS
from lib.text import PROMPTS


# task -> (media it is about, weight of an answer token). None: any media, or none.
TASKS = {"image_caption": ("image", 1.0), "image_qa": ("image", 1.0), "image_pointing": ("image", 2.0),
         "counting": (None, 1.5), "multi_image_qa": ("images", 1.0), "multi_image_pointing": ("images", 2.0),
         "video_caption": ("video", 1.0), "video_qa": ("video", 1.0), "video_pointing": ("video", 2.0),
         "video_tracking": ("video", 2.0), "text": (None, 1.0)}

# what a line may be about, and the kinds of points `format_points` knows
MEDIA = ("image", "images", "video")

# Rows left out on purpose: counted, but they do not stop a run.
NOT_BAD = NO_VIDEO, CLOSED = "no reader for video in this stage", "from a closed model"

MAX_LINE = 32 << 20  # bytes; a longer line is not read


class BadRecord(Exception):
    """A line that cannot be used. `reason` is what it is counted under."""

    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def parse_record(line):
    """Bytes of one line -> the row as a dict; BadRecord says what is wrong with it."""
    if len(line) >= MAX_LINE:
        raise BadRecord("line too long", f"more than {MAX_LINE >> 20} MiB")
    try:
        row = json.loads(line.decode("utf-8-sig"))
        if b"\\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()  # JSON can spell half a character, which is no text
    except UnicodeError:
        raise BadRecord("not UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise BadRecord("malformed JSON", str(e)) from None
    if not isinstance(row, dict):
        raise BadRecord("wrong field", f"a line must be an object, not {type(row).__name__}")
    kinds = [k for k in MEDIA if k in row]
    if len(kinds) > 1:
        raise BadRecord("wrong field", f"{' and '.join(kinds)} in one line")
    kind = kinds[0] if kinds else None
    names = row[kind] if kind == "images" else [row[kind]] if kind else []
    named = isinstance(names, list) and all(isinstance(n, str) and n for n in names)
    if not named or kind == "images" and not names:
        raise BadRecord("wrong field", f"{kind} is {row[kind]!r}")
    check_size(row)
    by = row.get("provenance", [])
    if not isinstance(by, list) or not all(isinstance(p, dict) for p in by):
        raise BadRecord("wrong field", "provenance must be a list of objects")
    if kind == "video":
        check_clip(row)
    if not isinstance(row.get("annotations"), list) or not row["annotations"]:
        raise BadRecord("wrong field", "annotations must be a list with something in it")
    for a in row["annotations"]:
        check_annotation(a, kind, len(names))
    return row

whole = lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**31

is_text = lambda v: isinstance(v, str)


def is_time(value):
    """Whether a JSON value is a number of seconds from 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9


def check_size(row):
    """width and height save reading a picture's header; one without the other is a slip."""
    size = row.get("width"), row.get("height")
    given = [n for n, key in zip(size, ("width", "height")) if key in row]
    if len(given) == 1 or not all(map(whole, given)) or given and not 0 < given[0] * given[1] <= MAX_PIXELS:
        raise BadRecord("wrong field", f"width and height are pixels, both or neither: {size[0]!r}, {size[1]!r}")


def check_clip(row):
    """duration saves reading a video's header; start, end and every other time count from the start of the
    file."""
    lines = row.get("subtitles", [])
    fine = isinstance(lines, list) and all(isinstance(s, dict) and is_time(s.get("start"))
                                           and is_time(s.get("end"))
                                           and isinstance(s.get("text"), str) for s in lines)
    if not (fine and all(is_time(row.get(key, 1)) for key in ("start", "end", "duration", "fps"))):
        raise BadRecord("wrong field",
                     "start, end, duration are seconds, fps a number; subtitles are [{start, end, text}]")

# What an annotation may say: (fields, whether a value is fine, what it should be).
ANNOTATION_FIELDS = ((("prompt", "answer", "label", "style", "question"), is_text, "text"),
                     (("fps", "start_time", "end_time", "timestamp"), is_time, "a number from 0"),
                     (("options",),
                      lambda v: isinstance(v, list) and all(map(is_text, v)), "a list of texts"),
                     (("images",), lambda v: isinstance(v, list) and v and all(map(whole, v)),
                      "a list of picture numbers"))


def check_annotation(a, kind, n_media):
    if not isinstance(a, dict) or not is_text(a.get("task")) or a["task"] not in TASKS:
        raise BadRecord("unknown task",
                     f"{a.get('task') if isinstance(a, dict) else a!r}; one of {', '.join(TASKS)}")
    about = TASKS[a["task"]][0]
    if about and about != kind or a["task"] == "text" and kind:
        raise BadRecord("wrong field", f"task {a['task']} on a line with {kind or 'no media'}")
    for keys, fine, what in ANNOTATION_FIELDS:
        for key in keys:
            if key in a and not fine(a[key]):
                raise BadRecord("wrong field", f"{key} is {a[key]!r}, not {what}")
    if "messages" in a:
        m = a["messages"]
        fine = isinstance(m, list) and m and len(m) % 2 == 0 and all(
            isinstance(x, dict) and isinstance(x.get("content"), str)
            and x.get("role") == ("user", "assistant")[i % 2]
            for i, x in enumerate(m))
        if not fine:
            raise BadRecord("wrong field",
                         "messages must alternate user and assistant, with content, and end with an answer")
    elif "options" in a:
        if not (a.get("question") and isinstance(a.get("correct"), int)
                and 0 <= a["correct"] < len(a["options"]) > 1):
            raise BadRecord("wrong field",
                         "options need a question, and correct: the place of the right one, from 0")
    elif "points" not in a and "answer" not in a:
        raise BadRecord("wrong field", f"task {a['task']} without answer, points, options or messages")
    elif not (a.get("prompt") or a["task"] in PROMPTS or a.get("style") in PROMPTS):
        raise BadRecord("wrong field", f"task {a['task']} without a prompt")
    for key in ("points", "input_points"):
        if key in a:
            check_points(a[key], kind, n_media)
    if "images" in a and not all(i < n_media for i in a["images"]):
        raise BadRecord("wrong field", f"images {a['images']} of {n_media}")


def check_points(points, kind, n_media):
    if not isinstance(points, list) or kind is None:
        raise BadRecord("wrong field", "points must be a list, on a line with a picture or a video")
    for p in points:
        if not isinstance(p, dict) or not whole(p.get("id")):
            raise BadRecord("wrong field", f"point {p!r} needs a whole number id from 0")
        if not is_unit(p.get("x")) or not is_unit(p.get("y")):
            raise BadRecord("point outside [0, 1]", f"x {p.get('x')!r}, y {p.get('y')!r}")
        if kind == "images" and not (whole(p.get("image")) and p["image"] < n_media):
            raise BadRecord("wrong field", f"point names image {p.get('image')!r} of {n_media}")
        if kind == "video" and not is_time(p.get("t")):
            raise BadRecord("wrong field", f"point at time {p.get('t')!r}")


class BadRecords:
    """What could not be used: counted by dataset and reason, and listed once each in `log`, bad_rows.jsonl."""

    def __init__(self, log, failed):
        self.log, self.last = log, []
        self.listed = {(r["where"], r["reason"]) for r in map(json.loads, log.kept)}
        self.failed = failed  # {dataset: {reason: n}} of what was planned and then could not be decoded

    def note(self, step, events):
        for name, where, reason, detail in events:
            if reason == "failed to decode":
                mine = self.failed.setdefault(name, {})
                mine[reason] = mine.get(reason, 0) + 1
            if (where, reason) not in self.listed:
                self.listed.add((where, reason))
                self.log.write(step=step, dataset=name, where=where, reason=reason, detail=detail)
                self.last = [*self.last[-4:], f"  {where}: {reason}: {detail}"]

    def counts(self, state):
        """{dataset: {reason: n}}"""
        return {name: state["bad"].get(name, {}) | self.failed.get(name, {})
                for name in state["bad"] | self.failed}

    def too_many(self, state, max_bad):
        """Why to stop: more than `max_bad` of what was seen could not be used. Rows without a reader yet are not bad
        ones."""
        counts = self.counts(state)
        bad, seen = sum(n for c in counts.values() for n in c.values()), max(state["seen"], 100)
        return bad > max_bad * seen and "\n".join([
            f"{bad} of {seen} rows cannot be used, more than --max_bad {max_bad}: {counts}", *self.last,
            f"{self.log.path} lists them all"])


def is_unit(value):
    """Whether a JSON value is a finite number in [0, 1]."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
