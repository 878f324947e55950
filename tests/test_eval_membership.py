"""eval.membership, eval.inference, eval.denoiser: controls, formulas, folds, refusals."""

import json
import math
from functools import cache

import numpy as np
import polars as pl
import pytest
import torch
from test_defense_data import build_small
from test_defense_model import build_ddpm, build_sd3, build_sd14, build_sdxl
from test_eval_controls import make_pipeline
from test_eval_targets import RESOLUTION, make_plain, make_planted, make_run, paint
from typer.testing import CliRunner

from dedup import manifest
from defense.data import encode_latents
from defense.sampling import make_generators
from eval import membership
from eval.cli import app
from eval.denoiser import DenoiserError
from eval.inference import fit_logistic, infer_dataset, orient
from eval.membership import BLIND, FEATURES, MEMBERS, SCORES, MembershipError, infer_membership, score_pictures
from eval.metrics import auc

WITHOUT_MIDDLE = {name: score for name, score in SCORES.items() if name != "spikiness"}
MEMBER = np.arange(40) < 20
SEEDS = [[1_000 + 10 * number + j for j in range(4)] for number in range(40)]
CAPTIONS = [f"picture number {number}" for number in range(40)]


@cache
def memorising(prediction_type: str = "v_prediction"):
    """A model that is the first half of 40 pictures, and the pictures."""
    pixels = np.stack([paint(number, 16) for number in range(40)])
    return make_pipeline(pixels[MEMBER], CAPTIONS[:20], prediction_type), pixels


# Controls


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_a_model_that_is_its_dataset_knows_its_members(prediction_type):
    pipeline, pixels = memorising(prediction_type)
    scores = score_pictures(pipeline, pixels, CAPTIONS, SEEDS, WITHOUT_MIDDLE)
    for name, values in scores.items():
        assert auc(values, MEMBER).estimate > 0.98, name


def test_without_captions_too():
    pipeline, pixels = memorising()
    scores = score_pictures(pipeline, pixels, [""] * 40, SEEDS, WITHOUT_MIDDLE)
    assert auc(scores["loss"], MEMBER).estimate > 0.9


@pytest.mark.parametrize("build", [build_sd14, build_sdxl, build_ddpm])
def test_untrained_models_of_every_class_know_nobody(build):
    """Random weights go through every score, and tell members from others as often as chance does."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = build()
    pixels = np.stack([paint(number, 16) for number in range(40)])
    scores = score_pictures(pipeline, pixels, CAPTIONS, SEEDS, SCORES | FEATURES)
    rng = np.random.default_rng(0)
    for name, values in scores.items():
        assert np.isfinite(values).all(), name
        areas = [auc(values, rng.permutation(MEMBER)) for _ in range(40)]
        assert np.mean([area.low <= 0.5 <= area.high for area in areas]) >= 0.85, name


# Formulas


def test_loss_and_norm_equal_their_formulas():
    """Written out for one picture and two noises, with the U-Net called by hand; the small model predicts v."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipeline = build_sd14("v_prediction")
    pixels, seeds = paint(3, 16)[None], [5, 6]
    found = score_pictures(pipeline, pixels, ["a"], [seeds], SCORES)
    clean, alpha = encode_latents(pixels, pipeline), pipeline.scheduler.alphas_cumprod[100]
    tokens = pipeline.encode_prompt("a", "cpu", 1, False)[0]
    losses = []
    with torch.inference_mode():
        for chance in make_generators(seeds):
            noise = torch.randn(clean.shape[1:], generator=chance)[None]
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
            v = pipeline.unet(noisy, 100, encoder_hidden_states=tokens).sample
            losses.append((alpha.sqrt() * v + (1 - alpha).sqrt() * noisy - noise).square().mean().item())
        v = pipeline.unet(clean, 100, encoder_hidden_states=tokens).sample
        norm = (alpha.sqrt() * v + (1 - alpha).sqrt() * clean).square().mean().sqrt().item()
    assert found["loss"] == pytest.approx([-np.mean(losses)], rel=1e-4)
    assert found["sima"] == pytest.approx([-norm], rel=1e-4)


def test_spikiness_is_the_deviation_of_the_middle():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipeline = build_ddpm()
    pixels = paint(3, 16)[None]
    found = score_pictures(pipeline, pixels, [""], [[7]], SCORES)
    clean, alpha = encode_latents(pixels, pipeline), pipeline.scheduler.alphas_cumprod[50]
    noise = torch.randn(clean.shape[1:], generator=make_generators([7])[0])[None]
    seen = []
    with torch.inference_mode():
        hook = pipeline.unet.mid_block.register_forward_hook(lambda module, given, out: seen.append(out))
        pipeline.unet(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, 50)
    hook.remove()
    assert found["spikiness"] == pytest.approx([seen[0].std().item()], rel=1e-4)
    assert not pipeline.unet.mid_block._forward_hooks


def test_batches_do_not_change_scores(monkeypatch):
    pipeline, pixels = memorising()
    whole = score_pictures(pipeline, pixels, CAPTIONS, SEEDS, WITHOUT_MIDDLE)
    monkeypatch.setattr(membership, "BATCH", 12)
    for name, values in score_pictures(pipeline, pixels, CAPTIONS, SEEDS, WITHOUT_MIDDLE).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-3)


# Nothing is judged on what was fitted


def test_a_sign_comes_from_the_other_fold():
    rng = np.random.default_rng(0)
    member, folds = rng.random(400) < 0.5, rng.random(400) < 0.5
    scores = np.where(member, -1.0, 1.0) + rng.normal(size=400)
    assert auc(orient(scores, member, folds), member).estimate > 0.85
    lying = np.where(folds, scores, -scores)  # the folds disagree: each is turned the wrong way
    assert auc(orient(lying, member, folds), member).estimate < 0.15


