"""The training loop against one written plainly: every number of the recipe does what its flag says, a stopped run
goes on as if it had not been stopped, and what is written while training goes on is the step it says."""
import dataclasses
import json
import math
import os
import shutil
import socket
import threading

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from conftest import SIZES, STYLES, fork_server, picture, png, read_log, tiny_model, write_lines

from lib import distributed
import model as M
import pretrain
from data import Dataset, Planner, Stream, collate, decode
from lib.errors import UserError
from lib.muon import Muon, orthogonalize
from lib.text import SMALL_TOKENIZER, Tokenizer
from model import ModelConfig, Molmo2
from pretrain import Config


# No two of these are equal, and none is a default: a number that is ignored or taken for another one shows.
ODD = dict(config="small", seed=3, steps=5, global_batch=5, micro_batch=2, seq_len=176, tiles=2, max_crops=7,
           max_frames=3, lr_vit=3e-3, lr_connector=5e-3, lr_decoder=2e-3, warmup_vit=3, warmup_connector=2,
           warmup_decoder=4, lr_end=0.23, beta1=0.83, beta2=0.91, adam_eps=7e-3, clip=1.7, z_loss=0.013,
           residual_dropout=0.11, response_dropout=0.31, adam_share=0.37, token_weights="spec", mixture="sft",
           rebalance=("more=3",), save_every=100, eval_every=2, workers=0, device="cpu", dtype="fp32", max_bad=1.0)
MORE = [dict(annotations=[dict(task="text", prompt=f"{n} times?", answer="yes " * n)]) for n in (1, 31, 7)]


@pytest.fixture
def odd(tmp_path, world, monkeypatch):
    """odd(style, **changes): a Config of odd numbers that starts from a tiny model whose weights are all at work."""
    def make(style="olmo", **changes):
        monkeypatch.setitem(M.PRESETS, "small", ModelConfig(**SIZES, **STYLES[style]))
        begin = tmp_path / f"begin {style}"
        if not begin.exists():
            tiny_model(style).save_pretrained(begin)
            Tokenizer(SMALL_TOKENIZER, 1024).save(begin)
        more = write_lines(tmp_path / "more.jsonl", MORE)
        return Config(**ODD | dict(data=(world, more), eval_data=(world,), init_from=(str(begin),),
                                   out=str(tmp_path / "out")) | changes)
    return make


def train(cfg, stop=()):
    """One run: its folder."""
    return pretrain.train(cfg, Config(), stop)


def state_of(folder):
    with open(os.path.join(folder, "train_state", "state.json")) as f:
        return json.load(f)


def weights_of(run, checkpoint="latest"):
    return dict(Molmo2.from_pretrained(os.path.join(run, checkpoint)).named_parameters())


