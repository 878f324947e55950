"""What img2dataset leaves beside its shards: the rows that failed stand only in `00000.parquet`.

In: the parquet file beside `00000.tar` or `00000/`. Out: a record without bytes for every row whose `status` is not
`success`, in the order of the file. A parquet file without the columns key and status is none of img2dataset's.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dedup.sources import Record, SourceError

COLUMNS = ("key", "status", "error_message", "caption")


def read_failed(path: Path, prefix: str = "") -> Iterator[Record]:
    """Records with the keys `prefix` + key. None without the file; one that cannot be read is a record that says so."""
    if not path.is_file():
        return
    try:
        rows = list(_read_rows(path))
    except SourceError as error:
        reason = f"the list of failed downloads cannot be read ({error})"
        yield Record(prefix + path.name, 0, 0, None, None, reason)
        return
    for row in rows:
        if row["status"] != "success":
            caption = row.get("caption")
            why = f"{row['status']}: {row.get('error_message')}"
            yield Record(f"{prefix}{row['key']}", 0, 0, None, None if caption is None else str(caption), why)


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Not by polars, which a damaged file ends together with the process."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, pre_buffer=False) as file:
            names = set(file.schema_arrow.names)
            if not {"key", "status"} <= names:
                return
            for batch in file.iter_batches(columns=[name for name in COLUMNS if name in names], use_threads=False):
                yield from batch.to_pylist()
    except (OSError, ArrowException, ValueError) as error:  # the last: what is no text or no time
        raise SourceError(str(error).partition("\n")[0]) from error
