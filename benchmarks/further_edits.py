"""Further edits: they were unseen until the first measurement, and have been seen since.

As in hard_edits.py. Edits that are still unseen are in unseen_edits.py.
"""

import io

import cv2
import numpy as np
from hard_edits import (
    Edit,
    Picture,
    Rng,
    as_array,
    as_picture,
    colour,
    font,
    meme,
    perspective,
    phrase,
    resized,
    write_fitted,
)
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps


def recompressed(picture: Picture, quality: int) -> Picture:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def warp(picture: Picture, x: np.ndarray, y: np.ndarray) -> Picture:
    """Each pixel from position (x, y) of the picture, black outside."""
    maps = x.astype(np.float32), y.astype(np.float32)
    return Image.fromarray(cv2.remap(np.asarray(picture), *maps, cv2.INTER_CUBIC))


def shear(picture: Picture, rng: Rng) -> Picture:
    slope = rng.uniform(0.2, 0.4) * rng.choice([-1, 1])
    extra = abs(slope) * picture.height
    matrix = (1, slope, -max(0, slope) * picture.height, 0, 1, 0)
    size = (picture.width + int(extra), picture.height)
    return picture.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=colour(rng))


def vintage(picture: Picture, rng: Rng) -> Picture:
    """Sepia, dark corners, grain, a pale rim."""
    grey = as_array(picture).mean(2, keepdims=True)
    toned = 0.25 * as_array(picture) + 0.75 * grey * np.array([1.1, 0.9, 0.65])
    y, x = np.ogrid[-1 : 1 : picture.height * 1j, -1 : 1 : picture.width * 1j]
    dark = np.clip(1.15 - 0.55 * (x * x + y * y), 0, 1)[..., None]
    grain = rng.normal(0, 12, (picture.height, picture.width, 1))
    return ImageOps.expand(as_picture(toned * dark + grain), round(picture.width * 0.04), (240, 232, 210))


def watermark(picture: Picture, rng: Rng) -> Picture:
    """The same word all over, slanting, half transparent."""
    side = round(1.5 * max(picture.size))
    tile = Image.new("L", (side, side))
    draw, word, size = ImageDraw.Draw(tile), phrase(rng, 1, 2), max(picture.size) / 16
    for row in range(0, side, round(size * 2.2)):
        for column in range(-row % 97, side, round(size * 7)):
            draw.text((column, row), word, fill=130, font=font(size))
    tile = ImageOps.fit(tile.rotate(30, Image.Resampling.BICUBIC), picture.size, centering=(0.5, 0.5))
    return Image.composite(Image.new("RGB", picture.size, (255, 255, 255)), picture, tile)


def curl(picture: Picture, rng: Rng) -> Picture:
    """A corner turned over: the paper's back, and nothing behind it."""
    w, h = picture.size
    reach = rng.uniform(0.5, 0.7) * min(w, h)
    y, x = np.mgrid[:h, :w]
    depth = (w - x) + (h - y)
    back = (170 + 80 * np.clip((depth - reach * 0.6) / (reach * 0.4), 0, 1))[..., None]
    pixels = np.where(depth[..., None] < reach, back, as_array(picture))
    return as_picture(np.where(depth[..., None] < reach * 0.6, 255, pixels))


def frame(picture: Picture, rng: Rng) -> Picture:
    """Mat and a thick wooden frame."""
    mat, wood = round(min(picture.size) * 0.12), round(min(picture.size) * 0.14)
    whole = ImageOps.expand(ImageOps.expand(picture, mat, (245, 243, 236)), wood)
    grain = np.repeat(rng.normal(0, 14, (whole.height, 1)), whole.width, 1)[..., None]
    timber = as_picture(np.array(colour(rng, 50, 150)) + grain + rng.normal(0, 4, (whole.height, whole.width, 1)))
    timber.paste(whole.crop((wood, wood, whole.width - wood, whole.height - wood)), (wood, wood))
    return timber


def fisheye(picture: Picture, rng: Rng) -> Picture:
    """Barrel distortion."""
    y, x = np.mgrid[-1 : 1 : picture.height * 1j, -1 : 1 : picture.width * 1j]
    stretch = 1 + rng.uniform(0.2, 0.4) * (x * x + y * y)
    return warp(picture, (x * stretch + 1) / 2 * (picture.width - 1), (y * stretch + 1) / 2 * (picture.height - 1))


def duotone(picture: Picture, rng: Rng) -> Picture:
    dark, light = colour(rng, 0, 110), colour(rng, 170)
    return ImageOps.colorize(ImageOps.autocontrast(picture.convert("L")), dark, light)


def stripes(picture: Picture, rng: Rng) -> Picture:
    """Opaque slanting stripes over a third of the picture."""
    period, angle = rng.uniform(0.1, 0.2) * max(picture.size), rng.uniform(0, np.pi)
    y, x = np.mgrid[: picture.height, : picture.width]
    covered = (x * np.cos(angle) + y * np.sin(angle)) % period < period * 0.33
    return as_picture(np.where(covered[..., None], colour(rng), as_array(picture)))


