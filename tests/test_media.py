"""Pictures and videos become the published crops, windows and tokens. The numbers are from FACTS 3.5 (the
official code, executed)."""
import bisect
import hashlib
import os
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from conftest import picture, shared, video

from lib import media
from lib.errors import BadMedia
from lib.media import (Layout, frame_layout, frames_in_turn, image_crops, image_layout, image_size, load_crops,
                       load_frames, load_image, open_video, pick_tiling, resize, sample_times, to_floats,
                       video_duration, windows)


# H, W, and for 8 and 24 crops: tiling, crops, high-resolution rows and columns, tokens in all
TABLE = [((50, 50), ((1, 1), 2, 14, 14, 410), None), ((378, 378), ((1, 1), 2, 14, 14, 410), None),
         ((480, 640), ((2, 2), 5, 23, 23, 752), None), ((500, 700), ((2, 3), 7, 23, 33, 982), None),
         ((720, 1280), ((2, 4), 9, 23, 42, 1189), ((3, 5), 16, 33, 52, 1949)),
         ((1080, 1920), ((2, 4), 9, 23, 42, 1189), ((4, 6), 25, 42, 61, 2804)),
         ((1920, 1080), ((4, 2), 9, 42, 23, 1208), ((6, 4), 25, 61, 42, 2823)),
         ((3000, 100), ((8, 1), 9, 80, 14, 1400), ((11, 1), 12, 109, 14, 1835))]


@pytest.mark.parametrize("size, eight, many", TABLE)
def test_crops_and_tokens_of_a_picture_are_the_published_ones(size, eight, many):
    for tiles, want in ((8, eight), (24, many)):
        if want:
            layout = image_layout(size[1], size[0], 27, 14, tiles)
            tiling, crops, rows, columns, total = want
            assert (layout.tiling, layout.n_crops, len(layout.tokens)) == (tiling, crops, total)
            assert layout.tokens.count("<image>") == len(layout.pool) == 196 + rows * columns
            assert layout.tokens.count("<image_col>") == rows


def test_windows_of_500_by_700():
    pool = image_layout(700, 500, 27, 14, 8).pool
    assert pool.shape == (955, 4)
    for row, want in ((0, [0, 1, 27, 28]), (13, [26, -1, 53, -1]), (14, [54, 55, 81, 82]),
                      (195, [728, -1, -1, -1]),
                      (196, [729, 730, 756, 757]), (-1, [5075, -1, 5102, -1])):
        assert pool[row].tolist() == want
    assert (pool < 0).any(1).sum() == 50
    assert hashlib.md5(pool.astype(np.int64).tobytes()).hexdigest()[:12] == "80f984175491"


