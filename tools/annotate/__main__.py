"""
Making data: people narrate videos, open language models help, filters check, people decide.

    caption   video ─► narration ─► clips with times ─► frames described ─► one dense caption ─► checks
    qa        caption ─► questions ─► answered from the caption, and without it ─► filters
    review    a page on this machine: accept, edit, reject; place points, track frame by frame (review.py)
    report    what each step let through, and what not and why

    python -m tools.annotate demo                                        # all of it on toy videos, without a server
    python -m tools.annotate caption clips/*.mp4 --out clips/captions.jsonl \\
        --url http://localhost:8000/v1 --model Qwen3-VL-8B-Instruct --licence Apache-2.0
    python -m tools.annotate qa clips/captions.jsonl --out clips/qa.jsonl --url ... --model ... --licence ...
    python -m tools.annotate review clips/qa.jsonl --who ann
    python -m tools.annotate report clips/qa.jsonl

FILE.jsonl trains as it is: the records that passed, with the decisions of people applied. FILE.work/ beside it
has rows.jsonl, every record and why it was left out; decisions.jsonl, to which people only append; and
requests/, the answers of servers by the hash of the request: a run that was stopped repeats none of them.

Nothing is distilled from a closed model: such hosts and names are refused. --allow_closed lets them through
and marks the records, and training leaves marked records out. ANNOTATE_API_KEY is sent to servers that want a key.
"""
import argparse
import base64
import collections
import concurrent.futures
import datetime
import functools
import glob
import getpass
import html
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import webbrowser

import av
import numpy as np
import requests
from PIL import Image
from tqdm import tqdm

from lib import toy
from lib.errors import BadMedia, UserError
from lib.media import inside_folder, load_frames, open_video, sample_times, video_duration
from lib.records import media_kind
from lib.tasks import MEDIA, TASKS
from sample import Chat, bounded, load
from tools.annotate.review import Reviewer, Work, digest, jpeg, read_records, settled, write_whole
from tools.prepare.fetch import NetError, is_loopback, patiently
from lib.page import STYLE, table

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

STAND_IN = "rule-based stand-in, no language model"
# Who sells answers of models whose weights are not published, and what such models are called elsewhere.
CLOSED_HOSTS = re.compile(r"(^|\.)(openai\.com|openai\.azure\.com|anthropic\.com|x\.ai|cohere\.(com|ai)|"
                          r"(generativelanguage|aiplatform)\.googleapis\.com|perplexity\.ai|ai21\.com|"
                          r"bedrock[\w-]*\.[\w-]+\.amazonaws\.com)$")
CLOSED_MODELS = re.compile(r"gpt-[3-9]|chatgpt|claude|gemini|(^|/)o[134](-|$)|"
                           r"qwen[\d.]*-(vl-)?(max|plus)", re.I)
REFUSAL = re.compile(r"\s*((i\W?m |i am )?sorry|i (can ?not|can\W?t|won\Wt|must decline)\b|"
                     r"(i\W?m|i am) (unable|not able)|as an ai\b|unfortunately, i\b)", re.I)
LONGEST = 12000  # characters of an answer; a model that writes more has lost its way


class Unusable(Exception):
    """A step gave nothing that can be used: "step: reason", under which it is counted."""


# ---- a language model behind a server ----------------------------------------------------------------------

def parse_list(text):
    """The JSON list in an answer; ValueError if there is none."""
    begin = text.find("[")
    end = text.rfind("]") + 1
    return json.loads(text[begin:end])


def parse_bool(text):
    """The JSON true or false that an answer is, fenced or not; ValueError if it is anything else."""
    match = re.fullmatch(r"\W*(json)?\W*(true|false)\W*", text, re.I)
    if not match:
        raise ValueError(text)
    return match[2].lower() == "true"


# These texts are in the hash of a request: change a word, and all requests of its step are sent again.
PROMPTS = dict(
    describe="This is the frame at {t:g} s of a video. Describe in two or three sentences what can be seen: "
             "people, things, how they look and where they are, actions, written text. Nothing else.",
    merge="A person told what happens in a video clip:\n{narration}\n\nIts frames were described one by one:"
          "\n{frames}\n\nWrite one dense caption of the clip, in the order of time, with every detail that "
          "was said or seen. Where they disagree the person is right. Invent nothing. The caption alone.",
    contradictions="A person said of a video clip:\n{narration}\n\nDescriptions of its frames:\n{frames}\n\n"
                   "Which statements of the person do the frames contradict? Not being seen is no "
                   "contradiction. Answer with a JSON list of strings, [] if there are none.",
    questions="A video shows this:\n{caption}\n\nWrite {n} different questions that this answers and that "
              "nobody can answer without it. Answer with a JSON list of "
              '{{"question": ..., "answer": a few words, "wrong": three wrong answers as plausible as the '
              "right one, or [] for an open question}}.",
    ambiguous="A video shows this:\n{caption}\n\nQuestion: {question}\nAs it is worded, could the question "
              "mean more than one thing or have several right answers? Answer with JSON, true or false.",
    answerable="A video shows this:\n{caption}\n\n{question}\nAnswer from this alone, in a few words; if it "
               'does not say, answer "unknown".',
    guessable="You cannot see the video this question is about. Guess the likeliest answer, in a few words.\n"
              "{question}",
    agree="{question}\nOne answer: {one}\nAnother: {other}\nDo they say the same? Answer with JSON, true or "
          "false.")
# How what comes back is read, where it is not plain text.
READ = dict(contradictions=parse_list, questions=parse_list, ambiguous=parse_bool, agree=parse_bool)


def today():
    """The date, as records have it."""
    return datetime.date.today().isoformat()


