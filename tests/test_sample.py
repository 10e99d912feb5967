"""Asking: pictures, videos, several in a row; what is drawn is where it was said."""
import json
import os
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from conftest import fast_start, picture, png, tiny_model, video, write_lines

import eval as evaluation
import sample
from data import Planner
from lib import media
from lib.draw import at_time, colour_of, draw, draw_points, draw_video, save_gif
from lib.errors import BadMedia
from lib.media import load_frames
from lib.text import TURNS
from lib.weights import pick_device
from model import Molmo2, ViT, likeliest
from sample import Chat, Prompt, answer, answers, main, prompt_batch


@pytest.fixture
def asked(tmp_path, tokenizer):
    model = tiny_model()
    return model, Planner(tokenizer, model.cfg, 400, max_frames=3), tmp_path


@pytest.mark.parametrize("names", [["a.png"], ["a.png", "sub/b.png"], ["clip.mp4"]])
def test_a_chat_looks_once_and_answers_as_if_it_looked_again(asked, names, monkeypatch):
    model, planner, folder = asked
    for k, name in enumerate(names):
        video(folder / name) if name.endswith("mp4") else picture(folder / name, (90 * k, 200, 30))
    chat, looks = Chat(model, planner, [str(folder / n) for n in names]), []
    encode = model.vision_backbone.forward
    monkeypatch.setattr(model.vision_backbone, "forward", lambda *a: looks.append(1) or encode(*a))
    for k, question in enumerate(("What is it?", "And where?")):
        text = "".join(chat.ask(question, max_new_tokens=6))
        batch, _ = prompt_batch([planner.question(chat.record, None, chat.messages[:2 * k + 1])],
                                planner.cfg)
        seen = len(looks)
        ids = [int(i) for i in model.generate(**batch, max_new_tokens=6, stop=(planner.tokenizer.eos,))]
        looks[seen:] = []
        ids = ids[:ids.index(planner.tokenizer.eos)] if planner.tokenizer.eos in ids else ids
        assert text == planner.tokenizer.decode(ids) and chat.messages[-1] == dict(role="assistant",
                                                                                   content=text)
    assert len(looks) == 1


def test_a_video_is_asked_about_alone(asked):
    model, planner, folder = asked
    paths = [picture(folder / "a.png", "red"), video(folder / "b.mp4")]
    with pytest.raises(BadMedia, match="asked about alone"):
        Chat(model, planner, paths)


def test_points_move_between_the_moments_they_were_given_for():
    track = [dict(t=0.0, x=0.0, y=0.5, id=2), dict(t=1.0, x=1.0, y=0.5, id=2),
             dict(t=4.0, x=0.2, y=0.2, id=2)]
    assert [p["x"] for t in (0, 0.25, 1.0) for p in at_time(track, t)] == [0, 0.25, 1.0]
    assert at_time(track, 1.1)[0]["x"] == 1.0 and at_time(track, 2.5) == []  # three seconds apart are no path
    assert at_time(track, 4.1)[0]["x"] == 0.2


def test_videos_are_drawn_with_their_points_and_a_sheet(tmp_path):
    path, out = video(tmp_path / "a.mp4", size=(48, 32)), str(tmp_path / "out.mp4")
    points = [dict(t=0.5, x=0.25, y=0.5, id=0), dict(t=1.0, x=0.75, y=0.5, id=0)]
    assert draw("video", [path], points, out) == [out, out + ".png"]
    frames = load_frames(out, [0.1, 0.5, 0.7, 1.0])
    assert frames[0].shape == (416, 624, 3) and frames[0].std() < 3  # 48 x 32, thirteen times
    middle = [np.abs(f.astype(int) - np.median(f)).sum((0, 2)) for f in frames[1:]]
    centre = [(np.arange(624) * (m > m.max() / 3)).sum() / (m > m.max() / 3).sum() / 624 for m in middle]
    assert abs(centre[0] - 0.25) < 0.06 and centre[0] < centre[1] < 0.75
    with Image.open(out + ".png") as sheet:
        assert sheet.size == (624, 208)  # two moments, half as large


