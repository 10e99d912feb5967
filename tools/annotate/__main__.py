"""
Making data: people say what they see, open language models help, filters check, people decide.

    caption   video ─► narration ─► clips with times ─► their frames described ─► one dense caption ─► checks
    qa        caption ─► questions ─► answered from the caption, and without it ─► filters
    review    a page on this machine: accept, edit, reject; place points, track frame by frame (review.py)
    report    what each step let through, and what not and why

    python -m tools.annotate demo                                        # all of it on toy videos, without a server
    python -m tools.annotate caption clips/*.mp4 --out clips/captions.jsonl \\
        --url http://localhost:8000/v1 --model Qwen3-VL-8B-Instruct --licence Apache-2.0
    python -m tools.annotate qa clips/captions.jsonl --out clips/qa.jsonl --url ... --model ... --licence ...
    python -m tools.annotate review clips/qa.jsonl --who ann
    python -m tools.annotate report clips/qa.jsonl

FILE.jsonl trains as it is: the lines that passed, with the decisions of people applied. FILE.work/ beside it
has rows.jsonl, every line and why it was left out; decisions.jsonl, to which people only append; and
requests/, the answers of servers by the hash of what was asked: a run that was stopped repeats none of them.

Nothing is distilled from a closed model: such hosts and names are refused. --allow_closed lets them through
and marks the rows, and training leaves marked rows out. ANNOTATE_API_KEY is sent to servers that want a key.
"""
import argparse
import base64
import collections
import concurrent.futures
import datetime
import functools
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
from lib.media import BadMedia, inside_folder, load_frames, open_video, sample_times, video_duration
from lib.records import MEDIA
from lib.weights import BadCheckpoint
from sample import Chat, load
from tools.annotate.review import Reviewer, Work, digest, jpeg, read_records, settled, write_whole
from tools.prepare.fetch import NetError, UserError, is_loopback, patiently
from tools.show import STYLE

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
    return json.loads(text[text.find("["):text.rfind("]") + 1])


def parse_bool(text):
    """The JSON true or false that an answer is, fenced or not; ValueError if it is anything else."""
    m = re.fullmatch(r"\W*(json)?\W*(true|false)\W*", text, re.I)
    if not m:
        raise ValueError(text)
    return m[2].lower() == "true"


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
    """The date, as rows have it."""
    return datetime.date.today().isoformat()


