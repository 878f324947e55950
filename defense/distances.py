"""Distances between pictures: arrays in, arrays out. All are 0 … 1 for pixels in 0 … 1; smaller = more alike.

Sums are taken in float64 from products of matrices, a few rows at a time. Knows nothing of files or models.
"""

import numpy as np

CHUNK = 2**25  # numbers converted to float64 at a time: 256 MB


def scale(pixels: np.ndarray) -> np.ndarray:
    """uint8 0 … 255 → float32 0 … 1."""
    return pixels.astype(np.float32) / 255


def flip(images: np.ndarray) -> np.ndarray:
    """(N, H, W, C), mirrored left-right."""
    return images[:, :, ::-1]


def l2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Float (N, H, W, C) and (M, H, W, C), values 0 … 1 → float32 (N, M): root of the mean squared difference.

    The normalised ℓ2 of Carlini et al. 2023, sec. 4.1. Raises ValueError for integers and unequal shapes.
    """
    for images in (a, b):
        if not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"pixels must be floats in 0 … 1, not {images.dtype}: see `scale`")
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"images of {a.shape[1:]} cannot be compared with images of {b.shape[1:]}")
    size = int(np.prod(a.shape[1:]))
    rows = max(1, CHUNK // max(size, 1))
    distances = np.empty((len(a), len(b)), np.float32)
    for right in range(0, len(b), rows):
        y = _centre(b[right : right + rows])  # (m, D)
        norms = np.einsum("md,md->m", y, y)
        for left in range(0, len(a), rows):
            same = a is b and left == right  # numpy multiplies an array with itself in half the time
            x = y if same else _centre(a[left : left + rows])  # (n, D)
            squares = np.einsum("nd,nd->n", x, x)[:, None] + norms - 2 * (x @ y.T)
            distances[left : left + rows, right : right + rows] = np.sqrt(squares.clip(0) / size)
    return distances


def _centre(images: np.ndarray) -> np.ndarray:
    """float64 (N, D). Smaller numbers leave smaller rounding errors in the difference of their squares."""
    return images.reshape(len(images), -1).astype(np.float64) - 0.5


def flip_min(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Like `l2`, to the image or to its mirror image, whichever is nearer."""
    return np.minimum(l2(a, b), l2(a, flip(b)))
