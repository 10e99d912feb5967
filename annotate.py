"""
Making data: people say what they see, open language models help, filters check, people decide.

    caption   video ─► narration ─► clips with times ─► their frames described ─► one dense caption ─► checks
    qa        caption ─► questions ─► answered from the caption, and without it ─► filters
    review    a page on this machine: accept, edit, reject; points placed and tracked frame by frame
    report    what each step let through, and what not and why

    python annotate.py demo                                        # all of it on toy videos, without any server
    python annotate.py caption clips/*.mp4 --out clips/captions.jsonl \\
        --url http://localhost:8000/v1 --model Qwen3-VL-8B-Instruct --licence Apache-2.0
    python annotate.py qa clips/captions.jsonl --out clips/qa.jsonl --url ... --model ... --licence ...
    python annotate.py review clips/qa.jsonl --who ann
    python annotate.py report clips/qa.jsonl

FILE.jsonl trains as it is: lines that passed, with the decisions of people applied. Beside it FILE.work/ holds
rows.jsonl, every line in order with why it was left out; decisions.jsonl, to which people only ever append; and
requests/, the answers of servers by the hash of what was asked. A run that was stopped repeats none of them.

Nothing is distilled from a closed model: their hosts and names are refused. --allow_closed lets them through and
marks the rows, and training leaves marked rows out. Keys of servers come from ANNOTATE_API_KEY.
"""
import argparse
import base64
import collections
import concurrent.futures
import datetime
import getpass
import html
import io
import itertools
import json
import os
import random
import re
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

import toy
from data import MEDIA, STYLE, BadRow, parse_row
from media import BadMedia, inside_folder, load_frames, sample_times, video_duration
from prepare import NetError, patiently
from review import HERE, Reviewer, Work, digest, jpeg, settled, write_whole
from sample import Chat, load
from weights import BadCheckpoint

STAND_IN = "rule-based stand-in, no language model"
SOUND = (".wav", ".mp3", ".m4a", ".flac", ".ogg")
# Who sells answers of models whose weights are not published, and what such models are called behind other hosts.
CLOSED_HOSTS = re.compile(r"(^|\.)(openai\.com|openai\.azure\.com|anthropic\.com|(generativelanguage|aiplatform)\.googleapis\.com|"
                          r"bedrock[\w-]*\.[\w-]+\.amazonaws\.com|x\.ai|cohere\.(com|ai)|perplexity\.ai|ai21\.com)$")
CLOSED_MODELS = re.compile(r"gpt-[345]|chatgpt|claude|gemini|(^|/)o[134](-|$)", re.I)
REFUSAL = re.compile(r"\s*(i'?m sorry|i am sorry|sorry|i can ?not|i can'?t|i'?m unable|i am unable|as an ai\b)", re.I)
LONGEST = 6000  # characters of an answer; a model that writes more has lost its way


class UserError(Exception):
    """A mistake of who runs this; the message is one line."""


class Unusable(Exception):
    """A step gave nothing that can be used: "step: reason", under which it is counted."""


# ---- models: an OpenAI-compatible server ---------------------------------------------------------------------

PROMPTS = dict(
    describe="This is the frame at {t:g} s of a video. Describe in two or three sentences what can be seen: people, "
             "things, their looks and places, actions, written text. Nothing that cannot be seen.",
    merge="A person told what happens in a video clip:\n{narration}\n\nIts frames were described one by one:\n{frames}"
          "\n\nWrite one dense caption of the clip, in the order of time, with every detail of what was said and what "
          "was seen. Where they disagree the person is right. Invent nothing. The caption alone.",
    contradictions="A person said of a video clip:\n{narration}\n\nDescriptions of its frames:\n{frames}\n\nWhich "
                   "statements of the person do the frames contradict? Not being seen is no contradiction. "
                   "Answer with a JSON list of strings, [] if there are none.",
    questions="A video shows this:\n{caption}\n\nWrite {n} different questions that this answers and that nobody can "
              'answer without it. Answer with a JSON list of {{"question": ..., "answer": a few words, "wrong": three '
              "wrong answers as plausible as the right one, or [] for an open question}}.",
    ambiguous="A video shows this:\n{caption}\n\nQuestion: {question}\nAs it is worded, could the question mean "
              "more than one thing or have several right answers? Answer with JSON, true or false.",
    answerable="A video shows this:\n{caption}\n\n{question}\nAnswer from this alone, in a few words; if it does not "
               'say, answer "unknown".',
    guessable="You cannot see the video this question is about. Guess the likeliest answer, in a few words.\n{question}",
    agree="{question}\nOne answer: {one}\nAnother: {other}\nDo they say the same? Answer with JSON, true or false.")


def check_server(flag, url, model, allow_closed):
    """Whether what answers at a URL is closed. Refused: closed ones unless allowed, and plain http to elsewhere."""
    parts = urllib.parse.urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if not host or parts.scheme not in ("http", "https"):
        raise UserError(f"{flag} {url}: not a URL; e.g. http://localhost:8000/v1")
    if parts.scheme == "http" and host not in ("localhost", "127.0.0.1", "::1"):
        raise UserError(f"{flag} {url}: only https, except on this machine")
    by_host = CLOSED_HOSTS.search(host)
    closed = bool(by_host or CLOSED_MODELS.search(model))
    if closed and not allow_closed:
        raise UserError(f"{flag} {url}: {host if by_host else 'model ' + model} is a closed model's, and its answers are "
                        "not to be distilled; run an open model, or --allow_closed marks the rows, and training "
                        "leaves them out")
    return closed


