"""
Stage 2: the same model meets video, several pictures, moments and tracks, and keeps what it knew.

    python sft.py                           # a laptop: the toy world's clips, from out/small/pretrain/latest
    python sft.py --data clips/my.jsonl     # your own videos (README)
    python sft.py --config 8b --init_from weights/Molmo2-8B --data data/

The loop is stage 1's. What differs is here: where it starts, what it reads, how much of each, and how fast it
learns.
"""
import dataclasses

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

if __name__ == "__main__":
    cfg, run = pretrain.main(DEFAULTS, PRESETS)
    print(f'next: python sample.py {run}/latest data/toy/clips/eval/video/00024.mp4 "Track the red circle."')
