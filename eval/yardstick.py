"""All that a generation is measured against: targets, the reference, and how far the next other picture is.

In: a dedup run OUT. Out: tables and their pixels; equal for all models of one OUT. Knows nothing of models.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl

from eval.reference import group_copies, list_left_out, load_pixels, load_reference, nearest_other
from eval.targets import load_targets

PART = 1_000  # pictures in memory at a time, where only distances are kept


@dataclass(frozen=True, slots=True)
class Embedded:
    """The reference as an encoder sees it."""

    encoder: str
    described: str  # encoder, digest of its weights, preprocessing
    vectors: np.ndarray  # float32 (reference, d), of length 1
    nearest: np.ndarray  # float32 (reference,): cosine of each picture to the nearest other one


@dataclass(frozen=True, slots=True)
class Yardstick:
    """Targets and reference with their pixels, uint8 (N, R, R, 3), in the order of the tables."""

    targets: pl.DataFrame
    target_pixels: np.ndarray
    reference: pl.DataFrame
    reference_pixels: np.ndarray
    own: np.ndarray  # bool (targets, reference): shows the picture of the target, or belongs to its component
    others: np.ndarray  # float32 (targets,): distance to the nearest picture of the original data that is another
    masks: np.ndarray | None = None  # bool (targets, R, R): the template of each, for the attack that needs them
    partners: np.ndarray | None = None  # int64 (targets,): pictures that the mask was made of
    embedded: Embedded | None = None  # the reference, for the attack that compares embeddings

    def select(self, names: Iterable[str]) -> Self:
        """The same for some of the targets, in the order of their target_ids."""
        place = {name: number for number, name in enumerate(self.targets["target_id"])}
        chosen = [place[name] for name in names]
        return replace(
            self,
            targets=self.targets[chosen],
            target_pixels=self.target_pixels[chosen],
            own=self.own[chosen],
            others=self.others[chosen],
        )


def load_yardstick(
    out: Path,
    resolution: int,
    *,
    limit: int | None = 200,
    held_out: float = 0.0,
    only: pl.Series | None = None,
    controls: Path | None = None,
) -> Yardstick:
    """Everything a generation is measured against. only: target_ids; they may lie beyond `limit`.

    Other parameters as in `load_targets`.
    """
    targets = load_targets(out, limit=limit if only is None else None, held_out=held_out, controls=controls)
    if only is not None:
        targets = targets.filter(pl.col("target_id").is_in(only.to_list()))
    reference = load_reference(out)
    canary, component = _find_own(targets, reference)
    pixels, reference_pixels = load_pixels(out, targets, resolution), load_pixels(out, reference, resolution)
    return Yardstick(
        targets,
        pixels,
        reference,
        reference_pixels,
        own=canary | component,
        others=_measure_others(out, targets, pixels, reference, reference_pixels, canary),
    )


def _find_own(targets: pl.DataFrame, reference: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """bool (targets, reference), twice: the canary itself, and what is of the same component."""
    same_key = targets["key"].to_numpy()[:, None] == reference["key"].to_numpy()
    planted = (targets["component_id"].is_null() & targets["root"].is_null()).to_numpy()[:, None]
    canary = planted & (reference["kind"] == "canary").to_numpy()
    components = targets["component_id"].fill_null(-1).to_numpy()[:, None]
    return same_key & canary, components == reference["component_id"].fill_null(-2).to_numpy()


def _measure_others(
    out: Path,
    targets: pl.DataFrame,
    pixels: np.ndarray,
    reference: pl.DataFrame,
    reference_pixels: np.ndarray,
    canary: np.ndarray,
) -> np.ndarray:
    """Of each target: distance to the nearest picture that is no copy of it, whether it stands in the reference or not.

    A component may be a series, such as one drawing in many colours: the reference has one picture of it, a model was
    trained on all, and what it gives back may be any of them.
    """
    copies = np.append(group_copies(out), -2)  # by cluster_id; the last: of a picture that is no row

    def find_copies(rows: pl.DataFrame) -> np.ndarray:
        return copies[rows["cluster_id"].fill_null(-1).to_numpy()]

    no_row = targets["component_id"].is_null().to_numpy()  # canaries, and pictures from elsewhere
    mine = np.where(no_row, -1, find_copies(targets))[:, None]
    nearest = nearest_other(pixels, reference_pixels, canary | (mine == find_copies(reference)))
    for part in list_left_out(out, reference).iter_slices(PART):
        found = nearest_other(pixels, load_pixels(out, part, pixels.shape[1]), mine == find_copies(part))
        nearest = np.minimum(nearest, found)
    return nearest
