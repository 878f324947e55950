"""A stratified random sample of removals, labelled by a person → how many removals are right, with intervals.

In: removals with signal and score; then the labels of the sample. Out: which removals to look at; precision of each
stratum and of all. Strata and their sizes are known before anybody looks, so the estimate is unbiased whatever the
allocation. Knows nothing of pictures or files.
"""

import heapq
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from scipy import optimize

from eval.stats import clopper_pearson

CERTAIN = "bytes"  # equal bytes are the same picture: nobody needs to look
BANDS: dict[str, tuple[float, ...]] = {"pdq": (0.93, 0.97), "copy": (0.8, 0.9)}  # scores where another band begins
FEWEST = 5  # labels of a stratum, as far as there are as many; the others by size
LEVEL = 0.95
METHOD = "Chernoff bound of the weighted sum over the worst shares of all strata (Hoeffding 1963), two-sided"


class SampleError(ValueError):
    """A sample that cannot be drawn, or labels that do not belong to it."""


def stratify(removals: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(id, signal, score) → the same with `stratum`, and the strata: signal, low, high (null: open), removals.

    A stratum is a signal, and of those in BANDS a band of scores: low ≤ score < high.
    """
    bands = [
        {"signal": signal, "low": low, "high": high}
        for signal in sorted(removals["signal"].unique())
        for low, high in zip((None, *BANDS.get(signal, ())), (*BANDS.get(signal, ()), None), strict=True)
    ]
    schema = {"signal": pl.String, "low": pl.Float64, "high": pl.Float64}
    table = pl.DataFrame(bands, schema=schema)
    score = pl.col("score").fill_null(0.0)
    inside = (score >= pl.col("low").fill_null(-math.inf)) & (score < pl.col("high").fill_null(math.inf))
    placed = removals.join(table, on="signal", maintain_order="left").filter(inside)
    sizes = placed.group_by("signal", "low", "high").agg(removals=pl.len().cast(pl.Int64))
    strata = table.join(sizes, on=list(schema), nulls_equal=True, maintain_order="left").with_row_index("stratum")
    numbered = placed.join(strata, on=list(schema), nulls_equal=True, maintain_order="left")
    return numbered.select("id", "signal", "score", pl.col("stratum").cast(pl.Int64)), strata.drop("stratum")


def allocate(sizes: Sequence[int], n: int) -> list[int]:
    """How many of each stratum are drawn: FEWEST each, or all there are, and the rest in proportion (Sainte-Laguë).

    With fewer than that in all, equally many of each. Raises SampleError when n is less than the number of strata.
    """
    if n < len(sizes):
        raise SampleError(f"{n} pairs are too few: there are {len(sizes)} strata (docs/method.md), and each needs one")
    fewest = next(few for few in range(FEWEST, 0, -1) if sum(min(few, size) for size in sizes) <= n)
    drawn = [min(fewest, size) for size in sizes]
    turns = [(-size / (had + 0.5), number) for number, (size, had) in enumerate(zip(sizes, drawn, strict=True))]
    heapq.heapify(turns)
    for _ in range(min(n, sum(sizes)) - sum(drawn)):
        while drawn[turns[0][1]] == sizes[turns[0][1]]:
            heapq.heappop(turns)
        number = turns[0][1]
        drawn[number] += 1
        heapq.heapreplace(turns, (-sizes[number] / (drawn[number] + 0.5), number))
    return drawn


def draw(removals: pl.DataFrame, strata: pl.DataFrame, n: int, seed: int) -> pl.DataFrame:
    """The removals to look at, in a random order that mixes the strata: whoever stops early has a sample as well.

    removals: id, stratum. Equal input and seed give equal samples; nothing is drawn from the stratum CERTAIN.
    """
    asked = [number for number, signal in enumerate(strata["signal"]) if signal != CERTAIN]
    rng = np.random.default_rng(seed)
    chosen = [
        rng.choice(removals.filter(stratum=number)["id"].sort().to_numpy(), drawn, replace=False)
        for number, drawn in zip(asked, allocate(strata["removals"][asked].to_list(), n), strict=True)
    ]
    order = rng.permutation(np.concatenate([*chosen, np.zeros(0, np.int64)]))
    return pl.DataFrame({"id": order}).join(removals, on="id", how="left", maintain_order="left")


def estimate(strata: list[dict[str, Any]], labels: list[tuple[int, str | None]]) -> dict[str, Any]:
    """Precision overall, without equal bytes, and of each stratum.

    strata: signal, low, high, removals. labels: (number of the stratum, "copy", "not-a-copy" or "undecided") in the
    order of the sample, None: no label. What has no label though a later one has was skipped, and counts as undecided.
    Undecided pairs are left out of estimates; lower limits take them as wrong, upper limits as right.
    """
    last = max((place for place, (_, label) in enumerate(labels) if label is not None), default=-1)
    told = [(number, label or "undecided") for number, label in labels[: last + 1]]
    skipped = sum(label is None for _, label in labels[: last + 1])
    rows = []
    for number, stratum in enumerate(strata):
        count = {name: told.count((number, name)) for name in ("copy", "not-a-copy", "undecided")}
        rows.append(stratum | _judge_stratum(stratum["signal"] == CERTAIN, *count.values()))
    asked = [row for row in rows if row["signal"] != CERTAIN]
    doubtful = _combine(asked)
    total, share = sum(row["removals"] for row in rows), sum(row["removals"] for row in asked)
    overall = {
        name: value if value is None else 1 - (1 - value) * share / total
        for name, value in doubtful.items()
        if name in ("precision", "low", "high")
    }
    return {
        "level": LEVEL,
        "method": METHOD,
        "labelled": len(told) - skipped,
        "skipped": skipped,
        "left": len(labels) - len(told),
        "overall": _in_million({"removals": total} | overall),
        "without_equal_bytes": _in_million(doubtful),
        "strata": [_in_million(row) for row in rows],
    }


def _judge_stratum(certain: bool, same: int, different: int, undecided: int) -> dict[str, Any]:
    n, decided = same + different + undecided, same + different
    found: dict[str, Any] = {"labelled": n, "same": same, "different": different, "undecided": undecided}
    if certain:
        return found | {"precision": 1.0, "low": 1.0, "high": 1.0}
    low, high = (clopper_pearson(count, n, LEVEL) for count in (same, same + undecided))
    return found | {"precision": same / decided if decided else None, "low": low.low, "high": high.high}


def _combine(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Strata with their labels → precision over all of them; None where a stratum has no label that decides."""
    sizes = np.array([row["removals"] for row in rows], float)
    n, same, different, undecided = (
        np.array([row[name] for row in rows], float) for name in ("labelled", "same", "different", "undecided")
    )
    weights = sizes / sizes.sum()
    known = bool((same + different).all())
    precision = float(weights @ (same / (same + different))) if known else None
    wrong = bound_share(different + undecided, n, weights, (1 - LEVEL) / 2)
    right = bound_share(same + undecided, n, weights, (1 - LEVEL) / 2)
    return {"removals": int(sizes.sum()), "precision": precision, "low": 1 - wrong, "high": right}


def _in_million(row: dict[str, Any]) -> dict[str, Any]:
    limits = {"estimate": row["precision"], "low": row["high"], "high": row["low"]}
    wrong = {name: None if value is None else 1e6 * (1 - value) for name, value in limits.items()}
    return row | {"wrong_per_million": wrong}


def bound_share(hits: np.ndarray, n: np.ndarray, weights: np.ndarray, alpha: float) -> float:
    """Upper limit of Σ weights · p at confidence 1 - alpha, for hits (H,) of n (H,) drawn from H strata with shares p.

    Weights sum to 1. For every s > 0, P(T ≤ t) ≤ exp(s t) Π (1 - p c)^n, where T = Σ hits · weights / n and
    c = 1 - exp(-s · weights / n) (Chernoff; Hoeffding 1963, theorem 4: without replacement too). The limit is the
    largest Σ weights · p that no s refutes. Without hits in one stratum that is Clopper and Pearson's limit. A stratum
    that nobody looked at may be all hits.
    """
    seen = n > 0
    hits, n, unseen, weights = hits[seen], n[seen], float(weights[~seen].sum()), weights[seen]
    if not len(n):
        return 1.0
    each = weights / n  # what a hit counts
    total = float(hits @ each)

    def limit(log_s: float) -> float:
        """What this s does not refute: a limit for each s, so an inexact minimum is one as well."""
        s = math.exp(log_s)
        c = -np.expm1(-s * each)
        least = math.log(alpha) - s * total

        def shares(nu: float) -> np.ndarray:
            """Those with the largest Σ weights · p, by Lagrange."""
            return np.clip(1 / c - nu / each, 0, 1)

        def excess(nu: float) -> float:
            p = shares(nu)
            return float(n @ np.where(p < 1, np.log1p(-np.minimum(p * c, 1 - 1e-16)), -s * each)) - least

        if excess(0) >= 0:
            return float(weights.sum())
        root = optimize.brentq(excess, 0, float((each / c).max()))
        return float(weights @ shares(root * (1 - 1e-9)))

    scale = -math.log(each.mean())
    grid = scale + np.linspace(-7, 6, 14)
    best = int(np.argmin([limit(log_s) for log_s in grid]))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    found = optimize.minimize_scalar(limit, bounds=around, method="bounded", options={"xatol": 0.01})
    return min(1.0, unseen + min(float(found.fun), limit(grid[best])))
