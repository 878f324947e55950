"""Replication: how alike are generations to the nearest training picture, to an embedding made for copies.

In: the generations of a prompt and the yardstick with its embeddings. Out: columns of the attack `replication`, and the
figures of Somepalli et al. 2023 over all generations, with those of the training pictures among themselves beside them.
Every number carries model, digest of its weights and preprocessing: the same name stands for other numbers elsewhere.
"""

from typing import Any

import numpy as np
import polars as pl

from dedup import embedding, images
from eval.calibrate import Calibration
from eval.yardstick import Embedded, Yardstick

ENCODERS = ("sscd-distilled", "sscd")
CUT = 0.5  # Somepalli et al. 2023; never below it
CUT_QUANTILE = 0.999  # of what unrelated pictures have
QUANTILES = (0.75, 0.9, 0.95)

REPLICATION: dict[str, pl.DataType | type[pl.DataType]] = {
    "encoder": pl.String,  # model, digest of the weights, side in pixels
    "similarity_cut": pl.Float64,  # 99.9 % quantile of a training picture and its nearest other one, at least .5
    "similarity": pl.List(pl.Float64),  # of each generation to the nearest picture of the reference, cosine
    "mean_similarity": pl.Float64,
    "matches": pl.Int64,  # generations above the cut whose nearest picture is the target
    "matched_files": pl.List(pl.String),  # those
    "wrong_matches": pl.Int64,  # above it, nearest to another picture
    "best_similarity": pl.Float64,  # of the generations to the target
    "best_file": pl.String,
    "pairwise_similarity": pl.Float64,  # mean of the generations among themselves: templates have it high too
    "extracted": pl.Boolean,  # matches > 0
}


class ReplicationError(ValueError):
    """An encoder that was not made to tell copies."""


def embed(pixels: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """uint8 (N, R, R, 3) → float32 (N, d) of length 1, and the full name of what made them.

    Generations and training pictures go in alike, at the resolution of the model, enlarged bilinearly. Raises
    ReplicationError or EncoderError.
    """
    if name not in ENCODERS:
        raise ReplicationError(f"{name!r} was not trained to tell copies: choose {' or '.join(ENCODERS)}")
    encoder = embedding.resolve(name)
    vectors = np.empty((len(pixels), encoder.dimension), np.float32)
    for start in range(0, len(pixels), embedding.BATCH):
        batch = pixels[start : start + embedding.BATCH]
        vectors[start : start + len(batch)] = encoder.encode(np.stack([images.shrink(p, encoder.side) for p in batch]))
    return vectors, f"{name} {encoder.digest[:8]}, {pixels.shape[1]} → {encoder.side} pixels"


def embed_reference(yardstick: Yardstick, name: str) -> Embedded:
    """Every training picture, and how alike the nearest other one is: what replication is measured against.

    The reference has each picture once, or every copy would be its own baseline.
    """
    vectors, described = embed(yardstick.reference_pixels, name)
    products = vectors @ vectors.T
    np.fill_diagonal(products, -1)
    return Embedded(name, described, vectors, products.max(axis=1))


def score_replication(
    images: np.ndarray, place: int, yardstick: Yardstick, calibration: Calibration, n: int
) -> dict[str, Any]:
    """Somepalli et al. 2023, with a cut that unrelated training pictures hardly reach."""
    if yardstick.embedded is None:
        raise ValueError("a yardstick without embeddings: see `embed_reference`")
    known = yardstick.embedded
    cut = max(CUT, float(np.quantile(known.nearest, CUT_QUANTILE)))
    score: dict[str, Any] = dict.fromkeys(REPLICATION) | {"encoder": known.described, "similarity_cut": cut}
    score |= {"similarity": [], "matches": 0, "matched_files": [], "wrong_matches": 0, "extracted": False}
    if not len(images):
        return score
    vectors, _ = embed((images * 255).round().astype(np.uint8), known.encoder)
    target, _ = embed(yardstick.target_pixels[place : place + 1], known.encoder)
    products = vectors @ known.vectors.T  # (G, N)
    to_target = (vectors @ target.T)[:, 0]  # (G,); a control from elsewhere is not in the reference
    to_others = products[:, ~yardstick.own[place]].max(axis=1)
    similarity, matches = products.max(axis=1), (to_target > cut) & (to_target > to_others)
    pairs = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
    return score | {
        "similarity": similarity.tolist(),
        "mean_similarity": float(similarity.mean()),
        "matches": int(matches.sum()),
        "matched_files": np.flatnonzero(matches).tolist(),
        "wrong_matches": int(((to_others > cut) & (to_others >= to_target)).sum()),
        "best_similarity": float(to_target.max()),
        "best_file": int(to_target.argmax()),
        "pairwise_similarity": float(pairs.mean()) if len(pairs) else None,
        "extracted": bool(matches.any()),
    }


def summarise_similarity(similarity: np.ndarray) -> dict[str, float]:
    """The figures of Somepalli et al. 2023: mean, P75, P90, P95, share above .5."""
    figures = {f"p{round(100 * q)}": float(np.quantile(similarity, q)) for q in QUANTILES}
    return {"mean": float(similarity.mean()), **figures, "share_above_0.5": float((similarity > CUT).mean())}
