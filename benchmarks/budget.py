"""How many of the full schedule's extractions does `generate --budget` find, at what share of its cost?

    python benchmarks/budget.py SRC DIR [--seeds 6] [--tuned 3] [-n 64]

SRC: a folder that `benchmarks/detectors.py` or `unmemorize demo` has made: the models raw-0, raw-1 … of planted
drawings. The dataset is taken as anybody's: without the truth of what was planted, so fillers are prompts as well, and
100 drawings that stand nowhere in it are controls. The full schedule of n images is evaluated for every picture that
stands twice or more and a random 30 of the others (of the seeds that tune also the 20 that a detector and a draft put
first): all would take hours. Of a grid of rules that cost at most 1 % on the first seeds the one is taken that finds
most there, among equals the most generous one, and it is judged on the others. Goes on after a kill. Prints the tables
of docs/benchmarks.md.
"""

import hashlib
import itertools
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer

from dedup import manifest
from dedup.options import Options
from dedup.pipeline import deduplicate
from eval import metrics
from eval.budget import draft, generate_within, open_arm
from eval.calibrate import calibrate
from eval.detectors import score_prompts
from eval.extraction import attack, read_images, score_clique
from eval.generate import derive_seed, generate, open_model
from eval.rule import DRAFT, Rule, choose, count_evaluations, list_rounds, run_rounds
from eval.targets import load_targets
from eval.yardstick import load_yardstick

