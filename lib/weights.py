"""
Checkpoints in the published Molmo2 layout: safetensors and JSON, read and written without another library.

    folder/config.json        ─► parse_config ─► ModelConfig ─► an empty Molmo2 ─┐
    folder/*.safetensors      ─► our_name     ─► {our name: tensor} ─────────────┴─► fill ─► the model

A safetensors file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors'
bytes. It is memory-mapped, so loading holds the model in its final type and a part of one tensor, and nothing in it
can run code.

Module names in model.py are those of the released files without the leading "model."; names in other schemes are
mapped to them.
"""
import json
import math
import mmap
import os
import re
import weakref

import torch

from lib.errors import BadCheckpoint, UserError
from lib.progress import progress
from model import EXTRA, IMAGE, ModelConfig, READ_ONLY, empty_model


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
MAX_HEADER = 100_000_000  # bytes; the same cap as the format's own library
MAX_LAYERS = 1000
QUANTISED = "quantised weights are not read here: take the original, in bf16 or fp32"
MAPPED = weakref.WeakSet()  # the files that are memory-mapped now


# ---- safetensors -------------------------------------------------------------------------------------------

def no_duplicates(pairs):
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key appears twice")
    return out


def refuse_pointer(start):
    """A clone made without Git LFS has a few lines of text in place of a large file. start: its first bytes."""
    if start.startswith(b"version "):
        raise ValueError("a Git LFS pointer, not the file itself: run `git lfs pull`, or download it again")


def read_json(path):
    try:
        with open(path, "rb") as f:
            text = f.read()
        refuse_pointer(text)
        value = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
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
    """{name: tensor} of one file, memory-mapped: a tensor's bytes are read when it is copied. BadCheckpoint where the
    header and the bytes do not fit together."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            start = f.read(8)
            refuse_pointer(start)
            length = int.from_bytes(start, "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(f.read(length).decode("utf-8"), object_pairs_hook=no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("header is not an object")
        header.pop("__metadata__", None)
        if header:
            with open(path, "rb") as f:
                mapped = mmap.mmap(f.fileno(), size, access=mmap.ACCESS_COPY)
            MAPPED.add(mapped)
            data = torch.frombuffer(mapped, dtype=torch.uint8)
        tensors = {}
        end = 0  # of the tensor before: together they must fill the file, without a gap or an overlap
        for name, spec in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if spec["dtype"] not in DTYPES:
                raise ValueError(f"{name} is of type {spec['dtype']!r}, not {', '.join(DTYPES)}; {QUANTISED}")
            dtype, shape = DTYPES[spec["dtype"]], spec["shape"]
            first, last = spec["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in [*shape, first, last]):
                raise ValueError(f"{name}: negative or fractional shape or offset")
            if first != end or last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name}: bytes {first} to {last} overlap, leave a gap or do not fit shape {shape}")
            end = last
            part = data[8 + length + first:8 + length + last]
            aligned = (8 + length + first) % dtype.itemsize == 0  # or view() refuses it
            tensors[name] = (part if aligned else part.clone()).view(dtype).view(shape)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes, but the header accounts for {8 + length + end}: truncated or padded")
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as e:
        raise BadCheckpoint(f"{path}: not readable as safetensors ({type(e).__name__}: {e})") from None
    return tensors


def forget_pages():
    """Give the memory back that holds what was read of mapped files: to the system it is this process's own, and
    would stand beside the copies. What is read again comes from the file again."""
    for mapped in MAPPED:
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            mapped.madvise(mmap.MADV_DONTNEED)


def copy_of(tensors, dtype, most=1 << 22):
    """A copy of tensors of a mapped file, one above the other, as one of a type. `most` numbers are read at a time."""
    out = torch.empty(sum(map(len, tensors)), *tensors[0].shape[1:], dtype=dtype)
    begin = 0
    for t in tensors:
        for rows in t.split(max(most // max(t[:1].numel(), 1), 1)):
            out[begin:begin + len(rows)] = rows
            begin += len(rows)
            forget_pages()
    return out


def write_safetensors(path, tensors):
    """Write {name: tensor} and sync it to disk. Tensors are written one at a time."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, offset = {}, 0
    for name, t in tensors.items():
        end = offset + t.numel() * t.element_size()
        header[name] = dict(dtype=names[t.dtype], shape=list(t.shape), data_offsets=[offset, end])
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in progress(tensors.values(), f"tensors of {path} written"):
            f.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        f.flush()
        os.fsync(f.fileno())


