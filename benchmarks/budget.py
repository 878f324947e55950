"""How many of the full schedule's extractions does `generate --budget` find, at what share of its cost?

    python benchmarks/budget.py SRC DIR [--seeds 3] [-n 64]

SRC: a folder that `benchmarks/detectors.py` or `unmemorize demo` has made: the models raw-0, raw-1 … of planted
drawings. The dataset is taken as anybody's: without the truth of what was planted, so fillers are prompts as well, and
100 drawings that stand nowhere in it are controls. The full schedule of n images is evaluated for every picture that
stands twice or more and a random 10 of the others (of the first seed also the 20 highest of a detector): all would
take hours. The rule is the cheapest of a grid that finds 95 % on the first seed, and is judged on the others. Goes on
after a kill. Prints the tables of docs/benchmarks.md.
"""

import hashlib
import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer

from dedup import manifest
from dedup.options import Options
from dedup.pipeline import deduplicate
from eval import metrics
from eval.budget import EVALUATIONS, Rule, choose, generate_within, list_rounds, run_rounds
from eval.calibrate import calibrate
from eval.detectors import score_prompts
from eval.extraction import attack, read_images, score_clique
from eval.generate import derive_seed, generate, open_model
from eval.targets import load_targets
from eval.yardstick import load_yardstick

DETECTORS = ("noise-magnitude", "one-step", "anisotropy")
CONTROLS, OTHERS, TOP = 100, 10, 20
GRID = {"spread": (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0), "first": (1, 2, 4, 8), "near": (1.0, 1.2, 1.5, 2.0)}
STEPS = 15
NOTHING = {"extracted": False, "best_distance": 1.0, "delta": 0.0}
ALL = 100_000


def make_run(source: Path, directory: Path, seed: int) -> Path:
    """A copy of the model and of its dedup run, without the truth."""
    run, out = directory / f"raw-{seed}", directory / f"plain-{seed}"
    if not out.exists():
        shutil.copytree(source / f"dedup-{seed}", out)
        (out / "plant.parquet").unlink()
    if not (run / "model").exists():
        run.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source / f"raw-{seed}" / "model", run / "model")
        shutil.copy(source / f"raw-{seed}" / "config.json", run)
    manifest.write_json(run / "config.json", manifest.read_json(run / "config.json") | {"out": str(out)})
    return run


def list_targets(run: Path, controls: Path) -> pl.DataFrame:
    """Members and CONTROLS controls with the score of every detector (one noise)."""
    path = run / "budget-targets.parquet"
    if not path.exists():
        targets = load_targets(run.parent / run.name.replace("raw", "plain"), limit=ALL, controls=controls)
        targets = pl.concat(
            [targets.filter(prompt_kind="member"), targets.filter(prompt_kind="control").head(CONTROLS)]
        )
        seeds = [[derive_seed(target, 0)] for target in targets["target_id"]]
        scores = score_prompts(open_model(run), targets["prompt"].to_list(), seeds, DETECTORS)
        manifest.write_parquet(path, targets.with_columns(**{name: pl.Series(v) for name, v in scores.items()}))
    return pl.read_parquet(path)


def list_full(targets: pl.DataFrame, top: int) -> pl.DataFrame:
    """Those that get the full schedule."""
    sure = targets.filter(pl.col("multiplicity") >= 2)["target_id"].to_list()
    sure += targets.sort(DETECTORS[0], descending=True)["target_id"].head(top).to_list()
    rest = targets.filter(~pl.col("target_id").is_in(sure))["target_id"]
    sure += sorted(rest, key=lambda name: hashlib.blake2b(name.encode()).hexdigest())[:OTHERS]
    return targets.filter(pl.col("target_id").is_in(sure)).select("target_id", "prompt")


def follow(run: Path, asked: pl.DataFrame, controls: Path, n: int) -> dict[str, dict[int, dict[str, Any]]]:
    """Target → what the attack says after each round of the full schedule."""
    path = run / f"ask-{n}.csv"
    asked.write_csv(path)
    table = generate(run, n=n, steps=STEPS, prompts=path, limit=ALL, controls=controls)
    out, side = Path(manifest.read_json(run / "config.json")["out"]), 32
    yardstick = load_yardstick(out, side, only=asked["target_id"], controls=controls)
    calibration = calibrate(yardstick)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for place, target in enumerate(yardstick.targets["target_id"]):
        images = read_images(run, table.filter(prompt_id=target)["file"], side)
        found[target] = {k: score_clique(images[:k], place, yardstick, calibration, n) for k in list_rounds(n)}
    return found


