"""
Stage 3: the same mixture in rows nine times as long, so that a video may have three times as many frames.

    torchrun --nproc_per_node=2 longctx.py --cp 2         # a laptop: from out/small/sft/latest
    torchrun --nproc_per_node=8 longctx.py --config 7b --cp 8 --init_from out/7b/sft/latest --data data/
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 longctx.py ...   # on each

384 frames of 81 tokens and their timestamps are some 33,000 tokens; with a question and an answer 36,864 hold them.
No new parameter, no new loss: what changes is how much memory a row takes, and that is what ulysses.py is for.
What each of eight cards of 80 GB holds of a 7B model (--config 7b --cp 8 --world 8 --dry_run, budget.py; GB):

    weights, gradients, two moments of AdamW      7.76e9 x 16 bytes / 8                          14.5
    gathered for this block and the next          bf16, with embedding, head and connector        2.4
    gradients on their way to be shared           bf16, and fp32 to be added up                   6.7
    activations of 4,608 tokens and 45 crops      block inputs, with --recompute                  3.7
    logits of a chunk, the head's gradient        never 36,864 x 100,278: that alone were 13.8    2.4
    one block computed again, on the way back                                                     1.5
                                                                                                 31.2
"""
import dataclasses

import pretrain
import sft


DEFAULTS = dataclasses.replace(
    sft.DEFAULTS, stage="longctx", previous="sft", steps=2000, global_batch=32, micro_batch=1, seq_len=36864,
    max_frames=384, max_crops=384, recompute=True, save_every=500)

PRESETS = {
    "small": dict(sft.PRESETS["small"], steps=100, global_batch=2, micro_batch=1, seq_len=9 * 768, max_frames=48,
                  max_crops=9 * 48, warmup_vit=10, warmup_connector=10, warmup_decoder=10, eval_clips=60),
    **{name: preset for name, preset in pretrain.PRESETS.items() if name != "small"},
}

if __name__ == "__main__":
    pretrain.main(DEFAULTS, PRESETS, cache_features=sft.cache_features,
                  example='data/toy/long/eval/video/00000.mp4 "Track the white circle."')