def check_server(url, model, allow_closed):
    """Whether what answers at a URL is closed. Closed ones are refused unless allowed, as is plain http."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        port = parts.port or 80
    except ValueError:  # brackets that do not close, a port above 65535
        host = None
        port = None
    if not host or not port or parts.scheme not in ("http", "https"):
        raise UserError(f"{url}: not the URL of a server; e.g. http://localhost:8000/v1")
    if parts.scheme == "http" and not is_loopback(host):
        raise UserError(f"{url}: only https, except on this machine; e.g. ssh -L {port}:localhost:{port} "
                        f"{host}, and then http://localhost:{port}{parts.path}")
    by_host = CLOSED_HOSTS.search(host)
    closed = bool(by_host or CLOSED_MODELS.search(model))
    if closed and not allow_closed:
        speaker = host if by_host else f"model {model}"
        raise UserError(f"{url}: {speaker} is a closed model's, whose answers are not to be distilled; use an "
                        "open one; or --allow_closed marks the records, and training leaves them out")
    return closed


class Client:
    """Sends requests to servers. Every finished one is cached in `folder`, by the hash of what was sent."""

    def __init__(self, args):
        self.folder = os.path.join(Work(args.out).folder, "requests")
        self.timeout = args.timeout
        self.allow_closed = args.allow_closed
        self.stop = args.stop     # an Event: no further request is sent
        self.locks = {}           # hash of a request -> Lock
        self.lost = 0             # requests in a row without an answer
        self.headers = {}
        key = os.environ.get("ANNOTATE_API_KEY")
        if key:
            self.headers["Authorization"] = f"Bearer {key}"

    def once(self, key, ask):
        """What ask() gave the first time, in this run or an earlier one."""
        path = os.path.join(self.folder, key + ".json")
        with self.locks.setdefault(key, threading.Lock()):  # two records may lead to the same request
            if self.stop.is_set():
                raise Unusable("stopped")
            if not os.path.exists(path):
                write_whole(path, json.dumps(ask()))
            with open(path, encoding="utf-8") as f:
                return json.load(f)

    def attempt(self, url, trouble, request):
        """One POST; what goes wrong is appended to `trouble`."""
        if self.stop.is_set():
            raise Unusable("stopped")
        try:
            response = requests.post(url, headers=self.headers, timeout=(10, self.timeout),  # to connect; to answer
                                     allow_redirects=False, **request)  # a redirect could lead to any host
        except requests.RequestException as e:
            trouble.append(type(e).__name__)
            raise
        if not response.ok:
            trouble.append(str(response.status_code))
        return response

    def send(self, step, url, trouble=(), **request):
        """{step, reply, trouble: what went wrong before, date}. Unusable where there is no reply, UserError
        where there will be none to other requests either."""
        trouble = list(trouble)
        try:
            response = patiently(lambda: self.attempt(url, trouble, request), f"{step}: {url}")
        except NetError as e:
            self.lost += 1
            if self.lost > 8:
                raise UserError(f"{url}: no answer to {self.lost} requests in a row ({e}); the same command "
                                "goes on where this one stopped") from None
            raise Unusable(f"{step}: no answer") from None
        self.lost = 0
        if response.is_redirect or response.status_code in (401, 403, 404):
            raise UserError(f"{url}: status {response.status_code}, {response.text[:200]!r}; wrong URL, model "
                            "or key?")
        if not response.ok:
            raise Unusable(f"{step}: status {response.status_code}")
        try:  # JSON can spell half a character, which is no text
            text = json.dumps(response.json(), ensure_ascii=False).encode(errors="replace")
            reply = json.loads(text)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict) or not {"choices", "segments", "text"} & reply.keys():
            raise Unusable(f"{step}: no answer of the protocol")
        # the reply names the model that answered
        check_server(url, str(reply.get("model", "")), self.allow_closed)
        return dict(step=step, reply=reply, trouble=trouble, date=today())


def read_reply(reply):
    """(text, why it cannot be used or None) of a chat completion."""
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        end = choice.get("finish_reason")
        text = (message.get("content") or "").rpartition("</think>")[2]  # a model that reasons does so first
    except (LookupError, TypeError, AttributeError):
        return "", "no answer of the protocol"
    if message.get("refusal") or end == "content_filter" or REFUSAL.match(text):
        return text, "refusal"
    if end == "length" or len(text) > LONGEST:
        return text, "overlong answer"
    if not text.strip():
        return text, "empty answer"
    return text, None


def finite(value):
    """A number of seconds, or None."""
    if value is None or not math.isfinite(float(value)):
        return None
    return float(value)


def bare(text):
    """An answer without case, quotes and full stop."""
    return text.strip(" .\"'").lower()


class Served:
    """A model behind a server, for one record; `notes` becomes the record's provenance."""

    def __init__(self, client, url, model, licence):
        self.client = client
        self.url = url.rstrip("/")
        self.model = model
        self.licence = licence
        self.notes = {}  # (step, model) -> who did it

    def note(self, step, model, date, **prompt):
        note = dict(step=step, by="model", model=model, licence=self.licence, date=date, **prompt)
        if check_server(self.url, model, self.client.allow_closed):
            note["closed"] = True
        self.notes[step, model] = note

    def ask(self, step, *images, **fields):
        """The answer to a step's prompt, with JPEG images or with `fields` filled in, parsed as READ says. An
        answer that is empty or cannot be parsed is asked for once more; Unusable where none is usable."""
        content = [dict(type="text", text=PROMPTS[step].format(**fields))]
        for image in images:
            url = "data:image/jpeg;base64," + base64.b64encode(image).decode()
            content.append(dict(type="image_url", image_url=dict(url=url)))
        messages = [dict(role="user", content=content)]
        trouble = []
        for _ in range(2):
            body = dict(model=self.model, temperature=0, max_tokens=4096, messages=messages)
            cached = self.client.once(digest(body), lambda: self.client.send(
                step, self.url + "/chat/completions", trouble, json=body))
            text, problem = read_reply(cached["reply"])
            model = str(cached["reply"].get("model") or self.model)
            self.note(step, model, cached["date"], prompt=digest(PROMPTS[step])[:16])
            if problem is None:
                try:
                    return READ.get(step, str.strip)(text)
                except (ValueError, RecursionError):
                    problem = "invalid JSON"
            if problem not in ("invalid JSON", "empty answer"):
                break
            trouble = [problem]
            # The second request is another one, or the cache would give the same answer.
            messages = [*messages, dict(role="assistant", content=text),
                        dict(role="user", content="That cannot be read. Only what was asked for, please.")]
        raise Unusable(f"{step}: {problem}")

    def transcribe(self, name, sound):
        """[{start, end, text}] of an audio file; end is None where the server gives no times."""
        form = dict(model=self.model, response_format="verbose_json")
        cached = self.client.once(digest(form, sound), lambda: self.client.send(
            "narration", self.url + "/audio/transcriptions", data=form, files=dict(file=(name, sound))))
        self.note("narration", self.model, cached["date"])
        try:
            segments = cached["reply"].get("segments")
            if not segments:
                segments = [dict(start=0, end=None, text=cached["reply"]["text"])]
            return [dict(start=finite(s["start"]) or 0.0, end=finite(s["end"]), text=s["text"].strip())
                    for s in segments]
        except (LookupError, TypeError, ValueError, AttributeError):
            raise Unusable("narration: no answer of the protocol") from None

    def answers(self, step, question, **fields):
        """Whether the model, given the fields alone, answers a question as the question's own answer does."""
        options = sorted([question["answer"], *question["wrong"]]) if question["wrong"] else []
        prompt = "Question: " + question["question"] + "".join(f"\n- {option}" for option in options)
        answer = self.ask(step, question=prompt, **fields)
        if bare(answer) == bare(question["answer"]):
            return True
        return self.ask("agree", question=prompt, one=question["answer"], other=answer)


