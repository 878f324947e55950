"""Templates: what is equal in all pictures of a cluster while something in them differs, and whether it came back.

In: a dedup run OUT and the targets. Out: one mask a target, and columns of the attack `template`. A print on many
mugs, a frame around many faces: no generation equals a training picture, yet all of it that repeats is memorised.
"""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy import ndimage

from dedup import manifest
from defense.distances import flip, l2, scale
from eval.calibrate import DELTA, Calibration
from eval.reference import load_pixels, read_plant
from eval.yardstick import Yardstick

# Webster 2023 (make masks of neighbours at 256 pixels): SSE above 100, colours within 0.03 over the channels, an
# erosion by 3 and a dilation by 6 pixels.
DIFFERENT = 0.0226  # normalised ℓ2 of two pictures that differ somewhere
EQUAL = 0.03
ERODE, DILATE, SIDE = 3, 6, 256
SHARES = (0.1, 0.95)  # of the picture; more is a copy, less a corner. Ours.
PARTNERS = 64  # pictures of a cluster that are looked at

TEMPLATE: dict[str, pl.DataType | type[pl.DataType]] = {
    "template_rows": pl.Int64,  # pictures of the target's component that differ from it somewhere
    "mask_share": pl.Float64,  # of the pixels; null without a template
    "delta_template": pl.Float64,  # half the masked distance to the nearest unrelated picture, at most 0.15
    "matches": pl.Int64,  # generations within it; null without a template
    "matched_files": pl.List(pl.String),  # those
    "verbatim": pl.Int64,  # of these, generations whose rest is within 0.15 of the target's rest
    "best_distance": pl.Float64,  # smallest masked distance
    "best_file": pl.String,
    "extracted": pl.Boolean,  # matches > 0
}


def build_masks(out: Path, targets: pl.DataFrame, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Targets and their pixels uint8 (T, R, R, 3) → bool (T, R, R), all False without a template, and partners (T,)."""
    rows = manifest.read(out).filter(pl.col("status") == "ok")
    components = rows.select("component_id", "key")
    plant = read_plant(out)
    copies = {} if plant is None else dict(plant.drop_nulls("key").group_by("canary").agg("key").iter_rows())
    masks = np.zeros(pixels.shape[:3], bool)
    partners = np.zeros(len(targets), np.int64)
    for place, target in enumerate(targets.iter_rows(named=True)):
        keys = copies.get(target["target_id"], [])
        ids = components.filter(pl.col("key").is_in(keys))["component_id"] if keys else [target["component_id"]]
        family = rows.filter(pl.col("component_id").is_in(list(ids)) & pl.col("component_id").is_not_null())
        if len(family) < 2:
            continue
        members = load_pixels(
            out, family.unique("sha256", keep="first", maintain_order=True).head(PARTNERS), len(masks[0])
        )
        masks[place], partners[place] = build_mask(scale(pixels[place]), scale(members))
    return masks, partners


def build_mask(picture: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, int]:
    """Float (R, R, 3) and (M, R, R, 3) → bool (R, R): where most members that differ somewhere equal the picture."""
    different = members[l2(members, picture[None])[:, 0] > DIFFERENT]
    if not len(different):
        return np.zeros(picture.shape[:2], bool), 0
    equal = np.abs(different - picture).sum(axis=-1) < EQUAL  # (M, R, R)
    mask = equal.mean(axis=0) > 0.5
    erode, dilate = (max(1, round(width * len(picture) / SIDE)) for width in (ERODE, DILATE))
    mask = ndimage.binary_dilation(
        ndimage.binary_erosion(mask, np.ones((erode, erode)), border_value=1), np.ones((dilate, dilate))
    )
    return (mask if SHARES[0] <= mask.mean() <= SHARES[1] else np.zeros_like(mask)), len(different)


def masked_l2(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Float (N, R, R, C), (M, R, R, C), bool (R, R) → (N, M): normalised ℓ2 over the pixels of the mask.

    Webster's SSE over the mask divided by the mean of the mask, on the scale of `l2`.
    """
    return l2(a[:, mask][:, None], b[:, mask][:, None])


def score_template(
    images: np.ndarray, place: int, yardstick: Yardstick, calibration: Calibration, n: int
) -> dict[str, Any]:
    """Template verbatim of Webster 2023, with a δ for each template, from pictures alone.

    By the triangle inequality a generation within δ is nearer to the template than any unrelated picture is: a blank
    background makes δ as good as 0, and no match.
    """
    if yardstick.masks is None or yardstick.partners is None:
        raise ValueError("a yardstick without masks: see `build_masks`")
    mask = yardstick.masks[place]
    score: dict[str, Any] = dict.fromkeys(TEMPLATE) | {"template_rows": int(yardstick.partners[place])}
    score["extracted"] = False
    if not mask.any():
        return score
    target = scale(yardstick.target_pixels[place : place + 1])
    others = scale(yardstick.reference_pixels[~yardstick.own[place]])
    unrelated = np.minimum(masked_l2(target, others, mask), masked_l2(target, flip(others), mask))
    delta = min(DELTA, float(unrelated.min(initial=np.inf)) / 2)
    distance = masked_l2(images, target, mask)[:, 0]
    near = distance <= delta
    # Not within δ of the whole: a large template with another middle is, because the rest weighs little there.
    rest = masked_l2(images, target, ~mask)[:, 0] <= DELTA
    return score | {
        "mask_share": float(mask.mean()),
        "delta_template": delta,
        "matches": int(near.sum()),
        "matched_files": np.flatnonzero(near).tolist(),
        "verbatim": int((near & rest).sum()),
        "best_distance": float(distance.min()) if len(images) else None,
        "best_file": int(distance.argmin()) if len(images) else None,
        "extracted": bool(near.any()),
    }
