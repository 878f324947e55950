"""Vectors → candidate pairs by cosine: the nearest rows of every row.

In: L2-normalised embeddings, one row a picture, in keeper order. Out: pairs i < j with cosine, score and rank. Exact up
to EXACT_UP_TO rows; beyond, in cells of similar rows, with the recall measured against the exact search. Candidates
only: whether a pair is a copy is for others to say. Knows nothing of images or encoders.

The search compares vectors rounded to multiples of 1 / SCALE. Their inner products are whole numbers small enough to be
exact in float32 in whatever order they are added up, so that no library, block shape or number of threads can change a
bit of the answer; the rounding moves a cosine by 0.0001 (standard error). Equal scores: the earlier row is nearer.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numba
import numpy as np
import polars as pl
from scipy import sparse

K = 16  # partners a row may have
EXACT_UP_TO = 300_000  # rows; twice as many take four times as long
MAX_WIDTH = 8192  # components of a vector
SCALE = 4050  # rounding adds at most √MAX_WIDTH / 2 to its length, so inner products stay below 2²⁴
UNIT = SCALE**2  # a cosine of 1
MARGIN = 0.001  # ten standard errors of a rounded cosine
BLOCK = 2048  # rows a side that are compared at once
FEW = 8  # queries for which turning a million rows into floats would take longer than comparing them
ROWS = 2**32 - 1

BACKGROUND = 2_000  # rows that stand for the unrelated ones
COPIES = 5  # of them the nearest are left out: a copy of the row, or the row itself
NEAREST = 0.05  # share of them, the nearest of the others, that tells how crowded it is around a row
WEIGHT = 0.7  # of either row's crowd in a score

CELL_ROWS = 256  # on average
TRAINING_ROWS = 64  # a cell
ROUNDS = 5  # of k-means
PROBES = 48  # cells in which partners of a row are looked for
SAMPLE = 2_048  # rows whose partners are searched exactly, to know the recall

Rows = slice | np.ndarray


@dataclass(frozen=True, slots=True)
class Joined:
    """`pairs`: int64 i < j (row numbers), float64 cosine and score, int64 rank_i, rank_j; sorted by i, j.

    rank_i is the place of j among the partners of i, from 1 on, null when j is not among its k nearest; rank_j that of
    i among those of j. `recall`: of the partners of a row that an exact search finds, the share that was found; the
    mean over a sample of the rows that have any. `rows_at_limit`: rows that have k partners, and perhaps more.
    """

    pairs: pl.DataFrame
    recall: float
    rows_at_limit: int


def join_cosine(
    vectors: np.ndarray,
    *,
    k: int = K,
    threshold: float = 0.0,
    background: np.ndarray | None = None,
    exact_up_to: int = EXACT_UP_TO,
    jobs: int = 1,
    seed: int = 0,
) -> Joined:
    """Pairs of which one is among the k nearest rows of the other, with a score of at least `threshold`.

    vectors: float16 or float32 (n, d), L2-normalised; a row of zeros has cosine 0 with everything.
    background: float32 (n,) from `measure_background`; the score of a pair is its cosine less both rows' background,
        without it the cosine.
    Raises ValueError for vectors that cannot be compared.
    """
    rounded = quantise(vectors)
    offsets = _offsets(background, len(rounded))
    partners = _nobody(len(rounded), k, threshold)
    exact = len(rounded) <= exact_up_to
    tasks = _pairs_of_blocks(len(rounded)) if exact else _pairs_of_cells(rounded, jobs, seed)
    _compare(tasks, rounded, rounded, offsets, offsets, partners, jobs, mutual=True)
    recall = 1.0 if exact else _measure_recall(rounded, offsets, partners, threshold, jobs, seed)
    return Joined(
        pairs=_score(_to_pairs(partners), vectors, background).filter(pl.col("score") >= threshold),
        recall=recall,
        rows_at_limit=int(np.sum(_somebody(partners[:, -1:]))),
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
    of the queries and of the vectors, as in `join_cosine`. Whoever asks often passes what `quantise` made of the
    vectors: one query among a million rows then takes a tenth of a second.
    """
    rounded = quantise(vectors)
    of_queries, of_vectors = backgrounds or (None, None)
    offsets = _offsets(of_queries, len(queries)), _offsets(of_vectors, len(rounded))
    indices = _unpack(_search(quantise(queries), rounded, k, threshold, jobs, offsets))
    row, place = np.nonzero(indices >= 0)
    other = indices[row, place]
    score = np.full(indices.shape, np.nan)
    score[row, place] = _take_off(cosines(queries, row, vectors, other), of_queries, row, of_vectors, other)
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
    rounded = quantise(vectors)
    others = rounded if among is None else quantise(among)
    size = min(BACKGROUND, len(others))
    sample = np.sort(np.random.default_rng(seed).choice(len(others), size, replace=False))
    count = min(COPIES + max(1, round(NEAREST * size)), size)
    if count <= COPIES:
        return np.zeros(len(rounded), np.float32)
    keys = _search(rounded, others[sample], count, -1.0, jobs)[:, COPIES:]
    return (WEIGHT * (keys >> 32).mean(axis=1) / UNIT).astype(np.float32)


