"""The loop: flags, learning, logging, resuming, and the ways in which a run can go wrong."""
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (AS_TINY, QUICK, ROOT, SIZES, STYLES, finish, fork_server, log_of, losses_of, picture, poison, run,
                      start, tiny_model, write_lines)

import eval as evaluation
import pretrain
import sft
from data import Dataset, Planner, Stream, collate, decode
from lib import distributed, lora
from lib.errors import UserError
from lib.records import parse_record
from model import ModelConfig, PRESETS as MODELS
from pretrain import Config, PRESETS, make_optimizers, next_samples, parse, schedule

pytestmark = pytest.mark.usefixtures("tiny_small")  # runs of the real one: below, "the whole of it"; test_prepare


# ---- flags -------------------------------------------------------------------------------------------------

def test_flags_override_presets_override_defaults():
    cfg = parse(Config(), PRESETS, ["--config", "small", "--steps", "7", "--data", "a", "b", "--compile"])
    assert (cfg.steps, cfg.data, cfg.compile, cfg.seq_len) == (7, ("a", "b"), True,
                                                               PRESETS["small"]["seq_len"])
    assert parse(Config(), PRESETS, ["--config", "1b", "--data", "x"]).seq_len == 4096
    assert parse(Config(), PRESETS, ["--no-compile"]).compile is False
    assert parse(Config(), PRESETS, []).compile is None  # on CUDA alone
    assert parse(Config(), PRESETS, []).workers == 1  # of a laptop's two cores both train
    assert parse(Config(), PRESETS, ["--workers", "auto"]).workers is None  # told by the cores when a run starts
    assert parse(Config(), PRESETS, ["--workers", "3"]).workers == 3


def test_longer_sequences_may_have_more_crops():
    crops = lambda *flags: parse(sft.DEFAULTS, sft.PRESETS, ["--config", "1b", "--data", "x", *flags]).max_crops
    assert [crops(), crops("--seq_len", "16384"), crops("--seq_len", "2048")] == [48, 192, 48]
    assert crops("--seq_len", "16384", "--max_crops", "50") == 50


def test_the_token_table_of_a_language_model_is_kept_and_a_random_one_trained(tmp_path):
    freeze = lambda *flags: parse(Config(), PRESETS, ["--config", "1b", "--data", "x", *flags]).freeze
    assert freeze("--init_from", "a", "b") == freeze("--dry_run") == freeze("--resume") == ("embedding",)
    assert freeze() == freeze("--init_from", "a", "--freeze", "none") == ()
    assert freeze("--init_from", "a", "--freeze", "vit") == ("vit",)
    assert parse(sft.DEFAULTS, sft.PRESETS, ["--init_from", "a"]).freeze == ("vit",)  # small learned its own words


@pytest.mark.parametrize("flags", [["--stepz", "7"], ["--step", "7"], ["--steps", "x"], ["--workers", "many"]])
def test_wrong_flags_exit_2(flags, capsys):
    with pytest.raises(SystemExit) as e:
        parse(Config(), PRESETS, flags)
    assert e.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--cp", "3"], "--cp 3: .* divide --seq_len 256"), (["--steps", "0"], "--steps 0"),
    (["--cp", "16"], "4 heads cannot be shared by 16 ranks"), (["--config", "9b"], "--config 9b: not a preset; choose"),
    (["--config", "1b"], "--config 1b needs --data"), (["--optimizer", "sgd"], "choose from adamw, muon"),
    (["--freeze", "tail"], "--freeze tail"), (["--workers", "-1"], "--workers -1: .* 0 or more, or auto")])
def test_values_that_cannot_work_say_how_to_fix_them(flags, message):
    with pytest.raises(UserError, match=message):
        parse(Config(), PRESETS, flags)


def test_help_names_every_flag(tmp_path):
    text = run(tmp_path, "-h")[1]
    assert all(f"--{f}" in text for f in Config.__dataclass_fields__)


# ---- learning ----------------------------------------------------------------------------------------------

