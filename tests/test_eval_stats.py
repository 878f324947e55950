"""eval.stats against scipy, published values, brute force, and its own promises (coverage, size, survival)."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from eval.dose import dose_response
from eval.stats import (
    assignment_test,
    bootstrap_clusters,
    clopper_pearson,
    holm,
    mcnemar_exact,
    power_paired,
    randomisation_test,
    risk_difference,
    smallest_drop,
    t_interval,
    tango_score,
    wilson,
)

counts = st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


# Single rates


@given(counts, st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_solves_the_score_equation(count, level):
    k, n = count
    rate = wilson(k, n, level)
    z = stats.norm.ppf((1 + level) / 2)
    for bound in (rate.low, rate.high):
        if 1e-9 < bound < 1 - 1e-9:
            assert abs(k / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), rel=1e-6)
    assert rate.low <= rate.estimate <= rate.high


@given(counts, st.sampled_from([0.8, 0.95, 0.99]))
def test_clopper_pearson_has_its_tail_probabilities(count, level):
    k, n = count
    tail = (1 - level) / 2
    rate = clopper_pearson(k, n, level)
    assert rate.low == 0 if k == 0 else stats.binom.sf(k - 1, n, rate.low) == pytest.approx(tail, rel=1e-6)
    assert rate.high == 1 if k == n else stats.binom.cdf(k, n, rate.high) == pytest.approx(tail, rel=1e-6)


def test_clopper_pearson_bounds_zero_hits():
    assert clopper_pearson(0, 500, side="upper").high == pytest.approx(0.0060, abs=5e-5)
    assert clopper_pearson(0, 2000, side="upper").high == pytest.approx(0.0015, abs=5e-5)
    assert clopper_pearson(0, 100, side="upper").high == pytest.approx(1 - 0.05 ** (1 / 100))
    assert clopper_pearson(500, 500, side="lower").low == pytest.approx(1 - 0.0060, abs=5e-5)
    assert clopper_pearson(500, 500, side="lower").high == 1


@pytest.mark.parametrize("interval", [wilson, clopper_pearson])
def test_no_trials_tell_nothing(interval):
    rate = interval(0, 0)
    assert math.isnan(rate.estimate)
    assert (rate.low, rate.high) == (0, 1)


# Pairs


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_doubled_binomial_tail(b, c):
    expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected)
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b)


def brute_score(b: int, c: int, n: int, delta: float) -> float:
    """Tango's statistic with the restricted maximum of the likelihood found numerically."""

    def loss(p: float) -> float:  # p = P(only b)
        rest = 1 - 2 * p - delta
        return -float(special.xlogy(b, p + delta) + special.xlogy(c, p) + special.xlogy(n - b - c, rest))

    low, high = max(0.0, -delta), (1 - delta) / 2
    p = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (b - c - n * delta) / math.sqrt(n * (2 * p + delta * (1 - delta)))


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 60), st.integers(-90, 90).map(lambda x: x / 100))
def test_tango_score_equals_numerical_maximisation(b, c, rest, delta):
    n = b + c + rest
    assert tango_score(b, c, n, delta) == pytest.approx(brute_score(b, c, n, delta), rel=1e-3, abs=1e-3)


def solve_quartic(b: int, c: int, n: int) -> list[float]:
    """The same bounds in closed form: real roots of the quartic of Yang, Sun & Hardin 2012 (doi 10.1002/sim.5561)."""
    g = stats.norm.ppf(0.975) ** 2
    d, s = b - c, b + c
    coefficients = [
        n**2 * (n / g + 1) ** 2,
        -n * d * (n / g + 1) * (4 * n / g + 1),
        2 * n * d**2 * (3 * n / g + 2) / g - n**2 * (s / g + 1),
        n * d * (2 * s / g + 1) - d**3 * (4 * n / g + 1) / g,
        d**2 * (d**2 / g - s) / g,
    ]
    return [float(root.real) for root in np.roots(coefficients) if abs(root.imag) < 1e-7]


