"""Inner products, block by block → the best partners of every row, compiled.

In: vectors rounded to multiples of 1 / SCALE. Out: for every row its k partners with the highest scores, as sorted
keys. Inner products of such vectors are whole numbers small enough to be exact in float32 in whatever order they are
added up, so that no library, block shape or number of threads can change a bit of the answer; the rounding moves a
cosine by 0.0001 (standard error). Equal scores: the earlier row is nearer.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numba
import numpy as np

MAX_WIDTH = 8192  # components of a vector
SCALE = 4050  # rounding adds at most √MAX_WIDTH / 2 to its length, so inner products stay below 2²⁴
UNIT = SCALE**2  # a cosine of 1
MARGIN = 0.001  # ten standard errors of a rounded cosine
BLOCK = 2048  # rows a side that are compared at once
FEW = 8  # queries for which turning a million rows into floats would take longer than comparing them
ROWS = 2**32 - 1
ONE_WAY = 0  # columns become partners of rows: they number other things
BOTH = 1  # and rows become partners of columns; nothing is its own partner
ASCENDING = 2  # the same, but only where the row comes before the column: each pair has one score

Rows = slice | np.ndarray


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


def nobody(n: int, k: int, threshold: float) -> np.ndarray:
    """Partners (n, k) that any row with a score above the threshold replaces."""
    floor = int((max(threshold, -3.0) - MARGIN) * UNIT)
    return np.full((n, k), (floor << 32) | ROWS)


def somebody(partners: np.ndarray) -> np.ndarray:
    return (partners & ROWS) != ROWS


def unpack(partners: np.ndarray) -> np.ndarray:
    """Row numbers int64, −1 for nobody."""
    return np.where(somebody(partners), ROWS - 1 - (partners & ROWS), -1)


def offsets(background: np.ndarray | None, n: int) -> np.ndarray:
    """What is taken off the inner products of n rows, int64."""
    return np.zeros(n, np.int64) if background is None else np.rint(background * UNIT).astype(np.int64)


def search(
    queries: np.ndarray,
    vectors: np.ndarray,
    k: int,
    threshold: float,
    jobs: int,
    taken_off: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Keys int64 (queries, k) of the nearest vectors of each query; both quantised."""
    partners = nobody(len(queries), k, threshold)
    side = max(BLOCK, BLOCK**2 // max(len(queries), 64))
    tasks = [(rows, columns) for rows in blocks(len(queries), BLOCK) for columns in blocks(len(vectors), side)]
    taken_off = taken_off or (np.zeros(len(queries), np.int64), np.zeros(len(vectors), np.int64))
    compare_blocks(tasks, queries, vectors, taken_off, partners, jobs, ONE_WAY)
    return partners


def blocks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def pairs_of_blocks(n: int) -> list[tuple[Rows, Rows]]:
    """Tasks in which each of n rows meets each row that comes after it."""
    parts = blocks(n, BLOCK)
    return [(a, b) for number, a in enumerate(parts) for b in parts[number:]]


def compare_blocks(
    tasks: Iterable[tuple[Rows, Rows]],
    left: np.ndarray,
    right: np.ndarray,
    taken_off: tuple[np.ndarray, np.ndarray],
    partners: np.ndarray,
    jobs: int,
    ways: int,
) -> None:
    """Offer to the rows of `left`, task by task, rows of `right` as partners.

    taken_off: int64 for every row of `left` and of `right`, to be taken off the inner products. ways: ONE_WAY, BOTH or
    ASCENDING.
    """
    lock = Lock()
    of_left, of_right = taken_off
    numbers = np.arange(max(len(left), len(right)))

    def compare(task: tuple[Rows, Rows]) -> None:
        rows, columns = task
        a, b = left[rows], right[columns]
        found = _products(a, b) if len(a) <= FEW else a.astype(np.float32) @ b.astype(np.float32).T
        with lock:
            _offer(found, numbers[rows], numbers[columns], of_left[rows], of_right[columns], partners, ways)

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
def _offer(products, rows, columns, row_offsets, column_offsets, partners, ways):  # type: ignore[no-untyped-def]
    """Put the scores of a block where they are among the best: columns into the partners of rows, and vice versa."""
    last = partners.shape[1] - 1
    limits = np.full(len(columns), np.iinfo(np.int64).max)
    if ways != ONE_WAY:
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
            if (ways == BOTH and row == column) or (ways == ASCENDING and row >= column):
                continue
            if score >= limit:
                _insert(partners[row], (score << 32) | (ROWS - 1 - column))
                limit = partners[row, last] >> 32
            if score >= limits[j]:
                _insert(partners[column], (score << 32) | (ROWS - 1 - row))
                limits[j] = partners[column, last] >> 32
