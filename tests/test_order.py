"""Which examples come when and what becomes of them: goldens, the number of the order, every split of the stream
over ranks and workers, and rows that cannot be used."""
import json
import random
from types import SimpleNamespace

import pytest
from conftest import write_lines
from goldens import (CASES, NUMBER, RECORDS, VARIANTS, dense, draw_media, make_planner, make_stream, of_record,
                     order, packed, read)

from data import Dataset, ORDER, POINT_OUTSIDE, Packer, Planner, Stream
from lib.distributed import check_same_data
from lib.errors import UserError


# what else these tests use of the product, named here alone


# ---- goldens -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("media"))
    draw_media(folder)
    return folder


@pytest.fixture(scope="module")
def published():
    return read("records")


@pytest.mark.parametrize("variant, name", CASES, ids=[f"{v}-{n}" for v, n in CASES])
def test_what_the_model_reads_of_a_record_is_what_it_always_was(variant, name, media, published, monkeypatch):
    # the goldens are older than the rule that a point is learned at the time of a frame (test_data has that)
    monkeypatch.setattr(Planner, "points_on_frames", lambda self, branch, *_: branch)
    now, was = of_record(variant, name, media), published[variant][name]
    if "left out" in now:
        now["left out"] = [reason for reason in now["left out"] if reason != POINT_OUTSIDE]  # was not counted then
    assert now.keys() == was.keys()
    for key in was:
        assert json.loads(json.dumps(now[key])) == was[key], key


def test_every_golden_record_is_looked_at(published):
    assert [(v, n) for v in published for n in published[v]] == CASES
    assert {v for v, _ in CASES} == set(VARIANTS) and {n for _, n in CASES} == set(RECORDS)


@pytest.fixture(scope="module")
def orders(tmp_path_factory):
    now = json.loads(json.dumps(order(str(tmp_path_factory.mktemp("order")))))
    return now, read("order")


@pytest.mark.parametrize("what", ["draws", "shuffled", "shuffled_large", "packed", "next_packed", "state"])
def test_an_old_run_resumes_onto_the_data_it_would_have_seen(orders, what):
    now, was = orders
    assert now[what] == was[what]


def test_the_state_of_an_old_checkpoint_is_continued(orders, tmp_path):
    _, was = orders
    stream = make_stream(str(tmp_path), seq_len=120)
    assert json.loads(json.dumps(packed(stream, 20, was["state"])[0])) == was["next_packed"]


def test_examples_are_packed_together_as_they_always_were(tmp_path):
    assert json.loads(json.dumps(dense(str(tmp_path)))) == read("dense")


# ---- the number of the order -------------------------------------------------------------------------------

@pytest.fixture
def fingerprint(tmp_path):
    return make_stream(str(tmp_path)).fingerprint()


def test_a_checkpoint_from_before_the_order_had_a_number_still_resumes(fingerprint):
    was = read("order")["fingerprint"]
    assert NUMBER not in was and fingerprint == {**was, NUMBER: 1} and ORDER == 1
    check_same_data(was, fingerprint)
    check_same_data(fingerprint, fingerprint)


def test_a_run_of_another_order_is_refused_and_not_continued_on_other_data(fingerprint):
    with pytest.raises(UserError) as e:
        check_same_data({**fingerprint, NUMBER: 2}, fingerprint)
    assert str(e.value) == "--resume: version of the order is 1 now, but was 2 when the run was started"
    with pytest.raises(UserError) as e:  # a later change of the order: runs that do not say are of the first
        check_same_data(read("order")["fingerprint"], {**fingerprint, NUMBER: 2})
    assert str(e.value) == "--resume: version of the order is 2 now, but was 1 when the run was started"


@pytest.mark.parametrize("key", read("order")["fingerprint"])
def test_a_run_of_other_data_is_refused(fingerprint, key):
    """Whatever of the fingerprint differs, is new or is gone: one line that names it."""
    for other in ({**fingerprint, key: "other"}, {k: v for k, v in fingerprint.items() if k != key}):
        for pair in ((other, fingerprint), (fingerprint, other)):
            with pytest.raises(UserError) as e:
                check_same_data(*pair)
            assert str(e.value).startswith(f"--resume: {key} is ") and "\n" not in str(e.value)


def test_everything_the_order_depends_on_is_in_the_fingerprint(tmp_path):
    base = make_stream(str(tmp_path)).fingerprint()
    changed = set()
    for setting, value in dict(seq_len=421, tiles=5, max_frames=1, max_crops=13, token_weights="released").items():
        stream = make_stream(str(tmp_path))
        setattr(stream.planner, setting, value)
        changed |= {k for k, v in stream.fingerprint().items() if v != base[k]}
    changed |= {k for k, v in make_stream(str(tmp_path), seed=6).fingerprint().items() if v != base[k]}
    stream = make_stream(str(tmp_path))
    stream.planner.cfg.point_format = "released"
    changed |= {k for k, v in stream.fingerprint().items() if v != base[k]}
    with open(tmp_path / "b.jsonl", "r+b") as f:  # in place, of equal length, in the last of a set's files
        f.seek(-20, 2)
        f.write(b"X")
    changed |= {k for k, v in make_stream(str(tmp_path), write=False).fingerprint().items() if v != base[k]}
    assert changed == set(base) - {NUMBER, "dataset images"}


# ---- packing -----------------------------------------------------------------------------------------------

