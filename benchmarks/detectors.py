"""How well do detectors and attacks tell what a small model has memorised? Three models a seed, one dataset.

    python benchmarks/detectors.py DIR [--seeds 3] [--config configs/tiny-base.toml]

The demo's planted drawings for every seed, a model fine-tuned on them as they are (raw), one after deduplication and
refill (nothing is repeated), and the untouched base. A folder that `unmemorize demo` has made is used as it is, and the
same command goes on after a kill; two models are trained at a time. Prints the tables of docs/benchmarks.md: the AUC of
each detector among canaries, to which multiplicities were dealt at random, and what each attack extracts.
"""

from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer

from dedup import engine
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.plant import plant
from dedup.sources.demo import render_demo
from defense.adopt import adopt
from defense.config import load_config
from defense.train import train
from eval import metrics, stats
from eval.detectors import BLIND, DETECTORS, detect
from eval.extraction import ATTACKS, attack
from eval.generate import generate, read_config

ARMS = ("raw", "refill", "base")


def make_dataset(directory: Path, seed: int) -> Path:
    """OUT of a seed; nothing is done twice."""
    if (directory / f"raw-{seed}" / "config.json").exists():
        return Path(read_config(directory / f"raw-{seed}")["out"])
    planted, out = directory / f"planted-{seed}", directory / f"dedup-{seed}"
    if not (out / "run.json").exists():
        render_demo(directory / "drawings")
        if not (planted / "plant.parquet").exists():
            plant(directory / "drawings", planted, canaries=24, controls=48, fillers=250, seed=seed)
        deduplicate(planted, out, Options(level="copy", encoder="local"))
    return out


def make_run(out: Path, arm: str, config: Path, run: Path, seed: int) -> None:
    """A model that is trained, attacked and asked; nothing is done twice."""
    chosen = load_config(config)
    if not (run / "config.json").exists() and arm == "base":
        adopt(str(chosen.base), out, run)
    elif not (run / "model").exists():
        train(out, arm, chosen, run, seed)
    if not (run / "generations.parquet").exists():
        generate(run)


def describe_seeds(effects: list[dict[str, Any]]) -> str:
    """One seed: estimate and interval. Several: their mean, Student's t over the seeds, and each of them."""
    if len(effects) == 1:
        effect = effects[0]
        return f"{effect['estimate']:.3f} ({effect['low']:.3f} … {effect['high']:.3f})"
    values = [effect["estimate"] for effect in effects]
    mean = stats.t_interval(values)
    each = ", ".join(f"{value:.3f}" for value in values)
    return f"{mean.estimate:.3f} ({max(0, mean.low):.3f} … {min(1, mean.high):.3f}; {each})"


def print_detectors(summaries: dict[str, list[dict[str, Any]]]) -> None:
    first = summaries["raw"][0]
    positives, negatives = first["positives"], first["negatives"]
    print(f"{positives} captions of images that stand {first['at_least']} times or more, {negatives} others")
    print("\n| AUC | raw | refill | base | raw, all prompts | 5 % false | precision at 94 of 350,000 | beats blind |")
    print("|---|---|---|---|---|---|---|---|")
    for name in (*DETECTORS, BLIND):
        found = {arm: [summary["detectors"][name] for summary in mine] for arm, mine in summaries.items()}
        cells = [describe_seeds([result["auc"] for result in found[arm]]) for arm in ARMS]
        cells.append(describe_seeds([result["auc_all"] for result in found["raw"]]))
        cells.append(", ".join(f"{result['tpr_at_fpr']['0.05']['tpr']['estimate']:.0%}" for result in found["raw"]))
        cells.append("at least " + ", ".join(f"{result['precision']['low']:.2g}" for result in found["raw"]))
        beats = sum(result["beats_blind"] for result in found["raw"])
        cells.append("" if name == BLIND else f"{beats} of {len(found['raw'])}")
        print(f"| {name} | {' | '.join(cells)} |")


def print_attacks(runs: dict[str, list[Path]]) -> None:
    print("\n| attack | model | of images planted twice or more | never planted | generations of another picture |")
    print("|---|---|---|---|---|")
    for name in ATTACKS:
        for arm in ARMS:
            rows = pl.concat([pl.read_parquet(run / f"scores-{name}.parquet") for run in runs[arm]])
            print_counts(name, arm, rows, None if name == "template" else "wrong_matches")
            if name == "adaptive":
                lax = rows.with_columns(extracted=pl.col("matches_at_one") > 0)
                print_counts("adaptive, cut 1, own prompt", arm, lax, "wrong_at_one")


def print_counts(name: str, arm: str, rows: pl.DataFrame, wrong: str | None) -> None:
    """wrong: the column of generations that give back another picture; None where controls have nothing to match."""
    cells = [count(rows.filter(pl.col("multiplicity") >= 2))]
    if wrong is None:
        cells += ["no templates", "-"]
    else:
        made = int((rows["n_generations"] - rows["n_nan"]).sum())
        cells += [count(rows.filter(multiplicity=0)), f"{rows[wrong].sum()} of {made:,}"]
    print(f"| {name} | {arm} | {' | '.join(cells)} |")


def count(rows: pl.DataFrame) -> str:
    found = metrics.rate(int(rows["extracted"].sum()), len(rows))
    return f"{found.count} of {found.n} ({found.low:.0%} … {found.high:.0%})"


def main(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Working folder, or one made by `unmemorize demo`.")],
    seeds: Annotated[int, typer.Option(help="Training seeds, each with its own planting.")] = 3,
    config: Annotated[Path, typer.Option(help="Of training; with a base.")] = Path("configs/tiny-base.toml"),
    n: Annotated[int, typer.Option("-n", help="Noises a prompt.")] = 4,
) -> None:
    directory = directory.resolve()
    outs = [make_dataset(directory, seed) for seed in range(seeds)]
    runs = {arm: [directory / f"{arm}-{seed}" for seed in range(seeds)] for arm in ARMS}
    tasks = [(outs[seed], arm, config, run, seed) for arm, mine in runs.items() for seed, run in enumerate(mine)]
    list(engine.run(make_run, tasks, jobs=2))
    print_detectors({arm: [detect(run, n=n) for run in mine] for arm, mine in runs.items()})
    for run in (run for mine in runs.values() for run in mine):
        for name in ATTACKS:
            attack(run, name)
    print_attacks(runs)


if __name__ == "__main__":
    typer.run(main)
