"""Any number of ranks computes what one does, and a checkpoint outlives whatever happens to them."""
import ast
import contextlib
import glob
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import (AS_TINY, ROOT, SIZES, STYLES, V, finish, fork_server, log_of, losses_of, random_batch,
                      random_tree, run, run_ranks, start, tiny_model)

import pretrain
import ulysses
from lib import distributed, flex
from lib.distributed import World
from lib.flex import block_mask
from model import IMAGE, Molmo2, ModelConfig, PRESETS, dense_mask, is_vision


def check_gradients(rank, ranks, cases):
    """(must show 1) uneven loss weights, ranks without pictures and ranks without a row."""
    for cp, style in cases:
        check_gradients_of(rank, ranks, cp, style)


def check_gradients_of(rank, ranks, cp, style):
    os.environ |= dict(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    mesh = torch.distributed.init_device_mesh("cpu", (ranks,), mesh_dim_names=("shards",))
    cp_mesh = torch.distributed.init_device_mesh("cpu", (ranks // cp, cp), mesh_dim_names=("dp", "cp"))
    cp_group = cp_mesh["cp"].get_group()
    world = World("cpu", rank, ranks, cp, mesh, cp_group)
    plain, shared = tiny_model(style).train(), tiny_model(style).train()
    if rank:  # the weights come from the first one
        with torch.device("meta"):
            shared = Molmo2(shared.cfg).train()
    if cp > 1:
        ulysses.install(shared, cp_group)
    distributed.shard_model(shared, world, False, True, False)
    for seed in range(6):
        rng = torch.Generator().manual_seed(seed)
        batches = []
        for k in range(world.dp):
            b = random_batch(rng, 1 + seed % 2, 24)
            if k % 2:  # text alone
                b |= dict(crops=None, pool=None, tokens=torch.where(b["tokens"] < V, b["tokens"], 7))
            if k == 1 and seed % 2:  # a rank that has no row in this step
                names = "weights", "example", "branch", "pos", "tokens"
                b |= {name: torch.zeros_like(b[name]) for name in names}
            batches.append(b)
        W = sum(float(b["weights"].sum()) for b in batches)
        want = sum(plain(**b, z_loss=1e-3) for b in batches) / W
        plain.zero_grad()
        want.backward()
        mine = batches[world.dp_rank]
        if mine["crops"] is None:
            mine |= dict(crops=torch.zeros(1, 25, 48, dtype=torch.uint8),
                         pool=torch.zeros(0, 4, dtype=torch.long))
        if cp > 1:
            mine = ulysses.shard_batch(mine, V + IMAGE, world.cp_rank, cp)
        shared.zero_grad()
        got = shared(**mine, z_loss=1e-3) / (W / ranks)
        got.backward()
        total = world.all_reduce_sum(got.detach()) / ranks
        torch.testing.assert_close(total, want.detach(), rtol=1e-5, atol=0)
        whole = math.hypot(*(float(p.grad.norm()) for p in plain.parameters() if p.grad is not None))
        for (name, a), b in zip(plain.named_parameters(), shared.parameters()):
            a = torch.zeros_like(a) if a.grad is None else a.grad
            off = float((a - b.grad.full_tensor()).norm())
            assert off <= 3e-6 * whole, (seed, name, off, whole)


@pytest.mark.parametrize("ranks, cases", [
    (2, [(1, "qwen")]), pytest.param(4, [(1, "olmo"), (2, "qwen")], marks=pytest.mark.slow)], ids=[2, 4])
def test_gradients_do_not_depend_on_the_number_of_ranks(ranks, cases):
    """cases: how many ranks share a sequence, and the style of the decoder."""
    run_ranks(check_gradients, ranks, cases)


class OneProduct(torch.nn.Module):
    """Of a model what `shard_model` knows: it has blocks."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 1, bias=False)
        self.outer = torch.nn.Parameter(torch.ones(5))

    def blocks(self):
        return [self.inner]

    def forward(self, x):
        self.seen = self.outer.dtype, x.dtype
        return (self.inner(x.to(self.outer.dtype)) * self.outer).float().sum()


def check_sums_in_bf16(rank, ranks):
    mesh = torch.distributed.init_device_mesh("cpu", (ranks,), mesh_dim_names=("shards",))
    model = OneProduct()
    with torch.no_grad():
        model.inner.weight.fill_(1 + 2 ** -12)  # of which bf16 keeps 1
    distributed.shard_model(model, World("cpu", rank, ranks, 1, mesh), False, False, True)
    small = 2 ** -10  # lost beside 1 in bf16, which has 8 digits
    for x in ([1.0, small][rank], small):  # of micro-batches too
        model(torch.full((1, 3), x)).backward()
    grad = model.inner.weight.grad.full_tensor()
    assert grad.dtype == torch.float32 and model.seen == (torch.bfloat16, torch.float32)
    assert torch.equal(grad, torch.full((1, 3), 5 * (1 + 3 * small) / ranks))
    assert torch.equal(model.inner.weight.full_tensor(), torch.full((1, 3), 1 + 2 ** -12))


def test_small_gradients_are_not_lost_in_sums_over_ranks_and_micro_batches():
    run_ranks(check_sums_in_bf16, 2)


# ---- whole runs --------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("tiny_small")
FLAGS = ["--config", "small", "--mixture", "equal", "--global_batch", "3", "--micro_batch", "1",
         "--seq_len", "192", "--save_every", "2", "--workers", "0"]


def run_on_a_rank(rank, ranks, folder, flags):
    """The same run on each of several ranks: what it printed."""
    PRESETS["small"] = ModelConfig(**SIZES, **STYLES["qwen"])
    return run(folder, *flags)[1]


def wait_for(tmp_path, step, p):
    """Until the log has come so far."""
    log, end = tmp_path / "out" / "small" / "pretrain" / "log.jsonl", time.time() + 600
    while not (log.exists() and log.read_text().count("\n") >= step):
        assert time.time() < end and p.poll() is None, p.communicate()[0]
        time.sleep(0.02)


def kill_all(p):
    """kill -9 of torchrun and of every rank, which torchrun puts into sessions of their own."""
    for pid in [*(children(p.pid) if sys.platform == "linux" else ()), p.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    p.communicate()


def children(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(c) for c in f.read().split()]
    return []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through /proc")
def test_a_dead_rank_ends_the_job(tmp_path, world):
    p = start(tmp_path, 2, *FLAGS, "--data", world, "--steps", "5000", "--save_every", "5000", before=AS_TINY)
    wait_for(tmp_path, 3, p)
    os.kill(children(p.pid)[1], signal.SIGKILL)
    text, _ = p.communicate(timeout=600)  # and not the half hour for which a collective waits
    assert p.returncode != 0 and re.search(r"error: step \d+, rank 0: ", text) and "rank      : 1" in text, text


def test_a_signal_finishes_the_step_and_saves(tmp_path, world, monkeypatch):
    flags = [*FLAGS, "--data", world, "--steps", "5000", "--save_every", "5000"]
    write = pretrain.Log.write

    def and_signal(log, **row):
        write(log, **row)
        if row["step"] == 3:
            signal.raise_signal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Log, "write", and_signal)
        text = run(tmp_path, *flags)[1]
    assert "stopped by a signal after step 3; --resume goes on" in text and max(losses_of(tmp_path)) == 3
    assert os.readlink(tmp_path / "out/small/pretrain/latest") == "step_0000003"
    # while one run goes on, another in the same folder is refused
    p = start(tmp_path, 1, *flags, "--resume", "--workers", "1", before=AS_TINY)
    wait_for(tmp_path, 6, p)
    code, text = run(tmp_path, *flags, check=False)
    assert code == 2 and "another run is writing into this folder" in text
    for number in (signal.SIGINT, signal.SIGTERM):  # to the worker too, and twice, as from a queue and torchrun
        os.killpg(p.pid, number)
    finish(p)
    assert os.readlink(tmp_path / "out/small/pretrain/latest") == f"step_{max(losses_of(tmp_path)):07d}"


def signalled(said):
    """A signal at each line that runs while one is noted. Time stands still: what comes two seconds later would end
    the process."""
    def at_each_line(frame, event, arg):
        signal.raise_signal(signal.SIGTERM)
        return at_each_line
    distributed.time = SimpleNamespace(monotonic=lambda: 0.0)
    with distributed.stop_signals() as stop:
        stop.at_once = False
        sys.settrace(at_each_line)
        os.kill(os.getpid(), signal.SIGINT)
        sys.settrace(None)
        said.send(len(stop))


@pytest.mark.slow
def test_a_signal_may_come_while_the_one_before_is_noted():
    """The handler must hold no lock: it would wait for itself for ever."""
    context = fork_server()
    hear, said = context.Pipe(duplex=False)
    p = context.Process(target=signalled, args=(said,))
    p.start()
    p.join(120)
    p.kill()
    assert p.exitcode == 0 and hear.recv() > 3


@contextlib.contextmanager
def files_of_at_most(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, world):
    flags, folder = [*FLAGS, "--data", world, "--steps", "4"], tmp_path / "out/small/pretrain"
    run(tmp_path, *flags)
    shutil.rmtree(folder / "step_0000004")  # as if it had been killed in step 3
    os.remove(folder / "latest")
    os.symlink("step_0000002", folder / "latest")
    before = (folder / "step_0000002/model.safetensors").read_bytes()
    with files_of_at_most(1 << 16):
        code, text = run(tmp_path, *flags, "--resume", check=False)
    assert code == 2 and "checkpoint could not be written, the one before it is whole" in text and "GB free" in text
    assert os.readlink(folder / "latest") == "step_0000002"
    assert (folder / "step_0000002/model.safetensors").read_bytes() == before
    assert not [n for n in os.listdir(folder) if n.endswith(".tmp")]
    run(tmp_path, *flags, "--resume")
    assert os.readlink(folder / "latest") == "step_0000004"


def test_a_damaged_checkpoint_is_refused(tmp_path, world):
    """A bit that flipped, a file that was cut: --resume goes back to the checkpoint before, and goes on."""
    flags, folder = [*FLAGS, "--data", world, "--steps", "6"], tmp_path / "out/small/pretrain"
    run(tmp_path, *flags)
    want = losses_of(tmp_path)
    shutil.copytree(folder, tmp_path / "whole", symlinks=True)
    state = next((folder / "step_0000004/train_state").glob("*.distcp"))
    os.truncate(state, os.path.getsize(state) // 2)
    model = folder / "step_0000006/model.safetensors"
    data = bytearray(model.read_bytes())
    data[-5] ^= 1
    model.write_bytes(data)
    text = run(tmp_path, *flags, "--resume")[1]
    for damaged in ("step_0000006/model.safetensors", f"step_0000004/train_state/{state.name}"):
        assert f"{damaged}: not what was written" in text
    assert "resuming after step 2" in text and losses_of(tmp_path) == want
    for name in ("model.safetensors", "config.json"):  # written again, just as before
        again, before = (f / "step_0000006" / name for f in (folder, tmp_path / "whole"))
        assert again.read_bytes() == before.read_bytes()
    data[-5] ^= 3
    model.write_bytes(data)
    code, text = run(tmp_path, *flags, "--out", "next", "--init_from", str(folder / "latest"), check=False)
    assert code == 2 and "error: --init_from" in text and "model.safetensors: not what was written" in text
    for name in os.listdir(folder):
        if name.startswith("step_"):
            os.remove(folder / name / "COMPLETE")
    code, text = run(tmp_path, *flags, "--resume", check=False)
    assert code == 2 and "is whole: " in text and "step_0000006/COMPLETE: No such file" in text


def made(run, step):
    """A checkpoint of two files, as `publish` leaves it."""
    aside = run / ".aside"
    (aside / "train_state").mkdir(parents=True)
    (aside / "model").write_bytes(bytes(range(99)))
    (aside / "train_state" / "pieces").write_text(str(step))
    distributed.publish(str(aside), str(run / f"step_{step:07d}"))


def cut(f):
    os.truncate(f, os.path.getsize(f) // 2)


def flip(f):
    f.write_bytes(bytes([f.read_bytes()[0] ^ 1]) + f.read_bytes()[1:])


@pytest.mark.parametrize("file", ["model", "train_state/pieces", "COMPLETE"])
@pytest.mark.parametrize("spoil", [os.remove, cut, flip, lambda f: f.write_bytes(f.read_bytes() + b"x"),
                                   lambda f: f.write_bytes(b""), lambda f: f.write_bytes(b"nonsense")])
def test_a_damaged_checkpoint_is_never_resumed_from(tmp_path, file, spoil):
    for step in (8, 9, 10):
        made(tmp_path, step)
    assert distributed.last_complete(tmp_path) == (str(tmp_path / "step_0000010"), [])
    spoil(tmp_path / "step_0000010" / file)
    (tmp_path / "step_0000009" / "COMPLETE").unlink()
    whole, (last, before) = distributed.last_complete(tmp_path)
    assert whole == str(tmp_path / "step_0000008") and "step_0000010" in last
    assert before == f"{tmp_path / 'step_0000009' / 'COMPLETE'}: No such file or directory"
    state_alone = file == "train_state/pieces"
    assert (distributed.damage(tmp_path / "step_0000010", leave_out="train_state") is None) == state_alone


def test_a_list_of_sums_that_was_cut_is_not_taken_for_a_shorter_one(tmp_path):
    """Wherever it ends: also at the end of a line, where all that is left of it is true."""
    made(tmp_path, 1)
    folder = tmp_path / "step_0000001"
    path = folder / "COMPLETE"
    whole = path.read_bytes()
    subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "COMPLETE"], cwd=folder, check=True)
    for n in range(len(whole) - 1):  # without its last newline nothing is missing
        path.write_bytes(whole[:n])
        assert str(folder) in (distributed.damage(folder) or ""), whole[:n]
    path.write_bytes(whole)
    assert distributed.damage(folder) is None
    path.write_bytes(whole.partition(b"\n")[2])  # as checkpoints were before
    assert distributed.damage(folder) is None


def test_a_checkpoint_later_than_latest_is_not_resumed_from(tmp_path):
    """A kill came before it was noted, or the user turned `latest` back: the run goes on from there."""
    assert distributed.last_complete(tmp_path) == distributed.last_complete(tmp_path / "nowhere") == (None, [])
    for step in (2, 4, 6):
        made(tmp_path, step)
    (tmp_path / "step_0000005.old").mkdir()
    assert os.readlink(tmp_path / "latest") == "step_0000006" and (tmp_path / "latest" / "model").exists()
    for turned_to in (4, 2):
        (tmp_path / "latest").unlink()
        (tmp_path / "latest").symlink_to(f"step_{turned_to:07d}")
        assert distributed.last_complete(tmp_path) == (str(tmp_path / f"step_{turned_to:07d}"), [])
    flip(tmp_path / "step_0000002" / "model")
    assert distributed.last_complete(tmp_path)[0] is None
    (tmp_path / "latest").unlink()  # not there yet: what is whole counts
    assert distributed.last_complete(tmp_path) == (str(tmp_path / "step_0000006"), [])
    made(tmp_path, 4)  # written again by a run that went on from 2
    assert os.readlink(tmp_path / "latest") == "step_0000004" and not (tmp_path / "latest.tmp").exists()
    assert distributed.last_complete(tmp_path) == (str(tmp_path / "step_0000004"), [])


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path):
    made(tmp_path, 2)
    (tmp_path / ".step_0000004.tmp" / "train_state").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    distributed.Saver(str(tmp_path), World("cpu", rank=1))
    assert (tmp_path / ".step_0000004.tmp").exists()  # the first rank clears
    distributed.Saver(str(tmp_path), World("cpu"))
    assert sorted(os.listdir(tmp_path)) == ["latest", "mine", "step_0000002"]


@pytest.mark.parametrize("keep, left", [(0, [2, 4, 6, 8]), (1, [6, 8]), (2, [4, 6, 8]), (3, [2, 4, 6, 8]),
                                        (9, [2, 4, 6, 8])])
def test_old_checkpoints_are_deleted_and_nothing_else(tmp_path, keep, left):
    """Step 6 was just written. Step 8 is of a run before, which went back: it is no older checkpoint."""
    for step in (2, 4, 8, 6):
        made(tmp_path, step)
    for name in ("samples", "step_0000002.old", "step_x"):
        (tmp_path / name).mkdir()
    distributed.prune(str(tmp_path / "step_0000006"), keep)
    names = [f"step_{step:07d}" for step in left] + ["latest", "samples", "step_0000002.old", "step_x"]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert distributed.last_complete(tmp_path) == (str(tmp_path / "step_0000006"), [])


def test_a_run_keeps_so_many_checkpoints(tmp_path, world):
    run(tmp_path, *FLAGS, "--data", world, "--steps", "5", "--save_every", "1", "--keep", "2")
    assert sorted(name for name in os.listdir(tmp_path / "out/small/pretrain") if "step" in name) == [
        "step_0000004", "step_0000005"]


KILLS = int(os.environ.get("KILLS", 2))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through /proc")
def test_killed_at_any_moment_it_goes_on_also_on_other_ranks(tmp_path, world):
    """(must show 5) KILLS times kill -9 of two ranks: while starting, in a step, in a checkpoint. Each time the last
    checkpoint is whole, and every loss ever logged is that of a run that was never killed; on 1 and 4 ranks to
    rounding. KILLS=20 is by hand. One process, killed once: test_pretrain."""
    rng, folder = random.Random(2), tmp_path / "out/small/pretrain"
    flags = [*FLAGS, "--data", world, "--steps", str(8 * KILLS + 8)]
    run_ranks(run_on_a_rank, 2, tmp_path, [*flags, "--out", "straight"], joined=False)
    want, killed = losses_of(tmp_path, "straight"), {"starting": 0, "in a step": 0, "saving": 0}
    resume = lambda: ["--resume"] * os.path.islink(folder / "latest")
    for turn in range(KILLS):
        begun = max(losses_of(tmp_path), default=0) if resume() else 0
        p = start(tmp_path, 2, *flags, *resume(), before=AS_TINY)
        saving = lambda: [n for n in os.listdir(folder) if n.endswith(".tmp")] if folder.exists() else []
        logged = lambda: max(losses_of(tmp_path), default=0)
        if turn % 4 == 3:
            time.sleep(rng.uniform(0, 4))
        else:
            steps = rng.randint(1, 7)
            while logged() < begun + steps and p.poll() is None:
                time.sleep(0.005)
            while turn % 4 < 2 and not saving() and p.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
        assert p.poll() in (None, 0), p.communicate()[0]
        killed["saving" if saving() else "in a step" if logged() > begun else "starting"] += 1
        kill_all(p)
        for step, loss in losses_of(tmp_path).items():
            assert loss == want[step], (turn, step)
        whole, wrong = distributed.last_complete(folder)
        assert not wrong and (whole or not os.path.islink(folder / "latest"))
        if whole:
            Molmo2.from_pretrained(whole)
    print(killed)
    assert KILLS < 20 or all(killed.values()), killed
    begun = int(os.readlink(folder / "latest").removeprefix("step_")) if resume() else 0
    for ranks, cp in ((1, 1), (4, 2), (2, 1)):
        shutil.copytree(tmp_path / "out", tmp_path / f"on {ranks}", symlinks=True)
        more = [*resume(), "--out", f"on {ranks}", "--cp", str(cp)]
        run_ranks(run_on_a_rank, ranks, tmp_path, [*flags, *more], joined=False)
        got = losses_of(tmp_path, f"on {ranks}")
        assert got == want if ranks == 2 else got.keys() == want.keys()
        assert got[begun + 1] == pytest.approx(want[begun + 1], rel=1e-5)  # from there on rounding grows


def spoilt_on_the_second(rank, ranks, folder, flags):
    """Rank 1 alone has a loss that is no number in step 3, and is sent a signal in step 5."""
    real, calls = Molmo2.forward, []

    def forward(self, *a, **kw):
        calls.append(1)
        if rank == 1 and len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *a, **kw) * (math.nan if rank == 1 and len(calls) == 3 else 1)
    Molmo2.forward = forward
    said = run_on_a_rank(rank, ranks, folder, flags)
    assert rank or f"stopped by a signal after step {max(losses_of(folder))}" in said, said


def test_what_comes_to_one_rank_holds_for_all(tmp_path, world):
    """NaN holds back all: the others would go on from weights of their own, and no loss would tell. A signal stops all
    in the same step: the others would wait for the one in the next."""
    flags = [*FLAGS, "--data", world, "--steps", "5000", "--save_every", "1", "--keep", "0", "--global_batch",
             "2"]
    run_ranks(spoilt_on_the_second, 2, tmp_path, flags, joined=False)
    rows = [r for r in log_of(tmp_path) if "loss" in r]
    assert [r["skipped"] for r in rows[:4]] == [0, 0, 1, 1] and not math.isfinite(rows[2]["loss"])
    folder = tmp_path / "out/small/pretrain"
    two, three, four = (folder / f"step_000000{n}/model.safetensors" for n in (2, 3, 4))
    assert two.read_bytes() == three.read_bytes() != four.read_bytes()
    assert 5 <= len(rows) <= 7 and os.readlink(folder / "latest") == f"step_{len(rows):07d}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through /proc")
def test_a_silent_rank_is_named(tmp_path, world):
    """Its machine is gone or it hangs: nothing is closed, and yet the others do not wait for half an hour."""
    impatient = "pretrain.distributed.Heartbeat.EVERY, pretrain.distributed.Heartbeat.PATIENCE = 0.5, 10"
    p = start(tmp_path, 2, *FLAGS, "--data", world, "--steps", "5000", "--save_every", "5000",
              before=f"{AS_TINY}\n{impatient}")
    wait_for(tmp_path, 3, p)
    os.kill(children(p.pid)[1], signal.SIGSTOP)
    told = next((line for line in p.stdout if line.startswith("error: ")), "")
    kill_all(p)  # torchrun itself gives a rank that does not answer another 30 s
    said = r"error: step \d+, rank 0: rank 1 has not been heard of for 10 s, the last time in step \d+"
    assert re.match(said, told), told


# ---- compiled ----------------------------------------------------------------------------------------------

def grown(model, batch):
    for p in model.parameters():
        p.grad = None
    loss = model(**batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU takes a C++ compiler")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_compute_what_plain_ones_do(recompute):
    """Really compiled, also where they are computed again; the same loss and gradients; once for all numbers
    of crops."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    plain, fast = tiny_model("qwen").train(), tiny_model("qwen").train()
    distributed.shard_model(fast, World("cpu"), True, recompute, False)
    rng, graphs = torch.Generator().manual_seed(0), []

    def batch_of(B, crops):
        batch = random_batch(rng, B, 24)
        image = batch["tokens"] == V + IMAGE
        return batch | dict(crops=torch.randint(0, 256, (crops, 25, 48), generator=rng).byte(),
                            pool=torch.randint(0, 25 * crops, (int(image.sum()), 4), generator=rng))
    for crops in (2, 3, 4, 5, 6, 7):
        batch = batch_of(1, crops)
        want, got = grown(plain, batch), grown(fast, batch)
        largest = max(float(x.abs().max()) for x in want[1:])
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest)
        graphs.append(counters["stats"]["unique_graphs"])
    # of the ViT's blocks, the decoder's, and its last one, which goes on with the tokens that have a loss alone
    assert 3 <= graphs[1] <= 5 and graphs[1] == graphs[-1] and not counters["graph_break"], graphs
    # What else a run has: a single crop, the last micro-batch of a step, evaluation.
    for turn in range(2):
        for B, crops in ((1, 1), (3, 5), (2, 1)):
            grown(fast, batch_of(B, crops))
        with torch.no_grad():
            fast.eval()(**batch_of(1, 4))
        fast.train()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[-2] <= torch._dynamo.config.recompile_limit // 2, graphs


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU takes a C++ compiler")
def test_flex_attention_in_compiled_blocks():
    """What runs on CUDA, forwards, which is all a CPU can do: one graph for all masks, and the dense rule's
    numbers."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    plain, fast = tiny_model("qwen"), tiny_model("qwen")
    flex.install(fast)
    distributed.shard_model(fast, World("cpu"), True, False, False)
    plain.mask = lambda tokens, example, branch: dense_mask(example, branch, is_vision(tokens, V))
    fast.mask = lambda tokens, example, branch: block_mask(example, branch, is_vision(tokens, V))
    rng, T = torch.Generator().manual_seed(0), 256
    for _ in range(4):
        example, branch, vision = (torch.stack(x) for x in zip(random_tree(rng, T), random_tree(rng, T)))
        tokens = torch.where(vision, V, torch.randint(0, V, (2, T), generator=rng))  # V: <image_start>
        with torch.no_grad():
            want, got = (m(tokens, example=example, branch=branch)[example > 0] for m in (plain, fast))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


# ---- cores -------------------------------------------------------------------------------------------------

ASK = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(*map(os.environ.get, ("GOMP_SPINCOUNT", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")), flush=True)
            os._exit(0)  # loading it takes seconds
sys.meta_path.insert(0, Watch())
import %s
"""


@pytest.mark.parametrize("command", ["pretrain", "sft"])
def test_threads_are_told_to_spin_less_before_torch_is_loaded(command):
    """Set later it would do nothing, and a busy machine would train many times slower."""
    def seen(**env):
        clean = {name: value for name, value in os.environ.items() if name not in
                 ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")}
        return subprocess.run([sys.executable, "-c", ASK % command], env=clean | env, cwd=ROOT, text=True,
                              capture_output=True, check=True).stdout.split()
    assert seen() == ["3000", "expandable_segments:True", ":4096:8"]
    assert seen(OMP_WAIT_POLICY="ACTIVE")[0] == "None"  # the user's word counts


def loaded(path, names):
    """Add the names of modules to `names` in the order in which the file at `path` loads them. Imports of the project's
    own modules are followed; those within functions come later, and are not."""
    with open(path, encoding="utf-8") as f:
        statements = ast.parse(f.read()).body
    for statement in statements:
        for node in statement.body if isinstance(statement, ast.Try) else [statement]:
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for module in modules:
                load(module, names)


def load(module, names):
    """A module and, before it, the packages that it is in."""
    parts = module.split(".")
    for n in range(1, len(parts) + 1):
        name = ".".join(parts[:n])
        place = os.path.join(ROOT, *parts[:n])
        if name not in names:
            names.append(name)
            for path in (f"{place}.py", os.path.join(place, "__init__.py")):
                if os.path.isfile(path):
                    loaded(path, names)


def commands():
    """Modules with a __main__ block that load torch. model.py needs torch alone, and only counts parameters."""
    found = []
    for pattern in ("*.py", "lib/*.py", "tools/*.py", "tools/*/*.py"):
        for path in sorted(glob.glob(os.path.join(ROOT, pattern))):
            with open(path, encoding="utf-8") as f:
                is_command = 'if __name__ == "__main__"' in f.read()
            module = os.path.relpath(path, ROOT).removesuffix(".py").replace(os.sep, ".")
            names = []
            load(module, names)
            if is_command and "torch" in names and module != "model":
                found.append(module)
    return found


def test_the_commands_that_load_torch_are_found():
    assert {"pretrain", "sft", "longctx", "sample", "eval", "lib.budget", "tools.bench.__main__"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_every_command_loads_lib_before_torch(command):
    """What lib/__init__.py sets is read when torch is loaded, and never again."""
    names = []
    load(command, names)
    assert "lib" in names and names.index("lib") < names.index("torch"), f"{command}: import lib before torch"


def test_cores_are_those_the_process_may_use(tmp_path):
    quota = tmp_path / "cpu.max"
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for text, want in (("max 100000\n", allowed), ("100000 100000\n", 1), ("20000 100000\n", 1),
                       ("150000 100000\n", min(2, allowed)), ("99999999 100000\n", allowed), ("", allowed)):
        quota.write_text(text)
        assert distributed.cores(str(quota)) == want
    assert distributed.cores(str(tmp_path / "none")) == allowed


@pytest.mark.parametrize("cores, ranks, want", [(2, None, 1), (1, None, 1), (4, None, 3), (16, 1, 8), (192, 8, 8),
                                                (16, 8, 1), (8, 8, 1), (4, 8, 1), (48, 8, 5)])
def test_workers_are_a_ranks_share_of_the_cores(cores, ranks, want, monkeypatch):
    """One core of each rank trains; more ranks than cores have a worker each all the same."""
    monkeypatch.setattr(distributed, "cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert distributed.auto_workers() == want
