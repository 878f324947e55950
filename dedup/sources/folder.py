"""The images of a folder, however deep. Captions: imagefolder metadata, else `X.txt` or `X.json` beside `X.jpg`.

imagefolder metadata is `metadata.csv|jsonl|parquet` with a `file_name` column (relative to the metadata file) and a
caption column `text` or `caption`; the metadata file nearest to an image wins. `X.json` is an object with `caption`, as
img2dataset writes it; the rows of its `00000.parquet` that failed are listed where that file stands in the order. DICOM
files need no suffix.
"""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import polars as pl

from dedup import dicom
from dedup.images import SUFFIXES
from dedup.manifest import decode_name, encode_name
from dedup.sources import (
    MAX_BYTES,
    Record,
    Shard,
    SourceError,
    digest_stamps,
    img2dataset,
    json_caption,
    open_regular,
    stamp_file,
    text_caption,
)

FILES_PER_SHARD = 1_000
CAPTION_COLUMNS = ("text", "caption")
# Everything in a CSV file is text: "007" is no number, and a first row of digits does not forbid words in the second.
READERS: dict[str, Callable[[Path], pl.DataFrame]] = {
    "metadata.csv": lambda path: pl.read_csv(path, infer_schema=False, encoding="utf8-lossy"),
    "metadata.jsonl": lambda path: pl.read_ndjson(path, infer_schema_length=None),
    "metadata.parquet": pl.read_parquet,
}


def list_shards(src: Path, files: Sequence[str]) -> list[Shard]:
    """The images among `files` (paths relative to `src`, in order), in runs of FILES_PER_SHARD."""
    present = set(files)
    captions = _read_metadata(src, files)
    found = []
    for file in files:
        stem, _, suffix = file.rpartition(".")
        if f".{suffix.lower()}" in SUFFIXES or is_dicom(src, file):
            stem = os.path.splitext(file)[0]  # noqa: PTH122 - as `_caption_beside` finds it
            beside = [name for name in (f"{stem}.txt", f"{stem}.json") if name in present]
        elif suffix == "parquet" and (src / stem).is_dir():
            beside = []
        else:
            continue
        stamps = [stamp_file(f"{src}/{name}") for name in (file, *beside)]
        found.append((encode_name(os.fsencode(file)), captions.get(file), stamps))
    shards = []
    for start in range(0, len(found), FILES_PER_SHARD):
        part = found[start : start + FILES_PER_SHARD]
        members, told, _ = zip(*part, strict=True)
        shards.append(Shard("folder", str(src), None, members, told, digest_stamps(part)))
    return shards


def is_dicom(src: Path, file: str) -> bool:
    """Whether a file without a suffix, or with a number for one as in `1.2.840.7`, is DICOM."""
    name = file.rpartition("/")[2]
    unnamed = "." not in name or name.rpartition(".")[2].isdigit()
    return unnamed and name != "DICOMDIR" and dicom.holds_dicom(src / file)


def _read_metadata(src: Path, files: Sequence[str]) -> dict[str, str]:
    """Path → caption from all metadata files."""
    captions: dict[str, str] = {}
    paths = [Path(name) for name in files if name.rpartition("/")[2] in READERS]
    for path in sorted(paths, key=lambda path: -len(path.parts)):
        for name, caption in _read_table(src / path):
            captions.setdefault((path.parent / name).as_posix(), caption)
    return captions


def _read_table(path: Path) -> list[tuple[str, str]]:
    try:
        open_regular(path).close()
        table = READERS[path.name](path)
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise SourceError(f"{path}: cannot be read ({str(error).partition('\n')[0]})") from error
    columns = [name for name in CAPTION_COLUMNS if name in table.columns]
    if "file_name" not in table.columns or not columns:
        raise SourceError(
            f"{path}: needs the columns file_name and {' or '.join(CAPTION_COLUMNS)}; it has {', '.join(table.columns)}"
        )
    return table.select("file_name", pl.col(columns[0]).cast(pl.String)).drop_nulls().rows()


def read_shard(shard: Shard) -> Iterator[Record]:
    root = Path(shard.root)
    for key, caption in zip(shard.members, shard.captions, strict=True):
        path = find_file(root, key)
        if path.suffix == ".parquet":
            yield from img2dataset.read_failed(path, key.removesuffix("parquet").removesuffix(".") + "/")
            continue
        if caption is None:
            caption = _caption_beside(path)
        try:
            data = read_file(path)
        except OSError as error:
            yield Record(key, 0, 0, None, caption, error.strerror)
            continue
        yield Record(key, 0, len(data), data, caption, link=path.is_symlink())


def find_file(root: Path, key: str) -> Path:
    return root / os.fsdecode(decode_name(key))


def read_file(path: Path) -> bytes:
    with open_regular(path) as handle:
        if os.fstat(handle.fileno()).st_size > MAX_BYTES:
            raise OSError(errno.EFBIG, f"more than {MAX_BYTES:,} bytes", str(path))
        return handle.read()


def _caption_beside(path: Path) -> str | None:
    stem, _ = os.path.splitext(path)  # noqa: PTH122 - as `list_shards` does, and many times faster than Path
    for suffix, parse in ((".txt", text_caption), (".json", json_caption)):
        if os.path.exists(stem + suffix):  # noqa: PTH110
            with suppress(OSError):
                return parse(read_file(Path(stem + suffix)))
    return None


def read_image(root: Path, key: str) -> bytes:
    return read_file(find_file(root, key))
