"""How many pixels a copy really holds: an enlarged copy must not win over the smaller one it was made from.

In: the pairs of copies of different size, and the pixels of their rows. Out: `effective_pixels` of each row. Enlarging
leaves the top of the spectrum empty. How empty that must be cannot be told from one picture alone (a soft photograph,
a smooth drawing), but it can beside the smaller copy: above the highest frequency that the smaller one holds, the
larger one either goes on as the smaller one ends, or drops. Blind to enlarging by nearest neighbour: that fills it.
"""

import numpy as np
import polars as pl

from dedup.hashing import LUMA

SEGMENT = 128  # pixels a Fourier transform
LINES = 64  # rows and columns that are looked at
MIN_RATIO = 1 / 32  # what is smaller still leaves too few frequencies to compare; the larger one counts in full
MAX_RATIO = 0.9  # of the sides; closer sizes leave too little spectrum between them, so the larger one counts in full
MAX_OCTAVES = 1.0  # of the larger copy's spectrum that are compared with the same number at the smaller copy's end
MAX_DROP = 4.5  # dB, and as many again an octave: measured by benchmarks/effective_size.py
FLOOR = 1 / 12  # power of rounding to whole grey levels


def power_spectrum(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) → float32 (SEGMENT // 2 + 1,): mean power of its rows and columns at 0 … ½ cycles a pixel."""
    return (_line_power(pixels) + _line_power(pixels.swapaxes(0, 1))) / 2 + np.float32(FLOOR)


def _line_power(pixels: np.ndarray) -> np.ndarray:
    """Over windowed segments of evenly spaced lines (Welch 1967)."""
    lines = pixels[:: -(-len(pixels) // LINES)] @ LUMA
    length = min(SEGMENT, lines.shape[1])
    segments = lines[:, : lines.shape[1] // length * length].reshape(-1, length)
    window = np.hanning(length + 2)[1:-1].astype(np.float32)
    spectrum = np.fft.rfft((segments - segments.mean(axis=1, keepdims=True)) * window, SEGMENT)
    return (np.abs(spectrum) ** 2).mean(axis=0) / (window**2).sum()


def holds_more(larger: np.ndarray, smaller: np.ndarray, ratio: float) -> bool:
    """Whether the larger copy holds detail beyond what the smaller one can.

    larger, smaller: power spectra. ratio: side of the smaller copy to that of the larger one, at most MAX_RATIO.
    """
    end = min(1.0, ratio * 2**MAX_OCTAVES)
    beyond = _mean_power(larger, ratio, end)
    last = _mean_power(smaller, ratio / end, 1.0)
    return bool(10 * np.log10(last / beyond) < MAX_DROP * (1 + np.log2(end / ratio)))


def _mean_power(power: np.ndarray, low: float, high: float) -> float:
    """Between two shares of the highest frequency."""
    top = len(power) - 1
    return power[int(low * top) + 1 : round(high * top) + 1].mean()


def size_pairs(rows: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """Copies whose sizes differ enough to be judged: ids `larger` and `smaller`, `ratio` of their sides."""
    area = rows.select("id", area=_area())
    both = (
        pairs.filter(pl.col("class") == "copy")
        .join(area.rename({"id": "a", "area": "area_a"}), on="a")
        .join(area.rename({"id": "b", "area": "area_b"}), on="b")
    )
    a_larger = pl.col("area_a") > pl.col("area_b")
    small, large = pl.min_horizontal("area_a", "area_b"), pl.max_horizontal("area_a", "area_b")
    return both.select(
        larger=pl.when(a_larger).then("a").otherwise("b"),
        smaller=pl.when(a_larger).then("b").otherwise("a"),
        ratio=(small / large).sqrt(),
        area=large,
    ).filter(pl.col("ratio").is_between(MIN_RATIO, MAX_RATIO)).sort("area", "larger", "smaller")  # fmt: skip


def effective_pixels(rows: pl.DataFrame, sized: pl.DataFrame, spectra: dict[int, np.ndarray]) -> pl.Series:
    """Int64: width × height, or on a copy that holds no more than a smaller one, what that one holds.

    sized: of `size_pairs`; spectra: by picture. Smaller rows come first, so a chain of enlargements ends at its origin.
    """
    area, picture = rows.select(_area())["area"].fill_null(0).alias("effective_pixels"), rows["picture"]
    ends = pl.concat([sized["larger"], sized["smaller"]])
    pictures = picture.gather(ends).to_list()
    held, lowered = dict(zip(pictures, area.gather(ends), strict=True)), dict[int, int]()
    for larger, smaller, ratio in zip(pictures[: len(sized)], pictures[len(sized) :], sized["ratio"], strict=True):
        if held[smaller] < held[larger] and not holds_more(spectra[larger], spectra[smaller], ratio):
            held[larger] = lowered[larger] = held[smaller]
    if not lowered:
        return area
    less = pl.DataFrame({"picture": list(lowered), "less": list(lowered.values())}).cast({"picture": picture.dtype})
    found = picture.to_frame().join(less, on="picture", how="left", maintain_order="left")
    return pl.select(pl.min_horizontal(area, found["less"]).alias("effective_pixels")).to_series()


def _area() -> pl.Expr:
    return (pl.col("width").cast(pl.Int64) * pl.col("height").cast(pl.Int64)).alias("area")