class Client:
    """Asks servers; every finished request is kept in `folder` by the hash of what was asked, and asked once."""

    def __init__(self, folder, timeout, allow_closed):
        self.folder, self.timeout, self.allow_closed = folder, timeout, allow_closed
        self.locks, self.lost = collections.defaultdict(threading.Lock), 0
        key = os.environ.get("ANNOTATE_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        os.makedirs(folder, exist_ok=True)

    def ask(self, step, url, key, **request):
        """{reply, trouble: what went wrong on the way, date}, kept or new. No answer is an Unusable; run again for it."""
        path, trouble = os.path.join(self.folder, key + ".json"), []

        def send():
            try:
                r = requests.post(url, headers=self.headers, timeout=(10, self.timeout), allow_redirects=False, **request)
            except requests.RequestException as e:
                trouble.append(type(e).__name__)
                raise
            trouble.extend([] if r.ok else [str(r.status_code)])
            return r

        with self.locks[key]:  # two rows may ask the same
            if os.path.exists(path):
                with open(path, encoding="utf-8") as f:
                    return json.load(f)
            try:
                r = patiently(send, f"{step}: {url}")
                self.lost = 0
            except NetError as e:
                self.lost += 1
                if self.lost > 8:
                    raise UserError(f"{url}: no answer to {self.lost} requests in a row ({e}); the same command goes on "
                                    "where this one stopped") from None
                raise Unusable(f"{step}: no answer") from None
            if r.status_code in (301, 302, 303, 307, 308, 401, 403, 404):
                raise UserError(f"{url}: status {r.status_code} {r.reason}, {r.text[:200]!r}; wrong URL, model or key?")
            try:
                kept = dict(step=step, reply=r.json(), trouble=trouble, date=datetime.date.today().isoformat())
            except ValueError:
                raise Unusable(f"{step}: no answer of the protocol") from None
            if not r.ok:
                raise Unusable(f"{step}: status {r.status_code}")
            write_whole(path, json.dumps(kept))
            return kept


def read_reply(reply):
    """(text, why it cannot be used or None) of a chat completion."""
    try:
        choice = reply["choices"][0]
        text, message = choice["message"].get("content") or "", choice["message"]
    except (LookupError, TypeError, AttributeError):
        return "", "no answer of the protocol"
    if message.get("refusal") or choice.get("finish_reason") == "content_filter" or REFUSAL.match(text):
        return text, "refusal"
    if choice.get("finish_reason") == "length" or len(text) > LONGEST:
        return text, "overlong answer"
    return text, None if text.strip() else "empty answer"


def parse_json(kind):
    """text -> the JSON list or bool in it; ValueError if there is none."""
    def parse(text):
        body = text[text.find("["):text.rfind("]") + 1] if kind is list else text.strip(" .`\n").lower()
        value = json.loads(body)
        if not isinstance(value, kind):
            raise ValueError(text)
        return value
    return parse


class Served:
    """What a language model behind a server is asked about one row; `notes` says by whom each step was done."""

    def __init__(self, client, url, model, licence, checkpoint=None):
        self.client, self.url, self.model, self.licence = client, url.rstrip("/"), model, licence
        self.checkpoint, self.notes = checkpoint, {}

    def note(self, step, model, date, url):
        closed = check_server("--url", url, model, self.client.allow_closed)  # the reply names the model that spoke
        self.notes[step] = dict(step=step, by="model", model=model, licence=self.licence,
                                prompt=digest(PROMPTS.get(step, ""))[:16], date=date) | ({"closed": True} if closed else {})

    def ask(self, step, parse=str.strip, pictures=(), **about):
        """The answer to a step's prompt, parsed. What is empty or cannot be parsed is asked for once more."""
        content = [dict(type="text", text=PROMPTS[step].format(**about))]
        content += [dict(type="image_url", image_url=dict(
            url="data:image/jpeg;base64," + base64.b64encode(p).decode())) for p in pictures]
        messages, url = [dict(role="user", content=content)], self.url + "/chat/completions"
        for _ in range(2):
            body = dict(model=self.model, temperature=0, max_tokens=1024, messages=messages)
            kept = self.client.ask(step, url, digest(body), json=body)
            self.note(step, str(kept["reply"].get("model") or self.model) if isinstance(kept["reply"], dict) else
                      self.model, kept["date"], url)
            text, why = read_reply(kept["reply"])
            if why is None:
                try:
                    return parse(text)
                except ValueError:
                    why = "invalid JSON"
            if why in ("refusal", "overlong answer"):
                break
            messages = messages + [dict(role="assistant", content=text),
                                   dict(role="user", content="That cannot be read. Only what was asked for, please.")]
        raise Unusable(f"{step}: {why}")

    def transcribe(self, name, sound):
        """[{start, end, text}] of an audio file's bytes; times are missing where the server gives none."""
        form, url = dict(model=self.model, response_format="verbose_json"), self.url + "/audio/transcriptions"
        kept = self.client.ask("narration", url, digest(form, sound), data=form, files=dict(file=(name, sound)))
        self.note("narration", self.model, kept["date"], url)
        reply = kept["reply"] if isinstance(kept["reply"], dict) else {}
        try:
            return [dict(start=float(s["start"]), end=float(s["end"]), text=s["text"].strip())
                    for s in reply.get("segments") or []] or [dict(start=0.0, end=None, text=reply["text"].strip())]
        except (LookupError, TypeError, ValueError, AttributeError):
            raise Unusable("narration: no answer of the protocol") from None

    def describe(self, t, picture):
        if self.checkpoint:
            return self.checkpoint(self, t, picture)
        return self.ask("describe", pictures=[picture], t=t)

    def merge(self, narration, frames):
        return self.ask("merge", narration=narration, frames=frames)

    def contradictions(self, narration, frames):
        return self.ask("contradictions", parse_json(list), narration=narration, frames=frames)

    def questions(self, caption, n):
        return self.ask("questions", parse_json(list), caption=caption, n=n)

    def ambiguous(self, q, caption):
        return self.ask("ambiguous", parse_json(bool), question=q["question"], caption=caption)

    def agrees(self, step, q, **known):
        """Whether what the model answers to a question is what the question says."""
        options = sorted([q["answer"], *q["wrong"]]) if q["wrong"] else []
        asked = "Question: " + q["question"] + "".join(f"\n- {o}" for o in options)
        said = self.ask(step, question=asked, **known)
        same = lambda text: text.strip(" .\"'").lower()
        return same(said) == same(q["answer"]) or self.ask("agree", parse_json(bool), question=asked, one=q["answer"],
                                                           other=said)

    def answerable(self, q, caption):
        return self.agrees("answerable", q, caption=caption)

    def guessable(self, q):
        return self.agrees("guessable", q)


class Checkpoint:
    """One of our own checkpoints, asked to describe frames; one frame at a time, whatever the concurrency."""

    def __init__(self, folder, device):
        self.folder, self.lock, self.loaded = folder, threading.Lock(), load(folder, device)

    def __call__(self, served, t, picture):
        with self.lock, tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "frame.jpg")
            with open(path, "wb") as f:
                f.write(picture)
            text = "".join(Chat(*self.loaded, [path]).ask("Describe the image.")).strip()
        served.notes["describe"] = dict(step="describe", by="model", model=self.folder, licence="as its weights",
                                        prompt=digest("Describe the image.")[:16])
        if not text:
            raise Unusable("describe: empty answer")
        return text


