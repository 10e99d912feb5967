"""Hostile and odd input: it costs one line, is told by name, and never ends a run or reads what it should not."""
import copy
import functools
import itertools
import json
import math
import os
import random
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from conftest import SIZES, STYLES, picture, png, video, write_lines

from lib import media
from data import Dataset, POINT_MOVED, Planner, RankStream, Stream, decode_packed, to_messages
from lib.distributed import make_loader
from lib.errors import BadMedia, BadRecord
from lib.media import (CropCache, image_size, inside_folder, load_crops, load_frames, load_image, open_image,
                       video_duration)
from lib.records import parse_record, line_index
from lib.tasks import FORMS, TASKS
from model import ModelConfig


NOT_SECONDS = ("9", "", True, False, math.nan, math.inf, -1, -0.5, [], [1], {}, 10 ** 400)
NOT_PIXELS = ("30", True, math.nan, math.inf, -30, 0, 30.5, [], {}, 2 ** 40, 10 ** 400)
NO_SUBTITLES = ("none", 5, True, {}, dict(start=0, end=1, text="a"), ["a"], [None], [{}], [[0, 1, "a"]],
                [dict(start=0, end=1)], [dict(start=0, end=1, text=None)], [dict(start=0, end=1, text=5)],
                [dict(start=0, end=1, text="fine"), dict(start="0", end=1, text="a")])


def film_row(**kw):
    return dict(dict(video="a.mp4", annotations=[dict(task="video_caption", answer="It gets light.")]), **kw)


def image_row(**kw):
    return dict(dict(image="a.png", annotations=[dict(task="image_caption", answer="A wall.")]), **kw)


def told(**kw):
    return film_row(subtitles=[dict(dict(start=0, end=1, text="a"), **kw)])


def asked(**kw):
    return film_row(annotations=[dict(dict(task="video_qa", prompt="?", answer="Yes."), **kw)])


def tracked(t):
    points = [dict(x=0.5, y=0.5, id=0, t=t)]
    return film_row(annotations=[dict(task="video_tracking", label="ball", points=points)])


BAD = {"start": [film_row(start=v) for v in NOT_SECONDS], "end": [film_row(end=v) for v in NOT_SECONDS],
       "duration": [film_row(duration=v) for v in NOT_SECONDS], "fps": [film_row(fps=v) for v in NOT_SECONDS],
       "subtitles": [film_row(subtitles=v) for v in NO_SUBTITLES],
       "start of a subtitle": [told(start=v) for v in NOT_SECONDS],
       "end of a subtitle": [told(end=v) for v in NOT_SECONDS],
       "width": [image_row(width=v, height=24) for v in NOT_PIXELS] + [image_row(width=30)],
       "height": [image_row(width=30, height=v) for v in NOT_PIXELS] + [image_row(height=24)],
       "both": [image_row(width=v, height=v) for v in NOT_PIXELS] + [image_row(width=9000, height=9000)],
       "time of a point": [tracked(v) for v in NOT_SECONDS],
       "start_time": [asked(start_time=v) for v in NOT_SECONDS], "end_time": [asked(end_time=v) for v in NOT_SECONDS],
       "timestamp": [asked(timestamp=v) for v in NOT_SECONDS],
       "clip": [film_row(start=1.5, end=0.5), film_row(start=99), film_row(start=1, duration=0.5)]}


@pytest.fixture
def folder(tmp_path):
    picture(tmp_path / "a.png", "red")
    picture(tmp_path / "b.png", "blue", (24, 30))
    video(tmp_path / "a.mp4")
    return tmp_path


def planner_of(tokenizer, point_format="spec"):
    cfg = ModelConfig(**SIZES, **STYLES["olmo"], point_format=point_format)
    return Planner(tokenizer, cfg, 256, tiles=2, max_frames=4, max_crops=16)


# ---- fields of a line --------------------------------------------------------------------------------------

@pytest.mark.parametrize("what", BAD)
def test_a_field_that_is_no_number_costs_its_line_alone(folder, tokenizer, what):
    planner = planner_of(tokenizer)
    for row in BAD[what]:
        with pytest.raises(BadRecord) as e:
            planner.plan(parse_record(json.dumps(row).encode()), str(folder), random.Random(0))
        assert e.value.reason == "wrong field", row


