"""Checkpoints: what is written comes back bit for bit; what is damaged is one line, never a surprise."""
import dataclasses
import json
import os
import random
import re
import shutil
import tracemalloc

import pytest
import torch
from conftest import picture, tiny_model, write_lines

import pretrain
from lib import weights
from lib.errors import BadCheckpoint
from lib.text import SMALL_TOKENIZER
from lib.weights import (hub_config, parse_config, pick_device, processor_configs, read_safetensors,
                         write_safetensors)
from model import ModelConfig, Molmo2, PRESETS


@pytest.mark.parametrize("style", ["olmo", "qwen"])
def test_save_and_load_is_the_identity(tmp_path, style):
    model = tiny_model(style)
    model.save_pretrained(tmp_path)
    again = Molmo2.from_pretrained(tmp_path)
    assert again.cfg == model.cfg
    for (n, a), (m, b) in zip(model.named_parameters(), again.named_parameters()):
        assert n == m and torch.equal(a, b)


def test_a_loaded_model_does_not_change_with_its_file(tmp_path):
    """What is read is a copy: a file that is overwritten while one trains or asks costs nothing."""
    tiny_model().save_pretrained(tmp_path)
    model, path = Molmo2.from_pretrained(tmp_path), tmp_path / "model.safetensors"
    with open(path, "r+b") as f:
        f.write(bytes(path.stat().st_size))
    assert equal(model, tiny_model())


def test_weights_are_loaded_in_the_type_asked_for(tmp_path):
    """Each is its fp32 value, rounded, also those that the file has in parts, and whatever the file's own type."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = Molmo2.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters()):
        assert b.dtype == torch.bfloat16 and torch.equal(a.bfloat16(), b), name
    loaded.save_pretrained(tmp_path)  # in bf16
    again = Molmo2.from_pretrained(tmp_path)
    assert all(b.dtype == torch.float32 and torch.equal(a.float(), b)
               for a, b in zip(loaded.parameters(), again.parameters()))
    tensors = [torch.randn(7, 3, 2), torch.randn(5, 3, 2).double(), torch.empty(0, 3, 2)]
    for most in (1, 6, 20, 1000):  # numbers at a time
        assert torch.equal(weights.copy_of(tensors, torch.float16, most), torch.cat(tensors).half())


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's count of a process's memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_keeps_no_page_of_the_file(tmp_path, dtype):
    """What is mapped counts as the process's memory: an 8B model would take twice as much as it has."""
    def mapped():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("RssFile")) / 1024  # MB

    cfg = dataclasses.replace(tiny_model().cfg, vocab=1 << 18)  # two tables of 32 MB in fp32
    Molmo2(cfg).save_pretrained(tmp_path)
    before = mapped()
    model = Molmo2.from_pretrained(tmp_path, dtype=dtype)
    assert model.lm_head.weight.numel() == 1 << 23 and mapped() - before < 16


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


# ---- the file itself ---------------------------------------------------------------------------------------

