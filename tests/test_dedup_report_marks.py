"""A reader marks pairs in the report, in a real browser, and the next run does what the marks say."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, expect
from test_dedup_pipeline import picture
from test_dedup_report import EVIL, EVIL_KEY, Dataset, choose, draw_picture, encode, open_report
from test_dedup_report_pages import make_many

from dedup import gallery, manifest, marks, report
from dedup.options import Options
from dedup.pipeline import deduplicate


@pytest.fixture
def page(page: Page) -> Page:
    """Without what an earlier test had marked: all pages on disk share one store."""
    page.goto((Path(__file__).parent / "conftest.py").as_uri())
    page.evaluate("localStorage.clear()")
    return page


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A group with three removed rows, two of them of equal bytes, and two look-alikes."""
    data = Dataset(tmp_path)
    owl = data.add("owl.png", encode(draw_picture(1), ".png"), "an owl")
    for number in range(2):
        data.drop(data.add(f"owl{number}.jpg", encode(draw_picture(1), ".jpg"), None), owl, "pdq", 4, 0.01)
    data.drop(data.add(EVIL_KEY, encode(draw_picture(1, 32), ".png"), EVIL), owl, "pdq", 6, 0.02)
    red = data.add("red.png", encode(draw_picture(4), ".png"), "a heart")
    blue = data.add("blue.png", encode(draw_picture(5), ".png"), "a heart")
    data.pair(red, blue, "look-alike", "pdq", 0, 0.14)
    report.write_report(data.write(), jobs=1)
    return data.out


def download(page: Page, folder: Path, button: str = "#download") -> dict[str, Any]:
    with page.expect_download() as waiting:
        page.locator(button).click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return marks.read_marks(path)


