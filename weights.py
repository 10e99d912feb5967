"""
Checkpoints in the published Molmo2 layout: safetensors and JSON, read and written by our own few lines.

A safetensors file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes.
It is memory-mapped, so loading holds the model and one tensor at a time, and nothing in it can run code.

Module names in model.py are those of the released files less a leading "model.", so the name map is one line.
"""
import json
import math
import os

import torch

from model import EXTRA, IMAGE, READ_ONLY, Molmo2, ModelConfig

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER = 100_000_000  # bytes; the same cap as the format's own library


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be used: the message is one line that names the file and the tensor or key."""


# ---- safetensors ----------------------------------------------------------------------------------------------------

def no_duplicates(pairs):
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key appears twice")
    return out


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f, object_pairs_hook=no_duplicates)
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as e:
        raise BadCheckpoint(f"{path}: not readable as JSON ({e})") from None
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path}: must hold a JSON object")
    return value


def write_json(path, value):
    """Write a JSON value and sync it to disk."""
    with open(path, "w") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())


def read_safetensors(path):
    """{name: tensor} of one file, memory-mapped: a tensor's bytes are read when it is copied from. BadCheckpoint otherwise."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(f.read(length).decode("utf-8"), object_pairs_hook=no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("header is not an object")
        header.pop("__metadata__", None)
        data = torch.from_file(path, shared=False, size=size, dtype=torch.uint8) if header else torch.empty(0)
        end, tensors = 0, {}
        for name, spec in sorted(header.items(), key=lambda kv: kv[1]["data_offsets"]):
            dtype, shape, (a, b) = DTYPES[spec["dtype"]], spec["shape"], spec["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in [*shape, a, b]):
                raise ValueError(f"{name}: negative or fractional shape or offset")
            if a != end or b - a != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name}: bytes {a} to {b} overlap, leave a gap or do not match shape {shape}")
            end, part = b, data[8 + length + a:8 + length + b]
            aligned = (8 + length + a) % dtype.itemsize == 0
            tensors[name] = (part if aligned else part.clone()).view(dtype).view(shape)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes, but the header accounts for {8 + length + end}: truncated or padded")
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as e:
        raise BadCheckpoint(f"{path}: not a sound safetensors file ({type(e).__name__}: {e})") from None
    return tensors


def write_safetensors(path, tensors):
    """Write {name: tensor} and sync it to disk. Tensors are written one at a time."""
    names, header, at = {v: k for k, v in DTYPES.items()}, {}, 0
    for name, t in tensors.items():
        n = t.numel() * t.element_size()
        header[name] = dict(dtype=names[t.dtype], shape=list(t.shape), data_offsets=[at, at + n])
        at += n
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        f.flush()
        os.fsync(f.fileno())


# ---- config.json ----------------------------------------------------------------------------------------------------

def hub_config(cfg):
    """ModelConfig -> the published config.json, with every key its other readers need."""
    rope = None
    if cfg.yarn:
        rope = dict(rope_type="yarn", factor=cfg.yarn["factor"], attention_factor=cfg.yarn["attention_factor"],
                    beta_fast=cfg.yarn["beta_fast"], beta_slow=cfg.yarn["beta_slow"],
                    original_max_position_embeddings=cfg.yarn["original"])
    ids = {name: cfg.vocab + k for k, name in enumerate(READ_ONLY)}
    last = max(cfg.vit_features) + 1
    declared = last + 2 if cfg.vit_features == (24, 18) else last  # SigLIP has 27 blocks, of which 25 are kept
    vit = dict(model_type="molmo2", hidden_size=cfg.vit_width, intermediate_size=cfg.vit_mlp, num_hidden_layers=declared,
               num_attention_heads=cfg.vit_heads, num_key_value_heads=cfg.vit_heads, head_dim=cfg.vit_head_dim,
               hidden_act="gelu_pytorch_tanh", layer_norm_eps=cfg.vit_eps, image_default_input_size=[cfg.crop, cfg.crop],
               image_patch_size=cfg.patch, image_num_pos=cfg.patches, float32_attention=True)
    adapter = dict(model_type="molmo2", vit_layers=[i - declared for i in cfg.vit_features], pooling_attention_mask=True,
                   hidden_size=cfg.vit_heads * cfg.vit_head_dim, num_attention_heads=cfg.vit_heads,
                   num_key_value_heads=cfg.vit_heads, head_dim=cfg.vit_head_dim, float32_attention=True, hidden_act="silu",
                   intermediate_size=cfg.projector_mlp, text_hidden_size=cfg.width)
    text = dict(model_type="molmo2_text", hidden_size=cfg.width, num_attention_heads=cfg.heads,
                num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim, vocab_size=cfg.vocab, additional_vocab_size=EXTRA,
                qkv_bias=False, num_hidden_layers=cfg.layers, intermediate_size=cfg.mlp, hidden_act="silu",
                max_position_embeddings=cfg.max_positions, rope_theta=cfg.rope_theta, rope_scaling=rope,
                rope_scaling_layers=list(cfg.yarn_layers) or None, use_qk_norm=cfg.qk_norm != "none",
                qk_norm_type="olmo" if cfg.qk_norm == "full" else "qwen3", layer_norm_eps=cfg.eps,
                norm_after=cfg.norm_after, tie_word_embeddings=cfg.tie)
    return dict(model_type="molmo2", architectures=["Molmo2ForConditionalGeneration"], torch_dtype="float32",
                tie_word_embeddings=cfg.tie, use_frame_special_tokens=True, image_start_token_id=ids["<image_start>"],
                image_end_token_id=ids["<image_end>"], image_patch_id=ids["<image>"], image_col_id=ids["<image_col>"],
                image_high_res_id=ids["<image>"], image_low_res_id=ids["<image_low>"],
                low_res_image_start_token_id=ids["<low_res_image_start>"], frame_start_token_id=ids["<frame_start>"],
                frame_end_token_id=ids["<frame_end>"], vit_config=vit, adapter_config=adapter, text_config=text)


