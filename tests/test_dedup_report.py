"""The report in a real browser: what it says, that everybody can read it, that no caption can run in it."""

import hashlib
import json
import os
import re
import tarfile
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, expect

from dedup import features, gallery, geometry, manifest, report, verify

EVIL = '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=2">'
EVIL_KEY = 'shop/"onerror="window.pwned=3" \u2028<svg onload=window.pwned=4>.png'


def draw_picture(seed: int, side: int = 64) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(blocks, (side, side), interpolation=cv2.INTER_NEAREST)


def draw_texture(seed: int, height: int = 240, width: int = 320) -> np.ndarray:
    """Spots of all sizes, but no single pixels, so that resampling changes little."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    layers = [cv2.GaussianBlur(noise, (0, 0), sigma) * sigma for sigma in (2, 4, 8, 16)]
    return np.clip(128 + 60 * sum(layers), 0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, suffix: str) -> bytes:
    return cv2.imencode(suffix, pixels)[1].tobytes()


class Dataset:
    """A finished dedup run made by hand, row by row."""

    def __init__(self, folder: Path) -> None:
        self.src, self.out = folder / "src", folder / "out"
        self.rows: list[dict] = []
        self.pairs: list[dict] = []

    def add(self, key: str, data: bytes, caption: str | None, **columns: object) -> int:
        number = len(self.rows)
        path = self.src / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        row = {"id": number, "source": key.split("/")[0], "key": key, "caption": caption, "offset": 0}
        row |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "width": 64, "height": 64}
        row |= {"format": "PNG", "status": "ok", "cluster_id": number, "component_id": number, "keep": True}
        self.rows.append(row | columns)
        return number

    def pair(
        self, a: int, b: int, kind: str, signal: str, hamming: int | None, residual: float, turn: str = "r0"
    ) -> None:
        score = (1 - (hamming or 0) / 256) * (1 - residual)
        pair = {"a": a, "b": b, "class": kind, "signal": signal, "score": score, "hamming": hamming}
        self.pairs.append(pair | {"residual": residual, "worst_tile": 2 * residual, "orientation": turn})
        self.rows[b] |= {"class": kind, "signal": signal, "score": score, "orientation": turn}
        self.rows[b]["component_id"] = self.rows[a]["component_id"]

    def add_picture(self, key: str, pixels: np.ndarray, **columns: object) -> int:
        height, width = pixels.shape[:2]
        pixels = np.ascontiguousarray(pixels)
        return self.add(key, encode(pixels, ".png"), None, width=width, height=height, **columns)

    def lay(self, a: int, b: int, kind: str) -> None:
        """A pair of the copy search, with the transform that the features of the two pictures give."""
        paths = [str(self.src / self.rows[row]["key"]) for row in (a, b)]
        one, other = [features.extract(np.asarray(cv2.imread(path))) for path in paths]
        found = geometry.match(one, other)
        assert found is not None
        turn = manifest.ORIENTATIONS[geometry.orientation(found)]
        pair = {"a": a, "b": b, "class": kind, "signal": "copy", "score": 0.9, "orientation": turn, "cosine": 0.3}
        self.pairs.append(pair | {"inliers": found.inliers, "overlap": 0.987, "transform": found.transform.ravel()})
        self.rows[b]["component_id"] = self.rows[a]["component_id"] = min(a, b)

    def settle(self, row: int, kept: int, *, keep: bool = False) -> None:
        """The row belongs to the star of a kept one; unless it stays, it was dropped for it."""
        self.rows[row]["cluster_id"] = kept
        if not keep:
            self.rows[row] |= {"keep": False, "kept_id": kept, "reason": "copy"}

    def pack(self) -> None:
        """All pictures in one tar file instead of files of their own."""
        path = self.src / "00000.tar"
        with tarfile.open(path, "w") as archive:
            for row in self.rows:
                archive.add(self.src / row["key"], row["key"])
        with tarfile.open(path) as archive:
            for row in self.rows:
                row |= {"shard": path.name, "offset": archive.getmember(row["key"]).offset_data}

    def drop(self, row: int, kept: int, signal: str, hamming: int | None = None, residual: float = 0.0) -> None:
        self.pair(kept, row, "copy", signal, hamming, residual)
        reason = signal.replace("pdq", "hash")
        self.rows[row] |= {"keep": False, "kept_id": kept, "cluster_id": kept, "reason": reason}

    def write(self) -> Path:
        rows = pl.DataFrame(self.rows, infer_schema_length=None).with_columns(cluster_size=pl.len().over("cluster_id"))
        table = manifest.conform(rows)
        stands = Counter(table["kept_id"].drop_nulls())
        kept, ok = table["keep"], table["status"] == "ok"
        represents = [1 + stands[i] if keep else 0 for i, keep in zip(table["id"], kept, strict=True)]
        manifest.write(self.out, table.with_columns(represents=pl.Series(represents, dtype=pl.Int64)))
        pairs = pl.DataFrame(self.pairs, schema=manifest.PAIRS_SCHEMA)
        manifest.write_parquet(self.out / "pairs.parquet", pairs)
        counts = {
            "rows": len(rows),
            "kept": int(kept.sum()),
            "dropped": int((ok & ~kept).sum()),
            "unreadable": int((~ok).sum()),
            "bytes": int(rows["size"].sum()),
            "bytes_dropped": int(rows.filter(ok & ~kept)["size"].sum()),
            "without_caption": rows["caption"].null_count(),
        }
        run = {"src": str(self.src), "options": {"level": "hash"}, "versions": {"unmemorize": "0.1.0"}}
        manifest.write_json(self.out / "run.json", run | {"counts": counts})
        return self.out


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three groups of copies (one with a mirrored copy, kept), one of look-alikes, one unreadable file."""
    data = Dataset(tmp_path_factory.mktemp("report"))
    owl = encode(draw_picture(1), ".png")
    first = data.add("wild/owl.png", owl, "an owl at night")
    for number in range(3):
        data.drop(data.add(f"shop/owl{number}.png", owl, "an owl at night"), first, "bytes")
    large = encode(draw_picture(1, 96), ".jpg")
    larger = data.add("shop/owl.jpg", large, "Eule bei Nacht", format="JPEG", width=96, height=96)
    data.drop(larger, first, "pdq", 6, 0.011)
    fox = data.add("wild/fox.png", encode(draw_picture(2), ".png"), "a fox")
    mirrored = data.add("wild/fox-mirrored.png", encode(draw_picture(2)[:, ::-1], ".png"), None, cluster_id=fox)
    data.pair(fox, mirrored, "copy", "pdq", 2, 0.001, "m0")
    evil = data.add(EVIL_KEY, encode(draw_picture(3), ".png"), EVIL)
    data.drop(data.add("shop/evil.png", encode(draw_picture(3), ".png"), EVIL), evil, "bytes")
    red = data.add("wild/heart-red.png", encode(draw_picture(4), ".png"), "a heart")
    blue = data.add("wild/heart-blue.png", encode(draw_picture(5), ".png"), "a heart")
    data.pair(red, blue, "look-alike", "pdq", 0, 0.14)
    data.add(
        "wild/broken.jpg",
        b"no",
        "<b>lost</b>",
        status="unreadable",
        error="not an image (b'<i>')",
        keep=False,
    )
    path = report.write_report(data.write(), jobs=1)
    assert path == data.out / "report" / "index.html"
    return data.out


