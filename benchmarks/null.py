"""Does the verdict keep quiet when nothing was done? Pairs of trainings on the same rows, audited like two arms.

    python benchmarks/null.py DIR [--pairs 20] [--steps 160]

Drawings of the demo are planted anew for every pair; two very small models are trained on all rows, copies and all,
with different training seeds, and scored as the two arms of an audit would be. The true difference is 0. Prints how
often the intervals of a verdict hold it, and how much training runs differ: the table of docs/benchmarks.md. The same
command goes on after a kill.
"""

import math
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer

from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.plant import plant
from dedup.sources.demo import render_demo
from defense.config import TrainConfig
from defense.train import train
from eval import stats
from eval.compare import read_run, tabulate
from eval.contrasts import judge_contrast
from eval.extraction import attack
from eval.generate import generate

LEVELS = (0, 4, 16, 64)
SMALL = {"channels": (32, 64), "text_width": 32, "text_layers": 1, "learning_rate": 4e-3, "warmup_steps": 10}


def make_run(directory: Path, pair: int, number: int, steps: int) -> Path:
    """A trained and attacked model: training seed 2 × pair + number, on all rows of the pair's dataset."""
    planted, out, run = (directory / f"{name}-{pair}" for name in ("planted", "out", f"run{number}"))
    plant(directory / "drawings", planted, canaries=16, multiplicities=LEVELS, fillers=16, seed=pair)
    if not (out / "run.json").exists():
        deduplicate(planted, out, Options(level="hash"), jobs=1)
    train(out, "raw", TrainConfig(steps=steps, **SMALL), run, 2 * pair + number)
    generate(run, n=8, steps=8)
    if not (run / "scores-clique.parquet").exists():
        attack(run)
    return run


def read_pair(runs: list[Path], pair: int) -> pl.DataFrame:
    """The rows of comparison.parquet, one run called raw and the other refill."""
    tables = [tabulate(read_run(run)) for run in runs]
    names = ("raw", "refill")
    return pl.concat(
        table.with_columns(arm=pl.lit(name), seed=pl.lit(pair)) for name, table in zip(names, tables, strict=True)
    )


def holds_zero(effect: dict) -> bool:
    low, high = effect["interval"]
    return not (math.isfinite(low) and math.isfinite(high)) or low <= 0 <= high


def between_runs(tables: list[pl.DataFrame]) -> float:
    """Standard deviation of the logits of the share given back, beyond that of drawing so many images."""
    shares = [
        table.filter(pl.col("arm") == arm, pl.col("multiplicity") >= 2)["extracted"].to_numpy()
        for table in tables
        for arm in ("raw", "refill")
    ]
    n = len(shares[0])
    k = np.array([share.sum() for share in shares])
    logit = np.log((k + 0.5) / (n - k + 0.5))
    noise = (1 / (k + 0.5) + 1 / (n - k + 0.5)).mean()
    return math.sqrt(max(0.0, logit.var(ddof=1) - noise))


def main(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Working folder.")],
    pairs: Annotated[int, typer.Option(help="Of trainings; an even number.")] = 20,
    steps: Annotated[int, typer.Option(help="Of training.")] = 160,
) -> None:
    directory = directory.resolve()
    render_demo(directory / "drawings")
    began = time.process_time()
    tables = [read_pair([make_run(directory, pair, number, steps) for number in (0, 1)], pair) for pair in range(pairs)]
    seconds = time.process_time() - began
    single = [judge_contrast(table, ("raw", "refill")) for table in tables]
    double = [
        judge_contrast(pl.concat(tables[first : first + 2]), ("raw", "refill")) for first in range(0, pairs - 1, 2)
    ]
    shares = [table.filter(pl.col("multiplicity") >= 2)["extracted"].mean() for table in tables]
    differences = [found["plain"]["estimate"] for found in single]
    over = stats.t_interval(differences)
    print(f"{pairs} pairs, {seconds:.0f} s of processor time; {np.mean(shares):.0%} of repeated images given back")
    print(f"difference {over.estimate:+.3f} (95 % interval {over.low:+.3f} … {over.high:+.3f}), ", end="")
    print(f"standard deviation {np.std(differences, ddof=1):.3f}; between runs {between_runs(tables):.2f} logits")
    print("\n| interval | of | holds 0 |\n|---|---|---|")
    rows = [
        ("randomisation, one seed", single, lambda found: found["assignment"]),
        ("randomisation, two seeds", double, lambda found: found["assignment"]),
        ("t(1) over two seeds", double, lambda found: found["over_seeds"]),
        ("Tango, these two checkpoints", single, lambda found: found["checkpoints"]["pairs"]),
    ]
    for name, audits, pick in rows:
        held = stats.wilson(sum(holds_zero(pick(found)) for found in audits), len(audits))
        print(f"| {name} | {held.n} | {held.count} ({held.low:.0%} … {held.high:.0%}) |")


if __name__ == "__main__":
    typer.run(main)
