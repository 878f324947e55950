"""Candidate pair → class and evidence. A hash match is a candidate, not a verdict.

Perceptual hashes see grey gradients: a red heart and a blue one, flags of other colours, two clock faces may share one.
So every candidate is looked at twice. First at the colour thumbnails of both pictures, turned the same way: the mean
residual and that of the worst tile (cheap, rejects nearly everything). What passes is compared at up to DETAIL pixels
a side, place by place: a mouth, a skin tone or a thin line is lost in a thumbnail; every frame of an animation, and
deep values with their tones spread. Small everywhere → `copy`; else → `look-alike`, reported and kept.
"""

from typing import Protocol

import cv2
import numpy as np
import polars as pl
from scipy.ndimage import convolve1d

from dedup.frames import pair_frames
from dedup.images import Decoded, ImageError
from dedup.manifest import ORIENTATIONS

TILES = 8  # tiles a side: 4 × 4 pixels of a 32-pixel thumbnail
# First look: RMS over the whole thumbnail and over the worst tile, of 1. JPEG adds noise, resampling moves edges: a
# copy may differ as much as JPEG does, or, once the thumbnails are smoothed, as little as resampling does.
MAX_DIFFERENCE = (0.03, 0.06)
MAX_SMOOTHED = (0.01, 0.025)
SMOOTHING = np.array([0.25, 0.5, 0.25], np.float32)
MIN_QUALITY = 30  # of PDQ, which calls 49 unfit by itself; what is flatter matches by pixels only
BLOCK = 512  # pairs compared at a time, each of them 12 KB in several copies

DETAIL = 256  # pixels a side of the second look, at most; never more than the smaller picture has
WINDOW = 9  # pixels a side of a place, about a JPEG block
NEIGHBOURHOOD = 17  # compression and resampling smear an edge about this far
FLOOR = 0.08  # contrast that is granted to a place without any
# Luma, and Cb and Cr (ITU-R BT.601) at half weight: lossy formats keep them at half the size and coarser.
CHANNELS = np.array([[0.299, 0.587, 0.114], [-0.084, -0.166, 0.25], [0.25, -0.209, -0.041]], np.float32)
TO_CHANNELS = np.hstack([CHANNELS / 255, -CHANNELS.sum(axis=1, keepdims=True) / 2])  # of 0 … 255, about its middle
# How far colour and pattern of a place may be off, in units of the contrast around it. Measured by
# benchmarks/look_alikes.py (copies) and benchmarks/lost_unique.py (different pictures).
MAX_LOSSY = (0.15, 0.4)
MAX_LOSSLESS = (0.03, 0.03)  # equal size and no lossy format: only a palette or rounding can lie between copies
LOSSY = frozenset(("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF", "GIF"))  # GIF by its dithered palette


def orient(pictures: np.ndarray, orientation: int) -> np.ndarray:
    """(n, H, W, C) → turned as ORIENTATIONS[orientation] says: mirrored first when it is an `m`, then by 90° steps."""
    turned = pictures[:, :, ::-1] if orientation >= 4 else pictures
    return np.rot90(turned, orientation % 4, axes=(1, 2))


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """As `orient`, of one picture uint8 (H, W, 3): numpy takes forty times as long to copy what is mirrored."""
    turned = cv2.flip(pixels, 1) if orientation >= 4 else pixels
    quarter = (None, cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)[orientation % 4]
    return turned if quarter is None else cv2.rotate(turned, quarter)