def parse_config(config, path):
    """A published config.json (old keys: vit_config, rope_theta; new keys: vision_config, rope_parameters) -> ModelConfig."""
    try:
        text, adapter = config["text_config"], config["adapter_config"]
        vit = config.get("vit_config") or config["vision_config"]
        layers = adapter.get("vit_layers") or adapter["vision_feature_layer"]
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        yarn = None
        if rope.get("rope_type", "default") == "yarn":
            yarn = dict(factor=rope["factor"], original=rope["original_max_position_embeddings"],
                        beta_fast=rope.get("beta_fast", 32.0), beta_slow=rope.get("beta_slow", 1.0),
                        attention_factor=rope.get("attention_factor") or 0.1 * math.log(rope["factor"]) + 1)
        elif rope.get("rope_type", "default") != "default":
            raise BadCheckpoint(f"{path}: rope type {rope['rope_type']!r} is not known here")
        every = tuple(range(text["num_hidden_layers"]))
        side = vit.get("image_default_input_size") or vit["image_size"]
        cfg = ModelConfig(
            layers=text["num_hidden_layers"], width=text["hidden_size"], heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"], head_dim=text["head_dim"], mlp=text["intermediate_size"],
            projector_mlp=adapter["intermediate_size"],
            vocab=text["vocab_size"], norm_after=bool(text["norm_after"]),
            qk_norm={"olmo": "full", "qwen3": "head"}[text["qk_norm_type"]] if text.get("use_qk_norm", True) else "none",
            eps=text.get("layer_norm_eps") or text["rms_norm_eps"], rope_theta=text.get("rope_theta") or rope["rope_theta"],
            yarn=yarn, yarn_layers=tuple(text.get("rope_scaling_layers") or every) if yarn else (),
            tie=bool(text.get("tie_word_embeddings")), max_positions=text["max_position_embeddings"],
            crop=side[0], patch=vit.get("image_patch_size") or vit["patch_size"], vit_width=vit["hidden_size"],
            vit_heads=vit["num_attention_heads"], vit_head_dim=vit["head_dim"], vit_mlp=vit["intermediate_size"],
            vit_eps=vit["layer_norm_eps"], vit_features=tuple(i % vit["num_hidden_layers"] for i in layers))
    except (KeyError, TypeError, IndexError, AttributeError) as e:
        raise BadCheckpoint(f"{path}: key missing or of the wrong kind ({type(e).__name__}: {e})") from None
    for key, value, want in (("additional_vocab_size", text.get("additional_vocab_size", EXTRA), EXTRA),
                             ("adapter_config.text_hidden_size", adapter["text_hidden_size"], cfg.width),
                             ("image_patch_id", config.get("image_patch_id", cfg.vocab + IMAGE), cfg.vocab + IMAGE)):
        if value != want:
            raise BadCheckpoint(f"{path}: {key} is {value}, expected {want}")
    return cfg


# ---- models ---------------------------------------------------------------------------------------------------------

def our_name(name):
    return name[len("model."):] if name.startswith("model.") else name


def their_name(name):
    return name if name.startswith("lm_head.") else "model." + name


def read_shards(folder):
    """All tensors of a folder, one file or several with an index, each mapped and not yet read."""
    index = os.path.join(folder, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if os.path.exists(index):
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(f, str) and os.path.basename(f) == f for f in names.values()):
            raise BadCheckpoint(f"{index}: weight_map must map tensors to file names in this folder")
        files = sorted(set(names.values()))
    tensors = {}
    for f in files:
        for name, t in read_safetensors(os.path.join(folder, f)).items():
            if our_name(name) in tensors:
                raise BadCheckpoint(f"{os.path.join(folder, f)}: tensor {name} appears twice")
            tensors[our_name(name)] = t
    return tensors


def load(folder):
    """The model of a checkpoint folder, in fp32 on the CPU."""
    cfg = parse_config(read_json(os.path.join(folder, "config.json")), os.path.join(folder, "config.json"))
    with torch.device("meta"):
        model = Molmo2(cfg)
    fill(model, read_shards(folder), folder)
    return model.eval()


def fill(model, tensors, folder):
    """Give every parameter its tensor; missing, unknown and misshapen ones are an error before anything is changed."""
    wanted = dict(model.named_parameters(remove_duplicate=False))
    if model.cfg.tie:
        tensors.pop("lm_head.weight", None)
        wanted.pop("lm_head.weight")
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unknown:
        some = lambda names: ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise BadCheckpoint(f"{folder}: " + "; ".join(
            text for text in (missing and f"no tensor for {some(missing)}", unknown and f"unknown tensor {some(unknown)}") if text))
    for name, p in wanted.items():
        if tensors[name].shape != p.shape:
            raise BadCheckpoint(f"{folder}: {name} is {tuple(tensors[name].shape)}, the model needs {tuple(p.shape)}")
    model.load_state_dict({n: tensors[n].to(torch.float32, copy=True) for n in wanted}, strict=False, assign=True)
    if model.cfg.tie:
        model.lm_head.weight = model.transformer.wte.embedding


def save(model, folder):
    """config.json and model.safetensors of `model` in `folder`, in the released names."""
    os.makedirs(folder, exist_ok=True)
    state = {their_name(n): p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    write_safetensors(os.path.join(folder, "model.safetensors"), state)
    write_json(os.path.join(folder, "config.json"), hub_config(model.cfg))
