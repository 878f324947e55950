"""How extraction rises with the number of copies: a logistic curve, and the multiplicity that extracts half.

Pure functions. Bounds that the data cannot give are infinite, and a fit that does not exist says why.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

REACH = 10  # doublings beyond the multiplicities seen, as far as a fitted curve is believed


@dataclass(frozen=True, slots=True)
class DoseResponse:
    """logit P(extracted) = slope * (log2 m - log2 ed50). Without a fit `reason` says why, numbers are NaN."""

    ed50: float  # multiplicity at which half are extracted
    low: float  # 0 when the data give no lower bound
    high: float  # infinite when they give no upper bound
    slope: float  # logits per doubling
    level: float
    n: int
    method: str
    reason: str | None


def dose_response(
    multiplicity: Sequence[int] | np.ndarray, extracted: Sequence[bool] | np.ndarray, level: float = 0.95
) -> DoseResponse:
    """Logistic regression of extraction on log2 m with the multiplicity that extracts half.

    multiplicity, extracted: (n,), m >= 1. Interval of the ED50: profile likelihood, unbounded where the data are.
    """
    m, y = np.asarray(multiplicity, dtype=float), np.asarray(extracted, dtype=bool)
    reason = _refuse_fit(m, y)
    if reason is None:
        x = np.log2(m)
        slope, intercept = _fit_logistic(x, y)
        if slope <= 0:
            reason = "extraction does not rise with multiplicity"
        elif not x.min() - REACH <= -intercept / slope <= x.max() + REACH:
            reason = "extraction rises too little with multiplicity to say where it reaches half"
    if reason is not None:
        nan = math.nan
        return DoseResponse(nan, nan, nan, nan, level, len(y), "not estimable", reason)
    middle = -intercept / slope
    worst = _log_likelihood(slope * x + intercept, y) - stats.chi2.ppf(level, 1) / 2

    def excess(e: float) -> float:
        return _profile(x - e, y) - worst

    low, high = (_walk(excess, middle, direction) for direction in (-1, 1))
    method = "logistic regression on log2 m, profile likelihood"
    return DoseResponse(2**middle, 2**low, 2**high, slope, level, len(y), method, None)


def _refuse_fit(m: np.ndarray, y: np.ndarray) -> str | None:
    """Why the maximum of the likelihood does not exist (Albert & Anderson 1984), or None."""
    if len(np.unique(m)) < 2:
        return "fewer than two multiplicities"
    if not y.any():
        return f"none of {len(y)} was extracted"
    if y.all():
        return f"all {len(y)} were extracted"
    if m[~y].max() <= m[y].min():
        return f"separated: none below m = {m[y].min():.0f} was extracted, all above m = {m[~y].max():.0f} were"
    if m[y].max() <= m[~y].min():
        return "extraction does not rise with multiplicity"
    return None


def _log_likelihood(logits: np.ndarray, y: np.ndarray) -> float:
    return float(special.log_expit(np.where(y, logits, -logits)).sum())


def _fit_logistic(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of maximum likelihood; the problem is concave and, not being separated, has one."""
    design = np.stack([x, np.ones_like(x)])  # (2, n)

    def gradient(beta: np.ndarray) -> np.ndarray:
        return -design @ (y - special.expit(beta @ design))

    found = optimize.minimize(lambda b: -_log_likelihood(b @ design, y), np.zeros(2), jac=gradient, tol=1e-10)
    return float(found.x[0]), float(found.x[1])


def _profile(centred: np.ndarray, y: np.ndarray) -> float:
    """Largest log-likelihood over the slope, with half extracted at 0."""
    found = optimize.minimize_scalar(lambda slope: -_log_likelihood(slope * centred, y), bracket=(0.0, 0.1))
    return -float(found.fun)


def _walk(excess: Callable[[float], float], start: float, direction: int) -> float:
    """Where `excess` falls below 0, away from `start`; infinite when it does not soon."""
    step = 0.25
    while step <= 2 * REACH:
        if excess(start + direction * step) < 0:
            return float(optimize.brentq(excess, start, start + direction * step))
        step *= 1.5
    return direction * math.inf
