"""Both sides of the colour check: copies merge, look-alikes stay apart, whichever way they are turned."""

import numpy as np
import polars as pl
import pytest
from PIL import Image, ImageDraw

from dedup import images, verify


def draw_heart(fill: str, size: int = 256) -> np.ndarray:
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    s = size / 256
    pen.ellipse([v * s for v in (40, 50, 135, 145)], fill=fill, outline="black", width=int(6 * s))
    pen.ellipse([v * s for v in (120, 50, 215, 145)], fill=fill, outline="black", width=int(6 * s))
    pen.polygon([v * s for v in (48, 120, 207, 120, 128, 220)], fill=fill)
    return np.asarray(image)


def draw_clock(angle: float) -> np.ndarray:
    image = Image.new("RGB", (256, 256), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((20, 20, 236, 236), fill="#eee", outline="black", width=8)
    pen.line((128, 128, 128 + 80 * np.sin(angle), 128 - 80 * np.cos(angle)), fill="black", width=8)
    return np.asarray(image)


def judge(a: np.ndarray, b: np.ndarray, orientation: int = 0) -> str:
    thumbnails = np.stack([images.shrink(a, 32), images.shrink(b, 32)])
    pair = pl.DataFrame({"i": [0], "j": [1], "orientation": [orientation], "hamming": [0]})
    return verify.verify_pairs(pair, thumbnails)["class"].item()


@pytest.mark.parametrize("fill", ["blue", "green", "#c02020", "white"])
def test_a_recoloured_drawing_is_no_copy(fill: str) -> None:
    assert judge(draw_heart("red"), draw_heart(fill)) == "look-alike"


def test_another_time_is_no_copy() -> None:
    assert judge(draw_clock(0), draw_clock(np.pi / 6)) == "look-alike"


@pytest.mark.parametrize("scale", [0.5, 0.62, 0.81, 1.3])
def test_a_resized_drawing_is_a_copy(scale: float) -> None:
    heart = draw_heart("red")
    side = round(256 * scale)
    resized = np.asarray(Image.fromarray(heart).resize((side, side), Image.Resampling.LANCZOS))
    assert judge(heart, resized) == "copy"


@pytest.mark.parametrize("number", range(8))
def test_the_second_picture_is_turned_into_the_first(number: int) -> None:
    clock = draw_clock(1)
    turned = verify.orient(clock[None], number)[0]
    assert judge(turned, clock, number) == "copy"
    others = [judge(turned, clock, other) for other in range(8) if other != number]
    assert others.count("copy") == 0
