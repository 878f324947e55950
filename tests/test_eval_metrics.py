"""eval.metrics: against brute force and published formulas, coverage by simulation, and why duplicates blind them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from defense.distances import l2
from eval import metrics

small = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30).filter(
    lambda rows: 0 < sum(label for _, label in rows) < len(rows)
)


def unpack(rows):
    return np.array([score for score, _ in rows], float), np.array([label for _, label in rows])


@settings(max_examples=40, deadline=None)
@given(small)
def test_auc_equals_counting_all_pairs(rows):
    scores, labels = unpack(rows)
    pairs = [(p > n) + (p == n) / 2 for p in scores[labels] for n in scores[~labels]]
    found = metrics.auc(scores, labels)
    assert found.estimate == pytest.approx(np.mean(pairs))
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    assert found.low < found.high
    turned = metrics.auc(-scores, labels)
    assert turned.estimate == pytest.approx(1 - found.estimate)
    assert (turned.low, turned.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-9)


def test_the_variance_is_that_of_delong():
    """By the definition of DeLong et al. 1988, eq. 5: structural components from all pairs."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 1, 12).round(1), rng.normal(0, 1, 30).round(1)
    psi = (x[:, None] > y) + (x[:, None] == y) / 2
    variance = psi.mean(axis=1).var(ddof=1) / len(x) + psi.mean(axis=0).var(ddof=1) / len(y)
    area = psi.mean()
    found = metrics.auc(np.r_[x, y], np.r_[np.ones(12, bool), np.zeros(30, bool)])
    half = stats.norm.ppf(0.975) * math.sqrt(variance) / (area * (1 - area))
    assert found.estimate == pytest.approx(area)
    assert found.low == pytest.approx(1 / (1 + math.exp(half - math.log(area / (1 - area)))))


@pytest.mark.parametrize("shift", [0.0, 1.5, 2.5])
def test_the_interval_of_an_auc_covers(shift):
    """Normal scores, whose AUC is known. Perfect separation, which is frequent at 2.5, takes the other interval."""
    rng = np.random.default_rng(1)
    truth = stats.norm.cdf(shift / math.sqrt(2))
    labels = np.arange(60) < 15
    covered = 0
    for _ in range(200):
        found = metrics.auc(rng.normal(0, 1, 60) + shift * labels, labels)
        covered += found.low <= truth <= found.high
    assert covered / 200 > 0.9


def test_a_perfect_detector_is_not_certain():
    found = metrics.auc(np.arange(20.0), np.arange(20) >= 10)
    assert found.estimate == found.high == 1
    assert 0.6 < found.low < 0.9
    assert "Newcombe" in found.method


def test_detectors_are_compared_on_the_same_items():
    rng = np.random.default_rng(2)
    labels = np.arange(400) < 100
    good, copy = rng.normal(0, 1, 400) + 1.5 * labels, rng.normal(0, 1, 400)
    found = metrics.auc_difference(good, copy, labels)
    expected = metrics.auc(good, labels).estimate - metrics.auc(copy, labels).estimate
    assert found.estimate == pytest.approx(expected)
    assert found.low > 0.2
    assert found.p_value < 1e-6
    nearly = metrics.auc_difference(good, good + 0.01 * copy, labels)
    assert nearly.high - nearly.low < (found.high - found.low) / 5
    same = metrics.auc_difference(good, good, labels)
    assert (same.estimate, same.low, same.high, same.p_value) == (0, -1, 1, 1)


def test_scores_that_cannot_be_ranked_are_refused():
    for scores, labels, message in [
        ([1.0, math.nan], [True, False], "1 of 2 scores are not finite"),
        ([1.0, 2.0], [True, True], "both kinds are needed"),
        ([1.0, 2.0], [True], "do not belong together"),
    ]:
        with pytest.raises(ValueError, match=message):
            metrics.auc(np.array(scores), np.array(labels))


@settings(max_examples=30, deadline=None)
@given(small, st.sampled_from([0.34, 0.5, 0.9, 1.0]))
def test_tpr_is_the_best_of_all_thresholds(rows, fpr):
    scores, labels = unpack(rows)
    scores, labels = np.tile(scores, 30), np.tile(labels, 30)
    point = metrics.tpr_at_fpr(scores, labels, fpr, draws=50)
    assert point.reason is None
    thresholds = [-np.inf, *scores]
    allowed = [t for t in thresholds if (scores[~labels] > t).mean() <= fpr]
    assert point.tpr.estimate == max((scores[labels] > t).mean() for t in allowed)
    assert point.fpr.estimate <= fpr
    assert point.tpr.low <= point.tpr.estimate <= point.tpr.high


def test_the_short_cut_of_the_bootstrap_is_a_bootstrap():
    """Resampling positives and negatives and doing everything again gives the same percentiles."""
    rng = np.random.default_rng(3)
    positive, negative = rng.normal(1.5, 1, 80), rng.normal(0, 1, 200)
    point = metrics.tpr_at_fpr(np.r_[positive, negative], np.r_[np.ones(80, bool), np.zeros(200, bool)], 0.05)
    shares = []
    for _ in range(4000):
        again = np.sort(rng.choice(negative, 200))
        shares.append((rng.choice(positive, 80) > again[-11]).mean())
    assert (point.tpr.low, point.tpr.high) == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=0.02)