def score_pairs(vectors: np.ndarray, i: np.ndarray, j: np.ndarray, background: np.ndarray | None = None) -> np.ndarray:
    """Scores, as `join_cosine` gives them, of pairs of rows: float64 (pairs,)."""
    return _take_off(cosines(vectors, i, vectors, j), background, i, background, j)


def quantise(vectors: np.ndarray) -> np.ndarray:
    """L2-normalised float (n, d) → int16 multiples of 1 / SCALE; what it returned before is returned as it is.

    Raises ValueError on NaN, infinity, lengths that are not 1, and shapes that are not (n, d).
    """
    if vectors.ndim != 2 or vectors.shape[1] > MAX_WIDTH or vectors.dtype not in (np.float16, np.float32, np.int16):
        text = f"vectors are {vectors.dtype} {vectors.shape}: expected float16 or float32 (n, d), d ≤ {MAX_WIDTH}"
        raise ValueError(text)
    if vectors.dtype == np.int16:
        return vectors
    rounded = np.empty(vectors.shape, np.int16)
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK].astype(np.float32)
        length = np.sqrt(np.einsum("nd,nd->n", block, block))
        wrong = np.flatnonzero(~((np.abs(length - 1) < 0.01) | (length == 0)))
        if len(wrong):
            row, value = start + wrong[0], length[wrong[0]]
            if np.isfinite(value):
                raise ValueError(f"row {row} of the vectors has length {value:.3g}, not 1: L2-normalise them")
            raise ValueError(f"row {row} of the vectors holds NaN or infinity: embed that image again")
        block *= (SCALE / np.where(length == 0, 1, length))[:, None]
        rounded[start : start + BLOCK] = np.rint(block)
    return rounded


# Partners of a row are int64 keys, the nearest first: score in units of 1 / UNIT, then ROWS − row, so that of two rows
# with equal scores the earlier one has the larger key.


def _nobody(n: int, k: int, threshold: float) -> np.ndarray:
    """Partners (n, k) that any row with a score above the threshold replaces."""
    floor = int((max(threshold, -3.0) - MARGIN) * UNIT)
    return np.full((n, k), (floor << 32) | ROWS)


def _somebody(partners: np.ndarray) -> np.ndarray:
    return (partners & ROWS) != ROWS


def _unpack(partners: np.ndarray) -> np.ndarray:
    """Row numbers int64, −1 for nobody."""
    return np.where(_somebody(partners), ROWS - 1 - (partners & ROWS), -1)


def _offsets(background: np.ndarray | None, n: int) -> np.ndarray:
    return np.zeros(n, np.int64) if background is None else np.rint(background * UNIT).astype(np.int64)


