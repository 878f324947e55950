"""Where images come from. One file a format; each turns SRC into shards, and a shard into records.

A shard is the unit of work and of resuming. `list_shards(src)` is cheap and touches no image; `read_shard(shard)` is a
pure function of the shard; `read_image(...)` fetches one image again from its manifest row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class SourceError(OSError):
    """SRC cannot be read at all: what, where, how to mend, in one line."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One unit of work: a tar file, or a run of files of a folder."""

    kind: str  # "folder" or "webdataset"
    root: str  # SRC, absolute
    name: str | None  # tar relative to SRC; None for a folder
    members: tuple[str, ...]  # encoded paths relative to SRC (folder), empty for a tar
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


def detect(src: Path) -> str:
    """Name of the source format of SRC."""
    if src.is_file() and (src.name.endswith((".tar", ".tar.gz", ".tgz"))):
        return "webdataset"
    if src.is_dir():
        has_tar = any(src.glob("*.tar")) or any(src.glob("*.tar.gz")) or any(src.glob("*.tgz"))
        return "webdataset" if has_tar else "folder"
    raise SourceError(f"{src}: no such folder or tar file")


def list_shards(src: Path) -> list[Shard]:
    """Shards of SRC in a fixed order, whatever the order of the directory."""
    from dedup.sources import folder, webdataset

    shards = {"folder": folder, "webdataset": webdataset}[detect(src)].list_shards(src)
    if not shards:
        raise SourceError(f"{src}: no images found (looked for images and for tar shards)")
    return shards


def read_shard(shard: Shard) -> Iterator[Record]:
    """All records of one shard, in a fixed order."""
    from dedup.sources import folder, webdataset

    return {"folder": folder, "webdataset": webdataset}[shard.kind].read_shard(shard)


def read_image(src: Path, shard: str | None, offset: int, size: int, key: str) -> bytes:
    """The bytes of one manifest row. Raises OSError when they are gone or shorter than they were."""
    from dedup.sources import folder, webdataset

    if shard is None:
        return folder.read_image(src, key)
    return webdataset.read_image(src, shard, offset, size)
