"""
A page that answers: ask a checkpoint about images and videos in a browser on this machine.

    python -m tools.demo out/small/sft/latest           # prints the address of the page
    python -m tools.demo weights/Molmo2-8B --device cuda --port 8000

    the page, demo.html          this program
    drop files    POST /media ─► a Talk: the files, checked as data files are, and a sample.Chat about them
    ask           POST /ask ───► Chat.ask, one question at a time: a line of JSON for each piece of the answer, with the
                                 points that it completes, as soon as it is there
    play          GET /frame ──► the k-th frame as a JPEG
    look closer   GET /saw ────► the crops and tokens that the model got for a question

A video goes to the page as pictures of its frames: browsers play few of the formats that are read here, and a point is
drawn on the very frame it belongs to. The page keeps nothing but the name of its talk; closing it ends its answer.
"""
import argparse
import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time

import lib  # noqa: F401: before torch, which reads the environment that it sets
import torch

from lib import toy
from lib.draw import draw
from lib.errors import UserError
from lib.media import inside_folder, load_frames, load_image, sample_times, video_duration
from lib.page import STYLE
from lib.records import media_kind, parse_record
from lib.results import answer_record, name_of, points_of, to_annotation
from lib.server import LocalServer, PageHandler, jpeg
from model import PRESETS
from sample import Chat, add_device_flags, bounded, load
from tools.show import media_html, tokens_html

UPLOAD = 200 << 20   # bytes of the files of one talk
UPLOADS = 1 << 30    # bytes of the files of all talks; the oldest talks are dropped
TALKS = 16           # each may hold 200 MB of an encoded video
FRAMES = 300         # pictures of a video that the page plays, at most 10 a second
CHUNK = 20           # of them, decoded at a time


def plain(error, paths):
    """An error in words for the page, which names files as the person does."""
    words = str(error).replace("not a readable image", "neither an image nor a video that can be read")
    for path in paths:
        words = words.replace(path, os.path.basename(path))
    return words


class Talk:
    """One conversation: its media, and what was asked and answered. folder: of files that were uploaded, which goes
    with the talk; prompts: what may be asked."""

    def __init__(self, model, planner, paths, folder=None, prompts=()):
        self.name = secrets.token_urlsafe(12)  # whoever knows it may read the talk
        self.paths = paths
        self.names = [os.path.basename(path) for path in paths]
        self.folder = folder
        self.n_bytes = sum(map(os.path.getsize, paths)) if folder else 0
        self.turns = []  # dicts, as the page gets them
        self.chat = Chat(model, planner, paths)
        self.kind = self.chat.kind
        self.times = []  # of the frames that the page plays, in seconds
        if self.kind == "video":
            self.times = sample_times(video_duration(paths[0]), FRAMES, 10.0).tolist()
        self.shown = dict(talk=self.name, names=self.names, times=self.times, prompts=prompts, turns=self.turns)
        self.pictures = {}  # k -> JPEG of a frame or an image
        self.lock = threading.Lock()
        # What is broken or too much for the model is refused now, and not at the first question.
        for k in range(1 if self.times else len(paths)):
            self.picture(k)
        self.plan([], "")

    def picture(self, k):
        """JPEG bytes of the k-th frame of the video, or of the k-th image."""
        with self.lock:
            if k not in self.pictures and self.times:
                begin = k - k % CHUNK
                frames = load_frames(self.paths[0], self.times[begin:begin + CHUNK], lambda rgb: jpeg(rgb, 960))
                self.pictures |= enumerate(frames, begin)
            elif k not in self.pictures:
                self.pictures[k] = jpeg(load_image(self.paths[k]), 1600)
            return self.pictures[k]

    def plan(self, before, question):
        """The plan of a question after the messages `before`."""
        return self.chat.planner.question(self.chat.record, None, [*before, dict(role="user", content=question)])

    def answer(self, question, length, temperature):
        """Ask. Yields the number of the turn, then dict(text=, points=): what has come since; at the end the turn."""
        turn = dict(turn=len(self.turns), question=question, answer="", points=[], state="stopped",
                    before=len(self.chat.messages))
        self.turns.append(turn)
        yield dict(turn=turn["turn"])
        try:
            # another seed each time: above temperature 0 one may ask again for another answer
            for piece in self.chat.ask(question, length, temperature, seed=len(self.turns)):
                turn["answer"] += piece
                n_points = len(turn["points"])
                turn["points"] = points_of(turn["answer"], self.kind, len(self.names))
                yield dict(text=piece, points=turn["points"][n_points:])
            turn["state"] = "done"
        except (UserError, OSError, torch.OutOfMemoryError) as e:
            turn |= dict(state="error", error=plain(e, self.paths))
        yield turn

    def saw(self, turn):
        """HTML: what the model got for a turn's question, with the points of its answer."""
        planner = self.chat.planner
        plan = self.plan(self.chat.messages[:turn["before"]], turn["question"])
        media = media_html(plan, dict(annotations=[dict(points=turn["points"])]), planner.cfg)
        return (f"{STYLE}<p>{plan.n_tokens} tokens, {plan.n_crops} crops. Lines over an image: what is pooled into one "
                "visual token; circles: points of the answer. Tokens: the media in grey, then the talk up to the "
                f"question.</p>{media}{tokens_html(plan, planner.tokenizer)}")

    def record(self, turn, checkpoint):
        """("results.jsonl", bytes): a turn as the line that sample.py would write."""
        grammar = self.chat.planner.cfg.point_format
        annotation = to_annotation(self.kind, turn["question"], turn["answer"], grammar, len(self.names))
        media = self.names if self.kind == "images" else self.names[0]
        record = answer_record(self.kind, media, annotation, self.names[0], checkpoint)
        return "results.jsonl", json.dumps(record, ensure_ascii=False).encode() + b"\n"

    def drawn(self, turn, k):
        """(name, bytes): the video, or the k-th image, with the points of a turn."""
        with tempfile.TemporaryDirectory() as aside:
            out = os.path.join(aside, "answer.mp4" if self.times else "answer.png")
            path = draw(self.kind, self.paths, turn["points"], out)[k]
            with open(path, "rb") as f:
                return os.path.basename(path), f.read()


