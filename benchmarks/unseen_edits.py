"""Edits that no method may be tuned on: do not read this, nor look at what it makes, before the end.

As in hard_edits.py, and invented without reading the method's code. Edits that cut keep the middle, or have a share.
Two are thought very hard: `sketch`, of which only outlines are left, and `double-exposure`, where another photograph
lies over all of it. `gif`, `halftone` and `photocopy` also lose colour or fine detail for good.
"""

from collections.abc import Iterator
from functools import partial

import cv2
import numpy as np
from further_edits import warp
from hard_edits import (
    Edit,
    Picture,
    Rng,
    as_array,
    as_picture,
    colour,
    font,
    make_backdrops,
    phrase,
    resized,
    write_fitted,
)
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

# Helpers


def blurred(pixels: np.ndarray, radius: float) -> np.ndarray:
    return cv2.GaussianBlur(pixels, (0, 0), radius)


def normed_grid(picture: Picture) -> tuple[np.ndarray, np.ndarray]:
    """x (1, width) and y (height, 1), both -1 … 1."""
    y, x = np.ogrid[-1 : 1 : picture.height * 1j, -1 : 1 : picture.width * 1j]
    return x, y


def make_partners(spare: list[Picture], rng: Rng) -> Iterator[Picture]:
    """Quarters of spare photographs that are not plain, then drawn pictures: each is used once."""
    for column, row in ((0, 0), (1, 1), (1, 0), (0, 1)):
        for picture in spare:
            w, h = picture.width // 2, picture.height // 2
            quarter = picture.crop((column * w, row * h, column * w + w, row * h + h))
            if as_array(quarter).std((0, 1)).mean() > 30:
                yield quarter
    yield from make_backdrops([], rng)


# Laid out anew


