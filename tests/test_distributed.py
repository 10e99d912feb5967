"""Any number of ranks computes what one does, and a checkpoint outlives whatever happens to them."""
import contextlib
import json
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

import pytest
import torch
from conftest import HERE, run_ranks, tiny_model
from test_model import random_tree
from test_ulysses import V, random_batch

import distributed
import ulysses
from distributed import World
from model import IMAGE, Molmo2, block_mask, dense_mask, is_vision

ROOT = os.path.dirname(HERE)


def check_gradients(rank, ranks, cp, style):
    """(must show 1) uneven loss weights, ranks without pictures and ranks without a row."""
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
    distributed.share_work(shared, world, False, True, False)
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


class OneProduct(torch.nn.Module):
    """Of a model what `share_work` knows: it has blocks."""

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
    distributed.share_work(model, World("cpu", rank, ranks, 1, mesh), False, False, True)
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

FLAGS = ["--config", "small", "--mixture", "equal", "--global_batch", "3", "--micro_batch", "1",
         "--seq_len", "192", "--save_every", "2", "--workers", "0"]


def start(tmp_path, ranks, *flags, before="", **kw):
    """pretrain.py as a user starts it, alone or on several ranks; `before`: Python lines to run first."""
    script = os.path.join(ROOT, "pretrain.py")
    if before:
        script = str(tmp_path / "spoilt.py")
        with open(script, "w") as f:
            f.write(f"import os, sys\nsys.path.insert(0, {ROOT!r})\nimport pretrain\n{before}\n"
                    "pretrain.main(pretrain.Config(), pretrain.PRESETS)\n")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    launch += ["--standalone"] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *launch, script, *flags], cwd=tmp_path,
                            env=dict(os.environ, OMP_NUM_THREADS="1"), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True, **kw)


def finish(p, code=0):
    text, _ = p.communicate(timeout=240)
    assert p.returncode == code and "Traceback" not in text, text
    return text


def losses(tmp_path, out="out"):
    path = tmp_path / out / "small" / "pretrain" / "log.jsonl"
    if not path.exists():
        return {}
    with open(path) as f:
        return {r["step"]: r["loss"] for r in map(json.loads, f) if "loss" in r}


def wait_for(tmp_path, step, p):
    """Until the log has come so far."""
    log, end = tmp_path / "out" / "small" / "pretrain" / "log.jsonl", time.time() + 120
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
    assert os.readlink(tmp_path / "out/small/pretrain/latest") == f"step_{step:07d}"
    assert max(losses(tmp_path)) == step
    # while one run goes on, another in the same folder is refused
    p = start(tmp_path, 1, *flags, "--resume", "--save_every", "1000", "--workers", "1")
    wait_for(tmp_path, step + 2, p)
    assert "another run is writing into this folder" in finish(start(tmp_path, 1, *flags), 2)
    for number in (signal.SIGINT, signal.SIGTERM):  # to the worker too, and twice, as from a queue and torchrun
        os.killpg(p.pid, number)
    finish(p)


def test_a_signal_may_come_while_the_one_before_is_noted():
    """Hundreds in half a second: some of them interrupt the handler itself, which must hold no lock."""
    code = """
import os, signal, time
import distributed
with distributed.stop_signals() as stop:
    child = os.fork()
    until = time.monotonic() + 0.5
    while not child and time.monotonic() < until:
        os.kill(os.getppid(), signal.SIGTERM)
        os.kill(os.getppid(), signal.SIGINT)
    if not child:
        os._exit(0)
    while not os.waitpid(child, os.WNOHANG)[0]:
        [str(i) for i in range(1000)]
    print(bool(stop))
"""
    p = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(HERE), capture_output=True, text=True,
                       timeout=60)
    assert p.returncode == 0 and p.stdout == "True\n", p.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through /proc")
def test_a_signal_to_one_rank_stops_all(tmp_path, world):
    """In the same step: else the others would wait for it in the next one."""
    p = start(tmp_path, 2, *FLAGS, "--data", world, "--steps", "5000", "--save_every", "5000")
    wait_for(tmp_path, 3, p)
    os.kill(children(p.pid)[1], signal.SIGTERM)
    step = int(re.search(r"stopped by a signal after step (\d+)", finish(p))[1])
    assert os.readlink(tmp_path / "out/small/pretrain/latest") == f"step_{step:07d}"


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, world):
    flags, folder = [*FLAGS, "--data", world, "--steps", "4"], tmp_path / "out/small/pretrain"
    p = start(tmp_path, 1, *flags)
    wait_for(tmp_path, 3, p)
    kill_all(p)
    before = (folder / "step_0000002/model.safetensors").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    text = finish(start(tmp_path, 1, *flags, "--resume", preexec_fn=limit), 2)
    assert "checkpoint could not be written, the one before it is whole" in text and "GB free" in text
    assert os.readlink(folder / "latest") == "step_0000002"
    assert (folder / "step_0000002/model.safetensors").read_bytes() == before
    assert not [n for n in os.listdir(folder) if n.endswith(".tmp")]
    finish(start(tmp_path, 1, *flags, "--resume"))
    assert os.readlink(folder / "latest") == "step_0000004"