def test_learning_rates_warm_up_and_then_fall_to_a_tenth():
    s = [schedule(i, 100, 10) for i in range(101)]
    assert s[0] == 0.1 and s[9] == s[10] == 1.0 and s[55] == pytest.approx(0.55) and s[100] == pytest.approx(0.1)
    assert max(s) == 1.0 and all(a >= b for a, b in zip(s[10:], s[11:]))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_group(optimizer):
    model = tiny_model()
    cfg = Config(optimizer=optimizer, lr_vit=1.0, lr_connector=2.0, lr_decoder=3.0, freeze=("embedding",))
    optimizers, names = make_optimizers(lora.freeze(model, cfg), cfg)
    where = {names[p]: g for o in optimizers for g in o.param_groups for p in g["params"]}
    everything = {n for n, _ in model.named_parameters()}
    assert where.keys() == everything - {"transformer.wte.embedding"}
    assert sum(len(g["params"]) for o in optimizers for g in o.param_groups) == len(where)
    share = 1.0 if optimizer == "adamw" else cfg.adam_share
    assert where["transformer.wte.new_embedding"]["peak"] == 2.0 * share
    assert where["lm_head.weight"]["peak"] == 3.0 * share
    assert not model.transformer.wte.embedding.requires_grad


def test_overfits_one_batch(planner, world):
    """The smallest sanity check of all: four rows, a few steps, loss near zero, answers by heart."""
    model = tiny_model("qwen").train()
    model.reset_parameters()
    d = Dataset("rows", [world])
    plans = next(Stream([(d, 1.0)], planner, 0).sequences()).plans
    batch = collate([decode(plans, planner.cfg, 192)])
    optimizers, _ = make_optimizers(model,
                                    Config(optimizer="muon", lr_vit=0.02, lr_connector=0.02, lr_decoder=0.02))
    for o in optimizers:
        for g in o.param_groups:
            g["lr"] = g["peak"]
    for _ in range(60):
        loss = model(**batch) / batch["weights"].sum()
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    assert loss.item() < 0.05


def test_micro_batches_do_not_change_the_step(tmp_path, world):
    for micro in ("1", "2"):
        run(tmp_path, *QUICK[:-4], "--micro_batch", micro, "--seq_len", "192", "--data", world, "--steps",
            "2", "--out", micro)
    a, b = log_of(tmp_path, "1"), log_of(tmp_path, "2")
    assert a[0]["loss"] == pytest.approx(b[0]["loss"], rel=1e-5)
    assert a[1]["loss"] == pytest.approx(b[1]["loss"], rel=1e-3)  # Muon makes much of rounding
    assert a[-2]["grad_norm"] == pytest.approx(b[-2]["grad_norm"], rel=1e-3)


# ---- a run and its continuation ----------------------------------------------------------------------------

KILLED = """
import multiprocessing, signal
def killed(log, **row):
    write(log, **row)
    if row["step"] == 5:
        print(len(multiprocessing.active_children()), "workers", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
write, pretrain.Log.write = pretrain.Log.write, killed"""


def test_killed_with_kill_9_it_goes_on_and_repeats_every_loss_bit_for_bit(tmp_path, world):
    """In a step; at any moment and on several ranks: test_distributed."""
    flags = [*QUICK, "--data", world, "--steps", "8"]
    p = start(tmp_path, 1, *flags, before=AS_TINY + KILLED)
    run(tmp_path, *flags, "--out", "straight")
    assert "1 workers" in finish(p, -9)  # no worker outlived it, or its output would not have ended
    assert list(losses_of(tmp_path)) == [1, 2, 3, 4, 5]
    with open(tmp_path / "out/small/pretrain/log.jsonl", "a") as f:
        f.write('{"step": 6, "lo')  # a line that was being written
    run(tmp_path, *flags, "--resume")
    rows = log_of(tmp_path)
    assert losses_of(tmp_path) == losses_of(tmp_path, "straight")
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 9))
    assert rows[-1].keys() == {"step", "eval"} and {"lr", "grad_norm", "tokens_per_s", "wait"} <= rows[0].keys()
    folder = tmp_path / "out" / "small" / "pretrain"
    assert os.readlink(folder / "latest") == "step_0000008"
    files = {"COMPLETE", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
             "chat_template.jinja", "train_state", "processor_config.json", "preprocessor_config.json",
             "video_preprocessor_config.json"}
    assert files == set(os.listdir(folder / "latest"))
    assert not [f for f in os.listdir(folder) if "tmp" in f or f.startswith(".")]
    code, text = run(tmp_path, *flags, "--resume", "--seed", "1", check=False)
    assert code == 2 and "seed is 1 now, but the run was started with 0" in text
    open(world, "a").write("\n" + open(world).readline())
    code, text = run(tmp_path, *flags, "--resume", check=False)
    assert code == 2 and "dataset rows is 9 rows" in text


