"""Rows with equal codes are searched once, as a group, and their pairs are written out afterwards: that saves work.

Groups are numbered by their first row. In: codes, and the pairs of the groups' first rows. Out: pairs of all rows.
"""

from pathlib import Path

import numba
import numpy as np

from dedup.hamming import INVERSE, KEY_BITS, NOBODY, TURNED

CHUNK = 100_000  # codes that are looked at together


def collapse(source: np.ndarray | Path) -> tuple[np.ndarray, np.ndarray]:
    """uint64 (n, 8, 4), or the .npy file that holds them → group number of every row; first row of each, ascending.

    Digests find equal codes, a comparison makes sure.
    """
    n = len(_open(source))
    digests = np.concatenate([_digest(_open(source)[start : start + CHUNK]) for start in range(0, n, CHUNK)])
    order = np.argsort(digests, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(digests[order]) != 0))
    leader = np.empty(n, np.int64)
    leader[order] = np.repeat(order[starts], np.diff(np.append(starts, n)))
    followers = np.flatnonzero(leader != np.arange(n))
    for start in range(0, len(followers), CHUNK):
        rows, words = followers[start : start + CHUNK], _open(source)
        differing = rows[(words[rows] != words[leader[rows]]).any(axis=(1, 2))]
        leader[differing] = differing  # the same digest for other codes: these are searched by themselves
    first = np.flatnonzero(leader == np.arange(n))
    number = np.empty(n, np.int64)
    number[first] = np.arange(len(first))
    return number[leader], first


def _open(source: np.ndarray | Path) -> np.ndarray:
    """A file is mapped anew for each chunk, so that no more of it than that counts as ours."""
    return np.load(source, mmap_mode="r") if isinstance(source, Path) else source


def _digest(words: np.ndarray) -> np.ndarray:
    """uint64 (n,): each word is mixed in by a multiplication, and the high bits are spread over the low ones."""
    found = np.zeros(len(words), np.uint64)
    for column in words.reshape(len(words), -1).T:
        found = (found ^ column) * np.uint64(0x9E3779B97F4A7C15)
        found ^= found >> np.uint64(29)
    return found


def keep(path: Path, upright: Path, first: np.ndarray) -> None:
    """Let only these rows stand in the file of codes, one after the other; and their upright codes in another file."""
    of_upright = np.lib.format.open_memmap(upright, "w+", np.uint64, (len(first), 4))
    for start in range(0, len(first), CHUNK):
        words, rows = np.load(path, mmap_mode="r+"), first[start : start + CHUNK]
        words[start : start + len(rows)] = taken = words[rows]  # none of them comes before its new place
        of_upright[start : start + len(rows)] = taken[:, 0]


def expand(found: np.ndarray, group: np.ndarray, first: np.ndarray, limit: int) -> np.ndarray:
    """Pairs of groups, int64 (found, 2): j and key → j and the keys of its first `limit` partners, of rows, ascending.

    `limit` holds for the groups first: of a group, only the pairs to its `limit` earliest partner groups are known.
    """
    if len(first) == len(group):
        return found
    members = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(group))])
    partners = _both_directions(found, np.diff(starts))
    partner_starts = np.searchsorted(partners[:, 0], np.arange(len(first) + 1))
    rows = _expand(partners[:, 1].copy(), partner_starts, members, starts, limit)
    return rows[np.argsort(rows[:, 0], kind="stable")]


def _both_directions(found: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Pairs of groups, and those swapped whose earlier group has rows that may come after the later one's."""
    j, key = found.T
    i, orientation = key >> KEY_BITS, key & 7
    inverse = (j << KEY_BITS) | (key & (TURNED | 0xFF << 3)) | INVERSE[orientation]
    swapped = np.stack([i, inverse], axis=1)[sizes[i] > 1]
    both = np.concatenate([found, swapped])
    return both[np.lexsort((both[:, 1], both[:, 0]))]


@numba.njit(nogil=True, cache=True)
def insert(partners, key, limit):  # type: ignore[no-untyped-def]
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


@numba.njit(cache=True)
def _expand(partners, partner_starts, members, starts, limit):  # type: ignore[no-untyped-def]
    """Pairs of groups → int64 (found, 2): j and keys of the first `limit` partners of every row."""
    found = np.empty((1024, 2), np.int64)
    count = 0
    for group in range(len(starts) - 1):
        rows = members[starts[group] : starts[group + 1]]
        earliest = np.full(limit, NOBODY)  # of all rows that match the group, itself included
        for row in rows[: limit if len(rows) > 1 else 0]:
            insert(earliest, row << KEY_BITS, limit)
        for key in partners[partner_starts[group] : partner_starts[group + 1]]:
            other = key >> KEY_BITS
            for row in members[starts[other] : starts[other + 1]]:
                if row > earliest[limit - 1] >> KEY_BITS:
                    break
                insert(earliest, (row << KEY_BITS) | (key & (1 << KEY_BITS) - 1), limit)
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
