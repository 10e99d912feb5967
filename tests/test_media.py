"""Pictures and videos become the published crops, windows and tokens. The numbers are from FACTS 3.5 (the official code, executed)."""
import hashlib

import numpy as np
import pytest
from conftest import video

from media import (BadMedia, Layout, frame_layout, image_crops, image_layout, load_crops, load_frames, load_image, pick_tiling,
                   resize, sample_times, video_duration, windows)

# H, W, and for 8 and 24 crops: tiling, crops, high-resolution rows and columns, tokens in all
TABLE = [((50, 50), ((1, 1), 2, 14, 14, 410), None), ((378, 378), ((1, 1), 2, 14, 14, 410), None),
         ((480, 640), ((2, 2), 5, 23, 23, 752), None), ((500, 700), ((2, 3), 7, 23, 33, 982), None),
         ((720, 1280), ((2, 4), 9, 23, 42, 1189), ((3, 5), 16, 33, 52, 1949)),
         ((1080, 1920), ((2, 4), 9, 23, 42, 1189), ((4, 6), 25, 42, 61, 2804)),
         ((1920, 1080), ((4, 2), 9, 42, 23, 1208), ((6, 4), 25, 61, 42, 2823)),
         ((3000, 100), ((8, 1), 9, 80, 14, 1400), ((11, 1), 12, 109, 14, 1835))]


@pytest.mark.parametrize("size, eight, many", TABLE)
def test_layouts(size, eight, many):
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
    for row, want in ((0, [0, 1, 27, 28]), (13, [26, -1, 53, -1]), (14, [54, 55, 81, 82]), (195, [728, -1, -1, -1]),
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
    canvas = resize(pixels, 2 * 266 + 112, 3 * 266 + 112)
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
    assert grid.shape == (9, 9, 9) and grid.min() == 0 and grid[0, 1].tolist() == [3, 4, 5, 30, 31, 32, 57, 58, 59]


def test_tiling_of_tiny_pictures():
    assert pick_tiling(1, 1, 266, 8) == (1, 1)


def test_any_picture_mode_becomes_rgb(tmp_path):
    from PIL import Image
    for mode in ("L", "LA", "RGBA", "P", "1", "I;16", "CMYK"):
        path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
        Image.new(mode, (7, 5)).save(path)
        assert load_image(str(path)).shape == (5, 7, 3)


# ---- video ----------------------------------------------------------------------------------------------------------

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
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost/x.ts\n")  # would open what it names
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("cut.mp4", "list.mp4", "text.mp4", "missing.mp4"):
        with pytest.raises(BadMedia, match=name):
            load_frames(str(tmp_path / name), [0.0])
        with pytest.raises(BadMedia, match=name):
            video_duration(str(tmp_path / name))
