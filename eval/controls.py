"""Generations for controls, of all models that are to be compared → one calibration.json in each of their runs.

In: runs that were asked for captions they were never trained on. Out: how often that looks like a copy, per prompt,
for the δ of each target, for one δ for all, and for those of the literature. Refused once a member was scored: no
threshold is set by what it will judge.

    unmemorize calibrate RUN_A RUN_B
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from eval.calibrate import Calibration, CalibrationError, calibrate, freeze, measure_controls
from eval.extraction import find_controls, read_generations, read_images
from eval.generate import read_config
from eval.targets import load_targets
from eval.yardstick import load_yardstick

MOST = 2_000  # held-out pictures that are compared: beside those that were asked for, so many in all
WANTED = 1_000  # held-out pictures: fewer bound a rate of false matches above 1 in 300


def calibrate_runs(runs: Sequence[Path]) -> Calibration:
    """Pool the controls of all runs and write the thresholds into each.

    Held-out pictures are all controls that the dataset has, and all keepers of the run that controls were taken from
    (`generate --controls`). Raises CalibrationError, AttackError, TargetError or OSError.
    """
    runs = [run.resolve() for run in runs]
    configs = [read_config(run) for run in runs]
    tables = [read_generations(run) for run in runs]
    _check_equal(runs, configs, tables)
    for run in runs:
        if scored := sorted(path.name for path in run.glob("scores-*.parquet") if _holds_attack(path)):
            raise CalibrationError(f"{run} has been scored ({scored[0]}): calibrate before, or delete its scores")
    config, generations = configs[0], tables[0]
    out, resolution, held_out = Path(config["out"]), config["config"]["resolution"], config["config"]["held_out"]
    controls = find_controls(generations)
    unseen = load_targets(out, limit=None, held_out=held_out, controls=controls).filter(prompt_kind="control")
    asked = generations.filter(prompt_kind="control")["prompt_id"].unique(maintain_order=True).to_list()
    if not asked:
        raise CalibrationError(
            f"{runs[0]} holds no generations for controls: train with held_out, plant canaries, or generate --controls"
        )
    # in an order that says nothing: a part of them stands for the rest
    unseen = unseen.sort(~pl.col("target_id").is_in(asked), pl.col("sha256").str.reverse(), "target_id")
    unseen = unseen.head(max(MOST, len(asked)))
    place = {name: number for number, name in enumerate(unseen["target_id"])}
    names = pl.concat([generations["prompt_id"], unseen["target_id"]]).unique()
    yardstick = load_yardstick(out, resolution, only=names, held_out=held_out, controls=controls)
    is_asked = yardstick.targets["target_id"].is_in(generations["prompt_id"].implode())
    plain = calibrate(yardstick.select(yardstick.targets["target_id"].filter(is_asked)), config.get("pipeline"))
    images, own = [], []
    for run, table in zip(runs, tables, strict=True):
        made = table.filter(prompt_kind="control", status="ok").partition_by("prompt_id", as_dict=True)
        for name in asked:
            mine = made.get((name,))
            images.append(
                read_images(run, mine["file"] if mine is not None else pl.Series([], dtype=pl.String), resolution)
            )
            own.append(place[name])
    free = yardstick.select(unseen["target_id"])
    measured = measure_controls(plain, images, np.array(own), free.target_pixels, free.others)
    n = generations["n"][0]
    counted = {"generations": n, "nan": n * len(images) - sum(map(len, images))}
    measured = replace(measured, controls=(measured.controls or {}) | counted)
    for run in runs:
        path = run / "calibration.json"
        if path.exists():
            freeze(plain, path)  # of these pictures?
            path.unlink()
        freeze(measured, path)
    return measured


def _check_equal(runs: list[Path], configs: list[dict[str, Any]], tables: list[pl.DataFrame]) -> None:
    for run, config, table in zip(runs, configs, tables, strict=True):
        facts = {
            "dedup run": (config["out_sha256"], configs[0]["out_sha256"]),
            "resolution": (config["config"]["resolution"], configs[0]["config"]["resolution"]),
            "class of pipelines": (config.get("pipeline"), configs[0].get("pipeline")),
            "number of images a prompt": (table["n"][0], tables[0]["n"][0]),
            "prompts": (set(table["prompt_id"]), set(tables[0]["prompt_id"])),
        }
        if unlike := [name for name, (mine, first) in facts.items() if mine != first]:
            raise CalibrationError(f"{runs[0]} and {run} differ in their {unlike[0]}: generate both alike")


def _holds_attack(path: Path) -> bool:
    return "extracted" in pl.read_parquet_schema(path)


def describe_calibration(calibration: Calibration) -> str:
    """For a terminal."""
    measured = calibration.controls
    assert measured is not None
    delta = np.array(list(calibration.delta.values()))
    lines = [
        f"{measured['prompts']:,} control prompts × {measured['generations']} generations, {measured['held_out']:,} "
        "held-out pictures; false matches per prompt:",
        f"{'δ':<28} {'own picture':<28} {'another one':<28} any of {measured['compared_with']:,}",
        f"{f'of each target, median {np.median(delta):.3f}':<28} {_say(measured['own_picture']):<28} "
        f"{_say(measured['other_picture'])}",
        f"{'global, ' + format(measured['delta_global'], '.3f'):<28} {'':<28} {'':<28} {_say(measured['any_picture'])}",
    ]
    for row in measured["literature"]:
        source = "Webster" if row["delta"] in (0.124, 0.113) else "Carlini"
        name = f"{row['delta']:.3f} ({source})"
        lines.append(f"{name:<28} {'':<28} {_say(row['other_picture']):<28} {_say(row['any_picture'])}")
    if measured["nan"]:
        lines.append(f"{measured['nan']:,} generations without finite numbers were left out")
    lines.append(f"Edge threshold {calibration.delta_edge:.3f}. Intervals: 95 %; the upper limit is what n allows.")
    if measured["held_out"] < WANTED:
        lines.append(
            f"{measured['held_out']:,} held-out pictures are few ({WANTED:,} are wanted): give more with "
            "`generate --controls OUT`, a dedup run over pictures that no model was trained on"
        )
    return "\n".join(lines)


def _say(rate: dict[str, Any]) -> str:
    return f"{rate['hits']:,} of {rate['n']:,} (≤ {rate['high']:.2%})"
