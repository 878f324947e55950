"""Which pairs are looked at: scores, the floor among unrelated pictures, and what is said of both."""

import numpy as np
import polars as pl
import pytest

from dedup import candidates, neighbours, threshold


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def two_kinds(copies: int = 200, n: int = 6_000) -> np.ndarray:
    """Half of the rows resemble each other (drawings on white); among the others, row r + n/2 may be a copy of r."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(n, 64))
    vectors[: n // 2] += 8 * np.eye(64)[0]
    first = n // 2 + np.arange(copies)
    vectors[first + copies] = vectors[first] + 0.9 * rng.normal(size=(copies, 64))
    return unit(vectors)


def test_candidates_say_which_way_to_look() -> None:
    rng = np.random.default_rng(0)
    upright, mirrored = rng.normal(size=(2, 40, 16))
    upright[1] = upright[0] + 0.1 * rng.normal(size=16)  # 1 is a copy of 0
    mirrored[3], mirrored[2] = upright[2], upright[3]  # 3 is 2, mirrored
    views = candidates.see(unit(upright), unit(mirrored), 1)
    near, recall = candidates.find_near(views, 0.3, 1)
    sides = {(i, j): turned for i, j, turned in near.select("i", "j", "mirrored").iter_rows()}
    assert recall == 1
    assert sides[0, 1] is False
    assert sides[2, 3] is True
    assert near.filter(pl.col("cosine") > 0.99).select("i", "j").rows() == [(0, 1), (2, 3)]
    plain, _ = candidates.find_near(candidates.see(unit(upright), None, 1), 0.3, 1)
    assert (2, 3) not in plain.select("i", "j").rows()
    assert plain["mirrored"].null_count() == len(plain)


def test_a_score_is_the_better_view_less_both_backgrounds() -> None:
    rng = np.random.default_rng(1)
    upright, mirrored = (unit(rng.normal(size=(300, 24))) for _ in range(2))
    views = candidates.see(upright, mirrored, 1)
    i, j = np.triu_indices(300, 1)
    table = views.score(i, j)
    a, b = upright.astype(np.float64), mirrored.astype(np.float64)
    both = np.stack([a @ a.T - views.background[:, None], b @ a.T - views.mirrored_background[:, None]])[:, i, j]
    both -= views.background[j]
    assert np.allclose(table["score"], both.max(axis=0), atol=1e-3)
    assert np.allclose(table["gain"], both[1] - both[0], atol=2e-3)


def test_a_crowd_of_drawings_does_not_hide_the_copies_of_photographs() -> None:
    """By the plain cosine any two drawings come before most copies, as they would without a background."""
    vectors = two_kinds()
    views = candidates.see(vectors, None, 1)
    random = candidates.score_random(views)
    n = len(vectors)
    floor = candidates.choose_floor(random["score"].to_numpy(), n, None)
    assert floor is not None
    near, _ = candidates.find_near(views, floor.value, 1)
    copies = near.filter((pl.col("j") - pl.col("i") == 200) & (pl.col("i") >= n // 2)).height
    false = len(near) - copies
    assert copies >= 195
    assert false < 2 * candidates.MAX_FALSE * n
    plain = neighbours.join_cosine(vectors, threshold=0.5).pairs.sort("cosine", descending=True).head(len(near))
    assert plain.filter((pl.col("j") - pl.col("i") == 200) & (pl.col("i") >= n // 2)).height < copies / 2


@pytest.fixture(scope="module")
def unrelated() -> tuple[candidates.Views, np.ndarray]:
    """Views of pictures without copies, and their random scores."""
    views = candidates.see(two_kinds(copies=0), None, 1)
    return views, candidates.score_random(views)["score"].to_numpy()


@pytest.mark.parametrize("wanted", [3_000.0, 60_000.0])
def test_no_more_unrelated_pairs_than_were_allowed(
    unrelated: tuple[candidates.Views, np.ndarray], wanted: float
) -> None:
    """Fewer, because the highest scores are not trusted: they may be those of related pictures."""
    views, scores = unrelated
    n = len(views.upright)
    floor = candidates.choose_floor(scores, n, wanted)
    assert floor is not None
    sample = threshold.sample_pairs(n, 1_000_000, seed=2)
    counted = (views.score(*sample)["score"] >= floor.value).mean() * n * (n - 1) / 2
    assert counted < wanted
    assert counted > wanted / 10 or wanted < n


def test_few_pictures_have_no_floor() -> None:
    scores = np.random.default_rng(0).normal(size=5_000)
    assert candidates.choose_floor(scores, candidates.FEW, None) is None
    assert candidates.choose_floor(scores, candidates.FEW, 10) is not None
    assert candidates.choose_floor(scores[:100], 15, 10) is None


def test_what_is_related_does_not_count_as_chance() -> None:
    rng = np.random.default_rng(0)
    a, b = (side[:3_000] for side in np.triu_indices(100, 1))
    random = pl.DataFrame({"a": a, "b": b, "score": rng.normal(0, 0.1, 3_000)})
    related = pl.DataFrame({"a": a[:40], "b": b[:40], "class": ["copy"] * 40})
    raised = random.with_columns(score=pl.when(pl.int_range(pl.len()) < 40).then(0.9).otherwise("score"))
    null = candidates.describe_null(raised, related, 100, 100, 0.5)
    assert null["sample"] < 3_000
    assert null["expected_at_floor"] < 1
    assert candidates.describe_null(raised, related.clear(), 100, 100, 0.5)["expected_at_floor"] > 20
    assert "needs 1,000" in candidates.describe_null(raised.head(50), related, 100, 100, 0.5)["error"]


def test_examples_stand_on_both_sides_of_the_floor() -> None:
    near = pl.DataFrame({"a": range(9), "b": range(9, 18), "score": [0.5 + n / 10 for n in range(9)]})
    random = pl.DataFrame({"a": range(20), "b": range(20, 40), "score": [n / 20 for n in range(20)]})
    pairs = pl.DataFrame({"a": [1, 5], "b": [10, 14], "class": ["copy", "copy"]})
    examples = candidates.choose_examples(near, random, pairs, 0.5)
    scores = [1.0, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2]
    assert [row["score"] for row in examples] == pytest.approx(scores)
    assert [row["side"] for row in examples] == ["above"] * 5 + ["below"] * 6
    assert [row["a"] for row in examples if row["accepted"]] == [5, 1]
    unknown = near.with_columns(score=pl.lit(None, pl.Float64))
    assert {row["side"] for row in candidates.choose_examples(unknown, random, pairs, 0.5)} == {"below"}
