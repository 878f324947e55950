"""SRC at an address (`https://`, `s3://`, `gs://`, `file://` …): brought here by fsspec, then read as what it is.

One shard or table, a pattern (braces, or a glob where the filesystem can list), or a folder. The files lie afterwards
in a folder of the cache that is named by SRC, under their own names, so all that comes later knows files only. Each is
asked about on every run: one that is as it was (size, ETag, time) is not fetched again, one that was interrupted goes
on where it stopped if the server can do that, one with fewer bytes than it should have is none. Beside a shard
`00000.tar` the list `00000.parquet` comes along, as img2dataset leaves it.
"""

import hashlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from braceexpand import braceexpand
from tqdm import tqdm

from dedup.manifest import read_json, write_json
from dedup.sources import HUB, WILDCARDS, SourceError, Transfer, find_cache, hold, parquet, table, webdataset

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:")
WEB = ("http://", "https://")
ABSENT = (403, 404, 410)  # what a web server says of a file that is not there
BLOCK = 1 << 23  # bytes that are asked for at a time
AT_ONCE = 4  # files
SUFFIXES = (*webdataset.TAR_SUFFIXES, *table.READERS)
STAMPS = (  # what filesystems call what changes with a file
    *("size", "ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "last_modified", "updated"),
    *("mtime", "created"),
)


def is_remote(src: Path) -> bool:
    """`https://host/a.tar` is a Path with one slash. A folder that is really called `https:` is none."""
    first = src.parts[0] if src.parts else ""
    return SCHEME.fullmatch(first) is not None and first != HUB and not os.path.lexists(first)


def read_address(src: Path) -> str:
    """The address that became a Path."""
    scheme, *parts = src.parts
    return f"{scheme}//{'/' if scheme == 'file:' else ''}{'/'.join(parts)}"


def tell(src: Path) -> str:
    """The address without a password, and without a query, which may hold a signature."""
    return _redact(_split_query(read_address(src))[0])


def _redact(address: str) -> str:
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def fetch(src: Path, transfer: Transfer) -> Path:
    """SRC as files in the cache: the same pattern there, one file, or a folder. Raises SourceError."""
    shown = tell(src)
    address, query = _split_query(read_address(src))
    system = _open_system(address, shown, transfer)
    with _explained(shown):
        base, pattern = _split_pattern(address)
        names = _list(system, base, pattern)
    if not names:
        raise SourceError(f"{shown}: nothing there that ends in {', '.join(SUFFIXES)}")
    folder = find_cache(transfer) / hashlib.sha256(shown.encode()).hexdigest()[:16] / _name(base)
    if bad := [name for name in names if {"", ".", ".."} & set(name.split("/")) or "\0" in name]:
        raise SourceError(f"{shown}: names a file {bad[0]!r}, which would lie outside of {folder}")
    tars = [name for name in names if webdataset.is_tar(name)]
    lists = [webdataset.list_beside(Path(name)).as_posix() for name in tars]
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder / ".lock", str(folder)):
        kept = _bring_all(system, base, query, folder, names, lists, transfer)
        _forget(folder, kept)
    if tars and pattern:
        return folder / pattern
    return folder / names[0] if pattern and len(names) == 1 else folder


def _split_query(address: str) -> tuple[str, str]:
    """A question mark begins a query at a web server; elsewhere it is a wildcard."""
    plain, mark, query = address.partition("?") if address.startswith(WEB) else (address, "", "")
    return plain, mark + query


def _split_pattern(address: str) -> tuple[str, str | None]:
    """The folder, and what is wanted of it: a pattern, one file, or None for all."""
    scheme, _, rest = address.partition("://")
    parts = rest.split("/")
    first = next((number for number, part in enumerate(parts) if WILDCARDS & set(part)), None)
    if first is None:
        if not address.lower().endswith(SUFFIXES):
            return address, None
        first = len(parts) - 1
    return f"{scheme}://{'/'.join(parts[:first])}", "/".join(parts[first:])


def _list(system: "AbstractFileSystem", base: str, pattern: str | None) -> list[str]:
    """Names relative to the folder: braces in the order written, what a glob finds in sorted order."""
    root = system._strip_protocol(base).rstrip("/") + "/"
    names: list[str] = []
    for wanted in braceexpand(pattern, escape=False) if pattern else ["*"]:
        if WILDCARDS & set(wanted):
            found = sorted(path for path in system.glob(root + wanted) if path.startswith(root))
            names += [path[len(root) :] for path in found if path.lower().endswith(SUFFIXES)]
        else:
            names.append(wanted)
    names = list(dict.fromkeys(names))
    tars = [name for name in names if webdataset.is_tar(name)]
    return tars or (names if pattern else [name for name in names if name.endswith(parquet.SUFFIX)])


def _name(base: str) -> str:
    """What results are named by: the folder, or the server."""
    parts = urlsplit(base)
    return parts.path.rstrip("/").rpartition("/")[2] or parts.hostname or "files"


