"""The Hamming join against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import search


def planted_codes(n: int, seed: int) -> np.ndarray:
    """Random codes; some rows hold another row's upright code, a few bits away, in a random orientation."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (n, 8, 32), dtype=np.uint8)
    for row in range(n // 2, n, 3):
        bits = np.unpackbits(codes[rng.integers(n // 2), 0])
        bits[rng.choice(256, rng.integers(0, 45), replace=False)] ^= 1
        codes[row, rng.integers(8)] = np.packbits(bits)
    return codes


@pytest.mark.parametrize("seed", range(3))
def test_bands_find_what_brute_force_finds(seed: int) -> None:
    _, words = search._collapse(planted_codes(1_200, seed))
    exact = search._closest(search._brute_force(words, search.RADIUS))
    assert len(exact) > 100
    assert search._closest(search._band_join(words, search.RADIUS, jobs=2)).equals(exact)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_upright_pairs_with_repeated_codes_are_all_found(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    codes = planted_codes(max(2, n // 3), seed)[rng.integers(0, max(2, n // 3), n)]
    found = search.join_hamming(codes)
    upright = np.bitwise_count(codes[:, None, 0] ^ codes[None, :, 0]).sum(axis=2)
    expected = {(i, j) for i, j in zip(*np.nonzero(upright <= search.RADIUS), strict=True) if i < j}
    assert {(i, j) for i, j, o, _ in found.iter_rows() if o == 0} == expected


@pytest.mark.parametrize("groups", [10, 500_000, 5_000_000])
def test_the_bands_prove_exactness(groups: int) -> None:
    bands = search.choose_bands(groups, search.RADIUS)
    assert sum(width for _, width, _ in bands) == search.BITS
    assert sum(flips + 1 for *_, flips in bands) == search.RADIUS + 1
