"""Only as many generations as the verdict needs: RUNs → generations.parquet of each, and budget.json.

A cheap detector first; then rounds of images, each as many as there were before, until a prompt is decided in every
run: stopped by one run alone, the detector would decide what the comparison finds. A random part of the prompts that
were given up gets the full schedule, which says how many extractions the rule has missed. In: runs over one OUT. Every
number of the rule is fixed before anything is drawn; benchmarks/budget.py tunes it on one seed, judges it on others.

    unmemorize generate RUN_A RUN_B --budget -n 128
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dedup import manifest
from dedup.options import lock
from eval import metrics
from eval.calibrate import Calibration, calibrate, freeze
from eval.controls import calibrate_runs
from eval.denoiser import DenoiserError
from eval.detectors import score_prompts
from eval.extraction import clique_threshold, find_controls, read_images, score_clique
from eval.generate import (
    GENERATIONS,
    decide,
    derive_seed,
    digest_model,
    draw,
    list_asked,
    name_prompt,
    open_model,
    open_sampler,
    read_config,
)
from eval.yardstick import Yardstick, load_yardstick

EVALUATIONS = {"noise-magnitude": 2, "one-step": 2, "anisotropy": 4, "agreement": 1}  # of the denoiser, a noise
MAD = 1.4826  # standard deviations of a normal distribution in one median absolute deviation


class BudgetError(ValueError):
    """Runs that cannot share a schedule, or a rule that makes no sense."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When a prompt gets images, and when it has had enough. The defaults are those of benchmarks/budget.py."""

    detector: str | None = "noise-magnitude"  # None: every prompt gets its first images
    noises: int = 1
    spread: float = -0.5  # median absolute deviations (as standard deviations) above the median of all prompts
    first: int = 1  # images before a prompt is given up
    near: float = 1.2  # it goes on as long as its nearest image is within so many δ
    until: str = "extracted"  # or "direct": the column of the clique attack that settles a prompt
    check: float = 0.1  # share of the prompts given up that get the full schedule


# Target, number of its images → what the clique attack says of them in every run
Look = Callable[[str, int], Sequence[dict[str, Any]]]


def list_rounds(n: int) -> list[int]:
    """Images after each round: 1, 2, 4 … n."""
    return [2**power for power in range(n.bit_length()) if 2**power < n] + [n]


def choose(scores: Sequence[np.ndarray], spread: float) -> np.ndarray:
    """Scores (P,) of every run → bool (P,): so far above the usual in any of them. What has no score is chosen.

    In deviations from the median, because the scale of a detector is that of its model; prompts that are memorised must
    be a minority.
    """
    chosen = np.zeros(len(scores[0]), bool)
    for values in scores:
        middle = np.nanmedian(values)
        width = MAD * np.nanmedian(np.abs(values - middle))
        chosen |= ~(values < middle + spread * width)
    return chosen


def is_decided(rule: Rule, score: dict[str, Any], images: int) -> bool:
    """Settled, or nothing near it among its first images."""
    if score[rule.until]:
        return True
    near = score["best_distance"] is not None and score["best_distance"] <= rule.near * score["delta"]
    return images >= rule.first and not near


def run_rounds(rule: Rule, targets: Sequence[str], n: int, look: Look) -> dict[str, int]:
    """Target → images it has had when it was decided in every run."""
    drawn = dict.fromkeys(targets, 0)
    left = list(targets)
    for images in list_rounds(n):
        drawn |= dict.fromkeys(left, images)
        left = [target for target in left if not all(is_decided(rule, each, images) for each in look(target, images))]
    return drawn


@dataclass(frozen=True, slots=True)
class Arm:
    """What is known of a run: whom it is asked, and what its images are measured against."""

    run: Path
    folder: Path  # of its images
    asked: pl.DataFrame
    settings: dict[str, Any]
    yardstick: Yardstick
    calibration: Calibration
    guards: Sequence[str]
    made: dict[str, list[pl.DataFrame]]  # by target: rows of GENERATIONS

    def add(self, sampler: Callable[[], Any], target: str, numbers: range) -> None:
        """Draw these images of a target, unless they are there."""
        for row in self.asked.filter(target_id=target).iter_rows(named=True):
            mine = sorted(set(row["numbers"]) & set(numbers))
            if not mine:
                continue
            name = name_prompt(target, row["prompt"], mine)
            path = self.folder / f"{name}.parquet"
            if not path.exists():
                draw(sampler(), self.run, self.folder, name, row, mine, self.settings, self.guards)
            self.made.setdefault(target, []).append(pl.read_parquet(path))

    def score(self, target: str) -> dict[str, Any]:
        made = pl.concat(self.made[target]).filter(status="ok")
        place = self.yardstick.targets["target_id"].to_list().index(target)
        images = read_images(self.run, made["file"], self.calibration.resolution)
        return score_clique(images, place, self.yardstick, self.calibration, self.settings["n"])