def own_checkpoint(args):
    """describe(image) -> (what one of our own checkpoints answers, provenance), cached like a server's."""
    folder = args.checkpoint
    prompt = "Describe the image."
    lock = threading.Lock()
    client = Client(args)
    try:
        model = load(folder, args.device)
    except ValueError as e:
        raise UserError(str(e)) from None
    weights = os.path.realpath(folder), os.stat(folder).st_mtime_ns  # `latest` is another one next week

    def ask(image):
        with lock, tempfile.TemporaryDirectory() as aside:  # one image at a time, whatever the concurrency
            path = os.path.join(aside, "frame.jpg")
            with open(path, "wb") as f:
                f.write(image)
            text = "".join(Chat(*model, [path]).ask(prompt))
        reply = dict(choices=[dict(message=dict(content=text))])
        return dict(step="describe", reply=reply, trouble=[], date=today())

    def describe(image):
        cached = client.once(digest(weights, prompt, image), lambda: ask(image))
        text, problem = read_reply(cached["reply"])
        if problem:
            raise Unusable(f"describe: {problem}")
        return text.strip(), dict(step="describe", by="model", model=folder, licence="as its weights",
                                  prompt=digest(prompt)[:16], date=cached["date"])
    return describe


# ---- caption -----------------------------------------------------------------------------------------------

# 00:01:02,500 of .srt, or 01:02.500 of .vtt; some tools leave out the fraction
STAMP = r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)"
CUE = re.compile(rf"\s*{STAMP}\s*-->\s*{STAMP}")
# <i>, <c.yellow>, <v Ann>, <font color=red>, the times of words <00:00:01.500>, {\an8}; but not "3 < 4 > 2"
MARKUP = re.compile(r"</?(?:[bcisu]|ruby|rt)(?:\.[^<>\s]*)?>|</?(?:v|lang|font)(?:[.\s][^<>]*)?>|<[\d:.]+>|\{\\[^}]*\}",
                    re.I)


def seconds_of(hours, minutes, seconds):
    """The parts of a STAMP in seconds."""
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))


def read_text(path):
    """The text of a file in UTF-8, or in UTF-16 with its mark at the front."""
    with open(path, "rb") as f:
        content = f.read()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    return content.decode(encoding, errors="replace")


def read_cues(content):
    """[(start, end, lines shown)] of the text of an .srt or .vtt file."""
    cues = []
    lines = None  # of the cue that is open
    for line in content.splitlines():
        times = CUE.match(line)
        if times:
            if lines and lines[-1].isdigit():
                lines.pop()  # the number of this cue, with no blank line before it
            lines = []
            cues.append((seconds_of(*times.groups()[:3]), seconds_of(*times.groups()[3:]), lines))
        elif not line:
            lines = None
        elif lines is not None:
            text = " ".join(html.unescape(MARKUP.sub("", line)).split())
            if text:
                lines.append(text)
    return cues


def read_narration(path, duration):
    """[{start, end, text}] of an .srt, .vtt or .txt file; plain text is about the whole video.

    In captions that roll, as YouTube's automatic ones, a cue repeats the line before and adds one, and cues of 10 ms
    show what is there: each line counts once.
    """
    content = read_text(path)
    if path.endswith(".txt"):
        text = " ".join(content.split())
        return [dict(start=0.0, end=duration, text=text)] if text else []
    segments = []
    shown = []  # lines of the cue before, if this one follows at once
    shown_until = 0.0
    for start, end, lines in read_cues(content):
        if start > shown_until + 0.05:
            shown = []
        added = [line for line in lines if line not in shown]
        if not added and end - start > 0.05:
            added = lines  # said again
        shown = lines
        shown_until = end
        if added and start < duration:
            segments.append(dict(start=start, end=min(end, duration), text=" ".join(added)))
    return segments


def sound_of(path):
    """The first audio track of a video as the bytes of a WAV file, 16 kHz mono; None without one."""
    sound = io.BytesIO()
    container, _ = open_video(path)
    with container, av.open(sound, "w", format="wav") as wav:
        if not container.streams.audio:
            return None
        stream = wav.add_stream("pcm_s16le", 16000, layout="mono")
        resampler = av.AudioResampler("s16", "mono", 16000)
        # None at the end makes resampler and encoder give what they still hold
        for frame in itertools.chain(container.decode(container.streams.audio[0]), [None]):
            for part in resampler.resample(frame):
                wav.mux(stream.encode(part))
        wav.mux(stream.encode(None))
    return sound.getvalue()


def file_beside(path, endings):
    """The file of the same name with one of these endings, perhaps after a language as in clip.en.vtt; or None."""
    base = os.path.splitext(path)[0]
    for ending in endings:
        for name in (base + ending, *sorted(glob.glob(glob.escape(base) + ".*" + ending))):
            if os.path.exists(name):
                return name
    return None


