"""The Hamming join of two blocks of codes: compiled, exact, far below comparing all pairs.

A pair is measured by the eight codes of the later row against the upright code of the earlier one. Two codes within the
radius agree in at least one of several bands of bits but for a few flips (pigeonhole principle; Norouzi et al. 2012,
"Fast Search in Hamming Space with Multi-Index Hashing"). The index of one band at a time is in memory.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from dedup import groups
from dedup.hamming import BITS, KEY_BITS, NOBODY, TURNED

MAX_FLIPS = 2  # of a band: see `_flip_masks`


def join_bands(words: np.ndarray, radius: int, limit: int, jobs: int) -> np.ndarray:
    """uint64 (n, 8, 4) → int64 (found, 2): j and the keys of its first `limit` partners, ascending; by threads.

    Rows with equal codes: see `groups`.
    """
    group, first = groups.collapse(words)
    codes = words[first]
    upright = np.ascontiguousarray(codes[:, 0])
    edges = np.linspace(0, len(codes), 2 * jobs + 1).astype(int)

    def search(piece: int) -> np.ndarray:
        begin, end = edges[piece], edges[piece + 1]
        return join_block(upright[:end], 0, codes[begin:end], begin, radius, limit)

    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(search, reversed(range(2 * jobs))))  # later rows have more before them
    return groups.expand(np.concatenate(found[::-1]), group, first, limit)


def join_block(upright: np.ndarray, start: int, later: np.ndarray, begin: int, radius: int, limit: int) -> np.ndarray:
    """Partners of each of the later rows in a block: int64 (found, 2), j and the keys of its first `limit`, ascending.

    upright: uint64 (m, 4), of the rows `start` … ; later: uint64 (n, 8, 4), of the rows `begin` … No row is a partner
    of one that comes before it, or of itself.
    """
    bands = choose_bands(max(1, len(upright)), radius, max(1, 8 * len(later)))
    masks = [_flip_masks(width, flips) for _, width, flips in bands]
    layout = np.array([(first, width, len(mask)) for (first, width, _), mask in zip(bands, masks, strict=True)])
    flat = later.reshape(-1, later.shape[2])
    found = _search(upright, flat, begin - start, np.concatenate(masks), layout, radius, limit)
    return found + np.array([begin, start << KEY_BITS])


def choose_bands(codes: int, radius: int, queries: int | None = None) -> list[tuple[int, int, int]]:
    """(first bit, width, flips) of each band, for exact search by the pigeonhole principle.

    queries: that are looked for at once; None = eight a code.

    If every band b differed in more than flips_b bits, the codes would differ in at least Σ (flips_b + 1) = radius + 1.
    Wide bands make buckets small, flips make probes many: the count with the least estimated work is taken.
    """

    def layout(count: int) -> list[tuple[int, int, int]]:
        edges = [BITS * b // count for b in range(count + 1)]
        flips = [(radius + 1) // count - 1 + (b < (radius + 1) % count) for b in range(count)]
        return [(edges[b], edges[b + 1] - edges[b], flips[b]) for b in range(count)]

    fewest = max(11, -(-(radius + 1) // (1 + MAX_FLIPS)))  # bands are at most 24 bits wide
    counts = range(min(fewest, radius + 1), min(32, radius + 1) + 1)
    return min(map(layout, counts), key=lambda bands: estimate_work(bands, codes, queries or 8 * codes))


def estimate_work(bands: list[tuple[int, int, int]], codes: float, queries: float) -> float:
    """Codes compared for one query, and what its buckets cost, that all queries of a value open together.

    About nanoseconds, measured on 10⁶ and 8 · 10⁶ codes.
    """
    total = 0.0
    for _, width, flips in bands:
        probes = sum(math.comb(width, f) for f in range(flips + 1))
        total += probes * (0.43 * codes / 2**width + 8.5 + 100 * 2**width / queries)
    return total


def _flip_masks(width: int, flips: int) -> np.ndarray:
    """All masks of `width` bits with at most `flips` (up to MAX_FLIPS) of them set."""
    single = 1 << np.arange(width, dtype=np.int64)
    masks = [np.zeros(1, np.int64)]
    if flips >= 1:
        masks.append(single)
    if flips >= 2:
        a, b = np.triu_indices(width, 1)
        masks.append(single[a] | single[b])
    return np.concatenate(masks)


@numba.njit(nogil=True, cache=True)
def _band_value(code, first, width):  # type: ignore[no-untyped-def]
    """Bits first … first + width - 1 of a code of four words, as a number; a band may lie across two words."""
    word, shift = first // 64, first % 64
    value = code[word] >> np.uint64(shift)
    if shift + width > 64:
        value |= code[word + 1] << np.uint64(64 - shift)
    return np.int64(value & np.uint64((1 << width) - 1))


@numba.njit(nogil=True, cache=True, inline="always")
def _differing(a, b):  # type: ignore[no-untyped-def]
    """Number of differing bits of two words; compilers know this pattern and make it one instruction."""
    x = a ^ b
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@numba.njit(nogil=True, cache=True)
def _count(a, b, first, second, radius):  # type: ignore[no-untyped-def]
    """How many of the codes with these halves may be near. Without a branch, so that compilers take several at once."""
    count = 0
    for p in range(len(first)):
        count += _differing(a, first[p]) + _differing(b, second[p]) <= radius
    return count


@numba.njit(nogil=True, cache=True)
def _sort(codes, first, width, order, heads):  # type: ignore[no-untyped-def]
    """Put the numbers of the codes in the order of a band's value, then their own, and beside each half of its code.

    Returns where each value begins, (2**width + 1,).
    """
    place = np.zeros(2**width + 2, np.int64)
    for row in range(len(codes)):
        place[_band_value(codes[row], first, width) + 2] += 1
    for value in range(2**width):
        place[value + 2] += place[value + 1]
    for row in range(len(codes)):
        value = _band_value(codes[row], first, width)
        at = place[value + 1]
        place[value + 1] += 1
        order[at] = row
        heads[0, at], heads[1, at] = codes[row, 0], codes[row, 1]
    return place[:-1]


@numba.njit(nogil=True, cache=True)
def _compare_block(  # type: ignore[no-untyped-def]
    upright, later, gap, order, query_heads, run, run_end, entry, head, low, high, slot, partners, used, radius, limit
):
    """Queries `run` … `run_end` against the rows of one bucket; returns how many rows have partners by now."""
    firsts, seconds = head[0, low:high], head[1, low:high]
    for at in range(run, run_end):
        a, b = query_heads[0, at], query_heads[1, at]
        if not _count(a, b, firsts, seconds, radius):
            continue
        for p in range(low, high):
            hamming = _differing(a, head[0, p]) + _differing(b, head[1, p])
            if hamming > radius:
                continue
            i, query = entry[p], order[at]
            j, orientation = query // 8, query % 8
            s = slot[j]
            if i >= j + gap or (s >= 0 and i > partners[s, limit - 1] >> KEY_BITS):
                break  # later than j, or `limit` earlier partners are known
            hamming += _differing(later[query, 2], upright[i, 2])
            hamming += _differing(later[query, 3], upright[i, 3])
            if hamming > radius:
                continue
            if s < 0:
                s = slot[j] = used
                used += 1
            turned = TURNED if orientation else 0
            groups.insert(partners[s], (np.int64(i) << KEY_BITS) | turned | (hamming << 3) | orientation, limit)
    return used


@numba.njit(nogil=True, cache=True)
def _search(upright, later, gap, masks, layout, radius, limit):  # type: ignore[no-untyped-def]
    """int64 (found, 2): number of a later row, and key of each of its first `limit` partners.

    later: the eight codes of each row, one after the other. gap: number of its first row, from the first upright one.
    Band by band: the queries are sorted by the value of the band, so that all queries of one value meet a bucket while
    it is in the cache. Half of the code tells nearly all pairs apart; only the rest is compared in full.
    """
    queries, rows = len(later), len(later) // 8
    slot = np.full(rows, -1, np.int32)  # a row gets room for its partners with the first one
    partners = np.full((1024, limit), NOBODY)
    used = 0
    order, query_heads = np.empty(queries, np.int32), np.empty((2, queries), np.uint64)
    entry, head = np.empty(len(upright), np.int32), np.empty((2, len(upright)), np.uint64)
    next_mask = 0
    for band in range(len(layout)):
        first, width = layout[band, 0], layout[band, 1]
        mask = masks[next_mask : next_mask + layout[band, 2]]
        next_mask += layout[band, 2]
        start = _sort(upright, first, width, entry, head)
        place = _sort(later, first, width, order, query_heads)
        for value in range(2**width):
            run, run_end = place[value], place[value + 1]
            if run == run_end:
                continue
            needed = min(used + run_end - run, rows)
            if needed > len(partners):
                larger = np.full((min(2 * needed, rows), limit), NOBODY)
                larger[:used] = partners[:used]
                partners = larger
            for m in range(len(mask)):
                low, high = start[value ^ mask[m]], start[(value ^ mask[m]) + 1]
                while high > low and entry[high - 1] >= rows + gap:
                    high -= 1
                used = _compare_block(
                    upright,
                    later,
                    gap,
                    order,
                    query_heads,
                    run,
                    run_end,
                    entry,
                    head,
                    low,
                    high,
                    slot,
                    partners,
                    used,
                    radius,
                    limit,
                )
    found = np.empty((np.sum(partners[:used] != NOBODY), 2), np.int64)
    count = 0
    for row in range(rows):
        if slot[row] >= 0:
            for key in partners[slot[row]]:
                if key != NOBODY:
                    found[count, 0], found[count, 1] = row, key
                    count += 1
    return found
