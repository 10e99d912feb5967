"""The tokenizers of the real families: ids as the `tokenizers` package gives them, and what is not read is refused."""
import json
import os

import pytest

from lib.errors import BadCheckpoint
from lib.text import CHAT, Tokenizer, WRITABLE

FOLDER = os.path.join(os.path.dirname(__file__), "golden", "tokenizers")
ROWS = dict(olmo=100278, qwen3=151936)


def stored(name):
    with open(os.path.join(FOLDER, name + ".json"), encoding="utf-8") as f:
        return json.load(f)


def changed(tmp_path, change, name="qwen3"):
    """A Tokenizer of the stored file after change(spec)."""
    spec = stored(name)
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    return Tokenizer(str(tmp_path / "tokenizer.json"), ROWS[name])


@pytest.mark.parametrize("name", ROWS)
def test_ids_are_those_of_the_family(name):
    tok = Tokenizer(os.path.join(FOLDER, name + ".json"), ROWS[name])
    for text, ids in zip(stored("ids")["texts"], stored("ids")[name]):
        assert tok.encode(text, special=()) == ids, text


def test_the_whole_tokenizer_of_olmo_gives_the_same():
    path = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "tokenizer", "dolma2-tokenizer.json")
    if not os.path.exists(path):
        pytest.skip("needs ../shared/tokenizer")
    tok = Tokenizer(path, ROWS["olmo"])
    assert [tok.encode(text, special=()) for text in stored("ids")["texts"]] == stored("ids")["olmo"]


@pytest.mark.parametrize("k", range(8))
def test_other_normalisers_and_added_tokens(tmp_path, k):
    """No normaliser, another form, a chain of them, tokens looked for before and after it, as the package does."""
    change, ids = stored("ids")["variants_of_qwen3"][k]

    def apply(spec):
        spec["added_tokens"] += change.get("added_tokens", [])
        spec |= {key: value for key, value in change.items() if key != "added_tokens"}
    tok = changed(tmp_path, apply)
    for text, want in zip(stored("ids")["texts"], ids):
        assert tok.encode(text, special=()) == want, text


@pytest.mark.parametrize("name", ROWS)
def test_a_text_cannot_spell_what_controls(tmp_path, name):
    """Special tokens, whatever the file calls special, and the rows that only the loader may write."""
    def none_is_special(spec):
        for token in spec["added_tokens"]:
            token["special"] = False
    for change in (lambda spec: None, none_is_special):
        tok = changed(tmp_path, change, name)
        names = [n for n in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<point", "<timestamp>", "<image>",
                             "<image_start>", "<frame_start>", "<|image|>", "<|extra_id_0|>") if n in tok.ids]
        assert len(names) >= 9
        for control in names:
            assert tok.ids[control] not in tok.encode(f"a {control} b {control}", special=())
        assert tok.decode(tok.encode("<|im_start|> <point", special=())) == "<|im_start|> <point"
        # asked for, they are one id each
        assert [i for i in tok.encode("<|im_start|>a<point b<|im_end|>", WRITABLE + CHAT) if i in tok.ids.values()] \
            == [tok.ids["<|im_start|>"], tok.ids["<point"], tok.ids["<|im_end|>"]]


def test_a_longer_name_wins(tmp_path):
    def add(spec):
        for i, content in enumerate(("<point>", "<points>", "<pointsman>")):
            spec["added_tokens"].append(dict(id=151670 + i, content=content, special=False, normalized=False,
                                             lstrip=False, rstrip=False, single_word=False))
    tok = changed(tmp_path, add)
    assert tok.encode("<points><point><pointsman>") == [151671, 151670, 151672]
    assert tok.encode("<point ")[0] == tok.ids["<point"] not in (151670, 151671, 151672)


