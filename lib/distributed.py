"""
What training needs on more than one device, and to survive: ranks, sharding, checkpoints, signals, logs.

    python pretrain.py                               1 process, plain modules
    torchrun --nproc_per_node=8 pretrain.py          8 ranks: each reads its own sequences (data parallel, dp)
    torchrun --nproc_per_node=8 longctx.py --cp 4    2 x 4 ranks: 4 share a sequence (context parallel, ulysses.py)

        rank       0    1    2    3  |  4    5    6    7
        sequence   a    a    a    a  |  b    b    b    b       dp 2
        tokens    0-¼  ¼-½  ½-¾  ¾-1 | 0-¼  ¼-½  ½-¾  ¾-1      cp 4
        weights    ⅛    ⅛    ⅛    ⅛  |  ⅛    ⅛    ⅛    ⅛       FSDP2: sharded over the ranks of a node, and copied
                                                               from node to node

Every rank divides its loss by the same number, the step's loss weight over all ranks, so gradients are those of
one process with all sequences. FSDP2 takes the mean over ranks; hence the loss is multiplied by their number.

In this file:  ranks        World, start                       checkpoints  Saver, damage, last_complete
               sharding     shard_model, gather_full_model     resuming     check_resume, start_over
               signals      stop_signals, lock, Heartbeat      output       Log, Progress
               data         make_loader
"""
import contextlib
import copy
import ctypes
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.utils.checkpoint import checkpoint

try:
    import fcntl
except ImportError:  # Windows: there nothing keeps two runs apart
    fcntl = None

from lib import budget, lora
from lib.errors import UserError
from lib.progress import Bar, progress
from lib.weights import read_json, write_json
from model import empty_model


# ---- ranks -------------------------------------------------------------------------------------------------

@dataclass
class World:
    """This process among all: `size` ranks, of which each group of `cp` shares its sequences."""
    device: str
    rank: int = 0
    size: int = 1
    cp: int = 1
    mesh: object = None        # (copies, shards), for FSDP2
    cp_group: object = None    # the ranks that share this one's sequences
    control: object = None     # CPU group for small messages
    saving: object = None      # CPU group of the thread that writes checkpoints
    heartbeat: object = None   # its `step` is named when a rank fails
    lock: object = None        # the file that keeps other runs out of this one's folder

    @property
    def is_main(self):
        """Rank 0 reads and writes the files of a run, and prints."""
        return self.rank == 0

    @property
    def dp(self):
        """Data-parallel groups: how many sequences are read at a time."""
        return self.size // self.cp

    @property
    def dp_rank(self):
        return self.rank // self.cp

    @property
    def cp_rank(self):
        return self.rank % self.cp

    def print(self, text):
        """Print on rank 0 alone."""
        if self.is_main:
            print(text, flush=True)

    def all_gather(self, value):
        """[the value of every rank], in the order of ranks. For small Python objects."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def all_reduce_sum(self, x):
        """The sum of a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def on_main(self, do, broadcast=lambda value: value):
        """do() on rank 0 alone. Rank 0 gets its value, the others broadcast(value), which should be small. What the
        user can put right (UserError, ValueError) is raised on all ranks."""
        value = message = error = None
        if self.is_main:
            try:
                value = do()
                message = broadcast(value)
            except (UserError, ValueError) as e:
                error = e
        message, error = self.all_gather((message, error))[0]
        if error:
            raise error
        return value if self.is_main else message

    def close(self):
        """Wait for the other ranks, then leave the process group."""
        if self.size > 1:
            self.all_gather(None)
            self.heartbeat.over.set()
            self.heartbeat.thread.join()
            dist.destroy_process_group()


def start(device, cp=1):
    """Join the other ranks, if torchrun started any: NCCL between GPUs, gloo between CPUs."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size % cp:
        fix = f"; start {cp} with torchrun --nproc_per_node={cp}" if size == 1 else ""
        raise UserError(f"--cp {cp}: {size} process(es) cannot be split into groups of {cp}{fix}")
    if size == 1:
        return World(device, heartbeat=SimpleNamespace(step=0))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    store, rank, _ = next(dist.rendezvous("env://"))
    # Half an hour, since rank 0 may draw the toy world or index files meanwhile; the heartbeat finds the dead sooner.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", rank=rank, world_size=size,
                            store=dist.PrefixStore("ours", store), timeout=timedelta(minutes=30))

    # FSDP2 gathers weights within a node, where links are fast. Nodes hold copies, and exchange gradients alone.
    node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size % node or node % cp:
        node = size
    mesh = dist.init_device_mesh(device, (size // node, node), mesh_dim_names=("copies", "shards"))
    cp_mesh = dist.init_device_mesh(device, (size // cp, cp), mesh_dim_names=("dp", "cp"))
    world = World(device, rank, size, cp)
    world.mesh = mesh if size > node else mesh["shards"]
    world.cp_group = cp_mesh["cp"].get_group()
    world.control = dist.new_group(backend="gloo")
    world.saving = dist.new_group(backend="gloo")
    world.heartbeat = Heartbeat(world, store)
    return world


def set_deterministic(on):
    """Kernels whose sums repeat bit for bit, or PyTorch's own choice. It warns where it has none that do."""
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # else all new memory would be, to show mistakes
    if on:
        torch._inductor.config.deterministic = True  # no kernel chosen by its time, which varies


