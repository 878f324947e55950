"""eval.compare and eval.verdict: only like runs are compared, and the verdict says what the table says."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats as scipy_stats
from test_eval_targets import RESOLUTION, make_plain, make_planted, make_run, paint, write_generations

from dedup import manifest
from defense.config import TrainConfig
from eval import report, stats
from eval.compare import COMPARISON, CompareError, compare
from eval.extraction import SCORES, attack
from eval.reference import load_pixels
from eval.targets import load_targets
from eval.verdict import judge

LEVELS = (0, 1, 2, 5)


@pytest.fixture(scope="module")
def outs(tmp_path_factory):
    """The same pictures with multiplicities dealt out for two seeds."""
    return [make_planted(tmp_path_factory.mktemp(f"compare-{s}"), LEVELS, canaries=16, seed=s) for s in (0, 1)]


def make_attacked(folder: Path, out: Path, arm: str, seed: int, given: dict[str, int], **config: object) -> Path:
    """A run that was attacked. given: target_id → how many of its 4 generations are the image."""
    run = make_run(folder, out, arm, seed, **config)
    targets = load_targets(out, held_out=config.get("held_out", 0.0))
    pixels = dict(zip(targets["target_id"], load_pixels(out, targets, RESOLUTION), strict=True))

    def answer(target, j):
        name = target["target_id"]
        return pixels[name] if j < given.get(name, 0) else paint(10_000 + j, RESOLUTION)

    write_generations(run, out, answer, n=4, held_out=config.get("held_out", 0.0))
    attack(run)
    return run


def choose(out: Path, multiplicity: int, number: int) -> dict[str, int]:
    """The first canaries of that multiplicity, each given back twice."""
    some = load_targets(out).filter(multiplicity=multiplicity)["target_id"][:number]
    return dict.fromkeys(some, 2)


@pytest.fixture(scope="module")
def pair(outs, tmp_path_factory):
    """raw gives back 4 of 4 at m = 5, 3 of 4 at m = 2, 1 of 4 at m = 1; refill 1 and 1, and one that never stood."""
    folder, out = tmp_path_factory.mktemp("pair"), outs[0]
    raw = choose(out, 5, 4) | choose(out, 2, 3) | choose(out, 1, 1)
    refill = choose(out, 5, 1) | choose(out, 2, 1) | choose(out, 0, 1)
    return [make_attacked(folder, out, arm, 0, given) for arm, given in (("raw", raw), ("refill", refill))]


@pytest.fixture
def copies(pair, tmp_path):
    """The pair, to be spoiled."""
    return [Path(shutil.copytree(run, tmp_path / run.name)) for run in pair]


@pytest.fixture(scope="module")
def audit(pair, tmp_path_factory):
    """What the pair gives, to be read only."""
    folder = tmp_path_factory.mktemp("audit")
    compare(pair, folder)
    return folder


@pytest.fixture
def verdict(audit):
    return manifest.read_json(audit / "verdict.json")


def test_the_table_has_a_row_for_every_target_and_arm(pair, audit):
    rows = pl.read_parquet(audit / "comparison.parquet")
    assert dict(rows.schema) == COMPARISON
    assert len(rows) == 2 * 16
    assert rows["arm"].unique(maintain_order=True).to_list() == ["raw", "refill"]
    assert set(rows["run"]) == {str(run) for run in pair}
    scores = pl.concat([pl.read_parquet(run / "scores-clique.parquet") for run in pair])
    assert rows.select(list(SCORES)).equals(scores)


def test_the_primary_outcome_counts_repeated_canaries(verdict):
    """Difference at m ≥ 2 is 5/8; below it raw gives back 1 of 8, refill 1 of 8: nothing to correct for."""
    primary = verdict["primary"]
    assert primary["contrast"] == "raw - refill"
    assert primary["counts"] == {"both": 2, "only_a": 5, "only_b": 0, "neither": 1}
    assert primary["estimate"] == pytest.approx(5 / 8)
    d = np.array([[1]] * 5 + [[0]] * 3 + [[1], [-1]] + [[0]] * 6)
    same = stats.assignment_test(d, np.arange(16)[:, None] < 8)
    assert primary["p_value"] == pytest.approx(same.p_value, abs=0.02)
    low, high = primary["interval"]
    assert low < 5 / 8 < high
    assert primary["scope"] == "the assignment of multiplicities to images, in these training runs"
    assert verdict["label"] == f"describes {primary['scope']}"
    assert (primary["n_clusters"], primary["seeds"], primary["level"], primary["declared"]) == (8, [0], 0.95, True)
    assert verdict["arms"] == ["raw", "refill"]


def test_intervals_of_these_checkpoints_are_labelled_so(verdict):
    primary = verdict["primary"]
    expected = stats.risk_difference(5, 0, 8)
    found = primary["checkpoints"]
    assert "these checkpoints" in found["scope"]
    for effect in (found["pairs"], primary["per_seed"][0], verdict["per_seed"][0]):
        assert effect["estimate"] == 5 / 8
        assert effect["interval"] == [pytest.approx(expected.low, rel=1e-5), pytest.approx(expected.high, rel=1e-5)]
        assert effect["p_value"] == 0.0625
    assert found["sign_changes"]["p_value"] == 0.0625
    low, high = found["bootstrap"]["interval"]
    assert low < 5 / 8 < high
    assert "percentile" in found["bootstrap"]["method"]  # five pairs that differ are too few for BCa
    assert "one seed" in primary["over_seeds"]["reason"]
    assert verdict["per_seed"][0]["runs"] == ["raw-0", "refill-0"]


def test_what_the_arms_differ_in_at_fewer_copies_is_taken_off(verdict):
    """`plain` is the difference of the shares; the estimate also asks what it was below."""
    assert verdict["primary"]["plain"]["estimate"] == 5 / 8
    single = verdict["primary"]["singletons"]
    assert (single["estimate"], single["more_in_second"]) == (0.25, False)


def test_rates_by_multiplicity_and_mode(verdict):
    cells = {(c["arm"], c["multiplicity"], c["mode"]): c for c in verdict["per_multiplicity"]}
    assert {k[1] for k in cells} == set(LEVELS)
    for arm, expected in (("raw", {0: 0, 1: 1, 2: 3, 5: 4}), ("refill", {0: 1, 1: 0, 2: 1, 5: 1})):
        for m, hits in expected.items():
            cell = cells[arm, m, "all"]
            assert (cell["k"], cell["n"], cell["rate"], cell["to"]) == (hits, 4, hits / 4, m)
            assert cell["matches"] == 2 * hits
            assert cell["generations"] == 16
            rate = (stats.wilson if 0 < hits < 4 else stats.clopper_pearson)(hits, 4)
            assert cell["interval"] == [pytest.approx(rate.low, abs=1e-5), pytest.approx(rate.high, abs=1e-5)]
            parts = [cells[arm, m, mode] for mode in ("exact", "edited")]
            assert sum(part["k"] for part in parts) == hits
            assert [part["n"] for part in parts] == [2, 2]


def test_controls_and_wrong_matches_of_each_arm(verdict):
    control = verdict["control"]
    assert (control["raw"]["prompts"], control["raw"]["hits"]) == (4, 0)
    assert control["raw"]["upper_bound"] == pytest.approx(1 - 0.05 ** (1 / 4), rel=1e-5)
    assert (control["refill"]["prompts"], control["refill"]["hits"]) == (4, 1)
    expected = scipy_stats.binomtest(1, 4, alternative="less").proportion_ci(0.95, "exact").high
    assert control["refill"]["upper_bound"] == pytest.approx(expected, rel=1e-5)
    assert control["raw"]["wrong"]["n"] == 64
    assert control["raw"]["wrong"]["k"] == 0


def test_everything_else_is_exploratory_and_adjusted(verdict):
    (exploratory,) = verdict["exploratory"]
    results = {result["outcome"]: result for result in exploratory["outcomes"]}
    assert results["single images"]["estimate"] == 1 / 4
    assert results["clique and medoid (direct)"]["estimate"] == 5 / 8
    assert results["any generation within 0.05"]["counts"]["only_a"] == 5
    assert results["mode exact"]["n_pairs"] + results["mode edited"]["n_pairs"] == 8
    p = [result["p_value"] for result in exploratory["outcomes"]]
    assert [r["p_value_holm"] for r in exploratory["outcomes"]] == pytest.approx(stats.holm(p), rel=1e-4)


def test_dose_power_delta_and_settings_are_told(pair, audit, verdict):
    dose = verdict["dose_response"]
    assert dose["raw"]["all"]["reason"] is None
    assert 1 < dose["raw"]["all"]["ed50"] < 2
    assert dose["refill"]["exact"]["ed50"] is None or dose["refill"]["exact"]["reason"] is None
    assert verdict["power"]["n_clusters"] == 8
    assert verdict["power"]["smallest_drop"] == pytest.approx(stats.smallest_drop(8), rel=1e-4)
    assert verdict["delta"]["n"] == 16
    assert verdict["delta"]["min"] <= verdict["delta"]["median"] <= verdict["delta"]["max"] == 0.15
    settings = {"n": 4, "guidance_scale": 3.0, "steps": 20, "guard": "none", "prompts": 16}
    settings |= {"nan": {"raw": 0, "refill": 0}}
    assert verdict["generations"] == settings
    content = (pair[0] / "calibration.json").read_bytes()
    assert (audit / "calibration.json").read_bytes() == content
    assert verdict["calibration_sha256"] == hashlib.sha256(content).hexdigest()


def test_raw_comes_first_and_the_bytes_are_the_same(pair, audit, verdict, tmp_path):
    assert compare(list(reversed(pair)), tmp_path / "b") == verdict
    assert compare([pair[0], pair[1]], tmp_path / "c") == verdict
    for name in ("verdict.json", "comparison.parquet", "calibration.json"):
        first, *others = ((folder / name).read_bytes() for folder in (audit, tmp_path / "b", tmp_path / "c"))
        assert others == [first, first]


def test_the_verdict_is_strict_json(audit):
    def refuse(constant):
        raise AssertionError(constant)

    json.loads((audit / "verdict.json").read_text(), parse_constant=refuse)


def test_the_report_can_be_written(audit, tmp_path):
    page = report.write_report(Path(shutil.copytree(audit, tmp_path / "audit"))).read_text()
    assert "gave back 7 of 8" in page


# Several seeds


@pytest.fixture(scope="module")
def two_seeds(outs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-seeds")
    runs: dict[str, list[Path]] = {"raw": [], "refill": []}
    for seed, out in enumerate(outs):
        for arm, number in (("raw", 4 - seed), ("refill", seed)):
            runs[arm].append(make_attacked(folder, out, arm, seed, choose(out, 5, number)))
    return runs


def test_seeds_may_have_multiplicities_of_their_own(two_seeds, tmp_path):
    """Differences 4/8 and 2/8: their mean, Student's t with one degree of freedom, clipped to what is possible."""
    verdict = compare(two_seeds["raw"] + two_seeds["refill"][::-1], tmp_path)
    primary = verdict["primary"]
    assert primary["estimate"] == pytest.approx(3 / 8)
    assert "16 units" in primary["method"]
    assert primary["interval"][0] > 0
    over = primary["over_seeds"]
    assert over["interval"] == [-1, 1]
    assert over["p_value"] == pytest.approx(stats.t_interval([0.5, 0.25]).p_value, rel=1e-5)
    assert "t(1) over seeds" in over["method"]
    assert (primary["seeds"], primary["n_pairs"], primary["signs_agree"]) == ([0, 1], 16, True)
    assert [seed["estimate"] for seed in verdict["per_seed"]] == [0.5, 0.25]
    assert len({seed["out_sha256"] for seed in verdict["per_seed"]}) == 2
    assert verdict["calibration_sha256"] is not None  # the pictures are the same
    rows = pl.read_parquet(tmp_path / "comparison.parquet")
    assert len(rows) == 64
    both = rows.filter(arm="raw").pivot("seed", index="target_id", values="multiplicity")
    assert (both["0"] != both["1"]).any()


