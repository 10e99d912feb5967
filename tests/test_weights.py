"""Checkpoints: what is written comes back bit for bit; what is damaged is one line, never a surprise."""
import json
import random

import pytest
import torch
from conftest import tiny_model

import weights
from model import PRESETS, Molmo2
from weights import BadCheckpoint, hub_config, parse_config, read_safetensors, write_safetensors


@pytest.mark.parametrize("style", ["olmo", "qwen"])
def test_save_and_load_is_the_identity(tmp_path, style):
    model = tiny_model(style)
    model.save_pretrained(tmp_path)
    again = Molmo2.from_pretrained(tmp_path)
    assert again.cfg == model.cfg
    for (n, a), (m, b) in zip(model.named_parameters(), again.named_parameters()):
        assert n == m and torch.equal(a, b)


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_comes_back_from_its_config_json(name):
    assert parse_config(json.loads(json.dumps(hub_config(PRESETS[name]))), "config.json") == PRESETS[name]


def test_tensors_of_every_dtype_come_back(tmp_path):
    tensors = {str(d): torch.arange(5).to(d) for d in weights.DTYPES.values()} | {"empty": torch.empty(0, 3),
                                                                                  "scalar": torch.tensor(2.0)}
    write_safetensors(tmp_path / "t.safetensors", tensors)
    back = read_safetensors(str(tmp_path / "t.safetensors"))
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], t) and back[k].dtype == t.dtype
                                                 for k, t in tensors.items())


def test_damaged_files_are_refused(tmp_path):
    path = str(tmp_path / "t.safetensors")
    write_safetensors(path, {"a": torch.ones(4), "b": torch.ones(2, 3)})
    whole = open(path, "rb").read()
    n = int.from_bytes(whole[:8], "little")
    edit = lambda a, b: whole[:8] + whole[8:8 + n].replace(a, b) + whole[8 + n:]
    for broken in (b"", whole[:7], whole[:50], whole[:-1], whole + b"x", b"\xff" * 8 + whole[8:],
                   edit(b'"a"', b'"b"'), edit(b"[0,16]", b"[0,12]"), edit(b"[4]", b"[5]"),
                   edit(b"[16,40]", b"[12,36]"), edit(b"F32", b"F99"), edit(b"[2,3]", b"[2.,"),
                   edit(b"[2,3]", b"[-2,-3]")):
        open(path, "wb").write(broken)
        with pytest.raises(BadCheckpoint, match="t.safetensors"):
            read_safetensors(path)


def test_random_damage_gives_typed_errors_only(tmp_path):
    path, rng = str(tmp_path / "t.safetensors"), random.Random(0)
    write_safetensors(path, {"a": torch.ones(4), "b": torch.ones(2, 3)})
    whole = open(path, "rb").read()
    for _ in range(500):
        broken = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            broken[rng.randrange(int.from_bytes(whole[:8], "little") + 8)] = rng.randrange(256)
        open(path, "wb").write(bytes(broken))
        try:
            read_safetensors(path)
        except BadCheckpoint:
            pass


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    path = str(tmp_path / "model.safetensors")
    good = {k: v.clone() for k, v in read_safetensors(path).items()}
    for change, message in ((lambda t: t.pop("model.transformer.ln_f.weight"), "no tensor for transformer.ln_f.weight"),
                            (lambda t: t.update({"model.extra": torch.ones(1)}), "unknown tensor extra"),
                            (lambda t: t.update({"lm_head.weight": torch.ones(3, 2)}), r"lm_head.weight is \(3, 2\)")):
        t = dict(good)
        change(t)
        write_safetensors(path, t)
        with pytest.raises(BadCheckpoint, match=message):
            Molmo2.from_pretrained(tmp_path)


def test_a_config_that_is_none_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.load(open(tmp_path / "config.json"))
    for broken, message in (("{", "not readable as JSON"), ("[]", "must hold a JSON object"),
                            ("{}", "key missing"),
                            (json.dumps(config | dict(image_patch_id=7)),
                             "image_patch_id is 7, expected 1026")):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(BadCheckpoint, match=message):
            Molmo2.from_pretrained(tmp_path)
    with pytest.raises(BadCheckpoint, match="no such file"):
        Molmo2.from_pretrained(tmp_path / "nowhere")
