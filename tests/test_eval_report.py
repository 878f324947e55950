"""The comparison report in a real browser: it says what happened, whatever happened, and shows it."""

from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
from playwright.sync_api import Page, expect

from dedup import manifest
from eval import figures, report, stats, story
from eval.story import tell_story
from eval.verdict import judge

EVIL = '</title><script>window.pwned=1</script><img src=x onerror="window.pwned=2">'
LEVELS = {0: 2, 1: 2, 2: 3, 32: 3}  # multiplicity → targets


def draw_picture(seed: int) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.imencode(".png", cv2.resize(blocks, (32, 32), interpolation=cv2.INTER_NEAREST))[1].tobytes()


def make_audit(folder: Path, hits: dict[str, int], seeds: tuple[int, ...] = (0,), mode: str | None = "exact") -> Path:
    """An audit made by hand, but for its verdict. hits: arm → how many targets it gives back, most copies first."""
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
            config = {"resolution": 32, "steps": 20, "batch_size": 8, "base": ""}
            record = {"arm": arm, "seed": seed, "config": config, "out": str(out), "rows": 99}
            manifest.write_json(run / "config.json", record | {"versions": {"torch": "2"}})
            made = []
            for place, (target, m) in enumerate(targets):
                given = place < number
                files = [f"generations/{target}-{j}.png" for j in range(8)]
                for j, file in enumerate(files):
                    path = run / file
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(draw_picture(place if given and j < 3 else 1000 + 10 * place + j))
                made.append(pl.DataFrame({"prompt_id": target, "status": "ok", "file": files}))
                row = {"target_id": target, "arm": arm, "seed": seed, "run": str(run), "key": f"{target}.png"}
                row |= {"prompt": f"a picture of {target}", "prompt_kind": "member" if m else "control"}
                row |= {"multiplicity": m, "mode": mode, "delta": 0.1, "delta_edge": 0.05, "n_generations": 8}
                row |= {"matches": 3 * given, "wrong_matches": 0, "n_nan": 0, "training_rows": 99}
                row |= {"by_caption": [{"caption_kind": "survivor", "generations": 8, "matches": 3 * given}]}
                row |= {"best_distance": 0.03 if given else 0.3, "best_file": files[0], "extracted": given}
                row |= {
                    "copies": m if arm == "raw" else 1,
                    "exposures": 9 * m,
                    "clique_size": 3 if given else 1,
                    "clique_k": 3,
                }
                rows.append(row | {"clique_flag": given, "clique_mean_distance": 0.01, "direct": given})
            manifest.write_parquet(run / "generations.parquet", pl.concat(made))
    audit = folder / "audit"
    comparison = pl.DataFrame(rows).with_columns(mode=pl.lit(mode, pl.String))
    manifest.write_parquet(audit / "comparison.parquet", comparison)
    calibration = {"resolution": 32, "delta_edge": 0.05, "n": 400, "literature": [{"delta": 0.05, "share": 0.1}]}
    manifest.write_json(audit / "calibration.json", calibration)
    sources = [{"seed": seed, "calibration_sha256": "ab" * 32} for seed in seeds]
    verdict = judge(comparison, sources, calibration=calibration, generations={"n": 8})
    verdict |= {"failed": [], "utility": {"measured": False, "reason": "nobody asked"}}
    manifest.write_json(audit / "verdict.json", verdict)
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
    told = tell_story(pl.read_parquet(audit / "comparison.parquet"), manifest.read_json(audit / "verdict.json"))
    assert (told["headline"], told["verdict"], told["estimate"]) == (headline, verdict, estimate)
    often = [f"{min(3, number)} of 3" for number in hits.values()]
    assert told["often"] == f"Of those planted 32 times or more it was {often[0]} against {often[1]}."


def test_the_outcome_comes_first(page: Page, tmp_path: Path) -> None:
    open_report(page, make_audit(tmp_path, {"raw": 6, "refill": 0}))
    expect(page.locator("h1")).to_contain_text("The raw model gave back 6 of 6 images")
    expect(page.locator(".lead")).to_contain_text("The refilled model gives back fewer")
    expect(page.locator(".verdict")).to_have_text("fewer given back")
    expect(page.locator(".estimate")).to_have_text("100.0 points fewer")


def test_cases_most_copies_first_and_controls_apart(page: Page, tmp_path: Path) -> None:
    open_report(page, make_audit(tmp_path, {"raw": 4, "refill": 1}))
    heads = page.locator("#gallery .case header b").all_inner_texts()
    assert heads == ["× 32"] * 3 + ["× 2"] * 3 + ["× 1"] * 2
    assert page.locator("#controls .case header b").all_inner_texts() == ["never seen"] * 2
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
    assert raw[:3] == ["raw", "0, 1", "99"]
    assert raw.pop(3) == "8 of 12"
    assert raw[3].replace("\u00a0", " ") == f"66.7 % ({100 * rate.low:.1f} % – {100 * rate.high:.1f} %)"
    assert raw[4:] == ["17.0", "0 of 4", "0 of 4", "24 of 160"]
    words = page.locator("#dose-text").text_content()
    assert words == (
        "raw: 0 of 4 at m = 0, 0 of 4 at m = 1, 2 of 6 at m = 2, 6 of 6 at m = 32. "
        "refill: 0 of 4 at m = 0, 0 of 4 at m = 1, 0 of 6 at m = 2, 0 of 6 at m = 32. "
    )
    expect(page.locator("#threats")).to_contain_text("2 training seeds.")


