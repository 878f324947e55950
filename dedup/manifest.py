"""THE schema of the project: what a row of the manifest is, and how it is read, written and checked.

A manifest is `OUT/manifest/00000.parquet …`: one row per input image, in input order, nothing dropped. Every other
stage of `dedup`, every arm of `defense` and every score of `eval` refers to rows by `id`. Knows nothing of how the
columns are computed.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import polars as pl

SCHEMA_VERSION = 1
ROWS_PER_FILE = 100_000
UNFINISHED = ".unfinished"  # a temporary file

STATUS = ("ok", "unreadable", "too-large", "unsupported", "missing")
REASONS = ("bytes", "pixels", "hash", "copy", "decision", "policy", "external")
CLASSES = ("copy", "same-scene", "look-alike")
# Dihedral group as PDQ lists it: rotation by 90° steps counter-clockwise, `m` = mirrored left-right first.
ORIENTATIONS = ("r0", "r90", "r180", "r270", "m0", "m90", "m180", "m270")

PLACE = pl.when(pl.col("shard").is_null()).then("key").otherwise(pl.concat_str("shard", pl.lit(":"), "key"))

type Schema = dict[str, pl.DataType | type[pl.DataType]]

SCHEMA: Schema = {
    "id": pl.Int64,  # row position, stable
    "source": pl.String,  # sub-source: top-level folder of the key, else the name of SRC
    "shard": pl.String,  # the file with the bytes, relative to SRC's root; null when `key` is its path
    "offset": pl.Int64,  # first byte of the image inside the shard (0 for a file of its own); of parquet: the row
    "size": pl.Int64,  # bytes
    "key": pl.String,  # path relative to SRC, the sample key, or the id or number of the row
    "caption": pl.String,
    "captions": pl.List(pl.String),  # on kept rows: distinct captions of all rows they stand for
    "subject": pl.String,  # the person that is shown, as a keyed hash; null where nobody says
    "width": pl.Int32,
    "height": pl.Int32,
    "effective_pixels": pl.Int64,  # width × height; less on an enlarged copy
    "format": pl.String,
    "status": pl.String,
    "error": pl.String,
    "sha256": pl.String,  # of the bytes, hex
    "pixel_digest": pl.String,  # of the upright pixels; null unless a candidate needed it
    "phash": pl.String,  # 16 hex digits, as imagehash prints them
    "dhash": pl.String,
    "pdq": pl.String,  # 64 hex digits, as ThreatExchange prints them
    "pdq_d4": pl.Binary,  # 8 × 32 bytes: PDQ of all eight orientations, in the order of ORIENTATIONS
    "pdq_quality": pl.Int32,  # 0 … 100
    "cluster_id": pl.Int64,  # id of the keeper of the row's star
    "cluster_size": pl.Int64,
    "component_id": pl.Int64,  # smallest id of the connected component over ALL pairs, rows of one subject joined
    "keep": pl.Boolean,
    "kept_id": pl.Int64,  # for a dropped row: the kept row that it matches directly; null if it is external
    "reason": pl.String,
    "class": pl.String,  # of the strongest pair of the row
    "signal": pl.String,
    "score": pl.Float64,  # higher = more alike, 0 … 1
    "orientation": pl.String,
    "represents": pl.Int64,  # rows that a kept row stands for, itself included; 0 on dropped rows
    "weight": pl.Float64,  # sampling weight
}

# Columns of few distinct values: in memory 4 bytes a row as categories, and 16 or more as text.
FEW = ("source", "shard", "format", "status", "reason", "class", "signal", "orientation")

PAIRS_SCHEMA: Schema = {
    "a": pl.Int64,  # a < b
    "b": pl.Int64,
    "class": pl.String,
    "signal": pl.String,  # bytes, pixels, pdq, copy; decision: a person said so, what was measured stands beside it
    "score": pl.Float64,  # higher = more alike, 0 … 1; null where only a person knows of the pair
    "hamming": pl.Int32,  # PDQ distance at `orientation`; null for bytes and copy
    "residual": pl.Float64,  # RMS colour difference of the aligned thumbnails, 0 … 1
    "worst_tile": pl.Float64,  # largest RMS over the tiles of the thumbnail, 0 … 1
    "orientation": pl.String,  # what turns a into b; of signal copy: the nearest quarter, r0 to 30°
    "cosine": pl.Float64,  # of the embeddings; null unless they found the pair
    "inliers": pl.Int32,  # of signal copy: distinct local features that the transform carries onto each other
    "overlap": pl.Float64,  # share of the picture that lies more in the other one, 0 … 1
    "transform": pl.List(pl.Float64),  # 3 × 3 by rows: positions of a (mirrored if `m…`) → b, in their longer sides
}


class ManifestError(ValueError):
    """A table that breaks the contract, or a folder that holds none."""


def encode_name(name: bytes) -> str:
    """File or member name → text. Bytes that are not UTF-8, and control characters, become %XX; reversible.

    A literal `%` is escaped only where it would read as such an escape, so ordinary names stay as they are.
    """
    text = name.decode("utf-8", "surrogateescape")
    text = re.sub(r"%(?=[0-9A-Fa-f]{2})", "%25", text)
    return re.sub(r"[\x00-\x1f\x7f\udc80-\udcff]", lambda m: f"%{ord(m[0]) & 0xFF:02X}", text)


def decode_name(text: str) -> bytes:
    """Inverse of `encode_name`."""
    return unquote_to_bytes(text)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
    os.close(handle)
    try:
        write(Path(temporary))
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except (OSError, pl.exceptions.ComputeError) as error:  # polars wraps some of the former in the latter
        Path(temporary).unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error}): is the disk full?") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Remove what `write_atomic` was at in `folder` and below when its process was killed."""
    for path in folder.rglob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Atomic text file, UTF-8."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Atomic JSON file; key order is the caller's, so equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_parquet(path: Path, parts: pl.DataFrame | Iterable[pl.DataFrame]) -> None:
    """Atomic parquet file that carries the schema version; parts are made as they are written.

    A row group a part, of at most ROWS_PER_FILE rows. Not by polars: how it cuts pages depends on the number of
    processors, and equal tables are to be equal bytes everywhere.
    """
    from pyarrow import parquet  # takes a third of a second

    if isinstance(parts, pl.DataFrame):
        parts = parts.iter_slices(ROWS_PER_FILE) if len(parts) else [parts]

    def save(temporary: Path) -> None:
        tables = (part.to_arrow(compat_level=pl.CompatLevel.oldest()) for part in parts)
        first = next(tables)
        schema = first.schema.with_metadata({"schema_version": str(SCHEMA_VERSION)})
        with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for table in chain([first], tables):
                writer.write_table(table.cast(schema))

    write_atomic(path, save)


