"""The first stage: one shard of a source → one signature table and one array of colour thumbnails.

A pure function of the shard and the decode options, so any worker on any machine may run it, and a finished file is
never made again. In: a `Shard`. Out: `<work>/00000.parquet` (the manifest's columns up to `pdq_quality`) and
`<work>/00000.npy`, uint8 (rows, 32, 32, 3). Knows nothing of other shards.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from dedup import hashing, images, sources
from dedup.manifest import SCHEMA, write_atomic

THUMBNAIL = 32
HASH_SIDE = 128  # JPEGs may be decoded at reduced scale down to this side: PDQ then moves by at most 8 bits of 256
BATCH = 256  # rows hashed together; never crosses a shard, so results do not depend on the number of workers
COLUMNS = [
    *("source", "shard", "offset", "size", "key", "caption", "width", "height", "format", "status", "error"),
    *("sha256", "phash", "dhash", "pdq", "pdq_d4", "pdq_quality"),
]


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """Limits on untrusted images, and how JPEGs are decoded for hashing ("fast": reduced scale, "exact": full)."""

    max_pixels: int = images.MAX_PIXELS
    max_frames: int = images.MAX_FRAMES
    hash_decode: str = "fast"


def fingerprint_shard(shard: sources.Shard, index: int, work: Path, options: DecodeOptions) -> tuple[int, int]:
    """Write the signatures of one shard; returns (rows, unreadable rows). Done already → only counted."""
    path = work / f"{index:05d}.parquet"
    if path.exists():
        status = pl.read_parquet(path, columns=["status"])["status"]
        return len(status), int((status != "ok").sum())
    rows: list[dict] = []
    thumbnails: list[np.ndarray] = []
    pending: list[tuple[dict, np.ndarray, np.ndarray, np.ndarray]] = []
    try:
        for record in sources.read_shard(shard):
            rows.append(_fingerprint_record(record, shard, options, pending, thumbnails))
            if len(pending) >= BATCH:
                _hash_batch(pending)
    except sources.SourceError as error:  # what was read before the damage stays
        key = shard.name or ""
        row = dict.fromkeys(COLUMNS) | _location(shard, key) | {"key": key, "offset": 0, "size": 0}
        rows.append(row | {"status": "unreadable", "error": str(error)})
        thumbnails.append(np.zeros((THUMBNAIL, THUMBNAIL, 3), np.uint8))
    _hash_batch(pending)
    frame = pl.DataFrame(rows, schema={column: SCHEMA[column] for column in COLUMNS})
    stack = np.stack(thumbnails) if thumbnails else np.zeros((0, THUMBNAIL, THUMBNAIL, 3), np.uint8)
    write_atomic(path.with_suffix(".npy"), lambda temporary: _save_array(temporary, stack))
    write_atomic(path, frame.write_parquet)  # last: its existence means done
    return len(frame), int((frame["status"] != "ok").sum())


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as handle:  # np.save would append .npy to the temporary name
        np.save(handle, array)


def _location(shard: sources.Shard, key: str) -> dict[str, str | None]:
    folder = key.split("/")[0] if "/" in key else Path(shard.root).name
    return {"source": folder, "shard": shard.name}


def _fingerprint_record(
    record: sources.Record,
    shard: sources.Shard,
    options: DecodeOptions,
    pending: list[tuple[dict, np.ndarray, np.ndarray, np.ndarray]],
    thumbnails: list[np.ndarray],
) -> dict:
    """One row without its hashes; they are filled in by `_hash_batch`."""
    row = dict.fromkeys(COLUMNS) | _location(shard, record.key)
    row |= {"key": record.key, "offset": record.offset, "size": record.size, "caption": record.caption}
    thumbnail = np.zeros((THUMBNAIL, THUMBNAIL, 3), np.uint8)
    if record.data is None:
        row |= {"status": "missing", "error": record.error}
    else:
        row["sha256"] = hashing.digest(record.data)
        try:
            decoded = images.decode(
                record.data,
                min_side=HASH_SIDE if options.hash_decode == "fast" else None,
                montage=True,
                max_pixels=options.max_pixels,
                max_frames=options.max_frames,
            )
        except images.ImageError as error:
            row |= {"status": error.status, "error": str(error)}
        else:
            row |= {
                "status": "ok",
                "width": decoded.width,
                "height": decoded.height,
                "format": decoded.format,
            }
            thumbnail = images.shrink(decoded.pixels, THUMBNAIL)
            pending.append((row, *_hash_inputs(decoded)))
    thumbnails.append(thumbnail)
    return row


def _hash_inputs(decoded: images.Decoded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    small, wide = hashing.grey_thumbnails(decoded.pixels)
    rows, columns = decoded.pixels.shape[:2]
    montage = rows > decoded.height or columns > decoded.width  # frames stacked: larger than one picture
    height, width = (rows, columns) if montage else (decoded.height, decoded.width)
    return small, wide, hashing.pdq_luma(decoded.pixels, height, width)


def _hash_batch(pending: list[tuple[dict, np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """Fill the hash columns of the pending rows and forget them."""
    if not pending:
        return
    rows, small, wide, luma = zip(*pending, strict=True)
    codes, quality = hashing.pdq(np.stack(luma))
    phashes = hashing.to_hex(hashing.phash(np.stack(small)))
    dhashes = hashing.to_hex(hashing.dhash(np.stack(wide)))
    for number, row in enumerate(rows):
        row |= {"phash": phashes[number], "dhash": dhashes[number], "pdq": codes[number, 0].tobytes().hex()}
        row |= {"pdq_d4": codes[number].tobytes(), "pdq_quality": int(quality[number])}
    pending.clear()
