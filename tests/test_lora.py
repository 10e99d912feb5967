"""An adapter learns beside frozen weights, and what is saved is a plain model in which it is merged."""
import dataclasses
import json
import os
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import QUICK, STYLES, SIZES, V, log_of, losses_of, random_batch, run, run_ranks, tiny_model

import pretrain
from lib import distributed, lora
from lib.distributed import World
from lib.errors import UserError
from lib.text import SMALL_TOKENIZER, Tokenizer
from lib.weights import read_safetensors
from model import Molmo2, ModelConfig, PRESETS, empty_model
from pretrain import Config, parse

PARTS = ("vit", "connector", "decoder")
FLAGS = [*QUICK, "--lora", "4", "--lora_parts", *PARTS, "--workers", "0"]


def adapted(style="qwen", parts=PARTS, rank=3):
    """A tiny model with adapters whose numbers are all drawn, as after some training, and the model it came from."""
    cfg = Config(lora=rank, lora_parts=parts, freeze=())
    base = tiny_model(style)
    model = lora.install(tiny_model(style), cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_b"):
                p.normal_(std=0.1)
    return lora.freeze(model, cfg), base


def batch_of(seed=3):
    batch = random_batch(torch.Generator().manual_seed(seed), 2, 40)
    assert batch["crops"] is not None and (batch["weights"] > 0).any()
    return batch


def test_a_layer_adds_a_product_of_two_small_matrices():
    """By hand: W = [[1, 2], [3, 4]], A = [[1, 1]], B = [[1], [2]], alpha 6 and rank 1: W x + 6 B A x."""
    linear = torch.nn.Linear(2, 2)
    layer = lora.Adapted(linear, 1, 6.0)
    x = torch.tensor([[1.0, 10.0]])
    assert torch.equal(layer(x), linear(x))  # B is 0
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2], [3, 4]]))
        linear.bias.copy_(torch.tensor([100.0, 200]))
        layer.lora_a.fill_(1)
        layer.lora_b.copy_(torch.tensor([[1.0], [2]]))
    assert layer(x).tolist() == [[121 + 66, 243 + 132]]


@pytest.mark.parametrize("style", list(STYLES))
def test_merged_is_adapted(style):
    model, base = adapted(style)
    merged = distributed.plain_model(model, distributed.gather_full_state(model, "cpu"))
    assert merged.state_dict().keys() == base.state_dict().keys()
    batch = batch_of()
    targets, weights = batch.pop("targets"), batch.pop("weights")
    logits = model(**batch)
    off = (merged(**batch) - logits).abs().max() / logits.abs().max()
    assert off < 8e-6 and not torch.allclose(base(**batch), logits, rtol=1e-2)
    # what is not adapted stays to the bit
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight) and len(targets) == len(weights)


@pytest.mark.parametrize("parts", [PARTS, ("decoder",)])
def test_a_merged_checkpoint_is_in_transformers_what_the_adapted_model_is_here(tmp_path, parts):
    theirs = pytest.importorskip("transformers.models.molmo2.modeling_molmo2", reason="no transformers 5 with Molmo2")
    model, base = adapted(parts=parts)
    distributed.gather_full_model(model, "cpu").save_pretrained(tmp_path)
    other, report = theirs.Molmo2ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32,
                                                                          output_loading_info=True)
    assert not any(report.values())  # no tensor is missing, unknown, or of another shape
    cfg = model.cfg
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, cfg.vocab, (1, 24), generator=rng)
    tokens[0, 1:10] = cfg.image_token  # 3 x 3 windows of a crop of 5 x 5 patches
    corners = torch.tensor([5 * y + x for y in (0, 2, 4) for x in (0, 2, 4)])
    pool = torch.stack([corners, *torch.full((3, 9), -1)], 1)  # of each window one patch
    crops = torch.randint(0, 256, (1, cfg.patches, cfg.patch ** 2 * 3), dtype=torch.uint8, generator=rng)
    inputs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), image_token_pooling=pool,
                  mm_token_type_ids=(tokens == cfg.image_token).long(), pixel_values=crops / 127.5 - 1,
                  image_grids=torch.tensor([[0, 0, 3, 3]]), image_num_crops=torch.ones(1, dtype=torch.long))
    with torch.inference_mode():
        logits = other(**inputs).logits
        want = model(tokens, crops, pool)
        before = base(tokens, crops, pool)
    assert (logits - want).abs().max() < 1e-4 * want.abs().max() < 1e-2 * (want - before).abs().max()


