"""eval.utility, eval.capacity, and doses of compare. Features are made up; encoders have tests of their own."""

import json

import numpy as np
import polars as pl
import pytest
from playwright.sync_api import Page, expect
from test_eval_targets import make_plain, make_planted, make_run

from dedup import manifest
from dedup.plant import plant
from eval.capacity import count_parameters, describe, fit_slope, fit_width
from eval.capacity_report import write_capacity_report
from eval.metrics import kid, kid_difference
from eval.recipe import Recipe, Sampling, Utility
from eval.story import count
from eval.utility import FEATURES, encode, judge_utility, measure_utility, read_held_out


def draw(rng: np.random.Generator, n: int, shift: float = 0.0) -> np.ndarray:
    """Features with rows of length √16."""
    x = rng.normal(size=(n, 16)) + shift
    return 4 * x / np.linalg.norm(x, axis=1, keepdims=True)


def test_the_difference_is_that_of_the_two_distances():
    rng = np.random.default_rng(0)
    x, y, z = draw(rng, 60), draw(rng, 60, 0.4), draw(rng, 50)
    found = kid_difference(x, y, z)
    assert found.estimate == pytest.approx(kid(y, z, "e").estimate - kid(x, z, "e").estimate)
    assert kid_difference(y, x, z).estimate == pytest.approx(-found.estimate)
    assert found.low > 0


def test_its_error_is_that_of_leaving_each_row_out():
    rng = np.random.default_rng(1)
    x, y, z = draw(rng, 12), draw(rng, 12, 0.3), draw(rng, 9)
    pairs = np.array([kid_difference(np.delete(x, i, 0), np.delete(y, i, 0), z).estimate for i in range(12)])
    rows = np.array([kid_difference(x, y, np.delete(z, j, 0)).estimate for j in range(9)])
    error = np.sqrt(11 * pairs.var() + 8 * rows.var())
    found = kid_difference(x, y, z)
    assert found.high - found.estimate == pytest.approx(1.959964 * error, rel=1e-5)


def test_the_interval_covers_no_difference():
    rng = np.random.default_rng(2)
    held = []
    for _ in range(150):
        common = rng.normal(size=(80, 16))
        x, y = (common + 0.5 * rng.normal(size=(80, 16)) for _ in range(2))  # one prompt, one noise
        effect = kid_difference(*(4 * f / np.linalg.norm(f, axis=1, keepdims=True) for f in (x, y)), draw(rng, 80))
        held.append(effect.low <= 0 <= effect.high)
    assert 0.9 <= np.mean(held) <= 1


def test_features_that_are_no_pairs_are_refused():
    rng = np.random.default_rng(3)
    with pytest.raises(ValueError, match="must be pairs"):
        kid_difference(draw(rng, 5), draw(rng, 6), draw(rng, 5))


def write_run(folder, arm: str, seed: int, drawn: np.ndarray, held_out: np.ndarray):
    run = folder / f"{arm}-{seed}"
    manifest.write_json(run / "config.json", {"arm": arm, "seed": seed})
    np.savez(run / FEATURES, drawn=drawn, held_out=held_out, meta=np.array("x"))
    return run


def claim(folder, n: int, loss: float, margin: float, seeds: int = 2) -> dict:
    runs = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        held_out, raw = draw(rng, n), draw(rng, n)
        runs += [
            write_run(folder, "raw", seed, raw, held_out),
            write_run(folder, "refill", seed, raw if loss == 0 else draw(rng, n, loss), held_out),
        ]
    found = judge_utility(runs, Utility(images=n, margin=margin))
    (arm,) = found["against_raw"]
    assert "not FID" not in found["extractor"]
    return arm


@pytest.mark.parametrize(
    ("n", "loss", "margin", "expected"),
    [
        (1_000, 0.0, 0.05, "not worse"),
        (1_000, 0.6, 0.05, "worse"),
        (999, 0.0, 0.05, "not measured"),
        (1_000, 1e-6, 0.0001, "not measured"),
    ],
)
def test_utility_is_claimed_with_enough_images_and_power_only(tmp_path, n, loss, margin, expected):
    found = claim(tmp_path, n, loss, margin)
    assert found["claim"] == expected
    assert len(found["per_seed"]) == 2
    if expected == "not measured":
        assert ("a claim needs 1,000" if n < 1_000 else "no power for a margin of 0.0001") in found["reason"]