def test_a_damaged_checkpoint_is_refused(tmp_path, world):
    """A bit that flipped, a file that was cut: --resume goes back to the checkpoint before, and goes on."""
    flags, folder = [*FLAGS, "--data", world, "--steps", "6"], tmp_path / "out/small/pretrain"
    finish(start(tmp_path, 1, *flags))
    want = losses(tmp_path)
    shutil.copytree(folder, tmp_path / "whole", symlinks=True)
    state = next((folder / "step_0000004/train_state").glob("*.distcp"))
    os.truncate(state, os.path.getsize(state) // 2)
    model = folder / "step_0000006/model.safetensors"
    data = bytearray(model.read_bytes())
    data[-5] ^= 1
    model.write_bytes(data)
    text = finish(start(tmp_path, 1, *flags, "--resume"))
    for damaged in ("step_0000006/model.safetensors", f"step_0000004/train_state/{state.name}"):
        assert f"{damaged}: not what was written" in text
    assert "resuming after step 2" in text and losses(tmp_path) == want
    for name in ("model.safetensors", "config.json"):  # written again, just as before
        again, before = (f / "step_0000006" / name for f in (folder, tmp_path / "whole"))
        assert again.read_bytes() == before.read_bytes()
    data[-5] ^= 3
    model.write_bytes(data)
    text = finish(start(tmp_path, 1, *flags, "--out", "next", "--init_from", str(folder / "latest")), 2)
    assert "error: --init_from" in text and "model.safetensors: not what was written" in text
    for name in os.listdir(folder):
        if name.startswith("step_"):
            os.remove(folder / name / "COMPLETE")
    text = finish(start(tmp_path, 1, *flags, "--resume"), 2)
    assert "is whole: " in text and "step_0000006/COMPLETE: No such file" in text


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
    assert distributed.last_whole(tmp_path) == (str(tmp_path / "step_0000010"), [])
    spoil(tmp_path / "step_0000010" / file)
    (tmp_path / "step_0000009" / "COMPLETE").unlink()
    whole, (last, before) = distributed.last_whole(tmp_path)
    assert whole == str(tmp_path / "step_0000008") and "step_0000010" in last
    assert before == f"{tmp_path / 'step_0000009' / 'COMPLETE'}: No such file or directory"
    state_alone = file == "train_state/pieces"
    assert (distributed.damage(tmp_path / "step_0000010", leave_out="train_state") is None) == state_alone


def test_a_checkpoint_later_than_latest_is_not_resumed_from(tmp_path):
    """A kill came before it was noted, or the user turned `latest` back: the run goes on from there."""
    assert distributed.last_whole(tmp_path) == distributed.last_whole(tmp_path / "nowhere") == (None, [])
    for step in (2, 4, 6):
        made(tmp_path, step)
    (tmp_path / "step_0000005.old").mkdir()
    assert os.readlink(tmp_path / "latest") == "step_0000006" and (tmp_path / "latest" / "model").exists()
    for turned_to in (4, 2):
        (tmp_path / "latest").unlink()
        (tmp_path / "latest").symlink_to(f"step_{turned_to:07d}")
        assert distributed.last_whole(tmp_path) == (str(tmp_path / f"step_{turned_to:07d}"), [])
    flip(tmp_path / "step_0000002" / "model")
    assert distributed.last_whole(tmp_path)[0] is None
    (tmp_path / "latest").unlink()  # not there yet: what is whole counts
    assert distributed.last_whole(tmp_path) == (str(tmp_path / "step_0000006"), [])
    made(tmp_path, 4)  # written again by a run that went on from 2
    assert os.readlink(tmp_path / "latest") == "step_0000004" and not (tmp_path / "latest.tmp").exists()
    assert distributed.last_whole(tmp_path) == (str(tmp_path / "step_0000004"), [])


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path):
    made(tmp_path, 2)
    (tmp_path / ".step_0000004.tmp" / "train_state").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    distributed.Saver(str(tmp_path), World("cpu", rank=1))
    assert (tmp_path / ".step_0000004.tmp").exists()  # the first rank clears
    distributed.Saver(str(tmp_path), World("cpu"))
    assert sorted(os.listdir(tmp_path)) == ["latest", "mine", "step_0000002"]


