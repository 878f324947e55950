"""Datasets of Hugging Face's `datasets`: a `save_to_disk` folder, or what it has loaded into its cache (`hub`).

Both are arrow streams in splits. The images in them are read as they lie there, undecoded, so a broken one is a row and
no exception. A shard is a run of record batches; the key of a row is what `--id-column` says, else its number in the
split, which is the manifest's `source`. Arrow files are not compressed, so `offset` is the first byte of the image in
the file. An image of which only the path is there (as for an `imagefolder`) is read from its file, if that lies in the
dataset.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dedup.manifest import encode_name
from dedup.sources import Layout, Record, Shard, SourceError, columns, digest_stamps, open_regular, stamp_file
from dedup.sources.folder import find_file
from dedup.sources.parquet import group_rows

if TYPE_CHECKING:
    import pyarrow as pa

INFO, STATE, SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"


def is_saved(src: Path) -> bool:
    """Whether `datasets` wrote this folder: by `save_to_disk`, or as its cache."""
    return (src / SPLITS).is_file() or (src / STATE).is_file() or ((src / INFO).is_file() and bool(_list_cache(src)))


def list_shards(src: Path, layout: Layout) -> list[Shard]:
    """Runs of batches with at least ROWS_PER_SHARD rows. Raises SourceError: split, columns, files that are missing."""
    if not is_saved(src):
        raise SourceError(f"{src}: no dataset that `datasets` has saved ({SPLITS} or {STATE})")
    root = str(Path(layout.root).resolve()) if layout.root else str(src)
    shards = []
    seen: set[str] = set()
    for split, names in _choose_split(src, list_splits(src), layout.split).items():
        start = 0
        for name in names:
            _, stream = open_stream(src / name)
            own = replace(layout, format="huggingface", root=root, split=split)
            chosen = columns.choose(src / name, stream.schema, own)
            sizes: list[int] = []
            for batch in _read_batches(src / name, stream):
                if layout.id_column:
                    values = map(columns.read_scalar, batch.column(layout.id_column))
                    columns.check_ids(src / name, values, start + sum(sizes), layout.id_column, seen)
                sizes.append(len(batch))
            shown = encode_name(os.fsencode(name))
            for part in group_rows(sizes, start):
                stamps = digest_stamps([name, stamp_file(src / name), part, chosen])
                shards.append(Shard("huggingface", str(src), shown, (), (), stamps, (), part, chosen, split))
            start += sum(sizes)
    return shards


def list_splits(src: Path) -> dict[str, list[str]]:
    """Split → its files, relative to SRC, in order."""
    if (src / SPLITS).is_file():
        return {str(split): _list_saved(src, f"{split}/") for split in _read_json(src / SPLITS, "splits")}
    if (src / STATE).is_file():
        split = _read_json(src / STATE, "_split")
        return {str(split or src.name): _list_saved(src, "")}
    files = _list_cache(src)
    splits = _read_json(src / INFO, "splits")
    return {split: [name for name in files if re.search(_cache_name(split), name)] for split in splits}


def _cache_name(split: str) -> str:
    return rf"-{re.escape(split)}(-\d+-of-\d+)?\.arrow$"


def _list_saved(src: Path, prefix: str) -> list[str]:
    path = src / prefix / STATE
    names = [Path(str(entry["filename"])).name for entry in _read_json(path, "_data_files")]
    if gone := [name for name in names if not (src / prefix / name).is_file()]:
        raise SourceError(f"{path.parent}: {len(gone)} of {len(names)} files are missing, the first is {gone[0]}")
    return [prefix + name for name in names]


def _list_cache(src: Path) -> list[str]:
    """Without what `map` and `filter` have left there."""
    return sorted(path.name for path in src.glob("*.arrow") if not path.name.startswith("cache-"))


def _read_json(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path}: cannot be read ({error}): save the dataset again") from error


def _choose_split(src: Path, splits: dict[str, list[str]], split: str | None) -> dict[str, list[str]]:
    if split is not None and split not in splits:
        raise SourceError(f"{src}: has no --split {split}; it has {', '.join(splits)}")
    return splits if split is None else {split: splits[split]}


def open_stream(path: Path) -> tuple["pa.Buffer", "pa.RecordBatchReader"]:
    """The file in memory, and the batches in it; nothing is read from the disk before it is asked for."""
    import pyarrow as pa

    try:
        open_regular(path).close()
        with pa.memory_map(str(path)) as source:
            whole = source.read_buffer()
        stream = pa.ipc.open_stream(whole)
        columns.check_names(stream.schema)
        return whole, stream
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: is no arrow stream ({str(error).partition('\n')[0]})") from error


def _read_batches(path: Path, stream: "pa.RecordBatchReader") -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa

    try:
        for batch in stream:
            batch.validate(full=True)  # places beyond the file would end the process
            yield batch
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise SourceError(f"{path}: ends early or is damaged ({reason}): save the dataset again") from error


def read_shard(shard: Shard) -> Iterator[Record]:
    path = find_file(Path(shard.root), str(shard.name))
    layout, (first, stop, number) = shard.layout, shard.part
    whole, stream = open_stream(path)
    names = [name for name in (layout.caption_column, layout.id_column, layout.subject_column) if name]
    for batch in islice(_read_batches(path, stream), first, stop):
        cells = batch.column(layout.image_column)
        places = _find_bytes(cells, whole, path)
        for row in range(len(batch)):
            values = {name: columns.read_scalar(batch.column(name)[row]) for name in names}
            cell = columns.read_scalar(cells[row])
            yield columns.make_record(shard, str(shard.name), number, places[row], cell, values)
            number += 1


def _find_bytes(cells: "pa.Array", whole: "pa.Buffer", path: Path) -> list[int]:
    """Where in the file the bytes of each image begin."""
    import pyarrow.types as pat

    binary = cells.field("bytes") if pat.is_struct(cells.type) else cells
    _, offsets, data = binary.buffers()
    if data is None or not data.size:  # no row has bytes
        return [0] * len(cells)
    start = data.address - whole.address
    if not 0 <= start <= whole.size or pat.is_binary_view(binary.type):
        raise SourceError(f"{path}: its columns are compressed: save it by `datasets`, whose are not")
    kind = np.int64 if pat.is_large_binary(binary.type) else np.int32
    places = np.frombuffer(offsets, kind, len(binary), binary.offset * np.dtype(kind).itemsize)
    return (places.astype(np.int64) + start).tolist()
