"""What a design can show, before anything is trained: the smallest drop, and how many images it takes.

Numbers in, numbers out. The promise is for the test that the verdict reports; tests simulate whether it is kept.
"""

import math

import numpy as np
from scipy import optimize, special

from eval import stats

BETWEEN = 0.5  # standard deviation of training runs in logits, as far as is known for small models
SIMULATIONS, DRAWS = 400, 999
FEWEST = 6  # pairs that differ: with five, even if all agree, McNemar's exact p is .0625


def smallest_assigned_drop(treated: np.ndarray, level: float = 0.95, power: float = 0.8, seed: int = 0) -> float:
    """Smallest drop that `stats.assignment_test` shows with this power; NaN when it shows none.

    treated: bool (n, S), which of n canaries are planted twice or more in each seed. Simulated: the first arm gives
    back a share `drop` of them, in a run more and in another less (`BETWEEN`), the second none, nobody the others.
    """
    w = np.asarray(treated, dtype=bool)
    n, seeds = w.shape
    if not seeds or not (w.any(axis=0) & ~w.all(axis=0)).all():
        return math.nan
    rng = np.random.default_rng(seed)
    contrast = np.where(w, 1 / w.sum(axis=0), -1 / (~w).sum(axis=0)) / seeds  # (n, S)
    order = np.argsort(rng.random((DRAWS, n)), axis=1)
    moved = contrast[order].reshape(DRAWS, n * seeds)
    shift = BETWEEN * rng.standard_normal((SIMULATIONS, 1, seeds))
    chance = rng.random((SIMULATIONS, n, seeds))

    def lack(drop: float) -> float:
        y = (chance < special.expit(special.logit(drop) + shift)) & w  # (simulations, n, S)
        flat = y.reshape(SIMULATIONS, n * seeds).T.astype(float)
        observed, null = contrast.ravel() @ flat, moved @ flat
        p = (1 + (np.abs(null) >= np.abs(observed) - 1e-9).sum(axis=0)) / (1 + DRAWS)
        return float((p <= 1 - level).mean()) - power

    edge = 1 - 1e-6
    return float(optimize.brentq(lack, 1e-6, edge, xtol=1e-3)) if lack(edge) >= 0 else math.nan


def clusters_needed(drop: float, level: float = 0.95, power: float = 0.8) -> int:
    """Fewest clusters with which one checkpoint of each arm shows a drop, by the exact McNemar test."""
    low, high = 1, 2
    while not stats.power_paired(high, drop, 0.0, 1 - level) >= power:
        low, high = high, 2 * high
        if high > 2**20:
            raise ValueError(f"a drop of {drop:g} takes more than a million clusters")
    while low + 1 < high:
        middle = (low + high) // 2
        enough = stats.power_paired(middle, drop, 0.0, 1 - level) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high
