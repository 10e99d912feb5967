"""
Media: an image or a video becomes crops of patches, and pooling windows: which patches make up each visual token.

    planning    file header ─► size, duration ─► layout: tokens, pooling windows, number of crops
    decoding    file ─► pixels ─► resize ─► crops ─► patches, in the DataLoader's workers

As in the released Molmo2 code, one low-resolution crop shows the whole image, and up to `max_crops` more tile an
enlarged copy of it. They overlap by a margin, so that no object is cut by every crop. A video is frames at 2 per
second, each one crop.

Shapes:  N crops, P patches per crop (n·n), M visual tokens, K patches pooled into one
"""
import bisect
import contextlib
import functools
import os
import struct
from collections import OrderedDict
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.sidedata.sidedata import Type
from av.stream import Disposition
from PIL import Image

from lib.errors import BadMedia
from lib.progress import progress


MAX_PIXELS = 64_000_000  # larger images and frames are refused before they are decoded
POOL_IMAGE = 2           # patches on a side of a pooling window
POOL_VIDEO = 3
# The container is recognised by the file's first bytes, never by its name: a playlist named .mp4 would make FFmpeg
# open the files that it lists.   (offset, bytes) -> format
MAGIC = {(4, b"ftyp"): "mov", (4, b"moov"): "mov", (4, b"mdat"): "mov", (4, b"free"): "mov", (4, b"skip"): "mov",
         (4, b"wide"): "mov", (4, b"pnot"): "mov", (4, b"uuid"): "mov", (0, b"\x1aE\xdf\xa3"): "matroska",
         (8, b"AVI "): "avi", (0, b"\x00\x00\x01\xba"): "mpeg", (0, b"FLV"): "flv", (0, b"OggS"): "ogg",
         (0, b"GIF8"): "gif", (0, b"\x30\x26\xb2\x75"): "asf",
         (188, b"G"): "mpegts", (196, b"G"): "mpegts"}  # packets of 188 bytes, or of 192 in a camcorder's .mts
MATROSKA = "matroska"    # WebM too; what FFmpeg gives as the start and duration of its tracks may be made up
# What PIL raises on damaged or hostile files; each was seen.
PIL_ERRORS = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError,
              struct.error, NotImplementedError, Image.DecompressionBombError)


@dataclass
class Layout:
    """What one image or video takes up in a sequence."""
    tokens: list            # names of special tokens, in order
    pool: np.ndarray        # (M, K) indices into this image's own patches, -1 = none
    n_crops: int
    tiling: tuple = (0, 0)  # (rows, columns) of high-resolution crops; (0, 0) = the low-resolution one alone
    times: tuple = ()       # of a video: seconds at which its frames are taken, from the start of the file
    on_white: bool = True   # whether an image's transparent parts become white (see `load_image`)


# ---- planning ----------------------------------------------------------------------------------------------

def inside_folder(folder, name):
    """The path of media `name` that a data file in `folder` mentions. BadMedia if it leads out of the folder. folder
    None: a person named it on the command line, and may name what they like."""
    if folder is None:
        return name
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadMedia(f"media path {name!r} is not a file name")
    if os.path.isabs(name) or "://" in name or ".." in name.replace("\\", "/").split("/"):
        raise BadMedia(f"media path {name!r} must be relative and stay under the folder of its JSONL file")
    path = os.path.join(folder, name)
    # with the separator: /data/set is not a parent of /data/setB
    if not os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep):
        raise BadMedia(f"media path {name!r} is a link out of the folder of its JSONL file")
    return path


