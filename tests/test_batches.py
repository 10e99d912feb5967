"""Sequences on their way to the model: shared over ranks, workers and steps, decoded, put side by side."""
import copy
import functools
import itertools
import json
import os
import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import SIZES, STYLES, picture, video, write_lines

from data import Dataset, Planner, RankStream, Stream, collate, decode, decode_packed
from lib.distributed import make_loader
from lib.media import load_crops
from lib.text import SMALL_TOKENIZER, Tokenizer
from model import ModelConfig


# what these tests use of the product, named here alone


@pytest.fixture
def small():
    """A planner whose sequences hold some images or a clip."""
    cfg = ModelConfig(**SIZES, **STYLES["olmo"])
    return Planner(Tokenizer(SMALL_TOKENIZER, cfg.vocab), cfg, 160, tiles=4, max_frames=3, max_crops=12)


def noise(path, size, seed):
    from PIL import Image
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


# ---- ranks x workers x steps -------------------------------------------------------------------------------

class Planned:
    """The first n sequences of a stream, planned once. It ends: who gets none is found out, nobody waits for ever."""

    def __init__(self, stream, n):
        self.planner, self.all = stream.planner, list(itertools.islice(stream.sequences(), n))

    def sequences(self, state=None):
        yield from copy.deepcopy(self.all[state["rows"] if state else 0:])


