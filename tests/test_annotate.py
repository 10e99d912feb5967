"""Making data: what servers are asked and what becomes of their answers, what filters let through, what the
page keeps and refuses, what training leaves out."""
import base64
import contextlib
import functools
import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import wave
from collections import Counter
from types import SimpleNamespace

import av
import numpy as np
import pytest
import requests
import torch
from PIL import Image
from conftest import QUICK, ROOT, log_of, picture, run, shared, tiny_model, video, write_lines

from tools.annotate import __main__ as annotate
from data import Dataset, Planner, Stream
from lib.records import parse_record
from tools.annotate.review import Reviewer, Work


ENV = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=ROOT)
ANNOTATE = [sys.executable, "-m", "tools.annotate"]


# ---- the page, in a browser --------------------------------------------------------------------------------

@contextlib.contextmanager
def reviewing(file):
    """The page's server for a file: yields (server, its address)."""
    server = Reviewer(str(file), "ann", 0)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def lines(tmp_path):
    """Two clips and a picture in a folder of data, with a secret beside it."""
    folder = tmp_path / "data"
    picture(folder / "wall.png", "red")
    video(folder / "grey.mp4")
    (tmp_path / "secret.mp4").write_bytes((folder / "grey.mp4").read_bytes())
    return write_lines(folder / "rows.jsonl", [
        dict(id="one", video="grey.mp4", duration=2.0, annotations=[
            dict(task="video_caption", answer="It gets lighter."),
            dict(task="video_qa", prompt="What gets lighter?", answer="All.")]),
        dict(id="two", video="grey.mp4", start=0.5, end=1.5, duration=2.0, annotations=[
            dict(task="video_qa", question="How light?", options=["dark", "light"], correct=0)]),
        dict(id="wall", image="wall.png", annotations=[dict(task="image_caption", answer="A wall.")])])


def said(file):
    with open(file.replace(".jsonl", ".work/decisions.jsonl")) as f:
        return [json.loads(line) for line in f]


def test_a_browser_accepts_edits_rejects_and_tracks_and_a_reload_keeps_it_all(browser, lines):
    """Who labels for an hour and closes the window must find all of it, and training must read it."""
    with reviewing(lines) as (server, url):
        browser.open(url)
        browser.key("a")  # the caption is right
        browser.until("$('f_answer')?.value === 'All.'")
        browser.key("e")
        browser.js("$('f_answer').value = ''")
        browser.click("f_answer")
        browser.type("The wall.")
        browser.key("Escape")
        browser.until("$('saved').textContent === 'saved'")
        browser.key("n")
        browser.until("location.hash.startsWith('#1/') && document.querySelector('input[type=radio]')")
        browser.key("r")
        browser.until("$('f_answer')?.value === 'A wall.'")
        browser.js("document.querySelectorAll('nav a')[0].click()")
        browser.until("$('f_answer')?.value === 'It gets lighter.'")
        browser.key("t")
        browser.until("document.activeElement.id === 'f_label'")
        browser.type("speck")
        browser.key("Escape")
        way = ((0.25, 0.5), (0.5, 0.5), (0.75, 0.25))
        for k, (x, y) in enumerate(way):  # a click goes on to the next moment
            browser.until(f"$('views').value == {k} && $('frame').complete && $('frame').naturalWidth")
            browser.click("frame", x, y)
            browser.until(f"$('form').textContent.includes('{k + 1} points')")
        browser.js("delete document.body.dataset.ready, location.reload()")
        browser.until("document.body?.dataset.ready === 'yes' && document.querySelectorAll('.mark').length")
        assert browser.js("$('f_label').value") == "speck"
        assert browser.js("$('count').textContent") == "4 of 5 decided"
        browser.js("document.querySelectorAll('nav a')[2].click()")
        browser.until("$('f_answer')?.value === 'A wall.'")
        browser.key("e")
        browser.until("document.activeElement.id === 'f_answer'")
        browser.type("All red. ")
        typed = browser.js("$('f_answer').value")
        browser("Page.navigate", url="about:blank")  # typed, and the window closed
        deadline = time.time() + 300
        while said(lines)[-1]["row"] != "wall" and time.time() < deadline:
            time.sleep(0.05)
        lines_now, n = server.work.finish()
    rows = [json.loads(line) for line in open(lines)]
    assert (lines_now, n) == (2, 4) and [r["id"] for r in rows] == ["one", "wall"]
    assert rows[1]["annotations"][0]["answer"] == typed and "All red." in typed
    caption, question, track = rows[0]["annotations"]
    assert caption["answer"] == "It gets lighter." and question["answer"] == "The wall."
    assert (track["task"], track["label"]) == ("video_tracking", "speck")
    assert [p["t"] for p in track["points"]] == [0, 0.5, 1]
    for p, (x, y) in zip(track["points"], way):
        assert abs(p["x"] - x) < 0.01 and abs(p["y"] - y) < 0.01  # a click lands on a whole pixel
    assert [d["verdict"] for d in said(lines)][:3] == ["accept", "edit", "reject"]
    assert all(d["who"] == "ann" and d["when"][:4].isdigit() for d in said(lines))
    assert parse_record(json.dumps(rows[0]).encode())
    assert rows[0]["provenance"][-1]["who"] == "ann"


# ---- the page's server -------------------------------------------------------------------------------------

