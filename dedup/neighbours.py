"""Vectors → candidate pairs by cosine: the nearest rows of every row.

In: L2-normalised embeddings, one row a picture. Out: pairs i < j with cosine and score. Exact up to EXACT_UP_TO rows;
beyond, in cells of similar rows, with the recall measured against the exact search. Candidates only: whether a pair is
a copy is for others to say. Knows nothing of images or encoders. The answer is the same, to the bit, whatever the
number of threads (`products`).
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy import sparse

from dedup import products
from dedup.products import ASCENDING, BLOCK, BOTH, SCALE, UNIT, Rows

K = 16  # partners a row may have
CACHED = 32  # pairs whose vectors, of 32 KB at most, are held twice side by side at a time: they stay in the cache
EXACT_UP_TO = 300_000  # rows; twice as many take four times as long

BACKGROUND = 2_000  # rows that stand for the unrelated ones
COPIES = 5  # of them the nearest are left out: a copy of the row, or the row itself
NEAREST = 0.05  # share of them, the nearest of the others, that tells how crowded it is around a row
WEIGHT = 0.7  # of either row's crowd in a score

CELL_ROWS = 256  # on average
TRAINING_ROWS = 64  # a cell
ROUNDS = 5  # of k-means
PROBES = 48  # cells in which partners of a row are looked for
SAMPLE = 2_048  # rows whose partners are searched exactly, to know the recall


@dataclass(frozen=True, slots=True)
class Joined:
    """`pairs`: int64 i < j (row numbers), float64 cosine and score; sorted by i, j.

    `recall`: of the partners of a row that an exact search finds, the share that was found; the mean over a sample of
    the rows that have any. `rows_at_limit`: rows that have k partners, and perhaps more.
    """

    pairs: pl.DataFrame
    recall: float
    rows_at_limit: int


def join_cosine(
    vectors: np.ndarray,
    *,
    turned: np.ndarray | None = None,
    k: int = K,
    threshold: float = 0.0,
    background: np.ndarray | None = None,
    turned_background: np.ndarray | None = None,
    exact_up_to: int = EXACT_UP_TO,
    jobs: int = 1,
    seed: int = 0,
) -> Joined:
    """Pairs of which one is among the k nearest rows of the other, with a score of at least `threshold`.

    vectors: float16 or float32 (n, d), L2-normalised; a row of zeros has cosine 0 with everything.
    turned: vectors of the same pictures seen another way, say mirrored. The cosine of i < j is then that of row i of
        `turned` with row j of `vectors`.
    background: float32 (n,) from `measure_background`; the score of a pair is its cosine less both rows' background,
        without it the cosine. turned_background: the same for `turned`.
    Raises ValueError for vectors that cannot be compared.
    """
    right = products.quantise(vectors)
    left = right if turned is None else products.quantise(turned)
    lefts, lefts_background = (vectors, background) if turned is None else (turned, turned_background)
    taken_off = products.offsets(lefts_background, len(left)), products.offsets(background, len(right))
    ways = BOTH if turned is None else ASCENDING
    partners = products.nobody(len(left), k, threshold)
    exact = len(left) <= exact_up_to
    tasks = products.pairs_of_blocks(len(left)) if exact else _pairs_of_cells(left, right, jobs, seed)
    products.compare_blocks(tasks, left, right, taken_off, partners, jobs, ways)
    recall = 1.0 if exact else _measure_recall(left, right, taken_off, partners, threshold, jobs, ways, seed)
    pairs = _to_pairs(partners)
    i, j = pairs["i"].to_numpy(), pairs["j"].to_numpy()
    cosine = cosines(lefts, i, vectors, j)
    score = take_off(cosine, lefts_background, i, background, j)
    return Joined(
        pairs=pairs.with_columns(cosine=cosine, score=score).filter(pl.col("score") >= threshold),
        recall=recall,
        rows_at_limit=int(np.sum(products.somebody(partners[:, -1:]))),
    )


def nearest(
    queries: np.ndarray,
    vectors: np.ndarray,
    k: int = K,
    *,
    threshold: float = -1.0,
    backgrounds: tuple[np.ndarray, np.ndarray] | None = None,
    jobs: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `vectors` nearest to each query: int64 and float64 (queries, k): row numbers, scores.

    Exact; nearest first. −1 and NaN where fewer rows reach the threshold. A score is the cosine less the `backgrounds`
    of the queries and of the vectors, as in `join_cosine`. Whoever asks often passes what `products.quantise` made of
    the vectors: one query among a million rows then takes a tenth of a second.
    """
    rounded = products.quantise(vectors)
    of_queries, of_vectors = backgrounds or (None, None)
    taken_off = products.offsets(of_queries, len(queries)), products.offsets(of_vectors, len(rounded))
    indices = products.unpack(products.search(products.quantise(queries), rounded, k, threshold, jobs, taken_off))
    row, place = np.nonzero(indices >= 0)
    other = indices[row, place]
    score = np.full(indices.shape, np.nan)
    score[row, place] = take_off(cosines(queries, row, vectors, other), of_queries, row, of_vectors, other)
    score[score < threshold] = np.nan
    indices[np.isnan(score)] = -1
    order = np.lexsort((indices, -score), axis=-1)  # NaN last
    return np.take_along_axis(indices, order, axis=-1), np.take_along_axis(score, order, axis=-1)