@pytest.mark.parametrize("parts", [("vit",), ("connector",), ("decoder",), ("decoder", "vit")])
def test_nothing_but_adapters_of_the_named_parts_learns(parts):
    model, _ = adapted(parts=parts)
    model.train()(**batch_of()).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    trained = {name for names in pretrain.make_optimizers(model, Config())[1:] for name in names.values()}
    layers = {"vit": [f"vision_backbone.image_vit.{name}" for name in (
                  "patch_embedding", *(f"transformer.resblocks.{i}.{layer}" for i in (0, 1) for layer in (
                      "attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1",
                      "feed_forward.w2")))],
              "connector": [f"vision_backbone.{name}" for name in (
                  "image_pooling_2d.wq", "image_pooling_2d.wk", "image_pooling_2d.wv", "image_pooling_2d.wo",
                  "image_projector.w1", "image_projector.w2", "image_projector.w3")],
              "decoder": [f"transformer.blocks.{i}.{layer}" for i in (0, 1) for layer in (
                  "self_attn.att_proj", "self_attn.attn_out", "mlp.ff_proj", "mlp.ff_out")]}
    want = {f"{name}.{matrix}" for part in parts for name in layers[part] for matrix in ("lora_a", "lora_b")}
    assert with_gradient == trained == want


def numbers(cfg, rank, parts):
    """Parameters of adapters, by hand: rank · (inputs + outputs) of each linear layer."""
    vit, heads = cfg.vit_width, cfg.vit_heads * cfg.vit_head_dim
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    features = len(cfg.vit_features) * vit
    sizes = dict(vit=cfg.patch ** 2 * 3 + vit
                 + (max(cfg.vit_features) + 1) * (4 * (vit + heads) + 2 * (vit + cfg.vit_mlp)),
                 connector=3 * (features + heads) + 2 * heads + 2 * (heads + cfg.projector_mlp)
                 + cfg.projector_mlp + cfg.width,
                 decoder=cfg.layers * ((cfg.width + q + 2 * kv) + (q + cfg.width)
                                       + (cfg.width + 2 * cfg.mlp) + (cfg.mlp + cfg.width)))
    return rank * sum(sizes[part] for part in parts)


@pytest.mark.parametrize("config, parts", [("4b", ("decoder",)), ("1b", PARTS), ("8b", ("vit", "connector"))])
def test_only_so_many_numbers_train(config, parts):
    cfg = Config(lora=16, lora_parts=parts)
    model = lora.freeze(lora.install(empty_model(config), cfg), cfg)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == numbers(PRESETS[config], 16, parts)


def test_the_budget_counts_frozen_weights_as_two_bytes_and_adapters_alone_as_trained(tmp_path):
    _, text = run(tmp_path, "--config", "1b", "--dry_run", "--lora", "16", "--micro_batch", "1")
    trained, frozen = numbers(PRESETS["1b"], 16, ("decoder", "connector")), empty_model("1b").num_params()
    assert f"{trained:,} of them train" in text
    told = {line[2:22].strip(): float(line[22:30]) for line in text.splitlines() if line.endswith(" GB")}
    assert told["gradients"] == pytest.approx(4 * trained / 2 ** 30, abs=1e-3)
    assert told["optimiser"] == pytest.approx(8 * trained / 2 ** 30, abs=1e-3)
    assert told["weights"] == pytest.approx((2 * frozen + 4 * trained) / 2 ** 30, rel=2e-3)


