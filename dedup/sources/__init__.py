"""Where images come from. One file a format; each turns SRC into shards, and a shard into records.

SRC is a folder, a tar shard, a pattern that names tar shards (a glob, or braces as webdataset writes them), a table
whose rows name files (CSV, TSV, JSONL, parquet), parquet with the bytes of images, a folder that `datasets` saved,
`hf://org/name`, a table of addresses, or shards elsewhere (`s3://…`, `https://…`). `fetch` brings the last three to
this machine; all else reads files. A folder is read as its image files, however deep, and its tar shards: those at its
top or, if there are none, those below; one with neither as its parquet files. Hidden files and folders, and results of
earlier runs, are passed over.

A shard is the unit of work and of resuming. `list_shards(src, layout)` is cheap and decodes no image;
`read_shard(shard)` is a pure function of the shard; `read_image(...)` fetches one image again from its manifest row,
which says all that is needed: no layout.
"""

import errno
import fcntl
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from dedup.manifest import decode_name

WILDCARDS = frozenset("*?[{")
MAX_BYTES = 1 << 31  # no image within the limits of `dedup.images` needs more; a film that is named .jpg does
FORMATS = ("folder", "webdataset", "table", "parquet", "huggingface")
URLS = "urls"  # the format of a list of addresses; once it is fetched, it is a webdataset
HUB = "hf:"  # what `hf://org/name` begins with once it is a Path
RESULTS = {"run.json", "pairs.parquet"}  # a folder that holds both was written by a run, and holds its thumbnails


class SourceError(OSError):
    """SRC cannot be read at all: what, where, how to mend, in one line."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How SRC is to be read, as far as the user has said so; None: by what SRC is, and by convention."""

    format: str | None = None  # one of FORMATS, or URLS
    root: str | None = None  # absolute: the folder that paths in a table are relative to, and must not leave
    image_column: str | None = None
    caption_column: str | None = None
    id_column: str | None = None  # the key of each row: present and different in all of them
    split: str | None = None  # of a Hugging Face dataset
    subject_column: str | None = None  # of the person that is shown
    url_column: str | None = None  # of addresses, which are downloaded before anything is read


@dataclass(frozen=True, slots=True)
class Transfer:
    """How SRC comes to this machine, if it is elsewhere. Decides nothing but that."""

    download: Path | None = None  # where the images of a list of addresses are kept
    cache: Path | None = None  # where remote shards are kept; None: the user's cache folder
    timeout: float = 10.0  # seconds that a server may say nothing
    retries: int = 1  # after the first time
    threads: int = 64  # addresses that are asked for at once
    private: bool = False  # addresses of a list may lead into this machine or its network
    streaming: bool = False  # of hf://org/name: only the splits that are read, and one copy of them, in the cache


@dataclass(frozen=True, slots=True)
class Shard:
    """One unit of work: a tar file, or a run of files of a folder or of rows of a table."""

    kind: str  # one of FORMATS
    root: str  # `find_root(SRC)`
    name: str | None  # file relative to root: tar, parquet, arrow; None for a folder or table, whose images are files
    members: tuple[str, ...]  # encoded paths relative to root (folder), paths as written (table), else empty
    captions: tuple[str | None, ...]  # of the members, as far as a metadata file names them
    fingerprint: str  # changes when the content may have changed (names, sizes, mtimes)
    keys: tuple[str, ...] = ()  # of the members of a table
    part: tuple[int, int, int] = (0, 0, 0)  # row groups or batches from … to before …, and the number of the first row
    layout: Layout = Layout()  # with the columns that are read
    source: str | None = None  # what the manifest's `source` says; None: what the path says
    subjects: tuple[str | None, ...] = ()  # of the members of a table; never on disk


@dataclass(slots=True)
class Record:
    """One image as it was found. `data` is None when there are no bytes; then `status` and `error` say why."""

    key: str
    offset: int
    size: int
    data: bytes | None
    caption: str | None
    error: str | None = None
    link: bool = False  # a symbolic link: of equal files, the one that holds the bytes is kept
    file: str | None = None  # encoded path relative to root, when the bytes lie in neither the shard nor the file `key`
    status: str = "missing"
    subject: str | None = None  # as it is written: no file of a run may hold it
    json: bytes | None = None  # of a sample of a tar shard, as it stands there


def find_root(src: Path) -> Path:
    """The folder that names of shards are relative to: SRC, or what stands before the file or the first wildcard."""
    if os.access(src, os.F_OK):
        return src if src.is_dir() else src.parent
    first = next((n for n, part in enumerate(src.parts) if WILDCARDS & set(part)), len(src.parts) - 1)
    return Path(*src.parts[:first])


def name_source(src: Path) -> str:
    """What results are named by: the dataset, the table, or the folder."""
    if is_hub(src):
        return src.name
    is_table = src.suffix.lower() in (".csv", ".tsv", ".jsonl", ".parquet") and not src.is_dir()
    return src.stem if is_table else find_root(src.resolve()).name


def is_hub(src: Path) -> bool:
    return src.parts[:1] == (HUB,)


def is_elsewhere(src: Path) -> bool:
    """No path on this machine, but an address: `fetch` brings it here."""
    from dedup.sources import remote

    return is_hub(src) or remote.is_remote(src)


def fetch(src: Path, layout: Layout, transfer: Transfer = Transfer()) -> tuple[Path, Layout]:
    """SRC on this machine, and how it is read there. Raises SourceError.

    What `datasets` must load lies in its cache afterwards, remote shards in ours, and what a list of addresses names in
    `transfer.download`.
    """
    from dedup.sources import hub, huggingface, remote, urls

    if transfer.streaming and not is_hub(src):
        raise SourceError(f"{src}: --streaming is of hf://org/name; this is none")
    if remote.is_remote(src):
        src = remote.fetch(src, transfer)
    if transfer.streaming:
        return hub.stream(src, layout, transfer)
    if is_hub(src) or (layout.format == "huggingface" and not huggingface.is_saved(src)):
        return hub.load(src, layout)
    src = src.resolve()
    if urls.is_list(src, layout):
        return urls.download(src, layout, transfer)
    return src, layout


