"""The comparison table → what may be said: declared contrasts first, all others exploratory, doses, controls, power.

In: comparison.parquet of one arm or more. Out: the content of verdict.json. Declared before any run: extraction by the
targeted δ of images that stand twice or more in the original data, raw against refill on a planted dataset, raw
against dedup and dedup-exposure on any other. Knows nothing of files or images.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import polars as pl

from eval import metrics, stats
from eval.asked import count_captions
from eval.contrasts import AT_LEAST, LEVEL, by_mode, explore, judge_contrast, match_arms, repeated, report_rate
from eval.dose import dose_response

VERSION = 2  # of verdict.json
POWER = 0.8
DECLARED = {True: ("refill",), False: ("dedup", "dedup-exposure")}  # planted or not: each against raw
DETECTION = ("hash", "refill", "oracle")  # the same arm by weaker, by our and by perfect detection
SHORT = 0.7  # N1 / N0 below which dedup-exposure is as much a shorter training as a deduplication
BUCKETS = (0, 1, 2, 3, 5, 10, 20, 50, 100)  # lowest multiplicity of each, for datasets that were not planted


class VerdictError(ValueError):
    """A table that holds nothing to judge."""


def judge(
    rows: pl.DataFrame,
    sources: list[dict[str, Any]],
    *,
    calibration: dict[str, Any],
    generations: dict[str, Any],
    declared: Sequence[str] | None = None,
    at_least: int = AT_LEAST,
    changed: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that verdict.json says, as JSON values.

    rows: of one arm or more; each is contrasted with the first, which is raw if there is one. sources: one a training
    seed, with `seed` and `calibration_sha256`; they are passed on. calibration, generations: thresholds and settings
    of all runs. declared: arms whose contrast was declared; None: those of `DECLARED`. changed: what was changed after
    the declaration: then nothing counts as declared. Raises VerdictError.
    """
    planted = bool(rows["mode"].is_not_null().any())
    arms = rows["arm"].unique(maintain_order=True).to_list()
    wanted = DECLARED[planted] if declared is None else declared
    contrasts = judge_contrasts(rows, arms, wanted, at_least)
    ours = [contrast for contrast in contrasts if contrast["declared"]]
    primary = next(iter(ours or contrasts), None)
    if primary is not None:
        primary["declared"] = primary["declared"] and not changed
    digests = {source["calibration_sha256"] for source in sources}
    by_arm = {arm: rows.filter(pl.col("arm") == arm) for arm in arms}
    verdict = {
        "schema_version": VERSION,
        "primary": primary,
        "co_primary": ours[1:],
        "label": describe_label(rows, primary, changed, at_least),
        "arms": arms,
        "at_least": at_least,
        "per_seed": [{**source, **_find_seed(primary, source["seed"])} for source in sources],
        "contrasts": [contrast for contrast in contrasts if contrast is not primary and contrast not in ours],
        "detection": compare_detection(by_arm, at_least),
        "missed": {arm: judge_missed(mine, at_least) for arm, mine in by_arm.items() if arm != "raw"},
        "per_multiplicity": list(count_multiplicities(rows, arms, planted)),
        "captions": list(count_captions(rows, arms, at_least)),
        "control": {arm: count_controls(mine) for arm, mine in by_arm.items()},
        "dose_response": {arm: fit_doses(mine) for arm, mine in by_arm.items()},
        "power": None if primary is None else judge_power(rows, arms, at_least),
        "delta": describe_delta(rows, calibration),
        "generations": generations | {"nan": {arm: int(mine["n_nan"].sum()) for arm, mine in by_arm.items()}},
        "calibration_sha256": digests.pop() if len(digests) == 1 else None,  # else see per_seed
        "exploratory": [explore(rows, (arms[0], arm), at_least) for arm in arms[1:]] if primary else [],
        "changed": list(changed),
    }
    return stats.plain(verdict)


def describe_label(rows: pl.DataFrame, primary: dict[str, Any] | None, changed: Sequence[str], at_least: int) -> str:
    """What the primary contrast speaks of, or why there is none."""
    if primary is None:
        if rows["arm"].n_unique() == 1:
            return f"one arm, {rows['arm'][0]}: there is nothing to compare it with"
        return f"no target stands {at_least} times or more in the original data: there is nothing to compare"
    text = f"describes {primary['scope']}"
    if changed:
        return f"{text}; exploratory: {', '.join(changed)} changed after the declaration"
    return text if primary["declared"] else f"{text}; exploratory: not the contrast that was declared"


def judge_contrasts(
    rows: pl.DataFrame, arms: Sequence[str], wanted: Sequence[str], at_least: int
) -> list[dict[str, Any]]:
    """Every arm against the first. Holm among the declared ones, and among the others."""
    if rows.filter(repeated(at_least)).is_empty():
        return []
    found = [
        judge_contrast(rows, (arms[0], arm), at_least) | {"declared": arms[0] == "raw" and arm in wanted}
        for arm in arms[1:]
    ]
    found.sort(key=lambda contrast: not contrast["declared"])
    for kind in (True, False):
        group = [contrast for contrast in found if contrast["declared"] == kind]
        for contrast, p in zip(group, stats.holm([c["p_value"] for c in group]), strict=True):
            contrast["p_value_holm"] = p
    for contrast in found:
        contrast["warning"] = warn_of_steps(rows, contrast["contrast"])
    return found


