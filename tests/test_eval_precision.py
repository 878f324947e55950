"""Sampling of removals and the intervals of their precision, against exact probabilities and simulation."""

import json
from functools import lru_cache
from itertools import product

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eval import precision
from eval.precision import SampleError, allocate, bound_share, draw, estimate, stratify
from eval.stats import clopper_pearson

SIGNALS = ("bytes", "pixels", "pdq", "copy", "decision")


def make_removals(**sizes: int) -> pl.DataFrame:
    signals = [signal for signal, size in sizes.items() for _ in range(size)]
    scores = np.random.default_rng(1).uniform(0.6, 1, len(signals))
    return pl.DataFrame({"id": np.arange(len(signals)) * 3, "signal": signals, "score": scores})


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SIGNALS), st.none() | st.floats(0, 1)), max_size=60))
def test_every_removal_is_in_one_stratum(removals: list[tuple[str, float | None]]) -> None:
    table = pl.DataFrame(removals, schema={"signal": pl.String, "score": pl.Float64}, orient="row")
    placed, strata = stratify(table.with_row_index("id"))
    assert placed["id"].sort().to_list() == list(range(len(removals)))
    assert strata["removals"].sum() == len(removals)
    for number, stratum in enumerate(strata.iter_rows(named=True)):
        mine = placed.filter(stratum=number)
        assert len(mine) == stratum["removals"] > 0
        assert set(mine["signal"]) == {stratum["signal"]}
        for score in mine["score"].drop_nulls():
            assert stratum["low"] is None or score >= stratum["low"]
            assert stratum["high"] is None or score < stratum["high"]


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=9), st.integers(1, 500))
def test_allocation(sizes: list[int], n: int) -> None:
    if n < len(sizes):
        with pytest.raises(SampleError, match=f"{n} pairs are too few"):
            allocate(sizes, n)
        return
    drawn = allocate(sizes, n)
    assert sum(drawn) == min(n, sum(sizes))
    assert all(1 <= d <= size for d, size in zip(drawn, sizes, strict=True))
    if n >= precision.FEWEST * len(sizes):
        assert all(d >= min(precision.FEWEST, size) for d, size in zip(drawn, sizes, strict=True))
        for size, d in zip(sizes, drawn, strict=True):  # nobody has a label that somebody else needs more
            others = [s / (o + 0.5) for s, o in zip(sizes, drawn, strict=True) if o < s]
            assert d <= precision.FEWEST or size / (d - 0.5) >= max(others, default=0) - 1e-9


def test_samples_are_uniform_in_each_stratum_and_the_estimate_is_unbiased() -> None:
    removals, strata = stratify(make_removals(bytes=30, pdq=40, copy=60))
    wrong = set(removals.filter((pl.col("signal") == "copy") & (pl.col("score") < 0.75))["id"])
    truth = 1 - len(wrong) / len(removals)
    asked = strata["signal"] != "bytes"
    sizes = strata["removals"].to_list()
    drawn = dict(zip(asked.arg_true(), allocate(strata["removals"].filter(asked).to_list(), 40), strict=True))
    times = dict.fromkeys(removals["id"], 0)
    first, estimates, draws = dict.fromkeys(drawn, 0), [], 600
    for seed in range(draws):
        sample = draw(removals, strata, 40, seed)
        assert sample["id"].n_unique() == 40
        first[sample["stratum"][0]] += 1
        shares = {number: [] for number in drawn}
        for row, number in sample.select("id", "stratum").iter_rows():
            times[row] += 1
            shares[number].append(row not in wrong)
        right = sum(sizes[number] * np.mean(share) for number, share in shares.items())
        estimates.append((right + 30) / len(removals))
    for row, number in removals.select("id", "stratum").iter_rows():
        chance = drawn.get(number, 0) / sizes[number]
        assert abs(times[row] - draws * chance) <= 5 * np.sqrt(draws * chance * (1 - chance))
    assert abs(np.mean(estimates) - truth) < 4 * np.std(estimates) / np.sqrt(draws)
    for number, count in first.items():  # the order mixes the strata
        assert abs(count - draws * drawn[number] / 40) < 5 * np.sqrt(draws)
    assert draw(removals, strata, 40, 7).equals(draw(removals.reverse(), strata, 40, 7))


def test_equal_bytes_alone_give_nothing_to_draw() -> None:
    removals, strata = stratify(make_removals(bytes=4))
    assert draw(removals, strata, 10, 0).is_empty()


