"""
The flags of training, and which of them are refused. One field of pretrain.Config makes one flag:

    seq_len: int = flag(4096, "tokens per sequence")    ─►    --seq_len INT    tokens per sequence [4096]

    argv ─► read_flags: what was given ─► pretrain.parse: over the preset and the stage ─► check_each, check_together
"""
import argparse
import dataclasses
import importlib.util
import math
import sys

from lib.errors import UserError
from model import PRESETS as MODELS


def flag(default, text):
    """A field of the configuration and the help of its flag."""
    return dataclasses.field(default=default, metadata={"help": text})


def integer_or_auto(text):
    return None if text == "auto" else int(text)


def read_flags(defaults, argv=None):
    """{name: value} of the flags that were given. defaults: a dataclass; its fields are the flags."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = dict(action=argparse.BooleanOptionalAction)
    kinds = {bool: switch, bool | None: switch, tuple: dict(nargs="+", metavar="X"),
             int | None: dict(type=integer_or_auto, metavar="INT")}
    for f in dataclasses.fields(defaults):
        kind = kinds.get(f.type) or dict(type=f.type, metavar=f.type.__name__.upper())
        # SUPPRESS: a flag that is not given must not override the preset
        parser.add_argument("--" + f.name, default=argparse.SUPPRESS, **kind,
                            help=f"{f.metadata['help']} [{getattr(defaults, f.name)}]")
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in vars(parser.parse_args(argv)).items()}


def check_each(cfg, choices):
    """Refuse values that cannot work, before anything is loaded. choices: {flag: what it may be}."""
    for name in ("steps", "global_batch", "micro_batch", "seq_len", "max_crops", "save_every", "eval_every"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be at least 1")
    for name in ("epochs", "lora", "keep", "eval_answers"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be 0 or more")
    if cfg.workers is not None and cfg.workers < 0:
        raise UserError(f"--workers {cfg.workers}: must be 0 or more, or auto")
    if not 0 < cfg.lora_alpha < math.inf:
        raise UserError(f"--lora_alpha {cfg.lora_alpha}: must be more than 0")
    for name, allowed in choices.items():
        value = getattr(cfg, name)
        for word in value if isinstance(value, tuple) else [value]:
            if word not in allowed:
                raise UserError(f"--{name} {word}: choose from {', '.join(allowed)}")
    if cfg.cp < 1 or cfg.seq_len % cfg.cp:
        raise UserError(f"--cp {cfg.cp}: must be at least 1 and divide --seq_len {cfg.seq_len}")
    if not cfg.data and not cfg.dry_run:
        raise UserError(f"--config {cfg.config} needs --data: JSONL files or a folder of them "
                        "(README, \"Your own data\"); --data toy tries the machinery on the toy world")
    if cfg.log_to == "tensorboard" and not importlib.util.find_spec("tensorboard"):
        raise UserError("--log_to tensorboard: that package is not installed; install it, or leave --log_to away and "
                        "open report.html in the folder of the run")


def check_together(cfg, given):
    """Refuse flags that contradict each other. given: those on the command line."""
    if "steps" in given and cfg.epochs:
        raise UserError(f"--steps {cfg.steps} and --epochs {cfg.epochs:g} say the same thing twice; leave one away")
    if not cfg.lora:
        for name in ("lora_alpha", "lora_parts"):
            if name in given:
                raise UserError(f"--{name} does nothing without --lora RANK; add --lora 64")
        return
    width = MODELS[cfg.config].width
    if cfg.lora > width:
        raise UserError(f"--lora {cfg.lora}: the rank must not be above the model's width, {width}")
    if "freeze" in given:
        raise UserError(f"--freeze {' '.join(cfg.freeze)}: --lora freezes all but its adapters; name the parts that "
                        "get some with --lora_parts")
    if not cfg.init_from and not cfg.dry_run:
        raise UserError(f"--lora {cfg.lora} needs --init_from: an adapter corrects a model that has learned already")