def measure_background(
    vectors: np.ndarray, among: np.ndarray | None = None, *, jobs: int = 1, seed: int = 0
) -> np.ndarray:
    """How near unrelated rows come to each row: float32 (n,), to be subtracted from its cosines.

    Drawings on white resemble each other more than any two photographs do; without this they take up all candidates.
    Score normalisation as for SSCD (Pizzi et al. 2022), here for both rows: WEIGHT × the mean cosine with the
    nearest rows of a random sample of `among` (the vectors themselves if None), but for the very nearest, which may be
    copies.
    """
    rounded = products.quantise(vectors)
    others = rounded if among is None else products.quantise(among)
    size = min(BACKGROUND, len(others))
    sample = np.sort(np.random.default_rng(seed).choice(len(others), size, replace=False))
    count = min(COPIES + max(1, round(NEAREST * size)), size)
    if count <= COPIES:
        return np.zeros(len(rounded), np.float32)
    keys = products.search(rounded, others[sample], count, -1.0, jobs)[:, COPIES:]
    return (WEIGHT * (keys >> 32).mean(axis=1) / UNIT).astype(np.float32)


def find_cells(vectors: np.ndarray, *, jobs: int = 1, seed: int = 0) -> np.ndarray:
    """Cells of similar rows, CELL_ROWS on average: the number of the cell of each row, int64 (n,), from 0 on."""
    rounded = products.quantise(vectors)
    centres = _choose_centres(rounded, jobs, seed)
    return products.unpack(products.search(rounded, centres, 1, -1.0, jobs))[:, 0]


