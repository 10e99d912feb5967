"""
LoRA: a frozen model learns through two small matrices beside each of its large ones (arXiv 2106.09685).

    y = W x + alpha/r · B (A x)       W: (out, in), frozen;  A: (r, in) and B: (out, r) are trained, and B starts at 0

    python sft.py --config 4b --init_from weights/Molmo2-4B --lora 64 --data clips/
    python sft.py --config 4b --init_from weights/Molmo2-4B out/4b/sft/latest --lora 64 ...    # an adapter goes on

W takes no gradient and no optimiser state, and is kept in bf16 where products are in bf16: 2 bytes a number, not 16.
A checkpoint is the whole model with W + alpha/r · B A in place of W, so nothing that reads it knows of LoRA. Beside
it stands the adapter alone, from which training goes on: to take it out of the sum again would lose digits.

    step_0000500/model.safetensors       merged
                 adapter/adapter.json    {rank, alpha, parts, base, point_format}; base: which model it belongs to
                         adapter.safetensors

Every linear layer of the named parts gets an adapter, the fused ones (q k v; up and gate) one for all their rows. The
head does not: it is a table of tokens, and the largest matrix of all.
"""
import hashlib
import math
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.errors import UserError
from lib.weights import read_json, read_safetensors, write_json, write_safetensors


class Adapted(nn.Linear):
    """A linear layer and its adapter. `weight` and `bias` are those of the layer that it stands in for."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / rank  # so that the best learning rate hardly depends on the rank
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, math.sqrt(5))  # as nn.Linear starts

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


def is_adapter(name):
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith((".lora_a", ".lora_b"))


def install(model, cfg):
    """Give the linear layers of cfg.lora_parts adapters of rank cfg.lora, in place; 0 = none. Returns the model."""
    if not cfg.lora:
        return model
    model.lora = dict(rank=cfg.lora, alpha=cfg.lora_alpha, parts=sorted(set(cfg.lora_parts)), base=fingerprint(model))
    wanted = set()
    for part in model.lora["parts"]:
        wanted |= {name for name, _ in model.parts()[part]}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head" and f"{name}.weight" in wanted:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Adapted(module, cfg.lora, cfg.lora_alpha))
    return model


def freeze(model, cfg, bf16=False):
    """Choose which parameters train, by cfg.lora or cfg.freeze. Where matrix products are in `bf16`, the matrices and
    the token table that do not train are kept in it, and saved with its digits. Returns the model."""
    for part, named in model.parts().items():
        for name, p in named:
            is_table = name.endswith("wte.embedding")
            frozen = part in cfg.freeze or "embedding" in cfg.freeze and is_table
            p.requires_grad_(is_adapter(name) if cfg.lora else not frozen)  # else no gradient, no optimiser state
            # not the new rows and places, which are added, nor what turns pixels into numbers of the type it has
            in_products = is_table or p.ndim == 2 and not re.search("wte|positional|patch_embedding", name)
            if bf16 and in_products and not p.requires_grad:
                p.data = p.data.bfloat16()
    return model


def fingerprint(model):
    """A hash of the first numbers of every parameter: enough to tell one trained model from another."""
    sums = hashlib.sha256()
    for p in model.parameters():
        if p.device.type != "meta":
            sums.update(p.detach().flatten()[:64].bfloat16().view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()


def merge(model, state):
    """Make of `state`, {name: fp32 tensor} of all parameters of `model`, in place that of a model without adapters."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            a = state.pop(f"{name}.lora_a")
            b = state.pop(f"{name}.lora_b")
            state[f"{name}.weight"].addmm_(b, a, alpha=module.scale)


# ---- the adapter's own files ---------------------------------------------------------------------------------------

def folder_of(checkpoint):
    """The folder with adapter.json: `checkpoint` itself or the one in it; None if there is no adapter."""
    for folder in (os.path.join(checkpoint, "adapter"), checkpoint):
        if os.path.exists(os.path.join(folder, "adapter.json")):
            return folder
    return None


def save(folder, about, tensors):
    """Write an adapter. about: `model.lora`; tensors: {name: tensor} of its parameters."""
    os.makedirs(folder)
    write_json(os.path.join(folder, "adapter.json"), about)
    write_safetensors(os.path.join(folder, "adapter.safetensors"), tensors)


def load(model, checkpoint):
    """Fill the adapters of `model` with those of a checkpoint. UserError if they were made for another model, or with
    other flags."""
    folder = folder_of(checkpoint)
    if not folder:
        raise UserError(f"{checkpoint}: no adapter in it; it was not written by a run with --lora")
    path = os.path.join(folder, "adapter.json")
    about = read_json(path)
    for key, flag in (("rank", "--lora"), ("alpha", "--lora_alpha"), ("parts", "--lora_parts")):
        if about.get(key) != model.lora[key]:
            raise UserError(f"{path}: {key} is {about.get(key)}, but {model.lora[key]} is asked for; change {flag}")
    if about.get("base") != model.lora["base"]:
        raise UserError(f"{path}: the adapter was trained on another model than the first folder of --init_from, or "
                        "that has been trained on since")
    path = os.path.join(folder, "adapter.safetensors")
    tensors = read_safetensors(path)
    wanted = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    for name in wanted.keys() | tensors.keys():
        shapes = [tuple(found[name].shape) if name in found else None for found in (tensors, wanted)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{path}: {name} is {shapes[0]}, the model needs {shapes[1]}")
    with torch.no_grad():
        for name, p in wanted.items():
            p.copy_(tensors[name])
    if about.get("point_format") in ("spec", "released"):
        model.cfg.point_format = about["point_format"]  # what it has learned to write