def file_date(path):
    return datetime.date.fromtimestamp(os.path.getmtime(path)).isoformat()


def narration_of(path, duration, speech_model, narrator):
    """([{start, end, text}], provenance) of a video's narration: text beside it, else speech beside it or in
    it, which the speech model transcribes."""
    person = dict(by=STAND_IN) if narrator == STAND_IN else dict(by="people", who=narrator)
    text = file_beside(path, (".srt", ".vtt", ".txt"))
    if text:
        return read_narration(text, duration), [dict(step="narration", **person, date=file_date(text))]
    if not speech_model:
        return [], []
    recording = file_beside(path, (".wav", ".mp3", ".m4a", ".flac", ".ogg"))
    if recording:
        name = os.path.basename(recording)
        with open(recording, "rb") as f:
            sound = f.read()
    else:
        name = "narration.wav"
        sound = sound_of(path)
    if not sound:
        return [], []
    # Speech models name times after the end, or none at all.
    segments = []
    for segment in speech_model.transcribe(name, sound):
        end = duration if segment["end"] is None else min(segment["end"], duration)
        if segment["text"] and segment["start"] < duration:
            segments.append(dict(segment, end=end))
    speech = dict(step="speech", **person, date=file_date(recording or path))
    return segments, [speech, *speech_model.notes.values()]


def cut_clips(segments, duration, longest):
    """[(start, end, segments)]: the video, cut where a segment begins, into clips of at most `longest`
    seconds unless a segment alone is longer."""
    clips = [[]]
    begin = 0.0
    for segment in sorted(segments, key=lambda s: s["start"]):
        # segments that begin together stay together, or a clip would last no time
        if clips[-1] and segment["end"] - begin > longest and segment["start"] > begin:
            clips.append([])
            begin = segment["start"]
        clips[-1].append(segment)
    cuts = [0.0, *(clip[0]["start"] for clip in clips[1:]), duration]
    return [(round(start, 3), round(end, 3), clip) for start, end, clip in zip(cuts, cuts[1:], clips)]


# The commonest words of a language give it away. A caption in another one passes with --language any.
LANGUAGES = dict(en="the a an and of to in is it on with at for his her",
                 de="der die das und ist ein eine auf im nicht den",
                 fr="le la les et un une est dans sur avec des du",
                 es="el los las y un una en con por que su")


def faults(text, shortest, language):
    """The faults of a narration or a caption by itself: length, repetition, language."""
    words = re.findall(r"\w+", text.lower())
    if len(words) < shortest:
        yield "too short"
    elif len(words) > 1200:
        yield "too long"
    if len(words) >= 8:
        # a text that goes in circles has few different runs of four words
        runs = [tuple(words[i:i + 4]) for i in range(len(words) - 3)]
        if len(set(runs)) < 0.6 * len(runs) or len(set(words)) < 0.15 * len(words):
            yield "repetition"
    if language != "any":
        hits = {}
        for name, common in LANGUAGES.items():
            common = common.split()
            hits[name] = sum(word in common for word in words)
        least = 0.04 * (len(words) - 20)  # a short text may do without any of them
        if hits[language] < max(least, *hits.values()):
            yield f"not in {language}"


def clip_records(path, args, speech_model):
    """The records of a video, one per clip, with its narration and no frame described yet; where that cannot be
    had, one record with the reason."""
    name = os.path.relpath(os.path.abspath(path), os.path.dirname(os.path.abspath(args.out)))
    problem = None
    try:
        duration = video_duration(path)
        segments, provenance = narration_of(path, duration, speech_model, args.narrator)
    except Unusable as e:
        problem = str(e)
    except (BadMedia, av.FFmpegError):
        problem = "narration: unreadable video"
    if problem:
        annotation = dict(task="video_caption", answer="", left_out=problem)
        return [dict(id=name, video=name, annotations=[annotation])]
    return [dict(id=f"{name} {start:g}-{end:g}", video=name, start=start, end=end, narration=narration, frames=[],
                 duration=round(duration, 3), annotations=[dict(task="video_caption", answer="")],
                 provenance=list(provenance))
            for start, end, narration in cut_clips(segments, duration, args.clip_seconds)]


def describe_frames(record, args, lm, own_model):
    """Fill in record["frames"], at most one a second, and who described them."""
    start = record["start"]
    # short of the end, where the last frame is still shown
    length = max(record["end"] - start - 0.1, 0)
    times = [round(float(t) + start, 2) for t in sample_times(length, args.frames, 1.0)]
    path = os.path.join(os.path.dirname(args.out), record["video"])
    for t, pixels in zip(times, load_frames(path, times)):
        image = jpeg(pixels, 768)
        if own_model:
            text, who = own_model(image)
            # frames described on two days have two notes
            if who not in record["provenance"]:
                record["provenance"].append(who)
        else:
            text = lm.ask("describe", image, t=t)
        record["frames"].append(dict(t=t, text=text))


def caption_record(record, args, lm, own_model=None):
    """The record of a clip, with its caption; own_model(image) describes the frames, if not the language model.
    Where it cannot go on it keeps what it has, and the step at which it stopped."""
    annotation = record["annotations"][0]
    if "left_out" in annotation:
        return record
    narration = " ".join(segment["text"] for segment in record["narration"])
    try:
        problems = list(faults(narration, 3, args.language)) if narration else ["none"]
        if problems:
            raise Unusable(f"narration: {problems[0]}")
        describe_frames(record, args, lm, own_model)
        frames = "\n".join(f"{frame['t']:g} s: {frame['text']}" for frame in record["frames"])
        annotation["answer"] = lm.ask("merge", narration=narration, frames=frames)
        problems = list(faults(annotation["answer"], 8, args.language))
        if problems:
            raise Unusable(f"check: {problems[0]}")
        contradictions = lm.ask("contradictions", narration=narration, frames=frames)
        record["contradictions"] = list(map(str, contradictions))
        if record["contradictions"]:
            raise Unusable("check: narration and frames disagree")
    except Unusable as e:
        annotation["left_out"] = str(e)
    except BadMedia:
        annotation["left_out"] = "describe: unreadable video"
    record["provenance"] += lm.notes.values()
    return record


