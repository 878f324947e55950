"""The report on how alike unrelated pictures are: the curve, the pairs beside the floor, in a real browser."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from playwright.sync_api import Page, expect
from test_dedup_report import EVIL, EVIL_KEY, Dataset, draw_picture, encode, load_images, open_report
from test_dedup_report_overlay import draw_texture

from dedup import pipeline, report, threshold
from dedup.options import Options

FLOOR, PAIRS = 0.3, 4_000_000
ROWS = pl.DataFrame({name: [] for name in ("id", "key", "caption", "thumb")})


@cache
def fit_tail(scale: float) -> threshold.Tail:
    return threshold.fit_tail(np.random.default_rng(0).exponential(scale, 40_000), PAIRS)


@cache
def write_null(scale: float) -> str:
    tail = fit_tail(scale)
    return json.dumps(threshold.describe(tail) | {"expected_at_floor": tail.expected(FLOOR)})


def describe_null(scale: float = 0.05) -> dict[str, Any]:
    """As it comes back from run.json."""
    return json.loads(write_null(scale))


def make_search(**more: Any) -> dict[str, Any]:
    found = {"encoder": "local", "pictures": 2829, "floor": FLOOR, "candidates": 10_432, "series": 0}
    return found | {"recall": 1.0, "accepted": 87, "null": describe_null(), "examples": []} | more


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Six different pictures; the first has a name and a caption that would like to run."""
    data = Dataset(tmp_path)
    for number, key in enumerate([EVIL_KEY, *(f"wild/{number}.png" for number in range(1, 6))]):
        data.add(key, encode(draw_picture(number), ".png"), EVIL if number == 0 else None)
    return data


def pair(a: int, b: int, score: float | None, side: str, accepted: bool = False) -> dict[str, Any]:
    return {"a": a, "b": b, "score": score, "side": side, "accepted": accepted}


EXAMPLES = [pair(0, 1, 0.31, "above", True), pair(0, 2, 0.3012, "above"), pair(4, 5, -0.2, "below")]


def test_the_curve_in_words_and_in_numbers(page: Page, data: Dataset) -> None:
    data.show(page, copy_search=make_search())
    section = page.locator("#unrelated")
    expect(section.locator("h2")).to_have_text("How alike unrelated pictures are")
    expect(section.locator(".note").first).to_contain_text("10,432")
    words = section.locator("desc").text_content() or ""
    expected = report.format_estimate(describe_null()["expected_at_floor"])
    assert f"Floor 0.30: {expected} expected, 10,432 candidates compared, 87 accepted." in words
    lines = section.locator("svg .value").all_text_contents()
    assert lines == ["● floor 0.30", f"{expected} expected", "10,432 compared", "87 accepted"]
    fewest = PAIRS / 40_000 / threshold.FURTHEST
    expect(section).to_contain_text(f"Fewer than {fewest:g} unrelated pairs cannot be claimed")
    expect(section).to_contain_text(f"ends there, at a score of {describe_null()['strictest']:.2f}.")
    expect(page.locator("nav a[href='#unrelated']")).to_be_visible()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mark_stands_on_the_curve_inside_the_frame(page: Page, data: Dataset, side: str) -> None:
    floor = -0.05 if side == "left" else 0.9  # beyond the points of the curve
    null = describe_null() | {"expected_at_floor": fit_tail(0.05).expected(floor)}
    data.show(page, copy_search=make_search(floor=floor, null=null))
    numbers = "points => points.trim().split(/[ ,]/).map(Number)"
    line, band = (
        np.array(page.locator(f"#unrelated .{name}").evaluate(f"node => ({numbers})(node.getAttribute('points'))"))
        for name in ("curve", "band")
    )
    frame = page.locator("#unrelated svg").evaluate("svg => [svg.viewBox.baseVal.width, svg.viewBox.baseVal.height]")
    for points in (line.reshape(-1, 2), band.reshape(-1, 2)):
        assert (points >= 0).all()
        assert (points <= frame).all()
    line = line.reshape(-1, 2)
    assert (np.diff(line[:, 0]) >= 0).all()
    assert (np.diff(line[:, 1]) >= 0).all()  # y grows downwards
    mark = page.locator("#unrelated circle").evaluate("node => [node.cx.baseVal.value, node.cy.baseVal.value]")
    assert mark == pytest.approx(line[0 if side == "left" else -1], abs=0.06)


def test_positions_follow_the_axes() -> None:
    null = describe_null()
    described = report.describe_search(make_search(null=null), ROWS)
    assert described is not None
    chart = described["curve"]
    up = {label: place for place, label in chart["y_ticks"]}
    along = {label: place for place, label in chart["x_ticks"]}
    points = [(FLOOR, null["expected_at_floor"])]
    points += [(point["threshold"], point["expected"]) for point in null["curve"]]
    for (x, y), (score, expected) in zip(chart["line"], sorted(points), strict=True):
        assert y == pytest.approx(up["1"] + (up["100"] - up["1"]) * math.log10(expected) / 2)
        assert x == pytest.approx(along["0.2"] + (along["0.6"] - along["0.2"]) * (score - 0.2) / 0.4)
    assert chart["mark"] in chart["line"]


