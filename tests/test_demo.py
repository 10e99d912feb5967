"""tools/demo: the page that answers. Its server without a browser, then the page in one."""
import base64
import contextlib
import html
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import requests
import torch
import torch.nn.functional as F
from conftest import ROOT, fast_start, picture, poison, tiny_model, video, write_lines
from PIL import Image

from data import Planner
from lib.draw import at_time, colour_of
from lib.media import load_frames
from lib.records import parse_record
from lib.text import SMALL_TOKENIZER, Tokenizer
from tools.demo import __main__ as demo

POINTS = "<point 0.25, 0.5, 0> <point 0.75, 0.25, 1>"
TRACK = "<point 0, 0.2, 0.5, 0> <point 1, 0.6, 0.5, 0> <point 1.5, 0.8, 0.25, 0>"
LIMITS = dict(temperature=0, length=99)


class Script(torch.nn.Module):
    """Stands in for lm_head: the model writes the texts that are put into it, a token each time the gate lets one
    through."""

    def __init__(self, tokenizer):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(tokenizer.vocab, 1))
        self.tokenizer = tokenizer
        self.ids = []
        self.gate = threading.Semaphore(0)

    def say(self, text, gate=10**6):
        """Text that comes next; gate: how many of its tokens may pass."""
        self.ids = [*self.tokenizer.encode(text, special=("<point",)), self.tokenizer.eos]
        self.gate = threading.Semaphore(gate)

    def upto(self, text):
        """How many tokens a text has."""
        return len(self.tokenizer.encode(text, special=("<point",)))

    def forward(self, x):
        assert self.gate.acquire(timeout=60)
        return F.one_hot(torch.tensor([self.ids.pop(0)]), len(self.weight)).float().reshape(*x.shape[:-1], -1)


@contextlib.contextmanager
def serving(folder, examples=()):
    """A demo of a tiny model: yields (server, its address); server.encoded counts how often media are encoded."""
    tokenizer = Tokenizer(SMALL_TOKENIZER, 1024)
    model = tiny_model()
    model.lm_head = Script(tokenizer)
    planner = Planner(tokenizer, model.cfg, 400, max_frames=4)
    uploads = folder / "uploads"
    uploads.mkdir()
    server = demo.Demo("out/small/sft/step_0000007", model, planner, str(uploads), examples)
    server.encoded = 0
    encode = model.vision_backbone.forward

    def counted(*args):
        server.encoded += 1
        return encode(*args)
    model.vision_backbone.forward = counted
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server, server.url
    server.shutdown()
    server.server_close()


@pytest.fixture
def served(tmp_path):
    with serving(tmp_path) as (server, url):
        yield server, url, tmp_path


def upload(url, *paths, **headers):
    """The reply to an upload of some files."""
    contents = []
    for path in paths:
        with open(path, "rb") as f:
            contents.append(f.read())
    files = json.dumps([[os.path.basename(path), len(data)] for path, data in zip(paths, contents)])
    return requests.post(url + "media", params=dict(files=files), data=b"".join(contents), headers=headers)


class Answer:
    """A question on its way: `next` gives the next line of the answer."""

    def __init__(self, url, talk, question, **limits):
        body = json.dumps(dict(talk=talk, question=question, **{**LIMITS, **limits}))
        address = url.split("/")[2]
        self.connection = http.client.HTTPConnection(address, timeout=60)
        self.connection.request("POST", "/ask", body, {"Content-Type": "application/json"})
        self.reply = self.connection.getresponse()

    def next(self):
        line = self.reply.readline()
        return json.loads(line) if line else None

    def rest(self):
        """All lines to the end."""
        lines = []
        while line := self.next():
            lines.append(line)
        return lines

    def close(self):
        self.reply.close()
        self.connection.close()


def ask(server, url, talk, question, text, **limits):
    """The turn at the end of an answer whose text is given."""
    server.model.lm_head.say(text)
    return Answer(url, talk, question, **limits).rest()[-1]


def until(condition):
    deadline = time.time() + 60
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


def has_ended(server):
    """Whether an answer has ended that nobody waits for. Each time it is let go on by a token: one that is on its way
    may come before the server hears that the page is closed."""
    server.model.lm_head.gate.release(1)
    time.sleep(0.1)
    return not server.line


def coloured(image, i):
    """(x, y) of the middle of what has the colour of an id in an image, or None. PIL."""
    near = np.abs(np.asarray(image.convert("RGB")).astype(int) - colour_of(i)).max(-1) < 12
    rows, columns = np.nonzero(near)
    return (columns.mean(), rows.mean()) if len(rows) > 20 else None


def seen_text(page):
    """The text of an HTML page, without its tags."""
    return html.unescape(re.sub("<[^>]*>", "", page.text))


# ---- the server --------------------------------------------------------------------------------------------

