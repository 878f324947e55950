"""The Hamming join of many codes: compiled, exact, far below n² comparisons.

Rows with equal codes are searched once, as a group, and their pairs are written out afterwards: that only saves work.
Groups are numbered by their first row; a pair of groups is measured by the eight codes of the later group against the
upright code of the earlier one. Two codes within the radius agree in at least one of several bands of bits but for a
few flips (pigeonhole principle; Norouzi et al. 2012, "Fast Search in Hamming Space with Multi-Index Hashing").
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from dedup.hamming import BITS, INVERSE, KEY_BITS, TURNED

NOBODY = np.iinfo(np.int64).max


def join_bands(words: np.ndarray, radius: int, limit: int, jobs: int) -> np.ndarray:
    """uint64 (n, 8, 4) → int64 (found, 2): j and the keys of its first `limit` partners, ascending.

    For rows with equal codes `limit` holds for the groups first: of a group, only the pairs to its `limit` earliest
    partner groups are known.
    """
    group, first = _collapse(words)
    found = _join_groups(words[first], radius, limit, jobs)
    if len(first) == len(words):
        return found
    members = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(group))])
    partners = _both_directions(found, np.diff(starts))
    partner_starts = np.searchsorted(partners[:, 0], np.arange(len(first) + 1))
    rows = _expand(partners[:, 1].copy(), partner_starts, members, starts, limit)
    return rows[np.argsort(rows[:, 0], kind="stable")]


def _collapse(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group number of every row, in order of first appearance, and the first row of each group."""
    flat = words.reshape(len(words), -1)
    codes = flat.view(f"V{flat.shape[1] * 8}").ravel()
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    return number[inverse], first[order]


