"""Time to match pictures against a million rows, once these are loaded.

    python benchmarks/match_speed.py --photos DIR --work DIR [--rows 1000000] [--queries 100] [--batch 1000] [--jobs 1]

SRC: nine pieces of each photograph of the first half, 320×240 each, deduplicated at level copy (`local`, 512
dimensions).
The index is that of this run and random unit vectors up to `--rows`, whose pictures are those of SRC in turn, with the
null model of random pairs of all of it: about three of them are compared with each query, as among real rows.
Queries: crops of pieces, every other one of a photograph that is in SRC. Times are of `match.find` on decoded pictures,
in one process with `--jobs` threads for the search: description, search, comparison. Features of the rows are taken
from their pictures each time; or from the files that the run left; or they have been asked for before. CPU: what the
process computed, which other work on the machine changes less.
"""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated
from unittest.mock import patch

import numpy as np
import polars as pl
import typer
from PIL import Image

from dedup import candidates, features, index, match, neighbours, products, threshold
from dedup.images import SUFFIXES
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.reader import ROWS

GRID = 3
BLOCK = 10_000
SAMPLED = 20_000  # made-up rows whose background is measured; the others repeat theirs
PAIRS = 200_000


def cut(path: Path, piece: int) -> Image.Image:
    """One of GRID × GRID pieces of a photograph: pictures that have nothing in common."""
    picture = Image.open(path).convert("RGB")
    width, height = picture.width // GRID, picture.height // GRID
    left, top = piece % GRID * width, piece // GRID * height
    return picture.crop((left, top, left + width, top + height)).resize((320, 240), Image.Resampling.LANCZOS)