DETECTORS = ("noise-magnitude", "one-step", "anisotropy")
CONTROLS, OTHERS, TOP = 100, 30, 20
DRAFTS = (1, 2, 3, 4)  # steps
WITHIN, SPREAD = (1.0, 1.1, 1.2, 1.35, 1.5, 2.0), (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
ROUNDS = {"first": (1, 2, 4), "near": (1.0, 1.2, 1.5, 2.0)}
LIMIT = 0.01  # of the full schedule
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
    """Members and CONTROLS controls with the score of every detector and draft (one noise)."""
    path, asked = run / "budget-targets.parquet", run / "everybody.csv"
    if not path.exists():
        targets = load_targets(run.parent / run.name.replace("raw", "plain"), limit=ALL, controls=controls)
        targets = pl.concat(
            [targets.filter(prompt_kind="member"), targets.filter(prompt_kind="control").head(CONTROLS)]
        )
        targets.select("target_id", "prompt").write_csv(asked)
        seeds = [[derive_seed(target, 0)] for target in targets["target_id"]]
        scores = score_prompts(open_model(run), targets["prompt"].to_list(), seeds, DETECTORS)
        for steps in DRAFTS:
            rule = Rule(draft_steps=steps)
            scores[f"{DRAFT}-{steps}"] = draft(open_arm(run, rule, (), ask(asked, controls, 4)), rule)
        manifest.write_parquet(path, targets.with_columns(**{name: pl.Series(v) for name, v in scores.items()}))
    return pl.read_parquet(path)


def ask(prompts: Path, controls: Path, n: int) -> dict[str, Any]:
    """Options of `generate`."""
    return {"n": n, "guidance_scale": 1.0, "steps": STEPS, "prompts": prompts, "limit": ALL, "controls": controls}


def list_full(targets: pl.DataFrame, top: int) -> pl.DataFrame:
    """Those that get the full schedule."""
    sure = targets.filter(pl.col("multiplicity") >= 2)["target_id"].to_list()
    for name in (DETECTORS[0], f"{DRAFT}-2"):
        sure += targets.sort(name, descending=True)["target_id"].head(top).to_list()
    rest = targets.filter(~pl.col("target_id").is_in(sure))["target_id"]
    sure += sorted(rest, key=lambda name: hashlib.blake2b(name.encode()).hexdigest())[:OTHERS]
    return targets.filter(pl.col("target_id").is_in(sure)).select("target_id", "prompt")


def follow(run: Path, asked: pl.DataFrame, controls: Path, n: int) -> dict[str, dict[int, dict[str, Any]]]:
    """Target → what the attack says after each round of the full schedule."""
    path = run / f"ask-{n}.csv"
    asked.write_csv(path)
    table = generate(run, **ask(path, controls, n))
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
    chosen = choose(rule, [np.array([look for _, look in list_looks(rule, targets)])])
    candidates = targets["target_id"].filter(pl.Series(chosen)).to_list()

    def look(target: str, images: int) -> list[dict[str, Any]]:
        return [known[target][images] if target in known else NOTHING]

    drawn = run_rounds(rule, candidates, n, look)
    hits = sum(known[name][images]["extracted"] for name, images in drawn.items() if name in known)
    cost = count_evaluations(rule, 1) * len(targets) + sum(drawn.values()) * STEPS
    return cost / (len(targets) * n * STEPS), hits


def list_looks(rule: Rule, targets: pl.DataFrame) -> list[tuple[str, float]]:
    """Every target with what the rule is told of it."""
    name = f"{DRAFT}-{rule.draft_steps}" if rule.detector == DRAFT else rule.detector
    return targets.select("target_id", pl.col(str(name))).rows()


def list_rules() -> list[Rule]:
    looks = [{"detector": name, "spread": spread} for name in DETECTORS for spread in SPREAD]
    looks += [{"detector": DRAFT, "draft_steps": steps, "within": within} for steps in DRAFTS for within in WITHIN]
    rounds = [dict(zip(ROUNDS, values, strict=True)) for values in itertools.product(*ROUNDS.values())]
    return [Rule(check=0.0, **look, **each) for look in looks for each in rounds]


def tune(seeds: list[tuple[pl.DataFrame, dict[str, dict[int, dict[str, Any]]]]], n: int) -> Rule:
    """The most generous of the rules that find most at LIMIT. Prints what detectors and drafts find by cost."""
    every = sum(rounds[n]["extracted"] for _, known in seeds for rounds in known.values())
    tried = []
    for rule in list_rules():
        costs, hits = zip(*(replay(rule, targets, known, n) for targets, known in seeds), strict=True)
        tried.append((sum(costs) / len(costs), sum(hits), rule))
    print(f"| at most, of the full schedule | detectors find, of {every} | drafts find |\n|---|---|---|")
    for limit in (0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05):
        most = [
            max((hits for cost, hits, rule in tried if cost <= limit and (rule.detector == DRAFT) == drafts), default=0)
            for drafts in (False, True)
        ]
        print(f"| {limit:.2%} | {most[0]} | {most[1]} |")
    return max((each for each in tried if each[0] <= LIMIT), key=lambda each: (each[1], each[0]))[2]


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
    seeds: Annotated[int, typer.Option(help="Models.")] = 6,
    tuned: Annotated[int, typer.Option(help="The first so many tune, the others judge.")] = 3,
    n: Annotated[int, typer.Option("-n", help="Images a prompt in the full schedule.")] = 64,
) -> None:
    directory = directory.resolve()
    controls = directory / "drawings-dedup"
    if not (controls / "run.json").exists():
        deduplicate(source / "drawings", controls, Options(level="exact"), jobs=1)
    runs = [make_run(source, directory, seed) for seed in range(seeds)]
    tables = [list_targets(run, controls) for run in runs]
    found = [
        follow(run, list_full(targets, TOP if seed < tuned else 0), controls, n)
        for seed, (run, targets) in enumerate(zip(runs, tables, strict=True))
    ]
    rule = tune(list(zip(tables[:tuned], found[:tuned], strict=True)), n)
    print(f"\n{rule}\n")
    missed: list[tuple[int, float]] = []
    print("| seed | prompts | cost | found of them | more | precision |\n|---|---|---|---|---|---|")
    for seed, (run, targets, known) in enumerate(zip(runs, tables, found, strict=True)):
        full = {name for name, rounds in known.items() if rounds[n]["extracted"]}
        about = generate_within([run], rule, **ask(run / "everybody.csv", controls, n))
        hits = set(attack(run).filter("extracted")["target_id"])
        print_row(seed, about, hits, full, set(known), dict(targets.select("target_id", "prompt_kind").iter_rows()))
        missed += [(known[name][n]["matches"], look) for name, look in list_looks(rule, targets) if name in full - hits]
    print("\nmissed, by images that match and draft, in δ:", sorted((count, round(-look, 1)) for count, look in missed))


if __name__ == "__main__":
    typer.run(main)