# ---- rules in place of a model -------------------------------------------------------------------------------
#
# They see coloured shapes and read plain English by its words. They stand in for a language model where there is
# none, in the demo and in tests, and every row says so.

NUMBERS = {w: str(i) for i, w in enumerate("zero one two three four five six seven eight nine ten eleven".split())}
EMPTY = set("a an the of to in on at is are was were be been do does did has have had what which who whom whose where "
            "when why how many much often with and or it its his her him their there this that they he she them from for "
            "by as into out one".split())
SHE, HE = ("woman", "girl", "lady", "mother"), ("man", "boy", "father", "cyclist", "goalkeeper", "striker")
MOTION = re.compile(rf"a (\w+) ({'|'.join(toy.SHAPES)}) (?:moves (\w+)|stays)(?: and turns (\w+))?", re.I)


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


def several(noun, text):
    """Whether a text tells of more than one such thing."""
    many = {"man": "men", "woman": "women", "child": "children", "person": "people"}.get(noun, noun + "s")
    number = "|".join([*list(NUMBERS)[2:], "several", "many", "some", "both"])
    return bool(re.search(rf"\b((another|other|second) (\w+ )?{noun}|({number}) (\w+ )?{many})\b", text.lower()))


class StandIn:
    """The same questions answered by rules."""

    def __init__(self):
        self.notes = {}

    def note(self, step):
        self.notes[step] = dict(step=step, by=STAND_IN)

    def describe(self, t, picture):
        """Regions of the toy world's colours; their second moments tell a bar, how they fill their circle a star."""
        self.note("describe")
        pixels, seen = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), float), []
        for colour, rgb in toy.COLOURS.items():
            y, x = np.nonzero(np.abs(pixels - rgb).max(-1) < 55)
            if len(x) < pixels.size / 300:
                continue
            cx, cy = x.mean(), y.mean()
            spread, far = np.sqrt(np.linalg.eigvalsh(np.cov([x, y]))), np.quantile(np.hypot(x - cx, y - cy), 0.99)
            shape = "bar" if spread[1] > 2 * spread[0] else "circle" if len(x) > 0.6 * np.pi * far ** 2 else "star"
            where = ("left", "middle", "right")[min(int(3 * cx / pixels.shape[1]), 2)]
            seen.append(f"a {colour} {shape} at the {where}" if where != "middle" else f"a {colour} {shape} in the middle")
        return toy.listing(seen) if seen else "no shape"

    def merge(self, narration, frames):
        self.note("merge")
        seen = [line.split(": ", 1) for line in frames.splitlines()]
        changes = [next(same) for _, same in itertools.groupby(seen, key=lambda s: s[1])]
        return narration + "".join(f" At {t} there is {what}." for t, what in changes)

    def contradictions(self, narration, frames):
        self.note("contradictions")
        return [said for said in re.findall(rf"\w+ (?:{'|'.join(toy.SHAPES)})", narration.lower())
                if said.split()[0] in toy.COLOURS and said not in frames]

    def questions(self, caption, n):
        """Templates; some of them bad on purpose, so that every filter of the demo has something to find."""
        self.note("questions")
        out = []
        for colour, shape, way, turns in MOTION.findall(caption):
            ways = [w for w in (*toy.WAYS, "It stays") if w != (way or "It stays")]
            out += [(f"Which way does the {shape} move?", way or "It stays", ways[:3]),
                    (f"What colour is the {shape} at first?", colour.lower(), []),
                    (f"The {shape} moves which way?", way or "It stays", []),
                    (f"Is the {shape} {colour.lower()} at first?", "Yes", []), (f"Does the {shape} move?", "Yes", []),
                    (f"How heavy is the {shape}?", "a kilogram", []), ("What does it do?", "It moves.", []),
                    (f"What shape is the {colour.lower()} {shape}?", f"a {shape}", [])]
            out += [(f"What colour does the {shape} turn?", turns, [c for c in toy.COLOURS if c not in (turns, colour)][:3])
                    ] if turns else []
        return [dict(question=q, answer=a, wrong=wrong) for q, a, wrong in out[:n]]

    def ambiguous(self, q, caption):
        """Nothing but pronouns; a pronoun before any noun, unless there is but one it can mean; one of several."""
        self.note("ambiguous")
        words = re.findall(r"\w+", q["question"].lower())
        if not content(q["question"]):
            return True
        first = next(i for i, w in enumerate(words) if w not in EMPTY)
        for w in words[:first]:
            people = {"she": SHE, "her": SHE, "he": HE, "his": HE, "him": HE}.get(w)
            if people and len(re.findall(rf"\b({'|'.join(people)})\b", caption.lower())) != 1 or w in ("it", "they", "that",
                                                                                                    "there", "them"):
                return True
        return any(several(noun, caption) for noun in re.findall(r"\bthe (\w+)", q["question"].lower()))

    def answerable(self, q, caption):
        """Whether the sentence that shares most words with the question holds at least half of the answer's."""
        self.note("answerable")
        asked, sentences = content(q["question"]), [content(s) for s in re.split(r"(?<=[.!?])\s+", caption)]
        most = max(len(asked & s) for s in sentences)
        evidence = [s for s in sentences if len(asked & s) == most and most]
        if q["answer"].lower().strip(".") in ("yes", "no"):
            return any(asked <= s for s in evidence) == q["answer"].lower().startswith("yes")
        share = lambda text, s: len(content(text) & s) / max(len(content(text)), 1)
        return any(share(q["answer"], s) >= 0.5 and all(share(w, s) < share(q["answer"], s) for w in q["wrong"])
                   for s in evidence)

    def guessable(self, q):
        """Whether the question gives its answer away, or asks about the world at large."""
        self.note("guessable")
        text, answer = q["question"].lower(), content(q["answer"])
        if answer and answer <= content(text) and " or " not in text:
            return True
        definite = re.search(r"\b(the|this|these|his|her|he|she|it|they|there)\b", text)
        return not definite and bool(re.search(r"\b(an?)\b|^\w+ (do|are|can) \w+", text))


