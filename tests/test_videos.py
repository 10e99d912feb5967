"""Videos drawn by lot, as people's are: any codec and container, even and uneven rates, frames out of order, tracks that
start and end apart, one frame alone, a last frame that stands, turned and mirrored. What `lib/media.py` reads, with as
little decoding as it can, is what decoding everything gives.

    python tests/test_videos.py 300        # that many, one per seed; names the seeds that fail
"""
import random
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.media import (load_frames, load_frames_in_turn, sample_times, turned,  # noqa: E402
                       video_duration)

# container: (picture codecs, sound codecs, does it keep how long the last frame stands, can times be uneven)
KINDS = {"mp4": (("libx264", "libx265", "mpeg4"), ("aac",), True, True),
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
    if steps[-1] >= 400:
        bframes = 0  # else the last frame's packet is not the last, and its duration is not written
    length = sum(steps)
    return dict(container=container, codec=codec, rate=rate, steps=steps, late=late, sound=sound,
                sound_late=rng.choice((0, 0, 300, 1500)) if container in ("mp4", "mov", "mkv", "webm", "ts", "flv") else 0,
                sound_length=rng.choice((length, length // 2 + 100, length + 700, length + 5000)),
                bframes=bframes, keyint=rng.choice((1, 4, 12, 250)), open_gop=rng.random() < 0.4,
                matrix=rng.choice(list(TURNS)) if container in ("mp4", "mov") else (1, 0, 0, 1))


def levels(i, size):
    """Frame i: each corner another grey, none like that of a frame nearby."""
    w, h = size
    pixels = np.full((h, w, 3), 60 + 37 * i % 120, np.uint8)
    pixels[:h // 2, :w // 2] += 70
    pixels[h // 2:, :w // 2] -= 50
    return pixels


def write(path, recipe):
    """Make the video of a recipe."""
    kind = recipe["container"]
    with av.open(str(path), "w", format={"wmv": "asf", "mkv": "matroska", "ts": "mpegts", "mpg": "mpeg"}.get(kind, kind)) as out:
        stream = out.add_stream(recipe["codec"], rate=recipe["rate"])
        size = (96, 64) if recipe["codec"] == "libx265" else (48, 32)  # it is not safe for smaller ones
        stream.width, stream.height = size
        stream.pix_fmt = {"gif": "gray", "mjpeg": "yuvj420p"}.get(recipe["codec"], "yuv420p")
        if recipe["codec"] not in BY_RATE:
            stream.codec_context.time_base = Fraction(1, 100) if kind == "gif" else MS
        if recipe["codec"] in ("libx264", "libx265"):
            name = "x264-params" if recipe["codec"] == "libx264" else "x265-params"
            quiet = "" if recipe["codec"] == "libx264" else "log-level=none:pools=none:frame-threads=1:"
            stream.options = {name: f"{quiet}bframes={recipe['bframes']}:keyint={recipe['keyint']}:"
                                    f"open-gop={int(recipe['open_gop'])}:scenecut=0", "preset": "ultrafast"}
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
            frame = av.VideoFrame.from_ndarray(levels(i, size), format="rgb24").reformat(format=stream.pix_fmt)
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
                frame.sample_rate, frame.pts, frame.time_base = 48000, recipe["sound_late"] * 48 + k * n, Fraction(1, 48000)
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
        sound = [p for p in container.demux(audio=0) if p.pts is not None] if container.streams.audio else []
        if sound:
            begins.append(max(sound[0].pts * sound[0].time_base, 0))
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
        assert abs(duration - max(end, last + step)) < 0.05, (duration, end, last + step)
    else:
        assert last - 0.05 <= duration and end - 0.05 <= duration <= max(end, last + 1.2 * step) + 0.1, (duration, end, last)
    rng = random.Random(len(frames))
    clip = sorted(rng.uniform(0, duration) for _ in range(4))
    inside = [t + 1e-4 for t, _ in frames]
    for times in (sample_times(duration, 8), clip, clip[2:], [duration], inside, inside[len(inside) // 2:]):
        want = []
        for t in times:
            shown = frames[0][1]
            for begin, pixels in frames:
                if begin <= t + 1e-6:
                    shown = pixels
            want.append(TURNS[recipe["matrix"]](shown))
        for got in (load_frames(str(path), times), load_frames_in_turn(str(path), times, lambda f: f)):
            assert len(got) == len(want)
            for t, g, w in zip(times, got, want):
                g = g if isinstance(g, np.ndarray) else TURNS[recipe["matrix"]](g.to_ndarray(format="rgb24"))
                assert g.shape == w.shape and np.array_equal(g, w), (t, [b for b, _ in frames], duration)


if __name__ == "__main__":
    import tempfile
    import collections
    made = collections.Counter()
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        recipe = draw(seed)
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(Path(folder) / f"a.{recipe['container']}", recipe)
                made[recipe["container"]] += 1
            except Exception as e:
                print(seed, repr(e)[:300], recipe, flush=True)
    print(made)