@pytest.mark.parametrize(("b", "c", "n"), [(0, 1, 44), (40, 20, 160), (1, 7, 21), (12, 2, 50), (5, 0, 24), (3, 3, 30)])
def test_tango_equals_its_closed_form(b, c, n):
    effect, roots = risk_difference(b, c, n), solve_quartic(b, c, n)
    for bound in (effect.low, effect.high):
        assert min(abs(bound - root) for root in roots) < 1e-6


def test_tango_equals_the_r_package_propcis():
    """scoreci.mp for 48 and 41 discordant of 549 pairs at 90 %, as a public analysis prints it: -1.57 … 4.14 points."""
    effect = risk_difference(48, 41, 549, level=0.90)
    assert (100 * effect.low, 100 * effect.high) == (pytest.approx(-1.57, abs=0.02), pytest.approx(4.14, abs=0.02))


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 60))
def test_risk_difference_is_symmetric_and_holds_its_estimate(b, c, rest):
    n = b + c + rest
    if n == 0:
        assert math.isnan(risk_difference(b, c, n).estimate)
        return
    effect, mirrored = risk_difference(b, c, n), risk_difference(c, b, n)
    assert -1 <= effect.low <= effect.estimate <= effect.high <= 1
    assert effect.low == pytest.approx(-mirrored.high, abs=1e-6)
    assert effect.p_value == mcnemar_exact(b, c)
    assert effect.high > effect.low


def test_no_discordant_pairs_still_leave_an_interval():
    z2 = stats.norm.ppf(0.975) ** 2
    effect = risk_difference(0, 0, 20)
    assert effect.high == pytest.approx(z2 / (20 + z2))  # closed form
    assert effect.low == pytest.approx(-effect.high)


@pytest.mark.parametrize(("only_a", "only_b", "n"), [(0.3, 0.02, 24), (0.1, 0.1, 24), (0.6, 0.0, 18), (0.02, 0.0, 48)])
def test_tango_covers(only_a, only_b, n):
    rng = np.random.default_rng(1)
    covered = 0
    for b, c, _ in rng.multinomial(n, [only_a, only_b, 1 - only_a - only_b], 600):
        effect = risk_difference(int(b), int(c), n)
        covered += effect.low <= only_a - only_b <= effect.high
    assert covered / 600 > 0.93


# Randomisation


def brute_sign_p(d: np.ndarray, shift: float = 0.0) -> float:
    e = d - shift
    sums = [abs(np.dot(signs, e)) for signs in itertools.product((-1, 1), repeat=len(d))]
    return float(np.mean([s >= abs(e.sum()) - 1e-9 for s in sums]))


@given(st.lists(st.integers(-1, 1), min_size=1, max_size=60))
def test_randomisation_of_pairs_is_mcnemar(differences):
    d = np.array(differences)
    if np.count_nonzero(d) <= 16:
        p = randomisation_test(d, draws=50).p_value
        assert p == pytest.approx(mcnemar_exact(int((d > 0).sum()), int((d < 0).sum())))


@settings(max_examples=30)
@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=6, max_size=10))
def test_randomisation_equals_scipy_and_its_interval_inverts_it(differences):
    d = np.array(differences)
    effect = randomisation_test(d)
    options = {"permutation_type": "samples", "n_resamples": np.inf}
    theirs = stats.permutation_test((d,), np.mean, **options)
    assert effect.p_value == pytest.approx(theirs.pvalue, abs=1e-12)
    if np.ptp(d) == 0:
        assert (effect.low, effect.high) == (-math.inf, math.inf)
        return
    for bound, inward in ((effect.low, 1), (effect.high, -1)):
        assert brute_sign_p(d, bound + inward * 1e-6) > 0.05
        assert brute_sign_p(d, bound - inward * 1e-6) <= 0.05


def test_sampled_p_value_counts_the_observed_arrangement():
    rng = np.random.default_rng(0)
    d = rng.normal(1, 0.1, 40)
    effect = randomisation_test(d, draws=999, seed=1)
    assert effect.p_value == 1 / 1000
    assert "999 draws" in effect.method
    assert effect == randomisation_test(d, draws=999, seed=1)
    assert effect != randomisation_test(d, draws=999, seed=2)
    assert effect.low < 1 < effect.high


