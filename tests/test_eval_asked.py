"""eval.asked and eval.unprompted: by which captions an image came back, and whether it did unasked."""

import shutil

import numpy as np
import polars as pl
import pytest
from test_eval_compare import choose, make_attacked
from test_eval_controls import make_pipeline
from test_eval_targets import RESOLUTION, make_plain, make_planted, make_run, paint, write_generations

from dedup import manifest
from eval import report
from eval.asked import ANY, LABELS, list_captions, say_captions
from eval.compare import CompareError, compare
from eval.extraction import attack
from eval.generate import GENERATIONS, generate
from eval.reference import load_pixels
from eval.summary import describe_scores
from eval.targets import load_targets
from eval.unprompted import NULL, draw_unprompted, score_unprompted

SETTINGS = {"guidance_scale": 1.0, "steps": 8}


def find(verdict: dict, arm: str, kind: str, multiplicity: int) -> tuple[int, int, int] | None:
    """Given back, of how many, generations."""
    cells = {(c["arm"], c["caption_kind"], c["multiplicity"]): c for c in verdict["captions"]}
    cell = cells.get((arm, kind, multiplicity))
    return cell and (cell["k"], cell["n"], cell["generations"])


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Own data in which copies have captions of their own: raw answers to dropped ones, dedup to those that stay.

    Images 0 and 1 of three that stand twice or more; of 8 generations each third is for a dropped caption.
    """
    folder = tmp_path_factory.mktemp("own")
    out = make_plain(folder, [4, 3, 2, *[1] * 9])
    targets = load_targets(out, held_out=0.3)
    pixels = dict(zip(targets["target_id"], load_pixels(out, targets, RESOLUTION), strict=True))
    repeated = targets.filter(pl.col("multiplicity") >= 2)["target_id"].to_list()
    runs = []
    for arm, answered in (("raw", "dropped"), ("dedup", "survivor")):
        run = make_run(folder / arm, out, arm, held_out=0.3)

        def kind_of(target, j):
            return "dropped" if target["target_id"] in repeated and j % 3 == 0 else "survivor"

        def answer(target, j, answered=answered):
            given = target["target_id"] in repeated[:2] and kind_of(target, j) == answered
            return pixels[target["target_id"]] if given else paint(10_000 + j, RESOLUTION)

        table = write_generations(run, out, answer, n=8, held_out=0.3)
        rows = targets.select("target_id").to_dicts()
        kinds = [kind_of(row, j) for row in rows for j in range(8)]
        manifest.write_parquet(run / "generations.parquet", table.with_columns(caption_kind=pl.Series(kinds)))
        attack(run)
        runs.append(run)
    return targets, runs


def test_captions_that_stay_and_that_leave_are_counted_apart(own, tmp_path):
    targets, runs = own
    verdict = compare(runs, tmp_path)
    singles = len(targets.filter(prompt_kind="member", multiplicity=1))
    never = len(targets.filter(prompt_kind="control"))
    repeated = len(targets.filter(pl.col("multiplicity") >= 2))
    assert find(verdict, "raw", "dropped", 2) == (2, repeated, 3 * repeated)
    assert find(verdict, "raw", "survivor", 2) == (0, repeated, 5 * repeated)
    assert find(verdict, "dedup", "dropped", 2) == (0, repeated, 3 * repeated)
    assert find(verdict, "dedup", "survivor", 2) == (2, repeated, 5 * repeated)
    for arm in ("raw", "dedup"):
        assert find(verdict, arm, ANY, 2) == (2, repeated, 8 * repeated)
        assert find(verdict, arm, "survivor", 1) == (0, singles, 8 * singles)
        assert find(verdict, arm, ANY, 0) == (0, never, 8 * never)
        assert find(verdict, arm, "dropped", 0) is None
        assert {find(verdict, arm, kind, 2) for kind in ("null", "probe", "given")} == {None}
    rows = pl.read_parquet(tmp_path / "comparison.parquet")
    told = rows.select("arm", "target_id", "by_caption").explode("by_caption").unnest("by_caption")
    assert told["matches"].sum() == 2 * 3 + 2 * 5
    totals = told.group_by("arm", "target_id").agg(pl.col("generations").sum())
    assert (totals["generations"] == 8).all()
    lines = list_captions(verdict)
    assert [line["kind"] for line in lines if line["arm"] == "raw"] == ["survivor", "dropped", ANY, "probe"]
    assert say_captions(lines, "dedup", "deduplicated model", "images") == (
        f"Of the images, the deduplicated model gave back 2 of {repeated} by the caption that stays, "
        f"0 of {repeated} by captions that leave with removed rows."
    )
    page = report.write_report(tmp_path).read_text()
    assert "Asked in other words" in page
    assert "not measured" in page


def test_the_summary_of_a_run_tells_them_apart(own):
    """Targets that were asked in several ways are not lumped as "all", whatever the attack."""
    targets, runs = own
    repeated = len(targets.filter(pl.col("multiplicity") >= 2))
    members, controls = (len(targets.filter(prompt_kind=kind)) for kind in ("member", "control"))
    for run, back in zip(runs, ("dropped", "survivor"), strict=True):
        summary = manifest.read_json(run / "attack-clique.json")
        kinds = summary["by_caption_kind"]
        assert list(kinds) == ["dropped", "survivor"]
        asked = {kind: (found["members"]["prompts"], found["controls"]["prompts"]) for kind, found in kinds.items()}
        assert asked == {"dropped": (repeated, 0), "survivor": (members, controls)}
        made = {kind: found["members"]["generations"] for kind, found in kinds.items()}
        assert made == {"dropped": 3 * repeated, "survivor": 8 * members - 3 * repeated}
        assert kinds["survivor"]["controls"]["generations"] == 8 * controls
        for kind, found in kinds.items():
            assert found["members"]["extracted"] == (2 if kind == back else 0)
        rate = kinds[back]["members"]["per_prompt"]
        assert (rate["count"], rate["n"]) == (2, repeated if back == "dropped" else members)
        assert rate["low"] < rate["estimate"] < rate["high"]
        assert kinds["survivor"]["controls"]["per_prompt"]["high"] > 0
        assert kinds["dropped"]["controls"] == {"prompts": 0, "generations": 0, "nan": 0, "extracted": 0}
        lines = describe_scores(summary, "clique").splitlines()
        (line,) = [line for line in lines if line.startswith("dropped: ")]
        assert line.startswith(f"dropped: {2 if back == 'dropped' else 0} of {repeated} ")
        assert line.endswith("0 of 0: -")


@pytest.mark.parametrize("name", ["adaptive", "replication"])
def test_every_attack_says_which_images_match(own, tmp_path, name):
    run = shutil.copytree(own[1][0], tmp_path / "raw-0")
    scores = attack(run, name)
    assert (scores["matched_files"].list.len() == scores["matches"]).all()
    found = manifest.read_json(run / f"attack-{name}.json")["by_caption_kind"]
    matches = scores.filter(prompt_kind="member")["matches"].sum()
    assert matches > 0
    assert sum(kind["members"]["per_generation"]["count"] for kind in found.values()) == matches
    assert found["dropped"]["members"]["extracted"] == 2


def test_scores_without_the_files_that_matched_are_refused(own, tmp_path):
    run = shutil.copytree(own[1][0], tmp_path / "raw-0")
    path = run / "scores-clique.parquet"
    manifest.write_parquet(path, pl.read_parquet(path).drop("matched_files"))
    with pytest.raises(CompareError, match=r"no matched_files: run `unmemorize attack"):
        compare([run], tmp_path / "audit")


# The empty caption


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("null"), levels=(0, 1, 2, 5), canaries=8, edited=0.0)


@pytest.fixture
def runs(out, tmp_path, monkeypatch):
    """A model that is its dataset, and one that knows none of its canaries: asked with the empty caption, they draw
    what they know in proportion."""
    rows = manifest.read(out)
    canaries = pl.read_parquet(out / "plant.parquet")["key"].drop_nulls().to_list()
    models = {}
    for arm, some in (("raw", rows), ("refill", rows.filter(~pl.col("key").is_in(canaries)))):
        run = make_run(tmp_path, out, arm)
        (run / "model").mkdir()
        (run / "model" / "weights").write_text(arm)
        models[run / "model"] = make_pipeline(load_pixels(out, some, RESOLUTION), some["caption"].to_list())
    monkeypatch.setattr("defense.model.load_pipeline", lambda folder, **_: models[folder])
    return [folder.parent for folder in models]


def test_pictures_come_back_unasked_in_proportion_and_controls_do_not(out, runs):
    """130 images, more than a batch; 36 rows of which 5 are copies of one canary."""
    run = runs[0]
    drawn = draw_unprompted(run, 130, **SETTINGS)
    assert dict(drawn.schema) == GENERATIONS
    assert len(drawn) == drawn["seed"].n_unique() == 130
    assert set(drawn["prompt"]) == {""}
    generate(run, n=4, **SETTINGS)
    scores = attack(run)
    before = manifest.read_json(run / "attack-clique.json")
    table = score_unprompted(run)
    assert dict(table.schema) == NULL
    summary = manifest.read_json(run / "attack-clique.json")
    null = summary["by_caption_kind"].pop("null")
    assert summary["by_caption_kind"].keys() == {"survivor"}
    assert summary == before
    assert null["members"]["generations"] == 130 * null["members"]["prompts"]
    assert null["members"]["per_generation"]["count"] == table["matches"].sum() > 0
    assert (null["controls"]["prompts"], null["controls"]["extracted"]) == (2, 0)
    assert table["target_id"].equals(scores["target_id"])
    often = table.with_columns(scores["multiplicity"], scores["prompt_kind"])
    assert (often.filter(prompt_kind="control")["matches"] == 0).all()
    members = often.filter(prompt_kind="member")
    share = members["matches"] / 130
    expected = members["multiplicity"] / len(manifest.read(out))
    assert np.abs(share - expected).max() < 0.1
    assert members.filter(multiplicity=5)["extracted"].all()
    image = table.filter(pl.col("best_distance") == table["best_distance"].min())
    assert (run / image["best_file"][0]).exists()


def test_what_is_drawn_goes_on_and_does_not_depend_on_how_many(runs):
    run = runs[0]
    few = draw_unprompted(run, 64, **SETTINGS)
    before = {path.name: path.read_bytes() for path in run.rglob("*.png")}
    many = draw_unprompted(run, 130, **SETTINGS)
    assert many["seed"][:64].equals(few["seed"])
    (folder,) = {(run / file).parent for file in many["file"]}
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    next(folder.glob("*.parquet")).unlink()
    assert draw_unprompted(run, 130, **SETTINGS).equals(many)
    assert sum(path.stat().st_mtime_ns != when for path, when in files.items()) <= 64
    assert set(before.values()) <= {path.read_bytes() for path in folder.glob("*.png")}


def test_the_comparison_has_the_empty_caption_and_the_probe(out, runs, tmp_path):
    for run in runs:
        generate(run, n=4, **SETTINGS)
        draw_unprompted(run, 70, **SETTINGS)
        scores = attack(run)
    with pytest.raises(CompareError, match=r"empty caption have no scores: run `unmemorize attack"):
        compare(runs, tmp_path / "audit")
    nulls = [score_unprompted(run) for run in runs]
    found = scores.filter(pl.col("multiplicity").is_in([0, 5])).with_columns(n_generations=pl.lit(4, pl.Int64))
    found = found.with_columns(matches=pl.when(multiplicity=5).then(1).otherwise(0))
    manifest.write_parquet(runs[1] / "scores-probe.parquet", found)
    verdict = compare(runs, tmp_path / "audit")
    repeated = scores.filter(pl.col("multiplicity") >= 2)["target_id"].to_list()
    hits = nulls[0].filter(pl.col("target_id").is_in(repeated))["extracted"].sum()
    assert hits > 0
    assert find(verdict, "raw", "null", 2) == (hits, 4, 4 * 70)
    assert find(verdict, "refill", "null", 2) == (0, 4, 4 * 70)
    assert find(verdict, "raw", "null", 0) == (0, 2, 2 * 70)
    assert find(verdict, "raw", "given", 2) is None
    assert find(verdict, "refill", "probe", 2) == (2, 2, 8)
    assert find(verdict, "refill", "probe", 0) == (0, 2, 8)
    assert find(verdict, "refill", ANY, 2) == (0, 4, 4 * 74)  # the probe is no caption
    probes = [line for line in list_captions(verdict) if line["kind"] == "probe"]
    assert [line["each"] for line in probes] == [None, 4]
    assert verdict["primary"]["counts"]["only_a"] == 4  # the primary asks with the image's caption, as ever


def test_models_with_other_numbers_of_them_are_not_compared(runs, tmp_path):
    for run, n in zip(runs, (8, 9), strict=True):
        generate(run, n=4, **SETTINGS)
        draw_unprompted(run, n, **SETTINGS)
        attack(run)
        score_unprompted(run)
    with pytest.raises(CompareError, match=r"differ in n of images for the empty caption \(8 / 9\): generate with"):
        compare(runs, tmp_path / "audit")


def test_where_nothing_was_drawn_nothing_is_scored(out, tmp_path):
    run = make_attacked(tmp_path, out, "raw", 0, choose(out, 5, 1))
    assert score_unprompted(run) is None


def test_a_verdict_of_an_earlier_version_has_no_such_table():
    assert list_captions({"arms": ["raw"], "at_least": 2}) == []
    assert say_captions([], "raw", "raw model", "images") == ""
    assert list(LABELS)[-1] == "probe"
