"""
Ask a checkpoint about images or a video. The answer is printed as it is generated; its points and tracks are drawn
into a copy.

    python sample.py out/small/pretrain/latest data/toy/eval/images/00003.png "Point to all shapes."
    python sample.py out/small/sft/latest data/toy/clips/eval/video/00003.mp4 "Track the star." --out answer.mp4
    python sample.py weights/Molmo2-8B kitchen.jpg hall.jpg "Point to the mugs in all images." --device cuda
    python sample.py weights/Molmo2-8B clip.mp4 "What happens?" --chat     # and go on; the video is encoded once

How a question becomes a drawn track:

    Chat.ask                  data.Planner.question plans the media and the conversation so far
    Chat.encode               the media are encoded once a conversation; `generate` reads their features, then its cache
    Molmo2.generate           token by token, until the end-of-sequence token or --max_new_tokens
    lib/text.parse_points     points in the answer, as far as it goes
    lib/draw.draw             onto the image, or into an MP4 or GIF; `at_time`: between the moments of a track

Many questions in batches, as eval.py and the evaluations in training ask them, are `answers`.
"""
import argparse
import os
import sys
from typing import NamedTuple

import torch

from data import Planner, collate, decode, parse_points, to_device
from lib.draw import check_out, draw
from lib.errors import BadMedia, BadRecord, UserError
from lib.media import container_format, open_image
from lib.text import Tokenizer
from lib.weights import read_json
from model import Molmo2


def at_least(smallest):
    """An argparse type: a whole number from `smallest`."""
    def number(text):
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {smallest}")
        return int(text)
    return number


def load(folder, device="cpu", tiles=None, max_frames=None, usual_tiles=8):
    """(model in eval mode, planner for questions) of a checkpoint folder. tiles: high-resolution crops of an image,
    by default the usual ones, or none if training showed none. max_frames: of a video, by default as many as in
    training, at most 128."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:  # torch's own words for a device that is not there
        raise ValueError(f"--device {device}: {str(e).splitlines()[0]}") from None
    model = Molmo2.from_pretrained(folder).to(device)
    tokenizer = Tokenizer(os.path.join(folder, "tokenizer.json"), model.cfg.vocab)
    if tiles is None:
        tiles = usual_tiles if trained_with(folder, "preprocessor_config.json", "max_crops", 8) > 1 else 0
    if max_frames is None:
        max_frames = min(trained_with(folder, "video_preprocessor_config.json", "num_frames", 128), 128)
    return model, Planner(tokenizer, model.cfg, model.cfg.max_positions, tiles, max_frames=max_frames)


def trained_with(folder, name, key, usual):
    """A number that a checkpoint's file says of its training; the usual one where it does not."""
    path = os.path.join(folder, name)
    value = read_json(path).get(key) if os.path.exists(path) else None
    return value if isinstance(value, int) and value > 0 else usual


# ---- many questions in batches -----------------------------------------------------------------------------

class Prompt(NamedTuple):
    """One question about one record."""
    task: str      # questions of a task are answered together
    where: str     # file:line, for messages
    record: dict
    folder: str    # the record's media are under it
    text: str


def prompt_batch(plans, cfg):
    """Plans of questions as a batch for `Molmo2.generate`, padded on the right: (batch, [media that failed to decode,
    as `decode` reports them])."""
    longest = max(plan.n_tokens for plan in plans)
    sequences = []
    failed = []
    for plan in plans:
        sequence = decode([plan], cfg, longest)
        sequences.append(sequence)
        failed += sequence[-1]
    batch = collate(sequences)
    return {name: batch[name] for name in ("tokens", "crops", "pool", "pos", "example", "branch")}, failed


def answer(model, planner, plans, max_new_tokens):
    """Greedy answers to a batch of questions: (texts, media that failed to decode)."""
    batch, failed = prompt_batch(plans, planner.cfg)
    batch = to_device(batch, model.lm_head.weight.device)
    tok = planner.tokenizer
    steps = list(model.generate(**batch, max_new_tokens=max_new_tokens, stop=(tok.eos,)))  # (B,) each
    texts = []
    for ids in torch.stack(steps, 1).tolist():
        end = ids.index(tok.eos) if tok.eos in ids else len(ids)  # an answer that has ended repeats its eos
        texts.append(tok.decode(ids[:end]))
    return texts, failed


def batches_by_task(prompts, size):
    """Indices of `prompts` in batches of one task each, as the answers of a task end at about the same time."""
    indices_of_task = {}
    for i, prompt in enumerate(prompts):
        indices_of_task.setdefault(prompt.task, []).append(i)
    batches = []
    for _, indices in sorted(indices_of_task.items()):
        batches += [indices[k:k + size] for k in range(0, len(indices), size)]
    return batches


def answers(model, planner, prompts, limit, batch=32, world=None, unusable=None):
    """Greedy answers to [Prompt], in order: [text]. limit(task): the most tokens of an answer. The ranks of a `world`
    share the batches, and each gets all answers. Media that cannot be read are an error; or, given a dict `unusable`,
    they go there as {file:line: reason}, and the answer is None."""
    batches = batches_by_task(prompts, batch)
    texts = {}  # index of a prompt -> its answer
    for indices in batches[world.rank::world.size] if world else batches:
        plans, asked = [], []
        for i in indices:
            prompt = prompts[i]
            try:
                plan = planner.question(prompt.record, prompt.folder, [dict(role="user", content=prompt.text)])
            except (BadMedia, BadRecord, OSError) as e:
                if unusable is None:
                    raise
                unusable[prompt.where] = str(e)
                continue
            plan.where = prompt.where  # an image that cannot be decoded is reported under this name
            plans.append(plan)
            asked.append(i)
        if not plans:
            continue
        free_tokens = planner.seq_len - max(plan.n_tokens for plan in plans)
        longest = min(limit(prompts[indices[0]].task), free_tokens)
        replies, failed = answer(model, planner, plans, longest)
        for _, where, _, detail in failed:
            if unusable is None:
                raise BadMedia(f"{where}: {detail}")
            unusable[where] = detail
        texts.update(zip(asked, replies))
    text_of = {}  # the same, of all ranks
    for texts_of_rank in world.all_gather(texts) if world else [texts]:
        text_of |= texts_of_rank
    bad = unusable or {}
    return [None if prompt.where in bad else text_of[i] for i, prompt in enumerate(prompts)]


