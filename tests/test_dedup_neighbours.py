"""The cosine join against brute force in whole numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import neighbours, products
from dedup.products import SCALE, UNIT


def random_vectors(n: int, d: int, seed: int, *, crowd: float = 0.0) -> np.ndarray:
    """Unit vectors float32; a share of `crowd` of them is near one direction, and some stand twice."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, d))
    vectors[: int(crowd * n)] += 3 * np.sqrt(d) * np.eye(d)[0]
    if n > 3:
        vectors[rng.integers(0, n, n // 4)] = vectors[rng.integers(0, n, n // 4)]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def exact_scores(vectors: np.ndarray, background: np.ndarray | None = None) -> np.ndarray:
    """Scores int64 (n, n), in whole numbers throughout, in units of 1 / UNIT."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    rounded = np.rint(vectors * (SCALE / np.where(lengths == 0, 1, lengths)).astype(np.float32)).astype(np.int64)
    offsets = np.zeros(len(vectors), np.int64)
    if background is not None:
        offsets = np.rint(background * UNIT).astype(np.int64)
    return rounded @ rounded.T - offsets[:, None] - offsets[None]


def best_pairs(scores: np.ndarray, exact: np.ndarray, k: int, threshold: float) -> set:
    """(i, j), i < j, one of which is among the k best of the other; int64 (n, n) symmetric, and the scores as shown."""
    n = len(scores)
    best = {row: sorted((-scores[row, j], j) for j in range(n) if j != row)[:k] for row in range(n)}
    pairs = {(min(row, j), max(row, j)) for row, others in best.items() for _, j in others}
    return {(i, j) for i, j in pairs if exact[i, j] >= threshold}


def brute_force(vectors: np.ndarray, k: int, threshold: float, background: np.ndarray | None = None) -> set:
    n = len(vectors)
    i, j = (each.ravel() for each in np.indices((n, n)))
    backgrounds = None if background is None else (background, background)
    exact = neighbours.score_pairs(vectors, i, vectors, j, backgrounds).reshape(n, n)
    return best_pairs(exact_scores(vectors, background), exact, k, threshold)


def found(vectors: np.ndarray, **options: object) -> set:
    pairs = neighbours.join_cosine(vectors, **options).pairs  # type: ignore[arg-type]
    return set(pairs.select("i", "j").iter_rows())


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 60),
    d=st.integers(1, 40),
    k=st.integers(1, 20),
    threshold=st.sampled_from([-1.0, 0.0, 0.3, 0.999]),
    crowd=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 1000),
)
def test_the_join_finds_what_brute_force_finds(
    n: int, d: int, k: int, threshold: float, crowd: float, seed: int
) -> None:
    vectors = random_vectors(n, d, seed, crowd=crowd)
    assert found(vectors, k=k, threshold=threshold) == brute_force(vectors, k, threshold)
    background = np.random.default_rng(seed).uniform(0, 0.2, n).astype(np.float32)
    assert found(vectors, k=k, threshold=threshold, background=background) == brute_force(
        vectors, k, threshold, background
    )


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 60),
    k=st.integers(1, 20),
    threshold=st.sampled_from([-1.0, 0.0, 0.3]),
    normalised=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_turned_pictures_meet_those_that_come_after_them(
    n: int, k: int, threshold: float, normalised: bool, seed: int
) -> None:
    vectors, turned = random_vectors(n, 12, seed), random_vectors(n, 12, seed + 1)
    rng = np.random.default_rng(seed)
    of_vectors, of_turned = (rng.uniform(0, 0.2, n).astype(np.float32) for _ in range(2))
    backgrounds = (of_turned, of_vectors) if normalised else None
    i, j = (each.ravel() for each in np.indices((n, n)))
    exact = neighbours.score_pairs(turned, i, vectors, j, backgrounds).reshape(n, n)
    whole = products.quantise(turned).astype(np.int64) @ products.quantise(vectors).astype(np.int64).T
    if normalised:
        whole -= products.offsets(of_turned, n)[:, None] + products.offsets(of_vectors, n)
    later = np.triu(whole, 1) + np.triu(whole, 1).T
    chosen = {"background": of_vectors, "turned_background": of_turned} if normalised else {}
    assert found(vectors, turned=turned, k=k, threshold=threshold, **chosen) == best_pairs(later, exact, k, threshold)


def test_turned_pictures_in_cells_say_how_many_were_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CELL_ROWS", 32)
    monkeypatch.setattr(neighbours, "PROBES", 8)
    vectors, turned = random_vectors(4_000, 16, 2), random_vectors(4_000, 16, 3)
    exact = neighbours.join_cosine(vectors, turned=turned, k=8, threshold=0.5)
    one = neighbours.join_cosine(vectors, turned=turned, k=8, threshold=0.5, exact_up_to=0)
    two = neighbours.join_cosine(vectors, turned=turned, k=8, threshold=0.5, exact_up_to=0, jobs=2)
    assert one.pairs.equals(two.pairs)
    assert 0.5 < one.recall < 1
    both = one.pairs.join(exact.pairs, on=["i", "j"])
    assert both["cosine"].equals(both["cosine_right"])
    assert len(both) / len(exact.pairs) == pytest.approx(one.recall, abs=0.03)


def test_blocks_threads_and_cells_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = random_vectors(700, 24, 1, crowd=0.3)
    expected = neighbours.join_cosine(vectors, k=5)
    assert set(expected.pairs.select("i", "j").iter_rows()) == brute_force(vectors, 5, 0.0)
    assert expected.recall == 1
    for block, jobs in ((64, 1), (97, 2), (33, 3)):
        monkeypatch.setattr(products, "BLOCK", block)
        assert neighbours.join_cosine(vectors, k=5, jobs=jobs).pairs.equals(expected.pairs)
        everywhere = neighbours.join_cosine(vectors, k=5, jobs=jobs, exact_up_to=0)  # two cells, both are looked into
        assert everywhere.pairs.equals(expected.pairs)
        assert everywhere.recall == 1


def test_cells_find_most_and_say_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CELL_ROWS", 32)
    monkeypatch.setattr(neighbours, "PROBES", 8)
    vectors = random_vectors(4_000, 16, 2)
    exact = neighbours.join_cosine(vectors, k=8, threshold=0.5)
    one = neighbours.join_cosine(vectors, k=8, threshold=0.5, exact_up_to=0)
    two = neighbours.join_cosine(vectors, k=8, threshold=0.5, exact_up_to=0, jobs=2)
    assert one.pairs.equals(two.pairs)
    assert one.recall == two.recall
    both = one.pairs.join(exact.pairs, on=["i", "j"])
    assert both["cosine"].equals(both["cosine_right"])
    assert 0.8 < one.recall < 1
    assert len(both) / len(exact.pairs) == pytest.approx(one.recall, abs=0.03)


def test_a_crowd_of_equal_vectors_meets_at_its_first_rows() -> None:
    vectors = np.repeat(random_vectors(3, 8, 0)[:1], 500, axis=0)
    joined = neighbours.join_cosine(vectors, k=4, threshold=0.5)
    pairs = joined.pairs
    assert (pairs["cosine"] == 1).all()
    assert joined.rows_at_limit == 500
    assert set(pairs.filter(pairs["j"] >= 5)["i"]) == {0, 1, 2, 3}
    assert set(pairs["j"]) == set(range(1, 500))


def test_half_precision_memory_maps_and_rounded_vectors_give_the_same_pairs(tmp_path) -> None:  # type: ignore[no-untyped-def]
    vectors = random_vectors(300, 32, 3).astype(np.float16)
    np.save(tmp_path / "v.npy", vectors)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    pairs = neighbours.join_cosine(vectors).pairs
    assert neighbours.join_cosine(mapped).pairs.equals(pairs)
    rounded = neighbours.join_cosine(products.quantise(mapped)).pairs
    assert rounded.select("i", "j").equals(pairs.select("i", "j"))
    assert np.abs(rounded["cosine"] - pairs["cosine"]).max() < 0.001


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_compare(n: int) -> None:
    joined = neighbours.join_cosine(random_vectors(n, 4, 0), exact_up_to=0)
    assert joined.pairs.columns == ["i", "j", "cosine", "score"]
    assert len(joined.pairs) == joined.rows_at_limit == 0


def test_inner_products_are_exact_in_any_order() -> None:
    """The proof in numbers: vectors as long as rounding can make them, added up in float32 in two orders."""
    rng = np.random.default_rng(0)
    for d in (1, 512, products.MAX_WIDTH):
        vectors = np.repeat((np.abs(rng.standard_normal((1, d))) + 1).astype(np.float32), 2, axis=0)
        rounded = products.quantise(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.int64)
        exact = int(rounded[0] @ rounded[1])
        assert exact < 2**24
        terms = (rounded[0] * rounded[1]).astype(np.float32)
        for order in (np.arange(d), rng.permutation(d)):
            assert np.add.accumulate(terms[order], dtype=np.float32)[-1] == exact


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_broken_rows_are_named(value: float, dtype: type) -> None:
    vectors = random_vectors(5000, 8, 0).astype(dtype)
    vectors[4321, 3] = value
    with pytest.raises(ValueError, match=r"row 4321 .* NaN or infinity"):
        neighbours.join_cosine(vectors)


def test_vectors_that_are_none() -> None:
    vectors = random_vectors(10, 8, 0)
    with pytest.raises(ValueError, match=r"row 0 .* length 2, not 1"):
        neighbours.join_cosine(2 * vectors)
    with pytest.raises(ValueError, match=r"float64 \(10, 8\)"):
        neighbours.join_cosine(vectors.astype(np.float64))
    with pytest.raises(ValueError, match=r"float32 \(8,\)"):
        neighbours.join_cosine(vectors[0])
    vectors[3] = 0
    assert 3 not in neighbours.join_cosine(vectors, threshold=0.01).pairs["i"]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 50), queries=st.integers(1, 12), k=st.integers(1, 8), seed=st.integers(0, 1000))
def test_nearest_is_the_top_of_all_cosines(n: int, queries: int, k: int, seed: int) -> None:
    """Few queries go another way than many; both agree with sorting everything."""
    vectors, asked = random_vectors(n, 16, seed), random_vectors(queries, 16, seed + 1)
    for threshold in (-1.0, 0.2):
        indices, cosine = neighbours.nearest(asked, vectors, k, threshold=threshold)
        assert indices.shape == cosine.shape == (queries, k)
        for row in range(queries):
            exact = vectors.astype(np.float64) @ asked[row].astype(np.float64)
            count = min(k, int(np.sum(exact >= threshold)))
            assert (indices[row] >= 0).sum() == count
            assert np.isnan(cosine[row, count:]).all()
            assert np.allclose(cosine[row, :count], np.sort(exact)[::-1][:count], atol=0.001)
            assert np.allclose(cosine[row, :count], exact[indices[row, :count]], atol=1e-5)


def test_few_and_many_queries_get_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, asked = random_vectors(3_000, 40, 5), random_vectors(20, 40, 6)
    indices, cosine = neighbours.nearest(asked, vectors, 7)
    monkeypatch.setattr(products, "BLOCK", 100)
    for row in range(20):
        alone = neighbours.nearest(asked[row : row + 1], products.quantise(vectors), 7, jobs=2)
        assert np.array_equal(alone[0][0], indices[row])
        assert np.allclose(alone[1][0], cosine[row], atol=0.001)


def test_nearest_takes_the_backgrounds_off() -> None:
    vectors, asked = random_vectors(900, 24, 9, crowd=0.4), random_vectors(6, 24, 10)
    of_queries, of_vectors = neighbours.measure_background(asked, vectors), neighbours.measure_background(vectors)
    scores = asked.astype(np.float64) @ vectors.T.astype(np.float64) - of_queries[:, None] - of_vectors
    indices, score = neighbours.nearest(asked, vectors, 9, backgrounds=(of_queries, of_vectors), threshold=-0.2)
    for row in range(6):
        exact = np.sort(scores[row][scores[row] >= -0.2])[::-1][:9]
        assert np.isfinite(score[row]).sum() == len(exact) > 0
        assert np.allclose(score[row, : len(exact)], exact, atol=0.001)
        assert np.allclose(score[row, : len(exact)], scores[row, indices[row, : len(exact)]], atol=1e-5)


def test_background_lets_pairs_outside_a_crowd_come_first() -> None:
    """Half of the rows resemble each other at 0.8; the planted pairs, at 0.6, are among the others."""
    rng = np.random.default_rng(7)
    vectors = rng.standard_normal((1_000, 64))
    vectors[:500] += 16 * np.eye(64)[0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in range(980, 1_000):
        noise = rng.standard_normal(64)
        noise -= noise @ vectors[row - 400] * vectors[row - 400]
        vectors[row] = 0.6 * vectors[row - 400] + 0.8 * noise / np.linalg.norm(noise)
    vectors = vectors.astype(np.float32)
    background = neighbours.measure_background(vectors)
    assert background[:500].mean() > 0.5 > 0.3 > background[500:].mean() > 0
    planted = {(row - 400, row) for row in range(980, 1_000)}

    def first(background: np.ndarray | None) -> set:
        pairs = neighbours.join_cosine(vectors, threshold=-1, background=background).pairs
        return set(pairs.sort("score", descending=True).head(40).select("i", "j").iter_rows())

    assert len(planted & first(None)) == 0
    assert len(planted & first(background)) >= 18


def test_background_is_that_of_the_nearest_unrelated_rows() -> None:
    vectors = random_vectors(600, 20, 8)
    scores = np.sort(exact_scores(vectors), axis=1)[:, ::-1]
    expected = neighbours.WEIGHT * scores[:, 5:35].mean(axis=1) / UNIT  # 600 rows: 5 may be copies, then 5 %
    assert np.allclose(neighbours.measure_background(vectors), expected, atol=1e-6)
    assert np.array_equal(neighbours.measure_background(vectors[:5]), np.zeros(5))
    sampled = neighbours.measure_background(vectors[:50], vectors, jobs=2)
    assert np.allclose(sampled, expected[:50], atol=1e-6)


def test_cells_hold_what_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CELL_ROWS", 100)
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 4, 400)
    vectors = np.eye(4, 24)[kind] + 0.05 * rng.normal(size=(400, 24))
    cell = neighbours.find_cells((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), jobs=2)
    assert len(cell) == 400
    assert all(len(np.unique(kind[cell == number])) == 1 for number in range(cell.max() + 1))
    assert np.array_equal(neighbours.find_cells(random_vectors(50, 8, 0)), np.zeros(50))
