"""Videos drawn by lot, as people's are: any codec and container, even and uneven rates, frames out of order, tracks
that start and end apart, one frame alone, a last frame that stands, turned and mirrored. What `lib/media.py` reads
with as little decoding as it can is what decoding everything gives.

    python tests/test_videos.py 0 300      # so many, one per seed; names the seeds that fail
"""
import random
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import shared, video  # noqa: E402
from lib import media  # noqa: E402
from lib.errors import BadMedia  # noqa: E402
from lib.media import frames_in_turn, load_frames, sample_times, video_duration  # noqa: E402

# container: (picture codecs, sound codecs, does it keep how long the last frame stands, can times be uneven)
KINDS = {"mp4": (("libx264", "mpeg4"), ("aac",), True, True),
         "mov": (("libx264", "mjpeg"), ("aac", "pcm_s16le"), True, True),
         "mkv": (("libx264", "mjpeg", "ffv1", "mpeg4"), ("aac", "libopus", "pcm_s16le"), True, True),
         "webm": (("libvpx-vp9", "libvpx"), ("libopus",), True, True),
         "ts": (("libx264", "mpeg2video"), ("aac", "mp2"), False, True),
         "mpg": (("mpeg2video",), ("mp2",), False, False),
         "avi": (("mpeg4", "mjpeg"), ("libmp3lame",), False, False),
         "flv": (("libx264", "flv"), ("aac",), False, True),
         "wmv": (("msmpeg4",), ("wmav2",), False, False),
         "gif": (("gif",), (), True, True)}
# the display matrix (a, b, c, d) -> how the stored frame is turned to be seen
TURNS = {(1, 0, 0, 1): lambda p: p, (0, 1, -1, 0): lambda p: np.rot90(p, 3), (-1, 0, 0, -1): lambda p: np.rot90(p, 2),
         (0, -1, 1, 0): lambda p: np.rot90(p, 1), (-1, 0, 0, 1): np.fliplr, (1, 0, 0, -1): np.flipud,
         (0, 1, 1, 0): lambda p: p.transpose(1, 0, 2), (0, -1, -1, 0): lambda p: np.rot90(p.transpose(1, 0, 2), 2)}
BY_RATE = ("mpeg4", "mpeg2video", "msmpeg4", "flv")  # codecs whose frames come at an even rate
MS = Fraction(1, 1000)