# ---- sharding ----------------------------------------------------------------------------------------------

def shard_model(model, world, compile_blocks, recompute, bf16):
    """Turn a plain model into this rank's shard of it, in place and block by block. Only rank 0's model needs to
    hold numbers; on its device no rank ever has more than its shard and one block.

    The order inside a block: activation checkpointing, then compilation, so that what is computed again is compiled
    too, then FSDP2 around both, so that weights are gathered before and freed after.
    """
    if world.size > 1:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        # Weights are kept and gradients are added up in fp32; inputs stay as they are (loss weights, angles).
        policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    else:
        model.to(world.device)

    def shard(module):
        if world.size > 1:
            broadcast_weights(module, world)
            fully_shard(module, mesh=world.mesh, mp_policy=policy)

    if compile_blocks:
        # With --recompute all blocks share one limit. A version each for ViT and decoder, training and evaluation, one
        # crop and many (the compiler takes their number as variable when it has seen two), each size of micro-batch:
        # a dozen. Beyond the limit is an error, for PyTorch would quietly go on without compiling.
        torch._dynamo.config.recompile_limit = 32
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in model.blocks():
        if recompute:
            block.forward = checkpointed(block.forward)
        if compile_blocks:
            block.compile()
        shard(block)
    shard(model)  # what is in no block: embedding, head, connector


def checkpointed(forward):
    """Activation checkpointing: keep the inputs of `forward` alone, and call it again in the backward pass.
    A function of ours, since the compiler does not look into what checkpoint() itself is called with."""
    def run(*args, **kw):
        return checkpoint(forward, *args, use_reentrant=False, **kw)
    return run


def broadcast_weights(module, world):
    """Give the parameters that are not sharded yet the numbers of rank 0, on this rank's device."""
    new = {}  # old parameter -> new one; a tied parameter comes up twice
    for m in module.modules():
        for name, p in list(m.named_parameters(recurse=False)):
            if hasattr(p, "full_tensor"):  # sharded already, with its block
                continue
            if p not in new:
                full = p.detach().to(world.device) if world.is_main else torch.empty_like(p, device=world.device)
                dist.broadcast(full, 0)
                new[p] = torch.nn.Parameter(full, p.requires_grad)
            setattr(m, name, new[p])


def gather_full_state(model, device=None, keep=True):
    """{name: fp32 copy} of all parameters, on `device` or where they are. All ranks must call it, as each sends its
    shards; for those that do not `keep` the result it is empty."""
    state = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        full = p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
        if keep:  # a copy, since training goes on while a thread writes it
            state[name] = full.to(device or full.device, torch.float32, copy=True)
    return state


def plain_model(model, state):
    """A model without shards or adapters, of the numbers in `state`, of which it takes possession; adapters are
    merged."""
    lora.merge(model, state)
    plain = empty_model(model.cfg)
    plain.load_state_dict(state, assign=True)
    return plain.eval()


def gather_full_model(model):
    """The model with all weights, on every rank: `model` itself if it is not sharded. All ranks must call it."""
    return plain_model(model, gather_full_state(model)) if dist.is_initialized() else model


def clip_gradients(model, largest):
    """Clip the gradient norm of each part of the model by itself. Returns the norms before, one number a part, on the
    device: to read one there is to wait for all kernels."""
    norms = []
    for named in model.parts().values():
        trained = [p for _, p in named if p.requires_grad]
        if trained:
            norm = torch.nn.utils.clip_grad_norm_(trained, largest)
            norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return norms


# ---- checkpoints -------------------------------------------------------------------------------------------
#
# run/step_0000500/  config.json model.safetensors tokenizer.json ...  weights, for the next stage and others
#                    adapter/      with --lora: what trains, alone (lib/lora.py); the model above has it merged
#                    train_state/  the optimiser in pieces, as it was sharded (torch.distributed.checkpoint),
#                                  and state.json; only --resume of this very run reads it: it has a pickle
#                    COMPLETE      written last: how many files there are and the sha256 of each, as
#                                  `sha256sum -c COMPLETE` reads it
# run/latest         -> the last complete one
#
# Everything is written under another name and synced before it gets its final one: after a power cut or a kill -9
# a name never stands for half a checkpoint. The sums show what a disk or a copy did to it later.

