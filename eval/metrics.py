"""Measures of detectors and of memorisation: arrays in, numbers with intervals out.

Scores point one way: higher = more likely memorised. Labels are booleans. What needs chance takes a `seed`. Knows
nothing of models, files or thresholds.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from eval.stats import Effect, Rate, clopper_pearson, wilson

# Images extracted from Stable Diffusion 1.4 with the captions of its 350,000 most duplicated training images (Carlini
# et al. 2023, sec. 4.2). A detector that is to find them must hardly ever be wrong.
CARLINI_BASE_RATE = 94 / 350_000
DRAWS = 20_000
FEWEST_FALSE = 10  # false positives that a tolerated rate must allow, for its threshold to mean something
UNDEFINED = 1e-6  # a ratio to less than this says nothing
BLOCK = 2_048  # rows of a kernel matrix at a time


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """Scores above `threshold` are flagged. Without enough negatives `reason` says so, and numbers are NaN."""

    threshold: float
    tpr: Rate
    fpr: Rate  # reached, at most what was asked for
    reason: str | None


@dataclass(frozen=True, slots=True)
class Precision:
    """Share of what is flagged that is right, if a share `base_rate` of all were positive."""

    estimate: float  # NaN when nothing is flagged
    low: float
    high: float
    level: float
    base_rate: float
    method: str


@dataclass(frozen=True, slots=True)
class Kid:
    """Kernel inception distance with the extractor that its features come from: others are not comparable."""

    estimate: float  # may be below 0: it is unbiased
    low: float
    high: float
    level: float
    n: tuple[int, int]
    extractor: str
    method: str


def rate(count: int, n: int, level: float = 0.95) -> Rate:
    """Wilson's interval; the exact one where nothing or everything was counted."""
    return (wilson if 0 < count < n else clopper_pearson)(count, n, level)


def auc(scores: np.ndarray, labels: np.ndarray, level: float = 0.95) -> Effect:
    """Area under the ROC curve: P(positive scores higher than negative), ties one half. p-value: of 0.5, rank sum test.

    Interval: variance of DeLong et al. 1988, on the logit scale so that it stays in 0 … 1. When all positives stand on
    one side that variance is 0; then method 5 of Newcombe 2006 (Stat. Med. 25:559). Raises ValueError.
    """
    positive, negative = _split(scores, labels)
    count = f"{len(positive)} positive, {len(negative)} negative"
    above, below = _placements(positive, negative)
    area = float(above.mean())
    variance = _variance(above) + _variance(below)
    if 0 < area < 1 and variance > 0:
        half = stats.norm.ppf((1 + level) / 2) * math.sqrt(variance) / (area * (1 - area))
        logit = math.log(area / (1 - area))
        low, high = (1 / (1 + math.exp(-(logit + side * half))) for side in (-1, 1))
        method = f"DeLong on the logit scale, {count}"
    else:
        low, high = _newcombe(area, len(positive), len(negative), level)
        method = f"Newcombe's method 5, {count}"
    p = float(stats.mannwhitneyu(positive, negative).pvalue)
    return Effect(area, low, high, level, len(positive) + len(negative), p, method)


def auc_difference(a: np.ndarray, b: np.ndarray, labels: np.ndarray, level: float = 0.95) -> Effect:
    """AUC of scores a minus that of scores b of the same items (DeLong et al. 1988, paired). Raises ValueError.

    Where the placements of all items differ equally there is no interval.
    """
    (above_a, below_a), (above_b, below_b) = (_placements(*_split(scores, labels)) for scores in (a, b))
    above, below = above_a - above_b, below_a - below_b
    estimate, error = float(above.mean()), math.sqrt(_variance(above) + _variance(below))
    n = len(above) + len(below)
    if error < 1e-12:
        return Effect(estimate, -1.0, 1.0, level, n, 1.0, "DeLong, paired: no variance")
    half = float(stats.norm.ppf((1 + level) / 2)) * error
    low, high = max(-1.0, estimate - half), min(1.0, estimate + half)
    return Effect(estimate, low, high, level, n, float(2 * stats.norm.sf(abs(estimate) / error)), "DeLong, paired")


