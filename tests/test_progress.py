"""lib/progress: what takes long says how far it is, once; what is quick says nothing."""
import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios

import pytest

from lib import progress as module
from lib.progress import Bar, progress


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