def check_server(url, model, allow_closed):
    """Whether what answers at a URL is closed. Closed ones are refused unless allowed, as is plain http."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or 80
    except ValueError:  # brackets that do not close, a port above 65535
        host = port = None
    if not host or not port or parts.scheme not in ("http", "https"):
        raise UserError(f"{url}: not the URL of a server; e.g. http://localhost:8000/v1")
    if parts.scheme == "http" and not is_loopback(host):
        raise UserError(f"{url}: only https, except on this machine; e.g. ssh -L {port}:localhost:{port} "
                        f"{host}, and then http://localhost:{port}{parts.path}")
    by_host = CLOSED_HOSTS.search(host)
    closed = bool(by_host or CLOSED_MODELS.search(model))
    if closed and not allow_closed:
        raise UserError(f"{url}: {host if by_host else 'model ' + model} is a closed model's, whose answers "
                        "are not to be distilled; use an open one; or --allow_closed marks the rows, and "
                        "training leaves them out")
    return closed


class Client:
    """Asks servers. Every finished request is kept in `folder` by the hash of what was asked: asked once."""

    def __init__(self, args):
        self.folder = os.path.join(Work(args.out).folder, "requests")
        self.timeout, self.allow_closed, self.stop = args.timeout, args.allow_closed, args.stop
        self.locks, self.lost = {}, 0
        key = os.environ.get("ANNOTATE_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def once(self, key, ask):
        """What ask() gave the first time, in this run or an earlier one."""
        path = os.path.join(self.folder, key + ".json")
        with self.locks.setdefault(key, threading.Lock()):  # two rows may ask the same
            if self.stop.is_set():
                raise Unusable("stopped")
            if not os.path.exists(path):
                write_whole(path, json.dumps(ask()))
            with open(path, encoding="utf-8") as f:
                return json.load(f)

    def send(self, step, url, trouble=(), **request):
        """{step, reply, trouble: what went wrong before, date}. Unusable where there is no reply, UserError
        where there will be none to other requests either."""
        trouble = list(trouble)

        def attempt():
            if self.stop.is_set():
                raise Unusable("stopped")
            try:
                r = requests.post(url, headers=self.headers, timeout=(10, self.timeout),
                                  allow_redirects=False, **request)  # a redirect could lead to any host
            except requests.RequestException as e:
                trouble.append(type(e).__name__)
                raise
            trouble.extend([] if r.ok else [str(r.status_code)])
            return r

        try:
            r = patiently(attempt, f"{step}: {url}")
            self.lost = 0
        except NetError as e:
            self.lost += 1
            if self.lost > 8:
                raise UserError(f"{url}: no answer to {self.lost} requests in a row ({e}); the same command "
                                "goes on where this one stopped") from None
            raise Unusable(f"{step}: no answer") from None
        if r.is_redirect or r.status_code in (401, 403, 404):
            raise UserError(f"{url}: status {r.status_code}, {r.text[:200]!r}; wrong URL, model or key?")
        if not r.ok:
            raise Unusable(f"{step}: status {r.status_code}")
        try:  # JSON can spell half a character, which is no text
            reply = json.loads(json.dumps(r.json(), ensure_ascii=False).encode(errors="replace"))
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict) or not {"choices", "segments", "text"} & reply.keys():
            raise Unusable(f"{step}: no answer of the protocol")
        check_server(url, str(reply.get("model", "")), self.allow_closed)  # it says which model spoke
        return dict(step=step, reply=reply, trouble=trouble, date=today())


def read_reply(reply):
    """(text, why it cannot be used or None) of a chat completion."""
    try:
        choice = reply["choices"][0]
        message, end = choice["message"], choice.get("finish_reason")
        text = (message.get("content") or "").rpartition("</think>")[2]
    except (LookupError, TypeError, AttributeError):
        return "", "no answer of the protocol"
    if message.get("refusal") or end == "content_filter" or REFUSAL.match(text):
        return text, "refusal"
    if end == "length" or len(text) > LONGEST:
        return text, "overlong answer"
    return text, None if text.strip() else "empty answer"


class Served:
    """What a model behind a server is asked about one row; `notes` says who did each step, for the row."""

    def __init__(self, client, url, model, licence):
        self.client, self.url, self.model, self.licence = client, url.rstrip("/"), model, licence
        self.notes = {}

    def note(self, step, model, date, **prompt):
        closed = {"closed": True} if check_server(self.url, model, self.client.allow_closed) else {}
        self.notes[step, model] = dict(step=step, by="model", model=model, licence=self.licence, date=date,
                                       **prompt, **closed)

    def ask(self, step, *pictures, **about):
        """The answer to a step's prompt about JPEG pictures or what else it names, read as READ says. What is
        empty or cannot be read is asked for once more; Unusable where no usable answer comes."""
        url = lambda p: "data:image/jpeg;base64," + base64.b64encode(p).decode()
        content = [dict(type="text", text=PROMPTS[step].format(**about)),
                   *(dict(type="image_url", image_url=dict(url=url(p))) for p in pictures)]
        messages, trouble = [dict(role="user", content=content)], []
        for _ in range(2):
            body = dict(model=self.model, temperature=0, max_tokens=4096, messages=messages)
            kept = self.client.once(digest(body), lambda: self.client.send(
                step, self.url + "/chat/completions", trouble, json=body))
            text, why = read_reply(kept["reply"])
            self.note(step, str(kept["reply"].get("model") or self.model), kept["date"],
                      prompt=digest(PROMPTS[step])[:16])
            if why is None:
                try:
                    return READ.get(step, str.strip)(text)
                except (ValueError, RecursionError):
                    why = "invalid JSON"
            if why not in ("invalid JSON", "empty answer"):
                break
            trouble = [why]
            messages = [*messages, dict(role="assistant", content=text),
                        dict(role="user", content="That cannot be read. Only what was asked for, please.")]
        raise Unusable(f"{step}: {why}")

    def transcribe(self, name, sound):
        """[{start, end, text}] of an audio file; end is None where the server gives no times."""
        form = dict(model=self.model, response_format="verbose_json")
        kept = self.client.once(digest(form, sound), lambda: self.client.send(
            "narration", self.url + "/audio/transcriptions", data=form, files=dict(file=(name, sound))))
        self.note("narration", self.model, kept["date"])
        seconds = lambda t: float(t) if t is not None and math.isfinite(float(t)) else None
        try:
            parts = kept["reply"].get("segments") or [dict(start=0, end=None, text=kept["reply"]["text"])]
            return [dict(start=seconds(s["start"]) or 0.0, end=seconds(s["end"]), text=s["text"].strip())
                    for s in parts]
        except (LookupError, TypeError, ValueError, AttributeError):
            raise Unusable("narration: no answer of the protocol") from None

    def answers(self, step, q, **known):
        """Whether the model, which knows the rest alone, answers a question as the question's own answer."""
        options = sorted([q["answer"], *q["wrong"]]) if q["wrong"] else []
        asked = "Question: " + q["question"] + "".join(f"\n- {o}" for o in options)
        said = self.ask(step, question=asked, **known)
        same = lambda text: text.strip(" .\"'").lower()
        return same(said) == same(q["answer"]) or self.ask("agree", question=asked, one=q["answer"],
                                                           other=said)


def own_checkpoint(args):
    """describe(picture) -> (what one of our own checkpoints says it shows, provenance), kept like the answer
    of a server."""
    folder, lock, prompt = args.checkpoint, threading.Lock(), "Describe the image."
    try:
        client, model = Client(args), load(folder, args.device)
    except ValueError as e:
        raise UserError(str(e)) from None
    weights = os.path.realpath(folder), os.stat(folder).st_mtime_ns  # `latest` is another one next week

    def look(picture):
        with lock, tempfile.TemporaryDirectory() as aside:  # one picture at a time, whatever the concurrency
            path = os.path.join(aside, "frame.jpg")
            with open(path, "wb") as f:
                f.write(picture)
            text = "".join(Chat(*model, [path]).ask(prompt))
        reply = dict(choices=[dict(message=dict(content=text))])
        return dict(step="describe", reply=reply, trouble=[], date=today())

    def describe(picture):
        kept = client.once(digest(weights, prompt, picture), lambda: look(picture))
        text, why = read_reply(kept["reply"])
        if why:
            raise Unusable(f"describe: {why}")
        return text.strip(), dict(step="describe", by="model", model=folder, licence="as its weights",
                                  prompt=digest(prompt)[:16], date=kept["date"])
    return describe