# ---- questions and filters ---------------------------------------------------------------------------------

NUMBERS = {w: str(i) for i, w in enumerate("zero one two three four five six seven eight nine ten".split())}
EMPTY = set("a an the of to in on at is are was were be been do does did has have had what which who whom "
            "whose where when why how many much often with and or it its his her him their there this that "
            "they he she them from for by as into out one".split())


def stem(word):
    """A word without the endings that change least of its meaning; numbers as digits."""
    if word in NUMBERS:
        return NUMBERS[word]
    if len(word) >= 4:
        for ending in ("ing", "en", "ed", "es", "s", "y", "e"):
            if word.endswith(ending) and len(word) - len(ending) > 2:
                return word[:-len(ending)]
    return word


def content_words(text):
    """The words of a text that carry its meaning, as a set of stems."""
    words = re.findall(r"[\w.]*\w", text.lower())
    return {stem(word) for word in words if word not in EMPTY}


def is_yes_no(question):
    """Whether a question's answer is yes or no."""
    return question["answer"].lower().strip(" .") in ("yes", "no")


def near_duplicates(question, other):
    """Whether two questions mean the same: the same answer, and most of their words."""
    if content_words(question["answer"]) != content_words(other["answer"]):
        return False
    words = content_words(question["question"])
    other_words = content_words(other["question"])
    return len(words & other_words) >= 0.6 * len(words | other_words)


def reason_to_drop(question, passed, caption, lm):
    """Why a question is left out, or None; what costs nothing first. passed: those of its record that passed."""
    if any(near_duplicates(question, other) for other in passed):
        return "duplicate: near another one"
    if is_yes_no(question):
        yes_no = sum(map(is_yes_no, passed))
        if 3 * (yes_no + 1) > len(passed) - yes_no:
            return "yes/no: more than one in four"
    if lm.ask("ambiguous", question=question["question"], caption=caption):
        return "ambiguous: several meanings"
    if not lm.answers("answerable", question, caption=caption):
        return "unanswerable: not from the caption"
    if lm.answers("guessable", question):
        return "guessable: without looking"
    return None


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


def well_formed(proposed):
    """A proposed question with its fields in order, or None."""
    if not isinstance(proposed, dict):
        return None
    wrong = proposed.get("wrong") or []
    if not isinstance(wrong, list):
        return None
    if not all(map(is_text, [proposed.get("question"), proposed.get("answer"), *wrong])):
        return None
    options = [option.strip() for option in (proposed["answer"], *wrong)]
    if len({option.lower() for option in options}) < len(options):
        return None
    return dict(question=proposed["question"].strip(), answer=options[0], wrong=options[1:])


def as_annotation(question, task, record_id):
    """A question in the project's form. Where the right option stands is a function of the record's id."""
    if not question["wrong"]:
        return dict(task=task, prompt=question["question"], answer=question["answer"])
    options = [question["answer"], *question["wrong"]]
    random.Random(f"{record_id} {question['question']}").shuffle(options)
    correct = options.index(question["answer"])
    return dict(task=task, question=question["question"], options=options, correct=correct)


def question_annotations(caption, task, record_id, n, lm):
    """The annotations of up to n questions about a caption, those left out too, with the reason."""
    try:
        proposals = lm.ask("questions", caption=caption, n=n)[:n]
    except Unusable as e:
        return [dict(task=task, prompt="", answer="", left_out=str(e))]
    if not proposals:
        return [dict(task=task, prompt="", answer="", left_out="questions: none")]
    annotations = []
    questions = []
    for proposed in proposals:
        question = well_formed(proposed)
        if question:
            questions.append(question)
        else:
            annotations.append(dict(task=task, prompt=str(proposed)[:200], answer="",
                                    left_out="questions: malformed"))
    # Yes/no questions come last: how many may pass depends on the others.
    passed = []
    for question in sorted(questions, key=is_yes_no):
        annotation = as_annotation(question, task, record_id)
        try:
            reason = reason_to_drop(question, passed, caption, lm)
        except Unusable as e:
            reason = str(e)
        if reason:
            annotation["left_out"] = reason
        else:
            passed.append(question)
        annotations.append(annotation)
    return annotations


def question_record(record, args, lm):
    """A captioned record -> [the same media with questions], also those left out; [] without a caption."""
    captions = [a for a in record["annotations"] if TASKS[a["task"]].metric == "caption" and a.get("answer")]
    if not captions:
        return []
    caption = captions[0]["answer"]
    task = f"{media_kind(record)}_qa"
    annotations = question_annotations(caption, task, record["id"], args.questions, lm)
    # what a question is about; not frames and narration, which are in the file of captions
    media = ("id", *MEDIA, "start", "end", "duration", "width", "height", "subtitles")
    made = {field: record[field] for field in media if field in record}
    made["caption"] = caption
    made["annotations"] = annotations
    made["provenance"] = list(record.get("provenance", []))
    for note in lm.notes.values():
        if note not in made["provenance"]:
            made["provenance"].append(note)
    return [made]


# ---- rules in place of a model, for the demo ---------------------------------------------------------------

MOTION = re.compile(rf"a (\w+) ({'|'.join(toy.SHAPES)}) (?:moves (\w+)|stays)(?: and turns (\w+))?", re.I)


