"""The report in a real browser: what it says, that everybody can read it, that no caption can run in it."""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, Locator, Page, expect

from dedup import features, gallery, geometry, manifest, report

EVIL = '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=2">'
EVIL_KEY = 'shop/"onerror="window.pwned=3" \u2028<svg onload=window.pwned=4>.png'


def draw_picture(seed: int, side: int = 64) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(blocks, (side, side), interpolation=cv2.INTER_NEAREST)


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

    def write(self, **more: object) -> Path:
        """more: further counts of run.json."""
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
        manifest.write_json(self.out / "run.json", run | {"counts": counts | more})
        return self.out

    def show(self, page: Page, **more: object) -> Page:
        report.write_report(self.write(**more), jobs=1)
        return open_report(page, self.out)


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


def load_images(images: Locator, count: int) -> Locator:
    """Wait for the images, so many of them; they are loaded when they come into view."""
    expect(images).to_have_count(count)
    for image in images.all():
        image.scroll_into_view_if_needed()
        expect(image).to_have_js_property("complete", True)
        assert image.evaluate("image => image.naturalWidth") > 0
    return images


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
    names, values = (page.locator(f".tiles {tag}").all_inner_texts() for tag in ("dt", "dd"))
    tiles = dict(zip(names, values, strict=True))
    assert tiles["groups of copies"] == "3"
    assert tiles["mirrored or turned, kept"] == "1"
    assert tiles["images with look-alikes, kept"] == "2"


def test_captions_sources_and_unreadable_files(page: Page, out: Path) -> None:
    open_report(page, out)
    repeated = page.locator("#captions .big").all_inner_texts()
    assert repeated == ["6", "1", "1"]  # owl ×4 and evil ×2; owl; "a heart"
    sources = page.locator("#sources tbody tr")
    expect(sources.first).to_contain_text("shop")
    expect(sources.first).to_contain_text("▲")
    expect(sources.nth(1)).not_to_contain_text("▲")
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
    images = load_images(page.locator(".group").first.locator("img"), 5)
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
    images = load_images(page.locator("#compare-sides figure:not(:last-child) img"), 2)
    return [image.get_attribute("src") or "" for image in images.all()]


def compare_each(page: Page, count: int) -> Iterator[list[str]]:
    """Open the comparison of every copy shown, so many of them; yields where its two images are."""
    buttons = page.locator("button.thumb")
    expect(buttons).to_have_count(count)
    for button in buttons.all():
        button.click()
        yield side_sources(page)
        page.keyboard.press("Escape")


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
    data.show(page)
    for addresses in compare_each(page, 2):
        assert all(address.startswith("file:") for address in addresses)
    assert page.evaluate("window.pwned") is None


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


def test_no_duplicates_at_all(page: Page, tmp_path: Path) -> None:
    data = Dataset(tmp_path)
    data.add("one.png", encode(draw_picture(1), ".png"), None)
    data.show(page)
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