def open_report(page: Page, out: Path) -> Page:
    page.goto((out / "report" / "index.html").as_uri())
    expect(page.locator("#status")).to_contain_text("page 1 of")
    return page


def choose(page: Page, kind: str) -> None:
    page.locator(".kinds label", has_text=kind).click()


def keys(page: Page) -> list[str]:
    return page.locator(".key-line").all_text_contents()


def test_summary_in_plain_words(page: Page, out: Path) -> None:
    open_report(page, out)
    expect(page.locator("h1")).to_have_text("12 images: 6 kept, 5 removed.")
    lead = page.locator(".lead").inner_text().replace("\u00a0", " ")
    assert lead.startswith("41.7 % of the images were copies of another one; removing them saves ")
    assert lead.endswith("The most repeated picture stands 5 times in the dataset. 1 file could not be read.")
    tiles = dict(
        zip(
            page.locator(".tiles dt").all_inner_texts(),
            page.locator(".tiles dd").all_inner_texts(),
            strict=True,
        )
    )
    assert tiles["groups of copies"] == "3"
    assert tiles["mirrored or turned, kept"] == "1"
    assert tiles["look-alikes, kept"] == "2"


def test_captions_sources_and_unreadable_files(page: Page, out: Path) -> None:
    open_report(page, out)
    assert page.locator("#captions .big").all_inner_texts() == [
        "6",
        "1",
        "1",
    ]  # owl ×4 and evil ×2; owl; "a heart"
    sources = page.locator("#sources tbody tr")
    expect(sources.first).to_contain_text("shop")
    expect(sources.first).to_contain_text("most of it")
    expect(sources.nth(1)).not_to_contain_text("most of it")
    cells = page.locator("#unreadable tbody td").all_inner_texts()
    assert cells == ["wild/broken.jpg", "unreadable", "not an image (b'<i>')", "2\u00a0bytes"]