def test_without_features_nothing_is_measured(tmp_path):
    manifest.write_json(tmp_path / "raw-0" / "config.json", {"arm": "raw", "seed": 0})
    found = judge_utility([tmp_path / "raw-0"], Utility())
    assert not found["measured"]
    assert "raw-0" in found["reason"]
    measure_utility(tmp_path / "nothing", Utility(images=0), Sampling())  # asks for nothing, does nothing


def test_held_out_images_of_planted_and_of_own_data(tmp_path):
    out = make_planted(tmp_path / "a")
    src = manifest.read_run(out)["src"]
    assert read_held_out(out, 5, 32, 0.0)[0] == []
    options = {"multiplicities": (0, 1, 2, 5), "fillers": 10, "canaries": 8, "min_distance": 0.1}
    plant(tmp_path / "a" / "pictures", tmp_path / "more", held_out=4, **options)
    manifest.write_json(out / "run.json", manifest.read_run(out) | {"src": str(tmp_path / "more")})
    keys, captions, pixels = read_held_out(out, 3, 32, 0.0)
    assert len(keys) == len(captions) == len(pixels) == 3
    assert all(caption.startswith("picture number") for caption in captions)
    assert src != str(tmp_path / "more")
    plain = make_plain(tmp_path / "b", [2, 1, 1, 3, *[1] * 20])
    keys, _, pixels = read_held_out(plain, 100, 32, 0.3)
    assert 0 < len(keys) == len(pixels) < 24
    assert read_held_out(plain, 100, 32, 0.0)[2].shape == (0, 32, 32, 3)


def test_features_have_the_length_that_makes_the_kernel_one_of_cosines():
    class Encoder:
        side, dimension = 8, 3

        def encode(self, pixels: np.ndarray) -> np.ndarray:
            assert pixels.shape[1:] == (8, 8, 3)
            return np.tile([[0.6, 0.8, 0.0]], (len(pixels), 1))

    features = encode(Encoder(), np.zeros((70, 4, 4, 3), np.uint8))
    assert features.shape == (70, 3)
    assert np.square(features).sum(axis=1) == pytest.approx(3)


# Capacity


def test_the_slope_is_per_doubling_and_its_interval_over_the_seeds():
    rows = [
        {"seed": seed, "parameters_per_row": 2.0**k, "share": 0.1 * k + 0.02 * seed * k, "width": 32 * k}
        | {"parameters": 2**k * 100, "rows": 100, "hits": k, "n": 10}
        for seed in (0, 1)
        for k in (1, 2, 3)
    ]
    slope = fit_slope(rows)
    assert slope["per_seed"] == pytest.approx([0.1, 0.12])
    assert slope["estimate"] == pytest.approx(0.11)
    low, high = slope["interval"]
    assert low < 0.1 < 0.12 < high
    text = describe({"runs": rows, "slope": slope})
    assert "for every doubling of parameters a row: +11.0 points" in text
    alone = fit_slope(rows[:3])
    assert alone["interval"] == [None, None]
    assert json.dumps(alone)
    assert fit_slope(rows[:1])["estimate"] is None


def make_runs(hits: dict[int, list[int]], n: int = 18) -> list[dict]:
    """Width → images given back, by seed."""
    runs = []
    for width, each in hits.items():
        for seed, k in enumerate(each):
            size = {"width": width, "seed": seed, "parameters": 400 * width**2, "rows": 631}
            counted = count(pl.DataFrame({"extracted": [True] * k + [False] * (n - k)}))
            runs.append(size | {"parameters_per_row": size["parameters"] / 631} | counted)
    return runs


def write_capacity(folder, hits: dict[int, list[int]], failed: list[dict] | None = None):
    runs = make_runs(hits)
    found = {"schema_version": 1, "at_least": 2, "planted": True, "runs": runs, "slope": fit_slope(runs)}
    manifest.write_json(folder / "capacity.json", found | {"failed": failed or []})
    return write_capacity_report(folder)


