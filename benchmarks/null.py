"""Does the verdict keep quiet when nothing was done, or the wrong thing? Very small models, audited like arms.

    python benchmarks/null.py pairs DIR [--pairs 20] [--steps 160]
    python benchmarks/null.py sabotage DIR [--seeds 2] [--steps 640]

Drawings of the demo are planted anew for every training seed. `pairs`: two models are trained on all rows, copies and
all, with different training seeds, and scored as the two arms of an audit would be. The true difference is 0. Prints
how often the intervals of a verdict hold it, and how much training runs differ. `sabotage`: beside the refilled arm of
a real deduplication stands that of one which drops as many unique rows at random and keeps every copy. The verdict has
to see the first and not the second. The same command goes on after a kill.
"""

import math
import shutil
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer

from dedup import manifest
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.plant import plant
from dedup.sources.demo import render_demo
from defense.config import TrainConfig
from defense.train import train
from eval import stats
from eval.compare import compare, read_run, tabulate
from eval.contrasts import judge_contrast
from eval.extraction import attack
from eval.generate import generate

LEVELS = (0, 4, 16, 64)
FEW = (0, 1, 16, 64)  # of the sabotage: half of the canaries stand often, half once or never
app = typer.Typer(add_completion=False)
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


@app.command()
def pairs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Working folder.")],
    number: Annotated[int, typer.Option("--pairs", help="Of trainings; an even number.")] = 20,
    steps: Annotated[int, typer.Option(help="Of training.")] = 160,
) -> None:
    directory = directory.resolve()
    render_demo(directory / "drawings")
    began = time.process_time()
    tables = [read_pair([make_run(directory, pair, n, steps) for n in (0, 1)], pair) for pair in range(number)]
    seconds = time.process_time() - began
    single = [judge_contrast(table, ("raw", "refill")) for table in tables]
    double = [
        judge_contrast(pl.concat(tables[first : first + 2]), ("raw", "refill")) for first in range(0, number - 1, 2)
    ]
    shares = [table.filter(pl.col("multiplicity") >= 2)["extracted"].mean() for table in tables]
    differences = [found["plain"]["estimate"] for found in single]
    over = stats.t_interval(differences)
    print(f"{number} pairs, {seconds:.0f} s of processor time; {np.mean(shares):.0%} of repeated images given back")
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


def sabotage(out: Path, seed: int) -> Path:
    """OUT-sabotaged: as many rows are dropped as in OUT, but unique ones at random, and every copy is kept."""
    spoiled = out.with_name(f"{out.name}-sabotaged")
    if (spoiled / "manifest").exists():  # written last
        return spoiled
    rows = manifest.read(out)
    rng = np.random.default_rng(seed)
    unique = rows.filter("keep", pl.col("represents") == 1)["id"].to_numpy()
    dropped = np.sort(rng.choice(unique, int((~rows["keep"]).sum()), replace=False))
    rows = rows.with_columns(keep=~pl.col("id").is_in(dropped), captions=pl.lit([], pl.List(pl.String)))
    standing = rows.filter("keep")["id"].to_numpy()
    named = pl.DataFrame(
        {"id": dropped, "kept_id": rng.choice(standing, len(dropped))}, schema_overrides={"kept_id": pl.Int64}
    )
    stands_for = named.group_by(id="kept_id").agg(others=pl.len())
    rows = rows.drop("kept_id", "reason").join(named, on="id", how="left").join(stands_for, on="id", how="left")
    represents = pl.when("keep").then(1 + pl.col("others").fill_null(0)).otherwise(0)
    reason = pl.when(~pl.col("keep")).then(pl.lit("hash"))
    rows = manifest.conform(rows.sort("id").with_columns(represents=represents, reason=reason))
    shutil.copytree(out, spoiled, ignore=shutil.ignore_patterns("manifest"))
    manifest.write(spoiled, rows.select(list(manifest.SCHEMA)))
    return spoiled


@app.command("sabotage")
def compare_sabotage(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Working folder.")],
    seeds: Annotated[int, typer.Option(help="Training seeds.")] = 2,
    steps: Annotated[int, typer.Option(help="Of training.")] = 640,
) -> None:
    directory = directory.resolve()
    render_demo(directory / "drawings")
    began = time.process_time()
    runs: dict[str, list[Path]] = {"raw": [], "real": [], "sabotaged": []}
    for seed in range(seeds):
        planted, out = directory / f"planted-few-{seed}", directory / f"out-few-{seed}"
        options = {"multiplicities": FEW, "fillers": 340, "edited": 0.0, "seed": seed}
        plant(directory / "drawings", planted, canaries=16, **options)
        if not (out / "run.json").exists():
            deduplicate(planted, out, Options(level="hash"), jobs=1)
        for name, source, arm in (
            ("raw", out, "raw"),
            ("real", out, "refill"),
            ("sabotaged", sabotage(out, seed), "refill"),
        ):
            run = directory / f"{name}-{seed}"
            if not (run / "model").exists():
                train(source, arm, TrainConfig(steps=steps, **SMALL), run, seed)
            config = manifest.read_json(run / "config.json")  # all models of a seed are measured by the same pictures
            manifest.write_json(run / "config.json", config | {"out": str(out)})
            generate(run, n=8, steps=8)
            attack(run)
            runs[name].append(run)
    print(f"{time.process_time() - began:.0f} s of processor time")
    print("\n| deduplication | raw gave back | the refilled arm | difference, points | p |\n|---|---:|---:|---:|---:|")
    for name in ("real", "sabotaged"):
        found = compare(runs["raw"] + runs[name], directory / f"audit-{name}")["primary"]
        counts, n = found["counts"], found["n_pairs"]
        low, high = found["interval"]
        back = [f"{counts['both'] + counts[side]} of {n}" for side in ("only_a", "only_b")]
        points = f"{100 * found['estimate']:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})"
        print(f"| {name} | {back[0]} | {back[1]} | {points} | {found['p_value']:.3g} |")


if __name__ == "__main__":
    app()