def test_numbers_at_the_edges_are_fine(folder, tokenizer):
    planner = planner_of(tokenizer)
    for row in (film_row(start=0, end=2), film_row(start=0.5), film_row(end=1.5), film_row(start=2.0), told(),
                film_row(duration=2, fps=30), film_row(start=1, end=1), film_row(end=1e6), film_row(subtitles=[]),
                told(start=1.5, end=0.5), image_row(width=30, height=24), image_row(width=8000, height=8000),
                tracked(0), tracked(1.25), asked(start_time=0.5, end_time=1), asked(timestamp=0)):
        plans, left_out = planner.plan(parse_record(json.dumps(row).encode()), str(folder), random.Random(0))
        assert len(plans) == 1 and set(left_out) <= {POINT_MOVED}, row


def test_bad_fields_are_counted_by_a_worker_and_end_no_run(folder, tokenizer):
    good = [image_row(), film_row(), film_row(start=0.5, end=1.5)] * 40
    rows = good + [row for rows in BAD.values() for row in rows]
    path = write_lines(folder / "rows.jsonl", rows)
    stream = Stream([(Dataset("rows", [path]), 1.0)], planner_of(tokenizer), 0)
    convert = functools.partial(decode_packed, cfg=stream.planner.cfg, seq_len=stream.planner.seq_len)
    loader = make_loader(RankStream(stream), 1, 1, convert)
    events, bad, rounds = [], len(rows) - len(good), 0
    for (row, crops, _), state, more in loader:
        events += more
        rounds = state["seen"] // len(rows)
        if rounds >= 2:
            break
    assert row["weights"].any() and crops
    assert state["bad"]["rows"].keys() == {"wrong field"} and not state["skipped"]
    assert rounds * bad <= state["bad"]["rows"]["wrong field"] <= (rounds + 1) * bad
    assert {e[1] for e in events} == {f"{path}:{i + 1}" for i in range(len(good), len(rows))}
    assert {e[2] for e in events} == {"wrong field"}


EVERYTHING = [
    film_row(id="x", start=0.2, end=1.8, duration=2.0, fps=10, width=48, height=32, source="me",
             provenance=[{"by": "x"}], subtitles=[dict(start=0, end=1, text="a")], annotations=[
        dict(task="video_tracking", label="ball", prompt="Track it.", fps=2, style="video_track", input_points=[
            dict(x=0.5, y=0.5, id=0, t=0.5)], points=[dict(x=0.5, y=0.5, id=0, t=0.5), dict(x=0, y=1, id=1, t=1)]),
        dict(task="video_qa", question="?", options=["a", "b"], correct=1, start_time=0.5, end_time=1, timestamp=1),
        dict(task="video_qa", messages=[dict(role="user", content="?"), dict(role="assistant", content="!")])]),
    image_row(start=0.2, end=1.8, duration=2, subtitles=[], width=30, height=24, annotations=[
        dict(task="image_pointing", label="speck", points=[dict(x=0.1, y=0.2, id=0, t=0.5)]),
        dict(task="image_qa", prompt="?", answer="x", start_time=0.5, timestamp=1, input_points=[
            dict(x=0.1, y=0.2, id=0)]),
        dict(task="counting", label="speck", points=[dict(x=0.1, y=0.2, id=0)])]),
    dict(images=["a.png", "b.png"], start=0.5, annotations=[
        dict(task="multi_image_pointing", label="speck", points=[dict(x=0.1, y=0.2, id=0, image=1)]),
        dict(task="multi_image_qa", prompt="?", answer="x", images=[0, 1])]),
    dict(start=1, end=2, annotations=[dict(task="text", prompt="2 plus 2?", answer="4", timestamp=1)])]
ODD = [*NOT_SECONDS, None, 0, 1, 1.5, 2 ** 31, 1e300, "a.png", "\ud800", ["a"], [[]], [{}], {"": 0}]


def places(value, at=()):
    """Where in a JSON value there are values: paths of keys."""
    for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*at, key)
        if isinstance(inside, (dict, list)):
            yield from places(inside, (*at, key))


def with_value(row, place, value):
    row = copy.deepcopy(row)
    inside = row
    for key in place[:-1]:
        inside = inside[key]
    if value is places:  # taken out
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    return row


