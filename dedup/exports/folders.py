"""Folders: hard links to the images that are kept (copies, where the disk allows no links), and what lies beside them.

Beside an image lie the files of its name: `X.txt`, `X.json`, `X.xmp` go with `X.jpg`. Metadata files lose the rows of
the images that go, and so do img2dataset's lists. New is only what a policy asks for: the caption in the metadata file,
or else in `X.txt` or `X.json`; the columns `captions` and `weight` of the metadata file, or else the files
`X.captions.json` and `X.weight.json`. Other files (a licence, a README) stay behind.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dedup.exports import check_bytes, place, read_changes, write_file
from dedup.exports.tables import Change, filter_listed, filter_table
from dedup.images import SUFFIXES
from dedup.manifest import decode_name, write_text
from dedup.sources import Shard, json_caption, list_files
from dedup.sources.folder import CAPTION_COLUMNS, READERS, read_file
from dedup.sources.parquet import is_parquet
from dedup.sources.webdataset import is_tar


def same(src: Path, shards: Sequence[Shard], rows: pl.DataFrame, dest: Path) -> None:
    """All images of a folder, and their files."""
    taken = {
        os.fsdecode(decode_name(row["key"])): (row["sha256"], change)
        for row, change in zip(rows.iter_rows(named=True), read_changes(rows), strict=True)
        if change is not None
    }
    files = list_files(src)
    known = {os.fsdecode(decode_name(key)) for key in rows["key"]}
    beside: dict[str, list[str]] = {}
    for name in files:
        dataset = is_tar(name) or is_parquet(name) or name.rpartition("/")[2] in READERS
        if not (dataset or is_image(name) or name in known):
            beside.setdefault(_stem(name), []).append(name)
    told = _filter_metadata(src, files, dest, taken, rows)
    for name, (sha256, change) in taken.items():
        link_file(src / name, place(dest, name), sha256)
        others = beside.get(_stem(name), [])
        left = {} if name in told else dict(change)
        texts = {
            other: _change_caption(src / other, left["caption"]) if "caption" in left else None for other in others
        }
        if "caption" in left and not any(texts.values()):
            texts[f"{_stem(name)}.txt"] = left["caption"]
        for other, text in texts.items():
            if text is None:
                link_file(src / other, place(dest, other))
            else:
                write_text(place(dest, other), text)
        for column in ("captions", "weight"):
            if column in left:
                write_text(place(dest, f"{_stem(name)}.{column}.json"), json.dumps(left[column], ensure_ascii=False))
    for shard in shards:
        for name in (member for member in shard.members if member.endswith(".parquet")):
            prefix = name.removesuffix(".parquet") + "/"
            keys = {
                _stem(key).removeprefix(prefix): change for key, (_, change) in taken.items() if key.startswith(prefix)
            }
            filter_listed(src / name, place(dest, name), keys, rows)


def link_file(source: Path, target: Path, sha256: str | None = None) -> None:
    """A second name for the file, whose bytes are compared with their digest; or a copy. What is there stays."""
    if os.path.exists(target):  # noqa: PTH110 - of a million files, pathlib would take the longest
        return
    if sha256 is not None:
        check_bytes(read_file(source), sha256, str(source))
    if os.path.islink(source):  # noqa: PTH114
        source = source.resolve()
    if not os.path.isdir(target.parent):  # noqa: PTH112
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        write_file(target, lambda temporary: shutil.copyfile(source, temporary))


def is_image(name: str) -> bool:
    return f".{name.rpartition('.')[2].lower()}" in SUFFIXES


def _stem(name: str) -> str:
    """Without its extension: only the last one, as the reader has it."""
    stem, dot, _ = name.rpartition(".")
    return stem if dot and "/" not in name[len(stem) :] else name


def _change_caption(path: Path, caption: str) -> str | None:
    """What a file beside an image says instead; None where it says no caption."""
    if path.suffix not in (".txt", ".json"):
        return None
    if path.suffix == ".txt":
        return caption
    data = read_file(path)
    return None if json_caption(data) is None else json.dumps({**json.loads(data), "caption": caption})


def _filter_metadata(
    src: Path, files: Sequence[str], dest: Path, taken: Mapping[str, tuple[str, Any]], rows: pl.DataFrame
) -> set[str]:
    """Write the metadata files; returns the images that stand in them."""
    told: set[str] = set()
    for name in files:
        folder, _, base = name.rpartition("/")
        if base not in READERS:
            continue
        known = READERS[base](src / name)
        inside = [(Path(folder) / file).as_posix() for file in known["file_name"].drop_nulls()]
        told |= set(inside) & taken.keys()

        def choose(_: int, row: Mapping[str, Any], folder: str = folder) -> Change:
            file = row.get("file_name")
            return taken.get((Path(folder) / file).as_posix(), (None, None))[1] if isinstance(file, str) else None

        caption = next((column for column in CAPTION_COLUMNS if column in known.columns), None)
        filter_table(src / name, place(dest, name), choose, rows, wanted=("file_name",), caption=caption)
    return told
