"""What img2dataset leaves beside its shards: the rows that failed stand only in `00000.parquet`.

In: the parquet file beside `00000.tar` or `00000/`. Out: a record without bytes for every row whose `status` is not
`success`, in the order of the file. A parquet file without the columns key and status is none of img2dataset's.
"""

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from dedup.sources import Record

COLUMNS = ("key", "status", "error_message", "caption")


def read_failed(path: Path, prefix: str = "") -> Iterator[Record]:
    """Records with the keys `prefix` + key. None without the file; one that cannot be read is a record that says so."""
    if not path.is_file():
        return
    try:
        names = pl.read_parquet_schema(path)
        if not {"key", "status"} <= names.keys():
            return
        table = pl.read_parquet(path, columns=[name for name in COLUMNS if name in names])
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = str(error).partition("\n")[0]
        yield Record(prefix + path.name, 0, 0, None, None, f"the list of failed downloads cannot be read ({reason})")
        return
    text = table.select(pl.all().cast(pl.String, strict=False))
    for row in text.filter(pl.col("status").ne_missing("success")).iter_rows(named=True):
        why = f"{row['status']}: {row.get('error_message')}"
        yield Record(f"{prefix}{row['key']}", 0, 0, None, row.get("caption"), why)