def test_the_page_answers_this_machine_alone(lines, tmp_path):
    """A web site one visits, or a name that points here, must read neither the videos nor the decisions."""
    with reviewing(lines) as (server, url):
        port, rows = server.server_port, url + "rows"
        assert requests.get(rows).ok and requests.get(rows, headers={"Host": f"localhost:{port}"}).ok
        for name, value in (("Host", "evil.example"), ("Host", f"evil.example:{port}"), ("Origin", "null"),
                            ("Origin", "https://evil.example"), ("Origin", f"https://127.0.0.1:{port}"),
                            ("Sec-Fetch-Site", "cross-site")):
            for verb, path in (("GET", "rows"), ("GET", "picture?i=0&t=0"), ("POST", "decide")):
                r = requests.request(verb, url + path, headers={name: value}, json=dict(i=0))
                assert r.status_code == 403 and "for this machine" in r.text
        with pytest.raises(OSError):  # another address of this machine; all of 127.0.0.0/8 are its own
            socket.create_connection(("127.0.0.2", port), 2).close()
        assert not os.path.exists(lines.replace(".jsonl", ".work/decisions.jsonl"))


def test_no_file_outside_the_data_is_shown(lines):
    folder = os.path.dirname(lines)
    os.symlink("../secret.mp4", os.path.join(folder, "link.mp4"))
    rows = [json.loads(line) for line in open(lines)]
    names = ["../secret.mp4", "link.mp4", os.path.dirname(folder) + "/secret.mp4", "file:///etc/passwd"]
    write_lines(lines, [dict(rows[0], id=str(k), video=name) for k, name in enumerate(names)] + rows)
    with reviewing(lines) as (_, url):
        for i in range(len(names)):
            for path in (f"video?i={i}", f"picture?i={i}&t=0", f"row?i={i}"):
                r = requests.get(url + path)
                assert r.status_code == 422 and "media path" in r.json()["error"]
        for path in ("../secret.mp4", "%2e%2e/secret.mp4", "etc/passwd", "review.py", "video?i=99", "picture",
                     "video?i=x"):
            assert requests.get(url + path).status_code in (400, 404)
        part = requests.get(url + f"video?i={len(names)}", headers={"Range": "bytes=4-7"})
        assert part.status_code == 206 and part.content == b"ftyp"
        picture = Image.open(io.BytesIO(requests.get(url + f"picture?i={len(names)}&t=1.0").content))
        assert abs(np.asarray(picture).mean() - 100) < 4  # its tenth frame is of grey level 100


def test_decisions_are_checked_and_outlive_a_crash(lines):
    """What training could not read is refused with the reason; half a line, after a crash, harms nothing."""
    with reviewing(lines) as (server, url):
        row = requests.get(url + "row?i=0").json()
        key = row["annotations"][0]["key"]
        decide = lambda **d: requests.post(url + "decide", json=dict(dict(i=0, key=key), **d))
        outside = dict(task="video_tracking", label="x", points=[dict(t=0, x=1.5, y=0, id=0)])
        empty = dict(task="video_caption", answer="")
        for d, message in ((dict(verdict="edit", annotation=outside), "outside"),
                           (dict(verdict="edit", annotation=empty), "nothing is said"),
                           (dict(verdict="perhaps"), "verdict"),
                           (dict(verdict="accept", key="other"), "no annotation")):
            r = decide(**d)
            assert r.status_code == 422 and message in r.json()["error"]
        assert decide(verdict="reject").status_code == 200
        with open(server.work.log, "a") as f:
            f.write('{"row": "one", "key": "' + key + '", "verd')
        assert decide(verdict="accept").status_code == 200
    work = Work(lines)
    assert [d["verdict"] for d in work.decisions()["one"].values()] == ["accept"]
    assert work.finish() == (3, 4)


def test_closing_the_review_in_any_way_loses_nothing(lines, capsys, monkeypatch):
    """A signal ends it as Ctrl-C does; a session that was killed is made up for by the next one. Who only
    looks changes nothing, and nobody's own changes to the file are lost."""
    def look():
        def ctrl_c(server):
            raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(Reviewer, "serve_forever", ctrl_c)
            annotate.main(["review", lines, "--no-open"])
        return open(lines).read()

    before = open(lines).read()
    assert look() == before
    with reviewing(lines) as (_, url):  # and then it is not closed as it should be
        key = requests.get(url + "row?i=2").json()["annotations"][0]["key"]
        assert requests.post(url + "decide", json=dict(i=2, key=key, verdict="reject")).ok
    assert open(lines).read() == before and "wall" not in look()
    p = subprocess.Popen([*ANNOTATE, "review", lines, "--no-open", "--who", "eve"], text=True, env=ENV,
                         stdout=subprocess.PIPE)
    url = p.stdout.readline().split(": ")[1].split()[0]
    key = requests.get(url + "row?i=0").json()["annotations"][1]["key"]
    requests.post(url + "decide", json=dict(i=0, key=key, verdict="reject"))
    with pytest.raises(SystemExit) as e:  # a second page on its port
        annotate.main(["review", lines, "--no-open", "--port", url.split(":")[2].strip("/")])
    assert e.value.code == 2 and "--port" in capsys.readouterr().err
    p.terminate()
    assert "2 lines, 2 annotations" in p.communicate(timeout=300)[0] and p.returncode == 0
    assert [d["who"] for d in said(lines)] == ["ann", "eve"]
    with open(lines, "a") as f:  # by hand, with an editor
        f.write(json.dumps(dict(annotations=[dict(task="text", prompt="2 + 2?", answer="4")])) + "\n")
    with pytest.raises(SystemExit) as e:
        look()
    assert e.value.code == 2 and "is not what was last written here" in capsys.readouterr().err
    assert "2 + 2?" in open(lines).read()


