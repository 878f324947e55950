"""Two pictures' features → is there one plane motion that lays a part of one onto the other?

Local features that are each other's best (Lowe's ratio test) and that one affine map or homography carries onto each
other. It costs a millisecond, reads no pixels and rejects nearly everything; `overlay` looks at what is left.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from dedup.features import Features, mirror

RATIO = 0.85  # of the distances to the best and the second best descriptor
TOLERANCE = 4 / 256  # of the longer side: how far a carried keypoint may lie from its partner
LOOSE = 4  # times the tolerance: what an affine map may leave of a perspective
MAX_STRETCH = 2.5  # larger singular value of the map over the smaller one, beyond the aspect of a square
MAX_SCALE = 8.0
MIN_WEIGHT = 0.2  # of a corner in a homography; the upper left one has 1
UNIT_SQUARE = np.array([[0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
DISTINCT = 64  # keypoints of one cell of this grid are one piece of evidence
ENOUGH = 25  # inliers upright: mirrored need not be tried
MIN_INLIERS = 4  # three points always fit an affine map
MIN_EVIDENCE = 8  # inliers that make a pair worth a look
TURNED = 30  # degrees: more is another orientation, as an arrow up is not one to the upper left


@dataclass(frozen=True, slots=True)
class Match:
    """How a lies on b. The transform maps positions of a (of a mirrored a, if so) to b, in units of longer sides."""

    transform: np.ndarray  # float64 (3, 3)
    mirrored: bool
    inliers: int  # distinct ones, in both pictures


def match(a: Features, b: Features, mirrored: bool | None = None) -> Match | None:
    """None when fewer than MIN_INLIERS agree. mirrored: whether a lies mirrored on b; None = whichever holds better."""
    if mirrored is not None:
        return _fit(mirror(a) if mirrored else a, b, mirrored)
    upright = _fit(a, b, False)
    if upright is not None and upright.inliers >= ENOUGH:
        return upright
    found = [m for m in (upright, _fit(mirror(a), b, True)) if m is not None]
    return max(found, key=lambda m: m.inliers, default=None)


def correspondences(a: Features, b: Features) -> tuple[np.ndarray, np.ndarray]:
    """float32 (m, 2) positions in a and b of descriptors that are each other's nearest and pass the ratio test."""
    if min(len(a.points), len(b.points)) < 2:
        return a.points[:0], b.points[:0]
    similarity = a.descriptors.astype(np.float32) @ b.descriptors.T.astype(np.float32) / 255**2  # (n_a, n_b)
    rows = np.arange(len(similarity))
    best = similarity.argmax(axis=1)
    mutual = similarity.argmax(axis=0)[best] == rows
    top = similarity[rows, best]
    similarity[rows, best] = -1
    second = similarity.max(axis=1)
    clear = 1 - np.minimum(top, 1) < RATIO**2 * (1 - np.minimum(second, 1))  # squared distances of unit vectors
    chosen = np.flatnonzero(mutual & clear)
    return a.points[chosen], b.points[best[chosen]]


def _fit(a: Features, b: Features, mirrored: bool) -> Match | None:
    p, q = correspondences(a, b)
    if len(p) < MIN_INLIERS:
        return None
    affine, mask = cv2.estimateAffine2D(
        p, q, method=cv2.RANSAC, ransacReprojThreshold=TOLERANCE, maxIters=2_000, confidence=0.999
    )
    if affine is None or not _is_plausible(affine):
        return None
    transform = np.vstack([affine, [0, 0, 1]])
    inside = mask.ravel().astype(bool)
    if inside.sum() >= 3 * MIN_INLIERS:
        near = np.linalg.norm(carry(transform, p) - q, axis=1) < LOOSE * TOLERANCE
        projective, _ = cv2.findHomography(p[near], q[near], cv2.RANSAC, TOLERANCE, maxIters=500)
        if projective is not None and _is_mild(projective):
            held = np.linalg.norm(carry(projective, p) - q, axis=1) < TOLERANCE
            if held.sum() >= inside.sum():
                transform, inside = projective, held
    inliers = min(_count_distinct(p[inside]), _count_distinct(q[inside]))
    return Match(transform, mirrored, inliers) if inliers >= MIN_INLIERS else None


def _is_mild(projective: np.ndarray) -> bool:
    """No corner of either picture comes near the horizon."""
    weights = [matrix[2] @ UNIT_SQUARE / matrix[2, 2] for matrix in (projective, np.linalg.pinv(projective))]
    return bool(min(w.min() for w in weights) >= MIN_WEIGHT)


def _is_plausible(affine: np.ndarray) -> bool:
    """No fold, no extreme scale, no needle; points on one line give NaN."""
    linear = affine[:, :2]
    if not np.isfinite(affine).all():
        return False
    large, small = np.linalg.svd(linear, compute_uv=False)
    return np.linalg.det(linear) > 0 and small > 1 / MAX_SCALE and large < MAX_SCALE and large < MAX_STRETCH * small


def carry(transform: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Where a transform (3, 3) takes points (n, 2)."""
    return cv2.perspectiveTransform(points[None].astype(np.float64), transform)[0]


def _count_distinct(points: np.ndarray) -> int:
    return len(np.unique(np.floor(points * DISTINCT).astype(int), axis=0))


def orientation(found: Match) -> int:
    """Number in ORIENTATIONS of the quarter turn that is nearest to what turns a into b, none up to TURNED."""
    linear = found.transform[:2, :2]
    angle = -np.degrees(np.arctan2(linear[1, 0] - linear[0, 1], linear[0, 0] + linear[1, 1]))
    quarters = max(abs(angle) > TURNED, round(abs(angle) / 90))
    return 4 * found.mirrored + int(np.sign(angle) * quarters) % 4


def invert(transform: list[float], orientation: str, width_a: float, width_b: float) -> list[float]:
    """A transform of pairs.parquet from a to b → from b to a; widths in longer sides. Mirroring comes first in both."""
    matrix = np.linalg.inv(np.reshape(transform, (3, 3)))
    if orientation.startswith("m"):
        mirror_a, mirror_b = (np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]]) for width in (width_a, width_b))
        matrix = mirror_a @ matrix @ mirror_b
    return matrix.ravel().tolist()
