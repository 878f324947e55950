"""What do defences at sampling time buy on a small model, and what do they cost? Raw models of several seeds.

    python benchmarks/guards.py DIR [--seeds 3] [--guard NAME[=NUMBER] …]

DIR holds raw-N, trained on dedup-N as `benchmarks/detectors.py` makes them. Each guard draws 16 images for every
planted canary and as many that never were, with the seeds of the unguarded model; the attack is the usual one and knows
nothing of guards. Prints the table of docs/benchmarks.md; the same command goes on after a kill. The price is measured
on the canaries that were never planted, whose pictures no model has seen.
"""

import shutil
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer

from defense.copy_guard import load_small
from defense.distances import l2
from eval import metrics
from eval.extraction import attack, read_images
from eval.generate import generate, read_config
from eval.targets import load_targets

NONE = "none"
NEAR = 1.5  # δ up to which an image still looks like the training picture to many
EVERY = (
    NONE,
    "random-tokens=2",
    "repeat-words=2",
    "random-numbers=2",
    "random-caption=1",
    "embedding=50",
    "static-guidance=0.5",
    "dynamic-guidance=0",
    "copy=5",
)


def draw(run: Path, guard: str, folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Generations and scores of a run behind a guard, kept in `folder`."""
    paths = [folder / f"{run.name}-{guard}-{name}.parquet" for name in ("generations", "scores", "guards")]
    if not paths[1].exists():
        folder.mkdir(exist_ok=True)
        prompts = write_prompts(run, folder)
        generations = generate(run, prompts=prompts, guards=[] if guard == NONE else [guard])
        scores = attack(run)
        generations.write_parquet(paths[0])
        if guard != NONE:
            shutil.copy(run / "guards.parquet", paths[2])
        scores.write_parquet(paths[1])
    return pl.read_parquet(paths[0]), pl.read_parquet(paths[1])


def write_prompts(run: Path, folder: Path) -> Path:
    """Captions of all planted canaries of the run, and of as many controls."""
    targets = load_targets(Path(read_config(run)["out"]))
    members, controls = (targets.filter(prompt_kind=kind) for kind in ("member", "control"))
    path = folder / f"{run.name}-prompts.csv"
    pl.concat([members, controls.head(len(members))]).select("target_id", "prompt").write_csv(path)
    return path


def measure_price(run: Path, plain: pl.DataFrame, guarded: pl.DataFrame) -> dict[str, float]:
    """Of prompts whose pictures were never trained on.

    refused: share of images. moved: ℓ2 between the images of one seed with and without the guard, over that between two
    unguarded images of one prompt: at 1 the guard gives another image, as another seed would. told: share of images
    nearer to the mean unguarded image of their own prompt than to that of any other; its own seed is left out.
    """
    side = read_config(run)["config"]["resolution"]
    never = [table.filter(prompt_kind="control") for table in (plain, guarded)]
    joined = never[0].join(never[1].select("prompt_id", "seed", other="file"), on=["prompt_id", "seed"])
    groups = [group for _, group in joined.group_by("prompt_id", maintain_order=True)]
    usual = [read_images(run, group["file"], side) for group in groups]
    means = np.stack([images.mean(axis=0) for images in usual])
    moved, spread, told = [], [], []
    for place, (group, images) in enumerate(zip(groups, usual, strict=True)):
        distances = l2(images, images)
        spread += [distances[i, j] for i, j in combinations(range(len(images)), 2)]
        there = group["other"].is_not_null().to_numpy()
        if not there.any():
            continue
        others = read_images(run, group["other"].drop_nulls(), side)
        moved += list(np.sqrt(((others - images[there]) ** 2).mean(axis=(1, 2, 3))))
        for image, own in zip(others, images[there], strict=True):
            rest = means.copy()
            rest[place] = (means[place] * len(images) - own) / (len(images) - 1)
            told.append(int(l2(image[None], rest)[0].argmin()) == place)
    refused = float((never[1]["status"] == "refused").mean())
    return {"refused": refused, "moved": float(np.mean(moved) / np.mean(spread)), "told": float(np.mean(told))}


def count(scores: list[pl.DataFrame], condition: pl.Expr, within: float = 1.0) -> str:
    """Targets with an image within so many δ, in all seeds and in each."""
    near = (pl.col("best_distance") <= within * pl.col("delta")).fill_null(False)
    each = [table.filter(condition).select(near).to_series() for table in scores]
    found = metrics.rate(sum(int(hits.sum()) for hits in each), sum(map(len, each)))
    by_seed = ", ".join(str(int(hits.sum())) for hits in each)
    return f"{found.count} of {found.n} ({found.low:.0%} … {found.high:.0%}; {by_seed})"


def main(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Has raw-0, raw-1, …")],
    seeds: Annotated[int, typer.Option(help="How many of them.")] = 3,
    guard: Annotated[list[str] | None, typer.Option(metavar="NAME[=NUMBER]", help="All by default.")] = None,
) -> None:
    runs = [(directory / f"raw-{seed}").resolve() for seed in range(seeds)]
    for run in runs:
        config = read_config(run)
        known = load_small(Path(config["out"]), config["config"]["resolution"])
        print(f"{run.name}: {len(known.rows)} pictures, {known.false_alarms:.1%} false alarms of the copy guard")
    counted = f"of images planted twice or more | within {NEAR:g} δ | generations that match"
    print(f"| guard | {counted} | never planted | refused | moved | told |")
    print("|---|---|---|---|---|---|---|---|")
    for name in guard or EVERY:
        drawn = [draw(run, name, directory / "guarded") for run in runs]
        scores = [found for _, found in drawn]
        repeated = pl.concat(scores).filter(pl.col("multiplicity") >= 2)
        matches = f"{repeated['matches'].sum()} of {repeated['n_generations'].sum():,}"
        plain = [draw(run, NONE, directory / "guarded")[0] for run in runs]
        prices = [measure_price(*row) for row in zip(runs, plain, [found for found, _ in drawn], strict=True)]
        price = pl.DataFrame(prices).mean().row(0, named=True)
        often, never = pl.col("multiplicity") >= 2, pl.col("multiplicity") == 0
        cells = [count(scores, often), count(scores, often, NEAR), matches]
        cells.append(f"{count(scores, never)}, within {NEAR:g} δ {count(scores, never, NEAR)}")
        cells += [f"{price['refused']:.1%}", f"{price['moved']:.2f}", f"{price['told']:.0%}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
