"""The first stage: one shard of a source → one signature table.

A pure function of the shard and the decode options, so any worker on any machine may run it, and a finished file is
never made again. In: a `Shard`. Out: `<work>/00000.parquet`, the manifest's columns up to `pdq_quality`. Hashes see
only grey: colours are looked at where hashes agree (`verify.py`). Knows nothing of other shards.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from PIL import Image

from dedup import dicom, hashing, images, sources, subjects
from dedup.manifest import SCHEMA, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

JPEG_SIDE = 128  # JPEGs may be decoded at reduced scale down to this side: PDQ then moves by at most 8 bits of 256
BATCH = 256  # rows hashed together; never crosses a shard, so results do not depend on the number of workers
COLUMNS = [  # and `link`, which only the keeper order needs
    *("source", "shard", "offset", "size", "key", "caption", "subject", "width", "height", "format", "status", "error"),
    *("sha256", "phash", "dhash", "pdq", "pdq_d4", "pdq_quality"),
]
# What the bytes of a readable picture and the decode options decide.
OF_BYTES = ["sha256", "width", "height", "format", "status", "phash", "dhash", "pdq", "pdq_d4", "pdq_quality"]


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """Limits on untrusted images, and what is hashed.

    hash_decode: "fast" shrinks pictures before they are hashed, JPEGs while they are decoded; "exact" hashes all
    pixels, pHash and dHash by imagehash itself. subject_key: a file; None = nobody asks who is shown.
    """

    max_pixels: int = images.MAX_PIXELS
    max_frames: int = images.MAX_FRAMES
    hash_decode: str = "fast"
    subject_key: Path | None = None


def fingerprint_shard(
    shard: sources.Shard, index: int, work: Path, options: DecodeOptions, known: Path | None = None
) -> tuple[int, int]:
    """Write the signatures of one shard; returns (rows, unreadable rows). Done already → only counted.

    known: a file of `write_known`; the bytes of a picture that is in it are read and not decoded.
    """
    path = work / f"{index:05d}.parquet"
    if path.exists():
        status = pl.read_parquet(path, columns=["status"])["status"]
        return len(status), int((status != "ok").sum())
    rows: list[dict] = []
    pending: list[tuple[dict, np.ndarray, np.ndarray, np.ndarray]] = []
    try:
        for record in sources.read_shard(shard):
            rows.append(_fingerprint_record(record, shard, options, known, pending))
            if len(pending) >= BATCH:
                _hash_batch(pending)
    except sources.SourceError as error:  # what was read before the damage stays
        key = shard.name or ""
        row = dict.fromkeys(COLUMNS) | locate(shard, key) | {"key": key, "offset": 0, "size": 0}
        rows.append(row | {"status": "unreadable", "error": str(error), "link": False})
    _hash_batch(pending)
    frame = pl.DataFrame(rows, schema={column: SCHEMA[column] for column in COLUMNS} | {"link": pl.Boolean})
    write_atomic(path, frame.write_parquet)
    return len(frame), int((frame["status"] != "ok").sum())


def write_known(path: Path, signatures: pl.DataFrame) -> None:
    """Signatures of readable pictures, columns OF_BYTES, for `fingerprint_shard`: each once, where it can be found."""
    known = signatures.filter(pl.col("status") == "ok").select(OF_BYTES).unique("sha256").sort("sha256")
    write_atomic(path, lambda temporary: known.write_ipc(temporary, compression="uncompressed"))


def _find_known(path: Path, sha256: str) -> dict[str, Any] | None:
    known = _open_known(path)
    digests = known.column("sha256")
    place = bisect_left(digests, sha256, key=lambda scalar: scalar.as_py())
    if place == len(digests) or digests[place].as_py() != sha256:
        return None
    return {name: known.column(name)[place].as_py() for name in OF_BYTES}


@lru_cache(1)
def _open_known(path: Path) -> "pa.Table":
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()  # all workers share what is read of it


def locate(shard: sources.Shard, key: str) -> dict[str, str | None]:
    """The sub-source is what the shard says, or the top folder of the file or shard; `../x` and `/x` say nothing."""
    top, slash, _ = (shard.name if shard.name and "/" in shard.name else key).partition("/")
    named = slash and top not in ("", ".", "..")
    return {"source": shard.source or (top if named else Path(shard.root).name), "shard": shard.name}


def _fingerprint_record(
    record: sources.Record,
    shard: sources.Shard,
    options: DecodeOptions,
    known: Path | None,
    pending: list[tuple[dict, np.ndarray, np.ndarray, np.ndarray]],
) -> dict:
    """One row without its hashes; they are filled in by `_hash_batch`."""
    row = dict.fromkeys(COLUMNS) | locate(shard, record.key)
    row |= {"key": record.key, "offset": record.offset, "size": record.size, "caption": record.caption}
    row |= {"link": record.link, "shard": record.file or shard.name}
    medical = record.data is not None and dicom.is_dicom(record.data)
    if options.subject_key is not None:
        subject = record.subject or (dicom.read_patient(record.data or b"") if medical else None)
        row["subject"] = subjects.hash_subject(options.subject_key, subject) if subject else None
    row["format"] = images.DICOM if medical else None
    if record.data is None:
        return row | {"status": record.status, "error": record.error}
    row["sha256"] = sha256 = hashing.digest(record.data)
    if known is not None and (signature := _find_known(known, sha256)) is not None:
        return row | signature
    fast = options.hash_decode == "fast"
    try:
        luma = images.decode_luma(
            record.data,
            min_side=JPEG_SIDE if fast else None,
            max_pixels=options.max_pixels,
            max_frames=options.max_frames,
        )
    except images.ImageError as error:
        return row | {"status": error.status, "error": str(error)}
    row |= {"status": "ok", "width": luma.width, "height": luma.height, "format": luma.format}
    if fast:
        grey = hashing.reduce(luma.grey, hashing.PDQ_SOURCE)
        small, wide = hashing.grey_thumbnails(hashing.reduce(grey, hashing.PHASH_SOURCE))
    else:
        grey, picture = luma.grey, Image.fromarray(luma.grey)
        small, wide = hashing.grey_thumbnails(grey)
        import imagehash  # half a second that nobody else needs

        row |= {"phash": str(imagehash.phash(picture)), "dhash": str(imagehash.dhash(picture))}
    # What was shrunk while decoding is smaller than the picture, a montage of frames is larger.
    height, width = max(luma.grey.shape[0], luma.height), max(luma.grey.shape[1], luma.width)
    pending.append((row, small, wide, hashing.pdq_luma(grey, height, width)))
    return row


def _hash_batch(pending: list[tuple[dict, np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """Fill the hash columns of the pending rows and forget them."""
    if not pending:
        return
    rows, small, wide, luma = zip(*pending, strict=True)
    codes, quality = hashing.pdq(np.stack(luma))
    phashes = hashing.to_hex(hashing.phash(np.stack(small)))
    dhashes = hashing.to_hex(hashing.dhash(np.stack(wide)))
    for number, row in enumerate(rows):
        row["phash"] = row["phash"] or phashes[number]  # imagehash may have said already
        row["dhash"] = row["dhash"] or dhashes[number]
        row |= {"pdq": codes[number, 0].tobytes().hex(), "pdq_d4": codes[number].tobytes()}
        row["pdq_quality"] = int(quality[number])
    pending.clear()
