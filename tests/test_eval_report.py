"""The comparison report in a real browser: it says what happened, whatever happened, and shows it."""

import math
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
from playwright.sync_api import Page, expect

from dedup import manifest
from eval import report, stats

EVIL = '</title><script>window.pwned=1</script><img src=x onerror="window.pwned=2">'
LEVELS = {0: 2, 1: 2, 2: 3, 16: 3}  # multiplicity → targets


def draw_picture(seed: int) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.imencode(".png", cv2.resize(blocks, (32, 32), interpolation=cv2.INTER_NEAREST))[1].tobytes()


def make_audit(folder: Path, hits: dict[str, int], seeds: tuple[int, ...] = (0,)) -> Path:
    """An audit made by hand. hits: arm → how many targets it gives back, those planted most often first."""
    src, out = folder / "src", folder / "out"
    src.mkdir(parents=True)
    targets = [(f"t{m}-{n}", m) for m, number in sorted(LEVELS.items(), reverse=True) for n in range(number)]
    keys = [f"{target}.png" for target, _ in targets]
    for number, key in enumerate(keys):
        (src / key).write_bytes(draw_picture(number))
    ids = pl.int_range(len(keys), eager=True)
    location = {"source": "src", "offset": 0, "size": 1, "status": "ok", "keep": True, "represents": 1}
    table = pl.DataFrame({"id": ids, "key": keys, "cluster_id": ids, "component_id": ids})
    manifest.write(out, manifest.conform(table.with_columns(**{k: pl.lit(v) for k, v in location.items()})))
    manifest.write_json(out / "run.json", {"src": str(src)})
    rows = []
    for arm, number in hits.items():
        for seed in seeds:
            run = folder / f"{arm}-{seed}"
            config = {"resolution": 32, "steps": 20, "batch_size": 8}
            record = {
                "arm": arm,
                "seed": seed,
                "config": config,
                "out": str(out),
                "rows": 99,
                "versions": {"torch": "2"},
            }
            manifest.write_json(run / "config.json", record)
            for place, (target, m) in enumerate(targets):
                file = f"generations/{target}.png"
                path = run / file
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(draw_picture(place if place < number else 1000 + place))
                given = place < number
                row = {"target_id": target, "arm": arm, "seed": seed, "run": str(run), "key": f"{target}.png"}
                row |= {"prompt": f"a picture of {target}", "prompt_kind": "member" if m else "control"}
                row |= {
                    "multiplicity": m,
                    "mode": "exact",
                    "delta": 0.1,
                    "n_generations": 8,
                    "matches": 3 * given,
                }
                row |= {"best_distance": 0.03 if given else 0.3, "best_file": file, "extracted": given}
                rows.append(row | {"clique_size": 3, "direct": given})
    audit = folder / "audit"
    manifest.write_parquet(audit / "comparison.parquet", pl.DataFrame(rows))
    n = len([m for _, m in targets if m > 1])
    first, second = (min(n, number) for number in list(hits.values())[:2])
    effect = stats.risk_difference(max(0, first - second), max(0, second - first), n)
    primary = {"contrast": "raw - refill", "estimate": effect.estimate, "interval": [effect.low, effect.high]}
    primary |= {
        "level": 0.95,
        "method": effect.method,
        "n_clusters": n,
        "seeds": len(seeds),
        "p_value": effect.p_value,
    }
    verdict = {"primary": primary, "arms": list(hits), "label": "describes these checkpoints", "per_seed": []}
    verdict |= {
        "control": {"prompts": 2, "hits": 0},
        "power": {"smallest_drop": 0.4},
        "delta": "half the way",
    }
    verdict |= {
        "calibration_sha256": "ab" * 32,
        "dose_response": {"raw": {"ed50": math.nan, "reason": "separated"}},
    }
    manifest.write_json(audit / "verdict.json", verdict | {"exploratory": {"thresholds": [{"delta": 0.05, "raw": 1}]}})
    manifest.write_json(audit / "calibration.json", {"resolution": 32, "delta": 0.11, "n": 400})
    return audit


def open_report(page: Page, audit: Path) -> Page:
    page.goto(report.write_report(audit).as_uri())
    return page