def test_a_curve_stops_at_the_highest_possible_score() -> None:
    null = describe_null(0.2)
    assert null["strictest"] > 1
    described = report.describe_search(make_search(null=null), ROWS)
    assert described is not None
    assert described["curve"]["limit"] is None
    assert described["curve"]["last"]["threshold"] <= 1


def test_pairs_on_both_sides_of_the_floor(page: Page, data: Dataset) -> None:
    data.show(page, copy_search=make_search(examples=EXAMPLES))
    above, below = page.locator("#unrelated .examples").all()
    assert above.locator("li p").all_inner_texts() == ["0.310 copy", "0.301 no copy"]
    assert below.locator("li p").all_inner_texts() == ["−0.200 no copy"]
    images = load_images(page.locator("#unrelated .examples img"), 6)
    assert set(images.evaluate_all("images => images.map(image => image.width / image.height)")) == {1}
    assert images.evaluate_all("images => images.map(image => image.alt)")[:2] == [EVIL, "wild/1.png"]
    assert page.locator("#unrelated .thumb").first.get_attribute("title") == EVIL_KEY
    assert page.evaluate("window.pwned") is None
    assert len(list((data.out / "report" / "thumbs").glob("*/*.jpg"))) == 5
    index = (data.out / "report" / "data" / "index.js").read_text()
    assert json.loads(index.removeprefix("receive(...").removesuffix(");\n"))[1]["size"] == []  # in no group


def test_few_pictures_have_no_curve_but_examples(page: Page, data: Dataset) -> None:
    error = {"error": "a null model needs 1,000 finite scores of <unrelated> pairs, there are 15"}
    data.show(page, copy_search=make_search(null=error, examples=[pair(0, 1, None, "above", True)]))
    section = page.locator("#unrelated")
    expect(section.locator(".note").first).to_contain_text(f"not known here: {error['error']}.")
    assert section.locator("svg").count() == 0
    assert section.locator("li").all_inner_texts() == ["no score copy", "There are none."]


def test_what_the_sample_does_not_support_is_said(page: Page, data: Dataset) -> None:
    data.show(page, copy_search=make_search(supported=False, series=1200, recall=0.987))
    expect(page.locator("#unrelated .banner")).to_contain_text("the floor is the strictest score that it supports")
    expect(page.locator("#unrelated")).to_contain_text("98.7\u00a0% of them were found")
    expect(page.locator("#unrelated")).to_contain_text("copies had to agree everywhere")


@pytest.mark.parametrize("search", [None, {}, {"floor": 0.1}, make_search(null={})])
def test_other_runs_have_no_such_section(page: Page, data: Dataset, search: dict | None) -> None:
    data.show(page, **({} if search is None else {"copy_search": search}))
    assert page.locator("#unrelated, a[href='#unrelated']").count() == 0


def test_a_phone_and_the_dark(page: Page, data: Dataset) -> None:
    page.set_viewport_size({"width": 375, "height": 812})
    page.emulate_media(color_scheme="dark")
    data.show(page, copy_search=make_search(examples=EXAMPLES))
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    fill = "node => getComputedStyle(node).fill"
    assert page.locator("#unrelated svg .value").last.evaluate(fill) == "rgb(233, 232, 228)"
    assert page.locator("#unrelated svg .band").evaluate(fill) == "rgb(92, 192, 208)"


def test_a_run_records_what_the_section_needs(page: Page, tmp_path: Path) -> None:
    data = Dataset(tmp_path)
    for number in range(50):
        data.add_picture(f"{number}.png", draw_texture(number, 96, 128))
    pipeline.deduplicate(data.src, data.out, Options(level="copy", encoder="local"), jobs=1)
    report.write_report(data.out, jobs=1)
    open_report(page, data.out)
    recorded = json.loads((data.out / "run.json").read_text())["counts"]["copy_search"]
    expect(page.locator("#unrelated")).to_contain_text(f"compared in detail ({recorded['candidates']:,})")
    assert len(recorded["examples"]) == page.locator("#unrelated .examples div").count() > 0


def test_equal_runs_give_equal_pages(data: Dataset) -> None:
    out = data.write(copy_search=make_search(examples=EXAMPLES))
    pages = [report.write_report(out, jobs=jobs).read_bytes() for jobs in (1, 2)]
    assert pages[0] == pages[1]


def test_examples_come_first_when_thumbnails_are_few(data: Dataset) -> None:
    data.drop(data.add("shop/copy.png", encode(draw_picture(3), ".png"), None), 3, "bytes")
    out = data.write(copy_search=make_search(examples=EXAMPLES[:1]))
    text = report.write_report(out, jobs=1, thumbnails=2).read_text()
    assert "no thumbnail" not in text
    assert "2 of 3 different pictures have a thumbnail" in text


@pytest.mark.parametrize(
    ("value", "text"), [(33_931.03, "34,000"), (0.0308, "0.031"), (9.96, "10"), (1.0, "1"), (4.75e6, "4,800,000")]
)
def test_estimates_have_two_digits(value: float, text: str) -> None:
    assert report.format_estimate(value) == text
