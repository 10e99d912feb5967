"""
Drawing: the points and tracks of an answer on a copy of the image or the video, and contact sheets.
"""
import colorsys
import contextlib
import functools
import importlib
import io
import math
import os
import textwrap

import av
import numpy as np
from PIL import Image, ImageDraw

from lib.errors import BadMedia, UserError
from lib.media import frames_at, load_image, video_duration
from lib.progress import progress


def colour_of(i):
    """A colour per id, neighbours far apart."""
    hue = i * 0.381966 % 1  # steps of the golden angle never come close to an earlier hue
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.9, 1.0))


def tint(pixels, masks):
    """A copy of an image (H, W, 3) with masks, {id: (H, W) bool}, half in the colour of the id."""
    pixels = pixels.copy()
    for i, mask in sorted(masks.items()):
        pixels[mask] = pixels[mask] // 2 + np.array(colour_of(i), np.uint8) // 2
    return pixels


def load_segmenter(name):
    """The function of --segmenter MODULE:FUNCTION, or None. It takes frames, [(H, W, 3) uint8], and points in some of
    them, [(frame, x, y, id)], and returns masks, {id: (frames, H, W) bool}: `lib.toy:segment` is one."""
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise UserError(f"--segmenter {name}: {e}; give MODULE:FUNCTION") from None


def masks_of(segmenter, frames, points):
    """What a segmenter makes of the points of each frame: {id: (frames, H, W) bool}; without one, or a point, {}."""
    clicks = []
    for k, points_of_frame in enumerate(points):
        clicks += [(k, p["x"], p["y"], p["id"]) for p in points_of_frame]
    return segmenter(frames, clicks) if segmenter and clicks else {}


def draw_points(pixels, points, trails=(), side=640):
    """A copy of an image (H, W, 3) with its points, numbered by id, and trails: [(id, [(x, y)])]. A PIL image whose
    longer side is `side`, or as it is if it is larger than twice that."""
    image = Image.fromarray(pixels)
    longest = max(image.size)
    scale = 1
    if longest < side:
        scale = side // longest  # small images are enlarged until a number can be read
    elif longest < 2 * side:
        scale = side / longest
    width = max(round(image.width * scale), 2)
    height = max(round(image.height * scale), 2)
    image = image.resize((width, height), Image.NEAREST if scale > 1 else Image.BILINEAR)
    pen = ImageDraw.Draw(image)
    radius = max(min(image.size) / 40, 5)
    # trails lie under the points; each is black with its colour inside, to be seen on any background
    for i, places in trails:
        if len(places) > 1:
            line = (np.array(places) * (width, height)).ravel().tolist()  # x, y, x, y, ... in pixels
            pen.line(line, "black", max(int(radius * 0.7), 3), joint="curve")
            pen.line(line, colour_of(i), max(int(radius * 0.4), 1), joint="curve")
    for p in points:
        x = p["x"] * width
        y = p["y"] * height
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], colour_of(p["id"]), "black",
                    max(int(radius / 4), 1))
        pen.text((x + radius, y + radius / 2), str(p["id"]), "white", stroke_width=2, stroke_fill="black",
                 font_size=2.4 * radius)
    return image


def at_time(points, t, gap=1.0):
    """The points of all tracks at t seconds: on the line between two points of one id at most `gap` seconds apart. A
    point without such a neighbour is shown for a quarter of a second."""
    tracks = {}  # id -> its points
    for p in points:
        if "t" in p:
            tracks.setdefault(p["id"], []).append(p)
    shown = []
    for _, track in sorted(tracks.items()):
        track.sort(key=lambda p: p["t"])
        earlier = [p for p in track if p["t"] <= t + 1e-6]  # times are rounded: a point at t is one
        later = track[len(earlier):]
        if not earlier:
            continue
        before = earlier[-1]
        if later and later[0]["t"] - before["t"] <= gap:
            after = later[0]
            share = (t - before["t"]) / (after["t"] - before["t"])
            shown.append(dict(before, x=before["x"] + share * (after["x"] - before["x"]),
                              y=before["y"] + share * (after["y"] - before["y"])))
        elif t - before["t"] < 0.25:
            shown.append(before)
    return shown


