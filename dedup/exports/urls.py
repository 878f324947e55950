"""The addresses of the kept rows, as input of img2dataset: `urls.parquet` with url, caption, and key of each.

They stand in the column `url` of a table, of parquet or of a dataset, or under `url` in the JSON of a sample or beside
an image. A row without one is left out, and counted.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any

import polars as pl

from dedup.exports import ExportError
from dedup.manifest import write_parquet
from dedup.sources import Shard, SourceError, columns
from dedup.sources.folder import find_file, read_file
from dedup.sources.huggingface import open_stream
from dedup.sources.parquet import open_file
from dedup.sources.table import READERS
from dedup.sources.webdataset import read_members, split_key

LOOKED_FOR = ", ".join(columns.URLS)


def write_urls(src: Path, shards: Sequence[Shard], parts: Sequence[pl.DataFrame], dest: Path) -> dict[str, int]:
    """How many addresses were written, and how many rows have none. Raises ExportError when no row has one."""
    if shards[0].kind == "table":
        found = list(_read_table(src))
    else:
        found = list(chain.from_iterable(READ[s.kind](s, rows) for s, rows in zip(shards, parts, strict=True)))
    rows = pl.concat(parts)
    if len(found) != len(rows):
        raise SourceError(f"{src}: has {len(found)} rows, not {len(rows)}: run `unmemorize dedup` again")
    taken = rows.with_columns(url=pl.Series(found, dtype=pl.String)).filter("take")
    listed = taken.filter(pl.col("url").is_not_null())
    if listed.is_empty():
        raise ExportError(f"{src}: no row has an address (looked for {LOOKED_FOR}): choose another --format")
    more = [name for name in ("captions", "weight") if name in rows.columns]
    write_parquet(dest / "urls.parquet", listed.select("url", "key", *more, caption="text"))
    return {"urls": len(listed), "without_url": len(taken) - len(listed)}


def _read_table(src: Path) -> Iterator[str | None]:
    names, read = READERS[src.suffix.lower()](src)
    column = columns.find(names, columns.URLS)
    if column is None:
        raise ExportError(f"{src}: has no column of addresses ({LOOKED_FOR}); it has {columns.tell(names)}")
    return (columns.read_text(value) for (value,) in read([column]))


def _read_parquet(shard: Shard, rows: pl.DataFrame) -> Iterator[str | None]:
    path = find_file(Path(shard.root), str(shard.name))
    with closing(open_file(path)) as file:
        column = columns.find(file.schema_arrow.names, columns.URLS)
        if column is None:
            yield from [None] * len(rows)
            return
        groups = list(range(*shard.part[:2]))
        for batch in file.iter_batches(row_groups=groups, columns=[column], use_threads=False):
            yield from (columns.read_text(columns.read_scalar(value)) for value in batch.column(column))


def _read_saved(shard: Shard, rows: pl.DataFrame) -> Iterator[str | None]:
    _, stream = open_stream(find_file(Path(shard.root), str(shard.name)))
    column = columns.find(stream.schema.names, columns.URLS)
    if column is None:
        yield from [None] * len(rows)
        return
    for batch in islice(stream, *shard.part[:2]):
        yield from (columns.read_text(columns.read_scalar(value)) for value in batch.column(column))


def _read_tar(shard: Shard, rows: pl.DataFrame) -> Iterator[str | None]:
    """By the place of the images, because a sample may hold several and a damaged archive ends early."""
    urls: dict[int, str | None] = {}
    current, offsets, url = b"", list[int](), None
    try:
        for member in read_members(Path(shard.root) / str(shard.name)):
            key, extension = split_key(member.name)
            if key != current:
                urls |= dict.fromkeys(offsets, url)
                current, offsets, url = key, [], None
            offsets.append(member.offset)
            url = _find_url(member.data or b"") if extension.lower() == b".json" else url
    except SourceError:
        if rows["status"][-1] == "ok":
            raise
    urls |= dict.fromkeys(offsets, url)
    return map(urls.get, rows["offset"])


def _read_folder(shard: Shard, rows: pl.DataFrame) -> Iterator[str | None]:
    for key in rows["key"]:
        try:
            yield _find_url(read_file(find_file(Path(shard.root), key).with_suffix(".json")))
        except (OSError, ValueError):
            yield None


def _find_url(data: bytes) -> str | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    name = columns.find(list(value), columns.URLS) if isinstance(value, dict) else None
    return columns.read_text(value[name]) if name else None


READ: dict[str, Callable[[Shard, pl.DataFrame], Iterator[Any]]] = {
    "folder": _read_folder,
    "webdataset": _read_tar,
    "parquet": _read_parquet,
    "huggingface": _read_saved,
}
