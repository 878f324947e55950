"""Rows → what a second reading of their pictures gives, by as many processes as there are.

In: a table of rows, and a function for a part of it. Out: its results in order, or files in the work folder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from dedup import engine, hashing, look
from dedup.fingerprint import DecodeOptions

ROWS = 64  # of a file of thumbnails
ITEMS = 16  # rows or pairs of another task: these take milliseconds each, and all workers should have some


@dataclass(frozen=True, slots=True)
class Reader:
    """What the second reading of rows needs: where they are, how they are decoded, and who does it."""

    src: Path
    work: Path
    decode: DecodeOptions
    workers: engine.Workers

    def run[T](self, function: Callable[..., list[T]], items: list) -> list[T]:
        """`function(src, part, options)` over parts of the items; the results of all."""
        parts = [items[start : start + ITEMS] for start in range(0, len(items), ITEMS)]
        results = self.workers.run(function, [(self.src, part, self.decode) for part in parts])
        return [result for part in results for result in part]

    def thumbnails(self, rows: pl.DataFrame) -> look.Thumbnails:
        """Of the given rows."""
        return look.Thumbnails(rows["id"].to_numpy(), self.write_parts("thumbnails", rows, look.make_thumbnails), ROWS)

    def write_parts(
        self,
        folder: str,
        rows: pl.DataFrame,
        function: Callable[..., None],
        *more: object,
        each: int = ROWS,
        known: Mapping[str, tuple[Path, int]] | None = None,
    ) -> list[Path]:
        """Let `function(src, part, path, options, *more)` write a file for so many rows each, unless it is there.

        Each file is named by what is in it, so a second run makes none anew. known: by sha256, where an earlier run has
        left the same; the function is told for each row, or None, after all the rest.
        """
        parts = list(rows.select(look.LOCATION).iter_slices(each))
        names = [hashing.digest("".join(part["sha256"]).encode())[:20] for part in parts]
        paths = [self.work / folder / f"{name}.npy" for name in names]
        places = [[] if known is None else [[known.get(sha256) for sha256 in part["sha256"]]] for part in parts]
        tasks = [
            (self.src, part.rows(), path, self.decode, *more, *place)
            for part, path, place in zip(parts, paths, places, strict=True)
        ]
        list(self.workers.run(function, tasks))
        for stale in set((self.work / folder).glob("*.npy")) - set(paths):
            stale.unlink()
        return paths
