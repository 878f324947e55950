"""The report lays copies over what they were made of, in a real browser."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from playwright.sync_api import Page, expect
from test_dedup_report import Dataset, choose, compare_each, draw_picture, encode, load_images, open_report

from dedup import manifest, report, verify


def draw_texture(seed: int, height: int = 240, width: int = 320) -> np.ndarray:
    """Spots of all sizes, but no single pixels, so that resampling changes little."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    layers = [cv2.GaussianBlur(noise, (0, 0), sigma) * sigma for sigma in (2, 4, 8, 16)]
    return np.clip(128 + 60 * sum(layers), 0, 255).astype(np.uint8)


def test_the_difference_turns_the_one_onto_the_other(page: Page, tmp_path: Path) -> None:
    data = Dataset(tmp_path)
    pixels = draw_picture(9)
    number = {name: n for n, name in enumerate(manifest.ORIENTATIONS)}
    for name in ("m0", "r90", "m270"):
        first = data.add(f"{name}/a.png", encode(pixels, ".png"), None)
        turned = verify.orient(pixels[None], number[name])[0]
        other = data.add(f"{name}/b.png", encode(np.ascontiguousarray(turned), ".png"), None, cluster_id=first)
        data.pair(first, other, "copy", "pdq", 2, 0.0, name)
    data.show(page)
    for _ in compare_each(page, 3):
        shot = page.locator(".difference").screenshot()
        middle = cv2.imdecode(np.frombuffer(shot, np.uint8), cv2.IMREAD_COLOR)[10:-10, 10:-10]
        assert np.median(middle) == 0
        assert middle.mean() < 25  # edges alone


TOP, BOTTOM, LEFT, RIGHT = 60, 200, 90, 290  # of what is cut out of 240 × 320 pixels
CORNERS = np.array([[LEFT, TOP], [RIGHT, TOP], [RIGHT, BOTTOM], [LEFT, BOTTOM]]) / 320
CROP = np.array([[0, 0], [200, 0], [200, 140], [0, 140]]) / 200
MIRRORED = CROP[[1, 0, 3, 2]]
TURNED = np.array([[TOP, 320 - LEFT], [TOP, 320 - RIGHT], [BOTTOM, 320 - RIGHT], [BOTTOM, 320 - LEFT]]) / 320


@pytest.fixture(scope="module")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Edited copies, before and after their originals in the dataset, and views of a scene, one by way of a copy."""
    data = Dataset(tmp_path_factory.mktemp("laid"))
    for seed, (name, turn) in enumerate({"crop": 0, "mirrored": 4, "turned": 1}.items()):
        original = draw_texture(seed)
        part = original if name == "turned" else original[TOP:BOTTOM, LEFT:RIGHT]
        edited = verify.orient(part[None], turn)[0]
        for place, order in enumerate((("original", name), (name, "original"))):
            pictures = {"original": original, name: edited}
            ids = {key: data.add_picture(f"{name}{place}/{key}.png", pictures[key]) for key in order}
            data.lay(min(ids.values()), max(ids.values()), "copy")
            data.settle(ids["original"], ids["original"], keep=True)
            data.settle(ids[name], ids["original"], keep=name != "crop")
    scene = draw_texture(9)
    first = data.add_picture("scene/first.png", scene)
    smaller = data.add_picture("scene/smaller.png", cv2.resize(scene[:, :280], None, fx=0.7, fy=0.7))
    data.lay(first, smaller, "copy")
    data.settle(smaller, first)
    view = data.add_picture("scene/view.png", scene[TOP:BOTTOM, LEFT:RIGHT])
    data.lay(smaller, view, "same-scene")
    data.rows[first]["component_id"] = data.rows[view]["component_id"] = first
    red = data.add("wild/heart-red.png", encode(draw_picture(4), ".png"), "a heart")
    blue = data.add("wild/heart-blue.png", encode(draw_picture(5), ".png"), "a heart")
    data.pair(red, blue, "look-alike", "pdq", 0, 0.1)
    report.write_report(data.write(), jobs=1)
    return data.out


def corners_on_frame(page: Page, name: str, corners: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Where the corners in the picture on top land, and where they belong: (4, 2), in longer sides of the one below."""
    expect(page.locator(".layers img")).to_have_count(2)
    expect(page.locator(".layers img").last).to_have_attribute("style", re.compile("matrix3d"))
    names = "images => images.map(image => image.src.split('/').at(-1))"
    below, above = page.locator(".layers img").evaluate_all(names)
    carry = """(image, corners) => {
      const [matrix, frame] = [new DOMMatrix(getComputedStyle(image).transform), image.previousSibling];
      const [side, own] = [frame, image].map(({offsetWidth: w, offsetHeight: h}) => Math.max(w, h));
      const points = corners.map(([x, y]) => matrix.transformPoint(new DOMPoint(x * own, y * own)));
      return points.map(({x, y, w}) => [x / w / side, y / w / side]);
    }"""
    landed = page.locator(".layers img").last.evaluate(carry, corners[above].tolist())
    return np.array(landed), corners[below]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("name", "corners"), [("crop", CROP), ("mirrored", MIRRORED), ("turned", TURNED), ("view", CROP)]
)
def test_an_edited_copy_is_laid_over_what_it_was_made_of(
    page: Page, laid: Path, place: int, name: str, corners: np.ndarray
) -> None:
    open_report(page, laid)
    choose(page, "All")
    key, partner = ("scene/view.png", "first.png") if name == "view" else (f"{name}{place}/{name}.png", "original.png")
    page.get_by_role("button", name=f"Compare {key}").click()
    landed, belong = corners_on_frame(page, name, {f"{name}.png": corners, partner: CORNERS})
    assert np.abs(landed - belong).max() < 0.02
    points = page.locator(".outline polygon:last-child").first.get_attribute("points") or ""
    outline = np.array([point.split(",") for point in points.split()], float)
    if name != "turned":
        ends = np.array([outline.min(axis=0), outline.max(axis=0)])
        assert np.abs(ends - CORNERS[[0, 2]]).max() < 0.02
    aligned = brightness(page)
    page.locator(".layers img").last.evaluate("image => { image.style.transform = 'scaleY(-1)'; }")
    assert aligned < brightness(page) / 4


