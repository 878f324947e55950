"""A folder of images, searched recursively. Captions: a sidecar `X.txt` beside `X.jpg`, or imagefolder metadata.

imagefolder metadata is `metadata.csv|jsonl|parquet` with a `file_name` column (relative to the metadata file) and a
caption column `text` or `caption`. Metadata wins over sidecars.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl

from dedup.images import SUFFIXES
from dedup.manifest import decode_name, encode_name
from dedup.sources import Record, Shard, SourceError

FILES_PER_SHARD = 1_000
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTION_COLUMNS = ("text", "caption")
READERS: dict[str, Callable[[Path], pl.DataFrame]] = {
    ".csv": pl.read_csv,
    ".jsonl": pl.read_ndjson,
    ".parquet": pl.read_parquet,
}


def list_shards(src: Path) -> list[Shard]:
    """Files below `src` sorted by the bytes of their path, in runs of FILES_PER_SHARD.

    Symbolic links to files are followed, links to folders are not (they may be circular).
    """
    files: list[tuple[str, str]] = []
    unreadable: list[OSError] = []
    for folder, _, names in os.walk(src, onerror=unreadable.append):
        for name in names:
            path = Path(folder) / name
            key = encode_name(os.fsencode(path.relative_to(src)))
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                files.append((key, _stamp(path)))
    if unreadable:
        raise SourceError(f"{unreadable[0].filename!r}: cannot be listed ({unreadable[0].strerror})")
    files.sort()
    shards = []
    for start in range(0, len(files), FILES_PER_SHARD):
        part = files[start : start + FILES_PER_SHARD]
        fingerprint = hashlib.sha256(repr(part).encode()).hexdigest()[:16]
        shards.append(Shard("folder", str(src), None, tuple(key for key, _ in part), fingerprint))
    return shards


def _stamp(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return "missing"
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def read_shard(shard: Shard) -> Iterator[Record]:
    root = Path(shard.root)
    metadata: dict[Path, dict[str, str]] = {}
    for key in shard.members:
        path = root / os.fsdecode(decode_name(key))
        caption = _metadata_caption(path, root, metadata)
        if caption is None:
            caption = _sidecar_caption(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            yield Record(key, 0, 0, None, caption, error.strerror)
            continue
        yield Record(key, 0, len(data), data, caption)


def _sidecar_caption(path: Path) -> str | None:
    try:
        return path.with_suffix(".txt").read_bytes().decode("utf-8", "replace").strip()
    except OSError:
        return None


def _metadata_caption(path: Path, root: Path, cache: dict[Path, dict[str, str]]) -> str | None:
    """Caption from the nearest metadata file at or above the image that names it."""
    folder = path.parent
    while True:
        if folder not in cache:
            cache[folder] = read_metadata(folder)
        caption = cache[folder].get(path.relative_to(folder).as_posix())
        if caption is not None or folder == root:
            return caption
        folder = folder.parent


def read_metadata(folder: Path) -> dict[str, str]:
    """`file_name` → caption from an imagefolder metadata file of this folder; empty when there is none."""
    path = next((folder / name for name in METADATA if (folder / name).exists()), None)
    if path is None:
        return {}
    table = READERS[path.suffix](path)
    columns = [c for c in CAPTION_COLUMNS if c in table.columns]
    if "file_name" not in table.columns or not columns:
        raise SourceError(
            f"{path}: needs the columns file_name and {' or '.join(CAPTION_COLUMNS)}; it has {', '.join(table.columns)}"
        )
    rows = table.select("file_name", pl.col(columns[0]).cast(pl.String)).drop_nulls()
    return dict(rows.iter_rows())


def read_image(src: Path, key: str) -> bytes:
    return (src / os.fsdecode(decode_name(key))).read_bytes()
