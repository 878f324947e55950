"""Generations against all pictures, whatever the prompt: which came back, by a distance relative to the neighbourhood.

In: the generations of a prompt (of no prompt, for a model that is asked for anything) and the yardstick. Out: columns
of the attack `adaptive`. A fixed δ calls every bland picture a copy of another bland one; here the neighbours of the
generation say how near is near.
"""

from collections import Counter
from typing import Any

import numpy as np
import polars as pl

from defense.distances import l2, scale
from eval.calibrate import RATIO, Calibration, CalibrationError
from eval.metrics import adaptive_ratio
from eval.yardstick import Yardstick

BATCH = 256  # generations compared at a time

ADAPTIVE: dict[str, pl.DataType | type[pl.DataType]] = {
    "matches": pl.Int64,  # generations for this prompt that give back the target
    "matched_files": pl.List(pl.String),  # those
    "wrong_matches": pl.Int64,  # that give back another picture
    "matches_at_one": pl.Int64,  # both with a cut of 1, that of the literature
    "wrong_at_one": pl.Int64,
    "undefined": pl.Int64,  # whose neighbours are all equal to them: neither memorised nor not
    "neighbours": pl.Int64,  # 50, or fewer ("scaled") where the reference has not so many
    "ratio_cut": pl.Float64,
    "best_ratio": pl.Float64,  # smallest of the generations nearest to the target; null when there are none
    "best_distance": pl.Float64,  # of the nearest generation to the target
    "best_file": pl.String,
    "given_back": pl.List(pl.Int64),  # rows of `reference.load_reference`, one for each generation that is a copy
    "from_any": pl.Int64,  # generations for ANY prompt of the run that give back the target
    "extracted": pl.Boolean,  # from_any > 0
}


def score_adaptive(
    images: np.ndarray, place: int, yardstick: Yardstick, calibration: Calibration, n: int
) -> dict[str, Any]:
    """Carlini et al. 2023, sec. 5.1, with neighbours around the generation and none of the nearest one's component.

    Raises CalibrationError when the reference is too small to have neighbours.
    """
    if calibration.ratio_cut is None:
        raise CalibrationError(f"{calibration.n_reference} pictures are too few for neighbours: attack with clique")
    own = yardstick.own[place]
    reference, components = scale(yardstick.reference_pixels), number_components(yardstick)
    distances = np.empty((len(images), len(reference)), np.float32)
    for first in range(0, len(images), BATCH):
        distances[first : first + BATCH] = l2(images[first : first + BATCH], reference)
    ratio, nearest = np.empty(0), np.empty(0, np.int64)
    if len(images):
        ratio, nearest = adaptive_ratio(distances, components, n=calibration.neighbours)
    with np.errstate(invalid="ignore"):
        copied, lax = ratio <= calibration.ratio_cut, ratio <= RATIO  # False where undefined
    to_target = l2(images, scale(yardstick.target_pixels[place : place + 1]))[:, 0]
    mine = ratio[own[nearest] & ~np.isnan(ratio)]
    return {
        "matches": int((copied & own[nearest]).sum()),
        "matched_files": np.flatnonzero(copied & own[nearest]).tolist(),
        "wrong_matches": int((copied & ~own[nearest]).sum()),
        "matches_at_one": int((lax & own[nearest]).sum()),
        "wrong_at_one": int((lax & ~own[nearest]).sum()),
        "undefined": int(np.isnan(ratio).sum()),
        "neighbours": calibration.neighbours,
        "ratio_cut": calibration.ratio_cut,
        "best_ratio": float(mine.min()) if len(mine) else None,
        "best_distance": float(to_target.min()) if len(images) else None,
        "best_file": int(to_target.argmin()) if len(images) else None,
        "given_back": nearest[copied].tolist(),
        "from_any": 0,  # known once all prompts are scored: `pool`
        "extracted": False,
    }


def number_components(yardstick: Yardstick) -> np.ndarray:
    """int64 (R,): equal for rows of one component; canaries and spares are their own."""
    ids = yardstick.reference["component_id"].to_list()
    return np.array([-1 - row if component is None else component for row, component in enumerate(ids)])


def pool(scores: list[dict[str, Any]], yardstick: Yardstick) -> None:
    """Count for every target what the generations of all prompts gave back; a picture may come without being asked."""
    counts = Counter(row for score in scores for row in score["given_back"])
    given = np.array([counts[row] for row in range(len(yardstick.reference))])
    for score, own in zip(scores, yardstick.own, strict=True):
        score["from_any"] = int(given[own].sum())
        score["extracted"] = score["from_any"] > 0
