"""Against the reference: tiny released-layout models with random weights, run by transformers 5.23 (fp32, CPU).

The folders under golden/ hold their weights, inputs and outputs, and nothing else.
"""
import os

import pytest
import torch
from conftest import HERE

from model import Molmo2, dense_mask, is_vision
from weights import read_safetensors

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