def raw(path, header, data=b"", length=None):
    """A safetensors file by hand: header (an object or bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return str(path)


def entry(dtype="F32", shape=(2,), at=(0, 8)):
    return dict(dtype=dtype, shape=list(shape), data_offsets=list(at))


# name -> bytes on disk and the numbers they are
BYTES = {"F64": ("000000000000f83f 00000000000000c0", [1.5, -2.0]), "F32": ("0000c03f 000000c0", [1.5, -2.0]),
         "F16": ("003e 00c0", [1.5, -2.0]), "BF16": ("c03f 00c0", [1.5, -2.0]),
         "I64": ("0100000000000000 feffffffffffffff", [1, -2]), "I32": ("01000000 feffffff", [1, -2]),
         "I16": ("0100 feff", [1, -2]), "I8": ("01 fe", [1, -2]), "U8": ("01 fe", [1, 254]),
         "BOOL": ("01 00", [True, False])}


@pytest.mark.parametrize("dtype", BYTES)
def test_numbers_are_those_the_format_says(tmp_path, dtype):
    """Bytes written by hand, aligned and not; and what is written is those bytes."""
    data, want = bytes.fromhex(BYTES[dtype][0]), BYTES[dtype][1]
    for pad in (0, 1, 3):
        header = {"__metadata__": {"format": "pt"}, "z": entry(dtype, (2, 1), (pad, pad + len(data))),
                  "a": entry("U8", (pad,), (0, pad))}
        path = raw(tmp_path / "t.safetensors", json.dumps(header).encode() + b" " * pad, bytes(pad) + data)
        read = read_safetensors(path)
        assert read.keys() == {"a", "z"} and read["z"].tolist() == [[want[0]], [want[1]]]
    write_safetensors(tmp_path / "w.safetensors", {"b": read["z"], "a": read["a"], "t": read["z"].T.clone().T})
    whole = (tmp_path / "w.safetensors").read_bytes()
    n = int.from_bytes(whole[:8], "little")
    assert n % 8 == 0 and whole[8 + n:] == data + bytes(3) + data
    assert json.loads(whole[8:8 + n]) == {
        "b": entry(dtype, (2, 1), (0, len(data))), "a": entry("U8", (3,), (len(data), len(data) + 3)),
        "t": entry(dtype, (2, 1), (len(data) + 3, 2 * len(data) + 3))}


def test_a_matrix_that_is_not_contiguous_is_written_as_it_reads(tmp_path):
    t = torch.arange(6).view(2, 3).T
    write_safetensors(tmp_path / "t.safetensors", {"t": t})
    assert read_safetensors(str(tmp_path / "t.safetensors"))["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


TWO = dict(a=entry(at=(0, 8)), b=entry(at=(8, 16)))
UNSOUND = {"overlap": TWO | dict(b=entry(at=(4, 12))), "the same bytes twice": TWO | dict(b=entry(at=(0, 8))),
           "a gap": TWO | dict(b=entry(at=(12, 20))), "a gap at the start": dict(a=entry(at=(4, 12))),
           "past the end": TWO | dict(b=entry(shape=(5,), at=(8, 28))), 
           "short of the end": dict(a=entry(shape=(1,), at=(0, 4))),
           "the wrong way round": TWO | dict(b=entry(at=(16, 8))),
           "before the start": TWO | dict(b=entry(at=(-8, 0))),
           "too few bytes": TWO | dict(b=entry(shape=(3,), at=(8, 16))),
           "too many bytes": TWO | dict(b=entry(shape=(1,), at=(8, 16))),
           "a shape below nothing": TWO | dict(b=entry(shape=(-1, -2), at=(8, 16))),
           "a shape of halves": TWO | dict(b=entry(shape=(0.5, 4), at=(8, 16))),
           "a shape of truth": TWO | dict(b=entry(shape=(True, 2), at=(8, 16))),
           "a shape of text": TWO | dict(b=dict(entry(at=(8, 16)), shape="2")),
           "no shape": TWO | dict(b=dict(dtype="F32", data_offsets=[8, 16])),
           "a huge shape": TWO | dict(b=entry(shape=(2 ** 40, 2 ** 40), at=(8, 16))),
           "offsets in text": TWO | dict(b=dict(entry(), data_offsets=["8", "16"])),
           "offsets as fractions": TWO | dict(b=entry(at=(8.0, 16.0))), "one offset": TWO | dict(b=entry(at=(8,))),
           "three offsets": TWO | dict(b=entry(at=(8, 16, 24))),
           "no offsets": TWO | dict(b=dict(dtype="F32", shape=[2])),
           "offsets beyond numbers": TWO | dict(b=entry(at=(8, 2 ** 70))),
           "an unknown dtype": TWO | dict(b=entry("F8_E4M3", (8,), (8, 16))),
           "a dtype in small letters": TWO | dict(b=entry("f32", at=(8, 16))),
           "torch's name of a dtype": TWO | dict(b=entry("torch.float32", at=(8, 16))),
           "no dtype": TWO | dict(b=dict(shape=[2], data_offsets=[8, 16])),
           "a dtype in a list": TWO | dict(b=dict(entry(at=(8, 16)), dtype=["F32"])),
           "a dtype of another size": TWO | dict(b=entry("F16", at=(8, 16))),
           "a number for a tensor": TWO | dict(b=5), "nothing for a tensor": TWO | dict(b=None), "a list": [TWO],
           "twice the same name": b'{"a": %s, "a": %s}' % ((json.dumps(entry(shape=(4,), at=(0, 16))).encode(),) * 2),
           "twice the same key": b'{"a": {"dtype": "F64", "dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
           "not UTF-8": b'{"\xff": 1}', "no JSON": b"{", "nested without end": b"[" * 100_000}


@pytest.mark.parametrize("how", UNSOUND)
def test_an_unsound_tensor_file_is_refused_by_name(tmp_path, how):
    path = raw(tmp_path / "t.safetensors", TWO, bytes(16))
    assert read_safetensors(path)["b"].tolist() == [0, 0]
    for size in (16, 8, 12, 20, 24):  # also where the last tensor ends with the file
        with pytest.raises(BadCheckpoint, match=r"t\.safetensors") as e:
            read_safetensors(raw(path, UNSOUND[how], bytes(size)))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("length", [10 ** 10, 2 ** 63, 2 ** 64 - 1, 10 ** 6])
def test_a_header_that_claims_gigabytes_is_refused_without_room_for_it(tmp_path, length):
    path = raw(tmp_path / "t.safetensors", TWO, bytes(16), length)
    tracemalloc.start()
    with pytest.raises(BadCheckpoint, match=f"header of {length} bytes"):
        read_safetensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_a_header_longer_than_the_formats_own_limit_is_not_read(tmp_path, monkeypatch):
    """A file may well be as large as it says, of holes."""
    path = raw(tmp_path / "t.safetensors", b"", b"", 100_000_001)
    os.truncate(path, 100_000_100)
    with pytest.raises(BadCheckpoint, match="header of 100000001 bytes"):
        read_safetensors(path)
    monkeypatch.setattr(weights, "MAX_HEADER", 200)
    text = json.dumps(TWO).encode()
    assert read_safetensors(raw(path, text + b" " * (200 - len(text)), bytes(16)))["a"].tolist() == [0, 0]
    with pytest.raises(BadCheckpoint, match="header of 201 bytes"):
        read_safetensors(raw(path, text + b" " * (201 - len(text)), bytes(16)))


# ---- several files -----------------------------------------------------------------------------------------

def sharded(folder, model, n=3):
    """A checkpoint in n files with an index."""
    model.save_pretrained(folder)
    tensors = list(read_safetensors(str(folder / "model.safetensors")).items())
    files = {f"model-{i}.safetensors": dict(tensors[i::n]) for i in range(n)}
    for name, part in files.items():
        write_safetensors(folder / name, {k: t.clone() for k, t in part.items()})
    del tensors
    os.remove(folder / "model.safetensors")
    weights.write_json(folder / "model.safetensors.index.json",
                       {"metadata": {}, "weight_map": {k: name for name, part in files.items() for k in part}})
    return str(folder)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


ELSEWHERE = ["../other/model-1.safetensors", "../other/../here/model-1.safetensors", "sub/model-1.safetensors",
             "./model-1.safetensors", "sub/../model-1.safetensors", "ABSOLUTE", "..", ".", "", "sub", None, 5, True,
             ["model-1.safetensors"], {}, "file:model-1.safetensors", "model-1.safetensors\0", "missing.safetensors"]


@pytest.mark.parametrize("name", ELSEWHERE, ids=range(len(ELSEWHERE)))
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    """The file is there, and sound: it must not be read."""
    here = sharded(tmp_path / "here", tiny_model())
    shutil.copytree(here, tmp_path / "other")
    shutil.copytree(here, tmp_path / "here" / "sub")
    assert equal(Molmo2.from_pretrained(here), tiny_model())
    index = tmp_path / "here" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    name = str(tmp_path / "other" / "model-1.safetensors") if name == "ABSOLUTE" else name
    listed["weight_map"] = {k: name if f == "model-1.safetensors" else f for k, f in listed["weight_map"].items()}
    index.write_text(json.dumps(listed))
    os.remove(tmp_path / "here" / "model-1.safetensors")
    with pytest.raises(BadCheckpoint, match="here"):
        Molmo2.from_pretrained(here)


@pytest.mark.parametrize("text, message", [
    ("{}", "weight_map"), ('{"weight_map": []}', "weight_map"), ('{"weight_map": {}}', "no tensor for"),
    ("[]", "object"),
    ('{"weight_map": {"a": "model-0.safetensors", "a": "model-1.safetensors"}}', "twice"), ("", "JSON"),
    ('{"weight_map": {"a": "model-0.safetensors"}, "weight_map": {}}', "twice")])
def test_an_index_that_is_none_is_refused_by_name(tmp_path, text, message):
    here = sharded(tmp_path / "here", tiny_model())
    (tmp_path / "here" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadCheckpoint, match=f"here.*{message}"):
        Molmo2.from_pretrained(here)


def test_a_folder_of_links_as_the_hubs_cache_has_them_loads(tmp_path):
    here = sharded(tmp_path / "blobs", tiny_model())
    os.mkdir(tmp_path / "snapshot")
    for name in os.listdir(here):
        os.symlink(os.path.join("..", "blobs", name), tmp_path / "snapshot" / name)
    assert equal(Molmo2.from_pretrained(tmp_path / "snapshot"), tiny_model())


def test_a_tensor_told_twice_is_refused_by_name(tmp_path):
    """In two files; under two of its names in one; whole and in part."""
    here, name = sharded(tmp_path / "here", tiny_model()), "model.transformer.ln_f.weight"
    path = str(tmp_path / "here" / "model-1.safetensors")
    good = {k: t.clone() for k, t in read_safetensors(path).items()}
    for twice in ("model.transformer.ln_f.weight", "transformer.ln_f.weight", "model.norm.weight", "norm.weight",
                  "model.language_model.norm.weight"):
        for file, part in (("model-1.safetensors", good), ("model-3.safetensors", {})):
            write_safetensors(tmp_path / "here" / file, part | {name: torch.ones(32), twice: torch.ones(32)})
        index = json.loads((tmp_path / "here" / "model.safetensors.index.json").read_text())
        index["weight_map"]["x"] = "model-3.safetensors"
        weights.write_json(tmp_path / "here" / "model.safetensors.index.json", index)
        with pytest.raises(BadCheckpoint, match=r"model-\d\.safetensors.*norm.weight|ln_f.weight.*twice"):
            Molmo2.from_pretrained(here)


def test_a_key_told_twice_in_a_config_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    for key in ('"num_hidden_layers": ', '"model_type": '):
        (tmp_path / "config.json").write_text(text.replace(key, f"{key}2, {key}", 1))
        with pytest.raises(BadCheckpoint, match=r"config\.json.*twice"):
            Molmo2.from_pretrained(tmp_path)


@pytest.mark.parametrize("style", ["olmo", "qwen"])
def test_every_tensor_that_is_missing_odd_or_too_much_is_named_and_nothing_is_changed(style):
    """One after the other; nothing is ever left unfilled or cut to fit."""
    model, good = tiny_model(style), {k: p.detach().clone() for k, p in tiny_model(style, 1).named_parameters()}
    for name, t in good.items():
        # where the two tables part is not trusted, so the other one may be named
        ours = r"transformer\.wte\." if "wte." in name else re.escape(name)
        odd = [torch.cat([t, t[:1]]), t[:-1], t[None], torch.tensor(1.0)]
        odd += [torch.cat([t, t[:, :1]], 1), t[:, 1:]] if t.ndim > 1 else []
        cases = [(f"(no tensor for )?{ours}", {k: v for k, v in good.items() if k != name}),
                 (f"unknown tensor {ours}.*x", good | {name + "x": t})]
        for message, tensors in cases + [(f"{ours}.* is .*, the model needs", good | {name: o}) for o in odd]:
            with pytest.raises(BadCheckpoint, match=f"here: {message}"):
                weights.fill(model, {k: {0: v} for k, v in tensors.items()}, "here")
    assert equal(model, tiny_model(style))
    with pytest.raises(BadCheckpoint, match="and 2 more; unknown tensor x"):
        some = dict(list(good.items())[6:]) | {"x": torch.ones(1)}
        weights.fill(model, {k: {0: v} for k, v in some.items()}, "here")
    weights.fill(model, {k: {0: v} for k, v in good.items()}, "here")
    assert equal(model, tiny_model(style, 1))


def test_a_part_of_a_fused_matrix_that_is_missing_or_odd_is_named(tmp_path):
    """Queries, keys and values are three tensors in a plain language model, and one here."""
    model = tiny_model("qwen")
    good = {k: {0: p.detach().clone()} for k, p in model.named_parameters()}
    name = "transformer.blocks.1.self_attn.att_proj.weight"
    whole = model.transformer.blocks[1].self_attn.att_proj.weight
    q, k, v = whole.detach().split([32, 16, 16])
    for parts in ({0: q, 2: v}, {0: q, 1: k}, {1: k, 2: v}, {0: q, 1: k[:-1], 2: v}, {0: q, 1: k[:, :-1], 2: v},
                  {0: q, 1: torch.tensor(1.0), 2: v}, {0: q, 1: k[0], 2: v}, {0: q, 1: k, 2: v, 3: v}):
        with pytest.raises(BadCheckpoint, match=f"{re.escape(name)} is .*, the model needs"):
            weights.fill(model, good | {name: parts}, "here")
    weights.fill(model, dict(good) | {name: {2: v, 0: q, 1: k}}, "here")
    assert torch.equal(model.transformer.blocks[1].self_attn.att_proj.weight, whole)


# ---- published language models and a SigLIP ----------------------------------------------------------------

def write_part(folder, config, tensors):
    os.makedirs(folder)
    weights.write_json(os.path.join(folder, "config.json"), config)
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors)
    return str(folder)


def drawn(shapes, seed):
    rng = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=rng) * 0.1).bfloat16() for name, shape in shapes.items()}


def language_model(folder, kind="qwen3", layers=2, **config):
    """A tiny one as published, with the small tokenizer: qwen3 with a tied head, or olmo2, olmo3."""
    qwen = kind == "qwen3"
    shapes = {"model.embed_tokens.weight": (1024, 32), "model.norm.weight": (32,)}
    shapes |= {} if qwen else {"lm_head.weight": (1024, 32)}
    norms = ("input_layernorm", "post_attention_layernorm") if qwen else (
        "post_attention_layernorm", "post_feedforward_layernorm")
    for i in range(layers):
        for name, shape in dict({f"self_attn.{n}_proj": (rows, 32) for n, rows in zip("qkv", (32, 16, 16))} | {
                "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32),
                "mlp.down_proj": (32, 48), "self_attn.q_norm": (8 if qwen else 32,),
                "self_attn.k_norm": (8 if qwen else 16,)}, **{n: (32,) for n in norms}).items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    settings = dict(model_type=kind, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
                    num_key_value_heads=2, intermediate_size=48, vocab_size=1024, max_position_embeddings=512,
                    rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=None, hidden_act="silu", attention_bias=False,
                    tie_word_embeddings=qwen, torch_dtype="bfloat16", bos_token_id=0, attention_dropout=0.0)
    settings |= dict(head_dim=8, sliding_window=None, use_sliding_window=False, max_window_layers=28) if qwen else {}
    tensors = drawn(shapes, 1)
    shutil.copy(SMALL_TOKENIZER, os.path.join(write_part(folder, settings | config, tensors), "tokenizer.json"))
    return str(folder), tensors


def vision_model(folder, blocks):
    """A tiny SigLIP as published: two towers, a pooling head, pictures of 44 pixels in patches of 6, and in its
    config only what is not the class's default."""
    shapes = {"logit_scale": (1,), "logit_bias": (1,), "text_model.embeddings.token_embedding.weight": (9, 8),
              "text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8), "text_model.head.weight": (8, 8),
              "vision_model.post_layernorm.weight": (16,), "vision_model.post_layernorm.bias": (16,),
              "vision_model.head.probe": (1, 1, 16), "vision_model.head.mlp.fc1.weight": (24, 16),
              "vision_model.embeddings.patch_embedding.weight": (16, 3, 6, 6),
              "vision_model.embeddings.patch_embedding.bias": (16,),
              "vision_model.embeddings.position_embedding.weight": (49, 16)}
    for i in range(blocks):
        for name, shape in {"layer_norm1": (16,), "layer_norm2": (16,), "self_attn.q_proj": (16, 16),
                            "self_attn.k_proj": (16, 16), "self_attn.v_proj": (16, 16),
                            "self_attn.out_proj": (16, 16),
                            "mlp.fc1": (24, 16), "mlp.fc2": (16, 24)}.items():
            shapes[f"vision_model.encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"vision_model.encoder.layers.{i}.{name}.bias"] = shape[:1]
    config = dict(model_type="siglip", text_config=dict(model_type="siglip_text_model"), vision_config=dict(
        hidden_size=16, image_size=44, intermediate_size=24, model_type="siglip_vision_model",
        num_attention_heads=2, num_hidden_layers=blocks, patch_size=6))
    tensors = drawn(shapes, 2)
    return write_part(folder, config, tensors), tensors


TINY = dict(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48, vocab=1024, rope_theta=1e6, crop=42, patch=6,
            vit_width=16, vit_heads=2, vit_head_dim=8, vit_mlp=24, max_positions=512)


@pytest.mark.parametrize("blocks, kept", [(27, (24, 18)), (26, (25, 13)), (28, (27, 14)), (4, (3, 2)), (1, (0, 0))])
def test_of_a_siglip_the_blocks_that_molmo_hands_on_are_kept(tmp_path, blocks, kept):
    """Of the published 27 the last two are not needed; each that is kept is where it was."""
    vision, theirs = vision_model(tmp_path / "vision", blocks)
    model = Molmo2.from_pretrained(language_model(tmp_path / "text")[0], vision)
    assert model.cfg == ModelConfig(**TINY, norm_after=False, qk_norm="head", tie=True, vit_features=kept)
    vit = model.vision_backbone.image_vit
    assert len(vit.transformer["resblocks"]) == max(kept) + 1
    for i, block in enumerate(vit.transformer["resblocks"]):
        for ours, name in ((block.attention.wq, "self_attn.q_proj"), (block.attention.wk, "self_attn.k_proj"),
                           (block.attention.wv, "self_attn.v_proj"), (block.attention.wo, "self_attn.out_proj"),
                           (block.feed_forward.w1, "mlp.fc1"), (block.feed_forward.w2, "mlp.fc2"),
                           (block.attention_norm, "layer_norm1"), (block.ffn_norm, "layer_norm2")):
            for kind in ("weight", "bias"):
                want = theirs[f"vision_model.encoder.layers.{i}.{name}.{kind}"]
                assert torch.equal(getattr(ours, kind), want.float()), (i, name, kind)
    patches = theirs["vision_model.embeddings.patch_embedding.weight"].float()
    assert vit.patch_embedding.weight[5, (2 * 6 + 4) * 3 + 1] == patches[5, 1, 2, 4]  # row, column, channel
    assert torch.equal(vit.positional_embedding, theirs["vision_model.embeddings.position_embedding.weight"].float())


def test_what_published_weights_do_not_have_is_drawn_and_the_rest_is_theirs(tmp_path):
    vision = vision_model(tmp_path / "vision", 4)[0]
    text, theirs = language_model(tmp_path / "text")
    torch.manual_seed(0)
    model = Molmo2.from_pretrained(text, vision)
    new = {n: p for n, p in model.named_parameters()
           if n.endswith("new_embedding") or "image_pooling" in n or "projector" in n}
    assert len(new) > 8
    for name, p in new.items():
        if p.ndim == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            want = 0.02 if "wte" in name else p.shape[1] ** -0.5
            assert abs(p.std() / want - 1) < 0.25 and abs(p.mean()) < want / 4, name
    table, block = model.transformer.wte, model.transformer.blocks[1]
    assert tuple(table.new_embedding.shape) == (128, 32)
    assert torch.equal(table.embedding, theirs["model.embed_tokens.weight"].float())
    part = lambda name: theirs[f"model.layers.1.{name}.weight"].float()
    assert torch.equal(block.self_attn.att_proj.weight,
                       torch.cat([part("self_attn.q_proj"), part("self_attn.k_proj"), part("self_attn.v_proj")]))
    assert torch.equal(block.mlp.ff_proj.weight, torch.cat([part("mlp.up_proj"), part("mlp.gate_proj")]))
    assert torch.equal(block.attn_norm.weight, part("input_layernorm"))
    assert torch.equal(block.ff_norm.weight, part("post_attention_layernorm"))
    torch.manual_seed(0)
    assert equal(model, Molmo2.from_pretrained(text, vision))


@torch.no_grad()
def test_a_tied_head_is_the_embedding_also_after_a_step_and_a_save(tmp_path):
    """Qwen3 up to 4B has no head of its own in the file: it must be filled, and stay one with the table."""
    text, theirs = language_model(tmp_path / "text")
    vision = vision_model(tmp_path / "vision", 2)[0]
    assert "lm_head.weight" not in theirs
    torch.manual_seed(0)
    model = Molmo2.from_pretrained(text, vision)
    head, table = model.lm_head, model.transformer.wte
    assert model.cfg.tie and head.weight is table.embedding and not any(p.is_meta for p in model.parameters())
    # the same with a head of its own, that holds the same numbers, answers the same
    apart, own = language_model(tmp_path / "apart", tie_word_embeddings=False)
    own["lm_head.weight"] = own["model.embed_tokens.weight"]
    write_safetensors(os.path.join(apart, "model.safetensors"), own)
    torch.manual_seed(0)
    other = Molmo2.from_pretrained(apart, vision)
    assert other.lm_head.weight is not other.transformer.wte.embedding
    tokens = torch.arange(3, 15)[None]
    assert torch.equal(model(tokens), other(tokens)) and model(tokens).abs().sum() > 0
    with torch.enable_grad():
        for m in (model, other):
            m(tokens, targets=tokens.roll(-1), weights=torch.ones(1, 12)).backward()
    both = other.lm_head.weight.grad + other.transformer.wte.embedding.grad
    assert torch.allclose(head.weight.grad, both, atol=1e-6)
    head.weight -= 0.1 * head.weight.grad
    model.save_pretrained(tmp_path / "saved")
    again = Molmo2.from_pretrained(tmp_path / "saved")
    config = weights.read_json(str(tmp_path / "saved" / "config.json"))
    assert config["tie_word_embeddings"] and config["text_config"]["tie_word_embeddings"]
    assert again.lm_head.weight is again.transformer.wte.embedding and equal(again, model)
    assert torch.equal(again(tokens), model(tokens))


def test_a_head_of_its_own_in_the_file_of_a_tied_model_is_kept(tmp_path):
    """What is in the file was trained; a config that says otherwise is the mistake."""
    text, theirs = language_model(tmp_path / "text")
    vision = vision_model(tmp_path / "vision", 2)[0]
    table = theirs["model.embed_tokens.weight"]
    for head, tied in ((torch.ones(1024, 32), False), (table.clone(), True), (table.float(), True)):
        write_safetensors(os.path.join(text, "model.safetensors"), theirs | {"lm_head.weight": head})
        model = Molmo2.from_pretrained(text, vision)
        assert model.cfg.tie == tied and torch.equal(model.lm_head.weight, head.float())
        assert (model.lm_head.weight is model.transformer.wte.embedding) == tied
        assert torch.equal(model.transformer.wte.embedding, table.float())


def test_a_model_with_a_head_of_its_own_must_bring_it(tmp_path):
    text, theirs = language_model(tmp_path / "text", tie_word_embeddings=False)
    with pytest.raises(BadCheckpoint, match="text: no tensor for lm_head.weight"):
        Molmo2.from_pretrained(text, vision_model(tmp_path / "vision", 2)[0])


YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64, beta_fast=32.0, beta_slow=1.0,
            attention_factor=1.2079441541679836)