@pytest.mark.parametrize("command, words", [
    ("caption FILE --frames 0", "argument --frames: 0: must be at least 1"),
    ("caption FILE --clip_seconds nan", "argument --clip_seconds: nan: must be at least 1"),
    ("caption FILE --concurrency 0", "argument --concurrency: 0: must be from 1 to 256"),
    ("caption FILE --timeout 0", "argument --timeout: 0: must be from 0.1 to 86400"),
    ("caption FILE --language xx", "argument --language: invalid choice: 'xx'"),
    ("caption nowhere.mp4", "nowhere.mp4: no such file"),
    ("caption /dev/null/../elsewhere", "elsewhere: no such file"),
    ("caption FILE --checkpoint nowhere", "nowhere/config.json: no such file"),
    ("caption FILE --url http://[::1/v1 --model m --licence l", "http://[::1/v1: not the URL of a server"),
    ("caption FILE --url http://localhost:70000/v1 --model m --licence l", "not the URL of a server"),
    ("caption FILE --url http://localhost:1/v1 --model m", "needs --model and --licence"),
    ("caption FILE --asr_url http://models.example/v1", "http://models.example/v1: only https"),
    ("qa FILE --sample 7", "argument --sample: 7: must be from 0 to 1"),
    ("qa FILE --questions few", "argument --questions: invalid int value: 'few'"),
    ("qa FILE", "rows.jsonl:4: wrong field: annotations must be"),
    ("qa FILE --out elsewhere/qa.jsonl", "must be another file in the folder of"),
    ("review FILE --port 70000", "argument --port: 70000: must be from 0 to 65535"),
    ("review FILE --no-open", "rows.jsonl:4: wrong field: annotations must be"),
    ("report FILE", "rows.jsonl:4: wrong field: annotations must be"),
    ("report nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("demo --clips 0", "argument --clips: 0: must be at least 1")])
def test_a_mistake_is_told_in_a_line_that_names_it(command, words, lines, capsys):
    """A traceback, or a message that names no flag and no line, leaves one guessing."""
    with open(lines, "a") as f:
        f.write('{"id": "half"}\n')
    name, *rest = [lines if word == "FILE" else word for word in command.split()]
    if name in ("caption", "qa"):
        rest += [] if "--out" in rest else ["--out", lines.replace("rows", "out")]
        rest += [] if "--url" in rest else ["--url", "stand-in"]
    with pytest.raises(SystemExit) as e:
        annotate.main([name, *rest])
    said = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and words in said[-1] and "error: " in said[-1]


# ---- servers of models -------------------------------------------------------------------------------------

class FakeModel(http.server.ThreadingHTTPServer):
    """A server of the OpenAI protocol. answer(step, body) gives the text of an answer, or (status, reply,
    headers), or None to keep the client waiting; every request is noted as (step, body)."""
    daemon_threads = True
    STEPS = {"This is the frame": "describe", "A person told": "merge", "A person said": "contradictions",
             "could the question": "ambiguous", "different questions": "questions",
             "Answer from this alone": "answerable", "You cannot see": "guessable",
             "Do they say the same": "agree"}

    def __init__(self, answer):
        self.answer, self.asked, self.over = answer, [], threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/audio/transcriptions":
                    step, body = "narration", raw
                else:
                    body = json.loads(raw)
                    text = body["messages"][0]["content"][0]["text"]
                    step = next(step for words, step in FakeModel.STEPS.items() if words in text)
                self.server.asked.append((step, body))
                said = self.server.answer(step, body)
                if said is None:
                    return self.server.over.wait(300)
                status, reply, headers = said if isinstance(said, tuple) else (200, chat(said), {})
                reply = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                for k, v in {**headers, "Content-Length": len(reply)}.items():
                    self.send_header(k, str(v))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


def chat(text, **more):
    choice = dict(message=dict(role="assistant", content=text), finish_reason="stop") | more
    return dict(model="open-vl", choices=[choice])


MERGED = "The wall is dark at first and gets lighter and lighter until it is of a pale grey."
ASKED = dict(question="What does the wall do?", answer="It gets lighter.", wrong=["It falls.", "It moves."])
USUAL = dict(describe="A grey wall.", merge=MERGED, contradictions="[]", ambiguous="false", guessable="blue",
             agree="false", answerable="it gets lighter", questions=f"Here they are: {json.dumps([ASKED])}")


@pytest.fixture
def model():
    servers = []

    def start(answer=lambda step, body: USUAL[step]):
        servers.append(FakeModel(answer))
        return servers[-1]
    yield start
    for s in servers:
        s.over.set()
        s.shutdown()
        s.server_close()


@pytest.fixture
def clips(tmp_path):
    """n narrated clips of 2 s in a folder."""
    def make(n):
        paths = []
        for i in range(n):
            paths.append(video(tmp_path / f"{i}.mp4", size=(48, 32 + 2 * i)))
            (tmp_path / f"{i}.srt").write_text(
                "1\n00:00:00,000 --> 00:00:01,000\nThe wall is dark\n\n"
                f"2\n00:00:01,000 --> 00:00:02,000\nand it gets lighter in clip {i}.\n")
        return paths
    return make


def flags(tmp_path, server, name="captions"):
    return ["--out", str(tmp_path / f"{name}.jsonl"), "--url", server.url, "--model", "open-vl",
            "--licence", "Apache-2.0"]


def all_rows(tmp_path, name="captions"):
    return [json.loads(line) for line in open(tmp_path / f"{name}.work" / "rows.jsonl")]


def test_what_a_server_is_asked_and_what_becomes_of_it(tmp_path, model, clips):
    """The prompts hold what was said and the pictures what was seen; the answers become lines that train."""
    server = model()
    annotate.main(["caption", *clips(1), *flags(tmp_path, server), "--narrator", "ann", "--frames", "3"])
    row, = map(parse_record, open(tmp_path / "captions.jsonl", "rb"))
    assert (row["video"], row["annotations"]) == ("0.mp4", [dict(task="video_caption", answer=MERGED)])
    looks = [body["messages"][0]["content"] for step, body in server.asked if step == "describe"]
    grey = []
    for content in looks:
        kind, data = content[1]["image_url"]["url"].split(",")
        assert kind == "data:image/jpeg;base64"
        grey.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean())
    assert [f["t"] for f in row["frames"]] == [0, 1, 1.9] and np.abs(np.array(grey) - (0, 100, 190)).max() < 4
    merge, = (body for step, body in server.asked if step == "merge")
    assert (merge["model"], merge["temperature"]) == ("open-vl", 0)
    text = merge["messages"][0]["content"][0]["text"]
    assert "The wall is dark and it gets lighter in clip 0." in text and "1 s: A grey wall." in text
    by = {p["step"]: p for p in row["provenance"]}
    assert by["narration"]["by"] == "people" and by["narration"]["who"] == "ann"
    for step in ("describe", "merge", "contradictions"):
        assert by[step]["model"] == "open-vl" and by[step]["licence"] == "Apache-2.0" and by[step]["prompt"]
        assert by[step]["date"][:4].isdigit() and "closed" not in by[step]

    annotate.main(["qa", str(tmp_path / "captions.jsonl"), *flags(tmp_path, server, "qa")])
    row, = map(parse_record, open(tmp_path / "qa.jsonl", "rb"))
    a, = row["annotations"]
    assert a["options"][a["correct"]] == "It gets lighter."
    assert sorted(a["options"]) == ["It falls.", "It gets lighter.", "It moves."]
    seen = {step: body["messages"][0]["content"][0]["text"] for step, body in server.asked}
    assert MERGED in seen["answerable"] and "- It falls." in seen["answerable"]
    assert MERGED not in seen["guessable"] and "- It falls." in seen["guessable"]


def test_every_failure_of_a_server_is_counted_and_asked_again_where_it_helps(tmp_path, model, clips, capsys):
    """A clip, a failure; the others are not held up, and a second run asks only for what had no answer."""
    once, lock = set(), threading.Lock()

    def first(key):
        with lock:
            return key not in once and not once.add(key)

    def answer(step, body):
        text = body["messages"][0]["content"][0]["text"]
        clip = int(text.split("in clip ")[1][0]) if "in clip " in text else None
        if step == "merge":
            if clip == 0 and first("timeout"):
                return None
            if clip == 1 and first(429):
                return 429, {}, {"Retry-After": "0"}
            if clip == 2 and first(500):
                return 500, {}, {}
            if clip == 7 and first("page"):
                return 200, b"<html>", {}
            return {3: "I'm sorry, but I cannot help with that.", 4: "",
                    6: (200, chat("so " * 9, finish_reason="length"), {})}.get(clip, USUAL[step])
        if step == "contradictions" and clip == 5:
            return "none, I think" if len(body["messages"]) == 1 else "[]"
        if step == "contradictions" and clip == 8:
            return '["clip 8"]'
        return USUAL[step]

    server, paths = model(answer), clips(9)
    command = ["caption", *paths, *flags(tmp_path, server)]
    annotate.main([*command, "--timeout", "2"])
    reasons = [row["annotations"][0].get("left_out") for row in all_rows(tmp_path)]
    assert reasons == [None, None, None, "merge: refusal", "merge: empty answer", None,
                       "merge: overlong answer", "merge: no answer of the protocol",
                       "check: narration and frames disagree"]
    assert "'merge: refusal': 1" in capsys.readouterr().out
    annotate.main(["report", str(tmp_path / "captions.jsonl")])
    page = (tmp_path / "captions.work" / "report.html").read_text()
    for what in ("merge: ReadTimeout, asked again", "merge: 429, asked again", "merge: 500, asked again",
                 "contradictions: invalid JSON, asked again", "merge: empty answer, asked again",
                 "merge: refusal", "merge: empty answer", "merge: overlong answer"):
        assert what in page
    before = len(server.asked)
    annotate.main(command)
    assert [step for step, _ in server.asked[before:]] == ["merge", "contradictions"]  # of clip 7 alone
    assert "left_out" not in all_rows(tmp_path)[7]["annotations"][0]


def test_what_is_no_text_and_what_is_too_deep_stops_nothing(tmp_path, model, clips):
    """Half a character, which JSON can spell and no file can hold; brackets without end."""
    def answer(step, body):
        clip = body["messages"][0]["content"][0]["text"].partition("in clip ")[2][:1]
        if step == "merge" and clip == "0":
            half = b'{"choices": [{"message": {"content": "%s \\ud83d"}}]}'
            return 200, half % MERGED.encode(), {}
        if step == "merge" and clip == "1":
            return 200, b"[" * 100_000, {}
        return "[" * 5000 + "]" * 5000 if step == "contradictions" and clip == "2" else USUAL[step]

    annotate.main(["caption", *clips(3), *flags(tmp_path, model(answer))])
    annotate.main(["report", str(tmp_path / "captions.jsonl")])
    row, = map(parse_record, open(tmp_path / "captions.jsonl", "rb"))
    assert row["annotations"][0]["answer"] == MERGED + " ?"
    assert [row["annotations"][0].get("left_out") for row in all_rows(tmp_path)] == [
        None, "merge: no answer of the protocol", "contradictions: invalid JSON"]


def test_refusals_and_truths_are_read_however_they_are_worded():
    chatted = lambda text: annotate.read_reply(chat(text))[1]
    for text in ("I'm sorry, but no.", "I\u2019m sorry.", "Sorry, I cannot.", "I can\u2019t help.",
                 "I cannot.", "I am not able to see it.", "As an AI, I see nothing.",
                 "Unfortunately, I have no access."):
        assert chatted(text) == "refusal"
    assert not any(map(chatted, ("I see a wall.", "A man says: sorry.", "Icant is a village.", "As an aim")))
    assert all(map(annotate.parse_bool, ("true", " True.", "```json\ntrue\n```", "**true**")))
    assert not any(map(annotate.parse_bool, ("false", "False.\n", "```\nfalse```")))
    for text in ("", "yes", "true or false", "not true", "untrue"):
        with pytest.raises(ValueError):
            annotate.parse_bool(text)


def test_a_question_that_goes_wrong_costs_no_other(tmp_path, model, clips):
    """Of each question, and of what is none, the reason is kept; another run asks nothing again."""
    more = [dict(question=f"What is on wall {k}?", answer=f"paint {k}", wrong=None) for k in range(5)]
    spaced = dict(ASKED, answer=" It gets lighter.", wrong=["It falls. ", "It moves."])
    proposed = [spaced, *more, "What?", dict(ASKED, answer=""), dict(ASKED, wrong=["it gets lighter. "])]

    def answer(step, body):
        text = body["messages"][0]["content"][0]["text"]
        k = text.partition("on wall ")[2][:1] if step != "questions" else ""
        wrong = {("ambiguous", "0"): "I cannot answer that.", ("ambiguous", "1"): "true",
                 ("answerable", "2"): "unknown", ("guessable", "3"): "Paint 3", ("guessable", "4"): ""}
        if step == "questions":
            return json.dumps(proposed)
        return wrong.get((step, k), f"paint {k}" if k and step == "answerable" else USUAL[step])

    server = model(answer)
    annotate.main(["caption", *clips(1), *flags(tmp_path, server)])
    for _ in range(2):
        annotate.main(["qa", str(tmp_path / "captions.jsonl"), *flags(tmp_path, server, "qa")])
        row, = all_rows(tmp_path, "qa")
        assert [a.get("left_out") for a in row["annotations"]] == 3 * ["questions: malformed"] + [
            None, "ambiguous: refusal", "ambiguous: several meanings", "unanswerable: not from the caption",
            "guessable: without looking", "guessable: empty answer"]
        assert sorted(row["annotations"][3]["options"]) == ["It falls.", "It gets lighter.", "It moves."]
        asked, server.asked = server.asked, []
    assert not asked


def test_a_server_that_is_gone_or_says_no_ends_it_with_one_line(tmp_path, model, clips, capsys, monkeypatch):
    paths = clips(1)
    for status in (401, 307):
        server = model(lambda step, body: (status, {"error": "no"}, {"Location": "/"}))
        with pytest.raises(SystemExit) as e:
            annotate.main(["caption", *paths, *flags(tmp_path, server)])
        error = capsys.readouterr().err
        assert e.value.code == 2 and f"status {status}" in error and error.count("\n") == 1
    monkeypatch.setattr(annotate, "patiently", functools.partial(annotate.patiently, pause=0.01))
    with pytest.raises(SystemExit) as e:
        annotate.main(["caption", *paths, *flags(tmp_path, model(lambda step, body: (503, {}, {})))])
    assert e.value.code == 2 and "1 annotations wait for a server" in capsys.readouterr().err


def test_a_run_killed_halfway_repeats_no_request_and_writes_the_same(tmp_path, model, clips):
    """kill -9 after 20 answers: paid answers are not paid for again."""
    paths, process = clips(6), None

    def answer(step, body):
        if process and len(server.asked) > 20:
            process.kill()
            return None
        return USUAL[step]

    server = model(answer)
    command = ["caption", *paths, *flags(tmp_path, server), "--concurrency", "3"]
    process = subprocess.Popen([*ANNOTATE, *command], env=ENV)
    assert process.wait(300) == -9 and not (tmp_path / "captions.jsonl").exists()
    kept = len([n for n in os.listdir(tmp_path / "captions.work" / "requests") if n.endswith(".json")])
    assert 15 <= kept <= 20
    process, before = None, len(server.asked)
    annotate.main(command)
    different = {json.dumps(body) for _, body in server.asked}
    assert len(server.asked) - before + kept == len(different)  # what was kept was not asked again
    resumed = (tmp_path / "captions.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "captions.work"), os.remove(tmp_path / "captions.jsonl")
    annotate.main(command)
    assert (tmp_path / "captions.jsonl").read_bytes() == resumed and resumed.count(b"\n") == 6


def sounding_video(path):
    """Six seconds of grey with a tone of half the loudness there is, 44,100 Hz in stereo."""
    with av.open(path, "w") as container:
        pictures = container.add_stream("mpeg4", rate=4)
        pictures.width, pictures.height, pictures.pix_fmt = 48, 32, "yuv420p"
        sound = container.add_stream("aac", rate=44100, layout="stereo")
        for i in range(24):
            grey = np.full((32, 48, 3), 10 * i, np.uint8)
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        tone = np.sin(np.arange(6 * 44100) / 20).astype(np.float32) / 2
        frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]), format="fltp", layout="stereo")
        frame.rate = 44100
        container.mux(sound.encode(frame))
        container.mux(pictures.encode() + sound.encode())
    return path


