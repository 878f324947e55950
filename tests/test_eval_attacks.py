"""The attacks beside the clique: adaptive ratio without prompts, and templates."""

import cv2
import numpy as np
import polars as pl
import pytest
from test_eval_extraction import disturb, fresh
from test_eval_targets import RESOLUTION, make_plain, make_planted, make_run, paint, write_generations, write_png

from dedup import manifest
from dedup.options import Options
from dedup.pipeline import deduplicate
from defense.distances import l2, scale
from eval.calibrate import CalibrationError, calibrate
from eval.extraction import ATTACKS, SCHEMAS, attack
from eval.generate import derive_seed
from eval.masks import build_mask, build_masks, masked_l2
from eval.reference import load_pixels, load_reference
from eval.summary import summarise_scores
from eval.targets import load_targets
from eval.yardstick import load_yardstick


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("attacks"), levels=(0, 1, 2, 5), canaries=8, fillers=30, edited=0.0)


@pytest.fixture(scope="module")
def originals(out):
    targets = load_targets(out)
    return dict(zip(targets["target_id"], load_pixels(out, targets, RESOLUTION), strict=True))


@pytest.fixture
def run(out, tmp_path):
    return make_run(tmp_path, out)


# Adaptive ratio


def test_copies_are_found_at_every_multiplicity_and_nothing_else(out, originals, run):
    """Three copies and five pictures that stand nowhere for each prompt."""
    write_generations(run, out, lambda t, j: disturb(originals[t["target_id"]], 0.02, j) if j < 3 else fresh(j))
    scores = attack(run, "adaptive")
    assert dict(scores.schema) == SCHEMAS["adaptive"]
    assert scores.equals(pl.read_parquet(run / "scores-adaptive.parquet"))
    assert (scores["matches"] == 3).all()
    assert (scores["wrong_matches"] == 0).all()
    assert (scores["undefined"] == 0).all()
    assert (scores["matches_at_one"] == 3).all()
    assert (scores["from_any"] == 3).all()
    assert scores["extracted"].all()
    assert (scores["best_ratio"] < 0.5).all()
    assert sorted(scores["multiplicity"].unique()) == [0, 1, 2, 5]
    assert scores["eidetic_k"].to_list() == scores["multiplicity"].to_list()


def test_a_picture_that_comes_without_being_asked_for_is_found(out, originals, run):
    """Every prompt, or none, gives the first target back."""
    first = min(originals)
    write_generations(run, out, lambda t, j: originals[first] if j == 0 else fresh(j))
    scores = attack(run, "adaptive")
    assert scores.filter("extracted")["target_id"].to_list() == [first]
    assert scores["from_any"].max() == len(scores)
    assert scores.filter(target_id=first)["matches"].item() == 1
    assert (scores.filter(pl.col("target_id") != first)["wrong_matches"] == 1).all()
    keys = load_reference(out)["key"]
    assert {keys[row] for back in scores["given_back"] for row in back} == {first}


def test_pictures_that_stand_nowhere_are_not_accused(out, run):
    write_generations(run, out, lambda t, j: fresh(derive_seed(t["target_id"], j) % 10**6))
    scores = attack(run, "adaptive")
    assert scores["from_any"].sum() == scores["wrong_matches"].sum() == 0
    write_generations(run, out, lambda t, j: None)
    scores = attack(run, "adaptive")
    assert scores["best_distance"].null_count() == len(scores)
    assert not scores["extracted"].any()


