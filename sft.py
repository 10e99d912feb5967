"""
Stage 2: the same model meets video, several pictures, moments and tracks, and keeps what it knew.

    python sft.py                           # a laptop: the toy world's clips, from out/small/pretrain/latest
    python sft.py --data clips/my.jsonl     # your own videos (README)
    python sft.py --config 8b --init_from weights/Molmo2-8B --data data/

The loop is stage 1's. What differs is here: where it starts, what it reads, how much of each, and how fast it
learns.
"""
import dataclasses
import hashlib
import math

import torch

import pretrain
from pretrain import Config


DEFAULTS = dataclasses.replace(
    Config(), stage="sft", previous="pretrain", mixture="sft",
    steps=50_000, global_batch=128, max_crops=48,
    # Everything is pretrained by now, the connector too: all parts warm up alike and move slowly.
    lr_vit=5e-6, lr_connector=5e-6, lr_decoder=1e-5, warmup_vit=200, warmup_connector=200, warmup_decoder=200,
    residual_dropout=0.1, response_dropout=0.0, save_every=2000)

PRESETS = {
    # Three times the tokens of stage 1: ten seconds of real video and a track through them fit; of the toy world's
    # examples four. Few rows a step, many steps; the ViT stays as stage 1 left it.
    "small": dict(pretrain.PRESETS["small"], steps=2650, global_batch=4, micro_batch=4, seq_len=768, max_crops=48,
                  freeze=("vit",), lr_connector=2.5e-3, lr_decoder=2e-3, residual_dropout=0.0, save_every=500,
                  eval_clips=100, eval_first=True),
    **{name: preset for name, preset in pretrain.PRESETS.items() if name != "small"},
}


def cache_features(vit, cfg, gigabytes, group=32):
    """A frozen encoder says the same of a crop each time: what it said is kept, in bf16, under the crop's
    hash, until the room is full. Worth it where crops are small and come often, as in the toy world: a dozen
    times each. New crops are encoded in groups of one size, so that a resumed run, which begins with nothing
    kept, gets the very same numbers."""
    shape = cfg.patches, len(cfg.vit_features) * cfg.vit_width
    plain, places = vit.forward, {}
    kept = torch.empty(int(gigabytes * 2 ** 29 / math.prod(shape)), *shape, dtype=torch.bfloat16)

    def forward(crops):
        keys = [hashlib.blake2b(c.tobytes(), digest_size=16).digest() for c in crops.cpu().numpy()]
        known = [i for i, k in enumerate(keys) if k in places]
        new = [i for i, k in enumerate(keys) if k not in places]
        out = torch.empty(len(crops), *shape, dtype=torch.bfloat16)
        out[known] = kept[[places[keys[i]] for i in known]]
        for some in (new[i:i + group] for i in range(0, len(new), group)):
            out[some] = plain(crops[some + some[:1] * (group - len(some))])[:len(some)].bfloat16().cpu()
            for i in some:
                if len(places) < len(kept):
                    kept[places.setdefault(keys[i], len(places))] = out[i]
        return out.to(crops.device, torch.float32)
    vit.forward = forward


if __name__ == "__main__":
    cfg, run = pretrain.main(DEFAULTS, PRESETS, cache_features=cache_features)
    print(f'next: python sample.py {run}/latest data/toy/clips/eval/video/00024.mp4 "Track the red circle."')
