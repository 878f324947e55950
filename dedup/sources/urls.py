"""A table whose rows name addresses (http, https): downloaded by img2dataset into a folder, then read as a webdataset.

img2dataset is a subprocess (`dedup.download`), and no part of ours. Its shards hold the bytes as they came, the
caption, and the other columns of the list; one that is complete is never fetched again. Images arrive in any order, so
each shard is put into that of the list once it is complete: the same answers give the same bytes, and the key of a row
is its number in the list. A row that cannot be had is in the parquet file beside its shard, with the reason. In the
folder, `.urls/` holds the list as img2dataset gets it, and its log.
"""

import io
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
from tqdm import tqdm

from dedup.download import HEARTBEAT, PATIENCE, PRIVATE
from dedup.manifest import write_atomic, write_parquet, write_text
from dedup.sources import URLS, Layout, SourceError, Transfer, columns, hold, parquet, table, webdataset

ROWS_PER_SHARD = 1_000  # a power of ten: then keys are numbers of rows
DIGITS = 5  # of the name of a shard
WORK = ".urls"
STARTING = 300.0  # seconds that img2dataset may need before its first request
PROCESSES = 4  # at most; each waits for its threads, which wait for servers
ROBOTS = "img2dataset"  # a server may address it in X-Robots-Tag, besides everybody
# What img2dataset writes itself; a column of the list with such a name goes along as `listed_…`.
RESERVED = frozenset(
    [
        *("key", "caption", "url", "status", "error_message", "width", "height", "original_width", "original_height"),
        *("exif", "md5", "sha256", "sha512", "txt", "jpg", "json"),
    ]
)
LOST = "img2dataset lost this row: its log says why"


def is_list(src: Path, layout: Layout) -> bool:
    """Whether SRC is such a table: because the layout says so, or by its columns. Raises SourceError."""
    wanted = layout.format == URLS or layout.url_column is not None
    if not src.is_file() or src.suffix.lower() not in table.READERS:
        if wanted:
            raise SourceError(f"{src}: a list of addresses is one file that ends in {', '.join(table.READERS)}")
        return False
    if wanted or layout.format or layout.image_column:
        return wanted
    if parquet.is_parquet(src.name) and parquet.holds_images(src, layout):
        return False
    with table.explained(src):
        names, _ = table.READERS[src.suffix.lower()](src)
    return columns.find(names, columns.PATHS) is None and columns.find(names, columns.URLS) is not None


def download(src: Path, layout: Layout, transfer: Transfer) -> tuple[Path, Layout]:
    """What the list names, in `transfer.download`, and how that is read. Raises SourceError, ModuleNotFoundError."""
    if transfer.download is None:
        raise SourceError(f"{src}: holds addresses: `unmemorize dedup` downloads them, here they must be files")
    folder = transfer.download.resolve()
    listed = read_list(src, layout)
    if listed.is_empty():
        raise SourceError(f"{src}: no addresses: it has no rows")
    parts = list(listed.iter_slices(ROWS_PER_SHARD))
    with _claim(folder, src, listed):
        missing = [number for number in range(len(parts)) if not _is_complete(folder, number)]
        for number in missing:
            _mark(folder, number).unlink(missing_ok=True)
        if missing:
            _run(folder, listed, missing, transfer)
        for number, part in enumerate(parts):
            settle(folder, number, part)
    return folder, Layout("webdataset")