# ---- caption -----------------------------------------------------------------------------------------------

def read_narration(path, duration):
    """[{start, end, text}] of an .srt, .vtt or .txt file; plain text is about the whole video."""
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        text = f.read()
    if path.endswith(".txt"):
        return [dict(start=0.0, end=duration, text=" ".join(text.split()))] if text.strip() else []
    seconds = lambda h, m, s: int(h or 0) * 3600 + int(m) * 60 + float(s.replace(",", "."))
    stamp, out = r"(?:(\d+):)?(\d{1,2}):(\d{1,2}[.,]\d+)", []
    for block in re.split(r"\n\s*\n", text):
        m = re.search(rf"{stamp}\s*-->\s*{stamp}[^\n]*\n(.+)", block, re.S)
        said = " ".join(re.sub(r"<[^>]*>", "", m[7]).split()) if m else ""
        if said and seconds(*m.groups()[:3]) < duration:
            end = min(seconds(*m.groups()[3:6]), duration)
            out.append(dict(start=seconds(*m.groups()[:3]), end=end, text=said))
    return out


def sound_of(path):
    """The first audio track of a video as the bytes of a WAV file, 16 kHz mono; None without one."""
    out, (container, _) = io.BytesIO(), open_video(path)
    with container, av.open(out, "w", format="wav") as wav:
        if not container.streams.audio:
            return None
        stream = wav.add_stream("pcm_s16le", 16000, layout="mono")
        turn = av.AudioResampler("s16", "mono", 16000)
        for frame in itertools.chain(container.decode(container.streams.audio[0]), [None]):
            for part in turn.resample(frame):
                wav.mux(stream.encode(part))
        wav.mux(stream.encode(None))
    return out.getvalue()


def narration_of(path, duration, ears, narrator):
    """([{start, end, text}], provenance) of what was said about a video: text beside it, else speech beside
    it or in it, which ears transcribe."""
    base = os.path.splitext(path)[0]
    beside = lambda *endings: next((base + e for e in endings if os.path.exists(base + e)), None)
    by = dict(by=STAND_IN) if narrator == STAND_IN else dict(by="people", who=narrator)
    date = lambda file: datetime.date.fromtimestamp(os.path.getmtime(file)).isoformat()
    text, recording = beside(".srt", ".vtt", ".txt"), beside(".wav", ".mp3", ".m4a", ".flac", ".ogg")
    if text:
        return read_narration(text, duration), [dict(step="narration", **by, date=date(text))]
    if not ears:
        return [], []
    if recording:
        with open(recording, "rb") as f:
            name, sound = os.path.basename(recording), f.read()
    else:
        name, sound = "narration.wav", sound_of(path)
    if not sound:
        return [], []
    said = [dict(s, end=min(duration if s["end"] is None else s["end"], duration))
            for s in ears.transcribe(name, sound) if s["text"] and s["start"] < duration]
    return said, [dict(step="speech", **by, date=date(recording or path)), *ears.notes.values()]


def cut_clips(said, duration, longest):
    """[(start, end, segments)]: the video, cut where a segment begins, into clips of at most `longest`
    seconds unless a segment alone is longer."""
    clips, begin = [[]], 0.0
    for s in sorted(said, key=lambda s: s["start"]):
        if clips[-1] and s["end"] - begin > longest and s["start"] > begin:
            clips.append([])
            begin = s["start"]
        clips[-1].append(s)
    cuts = [0.0, *(c[0]["start"] for c in clips[1:]), duration]
    return [(round(a, 3), round(b, 3), c) for a, b, c in zip(cuts, cuts[1:], clips)]


# The commonest words of a language give it away. A caption in another one passes with --language any.
LANGUAGES = dict(en="the a an and of to in is it on with at for his her",
                 de="der die das und ist ein eine auf im nicht den",
                 fr="le la les et un une est dans sur avec des du",
                 es="el los las y un una en con por que su")


def faults(text, shortest, language):
    """What speaks against a narration or a caption by itself: length, repetition, language."""
    words = re.findall(r"\w+", text.lower())
    if not shortest <= len(words) <= 1200:
        yield "too short" if len(words) < shortest else "too long"
    runs = list(zip(*(words[k:] for k in range(4))))
    if len(words) >= 8 and (len(set(runs)) < 0.6 * len(runs) or len(set(words)) < 0.15 * len(words)):
        yield "repetition"
    hits = {name: sum(w in common.split() for w in words) for name, common in LANGUAGES.items()}
    few = 0.04 * (len(words) - 20)  # a short text may do without any of them
    if language != "any" and hits[language] < max(few, *hits.values()):
        yield f"not in {language}"


def clips_of(path, args, ears):
    """The rows of a video, one per clip, with what was said in it and nothing seen yet; where that cannot be
    had, one row that says why."""
    name = os.path.relpath(os.path.abspath(path), os.path.dirname(os.path.abspath(args.out)))
    try:
        duration = video_duration(path)
        said, people = narration_of(path, duration, ears, args.narrator)
    except (Unusable, BadMedia, av.FFmpegError) as e:
        reason = str(e) if isinstance(e, Unusable) else "narration: unreadable video"
        return [dict(id=name, video=name, annotations=[
            dict(task="video_caption", answer="", left_out=reason)])]
    return [dict(id=f"{name} {start:g}-{end:g}", video=name, start=start, end=end, narration=told, frames=[],
                 duration=round(duration, 3), annotations=[dict(task="video_caption", answer="")],
                 provenance=list(people))
            for start, end, told in cut_clips(said, duration, args.clip_seconds)]


