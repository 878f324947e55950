"""The cosine join: time, memory and recall; what it finds among look-alikes; and what the null model promises.

    python benchmarks/cosine_join.py join [--sizes 10000,100000,1000000] [--probes 48,192] [--peer]
    python benchmarks/cosine_join.py ask [--rows 1000000] [--queries 1,4,100,1000]
    python benchmarks/cosine_join.py candidates --images DIR [--others DIR …]
    python benchmarks/cosine_join.py null --images DIR [--same GROUP,GROUP …]

`join`, `ask`: made-up vectors with a spectrum that falls off; 5 % of the rows are partners of another at cosine
0.5 … 0.9. `--peer` lets FAISS search the same vectors: flat where ours is exact, else with as many cells and probes.
`candidates`, `null`: pictures named GROUP@EDIT.jpg; pictures of different groups count as unrelated,
whatever they show (but see `--same`), and each picture of `--others` is a group of its own.
"""

import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import faiss
import numpy as np
import polars as pl
import typer

from dedup import embedding, features, images, neighbours, products, threshold, vocabulary

app = typer.Typer()
WIDTH = 512
BATCH = 16
THRESHOLD = 0.4  # cosine
SAMPLE = 2_048  # rows that are searched exactly
Images = Annotated[Path, typer.Option(help="Folder with GROUP@EDIT.jpg.")]
Encoder = Annotated[str, typer.Option(help="Name of the encoder.")]
Jobs = Annotated[int, typer.Option(help="Threads.")]