def banner(picture: Picture, rng: Rng) -> Picture:
    """A shop's: a bar with the price, a ribbon over a corner, a burst with the discount."""
    whole, (w, h) = picture.copy(), picture.size
    draw, bar, ink = ImageDraw.Draw(whole), int(rng.uniform(0.16, 0.26) * h), colour(rng, 0, 150)
    draw.rectangle((0, h - bar, w, h), fill=ink)
    price = f"{phrase(rng, 1, 2)}  {rng.integers(3, 200)}.99".upper()
    write_fitted(whole, price, (0, h - bar, round(w * 0.62), h), (255, 255, 255))
    button = (round(w * 0.66), round(h - bar * 0.8), round(w * 0.96), round(h - bar * 0.2))
    draw.rounded_rectangle(button, bar // 6, fill=(255, 214, 0))
    write_fitted(whole, "SHOP NOW", button, (20, 20, 20))
    near, wide = rng.uniform(0.25, 0.4) * min(w, h), rng.uniform(0.14, 0.2) * min(w, h)
    draw.polygon([(0, near), (near, 0), (near + wide, 0), (0, near + wide)], fill=colour(rng, 100))
    r = rng.uniform(0.16, 0.22) * min(w, h)
    x, y = rng.uniform(w * 0.6, w - r), rng.uniform(r, h - bar - r)
    tips = np.arange(2 * int(rng.integers(9, 16)))
    radii, angles = np.where(tips % 2, r * 0.82, r), tips * 2 * np.pi / len(tips)
    draw.polygon([*zip(x + radii * np.cos(angles), y + radii * np.sin(angles), strict=True)], fill=(225, 20, 40))
    box = (round(x - r * 0.8), round(y - r * 0.5), round(x + r * 0.8), round(y + r * 0.5))
    write_fitted(whole, f"-{rng.integers(2, 16) * 5}%", box, (255, 255, 255))
    return whole


def card(picture: Picture, rng: Rng) -> Picture:
    """A template for social media: in an arch, a headline above, a name below, dots."""
    width, height = 540, int(rng.integers(540, 760))
    paper, ink = colour(rng, 190), colour(rng, 0, 110)
    whole = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(whole)
    for _ in range(int(rng.integers(4, 9))):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(15, 110)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour(rng, 120))
    shown = ImageOps.fit(picture, (round(width * rng.uniform(0.62, 0.82)), round(height * rng.uniform(0.55, 0.65))))
    arch = Image.new("L", shown.size)
    corners = (True, True, False, False)
    ImageDraw.Draw(arch).rounded_rectangle((0, 0, *shown.size), shown.width * 0.4, fill=255, corners=corners)
    whole.paste(shown, ((width - shown.width) // 2, round(height * 0.22)), arch)
    write_fitted(whole, phrase(rng, 2, 4).title(), (20, 10, width - 20, round(height * 0.2)), ink)
    write_fitted(whole, "@" + phrase(rng, 1, 1), (150, round(height * 0.9), width - 150, height), ink)
    return whole


def collage(picture: Picture, rng: Rng, partners: Iterator[Picture]) -> Picture:
    """Beside, above or below another photograph that takes 25 – 38 % of the area, and a gap."""
    share, gap, first = rng.uniform(0.25, 0.38), int(rng.integers(0, 14)), bool(rng.integers(2))
    w, h = picture.size
    across = rng.random() < 0.5
    side = round((w if across else h) * share / (1 - share))
    other = ImageOps.fit(next(partners), (side, h) if across else (w, side))
    size = (w + gap + side, h) if across else (w, h + gap + side)
    whole = Image.new("RGB", size, (255, 255, 255) if rng.random() < 0.7 else colour(rng))
    a, b = (picture, other) if first else (other, picture)
    whole.paste(a, (0, 0))
    whole.paste(b, (size[0] - b.width, size[1] - b.height))
    return whole


def reel(picture: Picture, rng: Rng) -> Picture:
    """Cut to 9:16 under a video app: darkened below, buttons, captions, mostly a play sign."""
    whole = ImageOps.fit(picture, (360, 640), Image.Resampling.LANCZOS)
    shade = np.linspace(1.6, 0, 640).clip(0.25, 1)[:, None, None]
    whole = as_picture(as_array(whole) * shade)
    draw, white = ImageDraw.Draw(whole), (255, 255, 255)
    draw.text((180, 30), "Following  |  For You", fill=white, font=font(18), anchor="mm")
    for y in range(270, 500, 62):
        draw.ellipse((306, y, 346, y + 40), fill=white if rng.random() < 0.5 else colour(rng, 100))
        draw.text((326, y + 50), f"{rng.integers(1, 990)}K", fill=white, font=font(12), anchor="mm")
    if rng.random() < 0.7:
        draw.ellipse((130, 270, 230, 370), fill=(30, 30, 30))
        draw.polygon([(163, 292), (163, 348), (212, 320)], fill=white)
    draw.text((14, 520), "@" + "_".join(phrase(rng, 2, 2).split()), fill=white, font=font(20))
    for line in range(int(rng.integers(1, 4))):
        draw.text((14, 550 + 22 * line), phrase(rng, 3, 6), fill=white, font=font(15))
    draw.line((0, 634, 360, 634), fill=(120, 120, 120), width=4)
    draw.line((0, 634, int(rng.integers(20, 340)), 634), fill=white, width=4)
    return whole


def mug(picture: Picture, rng: Rng) -> Picture:
    """Printed around a white mug that stands on a table, seen from a little above."""
    width, height, radius = 640, 560, rng.uniform(150, 185)
    reach = rng.uniform(0.85, 1.15)  # radians to either side that the print goes
    high = min(2 * radius * reach * picture.height / picture.width, 360)
    reach = high * picture.width / picture.height / (2 * radius)
    middle, top, sag = rng.uniform(260, 330), (height - high) / 2 - 20, rng.uniform(0.1, 0.22) * radius
    whole = Image.new("RGB", (width, height), colour(rng, 120))
    draw = ImageDraw.Draw(whole)
    draw.rectangle((0, int(rng.integers(300, 420)), width, height), fill=colour(rng, 60, 200))
    left, right, low, bottom = middle - radius, middle + radius, top - 30, top + high + 30
    draw.arc((right - 40, low + 60, right + 100, bottom - 50), -110, 110, fill=(225, 225, 225), width=28)
    body = Image.new("L", (width, height))
    on_body = ImageDraw.Draw(body)
    on_body.rectangle((left, low, right, bottom), fill=255)
    for y in (low, bottom):
        on_body.ellipse((left, y - sag, right, y + sag), fill=255)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    angle = np.arcsin(((x - middle) / radius).clip(-1, 1))
    across, down = angle / (2 * reach) + 0.5, (y - top - sag * np.cos(angle)) / high
    printed = as_array(warp(picture, across * (picture.width - 1), down * (picture.height - 1)))
    inside = (np.minimum(across, down) >= 0) & (np.maximum(across, down) <= 1)
    light = 0.5 + 0.5 * np.cos(angle - rng.uniform(-0.6, 0.6))
    shaded = np.where(inside[..., None], printed, 245) * light[..., None]
    whole = Image.composite(as_picture(shaded), whole, body)
    ImageDraw.Draw(whole).ellipse((left + 5, low - sag + 3, right - 5, low + sag - 3), fill=(90, 80, 75))
    return whole


# Printed and saved badly


def halftone(picture: Picture, rng: Rng) -> Picture:
    """Newspaper: black dots on yellowish paper, 80 – 115 along the longer side."""
    large = resized(ImageOps.autocontrast(picture.convert("L"), 1), 1600 / max(picture.size))
    cell, tilt = 1600 / rng.uniform(80, 115), np.deg2rad(45 + rng.uniform(-10, 10))
    y, x = np.mgrid[: large.height, : large.width] * 2 * np.pi / cell
    screen = np.cos(x * np.cos(tilt) + y * np.sin(tilt)) + np.cos(y * np.cos(tilt) - x * np.sin(tilt))
    light = (as_array(large) > 128 + 56 * screen).astype(np.float32)[..., None]
    paper = np.array([228, 221, 203]) + rng.normal(0, 8, (large.height, large.width, 1))
    page = Image.fromarray((light * paper + (1 - light) * 38).clip(0, 255).astype(np.uint8))
    return page.resize(picture.size, Image.Resampling.BOX)


def photocopy(picture: Picture, rng: Rng) -> Picture:
    """Nearly black and white, toner spots and streaks, on a page that lay askew by 2 – 7°."""
    grey = as_array(ImageOps.autocontrast(picture.convert("L"), 2))
    local = blurred(grey, 0.06 * max(picture.size))
    grey = 255 / (1 + np.exp(-(grey - 0.5 * local - rng.uniform(45, 75)) / rng.uniform(8, 14)))
    grey[rng.random(grey.shape) < 0.01] = 20
    grey[:, rng.integers(0, picture.width, 3)] += rng.choice([-70, 70], 3)
    margin = round(rng.uniform(0.05, 0.15) * max(picture.size))
    page = ImageOps.expand(as_picture(grey), margin, 250)
    turned = page.rotate(float(rng.uniform(2, 7) * rng.choice([-1, 1])), Image.Resampling.BICUBIC, fillcolor=70)
    return turned.convert("RGB")


def gif(picture: Picture, rng: Rng) -> Picture:
    """200 – 260 pixels, 5 – 10 colours, dithered, shown at twice the size."""
    small = resized(picture, rng.uniform(200, 260) / max(picture.size))
    palette = small.quantize(int(rng.integers(5, 11)))
    dithered = small.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).convert("RGB")
    return dithered.resize((small.width * 2, small.height * 2), Image.Resampling.NEAREST)


# Colours and surface


def pop_art(picture: Picture, rng: Rng) -> Picture:
    """Equalised, channels exchanged, one of them inverted, three or four levels of each."""
    pixels = as_array(ImageOps.equalize(picture))[..., np.roll(np.arange(3), rng.integers(1, 3))] / 255
    one = int(rng.integers(3))
    pixels[..., one] = 1 - pixels[..., one]
    steps = int(rng.integers(2, 4))
    return as_picture((pixels * steps).round() / steps * 255)


def hdr(picture: Picture, rng: Rng) -> Picture:
    """Tone mapping overdone: local contrast, haloes, gaudy."""
    lab = cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2LAB)
    light = cv2.createCLAHE(rng.uniform(4, 8), (8, 8)).apply(lab[..., 0]).astype(np.float32)
    light += rng.uniform(0.6, 1.1) * (light - blurred(light, 0.03 * max(picture.size)))
    lab[..., 0] = light.clip(0, 255)
    mapped = Image.fromarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB))
    return ImageEnhance.Color(mapped).enhance(rng.uniform(1.5, 2.2))


