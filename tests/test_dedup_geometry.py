"""Known motions are found again; what two pictures share in a frame, a logo or a caption makes them no copies."""

import io
from collections.abc import Callable
from functools import lru_cache
from itertools import combinations

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from test_dedup_features import photograph, random_features

from dedup import features, geometry, overlay, verify
from dedup.clustering import inverse_orientation
from dedup.features import Features
from dedup.geometry import Match
from dedup.manifest import ORIENTATIONS

type Picture = Image.Image


def draw_circles(number: int, size: int = 256) -> Picture:
    """A drawing: even paper, shapes with outlines, a face."""
    rng = np.random.default_rng(number)
    picture = Image.new("RGB", (size, size), (250, 250, 245))
    draw = ImageDraw.Draw(picture)
    for _ in range(14):
        x, y, r = (int(v) for v in rng.uniform([20, 20, 8], [size - 20, size - 20, 40]))
        fill = tuple(rng.integers(0, 256, 3).tolist())
        if rng.random() < 0.5:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=(0, 0, 0), width=3)
        else:
            draw.rectangle((x - r, y - r // 2, x + r, y + r // 2), fill=fill, outline=(0, 0, 0), width=3)
    return picture


def write(picture: Picture, text: str, place: tuple[int, int], size: int = 28) -> Picture:
    whole = picture.copy()
    font = ImageFont.load_default(size)
    ImageDraw.Draw(whole).text(place, text, fill=(255, 255, 255), font=font, stroke_width=2, stroke_fill=(0, 0, 0))
    return whole


def match(a: np.ndarray, b: np.ndarray) -> Match | None:
    return geometry.match(*(extract(picture.tobytes(), picture.shape) for picture in (a, b)))


@lru_cache(maxsize=100)
def extract(data: bytes, shape: tuple[int, ...]) -> Features:
    return features.extract(np.frombuffer(data, np.uint8).reshape(shape))


def judge(a: np.ndarray, b: np.ndarray, found: Match | None) -> str | None:
    """As `evidence.judge_pairs` does, but for the close look at drawings."""
    return None if found is None else overlay.classify(found, overlay.align(a, b, found))


def judge_all(pictures: list[np.ndarray]) -> tuple[list[Match | None], list[str | None]]:
    """Of every pair of them."""
    extracted = [features.extract(picture) for picture in pictures]
    pairs = list(combinations(range(len(pictures)), 2))
    matches = [geometry.match(extracted[i], extracted[j]) for i, j in pairs]
    kinds = [judge(pictures[i], pictures[j], found) for (i, j), found in zip(pairs, matches, strict=True)]
    return matches, kinds


def warp(pixels: np.ndarray, pixel_map: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The picture moved by a map of pixel centres, on grey of (width, height), and the map in longer sides."""
    moved = cv2.warpPerspective(pixels, pixel_map, size, flags=cv2.INTER_AREA, borderValue=(120, 120, 120))
    return moved, to_sides(pixel_map, pixels.shape, size)


def to_sides(pixel_map: np.ndarray, shape: tuple[int, ...], size: tuple[int, int]) -> np.ndarray:
    return np.diag([1 / max(size), 1 / max(size), 1]) @ pixel_map @ np.diag([max(shape[:2]), max(shape[:2]), 1.0])


def corner_error(found: np.ndarray, truth: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far apart two maps carry the corners, in longer sides of what they map to."""
    height, width = shape[0] / max(shape[:2]), shape[1] / max(shape[:2])
    corners = np.array([[[0, 0], [width, 0], [width, height], [0, height]]])
    return float(
        np.linalg.norm(
            cv2.perspectiveTransform(corners, found) - cv2.perspectiveTransform(corners, truth), axis=2
        ).max()
    )


def turn_about_centre(shape: tuple[int, ...], degrees: float, scale: float, size: tuple[int, int]) -> np.ndarray:
    height, width = shape[:2]
    turn = np.vstack([cv2.getRotationMatrix2D((width / 2, height / 2), degrees, scale), [0, 0, 1]])
    shift = np.array([[1, 0, (size[0] - width) / 2], [0, 1, (size[1] - height) / 2], [0, 0, 1]])
    return shift @ turn


# Motions


@pytest.mark.parametrize("degrees", [0, 12, -33, 90, 135, 180, 251])
@pytest.mark.parametrize("scale", [0.6, 1.0, 1.7])
def test_rotation_and_scale(degrees: float, scale: float) -> None:
    pixels = photograph(3)
    size = (int(400 * scale), int(400 * scale))
    moved, truth = warp(pixels, turn_about_centre(pixels.shape, degrees, scale, size), size)
    found = match(pixels, moved)
    assert found is not None
    assert not found.mirrored
    assert corner_error(found.transform, truth, pixels.shape) < 0.02
    assert judge(pixels, moved, found) == "copy"
    assert overlay.align(pixels, moved, found).overlap > 0.97


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 7),
    left=st.floats(0, 0.4),
    top=st.floats(0, 0.4),
    share=st.floats(0.5, 0.6),
    mirrored=st.booleans(),
)
def test_crop_and_mirror(seed: int, left: float, top: float, share: float, mirrored: bool) -> None:
    pixels = photograph(seed)
    x, y, w, h = (int(v) for v in (left * 320, top * 240, share * 320, share * 240))
    part = pixels[y : y + h, x : x + w]
    truth = to_sides(np.array([[1, 0, -x], [0, 1, -y], [0, 0, 1]]), pixels.shape, (w, h))
    if mirrored:  # positions of the mirrored picture → of the mirrored crop
        part = part[:, ::-1]
        truth = to_sides(np.array([[1, 0, x + w - 320], [0, 1, -y], [0, 0, 1]]), pixels.shape, (w, h))
    found = match(pixels, part)
    assert found is not None
    assert found.mirrored == mirrored
    back = corner_error(np.linalg.inv(found.transform), np.linalg.inv(truth), part.shape)
    assert back < 0.02
    assert judge(pixels, part, found) == "copy"
    alignment = overlay.align(pixels, part, found)
    assert alignment.overlap > 0.95
    assert alignment.covered == pytest.approx(share**2, abs=0.04)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 7), moves=st.lists(st.floats(0, 0.16), min_size=8, max_size=8))
