"""Local features: mirrored without a second extraction, written to disk and read again, and of odd pictures."""

from functools import cache

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import features
from dedup.features import POINTS, SIDE, Features


@cache
def photograph(seed: int, width: int = 320, height: int = 240) -> np.ndarray:
    """Dead leaves, unevenly lit, with a sensor's noise: uint8 (height, width, 3). As a photograph, nothing is flat."""
    rng = np.random.default_rng(seed)
    picture = np.full((height, width, 3), rng.uniform(40, 215, 3), np.float32)
    for _ in range(220):
        centre = int(rng.uniform(0, width)), int(rng.uniform(0, height))
        radius = min(6 * (1 - rng.random()) ** -0.6, 60)
        axes = int(radius), int(max(3, radius * rng.uniform(0.4, 1)))
        colour = tuple(rng.uniform(10, 245, 3))
        cv2.ellipse(picture, centre, axes, rng.uniform(0, 180), 0, 360, colour, -1)
    for cells in (3, 6, 12, 24, 48):
        light = rng.normal(size=(cells, cells, 3)).astype(np.float32) * 40 / cells**0.5
        picture += cv2.resize(light, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels = (picture + rng.normal(0, 3, picture.shape)).clip(0, 255).astype(np.uint8)
    pixels.flags.writeable = False
    return pixels


def random_features(rng: np.random.Generator, count: int, words: np.ndarray | None = None) -> Features:
    """Of a picture that there is not. words: float (w, 128), what its descriptors scatter around."""
    raw = rng.exponential(size=(count, 128))
    if words is not None:
        raw = words[rng.integers(len(words), size=count)] * np.exp(rng.normal(0, 0.3, (count, 128)))
    root = np.sqrt(raw / raw.sum(axis=1, keepdims=True))
    points = rng.random((count, 2)).astype(np.float32)
    return Features(points, np.rint(root * features.SCALE).astype(np.uint8), float(np.float32(rng.uniform(0.3, 1))))


def share_found(some: Features, others: Features) -> float:
    """Share of `some` that one of the others is like, within two pixels."""
    apart = np.linalg.norm(some.points[:, None] - others.points[None], axis=2)
    a, b = (x.descriptors / np.linalg.norm(x.descriptors, axis=1, keepdims=True) for x in (some, others))
    return float(((apart < 2 / SIDE) & (a @ b.T > 0.95)).any(axis=1).mean())


@pytest.mark.parametrize(("width", "height"), [(320, 240), (192, 192), (150, 260)])
def test_mirrored_features_are_those_of_the_mirrored_picture(width: int, height: int) -> None:
    shares = []
    for seed in range(4):
        pixels = photograph(seed, width, height)
        turned, truth = features.mirror(features.extract(pixels)), features.extract(pixels[:, ::-1])
        assert turned.width == truth.width
        shares.append(share_found(turned, truth))
    assert np.mean(shares) >= 0.85
    assert min(shares) >= 0.8


def test_a_mirrored_descriptor_is_no_other_one() -> None:
    """Without the order of its bins it would not be found: the test above can fail."""
    pixels = photograph(0)
    turned, truth = features.mirror(features.extract(pixels)), features.extract(pixels[:, ::-1])
    unturned = Features(turned.points, features.extract(pixels).descriptors, turned.width)
    assert share_found(unturned, truth) < 0.1


@given(seed=st.integers(0, 2**32 - 1), count=st.sampled_from([0, 1, 2, POINTS - 1, POINTS]) | st.integers(0, POINTS))
@settings(max_examples=40, deadline=None)
def test_what_is_packed_is_unpacked(seed: int, count: int) -> None:
    before = random_features(np.random.default_rng(seed), count)
    after = features.unpack(features.pack(before))
    np.testing.assert_array_equal(after.points, before.points)
    np.testing.assert_array_equal(after.descriptors, before.descriptors)
    assert after.width == before.width
    assert after.points.dtype == np.float32
    assert after.descriptors.dtype == np.uint8
    twice = features.mirror(features.mirror(before))
    np.testing.assert_array_equal(twice.descriptors, before.descriptors)
    np.testing.assert_allclose(twice.points, before.points, atol=1e-6)


def test_records_stand_alone() -> None:
    """A row of a file of records does not depend on the others, and no count is cut off."""
    rng = np.random.default_rng(0)
    many = [random_features(rng, count) for count in (POINTS, 0, 3)]
    records = np.zeros(3, features.RECORD)
    for number, each in enumerate(many):
        records[number] = features.pack(each)
    for number, each in enumerate(many):
        np.testing.assert_array_equal(features.unpack(records[number]).descriptors, each.descriptors)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_flat_picture_has_none(value: int) -> None:
    found = features.extract(np.full((200, 300, 3), value, np.uint8))
    assert found.points.shape == (0, 2)
    assert found.descriptors.shape == (0, 128)
    assert found.width == 1
    assert features.mirror(found).points.shape == (0, 2)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(1, 1, 1), (3, 500, 1), (500, 3, 1 / SIDE), (1, 2, 1), (31, 40, 1), (400, 200, 0.5), (200, 400, 1)],
)
def test_any_shape(height: int, width: int, expected: float) -> None:
    rng = np.random.default_rng(height)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = features.extract(pixels)
    assert found.width == pytest.approx(expected, abs=1e-6)
    assert len(found.points) == len(found.descriptors) <= POINTS
    if len(found.points):
        assert found.points.min() >= 0
        assert found.points[:, 0].max() <= found.width + 1 / SIDE
        assert found.points[:, 1].max() <= round(height * SIDE / max(height, width)) / SIDE + 1 / SIDE


def test_never_more_than_there_is_room_for_and_the_same_again() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (192, 192, 3), dtype=np.uint8)
    board = np.kron(np.indices((12, 12)).sum(axis=0) % 2, np.ones((16, 16))).astype(np.uint8)[..., None] * 255
    for pixels in (noise, np.repeat(board, 3, axis=2), photograph(1)):
        found = features.extract(pixels)
        assert 50 < len(found.points) <= POINTS
        np.testing.assert_array_equal(features.extract(pixels).descriptors, found.descriptors)
        norms = np.linalg.norm(found.descriptors.astype(float) / features.SCALE, axis=1)
        assert np.abs(norms - 1).max() < 0.03


def test_colour_says_nothing() -> None:
    pixels = photograph(2)
    grey = np.repeat(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    np.testing.assert_array_equal(features.extract(grey).descriptors, features.extract(pixels).descriptors)


def test_positions_do_not_depend_on_the_size() -> None:
    pixels = photograph(2, 384, 288)
    large = cv2.resize(pixels, (768, 576), interpolation=cv2.INTER_LINEAR)
    assert share_found(features.extract(pixels), features.extract(large)) > 0.8
