"""
How much memory asking takes: a random model of 1.1B parameters is written, then asked on the CPU about a small image
and a larger one, of 2 and of 7 crops.

    python tests/ask_memory.py              # loaded in bf16 from a file in bf16, then from one in fp32, as published

The process that asks reports the most memory it has held (RSS, with its mapped files, Python and torch). Allowed are
1.1 times its weights and 300 MB.
"""
import os
import resource
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def write_checkpoint(folder, dtype):
    """A checkpoint of random numbers, without ever holding it: all tensors are the start of one."""
    import torch

    from lib.text import SMALL_TOKENIZER, Tokenizer
    from lib.weights import hub_config, processor_configs, write_json, write_safetensors
    from model import ModelConfig, empty_model
    cfg = ModelConfig(layers=7, vocab=50304)
    model = empty_model(cfg)
    longest = max(p.numel() for p in model.parameters())
    numbers = (torch.randn(longest, generator=torch.Generator().manual_seed(0)) * 0.02).to(getattr(torch, dtype))
    tensors = {name if name.startswith("lm_head.") else "model." + name: numbers[:p.numel()].view(p.shape)
               for name, p in model.named_parameters()}
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors)
    for name, contents in {"config.json": hub_config(cfg), **processor_configs(cfg)}.items():
        write_json(os.path.join(folder, name), contents)
    Tokenizer(SMALL_TOKENIZER, cfg.vocab).save(folder)


def ask(folder):
    """Load and answer; prints what it took."""
    from PIL import Image

    from sample import Chat, load
    model, planner = load(folder, "cpu", dtype="bf16")
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    allowed = 1.1 * weights + 300
    print(f"{model.num_params() / 1e9:.2f}B parameters, weights {weights:.0f} MB, allowed {allowed:.0f} MB: "
          f"{peak():.0f} MB to load", end="", flush=True)
    path = os.path.join(folder, "image.png")
    for size in ((378, 378), (800, 600)):
        Image.linear_gradient("L").convert("RGB").resize(size).save(path)
        list(Chat(model, planner, [path]).ask("What is it?", 8))
        print(f", {peak():.0f} MB to answer about {size[0]}x{size[1]} pixels", end="", flush=True)
    print()
    return peak() <= allowed


def peak():
    """The most memory this process has held, in MB. On Linux ru_maxrss would be the parent's, if that was larger."""
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # of a Mac, in bytes


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(not ask(sys.argv[1]))
    failed = 0
    for dtype in ("bfloat16", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(folder, dtype)
            print(f"from {dtype}: ", end="", flush=True)
            failed += subprocess.run([sys.executable, os.path.abspath(__file__), folder]).returncode != 0
    sys.exit(failed)