# ---- caption -------------------------------------------------------------------------------------------------

def read_narration(path, duration):
    """[{start, end, text}] of an .srt, .vtt or .txt file; plain text is for the whole video."""
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        text = f.read().replace("\r\n", "\n")
    if path.endswith(".txt"):
        return [dict(start=0.0, end=duration, text=" ".join(text.split()))] if text.strip() else []
    seconds = lambda h, m, s: int(h or 0) * 3600 + int(m) * 60 + float(s.replace(",", "."))
    stamp, out = r"(?:(\d+):)?(\d{1,2}):(\d{1,2}[.,]\d+)", []
    for block in re.split(r"\n\s*\n", text):
        m = re.search(rf"{stamp}\s*-->\s*{stamp}[^\n]*\n(.+)", block, re.S)
        if m:
            said = " ".join(re.sub(r"<[^>]*>", "", m[7]).split())
            out.append(dict(start=seconds(*m.groups()[:3]), end=min(seconds(*m.groups()[3:6]), duration), text=said))
    return [s for s in out if s["text"] and s["start"] < duration]


def sound_of(path):
    """(name, bytes) of the audio beside a video, or of its own first audio track as a WAV file; None without one."""
    for ending in SOUND:
        beside = os.path.splitext(path)[0] + ending
        if os.path.exists(beside):
            with open(beside, "rb") as f:
                return os.path.basename(beside), f.read()
    out = io.BytesIO()
    with av.open(path) as video, av.open(out, "w", format="wav") as wav:
        if not video.streams.audio:
            return None
        stream, turn = wav.add_stream("pcm_s16le", rate=16000, layout="mono"), av.AudioResampler("s16", "mono", 16000)
        for frame in [*video.decode(video.streams.audio[0]), None]:
            for part in turn.resample(frame):
                wav.mux(stream.encode(part))
        wav.mux(stream.encode(None))
    return "narration.wav", out.getvalue()