def test_few_negatives_give_no_rate():
    scores, labels = np.arange(150.0), np.arange(150) < 50
    point = metrics.tpr_at_fpr(scores, labels, 0.01)
    assert math.isnan(point.tpr.estimate)
    assert point.reason == "100 negatives; a rate of 0.01 needs 1,000"
    assert metrics.tpr_at_fpr(scores, labels, 0.1).reason is None


def test_a_perfect_detector_promises_little_at_a_low_base_rate():
    """No false positive among 50 negatives: 94 in 350,000 could still be found among 200 times as many errors."""
    scores, labels = np.r_[np.ones(20), np.zeros(50)], np.arange(70) < 20
    found = metrics.precision_at(scores, labels, metrics.CARLINI_BASE_RATE)
    assert found.low < 0.004
    assert found.estimate < 0.02
    assert found.high == 1
    assert metrics.precision_at(scores, labels, 0.5).estimate > 0.95
    many = metrics.precision_at(np.r_[np.ones(20), np.zeros(10**6)], np.arange(20 + 10**6) < 20, 94 / 350_000)
    assert many.low > 0.97
    assert math.isnan(metrics.precision_at(-scores, labels, 0.5).estimate)


def test_precision_is_bayes_rule():
    """9 of 10 positives and 10 of 100 negatives flagged: at 1 % 9 of 108 or so that are flagged are right."""
    scores = np.r_[np.ones(9), np.zeros(1), np.ones(10), np.zeros(90)]
    found = metrics.precision_at(scores, np.arange(110) < 10, 0.01, k=10)
    assert found.estimate == pytest.approx(0.01 * 0.9 / (0.01 * 0.9 + 0.99 * 11 / 101))
    assert found.low < found.estimate < found.high


def test_rates_at_the_edges_are_exact():
    assert metrics.rate(0, 500).high == pytest.approx(1 - 0.025 ** (1 / 500))
    assert metrics.rate(3, 10).method == "Wilson"
    assert math.isnan(metrics.rate(0, 0).estimate)


# KID


