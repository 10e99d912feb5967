"""
Beside something else: transformers' own Molmo2 with the same weights and inputs (part transformers), and this model
with a row for each question in place of message trees, packed (part packing).
"""
import math
import os
import random
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image

import pretrain
from data import Plan, Stream, collate, decode, to_device
from lib import distributed, flex, toy
from model import Molmo2, ModelConfig, PRESETS, is_vision
from tools.bench.common import ROOT, noise, photo, planner_for, random_model, take_turns, train_on

SIDE_BY_SIDE = {  # name: (model, tokens of a row)
    "small": (replace(PRESETS["small"], point_format="released"), 256),
    "85m": (ModelConfig(layers=8, width=512, heads=8, kv_heads=8, head_dim=64, mlp=1536, vocab=50304, norm_after=False,
                        qk_norm="head", crop=126, vit_width=256, vit_heads=4, vit_head_dim=64, vit_mlp=1024,
                        vit_features=(5, 2), point_format="released"), 512)}


def image_rows(bench, cfg, n, seq_len):
    """A batch of n rows, for us and for transformers: an image, then random ids. The last quarter is learned."""
    trunk, media = planner_for(cfg, seq_len).trunk(photo(0), ".")
    ids = np.random.default_rng(0).integers(10, cfg.vocab - 10, (n, seq_len + 1 - len(trunk)))
    pos = np.arange(seq_len)
    learned = ((pos >= seq_len * 3 // 4) & (pos < seq_len - 1)).astype(np.float32)  # there the last id has no target
    rows = [np.concatenate([trunk, text]) for text in ids]
    plans = [Plan(row[:-1], row[1:], learned / learned.sum() / n, pos, np.zeros_like(pos), media) for row in rows]
    batch = collate([decode([plan], cfg, seq_len, noise) for plan in plans])
    tokens = batch["tokens"]
    labels = torch.where(batch["weights"] > 0, batch["targets"], -100).roll(1, 1)  # here targets are shifted before
    k = math.isqrt(len(media[0][1].pool))  # k x k windows
    theirs = dict(input_ids=tokens, labels=labels, attention_mask=torch.ones_like(tokens),
                  mm_token_type_ids=is_vision(tokens, cfg.vocab).long(), image_token_pooling=batch["pool"],
                  pixel_values=batch["crops"] / 127.5 - 1, image_grids=torch.tensor([[0, 0, k, k]] * n),
                  image_num_crops=torch.ones(n, dtype=torch.long))
    return to_device(batch, bench.device), to_device(theirs, bench.device)


def beside_transformers(bench, what, reference, cfg, seq_len):
    """An answer and a step with the same weights and inputs as `reference`, transformers' class. On CUDA in bf16."""
    model = random_model(bench, cfg)
    model.save_pretrained("both")
    dtype = torch.bfloat16 if bench.cuda else torch.float32
    other = reference.from_pretrained("both", attn_implementation="sdpa", dtype=dtype).to(bench.device)
    batch, inputs = image_rows(bench, cfg, 1, seq_len // 2)
    del inputs["labels"]
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    n = 8 if bench.tiny else 64
    fixed = dict(max_new_tokens=n, min_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.to(dtype).eval()
    other.eval()
    our_answer = lambda: torch.cat(list(model.generate(batch["tokens"], batch["crops"], batch["pool"], n))).tolist()
    their_answer = lambda: other.generate(**inputs, **fixed)[0, -n:].tolist()
    figures, ids, wanted = take_turns(our_answer, their_answer, 1 if bench.tiny else 5, bench.until)
    same_ids = sum(a == b for a, b in zip(ids, wanted))
    bench.say(f"{what}: answer of {n} tokens", ok=same_ids == n or bench.cuda, **figures, same_ids=same_ids)

    torch._dynamo.reset()  # a model before may have been compiled
    other.float()
    flex.install(model.float())
    distributed.shard_model(model, distributed.World(bench.device), bench.cuda, False, bench.cuda)
    batch, inputs = image_rows(bench, cfg, 4, seq_len)
    batch = model.prepare(**batch)
    our_step = lambda: train_on(bench, model, **batch)
    their_step = lambda: train_on(bench, other, **inputs)
    figures, loss, wanted = take_turns(our_step, their_step, 1 if bench.tiny else 9, bench.until)
    limit = 1e-2 if bench.cuda else 1e-5
    bench.say(f"{what}: training step, {bench.device}", ok=abs(loss / wanted - 1) < limit, **figures, loss=loss,
              wanted=wanted, compiled=bench.cuda)


def part_transformers(bench, what):
    try:
        from transformers import Molmo2ForConditionalGeneration, __version__
    except ImportError as error:
        return bench.say(what, skipped=f"no transformers 5 with Molmo2 is installed: {error}")
    if not bench.cuda:
        torch.set_num_threads(1)
    bench.say("software", transformers=__version__)
    for name in ["small"] if bench.tiny else SIDE_BY_SIDE:
        bench.attempt(name, beside_transformers, Molmo2ForConditionalGeneration, *SIDE_BY_SIDE[name])


# Stage 2 as published: a record's medium, its share of the draws in % (sft_rate_pct of tools/prepare/datasets.tsv), its
# annotations (per example, from the list of data sets in arXiv 2601.10611), and tokens of an answer. PixMo-Cap has 200
# words an image, Molmo2-Cap 924 a clip; the other lengths are guesses. An example has 3.5 annotations on average.
PUBLISHED = (
    ("image", 2.3, 1, 260),   # PixMo-Cap
    ("image", 16.5, 1, 16),   # PixMo-Clocks, PixMo-Count, PixMo-CapQA (1.4), TallyQA (1.9), PixMo-AskModelAnything
    ("image", 12.3, 8, 20),   # VQA v2 (5), PixMo-Points (9), CoSyn charts, documents, tables (9), FigureQA (13)
    ("image", 0.5, 125, 8),   # PlotQA
    ("images", 4.9, 1, 30),   # Molmo2-MultiImagePoint, NLVR2, Molmo2-MultiImageQA (1.6)
    ("images", 4.2, 12, 12),  # Molmo2-SynMultiImageQA (10), LLaVA-665k, several images (16)
    ("video", 13.6, 1, 300),  # tracks
    ("video", 23.4, 1, 30),   # Molmo2-VideoPoint (1.4), Kinetics, Moments in Time, Paxion, TVQA
    ("video", 3.4, 3, 400),   # Molmo2-Cap
    ("video", 9.7, 6, 12),    # Molmo2-AskModelAnything (3), Molmo2-VideoCapQA (5), NExT-QA (9), CinePile (33)
    ("text", 9.2, 1, 400))    # Tulu


def published_records(n, shorter):
    """n records of this mixture. Their texts, not their media, are so many times shorter."""
    # With clips of 30 s 3.8 examples fill 16,384 tokens, as published. None of these files is decoded; of several
    # images the planner reads the sizes.
    media = dict(image=dict(image="photo.jpg", width=800, height=600), images=dict(images=["photo.jpg"] * 2),
                 video=dict(video="none.mp4", duration=30), text={})
    Image.new("RGB", (800, 600)).save("photo.jpg")
    words = lambda tokens: " ".join(["red"] * math.ceil(tokens / shorter))
    records = []
    for medium, _, size, tokens in random.Random(0).choices(PUBLISHED, [row[1] for row in PUBLISHED], k=n):
        chat = [dict(role="user", content=words(16)), dict(role="assistant", content=words(tokens))]
        task = dict(image="image_qa", images="multi_image_qa", video="video_qa", text="text")[medium]
        records.append(dict(media[medium], annotations=[dict(task=task, messages=chat)] * size))
    return records


def alone(plan):
    """The annotations of a plan, each in a plan of its own, with the media."""
    plans = []
    for branch in range(1, plan.branch.max() + 1):
        kept = np.isin(plan.branch, (0, branch))
        names = ("tokens", "targets", "weights", "pos", "branch")
        plans.append(replace(plan, **{name: getattr(plan, name)[kept] for name in names}))
    return plans


def packing(bench, what, flags, model_cfg, n_sequences, n_rows, beside):
    """The same answers trained on twice: in message trees, packed, as in training; and each in a row of its own with
    its image, n_rows at a time, padded to the longest. beside: the line with the ratio to transformers."""
    cfg = pretrain.parse(pretrain.Config(), pretrain.PRESETS, flags)
    planner = planner_for(model_cfg, cfg.seq_len, cfg.tiles, cfg.max_crops)
    stream = Stream(pretrain.open_data(cfg)[0], planner, cfg.seed).sequences()
    sequences = [next(stream).plans for _ in range(n_sequences)]
    decoded = [decode(plans, model_cfg, cfg.seq_len, noise) for plans in sequences]
    trees = pretrain.make_batches(decoded, cfg.micro_batch, n_sequences, model_cfg, cfg.seq_len)
    singles = []
    for plan in sum(sequences, []):
        singles += alone(plan)
    random.Random(0).shuffle(singles)
    rows = []
    for i in range(0, len(singles), n_rows):
        plans = singles[i:i + n_rows]
        longest = max(plan.n_tokens for plan in plans)
        decoded = [decode([plan], model_cfg, longest, noise) for plan in plans]
        rows += pretrain.make_batches(decoded, n_rows, len(plans), model_cfg, longest)

    model = random_model(bench, model_cfg)
    flex.install(model)
    distributed.shard_model(model, distributed.World(bench.device), False, cfg.recompute, bench.cuda)
    mask = model.mask
    # On a card each length would compile FlexAttention again: there rows have the dense mask, as in transformers.
    row_mask = partial(Molmo2.mask, model) if bench.cuda else mask

    def train(batches, mask):
        model.mask = mask
        batches = [pretrain.on_device(model, batch, bench.device) for batch in batches]
        return sum(train_on(bench, model, **batch) for batch in batches)
    figures, loss, wanted = take_turns(lambda: train(trees, mask), lambda: train(rows, row_mask),
                                       1 if bench.tiny else 2, bench.until)
    gain = 1 / figures["ratio"]
    n_tokens = lambda batches: sum(batch["tokens"].numel() for batch in batches)
    bench.say(what, ok=abs(loss / wanted - 1) < (1e-2 if bench.cuda else 1e-4), gain=gain,
              beside_transformers=gain / bench.known(beside, "ratio"), answers_a_sequence=len(singles) / n_sequences,
              answers_per_s=len(singles) / figures["ms"] * 1e3, alone_per_s=len(singles) / figures["other_ms"] * 1e3,
              answers=len(singles), tokens=n_tokens(trees), tokens_alone=n_tokens(rows))


def part_packing(bench, what):
    if not bench.cuda:
        torch.set_num_threads(1)
    world = toy.write_world("toy", 60, 1, 20) if bench.tiny else toy.write_world(os.path.join(ROOT, toy.FOLDER))
    flags = ["--config", "small", "--data", *toy.paths(world, toy.IMAGES)]
    bench.attempt("toy world", packing, flags, PRESETS["small"], 2 if bench.tiny else 48, 32,
                  f"small: training step, {bench.device}")
    # On a card the published length of stage 2. On a CPU an eighth, for there an image has an eighth of the tokens; and
    # a ViT that takes a quarter of the work, as it does in the published runs.
    shorter = 32 if bench.tiny else 1 if bench.cuda else 8
    cfg = bench.cfg if bench.cuda else replace(bench.cfg, layers=4, width=256, heads=8, kv_heads=8, mlp=768, crop=126,
                                               patch=14, vit_width=64, vit_head_dim=16, vit_mlp=128)
    toy.write_lines("published.jsonl", published_records(400, shorter))
    flags = (f"--config {bench.config} --data published.jsonl --micro_batch 1 --seq_len {16384 // shorter} --tiles 8 "
             f"--max_crops {16 if bench.tiny else 128}")
    bench.attempt("published mixture", packing, flags.split(), cfg, 1 if bench.tiny else 12, 4,
                  f"85m: training step, {bench.device}")
