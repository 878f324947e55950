"""A table whose rows name image files: CSV, TSV, JSONL or parquet, by extension. Every row is a record.

Paths are relative to `--root`, by default the folder of the table; what leads out of it is refused. The key of a row is
what `--id-column` says, else its path relative to the root. The table is read row by row, once; of each row the path,
caption and key are kept, and no other column: the table itself remains their place (row n of the table is row n of the
manifest). A line that breaks the format is an error before anything starts, because nobody knows what it hides.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Any

from dedup.manifest import encode_name
from dedup.sources import (
    Layout,
    Record,
    Shard,
    SourceError,
    columns,
    digest_stamps,
    find_root,
    open_regular,
    stamp_file,
)

ROWS_PER_SHARD = 1_000
MAX_FIELD = 1 << 24  # characters; an unclosed quotation mark would swallow the rest of the table

type Rows = Iterator[Sequence[Any]]
type Reader = Callable[[Path], tuple[list[str], Callable[[list[str]], Rows]]]  # names; chosen columns → values


def list_shards(src: Path, layout: Layout) -> list[Shard]:
    """Runs of rows. Raises SourceError: a missing column, a damaged line, an id that is missing or stands twice."""
    if src.suffix.lower() not in READERS:
        raise SourceError(f"{src}: a table is one file that ends in {', '.join(READERS)}")
    root = str(Path(layout.root).resolve()) if layout.root else str(src.parent)
    if not Path(root).is_dir():
        raise SourceError(f"--root {root}: no such folder")
    if not src.exists():
        raise SourceError(f"{src}: no such file")
    with explained(src):
        open_regular(src).close()
        names, read = READERS[src.suffix.lower()](src)
        chosen = _choose(src, names, replace(layout, format="table", root=root))
        return list(_make_shards(src, chosen, read))


@contextmanager
def explained(src: Path) -> Iterator[None]:
    """Whatever a READER raises in this block, as one line about SRC: SourceError."""
    from pyarrow import ArrowException

    try:
        yield
    except SourceError:
        raise
    except (OSError, ArrowException, UnicodeDecodeError) as error:
        raise SourceError(f"{src}: cannot be read ({str(error).partition('\n')[0]})") from error


def _columns(layout: Layout) -> list[str]:
    names = (layout.image_column, layout.caption_column, layout.id_column, layout.subject_column)
    return [name for name in names if name is not None]


def _choose(src: Path, names: list[str], layout: Layout) -> Layout:
    if layout.split is not None:
        raise SourceError(f"{src}: --split is of Hugging Face datasets; this is a table")
    columns.require(src, names, layout)
    image = layout.image_column or columns.find(names, columns.PATHS)
    if image is None:
        what = f"no column of paths (such as {', '.join(columns.PATHS[:4])})"
        raise SourceError(f"{src}: {what}: name it by --image-column; it has {columns.tell(names)}")
    caption = layout.caption_column or columns.find([name for name in names if name != image], columns.CAPTIONS)
    chosen = replace(layout, image_column=image, caption_column=caption)
    columns.require(src, names, chosen)
    return chosen


def _make_shards(src: Path, layout: Layout, read: Callable[[list[str]], Rows]) -> Iterator[Shard]:
    wanted = _columns(layout)
    table = stamp_file(src) if layout.subject_column else None  # in the place of subjects, which no file may hold
    seen: set[str] = set()
    numbered = enumerate(read(wanted))
    for part in batched(numbered, ROWS_PER_SHARD):
        rows = [_read_row(src, number, dict(zip(wanted, values, strict=True)), layout, seen) for number, values in part]
        paths, captions, keys, subjects = zip(*rows, strict=True)
        stamp = [stamp_file(os.path.join(str(layout.root), path)) for path in paths]  # noqa: PTH118
        stamps = digest_stamps([layout, [row[:3] for row in rows], stamp, table])
        source = src.stem if layout.id_column else None
        yield Shard(
            "table",
            str(find_root(src)),
            None,
            paths,
            captions,
            stamps,
            keys,
            (0, 0, part[0][0]),
            layout,
            source,
            subjects,
        )


def _read_row(
    src: Path, number: int, values: dict[str, Any], layout: Layout, seen: set[str]
) -> tuple[str, str | None, str, str | None]:
    """Path as written, caption, key and subject of a row; `seen`: the ids so far."""
    path = values[str(layout.image_column)]
    path = path.encode("utf-8", "replace").decode() if isinstance(path, str) else columns.read_text(path) or ""
    caption = columns.read_text(values.get(str(layout.caption_column)))
    if layout.id_column is None:
        try:
            key = columns.find_inside(str(layout.root), path) if path else f"row {number}"
        except ValueError:
            key = path
    else:
        columns.check_ids(src, [values[layout.id_column]], number, layout.id_column, seen)
        key = str(columns.read_text(values[layout.id_column]))
    return path, caption, encode_name(key.encode()), columns.read_text(values.get(str(layout.subject_column)))


def read_shard(shard: Shard) -> Iterator[Record]:
    for path, caption, key, subject in zip(shard.members, shard.captions, shard.keys, shard.subjects, strict=True):
        if path:
            found = columns.read_beside(str(shard.layout.root), shard.root, path, key, caption)
        else:
            found = Record(key, 0, 0, None, caption, f"no path in the column {shard.layout.image_column!r}")
        yield replace(found, subject=subject)


def _read_csv(path: Path, delimiter: str) -> tuple[list[str], Callable[[list[str]], Rows]]:
    """RFC 4180, by the standard library: faster readers fail at a quotation mark inside a field, as in 5" disk."""
    names = next(_parse_csv(path, delimiter), [])

    def read(wanted: list[str]) -> Rows:
        places = [names.index(name) for name in wanted]
        rows = _parse_csv(path, delimiter)
        next(rows)
        for row in rows:
            yield [row[place] if place < len(row) else None for place in places]

    return names, read


