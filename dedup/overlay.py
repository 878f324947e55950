"""Two pictures and the plane motion between them → do they agree where one lies on the other?

`align` lays them over each other and compares place by place, `classify` says what that means, `lay_closely` lays
drawings for a closer look. A logo, caption bar or border that two pictures share has features in common, but the rest
of what overlaps does not agree.
"""

from contextlib import suppress
from dataclasses import dataclass

import cv2
import numpy as np

from dedup.geometry import Match, carry

SIDE = 128  # pixels of the longer side at which pictures are laid over each other
SHIFT = 1  # pixels by which a place may be off
WINDOW = 11  # pixels a side of a place
MIN_CONTRAST = 0.02  # standard deviation of luma below which a place says nothing
EVEN = 0.001  # standard deviation about a plane below which there is not even noise: one colour, or a gradient
MIN_CORRELATION = 0.5  # of the luma of places with the same pattern
COLOUR_WINDOW = 5
COLOUR_LIMIT = 0.06  # of 1
STEP = 16  # every so many pixels' colours are compared
MAX_GAIN = 2.0  # of chroma

# What makes a copy; chosen on benchmarks/copy_detection.py, whose held-out edits and pictures say how well.
COPY_EVIDENCE = 12  # inliers of a copy: dark solar cells share ten
MIN_OVERLAP = 0.75  # two collages that share one half are not copies
MIN_PLACES = 20
REPAINTED, MOST = 0.15, 0.5  # so much in other colours, though most is as it was: a face, a shirt, a product
COPY_SCORE = 0.72
SURE_INLIERS, SURE_SCORE = 70, 0.62  # so many features outweigh text across and the like
DRAWING = 0.02  # even share: few photographs have more, few drawings less
CLOSE_SIDE = 256  # pixels of the longer side at which drawings are laid over each other once more
REFINED = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 1e-4)  # what ends the refinement: steps, gain
BLANK_EDGE, OUTSIDE = 0.95, 0.02  # shares: of a picture's edge that is blank, of the other one beyond that is not
DRAWING_SCORE = 0.85
SAME_FRAME = 0.9
FEW_INLIERS = 20  # so few in one frame may be those of the frame: solar cells share sixteen
SCENE_INLIERS, SCENE_AGREEMENT = 12, 0.4


@dataclass(frozen=True, slots=True)
class Alignment:
    """How well two pictures agree where they overlap once one is laid onto the other. All but places: 0 … 1."""

    overlap: float  # share of the picture that is covered more; 1 = one of them lies wholly inside the other
    covered: float  # share of the other one
    places: float  # windows of the overlap that have texture
    even: float  # share of the overlap where both have the same smooth colour, without as much as noise
    agreement: float  # share of the textured places with the same pattern
    unexplained: float  # share of the agreeing places whose colour no common tone curve, fading or tint explains
    recoloured: float  # share of them with another colour
    strict: bool  # to be judged as drawings are, whatever they look like
    drawn: bool  # they look drawn, or are to be judged as if they were
    composed: bool  # of drawn ones: what is covered more ends in blank paper, but the other picture goes on beyond

    @property
    def score(self) -> float:
        return self.agreement * (1 - self.unexplained)


def align(a: np.ndarray, b: np.ndarray, found: Match, *, strict: bool = False) -> Alignment:
    """uint8 (H, W, 3) twice and their Match → Alignment. The frame is the picture that is covered more.

    strict: judge them as drawings are judged.
    """
    frame, other, onto, overlap, covered = _choose_frame(a, b, found)
    x = _shrink(frame, SIDE)  # (h, w, 3)
    y, inside = _lay_over(other, onto, x.shape[:2])
    agrees, textured = _compare_patterns(x[..., 0], y[..., 0])
    even = np.stack([_is_even(each[..., 0]) for each in (x, y)])  # (2, h, w)
    textured &= inside
    off = cv2.absdiff(x, y)
    off = np.maximum(np.maximum(off[..., 0], off[..., 1]), off[..., 2])  # numpy reduces short axes slowly
    ground = even.all(axis=0) & (off < COLOUR_LIMIT)  # white paper proves nothing
    known = inside & (agrees | ~textured) & ~ground
    unexplained, recoloured = _compare_colours(_blur(x, COLOUR_WINDOW), _blur(y, COLOUR_WINDOW), known)
    ground_share = _share(ground, inside, 1.0)
    drawn = strict or ground_share > DRAWING
    return Alignment(
        overlap=overlap,
        covered=covered,
        places=float(textured.sum() / WINDOW**2),
        even=ground_share,
        agreement=_share(agrees, textured, 0.0),
        unexplained=unexplained,
        recoloured=recoloured,
        strict=strict,
        drawn=drawn,
        composed=drawn and _is_composed(x.shape, even[0], other, onto),
    )