# ---- config.json -------------------------------------------------------------------------------------------

def hub_config(cfg):
    """ModelConfig -> the published config.json, with every key its other readers need."""
    rope = None
    if cfg.yarn:
        rope = dict(rope_type="yarn", factor=cfg.yarn["factor"],
                    attention_factor=cfg.yarn["attention_factor"], beta_fast=cfg.yarn["beta_fast"],
                    beta_slow=cfg.yarn["beta_slow"], original_max_position_embeddings=cfg.yarn["original"])
    ids = {name: cfg.vocab + k for k, name in enumerate(READ_ONLY)}
    last = max(cfg.vit_features) + 1
    # SigLIP has 27 blocks, of which 25 are kept
    declared = last + 2 if cfg.vit_features == (24, 18) else last
    vit = dict(model_type="molmo2", hidden_size=cfg.vit_width, intermediate_size=cfg.vit_mlp,
               num_hidden_layers=declared, num_attention_heads=cfg.vit_heads,
               num_key_value_heads=cfg.vit_heads, head_dim=cfg.vit_head_dim,
               hidden_act="gelu_pytorch_tanh", layer_norm_eps=cfg.vit_eps,
               image_default_input_size=[cfg.crop, cfg.crop], image_patch_size=cfg.patch,
               image_num_pos=cfg.patches, float32_attention=True)
    adapter = dict(model_type="molmo2", vit_layers=[i - declared for i in cfg.vit_features],
                   pooling_attention_mask=True, hidden_size=cfg.vit_heads * cfg.vit_head_dim,
                   num_attention_heads=cfg.vit_heads, num_key_value_heads=cfg.vit_heads,
                   head_dim=cfg.vit_head_dim, float32_attention=True, hidden_act="silu",
                   intermediate_size=cfg.projector_mlp, text_hidden_size=cfg.width)
    text = dict(model_type="molmo2_text", hidden_size=cfg.width, num_attention_heads=cfg.heads,
                num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim, vocab_size=cfg.vocab,
                additional_vocab_size=EXTRA, qkv_bias=False, num_hidden_layers=cfg.layers,
                intermediate_size=cfg.mlp, hidden_act="silu", max_position_embeddings=cfg.max_positions,
                rope_theta=cfg.rope_theta, rope_scaling=rope,
                rope_scaling_layers=list(cfg.yarn_layers) if cfg.yarn else None, use_qk_norm=cfg.qk_norm != "none",
                qk_norm_type="olmo" if cfg.qk_norm == "full" else "qwen3", layer_norm_eps=cfg.eps,
                norm_after=cfg.norm_after, tie_word_embeddings=cfg.tie)
    return dict(model_type="molmo2", architectures=["Molmo2ForConditionalGeneration"], torch_dtype="float32",
                tie_word_embeddings=cfg.tie, use_frame_special_tokens=cfg.frame_tokens,
                image_start_token_id=ids["<image_start>"], image_end_token_id=ids["<image_end>"],
                image_patch_id=ids["<image>"], image_col_id=ids["<image_col>"],
                image_high_res_id=ids["<image>"], image_low_res_id=ids["<image_low>"],
                low_res_image_start_token_id=ids["<low_res_image_start>"],
                frame_start_token_id=ids["<frame_start>"], frame_end_token_id=ids["<frame_end>"],
                point_format=cfg.point_format, vit_config=vit, adapter_config=adapter,
                text_config=text)


