"""Intervals, tests and power for few checkpoints and few clusters. Numbers in, frozen results out.

Everything is a pure function; what needs chance takes a `seed`. Bounds that the data cannot give are infinite,
estimates that do not exist are NaN, and a result that cannot be computed says why. Knows nothing of attacks.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from itertools import permutations
from typing import Any

import numpy as np
from scipy import optimize, special, stats

EXACT = 2**16  # as many rearrangements are enumerated; more are sampled
DRAWS = 20_000


@dataclass(frozen=True, slots=True)
class Rate:
    """`count` of `n` with an interval."""

    count: int
    n: int
    estimate: float  # NaN when n = 0
    low: float
    high: float
    level: float
    method: str


@dataclass(frozen=True, slots=True)
class Effect:
    """A difference with its interval and the p-value of "no difference", two-sided, by the same method."""

    estimate: float
    low: float
    high: float
    level: float
    n: int  # independent units
    p_value: float
    method: str


def wilson(count: int, n: int, level: float = 0.95) -> Rate:
    """Score interval of a proportion (Wilson 1927)."""
    return _rate(count, n, level, "two-sided", "wilson", "Wilson")


def clopper_pearson(count: int, n: int, level: float = 0.95, side: str = "two-sided") -> Rate:
    """Exact interval of a proportion (Clopper & Pearson 1934). side: "two-sided", "upper" or "lower" bound."""
    alternative = {"two-sided": "two-sided", "upper": "less", "lower": "greater"}[side]
    return _rate(count, n, level, alternative, "exact", f"Clopper-Pearson, {side}")


def _rate(count: int, n: int, level: float, alternative: str, kind: str, method: str) -> Rate:
    if n == 0:
        return Rate(count, n, math.nan, 0.0, 1.0, level, method)
    low, high = stats.binomtest(count, n, alternative=alternative).proportion_ci(level, kind)
    return Rate(count, n, count / n, float(low), float(high), level, method)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value of the exact McNemar test, given the two kinds of discordant pairs."""
    tail = special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)  # of a symmetric distribution: doubled
    return min(1.0, 2 * float(tail))


def risk_difference(only_a: int, only_b: int, n: int, level: float = 0.95) -> Effect:
    """P(a) - P(b) over n pairs, from the discordant ones: score interval of Tango 1998 (Stat. Med. 17:891).

    It keeps its coverage with few pairs and with zeros. p-value: exact McNemar.
    """
    if n == 0:
        return Effect(math.nan, -1.0, 1.0, level, 0, math.nan, "no pairs")
    z = stats.norm.ppf((1 + level) / 2)
    estimate = (only_a - only_b) / n

    def excess(delta: float, side: int) -> float:
        return side * tango_score(only_a, only_b, n, delta) - z

    edge = 1 - 1e-12
    low = optimize.brentq(excess, -edge, estimate, args=(1,)) if excess(-edge, 1) > 0 > excess(estimate, 1) else -1
    high = optimize.brentq(excess, estimate, edge, args=(-1,)) if excess(edge, -1) > 0 > excess(estimate, -1) else 1
    p = mcnemar_exact(only_a, only_b)
    return Effect(estimate, float(low), float(high), level, n, p, "paired score interval (Tango), exact McNemar")


