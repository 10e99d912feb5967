"""Against the reference: what transformers 5.23 and the official training code put out (fp32, CPU) for random
weights.

The folders under golden/ hold weights, inputs and outputs, and nothing else.
"""
import hashlib
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import HERE, picture, shared, video, write_lines

import data
import pretrain
import sample
from data import Planner, parse_points
from lib.errors import BadCheckpoint
from lib.media import frame_layout, image_crops, image_layout, load_image, pick_tiling, sample_times
from lib.text import Tokenizer, parse_released, released_points, released_tracks
from lib.weights import our_name, parse_config, read_json, read_safetensors, write_json, write_safetensors
from model import Molmo2, dense_mask, is_vision


GOLDEN = os.path.join(HERE, "golden")
CASES = [(m, c) for m in ("olmo3", "qwen3") for c in ("image", "multi_image", "video")]


def load(name, case):
    model = Molmo2.from_pretrained(os.path.join(GOLDEN, f"molmo2-{name}-tiny", "hub"))
    x = read_safetensors(os.path.join(GOLDEN, "molmo2-inputs", f"{case}.safetensors"))
    kind = "video" if case == "video" else "image"
    crops = x["pixel_values_videos" if case == "video" else "pixel_values"]
    want = read_safetensors(os.path.join(GOLDEN, f"molmo2-{name}-tiny", f"{case}_outputs.safetensors"))
    return model, x, crops, x[f"{kind}_token_pooling"], want


@pytest.mark.parametrize("name, case", CASES)
@torch.no_grad()
def test_every_stage_of_the_network(name, case):
    model, x, crops, pool, want = load(name, case)
    close = lambda a, b, tolerance: float((a - b).abs().max()) <= tolerance
    assert close(model.vision_backbone.image_vit(crops), want["vit_features"], 1e-5)
    assert close(model.vision_backbone(crops, pool), want["connector_features"], 1e-5)
    logits = model(x["input_ids"], crops, pool)
    assert close(logits[:, want["logit_positions"]], want["logits"], 1e-4)
    targets = x["labels"][:, 1:]  # the reference shifts inside, this project in data.py
    learn = targets >= 0
    tokens, n = x["input_ids"][:, :-1], int(learn.sum())
    loss = model(tokens, crops, pool, targets=targets.clamp(min=0), weights=learn.float()) / n
    assert close(loss, want["loss"], 1e-5)
    one = torch.ones_like(x["input_ids"])
    mask = dense_mask(one, one * 0, is_vision(x["input_ids"], model.cfg.vocab))
    assert torch.equal(mask[0, 0], want["attn_allowed"])


@pytest.mark.parametrize("name, case", CASES)
def test_the_same_twelve_tokens(name, case):
    model, x, crops, pool, want = load(name, case)
    n = int(x["prompt_len"])
    prompt = x["input_ids"][:, :n]
    said = torch.stack(list(model.generate(prompt, crops, pool, max_new_tokens=12)), 1)
    assert torch.equal(said, want["generated"])
    padded = torch.cat([prompt, prompt.new_zeros(1, 9)], 1)  # padding on the right changes nothing
    example = (torch.arange(n + 9) < n).long()[None]
    said = torch.stack(list(model.generate(padded, crops, pool, max_new_tokens=12, example=example)), 1)
    assert torch.equal(said, want["generated"])