def test_the_cut_comes_from_pictures_that_stand_once(out):
    yardstick = load_yardstick(out, RESOLUTION)
    found = calibrate(yardstick)
    reference = scale(yardstick.reference_pixels)
    distances = np.minimum(l2(reference, reference), l2(reference[:, :, ::-1], reference))
    np.fill_diagonal(distances, np.inf)
    ordered = np.sort(distances, axis=1)
    assert found.neighbours == max(5, len(reference) // 20)
    ratio = ordered[:, 0] / (0.5 * ordered[:, 1 : 1 + found.neighbours].mean(axis=1))
    assert found.ratio_quantiles["0.5"] == pytest.approx(np.median(ratio), abs=1e-4)
    assert found.ratio_cut == pytest.approx(min(1, np.quantile(ratio, 0.001)), abs=1e-4)
    assert found.ratio_share == pytest.approx((ratio <= 1).mean(), abs=1e-6)


def test_too_few_pictures_have_no_neighbours(tmp_path):
    out = make_plain(tmp_path, [1, 2, 1, 1, 1])
    run = make_run(tmp_path, out)
    write_generations(run, out, lambda t, j: fresh(j))
    with pytest.raises(CalibrationError, match="5 pictures are too few for neighbours: attack with clique"):
        attack(run, "adaptive")
    assert len(attack(run)) == 5


def test_thresholds_of_an_earlier_version_stay_and_new_ones_join(out, run):
    write_generations(run, out, lambda t, j: fresh(j))
    attack(run)
    now = manifest.read_json(run / "calibration.json")
    manifest.write_json(run / "calibration.json", {k: v for k, v in now.items() if not k.startswith("ratio")})
    attack(run, "adaptive")
    assert manifest.read_json(run / "calibration.json") == now


# Templates


def frame(number: int, size: int = 128) -> np.ndarray:
    """A border that is always the same around a middle that never is."""
    coarse = np.random.default_rng(999).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    inner = slice(size * 5 // 16, size * 11 // 16)
    picture[inner, inner] = paint(500 + number, size)[inner, inner]
    return picture


@pytest.fixture(scope="module")
def framed(tmp_path_factory):
    """Four framed pictures, which dedup calls look-alikes, and twelve others, one of them three times."""
    folder = tmp_path_factory.mktemp("framed")
    pictures = {f"framed {number}": frame(number) for number in range(4)}
    pictures |= {f"picture {number}": paint(number) for number in range(12)}
    for number, (caption, picture) in enumerate(pictures.items()):
        for copy in range(3 if caption == "picture 0" else 1):
            write_png(folder / "src" / f"{number:02d}-{copy}.png", picture)
            (folder / "src" / f"{number:02d}-{copy}.txt").write_text(caption)
    deduplicate(folder / "src", folder / "out", Options(), jobs=1)
    return folder / "out"


def test_the_mask_is_what_repeats(framed):
    targets = load_targets(framed)
    masks, partners = build_masks(framed, targets, load_pixels(framed, targets, RESOLUTION))
    is_framed = targets["prompt"].str.starts_with("framed").to_numpy()
    assert is_framed.sum() == 4
    assert (partners[is_framed] == 3).all()
    assert (partners[~is_framed] == 0).all()  # equal copies differ nowhere: no template
    assert not masks[~is_framed].any()
    expected = np.ones((RESOLUTION, RESOLUTION), bool)
    expected[10:22, 10:22] = False
    for mask in masks[is_framed]:
        assert (mask == expected).mean() > 0.97


def test_masked_distance_is_that_of_the_masked_pixels():
    rng = np.random.default_rng(0)
    a, b, mask = rng.random((3, 8, 8, 3)), rng.random((2, 8, 8, 3)), rng.random((8, 8)) < 0.4
    expected = [[np.sqrt(np.square(x - y)[mask].mean()) for y in b] for x in a]
    np.testing.assert_allclose(masked_l2(a, b, mask), expected, rtol=1e-5)
    np.testing.assert_allclose(masked_l2(a, b, np.ones((8, 8), bool)), l2(a, b), rtol=1e-5)
    square = np.square(a[0] - b[0])[mask].sum() / mask.mean()  # Webster's SSE at this size
    assert masked_l2(a[:1], b[:1], mask).item() == pytest.approx(np.sqrt(square / a[0].size))


def test_masks_that_say_nothing_are_none():
    rng = np.random.default_rng(1)
    picture = rng.random((32, 32, 3))
    nothing, _ = build_mask(picture, rng.random((4, 32, 32, 3)))
    assert not nothing.any()
    corner = picture.copy()
    corner[:4, :4] = 1 - corner[:4, :4]
    whole, partners = build_mask(picture, corner[None])
    assert partners == 1
    assert not whole.any()
    assert build_mask(picture, picture[None])[1] == 0


def test_a_template_comes_back_that_no_picture_shows(framed, tmp_path):
    """The frame around a middle that stands nowhere: the template matches, what it frames does not."""
    run = make_run(tmp_path, framed)
    names = [f"framed {number}" for number in range(4)]

    def answer(target, j):
        if target["prompt"] not in names or j > 4:
            return fresh(j)
        return disturb(cv2.resize(frame(40 + j), (RESOLUTION, RESOLUTION), interpolation=cv2.INTER_AREA), 0.02, j)

    write_generations(run, framed, answer)
    scores = attack(run, "template")
    assert dict(scores.schema) == SCHEMAS["template"]
    has = scores["prompt"].is_in(names)
    assert (scores.filter(has)["matches"] == 5).all()
    assert (scores.filter(has)["verbatim"] == 0).all()
    assert scores.filter(has)["mask_share"].is_between(0.8, 0.9).all()
    assert scores.filter(~has)["matches"].null_count() == (~has).sum()
    assert scores["extracted"].to_list() == has.to_list()
    summary = summarise_scores(scores)
    assert (summary["members"]["prompts"], summary["members"]["extracted"], summary["difference"]) == (4, 4, None)
    assert summary["cannot_match"] == (~has).sum()
    assert not attack(run)["extracted"].any()  # what came back is as near to one framed picture as to the others


def test_unrelated_pictures_show_no_template(framed, tmp_path):
    run = make_run(tmp_path, framed)
    write_generations(run, framed, lambda t, j: fresh(j))
    scores = attack(run, "template")
    assert scores["matches"].sum() == 0
    assert (scores["best_distance"].drop_nulls() > 0.15).all()


def test_verbatim_copies_are_told_from_templates(framed, tmp_path):
    run = make_run(tmp_path, framed)
    small = dict(zip(*load_targets_and_pixels(framed), strict=True))
    write_generations(run, framed, lambda t, j: small[t["target_id"]])
    scores = attack(run, "template").filter(pl.col("mask_share").is_not_null())
    assert len(scores) == 4
    assert (scores["verbatim"] == scores["matches"]).all()
    assert (scores["matches"] == 8).all()


def load_targets_and_pixels(out):
    targets = load_targets(out)
    return targets["target_id"].to_list(), load_pixels(out, targets, RESOLUTION)


def test_all_attacks_have_one_signature(out, originals, run):
    """Each goes through the same door, and leaves one row a target."""
    write_generations(run, out, lambda t, j: originals[t["target_id"]])
    for name in ATTACKS:
        scores = attack(run, name)
        assert scores["target_id"].to_list() == load_targets(out)["target_id"].to_list()
        assert {"matches", "extracted", "best_file"} <= set(scores.columns)
        assert {"best_distance", "best_similarity"} & set(scores.columns)