def test_perspective(seed: int, moves: list[float]) -> None:
    pixels = photograph(seed)
    corners = np.array([[0, 0], [320, 0], [320, 240], [0, 240]], np.float32)
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * np.reshape(moves, (4, 2)) * (320, 240)
    homography = cv2.getPerspectiveTransform(corners, (corners + inwards).astype(np.float32))
    moved, truth = warp(pixels, homography, (320, 240))
    found = match(pixels, moved)
    assert found is not None
    assert corner_error(found.transform, truth, pixels.shape) < 0.02
    assert judge(pixels, moved, found) == "copy"


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("tilt", [-28, 0, 28])
def test_orientation_is_the_nearest_of_the_eight(number: int, tilt: float) -> None:
    pixels = photograph(4)
    turned = np.ascontiguousarray(verify.orient(pixels[None], number)[0])
    if tilt:
        size = (400, 400)
        turned, _ = warp(turned, turn_about_centre(turned.shape, tilt, 1, size), size)
    found = match(pixels, turned)
    assert found is not None
    assert ORIENTATIONS[geometry.orientation(found)] == ORIENTATIONS[number]
    assert found.mirrored == ORIENTATIONS[number].startswith("m")


@given(angle=st.floats(-180, 180))
def test_upright_is_within_thirty_degrees(angle: float) -> None:
    """And what undoes a turn undoes its name."""
    radians = np.radians(angle)
    turn = np.array([[np.cos(radians), np.sin(radians), 0], [-np.sin(radians), np.cos(radians), 0], [0, 0, 1]])
    name = ORIENTATIONS[geometry.orientation(Match(turn, False, 20))]
    assume(min(abs(abs(angle) - edge) for edge in (30, 135)) > 1e-6)
    expected = "r0" if abs(angle) < 30 else "r180" if abs(angle) > 135 else "r90" if angle > 0 else "r270"
    assert name == expected
    assert ORIENTATIONS[geometry.orientation(Match(turn.T, False, 20))] == inverse_orientation(name)