@pytest.mark.parametrize("beside", [True, False])
def test_speech_is_transcribed_and_cut_into_clips(tmp_path, model, beside):
    """A narration that is sound, beside the video or in it, goes to the server as a file; where it pauses the
    video is cut."""
    path = sounding_video(str(tmp_path / "a.mp4"))
    if beside:
        with wave.open(str(tmp_path / "a.wav"), "wb") as f:
            f.setnchannels(1), f.setsampwidth(2), f.setframerate(8000), f.writeframes(b"\0\1" * 800)
    segments = [dict(start=k * 2.0, end=k * 2 + 1.5, text=f" The wall is getting lighter in part {k}. ")
                for k in range(3)]
    spoken = 200, dict(text="", segments=segments), {}
    server = model(lambda step, body: spoken if step == "narration" else USUAL[step])
    annotate.main(["caption", path, *flags(tmp_path, server), "--asr_url", server.url,
                   "--asr_model", "whisper", "--clip_seconds", "4"])
    rows = all_rows(tmp_path)
    assert [(r["start"], r["end"], [s["text"][-7:] for s in r["narration"]]) for r in rows] == [
        (0.0, 4.0, ["part 0.", "part 1."]), (4.0, 6.0, ["part 2."])]
    form, = (body for step, body in server.asked if step == "narration")
    assert b"verbose_json" in form and b"whisper" in form
    if beside:
        assert (tmp_path / "a.wav").read_bytes() in form
    else:
        with wave.open(io.BytesIO(form[form.index(b"RIFF"):])) as f:
            assert (f.getnchannels(), f.getframerate()) == (1, 16000)
            assert abs(f.getnframes() / 16000 - 6) < 0.1
            heard = np.frombuffer(f.readframes(16000), np.int16)
        assert abs(np.abs(heard).max() / 2 ** 15 - 0.5) < 0.05
    assert [p["step"] for p in rows[0]["provenance"]][:2] == ["speech", "narration"]
    assert all(p["date"][:4].isdigit() for row in rows for p in row["provenance"])


