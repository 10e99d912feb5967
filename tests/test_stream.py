"""The engine as a whole: index, mixtures, one stream for any workers and any stop, and a corpus in which
everything is broken."""
import functools
import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import picture, poison, video, write_lines

from lib import media
from eval import load_questions
from data import (Dataset, MIXTURES, RankStream, Stream, collate, decode, decode_packed, find_datasets, mix,
                  show_mixture)
from lib.distributed import make_loader
from lib.records import line_index, parse_record, read_registry


TEXT = dict(annotations=[dict(task="text", prompt="a", answer="b")])


# ---- index -------------------------------------------------------------------------------------------------

def test_index_is_built_once_and_again_when_the_file_changes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 0}\n\n\r\n{"n": 1}\r\n{\n{"n": 2}')
    d = Dataset("a", [str(path)])
    assert [d.line(i)[0].strip() for i in range(len(d))] == [b'{"n": 0}', b'{"n": 1}', b"{", b'{"n": 2}']
    assert [d.line(i)[2].rsplit(":", 1)[1] for i in range(4)] == ["1", "4", "5", "6"]
    kept = tmp_path / ".a.jsonl.index.npy"
    before = kept.stat().st_mtime_ns
    assert isinstance(line_index(str(path)), np.memmap) and kept.stat().st_mtime_ns == before
    path.write_bytes(b'{"n": 3}\n' * 5)
    assert len(Dataset("a", [str(path)])) == 5
    kept.write_bytes(b"not an index")
    again = Dataset("a", [str(path)])
    assert len(again) == 5 and again.line(4)[0] == b'{"n": 3}\n'


def test_index_of_a_file_that_ends_in_one_letter(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n{")
    assert len(Dataset("a", [str(tmp_path / "a.jsonl")])) == 2
    (tmp_path / "b.jsonl").write_bytes(b"")
    assert len(Dataset("b", [str(tmp_path / "b.jsonl")])) == 0


def test_media_are_beside_the_file_and_not_beside_a_link_to_it(tmp_path):
    """A link to a file, a link to that link, a file in a folder that is a link; whoever reads: training, eval.py and
    tools.show all read through Dataset. The index of a file stands beside the name under which it was opened."""
    picture(tmp_path / "disk" / "a.png", "red")
    record = dict(image="a.png", annotations=[dict(task="image_caption", answer="red")])
    write_lines(tmp_path / "disk" / "rows.jsonl", [record])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "disk" / "rows.jsonl")
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "link.jsonl").symlink_to("../link.jsonl")
    (tmp_path / "folder").symlink_to("disk")
    for name in ("disk/rows.jsonl", "link.jsonl", "again/link.jsonl", "folder/rows.jsonl"):
        dataset, = find_datasets([str(tmp_path / name)])[0]
        _, folder, where = dataset.line(0)
        assert os.path.samefile(folder, tmp_path / "disk") and where == f"{tmp_path / name}:1"
        question, = load_questions([dataset])
        assert os.path.samefile(question.path, tmp_path / "disk" / "a.png")


def test_an_index_in_use_goes_to_a_process_that_is_started_afresh(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 0}\n{"n": 1}\n')
    here = Dataset("a", [str(tmp_path / "a.jsonl")])
    first = here.line(0)
    there = pickle.loads(pickle.dumps(here))
    assert [here.line(0), here.line(1)] == [there.line(0), there.line(1)] and there.line(0) == first


@pytest.mark.slow
def test_workers_are_started_afresh_where_the_system_does_so(tmp_path):
    """macOS starts processes so, and Linux from Python 3.14 on: what a worker needs has to travel to it."""
    picture(tmp_path / "a.png", "red")
    record = dict(image="a.png", annotations=[dict(task="image_caption", answer="red")])
    write_lines(tmp_path / "rows.jsonl", [record] * 20)
    script = tmp_path / "run.py"
    script.write_text("""if __name__ == "__main__":
    import multiprocessing
    multiprocessing.set_start_method("spawn")
    import pretrain
    pretrain.main(pretrain.Config(), pretrain.PRESETS, "--data rows.jsonl --steps 2 --workers 2 --no-report".split())
""")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    run = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=dict(os.environ, PYTHONPATH=root), text=True,
                         capture_output=True, timeout=300)
    assert run.returncode == 0 and "step     2/2" in run.stdout, run.stdout + run.stderr


# ---- mixtures ----------------------------------------------------------------------------------------------

def test_registry_folder_shards_and_files_of_ones_own(tmp_path):
    for name in ("pixmo-cap.jsonl", "pixmo-points.jsonl", "mine.jsonl", "tgif.jsonl"):
        write_lines(tmp_path / name, [TEXT] * 4)
    (tmp_path / "tulu-v2-sft-mixture").mkdir()
    for k in range(3):
        write_lines(tmp_path / "tulu-v2-sft-mixture" / f"{k}.jsonl", [TEXT] * (k + 1))
    datasets, missing = find_datasets([str(tmp_path)], "pretrain")
    assert {d.name: len(d) for d in datasets} == {"pixmo-cap": 4, "pixmo-points": 4, "mine": 4,
                                                  "tulu-v2-sft-mixture": 6}
    assert set(missing) == {"pixmo-count", "cosyn-point"}  # tgif is not of this stage
    tulu = next(d for d in datasets if d.name.startswith("tulu"))
    assert tulu.line(3)[2].endswith("2.jsonl:1")
    names = {d.name for d in find_datasets([str(tmp_path)])[0]}
    assert "tgif" in names and len(names) == 5
    assert find_datasets([str(tmp_path / "mine.jsonl")], "pretrain")[1] == []