def test_seeds_of_equal_slope_do_not_make_the_interval_a_point():
    low, high = fit_slope(make_runs({32: [3, 4], 64: [8, 9]}))["interval"]
    assert low < 0.1 < 0.18 < high


def test_the_capacity_page_says_the_slope_and_shows_every_run(page: Page, tmp_path):
    failed = [{"width": 96, "arm": "raw", "seed": 2, "error": "DivergedError"}]
    page.set_viewport_size({"width": 375, "height": 812})
    page.goto(write_capacity(tmp_path, {32: [3, 4], 64: [8, 8], 96: [12, 14]}, failed).as_uri())
    expect(page.locator("h1")).to_have_text(
        "The smallest model gave back 7 of 36 images planted twice or more, the largest 26 of 36."
    )
    expect(page.locator(".lead")).to_contain_text("points for every doubling of parameters an image")
    expect(page.locator(".lead")).to_contain_text("over 2 training seeds")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    rows = page.locator("#runs tbody tr").all_inner_texts()
    assert len(rows) == 6
    assert rows[0].split("\t")[:6] == ["32", "0", "409,600", "631", "649", "3 of 18"]
    assert page.locator("#room-text").text_content() == (
        "seed 0: 3 of 18 at 649, 8 of 18 at 2,597, 12 of 18 at 5,842. "
        "seed 1: 4 of 18 at 649, 8 of 18 at 2,597, 14 of 18 at 5,842. "
    )
    expect(page.locator(".banner")).to_contain_text("Width 96, raw with seed 2 failed")
    expect(page.locator("#threats li")).to_have_count(4)
    links = [link.get_attribute("href") for link in page.locator("#runs .note a").all()]
    assert links == [f"../width-{width}/audit/report/index.html" for width in (32, 64, 96)]


@pytest.mark.parametrize(
    ("hits", "words"),
    [
        ({32: [3, 4], 64: [8, 8], 96: [12, 13]}, "with more room, more images came back"),
        ({32: [12, 13], 64: [8, 8], 96: [3, 4]}, "with more room, fewer images came back"),
        ({32: [3, 8], 64: [8, 3]}, "neither show that room matters nor rule it out"),
        ({32: [3], 64: [8]}, "without an interval, this is no evidence"),
        ({32: [3, 4]}, "One size has no slope"),
        ({}, "No model could be measured"),
    ],
)
def test_every_slope_is_told(tmp_path, hits, words):
    assert words in write_capacity(tmp_path, hits).read_text()


def test_parameters_are_counted_without_loading_them(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((3, 4)), "b": np.zeros(5)}, tmp_path / "x.safetensors")
    assert count_parameters(tmp_path / "x.safetensors") == 17


def test_widths_scale_all_levels():
    recipe = Recipe(widths=(32, 96))
    assert fit_width(recipe, 96).train.channels == (96, 192)
    assert fit_width(recipe, 32).widths == ()


def test_copies_and_exposures_are_counted_by_the_truth(tmp_path):
    """Copies that deduplication missed count; a spare image never does."""
    from eval.compare import Run, count_dose

    out = make_planted(tmp_path)
    run = make_run(tmp_path, out, "refill", 0)
    truth = pl.read_parquet(out / "plant.parquet").drop_nulls("key")
    rows = manifest.read(out, ["id", "cluster_id", "key"])
    five = truth.filter(multiplicity=5)["canary"][0]
    keys = truth.filter(canary=five)["key"].to_list()
    seen = rows.with_columns(held_out=False, exposures=pl.when(pl.col("key").is_in(keys[:2])).then(7).otherwise(0))
    spare = pl.DataFrame({"id": [None], "cluster_id": [None], "key": [five], "held_out": [False], "exposures": [9]})
    manifest.write_parquet(run / "exposures.parquet", pl.concat([seen, spare], how="vertical_relaxed"))
    scores = pl.DataFrame({"target_id": [five, "row-0"], "cluster_id": [None, 10**6], "mode": ["exact", None]})
    dose = count_dose(Run(run, manifest.read_json(run / "config.json"), {}, "", scores, scores, None, None))
    assert dose.rows() == [(five, 2, 14), ("row-0", 0, 0)]
