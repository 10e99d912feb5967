"""
Media: a picture or a video becomes crops of patches, and a list of windows that says which patches make up each visual token.

    size, duration (from the header alone) ─► layout: tokens, pooling windows, how many crops     planning: no pixel is decoded
    file ─► pixels ─► resize ─► crops ─► patches                                                  decoding: in the workers

As the released Molmo2 code does it: one low-resolution crop shows the whole picture; up to
`max_crops` more tile an enlarged copy of it, overlapping by a margin so that no object is cut by every crop. A video is
frames at 2 per second, each one crop.

Shapes:  N crops, P patches per crop (n·n), M visual tokens, K patches pooled into one
"""
import math
import os
from dataclasses import dataclass

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000  # larger pictures are refused before anything of them is decoded
POOL_IMAGE, POOL_VIDEO = 2, 3  # patches pooled on a side
VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,gif,asf"  # no playlists: those name other files


class BadMedia(Exception):
    """A picture or video that cannot be used; the message says why."""


@dataclass
class Layout:
    """What one picture takes up in a row."""
    tokens: list        # names of special tokens, in order
    pool: np.ndarray    # (M, K) indices into this picture's own patches, -1 = none
    n_crops: int
    tiling: tuple = (0, 0)  # (rows, columns) of high-resolution crops; (0, 0) = the low-resolution one alone
    times: tuple = ()   # of a video: seconds at which its frames are taken, from the start of the file


# ---- planning -------------------------------------------------------------------------------------------------------