def test_sampling_agrees_with_enumeration(monkeypatch):
    d = np.array([0.5, 0.25, -0.1, 0.4, 0.3, -0.2, 0.1, 0.6, 0.05, 0.2])
    exact = randomisation_test(d)
    monkeypatch.setattr("eval.stats.EXACT", 1)
    sampled = randomisation_test(d, draws=40_000, seed=3)
    assert sampled.p_value == pytest.approx(exact.p_value, abs=0.005)
    assert sampled.low == pytest.approx(exact.low, abs=0.02)
    assert sampled.high == pytest.approx(exact.high, abs=0.02)


def test_too_few_units_give_no_bound():
    effect = randomisation_test([1.0, 1.0, 1.0])
    assert effect.p_value == 0.25
    assert (effect.low, effect.high) == (-math.inf, math.inf)
    assert math.isnan(randomisation_test([]).p_value)


def test_randomisation_keeps_its_level_and_covers():
    rng = np.random.default_rng(5)
    hits = covered = 0
    for number in range(300):
        d = rng.choice([-1, 0, 1], 24, p=[0.15, 0.7, 0.15])
        hits += randomisation_test(d, draws=400, seed=number).p_value <= 0.05
        moved = randomisation_test(rng.normal(0.3, 0.5, 20), draws=400, seed=number)
        covered += moved.low <= 0.3 <= moved.high
    assert hits / 300 < 0.08
    assert 0.91 < covered / 300 < 0.99


def brute_assignment_p(d: np.ndarray, w: np.ndarray, shift: float = 0.0) -> float:
    """Of the mean over the columns of treated less untreated; the first of all orders is the one that was observed."""
    e = d - shift * w
    treated = w[list(itertools.permutations(range(len(d))))]  # (orders, units, columns)
    means = [(e * t).sum(axis=1) / t.sum(axis=1) for t in (treated, ~treated)]
    statistic = np.abs((means[0] - means[1]).mean(axis=1))
    return float(np.mean(statistic >= statistic[0] - 1e-9))


@pytest.mark.parametrize("seeds", [1, 3])
def test_assignment_test_equals_brute_force(seeds):
    rng = np.random.default_rng(seeds)
    for _ in range(4):
        d = rng.normal(size=(6, seeds))
        w = np.stack([np.roll(np.arange(6) < 3, s) for s in range(seeds)], axis=1)
        effect = assignment_test(d, w, level=0.8)
        assert effect.p_value == pytest.approx(brute_assignment_p(d, w))
        assert effect.low <= effect.estimate <= effect.high
        for bound, inward in ((effect.low, 1), (effect.high, -1)):
            assert brute_assignment_p(d, w, bound + inward * 1e-6) > 0.2
            assert brute_assignment_p(d, w, bound - inward * 1e-6) <= 0.2


def test_assignment_test_of_one_seed_is_scipys():
    rng = np.random.default_rng(0)
    d, w = rng.normal(size=8), np.array([True] * 3 + [False] * 5)

    def statistic(x, y, axis):
        return np.mean(x, axis=axis) - np.mean(y, axis=axis)

    theirs = stats.permutation_test((d[w], d[~w]), statistic, n_resamples=np.inf, vectorized=True)
    ours = assignment_test(d[:, None], w[:, None])
    smaller_tail = min(theirs.pvalue, 1)
    assert ours.p_value == pytest.approx(np.mean(np.abs(theirs.null_distribution) >= abs(theirs.statistic) - 1e-9))
    assert ours.p_value <= smaller_tail + 1e-9