def test_nothing_planted_runs(page: Page, out: Path) -> None:
    open_report(page, out)
    choose(page, "All")
    page.locator("input[type=search]").fill("onerror")
    expect(page.locator(".group")).to_have_count(1)
    assert page.locator("#list script, #list svg").count() == 0
    assert page.locator(".group .caption").first.text_content() == EVIL
    assert EVIL_KEY in keys(page)
    page.wait_for_timeout(50)  # what was planted would load at once
    assert page.evaluate("window.pwned") is None


def test_the_policy_stops_what_escaping_would_let_through(browser: Browser, out: Path) -> None:
    page = browser.new_page()
    open_report(page, out)
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned=1\">')")
    script = "Object.assign(document.createElement('script'), {textContent: 'window.pwned=2'})"
    page.evaluate(f"document.body.append({script})")
    page.wait_for_timeout(100)
    assert page.evaluate("window.pwned") is None
    page.close()


def test_kinds_of_group(page: Page, out: Path) -> None:
    open_report(page, out)
    page.locator("select[name=order]").select_option(label="largest first")
    owl, pair, alike = "One picture, 5 times", "One picture, 2 times", "2 look-alikes"
    kinds = {
        "Copies removed": [owl, pair],
        "Mirrored": [pair],
        "Look-alikes": [alike],
        "All": [owl, pair, pair, alike],
    }
    for kind, expected in kinds.items():
        choose(page, kind)
        expect(page.locator(".group h3")).to_have_text(expected)


def test_filters(page: Page, out: Path) -> None:
    open_report(page, out)
    page.locator("select[name=order]").select_option(label="largest first")
    choose(page, "All")
    owl, fox, heart = "wild/owl.png", "wild/fox.png", "wild/heart-red.png"
    for field, value, first_keys in [
        ("signal", "same bytes", [owl, EVIL_KEY]),
        ("signal", "PDQ hash", [owl, fox, heart]),
        ("size", "5–9", [owl]),
        ("size", "3–4", []),
        ("source", "shop", [owl, EVIL_KEY]),
    ]:
        select = page.locator(f"select[name={field}]")
        select.select_option(label=value)
        expect(page.locator(".group .member:first-child .key-line")).to_have_text(first_keys)
        select.select_option(label="any")
    page.locator("select[name=order]").select_option(label="weakest first")
    expect(page.locator(".group .member:first-child .key-line")).to_have_text([heart, owl, fox, EVIL_KEY])


def test_search_finds_captions_and_keys_of_any_member(page: Page, out: Path) -> None:
    open_report(page, out)
    choose(page, "All")
    for query, groups in [("NACHT eule", 1), ("heart-blue", 1), ("wild/", 3), ("no such words", 0), ("", 4)]:
        page.locator("input[type=search]").fill(query)
        expect(page.locator(".group")).to_have_count(groups)
    expect(page.locator("#status")).to_have_text("4 groups · page 1 of 1")


def test_a_member_shows_its_evidence(page: Page, out: Path) -> None:
    open_report(page, out)
    owls = page.locator(".group").first.locator(".member")
    expect(owls.first).to_contain_text("kept")
    weakest = owls.nth(1)  # before the equal bytes
    for text in (
        "removed",
        "Eule bei Nacht",
        "shop/owl.jpg",
        "96 × 96 JPEG",
        "PDQ hash · 6 bits · colour 0.011",
        "enlarged: no more detail",
    ):
        expect(weakest).to_contain_text(text)
    for text in ("same caption", "same bytes"):
        expect(owls.nth(2)).to_contain_text(text)
    choose(page, "Mirrored")
    expect(page.locator(".member").nth(1)).to_contain_text("mirrored · kept")
    expect(page.locator(".member").nth(1)).to_contain_text("no caption")


def test_thumbnails_show_and_equal_files_share_one(page: Page, out: Path) -> None:
    open_report(page, out)
    images = page.locator(".group").first.locator("img")
    expect(images).to_have_count(5)
    for image in images.all():
        image.scroll_into_view_if_needed()
        expect(image).to_have_js_property("complete", True)
        assert image.evaluate("image => image.naturalWidth") > 0
    addresses = [image.get_attribute("src") for image in images.all()]
    assert len(set(addresses)) == 2
    assert len(list((out / "report" / "thumbs").glob("*/*.jpg"))) == 7


