"""Asking: pictures, videos, several in a row; what is drawn is where it was said."""
import numpy as np
import pytest
from conftest import picture, tiny_model, video
from PIL import Image

from data import Planner, prompt_batch
from media import BadMedia, load_frames
from sample import Chat, at_time, draw, draw_video, main


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
        batch, _ = prompt_batch([planner.question(chat.row, chat.folder, chat.messages[:2 * k + 1])],
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




def test_a_device_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sample.py", str(tmp_path), "a.png", "What is it?", "--device", "cuda:99"])
    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 2 and capsys.readouterr().err.startswith("error: --device cuda:99: ")