def brightness(page: Page) -> float:
    shot = page.locator(".layers").screenshot()
    pixels = np.asarray(cv2.imdecode(np.frombuffer(shot, np.uint8), cv2.IMREAD_COLOR))
    return float(pixels[10:-10, 10:-10].mean())


def test_overlay_difference_and_keys(page: Page, laid: Path) -> None:
    open_report(page, laid)
    choose(page, "Copies removed")
    page.get_by_role("button", name="Compare crop0/crop.png").click()
    expect(page.locator("#compare-evidence")).to_contain_text("edited copy: ")
    expect(page.locator("#compare-evidence")).to_contain_text("local features agree, overlap 99\u00a0% · cosine 0.30")
    top, slider = page.locator(".layers img").last, page.locator("dialog input[type=range]")
    expect(top).to_have_css("mix-blend-mode", "difference")
    expect(slider).to_be_hidden()
    page.get_by_role("button", name="Overlay").click()
    expect(top).to_have_css("mix-blend-mode", "normal")
    slider.focus()
    page.keyboard.press("ArrowRight")  # moves the slider, not to the next pair
    expect(top).to_have_css("opacity", "0.55")
    expect(page.locator("dialog .key-line").last).to_have_text("crop0/crop.png")
    page.get_by_role("button", name="Next →", exact=True).and_(page.locator("dialog button")).click()
    expect(page.locator("dialog .key-line").last).not_to_have_text("crop0/crop.png")
    expect(top).to_have_css("opacity", "0.55")  # the view stays as it was chosen
    page.set_viewport_size({"width": 375, "height": 812})
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    assert page.evaluate("document.querySelector('dialog').scrollWidth <= document.querySelector('dialog').clientWidth")


def test_views_of_a_scene_are_a_kind_of_their_own(page: Page, laid: Path) -> None:
    open_report(page, laid)
    choose(page, "Look-alikes")
    expect(page.locator(".member:first-child .key-line")).to_have_text(["wild/heart-red.png"])
    choose(page, "Same scene")
    expect(page.locator(".key-line")).to_have_text(["scene/first.png", "scene/view.png"])
    expect(page.locator(".tag").last).to_have_text("same scene · kept")
    page.get_by_role("button", name="Compare scene/view.png").click()
    expect(page.locator("#compare-title")).to_have_text("Is this more than the same scene?")
    expect(page.locator("#compare-evidence")).to_contain_text("same scene: ")
    page.keyboard.press("Escape")
    choose(page, "All")
    page.locator("select[name=signal]").select_option(label="local features")
    expect(page.locator("#status")).to_contain_text("8 groups")


def test_what_is_laid_over_each_other_is_larger_when_no_file_shows_it(page: Page, tmp_path: Path) -> None:
    data = Dataset(tmp_path)
    original = draw_texture(1, 480, 640)
    first, crop = data.add_picture("a.png", original), data.add_picture("b.png", original[100:400, 200:600])
    data.lay(first, crop, "copy")
    data.settle(crop, first)
    same = data.add_picture("c.png", draw_texture(2, 480, 640))
    data.drop(data.add_picture("d.png", draw_texture(2, 480, 640)), same, "bytes")
    data.pack()
    data.show(page)
    images = load_images(page.locator("#list img"), 4)
    sizes = "images => images.map(image => [image.alt, image.naturalWidth])"
    assert dict(images.evaluate_all(sizes)) == {"a.png": 320, "b.png": 320, "c.png": 128, "d.png": 128}