def test_one_frame_with_little_in_common_is_for_the_close_look() -> None:
    photographs = overlay.align(photograph(0), photograph(0), Match(np.eye(3), False, 100))
    assert overlay.needs_close_look(Match(np.eye(3), False, 16), photographs)
    assert not overlay.needs_close_look(Match(np.eye(3), False, 30), photographs)


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_other_way_round_is_the_inverse(mirrored: bool) -> None:
    """A mirrored a lies on b by M; so a lies on the mirrored b by F M F, and the mirrored b on a by its inverse."""
    for seed in range(4):
        pixels = photograph(seed)
        size = (420, 360)
        moved, _ = warp(pixels, turn_about_centre(pixels.shape, 17, 1.1, size), size)
        if mirrored:
            moved = np.ascontiguousarray(moved[:, ::-1])
        there, back = match(pixels, moved), match(moved, pixels)
        assert there is not None
        assert back is not None
        assert there.mirrored == back.mirrored == mirrored
        expected = np.linalg.inv(there.transform)
        if mirrored:
            flips = [np.array([[-1, 0, w / max(w, h)], [0, 1, 0], [0, 0, 1]]) for w, h in (size, (320, 240))]
            expected = flips[1] @ expected @ flips[0]
        assert corner_error(back.transform, expected, moved.shape) < 0.015


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_hint_is_followed(mirrored: bool) -> None:
    a = features.extract(photograph(0))
    b = features.mirror(a) if mirrored else a
    right = geometry.match(a, b, mirrored)
    assert right is not None
    assert right.inliers > 150
    np.testing.assert_allclose(right.transform, np.eye(3), atol=0.01)
    wrong = geometry.match(a, b, not mirrored)
    assert wrong is None or wrong.inliers < geometry.MIN_EVIDENCE


def test_correspondences_are_mutual_and_clear() -> None:
    """Mutual nearest neighbours that pass the ratio test, one after the other."""
    rng = np.random.default_rng(0)
    words = rng.exponential(size=(80, 128))
    a, b = random_features(rng, 150, words), random_features(rng, 130, words)
    products = a.descriptors.astype(float) @ b.descriptors.T.astype(float) / features.SCALE**2
    distance = np.sqrt(2 - 2 * np.minimum(products, 1))  # (150, 130); bytes are of length 1 to about 1 %
    expected = {
        (i, int(row.argmin()))
        for i, row in enumerate(distance)
        if distance[:, row.argmin()].argmin() == i and np.sort(row)[0] < geometry.RATIO * np.sort(row)[1]
    }
    p, q = geometry.correspondences(a, b)
    index = [{tuple(point): number for number, point in enumerate(f.points.tolist())} for f in (a, b)]
    got = {(index[0][tuple(x)], index[1][tuple(y)]) for x, y in zip(p.tolist(), q.tolist(), strict=True)}
    assert len(expected) > 10
    assert got == expected


# No copies


def test_unrelated_pictures_are_no_copies() -> None:
    _, kinds = judge_all([photograph(seed) for seed in range(20, 32)])
    assert kinds.count("copy") == 0
    assert kinds.count(None) >= 0.97 * len(kinds)


def add_caption_bar(picture: Picture) -> Picture:
    whole = Image.new("RGB", (picture.width, picture.height + 90), (255, 255, 255))
    whole.paste(picture, (0, 90))
    draw = ImageDraw.Draw(whole)
    for line, text in enumerate(("When Monday never ends and", "coffee is the only friend", "said nobody @ 2019")):
        draw.text((8, 4 + 28 * line), text, fill=(0, 0, 0), font=ImageFont.load_default(23))
    return whole


def add_logo(picture: Picture) -> Picture:
    whole = picture.copy()
    whole.paste(Image.fromarray(photograph(99)).resize((90, 70)), (picture.width - 95, picture.height - 75))
    return whole


def add_border(picture: Picture) -> Picture:
    whole = Image.fromarray(photograph(98, picture.width, picture.height))
    whole.paste(picture.resize((picture.width - 80, picture.height - 80)), (40, 40))
    return whole


def add_shop_frame(picture: Picture) -> Picture:
    """White, with a price and a maker's name, as in a catalogue."""
    whole = Image.new("RGB", (400, 400), (255, 255, 255))
    whole.paste(picture.resize((280, 210)), (60, 70))
    draw = ImageDraw.Draw(whole)
    draw.rectangle((10, 310, 390, 390), fill=(20, 60, 140))
    draw.text((24, 318), "GARDEN & HOME 24/7", fill=(255, 255, 255), font=ImageFont.load_default(32))
    draw.text((24, 356), "from 19.99 - order now", fill=(255, 220, 0), font=ImageFont.load_default(26))
    return whole