def _open_system(address: str, shown: str, transfer: Transfer) -> "AbstractFileSystem":
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    try:
        if address.startswith(WEB):
            from aiohttp import ClientTimeout

            limits = ClientTimeout(total=None, sock_connect=transfer.timeout, sock_read=transfer.timeout)
            options = {"client_kwargs": {"timeout": limits}, "headers": {"Accept-Encoding": "identity"}}
        system = url_to_fs(address, **options)[0]
    except ImportError as error:
        package = error.name or getattr(error.__cause__, "name", None) or "fsspec"
        scheme = address.partition(":")[0]
        raise SourceError(f"{shown}: {scheme}:// needs a package that is missing: pip install {package}") from error
    except ValueError as error:  # an unknown protocol
        raise SourceError(f"{shown}: {error}") from error
    system.invalidate_cache()
    return system


@contextmanager
def _explained(shown: str) -> Iterator[None]:
    """Whatever a filesystem raises, as one line."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:  # of the network, of every service
        cause = error.__cause__ or error  # fsspec calls "not found" whatever a web server says
        reason = re.sub(r",? ?url=\S+", "", " ".join(str(cause).split()))[:200]  # it may hold a password
        raise SourceError(f"{shown}: cannot be fetched ({type(cause).__name__}: {reason})") from error


def _bring_all(
    system: "AbstractFileSystem",
    base: str,
    query: str,
    folder: Path,
    names: list[str],
    lists: list[str],
    transfer: Transfer,
) -> set[Path]:
    """All files, several at once; returns those that are there: a list beside a shard may not be."""
    stop = threading.Event()
    jobs = dict.fromkeys(lists, True) | dict.fromkeys(names, False)
    with tqdm(desc="fetch", unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar:

        def bring(name: str) -> bool:
            address = system._strip_protocol(f"{base}/{name}{query}")
            with _explained(f"{_redact(base)}/{name}"):
                return _bring(system, address, folder / name, transfer.retries, stop, bar, optional=jobs[name])

        with ThreadPoolExecutor(AT_ONCE) as threads:
            try:
                there = list(threads.map(bring, jobs))
            except BaseException:
                stop.set()
                threads.shutdown(cancel_futures=True)
                raise
    return {folder / name for name, is_there in zip(jobs, there, strict=True) if is_there}


def _bring(
    system: "AbstractFileSystem",
    address: str,
    path: Path,
    retries: int,
    stop: threading.Event,
    bar: tqdm,
    *,
    optional: bool,
) -> bool:
    """One file; False: it is not there, and need not be. Raises whatever the filesystem raises."""
    try:
        info = system.info(address)
    except FileNotFoundError as error:
        if optional and getattr(error.__cause__, "status", 404) in ABSENT:
            return False
        raise
    stamp = {name: str(info[name]) for name in STAMPS if info.get(name) is not None}
    state, part = path.with_name(f".{path.name}.json"), path.with_name(f".{path.name}.part")
    if not state.exists() or read_json(state) != stamp:  # another file than the one of which we have some
        path.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
        write_json(state, stamp)
    if path.exists():
        return True
    for attempt in range(retries + 1):
        try:
            _copy(system, address, part, info.get("size"), stop, bar)
            break
        except Exception:
            if attempt == retries or stop.is_set():
                raise
    system.invalidate_cache()
    now = system.info(address)
    if {name: str(now[name]) for name in STAMPS if now.get(name) is not None} != stamp:
        part.unlink()
        raise OSError("it was changed meanwhile")
    part.replace(path)
    return True


def _copy(
    system: "AbstractFileSystem", address: str, part: Path, size: int | None, stop: threading.Event, bar: tqdm
) -> None:
    """Add to `part` what is missing of `size` bytes (None: nobody knows). Raises OSError when it is not all."""
    done = part.stat().st_size if part.exists() else 0
    web = address.startswith(WEB)
    with part.open("ab") as out:

        def write(remote: Any) -> None:
            while piece := remote.read(BLOCK):
                out.write(piece)
                bar.update(len(piece))
                if stop.is_set():
                    raise OSError("stopped")

        if done and done != size:
            try:
                with system.open(address, "rb", block_size=BLOCK) as remote:
                    remote.seek(done)
                    write(remote)
            except ValueError:  # a web server that cannot begin in the middle
                out.truncate(0)
                done = 0
        if not done:
            with system.open(address, "rb", block_size=0 if web else BLOCK) as remote:  # 0: one request for all
                write(remote)
    got = part.stat().st_size
    if size is not None and got != size:
        if got > size:
            part.unlink()
        raise OSError(f"ends after {got:,} of {size:,} bytes")


def _forget(folder: Path, kept: set[Path]) -> None:
    """Remove what an earlier listing named and this one does not: a folder is read as it is."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith(".") and path not in kept:
            path.unlink()
