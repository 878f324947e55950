"""The whole before/after job in order: plant, deduplicate, train the arms, draw, attack, compare, report.

Every step is the library function of its own verb and resumes by itself, so the same command goes on after a kill.
What is compared and by which thresholds is written to DIR/audit.json before the first model is trained. Out: the
dedup runs, one run an arm and seed, and DIR/audit with verdict.json and report/index.html.

    unmemorize audit SRC -o DIR --config configs/audit-cpu.toml
"""

import hashlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from dedup import cluster, engine, manifest
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.plant import plant
from dedup.report import write_report as write_dedup_report
from dedup.sources.demo import render_demo
from defense.config import TrainConfig
from eval.calibrate import calibrate, freeze
from eval.compare import compare
from eval.controls import calibrate_runs
from eval.extraction import SCORES, attack, read_generations
from eval.generate import generate, wants_gpu
from eval.plan import describe, describe_dataset, make_plan, measure_speed
from eval.power import FEWEST, clusters_needed
from eval.recipe import LATER, Planting, Recipe, Utility
from eval.report import write_report
from eval.unprompted import draw_unprompted, score_unprompted
from eval.utility import measure_utility
from eval.yardstick import load_yardstick

TINY = TrainConfig(base="tiny-base", steps=800)  # configs/tiny-base.toml
DEMO = Recipe(plant=Planting(controls=48), train=TINY, utility=Utility(images=1_000))
QUICK = replace(DEMO, seeds=1, utility=Utility())
MENDABLE = (ValueError, OSError, RuntimeError)  # of one arm: the others are reported


class AuditError(ValueError):
    """An audit that must not go on: what was declared has changed, or there is too little to compare."""


def plan(directory: Path, recipe: Recipe, jobs: int = 0) -> str:
    """What the audit will cost and could show, in words."""
    jobs = jobs or count_jobs(recipe.train.device)
    out = directory / "out"
    rows, clusters = None, None
    if not recipe.planted and (out / "run.json").exists():
        rows, clusters = describe_dataset(out, recipe.at_least)
    speed = measure_speed(recipe.train, recipe.generate.guidance_scale)
    return describe(recipe, make_plan(recipe, speed, rows, clusters, jobs), jobs)


def demo(directory: Path, recipe: Recipe = DEMO, jobs: int = 0, address: str | None = None) -> dict[str, Any]:
    """The audit of the OpenMoji drawings; returns verdict.json."""
    with _stage(directory, "draw"):
        render_demo(directory / "drawings")
    return audit(directory / "drawings", directory, recipe, jobs=jobs, address=address)


def audit(
    src: Path,
    directory: Path,
    recipe: Recipe,
    *,
    jobs: int = 0,
    address: str | None = None,
    redact: bool = False,
    exploratory: bool = False,
) -> dict[str, Any]:
    """Run the job on SRC; returns verdict.json, `failed` of which names the runs that could not be made.

    jobs: trainings at a time; 0 = one a processor. address: of a Ray cluster that does the work (`cluster.start`).
    redact: the report shows no images. exploratory: goes on although what was declared has changed since the first
    model was trained, and the verdict says so. Raises AuditError and what the steps raise.
    """
    jobs = jobs if address else jobs or count_jobs(recipe.train.device)
    directory.mkdir(parents=True, exist_ok=True)
    with cluster.start(jobs, address, directory) as workers:
        outs = _prepare(src, directory, recipe, address)
        recipe = _fit_to_dataset(recipe, outs)
        changed = _declare(directory, recipe, outs, exploratory)
        tasks = [(outs[seed], arm, recipe, directory / f"{arm}-{seed}", seed) for seed in outs for arm in recipe.arms]
        with _stage(directory, "train and generate"):
            made = list(workers.run(_make_run, tasks, gpu=wants_gpu(recipe.train.device)))
        with _stage(directory, "calibrate and attack"):
            made = _score_runs(made, workers)
    for result in made:
        _add_times(directory, {f"  {result['run'].name}: {name}": value for name, value in result["seconds"].items()})
    failed = [result for result in made if result["error"]]
    runs = [result["run"] for result in made if not result["error"]]
    if not runs:
        raise AuditError(f"all runs failed, the first because of this: {failed[0]['error']}")
    changed += _check_thresholds(directory, runs, exploratory)
    with _stage(directory, "compare and report"):
        verdict = compare(
            runs,
            directory / "audit",
            declared=recipe.primary,
            at_least=recipe.at_least,
            changed=changed,
            failed=[{name: result[name] for name in ("arm", "seed", "error")} for result in failed],
            utility=recipe.utility,
        )
        write_report(directory / "audit", redact=redact)
    return verdict


