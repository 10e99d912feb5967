"""
Media: a picture or a video becomes crops of patches, and a list of windows that says which patches make up
each visual token.

    planning    size, duration, from the header alone ─► layout: tokens, pooling windows, how many crops
    decoding    file ─► pixels ─► resize ─► crops ─► patches, in the workers

As the released Molmo2 code does it: one low-resolution crop shows the whole picture; up to `max_crops` more
tile an enlarged copy of it, overlapping by a margin so that no object is cut by every crop. A video is frames
at 2 per second, each one crop.

Shapes:  N crops, P patches per crop (n·n), M visual tokens, K patches pooled into one
"""
import bisect
import os
import struct
from collections import OrderedDict
from dataclasses import dataclass

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps


MAX_PIXELS = 64_000_000  # larger pictures are refused before anything of them is decoded
POOL_IMAGE, POOL_VIDEO = 2, 3  # patches pooled on a side
# A video's container is told by its first bytes, never by its name: a playlist would name other files.
# (offset, bytes) -> format
MAGIC = {(4, b"ftyp"): "mov", (4, b"moov"): "mov", (4, b"mdat"): "mov", (4, b"free"): "mov",
         (4, b"skip"): "mov",
         (4, b"wide"): "mov", (0, b"\x1aE\xdf\xa3"): "matroska", (8, b"AVI "): "avi", (188, b"G"): "mpegts",
         (0, b"\x00\x00\x01\xba"): "mpeg", (0, b"FLV"): "flv", (0, b"OggS"): "ogg", (0, b"GIF8"): "gif",
         (0, b"\x30\x26\xb2\x75"): "asf"}


# What PIL raises on files that are not what they say.
PIL_ERRORS = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError,
              ArithmeticError, struct.error,
              NotImplementedError, Image.DecompressionBombError)


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


# ---- planning ----------------------------------------------------------------------------------------------