def test_an_animation_shows_each_point_at_its_time_and_repeats(tmp_path):
    path, out = video(tmp_path / "a.mp4", size=(48, 32)), str(tmp_path / "out.GIF")
    points = [dict(t=0.5, x=0.25, y=0.5, id=0), dict(t=1.0, x=0.75, y=0.5, id=1)]
    assert draw("video", [path], points, out) == [out, out + ".png"]
    with Image.open(out) as gif, Image.open(out + ".png") as sheet:
        assert gif.format == "GIF" and gif.info["loop"] == 0 and sheet.size == (624, 208)
        shown = []  # a tenth of a second each; a GIF joins images that are alike
        for k in range(gif.n_frames):
            gif.seek(k)
            shown += [np.asarray(gif.convert("RGB")).astype(int)] * (gif.info["duration"] // 100)
    assert len(shown) == 20 and shown[0].shape == (416, 624, 3)
    for t, x, i in ((5, 0.25, 0), (10, 0.75, 1)):
        assert near(shown[t], x, 0.5, colour_of(i)) and abs(np.median(shown[t]) - 10 * t) < 6
        assert coloured(shown[t - 1]).sum() < 9  # PIL leaves a pixel of a point that has gone


@pytest.mark.parametrize("limit, halved", [(10**6, 0), (25_000, 1), (3_500, 2)])
def test_an_animation_is_made_small_enough_and_keeps_its_time(tmp_path, limit, halved):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (80, 160, 3)).astype(np.uint8)) for _ in range(4)]
    path = tmp_path / "a.gif"
    save_gif(iter(images), str(path), 10, limit)
    assert path.stat().st_size <= limit
    with Image.open(path) as gif:
        assert gif.size == (160 >> halved, 80 >> halved) and gif.n_frames == 4 >> halved
        assert gif.info["duration"] * gif.n_frames == 400 and gif.info["loop"] == 0


def test_slow_videos_keep_their_time(tmp_path):
    """Two frames a second, ten drawn: each is shown five times, and the point is where it is at each."""
    path, out = video(tmp_path / "a.mp4", n=6, fps=2), str(tmp_path / "out.mp4")
    draw_video(path, [dict(t=0.0, x=0.1, y=0.5, id=0), dict(t=1.0, x=0.9, y=0.5, id=0)], out)
    a, b = load_frames(out, [0.5, 0.9])
    assert (np.abs(a.astype(int) - b).max(-1) > 60).sum() > 300


def test_several_pictures_are_drawn_apart(tmp_path):
    paths = [picture(tmp_path / f"{k}.png", "red") for k in range(2)]
    files = draw("images", paths, [dict(image=1, x=0.5, y=0.5, id=0)], str(tmp_path / "out.png"))
    assert files == [str(tmp_path / "out_0.png"), str(tmp_path / "out_1.png")]
    plain, marked = (np.asarray(Image.open(f)) for f in files)
    assert (plain == (255, 0, 0)).all(-1).mean() > 0.99 and (marked != plain).any(-1).sum() > 300
    for file in draw("images", paths, [], str(tmp_path / "out.jpg")):
        with Image.open(file) as image:
            assert image.format == "JPEG" and file.endswith(".jpg")


@pytest.mark.parametrize("ending", [".mp4", ".gif"])
@pytest.mark.parametrize("in_turn", [False, True])
def test_a_video_is_drawn_with_two_frames_in_memory_however_long_it_is(tmp_path, monkeypatch, in_turn, ending):
    frames = []  # weak: the decoded ones
    n_alive = []
    turned = media.turned

    def counted(*args):
        pixels = turned(*args)
        frames.append(weakref.ref(pixels))
        n_alive.append(sum(frame() is not None for frame in frames))
        return pixels
    monkeypatch.setattr(media, "turned", counted)
    if in_turn:  # as for files that do not tell when their frames are shown
        monkeypatch.setattr(media, "frame_plan", lambda *args: None)
    path = video(tmp_path / "a.mp4", n=25)
    draw_video(path, [dict(t=1.0, x=0.5, y=0.5, id=0)], str(tmp_path / "out") + ending)
    assert len(n_alive) == 25 and max(n_alive) <= 2


@pytest.mark.parametrize("ending", [".mp4", ".gif"])
def test_of_a_video_that_breaks_further_on_no_half_copy_is_left(tmp_path, ending):
    fast_start(tmp_path / "whole.mp4", 40)
    data = (tmp_path / "whole.mp4").read_bytes()
    path = tmp_path / "flat.mp4"
    path.write_bytes(data[:len(data) // 2] + bytes(len(data) // 2))
    assert len(load_frames(str(path), [0.0])) == 1
    with pytest.raises(BadMedia, match="flat.mp4"):
        draw_video(str(path), [], str(tmp_path / "out") + ending)
    assert sorted(os.listdir(tmp_path)) == ["flat.mp4", "whole.mp4"]


def test_a_device_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sample.py", str(tmp_path), picture(tmp_path / "a.png", "red"), "What is it?",
                                     "--device", "cuda:99"])
    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 2 and capsys.readouterr().err.startswith("error: --device cuda:99: ")