def generate_within(
    runs: Sequence[Path], rule: Rule = Rule(), *, pooled: bool = False, guards: Sequence[str] = (), **options: Any
) -> dict[str, Any]:
    """Images of every run by the rule; writes generations.parquet and budget.json of each and returns the latter.

    options: of `generate.list_asked`. A prompt that got no image has one row with status "pruned". The thresholds are
    frozen in calibration.json of each run before anything is drawn; pooled: by the controls of all runs, which then get
    the full schedule (`controls.calibrate_runs`), before anything is drawn for a member.
    Raises BudgetError, GenerateError, CalibrationError, TargetError, ModelError or OSError.
    """
    check_rule(rule)
    arms = [open_arm(run.resolve(), rule, guards, options) for run in runs]
    names = arms[0].asked["target_id"].unique(maintain_order=True).to_list()
    n = arms[0].settings["n"]
    clique_threshold(n)  # refuses an n that the attack would refuse
    for arm in arms[1:]:
        if not arm.asked.equals(arms[0].asked):
            raise BudgetError(f"{arms[0].run} and {arm.run} are asked different prompts: train both on one dedup run")
    scores = [detect(arm, rule) for arm in arms] if rule.detector else []
    chosen = choose(scores, rule.spread) if scores else np.ones(len(names), bool)
    controls = arms[0].asked.filter(prompt_kind="control")["target_id"].unique().to_list() if pooled else []
    candidates = [name for name, wanted in zip(names, chosen, strict=True) if wanted and name not in controls]
    samplers: dict[Path, Any] = {}

    def look(target: str, images: int) -> list[dict[str, Any]]:
        for arm in arms:
            start = sum(len(each) for each in arm.made.get(target, []))
            arm.add(partial(_open, samplers, arm), target, range(start, images))
        return [arm.score(target) for arm in arms]

    if pooled:
        for name in controls:
            look(name, n)
        arms = calibrate_pooled(arms, names)
    asked = [name for name in names if name not in controls]
    drawn = dict.fromkeys(asked, 0) | run_rounds(rule, candidates, n, look)
    settled = {name: [bool(arm.score(name)[rule.until]) for arm in arms] for name in candidates}
    given_up = [name for name in asked if drawn[name] < n and not all(settled.get(name, [False]))]
    checked = draw_check(given_up, rule.check)
    full = {name: look(name, n) for name in checked}
    spent = sum(drawn.values())
    guided = 2 if arms[0].settings["guidance_scale"] > 1 else 1
    each = arms[0].settings["steps"] * guided
    detecting = EVALUATIONS[rule.detector] * rule.noises * len(arms[0].asked) if rule.detector else 0
    about: dict[str, Any] = {
        "rule": asdict(rule),
        "runs": [str(arm.run) for arm in arms],
        "prompts": len(names),
        "n": n,
        "chosen": len(candidates),
        "images": spent,
        "evaluations": {
            "detector": detecting,
            "images": spent * each,
            "full_schedule": len(names) * n * each,
            "share": (detecting + spent * each) / (len(names) * n * each),
            "check": sum(n - drawn[name] for name in checked) * each,
            "calibration": len(controls) * n * each,
        },
        "given_up": len(given_up),
        "checked": len(checked),
        "arms": [],
    }
    for place, arm in enumerate(arms):
        hits = sum(found[place] for found in settled.values())
        was = [settled[name][place] if name in settled else False for name in checked]
        missed = [bool(full[name][place][rule.until]) and not before for name, before in zip(checked, was, strict=True)]
        about["arms"].append(describe_arm(arm.run, hits, missed, len(given_up)))
    for arm in arms:
        with lock(arm.run):
            manifest.write_parquet(arm.run / "generations.parquet", collect(arm, names))
            (arm.run / "guards.parquet").unlink(missing_ok=True)
            if logs := sorted(arm.folder.glob("*-guards.parquet")):
                manifest.write_parquet(arm.run / "guards.parquet", pl.concat(pl.read_parquet(log) for log in logs))
            manifest.write_json(arm.run / "budget.json", about)
    return about


def calibrate_pooled(arms: Sequence[Arm], names: list[str]) -> list[Arm]:
    """The arms by thresholds from the controls of all of them, which have all their images; nobody else has one."""
    if arms[0].calibration.controls is None:
        for arm in arms:
            with lock(arm.run):
                manifest.write_parquet(arm.run / "generations.parquet", collect(arm, names))
        calibrate_runs([arm.run for arm in arms])
    return [replace(arm, calibration=freeze(arm.calibration, arm.run / "calibration.json")) for arm in arms]


def _open(samplers: dict[Path, Any], arm: Arm) -> Any:
    if arm.run not in samplers:
        samplers[arm.run] = open_sampler(arm.run, open_model(arm.run), arm.settings, arm.guards)
    return samplers[arm.run]


