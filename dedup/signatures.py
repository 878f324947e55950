"""The signature files of a run as one table: what decides is in memory, the rest is read when it is asked for.

In: the files that `fingerprint` wrote, one a shard. Out: rows by their id, the number of the row in input order. Of
digests, keys, captions and persons decisions only ask which are equal, and in what order: numbers stand for them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from dedup import manifest, policy, scopes

# Nine tenths of the bytes of a row; no decision reads them.
LATER = ("offset", "key", "caption", "subject", "error", "sha256", "phash", "dhash", "pdq", "pdq_d4")


@dataclass(frozen=True, slots=True)
class Signatures:
    """A folder of signature files, 00000.parquet …, and how many rows each holds."""

    folder: Path
    sizes: list[int]

    def read(self) -> pl.DataFrame:
        """All rows with their `id`, `manifest.compact`, and numbers for the columns LATER.

        picture: UInt32, equal for equal bytes, in the order of their digests; null for what could not be read. name:
        UInt32, the order of the keys among rows of one picture, and among those without. person: UInt32, equal for
        equal subjects, null where nobody says. caption_hash: UInt64, null for a row without caption.
        """
        # One by one: of many at once polars takes a thread for each, and warns of a deadlock beyond 512.
        files, texts = [], []
        asked = {"digest": pl.col("sha256").str.decode("hex"), "person": pl.col("subject")}
        for number in range(len(self.sizes)):
            file = (
                pl.scan_parquet(self._path(number)).with_columns(policy.hash_caption(), **asked).drop(LATER).collect()
            )
            texts.append(file.select(*asked))
            files.append(manifest.compact(file.drop(*asked)))
        text = pl.concat(texts)
        del texts
        numbers = {"picture": text["digest"].rank("dense"), "person": text["person"].rank("dense")}
        del text
        rows = pl.concat(files, how="diagonal").with_row_index("id")
        rows = rows.with_columns(pl.col("id").cast(pl.Int64), **numbers)
        again = rows.select(pl.col("picture").is_null() | scopes.stands_again("picture")).to_series().arg_true()
        order = self.take(again, ("key",))["key"].rank("dense")
        rows = rows.with_columns(name=pl.repeat(0, len(rows), dtype=pl.UInt32, eager=True).scatter(again, order))
        for name in rows.columns:  # one by one, so that no more than one of them is there twice
            rows = rows.with_columns(rows[name].rechunk())
        return rows

    def take(self, ids: pl.Series, columns: tuple[str, ...] = LATER) -> pl.DataFrame:
        """These columns of these rows, in the order of the ids."""
        parts = list(self._find(ids, columns))
        order = np.argsort(np.concatenate([np.zeros(0, np.int64), *(place for place, _ in parts)]))
        assert len(order) == len(ids), "an id of no row"
        schema = pl.read_parquet_schema(self._path(0))
        empty = pl.DataFrame(schema={name: schema[name] for name in columns})
        return pl.concat([empty, *(part for _, part in parts)])[order]

    def read_captions(self, ids: pl.Series) -> pl.Series:
        """Of these rows, in the order of the ids."""
        return self.take(ids, ("caption",))["caption"]

    def read_codes(self, ids: pl.Series) -> np.ndarray:
        """uint8 (n, 8, 32) of these rows."""
        codes = np.empty((len(ids), 8, 32), np.uint8)
        for place, part in self._find(ids, ("pdq_d4",)):
            codes[place] = _unpack(part)
        return codes

    def write_codes(self, ids: pl.Series, path: Path) -> None:
        """The same as uint64 (n, 8, 4), in a .npy file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, "w+", np.uint64, (len(ids), 8, 4))
        for place, part in self._find(ids, ("pdq_d4",)):
            np.load(path, mmap_mode="r+")[place] = _unpack(part).view(np.uint64)  # no more of it in memory than that

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.parquet"

    def _find(self, ids: pl.Series, columns: tuple[str, ...]) -> Iterator[tuple[np.ndarray, pl.DataFrame]]:
        """For each file with some of these rows: their places among the ids, ascending by row, and their columns."""
        wanted = ids.to_numpy()
        order, starts = np.argsort(wanted, kind="stable"), np.cumsum([0, *self.sizes])
        edges = np.searchsorted(wanted[order], starts)
        for number in np.flatnonzero(np.diff(edges)).tolist():
            place = order[edges[number] : edges[number + 1]]
            part = pl.read_parquet(self._path(number), columns=list(columns)).select(columns)
            yield place, part[wanted[place] - starts[number]]


def _unpack(part: pl.DataFrame) -> np.ndarray:
    return np.frombuffer(b"".join(part["pdq_d4"]), np.uint8).reshape(-1, 8, 32)