# ---- frozen weights in bf16 ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("frozen", [("vit",), ("decoder",), ("vit", "connector"), ("embedding",)])
def test_frozen_weights_in_bf16_give_the_loss_and_gradients_of_fp32(frozen):
    """Autocast takes them as bf16 anyway. The table has numbers that bf16 can write, else it would be rounded."""
    results = []
    for bf16 in (False, True):
        model = tiny_model("qwen").train()
        table = model.transformer.wte.embedding
        table.data = table.data.bfloat16().float()
        lora.freeze(model, Config(freeze=frozen), bf16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch_of())
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert any(p.dtype == torch.bfloat16 for p in model.parameters()) == bf16
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert len(results[0]) == len(results[1]) > 5
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_save_gathers_every_parameter_once(tmp_path, tokenizer, monkeypatch):
    """On several ranks each time is a collective of all of them."""
    gathered = []
    monkeypatch.setattr(torch.Tensor, "full_tensor", lambda t: gathered.append(t.shape) or t, raising=False)
    model, _ = adapted()
    saver = distributed.Saver(str(tmp_path), World("cpu"))
    saver.save(1, model, tokenizer, [], {}, dict(config=dict(max_frames=1, tiles=0)))
    saver.finish()
    assert gathered == [p.shape for _, p in model.named_parameters(remove_duplicate=False)]
    adapter = read_safetensors(str(tmp_path / "latest/adapter/adapter.safetensors"))
    assert adapter and all(torch.equal(p, adapter.get(name, p)) for name, p in model.named_parameters())


# ---- runs ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def base(tmp_path, monkeypatch):
    """A folder with a trained model, of the sizes of `small` here."""
    monkeypatch.setitem(PRESETS, "small", ModelConfig(**SIZES, **STYLES["qwen"]))
    return make_base(tmp_path / "base")


def make_base(folder, seed=0):
    tiny_model("qwen", seed).save_pretrained(folder)
    Tokenizer(SMALL_TOKENIZER, V).save(folder)
    return str(folder)


def numbers_of(checkpoint):
    """All that a checkpoint holds: {file and name: tensor}."""
    tensors = {}
    for file in ("model.safetensors", "adapter/adapter.safetensors"):
        tensors |= {f"{file} {name}": t for name, t in read_safetensors(os.path.join(checkpoint, file)).items()}
    return tensors | {f"state {name}": t for name, t in optimizer_of(checkpoint).items()}