def test_points_come_while_the_answer_is_being_written(served):
    server, url, folder = served
    reply = upload(url, picture(folder / "wall.png", "gray"))
    talk = reply.json()["talk"]
    assert reply.json()["names"] == ["wall.png"] and reply.json()["times"] == []
    head = server.model.lm_head
    first = POINTS[:POINTS.index("> <") + 1]
    head.say(POINTS, gate=head.upto(first))
    answer = Answer(url, talk, "Point to the specks.")
    assert answer.reply.headers["Content-Type"] == "application/x-ndjson"
    lines = [answer.next()]
    assert lines == [dict(place=0)]
    while not lines[-1].get("points"):
        lines.append(answer.next())
    assert lines[-1]["points"] == [dict(x=0.25, y=0.5, id=0)]
    assert "".join(line.get("text", "") for line in lines).strip() == first
    assert head.ids  # the rest has not been written
    assert requests.get(url + "talk", dict(talk=talk)).json()["turns"][0]["answer"].strip() == first
    head.gate.release(99)
    lines += answer.rest()
    turn = lines.pop()
    assert sum((line.get("points", []) for line in lines), []) == turn["points"]
    assert turn["points"] == [dict(x=0.25, y=0.5, id=0), dict(x=0.75, y=0.25, id=1)]
    assert (turn["state"], turn["answer"], turn["question"]) == ("done", POINTS, "Point to the specks.")
    assert requests.get(url + "talk", dict(talk=talk)).json()["turns"] == [turn]  # what a reload shows


def test_media_are_encoded_once_and_later_questions_know_the_earlier_ones(served):
    server, url, folder = served
    talk = upload(url, picture(folder / "wall.png", "gray")).json()["talk"]
    assert ask(server, url, talk, "Where?", POINTS)["answer"] == POINTS and server.encoded == 1
    assert ask(server, url, talk, "Which colour?", "It is grey.")["answer"] == "It is grey." and server.encoded == 1
    said = [(m["role"], m["content"]) for m in server.talks[talk].chat.messages]
    assert said == [("user", "Where?"), ("assistant", POINTS), ("user", "Which colour?"), ("assistant", "It is grey.")]
    assert ask(server, url, talk, "Again?", "no " * 30, length=5)["answer"].count("no") < 6
    asked = []
    server.talks[talk].chat.ask = lambda *args, **more: asked.append((*args, more)) or ["It."]
    for _ in range(2):
        Answer(url, talk, "Hotter?", temperature=0.5, length=7).rest()
    (*first, one), (*second, another) = asked
    assert first == second == ["Hotter?", 7, 0.5] and one["seed"] != another["seed"]


def test_what_is_saved_and_what_the_model_saw(served):
    server, url, folder = served
    talk = upload(url, picture(folder / "my wall.png", "gray", size=(60, 48))).json()["talk"]
    ask(server, url, talk, "Point to the specks.", POINTS)
    query = dict(talk=talk, turn=0, k=0)
    reply = requests.get(url + "drawn", query)
    assert reply.headers["Content-Disposition"] == "attachment; filename=answer.png"
    drawn = Image.open(io.BytesIO(reply.content))
    for i, (x, y) in enumerate(((0.25, 0.5), (0.75, 0.25))):
        assert np.allclose(coloured(drawn, i), (x * drawn.width, y * drawn.height), atol=3)
    line = requests.get(url + "record", query).content
    record = parse_record(line)
    annotation, = record["annotations"]
    assert record["image"] == "my_wall.png" and record["provenance"][0]["by"] == "small/sft/step_0000007"
    assert (annotation["task"], annotation["label"], len(annotation["points"])) == ("image_pointing", "specks", 2)
    page = requests.get(url + "saw", query)
    assert "script-src" not in page.headers["Content-Security-Policy"] and "default-src 'none'" in page.headers[
        "Content-Security-Policy"]
    plan = server.talks[talk].plan([], "Point to the specks.")
    assert f"{plan.n_tokens} tokens, {plan.n_crops} crops" in page.text
    assert page.text.count("<img") == plan.n_crops and "<image> \u00d79" in seen_text(page)
    assert "Point to the specks." in seen_text(page)
    ask(server, url, talk, "And <b>now</b>?", "<script>alert(1)</script>")
    page = requests.get(url + "saw", dict(talk=talk, turn=1))
    assert "<b>" not in page.text and "And <b>now</b>?" in seen_text(page)
    assert "Point to the specks." in seen_text(page)  # the talk so far


def test_a_video_plays_as_frames_and_is_saved_with_its_track(served, monkeypatch):
    server, url, folder = served
    decoded = []  # how many frames at a time
    monkeypatch.setattr(demo, "load_frames", lambda path, times, keep: decoded.append(len(times)) or load_frames(
        path, times, keep))
    monkeypatch.setattr(demo, "CHUNK", 6)
    told = upload(url, video(folder / "clip.mp4")).json()  # frame k is of grey level 10 k, at k / 10 s
    assert len(told["times"]) == 21 and told["times"][5] == 0.5
    for k in (0, 7, 6, 19):
        reply = requests.get(url + "frame", dict(talk=told["talk"], k=k))
        assert reply.headers["Content-Type"] == "image/jpeg"
        assert abs(np.asarray(Image.open(io.BytesIO(reply.content))).mean() - 10 * k) < 4
    assert decoded == [6, 6, 3]
    for k in (-1, 21, 10**9, "x"):
        assert requests.get(url + "frame", dict(talk=told["talk"], k=k)).status_code == 400
    turn = ask(server, url, told["talk"], "Track the dot.", TRACK)
    assert [p["t"] for p in turn["points"]] == [0, 1, 1.5]
    query = dict(talk=told["talk"], turn=0, k=0)
    reply = requests.get(url + "drawn", query)
    (folder / "out.mp4").write_bytes(reply.content)
    frame, = load_frames(str(folder / "out.mp4"), [1.0])
    assert reply.headers["Content-Disposition"].endswith("=answer.mp4") and len(frame) == 416
    red = (frame[..., 0].astype(int) - frame[..., 1] > 80).nonzero()
    assert abs(red[1].mean() / frame.shape[1] - 0.5) < 0.15  # the dot at 0.6, its trail from 0.2
    assert parse_record(requests.get(url + "record", query).content)["annotations"][0]["task"] == "video_tracking"
    page = requests.get(url + "saw", query).text
    assert page.count("<img") == 4 and "0.00 s" in page and "2.00 s" in page