def find_cache(transfer: Transfer) -> Path:
    """The folder for what is fetched."""
    if transfer.cache is not None:
        return transfer.cache.resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmemorize"


def list_shards(src: Path, layout: Layout = Layout()) -> list[Shard]:
    """Shards of SRC in a fixed order, whatever the order of the directory. Raises SourceError."""
    from dedup.sources import huggingface, parquet, table

    kind = layout.format or detect(src, layout)
    if kind in ("folder", "webdataset", None):
        shards = _list_files_and_tars(src, kind)
        given = [field.name for field in fields(layout) if field.name != "format" and getattr(layout, field.name)]
        if shards and given:
            option = given[0].replace("_", "-")
            raise SourceError(
                f"{src}: --{option} is of tables, parquet and Hugging Face datasets; this is none of them"
            )
        if shards or kind or not any(parquet.is_parquet(name) for name in list_files(src)):
            return shards or _complain(src, "images" if kind == "folder" else "images, tar shards and parquet files")
        kind = "parquet"
    shards = {"table": table, "parquet": parquet, "huggingface": huggingface}[kind].list_shards(src, layout)
    return shards or _complain(src, "rows")


def list_again(out: Path, run: dict[str, Any]) -> list[Shard]:
    """The shards that a finished run saw (its `run.json`). Raises SourceError when SRC is gone or not what it was."""
    src, used = Path(run["src"]), run["layouts"][0]
    layout = Layout(**{each.name: run["options"].get(each.name) for each in fields(Layout)})
    if layout.format == URLS or used["image_column"] is None:  # the options are those of a list that was downloaded
        layout = Layout("webdataset" if layout.format == URLS else layout.format)
    if used["format"] == "huggingface":  # also what `datasets` had to load, with a root of its own
        layout = replace(layout, format="huggingface", root=used["root"])
    try:
        shards = list_shards(src, layout)
    except OSError as error:
        raise SourceError(
            f"{src}, of which {out} was made, cannot be read ({error}): put it back, or run `unmemorize dedup` on it "
            f"where it is now"
        ) from error
    if [shard.fingerprint for shard in shards] != run["source"]:
        again = run.get("origin", src)
        raise SourceError(f"{src} has changed since {out} was made: run `unmemorize dedup {again} -o {out}`")
    return shards


def name_file(shard: Shard) -> Path:
    """One of the files that it is read from, which need not be there."""
    name = shard.name or shard.members[0]
    return Path(shard.root) / (name if shard.kind == "table" else os.fsdecode(decode_name(name)))


def detect(src: Path, layout: Layout) -> str | None:
    """One of FORMATS that need no look at all files below SRC; None for images and tar shards."""
    from dedup.sources import huggingface, parquet, table

    if huggingface.is_saved(src):
        return "huggingface"
    if src.is_file() and parquet.is_parquet(src.name):
        return "parquet" if parquet.holds_images(src, layout) else "table"
    return "table" if src.suffix.lower() in table.READERS and not src.is_dir() else None


def tell_origin(src: Path) -> str:
    """SRC as the user named it: an address, without passwords and signatures, or an absolute path."""
    from dedup.sources import remote

    if is_hub(src):
        return f"hf://{'/'.join(src.parts[1:])}"
    return remote.tell(src) if remote.is_remote(src) else str(src.resolve())


@contextmanager
def hold(lock: Path, what: str) -> Iterator[None]:
    """Nobody else in the meantime: raises SourceError while another process holds it. It goes with the process.

    lock: a file, which is made, or a folder that is there.
    """
    handle = os.open(lock, os.O_RDONLY if lock.is_dir() else os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SourceError(f"{what} is in use by another run: wait for it") from error
        yield
    finally:
        os.close(handle)


def _list_files_and_tars(src: Path, kind: str | None) -> list[Shard]:
    from dedup.sources import folder, webdataset

    root = find_root(src)
    if root != src:
        return webdataset.list_shards(root, webdataset.expand_pattern(src))
    files = list_files(src)
    tars = [name for name in files if webdataset.is_tar(name)]
    tars = [name for name in tars if "/" not in name] or tars
    shards = [] if kind == "webdataset" else folder.list_shards(src, files)
    return shards + ([] if kind == "folder" else webdataset.list_shards(src, [src / name for name in tars]))


def _complain(src: Path, what: str) -> NoReturn:
    raise SourceError(f"{src}: no images found (looked for {what})")


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
    from dedup.sources import folder, huggingface, parquet, table, webdataset

    modules = (folder, webdataset, table, parquet, huggingface)
    return dict(zip(FORMATS, modules, strict=True))[shard.kind].read_shard(shard)


def read_image(src: Path, shard: str | None, offset: int, size: int, key: str) -> bytes:
    """The bytes of one manifest row. Raises SourceError when they are gone or fewer than they were."""
    from dedup.sources import folder, parquet, webdataset

    root = find_root(src)
    try:
        if shard is None:
            data = folder.read_image(root, key)
        elif webdataset.is_tar(shard):
            data = webdataset.read_image(root / shard, offset, size)
        elif parquet.is_parquet(shard):
            data = parquet.read_image(root, shard, offset)
        else:  # an arrow file, or one that a table names
            data = webdataset.read_image(root / os.fsdecode(decode_name(shard)), offset, size)
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
    except (OSError, ValueError):  # the latter of a zero byte
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