def caption_clip(row, args, lm, eyes=None):
    """The row of a clip, with its caption; eyes(picture) describes the frames, if not the language model.
    Where it cannot go on it keeps what it has, and says at which step."""
    a = row["annotations"][0]
    if "left_out" in a:
        return row
    start, narration = row["start"], " ".join(s["text"] for s in row["narration"])
    try:
        for fault in faults(narration, 3, args.language) if narration else ["none"]:
            raise Unusable(f"narration: {fault}")
        times = sample_times(max(row["end"] - start - 0.1, 0), args.frames, 1.0)
        times = [round(float(t) + start, 2) for t in times]
        path = os.path.join(os.path.dirname(args.out), row["video"])
        for t, pixels in zip(times, load_frames(path, times)):
            picture = jpeg(pixels, 768)
            text, who = eyes(picture) if eyes else (lm.ask("describe", picture, t=t), None)
            row["frames"].append(dict(t=t, text=text))
            row["provenance"] += [who] if who and who not in row["provenance"] else []
        frames = "\n".join(f"{f['t']:g} s: {f['text']}" for f in row["frames"])
        a["answer"] = lm.ask("merge", narration=narration, frames=frames)
        for fault in faults(a["answer"], 8, args.language):
            raise Unusable(f"check: {fault}")
        against = lm.ask("contradictions", narration=narration, frames=frames)
        row["contradictions"] = [str(c) for c in against]
        if row["contradictions"]:
            raise Unusable("check: narration and frames disagree")
    except Unusable as e:
        a["left_out"] = str(e)
    except BadMedia:
        a["left_out"] = "describe: unreadable video"
    row["provenance"] += lm.notes.values()
    return row


# ---- questions and filters ---------------------------------------------------------------------------------

NUMBERS = {w: str(i) for i, w in enumerate("zero one two three four five six seven eight nine ten".split())}
EMPTY = set("a an the of to in on at is are was were be been do does did has have had what which who whom "
            "whose where when why how many much often with and or it its his her him their there this that "
            "they he she them from for by as into out one".split())


def stem(word):
    """A word without the endings that change least of its meaning; numbers as digits."""
    if word in NUMBERS or len(word) < 4:
        return NUMBERS.get(word, word)
    for ending in ("ing", "en", "ed", "es", "s", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) > 2:
            return word[:-len(ending)]
    return word


def content(text):
    """The words of a text that carry its meaning, as a set of stems."""
    return {stem(w) for w in re.findall(r"[\w.]*\w", text.lower()) if w not in EMPTY}


def is_yes_no(q):
    """Whether a question's answer is yes or no."""
    return q["answer"].lower().strip(" .") in ("yes", "no")


def alike(one, other):
    """Whether two questions ask the same: the same answer, and most of their words."""
    a, b = content(one["question"]), content(other["question"])
    return content(one["answer"]) == content(other["answer"]) and len(a & b) >= 0.6 * len(a | b)


def why_not(q, kept, caption, lm):
    """Why a question is left out, or None; what costs nothing first. kept: those of its row that passed."""
    if any(alike(q, other) for other in kept):
        return "duplicate: near another one"
    if is_yes_no(q) and 3 * (1 + sum(map(is_yes_no, kept))) > sum(not is_yes_no(k) for k in kept):
        return "yes/no: more than one in four"
    if lm.ask("ambiguous", question=q["question"], caption=caption):
        return "ambiguous: several meanings"
    if not lm.answers("answerable", q, caption=caption):
        return "unanswerable: not from the caption"
    return "guessable: without looking" if lm.answers("guessable", q) else None


def well_formed(q):
    """A proposed question with its fields in order, or None."""
    filled = lambda v: isinstance(v, str) and v.strip()
    wrong = q.get("wrong") or [] if isinstance(q, dict) else None
    if not isinstance(wrong, list) or not all(map(filled, [q.get("question"), q.get("answer"), *wrong])):
        return None
    options = [o.strip() for o in (q["answer"], *wrong)]
    if len({o.lower() for o in options}) < len(options):
        return None
    return dict(question=q["question"].strip(), answer=options[0], wrong=options[1:])


def as_annotation(q, task, row_id):
    """A question in the project's form. Where the right option stands is a function of the row's id."""
    if not q["wrong"]:
        return dict(task=task, prompt=q["question"], answer=q["answer"])
    options = [q["answer"], *q["wrong"]]
    random.Random(f"{row_id} {q['question']}").shuffle(options)
    return dict(task=task, question=q["question"], options=options, correct=options.index(q["answer"]))


