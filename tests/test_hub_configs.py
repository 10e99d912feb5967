"""Every published configuration at hand, and the folders that people make of them: read rightly, or refused in one
line that says why."""
import json
import os
from dataclasses import replace
from glob import glob

import pytest
import torch
from conftest import tiny_model

from lib import weights
from lib.errors import BadCheckpoint
from lib.text import Tokenizer
from lib.weights import hub_config, parse_config, processor_configs, read_safetensors, write_safetensors
from model import Molmo2, PRESETS

GOLDEN = os.path.join(os.path.dirname(__file__), "golden")


def golden(name):
    with open(os.path.join(GOLDEN, name)) as f:
        return json.load(f)


ROWS, HUB = "hub-rows/configs/", "hub-configs/"
SO400M = ROWS + "siglip-so400m-patch14-384.json"
ONE_B = replace(PRESETS["1b"], max_positions=4096)
SEVEN_B = replace(PRESETS["7b"], window=4096, window_layers=tuple(i for i in range(32) if i % 4 != 3))
BASE = dict(vit_width=768, vit_heads=12, vit_head_dim=64, vit_mlp=3072, vit_features=(11, 6), patch=16)
# the two halves of a plain model -> what they make
PLAIN = {
    ROWS + "OLMo-2-0425-1B.json": ONE_B,
    ROWS + "OLMo-2-1124-13B.json": replace(ONE_B, layers=40, width=5120, heads=40, kv_heads=40, mlp=13824,
                                           projector_mlp=13824),
    ROWS + "Qwen3-4B.json": replace(PRESETS["4b"], rope_theta=1e6, tie=True, max_positions=40960),
    ROWS + "Qwen3-4B-Instruct-2507.json": replace(PRESETS["4b"], tie=True, max_positions=262144),
    ROWS + "olmo3-rope_parameters-flat.json": SEVEN_B,
    ROWS + "olmo3-rope_parameters-by-kind.json": SEVEN_B,
    SO400M: ONE_B,
    ROWS + "siglip-vision-model-alone.json": ONE_B,
    ROWS + "siglip2-base-patch16-512.json": replace(ONE_B, **BASE, crop=512),
    ROWS + "siglip-base-patch16-224.json": replace(ONE_B, **BASE, crop=224)}
# processor_config.json -> whether frames have tokens of their own, or why not
PROCESSORS = {
    HUB + "Molmo2-4B/processor_config.json": False, HUB + "Molmo2-8B/processor_config.json": False,
    HUB + "Molmo2-VideoPoint-4B/processor_config.json": False,
    HUB + "third-party/Molmo2-8B-SFT/processor_config.json": True,
    HUB + "MolmoWeb-4B/processor_config.json": "use_single_crop_start_token is False: MolmoWeb's layout, trained with "
                                               "causal attention",
    HUB + "third-party/Molmo2-8B-8bit-mlx/processor_config.json": "use_single_crop_col_tokens is None: another layout"}
PARTIAL = {HUB + f"{name}/config.partial.json": size
           for name, size in (("Molmo2-8B", "8b"), ("Molmo2-VideoPoint-4B", "4b"))}
PIXELS = {HUB + "Molmo2-4B/preprocessor_config.json", HUB + "Molmo2-4B/video_preprocessor_config.json",
          HUB + "Molmo2-8B/video_preprocessor_config.json"}
GENERATION = {HUB + f"{name}/generation_config.json"
              for name in ("Molmo2-8B", "Molmo2-VideoPoint-4B", "MolmoWeb-8B", "MolmoPoint-GUI-8B")}


def test_no_file_is_forgotten():
    found = {os.path.relpath(path, GOLDEN) for folder in ("hub-configs", "hub-rows")
             for path in glob(os.path.join(GOLDEN, folder, "**", "*.json"), recursive=True)}
    assert found == {*PLAIN, *PROCESSORS, *PARTIAL, *PIXELS, *GENERATION}


