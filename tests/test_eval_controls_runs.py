"""eval.controls: thresholds from controls alone, pooled over runs, and refused where they say nothing."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from test_eval_calibrate import make_yardstick, noise
from test_eval_targets import RESOLUTION, make_plain, make_planted, make_run, paint, write_generations, write_png
from typer.testing import CliRunner

from dedup import manifest
from dedup.options import Options
from dedup.pipeline import deduplicate
from defense.distances import scale
from eval.calibrate import CalibrationError, calibrate, freeze, measure_controls
from eval.cli import app
from eval.controls import calibrate_runs
from eval.extraction import AttackError, attack
from eval.reference import TargetError, load_pixels
from eval.targets import load_targets


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("controls"), edited=0.0)


@pytest.fixture(scope="module")
def unseen(out, tmp_path_factory) -> Path:
    """A dedup run over pictures that OUT does not hold, and one caption and one picture that it does."""
    folder, known = tmp_path_factory.mktemp("unseen"), load_targets(out)["prompt"]
    for number in [int(known[0].split()[-1]), *range(500, 540)]:
        write_png(folder / "src" / f"{number}.png", paint(number))
        (folder / "src" / f"{number}.txt").write_text(known[1] if number == 500 else f"unseen {number}")
    deduplicate(folder / "src", folder / "out", Options(), jobs=1)
    return folder / "out"


def unrelated(target, j):
    return paint(int.from_bytes(target["target_id"].encode()) % 9973 + 10_000 * (j + 1), RESOLUTION)


def copied(known):
    return lambda target, j: known[target["target_id"]] if j == 0 else unrelated(target, j)


def test_controls_from_elsewhere_are_none_of_the_dataset(out, unseen):
    targets = load_targets(out, controls=unseen, limit=None)
    more = targets.filter(pl.col("root").is_not_null())
    assert len(more) == 39  # of 41, without the known picture and the known caption
    assert (more["prompt_kind"] == "control").all()
    assert load_targets(out, controls=unseen, limit=5)["root"].is_not_null().sum() == 5
    pixels = load_pixels(out, more, RESOLUTION)
    for row, mine in zip(more.iter_rows(named=True), pixels, strict=True):
        expected = scale(paint(int(row["prompt"].split()[1])))
        assert abs(mine.mean() / 255 - expected.mean()) < 0.02
    with pytest.raises(TargetError, match="does not hold"):
        load_targets(out, controls=out)


def make_runs(out, folder, unseen=None, answer=unrelated, n=4):
    runs = [make_run(folder, out, arm) for arm in ("raw", "refill")]
    for run in runs:
        write_generations(run, out, answer, n=n, controls=unseen, limit=None)
        table = pl.read_parquet(run / "generations.parquet")
        foreign = pl.col("prompt_id").str.starts_with("control-")
        table = table.with_columns(controls=pl.when(foreign).then(pl.lit(unseen and str(unseen))))
        manifest.write_parquet(run / "generations.parquet", table)
    return runs


def test_false_matches_are_counted_and_frozen_for_all_runs(out, unseen, tmp_path):
    """Models that draw something else: no false match, and the bound that so many allow."""
    runs = make_runs(out, tmp_path, unseen)
    found = calibrate_runs(runs).controls
    assert found["prompts"] == 2 * (2 + 39)
    assert found["held_out"] == 2 + 39
    assert found["own_picture"]["hits"] == found["other_picture"]["hits"] == 0
    assert found["own_picture"]["high"] == pytest.approx(1 - 0.025 ** (1 / 82), abs=1e-6)
    assert {row["delta"] for row in found["literature"]} == {0.15, 0.124, 0.113, 0.10, 0.05}
    assert 0 < found["delta_global"] <= 0.15
    assert (runs[0] / "calibration.json").read_bytes() == (runs[1] / "calibration.json").read_bytes()
    before = (runs[0] / "calibration.json").read_bytes()
    attack(runs[0])
    assert (runs[0] / "calibration.json").read_bytes() == before
    with pytest.raises(CalibrationError, match=r"has been scored \(scores-clique"):
        calibrate_runs(runs)


def test_a_model_that_gives_controls_back_is_found_out(out, unseen, tmp_path):
    """The positive control of the false-match rate: every control comes back nearly, members are never looked at."""
    targets = load_targets(out, controls=unseen, limit=None)
    nearly = load_pixels(out, targets, RESOLUTION).clip(3) - 3  # by equality alone a δ of nothing would do
    runs = make_runs(out, tmp_path, unseen, copied(dict(zip(targets["target_id"], nearly, strict=True))))
    for run in runs:  # what was drawn for members must not even be there
        table = pl.read_parquet(run / "generations.parquet").filter(prompt_kind="member")
        for file in table["file"]:
            (run / file).unlink()
    found = calibrate_runs(runs).controls
    assert (found["own_picture"]["hits"], found["own_picture"]["n"]) == (82, 82)
    assert found["other_picture"]["hits"] == 0


def test_the_global_delta_allows_one_in_a_thousand():
    """2,000 prompts, of which 3 have a generation near somebody else's picture, at 0.02, 0.05 and 0.08."""
    reference, held_out = noise(40), noise(50, seed=3)
    plain = calibrate(make_yardstick(reference[:3], reference[3:]))
    rng = np.random.default_rng(0)
    images = [rng.uniform(0, 1, (1, *held_out.shape[1:])).astype(np.float32) for _ in range(2000)]
    for prompt, shift in ((5, 0.02), (6, 0.05), (7, 0.08)):
        images[prompt] = np.clip(scale(held_out[1:2]) * (1 - 2 * shift) + shift, 0, 1).astype(np.float32)
    found = measure_controls(plain, images, np.zeros(2000, np.int64), held_out, np.ones(50))
    assert found.controls["any_picture"]["hits"] == 2
    near = [float(np.sqrt(((image[0] - scale(held_out[1])) ** 2).mean())) for image in images[5:8]]
    assert near[1] < found.controls["delta_global"] < near[2]
    assert found.delta_edge <= plain.delta_edge


