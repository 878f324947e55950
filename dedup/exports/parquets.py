"""Parquet with the bytes of images: the same files and columns, minus rows. `tables` does the rest."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dedup.exports import check_bytes, place, read_changes
from dedup.exports.tables import Change, filter_parquet
from dedup.manifest import decode_name
from dedup.sources import Shard, SourceError
from dedup.sources.columns import read_cell


def same(src: Path, shards: Sequence[Shard], rows: pl.DataFrame, dest: Path) -> None:
    """One file. shards: all of it, in order."""
    name = os.fsdecode(decode_name(str(shards[0].name)))
    source = Path(shards[0].root) / name
    layout = shards[0].layout
    image = str(layout.image_column)
    changes, digests = read_changes(rows), rows["sha256"]
    if not rows.filter(pl.col("error").str.contains("cannot be read: rows ", literal=True)).is_empty():
        raise SourceError(f"{source}: is damaged, so it cannot be copied: export to another format, such as webdataset")

    def choose(number: int, row: Mapping[str, Any]) -> Change:
        if number >= len(changes):
            raise SourceError(f"{source}: has more rows than when it was deduplicated: run `unmemorize dedup` again")
        data, _ = read_cell(row[image])
        if changes[number] is not None and data is not None:
            check_bytes(data, digests[number], f"{source}: row {number}")
        return changes[number]

    filter_parquet(source, place(dest, name), choose, rows, wanted=(image,), caption=layout.caption_column)