def classify(found: Match, alignment: Alignment) -> str | None:
    """`copy`, `same-scene` or None: nothing that is worth a word.

    Drawings (in a fiftieth of the overlap both have one smooth colour, with less noise than a camera's) carry their
    meaning in few lines and colours: both must agree nearly everywhere, and up close (`lay_closely`). They are put
    together from others: a head that ends in blank paper is no crop of a figure.
    """
    least = SAME_FRAME if alignment.strict else MIN_OVERLAP  # a pattern that repeats fits itself, moved
    wide = alignment.overlap >= least
    enough = wide and alignment.places >= MIN_PLACES and found.inliers >= COPY_EVIDENCE
    enough &= alignment.unexplained <= REPAINTED or alignment.recoloured > MOST
    if alignment.drawn:
        plain = alignment.agreement * (1 - alignment.recoloured)
        sure = min(plain, alignment.score) >= DRAWING_SCORE
        sure &= not alignment.composed
    else:
        sure = alignment.score >= (SURE_SCORE if found.inliers >= SURE_INLIERS else COPY_SCORE)
    if enough and sure:
        return "copy"
    return "same-scene" if found.inliers >= SCENE_INLIERS and alignment.agreement >= SCENE_AGREEMENT else None


def needs_close_look(found: Match, alignment: Alignment) -> bool:
    """Whether they are drawn, or show one frame and have little in common."""
    return alignment.drawn or (alignment.covered >= SAME_FRAME and found.inliers < FEW_INLIERS)


