"""webdataset tar shards, read in place: nothing is ever extracted, so member names are labels and never paths.

A sample is a run of members with one key (the path up to the first dot of its last part); its image is the member with
an image suffix, its caption `KEY.txt`, or `caption` in `KEY.json`. The reader of headers is our own: several times
faster than `tarfile`, which stops without a word at a damaged header. It knows USTAR and the long names of PAX and GNU:
webdataset's own writer, hence img2dataset, puts a PAX header before every member.
"""

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from braceexpand import braceexpand

from dedup.images import SUFFIXES
from dedup.manifest import encode_name
from dedup.sources import (
    MAX_BYTES,
    WILDCARDS,
    Record,
    Shard,
    SourceError,
    digest_stamps,
    find_root,
    img2dataset,
    json_caption,
    open_regular,
    stamp_file,
    text_caption,
)

BLOCK = 512
BUFFER = 1 << 20
ADLER = 65_521  # modulus of the sums in Adler-32 (RFC 1950)
END = bytes(BLOCK)
GZIP = b"\x1f\x8b"
MAX_EXTENDED = 1 << 20  # bytes of an extended header: a name, some numbers
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


class Member(NamedTuple):
    """One file of an archive."""

    name: bytes
    offset: int  # first byte of the data, in the uncompressed archive
    size: int
    data: bytes | None
    problem: str | None = None  # why there is no data
    headers: bytes = b""  # its own, extended ones included, as they stand in the archive
    before: bytes = b""  # what belongs to no member: folders, headers of all members that follow


def is_tar(name: str) -> bool:
    return name.lower().endswith(TAR_SUFFIXES)


def expand_pattern(src: Path) -> list[Path]:
    """Tar files that SRC names: one, a glob in sorted order, or braces in the order written. Raises SourceError."""
    try:
        names = [str(src)] if os.access(src, os.F_OK) else list(braceexpand(str(src), escape=False))
    except ValueError as error:
        raise SourceError(f"{src}: opening and closing braces differ in number") from error
    found = {name: [Path(name)] if os.access(name, os.F_OK) else _glob(Path(name)) for name in names}
    if missing := [name for name, paths in found.items() if not paths]:
        share = f" ({len(missing):,} of the {len(found):,} that {src.name} names are missing)" if len(found) > 1 else ""
        raise SourceError(f"{missing[0]}: no such folder or tar shard{share}")
    paths = list(dict.fromkeys(path for paths in found.values() for path in paths))
    if other := [path for path in paths if not is_tar(path.name)]:
        raise SourceError(f"{other[0]}: SRC is a folder, a table, or shards that end in {', '.join(TAR_SUFFIXES)}")
    return paths


def _glob(pattern: Path) -> list[Path]:
    root = find_root(pattern)
    names = pattern.relative_to(root)
    visible = (path for path in root.glob(str(names)) if is_tar(path.name) and not path.name.startswith("."))
    return sorted(visible) if WILDCARDS & set(str(names)) else []


def list_shards(root: Path, paths: Sequence[Path]) -> list[Shard]:
    """One shard a tar file, in the order given. The parquet file that img2dataset writes beside it belongs to it."""
    shards = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        fingerprint = digest_stamps([name, stamp_file(path), stamp_file(list_beside(path))])
        shards.append(Shard("webdataset", str(root), name, (), (), fingerprint))
    return shards


def list_beside(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".gz")).with_suffix(".parquet")


def read_shard(shard: Shard) -> Iterator[Record]:
    path = Path(shard.root) / str(shard.name)
    current, sample = b"", list[tuple[str, Member]]()
    damage = None
    try:
        for member in read_members(path):
            key, extension = split_key(member.name)
            if key.endswith(b"/") or not key:  # hidden, as macOS leaves `._X.jpg`; a folder
                continue
            if key != current:
                yield from _read_sample(current, sample)
                current, sample = key, []
            sample.append((extension.decode("utf-8", "replace").lower(), member))
    except SourceError as error:  # what was read before it, and what failed to download, is told all the same
        damage = error
    yield from _read_sample(current, sample)
    yield from img2dataset.read_failed(list_beside(path))
    if damage:
        raise damage


def split_key(name: bytes) -> tuple[bytes, bytes]:
    """`b"a/b.seg.png"` → `(b"a/b", b".seg.png")`: webdataset's convention."""
    folder, slash, base = name.rpartition(b"/")
    stem, dot, extension = base.partition(b".")
    return folder + slash + stem, dot + extension


def _read_sample(key: bytes, sample: Sequence[tuple[str, Member]]) -> Iterator[Record]:
    """A record for each image, and for each other member that cannot be read."""
    texts = {extension: member.data for extension, member in sample if member.data is not None}
    caption = text_caption(texts[".txt"]) if ".txt" in texts else json_caption(texts.get(".json", b""))
    text = encode_name(key)
    without_image = True
    for extension, member in sample:
        if "." + extension.rpartition(".")[2] in SUFFIXES:
            record = Record(text, member.offset, member.size, member.data, caption, member.problem)
            record.json = texts.get(".json")
            yield record
            without_image = False
        elif member.problem:
            yield Record(text, member.offset, member.size, None, caption, f"{extension}: {member.problem}")
    if sample and without_image:
        yield Record(text, sample[0][1].offset, 0, None, caption, "sample without an image")