def count_jobs(device: str) -> int:
    """Trainings at a time: one a processor, but a GPU takes one."""
    import torch

    return 1 if wants_gpu(device) and torch.cuda.is_available() else engine.available_cpus()


def _prepare(src: Path, directory: Path, recipe: Recipe, address: str | None) -> dict[int, Path]:
    """Training seed → the dedup run whose rows it trains on: one each if planted, else the same for all."""
    options = Options(level=recipe.dedup.level, encoder=recipe.dedup.encoder)
    if not recipe.planted:
        out = directory / "out"
        with _stage(directory, "deduplicate, with report"):
            deduplicate(src, out, options, address=address)
            _tell(write_dedup_report(out))
        return dict.fromkeys(range(recipe.seeds), out)
    outs = {}
    for seed in range(recipe.seeds):
        planted, outs[seed] = directory / f"planted-{seed}", directory / f"out-{seed}"
        with _stage(directory, "plant"):
            chosen = {name: getattr(recipe.plant, name) for name in Planting.__dataclass_fields__}
            held_out = recipe.utility.images
            plant(src, planted, seed=seed, resolution=recipe.train.resolution, held_out=held_out, **chosen)
        with _stage(directory, "deduplicate, with report"):
            deduplicate(planted, outs[seed], options, address=address)
            _tell(write_dedup_report(outs[seed]))
    return outs


def _tell(page: Path) -> None:
    print(f"   {page}", file=sys.stderr)


def _fit_to_dataset(recipe: Recipe, outs: dict[int, Path]) -> Recipe:
    """Without a duplicate there is one arm. Raises AuditError when there are too few clusters to ever show a thing."""
    if recipe.planted or len(recipe.arms) == 1:
        return recipe
    out = next(iter(outs.values()))
    _, clusters = describe_dataset(out, 2)
    if clusters == 0:
        print("No duplicates were found: the raw model is audited, there is nothing to compare.", file=sys.stderr)
        return replace(recipe, arms=("raw",), primary=())
    _, clusters = describe_dataset(out, recipe.at_least)
    if clusters < FEWEST:
        raise AuditError(
            f"{out}: {clusters} clusters stand {recipe.at_least} times or more, too few to compare: below {FEWEST} "
            f"nothing is significant, and a drop of 25 points takes {clusters_needed(0.25)}. Take more data, plant "
            "canaries ([plant] in the config), or audit the raw model alone (--arms raw)"
        )
    return recipe


def _declare(directory: Path, recipe: Recipe, outs: dict[int, Path], exploratory: bool) -> list[str]:
    """Write DIR/audit.json with the thresholds, or see that it says the same; returns what has changed.

    Before a model is trained all may change. After, what decides the models may not, and the rest only as exploratory.
    Raises AuditError.
    """
    path: Path = directory / "audit.json"
    now: dict[str, Any] = {"recipe": recipe.record(), "calibration_sha256": {}}
    for seed, out in outs.items():
        yardstick = load_yardstick(
            out, recipe.train.resolution, limit=recipe.generate.limit, held_out=recipe.train.held_out
        )
        frozen = directory / "thresholds" / f"{seed}.json"
        freeze(calibrate(yardstick), frozen)
        now["calibration_sha256"][str(seed)] = _digest(frozen)
    if not path.exists() or not any(directory.glob("*/train.jsonl")):
        manifest.write_json(path, now)
        return []
    before = manifest.read_json(path)
    changed = [name for name, value in now["recipe"].items() if before["recipe"].get(name) != value]
    if before["calibration_sha256"] != now["calibration_sha256"] and "seeds" not in changed:
        changed.append("thresholds")
    if fixed := [name for name in changed if name not in (*LATER, "thresholds")]:
        raise AuditError(f"{directory} holds an audit with other values of {', '.join(fixed)}: choose another -o")
    if changed and not exploratory:
        raise AuditError(
            f"{directory}: {', '.join(changed)} changed after models were trained; what is declared after looking "
            "proves nothing: go back, choose another -o, or say --exploratory"
        )
    return changed