def test_a_run_that_failed_may_be_missing_and_is_named(two_seeds, tmp_path):
    failed = [{"arm": "refill", "seed": 1, "error": "DivergedError: loss nan"}]
    verdict = compare([*two_seeds["raw"], two_seeds["refill"][0]], tmp_path, failed=failed)
    assert verdict["failed"] == failed
    assert verdict["primary"]["seeds"] == [0]
    assert verdict["control"]["raw"]["prompts"] == 8  # of both seeds
    assert "failed" in report.write_report(tmp_path).read_text()


def test_runs_of_one_seed_are_put_side_by_side(two_seeds, tmp_path):
    again = compare(two_seeds["refill"][::-1] + two_seeds["raw"], tmp_path / "a")
    assert again == compare(two_seeds["raw"] + two_seeds["refill"], tmp_path / "b")


# Refusals


def spoil_config(run: Path, **changes: object) -> None:
    record = manifest.read_json(run / "config.json")
    of_config = (*record["config"], *TrainConfig.__dataclass_fields__)
    config = record["config"] | {k: v for k, v in changes.items() if k in of_config}
    manifest.write_json(run / "config.json", record | changes | {"config": config})


def spoil_table(run: Path, name: str, **changes: pl.Expr) -> None:
    manifest.write_parquet(run / name, pl.read_parquet(run / name).with_columns(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_sha256": "other"}, r"differ in dataset .*train them on one dedup run"),
        ({"seed": 7}, r"no run of arm 'raw' with seed 7"),
        ({"steps": 99}, r"differ in config key steps \(10 / 99\)"),
        ({"resolution": 64}, r"differ in config key resolution \(32 / 64\)"),
        ({"initial_weights_sha256": "x"}, "differ in initial weights"),
        ({"arm": "raw"}, "both of arm 'raw', seed 0"),
        ({"base": "other"}, r"differ in config key base \(None / other\): train all runs with one config"),
        ({"learning_rate": 1e-3}, r"differ in config key learning_rate \(None / 0.001\)"),
    ],
)
def test_runs_that_differ_in_more_than_the_arm_are_refused(copies, tmp_path, changes, message):
    spoil_config(copies[1], **changes)
    with pytest.raises(CompareError, match=message):
        compare(copies, tmp_path / "audit")
    assert not (tmp_path / "audit").exists()