def test_identical_generations_shrink_the_edge_threshold():
    reference, held_out = noise(40), noise(50, seed=3)
    plain = calibrate(make_yardstick(reference[:3], reference[3:]))
    images = [np.full((2, *held_out.shape[1:]), 0.5, np.float32) for _ in range(5)]
    found = measure_controls(plain, images, np.arange(5), held_out, np.ones(50))
    assert found.delta_edge == found.controls["edge_generations"] == 0


def test_runs_that_were_asked_otherwise_are_refused(out, tmp_path):
    runs = make_runs(out, tmp_path)
    write_generations(runs[1], out, unrelated, n=6)
    with pytest.raises(CalibrationError, match="differ in their number of images a prompt"):
        calibrate_runs(runs)


def test_without_controls_there_is_nothing_to_calibrate_with(tmp_path):
    plain = make_plain(tmp_path, [2, 1, 1, 1])
    runs = make_runs(plain, tmp_path)
    with pytest.raises(CalibrationError, match="no generations for controls"):
        calibrate_runs(runs)


def test_a_calibration_of_something_else_is_refused(out, tmp_path):
    (run, _) = make_runs(out, tmp_path)
    attack(run)
    path = run / "calibration.json"
    for name, value in (("encoder", "sscd"), ("resolution", 64), ("family", "FluxPipeline")):
        before = manifest.read_json(path)
        config = manifest.read_json(run / "config.json")
        manifest.write_json(run / "config.json", config | {"pipeline": "StableDiffusionPipeline"})
        manifest.write_json(path, before | {name: value})
        with pytest.raises(CalibrationError, match=f"was made for {name} {value}"):
            attack(run)
        manifest.write_json(path, before)


def test_other_numbers_of_generations_than_calibrated_are_refused(out, tmp_path):
    runs = make_runs(out, tmp_path)
    calibrate_runs(runs)
    write_generations(runs[0], out, unrelated, n=6)
    with pytest.raises(AttackError, match="calibrated with 4 generations a prompt, and there are 6"):
        attack(runs[0])


def test_images_without_finite_numbers_are_left_out(out, tmp_path):
    runs = make_runs(out, tmp_path, answer=lambda target, j: None if j else unrelated(target, j))
    found = calibrate_runs(runs).controls
    assert (found["prompts"], found["generations"], found["nan"]) == (4, 4, 12)
    assert found["own_picture"]["hits"] == 0
    attack(runs[0])  # calibrated for as many as were asked for


def test_the_verb(out, unseen, tmp_path):
    runs = make_runs(out, tmp_path, unseen)
    done = CliRunner().invoke(app, ["calibrate", *map(str, runs)], catch_exceptions=False)
    assert "82 control prompts × 4 generations, 41 held-out pictures" in done.stdout
    assert "0.124 (Webster)" in done.stdout
    assert "41 held-out pictures are few (1,000 are wanted)" in done.stdout


def test_thresholds_that_were_measured_stay(tmp_path):
    reference, held_out = noise(40), noise(50, seed=3)
    plain = calibrate(make_yardstick(reference[:3], reference[3:]))
    images = [np.full((2, *held_out.shape[1:]), 0.5, np.float32) for _ in range(5)]
    measured = measure_controls(plain, images, np.arange(5), held_out, np.ones(50))
    freeze(measured, tmp_path / "calibration.json")
    assert freeze(plain, tmp_path / "calibration.json") == measured
