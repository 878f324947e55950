"""The encoder without weights: against sums written out, learned the same on any machine, saved and loaded."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from test_dedup_features import photograph, random_features
from threadpoolctl import threadpool_limits

from dedup import features, vocabulary
from dedup.features import SCALE, Features
from dedup.vocabulary import DIMENSION, WORDS, Vocabulary

LENGTH = WORDS * 128
NONE = Features(np.zeros((0, 2), np.float32), np.zeros((0, 128), np.uint8), 1.0)


def make_sample(pictures: int, points: int = 60, seed: int = 0) -> list[Features]:
    rng = np.random.default_rng(seed)
    words = rng.exponential(size=(100, 128)) ** 2
    return [random_features(rng, points, words) for _ in range(pictures)]


@cache
def learn_small() -> Vocabulary:
    return vocabulary.learn(make_sample(60))


@cache
def learn_large() -> tuple[list[Features], Vocabulary]:
    sample = make_sample(2 * DIMENSION, 40)
    return sample, vocabulary.learn(sample)


def aggregate(found: Features, centroids: np.ndarray) -> np.ndarray:
    """VLAD of Jégou et al. 2010, intra-normalised, in float64, one descriptor after the other."""
    sums = np.zeros((len(centroids), 128))
    for row in found.descriptors:
        descriptor = row.astype(float) / SCALE
        word = int(np.argmin([np.sum((descriptor - centre) ** 2) for centre in centroids.astype(float)]))
        sums[word] += descriptor - centroids[word]
    for word in range(len(sums)):
        length = np.sqrt(np.sum(sums[word] ** 2))
        if length > 0:
            sums[word] /= length
    rooted = np.sign(sums) * np.sqrt(np.abs(sums))
    return (rooted / max(np.sqrt(np.sum(rooted**2)), 1e-9)).ravel()


def test_vectors_equal_those_of_sums_written_out() -> None:
    learned = learn_small()
    for found in [*make_sample(5, seed=1), features.extract(photograph(0)), *make_sample(1, 1, seed=2)]:
        vector = learned.encode(found)
        assert vector.shape == (LENGTH,)
        np.testing.assert_allclose(vector, aggregate(found, learned.centroids), atol=2e-5)


def test_no_features_are_no_direction() -> None:
    assert not learn_small().encode(NONE).any()
    assert not learn_large()[1].encode(NONE).any()


def test_copies_lie_closer_than_others() -> None:
    learned = vocabulary.learn([features.extract(photograph(seed)) for seed in range(12)])
    one, other = photograph(0), photograph(50)
    whole, part, unrelated = (learned.encode(features.extract(p)) for p in (one, one[30:, 40:], other))
    assert whole @ part > whole @ unrelated + 0.15


@pytest.mark.parametrize(
    "sample", [[], [NONE], [NONE] * 5, make_sample(1, 20), make_sample(5, 3), [NONE, *make_sample(1, 63)]]
)
def test_fewer_descriptors_than_words(sample: list[Features]) -> None:
    learned = vocabulary.learn(sample)
    assert learned.centroids.shape == (WORDS, 128)
    assert learned.mean.shape == (LENGTH,)
    assert learned.projection is None
    for found in [*sample, *make_sample(2, 30, seed=3)]:
        vector = learned.encode(found)
        assert np.isfinite(vector).all()
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-4) or not vector.any()


@pytest.mark.parametrize(("pictures", "points"), [(5, 60), (1, WORDS), (60, 60)])
def test_a_small_sample(pictures: int, points: int) -> None:
    sample = make_sample(pictures, points)
    learned = vocabulary.learn(sample)
    assert learned.projection is None
    assert np.isfinite(learned.centroids).all()
    assert np.abs(learned.centroids).max() > 0
    np.testing.assert_allclose(learned.mean, np.mean([learned.encode(f) for f in sample], axis=0), atol=1e-5)


def test_the_same_bytes_whatever_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "DIMENSION", 64)  # PCA of few pictures
    sample, digests = make_sample(200, 40), set()
    for threads in (1, 2, 2):
        with threadpool_limits(threads):
            digests.add(vocabulary.save(tmp_path / "vocabulary.npz", vocabulary.learn(sample)))
    assert len(digests) == 1


def test_whitening() -> None:
    """The covariance of the projected sample is diagonal, what the formula says: (d / (d + d_last))²."""
    sample, learned = learn_large()
    assert learned.projection is not None
    assert learned.projection.shape == (LENGTH, DIMENSION)
    centroids = learned.centroids
    vectors = np.stack([aggregate_fast(found, centroids) for found in sample]).astype(np.float64)
    centred = vectors - vectors.mean(axis=0)
    np.testing.assert_allclose(learned.mean, vectors.mean(axis=0), atol=1e-5)
    deviations = np.sqrt(np.linalg.eigvalsh(centred @ centred.T)[::-1][:DIMENSION])
    projected = centred @ learned.projection.astype(np.float64)
    covariance = projected.T @ projected
    expected = (deviations / (deviations + deviations[-1])) ** 2
    np.testing.assert_allclose(np.diag(covariance), expected, rtol=0.01)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 0.01
    encoded = np.stack([learned.encode(found) for found in sample[:20]])
    assert encoded.shape == (20, DIMENSION)
    truth = projected[:20] / np.linalg.norm(projected[:20], axis=1, keepdims=True)
    np.testing.assert_allclose(encoded, truth, atol=1e-3)


def aggregate_fast(found: Features, centroids: np.ndarray) -> np.ndarray:
    """What `encode` does when nothing is projected, which a test above compares with the sums written out."""
    return Vocabulary(centroids, np.zeros(LENGTH, np.float32), None).encode(found)


def test_one_picture_fewer_is_not_projected() -> None:
    sample, _ = learn_large()
    assert vocabulary.learn(sample[: 2 * DIMENSION - 1]).projection is None


@pytest.mark.parametrize("large", [False, True])
def test_what_is_saved_is_loaded(tmp_path: Path, large: bool) -> None:
    learned = learn_large()[1] if large else learn_small()
    path = tmp_path / "vocabulary.npz"
    digest = vocabulary.save(path, learned)
    loaded = vocabulary.load(path, digest)
    np.testing.assert_array_equal(loaded.centroids, learned.centroids)
    np.testing.assert_array_equal(loaded.mean, learned.mean)
    assert (loaded.projection is None) == (learned.projection is None)
    found = make_sample(1, seed=7)[0]
    np.testing.assert_array_equal(loaded.encode(found), learned.encode(found))
    assert vocabulary.save(tmp_path / "again.npz", learned) == digest


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.npz"
    digest = vocabulary.save(path, learn_small())
    with pytest.raises(ValueError, match=r"is not the vocabulary .*: remove it"):
        vocabulary.load(path, "0" * 64)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not the vocabulary"):
        vocabulary.load(path, digest)