def test_deterministic_kernels_are_asked_for_and_change_nothing_on_a_cpu(tmp_path, world, monkeypatch):
    asked, write = [], pretrain.Log.write
    monkeypatch.setattr(pretrain.Log, "write", lambda log, **row: asked.append(
        torch.are_deterministic_algorithms_enabled()) or write(log, **row))
    for out, flags in (("on", ["--deterministic"]), ("off", [])):
        run(tmp_path, *QUICK, "--data", world, "--steps", "3", "--out", out, *flags)
    assert asked == [True] * 4 + [False] * 4  # three steps and what is written at the end
    assert losses_of(tmp_path, "on") == losses_of(tmp_path, "off")
    weights = [tmp_path / out / "small/pretrain/latest/model.safetensors" for out in ("on", "off")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    run(tmp_path, *QUICK, "--data", world, "--steps", "3", "--out", "off", "--deterministic", "--resume")
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("eval_every, pages", [("1", 3), ("2", 2)])
def test_the_page_of_a_run_is_written_after_each_evaluation_once(tmp_path, world, monkeypatch, eval_every, pages):
    """The last one comes after the last checkpoint, which it shows."""
    latest, report_on = [], pretrain.report_on

    def written(run, defaults):
        report_on(run, defaults)
        latest.append(os.path.exists(os.path.join(run, "step_0000003")))
    monkeypatch.setattr(pretrain, "report_on", written)
    run(tmp_path, *QUICK, "--data", world, "--steps", "3", "--workers", "0", "--eval_every", eval_every)
    assert latest == [False] * (pages - 1) + [True]
    assert "Mixture, after 3 steps" in (tmp_path / "out/small/pretrain/report.html").read_text()


def test_a_new_run_keeps_the_old_one_and_starts_from_the_checkpoint_it_is_given(tmp_path, world):
    flags = [*QUICK, "--data", world, "--steps", "1"]
    text = run(tmp_path, *flags, "--out", "first")[1]
    assert "random weights" in text and "moved to" not in text
    run(tmp_path, *flags)
    text = run(tmp_path, *flags, "--init_from", str(tmp_path / "first/small/pretrain/latest"))[1]
    assert "random weights" not in text
    assert "moved to" in text and os.path.exists(tmp_path / "out/small/pretrain.old1/latest/config.json")


@pytest.mark.parametrize("dtype, off", [("fp32", 1e-4), ("bf16", 1e-2)])
def test_the_held_out_loss_is_that_of_its_lines(tmp_path, world, dtype, off, monkeypatch):
    """Packed, and in the precision of training, against each line by itself. The workers decode."""
    def decode_elsewhere(plans, *args, **kw):
        assert not plans or torch.utils.data.get_worker_info()
        return decode(plans, *args, **kw)
    decode = pretrain.decode
    monkeypatch.setattr(pretrain, "decode", decode_elsewhere)
    flags = [*QUICK, "--data", world, "--eval_data", world, "--steps", "1", "--dtype", dtype]
    run(tmp_path, *flags, *(["--eval_answers", "0"] if dtype == "bf16" else []))
    folder = tmp_path / "out/small/pretrain/latest"
    model = pretrain.Molmo2.from_pretrained(folder)
    planner = Planner(pretrain.Tokenizer(str(folder / "tokenizer.json"), 1024), model.cfg, 192, 0, "spec", 16, 16)
    stream, loss, weight = Stream([(Dataset("rows", [world]), 1.0)], planner, 0), 0.0, 0.0
    for k in range(8):
        for plan in stream.plans("rows", k)[0]:
            batch = collate([decode([plan], model.cfg, 192)])
            with torch.no_grad():
                loss, weight = loss + float(model(**batch)), weight + float(batch["weights"].sum())
    scores = log_of(tmp_path)[-1]["eval"]
    assert scores.pop("loss") == pytest.approx(loss / weight, rel=off)
    if dtype == "bf16":  # in which other words may be likely
        return
    # and what the checkpoint answers, by eval.py
    questions = evaluation.load_questions([Dataset("rows", [world])])
    want, _ = evaluation.evaluate(model, planner, questions, max_new_tokens=64)
    assert len(scores) > 3 and scores == {name: pytest.approx(value, abs=1e-4) for name, value in want.items()}
    with open(tmp_path / "out/small/pretrain/samples/step_0000001.json") as f:
        assert [record["prompt"] for record in json.load(f)] == [q.prompt for q in questions]


def test_the_best_checkpoint_has_a_name_and_is_not_deleted(tmp_path, world):
    """The rates grow from 0 to far too much, so a middle step has the lowest loss."""
    text = run(tmp_path, *QUICK, "--data", world, "--eval_data", world, "--steps", "6", "--save_every", "1", "--keep",
               "1", "--eval_every", "1", "--eval_answers", "0", "--warmup_decoder", "6", "--lr_decoder", "3")[1]
    losses = {row["step"]: row["eval"]["loss"] for row in log_of(tmp_path) if "eval" in row}
    best = min(losses, key=losses.get)
    folder = tmp_path / "out/small/pretrain"
    assert 1 <= best < 6 and os.readlink(folder / "best") == f"step_000000{best}"
    assert sorted(name for name in os.listdir(folder) if name.startswith("step_")) == [f"step_000000{best}",
                                                                                        "step_0000006"]
    assert f"best, step_000000{best}" in text


def test_held_out_lines_that_are_no_good_are_told_at_once(tmp_path, world):
    row = dict(image="gone.png", annotations=[dict(task="image_caption", answer="A.")])
    bad = write_lines(tmp_path / "bad.jsonl", [row])
    code, text = run(tmp_path, *QUICK, "--data", world, "--eval_data", bad, "--steps", "500", check=False)
    assert code == 2 and re.search(r"--eval_data .*bad.jsonl: .*bad.jsonl:1: .*gone.png", text) and "step " not in text


# ---- what can go wrong -------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such JSONL file"), (["--resume"], "no checkpoint under"),
    (["--init_from", "nowhere"], "nowhere"), (["--device", "cuda"], "--device cuda: ")])
