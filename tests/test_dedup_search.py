"""The Hamming join against brute force, whole and in blocks."""

import math
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dedup import bands, blocks, engine, groups, hamming, search


def planted_codes(n: int, seed: int) -> np.ndarray:
    """Random codes; some rows hold another row's upright code, a few bits away, in a random orientation."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (n, 8, 32), dtype=np.uint8)
    for row in range(n // 2, n, 3):
        bits = np.unpackbits(codes[rng.integers(n // 2), 0])
        bits[rng.choice(256, rng.integers(0, 45), replace=False)] ^= 1
        codes[row, rng.integers(8)] = np.packbits(bits)
    return codes


@pytest.mark.parametrize(("seed", "jobs"), [(0, 1), (1, 2), (2, 3)])
def test_bands_find_what_brute_force_finds(seed: int, jobs: int) -> None:
    words = planted_codes(1_200, seed).view(np.uint64)
    for limit in (search.LIMIT, 2):
        exact = hamming.join_brute_force(words, search.RADIUS, limit)
        assert len(exact) > 100
        assert np.array_equal(bands.join_bands(words, search.RADIUS, limit, jobs), exact)


def near_codes(n: int, seed: int) -> np.ndarray:
    """One code with up to four bits flipped: most pairs are within the radius, many codes are equal."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(rng.integers(0, 256, (1, 8, 32), dtype=np.uint8), n, axis=0)
    bits = np.unpackbits(codes, axis=2)
    for _ in range(4):
        bits[np.arange(n), :, rng.integers(0, 12, n)] ^= 1
    return np.packbits(bits, axis=2)


@pytest.mark.parametrize("limit", [1, 5, 64])
def test_a_crowd_keeps_its_earliest_partners(limit: int) -> None:
    """Nearly everything matches: the work stays bounded and the first rows are the partners that are kept."""
    words = near_codes(700, seed=3).view(np.uint64)
    found = bands.join_bands(words, search.RADIUS, limit, 1)
    j, key = found.T
    for row in range(len(words)):
        assert (key[j == row] >> hamming.KEY_BITS).tolist() == list(range(min(row, limit)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_upright_pairs_with_repeated_codes_are_all_found(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    codes = planted_codes(max(2, n // 3), seed)[rng.integers(0, max(2, n // 3), n)]
    j, key = bands.join_bands(codes.view(np.uint64), search.RADIUS, search.LIMIT, 1).T
    found = zip(key >> hamming.KEY_BITS, j, key & 7, strict=True)
    upright = np.bitwise_count(codes[:, None, 0] ^ codes[None, :, 0]).sum(axis=2)
    expected = {(i, j) for i, j in zip(*np.nonzero(upright <= search.RADIUS), strict=True) if i < j}
    assert {(i, j) for i, j, orientation in found if orientation == 0} == expected


@pytest.mark.parametrize("groups", [10, 500_000, 5_000_000, 10**9])
def test_the_bands_prove_exactness(groups: int) -> None:
    layout = bands.choose_bands(groups, search.RADIUS)
    assert sum(width for _, width, _ in layout) == hamming.BITS
    assert sum(flips + 1 for *_, flips in layout) == search.RADIUS + 1
    for _, width, flips in layout:
        assert len(set(bands._flip_masks(width, flips))) == sum(math.comb(width, f) for f in range(flips + 1))


def test_a_pair_that_matches_upright_and_mirrored_is_upright() -> None:
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 256, (4_100, 8, 32), dtype=np.uint8)
    codes[4_000] = codes[3, 0]  # every orientation of the later one matches, the upright one least well
    codes[4_000, 0, :3] ^= 0xFF
    for found in (search.join_hamming(codes), search.join_hamming(codes[[3, 4_000]])):
        assert found["orientation"].to_list() == [0]
        assert found["hamming"].to_list() == [24]


def write_codes(folder: Path, codes: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    np.save(folder / "codes.npy", codes.view(np.uint64))
    return folder


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000), st.integers(2, 90), st.integers(1, 40), st.integers(1, 40), st.integers(1, 70))
def test_no_cut_decides_anything(tmp_path: Path, seed: int, n: int, block: int, piece: int, limit: int) -> None:
    """Crowds and near codes, block against block: what one block finds, and, where no codes are equal, brute force."""
    rng = np.random.default_rng(seed)
    codes = np.concatenate([planted_codes(n, seed), near_codes(n // 2, seed)])
    codes = codes[rng.integers(0, len(codes), n) if seed % 2 else rng.permutation(len(codes))]
    words = codes.view(np.uint64)
    group, _ = groups.collapse(words)
    with engine.Workers(1) as workers, mock.patch.object(blocks, "cut", cut_into(block, piece)):
        found = blocks.join_blocks(write_codes(tmp_path, codes), search.RADIUS, limit, workers, 0)
    assert np.array_equal(found, bands.join_bands(words, search.RADIUS, limit, 1))
    if group.max() + 1 == len(words):
        assert np.array_equal(found, hamming.join_brute_force(words, search.RADIUS, limit))


def cut_into(block: int, piece: int) -> Callable[[int, int, int], tuple[list, list]]:
    def cut(n: int, jobs: int, memory: int) -> tuple[list, list]:
        return tuple([(s, min(s + size, n)) for s in range(0, n, size)] for size in (block, piece))  # type: ignore

    return cut


@pytest.mark.parametrize("memory", [10_000_000, 100_000_000, 10**12])
def test_the_cut_covers_all_and_keeps_to_the_budget(memory: int) -> None:
    for n in (1, 500_000, 10_000_000):
        for jobs in (1, 2, 64):
            of_blocks, of_pieces = blocks.cut(n, jobs, memory)
            for parts, cost in ((of_blocks, blocks.EARLIER), (of_pieces, blocks.LATER)):
                assert [0, *(end for _, end in parts)] == [*(start for start, _ in parts), n]
                most = max(end - start for start, end in parts)
                assert most <= blocks.FEWEST or most * cost * jobs <= memory / 2


def test_many_codes_are_joined_by_workers_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = planted_codes(4_000, 5)
    monkeypatch.setattr(blocks, "FEWEST", 700)
    expected = search.join_hamming(codes)
    with engine.Workers(2) as workers:
        found = search.join_stored(write_codes(tmp_path, codes), workers, 100_000)
    assert len(expected) > 500
    assert found.equals(expected)
    assert list(tmp_path.iterdir()) == []


def test_equal_digests_of_other_codes_are_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    words = planted_codes(300, 6)[np.arange(600) % 300].view(np.uint64)
    monkeypatch.setattr(groups, "_digest", lambda words: words[:, 0, 0] % 7)
    group, first = groups.collapse(words)
    assert all(np.array_equal(words[row], words[first[number]]) for row, number in enumerate(group))
    assert np.array_equal(first, np.sort(first))
    found = [bands.join_bands(words, search.RADIUS, 600, 1)]
    monkeypatch.undo()
    found.append(bands.join_bands(words, search.RADIUS, 600, 1))
    one, other = (pairs[pairs[:, 1] & 7 == 0] for pairs in found)  # upright; see the test above of repeated codes
    assert np.array_equal(one, other)