def test_several_images_are_one_talk(served):
    server, url, folder = served
    paths = [picture(folder / "a.png", "red"), picture(folder / "b" / "a.png", "blue")]
    told = upload(url, *paths).json()
    assert told["names"] == ["a.png", "a.png"]
    blue = Image.open(io.BytesIO(requests.get(url + "frame", dict(talk=told["talk"], k=1)).content))
    assert np.asarray(blue).mean((0, 1))[2] > 240
    turn = ask(server, url, told["talk"], "Point to the specks.", "<point 1, 0.5, 0.25, 0>")
    assert turn["points"] == [dict(image=1, x=0.5, y=0.25, id=0)]
    query = dict(talk=told["talk"], turn=0)
    plain, marked = (Image.open(io.BytesIO(requests.get(url + "drawn", dict(query, k=k)).content)) for k in (0, 1))
    assert np.asarray(plain)[150:].std((0, 1)).max() < 1 and np.asarray(marked)[150:].std((0, 1)).max() > 5
    record = parse_record(requests.get(url + "record", query).content)
    assert record["images"] == ["a.png", "a.png"] and record["annotations"] == [dict(
        task="multi_image_pointing", prompt="Point to the specks.", label="specks", points=turn["points"])]
    turn = ask(server, url, told["talk"], "And?", "<point 2, 0.5, 0.25, 0>")  # there is no third image
    assert turn["points"] == []
    record = parse_record(requests.get(url + "record", dict(query, turn=1)).content)
    assert record["annotations"] == [dict(task="multi_image_qa", prompt="And?", answer=turn["answer"])]


def test_who_closes_the_page_ends_the_answer(served):
    """A tab that is gone must not keep the model from the others; what had come stays in the talk."""
    server, url, folder = served
    talk = upload(url, picture(folder / "wall.png", "gray")).json()["talk"]
    head = server.model.lm_head
    head.say("one two three four five six seven" * 9, gate=3)
    answer = Answer(url, talk, "Count.")
    while not answer.next().get("text"):
        pass
    answer.close()
    until(lambda: has_ended(server))
    head.gate.release(99)
    assert len(head.ids) > 20
    turn, = requests.get(url + "talk", dict(talk=talk)).json()["turns"]
    assert turn["state"] == "stopped" and "one".startswith(turn["answer"][:3])
    assert server.talks[talk].chat.messages[-1]["content"].startswith(turn["answer"])
    assert ask(server, url, talk, "And now?", "yes")["answer"] == "yes"


def test_questions_wait_in_line_and_see_their_place(served):
    server, url, folder = served
    talks = [upload(url, picture(folder / f"{k}.png", "gray")).json()["talk"] for k in range(3)]
    head = server.model.lm_head
    head.say("first", gate=0)
    first = Answer(url, talks[0], "1?")
    assert first.next() == dict(place=0)
    second = Answer(url, talks[1], "2?")
    assert second.next() == dict(place=1)
    third = Answer(url, talks[2], "3?")
    assert third.next() == dict(place=2)
    fourth = Answer(url, talks[1], "4?")
    assert fourth.next() == dict(place=3)
    second.close()  # who leaves makes room
    assert third.next() == dict(place=1) and fourth.next() == dict(place=2)
    fourth.close()
    until(lambda: len(server.line) == 2)
    n = len(head.ids)
    head.ids += [*head.tokenizer.encode("third"), head.tokenizer.eos]
    head.gate.release(n)
    assert first.rest()[-1]["answer"] == "first"
    assert third.next() == dict(place=0)
    head.gate.release(99)
    assert third.rest()[-1]["answer"] == "third"
    turns = [requests.get(url + "talk", dict(talk=talk)).json()["turns"] for talk in talks]
    assert [len(t) for t in turns] == [1, 0, 1]


# ---- what is refused ---------------------------------------------------------------------------------------

