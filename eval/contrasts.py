"""Two arms of the comparison table → one contrast: estimate, intervals, and what each of them speaks of.

The unit is the target, not the generation. Three kinds of interval, never mixed: over the assignment of multiplicities
(planted canaries), over training seeds, and over the targets of the models at hand ("these checkpoints").
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl

from eval import stats
from eval.stats import Effect, Rate

LEVEL = 0.95
AT_LEAST = 2  # copies from which an image counts as repeated
A, B = pl.col("extracted_a"), pl.col("extracted_b")
OUTCOMES = ("extracted", "clique_flag", "direct", "best_distance", "copies")
CHECKPOINTS = "these checkpoints, not others trained the same way"


def repeated(at_least: int) -> pl.Expr:
    return (pl.col("prompt_kind") == "member") & (pl.col("multiplicity") >= at_least)


def match_arms(rows: pl.DataFrame, arms: Sequence[str]) -> pl.DataFrame:
    """One row a target and a seed that both arms have: what they share, and `_a`, `_b` of what they do not."""
    shared = ["seed", "target_id", "multiplicity", "mode", "prompt_kind"]
    a, b = (rows.filter(pl.col("arm") == arm).select(*shared, *OUTCOMES) for arm in arms)
    named = [table.rename({name: f"{name}_{side}" for name in OUTCOMES}) for table, side in ((a, "a"), (b, "b"))]
    return named[0].join(named[1], on=shared, nulls_equal=True, validate="1:1", maintain_order="left")


def count_pairs(matched: pl.DataFrame, a: pl.Expr, b: pl.Expr) -> tuple[dict[str, int], Effect]:
    """Counts of the four kinds of pairs, and the paired risk difference."""
    kinds = {"both": a & b, "only_a": a & ~b, "only_b": b & ~a, "neither": ~a & ~b}
    counts = matched.select(kind.sum().alias(name) for name, kind in kinds.items()).row(0, named=True)
    return counts, stats.risk_difference(counts["only_a"], counts["only_b"], len(matched), LEVEL)


def judge_contrast(rows: pl.DataFrame, arms: Sequence[str], at_least: int = AT_LEAST) -> dict[str, Any]:
    """The first arm minus the second, over targets that stand `at_least` times in the original data.

    The interval of `estimate` is, for canaries whose multiplicities were dealt out at random, that of the randomisation
    test over the assignment (`widen`); then the estimate is corrected for what the arms differ in at fewer copies.
    Else, with several seeds, that of Student's t over them; with one, Tango's, which speaks of these two models.
    """
    matched = match_arms(rows, arms)
    some = matched.filter(repeated(at_least))
    seeds = sorted(some["seed"].unique())
    counts, pooled = count_pairs(some, A, B)
    assignment, over_seeds = judge_assignment(matched, at_least), judge_seeds(some, seeds)
    found: Effect
    if isinstance(assignment, Effect):
        found, scope = widen(assignment, pooled), "the assignment of multiplicities to images, in these training runs"
    elif isinstance(over_seeds, Effect):
        found, scope = over_seeds, f"the training procedure, from {len(seeds)} seeds"
    else:
        found, scope = pooled, CHECKPOINTS
    each = [judge_seed(some, seed) for seed in seeds]
    signs = {(seed["estimate"] > 0) - (seed["estimate"] < 0) for seed in each}
    return {
        "contrast": " - ".join(arms),
        "outcome": f"extracted: a generation within the δ of the target; targets with multiplicity {at_least} or more",
        **report(found),
        "scope": scope,
        "n_clusters": some["target_id"].n_unique(),
        "n_pairs": len(some),
        "seeds": seeds,
        "counts": counts,
        "signs_agree": len(signs) == 1 and 0 not in signs,
        "per_seed": each,
        "plain": {"estimate": pooled.estimate, "note": "share given back by the first arm minus that by the second"},
        "assignment": report(assignment) if isinstance(assignment, Effect) else {"reason": assignment},
        "over_seeds": report(over_seeds) if isinstance(over_seeds, Effect) else {"reason": over_seeds},
        "checkpoints": judge_checkpoints(some, pooled),
        "singletons": judge_singletons(matched),
    }


def widen(assignment: Effect, pooled: Effect) -> Effect:
    """The interval of the randomisation test, on no side shorter than that of the pairs, and within -1 … 1.

    It is inverted for an effect that is equal for all images: where all of them differ equally, it would be a point.
    """
    low = min(assignment.low, assignment.estimate - (pooled.estimate - pooled.low))
    high = max(assignment.high, assignment.estimate + (pooled.high - pooled.estimate))
    if not np.isfinite([assignment.low, assignment.high]).all():  # no image tells, or too few of them
        low, high = (pooled.low, pooled.high) if pooled.estimate == 0 == assignment.estimate else (-1.0, 1.0)
    method = f"{assignment.method}; not narrower than the paired score interval (Tango)"
    return Effect(assignment.estimate, max(-1.0, low), min(1.0, high), LEVEL, assignment.n, assignment.p_value, method)


def judge_assignment(matched: pl.DataFrame, at_least: int) -> Effect | str:
    """Is the difference between the arms larger for canaries planted `at_least` times than for the others?

    Multiplicities were dealt out at random, so this holds with one seed, and with a run that is worse at everything.
    The reason why there is no answer, where they were not.
    """
    canaries = matched.filter(pl.col("mode").is_not_null())
    if canaries.is_empty():
        return "multiplicities were not dealt out at random: nothing was planted"
    d_ = A.cast(pl.Int64) - B.cast(pl.Int64)
    cells = canaries.select("target_id", "seed", d=d_, treated=pl.col("multiplicity") >= at_least)
    wide = {name: cells.pivot("seed", index="target_id", values=name).sort("target_id") for name in ("d", "treated")}
    if wide["d"].null_count().sum_horizontal()[0]:
        return "needs the same canaries in every seed"
    names = [str(seed) for seed in sorted(cells["seed"].unique())]
    d, treated = (wide[name].select(names).to_numpy() for name in ("d", "treated"))
    effect = stats.assignment_test(d, treated.astype(bool), level=LEVEL)
    return effect if effect.n and not np.isnan(effect.estimate) else "no canaries on both sides of the limit"


def judge_seeds(some: pl.DataFrame, seeds: list[int]) -> Effect | str:
    """Student's t over the training seeds: what another training run may be expected to show."""
    if len(seeds) < 2:
        return "one seed: nothing is known of how much another training run would differ"
    parts = [some.filter(pl.col("seed") == seed) for seed in seeds]
    each = [count_pairs(part, A, B)[1].estimate for part in parts]
    found = stats.t_interval(each, LEVEL, resolution=1 / min(map(len, parts)))
    low, high = max(-1.0, found.low), min(1.0, found.high)
    return Effect(found.estimate, low, high, LEVEL, found.n, found.p_value, found.method)