def residuals(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, S, S, 3) twice → float32 (n, 2) RMS over the whole and over the worst tile, plain and smoothed."""
    difference = (a.astype(np.float32) - b.astype(np.float32)) / 255
    smoothed = difference
    for axis in (1, 2):
        smoothed = convolve1d(smoothed, SMOOTHING, axis=axis, mode="nearest")
    return _whole_and_worst(difference), _whole_and_worst(smoothed)


def _whole_and_worst(difference: np.ndarray) -> np.ndarray:
    n, side = difference.shape[:2]
    step = side // TILES
    tiles = (difference**2).reshape(n, TILES, step, TILES, step, 3).mean(axis=(2, 4, 5))  # (n, TILES, TILES)
    return np.sqrt(np.stack([tiles.mean(axis=(1, 2)), tiles.max(axis=(1, 2))], axis=1))


def are_copies(plain: np.ndarray, smoothed: np.ndarray) -> np.ndarray:
    """bool (n,): small everywhere, by either measure."""
    return (plain <= MAX_DIFFERENCE).all(axis=1) | (smoothed <= MAX_SMOOTHED).all(axis=1)


class Indexable(Protocol):
    """Thumbnails by row number: an array, or one that is read from disk."""

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...


def verify_pairs(pairs: pl.DataFrame, thumbnails: Indexable) -> pl.DataFrame:
    """First look: add residual, worst_tile, score and class to candidates (i, j, orientation number, hamming).

    The orientation turns j into i. thumbnails: uint8 (rows, S, S, 3), indexed by i and j; may be memory-mapped.
    """
    plain, smoothed = np.zeros((2, len(pairs), 2), np.float32)
    i, j, orientation = (pairs[c].to_numpy() for c in ("i", "j", "orientation"))
    for number in range(len(ORIENTATIONS)):
        chosen = np.flatnonzero(orientation == number)
        for start in range(0, len(chosen), BLOCK):
            block = chosen[start : start + BLOCK]
            turned = orient(thumbnails[j[block]], number)
            plain[block], smoothed[block] = residuals(thumbnails[i[block]], turned)
    residual, worst_tile = (pl.Series(column).cast(pl.Float64) for column in plain.T)
    return pairs.with_columns(
        pl.Series("class", np.where(are_copies(plain, smoothed), "copy", "look-alike"), dtype=pl.String),
        residual=residual,
        worst_tile=worst_tile,
        score=(1 - pl.col("hamming") / 256) * (1 - residual),
    )


def is_same_picture(a: Decoded, b: Decoded, orientation: int = 0) -> bool:
    """Second look at one pair; the orientation number turns b into a.

    A JPEG may have been decoded at reduced scale, with sides of at least DETAIL.
    """
    turned = _turn(b.pixels, orientation)
    untouched = a.pixels.shape == turned.shape and LOSSY.isdisjoint((a.format, b.format))
    limit = MAX_LOSSLESS if untouched else MAX_LOSSY
    if not is_close(a.pixels, turned, limit):
        return False
    if a.file is None and b.file is None:
        return True
    try:
        limit = limit if a.file and b.file else MAX_LOSSY  # one that was made to have 8 bits, or a still
        return all(is_close(x, orient(y[None], orientation)[0], limit) for x, y in pair_frames(a, b))
    except ImageError:
        return False  # of what cannot be seen in full nobody knows


def is_close(a: np.ndarray, b: np.ndarray, limit: tuple[float, float]) -> bool:
    """uint8 (H, W, 3) twice: whether colour and pattern are nowhere off by more than the limit."""
    return all(off <= most for off, most in zip(local_differences(a, b), limit, strict=True))


def local_differences(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """uint8 (H, W, 3) twice, of any size → how far colour and pattern are off at the worst place, over its contrast.

    Colour: distance of the window's means over CHANNELS. Pattern: with v the variances of the two windows and c their
    covariance, √(2 (min(v) − c)). That is zero when one is the other, blurred or coarsely quantised (then c ≥ min(v):
    what the flatter one shows stands in the other), and large when each shows something of its own. Both are divided
    by the contrast around: the largest √min(v) of the NEIGHBOURHOOD, plus FLOOR.
    """
    size = (min(DETAIL, a.shape[1], b.shape[1]), min(DETAIL, a.shape[0], b.shape[0]))
    x, y = (_shrink(picture, size) for picture in (a, b))
    mean_x, mean_y = _blur(x), _blur(y)
    variance = np.minimum(*(_blur(_total(z * z)) - _total(mean * mean) for z, mean in ((x, mean_x), (y, mean_y))))
    covariance = _blur(_total(x * y)) - _total(mean_x * mean_y)
    colour = np.sqrt(_total((mean_x - mean_y) ** 2))
    pattern = np.sqrt(np.maximum(2 * (variance - covariance), 0))
    around = np.ones((NEIGHBOURHOOD, NEIGHBOURHOOD), np.uint8)
    contrast = FLOOR + cv2.dilate(np.sqrt(np.maximum(variance, 0)), around)
    return float((colour / contrast).max()), float((pattern / contrast).max())


def _shrink(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) → float32 (h, w, 3) in CHANNELS, about −.5 … .5; size: (w, h), at most W × H."""
    small = cv2.resize(np.ascontiguousarray(pixels), size, interpolation=cv2.INTER_AREA)
    return cv2.transform(small.astype(np.float32), TO_CHANNELS)


def _total(values: np.ndarray) -> np.ndarray:
    """Sum over the channels; as a product because numpy sums short axes slowly."""
    return cv2.transform(values, np.ones((1, 3), np.float32))


def _blur(values: np.ndarray) -> np.ndarray:
    return cv2.blur(values, (WINDOW, WINDOW), borderType=cv2.BORDER_REPLICATE)