@pytest.mark.parametrize(
    ("hits", "headline", "verdict", "estimate"),
    [
        (
            {"raw": 6, "refill": 0},
            "The raw model gave back 6 of 6 images planted twice or more; the refilled model 0 of 6.",
            "fewer given back",
            "100.0 points fewer",
        ),
        (
            {"raw": 0, "refill": 6},
            "The raw model gave back 0 of 6 images planted twice or more; the refilled model 6 of 6.",
            "more given back",
            "100.0 points more",
        ),
        (
            {"raw": 2, "dedup": 1},
            "The raw model gave back 2 of 6 images planted twice or more; the deduplicated model 1 of 6.",
            "no difference shown",
            "16.7 points fewer",
        ),
        (
            {"raw": 0, "refill": 0},
            "Neither model gave back any of the 6 images planted twice or more.",
            "nothing to compare",
            "no difference",
        ),
        (
            {"raw": 4, "oracle": 4},
            "Both models gave back 4 of the 6 images planted twice or more.",
            "no difference shown",
            "no difference",
        ),
    ],
)
def test_every_outcome_is_told(
    tmp_path: Path, hits: dict[str, int], headline: str, verdict: str, estimate: str
) -> None:
    audit = make_audit(tmp_path, hits)
    rows, primary = (
        pl.read_parquet(audit / "comparison.parquet"),
        manifest.read_json(audit / "verdict.json")["primary"],
    )
    story = report.tell_story(rows, list(hits), primary)
    assert (story["headline"], story["verdict"], story["estimate"]) == (headline, verdict, estimate)
    often = [f"{min(3, number)} of 3" for number in hits.values()]
    assert story["often"] == f"Of those planted 16 times or more it was {often[0]} against {often[1]}."


def test_the_outcome_comes_first(page: Page, tmp_path: Path) -> None:
    open_report(page, make_audit(tmp_path, {"raw": 6, "refill": 0}))
    expect(page.locator("h1")).to_contain_text("The raw model gave back 6 of 6 images")
    expect(page.locator(".lead")).to_contain_text("The refilled model gives back fewer")
    expect(page.locator(".verdict")).to_have_text("fewer given back")
    expect(page.locator(".estimate")).to_have_text("100.0 points fewer")


def test_cases_most_copies_first_and_controls_apart(page: Page, tmp_path: Path) -> None:
    open_report(page, make_audit(tmp_path, {"raw": 4, "refill": 1}))
    heads = page.locator("#gallery .case header b").all_inner_texts()
    assert heads == ["× 16"] * 3 + ["× 2"] * 3 + ["× 1"] * 2
    assert page.locator("#controls .case header b").all_inner_texts() == ["never planted"] * 2
    first = page.locator("#gallery .case").first
    expect(first.locator("figcaption b")).to_have_text(["original", "raw", "refill"])
    expect(first.locator(".hit")).to_have_count(2)
    second = page.locator("#gallery .case").nth(1)
    expect(second.locator("figcaption").nth(2)).to_contain_text("not given back")
    expect(second.locator(".hit figcaption")).to_contain_text(["distance 0.030"])
    for image in first.locator("img").all():
        image.scroll_into_view_if_needed()
        expect(image).to_have_js_property("naturalWidth", 32)
        assert image.get_attribute("alt")


def test_table_and_chart_agree_with_the_rows(page: Page, tmp_path: Path) -> None:
    audit = make_audit(tmp_path, {"raw": 4, "refill": 0}, seeds=(0, 1))
    open_report(page, audit)
    raw = page.locator("#arms tbody tr").first.locator("td").all_inner_texts()
    rate = stats.wilson(8, 12)
    assert raw[:3] == ["raw", "0, 1", "8 of 12"]
    assert raw[3].replace("\u00a0", " ") == f"66.7 % ({100 * rate.low:.1f} % – {100 * rate.high:.1f} %)"
    assert raw[4:] == ["0 of 4", "0 of 4", "24 of 160"]
    words = page.locator("#dose-text").text_content()
    assert words == (
        "raw: 0 of 4 at m = 0, 0 of 4 at m = 1, 2 of 6 at m = 2, 6 of 6 at m = 16. "
        "refill: 0 of 4 at m = 0, 0 of 4 at m = 1, 0 of 6 at m = 2, 0 of 6 at m = 16. "
    )
    expect(page.locator("#threats")).to_contain_text("2 training seeds.")