def score_pairs(
    left: np.ndarray,
    i: np.ndarray,
    right: np.ndarray,
    j: np.ndarray,
    backgrounds: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Scores, as `join_cosine` gives them, of rows i of `left` with rows j of `right`: float64 (pairs,)."""
    of_left, of_right = backgrounds or (None, None)
    return take_off(cosines(left, i, right, j), of_left, i, of_right, j)


def cosines(left: np.ndarray, i: np.ndarray, right: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Cosines float64 of rows i of `left` with rows j of `right`, of the vectors as given, to six decimals."""
    cosine = np.empty(len(i))
    for block in products.blocks(len(i), BLOCK):
        (a, of_a, square_a), (b, of_b, square_b) = _take(left, i[block]), _take(right, j[block])
        product = np.empty(len(of_a), np.float32)
        for some in products.blocks(len(product), CACHED):
            product[some] = np.einsum("nd,nd->n", a[of_a[some]], b[of_b[some]])
        length = np.sqrt(square_a[of_a] * square_b[of_b])
        cosine[block] = product / np.where(length == 0, 1, length)
    return np.round(cosine, 6)


def _take(vectors: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct rows in float32 (m, d), which of them each row is (n,), and their squares (m,)."""
    once, place = np.unique(rows, return_inverse=True)
    taken = vectors[once].astype(np.float32)
    return taken, place, np.einsum("nd,nd->n", taken, taken)


def take_off(
    cosine: np.ndarray, left: np.ndarray | None, i: np.ndarray, right: np.ndarray | None, j: np.ndarray
) -> np.ndarray:
    """Scores of pairs: their cosines less the backgrounds, if there are any, of rows i and j."""
    return cosine if left is None or right is None else np.round(cosine - left[i] - right[j], 6)


def _to_pairs(partners: np.ndarray) -> pl.DataFrame:
    """Partners (n, k) → i < j, sorted."""
    row, place = np.nonzero(products.somebody(partners))
    other = products.unpack(partners[row, place])
    return pl.DataFrame({"i": np.minimum(row, other), "j": np.maximum(row, other)}).unique().sort("i", "j")


def _pairs_of_cells(left: np.ndarray, right: np.ndarray, jobs: int, seed: int) -> list[tuple[Rows, Rows]]:
    """Rows of `left` that look into a cell, and the rows of `right` that are in it, in blocks."""
    centres = _choose_centres(right, jobs, seed)
    probes = products.unpack(products.search(left, centres, min(PROBES, len(centres)), -1.0, jobs))  # (n, probes)
    home = probes if left is right else products.unpack(products.search(right, centres, 1, -1.0, jobs))
    members, starts = _group(home[:, 0], len(centres))
    visits, visit_starts = _group(probes.astype(np.int32).ravel(), len(centres))
    tasks: list[tuple[Rows, Rows]] = []
    for cell in range(len(centres)):
        inside = members[starts[cell] : starts[cell + 1]]
        looking = visits[visit_starts[cell] : visit_starts[cell + 1]] // probes.shape[1]
        blocks = products.blocks(len(inside), BLOCK)
        tasks += [(looking[a], inside[b]) for a in products.blocks(len(looking), BLOCK) for b in blocks]
    return tasks


def _group(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions sorted by value 0 … count − 1, and where each value begins and ends."""
    return np.argsort(values, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(values, minlength=count))])


def _choose_centres(rounded: np.ndarray, jobs: int, seed: int) -> np.ndarray:
    """Centres int16 (cells, d) of spherical k-means over a random sample of the rows."""
    rng = np.random.default_rng(seed)
    cells = max(1, len(rounded) // CELL_ROWS)
    sample = rounded[np.sort(rng.choice(len(rounded), min(len(rounded), TRAINING_ROWS * cells), replace=False))]
    centres = sample[np.sort(rng.choice(len(sample), cells, replace=False))]
    for _ in range(ROUNDS):
        cell = products.unpack(products.search(sample, centres, 1, -1.0, jobs))[:, 0]
        ones = np.ones(len(sample), np.float32)
        chosen = sparse.csr_array((ones, (cell, np.arange(len(sample)))), shape=(cells, len(sample)))
        sums = np.asarray(chosen @ sample.astype(np.float32), np.float64)
        length = np.linalg.norm(sums, axis=1)
        centres = np.where((length > 0)[:, None], np.rint(sums * (SCALE / np.maximum(length, 1))[:, None]), centres)
        centres = centres.astype(np.int16)
    return centres


def _measure_recall(
    left: np.ndarray,
    right: np.ndarray,
    taken_off: tuple[np.ndarray, np.ndarray],
    partners: np.ndarray,
    threshold: float,
    jobs: int,
    ways: int,
    seed: int,
) -> float:
    """Of a fixed random sample of rows, how many of their exact partners are among `partners`, on average."""
    sample = np.sort(np.random.default_rng(seed).choice(len(left), min(SAMPLE, len(left)), replace=False))
    exact = products.nobody(len(left), partners.shape[1], threshold)
    blocks = products.blocks(len(right), BLOCK)
    tasks: list[tuple[Rows, Rows]] = [(sample, columns) for columns in blocks]
    tasks += [(rows, sample) for rows in blocks if ways == ASCENDING]  # what comes before a row asks for it
    products.compare_blocks(tasks, left, right, taken_off, exact, jobs, ways)
    wanted = [keys[products.somebody(keys)] for keys in exact[sample]]
    shares = [np.isin(keys, partners[row]).mean() for row, keys in zip(sample, wanted, strict=True) if len(keys)]
    return float(np.mean(shares)) if shares else 1.0
