"""The page of what was dropped for pictures outside: in a real browser, with hostile names and captions."""

from pathlib import Path

import polars as pl
import pytest
from playwright.sync_api import Page
from test_dedup_against import jpeg, photo
from test_dedup_base import write
from test_dedup_copies import WEB
from test_dedup_geometry import add_shop_frame

from dedup import against_report, manifest, report
from dedup.options import Options
from dedup.pipeline import deduplicate

HOSTILE = "<img src=x onerror=alert(1)>"
DATASET = {
    "0.jpg": jpeg(photo(0)),
    "0-again.jpg": jpeg(photo(0), 70),
    "1.jpg": jpeg(photo(1)),
    "1.txt": f"{HOSTILE}</script><script>document.title='x'</script>".encode(),
    "2.jpg": jpeg(add_shop_frame(photo(2))),
    "4.jpg": jpeg(photo(4)),
    "4-again.jpg": jpeg(photo(4), 70),
}
TEST_SET = {
    f"{HOSTILE.replace('/', '')}.jpg": jpeg(WEB["crop"](photo(1))),
    "encoded.jpg": jpeg(photo(0), 85),
    "framed.jpg": jpeg(add_shop_frame(photo(3))),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    src, other = write(folder / "src", DATASET), write(folder / "other", TEST_SET)
    single = write(folder / "single", {"4.jpg": DATASET["4.jpg"]}) / "4.jpg"
    deduplicate(src, folder / "out", Options("copy", against=(str(other), str(single))), jobs=1)
    report.write_report(folder / "out", jobs=1)
    against_report.write_report(folder / "out", jobs=1)
    return folder / "out"


def test_each_picture_stands_beside_its_match(out: Path, page: Page) -> None:
    page.goto((out / "report" / "index.html").as_uri())
    page.click("text=look at them")
    assert page.title() == "5 images dropped for pictures outside"
    assert "0 of them" not in page.inner_text("body")
    assert page.locator("#copies li.group").count() == 3
    for place in page.locator("img").all():
        place.scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    crop = page.locator("#copies li.group", has_text="1.jpg")
    assert crop.locator("img").count() == 3  # the difference too
    assert HOSTILE in crop.inner_text()
    assert "(dropped)" in crop.inner_text()
    found = page.locator("#splits tbody tr")
    assert found.count() == 2
    assert found.nth(0).locator("td").nth(3).inner_text() == "2"
    page.set_viewport_size({"width": 375, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_dropped_groups_are_in_no_list_of_duplicates(out: Path, page: Page) -> None:
    assert manifest.read(out).filter(pl.col("reason") == "external").height == 5
    page.goto((out / "report" / "index.html").as_uri())
    assert page.inner_text("h1") == "6 images: 1 kept, 5 removed."
    page.wait_for_selector("text=0 groups")


def test_a_run_without_has_no_such_page(out: Path) -> None:
    run = manifest.read_run(out)
    deduplicate(Path(run["src"]), out, Options("copy"), jobs=1)
    assert against_report.write_report(out) is None
    assert not list((out / "report").glob("against*"))
