"""Tables: the rows that are kept, as they are written. Serves tables of paths, metadata files, img2dataset's lists.

CSV, TSV and JSONL are filtered as text, so that a row that stays keeps its bytes; parquet keeps columns, types,
metadata, row groups and compression. New is only what a policy asks for: another value in the caption column, and the
columns `captions` (in CSV and TSV as JSON) and `weight`.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dedup.exports import ExportError, check_free, place, read_changes, write_file
from dedup.sources import Shard, SourceError
from dedup.sources.columns import read_scalar
from dedup.sources.parquet import open_file, read_batches
from dedup.sources.table import MAX_FIELD

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

HELD = 1 << 26  # bytes of kept rows in memory before they are written as a row group
CODECS = {"UNCOMPRESSED": "NONE", "LZ4_RAW": "LZ4"}  # as files name them → as writers do

type Change = Mapping[str, Any] | None
type Choose = Callable[[int, Mapping[str, Any]], Change]  # number and values of a row → what changes; None: it goes


def same(src: Path, shards: Sequence[Shard], rows: pl.DataFrame, dest: Path) -> None:
    """The table SRC itself. The files that it names stay where they are."""
    changes = read_changes(rows)
    caption = shards[0].layout.caption_column
    filter_table(src, place(dest, src.name), lambda number, _: changes[number], rows, wanted=(), caption=caption)


def filter_listed(source: Path, target: Path, changes: Mapping[str, Change], rows: pl.DataFrame) -> None:
    """The parquet file beside a shard of img2dataset, by the keys in it. Another one than img2dataset's is left out."""
    with closing(open_file(source)) as file:
        names = file.schema_arrow.names
    if {"key", "status"} <= set(names):
        caption = "caption" if "caption" in names else None
        filter_table(
            source, target, lambda _, row: changes.get(str(row["key"])), rows, wanted=("key",), caption=caption
        )


def filter_table(
    source: Path, target: Path, choose: Choose, rows: pl.DataFrame, *, wanted: Sequence[str], caption: str | None
) -> None:
    """Write to `target` what `choose` keeps, with the columns that are to be added to `rows` in general.

    wanted: the columns that `choose` sees. Raises SourceError or ExportError.
    """
    suffix = source.suffix.lower()
    if suffix == ".parquet":
        filter_parquet(source, target, choose, rows, wanted=wanted, caption=caption)
        return

    def write(temporary: Path) -> None:
        with (
            source.open(encoding="utf-8", errors="surrogateescape", newline="") as lines,
            temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as out,
        ):
            if suffix == ".jsonl":
                out.writelines(_filter_jsonl(source, lines, choose, rows, caption))
            else:
                out.writelines(_filter_csv(source, lines, choose, rows, caption, "\t" if suffix == ".tsv" else ","))

    write_file(target, write)


def _filter_csv(
    source: Path, lines: Iterable[str], choose: Choose, rows: pl.DataFrame, caption: str | None, delimiter: str
) -> Iterator[str]:
    raw = _read_csv(lines, delimiter)
    names, text = next(raw)
    names = [name.removeprefix("\ufeff") if number == 0 else name for number, name in enumerate(names)]
    added = check_free(source, names, rows)
    ending = text[len(text.rstrip("\r\n")) :] or "\n"

    def join(fields: Iterable[Any]) -> str:
        buffer = io.StringIO()
        csv.writer(buffer, delimiter=delimiter, lineterminator="").writerow(fields)
        return buffer.getvalue()

    yield delimiter.join([text.rstrip("\r\n"), *added]) + ending if added else text
    number = 0
    for fields, text in raw:
        if not fields:  # an empty line
            continue
        change = choose(number, dict(zip(names, fields, strict=False)))
        number += 1
        if change is None:
            continue
        fields += [""] * (len(names) - len(fields))
        if "caption" in change and caption is not None:
            fields[names.index(caption)] = change["caption"]
            text = join(fields) + ending
        if added:
            more = [json.dumps(change[k], ensure_ascii=False) if k == "captions" else change[k] for k in added]
            text = (text if "caption" in change else join(fields)).rstrip("\r\n") + delimiter + join(more) + ending
        yield text


def _read_csv(lines: Iterable[str], delimiter: str) -> Iterator[tuple[list[str], str]]:
    """Fields of each row, and its text. The reader asks for no line before it needs it."""
    csv.field_size_limit(MAX_FIELD)
    held: list[str] = []

    def remember() -> Iterator[str]:
        for line in lines:
            held.append(line)
            yield line

    for fields in csv.reader(remember(), delimiter=delimiter):
        yield fields, "".join(held)
        held.clear()