class Sized(Dataset):
    def __init__(self, name, rows, entry=None):
        self.name, self.entry, self.rows, self.factor = name, entry or {}, rows, 1.0

    def __len__(self):
        return self.rows


def test_rates_are_the_reports(capsys):
    registry = read_registry()
    assert len(registry) > 100 and {e["stage"].split(",")[0] for e in registry.values()} == {"pretrain",
                                                                                             "sft"}
    sets = [Sized(n, rows, registry[n]) for n, rows in (
        ("pixmo-cap", 700_000), ("pixmo-points", 90_000), ("pixmo-count", 40_000),
        ("tulu-v2-sft-mixture", 10_000))]
    rates = {d.name: r for d, r in mix(sets, "pretrain")}
    assert rates["pixmo-cap"] == pytest.approx(0.6) and rates["tulu-v2-sft-mixture"] == pytest.approx(0.1)
    assert rates["pixmo-points"] == pytest.approx(0.3 * 300 / 500)
    assert rates["pixmo-count"] == pytest.approx(0.3 * 200 / 500)
    without_text = {d.name: r for d, r in mix(sets[:3], "pretrain")}
    assert without_text["pixmo-cap"] == pytest.approx(0.6 / 0.9) and sum(without_text.values()) == pytest.approx(1)
    roots = np.sqrt([100_000, 90_000, 40_000, 10_000])  # pixmo-cap counts as 100,000 rows: its cap
    assert [r for _, r in mix(sets, "sft")] == pytest.approx((roots / roots.sum()).tolist())
    more = dict(registry["pixmo-points"], multiplier="2")
    assert mix([Sized("a", 100, more), Sized("b", 100, {"task": "text"})], "sft")[0][1] == pytest.approx(2 / 3)
    show_mixture(mix(sets, "pretrain"), 1_400_000, ["tgif"])
    table = capsys.readouterr().out
    assert "60.00%" in table and "1.20" in table and "left out: tgif" in table


def test_released_group_rates():
    """With every dataset there, groups get the published shares, and the paper's percentages are met to a few
    points."""
    sets = [Sized(n, int(e["size"] or 100), e) for n, e in read_registry().items()]
    shares = Counter()
    for d, rate in mix(sets, "released"):
        shares[d.entry["sft_group"]] += rate
    for group, share in MIXTURES["released"].items():
        assert shares[group] == pytest.approx(share / 1.1)


def test_draws_follow_the_table(tmp_path, planner):
    """Chi-square over 20 datasets: cost per draw does not depend on their size, and the shares are the
    printed ones."""
    sets = [Dataset(f"set{k}", [write_lines(tmp_path / f"set{k}.jsonl", [TEXT] * (3 * k * k + 1))])
            for k in range(20)]
    stream = Stream(mix(sets, "sft"), planner, 7)
    n, seen = 20_000, Counter()
    for number in range(n):
        seen[stream.draw(number)] += 1
    chi = sum((seen[name] - n * rate) ** 2 / (n * rate) for name, rate in stream.rates.items())
    assert chi < 43.8  # 0.1 % of right tables give more, with 19 degrees of freedom


# ---- one stream --------------------------------------------------------------------------------------------

def batches(stream, n, workers=0, state=None, rank=0, world=1):
    convert = functools.partial(decode_packed, cfg=stream.planner.cfg, seq_len=stream.planner.seq_len)
    return list(itertools.islice(make_loader(RankStream(stream, state, rank, world), workers, workers, convert), n))


def same(a, b):
    (row, crops, pools), state, _ = a
    (row2, crops2, pools2), state2, _ = b
    arrays = zip([*row.values(), *crops, *pools], [*row2.values(), *crops2, *pools2])
    return state == state2 and len(crops) == len(crops2) and all(x.dtype == y.dtype and np.array_equal(x, y)
                                                                 for x, y in arrays)


@pytest.fixture
def many(tmp_path, planner):
    """Pictures, sets of pictures, videos and text in three datasets; more rows than a buffer holds."""
    rng, planner.max_frames, planner.max_crops = random.Random(0), 3, 6
    for k in range(6):
        picture(tmp_path / "media" / f"{k}.png", (40 * k, 90, 200 - 30 * k), (24 + k, 30))
    for k in range(2):
        video(tmp_path / "media" / f"{k}.mp4", n=12 + k)
    caption = lambda task: dict(task=task, answer=" ".join(rng.choice(("red", "green", "tall", "wall"))
                                                           for _ in range(rng.randint(1, 20))))
    name = lambda: f"media/{rng.randrange(6)}.png"
    pictures = [dict(image=name(), annotations=[caption("image_caption") for _ in range(rng.randint(1, 3))])
                for _ in range(60)]
    others = [dict(video=f"media/{rng.randrange(2)}.mp4", annotations=[caption("video_caption")])
              for _ in range(25)]
    others += [dict(images=[name(), name()], annotations=[dict(caption("multi_image_qa"), prompt="Both?")])
               for _ in range(25)]
    texts = [dict(annotations=[dict(caption("text"), prompt="Say.")]) for _ in range(30)] + ["{"]
    sets = [Dataset(n, [write_lines(tmp_path / f"{n}.jsonl", rows)]) for n, rows in
            (("pictures", pictures), ("others", others), ("texts", texts))]
    return lambda: Stream(mix(sets, "sft"), planner, 11)


