"""Candidate pair → class and evidence. A hash match is a candidate, not a verdict.

Perceptual hashes see grey gradients: a red heart and a blue one, flags of other colours, two clock faces may share one.
So every candidate is compared on the colour thumbnails of both pictures, turned the same way: by the mean residual and
by the residual of the worst tile. Small everywhere → `copy`; else → `look-alike`, reported and kept.
"""

from typing import Protocol

import numpy as np
import polars as pl

from dedup.manifest import ORIENTATIONS

TILES = 8  # tiles a side: 4 × 4 pixels of a 32-pixel thumbnail
# Measured on 2,248 OpenMoji drawings (benchmarks/look_alikes.py): JPEG (quality 30 and up), WebP and 0.25–1.6× resized
# copies stay below .015 and .034; of 3,952 pairs of differing drawings with a PDQ distance ≤ 31 all but 4 lie above.
MAX_RESIDUAL = 0.02  # RMS over the whole thumbnail, of 1
MAX_WORST_TILE = 0.04  # RMS over the worst tile
MIN_QUALITY = 50  # PDQ calls lower ones unfit for matching (ThreatExchange, pdq/README): those match by pixels only
BLOCK = 4_096  # pairs compared at a time


def orient(pictures: np.ndarray, orientation: int) -> np.ndarray:
    """(n, H, W, C) → turned as ORIENTATIONS[orientation] says: mirrored first when it is an `m`, then by 90° steps."""
    turned = pictures[:, :, ::-1] if orientation >= 4 else pictures
    return np.rot90(turned, orientation % 4, axes=(1, 2))


def residuals(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, S, S, 3) twice → float32 (n,) RMS difference and (n,) RMS of the worst tile, both 0 … 1."""
    squared = (a.astype(np.float32) - b.astype(np.float32)) ** 2 / 255**2
    n, side = squared.shape[:2]
    step = side // TILES
    tiles = squared.reshape(n, TILES, step, TILES, step, 3).mean(axis=(2, 4, 5))  # (n, TILES, TILES)
    return np.sqrt(tiles.mean(axis=(1, 2))), np.sqrt(tiles.max(axis=(1, 2)))


class Indexable(Protocol):
    """Thumbnails by row number: an array, or one that is read from disk."""

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...


def verify_pairs(pairs: pl.DataFrame, thumbnails: Indexable) -> pl.DataFrame:
    """Add residual, worst_tile, score and class to candidates (i, j, orientation number that turns j into i, hamming).

    thumbnails: uint8 (rows, S, S, 3), indexed by i and j; may be memory-mapped.
    """
    residual = np.zeros(len(pairs), np.float32)
    worst = np.zeros(len(pairs), np.float32)
    i, j, orientation = (pairs[c].to_numpy() for c in ("i", "j", "orientation"))
    for number in range(len(ORIENTATIONS)):
        chosen = np.flatnonzero(orientation == number)
        for start in range(0, len(chosen), BLOCK):
            block = chosen[start : start + BLOCK]
            turned = orient(thumbnails[j[block]], number)
            residual[block], worst[block] = residuals(thumbnails[i[block]], turned)
    same = (residual <= MAX_RESIDUAL) & (worst <= MAX_WORST_TILE)
    return pairs.with_columns(
        residual=pl.Series(residual).cast(pl.Float64),
        worst_tile=pl.Series(worst).cast(pl.Float64),
        score=(1 - pl.col("hamming") / 256) * (1 - pl.Series(residual).cast(pl.Float64)),
    ).with_columns(pl.Series("class", np.where(same, "copy", "look-alike")))
