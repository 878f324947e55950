"""eval.budget: a prompt stops when it is decided in every run, and what was missed is known."""

import itertools

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_eval_controls import make_pipeline
from test_eval_targets import RESOLUTION, make_planted, make_run

from dedup import manifest
from defense.guards import Drawn
from eval import generate as generate_
from eval.budget import describe, generate_within
from eval.controls import calibrate_runs
from eval.extraction import attack
from eval.generate import generate
from eval.reference import load_pixels
from eval.rule import BudgetError, Rule, choose, draw_check, list_rounds, run_rounds

OPTIONS = {"n": 8, "guidance_scale": 1.0, "steps": 4}
NOTHING = {"extracted": False, "direct": False, "best_distance": 0.5, "delta": 0.1}


@given(st.integers(1, 1000))
def test_rounds_double_and_end_at_n(n):
    rounds = list_rounds(n)
    assert rounds[0] == 1
    assert rounds[-1] == n
    assert all(a < b <= 2 * a for a, b in itertools.pairwise(rounds))


def test_prompts_far_above_the_usual_are_chosen_whatever_the_scale():
    rng = np.random.default_rng(0)
    scores = rng.normal(10, 1, 200)
    scores[:5] += 20
    other = rng.normal(0, 1, 200)
    other[7] = np.nan
    for factor in (1, 1e-3, 1e4):
        chosen = choose(Rule(detector="one-step", spread=6.0), [scores * factor, other * factor])
        assert np.flatnonzero(chosen).tolist() == [0, 1, 2, 3, 4, 7]
    assert choose(
        Rule(detector="one-step", spread=3.0), [np.ones(4)]
    ).all()  # a detector that says nothing prunes nothing


def test_a_prompt_stops_only_when_it_is_decided_in_every_run():
    """Run 0 gives a prompt back at image 3; run 1 never, but comes near: both go on to the end."""
    asked = []

    def look(target, images):
        asked.append((target, images))
        if target == "none":
            return [NOTHING, NOTHING]
        hit = NOTHING | {"extracted": images >= 3, "best_distance": 0.05 if images >= 3 else 0.15}
        near = NOTHING | {"best_distance": 0.15}
        return [hit, near if target == "near" else hit]

    drawn = run_rounds(Rule(first=4, near=2.0), ["both", "near", "none"], 16, look)
    assert drawn == {"both": 4, "near": 16, "none": 4}
    assert asked.count(("both", 8)) == 0


@given(st.lists(st.text(min_size=1), unique=True, max_size=30), st.floats(0, 1))
def test_the_check_is_a_fixed_part(names, share):
    chosen = draw_check(names, share)
    assert len(chosen) == int(np.ceil(share * len(names)))
    assert set(chosen) == set(draw_check(names[::-1], share))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("budget"), levels=(0, 1, 2, 5), canaries=8, edited=0.0)


@pytest.fixture
def runs(out, tmp_path, monkeypatch):
    """One model is the dataset of OUT, the other the half of it: positive and negative control."""
    rows = manifest.read(out)
    plant = pl.read_parquet(out / "plant.parquet")
    often = rows["key"].is_in(plant.filter(pl.col("multiplicity") >= 2)["key"].to_list())
    models = {}
    for arm, some in (("raw", rows), ("refill", rows.filter(~often))):
        run = make_run(tmp_path, out, arm)
        (run / "model").mkdir()
        (run / "model" / "weights").write_text(arm)
        models[run / "model"] = make_pipeline(load_pixels(out, some, RESOLUTION), some["caption"].to_list())
    monkeypatch.setattr("defense.model.load_pipeline", lambda folder, **_: models[folder])
    return [folder.parent for folder in models]


def test_as_many_extractions_as_the_full_schedule_from_fewer_images(runs):
    rule = Rule(detector=None, first=2, check=0.5)
    about = generate_within(runs, rule, **OPTIONS)
    tables = [pl.read_parquet(run / "generations.parquet") for run in runs]
    assert tables[0].select("prompt_id", "seed").equals(tables[1].select("prompt_id", "seed"))
    scores = [attack(run) for run in runs]
    for run, found, told in zip(runs, scores, about["arms"], strict=True):
        assert told["extracted"] == found["extracted"].sum()
        generate(run, **OPTIONS)
        assert attack(run)["extracted"].equals(found["extracted"])
    assert [told["extracted"] for told in about["arms"]] == [6, 2]
    assert [told["missed"] for told in about["arms"]] == [0, 0]
    assert about["images"] < 8 * len(scores[0])
    assert "6 extracted" in describe(about)


def test_drafts_choose_what_is_memorised_in_any_run(runs):
    """One model is the dataset, the other the half of it: who is given back by the first alone is chosen for both."""
    about = generate_within(runs, Rule(check=1.0), **OPTIONS)
    assert about["evaluations"]["looks"] == 3 * len(attack(runs[0]))
    assert [told["extracted"] for told in about["arms"]] == [6, 2]
    assert [told["missed"] for told in about["arms"]] == [0, 0]
    assert about["chosen"] == 6  # the controls are not
    looks = [pl.read_parquet(next(run.rglob("looks.parquet"))) for run in runs]
    truth = dict(attack(runs[0]).select("target_id", "multiplicity").iter_rows())
    found = dict(looks[0].iter_rows())
    assert all((found[name] > -1) == (count > 0) for name, count in truth.items())
    assert sum(looks[1]["score"] > -1) == 2


