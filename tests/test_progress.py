"""lib/progress: what takes long says how far it is, once; what is quick says nothing."""
import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios

import pytest
import torch
from conftest import tiny_model, video

from data import Planner, decode
from lib import distributed
from lib import progress as module
from lib.progress import Bar, progress
from pretrain import Config, make_optimizers
from sample import Chat


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: clock[0] is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def go(clock, n, seconds, **options):
    """Through n items that take so many seconds each."""
    for _ in progress(range(n), "scenes drawn", **options):
        clock[0] += seconds


def test_one_line_after_two_seconds_and_none_for_what_is_quick(clock, capsys):
    go(clock, 1000, 0.0015)
    assert capsys.readouterr() == ("", "")
    go(clock, 4000, 0.25)
    assert capsys.readouterr() == ("", "scenes drawn: 8 of 4,000 after 2 s, about 998 s to go\n")
    go(clock, 1, 60)  # when it is done there is nothing to wait for
    go(clock, 9, 60, shown=False)
    assert capsys.readouterr() == ("", "")
    bar = Bar("crops encoded", 10)
    for _ in range(3):
        clock[0] += 1
        bar.update(3)
    bar.close()
    assert capsys.readouterr().err == "crops encoded: 6 of 10 after 2 s, about 1 s to go\n"


def test_a_bar_on_a_terminal(clock, monkeypatch):
    end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        go(clock, 30, 0.125)
    written = []
    with contextlib.suppress(OSError):  # where a terminal ends
        while True:
            written.append(os.read(end, 10_000))
    os.close(end)
    text = b"".join(written).decode()
    assert "scenes drawn: " in text and " 16/30 " in text and "after" not in text
    assert text.rstrip(" ").endswith("\r")  # and it goes when all is done


def test_items_stay_what_they_are_and_errors_pass():
    assert list(progress(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    with pytest.raises(ZeroDivisionError):
        list(progress((1 // k for k in (1, 0)), "numbers", 2))


def test_a_checkpoint_that_is_saved_or_read_tells_how_far_it_is(tmp_path, tokenizer, monkeypatch, capsys):
    """Beside its weights: the optimiser's state, and the sums of the files."""
    model = tiny_model()
    optimizers, names = make_optimizers(model, Config())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    n = len(distributed.optimizer_state(optimizers, names))
    saver = distributed.Saver(str(tmp_path), distributed.World("cpu"))
    final = str(tmp_path / "step_0000007")

    def told(do):
        monkeypatch.setattr(module, "PATIENCE", -1)  # so that all of it takes long
        do()
        monkeypatch.setattr(module, "PATIENCE", 60)
        return [line.split(" after ")[0] for line in capsys.readouterr().err.splitlines()]

    lines = told(lambda: (saver.save(7, model, tokenizer, optimizers, names, dict(config=dict(max_frames=8, tiles=0))),
                          saver.finish()))
    size = sum(path.stat().st_size for path in tmp_path.glob("step_0000007/**/*") if path.is_file())
    size -= os.path.getsize(final + "/COMPLETE")
    assert lines[:2] == [f"optimiser's tensors copied: 1 of {n}", f"optimiser's tensors of {final} written: 1 of {n}"]
    assert lines[-1].startswith(f"bytes of {final} summed: ") and lines[-1].endswith(f" of {size:,}")
    line, = told(lambda: distributed.damage(final))
    assert line.startswith(f"bytes of {final} summed: ") and line.endswith(f" of {size:,}")
    line, = told(lambda: distributed.load_optimizers(final, optimizers, names, distributed.World("cpu")))
    assert line == f"optimiser's tensors of {final} read: 1 of {n}"


def test_who_asks_about_a_long_video_sees_how_far_it_is_decoded(tmp_path, tokenizer, monkeypatch, capsys):
    model = tiny_model()
    planner = Planner(tokenizer, model.cfg, 400, max_frames=4)
    path = video(tmp_path / "clip.mp4")
    chat = Chat(model, planner, [path])
    monkeypatch.setattr(module, "PATIENCE", -1)
    list(chat.ask("What happens?", 1))
    assert f"frames of {path} decoded: 1 of 4 after 0 s" in capsys.readouterr().err
    plan = planner.question(chat.record, None, [dict(role="user", content="What happens?")])
    decode([plan], model.cfg, plan.n_tokens)  # as the workers of a training do, for whom nobody waits
    assert capsys.readouterr().err == ""