def processor_configs(cfg, frames=384, tiles=8):
    """{file name: contents}: what other readers need to cut images and videos into crops as in training, at most
    `frames` of a video. tiles: of an image; none is written as one, the least that they can handle."""
    margin = round(cfg.crop / cfg.patch * 4 / 27)
    pixels = dict(size=dict(height=cfg.crop, width=cfg.crop), patch_size=cfg.patch, do_resize=True,
                  resample=2, do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
                  image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True)
    return {"preprocessor_config.json": dict(pixels, image_processor_type="Molmo2ImageProcessor",
                                             max_crops=max(tiles, 1), overlap_margins=[margin, margin],
                                             pooling_size=[2, 2]),
            "video_preprocessor_config.json": dict(pixels, video_processor_type="Molmo2VideoProcessor",
                                                   pooling_size=[3, 3], max_fps=2, num_frames=frames,
                                                   do_sample_frames=True, sampling_fps=2,
                                                   frame_sample_mode="uniform_last_frame"),
            "processor_config.json": dict(LAYOUT, processor_class="Molmo2Processor",
                                          use_frame_special_tokens=cfg.frame_tokens)}


# Keys that may have this value alone: model.py computes these things in one way.
FIXED = {"text": dict(hidden_act="silu", attention_bias=False, qkv_bias=False, mlp_bias=False,
                      additional_vocab_size=EXTRA, clip_qkv=None, scale_logits=False,
                      normalize_input_embeds=False, use_sliding_window=False),
         "rope": dict(truncate=True, mscale=None, mscale_all_dim=None, partial_rotary_factor=1.0),
         "vision": dict(hidden_act="gelu_pytorch_tanh", attention_bias=True, num_channels=3),
         "adapter": dict(hidden_act="silu", pooling_attention_mask=True, image_padding_embed=None,
                         attention_bias=True, mlp_bias=False)}
# The tokens around and inside an image, as data.py and lib/media.py write them.
LAYOUT = dict(use_single_crop_start_token=True, use_single_crop_col_tokens=False, image_use_col_tokens=True,
              video_use_col_tokens=False)
LANGUAGE_MODELS = ("olmo2", "olmo3", "qwen3")
# The published config of a SigLIP names only what is not its class's default; these are the defaults.
SIGLIP = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
              patch_size=16, layer_norm_eps=1e-6)
SIGLIP_TYPES = ("siglip", "siglip_vision_model")


def check_fixed(part, config, path):
    for key, want in FIXED[part].items():
        if config.get(key, want) != want:
            raise BadCheckpoint(f"{path}: {part} {key} is {config[key]!r}; only {want!r} is computed here")


