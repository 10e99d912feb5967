"""Which examples come when and what becomes of them: goldens, the number of the order, every split of the stream
over ranks and workers, and rows that cannot be used."""
import json
import random
from types import SimpleNamespace

import pytest
from goldens import CASES, RECORDS, VARIANTS, dense, draw_media, make_stream, of_record, order, packed, read

# what else these tests use of the product, named here alone
from data import Packer


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
def test_what_the_model_reads_of_a_record_is_what_it_always_was(variant, name, media, published):
    now, was = of_record(variant, name, media), published[variant][name]
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


# ---- packing -----------------------------------------------------------------------------------------------

def leave_slowly(waiting, seq_len, max_crops, beam=64):
    """Packer.emit in plain Python: the numbers of the items that leave. Of equally full sets those found last stay."""
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