@pytest.mark.parametrize("reply, left_out, said", [
    (dict(text=" It gets lighter and lighter. "), None, [(0, 6, "It gets lighter and lighter.")]),
    (dict(segments=[dict(start=None, end=float("nan"), text="It gets lighter and lighter."),
                    dict(start=7.0, end=8.0, text="After the end.")]), None,
     [(0, 6, "It gets lighter and lighter.")]),
    (dict(text=""), "narration: none", []),
    (dict(segments=[dict(start="soon", end=1, text="It")]), "narration: no answer of the protocol", None),
    (dict(text=None), "narration: no answer of the protocol", None)])
def test_what_a_server_of_speech_may_answer(tmp_path, model, reply, left_out, said):
    server = model(lambda step, body: (200, reply, {}) if step == "narration" else USUAL[step])
    annotate.main(["caption", sounding_video(str(tmp_path / "a.mp4")), *flags(tmp_path, server),
                   "--asr_url", server.url])
    row, = all_rows(tmp_path)
    assert row["annotations"][0].get("left_out") == left_out
    assert said is None or [(s["start"], s["end"], s["text"]) for s in row["narration"]] == said


def test_one_of_our_own_checkpoints_describes_frames(tmp_path, model, clips, tokenizer, monkeypatch, capsys):
    """Its words are in the merge prompt, its folder in the row; it is not asked twice, with or without a
    server for the rest."""
    weights = tiny_model()
    weights.save_pretrained(tmp_path / "mine")
    tokenizer.save(tmp_path / "mine")
    server = model()
    mine = str(tmp_path / "mine")
    annotate.main(["caption", *clips(1), *flags(tmp_path, server), "--checkpoint", mine, "--frames", "1"])
    row, = all_rows(tmp_path)
    step, body = server.asked[0]
    assert step == "merge" and row["frames"][0]["text"] in body["messages"][0]["content"][0]["text"]
    by, = (p for p in row["provenance"] if p["step"] == "describe")
    assert (by["model"], by["licence"]) == (mine, "as its weights") and by["prompt"] and by["date"]
    monkeypatch.setattr(annotate, "Chat", None)
    os.remove(tmp_path / "captions.jsonl")
    annotate.main(["caption", *clips(1), "--out", str(tmp_path / "captions.jsonl"), "--url", "stand-in",
                   "--checkpoint", mine, "--frames", "1"])
    again, = all_rows(tmp_path)
    assert again["frames"] == row["frames"] and by in again["provenance"]
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as e:
            annotate.main(["caption", *clips(1), "--out", str(tmp_path / "captions.jsonl"), "--url",
                           "stand-in", "--checkpoint", mine, "--device", "cuda"])
        assert e.value.code == 2 and "--device cuda" in capsys.readouterr().err