def read_examples(folder):
    """Held-out images and clips of the toy world, as far as it is drawn: [(paths, prompts)]."""
    found = {}  # paths -> {prompt: None}, each once and in order
    for name, n in (("eval/scenes", 6), ("clips/eval/tracks", 6), ("clips/eval/clips", 6), ("eval/pairs", 2)):
        path = os.path.join(folder, name + ".jsonl")
        if not os.path.exists(path):
            continue
        with open(path, "rb") as lines:
            for line in itertools.islice(lines, n):
                record = parse_record(line)
                media = record[media_kind(record)]
                names = media if isinstance(media, list) else [media]
                paths = tuple(inside_folder(os.path.dirname(path), name) for name in names)
                with_points_first = sorted(record["annotations"], key=lambda a: not a.get("points"))
                found.setdefault(paths, {}).update((a["prompt"], None) for a in with_points_first)
    return [(list(paths), list(prompts)[:5]) for paths, prompts in found.items()]


class Demo(LocalServer):
    """The page, the talks and the line before the model. folder: for uploads; examples: [(paths, prompts)]."""

    def __init__(self, checkpoint, model, planner, folder, examples=(), port=0):
        self.checkpoint = name_of(checkpoint)
        self.model = model
        self.planner = planner
        self.folder = folder
        self.examples = examples
        self.talks = {}  # by name; the one used last is at the end
        self.lock = threading.Lock()  # of the talks
        self.line = []   # tickets of the questions in their order; the first one is being answered
        super().__init__(Handler, port)

    def talk(self, name):
        with self.lock:
            if name not in self.talks:
                raise UserError("this conversation is gone: newer ones took its place, or the program began again")
            self.talks[name] = self.talks.pop(name)
            return self.talks[name]

    def begin(self, paths, folder=None, prompts=()):
        """A new talk about some files. The oldest ones make room for it."""
        try:
            talk = Talk(self.model, self.planner, paths, folder, prompts)
        except (UserError, OSError) as e:
            shutil.rmtree(folder or "", ignore_errors=True)
            raise UserError(plain(e, paths)) from None
        with self.lock:
            self.talks[talk.name] = talk
            while len(self.talks) > TALKS or sum(talk.n_bytes for talk in self.talks.values()) > UPLOADS:
                oldest = self.talks.pop(next(iter(self.talks)))
                shutil.rmtree(oldest.folder or "", ignore_errors=True)
        return talk


