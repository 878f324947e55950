"""The page that labels generations: blind, in a real browser; and what the labels say of the attack."""

import json
from pathlib import Path

import polars as pl
import pytest
from playwright.sync_api import Page, expect
from test_dedup_report import EVIL, load_images
from test_eval_review import download, open_review, unmemorize
from test_eval_targets import RESOLUTION, make_planted, make_run, paint, write_generations

from eval.extraction import attack
from eval.labels import SampleError, judge_labels, rank_scores, write_labels
from eval.reference import load_pixels
from eval.targets import load_targets


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("labels"), edited=0.0)


@pytest.fixture
def run(out, tmp_path):
    """Canaries that stand twice or more come back, the others are answered with something else."""
    run = make_run(tmp_path, out)
    targets = load_targets(out)
    known = dict(zip(targets["target_id"], load_pixels(out, targets, RESOLUTION), strict=True))
    write_generations(
        run, out, lambda t, j: known[t["target_id"]] if t["multiplicity"] >= 2 else paint(900 + j, RESOLUTION), n=4
    )
    generations = pl.read_parquet(run / "generations.parquet").with_columns(prompt=pl.lit(EVIL))
    generations.write_parquet(run / "generations.parquet")
    attack(run)
    return run


@pytest.fixture
def page(page: Page) -> Page:
    """Without what an earlier test had labelled: all pages on disk share one store."""
    page.goto((Path(__file__).parent / "conftest.py").as_uri())
    page.evaluate("localStorage.clear()")
    return page


def test_the_page_is_blind_and_its_labels_come_back(page: Page, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    sample = write_labels(run, folder)
    open_review(page, folder)
    ranks = [pair["rank"] for pair in sample["sample"]]
    assert sorted(ranks) == list(range(1, 9))
    assert ranks != sorted(ranks)
    told = (folder / "index.html").read_text() + (folder / "data" / "sample.js").read_text()
    assert "rank" not in (folder / "data" / "sample.js").read_text()
    assert "control" not in (folder / "data" / "sample.js").read_text()
    assert "<img src=x" not in told
    for width in (1280, 375):
        page.set_viewport_size({"width": width, "height": 812})
        load_images(page.locator("#sides img"), 4)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#sides .key-line:visible").count() == 0
    assert page.locator("#sides .details:visible").all_text_contents() == [
        "Difference, four times as bright: black where both agree."
    ]
    for pair in sample["sample"]:
        expect(page.locator("#sides .key-line").first).to_have_text(pair["a"]["key"])
        page.keyboard.press("s" if pair["extracted"] else "d")
    expect(page.locator("#status")).to_contain_text("8 labelled: 4 same, 4 different, 0 unsure. That is all")
    download(page, tmp_path / "labels.json")
    found = judge_labels(run, folder, tmp_path / "labels.json")
    assert (found["copies"], found["near"], found["false"]) == (4, 0, 0)
    assert found["verdicts"]["extracted"]["precision"]["estimate"] == 1
    assert found["verdicts"]["extracted"]["recall"]["estimate"] == 1
    assert found["controls"]["same"] == 0
    assert found["copies_before_the_first_error"] == 4
    assert page.evaluate("window.pwned") is None
    done = unmemorize("review", run, "-o", folder, "--labels", tmp_path / "labels.json")
    assert "8 of 8 labelled: 4 copies, 0 of them outside δ (near); 0 called extracted are none" in done.stdout


def answer(sample: dict, path: Path, verdict) -> Path:
    decisions = [
        {"a": pair["a"], "b": pair["b"], "verdict": said}
        for pair in sample["sample"]
        if (said := verdict(pair)) is not None
    ]
    content = {"version": 1, "digest": sample["digest"], "review": sample["review"], "decisions": decisions}
    path.write_text(json.dumps(content))
    return path


def test_labels_find_what_the_program_calls_wrong(run, tmp_path):
    """Everything is a copy to this labeller but the first; the last is unsure."""
    sample = write_labels(run, tmp_path / "page")
    said = {1: "not-a-copy", 8: "undecided"}
    found = judge_labels(
        run, tmp_path / "page", answer(sample, tmp_path / "l.json", lambda p: said.get(p["rank"], "copy"))
    )
    assert (found["labelled"], found["copies"], found["near"], found["false"]) == (8, 6, 3, 1)
    assert found["copies_before_the_first_error"] == 0
    extracted = found["verdicts"]["extracted"]
    assert extracted["precision"]["estimate"] == pytest.approx(3 / 4)
    assert extracted["recall"]["estimate"] == pytest.approx(3 / 6)
    assert extracted["precision"]["low"] < 3 / 4 < extracted["precision"]["high"]
    assert found["ranking"][-1]["undecided"] == 1


def test_ranks_are_those_of_tightness(run):
    ranked = rank_scores(pl.read_parquet(run / "scores-clique.parquet"))
    assert ranked["clique_flag"].to_list() == sorted(ranked["clique_flag"], reverse=True)
    loose = ranked.filter(~pl.col("clique_flag"))["best_distance"]
    assert loose.to_list() == sorted(loose)


def test_labels_of_something_else_are_refused(run, tmp_path):
    with pytest.raises(SampleError, match="holds no sample: run `unmemorize review"):
        judge_labels(run, tmp_path / "page", tmp_path / "l.json")
    sample = write_labels(run, tmp_path / "page")
    labels = answer(sample | {"digest": "0" * 64}, tmp_path / "l.json", lambda pair: "copy")
    with pytest.raises(SampleError, match="labels another sample"):
        judge_labels(run, tmp_path / "page", labels)
    with pytest.raises(SampleError, match="labels nothing"):
        judge_labels(run, tmp_path / "page", answer(sample, tmp_path / "l.json", lambda pair: None))
    labels = answer(sample, tmp_path / "l.json", lambda pair: "copy")
    pl.read_parquet(run / "scores-clique.parquet").head(3).write_parquet(run / "scores-clique.parquet")
    with pytest.raises(SampleError, match="attacked again"):
        judge_labels(run, tmp_path / "page", labels)
    (run / "scores-clique.parquet").unlink()
    with pytest.raises(SampleError, match="was not attacked"):
        write_labels(run, tmp_path / "page")
