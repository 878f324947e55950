"""Any source → webdataset, parquet, Hugging Face or imagefolder. The bytes of images pass untouched.

One file of output for each shard of the source that has rows to give, in order; an `imagefolder` has one file an image
and one `metadata.jsonl`. Of each row go along: key, caption, source, width, height, sha256, and `captions` and
`weight` where they are asked for. Other columns of the source stay behind. Names of samples are their keys without the
suffix of the image; where these would not be different or safe names, all samples are named by the number of their
row.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dedup.exports import place, read_taken, write_file
from dedup.exports.folders import is_image, link_file
from dedup.exports.tars import make_member, write_archive
from dedup.manifest import decode_name, write_atomic, write_json
from dedup.sources import Shard, find_root
from dedup.sources.webdataset import BUFFER

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

HELD = 1 << 26  # bytes of images in memory before they are written
NAME = 200  # bytes of a part of a name, at most: file systems take 255 bytes
SUFFIXES = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "JPEG2000": "jp2",
    "TIFF": "tif",
    "DICOM": "dcm",
}  # other formats are named as they are
META = ["key", "caption", "source", "width", "height", "sha256", "captions", "weight"]

type Taken = Iterable[tuple[Mapping[str, Any], bytes]]


def name_samples(rows: pl.DataFrame) -> pl.DataFrame:
    """Add `name` and `suffix` to the rows that are taken, null on the others: different, and safe as names of files."""
    chosen = rows.filter("take")
    names = [_strip(key) for key in chosen["key"]]
    parts = [part for key in chosen["key"] for part in key.split("/")]
    folders = {name.rpartition("/")[0] for name in names}
    sound = all(part.strip(" .") and len(part.encode()) <= NAME for part in parts)
    if len({name.lower() for name in names}) < len(names) or not sound or folders & set(names):
        names = [f"{number:09d}" for number in chosen["id"]]
    suffixes = chosen["format"].replace_strict(SUFFIXES, default=chosen["format"].str.to_lowercase())
    named = chosen.select("id", name=pl.Series(names, dtype=pl.String), suffix=suffixes)
    return rows.join(named, on="id", how="left", maintain_order="left").with_columns(caption=pl.col("text"))


def _strip(key: str) -> str:
    """Without the suffix of an image. A dot would end the key of a webdataset sample, or lead out of a folder."""
    stem = key.rpartition(".")[0] if is_image(key) else key
    return stem.replace(".", "_").replace("\\", "_")


def describe(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in META if name in row}


def write_webdataset(src: Path, shard: Shard, rows: pl.DataFrame, dest: Path, number: int, total: int) -> None:
    """NAME.jpg, NAME.txt and NAME.json of each sample."""

    def read() -> Iterator[bytes]:
        for row, data in read_taken(shard, rows):
            yield make_member(f"{row['name']}.{row['suffix']}", data)
            yield make_member(f"{row['name']}.txt", (row["text"] or "").encode())
            yield make_member(f"{row['name']}.json", json.dumps(describe(row), ensure_ascii=False).encode())

    def write(temporary: Path) -> None:
        with temporary.open("wb", BUFFER) as out:
            write_archive(out, read())

    write_file(dest / f"{number:05d}.tar", write)


def list_features(rows: pl.DataFrame) -> "datasets.Features":
    import datasets

    kinds = {"width": datasets.Value("int32"), "height": datasets.Value("int32"), "weight": datasets.Value("float64")}
    kinds |= {"captions": datasets.List(datasets.Value("string"))}
    names = [name for name in META if name in rows.columns]
    return datasets.Features({"image": datasets.Image()} | {n: kinds.get(n, datasets.Value("string")) for n in names})


def _read_batches(taken: Taken, schema: "pa.Schema") -> Iterator["pa.RecordBatch"]:
    """Pieces of at least HELD bytes of images."""
    import pyarrow as pa

    held: list[dict[str, Any]] = []
    size = 0
    for row, data in taken:
        held.append(
            {"image": {"bytes": data, "path": f"{row['name'].rpartition('/')[2]}.{row['suffix']}"}, **describe(row)}
        )
        size += len(data)
        if size >= HELD:
            yield pa.RecordBatch.from_pylist(held, schema)
            held, size = [], 0
    if held:
        yield pa.RecordBatch.from_pylist(held, schema)


def write_parquet(src: Path, shard: Shard, rows: pl.DataFrame, dest: Path, number: int, total: int) -> None:
    """Columns as `datasets` writes them, with its note of their types. Images are not compressed a second time."""
    from pyarrow.parquet import ParquetWriter

    schema = list_features(rows).arrow_schema
    texts = [name for name in schema.names if name != "image"]

    def write(temporary: Path) -> None:
        codecs = {"image.bytes": "NONE", "image.path": "SNAPPY"} | dict.fromkeys(texts, "SNAPPY")
        with ParquetWriter(temporary, schema, compression=codecs, use_dictionary=texts) as writer:
            for batch in _read_batches(read_taken(shard, rows), schema):
                writer.write_batch(batch)

    write_file(dest / f"{number:05d}.parquet", write)


def _name_arrow(number: int, total: int) -> str:
    return f"data-{number:05d}-of-{total:05d}.arrow"


def write_huggingface(src: Path, shard: Shard, rows: pl.DataFrame, dest: Path, number: int, total: int) -> None:
    """An arrow stream, as `save_to_disk` leaves it."""
    import pyarrow as pa

    schema = list_features(rows).arrow_schema

    def write(temporary: Path) -> None:
        with temporary.open("wb") as out, pa.ipc.new_stream(out, schema) as writer:
            for batch in _read_batches(read_taken(shard, rows), schema):
                writer.write_batch(batch)

    write_file(dest / _name_arrow(number, total), write)


def finish_huggingface(src: Path, rows: pl.DataFrame, dest: Path, total: int) -> None:
    """What `load_from_disk` reads first."""
    import datasets

    from dedup.hashing import digest

    datasets.DatasetInfo(features=list_features(rows)).write_to_directory(str(dest))
    mark = digest("".join(rows.filter("take")["sha256"]).encode())[:16]
    state: dict[str, Any] = {"_data_files": [{"filename": _name_arrow(number, total)} for number in range(total)]}
    state |= {"_fingerprint": mark, "_format_columns": None, "_format_kwargs": {}, "_format_type": None}
    write_json(dest / "state.json", state | {"_output_all_columns": False, "_split": None})


def write_imagefolder(src: Path, shard: Shard, rows: pl.DataFrame, dest: Path, number: int, total: int) -> None:
    """A file an image: a hard link where it is a file already."""
    if shard.kind in ("folder", "table"):
        root = find_root(src)
        for row in rows.filter("take").iter_rows(named=True):
            source = root / os.fsdecode(decode_name(row["shard"] or row["key"]))
            link_file(source, place(dest, f"{row['name']}.{row['suffix']}"), row["sha256"])
        return
    for named, data in read_taken(shard, rows):
        _write_bytes(place(dest, f"{named['name']}.{named['suffix']}"), data)


def _write_bytes(path: Path, data: bytes) -> None:
    write_file(path, lambda temporary: temporary.write_bytes(data))


def finish_imagefolder(src: Path, rows: pl.DataFrame, dest: Path, total: int) -> None:
    """The caption stands in `text`, where `imagefolder` and trainers look for it."""
    names = [name for name in META if name in rows.columns and name != "caption"]
    taken = rows.filter("take").select(pl.format("{}.{}", "name", "suffix").alias("file_name"), "text", *names)
    write_atomic(dest / "metadata.jsonl", taken.write_ndjson)


WRITE = {
    "webdataset": write_webdataset,
    "parquet": write_parquet,
    "huggingface": write_huggingface,
    "imagefolder": write_imagefolder,
}
FINISH = {"huggingface": finish_huggingface, "imagefolder": finish_imagefolder}