def make_vectors(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float16 (n, WIDTH), and the rows i < j of its planted pairs."""
    rng = np.random.default_rng(n)
    spectrum = 1 / np.sqrt(1 + np.arange(WIDTH) / 20)

    def draw(count: int) -> np.ndarray:
        found = rng.standard_normal((count, WIDTH), np.float32) * spectrum
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    vectors = np.concatenate([draw(min(10_000, n - s)).astype(np.float16) for s in range(0, n, 10_000)])
    j = np.sort(rng.choice(np.arange(n // 2, n), n // 20, replace=False))
    i = rng.choice(n // 2, len(j), replace=False)
    cosine = rng.uniform(0.5, 0.9, (len(j), 1))
    base, noise = vectors[i].astype(np.float32), draw(len(j))
    noise -= np.sum(noise * base, axis=1, keepdims=True) * base
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    vectors[j] = cosine * base + np.sqrt(1 - cosine**2) * noise
    return vectors, i, j


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def join_faiss(vectors: np.ndarray, jobs: int) -> pl.DataFrame:
    """As `neighbours.join_cosine`, in 32 bits; of vectors as FAISS wants them."""
    n, cosine = len(vectors), faiss.METRIC_INNER_PRODUCT
    faiss.omp_set_num_threads(jobs)
    index = faiss.IndexFlatIP(WIDTH)
    if n > neighbours.EXACT_UP_TO:
        index = faiss.IndexIVFFlat(index, WIDTH, n // neighbours.CELL_ROWS, cosine)
        index.cp.niter, index.cp.max_points_per_centroid = neighbours.ROUNDS, neighbours.TRAINING_ROWS
        index.nprobe = neighbours.PROBES
        index.train(vectors)
    index.add(vectors)
    score, other = index.search(vectors, neighbours.K + 1)
    row, place = np.nonzero((score >= THRESHOLD) & (other >= 0) & (other != np.arange(n)[:, None]))
    ends = row, other[row, place]
    return pl.DataFrame({"i": np.minimum(*ends), "j": np.maximum(*ends)}).unique()


def measure_recall(vectors: np.ndarray, pairs: pl.DataFrame) -> float:
    """Of the partners that FAISS's exact search finds for some rows, the share that is among the pairs, a row."""
    exact, n = faiss.IndexFlatIP(WIDTH), len(vectors)
    for start in range(0, n, 10_000):
        exact.add(vectors[start : start + 10_000].astype(np.float32))
    rows = np.random.default_rng(1).choice(n, min(n, SAMPLE), replace=False)
    score, other = exact.search(vectors[rows].astype(np.float32), neighbours.K + 1)
    row, place = np.nonzero((score >= THRESHOLD) & (other != rows[:, None]))
    ends = rows[row], other[row, place]
    wanted = pl.DataFrame({"row": row, "i": np.minimum(*ends), "j": np.maximum(*ends)})
    there = wanted.join(pairs.select("i", "j", found=True), on=["i", "j"], how="left")
    return float(there.group_by("row").agg(pl.col("found").fill_null(False).mean())["found"].mean())  # type: ignore[arg-type]


@app.command(hidden=True)
def one(n: int, jobs: int, probes: int, peer: Annotated[bool, typer.Argument()]) -> None:
    """Measure one join and print it as JSON."""
    neighbours.PROBES = probes
    vectors, i, j = make_vectors(n)
    asked = vectors.astype(np.float32) if peer else vectors
    neighbours.join_cosine(vectors[:2_000], jobs=jobs)  # load the compiled code
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    pairs = join_faiss(asked, jobs) if peer else neighbours.join_cosine(asked, threshold=THRESHOLD, jobs=jobs).pairs
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    row = {"seconds": seconds, "cpu": cpu, "extra": peak() - before, "pairs": len(pairs)}
    found = pl.DataFrame({"i": i, "j": j}).join(pairs, on=["i", "j"])
    print(json.dumps(row | {"planted": len(found) / len(i), "recall": measure_recall(vectors, pairs)}))


@app.command()
def join(
    sizes: Annotated[str, typer.Option(help="Numbers of rows.")] = "10000,30000,100000,1000000",
    probes: Annotated[str, typer.Option(help="Cells that are looked into.")] = str(neighbours.PROBES),
    peer: Annotated[bool, typer.Option("--peer", help="FAISS, too.")] = False,
    jobs: Jobs = 1,
) -> None:
    """Time, memory and recall of the join; beyond neighbours.EXACT_UP_TO rows, in cells."""
    print("| rows | tool | cells looked into | seconds | CPU s | extra GB | pairs | recall | planted found |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    for n, tool, looked in itertools.product(map(int, sizes.split(",")), (False, True)[: 1 + peer], probes.split(",")):
        if n <= neighbours.EXACT_UP_TO and looked != probes.split(",")[0]:
            continue
        command = [sys.executable, __file__, "one", str(n), str(jobs), looked, str(tool)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        cells = "all" if n <= neighbours.EXACT_UP_TO else f"{looked} of {n // neighbours.CELL_ROWS:,}"
        print(
            f"| {n:,} | {'FAISS' if tool else 'ours'} | {cells} | {row['seconds']:.1f} | {row['cpu']:.1f} "
            f"| {row['extra']:.2f} | {row['pairs']:,} | {row['recall']:.4f} | {row['planted']:.4f} |",
            flush=True,
        )


@app.command()
def ask(
    rows: Annotated[int, typer.Option(help="Rows that are asked about.")] = 1_000_000,
    queries: Annotated[str, typer.Option(help="Numbers of queries.")] = "1,4,100,1000",
    jobs: Jobs = 1,
) -> None:
    """Seconds of `nearest` once the vectors are loaded; more queries cost in proportion."""
    vectors, _, _ = make_vectors(rows)
    asked = make_vectors(10_000)[0]
    start = time.perf_counter()
    loaded = products.quantise(vectors)
    print(f"loading {rows:,} rows: {time.perf_counter() - start:.1f} s\n")
    print("| queries | seconds | CPU s | CPU s a query | CPU h for 100,000 |")
    print("|---:|---:|---:|---:|---:|")
    neighbours.nearest(asked[:10], loaded[:100], jobs=jobs)
    neighbours.nearest(asked[:1], loaded[:100], jobs=jobs)
    for count in map(int, queries.split(",")):
        start, cpu = time.perf_counter(), time.process_time()
        neighbours.nearest(asked[:count], loaded, jobs=jobs)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(
            f"| {count:,} | {seconds:.3f} | {cpu:.3f} | {cpu / count:.4f} | {cpu / count * 1e5 / 3600:.2f} |",
            flush=True,
        )


def embed(
    folder: Path, encoder: str, *, others: list[Path] | None = None, same: list[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """float (pictures, d) and the group of each, in the order of their names; `same`: "GROUP,GROUP" that are one.

    Of `others` each picture is a group. All go together, because `local` learns its words from them.
    """
    paths, more = (
        [path for each in folders for path in sorted(each.rglob("*")) if path.suffix in images.SUFFIXES]
        for folders in ([folder], others or [])
    )
    chosen = paths + more
    vectors = embed_locally(chosen) if encoder == "local" else embed_with(embedding.resolve(encoder), chosen)
    one_of = {group: pair.split(",")[0] for pair in same or [] for group in pair.split(",")}
    names = [one_of.get(name, name) for name in (path.stem.split("@")[0] for path in paths)]
    return vectors, np.unique([*names, *map(str, more)], return_inverse=True)[1]


def embed_with(encoder: embedding.Encoder, paths: list[Path]) -> np.ndarray:
    vectors = []
    for start in range(0, len(paths), BATCH):
        decoded = [images.decode(path.read_bytes(), min_side=encoder.side) for path in paths[start : start + BATCH]]
        vectors.append(encoder.encode(np.stack([images.shrink(picture.pixels, encoder.side) for picture in decoded])))
    return np.concatenate(vectors)


def embed_locally(paths: list[Path]) -> np.ndarray:
    decoded = (images.decode(path.read_bytes(), min_side=features.SIDE) for path in paths)
    found = [features.extract(picture.pixels) for picture in decoded]
    learned = vocabulary.learn(found[:: -(-len(found) // vocabulary.SAMPLE)])
    return np.stack([learned.encode(each) for each in found]).astype(np.float16)


def count_true(group: np.ndarray) -> int:
    sizes = np.bincount(group)
    return int(np.sum(sizes * (sizes - 1) // 2))


@app.command()
def candidates(
    images: Images,
    others: Annotated[list[Path] | None, typer.Option(help="Folders of unrelated pictures.")] = None,
    encoder: Encoder = "local",
    k: Annotated[int, typer.Option(help="Partners a row.")] = neighbours.K,
) -> None:
    """Share of the true pairs among the best candidates, at equal numbers of false ones."""
    vectors, group = embed(images, encoder, others=others)
    n, true = len(vectors), count_true(group)
    print(f"{n:,} pictures, {true:,} true pairs, k = {k}; recall in % (score of the last candidate)\n")
    print("| score | 0.3 false a row | 1 | 3 |")
    print("|---|---:|---:|---:|")
    for name, background in (("cosine", None), ("less background", neighbours.measure_background(vectors))):
        pairs = neighbours.join_cosine(vectors, k=k, threshold=-2.0, background=background).pairs
        ordered = pairs.sort("score", descending=True)
        related = group[ordered["i"].to_numpy()] == group[ordered["j"].to_numpy()]
        false = np.cumsum(~related)
        cells = []
        for budget in (0.3, 1, 3):
            end = int(np.searchsorted(false, budget * n / 2, side="right"))
            cells.append(f"{100 * related[:end].sum() / true:.1f} ({ordered['score'][end - 1]:.2f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def choose_groups(vectors: np.ndarray, group: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.random.default_rng(seed).choice(np.unique(group), count, replace=False)
    return vectors[np.isin(group, chosen)], group[np.isin(group, chosen)]


def predict(vectors: np.ndarray, group: np.ndarray, seed: int) -> Iterator[tuple[str, int, int, float, float]]:
    """(score, expected, counted, low, high) at thresholds at which a number of false pairs is expected."""
    i, j = np.triu_indices(len(vectors), 1)
    i, j = i[group[i] != group[j]], j[group[i] != group[j]]
    for name, background in (("cosine", None), ("less background", neighbours.measure_background(vectors))):
        backgrounds = None if background is None else (background, background)
        scores = neighbours.score_pairs(vectors, i, vectors, j, backgrounds)
        sample = np.random.default_rng(seed).choice(scores, min(200_000, len(scores) // 10), replace=False)
        tail = threshold.fit_tail(sample, len(scores), seed=seed)
        for allowed in (1_000, 100, 10, 3):
            at = tail.threshold_for(allowed).value
            yield name, allowed, int(np.sum(scores >= at)), *tail.interval(at)


@app.command()
def null(
    images: Images,
    groups: Annotated[str, typer.Option(help="Numbers of groups.")] = "30,90,250",
    same: Annotated[list[str] | None, typer.Option(help="GROUP,GROUP that show the same scene.")] = None,
    seeds: Annotated[int, typer.Option(help="Samples of groups and of pairs.")] = 5,
    encoder: Encoder = "local",
) -> None:
    """Expected false pairs against counted ones."""
    vectors, group = embed(images, encoder, same=same)
    print("| pictures | unrelated pairs | score | expected | counted, each seed | within the interval |")
    print("|---:|---:|---|---:|---|---:|")
    for count in map(int, groups.split(",")):
        cells: dict[tuple[str, int], list[tuple[int, bool]]] = {}
        for seed in range(seeds):
            chosen, names = choose_groups(vectors, group, count, seed)
            for name, allowed, counted, low, high in predict(chosen, names, seed):
                cells.setdefault((name, allowed), []).append((counted, low <= counted <= high))
        pairs = len(chosen) * (len(chosen) - 1) // 2 - count_true(names)
        for (name, allowed), found in cells.items():
            counts = ", ".join(str(counted) for counted, _ in found)
            inside = f"{sum(within for _, within in found)} of {len(found)}"
            print(f"| {len(chosen):,} | {pairs:,} | {name} | {allowed:,} | {counts} | {inside} |", flush=True)


if __name__ == "__main__":
    app()