def question_row(row, args, lm):
    """A captioned row -> [the same media with questions], also those left out; [] without a caption."""
    a = next((a for a in row["annotations"] if a["task"].endswith("_caption") and a.get("answer")), None)
    if a is None:
        return []
    task, out, kept = a["task"].replace("_caption", "_qa"), [], []
    left_out = lambda reason, prompt="": dict(task=task, prompt=prompt, answer="", left_out=reason)
    try:
        proposed = lm.ask("questions", caption=a["answer"], n=args.questions)[:args.questions]
        if not proposed:
            raise Unusable("questions: none")
        good = [q for q in map(well_formed, proposed) if q]
        out += [left_out("questions: malformed", str(q)[:200]) for q in proposed if not well_formed(q)]
        for q in sorted(good, key=is_yes_no):
            try:
                reason = why_not(q, kept, a["answer"], lm)
            except Unusable as e:
                reason = str(e)
            kept += [] if reason else [q]
            out.append(as_annotation(q, task, row["id"]) | ({"left_out": reason} if reason else {}))
    except Unusable as e:
        out.append(left_out(str(e)))
    about = ("id", *MEDIA, "start", "end", "duration", "width", "height", "subtitles")
    by = row.get("provenance", [])
    return [{k: row[k] for k in about if k in row} | dict(
        caption=a["answer"], annotations=out, provenance=by + [n for n in lm.notes.values() if n not in by])]


# ---- rules in place of a model -----------------------------------------------------------------------------
#
# They see coloured shapes and read plain English by its words. They stand in for a language model where there
# is none, in the demo and in tests, and every row says so.

PEOPLE = {"she": "woman|girl|lady|mother", "he": "man|boy|father|cyclist|goalkeeper|striker"}
PEOPLE |= {"her": PEOPLE["she"], "his": PEOPLE["he"], "him": PEOPLE["he"]}
MOTION = re.compile(rf"a (\w+) ({'|'.join(toy.SHAPES)}) (?:moves (\w+)|stays)(?: and turns (\w+))?", re.I)


def several(noun, text):
    """Whether a text, in lower case, tells of more than one such thing."""
    many = {"man": "men", "woman": "women", "child": "children", "person": "people"}.get(noun, noun + "s")
    number = "|".join([*list(NUMBERS)[2:], "several", "many", "some", "both"])
    return bool(re.search(rf"\b((another|other|second) (\w+ )?{noun}|({number}) (\w+ )?{many})\b", text))


class StandIn:
    """Answers what Served answers, each step by a rule of its name."""

    def __init__(self):
        self.notes = {"all": dict(step="every step of a model", by=STAND_IN, date=today())}

    def ask(self, step, *about, **more):
        return getattr(self, step)(*about, **more)

    answers = ask

    def describe(self, picture, t):
        """Regions of the toy world's colours: a bar is longer than wide, a star does not fill its circle."""
        pixels, seen = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), float), []
        for colour, rgb in toy.COLOURS.items():
            y, x = np.nonzero(np.abs(pixels - rgb).max(-1) < 40)
            if len(x) > pixels.size / 300:
                cx, cy = x.mean(), y.mean()
                thin, long = np.sqrt(np.linalg.eigvalsh(np.cov([x, y])))
                far = np.quantile(np.hypot(x - cx, y - cy), 0.99)
                shape = "bar" if long > 2 * thin else "circle" if len(x) > 0.6 * np.pi * far ** 2 else "star"
                where = ("at the left", "in the middle", "at the right")[int(3 * cx / pixels.shape[1])]
                seen.append(f"a {colour} {shape} {where}")
        return toy.listing(seen) if seen else "no shape"

    def merge(self, narration, frames):
        """What was said, and then what was seen whenever it changed."""
        seen = [line.split(": ", 1) for line in frames.splitlines()]
        changes = [next(same) for _, same in itertools.groupby(seen, key=lambda s: s[1])]
        return narration + "".join(f" At {t} there is {what}." for t, what in changes)

    def contradictions(self, narration, frames):
        """Coloured shapes that were told of and seen in no frame."""
        said = re.findall(rf"({'|'.join(toy.COLOURS)}) ({'|'.join(toy.SHAPES)})", narration.lower())
        return [" ".join(words) for words in said if " ".join(words) not in frames]

    def questions(self, caption, n):
        """Templates; some bad on purpose, so that every filter of the demo has something to find."""
        out = []
        for colour, shape, way, turns in MOTION.findall(caption.lower()):
            way, ways = way or "It stays", [w for w in (*toy.WAYS, "It stays") if w != (way or "It stays")]
            out += [(f"Which way does the {shape} move?", way, ways[:3]),
                    (f"What colour is the {shape} at first?", colour, []),
                    (f"The {shape} moves which way?", way, []), (f"Does the {shape} move?", "Yes", []),
                    (f"How heavy is the {shape}?", "a kilogram", []), ("What does it do?", "It moves.", []),
                    (f"What shape is the {colour} {shape}?", f"a {shape}", [])]
            others = [c for c in toy.COLOURS if c not in (turns, colour)]
            out += [(f"What colour does the {shape} turn?", turns, others[:3])] if turns else []
        return [dict(question=q, answer=a, wrong=wrong) for q, a, wrong in out[:n]]

    def ambiguous(self, question, caption):
        """Nothing but pronouns; a pronoun before any noun, unless one only can be meant; one of several."""
        words, caption = re.findall(r"\w+", question.lower()), caption.lower()
        first = next((i for i, w in enumerate(words) if w not in EMPTY), None)
        open_to = lambda w: w in ("it", "they", "that", "there", "them") or w in PEOPLE and len(
            re.findall(rf"\b({PEOPLE[w]})\b", caption)) != 1
        return not content(question) or any(map(open_to, words[:first])) or any(
            several(noun, caption) for noun in re.findall(r"\bthe (\w+)", question.lower()))

    def answerable(self, q, caption):
        """Whether the sentence that shares most words with the question has at least half of the answer's."""
        asked, sentences = content(q["question"]), [content(s) for s in re.split(r"(?<=[.!?])\s+", caption)]
        most = max(len(asked & s) for s in sentences)
        evidence = [s for s in sentences if len(asked & s) == most and most]
        if is_yes_no(q):
            return any(asked <= s for s in evidence) == q["answer"].lower().startswith("yes")
        share = lambda text, s: len(content(text) & s) / max(len(content(text)), 1)
        return any(max([0.49, *(share(w, s) for w in q["wrong"])]) < share(q["answer"], s) for s in evidence)

    def guessable(self, q):
        """Whether the question gives its answer away, or asks about the world at large."""
        text, answer = q["question"].lower(), content(q["answer"])
        if answer and answer <= content(text) and " or " not in text:
            return True
        definite = re.search(r"\b(the|this|these|his|her|he|she|it|they|there)\b", text)
        return not definite and bool(re.search(r"\b(an?)\b|^\w+ (do|are|can) \w+", text))