def test_a_run_that_is_worse_at_everything_does_not_fool_the_assignment_test():
    """Extraction differs by 40 points everywhere: sign changes call that an effect, the assignment does not."""
    rng = np.random.default_rng(2)
    false_alarms = naive = 0
    for number in range(60):
        d = rng.choice([0, 1], (24, 1), p=[0.6, 0.4])
        w = (rng.permutation(24) < 18)[:, None]
        false_alarms += assignment_test(d, w, draws=300, seed=number).p_value <= 0.05
        naive += randomisation_test(d[w], draws=300, seed=number).p_value <= 0.05
    assert false_alarms / 60 < 0.12
    assert naive / 60 > 0.8


def test_assignment_test_sees_a_real_effect():
    rng = np.random.default_rng(2)
    w = np.stack([rng.permutation(24) < 18 for _ in range(2)], axis=1)
    d = (rng.random((24, 2)) < np.where(w, 0.7, 0.0)).astype(int)
    effect = assignment_test(d, w, draws=2000)
    assert effect.p_value < 0.01
    assert effect.low < 0.7 < effect.high
    assert math.isnan(assignment_test(d, np.ones_like(w)).p_value)


# Seeds


def test_t_interval_is_scipys():
    values = [0.31, 0.12, 0.25, 0.4]
    effect = t_interval(values)
    theirs = stats.ttest_1samp(values, 0)
    low, high = theirs.confidence_interval(0.95)
    assert (effect.low, effect.high, effect.p_value) == (
        pytest.approx(low),
        pytest.approx(high),
        pytest.approx(theirs.pvalue),
    )
    assert t_interval([0.25, 0.25]).p_value == 0
    assert t_interval([0.0, 0.0]).p_value == 1
    with pytest.raises(ValueError, match="at least two"):
        t_interval([0.3])


# Power


def brute_power(n: int, only_a: float, only_b: float) -> float:
    total = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            if mcnemar_exact(b, c) <= 0.05:
                p = [only_a, only_b, 1 - only_a - only_b]
                total += stats.multinomial.pmf([b, c, n - b - c], n, p)
    return total


