"""eval.audit: from a dataset to the report, what it refuses, and that it goes on. Real models in the slow test only."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from test_cli import draw_pictures
from test_eval_targets import RESOLUTION, make_run, paint, write_generations, write_png

from dedup import manifest
from dedup.manifest import read_run
from defense.config import ConfigError, TrainConfig
from eval import audit as auditing
from eval import plan as planning
from eval.audit import AuditError
from eval.recipe import Detection, Planting, Recipe, Sampling, load_recipe
from eval.reference import load_pixels
from eval.targets import load_targets

CONFIGS = Path(__file__).parent.parent / "configs"
PLANT = Planting(canaries=8, fillers=20, multiplicities=(0, 1, 2, 5), min_distance=0.1)
SMALL = Recipe(seeds=2, plant=PLANT, dedup=Detection(level="hash"), generate=Sampling(n=4, limit=50))


@pytest.fixture
def pictures(tmp_path):
    for number in range(60):
        write_png(tmp_path / "src" / f"{number:03d}.png", paint(number))
        (tmp_path / "src" / f"{number:03d}.txt").write_text(f"picture number {number}")
    return tmp_path / "src"


@pytest.fixture
def made(monkeypatch):
    """Runs as models would leave them: raw gives back what stands five times, others nothing. Returns what was made."""
    calls: list[str] = []
    failing: set[str] = set()

    def make_run_(out: Path, arm: str, recipe: Recipe, run: Path, seed: int) -> dict:
        result = {"arm": arm, "seed": seed, "run": run, "error": None, "seconds": {"train": 1.0}}
        if f"stop at {run.name}" in failing:
            raise KeyboardInterrupt
        if run.name in failing:
            return result | {"error": "DivergedError: loss nan"}
        if not (run / "generations.parquet").exists():
            calls.append(run.name)
            make_run(run.parent, out, arm, seed)
            (run / "train.jsonl").touch()
            limit = recipe.generate.limit
            targets = load_targets(out, limit=limit)
            given = set(targets.filter(pl.col("multiplicity") >= 5)["target_id"]) if arm == "raw" else set()
            pixels = dict(zip(targets["target_id"], load_pixels(out, targets, RESOLUTION), strict=True))
            write_generations(
                run,
                out,
                lambda t, j: pixels[t["target_id"]] if t["target_id"] in given else paint(10_000 + j, RESOLUTION),
                n=4,
                limit=limit,
            )
        return result

    monkeypatch.setattr(auditing, "_make_run", make_run_)
    return calls, failing


def run_audit(src: Path, folder: Path, recipe: Recipe = SMALL, **options: object) -> dict:
    return auditing.audit(src, folder, recipe, jobs=1, **options)


def test_the_job_ends_with_a_verdict_that_a_second_run_does_not_change(pictures, tmp_path, made):
    verdict = run_audit(pictures, tmp_path / "dir")
    assert made[0] == ["raw-0", "refill-0", "raw-1", "refill-1"]
    primary = verdict["primary"]
    assert (primary["contrast"], primary["declared"], primary["signs_agree"]) == ("raw - refill", True, True)
    assert primary["counts"] == {"both": 0, "only_a": 4, "only_b": 0, "neither": 4}
    rows = pl.read_parquet(tmp_path / "dir" / "audit" / "comparison.parquet")
    by_seed = rows.filter(arm="raw").pivot("seed", index="target_id", values="multiplicity")
    assert (by_seed["0"] != by_seed["1"]).any()  # which image it is says nothing of how often it stands
    page = tmp_path / "dir" / "audit" / "report" / "index.html"
    assert "gave back 4 of 8 images planted twice or more" in page.read_text()
    assert (tmp_path / "dir" / "out-0" / "report" / "index.html").exists()
    before = {p: p.read_bytes() for p in (tmp_path / "dir" / "audit").rglob("*.*")}
    assert run_audit(pictures, tmp_path / "dir") == verdict
    assert len(made[0]) == 4
    assert {p: p.read_bytes() for p in (tmp_path / "dir" / "audit").rglob("*.*")} == before
    declared = manifest.read_json(tmp_path / "dir" / "audit.json")
    assert declared["recipe"]["primary"] == ["refill"]
    thresholds = manifest.read_json(tmp_path / "dir" / "thresholds" / "0.json")
    assert thresholds["delta"] == manifest.read_json(tmp_path / "dir" / "raw-0" / "calibration.json")["delta"]
    assert set(declared["calibration_sha256"]) == {"0", "1"}


def test_a_run_that_fails_is_told_and_the_others_are_reported(pictures, tmp_path, made):
    made[1].add("refill-1")
    verdict = run_audit(pictures, tmp_path / "dir")
    assert verdict["failed"] == [{"arm": "refill", "seed": 1, "error": "DivergedError: loss nan"}]
    assert verdict["primary"]["seeds"] == [0]
    made[1].clear()
    assert run_audit(pictures, tmp_path / "dir")["failed"] == []  # the same command goes on
    made[1].update(["raw-0", "refill-0", "raw-1", "refill-1"])
    with pytest.raises(AuditError, match=r"all runs failed.*loss nan"):
        run_audit(pictures, tmp_path / "other")


def test_an_interrupted_audit_goes_on_where_it_stopped(pictures, tmp_path, made):
    made[1].add("stop at raw-1")
    with pytest.raises(KeyboardInterrupt):
        run_audit(pictures, tmp_path / "dir")
    assert made[0] == ["raw-0", "refill-0"]
    assert not (tmp_path / "dir" / "audit").exists()
    made[1].clear()
    verdict = run_audit(pictures, tmp_path / "dir")
    assert made[0] == ["raw-0", "refill-0", "raw-1", "refill-1"]
    assert verdict["primary"]["seeds"] == [0, 1]


@pytest.mark.parametrize("step", ["calibrate_runs", "attack", "score_unprompted", "compare", "write_report"])
def test_wherever_it_stops_it_ends_as_if_it_had_not(pictures, tmp_path, made, monkeypatch, step):
    """Stopped in the second call of a step, or in the only one. Digests of dedup runs know paths and times."""
    recipe, calls = replace(SMALL, seeds=1), []
    expected = run_audit(pictures, tmp_path / "whole", recipe)
    real = getattr(auditing, step)

    def stop(*args: object, **options: object) -> object:
        calls.append(step)
        if len(calls) == (2 if step in ("attack", "score_unprompted") else 1):
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(auditing, step, stop)
    with pytest.raises(KeyboardInterrupt):
        run_audit(pictures, tmp_path / "dir", recipe)
    monkeypatch.setattr(auditing, step, real)
    found = run_audit(pictures, tmp_path / "dir", recipe)
    for verdict in (found, expected):
        del verdict["per_seed"][0]["out_sha256"]
    assert found == expected
    thresholds = [(tmp_path / name / "audit" / "calibration.json").read_bytes() for name in ("whole", "dir")]
    assert thresholds[0] == thresholds[1]


def test_what_was_declared_cannot_be_changed_after_training(pictures, tmp_path, made):
    run_audit(pictures, tmp_path / "dir")
    other = replace(SMALL, at_least=3)
    with pytest.raises(AuditError, match="at_least changed after models were trained"):
        run_audit(pictures, tmp_path / "dir", other)
    verdict = run_audit(pictures, tmp_path / "dir", other, exploratory=True)
    assert verdict["changed"] == ["at_least"]
    assert not verdict["primary"]["declared"]
    assert "Changed after models were trained: at_least" in (tmp_path / "dir/audit/report/index.html").read_text()
    with pytest.raises(AuditError, match="other values of train: choose another -o"):
        run_audit(pictures, tmp_path / "dir", replace(SMALL, train=TrainConfig(steps=9)), exploratory=True)


def test_seeds_added_after_looking_are_exploratory(pictures, tmp_path, made):
    run_audit(pictures, tmp_path / "dir", replace(SMALL, seeds=1))
    with pytest.raises(AuditError, match="seeds changed"):
        run_audit(pictures, tmp_path / "dir")
    assert run_audit(pictures, tmp_path / "dir", exploratory=True)["changed"] == ["seeds"]


def test_thresholds_that_differ_from_those_written_down_are_refused(pictures, tmp_path, made):
    run_audit(pictures, tmp_path / "dir")
    for run in ("raw-0", "refill-0"):
        path = tmp_path / "dir" / run / "calibration.json"
        manifest.write_json(path, manifest.read_json(path) | {"n_reference": 99})
    with pytest.raises(AuditError, match="raw-0, refill-0 were scored by other thresholds"):
        run_audit(pictures, tmp_path / "dir")
    with_it = run_audit(pictures, tmp_path / "dir", exploratory=True)
    assert with_it["changed"] == ["thresholds of raw-0", "thresholds of refill-0"]


def test_before_training_everything_may_change(pictures, tmp_path, made):
    made[1].update(["raw-0", "refill-0"])
    with pytest.raises(AuditError, match="all runs failed"):
        run_audit(pictures, tmp_path / "dir", replace(SMALL, seeds=1))
    made[1].clear()
    assert run_audit(pictures, tmp_path / "dir", replace(SMALL, seeds=1, at_least=3))["changed"] == []


def copy_some(src: Path, number: int, times: int = 3) -> None:
    for n in range(number):
        for copy in range(times):
            (src / f"copy-{n}-{copy}.png").write_bytes((src / f"{n:03d}.png").read_bytes())
            (src / f"copy-{n}-{copy}.txt").write_text(f"picture number {n}")


OWN = Recipe(seeds=1, dedup=Detection(level="hash"), generate=Sampling(n=4, limit=50))


def test_own_data_without_duplicates_are_audited_alone(pictures, tmp_path, made, capsys):
    verdict = run_audit(pictures, tmp_path / "dir", OWN)
    assert made[0] == ["raw-0"]
    assert verdict["primary"] is None
    assert "nothing to compare" in verdict["label"]
    assert "No duplicates were found" in capsys.readouterr().err
    assert "The raw model gave back 0 of 50 images" in (tmp_path / "dir/audit/report/index.html").read_text()


def test_too_few_clusters_are_refused_with_the_number_it_takes(pictures, tmp_path, made):
    copy_some(pictures, 3)
    with pytest.raises(AuditError, match=r"3 clusters stand 2 times or more, too few .* below 6 .* takes 31"):
        run_audit(pictures, tmp_path / "dir", OWN)
    assert made[0] == []


def test_own_data_with_duplicates_have_two_declared_contrasts(pictures, tmp_path, made):
    copy_some(pictures, 8, 5)
    verdict = run_audit(pictures, tmp_path / "dir", OWN)
    assert made[0] == ["raw-0", "dedup-0", "dedup-exposure-0"]
    assert verdict["primary"]["contrast"] == "raw - dedup"
    assert [found["contrast"] for found in verdict["co_primary"]] == ["raw - dedup-exposure"]
    assert verdict["primary"]["counts"]["only_a"] == 8
    assert verdict["primary"]["p_value_holm"] == pytest.approx(2 * verdict["primary"]["p_value"])


# Recipes and plans


def test_the_recipes_in_configs_say_what_they_claim():
    assert load_recipe(CONFIGS / "audit-cpu.toml") == auditing.DEMO
    assert load_recipe(CONFIGS / "capacity.toml").widths == (32, 64, 96)
    paper = load_recipe(CONFIGS / "audit-gpu-sd.toml")
    assert (paper.generate.n, paper.train.resolution, paper.primary) == (500, 512, ("dedup", "dedup-exposure"))
    assert load_recipe(CONFIGS / "audit-smoke.toml").arms == ("raw", "refill", "dedup")
    assert load_recipe(None) == Recipe(train=TrainConfig(held_out=0.1))  # own data need controls
    assert load_recipe(None, seeds=3, arms=["refill", "raw"]).arms == ("raw", "refill")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[plant]\ncanary = 3", r"\[plant\]: unknown key 'canary': did you mean 'canaries'"),
        ("seed = 3", "unknown key 'seed': did you mean 'seeds'"),
        ("arms = ['raw', 'other']", "unknown arm 'other'"),
        ("arms = ['raw']\nprimary = ['refill']", "primary names 'refill'"),
        ("seeds = 0", "seeds = 0"),
        ("train = 3", "train must be a table"),
        ("[train]\nlora_rank = 4", r"\[train\]: lora_rank would have no effect"),
        ("[utility]\nmargin = 0.0", "margin must be above 0"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "a.toml")


def test_the_plan_says_time_disk_and_power():
    recipe = replace(Recipe(plant=Planting(controls=48)), seeds=2)
    speed = planning.Speed(step=0.1, image_step=0.001, parameters=4_000_000)
    plan = planning.make_plan(recipe, speed, None, None, jobs=2)
    assert (plan.rows, plan.prompts, plan.clusters) == (6 * 127 + 250, 96, 36)
    assert plan.seconds["train"] == pytest.approx(2 * 1600 * 0.1)
    assert plan.seconds["generate"] == pytest.approx(2 * (96 * 16 + 256) * 15 * 0.001)
    text = planning.describe(recipe, plan, 2)
    assert "with 48 canaries and 2 seeds you can see a drop of 23 points" in text
    assert "2 arms (raw, refill) × 2 seeds, 2 at a time" in text
    assert "1,012 rows, 96 prompts" in text


def test_the_plan_of_own_data_waits_for_the_clusters():
    plan = planning.make_plan(Recipe(), None, None, None, jobs=2)
    text = planning.describe(Recipe(), plan, 2)
    assert "known after deduplication" in text
    assert "time     not known" in text
    few = planning.make_plan(Recipe(), None, 300, 3, jobs=2)
    assert "3 clusters and 2 seeds no drop can be shown; a drop of 25 points takes 31" in planning.say_power(
        Recipe(), few
    )
    assert np.isnan(few.smallest_drop)


@pytest.mark.slow
def test_the_smoke_recipe_runs_with_real_models(tmp_path):
    draw_pictures(tmp_path / "src", 190)
    recipe = load_recipe(CONFIGS / "audit-smoke.toml")
    assert "time     about" in auditing.plan(tmp_path / "dir", recipe)
    verdict = auditing.audit(tmp_path / "src", tmp_path / "dir", recipe)
    assert verdict["failed"] == []
    assert verdict["arms"] == ["raw", "refill", "dedup"]
    utility = verdict["utility"]
    assert utility["measured"]
    assert [found["claim"] for found in utility["against_raw"]] == ["not measured", "not measured"]
    rows = pl.read_parquet(tmp_path / "dir" / "audit" / "comparison.parquet")
    raw = rows.filter(arm="raw", prompt_kind="member")
    assert raw["copies"].to_list() <= raw["multiplicity"].to_list()
    assert rows.filter(arm="refill", prompt_kind="control")["copies"].to_list() == [0] * 5
    assert read_run(tmp_path / "dir" / "out-0")["options"]["level"] == "copy"
    models = {path: path.stat().st_mtime_ns for path in (tmp_path / "dir").glob("*-0/model/unet/*")}
    assert auditing.audit(tmp_path / "src", tmp_path / "dir", recipe) == verdict
    assert {path: path.stat().st_mtime_ns for path in models} == models
