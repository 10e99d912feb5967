"""
How long a person waits at the page of tools/demo: from Enter to the first point that is drawn, in a real browser,
beside what sample.Chat alone takes, for the same held-out toy image.

    python tests/time_demo.py out/small/sft/latest           # wants Chromium and data/toy; 20 times each
"""
import os
import statistics
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import lib  # noqa: E402, F401: before torch, which reads the environment that it sets
from conftest import BROWSER, Browser  # noqa: E402
from sample import Chat, load  # noqa: E402
from tools.demo.__main__ import Demo, read_examples  # noqa: E402

TIMES = 20


def alone(model, planner, paths, question):
    """Milliseconds until the first token and until the first point, asked without a page."""
    began = time.perf_counter()
    first = None
    text = ""
    for piece in Chat(model, planner, paths).ask(question):
        first = first or time.perf_counter() - began
        text += piece
        if ">" in text:
            return 1000 * first, 1000 * (time.perf_counter() - began)
    sys.exit(f"the answer to {question!r} has no point: {text!r}")


def at_the_page(browser, question):
    """Milliseconds from Enter to the frame that shows the first point."""
    browser.js("open(null); $('examples').firstChild.click()")
    browser.until("talk && pictures[0].naturalWidth")
    browser.js("{ delete window.shown;"
               "addEventListener('keydown', () => window.pressed = performance.now(), {capture: true, once: true});"
               "const look = () => { if (points().length) window.shown ??= performance.now(); };"
               "new MutationObserver(() => requestAnimationFrame(look)).observe($('points'), {childList: true});"
               "$('question').focus(); }")
    browser.key("Enter")
    browser.until("window.shown && !asking")
    return browser.js("shown - pressed")


def main():
    model, planner = load(sys.argv[1])
    examples = read_examples("data/toy")
    paths, (question, *_) = examples[0]
    alone(model, planner, paths, question)  # the first one warms up
    told = [alone(model, planner, paths, question) for _ in range(TIMES)]
    token, point = (statistics.median(values) for values in zip(*told))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as profile:
        server = Demo(sys.argv[1], model, planner, folder, examples)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = Browser(profile)
        browser.open(server.url)
        at_the_page(browser, question)
        page = statistics.median([at_the_page(browser, question) for _ in range(TIMES)])
        browser.close()
        server.shutdown()
    print(f"{question}  sample.Chat: first token {token:.0f} ms, first point {point:.0f} ms; the page: first point "
          f"drawn {page:.0f} ms after Enter; medians of {TIMES}")


if __name__ == "__main__":
    main() if BROWSER else sys.exit("needs Chromium")