@pytest.mark.parametrize("name", ["olmo3", "qwen3"])
def test_saving_gives_the_original_file(name, tmp_path):
    folder = os.path.join(GOLDEN, f"molmo2-{name}-tiny", "hub")
    Molmo2.from_pretrained(folder).save_pretrained(tmp_path)
    a, b = (read_safetensors(os.path.join(f, "model.safetensors")) for f in (folder, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- other layouts of the same weights ---------------------------------------------------------------------

def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["olmo3", "qwen3"])
def test_all_naming_schemes_load_alike(name, tmp_path):
    folder = os.path.join(GOLDEN, f"molmo2-{name}-tiny")
    hub = Molmo2.from_pretrained(os.path.join(folder, "hub"))
    native = Molmo2.from_pretrained(folder)
    assert same(hub, native) and hub.cfg == native.cfg
    tensors = read_safetensors(os.path.join(folder, "hub", "model.safetensors"))
    # official training names: no "model.", no level self_attn or mlp, the head is transformer.ff_out
    official = {}
    for n, t in tensors.items():
        n = n.removeprefix("model.").replace("lm_head", "transformer.ff_out")
        official[n.replace("self_attn.", "").replace("mlp.", "") if n.startswith("transformer.blocks") else n] = t
    # and as transformers saves it: the two embedding tables parted in the middle, over several files
    wte = "model.transformer.wte."
    both = torch.cat([tensors[wte + "embedding"], tensors[wte + "new_embedding"]])
    halves = dict(tensors) | {wte + "embedding": both[:196].clone(),
                              wte + "new_embedding": both[196:].clone()}
    for case, named in (("official", official), ("halves", halves)):
        out = tmp_path / case
        os.makedirs(out)
        shutil.copy(os.path.join(folder, "hub", "config.json"), out)
        parts = {f"model-{i}.safetensors": dict(list(named.items())[i::3]) for i in range(3)}
        for f, part in parts.items():
            write_safetensors(out / f, part)
        write_json(out / "model.safetensors.index.json",
                   {"weight_map": {n: f for f, part in parts.items() for n in part}})
        assert same(Molmo2.from_pretrained(out), hub), case


@pytest.mark.parametrize("name", ["olmo2", "olmo3", "qwen3"])
@torch.no_grad()
def test_plain_language_models(name):
    model = Molmo2.from_pretrained(os.path.join(GOLDEN, f"{name}-tiny"), os.path.join(GOLDEN, "siglip-tiny"))
    x = read_safetensors(os.path.join(GOLDEN, f"{name}-tiny", "io.safetensors"))
    logits = model(x["input_ids"])
    assert float((logits[:, x["logit_positions"]] - x["logits"]).abs().max()) <= 1e-4
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x["input_ids"][:, 1:].flatten())
    assert abs(float(nll) - float(x["loss"])) <= 1e-5
    # OLMo-3's window and the cache
    said = torch.stack(list(model.generate(x["input_ids"][:1, :40], max_new_tokens=12)), 1)
    assert torch.equal(said, x["generated_from_first_40"])


def test_old_and_new_config_of_olmo3_agree():
    vision = read_json(os.path.join(GOLDEN, "siglip-tiny", "config.json"))
    files = (os.path.join(GOLDEN, "olmo3-tiny", f) for f in ("config.json", "legacy/config.json"))
    assert len({str(parse_config(read_json(f), f, vision)) for f in files}) == 1


@torch.no_grad()
def test_siglip_layer_by_layer():
    model = Molmo2.from_pretrained(os.path.join(GOLDEN, "qwen3-tiny"), os.path.join(GOLDEN, "siglip-tiny"))
    x, vit = read_safetensors(os.path.join(GOLDEN, "siglip-tiny", "io.safetensors")), model.vision_backbone.image_vit
    h = vit.patch_embedding(x["patches_hwc"]) + vit.positional_embedding
    for i, block in enumerate([torch.nn.Identity(), *vit.transformer["resblocks"]]):
        h = block(h)
        assert float((h - x[f"hidden_{i}"]).abs().max()) <= 1e-5, i


def test_a_language_model_alone_or_the_wrong_partner():
    with pytest.raises(BadCheckpoint, match="SigLIP"):
        Molmo2.from_pretrained(os.path.join(GOLDEN, "qwen3-tiny"))
    with pytest.raises(BadCheckpoint, match="second folder"):
        Molmo2.from_pretrained(os.path.join(GOLDEN, "siglip-tiny"), os.path.join(GOLDEN, "siglip-tiny"))


# ---- pictures and videos -----------------------------------------------------------------------------------

def lines(*names):
    with open(os.path.join(GOLDEN, *names)) as f:
        return [json.loads(line) for line in f]


def test_tiling_of_152_sizes():
    for r in lines("image-preprocess", "tiling_table.jsonl"):
        for k in (8, 24):
            assert pick_tiling(max(r["h"] - 112, 1), max(r["w"] - 112, 1), 266, k) == tuple(r[f"max_crops_{k}"]), r


CROPS = json.load(open(os.path.join(GOLDEN, "image-preprocess", "cases.json")))


