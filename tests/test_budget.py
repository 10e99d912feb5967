"""--dry_run tells what a run will take; who believes it should not be told "out of memory"."""
import os
import re

import pytest
import torch
from conftest import ROOT, finish, log_of, start

from lib import budget
import longctx
import pretrain
from model import ModelConfig, Molmo2


def told(text):
    """{what: GB} of the table."""
    return {what: float(n) for what, n in re.findall(r"^  (\D+?) +([\d.]+) GB", text, re.M)}


@pytest.mark.parametrize("config, total", [
    ("8b", 8_661_703_120),  # of the others: test_model
    ("1b", 1_484_916_736 + 382_505_936 + 45_208_064)])  # OLMo-2-0425-1B, the ViT, a connector and 128 rows
def test_parameters_are_those_of_the_published_files(config, total, capsys):
    with pytest.raises(SystemExit) as e:
        pretrain.main(longctx.DEFAULTS, longctx.PRESETS,
                      ["--config", config, "--cp", "8", "--world", "16", "--dry_run"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and f"{total:,} parameters: vit 382,505,936" in text
    assert told(text)["weights"] == pytest.approx(4 * total / 8 / 2 ** 30, abs=1e-3)


def test_what_is_written_of_memory_is_what_the_command_says(capsys):
    def dry_run(module, *flags):
        with pytest.raises(SystemExit):
            pretrain.main(module.DEFAULTS if module is longctx else pretrain.Config(), module.PRESETS,
                          [*flags, "--dry_run"])
        return capsys.readouterr().out

    text = dry_run(longctx, "--config", "7b", "--cp", "8", "--world", "8")
    _, page = longctx.__doc__.split("--dry_run prints it")
    table = {what: float(n) for what, n in re.findall(r"^    ([a-z ]+?) +([\d.]+)(?:    .*)?$", page, re.M)}
    assert table == {what: round(n, 1) for what, n in told(text).items()}
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        readme = f.read()
    for said in (r"7,760,786,896 parameters", r"[\d.]+e\+17 operations"):
        assert re.search(said, text)[0] in readme
    kept, recomputed = [round(told(dry_run(pretrain, "--config", "1b", flag))["activations"])
                        for flag in ("--no-recompute", "--recompute")]
    assert re.search(rf"turns {kept} GB of\s+activations .*? into {recomputed}", readme, re.S)


def test_bytes_that_live_at_once():
    """By hand: 4 KB stay, 8 KB come and go, a view costs nothing, what was there before does not count."""
    with torch.device("meta"):
        old = torch.empty(1024)
        with budget.Alive([old]) as alive:
            a = torch.empty(1024)
            b = a.view(32, 32).t()
            c = torch.cat([a, old])
            assert (alive.now, alive.peak) == (12288, 12288)
            del c
            old.view(-1)
            assert alive.now == 4096
            d = torch.empty(1024)
            assert (alive.now, alive.peak) == (8192, 12288)
            del a, d
            assert alive.now == 4096 and b.shape == (32, 32)


def test_recomputing_keeps_the_inputs_of_blocks_alone():
    cfg = ModelConfig(layers=8, width=64, heads=4, kv_heads=4, head_dim=16, mlp=128, vocab=512, crop=16, patch=8,
                      vit_width=16, vit_heads=2, vit_head_dim=8, vit_mlp=32, vit_features=(1, 0), qk_norm="head")
    kept = {}
    for recompute in (False, True):
        with torch.device("meta"):
            model = Molmo2(cfg)
        kept[recompute] = budget.activations(model, 2, 512, 1, (1, 4), 10, recompute, False)["activations"]
    blocks = 8 * 2 * 512 * 64 * 4
    assert blocks < kept[True] < 2 * blocks and kept[False] > 8 * blocks


@pytest.mark.slow
def test_small_takes_what_it_was_said_to_take(tmp_path):
    """(must show 6) within 15 % of the process's peak."""
    text = finish(start(tmp_path, 1, "--config", "small", "--dry_run"))
    finish(start(tmp_path, 1, "--config", "small", "--steps", "40", "--eval_scenes", "4"))
    took = max(row.get("memory_gb", 0) for row in log_of(tmp_path))
    assert told(text)["together"] == pytest.approx(took, rel=0.15)