def draw(seed):
    """The recipe of a video: plain fields, all times in milliseconds."""
    rng = random.Random(seed)
    container = rng.choice(list(KINDS))
    codecs, sounds, keeps_last, uneven = KINDS[container]
    bframes = rng.choice((0, 0, 2, 4))
    n = rng.choice((1, 2, 3, rng.randint(4, 40), rng.randint(4, 40)))
    if container == "ts":
        n += 8  # FFmpeg does not recognise a shorter file
    rate = rng.choice((1, 5, 10, 25) if uneven else (25,))
    step = 1000 // rate
    steps = [step] * n
    codec = rng.choice(codecs)
    if uneven and codec not in BY_RATE and rng.random() < 0.5:
        steps = [rng.choice((20, 30, 50, 100, 330, 1000)) for _ in range(n)]
    if keeps_last and rng.random() < 0.4:
        steps[-1] = rng.choice((400, 3000, 20000))
    sound = rng.choice((None, *sounds))
    late = 0 if container in ("avi", "gif", "mpg", "wmv") else rng.choice((0, 0, 40, 500, 2000))
    if codec in BY_RATE:
        late -= late % step
    if container == "flv":
        late = late if sound else 0  # its header gives the length, which is not the end if all starts late
    if steps[-1] >= 400:
        bframes = 0  # else the last frame's packet is not the last, and its duration is not written
    length = sum(steps)
    sound_late = rng.choice((0, 0, 300, 1500)) if container in ("mp4", "mov", "mkv", "webm", "ts") else 0
    return dict(container=container, codec=codec, rate=rate, steps=steps, late=late, sound=sound,
                sound_late=sound_late,
                sound_length=rng.choice((length, length // 2 + 100, length + 700, length + 5000)),
                bframes=bframes, keyint=rng.choice((1, 4, 12, 250)), open_gop=rng.random() < 0.4,
                matrix=rng.choice(list(TURNS)) if container in ("mp4", "mov") else (1, 0, 0, 1))


def levels(i):
    """Frame i: each corner another grey, none like that of a frame nearby."""
    pixels = np.full((32, 48, 3), 60 + 37 * i % 120, np.uint8)
    pixels[:16, :24] += 70
    pixels[16:, :24] -= 50
    return pixels


def write(path, recipe):
    """Make the video of a recipe."""
    kind = recipe["container"]
    with av.open(str(path), "w") as out:
        stream = out.add_stream(recipe["codec"], rate=recipe["rate"])
        stream.width, stream.height = 48, 32
        stream.pix_fmt = {"gif": "gray", "mjpeg": "yuvj420p"}.get(recipe["codec"], "yuv420p")
        if recipe["codec"] not in BY_RATE:
            stream.codec_context.time_base = Fraction(1, 100) if kind == "gif" else MS
        if recipe["codec"] == "libx264":
            stream.options = {"x264-params": f"bframes={recipe['bframes']}:keyint={recipe['keyint']}:scenecut=0:"
                                             f"open-gop={int(recipe['open_gop'])}", "preset": "ultrafast"}
        else:
            stream.codec_context.gop_size = recipe["keyint"]
            if recipe["codec"] in ("mpeg4", "mpeg2video") and kind != "avi":
                stream.codec_context.max_b_frames = min(recipe["bframes"], 2)
        sound = out.add_stream(recipe["sound"], rate=48000, layout="mono") if recipe["sound"] else None
        begins = [recipe["late"] + sum(recipe["steps"][:i]) for i in range(len(recipe["steps"]) + 1)]
        if sound:
            sound.bit_rate = 64000
        packets = []
        for i, begin in enumerate(begins[:-1]):
            frame = av.VideoFrame.from_ndarray(levels(i), format="rgb24").reformat(format=stream.pix_fmt)
            base = stream.codec_context.time_base or Fraction(1, recipe["rate"])
            frame.pts, frame.time_base = round(begin * MS / base), base
            packets += stream.encode(frame)
        packets += stream.encode()
        ordered = sorted((p for p in packets if p.size), key=lambda p: p.pts)
        for p, step in zip(ordered, recipe["steps"]):
            p.duration = round(step * MS / p.time_base)
        if sound:
            n = sound.codec_context.frame_size or 1024
            for k in range(max(recipe["sound_length"] * 48 // n, 1)):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, n), np.int16), format="s16", layout="mono")
                frame.sample_rate, frame.time_base = 48000, Fraction(1, 48000)
                frame.pts = recipe["sound_late"] * 48 + k * n
                packets += sound.encode(frame)
            packets += sound.encode()
        for p in sorted((p for p in packets if p.dts is not None), key=lambda p: p.dts * p.time_base):
            out.mux(p)
    if recipe["matrix"] != (1, 0, 0, 1):
        whole, (a, b, c, d) = bytearray(path.read_bytes()), recipe["matrix"]
        at = whole.index(b"tkhd") + 44  # the picture's track is the first
        whole[at:at + 36] = b"".join(int(v * 65536).to_bytes(4, "big", signed=True)
                                     for v in (a, b, 0, c, d, 0, 0, 0, 16384))
        path.write_bytes(whole)


def decode_everything(path):
    """([(seconds from the start of the file, pixels as stored)] of all frames, seconds to the end of what was decoded):
    by PyAV alone, in the order in which frames come."""
    frames, begins, ends = [], [], []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            frames.append((frame.pts * frame.time_base, frame.to_ndarray(format="rgb24")))
            ends.append((frame.pts + (frame.duration or 0)) * frame.time_base)
    begins.append(frames[0][0])
    with av.open(str(path)) as container:
        # the decoder of Windows Media leaves out what it decodes first
        read = container.demux if path.suffix == ".wmv" else container.decode
        sound = [p for p in read(audio=0) if p.pts is not None] if container.streams.audio else []
        if sound:
            begins.append(sound[0].pts * sound[0].time_base)
            ends.append((sound[-1].pts + (sound[-1].duration or 0)) * sound[-1].time_base)
    start = min(begins)
    return [(float(t - start), pixels) for t, pixels in frames], float(max(ends) - start)


def check(path, recipe):
    """AssertionError where media reads another video than the one that decoding everything gives."""
    write(path, recipe)
    frames, end = decode_everything(path)
    last = frames[-1][0]
    keeps_last = KINDS[recipe["container"]][2]
    step = recipe["steps"][-1] / 1000
    duration = video_duration(str(path))
    if keeps_last:
        assert abs(duration - max(end, last + step)) < 0.11, (duration, end, last + step)
    else:  # FFmpeg guesses how long the last frame stands
        assert max(last, end) - 0.11 < duration < max(end, last + 1.2 * max(recipe["steps"]) / 1000) + 0.11
    rng = random.Random(len(frames))
    clip = sorted(rng.uniform(0, duration) for _ in range(4))
    inside = sorted(t + 1e-4 for t, _ in frames)
    for times in (sample_times(duration, 8), clip, clip[2:], [duration], inside, inside[len(inside) // 2:]):
        want = []
        for t in times:
            shown = frames[0][1]
            for begin, pixels in frames:
                if begin > t + 1e-6:
                    break
                shown = pixels
            want.append(TURNS[recipe["matrix"]](shown))
        for got in (load_frames(str(path), times), list(frames_in_turn(str(path), times, lambda f: f))):
            assert len(got) == len(want)
            for t, g, w in zip(times, got, want):
                g = g if isinstance(g, np.ndarray) else TURNS[recipe["matrix"]](g.to_ndarray(format="rgb24"))
                assert g.shape == w.shape and np.array_equal(g, w), (t, [b for b, _ in frames], duration)


def recipe_of(container, codec, steps, **fields):
    """A recipe with nothing special in it but what is named."""
    plain = dict(rate=10, late=0, sound=None, sound_late=0, sound_length=0, bframes=0, keyint=12, open_gop=False,
                 matrix=(1, 0, 0, 1))
    return dict(plain, container=container, codec=codec, steps=steps, **fields)


def can_write(recipe):
    return {recipe["codec"], recipe["sound"] or recipe["codec"]} <= av.codecs_available


@pytest.mark.parametrize("seed", range(25))
def test_any_video_is_read_as_decoding_everything_reads_it(tmp_path, seed):
    recipe = draw(seed)
    if not can_write(recipe):
        pytest.skip(f"this PyAV cannot write {recipe['codec']} and {recipe['sound']}")
    check(tmp_path / f"a.{recipe['container']}", recipe)


# What once failed, shrunk.
KEPT = {
    "its start is made up from the sound's": recipe_of("mkv", "libx264", [200, 200], sound="aac", sound_late=300,
                                                       sound_length=900, keyint=1),
    "its start is not told": recipe_of("mkv", "libx264", [1000] * 3, rate=1, late=500),
    "it is one frame, and its start is not told": recipe_of("mpg", "mpeg2video", [40], rate=25),
    "its header counts frames as they are decoded": recipe_of(
        "mp4", "libx264", [100, 100, 1000, 50, 1000], bframes=4, late=2000, sound="aac", sound_length=3430, keyint=4),
    "its packets do not tell how long they last": recipe_of(
        "flv", "libx264", [1000, 1000], rate=1, late=500, sound="aac", sound_length=1100),
    "seeking in it fails": recipe_of("ts", "libx264", [100] * 10, sound="mp2", sound_length=200, keyint=1),
    "a time comes twice": recipe_of("mpg", "mpeg2video", [40] * 33, rate=25, bframes=2, keyint=4),
    "sound is heard before the first frame and after the last": recipe_of(
        "mov", "libx264", [100] * 5, late=500, sound="aac", sound_length=3000, bframes=2, matrix=(0, -1, -1, 0)),
    "its sound is encoded with a run-in": recipe_of("webm", "libvpx-vp9", [100] * 5, late=40, sound="libopus",
                                                    sound_length=500)}


@pytest.mark.parametrize("name", KEPT)
def test_videos_that_were_once_read_wrongly(tmp_path, name):
    if not can_write(KEPT[name]):
        pytest.skip("this PyAV cannot write it")
    check(tmp_path / f"a.{KEPT[name]['container']}", KEPT[name])


# ---- by hand -----------------------------------------------------------------------------------------------

def first_level(pixels):
    """Which frame of `levels` this is, of the first few."""
    return min(range(10), key=lambda i: abs(levels(i).astype(int) - pixels).mean())


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_times_count_from_where_the_sound_begins(tmp_path, container):
    """The picture comes 2 s after it and goes on for half a second; the sound ends with it."""
    path = tmp_path / f"a.{container}"
    write(path, recipe_of(container, "libx264", [100] * 5, late=2000, sound="aac", sound_length=2500))
    assert video_duration(str(path)) == pytest.approx(2.5, abs=0.03)
    times = [0.0, 1.9, 2.05, 2.15, 2.45, 2.5]
    assert [first_level(f) for f in load_frames(str(path), times)] == [0, 0, 0, 1, 4, 4]
    for clip, seen in (([2.15, 2.45, 2.5], [1, 4, 4]), ([1.0, 1.9, 2.35], [0, 0, 3])):
        assert [first_level(f) for f in load_frames(str(path), clip)] == seen


@pytest.mark.parametrize("container, codec, sound", [
    ("mp4", "libx264", "aac"), ("mkv", "libx264", "libopus"), ("webm", "libvpx-vp9", "libopus"),
    ("mov", "mjpeg", "pcm_s16le")])
def test_a_still_or_slides_under_speech_last_as_long_as_the_speech(tmp_path, container, codec, sound):
    for name, steps in (("still", [100]), ("slides", [3000, 2000, 100])):
        path = tmp_path / f"{name}.{container}"
        write(path, recipe_of(container, codec, steps, sound=sound, sound_length=20000))
        assert video_duration(str(path)) == pytest.approx(20, abs=0.05)
        seen = [first_level(f) for f in load_frames(str(path), [0.0, 2.9, 3.1, 5.1, 19.9])]
        assert seen == ([0] * 5 if name == "still" else [0, 0, 1, 2, 2])


def test_sound_that_is_a_little_longer_does_not_count(tmp_path):
    path = tmp_path / "a.mp4"
    for more, seconds in ((0, 2.0), (60, 2.0), (1000, 3.0)):
        write(path, recipe_of("mp4", "mpeg4", [100] * 20, sound="aac", sound_length=2000 + more))
        assert video_duration(str(path)) == (seconds if more < 100 else pytest.approx(seconds, abs=0.03))


def test_the_last_packet_of_a_file_is_not_the_last_frame(tmp_path):
    """Without a duration in the header, and with frames that stand before the one that they follow."""
    path = str(tmp_path / "a.mkv")
    with av.open(path, "w", options={"live": "1"}) as out:
        stream = out.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.options = {"x264-params": "bframes=3:b-adapt=0:keyint=50:scenecut=0"}
        for i in range(9):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(levels(i), format="rgb24")))
        out.mux(stream.encode())
    with av.open(path) as container:
        pts = [p.pts for p in container.demux(video=0) if p.pts is not None]
        assert container.duration is None and pts[-1] != max(pts)
    assert video_duration(path) == pytest.approx(1.8, abs=0.01)


@pytest.mark.parametrize("container, codec", [("mp4", "mjpeg"), ("mkv", "mjpeg"), ("avi", "mjpeg"), ("flv", "flv"),
                                              ("wmv", "msmpeg4")])
def test_only_a_file_that_is_cut_is_called_truncated(tmp_path, container, codec):
    recipe = recipe_of(container, codec, [40] * 50, rate=25, keyint=1)
    whole = tmp_path / f"whole.{container}"
    write(whole, recipe)
    if container == "mp4":  # the index first, as on the web
        index_first = dict(movflags="faststart")
        with av.open(str(whole)) as old, av.open(str(tmp_path / "f.mp4"), "w", options=index_first) as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    new.mux(packet)
        whole = tmp_path / "f.mp4"
    with av.open(str(whole)) as opened:
        places = [packet.pos for packet in opened.demux(video=0)]
    cut = tmp_path / f"cut.{container}"
    cut.write_bytes(whole.read_bytes()[:places[30] + 5])
    assert not media.is_cut(str(whole)) and media.is_cut(str(cut))
    assert len(load_frames(str(whole), [0.0, 1.0, 2.0])) == 3
    if container == "wmv":
        return  # all 50 frames are in one of its packets
    assert len(load_frames(str(cut), [0.0, 0.4])) == 2  # what is there can be used
    with pytest.raises(BadMedia, match="cut.*truncated: its frames end at 1.* 2.0 s were asked for"):
        load_frames(str(cut), [0.0, 2.0])


def test_a_time_far_behind_the_end_is_refused_without_calling_the_file_truncated(tmp_path):
    path = video(tmp_path / "a.mp4")
    assert len(load_frames(path, [0.0, 2.9])) == 2
    with pytest.raises(BadMedia, match="a.mp4: is 2.0 s long, and 100.0 s were asked for"):
        load_frames(path, [0.0, 100.0])


def test_a_recording_without_sizes_is_not_truncated(tmp_path):
    path = str(tmp_path / "a.mkv")
    with av.open(path, "w", options={"live": "1"}) as out:
        stream = out.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(levels(0), format="rgb24").reformat(format="yuvj420p")))
    assert not media.is_cut(path) and len(load_frames(path, [0.0, 1.9])) == 2


@pytest.mark.parametrize("with_video", [True, False])
def test_a_cover_is_not_a_video(tmp_path, with_video):
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as out:
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        kind = "mpeg4" if with_video else "aac"
        stream = out.add_stream(kind, rate=10) if with_video else out.add_stream(kind, rate=48000, layout="mono")
        if with_video:
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        art = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 200, np.uint8), format="rgb24")
        out.mux(cover.encode(art.reformat(format="yuvj420p")))
        for i in range(20):
            if with_video:
                frame = av.VideoFrame.from_ndarray(levels(i), format="rgb24")
            else:
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
                frame.sample_rate = 48000
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    if with_video:
        assert video_duration(path) == 2.0 and load_frames(path, [0.0])[0].shape == (32, 48, 3)
    else:
        for read in (video_duration, lambda path: load_frames(path, [0.0])):
            with pytest.raises(BadMedia, match="no video stream"):
                read(path)