def test_seeds_that_agree_by_chance_do_not_make_the_interval_a_point():
    assert t_interval([0.5, 0.5]).low == 0.5
    rounded = t_interval([0.5, 0.5], resolution=1 / 36)
    half = stats.t.ppf(0.975, 1) / 36 / math.sqrt(12) / math.sqrt(2)
    assert (rounded.low, rounded.high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert t_interval([0.2, 0.6], resolution=1 / 36) == t_interval([0.2, 0.6])


def test_bootstrap_draws_clusters_and_keeps_their_seeds_together():
    rng = np.random.default_rng(0)
    d = rng.integers(-1, 2, (40, 1)).repeat(3, axis=1)  # every seed says the same: three seeds are no more than one
    one, three = bootstrap_clusters(d[:, :1]), bootstrap_clusters(d)
    assert (one.low, one.high) == (three.low, three.high)
    assert one.low < d.mean() < one.high
    half = 1.96 * d[:, 0].std() / math.sqrt(40)
    assert (one.high - one.low) / 2 == pytest.approx(half, rel=0.1)
    assert "BCa" in one.method
    assert "percentile" in bootstrap_clusters(np.eye(8)[:, :3]).method
    assert math.isnan(bootstrap_clusters(np.zeros((5, 2))).p_value)


@pytest.mark.parametrize(("n", "only_a", "only_b"), [(20, 0.4, 0.05), (24, 0.3, 0.0), (15, 0.2, 0.2), (5, 0.9, 0.1)])
def test_power_equals_enumeration(n, only_a, only_b):
    assert power_paired(n, only_a, only_b) == pytest.approx(brute_power(n, only_a, only_b))


@pytest.mark.parametrize(
    ("only_a", "only_b", "n"),
    [(0.10, 0.02, 145), (0.05, 0.01, 292), (0.03, 0.01, 783), (0.02, 0.005, 870), (0.01, 0.002, 1469)],
)
def test_power_agrees_with_the_usual_formula(only_a, only_b, n):
    """n by Connor 1987 for 80 %; the exact test, being conservative, has a little less."""
    assert 0.74 < power_paired(n, only_a, only_b) < 0.80


@given(st.integers(20, 300), st.sampled_from([0.0, 0.02, 0.1]))
@settings(max_examples=25, deadline=None)
def test_smallest_drop_is_the_inverse_of_power(n, only_b):
    drop = smallest_drop(n, only_b)
    assert power_paired(n, only_b + drop, only_b) == pytest.approx(0.8, abs=1e-6)
    assert drop >= smallest_drop(n + 60, only_b)


def test_power_knows_when_there_is_none():
    assert power_paired(5, 1.0, 0.0) == 0  # p is .0625 at best
    assert math.isnan(smallest_drop(5))
    assert math.isnan(smallest_drop(0))
    assert power_paired(100, 0.0, 0.0) == 0


# Dose and response


def simulate_doses(rng: np.random.Generator, ed50: float, slope: float, each: int) -> tuple[np.ndarray, np.ndarray]:
    m = np.repeat([1, 2, 4, 8, 16, 32, 64], each)
    return m, rng.random(len(m)) < special.expit(slope * (np.log2(m) - np.log2(ed50)))


def test_dose_response_finds_the_maximum_of_the_likelihood():
    m, y = simulate_doses(np.random.default_rng(0), 10, 1.2, 12)
    fit = dose_response(m, y)
    x = np.log2(m)

    def loss(slope: float, ed50: float) -> float:
        logits = slope * (x - ed50)
        return -float(special.log_expit(np.where(y, logits, -logits)).sum())

    best = optimize.brute(lambda p: loss(*p), ((0.1, 4), (0, 6)), Ns=60, finish=optimize.fmin)
    assert (fit.slope, math.log2(fit.ed50)) == (pytest.approx(best[0], abs=1e-3), pytest.approx(best[1], abs=1e-3))
    limit = loss(*best) + stats.chi2.ppf(0.95, 1) / 2
    for bound in (fit.low, fit.high):
        edge = min(loss(slope, math.log2(bound)) for slope in np.linspace(0, 4, 4001))
        assert edge == pytest.approx(limit, abs=1e-3)
    assert fit.low < fit.ed50 < fit.high


def test_ed50_is_covered():
    rng = np.random.default_rng(4)
    fits = [dose_response(*simulate_doses(rng, 12, 1.0, 6)) for _ in range(200)]
    estimable = [fit for fit in fits if fit.reason is None]
    assert len(estimable) > 180
    assert np.mean([fit.low <= 12 <= fit.high for fit in estimable]) > 0.9


@pytest.mark.parametrize(
    ("y", "reason"),
    [
        (lambda m: m > 99, "none of 28 was extracted"),
        (lambda m: m > 0, "all 28 were extracted"),
        (lambda m: m > 8, "separated: none below m = 16"),
        (lambda m: (m > 8) | ((m == 8) & (np.arange(len(m)) % 2 == 0)), "separated: none below m = 8"),
        (lambda m: m < 8, "does not rise"),
    ],
)
def test_dose_response_says_why_there_is_no_fit(y, reason):
    m = np.repeat([1, 2, 4, 8, 16, 32, 64], 4)
    fit = dose_response(m, y(m))
    assert reason in fit.reason
    assert math.isnan(fit.ed50)
    assert "fewer than two" in dose_response([4, 4], [True, False]).reason
    assert "fewer than two" in dose_response([], []).reason


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8, 64]), st.booleans()), min_size=1, max_size=25))
def test_dose_response_survives_everything(cells):
    m, y = np.array(cells).T
    fit = dose_response(m, y.astype(bool))
    if fit.reason is None:
        assert fit.low <= fit.ed50 <= fit.high
        assert fit.slope > 0


def test_weak_data_leave_the_ed50_unbounded():
    m = np.array([1, 2, 4, 8] * 2)
    fit = dose_response(m, [False, True, False, True, False, False, True, False])
    assert fit.reason is None
    assert fit.low == 0 or math.isinf(fit.high)


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    adjusted = holm([0.5, math.nan, 0.9])
    assert adjusted[0] == 1
    assert math.isnan(adjusted[1])
    assert adjusted[2] == 1
    assert holm([]) == []