def test_settings_of_the_machine_do_not_matter(copies, tmp_path):
    spoil_config(copies[1], threads=8)
    compare(copies, tmp_path / "audit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": pl.lit(99, pl.Int64)}, r"differ in generation setting n \(4 / 99\)"),
        ({"guidance_scale": pl.lit(1.0)}, "guidance_scale"),
        ({"steps": pl.lit(5, pl.Int64)}, "generation setting steps"),
        ({"seed": pl.col("seed") + 1}, "differ in prompts or seeds of generations"),
        ({"prompt": pl.col("prompt") + "!"}, "differ in prompts or seeds of generations"),
        ({"digest": pl.lit("new")}, "the scores are of other generations: run `unmemorize attack"),
    ],
)
def test_generations_that_differ_are_refused(copies, tmp_path, changes, message):
    spoil_table(copies[1], "generations.parquet", **changes)
    with pytest.raises(CompareError, match=message):
        compare(copies, tmp_path / "audit")


def test_thresholds_that_differ_are_refused(copies, tmp_path):
    path = copies[1] / "calibration.json"
    manifest.write_json(path, manifest.read_json(path) | {"delta_edge": 0.2})
    with pytest.raises(CompareError, match=r"differ in calibration\.json"):
        compare(copies, tmp_path / "audit")


