"""Edits as pictures are edited on the web, that a global hash does not survive, and sets of photographs made with them.

These are what a method may be tuned on; further_edits.py has been seen, unseen_edits.py is kept apart. A set holds for
every photograph its base (JPEG quality 90) and one file per edit, `all/STEM@EDIT.jpg`, and `groups.csv`: file, group
(STEM), edit, and left, top, right, bottom: the rectangle of the base that it shows, in the base's pixels, before any
later step of the edit. What is drawn depends on the file's name alone, except backdrops, which follow each other.
"""

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import polars as pl
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

Picture = Image.Image
Rng = np.random.Generator

WORDS = (
    "when you nobody always monday never finally coffee weekend really the best me every they said just again tomorrow "
    "before after wait what mood again summer home love this place think about it later big sale follow for more today "
    "only happy birthday travel tips number one secret mountain of work never again good morning see original here"
)


class Edit(NamedTuple):
    """Crop to a share of the area, then `apply`, then save as JPEG."""

    apply: Callable[[Picture, Rng], Picture]
    share: float = 1.0
    quality: int = 90


# Helpers


def phrase(rng: Rng, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS.split(), rng.integers(low, high + 1)))


def colour(rng: Rng, low: int = 0, high: int = 256) -> tuple[int, int, int]:
    r, g, b = rng.integers(low, high, 3).tolist()
    return r, g, b


def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(8, round(size)))


def write_fitted(
    picture: Picture, text: str, box: tuple[int, int, int, int], fill: tuple[int, int, int], stroke: int = 0
) -> None:
    """Text in one line, as large as the box allows, in its middle."""
    draw, (left, top, right, bottom) = ImageDraw.Draw(picture), box
    width = draw.textlength(text, font=font(100))
    size = min((bottom - top) * 0.75, 100 * (right - left) * 0.94 / max(width, 1))
    middle = ((left + right) / 2, (top + bottom) / 2)
    draw.text(middle, text, fill=fill, font=font(size), anchor="mm", stroke_width=stroke, stroke_fill=(0, 0, 0))


def as_array(picture: Picture) -> np.ndarray:
    return np.asarray(picture, np.float32)


def as_picture(pixels: np.ndarray) -> Picture:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def resized(picture: Picture, scale: float) -> Picture:
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def crop_share(picture: Picture, share: float, rng: Rng) -> tuple[int, int, int, int]:
    """Random rectangle with this share of the area, a little wider or narrower than the picture."""
    narrow = np.exp(rng.uniform(-0.15, 0.15))
    w, h = round(picture.width * share**0.5 * narrow), round(picture.height * share**0.5 / narrow)
    left, top = int(rng.integers(picture.width - w + 1)), int(rng.integers(picture.height - h + 1))
    return left, top, left + w, top + h


# Backdrops: each is used once


def smooth_noise(rng: Rng, width: int, height: int) -> np.ndarray:
    """float32 (height, width, 3), 0 … 255: octaves of noise."""
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 8):
        cells = rng.random((2**octave, 2**octave, 3)).astype(np.float32)
        total += cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC) * 0.6**octave
    low, high = total.min((0, 1)), total.max((0, 1))
    return (total - low) / (high - low) * 255


def mandelbrot(rng: Rng, width: int, height: int) -> np.ndarray:
    """A view of the edge of the set, its colours shuffled."""
    angle = rng.uniform(0, 2 * np.pi)
    edge = np.exp(1j * angle) / 2 - np.exp(2j * angle) / 4  # the main cardioid
    span = 10 ** rng.uniform(-1.6, -0.4)
    grid = np.linspace(-span, span, width)[None] + 1j * np.linspace(-span, span, height)[:, None] * height / width
    c = (edge + grid).astype(np.complex64)
    z, steps = np.zeros_like(c), np.zeros(c.shape, np.uint8)
    for _ in range(60):
        inside = np.abs(z) <= 2
        z = np.where(inside, z * z + c, z)
        steps += inside
    return rng.integers(0, 256, (64, 3))[steps].astype(np.float32)


