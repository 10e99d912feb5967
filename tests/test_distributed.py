"""Any number of ranks computes what one does, and a checkpoint outlives whatever happens to them."""
import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import HERE, run_ranks, tiny_model
from test_ulysses import V, random_batch

import distributed
import ulysses
from distributed import World
from model import IMAGE

ROOT = os.path.dirname(HERE)


def check_gradients(rank, ranks, cp, style):
    """(must show 1) uneven loss weights, ranks without pictures and ranks without a row."""
    os.environ |= dict(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    mesh = torch.distributed.init_device_mesh("cpu", (ranks,), mesh_dim_names=("shards",))
    cp_mesh = torch.distributed.init_device_mesh("cpu", (ranks // cp, cp), mesh_dim_names=("dp", "cp"))
    cp_group = cp_mesh["cp"].get_group()
    world = World("cpu", rank, ranks, cp, mesh, cp_group)
    plain, shared = tiny_model(style).train(), tiny_model(style).train()
    if cp > 1:
        ulysses.install(shared, cp_group)
    distributed.share_work(shared, world, False, True, False)
    for seed in range(6):
        rng = torch.Generator().manual_seed(seed)
        batches = []
        for k in range(world.dp):
            b = random_batch(rng, 1 + seed % 2, 24)
            if k % 2:  # text alone
                b |= dict(crops=None, pool=None, tokens=torch.where(b["tokens"] < V, b["tokens"], 7))
            if k == 1 and seed % 2:  # a rank that has no row in this step
                b |= {name: torch.zeros_like(b[name]) for name in ("weights", "example", "branch", "pos", "tokens")}
            batches.append(b)
        W = sum(float(b["weights"].sum()) for b in batches)
        want = sum(plain(**b, z_loss=1e-3) for b in batches) / W
        plain.zero_grad()
        want.backward()
        mine = batches[world.dp_rank]
        if mine["crops"] is None:
            mine |= dict(crops=torch.zeros(1, 25, 48, dtype=torch.uint8), pool=torch.zeros(0, 4, dtype=torch.long))
        if cp > 1:
            mine = ulysses.shard_batch(mine, V + IMAGE, world.cp_rank, cp)
        shared.zero_grad()
        got = shared(**mine, z_loss=1e-3) / (W / ranks)
        got.backward()
        total = world.add(got.detach()) / ranks
        torch.testing.assert_close(total, want.detach(), rtol=1e-6, atol=0)
        whole = math.hypot(*(float(p.grad.norm()) for p in plain.parameters() if p.grad is not None))
        for (name, a), b in zip(plain.named_parameters(), shared.parameters()):
            a = torch.zeros_like(a) if a.grad is None else a.grad
            off = float((a - b.grad.full_tensor()).norm())
            assert off <= 1e-6 * whole, (seed, name, off, whole)


@pytest.mark.parametrize("ranks, cp, style", [(2, 1, "qwen"), (4, 1, "olmo"), (4, 2, "qwen")])
def test_gradients_do_not_depend_on_the_number_of_ranks(ranks, cp, style):
    run_ranks(check_gradients, ranks, cp, style)


# ---- whole runs --------------------------------------------------------------------------------------------

FLAGS = ["--config", "small", "--mixture", "equal", "--global_batch", "3", "--micro_batch", "1", "--seq_len", "192",
         "--save_every", "2", "--workers", "0"]


def start(tmp_path, ranks, *flags, **kw):
    """pretrain.py as a user starts it, alone or on several ranks."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    launch += ["--standalone"] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *launch, os.path.join(ROOT, "pretrain.py"), *flags], cwd=tmp_path,
                            env=dict(os.environ, OMP_NUM_THREADS="1"), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True, **kw)


def finish(p, code=0):
    text, _ = p.communicate(timeout=240)
    assert p.returncode == code and "Traceback" not in text, text
    return text


def losses(tmp_path, out="out"):
    with open(tmp_path / out / "small" / "pretrain" / "log.jsonl") as f:
        return {r["step"]: r["loss"] for r in map(json.loads, f) if "loss" in r}


def wait_for(tmp_path, step, p):
    """Until the log has come so far."""
    log, end = tmp_path / "out" / "small" / "pretrain" / "log.jsonl", time.time() + 120
    while not (log.exists() and log.read_text().count("\n") >= step):
        assert time.time() < end and p.poll() is None, p.communicate()[0]
        time.sleep(0.02)


def kill_all(p):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(p.pid, signal.SIGKILL)
    p.wait()


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(c) for c in f.read().split()]


@pytest.mark.slow
def test_ranks_may_change_between_runs(tmp_path, world):
    """(must show 5) killed on 2 ranks; on 2 it repeats bit for bit, on 1 and 4 to rounding."""
    flags = [*FLAGS, "--data", world, "--steps", "6"]
    finish(start(tmp_path, 2, *flags, "--out", "straight"))
    p = start(tmp_path, 2, *flags)
    wait_for(tmp_path, 3, p)
    kill_all(p)
    assert os.readlink(tmp_path / "out/small/pretrain/latest") == "step_0000002"
    want = losses(tmp_path, "straight")
    for ranks, cp in ((1, 1), (4, 2), (2, 1)):
        shutil.copytree(tmp_path / "out", tmp_path / f"on {ranks}", symlinks=True)
        finish(start(tmp_path, ranks, *flags, "--resume", "--out", f"on {ranks}", "--cp", str(cp)))
        got = losses(tmp_path, f"on {ranks}")
        if ranks == 2:
            assert got == want
        assert got.keys() == want.keys() and got[3] == pytest.approx(want[3], rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through /proc")
def test_a_dead_rank_ends_the_job(tmp_path, world):
    p = start(tmp_path, 2, *FLAGS, "--data", world, "--steps", "5000", "--save_every", "5000")
    wait_for(tmp_path, 3, p)
    os.kill(children(p.pid)[1], signal.SIGKILL)
    began = time.time()
    text, _ = p.communicate(timeout=120)
    assert time.time() - began < 60 and p.returncode != 0
    assert re.search(r"error: step \d+, rank 0: ", text) and "rank      : 1" in text, text


def test_a_signal_finishes_the_step_and_saves(tmp_path, world):
    flags = [*FLAGS, "--data", world, "--steps", "60"]
    p = start(tmp_path, 1, *flags, "--save_every", "1000")
    wait_for(tmp_path, 3, p)
    p.send_signal(signal.SIGTERM)
    text = finish(p)
    step = int(re.search(r"stopped by a signal after step (\d+)", text)[1])
    assert os.readlink(tmp_path / "out/small/pretrain/latest") == f"step_{step:07d}" and max(losses(tmp_path)) == step
    # while one run goes on, another in the same folder is refused
    p = start(tmp_path, 1, *flags, "--resume", "--save_every", "1000")
    wait_for(tmp_path, step + 2, p)
    assert "another run is writing into this folder" in finish(start(tmp_path, 1, *flags), 2)
    p.send_signal(signal.SIGINT)
    finish(p)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, world):
    flags = [*FLAGS, "--data", world]
    finish(start(tmp_path, 1, *flags, "--steps", "2"))
    folder = tmp_path / "out/small/pretrain"
    with open(folder / "step_0000002/train_state/state.json") as f:
        state = json.load(f)
    state["config"]["steps"] = 4
    with open(folder / "step_0000002/train_state/state.json", "w") as f:
        json.dump(state, f)
    before = (folder / "step_0000002/model.safetensors").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    text = finish(start(tmp_path, 1, *flags, "--steps", "4", "--resume", preexec_fn=limit), 2)
    assert "checkpoint could not be written, the one before it is whole" in text and "GB free" in text
    assert os.readlink(folder / "latest") == "step_0000002"
    assert (folder / "step_0000002/model.safetensors").read_bytes() == before
    assert not [n for n in os.listdir(folder) if n.endswith(".tmp")]
    finish(start(tmp_path, 1, *flags, "--steps", "4", "--resume"))
    assert os.readlink(folder / "latest") == "step_0000004"