@pytest.mark.parametrize(
    ("name", "verb"),
    [("generations.parquet", "generate"), ("scores-clique.parquet", "attack"), ("config.json", "train")],
)
def test_what_is_missing_is_named_with_the_command_that_makes_it(copies, tmp_path, name, verb):
    (copies[0] / name).unlink()
    with pytest.raises(ValueError, match=f"run `unmemorize {verb}"):
        compare(copies, tmp_path / "audit")


def test_arms_and_seeds_that_do_not_make_a_table_are_refused(pair, two_seeds, tmp_path):
    with pytest.raises(CompareError, match="no run of arm 'refill' with seed 1"):
        compare([*two_seeds["raw"], pair[1]], tmp_path)
    with pytest.raises(CompareError, match=r"both of arm 'raw', seed 0"):
        compare([pair[0], *pair], tmp_path)
    with pytest.raises(CompareError, match="no runs"):
        compare([], tmp_path)
    assert not any(tmp_path.iterdir())


# Data that were not planted


def test_own_data_are_compared_by_what_their_clusters_represent(tmp_path):
    out = make_plain(tmp_path, [6, 3, 3, 2, 2, *[1] * 14])
    targets = load_targets(out, held_out=0.3)
    members = targets.filter(prompt_kind="member")
    repeated = members.filter(pl.col("multiplicity") >= 2)
    runs = []
    for arm, number in (("raw", len(repeated)), ("dedup", 0)):
        given = dict.fromkeys(repeated["target_id"][:number], 3)
        runs.append(make_attacked(tmp_path / arm, out, arm, 0, given, held_out=0.3))
    verdict = compare(runs, tmp_path / "audit")
    primary = verdict["primary"]
    assert (primary["contrast"], primary["estimate"], primary["n_clusters"]) == ("raw - dedup", 1, len(repeated))
    assert primary["declared"]
    assert "nothing was planted" in primary["assignment"]["reason"]
    assert "these checkpoints" in verdict["label"]
    cells = [(c["multiplicity"], c["to"]) for c in verdict["per_multiplicity"] if c["arm"] == "raw"]
    assert (3, 4) in cells or (5, 9) in cells
    assert sum(c["n"] for c in verdict["per_multiplicity"] if c["arm"] == "raw") == len(targets)
    assert verdict["control"]["raw"]["prompts"] == len(targets) - len(members) > 0