def lay_closely(a: np.ndarray, b: np.ndarray, found: Match) -> tuple[np.ndarray, np.ndarray]:
    """The picture that is covered more and the other one laid onto it, uint8 (h, w, 3) twice; equal beyond its edge.

    Features place a line by a pixel or so, which is too far off for thin ones, so that the fit is refined by enhanced
    correlation (Evangelidis & Psarakis 2008).
    """
    frame, other, onto, _, _ = _choose_frame(a, b, found)
    side = min(CLOSE_SIDE, max(frame.shape[:2]))
    x = _resize(frame, side)
    zoom = np.sqrt(abs(np.linalg.det(onto[:2, :2]))) / abs(onto[2, 2])
    y = _resize(other, min(max(16.0, side / zoom), max(other.shape[:2])))
    pixels = _in_pixels(onto, x.shape, y.shape).astype(np.float32)
    grey_x, grey_y = (cv2.cvtColor(each, cv2.COLOR_RGB2GRAY) for each in (x, y))
    with suppress(cv2.error):  # when the two have nothing in common there, or it does not converge
        _, refined = cv2.findTransformECC(grey_x, grey_y, pixels.copy(), cv2.MOTION_HOMOGRAPHY, REFINED)
        pixels = np.asarray(refined)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    laid = cv2.warpPerspective(y, pixels, x.shape[1::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
    there = cv2.warpPerspective(np.ones(y.shape[:2], np.uint8), pixels, x.shape[1::-1], flags=flags)
    inside = cv2.erode(there, np.ones((3, 3), np.uint8), borderValue=1).astype(bool)
    return x, np.where(inside[..., None], laid, x)


def _choose_frame(
    a: np.ndarray, b: np.ndarray, found: Match
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float]:
    """The picture that is covered more, the other one, the map from the first to it, and the share covered of each."""
    if found.mirrored:
        a = cv2.flip(a, 1)
    back = np.linalg.inv(found.transform)
    of_a, of_b = _coverage(a.shape, b.shape, found.transform), _coverage(b.shape, a.shape, back)
    return (a, b, found.transform, of_a, of_b) if of_a >= of_b else (b, a, back, of_b, of_a)


def _in_pixels(onto: np.ndarray, frame: tuple[int, ...], other: tuple[int, ...]) -> np.ndarray:
    """A map between longer sides → between the pixels of a frame and of another picture of these shapes, (3, 3)."""
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # where the centre of a pixel is
    to_sides, from_sides = (np.diag([1 / max(shape[:2]), 1 / max(shape[:2]), 1.0]) @ half for shape in (frame, other))
    pixels = np.linalg.inv(from_sides) @ onto @ to_sides
    return pixels / pixels[2, 2]


def _coverage(shape: tuple[int, ...], onto: tuple[int, ...], transform: np.ndarray) -> float:
    """Share of a picture of `shape` that lands on one of shape `onto`."""
    corners = carry(transform, _corners(shape)).astype(np.float32)
    common, _ = cv2.intersectConvexConvex(corners, _corners(onto))
    return min(1.0, common / max(cv2.contourArea(corners), 1e-9))


def _corners(shape: tuple[int, ...]) -> np.ndarray:
    height, width = shape[0] / max(shape[:2]), shape[1] / max(shape[:2])
    return np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)


def _shrink(pixels: np.ndarray, side: float) -> np.ndarray:
    """uint8 (H, W, 3) → float32 (h, w, 3) luma, Cr, Cb of 0 … 1, longer side `side`."""
    return cv2.cvtColor(_resize(pixels, side).astype(np.float32) / 255, cv2.COLOR_RGB2YCrCb)


def _resize(pixels: np.ndarray, side: float) -> np.ndarray:
    scale = side / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return cv2.resize(np.ascontiguousarray(pixels), size, interpolation=cv2.INTER_AREA)


def _lay_over(other: np.ndarray, onto: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The other picture in the frame, float32 (h, w, 3), and where it is, bool (h, w), half a window from its edge.

    onto: (3, 3), positions of the frame → of the other picture.
    """
    zoom = np.sqrt(abs(np.linalg.det(onto[:2, :2]))) / abs(onto[2, 2])
    small = _shrink(other, min(max(16.0, SIDE / zoom), max(other.shape[:2])))  # no finer than the frame shows it
    pixels = _in_pixels(onto, shape, small.shape)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    laid = cv2.warpPerspective(small, pixels, shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
    there = cv2.warpPerspective(np.ones(small.shape[:2], np.uint8), pixels, shape[::-1], flags=flags)
    margin = np.ones((WINDOW // 2, WINDOW // 2), np.uint8)
    return laid, cv2.erode(there, margin, borderValue=1).astype(bool)


def _is_composed(shape: tuple[int, ...], even: np.ndarray, other: np.ndarray, onto: np.ndarray) -> bool:
    """Is the edge of the frame blank, or what lies around it, though there is something beyond in the other picture?

    A crop cuts through what it shows. shape: of the frame as it is compared; even: bool (h, w), where it is. onto:
    positions of the frame → of the other picture.
    """
    luma = _shrink(other, SIDE)[..., 0]
    pixels = _in_pixels(onto, shape, luma.shape)
    covered = cv2.warpPerspective(np.ones(shape[:2], np.uint8), pixels, luma.shape[::-1])
    within = {width: cv2.dilate(covered, np.ones((width, width), np.uint8)).astype(bool) for width in (3, 5, WINDOW)}
    around = luma[within[5] & ~within[3]]
    if not len(around) or (~within[WINDOW] & ~_is_even(luma)).mean() <= OUTSIDE:
        return False
    edge = np.concatenate([even[0], even[-1], even[:, 0], even[:, -1]])
    blank = np.abs(around - np.median(around)) < COLOUR_LIMIT
    return bool(max(edge.mean(), blank.mean()) >= BLANK_EDGE)


def _is_even(luma: np.ndarray) -> np.ndarray:
    """float32 (h, w) → bool (h, w): is a window nothing but a gradient of one colour?"""
    offset = np.arange(WINDOW, dtype=np.float32) - WINDOW // 2
    slope = np.tile(offset / (WINDOW * (offset @ offset)), (WINDOW, 1))
    across, down = (cv2.filter2D(luma, -1, each, borderType=cv2.BORDER_REFLECT) for each in (slope, slope.T))
    plane = (across**2 + down**2) * (offset @ offset) / WINDOW
    return _blur(luma * luma) - _blur(luma) ** 2 - plane < EVEN**2


def _compare_patterns(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (h, w) luma twice → bool (h, w) twice: where windows correlate, and where either has contrast."""
    x, y = (cv2.GaussianBlur(luma, (0, 0), 0.8) for luma in (x, y))
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    around = [cv2.copyMakeBorder(each, SHIFT, SHIFT, SHIFT, SHIFT, cv2.BORDER_WRAP) for each in (y, mean_y, variance_y)]
    best = np.full(x.shape, -1, np.float32)
    for dx in range(2 * SHIFT + 1):
        for dy in range(2 * SHIFT + 1):
            moved, mean, variance = (each[dy : dy + len(x), dx : dx + x.shape[1]] for each in around)
            covariance = _blur(x * moved) - mean_x * mean
            scale = np.sqrt(np.maximum(variance_x * variance, 0))
            best = np.maximum(best, covariance / (scale + MIN_CONTRAST**2 / 2))
    return best > MIN_CORRELATION, np.maximum(variance_x, variance_y) > MIN_CONTRAST**2


def _share(these: np.ndarray, among: np.ndarray, of_none: float) -> float:
    """bool (h, w) twice: how many of the second are of the first, 0 … 1, `of_none` where there are none."""
    count = np.count_nonzero(among)
    return np.count_nonzero(these & among) / count if count else of_none


def _blur(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    return cv2.blur(values, (window, window), borderType=cv2.BORDER_REFLECT)


def _compare_colours(x: np.ndarray, y: np.ndarray, known: np.ndarray) -> tuple[float, float]:
    """float32 (h, w, 3) twice, bool (h, w) → shares of the known places whose colour is off.

    First, what the best tone curve, tint and light leave: editing a picture changes all of it alike, or more towards
    its corners, and another picture differs in places. Either may be the edited one. Second, as they are.
    """
    places = np.stack(np.unravel_index(np.flatnonzero(known)[::STEP], known.shape), axis=1)  # (n, 2)
    if len(places) < MIN_PLACES:
        return 1.0, 1.0
    light = _powers(places / max(known.shape) - 0.5)  # (n, 6)
    x, y = (colours[tuple(places.T)].astype(np.float64) for colours in (x, y))
    left = min(float((_left_over(p, q, light) > COLOUR_LIMIT).mean()) for p, q in ((x, y), (y, x)))
    return left, float((np.linalg.norm(x - y, axis=1) > COLOUR_LIMIT).mean())


def _left_over(p: np.ndarray, q: np.ndarray, light: np.ndarray) -> np.ndarray:
    """What a quadratic in luma, lit unevenly, and one gain and offset of chroma leave of q, given p: float (n,)."""
    given = np.concatenate([light, p[:, :1] * light, p[:, :1] ** 2], axis=1)
    weights, *_ = np.linalg.lstsq(given, q[:, 0], rcond=None)
    luma = q[:, 0] - given @ weights
    p_chroma, q_chroma = (colours[:, 1:] - colours[:, 1:].mean(axis=0) for colours in (p, q))
    gain = np.clip((p_chroma * q_chroma).sum() / max((p_chroma**2).sum(), 1e-9), 0, MAX_GAIN)
    return np.sqrt(luma**2 + ((q_chroma - gain * p_chroma) ** 2).sum(axis=1))


def _powers(p: np.ndarray) -> np.ndarray:
    x, y = p.T.astype(np.float64)
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