def inside_folder(folder, name):
    """The path of media `name`, which a data file in `folder` mentions, or BadMedia if it would lead
    elsewhere."""
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
    if not os.path.isfile(path):  # also not a pipe, which would wait for ever
        raise BadMedia(f"{path}: no such file")
    try:
        image = Image.open(path, formats=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"))
    except PIL_ERRORS as e:
        raise BadMedia(f"{path}: not a readable picture ({e})") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadMedia(f"{path}: {image.width}x{image.height} is more than {MAX_PIXELS // 10**6} megapixels")
    return image


def orientation(image, path):
    """The EXIF orientation in an opened picture's header: a camera held upright writes a turned picture and a
    tag, 5 to 8."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # PIL would look for it behind the pixels, and decode them
    try:
        return image.getexif().get(0x0112, 1)
    except PIL_ERRORS as e:
        raise BadMedia(f"{path}: broken EXIF data ({e})") from None


def image_size(path):
    """(width, height) as the picture is meant to be seen."""
    with open_image(path) as image:
        # of a TIFF, PIL tells the upright size already
        lying = image.format != "TIFF" and orientation(image, path) in (5, 6, 7, 8)
        return (image.height, image.width) if lying else (image.width, image.height)


def pick_tiling(height, width, window, max_crops):
    """Rows and columns of crops: the grid that enlarges the picture least, or, if all shrink it, shrinks it
    least.

    height, width: pixels net of the margins; window: pixels of a crop net of them. Ties go to fewer crops,
    then rows.
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
    """Tokens and windows of a width x height picture. n: patches on a side of a crop; max_crops 0: low-res
    alone.

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
        # each patch of the enlarged picture is taken from the crop in which it is less marginal
        for j in range(cols):
            own = np.arange(n * n).reshape(n, n) + (1 + i * cols + j) * n * n
            own = own[margin * (i > 0):n - margin * (i < rows - 1),
                      margin * (j > 0):n - margin * (j < cols - 1)]
            band.append(own)
        bands.append(np.concatenate(band, 1))
    high = windows(np.concatenate(bands), pool)
    tokens += ["<image_start>"] + (["<image>"] * high.shape[1] + ["<image_col>"]) * high.shape[0] + ["<image_end>"]
    both = np.concatenate([low.reshape(-1, pool * pool), high.reshape(-1, pool * pool)])
    return Layout(tokens, both, 1 + rows * cols, (rows, cols))


def frame_layout(n, pool=POOL_VIDEO):
    """Windows of one video frame of n x n patches: (M, K). 27 x 27 patches give 9 x 9 tokens; no column
    tokens."""
    return windows(np.arange(n * n).reshape(n, n), pool).reshape(-1, pool * pool)


def sample_times(duration, max_frames, max_fps=2.0):
    """Seconds at which frames are taken: `max_fps` a second and the very last one; evenly spread ones if
    those are too many."""
    if duration > (max_frames - 1) / max_fps:
        return np.linspace(0, duration, max_frames)
    return np.append(np.arange(0, duration, 1 / max_fps), duration)


def open_video(path):
    """An open container and its first video stream. A file cannot make the decoder open other files or
    URLs."""
    if not os.path.isfile(path):
        raise BadMedia(f"{path}: no such file")
    try:
        with open(path, "rb") as f:
            head = f.read(189)
        kind = next((kind for (at, magic), kind in MAGIC.items() if head[at:at + len(magic)] == magic), None)
        if kind is None:
            raise BadMedia(f"{path}: not a video in a known container ({', '.join(sorted(set(MAGIC.values())))})")
        container = av.open(path, format=kind,
                            options={"protocol_whitelist": "file", "format_whitelist": kind})
    except (av.FFmpegError, OSError, ValueError) as e:
        raise BadMedia(f"{path}: not a readable video ({e})") from None
    if not container.streams.video:
        container.close()
        raise BadMedia(f"{path}: has no video stream")
    stream = container.streams.video[0]
    if not 0 < stream.width * stream.height <= MAX_PIXELS:
        container.close()
        raise BadMedia(f"{path}: frames of {stream.width}x{stream.height}, not within {MAX_PIXELS // 10**6} megapixels")
    # one thread: the workers are the parallelism, and a packet's skip_frame stays its own
    stream.thread_type = "NONE"
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # frames may be larger than the header says
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
            ends = [float((p.pts + (p.duration or 0)) * stream.time_base)
                    for p in container.demux(stream) if p.pts is not None]
        except av.FFmpegError as e:
            raise BadMedia(f"{path}: broken video ({e})") from None
        if not ends:
            raise BadMedia(f"{path}: a video without frames")
        return max(ends)


# ---- decoding ----------------------------------------------------------------------------------------------

def load_image(path):
    """The pixels of a picture, upright: (H, W, 3) uint8."""
    with open_image(path) as image:
        turned = orientation(image, path) != 1
        try:
            return np.array((ImageOps.exif_transpose(image) if turned else image).convert("RGB"))
        except PIL_ERRORS as e:
            raise BadMedia(f"{path}: truncated or corrupt picture ({e})") from None


def resize(pixels, height, width):
    """Bilinear without antialiasing, as the released models were trained: (H, W, 3) uint8 -> (height, width,
    3) uint8."""
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=False)
    return x[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def to_patches(crop, patch):
    """(n·patch, n·patch, 3) -> (P, patch·patch·3), a patch being (row, column, channel)."""
    n = crop.shape[0] // patch
    return crop.reshape(n, patch, n, patch, 3).transpose(0, 2, 1, 3, 4).reshape(n * n, -1)


def image_crops(pixels, n, patch, tiling):
    """The crops of a picture, the low-resolution one first: (H, W, 3) uint8 -> (N, P, patch·patch·3)
    uint8."""
    side, (rows, cols) = n * patch, tiling
    # aspect ratio is not kept: the model sees the whole picture as a square
    crops = [resize(pixels, side, side)]
    if rows:
        margin = round(n * 4 / 27) * patch
        step = side - 2 * margin
        canvas = resize(pixels, rows * step + 2 * margin, cols * step + 2 * margin)
        crops += [canvas[i * step:i * step + side, j * step:j * step + side] for i in range(rows)
                  for j in range(cols)]
    return np.stack([to_patches(c, patch) for c in crops])


# Frames of a video cost most when they are decoded and not wanted. So: read the packets without decoding
# them, find which frames are shown at the wanted times, and decode only from the key frame before each to the
# frame itself, skipping frames that no other refers to. Only wanted frames are ever converted to RGB and
# kept.
#
#     times      0          5                    10      at 0.2 a second
#     packets    K p b p b  K p b p b  K p b p b  K      K key frame, p refers back, b is referred to by none
#     decoded    K          K p b                 K

def packets_of(container, stream, times):
    """The packets that hold what is shown from times[0] to times[-1], and some around: from the key frame
    before."""
    begin, tick, past = stream.start_time or 0, float(stream.time_base), 0
    if times[0] > 0:
        container.seek(begin + int(times[0] / tick), stream=stream)
    for packet in container.demux(stream):
        # What follows a key frame in the file may be shown before it, but not what follows the second one.
        timed = packet.is_keyframe and packet.pts is not None
        past += timed and (packet.pts - begin) * tick > times[-1] + 1e-6
        if past == 2:
            return
        if packet.size:
            yield packet


def frame_plan(container, stream, times):
    """(pts of the frame shown at each of `times`, whether to decode each packet in file order), or None where
    the packets do not tell."""
    packets = [(p.pts, p.is_keyframe, p.is_discard) for p in packets_of(container, stream, times)]
    if not packets or not packets[0][1] or any(pts is None for pts, *_ in packets):
        return None
    shown = sorted(pts for pts, _, discard in packets if not discard)
    begin, tick = stream.start_time or 0, float(stream.time_base)
    at = [bisect.bisect_right(shown, begin + (t + 1e-6) / tick) - 1 for t in times]
    if times[0] > 0 and at[0] < 0:
        return None  # the seek went too far
    end = (shown[-1] - begin) * tick
    if times[-1] > end + max(1, 0.1 * times[-1]):
        raise BadMedia(f"{container.name}: ends at {end:.1f} s, and {times[-1]:.1f} s were asked for: truncated?")
    wanted, order = [shown[max(i, 0)] for i in at], {pts: i for i, (pts, *_) in enumerate(packets)}
    keys, decode = [i for i, (_, key, _) in enumerate(packets) if key], np.zeros(len(packets), bool)
    for pts in dict.fromkeys(wanted):
        i = order[pts]
        k = bisect.bisect_right(keys, i) - 1
        # shown before the key frame it follows in the file: it may refer further back
        if pts < packets[keys[k]][0] and k:
            k -= 1
        decode[keys[k]:i + 1] = True
    return wanted, decode


def frames_of(stream, packets, decode, wanted):
    """Yields the decoded frames of those packets that `decode` marks, and with them some more around."""
    context = stream.codec_context
    for i, packet in enumerate(packets):
        if decode[i]:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from context.decode(packet)
            if i + 1 == len(decode) or not decode[i + 1]:
                yield from context.decode(None)  # what the decoder still holds back
                context.flush_buffers()


def load_frames(path, times, keep=lambda rgb: rgb):
    """keep(frame) of the frames shown at `times` (seconds from the start, ascending), each (H, W, 3) uint8
    and upright.

    A frame is shown until the next begins, the last one to the end. Exactly the frames that decoding
    everything gives.
    """
    def upright(frame):
        if frame.is_corrupt:
            raise BadMedia(f"{path}: broken video")
        turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
        return keep(np.ascontiguousarray(turned))  # torch reads no array backwards

    try:
        container, stream = open_video(path)
        with container:
            plan = frame_plan(container, stream, times)
        if plan:
            wanted, decode = plan
            container, stream = open_video(path)
            with container:
                want, packets = set(wanted), packets_of(container, stream, times)
                kept = {f.pts: upright(f) for f in frames_of(stream, packets, decode, want) if f.pts in want}
            if want <= kept.keys():
                return [kept[pts] for pts in wanted]
        return load_frames_in_turn(path, times, upright)
    except (av.FFmpegError, OSError, ValueError) as e:
        raise BadMedia(f"{path}: broken video ({e})") from None


def load_frames_in_turn(path, times, keep):
    """The same by decoding every frame up to the last one wanted, for files whose packets do not tell
    enough."""
    container, stream = open_video(path)
    kept, shown, rate = [], None, float(stream.average_rate or 25)
    with container:
        for n, frame in enumerate(container.decode(stream)):
            at = n / rate if frame.pts is None else float((frame.pts - (stream.start_time or 0)) * stream.time_base)
            late = sum(at > t + 1e-6 for t in times[len(kept):]) if shown is not None else 0
            kept += [keep(shown)] * late if late else []
            if len(kept) == len(times):
                return kept
            shown = frame
        if shown is None:
            raise BadMedia(f"{path}: no frame could be decoded")
        return kept + [keep(shown)] * (len(times) - len(kept))


def load_crops(path, layout, n, patch):
    """The crops of a picture or video as its layout asks for them: (N, P, patch·patch·3) uint8."""
    if layout.times:
        return np.concatenate(load_frames(path, layout.times, lambda rgb: image_crops(rgb, n, patch, (0, 0))))
    return image_crops(load_image(path), n, patch, layout.tiling)


class CropCache:
    """load_crops that keeps what it loaded, up to a number of bytes; what has gone unused the longest goes first. Worth
    it where all media together are small and come often."""

    def __init__(self, room):
        self.room, self.crops = room, OrderedDict()

    def __call__(self, path, layout, n, patch):
        key = path, layout.tiling, tuple(layout.times), n, patch
        if key not in self.crops:
            self.crops[key] = load_crops(path, layout, n, patch)
            self.room -= self.crops[key].nbytes
        self.crops.move_to_end(key)
        crops = self.crops[key]
        while self.room < 0:
            self.room += self.crops.popitem(last=False)[1].nbytes
        return crops
