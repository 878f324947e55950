"""Fingerprints → candidate pairs: an exact Hamming radius join over all eight orientations.

In: PDQ codes in keeper order. Out: pairs (i < j) with distance and the orientation that turns j into i. Exact means
that every pair within the radius is found (proved against brute force in the tests), except that a row keeps at most
LIMIT partners, the earliest in keeper order. Knows nothing of images.

Rows with equal codes are searched once, as a group, and every pair of their rows is written out afterwards: that only
saves work. Groups are numbered by their first row; a pair of groups is measured by the eight codes of the later group
against the upright code of the earlier one.
"""

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import polars as pl

RADIUS = 31  # PDQ's recommended threshold (ThreatExchange, pdq/README)
LIMIT = 64  # partners a row keeps
BITS = 256
BRUTE_FORCE = 1_500  # up to here comparing all pairs is faster than compiling the kernel
CHUNK = 4_096  # query rows a task; fixed, so that the result does not depend on the number of threads
INVERSE = np.array([0, 3, 2, 1, 4, 5, 6, 7], np.int32)  # of r0 r90 r180 r270 m0 m90 m180 m270


def join_hamming(codes: np.ndarray, *, radius: int = RADIUS, limit: int = LIMIT, jobs: int = 1) -> pl.DataFrame:
    """uint8 (n, 8, 32) codes, orientations in the order of `manifest.ORIENTATIONS` → table i, j, orientation, hamming.

    i < j are row numbers, `orientation` (a number) turns j into i, `hamming` ≤ radius. A pair that is within the radius
    upright is reported upright, else by its closest orientation. Sorted by j, i.
    """
    group, words = _collapse(codes)
    found = _brute_force(words, radius) if len(words) <= BRUTE_FORCE else _band_join(words, radius, jobs)
    pairs = _expand(_closest(found), group, limit)
    return pairs.sort("j", "i").filter(pl.int_range(pl.len()).over("j") < limit)


def _collapse(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group number of every row, in order of first appearance, and the codes of each group: uint64 (groups, 8, 4)."""
    flat = np.ascontiguousarray(codes).reshape(len(codes), 8 * BITS // 8)
    _, first, inverse = np.unique(flat.view(f"V{flat.shape[1]}").ravel(), return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    words = flat[first[order]].view(np.uint64).reshape(-1, 8, BITS // 64)
    return number[inverse.ravel()], np.ascontiguousarray(words)


def _closest(found: pl.DataFrame) -> pl.DataFrame:
    """One row a pair: upright when that is within the radius, else the smallest distance."""
    order = found.sort("i", "j", pl.col("orientation") != 0, "hamming", "orientation")
    return order.unique(["i", "j"], keep="first", maintain_order=True)


def _expand(pairs: pl.DataFrame, group: np.ndarray, limit: int) -> pl.DataFrame:
    """Pairs of groups → pairs of their rows; of a large group only the first `limit` rows serve as partners."""
    numbers = np.arange(group.max(initial=-1) + 1)
    zeros = np.zeros(len(numbers), np.int32)
    own = pl.DataFrame({"i": numbers, "j": numbers, "orientation": zeros, "hamming": zeros})
    # A row of the earlier group may come after one of the later group, so both directions are written out.
    inverse = pl.Series(INVERSE).gather(pairs["orientation"])
    swapped = pairs.select(i="j", j="i", orientation=inverse, hamming="hamming")
    members = pl.DataFrame({"group": group, "row": np.arange(len(group))})
    leaders = members.filter(pl.int_range(pl.len()).over("group") < limit)
    rows = (
        pl.concat([own, pairs, swapped])
        .join(members.rename({"group": "j", "row": "row_j"}), on="j")
        .join(leaders.rename({"group": "i", "row": "row_i"}), on="i")
        .filter(pl.col("row_i") < pl.col("row_j"))
    )
    return rows.select(i="row_i", j="row_j", orientation="orientation", hamming="hamming")


def _table(columns: list[np.ndarray]) -> pl.DataFrame:
    i, j, orientation, hamming = columns
    return pl.DataFrame(
        {"i": i.astype(np.int64), "j": j.astype(np.int64), "orientation": orientation.astype(np.int32)}
        | {"hamming": hamming.astype(np.int32)}
    )


def _brute_force(words: np.ndarray, radius: int) -> pl.DataFrame:
    """All pairs of groups, in blocks of one query row."""
    parts: list[list[np.ndarray]] = [[np.empty(0, np.int64)] * 4]
    for j in range(1, len(words)):
        distance = np.bitwise_count(words[j][:, None, :] ^ words[None, :j, 0, :]).sum(axis=2)  # (8, j)
        orientation, i = np.nonzero(distance <= radius)
        parts.append([i, np.full(len(i), j), orientation, distance[orientation, i]])
    return _table([np.concatenate(column) for column in zip(*parts, strict=True)])


def choose_bands(groups: int, radius: int) -> list[tuple[int, int, int]]:
    """(first bit, width, flips) of each band, for exact search by the pigeonhole principle.

    If every band b differed in more than flips_b bits, the codes would differ in at least Σ (flips_b + 1) = radius + 1.
    Wide bands make buckets small, flips make probes many: bands get fewer and wider as the number of codes grows.
    """
    count = 16 if groups < 400_000 else 12 if groups < 4_000_000 else 11
    count = min(count, radius + 1)
    flips = [(radius + 1) // count - 1 + (b < (radius + 1) % count) for b in range(count)]
    edges = np.linspace(0, BITS, count + 1).astype(int)
    return [(int(edges[b]), int(edges[b + 1] - edges[b]), flips[b]) for b in range(count)]


def _band_join(words: np.ndarray, radius: int, jobs: int) -> pl.DataFrame:
    bands = choose_bands(len(words), radius)
    starts, entries = zip(*(_bucket(words[:, 0], first, width) for first, width, _ in bands), strict=True)
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in starts])])
    masks = [_flip_masks(width, flips) for _, width, flips in bands]
    mask_offsets = np.concatenate([[0], np.cumsum([len(m) for m in masks])])
    layout = np.array([(first, width) for first, width, _ in bands])
    tables = (np.concatenate(starts), np.stack(entries), offsets, np.concatenate(masks), mask_offsets, layout)

    def search(start: int) -> np.ndarray:
        return _search_chunk(words, *tables, radius, start, min(start + CHUNK, len(words)))

    with ThreadPoolExecutor(jobs) as pool:
        parts = list(pool.map(search, range(0, len(words), CHUNK)))
    return _table(list(np.concatenate(parts).T))


def _bucket(codes: np.ndarray, first: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each value of the band starts, (2**width + 1,), and the groups sorted by value, then number."""
    values = _band_values(codes, first, width)
    order = np.argsort(values, kind="stable").astype(np.int32)
    counts = np.bincount(values, minlength=2**width)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), order


