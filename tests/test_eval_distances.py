"""eval.distances against brute force, and what the attack relies on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from defense import distances
from defense.distances import flip, flip_min, l2, scale
from eval.distances import max_tile_l2, near_any


def random_images(n: int, side: int = 32, seed: int = 0) -> np.ndarray:
    return scale(np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8))


def brute_l2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([[np.sqrt(np.mean((x.astype(float) - y) ** 2)) for y in b] for x in a])


@pytest.mark.parametrize("chunk", [1, 20_000, 2**25])
def test_l2_is_the_root_mean_square_whatever_the_chunks(monkeypatch, chunk):
    monkeypatch.setattr(distances, "CHUNK", chunk)
    a, b = random_images(7), random_images(5, seed=1)
    found = l2(a, b)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, brute_l2(a, b), atol=1e-7)


def test_l2_spans_the_unit_interval_and_sees_small_differences():
    black, white = np.zeros((1, 8, 8, 3), np.float32), np.ones((1, 8, 8, 3), np.float32)
    assert l2(black, white) == 1
    image = random_images(1)
    assert l2(image, image) < 1e-7
    assert l2(image, (image + 1e-4).astype(np.float64)) == pytest.approx(1e-4, rel=1e-3)


def test_empty_sets_have_no_distances():
    assert l2(random_images(0), random_images(3)).shape == (0, 3)
    assert l2(random_images(3), random_images(0)).shape == (3, 0)


def test_integers_and_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        l2(np.zeros((1, 8, 8, 3), np.uint8), random_images(1, 8))
    with pytest.raises(ValueError, match="cannot be compared"):
        l2(random_images(1, 8), random_images(1, 16))
    with pytest.raises(ValueError, match="do not fit"):
        max_tile_l2(random_images(2, 3))


@given(seed=st.integers(0, 10**6), side=st.integers(4, 19), grid=st.integers(1, 4))
def test_tile_distance_is_at_least_the_global_one(seed, side, grid):
    images = random_images(4, side, seed)
    assert (max_tile_l2(images, grid) >= l2(images, images) - 1e-6).all()


@given(error=st.floats(0.01, 0.4), seed=st.integers(0, 10**6))
def test_tile_distance_equals_the_global_one_for_uniform_error(error, seed):
    image = random_images(1, 16, seed)[0] / 2
    pair = np.stack([image, image + np.float32(error)])
    assert max_tile_l2(pair)[0, 1] == pytest.approx(error, abs=1e-6)
    assert l2(pair, pair)[0, 1] == pytest.approx(error, abs=1e-6)


def test_tile_distance_finds_the_one_tile_that_differs():
    pair = np.zeros((2, 32, 32, 3), np.float32)
    pair[1, 8:16, 24:32] = 0.5
    assert max_tile_l2(pair)[0, 1] == pytest.approx(0.5)
    assert l2(pair, pair)[0, 1] == pytest.approx(0.5 / 4)


def test_tile_distance_equals_brute_force_on_uneven_tiles():
    a = random_images(3, 10)
    edges = [0, 2, 5, 8, 10]
    expected = np.zeros((3, 3))
    for i in range(4):
        for j in range(4):
            tile = a[:, edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
            expected = np.maximum(expected, brute_l2(tile, tile))
    np.testing.assert_allclose(max_tile_l2(a), expected, atol=1e-7)


def test_mirror_images_are_met_by_flip_min_alone():
    a = random_images(2)
    assert (np.diag(l2(a, flip(a))) > 0.3).all()
    assert (np.diag(flip_min(a, flip(a))) < 1e-7).all()
    assert (flip_min(a, a) <= l2(a, a)).all()


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_near_any_is_l2_whatever_the_batch(batch):
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    images = scale(pixels[:10]) + rng.normal(0, 0.01, (10, 8, 8, 3)).astype(np.float32)
    chosen = np.arange(20) % 2 == 0
    expected = (l2(images, scale(pixels[chosen])) <= 0.1).any(axis=1)
    np.testing.assert_array_equal(near_any(images, pixels, chosen, 0.1, batch), expected)
    assert expected.sum() == 5
    assert not near_any(images, pixels, np.zeros(20, bool), 0.1).any()


@pytest.mark.parametrize(("squares", "distance"), [(2.5e3, 0.113), (3e3, 0.124)])
def test_thresholds_of_webster_on_our_scale(squares, distance):
    """Sums of squares over 256 × 256 × 3 numbers (Webster 2023: verbatim, retrieved verbatim)."""
    a = np.zeros((1, 256, 256, 3), np.float32)
    b = a + np.float32(np.sqrt(squares / a.size))
    assert np.square(b - a).sum() == pytest.approx(squares, rel=1e-4)
    assert l2(a, b).item() == pytest.approx(distance, abs=5e-4)
