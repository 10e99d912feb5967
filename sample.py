"""
Ask a checkpoint about images or a video. The answer is printed as it is generated; its points and tracks are drawn
into a copy.

    python sample.py out/small/pretrain/latest data/toy/eval/images/00003.png "Point to all shapes."
    python sample.py out/small/sft/latest data/toy/clips/eval/video/00003.mp4 "Track the star." --out answer.mp4
    python sample.py weights/Molmo2-8B kitchen.jpg hall.jpg "Point to the mugs in all images." --device cuda
    python sample.py weights/Molmo2-8B clip.mp4 "What happens?" --chat     # and go on; the video is encoded once
    python sample.py weights/Molmo2-8B clips/*.mp4 "Track the ball." --out results/ --format csv mot    # each by itself

How a question becomes a drawn track:

    Chat.ask                  data.Planner.question plans the media and the conversation so far
    Chat.encode               the media are encoded once a conversation; `generate` reads their features, then its cache
    Molmo2.generate           token by token, until the end-of-sequence token or --max_new_tokens
    lib/results.points_of     points in the answer, as far as it goes
    lib/draw.draw             onto the image, or into an MP4 or GIF; `at_time`: between the moments of a track

Many questions in batches, as eval.py and the evaluations in training ask them, are `answers`. With a folder as --out
`ask_each` puts one question to each file by itself: lib/results.py says what is written there. A run that was killed
goes on where it was; a file that cannot be read costs itself.
"""
import argparse
import functools
import math
import os
import sys
from typing import NamedTuple

import lib  # noqa: F401: before torch, which reads the environment that it sets
import torch
from tqdm import tqdm

from data import Planner, collate, decode, to_device
from lib.draw import check_out, draw, load_segmenter
from lib.errors import BadMedia, BadRecord, UserError
from lib.export import FORMATS
from lib.media import container_format, load_crops, open_image
from lib.progress import Bar, progress
from lib.results import Results, points_of
from lib.text import Tokenizer
from lib.weights import pick_device, read_json
from model import Molmo2