def conform(frame: pl.DataFrame, schema: Schema = SCHEMA) -> pl.DataFrame:
    """Add missing columns as nulls and put all of them in the order and dtypes of the schema."""
    missing = [pl.lit(None, dtype=t).alias(c) for c, t in schema.items() if c not in frame.columns]
    return frame.with_columns(missing).select(pl.col(c).cast(t) for c, t in schema.items())


def compact(frame: pl.DataFrame) -> pl.DataFrame:
    """Columns FEW as categories; `conform` makes text of them again."""
    return frame.with_columns(pl.col(name).cast(pl.Categorical) for name in FEW if name in frame.columns)


def validate(frame: pl.DataFrame) -> None:
    """Raise ManifestError unless the rules of the data model hold (docs/architecture.md, rules 1 and 2)."""
    if not (frame["id"] == pl.int_range(len(frame), eager=True)).all():
        raise ManifestError("ids are not 0 … n-1 in order")
    for column, vocabulary in (("status", STATUS), ("reason", REASONS), ("class", CLASSES)):
        unknown = set(frame[column].drop_nulls().unique()) - set(vocabulary)
        if unknown:
            raise ManifestError(f"unknown {column}: {sorted(unknown)}")
    # a filter copies, so of these columns alone
    frame = frame.select("status", "reason", "keep", "kept_id", "represents")
    readable = frame.filter(pl.col("status") == "ok")
    external = readable.filter(pl.col("reason").eq_missing("external"))
    if external["keep"].any() or external["kept_id"].count() or external["represents"].sum():
        raise ManifestError("a row that was dropped for a picture outside of the dataset is kept, or names a kept row")
    stays = readable.filter(pl.col("reason").ne_missing("external"))
    dropped = stays.filter(~pl.col("keep"))
    there = dropped["kept_id"].is_between(0, len(frame) - 1).fill_null(False)
    if not there.all() or not frame["keep"].gather(dropped["kept_id"]).all():
        raise ManifestError("a dropped row names no kept row")
    if frame["represents"].sum() != len(stays):
        raise ManifestError(
            "the rows that kept rows represent do not add up to the readable rows without external ones"
        )


def write(out: Path, frame: pl.DataFrame, complete: Callable[[pl.DataFrame], pl.DataFrame] | None = None) -> None:
    """Validate and write `OUT/manifest/`; files of an earlier, longer manifest are removed.

    complete: rows of the frame → the same with all columns: no more than one file of these is in memory.
    """
    validate(frame)
    folder = out / "manifest"
    parts = max(1, -(-len(frame) // ROWS_PER_FILE))
    for part in range(parts):
        rows = frame.slice(part * ROWS_PER_FILE, ROWS_PER_FILE)
        rows = rows if complete is None else complete(rows)
        if dict(rows.schema) != SCHEMA:
            raise ManifestError(f"manifest columns differ from the schema: {sorted(set(rows.columns) ^ set(SCHEMA))}")
        write_parquet(folder / f"{part:05d}.parquet", rows)
    for path in folder.glob("*.parquet"):
        if int(path.stem) >= parts:
            path.unlink()


def read(out: Path, columns: Iterable[str] | None = None) -> pl.DataFrame:
    """The manifest of a dedup run, all rows in input order."""
    paths = sorted((out / "manifest").glob("*.parquet"))
    if not paths:
        raise ManifestError(f"{out} holds no manifest: run `unmemorize dedup SRC -o {out}` first")
    return pl.read_parquet(paths, columns=list(columns) if columns is not None else None)


def read_parts(out: Path, columns: list[str]) -> Iterator[pl.DataFrame]:
    """These columns of a manifest, file by file."""
    return (pl.read_parquet(path, columns=columns) for path in sorted((out / "manifest").glob("*.parquet")))


def read_run(out: Path) -> dict[str, Any]:
    """`OUT/run.json`: resolved options, versions, counts, the absolute path of SRC."""
    path = out / "run.json"
    if not path.exists():
        raise ManifestError(f"{out} holds no finished dedup run (no run.json)")
    return read_json(path)