# ---- runs --------------------------------------------------------------------------------------------------

def side_by_side(args, what, jobs, work_on):
    """[row]: those that work_on(job) gives for each job, --concurrency jobs at a time, in the jobs' order."""
    with concurrent.futures.ThreadPoolExecutor(args.concurrency) as pool:
        try:
            done = tqdm(pool.map(work_on, jobs), what, len(jobs), leave=False, disable=None)
            return [row for made in done for row in made]
        except BaseException as e:  # requests under way may finish, so that they are kept; no other starts
            args.stop.set()
            if isinstance(e, KeyboardInterrupt):
                print("\nwaiting for answers under way; Ctrl-C again does not", file=sys.stderr)
            raise


def write_rows(args, rows):
    """Keep the rows in FILE.work/, write FILE, and say what was left out."""
    work = Work(args.out)
    if "sample" in args:  # for people to judge the whole by
        drawn = sorted(rows, key=lambda row: digest("sample", row["id"]))
        for row in drawn[:math.ceil(args.sample * len(rows))]:
            row["sample"] = True
    write_whole(work.made, "".join(json.dumps(row) + "\n" for row in rows))
    lines, n = work.finish()
    everything = [a for row in rows for a in row["annotations"]]
    reasons = collections.Counter(a["left_out"] for a in everything if "left_out" in a)
    print(f"{args.out}: {lines} lines, {n} annotations; left out: {dict(reasons.most_common()) or 'none'}")
    waiting = sum(k for reason, k in reasons.items() if reason.endswith(": no answer"))
    if waiting:
        raise UserError(f"{waiting} annotations wait for a server that did not answer; the same command asks "
                        "again")


def language_model(args):
    """A function that gives a new language model for each row, by --url and --model."""
    if args.url == "stand-in":
        return StandIn
    if not args.model or not args.licence:
        raise UserError(f"--url {args.url}: needs --model and --licence, which every row will name")
    check_server(args.url, args.model, args.allow_closed)
    return functools.partial(Served, Client(args), args.url, args.model, args.licence)


def run_caption(args):
    """Narrated videos -> FILE with a line per clip. The videos must lie under its folder."""
    folder = os.path.dirname(os.path.abspath(args.out))
    for path in args.videos:
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file")
        try:
            inside_folder(folder, os.path.relpath(os.path.abspath(path), folder))
        except BadMedia as e:
            raise UserError(f"{e}; put --out {args.out} into a folder that holds the videos") from None
    make_lm, make_ears = language_model(args), lambda: None
    eyes = own_checkpoint(args) if args.checkpoint else None
    if args.asr_url:
        check_server(args.asr_url, args.asr_model, args.allow_closed)
        make_ears = functools.partial(Served, Client(args), args.asr_url, args.asr_model, args.asr_licence)
    Work(args.out).check()
    clips = side_by_side(args, "narrations", args.videos, lambda path: clips_of(path, args, make_ears()))
    captioned = lambda row: [caption_clip(row, args, make_lm(), eyes)]
    write_rows(args, side_by_side(args, "clips", clips, captioned))


def run_qa(args):
    """FILE with captions -> another one beside it, with questions about the same media."""
    folder = lambda path: os.path.dirname(os.path.abspath(path))
    if folder(args.file) != folder(args.out) or os.path.abspath(args.file) == os.path.abspath(args.out):
        raise UserError(f"--out {args.out}: must be another file in the folder of {args.file}, where the "
                        "media are")
    rows = [dict(id=str(n)) | row for n, row in read_records(args.file)]
    make_lm = language_model(args)
    Work(args.out).check()
    write_rows(args, side_by_side(args, "lines", rows, lambda row: question_row(row, args, make_lm())))