def optimizer_of(folder):
    """What a checkpoint holds of the optimisers, {key: tensor}."""
    reader = dcp.FileSystemReader(os.path.join(folder, "train_state"))
    state = {k: torch.empty(t.size) for k, t in reader.read_metadata().state_dict_metadata.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


# ---- the loop, written plainly -----------------------------------------------------------------------------

def planner_of(cfg):
    return Planner(Tokenizer(SMALL_TOKENIZER, 1024), M.PRESETS["small"], 176, 2, cfg.token_weights, 3, 7)


def plain_nll(x, head, targets, weights, z_loss):
    logits = x @ head.T
    each = F.cross_entropy(logits, targets, reduction="none")
    return (weights * (each + z_loss * logits.logsumexp(-1) ** 2)).sum()


def nll_of(model, batch, z_loss=0.0):
    """The summed weighted loss of a batch, from its logits: of all tokens, or, where dropout would draw other numbers
    for more tokens, of those that the model takes."""
    if model.training and model.residual_dropout + model.response_dropout:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(M.ChunkedNLL, "apply", plain_nll)
            return model(**batch, z_loss=z_loss)
    logits = model(**{k: v for k, v in batch.items() if k != "targets"})
    every = logits.flatten(0, 1), torch.eye(logits.shape[-1])
    return plain_nll(*every, batch["targets"].flatten() % 1024, batch["weights"].flatten(), z_loss)


def test_muon_makes_a_matrix_orthogonal():
    """Its singular vectors stay; its values, 2 % of the whole or more, become 0.68 to 1.14."""
    for shape in ((128, 256), (256, 128), (16, 48)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        inner = left.T @ orthogonalize(matrix) @ right.T
        values = inner.diag()
        torch.testing.assert_close(inner, values.diag(), rtol=0, atol=1e-5)
        assert 0.68 < values.min() and values.max() < 1.14


def test_muon_is_torchs():
    """Momentum, size of a step and state; torch's computes in bf16."""
    rng = torch.Generator().manual_seed(0)
    ours, torchs = ([torch.nn.Parameter(torch.zeros(shape)) for shape in ((32, 96), (96, 32))] for _ in range(2))
    optimizers = [Muon([dict(params=ours)]), torch.optim.Muon(torchs, weight_decay=0, adjust_lr_fn="match_rms_adamw")]
    for _ in range(3):
        for p, q in zip(ours, torchs):
            p.grad = q.grad = torch.randn(p.shape, generator=rng)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.step()
    for p, q in zip(ours, torchs):
        assert (p - q).norm() < 0.02 * q.norm()
        state, want = optimizers[0].state[p], optimizers[1].state[q]
        assert state.keys() == want.keys() and torch.equal(state["momentum_buffer"], want["momentum_buffer"])


def part_of(name):
    if "image_vit" in name:
        return "vit"
    return "connector" if "vision_backbone" in name or "new_embedding" in name else "decoder"


def orthogonal(g):
    """Newton and Schulz's iteration of Muon."""
    x = g.T if len(g) > g.shape[1] else g
    x = x / x.norm()
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.775 * s + 2.0315 * s @ s) @ x
    return x.T if len(g) > g.shape[1] else x


def plain_training(cfg, ranks=1, left_out=()):
    """(the model after all steps, rows of a log). left_out: steps that are not applied."""
    model = Molmo2.from_pretrained(cfg.init_from[0]).train()
    sets = [Dataset("rows", [cfg.data[0]]), Dataset("more", [cfg.data[1]])]
    stream = Stream(list(zip(sets, (8 ** 0.5, 3 * 3 ** 0.5))), planner_of(cfg), 3).sequences()
    asked = Stream([(sets[0], 1.0)], planner_of(cfg), 0)
    named = {n: p for n, p in model.named_parameters() if part_of(n) not in cfg.freeze
             and not ("embedding" in cfg.freeze and n == "transformer.wte.embedding")}
    moments, log, t = {n: [0.0, 0.0] for n in named}, [], 0
    for step in range(5):
        model.residual_dropout, model.response_dropout = cfg.residual_dropout, cfg.response_dropout
        rows = [decode(next(stream)[0], model.cfg, 176) for _ in range(5)]
        W, loss = float(sum(row["weights"].sum() for row, *_ in rows)), 0.0
        for rank in range(ranks):
            torch.manual_seed((3 * 1_000_003 + step) * ranks + rank)
            mine = rows[rank::ranks]
            for some in (mine[i:i + 2] for i in range(0, len(mine), 2)):
                part = nll_of(model, collate(some), cfg.z_loss) / W
                part.backward()
                loss += float(part.detach())
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
        norms = {part: math.sqrt(sum(float(g.square().sum()) for n, g in grads.items() if part_of(n) == part))
                 for part in ("vit", "connector", "decoder")}
        t += step not in left_out
        for n, p in named.items() if step not in left_out else ():
            peak, warmup = {"vit": (3e-3, 3), "connector": (5e-3, 2), "decoder": (2e-3, 4)}[part_of(n)]
            turn = math.cos(math.pi * (step - warmup) / (5 - warmup))
            lr = peak * ((step + 1) / warmup if step < warmup else 0.23 + 0.77 * (1 + turn) / 2)
            g = grads[n] * min(1.0, cfg.clip / norms[part_of(n)])
            m, v = moments[n]
            matrix = p.ndim == 2 and not any(x in n for x in ("wte", "positional", "lm_head"))
            if cfg.optimizer == "muon" and matrix:
                m = 0.95 * m + 0.05 * g
                change = lr * 0.2 * max(p.shape) ** 0.5 * orthogonal(0.05 * g + 0.95 * m)
            else:
                m, v = 0.83 * m + 0.17 * g, 0.91 * v + 0.09 * g ** 2
                change = lr * (0.37 if cfg.optimizer == "muon" else 1) * (m / (1 - 0.83 ** t))
                change = change / ((v / (1 - 0.91 ** t)).sqrt() + 7e-3)
            moments[n] = [m, v]
            p.data -= change
        model.zero_grad()
        decoder = 2e-3 * ((step + 1) / 4 if step < 4 else 0.23 + 0.77)
        log.append(dict(loss=loss, norms=norms, lr=decoder, fill=sum(int((r["example"] > 0).sum())
                                                                     for r, *_ in rows) / 5 / 176))
        if step in (1, 3, 4):
            plans = [asked.plans("rows", k)[0] for k in range(8)]
            alone = [collate([decode([p], model.cfg, 176)]) for ps in plans for p in ps]
            model.residual_dropout = model.response_dropout = 0.0
            with torch.no_grad():
                log[-1]["eval"] = float(sum(nll_of(model, b) for b in alone) / sum(b["weights"].sum() for b in alone))
    return model, log


def same_training(run, cfg, **kw):
    """A run did what the plain loop does: weights, and what it logged."""
    model, want = plain_training(cfg, **kw)
    begin, got, log = weights_of(cfg.init_from[0], ""), weights_of(run), read_log(run)
    for n, p in model.named_parameters():
        moved, off = float((p - begin[n]).detach().norm()), float((got[n] - p).detach().abs().max())
        if cfg.optimizer == "adamw":
            assert off <= 1e-6, (n, off)
        else:  # rounding grows in directions without a gradient
            assert float((got[n] - p).detach().norm()) <= 1e-3 * moved + 1e-6, (n, off, moved)
        frozen = part_of(n) in cfg.freeze or "embedding" in cfg.freeze and n == "transformer.wte.embedding"
        if frozen:
            assert torch.equal(got[n], begin[n]), n
        elif not n.endswith("wk.bias"):  # softmax ignores a shift: it has no gradient
            assert moved > 1e-7, (n, moved)
    steps = [r for r in log if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    for r, w in zip(steps, want):
        assert r["loss"] == pytest.approx(w["loss"], rel=1e-5)
        assert r["fill"] == pytest.approx(w["fill"], abs=1e-4)
        assert r["grad_norm"] == pytest.approx(math.hypot(*w["norms"].values()), rel=1e-4)
    evals = {r["step"]: r["eval"]["loss"] for r in log if "eval" in r}
    assert evals == pytest.approx({k + 1: w["eval"] for k, w in enumerate(want) if "eval" in w},
                                  abs=2e-4)
    return steps, want


@pytest.mark.parametrize("style, changes", [
    ("olmo", dict(freeze=("embedding",), token_weights="released", recompute=True)),
    ("qwen", dict(optimizer="muon")), pytest.param("qwen", dict(freeze=("vit",)), marks=pytest.mark.slow),
    pytest.param("olmo", dict(freeze=("connector", "decoder"), clip=0.3), marks=pytest.mark.slow)])
def test_every_number_of_the_recipe_is_obeyed(odd, style, changes):
    cfg = odd(style, **changes)
    steps, want = same_training(train(cfg), cfg)
    if cfg.optimizer == "adamw" and "decoder" not in cfg.freeze:
        assert [r["lr"] for r in steps] == pytest.approx([w["lr"] for w in want])
    norms = [n for w in want for n in w["norms"].values() if n]
    assert min(norms) < cfg.clip < max(norms)  # it bites, but not everywhere


# ---- ranks -------------------------------------------------------------------------------------------------

def one_rank(rank, ports, configs):
    """As torchrun starts it, one run after the other."""
    torch.set_num_threads(1)
    M.PRESETS["small"] = ModelConfig(**SIZES, **STYLES["qwen"])
    for port, cfg in zip(ports, configs):
        os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        train(cfg)
    os._exit(0)


def test_two_ranks_train_what_one_does(odd):
    """Also where one of them has a row less; and with --cp, where each row is on both."""
    apart = odd("qwen")
    together = dataclasses.replace(apart, cp=2, residual_dropout=0.0, response_dropout=0.0, out=apart.out + "2")
    with socket.socket() as a, socket.socket() as b:
        for s in (a, b):
            s.bind(("127.0.0.1", 0))
        ports = [s.getsockname()[1] for s in (a, b)]
    fork_server()
    torch.multiprocessing.start_processes(one_rank, (ports, [apart, together]), 2, start_method="forkserver")
    same_training(os.path.join(apart.out, "small", "pretrain"), apart, ranks=2)
    same_training(os.path.join(together.out, "small", "pretrain"), together)


# ---- steps that are left out -------------------------------------------------------------------------------

def spoil(monkeypatch, wrong, each):
    """Gradients that are not finite of a loss that is. wrong: {parameter: {step: factor}}; each: micro-batches."""
    make = pretrain.make_optimizers

    def spoilt(model, cfg):
        def hook(p, factors):
            calls = []

            def grown(grad):
                calls.append(1)
                return grad * factors.get((len(calls) - 1) // each, 1)
            p.register_hook(grown)
        for n, p in model.named_parameters():
            if n in wrong:
                hook(p, wrong[n])
        return make(model, cfg)
    monkeypatch.setattr(pretrain, "make_optimizers", spoilt)


def test_a_gradient_that_is_not_finite_changes_nothing(odd, monkeypatch):
    """Of whichever part; the loss is fine. Were the step applied, every weight of that part would be lost."""
    cfg = odd("qwen", eval_every=100)
    spoil(monkeypatch, {"vision_backbone.image_vit.patch_embedding.bias": {0: math.nan},
                        "transformer.wte.new_embedding": {2: math.inf}, "lm_head.weight": {3: -math.inf}}, 3)
    with monkeypatch.context() as m:
        m.setattr(pretrain, "evaluate", lambda *a: {})
        run = train(cfg)
    steps = [r for r in read_log(run) if "loss" in r]
    assert [r["skipped"] for r in steps] == [1, 1, 2, 3, 3] and all(math.isfinite(r["loss"]) for r in steps)
    model, _ = plain_training(cfg, left_out=(0, 2, 3))
    for n, p in weights_of(run).items():
        assert float((dict(model.named_parameters())[n] - p).detach().abs().max()) <= 1e-6, n


def test_a_loss_that_is_not_finite_changes_nothing_even_if_its_gradient_is_fine(odd, monkeypatch):
    cfg, real, calls = odd("qwen", steps=2, micro_batch=5, save_every=1), Molmo2.forward, []

    def forward(self, *a, **kw):
        if not self.training:
            return real(self, *a, **kw)
        calls.append(1)
        return real(self, *a, **kw) + (math.inf if len(calls) == 2 else 0)
    monkeypatch.setattr(Molmo2, "forward", forward)
    run = train(cfg)
    assert [r["skipped"] for r in read_log(run) if "loss" in r] == [0, 1]
    one, two = (weights_of(run, f"step_000000{n}") for n in (1, 2))
    assert all(torch.equal(one[n], p) for n, p in two.items())


def test_ten_bad_gradients_in_a_row_stop_the_run_nine_do_not(odd, monkeypatch):
    cfg = odd("qwen", steps=19, global_batch=1, micro_batch=1, eval_data=())
    with monkeypatch.context() as m:
        spoil(m, {"lm_head.weight": dict.fromkeys([*range(9), *range(10, 19)], math.nan)}, 1)
        assert read_log(train(cfg))[-2]["skipped"] == 18
    spoil(monkeypatch, {"lm_head.weight": dict.fromkeys(range(2, 12), math.nan)}, 1)
    other = dataclasses.replace(cfg, out=cfg.out + "2")
    with pytest.raises(UserError, match="10 steps in a row .* not finite; their records: .*jsonl:"):
        train(other)
    steps = [r["skipped"] for r in read_log(os.path.join(other.out, "small", "pretrain")) if "loss" in r]
    assert steps == [0, 0, *range(1, 10)]


# ---- dropout -----------------------------------------------------------------------------------------------

def by_hand(rng):
    """A tree: a trunk, a branch of two turns, a sibling, padding; which tokens lead to an answer, which not."""
    spans = [(0, 0, 40), (1, 0, 30), (1, 1, 50), (1, 0, 20), (1, 1, 40), (2, 0, 60), (2, 1, 30), (-1, 0, 10)]
    cat = lambda k: torch.cat([torch.full((s[2],), s[k]) for s in spans])[None]
    branch, answer = cat(0), cat(1)
    weights = answer * torch.tensor([0.07, 2.0, 0.2, 1.0]).repeat(70)[None]  # however small it is
    draw = lambda: torch.randint(0, 1024, answer.shape, generator=rng)
    return dict(tokens=draw(), targets=draw(), weights=weights, branch=branch.clamp(min=0),
                example=(branch >= 0).long()), answer[0].bool(), (answer == 0)[0] & (branch >= 0)[0]


def added(model, batch):
    """[(what a sub-layer put out, what reached the stream)] of all sub-layers, from what flows between modules."""
    seen, pairs = {}, []
    for i, block in enumerate(model.transformer.blocks):
        last = (block.attn_norm, block.ff_norm) if block.norm_after else (block.self_attn, block.mlp)
        middle = block.mlp if block.norm_after else block.ff_norm
        block.register_forward_hook(lambda m, a, out, i=i: seen.update({(i, "in"): a[0], (i, "out"): out}))
        middle.register_forward_pre_hook(lambda m, a, i=i: seen.update({(i, "middle"): a[0]}))
        for k, module in enumerate(last):
            module.register_forward_hook(lambda m, a, out, i=i, k=k: seen.update({(i, k): out}))
    with torch.no_grad():  # without targets: the last MLP runs for all tokens then
        model(**{name: x for name, x in batch.items() if name != "targets"})
    for i, _ in enumerate(model.transformer.blocks):
        pairs += [(seen[i, 0][0], (seen[i, "middle"] - seen[i, "in"])[0]),
                  (seen[i, 1][0], (seen[i, "out"] - seen[i, "middle"])[0])]
    return pairs


@pytest.mark.parametrize("style", list(STYLES))
@pytest.mark.parametrize("residual, response", [(0.3, 0.2), (0.0, 0.4), (0.4, 0.0)])
def test_dropout_keeps_the_mean_and_hits_answers_more(style, residual, response):
    """In every sub-layer; what is kept is 1 / (1 - p) of what it was. Prompts after an answer and in siblings are no
    answers."""
    batch, answers, others = by_hand(torch.Generator().manual_seed(0))
    model = tiny_model(style).train()
    model.residual_dropout, model.response_dropout = residual, response
    for out, reached in added(model, batch):
        for here, p in ((answers, residual + response), (others, residual)):
            kept = reached[here] != 0
            assert float((~kept).float().mean()) == pytest.approx(p, abs=0.03 * (p > 0))
            for token in kept:  # in each, numbers and not all of it
                assert p == 0 and bool(token.all()) or 0 < int(token.sum()) < len(token)
            want = out[here] / (1 - p)
            torch.testing.assert_close(reached[here][kept], want[kept], rtol=1e-4, atol=1e-4)


def test_dropout_is_off_in_evaluation_and_in_answers():
    batch, *_ = by_hand(torch.Generator().manual_seed(0))
    model = tiny_model("qwen")
    want = model(**batch)
    model.residual_dropout, model.response_dropout = 0.3, 0.2
    assert torch.equal(model(**batch), want)
    assert not torch.equal(model.train()(**batch), want) and torch.equal(model.eval()(**batch), want)


# ---- a run and its continuation ----------------------------------------------------------------------------

def go_back(run, to, step):
    """A copy of a run in which `step` was the last checkpoint noted, though later ones are there."""
    shutil.copytree(run, to, symlinks=True)
    os.remove(os.path.join(to, "latest"))
    os.symlink(f"step_{step:07d}", os.path.join(to, "latest"))
    return to


def spoilt_lines(folder):
    """Rows that are bad at sight, and rows whose picture cannot be decoded, among good ones."""
    picture(folder / "good.png", "red")
    (folder / "no pixels.png").write_bytes(png(30, 24))
    row = lambda name, words=1: dict(image=name, annotations=[dict(task="image_caption", answer="red " * words)])
    return write_lines(folder / "spoilt.jsonl", [row("good.png"), row("no pixels.png", 9), "{", row("good.png", 30),
                                                 row("gone.png"), row("no pixels.png", 50)])


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_a_resumed_run_repeats_an_unstopped_one_bit_for_bit(odd, tmp_path, capsys, optimizer):
    """With dropout, from `latest` and not from a later one; and lists no bad row twice."""
    cfg = odd("qwen", data=(spoilt_lines(tmp_path),), rebalance=(), optimizer=optimizer, save_every=2)
    run = train(cfg)
    again = go_back(run, os.path.join(tmp_path, "again", "small", "pretrain"), 2)
    train(dataclasses.replace(cfg, resume=True, out=str(tmp_path / "again")))
    assert "resuming after step 2" in capsys.readouterr().out
    for name in ("model.safetensors", "config.json"):
        one, two = (open(os.path.join(r, "step_0000005", name), "rb").read() for r in (run, again))
        assert one == two
    one, two = (optimizer_of(os.path.join(r, "step_0000005")) for r in (run, again))
    assert one.keys() == two.keys() and all(torch.equal(t, two[k]) for k, t in one.items())
    states = [state_of(os.path.join(r, "step_0000005")) for r in (run, again)]
    assert all(states[0][k] == states[1][k] for k in ("step", "stream", "fingerprint", "failed"))
    listed = read_log(run, "bad_rows.jsonl")
    assert len({(r["where"], r["reason"]) for r in listed}) == len(listed) == 4
    assert read_log(again, "bad_rows.jsonl") == listed
    same = "step", "loss", "lr", "grad_norm", "skipped", "bad", "fill", "eval"
    one, two = ([{k: row[k] for k in same if k in row} for row in read_log(r)] for r in (run, again))
    assert one == two and [r["step"] for r in one if "loss" in r] == [1, 2, 3, 4, 5]


MAY_DIFFER = {"resume", "out", "workers", "save_every", "eval_every", "eval_scenes", "eval_clips", "eval_first",
              "max_bad", "keep", "report", "log_to", "device", "compile", "deterministic", "recompute", "cp",
              "micro_batch"}


def test_a_resumed_run_must_have_the_flags_it_began_with(tmp_path):
    """But for those that change neither the data nor the recipe."""
    was, run = Config(), tmp_path / "run"
    aside = run / ".step_0000001.tmp"
    (aside / "train_state").mkdir(parents=True)
    (aside / "train_state" / "state.json").write_text(json.dumps(dict(step=1, config=dataclasses.asdict(was))))
    distributed.publish(str(aside), str(run / "step_0000001"))
    for field in dataclasses.fields(Config):
        value = getattr(was, field.name)
        is_switch = field.type in (bool, bool | None)
        if field.name == "workers":
            other = 1
        else:
            other = not value if is_switch else (*value, "x") if field.type is tuple else value + field.type(1)
        now = dataclasses.replace(was, **{field.name: other} | dict(resume=True))
        if field.name in MAY_DIFFER:
            assert pretrain.check_resume(str(run), now)[1]["step"] == 1
        else:
            with pytest.raises(UserError, match=f"--{field.name} is .* now, but the run was started with"):
                pretrain.check_resume(str(run), now)


def test_when_a_run_saves_and_evaluates(odd, monkeypatch):
    cfg, asked = odd("qwen", steps=7, save_every=3, eval_every=2, eval_first=True, global_batch=1), []
    monkeypatch.setattr(pretrain, "evaluate", lambda *a: asked.append(a[4]) or {"x": a[4]})
    run = train(cfg)
    assert asked == [0, 2, 4, 6, 7] == [r["step"] for r in read_log(run) if "eval" in r]
    assert sorted(n for n in os.listdir(run) if n.startswith("step")) == [f"step_000000{n}" for n in (3, 6, 7)]
    asked.clear()
    go_back(run, os.path.join(cfg.out + "2", "small", "pretrain"), 3)
    read_log(train(dataclasses.replace(cfg, out=cfg.out + "2", resume=True)))
    assert asked == [4, 6, 7]


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(odd, capsys):
    cfg = odd("qwen", global_batch=1)
    assert train(cfg, stop=[1.0]) is None
    run = os.path.join(cfg.out, "small", "pretrain")
    assert os.readlink(os.path.join(run, "latest")) == "step_0000001"
    assert "stopped by a signal after step 1; --resume goes on" in capsys.readouterr().out
    with pytest.raises(UserError, match="no checkpoint under"):
        pretrain.check_resume(run + "2", dataclasses.replace(cfg, resume=True))


def test_a_run_on_other_data_is_refused_whichever_side_has_more():
    order = {"version of the order": 1}
    for was, now, said in ((dict(a=1), dict(a=2), "a is 2 now, but was 1 "),
                           (dict(a=1, b=2), dict(a=1), "b is gone now"),
                           (dict(a=1), dict(a=1, b=2), "b is 2 now, but was not there")):
        with pytest.raises(UserError, match=said):
            pretrain.check_same_data(was | order, now | order)
    pretrain.check_same_data(dict(a=1, b=2) | order, dict(b=2, a=1) | order)


def test_a_log_goes_on_after_its_checkpoint_without_a_step_twice(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(dict(step=s, loss=s / 2)) + "\n" for s in (1, 2, 3, 4)) + '{"step": 2, "lo')
    silent = pretrain.Log(str(path), 2, is_main=False)
    silent.write(step=9)
    log = pretrain.Log(str(path), 2)
    log.write(step=3, loss=7)
    assert [json.loads(x) for x in log.kept] == [dict(step=1, loss=0.5), dict(step=2, loss=1)]
    assert read_log(tmp_path) == [dict(step=1, loss=0.5), dict(step=2, loss=1), dict(step=3, loss=7)]
    pretrain.Log(str(path), 0)
    assert path.read_text() == ""


def test_a_bad_row_is_counted_each_time_and_listed_once(tmp_path):
    path = str(tmp_path / "bad_rows.jsonl")
    event = ["set", "f:1", "failed to decode", "why"]
    bad = pretrain.BadRecords(pretrain.Log(path, 0), {})
    bad.note(1, [event, ["set", "f:2", "malformed JSON", ""], event])
    bad.note(2, [["set", "f:1", "unreadable media", ""]])  # another reason is news
    resumed = pretrain.BadRecords(pretrain.Log(path, 2), dict(bad.failed))
    resumed.note(3, [event, ["set", "f:2", "malformed JSON", ""], ["other", "f:3", "failed to decode", ""]])
    listed = [(r["step"], r["where"]) for r in read_log(tmp_path, "bad_rows.jsonl")]
    assert listed == [(1, "f:1"), (1, "f:2"), (2, "f:1"), (3, "f:3")]
    state = dict(seen=100, bad=dict(set={"malformed JSON": 2}))
    want = dict(set={"malformed JSON": 2, "failed to decode": 3}, other={"failed to decode": 1})
    assert resumed.counts(state) == want
    assert not resumed.too_many(state, 0.06) and "6 of 100 records" in resumed.too_many(state, 0.059)
    assert not resumed.too_many(dict(state, seen=10), 0.06) and not resumed.too_many(dict(state, seen=200), 0.03)


def test_an_earlier_run_is_kept_under_another_name_each_time(tmp_path):
    run = tmp_path / "run"
    for k in range(3):
        pretrain.start_over(str(run))
        (run / "log.jsonl").write_text(str(k))
    assert [(tmp_path / f"run.old{k}" / "log.jsonl").read_text() for k in (1, 2)] == ["0", "1"]
    assert (run / "log.jsonl").read_text() == "2"


def test_how_points_are_written_follows_the_checkpoint_unless_it_is_said(odd, tmp_path):
    cfg = odd("qwen")
    model = tiny_model("qwen")
    model.cfg.point_format = "released"
    model.save_pretrained(tmp_path / "released")
    for init, flag, want in ((cfg.init_from[0], "auto", "spec"), (tmp_path / "released", "auto", "released"),
                             (cfg.init_from[0], "released", "released"), (tmp_path / "released", "spec", "spec")):
        now = dataclasses.replace(cfg, init_from=(str(init),), point_format=flag)
        assert pretrain.load_model(now).cfg.point_format == want
    assert pretrain.load_model(dataclasses.replace(cfg, init_from=())).cfg.point_format == "spec"


def test_a_checkpoint_of_another_size_is_refused(odd, tmp_path, monkeypatch):
    cfg = odd("qwen")
    for change in (dict(mlp=64), dict(rope_theta=5e4), dict(eps=1e-5), dict(vit_mlp=32), dict(vocab=2048),
                   dict(kv_heads=4), dict(layers=3)):
        wanted = ModelConfig(**SIZES | STYLES["qwen"] | dict(projector_mlp=48) | change)
        monkeypatch.setitem(M.PRESETS, "small", wanted)
        with pytest.raises(UserError, match=f"not of --config small: .*{next(iter(change))} is"):
            pretrain.load_model(cfg)


def test_bf16_is_for_products_and_weights_stay_in_fp32(odd, monkeypatch):
    cfg, seen = odd("qwen", steps=2, dtype="bf16", eval_data=()), set()
    real = torch.optim.AdamW.step

    def step(self, *a, **kw):
        seen.update((p.dtype, p.grad.dtype) for g in self.param_groups for p in g["params"])
        return real(self, *a, **kw)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    low = read_log(train(cfg))[0]["loss"]
    assert seen == {(torch.float32, torch.float32)}
    full = read_log(train(dataclasses.replace(cfg, dtype="fp32", out=cfg.out + "2")))[0]["loss"]
    assert low != full and low == pytest.approx(full, rel=0.01)


# ---- what is written while training goes on ----------------------------------------------------------------

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_holds_the_moment_at_which_it_was_begun(tmp_path, monkeypatch, optimizer):
    """The writer waits; weights, moments and settings change meanwhile."""
    model, go, save = tiny_model("qwen").train(), threading.Event(), distributed.dcp.save
    optimizers, names = pretrain.make_optimizers(model, Config(optimizer=optimizer))

    def step():
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = 0.1
            o.step()
    step()
    keys = {f"{i}/{what}/{names[p]}": t.clone() for i, o in enumerate(optimizers) for p, s in o.state.items()
            for what, t in s.items()}
    want = {n: p.detach().clone() for n, p in model.named_parameters()}
    monkeypatch.setattr(distributed.dcp, "save", lambda *a, **kw: go.wait(60) and save(*a, **kw))
    saver = distributed.Saver(str(tmp_path), distributed.World("cpu"))
    saver.save(7, model, Tokenizer(SMALL_TOKENIZER, 1024), optimizers, names, dict(config=dict(max_frames=8, tiles=0)))
    assert os.listdir(tmp_path) == [".step_0000007.tmp"]
    step()
    go.set()
    saver.finish()
    folder = tmp_path / "step_0000007"
    got, state = weights_of(tmp_path, "latest"), optimizer_of(folder)
    assert all(torch.equal(got[n], p) for n, p in want.items())
    assert not torch.equal(model.lm_head.weight, got["lm_head.weight"])
    assert state.keys() == keys.keys() and all(torch.equal(state[k], t) for k, t in keys.items())
    # and comes back into the optimisers of a new run
    fresh = tiny_model("qwen", 1)
    others, names = pretrain.make_optimizers(fresh, Config(optimizer=optimizer))
    distributed.load_optimizers(str(folder), others, names, distributed.World("cpu"))
    back = {f"{i}/{what}/{names[p]}": t for i, o in enumerate(others) for p, s in o.state.items()
            for what, t in s.items()}
    assert back.keys() == keys.keys() and all(torch.equal(back[k], t) for k, t in keys.items())


def test_training_does_not_wait_for_a_checkpoint_and_does_not_reach_into_it(odd, tmp_path, monkeypatch):
    """Step 2 is written only after step 3: all of it is still that of step 2."""
    cfg = odd("qwen", data=(spoilt_lines(tmp_path),), rebalance=(), save_every=2, eval_data=())
    begin, third = distributed.Saver.save, threading.Event()
    with monkeypatch.context() as m:
        m.setattr(distributed.Saver, "save", lambda self, *a: (begin(self, *a), self.finish()))
        at_once = train(cfg)
    save, write = distributed.dcp.save, pretrain.Log.write

    def late(*a, **kw):
        assert third.wait(60), "step 3 waited for the checkpoint of step 2"
        return save(*a, **kw)

    def noted(self, **row):
        write(self, **row)
        if row.get("step") == 3 and "loss" in row:
            third.set()
    monkeypatch.setattr(distributed.dcp, "save", late)
    monkeypatch.setattr(pretrain.Log, "write", noted)
    slowly = train(dataclasses.replace(cfg, out=cfg.out + "2"))
    for step in ("step_0000002", "step_0000004"):
        one, two = (os.path.join(run, step) for run in (at_once, slowly))
        assert open(os.path.join(one, "model.safetensors"), "rb").read() == \
            open(os.path.join(two, "model.safetensors"), "rb").read()
        a, b = optimizer_of(one), optimizer_of(two)
        assert a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items())
        a, b = (state_of(f) for f in (one, two))
        assert a | dict(config=0) == b | dict(config=0) and a["failed"]["spoilt"]["failed to decode"] > 0