@pytest.mark.parametrize("case", CROPS["cases"], ids=lambda c: f"{c['image']}-{c['max_crops']}")
def test_crops_tokens_and_windows(case):
    arrays = np.load(os.path.join(GOLDEN, "image-preprocess", "arrays.npz"))
    key = f"{os.path.splitext(case['image'])[0]}/mc{case['max_crops']}/"
    names = {"<im_start>": "<image_start>", "<im_end>": "<image_end>", "<im_patch>": "<image>",
             "<im_col>": "<image_col>",
             "<low_res_im_start>": "<low_res_image_start>"}
    layout = image_layout(case["width"], case["height"], 27, 14, case["max_crops"])
    assert layout.tokens == [names[CROPS["token_order"][i]] for i in arrays[key + "tokens"]]
    assert np.array_equal(layout.pool, arrays[key + "token_pooling"])
    pixels = load_image(os.path.join(GOLDEN, "image-preprocess", case["image"]))
    crops = image_crops(pixels, 27, 14, layout.tiling)
    assert len(crops) == case["n_crops_incl_global"]
    images = crops.reshape(-1, 27, 27, 14, 14, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 378, 378, 3)
    y, x, want = (arrays[key + f"sample_{k}"] for k in ("y", "x", "rgb_u8"))
    for i, image in enumerate(images):
        assert np.abs(image[y[i], x[i]].astype(int) - want[i]).max() <= 1
        assert abs(image.mean() - case["crop_mean_u8"][i]) < 0.01
        if hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:16] != case["crop_sha256_16"][i]:
            # bilinear rounding differs between builds of torch
            assert abs(image.std() - case["crop_std_u8"][i]) < 0.01


def test_sampling_times_and_frame_windows():
    for r in lines("video-sampling", "sampling.jsonl"):
        got = sample_times(r["duration"], r["max_frames"], r["max_fps"])
        assert len(got) == len(r["training_times"]) and np.abs(got - r["training_times"]).max() <= 1e-6, r
    two = np.load(os.path.join(GOLDEN, "video-sampling", "pooling_3x3_two_frames.npz"))
    frame = frame_layout(27)
    assert np.array_equal(two[two.files[0]], np.concatenate([frame, frame + 729]))


def released_planner(vocab=264, **sizes):
    cfg = read_json(os.path.join(GOLDEN, "molmo2-qwen3-tiny", "hub", "config.json"))
    cfg = parse_config(cfg, "config.json")
    for k, v in sizes.items():
        setattr(cfg, k, v)
    return Planner(Tokenizer(os.path.join(GOLDEN, "molmo2-inputs", "tokenizer.json"), vocab), cfg, 20000,
                   tiles=4,
                   token_weights="released", max_frames=128)


def test_videos_are_laid_out_as_published(monkeypatch):
    checked = 0
    for r in lines("video-sampling", "layout.jsonl"):
        if not r["per_frame_special_token"]:  # one pair around the whole video: no released model has it
            continue
        planner = released_planner(crop=378, patch=14)
        planner.max_frames = r["max_frames"]
        monkeypatch.setattr(data, "video_duration", lambda path: r["n_frames"] / r["fps"])
        ids, media = planner.trunk(dict(video="x.mp4"), ".")
        names = {i: n for n, i in planner.tokenizer.ids.items()}
        text = "".join({"<image>": "#"}.get(names.get(i), names.get(i) or planner.tokenizer.decode([i]))
                       for i in ids[1:])
        text = re.sub("#+", lambda m: f"[<im_patch>*{len(m[0])}]", text)
        assert text == r["layout"] and media[0][1].pool.shape == tuple(r["token_pooling_shape"])
        checked += 1
    assert checked >= 5


# ---- text --------------------------------------------------------------------------------------------------

MODES = {None: "point", "point": "point", "pointing": "point", "point_then_count": "point_count",
         "point_count": "point_count", "count_then_point": "count_point", "count_point": "count_point",
         "count": "count"}