@pytest.fixture
def stream(tmp_path, small):
    """Text and images; lines that cannot be read, and an image that breaks when it is decoded."""
    rng = random.Random(2)
    for i in range(3):
        picture(tmp_path / f"{i}.png", (90 * i, 9, 9))
    whole = open(picture(tmp_path / "whole.png", "red", (300, 300)), "rb").read()
    (tmp_path / "half.png").write_bytes(whole[:len(whole) // 2])
    words = lambda: " ".join(rng.choice(("red", "tall", "wall")) for _ in range(rng.randint(5, 60)))
    images = [dict(image=f"{i % 3}.png", annotations=[dict(task="image_caption", answer=words())]) for i in range(9)]
    images.append(dict(image="half.png", annotations=[dict(task="image_caption", answer="Broken.")]))
    texts = [dict(annotations=[dict(task="text", prompt="Say.", answer=words())]) for _ in range(17)]
    sets = [Dataset(name, [write_lines(tmp_path / f"{name}.jsonl", rows)])
            for name, rows in (("images", images), ("texts", [*texts, "{", "[]"]))]
    return Stream([(d, 0.5) for d in sets], small, seed=1)


def of_rank(stream, rank, ranks, step, workers, state=None):
    """All sequences of a rank, as training loads them: [(row, crops, pools), state, events]."""
    convert = functools.partial(decode_packed, cfg=stream.planner.cfg, seq_len=stream.planner.seq_len)
    return list(make_loader(RankStream(stream, state, rank, ranks, step), workers, -(-step // ranks), convert))


def alike(a, b):
    """Whether two loaded sequences hold the same and the stream stands at the same place after them."""
    (row, crops, pools), state, _ = a
    (row2, crops2, pools2), state2, _ = b
    return state == state2 and row.keys() == row2.keys() and all(
        np.array_equal(x, y) for x, y in itertools.zip_longest([*row.values(), *crops, *pools],
                                                               [*row2.values(), *crops2, *pools2]))


def decoded_in_turn(stream):
    """What a single process would load, without RankStream."""
    out = []
    for plans, state, events in stream.sequences():
        *row, failed = decode(plans, stream.planner.cfg, stream.planner.seq_len)
        out.append((tuple(row), state, events + failed))
    return out


# Steps that ranks can share and cannot, workers that a rank's share can and cannot occupy, a rank without a share.
GRID = [(1, 0, 1), (1, 3, 4), (2, 0, 5), (2, 2, 4), (2, 3, 5), (3, 0, 7), (3, 1, 2), (3, 2, 3), (5, 0, 9)]


@pytest.mark.parametrize("ranks, workers, step", GRID)
def test_ranks_and_workers_share_each_step_and_nobody_waits_for_ever(stream, ranks, workers, step):
    """The j-th sequence of a step goes to rank j modulo ranks, also where a step has no equal number for each; and
    so again after a resume, with other workers."""
    steps = 4
    stream = Planned(stream, steps * step)
    whole = decoded_in_turn(stream)
    for rank in range(ranks):
        mine = [whole[s * step + j] for s in range(steps) for j in range(rank, step, ranks)]
        loaded = of_rank(stream, rank, ranks, step, workers)
        assert len(loaded) == len(mine) and all(map(alike, loaded, mine))
        half = steps // 2
        state = json.loads(json.dumps(whole[half * step - 1][1]))
        again = of_rank(stream, rank, ranks, step, int(ranks == 2 and not workers), state)
        assert len(again) == len(mine) // 2 and all(map(alike, again, mine[len(mine) // 2:]))


def test_every_unusable_line_is_told_whatever_the_ranks_and_workers(stream):
    """What fails to decode is told by the one who decodes it: it is counted."""
    stream = Planned(stream, 40)
    key = lambda e: (e[0], os.path.basename(e[1]), e[2])
    whole = Counter(key(e) for *_, events in decoded_in_turn(stream) for e in events)
    broken = {k: n for k, n in whole.items() if k[2] == "failed to decode"}
    assert len(whole) == 3 and broken[("images", "images.jsonl:10", "failed to decode")] > 1
    for ranks, workers, step in ((1, 2, 4), (2, 2, 5)):
        events = [Counter(key(e) for *_, events in of_rank(stream, rank, ranks, step, workers) for e in events)
                  for rank in range(ranks)]
        assert set(sum(events, Counter())) == set(whole)
        assert {k: n for k, n in sum(events, Counter()).items() if k in broken} == broken
        assert all(told[k] <= whole[k] for told in events for k in told)  # not by each of its workers


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_rank_plans_once_whatever_the_number_of_its_workers(stream, tmp_path, workers):
    """Where many ranks share a step, all that is planned for it is as much work as what a rank decodes."""
    def note(name):
        with open(tmp_path / name, "a") as f:
            f.write(f"{os.getpid()} ")

    class Noted(Planned):
        def sequences(self, state=None):
            for packed in super().sequences(state):
                note("planned")
                yield packed

    def load(*args):
        note("decoded")
        return load_crops(*args)
    n = 24
    cfg, seq_len = stream.planner.cfg, stream.planner.seq_len
    convert = functools.partial(decode_packed, cfg=cfg, seq_len=seq_len, load=load)
    assert len(list(make_loader(RankStream(Noted(stream, n), world=2), workers, 6, convert))) == n / 2
    planned, decoded = ((tmp_path / name).read_text().split() for name in ("planned", "decoded"))
    assert len(planned) == n and len({*planned}) == 1  # all of the stream, in one process
    assert len({*decoded}) == max(workers, 1) and len(decoded) > workers
    here = str(os.getpid())
    assert ({*planned} == {here}) == ({*decoded} == {here}) == (workers == 0)
    assert ({*planned} <= {*decoded}) == (workers < 2)  # planning does not wait for pixels


# ---- decode and collate ------------------------------------------------------------------------------------

@pytest.fixture
def plans(tmp_path, small):
    """By name: an image in several crops, three images, a clip, text."""
    for i, size in enumerate(((60, 40), (30, 24), (90, 20), (20, 20))):
        noise(tmp_path / f"{i}.png", size, i)
    video(tmp_path / "a.mp4", n=12)
    say = lambda task: dict(task=task, prompt="What?", answer="A thing.")
    rows = dict(image=dict(image="0.png", annotations=[say("image_qa")] * 2),
                images=dict(images=["1.png", "2.png", "3.png"], annotations=[say("multi_image_qa")]),
                other=dict(image="2.png", annotations=[say("image_qa")]),
                clip=dict(video="a.mp4", start=0.2, annotations=[say("video_qa")]),
                text=dict(annotations=[say("text")]))
    small.seq_len = 300
    made = {name: small.plan(row, str(tmp_path), random.Random(0))[0][0] for name, row in rows.items()}
    assert [made[n].n_crops for n in rows] == [5, 12, 5, 3, 0]
    return made


def seen(crops, pool):
    """What each visual token shows: the patches that its window names, zeros for none."""
    flat = np.concatenate([c.reshape(-1, c.shape[-1]) for c in crops])
    return np.where(pool[..., None] >= 0, flat[pool], 0)


@pytest.mark.parametrize("rows", [
    [["image"]], [["image", "other"], ["images"]], [["images", "image"], ["text"], ["other"]],
    [["text"], ["other", "clip", "image"], ["clip"], ["images"]], [["clip"], ["clip", "text", "clip"]]],
    ids=lambda rows: "-".join("+".join(r) for r in rows))
def test_every_visual_token_shows_its_own_image(plans, small, rows):
    """In a batch of several sequences, each with several images, windows point at the pixels that they did when the
    image was alone."""
    cfg = small.cfg
    batch = collate([decode([plans[name] for name in row], cfg, 600) for row in rows])
    media = [m for row in rows for name in row for m in plans[name].media]
    k = max(layout.pool.shape[1] for _, layout in media)
    alone = [seen([load_crops(path, layout, small.n, cfg.patch)], np.pad(
        layout.pool, ((0, 0), (0, k - layout.pool.shape[1])), constant_values=-1)) for path, layout in media]
    assert batch["crops"].dtype == torch.uint8 and len(batch["crops"]) == sum(layout.n_crops for _, layout in media)
    assert np.array_equal(seen([batch["crops"].numpy()], batch["pool"].numpy()), np.concatenate(alone))
    per_row = [sum(len(layout.pool) for name in row for _, layout in plans[name].media) for row in rows]
    assert (batch["tokens"] == cfg.image_token).sum(1).tolist() == per_row


def test_a_sequence_is_its_examples_side_by_side_and_then_nothing(plans, small):
    chosen = [plans[name] for name in ("clip", "text", "images")]
    row, crops, pools, failed = decode(chosen, small.cfg, 600)
    n = sum(p.n_tokens for p in chosen)
    assert not failed and [len(c) for c in crops] == [3, 5, 5, 2] and len(pools) == 4
    for key in ("tokens", "targets", "weights", "pos", "branch"):
        assert np.array_equal(row[key][:n], np.concatenate([getattr(p, key) for p in chosen])), key
    examples = [e for e, p in enumerate(chosen, 1) for _ in range(p.n_tokens)]
    assert row["example"].tolist() == examples + [0] * (600 - n)
    assert not any(v[n:].any() for v in row.values()) and all(len(v) == 600 for v in row.values())


def test_a_broken_image_costs_its_own_example_alone(plans, small):
    """Second of three images of the second of three examples: the windows of those after it stay where they were."""
    chosen = [plans[name] for name in ("other", "images", "image")]
    broken = chosen[1].media[1][0]
    os.rename(broken, broken + ".whole")
    chosen[0].media[0] = (broken + ".whole", chosen[0].media[0][1])  # shows the same file
    row, crops, pools, failed = decode(chosen, small.cfg, 600)
    assert len(failed) == 1 and failed[0][2] == "failed to decode"
    assert [e for e in (1, 2, 3) if row["weights"][row["example"] == e].any()] == [1, 3]
    assert [bool(c.any()) for c in crops] == [True, True, False, True, True]
    batch, media = collate([(row, crops, pools)]), [m for p in chosen for m in p.media]
    alone = [seen([load_crops(path, layout, small.n, small.cfg.patch)], layout.pool) if os.path.exists(path)
             else np.zeros((*layout.pool.shape, 48), np.uint8) for path, layout in media]
    assert np.array_equal(seen([batch["crops"].numpy()], batch["pool"].numpy()), np.concatenate(alone))
