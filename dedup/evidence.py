"""Pictures of the copy level → features, what two of them share, and whether they are copies: what each worker does.

In: places of rows, and the folder that they are in. Out: files of features and vectors, and of pairs their evidence.
Which rows and pairs are asked about is decided elsewhere (`copies`, `match`), and so is what follows from a verdict.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import polars as pl

from dedup import features, frames, geometry, images, look, overlay, vectors, verify, vocabulary
from dedup.fingerprint import DecodeOptions
from dedup.manifest import ORIENTATIONS, Schema

PICTURE = 256  # JPEGs may be decoded at reduced scale down to this side before they are laid over each other
REMEMBERED = 8  # pictures that a worker keeps decoded while it compares pairs
MATCH: Schema = {"orientation": pl.String, "inliers": pl.Int32, "transform": pl.List(pl.Float64)}
VERDICT: Schema = {"class": pl.String, "score": pl.Float64, "overlap": pl.Float64}


def extract_features(
    src: Path, rows: list[tuple], path: Path, options: DecodeOptions, known: list[tuple[Path, int] | None]
) -> None:
    """Write `features.RECORD` (rows,) to `path`, unless it is there. known: where the record of each row is already."""
    if path.exists():
        return
    records = np.zeros(len(rows), features.RECORD)
    for number, (row, place) in enumerate(zip(rows, known, strict=True)):
        if place is not None:
            records[number] = open_features(place[0])[place[1]]
            continue
        picture = look.read_again(src, row, options, min_side=features.SIDE)
        records[number] = features.pack(features.extract(picture.pixels))
    vectors.save(path, records)


def encode_features(path: Path, learned: Path, digest: str) -> np.ndarray:
    """Features of a file → float16 (2, rows, d): the pictures, and their mirror images."""
    words = vocabulary.load(learned, digest)
    found = [features.unpack(record) for record in np.load(path)]
    upright = [words.encode(each) for each in found]
    mirrored = [words.encode(features.mirror(each)) for each in found]
    return np.array([upright, mirrored], np.float16)


def match_pairs(src: Path, pairs: list[tuple], options: DecodeOptions) -> list[tuple]:
    """(file and number of the features of a, of b, whether a is mirrored, if known) → MATCH; nulls where none holds."""
    results: list[tuple] = []
    for path_a, number_a, path_b, number_b, mirrored in pairs:
        a, b = (
            features.unpack(open_features(path)[number]) for path, number in ((path_a, number_a), (path_b, number_b))
        )
        found = geometry.match(a, b, mirrored)
        if found is None:
            results.append((None, 0, None))
        else:
            name = ORIENTATIONS[geometry.orientation(found)]
            results.append((name, found.inliers, found.transform.ravel().tolist()))
    return results


@lru_cache(256)
def open_features(path: Path) -> np.ndarray:
    """`features.RECORD` of a file, read when they are asked for."""
    return np.load(path, mmap_mode="r")


type Load = Callable[[int], images.Decoded]  # least side to decode at → picture


def judge(load_a: Load, load_b: Load, found: geometry.Match, *, strict: bool) -> tuple[str | None, float, float]:
    """Class (null: nothing), score and overlap of two pictures whose features match.

    Drawings, and pictures too small to show details, are compared in all they have: as at hash level when both show the
    same, else where they overlap.
    """
    pixels_a, pixels_b = load_a(PICTURE).pixels, load_b(PICTURE).pixels
    strict |= min(max(pixels_a.shape), max(pixels_b.shape)) < overlay.SIDE
    alignment = overlay.align(pixels_a, pixels_b, found, strict=strict)
    kind = overlay.classify(found, alignment)
    if kind is not None and overlay.needs_close_look(found, alignment):
        a, b = load_a(look.CLOSE_SIDE), load_b(look.CLOSE_SIDE)
        if alignment.covered >= overlay.SAME_FRAME:
            kind = "copy" if verify.is_same_picture(b, a, geometry.orientation(found)) else "look-alike"
        elif kind == "copy" and not verify.is_close(*overlay.lay_closely(a.pixels, b.pixels, found), verify.MAX_LOSSY):
            kind = "look-alike"
    return kind, alignment.score, alignment.overlap


def judge_pairs(src: Path, pairs: list[tuple], options: DecodeOptions) -> list[tuple]:
    """(location of a, of b, orientation, inliers, transform, strict) → VERDICT."""
    load = lru_cache(REMEMBERED)(lambda row, side: look.read_again(src, row, options, min_side=side))
    results = []
    for row_a, row_b, name, inliers, transform, strict in pairs:
        found = geometry.Match(np.array(transform).reshape(3, 3), name.startswith("m"), inliers)
        kind, *evidence = judge(partial(load, row_a), partial(load, row_b), found, strict=strict)
        if kind == "copy" and not _holds_in_full(load(row_a, PICTURE), load(row_b, PICTURE), found, strict=strict):
            kind = "look-alike"
        results.append((kind, *evidence))
    return results


def _holds_in_full(a: images.Decoded, b: images.Decoded, found: geometry.Match, *, strict: bool) -> bool:
    """Whether two copies are so in each frame and at full depth.

    The match is of montages: a frame is put there as often as they have frames, and so lies where it lay.
    """
    if a.file is None and b.file is None:
        return True
    shown = max(1, round(a.pixels.shape[0] / a.height))
    try:
        for pair in frames.pair_frames(a, b):
            x, y = (_as_still(np.concatenate([pixels] * shown)) for pixels in pair)
            if judge(partial(give, x), partial(give, y), found, strict=strict)[0] != "copy":
                return False
    except images.ImageError:
        return False
    return True


def give(picture: images.Decoded, side: int) -> images.Decoded:
    """A `Load` of a picture that is here already, as large as it is."""
    return picture


def _as_still(pixels: np.ndarray) -> images.Decoded:
    return images.Decoded(pixels, pixels.shape[1], pixels.shape[0], "JPEG")