def narration_of(path, duration, ears, narrator):
    """(segments, provenance) of what was said about a video: a file beside it, or speech, transcribed."""
    for ending in (".srt", ".vtt", ".txt"):
        beside = os.path.splitext(path)[0] + ending
        if os.path.exists(beside):
            date = datetime.date.fromtimestamp(os.path.getmtime(beside)).isoformat()
            who = dict(by=STAND_IN) if narrator == STAND_IN else dict(by="people", who=narrator)
            return read_narration(beside, duration), [dict(step="narration", **who, date=date)]
    sound = ears and sound_of(path)
    if not sound:
        return [], []
    said = ears.transcribe(*sound)
    said = [dict(s, end=duration if s["end"] is None else min(s["end"], duration)) for s in said if s["text"]]
    return said, [dict(step="speech", by="people", who=narrator), ears.notes["narration"]]


def cut_clips(said, duration, longest):
    """[(start, end, segments)]: the video cut where a segment begins, into clips of at most `longest` seconds unless one
    segment is longer."""
    clips, begin = [[]], 0.0
    for s in sorted(said, key=lambda s: s["start"]):
        if clips[-1] and s["end"] - begin > longest:
            clips.append([])
            begin = s["start"]
        clips[-1].append(s)
    cuts = [0.0, *(c[0]["start"] for c in clips[1:]), duration]
    return [(round(a, 3), round(b, 3), c) for a, b, c in zip(cuts, cuts[1:], clips)]


# The commonest words of a language give it away; a caption in a language that is not here passes with --language any.
LANGUAGES = dict(en="the a an and of to in is it on with at for his her", de="der die das und ist ein eine auf im nicht den",
                 fr="le la les et un une est dans sur avec des du", es="el los las y un una en con por que su")


def text_faults(text, shortest, language):
    """What speaks against a narration or a caption by itself: length, repetition, language."""
    words = re.findall(r"\w+", text.lower())
    if not shortest <= len(words) <= 1200:
        yield "too short" if len(words) < shortest else "too long"
    runs = list(zip(*(words[k:] for k in range(4))))
    if len(words) >= 8 and (len(set(runs)) < 0.6 * len(runs) or len(set(words)) < 0.15 * len(words)):
        yield "repetition"
    hits = {name: sum(w in common.split() for w in words) for name, common in LANGUAGES.items()}
    if language != "any" and hits[language] < max(max(hits.values()), 0.04 * len(words)):
        yield f"not in {language}"


def caption_clip(name, path, clip, people, args, mind):
    """One clip -> its row. What cannot go on keeps what it has, and says at which step it was left out."""
    start, end, said = clip
    narration = " ".join(s["text"] for s in said)
    a = dict(task="video_caption", answer="")
    row = dict(id=f"{name} {start:g}-{end:g}", video=name, start=start, end=end, narration=said, frames=[], annotations=[a])
    try:
        if not narration:
            raise Unusable("narration: none")
        for fault in text_faults(narration, 3, args.language):
            raise Unusable(f"narration: {fault}")
        times = [round(float(t) + start, 2) for t in sample_times(max(end - start - 0.1, 0), args.frames, 1.0)]
        for t, pixels in zip(times, load_frames(path, times)):
            row["frames"].append(dict(t=t, text=mind.describe(t, jpeg(pixels))))
        frames = "\n".join(f"{f['t']:g} s: {f['text']}" for f in row["frames"])
        a["answer"] = mind.merge(narration, frames)
        for fault in text_faults(a["answer"], 8, args.language):
            raise Unusable(f"check: {fault}")
        row["contradictions"] = [str(c) for c in mind.contradictions(narration, frames)]
        if row["contradictions"]:
            raise Unusable("check: narration and frames disagree")
    except (Unusable, BadMedia) as e:
        a["left_out"] = str(e) if isinstance(e, Unusable) else f"describe: {e}"
    return dict(row, provenance=[*people, *mind.notes.values()])


def caption_video(path, args, make, ears):
    """The rows of a video, a line per clip."""
    folder = os.path.dirname(os.path.abspath(args.out))
    name = os.path.relpath(os.path.abspath(path), folder)
    try:
        inside_folder(folder, name)
        duration = video_duration(path)
        said, people = narration_of(path, duration, ears and ears(), args.narrator)
    except (Unusable, BadMedia, av.FFmpegError) as e:
        reason = str(e) if isinstance(e, Unusable) else f"narration: unreadable video ({e})"
        return [dict(id=name, video=name, annotations=[dict(task="video_caption", answer="", left_out=reason)])]
    return [dict(caption_clip(name, path, clip, people, args, make()), duration=round(duration, 3))
            for clip in cut_clips(said, duration, args.clip_seconds)]


# ---- questions and filters -----------------------------------------------------------------------------------

def alike(one, other):
    """Whether two questions ask the same: the same answer, and most of their words."""
    a, b = content(one["question"]), content(other["question"])
    return content(one["answer"]) == content(other["answer"]) and len(a & b) >= 0.6 * len(a | b)


def is_yes_no(q):
    return q["answer"].lower().strip(" .") in ("yes", "no")


def filter_question(q, kept, caption, mind):
    """Why a question is left out, or None. The cheap filters come first; kept: those of the row that passed."""
    if any(alike(q, other) for other in kept):
        return "duplicate: near another one"
    if is_yes_no(q) and 3 * sum(map(is_yes_no, kept)) >= max(sum(not is_yes_no(k) for k in kept), 1):
        return "yes/no: more than one in four"
    if mind.ambiguous(q, caption):
        return "ambiguous: several meanings"
    if not mind.answerable(q, caption):
        return "unanswerable: not from the caption"
    if mind.guessable(q):
        return "guessable: without looking"
    return None


