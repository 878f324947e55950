"""A dataset in the format it came in, or in another one, minus what the manifest drops. One file a format.

`dedup.export` decides the rows: a frame with the manifest's location of each row, `take` (whether it is exported),
`text` (the caption that conversions write), and what is to be changed in the rows that are taken, where that is to be
changed at all: `caption` (null: stays as it is), `captions`, `weight`. The modules here write: `same(src, shards,
rows, dest)` what one file, or one folder, of the source becomes. They know nothing of why a row is taken. Bytes of
images pass untouched, and their digest is compared with the manifest's on the way.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from dedup import sources
from dedup.hashing import digest
from dedup.manifest import write_atomic
from dedup.sources import Record, Shard, SourceError

CHANGES = ("caption", "captions", "weight")


class ExportError(ValueError):
    """What was asked for cannot be exported: what, and how to mend it, in one line."""


class _Stop(Exception):
    """Carries a SourceError through `write_atomic`, which takes an OSError for a full disk."""


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """As `write_atomic`, for a `write` that reads the source as well. A file that is there was completed before."""

    def guarded(temporary: Path) -> None:
        try:
            write(temporary)
        except SourceError as error:
            raise _Stop(error) from error

    if path.exists():
        return
    try:
        write_atomic(path, guarded)
    except _Stop as stop:
        raise stop.args[0] from None


def place(dest: Path, name: str) -> Path:
    """Where a file with the name that it has in the source belongs. Raises ExportError outside of DEST."""
    if name.startswith("/") or ".." in name.split("/"):
        raise ExportError(f"{name}: would be written outside of {dest}: name the source by one folder")
    return dest / name


def check_bytes(data: bytes, sha256: str, where: str) -> None:
    """Raise SourceError unless the bytes are those that the manifest speaks of."""
    if digest(data) != sha256:
        raise SourceError(f"{where}: holds other bytes than when it was deduplicated: run `unmemorize dedup` again")


def read_changes(rows: pl.DataFrame) -> list[dict[str, Any] | None]:
    """For each row what changes in it; None for a row that is not exported."""
    names = [name for name in CHANGES if name in rows.columns]
    values = zip(rows["take"], rows.select(names).iter_rows(named=True), strict=True) if names else ()
    if not names:
        return [{} if take else None for take in rows["take"]]
    return [{k: v for k, v in changed.items() if v is not None} if take else None for take, changed in values]


def check_free(where: object, names: list[str], rows: pl.DataFrame) -> list[str]:
    """The columns that are added. Raises ExportError when one of them is there already."""
    added: list[str] = [name for name in ("captions", "weight") if name in rows.columns]
    if taken := [name for name in added if name in names]:
        raise ExportError(f"{where}: has a column {taken[0]!r} already, which would be lost: rename it first")
    return added


def read_taken(shard: Shard, rows: pl.DataFrame) -> Iterator[tuple[dict[str, Any], Record]]:
    """Row and record of all that is exported of a shard. rows: all of it, in order. Raises SourceError."""
    expected = rows.iter_rows(named=True)
    where = Path(shard.root) / (shard.name or "")
    try:
        for record in sources.read_shard(shard):
            row = next(expected, dict[str, Any](key=None))
            if row["key"] != record.key:
                raise SourceError(f"{where}: has changed since it was deduplicated: run `unmemorize dedup` again")
            if row["take"]:
                check_bytes(record.data or b"", row["sha256"], f"{where}: {record.key}")
                yield row, record
    except SourceError:
        rest = list(expected)
        if len(rest) != 1 or rest[0]["status"] == "ok":  # damage that the manifest knows is its last row
            raise
    if any(row["take"] for row in expected):
        raise SourceError(f"{where}: has fewer rows than when it was deduplicated: run `unmemorize dedup` again")
