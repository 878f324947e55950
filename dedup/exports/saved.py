"""Datasets of Hugging Face's `datasets`: `select` what is kept of each split, and `save_to_disk`.

A `DatasetDict` stays one, its cache becomes one; images are never decoded. Images of which the dataset holds only the
path are put into it, which is what `datasets` does on saving. What was saved is read again, and its digests are
compared.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dedup.exports import check_bytes, check_free, read_changes
from dedup.hashing import digest
from dedup.sources import Shard, SourceError, columns
from dedup.sources.huggingface import SPLITS, STATE, list_splits

if TYPE_CHECKING:
    import datasets

PARTIAL = ".saving"
HELD = 64  # rows in memory at a time


def same(src: Path, shards: Sequence[Shard], rows: pl.DataFrame, dest: Path) -> None:
    """All splits of the run. Starts anew after an interruption."""
    import datasets

    partial = dest / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    files = list_splits(src)
    layouts = {str(shard.source): shard.layout for shard in shards}
    with _quiet():
        chosen = {}
        for split, layout in layouts.items():
            whole = _load(src, split, files[split])
            chosen[split] = _select(src, whole, rows.filter(source=split), layout.caption_column)
        counts = {split: max(1, min(len(files[split]), len(part))) for split, part in chosen.items()}
        if (src / STATE).is_file():
            ((split, one),) = chosen.items()
            one.save_to_disk(partial, num_shards=counts[split])
        else:
            datasets.DatasetDict(chosen).save_to_disk(partial, num_shards=counts)
        for split, layout in layouts.items():
            path = partial if (src / STATE).is_file() else partial / split
            _check(
                datasets.load_from_disk(path), rows.filter(source=split), str(layout.image_column), f"{src}: {split}"
            )
    for path in sorted(partial.iterdir(), key=lambda path: path.name in (SPLITS, STATE)):
        path.replace(dest / path.name)
    partial.rmdir()


@contextmanager
def _quiet() -> Iterator[None]:
    import datasets

    before = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()


def _load(src: Path, split: str, files: Sequence[str]) -> "datasets.Dataset":
    import datasets

    if (src / STATE).is_file():
        return datasets.load_from_disk(src)
    if (src / SPLITS).is_file():
        return datasets.load_from_disk(src / split)
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(src / name)) for name in files])


def _select(src: Path, whole: "datasets.Dataset", rows: pl.DataFrame, caption: str | None) -> "datasets.Dataset":
    """The rows that are taken, changed. Equal exports have equal fingerprints, so equal bytes."""
    import datasets

    if len(whole) != len(rows):
        raise SourceError(f"{src}: has {len(whole)} rows, not {len(rows)}: run `unmemorize dedup` again")
    changes = read_changes(rows)
    order = whole.column_names
    mark = digest("".join(rows.filter("take")["sha256"]).encode())[:16]
    values: dict[str, tuple[list[Any], Any]] = {}
    kinds = {"captions": datasets.List(datasets.Value("string")), "weight": datasets.Value("float64")}
    for name in check_free(src, order, rows):
        values[name] = [change and change[name] for change in changes], kinds[name]
    if caption is not None and "caption" in rows.columns:
        kind = whole.features[caption]
        new = [(change or {}).get("caption") for change in changes]
        said = [[text] if isinstance(kind, datasets.List) and text else text for text in new]
        values[caption] = [b if a is None else a for a, b in zip(said, whole[caption], strict=True)], kind
        whole = whole.remove_columns(caption)
    for name, (column, kind) in values.items():
        whole = whole.add_column(name, column, new_fingerprint=mark, feature=kind)
    kept = whole.select_columns(list(dict.fromkeys([*order, *values])))
    return kept.select([number for number, change in enumerate(changes) if change is not None], new_fingerprint=mark)


def _check(saved: "datasets.Dataset", rows: pl.DataFrame, image: str, where: str) -> None:
    taken = rows.filter("take")
    images = saved.select_columns([image]).with_format("arrow")
    cells = (columns.read_scalar(cell) for table in images.iter(HELD) for cell in table.column(image))
    for cell, sha256, key in zip(cells, taken["sha256"], taken["key"], strict=True):
        check_bytes(columns.read_cell(cell)[0] or b"", sha256, f"{where}: row {key}")