def test_mistakes_are_one_line(tmp_path, world, flags, message):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    code, text = run(tmp_path, *QUICK, *([] if "--data" in flags else ["--data", world]), "--steps", "1",
                     *flags, check=False)
    assert code == 2 and message in text


def test_too_many_bad_rows_stop_the_run(tmp_path):
    picture(tmp_path / "a.png", "red")
    good = dict(image="a.png", annotations=[dict(task="image_caption", answer="Red.")])
    path = write_lines(tmp_path / "rows.jsonl", [good] * 8 + ["{", dict(good, image="../a.png")])
    flags = [*QUICK, "--data", path, "--steps", "4"]
    code, text = run(tmp_path, *flags, check=False)
    assert code == 2 and "--max_bad 0.05" in text and "rows.jsonl:9" in text and "must be relative" in text
    text = run(tmp_path, *flags, "--max_bad", "0.5")[1]
    assert "not used, by dataset" in text and "malformed JSON" in text


def test_a_step_that_is_not_finite_is_left_out(tmp_path, world, monkeypatch):
    real = pretrain.Molmo2.forward
    calls = []

    def forward(self, *a, **kw):
        calls.append(1)
        loss = real(self, *a, **kw)
        return loss * math.nan if len(calls) in poisoned else loss

    monkeypatch.setattr(pretrain.Molmo2, "forward", forward)
    poisoned = {3}
    run(tmp_path, *QUICK, "--data", world, "--steps", "3", "--max_bad", "1")
    rows = [r for r in log_of(tmp_path) if "loss" in r]
    assert [r["skipped"] for r in rows] == [0, 1, 1] and math.isfinite(rows[2]["loss"])
    calls.clear()
    poisoned = range(1000)
    code, text = run(tmp_path, *QUICK, "--data", world, "--steps", "30", check=False)
    assert code == 2 and "rows.jsonl" in text