@pytest.mark.parametrize("name", PLAIN)
def test_a_language_model_and_a_siglip_make_a_model(name):
    is_vision = "siglip" in name
    text, vision = (ROWS + "OLMo-2-0425-1B.json", name) if is_vision else (name, SO400M)
    assert parse_config(golden(text), "config.json", golden(vision)) == PLAIN[name]


def unsaid(size="8b"):
    """The config.json of a Molmo2 that leaves the layout of frames to processor_config.json."""
    config = hub_config(replace(PRESETS[size], point_format="released"))
    del config["use_frame_special_tokens"]
    return config


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_processor_says_how_frames_stand(name):
    want = PROCESSORS[name]
    if isinstance(want, bool):
        for config in (unsaid(), unsaid() | dict(use_frame_special_tokens=want)):
            assert parse_config(config, "here/config.json", None, golden(name)).frame_tokens is want
        with pytest.raises(BadCheckpoint, match=f"here/processor_config.json: .* is {want}, but {not want} in config"):
            parse_config(unsaid() | dict(use_frame_special_tokens=not want), "here/config.json", None, golden(name))
    else:
        with pytest.raises(BadCheckpoint, match=f"here/processor_config.json: {want}"):
            parse_config(unsaid(), "here/config.json", None, golden(name))


@pytest.mark.parametrize("name", PARTIAL)
def test_half_a_config_is_refused_and_completed_it_loads(name):
    config, size = golden(name), PARTIAL[name]
    with pytest.raises(BadCheckpoint, match="'vision_config'"):
        parse_config(config, "config.json")
    whole = unsaid(size)  # what the published half says stands; the rest is as in every file of this size
    for part, values in config.items():
        whole[part] = whole[part] | values if part.endswith("_config") else values
    processor = golden(os.path.dirname(name) + "/processor_config.json")
    assert parse_config(whole, "config.json", None, processor) == replace(
        PRESETS[size], point_format="released", frame_tokens=False)


@pytest.mark.parametrize("name", sorted(PIXELS))
def test_what_is_written_for_other_readers_is_as_published(name):
    published, ours = golden(name), processor_configs(PRESETS["8b"])[os.path.basename(name)]
    if "video" in name:
        assert ours["frame_sample_mode"] == "uniform_last_frame" and ours["sampling_fps"] == 2
    for key, value in ours.items():
        if key in published:
            assert value == (pytest.approx(published[key]) if key == "rescale_factor" else published[key]), key


def test_what_is_written_is_read_again():
    for frames in (False, True):
        cfg = replace(PRESETS["8b"], frame_tokens=frames)
        processor = processor_configs(cfg)["processor_config.json"]
        assert processor["use_frame_special_tokens"] is frames
        assert parse_config(hub_config(cfg), "config.json", None, processor) == cfg
        assert parse_config(unsaid(), "config.json", None, processor).frame_tokens is frames