@pytest.mark.parametrize("point_format", ["spec", "released"])
@pytest.mark.parametrize("kind", range(len(EVERYTHING)), ids=["video", "image", "images", "text"])
def test_whatever_stands_in_a_field_the_line_is_used_or_refused(folder, tokenizer, kind, point_format):
    """Each field of a line, one at a time, taken out or with each odd value: no other exception comes through."""
    planner, row, used, refused = planner_of(tokenizer, point_format), EVERYTHING[kind], 0, 0
    planner.plan(parse_record(json.dumps(row).encode()), str(folder), random.Random(0))
    for place in places(row):
        for value in (places, *ODD):
            changed = with_value(row, place, value)
            try:
                planner.plan(parse_record(json.dumps(changed).encode()), str(folder), random.Random(0))
                used += 1
            except (BadRecord, BadMedia):
                refused += 1
            except Exception as e:
                pytest.fail(f"{type(e).__name__}: {e}: {changed}")
    assert used > 20 and refused > 20


@pytest.mark.parametrize("point_format", ["spec", "released"])
def test_a_style_that_does_not_suit_its_media_ends_no_run(point_format):
    """Each style with each task on each kind of line, points or an answer given, no prompt."""
    written, refused = 0, 0
    for kind, more in (("video", dict(t=0.5)), ("image", {}), ("images", dict(image=1)), (None, {})):
        names = {"images": ["a.png", "b.png"]}.get(kind, "a")
        point, row = dict(x=0.5, y=0.5, id=0, **more), {kind: names} if kind else {}
        for task in TASKS:
            for style in (None, "mine", *sorted(FORMS)):
                for body in (dict(answer="x"), dict(points=[point], input_points=[point]), dict(points=[])):
                    a = dict(task=task, **body, **({"style": style} if style else {}))
                    try:
                        parse_record(json.dumps(dict(row, annotations=[a])).encode())
                    except BadRecord:
                        refused += 1
                        continue
                    question, said = to_messages(a, kind, random.Random(0), point_format)
                    assert isinstance(question["content"], str) and isinstance(said["content"], str)
                    written += 1
    assert written > 900 and refused > 1000


# ---- paths -------------------------------------------------------------------------------------------------

LINKS = {"file.png": "../setB/a.png", "twice.png": "file.png", "absolute.png": None, "sub": "../setB",
         "deep/sub": "../../setB", "round": "sub", "up": "..", "itself": "."}


def test_a_link_into_a_sibling_folder_of_like_name_is_refused(tmp_path):
    """From data/set into data/setB: to a file, a folder, another link, over an absolute path."""
    for name in ("set", "setB", "se", "set.old"):
        picture(tmp_path / name / "a.png", "red")
    base = tmp_path / "set"
    (base / "deep").mkdir()
    for name, target in LINKS.items():
        os.symlink(target or tmp_path / "setB" / "a.png", base / name)
    os.symlink("../set.old/a.png", base / "old.png")
    os.symlink("../se/a.png", base / "shorter.png")
    for folder in (base, f"{base}/", os.path.relpath(base), tmp_path / "se" / ".." / "set"):
        for name in ("file.png", "twice.png", "absolute.png", "sub/a.png", "deep/sub/a.png", "round/a.png",
                     "up/setB/a.png", "itself/file.png", "old.png", "shorter.png", "sub", "sub/missing.png"):
            with pytest.raises(BadMedia, match="link out"):
                inside_folder(str(folder), name)
        for name in ("a.png", "./a.png", "itself/a.png", "up/set/a.png", "missing.png", "deep/new/b.png"):
            inside_folder(str(folder), name)
        for name in ("../setB/a.png", "deep/../../setB/a.png", "..", "deep\\..\\..\\setB\\a.png",
                     f"{tmp_path}/set/a.png", "file://a.png", "", None, 5, "a.png\0"):
            with pytest.raises(BadMedia):
                inside_folder(str(folder), name)


def test_a_folder_that_is_a_link_keeps_its_own_media(tmp_path):
    picture(tmp_path / "disk" / "a.png", "red")
    picture(tmp_path / "diskB" / "a.png", "red")
    os.symlink("disk", tmp_path / "data")
    os.symlink("../diskB", tmp_path / "disk" / "sub")
    assert image_size(inside_folder(str(tmp_path / "data"), "a.png")) == (30, 24)
    with pytest.raises(BadMedia, match="link out"):
        inside_folder(str(tmp_path / "data"), "sub/a.png")