def optimizer_of(checkpoint):
    reader = dcp.FileSystemReader(os.path.join(checkpoint, "train_state"))
    state = {key: torch.empty(saved.size) for key, saved in reader.read_metadata().state_dict_metadata.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_resumes_bit_for_bit_and_its_checkpoints_are_merged(tmp_path, world, base, dtype):
    flags = [*FLAGS, "--data", world, "--init_from", base, "--steps", "4", "--dtype", dtype, "--lr_decoder", "0.01"]
    run(tmp_path, *flags)
    folder, want = tmp_path / "out/small/pretrain", losses_of(tmp_path)
    last = numbers_of(folder / "step_0000004")
    # after a kill -9 in step 3
    shutil.rmtree(folder / "step_0000004")
    os.remove(folder / "latest")
    os.symlink("step_0000002", folder / "latest")
    assert "resuming after step 2" in run(tmp_path, *flags, "--resume")[1] and losses_of(tmp_path) == want
    again = numbers_of(folder / "step_0000004")
    assert again.keys() == last.keys() and all(torch.equal(t, last[name]) for name, t in again.items())

    # the state of the optimiser is that of adapters alone, and the model is the base and they
    adapter = read_safetensors(str(folder / "latest/adapter/adapter.safetensors"))
    assert {key.split("/")[2] for key in optimizer_of(folder / "latest")} == adapter.keys()
    merged, start = Molmo2.from_pretrained(folder / "latest"), Molmo2.from_pretrained(base)
    changed = 0
    for name, p in start.named_parameters():
        stem = name.removesuffix(".weight")
        if dtype == "bf16" and p.ndim == 2 and not any(part in name for part in ("new_", "posit", "patch_emb")):
            p = p.bfloat16().float()
        if f"{stem}.lora_a" in adapter:
            p = p + 32 / 4 * adapter[f"{stem}.lora_b"] @ adapter[f"{stem}.lora_a"]
            changed += 1
        torch.testing.assert_close(dict(merged.named_parameters())[name], p, rtol=1e-6, atol=1e-7)
    assert changed == 28 and any(float(t.abs().max()) > 0 for name, t in adapter.items() if name.endswith("_b"))


def test_an_adapter_goes_on_and_only_with_its_own_base_and_flags(tmp_path, world, base):
    run(tmp_path, *FLAGS, "--data", world, "--init_from", base, "--steps", "2", "--save_every", "1")
    latest = str(tmp_path / "out/small/pretrain/latest")
    cfg = Config(config="small", lora=4, lora_parts=PARTS, init_from=(base, latest))
    path = os.path.join(latest, "adapter/adapter.safetensors")
    want = {name: t.clone() for name, t in read_safetensors(path).items()}
    for adapter in (latest, os.path.join(latest, "adapter")):
        model = pretrain.load_model(dataclasses.replace(cfg, init_from=(base, adapter)))
        got = {name: p for name, p in model.named_parameters() if lora.is_adapter(name)}
        assert got.keys() == want.keys() and all(torch.equal(p, want[name]) for name, p in got.items())
    other = make_base(tmp_path / "other", 1)
    for changes, message in (
            (dict(init_from=(other, latest)), "trained on another model"),
            (dict(init_from=(latest, latest)), "trained on another model"),  # merged: it would count twice
            (dict(lora=8), "rank is 4, but 8 is asked for; change --lora"),
            (dict(lora_alpha=16.0), "alpha is 32.0, but 16.0 is asked for; change --lora_alpha"),
            (dict(lora_parts=("vit",)), "change --lora_parts"),
            (dict(init_from=(base, other)), "no adapter.json"),
            (dict(lora=0), "goes on training with --lora"),
            (dict(init_from=(base, latest, latest)), "its adapter")):
        with pytest.raises(UserError, match=message):
            pretrain.load_model(dataclasses.replace(cfg, **changes))
    os.remove(os.path.join(latest, "COMPLETE"))
    lora.write_safetensors(path, {name: t for name, t in want.items() if "resblocks.1" not in name})
    with pytest.raises(UserError, match="is None, the model needs"):
        pretrain.load_model(cfg)
    # the base was trained on while the run stood still
    tiny_model("qwen", 2).save_pretrained(base)
    code, text = run(tmp_path, *FLAGS, "--data", world, "--init_from", base, "--steps", "3", "--resume", check=False)
    assert code == 2 and "--steps is 3 now" in text
    shutil.rmtree(tmp_path / "out/small/pretrain/step_0000002")
    os.remove(latest)
    code, text = run(tmp_path, *FLAGS, "--data", world, "--init_from", base, "--steps", "2", "--resume", check=False)
    assert code == 2 and "trained on another model" in text


RANKS = {"fp32": [], "cp": ["--cp", "2", "--recompute"], "bf16": ["--dtype", "bf16"]}


def on_ranks(rank, ranks, folder, flags, ports):
    PRESETS["small"] = ModelConfig(**SIZES, **STYLES["qwen"])
    for (name, more), port in zip(RANKS.items(), ports):
        os.environ["MASTER_PORT"] = str(port)
        run(folder, *flags, *more, "--out", name)


def test_two_ranks_learn_what_one_does(tmp_path, world, base):
    flags = [*FLAGS, "--data", world, "--init_from", base, "--steps", "2", "--lr_decoder", "0.003"]
    run(tmp_path, *flags)
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in RANKS]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    run_ranks(on_ranks, 2, tmp_path, flags, ports, joined=False)
    want = losses_of(tmp_path)
    ours = numbers_of(tmp_path / "out/small/pretrain/latest")
    for name in RANKS:
        assert losses_of(tmp_path, name) == {step: pytest.approx(loss, rel=2e-2 if name == "bf16" else 1e-5)
                                             for step, loss in want.items()}
        theirs = numbers_of(tmp_path / name / "small/pretrain/latest")
        assert theirs.keys() == ours.keys()
        for key, t in theirs.items() if name != "bf16" else ():
            if not key.startswith("state"):
                torch.testing.assert_close(ours[key], t, rtol=1e-2, atol=2e-4, msg=key)