def test_everything_has_words(page: Page, out: Path) -> None:
    open_report(page, out)
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    charts = page.locator("svg[role=img]")
    assert charts.count() == 3
    for chart in charts.all():
        assert chart.locator("title").text_content()
        assert ":" in (chart.locator("desc").text_content() or "")
    words = page.locator("#hamming-text").text_content() or ""
    assert words.startswith("0: 0 copies, 1 look-alikes, kept apart. 2: 1 copies, 0 look-alikes, kept apart. 6: 1 ")
    fields = page.locator("select, input, #groups button")
    names = "fields => fields.map(field => field.ariaLabel || (field.labels?.[0] || field).textContent.trim())"
    assert all(fields.evaluate_all(names))


def side_sources(page: Page) -> list[str]:
    images = page.locator("#compare-sides figure:not(:last-child) img")
    expect(images).to_have_count(2)
    for image in images.all():
        expect(image).to_have_js_property("complete", True)
        assert image.evaluate("image => image.naturalWidth") > 0
    return [image.get_attribute("src") or "" for image in images.all()]


def test_two_images_side_by_side_as_they_are_on_disk(page: Page, out: Path) -> None:
    open_report(page, out)
    page.get_by_role("button", name="Compare shop/owl.jpg").click()
    dialog = page.locator("dialog")
    expect(dialog).to_contain_text("PDQ hash · 6 bits · colour 0.011")
    expect(dialog.locator(".key-line")).to_have_text(["wild/owl.png", "shop/owl.jpg"])
    src = out.parent / "src"
    assert side_sources(page) == [(src / key).as_uri() for key in ("wild/owl.png", "shop/owl.jpg")]
    assert dialog.locator("a").first.get_attribute("href") == (src / "wild/owl.png").as_uri()
    page.keyboard.press("ArrowRight")
    expect(dialog.locator(".key-line").last).to_have_text("shop/owl0.png")
    page.keyboard.press("ArrowLeft")
    expect(dialog.locator(".key-line").last).to_have_text("shop/owl.jpg")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert page.evaluate("document.activeElement.ariaLabel") == "Compare shop/owl.jpg"


def test_rows_of_a_table_are_found_by_the_path_that_it_names(page: Page, tmp_path: Path) -> None:
    """Their key is what its id column says."""
    data = Dataset(tmp_path)
    paths = ["shop/50% a.png", "shop/b.png"]
    first, second = (
        data.add(path, encode(draw_picture(1), ".png"), None, shard=manifest.encode_name(path.encode()))
        for path in paths
    )
    data.drop(second, first, "bytes")
    data.rows[first]["key"], data.rows[second]["key"] = "sku 1", EVIL_KEY
    report.write_report(data.write(), jobs=1)
    open_report(page, data.out)
    page.locator("button.thumb").last.click()
    assert side_sources(page) == [(data.src / path).as_uri() for path in paths]
    assert page.evaluate("window.pwned") is None


def test_any_key_is_found_on_disk_and_runs_nothing(page: Page, tmp_path: Path) -> None:
    data = Dataset(tmp_path)
    first = data.add("50% off #1 & more?/größe\u2028.png", encode(draw_picture(1), ".png"), EVIL)
    data.drop(data.add(EVIL_KEY, encode(draw_picture(1), ".png"), EVIL), first, "bytes")
    odd = b"shop/\xff\n.png"
    row = data.add("shop/plain.png", encode(draw_picture(1), ".png"), None)
    data.drop(row, first, "bytes")
    (data.src / "shop/plain.png").rename(data.src / os.fsdecode(odd))
    data.rows[row]["key"] = manifest.encode_name(odd)
    report.write_report(data.write(), jobs=1)
    open_report(page, data.out)
    for button in page.locator("button.thumb").all():
        button.click()
        assert all(address.startswith("file:") for address in side_sources(page))
        page.keyboard.press("Escape")
    assert page.evaluate("window.pwned") is None


