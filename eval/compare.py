"""Runs of two arms → AUDIT: comparison.parquet, verdict.json, and the calibration.json they share.

In: runs that were attacked, one of each arm for every training seed. Runs that differ in anything but the arm are
refused. Knows nothing of statistics, which are in `verdict`.

    unmemorize compare RUN_A RUN_B -o AUDIT
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dedup import manifest
from eval.extraction import SCORES
from eval.generate import read_config
from eval.verdict import judge

MACHINE = ("threads", "checkpoint_every")  # of the config; these decide no result
SETTINGS = ("n", "guidance_scale", "steps", "guard")  # of the generations

COMPARISON: dict[str, pl.DataType | type[pl.DataType]] = {
    "arm": pl.String,
    "seed": pl.Int64,  # of training
    "run": pl.String,  # absolute path
    **SCORES,
}


class CompareError(ValueError):
    """Runs that must not be compared: what differs, and how to mend it."""


@dataclass(frozen=True, slots=True)
class Run:
    """What is read of one run."""

    path: Path
    config: dict[str, Any]
    calibration: dict[str, Any]
    calibration_sha256: str
    generations: pl.DataFrame
    scores: pl.DataFrame


Pairs = list[tuple[Run, Run]]


def compare(runs_a: Path | Sequence[Path], runs_b: Path | Sequence[Path], audit: Path) -> dict[str, Any]:
    """Compare one run of each arm, or several of each with the same training seeds; returns verdict.json.

    Of the arms, raw comes first, so a positive difference means that the other one gives back less. Every seed
    may have its own dedup run (a planted dataset with multiplicities dealt out anew). Raises CompareError.
    """
    pairs = pair_runs([read_run(run) for run in _listed(runs_a)], [read_run(run) for run in _listed(runs_b)])
    rows = pl.concat(tabulate(run) for pair in pairs for run in pair)
    first = pairs[0][0]
    verdict = judge(
        rows,
        [run.config["arm"] for run in pairs[0]],
        [_describe_pair(*pair) for pair in pairs],
        calibration=first.calibration,
        generations={name: first.generations[name][0] for name in SETTINGS} | {"prompts": len(first.scores)},
    )
    manifest.write_parquet(audit / "comparison.parquet", rows)
    source = first.path / "calibration.json"
    manifest.write_atomic(audit / "calibration.json", lambda temporary: shutil.copyfile(source, temporary))
    manifest.write_json(audit / "verdict.json", verdict)
    return verdict


def _describe_pair(a: Run, b: Run) -> dict[str, Any]:
    shared = {"out_sha256": a.config["out_sha256"], "calibration_sha256": a.calibration_sha256}
    return {"seed": a.config["seed"], "runs": [a.path.name, b.path.name], **shared}


def _listed(runs: Path | Sequence[Path]) -> Sequence[Path]:
    return [runs] if isinstance(runs, Path) else runs


def read_run(path: Path) -> Run:
    """Config, thresholds, generations and scores of a run that was attacked. Raises CompareError."""
    path = path.resolve()
    config = read_config(path)
    needed = {"generations.parquet": "generate", "scores-clique.parquet": "attack", "calibration.json": "attack"}
    for name, verb in needed.items():
        if not (path / name).exists():
            raise CompareError(f"{path} has no {name}: run `unmemorize {verb} {path}` first")
    generations = pl.read_parquet(path / "generations.parquet")
    scores = pl.read_parquet(path / "scores-clique.parquet")
    if set(scores["digest"]) != set(generations["digest"]):
        raise CompareError(f"{path}: the scores are of other generations: run `unmemorize attack {path}` again")
    content = (path / "calibration.json").read_bytes()
    calibration = manifest.read_json(path / "calibration.json")
    return Run(path, config, calibration, hashlib.sha256(content).hexdigest(), generations, scores)


def pair_runs(runs_a: list[Run], runs_b: list[Run]) -> Pairs:
    """Runs of equal training seed side by side, raw first, after all checks. Raises CompareError."""
    if len(runs_a) != len(runs_b) or not runs_a:
        raise CompareError(f"{len(runs_a)} runs against {len(runs_b)}: there must be one of each arm for every seed")
    for runs in (runs_a, runs_b):
        if len({run.config["arm"] for run in runs}) > 1:
            raise CompareError(f"{', '.join(str(run.path) for run in runs)} are not of one arm")
        if len({run.config["seed"] for run in runs}) < len(runs):
            raise CompareError(f"{', '.join(str(run.path) for run in runs)}: a training seed comes twice")
    first, second = (sorted(runs, key=lambda run: run.config["seed"]) for runs in (runs_a, runs_b))
    if second[0].config["arm"] == "raw":
        first, second = second, first
    pairs = list(zip(first, second, strict=True))
    for a, b in pairs:
        _check_equal(a, b, _facts_of_pair)
        if a.config["arm"] == b.config["arm"]:
            raise CompareError(f"{a.path} and {b.path} are both of arm {a.config['arm']!r}: nothing to compare")
    for a, _ in pairs[1:]:
        _check_equal(pairs[0][0], a, _facts_of_all)
    return pairs


Facts = dict[str, tuple[object, str]]  # what must be equal → its value, and how to mend a difference


def _facts_of_all(run: Run) -> Facts:
    """What must be equal in all runs."""
    config = {k: v for k, v in run.config["config"].items() if k not in MACHINE}
    facts: Facts = {f"config key {key}": (value, "train all runs with one config") for key, value in config.items()}
    for column in SETTINGS:
        facts[f"generation setting {column}"] = (run.generations[column][0], "generate with equal settings")
    return facts


def _facts_of_pair(run: Run) -> Facts:
    """What must be equal in the two runs of a seed."""
    noise = run.generations.select("prompt_id", "prompt", "seed").sort("prompt_id", "seed")
    digest = hashlib.sha256(noise.write_ndjson().encode()).hexdigest()
    return {
        "dataset": (run.config["out_sha256"], "train both on one dedup run"),
        "training seed": (run.config["seed"], "give one run of each arm for every seed"),
        **_facts_of_all(run),
        "initial weights": (run.config["initial_weights_sha256"], "train both with one version of the program"),
        "prompts or seeds of generations": (digest, "generate both with the same prompts and limit"),
        "calibration.json": (run.calibration_sha256, "delete it in both, attack both again"),
    }


def _check_equal(a: Run, b: Run, list_facts: Callable[[Run], Facts]) -> None:
    facts_a, facts_b = list_facts(a), list_facts(b)
    for what in facts_a | facts_b:
        (left, mend), (right, _) = (
            facts.get(what, (None, "use one version of the program")) for facts in (facts_a, facts_b)
        )
        if left != right:
            values = " / ".join(str(value)[:16] for value in (left, right))
            raise CompareError(f"{a.path} and {b.path} differ in {what} ({values}): {mend}")


def tabulate(run: Run) -> pl.DataFrame:
    """The scores of a run as rows of comparison.parquet, columns COMPARISON."""
    where = {"arm": run.config["arm"], "seed": run.config["seed"], "run": str(run.path)}
    table = run.scores.with_columns(**{name: pl.lit(value) for name, value in where.items()})
    return table.select(pl.col(name).cast(kind) for name, kind in COMPARISON.items())