def open_image(path):
    """A PIL image: its header is read and checked, its pixels are not decoded yet."""
    if not os.path.isfile(path):  # a pipe would block for ever
        raise BadMedia(f"{path}: no such file")
    try:
        # no other format: PIL would hand an EPS to Ghostscript, for one
        image = Image.open(path, formats=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"))
    except PIL_ERRORS as e:
        raise BadMedia(f"{path}: not a readable image ({e})") from None
    image.filename = ""  # else PIL maps raw TIFFs into memory, with rows as long as those of the upright image
    if image.width * image.height > MAX_PIXELS:
        raise BadMedia(f"{path}: {image.width}x{image.height} is more than {MAX_PIXELS // 10**6} megapixels")
    return image


def png_exif(path):
    """The eXIf chunk of a PNG, or b"". It may follow the pixels: chunks are passed over, none is decoded."""
    with open(path, "rb") as f:
        f.seek(8)
        while True:
            head = f.read(8)  # length and type; after so many bytes there are four of checksum
            if len(head) < 8:
                return b""
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"eXIf":
                return f.read(length)
            f.seek(length + 4, os.SEEK_CUR)


def orientation(image, path):
    """The EXIF orientation, 1 to 8. A camera held upright writes the image lying, with a tag of 5 to 8."""
    if image.format == "TIFF":
        return 1  # PIL turns it itself: its size and its pixels are upright
    try:
        exif = image.getexif() if image.format != "PNG" else Image.Exif()
        if image.format == "PNG":  # getexif() would decode the pixels to look behind them
            exif.load(png_exif(path))
        return exif.get(0x0112, 1)
    except PIL_ERRORS as e:
        raise BadMedia(f"{path}: broken EXIF data ({e})") from None


def image_size(path):
    """(width, height) of the upright image."""
    with open_image(path) as image:
        lying = orientation(image, path) in (5, 6, 7, 8)
        return (image.height, image.width) if lying else (image.width, image.height)


def pick_tiling(height, width, window, max_crops):
    """(rows, columns) of crops: the grid that enlarges the image least, or if all shrink it, shrinks it least.

    height, width: pixels without the margins; window: pixels of a crop without them. Ties go to fewer crops, then
    to fewer rows.
    """
    grids = []
    for rows in range(1, max_crops + 1):
        for columns in range(1, max_crops // rows + 1):
            grids.append((rows, columns))
    grids.sort(key=lambda g: (g[0] * g[1], g[0]))
    sides = np.array(grids, np.float32) * np.float32(window)  # fp32 as published: it decides ties
    scale = (sides / np.array([height, width], np.float32)).min(1)
    best = scale.argmax() if (scale < 1).all() else np.where(scale < 1, np.inf, scale).argmin()
    return grids[best]


def windows(grid, size):
    """Group a (rows, columns) grid of patch indices into size x size windows: (rows', columns', size²).

    A side that `size` does not divide is padded with -1 at both ends, an odd one at the end.
    """
    missing = [-side % size for side in grid.shape]
    grid = np.pad(grid, [(m // 2, m - m // 2) for m in missing], constant_values=-1)
    rows, cols = grid.shape[0] // size, grid.shape[1] // size
    grid = grid.reshape(rows, size, cols, size).transpose(0, 2, 1, 3)  # (rows', columns', size, size)
    return grid.reshape(rows, cols, size * size)


def image_layout(width, height, n, patch, max_crops, pool=POOL_IMAGE):
    """Tokens and windows of an image. width, height: pixels; n: patches on a side of a crop; patch: pixels on a side
    of a patch; max_crops: high-resolution ones, 0 = the low-resolution crop alone."""
    rows, cols = 0, 0
    if max_crops:
        margin = round(n * 4 / 27)
        rows, cols = pick_tiling(max(height - 2 * margin * patch, 1), max(width - 2 * margin * patch, 1),
                                 (n - 2 * margin) * patch, max_crops)
    tokens, windows_of_patches = tiled_layout(rows, cols, n, pool)
    return Layout(list(tokens), windows_of_patches, 1 + rows * cols, (rows, cols))


@functools.lru_cache  # few tilings, many images: planning would spend a seventh of its time here
def tiled_layout(rows, cols, n, pool):
    """(names of tokens, windows (M, K)) of a low-resolution crop and rows x cols high-resolution ones. Read them only.

        <low_res_image_start> <image>... <image_end>   <image_start> (<image>... <image_col>) per row <image_end>
    """
    low = windows(np.arange(n * n).reshape(n, n), pool)
    tokens = ["<low_res_image_start>"] + ["<image>"] * (low.shape[0] * low.shape[1]) + ["<image_end>"]
    if not rows:
        return tokens, low.reshape(-1, pool * pool)
    margin = round(n * 4 / 27)  # patches on each side of a crop that its neighbour shows too: 4 of 27
    bands = []
    for i in range(rows):
        band = []
        for j in range(cols):
            crop = np.arange(n * n).reshape(n, n) + (1 + i * cols + j) * n * n  # crop 0 is the low-resolution one
            # A patch that two crops show is taken from the one in which it lies further inside.
            top = margin if i > 0 else 0
            left = margin if j > 0 else 0
            bottom = n - margin if i < rows - 1 else n
            right = n - margin if j < cols - 1 else n
            band.append(crop[top:bottom, left:right])
        bands.append(np.concatenate(band, 1))
    high = windows(np.concatenate(bands), pool)
    row_of_tokens = ["<image>"] * high.shape[1] + ["<image_col>"]
    tokens += ["<image_start>"] + row_of_tokens * high.shape[0] + ["<image_end>"]
    both = np.concatenate([low.reshape(-1, pool * pool), high.reshape(-1, pool * pool)])
    return tokens, both


def frame_layout(n, pool=POOL_VIDEO):
    """Windows of one video frame of n x n patches: (M, K). 27 x 27 patches give 9 x 9 tokens, no column tokens."""
    return windows(np.arange(n * n).reshape(n, n), pool).reshape(-1, pool * pool)


def sample_times(duration, max_frames, max_fps=2.0):
    """Seconds at which frames are taken: `max_fps` per second and the last one. Where those are more than
    `max_frames`, so many evenly spaced ones, the first and the last among them."""
    if duration > (max_frames - 1) / max_fps:
        return np.linspace(0, duration, max_frames)
    return np.append(np.arange(0, duration, 1 / max_fps), duration)


def container_format(path):
    """FFmpeg's name of a file's container, by its first bytes; None if it is not one that we read."""
    if not os.path.isfile(path):  # a pipe would block for ever
        raise BadMedia(f"{path}: no such file")
    with open(path, "rb") as f:
        head = f.read(197)  # the furthest magic byte is at 196
    for (offset, magic), kind in MAGIC.items():
        if head[offset:].startswith(magic):
            return kind
    return None


def is_picture_track(stream):
    """Whether a stream is a video's frames, and not a cover or thumbnails."""
    return stream.type == "video" and not stream.disposition & Disposition.attached_pic


def open_video(path, decodes=True):
    """(open container, its first video stream). The file cannot make the decoder open other files or URLs. decodes:
    whether frames will be decoded, and not only packets read."""
    try:
        kind = container_format(path)
        if not kind:
            raise BadMedia(f"{path}: not a video in a known container ({', '.join(sorted(set(MAGIC.values())))})")
        options = {"protocol_whitelist": "file", "format_whitelist": kind}
        if kind == "mov" and not decodes:
            # FFmpeg decodes the first frames to learn of the stream, 10 to 25 ms of a 720p video. Their tables say
            # all of the packets; a decoder that is on no list is not started.
            options["codec_whitelist"] = "none"
        container = av.open(path, format=kind, options=options)
    except (av.FFmpegError, OSError, ValueError) as e:
        raise BadMedia(f"{path}: not a readable video ({e})") from None
    stream = next(filter(is_picture_track, container.streams), None)
    if not stream:
        container.close()
        raise BadMedia(f"{path}: has no video stream")
    if not stream.width and not decodes:  # the tables lack the size
        container.close()
        return open_video(path)
    if not 0 < stream.width * stream.height <= MAX_PIXELS:
        container.close()
        raise BadMedia(f"{path}: frames of {stream.width}x{stream.height}; they may have 1 pixel to "
                       f"{MAX_PIXELS // 10**6} megapixels")
    # One thread: the DataLoader's workers are the parallelism, and skip_frame is set packet by packet.
    stream.thread_type = "NONE"
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # frames may be larger than the header claims
    return container, stream


# Times count from the start of the file, as in players and transcripts: from where the first track begins, be it
# picture or sound. Before the first frame the first is shown, after the last one the last.
#
#     sound      |-----------------------|
#     picture          |--------|            seconds 2 to 5 of a file of 8 s; at 1.0 the first frame is shown
#     seconds    0     2        5        8

def tracks_of(container):
    """The streams of picture and sound."""
    return [stream for stream in container.streams if stream.type == "audio" or is_picture_track(stream)]


def file_start(container):
    """When the file starts, in seconds by its own clock, a Fraction."""
    starts = [s.start_time * s.time_base for s in tracks_of(container) if s.start_time is not None]
    if not starts or container.format.name == MATROSKA and min(starts) > 0:
        again, stream = open_video(container.name, decodes=False)
        with again, contextlib.suppress(av.FFmpegError):
            first = next(again.demux(stream))
            if first.pts is not None:
                starts.append(first.pts * stream.time_base)
    return min(starts, default=Fraction(0))


def video_duration(path):
    """Seconds of a video, to the end of its picture, or of its sound where that goes on. Nothing is decoded.

    By its header; or by its last packets where they end later, as a header may count frames in the order in which
    they are decoded.
    """
    container, stream = open_video(path, decodes=False)
    with container:
        ends = []  # (seconds by the file's clock, the kind of track or "")
        if container.format.name != MATROSKA:
            ends = [(((s.start_time or 0) + s.duration) * s.time_base, s.type)
                    for s in tracks_of(container) if s.duration]
        if not ends and container.duration:
            ends = [(Fraction(container.duration, av.time_base), "")]
        start = file_start(container)
        try:
            if ends and max(ends)[0] > start:  # FLV gives the length in place of the end
                container.seek(int(max(ends)[0] / stream.time_base), stream=stream)
            for packet in container.demux(tracks_of(container)):
                if packet.pts is not None:
                    end = (packet.pts + (packet.duration or 0)) * packet.time_base
                    ends.append((end, packet.stream.type if packet.duration else ""))
        except av.FFmpegError as e:
            if not ends:
                raise BadMedia(f"{path}: broken video ({e})") from None
        if not ends:
            raise BadMedia(f"{path}: a video without frames")
    end = max(ends)[0]
    picture_end = max([seconds for seconds, kind in ends if kind == "video"], default=end)
    # sound comes in pieces, so that it is mostly a little longer
    return float((end if end > picture_end + 0.1 else picture_end) - start)


def is_cut(path):
    """Whether a file lacks its end: its outermost boxes claim more bytes than it has. Of containers whose boxes have
    no sizes this cannot be told, and there a cut video is just a shorter one."""
    kind = container_format(path)
    end = 0  # of the boxes so far
    with open(path, "rb") as f:
        while True:
            f.seek(end)
            head = f.read(24)
            size = 0  # not known, or no box
            if kind == "mov":
                size = int.from_bytes(head[:4], "big")
                if size == 1:
                    size = int.from_bytes(head[8:16], "big")
            elif kind == "avi" and head[:4] == b"RIFF":
                size = 8 + int.from_bytes(head[4:8], "little")
            elif kind == "asf":
                size = int.from_bytes(head[16:], "little")
            elif kind == "flv" and head:
                size = 15 + int.from_bytes(head[1:4], "big") if end else 13
            elif kind == "matroska" and len(head) > 9:
                # an id and a size; the zero bits at the front of each tell how many bytes it takes
                n_id = 9 - head[0].bit_length()
                n_size = 9 - head[n_id].bit_length()
                claim = int.from_bytes(head[n_id:n_id + n_size], "big") - (1 << 7 * n_size)
                if claim < (1 << 7 * n_size) - 1:  # else all bits are set: not known
                    size = n_id + n_size + claim
            if size < 8:
                return end > os.path.getsize(path)
            end += size


# ---- decoding ----------------------------------------------------------------------------------------------

# EXIF orientation -> how the stored image is turned or mirrored to stand upright
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


def load_image(path, on_white=True):
    """The pixels of an image, upright: (H, W, 3) uint8. What is transparent is white.

    on_white=False: it has the colour that the file hides there, most often black. The processors of the released
    models do that (`convert("RGB")`), and their authors advise to put such images on a background first.
    """
    with open_image(path) as image:
        turn = UPRIGHT.get(orientation(image, path))
        try:
            if turn is not None:
                image = image.transpose(turn)
            if image.mode.startswith(("I", "F")):
                return deep_to_rgb(np.array(image), image.info.get("transparency") if on_white else None, path)
            if on_white and image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # convert would copy
        except PIL_ERRORS as e:
            raise BadMedia(f"{path}: truncated or corrupt image ({e})") from None


def deep_to_rgb(values, transparent, path):
    """A grey image of 16 or 32 bits or of floats, (H, W), as (H, W, 3) uint8.

    The file does not tell what is white. It is 1 for floats, the largest of 8 to 16 bits for integers; or the image's
    own largest value if that is larger, or far smaller. Black is 0. With negative values, the smallest one is black and
    the largest one white.
    """
    if not np.isfinite(values).all():
        raise BadMedia(f"{path}: has pixels that are not finite numbers")
    usual = [1] if values.dtype.kind == "f" else [255, 1023, 4095, 16383, 65535]
    values = values.astype(np.float64)
    black = min(values.min(), 0)
    largest = values.max()
    white = min([value for value in usual if value >= largest], default=largest)
    if black < 0 or largest * 16 < white:
        white = largest
    grey = (values - black) / (white - black or 1) * 255
    if transparent is not None:
        grey[values == transparent] = 255
    return np.repeat(grey.round().astype(np.uint8)[..., None], 3, 2)


def to_floats(pixels):
    """(H, W, 3) uint8 -> (1, 3, H, W) float32, for `resize`."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float()


def resize(x, height, width):
    """(1, 3, H, W) floats -> (height, width, 3) uint8: bilinear, without antialiasing, as the released models do it."""
    x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=False)
    # Means of bytes round to bytes: nothing to clamp. Pixels side by side are cut into patches faster than planes are.
    return x[0].round_().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def to_patches(crop, patch):
    """(n·patch, n·patch, 3) -> a view of it, (row, column, patch, patch, 3)."""
    n = crop.shape[0] // patch
    return crop.reshape(n, patch, n, patch, 3).swapaxes(1, 2)


def image_crops(pixels, n, patch, tiling):
    """The crops of an image, the low-resolution one first: (H, W, 3) uint8 -> (N, P, patch·patch·3) uint8."""
    side = n * patch
    rows, cols = tiling
    x = to_floats(pixels)
    crops = np.empty((1 + rows * cols, n, n, patch, patch, 3), np.uint8)
    # The aspect ratio is not kept: the model sees the whole image as a square.
    crops[0] = to_patches(resize(x, side, side), patch)
    if rows:
        margin = round(n * 4 / 27) * patch
        step = side - 2 * margin
        enlarged = resize(x, rows * step + 2 * margin, cols * step + 2 * margin)
        for i in range(rows):
            for j in range(cols):
                crop = enlarged[i * step:i * step + side, j * step:j * step + side]
                crops[1 + i * cols + j] = to_patches(crop, patch)
    return crops.reshape(len(crops), n * n, -1)


# Decoding frames that nobody wants is what a video costs most. So: read the packets without decoding them, find the
# frames that are shown at the wanted times, and decode from the key frame before each to the frame itself, without
# those that no other frame refers to. Only wanted frames are converted to RGB and kept.
#
#     times      0          5                    10      at 0.2 a second
#     packets    K p b p b  K p b p b  K p b p b  K      K key frame, p refers back, b is referred to by none
#     decoded    K          K p b                 K

class Packet(NamedTuple):
    """What a container tells of one frame without decoding it."""
    pts: int           # when it is shown, in ticks
    duration: int      # how long, 0 = not told
    dts: int           # when it is decoded, None = not told
    is_key: bool       # refers to no other frame
    is_discard: bool   # decoded because others refer to it, but not shown


def packets_of(container, stream, times):
    """Packets in file order, from the key frame before times[0] to the second key frame after times[-1].

    A frame may stand in the file behind a key frame that is shown after it, but never behind two.
    """
    tick = float(stream.time_base)
    origin = float(file_start(container) / stream.time_base)  # in ticks
    if times[0] > 0:
        try:
            container.seek(int(origin + times[0] / tick), stream=stream)
        except av.FFmpegError:
            return  # without packets every frame is decoded
    keys_past_end = 0
    for packet in container.demux(stream):
        if packet.is_keyframe and packet.pts is not None and (packet.pts - origin) * tick > times[-1] + 1e-6:
            keys_past_end += 1
        if keys_past_end == 2:
            return
        if packet.size:
            yield packet


def frame_plan(container, stream, times):
    """What to decode for the frames shown at `times`: (pts of each, bool per packet in file order), or None where
    the packets do not tell.

        file order   K  p  b  p  b  K  b  p       b is shown before the p or K that it follows
        pts          0  2  1  4  3  6  5  7
        decode       x  x  x                      for t = 1.5, which shows pts 1: from the key frame to the frame
        decode       x  x  x  x  x  x  x          for t = 5.5, which shows pts 5: it follows key 6 but may refer to
                                                  what stands before it, so from the key frame before that
    """
    packets = []
    for p in packets_of(container, stream, times):
        packets.append(Packet(p.pts, p.duration or 0, p.dts, p.is_keyframe, p.is_discard))
    if not packets or not packets[0].is_key or any(p.pts is None for p in packets):
        return None
    dts = [p.dts for p in packets if p.dts is not None]
    if dts != sorted(dts) or len({p.pts for p in packets}) < len(packets):
        return None  # a time comes twice, as where files were joined
    tick = float(stream.time_base)
    origin = float(file_start(container) / stream.time_base)
    shown = sorted(p.pts for p in packets if not p.is_discard)
    # a frame is shown until the next one begins
    frames = [bisect.bisect_right(shown, origin + (t + 1e-6) / tick) - 1 for t in times]
    if frames[0] < 0 and shown[0] > (stream.start_time or 0):
        return None  # the seek went too far
    end = (max(p.pts + p.duration for p in packets) - origin) * tick
    if times[-1] > end + 0.1:  # the last frame may stand long, or sound go on
        length = video_duration(container.name)
        asked = f"and {times[-1]:.1f} s were asked for"
        if is_cut(container.name):
            raise BadMedia(f"{container.name}: truncated: its frames end at {end:.1f} s, {asked}")
        if times[-1] > length + max(1, 0.1 * length):
            raise BadMedia(f"{container.name}: is {length:.1f} s long, {asked}")
    wanted = [shown[max(i, 0)] for i in frames]

    keys = [i for i, p in enumerate(packets) if p.is_key]
    place = {p.pts: i for i, p in enumerate(packets)}
    decode = np.zeros(len(packets), bool)
    for pts in set(wanted):
        key = bisect.bisect_right(keys, place[pts]) - 1
        if pts < packets[keys[key]].pts and key > 0:
            key -= 1
        decode[keys[key]:place[pts] + 1] = True
    return wanted, decode


def frames_of(stream, packets, decode, wanted):
    """Yields the decoded frames of the packets that `decode` marks, and some frames around them."""
    context = stream.codec_context
    for i, packet in enumerate(packets):
        if not decode[i]:
            continue
        context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from context.decode(packet)
        last_of_run = i + 1 == len(decode) or not decode[i + 1]
        if last_of_run:
            yield from context.decode(None)  # frames that the decoder still holds back
            context.flush_buffers()


def turned(pixels, matrix):
    """A decoded frame as it is to be seen. matrix: nine int32 (a, b, _, c, d, ...) as bytes, or None: what is stored
    at (x, y) is seen at (a·x + c·y, b·x + d·y), which turns the frame by right angles, mirrors it, or both."""
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    right, down = a, d
    if abs(b) > abs(a):
        pixels = pixels.transpose(1, 0, 2)
        right, down = c, b
    pixels = pixels[::-1 if down < 0 else 1, ::-1 if right < 0 else 1]
    return np.ascontiguousarray(pixels)  # torch takes no negative strides


def load_frames(path, times, keep=lambda rgb: rgb):
    """`frames_at` as a list."""
    return list(frames_at(path, times, keep))


def frames_at(path, times, keep=lambda rgb: rgb):
    """Yields the frames shown at `times` (seconds from the start, ascending), one at a time: keep(frame) of each
    (H, W, 3) uint8, upright.

    A frame is shown until the next begins, the last one to the end. These are exactly the frames that decoding the
    whole file gives.
    """
    def upright(frame):
        if frame.is_corrupt:
            raise BadMedia(f"{path}: broken video")
        # One thread here too: FFmpeg would start some for each frame, and a worker was seen to wait for them for ever.
        pixels = frame.to_ndarray(format="rgb24", threads=1)
        return keep(turned(pixels, frame.side_data.get(Type.DISPLAYMATRIX)))

    try:
        container, stream = open_video(path, decodes=False)
        with container:
            plan = frame_plan(container, stream, times)
        n = 0  # frames that came
        for kept in decode_wanted(path, times, *plan, upright) if plan else ():
            n += 1
            yield kept
        if n < len(times):
            yield from frames_in_turn(path, times[n:], upright)
    except (av.FFmpegError, OSError, ValueError) as e:
        raise BadMedia(f"{path}: broken video ({e})") from None


def frame_times(path):
    """When each frame of a video begins, in seconds. Nothing is decoded."""
    container, stream = open_video(path, decodes=False)
    with container:
        pts = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        if None in pts:
            return [n / float(stream.average_rate or 25) for n in range(len(pts))]
        start = file_start(container)
        return [float(ticks * stream.time_base - start) for ticks in sorted(pts)]


def video_size(path):
    """(width, height) of a video as it is seen, upright."""
    height, width, _ = load_frames(path, [0.0])[0].shape
    return width, height


def decode_wanted(path, times, wanted, decode, keep):
    """Yields keep(frame) for the pts in `wanted`, decoding as `frame_plan` says, up to the first that does not come."""
    container, stream = open_video(path)
    distinct = set(wanted)
    kept = {}  # pts -> what is kept of a frame whose turn has not come
    n = 0      # of `wanted`, whose turn has come
    with container:
        for frame in frames_of(stream, packets_of(container, stream, times), decode, distinct):
            if frame.pts in distinct:
                kept[frame.pts] = keep(frame)
            while n < len(wanted) and wanted[n] in kept:
                yield kept[wanted[n]]
                n += 1
                if n == len(wanted) or wanted[n] != wanted[n - 1]:
                    del kept[wanted[n - 1]]


def frames_in_turn(path, times, keep):
    """`frames_at` by decoding every frame up to the last one wanted, for files whose packets lack their times."""
    container, stream = open_video(path)
    rate = float(stream.average_rate or 25)
    yielded = 0
    shown = None
    with container:
        start = file_start(container)
        for n, frame in enumerate(container.decode(stream)):
            if frame.pts is None:
                begins = n / rate
            else:
                begins = float(frame.pts * stream.time_base - start)
            if shown is not None:  # wanted before this frame begins: the one before it is shown
                missed = sum(begins > t + 1e-6 for t in times[yielded:])
                yield from [keep(shown)] * missed if missed else []
                yielded += missed
            if yielded == len(times):
                return
            shown = frame
        if shown is None:
            raise BadMedia(f"{path}: no frame could be decoded")
        yield from [keep(shown)] * (len(times) - yielded)


def load_crops(path, layout, n, patch, shown=False):
    """The crops of an image or video as its layout asks for them: (N, P, patch·patch·3) uint8. shown: whether a person
    waits for them."""
    if layout.times:  # frames become crops one by one: a minute of raw frames would fill gigabytes
        frames = frames_at(path, layout.times, lambda rgb: image_crops(rgb, n, patch, (0, 0)))
        return np.concatenate(list(progress(frames, f"frames of {path} decoded", len(layout.times), shown)))
    return image_crops(load_image(path, layout.on_white), n, patch, layout.tiling)


class CropCache:
    """`load_crops` that keeps what it loaded, up to `room` bytes, and drops what has gone unused the longest.
    Worth it where all media together are small and come often."""

    def __init__(self, room):
        self.room = room
        self.crops = OrderedDict()  # the one used last is at the end

    def __call__(self, path, layout, n, patch):
        key = path, layout.tiling, tuple(layout.times), layout.on_white, n, patch
        if key not in self.crops:
            self.crops[key] = load_crops(path, layout, n, patch)
            self.room -= self.crops[key].nbytes
        self.crops.move_to_end(key)
        crops = self.crops[key]
        while self.room < 0:
            _, oldest = self.crops.popitem(last=False)
            self.room += oldest.nbytes
        return crops
