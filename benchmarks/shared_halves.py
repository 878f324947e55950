"""Different pictures that share a half: how many does the copy level delete?

    python benchmarks/shared_halves.py --photos DIR --work DIR [--files 300] [--copies 0.25]

Collages of two random crops of photographs, side by side or one above the other, some of them replaced by copies of
others (`dedup_speed.make_set`). Two collages of the same photographs may show the same half and differ in the other:
each is the only one of its kind, and its deletion is a loss.
"""

from pathlib import Path
from typing import Annotated

import dedup_speed
import numpy as np
import polars as pl
import typer

from dedup import manifest
from dedup.options import Options
from dedup.pipeline import deduplicate


def list_origins(files: int, copies: float) -> np.ndarray:
    """The collage that each file of `make_set` shows: its own number, or that of the one it was copied from."""
    rng = np.random.default_rng(0)
    is_copy = rng.random(files) < copies
    origin = np.arange(files)
    origin[is_copy] = rng.choice(np.flatnonzero(~is_copy), is_copy.sum())
    return origin


def main(
    photos: Annotated[Path, typer.Option(help="Photographs.")],
    work: Annotated[Path, typer.Option(help="The set and the result are made here.")],
    files: Annotated[int, typer.Option(help="Files of the set.")] = 300,
    copies: Annotated[float, typer.Option(help="Share of them that are copies.")] = 0.25,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
) -> None:
    """Print what was dropped, and of that what should not have been."""
    folder = dedup_speed.make_set(photos, work / f"set-{files}-{copies:g}", files, copies, 1)
    out = work / f"halves-{files}-{copies:g}"
    deduplicate(folder, out, Options(level="copy", encoder="local"), jobs=jobs)
    rows, origin = manifest.read(out), pl.Series(list_origins(files, copies))
    number = rows["key"].str.extract(r"(\d+)\.jpg$").cast(pl.Int64)
    shown = pl.DataFrame({"key": rows["key"], "shows": origin.gather(number), "kept_id": rows["kept_id"]})
    dropped = shown.filter(pl.col("kept_id").is_not_null())
    dropped = dropped.with_columns(
        kept=shown["key"].gather(dropped["kept_id"]), kept_shows=shown["shows"].gather(dropped["kept_id"])
    )
    wrong = dropped.filter(pl.col("shows") != pl.col("kept_shows"))
    lost = wrong.filter(~pl.col("shows").is_in(shown.filter(pl.col("kept_id").is_null())["shows"].implode()))
    planted = files - origin.n_unique()
    print(f"{files} files, {planted} of them copies: {len(dropped)} dropped, {len(wrong)} for another collage")
    print(f"{lost['shows'].n_unique()} of {origin.n_unique()} collages are lost")
    for dropped_key, kept_key in wrong.select("key", "kept").iter_rows():
        print(f"  {dropped_key} went for {kept_key}")


if __name__ == "__main__":
    typer.run(main)