@pytest.mark.parametrize("name", sorted(GENERATION))
def test_the_ends_of_a_sequence_are_those_generation_config_names(tmp_path, name):
    """We do not read these files: tokenizer_config.json has the same ends by name."""
    published = golden(name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        source = os.path.join(GOLDEN, "tokenizers", "qwen3.json")
        text = open(source, encoding="utf-8").read() if file == "tokenizer.json" else '{"eos_token": "<|im_end|>"}'
        (tmp_path / file).write_text(text, encoding="utf-8")
    tok = Tokenizer(str(tmp_path / "tokenizer.json"), 151936)
    assert (tok.bos, tok.eos) == (published["bos_token_id"], published["eos_token_id"])
    assert tok.ids["<|endoftext|>"] == published["pad_token_id"]


# ---- tensors of the published names and shapes ---------------------------------------------------------------------

def olmo2_1b():
    shapes = {"model.embed_tokens.weight": (100352, 2048), "model.norm.weight": (2048,),
              "lm_head.weight": (100352, 2048)}
    for i in range(16):
        for name, shape in {"self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (2048, 2048),
                            "self_attn.v_proj": (2048, 2048), "self_attn.o_proj": (2048, 2048),
                            "self_attn.q_norm": (2048,), "self_attn.k_norm": (2048,), "mlp.gate_proj": (8192, 2048),
                            "mlp.up_proj": (8192, 2048), "mlp.down_proj": (2048, 8192),
                            "post_attention_layernorm": (2048,), "post_feedforward_layernorm": (2048,)}.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
        shapes[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = (64,)  # in files of older writers
    return shapes


def siglip(width, mlp, blocks, patch, positions):
    shapes = {"logit_scale": (1,), "logit_bias": (1,), "text_model.embeddings.token_embedding.weight": (256000, width),
              "text_model.embeddings.position_ids": (1, 64), "vision_model.embeddings.position_ids": (1, positions),
              "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
              "vision_model.embeddings.patch_embedding.bias": (width,),
              "vision_model.embeddings.position_embedding.weight": (positions, width),
              "vision_model.post_layernorm.weight": (width,), "vision_model.head.probe": (1, 1, width)}
    for i in range(blocks):
        for name, shape in {"layer_norm1": (width,), "layer_norm2": (width,), "self_attn.q_proj": (width, width),
                            "self_attn.k_proj": (width, width), "self_attn.v_proj": (width, width),
                            "self_attn.out_proj": (width, width), "mlp.fc1": (mlp, width),
                            "mlp.fc2": (width, mlp)}.items():
            shapes[f"vision_model.encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"vision_model.encoder.layers.{i}.{name}.bias"] = shape[:1]
    return shapes


@pytest.mark.parametrize("vision, shapes, n_params", [
    # 1,484,916,736 of OLMo-2-1B, the 128 rows, 25 blocks of so400m, the connector
    ("siglip-so400m-patch14-384", siglip(1152, 4304, 27, 14, 729), 1_484_916_736 + 128 * 2048 + 382_505_936
     + 9_294_336 + 2 * 1152 * 8192 + 8192 * 2048),
    ("siglip2-base-patch16-512", siglip(768, 3072, 12, 16, 1024), None),
    ("siglip-base-patch16-224", siglip(768, 3072, 12, 16, 196), None)])
def test_tensors_of_the_published_shapes_fill_the_model(tmp_path, monkeypatch, vision, shapes, n_params):
    """All of OLMo-2-1B and of a SigLIP, on the meta device: every name and shape, no numbers."""
    files = {}
    for name, config, tensors in (("text", "OLMo-2-0425-1B", olmo2_1b()), ("vision", vision, shapes)):
        os.makedirs(tmp_path / name)
        weights.write_json(tmp_path / name / "config.json", golden(ROWS + config + ".json"))
        files[str(tmp_path / name / "model.safetensors")] = tensors
    monkeypatch.setattr(weights, "read_safetensors", lambda path: {
        name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in files[path].items()})
    with torch.device("meta"):
        model = Molmo2.from_pretrained(tmp_path / "text", str(tmp_path / "vision"))
    if n_params:
        assert model.num_params() == n_params
    assert all(p.dtype == torch.float32 for p in model.parameters())


# ---- members of the same kinds -------------------------------------------------------------------------------------

OLMO = ROWS + "OLMo-2-0425-1B.json"


@pytest.mark.parametrize("vision, wanted", [
    (dict(vision_config={}), dict(BASE, crop=224)),
    # so400m at 224 and 512 pixels, base at patches of 32
    (dict(vision_config=dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=27,
                             patch_size=14, model_type="siglip_vision_model")), dict(crop=224)),
    (dict(vision_config=dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=27,
                             image_size=512)), dict(crop=512, patch=16)),
    (dict(vision_config=dict(image_size=256, patch_size=32)), dict(BASE, crop=256, patch=32)),
    # large: 24 blocks
    (dict(vision_config=dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24,
                             image_size=384)), dict(crop=384, patch=16, vit_width=1024, vit_mlp=4096, vit_head_dim=64,
                                                    vit_features=(23, 12)))])