# ---- no distillation ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("url, name, words", [
    ("https://api.openai.com/v1", "some-model", "api.openai.com is a closed model's"),
    ("https://API.Anthropic.com./v1", "some-model", "api.anthropic.com is a closed"),
    ("https://x@mine.openai.azure.com/v1", "some-model", "mine.openai.azure.com is a closed"),
    ("https://bedrock-runtime.eu-west-1.amazonaws.com/v1", "some-model", "amazonaws.com is a closed"),
    ("https://generativelanguage.googleapis.com/v1beta/openai", "some-model", "googleapis.com is a closed"),
    ("http://localhost:1/v1", "openai/gpt-4o-mini", "model openai/gpt-4o-mini is a closed"),
    ("http://localhost:1/v1", "claude-x", "model claude-x is a closed"),
    ("http://localhost:1/v1", "qwen-vl-max", "model qwen-vl-max is a closed"),
    ("http://models.example/v1", "open-vl", "only https"), ("file:///etc/passwd", "open-vl", "not the URL")])
def test_closed_models_and_plain_http_are_refused_by_name(url, name, words, capsys, tmp_path, clips):
    with pytest.raises(SystemExit) as e:
        annotate.main(["caption", *clips(1), "--out", str(tmp_path / "c.jsonl"), "--url", url,
                       "--model", name, "--licence", "?"])
    error = capsys.readouterr().err
    assert e.value.code == 2 and words in error and error.count("\n") == 1


def test_open_models_are_not_refused():
    for url, name in (("http://localhost:8000/v1", "gpt-oss-120b"), ("http://[::1]:8000/v1", "gpt-2"),
                      ("https://api.openai.com.example/v1", "gpt-j"),
                      ("http://127.0.0.1:1/v1", "Qwen/Qwen3-VL-8B-Instruct"),
                      ("https://notopenai.com", "olmo3-7b")):
        assert not annotate.check_server(url, name, False)


