"""Shared pieces of the tests: a tiny model whose weights are all at work, a tiny world of pictures and lines, trees
and batches drawn by lot, files in which everything is broken, and three ways to run a stage: here, in a process of
its own, on several ranks."""
import contextlib
import gc
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib

import av
import numpy as np
import pytest
import torch
import torch.multiprocessing
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

import pretrain  # noqa: E402
import sft  # noqa: E402
from data import Dataset, Planner  # noqa: E402
from lib.records import parse_record  # noqa: E402
from lib.text import SMALL_TOKENIZER, Tokenizer  # noqa: E402
from model import IMAGE, PRESETS, READ_ONLY, Molmo2, ModelConfig  # noqa: E402

SIZES = dict(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48, vocab=1024, rope_theta=1e4, crop=20,
             patch=4, vit_width=16, vit_heads=2, vit_head_dim=8, vit_mlp=24, vit_features=(1, 0))
V = SIZES["vocab"]
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


def plan_all(planner, path):
    """[(plans, annotations left out)] of a file's lines."""
    d, out = Dataset("rows", [path]), []
    for i in range(len(d)):
        line, folder, _ = d.line(i)
        out.append(planner.plan(parse_record(line), folder, random.Random(0)))
    return out


def shared(*names):
    """A file or folder of ../shared, which is no part of the project; the test is skipped where it is not there."""
    path = os.path.join(os.path.dirname(ROOT), "shared", *names)
    if not os.path.exists(path):
        pytest.skip(f"needs ../shared/{'/'.join(names)}, which is not part of the project")
    return path


# ---- drawn by lot ------------------------------------------------------------------------------------------