def as_annotation(q, task, seed):
    """A question in the project's form; where the right option stands is a function of the row."""
    if not q["wrong"]:
        return dict(task=task, prompt=q["question"], answer=q["answer"])
    options = [q["answer"], *q["wrong"]]
    random.Random(f"{seed} {q['question']}").shuffle(options)
    return dict(task=task, question=q["question"], options=options, correct=options.index(q["answer"]))


def well_formed(q):
    fine = isinstance(q, dict) and all(isinstance(q.get(k), str) and q[k].strip() for k in ("question", "answer"))
    wrong = q.get("wrong", []) if fine else None
    return isinstance(wrong, list) and all(isinstance(w, str) and w.strip() for w in wrong) \
        and len({o.lower() for o in [q["answer"], *wrong]}) == len(wrong) + 1


def question_row(row, args, mind):
    """A captioned row -> the same media with questions; those left out say why."""
    a = next((a for a in row["annotations"] if a["task"].endswith("_caption") and a.get("answer")), None)
    if a is None:
        return None
    task, out, kept = a["task"].replace("_caption", "_qa"), [], []
    try:
        for q in mind.questions(a["answer"], args.questions)[:args.questions]:
            if not well_formed(q):
                out.append(dict(task=task, prompt=str(q)[:200], answer="", left_out="questions: malformed"))
                continue
            q = dict(question=q["question"].strip(), answer=q["answer"].strip(), wrong=q.get("wrong", []))
            try:
                reason = filter_question(q, kept, a["answer"], mind)
            except Unusable as e:
                reason = str(e)
            kept += [] if reason else [q]
            out.append(as_annotation(q, task, row["id"]) | ({"left_out": reason} if reason else {}))
        if not out:
            raise Unusable("questions: none")
    except Unusable as e:
        out.append(dict(task=task, prompt="", answer="", left_out=str(e)))
    about = {k: row[k] for k in ("id", *MEDIA, "start", "end", "duration", "width", "height", "subtitles") if k in row}
    return dict(about, caption=a["answer"], annotations=out, provenance=row.get("provenance", []) + list(mind.notes.values()))


# ---- lines, decisions, and the file that trains --------------------------------------------------------------

def write_rows(args, jobs, work_on):
    """Do the jobs, a few at a time, and write their rows in order, then FILE."""
    work = Work(args.out)
    with concurrent.futures.ThreadPoolExecutor(args.concurrency) as pool:
        try:
            rows = [row for made in pool.map(work_on, jobs) for row in made]
        except BaseException:  # a mistake or Ctrl-C: what is under way may finish, the rest need not start
            pool.shutdown(cancel_futures=True)
            raise
    sample = sorted(rows, key=lambda row: digest("sample", row["id"]))[:max(round(getattr(args, "sample", 0) * len(rows)), 1)]
    for row in sample if hasattr(args, "sample") else []:
        row["sample"] = True  # for people to judge the whole by
    write_whole(work.rows_path, "".join(json.dumps(row) + "\n" for row in rows))
    lines, n = work.finish()
    reasons = collections.Counter(a["left_out"] for row in rows for a in row["annotations"] if "left_out" in a)
    print(f"{args.out}: {lines} lines, {n} annotations; left out: {dict(reasons.most_common()) or 'none'}")
    waiting = sum(k for reason, k in reasons.items() if reason.endswith(": no answer"))
    if waiting:
        raise UserError(f"{waiting} annotations wait for a server that did not answer; the same command asks for them again")


def make_of(args):
    """A function that gives a new mind for each row, by --url, --model and --checkpoint."""
    if args.url == "stand-in":
        return StandIn
    if not args.model or not args.licence:
        raise UserError("--url needs --model and --licence, which every row will name, e.g. --licence Apache-2.0")
    check_server("--url", args.url, args.model, args.allow_closed)
    client = Client(os.path.join(Work(args.out).folder, "requests"), args.timeout, args.allow_closed)
    checkpoint = Checkpoint(args.checkpoint, args.device) if getattr(args, "checkpoint", None) else None
    return lambda: Served(client, args.url, args.model, args.licence, checkpoint)


def run_caption(args):
    make, ears = make_of(args), None
    if args.asr_url:
        check_server("--asr_url", args.asr_url, args.asr_model, args.allow_closed)
        client = Client(os.path.join(Work(args.out).folder, "requests"), args.timeout, args.allow_closed)
        ears = lambda: Served(client, args.asr_url, args.asr_model, args.asr_licence)
    folder = os.path.dirname(os.path.abspath(args.out))
    for path in args.videos:
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file")
        try:
            inside_folder(folder, os.path.relpath(os.path.abspath(path), folder))
        except BadMedia as e:
            raise UserError(f"{e}; put --out {args.out} into a folder that holds the videos") from None
    write_rows(args, args.videos, lambda path: caption_video(path, args, make, ears))


def run_qa(args):
    make = make_of(args)
    if os.path.dirname(os.path.abspath(args.file)) != os.path.dirname(os.path.abspath(args.out)) or args.file == args.out:
        raise UserError(f"--out {args.out}: another file in the folder of {args.file}, to which media paths are relative")
    with open(args.file, "rb") as f:
        rows = [parse_row(line) for line in f if line.strip()]
    for i, row in enumerate(rows):
        row.setdefault("id", str(i))
    write_rows(args, rows, lambda row: [made for made in [question_row(row, args, make())] if made])