class Handler(PageHandler):
    """What the page asks for."""

    def get(self, path, query):
        demo = self.server
        if path == "/":
            return self.page(os.path.join(os.path.dirname(os.path.abspath(__file__)), "demo.html"))
        if path == "/start":
            examples = [dict(name=os.path.basename(paths[0]), prompt=prompts[0]) for paths, prompts in demo.examples]
            return self.respond(200, dict(checkpoint=demo.checkpoint, examples=examples, limit=UPLOAD))
        if path == "/thumbnail":
            path = demo.examples[int(query["k"])][0][0]
            pixels = load_frames(path, [1.0])[0] if path.endswith(".mp4") else load_image(path)
            return self.respond(200, jpeg(pixels, 240), "image/jpeg")
        if path not in ("/talk", "/frame", "/saw", "/record", "/drawn"):
            return self.not_here(path)
        talk = demo.talk(query["talk"])
        if path == "/talk":
            return self.respond(200, talk.shown)
        if path == "/frame":
            return self.respond(200, talk.picture(int(query["k"])), "image/jpeg")
        turn = talk.turns[int(query["turn"])]
        if path == "/saw":
            policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'"
            return self.respond(200, talk.saw(turn).encode(), "text/html; charset=utf-8", policy=policy)
        name, body = talk.drawn(turn, int(query["k"])) if path == "/drawn" else talk.record(turn, demo.checkpoint)
        self.respond(200, body, "application/octet-stream", Content_Disposition=f"attachment; filename={name}")

    def post(self, path, query):
        if path == "/media":
            folder, paths = self.receive(json.loads(query["files"]), self.server.folder, UPLOAD)
            self.respond(200, self.server.begin(paths, folder).shown)
        elif path == "/example":
            paths, prompts = self.server.examples[self.json_body()["k"]]
            self.respond(200, self.server.begin(paths, prompts=prompts).shown)
        elif path == "/ask":
            self.ask(self.json_body())
        else:
            raise LookupError(path)

    def ask(self, request):
        """Stream the answer to a question, as lines of JSON. {place}: how many questions come before; {text, points};
        and at last the whole turn."""
        talk = self.server.talk(request["talk"])
        question = request["question"].strip()
        question.encode()  # a ValueError if there is half a character in it
        temperature = float(request["temperature"])
        length = int(request["length"])
        if not question or not 0 <= temperature <= 10 or not 1 <= length <= 8192:
            raise UserError("a question may not be empty, its temperature be from 0 to 10, its length from 1 to 8192")
        self.close_connection = True  # its end is the end of the answer
        self.begin(200, "application/x-ndjson")
        line = self.server.line
        ticket = object()
        line.append(ticket)
        try:
            place = None
            while place != 0:
                if line.index(ticket) != place:
                    place = line.index(ticket)
                    self.send_line(dict(place=place))
                elif self.has_gone():
                    return
                else:
                    time.sleep(0.02)
            with contextlib.closing(talk.answer(question, length, temperature)) as events:
                for event in events:
                    if self.has_gone():
                        return
                    self.send_line(event)
        finally:
            line.remove(ticket)


def main():
    parser = argparse.ArgumentParser("python -m tools.demo", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="folder with config.json, model.safetensors and tokenizer.json")
    add("--port", type=bounded(int, 0, 65535), default=0, help="of the page's address [any free one]")
    add("--toy", default=toy.FOLDER, help=f"where a small model's examples come from [{toy.FOLDER}]")
    add("--tiles", type=bounded(int, 0), help="high-resolution crops of an image [8; none for small]")
    add("--max_frames", type=bounded(int, 1), help="of a video, at 2 per second [as in training, at most 128]")
    add_device_flags(add)
    args = parser.parse_args()
    # a closed terminal and `kill` end it as Ctrl-C does: no upload stays behind
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.default_int_handler)
    try:
        model, planner = load(args.checkpoint, args.device, args.tiles, args.max_frames, dtype=args.dtype)
        examples = read_examples(args.toy) if planner.cfg.vocab == PRESETS["small"].vocab else []
        with tempfile.TemporaryDirectory(prefix="nanomolmo2-") as folder:
            server = Demo(args.checkpoint, model, planner, folder, examples, args.port)
            print(f"{args.checkpoint} answers at {server.url}   (Ctrl-C ends it)", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        print()
    except (UserError, OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