def test_doublings_stand_equally_far_apart(tmp_path: Path) -> None:
    rows = pl.read_parquet(make_audit(tmp_path, {"raw": 1, "refill": 0}) / "comparison.parquet")
    ticks = {tick["m"]: tick["x"] for tick in figures.draw_dose(rows, ["raw", "refill"])["ticks"]}
    assert ticks[32] - ticks[1] == pytest.approx(5 * (ticks[2] - ticks[1]), abs=0.1)
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
    expect(page.locator("#gallery .thumb", has_text="not found")).to_have_count(8)  # of raw
    shown = {path.read_bytes() for path in (audit / "report" / "images").iterdir()}
    assert draw_picture(77) not in shown


def test_everything_recorded_is_said(page: Page, tmp_path: Path) -> None:
    open_report(page, make_audit(tmp_path, {"raw": 1, "refill": 0}))
    for summary in page.locator("summary").all():
        summary.click()
    for text in ("describes the assignment", "separated", "abab", "smallest drop", "half the", "0.05", "torch"):
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


def test_cliques_show_who_is_alike_and_who_is_a_copy(page: Page, tmp_path: Path) -> None:
    open_report(page, make_audit(tmp_path, {"raw": 2, "refill": 0}))
    strips = page.locator("#cliques .strip")
    expect(strips).to_have_count(2)
    expect(strips.first.locator("li")).to_have_count(9)
    expect(strips.first.locator(".clique")).to_have_count(3)
    expect(strips.first.locator(".hit.clique")).to_have_count(3)
    expect(page.locator("#cliques h3").first).to_contain_text("3 of 8 alike (3 needed)")


def test_a_redacted_page_holds_no_image_no_caption_and_no_path(page: Page, tmp_path: Path) -> None:
    audit = make_audit(tmp_path, {"raw": 4, "refill": 1})
    report.write_report(audit)
    page.goto(report.write_report(audit, redact=True).as_uri())
    assert not list((audit / "report" / "images").glob("*"))
    assert page.locator("main img").count() == 0
    text = page.content()
    for secret in ("a picture of", "t32-0", str(tmp_path)):
        assert secret not in text
    expect(page.locator(".banner")).to_contain_text("left out")
    expect(page.locator("h1")).to_contain_text("gave back 4 of 6")


def test_what_changed_after_looking_is_on_top(page: Page, tmp_path: Path) -> None:
    audit = make_audit(tmp_path, {"raw": 4, "refill": 1})
    verdict = manifest.read_json(audit / "verdict.json")
    verdict["primary"]["declared"] = False
    manifest.write_json(audit / "verdict.json", verdict | {"changed": ["at_least"]})
    open_report(page, audit)
    expect(page.locator(".banner").nth(1)).to_contain_text("Changed after models were trained: at_least")
    expect(page.locator("#contrast h2")).to_have_text("A contrast that was not declared beforehand")
    expect(page.locator("#threats")).to_contain_text("Changed after looking.")


def test_many_arms_stand_in_one_table(page: Page, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 375, "height": 812})
    open_report(page, make_audit(tmp_path, {"raw": 6, "refill": 0, "dedup": 1, "hash": 3, "oracle": 0}))
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    cells = page.locator("#arms table").nth(1).locator("tbody .name").all_inner_texts()
    assert [cell.split("\n") for cell in cells] == [
        ["raw - refill", "declared"],
        ["raw - dedup", "exploratory"],
        ["raw - hash", "exploratory"],
        ["raw - oracle", "exploratory"],
    ]
    detection = page.locator("#arms table").nth(2).locator("tbody tr").all_inner_texts()
    assert [line.split("\t")[0] for line in detection] == ["hash", "refill", "oracle"]
    expect(page.locator("#gallery .case").first.locator("figure")).to_have_count(6)


def test_one_arm_is_reported_without_a_contrast(page: Page, tmp_path: Path) -> None:
    open_report(page, make_audit(tmp_path, {"raw": 4}, mode=None))
    expect(page.locator("h1")).to_have_text("The raw model gave back 4 of 6 images that stand twice or more.")
    expect(page.locator(".lead")).to_contain_text("nothing to compare")
    expect(page.locator("#contrast")).to_have_count(0)


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
    assert story.say_interval(low, high) == words


def test_too_few_images_are_said_with_the_number_it_takes(tmp_path: Path) -> None:
    audit = make_audit(tmp_path, {"raw": 4, "refill": 1})
    rows, verdict = pl.read_parquet(audit / "comparison.parquet"), manifest.read_json(audit / "verdict.json")
    verdict["power"] = verdict["power"] | {"n_clusters": 3, "smallest_drop": None}
    some = manifest.read_json(tmp_path / "raw-0" / "config.json")
    threats = dict(story.list_threats(rows, verdict, some))
    assert "3 such images can show no drop" in threats["Too few images."]
    assert "takes 31 of them" in threats["Too few images."]


def test_counts_over_seeds_say_how_many_images_each_has(tmp_path: Path) -> None:
    audit = make_audit(tmp_path, {"raw": 4, "refill": 1}, seeds=(0, 1))
    told = tell_story(pl.read_parquet(audit / "comparison.parquet"), manifest.read_json(audit / "verdict.json"))
    assert told["counted"] == "Counted over 2 training seeds, with 6 such images in each."