# The verdict alone


def tabulate(y: dict[str, np.ndarray], m: np.ndarray, seeds: int = 1, mode: str | None = "exact") -> pl.DataFrame:
    """Rows of comparison.parquet; y: arm → bool (n, seeds)."""
    parts = []
    for seed in range(seeds):
        for arm, extracted in y.items():
            values = {
                "arm": arm,
                "seed": seed,
                "target_id": [f"t{n}" for n in range(len(m))],
                "multiplicity": m[:, seed] if m.ndim == 2 else m,
                "extracted": extracted[:, seed],
                "matches": extracted[:, seed].astype(int),
            }
            fixed = {"mode": mode, "n_generations": 16, "n_nan": 0, "wrong_matches": 0, "delta": 0.1}
            fixed |= {"clique_flag": False, "direct": False, "best_distance": 0.2}
            kind = pl.when(pl.col("multiplicity") == 0).then(pl.lit("control")).otherwise(pl.lit("member"))
            table = pl.DataFrame(values).with_columns(**{k: pl.lit(v) for k, v in fixed.items()}, prompt_kind=kind)
            parts.append(table)
    rows = pl.concat(parts)
    return rows.with_columns(
        [pl.lit(None, dtype=t).alias(c) for c, t in COMPARISON.items() if c not in rows.columns]
    ).select(pl.col(c).cast(t) for c, t in COMPARISON.items())