def test_every_patch_of_the_enlarged_picture_is_shown_once():
    """Crops overlap, windows do not: laid out by their windows, patches are the enlarged picture again."""
    pixels = np.random.default_rng(0).integers(0, 256, (500, 700, 3), dtype=np.uint8)
    layout = image_layout(700, 500, 27, 14, 8)
    crops = image_crops(pixels, 27, 14, layout.tiling)
    assert crops.shape == (7, 729, 588)
    canvas = resize(to_floats(pixels), 2 * 266 + 112, 3 * 266 + 112)
    patches = crops.reshape(-1, 14, 14, 3)
    for m, (r, c) in enumerate((r, c) for r in range(23) for c in range(33)):
        for k, index in enumerate(layout.pool[196 + m]):
            y, x = (2 * r + k // 2) * 14, (2 * c + k % 2) * 14
            if index >= 0:
                assert np.array_equal(patches[index], canvas[y:y + 14, x:x + 14])
            else:
                assert y >= canvas.shape[0] or x >= canvas.shape[1]


def test_pooling_a_frame_by_three_needs_no_padding():
    grid = windows(np.arange(729).reshape(27, 27), 3)
    assert grid.shape == (9, 9, 9) and grid.min() == 0 and grid[0, 1].tolist() == [3, 4, 5, 30, 31, 32, 57,
                                                                                   58, 59]


def test_tiling_of_tiny_pictures():
    assert pick_tiling(1, 1, 266, 8) == (1, 1)


def test_any_picture_mode_becomes_rgb(tmp_path):
    for mode in ("L", "LA", "RGBA", "P", "1", "I;16", "CMYK"):
        path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
        Image.new(mode, (7, 5)).save(path)
        assert load_image(str(path)).shape == (5, 7, 3)


# ---- video -------------------------------------------------------------------------------------------------

def test_frames_are_those_shown_at_their_times(tmp_path):
    path = video(tmp_path / "a.mp4")
    assert abs(video_duration(path) - 2.0) < 1e-6
    times = sample_times(2.0, 128)
    assert times.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    levels = [round(f.mean() / 10) for f in load_frames(path, times)]
    assert levels == [0, 5, 10, 15, 19]  # at the very end the last frame is still shown
    assert [round(f.mean() / 10) for f in load_frames(path, [0.349, 0.351, 1.2])] == [3, 3, 12]
    crops = load_crops(path, Layout([], frame_layout(4), 2, times=(0.0, 1.0)), 4, 8)
    assert crops.shape == (2, 16, 192) and abs(crops[1].mean() - 100) < 5


def test_videos_that_cannot_be_used(tmp_path):
    good = open(video(tmp_path / "good.mp4"), "rb").read()
    (tmp_path / "cut.mp4").write_bytes(good[:len(good) // 3])
    # would open what it names
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost/x.ts\n")
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("cut.mp4", "list.mp4", "text.mp4", "missing.mp4"):
        with pytest.raises(BadMedia, match=name):
            load_frames(str(tmp_path / name), [0.0])
        with pytest.raises(BadMedia, match=name):
            video_duration(str(tmp_path / name))


def clip(path, codec, uneven=False, **options):
    """Four seconds of moving noise with key frames two seconds apart, or uneven times between frames."""
    noise = np.random.default_rng(0).integers(0, 255, (128, 192, 3), dtype=np.uint8)
    rng, t = np.random.default_rng(1), 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.options = 96, 64, "yuv420p", options
        stream.codec_context.gop_size, stream.codec_context.time_base = 60, Fraction(1, 1000)
        for i in range(120):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(noise[i % 64:, i // 2:][:64, :96]),
                                               format="rgb24")
            frame.pts, frame.time_base = t, Fraction(1, 1000)
            t += int(rng.integers(5, 70)) if uneven else 33 + (i % 3 == 0)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def everything(path, times):
    """The plain way: decode every frame, then choose."""
    container, stream = open_video(path)
    with container:
        begin, tick = stream.start_time or 0, float(stream.time_base)
        frames = sorted((f.pts, f.to_ndarray(format="rgb24")) for f in container.decode(stream))
    return [frames[max(bisect.bisect_right([p for p, _ in frames], begin + (t + 1e-6) / tick) - 1, 0)][1]
            for t in times]


CLIPS = {"h264.mp4": ("libx264", {}), "uneven.mp4": ("libx264", dict(uneven=True)),
         "uneven.mkv": ("libx264", dict(uneven=True)), "h264.ts": ("libx264", {}),
         "open.mp4": ("libx264", {"x264-params": "open-gop=1:bframes=4:b-pyramid=normal:keyint=24"}),
         "hevc.mkv": ("libx265", {"x265-params": "log-level=none:open-gop=1:keyint=24"}),
         "vp9.webm": ("libvpx-vp9", {"cpu-used": "8"}),
         "part4.avi": ("mpeg4", {})}


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_those_of_decoding_everything(tmp_path, name, monkeypatch):
    codec, options = CLIPS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    path, in_turn = clip(tmp_path / name, codec, **options), []
    monkeypatch.setattr(media, "frames_in_turn", lambda *a: in_turn.append(1) or frames_in_turn(*a))
    length = video_duration(path)
    for times in (sample_times(length, 64), sample_times(length, 3), np.arange(1.3, 2.9, 0.31), [3.4]):
        want = everything(path, times)
        for got in (load_frames(path, times),
                    list(frames_in_turn(path, times, lambda f: f.to_ndarray(format="rgb24")))):
            assert len(got) == len(want) and all(np.array_equal(g, w) for g, w in zip(got, want))
    assert not in_turn or name.endswith(".ts")  # there a clip cannot be found by its time; whole files can


def test_only_wanted_frames_are_converted(tmp_path):
    path, seen = clip(tmp_path / "a.mp4", "libx264"), []
    assert load_frames(path, [0.0, 2.0, 2.0, 4.5], lambda rgb: seen.append(rgb.shape) or len(seen)) == [1, 2,
                                                                                                        2, 3]
    assert seen == [(64, 96, 3)] * 3


CORNERS = {"red": (200, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 200), "white": (230, 230, 230)}


def four_corners(height, width):
    """Red and green above blue and white: no turn and no mirror looks the same."""
    pixels = np.zeros((height, width, 3), np.uint8)
    red, green, blue, white = CORNERS.values()
    pixels[:height // 2, :width // 2], pixels[:height // 2, width // 2:] = red, green
    pixels[height // 2:, :width // 2], pixels[height // 2:, width // 2:] = blue, white
    return pixels


def corners(pixels):
    """The names of the colours in the four corners, row by row."""
    (h, w), names = pixels.shape[:2], list(CORNERS)
    parts = [pixels[y:y + h // 4, x:x + w // 4] for y in (h // 8, h * 5 // 8) for x in (w // 8, w * 5 // 8)]
    away = [[np.abs(part.mean((0, 1)) - colour).sum() for colour in CORNERS.values()] for part in parts]
    assert all(min(a) < 60 for a in away), away
    return " ".join(names[int(np.argmin(a))] for a in away)


def turned_video(path, matrix, size=(48, 32)):
    """A video of `four_corners` whose header says where (x, y) of a frame is shown: at (ax + cy, bx + dy)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        (stream.width, stream.height), stream.bit_rate, stream.pix_fmt = size, 4_000_000, "yuv420p"
        for _ in range(11):
            frame = av.VideoFrame.from_ndarray(four_corners(size[1], size[0]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    whole, (a, b, c, d) = bytearray(path.read_bytes()), matrix
    at = whole.index(b"tkhd") + 4 + 40
    corner = [-min(0, a * size[0], c * size[1], a * size[0] + c * size[1]),
              -min(0, b * size[0], d * size[1], b * size[0] + d * size[1])]
    whole[at:at + 36] = b"".join(int(v).to_bytes(4, "big", signed=True) for v in (
        a << 16, b << 16, 0, c << 16, d << 16, 0, corner[0] << 16, corner[1] << 16, 1 << 30))
    path.write_bytes(whole)
    return str(path)


# the display matrix (a, b, c, d), and what is then seen: of a phone held in each of four ways
TURNS = {"as it lies": ((1, 0, 0, 1), (32, 48), "red green blue white"),
         "a quarter clockwise": ((0, 1, -1, 0), (48, 32), "blue red white green"),
         "upside down": ((-1, 0, 0, -1), (32, 48), "white blue green red"),
         "a quarter the other way": ((0, -1, 1, 0), (48, 32), "green white red blue"),
         # the camera that looks at whoever holds it
         "left and right changed": ((-1, 0, 0, 1), (32, 48), "green red white blue"),
         "top and bottom changed": ((1, 0, 0, -1), (32, 48), "blue white red green"),
         "along the diagonal": ((0, 1, 1, 0), (48, 32), "red blue green white"),
         "along the other diagonal": ((0, -1, -1, 0), (48, 32), "white green blue red")}


@pytest.mark.parametrize("turn", TURNS)
def test_phone_videos_are_upright_by_their_pixels(tmp_path, turn, monkeypatch):
    """A phone writes its frames as the sensor lies, and a matrix that says how they are to be seen."""
    matrix, shape, seen = TURNS[turn]
    path = turned_video(tmp_path / "a.mp4", matrix)
    for plan in (media.frame_plan, lambda *a: None):  # None: every frame is decoded, in turn
        monkeypatch.setattr(media, "frame_plan", plan)
        frames = load_frames(path, [0.0, 0.5, 1.0])
        assert [f.shape for f in frames] == [(*shape, 3)] * 3 and [corners(f) for f in frames] == [seen] * 3
        crop, = load_crops(path, Layout([], frame_layout(4), 1, times=(0.5,)), 4, 8)
        square = crop.reshape(4, 4, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(32, 32, 3)
        assert corners(square) == seen


# EXIF orientation -> what is seen of red, green above blue, white as they are stored
ORIENTATIONS = {1: "red green blue white", 2: "green red white blue", 3: "white blue green red",
                4: "blue white red green", 5: "red blue green white", 6: "blue red white green",
                7: "white green blue red", 8: "green white red blue"}


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_photos_are_upright_by_their_pixels_and_planned_in_that_shape(tmp_path, kind):
    from PIL import Image
    for turn, seen in ORIENTATIONS.items():
        path, exif = str(tmp_path / f"{turn}.{kind}"), Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(four_corners(40, 80)).save(path, exif=exif, **({"quality": 95} if kind != "png" else {}))
        pixels = load_image(path)
        assert corners(pixels) == seen, turn
        assert pixels.shape[:2] == ((40, 80) if turn < 5 else (80, 40)), turn
        assert image_size(path) == pixels.shape[1::-1], turn  # else its crops are cut in the wrong grid


def chunk(kind, data):
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(pixels, bits, colour, *before, behind=()):
    """A PNG of (H, W) or (H, W, C) pixels; `before` and `behind` them stand other chunks."""
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *before, chunk(b"IDAT", zlib.compress(rows)), *behind, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("turn", ORIENTATIONS)
def test_orientation_behind_the_pixels_of_a_png_is_obeyed_and_read_without_them(tmp_path, turn, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / "a.png"
    extra = chunk(b"tEXt", b"Comment\0eXIf")  # the word alone is no chunk
    path.write_bytes(png_of(four_corners(40, 80), 8, 2, extra, behind=(extra, chunk(b"eXIf", exif.tobytes()[6:]))))
    pixels = load_image(str(path))
    assert corners(pixels) == ORIENTATIONS[turn]
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", None)
    assert image_size(str(path)) == pixels.shape[1::-1]


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F"])
def test_a_turned_tiff_is_upright_in_every_mode(tmp_path, mode, compression):
    """Four greys in the corners. Pillow reads the rows of some modes wrongly unless it is kept from it."""
    greys = {"red": 100, "green": 150, "blue": 30, "white": 255}
    grey = np.zeros((40, 80), np.uint8)
    for name, (y, x) in zip(greys, ((0, 0), (0, 40), (20, 0), (20, 40))):
        grey[y:y + 20, x:x + 40] = greys[name]
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    for turn, seen in ORIENTATIONS.items():
        exif, path = Image.Exif(), str(tmp_path / "a.tiff")
        exif[0x0112] = turn
        image.save(path, exif=exif, compression=compression)
        pixels = load_image(path)[..., 0].astype(int)
        assert image_size(path) == pixels.shape[::-1] == ((80, 40) if turn < 5 else (40, 80))
        found = [min(greys, key=lambda name: abs(greys[name] - pixels[y, x])) for y in (5, -5) for x in (5, -5)]
        assert " ".join(found) == seen, turn


RAMP = np.tile(np.arange(64), (3, 1))  # 64 steps from black to white
DEEP = {"16 bits": (RAMP * 65535 // 63).astype(np.uint16), "12 of 16": (RAMP * 4095 // 63).astype(np.uint16),
        "10 of 16": (RAMP * 1023 // 63).astype(np.uint16), "8 of 16": (RAMP * 255 // 63).astype(np.uint16),
        "the other end first": (RAMP * 65535 // 63).astype(">u2"), "32 bits": (RAMP * 65535 // 63).astype(np.int32),
        "all of 32 bits": (RAMP * (2 ** 31 // 64)).astype(np.int32), "signed": (RAMP * 65 - 2048).astype(np.int32),
        "floats": (RAMP / 63).astype(np.float32), "floats to 255": (RAMP * 255 / 63).astype(np.float32),
        "very dark floats": (RAMP / 63 / 1000).astype(np.float32),
        "floats around 0": (RAMP / 63 - 0.5).astype(np.float32)}


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_are_scaled(tmp_path, name):
    """A ramp is a ramp, whatever its numbers are kept in; it was white, or black."""
    want = np.arange(64) * 255 / 63
    for end in ("tiff", "png"):
        if end == "tiff" or DEEP[name].dtype == np.uint16:
            path = str(tmp_path / f"a.{end}")
            Image.fromarray(DEEP[name]).save(path)
            pixels = load_image(path)
            assert pixels.shape == (3, 64, 3) and pixels.dtype == np.uint8
            assert np.abs(pixels - want[None, :, None]).max() < 1.1


def test_deep_images_without_contrast_or_with_values_that_are_none(tmp_path):
    path = str(tmp_path / "a.tiff")
    for value, want in ((np.uint16(0), 0), (np.uint16(32768), 128), (np.float32(0.5), 128), (np.float32(0), 0)):
        Image.fromarray(np.full((4, 4), value)).save(path)
        assert (load_image(path) == want).all()
    for value in (np.nan, np.inf, -np.inf):
        Image.fromarray(np.array([[0, value]], np.float32)).save(path)
        with pytest.raises(BadMedia, match="a.tiff: has pixels that are not finite numbers"):
            load_image(path)


def see_through(folder):
    """Files of a black square on nothing, its left half transparent, its right half opaque; black all over."""
    rgba = Image.fromarray(np.zeros((8, 8, 4), np.uint8))
    rgba.paste((0, 0, 0, 255), (4, 0, 8, 8))
    rgba.save(folder / "a.png")
    rgba.save(folder / "a.webp", lossless=True)
    rgba.save(folder / "rgba.tiff")
    rgba.convert("LA").save(folder / "la.png")
    halves = np.repeat([[0] * 4 + [1] * 4], 8, 0).astype(np.uint8)
    palette = Image.fromarray(halves).convert("P")
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.save(folder / "p.png", transparency=0)
    (folder / "grey.png").write_bytes(png_of(halves, 8, 0, chunk(b"tRNS", b"\0\0")))
    (folder / "deep.png").write_bytes(png_of(halves, 16, 0, chunk(b"tRNS", b"\0\0")))
    colours = np.stack([halves] * 3, 2)
    (folder / "rgb.png").write_bytes(png_of(colours, 8, 2, chunk(b"tRNS", bytes(6))))
    return sorted(str(path) for path in folder.iterdir())


def test_what_is_transparent_is_white_or_as_the_released_processors_have_it(tmp_path):
    for path in see_through(tmp_path):
        pixels = load_image(path)
        assert (pixels[:, :4] == 255).all(), path
        if "deep" not in path:  # there 1 is the largest value
            assert (pixels[:, 4:] < 2).all(), path
        hidden = load_image(path, on_white=False)
        assert (hidden[:, :4] == 0).all(), path
        if "deep" not in path:
            with Image.open(path) as image:
                assert np.array_equal(hidden, np.array(image.convert("RGB"))), path
    half = Image.new("RGBA", (2, 2), (200, 0, 0, 128))
    half.save(tmp_path / "half.png")
    assert np.abs(load_image(str(tmp_path / "half.png"))[0, 0].astype(int) - [227, 127, 127]).max() <= 1


def test_crops_are_on_white_or_not_as_the_layout_has_it(tmp_path):
    path = see_through(tmp_path)[0]
    layout, kept = image_layout(8, 8, 5, 4, 1), media.CropCache(10 ** 6)
    assert layout.on_white and kept(path, layout, 5, 4).mean() > 100
    layout.on_white = False
    assert kept(path, layout, 5, 4).mean() == 0 and load_crops(path, layout, 5, 4).mean() == 0


@pytest.mark.parametrize("name", ["float01.tiff", "grey12in16.png", "grey16.png", "grey16.tiff", "int32.tiff"])
def test_the_ramps_among_the_cases_are_ramps(name):
    pixels = load_image(shared("cases", "sixteen_bits", name))
    assert np.abs(pixels - (np.arange(64) * 255 / 63)[None, :, None]).max() < 2


@pytest.mark.parametrize("name", ["alpha_black.png", "alpha_black.webp", "la_black.png", "pal_trns.gif",
                                  "pal_trns.png"])
def test_the_drawings_among_the_cases_are_on_white(name):
    pixels = load_image(shared("cases", "transparency", name))
    assert (pixels[0] == 255).all() and pixels.min() < 20 and 150 < pixels.mean() < 200


@pytest.mark.parametrize("name", ["turn5.tiff", "turn6.tiff", "turn8.tiff", "turn6_late.png"])
def test_the_turned_images_among_the_cases_are_planned_as_they_are_cut(name):
    path = shared("cases", "turned_tiff", name)
    assert image_size(path) == (30, 60) and load_image(path).shape == (60, 30, 3)


@pytest.mark.parametrize("turn", [0, 9, 200, 65535])
def test_a_photo_with_an_orientation_that_is_none_is_left_as_it_is(tmp_path, turn):
    from PIL import Image
    path, exif = str(tmp_path / "a.jpg"), Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(four_corners(40, 80)).save(path, exif=exif, quality=95)
    assert corners(load_image(path)) == ORIENTATIONS[1] and image_size(path) == (80, 40)


def test_frames_the_decoder_calls_corrupt_are_refused(tmp_path):
    """Grey smears, which a decoder makes up for what is damaged, must not be learned from."""
    whole, found, path = open(clip(tmp_path / "a.mkv", "libx264"), "rb").read(), 0, tmp_path / "b.mkv"
    for at in range(len(whole) // 3, len(whole) * 9 // 10, len(whole) // 60):
        path.write_bytes(whole[:at] + bytes(40) + whole[at + 40:])
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                bad = [float(f.pts * stream.time_base) for f in container.decode(stream) if f.is_corrupt]
        except av.FFmpegError:
            continue
        if bad:
            found += 1
            for plan in (media.frame_plan, lambda *a: None):
                with pytest.MonkeyPatch.context() as patch, pytest.raises(BadMedia, match=r"b\.mkv"):
                    patch.setattr(media, "frame_plan", plan)
                    load_frames(str(path), [0.0, bad[0]])
        if found == 3:
            return
    pytest.skip("this decoder calls nothing corrupt")


def test_odd_sizes_and_missing_durations(tmp_path):
    path = tmp_path / "odd.mkv"
    # as a stream is recorded: nothing is written back
    with av.open(str(path), "w", options={"live": "1"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 51, 33, "yuv444p"
        for i in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((33, 51, 3), 10 * i, np.uint8),
                                                                   format="rgb24")))
        container.mux(stream.encode())
    assert abs(video_duration(str(path)) - 2.0) < 0.11
    frames = load_frames(str(path), [0.0, 1.0, 1.9])
    assert [f.shape for f in frames] == [(33, 51, 3)] * 3
    assert [round(f.mean() / 10) for f in frames] == [0, 10, 19]


@pytest.mark.parametrize("name, size, says",
                         [("juggle.mp4", (720, 1280), 10.29), ("cups.mp4", (720, 1280), 10.01)])
def test_frames_of_real_videos_are_those_of_decoding_everything(name, size, says):
    path = shared("media", name)
    assert video_duration(path) == pytest.approx(says, abs=0.01)
    times = sample_times(says, 5)
    got, want = load_frames(path, times), everything(path, times)
    assert all(g.shape == (*size, 3) and np.array_equal(g, w) for g, w in zip(got, want))


def test_kept_crops_are_loaded_once_and_the_longest_unused_go_first(tmp_path, monkeypatch):
    paths = [picture(str(tmp_path / f"{i}.png"), (40 * i, 0, 0)) for i in range(3)]
    layout, loaded = image_layout(30, 24, 5, 4, 1), []
    monkeypatch.setattr(media, "load_crops", lambda path, *rest: loaded.append(path) or load_crops(path, *rest))
    crops = [load_crops(path, layout, 5, 4) for path in paths]
    load = media.CropCache(2 * crops[0].nbytes)
    for i in (0, 1, 0, 2, 0, 1):  # 2 takes the place of 1, which takes that of 2
        assert np.array_equal(load(paths[i], layout, 5, 4), crops[i])
    assert loaded == [paths[i] for i in (0, 1, 2, 1)] and load.room == 0
    small = media.CropCache(10)  # too small for anything
    assert np.array_equal(small(paths[0], layout, 5, 4), crops[0]) and not small.crops and small.room == 10


def test_two_clips_of_one_video_are_not_taken_for_each_other(tmp_path):
    """Nor two videos of one name, the same photo in other crops, or the same frames for another model."""
    os.makedirs(tmp_path / "b")
    path, other = video(tmp_path / "a.mp4"), str(tmp_path / "b" / "a.mp4")
    picture(str(tmp_path / "a.png"), "red", (90, 60))
    turned_video(tmp_path / "b" / "a.mp4", (1, 0, 0, 1))
    film = lambda *times: Layout([], frame_layout(4), len(times), times=times)
    asked = [(path, film(0.0, 0.5), 4, 8), (path, film(1.0, 1.5), 4, 8), (path, film(0.0, 1.5), 4, 8),
             (path, film(0.0), 4, 8), (path, film(0.5, 1.5), 4, 8), (other, film(0.0, 0.5), 4, 8),
             (path, film(0.0, 0.5), 8, 4), (path, film(0.0, 0.5), 4, 6)]
    asked += [(str(tmp_path / "a.png"), image_layout(90, 60, 5, 4, tiles), 5, 4) for tiles in (0, 1, 2, 4)]
    kept = media.CropCache(10 ** 8)
    for _ in range(2):
        for args in asked:
            assert np.array_equal(kept(*args), load_crops(*args))
    assert len(kept.crops) == len(asked)
    levels = [round(c.mean() / 10) for c in kept(path, film(1.0, 1.5), 4, 8)]
    assert levels == [10, 15]