def judge_seed(some: pl.DataFrame, seed: int) -> dict[str, Any]:
    mine = some.filter(pl.col("seed") == seed)
    counts, effect = count_pairs(mine, A, B)
    return {"seed": seed, **report(effect), "scope": CHECKPOINTS, "n_clusters": len(mine), "counts": counts}


def judge_checkpoints(some: pl.DataFrame, pooled: Effect) -> dict[str, Any]:
    """What the pairs of all seeds say of the models at hand."""
    d = some.select("target_id", "seed", d=A.cast(pl.Int64) - B.cast(pl.Int64))
    wide = d.pivot("seed", index="target_id", values="d").sort("target_id").drop("target_id")
    by_target = wide.mean_horizontal().to_numpy()
    return {
        "scope": CHECKPOINTS,
        "pairs": report(pooled),
        "bootstrap": report(stats.bootstrap_clusters(by_target[:, None], LEVEL)),
        "sign_changes": report(stats.randomisation_test(by_target, level=LEVEL)),
    }


def judge_singletons(matched: pl.DataFrame) -> dict[str, Any] | None:
    """Images that stood once. At equal steps a deduplicated model sees them more often: they may come back more."""
    single = matched.filter(prompt_kind="member", multiplicity=1)
    if single.is_empty():
        return None
    counts, effect = count_pairs(single, A, B)
    over_seeds = judge_seeds(single, sorted(single["seed"].unique()))
    best = over_seeds if isinstance(over_seeds, Effect) else effect
    worse = effect.estimate < 0
    return {**report(best), "n_pairs": len(single), "counts": counts, "more_in_second": worse}


def explore(rows: pl.DataFrame, arms: Sequence[str], at_least: int) -> dict[str, Any]:
    """Other outcomes of the same two arms: none was declared, so each p-value is adjusted for all of them."""
    matched = match_arms(rows, arms)
    some = matched.filter(repeated(at_least))
    outcomes: dict[str, tuple[pl.DataFrame, pl.Expr, pl.Expr]] = {
        "clique and medoid (direct)": (some, pl.col("direct_a"), pl.col("direct_b")),
        "clique alone": (some, pl.col("clique_flag_a"), pl.col("clique_flag_b")),
        "single images": (matched.filter(prompt_kind="member", multiplicity=1), A, B),
    }
    for delta in (0.15, 0.10, 0.05):
        near = [(pl.col(f"best_distance_{side}") <= delta).fill_null(False) for side in "ab"]
        outcomes[f"any generation within {delta:.2f}"] = (some, near[0], near[1])
    outcomes |= {f"mode {mode}": (part, A, B) for mode, part in by_mode(some) if mode != "all"}
    results = []
    for name, (part, a, b) in outcomes.items():
        if len(part):
            counts, effect = count_pairs(part, a, b)
            results.append({"outcome": name, **report(effect), "n_pairs": len(part), "counts": counts})
    for result, p in zip(results, stats.holm([result["p_value"] for result in results]), strict=True):
        result["p_value_holm"] = p
    return {"contrast": " - ".join(arms), "note": "pairs of all seeds count alike", "outcomes": results}


def by_mode(rows: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    yield "all", rows
    for mode in ("exact", "edited"):
        if len(some := rows.filter(pl.col("mode") == mode)):
            yield mode, some


def report(effect: Effect) -> dict[str, Any]:
    return {
        "estimate": effect.estimate,
        "interval": [effect.low, effect.high],
        "level": effect.level,
        "method": effect.method,
        "p_value": effect.p_value,
    }


def report_rate(rate: Rate) -> dict[str, Any]:
    return {
        "k": rate.count,
        "n": rate.n,
        "rate": rate.estimate,
        "interval": [rate.low, rate.high],
        "method": rate.method,
    }