# ---- an end token that comes third -------------------------------------------------------------------------

class Script(torch.nn.Module):
    """Stands in for lm_head: in each answer to B questions row b gets the ids of its text, then the end. After its
    end a row is given junk, and after the last end there is nothing more to say."""

    def __init__(self, tokenizer, *answers):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(tokenizer.vocab, 1))
        self.steps = []
        for texts in answers:
            rows = [tokenizer.encode(t) + [tokenizer.eos] if isinstance(t, str) else t for t in texts]
            longest = max(map(len, rows))
            self.steps += zip(*[r + tokenizer.encode("junk")[:1] * (longest - len(r)) for r in rows])

    def forward(self, x):
        return F.one_hot(torch.tensor(self.steps.pop(0)), len(self.weight)).float().reshape(*x.shape[:-1], -1)


def medium(folder, kind):
    """(paths, row) of an image, two, or a clip."""
    if kind == "video":
        return [video(folder / "clip.mp4")], dict(video="clip.mp4")
    paths = [picture(folder / name, "red") for name in ("a.png", "b.png")]
    return (paths[:1], dict(image="a.png")) if kind == "image" else (paths, dict(images=["a.png", "b.png"]))


def test_generation_ends_with_the_last_row_and_finished_rows_are_silent(asked):
    model, planner, folder = asked
    tok, say = planner.tokenizer, [dict(role="user", content="What?")]
    plans = [planner.question(medium(folder, kind)[1], str(folder), say) for kind in ("image", "video")]
    batch, _ = prompt_batch(plans, planner.cfg)
    a, b, end = 70, 71, tok.eos
    model.lm_head = Script(tok, ([a, b, end], [a, end]))
    said = [step.tolist() for step in model.generate(**batch, max_new_tokens=9, stop=(end,))]
    assert said == [[a, a], [b, end], [end, end]] and not model.lm_head.steps
    model.lm_head = Script(tok, ([a] * 9, [b, end]))
    said = [step.tolist() for step in model.generate(**batch, max_new_tokens=4, stop=(end,))]
    assert said == [[a, b], [a, end], [a, end], [a, end]] and len(model.lm_head.steps) == 5
    model.lm_head = Script(tok, ([end, a], [b, b]))
    assert len(list(model.generate(**batch, max_new_tokens=2))) == 2  # nothing stops it


@pytest.mark.parametrize("kind", ["image", "images", "video"])
def test_no_answer_holds_its_end_token(asked, kind):
    model, planner, folder = asked
    row = medium(folder, kind)[1]
    plans = [planner.question(row, str(folder), [dict(role="user", content=q)]) for q in ("What?", "And where?")]
    model.lm_head = Script(planner.tokenizer, ("a star", "<point 0.1, 0.2, 0>"), ("", "no"))
    assert answer(model, planner, plans, 99) == (["a star", "<point 0.1, 0.2, 0>"], [])
    assert answer(model, planner, plans, 99) == (["", "no"], []) and not model.lm_head.steps
    ids = planner.tokenizer.encode("a star and a bar")
    model.lm_head = Script(planner.tokenizer, (ids, "no"))
    assert answer(model, planner, plans, 3)[0] == [planner.tokenizer.decode(ids[:3]), "no"]


def test_each_answer_goes_to_its_question_and_is_as_long_as_its_task_allows(asked):
    """Questions of a task are asked together; the texts come back in the order of the questions."""
    model, planner, folder = asked
    row = medium(folder, "image")[1]
    ask = [Prompt(task, f"f:{i}", row, str(folder), f"{i}?") for i, task in enumerate(
        ["image_qa", "counting", "image_qa", "counting", "image_qa"])]
    model.lm_head = Script(planner.tokenizer, ("one", "three three"), ("zero", "two two two"), ["four"])
    assert answers(model, planner, ask, lambda task: 99, 2) == ["zero", "one", "two two two", "three three", "four"]
    assert not model.lm_head.steps
    a = planner.tokenizer.encode("star")[0]
    model.lm_head = Script(planner.tokenizer, ([a] * 9,), ([a] * 9,))
    model.lm_head.steps = [(a,)] * 7
    limits = dict(counting=2, image_qa=5)
    texts = answers(model, planner, [ask[0], ask[1]], limits.get, 1)
    assert [len(planner.tokenizer.encode(t)) for t in texts] == [5, 2] and not model.lm_head.steps
    planner.seq_len = planner.question(row, str(folder), [dict(role="user", content="0?")]).n_tokens + 3
    model.lm_head.steps = [(a,)] * 3  # more does not fit the sequence
    assert len(planner.tokenizer.encode(answers(model, planner, ask[:1], limits.get, 1)[0])) == 3


