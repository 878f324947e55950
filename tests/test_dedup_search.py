"""The Hamming join against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import bands, hamming, search


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


@pytest.mark.parametrize("groups", [10, 500_000, 5_000_000])
def test_the_bands_prove_exactness(groups: int) -> None:
    layout = bands.choose_bands(groups, search.RADIUS)
    assert sum(width for _, width, _ in layout) == hamming.BITS
    assert sum(flips + 1 for *_, flips in layout) == search.RADIUS + 1


def test_a_pair_that_matches_upright_and_mirrored_is_upright() -> None:
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 256, (1_600, 8, 32), dtype=np.uint8)
    codes[1_500] = codes[3, 0]  # every orientation of the later one matches, the upright one least well
    codes[1_500, 0, :3] ^= 0xFF
    for found in (search.join_hamming(codes), search.join_hamming(codes[[3, 1_500]])):
        assert found["orientation"].to_list() == [0]
        assert found["hamming"].to_list() == [24]