def parse_yarn(rope, text, path):
    """RoPE settings of the config `text` -> the `yarn` of ModelConfig, or None for plain RoPE."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise BadCheckpoint(f"{path}: rope type {kind!r} is not known here")
    check_fixed("rope", rope, path)
    return dict(factor=rope["factor"],
                original=rope.get("original_max_position_embeddings") or text["max_position_embeddings"],
                beta_fast=rope.get("beta_fast", 32.0), beta_slow=rope.get("beta_slow", 1.0),
                attention_factor=rope.get("attention_factor") or 0.1 * math.log(rope["factor"]) + 1)


def parse_text(text, path):
    """The language half of ModelConfig, from the text_config of a Molmo2 or the config of a plain OLMo-2,
    OLMo-3 or Qwen3."""
    check_fixed("text", text, path)
    kind = text.get("model_type")
    n = text["num_hidden_layers"]
    if type(n) is not int or not 0 < n < MAX_LAYERS:  # check_sizes would say so, but lists of n entries come before it
        raise BadCheckpoint(f"{path}: num_hidden_layers is {n!r}")
    types = text.get("layer_types")
    if not types:  # the classes' own pattern: in OLMo-3 every fourth layer sees everything, elsewhere each does
        types = ["sliding_attention" if kind == "olmo3" and i % 4 != 3 else "full_attention" for i in range(n)]
    full = tuple(i for i, t in enumerate(types) if t == "full_attention")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta = text.get("rope_theta") or rope.get("rope_theta")
    if "full_attention" in rope:  # transformers 5 lists OLMo-3's two kinds of layer separately
        rope = rope["full_attention"]
        theta = rope["rope_theta"]
    yarn = parse_yarn(rope, text, path)
    stretched = text.get("rope_scaling_layers")
    if stretched is None:  # YaRN belongs to the layers that see everything
        stretched = full
    if kind in LANGUAGE_MODELS:
        norm_after = kind != "qwen3"
        qk_norm = "head" if kind == "qwen3" else "full"
    else:
        norm_after = bool(text["norm_after"])
        qk_norm = {"olmo": "full", "qwen3": "head"}[text["qk_norm_type"]] if text.get("use_qk_norm", True) else "none"
    heads = text["num_attention_heads"]
    window = text.get("sliding_window", 4096 if kind == "olmo3" else None) if len(full) < n else None
    return dict(layers=n, width=text["hidden_size"], heads=heads,
                kv_heads=text.get("num_key_value_heads") or heads,
                head_dim=text.get("head_dim") or text["hidden_size"] // heads, mlp=text["intermediate_size"],
                vocab=text["vocab_size"], norm_after=norm_after, qk_norm=qk_norm,
                eps=text.get("layer_norm_eps") or text["rms_norm_eps"], rope_theta=theta or 1e4, yarn=yarn,
                yarn_layers=tuple(stretched) if yarn else (),
                window=window or 0,
                window_layers=tuple(i for i in range(n) if i not in full) if window else (),
                tie=bool(text.get("tie_word_embeddings")), max_positions=text["max_position_embeddings"])


def parse_vision(vit, path):
    """The vision half of ModelConfig, without `vit_features`."""
    check_fixed("vision", vit, path)
    side = vit.get("image_default_input_size") or vit["image_size"]
    side = side if isinstance(side, int) else side[0]
    patch = vit.get("image_patch_size") or vit["patch_size"]
    return dict(crop=side // patch * patch, patch=patch, vit_width=vit["hidden_size"],
                vit_mlp=vit["intermediate_size"], vit_heads=vit["num_attention_heads"],
                vit_eps=vit.get("layer_norm_eps", 1e-6),  # published files leave out what equals the default
                vit_head_dim=vit.get("head_dim") or vit["hidden_size"] // vit["num_attention_heads"])


def check_sizes(fields, path):
    """Refuse fields of a ModelConfig that no machine could hold or that do not fit each other."""
    for key, value in fields.items():
        kind = ModelConfig.__dataclass_fields__[key].type
        fine = True
        if kind is int:
            least = 0 if key == "window" else 1
            top = MAX_LAYERS if key == "layers" else 2 ** 26
            fine = type(value) is int and least <= value < top
        elif kind is float:
            fine = isinstance(value, (int, float)) and 0 < value < 1e12
        elif kind is tuple:  # numbers of blocks
            top = fields["layers"] if key.endswith("_layers") else 100
            fine = all(type(i) is int and 0 <= i < top for i in value)
        elif kind is bool:
            fine = type(value) is bool
        elif kind is str:
            fine = value in ("spec", "released", "full", "head", "none")
        if not fine:
            raise BadCheckpoint(f"{path}: {key} of the model would be {value!r}")
    heads, kv_heads, head_dim, blocks = (fields[k] for k in ("heads", "kv_heads", "head_dim", "vit_features"))
    if heads % kv_heads or head_dim % 2 or not blocks:
        raise BadCheckpoint(f"{path}: {heads} heads, {kv_heads} key/value heads of {head_dim} and ViT blocks "
                            f"{blocks} make no model")


def parse_layout(config, processor, path):
    """Whether video frames stand between tokens of their own, as config.json or the processor_config.json beside it
    says. Refused: files that differ, and another layout of images than LAYOUT."""
    beside = os.path.join(os.path.dirname(path), "processor_config.json")
    frames = "use_frame_special_tokens"
    for key in (*LAYOUT, frames):
        if key in config and config[key] != processor.get(key, config[key]):
            raise BadCheckpoint(f"{beside}: {key} is {processor[key]}, but {config[key]} in config.json: correct the "
                                "one that is not of these weights")
    flags = config | processor
    for key, want in LAYOUT.items():
        if flags.get(key, want) is not want:
            file = beside if key in processor else path
            kind = "MolmoWeb's layout, trained with causal attention" if "start" in key else "another layout"
            raise BadCheckpoint(f"{file}: {key} is {flags[key]}: {kind} of images; only Molmo2's is computed here")
    return flags.get(frames, True)


def check_kind(config, path):
    """Refuse by name what is not computed here."""
    kind = config.get("model_type", "molmo2")
    if kind not in ("molmo2", *LANGUAGE_MODELS):
        why = ", a MolmoPoint, which points by choosing patches" if kind == "molmo_point" else ""
        raise BadCheckpoint(f"{path}: model_type is {kind!r}{why}; molmo2, {', '.join(LANGUAGE_MODELS)} are read here")
    for key in ("quantization_config", "quantization"):
        if config.get(key) or config.get("text_config", {}).get(key):
            raise BadCheckpoint(f"{path}: has a {key}; {QUANTISED}")


def parse_config(config, path, vision=None, processor=None):
    """config.json -> ModelConfig: of a Molmo2 (with vit_config, rope_theta or, newer, vision_config,
    rope_parameters) with the processor_config.json beside it, if there is one, or of a plain language model together
    with `vision`, the config of a SigLIP."""
    try:
        check_kind(config, path)
        if config.get("model_type") in LANGUAGE_MODELS:
            vision = vision.get("vision_config", vision)
            if vision.get("model_type", "siglip") not in SIGLIP_TYPES:  # "siglip2" alone: images of any shape
                raise BadCheckpoint(f"{path}: the second folder's vision model is a {vision['model_type']!r}, not a "
                                    f"{' or '.join(SIGLIP_TYPES)}")
            vision = SIGLIP | vision
            # SigLIP 2 so400m gives blocks 24 and 18 of 27; a small one its last and middle
            n = vision["num_hidden_layers"]
            fields = dict(parse_text(config, path), **parse_vision(vision, path))
            fields.update(projector_mlp=fields["mlp"], vit_features=(24, 18) if n == 27 else (n - 1, n // 2))
        else:
            text, adapter = config["text_config"], config["adapter_config"]
            vit = config.get("vit_config") or config["vision_config"]
            check_fixed("adapter", adapter, path)
            layers = adapter.get("vit_layers") or adapter["vision_feature_layer"]
            fields = dict(parse_text(text, path), **parse_vision(vit, path))
            fields.update(tie=fields["tie"] or bool(config.get("tie_word_embeddings")),  # transformers 5: here alone
                          projector_mlp=adapter["intermediate_size"],
                          vit_features=tuple(i % vit["num_hidden_layers"] for i in layers),
                          # only files written here have this key
                          point_format=config.get("point_format", "released"),
                          frame_tokens=parse_layout(config, processor or {}, path))
            image_token = fields["vocab"] + IMAGE
            expected = (("adapter_config.text_hidden_size", adapter["text_hidden_size"], fields["width"]),
                        ("image_patch_id", config.get("image_patch_id", image_token), image_token))
            for key, value, right in expected:
                if value != right:
                    raise BadCheckpoint(f"{path}: {key} is {value}, expected {right}")
        check_sizes(fields, path)
        return ModelConfig(**fields)
    except BadCheckpoint:
        raise
    except KeyError as e:
        raise BadCheckpoint(f"{path}: key missing: {e}") from None
    except (TypeError, IndexError, AttributeError, ValueError, ZeroDivisionError, OverflowError) as e:
        raise BadCheckpoint(f"{path}: key missing or of the wrong kind ({type(e).__name__}: {e})") from None


# ---- names of tensors in five schemes ----------------------------------------------------------------------
#
#   released (hub)        model.transformer.blocks.0.self_attn.att_proj.weight    ours, with "model." in front
#   official training     transformer.blocks.0.att_proj.weight                    no level self_attn or mlp
#   transformers          model.language_model.layers.0.self_attn.q_proj.weight   q, k, v, up, gate each alone
#   plain OLMo and Qwen3  model.layers.0.self_attn.q_proj.weight
#   SigLIP                vision_model.encoder.layers.0.self_attn.q_proj.weight

LANGUAGE_LAYER = {  # their name -> ours, and which part of a fused matrix it is
    "self_attn.q_proj": ("self_attn.att_proj", 0), "self_attn.k_proj": ("self_attn.att_proj", 1),
    "self_attn.v_proj": ("self_attn.att_proj", 2), "self_attn.o_proj": ("self_attn.attn_out", 0),
    "self_attn.q_norm": ("self_attn.q_norm", 0), "self_attn.k_norm": ("self_attn.k_norm", 0),
    "mlp.up_proj": ("mlp.ff_proj", 0), "mlp.gate_proj": ("mlp.ff_proj", 1),
    "mlp.down_proj": ("mlp.ff_out", 0), "input_layernorm": ("attn_norm", 0),
    "post_attention_layernorm": ("ff_norm", 0)}
OLMO_NORMS = {"post_attention_layernorm": ("attn_norm", 0), "post_feedforward_layernorm": ("ff_norm", 0)}
VISION_LAYER = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
                "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
                "self_attn.out_proj": "attention.wo", "mlp.fc1": "feed_forward.w1",
                "mlp.fc2": "feed_forward.w2", "layer_norm1": "attention_norm", "layer_norm2": "ffn_norm"}
CONNECTOR = {"image_pooling_2d.q_proj": "image_pooling_2d.wq",
             "image_pooling_2d.k_proj": "image_pooling_2d.wk",
             "image_pooling_2d.v_proj": "image_pooling_2d.wv",
             "image_pooling_2d.o_proj": "image_pooling_2d.wo",
             "image_projector.gate_proj": "image_projector.w1",
             "image_projector.down_proj": "image_projector.w2",
             "image_projector.up_proj": "image_projector.w3"}
SINGLE = {"embed_tokens.weight": "transformer.wte.embedding", "norm.weight": "transformer.ln_f.weight",
          "transformer.ff_out.weight": "lm_head.weight",
          "vision_tower.patch_embedding.weight": "vision_backbone.image_vit.patch_embedding.weight",
          "vision_tower.patch_embedding.bias": "vision_backbone.image_vit.patch_embedding.bias",
          "vision_tower.positional_embedding": "vision_backbone.image_vit.positional_embedding",
          "embeddings.patch_embedding.weight": "vision_backbone.image_vit.patch_embedding.weight",
          "embeddings.patch_embedding.bias": "vision_backbone.image_vit.patch_embedding.bias",
          "embeddings.position_embedding.weight": "vision_backbone.image_vit.positional_embedding"}
# A SigLIP checkpoint also holds a text tower, a last norm and a pooling head, which Molmo2 does not use. Some writers
# keep tables that follow from the config: frequencies of RoPE, numbers of positions.
UNUSED = re.compile(r"text_model\..*|logit_(scale|bias)|(vision_model\.)?(post_layernorm|head)\..*"
                    r"|(.*\.)?((original_)?inv_freq|position_ids)")


def our_name(name, olmo):
    """A tensor's name in any scheme -> (our name, which part of a fused matrix). olmo: norms follow the sub-layers,
    and post_attention_layernorm means another norm than in Qwen3."""
    name = re.sub(r"^(model\.)?(language_model\.|vision_model\.)?", "", name)
    if m := re.fullmatch(r"transformer\.blocks\.(\d+)\.(att_proj|attn_out|q_norm|k_norm|ff_proj|ff_out)\.weight", name):
        level = "mlp" if m[2].startswith("ff") else "self_attn"
        return f"transformer.blocks.{m[1]}.{level}.{m[2]}.weight", 0
    if m := re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name):
        ours, slot = (LANGUAGE_LAYER | (OLMO_NORMS if olmo else {})).get(m[2], (m[2], 0))
        return f"transformer.blocks.{m[1]}.{ours}.weight", slot
    if m := re.fullmatch(r"(?:vision_tower|encoder)\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        return f"vision_backbone.image_vit.transformer.resblocks.{m[1]}.{VISION_LAYER.get(m[2], m[2])}.{m[3]}", 0
    if m := re.fullmatch(r"multi_modal_projector\.(.+)\.(weight|bias)", name):
        return f"vision_backbone.{CONNECTOR.get(m[1], m[1])}.{m[2]}", 0
    return SINGLE.get(name, name), 0


def read_shards(folder):
    """{our name: {part: tensor}} of a folder with one file, or several and an index. Memory-mapped, not read yet."""
    index = os.path.join(folder, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if os.path.exists(index):
        listed = read_json(index).get("weight_map")
        is_name = lambda file: isinstance(file, str) and os.path.basename(file) == file
        if not isinstance(listed, dict) or not all(map(is_name, listed.values())):
            raise BadCheckpoint(f"{index}: weight_map must map tensors to file names in this folder")
        files = sorted(set(listed.values()))
    shards = {}
    names = []
    for file in files:
        shards[file] = read_safetensors(os.path.join(folder, file))
        names.extend(shards[file])
    olmo = any(name.endswith("post_feedforward_layernorm.weight") for name in names)
    found = {}
    for file, shard in shards.items():
        for name, t in shard.items():
            if UNUSED.fullmatch(name):
                continue
            ours, part = our_name(name, olmo)
            if part in found.setdefault(ours, {}):
                raise BadCheckpoint(f"{os.path.join(folder, file)}: tensor {name} appears twice")
            if t.ndim == 4:  # SigLIP's convolution over patches; here it is a matrix on flattened ones
                t = t.permute(0, 2, 3, 1).flatten(1)  # (D, channel, row, column) -> (D, row · column · channel)
            found[ours][part] = t
    return found


# ---- models ------------------------------------------------------------------------------------------------

def pick_device(device="auto", dtype="auto"):
    """(device, torch's dtype) of the flags: "auto" is CUDA if there is a card, and bf16 on one that computes in it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rank = os.environ.get("LOCAL_RANK")  # torchrun's: each rank has a card of its own, and takes no memory of another
    try:
        torch.zeros(1, device=f"cuda:{rank}" if device == "cuda" and rank else device)
    except (RuntimeError, AssertionError) as e:  # torch's own words for a device that is not there
        raise UserError(f"--device {device}: {str(e).splitlines()[0]}; --device cpu works everywhere") from None
    if dtype == "auto":
        has_bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bf16" if has_bf16 else "fp32"
    return device, dict(fp32=torch.float32, bf16=torch.bfloat16)[dtype]


def load(folder, vision=None, dtype=torch.float32):
    """The model of a checkpoint folder, of a type, on the CPU. A plain OLMo-2, OLMo-3 or Qwen3 needs `vision`, a SigLIP
    folder, beside it; the connector and the new embedding rows are then random."""
    path = os.path.join(folder, "config.json")
    config = read_json(path)
    is_plain = config.get("model_type") in LANGUAGE_MODELS
    if is_plain and not vision:
        raise BadCheckpoint(f"{path}: a plain language model sees nothing; name a SigLIP folder after it")
    if vision and not is_plain:
        raise BadCheckpoint(f"{path}: model_type is {config.get('model_type')!r}; only after "
                            f"{', '.join(LANGUAGE_MODELS)} does a second folder make sense")
    vision_config = read_json(os.path.join(vision, "config.json")) if is_plain else None
    beside = os.path.join(folder, "processor_config.json")
    cfg = parse_config(config, path, vision_config, read_json(beside) if os.path.exists(beside) else {})
    found = read_shards(folder)
    if is_plain:
        found |= vision_tensors(vision, max(cfg.vit_features) + 1)
    model = empty_model(cfg)
    is_new = lambda name: name.endswith("new_embedding") or "image_pooling" in name or "projector" in name
    new = [name for name, _ in model.named_parameters() if is_plain and is_new(name)]
    fill(model, found, folder, new, dtype)
    return model.eval()


def vision_tensors(folder, n_blocks):
    """`read_shards` of a SigLIP folder without the blocks that Molmo2 leaves out: the last two of so400m's 27."""
    found = {}
    for name, parts in read_shards(folder).items():
        block = re.match(r"vision_backbone\.image_vit\.transformer\.resblocks\.(\d+)\.", name)
        if not block or int(block[1]) < n_blocks:
            found[name] = parts
    return found


def fill(model, found, folder, new=(), dtype=torch.float32):
    """Give every parameter of a model on the meta device its tensor, in a type, and those named in `new` random
    values. Missing, unknown and misshapen tensors are an error before anything is changed."""
    cfg = model.cfg
    wanted = dict(model.named_parameters(remove_duplicate=False))
    split_embedding(found, cfg, folder, new)
    if cfg.tie and has_own_head(found):
        cfg.tie = False
    if cfg.tie:
        found.pop("lm_head.weight", None)
        wanted.pop("lm_head.weight")
    check_names(wanted, found, folder, new)
    pieces = {}  # name -> the tensors that make it up, in order
    for name, parts in found.items():
        tensors = [parts[part] for part in sorted(parts)]
        pieces[name] = tensors
        shapes = [tuple(t.shape) for t in tensors]
        fused = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if all(shapes) else ()
        if fused != wanted[name].shape or any(shape[1:] != fused[1:] for shape in shapes):
            raise BadCheckpoint(f"{folder}: {name} is {fused}, the model needs {tuple(wanted[name].shape)}")
    read = progress(pieces.items(), f"tensors of {folder} read")
    state = {name: copy_of(tensors, dtype) for name, tensors in read}
    state |= {name: torch.empty(wanted[name].shape, dtype=dtype) for name in new}
    model.load_state_dict(state, strict=False, assign=True)
    if cfg.tie:
        model.lm_head.weight = model.transformer.wte.embedding
    if new:
        model.reset_parameters(new)


def split_embedding(found, cfg, folder, new):
    """Make of one or two token tables the two that the model has, in place. Some writers split them elsewhere, so
    only the order of their rows counts."""
    names = "transformer.wte.embedding", "transformer.wte.new_embedding"
    tables = [found.pop(name)[0] for name in names if 0 in found.get(name, {})]
    for t in tables:
        if t.ndim != 2 or t.shape[1] != cfg.width:
            raise BadCheckpoint(f"{folder}: {names[0]} is {tuple(t.shape)}, the model needs rows of {cfg.width}")
    if not tables:
        return
    if len(tables) == 2 and len(tables[0]) == cfg.vocab:  # no copy of the large one
        base, extra = tables
    else:
        both = torch.cat(tables) if len(tables) == 2 else tables[0]
        base, extra = both[:cfg.vocab], both[cfg.vocab:]
    found[names[0]] = {0: base}
    if names[1] not in new:
        found[names[1]] = {0: extra}


def has_own_head(found):
    """Whether the file has a head with other numbers than the table that the config ties it to. Then the head is
    what was trained, and the config the mistake."""
    head, table = (found.get(name, {}).get(0) for name in ("lm_head.weight", "transformer.wte.embedding"))
    return head is not None and table is not None and not torch.equal(head, table.to(head.dtype))


def check_names(wanted, found, folder, new):
    """BadCheckpoint naming the tensors that are missing or that no parameter is called like."""
    def listed(names):
        names = sorted(names)
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    missing = wanted.keys() - found.keys() - set(new)
    unknown = found.keys() - wanted.keys()
    faults = []
    if missing:
        faults.append(f"no tensor for {listed(missing)}")
    if unknown:
        faults.append(f"unknown tensor {listed(unknown)}")
    if faults:
        raise BadCheckpoint(f"{folder}: " + "; ".join(faults))


def save(model, folder, frames=384, tiles=8):
    """Configuration and model.safetensors of `model` in `folder`, in the released names. frames: most of a video;
    tiles: most high-resolution crops of an image."""
    os.makedirs(folder, exist_ok=True)
    state = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        state[name if name.startswith("lm_head.") else "model." + name] = p.detach()
    write_safetensors(os.path.join(folder, "model.safetensors"), state)
    files = {"config.json": hub_config(model.cfg)} | processor_configs(model.cfg, frames, tiles)
    for name, contents in files.items():
        write_json(os.path.join(folder, name), contents)