def test_media_that_cannot_be_decoded_are_an_error_and_no_answer(asked):
    model, planner, folder = asked
    paths, row = medium(folder, "image")
    (folder / "a.png").write_bytes(png(30, 24))  # a header alone
    with pytest.raises(BadMedia, match="f:7: .*a.png"):
        answers(model, planner, [Prompt("image_qa", "f:7", row, str(folder), "What?")], lambda task: 9)
    with pytest.raises(BadMedia, match="a.png"):
        next(Chat(model, planner, paths).ask("What?"))


def test_a_batch_answers_as_each_question_alone(asked):
    model, planner, folder = asked
    kinds = [medium(folder, kind)[1] for kind in ("image", "images", "video")]
    asked = [Prompt("image_qa", f"f:{i}", row, str(folder), q) for i, (row, q) in enumerate(
        zip(kinds * 2, ("What?", "How many stars are there?", "Hm", "Where is the red one?", "So?", "Which way?")))]
    alone = [answers(model, planner, [one], lambda task: 8)[0] for one in asked]
    assert answers(model, planner, asked, lambda task: 8, batch=4) == alone and len(set(alone)) > 3


@pytest.mark.parametrize("kind", ["image", "images", "video"])
def test_a_chat_hears_the_end_and_remembers_what_was_said(asked, kind, monkeypatch):
    model, planner, folder = asked
    tok, prompts, generate = planner.tokenizer, [], model.generate
    monkeypatch.setattr(model, "generate", lambda tokens, *a, **k: prompts.append(tokens[0].tolist())
                        or generate(tokens, *a, **k))
    model.lm_head = Script(tok, ["a star"], ["<point 0.5, 0.25, 0>"])
    chat = Chat(model, planner, medium(folder, kind)[0])
    assert "".join(chat.ask("What?", 99)) == "a star" and "".join(chat.ask("Where?")) == "<point 0.5, 0.25, 0>"
    assert not model.lm_head.steps and chat.kind == kind
    special = ("<|im_end|>", *TURNS)
    first = tok.encode("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n", special)
    second = tok.encode("<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n", special)
    assert prompts[0][-len(first):] == first
    assert prompts[1] == prompts[0] + tok.encode("a star") + [tok.eos] + second
    assert [(m["role"], m["content"]) for m in chat.messages] == [
        ("user", "What?"), ("assistant", "a star"), ("user", "Where?"), ("assistant", "<point 0.5, 0.25, 0>")]
    ids = tok.encode("a red star and a green bar")
    model.lm_head = Script(tok, [ids])
    assert "".join(chat.ask("More?", 4)) == tok.decode(ids[:4]) and len(model.lm_head.steps) == len(ids) - 4


def test_an_answer_comes_piece_by_piece_and_in_whole_characters(asked):
    model, planner, folder = asked
    tok = planner.tokenizer
    ids = tok.encode("\u00e9\u4e16 so")
    assert len(ids) > 5
    model.lm_head = Script(tok, [ids + [tok.eos]], [ids[:3]])
    chat = Chat(model, planner, medium(folder, "image")[0])
    pieces = list(chat.ask("What?"))
    assert "".join(pieces) == "\u00e9\u4e16 so" and sum(map(bool, pieces)) >= 3
    assert not any("\ufffd" in p for p in pieces)
    assert "".join(chat.ask("And?", 3)) == "\u00e9\ufffd"  # cut within a character


def test_a_seed_repeats_an_answer_and_zero_temperature_takes_the_likeliest(asked):
    model, planner, folder = asked
    paths = medium(folder, "image")[0]
    say = lambda **k: "".join(Chat(model, planner, paths).ask("What?", 12, **k))
    assert say(temperature=1.5, seed=1) == say(temperature=1.5, seed=1) != say(temperature=1.5, seed=2)
    assert say() == say(seed=5) != say(temperature=1.5, seed=1)


@pytest.mark.parametrize("kind, answer, files", [
    ("image", "<point 0.5, 0.5, 0>", "answer.png"),
    ("video", "<point 0.5, 0.5, 0.5, 0>", "answer.mp4 and answer.mp4.png"),
    ("images", "<point 1, 0.5, 0.5, 0> <point 2, 0.5, 0.5, 1> <point 0.5, 0.5, 2>", "answer_0.png and answer_1.png")])