def loss_and_gradients(compiled, recompute):
    """Of one step of an adapted model."""
    model = adapted()[0].train()
    distributed.shard_model(model, World("cpu"), compiled, recompute, False)
    loss = model(**batch_of())
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_recomputing_changes_nothing():
    results = [loss_and_gradients(False, recompute) for recompute in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU takes a C++ compiler")
def test_compiled_blocks_with_adapters_compute_what_plain_ones_do():
    results = [loss_and_gradients(compiled, True) for compiled in (False, True)]
    largest = max(float(x.abs().max()) for x in results[0][1:])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest)


# ---- flags ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    (["--lora", "8"], "--lora 8 needs --init_from"), (["--lora", "-1"], "--lora -1: must be 0 or more"),
    (["--lora", "129", "--init_from", "a"], "--lora 129: the rank must not be above"),
    (["--lora", "8", "--init_from", "a", "--freeze", "vit"], "--freeze vit: --lora freezes all"),
    (["--lora", "8", "--init_from", "a", "--lora_parts", "head"], "--lora_parts head: choose from vit"),
    (["--lora", "8", "--init_from", "a", "--lora_alpha", "0"], "--lora_alpha 0.0: must be more than 0"),
    (["--lora", "8", "--init_from", "a", "--lora_alpha", "nan"], "--lora_alpha nan: must be more than 0"),
    (["--lora_parts", "vit"], "--lora_parts does nothing without --lora"),
    (["--lora_alpha", "8"], "--lora_alpha does nothing without --lora"),
    (["--epochs", "2", "--steps", "9"], "--steps 9 and --epochs 2"), (["--epochs", "-1"], "--epochs -1"),
    (["--epochs", "nan"], "--epochs nan"), (["--epochs", "inf"], "--epochs inf"), (["--keep", "-1"], "--keep -1")])
def test_flags_that_do_not_go_together_say_so(flags, message):
    with pytest.raises(UserError, match=message):
        parse(Config(), pretrain.PRESETS, flags)


def test_lora_brings_its_own_learning_rates_and_freezes_the_rest():
    cfg = parse(Config(), pretrain.PRESETS, ["--lora", "8", "--init_from", "a", "--config", "4b", "--data", "x"])
    assert (cfg.optimizer, cfg.lr_decoder, cfg.freeze) == ("adamw", 1e-4, ("vit",))
    cfg = parse(Config(), pretrain.PRESETS, ["--lora", "8", "--init_from", "a", "--lr_decoder", "7", "--lora_parts",
                                             *PARTS])
    assert (cfg.lr_decoder, cfg.lr_connector, cfg.freeze) == (7, 5e-3, ())
    assert parse(Config(), pretrain.PRESETS, ["--init_from", "a"]).lr_decoder == 2e-3


def test_epochs_are_steps(tmp_path, world, base):
    """Eight records, all drawn equally often. The stream says how many sequences a draw fills."""
    stream = SimpleNamespace(first_look=lambda: (0.25, ""))
    records = type("Records", (), dict(__len__=lambda self: 30, weight=lambda self: 1.0, name="a"))
    mixture = [(records(), 0.5), (records(), 0.5)]
    # 60 records x 2 = 120 draws, of which 4 fill a sequence and 12 a step of 3
    assert pretrain.count_steps(Config(epochs=2.0, global_batch=3), stream, mixture, ()) == 10
    assert pretrain.count_steps(Config(steps=7, global_batch=3), stream, mixture, ()) == 7
    flags = [*QUICK, "--data", world, "--init_from", base, "--workers", "0", "--epochs"]
    text = run(tmp_path, *flags, "1")[1]
    steps = max(losses_of(tmp_path))
    assert f"--epochs 1 takes {steps} steps" in text and log_of(tmp_path)[-2]["lr"] < 1e-3
    with open(tmp_path / "out/small/pretrain/latest/train_state/state.json") as f:
        assert json.load(f)["config"]["steps"] == steps
    assert f"resuming after step {steps}" in run(tmp_path, *flags, "1", "--resume")[1]
    code, text = run(tmp_path, *flags, "2", "--resume", check=False)
    assert code == 2 and "--epochs is 2.0 now, but the run was started with 1.0" in text
