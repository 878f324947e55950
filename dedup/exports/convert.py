"""Any source → webdataset, parquet, Hugging Face or imagefolder. The bytes of images pass untouched.

One file of output for each shard of the source that has rows to give, in order; an `imagefolder` has one file an image
and one `metadata.jsonl`. Of each row go along: key, caption, source, width, height, sha256, `captions` and `weight`
where they are asked for, and what else the source says of it (`more`). Names of samples are their keys without the
suffix of the image; where these would not be different or safe names, all samples are named by the number of their
row.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dedup.exports import place, read_taken, write_file
from dedup.exports.folders import is_image, link_file
from dedup.exports.more import JSON, Column
from dedup.exports.more import read as read_more
from dedup.exports.tars import make_member, write_archive
from dedup.manifest import decode_name, write_json
from dedup.sources import Shard, SourceError, find_root
from dedup.sources.webdataset import BUFFER, read_members, split_key

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

HELD = (
    1 << 22
)  # bytes of images in memory before they are written, as one row group; 64 MB took 1.2 to 1.6 times the work
LOOKED_AT = 64  # members of a tar shard
NAME = 200  # bytes of a part of a name, at most: file systems take 255 bytes
SUFFIXES = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "JPEG2000": "jp2",
    "TIFF": "tif",
    "DICOM": "dcm",
}  # other formats are named as they are
LINES = ".metadata"  # folder in an imagefolder that is on its way
META = ["key", "caption", "source", "width", "height", "sha256", "captions", "weight"]

type Taken = Iterable[tuple[Mapping[str, Any], bytes]]
type Columns = Sequence[Column]


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


def list_members_left(shards: Iterable[Shard]) -> list[str]:
    """Extensions of tar members that stay behind, as the first LOOKED_AT members of each shard have them."""
    found: dict[str, None] = {}
    for shard in shards:
        if shard.kind != "webdataset":
            continue
        with suppress(SourceError):  # damage is told where the shard is read as a whole
            for member in islice(read_members(Path(shard.root) / str(shard.name)), LOOKED_AT):
                found[split_key(member.name)[1].decode("utf-8", "replace").lower()] = None
    taken = ("", ".txt", ".json")
    return sorted(name for name in found if name not in taken and not is_image(f"x{name}"))


def describe(row: Mapping[str, Any], more: Columns) -> dict[str, Any]:
    return {name: row[name] for name in META if name in row} | {column.name: row[column.name] for column in more}


def _read(src: Path, shard: Shard, rows: pl.DataFrame, more: Columns) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Row, with the values of other columns, and bytes of all that is taken."""
    others = read_more(src, shard, rows, more) if more and shard.kind != "webdataset" else None
    for row, record in read_taken(shard, rows):
        if others is not None:
            row |= next(others)
        elif more:
            said = record.json and record.json.decode("utf-8", "replace")
            row |= {column.name: said if column.source == JSON else None for column in more}
        yield row, record.data or b""


def write_webdataset(
    src: Path, shard: Shard, rows: pl.DataFrame, dest: Path, more: Columns, number: int, total: int
) -> None:
    """NAME.jpg, NAME.txt and NAME.json of each sample."""

    def read() -> Iterator[bytes]:
        for row, data in _read(src, shard, rows, more):
            yield make_member(f"{row['name']}.{row['suffix']}", data)
            yield make_member(f"{row['name']}.txt", (row["text"] or "").encode())
            yield make_member(f"{row['name']}.json", _say(describe(row, more)).encode())

    def write(temporary: Path) -> None:
        with temporary.open("wb", BUFFER) as out:
            write_archive(out, read())

    write_file(dest / f"{number:05d}.tar", write)


def _say(described: dict[str, Any]) -> str:
    """What JSON has no word for, such as a date, becomes text. Of a `json` that is an object, its fields."""
    try:
        inside = json.loads(described.get(JSON) or "null")
    except (ValueError, RecursionError, TypeError):
        inside = None
    if isinstance(inside, dict):
        described = {**inside, **{name: value for name, value in described.items() if name != JSON}}
    return json.dumps(described, ensure_ascii=False, default=str)


def list_features(rows: pl.DataFrame, more: Columns) -> "datasets.Features":
    import datasets

    kinds = {"width": datasets.Value("int32"), "height": datasets.Value("int32"), "weight": datasets.Value("float64")}
    kinds |= {"captions": datasets.List(datasets.Value("string"))}
    names = [name for name in META if name in rows.columns]
    features = {"image": datasets.Image()} | {name: kinds.get(name, datasets.Value("string")) for name in names}
    return datasets.Features(features | {column.name: column.feature or datasets.Value("string") for column in more})


