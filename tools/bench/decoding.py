"""
What the workers do, on one core: the part data. JPEG and MP4 to crops, beside Pillow and FFmpeg alone; planning.
"""
import json
import math
import random

import av
import numpy as np
from PIL import Image, ImageChops
from torch.utils.benchmark import Timer

from lib import media
from model import PRESETS
from tools.bench.common import photo, planner_for


def milliseconds(do):
    return Timer("do()", globals=dict(do=do)).blocked_autorange().median * 1e3  # with one thread


def scenery(width, height):
    """An image whose JPEG takes as long to decode as a photo's: coarse noise and a little fine noise."""
    bands = []
    for _ in range(3):
        coarse = Image.effect_noise((width // 16, height // 16), 100).resize((width, height), Image.BICUBIC)
        bands.append(Image.blend(coarse, Image.effect_noise((width, height), 20), 0.25))
    return Image.merge("RGB", bands)


def image_speed(bench, what, width, height):
    """JPEG to crops; Pillow's decoding alone; draft mode, which decodes at a fraction of the size, and what it changes;
    the published processor, if transformers and torchvision are installed."""
    path = f"{width}x{height}.jpg"
    scenery(width, height).save(path, quality=85)
    layout = media.image_layout(width, height, 27, 14, 8)

    def in_draft():
        with Image.open(path) as image:
            image.draft("RGB", (378, 378))
            return media.image_crops(np.array(image), 27, 14, (0, 0))

    def published():
        return processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
    try:
        from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor
        processor = Molmo2ImageProcessor()
        published_ms = milliseconds(published)
    except Exception:  # without torchvision it is a TypeError
        published_ms = math.nan
    ms = milliseconds(lambda: media.load_crops(path, layout, 27, 14))
    low = media.image_crops(media.load_image(path), 27, 14, (0, 0))
    low_ms = milliseconds(lambda: media.image_crops(media.load_image(path), 27, 14, (0, 0)))
    bench.say(what, ms=ms, images_per_s=1e3 / ms, crops=layout.n_crops, ms_per_crop=ms / layout.n_crops,
              pillow_ms=milliseconds(lambda: Image.open(path).load()), published_ms=published_ms,
              low_res_alone_ms=low_ms, draft_ms=milliseconds(in_draft),
              draft_off=int(np.abs(low.astype(int) - in_draft()).max()))


def video_speed(bench, what, width, height, seconds, gop):
    """The frames of a video of 30 a second as crops, at 2 a second, against decoding all of them. gop: frames between
    two key frames."""
    scene = scenery(width, height)
    with av.open("video.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=30, width=width, height=height,
                                      options={"preset": "veryfast", "g": str(gop)})
        for k in range(30 * seconds):
            container.mux(stream.encode(av.VideoFrame.from_image(ImageChops.offset(scene, 3 * k, k))))
        container.mux(stream.encode())
    times = media.sample_times(media.video_duration("video.mp4"), 128)
    layout = media.Layout([], media.frame_layout(27), len(times), times=tuple(times))
    to_crops = lambda frame: media.image_crops(frame.to_ndarray(format="rgb24", threads=1), 27, 14, (0, 0))
    all_frames = lambda: np.concatenate(list(media.frames_in_turn("video.mp4", times, to_crops)))
    ours = lambda: media.load_crops("video.mp4", layout, 27, 14)
    ms = milliseconds(ours)
    bench.say(what, ok=np.array_equal(ours(), all_frames()), ms_per_frame=ms / len(times),
              frames_per_s=len(times) / ms * 1e3, frames=len(times), ms=ms,
              decoding_ms=milliseconds(lambda: media.load_frames("video.mp4", times, lambda rgb: None)),
              all_frames_ms=milliseconds(all_frames))


def planning_speed(bench, what, record, known):
    """A record to a plan, with what is known of its media in the record, and where their headers have to be read."""
    planner = planner_for(PRESETS["4b"], 16384, tiles=8, crops=128)
    plan = lambda record: planner.plan(json.loads(json.dumps(record)), ".", random.Random(0))
    bench.say(what, ms=milliseconds(lambda: plan(record | known)), headers_ms=milliseconds(lambda: plan(record)),
              tokens=plan(record)[0][0].n_tokens)


def part_data(bench, what):
    images, video = [(800, 534), (1800, 1200)], (1280, 720, 20, 30)
    if bench.tiny:
        images, video = [(160, 120)], (160, 96, 2, 30)
    for width, height in images:
        bench.attempt(f"image of {width}x{height}", image_speed, width, height)
    bench.attempt("video of {}x{}, {} s, a key frame every {}".format(*video), video_speed, *video)
    caption = dict(photo(0), image=f"{width}x{height}.jpg")
    size = dict(width=caption.pop("width"), height=caption.pop("height"))
    bench.attempt("planning a photo, 2 annotations", planning_speed, caption, size)
    questions = [dict(task="video_qa", prompt="where is the thing that moves " * 3, answer="at the wall")] * 6
    bench.attempt("planning a video, 6 annotations", planning_speed, dict(video="video.mp4", annotations=questions),
                  dict(duration=float(video[2])))
