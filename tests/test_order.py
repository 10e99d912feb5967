"""Which examples come when and what becomes of them: goldens, the number of the order, every split of the stream
over ranks and workers, and rows that cannot be used."""
import json

import pytest
from goldens import CASES, RECORDS, VARIANTS, draw_media, make_stream, of_record, order, packed, read


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