def test_siglips_that_say_only_what_is_not_usual(vision, wanted):
    assert parse_config(golden(OLMO), "x", vision) == replace(ONE_B, **wanted)


@pytest.mark.parametrize("vision, message", [
    (dict(vision_config=dict(model_type="siglip2_vision_model", num_patches=256)), "siglip2_vision_model"),
    (dict(vision_config=dict(model_type="clip_vision_model", hidden_size=1024)), "clip_vision_model"),
    (dict(model_type="dinov2", hidden_size=384), "dinov2"), (dict(vision_config=dict(hidden_act="gelu")), "hidden_act"),
    (dict(vision_config=dict(num_channels=1)), "num_channels"), (golden(OLMO), "olmo2")])
def test_another_eye_is_refused_by_name(vision, message):
    with pytest.raises(BadCheckpoint, match=message):
        parse_config(golden(OLMO), "x", vision)


@pytest.mark.parametrize("flags", [
    dict(use_single_crop_start_token=False), dict(use_single_crop_start_token=None), dict(image_use_col_tokens=False),
    dict(use_single_crop_col_tokens=True), dict(use_single_crop_col_tokens=None), dict(video_use_col_tokens=True),
    dict(use_single_crop_start_token="no"), dict(video_use_col_tokens="true")])
def test_another_layout_is_refused_wherever_it_is_said(flags):
    key = next(iter(flags))
    with pytest.raises(BadCheckpoint, match=f"here/config.json: {key} is "):
        parse_config(unsaid() | flags, "here/config.json")
    with pytest.raises(BadCheckpoint, match=f"here/processor_config.json: {key} is "):
        parse_config(unsaid(), "here/config.json", None, flags)
    fine = dict(golden(HUB + "Molmo2-8B/processor_config.json"))
    with pytest.raises(BadCheckpoint, match=f"here/processor_config.json: {key} is .*, but .* in config.json"):
        parse_config(unsaid() | flags, "here/config.json", None, fine)


@pytest.mark.parametrize("flag", [None, "false", 0, []])
def test_a_frame_flag_that_is_no_flag(flag):
    for config, processor in ((unsaid() | dict(use_frame_special_tokens=flag), {}),
                              (unsaid(), dict(use_frame_special_tokens=flag))):
        with pytest.raises(BadCheckpoint, match="frame_tokens"):
            parse_config(config, "config.json", None, processor)


def test_frames_have_tokens_of_their_own_where_nothing_is_said():
    assert parse_config(unsaid(), "config.json").frame_tokens is True
    assert parse_config(unsaid(), "config.json", None, dict(processor_class="Molmo2Processor")).frame_tokens is True


@pytest.mark.parametrize("kind, message", [("molmo_point", "MolmoPoint, which points by choosing patches"),
                                           ("molmo", "molmo2, olmo2, olmo3, qwen3"), ("molmoact2", "molmoact2"),
                                           ("qwen3_vl", "qwen3_vl"), ("llama", "llama"), (None, "None"),
                                           ([], "model_type")])
def test_another_network_is_refused_by_name(kind, message):
    with pytest.raises(BadCheckpoint, match=f"x/config.json: .*{message}"):
        parse_config(hub_config(PRESETS["8b"]) | dict(model_type=kind), "x/config.json")


@pytest.mark.parametrize("where, key, value", [
    ("top", "quantization_config", dict(quant_method="fp8", weight_block_size=[128, 128])),
    ("top", "quantization", dict(group_size=64, bits=8)), ("text", "quantization_config", dict(quant_method="awq")),
    ("plain", "quantization_config", dict(quant_method="bitsandbytes", load_in_4bit=True))])
