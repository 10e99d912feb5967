"""Shared pieces of the tests: a tiny model whose weights are all at work, and a tiny world of pictures and
lines."""
import json
import os
import struct
import sys
import tempfile
import zlib

import av
import numpy as np
import pytest
import torch
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from data import Planner  # noqa: E402
from model import Molmo2, ModelConfig  # noqa: E402
from points import SMALL_TOKENIZER, Tokenizer  # noqa: E402

SIZES = dict(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48, vocab=1024, rope_theta=1e4, crop=20,
             patch=4, vit_width=16, vit_heads=2, vit_head_dim=8, vit_mlp=24, vit_features=(1, 0))
STYLES = {"olmo": dict(norm_after=True, qk_norm="full",
                       yarn=dict(factor=8.0, original=64, beta_fast=32.0, beta_slow=1.0,
                                                                  attention_factor=1.2), yarn_layers=(1,)),
          "qwen": dict(norm_after=False, qk_norm="head")}


def tiny_model(style="olmo", seed=0):
    """A model of 2 blocks. Training starts with sub-layers that add nothing; here every weight is drawn, so
    all take part."""
    torch.manual_seed(seed)
    model = Molmo2(ModelConfig(**SIZES, **STYLES[style]))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.25 if p.ndim == 1 else 0.15)
    return model.eval()


@pytest.fixture(params=list(STYLES))
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def tokenizer():
    return Tokenizer(SMALL_TOKENIZER, 1024)


@pytest.fixture
def planner(tokenizer):
    return Planner(tokenizer, ModelConfig(**SIZES, **STYLES["olmo"]), seq_len=192, max_frames=4, max_crops=8)


def picture(path, colour, size=(30, 24)):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    image = Image.new("RGB", size, colour)
    image.putpixel((3, 4), (255, 255, 255))
    image.save(path)
    return str(path)


def png(width, height):
    """A PNG that claims a size and holds nothing."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def video(path, n=20, fps=10, size=(48, 32)):
    """A clip whose frame i is grey level 10·i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        (stream.width, stream.height), stream.bit_rate, stream.pix_fmt = size, 2_000_000, "yuv420p"
        for i in range(n):
            frame = np.full((size[1], size[0], 3), 10 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def write_lines(path, rows):
    with open(path, "w") as f:
        f.writelines((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    return str(path)


def words(n):
    """An answer of n words."""
    return " ".join("red green blue wall dot line top left".split()[i * i % 8] for i in range(n))


@pytest.fixture
def world(tmp_path):
    """A folder with three pictures, a clip and the lines about them, as uneven as real ones: answers of 1 to 60
    words, trees and single questions, one picture, several or none. Yields the JSONL path."""
    rows = []
    for i, colour in enumerate(("red", "green", "blue")):
        picture(tmp_path / f"{i}.png", colour)
        rows.append(dict(id=str(i), image=f"{i}.png", annotations=[
            dict(task="image_caption", answer=f"A {colour} wall."),
            dict(task="image_pointing", prompt="Point to the speck.", points=[dict(x=0.1, y=0.17, id=0)]),
            dict(task="image_qa",
                 messages=[dict(role="user", content="What colour?"), dict(role="assistant", content=colour),
                                            dict(role="user", content="Sure?"),
                                            dict(role="assistant", content="Yes.")])]))
    rows.append(dict(id="text", annotations=[dict(task="text", prompt="2 plus 2?", answer="4")]))
    rows.append(dict(id="long", annotations=[dict(task="text", prompt="Say much.", answer=words(60))]))
    rows.append(dict(id="three", images=["0.png", "1.png", "2.png"], annotations=[
        dict(task="multi_image_qa", prompt="Which is red?", answer="0"),
        dict(task="multi_image_pointing", label="speck",
             points=[dict(image=i, x=0.1, y=0.17, id=i) for i in (0, 2)]),
        dict(task="multi_image_qa", prompt="Compare them.", answer=words(23))]))
    rows.append(dict(id="one", image="1.png", annotations=[dict(task="counting", label="speck", answer="1")]))
    video(tmp_path / "clip.mp4")
    rows.append(dict(id="clip", video="clip.mp4", start=0.6, end=1.7, annotations=[
        dict(task="video_tracking", label="dot", points=[dict(t=t, x=0.5, y=0.5, id=0) for t in (0.6, 1.1, 1.6)]),
        dict(task="video_caption", answer=words(41))]))
    return write_lines(tmp_path / "rows.jsonl", rows)


def _rank(rank, ranks, meeting, fn, args):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    fn(rank, ranks, *args)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # without the interpreter's own end, in which a thread of gloo once aborted


def run_ranks(fn, ranks, *args):
    """fn(rank, ranks, *args) in as many processes, joined by gloo. What one raises fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_rank, (ranks, os.path.join(folder, "meeting"), fn, args), ranks,
                                              start_method="spawn")