def test_what_is_no_file_is_not_even_opened(tmp_path, monkeypatch):
    """A pipe would be read for ever, a device without end."""
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "zero")
    os.mkdir(tmp_path / "folder")

    def opened(path, *args, **kw):
        raise AssertionError(f"{path} was opened")
    monkeypatch.setattr(media.Image, "open", opened)
    monkeypatch.setattr(media, "open", opened, raising=False)
    for name in ("pipe", "zero", "folder", "missing"):
        for read in (image_size, load_image, video_duration, lambda path: load_frames(path, [0.0])):
            with pytest.raises(BadMedia, match=f"{name}: no such file"):
                read(str(tmp_path / name))


def test_sound_alone_is_no_video(tmp_path):
    path = str(tmp_path / "a.mkv")
    with av.open(path, "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for read in (video_duration, lambda path: load_frames(path, [0.0])):
        with pytest.raises(BadMedia, match="no video stream"):
            read(path)


# ---- images ------------------------------------------------------------------------------------------------

READ = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
FITS = b"".join(line.ljust(80) for line in (
    b"SIMPLE  =                    T", b"BITPIX  =                    8", b"NAXIS   =                    2",
    b"NAXIS1  =                    4", b"NAXIS2  =                    4", b"END")).ljust(2880) + bytes(2880)
WRITTEN = ("EPS", "PPM", "TGA", "PCX", "SGI", "ICO", "ICNS", "DDS", "MSP", "XBM", "JPEG2000", "QOI",
           "BLP", "DIB")
BY_HAND = {"FITS": FITS, "XPM": b'/* XPM */\nstatic char *a[] = {\n"1 1 1 1",\n"a c #000000",\n"a"\n};\n',
           "PSD": b"8BPS\0\1" + bytes(6) + b"\0\3" + b"\0\0\0\4\0\0\0\4\0\x08\0\3" + bytes(200),
           "FLI": b"\0\0\0\0\x11\xaf\1\0\4\0\4\0\x08\0\3\0" + bytes(200),
           "GBR": b"\0\0\0\x1c\0\0\0\1\0\0\0\4\0\0\0\4\0\0\0\1" + bytes(60)}


@pytest.mark.parametrize("kind", [*WRITTEN, *BY_HAND])
def test_a_format_outside_the_list_is_refused_under_any_name(tmp_path, kind):
    """Pillow would open it, and with some of them start other programs."""
    paths = [str(tmp_path / f"a.{end}") for end in ("png", "jpg", "tiff", kind.lower())]
    for path in paths:
        if kind in BY_HAND:
            with open(path, "wb") as f:
                f.write(BY_HAND[kind])
        else:
            try:
                mode = {"MSP": "1", "XBM": "1", "BLP": "P"}.get(kind, "RGB")
                Image.new(mode, (32, 32)).save(path, kind)
            except (KeyError, OSError) as e:
                pytest.skip(f"this Pillow does not write it: {e}")
        with Image.open(path) as image:
            assert image.format == kind  # so there is something to refuse
        for read in (open_image, image_size, load_image):
            with pytest.raises(BadMedia, match=os.path.basename(path)):
                read(path)


@pytest.mark.parametrize("kind", READ)
def test_a_format_on_the_list_is_read_under_any_name(tmp_path, kind):
    for end in ("png", "jpg", "eps", "mp4"):
        path = str(tmp_path / f"a.{end}")
        Image.new("RGB", (32, 24), (200, 10, 10)).save(path, kind)
        assert image_size(path) == (32, 24) and abs(int(load_image(path)[5, 5, 0]) - 200) < 8


def test_images_are_refused_from_64_megapixels_on_and_not_before(tmp_path):
    for size, fine in (((8000, 8000), True), ((8001, 8000), False), ((8000, 8001), False), ((64_000_000, 1), True),
                       ((1, 64_000_001), False), ((30_000, 30_000), False), ((9_000, 9_000), False)):
        (tmp_path / "a.png").write_bytes(png(*size))
        if fine:
            assert image_size(str(tmp_path / "a.png")) == size
        else:
            for read in (image_size, load_image):
                with pytest.raises(BadMedia, match="64 megapixels|decompression bomb"):
                    read(str(tmp_path / "a.png"))


# ---- videos ------------------------------------------------------------------------------------------------

def claims(path, width, height):
    """An AVI whose header says another size than its frames have."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("huffyuv", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv422p"
        for i in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv422p")))
        container.mux(stream.encode())
    whole = bytearray(path.read_bytes())
    at = whole.index(b"strf") + 12
    assert whole[at:at + 8] == struct.pack("<ii", 64, 48)
    whole[at:at + 8] = struct.pack("<ii", width, height)
    path.write_bytes(whole)
    return str(path)


@pytest.mark.parametrize("size", [(30_000, 30_000), (9_000, 9_000), (8_001, 8_000), (8_000, 8_001), (64_000_001, 1)])
def test_a_video_header_of_huge_frames_is_refused_before_decoding(tmp_path, size, monkeypatch):
    path = claims(tmp_path / "a.avi", *size)
    monkeypatch.setattr(media, "frames_of", None)
    for read in (video_duration, lambda path: load_frames(path, [0.0])):
        with pytest.raises(BadMedia, match=r"a\.avi.*64 megapixels"):
            read(path)


def test_a_video_of_64_megapixels_is_still_read(tmp_path):
    assert abs(video_duration(claims(tmp_path / "a.avi", 8_000, 8_000)) - 0.3) < 0.2


def flat_png(width, height):
    """All of its pixels are there, and black: a million to the kilobyte."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    pixels = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("end", ["mov", "avi"])
def test_a_huge_frame_behind_small_ones_is_refused_before_decoding(tmp_path, end, monkeypatch):
    """The header says 64 x 48, and so do the first frames."""
    path = str(tmp_path / f"a.{end}")
    with av.open(path, "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "gray"
        for i in range(9):
            packet = av.Packet(flat_png(8_100, 8_000) if i == 8 else flat_png(64, 48))
            packet.pts = packet.dts = i
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 10), stream, True
            container.mux(packet)
    assert os.path.getsize(path) < 50_000
    assert [f.shape for f in load_frames(path, [0.0, 0.4])] == [(48, 64, 3)] * 2
    for plan in (media.frame_plan, lambda *a: None):  # None: every frame is decoded, in turn
        monkeypatch.setattr(media, "frame_plan", plan)
        with pytest.raises(BadMedia, match=rf"a\.{end}"):
            load_frames(path, [0.0, 0.8])


LISTS = {"m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n%s\n#EXT-X-ENDLIST\n",
         "concat": b"ffconcat version 1.0\nfile '%s'\n"}


def try_reading(path):
    for read in (video_duration, lambda path: load_frames(path, [0.0])):
        with pytest.raises(BadMedia, match=os.path.basename(path)):
            read(path)


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_files_dressed_as_a_video_opens_nothing(tmp_path, kind, monkeypatch):
    """Refused by its first bytes; and, were they let through, by the container's name."""
    secret = video(tmp_path / "secret.ts")
    path = tmp_path / "a.mp4"
    path.write_bytes(LISTS[kind] % secret.encode())
    try_reading(str(path))
    monkeypatch.setattr(media, "MAGIC", {(0, LISTS[kind][:7]): "mov"})
    try_reading(str(path))


@pytest.mark.parametrize("kind", LISTS)
def test_a_demuxer_that_is_not_the_one_told_cannot_be_used(tmp_path, kind, monkeypatch):
    """The last line of defence: neither the first bytes nor the container's name stop it, the whitelist does."""
    secret = video(tmp_path / "secret.ts")
    path = tmp_path / "a.m3u8"
    path.write_bytes(LISTS[kind] % b"secret.ts")
    real, given = av.open, []

    def guess(file, *args, format=None, options=None, **kw):
        given.append(options)
        return real(file, *args, options=options, **kw)
    monkeypatch.setattr(media, "MAGIC", {(0, LISTS[kind][:7]): "mov", **media.MAGIC})
    monkeypatch.setattr(media.av, "open", guess)
    assert video_duration(secret) > 1  # a right one passes
    try_reading(str(path))
    rest = {k: v for k, v in given[-1].items() if k != "format_whitelist"}
    with real(str(path), options=rest) as container:
        assert container.streams.video  # and without it the list would have been followed


CONTAINERS = {"mp4": "mpeg4", "mov": "mpeg4", "mkv": "mpeg4", "avi": "mpeg4", "ts": "mpeg2video", "mpg": "mpeg2video",
              "flv": "flv", "wmv": "msmpeg4", "gif": "gif", "ogv": "libtheora"}


@pytest.mark.parametrize("end", CONTAINERS)
def test_every_container_is_opened_as_itself_and_from_files_alone(tmp_path, end, monkeypatch):
    """Told by its first bytes, not by its name; and nothing but files may be opened on its behalf."""
    if CONTAINERS[end] not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {CONTAINERS[end]}")
    with av.open(str(tmp_path / f"a.{end}"), "w") as container:
        stream = container.add_stream(CONTAINERS[end], rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "rgb8" if end == "gif" else "yuv420p"
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())
    path = str(tmp_path / "a.html")
    os.rename(tmp_path / f"a.{end}", path)
    real, seen = av.open, []
    monkeypatch.setattr(media.av, "open", lambda *a, **kw: seen.append(kw) or real(*a, **kw))
    first, last = load_frames(path, [0.0, 0.3])
    assert abs(first.mean() - 0) < 30 and abs(last.mean() - 140) < 40
    name = {"mp4": "mov", "mkv": "matroska", "ts": "mpegts", "mpg": "mpeg", "wmv": "asf", "ogv": "ogg"}.get(end, end)
    assert seen and all(kw["format"] == kw["options"]["format_whitelist"] == name for kw in seen)
    assert all(kw["options"]["protocol_whitelist"] == "file" for kw in seen)


# ---- files that change -------------------------------------------------------------------------------------

def test_a_file_edited_in_place_with_equal_length_is_read_anew(tmp_path, tokenizer):
    """Its size is the same, and the time of change differs by a thousandth of a second."""
    path = tmp_path / "rows.jsonl"
    a = [json.dumps(dict(annotations=[dict(task="text", prompt="?", answer=word)])) for word in ("aaaa", "bb")]
    path.write_text("\n".join(a) + "\n")
    os.utime(path, ns=(10 ** 18, 10 ** 18 + 1_000_000))
    before = Dataset("rows", [str(path)])
    words = lambda d: [parse_record(d.line(i)[0])["annotations"][0]["answer"] for i in range(len(d))]
    prints = lambda d: Stream([(d, 1.0)], planner_of(tokenizer), 0).fingerprint()
    assert words(before) == ["aaaa", "bb"] and line_index(str(path))[2:, 0].tolist() == [0, len(a[0]) + 1]
    was = prints(before)
    with open(path, "r+") as f:  # the lines change places: other offsets, equal length
        f.write("\n".join(a[::-1]) + "\n")
    os.utime(path, ns=(10 ** 18, 10 ** 18 + 2_000_000))
    after = Dataset("rows", [str(path)])
    assert words(after) == ["bb", "aaaa"] and line_index(str(path))[2:, 0].tolist() == [0, len(a[1]) + 1]
    assert prints(after) != was  # --resume refuses it
    with open(path, "r+") as f:  # one letter, no line moves
        f.write(a[1].replace("bb", "cb"))
    os.utime(path, ns=(10 ** 18, 10 ** 18 + 3_000_000))
    third = Dataset("rows", [str(path)])
    assert words(third) == ["cb", "aaaa"] and prints(third) not in (was, prints(after))


def test_clips_of_one_video_come_through_the_workers_cache_as_they_are(folder, tokenizer):
    """Rows that name the same file, from other moments and of other lengths; every epoch, kept or decoded anew."""
    rows = [film_row(), film_row(start=0.5), film_row(start=1, end=1.5), film_row(end=0.5), film_row(start=0.5, end=1),
            image_row()]
    path, seen = write_lines(folder / "rows.jsonl", rows), []
    for load in (load_crops, CropCache(10 ** 8)):
        stream = Stream([(Dataset("rows", [path]), 1.0)], planner_of(tokenizer), 0)
        seen.append([])
        for packed in itertools.islice(stream.sequences(), 12):
            seen[-1].append(decode_packed(packed, stream.planner.cfg, stream.planner.seq_len, load).decoded[1])
    assert len({crop.tobytes() for crops in seen[0] for crop in crops}) == len(rows)
    for anew, kept in zip(*seen):
        assert len(anew) == len(kept) and all(np.array_equal(a, b) for a, b in zip(anew, kept))
