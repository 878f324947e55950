"""`hf://org/name[/config]`: loaded by `datasets` into its cache, or streamed into ours.

`load` lets `datasets` have its way: it downloads every split, and keeps the files beside an arrow copy of them.
`stream` reads the splits that are wanted batch by batch, images undecoded, and writes each as `save_to_disk` does: one
copy, nothing of other splits, in files of ROWS_PER_FILE rows. A file that is complete is not asked for again: the same
command goes on after it, as long as the dataset has the revision of before. An image that is a file of its own on the
hub is fetched; one that cannot be is a row without bytes, and is counted.
"""

import hashlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dedup.manifest import read_json, write_atomic, write_json
from dedup.sources import HUB, Layout, SourceError, Transfer, find_cache, hold
from dedup.sources.huggingface import SPLITS, STATE

if TYPE_CHECKING:
    import datasets

ROWS_PER_FILE = 1_000
ROWS_HELD = 32  # of a record batch
FILES = "hf://datasets/"  # what paths on the hub begin with; others are not followed
PLACE = ".place.json"  # of a split that is on its way: revision, rows, and where `datasets` stands


@contextmanager
def _explained(shown: str) -> Iterator[None]:
    """Whatever the hub, the network, or any format that `datasets` reads raises, as one line."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise SourceError(f"{shown}: `datasets` cannot load it ({type(error).__name__}: {reason})") from error


def _split_name(src: Path) -> tuple[str, str | None]:
    """Name and config of the dataset."""
    parts = src.parts[1:]
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def load(src: Path, layout: Layout) -> tuple[Path, Layout]:
    """Let `datasets` load `hf://org/name[/config]`, or a folder: its cache, and where paths in it may lead."""
    import datasets

    hub = src.parts[:1] == (HUB,)
    name, config = _split_name(src) if hub else (str(src.resolve()), None)
    if not hub and not src.is_dir():
        raise SourceError(f"{src}: no such folder, and no hf://org/name")
    with _explained(f"hf://{'/'.join(src.parts[1:])}" if hub else name):
        builder = datasets.load_dataset_builder(name, config)
        builder.download_and_prepare()
    root = layout.root or (str(datasets.config.HF_CACHE_HOME) if hub else name)
    return Path(builder.cache_dir).resolve(), replace(layout, format="huggingface", root=root)


def stream(src: Path, layout: Layout, transfer: Transfer) -> tuple[Path, Layout]:
    """The split that the layout names, or all of them, as a folder that `datasets` has saved. Raises SourceError."""
    import datasets

    name, config = _split_name(src)
    shown = f"hf://{'/'.join(src.parts[1:])}"
    wanted = hashlib.sha256(f"{shown} {layout.split}".encode()).hexdigest()[:16]
    folder = find_cache(transfer) / wanted / src.name
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder / ".lock", str(folder)), _explained(shown):
        builder = datasets.load_dataset_builder(name, config)
        splits = builder.as_streaming_dataset()
        if layout.split is not None and layout.split not in splits:
            raise SourceError(f"{shown}: has no --split {layout.split}; it has {', '.join(splits)}")
        chosen = [str(split) for split in splits] if layout.split is None else [layout.split]
        with tqdm(desc="stream", unit=" images", file=sys.stderr, disable=None) as bar:
            lost = sum(_stream_split(shown, splits[split], folder / split, str(builder.hash), bar) for split in chosen)
        write_json(folder / SPLITS, {"splits": chosen})
    if lost:
        tqdm.write(f"{shown}: {lost:,} images could not be fetched.", file=sys.stderr)
    return folder, replace(layout, format="huggingface", root=str(folder))


def _stream_split(shown: str, rows: "datasets.IterableDataset", folder: Path, revision: str, bar: tqdm) -> int:
    """Write what is missing of a split; returns how many of its images could not be fetched."""
    import datasets

    place: dict[str, Any] = read_json(folder / PLACE) if (folder / PLACE).is_file() else {}
    if place.get("revision") != revision:
        shutil.rmtree(folder, ignore_errors=True)
        place = {"revision": revision, "files": 0, "rows": 0, "lost": 0, "state": None}
    bar.update(place["rows"])
    if (folder / STATE).is_file():
        return place["lost"]
    folder.mkdir(parents=True, exist_ok=True)
    features = rows.features
    if features is None:
        raise SourceError(
            f"{shown}: `datasets` does not know its columns before it has read them: load it without --streaming"
        )
    undecoded = rows.decode(False)
    if place["state"] is not None:
        undecoded.load_state_dict(place["state"])
    for examples in batched(undecoded, ROWS_PER_FILE):
        lost = sum(_fetch_images(example, features) for example in examples)
        _write_file(folder / _name(place["files"]), examples, features)
        told = {"files": place["files"] + 1, "rows": place["rows"] + len(examples), "lost": place["lost"] + lost}
        place |= told | {"state": undecoded.state_dict()}
        write_json(folder / PLACE, place)
        bar.update(len(examples))
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    names = [{"filename": _name(number)} for number in range(place["files"])]
    state: dict[str, Any] = {"_data_files": names, "_fingerprint": revision[:16], "_format_columns": None}
    state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": folder.name}
    write_json(folder / STATE, state)
    return place["lost"]


def _name(number: int) -> str:
    return f"data-{number:05d}.arrow"


def _write_file(path: Path, examples: Sequence[Mapping[str, Any]], features: "datasets.Features") -> None:
    import pyarrow as pa

    schema = features.arrow_schema

    def save(temporary: Path) -> None:
        with temporary.open("wb") as out, pa.ipc.new_stream(out, schema) as writer:
            for some in batched(examples, ROWS_HELD):
                writer.write_batch(pa.RecordBatch.from_pylist(list(some), schema))

    write_atomic(path, save)


def _fetch_images(example: dict[str, Any], features: "datasets.Features") -> int:
    """Put the bytes of images that are files on the hub into their row; how many could not be had."""
    import datasets
    import pyarrow as pa

    lost = 0
    for name, kind in features.items():
        cell = example[name]
        if isinstance(kind, datasets.Image) and cell and cell["bytes"] is None and FILES in (cell["path"] or ""):
            try:
                one = kind.embed_storage(pa.array([cell], kind.pa_type), local_files=False)
                example[name] = one[0].as_py()
            except Exception as error:  # of the hub, of the network
                lost += 1
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                tqdm.write(f"{cell['path']}: {reason}", file=sys.stderr)
    return lost
