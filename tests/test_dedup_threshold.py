"""The null model against scores whose tail is known."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import threshold
from dedup.threshold import Tail, ThresholdError, fit_tail, sample_pairs


def exponential(size: int, seed: int, scale: float = 0.05) -> np.ndarray:
    return np.random.default_rng(seed).exponential(scale, size)


def geometric(size: int, seed: int, share: float = 0.2) -> np.ndarray:
    """Whole numbers x ≥ 0 with P(x ≥ t) = share ** t."""
    return np.random.default_rng(seed).geometric(1 - share, size) - 1


@pytest.mark.parametrize("related", [0, 100])
def test_intervals_hold_the_truth_as_often_as_they_say(related: int) -> None:
    """Exponential scores, at 1, 30 and 900 times beyond the sample; and nothing is off by much in the middle."""
    total, size = 10**9, 20_000
    for beyond in (1, 30, 900):
        true = total / size / beyond
        at = 0.05 * math.log(total / true)
        tails = [fit_tail(exponential(size, seed), total, related=related, seed=seed) for seed in range(40)]
        intervals = [tail.interval(at) for tail in tails]
        assert sum(low <= true <= high for low, high in intervals) >= 33
        assert np.median([tail.expected(at) for tail in tails]) == pytest.approx(true, rel=0.35)


def test_scores_that_are_whole_numbers() -> None:
    total = 10**8
    ratios, chosen = [], []
    for seed in range(20):
        tail = fit_tail(geometric(50_000, seed), total)
        assert tail.step == 1
        assert tail.start == math.floor(tail.start)
        assert tail.expected(5.2) == tail.expected(6)
        chosen.append(tail.threshold_for(total * 0.2**7 * 1.5).value)
        ratios.append([tail.expected(t) / (total * 0.2**t) for t in (1, 4, 7, 9)])
    assert np.allclose(np.median(ratios, axis=0), 1, atol=0.25)
    assert np.allclose([r[0] for r in ratios], 1, atol=0.05)  # counted, not fitted
    assert np.median(chosen) == 7


def test_scores_that_are_nearly_all_zero() -> None:
    """3,000 unrelated pairs without one matching point still say little about 10¹⁰ pairs."""
    tail = fit_tail(np.zeros(3_000, np.int64), 10**10)
    assert tail.expected(0) == 10**10
    assert 10**6 < tail.expected(1) < 10**7
    assert not tail.threshold_for(10).supported
    assert tail.threshold_for(10).expected >= tail.fewest > 10


TAILS = [
    fit_tail(scores, 10**7, related=related)
    for scores in (exponential(5_000, 1).round(3), geometric(5_000, 1, 0.4), exponential(5_000, 2))
    for related in (0, 30)
]


@settings(max_examples=200, deadline=None)
@given(tail=st.sampled_from(TAILS), power=st.floats(-1, 7.5))
def test_the_threshold_is_the_smallest_that_will_do(tail: Tail, power: float) -> None:
    allowed = 10**power
    chosen = tail.threshold_for(allowed)
    assert chosen.supported == (allowed >= tail.fewest)
    assert chosen.expected == tail.expected(chosen.value)
    assert chosen.expected <= max(allowed, tail.fewest) * (1 + 1e-6)
    if chosen.value > tail.scores[-1]:
        assert tail.expected(chosen.value - 1.01 * tail.step) > max(allowed, tail.fewest)


def test_below_the_start_the_sample_is_counted() -> None:
    scores = exponential(100_000, 3)
    tail = fit_tail(scores, 10**6)
    for at in (0.0, 0.05, 0.2):
        assert tail.expected(at) == 10 * np.sum(scores >= at)
    curve = [tail.expected(at) for at in np.linspace(0, 2, 500)]
    assert all(a >= b for a, b in itertools.pairwise(curve))


def test_nothing_is_claimed_beyond_a_thousand_times_the_sample() -> None:
    tail = fit_tail(exponential(2_000, 4), 10**9)
    assert tail.fewest == 10**9 / 2_000 / 1_000
    asked = tail.threshold_for(1.0)
    strictest = tail.threshold_for(tail.fewest)
    assert not asked.supported
    assert strictest.supported
    assert asked.value == strictest.value
    assert tail.expected(10.0) == tail.fewest == tail.interval(10.0)[0]


def test_related_pairs_are_left_out() -> None:
    """One pair in 200 is related: without saying so, the threshold would be among them."""
    unrelated = exponential(50_000, 5)
    scores = np.concatenate([unrelated, np.random.default_rng(5).uniform(0.6, 1, 250)])
    true = 0.05 * math.log(10**4)
    naive = fit_tail(scores, 10**7)
    told = fit_tail(scores, 10**7, related=400)
    assert naive.threshold_for(1_000).value > 2 * true
    assert told.threshold_for(1_000).value == pytest.approx(true, rel=0.15)
    assert told.expected(0.1) == pytest.approx(10**7 * np.mean(unrelated >= 0.1), rel=0.05)


def test_what_cannot_be_fitted_is_one_line() -> None:
    with pytest.raises(ThresholdError, match=r"1,000 finite scores .* there are 999"):
        fit_tail(exponential(999, 0), 10**6)
    scores = exponential(2_000, 0)
    scores[7] = np.nan
    with pytest.raises(ThresholdError, match="finite"):
        fit_tail(scores, 10**6)
    with pytest.raises(ThresholdError, match="equal"):
        fit_tail(np.full(2_000, 0.25), 10**6)
    with pytest.raises(ThresholdError, match="thin out"):
        fit_tail(np.concatenate([np.full(2_000, 0.25), [0.5]]), 10**6, related=1)
    with pytest.raises(ThresholdError, match="may be related"):
        fit_tail(exponential(2_000, 0), 10**6, related=600)
    with pytest.raises(ThresholdError, match="thin out"):
        fit_tail(np.sqrt(np.random.default_rng(0).uniform(0, 1, 20_000)), 10**6, related=1_000)


def test_the_same_sample_gives_the_same_tail() -> None:
    def numbers(tail: Tail) -> str:
        return json.dumps(threshold.describe(tail))

    scores = exponential(3_000, 6)
    shuffled = np.random.default_rng(0).permutation(scores)
    assert numbers(fit_tail(scores, 10**6, related=5)) == numbers(fit_tail(shuffled, 10**6, related=5))


@pytest.mark.parametrize("scores", [exponential(30_000, 7), geometric(30_000, 7), np.zeros(3_000)])
def test_the_curve_falls_from_much_to_the_least_that_is_claimed(scores: np.ndarray) -> None:
    described = json.loads(json.dumps(threshold.describe(fit_tail(scores, 10**7))))
    curve = described["curve"]
    assert 3 <= len(curve) <= threshold.POINTS
    for lower, higher in itertools.pairwise(curve):
        assert lower["threshold"] < higher["threshold"]
        assert lower["expected"] >= higher["expected"]
    assert all(point["low"] <= point["expected"] * 1.5 and point["high"] >= point["expected"] / 1.5 for point in curve)
    assert curve[0]["expected"] > 10**5
    assert curve[-1]["expected"] == described["fewest"]


@given(n=st.integers(0, 40), size=st.integers(0, 900), seed=st.integers(0, 100))
def test_sampled_pairs_are_distinct_pairs(n: int, size: int, seed: int) -> None:
    i, j = sample_pairs(n, size, seed)
    assert i.dtype == j.dtype == np.int64
    pairs = list(zip(i.tolist(), j.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) == min(size, n * (n - 1) // 2)
    assert all(0 <= a < b < n for a, b in pairs)
    assert pairs == sorted(pairs)
    again = sample_pairs(n, size, seed)
    assert np.array_equal(again, (i, j))


def test_all_pairs_are_equally_likely() -> None:
    counts = np.zeros((12, 12))
    for seed in range(3_000):
        counts[sample_pairs(12, 10, seed)] += 1
    seen = counts[np.triu_indices(12, 1)]
    assert counts.sum() == seen.sum() == 30_000
    expected = 30_000 / 66
    assert np.sum((seen - expected) ** 2 / expected) < 110  # χ² with 65 degrees of freedom, p = 0.0004


def test_pairs_of_very_many_rows() -> None:
    i, j = sample_pairs(30_000_000, 10_000, 1)
    assert ((i >= 0) & (i < j) & (j < 30_000_000)).all()
    assert len(np.unique(i * 30_000_000 + j)) == 10_000
    assert np.mean(j) == pytest.approx(2 / 3 * 30_000_000, rel=0.02)
    assert np.mean(i) == pytest.approx(1 / 3 * 30_000_000, rel=0.04)