@pytest.mark.parametrize("n", [1, 7, 100])
def test_one_stratum_is_never_bolder_than_clopper_and_pearson(n: int) -> None:
    limits = [bound_share(np.array([x]), np.array([n]), np.ones(1), 0.025) for x in range(0, n + 1, max(1, n // 10))]
    exact = [clopper_pearson(x, n).high for x in range(0, n + 1, max(1, n // 10))]
    assert limits[0] == pytest.approx(exact[0], rel=1e-5)
    assert limits[-1] == pytest.approx(1)
    assert limits == sorted(limits)
    assert all(exact_ - 1e-9 <= limit <= exact_ * 1.25 + 1e-9 for exact_, limit in zip(exact, limits, strict=True))


def test_what_nobody_looked_at_may_be_all_hits() -> None:
    assert bound_share(np.zeros(2), np.array([0, 0]), np.array([0.4, 0.6]), 0.025) == 1
    limit = bound_share(np.zeros(2), np.array([0, 50]), np.array([0.1, 0.9]), 0.025)
    assert limit == pytest.approx(0.1 + 0.9 * clopper_pearson(0, 50).high, rel=1e-4)


@pytest.mark.parametrize("population", [None, (6, 24)])  # with and without replacement
def test_the_bound_holds_exactly_for_any_shares(population: tuple[int, int] | None) -> None:
    n, weights, alpha = np.array([4, 8]), np.array([0.2, 0.8]), 0.1
    outcomes = list(product(range(5), range(9)))
    limits = np.array([bound_share(np.array(hits), n, weights, alpha) for hits in outcomes])
    grids = [np.linspace(0, 1, 21)] * 2 if population is None else [np.arange(size + 1) / size for size in population]
    worst = 0.0
    for shares in product(*grids):
        if population is None:
            mass = [stats.binom.pmf(np.arange(k + 1), k, p) for k, p in zip(n, shares, strict=True)]
        else:
            mass = [
                stats.hypergeom.pmf(np.arange(k + 1), size, round(p * size), k)
                for k, p, size in zip(n, shares, population, strict=True)
            ]
        missed = limits < weights @ shares - 1e-9
        worst = max(worst, float(np.outer(*mass).ravel()[missed].sum()))
    assert 0 < worst <= alpha


def test_intervals_of_strata_hold_without_replacement() -> None:
    """Clopper and Pearson speak of draws with replacement. Every population of up to 30, exactly."""
    limit = lru_cache(None)(lambda count, n: (clopper_pearson(count, n).low, clopper_pearson(count, n).high))
    for size, n in product((5, 12, 30), (1, 3, 5, 11, 20)):
        if n > size:
            continue
        low, high = np.array([limit(count, n) for count in range(n + 1)]).T
        for right in range(size + 1):
            mass = stats.hypergeom.pmf(np.arange(n + 1), size, right, n)
            covered = (low <= right / size + 1e-12) & (right / size <= high + 1e-12)
            assert mass[covered].sum() >= 0.95 - 1e-9


def test_coverage_of_the_whole_from_draw_to_estimate() -> None:
    removals, strata = stratify(make_removals(bytes=500, pdq=900, copy=300))
    wrong = set(removals.filter((pl.col("signal") == "copy") & (pl.col("score") < 0.7))["id"])
    wrong |= set(removals.filter(signal="pdq")["id"][:30])
    truth, rows = 1 - len(wrong) / len(removals), strata.to_dicts()
    known: dict[tuple, dict] = {}
    covered, tries = 0, 50
    for seed in range(tries):
        sample = draw(removals, strata, 60, seed)
        labels = [(s, "not-a-copy" if i in wrong else "copy") for i, s in sample.select("id", "stratum").iter_rows()]
        key = tuple(sorted(labels))
        found = known.setdefault(key, known.get(key) or estimate(rows, labels))["overall"]
        covered += found["low"] <= truth <= found["high"]
    assert covered >= 0.95 * tries


STRATA = [
    {"signal": "bytes", "low": None, "high": None, "removals": 100},
    {"signal": "copy", "low": None, "high": 0.8, "removals": 50},
    {"signal": "copy", "low": 0.8, "high": None, "removals": 150},
]


def test_estimate_adds_up() -> None:
    labels = [(1, "copy")] * 8 + [(1, "not-a-copy")] * 2 + [(2, "copy")] * 30
    found = estimate(STRATA, labels)
    assert found["without_equal_bytes"]["precision"] == pytest.approx(0.25 * 0.8 + 0.75)
    assert found["overall"]["precision"] == pytest.approx((100 + 200 * 0.95) / 300)
    assert found["overall"]["wrong_per_million"]["estimate"] == pytest.approx(10 / 300 * 1e6)
    for row in (found["overall"], found["without_equal_bytes"], *found["strata"]):
        assert row["low"] <= row["precision"] <= row["high"]
        wrong = row["wrong_per_million"]
        assert wrong["low"] == pytest.approx(1e6 * (1 - row["high"]))
    expected = clopper_pearson(8, 10)
    assert (found["strata"][1]["low"], found["strata"][1]["high"]) == (expected.low, expected.high)
    assert found["strata"][0]["precision"] == found["strata"][0]["low"] == 1


def test_undecided_and_skipped_pairs_widen_both_ways() -> None:
    sure = [(1, "copy")] * 9 + [(2, "copy")] * 30
    decided = estimate(STRATA, [*sure, (1, "copy")])
    unsure = estimate(STRATA, [(1, "undecided"), *sure])
    skipped = estimate(STRATA, [(1, None), *sure])
    assert unsure["strata"] == skipped["strata"]
    assert skipped["skipped"] == 1
    assert skipped["labelled"] == len(sure)
    assert unsure["strata"][1]["precision"] == 1
    assert unsure["strata"][1]["low"] == clopper_pearson(9, 10).low
    assert unsure["strata"][1]["high"] == 1
    assert unsure["overall"]["low"] < decided["overall"]["low"]
    stopped = estimate(STRATA, [*sure, (1, "copy"), (2, None), (1, None)])
    assert stopped | {"left": 0} == decided
    assert stopped["left"] == 2


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2), st.sampled_from(["copy", "not-a-copy", "undecided", None])), max_size=12))
def test_any_labels_give_an_ordered_answer_without_nan(labels: list[tuple[int, str | None]]) -> None:
    found = estimate(STRATA, labels)
    json.dumps(found, allow_nan=False)
    for row in (found["overall"], found["without_equal_bytes"], *found["strata"]):
        assert 0 <= row["low"] <= row["high"] <= 1
        if row["precision"] is not None:
            assert row["low"] - 1e-9 <= row["precision"] <= row["high"] + 1e-9
    assert (found["overall"]["precision"] is None) == any(row["precision"] is None for row in found["strata"])
