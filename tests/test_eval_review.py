"""The review of removals: page, labels, and what they say of the run, in a real browser and by the program."""

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from test_dedup_pipeline import picture
from test_dedup_report import EVIL, EVIL_KEY, Dataset, draw_picture, encode, load_images
from test_dedup_report_overlay import draw_texture
from typer.testing import CliRunner, Result

from dedup import manifest, marks
from dedup.options import Options
from dedup.pipeline import deduplicate
from eval.cli import app
from eval.precision import SampleError
from eval.review import judge, write_review


def unmemorize(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def page(page: Page) -> Page:
    """Without what an earlier test had labelled: all pages on disk share one store."""
    page.goto((Path(__file__).parent / "conftest.py").as_uri())
    page.evaluate("localStorage.clear()")
    return page


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Four removals to look at (one laid over, one mirrored, one with names that would run), and one of equal bytes."""
    data = Dataset(tmp_path)
    owl = data.add("owl.png", encode(draw_picture(1), ".png"), "an owl")
    data.drop(data.add("same.png", encode(draw_picture(1), ".png"), None), owl, "bytes")
    data.drop(data.add(EVIL_KEY, encode(draw_picture(1), ".jpg"), EVIL), owl, "pdq", 6, 0.02)
    data.drop(data.add("small.png", encode(draw_picture(1, 32), ".png"), None), owl, "pdq", 30, 0.02)
    mirrored = data.add("mirrored.png", encode(draw_picture(1)[:, ::-1], ".png"), None)
    data.drop(mirrored, owl, "pdq", 2, 0.0)
    data.pairs[-1]["orientation"] = "m0"
    whole = data.add_picture("whole.png", draw_texture(1))
    crop = data.add_picture("crop.png", draw_texture(1)[60:200, 90:290])
    data.lay(whole, crop, "copy")
    data.settle(crop, whole)
    data.rows[crop] |= {"signal": "copy", "score": 0.9, "class": "copy"}
    return data


def open_review(page: Page, folder: Path) -> Page:
    page.goto((folder / "index.html").as_uri())
    expect(page.locator("#status")).to_contain_text("labelled")
    return page


def download(page: Page, path: Path) -> dict[str, Any]:
    with page.expect_download() as waiting:
        page.locator("#download").click()
    assert waiting.value.suggested_filename == "labels.json"
    waiting.value.save_as(path)
    return marks.read_marks(path)


def test_a_key_labels_and_shows_the_next(page: Page, data: Dataset, tmp_path: Path) -> None:
    out, folder = data.write(), tmp_path / "review"
    sample = write_review(out, folder, jobs=1)
    assert {row["signal"]: row["removals"] for row in sample["strata"] if row["signal"] != "pdq"} == {
        "bytes": 1,
        "copy": 1,
    }
    open_review(page, folder)
    expect(page.locator("#status")).to_have_text("Pair 1 of 4. 0 labelled.")
    expect(page.locator("#download")).to_be_disabled()
    page.set_viewport_size({"width": 1280, "height": 600})  # a low screen: the buttons stay in sight
    box = page.locator("[data-verdict=copy]").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= 600
    shown = []
    for key in "sdus":
        shown.append(page.locator("#sides .key-line").last.text_content())
        page.keyboard.press(key)
    assert sorted(shown) == sorted([EVIL_KEY, "small.png", "mirrored.png", "crop.png"])
    assert shown == [pair["b"]["key"] for pair in sample["sample"]]
    expect(page.locator("#status")).to_contain_text("4 labelled: 2 same, 1 different, 1 unsure. That is all")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("s")  # another opinion: nothing is left to go to
    expect(page.locator("#status")).to_contain_text("Pair 3 of 4. 4 labelled: 3 same, 1 different, 0 unsure.")
    page.keyboard.press("u")
    page.reload()
    expect(page.locator("#status")).to_contain_text("4 labelled: 2 same, 1 different, 1 unsure.")
    content = download(page, tmp_path / "labels.json")
    assert content["digest"] == sample["digest"]
    assert content["review"] == {"n": 100, "seed": 0}
    verdicts = {mark[end]["key"]: mark["verdict"] for mark in content["decisions"] for end in "ab"}
    assert [verdicts[key] for key in shown] == ["copy", "not-a-copy", "undecided", "copy"]
    assert page.evaluate("window.pwned") is None


def test_pairs_are_drawn_as_in_the_report(page: Page, data: Dataset, tmp_path: Path) -> None:
    data.pack()  # pictures in an archive: the page has its own
    write_review(data.write(), tmp_path / "review", jobs=1)
    open_review(page, tmp_path / "review")
    page.set_viewport_size({"width": 375, "height": 812})
    for _ in range(4):
        load_images(page.locator("#sides img"), 4)
        key = page.locator("#sides .key-line").last.text_content()
        assert page.locator(".outline").count() == (2 if key == "crop.png" else 0)
        if key == "crop.png":
            page.keyboard.press("o")
            expect(page.locator(".views button").last).to_have_attribute("aria-pressed", "true")
            width = page.locator("#sides img").first.evaluate("image => image.naturalWidth")
            assert width == 320  # all that there is
        if key == "mirrored.png":
            turned = page.locator(".difference img").first.evaluate("image => image.style.transform")
            assert turned == "scaleX(-1)"
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        for button in page.locator("[data-verdict]").all():
            box = button.bounding_box()
            assert box is not None
            assert box["y"] + box["height"] <= 812
        page.keyboard.press("ArrowRight")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 21, 20)"


def label(folder: Path, path: Path, *wrong: str, **more: object) -> Path:
    """Labels as the page gives them: these keys are different."""
    sample = manifest.read_json(folder / "sample.json")
    said = [
        {"a": pair["a"], "b": pair["b"], "verdict": "not-a-copy" if pair["b"]["key"] in wrong else "copy"}
        for pair in sample["sample"]
    ]
    content = {"version": 1, "digest": sample["digest"], "review": sample["review"], "decisions": said}
    manifest.write_json(path, content | more)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run: OUT, with SRC beside it."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "src").mkdir()
    for number in range(4):
        picture(number).save(folder / "src" / f"{number}.png")
        picture(number).save(folder / "src" / f"{number}-again.jpg", quality=85)
        picture(number, 100).save(folder / "src" / f"{number}-small.png")
    deduplicate(folder / "src", folder / "out", Options(), jobs=1)
    return folder / "out"


def test_from_labels_to_precision_and_back_into_the_run(photos: Path, tmp_path: Path) -> None:
    drawn = unmemorize("review", photos, "-n", 8, "--seed", 3, "-o", tmp_path / "review", "--jobs", 1)
    assert drawn.exit_code == 0, drawn.output
    assert drawn.stdout.startswith("8 of 8 removals to label: ")
    before = (tmp_path / "review" / "sample.json").read_bytes()
    unmemorize("review", photos, "-n", 8, "--seed", 3, "-o", tmp_path / "review", "--jobs", 1)
    assert (tmp_path / "review" / "sample.json").read_bytes() == before
    labels = label(tmp_path / "review", tmp_path / "labels.json", "2-again.jpg")
    words = ("review", photos, "-o", tmp_path / "review", "--labels", labels)
    text = unmemorize(*words).stdout
    assert text.startswith("All: 87.5% (")
    assert "of 8 removals are right; wrong per million: 125,000 (" in text
    assert "pdq, score 0.97 or more" in text
    assert "decided again" not in text
    found = json.loads(unmemorize(*words, "--json").stdout)
    assert found["overall"]["precision"] == pytest.approx(7 / 8)
    assert found["strata"][0]["name"].startswith("pdq, score")
    again = ("dedup", photos.parent / "src", "-o", photos, "--jobs", 1, "--no-report", "--decisions", labels)
    done = unmemorize(*again)
    assert "Marked by hand: 7 copies, 1 that are none." in done.stdout
    rows = {row["key"]: row for row in manifest.read(photos).iter_rows(named=True)}
    assert rows["2-again.jpg"]["keep"]
    assert rows["1-again.jpg"]["reason"] == "decision"
    assert "OUT has been decided again" in unmemorize(*words).stdout
    later = write_review(photos, tmp_path / "later", jobs=1)
    assert [row["signal"] for row in later["strata"]] == ["decision"]


def test_labels_of_something_else_are_refused(data: Dataset, tmp_path: Path) -> None:
    out, folder = data.write(), tmp_path / "review"
    with pytest.raises(SampleError, match="holds no sample"):
        judge(out, folder, tmp_path / "labels.json")
    sample = write_review(out, folder, n=4, jobs=1)
    stranger = {"a": sample["sample"][0]["a"] | {"sha256": "0" * 64}, "b": sample["sample"][0]["b"], "verdict": "copy"}
    for more, says in [
        ({"review": None}, "is no sample"),
        ({"review": {"n": 4, "seed": 1}}, "labels another sample"),
        ({"digest": "0" * 64}, "labels another sample"),
        ({"decisions": [stranger]}, "1 of its pairs are not in the sample"),
    ]:
        with pytest.raises(SampleError, match=says):
            judge(out, folder, label(folder, tmp_path / "labels.json", **more))
    (tmp_path / "labels.json").write_text('{"version": 1, "review": {"n": NaN}, "decisions": []}')
    with pytest.raises(marks.MarksError, match="NaN is no number"):
        judge(out, folder, tmp_path / "labels.json")
    nothing = judge(out, folder, label(folder, tmp_path / "labels.json", decisions=[]))
    assert nothing["overall"]["precision"] is None
    assert nothing["left"] == 4


def test_too_little_for_a_sample(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="1 pairs are too few: there are"):
        write_review(data.write(), tmp_path / "review", n=1, jobs=1)
    other = Dataset(tmp_path / "other")
    owl = other.add("owl.png", encode(draw_picture(1), ".png"), None)
    other.drop(other.add("same.png", encode(draw_picture(1), ".png"), None), owl, "bytes")
    with pytest.raises(SampleError, match="removed nothing but equal bytes \\(1\\)"):
        write_review(other.write(), tmp_path / "review", jobs=1)
    with pytest.raises(manifest.ManifestError, match="no finished dedup run"):
        write_review(tmp_path, tmp_path / "review")


def test_a_source_that_is_gone_is_said(page: Page, data: Dataset, tmp_path: Path) -> None:
    out = data.write()
    data.src.rename(tmp_path / "elsewhere")
    write_review(out, tmp_path / "review", jobs=1)
    open_review(page, tmp_path / "review")
    expect(page.locator("#about")).to_contain_text("could not be read again")
    expect(page.locator("#sides")).to_contain_text("no thumbnail")