def test_a_closed_model_behind_an_open_name_is_found_out_and_does_not_train(tmp_path, model, clips, capsys,
                                                                           tokenizer):
    """The reply names who spoke. Let through, its rows are marked; training leaves them out, counts them, and
    does not take them for broken."""
    server, paths = model(lambda step, body: (200, chat(USUAL[step]) | {"model": "gpt-4o"}, {})), clips(2)
    with pytest.raises(SystemExit):
        annotate.main(["caption", *paths, *flags(tmp_path, server)])
    assert "model gpt-4o is a closed model's" in capsys.readouterr().err
    assert not (tmp_path / "captions.work").exists()  # put right, the server is asked again
    annotate.main(["caption", *paths, *flags(tmp_path, server), "--allow_closed"])
    annotate.main(["caption", *paths, *flags(tmp_path, model(), "open")])
    # what is made of marked rows is marked
    annotate.main(["qa", str(tmp_path / "captions.jsonl"), *flags(tmp_path, model(), "qa")])
    for name, closed in (("captions", True), ("qa", True), ("open", False)):
        rows = [json.loads(line) for line in open(tmp_path / f"{name}.jsonl")]
        assert [any(p.get("closed") for p in row["provenance"]) for row in rows] == [closed, closed]

    files = [str(tmp_path / f"{name}.jsonl") for name in ("captions", "open")]
    text = run(tmp_path, *QUICK, "--steps", "2", "--workers", "0", "--data", *files)[1]
    assert "left out: {'captions': {'from a closed model': " in text
    log = [row for row in log_of(tmp_path) if "loss" in row]
    assert len(log) == 2 and not any(row["bad"] for row in log)

    planner = Planner(tokenizer, tiny_model().cfg, 400, max_frames=4)
    mixture, trained = [(Dataset("captions", files[:1]), 0.5), (Dataset("open", files[1:]), 0.5)], []
    for allowed in (False, True):
        sequences = Stream(mixture, planner, 0, allowed).sequences()
        trained.append({plan.ref[0] for _ in range(20) for plan in next(sequences).plans})
    assert trained == [{"open"}, {"captions", "open"}]


# ---- narrations, checks and filters ------------------------------------------------------------------------

def test_narrations_are_read_as_people_write_them(tmp_path):
    files = {"a.srt": "\ufeff1\r\n00:00:00,500 --> 00:00:01,250\r\n<i>One</i>\r\nline\r\n\r\n"
                      "2\r\n00:01:00,000 --> 00:02:00,000\r\nlate\r\n",
             "a.vtt": "WEBVTT\n\nNOTE mine\n\n00:00.500 --> 00:01.250 align:left\nOne line\n",
             "a.txt": "One\nline\n", "b.txt": " \n"}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    line = dict(start=0.5, end=1.25, text="One line")
    assert [annotate.read_narration(str(tmp_path / n), 10.0) for n in files] == [
        [line], [line], [dict(start=0.0, end=10.0, text="One line")], []]


YOUTUBE = """WEBVTT
Kind: captions

00:00:00.030 --> 00:00:01.000 align:start position:0%
 
here<00:00:00.319><c> is</c><00:00:00.530><c> a</c><c.colorE5E5E5> red &amp; round</c>

00:00:01.000 --> 00:00:01.010 align:start position:0%
here is a red &amp; round
 

00:00:01.010 --> 00:00:01.900 align:start position:0%
here is a red &amp; round
thing<00:00:01.200><c> No.</c>

00:00:01.900 --> 00:00:01.910 align:start position:0%
thing No.
 
"""
# written by hand: name -> (file, what is said when)
CAPTIONS = {
    "rolling": (YOUTUBE, [(0.03, 1.0, "here is a red & round"), (1.01, 1.9, "thing No.")]),
    "rolling, made .srt": (re.sub(r"<[^>]*>| align.*", "", YOUTUBE).replace(".", ",").replace("No,", "No."),
                           [(0.03, 1.0, "here is a red & round"), (1.01, 1.9, "thing No.")]),
    "said twice": ("1\n00:00:00,000 --> 00:00:01,000\nNo.\n\n2\n00:00:01,000 --> 00:00:02,000\nNo.\n",
                   [(0, 1, "No."), (1, 2, "No.")]),
    "a line again, later": ("00:01.000 --> 00:02.000\nNo.\n\n00:03.000 --> 00:04.000\nNo.\nWhy?\n",
                            [(1, 2, "No."), (3, 4, "No. Why?")]),
    "no blank lines": ("WEBVTT\n1\n00:00.000 --> 00:00.700\nOne.\n2\n00:01.000 --> 00:02.000\nIn 2\nlines.\n3\n"
                       "00:02:00.000 --> 00:03:00.000\nlate", [(0, 0.7, "One."), (1, 2, "In 2 lines.")]),
    "whole seconds": ("1\n00:00:00 --> 00:00:01\nOne.\n\n2\n0:02 --> 0:3\nTwo.", [(0, 1, "One."), (2, 3, "Two.")]),
    "dots and commas": ("1\n00:00:00.25 --> 00:00:01,5\nOne.", [(0.25, 1.5, "One.")]),
    "arrows and tags": ("1\n00:00:00,000 --> 00:00:01,000\n{\\an8}A <- B, 3 < 4 > 2, <b>bold</b> <v Ann>she</v> "
                        '<font color="red">x</font> a<b c>d.', [(0, 1, "A <- B, 3 < 4 > 2, bold she x a<b c>d.")]),
    "notes": ("WEBVTT\n\nSTYLE\n::cue {color: red}\n\nNOTE\n00:01 is late\n\nid\n00:01.000 --> 00:02.000\nOne.\n\n"
              "NOTE no\nno\n", [(1, 2, "One.")])}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_of_the_world_are_read_once_and_as_they_are_meant(tmp_path, name, encoding):
    text, said = CAPTIONS[name]
    for newline in ("\n", "\r\n"):
        (tmp_path / "a.srt").write_bytes(text.replace("\n", newline).encode(encoding))
        assert annotate.read_narration(str(tmp_path / "a.srt"), 10.0) == [
            dict(start=start, end=end, text=text) for start, end, text in said]