def test_quantised_weights_are_refused_by_their_config(where, key, value):
    config = golden(OLMO) if where == "plain" else hub_config(PRESETS["8b"])
    parse_config(config, "x", golden(SO400M))
    (config["text_config"] if where == "text" else config)[key] = value
    with pytest.raises(BadCheckpoint, match=f"x: has a {key}; quantised weights are not read here"):
        parse_config(config, "x", golden(SO400M))


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)


@pytest.mark.parametrize("name", ["Qwen3-4B", "OLMo-2-0425-1B"])
def test_yarn_is_on_all_layers_of_a_model_whose_layers_are_alike(name):
    config = golden(ROWS + name + ".json")
    n = config["num_hidden_layers"]
    for rope in (dict(rope_scaling=YARN), dict(rope_parameters=dict(YARN, rope_theta=1e6)),
                 dict(rope_scaling=YARN, layer_types=["full_attention"] * n)):
        cfg = parse_config(config | rope, "x", golden(SO400M))
        assert cfg.yarn_layers == tuple(range(n)) and cfg.window == 0 and cfg.yarn["original"] == 32768
    short = {k: v for k, v in YARN.items() if k != "original_max_position_embeddings"}
    assert parse_config(config | dict(rope_scaling=short), "x", golden(SO400M)).yarn["original"] \
        == config["max_position_embeddings"]
    for odd in (dict(mscale=0.7), dict(mscale_all_dim=1.0), dict(truncate=False)):
        with pytest.raises(BadCheckpoint, match=next(iter(odd))):
            parse_config(config | dict(rope_scaling=YARN | odd), "x", golden(SO400M))


def test_yarn_of_a_molmo2_is_on_the_layers_listed_or_on_all():
    config = hub_config(PRESETS["7b"])
    assert parse_config(config, "x") == PRESETS["7b"]
    for layers, want in ((None, tuple(range(32))), ([], ()), ([0], (0,)), ([1, 5, 31], (1, 5, 31))):
        config["text_config"]["rope_scaling_layers"] = layers
        cfg = parse_config(config, "x")
        assert cfg.yarn_layers == want and parse_config(hub_config(cfg), "x") == cfg
    del config["text_config"]["rope_scaling_layers"]
    assert parse_config(config, "x").yarn_layers == tuple(range(32))
    config["text_config"]["rope_scaling_layers"] = [32]
    with pytest.raises(BadCheckpoint, match="yarn_layers"):
        parse_config(config, "x")


@pytest.mark.parametrize("n", [32, 6, 3, 1])
def test_an_olmo3_that_does_not_name_its_layers(n):
    """The class makes every fourth one full, and looks 4,096 tokens back in the others."""
    config = golden(ROWS + "olmo3-rope_parameters-flat.json")
    del config["layer_types"]
    config["num_hidden_layers"] = n
    full = {32: (3, 7, 11, 15, 19, 23, 27, 31), 6: (3,), 3: (), 1: ()}[n]
    for window in ({}, dict(sliding_window=128)):
        said = {k: v for k, v in config.items() if k != "sliding_window"} | window
        cfg = parse_config(said, "x", golden(SO400M))
        assert cfg.yarn_layers == full and cfg.window == window.get("sliding_window", 4096)
        assert cfg.window_layers == tuple(i for i in range(n) if i not in full)


@pytest.mark.parametrize("n", [10 ** 20, 10 ** 9, 1000, 0, -1, 2.0, "2", True, None])
def test_no_list_is_made_for_layers_that_cannot_be(n):
    for config in (golden(OLMO), golden(ROWS + "olmo3-rope_parameters-flat.json")):
        with pytest.raises(BadCheckpoint, match="num_hidden_layers is"):
            parse_config(config | dict(num_hidden_layers=n), "x", golden(SO400M))


# ---- heads, tied or not --------------------------------------------------------------------------------------------