def random_tree(rng, T):
    """Ids of a packed row: (example, branch, vision), with media of all lengths, text between them, padding."""
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=rng))
    example, branch = torch.zeros(2, T, dtype=torch.long)
    vision, t, longest = torch.zeros(T, dtype=torch.bool), 0, draw(2, T // 2)
    for e in range(1, T + 1):
        if t >= T or not draw(0, 12):
            break
        trunk = min(draw(1, longest), T - t)
        example[t:t + trunk], k, kind = e, t, draw(0, 2)
        while k < t + trunk and kind:
            n = draw(1, T // 8 if kind == 2 else 9)
            vision[k:min(k + n, t + trunk)] = True
            k += n + draw(1, T // 8 if not draw(0, 5) else 2)
        t += trunk
        for i in range(draw(0, 5)):
            n = min(draw(1, longest // 2), T - t)
            example[t:t + n], branch[t:t + n] = e, i + 1
            t += n
    return example, branch, vision


def random_batch(rng, B, T, windows_of=(4, 9)):
    """Packed rows of random message trees: some examples with crops, vision tokens before text, branches."""
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=rng))
    tokens = torch.randint(0, V, (B, T), generator=rng)
    example, branch, pos = (torch.zeros(B, T, dtype=torch.long) for _ in range(3))
    n_crops, patches, K = draw(0, 5), 25, windows_of[draw(0, len(windows_of) - 1)]
    for b in range(B):
        t, e = 0, 0
        while t < T - draw(0, 6) and t < T:
            e += 1
            trunk = min(draw(1, T), T - t)
            example[b, t:t + trunk], pos[b, t:t + trunk] = e, torch.arange(trunk)
            if n_crops and draw(0, 2):  # frames or crops: start, patches, end
                for k in range(draw(1, trunk)):
                    tokens[b, t + k] = V + (IMAGE if draw(0, 3) else READ_ONLY.index("<frame_start>"))
            t += trunk
            for i in range(draw(0, 3)):
                n = min(draw(1, 8), T - t)
                example[b, t:t + n], branch[b, t:t + n] = e, i + 1
                pos[b, t:t + n] = trunk + torch.arange(n)
                t += n
    weights = torch.rand(B, T, generator=rng) * (torch.rand(B, T, generator=rng) < 0.4) * (example > 0)
    batch = dict(tokens=tokens, example=example, branch=branch, pos=pos, weights=weights,
                 targets=torch.randint(0, V, (B, T), generator=rng), crops=None, pool=None)
    m = int((tokens == V + IMAGE).sum())
    if n_crops:
        # windows lie in one crop, and now and then over the border to the next
        crop = torch.randint(0, n_crops, (m, 1), generator=rng) * patches
        pool = crop + torch.randint(0, patches + (patches if draw(0, 1) else 0), (m, K), generator=rng)
        pool = torch.where(torch.rand(m, K, generator=rng) < 0.2, -1, pool % (n_crops * patches))
        batch |= dict(pool=pool, crops=torch.randint(0, 256, (n_crops, patches, 48), generator=rng).byte())
    return batch


# ---- everything broken -------------------------------------------------------------------------------------

def fast_start(path, n=120):
    """An H.264 file whose table of contents comes first, so that half of it still opens."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        rng = np.random.default_rng(0)
        for _ in range(n):
            frame = rng.integers(0, 255, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def poison(folder):
    """Write the broken files; returns [(line, reason)] for rows found out when planned and, apart, when
    decoded."""
    m, noise = folder / "media", np.random.default_rng(0).bytes(999)
    m.mkdir()
    Image.effect_noise((64, 48), 60).convert("RGB").save(m / "good.png")
    Image.effect_noise((64, 48), 60).convert("RGB").save(m / "good.jpg")
    video(m / "good.mp4")
    whole_png, whole_jpg, whole_mp4 = ((m / f"good.{e}").read_bytes() for e in ("png", "jpg", "mp4"))
    fast_start(m / "fast.mp4")
    fast = (m / "fast.mp4").read_bytes()
    files = {"empty.png": b"", "empty.mp4": b"", "noise.png": noise, "noise.webm": noise,
             "error.jpg": b"404 not found", "bomb.png": png(10_000, 10_000), "wide.png": png(2**31 - 1, 1),
             "cut.gif": b"GIF89a\1", "m3u8.mp4": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n",
             "m3u8.ts": b"#EXTM3U\n#EXTINF:1,\ngood.mp4\n",
             "concat.mp4": b"ffconcat version 1.0\nfile good.mp4\n",
             "dash.mp4": b"<?xml version='1.0'?><MPD></MPD>",
             "session.mp4": b"v=0\no=- 0 0 IN IP4 127.0.0.1\n", "text.mkv": b"hello",
             "picture.mp4": whole_png, "no_moov.mp4": whole_mp4[:len(whole_mp4) // 3], "html.mp4": b"<html>",
             "zip.mp4": b"PK\3\4" + bytes(99)}
    files |= {f"short{k}.png": whole_png[:4 * k] for k in range(1, 8)}
    files |= {f"short{k}.mp4": whole_mp4[:60 * k] for k in range(1, 8)}
    broken_later = {"half.png": whole_png[:len(whole_png) // 2], "half.jpg": whole_jpg[:len(whole_jpg) // 2],
                    "crc.png": whole_png[:200] + bytes(20) + whole_png[220:],
                    "cut.mp4": fast[:len(fast) // 2],
                    "flat.mp4": fast[:-len(fast) // 2] + bytes(len(fast) // 2)}
    for name, contents in (files | broken_later).items():
        (m / name).write_bytes(contents)
    audio_only(m / "audio.mp4")
    (m / "folder.png").mkdir()
    os.mkfifo(m / "pipe.png")
    os.mkfifo(m / "pipe.mp4")
    links = {"zero.png": "/dev/zero", "out.png": folder.parent / "secret.png", "loop.png": "loop.png"}
    for name, target in links.items():
        os.symlink(target, m / name)
    picture(folder.parent / "secret.png", "red")

    def of(name):
        kind = "video" if name.endswith((".mp4", ".webm", ".mkv", ".ts")) else "image"
        return {kind: name, "annotations": [dict(task=f"{kind}_caption", prompt="What?", answer="A thing.")]}
    refused = ["/etc/passwd", "../secret.png", "media/../../secret.png", "..\\secret.png",
               "http://127.0.0.1:9/a.png", "https://127.0.0.1:9/a.mp4", "file:///etc/passwd",
               "media/zero.png", "media/out.png", "media/loop.png", "a\0b.png"]
    media_rows = [f"media/{n}" for n in [*files, "audio.mp4", "folder.png", "pipe.png", "pipe.mp4",
                                         "missing.png", "missing.mp4", "concat:good.mp4|good.mp4.mp4"]]
    point = lambda x: dict(of("media/good.png"), annotations=[dict(task="image_pointing", label="a",
                                                                   points=[dict(x=x, y=0, id=0)])])
    bad = [(json.dumps(of(n)), "unreadable media") for n in refused + media_rows]
    bad += [("{", "malformed JSON"), (b"\xff\xfe{}", "not UTF-8"), ("[" * 50_000, "malformed JSON"),
            ("[]", "wrong field"),
            (json.dumps(point(1.5)), "point outside [0, 1]"),
            (json.dumps(point(float("nan"))), "point outside [0, 1]"),
            (json.dumps(point(0)).replace('"x": 0', '"x": 1e999'), "point outside [0, 1]"),
            (json.dumps(dict(image=5, annotations=[dict(task="text", prompt="a", answer="b")])), "wrong field"),
            (json.dumps(dict(of("media/good.png"), annotations=[dict(task="sing")])), "unknown task"),
            (r'{"annotations": [{"task": "text", "prompt": "a", "answer": "\ud800"}]}', "not UTF-8"),
            (json.dumps(dict(of("media/good.mp4"), start=99)), "wrong field")]
    return bad, [json.dumps(of(f"media/{n}")) for n in broken_later], [json.dumps(of(f"media/good.{e}"))
                                                                       for e in ("png", "jpg", "mp4")]


# ---- a stage, run ------------------------------------------------------------------------------------------

QUICK = ["--config", "small", "--mixture", "equal", "--global_batch", "2", "--micro_batch", "1", "--seq_len",
         "192", "--save_every", "2"]
# A line of Python after which `--config small` is a tiny model in that process: see `start`.
AS_TINY = f"import model; model.PRESETS['small'] = model.ModelConfig(**{SIZES | STYLES['qwen']})"


@pytest.fixture
def tiny_small(monkeypatch):
    """Makes `--config small` a tiny model in this process, for tests of what a run does and not of what it learns: a
    step and a checkpoint of it take a fifth of the time."""
    monkeypatch.setitem(PRESETS, "small", ModelConfig(**SIZES, **STYLES["qwen"]))


def run(folder, *flags, check=True, stage=pretrain):
    """What a stage's command does, without the seconds that a process takes to begin: (exit code, output)."""
    said, code, here, threads = io.StringIO(), 0, os.getcwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)  # as `start` does: runs are compared bit for bit
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            pretrain.main(getattr(stage, "DEFAULTS", pretrain.Config()), stage.PRESETS, flags)
    except SystemExit as e:
        code = e.code or 0
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)
        for thread in threading.enumerate():  # a process waits at its end for the checkpoint that it writes
            if thread.name == "checkpoint":
                thread.join()
    if code:
        gc.collect()  # what an error leaves in its traceback: workers, and the lock on the run's folder
        for worker in multiprocessing.active_children():  # each has inherited the lock, and is about to end
            worker.join(60)
    assert not check or code == 0, said.getvalue()
    return code, said.getvalue()


def stage_2(folder, *flags):
    return run(folder, *flags, check=False, stage=sft)


def read_log(run, name="log.jsonl"):
    with open(os.path.join(run, name)) as f:
        return [json.loads(line) for line in f]


def log_of(folder, out="out", stage="pretrain"):
    return read_log(os.path.join(folder, out, "small", stage))


def losses_of(folder, out="out"):
    """{step: loss} of a run, also of one that was killed."""
    path = os.path.join(folder, out, "small", "pretrain", "log.jsonl")
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        return {r["step"]: r["loss"] for r in map(json.loads, f) if "loss" in r}


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
    text, _ = p.communicate(timeout=600)
    assert p.returncode == code and "Traceback" not in text, text
    return text


def fork_server():
    """Processes are forked from one which has imported this file, with all that it imports: it takes seconds, once."""
    here = os.getcwd()
    os.chdir(HERE)  # it looks for modules where it is started
    try:
        multiprocessing.set_forkserver_preload(["conftest", "torch.distributed.fsdp"])
        multiprocessing.forkserver.ensure_running()
    finally:
        os.chdir(here)
    return multiprocessing.get_context("forkserver")


def _rank(rank, ranks, meeting, fn, args):
    torch.set_num_threads(1)
    if isinstance(meeting, int):  # fn meets the others by itself, as under torchrun
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(meeting))
        fn(rank, ranks, *args)
        os._exit(0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    fn(rank, ranks, *args)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # without the interpreter's own end, in which a thread of gloo once aborted


def run_ranks(fn, ranks, *args, joined=True):
    """fn(rank, ranks, *args) in as many processes, joined by gloo. What one raises fails the test."""
    fork_server()
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        meeting = os.path.join(folder, "meeting") if joined else port
        torch.multiprocessing.start_processes(_rank, (ranks, meeting, fn, args), ranks, start_method="forkserver")


# ---- a page, in a browser ----------------------------------------------------------------------------------

NAMES = "chromium", "chromium-browser", "google-chrome", "chromium-headless-shell"
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A headless Chromium, spoken to over pipes: JSON messages, a zero byte after each, on its fds 3, 4."""

    def __init__(self, folder):
        to_browser, self.write = os.pipe()
        self.read, from_browser = os.pipe()

        def arrange():
            os.dup2(to_browser, 30), os.dup2(from_browser, 31)  # out of the way: either may be 3 or 4 now
            os.dup2(30, 3), os.dup2(31, 4)
        flags = ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-dev-shm-usage",
                 "remote-debugging-pipe", f"user-data-dir={folder}", "window-size=1400,800")
        self.process = subprocess.Popen(
            [BROWSER, *("--" + f for f in flags), "about:blank"], preexec_fn=arrange, close_fds=False,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser), os.close(from_browser)
        self.number, self.rest, self.session = 0, b"", None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method, **params):
        """The browser's reply to a command, {result} or {error}."""
        self.number += 1
        message = dict(id=self.number, method=method, params=params)
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = os.read(self.read, 1 << 20)
                assert part, "the browser ended"
                self.rest += part
            line, self.rest = self.rest.split(b"\0", 1)
            if json.loads(line).get("id") == self.number:
                return json.loads(line)

    def __call__(self, method, **params):
        reply = self.ask(method, **params)
        assert "error" not in reply, reply
        return reply["result"]

    def js(self, expression):
        """The value of an expression in the page."""
        r = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in r, r
        return r["result"].get("value")

    def until(self, expression):
        """Wait until an expression is true in the page, which may be on its way to another one."""
        deadline = time.time() + 300
        while time.time() < deadline:
            r = self.ask("Runtime.evaluate", expression=f"!!({expression})", returnByValue=True)
            if r.get("result", {}).get("result", {}).get("value") is True:
                return
            time.sleep(0.02)
        raise AssertionError(f"never: {expression}")

    def open(self, url):
        self("Page.navigate", url=url)
        self.until("document.body && document.body.dataset.ready === 'yes'")

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            typed = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            typed |= {"text": "\r", "windowsVirtualKeyCode": 13} if key == "Enter" and kind == "keyDown" else {}
            self("Input.dispatchKeyEvent", type=kind, key=key, **typed)

    def type(self, text):
        self("Input.insertText", text=text)

    def click(self, name, x=0.5, y=0.5):
        """A real click at shares of an element's box."""
        left, top, w, h = self.js("(r => [r.left, r.top, r.width, r.height])"
                                  f"($({name!r}).getBoundingClientRect())")
        at = dict(x=left + x * w, y=top + y * h, button="left", clickCount=1)
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, **at)

    def close(self):
        with contextlib.suppress(OSError, AssertionError):
            self("Browser.close")
        self.process.wait(300)
        os.close(self.write), os.close(self.read)


@pytest.fixture
def browser(tmp_path):
    if not BROWSER:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    b = Browser(tmp_path / "profile")
    yield b
    b.close()