def oil(picture: Picture, rng: Rng) -> Picture:
    """Details smoothed into strokes of one colour, with relief."""
    size = 2 * round(rng.uniform(0.007, 0.011) * max(picture.size)) + 1
    flat = as_picture((as_array(picture) / 16).round() * 16).filter(ImageFilter.ModeFilter(size))
    pixels = blurred(as_array(flat), 0.8)
    grain = blurred(rng.normal(0, 1, (picture.height, picture.width)).astype(np.float32), size / 3)
    grey = pixels.mean(2) + 250 * grain
    relief = grey - np.roll(grey, (1, 1), (0, 1))
    return as_picture(pixels + rng.uniform(0.3, 0.5) * relief[..., None])


def spotlight(picture: Picture, rng: Rng) -> Picture:
    """Dark but for a spot off the middle, light leaking in from one side."""
    x, y = normed_grid(picture)
    spot = np.exp(-((x - rng.uniform(-0.4, 0.4)) ** 2 + (y - rng.uniform(-0.4, 0.4)) ** 2) / rng.uniform(0.4, 0.7))
    leak = np.exp(-((1 + x * rng.choice([-1, 1]) + 0.3 * y) ** 2) / rng.uniform(0.1, 0.3))
    pixels = as_array(picture) * (0.12 + 0.95 * spot)[..., None]
    return as_picture(pixels + leak[..., None] * np.array([190, 90, 30]) * rng.uniform(0.6, 1))


