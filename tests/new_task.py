"""
A new task from 200 labelled clips: what an adapter learns of it and forgets of the old ones, beside full fine-tuning
and the connector alone. The model knows circles, stars and bars; new is a triangle, called by its shape alone.

    python tests/new_task.py --seed 0                                     # from out/small/sft/latest, data/toy
    python tests/new_task.py --seed 0 --steps 100 --limit 20 --ways lora --more="--lr_decoder 1e-3"    # a first look

Each way is a run of sft.py on the new clips alone: nothing of the old tasks is shown again. Scores are eval.py's, on 60
new clips held out and on the toy world's held-out records.
"""
import argparse
import math
import os
import random
import subprocess
import sys
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import eval as evaluation  # noqa: E402: found in ROOT
import sample  # noqa: E402
from data import find_datasets  # noqa: E402
from lib import toy  # noqa: E402

# How the same 200 clips are trained on. An adapter learns at the rates of pretrain.lora_recipe.
WAYS = {"lora": ["--lora", "16"],
        "everything": ["--freeze", "none", "--optimizer", "adamw", "--lr_vit", "3e-4", "--lr_connector", "3e-4",
                       "--lr_decoder", "3e-4"],
        "connector": ["--freeze", "vit", "decoder", "embedding"]}
NEW = ("video_tracking accuracy", "video_pointing f1", "video_qa accuracy")
OLD = (*NEW, "video_caption overlap_f1", "multi_image_pointing f1", "multi_image_qa accuracy", "point_hit",
       "count_accuracy", "caption_recall")


def outline(shape, radius, angle, known=toy.outline):
    """lib.toy's, which knows no triangle."""
    if shape != "triangle":
        return known(shape, radius, angle)
    turns = angle + 2 * math.pi * np.arange(3) / 3
    return 1.3 * radius * np.stack([np.sin(turns), -np.cos(turns)], 1)


def about_triangle(rng, clip, o):
    """Its track, where it is at one time, which way it moves."""
    k = rng.choice([k for k in range(clip["looks"]) if toy.there(o, k)])
    place = toy.video_pointing("triangle", [toy.point(o, k)], [toy.mask(o, clip["size"], k)], f" at {k / 2:g} seconds")
    way = dict(task="video_qa", prompt="Which way does the triangle move?", answer=toy.way_answer(o))
    return [toy.track(rng, clip, [o], "triangle"), place, way]


def write_clips(folder, seed, train=200, held_out=60):
    """train.jsonl and held_out.jsonl: clips in which one of two or three shapes has become a triangle."""
    toy.outline = outline
    os.makedirs(os.path.join(folder, "video"))
    seen = set()
    records = []
    draw = 0
    while len(records) < train + held_out:
        rng = random.Random(f"triangle {seed} {draw}")
        draw += 1
        clip = toy.draw_clip(rng)
        o = rng.choice(clip["objects"])
        o["shape"] = "triangle"
        if len(clip["objects"]) == 1 or toy.visible(clip) in seen:
            continue
        seen.add(toy.visible(clip))
        name = f"video/{len(records):03d}.mp4"
        toy.write_clip(os.path.join(folder, name), clip)
        records.append(dict(id=name, video=name, annotations=about_triangle(rng, clip, o)))
    toy.write_lines(os.path.join(folder, "held_out.jsonl"), records[:held_out])
    toy.write_lines(os.path.join(folder, "train.jsonl"), records[held_out:], trains=True)


def scores(checkpoint, clips, toy_folder, limit):
    """({metric: value} of the new task, the same of the old ones)."""
    model, planner = sample.load(checkpoint)
    files = [os.path.join(clips, "held_out.jsonl")], toy.paths(toy_folder, toy.HELD_OUT["sft"])
    values = []
    for paths, n in zip(files, (None, limit)):
        questions = evaluation.load_questions(find_datasets(paths)[0], n)
        values.append(evaluation.evaluate(model, planner, questions, batch=64, max_new_tokens=256)[0])
    new, old = values
    old |= evaluation.evaluate_scenes(model, planner, os.path.join(toy_folder, "eval"), limit)
    return {name: new[name] for name in NEW}, {name: old[name] for name in OLD}


def train(way, args, clips):
    """Train with the flags of a way; its last checkpoint."""
    out = os.path.join(args.out, way)
    data = os.path.join(clips, "train.jsonl")
    command = [sys.executable, os.path.join(ROOT, "sft.py"), "--data", data, "--init_from", args.init_from,
               "--out", out, "--seed", str(args.seed), "--steps", str(args.steps), *WAYS[way], *args.more.split()]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return os.path.join(out, "small/sft/latest")


def mean(values):
    return sum(values.values()) / len(values)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--init_from", default="out/small/sft/latest", help="a checkpoint of stage 2 [out/small/sft/latest]")
    add("--toy", default=toy.FOLDER, help="the toy world that it learned [data/toy]")
    add("--out", default="out/new_task", help="clips and runs go to OUT/SEED, which must not exist [out/new_task]")
    add("--seed", type=int, default=0, help="of the clips and of training [0]")
    add("--steps", type=int, default=300, help="of each way [300]")
    add("--limit", type=int, default=100, help="held-out records of each file of the old tasks [100]")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of training [all]")
    add("--more", default="", help='flags of sft.py for these ways: --more="--lr_decoder 1e-3 --lr_connector 1e-3"')
    args = parser.parse_args()
    args.out = os.path.join(args.out, str(args.seed))
    clips = os.path.join(args.out, "clips")
    write_clips(clips, args.seed)
    table = {}
    for way in ("before", *args.ways):
        began = time.time()
        checkpoint = args.init_from if way == "before" else train(way, args, clips)
        trained = time.time()
        table[way] = scores(checkpoint, clips, args.toy, args.limit)
        new, old = map(mean, table[way])
        print(f"{way}: new {new:.3f}, old {old:.3f}; trained {trained - began:.0f} s, "
              f"asked {time.time() - trained:.0f} s", flush=True)
    print(f"\nseed {args.seed}, {args.steps} steps".ljust(36) + "".join(f"{way:>16}" for way in table))
    for title, i in (("new", 0), ("old", 1)):
        for name in table["before"][i]:
            print(f"{title}  {name:30}" + "".join(f"{values[i][name]:16.3f}" for values in table.values()))
        print(f"{title}  {'mean':30}" + "".join(f"{mean(values[i]):16.3f}" for values in table.values()))
    old = mean(table["before"][1])
    print(f"{'forgotten, points':35}" + "".join(f"{100 * (old - mean(values[1])):16.1f}" for values in table.values()))


if __name__ == "__main__":
    main()