def crop(picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """60 to 90 % of either side."""
    w, h = (int(side * rng.uniform(0.6, 0.9)) for side in picture.size)
    left, top = int(rng.integers(picture.width - w + 1)), int(rng.integers(picture.height - h + 1))
    return np.asarray(picture.crop((left, top, left + w, top + h)))


def write_source(photos: list[Path], src: Path) -> None:
    src.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(photos):
        for piece in range(GRID**2):
            cut(path, piece).save(src / f"{number:04d}-{piece}.jpg", quality=90)


def enlarge(small: index.Index, rows: int, jobs: int) -> index.Index:
    """The index with made-up rows after its own."""
    rng = np.random.default_rng(0)
    own = len(small.ids) // ROWS * ROWS  # whole files of features
    more, width = rows - own, small.vectors.shape[1]
    vectors = np.empty((rows, width), np.int16)
    vectors[:own] = small.vectors[:own]
    for start in range(own, rows, BLOCK):
        drawn = rng.standard_normal((min(BLOCK, rows - start), width), np.float32)
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        vectors[start : start + len(drawn)] = products.quantise(drawn)
    first = len(small.rows)
    made_up = small.rows[(np.arange(more) % first).tolist()].with_columns(
        id=pl.int_range(first, first + more),
        cluster_id=pl.int_range(first, first + more),
        keep=pl.lit(True),
        kept_id=pl.lit(None, pl.Int64),
        represents=pl.lit(1, pl.Int64),
    )
    made_up = made_up.cast(dict(small.rows.schema))
    measured = neighbours.measure_background(vectors[own:][:SAMPLED], vectors, jobs=jobs)
    background = np.concatenate([small.background[:own], np.resize(measured, more)])
    i, j = threshold.sample_pairs(rows, PAIRS)
    scores = neighbours.score_pairs(vectors, i, vectors, j, (background, background))
    null = threshold.describe(threshold.fit_tail(scores, rows * (rows - 1) // 2, step=1e-6))
    return replace(
        small,
        rows=pl.concat([small.rows, made_up]),
        ids=np.concatenate([small.ids[:own], np.arange(first, first + more)]),
        vectors=vectors,
        background=background,
        chance=index.read_chance(null, rows, 1),
        parts=[small.parts[n % (own // ROWS)] for n in range(-(-rows // ROWS))],
    )


def measure_one(large: index.Index, pictures: list[np.ndarray], jobs: int, *, forget: bool) -> np.ndarray:
    """Seconds float (pictures, 2): wall and CPU."""
    taken = []
    for pixels in pictures:
        if forget:
            match.forget()
        start = read_clocks()
        match.find(large, [pixels], jobs=jobs)
        taken.append(read_clocks() - start)
    return np.array(taken)


def read_clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def measure_stages(large: index.Index, pictures: list[np.ndarray], jobs: int) -> dict[str, np.ndarray]:
    """Seconds float (pictures, 2), wall and CPU, of the stages before the comparison, one picture at a time."""
    stages: dict[str, list[np.ndarray]] = {"features": [], "vectors": [], "search": []}
    for pixels in pictures:
        clocks = [read_clocks()]
        found = features.extract(pixels)
        clocks.append(read_clocks())
        encoded = large.encoder.encode(pixels, found)
        clocks.append(read_clocks())
        match.find_near(large, np.array([0]), [encoded], match.MAX_FALSE, jobs)
        clocks.append(read_clocks())
        for name, taken in zip(stages, np.diff(clocks, axis=0), strict=True):
            stages[name].append(taken)
    return {name: np.array(taken) for name, taken in stages.items()}


def measure_batch(
    large: index.Index, pictures: list[np.ndarray], jobs: int
) -> tuple[pl.DataFrame, np.ndarray, dict[str, np.ndarray]]:
    """Matches; seconds float (2,), wall and CPU, of one call of `find`; and of its parts, by clocks within that call.

    What is left of the whole is small. A difference of separate calls would charge other work on the machine to a part.
    """
    parts = {name: np.zeros(2) for name in ("embedding", "search", "comparison")}

    def clocked(function: Callable, name: str) -> Callable:
        def run(*arguments: object, **options: object) -> object:
            start = read_clocks()
            result = function(*arguments, **options)
            parts[name] += read_clocks() - start
            return result

        return run

    encoder = SimpleNamespace(encode=clocked(large.encoder.encode, "embedding"), name=large.encoder.name)
    with (
        patch.object(features, "extract", clocked(features.extract, "embedding")),
        patch.object(match, "find_near", clocked(match.find_near, "search")),
        patch.object(match, "compare", clocked(match.compare, "comparison")),
    ):
        start = read_clocks()
        found = match.find(replace(large, encoder=encoder), pictures, jobs=jobs)
        return found, read_clocks() - start, parts


def describe_machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpus = len(os.sched_getaffinity(0))
    return f"{model}, {cpus} cores of it used, commit {commit or 'unknown'}, {datetime.now(UTC):%Y-%m-%d}"


def main(
    photos: Annotated[Path, typer.Option(help="Folder of photographs.")],
    work: Annotated[Path, typer.Option(help="Folder for SRC and OUT, kept for the next time.")],
    rows: Annotated[int, typer.Option(help="Rows of the index.")] = 1_000_000,
    queries: Annotated[int, typer.Option(help="Pictures that are matched one by one.")] = 100,
    batch: Annotated[int, typer.Option(help="Pictures that are matched together.")] = 1_000,
    jobs: Annotated[int, typer.Option(help="Threads of the search.")] = 1,
) -> None:
    """Print a table."""
    paths = sorted(p for p in photos.rglob("*") if p.suffix.lower() in SUFFIXES)
    inside = paths[: len(paths) // 2]
    if not (work / "out" / "run.json").exists():
        write_source(inside, work / "src")
        deduplicate(work / "src", work / "out", Options(level="copy"), jobs=jobs)
    start = time.perf_counter()
    small = match.load(work / "out")
    print(describe_machine())
    print(f"loading {len(small.rows):,} rows: {time.perf_counter() - start:.2f} s")
    large = enlarge(small, rows, jobs)
    rng = np.random.default_rng(1)
    sides = (inside, paths[len(inside) :])
    pictures = []
    for number in range(max(queries, batch)):
        side = sides[number % 2]
        pictures.append(crop(cut(side[int(rng.integers(len(side)))], int(rng.integers(GRID**2))), rng))
    match.find(large, pictures[:1], jobs=jobs)  # load the compiled code
    compared = match.find_near(
        large,
        np.arange(queries),
        [large.encoder.encode(p, features.extract(p)) for p in pictures[:queries]],
        match.MAX_FALSE,
        jobs,
    )
    floor = large.chance.threshold(match.MAX_FALSE)
    print(f"{len(large.ids):,} vectors of {large.vectors.shape[1]}; floor {floor:.3f} (dedup: {candidates.MIN_SCORE})")
    print(f"compared with each: {len(compared) / queries:.1f} rows on average\n")
    chosen = pictures[:queries]
    rows_of = {f"of this, {name}": taken for name, taken in measure_stages(large, chosen, jobs).items()}
    bare = replace(large, parts=["none"] * len(large.parts))
    rows_of["`find`, features taken again"] = measure_one(bare, chosen, jobs, forget=True)
    rows_of["`find`, features from files"] = measure_one(large, chosen, jobs, forget=True)
    rows_of["`find`, features remembered"] = measure_one(large, chosen, jobs, forget=False)
    print("| one picture | median ms | 90 % below | median CPU ms |\n|---|---:|---:|---:|")
    for name, taken in rows_of.items():
        wall, cpu = 1e3 * np.median(taken, axis=0)
        print(f"| {name} | {wall:.1f} | {1e3 * np.quantile(taken[:, 0], 0.9):.1f} | {cpu:.1f} |", flush=True)
    match.forget()
    found, whole, parts = measure_batch(large, pictures[:batch], jobs)
    wall, cpu = batch / whole
    print(f"\n{batch:,} pictures at once: {wall:.1f} a second, {cpu:.1f} a CPU second; seconds (CPU):")
    print(", ".join(f"{name} {wall:.1f} ({cpu:.1f})" for name, (wall, cpu) in parts.items()))
    minutes, cpu_minutes = (whole - parts["embedding"]) * 1e5 / batch / 60
    print(f"100,000 × {rows:,} after embedding: {minutes:.0f} minutes ({cpu_minutes:.0f} CPU minutes), {jobs} threads.")
    best = found.filter(pl.col("rank") == 1)
    right = best.filter((pl.col("class") == "copy") & (pl.col("query") % 2 == 0))["query"].n_unique()
    wrong = best.filter((pl.col("class") == "copy") & (pl.col("query") % 2 == 1))["query"].n_unique()
    print(f"Copies: {right:,} of {batch - batch // 2:,} crops of pictures in SRC, {wrong:,} of the others.")


if __name__ == "__main__":
    typer.run(main)
