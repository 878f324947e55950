"""From scores of pictures to a statement about all of them, without judging on what was fitted: arrays in, numbers out.

Pictures are dealt to two folds; what one fold teaches is judged on the other. Knows nothing of models.
"""

import numpy as np
from scipy import optimize, special, stats

PENALTY = 1.0  # on the squares of the weights, for features of unit variance


def orient(scores: np.ndarray, member: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Scores (N,), each fold with the sign by which the other one's members score higher; folds bool (N,)."""
    oriented = np.array(scores, dtype=float)
    for fold in (False, True):
        mine, others = folds == fold, folds != fold
        if _mean_gap(scores[others], member[others]) < 0:
            oriented[mine] = -oriented[mine]
    return oriented


def _mean_gap(scores: np.ndarray, member: np.ndarray) -> float:
    """Mean rank of the members less that of the others: the sign is that of AUC - 1/2."""
    ranks = stats.rankdata(scores)
    return float(ranks[member].mean() - ranks[~member].mean()) if 0 < member.sum() < len(member) else 0.0


def infer_dataset(features: np.ndarray, member: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, float]:
    """Features (N, F) → scores (N,) by a model that was fitted to the other fold, and a p-value of "not trained on".

    CDI (arXiv 2411.12858, CVPR 2025): many features, a scoring model, a one-sided t-test on pictures that it has not
    seen. The model is a logistic regression with a ridge; the test is Welch's, once a fold. Twice the mean of both
    p-values is one, however they depend on each other (Vovk & Wang 2020).
    """
    scores, p_values = np.empty(len(features)), []
    for fold in (False, True):
        mine, others = folds == fold, folds != fold
        mean, deviation = features[others].mean(axis=0), features[others].std(axis=0) + 1e-12
        scaled = (features - mean) / deviation
        weights = fit_logistic(scaled[others], member[others])
        fitted, scores[mine] = scaled[others] @ weights, scaled[mine] @ weights
        scores[mine] = (scores[mine] - fitted.mean()) / (fitted.std() + 1e-12)  # one scale for both folds
        test = stats.ttest_ind(scores[mine & member], scores[mine & ~member], equal_var=False, alternative="greater")
        p_values.append(float(test.pvalue) if np.isfinite(test.pvalue) else 1.0)
    return scores, min(1.0, 2 * float(np.mean(p_values)))


def fit_logistic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights (F,) of a logistic regression with an intercept, both classes of equal weight, and a ridge."""
    rows = np.where(y, 0.5 / max(1, y.sum()), 0.5 / max(1, (~y).sum())) * len(y)
    signs = np.where(y, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (x @ parameters[1:] + parameters[0])
        slopes = -rows * signs * special.expit(-margins)
        gradient = np.concatenate([[slopes.sum()], slopes @ x + PENALTY * parameters[1:]])
        return float((rows * np.logaddexp(0, -margins)).sum() + PENALTY / 2 * np.square(parameters[1:]).sum()), gradient

    return optimize.minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x[1:]