def replay(rule: Rule, targets: pl.DataFrame, known: dict[str, dict[int, dict[str, Any]]], n: int) -> tuple[float, int]:
    """Share of the cost and extractions found, from images that are there; what is not known gives nothing back."""
    assert rule.detector is not None
    chosen = choose([targets[rule.detector].to_numpy()], rule.spread)
    candidates = targets["target_id"].filter(pl.Series(chosen)).to_list()

    def look(target: str, images: int) -> list[dict[str, Any]]:
        return [known[target][images] if target in known else NOTHING]

    drawn = run_rounds(rule, candidates, n, look)
    hits = sum(known[name][images]["extracted"] for name, images in drawn.items() if name in known)
    cost = EVALUATIONS[rule.detector] * len(targets) + sum(drawn.values()) * STEPS
    return cost / (len(targets) * n * STEPS), hits


def tune(targets: pl.DataFrame, known: dict[str, dict[int, dict[str, Any]]], n: int) -> tuple[Rule, list[tuple]]:
    """The cheapest rule that finds 95 % of what the full schedule finds; the best of each cost beside."""
    every = sum(rounds[n]["extracted"] for rounds in known.values())
    tried = []
    for detector, *values in itertools.product(DETECTORS, *GRID.values()):
        rule = Rule(detector=detector, check=0.0, **dict(zip(GRID, values, strict=True)))
        tried.append((*replay(rule, targets, known, n), rule))
    enough = [each for each in tried if each[1] >= 0.95 * every] or sorted(tried, key=lambda each: -each[1])[:1]
    return min(enough, key=lambda each: each[0])[2], [(each[0], each[1] / every, each[2]) for each in tried]


def print_row(seed: int, about: dict[str, Any], hits: set[str], full: set[str], tested: set[str], kinds: dict) -> None:
    """One judged seed: found of the full schedule's extractions, its cost, and false matches."""
    found = metrics.rate(len(hits & full), len(full))
    wrong = sum(kinds[name] == "control" for name in hits)
    right = metrics.rate(len(hits) - wrong, len(hits))
    others = len(kinds) - len(full)
    print(
        f"| {seed} | {len(kinds)} ({len(full)} extracted by the full schedule, 1 to {others / max(1, len(full)):.0f} "
        f"others) | {about['evaluations']['share']:.2%} | {found.count} of {found.n} "
        f"({found.low:.0%} … {found.high:.0%}) | {len((hits - full) & tested)} beyond | "
        f"{right.count} of {right.n} ({right.low:.0%} … 100 %) |"
    )


def main(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="With raw-0 …, dedup-0 … and drawings.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Working folder.")],
    seeds: Annotated[int, typer.Option(help="The first tunes, the others judge.")] = 3,
    n: Annotated[int, typer.Option("-n", help="Images a prompt in the full schedule.")] = 64,
) -> None:
    directory = directory.resolve()
    controls = directory / "drawings-dedup"
    if not (controls / "run.json").exists():
        deduplicate(source / "drawings", controls, Options(level="exact"), jobs=1)
    rule = Rule()
    for seed in range(seeds):
        run = make_run(source, directory, seed)
        targets = list_targets(run, controls)
        known = follow(run, list_full(targets, TOP if seed == 0 else 0), controls, n)
        full = {name for name, rounds in known.items() if rounds[n]["extracted"]}
        kinds = dict(targets.select("target_id", "prompt_kind").iter_rows())
        if seed == 0:
            rule, tried = tune(targets, known, n)
            print(f"tuned on seed 0 ({len(full)} extracted of {len(kinds)} prompts): {rule}")
            print("| at most, of the full schedule | most found |\n|---|---|")
            for limit in (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1):
                cheap = [share for cost, share, _ in tried if cost <= limit]
                print(f"| {limit:.2%} | {max(cheap, default=0):.0%} |")
            print("| seed | prompts | cost | found of them | more | precision |\n|---|---|---|---|---|---|")
        path = run / "everybody.csv"
        targets.select("target_id", "prompt").write_csv(path)
        options = {"n": n, "guidance_scale": 1.0, "steps": STEPS, "prompts": path, "limit": ALL, "controls": controls}
        about = generate_within([run], replace(rule, check=0.0), **options)
        hits = set(attack(run).filter("extracted")["target_id"])
        print_row(seed, about, hits, full, set(known), kinds)


if __name__ == "__main__":
    typer.run(main)