def test_points_as_released():
    unit = lambda p, s: (p[0] / (s[0] if isinstance(s, list) else s),
                         p[1] / (s[1] if isinstance(s, list) else s))
    clock = lambda t: sum(60 ** k * float(x) for k, x in enumerate(reversed(t.split(":"))))
    seconds = lambda t: clock(t) if isinstance(t, str) else t
    for r in lines("point-format", "format.jsonl"):
        a, scale = r["args"], r["args"]["scale"]
        if r["fn"] == "format_video_tracks":
            start = a.get("from_initial_points")
            frames = [(seconds(f["time"]),
                       {k: unit(v["point"], scale) for k, v in f["points"].items() if not v["occluded"]})
                      for f in a["point_tracks"]]
            got = released_tracks(frames, a["label"], a["alt_text"], a.get("start_end_only", False),
                                  start[0]["time"] if start else None)
        else:
            groups = {"format_image_points": lambda: [("1", a["points"], scale)],
                      "format_multi_image_points": lambda: zip(map(str, a["image_indices"]), a["points"],
                                                               scale),
                      "format_video_points": lambda: [(f"{t:.1f}", g, scale)
                                                      for t, g in zip(a["timestamps"], a["points"])]}
            groups = [(prefix, [unit(p, s) for p in places]) for prefix, places, s in groups[r["fn"]]()]
            got = released_points(groups, a["label"], MODES[a["mode"]], a["alt_text"])
        assert got == r["output"], r


def test_points_read_as_the_reference_reads_them():
    for r in lines("point-format", "parse.jsonl"):
        got = [(i, t, x / 1000 * r["width"], y / 1000 * r["height"])
               for t, i, x, y in parse_released(r["text"], lenient=False)]
        assert np.allclose(got, r["any_points_frame_xy"]) if got else not r["any_points_frame_xy"], r
        tracks = {}
        for i, t, x, y in got:
            tracks.setdefault(round(t * 10), {}).setdefault(str(i), (x, y))
        want = {t["frame"]: t["points"] for t in r["tracks_at_10_fps"]}
        assert tracks.keys() == want.keys() and all(tracks[f].keys() == want[f].keys() for f in want)
    assert parse_points('<points coords="1 1 250 750;3 2 1000 000">cat</points>', "images") == [
        dict(x=0.25, y=0.75, id=0, image=0), dict(x=1.0, y=0.0, id=1, image=2)]


# Sizes of pictures that tile as those of the golden conversations did (only their layout is recorded).
TREES = {"tree3_image": [(50, 50)], "single_image_two_turns": [(100, 40)], "text_only": [],
         "tree2_text_only": [], "tree2_two_images": [(70, 40), (70, 40)],
         "tree2_image_mixed_turns": [(100, 40)], "single_image_one_tree_branch": [(100, 40)],
         "video_point_weight": None}


@pytest.mark.parametrize("name", list(TREES))
def test_trees_of_messages_become_the_published_tokens_and_weights(name, monkeypatch):
    info = json.load(open(os.path.join(GOLDEN, "message-tree", "info.json")))["examples"][name]
    arrays = np.load(os.path.join(GOLDEN, "message-tree", "arrays.npz"))
    planner = released_planner()
    planner.multi_tiles, sizes = 4, TREES[name]
    monkeypatch.setattr(data, "image_size", lambda path: sizes[int(os.path.basename(path))])
    monkeypatch.setattr(data, "video_duration", lambda path: 0.8)
    pictures = {"image": "0"} if sizes and len(sizes) == 1 else {"images": ["0", "1"]} if sizes else {}
    row = {"video": "x"} if sizes is None else pictures
    row["annotations"] = [dict(task="video_pointing" if info["weight"] else "image_qa", messages=[
        dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(chat)])
        for chat in info["conversations"]]
    (plan,), _ = planner.plan(row, ".", None)
    golden = lambda k: arrays[f"example/{name}/{k}"]
    assert np.array_equal(plan.tokens, golden("input_tokens"))
    assert np.array_equal(plan.pos, golden("position_ids"))
    assert np.allclose(plan.weights, golden("loss_weights_root_subsegments_root_tokens"))
    learn = plan.weights > 0
    assert np.array_equal(plan.targets[learn], golden("target_tokens")[learn])
    if info["has_subsegment_ids"]:
        assert np.array_equal(np.where(plan.branch == 0, 10000, plan.branch - 1), golden("subsegment_ids"))


