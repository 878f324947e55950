"""Time and memory of the exact Hamming join: radius 31, random codes with planted neighbours, and crowds of equal ones.

    python benchmarks/hamming_join.py [--sizes 10000,100000,1000000] [--jobs 2]

5 % of the codes are another code with 0 … 31 bits flipped; the join must find every such pair. All eight orientations
are searched: `upright` plants the neighbours upright, `all eight` in a random orientation.
Each row is a process of its own, so that memory is its own. The exponent is that of time between neighbouring sizes.
"""

import json
import math
import resource
import subprocess
import sys
import time
from typing import Annotated

import numpy as np
import typer

from dedup import search

app = typer.Typer()


def plant(n: int, orientations: int) -> tuple[np.ndarray, set[tuple[int, int]]]:
    """Codes uint8 (n, 8, 32) and the pairs (i, j) that must be found."""
    rng = np.random.default_rng(n)
    codes = rng.integers(0, 256, (n, 8, 32), dtype=np.uint8)
    later = rng.choice(np.arange(n // 2, n), n // 20, replace=False)
    earlier = rng.integers(0, n // 2, len(later))
    bits = np.unpackbits(codes[earlier, 0], axis=1)
    order = rng.random(bits.shape).argsort(axis=1)
    bits ^= (order < rng.integers(0, 32, (len(later), 1))).astype(np.uint8)
    codes[later, rng.integers(0, orientations, len(later))] = np.packbits(bits, axis=1)
    return codes, set(zip(earlier.tolist(), later.tolist(), strict=True))


def crowd(n: int, flips: int) -> tuple[np.ndarray, set[tuple[int, int]]]:
    """n codes that differ from one another in at most 2 · flips bits, among 20,000 random ones."""
    rng = np.random.default_rng(n)
    bits = np.repeat(rng.integers(0, 2, (1, 256), dtype=np.uint8), n, axis=0)
    for _ in range(flips):
        bits[np.arange(n), rng.integers(0, 256, n)] ^= 1
    codes = rng.integers(0, 256, (n + 20_000, 8, 32), dtype=np.uint8)
    codes[:n, 0] = np.packbits(bits, axis=1)
    return codes, {(i, j) for j in range(n) for i in range(min(j, search.LIMIT))}


@app.command()
def one(kind: str, n: int, jobs: int) -> None:
    """Measure one row and print it as JSON."""
    cases = {"upright": lambda: plant(n, 1), "all eight": lambda: plant(n, 8)}
    cases |= {"equal": lambda: crowd(n, 0), "nearly equal": lambda: crowd(n, 8)}
    codes, expected = cases[kind]()
    search.join_hamming(codes[:2_000], jobs=jobs)  # load the compiled code
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = search.join_hamming(codes, radius=31, jobs=jobs)
    seconds = time.perf_counter() - start
    pairs = set(zip(found["i"], found["j"], strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    missed = len(expected - pairs)
    row = {"seconds": seconds, "peak": peak / 1e6, "before": before / 1e6, "pairs": len(pairs), "missed": missed}
    print(json.dumps(row))


@app.command()
def table(
    sizes: Annotated[
        str, typer.Option(help="Numbers of codes, comma-separated.")
    ] = "10000,30000,100000,300000,1000000",
    jobs: Annotated[int, typer.Option(help="Threads.")] = 2,
) -> None:
    """Measure everything."""
    print("| codes | kind | seconds | exponent | peak GB | of which before the join | pairs | missed |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    rows = [(int(n), kind) for kind in ("upright", "all eight") for n in sizes.split(",")]
    rows += [(1_000, "equal"), (100_000, "equal"), (100_000, "nearly equal")]
    last: dict[str, tuple[int, float]] = {}
    for n, kind in rows:
        command = [sys.executable, __file__, "one", kind, str(n), str(jobs)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        exponent = ""
        if kind in last and n > last[kind][0]:
            m, seconds = last[kind]
            exponent = f"{math.log(row['seconds'] / seconds) / math.log(n / m):.2f}"
        last[kind] = (n, row["seconds"])
        peak = f"{row['peak']:.2f} | {row['before']:.2f}"
        print(
            f"| {n:,} | {kind} | {row['seconds']:.2f} | {exponent} | {peak} | {row['pairs']:,} | {row['missed']} |",
            flush=True,
        )


if __name__ == "__main__":
    app()