# Parts removed


def cutout(picture: Picture, rng: Rng) -> Picture:
    """What is within a wavy outline, about half of the area, on white, a colour or the squares that mean nothing."""
    x, y = normed_grid(picture)
    direction, reach = np.arctan2(y, x), rng.uniform(0.78, 0.9)
    for waves in range(2, 7):
        reach = reach + rng.normal(0, 0.035) * np.cos(waves * direction + rng.uniform(0, 2 * np.pi))
    inside = blurred((np.hypot(x, y) < reach).astype(np.float32), 1)[..., None]
    square = max(4, max(picture.size) // 40)
    row, column = np.ogrid[: picture.height, : picture.width]
    squares = np.where((row // square + column // square) % 2, 255, 204)[..., None] * np.ones(3)
    ground = (np.full(3, 255), np.array(colour(rng)), squares)[rng.integers(3)]
    return as_picture(inside * as_array(picture) + (1 - inside) * ground)


def censored(picture: Picture, rng: Rng) -> Picture:
    """Coarse squares or black bars over about 40 % of the area."""
    whole, (w, h) = picture.copy(), picture.size
    coarse = resized(picture, 14 / max(w, h)).resize((w, h), Image.Resampling.NEAREST)
    black = Image.new("RGB", (w, h))
    hidden, wanted = np.zeros((h, w), bool), rng.uniform(0.35, 0.45)
    while hidden.mean() < wanted:
        wide, high = (round(rng.uniform(0.2, 0.4) * side) for side in (w, h))
        cover = coarse
        if rng.random() < 0.3:
            cover, high = black, high // 3
        left, top = int(rng.integers(w - wide)), int(rng.integers(h - high))
        box = (left, top, left + wide, top + high)
        whole.paste(cover.crop(box), box)
        hidden[top : top + high, left : left + wide] = True
    return whole


# Very hard


def sketch(picture: Picture, rng: Rng) -> Picture:
    """Pencil: outlines on paper, grain, no areas and no colour."""
    grey = as_array(picture.convert("L"))
    paler = blurred(255 - grey, rng.uniform(0.006, 0.012) * max(picture.size))
    lines = (255 * grey / np.maximum(255 - paler, 1)).clip(0, 255) / 255
    lines = lines ** rng.uniform(2, 3.5)
    grain = 1 - blurred(rng.random(grey.shape).astype(np.float32), 0.7) * (1 - lines)
    paper = np.array([248, 246, 240]) + rng.normal(0, 4, (*grey.shape, 1))
    return as_picture((0.15 + 0.85 * lines * grain)[..., None] * paper)


def expose_twice(picture: Picture, rng: Rng, partners: Iterator[Picture]) -> Picture:
    """Another photograph over all of it, with 38 – 46 % of the weight."""
    other = ImageOps.fit(next(partners), picture.size, Image.Resampling.LANCZOS)
    other = ImageOps.autocontrast(other.filter(ImageFilter.UnsharpMask(2, 120, 0)), 1)
    return ImageOps.autocontrast(Image.blend(picture, other, rng.uniform(0.38, 0.46)), 1)


UNSEEN: dict[str, Edit] = {
    "banner": Edit(banner),
    "card": Edit(card),
    "reel": Edit(reel),
    "mug": Edit(mug),
    "halftone": Edit(halftone),
    "photocopy": Edit(photocopy),
    "gif": Edit(gif),
    "pop-art": Edit(pop_art),
    "hdr-jpeg40": Edit(hdr, quality=40),
    "oil": Edit(oil),
    "crop60-spotlight": Edit(spotlight, share=0.6),
    "cutout": Edit(cutout),
    "censored": Edit(censored),
    "sketch": Edit(sketch),
}


def add_partners(partners: Iterator[Picture]) -> dict[str, Edit]:
    """`UNSEEN`, and the edits with another photograph in them."""
    two = {"collage": collage, "double-exposure": expose_twice}
    return UNSEEN | {name: Edit(partial(apply, partners=partners)) for name, apply in two.items()}