def read_members(path: Path) -> Iterator[Member]:
    """Files of the archive in their order, and links, which hold no bytes. Folders and devices are passed over.

    Raises SourceError at the place where the archive is damaged, after everything before it was yielded.
    """
    try:
        with open_archive(path) as handle:
            yield from _walk(handle)
            for rest in iter(lambda: handle.read(BUFFER), b""):  # to its end, where gzip keeps its checksum
                if rest.strip(b"\0"):
                    raise ValueError("more follows its end mark, as in archives that were joined: not read")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise SourceError(f"{path}: cannot be read to its end ({error})") from error


def open_archive(path: Path) -> BinaryIO:
    """The uncompressed archive, whatever its name says about compression."""
    with open_regular(path) as handle:
        compressed = handle.read(2) == GZIP
    return gzip.open(path) if compressed else path.open("rb", buffering=BUFFER)  # type: ignore[return-value]


def _walk(handle: BinaryIO) -> Iterator[Member]:
    """POSIX.1-2001 (pax), sections "ustar Interchange Format" and "pax Header Block"; GNU tar's long names."""
    position = 0
    headers = before = b""
    shared: dict[bytes, bytes] = {}  # of all members that follow
    special: dict[bytes, bytes] = {}  # of the next member
    while header := handle.read(BLOCK):
        if header == END:
            return  # end mark
        try:
            name, size, kind = _parse_header(header)
            start = position + BLOCK
            if kind in b"xXgLK":
                body = handle.read(padded(size)) if size <= MAX_EXTENDED else b""
                if len(body) < padded(size):
                    raise ValueError(f"{size:,} bytes of it do not follow")
                if kind == b"L":
                    special[b"path"] = body.split(b"\0")[0]
                elif kind == b"g":
                    shared |= _parse_pax(body[:size])
                elif kind != b"K":  # K: where a link leads
                    special |= _parse_pax(body[:size])
                before += header + body if kind == b"g" else b""
                headers += header + body if kind != b"g" else b""
                position = start + padded(size)
                continue
            extended, special = shared | special, {}
            name, size = extended.get(b"path", name), int(extended.get(b"size", size))
            if size < 0:
                raise ValueError(f"a size of {size}")
        except ValueError as error:
            raise ValueError(f"bad header at byte {position:,}: {error}") from error
        headers += header
        if kind in b"123456":  # links, devices, folders, pipes
            if kind in b"12":
                yield Member(name, start, 0, None, "a link, which holds no bytes of its own", headers, before)
            before = b"" if kind in b"12" else before + headers
            headers, position = b"", start
            continue
        position = start + padded(size)
        if size > MAX_BYTES:
            yield Member(name, start, size, None, f"more than {MAX_BYTES:,} bytes", headers, before)
            headers = before = b""
            handle.seek(position)
            continue
        data = _read_available(handle, size)
        if len(data) < size:
            yield Member(name, start, size, None, f"shard ends inside this member ({len(data)} of {size} bytes)")
            return
        handle.read(position - start - size)
        yield Member(name, start, size, data, None, headers, before)
        headers = before = b""
    if special or not position:
        raise ValueError("it ends before the member of its last header" if special else "zero bytes")


def padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _read_available(handle: BinaryIO, size: int) -> bytes:
    """Up to `size` bytes; fewer when the archive ends early."""
    try:
        return handle.read(size)
    except EOFError:  # compressed
        return b""


def _parse_header(header: bytes) -> tuple[bytes, int, bytes]:
    """Name, size and type of a header block of 512 bytes. Raises ValueError when it is none."""
    if len(header) < BLOCK:
        raise ValueError("the archive ends inside it")
    # The checksum counts its own field as 8 spaces. Adler-32 holds 1 + the sum of all bytes, and is 30 times faster.
    checksum = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
    stored = header[148:156].strip(b" \0")
    if not stored.isdigit() or (int(stored, 8) - checksum) % ADLER:
        raise ValueError("its checksum says it is none")
    kind = header[156:157]
    if kind == b"S":
        raise ValueError("sparse files are not supported")
    field = header[124:136]
    size = int.from_bytes(field[1:]) if field[0] & 0x80 else int(field.strip(b" \0") or b"0", 8)
    if size < 0:
        raise ValueError(f"a size of {size}")
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return name, size, kind


def _parse_pax(body: bytes) -> dict[bytes, bytes]:
    """Records `LENGTH KEY=VALUE\\n` → values by key."""
    records = {}
    while body:
        length = int(body.partition(b" ")[0])
        key, equals, value = body[:length].partition(b" ")[2].partition(b"=")
        if length < 0 or not equals:
            raise ValueError("damaged pax records")
        records[key] = value[:-1]
        body = body[length:]
    return records


def read_image(path: Path, offset: int, size: int) -> bytes:
    """Up to `size` bytes of a shard; fewer when it ends early."""
    with open_regular(path) as plain:
        if plain.read(2) != GZIP:
            plain.seek(offset)
            return plain.read(size)
    handle = _open_compressed(path, stamp_file(path), os.getpid())
    handle.seek(offset)
    return handle.read(size)


@lru_cache(maxsize=1)
def _open_compressed(path: Path, stamp: str, process: int) -> gzip.GzipFile:
    """Kept open, because going on is cheap and every seek backwards decompresses from the start.

    A forked process must not share the position of its parent's file.
    """
    return gzip.GzipFile(path)
