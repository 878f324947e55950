"""Attacked runs → AUDIT: comparison.parquet, verdict.json, and the calibration.json they share.

In: runs that were attacked, one of each arm for every training seed. Runs that differ in anything but the arm are
refused. Knows nothing of statistics, which are in `verdict`.

    unmemorize compare RUN RUN … -o AUDIT
"""

import hashlib
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dedup import manifest
from eval.asked import BY_CAPTION, PROBE, count_matches
from eval.contrasts import AT_LEAST
from eval.extraction import SCORES
from eval.generate import read_config, read_reconstruction
from eval.recipe import Utility
from eval.reference import read_plant
from eval.unprompted import SCORES as UNPROMPTED
from eval.unprompted import read_unprompted
from eval.utility import judge_utility
from eval.verdict import judge

MACHINE = ("threads", "checkpoint_every")  # of the config; these decide no result
SETTINGS = ("n", "guidance_scale", "steps", "guard")  # of the generations

COMPARISON: dict[str, pl.DataType | type[pl.DataType]] = {
    "arm": pl.String,
    "seed": pl.Int64,  # of training
    "run": pl.String,  # absolute path
    "training_rows": pl.Int64,  # of the whole arm
    "copies": pl.Int64,  # different rows with the picture, or an edit of it, that training saw; null when not counted
    "exposures": pl.Int64,  # how often it saw any of them
    "by_caption": BY_CAPTION,  # generations and matches for captions of each kind, "null" and "probe" among them
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
    unprompted: pl.DataFrame | None  # scores of images for the empty caption
    probe: pl.DataFrame | None  # scores of the residual probe


Groups = dict[int, list[Run]]  # training seed → its runs, in the order of the arms


def compare(
    runs: Sequence[Path],
    audit: Path,
    *,
    declared: Sequence[str] | None = None,
    at_least: int = AT_LEAST,
    changed: Sequence[str] = (),
    failed: Sequence[dict[str, Any]] = (),
    utility: Utility | None = None,
) -> dict[str, Any]:
    """Compare one run of each arm, or one for each of several training seeds; returns verdict.json.

    Every arm is contrasted with raw, or else with the first. Every seed may have its own dedup run (a planted dataset
    with multiplicities dealt out anew). declared, at_least, changed: as in `verdict.judge`. failed: `arm`, `seed` and
    `error` of runs that could not be made; they may be missing. utility: the margin it fixes. Raises CompareError.
    """
    groups = group_runs([read_run(run) for run in runs], {(f["arm"], f["seed"]) for f in failed})
    every = [run for group in groups.values() for run in group]
    rows = pl.concat(tabulate(run) for run in every)
    first = every[0]
    verdict = judge(
        rows,
        [_describe_seed(group) for group in groups.values()],
        calibration=first.calibration,
        generations={name: first.generations[name][0] for name in SETTINGS} | {"prompts": len(first.scores)},
        declared=declared,
        at_least=at_least,
        changed=changed,
    )
    verdict["delta"]["reconstruction"] = read_reconstruction(first.path)
    verdict |= {"failed": list(failed), "utility": judge_utility([run.path for run in every], utility or Utility())}
    manifest.write_parquet(audit / "comparison.parquet", rows)
    source = first.path / "calibration.json"
    manifest.write_atomic(audit / "calibration.json", lambda temporary: shutil.copyfile(source, temporary))
    manifest.write_json(audit / "verdict.json", verdict)
    return verdict


def _describe_seed(group: list[Run]) -> dict[str, Any]:
    first = group[0]
    shared = {"out_sha256": first.config["out_sha256"], "calibration_sha256": first.calibration_sha256}
    return {"seed": first.config["seed"], "runs": [run.path.name for run in group], **shared}


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
    if missing := [name for name in SCORES if name not in scores.columns]:
        raise CompareError(f"{path}: the scores have no {missing[0]}: run `unmemorize attack {path}` again")
    drawn = read_unprompted(path)
    unprompted, probe = (_read_scores(path / name) for name in (UNPROMPTED, "scores-probe.parquet"))
    if drawn is not None and (unprompted is None or set(unprompted["digest"]) != set(drawn["digest"])):
        raise CompareError(f"{path}: images for the empty caption have no scores: run `unmemorize attack {path}` again")
    content = (path / "calibration.json").read_bytes()
    calibration = manifest.read_json(path / "calibration.json")
    digest = hashlib.sha256(content).hexdigest()
    return Run(path, config, calibration, digest, generations, scores, unprompted, probe)


def _read_scores(path: Path) -> pl.DataFrame | None:
    return pl.read_parquet(path) if path.exists() else None


def group_runs(runs: list[Run], failed: Collection[tuple[str, int]] = ()) -> Groups:
    """Runs by training seed, raw first, then in the order given, after all checks. Raises CompareError."""
    if not runs:
        raise CompareError("no runs: give one of each arm for every training seed")
    arms = sorted(dict.fromkeys(run.config["arm"] for run in runs), key=lambda arm: arm != "raw")
    seeds = sorted({run.config["seed"] for run in runs})
    found: dict[tuple[str, int], Run] = {}
    for run in runs:
        place = (run.config["arm"], run.config["seed"])
        if place in found:
            raise CompareError(f"{found[place].path} and {run.path} are both of arm {place[0]!r}, seed {place[1]}")
        found[place] = run
    for arm in arms:
        for seed in seeds:
            if (arm, seed) not in found and (arm, seed) not in failed:
                raise CompareError(
                    f"there is no run of arm {arm!r} with seed {seed}: give one of each arm for every seed"
                )
    groups = {seed: [found[arm, seed] for arm in arms if (arm, seed) in found] for seed in seeds}
    for group in groups.values():
        for run in group[1:]:
            _check_equal(group[0], run, _facts_of_seed)
        _check_equal(next(iter(groups.values()))[0], group[0], _facts_of_all)
    return groups


Facts = dict[str, tuple[object, str]]  # what must be equal → its value, and how to mend a difference


def _facts_of_all(run: Run) -> Facts:
    """What must be equal in all runs."""
    config = {k: v for k, v in run.config["config"].items() if k not in MACHINE}
    facts: Facts = {f"config key {key}": (value, "train all runs with one config") for key, value in config.items()}
    for column in SETTINGS:
        facts[f"generation setting {column}"] = (run.generations[column][0], "generate with equal settings")
    drawn = read_unprompted(run.path)
    for column in SETTINGS:
        value = None if drawn is None else drawn[column][0]
        facts[f"{column} of images for the empty caption"] = (value, "generate with equal --null and settings")
    return facts


def _facts_of_seed(run: Run) -> Facts:
    """What must be equal in the runs of a seed."""
    noise = run.generations.select("prompt_id", "prompt", "seed").sort("prompt_id", "seed")
    digest = hashlib.sha256(noise.write_ndjson().encode()).hexdigest()
    return {
        "dataset": (run.config["out_sha256"], "train them on one dedup run"),
        **_facts_of_all(run),
        "initial weights": (run.config["initial_weights_sha256"], "train them with one version of the program"),
        "prompts or seeds of generations": (digest, "generate with the same prompts and limit"),
        "calibration.json": (run.calibration_sha256, "delete it in all of them and attack again"),
    }


def _check_equal(a: Run, b: Run, list_facts: Callable[[Run], Facts]) -> None:
    facts_a, facts_b = list_facts(a), list_facts(b)
    for what, (_, mend) in (facts_a | facts_b).items():
        left, right = (facts.get(what, (None, ""))[0] for facts in (facts_a, facts_b))
        if left != right:
            values = " / ".join(str(value)[:16] for value in (left, right))
            raise CompareError(f"{a.path} and {b.path} differ in {what} ({values}): {mend}")


def tabulate(run: Run) -> pl.DataFrame:
    """The scores of a run as rows of comparison.parquet, columns COMPARISON."""
    config = run.config
    where = {"arm": config["arm"], "seed": config["seed"], "run": str(run.path), "training_rows": config.get("rows")}
    table = run.scores.join(count_dose(run), on="target_id", how="left", maintain_order="left")
    told = count_matches(run.generations, run.scores, {"null": run.unprompted, PROBE: run.probe})
    table = table.join(told, on="target_id", how="left", maintain_order="left")
    table = table.with_columns(**{name: pl.lit(value) for name, value in where.items()})
    return table.select(pl.col(name).cast(kind) for name, kind in COMPARISON.items())


def count_dose(run: Run) -> pl.DataFrame:
    """What training saw of each target: target_id, copies, exposures; empty without RUN/exposures.parquet.

    By the planted truth for canaries, so that copies that deduplication has missed count; by cluster for others.
    """
    path, schema = run.path / "exposures.parquet", {"target_id": pl.String, "copies": pl.Int64, "exposures": pl.Int64}
    if not path.exists():
        return pl.DataFrame(schema=schema)
    seen = pl.read_parquet(path)
    plant = read_plant(Path(run.config["out"]))
    truth = pl.DataFrame(schema={"key": pl.String, "canary": pl.String}) if plant is None else plant
    seen = seen.filter(pl.col("id").is_not_null())  # spare images are no copies of anything
    seen = seen.join(truth.select("key", "canary").drop_nulls(), on="key", how="left")
    planted = pl.col("target_id").is_in(truth["canary"].to_list())
    targets = run.scores.select("target_id", cluster_id=pl.when(planted).then(None).otherwise("cluster_id"))
    counts = ((pl.col("exposures") > 0).sum().alias("copies"), pl.col("exposures").sum())
    canaries = targets.join(seen, left_on="target_id", right_on="canary", how="inner")
    others = targets.join(seen.filter(pl.col("canary").is_null()), on="cluster_id", how="inner")
    found = pl.concat([part.group_by("target_id").agg(*counts) for part in (canaries, others)])
    return (
        targets.select("target_id")
        .join(found, on="target_id", how="left")
        .fill_null(0)
        .select(pl.col(name).cast(kind) for name, kind in schema.items())
    )