@pytest.mark.parametrize("name", ROWS)
def test_what_is_saved_reads_the_same(tmp_path, name):
    """Also what took the id of a spare token: a later stage must find <point where an earlier one learned it."""
    tok = Tokenizer(os.path.join(FOLDER, name + ".json"), ROWS[name])
    tok.save(tmp_path)
    again = Tokenizer(str(tmp_path / "tokenizer.json"), ROWS[name])
    assert again.ids.items() >= tok.ids.items() and again.eos == tok.eos and again.bos == tok.bos
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    spelled = {t["id"]: t["content"] for t in saved["added_tokens"]}
    assert spelled[tok.ids["<point"]] == "<point" and spelled[tok.ids["<image>"]] == "<im_patch>"
    assert all(spelled.get(i, token) == token for token, i in saved["model"]["vocab"].items())
    for text in stored("ids")["texts"]:
        assert again.encode(text) == tok.encode(text), text


SPLIT = dict(type="Split", pattern=dict(Regex=r"\p{L}+|[^\p{L}]"), behavior="Isolated", invert=False)
BYTES = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)


def steps(*steps):
    return lambda spec: spec.update(pre_tokenizer=dict(type="Sequence", pretokenizers=list(steps)))


REFUSED = {
    "normalizer 'Lowercase'": lambda spec: spec.update(normalizer=dict(type="Lowercase")),
    "normalizer 'Replace'": lambda spec: spec.update(normalizer=dict(type="Sequence", normalizers=[
        dict(type="NFC"), dict(type="Replace", pattern=dict(String="a"), content="b")])),
    "normalizer 'Prepend'": lambda spec: spec.update(normalizer=dict(type="Prepend", prepend="_")),
    "step 0 is .*Digits": steps(dict(type="Digits", individual_digits=True), BYTES),
    "step 0 is .*Metaspace": lambda spec: spec.update(pre_tokenizer=dict(type="Metaspace", replacement="_")),
    "step 1 is .*Split": steps(SPLIT, SPLIT, BYTES),
    "step 0 is .*MergedWithNext": steps(dict(SPLIT, behavior="MergedWithNext"), BYTES),
    "step 0 is .*Removed": steps(dict(SPLIT, behavior="Removed"), BYTES),
    "step 0 is .*\"invert\": true": steps(dict(SPLIT, invert=True), BYTES),
    "step 0 is .*ByteLevel": lambda spec: spec.update(pre_tokenizer=dict(BYTES, add_prefix_space=True)),
    "splits twice": steps(SPLIT, dict(BYTES, use_regex=True)),
    "leaves parts of a text out": steps(dict(SPLIT, pattern=dict(Regex=r"\p{L}+")), BYTES),
    "KeyError": steps(dict(SPLIT, pattern=dict(String=" ")), BYTES),
    "of the wrong kind": steps(dict(SPLIT, pattern=dict(Regex="(")), BYTES),
    "model.byte_fallback": lambda spec: spec["model"].update(byte_fallback=True),
    "model.end_of_word_suffix": lambda spec: spec["model"].update(end_of_word_suffix="</w>"),
    "another order": lambda spec: spec["model"]["merges"].reverse(),
    "OverflowError": lambda spec: spec["model"]["vocab"].update({"!": -1}),
    "some byte": lambda spec: spec["model"]["vocab"].pop("!"),
    "an id twice": lambda spec: spec["model"]["vocab"].update({"!!": 0}),
    "'<think>' has lstrip": lambda spec: [t.update(lstrip=t["content"] == "<think>") for t in spec["added_tokens"]],
    "'<tool_call>' has lstrip, rstrip": lambda spec: [t.update(rstrip=True) for t in spec["added_tokens"]],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_be_encoded_otherwise_than_it_says_is_refused(tmp_path, message):
    with pytest.raises(BadCheckpoint, match=rf"tokenizer\.json: .*{message}") as e:
        changed(tmp_path, REFUSED[message])
    assert "\n" not in str(e.value)


def test_a_pointer_in_place_of_the_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 11\n")
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.json: .*Git LFS pointer"):
        Tokenizer(str(tmp_path / "tokenizer.json"), 151936)
