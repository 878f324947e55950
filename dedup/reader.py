"""Rows → what a second reading of their pictures gives, by as many processes as there are.

In: a table of rows, and a function for a part of it. Out: its results in order, or files in the work folder.
"""

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

from dedup import detail, dicom, engine, features, frames, geometry, hashing, images, look, overlay, verify
from dedup.fingerprint import DecodeOptions
from dedup.signatures import Signatures
from dedup.verdicts import Verdicts

ROWS = 64  # of a file of thumbnails
ITEMS = 16  # rows or pairs of another task: these take milliseconds each, and all workers should have some
TASKS = 1_024  # that wait for workers at a time: each holds the places of its rows
REMEMBERED = 2_048  # results that are lost at most when the run is killed


@dataclass(frozen=True, slots=True)
class Reader:
    """What the second reading of rows needs: where they are, how they are decoded, and who does it."""

    src: Path
    work: Path
    decode: DecodeOptions
    workers: engine.Workers
    verdicts: Verdicts
    signatures: Signatures

    def locate(self, ids: pl.Series) -> pl.DataFrame:
        """look.LOCATION of these rows, in the order of the ids."""
        return self.signatures.take(ids, tuple(look.LOCATION))

    def ask(self, function: Callable[..., list], keys: list, make_items: Callable[[list[int]], list]) -> list:
        """Results of `function(src, part, options)` over parts of the items, remembered by their keys.

        keys: one for each item, with all that decides its result besides the decode options: digests of bytes, and
        what is asked of them. make_items: numbers of keys without a known result → their items. Results come as JSON
        has them: lists for tuples and arrays.
        """
        limits = self.decode.max_pixels, self.decode.max_frames  # all that the second reading asks of them
        asked = function.__name__, _digest_code(function.__module__), limits
        names = [hashing.digest(repr((*asked, key)).encode())[:32] for key in keys]
        told = dict(zip(names, self.verdicts.find(names), strict=True))
        first = {name: number for number, name in reversed(list(enumerate(names))) if told[name] is None}
        numbers = sorted(first.values())
        items = make_items(numbers)
        parts = [items[start : start + ITEMS] for start in range(0, len(items), ITEMS)]
        fresh: list[str] = []
        done = 0
        try:
            for results in self.workers.run(function, [(self.src, part, self.decode) for part in parts]):
                fresh += [json.dumps(result, default=_to_plain) for result in results]
                if len(fresh) - done >= REMEMBERED:
                    self._remember([names[n] for n in numbers[done : len(fresh)]], fresh[done:])
                    done = len(fresh)
        finally:
            self._remember([names[n] for n in numbers[done : len(fresh)]], fresh[done:])
        told |= {names[n]: verdict for n, verdict in zip(numbers, fresh, strict=True)}
        return [json.loads(told[name] or "") for name in names]

    def _remember(self, names: list[str], verdicts: list[str]) -> None:
        if names:
            self.verdicts.add(names, verdicts)

    def thumbnails(self, ids: pl.Series) -> look.Thumbnails:
        """Of these rows, ascending."""
        paths = self.write_parts("thumbnails", self.locate(ids), look.make_thumbnails)
        return look.Thumbnails(ids.to_numpy(), paths, ROWS)

    def write_parts(
        self,
        folder: str,
        rows: pl.DataFrame,
        function: Callable[..., None],
        *more: object,
        each: int = ROWS,
        gpu: bool = False,
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
        wanted = list(zip(parts, paths, places, strict=True))
        for start in range(0, len(wanted), TASKS):
            those = wanted[start : start + TASKS]
            tasks = [(self.src, part.rows(), path, self.decode, *more, *place) for part, path, place in those]
            list(self.workers.run(function, tasks, gpu=gpu))
        for stale in set((self.work / folder).glob("*.npy")) - set(paths):
            stale.unlink()
        return paths


@cache
def _digest_code(module: str) -> str:
    """Of all that has a say in a comparison: where a threshold moves, what was said before counts no more."""
    modules = (images, dicom, frames, detail, features, geometry, overlay, verify, look, sys.modules[module])
    return hashing.digest("".join(map(inspect.getsource, modules)).encode())


def _to_plain(value: Any) -> Any:
    """Of numpy, without loss."""
    return value.tolist()