def optimizer_state(optimizers, names):
    """{"optimiser/what/parameter": tensor}, e.g. "0/exp_avg/lm_head.weight"."""
    tensors = {}
    for i, optimizer in enumerate(optimizers):
        for p, state in optimizer.state.items():
            tensors |= {f"{i}/{what}/{names[p]}": t for what, t in state.items()}
    return tensors


def counting(planner, method, bar):
    """A planner of torch.distributed.checkpoint that counts on a bar how often a method is called: once a tensor."""
    call = getattr(planner, method)

    def counted(item):
        bar.update()
        return call(item)
    setattr(planner, method, counted)
    return planner


def load_optimizers(folder, optimizers, names, world):
    """Fill the optimisers with the state saved in `folder`, by however many ranks."""
    reader = dcp.FileSystemReader(os.path.join(folder, "train_state"))
    parameters = {name: p for p, name in names.items()}
    tensors = {}
    for key, saved in reader.read_metadata().state_dict_metadata.items():
        p = parameters[key.split("/", 2)[2]]
        # A moment has the shape of its parameter and is sharded like it; a step count is one number.
        tensors[key] = torch.zeros_like(p) if saved.size == p.shape else torch.zeros(saved.size)
    with contextlib.closing(Bar(f"optimiser's tensors of {folder} read", len(tensors), world.is_main)) as bar:
        dcp.load(tensors, storage_reader=reader, process_group=world.control, no_dist=world.size == 1,
                 planner=counting(dcp.DefaultLoadPlanner(), "resolve_tensor", bar))
    for key, t in tensors.items():
        i, what, name = key.split("/", 2)
        fused = optimizers[int(i)].defaults.get("fused")  # its step count is on the device too
        optimizers[int(i)].state[parameters[name]][what] = t.to(parameters[name].device) if fused else t


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk and not in its cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path, bar):
    """The sum of a file, in hex; the bar counts its bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(1 << 22):
            digest.update(part)
            bar.update(len(part))
    return digest.hexdigest()


def summing(folder, paths):
    """A bar for the sums of some files of a checkpoint; one that is not there is told by whoever opens it."""
    n_bytes = sum(os.path.getsize(path) for path in paths if os.path.exists(path))
    return contextlib.closing(Bar(f"bytes of {folder} summed", n_bytes))


class Saver:
    """Writes checkpoints while training goes on: `save` copies the state to the CPU, a thread writes the copy."""

    def __init__(self, run, world, step=0, keep=0):
        self.run, self.world = run, world
        self.keep = keep   # newest checkpoints that are not deleted; 0 = all
        self.step = step   # of the last checkpoint
        self.thread = None
        self.error = None  # of the thread, one line
        if world.is_main:
            for name in os.listdir(run):
                if re.fullmatch(r"\.step_\d+\.tmp", name):  # of a run that was killed
                    shutil.rmtree(os.path.join(run, name))

    def save(self, step, model, tokenizer, optimizers, names, about):
        """Begin to write run/step_N. All ranks call it. about: what --resume needs to know, for state.json."""
        self.finish()
        self.step = step
        final = os.path.join(self.run, f"step_{step:07d}")
        unfinished = os.path.join(self.run, f".step_{step:07d}.tmp")
        full = gather_full_state(model, "cpu", keep=self.world.is_main)
        adapter = {name: t for name, t in full.items() if lora.is_adapter(name)}
        plain = plain_model(model, full) if self.world.is_main else None
        state = optimizer_state(optimizers, names)
        copied = progress(state.items(), "optimiser's tensors copied", shown=self.world.is_main)
        state = {key: t.detach().to("cpu", copy=True) for key, t in copied}
        about = copy.deepcopy(about)
        best = self.world.is_main and is_best(self.run, step)
        if self.world.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
            os.makedirs(os.path.join(unfinished, "train_state"))
        self.world.all_gather(None)  # the folder must be there before any rank writes into it

        def write():
            try:
                bar = Bar(f"optimiser's tensors of {final} written", len(state), self.world.is_main)
                with contextlib.closing(bar), warnings.catch_warnings():  # DCP warns where there is one process alone
                    warnings.simplefilter("ignore")
                    dcp.save(state, checkpoint_id=os.path.join(unfinished, "train_state"),
                             process_group=self.world.saving, no_dist=self.world.size == 1,
                             planner=counting(dcp.DefaultSavePlanner(), "resolve_data", bar))
                if self.world.is_main:
                    plain.save_pretrained(unfinished, about["config"]["max_frames"], about["config"]["tiles"])
                    tokenizer.save(unfinished)
                    if adapter:
                        about_adapter = dict(model.lora, point_format=plain.cfg.point_format)
                        lora.save(os.path.join(unfinished, "adapter"), about_adapter, adapter)
                    write_json(os.path.join(unfinished, "train_state", "state.json"), about)
                    publish(unfinished, final, best)
                    prune(final, self.keep)
            except BaseException as e:  # DCP's error is not an Exception; the ranks exchange it at the next step
                free = shutil.disk_usage(self.run).free / 2 ** 30
                reason = (str(e).strip() or repr(e)).splitlines()[-1]
                self.error = f"{unfinished}: {reason} (that disk has {free:.1f} GB free)"
                if self.world.is_main:
                    shutil.rmtree(unfinished, ignore_errors=True)

        self.thread = threading.Thread(target=write, name="checkpoint")
        self.thread.start()

    def finish(self):
        """Wait until the checkpoint in progress is on disk, on all ranks. UserError if it could not be written."""
        if self.thread:
            self.thread.join()
            self.thread = None
            self.check(self.world.all_gather(self.error))

    @staticmethod
    def check(errors):
        """Stop if any rank could not write. errors: of all ranks, None where there is none."""
        for error in errors:
            if error:
                raise UserError(f"the checkpoint could not be written, the one before it is whole: {error}")


def is_best(run, step):
    """Whether the evaluation after `step` has the lowest held-out loss of all in the log; False if there is none."""
    losses = {}
    with contextlib.suppress(FileNotFoundError), open(os.path.join(run, "log.jsonl")) as log:
        for row in map(json.loads, log):
            if "loss" in row.get("eval", {}):
                losses[row["step"]] = row["eval"]["loss"]
    return min(losses, key=losses.get, default=None) == step


def publish(unfinished, final, best=False):
    """Give a finished checkpoint its final name, and make it the latest; and the best, if it is."""
    paths = []
    for folder, _, names in os.walk(unfinished):
        paths += [os.path.join(folder, name) for name in sorted(names)]
    sums = []
    with summing(final, paths) as bar:
        for path in paths:
            sync(path)
            sums.append(f"{sha256(path, bar)}  {os.path.relpath(path, unfinished)}\n")
    for folder, _, _ in os.walk(unfinished):
        sync(folder)
    with open(os.path.join(unfinished, "COMPLETE"), "w") as f:
        f.writelines([f"# {len(sums)} files\n", *sums])
        f.flush()
        os.fsync(f.fileno())
    sync(unfinished)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(unfinished, final)

    # A link cannot be changed in place: make a new one and rename it over the old one, which is one step on the disk.
    run, name = os.path.split(final)
    for alias in ("best", "latest") if best else ("latest",):
        link = os.path.join(run, alias)
        with contextlib.suppress(FileNotFoundError):
            os.remove(link + ".tmp")
        os.symlink(name, link + ".tmp")
        os.replace(link + ".tmp", link)
    sync(run)


def prune(newest, keep):
    """Delete what is older than the `keep` newest checkpoints of a run, of which `newest`, just written, is one, and
    not the best."""
    run, name = os.path.split(newest)
    best = os.path.basename(os.path.realpath(os.path.join(run, "best")))
    older = [other for other in os.listdir(run) if re.fullmatch(r"step_\d+", other) and other < name and other != best]
    for other in sorted(older, reverse=True)[keep - 1:] if keep else ():
        unfinished = os.path.join(run, f".{other}.tmp")  # a name of ours never stands for half a checkpoint
        try:
            os.rename(os.path.join(run, other), unfinished)
            shutil.rmtree(unfinished)
        except OSError as e:  # no reason to stop: the new checkpoint is whole
            print(f"{os.path.join(run, other)} could not be deleted (--keep {keep}): {e.strerror}", file=sys.stderr)


def damage(folder, leave_out=()):
    """What is wrong with a checkpoint, in one line, or None: its files against their sums in COMPLETE.
    leave_out: beginning of the names of files that are not read."""
    path = os.path.join(folder, "COMPLETE")
    try:
        with open(path) as f:
            lines = f.readlines()
        n_files = len(lines)  # checkpoints from before it was written lack their number
        if lines and lines[0].startswith("#"):
            n_files = int(lines.pop(0).removeprefix("# ").removesuffix(" files\n"))
        sums = [line.rstrip("\n").split("  ", 1) for line in lines]
        if len(sums) != n_files:
            return f"{path}: cut, of the sums of {n_files} files it has {len(sums)}"
        read = [(os.path.join(folder, name), expected) for expected, name in sums if not name.startswith(leave_out)]
        with summing(folder, [path for path, _ in read]) as bar:
            for path, expected in read:
                if sha256(path, bar) != expected:
                    return f"{path}: not what was written (its sha256 differs from that in COMPLETE)"
    except OSError as e:
        return f"{path}: {e.strerror}"
    except ValueError:  # a line without two spaces, no number of files, or not text at all
        sums = []
    return None if sums else f"{os.path.join(folder, 'COMPLETE')}: not a list of sums"


def last_complete(run):
    """(folder of the last undamaged checkpoint of a run, or None; [what is wrong with later ones])."""
    names = os.listdir(run) if os.path.isdir(run) else []
    names = [name for name in names if re.fullmatch(r"step_\d+", name)]
    latest = os.path.join(run, "latest")
    if os.path.islink(latest):  # after a kill -9 there may be one that `latest` was not moved to yet
        names = [name for name in names if name <= os.readlink(latest)]
    problems = []
    for name in sorted(names, reverse=True):
        folder = os.path.join(run, name)
        problem = damage(folder)
        if not problem:
            return folder, problems
        problems.append(problem)
    return None, problems


# ---- what a run starts from --------------------------------------------------------------------------------

def check_same_model(folder, found, config, wanted):
    """Refuse a checkpoint of another network than --config is. found, wanted: ModelConfigs."""
    may_differ = ("point_format", "frame_tokens", "max_positions", "yarn_layers", "tie")
    found = asdict(found)
    differences = []
    for name, value in asdict(wanted).items():
        if name not in may_differ and found[name] != value:
            differences.append(f"{name} is {found[name]}, not {value}")
    if differences:
        raise UserError(f"--init_from {folder}: not of --config {config}: {', '.join(differences[:3])}")


def check_init_from(folders, rank=0):
    """Refuse a damaged checkpoint of ours; others have no COMPLETE, and nothing that tells. rank: of --lora."""
    if len(folders) > 2:
        raise UserError(f"--init_from {' '.join(folders)}: one checkpoint, a language model and a SigLIP, or, with "
                        "--lora, a checkpoint and its adapter")
    is_adapter = len(folders) == 2 and lora.folder_of(folders[1]) is not None
    if is_adapter and not rank:
        raise UserError(f"--init_from {folders[1]}: an adapter goes on training with --lora; the merged model beside "
                        "it stands for both folders")
    if rank and len(folders) == 2 and not is_adapter:
        raise UserError(f"--init_from {folders[1]}: no adapter.json is there, and --lora takes a trained checkpoint "
                        "and perhaps an adapter of it; a language model and a SigLIP need stage 1 first")
    for folder in folders:
        if os.path.exists(os.path.join(folder, "COMPLETE")):
            problem = damage(folder, leave_out="train_state")  # which is not read
            if problem:
                raise UserError(f"--init_from {folder}: {problem}; an earlier step_* beside it may be whole")


# fields of the Config that do not change what is learned, so that a resumed run may have other values
MAY_CHANGE = ("resume", "out", "workers", "save_every", "eval_every", "eval_scenes", "eval_clips", "eval_first",
              "max_bad", "keep", "report", "log_to", "device", "compile", "deterministic", "recompute", "cp",
              "micro_batch")


def check_resume(run, cfg):
    """Where to start: (folder of the run's last checkpoint, its state.json: step, config, stream, fingerprint,
    failed); without --resume no folder, and the first step."""
    if not cfg.resume:
        return None, dict(step=0, stream=None, failed={})
    folder, problems = last_complete(run)
    if not folder and problems:
        raise UserError(f"--resume: no checkpoint under {run} is whole: {'; '.join(problems)}")
    if not folder:
        raise UserError(f"--resume: no checkpoint under {run}; leave --resume away to start")
    for problem in problems:
        print(f"not resuming from a damaged checkpoint: {problem}")
    saved = read_json(os.path.join(folder, "train_state", "state.json"))
    for key, before in saved["config"].items():
        now = getattr(cfg, key, None)
        if isinstance(now, tuple):
            now = list(now)  # as JSON has it
        if key == "steps" and cfg.epochs:  # which follow from the data, and those are compared
            continue
        if now != before and key not in MAY_CHANGE:
            raise UserError(f"--resume: --{key} is {now} now, but the run was started with {before}")
    print(f"resuming after step {saved['step']}")
    return folder, saved


def check_same_data(before, now):
    """A resumed run must read what it read before, in the same order. before, now: `Stream.fingerprint()`."""
    before = {"version of the order": 1} | before  # checkpoints from before it had a number have none
    for key in [*before, *now]:
        if before.get(key) != now.get(key):
            raise UserError(f"--resume: {key} is {now.get(key, 'gone')} now, but was "
                            f"{before.get(key, 'not there')} when the run was started")


def start_over(run):
    """An empty folder for a new run; an earlier one is kept under another name."""
    if os.path.exists(os.path.join(run, "log.jsonl")):
        k = 1
        while os.path.exists(f"{run}.old{k}"):
            k += 1
        os.rename(run, f"{run}.old{k}")
        print(f"an earlier run was moved to {run}.old{k} (--resume would have continued it)")
    os.makedirs(run, exist_ok=True)


# ---- signals, and ranks that fail --------------------------------------------------------------------------

class Signals(list):
    """When SIGTERM and Ctrl-C came."""
    at_once = True  # they end what is being done, by KeyboardInterrupt; else it is finished first


@contextlib.contextmanager
def stop_signals():
    """Signals, so that a step can be finished first. A second one ends the process, unless it is the same one: torchrun
    passes on what a job queue has sent to all processes."""
    times = Signals()  # not an Event: its lock would wait for itself where a second signal interrupts the first's note

    def note(number, frame):
        times.append(time.monotonic())
        if times[-1] - times[0] > 2:
            os._exit(1)
        if times.at_once:
            raise KeyboardInterrupt
    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield times
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible(stop, world):
    """What is done here is left when a signal comes: to wait for data, or to evaluate, may take long. Not where others
    would wait for this rank."""
    alone = world.size == 1 and isinstance(stop, Signals)
    try:
        if alone:
            stop.at_once = True
        yield
    except KeyboardInterrupt:
        if not alone:
            raise
    finally:
        if isinstance(stop, Signals):
            stop.at_once = False


def lock(path, world):
    """Rank 0 locks a file for as long as `world` lives, so that two runs cannot write into one folder."""
    def hold():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "w")
        if not fcntl:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another run is writing into this folder; wait for it, stop it or "
                            "choose another --out") from None
        return file
    world.lock = world.on_main(hold, broadcast=lambda file: None)


class Heartbeat:
    """A thread by which each rank reports every few seconds that it lives, and listens to the next rank. If a rank
    or its machine fails, the others would otherwise wait in a collective for half an hour."""

    EVERY = 3      # seconds
    PATIENCE = 25  # seconds; torchrun waits another 30 for a rank that hangs on its own machine
    ours = None    # that of this process

    def __init__(self, world, store):
        self.rank = world.rank
        self.next = (world.rank + 1) % world.size
        self.store = store  # torchrun's, on the machine of rank 0
        self.step = 0       # for messages; the training loop sets it
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.beat, daemon=True)
        Heartbeat.ours = self
        self.thread.start()

    def beat(self):
        """Write this rank's count and step, read the next rank's, until `over` is set."""
        last, since = None, time.time()  # what the next rank wrote last, and when that changed
        for count in itertools.count():
            over = self.over.wait(self.EVERY)
            try:
                self.store.set(f"heartbeat {self.rank}", "over" if over else f"{count} {self.step}")
                if over:
                    return
                begun = self.store.check([f"heartbeat {self.next}"])  # get() alone would wait for it
                heard = self.store.get(f"heartbeat {self.next}").decode() if begun else None
            except Exception as e:  # the store lives with rank 0, or with torchrun on its machine
                self.end(f"the store is gone ({e}): rank 0 or its machine has died")
            if heard != last or heard == "over":
                last, since = heard, time.time()
            elif time.time() - since > self.PATIENCE:
                step = last.split()[1] if last else 0
                self.end(f"rank {self.next} has not been heard of for {self.PATIENCE} s, "
                         f"the last time in step {step}")

    def end(self, what):
        print(f"error: step {self.step}, rank {self.rank}: {what}. --resume goes on from the last checkpoint",
              file=sys.stderr, flush=True)
        os._exit(1)


def end_if_a_rank_is_lost(error):
    """If `error` is a collective's, because another rank is gone, print that and end this process. Which rank it was
    is named by torchrun on its machine, and by the heartbeat."""
    if dist.is_initialized() and re.search("[Cc]onnection|gloo|NCCL|peer|[Tt]imed out", str(error)):
        Heartbeat.ours.end(f"another rank is gone: {str(error).splitlines()[0]}")


# ---- workers: the processes that decode media for a rank ---------------------------------------------------

def cores(quota="/sys/fs/cgroup/cpu.max"):
    """How many cores this process may use: fewer than the machine has under taskset, or in a container with a limit
    (`quota`: "microseconds of each period", or "max"), where more threads would wait for each other."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # not Linux, or no limit
        with open(quota) as f:
            microseconds, period = map(int, f.read().split())
        n = min(n, math.ceil(microseconds / period))
    return max(n, 1)