def bounded(kind, low, high=math.inf):
    """A type of flags: a number of a kind, int or float, from low to high."""
    limits = f"from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"

    def read(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be {limits}")
        return value
    read.__name__ = kind.__name__  # what argparse calls it, of what is no number
    return read


def load(folder, device="cpu", tiles=None, max_frames=None, usual_tiles=8, dtype="auto"):
    """(model in eval mode, planner for questions) of a checkpoint folder. tiles: high-resolution crops of an image,
    by default the usual ones, or none if training showed none. max_frames: of a video, by default as many as in
    training, at most 128. device, dtype: as of weights.pick_device."""
    device, dtype = pick_device(device, dtype)
    model = Molmo2.from_pretrained(folder, dtype=dtype).to(device)
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


def prompt_batch(plans, cfg, load=load_crops):
    """Plans of questions as a batch for `Molmo2.generate`, padded on the right: (batch, [media that failed to decode,
    as `decode` reports them])."""
    longest = max(plan.n_tokens for plan in plans)
    sequences = []
    failed = []
    for plan in plans:
        sequence = decode([plan], cfg, longest, load)
        sequences.append(sequence)
        failed += sequence[-1]
    batch = collate(sequences)
    return {name: batch[name] for name in ("tokens", "crops", "pool", "pos", "example", "branch")}, failed


def answer(model, planner, plans, max_new_tokens, **sampling):
    """Answers to a batch of questions: (texts, media that failed to decode). sampling: of `Molmo2.generate`, which is
    greedy without."""
    batch, failed = prompt_batch(plans, planner.cfg)
    batch = to_device(batch, model.lm_head.weight.device)
    tok = planner.tokenizer
    steps = list(model.generate(**batch, max_new_tokens=max_new_tokens, stop=(tok.eos,), **sampling))
    texts = []
    for ids in torch.stack(steps, 1).tolist():  # of (B,) each
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


def answers(model, planner, prompts, limit, batch=32, world=None, unusable=None, **sampling):
    """Answers to [Prompt], in order: [text]. limit(task): the most tokens of an answer. The ranks of a `world` share
    the batches, and each gets all answers. Media that cannot be read are an error; or, given a dict `unusable`, they
    go there as {file:line: reason}, and the answer is None. sampling: as of `answer`."""
    batches = batches_by_task(prompts, batch)
    texts = {}  # index of a prompt -> its answer
    own = batches[world.rank::world.size] if world else batches
    for indices in progress(own, "batches of questions answered", shown=not world or world.is_main):
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
        replies, failed = answer(model, planner, plans, longest, **sampling)
        for _, where, _, detail in failed:
            if unusable is None:
                raise BadMedia(f"{where}: {detail}")
            unusable[where] = detail
        for i, reply in zip(asked, replies):
            if prompts[i].where not in (unusable or ()):
                texts[i] = reply
    text_of = {}  # the same, of all ranks
    for texts_of_rank in world.all_gather(texts) if world else [texts]:
        text_of |= texts_of_rank
    return [text_of.get(i) for i in range(len(prompts))]


# ---- one conversation --------------------------------------------------------------------------------------

def kind_of(paths):
    """"image", "images" or "video", by the first bytes of the files. An animated GIF is a video."""
    for path in paths:
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
        batch, failed = prompt_batch([plan], self.planner.cfg, functools.partial(load_crops, shown=True))
        if failed:
            raise BadMedia(failed[0][3])
        batch = to_device(batch, self.model.lm_head.weight.device)
        self.pool = batch["pool"]
        backbone = self.model.vision_backbone
        bar = Bar("crops encoded", len(batch["crops"]))
        last_block = backbone.image_vit.transformer.resblocks[-1]  # the ViT takes some crops at a time
        hook = last_block.register_forward_hook(lambda block, inputs, x: bar.update(len(x)))
        try:
            with torch.inference_mode():
                self.features = backbone(batch["crops"], self.pool)
        finally:
            hook.remove()
            bar.close()

    def ask(self, question, max_new_tokens=256, temperature=0.0, seed=0, **sampling):
        """Yields the answer piece by piece. The media are encoded at the first question alone. An answer of which no
        more is asked for (`close`) is kept as far as it came. sampling: as of `answer`."""
        said = dict(role="user", content=question)
        plan = self.planner.question(self.record, None, [*self.messages, said])
        self.encode(plan)
        tok = self.planner.tokenizer
        device = self.features.device
        tokens = torch.from_numpy(plan.tokens)[None].to(device)  # (1, T)
        pos = torch.from_numpy(plan.pos)[None].to(device)
        branch = torch.from_numpy(plan.branch)[None].to(device)
        generator = torch.Generator(device).manual_seed(seed)
        reply = dict(role="assistant", content="")
        self.messages += [said, reply]
        ids = []
        yielded = 0  # characters
        for new in self.model.generate(tokens, None, self.pool, max_new_tokens, temperature, (tok.eos,), pos,
                                       branch=branch, generator=generator, features=self.features, **sampling):
            if int(new) == tok.eos:
                break
            ids.append(int(new))
            text = tok.decode(ids)
            reply["content"] = text
            if not text.endswith("\ufffd"):  # half a character: wait for the rest of its bytes
                yield text[yielded:]
                yielded = len(text)
        yield reply["content"][yielded:]


# ---- the flags, as functions take them ---------------------------------------------------------------------

def load_as(args):
    return load(args.checkpoint, args.device, args.tiles, args.max_frames, dtype=args.dtype)


def sampling(args):
    return dict(temperature=args.temperature, top_p=args.top_p, frequency_penalty=args.frequency_penalty)


def longest(args, kind):
    """Most tokens of an answer about media of a kind."""
    return args.max_new_tokens or (2048 if kind == "video" else 256)


# ---- each file by itself -----------------------------------------------------------------------------------

def ask_each(args, segmenter):
    """Put the question to each file that has no answer yet and write the results. Returns {file: why not}."""
    results = Results(args.out, args.checkpoint)
    unusable = {}
    n_done = 0
    prompts = {}  # by the name of the media: a file may be given twice
    for path in args.media:
        try:
            kind = kind_of([path])
            media = results.keep(path)
        except (BadMedia, OSError) as e:
            unusable[path] = str(e)
            continue
        if (media, args.question) in results.done:
            n_done += 1
        else:
            prompts[media] = Prompt(kind, path, {kind: media, "annotations": []}, args.out, args.question)
    prompts = sorted(prompts.values(), key=lambda prompt: prompt.task)  # images first: their answers are shorter
    if prompts:
        model, planner = load_as(args)
        generator = torch.Generator(model.lm_head.weight.device).manual_seed(args.seed)
    with tqdm(total=n_done + len(prompts), initial=n_done, unit="file", disable=None) as bar:
        for begin in range(0, len(prompts), args.batch):
            batch = prompts[begin:begin + args.batch]
            texts = answers(model, planner, batch, lambda kind: longest(args, kind), args.batch, unusable=unusable,
                            generator=generator, **sampling(args))
            for prompt, text in zip(batch, texts):
                try:
                    if text is not None:
                        results.add(prompt.record, args.question, text, planner.cfg.point_format, segmenter)
                except BadMedia as e:  # some frame that is drawn is broken, none of those that were asked about
                    unusable[prompt.where] = str(e)
                bar.update()
    files = [results.path] + [FORMATS[name](results.records, args.out) for name in args.format]
    print(f"{len(prompts)} files asked about, {n_done} done before; written: {', '.join(files)}")
    return unusable


# ---- the command -------------------------------------------------------------------------------------------

def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", help="folder with config.json, model.safetensors and tokenizer.json")
    add("media", nargs="+", help="images (PNG, JPEG, WebP, GIF, BMP, TIFF) or one video (MP4, MOV, MKV, ...)")
    add("question")
    add("--chat", action="store_true", help="then go on asking, a line at a time, about the same media")
    add("--out", help="where the copy with the points goes; of a video .mp4 or .gif [answer.png, answer.mp4]. Or a "
        "folder: each file is then a question of its own, else several images are one question; answered again is none")
    add("--format", nargs="+", choices=FORMATS, default=[], help="results for other tools too, beside results.jsonl")
    add("--batch", type=bounded(int, 1), default=8, help="files at a time, with a folder as --out [8]")
    add("--segmenter", help="MODULE:FUNCTION(frames, points) -> masks, which are drawn too")
    add("--max_new_tokens", type=bounded(int, 1), help="length limit of the answer [256; of a video 2048]")
    add("--temperature", type=bounded(float, 0), default=0.0, help="0 = always the likeliest token; captions of the "
        "released models: 0.7 with --top_p 0.95 --frequency_penalty 0.1 [0]")
    add("--top_p", type=bounded(float, 0, 1), default=1.0, help="draw from the likeliest that have this together [1]")
    add("--frequency_penalty", type=bounded(float, -2, 2), default=0.0,
        help="what a token's logit loses each time it is written [0]")
    add("--seed", type=int, default=0, help="for temperatures above 0 [0]")
    add("--tiles", type=bounded(int, 0), help="high-resolution crops of an image; the released models were evaluated "
        "with 24: fine print needs them, at three times the tokens [8; none for small]")
    add("--max_frames", type=bounded(int, 1), help="of a video, at 2 per second [as in training, at most 128]")
    add_device_flags(add)
    return parser.parse_args()


def add_device_flags(add):
    add("--device", default="auto", help="auto (CUDA if there is one, else CPU), cpu, cuda or mps [auto]")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="of weights and products: auto (bf16 on a "
        "card that has it, else fp32), fp32 or bf16 [auto]")


