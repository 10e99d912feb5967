"""
What pretrain.py needs to run on more than one device, and to survive: the mesh, sharding, checkpoints of the
training state, signals, and a pulse that tells which rank has died. Each of these is a few plain lines.

    python pretrain.py                               1 process, plain modules
    torchrun --nproc_per_node=8 pretrain.py         8 ranks: each reads its own rows (data parallel, dp)
    torchrun --nproc_per_node=8 longctx.py --cp 4   2 x 4 ranks: 4 share a row (context parallel, ulysses.py)

        rank      0    1    2    3  |  4    5    6    7
        row       a    a    a    a  |  b    b    b    b       dp 2
        tokens   0-¼  ¼-½  ½-¾  ¾-1 | 0-¼  ¼-½  ½-¾  ¾-1      cp 4
        weights   ⅛    ⅛    ⅛    ⅛  |  ⅛    ⅛    ⅛    ⅛       FSDP2: sharded over all ranks of a node, and copied
                                                              from node to node

Every rank divides its loss by the same number, the step's weight over all ranks, so gradients are those of
one process with all rows. FSDP2 takes the mean over ranks; hence the loss is multiplied by their number.
"""
import contextlib
import ctypes
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.utils.checkpoint import checkpoint

from lib.weights import read_json


class UserError(Exception):
    """Something the user can put right; shown as one line, exit code 2."""


# ---- who is there ------------------------------------------------------------------------------------------

@dataclass
class World:
    """This process among all: `size` ranks in all, cp of them share a row."""
    device: str
    rank: int = 0
    size: int = 1
    cp: int = 1
    mesh: object = None        # (copies, shards), for FSDP2
    cp_group: object = None
    control: object = None     # CPU group for small messages
    saving: object = None      # CPU group of the thread that writes checkpoints
    pulse: object = None       # its `step` is told when a rank dies

    @property
    def dp(self):
        """How many rows are read at a time."""
        return self.size // self.cp

    @property
    def dp_rank(self):
        return self.rank // self.cp

    @property
    def cp_rank(self):
        return self.rank % self.cp

    def gather(self, value):
        """Every rank's value, in the order of ranks. For small Python objects."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=self.control)
        return values

    def first(self, do, tell=lambda value: value):
        """do() on the first rank alone. It gets what do() returns and the others tell(that), a small object;
        what the user can put right is raised on all of them."""
        value = error = None
        if self.rank == 0:
            try:
                value = do()
            except (UserError, ValueError) as e:
                error = e
        told, error = self.gather((None if value is None else tell(value), error))[0]
        if error:
            raise error
        return value if self.rank == 0 else told

    def add(self, x):
        """The sum of a tensor over all ranks."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def close(self):
        """Part from the other ranks in peace."""
        if self.size > 1:
            self.gather(None)
            self.pulse.over.set()
            self.pulse.thread.join()
            dist.destroy_process_group()