def warn_of_steps(rows: pl.DataFrame, contrast: str) -> str | None:
    """Where fewer steps may be what helps."""
    first, second = contrast.split(" - ")
    size = {arm: float(rows.filter(pl.col("arm") == arm)["training_rows"].sum()) for arm in (first, second)}
    if second != "dedup-exposure" or not size[first] or size[second] / size[first] >= SHORT:
        return None
    kept = size[second] / size[first]
    return f"it keeps {kept:.0%} of the rows and trains for as many fewer steps: that alone may be what helps"


def _find_seed(primary: dict[str, Any] | None, seed: int) -> dict[str, Any]:
    return {} if primary is None else next((s for s in primary["per_seed"] if s["seed"] == seed), {})


def compare_detection(by_arm: dict[str, pl.DataFrame], at_least: int) -> dict[str, Any] | None:
    """Does better detection buy less memorisation? Arms that differ only in how copies were found."""
    arms = [arm for arm in DETECTION if arm in by_arm]
    if len(arms) < 2:
        return None
    levels = []
    for arm in arms:
        some = by_arm[arm].filter(repeated(at_least))
        rate = _rate(some)
        levels.append({"arm": arm, "copies_left": some["copies"].mean(), **report_rate(rate)})
    rows = pl.concat([by_arm[arm] for arm in arms])
    contrasts = []
    for pair in pairwise(arms):
        whole = judge_contrast(rows, pair, at_least)
        keys = ("contrast", "estimate", "interval", "method", "p_value", "n_clusters", "seeds")
        contrasts.append({key: whole[key] for key in keys})
    return {"levels": levels, "contrasts": contrasts, "note": "exploratory"}


def judge_missed(rows: pl.DataFrame, at_least: int) -> dict[str, Any] | None:
    """Repeated images of which the arm still trained on several rows, beside those with one: which came back?"""
    some = rows.filter(repeated(at_least)).drop_nulls("copies")
    if some.is_empty():
        return None
    left = {"missed": some.filter(pl.col("copies") > 1), "found": some.filter(pl.col("copies") <= 1)}
    return {
        name: report_rate(_rate(part)) | {"copies_left": part["copies"].mean(), "exposures": part["exposures"].mean()}
        for name, part in left.items()
    }


def count_multiplicities(rows: pl.DataFrame, arms: list[str], planted: bool) -> Iterator[dict[str, Any]]:
    """Extracted targets by multiplicity, arm and mode. Targets of all seeds count alike: read as description."""
    levels = sorted(rows["multiplicity"].unique()) if planted else list(BUCKETS)
    uppers = levels if planted else [*(level - 1 for level in levels[1:]), None]
    for level, upper in zip(levels, uppers, strict=True):
        within = pl.col("multiplicity").is_between(level, math.inf if upper is None else upper)
        for mode, mine in by_mode(rows.filter(within)):
            for arm in arms:
                cell = mine.filter(pl.col("arm") == arm)
                if len(cell):
                    place = {"multiplicity": level, "to": upper, "mode": mode, "arm": arm}
                    matches = {"matches": cell["matches"].sum(), "generations": cell["n_generations"].sum()}
                    yield place | report_rate(_rate(cell)) | matches


def count_controls(rows: pl.DataFrame) -> dict[str, Any]:
    """False matches of one arm: by the prompts of images that it never saw, and with other pictures than asked for."""
    control = rows.filter(pl.col("prompt_kind") == "control")
    hits = int(control["extracted"].sum())
    made, wrong = int((rows["n_generations"] - rows["n_nan"]).sum()), int(rows["wrong_matches"].sum())
    bound = stats.clopper_pearson(hits, len(control), LEVEL, "upper").high if len(control) else None
    return {
        "prompts": len(control),
        "hits": hits,
        "upper_bound": bound,
        "level": LEVEL,
        "note": None if len(control) else "no control prompts: train with held_out above 0, or use a planted dataset",
        "wrong": report_rate(stats.wilson(wrong, made, LEVEL)),
    }


def fit_doses(rows: pl.DataFrame) -> dict[str, Any]:
    """Dose-response by mode of one arm, members only."""
    members = rows.filter(pl.col("prompt_kind") == "member")
    return {
        mode: dose_response(some["multiplicity"].to_numpy(), some["extracted"].to_numpy(), LEVEL)
        for mode, some in by_mode(members)
    }


def judge_power(rows: pl.DataFrame, arms: Sequence[str], at_least: int) -> dict[str, Any]:
    """What drop one checkpoint of each arm could have shown, by the exact McNemar test."""
    some = match_arms(rows, arms[:2]).filter(repeated(at_least))
    n = min(some["seed"].value_counts()["count"])
    drops = {f"{only_b:g}": stats.smallest_drop(n, only_b, 1 - LEVEL, POWER) for only_b in (0.0, 0.02, 0.05)}
    return {
        "n_clusters": n,
        "level": LEVEL,
        "power": POWER,
        "smallest_drop": drops["0"],
        "smallest_drop_by_opposite_share": drops,  # share of targets that only the second arm gives back
    }


def describe_delta(rows: pl.DataFrame, calibration: dict[str, Any]) -> dict[str, Any]:
    """The δ of the targets, and how lax the fixed ones of the literature would be here."""
    delta = rows.unique("target_id", maintain_order=True)["delta"]
    return {
        "rule": "half the distance to the nearest other picture or its mirror image, at most 0.15",
        "n": len(delta),
        "min": delta.min(),
        "median": delta.median(),
        "max": delta.max(),
        "below_0.05": int((delta < 0.05).sum()),
        "delta_edge": calibration["delta_edge"],
        "literature": calibration["literature"],
    }


def _rate(rows: pl.DataFrame) -> stats.Rate:
    """Wilson's interval, the exact one for none or all."""
    return metrics.rate(int(rows["extracted"].sum()), len(rows), LEVEL)