@pytest.mark.parametrize("model_name", ["olmo3", "qwen3"])
@pytest.mark.parametrize("pack", ["packed_three", "packed_video_multi_image"])
def test_packed_rows_through_the_network(model_name, pack):
    folder = os.path.join(GOLDEN, "message-tree")
    arrays = np.load(os.path.join(folder, "arrays.npz"))
    x = read_safetensors(os.path.join(folder, f"{pack}_inputs.safetensors"))
    want = read_safetensors(os.path.join(folder, f"{pack}_{model_name}_outputs.safetensors"))
    model = Molmo2.from_pretrained(os.path.join(GOLDEN, f"molmo2-{model_name}-tiny"))
    sub = x["subsegment_ids"].long()
    example, branch = sub // 100000 + 1, sub % 100000 + 1
    branch[branch == 10001] = 0
    tokens, weights = x["input_ids"].long(), x["loss_weights"].float().clamp(min=0)
    allowed = np.unpackbits(arrays[f"{pack}/attn_allowed_packed"], axis=-1)[..., :tokens.shape[1]]
    assert np.array_equal(dense_mask(example, branch, is_vision(tokens, model.cfg.vocab))[:, 0].numpy(),
                          allowed)
    crops = next(v for k, v in x.items() if k.startswith("pixel_values"))
    ids = dict(crops=crops, pool=x["token_pooling"].long(), pos=x["position_ids"].long(), example=example,
               branch=branch)
    logits = model(tokens, **ids).detach()[0, want["loss_positions"].long()]
    assert float((logits - want["logits_at_loss_positions"]).abs().max()) <= 1e-4
    # The reference adds 1e-4 · (weighted z-loss) to the weighted cross-entropy and divides by the sum of
    # weights.
    labels = x["labels"].long()
    loss = model(tokens, **ids, targets=labels.clamp(min=0), weights=weights, z_loss=1e-4) / float(want["weight_sum"])
    assert abs(float(loss.detach()) - float(want["loss"])) <= 1e-5
    loss.backward()
    ours, checked = dict(model.named_parameters()), 0
    for key, g in want.items():
        if key.startswith("grad/"):
            name, _ = our_name(key.removeprefix("grad/"), olmo=False)
            assert float((ours[name].grad - g).abs().max()) <= 1e-4 * max(1.0, float(g.abs().max())), name
            checked += 1
    assert checked > 10


def test_the_tokenizer_of_olmo():
    tok = Tokenizer(shared("tokenizer", "dolma2-tokenizer.json"), 100278)
    assert tok.ids["<|im_start|>"] == 100264 and tok.ids["<|im_end|>"] == 100265 and tok.ids["<|endoftext|>"] == 100257
    assert tok.ids["<image>"] == 100280 and tok.ids["<frame_end>"] == 100286
    rng = np.random.default_rng(0)
    pools = [(32, 127), (160, 591), (0x4E00, 0x9FFF), (0x1F300, 0x1F64F), (0, 32), (0x600, 0x6FF),
             (0x10000, 0x10FFFF)]
    for _ in range(500):
        text = "".join(chr(c) for lo, hi in [pools[k] for k in rng.integers(0, len(pools), 12)]
                       for c in rng.integers(lo, hi, 3))
        assert tok.decode(tok.encode(text, special=())) == text


# ---- hostile files -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("part", ["header", "config", "index"])
def test_mutated_checkpoints_give_typed_errors(part, tmp_path):
    """1,200 mutations over three files: each loads or is refused by BadCheckpoint, never anything else."""
    folder = os.path.join(GOLDEN, "molmo2-qwen3-tiny", "hub")
    for f in ("config.json", "model.safetensors"):
        shutil.copy(os.path.join(folder, f), tmp_path)
    with open(tmp_path / "model.safetensors", "rb") as f:
        raw = f.read()
    length, rng, refused = int.from_bytes(raw[:8], "little"), np.random.default_rng(1), 0
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json"))
    config = (tmp_path / "config.json").read_bytes()
    Molmo2.from_pretrained(tmp_path)  # whole, it loads
    index = json.dumps({"weight_map": {"lm_head.weight": "model.safetensors", "x": "model.safetensors"}}).encode()
    snippets = [b"-1", b"99999999999999999999", b"null", b"[]", b"{}", b'"x"', b"1e999", b"true", b"0",
                b"\xff", b"[[[[", b'"../x"']

    def mutate(text):
        text = bytearray(text)
        for _ in range(rng.integers(1, 4)):
            at, kind = int(rng.integers(len(text))), rng.integers(4)
            if kind == 0:
                text[at] = rng.integers(256)
            elif kind == 1:
                del text[at:at + int(rng.integers(1, 40))]
            else:  # a value replaced by another
                numbers = [m.span() for m in re.finditer(rb"\d+|true|false|null", bytes(text))]
                a, b = numbers[rng.integers(len(numbers))] if numbers else (at, at)
                text[a:b] = snippets[rng.integers(len(snippets))]
        return bytes(text)

    for _ in range({"header": 500, "config": 500, "index": 200}[part]):
        if part == "header":
            header = mutate(raw[8:8 + length])
            said = len(header) if rng.random() < 0.8 else int(rng.integers(2 ** 40))
            body = said.to_bytes(8, "little") + header + raw[8 + length:]
            (tmp_path / "model.safetensors").write_bytes(body[:int(rng.integers(len(body)))]
                                                         if rng.random() < 0.1 else body)
        elif part == "config":
            (tmp_path / "config.json").write_bytes(mutate(config))
        else:
            (tmp_path / "model.safetensors.index.json").write_bytes(mutate(index))
        try:
            Molmo2.from_pretrained(tmp_path)
        except BadCheckpoint as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > 50