def inside_folder(folder, name):
    """The path of media `name`, which a data file in `folder` mentions, or BadMedia if it would lead elsewhere."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadMedia(f"media path {name!r} is not a file name")
    if os.path.isabs(name) or "://" in name or ".." in name.replace("\\", "/").split("/"):
        raise BadMedia(f"media path {name!r} must be relative and stay under the folder of its JSONL file")
    path = os.path.join(folder, name)
    if not os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep):
        raise BadMedia(f"media path {name!r} is a link out of the folder of its JSONL file")
    return path


def open_image(path):
    """A PIL image whose header has been read and found sane, pixels not yet."""
    try:
        image = Image.open(path, formats=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"))
    except FileNotFoundError:
        raise BadMedia(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise BadMedia(f"{path}: not a readable picture ({e})") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadMedia(f"{path}: {image.width}x{image.height} is more than {MAX_PIXELS // 10**6} megapixels")
    return image


def image_size(path):
    """(width, height) as the picture is meant to be seen: a camera held upright writes a turned picture and a tag."""
    with open_image(path) as image:
        turned = image.getexif().get(0x0112, 1) >= 5
        return (image.height, image.width) if turned else (image.width, image.height)


def pick_tiling(height, width, window, max_crops):
    """Rows and columns of crops: the grid that enlarges the picture least, or, if all shrink it, shrinks it least.

    height, width: pixels net of the margins; window: pixels of a crop net of them. Ties go to fewer crops, then rows.
    """
    grids = [(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops + 1) if i * j <= max_crops]
    grids.sort(key=lambda g: (g[0] * g[1], g[0]))
    sides = np.array(grids, np.float32) * np.float32(window)
    scale = (sides / np.array([height, width], np.float32)).min(1)
    best = scale.argmax() if (scale < 1).all() else np.where(scale < 1, np.inf, scale).argmin()
    return grids[best]


def windows(grid, size):
    """Group a (rows, columns) grid of patch indices into size x size windows: (rows', columns', size²).

    A side that does not divide is padded with -1, the odd one at the end.
    """
    pad = [(-s % size) for s in grid.shape]
    grid = np.pad(grid, [(p // 2, p - p // 2) for p in pad], constant_values=-1)
    r, c = grid.shape[0] // size, grid.shape[1] // size
    return grid.reshape(r, size, c, size).transpose(0, 2, 1, 3).reshape(r, c, size * size)


def image_layout(width, height, n, patch, max_crops, pool=POOL_IMAGE):
    """Tokens and windows of a width x height picture. n: patches on a side of a crop; max_crops 0: low-res alone.

        <low_res_image_start> <image>... <image_end>   <image_start> (<image>... <image_col>) per row <image_end>
    """
    low = windows(np.arange(n * n).reshape(n, n), pool)
    tokens = ["<low_res_image_start>"] + ["<image>"] * (low.shape[0] * low.shape[1]) + ["<image_end>"]
    if not max_crops:
        return Layout(tokens, low.reshape(-1, pool * pool), 1, (0, 0))
    margin = round(n * 4 / 27)  # patches on each side of a crop that its neighbour shows too: 4 of 27
    rows, cols = pick_tiling(max(height - 2 * margin * patch, 1), max(width - 2 * margin * patch, 1),
                             (n - 2 * margin) * patch, max_crops)
    bands = []
    for i in range(rows):
        band = []
        for j in range(cols):  # each patch of the enlarged picture is taken from the crop in which it is less marginal
            own = np.arange(n * n).reshape(n, n) + (1 + i * cols + j) * n * n
            own = own[margin * (i > 0):n - margin * (i < rows - 1), margin * (j > 0):n - margin * (j < cols - 1)]
            band.append(own)
        bands.append(np.concatenate(band, 1))
    high = windows(np.concatenate(bands), pool)
    tokens += ["<image_start>"] + (["<image>"] * high.shape[1] + ["<image_col>"]) * high.shape[0] + ["<image_end>"]
    both = np.concatenate([low.reshape(-1, pool * pool), high.reshape(-1, pool * pool)])
    return Layout(tokens, both, 1 + rows * cols, (rows, cols))


def frame_layout(n, pool=POOL_VIDEO):
    """Windows of one video frame of n x n patches: (M, K). 27 x 27 patches give 9 x 9 tokens; no column tokens."""
    return windows(np.arange(n * n).reshape(n, n), pool).reshape(-1, pool * pool)


def sample_times(duration, max_frames, max_fps=2.0):
    """Seconds at which frames are taken: `max_fps` a second and the very last one; evenly spread ones if those are too many."""
    if duration > (max_frames - 1) / max_fps:
        return np.linspace(0, duration, max_frames)
    return np.append(np.arange(0, duration, 1 / max_fps), duration)


def open_video(path):
    """An open container whose first video stream has been found. A file cannot make the decoder open other files or URLs."""
    if not os.path.isfile(path):
        raise BadMedia(f"{path}: no such file")
    try:
        container = av.open(path, options={"protocol_whitelist": "file", "format_whitelist": VIDEO_FORMATS})
    except (av.FFmpegError, OSError, ValueError) as e:
        raise BadMedia(f"{path}: not a readable video ({e})") from None
    if not container.streams.video:
        container.close()
        raise BadMedia(f"{path}: has no video stream")
    stream = container.streams.video[0]
    if stream.width * stream.height > MAX_PIXELS:
        container.close()
        raise BadMedia(f"{path}: frames of {stream.width}x{stream.height} are more than {MAX_PIXELS // 10**6} megapixels")
    return container, stream


def video_duration(path):
    """Seconds of a video, from its header; where that does not say, from its packets. Nothing is decoded."""
    container, stream = open_video(path)
    with container:
        if stream.duration:
            return float(stream.duration * stream.time_base)
        if container.duration:
            return container.duration / av.time_base
        try:
            ends = [float((p.pts + (p.duration or 0)) * stream.time_base) for p in container.demux(stream) if p.pts is not None]
        except av.FFmpegError as e:
            raise BadMedia(f"{path}: broken video ({e})") from None
        if not ends:
            raise BadMedia(f"{path}: a video without frames")
        return max(ends)


# ---- decoding -------------------------------------------------------------------------------------------------------

def load_image(path):
    """The pixels of a picture, upright: (H, W, 3) uint8."""
    with open_image(path) as image:
        try:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as e:
            raise BadMedia(f"{path}: truncated or corrupt picture ({e})") from None


def resize(pixels, height, width):
    """Bilinear without antialiasing, as the released models were trained: (H, W, 3) uint8 -> (height, width, 3) uint8."""
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=False)
    return x[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def to_patches(crop, patch):
    """(n·patch, n·patch, 3) -> (P, patch·patch·3), a patch being (row, column, channel)."""
    n = crop.shape[0] // patch
    return crop.reshape(n, patch, n, patch, 3).transpose(0, 2, 1, 3, 4).reshape(n * n, -1)


def image_crops(pixels, n, patch, tiling):
    """The crops of a picture, the low-resolution one first: (H, W, 3) uint8 -> (N, P, patch·patch·3) uint8."""
    side, (rows, cols) = n * patch, tiling
    crops = [resize(pixels, side, side)]  # aspect ratio is not kept: the model sees the whole picture as a square
    if rows:
        margin = round(n * 4 / 27) * patch
        step = side - 2 * margin
        canvas = resize(pixels, rows * step + 2 * margin, cols * step + 2 * margin)
        crops += [canvas[i * step:i * step + side, j * step:j * step + side] for i in range(rows) for j in range(cols)]
    return np.stack([to_patches(c, patch) for c in crops])


def load_frames(path, times):
    """The frames shown at `times` (seconds, ascending): a list of (H, W, 3) uint8."""
    container, stream = open_video(path)
    frames, shown = [], None
    with container:
        try:
            stream.thread_type = "AUTO"
            begin = stream.start_time or 0
            container.seek(begin + int(times[0] / stream.time_base), stream=stream)  # to the key frame before it
            for frame in container.decode(stream):
                at = float((frame.pts - begin) * stream.time_base) if frame.pts is not None else 0.0
                while shown is not None and len(frames) < len(times) and at > times[len(frames)] + 1e-6:
                    frames.append(shown)
                if len(frames) == len(times):
                    break
                shown = frame
            if shown is None:
                raise BadMedia(f"{path}: no frame could be decoded")
            frames += [shown] * (len(times) - len(frames))  # the last one is shown until the end
            pixels = {id(f): np.rot90(f.to_ndarray(format="rgb24"), round(f.rotation / 90)) for f in frames}
            return [pixels[id(f)] for f in frames]
        except (av.FFmpegError, OSError, ValueError) as e:
            raise BadMedia(f"{path}: broken video ({e})") from None


def load_crops(path, layout, n, patch):
    """The crops of a picture or video as its layout asks for them: (N, P, patch·patch·3) uint8."""
    if layout.times:
        return np.concatenate([image_crops(f, n, patch, (0, 0)) for f in load_frames(path, layout.times)])
    return image_crops(load_image(path), n, patch, layout.tiling)
