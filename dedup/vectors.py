"""Embeddings on disk: ours, and those that somebody else made.

In: L2-normalised vectors with the ids of their rows, or a folder as clip-retrieval writes it. Out: the same again,
checked. Ours are float16, which moves a cosine by less than 0.0005. Knows nothing of how they were computed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dedup import manifest

CHECKED = 16_384  # vectors that are looked at together
ROWS: manifest.Schema = {
    "id": pl.Int64,  # row of the manifest that the vector is of
    "background": pl.Float32,  # of `neighbours.measure_background`
    "strict": pl.Boolean,  # among pictures that share features throughout: see docs/method.md, series
}


class EmbeddingError(ValueError):
    """Embeddings that cannot be used: incomplete, broken, or of another encoder."""


def normalise(vectors: np.ndarray) -> np.ndarray:
    """(n, d) → float32 (n, d), rows of length 1; zeros stay zeros."""
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def save(path: Path, array: np.ndarray) -> None:
    """Atomic .npy file."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as handle:  # np.save would append .npy to the temporary name
            np.save(handle, array)

    manifest.write_atomic(path, write)


def write_embeddings(out: Path, meta: dict[str, Any], rows: pl.DataFrame, vectors: np.ndarray) -> None:
    """`OUT/embeddings/<encoder>/`: 00000.npy … float16, rows.parquet, and meta.json when all of it is there.

    meta: `Encoder.meta()`; for vectors of another origin the same keys. rows: table ROWS.
    """
    folder = out / "embeddings" / meta["encoder"]
    (folder / "meta.json").unlink(missing_ok=True)
    starts = range(0, max(1, len(vectors)), manifest.ROWS_PER_FILE)
    for path in _parts(folder)[len(starts) :]:
        path.unlink()
    for number, start in enumerate(starts):
        save(folder / f"{number:05d}.npy", vectors[start : start + manifest.ROWS_PER_FILE].astype(np.float16))
    manifest.write_parquet(folder / "rows.parquet", manifest.conform(rows, ROWS))
    manifest.write_json(folder / "meta.json", meta | {"rows": len(vectors)})


def read_embeddings(out: Path, encoder: str) -> tuple[dict[str, Any], pl.DataFrame, np.ndarray]:
    """meta, table ROWS, vectors float16 (n, d). Raises EmbeddingError."""
    folder = out / "embeddings" / encoder
    if not (folder / "meta.json").exists():
        raise EmbeddingError(
            f"{out} holds no embeddings of {encoder}: run `unmemorize dedup SRC -o {out} --level copy`"
        )
    meta = manifest.read_json(folder / "meta.json")
    try:
        rows = pl.read_parquet(folder / "rows.parquet")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise EmbeddingError(f"{folder / 'rows.parquet'} cannot be read ({error}): run again") from error
    parts = [_load(path) for path in _parts(folder)]
    counts = {meta["rows"], sum(len(part) for part in parts), len(rows)}
    if {part.shape[1:] for part in parts} != {(meta["dimension"],)} or len(counts) > 1 or dict(rows.schema) != ROWS:
        raise EmbeddingError(f"{folder} is not what its meta.json says: remove it and run again")
    return meta, rows, np.concatenate(parts)


def check_same(out: Path, meta: dict[str, Any]) -> None:
    """Raise EmbeddingError if OUT holds embeddings that cannot be compared with those that `meta` describes."""
    for path in sorted((out / "embeddings").glob("*/meta.json")):
        there = manifest.read_json(path)
        for key, value in meta.items():
            if there.get(key) != value:
                raise EmbeddingError(
                    f"{out} holds embeddings with another {key} ({there.get(key)}, not {value}): choose another OUT"
                )


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.npy"))