def test_asking_a_released_folder_about_a_picture_and_a_video(tmp_path, capsys, monkeypatch):
    for path in ("molmo2-qwen3-tiny/hub/config.json", "molmo2-qwen3-tiny/hub/model.safetensors",
                 "molmo2-inputs/tokenizer.json",
                 "molmo2-inputs/tokenizer_config.json"):
        shutil.copy(os.path.join(GOLDEN, path), tmp_path)
    model, planner = sample.load(str(tmp_path))
    assert planner.released and planner.cfg.point_format == "released" and planner.tokenizer.eos == 258
    for path in (os.path.join(GOLDEN, "image-preprocess", "tiny_60x40.png"), video(tmp_path / "clip.mp4")):
        monkeypatch.setattr("sys.argv", ["sample.py", str(tmp_path), path, "What?", "--max_new_tokens", "4"])
        sample.main()
        assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize("where, key, value", [
    ("text_config", "hidden_act", "relu"), ("text_config", "qkv_bias", True),
    ("adapter_config", "pooling_attention_mask", False),
    ("vit_config", "hidden_act", "gelu"), ("text_config", "num_key_value_heads", 3),
    ("text_config", "vocab_size", -1)])
def test_configs_that_ask_for_another_computation(where, key, value, tmp_path):
    folder = os.path.join(GOLDEN, "molmo2-qwen3-tiny", "hub")
    config = read_json(os.path.join(folder, "config.json"))
    config[where][key] = value
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        parse_config(config, "config.json")


def test_fine_tuning_a_released_checkpoint_keeps_its_ways(tmp_path, monkeypatch, capsys):
    """--init_from sets the grammar of points and the loss weights, and what is saved says so again."""
    folder = os.path.join(GOLDEN, "molmo2-qwen3-tiny", "hub")
    start = tmp_path / "released"
    shutil.copytree(folder, start)
    for f in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(GOLDEN, "molmo2-inputs", f), start)
    picture(str(tmp_path / "a.png"), "red")
    rows = write_lines(tmp_path / "rows.jsonl", [dict(image="a.png", annotations=[
        dict(task="image_pointing", label="dot", points=[dict(x=0.5, y=0.25, id=0)])])])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(pretrain.MODELS, "small",
                        parse_config(read_json(os.path.join(folder, "config.json")), "x"))
    seen = []
    monkeypatch.setattr(pretrain, "Planner", lambda *a: seen.append(Planner(*a)) or seen[-1])
    flags = ["--config", "small", "--mixture", "equal", "--data", rows, "--steps", "1", "--global_batch", "1",
             "--micro_batch",
             "1", "--workers", "0", "--init_from"]
    pretrain.main(pretrain.Config(), pretrain.PRESETS, [*flags, str(start)])
    assert seen[0].released and seen[0].token_weights == "released"
    saved = Molmo2.from_pretrained("out/small/pretrain/latest")
    assert saved.cfg.point_format == "released"
    assert Tokenizer("out/small/pretrain/latest/tokenizer.json", 264).eos == 258
    plan = seen[0].plan(json.loads(open(rows).read()), str(tmp_path), np.random.default_rng(0))[0][0]
    assert '<points coords="1 1 500 250">dot</points>' in seen[0].tokenizer.decode(plan.tokens.tolist())
    with pytest.raises(SystemExit):  # another shape than --config says
        pretrain.main(pretrain.Config(), pretrain.PRESETS, [*flags, os.path.join(GOLDEN, "olmo2-tiny"),
                                                            os.path.join(GOLDEN, "siglip-tiny")])
    assert "not of --config small" in capsys.readouterr().err