def _read_batches(taken: Taken, schema: "pa.Schema", more: Columns) -> Iterator["pa.RecordBatch"]:
    """Pieces of at least HELD bytes of images."""
    import pyarrow as pa

    rest = pa.schema([field for field in schema if field.name != "image"])

    def pack() -> pa.RecordBatch:  # bytes go from Python to arrow once: as values of dicts it would be twice
        cells = pa.StructArray.from_arrays([pa.array(images, pa.binary()), pa.array(paths)], ["bytes", "path"])
        others = pa.RecordBatch.from_pylist(held, rest)
        return pa.RecordBatch.from_arrays([cells, *others.columns], schema=schema)

    held, images, paths = list[dict[str, Any]](), list[bytes](), list[str]()
    size = 0
    for row, data in taken:
        images.append(data)
        paths.append(f"{row['name'].rpartition('/')[2]}.{row['suffix']}")
        held.append(describe(row, more))
        size += len(data)
        if size >= HELD:
            yield pack()
            held, images, paths, size = [], [], [], 0
    if held:
        yield pack()


def write_parquet(
    src: Path, shard: Shard, rows: pl.DataFrame, dest: Path, more: Columns, number: int, total: int
) -> None:
    """Columns as `datasets` writes them, with its note of their types. Images are not compressed a second time."""
    from pyarrow.parquet import ParquetWriter

    schema = list_features(rows, more).arrow_schema
    texts = [name for name in schema.names if name != "image"]

    def write(temporary: Path) -> None:
        codecs = {"image.bytes": "NONE", "image.path": "SNAPPY"} | dict.fromkeys(texts, "SNAPPY")
        with ParquetWriter(temporary, schema, compression=codecs, use_dictionary=texts) as writer:
            for batch in _read_batches(_read(src, shard, rows, more), schema, more):
                writer.write_batch(batch)

    write_file(dest / f"{number:05d}.parquet", write)


def _name_arrow(number: int, total: int) -> str:
    return f"data-{number:05d}-of-{total:05d}.arrow"


def write_huggingface(
    src: Path, shard: Shard, rows: pl.DataFrame, dest: Path, more: Columns, number: int, total: int
) -> None:
    """An arrow stream, as `save_to_disk` leaves it."""
    import pyarrow as pa

    schema = list_features(rows, more).arrow_schema

    def write(temporary: Path) -> None:
        with temporary.open("wb") as out, pa.ipc.new_stream(out, schema) as writer:
            for batch in _read_batches(_read(src, shard, rows, more), schema, more):
                writer.write_batch(batch)

    write_file(dest / _name_arrow(number, total), write)


def finish_huggingface(src: Path, rows: pl.DataFrame, dest: Path, more: Columns, total: int) -> None:
    """What `load_from_disk` reads first."""
    import datasets

    from dedup.hashing import digest

    datasets.DatasetInfo(features=list_features(rows, more)).write_to_directory(str(dest))
    mark = digest("".join(rows.filter("take")["sha256"]).encode())[:16]
    state: dict[str, Any] = {"_data_files": [{"filename": _name_arrow(number, total)} for number in range(total)]}
    state |= {"_fingerprint": mark, "_format_columns": None, "_format_kwargs": {}, "_format_type": None}
    write_json(dest / "state.json", state | {"_output_all_columns": False, "_split": None})


def write_imagefolder(
    src: Path, shard: Shard, rows: pl.DataFrame, dest: Path, more: Columns, number: int, total: int
) -> None:
    """A file an image: a hard link where it is a file already. Their lines of the metadata wait for `finish`."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as out:
            for row in place_images():
                name = f"{row['name']}.{row['suffix']}"
                told = {"file_name": name, "text": row["text"], **describe(row, more)}
                del told["caption"]
                out.write(json.dumps(told, ensure_ascii=False, default=str) + "\n")

    def place_images() -> Iterator[dict[str, Any]]:
        if shard.kind in ("folder", "table"):
            root = find_root(src)
            others = read_more(src, shard, rows, more) if more else None
            for row in rows.filter("take").iter_rows(named=True):
                source = root / os.fsdecode(decode_name(row["shard"] or row["key"]))
                link_file(source, place(dest, f"{row['name']}.{row['suffix']}"), row["sha256"])
                yield row | (next(others) if others else {})
            return
        for row, data in _read(src, shard, rows, more):
            _write_bytes(place(dest, f"{row['name']}.{row['suffix']}"), data)
            yield row

    write_file(dest / LINES / f"{number:05d}.jsonl", write)


def _write_bytes(path: Path, data: bytes) -> None:
    write_file(path, lambda temporary: temporary.write_bytes(data))


def finish_imagefolder(src: Path, rows: pl.DataFrame, dest: Path, more: Columns, total: int) -> None:
    """The caption stands in `text`, where `imagefolder` and trainers look for it."""

    def join(temporary: Path) -> None:
        with temporary.open("wb") as out:
            for number in range(total):
                with (dest / LINES / f"{number:05d}.jsonl").open("rb") as lines:
                    shutil.copyfileobj(lines, out)

    write_file(dest / "metadata.jsonl", join)
    shutil.rmtree(dest / LINES, ignore_errors=True)


WRITE = {
    "webdataset": write_webdataset,
    "parquet": write_parquet,
    "huggingface": write_huggingface,
    "imagefolder": write_imagefolder,
}
FINISH = {"huggingface": finish_huggingface, "imagefolder": finish_imagefolder}