class StandIn:
    """Gives the answers that Served gives, each step by a rule of its name: it sees coloured shapes, and compares
    words. Every record it made names it."""

    def __init__(self):
        self.notes = {"all": dict(step="every step of a model", by=STAND_IN, date=today())}

    def ask(self, step, *images, **fields):
        return getattr(self, step)(*images, **fields)

    answers = ask

    def describe(self, image, t):
        """Regions of the toy world's colours: a bar is longer than wide, a star does not fill its circle."""
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), float)
        shapes = []
        for colour, rgb in toy.COLOURS.items():
            # JPEG moves a colour by less than 40 levels
            y, x = np.nonzero(np.abs(pixels - rgb).max(-1) < 40)
            if len(x) <= pixels.size / 300:  # a hundredth of the image, which has 3 numbers to a pixel
                continue
            # spread along the short and the long axis
            width, length = np.sqrt(np.linalg.eigvalsh(np.cov([x, y])))
            radius = np.quantile(np.hypot(x - x.mean(), y - y.mean()), 0.99)
            if length > 2 * width:
                shape = "bar"
            elif len(x) > 0.6 * np.pi * radius ** 2:
                shape = "circle"
            else:
                shape = "star"
            third = int(3 * x.mean() / pixels.shape[1])
            where = ("at the left", "in the middle", "at the right")[third]
            shapes.append(f"a {colour} {shape} {where}")
        return toy.listing(shapes) if shapes else "no shape"

    def merge(self, narration, frames):
        """The narration, and then each description that differs from the one before."""
        caption = narration
        before = None
        for line in frames.splitlines():
            t, description = line.split(": ", 1)
            if description != before:
                caption += f" At {t} there is {description}."
            before = description
        return caption

    def contradictions(self, narration, frames):
        """Coloured shapes of the narration that are in no frame."""
        named = re.findall(rf"(?:{'|'.join(toy.COLOURS)}) (?:{'|'.join(toy.SHAPES)})", narration.lower())
        return [words for words in named if words not in frames]

    def questions(self, caption, n):
        """Templates; some bad on purpose, so that every filter has something to find."""
        questions = []

        def add(question, answer, wrong=()):
            questions.append(dict(question=question, answer=answer, wrong=list(wrong)))

        for colour, shape, way, turns in MOTION.findall(caption.lower()):
            way = way or "It stays"
            ways = [w for w in (*toy.WAYS, "It stays") if w != way]
            add(f"Which way does the {shape} move?", way, ways[:3])
            add(f"What colour is the {shape} at first?", colour)
            add(f"The {shape} moves which way?", way)
            add(f"Does the {shape} move?", "Yes")
            add(f"How heavy is the {shape}?", "a kilogram")
            add("What does it do?", "It moves.")
            add(f"What shape is the {colour} {shape}?", f"a {shape}")
            if turns:
                colours = [c for c in toy.COLOURS if c not in (turns, colour)]
                add(f"What colour does the {shape} turn?", turns, colours[:3])
        return questions[:n]

    def ambiguous(self, question, caption):
        """Nothing but pronouns."""
        return not content_words(question)

    def answerable(self, question, caption):
        """Whether the sentence that shares most words with the question has those of the answer, too."""
        words = content_words(question["question"])
        sentences = [content_words(sentence) for sentence in re.split(r"(?<=[.!?])\s+", caption)]
        # a question without any word of the caption has its first sentence
        nearest = max(sentences, key=lambda sentence: len(words & sentence))
        if is_yes_no(question):
            return (words <= nearest) == question["answer"].lower().startswith("yes")
        return content_words(question["answer"]) <= nearest

    def guessable(self, question):
        """Whether the question gives its answer away."""
        return content_words(question["answer"]) <= content_words(question["question"])


# ---- runs --------------------------------------------------------------------------------------------------

def side_by_side(args, what, jobs, work_on):
    """[record]: those that work_on(job) gives for each job, --concurrency jobs at a time, in the jobs' order."""
    with concurrent.futures.ThreadPoolExecutor(args.concurrency) as pool:
        try:
            records = []
            for made in tqdm(pool.map(work_on, jobs), what, len(jobs), leave=False, disable=None):
                records += made
            return records
        except BaseException as e:  # requests under way may finish, so that they are kept; no other starts
            args.stop.set()
            if isinstance(e, KeyboardInterrupt):
                print("\nwaiting for answers under way; Ctrl-C again does not", file=sys.stderr)
            raise


def write_records(args, records):
    """Keep the records in FILE.work/, write FILE, and print what was left out."""
    work = Work(args.out)
    if "sample" in args:  # for people to judge the whole by
        # by a hash, so that a second run draws the same
        drawn = sorted(records, key=lambda record: digest("sample", record["id"]))
        for record in drawn[:math.ceil(args.sample * len(records))]:
            record["sample"] = True
    write_whole(work.made, "".join(json.dumps(record) + "\n" for record in records))
    lines, n = work.finish()
    reasons = collections.Counter()
    for record in records:
        reasons.update(a["left_out"] for a in record["annotations"] if "left_out" in a)
    print(f"{args.out}: {lines} lines, {n} annotations; left out: {dict(reasons.most_common()) or 'none'}")
    waiting = sum(k for reason, k in reasons.items() if reason.endswith(": no answer"))
    if waiting:
        raise UserError(f"{waiting} annotations wait for a server that did not answer; the same command asks "
                        "again")


def language_model(args):
    """A function that gives a new language model for each record, by --url and --model."""
    if args.url == "stand-in":
        return StandIn
    if not args.model or not args.licence:
        raise UserError(f"--url {args.url}: needs --model and --licence, which every record will name")
    check_server(args.url, args.model, args.allow_closed)
    return functools.partial(Served, Client(args), args.url, args.model, args.licence)


def run_caption(args):
    """Narrated videos -> FILE with a record per clip. The videos must lie under its folder."""
    folder = os.path.dirname(os.path.abspath(args.out))
    for path in args.videos:
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file")
        try:
            inside_folder(folder, os.path.relpath(os.path.abspath(path), folder))
        except BadMedia as e:
            raise UserError(f"{e}; put --out {args.out} into a folder that holds the videos") from None
    make_model = language_model(args)
    own_model = own_checkpoint(args) if args.checkpoint else None
    make_speech_model = lambda: None
    if args.asr_url:
        check_server(args.asr_url, args.asr_model, args.allow_closed)
        make_speech_model = functools.partial(Served, Client(args), args.asr_url, args.asr_model, args.asr_licence)
    Work(args.out).check()
    clips = side_by_side(args, "narrations", args.videos,
                         lambda path: clip_records(path, args, make_speech_model()))
    write_records(args, side_by_side(args, "clips", clips,
                                     lambda record: [caption_record(record, args, make_model(), own_model)]))


