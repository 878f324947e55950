"""How many exposures does extraction take? One model a seed, trained on at most 600 rows, two at a time, one core each.

    python benchmarks/exposures.py DIR [--config configs/tiny-base.toml] [--seeds 2] [--arm raw]

Plants 24 drawings 0, 1, 2, 4 … 64 times among 219 others (600 rows; 48 further drawings stand nowhere), and for every
seed anew. Trains, draws 16 images a caption and looks for the drawings among them. The untouched base, if the config
has one, is asked the same (`adopt`): it must give nothing back. A model without captions draws as many images for no
caption, and is attacked by `adaptive`. Prints the tables of docs/benchmarks.md and whether
the aim holds: at least 80 % of the drawings that stand 64 times come back, none of those that stand nowhere, within ten
minutes. The same command goes on after a kill; times and memory are of the parts that were trained in one go.
"""

import resource
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer

from dedup import engine, manifest
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.plant import plant
from dedup.sources.demo import render_demo
from defense.adopt import adopt
from defense.config import load_config
from defense.train import train
from eval.extraction import attack
from eval.generate import generate

PICTURES = {"canaries": 24, "controls": 48, "fillers": 219}
ATTACKS = {"tiny": "clique", "tiny-uncond": "adaptive"}
AIM, MINUTES = 0.8, 10


def make_dataset(directory: Path, seed: int) -> Path:
    planted, out = directory / f"planted-{seed}", directory / f"dedup-{seed}"
    if not (out / "run.json").exists():
        render_demo(directory / "drawings")
        if not (planted / "plant.parquet").exists():
            plant(directory / "drawings", planted, **PICTURES, seed=seed)
        deduplicate(planted, out, Options(level="copy", encoder="local"))
    return out


def train_and_attack(out: Path, arm: str, config: Path, run: Path, seed: int, n: int) -> int:
    """Peak memory of the process in MiB."""
    chosen = load_config(config)
    train(out, arm, chosen, run, seed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    generate(run, n=n)
    attack(run, ATTACKS[chosen.model])
    return peak


def describe_run(run: Path, peak: int) -> dict[str, Any]:
    timings = manifest.read_json(run / "timings.json")
    steps, seconds = timings["steps"], timings["train"]
    return {"run": run.name, "steps": steps, "seconds": seconds, "images/s": timings["images_per_second"], "MiB": peak}


def count_found(runs: list[Path], name: str) -> pl.DataFrame:
    """A row a multiplicity: over all runs, exposures of a drawing, drawings found, images that are one of them."""
    parts = []
    for run in runs:
        scores = pl.read_parquet(run / f"scores-{name}.parquet")
        plants = pl.read_parquet(Path(manifest.read_json(run / "config.json")["out"]) / "plant.parquet")
        seen = pl.DataFrame(schema={"key": pl.String, "exposures": pl.Int64})
        if (run / "exposures.parquet").exists():
            seen = pl.read_parquet(run / "exposures.parquet", columns=["key", "exposures"])
        doses = plants.join(seen, on="key", how="left").group_by("canary").agg(pl.col("exposures").sum())
        parts.append(scores.join(doses, left_on="target_id", right_on="canary", how="left"))
    rows = pl.concat(parts)
    told = {"clique": [pl.col("best_distance", "delta").median().round(3)], "adaptive": []}[name]
    images = {"clique": "matches", "adaptive": "from_any"}[name]  # of those for its own caption, or of all
    return (
        rows.group_by("multiplicity")
        .agg(
            pl.len().alias("drawings"),
            pl.col("exposures").mean().round(0),
            pl.col("extracted").sum(),
            pl.col(images).sum().alias("images"),
            (pl.col("n_generations").sum() if name == "clique" else pl.lit(rows["n_generations"].sum())).alias("of"),
            *told,
        )
        .sort("multiplicity", descending=True)
    )


def main(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Working folder.")],
    config: Annotated[Path, typer.Option(help="What is trained, and how.")] = Path("configs/tiny-base.toml"),
    arm: Annotated[str, typer.Option(help="What it is trained on.")] = "raw",
    seeds: Annotated[int, typer.Option(help="Training seeds, each with its own planting.")] = 2,
    n: Annotated[int, typer.Option("-n", help="Images a prompt.")] = 16,
) -> None:
    directory = directory.resolve()
    outs = [make_dataset(directory, seed) for seed in range(seeds)]
    for out in outs:
        print(f"{out.name}: {len(manifest.read(out))} rows")
    runs = [directory / f"{config.stem}-{arm}-{seed}" for seed in range(seeds)]
    tasks = [(out, arm, config, run, seed, n) for seed, (out, run) in enumerate(zip(outs, runs, strict=True))]
    peaks = engine.run(train_and_attack, tasks, jobs=2)
    told = [describe_run(run, peak) for run, peak in zip(runs, peaks, strict=True)]
    chosen = load_config(config)
    name = ATTACKS[chosen.model]
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_formatting="MARKDOWN", tbl_hide_dataframe_shape=True):
        print(pl.DataFrame(told))
        found = count_found(runs, name)
        print(found)
        if chosen.base:
            control = directory / "untouched"
            adopt(chosen.base, outs[0], control)
            generate(control, n=n)
            attack(control)
            print("untouched base:", count_found([control], name).drop("exposures"), sep="\n")
    most, none = found.filter(multiplicity=64), found.filter(multiplicity=0)
    share, false = most["extracted"].sum() / most["drawings"].sum(), none["extracted"].sum()
    slowest = max(row["seconds"] for row in told)
    holds = share >= AIM and false == 0 and slowest <= 60 * MINUTES
    print(
        f"64 times: {share:.0%} come back; never: {false}; {slowest / 60:.1f} minutes: {'holds' if holds else 'MISSED'}"
    )


if __name__ == "__main__":
    typer.run(main)
