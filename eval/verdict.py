"""The comparison table → what may be said: effects with intervals, one declared outcome, the rest exploratory.

In: comparison.parquet of two arms. Out: the content of verdict.json. The unit is the target, not the generation.
Declared before any run: extraction by the targeted δ, of images that stand twice or more in the original data, raw
against refill on a planted dataset, raw against dedup on any other. Knows nothing of files or images.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import polars as pl

from eval import stats
from eval.stats import Effect

VERSION = 1  # of verdict.json
LEVEL = 0.95
POWER = 0.8
DECLARED = {True: ["raw", "refill"], False: ["raw", "dedup"]}  # planted or not
BUCKETS = (0, 1, 2, 3, 5, 10, 20, 50, 100)  # lowest multiplicity of each, for datasets that were not planted
REPEATED = (pl.col("prompt_kind") == "member") & (pl.col("multiplicity") >= 2)
A, B = pl.col("extracted_a"), pl.col("extracted_b")


class VerdictError(ValueError):
    """A table that holds nothing to compare."""


def judge(
    rows: pl.DataFrame,
    arms: list[str],
    sources: list[dict[str, Any]],
    *,
    calibration: dict[str, Any],
    generations: dict[str, Any],
) -> dict[str, Any]:
    """Everything that verdict.json says, as JSON values.

    arms: two, the difference is the first minus the second. sources: one a training seed, with `seed` and
    `calibration_sha256`; they are passed on. calibration, generations: thresholds and settings of all runs.
    Raises VerdictError.
    """
    planted = bool(rows["mode"].is_not_null().any())
    matched = match_arms(rows, arms)
    if matched.filter(REPEATED).is_empty():
        raise VerdictError("no target stands twice or more in the original data: there is nothing to compare")
    declared = arms == DECLARED[planted]
    seeds = [source["seed"] for source in sources]
    digests = {source["calibration_sha256"] for source in sources}
    scope = f"the training procedure, from {len(seeds)} seeds" if len(seeds) > 1 else "these checkpoints"
    by_arm = {arm: rows.filter(pl.col("arm") == arm) for arm in arms}
    verdict = {
        "schema_version": VERSION,
        "primary": judge_primary(matched, arms, seeds) | {"declared": declared},
        "label": f"describes {scope}" + ("" if declared else "; exploratory: not the contrast that was declared"),
        "arms": arms,
        "per_seed": [judge_seed(matched, source) for source in sources],
        "per_multiplicity": list(count_multiplicities(rows, arms, planted)),
        "control": {arm: count_controls(mine) for arm, mine in by_arm.items()},
        "dose_response": {arm: fit_doses(mine) for arm, mine in by_arm.items()},
        "power": judge_power(matched, seeds),
        "delta": describe_delta(rows, calibration),
        "generations": generations | {"nan": {arm: int(mine["n_nan"].sum()) for arm, mine in by_arm.items()}},
        "calibration_sha256": digests.pop() if len(digests) == 1 else None,  # else see per_seed
        "exploratory": explore(matched, arms),
    }
    return _plain(verdict)


def match_arms(rows: pl.DataFrame, arms: Sequence[str]) -> pl.DataFrame:
    """One row a target and seed: what the arms share, and `_a`, `_b` of what they do not."""
    shared = ["seed", "target_id", "multiplicity", "mode", "prompt_kind"]
    outcomes = ["extracted", "clique_flag", "direct", "best_distance"]
    a, b = (rows.filter(pl.col("arm") == arm).select(*shared, *outcomes) for arm in arms)
    named = [table.rename({name: f"{name}_{side}" for name in outcomes}) for table, side in ((a, "a"), (b, "b"))]
    return named[0].join(named[1], on=shared, nulls_equal=True, validate="1:1", maintain_order="left")


def contrast(matched: pl.DataFrame, a: pl.Expr, b: pl.Expr) -> tuple[dict[str, int], Effect]:
    """Counts of the four kinds of pairs, and the paired risk difference."""
    kinds = {"both": a & b, "only_a": a & ~b, "only_b": b & ~a, "neither": ~a & ~b}
    counts = matched.select(kind.sum().alias(name) for name, kind in kinds.items()).row(0, named=True)
    return counts, stats.risk_difference(counts["only_a"], counts["only_b"], len(matched), LEVEL)


def judge_primary(matched: pl.DataFrame, arms: list[str], seeds: list[int]) -> dict[str, Any]:
    """The declared outcome.

    One seed: paired risk difference with Tango's interval, which speaks of these two models. Several: Student's t
    over the seeds, widened where it is narrower than the interval of all pairs: a few seeds can agree by chance.
    """
    repeated = matched.filter(REPEATED)
    counts, effect = contrast(repeated, A, B)
    if len(seeds) > 1:
        each = [contrast(repeated.filter(pl.col("seed") == seed), A, B)[1].estimate for seed in seeds]
        effect = widen(stats.t_interval(each, LEVEL), effect)
    by_target = repeated.group_by("target_id", maintain_order=True).agg((A.cast(pl.Int64) - B.cast(pl.Int64)).mean())
    return {
        "contrast": " - ".join(arms),
        "outcome": "extracted: a generation within the δ of the target; targets with multiplicity 2 or more",
        **_report(effect),
        "n_clusters": len(by_target),
        "n_pairs": len(repeated),
        "seeds": seeds,
        "counts": counts,
        "randomisation": _report(stats.randomisation_test(by_target["extracted_a"].to_numpy(), level=LEVEL)),
        "assignment": judge_assignment(matched, seeds),
    }


def widen(over_seeds: Effect, pooled: Effect) -> Effect:
    """The smallest interval that holds both, and the larger p-value."""
    low, high = max(-1.0, min(over_seeds.low, pooled.low)), min(1.0, max(over_seeds.high, pooled.high))
    p, method = max(over_seeds.p_value, pooled.p_value), f"{over_seeds.method}, not narrower than {pooled.method}"
    return Effect(over_seeds.estimate, low, high, LEVEL, over_seeds.n, p, method)


def judge_assignment(matched: pl.DataFrame, seeds: list[int]) -> dict[str, Any]:
    """Is the difference between the arms larger for canaries planted twice or more than for those planted less often?

    Multiplicities were dealt out at random, so this holds for the procedure, with one seed and with a run
    that is worse at everything.
    """
    canaries = matched.filter(pl.col("mode").is_not_null())
    cells = canaries.select(
        "target_id", "seed", d=A.cast(pl.Int64) - B.cast(pl.Int64), treated=pl.col("multiplicity") >= 2
    )
    wide = {name: cells.pivot("seed", index="target_id", values=name).sort("target_id") for name in ("d", "treated")}
    names = [str(seed) for seed in seeds]
    if not len(cells) or wide["d"].null_count().sum_horizontal()[0]:
        return {"p_value": None, "reason": "needs the same canaries, at random multiplicities, in every seed"}
    d, treated = (wide[name].select(names).to_numpy() for name in ("d", "treated"))
    return _report(stats.assignment_test(d, treated.astype(bool), level=LEVEL))


def judge_seed(matched: pl.DataFrame, source: dict[str, Any]) -> dict[str, Any]:
    """The declared outcome for one training seed, with where it comes from."""
    repeated = matched.filter(REPEATED, pl.col("seed") == source["seed"])
    counts, effect = contrast(repeated, A, B)
    return {**source, **_report(effect), "n_clusters": len(repeated), "counts": counts}


def count_multiplicities(rows: pl.DataFrame, arms: list[str], planted: bool) -> Iterator[dict[str, Any]]:
    """Extracted targets by multiplicity, arm and mode. Targets of all seeds count alike: read as description."""
    levels = sorted(rows["multiplicity"].unique()) if planted else list(BUCKETS)
    uppers = levels if planted else [*(level - 1 for level in levels[1:]), None]
    for level, upper in zip(levels, uppers, strict=True):
        within = pl.col("multiplicity").is_between(level, math.inf if upper is None else upper)
        for mode, mine in _by_mode(rows.filter(within)):
            for arm in arms:
                cell = mine.filter(pl.col("arm") == arm)
                if len(cell):
                    k = int(cell["extracted"].sum())
                    interval = stats.wilson if 0 < k < len(cell) else stats.clopper_pearson
                    place = {"multiplicity": level, "to": upper, "mode": mode, "arm": arm}
                    matches = {"matches": cell["matches"].sum(), "generations": cell["n_generations"].sum()}
                    yield place | _report_rate(interval(k, len(cell), LEVEL)) | matches


def _by_mode(rows: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    yield "all", rows
    for mode in ("exact", "edited"):
        if len(some := rows.filter(pl.col("mode") == mode)):
            yield mode, some


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
        "wrong": _report_rate(stats.wilson(wrong, made, LEVEL)),
    }


def fit_doses(rows: pl.DataFrame) -> dict[str, Any]:
    """Dose-response by mode of one arm, members only."""
    members = rows.filter(pl.col("prompt_kind") == "member")
    return {
        mode: stats.dose_response(some["multiplicity"].to_numpy(), some["extracted"].to_numpy(), LEVEL)
        for mode, some in _by_mode(members)
    }


def judge_power(matched: pl.DataFrame, seeds: list[int]) -> dict[str, Any]:
    """What drop one checkpoint of each arm could have shown, by the exact McNemar test."""
    n = min(len(matched.filter(REPEATED, pl.col("seed") == seed)) for seed in seeds)
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


def explore(matched: pl.DataFrame, arms: list[str]) -> dict[str, Any]:
    """Everything that was not declared, each with a p-value adjusted for all of them."""
    repeated = matched.filter(REPEATED)
    outcomes: dict[str, tuple[pl.DataFrame, pl.Expr, pl.Expr]] = {
        "clique and medoid (direct)": (repeated, pl.col("direct_a"), pl.col("direct_b")),
        "clique alone": (repeated, pl.col("clique_flag_a"), pl.col("clique_flag_b")),
        "single images": (matched.filter(prompt_kind="member", multiplicity=1), A, B),
    }
    for delta in (0.15, 0.10, 0.05):
        near = [(pl.col(f"best_distance_{side}") <= delta).fill_null(False) for side in "ab"]
        outcomes[f"any generation within {delta:.2f}"] = (repeated, near[0], near[1])
    outcomes |= {f"mode {mode}": (some, A, B) for mode, some in _by_mode(repeated) if mode != "all"}
    results = []
    for name, (some, a, b) in outcomes.items():
        if len(some):
            counts, effect = contrast(some, a, b)
            results.append({"outcome": name, **_report(effect), "n_pairs": len(some), "counts": counts})
    adjusted = stats.holm([result["p_value"] for result in results])
    for result, p in zip(results, adjusted, strict=True):
        result["p_value_holm"] = p
    return {"contrast": " - ".join(arms), "note": "pairs of all seeds count alike", "outcomes": results}


def _report(effect: Effect) -> dict[str, Any]:
    return {
        "estimate": effect.estimate,
        "interval": [effect.low, effect.high],
        "level": effect.level,
        "method": effect.method,
        "p_value": effect.p_value,
    }


def _report_rate(rate: stats.Rate) -> dict[str, Any]:
    return {
        "k": rate.count,
        "n": rate.n,
        "rate": rate.estimate,
        "interval": [rate.low, rate.high],
        "method": rate.method,
    }


def _plain(value: Any) -> Any:
    """JSON values: floats with six significant digits, None for what is not finite."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
