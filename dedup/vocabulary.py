"""Local features → one vector a picture: the encoder `local`, which needs no weights.

VLAD (Jégou et al. 2010): every descriptor is assigned to the nearest of WORDS centroids, and what it differs by is
summed up per word; each word and the whole are normalised (Arandjelović & Zisserman 2013), then whitened by PCA (Jégou
& Chum 2012). Centroids and projection are learned from the dataset at hand, on a fixed sample.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from dedup import hashing
from dedup.features import POINTS, SCALE, SIDE, Features
from dedup.manifest import write_atomic

WORDS = 64
DIMENSION = 512  # after PCA; fewer pictures than twice as many stay as they are, of 8,192 dimensions
SAMPLE = 2_048  # pictures that PCA is learned from
DESCRIPTORS = 40_000  # that centroids are learned from
ITERATIONS = 15
DESCRIPTION = f"{POINTS} RootSIFT features at {SIDE} pixels, VLAD of {WORDS} words"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What turns features into vectors; `projection` is None for small datasets."""

    centroids: np.ndarray  # float32 (WORDS, 128)
    mean: np.ndarray  # float32 (WORDS × 128,)
    projection: np.ndarray | None  # float32 (WORDS × 128, DIMENSION)

    def encode(self, features: Features) -> np.ndarray:
        """float32 (d,), of length 1, or all zero for a picture without features."""
        vector = _aggregate(features, self.centroids)
        if self.projection is not None:
            vector = (vector - self.mean * vector.any()) @ self.projection  # zeros stay zeros
        return vector / max(float(np.linalg.norm(vector)), 1e-9)


def learn(sample: list[Features]) -> Vocabulary:
    """Of at most SAMPLE pictures. The result depends on their order; not on the number of threads."""
    import faiss
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # sums that are split otherwise round otherwise
        descriptors = np.concatenate([np.zeros((0, 128), np.float32), *map(_scale, sample)])
        chosen = np.random.default_rng(0).permutation(len(descriptors))[:DESCRIPTORS]
        if len(chosen) < WORDS:
            centroids = np.resize(descriptors, (WORDS, 128)) if len(chosen) else np.zeros((WORDS, 128), np.float32)
            return Vocabulary(centroids, np.zeros(WORDS * 128, np.float32), None)
        means = faiss.Kmeans(
            128,
            WORDS,
            niter=ITERATIONS,
            seed=0,
            min_points_per_centroid=1,
            max_points_per_centroid=DESCRIPTORS // WORDS,
        )
        means.train(descriptors[np.sort(chosen)])
        centroids = np.array(means.centroids)
        vectors = np.stack([_aggregate(features, centroids) for features in sample])
        mean = vectors.mean(axis=0)
        projection = _whiten(vectors - mean) if len(sample) >= 2 * DIMENSION else None
        return Vocabulary(centroids, mean, projection)


def _whiten(vectors: np.ndarray) -> np.ndarray:
    """Principal directions over their standard deviations, from the smaller Gram matrix: float32 (d, DIMENSION)."""
    values, left = np.linalg.eigh(vectors @ vectors.T)
    values, left = values[: -DIMENSION - 1 : -1], left[:, : -DIMENSION - 1 : -1]
    deviations = np.sqrt(np.maximum(values, 1e-6))
    return (vectors.T @ left) / deviations / (deviations + deviations[-1])  # the last ones are mostly noise


def _scale(features: Features) -> np.ndarray:
    return features.descriptors.astype(np.float32) / SCALE


def _aggregate(features: Features, centroids: np.ndarray) -> np.ndarray:
    """float32 (WORDS × 128,): signed square roots of the residuals, word by word of length 1."""
    descriptors = _scale(features)
    word = (descriptors @ centroids.T - (centroids**2).sum(axis=1) / 2).argmax(axis=1)
    sums = np.zeros(centroids.shape, np.float32)
    np.add.at(sums, word, descriptors - centroids[word])
    sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
    rooted = np.sign(sums) * np.sqrt(np.abs(sums))
    return (rooted / max(float(np.linalg.norm(rooted)), 1e-9)).ravel()


def save(path: Path, learned: Vocabulary) -> str:
    """Write .npz; returns its SHA-256."""

    def write(temporary: Path) -> None:
        projection = np.zeros(0, np.float32) if learned.projection is None else learned.projection
        with temporary.open("wb") as handle:  # np.savez would append .npz to the temporary name
            np.savez(handle, centroids=learned.centroids, mean=learned.mean, projection=projection)

    write_atomic(path, write)
    return hashing.digest(path.read_bytes())


@lru_cache(maxsize=1)
def load(path: Path, digest: str) -> Vocabulary:
    """What `save` has written, kept in memory. Raises ValueError when the file is another one."""
    if hashing.digest(path.read_bytes()) != digest:
        raise ValueError(f"{path} is not the vocabulary that the embeddings were made with: remove it and run again")
    with np.load(path, allow_pickle=False) as arrays:
        return Vocabulary(
            arrays["centroids"], arrays["mean"], arrays["projection"] if arrays["projection"].size else None
        )