@pytest.mark.parametrize("kind, preset, config", [
    ("qwen3", dict(norm_after=False, qk_norm="head"), {}),
    ("olmo2", dict(norm_after=True, qk_norm="full"), {}),
    ("olmo3", dict(norm_after=True, qk_norm="full", yarn_layers=(1,), yarn=dict(
        factor=8.0, original=64, beta_fast=32.0, beta_slow=1.0, attention_factor=1.2079441541679836)),
     dict(layer_types=["sliding_attention", "full_attention"], sliding_window=16, rope_scaling=YARN))])
def test_stage_1_starts_from_published_weights(tmp_path, monkeypatch, kind, preset, config):
    """--init_from a language model and a SigLIP of 27 blocks, through two steps, to a checkpoint that loads."""
    text = language_model(tmp_path / "text", kind, **config)[0]
    vision = vision_model(tmp_path / "vision", 27)[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(pretrain.MODELS, "small", ModelConfig(**TINY, **preset, vit_features=(24, 18)))
    picture(str(tmp_path / "a.png"), "red")
    rows = write_lines(tmp_path / "rows.jsonl", [dict(image="a.png", annotations=[
        dict(task="image_caption", answer="A red wall.")])])
    pretrain.main(pretrain.Config(), pretrain.PRESETS, [
        "--config", "small", "--mixture", "equal", "--data", rows, "--steps", "2", "--global_batch", "1",
        "--micro_batch", "1", "--seq_len", "192", "--workers", "0", "--init_from", text, vision])
    log = [json.loads(line) for line in open("out/small/pretrain/log.jsonl")]
    losses = [r["loss"] for r in log if "loss" in r]
    assert len(losses) == 2 and all(0 < x < 50 for x in losses)
    again = Molmo2.from_pretrained("out/small/pretrain/latest")
    tied = kind == "qwen3"
    assert again.cfg == ModelConfig(**TINY, **preset, vit_features=(24, 18), tie=tied)
    assert (again.lm_head.weight is again.transformer.wte.embedding) == tied
    vit = weights.read_json("out/small/pretrain/latest/config.json")["vit_config"]
    assert vit["num_hidden_layers"] == 27 and len(again.vision_backbone.image_vit.transformer["resblocks"]) == 25


# ---- config.json -------------------------------------------------------------------------------------------

OLMO3 = dict(model_type="olmo3", hidden_size=32, num_hidden_layers=8, num_attention_heads=4, intermediate_size=48,
             vocab_size=160, max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=5e5, sliding_window=16)
SIGLIP = dict(hidden_size=16, image_size=44, intermediate_size=24, num_attention_heads=2, num_hidden_layers=4,
              patch_size=6, layer_norm_eps=1e-6)
MIXED = ["full_attention" if i in (1, 4, 5) else "sliding_attention" for i in range(8)]
BY_KIND = dict(full_attention=dict(YARN, rope_theta=5e5), sliding_attention=dict(rope_type="default", rope_theta=1e4))


@pytest.mark.parametrize("change, stretched, windowed", [
    (dict(layer_types=MIXED, rope_scaling=YARN), (1, 4, 5), (0, 2, 3, 6, 7)),
    (dict(layer_types=MIXED, rope_theta=None, rope_parameters=dict(YARN, rope_theta=5e5)), (1, 4, 5),
     (0, 2, 3, 6, 7)),
    (dict(layer_types=MIXED, rope_theta=None, rope_parameters=BY_KIND), (1, 4, 5), (0, 2, 3, 6, 7)),
    (dict(layer_types=MIXED, rope_scaling=dict(YARN, rope_type="default")), (), (0, 2, 3, 6, 7)),
    (dict(layer_types=MIXED), (), (0, 2, 3, 6, 7)),
    (dict(layer_types=["full_attention"] * 8, rope_scaling=YARN), tuple(range(8)), ()),
    (dict(layer_types=MIXED, sliding_window=None, rope_scaling=YARN), (1, 4, 5), ()),
    # as configs were before they named the kinds of layer: every fourth
    (dict(rope_scaling=YARN), (3, 7), None), (dict(rope_scaling=YARN, num_hidden_layers=11), (3, 7), None),
    (dict(rope_scaling=YARN, num_hidden_layers=12), (3, 7, 11), None),
    (dict(rope_scaling=YARN, rope_scaling_layers=[0, 6]), (0, 6), None),
    (dict(layer_types=MIXED, rope_scaling=YARN, rope_scaling_layers=[0, 6]), (0, 6), (0, 2, 3, 6, 7)),
    (dict(rope_scaling_layers=[0, 6]), (), None)])
def test_which_layers_of_an_olmo3_look_far_and_which_near(change, stretched, windowed):
    cfg = parse_config(OLMO3 | change, "config.json", SIGLIP)
    assert cfg.yarn_layers == stretched and (cfg.yarn is not None) == bool(stretched) and cfg.rope_theta == 5e5
    if windowed is not None:
        assert cfg.window_layers == windowed and cfg.window == (16 if windowed else 0)


def test_numbers_of_yarn():
    read = lambda **rope: parse_config(OLMO3 | dict(layer_types=MIXED, rope_scaling=rope), "x", SIGLIP).yarn
    assert read(**YARN) == dict(factor=8.0, original=64, beta_fast=32.0, beta_slow=1.0,
                                attention_factor=1.2079441541679836)
    short = read(type="yarn", factor=4.0, original_max_position_embeddings=32)
    assert short == dict(factor=4.0, original=32, beta_fast=32.0, beta_slow=1.0,
                         attention_factor=pytest.approx(1.1386294361119891))  # 0.1 ln 4 + 1
    own = read(**dict(YARN, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5, factor=2.0))
    assert own == dict(factor=2.0, original=64, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5)
    for kind in ("llama3", "linear", "dynamic", "longrope"):
        with pytest.raises(BadCheckpoint, match=f"x: rope type '{kind}'"):
            read(**dict(YARN, rope_type=kind))


def test_the_defaults_of_a_plain_config():
    cfg = parse_config(OLMO3, "x", SIGLIP)
    assert (cfg.kv_heads, cfg.head_dim, cfg.norm_after, cfg.qk_norm, cfg.tie) == (4, 8, True, "full", False)
    assert (cfg.crop, cfg.patch, cfg.patches, cfg.vit_head_dim, cfg.projector_mlp) == (42, 6, 49, 8, 48)
    qwen = parse_config(dict(OLMO3, model_type="qwen3", head_dim=16, num_key_value_heads=1, sliding_window=None,
                             tie_word_embeddings=True, rms_norm_eps=1e-5), "x", dict(vision_config=SIGLIP))
    assert (qwen.kv_heads, qwen.head_dim, qwen.norm_after, qwen.qk_norm, qwen.tie) == (1, 16, False, "head", True)
    assert qwen.eps == 1e-5 and qwen.window == 0


# what is computed here in one form only, and another that a config might ask for
OTHERS = {"text_config": dict(hidden_act="gelu", attention_bias=True, qkv_bias=True, mlp_bias=True,
                              additional_vocab_size=64, clip_qkv=8.0, scale_logits=True, normalize_input_embeds=True,
                              use_sliding_window=True),
          "vit_config": dict(hidden_act="gelu", attention_bias=False, num_channels=1),
          "adapter_config": dict(hidden_act="gelu", pooling_attention_mask=False,
                                 image_padding_embed="pad_and_partial_pad",
                                 attention_bias=False, mlp_bias=True, text_hidden_size=64)}


@pytest.mark.parametrize("part, key", [(part, key) for part in OTHERS for key in OTHERS[part]])
def test_a_config_that_asks_for_another_computation_is_refused(part, key):
    config = hub_config(PRESETS["small"])
    parse_config(config, "config.json")
    config[part][key] = OTHERS[part][key]
    with pytest.raises(BadCheckpoint, match=f"config.json.*{key}"):
        parse_config(config, "config.json")


@pytest.mark.parametrize("part, key, values", [
    ("text_config", "num_hidden_layers", (0, -1, 1000, 2.0, "2", True, None)),
    ("text_config", "hidden_size", (0, -8, 2 ** 26, 32.5)), ("text_config", "num_attention_heads", (0, -4, 3)),
    ("text_config", "num_key_value_heads", (-1, 3, 16)), ("text_config", "head_dim", (-16, 15, 2 ** 26)),
    ("text_config", "intermediate_size", (0, -1)), ("text_config", "vocab_size", (0, -1, 2 ** 26)),
    ("text_config", "rope_theta", (-1, "x", float("inf"), float("nan"))),
    ("text_config", "layer_norm_eps", (-1, "x")),
    ("text_config", "qk_norm_type", ("layer", None)), ("text_config", "max_position_embeddings", (0, -1, None)),
    ("vit_config", "num_hidden_layers", (0, None, "3")), ("vit_config", "hidden_size", (0, -1)),
    ("vit_config", "image_patch_size", (0, -1, 100)), ("vit_config", "num_attention_heads", (0, -1)),
    ("adapter_config", "vit_layers", ([], "x", [1.5], [None], 3)),
    ("adapter_config", "intermediate_size", (-1, "x"))])
def test_a_config_of_a_size_that_no_model_has_is_refused(part, key, values):
    for value in values:
        config = hub_config(PRESETS["small"])
        config[part][key] = value
        with pytest.raises(BadCheckpoint, match="config.json"):
            parse_config(config, "config.json")


def test_what_is_saved_says_what_the_published_files_say():
    """Numbers of Molmo2-8B's config.json and of Molmo2-4B's processor files, on which transformers and vLLM rely."""
    saved = hub_config(PRESETS["8b"])
    for part, want in {
        "adapter_config": dict(float32_attention=True, head_dim=72, hidden_act="silu", hidden_size=1152,
                               intermediate_size=12288, num_attention_heads=16, num_key_value_heads=16,
                               pooling_attention_mask=True, text_hidden_size=4096, vit_layers=[-3, -9]),
        "text_config": dict(additional_vocab_size=128, head_dim=128, hidden_act="silu", hidden_size=4096,
                            intermediate_size=12288, layer_norm_eps=1e-6, max_position_embeddings=36864,
                            rope_scaling=None, rope_scaling_layers=None, norm_after=False, qk_norm_type="qwen3",
                            num_hidden_layers=36, num_key_value_heads=8, tie_word_embeddings=False),
        "vit_config": dict(num_hidden_layers=27, hidden_size=1152, image_default_input_size=[378, 378],
                           image_patch_size=14, image_num_pos=729, intermediate_size=4304, head_dim=72)}.items():
        assert {k: saved[part][k] for k in want} == want
    ids = dict(image_start=151936, image_end=151937, image_patch=151938, image_col=151939, low_res_image_start=151940,
               image_low_res=151942, frame_start=151943, frame_end=151944, image_high_res=151938)
    at = {n: saved.get(f"{n}_token_id", saved.get(f"{n}_id")) for n in ids}
    assert at == ids and saved["architectures"] == ["Molmo2ForConditionalGeneration"]
    assert hub_config(PRESETS["7b"])["text_config"]["rope_scaling_layers"] == [3, 7, 11, 15, 19, 23, 27, 31]
    files = processor_configs(PRESETS["4b"])
    image, film = files["preprocessor_config.json"], files["video_preprocessor_config.json"]
    want = dict(size=dict(height=378, width=378), max_crops=8, overlap_margins=[4, 4], patch_size=14,
                pooling_size=[2, 2])
    assert {k: image[k] for k in want} == want
    assert (film["num_frames"], film["max_fps"], film["patch_size"], film["pooling_size"]) == (384, 2, 14, [3, 3])
    assert all(c["image_mean"] == c["image_std"] == [0.5] * 3 and c["resample"] == 2 for c in (image, film))
    assert processor_configs(PRESETS["4b"], 64, 4)["video_preprocessor_config.json"]["num_frames"] == 64
    assert processor_configs(PRESETS["4b"], 64, 4)["preprocessor_config.json"]["max_crops"] == 4


# ---- where they go -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("device, rank, card", [("cuda", None, "cuda"), ("cuda", "3", "cuda:3"),
                                                ("auto", "3", "cuda:3"), ("cuda:1", "3", "cuda:1"),
                                                ("cpu", "3", "cpu")])
def test_a_rank_takes_no_memory_of_another_ones_card(monkeypatch, device, rank, card):
    """What touches a card takes half a gigabyte of it; eight ranks would take four of the first one's."""
    touched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch, "zeros", lambda *a, device: touched.append(device))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert pick_device(device)[0] == ("cuda" if device == "auto" else device) and touched == [card]