def run_qa(args):
    """FILE with captions -> another one beside it, with questions about the same media."""
    file = os.path.abspath(args.file)
    out = os.path.abspath(args.out)
    if os.path.dirname(file) != os.path.dirname(out) or file == out:
        raise UserError(f"--out {args.out}: must be another file in the folder of {args.file}, where the "
                        "media are")
    records = [dict(id=str(n)) | record for n, record in read_records(args.file)]
    make_model = language_model(args)
    Work(args.out).check()
    write_records(args, side_by_side(args, "lines", records,
                                     lambda record: question_record(record, args, make_model())))


def run_review(args):
    """Serve the page until Ctrl-C or a signal to end; FILE is then written with the decisions."""
    work = Work(args.file)
    if work.decisions():  # of an earlier session, which may have been killed
        work.finish()
    server = Reviewer(args.file, args.who or getpass.getuser(), args.port)
    url = f"http://127.0.0.1:{server.server_port}/"
    print(f"reviewing {args.file} as {server.who}: {url}   (Ctrl-C ends it)", flush=True)
    # a closed terminal ends it as Ctrl-C does: with FILE written
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.default_int_handler)
    # the page is served only below, but connections wait until then
    if args.open:
        webbrowser.open(url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    server.server_close()
    if server.decisions:
        lines, n = work.finish()
        print(f"{args.file}: {lines} lines, {n} annotations")


# ---- report ------------------------------------------------------------------------------------------------

STEPS = ("narration", "describe", "merge", "contradictions", "check", "questions", "duplicate", "yes/no",
         "ambiguous", "unanswerable", "answerable", "guessable", "agree", "review")


def table_or_none(head, rows):
    return table(head, rows) if rows else "<p>none</p>"


def request_counts(folder):
    """[("step: what came back", n)] of the finished requests and of what went wrong on the way to them."""
    counts = collections.Counter()
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for name in names:
        if not name.endswith(".json"):
            continue
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            cached = json.load(f)
        problem = None
        if cached["step"] != "narration":
            _, problem = read_reply(cached["reply"])
        counts[f"{cached['step']}: {problem or 'answered'}"] += 1
        counts.update(f"{cached['step']}: {trouble}, asked again" for trouble in cached["trouble"])
    return counts.most_common()


def step_yields(reasons, total):
    """[(step, left out, go on, share)] of the steps that left something out."""
    left = total
    # as a reason names its step, the order of STEPS tells how many went on
    yields = [("made", "", total, "100%")]
    for step in STEPS:
        dropped = sum(n for reason, n in reasons.items() if reason.partition(":")[0] == step)
        if dropped:
            left -= dropped
            yields.append((step, dropped, left, f"{left / total:.0%}"))
    return yields


def in_short(record, annotation):
    """(question, answer) of an annotation; of a clip without a caption its narration."""
    if "options" in annotation:
        options = [f"*{option}" if k == annotation["correct"] else option
                   for k, option in enumerate(annotation["options"])]
        return annotation["question"], " / ".join(options)
    if "points" in annotation:
        return annotation.get("prompt") or annotation.get("label", ""), f"{len(annotation['points'])} points"
    if "messages" in annotation:
        question, answer = annotation["messages"][:2]
        return question["content"], answer["content"]
    narration = " ".join(segment["text"] for segment in record.get("narration", ()))
    return annotation.get("prompt", ""), annotation["answer"] or f"said: {narration or 'nothing'}"


def run_report(args):
    """FILE.work/report.html: the yield of each step, reasons, requests, decisions, examples."""
    work = Work(args.file)
    records = work.records()
    decisions = work.decisions()
    annotations = []  # (record, annotation) of the whole file
    for record in records:
        annotations += [(record, a) for a in settled(record, decisions.get(record["name"], {}))]
    reasons = collections.Counter(a["left_out"] for _, a in annotations if "left_out" in a)
    yields = step_yields(reasons, len(annotations))
    kept = yields[-1][2]
    makers = set()
    for record in records:
        makers.update(p.get("model") or p.get("by", "unknown") for p in record.get("provenance", []))
    verdicts = collections.Counter()
    for of_record in decisions.values():
        verdicts.update((d["verdict"], d["who"]) for d in of_record.values())
    e = html.escape
    page = [STYLE, "<style>body {padding: 0 1em} table {border-collapse: collapse} "
                   "th, td {text-align: left; padding: .1em .7em; border: 1px solid #ccc}</style>",
            f"<h1>{e(os.path.basename(args.file))}</h1><p>{len(records)} lines, {len(annotations)} "
            f"annotations made, {kept} in the file. By: {e(', '.join(sorted(makers))) or 'nobody named'}.</p>",
            "<h2>Yield of each step</h2>", table_or_none(("step", "left out", "go on", "share"), yields),
            "<h2>Reasons</h2>", table_or_none(("reason", "annotations"), reasons.most_common()),
            "<h2>Requests</h2>", table_or_none(("step and what came back", "times"),
                                               request_counts(os.path.join(work.folder, "requests"))),
            "<h2>Decisions of people</h2>", table_or_none(("verdict", "who", "annotations"),
                                                          [(*pair, n) for pair, n in verdicts.most_common()])]
    statuses = [a["status"] for record, a in annotations if record.get("sample")]
    if statuses:
        page.append(f"<p>Of the {len(statuses)} annotations of the validation sample {statuses.count('accept')} "
                    f"were accepted as they are, {statuses.count('undecided')} are undecided.</p>")
    page.append("<h2>Examples</h2>")
    for reason in ("kept", *reasons):
        page.append(f"<h3>{e(reason)}</h3>")
        examples = [pair for pair in annotations if pair[1].get("left_out", "kept") == reason]
        for record, annotation in examples[:3]:
            question, answer = in_short(record, annotation)
            page.append(f"<p>{e(record['name'])}: {e(question)} <i>{e(answer)}</i></p>")
    path = os.path.join(work.folder, "report.html")
    write_whole(path, "\n".join(page))
    print(f"{path}: {kept} of {len(annotations)} annotations kept")


# ---- demo --------------------------------------------------------------------------------------------------

WRONG = ("Um.", "a star a star a star a star a star a star a star",
         "Ein Kreis und ein Stern auf der Ebene, das ist nicht viel.",
         "A purple star moves left and turns green. A white bar stays.")


def write_narrations(folder):
    """A narration beside each toy clip, as .srt; every fifth has a fault that a check should find."""
    with open(os.path.join(folder, "clips.jsonl")) as f:
        records = [json.loads(line) for line in f]
    for i, record in enumerate(records):
        text = record["annotations"][0]["answer"]
        if i % 5 == 4:
            text = WRONG[i // 5 % len(WRONG)]
        # "a red bar moves left and a star stays" -> two sentences, each with a time of its own
        text = re.sub(r"(, | and )a ", ". A ", text)
        sentences = re.split(r"(?<=\.) ", text)
        seconds = record["duration"] / len(sentences)
        blocks = [f"{k + 1}\n00:00:{k * seconds:06.3f} --> 00:00:{(k + 1) * seconds:06.3f}\n{sentence}\n"
                  for k, sentence in enumerate(sentences)]
        base, _ = os.path.splitext(os.path.join(folder, record["video"]))
        write_whole(base + ".srt", "\n".join(blocks))
    return [os.path.join(folder, record["video"]) for record in records]


def run_demo(args):
    """The commands of this file, one after the other, on toy clips; two steps of training on the result."""
    videos = write_narrations(toy.write_clips(os.path.join(args.out, "toy"), args.clips, 0))
    captions = os.path.join(args.out, "captions.jsonl")
    qa = os.path.join(args.out, "qa.jsonl")
    model = ["--url", "stand-in"]
    for command in (["caption", *videos, "--out", captions, *model, "--narrator", STAND_IN],
                    ["qa", captions, "--out", qa, *model], ["report", captions], ["report", qa]):
        shown = shlex.join(command).replace(shlex.join(videos), f"{videos[0]} ...")
        print(f"\n$ python -m tools.annotate {shown}", flush=True)
        main(command)
    # as small as training can be: that the files train is all it shows
    train = ["pretrain.py", "--config", "small", "--steps", "2", "--global_batch", "4", "--micro_batch", "2",
             "--seq_len", "512", "--data", captions, qa, "--out", os.path.join(args.out, "run")]
    print("\n$ python", shlex.join(train), flush=True)
    code = subprocess.run([sys.executable, os.path.join(ROOT, train[0]), *train[1:]]).returncode
    if code:
        sys.exit(code)
    if args.review:
        print("\n$ python -m tools.annotate review", qa, flush=True)
        main(["review", qa])


# ---- the command line --------------------------------------------------------------------------------------

def add_model_flags(flag):
    """Of the commands that use a language model."""
    flag("--out", required=True, help="JSONL file to write; its folder must hold the media")
    flag("--url", required=True, help="OpenAI-compatible server, e.g. http://localhost:8000/v1; "
                                      "stand-in = rules for the toy world, no model")
    flag("--model", help="name of its model")
    flag("--licence", help="licence of that model, named in every record")
    flag("--concurrency", type=bounded(int, 1, 256), default=8, help="clips or lines worked on at a time [8]")
    flag("--timeout", type=bounded(float, 0.1, 86400), default=120.0, help="seconds to wait for an answer [120]")
    flag("--allow_closed", action="store_true", help="let closed models through; their records are marked")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, text):
        subparser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        subparser.set_defaults(run=run)
        return subparser.add_argument

    flag = command("caption", run_caption, "narrated videos to dense captions")
    flag("videos", nargs="+", help="videos, each with .srt, .vtt, .txt or sound beside it, or sound in it")
    flag("--narrator", default="unknown", help="who spoke or wrote the narration [unknown]")
    flag("--asr_url", help="server of /audio/transcriptions, for narrations that are sound")
    flag("--asr_model", default="whisper-large-v3", help="its model [whisper-large-v3]")
    flag("--asr_licence", default="Apache-2.0", help="licence of that model [Apache-2.0]")
    flag("--checkpoint", help="folder of one of our own checkpoints, which then describes the frames")
    flag("--device", default="cpu", help="of that checkpoint: cpu, cuda or mps [cpu]")
    flag("--clip_seconds", type=bounded(float, 1), default=30.0, help="longest clip; cut at pauses [30]")
    flag("--frames", type=bounded(int, 1), default=8, help="of a clip to describe, at most one a second [8]")
    flag("--language", default="en", choices=(*LANGUAGES, "any"), help="of the captions [en]")
    add_model_flags(flag)
    flag = command("qa", run_qa, "captions to questions, filtered")
    flag("file", help="JSONL file with captions")
    flag("--questions", type=bounded(int, 1), default=12, help="asked for per caption [12]")
    flag("--sample", type=bounded(float, 0, 1), default=0.1, help="share of lines people shall check [0.1]")
    add_model_flags(flag)
    flag = command("review", run_review, "a page to accept, edit, reject and place points")
    flag("file", help="JSONL file, made here or elsewhere")
    flag("--who", help="name under which decisions are kept [the login]")
    flag("--port", type=bounded(int, 0, 65535), default=0, help="of 127.0.0.1 [a free one]")
    flag("--open", action=argparse.BooleanOptionalAction, default=True, help="open it in a browser [yes]")
    flag = command("report", run_report, "what each step let through, as a page")
    flag("file", help="JSONL file")
    flag = command("demo", run_demo, "all of it on toy videos")
    flag("--out", default=os.path.join("out", "annotate"), help="folder [out/annotate]")
    flag("--clips", type=bounded(int, 1), default=20, help="toy clips [20]")
    flag("--review", action=argparse.BooleanOptionalAction, default=True, help="end with the page [yes]")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    args.stop = threading.Event()
    try:
        args.run(args)
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr, flush=True)
        os._exit(130)  # a thread that still waits for a server would hold up any other way out


if __name__ == "__main__":
    main()
