"""The goldens of the data path: what each kind of record becomes, and which comes when. They are files under
golden/data-path, made from the code of commit e84438c, so a change of layout or order is a decision:

    python tests/goldens.py     # writes them again; whoever changed the order also raises ORDER in data.py

Decided since: windows of a frame no longer hold the last patch of the frame before (pool of videos in records.json).
The tokenizer is the small one of that time, without tokens for whole turns of the chat, as others are.
Media are claimed by the records (width, height, duration) or drawn here; no pixel is decoded.
"""
import json
import os
import random
import sys
import tempfile
import zlib

import numpy as np
from conftest import HERE, SIZES, STYLES, picture, write_lines

from data import Dataset, Planner, Stream, mix, shuffled
from lib.errors import BadRecord
from lib.records import parse_record
from lib.text import Tokenizer
from model import ModelConfig


# what the goldens look at of the product, named here alone

NUMBER = "version of the order"
FOLDER = os.path.join(HERE, "golden", "data-path")


# ---- records -----------------------------------------------------------------------------------------------

def point(x, y, id, **where):
    return dict(where, x=x, y=y, id=id)


def chat(*texts):
    return [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


DOT = [point(0.25, 0.5, 0, t=61.0), point(0.3, 0.5, 1, t=61.0), point(0.5, 0.125, 0, t=61.5),
       point(0.75, 0, 0, t=62.25), point(1, 1, 1, t=62.25), point(0.9, 0.9, 0, t=50)]
HERE_AND_THERE = [point(0.1, 0.17, 0, image=0), point(1, 0, 1, image=2), point(0.3333, 0.6666, 2, image=2)]
PHOTO = dict(image="photo.jpg", width=50, height=30)
CLIP = dict(video="clip.mp4", duration=100.0, start=60.5, end=63.0, subtitles=[
    dict(start=0, end=3, text="long before"), dict(start=60, end=61.2, text="hello"),
    dict(start=62.5, end=70, text="good bye"), dict(start=64.5, end=70, text="after")])
RECORDS = {
    "image": dict(PHOTO, annotations=[
        dict(task="image_caption", answer="A red wall with one white speck, 3 cm wide."),
        dict(task="image_pointing", label="specks", points=[point(0.5, 0.25, 1), point(0.1, 0.1666, 0)]),
        dict(task="image_pointing", label="dogs", prompt="Point to the dogs.", points=[]),
        dict(task="image_qa", messages=chat("What colour?", "Red.", "Sure?", "Yes, <point 1, 0, 0> <image>."))]),
    "image counting": dict(PHOTO, annotations=[
        dict(task="counting", label="specks", points=[point(0, 1, 0), point(0.125, 0.999, 1)]),
        dict(task="counting", label="dogs", points=[]),
        dict(task="counting", prompt="How many?", answer="2"),
        dict(task="counting", style="point_count", label="specks", points=[point(0.7, 0.1, 0), point(0.2, 0.4, 1)]),
        dict(task="image_pointing", style="cosyn_point", label="the axis", points=[point(0.5, 0.5, 0)])]),
    "image options": dict(PHOTO, annotations=[
        dict(task="image_qa", question="Which?", options=["a cat", "a dog", "a wall", "none of these"], correct=2),
        dict(task="image_qa", style="a_okvqa_mc", question="Which?", options=["yes", "no"], correct=0),
        dict(task="image_qa", style="vqa2", prompt="What is this?", answer="wall")]),
    "image alone": dict(image="tall.png", width=17, height=90, annotations=[
        dict(task="image_caption", style="short_caption", answer="Tall.")]),
    "image too large": dict(image="huge.jpg", width=4000, height=3000, annotations=[
        dict(task="image_caption", answer="A town from above.")]),
    "image beside long text": dict(image="wide.jpg", width=400, height=100, annotations=[
        dict(task="image_qa", prompt="Read it.", answer="one two three four five six seven eight nine ten " * 6)]),
    "three images": dict(images=["0.png", "1.png", "2.png"], annotations=[
        dict(task="multi_image_qa", prompt="What is in both?", answer="Nothing."),
        dict(task="multi_image_pointing", label="specks", images=[0, 2], points=HERE_AND_THERE),
        dict(task="multi_image_pointing", style="multi_image_counting", label="specks", points=HERE_AND_THERE),
        dict(task="counting", style="multi_image_count_then_point", label="cups", images=[2],
             points=[point(0.5, 0.5, 0, image=2)])]),
    "text": dict(annotations=[dict(task="text", prompt="2 plus 2?", answer="4")]),
    "text tree": dict(annotations=[dict(task="text", prompt="2 plus 2?", answer="4"),
                                   dict(task="text", messages=chat("Say A.", "A", "Now B <|im_end|>.", "B"))]),
    "video": dict(video="clip.mp4", duration=2.3, annotations=[
        dict(task="video_caption", answer="A ball rolls."),
        dict(task="video_qa", prompt="What rolls?", answer="The ball."),
        dict(task="video_pointing", label="ball", points=[point(0.2, 0.3, 0, t=0.0), point(0.123, 0.3, 0, t=1.26)]),
        dict(task="video_tracking", label="ball", points=[point(0.2, 0.3, 3, t=0.5), point(0.4, 0.3, 3, t=2.3)])]),
    "clip": dict(CLIP, annotations=[
        dict(task="video_caption", answer="A ball rolls."),
        dict(task="video_pointing", label="ball", points=DOT),
        dict(task="counting", style="video_count_point", label="ball", points=DOT[:2]),
        dict(task="video_tracking", style="video_point_track_per_frame", fps=2, label="ball", points=DOT)]),
    "clip with times": dict(CLIP, annotations=[
        dict(task="video_qa", style="video_clip_caption_start_end", start_time=61.0, end_time=62.5,
             answer="It rolls."),
        dict(task="video_qa", style="video_clip_transcript_start_end", start_time=0, end_time=62, answer="hello"),
        dict(task="video_qa", style="video_frame_caption_timestamp", timestamp=62.25, answer="A ball."),
        dict(task="video_qa", style="video_short_answer", question="What rolls?", answer="a ball")]),
    "clip with input points": dict(CLIP, annotations=[
        dict(task="video_tracking", style="video_single_point_track_per_frame", label="the ball",
             input_points=[DOT[0]], points=DOT),
        dict(task="video_tracking", style="video_point_ground_start_end", label="the ball", points=DOT)]),
    "clip to the end": dict(video="clip.mp4", duration=9.0, start=8.2, annotations=[
        dict(task="video_tracking", label="ball",
             points=[point(0.5, 0.5, 0, t=t) for t in (8, 8.195, 8.2, 9, 9.5)])]),
    "clip of one frame": dict(video="clip.mp4", duration=9.0, start=3.0, end=3.0, annotations=[
        dict(task="video_qa", question="Which?", options=["a", "b", "c"], correct=1)]),
    "video too long": dict(video="long.mp4", duration=3600.0, subtitles=[
        dict(start=10 * i, end=10 * i + 9, text=f"line {i}") for i in range(360)], annotations=[
        dict(task="video_caption", answer="An hour of rain. " * 4),
        dict(task="video_qa", prompt="What?", answer="Rain.")]),
    "tree too long": dict(PHOTO, annotations=[
        dict(task="image_qa", prompt=f"What is at {i}?", answer="red green blue tall wall " * (i % 4 + 1))
        for i in range(9)] + [dict(task="image_qa", prompt="All?", answer="too long to fit " * 80)])}
# Two lengths of a sequence, two grammars, and what a planner may be told besides.
VARIANTS = {
    "spec": dict(seq_len=420, tiles=8, max_frames=12, max_crops=16),
    "released": dict(seq_len=420, tiles=8, max_frames=12, max_crops=16, format="released"),
    "released frames as images": dict(seq_len=420, tiles=2, max_frames=5, max_crops=16, format="released",
                                      frames=False),
    "tight": dict(seq_len=130, tiles=6, max_frames=128, max_crops=4),
    "tight released": dict(seq_len=150, tiles=5, max_frames=3, max_crops=9, format="released"),
    "low resolution, no video": dict(seq_len=200, tiles=0, max_frames=0, max_crops=4)}


def make_planner(seq_len, tiles, max_frames, max_crops, format="spec", frames=True):
    cfg = ModelConfig(**SIZES, **STYLES["olmo"], point_format=format, frame_tokens=frames)
    tokenizer = Tokenizer(os.path.join(FOLDER, "tokenizer.json"), cfg.vocab)
    return Planner(tokenizer, cfg, seq_len, tiles, token_weights=format, max_frames=max_frames, max_crops=max_crops)


def short(values):
    """Numbers as text: "7*9" is seven 9s, "3..8" are 3 to 8."""
    values, out, i = [v.item() for v in np.asarray(values).ravel()], [], 0
    while i < len(values):
        n = m = 1
        while values[i + n:i + n + 1] == [values[i]]:
            n += 1
        while values[i + m:i + m + 1] == [values[i] + m]:
            m += 1
        text = f"{values[i]:.6g}"
        out.append(f"{n}*{text}" if n > 2 else f"{text}..{values[i + m - 1]}" if m > 2 else text)
        i += n if n > 2 else m if m > 2 else 1
    return " ".join(out)


def of_media(plan, folder):
    return [dict(file=os.path.relpath(path, folder), crops=layout.n_crops, tiling=list(layout.tiling),
                 times=[round(t, 6) for t in layout.times], windows=list(layout.pool.shape), pool=short(layout.pool))
            for path, layout in plan.media]


def of_plan(plan):
    """Its arrays as text. Of the targets, those that are not the token that follows: {place: target}."""
    turns = {str(i): int(plan.targets[i]) for i in range(plan.n_tokens)
             if plan.targets[i] != plan.tokens[(i + 1) % plan.n_tokens]}
    return dict(size=[plan.n_tokens, plan.n_crops], tokens=short(plan.tokens), targets=turns,
                weights=short(plan.weights), positions=short(plan.pos),
                branches=short(plan.branch))


def of_record(variant, name, folder):
    """What a record becomes: {plans, left out, question, media of each plan}, or {bad}."""
    planner = make_planner(**VARIANTS[variant])
    row = parse_record(json.dumps(RECORDS[name]).encode())
    try:
        plans, left_out = planner.plan(row, folder, random.Random(f"golden {name}"))
        question = planner.question(row, folder, chat("What is this?", "A thing.", "Point to it."))
    except BadRecord as e:
        return dict(bad=e.reason)
    media = [of_media(p, folder) for p in [*plans, question]]
    if all(m == media[0] for m in media):
        media = media[:1]
    return {"left out": left_out, "media": media, "plans": [of_plan(p) for p in plans], "question": of_plan(question)}


def draw_media(folder):
    """The media whose size no record can claim."""
    for i, size in enumerate(((30, 24), (64, 20), (12, 12))):
        picture(os.path.join(folder, f"{i}.png"), "red", size)


# two variants differ from the others in how videos, or all but videos, are laid out
CASES = [(variant, name) for variant in VARIANTS for name in RECORDS
         if {"released frames as images": name.startswith(("video", "clip")),
             "low resolution, no video": not name.startswith("clip")}.get(variant, True)]


def records(folder):
    draw_media(folder)
    return {variant: {name: of_record(variant, name, folder) for v, name in CASES if v == variant}
            for variant in VARIANTS}


# ---- order -------------------------------------------------------------------------------------------------

def make_stream(folder, seq_len=420, seed=5, write=True):
    """A mixture of two sets, one of them in two files with blank and unusable lines."""
    if write:
        write_sets(folder)
    sets = [Dataset("images", [os.path.join(folder, "images.jsonl")], {"size_cap": "4", "multiplier": "2"}),
            Dataset("texts", [os.path.join(folder, name) for name in ("a.jsonl", "b.jsonl")])]
    return Stream(mix(sets, "sft"), make_planner(seq_len, tiles=4, max_frames=0, max_crops=12), seed)


def write_sets(folder):
    words = lambda i, n: " ".join("red green blue tall wall".split()[(i + k) % 5] for k in range(n))
    caption = lambda i: dict(task="image_caption", answer=words(i, 5 + 7 * i % 31))
    images = [dict(image=f"{i}.jpg", width=20 + 30 * i, height=40, annotations=[caption(i)] * (1 + i % 3))
              for i in range(9)]
    texts = [dict(annotations=[dict(task="text", prompt=f"Say {i}.", answer=words(i, 1 + 11 * i % 47))])
             for i in range(23)]
    texts[4] = dict(texts[4], provenance=[dict(closed=True)])
    write_lines(os.path.join(folder, "images.jsonl"), images)
    write_lines(os.path.join(folder, "a.jsonl"), ["", *texts[:8], "{", "", "\r"])
    write_lines(os.path.join(folder, "b.jsonl"), [json.dumps(t) + "\r" for t in texts[8:]])


def crc(array):
    return zlib.crc32(np.asarray(array, "<i8").tobytes())


def place(where):
    """"file:line" without the folder, which differs from machine to machine."""
    return os.path.basename(where)


def draws(stream, n=300):
    """[set, file:line, or -1 and why, crc of the tokens of each plan]"""
    out, taken = [], dict.fromkeys(stream.sets, 0)
    for number in range(n):
        name = stream.draw(number)
        try:
            plans, left_out = stream.plans(name, taken[name])
            out.append([name, place(plans[0].where), *left_out, *(crc(p.tokens) for p in plans)])
        except BadRecord as e:
            out.append([name, place(e.detail.split(": ")[0]), e.reason])
        taken[name] += 1
    return out


def packed(stream, n, state=None):
    """n packed sequences: ({ids: [[set, draw, part]], lengths}, state after the last one)."""
    sequences = stream.sequences(state)
    out = [next(sequences) for _ in range(n)]
    state = json.loads(json.dumps(out[-1].state))
    state["row"] = [place(where) for where in state["row"]]
    state["events"] = [[name, place(where), reason, ""] for name, where, reason, _ in out[-1].events]
    return [dict(examples=[list(p.ref) for p in plans], tokens=sum(p.n_tokens for p in plans),
                 crops=sum(p.n_crops for p in plans)) for plans, _, _ in out], state


def order(folder):
    """Sequences of 120 tokens hold so few examples that the packer never has to cut its search short."""
    stream, short_ = make_stream(folder), make_stream(folder, seq_len=120)
    few, state = packed(short_, 60)
    return dict(
        # as checkpoints say it that were written before the order had a number
        fingerprint={k: v for k, v in stream.fingerprint().items() if k != NUMBER}, draws=draws(stream),
        shuffled={str(n): [shuffled(i, n, "key 0") for i in range(min(n, 40))]
                  for n in (1, 2, 3, 5, 16, 17, 64, 65, 1000)},
        shuffled_large={str(n): [shuffled(i, n, "key 1") for i in (0, 1, 12345, n // 2, n - 1)]
                        for n in (10 ** 6, 10 ** 7 + 1, 2 ** 33)},
        packed=few, state=state, next_packed=packed(short_, 20, state)[0])


def dense(folder):
    """Sequences of many examples, where the packer cuts its search short. e84438c packed these as the processor sorts
    equal numbers, so this golden is of the commit after."""
    few, state = packed(make_stream(folder), 40)
    return dict(packed=few, state=state)


# ---- files -------------------------------------------------------------------------------------------------

def lines_of(value, depth):
    """JSON with a line for each value `depth` levels down: a change shows where it is."""
    if not depth or not isinstance(value, (dict, list)) or not value:
        return json.dumps(value)
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"{json.dumps(k)}: {lines_of(v, depth - 1)}" for k, v in value.items()) + "\n}"
    return "[\n" + ",\n".join(lines_of(v, depth - 1) for v in value) + "\n]"


def read(name):
    with open(os.path.join(FOLDER, f"{name}.json")) as f:
        return json.load(f)


def write(name, value, depth):
    os.makedirs(FOLDER, exist_ok=True)
    with open(os.path.join(FOLDER, f"{name}.json"), "w") as f:
        f.write(lines_of(value, depth) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        wanted = sys.argv[1:] or ["records", "order", "dense"]
        if "records" in wanted:
            write("records", records(folder), 4)
        if "order" in wanted:
            write("order", order(folder), 2)
        if "dense" in wanted:
            write("dense", dense(folder), 2)