def test_each_kind_of_media_is_drawn_into_files_of_its_kind(asked, monkeypatch, capsys, kind, answer, files):
    model, planner, folder = asked
    model.lm_head = Script(planner.tokenizer, [answer])
    monkeypatch.setattr(sample, "load", lambda *a, **k: (model, planner))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["sample.py", "checkpoint", *medium(folder, kind)[0], "Where?"])
    main()
    assert capsys.readouterr().out == f"{answer}\n1 point drawn into {files}\n"
    assert all(os.path.getsize(folder / name) for name in files.split(" and "))


def test_a_file_of_no_known_kind_is_refused(asked):
    model, planner, folder = asked
    (folder / "notes.txt").write_text("no image")
    with pytest.raises(BadMedia, match="notes.txt: not a readable image"):
        Chat(model, planner, [str(folder / "notes.txt")])


def test_the_command_prints_the_answer_alone_and_draws_its_points(asked, monkeypatch, capsys):
    model, planner, folder = asked
    model.lm_head = Script(planner.tokenizer, ["<point 0.5, 0.5, 0> <point 0.1, 0.5, 1>"], ["a star"],
                           ["<point 0.9, 0.5, 0>"])
    monkeypatch.setattr(sample, "load", lambda *a, **k: (model, planner))
    monkeypatch.chdir(folder)
    questions = iter(["What is it?", "Where?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(questions))
    monkeypatch.setattr("sys.argv", ["sample.py", "checkpoint", medium(folder, "image")[0][0], "Find all.", "--chat"])
    main()
    assert capsys.readouterr().out == ("<point 0.5, 0.5, 0> <point 0.1, 0.5, 1>\n2 points drawn into answer.png\n"
                                       "a star\n<point 0.9, 0.5, 0>\n1 point drawn into answer.png\n")
    assert not model.lm_head.steps and os.path.exists(folder / "answer.png")


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """A checkpoint that was shown three frames of a video, and what it is asked: [(frames, longest answer)]."""
    folder, seen = tmp_path / "checkpoint", []
    os.makedirs(folder)
    tokenizer.save(str(folder))
    tiny_model().save_pretrained(str(folder), 3, 0)

    def generate(self, tokens, *a, max_new_tokens=None, stop=(), **k):
        longest = max_new_tokens if max_new_tokens is not None else a[2]  # after crops and pool
        seen.append((int((tokens == tokenizer.ids["<frame_start>"]).sum()), longest))
        yield torch.full((len(tokens),), tokenizer.eos)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Molmo2, "generate", generate)
        yield str(folder), seen


@pytest.mark.parametrize("flags, frames, longest", [([], 3, 2048), (["--max_frames", "2"], 2, 2048),
                                                    (["--max_new_tokens", "7"], 3, 7)])
def test_a_video_is_asked_about_with_the_frames_of_training(checkpoint, tmp_path, monkeypatch, capsys, flags, frames,
                                                            longest):
    folder, seen = checkpoint
    path = video(tmp_path / "clip.mp4")
    monkeypatch.setattr("sys.argv", ["sample.py", folder, path, "What?", *flags])
    main()
    rows = write_lines(tmp_path / "rows.jsonl", [dict(video="clip.mp4", annotations=[
        dict(task="video_qa", prompt="What?", answer="It.")])])
    monkeypatch.setattr("sys.argv", ["eval.py", folder, "--data", rows, "--out", str(tmp_path / "e.json"), *flags])
    evaluation.main()
    assert seen == [(frames, longest), (frames, min(longest, 64))]


def test_pictures_are_asked_about_with_256_tokens(checkpoint, tmp_path, monkeypatch):
    folder, seen = checkpoint
    monkeypatch.setattr("sys.argv", ["sample.py", folder, picture(tmp_path / "a.png", "red"), "What?"])
    main()
    assert seen == [(0, 256)]


def test_a_checkpoint_tells_how_much_to_show(checkpoint):
    folder, _ = checkpoint
    model, planner = sample.load(folder)
    assert (planner.max_frames, planner.tiles, planner.seq_len) == (3, 0, model.cfg.max_positions)
    assert not model.training and planner.tokenizer.path.startswith(folder)
    assert sample.load(folder, max_frames=9, tiles=5)[1].max_frames == 9
    assert sample.load(folder, tiles=5, usual_tiles=24)[1].tiles == 5
    for told, frames in ((384, 128), (128, 128), (127, 127), (0, 128), ("many", 128), (None, 128)):
        with open(os.path.join(folder, "video_preprocessor_config.json"), "w") as f:
            json.dump(dict(num_frames=told), f)
        assert sample.load(folder)[1].max_frames == frames
    os.remove(os.path.join(folder, "video_preprocessor_config.json"))
    assert sample.load(folder)[1].max_frames == 128


def test_high_resolution_crops_are_shown_if_training_showed_some(checkpoint, tmp_path):
    folder, _ = checkpoint
    tiles = lambda **flags: sample.load(folder, **flags)[1].tiles
    assert [tiles(), tiles(usual_tiles=24), tiles(tiles=3)] == [0, 0, 3]
    path = os.path.join(folder, "preprocessor_config.json")
    for told, usual in ((8, 24), (24, 24), (2, 24), (1, 0), (None, 24)):
        with open(path, "w") as f:
            json.dump(dict(max_crops=told), f)
        assert [tiles(), tiles(usual_tiles=24), tiles(tiles=0)] == [min(usual, 8), usual, 0]
    os.remove(path)  # a published folder without it is of a model that saw them
    assert tiles() == 8


# ---- where and how ----------------------------------------------------------------------------------------

class Constant(torch.nn.Module):
    """Stands in for lm_head: the same logits for every token of every answer."""

    def __init__(self, logits, vocab):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((vocab, 1), -30.0))
        with torch.no_grad():
            self.weight[:len(logits), 0] = torch.tensor(logits)

    def forward(self, x):
        return self.weight[:, 0].expand(*x.shape[:-1], -1)