@pytest.mark.parametrize("frame", [add_caption_bar, add_logo, add_border, add_shop_frame])
def test_a_shared_frame_makes_no_copies(frame: Callable[[Picture], Picture]) -> None:
    matches, kinds = judge_all([np.asarray(frame(Image.fromarray(photograph(seed)))) for seed in range(40, 47)])
    assert kinds.count("copy") == 0
    assert sum(found is not None for found in matches) > len(kinds) / 2  # or nothing was at stake


@pytest.mark.parametrize("frame", [add_caption_bar, add_logo, add_shop_frame])
def test_a_framed_copy_is_one(frame: Callable[[Picture], Picture]) -> None:
    for seed in range(40, 44):
        picture = Image.fromarray(photograph(seed))
        a, b = np.asarray(picture), np.asarray(frame(picture))
        assert judge(a, b, match(a, b)) == "copy"


def test_another_half_is_another_picture() -> None:
    """Half of it is the same to the pixel."""
    for seed in range(6):
        one, two = photograph(seed), photograph(seed + 20).copy()
        two[:, :160] = one[:, :160]
        assert judge(one, two, match(one, two)) != "copy"


def test_other_colours_are_another_picture() -> None:
    """A part of it in another hue, as in a product's series: the pattern agrees."""
    for seed in range(6):
        one = photograph(seed)
        two = one.copy()
        two[40:200, 60:260] = two[40:200, 60:260, [2, 0, 1]]
        found = match(one, two)
        assert found is not None
        assert judge(one, two, found) != "copy"


# Copies


def jpeg(picture: Picture, quality: int) -> Picture:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def change(picture: Picture, function: Callable[[np.ndarray], np.ndarray]) -> Picture:
    return Image.fromarray(function(np.asarray(picture, float)).clip(0, 255).astype(np.uint8))


def put_sticker(picture: Picture) -> Picture:
    whole = picture.copy()
    draw = ImageDraw.Draw(whole)
    draw.ellipse((110, 70, 190, 150), fill=(255, 205, 50), outline=(190, 130, 0), width=3)
    draw.ellipse((130, 90, 142, 110), fill=(80, 50, 0))
    draw.ellipse((158, 90, 170, 110), fill=(80, 50, 0))
    return whole