def auto_workers():
    """How many workers suit a rank: its share of the cores, less the one that trains. At least 1; at most 8, as each of
    them holds sequences that it decoded ahead."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine; torchrun's
    return min(max(cores() // ranks - 1, 1), 8)


def identity(x):
    return x


class Given:
    """A dataset whose samples are given to it, in place of their numbers."""
    def __getitem__(self, sample):
        return sample


def make_loader(samples, workers, ahead, convert=identity):
    """Yields convert(sample) of each sample of a list or an IterableDataset, in order. `workers` processes convert
    them, `ahead` in all, at least 1 each. Where there are several, one more process iterates over an IterableDataset:

        RankStream ─► sequences, planned ─┬─► decode_packed ─┬─► next_samples
                      (one process)       ├─► decode_packed ─┤   (the training process)
                                          └─► decode_packed ─┘
    """
    def load(dataset, n, convert, sampler=None):
        # Without a collate_fn every array of a sample would be moved into a shared file of its own. Without a generator
        # a loader would draw from that of dropout.
        return torch.utils.data.DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=n, collate_fn=convert,
                                           prefetch_factor=math.ceil(ahead / n) if n else None,
                                           worker_init_fn=begin_worker, generator=torch.Generator())
    if workers < 2 or isinstance(samples, list):
        yield from load(samples, workers, convert)
    else:
        planned = iter(load(samples, 1, identity))  # not the loader: the other one calls iter() on it twice
        yield from load(Given(), workers, convert, planned)


def next_samples(loader, n):
    """[the next n samples]. What a worker raises becomes one line."""
    try:
        return [next(loader) for _ in range(n)]
    except ValueError as e:  # raised in a worker, it carries the worker's traceback
        raise UserError(str(e).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


@contextlib.contextmanager
def worker_errors():
    """Make one line of the error about a dead worker. PyTorch raises it in whatever the process is doing then."""
    try:
        yield
    except RuntimeError as e:
        if "DataLoader worker" not in str(e):
            raise
        raise UserError(f"{e}: a process that decodes images died, perhaps for want of memory; --resume "
                        "goes on, --workers 0 decodes in the training process") from None


def begin_worker(number):
    """What each of these processes does first."""
    getattr(os, "nice", int)(10)  # where cores are few, training goes first
    die_with_parent()
    obey_the_parent_alone()


def die_with_parent():
    """Ask Linux to end this worker when its training process ends, however that ends: a worker that waits for a lock
    the dead process held would stay for ever."""
    with contextlib.suppress(OSError, AttributeError):  # elsewhere the loader's own watchdog has to do
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def obey_the_parent_alone():
    """Ctrl-C, torchrun and job queues signal all processes of a run, but the training process wants to finish its
    step and needs this worker for it: only a signal that it sends itself ends the worker."""
    if not hasattr(signal, "sigwaitinfo"):  # on a Mac
        return
    signals = {signal.SIGINT, signal.SIGTERM}
    parent = os.getppid()

    def listen():
        while signal.sigwaitinfo(signals).si_pid != parent:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=listen, daemon=True).start()


# ---- what a step reports, and what a run prints ------------------------------------------------------------

@dataclass
class Report:
    """What a rank sends to all others about a step, before it runs it."""
    flops: float = 0.0         # of its sequences, before they are sharded; 0 on CPU
    wait: float = 0.0          # seconds it waited for data
    stop: bool = False         # a signal asked for the end of the run
    error: str | None = None   # of the thread that writes its checkpoint
    weight: float = 0.0        # sum of its loss weights
    tokens: int = 0            # without padding
    crops: int = 0
    events: list = field(default_factory=list)  # what could not be used: [dataset, file:line, reason, detail]
    records: list = field(default_factory=list)  # ["file:line"] of the first few in its sequences
    state: dict | None = None  # of the stream after its last sequence

    def add(self, samples, batches):
        """Add up what a rank's samples and its shards of their batches hold."""
        for _, state, events in samples:
            self.records += state["row"]
            self.events += events
            self.state = state
        self.records = sorted(set(self.records))[:4]
        for batch in batches:
            self.weight += float(batch["weights"].sum())
            self.tokens += int((batch["example"] > 0).sum())
            self.crops += len(batch["crops"])
        return self