def _load(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")  # which unpickles nothing
    except (OSError, ValueError) as error:
        raise EmbeddingError(f"{path} is no numpy file that can be read ({error})") from error


def list_external(folder: Path) -> list[Path]:
    """The files of vectors that `read_external` reads. Raises EmbeddingError."""
    paths = sorted(folder.glob("img_emb/img_emb_*.npy"))
    if not paths:
        raise EmbeddingError(f"{folder} holds no img_emb/img_emb_0.npy: clip-retrieval's layout is expected")
    return paths


def read_external(folder: Path, keys: Sequence[str]) -> np.ndarray:
    """Embeddings in clip-retrieval's layout → float16 (keys, d), L2-normalised, in the order of the keys.

    folder: `img_emb/img_emb_0.npy …` beside `metadata/metadata_0.parquet …`, whose column `image_path` (or `key`)
        names the rows: as our keys do, or with one and the same folder before all of them.
    Rows that no key asks for are passed over, but checked. Raises EmbeddingError.
    """
    paths = list_external(folder)
    parts = [_load(path) for path in paths]
    names = []
    for path, part in zip(paths, parts, strict=True):
        if part.ndim != 2 or part.dtype.kind != "f" or part.shape[1:] != parts[0].shape[1:]:
            raise EmbeddingError(
                f"{path} holds {part.dtype} {part.shape}, {paths[0].name} {parts[0].shape}: not vectors of one length"
            )
        names.append(_read_names(folder / "metadata" / f"metadata_{path.stem[8:]}.parquet", path, len(part)))
    place = _find_rows(folder, pl.concat(names), pl.Series(keys, dtype=pl.String))
    vectors = np.empty((len(keys), parts[0].shape[1]), np.float16)
    first = 0
    for path, part, named in zip(paths, parts, names, strict=True):
        for start in range(0, len(part), CHECKED):
            block = np.asarray(part[start : start + CHECKED], np.float32)
            length = np.linalg.norm(block.astype(np.float64), axis=1)
            broken = np.flatnonzero(~np.isfinite(length) | (length == 0))
            if len(broken):
                row = start + int(broken[0])
                what = "only zeros" if length[broken[0]] == 0 else "NaN or infinity"
                raise EmbeddingError(f"{path}: row {row} ({named[row]}) is {what}: embed that picture again")
            wanted = np.flatnonzero((place >= first + start) & (place < first + start + len(block)))
            vectors[wanted] = (block / length[:, None])[place[wanted] - first - start]
        first += len(part)
    return vectors


def _read_names(path: Path, vectors: Path, rows: int) -> pl.Series:
    from pyarrow import ArrowException  # polars would end with the process where the file is damaged
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            column = "image_path" if "image_path" in columns else "key" if "key" in columns else None
            chosen = [] if column is None else file.read([column], use_threads=False)[column].to_pylist()
    except (OSError, ArrowException, ValueError) as error:
        raise EmbeddingError(f"{path}, which names the rows of {vectors.name}, cannot be read: {error}") from error
    told = [None if name is None else str(name) for name in chosen]
    names = None if column is None else pl.Series("name", told, dtype=pl.String)
    if names is None or names.null_count():
        raise EmbeddingError(f"{path} names no pictures: a column image_path or key without gaps is needed")
    if len(names) != rows:
        raise EmbeddingError(f"{vectors} holds {rows} rows, but {path.name} names {len(names)}")
    return pl.Series("name", [manifest.encode_name(name.encode()) for name in names], dtype=pl.String)


def _find_rows(folder: Path, names: pl.Series, keys: pl.Series) -> np.ndarray:
    """int64 (keys,): which row is whose. The folder before the keys is found by the longest of them."""
    if keys.is_empty():
        return np.zeros(0, np.int64)
    if keys.is_duplicated().any():
        twice = keys.filter(keys.is_duplicated())[0]
        raise EmbeddingError(
            f"{twice} names two pictures, so rows cannot be told by their key: embed with an --encoder"
        )
    longest = max(keys, key=len)
    before = (
        names.filter(("/" + names).str.ends_with("/" + longest)).str.strip_suffix(longest).unique(maintain_order=True)
    )
    missing = {prefix: keys.filter(~(prefix + keys).is_in(names.implode())) for prefix in before}
    complete = [prefix for prefix, keys_missing in missing.items() if keys_missing.is_empty()]
    if not complete:
        absent = min(missing.values(), key=len, default=keys)
        raise EmbeddingError(f"{folder} has no row for {absent[0]} and {len(absent) - 1} more pictures: embed them too")
    if "" not in complete and len(complete) > 1:
        raise EmbeddingError(f"{folder} has rows for {longest} below {complete[0]} and {complete[1]}: give one of them")
    wanted = ("" if "" in complete else complete[0]) + keys
    rows = pl.DataFrame({"name": names}).with_row_index("row").filter(pl.col("name").is_in(wanted.implode()))
    if rows["name"].is_duplicated().any():
        raise EmbeddingError(f"{folder} has two rows for {rows.filter(rows['name'].is_duplicated())['name'][0]}")
    found = pl.DataFrame({"name": wanted}).join(rows, on="name", how="left", maintain_order="left")
    return found["row"].cast(pl.Int64).to_numpy()