def _split(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the positives and of the negatives, float64."""
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(f"scores of shape {scores.shape} and labels of {labels.shape} do not belong together")
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(scores))} of {len(scores)} scores are not finite")
    if labels.all() or not labels.any():
        raise ValueError(f"{labels.sum()} positives among {len(labels)}: both kinds are needed")
    return scores[labels], scores[~labels]


def _placements(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of negatives below each positive, and of positives above each negative; the means of both are the AUC.

    From ranks (Sun & Xu 2014), hence in n log n.
    """
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    above = (ranks[: len(positive)] - stats.rankdata(positive)) / len(negative)
    below = 1 - (ranks[len(positive) :] - stats.rankdata(negative)) / len(positive)
    return above, below


def _variance(placements: np.ndarray) -> float:
    """Of their mean; with one item nothing is known of it."""
    return float(placements.var(ddof=1) / len(placements)) if len(placements) > 1 else 0.0


def _newcombe(area: float, m: int, n: int, level: float) -> tuple[float, float]:
    """All areas that are no more than z standard errors away, the error being that of the area in question."""
    z = stats.norm.ppf((1 + level) / 2)

    def excess(theta: float) -> float:
        spread = 1 + ((m + n) / 2 - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(area - theta) - z * math.sqrt(theta * (1 - theta) * spread / (m * n))

    edge = 1e-12
    low = optimize.brentq(excess, edge, area - edge) if area > 2 * edge and excess(edge) > 0 else 0.0
    high = optimize.brentq(excess, area + edge, 1 - edge) if area < 1 - 2 * edge and excess(1 - edge) > 0 else 1.0
    return float(low), float(high)


def tpr_at_fpr(
    scores: np.ndarray, labels: np.ndarray, fpr: float, level: float = 0.95, *, draws: int = DRAWS, seed: int = 0
) -> OperatingPoint:
    """Share of positives flagged by the lowest threshold that flags at most a share `fpr` of the negatives.

    Nothing is interpolated. Interval: bootstrap of positives and negatives (percentiles), which moves the threshold
    too, never narrower than that of Clopper & Pearson at the threshold. Below 10 / fpr negatives the threshold would
    hang on a few of them. Raises ValueError.
    """
    positive, negative = _split(scores, labels)
    if len(negative) * fpr < FEWEST_FALSE - 1e-9:
        nothing = Rate(0, len(positive), math.nan, 0.0, 1.0, level, "none")
        need = f"{len(negative)} negatives; a rate of {fpr:g} needs {math.ceil(FEWEST_FALSE / fpr):,}"
        return OperatingPoint(math.nan, nothing, Rate(0, len(negative), math.nan, 0.0, 1.0, level, "none"), need)
    k = math.floor(fpr * len(negative) + 1e-9)
    threshold, ordered = _cut(negative, k), np.sort(negative)
    hits, false = int((positive > threshold).sum()), int((negative > threshold).sum())
    exact = clopper_pearson(hits, len(positive), level)
    rng = np.random.default_rng(seed)
    # The (k + 1)-th largest of n resampled negatives is that of n uniform places in the sorted ones.
    places = (rng.beta(max(len(negative) - k, 1e-9), k + 1, draws) * len(negative)).astype(int)
    share = 1 - np.searchsorted(np.sort(positive), ordered[places.clip(0, len(ordered) - 1)], "right") / len(positive)
    low, high = np.quantile(rng.binomial(len(positive), share) / len(positive), [(1 - level) / 2, (1 + level) / 2])
    method = f"bootstrap of threshold and positives, {draws:,} draws, not narrower than Clopper-Pearson"
    bounds = (float(min(low, exact.low)), float(max(high, exact.high)))
    found = Rate(hits, len(positive), hits / len(positive), *bounds, level, method)
    return OperatingPoint(threshold, found, clopper_pearson(false, len(negative), level), None)


def _cut(negative: np.ndarray, k: int) -> float:
    """The lowest threshold above which at most k of the negatives lie."""
    return float(np.sort(negative)[-k - 1]) if k < len(negative) else -math.inf


def precision_at(
    scores: np.ndarray, labels: np.ndarray, base_rate: float, *, k: int = 0, level: float = 0.95
) -> Precision:
    """Precision where the rate of positives is `base_rate`, at the lowest threshold that flags k of the negatives.

    Estimated with a false-positive rate of (k + 1) / (n + 1), its expectation at the (k + 1)-th largest of n negatives:
    k / n would promise perfection from any few. Bounds: those of Clopper & Pearson for both rates, each with half of
    the error; for the false positives that of k of n is exact although the threshold was chosen on them. Raises
    ValueError.
    """
    positive, negative = _split(scores, labels)
    hits = int((positive > _cut(negative, k)).sum())
    each = (1 + level) / 2
    tpr, fpr = clopper_pearson(hits, len(positive), each), clopper_pearson(k, len(negative), each)
    estimate = _precision(tpr.estimate, (k + 1) / (len(negative) + 1), base_rate) if hits else math.nan
    low, high = _precision(tpr.low, fpr.high, base_rate), _precision(tpr.high, fpr.low, base_rate)
    method = f"{hits} of {len(positive)} positives, {k} of {len(negative)} negatives; Clopper-Pearson"
    return Precision(estimate, low, high, level, base_rate, method)


def _precision(tpr: float, fpr: float, base_rate: float) -> float:
    flagged = base_rate * tpr + (1 - base_rate) * fpr
    return base_rate * tpr / flagged if flagged > 0 else 1.0


def nearest_ratio(distances: np.ndarray) -> np.ndarray:
    """Distances (G, R) of generations to a reference → (G,): nearest over second nearest; NaN where both are 0 (10^-6).

    Below 1/3: memorised (Yoon et al. 2023, Gu et al. 2023). A picture that stands twice in the reference is never
    found: both distances are those to its copies.
    """
    first, second = np.partition(np.asarray(distances, dtype=float), 1, axis=1)[:, :2].T
    return np.divide(first, second, out=np.full(len(first), np.nan), where=second >= UNDEFINED)


def is_copied(distances: np.ndarray, between: np.ndarray) -> np.ndarray:
    """Distances (G, R) to a reference and within it (R, R) → bool (G,): nearer to the nearest row than any row is.

    "Not authentic" in Alaa et al. 2022. AuthPct is 100 times the share of the others in dgm-eval, the same less 50 in
    fld. Blind to pictures that stand twice in the reference, as `nearest_ratio` is.
    """
    nearest = distances.argmin(axis=1)
    others = between[nearest].astype(float)
    others[np.arange(len(nearest)), nearest] = np.inf
    return distances.min(axis=1) < others.min(axis=1)


def adaptive_ratio(
    distances: np.ndarray, components: np.ndarray | None, *, n: int = 50, alpha: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Distances (G, R) → the ratio (G,) of Carlini et al. 2023, sec. 5.1, and the nearest row (G,) int64.

    ratio = d / (alpha · mean of d over S), with d the distance to the nearest row and S the n rows nearest to the
    generation. components (R,): rows of the nearest one's component are left out of S, or 50 copies of a picture
    make its ratio 1 / alpha, however good the copy. None: S as in the paper, the nearest row among them. NaN where
    the mean is below 10^-6: undefined, which is not "not memorised". alpha, n and a cut at 1 are the defaults of an
    open re-implementation (LeakPro); the paper's cut is NOT VERIFIED. Raises ValueError without n rows for S.
    """
    distances = np.asarray(distances, dtype=float)
    nearest = distances.argmin(axis=1)
    others = distances.copy()
    if components is not None:
        others[components[nearest][:, None] == components] = np.inf
    if n < 1 or n > others.shape[1]:
        raise ValueError(f"{n} neighbours of {others.shape[1]} rows")
    around = np.partition(others, n - 1, axis=1)[:, :n].mean(axis=1)  # (G,)
    if not np.isfinite(around).all():
        raise ValueError(f"fewer than {n} rows outside a component: take fewer neighbours")
    least = distances[np.arange(len(nearest)), nearest]
    return np.divide(least, alpha * around, out=np.full(len(least), np.nan), where=around >= UNDEFINED), nearest


def kid(x: np.ndarray, y: np.ndarray, extractor: str, level: float = 0.95) -> Kid:
    """Features (N, D) and (M, D) → squared maximum mean discrepancy, kernel (x · y / D + 1)^3, unbiased.

    Bińkowski et al. 2018 (arXiv 1801.01401), on all rows instead of random subsets. Interval: jackknife over rows,
    normal; near 0 it is wider than it need be. extractor: name of what made the features, with its preprocessing.
    Raises ValueError below three rows.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features of shapes {x.shape} and {y.shape} cannot be compared")
    if min(len(x), len(y)) < 3:
        raise ValueError(f"{len(x)} and {len(y)} rows: a distance needs three or more of both")
    x, y = (np.asarray(features, dtype=float) for features in (x, y))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features that are not finite")
    n, m = len(x), len(y)
    within_x, within_y, x_to_y, y_to_x = _kernel_sums(x, x), _kernel_sums(y, y), _kernel_sums(x, y), _kernel_sums(y, x)
    within_x -= _kernel(np.einsum("nd,nd->n", x, x), x.shape[1])  # a row and itself
    within_y -= _kernel(np.einsum("nd,nd->n", y, y), y.shape[1])
    sums = within_x.sum(), within_y.sum(), x_to_y.sum()

    def combine(sxx: np.ndarray, syy: np.ndarray, sxy: np.ndarray, n: int, m: int) -> np.ndarray:
        return sxx / (n * (n - 1)) + syy / (m * (m - 1)) - 2 * sxy / (n * m)

    without_x = combine(sums[0] - 2 * within_x, sums[1], sums[2] - x_to_y, n - 1, m)  # (N,)
    without_y = combine(sums[0], sums[1] - 2 * within_y, sums[2] - y_to_x, n, m - 1)  # (M,)
    variance = (n - 1) * without_x.var() + (m - 1) * without_y.var()
    estimate = float(combine(*sums, n, m))
    half = float(stats.norm.ppf((1 + level) / 2) * math.sqrt(variance))
    method = "unbiased, cubic kernel, jackknife"
    return Kid(estimate, estimate - half, estimate + half, level, (n, m), extractor, method)


def kid_difference(x: np.ndarray, y: np.ndarray, reference: np.ndarray, level: float = 0.95) -> Effect:
    """KID of y minus KID of x against one reference; rows i of x and y (N, D) are of one prompt and noise.

    Jackknife over prompts, which leaves out a row of x with its partner in y, and over rows of the reference; normal.
    p-value: of no difference. Raises ValueError.
    """
    if x.shape != y.shape or min(len(x), len(reference)) < 3:
        raise ValueError(f"features of shapes {x.shape} and {y.shape}: they must be pairs, three or more")
    x, y, z = (np.asarray(features, dtype=float) for features in (x, y, reference))
    n, m = len(x), len(z)
    total, without_pair, without_z = 0.0, np.zeros(n), np.zeros(m)
    for sign, features in ((1, y), (-1, x)):  # terms of the reference alone cancel
        within = _kernel_sums(features, features) - _kernel(np.einsum("nd,nd->n", features, features), x.shape[1])
        to_z, from_z = _kernel_sums(features, z), _kernel_sums(z, features)
        total += sign * (within.sum() / (n * (n - 1)) - 2 * to_z.sum() / (n * m))
        less = (within.sum() - 2 * within) / ((n - 1) * (n - 2)) - 2 * (to_z.sum() - to_z) / ((n - 1) * m)
        without_pair += sign * less
        without_z -= sign * 2 * (from_z.sum() - from_z) / (n * (m - 1))
    error = math.sqrt((n - 1) * without_pair.var() + (m - 1) * without_z.var())
    half, estimate = float(stats.norm.ppf((1 + level) / 2)) * error, float(total)
    p = float(2 * stats.norm.sf(abs(estimate) / error)) if error > 0 else 1.0
    return Effect(estimate, estimate - half, estimate + half, level, n, p, "paired jackknife, KID with cubic kernel")


def _kernel(products: np.ndarray, dimension: int) -> np.ndarray:
    return (products / dimension + 1) ** 3


def _kernel_sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 (N,): sum of the kernel of each row of a with all rows of b."""
    starts = range(0, len(a), BLOCK)
    return np.concatenate([_kernel(a[i : i + BLOCK] @ b.T, a.shape[1]).sum(axis=1) for i in starts])