def throughput(cfg, reports, world, seconds, bf16):
    """The rates of a step of so many seconds, for the log. tflops_per_s: of all ranks together; mfu: as a share of
    the peak of their cards, where that is known; memory_gb: the most that this rank has used so far."""
    data_reports = reports[::world.cp]  # the ranks of a cp group share sequences, and decode the same crops
    tokens = sum(report.tokens for report in reports)
    crops = sum(report.crops for report in data_reports)
    flops = sum(report.flops for report in data_reports)
    padded = cfg.global_batch * cfg.seq_len
    rates = dict(seconds=round(seconds, 4), tokens_per_s=round(tokens / seconds, 1),
                 padded_tokens_per_s=round(padded / seconds, 1), crops_per_s=round(crops / seconds, 1),
                 fill=round(tokens / padded, 4), wait=round(max(report.wait for report in reports) / seconds, 4))
    if flops:
        rates["tflops_per_s"] = round(flops / seconds / 1e12, 1)
    peak = budget.peak_flops(world.device, bf16)
    if peak:
        rates["mfu"] = round(flops / seconds / world.size / peak, 4)
    rates["memory_gb"] = round(budget.peak_memory(world.device) / 2 ** 30, 3)
    return rates


def show_config(cfg, defaults):
    """Print the resolved configuration in columns; what differs from the default of the stage is marked with *."""
    items = []
    for name, value in vars(cfg).items():
        mark = " " if value == getattr(defaults, name) else "*"
        text = " ".join(map(str, value)) if isinstance(value, tuple) else value
        items.append(f"{mark}{name}={text}")
    width = max(map(len, items)) + 2
    columns = max(1, 110 // width)
    for i in range(0, len(items), columns):
        print("".join(item.ljust(width) for item in items[i:i + columns]).rstrip())


class Log:
    """A file of one JSON object a line. A resumed run drops what came after its checkpoint, so no step appears
    twice. Ranks other than 0 write into the void. to: "tensorboard" gets the numbers too."""

    def __init__(self, path, last_step, is_main=True, to="none"):
        self.path = path
        self.board = None
        self.kept = []  # lines up to `last_step`
        if not is_main:
            self.file = open(os.devnull, "w")
            return
        if last_step and os.path.exists(path):
            with open(path) as f:
                for line in f:
                    with contextlib.suppress(ValueError):  # the last line of a killed run may be cut
                        if json.loads(line)["step"] <= last_step:
                            self.kept.append(line)
        with open(path + ".tmp", "w") as f:
            f.writelines(self.kept)
        os.replace(path + ".tmp", path)
        self.file = open(path, "a")
        if to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(os.path.join(os.path.dirname(path), to), purge_step=last_step + 1)

    def write(self, **fields):
        self.file.write(json.dumps(fields) + "\n")
        self.file.flush()
        if self.board:
            for name, value in fields.get("eval", fields).items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, fields["step"])
            self.board.flush()