EDITS: dict[str, Callable[[Picture], Picture]] = {
    "same": lambda p: p,
    "text": lambda p: write(write(p, "MONDAY NEVER ENDS", (12, 80), 30), "SEE YOU LATER", (40, 130), 30),
    "sticker": put_sticker,
    "faded": lambda p: change(ImageEnhance.Color(p).enhance(0.5), lambda x: (x - 128) * 0.5 + 160),
    "gamma": lambda p: change(p, lambda x: 255 * (x / 255) ** 1.5),
    "bright": lambda p: change(p, lambda x: 255 * (x / 255) ** (1 / 2.2)),
    "grey": lambda p: p.convert("L").convert("RGB"),
    "jpeg8": lambda p: jpeg(p, 8),
    "blur": lambda p: p.filter(ImageFilter.GaussianBlur(2)),
    "noise": lambda p: change(p, lambda x: x + np.random.default_rng(0).normal(0, 15, x.shape)),
    "half": lambda p: p.resize((p.width // 2, p.height // 2), Image.Resampling.LANCZOS),
    "wide": lambda p: p.resize((int(p.width * 1.3), p.height), Image.Resampling.LANCZOS),
    "turned": lambda p: p.rotate(12, Image.Resampling.BICUBIC),
    "tinted": lambda p: change(p, lambda x: x * (1.1, 1.0, 0.8) + (5, 0, 10)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_photographs_are_copies(edit: str) -> None:
    kinds = []
    for seed in range(8):
        a = photograph(seed)
        b = np.asarray(EDITS[edit](Image.fromarray(a)))
        kinds.append(judge(a, b, match(a, b)))
    assert kinds.count("copy") >= 7, kinds


def test_pasted_on_another_picture() -> None:
    for seed in range(6):
        one, backdrop = photograph(seed), photograph(seed + 20)
        whole = Image.fromarray(backdrop).resize((640, 480))
        whole.paste(Image.fromarray(one).resize((384, 288)), (200 - 20 * seed, 30 * seed))
        pasted = np.asarray(whole)
        found = match(one, pasted)
        assert found is not None
        assert judge(one, pasted, found) == "copy"
        alignment = overlay.align(one, pasted, found)
        assert alignment.overlap > 0.97
        assert alignment.covered == pytest.approx(0.36, abs=0.02)


# Laying over


@pytest.mark.parametrize("edit", ["same", "text", "half", "faded", "turned"])
def test_laying_a_over_b_says_what_b_over_a_says(edit: str) -> None:
    for seed in range(4):
        a, b = (
            np.asarray(p) for p in (Image.fromarray(photograph(seed)), EDITS[edit](Image.fromarray(photograph(seed))))
        )
        found = match(a, b)
        assert found is not None
        one = overlay.align(a, b, found)
        two = overlay.align(b, a, Match(np.linalg.inv(found.transform), False, found.inliers))
        assert one.overlap == pytest.approx(two.overlap, abs=0.01)
        assert one.covered == pytest.approx(two.covered, abs=0.01)
        assert one.score == pytest.approx(two.score, abs=0.05)
        assert overlay.classify(found, one) == overlay.classify(found, two)


def test_mirrored_pictures_are_laid_over_mirrored() -> None:
    a = photograph(0)
    alignment = overlay.align(np.ascontiguousarray(a[:, ::-1]), a, Match(np.eye(3), True, 100))
    assert alignment.agreement == 1
    assert alignment.unexplained == 0
    assert alignment.overlap == alignment.covered == pytest.approx(1)
    upright = overlay.align(np.ascontiguousarray(a[:, ::-1]), a, Match(np.eye(3), False, 100))
    assert upright.score < 0.1


@pytest.mark.parametrize("shape", [(64, 64), (1, 1), (3, 500), (500, 3), (240, 320)])
def test_uniform_pictures_say_nothing(shape: tuple[int, int]) -> None:
    grey, white = np.full((*shape, 3), 128, np.uint8), np.full((*shape, 3), 255, np.uint8)
    for a, b in ((grey, white), (grey, grey), (grey, photograph(0)), (photograph(0), grey)):
        assert match(a, b) is None
        alignment = overlay.align(a, b, Match(np.eye(3), False, 200))
        assert overlay.classify(Match(np.eye(3), False, 200), alignment) != "copy"
        values = [alignment.overlap, alignment.covered, alignment.even, alignment.agreement, alignment.unexplained]
        assert np.isfinite(values).all()
        assert 0 <= min(values) <= max(values) <= 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    numbers=st.lists(st.floats(-3, 3), min_size=6, max_size=6),
    tilts=st.lists(st.floats(-0.4, 0.4), min_size=2, max_size=2),
    mirrored=st.booleans(),
)
def test_wild_transforms_are_measured_without_complaint(
    numbers: list[float], tilts: list[float], mirrored: bool
) -> None:
    transform = np.reshape([*numbers, *tilts, 1], (3, 3))
    if abs(np.linalg.det(transform)) < 1e-3:
        return
    found = Match(transform, mirrored, 60)
    alignment = overlay.align(photograph(0, 96, 64), photograph(1, 64, 96), found)
    values = [alignment.overlap, alignment.covered, alignment.even, alignment.agreement, alignment.unexplained]
    assert np.isfinite([*values, alignment.places]).all()
    assert 0 <= min(values) <= max(values) <= 1
    assert overlay.classify(found, alignment) != "copy"


def test_a_perspective_that_turns_over_is_none() -> None:
    """Features that hold only a narrow strip fix no perspective: some would carry a corner behind the camera."""
    rng = np.random.default_rng(0)
    corners = np.array([[0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]])
    for kind in range(200):
        found = random_features(rng, int(rng.integers(20, 60)))
        p = (found.points * 0.1 + 0.4).astype(np.float32)
        if kind % 2:
            p[:, 1] = 0.4 + 0.02 * found.points[:, 1]
        q = (p + rng.normal(0, 0.003, p.shape)).astype(np.float32)
        matched = geometry.match(Features(p, found.descriptors, 1.0), Features(q, found.descriptors, 1.0))
        if matched is not None:
            assert (corners @ matched.transform[2]).min() > 0
            assert (corners @ np.linalg.inv(matched.transform)[2]).min() > 0


def test_no_features_match_nothing() -> None:
    none = Features(np.zeros((0, 2), np.float32), np.zeros((0, 128), np.uint8), 1.0)
    few = random_features(np.random.default_rng(0), 1)
    some = features.extract(photograph(0))
    for a, b in ((none, none), (none, some), (some, none), (few, some), (some, few), (few, few)):
        assert geometry.match(a, b) is None


def test_drawings_in_the_same_frame_are_for_the_close_look() -> None:
    one = draw_circles(0)
    two = one.copy()
    ImageDraw.Draw(two).ellipse((110, 110, 150, 150), fill=(200, 0, 0))
    found = Match(np.eye(3), False, 100)
    alignment = overlay.align(np.asarray(one), np.asarray(two), found)
    assert overlay.needs_close_look(found, alignment)
    photographs = overlay.align(photograph(0), photograph(0), found)
    assert not overlay.needs_close_look(found, photographs)
    part = overlay.align(
        np.asarray(one), np.asarray(two.crop((0, 0, 200, 200))), Match(np.diag([1.28, 1.28, 1]), False, 100)
    )
    assert overlay.needs_close_look(found, part)
    assert not verify.is_close(*overlay.lay_closely(np.asarray(one), np.asarray(two), found), verify.MAX_LOSSY)


def test_what_overlaps_is_laid_closely_whatever_the_frame() -> None:
    """A drawing, and a part of it at another scale, turned a little: equal but for a dot."""
    whole = draw_circles(0)
    turned = whole.rotate(4, Image.Resampling.BICUBIC, fillcolor="white").resize((420, 420), Image.Resampling.LANCZOS)
    part = turned.crop((60, 60, 340, 330))
    dotted = part.copy()
    ImageDraw.Draw(dotted).ellipse((130, 130, 150, 150), fill=(200, 0, 0))
    for other, same in ((part, True), (dotted, False)):
        pixels = np.asarray(other)
        found = match(np.asarray(whole), pixels)
        assert found is not None
        laid = overlay.lay_closely(np.asarray(whole), pixels, found)
        assert laid[0].shape == laid[1].shape
        assert verify.is_close(*laid, verify.MAX_LOSSY) == same


def test_a_picture_put_into_another_drawing_is_no_crop_of_it() -> None:
    head = draw_circles(0)
    figure = Image.new("RGB", (320, 400), "white")
    figure.paste(head, (30, 10))
    trimmed = overlay.align(np.asarray(head), np.asarray(figure), Match(place(head, figure, (30, 10)), False, 100))
    assert not trimmed.composed
    ImageDraw.Draw(figure).rectangle((60, 300, 260, 390), fill=(40, 90, 200))
    found = Match(place(head, figure, (30, 10)), False, 100)
    alignment = overlay.align(np.asarray(head), np.asarray(figure), found)
    assert alignment.composed
    assert overlay.classify(found, alignment) == "same-scene"
    cut = figure.crop((60, 60, 250, 250))  # through what is drawn
    found = Match(place(cut, figure, (60, 60)), False, 100)
    alignment = overlay.align(np.asarray(cut), np.asarray(figure), found)
    assert not alignment.composed
    assert overlay.classify(found, alignment) == "copy"


def test_a_letter_that_fills_its_picture_is_no_crop_of_an_accented_one() -> None:
    letter = draw_circles(0).crop((60, 60, 250, 250))  # its edge is not blank, but in the other picture all around is
    accented = Image.new("RGB", (240, 330), "white")
    accented.paste(letter, (25, 115))
    ImageDraw.Draw(accented).rectangle((60, 20, 180, 70), fill=(40, 90, 200))
    found = Match(place(letter, accented, (25, 115)), False, 100)
    alignment = overlay.align(np.asarray(letter), np.asarray(accented), found)
    assert alignment.composed
    assert overlay.classify(found, alignment) == "same-scene"


def test_a_drawing_on_shaded_paper_is_a_drawing() -> None:
    flat = np.asarray(draw_circles(0)).astype(np.float32)
    shade = np.linspace(0.7, 1, flat.shape[1], dtype=np.float32)[None, :, None]
    shaded = np.rint(flat * shade).astype(np.uint8)
    alignment = overlay.align(shaded, shaded, Match(np.eye(3), False, 100))
    assert alignment.even > 5 * overlay.DRAWING
    noisy = np.clip(shaded + np.random.default_rng(0).normal(0, 8, flat.shape), 0, 255).astype(np.uint8)
    assert overlay.align(noisy, noisy, Match(np.eye(3), False, 100)).even < overlay.DRAWING


def place(part: Image.Image, whole: Image.Image, corner: tuple[int, int]) -> np.ndarray:
    """Positions of a part → of the whole, in their longer sides."""
    scale, (x, y) = max(part.size) / max(whole.size), (each / max(whole.size) for each in corner)
    return np.array([[scale, 0, x], [0, scale, y], [0, 0, 1]])