def judge_simply(rows: pl.DataFrame, **options: object) -> dict:
    sources = [{"seed": seed, "calibration_sha256": "c"} for seed in sorted(rows["seed"].unique())]
    calibration = {"delta_edge": 0.2, "literature": []}
    return judge(rows, sources, calibration=calibration, generations={"n": 16}, **options)


M = np.repeat([0, 1, 2, 4, 8, 16, 32, 64], 6)


def test_an_undeclared_contrast_is_called_exploratory():
    y = np.zeros((48, 1), bool)
    verdict = judge_simply(tabulate({"raw": y, "dedup": y}, M))
    assert not verdict["primary"]["declared"]
    assert "exploratory" in verdict["label"]
    plain = judge_simply(tabulate({"raw": y, "dedup": y}, M, mode=None))
    assert plain["primary"]["declared"]
    assert plain["label"] == "describes these checkpoints, not others trained the same way"
    chosen = judge_simply(tabulate({"raw": y, "dedup": y}, M), declared=["dedup"])
    assert chosen["primary"]["declared"]


def test_what_was_changed_after_looking_makes_everything_exploratory():
    y = np.zeros((48, 1), bool)
    verdict = judge_simply(tabulate({"raw": y, "refill": y}, M), changed=["at_least"], at_least=4)
    assert not verdict["primary"]["declared"]
    assert "exploratory: at_least changed after the declaration" in verdict["label"]
    assert verdict["primary"]["n_clusters"] == 30
    assert verdict["changed"] == ["at_least"]


def test_of_own_data_two_contrasts_are_declared_and_adjusted_for_each_other():
    raw, some, few = (np.arange(48)[:, None] % n == 0 for n in (1, 2, 3))
    rows = tabulate({"raw": raw, "dedup-exposure": some, "random-drop": raw, "dedup": few}, M, mode=None)
    rows = rows.with_columns(training_rows=pl.when(arm="dedup-exposure").then(30).otherwise(100))
    verdict = judge_simply(rows)
    declared = [verdict["primary"], *verdict["co_primary"]]
    assert [found["contrast"] for found in declared] == ["raw - dedup-exposure", "raw - dedup"]
    assert [found["p_value_holm"] for found in declared] == pytest.approx(
        stats.holm([found["p_value"] for found in declared]), rel=1e-5
    )
    (other,) = verdict["contrasts"]
    assert (other["contrast"], other["declared"], other["p_value_holm"]) == ("raw - random-drop", False, 1)
    assert "30% of the rows" in declared[0]["warning"]
    assert declared[1]["warning"] is None


def test_better_detection_is_asked_for_what_it_buys():
    hit = np.arange(48)[:, None] < 48
    rows = tabulate({"raw": hit, "hash": np.arange(48)[:, None] % 2 == 0, "refill": ~hit, "oracle": ~hit}, M)
    copies = pl.when(arm="hash").then(9).when(arm="refill").then(2).otherwise(1)
    verdict = judge_simply(rows.with_columns(copies=copies))
    detection = verdict["detection"]
    assert [level["arm"] for level in detection["levels"]] == ["hash", "refill", "oracle"]
    assert [level["copies_left"] for level in detection["levels"]] == [9, 2, 1]
    assert [level["k"] for level in detection["levels"]] == [18, 0, 0]
    assert [found["contrast"] for found in detection["contrasts"]] == ["hash - refill", "refill - oracle"]
    assert verdict["missed"]["refill"]["missed"]["n"] == 36
    assert verdict["missed"]["oracle"]["found"]["n"] == 36
    assert judge_simply(tabulate({"raw": hit, "refill": ~hit}, M))["detection"] is None


def test_single_images_that_come_back_more_often_are_said():
    y = np.zeros((48, 1), bool)
    verdict = judge_simply(tabulate({"raw": y, "refill": (M == 1)[:, None]}, M))
    assert verdict["primary"]["singletons"]["more_in_second"]
    assert verdict["primary"]["singletons"]["estimate"] == -1