def read_list(src: Path, layout: Layout) -> pl.DataFrame:
    """All rows: url, caption, and the other columns, each a number, a truth value or a text. Raises SourceError."""
    with table.explained(src):
        names, read = table.READERS[src.suffix.lower()](src)
        rows = list(read(list(dict.fromkeys(names))))
    columns.require(src, names, layout)
    for option in ("image_column", "id_column", "subject_column", "split", "root"):
        if getattr(layout, option) is not None:
            raise SourceError(f"{src}: --{option.replace('_', '-')} is not of a list of addresses (the key is the row)")
    url = layout.url_column or columns.find(names, columns.URLS)
    if url is None:
        raise SourceError(f"{src}: no column of addresses: name it by --url-column; it has {columns.tell(names)}")
    caption = layout.caption_column or columns.find([name for name in names if name != url], columns.CAPTIONS)
    told = caption or "no column (--caption-column names one)"
    tqdm.write(f"Columns: addresses in {url}, captions in {told}; key of a row: its number.", file=sys.stderr)
    names = list(dict.fromkeys(names))
    values = dict(zip(names, zip(*rows, strict=True), strict=False))  # none where there are no rows
    listed = {
        "url": pl.Series([columns.read_text(value) or "" for value in values.get(url, ())], dtype=pl.String),
        "caption": pl.Series(map(columns.read_text, values.get(str(caption), ())), dtype=pl.String),
    }
    if caption is None:
        listed["caption"] = pl.Series([None] * len(listed["url"]), dtype=pl.String)
    for name in names:
        if name not in (url, caption):
            shown = name
            while shown.lower() in RESERVED or shown in listed:
                shown = f"listed_{shown}"
            listed[shown] = _make_series(values.get(name, ()))
    return pl.DataFrame(listed)


