"""The report of many groups, and of large ones, in a real browser."""

import time
from pathlib import Path

import polars as pl
import pytest
from playwright.sync_api import Page, expect
from test_dedup_report import keys, open_report

from dedup import gallery, manifest, report


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