# ---- the whole of it ---------------------------------------------------------------------------------------

@pytest.mark.slow
def test_small_learns_the_toy_world(tmp_path):
    """What the README's first command does, at a seventh of its length: the loss falls, a contact sheet is
    drawn, sample.py answers from the checkpoint."""
    finish(start(tmp_path, 1, "--steps", "60", "--eval_scenes", "24"))
    rows = log_of(tmp_path)
    steps = [r["loss"] for r in rows if "loss" in r]
    assert sum(steps[-5:]) / 5 < 0.15 * steps[0]
    scores = rows[-1]["eval"]
    assert {"point_hit", "point_precision", "count_accuracy", "none_accuracy", "caption_recall"} <= scores.keys()
    assert os.path.getsize(tmp_path / "out/small/pretrain/samples/step_0000060.png") > 10_000
    first = json.loads(open(tmp_path / "data/toy/eval/scenes.jsonl").readline())["image"]
    p = subprocess.run([sys.executable, os.path.join(ROOT, "sample.py"), "out/small/pretrain/latest",
                        "data/toy/eval/" + first, "Point to all shapes."],
                       cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 0 and p.stdout.strip(), p.stderr


def test_a_run_on_a_poisoned_corpus_finishes_and_lists_it(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    bad, later, good = poison(folder)
    lines = [line for line, _ in bad] + later + good * 10
    (folder / "rows.jsonl").write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n"
                                                 for x in lines))
    run(tmp_path, *QUICK, "--data", str(folder / "rows.jsonl"), "--max_bad", "1", "--max_frames", "4",
        "--max_crops", "8", "--steps", "25")
    listed = [json.loads(line) for line in open(tmp_path / "out" / "small" / "pretrain" / "bad_rows.jsonl")]
    want = {str(folder / f"rows.jsonl:{i + 1}"): line for i, line in enumerate(lines) if line not in good}
    assert len(listed) == len({r["where"] for r in listed}) and {r["where"] for r in listed} == set(want)
    reasons = {line: reason for line, reason in bad} | {line: "failed to decode" for line in later}
    assert all(r["reason"] == reasons[want[r["where"]]] and r["dataset"] == "rows" for r in listed)
    log = log_of(tmp_path)
    assert len(losses_of(tmp_path)) == 25 and log[-2]["bad"]["rows"].keys() == set(reasons.values())


