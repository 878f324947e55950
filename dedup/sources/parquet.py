"""Parquet files that hold the bytes of images: binary columns, or struct {bytes, path} as `datasets` writes them.

SRC is one file or a folder. A shard is a run of whole row groups, because those cannot be entered in the middle; a
damaged one costs its own rows and is said. The key of a row is what `--id-column` or the columns `key` and `__key__`
say, else its number in the file. What img2dataset writes (`--output_format parquet`) is such a file, with rows that
failed to download. In the manifest `shard` is the file, and `offset` the number of the row; a column that convention
would not choose follows the file's name after a `#`.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from dedup.manifest import encode_name
from dedup.sources import (
    Layout,
    Record,
    Shard,
    SourceError,
    columns,
    digest_stamps,
    find_root,
    list_files,
    open_regular,
    stamp_file,
)
from dedup.sources.folder import find_file

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS_PER_SHARD = 1_000
HELD = 1 << 24  # bytes of images in memory at a time, unless a page of the file is larger
ROWS_HELD = 64  # at most: a dictionary makes equal images small in the file only
SUFFIX = ".parquet"


def is_parquet(name: str) -> bool:
    """Of a file, or of a file and a column (`locate`)."""
    return name.endswith(SUFFIX) or f"{SUFFIX}#" in name


def holds_images(path: Path, layout: Layout) -> bool:
    """Whether the images themselves stand in this file, and not their paths."""
    with closing(open_file(path)) as file:
        schema = file.schema_arrow
    if layout.image_column in schema.names:
        return columns.is_images(schema.field(layout.image_column).type)
    return bool(columns.list_image_columns(schema))


def list_shards(src: Path, layout: Layout) -> list[Shard]:
    """Runs of row groups with at least ROWS_PER_SHARD rows. Raises SourceError for a file that is no such table."""
    root = find_root(src)
    if layout.split is not None:
        raise SourceError(f"{src}: --split is of datasets in the format huggingface; these are parquet files")
    names = [name for name in list_files(src) if is_parquet(name)] if src.is_dir() else [src.name]
    allowed = str(Path(layout.root).resolve()) if layout.root else str(root)
    shards = []
    seen: set[str] = set()
    for name in names:
        with closing(open_file(root / name)) as file:
            own = replace(layout, format="parquet", root=allowed)
            chosen = columns.choose(root / name, file.schema_arrow, own, columns.KEYS)
            if layout.id_column:
                start = 0
                for batch in file.iter_batches(columns=[layout.id_column], use_threads=False):
                    values = map(columns.read_scalar, batch.column(layout.id_column))
                    columns.check_ids(root / name, values, start, layout.id_column, seen)
                    start += len(batch)
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        shown = encode_name(os.fsencode(name))
        for part in group_rows(sizes):
            stamps = digest_stamps([name, stamp_file(root / name), part, chosen])
            shards.append(Shard("parquet", str(root), shown, (), (), stamps, (), part, chosen))
    return shards


def open_file(path: Path) -> "pq.ParquetFile":
    """Raises SourceError."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        open_regular(path).close()
        file = ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        columns.check_names(file.schema_arrow)
        return file
    except (OSError, ArrowException, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read as parquet ({str(error).partition('\n')[0]})") from error


def group_rows(sizes: list[int], start: int = 0) -> Iterator[tuple[int, int, int]]:
    """Rows of each group → runs of groups: the first, the one after the last, the number of the first row."""
    first = held = 0
    for number, size in enumerate(sizes):
        held += size
        if held >= ROWS_PER_SHARD or (held and number == len(sizes) - 1):
            yield first, number + 1, start
            first, start, held = number + 1, start + held, 0


def locate(shard: Shard, schema: "pa.Schema") -> str:
    """What the manifest's `shard` says: the file, and the column unless convention chooses it."""
    column = str(shard.layout.image_column)
    return str(shard.name) if column == columns.default_image_column(schema) else f"{shard.name}#{column}"


def read_shard(shard: Shard) -> Iterator[Record]:
    from pyarrow import ArrowException

    path = find_file(Path(shard.root), str(shard.name))
    layout, (first, stop, row) = shard.layout, shard.part
    damage: list[str] = []
    with closing(open_file(path)) as file:
        schema = file.schema_arrow
        more = [name for name in ("status", "error_message") if "key" in schema.names and name in schema.names]
        chosen = (layout.image_column, layout.caption_column, layout.id_column, layout.subject_column)
        wanted = [name for name in (*chosen, *more) if name]
        file_name = locate(shard, schema)
        for group in range(first, stop):
            number = row
            row += file.metadata.row_group(group).num_rows
            try:
                for batch in read_batches(file, group, list(dict.fromkeys(wanted))):
                    for place in range(len(batch)):
                        values = {name: columns.read_scalar(batch.column(name)[place]) for name in batch.schema.names}
                        cell = values[str(layout.image_column)]
                        yield columns.make_record(shard, file_name, number, number, cell, values)
                        number += 1
            except (OSError, ArrowException, UnicodeDecodeError) as error:  # the last: names in its own list
                damage.append(f"rows {number} to {row - 1} ({str(error).partition('\n')[0]})")
    if damage:
        raise SourceError(f"{path}: cannot be read: {', '.join(damage)}")


def read_batches(file: "pq.ParquetFile", group: int, names: list[str] | None) -> Iterator["pa.RecordBatch"]:
    """One row group in pieces of about HELD bytes. names: None = all columns.

    What the file says of a single column is not asked for: where it is damaged, pyarrow ends the process.
    """
    about = file.metadata.row_group(group)
    rows = max(1, min(ROWS_HELD, about.num_rows * HELD // max(1, about.total_byte_size)))
    yield from file.iter_batches(rows, row_groups=[group], columns=names, use_threads=False)


class RowReader:
    """Single rows of one column. Goes on from where it stands; only a row before that starts a row group anew."""

    def __init__(self, path: Path, column: str | None) -> None:
        self.file = open_file(path)
        self.column = str(column or columns.default_image_column(self.file.schema_arrow))
        about = self.file.metadata
        sizes = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
        self.starts = list(accumulate(sizes, initial=0))
        self.group, self.first = -1, 0
        self.held: Sequence[pa.Scalar] = []
        self.batches: Iterator[pa.RecordBatch] = iter(())

    def read(self, row: int) -> bytes:
        if not 0 <= row < self.starts[-1]:
            raise EOFError(f"no row {row}")
        group = bisect_right(self.starts, row) - 1
        if group != self.group or row < self.first:
            self.group, self.first, self.held = group, self.starts[group], []
            self.batches = read_batches(self.file, group, [self.column])
        while row >= self.first + len(self.held):
            self.first += len(self.held)
            self.held = next(self.batches).column(self.column)
        return columns.read_cell(columns.read_scalar(self.held[row - self.first]))[0] or b""


def read_image(root: Path, shard: str, row: int) -> bytes:
    from pyarrow import ArrowException

    name, hashed, column = shard.partition(f"{SUFFIX}#")
    path = find_file(root, name + SUFFIX * bool(hashed))
    try:
        return _open_rows(path, column or None, stamp_file(path), os.getpid()).read(row)
    except (
        ArrowException,
        UnicodeDecodeError,
        KeyError,
        StopIteration,
    ) as error:  # the rows, or the column, of another file
        raise OSError(str(error).partition("\n")[0]) from error


@lru_cache(maxsize=1)
def _open_rows(path: Path, column: str | None, stamp: str, process: int) -> RowReader:
    """Kept open, as a compressed tar is. A forked process must not share the position of its parent's file."""
    return RowReader(path, column)
