"""
How a video becomes a loss, and a question a track: one record, printed at every station of its way. The clip is
filmed on the spot; the model is `small` with random weights, which then learns this sequence by heart.

    python -m tools.walk                        # a few seconds; no checkpoint, no network
    python -m tools.walk --readme README.md     # puts what it prints between <!-- walk --> and <!-- /walk -->
"""
import argparse
import contextlib
import io
import json
import math
import os
import random
import re
import sys
import tempfile
import textwrap

import lib  # noqa: F401: before torch, which reads the environment that it sets
import torch

from data import Packer, Planner, collate, decode, parse_points
from lib import toy
from lib.draw import at_time
from lib.errors import UserError
from lib.media import frame_plan, open_video, sample_times
from lib.records import parse_record
from lib.text import SMALL_TOKENIZER, TURNS, Tokenizer
from model import Molmo2, is_vision, may_attend
from sample import Chat

QUESTION = "Track the red circle."
# A shape as lib/toy.py films it: its place every half second, in twentieths of the image.
CIRCLE = dict(colour="red", shape="circle", path=[(4, 13), (8, 12), (12, 10), (16, 9)], since=0, turns=None,
              radius=16, angle=0.0)
# Two records: about a clip of it, and a text beside which that is packed.
RECORDS = [
    dict(video="clip.mp4", annotations=[
        dict(task="video_qa", prompt="Which way does the red circle move?", answer="Right."),
        dict(task="video_tracking", prompt=QUESTION, points=[toy.point(CIRCLE, k) for k in range(4)])]),
    dict(annotations=[dict(task="text", prompt="What is 3 plus 4?", answer="7")])]
SEQ_LEN = 160


def say(text):
    """Print a paragraph, which begins with the function at work."""
    print(textwrap.fill("» " + text, 122, break_on_hyphens=False))


def show(text):
    """Print values."""
    print(textwrap.indent(textwrap.fill(text, 118, break_on_hyphens=False), "    "))


def token_names(ids, tokenizer):
    """The text of each token: a dot for a space and \\n for a new line, to be seen; who speaks, for a whole turn."""
    special = {i: name for name, i in tokenizer.ids.items()}
    special |= zip([tokenizer.ids[turn] for turn in TURNS], ["«user»", "«assistant»"])
    shown = {" ": "·", "\n": "\\n", "\0": "-"}  # a zero is padding
    return [special.get(i) or "".join(shown.get(c, c) for c in tokenizer.decode([i])) for i in ids]


def walk_plans(planner, folder):
    """Lines to plans, without a pixel. Returns the plan of the clip and that of the text."""
    lines = [json.dumps(record) for record in RECORDS]
    say("lib.records.parse_record  checks a line of JSONL. The clip is the trunk of a tree, an annotation a branch.")
    show(lines[0])
    clip, text = [planner.plan(parse_record(line.encode()), folder, random.Random(0))[0][0] for line in lines]
    (path, layout), = clip.media
    container, stream = open_video(path)
    with container:
        shown, _ = frame_plan(container, stream, sample_times(1.5, planner.max_frames))
        begins = [float(ticks * stream.time_base) for ticks in shown]
    say("lib.media.sample_times  decides when to look: every half second and at the end, or at fewer times, evenly "
        "spaced. lib.media.frame_plan  finds the frame that is shown then, and what must be decoded for it.")
    show(f"looks at {list(layout.times)} s: the frames that begin at {begins} s")

    names = token_names(clip.tokens.tolist(), planner.tokenizer)
    texts = [" ".join(name for name, b in zip(names, clip.branch) if b == branch) for branch in range(3)]
    say("data.Planner.video_trunk  writes each frame as its time in text and 9 <image>, one for 3 x 3 of its 8 x 8 "
        "patches. (The large models' ViT has 27 x 27 patches, which makes 81.)")
    show(texts[0].replace(" ".join(9 * ["<image>"]), "<image>x9"))
    say("lib.media.frame_layout  `pool` has the patches of each <image>, counted over all frames. 8 is no multiple of "
        "3, so windows at the right and at the bottom have fewer: -1 is none.")
    for row in (0, 2, 9):
        show(f"<image> {row} of {len(layout.pool)}: {layout.pool[row].tolist()}")
    say("data.Planner.encode_chat  makes a branch of a question and its answer; lib.text.format_points  has written "
        "the points. What stands around a question, <|im_start|>user\\n and <|im_end|>\\n<|im_start|>assistant\\n, is "
        "a token each here: «user», «assistant». Every digit has one of its own, as with Qwen's tokenizer; OLMo's "
        "takes up to three as one.")
    show(f"1: {texts[1]}")
    show(f"2: {texts[2]}")

    say("data.Planner.assemble  shifts targets by one. Both branches go on from the last position of the trunk. "
        "Weights are by task (lib.tasks.TASKS), and 0 where nothing is learned.")
    print(f"    {'token':14}{'branch':>7}{'pos':>6}   {'target':12}{'weight':>7}")
    targets = token_names(clip.targets.tolist(), planner.tokenizer)
    first = [(clip.branch == branch).argmax() for branch in (1, 2)]
    for i in sorted([first[0] - 1, *first, *clip.weights.nonzero()[0][:9]]):  # and what is learned first
        print(f"    {names[i]:14}{clip.branch[i]:7}{clip.pos[i]:6}   {targets[i]:12}{clip.weights[i]:7.1f}")
    return clip, text