def trails_of(frames):
    """The lines along which the points of some frames moved, ordered by id: [(id, [(x, y)])]. An id that was away
    begins a new one."""
    trails = []
    going_on = {}  # id -> its line up to the last frame
    for points in frames:
        extended = {}
        for p in points:
            i = p["id"]
            if i not in going_on:
                going_on[i] = []
                trails.append((i, going_on[i]))
            going_on[i].append((p["x"], p["y"]))
            extended[i] = going_on[i]
        going_on = extended
    return sorted(trails, key=lambda trail: trail[0])


def save_sheet(images, path):
    """One page of images of one size, four in a row."""
    w, h = images[0].size
    rows = math.ceil(len(images) / 4)
    page = Image.new("RGB", (w * min(len(images), 4), h * rows), "white")
    for k, image in enumerate(images):
        page.paste(image, (k % 4 * w, k // 4 * h))
    page.save(path)


def save_mp4(images, out, rate):
    """Write images of one size, of any number, as a video of `rate` frames a second."""
    with av.open(out, "w") as container:
        stream = container.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
        for k, image in enumerate(images):
            if k == 0:  # only now the size is known
                stream.width, stream.height = image.size
                stream.bit_rate = 4_000_000
                stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


def save_gif(images, out, rate, limit=10**6):
    """Write images of one size as an animation that repeats. While it has more than `limit` bytes, half as large with
    half as many images: GIF suits small clips."""
    small = []
    for image in images:
        image.thumbnail((640, 640))  # a larger one does not fit anyway
        small.append(image)
    images = small
    milliseconds = 1000 // rate
    while True:
        file = io.BytesIO()
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
        if file.tell() <= limit or max(images[0].size) < 64:
            break
        images = [image.resize((image.width // 2, image.height // 2)) for image in images[::2]]
        milliseconds *= 2
    with open(out, "wb") as f:
        f.write(file.getvalue())


def draw_video(path, points, out, rate=10, segmenter=None):
    """Write the video to `out`, an animated GIF by its ending, else MP4, at `rate` frames a second with its points,
    each with its trail of the last two seconds and, given a segmenter, its mask; and OUT.png, a contact sheet of up to
    twelve times at which there are points. One frame at a time is in memory; a segmenter gets all of them at once."""
    duration = video_duration(path)
    times = np.arange(0, duration, 1 / rate)
    nearest = []
    marked = set()  # the frames with points
    for p in points:
        # a point moves to the frame nearest to its time, so that the frame shows it; one after the end is not drawn
        if p.get("t", math.inf) < duration + 1 / rate:
            frame = min(round(p["t"] * rate), len(times) - 1)
            nearest.append(dict(p, t=frame / rate))
            marked.add(frame)
    shown = [at_time(nearest, t) for t in times]  # the points of each frame
    sheet_frames = sorted(marked) or [0]
    if len(sheet_frames) > 12:  # evenly spaced, the first and the last among them
        sheet_frames = [sheet_frames[round(k * (len(sheet_frames) - 1) / 11)] for k in range(12)]
    sheet = []
    frames = frames_at(path, times)
    masks = {}
    if segmenter:
        frames = list(progress(frames, "frames decoded", len(times)))
        masks = masks_of(segmenter, frames, shown)

    def drawn_frames():
        """The frames, one at a time; those of the sheet go there on the way."""
        for k, pixels in enumerate(frames):
            recent = shown[max(k - 2 * rate, 0):k + 1]
            pixels = tint(pixels, {i: mask[k] for i, mask in masks.items()})
            image = draw_points(pixels, shown[k], trails_of(recent))
            image = image.crop((0, 0, image.width // 2 * 2, image.height // 2 * 2))  # yuv420p halves them
            if k in sheet_frames:
                cell = image.resize((image.width // 2, image.height // 2))
                ImageDraw.Draw(cell).text((4, 2), f"{times[k]:.1f} s", "white", stroke_width=2, stroke_fill="black",
                                          font_size=16)
                sheet.append(cell)
            yield image

    save = save_gif if out.lower().endswith(".gif") else save_mp4
    try:
        save(progress(drawn_frames(), "frames drawn", len(times)), out, rate)
    except BadMedia:  # further on in the video: half a copy is none
        with contextlib.suppress(FileNotFoundError):
            os.remove(out)
        raise
    save_sheet(sheet, out + ".png")


# What can be written, by ending; the first one is usual.
WRITABLE = dict(video=(".mp4", ".gif", ".mov", ".mkv"), image=(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif"))


def check_out(kind, out):
    """Where `draw` writes: `out`, or "answer" with the usual ending. UserError for what it cannot write."""
    endings = WRITABLE["video" if kind == "video" else "image"]
    if out is None:
        return "answer" + endings[0]
    if os.path.splitext(out)[1].lower() not in endings:
        raise UserError(f"--out {out}: must end in one of {' '.join(endings)}")
    if not os.path.isdir(os.path.dirname(out) or "."):
        raise UserError(f"--out {out}: there is no folder {os.path.dirname(out)}")
    return out


def draw(kind, paths, points, out, segmenter=None):
    """Draw the points of an answer, with a segmenter as of eval.py their masks too; returns the files written."""
    if kind == "video":
        draw_video(paths[0], points, out, segmenter=segmenter)
        return [out, out + ".png"]
    files = [out]
    if kind == "images":
        stem, ending = os.path.splitext(out)
        files = [f"{stem}_{k}{ending}" for k in range(len(paths))]
    for k, (path, file) in enumerate(zip(paths, files)):
        pixels = load_image(path)
        here = [p for p in points if p.get("image", k) == k]
        masks = masks_of(segmenter, [pixels], [here])
        draw_points(tint(pixels, {i: mask[0] for i, mask in masks.items()}), here).save(file)
    return files


def contact_sheet(cells, path, columns=6, side=150):
    """A page of questions about images: true points as circles, predicted ones as crosses, prompt and answer below.
    cells: [(image file, prompt, answer, true points, predicted points)]."""
    wrap = functools.partial(textwrap.wrap, width=29, placeholder=" ...")  # as many characters as an image is wide
    words = []  # (colour, line) below each image
    for _, prompt, text, _, _ in cells:
        words.append([((0, 80, 160), line) for line in wrap(prompt)]
                     + [("black", line) for line in wrap(text, max_lines=4)])
    height = side + 13 * max(map(len, words), default=0) + 7
    page = Image.new("RGB", (columns * (side + 10), math.ceil(len(cells) / columns) * height), "white")
    pen = ImageDraw.Draw(page)
    for k, (file, _, _, true, predicted) in enumerate(cells):
        left = k % columns * (side + 10) + 5
        top = k // columns * height + 3
        with Image.open(file) as image:
            page.paste(image.convert("RGB").resize((side, side)), (left, top))
        for p in true:
            x = left + p["x"] * side
            y = top + p["y"] * side
            pen.ellipse([x - 7, y - 7, x + 7, y + 7], outline="black", width=3)
            pen.ellipse([x - 6, y - 6, x + 6, y + 6], outline="white", width=1)
        for p in predicted:
            x = left + p["x"] * side
            y = top + p["y"] * side
            for colour, width in (("black", 4), ("white", 2)):
                pen.line([x - 5, y, x + 5, y], colour, width)
                pen.line([x, y - 5, x, y + 5], colour, width)
        for line, (colour, text) in enumerate(words[k]):
            pen.text((left, top + side + 1 + 13 * line), text, colour)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    page.save(path)