def converse(chat, args, segmenter=None):
    """Print the answer to the question of the command line, with --chat to each line typed after it."""
    question = args.question
    while question:
        text = ""
        for piece in chat.ask(question, longest(args, chat.kind), seed=args.seed, **sampling(args)):
            print(piece, end="", flush=True)
            text += piece
        print()
        points = points_of(text, chat.kind, len(args.media))
        if points:
            files = draw(chat.kind, args.media, points, args.out, segmenter)
            print(f"{len(points)} {'point' if len(points) == 1 else 'points'} drawn into {' and '.join(files)}")
        question = input("> ").strip() if args.chat else None


def is_folder(out):
    return bool(out) and (os.path.isdir(out) or not os.path.splitext(out)[1])  # "results/" has no ending either


def main():
    args = parse_flags()
    unusable = {}
    try:
        if not args.question.strip():
            raise UserError("the question is empty")
        segmenter = load_segmenter(args.segmenter)
        if is_folder(args.out):
            if args.chat:
                raise UserError(f"--out {args.out}: a folder is for one question about each file; --chat takes a file")
            unusable = ask_each(args, segmenter)
        else:
            if args.format:
                raise UserError("--format: is for results in a folder; give one as --out")
            args.out = check_out(kind_of(args.media), args.out)  # before a large model is loaded and asked
            converse(Chat(*load_as(args), args.media), args, segmenter)
    except (EOFError, KeyboardInterrupt):
        print()
    except torch.OutOfMemoryError:
        print("error: the card's memory is full: try a smaller --batch, --max_frames or --tiles", file=sys.stderr)
        sys.exit(2)
    except (UserError, OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    for path, reason in unusable.items():
        print(f"error: {path} was left out: {reason.removeprefix(path + ': ')}", file=sys.stderr)
    if unusable:
        sys.exit(1)


if __name__ == "__main__":
    main()