def _check_thresholds(directory: Path, runs: Sequence[Path], exploratory: bool) -> list[str]:
    """The thresholds that the runs were scored by are those that were written down. Raises AuditError."""
    changed = []
    for run in runs:
        seed = manifest.read_json(run / "config.json")["seed"]
        declared = manifest.read_json(directory / "thresholds" / f"{seed}.json")
        used = manifest.read_json(run / "calibration.json")
        measured = ("controls", "delta_edge") if used["controls"] else ()  # of models, by a rule that is fixed
        same = {name: value for name, value in declared.items() if value is not None and name not in measured}
        if any(used.get(name) != value for name, value in same.items()):
            changed.append(run.name)
    if changed and not exploratory:
        raise AuditError(
            f"{', '.join(changed)} were scored by other thresholds than those of {directory / 'thresholds'}: "
            "delete their calibration.json and scores, or say --exploratory"
        )
    return [f"thresholds of {name}" for name in changed]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _make_run(out: Path, arm: str, recipe: Recipe, run: Path, seed: int) -> dict[str, Any]:
    """One arm with one seed, trained and drawn from. What goes wrong with it is told, so that the others go on."""
    from defense.train import train

    made: dict[str, Any] = {"arm": arm, "seed": seed, "run": run, "error": None, "seconds": {}}
    sampling = recipe.generate
    with _told(made):
        with engine.timed(made["seconds"], "train"):
            train(out, arm, recipe.train, run, seed)
        with engine.timed(made["seconds"], "generate"):
            scale, limit = sampling.guidance_scale, sampling.limit
            generate(run, n=sampling.n, guidance_scale=scale, steps=sampling.steps, limit=limit)
            if sampling.null:
                draw_unprompted(run, sampling.null, guidance_scale=scale, steps=sampling.steps)
        with engine.timed(made["seconds"], "utility"):
            measure_utility(run, recipe.utility, sampling)
    return made


def _score_runs(made: list[dict[str, Any]], workers: engine.Workers) -> list[dict[str, Any]]:
    """Thresholds from the controls of all runs of a seed, then the attack on each. A run that failed before waits."""
    for seed in sorted({result["seed"] for result in made}):
        runs = [result["run"] for result in made if result["seed"] == seed and not result["error"]]
        scored = [run for run in runs if _is_scored(run)]
        if scored:  # the thresholds are set
            for run in runs:
                if run not in scored:
                    shutil.copyfile(scored[0] / "calibration.json", run / "calibration.json")
        elif runs and "control" in read_generations(runs[0])["prompt_kind"]:
            calibrate_runs(runs)
    return list(workers.run(_score, [(result,) for result in made]))


def _score(made: dict[str, Any]) -> dict[str, Any]:
    """The attack on one run, unless it is scored."""
    if not made["error"]:
        with _told(made), engine.timed(made["seconds"], "attack"):
            if not _is_scored(made["run"]):
                attack(made["run"])
            score_unprompted(made["run"])
    return made


@contextmanager
def _told(made: dict[str, Any]) -> Iterator[None]:
    """Keep what goes wrong in `made`, and say it."""
    try:
        yield
    except MENDABLE as problem:
        made["error"] = f"{type(problem).__name__}: {problem}"
        print(f"{made['run'].name} failed: {made['error']}", file=sys.stderr)


def _is_scored(run: Path) -> bool:
    path = run / "scores-clique.parquet"
    if not path.exists() or not (run / "calibration.json").exists():
        return False
    if not SCORES.keys() <= pl.read_parquet_schema(path).keys():  # of an earlier version
        return False
    scores = pl.read_parquet(path, columns=["target_id", "digest"])
    told = read_generations(run).select("prompt_id", "digest").unique()
    return set(scores.iter_rows()) == set(told.iter_rows())


@contextmanager
def _stage(directory: Path, name: str) -> Iterator[None]:
    """Say what begins, on stderr, and add how long it takes to DIR/timings.json."""
    print(f"── {name}", file=sys.stderr)
    seconds: dict[str, float] = {}
    with engine.timed(seconds, name):
        yield
    _add_times(directory, seconds)


def _add_times(directory: Path, seconds: dict[str, float]) -> None:
    """All times that the command was run count together."""
    path = directory / "timings.json"
    before = manifest.read_json(path) if path.exists() else {}
    manifest.write_json(path, before | {k: round(before.get(k, 0.0) + v, 1) for k, v in seconds.items()})