def stretch(picture: Picture, rng: Rng) -> Picture:
    """Mirrored, and 1.7 times as wide or as high."""
    w, h = picture.size
    size = (round(w * 1.7), h) if rng.random() < 0.5 else (w, round(h * 1.7))
    return ImageOps.mirror(picture).resize(size, Image.Resampling.BICUBIC)


def photograph_screen(picture: Picture, rng: Rng) -> Picture:
    """A screen seen at an angle: lines, a cast, a reflection, soft."""
    pixels = as_array(picture) * np.array([0.8, 0.95, 1.1])
    pixels[::3] *= 0.75
    y, x = np.ogrid[: picture.height, : picture.width]
    moire = 12 * np.sin(x * rng.uniform(0.3, 0.6) + y * rng.uniform(0.1, 0.3))
    glare = 90 * np.exp(-((x / picture.width - rng.random()) ** 2 + (y / picture.height - rng.random()) ** 2) / 0.05)
    seen = perspective(as_picture(pixels + (moire + glare)[..., None]), rng)
    return seen.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1.2))


def cartoon(picture: Picture, rng: Rng) -> Picture:
    """Flat colours with black outlines."""
    pixels = np.asarray(picture)
    flat = cv2.bilateralFilter(cv2.bilateralFilter(pixels, 9, 40, 9), 9, 40, 9)
    grey = cv2.medianBlur(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 5)
    lines = cv2.adaptiveThreshold(grey, 255, cv2.ADAPTIVE_THRESH_MEAN_C, cv2.THRESH_BINARY, 9, 6)
    return Image.fromarray(np.minimum(flat // 32 * 32 + 16, lines[..., None]))


def motion(picture: Picture, rng: Rng) -> Picture:
    """Smeared along a line of 4 % of the longer side."""
    length = max(3, round(max(picture.size) * 0.04))
    line = np.zeros((length, length), np.float32)
    line[length // 2] = 1
    turn = cv2.getRotationMatrix2D((length // 2, length // 2), rng.uniform(0, 180), 1)
    kernel = cv2.warpAffine(line, turn, (length, length))
    return Image.fromarray(cv2.filter2D(np.asarray(picture), -1, kernel / kernel.sum()))


def ripple(picture: Picture, rng: Rng) -> Picture:
    """Waves in both directions, as through old glass."""
    y, x = np.mgrid[: picture.height, : picture.width].astype(np.float64)
    size = 0.012 * max(picture.size)
    period = max(picture.size) / rng.uniform(3, 6)
    return warp(picture, x + size * np.sin(2 * np.pi * y / period), y + size * np.sin(2 * np.pi * x / period))


def story(picture: Picture, rng: Rng) -> Picture:
    """Upright, over its own blurred enlargement, turned by up to 40°, with a label."""
    whole = ImageOps.fit(picture, (360, 640)).filter(ImageFilter.GaussianBlur(14))
    shown = ImageOps.mirror(resized(picture, 300 / max(picture.size))).convert("RGBA")
    shown = shown.rotate(float(rng.uniform(20, 40)), Image.Resampling.BICUBIC, expand=True)
    whole.paste(shown, ((360 - shown.width) // 2, (640 - shown.height) // 2), shown)
    ImageDraw.Draw(whole).rounded_rectangle((60, 540, 300, 590), 12, fill=colour(rng))
    write_fitted(whole, phrase(rng, 2, 3), (60, 540, 300, 590), (255, 255, 255))
    return whole


def pixelate(picture: Picture, rng: Rng) -> Picture:
    """Blocks of 1/80 of the longer side."""
    return resized(picture, 80 / max(picture.size)).resize(picture.size, Image.Resampling.NEAREST)


def filtered(picture: Picture, rng: Rng) -> Picture:
    """A filter of a picture app: curves by channel, saturation, a glow, after two generations of compression."""
    pixels = as_array(recompressed(recompressed(picture, 40), 55)) / 255
    pixels = pixels ** np.array(rng.uniform(0.6, 1.6, 3)) * np.array([0.9, 0.85, 0.8]) + rng.uniform(0, 0.15, 3)
    vivid = ImageEnhance.Color(as_picture(pixels * 255)).enhance(1.6)
    return Image.blend(vivid, vivid.filter(ImageFilter.GaussianBlur(6)), 0.4)


FURTHER: dict[str, Edit] = {
    "crop40-meme-jpeg20": Edit(meme, share=0.4, quality=20),
    "shear": Edit(shear),
    "vintage": Edit(vintage),
    "watermark": Edit(watermark),
    "curl": Edit(curl),
    "frame": Edit(frame),
    "fisheye": Edit(fisheye),
    "duotone": Edit(duotone),
    "stripes": Edit(stripes),
    "hflip-stretch": Edit(stretch),
    "screen-photo": Edit(photograph_screen),
    "cartoon": Edit(cartoon),
    "motion": Edit(motion),
    "ripple": Edit(ripple),
    "story": Edit(story),
    "pixelated": Edit(pixelate),
    "crop50-filter": Edit(filtered, share=0.5),
}