class Progress:
    """A bar on a terminal, plain lines elsewhere, nothing on ranks other than 0."""

    def __init__(self, steps, start, world):
        self.steps, self.world = steps, world
        self.began = time.time()
        self.bar = None
        if world.is_main and sys.stdout.isatty():
            from tqdm import tqdm
            self.bar = tqdm(total=steps, initial=start, dynamic_ncols=True)

    def show(self, step, loss, tokens_per_s, seconds):
        """One step is done, in so many seconds."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tok/s", refresh=False)
            self.bar.update()
        elif step <= 3 or step % 25 == 0 or step == self.steps:
            self.world.print(f"step {step:5d}/{self.steps}  loss {loss:.4f}  {seconds * 1000:6.0f} ms  "
                             f"{tokens_per_s:8,.0f} tok/s  {time.time() - self.began:5.0f} s")

    def scores(self, step, before, scores):
        """Print the scores of an evaluation; in a table beside those `before` the first step, if there are any."""
        text = f"step {step}: " + "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        if before:
            text = f"{'':34}{'before':>8}{f'step {step}':>12}"
            for name, value in scores.items():
                text += f"\n{name:34}{before.get(name, math.nan):8.3f}{value:12.3f}"
        if self.bar is None:
            self.world.print(text)
        else:
            self.bar.write(text)  # without breaking the bar

    def end(self, run, step, state, bad):
        """Print what was left out, how long it took, and where the checkpoint is."""
        if self.bar is not None:
            self.bar.close()
        if state and (state["bad"] or state["skipped"] or bad.failed):
            self.world.print(f"not used, by dataset: {bad.counts(state)}, {bad.log.path} lists them; "
                             f"left out: {state['skipped']}")
        minutes = (time.time() - self.began) / 60
        page = os.path.join(run, "report.html")
        curves = f"; curves and samples in {page}" if os.path.exists(page) else ""
        self.world.print(f"{minutes:.1f} minutes; checkpoint in {os.path.join(run, 'latest')}{curves}")
        best = os.path.join(run, "best")
        if os.path.exists(best):
            self.world.print(f"lowest loss on --eval_data: {best}, {os.path.basename(os.path.realpath(best))}")
        if step < self.steps:
            self.world.print(f"stopped by a signal after step {step}; --resume goes on")
