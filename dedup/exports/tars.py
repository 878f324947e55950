"""webdataset shards: the headers and bytes of all members of the kept samples, as they stand in the source.

New is only what a policy asks for: another text in `KEY.txt` and in the `caption` of `KEY.json`, and the members
`KEY.captions.json` and `KEY.weight.json`. A sample with several images stays whole while one of them is kept. A shard
that is compressed stays so. The parquet file that img2dataset writes beside a shard is filtered with it.
"""

import gzip
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl

from dedup.exports import check_bytes, place, read_changes, write_file
from dedup.exports.tables import filter_listed
from dedup.sources import MAX_BYTES, Shard, SourceError, json_caption
from dedup.sources.webdataset import (
    BLOCK,
    BUFFER,
    GZIP,
    Member,
    list_beside,
    open_archive,
    read_members,
    split_key,
)

RECORD = 20 * BLOCK  # an archive ends on a multiple of it (POSIX, "blocking factor")
LEVEL = 6  # of gzip: its own default

type Changes = Mapping[str, Any]
type Sample = list[tuple[str | None, Member]]  # extension, as the reader has it; None: of no sample


def same(src: Path, shards: Sequence[Shard], rows: pl.DataFrame, dest: Path) -> None:
    (shard,) = shards
    source, target = Path(shard.root) / str(shard.name), place(dest, str(shard.name))
    rows = rows.with_columns(change=pl.Series(read_changes(rows), dtype=pl.Object))
    damaged = not rows.is_empty() and rows["status"][-1] != "ok"
    taken = rows.filter("take")
    if taken.is_empty():  # webdataset takes an archive without samples for an error
        return
    if (beside := list_beside(source)).is_file():
        filter_listed(beside, list_beside(target), dict(zip(taken["key"], taken["change"], strict=True)), rows)
    wanted = {row["offset"]: (row["sha256"], row["change"]) for row in taken.iter_rows(named=True)}
    with source.open("rb") as handle:
        compressed = handle.read(2) == GZIP

    def write(temporary: Path) -> None:
        with temporary.open("wb", BUFFER) as plain:
            if compressed:
                with gzip.GzipFile("", "wb", LEVEL, plain, mtime=0) as packed:
                    write_archive(packed, _read_blocks(source, wanted, damaged=damaged))
            else:
                write_archive(plain, _read_blocks(source, wanted, damaged=damaged))

    write_file(target, write)


def write_archive(out: BinaryIO | gzip.GzipFile, blocks: Iterator[bytes]) -> None:
    """The members, and what ends an archive."""
    for block in blocks:
        out.write(block)
    out.write(bytes(2 * BLOCK))
    out.write(bytes(-out.tell() % RECORD))


def make_member(name: str, data: bytes, mtime: int = 0) -> bytes:
    """A file of mode 0644 and owner 0. Equal arguments give equal bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), mtime
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + data + bytes(-len(data) % BLOCK)


def _read_blocks(source: Path, wanted: Mapping[int, tuple[str, Changes]], *, damaged: bool) -> Iterator[bytes]:
    found = 0
    for sample in _read_samples(source, damaged=damaged):
        chosen = [(member, *wanted[member.offset]) for _, member in sample if member.offset in wanted]
        for member, sha256, _ in chosen:
            check_bytes(member.data or b"", sha256, f"{source}: {member.name.decode(errors='replace')}")
        found += len(chosen)
        change = chosen[0][2] if chosen else {}
        blocks: list[bytes] = []  # one piece a sample: writing many small ones takes longer than all the rest
        for extension, member in sample:
            blocks.append(member.before)
            if not chosen and extension is not None:
                continue
            if (text := _change_caption(extension, member, change)) is not None:
                blocks.append(_replace(member, member.name, text))
            elif member.data is not None:
                blocks += (member.headers, member.data, bytes(-member.size % BLOCK))
            else:
                yield b"".join(blocks)
                blocks = []
                yield from _copy_hollow(source, member)
        blocks += _add_members(sample, change) if change else ()
        yield b"".join(blocks)
    if found < len(wanted):
        raise SourceError(f"{source}: {len(wanted) - found} images are gone: run `unmemorize dedup` again")


def _read_samples(source: Path, *, damaged: bool) -> Iterator[Sample]:
    """Runs of members with one key. damaged: the manifest says that the archive cannot be read to its end."""
    current, sample = b"", list[tuple[str | None, Member]]()
    try:
        for member in read_members(source):
            key, extension = split_key(member.name)
            hidden = key.endswith(b"/") or not key
            if key != current and not hidden:
                yield sample
                current, sample = key, []
            sample.append((None if hidden else extension.decode("utf-8", "replace").lower(), member))
    except SourceError:
        if not damaged:
            raise
    yield sample


def _copy_hollow(source: Path, member: Member) -> Iterator[bytes]:
    """What has no data in memory: a link, or what is too large to be held. Of what ends early nothing is copied."""
    if not member.size:
        yield member.headers
    elif member.size > MAX_BYTES:
        yield member.headers
        with open_archive(source) as handle:
            handle.seek(member.offset)
            for left in range(member.size, 0, -BUFFER):
                piece = handle.read(min(left, BUFFER))
                if len(piece) < min(left, BUFFER):
                    raise SourceError(f"{source}: ends inside {member.name.decode(errors='replace')}")
                yield piece
        yield bytes(-member.size % BLOCK)


def _change_caption(extension: str | None, member: Member, change: Changes) -> bytes | None:
    """What the member says instead; None where it says no caption."""
    if "caption" not in change:
        return None
    if extension == ".txt":
        return change["caption"].encode()
    if extension == ".json" and json_caption(member.data or b"") is not None:
        return json.dumps({**json.loads(member.data or b""), "caption": change["caption"]}).encode()
    return None


def _add_members(sample: Sample, change: Changes) -> Iterator[bytes]:
    first = next(member for extension, member in sample if extension is not None)
    stem, _ = split_key(first.name)
    if "caption" in change and all(_change_caption(*pair, change) is None for pair in sample):
        yield _replace(first, stem + b".txt", change["caption"].encode())
    for name in ("captions", "weight"):
        if name in change:
            yield _replace(first, stem + f".{name}.json".encode(), json.dumps(change[name]).encode())


def _replace(like: Member, name: bytes, data: bytes) -> bytes:
    """A member of the same time as another one."""
    time = tarfile.TarInfo.frombuf(like.headers[-BLOCK:], "utf-8", "surrogateescape").mtime
    return make_member(name.decode("utf-8", "surrogateescape"), data, int(time))