def test_dataset_inference_is_valid_and_has_power():
    """Under no effect at most a twentieth of the p-values lie below .05, although 15 features fit any 20 pictures."""
    rng = np.random.default_rng(1)
    nothing, shifted = [], []
    for _ in range(150):
        member, folds = np.arange(60) < 20, rng.random(60) < 0.5
        features = rng.normal(size=(60, 15))
        scores, p = infer_dataset(features, member, folds)
        nothing.append((p, auc(scores, member).estimate))
        shifted.append(infer_dataset(features + 0.6 * member[:, None], member, folds)[1])
    p_values, areas = np.array(nothing).T
    assert (p_values < 0.05).mean() <= 0.09  # a twentieth, and three standard errors
    assert abs(areas.mean() - 0.5) < 0.03
    assert (np.array(shifted) < 0.05).mean() > 0.9


def test_the_logistic_regression_is_at_its_minimum():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(80, 3)), rng.random(80) < 0.3
    weights = fit_logistic(x, y)
    rows = np.where(y, 0.5 / y.sum(), 0.5 / (~y).sum()) * 80

    def loss(w, b):
        return (rows * np.logaddexp(0, -np.where(y, 1, -1) * (x @ w + b))).sum() + np.square(w).sum() / 2

    b = min(np.linspace(-1, 1, 2001), key=lambda b: loss(weights, b))
    for step in np.vstack([np.eye(3), -np.eye(3)]) * 0.01:
        assert loss(weights + step, b) > loss(weights, b)


# The verb


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("membership"), levels=(0, 1, 3), canaries=24, fillers=10, edited=0.0)


@pytest.fixture
def run(out, tmp_path):
    run = make_run(tmp_path, out)
    build_small(tmp_path, resolution=RESOLUTION).save_pretrained(run / "model")
    return run


def test_files_and_summary(out, run):
    summary = infer_membership(run, n=2)
    assert summary == json.loads((run / "membership.json").read_text())
    assert (summary["members"], summary["others"]) == (16, 8)
    table = pl.read_parquet(run / "membership.parquet")
    assert table.columns == [*MEMBERS, *SCORES, *FEATURES, BLIND]
    assert table["member"].to_list() == (table["multiplicity"] > 0).to_list()
    found = summary["scores"]["loss"]
    expected = auc(table["loss"].to_numpy(), table["member"].to_numpy()).estimate
    assert found["auc"]["estimate"] == pytest.approx(expected, rel=1e-5)
    assert found["auc_by_multiplicity"].keys() == {"1", "3"}
    assert found["tpr_at_fpr"]["0.05"]["tpr"]["estimate"] is None
    assert "8 negatives; a rate of 0.05 needs 200" in found["tpr_at_fpr"]["0.05"]["reason"]
    before = (run / "membership.parquet").read_bytes()
    infer_membership(run, n=2)
    assert (run / "membership.parquet").read_bytes() == before


def test_what_training_did_not_see_is_no_member(out, run):
    """An arm that dropped every copy of a canary: that canary is no member."""
    rows = manifest.read(out)
    lost = pl.read_parquet(out / "plant.parquet").filter(multiplicity=3)["canary"].drop_nulls().unique().sort()[0]
    keys = pl.read_parquet(out / "plant.parquet").filter(canary=lost)["key"].drop_nulls().to_list()
    seen = pl.when(pl.col("key").is_in(keys)).then(0).otherwise(5)
    exposures = rows.select("id", "cluster_id", "key", held_out=pl.lit(False), exposures=seen)
    manifest.write_parquet(run / "exposures.parquet", exposures)
    summary = infer_membership(run, n=1)
    table = pl.read_parquet(run / "membership.parquet")
    assert (summary["members"], summary["others"]) == (15, 9)
    assert not table.filter(target_id=lost)["member"].item()


def test_the_command_prints_a_table_that_fits_a_terminal(run):
    done = CliRunner().invoke(app, ["membership", str(run), "-n", "1"])
    assert done.exit_code == 0, done.exception
    assert "16 pictures that were trained on, 8 of the same kind that were not" in done.stdout
    for name in (*SCORES, "dataset", BLIND):
        assert f"\n{name} " in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()[:-1]) <= 100


# Refusals


def test_too_few_of_a_kind_are_refused(tmp_path):
    out = make_plain(tmp_path, [1, 2, 1, 1])
    run = make_run(tmp_path, out)
    with pytest.raises(MembershipError, match="4 members and 0 others of the same kind; 8 of each are needed"):
        infer_membership(run)


def test_models_that_cannot_be_looked_into_are_refused():
    with pytest.raises(DenoiserError, match="StableDiffusion3Pipeline has no U-Net"):
        score_pictures(build_sd3(), paint(0, 16)[None], ["a"], [[1]], SCORES)
    pipeline, pixels = memorising()
    with pytest.raises(MembershipError, match="without mid_block"):
        score_pictures(pipeline, pixels, CAPTIONS, SEEDS, SCORES)


def test_models_that_give_no_numbers_are_counted(out, run, monkeypatch):
    def broken(pipeline, pixels, captions, seeds, scores):
        values = {name: np.random.default_rng(0).random(len(pixels)) for name in scores}
        values["loss"][0] = math.nan
        return values

    monkeypatch.setattr(membership, "score_pictures", broken)
    assert infer_membership(run, n=1)["finite"] == 23
    assert pl.read_parquet(run / "membership.parquet")["loss"].null_count() == 1
