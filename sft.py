"""
Stage 2, supervised fine-tuning: the model that describes and points in images learns video.

    python sft.py                                    # a laptop: toy clips, from out/small/pretrain/latest
    python sft.py --data clips/my.jsonl              # your own videos
    python sft.py --config 4b --init_from weights/Molmo2-4B --lora 64 --epochs 3 --data clips/    # a card of 24 GB
    torchrun --nproc_per_node=8 sft.py --config 8b --init_from weights/Molmo2-8B --data data/

New in this stage are video captions and questions, points at a time of a video, tracks, and questions about several
images. The image tasks of stage 1 stay in the mixture, or they would be forgotten: mixture "sft" draws each dataset
in proportion to sqrt(records), times its multiplier in datasets.tsv.

The model, the loss and the loop are those of stage 1. These numbers differ (python sft.py -h has all):

                            stage 1          stage 2        stage 2, small    why
    steps                    32,000           50,000              2,200
    sequences per step          256              128                  6
    tokens per sequence       4,096            4,096                512       small: 10 seconds of video and a track
    crops per sequence           48               48                 48       so at most 48 frames; --seq_len raises it
    peak lr  vit               6e-6             5e-6             frozen       all parts are trained by now, so all move
             connector         2e-4             5e-6             2.5e-3       slowly; small learns most of it here
             decoder           2e-5             1e-5               2e-3
    warm-up, steps   2,000/200/2,000             200                 30
    dropout         0.1 on answers    0.1 everywhere               none

DEFAULTS and PRESETS hold these numbers; `cache_features` is what small does with a frozen ViT.

A sequence costs what it costs in stage 1: memory follows tokens and crops, not what they show.
"""
import dataclasses
import hashlib
import math

import lib  # noqa: F401: before torch, which reads the environment that it sets
import torch

import pretrain
from pretrain import Config

DEFAULTS = dataclasses.replace(
    Config(), stage="sft", previous="pretrain", mixture="sft",
    steps=50_000, global_batch=128, max_crops=48,
    lr_vit=5e-6, lr_connector=5e-6, lr_decoder=1e-5, warmup_vit=200, warmup_connector=200, warmup_decoder=200,
    residual_dropout=0.1, response_dropout=0.0, save_every=2000)

PRESETS = dict(pretrain.PRESETS, small=dict(
    pretrain.PRESETS["small"], steps=2200, global_batch=6, micro_batch=6, seq_len=512, max_crops=48, max_frames=48,
    freeze=("vit",), lr_connector=2.5e-3, lr_decoder=2e-3, residual_dropout=0.0, save_every=500, eval_every=10**6,
    eval_clips=100, eval_first=True))


def cache_features(vit, cfg, gigabytes, group=32):
    """Make a frozen ViT encode each distinct crop once: its features are kept in bf16, under the hash of the pixels,
    until `gigabytes` are full. Worth it for `small`, where every toy frame comes back a dozen times.

    New crops are encoded in groups of one size, so that a resumed run, whose cache is empty, gets the same numbers.
    """
    shape = cfg.patches, len(cfg.vit_features) * cfg.vit_width
    cache = torch.empty(int(gigabytes * 2 ** 29 / math.prod(shape)), *shape, dtype=torch.bfloat16)
    slots = {}  # hash of a crop -> its row in `cache`
    encode = vit.forward

    def forward(crops):
        keys = [hashlib.blake2b(crop.tobytes(), digest_size=16).digest() for crop in crops.cpu().numpy()]
        features = torch.empty(len(crops), *shape, dtype=torch.bfloat16)  # (N, P, F)
        new = [i for i, key in enumerate(keys) if key not in slots]
        for i, key in enumerate(keys):
            if key in slots:
                features[i] = cache[slots[key]]
        for start in range(0, len(new), group):
            indices = new[start:start + group]
            padding = indices[:1] * (group - len(indices))
            features[indices] = encode(crops[indices + padding])[:len(indices)].bfloat16().cpu()
            for i in indices:
                if len(slots) < len(cache):  # there is room
                    slot = slots.setdefault(keys[i], len(slots))
                    cache[slot] = features[i]
        return features.to(crops.device, torch.float32)
    vit.forward = forward


if __name__ == "__main__":
    pretrain.main(DEFAULTS, PRESETS, cache_features=cache_features,
                  example='data/toy/clips/eval/video/00024.mp4 "Track the red circle."')
