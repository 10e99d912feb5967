"""Making data: what servers are asked and what becomes of their answers, what filters let through, what the page
keeps and refuses, what training leaves out."""
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from review import Reviewer

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell"))),
               None)


# ---- the page, in a browser ----------------------------------------------------------------------------------

class Browser:
    """A headless Chromium, spoken to over a pipe: JSON messages that end with a zero byte, on its fds 3 and 4."""

    def __init__(self, folder):
        to_browser, self.write = os.pipe()
        self.read, from_browser = os.pipe()

        def arrange():
            os.dup2(to_browser, 30), os.dup2(from_browser, 31)  # neither may be 3 or 4 before both are in place
            os.dup2(30, 3), os.dup2(31, 4)
        self.process = subprocess.Popen(
            [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
             "--disable-dev-shm-usage", f"--user-data-dir={folder}", "--window-size=1400,800", "about:blank"],
            preexec_fn=arrange, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser), os.close(from_browser)
        self.number, self.rest, self.session = 0, b"", None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __call__(self, method, **params):
        self.number += 1
        message = dict(id=self.number, method=method, params=params, **({"sessionId": self.session} if self.session else {}))
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = os.read(self.read, 1 << 20)
                assert part, "the browser ended"
                self.rest += part
            line, self.rest = self.rest.split(b"\0", 1)
            reply = json.loads(line)
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]

    def js(self, expression):
        """The value of an expression in the page, awaited."""
        r = self("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in r, r
        return r["result"].get("value")

    def until(self, expression):
        """Wait, in the page, until an expression is true."""
        self.js(f"new Promise((yes, no) => {{ const end = Date.now() + 15000, look = () => ({expression}) ? yes() : "
                f"Date.now() > end ? no(new Error('never: ' + {json.dumps(expression)})) : setTimeout(look, 20); look(); }})")

    def open(self, url):
        self("Page.navigate", url=url)
        self.until("document.body && document.body.dataset.ready === 'yes'")

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, **({"text": key} if len(key) == 1 and kind == "keyDown" else {}))

    def type(self, text):
        self("Input.insertText", text=text)

    def click(self, selector, x=0.5, y=0.5):
        """A real click at shares of an element's box."""
        box = self.js(f"(r => [r.left, r.top, r.width, r.height])(document.querySelector({selector!r}).getBoundingClientRect())")
        at = dict(x=box[0] + x * box[2], y=box[1] + y * box[3], button="left", clickCount=1)
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, **at)

    def close(self):
        with contextlib.suppress(OSError, AssertionError):
            self("Browser.close")
        self.process.wait(20)
        os.close(self.write), os.close(self.read)