def shapes(rng: Rng, width: int, height: int) -> np.ndarray:
    """Circles, boxes, lines and words over a gradient."""
    ends = rng.uniform(0, 255, (2, 3))
    ramp = np.linspace(0, 1, width)[None, :, None] * (ends[1] - ends[0]) + ends[0]
    picture = as_picture(np.repeat(ramp, height, 0))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(25, 60))):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(8, 90)
        kind = rng.integers(4)
        if kind == 0:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour(rng))
        elif kind == 1:
            draw.rectangle((x - r, y - r / 2, x + r, y + r / 2), fill=colour(rng), outline=colour(rng), width=3)
        elif kind == 2:
            draw.line((x, y, *rng.uniform(0, width, 2)), fill=colour(rng), width=int(r / 12) + 1)
        else:
            draw.text((x, y), phrase(rng, 1, 3), fill=colour(rng), font=font(r / 2))
    return as_array(picture)


def make_backdrops(spare: list[Picture], rng: Rng, width: int = 640, height: int = 480) -> Iterator[Picture]:
    """One after the other: a spare photograph, noise, a fractal, a mosaic of four spare photographs, shapes."""
    left = list(spare)
    while True:
        if left:
            yield ImageOps.fit(left.pop(), (width, height))
        yield as_picture(smooth_noise(rng, width, height))
        yield as_picture(mandelbrot(rng, width, height))
        if len(left) >= 4:
            mosaic = Image.new("RGB", (width, height))
            for cell in range(4):
                part = ImageOps.fit(left.pop(), (width // 2, height // 2))
                mosaic.paste(part, (cell % 2 * width // 2, cell // 2 * height // 2))
            yield mosaic
        yield as_picture(shapes(rng, width, height))


def paste(picture: Picture, rng: Rng, backdrops: Iterator[Picture]) -> Picture:
    """At 60 % of the size of the backdrop, anywhere on it."""
    whole = next(backdrops)
    small = resized(picture, 0.6 * min(whole.width / picture.width, whole.height / picture.height))
    whole.paste(
        small, (int(rng.integers(whole.width - small.width + 1)), int(rng.integers(whole.height - small.height + 1)))
    )
    return whole


# Edits


def same(picture: Picture, rng: Rng) -> Picture:
    return picture


def fade(picture: Picture, rng: Rng) -> Picture:
    """Contrast and saturation halved, lifted."""
    grey = ImageEnhance.Color(picture).enhance(0.5)
    return as_picture((as_array(grey) - 128) * 0.5 + 160)


def caption(picture: Picture, rng: Rng) -> Picture:
    """Two lines of large text across."""
    whole, (w, h) = picture.copy(), picture.size
    top = int(rng.uniform(0.15, 0.45) * h)
    for line in range(2):
        box = (0, top + line * h // 5, w, top + (line + 1) * h // 5)
        write_fitted(whole, phrase(rng, 2, 4).upper(), box, (255, 255, 255) if rng.random() < 0.7 else (255, 220, 0), 3)
    return whole


def meme(picture: Picture, rng: Rng) -> Picture:
    """White bars with black text above and below."""
    bar = int(picture.height * rng.uniform(0.18, 0.28))
    whole = Image.new("RGB", (picture.width, picture.height + 2 * bar), (255, 255, 255))
    whole.paste(picture, (0, bar))
    write_fitted(whole, phrase(rng, 3, 6), (0, 0, whole.width, bar), (0, 0, 0))
    write_fitted(whole, phrase(rng, 3, 6), (0, whole.height - bar, whole.width, whole.height), (0, 0, 0))
    return whole


def perspective(picture: Picture, rng: Rng) -> Picture:
    """Corners moved inwards by up to 22 % of the sides."""
    w, h = picture.size
    corners = np.array([[0, 0], [w, 0], [w, h], [0, h]], np.float32)
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * rng.uniform(0, 0.22, (4, 2)) * (w, h)
    matrix = cv2.getPerspectiveTransform(corners, (corners + inwards).astype(np.float32))
    border = colour(rng)
    return Image.fromarray(cv2.warpPerspective(np.asarray(picture), matrix, (w, h), borderValue=border))


def screenshot(picture: Picture, rng: Rng) -> Picture:
    """In a telephone's timeline or a browser's page, light or dark."""
    paper, ink = ((18, 18, 22), (225, 225, 230)) if rng.random() < 0.5 else ((250, 250, 250), (30, 30, 35))
    phone = rng.random() < 0.5
    width, height = (400, 800) if phone else (960, 640)
    whole = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(whole)
    hour, minute = int(rng.integers(24)), int(rng.integers(60))
    if phone:
        draw.text((16, 8), f"{hour:02d}:{minute:02d}", fill=ink, font=font(18))
        draw.rounded_rectangle((350, 10, 384, 26), 4, outline=ink, width=2)
        draw.rectangle((353, 13, 353 + int(rng.integers(4, 28)), 23), fill=ink)
        draw.ellipse((14, 50, 62, 98), fill=colour(rng))
        draw.text((76, 54), phrase(rng, 1, 2), fill=ink, font=font(18))
        draw.text((76, 78), phrase(rng, 2, 4), fill=(128, 128, 128), font=font(14))
        shown = resized(picture, min(400 / picture.width, 520 / picture.height))
        left, top = (400 - shown.width) // 2, 112
        below = top + shown.height + 14
        draw.polygon([(20, below + 8), (34, below), (48, below + 8), (34, below + 24)], outline=ink, width=2)
        draw.ellipse((66, below, 92, below + 24), outline=ink, width=2)
        draw.line((110, below + 24, 136, below), fill=ink, width=2)
        for line in range(int(rng.integers(1, 4))):
            draw.text((16, below + 34 + line * 22), phrase(rng, 4, 8), fill=ink, font=font(16))
    else:
        draw.rectangle((0, 0, width, 36), fill=tuple(abs(v - 30) for v in paper))
        draw.rounded_rectangle((10, 6, 210, 44), 8, fill=paper)
        draw.text((24, 12), phrase(rng, 2, 3), fill=ink, font=font(16))
        draw.rounded_rectangle((110, 44, 860, 70), 12, outline=(128, 128, 128), width=2)
        draw.text((126, 48), "https://" + "-".join(phrase(rng, 2, 4).split()) + ".example", fill=ink, font=font(15))
        for left in (16, 46, 76):
            draw.line((left + 16, 48, left, 57, left + 16, 66), fill=ink, width=3)
        shown = resized(picture, min(640 / picture.width, 500 / picture.height))
        left, top = 30, 130
        draw.text((30, 84), phrase(rng, 3, 6), fill=ink, font=font(28))
        for line in range(int(rng.integers(6, 20))):
            draw.text((left + shown.width + 24, 130 + line * 24), phrase(rng, 3, 5), fill=ink, font=font(15))
    whole.paste(shown, (left, top))
    return whole


def stickers(picture: Picture, rng: Rng) -> Picture:
    """Smileys, stars and hearts until an eighth of the area is covered."""
    whole, (w, h) = picture.copy(), picture.size
    draw, covered, wanted = ImageDraw.Draw(whole), 0.0, rng.uniform(0.1, 0.15) * w * h
    while covered < wanted:
        r = rng.uniform(0.09, 0.16) * min(w, h)
        x, y = rng.uniform(r, w - r), rng.uniform(r, h - r)
        kind = rng.integers(3)
        if kind == 0:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 205, 50), outline=(190, 130, 0), width=3)
            for side in (-1, 1):
                eye = x + side * r * 0.35
                draw.ellipse((eye - r * 0.12, y - r * 0.45, eye + r * 0.12, y - r * 0.1), fill=(80, 50, 0))
            draw.chord((x - r * 0.6, y - r * 0.4, x + r * 0.6, y + r * 0.65), 10, 170, fill=(120, 40, 20))
        elif kind == 1:
            angles = np.arange(10) * np.pi / 5 - np.pi / 2
            radii = np.where(np.arange(10) % 2, r * 0.5, r)
            draw.polygon([(x + a, y + b) for a, b in zip(radii * np.cos(angles), radii * np.sin(angles), strict=True)],
                         fill=colour(rng, 128), outline=(255, 255, 255), width=3)  # fmt: skip
        else:
            t = np.linspace(0, 2 * np.pi, 60)
            across, up = np.sin(t) ** 3, (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
            draw.polygon([(x + r * a, y - r * b) for a, b in zip(across, up, strict=True)], fill=(225, 30, 60))
        covered += (3.14, 1.47, 1.8)[kind] * r * r
    return whole


def gamma(picture: Picture, rng: Rng) -> Picture:
    power = 2.2 if rng.random() < 0.5 else 1 / 2.2
    return as_picture(255 * (as_array(picture) / 255) ** power)


def noise(picture: Picture, rng: Rng) -> Picture:
    return as_picture(as_array(picture) + rng.normal(0, 25, (picture.height, picture.width, 3)))


def letterbox(picture: Picture, rng: Rng) -> Picture:
    """Square of 256 pixels with black bars."""
    return ImageOps.pad(picture, (256, 256), Image.Resampling.LANCZOS)


def sharpen(picture: Picture, rng: Rng) -> Picture:
    return picture.filter(ImageFilter.UnsharpMask(3, 250, 0))


HARD: dict[str, Edit] = {
    "crop50": Edit(same, share=0.5),
    "crop30": Edit(same, share=0.3),
    "jpeg8": Edit(same, quality=8),
    "blur4": Edit(lambda p, rng: p.filter(ImageFilter.GaussianBlur(4))),
    "rot12": Edit(lambda p, rng: p.rotate(12, Image.Resampling.BICUBIC, expand=bool(rng.integers(2)))),
    "rot90": Edit(lambda p, rng: p.transpose(Image.Transpose.ROTATE_90)),
    "faded": Edit(fade),
    "text": Edit(caption),
    "meme": Edit(meme),
    "perspective": Edit(perspective),
    "screenshot": Edit(screenshot),
    "gray": Edit(lambda p, rng: p.convert("L").convert("RGB")),
    "crop50-hflip": Edit(lambda p, rng: ImageOps.mirror(p), share=0.5),
    "stickers": Edit(stickers),
    "gamma": Edit(gamma),
    "noise": Edit(noise),
    "letterbox": Edit(letterbox),
    "sharp-jpeg30": Edit(sharpen, quality=30),
    "palette16": Edit(lambda p, rng: p.quantize(16).convert("RGB")),
    "upscaled": Edit(lambda p, rng: resized(resized(p, 160 / max(p.size)), max(p.size) / 160)),
}


# Sets


def add_paste(backdrops: Iterator[Picture]) -> dict[str, Edit]:
    """`HARD` and `pasted`, on one backdrop after the other."""
    return HARD | {"pasted": Edit(partial(paste, backdrops=backdrops))}


def read_distinct(photos: Path) -> list[tuple[str, Picture]]:
    """(stem, photograph of longest side ≤ 640 and shorter ≥ 200), no two alike, in random order."""
    kept: dict[str, Picture] = {}
    seen: list[np.ndarray] = []
    for path in sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")):
        picture = Image.open(path).convert("RGB")
        picture.thumbnail((640, 640), Image.Resampling.LANCZOS)
        small = np.asarray(picture.resize((16, 16), Image.Resampling.BOX), float)
        if min(picture.size) < 200 or any(np.sqrt(((small - other) ** 2).mean()) < 25 for other in seen):
            continue
        seen.append(small)
        kept[path.stem] = picture
    names = np.random.default_rng(0).permutation(sorted(kept)).tolist()
    return [(name, kept[name]) for name in names]


def make_edited(pictures: list[tuple[str, Picture]], folder: Path, edits: dict[str, Edit]) -> None:
    """Write `folder/all/STEM@EDIT.jpg` and `folder/groups.csv`."""
    (folder / "all").mkdir(parents=True, exist_ok=True)
    rows = []
    for stem, picture in pictures:
        for name, edit in ({"base": Edit(same)} | edits).items():
            rng = np.random.default_rng(zlib.crc32(f"{stem}@{name}".encode()))
            box = crop_share(picture, edit.share, rng) if edit.share < 1 else (0, 0, *picture.size)
            edited = edit.apply(picture.crop(box), rng)
            edited.save(folder / "all" / f"{stem}@{name}.jpg", quality=edit.quality)
            rows.append((f"{stem}@{name}.jpg", stem, name, *box))
    columns = ["file", "group", "edit", "left", "top", "right", "bottom"]
    pl.DataFrame(rows, schema=columns, orient="row").write_csv(folder / "groups.csv")