def test_a_draft_without_numbers_is_no_reason_to_stop(runs, monkeypatch):
    def nothing(prompts, seeds):
        pixels = np.zeros((len(seeds), RESOLUTION, RESOLUTION, 3), np.uint8)
        return Drawn(pixels, ["nan"] * len(seeds), pl.DataFrame())

    monkeypatch.setattr("eval.budget.open_sampler", lambda *_: nothing)
    about = generate_within(runs[:1], Rule(check=0.0), **OPTIONS)
    assert (about["chosen"], about["images"]) == (8, 8 * 4)


def test_what_was_pruned_is_a_row_and_what_was_missed_is_said(runs, monkeypatch):
    """A detector that flags nothing: every prompt is pruned, and the check finds what was lost."""
    monkeypatch.setattr("eval.budget.look_at", lambda arm, rule: np.arange(arm.asked["target_id"].n_unique()) % 3 / 9)
    about = generate_within(runs, Rule(detector="one-step", spread=99.0, check=0.25), **OPTIONS)
    assert (about["images"], about["given_up"], about["checked"]) == (0, 8, 2)
    assert about["evaluations"]["check"] == 2 * 8 * 4
    missed = about["arms"][0]["missed_in_all"]
    assert missed["low"] <= missed["estimate"] <= missed["high"] <= 8
    table = pl.read_parquet(runs[0] / "generations.parquet")
    assert dict(table.schema) == generate_.GENERATIONS
    assert (table["status"] == "pruned").sum() == 6
    scores = attack(runs[0])
    assert len(scores) == 8
    assert sorted(scores["n_generations"].to_list()) == [0] * 6 + [8] * 2
    assert scores["n_nan"].sum() == 0
    assert about["arms"][0]["missed"] == scores["extracted"].sum()


def test_an_interrupted_schedule_goes_on(runs, monkeypatch):
    rule = Rule(detector=None, first=2, check=0.0)
    about = generate_within(runs, rule, **OPTIONS)
    before = (runs[0] / "generations.parquet").read_bytes()
    files = {path: path.stat().st_mtime_ns for path in runs[0].rglob("*.png")}
    next(path for path in sorted(runs[0].rglob("generations/*/*.parquet"))).unlink()
    (runs[0] / "generations.parquet").unlink()
    assert generate_within(runs, rule, **OPTIONS) == about
    assert (runs[0] / "generations.parquet").read_bytes() == before
    again = {path: path.stat().st_mtime_ns for path in runs[0].rglob("*.png")}
    assert files.keys() == again.keys()
    assert sum(files[path] != again[path] for path in files) <= 4


def test_thresholds_by_pooled_controls_are_set_before_anything_is_drawn_for_a_member(runs, monkeypatch):
    rule, seen = Rule(detector=None, first=2, check=0.5), []

    def calibrate(some):
        for run in some:
            table = pl.read_parquet(run / "generations.parquet")
            assert set(table.filter(prompt_kind="member")["status"]) == {"pruned"}
            assert table.filter(prompt_kind="control", status="ok")["prompt_id"].value_counts()["count"].to_list() == [
                8,
                8,
            ]
        seen.extend(some)
        return calibrate_runs(some)

    monkeypatch.setattr("eval.budget.calibrate_runs", calibrate)
    about = generate_within(runs, rule, pooled=True, **OPTIONS)
    assert seen == runs
    assert about["evaluations"]["calibration"] == 2 * 8 * 4
    assert "of controls" in describe(about)
    calibrations = [manifest.read_json(run / "calibration.json") for run in runs]
    assert calibrations[0] == calibrations[1]
    assert (calibrations[0]["controls"]["prompts"], calibrations[0]["controls"]["generations"]) == (4, 8)
    before = [(run / "calibration.json").read_bytes() for run in runs]
    scores = [attack(run) for run in runs]  # by these thresholds
    assert [found["extracted"].sum() for found in scores] == [told["extracted"] for told in about["arms"]]
    assert set(scores[0].filter(prompt_kind="control")["n_generations"]) == {8}
    edges = {found["delta_edge"][0] for found in scores}
    assert edges == {calibrations[0]["delta_edge"]}
    assert generate_within(runs, rule, pooled=True, **OPTIONS) == about  # goes on, although there are scores now
    assert [(run / "calibration.json").read_bytes() for run in runs] == before


@pytest.mark.parametrize("detector", ["draft", "noise-magnitude"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_evaluations_are_counted_as_the_denoiser_is_asked(runs, detector, guidance_scale):
    from defense.model import load_pipeline

    asked = []
    for run in runs[:1]:
        hook = load_pipeline(run / "model").unet.register_forward_hook(lambda _, x, out: asked.append(len(x[0])))
    rule = Rule(detector=detector, noises=2, draft_steps=3, check=0.0)
    about = generate_within(runs[:1], rule, **OPTIONS | {"guidance_scale": guidance_scale})
    hook.remove()
    assert sum(asked) == about["evaluations"]["looks"] + about["evaluations"]["images"]
    assert about["evaluations"]["looks"] > 0


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(detector="tarot"), "unknown detector 'tarot'"),
        (Rule(until="tea"), "not by 'tea'"),
        (Rule(first=0), "at least 1"),
        (Rule(draft_steps=0), "at least 1"),
    ],
)
def test_rules_that_make_no_sense_are_refused(runs, rule, message):
    with pytest.raises(BudgetError, match=message):
        generate_within(runs, rule, **OPTIONS)


def test_an_n_below_the_table_is_refused_before_anything_is_drawn(runs):
    with pytest.raises(ValueError, match="3 generations a prompt; a clique needs 4 or more"):
        generate_within(runs, Rule(detector=None), **OPTIONS | {"n": 3})
    assert not list(runs[0].rglob("*.png"))
