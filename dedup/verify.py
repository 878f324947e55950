"""Candidate pair → class and evidence. A hash match is a candidate, not a verdict.

Perceptual hashes see grey gradients: a red heart and a blue one, flags of other colours, two clock faces may share one.
So every candidate is compared on the colour thumbnails of both pictures, turned the same way: by the mean residual and
by the residual of the worst tile. Small everywhere → `copy`; else → `look-alike`, reported and kept.
"""

from typing import Protocol

import numpy as np
import polars as pl
from scipy.ndimage import convolve1d

from dedup.manifest import ORIENTATIONS

TILES = 8  # tiles a side: 4 × 4 pixels of a 32-pixel thumbnail
# RMS over the whole thumbnail and over the worst tile, of 1. JPEG adds noise, resampling moves edges: a copy may differ
# as much as JPEG does, or, once the thumbnails are smoothed, as little as resampling does. Measured on 2,248 OpenMoji
# drawings at 128 and at 256 pixels (benchmarks/look_alikes.py, docs/benchmarks.md).
MAX_DIFFERENCE = (0.02, 0.04)
MAX_SMOOTHED = (0.006, 0.016)
SMOOTHING = np.array([0.25, 0.5, 0.25], np.float32)
MIN_QUALITY = 50  # PDQ calls lower ones unfit for matching (ThreatExchange, pdq/README): those match by pixels only
BLOCK = 4_096  # pairs compared at a time


def orient(pictures: np.ndarray, orientation: int) -> np.ndarray:
    """(n, H, W, C) → turned as ORIENTATIONS[orientation] says: mirrored first when it is an `m`, then by 90° steps."""
    turned = pictures[:, :, ::-1] if orientation >= 4 else pictures
    return np.rot90(turned, orientation % 4, axes=(1, 2))


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
    """Add residual, worst_tile, score and class to candidates (i, j, orientation number that turns j into i, hamming).

    thumbnails: uint8 (rows, S, S, 3), indexed by i and j; may be memory-mapped.
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