# ---- report --------------------------------------------------------------------------------------------------

STEPS = ("narration", "describe", "merge", "contradictions", "check", "questions", "duplicate", "yes/no", "ambiguous",
         "unanswerable", "answerable", "guessable", "agree", "review")


def run_report(args):
    """FILE.work/report.html: how many annotations each step let through, why not, examples, requests, decisions."""
    work = Work(args.file)
    decisions, e = work.decisions(), html.escape
    rows = work.rows()
    everything = [(row, a) for row in rows for a in settled(row, decisions)]
    reasons = collections.Counter(a["left_out"] for _, a in everything if "left_out" in a)
    table = lambda head, lines: "<table border=1 cellpadding=4><tr>" + "".join(f"<th>{e(h)}" for h in head) + "".join(
        "<tr>" + "".join(f"<td>{e(str(c))}" for c in line) for line in lines) + "</table>"
    left, funnel = len(everything), [("made", "", len(everything), "100 %")]
    for step in STEPS:
        gone = sum(n for reason, n in reasons.items() if reason.partition(":")[0] == step)
        left -= gone
        funnel += [(step, gone, left, f"{left / max(len(everything), 1):.0%}")] if gone else []
    page = [STYLE, f"<h1>{e(os.path.basename(args.file))}</h1>",
            f"<p>{len(rows)} lines, {len(everything)} annotations made, {left} in the file. "
            f"By: {e(', '.join(sorted({p.get('model', p['by']) for row in rows for p in row.get('provenance', [])})))}.</p>",
            "<h2>Yield of each step</h2>", table(("step", "left out", "go on", "share"), funnel), "<h2>Reasons</h2>",
            table(("reason", "annotations"), reasons.most_common())]
    trouble = request_counts(os.path.join(work.folder, "requests"))
    if trouble:
        page += ["<h2>Requests</h2>", table(("step and what came back", "times"), trouble)]
    verdicts = collections.Counter((d["verdict"], d["who"]) for d in decisions.values())
    page += ["<h2>Decisions of people</h2>", table(("verdict", "who", "annotations"),
                                                   [(v, who, n) for (v, who), n in verdicts.most_common()])]
    drawn = [a for row, a in everything if row.get("sample")]
    page.append(f"<p>Of the validation sample of {len(drawn)} annotations {sum(a['status'] != 'undecided' for a in drawn)} "
                f"were decided, {sum(a['status'] == 'accept' for a in drawn)} accepted as they are.</p><h2>Examples</h2>")
    shown = collections.Counter()
    for row, a in everything:
        why = a.get("left_out", "kept")
        shown[why] += 1
        if shown[why] <= 3:
            text = a.get("prompt") or a.get("question") or a.get("label") or ""
            options = " / ".join(("*" if k == a["correct"] else "") + o for k, o in enumerate(a.get("options", ())))
            page.append(f"<p class={'tokens' if why == 'kept' else 'bad'}><b>{e(why)}</b> {e(row['id'])}: {e(text)} "
                        f"{e(a.get('answer') or options or str(len(a.get('points', ()))) + ' points')}</p>")
    out = os.path.join(work.folder, "report.html")
    write_whole(out, "\n".join(page))
    print(f"{out}: {left} of {len(everything)} annotations kept")


def request_counts(folder):
    """[("step: what came back", n)] of the finished requests, and of the failures on the way to them."""
    counts = collections.Counter()
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if name.endswith(".json"):
            with open(os.path.join(folder, name), encoding="utf-8") as f:
                kept = json.load(f)
            why = None if kept["step"] == "narration" else read_reply(kept["reply"])[1]
            counts.update([f"{kept['step']}: {why or 'answered'}", *(f"{kept['step']}: {t}, asked again"
                                                                     for t in kept["trouble"])])
    return counts.most_common()


# ---- review --------------------------------------------------------------------------------------------------