def published_kid(x: np.ndarray, y: np.ndarray) -> float:
    """The estimator "unbiased" of the authors' code (mbinkowski/MMD-GAN, compute_scores.py), for equally many rows."""
    m, gamma = len(x), 1 / x.shape[1]
    kxx, kyy, kxy = ((gamma * a @ b.T + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    return ((kxx.sum() - np.trace(kxx)) + (kyy.sum() - np.trace(kyy))) / (m * (m - 1)) - 2 * kxy.sum() / (m * m)


def test_kid_equals_the_published_formula():
    rng = np.random.default_rng(4)
    x, y = rng.normal(0, 1, (40, 16)), rng.normal(0.3, 1.2, (40, 16))
    found = metrics.kid(x, y, "noise")
    assert found.estimate == pytest.approx(published_kid(x, y), rel=1e-12)
    assert found.extractor == "noise"
    loops = np.mean([(a @ b / 16 + 1) ** 3 for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    loops += np.mean([(a @ b / 16 + 1) ** 3 for i, a in enumerate(y[:30]) for j, b in enumerate(y[:30]) if i != j])
    loops -= 2 * np.mean([(a @ b / 16 + 1) ** 3 for a in x for b in y[:30]])
    assert metrics.kid(x, y[:30], "noise").estimate == pytest.approx(loops)


def test_blocks_do_not_change_kid(monkeypatch):
    rng = np.random.default_rng(5)
    x, y = rng.normal(0, 1, (50, 8)), rng.normal(0, 1, (33, 8))
    whole = metrics.kid(x, y, "noise")
    monkeypatch.setattr(metrics, "BLOCK", 7)
    assert metrics.kid(x, y, "noise").estimate == pytest.approx(whole.estimate)


def test_kid_is_unbiased_and_its_interval_covers():
    """Same distribution: 0 on average, however few rows. Another: the value of many rows lies in the interval."""
    rng = np.random.default_rng(6)
    same = [metrics.kid(rng.normal(0, 1, (12, 6)), rng.normal(0, 1, (12, 6)), "noise").estimate for _ in range(300)]
    assert abs(np.mean(same)) < 4 * stats.sem(same)
    truth = metrics.kid(rng.normal(0, 1, (2000, 6)), rng.normal(0.6, 1, (2000, 6)), "noise").estimate
    found = [metrics.kid(rng.normal(0, 1, (60, 6)), rng.normal(0.6, 1, (60, 6)), "noise") for _ in range(100)]
    assert np.mean([f.low <= truth <= f.high for f in found]) > 0.9


def test_kid_refuses_what_it_cannot_compare():
    x = np.zeros((5, 4))
    for other, message in [(np.zeros((5, 3)), "cannot be compared"), (x[:2], "three"), (x + np.nan, "not finite")]:
        with pytest.raises(ValueError, match=message):
            metrics.kid(x, other, "noise")


# What duplicates in the reference do


def smooth_noise(n: int, rng: np.random.Generator) -> np.ndarray:
    """float64 (n, 32, 32, 3) in 0 … 1 with a 1/f spectrum, as photographs have."""
    frequency = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(32))
    frequency[0, 0] = 1 / 32
    waves = np.fft.fft2(rng.normal(size=(n, 3, 32, 32))) / frequency
    images = np.fft.ifft2(waves).real.transpose(0, 2, 3, 1)
    return ((images - images.mean()) / images.std() / 5 + 0.5).clip(0, 1)


def test_every_usual_metric_misses_what_stands_many_times():
    """Verbatim copies of pictures that stand m times, the table of docs/method.md.

    Against all rows the ratio of the two nearest and "not authentic" fail from m = 2 on, the adaptive ratio from
    m = 50 on. Against one representative of each, or with rows of one component left out, none does.
    """
    rng = np.random.default_rng(7)
    single = smooth_noise(300, rng)
    caught: dict[str, list[float]] = {}
    for m in (1, 2, 25, 50, 100):
        copies = np.repeat(single[:5], m - 1, axis=0)
        rows = np.concatenate([single, (copies + rng.normal(0, 0.003, copies.shape)).clip(0, 1)])
        component = np.r_[np.arange(300), np.repeat(np.arange(5), m - 1)]
        made = (single[:5] + rng.normal(0, 0.01, single[:5].shape)).clip(0, 1)
        raw, ours = l2(made, rows), l2(made, single)
        caught.setdefault("ratio", []).append((metrics.nearest_ratio(raw) < 1 / 3).mean())
        caught.setdefault("authentic", []).append(metrics.is_copied(raw, l2(rows, rows)).mean())
        caught.setdefault("adaptive", []).append((metrics.adaptive_ratio(raw, None)[0] <= 1).mean())
        assert (metrics.nearest_ratio(ours) < 1 / 3).all()
        assert metrics.is_copied(ours, l2(single, single)).all()
        for distances, components in ((ours, np.arange(300)), (raw, component)):
            ratio, nearest = metrics.adaptive_ratio(distances, components)
            assert (ratio <= 1).all()
            assert component[nearest].tolist() == list(range(5))
    assert caught == {
        "ratio": [1, 0, 0, 0, 0],
        "authentic": [1, 0, 0, 0, 0],
        "adaptive": [1, 1, 1, 0, 0],
    }


def test_authentic_is_what_others_call_it():
    """AuthPct as dgm-eval counts it (0 … 100) and as fld does (less 50), written out pair by pair."""
    rng = np.random.default_rng(11)
    rows, made = rng.random((40, 2)), rng.random((60, 2))
    made[:15] = rows[:15] + 1e-3
    to_rows = np.linalg.norm(made[:, None] - rows, axis=-1)
    between = np.linalg.norm(rows[:, None] - rows, axis=-1)
    authentic = 0
    for generation in range(60):
        nearest = min(range(40), key=lambda row: to_rows[generation, row])
        next_row = min(between[nearest, row] for row in range(40) if row != nearest)
        authentic += to_rows[generation, nearest] > next_row
    dgm_eval = 100 * (1 - metrics.is_copied(to_rows, between).mean())
    assert dgm_eval == pytest.approx(100 * authentic / 60)
    assert dgm_eval - 50 < 0  # fld: below 0 is overfitted
    assert metrics.is_copied(to_rows, between)[:15].all()
    unrelated = np.linalg.norm(rng.random((2_000, 2))[:, None] - rows, axis=-1)
    assert 100 * (1 - metrics.is_copied(unrelated, between).mean()) == pytest.approx(50, abs=20)


def test_no_metric_accuses_unrelated_pictures():
    rng = np.random.default_rng(8)
    rows, made = smooth_noise(200, rng), smooth_noise(50, rng)
    distances = l2(made, rows)
    assert not (metrics.nearest_ratio(distances) < 1 / 3).any()
    assert not (metrics.adaptive_ratio(distances, np.arange(200))[0] <= 1).any()
    blurred = ndimage.gaussian_filter(rows[:5], (0, 1, 1, 0))
    assert (metrics.adaptive_ratio(l2(blurred, rows), np.arange(200))[0] <= 1).all()


def test_sixty_equal_rows_have_no_ratio():
    """Undefined, and so reported: not "not memorised". With components the picture is found."""
    rng = np.random.default_rng(9)
    rows = np.concatenate([np.repeat(smooth_noise(1, rng), 60, axis=0), smooth_noise(100, rng)])
    distances = l2(rows[:1], rows)
    assert np.isnan(metrics.adaptive_ratio(distances, None)[0]).all()
    assert np.isnan(metrics.nearest_ratio(distances)).all()
    component = np.maximum(np.arange(160) - 59, 0)
    assert metrics.adaptive_ratio(distances, component)[0] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="fewer than 101 rows"):
        metrics.adaptive_ratio(distances, component, n=101)
    with pytest.raises(ValueError, match="161 neighbours of 160 rows"):
        metrics.adaptive_ratio(distances, None, n=161)
