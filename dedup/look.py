"""The second reading: what only rows need that the search has paired up. Colours, exact pixels, a close comparison.

In: locations of rows. Out: their thumbnails, digests, verdicts. Each function is a task for a worker. A file that is no
longer the one that was hashed is an error.
"""

import base64
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from dedup import detail, frames, hashing, images, sources, vectors, verify
from dedup.fingerprint import DecodeOptions

LOCATION = ["shard", "offset", "size", "key", "sha256"]
THUMBNAIL = 32
SIDE = 128  # JPEGs may be decoded at reduced scale down to this side before they become thumbnails
CLOSE_SIDE = 2 * verify.DETAIL  # the same for the close comparison: what is only just larger is badly resampled
REMEMBERED = 4  # pictures that a worker keeps decoded while it compares pairs


def read_again(src: Path, row: tuple, options: DecodeOptions, *, min_side: int | None = None) -> images.Decoded:
    """Decode the picture at a LOCATION. Raises SourceError."""
    return _decode(src, row, read_bytes(src, row), options, min_side)


def _decode(src: Path, row: tuple, data: bytes, options: DecodeOptions, min_side: int | None) -> images.Decoded:
    limits = {"max_pixels": options.max_pixels, "max_frames": options.max_frames}
    try:
        return images.decode(data, min_side=min_side, montage=True, **limits)
    except images.ImageError as error:
        raise sources.SourceError(f"{src}: {row[3]} was hashed, but cannot be decoded: {error}; remove it") from error


def read_bytes(src: Path, row: tuple) -> bytes:
    """The file or member at a LOCATION, if it is still the one that was hashed. Raises SourceError."""
    *place, sha256 = row
    data = sources.read_image(src, *place)
    if hashing.digest(data) != sha256:
        raise sources.SourceError(f"{src}: {place[-1]} has changed while it was read; run again")
    return data


def make_thumbnails(src: Path, rows: list[tuple], path: Path, options: DecodeOptions) -> None:
    """Write uint8 (rows, 32, 32, 3) to `path`, unless it is there."""
    if path.exists():
        return
    thumbnails = np.zeros((len(rows), THUMBNAIL, THUMBNAIL, 3), np.uint8)
    for number, row in enumerate(rows):
        thumbnails[number] = images.shrink(read_again(src, row, options, min_side=SIDE).pixels, THUMBNAIL)
    vectors.save(path, thumbnails)


class Thumbnails:
    """uint8 (n, 32, 32, 3) by row number, read from disk where they are indexed."""

    def __init__(self, ids: np.ndarray, paths: list[Path], rows_per_file: int) -> None:
        self.ids, self.paths, self.rows_per_file = ids, paths, rows_per_file

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        taken = np.empty((len(rows), THUMBNAIL, THUMBNAIL, 3), np.uint8)
        size = taken[:1].nbytes
        part, place = np.divmod(np.searchsorted(self.ids, rows), self.rows_per_file)
        for number, path in enumerate(map(self.paths.__getitem__, part)):
            with path.open("rb", buffering=0) as file:  # np.load takes twenty times as long for one thumbnail
                header = os.fstat(file.fileno()).st_size % size
                file.seek(header + size * int(place[number]))
                if file.readinto(taken[number]) != size:
                    raise OSError(f"{path} is damaged: delete it and run again")
        return taken


def digest_pixels(src: Path, rows: list[tuple], options: DecodeOptions) -> list[str]:
    """Digests of all pixels of all frames at full depth, transparency included: see `frames.read_rest`."""
    digests = []
    for row in rows:
        data = read_bytes(src, row)
        decoded = _decode(src, row, data, options, None)
        digests.append(hashing.pixel_digest(decoded.pixels, frames.read_rest(decoded, data)))
    return digests


def confirm_pairs(src: Path, pairs: list[tuple], options: DecodeOptions) -> list[bool]:
    """(location of a, location of b, number of the orientation that turns a into b) → whether they hold up close."""
    load = lru_cache(REMEMBERED)(lambda row: read_again(src, row, options, min_side=CLOSE_SIDE))
    return [verify.is_same_picture(load(b), load(a), orientation) for a, b, orientation in pairs]


def measure_detail(src: Path, rows: list[tuple], options: DecodeOptions) -> list[str]:
    """Power spectra (`detail.power_spectrum`) for `read_spectrum`: as text, a quarter of what JSON would take."""
    spectra = [detail.power_spectrum(read_again(src, row, options).pixels) for row in rows]
    return [base64.b64encode(spectrum.astype(np.float32).tobytes()).decode() for spectrum in spectra]


def read_spectrum(text: str) -> np.ndarray:
    """float32, as it was measured."""
    return np.frombuffer(base64.b64decode(text), np.float32)