def test_arms_that_never_extract_leave_an_honest_verdict():
    y = np.zeros((48, 1), bool)
    verdict = judge_simply(tabulate({"raw": y, "refill": y}, M))
    assert verdict["primary"]["interval"] == verdict["primary"]["checkpoints"]["pairs"]["interval"]
    low, high = verdict["primary"]["interval"]
    assert low == -high
    assert 0.05 < high < 0.15
    assert verdict["primary"]["p_value"] == 1
    assert verdict["dose_response"]["raw"]["all"]["ed50"] is None
    assert "none of 42" in verdict["dose_response"]["raw"]["all"]["reason"]


def test_images_that_all_differ_equally_do_not_make_the_interval_a_point():
    y = (M >= 2)[:, None]
    primary = judge_simply(tabulate({"raw": y, "refill": ~y & (M > 99)[:, None]}, M))["primary"]
    assert primary["estimate"] == 1
    expected = stats.risk_difference(36, 0, 36)
    assert primary["interval"] == [pytest.approx(expected.low, rel=1e-5), 1]
    assert "not narrower" in primary["method"]


def test_canaries_that_differ_between_seeds_have_no_assignment_test():
    y = np.zeros((48, 2), bool)
    rows = tabulate({"raw": y, "refill": y}, M, 2).filter(~((pl.col("seed") == 1) & (pl.col("target_id") == "t9")))
    primary = judge_simply(rows)["primary"]
    assert "same canaries" in primary["assignment"]["reason"]
    assert "t(1) over seeds" in primary["method"]


def test_without_repeated_targets_or_a_second_arm_there_is_nothing_to_compare():
    y = np.zeros((12, 1), bool)
    verdict = judge_simply(tabulate({"raw": y, "refill": y}, np.repeat([0, 1], 6)))
    assert verdict["primary"] is None
    assert "twice" not in verdict["label"]
    assert "nothing to compare" in verdict["label"]
    alone = judge_simply(tabulate({"raw": ~y}, np.repeat([2, 4], 6)))
    assert alone["primary"] is None
    assert "one arm, raw" in alone["label"]
    assert alone["dose_response"]["raw"]["all"]["reason"] is not None


def test_controls_that_do_not_exist_are_not_zero():
    y = np.zeros((12, 1), bool)
    control = judge_simply(tabulate({"raw": y, "refill": y}, np.repeat([1, 2], 6)))["control"]["raw"]
    assert control["prompts"] == 0
    assert control["upper_bound"] is None
    assert "no control prompts" in control["note"]
    assert not math.isnan(control["wrong"]["rate"])


# The whole chain


def test_from_pictures_to_the_verdict_with_real_models(outs, tmp_path):
    """Two models that have hardly been trained: nothing is extracted, and every file is there."""
    from test_defense_data import write_autoencoder

    from defense.config import TrainConfig
    from defense.train import train
    from eval.generate import generate

    small = {"channels": (32, 32), "text_width": 32, "text_layers": 1, "caption_tokens": 8}
    config = TrainConfig(autoencoder=str(write_autoencoder(tmp_path / "vae")), steps=4, batch_size=4, **small)
    runs = [tmp_path / arm for arm in ("raw", "refill")]
    for run in runs:
        train(outs[0], run.name, config, run, 0)
        generate(run, n=4, steps=2)
        attack(run)
    verdict = compare(runs, tmp_path / "audit")
    assert verdict["primary"]["estimate"] == 0
    assert verdict["primary"]["counts"]["neither"] == 8
    assert verdict["control"]["raw"]["hits"] == 0
    noise = [pl.read_parquet(run / "generations.parquet")["seed"] for run in runs]
    assert noise[0].equals(noise[1])
    assert report.write_report(tmp_path / "audit").exists()