def said(content: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {tuple(sorted(m[end]["key"] for end in "ab")): m["verdict"] for m in content["decisions"]}


def test_keyboard_marks_and_the_page_remembers(page: Page, out: Path, tmp_path: Path) -> None:
    open_report(page, out)
    choose(page, "All")
    expect(page.locator("#marked")).to_have_text("No pair is marked yet.")
    expect(page.locator("#download")).to_be_disabled()
    page.get_by_role("button", name="Compare owl0.jpg").focus()
    page.keyboard.press("Enter")
    expect(page.locator("[aria-pressed=true][data-verdict]")).to_have_text("UndecidedU")
    page.keyboard.press("n")
    expect(page.locator("[data-verdict=not-a-copy]")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#said")).to_have_text("Marked: not a copy")
    for _ in range(3):  # from “Next” back over “Undecided” to the note
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.id") == "note":
            break
    page.keyboard.type("no cat")  # n and c mark nothing here
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    page.locator("[data-compare='1']").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("dialog .key-line").last).to_have_text("owl1.jpg")  # of equal bytes: the same mark
    expect(page.locator("[data-verdict=not-a-copy]")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#note")).to_have_value("no cat")
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("dialog .key-line").last).to_have_text("blue.png")
    page.keyboard.press("C")
    page.keyboard.press("Escape")
    expect(page.locator("#marked")).to_contain_text("2 pairs marked: 1 copy, 1 not a copy.")
    expect(page.locator(".marked.tag")).to_have_text(["you: copy", "you: not a copy", "you: not a copy"])
    page.reload()
    choose(page, "All")
    expect(page.locator(".marked.tag")).to_have_text(["you: copy", "you: not a copy", "you: not a copy"])
    content = download(page, tmp_path)
    assert content["digest"] == report.hashing.digest((out / "run.json").read_bytes())
    assert [(m["verdict"], m.get("note")) for m in content["decisions"]].count(("not-a-copy", "no cat")) == 1
    assert said(content)[("blue.png", "red.png")] == "copy"


def test_mouse_marks_and_takes_back(page: Page, out: Path, tmp_path: Path) -> None:
    open_report(page, out)
    page.locator("button.thumb").first.click()
    expect(page.locator("dialog .key-line").last).to_have_text(EVIL_KEY)
    page.locator("[data-verdict=not-a-copy]").click()
    page.locator("[data-compare='0']").click()
    assert said(download(page, tmp_path)) == {tuple(sorted((EVIL_KEY, "owl.png"))): "not-a-copy"}
    page.locator("button.thumb").first.click()
    page.locator("[data-verdict=undecided]").click()
    expect(page.locator("#download")).to_be_disabled()
    assert page.evaluate("localStorage.length") == 0
    assert page.evaluate("window.pwned") is None


def test_marks_survive_paging_and_filters(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "CHUNK_GROUPS", 7)
    out = make_many(tmp_path, 45)
    report.write_report(out, jobs=1)
    open_report(page, out)
    page.locator("button.thumb").first.click()
    shown = page.locator("dialog .key-line").last
    for _ in range(21):  # past the end of the page
        before = shown.text_content() or ""
        page.keyboard.press("n")
        page.keyboard.press("ArrowRight")
        expect(shown).not_to_have_text(before)
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_contain_text("page 2 of 3")
    expect(page.locator("#marked")).to_contain_text("21 pairs marked")
    page.locator("[data-step='-1']").first.click()
    expect(page.locator(".marked.tag")).to_have_count(20)
    assert len(download(page, tmp_path)["decisions"]) == 21


def test_a_browser_that_keeps_nothing_says_so(browser: Browser, out: Path, tmp_path: Path) -> None:
    page = browser.new_page()
    denied = (
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
    )
    page.add_init_script(denied)
    open_report(page, out)
    page.locator("button.thumb").first.click()
    page.keyboard.press("n")
    page.keyboard.press("Escape")
    expect(page.locator("#marked")).to_contain_text("1 pair marked")
    expect(page.locator("#marked")).to_contain_text("forgets marks when the page is closed")
    assert len(download(page, tmp_path)["decisions"]) == 1
    page.close()


def test_what_others_left_in_the_store_does_no_harm(page: Page, out: Path) -> None:
    open_report(page, out)
    store = report.describe_marks(out, manifest.read_run(out)["src"])["store"]
    for text in (
        "{",
        "null",
        "[]",
        '{"a": 1}',
        '{"a": {"key": "x"}, "b": {"key": "<img onerror=x>"}, "verdict": "eh"}',
    ):
        page.evaluate("([name, text]) => localStorage.setItem(name, text)", [f"{store}{text}", text])
    page.reload()
    expect(page.locator("#marked")).to_have_text("No pair is marked yet.")
    expect(page.locator(".group")).to_have_count(1)


def test_another_tab_adds_its_marks(browser: Browser, out: Path) -> None:
    context = browser.new_context()
    one, two = context.new_page(), context.new_page()
    for tab in (one, two):
        open_report(tab, out)
    one.locator("button.thumb").first.click()
    one.keyboard.press("n")
    expect(two.locator("#marked")).to_contain_text("1 pair marked")
    two.locator("button.thumb").last.click()
    two.keyboard.press("c")
    expect(one.locator("#marked")).to_contain_text("2 pairs marked")
    context.close()


def test_from_mark_to_next_run_and_its_report(page: Page, tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    picture(1).save(src / "a.png")
    picture(1).save(src / "b.jpg", quality=85)
    picture(2).save(src / "c.png")
    deduplicate(src, out, Options(), jobs=1)
    report.write_report(out, jobs=1)
    open_report(page, out)
    page.locator("button.thumb").click()
    page.keyboard.press("n")
    page.keyboard.press("Escape")
    download(page, tmp_path)
    run = deduplicate(src, out, Options(), jobs=1, decisions=tmp_path / "decisions.json")
    assert run["counts"]["dropped"] == 0
    report.write_report(out, jobs=1)
    open_report(page, out)
    choose(page, "Look-alikes")
    expect(page.locator("#list .details").last).to_contain_text("decided by a person")
    expect(page.locator(".marked.tag")).to_have_text("you: not a copy")
    assert page.evaluate("localStorage.length") == 0  # the run knows it now
    page.locator("button.thumb").click()
    page.keyboard.press("u")
    page.keyboard.press("Escape")
    expect(page.locator("#marked")).to_contain_text("1 mark is not in the run yet")
    assert list(said(download(page, tmp_path)).values()) == ["undecided"]
    run = deduplicate(src, out, Options(), jobs=1, decisions=tmp_path / "decisions.json")
    assert run["counts"]["dropped"] == 1
    assert "decisions" not in run["counts"]


def test_phone_and_colours(page: Page, out: Path) -> None:
    page.set_viewport_size({"width": 375, "height": 812})
    open_report(page, out)
    page.locator("button.thumb").first.click()
    for button in page.locator("[data-verdict]").all():
        box = button.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 375
        assert box["y"] + box["height"] <= 812  # without scrolling
    page.locator("[data-verdict=copy]").click()
    expect(page.locator("[data-verdict=copy]")).to_have_attribute("aria-pressed", "true")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    page.emulate_media(color_scheme="dark")
    colours = page.locator("[data-verdict=copy]").evaluate(
        "b => [getComputedStyle(b).color, getComputedStyle(b).backgroundColor]"
    )
    assert colours == ["rgb(10, 27, 30)", "rgb(92, 192, 208)"]


@given(st.text(), st.none() | st.text())
def test_what_the_page_is_told_of_marks_closes_nothing(key: str, note: str | None) -> None:
    script = gallery.to_script("marks", {"decisions": [{"a": {"key": key}, "note": note}]})
    assert "<" not in script
    assert json.loads(script.removeprefix("receive(...").removesuffix(");\n"))[1]["decisions"][0]["a"]["key"] == key