def tango_score(only_a: int, only_b: int, n: int, delta: float) -> float:
    """Standardised distance of the observed difference from `delta`, about N(0, 1) if that is the true one."""
    distance = only_a - only_b - n * delta
    if distance == 0:
        return 0.0
    # P(only b) by maximum likelihood, given that P(only a) - P(only b) = delta: root of a quadratic
    b = (2 * n - only_a + only_b) * delta - only_a - only_b
    c = -only_b * delta * (1 - delta)
    p = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
    variance = n * (2 * p + delta * (1 - delta))
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def randomisation_test(
    differences: Sequence[float] | np.ndarray, *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Effect:
    """Mean of paired differences (n,), one a unit: the arms of each unit change places at random.

    All sign changes are enumerated when there are at most 2^16, else sampled, with p = (1 + hits) / (1 + draws)
    (Phipson & Smyth 2010). With differences of -1, 0 and 1 the exact p-value is that of McNemar's test. The
    interval inverts the test: it holds the shifts t for which the signs of (differences - t) could be chance
    (Hartigan 1969), which assumes symmetry about the mean. Differences that are all equal give no interval.
    """
    d = np.asarray(differences, dtype=float)
    if not len(d):
        return Effect(math.nan, -math.inf, math.inf, level, 0, math.nan, "no units")
    signs, exact = _draw_signs(len(d), draws, seed)
    null, shift = signs @ d / len(d), signs.mean(axis=1)
    low, high = _invert(d.mean(), null, shift, level, exact) if np.ptp(d) > 0 else (-math.inf, math.inf)
    if not exact:  # a unit without a difference has no sign to change
        signs, exact = _draw_signs(int(np.count_nonzero(d)), draws, seed)
        null = signs @ d[d != 0] / len(d)
    method = f"sign changes of {len(d)} units, {_describe(len(null), exact)}"
    return Effect(float(d.mean()), low, high, level, len(d), _tail(d.mean(), null, exact), method)


def assignment_test(
    differences: np.ndarray, treated: np.ndarray, *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Effect:
    """Treated minus untreated units, as averages over the columns of differences (n, S): S seeds with own assignment.

    Randomisation test of Fisher: what was assigned to a unit (a row of `treated`, bool (n, S)) could have gone to
    any other. A whole row moves, so units may differ, columns may differ, and a run that is better or worse
    at everything does no harm. The interval inverts the test for an effect that is equal for all; differences
    that are all equal give none.
    """
    d, w = np.asarray(differences, dtype=float), np.asarray(treated, dtype=bool)
    n, seeds = d.shape
    if not (w.any(axis=0) & ~w.all(axis=0)).all():
        return Effect(math.nan, -math.inf, math.inf, level, n, math.nan, "no treated or no untreated units")
    contrast = np.where(w, 1 / w.sum(axis=0), -1 / (~w).sum(axis=0)) / seeds  # (n, S)
    exact = n < 13 and math.factorial(n) <= EXACT
    if exact:
        order = np.array(list(permutations(range(n))))
    else:
        rng = np.random.default_rng(seed)
        order = rng.permuted(np.tile(np.arange(n), (draws, 1)), axis=1)
    rows = np.arange(n)
    null = (d @ contrast.T)[rows, order].sum(axis=1)
    shift = (w @ contrast.T)[rows, order].sum(axis=1)
    estimate = float((d * contrast).sum())
    low, high = _invert(estimate, null, shift, level, exact) if np.ptp(d) > 0 else (-math.inf, math.inf)
    method = f"permutation of the assignment of {n} units, {_describe(len(order), exact)}"
    return Effect(estimate, low, high, level, n, _tail(estimate, null, exact), method)


def _draw_signs(n: int, draws: int, seed: int) -> tuple[np.ndarray, bool]:
    """float (K, n) of -1 and 1, and whether these are all there are."""
    if 2**n <= EXACT:
        return 1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1), True
    return 1.0 - 2.0 * np.random.default_rng(seed).integers(0, 2, (draws, n)), False


def _describe(count: int, exact: bool) -> str:
    return f"all {count:,}" if exact else f"{count:,} draws"


def _tail(observed: float, null: np.ndarray, exact: bool) -> float:
    """Share of the null distribution at least as far from 0; sums of equal terms may differ in the last bit."""
    hits = int(np.count_nonzero(np.abs(null) >= abs(observed) - 1e-9))
    return hits / len(null) if exact else (1 + hits) / (1 + len(null))


def _invert(observed: float, null: np.ndarray, shift: np.ndarray, level: float, exact: bool) -> tuple[float, float]:
    """All effects t with p(t) > 1 - level, when removing t turns observed into observed - t and null into
    null - t * shift.

    A rearrangement counts against t below `observed` when |null - t * shift| >= observed - t: from
    t = min((observed - null) / (1 - shift), (observed + null) / (1 + shift)) on; above it likewise with max.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        below = (observed - null) / (1 - shift)
        above = (observed + null) / (1 + shift)
    always = np.isclose(np.abs(shift), 1)  # the arrangement that was observed, or its mirror image
    from_left = np.sort(np.where(always, -math.inf, np.minimum(below, above)))
    from_right = np.sort(np.where(always, math.inf, np.maximum(below, above)))[::-1]
    alpha = 1 - level
    # the first t that at least `alpha` of the rearrangements (and the observed one, if sampled) count against
    place = math.floor(alpha * len(null) + 1e-9) if exact else math.floor(alpha * (1 + len(null)) + 1e-9) - 1
    return float(from_left[max(place, 0)]), float(from_right[max(place, 0)])


def t_interval(values: Sequence[float], level: float = 0.95, resolution: float = 0.0) -> Effect:
    """Mean over training seeds with Student's t, S - 1 degrees of freedom. Raises ValueError below two seeds.

    resolution: step in which the values come (1 / n for shares of n). Their variance counts as no less than that of
    rounding, resolution² / 12 (Sheppard 1898): two seeds that agree by chance would else make the interval a point.
    """
    if len(values) < 2:
        raise ValueError("an interval over seeds needs at least two of them")
    mean = float(np.mean(values))
    error = math.sqrt(max(float(np.var(values, ddof=1)), resolution**2 / 12) / len(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    certain = 1.0 if mean == 0 else 0.0  # all seeds agree exactly
    p = float(2 * stats.t.sf(abs(mean) / error, len(values) - 1)) if error > 0 else certain
    return Effect(mean, mean - half, mean + half, level, len(values), p, f"t({len(values) - 1}) over seeds")


def bootstrap_clusters(differences: np.ndarray, level: float = 0.95, *, draws: int = 10_000, seed: int = 0) -> Effect:
    """Mean of differences (n, S), clusters (rows) drawn anew: one draw for all S seeds, whose runs stay as they are.

    It says nothing of other training runs. BCa (Efron 1987) where at least 20 differences are not 0, else percentiles.
    """
    d = np.asarray(differences, dtype=float)
    if len(d) < 2 or np.ptp(d.mean(axis=1)) == 0:
        return Effect(float(d.mean()) if d.size else math.nan, -1.0, 1.0, level, len(d), math.nan, "no bootstrap")
    method = "BCa" if np.count_nonzero(d) >= 20 else "percentile"
    found = stats.bootstrap(
        (d.mean(axis=1),), np.mean, n_resamples=draws, confidence_level=level, method=method, rng=seed
    ).confidence_interval
    name = f"bootstrap of clusters, {method}, {draws:,} draws"
    return Effect(float(d.mean()), float(found.low), float(found.high), level, len(d), math.nan, name)


def power_paired(n: int, only_a: float, only_b: float, alpha: float = 0.05) -> float:
    """Power of the exact McNemar test with n pairs, of which shares only_a and only_b are discordant."""
    if only_a + only_b == 0:
        return 0.0
    discordant = np.arange(1, n + 1)
    critical = stats.binom.ppf(alpha / 2, discordant, 0.5)
    critical -= 2 * stats.binom.cdf(critical, discordant, 0.5) > alpha  # reject at this count or fewer
    share = only_a / (only_a + only_b)
    reject = stats.binom.cdf(critical, discordant, share) + stats.binom.cdf(critical, discordant, 1 - share)
    return float(stats.binom.pmf(discordant, n, only_a + only_b) @ reject)


def smallest_drop(n: int, only_b: float = 0.0, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest P(a) - P(b) that n pairs show with this power; NaN when they show none.

    only_b: share of pairs that are discordant the other way round.
    """

    def lack(only_a: float) -> float:
        return power_paired(n, only_a, only_b, alpha) - power

    if n == 0 or lack(1 - only_b) < 0:
        return math.nan
    return float(optimize.brentq(lack, only_b, 1 - only_b)) - only_b


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order given. NaN counts for none and stays NaN."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")[: np.count_nonzero(~np.isnan(p))]
    adjusted = np.full(len(p), math.nan)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return adjusted.tolist()


def plain(value: Any) -> Any:
    """JSON values: floats with six significant digits, None for what is not finite; dataclasses as dicts."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
