"""Only as many generations as the verdict needs: RUNs → generations.parquet of each, and budget.json.

A cheap look at every prompt first; then rounds of images, each as many as there were before, until a prompt is decided
in every run: stopped by one run alone, the look would decide what the comparison finds. A random part of the prompts
that were given up gets the full schedule, which says how many extractions the rule has missed. In: runs over one OUT.

    unmemorize generate RUN_A RUN_B --budget -n 128
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from dedup import manifest
from dedup.options import lock
from defense.distances import scale
from eval import metrics
from eval.calibrate import Calibration, calibrate, freeze
from eval.controls import calibrate_runs
from eval.denoiser import DenoiserError
from eval.detectors import score_prompts
from eval.extraction import clique_threshold, find_controls, read_images, score_clique
from eval.generate import (
    BATCH,
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
from eval.rule import (
    DEFAULT,
    DRAFT,
    BudgetError,
    Rule,
    check_rule,
    choose,
    count_evaluations,
    draw_check,
    run_rounds,
)
from eval.yardstick import Yardstick, load_yardstick

LEAST = 1e-6  # δ of two pictures that are equal at this size is 0: no image can be told to be one of them


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
    runs: Sequence[Path], rule: Rule = DEFAULT, *, pooled: bool = False, guards: Sequence[str] = (), **options: Any
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
    controls = arms[0].asked.filter(prompt_kind="control")["target_id"].unique().to_list() if pooled else []
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
    looks = [look_at(arm, rule) for arm in arms] if rule.detector else []
    chosen = choose(rule, looks) if looks else np.ones(len(names), bool)
    candidates = [name for name, wanted in zip(names, chosen, strict=True) if wanted and name not in controls]
    asked = [name for name in names if name not in controls]
    drawn = dict.fromkeys(asked, 0) | run_rounds(rule, candidates, n, look)
    settled = {name: [bool(arm.score(name)[rule.until]) for arm in arms] for name in candidates}
    given_up = [name for name in asked if drawn[name] < n and not all(settled.get(name, [False]))]
    checked = draw_check(given_up, rule.check)
    full = {name: look(name, n) for name in checked}
    spent = sum(drawn.values())
    guided = 2 if arms[0].settings["guidance_scale"] > 1 else 1
    each = arms[0].settings["steps"] * guided
    looking = count_evaluations(rule, guided) * len(arms[0].asked)
    about: dict[str, Any] = {
        "rule": asdict(rule),
        "runs": [str(arm.run) for arm in arms],
        "prompts": len(names),
        "n": n,
        "chosen": len(candidates),
        "images": spent,
        "evaluations": {
            "looks": looking,
            "images": spent * each,
            "full_schedule": len(names) * n * each,
            "share": (looking + spent * each) / (len(names) * n * each),
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


def look_at(arm: Arm, rule: Rule) -> np.ndarray:
    """float64 (targets,): the best score of the captions of each, as `rule.choose` takes it; NaN: none has one."""
    path = arm.folder / "looks.parquet"
    if not path.exists():
        scores = draft(arm, rule) if rule.detector == DRAFT else detect(arm, rule)
        manifest.write_parquet(path, arm.asked.select("target_id").with_columns(score=pl.Series(scores)))
    found = pl.read_parquet(path).group_by("target_id", maintain_order=True).agg(pl.col("score").max())
    return found["score"].to_numpy()


def detect(arm: Arm, rule: Rule) -> np.ndarray:
    """float64 (asked,): of a detector."""
    assert rule.detector is not None
    ids, prompts = arm.asked["target_id"].to_list(), arm.asked["prompt"].to_list()
    seeds = [[derive_seed(target, j) for j in range(rule.noises)] for target in ids]
    try:
        return score_prompts(open_model(arm.run), prompts, seeds, [rule.detector])[rule.detector]
    except DenoiserError as error:
        raise BudgetError(f"{error}; --detector {DRAFT} asks for images alone") from error


def draft(arm: Arm, rule: Rule) -> np.ndarray:
    """float64 (asked,): minus the distance of the nearest draft to its target, in δ; NaN where none has numbers."""
    sampler = open_sampler(arm.run, open_model(arm.run), arm.settings | {"steps": rule.draft_steps}, arm.guards)
    place = {name: number for number, name in enumerate(arm.yardstick.targets["target_id"])}
    places = np.repeat([place[name] for name in arm.asked["target_id"]], rule.noises)
    prompts = [prompt for prompt in arm.asked["prompt"] for _ in range(rule.noises)]
    seeds = [derive_seed(name, j) for name in arm.asked["target_id"] for j in range(rule.noises)]
    distances = np.full(len(seeds), np.inf)
    starts = range(0, len(seeds), BATCH)
    for start in tqdm(starts, f"draft {arm.run.name}", unit=" batches", file=sys.stderr, disable=None):
        part = slice(start, start + BATCH)
        drawn = sampler(prompts[part], seeds[part])
        off = scale(drawn.pixels) - scale(arm.yardstick.target_pixels[places[part]])  # (BATCH, R, R, 3)
        ok = np.array([status == "ok" for status in drawn.status])
        distances[part] = np.where(ok, np.sqrt(np.square(off).mean(axis=(1, 2, 3), dtype=np.float64)), np.inf)
    delta = arm.calibration.delta_of(arm.yardstick.targets)[places]
    in_delta = distances / np.maximum(delta, LEAST)
    nearest = in_delta.reshape(-1, rule.noises).min(axis=1)
    return np.where(np.isinf(nearest), np.nan, -nearest)


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