def _filter_jsonl(
    source: Path, lines: Iterable[str], choose: Choose, rows: pl.DataFrame, caption: str | None
) -> Iterator[str]:
    number = 0
    for line in lines:
        if not line.strip("\ufeff \t\r\n"):
            continue
        row = json.loads(line.removeprefix("\ufeff"))
        change = choose(number, row)
        number += 1
        if change is None:
            continue
        check_free(source, list(row), rows)
        new = {caption if name == "caption" else name: value for name, value in change.items()}
        yield f"{json.dumps({**row, **new})}\n" if change else line


def filter_parquet(
    source: Path,
    target: Path,
    choose: Choose,
    rows: pl.DataFrame,
    *,
    wanted: Sequence[str],
    caption: str | None,
) -> None:
    """As `filter_table`."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetWriter

    def write(temporary: Path) -> None:
        with closing(open_file(source)) as file:
            schema = _extend(file.schema_arrow, check_free(source, file.schema_arrow.names, rows))
            try:
                with ParquetWriter(temporary, schema, **_settings(file.metadata)) as writer:
                    for table in _read_kept(file, choose, schema, wanted, caption):
                        writer.write_table(table, row_group_size=max(1, len(table)))
            except (ArrowException, UnicodeDecodeError) as error:
                raise SourceError(f"{source}: cannot be read ({str(error).partition('\n')[0]})") from error

    write_file(target, write)


def _read_kept(
    file: "pq.ParquetFile",
    choose: Choose,
    schema: "pa.Schema",
    wanted: Sequence[str],
    caption: str | None,
) -> Iterator["pa.Table"]:
    """What stays of each row group, in pieces of at least HELD bytes."""
    import pyarrow as pa

    number = 0
    for group in range(file.metadata.num_row_groups):
        held: list[pa.RecordBatch] = []
        for batch in read_batches(file, group, None):
            cells = [[read_scalar(value) for value in batch.column(name)] for name in wanted]
            values = [dict(zip(wanted, row, strict=True)) for row in zip(*cells, strict=True)] or [{}] * len(batch)
            changes = [choose(number + place, row) for place, row in enumerate(values)]
            number += len(batch)
            held.append(change_rows(batch, changes, schema, caption))
            if sum(part.nbytes for part in held) >= HELD:
                yield pa.Table.from_batches(held)
                held = []
        if any(len(part) for part in held):
            yield pa.Table.from_batches(held)


def change_rows(
    batch: "pa.RecordBatch", changes: Sequence[Change], schema: "pa.Schema", caption: str | None
) -> "pa.RecordBatch":
    """The rows that stay, with the columns of `schema`."""
    import pyarrow as pa

    kept = batch.filter(pa.array([change is not None for change in changes]))
    changed = [change for change in changes if change is not None]
    columns = []
    for field in schema:
        if field.name == caption and any("caption" in change for change in changed):
            columns.append(_say(kept.column(field.name), changed, field))
        elif field.name in batch.schema.names:
            columns.append(kept.column(field.name))
        else:
            columns.append(pa.array([change[field.name] for change in changed], field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _say(cells: "pa.Array", changed: Sequence[Mapping[str, Any]], field: "pa.Field") -> "pa.Array":
    """A column of captions with the new ones in it."""
    import pyarrow as pa
    import pyarrow.types as pat

    listed = pat.is_list(field.type) or pat.is_large_list(field.type)
    new = [change.get("caption") for change in changed]
    said = [[text] if listed and text is not None else text for text in new]
    old = map(read_scalar, cells)
    try:
        return pa.array([b if a is None else a for a, b in zip(said, old, strict=True)], field.type)
    except (pa.ArrowException, TypeError) as error:
        raise ExportError(f"the caption column {field.name!r} holds {field.type}, no text: it cannot change") from error


def _extend(schema: "pa.Schema", added: Sequence[str]) -> "pa.Schema":
    import pyarrow as pa

    kinds = {"captions": pa.list_(pa.string()), "weight": pa.float64()}
    for name in added:
        schema = schema.append(pa.field(name, kinds[name]))
    return schema


def _settings(about: "pq.FileMetaData") -> dict[str, Any]:
    """How the columns of a file are written."""
    if not about.num_row_groups:
        return {}
    chunks = [about.row_group(0).column(number) for number in range(about.num_columns)]
    codecs = {chunk.path_in_schema: CODECS.get(chunk.compression, chunk.compression) for chunk in chunks}
    return {
        "compression": codecs,
        "use_dictionary": [chunk.path_in_schema for chunk in chunks if chunk.has_dictionary_page],
    }