def _search(
    queries: np.ndarray,
    vectors: np.ndarray,
    k: int,
    threshold: float,
    jobs: int,
    offsets: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Keys int64 (queries, k) of the nearest vectors of each query; both quantised."""
    partners = _nobody(len(queries), k, threshold)
    side = max(BLOCK, BLOCK**2 // max(len(queries), 64))
    tasks = [(rows, columns) for rows in _blocks(len(queries), BLOCK) for columns in _blocks(len(vectors), side)]
    of_queries, of_vectors = offsets or (_offsets(None, len(queries)), _offsets(None, len(vectors)))
    _compare(tasks, queries, vectors, of_queries, of_vectors, partners, jobs, mutual=False)
    return partners


def _blocks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _pairs_of_blocks(n: int) -> list[tuple[Rows, Rows]]:
    blocks = _blocks(n, BLOCK)
    return [(a, b) for number, a in enumerate(blocks) for b in blocks[number:]]


def _compare(
    tasks: Iterable[tuple[Rows, Rows]],
    left: np.ndarray,
    right: np.ndarray,
    left_offsets: np.ndarray,
    right_offsets: np.ndarray,
    partners: np.ndarray,
    jobs: int,
    *,
    mutual: bool,
) -> None:
    """Offer to the rows of `left`, task by task, rows of `right` as partners; with `mutual`, the other way as well."""
    lock = Lock()
    numbers = np.arange(max(len(left), len(right)))

    def compare(task: tuple[Rows, Rows]) -> None:
        rows, columns = task
        a, b = left[rows], right[columns]
        products = _products(a, b) if len(a) <= FEW else a.astype(np.float32) @ b.astype(np.float32).T
        with lock:
            _offer(
                products, numbers[rows], numbers[columns], left_offsets[rows], right_offsets[columns], partners, mutual
            )

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(compare, tasks):
            pass


@numba.njit(nogil=True, cache=True)
def _products(a, b):  # type: ignore[no-untyped-def]
    """Inner products float32 of int16 rows, without a float copy of either."""
    products = np.empty((len(a), len(b)), np.float32)
    for j in range(len(b)):
        for i in range(len(a)):
            total = np.int32(0)
            for d in range(a.shape[1]):
                # numba adds and multiplies in 64 bits; said like this, the compiler finds the instruction for 16
                total = np.int32(total + np.int32(np.int32(a[i, d]) * np.int32(b[j, d])))
            products[i, j] = total
    return products


@numba.njit(nogil=True, cache=True)
def _insert(partners, key):  # type: ignore[no-untyped-def]
    """Put a key into the descending partners of one row unless it is there; the smallest falls off the end."""
    place = len(partners)
    while place > 0 and partners[place - 1] < key:
        place -= 1
    if place == len(partners) or (place > 0 and partners[place - 1] == key):
        return
    for p in range(len(partners) - 1, place, -1):
        partners[p] = partners[p - 1]
    partners[place] = key


@numba.njit(nogil=True, cache=True)
def _offer(products, rows, columns, row_offsets, column_offsets, partners, mutual):  # type: ignore[no-untyped-def]
    """Put the scores of a block where they are among the best: columns into the partners of rows, and vice versa."""
    last = partners.shape[1] - 1
    limits = np.full(len(columns), np.iinfo(np.int64).max)
    if mutual:
        for j in range(len(columns)):
            limits[j] = partners[columns[j], last] >> 32
    for i in range(len(rows)):
        row, offset = rows[i], row_offsets[i]
        limit = partners[row, last] >> 32
        for j in range(len(columns)):
            score = np.int64(products[i, j]) - offset - column_offsets[j]
            if score < limit and score < limits[j]:
                continue
            column = columns[j]
            if mutual and row == column:
                continue
            if score >= limit:
                _insert(partners[row], (score << 32) | (ROWS - 1 - column))
                limit = partners[row, last] >> 32
            if score >= limits[j]:
                _insert(partners[column], (score << 32) | (ROWS - 1 - row))
                limits[j] = partners[column, last] >> 32


def _pairs_of_cells(rounded: np.ndarray, jobs: int, seed: int) -> list[tuple[Rows, Rows]]:
    """Rows that look into a cell, and the rows that are in it, in blocks."""
    centres = _choose_centres(rounded, jobs, seed)
    probes = _unpack(_search(rounded, centres, min(PROBES, len(centres)), -1.0, jobs)).astype(np.int32)  # (n, probes)
    members, starts = _group(probes[:, 0], len(centres))
    visits, visit_starts = _group(probes.ravel(), len(centres))
    tasks: list[tuple[Rows, Rows]] = []
    for cell in range(len(centres)):
        inside = members[starts[cell] : starts[cell + 1]]
        looking = visits[visit_starts[cell] : visit_starts[cell + 1]] // probes.shape[1]
        tasks += [(looking[a], inside[b]) for a in _blocks(len(looking), BLOCK) for b in _blocks(len(inside), BLOCK)]
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
        cell = _unpack(_search(sample, centres, 1, -1.0, jobs))[:, 0]
        ones = np.ones(len(sample), np.float32)
        chosen = sparse.csr_array((ones, (cell, np.arange(len(sample)))), shape=(cells, len(sample)))
        sums = np.asarray(chosen @ sample.astype(np.float32), np.float64)
        length = np.linalg.norm(sums, axis=1)
        centres = np.where((length > 0)[:, None], np.rint(sums * (SCALE / np.maximum(length, 1))[:, None]), centres)
        centres = centres.astype(np.int16)
    return centres


def _measure_recall(
    rounded: np.ndarray, offsets: np.ndarray, partners: np.ndarray, threshold: float, jobs: int, seed: int
) -> float:
    """Of a fixed random sample of rows, how many of their exact partners are among `partners`, on average."""
    sample = np.sort(np.random.default_rng(seed).choice(len(rounded), min(SAMPLE, len(rounded)), replace=False))
    exact = _nobody(len(rounded), partners.shape[1], threshold)
    tasks = [(sample, columns) for columns in _blocks(len(rounded), BLOCK)]
    _compare(tasks, rounded, rounded, offsets, offsets, exact, jobs, mutual=True)
    wanted = [keys[_somebody(keys)] for keys in exact[sample]]
    shares = [np.isin(keys, partners[row]).mean() for row, keys in zip(sample, wanted, strict=True) if len(keys)]
    return float(np.mean(shares)) if shares else 1.0


def _to_pairs(partners: np.ndarray) -> pl.DataFrame:
    """Partners (n, k) → i < j, rank_i, rank_j, sorted."""
    row, place = np.nonzero(_somebody(partners))
    other = _unpack(partners[row, place])
    found = pl.DataFrame({"i": row, "j": other, "rank": place + 1})
    forwards = found.filter(pl.col("i") < pl.col("j")).rename({"rank": "rank_i"})
    backwards = found.filter(pl.col("i") > pl.col("j")).rename({"i": "j", "j": "i", "rank": "rank_j"})
    return forwards.join(backwards, on=["i", "j"], how="full", coalesce=True).sort("i", "j")


def _score(pairs: pl.DataFrame, vectors: np.ndarray, background: np.ndarray | None) -> pl.DataFrame:
    i, j = pairs["i"].to_numpy(), pairs["j"].to_numpy()
    cosine = cosines(vectors, i, vectors, j)
    score = _take_off(cosine, background, i, background, j)
    columns = [pl.Series("cosine", cosine), pl.Series("score", score)]
    return pairs.with_columns(columns).select("i", "j", "cosine", "score", "rank_i", "rank_j")


def _take_off(
    cosine: np.ndarray, left: np.ndarray | None, i: np.ndarray, right: np.ndarray | None, j: np.ndarray
) -> np.ndarray:
    """Scores of pairs: their cosines less the backgrounds, if there are any, of rows i and j."""
    return cosine if left is None or right is None else np.round(cosine - left[i] - right[j], 6)


def cosines(left: np.ndarray, i: np.ndarray, right: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Cosines float64 of rows i of `left` with rows j of `right`, of the vectors as given, to six decimals."""
    cosine = np.empty(len(i))
    for block in _blocks(len(i), BLOCK):
        a, b = left[i[block]].astype(np.float64), right[j[block]].astype(np.float64)
        length = np.sqrt(np.einsum("nd,nd->n", a, a) * np.einsum("nd,nd->n", b, b))
        cosine[block] = np.einsum("nd,nd->n", a, b) / np.where(length == 0, 1, length)
    return np.round(cosine, 6)
