"""Distances that attacks use beside those of `defense.distances`: the largest of their tiles, and near any of many.

Arrays in, arrays out; 0 … 1 for pixels in 0 … 1; smaller = more alike. Knows nothing of files or thresholds.
"""

import itertools

import numpy as np

from defense.distances import l2, scale


def near_any(images: np.ndarray, pixels: np.ndarray, chosen: np.ndarray, delta: float, batch: int = 256) -> np.ndarray:
    """Float (N, H, W, C), uint8 (M, H, W, C), which of these bool (M,) → bool (N,): within delta of one of them.

    A batch of pictures is converted at a time.
    """
    rows, near = np.flatnonzero(chosen), np.zeros(len(images), bool)
    for first in range(0, len(rows), batch):
        near |= (l2(images, scale(pixels[rows[first : first + batch]])) <= delta).any(axis=1)
    return near


def max_tile_l2(a: np.ndarray, grid: int = 4) -> np.ndarray:
    """Float (N, H, W, C) → float32 (N, N): largest `l2` over the grid × grid pairs of corresponding tiles.

    Carlini et al. 2023, sec. 4.2: the whole-image distance calls pictures on one large background alike. Never
    smaller than `l2`. Sides that the grid does not divide give tiles that differ by a pixel. Raises ValueError.
    """
    if min(a.shape[1:3]) < grid:
        raise ValueError(f"{grid} × {grid} tiles do not fit into {a.shape[1]} × {a.shape[2]} pixels")
    rows, columns = (np.linspace(0, side, grid + 1).round().astype(int) for side in a.shape[1:3])
    largest = np.zeros((len(a), len(a)), np.float32)
    for top, bottom in itertools.pairwise(rows):
        for left, right in itertools.pairwise(columns):
            tile = a[:, top:bottom, left:right]
            np.maximum(largest, l2(tile, tile), out=largest)
    return largest
