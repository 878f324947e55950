"""webdataset tar shards, read in place: nothing is ever extracted, so member names are labels and never paths.

A sample is a run of members with one key (the path up to the first dot of its last part); its image is the member with
an image suffix, its caption `KEY.txt`, or `caption` in `KEY.json`. Plain ustar archives are read by a small reader of
our own (ten times faster than `tarfile`, and it knows the offsets); PAX, GNU and compressed ones by `tarfile`.
"""

import gzip
import hashlib
import json
import mmap
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import IO

from dedup.images import SUFFIXES
from dedup.manifest import encode_name
from dedup.sources import Record, Shard, SourceError

BLOCK = 512
PATTERNS = ("*.tar", "*.tar.gz", "*.tgz")
Member = tuple[bytes, int, int, bytes]  # name, offset of the data, size, data (shorter than size when truncated)


class _NotPlain(Exception):
    """The archive uses extensions that the fast reader does not know."""


def list_shards(src: Path) -> list[Shard]:
    """Tar files of the folder itself (not of its subfolders), sorted by name; or the one file."""
    paths = [src] if src.is_file() else sorted({p for pattern in PATTERNS for p in src.glob(pattern)})
    root = src.parent if src.is_file() else src
    shards = []
    for path in paths:
        stat = path.stat()
        stamp = hashlib.sha256(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
        shards.append(Shard("webdataset", str(root), path.name, (), stamp))
    return shards


def read_shard(shard: Shard) -> Iterator[Record]:
    path = Path(shard.root) / str(shard.name)
    for key, members in groupby(read_members(path), key=lambda member: split_key(member[0])[0]):
        yield from _sample(key, list(members))


def split_key(name: bytes) -> tuple[bytes, bytes]:
    """`b"a/b.seg.png"` → `(b"a/b", b".seg.png")`: webdataset's convention."""
    folder, slash, base = name.rpartition(b"/")
    stem, dot, extension = base.partition(b".")
    return folder + slash + stem, dot + extension


def _sample(key: bytes, members: list[Member]) -> Iterator[Record]:
    extensions = [split_key(name)[1].decode("utf-8", "replace").lower() for name, *_ in members]
    caption = None
    for extension, (_, _, _, data) in zip(extensions, members, strict=True):
        if extension == ".txt":
            caption = data.decode("utf-8", "replace").strip()
        elif extension == ".json" and caption is None:
            caption = _json_caption(data)
    images = [m for e, m in zip(extensions, members, strict=True) if "." + e.rpartition(".")[2] in SUFFIXES]
    text = encode_name(key)
    if not images:
        yield Record(text, members[0][1], 0, None, caption, "sample without an image")
    for _, offset, size, data in images:
        if len(data) < size:
            yield Record(
                text,
                offset,
                size,
                None,
                caption,
                f"shard ends inside this member ({len(data)} of {size} bytes)",
            )
        else:
            yield Record(text, offset, size, data, caption)


def _json_caption(data: bytes) -> str | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    caption = value.get("caption") if isinstance(value, dict) else None
    return caption.strip() if isinstance(caption, str) else None


def read_members(path: Path) -> Iterator[Member]:
    """Regular members in archive order, with data. Links, folders and devices are passed over: they hold no bytes.

    Raises SourceError at the place where the archive is damaged, after everything before it was yielded.
    """
    if path.name.endswith((".gz", ".tgz")):
        yield from _read_with_tarfile(path)
        return
    try:
        index = _index_plain(path)
    except _NotPlain:
        yield from _read_with_tarfile(path)
        return
    with path.open("rb") as handle:
        for name, start, size in index:
            if size < 0:
                raise SourceError(name.decode("utf-8", "replace"))
            handle.seek(start)
            yield name, start, size, handle.read(size)


def _index_plain(path: Path) -> list[tuple[bytes, int, int]]:
    """(name, first byte, size) of the regular members; a last entry of size -1 carries the damage found, if any."""
    index: list[tuple[bytes, int, int]] = []
    size_of_file = path.stat().st_size
    if size_of_file == 0:
        return [(f"{path}: empty file, not a tar archive".encode(), 0, -1)]
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
        position = 0
        while position + BLOCK <= size_of_file:
            header = view[position : position + BLOCK]
            if header.count(0) == BLOCK:
                break  # end-of-archive block
            try:
                name, size, kind = _parse_header(header)
            except ValueError as error:
                index.append((f"{path}: damaged tar archive at byte {position} ({error})".encode(), 0, -1))
                break
            start = position + BLOCK
            if kind in (b"0", b"\0"):
                index.append((name, start, size))
            position = start + (size + BLOCK - 1) // BLOCK * BLOCK
        else:
            if position < size_of_file:
                index.append((f"{path}: ends inside a header at byte {position}".encode(), 0, -1))
    return index


def _parse_header(header: bytes) -> tuple[bytes, int, bytes]:
    """Name, size and type of a ustar header. Raises _NotPlain for PAX and GNU extensions, ValueError for no header."""
    kind = header[156:157]
    checksum = int(header[148:156].strip(b" \0"), 8)
    if checksum != sum(header[:148]) + 256 + sum(header[156:]):
        raise ValueError("checksum")
    if kind in (b"x", b"g", b"L", b"K", b"S") or header[124] & 0x80:
        raise _NotPlain
    size = int(header[124:136].strip(b" \0") or b"0", 8)
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and prefix:
        name = prefix + b"/" + name
    return name, size, kind


def _read_with_tarfile(path: Path) -> Iterator[Member]:
    try:
        with tarfile.open(path, "r:*") as archive:
            for info in archive:
                handle = archive.extractfile(info) if info.isreg() else None
                if handle is not None:
                    name = info.name.encode("utf-8", "surrogateescape")
                    yield name, info.offset_data, info.size, _read_available(handle, info.size)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise SourceError(f"{path}: damaged tar archive ({error})") from error


def _read_available(handle: IO[bytes], size: int) -> bytes:
    """Up to `size` bytes; fewer when the archive ends early."""
    try:
        return handle.read(size)
    except (tarfile.ReadError, EOFError):
        return b""


def read_image(src: Path, shard: str, offset: int, size: int) -> bytes:
    path = (src if src.is_dir() else src.parent) / shard
    opener = gzip.open if path.name.endswith((".gz", ".tgz")) else open
    with opener(path, "rb") as handle:
        handle.seek(offset)
        data = handle.read(size)
    if len(data) < size:
        raise OSError(f"{path}: ends before byte {offset + size}; has the source changed?")
    return data