# ---- one conversation --------------------------------------------------------------------------------------

def kind_of(paths):
    """"image", "images" or "video", by the first bytes of the files. An animated GIF is a video."""
    for path in paths:
        if not os.path.isfile(path):
            raise BadMedia(f"{path}: no such file")
        container = container_format(path)
        if container not in (None, "gif"):
            if len(paths) > 1:
                raise BadMedia(f"{path}: a video is asked about alone")
            return "video"
        with open_image(path) as image:
            if container and len(paths) == 1 and image.is_animated:
                return "video"
    return "image" if len(paths) == 1 else "images"


class Chat:
    """Questions about the same media, one after the other. kind: "image", "images" or "video"."""

    def __init__(self, model, planner, paths):
        self.model = model
        self.planner = planner
        self.messages = []
        self.features = None  # of the media, once they are encoded: (M, connector width)
        self.kind = kind_of(paths)
        self.record = {self.kind: list(paths) if self.kind == "images" else paths[0], "annotations": []}

    def encode(self, plan):
        """Decode and encode the media, unless the last question did so in as many visual tokens."""
        n_visual = sum(len(layout.pool) for _, layout in plan.media)
        if self.features is not None and len(self.features) == n_visual:
            return
        batch, failed = prompt_batch([plan], self.planner.cfg)
        if failed:
            raise BadMedia(failed[0][3])
        batch = to_device(batch, self.model.lm_head.weight.device)
        self.pool = batch["pool"]
        with torch.inference_mode():
            self.features = self.model.vision_backbone(batch["crops"], self.pool)

    def ask(self, question, max_new_tokens=256, temperature=0.0, seed=0):
        """Yields the answer piece by piece. The media are encoded at the first question alone."""
        self.messages.append(dict(role="user", content=question))
        plan = self.planner.question(self.record, None, self.messages)
        self.encode(plan)
        tok = self.planner.tokenizer
        device = self.features.device
        tokens = torch.from_numpy(plan.tokens)[None].to(device)  # (1, T)
        pos = torch.from_numpy(plan.pos)[None].to(device)
        branch = torch.from_numpy(plan.branch)[None].to(device)
        generator = torch.Generator(device).manual_seed(seed)
        ids = []
        yielded = 0  # characters
        for new in self.model.generate(tokens, None, self.pool, max_new_tokens, temperature, (tok.eos,), pos,
                                       branch=branch, generator=generator, features=self.features):
            if int(new) == tok.eos:
                break
            ids.append(int(new))
            text = tok.decode(ids)
            if not text.endswith("\ufffd"):  # half a character: wait for the rest of its bytes
                yield text[yielded:]
                yielded = len(text)
        text = tok.decode(ids)
        self.messages.append(dict(role="assistant", content=text))
        yield text[yielded:]


# ---- the command -------------------------------------------------------------------------------------------

def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", help="folder with config.json, model.safetensors and tokenizer.json")
    add("media", nargs="+", help="images (PNG, JPEG, WebP, GIF, BMP, TIFF) or one video (MP4, MOV, MKV, WebM, AVI, ...)")
    add("question")
    add("--chat", action="store_true", help="then go on asking, a line at a time, about the same media")
    add("--out", help="where the copy with the points goes; of a video .mp4 or .gif [answer.png, answer.mp4]")
    add("--max_new_tokens", type=at_least(1), help="length limit of the answer [256; of a video 2048]")
    add("--temperature", type=float, default=0.0, help="0 = always the likeliest token [0]")
    add("--seed", type=int, default=0, help="for temperatures above 0 [0]")
    add("--tiles", type=at_least(0), help="high-resolution crops [8; none for small]")
    add("--max_frames", type=at_least(1), help="of a video, at 2 per second [as in training, at most 128]")
    add("--device", default="cpu", help="cpu, cuda or mps [cpu]")
    return parser.parse_args()


def converse(chat, args):
    """Print the answer to the question of the command line, with --chat to each line typed after it."""
    longest = args.max_new_tokens or (2048 if chat.kind == "video" else 256)
    question = args.question
    while question:
        text = ""
        for piece in chat.ask(question, longest, args.temperature, args.seed):
            print(piece, end="", flush=True)
            text += piece
        print()
        points = parse_points(text, chat.kind)
        if points:
            files = draw(chat.kind, args.media, points, args.out)
            print(f"{len(points)} {'point' if len(points) == 1 else 'points'} drawn into {' and '.join(files)}")
        question = input("> ").strip() if args.chat else None


def main():
    args = parse_flags()
    try:
        if not args.question.strip():
            raise UserError("the question is empty")
        args.out = check_out(kind_of(args.media), args.out)  # before a large model is loaded and asked
        converse(Chat(*load(args.checkpoint, args.device, args.tiles, args.max_frames), args.media), args)
    except (EOFError, KeyboardInterrupt):
        print()
    except (UserError, OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