def run_review(args):
    """Serve the page until Ctrl-C or a signal to end; FILE is then written with the decisions."""
    work = Work(args.file)
    if work.decisions():  # of an earlier session, which may have been killed
        work.finish()
    server = Reviewer(args.file, args.who or getpass.getuser(), args.port)
    url = f"http://127.0.0.1:{server.server_port}/"
    print(f"reviewing {args.file} as {server.who}: {url}   (Ctrl-C ends it)", flush=True)
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.default_int_handler)
    if args.open:
        webbrowser.open(url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    server.server_close()
    if server.decisions:
        print("{}: {} lines, {} annotations".format(args.file, *work.finish()))


# ---- report ------------------------------------------------------------------------------------------------

STEPS = ("narration", "describe", "merge", "contradictions", "check", "questions", "duplicate", "yes/no",
         "ambiguous", "unanswerable", "answerable", "guessable", "agree", "review")


def table(head, rows):
    """An HTML table of tuples, or "none"."""
    line = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}" for c in cells)
    lines = [line("th", head), *(line("td", row) for row in rows)]
    return "<table>" + "".join(lines) + "</table>" if rows else "<p>none</p>"


def request_counts(folder):
    """[("step: what came back", n)] of the finished requests and of what went wrong on the way to them."""
    counts = collections.Counter()
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if name.endswith(".json"):
            with open(os.path.join(folder, name), encoding="utf-8") as f:
                kept = json.load(f)
            why = None if kept["step"] == "narration" else read_reply(kept["reply"])[1]
            counts.update([f"{kept['step']}: {why or 'answered'}",
                           *(f"{kept['step']}: {t}, asked again" for t in kept["trouble"])])
    return counts.most_common()


def in_short(row, a):
    """(what is asked, what is answered) of an annotation; of a clip without a caption what was said in it."""
    if "options" in a:
        return a["question"], " / ".join("*" * (k == a["correct"]) + o for k, o in enumerate(a["options"]))
    if "points" in a:
        return a.get("prompt") or a.get("label", ""), f"{len(a['points'])} points"
    if "messages" in a:
        return a["messages"][0]["content"], a["messages"][1]["content"]
    said = " ".join(s["text"] for s in row.get("narration", ()))
    return a.get("prompt", ""), a["answer"] or f"said: {said or 'nothing'}"


def run_report(args):
    """FILE.work/report.html: what each step let through, why not, requests, decisions, examples."""
    work = Work(args.file)
    rows, decisions, e = work.rows(), work.decisions(), html.escape
    everything = [(row, a) for row in rows for a in settled(row, decisions.get(row["name"], {}))]
    reasons = collections.Counter(a["left_out"] for _, a in everything if "left_out" in a)
    left, yields = len(everything), [("made", "", len(everything), "100%")]
    for step in STEPS:
        gone = sum(n for reason, n in reasons.items() if reason.partition(":")[0] == step)
        left -= gone
        yields += [(step, gone, left, f"{left / len(everything):.0%}")] if gone else []
    by = sorted({p.get("model") or p.get("by", "unknown") for row in rows for p in row.get("provenance", [])})
    last = [d for mine in decisions.values() for d in mine.values()]
    verdicts = collections.Counter((d["verdict"], d["who"]) for d in last)
    sample = [a["status"] for row, a in everything if row.get("sample")]
    checked = (f"<p>Of the {len(sample)} annotations of the validation sample {sample.count('accept')} were "
               f"accepted as they are, {sample.count('undecided')} are undecided.</p>" if sample else "")
    page = [STYLE, "<style>body {padding: 0 1em} table {border-collapse: collapse} "
                   "th, td {text-align: left; padding: .1em .7em; border: 1px solid #ccc}</style>",
            f"<h1>{e(os.path.basename(args.file))}</h1><p>{len(rows)} lines, {len(everything)} "
            f"annotations made, {left} in the file. By: {e(', '.join(by)) or 'nobody named'}.</p>",
            "<h2>Yield of each step</h2>", table(("step", "left out", "go on", "share"), yields),
            "<h2>Reasons</h2>", table(("reason", "annotations"), reasons.most_common()),
            "<h2>Requests</h2>", table(("step and what came back", "times"),
                                       request_counts(os.path.join(work.folder, "requests"))),
            "<h2>Decisions of people</h2>", table(("verdict", "who", "annotations"),
                                                  [(*pair, n) for pair, n in verdicts.most_common()]),
            checked, "<h2>Examples</h2>"]
    for why in ("kept", *reasons):
        page.append(f"<h3>{e(why)}</h3>")
        for row, a in [pair for pair in everything if pair[1].get("left_out", "kept") == why][:3]:
            asked, answered = in_short(row, a)
            page.append(f"<p>{e(row['name'])}: {e(asked)} <i>{e(answered)}</i></p>")
    out = os.path.join(work.folder, "report.html")
    write_whole(out, "\n".join(page))
    print(f"{out}: {left} of {len(everything)} annotations kept")


# ---- demo --------------------------------------------------------------------------------------------------