def test_the_difference_turns_the_one_onto_the_other(page: Page, tmp_path: Path) -> None:
    data = Dataset(tmp_path)
    pixels = draw_picture(9)
    number = {name: n for n, name in enumerate(manifest.ORIENTATIONS)}
    for name in ("m0", "r90", "m270"):
        first = data.add(f"{name}/a.png", encode(pixels, ".png"), None)
        turned = verify.orient(pixels[None], number[name])[0]
        other = data.add(f"{name}/b.png", encode(np.ascontiguousarray(turned), ".png"), None, cluster_id=first)
        data.pair(first, other, "copy", "pdq", 2, 0.0, name)
    report.write_report(data.write(), jobs=1)
    open_report(page, data.out)
    buttons = page.locator("button.thumb")
    expect(buttons).to_have_count(3)
    for button in buttons.all():
        button.click()
        side_sources(page)
        shot = page.locator(".difference").screenshot()
        middle = cv2.imdecode(np.frombuffer(shot, np.uint8), cv2.IMREAD_COLOR)[10:-10, 10:-10]
        assert np.median(middle) == 0
        assert middle.mean() < 25  # edges alone
        page.keyboard.press("Escape")


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
    report.write_report(data.write(), jobs=1)
    open_report(page, data.out)
    images = page.locator("#list img")
    expect(images).to_have_count(4)
    for image in images.all():
        image.scroll_into_view_if_needed()
        expect(image).to_have_js_property("complete", True)
    sizes = "images => images.map(image => [image.alt, image.naturalWidth])"
    assert dict(images.evaluate_all(sizes)) == {"a.png": 320, "b.png": 320, "c.png": 128, "d.png": 128}


def test_a_source_leads_to_its_groups(page: Page, out: Path) -> None:
    open_report(page, out)
    page.locator("#sources").get_by_role("button", name="shop").click()
    expect(page.locator("select[name=source]")).to_have_value("0")
    expect(page.locator("#status")).to_have_text("2 groups · page 1 of 1")


def test_keyboard_alone_is_enough(page: Page, out: Path) -> None:
    open_report(page, out)
    page.locator("#kind-1").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".group h3")).to_have_text(["One picture, 2 times"])
    outline = "getComputedStyle(document.querySelector('#kind-2 + label')).outlineStyle"
    assert page.evaluate(outline) == "solid"
    page.keyboard.press("Tab")
    page.keyboard.type("mirrored")
    expect(page.locator("#status")).to_have_text("1 group · page 1 of 1")


def test_phone_and_colours(page: Page, out: Path) -> None:
    page.set_viewport_size({"width": 375, "height": 812})
    open_report(page, out)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) == "rgb(20, 21, 20)"


def make_many(folder: Path, groups: int, size: int = 2) -> Path:
    """A run of `groups` groups of `size` rows with equal bytes, without image files."""
    n = groups * size
    ids = pl.DataFrame({"id": pl.int_range(n, eager=True)}).with_columns(
        cluster_id=pl.col("id") - pl.col("id") % size, keep=pl.col("id") % size == 0
    )
    name = pl.concat_str(pl.lit("site"), pl.col("id") % 7, pl.lit("/image-"), pl.col("id").cast(pl.String).str.zfill(8))
    rows = ids.with_columns(
        key=name + ".jpg",
        source=pl.concat_str(pl.lit("site"), pl.col("id") % 7),
        caption=pl.concat_str(pl.lit("a picture of thing number "), "cluster_id"),
        kept_id=pl.when(~pl.col("keep")).then("cluster_id"),
        component_id="cluster_id",
        cluster_size=pl.lit(size),
        sha256=pl.col("cluster_id").cast(pl.String).str.pad_end(64, "f"),
        represents=pl.when("keep").then(size).otherwise(0),
        reason=pl.when(~pl.col("keep")).then(pl.lit("bytes")),
        status=pl.lit("ok"),
        width=pl.lit(640),
        height=pl.lit(480),
        format=pl.lit("JPEG"),
        size=pl.lit(54_321),
        offset=pl.lit(0),
    )
    table = manifest.conform(rows)
    manifest.write(folder, table)
    evidence = {
        "class": "copy",
        "signal": "bytes",
        "score": 1.0,
        "hamming": None,
        "residual": 0.0,
        "worst_tile": 0.0,
    }
    pairs = table.filter(~pl.col("keep")).select(
        a="kept_id", b="id", orientation=pl.lit("r0"), **{k: pl.lit(v) for k, v in evidence.items()}
    )
    manifest.write_parquet(folder / "pairs.parquet", manifest.conform(pairs, manifest.PAIRS_SCHEMA))
    counts = {"rows": n, "kept": groups, "dropped": n - groups, "unreadable": 0, "without_caption": 0}
    counts |= {"bytes": 54_321 * n, "bytes_dropped": 54_321 * (n - groups)}
    run = {"src": str(folder / "gone"), "options": {}, "versions": {}, "counts": counts}
    manifest.write_json(folder / "run.json", run)
    return folder