def _flip_masks(width: int, flips: int) -> np.ndarray:
    """All masks of `width` bits with at most `flips` (0, 1 or 2) of them set."""
    single = 1 << np.arange(width, dtype=np.int64)
    masks = [np.zeros(1, np.int64)]
    if flips >= 1:
        masks.append(single)
    if flips >= 2:
        a, b = np.triu_indices(width, 1)
        masks.append(single[a] | single[b])
    return np.concatenate(masks)


@numba.njit(nogil=True, cache=True)
def _band_value(code: np.ndarray, first: int, width: int) -> np.int64:
    """Bits first … first + width - 1 of a code of four words, as a number; a band may lie across two words."""
    word, shift = first // 64, first % 64
    value = code[word] >> np.uint64(shift)
    if shift + width > 64:
        value |= code[word + 1] << np.uint64(64 - shift)
    return np.int64(value & np.uint64((1 << width) - 1))


@numba.njit(nogil=True, cache=True)
def _band_values(codes: np.ndarray, first: int, width: int) -> np.ndarray:
    values = np.empty(len(codes), np.int64)
    for row in range(len(codes)):
        values[row] = _band_value(codes[row], first, width)
    return values


@numba.njit(nogil=True, cache=True)
def _distance(a: np.ndarray, b: np.ndarray) -> np.int64:
    total = np.int64(0)
    for word in range(4):
        x = a[word] ^ b[word]
        x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
        x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
        x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        total += np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))
    return total


@numba.njit(nogil=True, cache=True)
def _search_chunk(  # type: ignore[no-untyped-def]
    words, starts, entries, offsets, masks, mask_offsets, layout, radius, begin, end
):
    """int64 (found, 4): i, j, orientation, hamming of every pair with `begin` ≤ j < `end` and i < j."""
    found = np.empty((1024, 4), np.int64)
    count = 0
    seen = np.full(end, -1, np.int64)  # last query that looked at a group: a pair may share many buckets
    for j in range(begin, end):
        for orientation in range(8):
            query = words[j, orientation]
            stamp = j * 8 + orientation
            for band in range(len(layout)):
                value = _band_value(query, layout[band, 0], layout[band, 1])
                for m in range(mask_offsets[band], mask_offsets[band + 1]):
                    bucket = offsets[band] + (value ^ masks[m])
                    for position in range(starts[bucket], starts[bucket + 1]):
                        i = entries[band, position]
                        if i >= j:
                            break
                        if seen[i] == stamp:
                            continue
                        seen[i] = stamp
                        hamming = _distance(query, words[i, 0])
                        if hamming <= radius:
                            if count == len(found):
                                larger = np.empty((2 * count, 4), np.int64)
                                larger[:count] = found
                                found = larger
                            found[count, 0], found[count, 1] = i, j
                            found[count, 2], found[count, 3] = orientation, hamming
                            count += 1
    return found[:count]