def test_doublings_stand_equally_far_apart(tmp_path: Path) -> None:
    rows = pl.read_parquet(make_audit(tmp_path, {"raw": 1, "refill": 0}) / "comparison.parquet")
    ticks = {tick["m"]: tick["x"] for tick in report.draw_dose(rows, ["raw", "refill"])["ticks"]}
    assert ticks[16] - ticks[1] == pytest.approx(4 * (ticks[2] - ticks[1]), abs=0.1)
    assert ticks[0] < ticks[1]


def test_untrusted_prompts_and_paths(page: Page, tmp_path: Path) -> None:
    audit = make_audit(tmp_path, {"raw": 1, "refill": 0})
    rows = pl.read_parquet(audit / "comparison.parquet")
    (tmp_path / "secret.png").write_bytes(draw_picture(77))
    outside = pl.when(pl.col("arm") == "raw").then(pl.lit("../secret.png")).otherwise("best_file")
    manifest.write_parquet(audit / "comparison.parquet", rows.with_columns(prompt=pl.lit(EVIL), best_file=outside))
    open_report(page, audit)
    page.wait_for_timeout(50)  # what was planted would load at once
    assert page.evaluate("window.pwned") is None
    assert page.locator("#gallery .case > p").first.text_content() == EVIL
    expect(page.locator("#gallery .thumb", has_text="not found")).to_have_count(8)
    shown = {path.read_bytes() for path in (audit / "report" / "images").iterdir()}
    assert draw_picture(77) not in shown


def test_everything_recorded_is_said(page: Page, tmp_path: Path) -> None:
    open_report(page, make_audit(tmp_path, {"raw": 1, "refill": 0}))
    for summary in page.locator("summary").all():
        summary.click()
    for text in (
        "describes these checkpoints",
        "separated",
        "abab",
        "smallest drop",
        "half the way",
        "0.05",
        "torch",
    ):
        expect(page.locator("main")).to_contain_text(text)
    expect(page.locator(".banner")).to_contain_text("training images")
    expect(page.locator("#threats")).to_contain_text("One training seed.")


def test_credit_of_the_demo(page: Page, tmp_path: Path) -> None:
    audit = make_audit(tmp_path, {"raw": 1, "refill": 0})
    manifest.write_json(tmp_path / "src" / "demo.json", {"licence": "Drawings by OpenMoji, CC BY-SA 4.0"})
    open_report(page, audit)
    expect(page.locator("footer")).to_contain_text("Drawings by OpenMoji, CC BY-SA 4.0")


def test_phone_and_words_for_pictures(page: Page, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 375, "height": 812})
    open_report(page, make_audit(tmp_path, {"raw": 5, "refill": 1}))
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    assert page.locator(".scale").get_attribute("aria-label") == (
        "66.7 points fewer; interval: " + page.locator(".card .small").inner_text().split(": ")[1].split(";")[0]
    )


def test_equal_audits_give_equal_pages_and_leave_nothing_behind(tmp_path: Path) -> None:
    audit = make_audit(tmp_path, {"raw": 2, "refill": 1})
    stale = audit / "report" / "images" / "old.png"
    stale.parent.mkdir(parents=True)
    stale.touch()
    report.write_report(audit)
    assert not stale.exists()
    before = {path: path.read_bytes() for path in (audit / "report").rglob("*.*")}
    report.write_report(audit)
    assert {path: path.read_bytes() for path in (audit / "report").rglob("*.*")} == before


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.242, 0.53, "24.2 to 53.0 points fewer"),
        (-0.53, -0.242, "24.2 to 53.0 points more"),
        (-0.05, 0.12, "5.0 points more to 12.0 points fewer"),
        (0.0, 0.12, "no difference to 12.0 points fewer"),
    ],
)
def test_intervals_in_words(low: float, high: float, words: str) -> None:
    assert report.say_interval(low, high) == words