def test_two_recordings_joined_show_the_first_where_their_times_are_the_same(tmp_path):
    """`cat a.ts a.ts`: the clock starts anew."""
    write(tmp_path / "a.ts", recipe_of("ts", "libx264", [100] * 12))
    one = (tmp_path / "a.ts").read_bytes()
    (tmp_path / "b.ts").write_bytes(one + one)
    assert [first_level(f) for f in load_frames(str(tmp_path / "b.ts"), [0.0, 0.35, 0.75])] == [0, 3, 7]


def test_the_file_of_a_camcorder_is_recognised(tmp_path):
    """Transport stream in packets of 192 bytes, the first four a time."""
    write(tmp_path / "a.ts", recipe_of("ts", "libx264", [100] * 12))
    data = (tmp_path / "a.ts").read_bytes()
    path = tmp_path / "00001"
    path.write_bytes(b"".join(bytes(4) + data[i:i + 188] for i in range(0, len(data), 188)))
    assert [first_level(f) for f in load_frames(str(path), [0.0, 0.45])] == [0, 4]


@pytest.mark.parametrize("name", ["anim.gif", "long_audio.mkv", "screen_nob.mp4", "slight_more.webm", "still.mp4"])
def test_sound_videos_are_read_to_their_end(name):
    path = shared("cases", "last_frame_stands", name)
    frames = load_frames(path, sample_times(video_duration(path), 16))
    with av.open(path) as container:
        *_, last = container.decode(video=0)
    assert np.array_equal(frames[-1], last.to_ndarray(format="rgb24"))