def test_the_demo_answers_this_machine_alone(served):
    server, url, folder = served
    talk = upload(url, picture(folder / "wall.png", "gray")).json()["talk"]
    port = server.server_port
    for name, value in (("Host", "evil.example"), ("Host", f"evil.example:{port}"), ("Host", "127.0.0.1"),
                        ("Origin", "null"), ("Origin", "https://evil.example"), ("Origin", f"https://127.0.0.1:{port}"),
                        ("Sec-Fetch-Site", "cross-site")):
        for verb, path in (("GET", ""), ("GET", f"talk?talk={talk}"), ("GET", f"frame?talk={talk}&k=0"),
                           ("POST", "media?files=[]"), ("POST", "ask"), ("POST", "example")):
            reply = requests.request(verb, url + path, headers={name: value}, json={})
            assert reply.status_code == 403 and "for this machine alone" in reply.json()["error"]
    with pytest.raises(OSError):  # another address of this machine
        socket.create_connection(("127.0.0.2", port), 2).close()
    assert requests.get(url, headers={"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}).ok
    form = requests.post(url + "ask", data=json.dumps(dict(talk=talk, question="Hm?", **LIMITS)),
                         headers={"Content-Type": "text/plain"})  # what a page elsewhere could send without asking
    assert form.status_code == 400
    policy = requests.get(url).headers["Content-Security-Policy"]
    assert "script-src 'sha256-" in policy and "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    ask(server, url, talk, "So?", "yes")
    for path in ("", f"talk?talk={talk}", f"frame?talk={talk}&k=0", f"saw?talk={talk}&turn=0", "nothing"):
        headers = requests.get(url + path).headers
        assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


def test_nothing_else_of_the_disk_is_served(served):
    server, url, folder = served
    (folder / "secret.txt").write_text("hidden words")
    talk = upload(url, picture(folder / "wall.png", "gray")).json()["talk"]
    for path in ("../secret.txt", "%2e%2e/secret.txt", "etc/passwd", "demo.html", "__main__.py", "uploads/",
                 "frame", "frame?k=0", "frame?talk=../..&k=0", f"frame?talk={talk}&k=1", "talk?talk=",
                 f"saw?talk={talk}&turn=0", f"drawn?talk={talk}&turn=../..&k=0", "thumbnail?k=0", "thumbnail?k=-1"):
        connection = http.client.HTTPConnection(f"127.0.0.1:{server.server_port}", timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/" + path)  # requests would tidy up the path
            reply = connection.getresponse()
            assert reply.status in (400, 404, 422) and b"hidden" not in reply.read(), path
    for name in ("../../evil.png", "/etc/evil.png", "..", "a/b\\c.png", "\0.png", "x" * 300 + ".png"):
        with open(folder / "wall.png", "rb") as f:
            data = f.read()
        reply = requests.post(url + "media", params=dict(files=json.dumps([[name, len(data)]])), data=data)
        assert reply.ok, reply.text
        talk = reply.json()["talk"]
        path, = server.talks[talk].paths
        assert os.path.realpath(path).startswith(os.path.realpath(server.folder) + os.sep)
        assert re.fullmatch(r"\w[\w.-]*", os.path.basename(path)) and len(talk) == 16  # nobody guesses it


def test_broken_media_are_refused_in_words_and_leave_nothing(served):
    """Playlists dressed as videos, bombs, cut files: all that data files are checked for."""
    server, url, folder = served
    poison(folder)
    whole = {"good.png", "good.jpg", "good.mp4", "fast.mp4", "picture.mp4"}  # the last one is a PNG: nothing is wrong
    later = {"cut.mp4", "flat.mp4"}  # are whole where their first frames are
    refused = 0
    for name in sorted(os.listdir(folder / "media")):
        path = folder / "media" / name
        if not path.is_file() or path.is_symlink():
            continue
        reply = upload(url, path)
        if reply.ok:
            assert name in whole | later
            continue
        refused += 1
        words = reply.json()["error"]
        assert reply.status_code == 422 and words.startswith(name) and str(folder) not in words, words
    assert refused > 30 and len(os.listdir(server.folder)) == len(server.talks) <= 7
    playlist = upload(url, folder / "media" / "m3u8.mp4").json()["error"]
    assert playlist.startswith("m3u8.mp4: neither an image nor a video that can be read")
    mixed = upload(url, folder / "media" / "good.mp4", folder / "media" / "good.png")
    assert mixed.status_code == 422 and "a video is asked about alone" in mixed.json()["error"]
    many = upload(url, *[folder / "media" / "good.png"] * 40)
    assert many.status_code == 422 and "the model reads 400" in many.json()["error"]
    talk = upload(url, folder / "media" / "good.png").json()["talk"]
    assert ask(server, url, talk, "So?", "yes")["answer"] == "yes"


def test_a_video_that_breaks_further_on_costs_its_own_question(served):
    server, url, folder = served
    fast_start(folder / "whole.mp4")
    data = (folder / "whole.mp4").read_bytes()
    (folder / "flat.mp4").write_bytes(data[:len(data) // 2] + bytes(len(data) // 2))
    talk = upload(url, folder / "flat.mp4").json()["talk"]
    turn = ask(server, url, talk, "What?", "nothing")
    assert turn["state"] == "error" and turn["error"].startswith("flat.mp4: ") and not server.line
    assert server.talks[talk].chat.messages == []


def test_too_much_is_refused_before_it_is_read(served, monkeypatch):
    server, url, folder = served
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=60)
    connection.putrequest("POST", "/media?files=%5B%5B%22a.mp4%22%2C3000000000%5D%5D")
    connection.putheader("Content-Length", "3000000000")
    connection.endheaders()  # and no body
    reply = connection.getresponse()
    assert reply.status == 422 and "2,861 MB are sent; at most 200 MB are taken" in reply.read().decode()
    assert os.listdir(server.folder) == []
    connection.close()
    for sizes in ((9,), (11,), (20, -10), ()):  # of a body of 10 bytes
        files = json.dumps([[f"{k}.png", size] for k, size in enumerate(sizes)])
        reply = requests.post(url + "media", params=dict(files=files), data=bytes(10), timeout=30)
        assert reply.status_code == 400 and "not as long as the body" in reply.text and not os.listdir(server.folder)
    path = picture(folder / "wall.png", "gray", size=(200, 200))
    size = os.path.getsize(path)
    monkeypatch.setattr(demo, "UPLOADS", 2 * size)
    talks = [upload(url, path).json()["talk"] for _ in range(3)]  # the oldest one makes room
    assert list(server.talks) == talks[1:]
    assert len(os.listdir(server.folder)) == 2
    requests.get(url + "talk", dict(talk=talks[1]))  # used last, it stays the longest
    talks.append(upload(url, path).json()["talk"])
    assert list(server.talks) == [talks[1], talks[3]]
    gone = requests.get(url + "talk", dict(talk=talks[0]))
    assert gone.status_code == 422 and "this conversation is gone" in gone.json()["error"]
    monkeypatch.setattr(demo, "TALKS", 1)
    newest = upload(url, path).json()["talk"]
    assert list(server.talks) == [newest] and len(os.listdir(server.folder)) == 1


def test_an_upload_that_breaks_off_leaves_nothing(served):
    server, url, folder = served
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        head = f"POST /media?files=[[%22a.png%22,1000]] HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
        connection.sendall((head + "Content-Length: 1000\r\n\r\n").encode() + bytes(10))
        until(lambda: os.listdir(server.folder))
    until(lambda: not os.listdir(server.folder))


@pytest.mark.parametrize("change, status, words", [
    (dict(question="  "), 422, "a question may not be empty"),
    (dict(question="\ud800"), 400, "surrogates not allowed"),
    (dict(question=5), 400, ""),
    (dict(temperature=11), 422, "temperature be from 0 to 10"),
    (dict(temperature=float("nan")), 422, "temperature be from 0 to 10"),
    (dict(length=0), 422, "length from 1 to 8192"),
    (dict(length=1e999), 400, ""),
    (dict(talk="nobody"), 422, "this conversation is gone"),
    (dict(talk=None), 422, "this conversation is gone"),
    (dict(talk=[]), 400, ""),
])
def test_a_question_that_cannot_be_asked(served, change, status, words):
    server, url, folder = served
    talk = upload(url, picture(folder / "wall.png", "gray")).json()["talk"]
    body = json.dumps({**dict(talk=talk, question="Hm?"), **LIMITS, **change})
    reply = requests.post(url + "ask", data=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == status and words in reply.json()["error"], reply.text
    assert not server.line


def test_a_question_that_is_too_long_is_told_and_the_talk_goes_on(served):
    server, url, folder = served
    talk = upload(url, picture(folder / "wall.png", "gray")).json()["talk"]
    turn = ask(server, url, talk, "so " * 500, "nothing")
    assert turn["state"] == "error" and "question too long" in turn["error"]
    assert ask(server, url, talk, "So?", "yes")["answer"] == "yes"


# ---- the command -------------------------------------------------------------------------------------------

def test_examples_are_the_held_out_part_of_the_toy_world(tmp_path):
    point = dict(task="image_pointing", prompt="Where is it?", label="it", points=[dict(x=0.5, y=0.5, id=0)])
    os.makedirs(tmp_path / "toy/eval")
    os.makedirs(tmp_path / "toy/clips/eval/video")
    picture(tmp_path / "toy/eval/images/0.png", "red")
    video(tmp_path / "toy/clips/eval/video/0.mp4")
    write_lines(tmp_path / "toy/eval/scenes.jsonl", [dict(image="images/0.png", annotations=[
        dict(task="image_caption", prompt="What is it?", answer="A wall."), point])])
    write_lines(tmp_path / "toy/eval/pairs.jsonl", [dict(images=["images/0.png"] * 2, annotations=[
        dict(task="multi_image_qa", prompt="Which?", answer="Both.")])])
    for name, prompt in (("tracks", "Track it."), ("clips", "What happens?")):
        write_lines(tmp_path / f"toy/clips/eval/{name}.jsonl", [dict(video="video/0.mp4", annotations=[
            dict(task="video_qa", prompt=prompt, answer="It.")])])
    examples = demo.read_examples(str(tmp_path / "toy"))
    assert [prompts for _, prompts in examples] == [["Where is it?", "What is it?"], ["Track it.", "What happens?"],
                                                    ["Which?"]]
    assert demo.read_examples(str(tmp_path / "nowhere")) == []
    with serving(tmp_path, examples) as (server, url):
        start = requests.get(url + "start").json()
        assert start["checkpoint"] == "small/sft/step_0000007"
        assert start["examples"][1] == dict(name="0.mp4", prompt="Track it.")
        for k in range(3):
            assert Image.open(io.BytesIO(requests.get(url + "thumbnail", dict(k=k)).content)).width >= 30
            told = requests.post(url + "example", json=dict(k=k)).json()
            assert told["prompts"] == examples[k][1]
        assert len(told["names"]) == 2
        for k in (3, -9, "0", None):
            assert requests.post(url + "example", json=dict(k=k)).status_code == 400
    assert os.path.exists(tmp_path / "toy/eval/images/0.png")  # examples are no uploads


def test_the_command_prints_its_address_and_leaves_nothing_behind(tmp_path):
    model = tiny_model()
    os.makedirs(tmp_path / "checkpoint")
    model.save_pretrained(str(tmp_path / "checkpoint"))
    with open(SMALL_TOKENIZER, "rb") as f:
        (tmp_path / "checkpoint" / "tokenizer.json").write_bytes(f.read())
    (tmp_path / "tmp").mkdir()
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=ROOT, TMPDIR=str(tmp_path / "tmp"))
    command = [sys.executable, "-m", "tools.demo", "checkpoint"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    line = process.stdout.readline()
    assert line.startswith("checkpoint answers at http://127.0.0.1:"), line + process.stdout.read()
    url = line.split()[3]
    talk = upload(url, picture(tmp_path / "wall.png", "gray")).json()["talk"]
    lines = Answer(url, talk, "What is it?", length=4).rest()
    assert lines[-1]["state"] == "done" and list(tmp_path.glob("tmp/nanomolmo2-*/*/0/wall.png"))
    process.terminate()
    assert process.wait(60) == 0 and not list(tmp_path.glob("tmp/nanomolmo2-*"))


def test_a_mistake_in_the_command_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tools.demo", str(tmp_path / "nowhere")])
    monkeypatch.setattr("signal.signal", lambda *a: None)
    with pytest.raises(SystemExit) as e:
        demo.main()
    assert e.value.code == 2 and "nowhere" in capsys.readouterr().err
    with serving(tmp_path) as (server, _), pytest.raises(demo.UserError, match="--port .*in use"):
        demo.Demo("", server.model, server.planner, "", port=server.server_port)


# ---- the page, in a browser --------------------------------------------------------------------------------

def drop(browser, path):
    """Drop a file onto the page."""
    with open(path, "rb") as f:
        data = base64.b64encode(f.read()).decode()
    browser.js(f"""(async () => {{
        const bytes = Uint8Array.from(atob({data!r}), letter => letter.charCodeAt(0));
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([bytes], {os.path.basename(path)!r}));
        dispatchEvent(new DragEvent("drop", {{dataTransfer, cancelable: true}}));
    }})()""")
    browser.until("talk && pictures.every(picture => picture.naturalWidth)")


def seen(browser, i):
    """Where the colour of an id is on the screen, in shares of the canvas, and the size of the canvas."""
    left, top, width, height = browser.js("(r => [r.left, r.top, r.width, r.height])"
                                          "(document.querySelector('canvas').getBoundingClientRect())")
    screen = Image.open(io.BytesIO(base64.b64decode(browser("Page.captureScreenshot")["data"])))
    middle = coloured(screen.crop((round(left), round(top), round(left + width), round(top + height))), i)
    return middle and np.array(middle), np.array([width, height])


def on_screen(browser, i, x, y):
    """Wait until the colour of an id is within 3 pixels of where it belongs: what is drawn is shown a frame later."""
    for _ in range(100):
        middle, size = seen(browser, i)
        if middle is not None and np.abs(middle - size * (x, y)).max() < 3:
            return
        time.sleep(0.1)
    raise AssertionError((middle, size * (x, y)))


def pixel(browser, x, y, canvas=0):
    """The colour of a canvas at a place, in shares of its sides."""
    return np.array(browser.js(f"""(c => [...c.getContext("2d").getImageData(
        {x} * c.width, {y} * c.height, 1, 1).data])(document.querySelectorAll("canvas")[{canvas}])""")[:3])


# [selector, background, colour] of what is to be read; the background is that of the nearest ancestor that has one.
COLOURS = """["body", ".soft", ".bad", ".question", ".answer", ".tools", "#ask", "#new", "#question", ".tools a",
    "#points button"].map(name => {
        const element = document.querySelector(name);
        let under = element;
        while (getComputedStyle(under).backgroundColor === "rgba(0, 0, 0, 0)") under = under.parentElement;
        return [name, getComputedStyle(under).backgroundColor, getComputedStyle(element).color];
    })"""


def luminance(colour):
    """Relative luminance, of WCAG, of "rgb(r, g, b)"."""
    shares = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return np.dot(linear, (0.2126, 0.7152, 0.0722))


def question(browser, text):
    browser.js("$('question').value = ''; $('question').focus()")
    browser.type(text)
    browser.key("Enter")


def test_a_person_drops_asks_stops_reloads_and_goes_on(browser, served):
    server, url, folder = served
    head = server.model.lm_head
    browser.open(url)
    drop(browser, picture(folder / "wall.png", "gray", size=(120, 96)))
    head.say(POINTS, gate=head.upto(POINTS[:POINTS.index("> <") + 1]))
    question(browser, "Point to the specks.")
    browser.until("$('points').children.length === 1")  # while the answer is on its way
    assert browser.js("asking !== null && talk.turns[0].state === ''") and head.ids
    on_screen(browser, 0, 0.25, 0.5)
    assert seen(browser, 1)[0] is None
    head.gate.release(99)
    browser.until("!asking && $('points').children.length === 2")
    on_screen(browser, 1, 0.75, 0.25)
    assert browser.js("document.querySelector('.answer').textContent") == POINTS
    # a second question, while another browser has the model; then it is stopped
    other = upload(url, folder / "wall.png").json()["talk"]
    head.say("first", gate=0)
    first = Answer(url, other, "1?")
    assert first.next() == dict(place=0)
    question(browser, "<img src=x onerror=alert(1)>")
    browser.until("document.body.textContent.includes('1 before it in line')")
    n = len(head.ids)
    head.ids += [*head.tokenizer.encode("<b>bold</b>" + " and so on" * 20), head.tokenizer.eos]
    head.gate.release(n)
    assert first.rest()[-1]["answer"] == "first"
    head.gate.release(6)
    browser.until("document.querySelectorAll('.answer')[1].textContent.startsWith('<b>b')")
    assert server.encoded == 2  # one each
    browser.key("Escape")
    browser.until("!asking && document.querySelectorAll('.tools')[1].textContent.includes('stopped')")

    until(lambda: has_ended(server))
    assert head.ids
    head.ids.clear()
    browser.js("delete document.body.dataset.ready, location.reload()")
    browser.until("document.body?.dataset.ready === 'yes' && talk?.turns.length === 2 && pictures[0].naturalWidth")
    texts = browser.js("[...document.querySelectorAll('.question, .answer')].map(e => e.textContent)")
    assert texts[:3] == ["Point to the specks.", POINTS, "<img src=x onerror=alert(1)>"] and texts[3].startswith("<b>b")
    assert not browser.js("document.querySelector('#turns b, #turns img')")
    browser.js("document.querySelectorAll('.answer')[0].click()")
    on_screen(browser, 0, 0.25, 0.5)
    saw = browser.js("document.querySelector('.tools a[target]').href")
    assert "2 crops" in requests.get(saw).text or "1 crops" in requests.get(saw).text
    (folder / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    browser.js("upload([new File(['#EXTM3U'], 'list.mp4')])")
    browser.until("$('message').textContent.includes('list.mp4: neither an image nor a video')")
    browser.js("upload([{size: 3e9, name: 'long.mp4'}])")
    browser.until("$('message').textContent.includes('2861 MB are too much: at most 200 MB')")


def test_a_clip_plays_with_its_track_drawn_on_every_frame(browser, served):
    server, url, folder = served
    browser.open(url)
    drop(browser, video(folder / "clip.mp4", size=(120, 96)))
    server.model.lm_head.say(TRACK)
    question(browser, "Track the dot.")
    browser.until("!asking && playing && at > 3 && at < 15")  # it plays by itself
    browser.until("at > 15")
    browser.until("at < 15 && playing")  # over and over
    browser.click("play")
    browser.until("!playing")
    browser.js("at = 0, shown = [], really = go, began = performance.now()")
    browser.js("go = k => { shown.push([talk.times[k], (performance.now() - began) / 1000]); really(k) }, play()")
    browser.until("at > 8")
    browser.js("stop(), go = really")
    assert all(since > t - 0.05 for t, since in browser.js("shown"))  # no frame before its time
    points = [dict(t=0, x=0.2, y=0.5, id=0), dict(t=1, x=0.6, y=0.5, id=0), dict(t=1.5, x=0.8, y=0.25, id=0)]
    times = browser.js("talk.times")
    for k, t in enumerate(times):
        shown = browser.js(f"[place(tracks()[0], {t})].filter(p => p).map(p => [p.x, p.y])")
        assert np.allclose(shown, [(p["x"], p["y"]) for p in at_time(points, t)], atol=1e-9), t
    browser.js("[...$('marks').children].at(-1).click()")  # a click on the time line goes there
    assert browser.js("talk.times[at]") == 1.5 and browser.js("$('clock').textContent") == "1.5 / 2.0 s"
    browser.js("$('points').children[0].firstChild.click()")
    assert browser.js("at") == 0
    on_screen(browser, 0, 0.2, 0.5)  # no trail yet
    browser.js("document.activeElement.blur()")
    browser.key("ArrowRight")
    assert browser.js("at") == 1
    # the keys, the slider, the time line
    browser.key("ArrowLeft")
    assert browser.js("at") == 0
    browser.key(" ")
    browser.until("playing && at > 0")
    browser.key(" ")
    assert not browser.js("playing")
    browser.js("$('time').value = 7; $('time').oninput()")
    assert browser.js("[at, $('clock').textContent]") == [7, "0.7 / 2.0 s"]
    assert browser.js("[...$('marks').children].map(mark => mark.style.left)") == ["0%", "50%", "75%"]
    for k, frame in enumerate((0, 10, 15)):
        browser.js(f"$('marks').children[{k}].click()")
        assert browser.js("at") == frame
    red = colour_of(0)
    for x, y, is_there in ((0.5, 0.5, True), (0.7, 0.375, True), (0.3, 0.5, True), (0.7, 0.5, False)):
        assert (np.abs(pixel(browser, x, y) - red).max() < 12) == is_there, (x, y)  # the trail of the last 1.5 seconds
    browser.key("/")
    assert browser.js("document.activeElement.id") == "question"


def test_settings_the_stop_button_and_what_the_page_says_when_it_goes_wrong(browser, served):
    server, url, folder = served
    head = server.model.lm_head
    browser.open(url)
    browser.js(f"""(bytes => {{
        const clipboardData = new DataTransfer();
        clipboardData.items.add(new File([Uint8Array.from(atob(bytes), letter => letter.charCodeAt(0))], "pasted.png"));
        document.dispatchEvent(new ClipboardEvent("paste", {{clipboardData}}));
    }})({base64.b64encode(open(picture(folder / "wall.png", "gray"), "rb").read()).decode()!r})""")
    browser.until("talk && pictures[0].naturalWidth")
    talk, = server.talks.values()
    assert talk.names == ["pasted.png"]
    asked = []
    chat_ask = talk.chat.ask
    talk.chat.ask = lambda *args, **more: asked.append(args) or chat_ask(*args[:2], **more)  # cold: by the script
    browser.js("$('temperature').value = 0.7; $('length').value = 33")
    head.say("one two three four five six seven" * 9, gate=3)
    question(browser, "Count.")
    browser.until("talk.turns[0].answer.startsWith('o') && $('ask').textContent === 'Stop'")
    browser.click("ask")
    browser.until("!asking && document.querySelector('.tools').textContent.includes('stopped')")
    assert asked == [("Count.", 33, 0.7)]
    until(lambda: has_ended(server))
    # a talk that is left ends its answer, which changes nothing on the page that is open then
    head.say("eight nine ten" * 20, gate=3)
    question(browser, "Go on.")
    browser.until("talk.turns[1].answer")
    browser.js("$('new').click()")
    until(lambda: has_ended(server))
    assert talk.turns[1]["state"] == "stopped"
    assert browser.js("$('talk').hidden && !$('start').hidden && location.hash === ''")
    # an answer that breaks off, and a program that has ended
    browser.js(f"location.hash = '#{talk.name}'; delete document.body.dataset.ready, location.reload()")
    browser.until("document.body?.dataset.ready === 'yes' && talk?.turns.length === 2")
    talk.chat.ask = lambda *args, **more: iter([1 / 0])
    server.handle_error = lambda *args: None  # else the terminal shows it
    question(browser, "And?")
    browser.until("$('turns').textContent.includes('The answer broke off; the terminal says why.')")
    browser.js("fetch = async () => { throw new TypeError('Failed to fetch') }")  # as when nobody listens any more
    question(browser, "And now?")
    browser.until("$('turns').textContent.includes('The program does not answer. Has it been ended?')")


def test_several_images_each_have_their_own_points(browser, served):
    server, url, folder = served
    paths = [picture(folder / f"{colour}.png", colour, size=(120, 96)) for colour in ("gray", "silver")]
    talk = upload(url, *paths).json()["talk"]
    browser.open(f"{url}#{talk}")
    browser.until("talk && pictures.every(picture => picture.naturalWidth)")
    server.model.lm_head.say("<point 0, 0.25, 0.5, 0> <point 1, 0.75, 0.25, 1>")
    question(browser, "Point to the specks.")
    browser.until("!asking && $('points').children.length === 2")
    for k, i, x, y in ((0, 0, 0.25, 0.5), (1, 1, 0.75, 0.25)):
        assert np.abs(pixel(browser, x, y, k) - colour_of(i)).max() < 12
        assert np.abs(pixel(browser, x, y, 1 - k) - (192, 128)[k]).max() < 4  # the other image, without a point
    links = browser.js("[...document.querySelectorAll('.tools a')].map(a => [a.textContent, a.href])")
    assert [text for text, _ in links] == ["save image 0", "save image 1", "save record", "what the model saw"]
    for k, (_, link) in enumerate(links[:2]):
        drawn = Image.open(io.BytesIO(requests.get(link).content))
        assert [bool(coloured(drawn, i)) for i in range(2)] == [k == 0, k == 1]


def test_the_page_is_readable_in_dark_and_light_and_on_a_phone(browser, tmp_path):
    with serving(tmp_path, [([picture(tmp_path / "wall.png", "gray", size=(120, 96))], ["Where?", "What?"])]) as (
            server, url):
        browser.open(url)
        browser.js("$('examples').firstChild.click()")
        browser.until("talk && pictures[0].naturalWidth")
        assert browser.js("$('question').value") == "Where?"
        browser.js("$('prompts').children[1].click()")
        assert browser.js("$('question').value") == "What?"
        server.model.lm_head.say(POINTS)
        question(browser, "Point to the specks.")
        browser.until("!asking && $('points').children.length === 2")
        browser.js("$('message').textContent = 'what is wrong'")
        for scheme in ("light", "dark"):
            browser("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
            pairs = browser.js(COLOURS)
            assert (luminance(pairs[0][1]) < 0.2) == (scheme == "dark")
            for name, back, front in pairs:
                light, dark = sorted((luminance(back), luminance(front)), reverse=True)
                assert (light + 0.05) / (dark + 0.05) > 4.5, (scheme, name, back, front)  # WCAG AA
        browser("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
        browser.until("innerWidth === 390 && document.querySelector('canvas').clientWidth < 390")
        assert browser.js("document.documentElement.scrollWidth") <= 390
        stage, talk = browser.js("[...document.querySelectorAll('#talk > section')].map("
                                 "e => e.getBoundingClientRect().toJSON())")
        assert talk["top"] >= stage["bottom"] and stage["width"] > 340  # one above the other
        assert browser.js("$('question').getBoundingClientRect().bottom") <= 844