KILLS = int(os.environ.get("KILLS", 2))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through /proc")
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_moment(tmp_path, world, ranks):
    """(must show 5) KILLS times kill -9 of all ranks: while starting, in a step, in a checkpoint. Each time
    the last checkpoint is whole, and every loss ever logged is that of a run that was never killed. KILLS=20
    is by hand."""
    rng, folder = random.Random(ranks), tmp_path / "out/small/pretrain"
    flags = [*FLAGS, "--data", world, "--steps", str(8 * KILLS + 8)]
    finish(start(tmp_path, ranks, *flags, "--out", "straight"))
    want, killed = losses(tmp_path, "straight"), {"starting": 0, "in a step": 0, "saving": 0}
    for turn in range(KILLS):
        resume = ["--resume"] * os.path.islink(folder / "latest")
        begun = max(losses(tmp_path), default=0) if resume else 0
        p, until = start(tmp_path, ranks, *flags, *resume), time.time() + 120
        saving = lambda: [n for n in os.listdir(folder) if n.endswith(".tmp")] if folder.exists() else []
        logged = lambda: max(losses(tmp_path), default=0)
        if turn % 4 == 3:
            time.sleep(rng.uniform(0, 4))
        else:
            steps = rng.randint(1, 7)
            while logged() < begun + steps and time.time() < until and p.poll() is None:
                time.sleep(0.005)
            while turn % 4 < 2 and not saving() and time.time() < until and p.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
        assert p.poll() is None, p.communicate()[0]
        killed["saving" if saving() else "in a step" if logged() > begun else "starting"] += 1
        kill_all(p)
        for step, loss in losses(tmp_path).items():
            assert loss == want[step], (turn, step)
        whole, wrong = distributed.last_whole(folder)
        assert not wrong and (whole or not os.path.islink(folder / "latest"))
        if whole:
            Molmo2.from_pretrained(whole)
    print(killed)
    finish(start(tmp_path, ranks, *flags, *(["--resume"] * os.path.islink(folder / "latest"))))
    assert losses(tmp_path) == want and (KILLS < 20 or all(killed.values())), killed


def test_a_rank_with_nan_holds_back_all(tmp_path, world):
    """The others would go on from weights of their own, and no loss would tell."""
    spoil = """
real, calls = pretrain.Molmo2.forward, []
def forward(self, *a, **kw):
    calls.append(1)
    return real(self, *a, **kw) * (float("nan") if os.environ["RANK"] == "1" and len(calls) == 3 else 1)
pretrain.Molmo2.forward = forward"""
    flags = [*FLAGS, "--data", world, "--steps", "3", "--global_batch", "2"]
    finish(start(tmp_path, 2, *flags, before=spoil))
    with open(tmp_path / "out/small/pretrain/log.jsonl") as f:
        rows = [r for r in map(json.loads, f) if "loss" in r]
    assert [r["skipped"] for r in rows] == [0, 0, 1] and not math.isfinite(rows[2]["loss"])
    two, three = (tmp_path / f"out/small/pretrain/step_000000{n}/model.safetensors" for n in (2, 3))
    assert two.read_bytes() == three.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through /proc")
def test_a_silent_rank_is_named(tmp_path, world):
    """Its machine is gone or it hangs: nothing is closed, and yet the others do not wait for half an hour."""
    p = start(tmp_path, 2, *FLAGS, "--data", world, "--steps", "5000", "--save_every", "5000",
              before="pretrain.distributed.Pulse.EVERY, pretrain.distributed.Pulse.PATIENCE = 0.5, 5")
    wait_for(tmp_path, 3, p)
    os.kill(children(p.pid)[1], signal.SIGSTOP)
    told = next((line for line in p.stdout if line.startswith("error: ")), "")
    kill_all(p)  # torchrun itself gives a rank that does not answer another 30 s
    said = r"error: step \d+, rank 0: rank 1 has not been heard of for 5 s, the last time in step \d+"
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
def test_compiled_blocks(recompute):
    """Really compiled, also where they are computed again; the same loss and gradients; once for all numbers
    of crops."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    plain, fast = tiny_model("qwen").train(), tiny_model("qwen").train()
    distributed.share_work(fast, World("cpu"), True, recompute, False)
    rng, graphs = torch.Generator().manual_seed(0), []
    for crops in (2, 3, 4, 5, 6, 7):
        batch = random_batch(rng, 1, 24)
        image = batch["tokens"] == V + IMAGE
        batch |= dict(crops=torch.randint(0, 256, (crops, 25, 48), generator=rng).byte(),
                      pool=torch.randint(0, 25 * crops, (int(image.sum()), 4), generator=rng))
        want, got = grown(plain, batch), grown(fast, batch)
        largest = max(float(x.abs().max()) for x in want[1:])
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 2 <= graphs[1] <= 3 and graphs[1] == graphs[-1] and not counters["graph_break"], graphs


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU takes a C++ compiler")
def test_flex_attention_in_compiled_blocks():
    """What runs on CUDA, forwards, which is all a CPU can do: one graph for all masks, and the dense rule's
    numbers."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    plain, fast = tiny_model("qwen"), tiny_model("qwen")
    distributed.share_work(fast, World("cpu"), True, False, False)
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