def leave_slowly(waiting, seq_len, max_crops, beam=64):
    """Packer.emit in plain Python: the numbers of the items that leave. Of equally full sets the last found stay."""
    share = lambda i: waiting[i].n_tokens / seq_len + waiting[i].n_crops / max_crops
    largest_first, best = sorted(range(1, len(waiting)), key=lambda i: -share(i)), (0.0, [])
    sets = [(0.0, [])]  # (fullness, places in largest_first)
    while sets:
        found = []
        for full, chosen in sets:
            items = [waiting[0], *(waiting[largest_first[k]] for k in chosen)]
            tokens, crops = sum(i.n_tokens for i in items), sum(i.n_crops for i in items)
            for k in range(chosen[-1] + 1 if chosen else 0, len(largest_first)):
                item = waiting[largest_first[k]]
                if tokens + item.n_tokens <= seq_len and crops + item.n_crops <= max_crops:
                    found.append((full + share(largest_first[k]), [*chosen, k]))
        sets = sorted(found, key=lambda s: s[0])[-beam:] if len(found) > beam else found
        for fullness, chosen in sets:
            if fullness > best[0]:
                best = fullness, chosen
    return [0, *sorted(largest_first[k] for k in best[1])]


@pytest.mark.parametrize("seq_len, max_crops, tokens, crops, unit", [
    (256, 12, (10, 90), (0, 1), 1), (256, 12, (10, 150), (1, 6), 1), (240, 8, (1, 5), (0, 2), 24),
    (4096, 32, (100, 900), (1, 4), 4), (192, 6, (5, 40), (0, 0), 4)])
def test_ranks_on_other_processors_pack_the_same_sequences(seq_len, max_crops, tokens, crops, unit):
    """Many sets are equally full; which of them are kept must not hang on how a processor sorts."""
    rng, packer, made, mirror = random.Random(seq_len), Packer(seq_len, max_crops), 0, []
    for k in range(110):
        item = SimpleNamespace(n_tokens=unit * rng.randint(*tokens), n_crops=rng.randint(*crops), k=k)
        mirror.append(item)
        for left in packer.add(item):
            expected = [mirror[i] for i in leave_slowly(mirror, seq_len, max_crops)]
            assert [i.k for i in left] == [i.k for i in expected]
            mirror = [i for i in mirror if i not in expected]
            made += 1
    assert made > 10


# ---- what cannot be used -----------------------------------------------------------------------------------

WIDE = dict(images=["0.png", "1.png", "2.png"], annotations=[dict(task="multi_image_qa", prompt="?", answer="a")])
LONG = dict(annotations=[dict(task="text", prompt="?", answer="word " * 60)])
FINE = dict(annotations=[dict(task="text", prompt="?", answer="a")])


def stream_over(folder, lines, max_crops=2):
    """A stream of low-resolution images that fails the test where it would plan for ever."""
    draw_media(folder)
    planner, left = make_planner(100, tiles=0, max_frames=0, max_crops=max_crops), iter(range(3000))
    plan = planner.plan

    def counted(*args):
        assert next(left, None) is not None, "3,000 rows were planned, and no sequence came"
        return plan(*args)
    planner.plan = counted
    return Stream([(Dataset("set", [write_lines(folder + "/set.jsonl", lines)]), 1.0)], planner, 0)


@pytest.mark.parametrize("lines, why", [
    ([WIDE], "too many crops for a sequence"), ([LONG], "annotation too long"), ([WIDE, "{", LONG], ""),
    (["{"], "malformed JSON"), ([dict(FINE, provenance=[dict(closed=True)])], "from a closed model"),
    ([dict(video="a.mp4", annotations=[dict(task="video_caption", answer="a")])], "no reader for video")],
    ids=["crops", "length", "all kinds", "malformed", "closed", "video"])
def test_a_file_of_unusable_rows_is_named_and_does_not_spin_for_ever(tmp_path, lines, why):
    stream = stream_over(str(tmp_path), lines)
    with pytest.raises(ValueError, match=f"not one of 200 records in a row can be used, the last of .*{why}") as e:
        next(stream.sequences())
    assert "\n" not in str(e.value)


def test_examples_that_fit_no_sequence_are_counted_and_the_others_come(tmp_path):
    half = dict(annotations=FINE["annotations"] + LONG["annotations"])
    rows = stream_over(str(tmp_path), [WIDE, FINE, LONG, half]).sequences()
    for plans, state, _ in (next(rows) for _ in range(40)):
        assert plans and all(p.n_crops <= 2 and p.n_tokens <= 100 and p.where[-1] in "24" for p in plans)
    epochs = state["seen"] / 4
    assert epochs > 20 and state["bad"] == {} and set(state["skipped"]) == {"set"}
    skipped = state["skipped"]["set"]
    assert set(skipped) == {"too many crops for a sequence", "annotation too long"}
    assert abs(skipped["too many crops for a sequence"] - epochs) < 1
    assert abs(skipped["annotation too long"] - 2 * epochs) < 2


def test_a_resumed_run_counts_nothing_twice(tmp_path):
    """Stopped between the parts of a tree, which is planned again."""
    many = dict(annotations=[dict(task="text", prompt="?", answer="word " * 15)] * 12 + LONG["annotations"])
    lines = [many, WIDE, "{"]
    rows = stream_over(str(tmp_path), lines).sequences()
    straight = [next(rows) for _ in range(20)]
    assert {s["part"] for _, s, _ in straight} > {1, 2}
    for stop in (0, 1, 5, 18):
        again = stream_over(str(tmp_path), lines).sequences(json.loads(json.dumps(straight[stop][1])))
        for plans, state, _ in straight[stop + 1:]:
            plans2, state2, _ = next(again)
            assert [p.ref for p in plans2] == [p.ref for p in plans] and state2 == state