def test_a_picture_that_starts_late_is_seen_when_it_is_heard():
    path = shared("cases", "picture_starts_late", "vids", "late_video.mp4")
    assert video_duration(path) == 4.0
    seen = [f.mean() for f in load_frames(path, [0.0, 3.05, 3.95])]
    assert np.abs(np.array(seen) - [0, 100, 190]).max() < 10


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_no_frame_is_decoded_to_learn_how_long_a_video_is(codec, tmp_path, monkeypatch):
    """Planning reads the header of each video that comes without a duration, on every rank; its decoder would take
    most of the time. The size of an mpeg4 stands in no table: there the first frame is decoded after all."""
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=10, width=64, height=48)
        for k in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 9 * k, np.uint8))))
        container.mux(stream.encode())
    formats = []  # of the pixels; only a decoder knows it
    open_video = media.open_video

    def watched(*args, **flags):
        container, stream = open_video(*args, **flags)
        formats.append(stream.codec_context.pix_fmt)
        return container, stream
    monkeypatch.setattr(media, "open_video", watched)
    assert video_duration(path) == 2
    assert formats[-1] == {"libx264": None, "mpeg4": "yuv420p"}[codec]
    assert [frame.shape for frame in load_frames(path, [0.0, 1.95])] == [(48, 64, 3)] * 2


if __name__ == "__main__":
    failed = []
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        recipe = draw(seed)
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(Path(folder) / f"a.{recipe['container']}", recipe)
            except Exception as e:
                failed.append(seed)
                print(seed, repr(e)[:300], recipe, flush=True)
    print(f"failed: {failed or 'none'}")