def test_a_worker_that_dies_is_one_line():
    def dies(error):
        raise error
        yield
    with pytest.raises(UserError, match="--resume goes on"), distributed.worker_errors():
        next_samples(dies(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")), 2)
    with pytest.raises(UserError, match="^none of the first 200 records can be used$"):
        next_samples(dies(ValueError("Caught ValueError in worker 0.\nTraceback\n"
                                  "ValueError: none of the first 200 records can be used")), 2)


def test_a_worker_that_dies_during_a_step_is_one_line(tmp_path, world, monkeypatch):
    """PyTorch says so in whatever the main thread is doing, which is not waiting for data."""
    write = pretrain.Log.write

    def kill(log, **row):
        write(log, **row)
        if row["step"] == 2:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(60)  # until then
    monkeypatch.setattr(pretrain.Log, "write", kill)
    code, text = run(tmp_path, *QUICK, "--data", world, "--steps", "9", "--workers", "1", check=False)
    assert code == 2 and re.search("error: DataLoader worker .*--resume goes on", text), text


def test_the_readmes_examples_are_good_rows():
    lines = [line for line in open(os.path.join(ROOT, "README.md"), "rb") if line.startswith((b'{"i', b'{"video'))]
    media = {"image", "images", "video"}
    assert len(lines) >= 5 and {k for line in lines for k in parse_record(line)} & media == media


def test_what_a_frozen_encoder_said_is_kept(model):
    """The same features, to bf16, whatever else is in the batch; each crop is encoded once while there is room."""
    vit, cfg = model.vision_backbone.image_vit, model.cfg
    plain, encoded = vit.forward, []
    crops = torch.randint(0, 255, (7, cfg.patches, cfg.patch ** 2 * 3), dtype=torch.uint8)
    with torch.no_grad():
        want = plain(crops).bfloat16().float()
        vit.forward = lambda x: encoded.append(len(x)) or plain(x)
        room = 5 * cfg.patches * len(cfg.vit_features) * cfg.vit_width * 2 / 2 ** 30  # five of seven
        sft.cache_features(vit, cfg, room + 1e-9, group=4)
        for order, groups in (([0, 1, 2, 0], [4]), ([2, 1, 0], []), ([6, 5, 4, 3, 2], [4]), ([3, 4, 5, 6], [4]),
                              ([5], [])):
            encoded.clear()
            torch.testing.assert_close(vit(crops[order]), want[order], rtol=2 ** -7, atol=1e-3)
            assert encoded == groups


# ---- signals: whatever a run is doing ----------------------------------------------------------------------

def stuck_run(said, folder, flags, place):
    """In a process of its own, which prints to `said`: a run that hangs where the name `place` of pretrain is called,
    for the third time if it is what waits for data."""
    def hang(*args):
        print("stuck", flush=True)
        while True:  # in naps, as one waits for a queue: a signal that another thread is given does not end a sleep
            time.sleep(0.5)
    wait_for_data, calls = pretrain.next_samples, []

    def hang_later(*args):
        calls.append(1)
        return wait_for_data(*args) if len(calls) < 3 else hang()
    for number in (1, 2):
        os.dup2(said.fileno(), number)
    said.close()
    signal.alarm(300)  # ends what no signal has ended
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a process that a user starts
    os.chdir(folder)
    MODELS["small"] = ModelConfig(**SIZES, **STYLES["qwen"])
    setattr(pretrain, place, hang_later if place == "next_samples" else hang)
    pretrain.main(Config(), PRESETS, flags)


SAVED = "stopped by a signal after step 2; --resume goes on"


@pytest.mark.parametrize("place, number, code, told", [
    ("next_samples", signal.SIGINT, 0, SAVED),  # for data that never comes: what two steps learned is kept
    ("evaluate", signal.SIGTERM, 0, SAVED), ("evaluate", signal.SIGINT, 0, SAVED),
    ("load_model", signal.SIGTERM, 130, "stopped before the first step"),
    ("load_model", signal.SIGINT, 130, "stopped before the first step")])
def test_one_signal_ends_a_run_in_whatever_it_is_doing(tmp_path, place, number, code, told):
    rows = write_lines(tmp_path / "rows.jsonl", [dict(annotations=[dict(task="text", prompt="?", answer="yes")])])
    flags = [*QUICK, "--steps", "9", "--eval_every", "2", "--data", rows]
    context = fork_server()
    hear, said = context.Pipe(duplex=False)
    process = context.Process(target=stuck_run, args=(said, tmp_path, flags, place))
    process.start()
    said.close()
    text = ""
    with os.fdopen(os.dup(hear.fileno())) as lines:
        for line in lines:
            text += line
            if "stuck" in line:
                os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code and text.count("stuck") == 1 and told in text and "Traceback" not in text, text
    if code == 0:
        assert os.path.exists(tmp_path / "out" / "small" / "pretrain" / "latest" / "COMPLETE")