def test_a_narration_in_utf_16_of_either_order_and_as_plain_text(tmp_path):
    for mark, order in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        (tmp_path / "a.txt").write_bytes(mark + "Ein Stück\r\nRot.".encode(order))
        read, = annotate.read_narration(str(tmp_path / "a.txt"), 4.0)
        assert read == dict(start=0.0, end=4.0, text="Ein Stück Rot.")


RED = [(0, 0.7, "A red square is here."), (0.74, 1.9, "The screen gets brighter.")]
CASES = {"arrow.srt": [(0, 0.7, "A <- B and 3 < 4 > 2 here."), RED[1]], "utf16.srt": RED, "windows.srt": RED,
         "noblank.vtt": [RED[0], (0.74, 1.3, RED[1][2]), (1.38, 1.9, "Then it ends.")],
         "nomillis.srt": [(0, 1, RED[0][2]), (1, 2, RED[1][2])],
         "youtube.vtt": [(0.03, 1.0, "here is a red square"), (1.01, 1.9, "in the corner of the screen")]}


@pytest.mark.parametrize("name", CASES)
def test_the_narrations_among_the_cases(name):
    read = annotate.read_narration(shared("cases", "narration", name), 2.0)
    assert [(s["start"], s["end"], s["text"]) for s in read] == CASES[name]


def test_every_clip_lasts_whatever_was_said_at_once():
    """Two people who begin together must not make a clip of no length, which no one could train on."""
    said = [dict(start=a, end=b, text="") for a, b in ((5.0, 8.0), (0.0, 40.0), (0.0, 50.0), (50.0, 90.0))]
    clips = annotate.cut_clips(said, 100.0, 30.0)
    assert [(a, b, len(c)) for a, b, c in clips] == [(0, 50, 3), (50, 100, 1)]
    assert annotate.cut_clips([], 9.0, 30.0) == [(0, 9, [])]


@pytest.mark.parametrize("text, faults", [
    ("A man walks his dog along the river and then they both sit down on a bench.", []),
    ("Nice wall, tall windows, green shutters.", ["too short"]),
    (" ".join(f"wort{i}" for i in range(60)), ["not in en"]),
    ("the cat and the dog " * 8, ["repetition"]),
    ("Ein Mann geht mit seinem Hund auf der Straße und das ist nicht weit.", ["not in en"]),
    ("the " + " ".join(f"thing{i} in a" for i in range(500)), ["too long"])])
def test_captions_are_checked_for_length_repetition_and_language(text, faults):
    assert list(annotate.faults(text, 8, "en")) == faults


def test_yes_and_no_stay_few_and_options_are_shuffled_by_the_row():
    questions = [dict(question=f"Is thing{i} red?", answer="yes", wrong=[]) for i in range(4)]
    questions[1:1] = [dict(question=f"What is thing{i} made of?", answer=f"stuff{i}", wrong=["a", "b"])
                      for i in range(10, 13)]

    class Content:
        notes = {}

        def ask(self, step, **about):
            return questions if step == "questions" else False

        def answers(self, step, q, **known):
            return step == "answerable"

    args = annotate.parse(["qa", "x.jsonl", "--out", "y.jsonl", "--url", "stand-in"])
    row = dict(video="a.mp4", annotations=[dict(task="video_caption", answer="c")])
    make = lambda name: annotate.question_record(dict(row, id=name), args, Content())[0]["annotations"]
    assert [a.get("left_out", "")[:6] for a in make("r")] == ["", "", "", "", "yes/no", "yes/no", "yes/no"]
    assert make("r") == make("r")
    places = Counter(a["correct"] for k in range(40) for a in make(f"row {k}")[:3])
    assert sorted(places) == [0, 1, 2] and min(places.values()) > 20  # of 120


# ---- all of it ---------------------------------------------------------------------------------------------

def test_the_demo_runs_from_narration_to_training_and_the_page(tmp_path, monkeypatch, capsys):
    """What a visitor tries first, from a fresh clone, without a server."""
    opened, serve = [], Reviewer.serve_forever

    def train(command):
        assert command[:2] == [sys.executable, os.path.join(ROOT, "pretrain.py")]
        return SimpleNamespace(returncode=run(tmp_path, *command[2:])[0])

    def look(server):
        threading.Thread(target=serve, args=(server, 0.02), daemon=True).start()
        url, = opened
        assert "<title>review</title>" in requests.get(url).text
        assert len(requests.get(url + "rows").json()["rows"]) > 5
        server.shutdown()
        raise KeyboardInterrupt  # Ctrl-C
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(annotate.subprocess, "run", train)
    monkeypatch.setattr(annotate.webbrowser, "open", opened.append)
    monkeypatch.setattr(Reviewer, "serve_forever", look)
    annotate.main(["demo", "--clips", "15"])
    assert "reviewing out/annotate/qa.jsonl as" in (text := capsys.readouterr().out) and opened[0] in text
    folder = tmp_path / "out" / "annotate"
    for name in ("captions", "qa"):
        rows = [parse_record(line) for line in open(folder / f"{name}.jsonl", "rb")]
        by = {p["by"] for row in rows for p in row["provenance"]}
        assert 5 < len(rows) < 15 and by == {annotate.STAND_IN}
        page = (folder / f"{name}.work" / "report.html").read_text()
        assert "Yield of each step" in page and annotate.STAND_IN in page
        assert name == "qa" or "said: Ein Kreis und ein Stern" in page  # what a check turned away
    rows = all_rows(folder, "qa")
    assert sum("sample" in row for row in rows) == -(-len(rows) // 10)  # one in ten, for people to check
    reasons = {a.get("left_out", "kept").partition(":")[0] for row in rows for a in row["annotations"]}
    assert {"kept", "duplicate", "yes/no", "ambiguous", "unanswerable", "guessable"} <= reasons
    log = [json.loads(line) for line in open(folder / "run/small/pretrain/log.jsonl")]
    assert [row["step"] for row in log if "loss" in row] == [1, 2] and "eval" in log[-1]