def test_top_p_draws_from_the_likeliest():
    assert likeliest(torch.tensor([[0.1, 0.5, 0.15, 0.25]]), 0.7).tolist() == [[0, 0.5, 0, 0.25]]
    p = torch.tensor([[0.2, 0.3, 0.5], [0.98, 0.01, 0.01]])
    assert likeliest(p, 0.4).tolist() == [[0, 0, 0.5], [p[1, 0].item(), 0, 0]]  # one is always left
    assert likeliest(p, 1.0) is p
    model = tiny_model()
    model.lm_head = Constant(np.log([0.2, 0.5, 0.3]).tolist(), model.cfg.vocab)
    drawn = [ids.tolist() for ids in model.generate(torch.ones(40, 1, dtype=torch.long), max_new_tokens=20, top_p=0.7,
                                                    temperature=1.0, generator=torch.Generator().manual_seed(0))]
    share = np.mean(np.array(drawn) == 1)
    assert set(np.ravel(drawn)) == {1, 2} and abs(share - 5 / 8) < 0.06  # 800 draws: a deviation of 0.017


@pytest.mark.parametrize("penalty", [0.1, 0.4, -0.1])
def test_a_frequency_penalty_takes_from_what_was_written(penalty):
    """Of each sequence of a batch its own ids; those of the prompt do not count."""
    model = tiny_model()
    logits = [1.0, 0.95, 0.7, 0.2]
    model.lm_head = Constant(logits, model.cfg.vocab)
    want = []
    for _ in range(12):
        want.append(int(np.argmax([x - penalty * want.count(i) for i, x in enumerate(logits)])))
    tokens = torch.zeros(2, 5, dtype=torch.long)
    said = list(model.generate(tokens, max_new_tokens=12, frequency_penalty=penalty))
    assert torch.stack(said, 1).tolist() == [want, want]


def test_a_batch_is_answered_as_the_flags_say(asked, monkeypatch):
    """The flags of the command reach `generate`, of a chat and of many files alike."""
    model, planner, folder = asked
    seen = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: seen.append(k) or generate(*a, **k))
    monkeypatch.setattr(sample, "load", lambda *a, **k: seen.append(k) or (model, planner))
    monkeypatch.chdir(folder)
    path = medium(folder, "image")[0][0]
    flags = ["--temperature", "0.7", "--top_p", "0.95", "--frequency_penalty", "0.1", "--dtype", "bf16",
             "--max_new_tokens", "3"]
    for out in ("a.png", "results"):
        monkeypatch.setattr("sys.argv", ["sample.py", "c", path, "What?", "--out", out, *flags])
        main()
        loaded, how = seen
        assert loaded == dict(dtype="bf16") and (how["top_p"], how["frequency_penalty"]) == (0.95, 0.1)
        assert how["generator"].initial_seed() == 0
        seen.clear()