def _parse_csv(path: Path, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_FIELD)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as handle:
        reader = csv.reader(_check_text(path, handle), delimiter=delimiter, strict=True)
        width = 0
        try:
            for row in reader:
                if not row:  # an empty line
                    continue
                width = width or len(row)
                if len(row) > width:
                    raise csv.Error(f"{len(row)} fields, but {width} columns")
                yield row
        except csv.Error as error:
            hint = "a field with quotation marks must stand in such marks, each doubled"
            raise SourceError(f"{path}: line {reader.line_num}: {error} ({hint})") from error


def _check_text(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if "\0" in line:
            raise SourceError(f"{path}: no text in UTF-8 (it holds zero bytes): save it as such, or mend its extension")
        yield line


def _read_jsonl(path: Path) -> tuple[list[str], Callable[[list[str]], Rows]]:
    names = dict.fromkeys(name for row in _parse_jsonl(path) for name in row)

    def read(wanted: list[str]) -> Rows:
        for row in _parse_jsonl(path):
            yield [row.get(name) for name in wanted]

    return list(names), read


def _parse_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", errors="replace") as handle:
        for number, line in enumerate(_check_text(path, handle), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{path}: line {number} is no JSON ({error})") from error
            if not isinstance(row, dict):
                raise SourceError(f"{path}: line {number} is no JSON object")
            yield row


def _read_parquet(path: Path) -> tuple[list[str], Callable[[list[str]], Rows]]:
    from pyarrow.parquet import ParquetFile

    def read(wanted: list[str]) -> Rows:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(columns=list(dict.fromkeys(wanted)), use_threads=False):
                values = [map(columns.read_scalar, batch.column(name)) for name in wanted]
                yield from zip(*values, strict=True)

    with ParquetFile(path) as file:
        return file.schema_arrow.names, read


READERS: dict[str, Reader] = {
    ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
