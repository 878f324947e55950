"""What else a source says of its rows: conversions take these columns along.

Columns of tables, parquet, datasets and metadata files go by their names and types; the JSON of a sample, or beside
an image, is one column `json`, as text. A name that an export uses itself becomes `listed_NAME`. Where files disagree
about the type of a column, and in a table without types, it is text: what is no text stands as JSON.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dedup.manifest import decode_name
from dedup.sources import Shard, SourceError, columns, folder, list_files, stamp_file
from dedup.sources.huggingface import open_stream
from dedup.sources.parquet import is_parquet, open_file
from dedup.sources.table import READERS

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

JSON = "json"
# What exports call their own columns, or files.
RESERVED = frozenset(
    ["image", "text", "file_name", "key", "caption", "source", "width", "height", "sha256", "captions", "weight"]
)
ROWS_HELD = 1_000  # of columns without images


@dataclass(frozen=True, slots=True)
class Column:
    name: str  # in the export
    source: str  # in the source
    feature: Any = None  # the type, as `datasets` has it; None: text


def find(src: Path, shards: Sequence[Shard], *, plain: bool) -> tuple[list[Column], list[str]]:
    """The columns that go along, as they are met, and names of those that do not. plain: only what JSON holds."""
    features: dict[str, Any] = {}
    for kind, name in dict.fromkeys((shard.kind, shard.name) for shard in shards):
        shard = next(one for one in shards if (one.kind, one.name) == (kind, name))
        for source, feature in _list_features(src, shard).items():
            features[source] = feature if features.get(source, feature) == feature else None
    found: list[Column] = []
    left: list[str] = []
    for source, feature in features.items():
        if plain and feature is not None and not _is_plain(feature):
            left.append(source)
            continue
        name = source
        while name.lower() in RESERVED or name in [column.name for column in found]:
            name = f"listed_{name}"
        found.append(Column(name, source, feature))
    return found, left


def _is_plain(feature: Any) -> bool:
    """No bytes, at any depth."""
    import pyarrow.types as pat
    from datasets import Features

    def look(kind: "pa.DataType") -> bool:
        inside = (kind.field(number).type for number in range(kind.num_fields))
        return not (columns.is_images(kind) or pat.is_fixed_size_binary(kind)) and all(map(look, inside))

    return look(Features({"x": feature}).arrow_schema.field("x").type)


def _list_features(src: Path, shard: Shard) -> dict[str, Any]:
    if shard.kind == "webdataset":
        return {JSON: None}
    if shard.kind == "folder":
        return _list_folder(src)
    layout = shard.layout
    said = {layout.caption_column, layout.id_column, layout.subject_column}  # persons stay behind
    said |= set() if shard.kind == "table" else {layout.image_column}  # of a table, it says where the image was
    if shard.kind == "table" and not is_parquet(src.name):
        return {name: None for name in READERS[src.suffix.lower()](src)[0] if name not in said}
    schema = _read_schema(src, shard)
    return {name: feature for name, feature in _read_types(schema).items() if name not in said}


def _read_types(schema: "pa.Schema") -> dict[str, Any]:
    """As `datasets` reads them, its note of them included. What it does not know is text."""
    import pyarrow as pa
    from datasets import Features

    try:
        return dict(Features.from_arrow_schema(schema))
    except Exception:  # it has no word for some type
        pass
    types: dict[str, Any] = {}
    for field in schema:
        try:
            types |= Features.from_arrow_schema(pa.schema([field]))
        except Exception:
            types[field.name] = None
    return types


def _read_schema(src: Path, shard: Shard) -> "pa.Schema":
    if shard.kind == "huggingface":
        return open_stream(_find(shard))[1].schema
    with closing(open_file(src if shard.kind == "table" else _find(shard))) as file:
        return file.schema_arrow


def _find(shard: Shard) -> Path:
    return folder.find_file(Path(shard.root), str(shard.name))


def _list_folder(src: Path) -> dict[str, Any]:
    files = list_files(src)
    images = {name.rpartition(".")[0] for name in files if not name.endswith((".json", ".txt"))}
    names = [JSON] if any(name[:-5] in images for name in files if name.endswith(".json")) else []
    for path in _list_metadata(files):
        names += folder.READERS[path.name](src / path).columns
    return {name: None for name in names if name not in ("file_name", *folder.CAPTION_COLUMNS)}


def _list_metadata(files: Sequence[str]) -> list[Path]:
    """The nearest one to an image comes first, as for captions."""
    paths = [Path(name) for name in files if name.rpartition("/")[2] in folder.READERS]
    return sorted(paths, key=lambda path: -len(path.parts))


def read(src: Path, shard: Shard, rows: pl.DataFrame, chosen: Sequence[Column]) -> Iterator[dict[str, Any]]:
    """The values of each row that is taken, in order. rows: all of the shard. Not of a tar (`Record.json`)."""
    names = [column.source for column in chosen]
    for take, values in zip(rows["take"], READ[shard.kind](src, shard, rows, names), strict=False):
        if take:
            yield {c.name: values.get(c.source) if c.feature else as_text(values.get(c.source)) for c in chosen}


def as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _read_table(src: Path, shard: Shard, rows: pl.DataFrame, names: list[str]) -> Iterator[Mapping[str, Any]]:
    return _open_table(src, tuple(names), stamp_file(src), os.getpid()).read(shard.part[2], len(shard.members))


class Table:
    """Rows of a table, some at a time. Goes on from where it stands: shards come in order."""

    def __init__(self, src: Path, names: list[str]) -> None:
        self.src, self.names = src, names
        self.row, self.rows = 0, self._begin()

    def _begin(self) -> Iterator[dict[str, Any]]:
        _, rows = READERS[self.src.suffix.lower()](self.src)
        return (dict(zip(self.names, row, strict=True)) for row in rows(self.names))

    def read(self, start: int, count: int) -> Iterator[dict[str, Any]]:
        if start < self.row:
            self.row, self.rows = 0, self._begin()
        found = list(islice(self.rows, start - self.row, start - self.row + count))
        self.row = start + count
        return iter(found)


@lru_cache(maxsize=1)
def _open_table(src: Path, names: tuple[str, ...], stamp: str, process: int) -> Table:
    return Table(src, list(names))


def _read_parquet(src: Path, shard: Shard, rows: pl.DataFrame, names: list[str]) -> Iterator[Mapping[str, Any]]:
    """By the number of the row: of a damaged row group the manifest may have none. Raises SourceError."""
    path = _find(shard)
    with closing(open_file(path)) as file:
        numbered = _number_rows(file, names, *shard.part)
        number, values = -1, dict[str, Any]()
        for row, take in zip(rows["offset"], rows["take"], strict=True):
            while number < row:
                number, values = next(numbered, (sys.maxsize, {}))
            if take and number != row:
                raise SourceError(f"{path}: row {row}: cannot be read but for its image")
            yield values


def _number_rows(
    file: "pq.ParquetFile", names: list[str], first: int, stop: int, row: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import ArrowException

    there = [name for name in names if name in file.schema_arrow.names]
    for group in range(first, stop):
        number = row
        row += file.metadata.row_group(group).num_rows
        with suppress(ArrowException):
            for batch in file.iter_batches(ROWS_HELD, row_groups=[group], columns=there, use_threads=False):
                for values in _read_rows(batch, there):
                    yield number, values
                    number += 1


def _read_saved(src: Path, shard: Shard, rows: pl.DataFrame, names: list[str]) -> Iterator[Mapping[str, Any]]:
    _, stream = open_stream(_find(shard))
    there = [name for name in names if name in stream.schema.names]
    for batch in islice(stream, *shard.part[:2]):
        yield from _read_rows(batch, there)


def _read_rows(batch: "pa.RecordBatch", names: list[str]) -> Iterator[dict[str, Any]]:
    for place in range(len(batch)):
        yield {name: columns.read_scalar(batch.column(name)[place]) for name in names}


def _read_folder(src: Path, shard: Shard, rows: pl.DataFrame, names: list[str]) -> Iterator[Mapping[str, Any]]:
    told = _read_metadata(src, stamp_file(src), os.getpid())
    for key in rows["key"]:
        name = os.fsdecode(decode_name(key))
        beside = None
        if JSON in names:
            with suppress(OSError):
                beside = folder.read_file((src / name).with_suffix(".json")).decode("utf-8", "replace")
        yield {JSON: beside, **told.get(name, {})}


@lru_cache(maxsize=1)
def _read_metadata(src: Path, stamp: str, process: int) -> dict[str, dict[str, Any]]:
    told: dict[str, dict[str, Any]] = {}
    for path in _list_metadata(list_files(src)):
        for row in folder.READERS[path.name](src / path).iter_rows(named=True):
            if row["file_name"] is not None:
                told.setdefault((path.parent / row["file_name"]).as_posix(), row)
    return told


READ = {"table": _read_table, "parquet": _read_parquet, "huggingface": _read_saved, "folder": _read_folder}