def write_narrations(folder):
    """What a person might say, beside each toy clip; every fifth has a fault that a check should find."""
    wrong = ("Um.", "a star a star a star a star a star a star a star",
             "Ein Kreis und ein Stern auf der Ebene, das ist nicht viel.",
             "A purple star moves left and turns green. A white bar stays.")
    with open(os.path.join(folder, "clips.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    for i, row in enumerate(rows):
        text = wrong[i // 5 % 4] if i % 5 == 4 else row["annotations"][0]["answer"]
        text = re.sub(r"(, | and )a ", ". A ", text)
        parts, base = re.split(r"(?<=\.) ", text), os.path.splitext(os.path.join(folder, row["video"]))[0]
        step, stamp = row["duration"] / len(parts), lambda t: f"00:00:{t:06.3f}"
        timed = [f"{stamp(k * step)} --> {stamp((k + 1) * step)}\n{part}\n" for k, part in enumerate(parts)]
        ending = (".srt", ".vtt", ".txt")[i % 3]
        write_whole(base + ending, {".txt": text, ".vtt": "WEBVTT\n\n" + "\n".join(timed),
                                    ".srt": "\n".join(f"{k}\n{t}" for k, t in enumerate(timed, 1))}[ending])
    return [os.path.join(folder, row["video"]) for row in rows]


def run_demo(args):
    """The commands of this file, one after the other, on toy clips; two steps of training on the result."""
    videos = write_narrations(toy.write_clips(os.path.join(args.out, "toy"), args.clips, 0))
    captions, qa = (os.path.join(args.out, name) for name in ("captions.jsonl", "qa.jsonl"))
    by = ["--url", "stand-in"]
    for command in (["caption", *videos, "--out", captions, *by, "--narrator", STAND_IN],
                    ["qa", captions, "--out", qa, *by], ["report", captions], ["report", qa]):
        shown = shlex.join(command).replace(shlex.join(videos), f"{videos[0]} ...")
        print(f"\n$ python -m tools.annotate {shown}", flush=True)
        main(command)
    train = ["pretrain.py", "--config", "small", "--steps", "2", "--global_batch", "4", "--micro_batch", "2",
             "--seq_len", "512", "--data", captions, qa, "--out", os.path.join(args.out, "run")]
    print("\n$ python", shlex.join(train), flush=True)
    failed = subprocess.run([sys.executable, os.path.join(ROOT, train[0]), *train[1:]]).returncode
    if failed:
        sys.exit(failed)
    if args.review:
        print("\n$ python -m tools.annotate review", qa, flush=True)
        main(["review", qa])


def number(kind, low, high=math.inf):
    """A type of flags: a number of a kind, from low to high."""
    def read(text):
        if not low <= (value := kind(text)) <= high:
            upto = f"from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text}: must be {upto}")
        return value
    read.__name__ = kind.__name__  # what argparse calls it, of what is no number
    return read


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    commands = p.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, text):
        c = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        c.set_defaults(run=run)
        return c.add_argument

    flag = command("caption", run_caption, "narrated videos to dense captions")
    flag("videos", nargs="+", help="videos, each with .srt, .vtt, .txt or sound beside it, or sound in it")
    flag("--narrator", default="unknown", help="who spoke or wrote the narration [unknown]")
    flag("--asr_url", help="server of /audio/transcriptions, for narrations that are sound")
    flag("--asr_model", default="whisper-large-v3", help="its model [whisper-large-v3]")
    flag("--asr_licence", default="Apache-2.0", help="licence of that model [Apache-2.0]")
    flag("--checkpoint", help="folder of one of our own checkpoints, which then describes the frames")
    flag("--device", default="cpu", help="of that checkpoint: cpu, cuda or mps [cpu]")
    flag("--clip_seconds", type=number(float, 1), default=30.0,
         help="longest clip; cut where narration pauses [30]")
    flag("--frames", type=number(int, 1), default=8,
         help="frames of a clip to describe, at most one a second [8]")
    flag("--language", default="en", choices=(*LANGUAGES, "any"), help="of the captions [en]")
    served = [flag]
    flag = command("qa", run_qa, "captions to questions, filtered")
    flag("file", help="JSONL file with captions")
    flag("--questions", type=number(int, 1), default=12, help="asked for per caption [12]")
    flag("--sample", type=number(float, 0, 1), default=0.1,
         help="share of lines marked for people to check [0.1]")
    for flag in served + [flag]:
        flag("--out", required=True, help="JSONL file to write; its folder must hold the media")
        flag("--url", required=True, help="OpenAI-compatible server, e.g. http://localhost:8000/v1; "
                                          "stand-in = rules for the toy world, no model")
        flag("--model", help="name of its model")
        flag("--licence", help="licence of that model, named in every row")
        flag("--concurrency", type=number(int, 1, 256), default=8,
             help="clips or lines worked on at a time [8]")
        flag("--timeout", type=number(float, 0.1, 86400), default=120.0,
             help="seconds to wait for an answer [120]")
        flag("--allow_closed", action="store_true", help="let closed models through; their rows are marked")
    flag = command("review", run_review, "a page to accept, edit, reject and place points")
    flag("file", help="JSONL file, made here or elsewhere")
    flag("--who", help="name under which decisions are kept [the login]")
    flag("--port", type=number(int, 0, 65535), default=0, help="of 127.0.0.1 [a free one]")
    flag("--open", action=argparse.BooleanOptionalAction, default=True, help="open it in a browser [yes]")
    command("report", run_report, "what each step let through, as a page")("file", help="JSONL file")
    flag = command("demo", run_demo, "all of it on toy videos")
    flag("--out", default=os.path.join("out", "annotate"), help="folder [out/annotate]")
    flag("--clips", type=number(int, 1), default=20, help="toy clips [20]")
    flag("--review", action=argparse.BooleanOptionalAction, default=True, help="end with the page [yes]")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    args.stop = threading.Event()
    try:
        args.run(args)
    except (UserError, BadCheckpoint, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr, flush=True)
        os._exit(130)  # a thread that still waits for a server would hold up any other way out


if __name__ == "__main__":
    main()