def walk_batch(planner, plans):
    """Plans to a batch, which is returned, and who sees whom in it."""
    packer = Packer(SEQ_LEN, planner.max_crops, buffer=len(plans))
    sequences = [packer.add(plan) for plan in plans]  # none, and then one
    decoded = decode(sequences[-1][0], planner.cfg, SEQ_LEN)
    say("data.Packer.emit  puts examples side by side: the one that has waited longest and those that fill the rest "
        "best. Two tokens a character, padding as dots:")
    for name in ("example", "branch", "weights"):
        cells = decoded[0][name].reshape(-1, 2).max(1)
        show(f"{name:8}[" + "".join(f"{cell:.0f}" if cell else "." for cell in cells) + "]")
    say("data.decode  reads pixels: a frame becomes a crop of 64 patches, 8 x 8 pixels in 3 colours. What cannot "
        "be decoded would be zeros, and its example get weight 0. data.collate  joins sequences:")
    batch = collate([decoded])
    show(",  ".join(f"{name} {'x'.join(map(str, x.shape))} {str(x.dtype)[6:]}" for name, x in batch.items()))

    tokens, example, branch = [batch[name][0] for name in ("tokens", "example", "branch")]
    say("model.may_attend  says which token (a row) sees which (a column; same order). x: it may. v: it may, though "
        "that comes later, as vision tokens of an example see each other both ways. Branches do not see each other.")
    frames = (tokens == planner.tokenizer.ids["<timestamp>"]).nonzero()[:2, 0]
    places = sorted([*frames.tolist(), *(frames + 4).tolist()])  # the time of two frames and an <image> of each
    for e, b in ((1, 1), (1, 2), (2, 0), (2, 1)):
        places += ((example == e) & (branch == b)).nonzero()[-2:, 0].tolist()
    places = torch.tensor([*places, SEQ_LEN - 1])
    sees = may_attend(places[:, None], places, example, branch, is_vision(tokens, planner.cfg.vocab))
    for row, (i, name) in enumerate(zip(places, token_names(tokens[places].tolist(), planner.tokenizer))):
        marks = ["." if not seen else "x" if column <= row else "v" for column, seen in enumerate(sees[row])]
        print(f"    {name:14}{f'example {example[i]}, branch {branch[i]}' if example[i] else 'padding':24}", *marks)
    return batch


def walk_loss(model, batch):
    """The batch through the model, then some steps of training on it."""
    W = batch["weights"].sum()
    total = model(**batch).detach()
    say("model.Molmo2.forward  turns the crops into a vector for each <image>, adds it to the embedding, and runs the "
        "decoder. model.ChunkedNLL  sums weight x nll (and the z-loss, 0 here) where there is a weight.")
    show(f"sum of weight x nll {total:.1f} / sum of weights {W:.0f} = loss {total / W:.2f}. Random weights guess: all "
         f"{model.cfg.vocab} tokens alike would cost ln {model.cfg.vocab} = {math.log(model.cfg.vocab):.2f}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(40):
        loss = model(**batch) / W
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    say("pretrain.train  divides by W, the sum of weights over all sequences of a step and all ranks, and makes the "
        f"step. After 40 steps of plain AdamW on this sequence alone: loss {loss.item():.1f}, learned by heart.")


def walk_back(model, planner, path):
    """A question to a drawn track."""
    text = "".join(Chat(model.eval(), planner, [path]).ask(QUESTION))
    say("sample.Chat.ask  goes back: data.Planner.question  plans the clip with a question alone, and "
        "model.Molmo2.generate  adds token by token, until <|im_end|>.")
    show(text)
    points = parse_points(text, "video")
    say("lib.text.parse_points  reads points. lib.draw.draw_video  draws them, and lib.draw.at_time  what lies "
        "between:")
    between = at_time(points, 0.75)[0]
    show(f"{' '.join(map(str, points))};  at 0.75 s x {between['x']:.3f}, y {between['y']:.3f}")


def walk():
    """All stations, as text."""
    torch.manual_seed(0)
    model = Molmo2("small")
    tokenizer = Tokenizer(SMALL_TOKENIZER, model.cfg.vocab)
    planner = Planner(tokenizer, model.cfg, SEQ_LEN, max_frames=16, max_crops=16)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        path = os.path.join(folder, "clip.mp4")
        toy.write_clip(path, dict(size=(96, 80), looks=4, objects=[CIRCLE], pixel_seed=0))
        walk_loss(model, walk_batch(planner, walk_plans(planner, folder)))
        walk_back(model, planner, path)
    return out.getvalue().strip("\n")


def put(text, path):
    """Replace what stands between the markers of a file by `text`, fenced."""
    with open(path, encoding="utf-8") as f:
        parts = re.split("(<!-- /?walk -->)", f.read())
    if parts[1::2] != ["<!-- walk -->", "<!-- /walk -->"]:
        raise UserError(f"--readme {path}: must have <!-- walk --> and, after it, <!-- /walk -->, once each")
    parts[2] = f"\n```\n{text}\n```\n"
    with open(path, "w", encoding="utf-8") as f:
        f.write("".join(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", metavar="FILE", help="put it into this file, between the markers")
    args = parser.parse_args()
    try:
        if args.readme:
            put(walk(), args.readme)
        else:
            print(walk())
    except (UserError, OSError, UnicodeError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
