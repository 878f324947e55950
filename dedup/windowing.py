"""Stored values of a medical picture → 8-bit grey, as its DICOM header says that it is to be looked at.

In: values as they were decoded, elements of the header. Out: uint8, dark to bright. Rescaling, the first window and
lookup tables are applied by pydicom (PS3.3, C.11.1 and C.11.2). Without a window, values of 8 bits stand as they are,
and deeper ones are spread between two percentiles of the picture: a few bright pixels do not make all others black.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pydicom import Dataset

PERCENTILES = (0.5, 99.5)
BLOCK = 1 << 20  # values of more than 16 bits that are computed at a time


def to_grey(values: np.ndarray, elements: "Dataset") -> np.ndarray:
    """Stored values (H, W) → uint8 (H, W) by what the header says of them, dark to bright."""
    spread = cache(lambda: _find_range(values, elements))
    if values.dtype.kind == "f" or values.dtype.itemsize > 2:
        blocks = np.array_split(values, -(-values.size // BLOCK))
        return np.concatenate([_tone(block, elements, spread) for block in blocks])
    codes = np.dtype(f"u{values.dtype.itemsize}")
    every = np.arange(1 << 8 * codes.itemsize, dtype=codes).view(values.dtype)
    return _tone(every, elements, spread)[values.view(codes)]  # each value there may be is computed once


def _tone(levels: np.ndarray, elements: "Dataset", spread: Callable[[], tuple[float, float]]) -> np.ndarray:
    """uint8 for each of the stored `levels`. spread: what is black and what is white without a window."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing

    inside = apply_modality_lut(levels, elements)
    low = high = 0.0
    with np.errstate(all="ignore"):
        try:
            if elements.get("VOILUTSequence"):
                inside, high = apply_voi_lut(inside, elements), 2.0 ** elements.VOILUTSequence[0].LUTDescriptor[2] - 1
            elif "WindowCenter" in elements and "WindowWidth" in elements:
                low, high = apply_windowing(np.array([-np.inf, np.inf]), elements)
                inside = apply_windowing(inside, elements)
        except (ValueError, NotImplementedError, IndexError, AttributeError):  # a width of 0, an unknown function
            low = high = 0.0
        if low == high:
            low, high = spread()
        grey = (np.asarray(inside, np.float64) - low) * (255 / (high - low) if high != low else 0)
    return np.clip(np.rint(np.nan_to_num(grey)), 0, 255).astype(np.uint8)


def _find_range(values: np.ndarray, elements: "Dataset") -> tuple[float, float]:
    """What is black and what is white without a window, after rescaling."""
    from pydicom.pixels import apply_modality_lut

    if values.dtype.kind != "f" and int(elements.BitsStored) <= 8:
        half = 1 << int(elements.BitsStored) - 1
        ends = np.array([-half, half - 1] if elements.PixelRepresentation else [0, 2 * half - 1], values.dtype)
    else:
        kept = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        if "PixelPaddingValue" in elements and (kept != elements.PixelPaddingValue).any():
            kept = kept[kept != elements.PixelPaddingValue]
        ends = np.percentile(kept, PERCENTILES, method="nearest").astype(values.dtype)
        if ends[0] == ends[1]:
            ends = np.array([kept.min(), kept.max()], values.dtype)
    low, high = sorted(float(end) for end in apply_modality_lut(ends, elements))
    return low, high