def test_pages_and_chunks(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "CHUNK_GROUPS", 7)
    out = make_many(tmp_path, 45)
    report.write_report(out, jobs=1)
    assert len(list((out / "report" / "data").glob("0*.js"))) == 7
    open_report(page, out)
    expect(page.locator(".group")).to_have_count(20)
    expect(page.locator(".group .thumb").first).to_have_text("no thumbnail")  # the source is gone
    expect(page.locator("#groups .note").last).to_contain_text("45 could not be read again")
    seen = set(keys(page))
    following = page.locator("[data-step='1']").last
    for number, groups in ((2, 20), (3, 5)):
        following.click()
        expect(page.locator("#status")).to_have_text(f"45 groups · page {number} of 3")
        expect(page.locator(".group")).to_have_count(groups)
        seen |= set(keys(page))
    expect(following).to_be_disabled()
    assert len(seen) == 90
    page.locator("input[type=search]").fill("number 86")  # stands in the last chunk
    expect(page.locator(".group")).to_have_count(1)


def test_large_groups_are_folded_and_cut(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "MEMBERS", 30)
    out = make_many(tmp_path, 1, 40)
    report.write_report(out, jobs=1)
    open_report(page, out)
    expect(page.locator(".member")).to_have_count(12)
    page.get_by_role("button", name="Show 18 more").click()
    expect(page.locator(".member")).to_have_count(30)
    expect(page.locator(".group")).to_contain_text("10 more are listed in dropped.csv")


def test_no_duplicates_at_all(page: Page, tmp_path: Path) -> None:
    data = Dataset(tmp_path)
    data.add("one.png", encode(draw_picture(1), ".png"), None)
    report.write_report(data.write(), jobs=1)
    open_report(page, data.out)
    expect(page.locator("h1")).to_have_text("1 image: 1 kept, 0 removed.")
    expect(page.locator(".lead")).to_contain_text("nothing was removed")
    expect(page.locator("#list")).to_have_text("No two images were found alike.")


def test_second_report_reuses_and_forgets_thumbnails(tmp_path: Path) -> None:
    data = Dataset(tmp_path)
    first = data.add("a.png", encode(draw_picture(1), ".png"), None)
    data.drop(data.add("b.png", encode(draw_picture(1), ".png"), None), first, "bytes")
    out = data.write()
    stale = out / "report" / "thumbs" / "ab" / "abcd.jpg"
    stale.parent.mkdir(parents=True)
    stale.touch()
    report.write_report(out, jobs=1)
    (thumb,) = (out / "report" / "thumbs").glob("*/*.jpg")
    before = thumb.stat().st_mtime_ns, contents(out / "report")
    report.write_report(out, jobs=1)
    assert (thumb.stat().st_mtime_ns, contents(out / "report")) == before
    report.write_report(out, jobs=1, thumbnails=0)
    assert not list((out / "report" / "thumbs").glob("*/*.jpg"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_missing_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(manifest.ManifestError, match="no finished dedup run"):
        report.write_report(tmp_path)


@given(st.lists(st.text() | st.none(), max_size=4))
def test_scripts_carry_any_text_and_close_nothing(texts: list[str | None]) -> None:
    script = gallery.to_script(3, texts)
    assert "<" not in script
    assert not {"\u2028", "\u2029"} & set(script)
    assert json.loads(script.removeprefix("receive(...").removesuffix(");\n")) == [3, texts]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (12_345_678, "12.3 MB"), (345_600, "346 kB"), (2e15, "2000 TB")],
)
def test_sizes_in_bytes(size: float, text: str) -> None:
    assert report.format_bytes(size) == text.replace(" ", "\u00a0")


@pytest.mark.slow
def test_hundred_thousand_groups_open_at_once(page: Page, tmp_path: Path) -> None:
    out = make_many(tmp_path, 100_000)
    report.write_report(out, jobs=1, thumbnails=0)
    start = time.perf_counter()
    page.goto((out / "report" / "index.html").as_uri(), wait_until="commit")
    expect(page.locator(".group")).to_have_count(20)
    ready = time.perf_counter() - start
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint <= 2_000
    assert ready <= 4
    assert page.evaluate("document.querySelectorAll('*').length") < 3_000
    page.locator("input[type=search]").fill("number 199998")
    expect(page.locator("#status")).to_have_text("1 group · page 1 of 1", timeout=20_000)