def run_review(args):
    """Serve the page until Ctrl-C; FILE is then written anew, with the decisions."""
    server = Reviewer(args.file, args.who, args.port)
    url = f"http://127.0.0.1:{server.server_port}/"
    print(f"reviewing {args.file} as {args.who}: {url}   (Ctrl-C ends it)", flush=True)
    if args.open:
        webbrowser.open(url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    server.server_close()
    print("{}: {} lines, {} annotations".format(args.file, *server.work.finish()))


# ---- demo ----------------------------------------------------------------------------------------------------

def write_narrations(folder):
    """What a person might say beside toy clips, from the drawing; every fifth has a fault that a check should find."""
    faults = ("Um.", "a star a star a star a star a star a star a star", "Ein Kreis und ein Stern auf der Ebene, das ist nicht viel.",
              "A purple star moves left and turns green. A white bar stays.")
    stamp = lambda t: f"00:00:{t:06.3f}"
    with open(os.path.join(folder, "clips.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    for i, row in enumerate(rows):
        text = row["annotations"][0]["answer"].replace(" and a ", ". A ").replace(", a ", ". A ")
        text = faults[i // 5 % len(faults)] if i % 5 == 4 else text
        parts, base = re.split(r"(?<=\.) ", text), os.path.splitext(os.path.join(folder, row["video"]))[0]
        step = row["end"] / len(parts)
        times = [(stamp(k * step), stamp((k + 1) * step), part) for k, part in enumerate(parts)]
        ending = (".srt", ".vtt", ".txt")[i % 3]
        body = {".srt": "\n".join(f"{k + 1}\n{a} --> {b}\n{s}\n".replace(".0", ",0", 0) for k, (a, b, s) in enumerate(times)),
                ".vtt": "WEBVTT\n\n" + "\n".join(f"{a} --> {b}\n{s}\n" for a, b, s in times), ".txt": text}[ending]
        write_whole(base + ending, body)
    return [os.path.join(folder, row["video"]) for row in rows]


def run_demo(args):
    """Every command of this file on toy clips, and two steps of training on what comes out."""
    videos = write_narrations(toy.write_clips(os.path.join(args.out, "toy"), args.clips, 0))
    captions, qa = (os.path.join(args.out, n) for n in ("captions.jsonl", "qa.jsonl"))
    shown = [v if k < 1 else "..." for k, v in enumerate(videos[:2])]
    for words, rest in ((["caption"], ["--out", captions, "--url", "stand-in", "--narrator", STAND_IN]),
                        (["qa", captions], ["--out", qa, "--url", "stand-in"]), (["report", captions], []),
                        (["report", qa], [])):
        print("\n$ python annotate.py", *words, *(shown if words == ["caption"] else []), *rest, flush=True)
        main([*words, *(videos if words == ["caption"] else []), *rest])
    train = ["pretrain.py", "--config", "small", "--steps", "2", "--global_batch", "4", "--micro_batch", "2", "--seq_len", "512",
             "--data", captions, qa, "--out", os.path.join(args.out, "run")]
    print("\n$ python", *train, flush=True)
    subprocess.run([sys.executable, os.path.join(HERE, train[0]), *train[1:]], check=True)
    if args.review:
        print("\n$ python annotate.py review", qa, flush=True)
        main(["review", qa])


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    sub = p.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, text):
        c = sub.add_parser(name, help=text, description=text, allow_abbrev=False)
        c.set_defaults(run=run)
        return c

    caption = command("caption", run_caption, "narrated videos to dense captions")
    caption.add_argument("videos", nargs="+", help="video files, each with its narration: .srt, .vtt, .txt or sound beside it")
    caption.add_argument("--narrator", default="unknown", help="who spoke or wrote the narration [unknown]")
    caption.add_argument("--asr_url", help="server of /audio/transcriptions, for narrations that are sound")
    caption.add_argument("--asr_model", default="whisper-large-v3", help="its model [whisper-large-v3]")
    caption.add_argument("--asr_licence", default="Apache-2.0", help="licence of that model [Apache-2.0]")
    caption.add_argument("--checkpoint", help="folder of one of our own checkpoints, which then describes the frames")
    caption.add_argument("--device", default="cpu", help="of that checkpoint: cpu, cuda or mps [cpu]")
    caption.add_argument("--clip_seconds", type=float, default=30.0, help="longest clip, cut where narration pauses [30]")
    caption.add_argument("--frames", type=int, default=8, help="frames of a clip that are described, at most one a second [8]")
    caption.add_argument("--language", default="en", choices=(*LANGUAGES, "any"), help="of the captions [en]")
    qa = command("qa", run_qa, "captions to questions, filtered")
    qa.add_argument("file", help="JSONL file with captions")
    qa.add_argument("--questions", type=int, default=12, help="asked for per caption [12]")
    qa.add_argument("--sample", type=float, default=0.1, help="share of lines marked for people to check [0.1]")
    for c in (caption, qa):
        c.add_argument("--out", required=True, help="JSONL file to write; media stay where they are, under its folder")
        c.add_argument("--url", required=True, help="OpenAI-compatible server, e.g. http://localhost:8000/v1; "
                                                    "stand-in = rules for the toy world, no model")
        c.add_argument("--model", help="name of its model")
        c.add_argument("--licence", help="licence of that model, kept in every row")
        c.add_argument("--concurrency", type=int, default=8, help="lines worked on at a time [8]")
        c.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for an answer [120]")
        c.add_argument("--allow_closed", action="store_true",
                       help="let closed models through; rows are marked, training leaves them out")
    review = command("review", run_review, "a page to accept, edit, reject and place points")
    review.add_argument("--who", default=getpass.getuser(), help="name under which decisions are kept [the login]")
    review.add_argument("--port", type=int, default=0, help="of 127.0.0.1 [a free one]")
    review.add_argument("--open", action=argparse.BooleanOptionalAction, default=True, help="open it in a browser [yes]")
    report = command("report", run_report, "yield of each step, reasons and examples, as a page")
    for c in (review, report):
        c.add_argument("file", help="JSONL file")
    demo = command("demo", run_demo, "all of it on toy videos")
    demo.add_argument("--out", default=os.path.join("out", "annotate"), help="folder [out/annotate]")
    demo.add_argument("--clips", type=int, default=20, help="toy clips [20]")
    demo.add_argument("--review", action=argparse.BooleanOptionalAction, default=True, help="end with the page [yes]")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    try:
        args.run(args)
    except (UserError, BadRow, BadMedia, BadCheckpoint, OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