def test_60_batches_are_bitwise_the_same_for_any_workers_ranks_and_stops(many):
    straight = batches(many(), 60)
    assert any(len(crops) > 2 for (_, crops, _), *_ in straight)
    assert straight[-1][1]["bad"]["texts"]["malformed JSON"] > 0
    for workers in (1, 3):
        again = batches(many(), 60, workers)
        assert len(again) == 60 and all(same(a, b) for a, b in zip(straight, again))
    for stop in random.Random(1).sample(range(2, 57), 4):
        again = batches(many(), 59 - stop, state=json.loads(json.dumps(straight[stop][1])))
        assert all(same(a, b) for a, b in zip(straight[stop + 1:], again))
    for world in (2, 4):
        parts = [batches(many(), 60 // world, rank=rank, world=world) for rank in range(world)]
        assert all(same(straight[i], parts[i % world][i // world]) for i in range(60))


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not tell who sent a signal")
def test_a_worker_is_ended_by_its_parent_alone(many):
    """What is sent to all processes of a run comes to the workers too, while the step still needs them; and a worker
    that could not be ended would keep its parent from ending."""
    others = multiprocessing.active_children()  # of loaders that a test before left to the garbage collector
    rows = make_loader(RankStream(many()), 1, 1)
    next(rows)
    worker, = [p for p in multiprocessing.active_children() if p not in others]
    for name in ("INT", "TERM"):
        subprocess.run(["kill", "-" + name, str(worker.pid)], check=True)
    for _ in range(10):
        next(rows)
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


# ---- everything broken -------------------------------------------------------------------------------------

def test_a_poisoned_corpus_costs_only_itself(tmp_path, planner, monkeypatch):
    folder = tmp_path / "corpus"
    folder.mkdir()
    bad, later, good = poison(folder)
    assert len(bad) + len(later) >= 40
    lines = [line for line, _ in bad] + later + good
    random.Random(0).shuffle(lines)
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    opened, connected = [], []
    real_open, real_av, real_image = open, media.av.open, media.Image.open
    monkeypatch.setattr(media.av, "open",
                        lambda file, *a, **kw: opened.append(str(file)) or real_av(file, *a, **kw))
    monkeypatch.setattr(media.Image, "open",
                        lambda file, *a, **kw: opened.append(str(file)) or real_image(file, *a, **kw))
    monkeypatch.setattr(socket.socket, "connect", lambda *a: connected.append(a))
    planner.max_frames, planner.max_crops, reasons = 4, 16, {line: reason for line, reason in bad}

    # Planned one by one: every bad line is refused for its reason, the others are planned.
    stream, planned = Stream([(Dataset("rows", [str(path)]), 1.0)], planner, 0), {}
    for i, line in enumerate(lines):
        where = f"{path}:{i + 1}"
        raw, at, told = stream.sets["rows"].line(i)
        assert told == where
        try:
            planned[line] = planner.plan(parse_record(raw), at, random.Random(0))[0]
        except Exception as e:  # BadRecord or BadMedia, nothing else
            assert type(e).__name__ in ("BadRecord", "BadMedia"), (line, e)
            assert getattr(e, "reason", "unreadable media") == reasons[line], (line, e)
    assert set(planned) == set(later + good)
    for name in ("passwd", "secret", "zero", "m3u8", "concat", "dash", "session", "pipe", "html", "zip"):
        assert not any(name in o for o in opened), name
    assert not connected and real_open is open

    # Decoded: what breaks only now keeps its tokens and loses its weight; good rows are as they are alone.
    for line in later:
        row, crops, _, failed = decode(planned[line], planner.cfg, 192)
        assert len(failed) == 1 and not row["weights"].any() and not crops[0].any(), line
    for line in good:
        row, crops, _, failed = decode(planned[line], planner.cfg, 192)
        assert not failed and row["weights"].any() and crops[0].any()

    # The stream: counts of whole epochs are exact.
    events = []
    for row, state, more in batches(stream, 40):
        events += more
    epochs = state["seen"] // len(lines)
    assert epochs >= 5
    want = Counter(reason for _, reason in bad)
    for reason, n in want.items():
        assert epochs * n <= state["bad"]["rows"][reason] <= (epochs + 1) * n
    assert state["bad"]["rows"].keys() == want.keys()
    assert {e[1] for e in events} == {f"{path}:{i + 1}" for i, line in enumerate(lines) if line not in good}
    collate([(row[0], *row[1:])])