def start(device, cp=1):
    """Join the other ranks, if torchrun started some: NCCL between GPUs, gloo between CPUs."""
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if size % cp:
        raise UserError(f"--cp {cp}: {size} process{'es' * (size > 1)} cannot be parted into groups of {cp}"
                        + (f"; start them with torchrun --nproc_per_node={cp}" if size == 1 else ""))
    if size == 1:
        return World(device, pulse=SimpleNamespace(step=0))
    if device == "cuda":
        torch.cuda.set_device(local)
    store, rank, _ = next(dist.rendezvous("env://"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", rank=rank, world_size=size,
                            store=dist.PrefixStore("ours", store), timeout=timedelta(minutes=30))
    node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    node = node if size % node == 0 and node % cp == 0 else size
    mesh = dist.init_device_mesh(device, (size // node, node), mesh_dim_names=("copies", "shards"))
    cp_mesh = dist.init_device_mesh(device, (size // cp, cp), mesh_dim_names=("dp", "cp"))
    world = World(device, rank, size, cp, mesh if size > node else mesh["shards"], cp_mesh["cp"].get_group(),
                  *(dist.new_group(backend="gloo") for _ in range(2)))
    world.pulse = Heartbeat(world, store)
    return world


def shard_model(model, world, compile_blocks, recompute, bf16):
    """Turn a plain model into this rank's part of it, in place: activation checkpointing, compilation and
    FSDP2, block by block and in this order, so that what is computed again is compiled too. Only the first
    rank's model needs to hold numbers; on its device no rank ever has more than its part and one block."""
    if world.size > 1:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        # Weights are kept and gradients are added up in fp32; inputs stay as they are (loss weights, angles).
        policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32,
                                      cast_forward_inputs=False)
    else:
        model.to(world.device)

    def shard(module):
        if world.size > 1:
            receive(module, world)
            fully_shard(module, mesh=world.mesh, mp_policy=policy)
    if compile_blocks:
        # A version each for ViT and decoder, training and evaluation, one crop and many; beyond that an error,
        # for PyTorch would quietly go on without compiling.
        torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 16, True
    for block in model.blocks():
        if recompute:
            block.forward = checkpointed(block.forward)
        if compile_blocks:
            block.compile()
        shard(block)
    shard(model)


def checkpointed(forward):
    """Keep the inputs of `forward` alone, and call it again on the way back. A function of ours, since the
    compiler does not look into what checkpoint() itself is called with."""
    def run(*args, **kw):
        return checkpoint(forward, *args, use_reentrant=False, **kw)
    return run


def receive(module, world):
    """Give parameters that are not sharded yet the first rank's numbers, on this rank's device."""
    new = {}  # a tied one is met twice
    for m in module.modules():
        for name, p in [*m.named_parameters(recurse=False)]:
            if hasattr(p, "full_tensor"):
                continue
            if p not in new:
                full = torch.empty_like(p, device=world.device) if world.rank else p.detach().to(world.device)
                dist.broadcast(full, 0)
                new[p] = torch.nn.Parameter(full, p.requires_grad)
            setattr(m, name, new[p])


def whole(model, make, device=None, keep=True):
    """A plain model with all weights, built by make(): `model` itself if it was not shared and no other
    `device` is asked for. All ranks call it; those that do not `keep` get None."""
    if not dist.is_initialized() and device is None:
        return model
    state = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        full = p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
        if keep:  # a copy of its own: training goes on
            state[name] = full.to(device or full.device, copy=True)
    if not keep:
        return None
    with torch.device("meta"):
        plain = make()
    plain.load_state_dict(state, assign=True)
    return plain.eval()


def number(x):
    """A float, of a tensor that may be spread over ranks."""
    return float(x.full_tensor() if hasattr(x, "full_tensor") else x)


# ---- checkpoints -------------------------------------------------------------------------------------------
#
# run/step_0000500/  config.json model.safetensors tokenizer.json ...  weights, for the next stage and others
#                    train_state/  the optimiser in pieces, as it was sharded (torch.distributed.checkpoint),
#                                  and state.json; only --resume of this very run reads it: it has a pickle
#                    COMPLETE      written last: the sha256 of every file, as `sha256sum -c COMPLETE` reads it
# run/latest         -> the last complete one
#
# Everything is written under another name and synced before it gets its own: after a power cut or a kill -9 a
# name never stands for half a checkpoint. What a disk or a copy did to it later, the sums tell.

def optimizer_state(optimizers, names):
    """{"optimiser/what/parameter": tensor}"""
    return {f"{i}/{what}/{names[p]}": t for i, o in enumerate(optimizers) for p, s in o.state.items()
            for what, t in s.items()}


def sync(path):
    """Have the disk keep a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Saver:
    """Writes checkpoints while training goes on: what is to be saved is copied; a thread writes the copy."""

    def __init__(self, run, world):
        self.run, self.world, self.thread, self.error = run, world, None, None
        for name in os.listdir(run) if world.rank == 0 else ():
            if re.fullmatch(r"\.step_\d+\.tmp", name):  # of a run that was killed
                shutil.rmtree(os.path.join(run, name))

    def save(self, step, model, make, optimizers, names, write_files):
        """Begin to write run/step_N. make(): an empty model; write_files(model, folder): everything but the
        optimiser. All ranks call it."""
        self.finish()
        first, name = self.world.rank == 0, f"step_{step:07d}"
        aside = os.path.join(self.run, f".{name}.tmp")
        copy = whole(model, make, "cpu", keep=first)
        state = optimizer_state(optimizers, names)
        tensors = {key: t.detach().to("cpu", copy=True) for key, t in state.items()}
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            os.makedirs(os.path.join(aside, "train_state"))
        self.world.gather(None)  # nobody writes before the folder is there

        def write():
            try:
                with warnings.catch_warnings():  # that there is one process alone is no surprise
                    warnings.simplefilter("ignore")
                    dcp.save(tensors, checkpoint_id=os.path.join(aside, "train_state"),
                             process_group=self.world.saving, no_dist=self.world.size == 1)
                if first:
                    write_files(copy, aside)
                    publish(aside, os.path.join(self.run, name))
            except BaseException as e:  # DCP's own is one; it is told at the next step, by all ranks
                free = shutil.disk_usage(self.run).free / 2 ** 30
                why = (str(e).strip() or repr(e)).splitlines()[-1]
                self.error = f"{aside}: {why} (that disk has {free:.1f} GB free)"
                if first:
                    shutil.rmtree(aside, ignore_errors=True)
        self.thread = threading.Thread(target=write, name="checkpoint")
        self.thread.start()

    def finish(self):
        """Wait until what was begun is on disk, on all ranks. UserError where it could not be written."""
        if self.thread:
            self.thread.join()
            self.thread = None
            self.check(self.world.gather(self.error))

    @staticmethod
    def check(errors):
        """Stop where a rank could not write; what it had written before is whole."""
        errors = [e for e in errors if e]
        if errors:
            raise UserError(f"the checkpoint could not be written, the one before it is whole: {errors[0]}")


def publish(aside, final):
    """Give a finished checkpoint its name, and make it the latest."""
    sums = []
    for path, _, files in os.walk(aside):
        for file in (os.path.join(path, name) for name in sorted(files)):
            sync(file)
            sums.append(f"{digest(file)}  {os.path.relpath(file, aside)}\n")
        sync(path)
    with open(os.path.join(aside, "COMPLETE"), "w") as f:
        f.writelines(sums)
        f.flush()
        os.fsync(f.fileno())
    sync(aside)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(aside, final)
    run, name = os.path.split(final)
    link = os.path.join(run, "latest")
    with contextlib.suppress(FileNotFoundError):
        os.remove(link + ".tmp")
    os.symlink(name, link + ".tmp")
    os.replace(link + ".tmp", link)
    sync(run)


def damage(folder, leave_out=()):
    """What is wrong with a checkpoint, in one line, or None: its files against their sums in COMPLETE."""
    path = os.path.join(folder, "COMPLETE")
    try:
        with open(path) as f:
            sums = [line.rstrip("\n").split("  ", 1) for line in f]
        for want, name in sums:
            path = os.path.join(folder, name)
            if not name.startswith(leave_out) and digest(path) != want:
                return f"{path}: not what was written (its sha256 differs from that in COMPLETE)"
    except OSError as e:
        return f"{path}: {e.strerror}"
    except ValueError:
        sums = []
    return None if sums else f"{os.path.join(folder, 'COMPLETE')}: not a list of sums"


def last_complete(run):
    """(The last checkpoint of a run that is as it was written, or None; [what is wrong with later ones])."""
    latest, wrong = os.path.join(run, "latest"), []
    names = [n for n in os.listdir(run) if re.fullmatch(r"step_\d+", n)] if os.path.isdir(run) else []
    if os.path.islink(latest):  # a kill -9 may have come just before it was moved on
        names = [n for n in names if n <= os.readlink(latest)]
    for folder in (os.path.join(run, n) for n in sorted(names, reverse=True)):
        wrong.append(damage(folder))
        if not wrong[-1]:
            return folder, wrong[:-1]
    return None, wrong


def load_optimizers(folder, optimizers, names, world):
    """Fill the optimisers with the state saved in `folder`, by however many ranks."""
    reader = dcp.FileSystemReader(os.path.join(folder, "train_state"))
    by_name, tensors = {n: p for p, n in names.items()}, {}
    for key, saved in reader.read_metadata().state_dict_metadata.items():
        p = by_name[key.split("/", 2)[2]]
        tensors[key] = torch.zeros_like(p) if saved.size == p.shape else torch.zeros(saved.size)
    dcp.load(tensors, storage_reader=reader, process_group=world.control, no_dist=world.size == 1)
    for key, t in tensors.items():
        i, what, name = key.split("/", 2)
        optimizers[int(i)].state[by_name[name]][what] = t


# ---- survival ----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def stop_signals():
    """A list of when SIGTERM and Ctrl-C came, so that a step can be finished first. A second ends at once, unless it
    is the same one: torchrun passes on what a job queue has sent to all processes."""
    seen = []  # not an Event: its lock would wait for itself where a second signal interrupts the note of the first

    def note(number, frame):
        seen.append(time.monotonic())
        if seen[-1] - seen[0] > 2:
            os._exit(1)
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lock(path, world):
    """Hold a file for as long as this process lives, so that two runs cannot write into one folder."""
    def hold():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        held = open(path, "w")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another run is writing into this folder; wait for it, stop it or "
                            "choose another --out") from None
        return held
    return world.first(hold, tell=lambda held: None)


def end_if_a_rank_is_lost(error):
    """Say so and end this process where an error is a collective's, because another rank is gone. Which one
    is named by torchrun on its machine, and by its pulse."""
    if dist.is_initialized() and re.search("[Cc]onnection|gloo|NCCL|peer|[Tt]imed out", str(error)):
        Heartbeat.ours.end(f"another rank is gone: {str(error).splitlines()[0]}")


class Heartbeat:
    """Each rank says every few seconds that it lives and listens to the next one. A rank that died, or whose
    machine did, would otherwise leave the others waiting in a collective for half an hour."""

    EVERY, PATIENCE = 3, 25  # seconds; then torchrun waits 30 for a rank that hangs on its own machine

    def __init__(self, world, store):
        self.rank, self.next, self.store, self.step = world.rank, (world.rank + 1) % world.size, store, 0
        self.over, Heartbeat.ours = threading.Event(), self
        self.thread = threading.Thread(target=self.beat, daemon=True)
        self.thread.start()

    def beat(self):
        heard, since = None, time.time()
        for beat in itertools.count():
            over = self.over.wait(self.EVERY)
            try:
                self.store.set(f"pulse {self.rank}", "over" if over else f"{beat} {self.step}")
                if over:
                    return
                known = self.store.check([f"pulse {self.next}"])
                said = self.store.get(f"pulse {self.next}").decode() if known else None
            except Exception as e:  # the store lives with rank 0, or with torchrun on its machine
                self.end(f"the store is gone ({e}): rank 0 or its machine has died")
            if said != heard or said == "over":
                heard, since = said, time.time()
            elif time.time() - since > self.PATIENCE:
                self.end(f"rank {self.next} has not been heard of for {self.PATIENCE} s, "
                         f"the last time in step {heard.split()[1] if heard else 0}")

    def end(self, what):
        print(f"error: step {self.step}, rank {self.rank}: {what}. --resume goes on from the last checkpoint",
              file=sys.stderr, flush=True)
        os._exit(1)


def die_with_parent():
    """Ask Linux to end this worker when its training process ends, however that ends: a worker that waits for a lock
    the dead process held would stay for ever."""
    with contextlib.suppress(OSError, AttributeError):  # elsewhere the loader's own watchdog has to do
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def obey_the_parent_alone():
    """Ctrl-C, torchrun and job queues signal all processes of a run, but the training process wants to finish its
    step and needs this worker for it: only a signal that it sends itself ends the worker."""
    signals = {signal.SIGINT, signal.SIGTERM}

    def listen():
        while signal.sigwaitinfo(signals).si_pid != parent:
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # not on a Mac
        parent = os.getppid()
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=listen, daemon=True).start()


class Log:
    """log.jsonl: one object per step; a resumed run drops what came after its checkpoint, so no step appears
    twice. Ranks other than the first write into the void."""

    def __init__(self, path, keep, first=True):
        self.path, self.kept, self.file = path, [], open(os.devnull, "w")
        if not first:
            return
        kept = self.kept
        if keep and os.path.exists(path):
            with open(path) as f:
                for line in f:
                    with contextlib.suppress(ValueError):  # the last line of a killed run may be cut
                        kept += [line] if json.loads(line)["step"] <= keep else []
        with open(path + ".tmp", "w") as f:
            f.writelines(kept)
        os.replace(path + ".tmp", path)
        self.file = open(path, "a")

    def write(self, **row):
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

MAY_CHANGE = ("resume", "out", "workers", "save_every", "eval_every", "eval_scenes", "eval_clips",
              "eval_first", "max_bad", "device", "compile", "recompute", "cp", "micro_batch")


def check_resume(run, cfg):
    """(folder of the run's last checkpoint, what it says: step, config, stream, fingerprint, failed)."""
    folder, wrong = last_complete(run)
    if not folder:
        raise UserError(f"--resume: no checkpoint under {run}; leave --resume away to start" if not wrong else
                        f"--resume: no checkpoint under {run} is whole: {'; '.join(wrong)}")
    for what in wrong:
        print(f"not resuming from a damaged checkpoint: {what}")
    saved = read_json(os.path.join(folder, "train_state", "state.json"))
    for key, was in saved["config"].items():
        now = getattr(cfg, key, None)
        now = list(now) if isinstance(now, tuple) else now
        if now != was and key not in MAY_CHANGE:
            raise UserError(f"--resume: --{key} is {now} now, but the run was started with {was}")
    return folder, saved


def check_same_data(was, now):
    """A resumed run must read what it read before, in the same order."""
    was = {"version of the order": 1} | was  # checkpoints from before it had a number do not say
    for key in [*was, *now]:
        if was.get(key) != now.get(key):
            raise UserError(f"--resume: {key} is {now.get(key, 'gone')} now, but was "
                            f"{was.get(key, 'not there')} when the run was started")


def start_over(run):
    """An empty folder for a new run; an earlier one is kept under another name."""
    if os.path.exists(os.path.join(run, "log.jsonl")):
        k = 1
        while os.path.exists(f"{run}.old{k}"):
            k += 1
        os.rename(run, f"{run}.old{k}")
        print(f"an earlier run was moved to {run}.old{k} (--resume would have continued it)")
    os.makedirs(run, exist_ok=True)
