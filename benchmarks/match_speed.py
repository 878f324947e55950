"""Time to match pictures against a million rows, once these are loaded.

    python benchmarks/match_speed.py --photos DIR --work DIR [--rows 1000000] [--queries 100] [--batch 1000] [--jobs 1]

SRC: five crops of 320×240 of each photograph of the first half, deduplicated at level copy (`local`, 512 dimensions).
The index is that of this run and random unit vectors up to `--rows`, whose pictures are those of SRC in turn, with the
null model of random pairs of all of it: about three of them are compared with each query, as among real rows.
Queries: further crops, every other one of a photograph that is in SRC. Times are of `match.find` on decoded pictures, in
one process with `--jobs` threads for the search: description, search, comparison. `nothing remembered`: features of the
rows are taken from their pictures each time; `remembered`: they have been asked for before.
"""

import os
import platform
import statistics
import subprocess
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer
from PIL import Image

from dedup import candidates, features, index, match, neighbours, products, threshold
from dedup.images import SUFFIXES
from dedup.pipeline import Options, deduplicate

BLOCK = 10_000
PAIRS = 200_000


def crop(path: Path, rng: np.random.Generator) -> Image.Image:
    """A tenth to two fifths of the sides away, on each axis."""
    picture = Image.open(path).convert("RGB")
    width, height = picture.size
    w, h = (int(side * rng.uniform(0.6, 0.9)) for side in (width, height))
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return picture.crop((left, top, left + w, top + h)).resize((320, 240), Image.Resampling.LANCZOS)


def write_source(photos: list[Path], src: Path) -> None:
    src.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number, path in enumerate(photos):
        for copy in range(5 * max(1, -(-1_100 // (5 * len(photos))))):
            crop(path, rng).save(src / f"{number:04d}-{copy}.jpg", quality=90)


def enlarge(small: index.Index, rows: int, jobs: int) -> index.Index:
    """The index with made-up rows after its own."""
    rng = np.random.default_rng(0)
    more, width = rows - len(small.ids), small.vectors.shape[1]
    vectors = np.empty((rows, width), np.int16)
    vectors[: len(small.ids)] = small.vectors
    for start in range(len(small.ids), rows, BLOCK):
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
    background = neighbours.measure_background(vectors, jobs=jobs)
    i, j = threshold.sample_pairs(rows, PAIRS)
    scores = neighbours.score_pairs(vectors, i, vectors, j, (background, background))
    null = threshold.describe(threshold.fit_tail(scores, rows * (rows - 1) // 2, step=1e-6))
    return replace(
        small,
        rows=pl.concat([small.rows, made_up]),
        ids=np.concatenate([small.ids, np.arange(first, first + more)]),
        vectors=vectors,
        background=background,
        chance=index.read_chance(null, rows, 1),
    )


def measure_one(large: index.Index, pictures: list[np.ndarray], jobs: int, *, forget: bool) -> list[float]:
    seconds = []
    for pixels in pictures:
        if forget:
            match.forget()
        start = time.perf_counter()
        match.find(large, [pixels], jobs=jobs)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_stages(large: index.Index, pictures: list[np.ndarray], jobs: int) -> list[tuple[str, float]]:
    """Median seconds of the stages before the comparison, one picture at a time."""
    stages: dict[str, list[float]] = {"features": [], "vectors": [], "search": []}
    for pixels in pictures:
        times = [time.perf_counter()]
        found = features.extract(pixels)
        times.append(time.perf_counter())
        encoded = large.encoder.encode(pixels, found)
        times.append(time.perf_counter())
        match.find_near(large, np.array([0]), [encoded], match.MAX_FALSE, jobs)
        times.append(time.perf_counter())
        for name, taken in zip(stages, np.diff(times).tolist(), strict=True):
            stages[name].append(taken)
    return [(name, statistics.median(taken)) for name, taken in stages.items()]


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
    pictures = [
        np.asarray(crop(side[int(rng.integers(len(side)))], rng))
        for number in range(max(queries, batch))
        for side in (sides[number % 2],)
    ]
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
    print("| one picture | median ms | 90 % below |\n|---|---:|---:|")
    for name, seconds in measure_stages(large, pictures[:queries], jobs):
        print(f"| of this, {name} | {1e3 * seconds:.1f} | |")
    for name, forget in (("nothing remembered", True), ("remembered", False)):
        if not forget:
            measure_one(large, pictures[:queries], jobs, forget=False)
        taken = measure_one(large, pictures[:queries], jobs, forget=forget)
        print(f"| `find`, {name} | {1e3 * statistics.median(taken):.1f} | {1e3 * np.quantile(taken, 0.9):.1f} |")
    match.forget()
    start, cpu = time.perf_counter(), time.process_time()
    described = [features.extract(pixels) for pixels in pictures[:batch]]
    encoded = [large.encoder.encode(p, f) for p, f in zip(pictures[:batch], described, strict=True)]
    embedding = time.perf_counter() - start
    found = match.find(large, pictures[:batch], jobs=jobs)
    seconds = time.perf_counter() - start - embedding
    start = time.perf_counter()
    match.find_near(large, np.arange(batch), encoded, match.MAX_FALSE, jobs)
    searching = time.perf_counter() - start
    after = seconds - embedding
    print(f"\n{batch:,} pictures at once: {batch / seconds:.1f} a second ({time.process_time() - cpu:.0f} CPU s);")
    print(f"embedding {embedding:.1f} s, search {searching:.1f} s, comparison and the rest {after - searching:.1f} s.")
    print(f"100,000 × {rows:,} after embedding: {after * 1e5 / batch / 60:.0f} minutes with {jobs} threads.")
    best = found.filter(pl.col("rank") == 1)
    right = best.filter((pl.col("class") == "copy") & (pl.col("query") % 2 == 0))["query"].n_unique()
    wrong = best.filter((pl.col("class") == "copy") & (pl.col("query") % 2 == 1))["query"].n_unique()
    print(f"Copies: {right:,} of {batch - batch // 2:,} crops of pictures in SRC, {wrong:,} of the others.")


if __name__ == "__main__":
    typer.run(main)