def _make_series(values: Sequence[Any]) -> pl.Series:
    """As they are where all are numbers, truth values or texts; else as text, what is no text as JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds and kinds <= {int, float} and all(isinstance(value, float) or abs(value or 0) < 2**63 for value in values):
        finite = [value if value is None or math.isfinite(value) else None for value in values]  # JSON has no others
        return pl.Series(finite, dtype=pl.Int64 if kinds == {int} else pl.Float64, strict=False)
    if kinds == {bool}:
        return pl.Series(values, dtype=pl.Boolean)
    texts = (v if v is None or isinstance(v, str) else json.dumps(v, default=str, ensure_ascii=False) for v in values)
    return pl.Series([t and t.encode("utf-8", "replace").decode() for t in texts], dtype=pl.String)


@contextmanager
def _claim(folder: Path, src: Path, listed: pl.DataFrame) -> Iterator[None]:
    """One download at a time, of one list, into a folder of its own. Raises SourceError."""
    work = folder / WORK
    if folder.exists() and not (work / "list.parquet").exists() and any(path.name != WORK for path in folder.iterdir()):
        raise SourceError(f"{folder} holds something else than a download: choose another --download")
    work.mkdir(parents=True, exist_ok=True)
    with hold(work / "lock", str(folder)):
        recorded = work / "list.parquet"
        if recorded.exists() and not pl.read_parquet(recorded).equals(listed):
            raise SourceError(f"{folder} holds the download of another list than {src}: choose another --download")
        if not recorded.exists():
            write_parquet(recorded, listed)
        yield


def _is_complete(folder: Path, number: int) -> bool:
    return (folder / f"{number:0{DIGITS}d}_stats.json").is_file()


def _mark(folder: Path, number: int) -> Path:
    """There once the shard is in order."""
    return folder / WORK / f"{number:0{DIGITS}d}.settled"


def _run(folder: Path, listed: pl.DataFrame, missing: list[int], transfer: Transfer) -> None:
    """img2dataset, until all shards are there. Raises SourceError; whatever it started has ended by then."""
    if find_spec("img2dataset") is None:
        raise ModuleNotFoundError(name="img2dataset")
    log, heartbeat = folder / WORK / "log.txt", folder / WORK / "heartbeat"
    heartbeat.touch()
    allowed = STARTING + PATIENCE * transfer.timeout
    command = [sys.executable, "-P", "-m", "dedup.download", json.dumps(_choose(folder, listed, missing, transfer))]
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", HEARTBEAT: str(heartbeat)}
    environment.pop(PRIVATE, None)
    environment |= {PRIVATE: "1"} if transfer.private else {}
    problem = None
    with (
        log.open("wb") as lines,
        tqdm(desc="download", unit=" images", total=len(listed), file=sys.stderr, disable=None) as bar,
    ):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=lines, stderr=lines, env=environment, start_new_session=True
        )
        try:
            while process.poll() is None and problem is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                left = sum(not _is_complete(folder, number) for number in missing)
                bar.update(max(0, len(listed) - left * ROWS_PER_SHARD - bar.n))
                if time.time() - heartbeat.stat().st_mtime > allowed:
                    problem = f"has done nothing for {allowed:.0f} s"
        finally:  # also what it started, which would go on writing beside the next run
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    left = sum(not _is_complete(folder, number) for number in missing)
    if problem is None and process.returncode:
        problem = f"ended with code {process.returncode}"
    if problem is None and left:
        problem = f"left {left} of {len(missing)} shards undone"
    if problem is not None:
        said = log.read_text(errors="replace").strip().rpartition("\n")[2][:200]
        raise SourceError(f"{folder}: img2dataset {problem} ({said}): see {log}; the same command goes on")


def _choose(folder: Path, listed: pl.DataFrame, missing: list[int], transfer: Transfer) -> dict[str, Any]:
    """The arguments of `img2dataset.download`."""
    processes = min(PROCESSES, os.cpu_count() or 1, len(missing))
    return {
        "url_list": str(folder / WORK / "list.parquet"),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": [name for name in listed.columns if name not in ("url", "caption")] or None,
        "output_folder": str(folder),
        "output_format": "webdataset",
        "number_sample_per_shard": ROWS_PER_SHARD,
        "oom_shard_count": DIGITS,
        "resize_mode": "no",
        "disable_all_reencoding": True,
        "processes_count": processes,
        "thread_count": max(1, transfer.threads // processes),
        "timeout": transfer.timeout,
        "retries": transfer.retries,
        "incremental_mode": "incremental",
        "user_agent_token": ROBOTS,
        "enable_wandb": False,
    }


def settle(folder: Path, number: int, listed: pl.DataFrame) -> None:
    """Put a complete shard, and the list beside it, into the order of `listed`. Done already → nothing."""
    if _mark(folder, number).exists():
        return
    name = f"{number:0{DIGITS}d}"
    digits = DIGITS + round(math.log10(ROWS_PER_SHARD))
    keys = [f"{number * ROWS_PER_SHARD + row:0{digits}d}" for row in range(len(listed))]
    captions = dict(zip(keys, listed["caption"], strict=True))
    beside = folder / f"{name}.parquet"
    arrived = pl.read_parquet(beside)
    more = [column for column in arrived.columns if column not in listed.columns]
    told = listed.with_columns(key=pl.Series(keys)).join(
        arrived.select(more).unique("key", keep="last"), on="key", how="left", maintain_order="left"
    )
    lost = pl.col("status").is_null()
    told = told.with_columns(
        status=pl.when(lost).then(pl.lit("failed_to_download")).otherwise("status"),
        error_message=pl.when(lost).then(pl.lit(LOST)).otherwise(pl.col("error_message").str.replace_all(r"\s+", " ")),
    )
    write_parquet(beside, told)
    archive = folder / f"{name}.tar"
    write_atomic(archive, lambda temporary: _sort_members(archive, temporary, captions))
    write_text(_mark(folder, number), "")


def _sort_members(archive: Path, target: Path, captions: dict[str, str | None]) -> None:
    """The members by key, without the time of their arrival, and without the empty text of a caption that is none."""
    found = [(member.name.decode(), member.offset, member.size) for member in webdataset.read_members(archive)]
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as sorted_:
        for member, offset, size in sorted(found):
            key, _, extension = member.partition(".")
            if extension != "txt" or captions[key] is not None:
                info = tarfile.TarInfo(member)
                info.size = size
                sorted_.addfile(info, io.BytesIO(webdataset.read_image(archive, offset, size)))
