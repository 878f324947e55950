"""Pixels → local features: where in a picture there is something, and what it looks like there.

SIFT keypoints (Lowe 2004) with square-rooted descriptors (Arandjelović & Zisserman 2012, "RootSIFT"). They survive
cropping, scaling, turning and much recompression, and need no weights. A mirrored picture has the same descriptors in
another order, so mirrored copies cost no second extraction.
"""

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

SIDE = 192  # longer side in pixels at which features are taken; at 256 they cost twice as much and find 0.5 % more
POINTS = 250  # keypoints kept, the strongest
CONTRAST = 0.015  # OpenCV has 0.04: faded and blurred copies have weaker extrema
LAYERS = 2  # scales an octave; OpenCV has 3
SCALE = 255  # of a descriptor's components when stored as bytes


# Of one picture on disk, 34 kB, so that any picture of a file of them can be read alone.
RECORD = np.dtype(
    [("count", "<u2"), ("width", "<f4"), ("points", "<f4", (POINTS, 2)), ("descriptors", "u1", (POINTS, 128))]
)


@dataclass(frozen=True, slots=True)
class Features:
    """Of one picture. Positions are in units of its longer side, from the upper left corner."""

    points: np.ndarray  # float32 (n, 2): x, y, 0 … 1
    descriptors: np.ndarray  # uint8 (n, 128): RootSIFT × SCALE
    width: float  # of the picture in the same units


@cache
def _detector() -> cv2.SIFT:
    return cv2.SIFT.create(nfeatures=POINTS, nOctaveLayers=LAYERS, contrastThreshold=CONTRAST)


def extract(pixels: np.ndarray) -> Features:
    """uint8 (H, W, 3) → Features; none on a flat picture."""
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    grey = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)
    grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    found, raw = _detector().detectAndCompute(grey, None)
    if not found:
        return Features(np.zeros((0, 2), np.float32), np.zeros((0, 128), np.uint8), size[0] / SIDE)
    found, raw = found[:POINTS], raw[:POINTS]  # OpenCV keeps more when the last ones are equally strong
    points = np.array([point.pt for point in found], np.float32)  # (n, 2)
    root = np.sqrt(raw / np.maximum(raw.sum(axis=1, keepdims=True), 1e-6))
    points += 0.25  # OpenCV starts from an enlarged picture, and forgets that its pixels' centres have moved
    return Features(points / SIDE, np.rint(root * SCALE).astype(np.uint8), size[0] / SIDE)


def mirror(features: Features) -> Features:
    """Of the picture mirrored left-right: rows and angles of each descriptor's 4 × 4 × 8 bins run backwards."""
    bins = features.descriptors.reshape(-1, 4, 4, 8)[:, ::-1]
    turned = bins[..., -np.arange(8) % 8]
    x, y = features.points.T
    return Features(np.stack([features.width - x, y], axis=1), turned.reshape(-1, 128), features.width)


def pack(features: Features) -> np.ndarray:
    """→ one RECORD."""
    record = np.zeros((), RECORD)
    count = len(features.points)
    record["count"], record["width"] = count, features.width
    record["points"][:count], record["descriptors"][:count] = features.points, features.descriptors
    return record


def unpack(record: np.ndarray) -> Features:
    """Inverse of `pack`."""
    count = int(record["count"])
    return Features(record["points"][:count], record["descriptors"][:count], float(record["width"]))
