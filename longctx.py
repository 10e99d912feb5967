"""
Stage 3, long context: the same mixture in sequences nine times as long, so that a video may have 384 frames.

    torchrun --nproc_per_node=2 longctx.py --cp 2         # a laptop: from out/small/sft/latest; 5 minutes
    torchrun --nproc_per_node=8 longctx.py --config 7b --cp 8 --init_from out/7b/sft/latest --data data/
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 longctx.py ...   # on each

In stage 2 a sequence of 4,096 tokens holds a video of some 45 frames: at two a second that is 23 seconds, and of a
longer video they lie further apart. Here 384 frames, three minutes at two a second, take 81 tokens each and their
timestamps, 33,000 together; 36,864 hold a question and an answer too. Mixture "sft" stays, with its images and short
videos: dozens of them are packed into one sequence, so that nothing is forgotten. The toy world adds clips of 7.5
seconds, three times as long as those of stage 2.

No new parameter, no new loss. These numbers differ (python longctx.py -h has all):

                            stage 2          stage 3        stage 3, small    why
    steps                    50,000            2,000                100       only the number of frames is new
    sequences per step          128               32                  2
    sequences at a time           4                1                  1       memory
    tokens per sequence       4,096           36,864              6,912       nine times as many and more
    frames per video            128              384                 48       if tokens and crops hold them
    crops per sequence           48              384                432
    peak lr  vit               5e-6             5e-6             frozen       as in stage 2
             connector         5e-6             5e-6             2.5e-3
             decoder           1e-5             1e-5               2e-3
    warm-up, steps              200              200                 10
    recompute                 1b up              all                all       activation checkpointing

What it costs is memory, which grows with the tokens that a rank holds. --cp N gives each of N ranks an N-th of a
sequence; ulysses.py has how, and what the ranks send each other. N must divide the heads: 32 in 4b, 7b and 8b, 16 in
1b, 4 in small. On the same two cores small takes 2.6 GB on two ranks together. 1b needs no --cp where a card has 80 GB:
one H200 (PyTorch 2.11) takes 6.0 s for a sequence with 364 frames, 6,200 tokens a second, and 70.6 GB.

DEFAULTS and PRESETS hold these numbers; --cp is ulysses.install and ulysses.shard_batch, in pretrain.train.

What each of eight cards of 80 GB holds of a 7B model (--config 7b --cp 8 --world 8 --dry_run prints it; GB):

    weights              3.5    7.76e9 x 4 bytes / 8; 2 bytes of the token table, which stays as it was
    gradients            3.4    of all but that table
    optimiser            6.8    the two moments of AdamW
    gathered weights     2.4    bf16, of this block and the next, with embedding, head and connector
    gradients to share   3.7    before they are sharded: bf16, and fp32 to be added up
    activations          3.7    of 4,608 tokens and 46 crops: the inputs of blocks, with --recompute
    loss                 3.1    logits of a chunk, and the head's gradient; 36,864 x 100,278 logits alone were 13.8
    way back             0.8    one block computed again in the backward pass
    together            27.5
"""
import dataclasses

import pretrain
import sft

DEFAULTS = dataclasses.replace(
    sft.DEFAULTS, stage="longctx", previous="sft", steps=2000, global_batch=32, micro_batch=1,
    seq_len=36864, max_frames=384, max_crops=384, recompute=True, save_every=500)

PRESETS = dict(pretrain.PRESETS, small=dict(
    sft.PRESETS["small"], steps=100, global_batch=2, micro_batch=1, seq_len=6912, max_frames=48, max_crops=432,
    warmup_vit=10, warmup_connector=10, warmup_decoder=10, eval_clips=60))

if __name__ == "__main__":
    pretrain.main(DEFAULTS, PRESETS, cache_features=sft.cache_features,
                  example='data/toy/long/eval/video/00000.mp4 "Track the white circle."')
