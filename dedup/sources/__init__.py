"""Where images come from. One file a format; each turns SRC into shards, and a shard into records.

SRC is a folder, a tar shard, or a pattern that names tar shards: a glob, or braces as webdataset writes them. A folder
is read as its image files, however deep, and its tar shards: those at its top or, if there are none, those below.
Hidden files and folders, and results of earlier runs, are passed over.

A shard is the unit of work and of resuming. `list_shards(src)` is cheap and touches no image; `read_shard(shard)` is a
pure function of the shard; `read_image(...)` fetches one image again from its manifest row.
"""

import errno
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

WILDCARDS = frozenset("*?[{")
MAX_BYTES = 1 << 31  # no image within the limits of `dedup.images` needs more; a film that is named .jpg does
RESULTS = {"run.json", "pairs.parquet"}  # a folder that holds both was written by a run, and holds its thumbnails


class SourceError(OSError):
    """SRC cannot be read at all: what, where, how to mend, in one line."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One unit of work: a tar file, or a run of files of a folder."""

    kind: str  # "folder" or "webdataset"
    root: str  # `find_root(SRC)`
    name: str | None  # tar relative to root; None for a folder
    members: tuple[str, ...]  # encoded paths relative to root (folder), empty for a tar
    captions: tuple[str | None, ...]  # of the members, as far as a metadata file names them
    fingerprint: str  # changes when the content may have changed (names, sizes, mtimes)


@dataclass(slots=True)
class Record:
    """One image as it was found. `data` is None when there are no bytes; then `error` says why."""

    key: str
    offset: int
    size: int
    data: bytes | None
    caption: str | None
    error: str | None = None
    link: bool = False  # a symbolic link: of equal files, the one that holds the bytes is kept


def find_root(src: Path) -> Path:
    """The folder that names of shards are relative to: SRC, or what stands before the file or the first wildcard."""
    if os.access(src, os.F_OK):
        return src if src.is_dir() else src.parent
    first = next((n for n, part in enumerate(src.parts) if WILDCARDS & set(part)), len(src.parts) - 1)
    return Path(*src.parts[:first])


def list_shards(src: Path) -> list[Shard]:
    """Shards of SRC in a fixed order, whatever the order of the directory. Raises SourceError."""
    from dedup.sources import folder, webdataset

    root = find_root(src)
    if root != src:
        return webdataset.list_shards(root, webdataset.expand_pattern(src))
    files = list_files(src)
    tars = [name for name in files if webdataset.is_tar(name)]
    tars = [name for name in tars if "/" not in name] or tars
    shards = folder.list_shards(src, files) + webdataset.list_shards(src, [src / name for name in tars])
    if not shards:
        raise SourceError(f"{src}: no images found (looked for images and for tar shards)")
    return shards


def list_files(src: Path) -> list[str]:
    """Paths relative to `src` of all visible files below it, sorted by their bytes.

    Links to files are followed, links to folders are not (they may be circular).
    """
    files: list[str] = []
    unreadable: list[OSError] = []
    for folder, folders, names in os.walk(src, onerror=unreadable.append):
        if set(names) >= RESULTS:
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = "" if folder == str(src) else Path(folder).relative_to(src).as_posix() + "/"
        files += [prefix + name for name in names if not name.startswith(".")]
    if unreadable:
        what = f"{unreadable[0].filename!r}: cannot be listed ({unreadable[0].strerror})"
        raise SourceError(f"{what}: make it readable, or give a folder without it")
    return sorted(files, key=os.fsencode)


def read_shard(shard: Shard) -> Iterator[Record]:
    """All records of one shard, in a fixed order. Raises SourceError at its end when it is damaged."""
    from dedup.sources import folder, webdataset

    return {"folder": folder, "webdataset": webdataset}[shard.kind].read_shard(shard)


def read_image(src: Path, shard: str | None, offset: int, size: int, key: str) -> bytes:
    """The bytes of one manifest row. Raises SourceError when they are gone or fewer than they were."""
    from dedup.sources import folder, webdataset

    root = find_root(src)
    try:
        data = folder.read_image(root, key) if shard is None else webdataset.read_image(root / shard, offset, size)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(
            f"{root / (shard or key)}: cannot be read again ({error}); has the source changed?"
        ) from error
    if len(data) < size:
        raise SourceError(f"{root / (shard or key)}: ends before byte {offset + size}; has the source changed?")
    return data


def stamp_file(path: Path | str) -> str:
    """Size and time of a file."""
    try:
        status = os.stat(path)  # noqa: PTH116 - of a million names, pathlib would take the longest
    except OSError:
        return "missing"
    return f"{status.st_size}:{status.st_mtime_ns}"


def digest_stamps(stamps: object) -> str:
    """16 hex digits for a shard's fingerprint."""
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError for whatever is no file: a pipe would block for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.open("rb")


def text_caption(data: bytes) -> str:
    """Caption of a text file. What is not UTF-8 becomes U+FFFD."""
    return data.decode("utf-8-sig", "replace").strip()


def json_caption(data: bytes) -> str | None:
    """`caption` of a JSON object; None when there is none or the file is no JSON."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    caption = value.get("caption") if isinstance(value, dict) else None
    return text_caption(caption.encode("utf-8", "replace")) if isinstance(caption, str) else None  # lone surrogates