def saved(tmp_path, top, text, head):
    """A folder whose config says `tie_word_embeddings` at the top, under text_config, or nowhere (None), with a head
    that is "own", "equal" to the embedding table, or missing (None)."""
    model = tiny_model("qwen")
    model.save_pretrained(tmp_path)
    config = weights.read_json(str(tmp_path / "config.json"))
    for part, tie in ((config, top), (config["text_config"], text)):
        part.pop("tie_word_embeddings")
        if tie is not None:
            part["tie_word_embeddings"] = tie
    weights.write_json(tmp_path / "config.json", config)
    tensors = {k: v.clone() for k, v in read_safetensors(str(tmp_path / "model.safetensors")).items()}
    if head == "equal":
        tensors["lm_head.weight"] = tensors["model.transformer.wte.embedding"].clone()
    elif head is None:
        del tensors["lm_head.weight"]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    return model


@pytest.mark.parametrize("top, text", [(True, None), (None, True), (True, False), (False, True), (True, True)])
def test_a_tied_head_wherever_the_config_says_so(tmp_path, top, text):
    for head in (None, "equal"):
        saved(tmp_path, top, text, head)
        model = Molmo2.from_pretrained(tmp_path)
        assert model.cfg.tie and model.lm_head.weight is model.transformer.wte.embedding
    # the file has another head: it is what was trained
    want = saved(tmp_path, top, text, "own").lm_head.weight
    model = Molmo2.from_pretrained(tmp_path)
    assert not model.cfg.tie and torch.equal(model.lm_head.weight, want)
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.embedding)
    model.save_pretrained(tmp_path)
    assert torch.equal(Molmo2.from_pretrained(tmp_path).lm_head.weight, want)


@pytest.mark.parametrize("top, text", [(False, None), (None, False), (None, None), (False, False)])
def test_a_head_that_is_not_tied_must_be_there(tmp_path, top, text):
    saved(tmp_path, top, text, None)
    with pytest.raises(BadCheckpoint, match="no tensor for lm_head.weight"):
        Molmo2.from_pretrained(tmp_path)
    saved(tmp_path, top, text, "equal")
    model = Molmo2.from_pretrained(tmp_path)
    assert not model.cfg.tie and model.lm_head.weight is not model.transformer.wte.embedding


# ---- files that are not what their name says -----------------------------------------------------------------------

@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "processor_config.json",
                                  "model.safetensors.index.json"])
def test_a_pointer_in_place_of_a_file_is_told_in_one_line(tmp_path, file):
    tiny_model().save_pretrained(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4" * 64 + "\nsize 42\n"
    (tmp_path / file).write_text(pointer)
    with pytest.raises(BadCheckpoint, match=rf"{file}: .*Git LFS pointer.*git lfs pull") as e:
        Molmo2.from_pretrained(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("dtype, size", [("F8_E4M3", 1), ("F8_E5M2", 1), ("F8_E8M0", 1), ("U32", 4), ("F4", 1)])
def test_numbers_of_a_quantised_file_are_told_in_one_line(tmp_path, dtype, size):
    header = json.dumps({"model.x": dict(dtype=dtype, shape=[4], data_offsets=[0, 4 * size])}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * size))
    with pytest.raises(BadCheckpoint, match=f"model.safetensors: .*model.x is of type '{dtype}'.*quantised weights"):
        read_safetensors(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq",
                                  "model.transformer.rotary_emb.original_inv_freq", "rotary_emb.inv_freq",
                                  "vision_model.embeddings.position_ids",
                                  "model.language_model.rotary_emb.inv_freq"])
def test_tables_that_follow_from_the_config_are_passed_over(tmp_path, name):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    path = str(tmp_path / "model.safetensors")
    tensors = {k: v.clone() for k, v in read_safetensors(path).items()}
    write_safetensors(path, tensors | {name: torch.ones(4)})
    assert torch.equal(Molmo2.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)
    write_safetensors(path, tensors | {name + "_x": torch.ones(4)})
    with pytest.raises(BadCheckpoint, match="unknown tensor"):
        Molmo2.from_pretrained(tmp_path)
