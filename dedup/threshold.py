"""Scores of unrelated pairs → how many of them to expect at or above a threshold.

In: the scores of a random sample of pairs of the user's own data, from which pairs known to be related were removed.
Out: a `Tail`, which turns a threshold into an expected number of false pairs and back. Knows nothing of what a score
means, only that higher is more alike.

The highest scores of the sample, above `start`, are taken to thin out exponentially (peaks over threshold; Pickands
1975; the generalised Pareto law with shape 0). A free shape ≤ 0 fits a sample a little better, but often it ends before
the scores do and promises no false pairs at all. Scores with steps, like numbers of matching points, follow the
geometric law, which is the same one on a lattice.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

FURTHEST = 1_000  # times rarer than one in the sample: the least probability that is claimed
MIN_SCORES = 1_000  # scores that a tail is fitted to
PEAKS = 200  # of them the highest that are fitted, or a hundredth of a small sample; more reach into the bulk
SHARE = 0.01
MIN_PEAKS = 50
TIMES = 6  # as many as are left out as possibly related
LEVELS = 3  # scores that differ, at least, when some are left out
REDRAWN = 200  # samples of the bootstrap
LEVEL = 0.95  # of an interval
POINTS = 40  # of the curve in a report


class ThresholdError(ValueError):
    """There is no tail to fit: too few scores, or scores that do not thin out."""


class Threshold(NamedTuple):
    """`value`: pairs with at least this score. `expected`: false ones among them. `supported`: is that few enough?

    Not supported: fewer false pairs were asked for than the sample can tell; `value` is then the strictest threshold it
    can speak for.
    """

    value: float
    expected: float
    supported: bool


class Fit(NamedTuple):
    """Unrelated pairs of the sample at or above the start, and by how much the score rises while they become 1/e."""

    above: float
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """Of `pairs_total` pairs, those by chance at or above a score. Up to `start` they are counted in the sample."""

    pairs_total: int
    scores: np.ndarray = field(repr=False)  # float64, the sample, descending
    start: float
    step: float  # between two scores that are possible
    fit: Fit
    redrawn: list[Fit] = field(repr=False)

    @property
    def fewest(self) -> float:
        """The least number of false pairs that is claimed."""
        return self.pairs_total / len(self.scores) / FURTHEST

    def expected(self, threshold: float) -> float:
        """Expected number of unrelated pairs with a score ≥ threshold, never below `fewest`."""
        return max(self.fewest, self._count(threshold, self.fit))

    def interval(self, threshold: float) -> tuple[float, float]:
        """Of `expected`, at LEVEL, by the bootstrap. Pairs with a row in common count as independent."""
        counts = [self._count(threshold, fit) for fit in self.redrawn]
        low, high = np.quantile(counts, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return max(self.fewest, float(low)), max(self.fewest, float(high))

    def threshold_for(self, max_false: float) -> Threshold:
        """The smallest threshold with `expected` ≤ max_false, or the strictest that the sample supports."""
        supported = max_false >= self.fewest
        allowed = max(max_false, self.fewest) * len(self.scores) / self.pairs_total  # in the sample
        if allowed < self.fit.above:
            steps = math.ceil(self.fit.scale * math.log(self.fit.above / allowed) / self.step - 1e-6)
            value = self.start + steps * self.step
        else:
            counted = math.floor(allowed - self.fit.above + self._counted(self.start) + 1e-9)
            value = float(self.scores[counted]) + self.step if counted < len(self.scores) else float(self.scores[-1])
        return Threshold(value, self.expected(value), supported)

    def _counted(self, threshold: float) -> int:
        """Scores of the sample ≥ threshold; nothing is lost to the last bit of a sum of steps."""
        return int(np.searchsorted(-self.scores, -threshold + 1e-6 * self.step, side="right"))

    def _count(self, threshold: float, fit: Fit) -> float:
        if threshold <= self.start:
            in_sample = self._counted(threshold) - self._counted(self.start) + fit.above
        else:
            steps = math.ceil((threshold - self.start) / self.step - 1e-6)
            in_sample = fit.above * math.exp(-steps * self.step / fit.scale)
        return self.pairs_total * in_sample / len(self.scores)


def fit_tail(
    scores: np.ndarray, pairs_total: int, *, related: int = 0, step: float | None = None, seed: int = 0
) -> Tail:
    """Fit the tail of a random sample of scores, for `pairs_total` pairs of which it is a sample.

    related: so many of the highest scores may be those of related pairs and are not looked at; what unrelated ones
        there are among them is told by the scores below.
    step: between two possible scores; None: 1 for whole numbers, else the smallest difference there is.
    Raises ThresholdError.
    """
    if len(scores) < MIN_SCORES or not np.isfinite(scores).all():
        raise ThresholdError(
            f"a null model needs {MIN_SCORES:,} finite scores of unrelated pairs, there are {len(scores):,}"
        )
    ordered = -np.sort(-scores.astype(np.float64))
    peaks = max(min(PEAKS, round(SHARE * len(ordered))), MIN_PEAKS, TIMES * related)
    if related + peaks > len(ordered) // 2:
        raise ThresholdError(f"{related:,} of {len(ordered):,} scores may be related pairs: too many for a null model")
    start, end = ordered[related + peaks - 1], ordered[related - 1] if related else math.inf
    step = step or _find_step(ordered[ordered >= start])
    start = min(start, end - LEVELS * step)
    heights = ordered[(ordered >= start) & (ordered < end)] - start
    fit = _fit(heights, end - start, step) if start >= ordered[-1] else None
    if fit is None or fit.scale >= 3 * (end - start):
        raise ThresholdError(f"the {related + peaks:,} highest scores do not thin out: no tail to fit")
    rng = np.random.default_rng(seed)
    again = [rng.choice(heights, max(2, rng.poisson(len(heights)))) for _ in range(REDRAWN)]
    redrawn = [_fit(sample, end - start, step) for sample in again]
    return Tail(pairs_total, ordered, float(start), step, fit, redrawn)


def sample_pairs(n: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs of n rows, all equally likely, without order: int64 i < j, sorted; all pairs if size allows."""
    total = n * (n - 1) // 2
    if size >= total:
        number = np.arange(total)
    else:
        number = np.sort(np.random.default_rng(seed).choice(total, size, replace=False, shuffle=False))
    j = ((1 + np.sqrt(8.0 * number + 1)) // 2).astype(np.int64)  # pair j (j − 1) / 2 + i
    j -= j * (j - 1) // 2 > number  # roots of large numbers are off by one now and then
    j += j * (j + 1) // 2 <= number
    i = number - j * (j - 1) // 2
    order = np.lexsort((j, i))
    return i[order], j[order]


def describe(tail: Tail) -> dict[str, Any]:
    """What a report shows: how the tail was fitted and the curve of thresholds and expected false pairs."""
    strictest = tail.threshold_for(tail.fewest).value
    first = min(len(tail.scores) - 1, max(len(tail.scores) // 10, tail._counted(tail.start)))
    values = np.linspace(tail.scores[first], strictest, POINTS)
    values = np.unique(tail.start + np.round((values - tail.start) / tail.step) * tail.step)
    curve = []
    for value in values.tolist():
        low, high = tail.interval(value)
        curve.append({"threshold": value, "expected": tail.expected(value), "low": low, "high": high})
    return {
        "pairs_total": tail.pairs_total,
        "sample": len(tail.scores),
        "start": tail.start,
        "above_start": tail.fit.above,
        "scale": tail.fit.scale,
        "step": tail.step,
        "fewest": tail.fewest,
        "strictest": strictest,
        "curve": curve,
    }


def _find_step(scores: np.ndarray) -> float:
    if np.array_equal(scores, np.round(scores)):
        return 1.0
    gaps = -np.diff(scores)
    if not (gaps > 0).any():
        raise ThresholdError(f"the {len(scores):,} highest scores are equal: no tail to fit")
    return max(1e-9, float(gaps[gaps > 0].min()))


def _fit(heights: np.ndarray, width: float, step: float) -> Fit:
    """Likeliest geometric law of multiples of `step` that are seen below `width`, maybe infinite.

    The mean of such numbers, in steps, is 1 / (e^r − 1) − L / (e^(rL) − 1), with L = width / step and r = step / scale.
    """
    mean = (heights.sum() + step) / len(heights)  # as if one were a step further: never 0
    shortest = step / math.log1p(step / mean)  # what it is for an infinite width
    if math.isinf(width):
        return Fit(float(len(heights)), shortest)

    def excess(scale: float) -> float:
        return step / math.expm1(step / scale) - width / math.expm1(min(width / scale, 700.0)) - mean

    longest = max(25 * width, 2 * shortest)
    if excess(shortest) >= 0:  # by the last bit, when nothing is missing beyond the width
        return Fit(len(heights) / -math.expm1(-width / shortest), shortest)
    from scipy.optimize import brentq  # a quarter of a second, for large datasets alone

    scale = brentq(excess, shortest, longest) if excess(longest) > 0 else longest
    return Fit(len(heights) / -math.expm1(-width / scale), scale)