def test_the_device_and_type_are_chosen_by_what_is_there(monkeypatch):
    assert pick_device("cpu") == ("cpu", torch.float32) and pick_device("cpu", "bf16") == ("cpu", torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == ("cpu", torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: None)
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
        assert pick_device() == ("cuda", dtype) and pick_device("cuda:1", "fp32") == ("cuda:1", torch.float32)


def test_a_model_in_bf16_answers_about_all_kinds_of_media(asked):
    model, planner, folder = asked
    model.bfloat16()
    for kind in ("image", "images", "video"):
        paths, row = medium(folder, kind)
        prompts = [Prompt("image_qa", kind, row, str(folder), "What is it, and where?")]
        text = answers(model, planner, prompts, lambda task: 6)
        assert ["".join(Chat(model, planner, paths).ask("What is it, and where?", 6))] == text


def test_many_crops_are_encoded_in_groups(monkeypatch):
    """384 frames at once would take gigabytes; an answer about them is the same."""
    monkeypatch.setattr(ViT, "AT_ONCE", dict(cpu=820))  # 32 crops of 25 patches
    vit = tiny_model().vision_backbone.image_vit
    crops = torch.randint(0, 256, (70, 25, 48), dtype=torch.uint8)
    sizes = []
    vit.patch_embedding.register_forward_hook(lambda module, x, y: sizes.append(len(y)))
    with torch.no_grad():  # as in training, where all ranks must call alike
        want = vit(crops)
    with torch.inference_mode():
        got = vit(crops)
    assert sizes == [70, 32, 32, 6] and torch.allclose(got, want, atol=1e-5)


# ---- what is drawn -----------------------------------------------------------------------------------------

def cells(page, n, size=(312, 208)):
    """The n moments of a contact sheet, four in a row, as arrays of whole numbers."""
    page = np.asarray(Image.open(page)).astype(int)
    assert page.shape == (size[1] * -(-n // 4), size[0] * min(n, 4), 3)
    return [page[k // 4 * size[1]:, k % 4 * size[0]:][:size[1], :size[0]] for k in range(n)]


def near(cell, x, y, colour, reach=2):
    """Whether a pixel at a place of a cell, or a step beside it, has about that colour."""
    h, w, _ = cell.shape
    i, j = round(y * h), round(x * w)
    part = cell[max(i - reach, 0):max(i + reach + 1, 0), max(j - reach, 0):max(j + reach + 1, 0)]
    return bool((np.abs(part - colour).sum(-1) < 60).any())


def coloured(cell):
    """Where a cell of a grey film is not grey: (H, W)."""
    return cell.max(-1) - cell.min(-1) > 60


def test_every_id_has_a_colour_of_its_own():
    colours = [np.array(colour_of(i)) for i in range(6)]
    assert colour_of(0) == (255, 25, 25)
    assert min(np.abs(a - b).sum() for i, a in enumerate(colours) for b in colours[:i]) > 100


def test_the_way_of_each_id_is_its_own_line_and_two_seconds_long(tmp_path):
    path, out = video(tmp_path / "a.mp4", n=24, fps=8), str(tmp_path / "out.mp4")
    # 0 goes right in the upper half, 4 goes left in the lower one
    points = [dict(t=t, x=x if i == 0 else 1 - x, y=0.25 if i == 0 else 0.75, id=i) for i in (4, 0)
              for t, x in ((0, 0.1), (0.5, 0.2), (1, 0.3), (1.5, 0.4), (2, 0.5), (2.5, 0.6))]
    draw_video(path, points, out)
    shown = cells(out + ".png", 6)
    for k, cell in enumerate(shown):
        for i, y, place in ((0, 0.25, lambda x: x), (4, 0.75, lambda x: 1 - x)):
            now = 0.1 * k + 0.1
            assert near(cell, place(now), y, colour_of(i))
            for back in np.arange(0.06, 0.37, 0.04):  # 0.2 a second: the last two seconds are 0.4 wide
                if abs(now - back - 0.08) > 0.025:  # the way begins at 0.1, and is as thick as this
                    assert near(cell, place(now - back), y, colour_of(i)) == (now - back > 0.08)
            assert not near(cell, place(now - 0.47), y, colour_of(i))
        assert not coloured(cell)[int(0.4 * 208):int(0.6 * 208)].any()  # no line from one to the other


def test_no_line_leads_over_the_time_an_object_was_away(tmp_path):
    path, out = video(tmp_path / "a.mp4", n=24, fps=8), str(tmp_path / "out.mp4")
    draw_video(path, [dict(t=t, x=x, y=0.5, id=0) for t, x in ((0.5, 0.1), (1, 0.2), (2.25, 0.8), (2.5, 0.9))], out)
    last = coloured(cells(out + ".png", 4)[-1]).any(0)
    assert last[int(0.16 * 312)] and last[int(0.85 * 312)]  # the way before and the way after
    assert not last[int(0.3 * 312):int(0.7 * 312)].any()


def test_a_moment_of_the_sheet_shows_its_own_frame_and_its_own_point(tmp_path):
    """Whatever the digits of its time: a point alone is drawn, on the frame shown then; the last one too."""
    path, out = video(tmp_path / "a.mp4"), str(tmp_path / "out.mp4")
    times = (0, 0.33, 0.48, 0.77, 1.16, 1.62, 1.99)
    points = [dict(t=t, x=0.2 + 0.1 * i, y=0.3 + 0.05 * i, id=i) for i, t in enumerate(times)]
    draw_video(path, points, out)
    frames = load_frames(out, [round(t, 1) if t < 1.9 else 1.9 for t in times])
    for i, (p, t, cell) in enumerate(zip(points, times, cells(out + ".png", 7))):
        grey = 10 * min(round(t * 10), 19)
        assert abs(np.median(cell) - grey) < 6
        assert near(cell, p["x"], p["y"], colour_of(i))
        assert near(frames[i].astype(int), p["x"], p["y"], colour_of(i))
        assert not coloured(cell)[:int((p["y"] - 0.1) * 208)].any()  # nor another


def test_a_track_at_odd_times_is_where_it_was_said_to_be(tmp_path):
    path, out = video(tmp_path / "a.mp4"), str(tmp_path / "out.mp4")
    points = [dict(t=t, x=x, y=0.5, id=0) for t, x in ((0.34, 0.1), (0.84, 0.9), (1.28, 0.2), (1.96, 0.7))]
    draw_video(path, points, out)
    for p, cell in zip(points, cells(out + ".png", 4)):
        middle = (coloured(cell).sum(0) * (np.arange(312) + 0.5)).sum() / coloured(cell).sum() / 312
        assert near(cell, p["x"], 0.5, colour_of(0)) and (p["t"] > 0.5 or abs(middle - p["x"]) < 0.02)


def test_a_long_track_has_twelve_moments_from_first_to_last(tmp_path):
    path, out = video(tmp_path / "a.mp4"), str(tmp_path / "out.mp4")
    draw_video(path, [dict(t=t / 10, x=0.5, y=0.5, id=0) for t in range(1, 19)], out)
    shown = [round(np.median(c) / 10) for c in cells(out + ".png", 12)]
    assert shown[0] == 1 and shown[-1] == 18 and all(0 < b - a < 3 for a, b in zip(shown, shown[1:]))


@pytest.mark.parametrize("points", [[dict(t=99.0, x=0.5, y=0.5, id=0)], [dict(x=0.5, y=0.5, id=0)], []])
def test_points_of_no_moment_are_not_drawn(tmp_path, points):
    path, out = video(tmp_path / "a.mp4"), str(tmp_path / "out.mp4")
    draw_video(path, points, out)
    cell, = cells(out + ".png", 1)
    assert not coloured(cell).any()


@pytest.mark.parametrize("size, drawn", [((48, 32), (624, 416)), ((640, 480), (640, 480)), ((500, 1000), (320, 640)),
                                         ((1280, 64), (1280, 64))])
def test_points_are_drawn_at_their_place_whatever_the_size(size, drawn):
    image = draw_points(np.full((size[1], size[0], 3), 90, np.uint8), [dict(x=0.25, y=0.7, id=0),
                                                                      dict(x=0.6, y=0.3, id=1)])
    cell = np.asarray(image).astype(int)
    assert image.size == drawn
    assert near(cell, 0.25, 0.7, colour_of(0)) and near(cell, 0.6, 0.3, colour_of(1))
    assert not near(cell, 0.7, 0.25, colour_of(0)) and not near(cell, 0.3, 0.6, colour_of(1))


@pytest.mark.parametrize("t, x", [(-0.1, None), (0.9, None), (1, 0.1), (1.24, 0.148), (1.5, 0.2), (2, 0.3),
                                  (2.24, 0.3), (2.26, None), (3.1, None), (3.2, 0.9), (3.4, 0.9), (3.5, None)])
def test_a_point_is_shown_for_a_quarter_of_a_second_and_a_track_between_its_points(t, x):
    track = [dict(t=3.2, x=0.9, y=0, id=3), dict(t=1, x=0.1, y=0, id=3), dict(t=2, x=0.3, y=0, id=3),
             dict(t=1, x=0.5, y=1, id=5)]
    assert [round(p["x"], 3) for p in at_time(track, t) if p["id"] == 3] == ([] if x is None else [x])
    assert [p["id"] for p in at_time(track, 1)] == [3, 5]