def check_rule(rule: Rule) -> None:
    if rule.detector is not None and rule.detector not in EVALUATIONS:
        raise BudgetError(f"unknown detector {rule.detector!r}: choose of {', '.join(EVALUATIONS)}")
    if rule.until not in ("extracted", "direct"):
        raise BudgetError(f"a prompt is settled by `extracted` or `direct`, not by {rule.until!r}")
    if rule.noises < 1 or rule.first < 1 or not 0 <= rule.check <= 1:
        raise BudgetError("noises and first must be at least 1, and check a share from 0 to 1")


def open_arm(run: Path, rule: Rule, guards: Sequence[str], options: dict[str, Any]) -> Arm:
    """Everything but the model. Freezes the thresholds."""
    asked, settings = list_asked(run, **options)
    config = read_config(run)
    out, resolution = Path(config["out"]), config["config"]["resolution"]
    yardstick = load_yardstick(
        out,
        resolution,
        only=asked["target_id"],
        held_out=config["config"]["held_out"],
        controls=find_controls(asked),
    )
    calibration = freeze(calibrate(yardstick, config.get("pipeline")), run / "calibration.json")
    digest = digest_model(run / "model", decide(run, settings, guards) | {"budget": asdict(rule)})
    return Arm(run, run / "generations" / digest, asked, settings, yardstick, calibration, guards, {})


def detect(arm: Arm, rule: Rule) -> np.ndarray:
    """float64 (targets,): the highest score of the captions of each; NaN where there is none."""
    assert rule.detector is not None
    path = arm.folder / "detector.parquet"
    if not path.exists():
        ids, prompts = arm.asked["target_id"].to_list(), arm.asked["prompt"].to_list()
        seeds = [[derive_seed(target, j) for j in range(rule.noises)] for target in ids]
        try:
            scores = score_prompts(open_model(arm.run), prompts, seeds, [rule.detector])[rule.detector]
        except DenoiserError as error:
            raise BudgetError(f"{error}; --detector none gives every prompt {rule.first} images") from error
        manifest.write_parquet(path, arm.asked.select("target_id").with_columns(score=pl.Series(scores)))
    found = pl.read_parquet(path).group_by("target_id", maintain_order=True).agg(pl.col("score").max())
    return found["score"].to_numpy()


def draw_check(given_up: Sequence[str], share: float) -> list[str]:
    """A random part of these targets, the same for all runs, rounded up."""
    order = sorted(given_up, key=lambda name: hashlib.blake2b(f"check {name}".encode()).hexdigest())
    chosen = set(order[: math.ceil(share * len(order))])
    return [name for name in given_up if name in chosen]


def describe_arm(run: Path, extracted: int, missed: list[bool], given_up: int) -> dict[str, Any]:
    """What a run gave back, and what the rule has missed of those given up, by the part of them that was checked."""
    about: dict[str, Any] = {"run": str(run), "extracted": extracted, "missed": sum(missed), "missed_in_all": None}
    if missed:
        rate = metrics.rate(sum(missed), len(missed))
        limits = {"estimate": rate.estimate, "low": rate.low, "high": rate.high}
        about["missed_in_all"] = {name: value * given_up for name, value in limits.items()}
    return about


def collect(arm: Arm, names: list[str]) -> pl.DataFrame:
    """generations.parquet: what was drawn, in the order of the prompts, and a row for each that got nothing."""
    first = {row["target_id"]: row for row in reversed(arm.asked.to_dicts())}
    parts = []
    for name in names:
        if name in arm.made:
            parts.append(pl.concat(arm.made[name]))
            continue
        row = {column: first[name][column] for column in ("prompt", "prompt_kind", "cluster_id", "caption_kind")}
        row |= {"prompt_id": name, "controls": first[name]["controls"], "guard": "none", "status": "pruned"}
        parts.append(pl.DataFrame([row | arm.settings | {"digest": arm.folder.name}], schema=GENERATIONS))
    return pl.concat(parts)


def describe(about: dict[str, Any]) -> str:
    """budget.json for a terminal."""
    cost = about["evaluations"]
    lines = [
        f"{about['prompts']:,} prompts: {about['chosen']:,} got {about['images']:,} images of up to {about['n']} each; "
        f"{cost['share']:.2%} of the full schedule's denoiser evaluations"
        + (f", and {cost['check'] / cost['full_schedule']:.1%} for the check" if cost["check"] else "")
        + (
            f", and {cost['calibration'] / cost['full_schedule']:.1%} for all images of controls"
            if cost["calibration"]
            else ""
        )
    ]
    for arm in about["arms"]:
        line, missed = f"{Path(arm['run']).name}: {arm['extracted']} {about['rule']['until']}", arm["missed_in_all"]
        if missed:
            line += (
                f"; the full schedule of {about['checked']:,} of {about['given_up']:,} given up has {arm['missed']} "
                f"more, so {missed['estimate']:.1f} missed in all ({missed['low']:.1f} … {missed['high']:.1f})"
            )
        lines.append(line)
    return "\n".join(lines)