def _both_directions(found: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Pairs of groups, and those swapped whose earlier group has rows that may come after the later one's."""
    j, key = found.T
    i, orientation = key >> KEY_BITS, key & 7
    inverse = (j << KEY_BITS) | (key & (TURNED | 0xFF << 3)) | INVERSE[orientation]
    swapped = np.stack([i, inverse], axis=1)[sizes[i] > 1]
    both = np.concatenate([found, swapped])
    return both[np.lexsort((both[:, 1], both[:, 0]))]


def choose_bands(groups: int, radius: int) -> list[tuple[int, int, int]]:
    """(first bit, width, flips) of each band, for exact search by the pigeonhole principle.

    If every band b differed in more than flips_b bits, the codes would differ in at least Σ (flips_b + 1) = radius + 1.
    Wide bands make buckets small, flips make probes many: the count with the least estimated work is taken.
    """

    def layout(count: int) -> list[tuple[int, int, int]]:
        edges = [BITS * b // count for b in range(count + 1)]
        flips = [(radius + 1) // count - 1 + (b < (radius + 1) % count) for b in range(count)]
        return [(edges[b], edges[b + 1] - edges[b], flips[b]) for b in range(count)]

    def work(count: int) -> float:
        """Codes compared for one query, and what opening buckets costs; weights measured on 10⁴ … 10⁶ codes."""
        total = 0.0
        for _, width, flips in layout(count):
            probes = sum(math.comb(width, f) for f in range(flips + 1))
            total += probes * (0.6 * groups / 2**width + 6 + 18 * 2**width / groups)
        return total

    counts = range(min(11, radius + 1), min(32, radius + 1) + 1)  # bands are at most 24 bits wide
    return layout(min(counts, key=work))


def _join_groups(words: np.ndarray, radius: int, limit: int, jobs: int) -> np.ndarray:
    """j and key of all pairs of groups, sorted; the later groups of the pairs are divided among threads."""
    bands = choose_bands(len(words), radius)
    index = [_bucket(words[:, 0], first, width) for first, width, _ in bands]
    starts, entries, heads = (list(column) for column in zip(*index, strict=True))
    masks = [_flip_masks(width, flips) for _, width, flips in bands]
    tables = (_join(starts), np.stack(entries), np.stack(heads), _join(masks))
    layout = np.array([(first, width) for first, width, _ in bands])
    edges = np.linspace(0, len(words), 2 * jobs + 1).astype(int)

    def search(piece: int) -> np.ndarray:
        return _search(words, *tables, layout, radius, limit, edges[piece], edges[piece + 1])

    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(search, reversed(range(2 * jobs))))  # later groups have more before them
    return np.concatenate(found[::-1])


def _join(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of several lengths → one after the other, and where each begins and ends."""
    return np.concatenate(arrays), np.cumsum([0, *(len(array) for array in arrays)])


def _bucket(codes: np.ndarray, first: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each value of the band starts, (2**width + 1,); the groups sorted by value, then number; their heads."""
    values = _band_values(codes, first, width)
    starts = np.zeros(2**width + 1, np.int32)
    np.cumsum(np.bincount(values, minlength=2**width), out=starts[1:])
    order = np.argsort(values, kind="stable").astype(np.int32)
    return starts, order, np.ascontiguousarray(codes[order, :2])


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
def _band_value(code, first, width):  # type: ignore[no-untyped-def]
    """Bits first … first + width - 1 of a code of four words, as a number; a band may lie across two words."""
    word, shift = first // 64, first % 64
    value = code[word] >> np.uint64(shift)
    if shift + width > 64:
        value |= code[word + 1] << np.uint64(64 - shift)
    return np.int64(value & np.uint64((1 << width) - 1))


@numba.njit(nogil=True, cache=True)
def _band_values(codes, first, width):  # type: ignore[no-untyped-def]
    values = np.empty(len(codes), np.int64)
    for row in range(len(codes)):
        values[row] = _band_value(codes[row], first, width)
    return values


@numba.njit(nogil=True, cache=True, inline="always")
def _differing(a, b):  # type: ignore[no-untyped-def]
    """Number of differing bits of two words; compilers know this pattern and make it one instruction."""
    x = a ^ b
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@numba.njit(nogil=True, cache=True)
def _insert(partners, key, limit):  # type: ignore[no-untyped-def]
    """Put a key into the ascending partners of one row, one key an i; the largest falls off the end."""
    end = limit
    for p in range(limit):
        if partners[p] >> KEY_BITS >= key >> KEY_BITS:
            end = p
            break
    if end == limit:
        return
    if partners[end] >> KEY_BITS == key >> KEY_BITS:
        partners[end] = min(partners[end], key)
        return
    for p in range(limit - 1, end, -1):
        partners[p] = partners[p - 1]
    partners[end] = key


@numba.njit(nogil=True, cache=True)
def _compare_block(  # type: ignore[no-untyped-def]
    words, begin, order, query_heads, run, run_end, entry, head, low, high, slot, partners, used, radius, limit
):
    """Queries `run` … `run_end` against the groups of one bucket; returns how many rows have partners by now."""
    for at in range(run, run_end):
        a, b = query_heads[at, 0], query_heads[at, 1]
        for p in range(low, high):
            hamming = _differing(a, head[p, 0]) + _differing(b, head[p, 1])
            if hamming > radius:
                continue
            i, j, orientation = entry[p], begin + order[at] // 8, order[at] % 8
            s = slot[j - begin]
            if i >= j or (s >= 0 and i > partners[s, limit - 1] >> KEY_BITS):
                break  # later than j, or `limit` earlier partners are known
            hamming += _differing(words[j, orientation, 2], words[i, 0, 2])
            hamming += _differing(words[j, orientation, 3], words[i, 0, 3])
            if hamming > radius:
                continue
            if s < 0:
                s = slot[j - begin] = used
                used += 1
            turned = TURNED if orientation else 0
            _insert(partners[s], (np.int64(i) << KEY_BITS) | turned | (hamming << 3) | orientation, limit)
    return used


@numba.njit(nogil=True, cache=True)
def _search(  # type: ignore[no-untyped-def]
    words, starts, entries, heads, masks, layout, radius, limit, begin, end
):
    """int64 (found, 2): j and key of the first `limit` partners of every group `begin` ≤ j < `end`.

    Band by band: the queries are sorted by the value of the band, so that all queries of one value meet a bucket while
    it is in the cache. Half of the code tells nearly all pairs apart; only the rest is compared in full.
    """
    queries = 8 * (end - begin)
    slot = np.full(end - begin, -1, np.int64)  # a row gets room for its partners with the first one
    partners = np.full((1024, limit), NOBODY)
    used = 0
    order = np.empty(queries, np.int64)
    query_heads = np.empty((queries, 2), np.uint64)
    values = np.empty(queries, np.int64)
    for band in range(len(layout)):
        first, width = layout[band, 0], layout[band, 1]
        place = np.zeros(2**width + 1, np.int64)
        for q in range(queries):
            values[q] = _band_value(words[begin + q // 8, q % 8], first, width)
            place[values[q] + 1] += 1
        for value in range(2**width):
            place[value + 1] += place[value]
        for q in range(queries):
            at = place[values[q]]
            place[values[q]] += 1
            order[at] = q
            query_heads[at] = words[begin + q // 8, q % 8, :2]
        start = starts[0][starts[1][band] : starts[1][band + 1]]
        mask = masks[0][masks[1][band] : masks[1][band + 1]]
        entry, head = entries[band], heads[band]
        run = 0
        while run < queries:
            value = values[order[run]]
            run_end = place[value]
            needed = min(used + run_end - run, end - begin)
            if needed > len(partners):
                larger = np.full((2 * needed, limit), NOBODY)
                larger[:used] = partners[:used]
                partners = larger
            for m in range(len(mask)):
                low, high = start[value ^ mask[m]], start[(value ^ mask[m]) + 1]
                while high > low and entry[high - 1] >= end:
                    high -= 1
                used = _compare_block(
                    words,
                    begin,
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
            run = run_end
    found = np.empty((np.sum(partners[:used] != NOBODY), 2), np.int64)
    count = 0
    for row in range(end - begin):
        if slot[row] >= 0:
            for key in partners[slot[row]]:
                if key != NOBODY:
                    found[count, 0], found[count, 1] = begin + row, key
                    count += 1
    return found


@numba.njit(cache=True)
def _expand(partners, partner_starts, members, starts, limit):  # type: ignore[no-untyped-def]
    """Pairs of groups → int64 (found, 2): j and keys of the first `limit` partners of every row."""
    found = np.empty((1024, 2), np.int64)
    count = 0
    for group in range(len(starts) - 1):
        rows = members[starts[group] : starts[group + 1]]
        earliest = np.full(limit, NOBODY)  # of all rows that match the group, itself included
        for row in rows[: limit if len(rows) > 1 else 0]:
            _insert(earliest, row << KEY_BITS, limit)
        for key in partners[partner_starts[group] : partner_starts[group + 1]]:
            other = key >> KEY_BITS
            for row in members[starts[other] : starts[other + 1]]:
                if row > earliest[limit - 1] >> KEY_BITS:
                    break
                _insert(earliest, (row << KEY_BITS) | (key & (1 << KEY_BITS) - 1), limit)
        if count + len(rows) * limit > len(found):
            larger = np.empty((2 * (count + len(rows) * limit), 2), np.int64)
            larger[:count] = found[:count]
            found = larger
        for row in rows:
            for key in earliest:
                if key >> KEY_BITS >= row:
                    break
                found[count, 0], found[count, 1] = row, key
                count += 1
    return found[:count]
