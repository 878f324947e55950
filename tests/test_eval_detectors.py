"""eval.detectors and eval.prompts: noise whatever the model predicts, controls, labels, refusals."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from diffusers import DDIMScheduler
from test_defense_data import build_small
from test_eval_controls import make_pipeline
from test_eval_targets import RESOLUTION, make_plain, make_planted, make_run, paint
from typer.testing import CliRunner

from dedup import manifest
from defense.conditions import embed_captions
from defense.sampling import make_generators
from eval import detectors
from eval.cli import app
from eval.denoiser import NOISIEST, PREDICTIONS, Denoiser, DenoiserError
from eval.detectors import DETECTIONS, DETECTORS, DetectError, detect, score_prompts
from eval.metrics import auc
from eval.prompts import PROMPTS, list_prompts
from eval.reference import load_pixels, read_plant

CAPTIONS = [f"picture number {number}" for number in range(24)]
SEEDS = [[100 * number + j for j in range(4)] for number in range(24)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return build_small(tmp_path_factory.mktemp("small"))


def score(pipeline, prompts, seeds, name) -> np.ndarray:
    return score_prompts(pipeline, prompts, seeds, [name])[name]


def memorising(prediction_type: str = "v_prediction") -> SimpleNamespace:
    """A model that is 30 pictures and knows 12 of their captions; the other 12 captions mean nothing to it."""
    pixels = np.stack([paint(number, 16) for number in range(30)])
    return make_pipeline(pixels, [*CAPTIONS[:12], *(f"other {number}" for number in range(18))], prediction_type)


# What is predicted


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predictions_become_noise_as_diffusers_does_it(prediction_type):
    """The image that a DDIM step reports, put back into x = √ᾱ image + √(1 - ᾱ) noise."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    x, out = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    for timestep in (41, 500, 900):
        clean = scheduler.step(out, timestep, x).pred_original_sample
        alpha = scheduler.alphas_cumprod[timestep]
        expected = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        unet = lambda *a, **k: (out,)  # noqa: E731
        denoiser = Denoiser(unet, scheduler.alphas_cumprod, prediction_type)
        noise = denoiser.predict(x, timestep, {})
        torch.testing.assert_close(noise, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(denoiser.add_noise(clean, noise, timestep), x, rtol=1e-3, atol=1e-3)


def test_what_a_model_predicts_does_not_change_its_scores():
    """One and the same denoiser, asked for noise, for v and for the image."""
    for name in DETECTORS:
        kinds = [score(memorising(kind), CAPTIONS[10:14], SEEDS[10:14], name) for kind in PREDICTIONS]
        if name == "noise-magnitude":  # schedules differ: without v there is no zero terminal SNR
            assert np.corrcoef(kinds[0], kinds[1])[0, 1] > 0.99
        np.testing.assert_allclose(kinds[0], kinds[2], rtol=1e-3)


def test_the_first_step_is_that_of_stable_diffusion():
    sd = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    assert Denoiser(None, sd, "epsilon").noisiest == 999
    zero = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    ).alphas_cumprod
    step = Denoiser(None, zero, "v_prediction").noisiest
    assert zero[step] >= NOISIEST > zero[step + 1]
    assert 800 < step < 999


def test_magnitude_and_one_step_equal_their_formulas(small):
    """Written out for one prompt and two noises, with the U-Net called by hand; the small model predicts v."""
    prompt, seeds = "a red thing", [3, 4]
    unet, alphas = small.unet, small.scheduler.alphas_cumprod
    timestep = int((alphas >= NOISIEST).nonzero().max())
    side = unet.config.sample_size
    alpha, norms, steps = alphas[timestep], [], []
    empty, context = embed_captions(small, [prompt]).tokens.split(1)
    with torch.inference_mode():
        for chance in make_generators(seeds):
            noise = torch.randn((1, unet.config.in_channels, side, side), generator=chance)
            c, u = (unet(noise, timestep, encoder_hidden_states=e).sample for e in (context, empty))
            c, u = (alpha.sqrt() * v + (1 - alpha).sqrt() * noise for v in (c, u))
            norms.append((c - u).norm().item())
            sigma = ((1 - alpha) / alpha).sqrt()
            z0 = noise * (1 + sigma**2).sqrt()  # in the scale where noise has variance σ², one Euler step to 0
            z1 = z0 - sigma * (u + 7.5 * (c - u))
            steps.append((z0 - z1).square().mean().item())
    assert score(small, [prompt], [seeds], "noise-magnitude") == pytest.approx([np.mean(norms)], rel=1e-4)
    assert score(small, [prompt], [seeds], "one-step") == pytest.approx([np.mean(steps)], rel=1e-4)


# Controls


@pytest.mark.parametrize("name", DETECTORS)
def test_a_model_that_memorises_is_found(name):
    """Half of the captions each lead to one picture, the others to the mean of all."""
    scores = score(memorising(), CAPTIONS, SEEDS, name)
    assert auc(scores, np.arange(24) < 12).estimate > 0.95


@pytest.mark.parametrize("name", DETECTORS)
def test_an_untrained_model_has_memorised_nothing(small, name):
    scores = score(small, CAPTIONS, SEEDS, name)
    rng = np.random.default_rng(0)
    areas = [auc(scores, rng.permutation(24) < 12) for _ in range(40)]
    assert np.mean([area.low <= 0.5 <= area.high for area in areas]) >= 0.85


def test_scores_depend_on_prompt_and_seeds_alone(small, monkeypatch):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    names = list(DETECTORS)
    whole = score_prompts(small, CAPTIONS[:6], SEEDS[:6], names)
    again = score_prompts(small, CAPTIONS[:6], SEEDS[:6], names)
    turned = score_prompts(small, CAPTIONS[5::-1], SEEDS[5::-1], names)
    monkeypatch.setattr(detectors, "BATCH", 8)
    pieces = score_prompts(small, CAPTIONS[:6], SEEDS[:6], names)
    for name in names:
        assert np.array_equal(again[name], whole[name])
        np.testing.assert_allclose(turned[name][::-1], whole[name], rtol=1e-4)
        np.testing.assert_allclose(pieces[name], whole[name], rtol=1e-4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(score(small, [], [], "agreement")) == 0


# Prompts and labels


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("detect"), levels=(0, 1, 2, 5), canaries=8)


@pytest.fixture
def run(out, tmp_path, small, monkeypatch):
    """A run that has seen every row ten times, and no spare image."""
    run = make_run(tmp_path, out)
    small.save_pretrained(run / "model")
    rows = manifest.read(out)
    exposures = rows.select("id", "cluster_id", "key", held_out=pl.lit(False), exposures=pl.lit(10))
    manifest.write_parquet(run / "exposures.parquet", exposures)
    return run


def test_every_caption_is_asked_once_with_its_multiplicity(out, run):
    prompts = list_prompts(out, run / "exposures.parquet", 2, 1000)
    assert dict(prompts.schema) == PROMPTS
    assert prompts["prompt"].is_unique().all()
    assert prompts["prompt_id"].is_unique().all()
    canaries = prompts.filter(kind="canary")
    truth = read_plant(out).select("canary", "multiplicity").unique().sort("canary")
    assert canaries.select("prompt_id", "multiplicity").sort("prompt_id").rows() == truth.rows()
    assert (canaries["exposures"] == 10 * canaries["multiplicity"]).all()
    assert (prompts.filter(kind="dataset")["multiplicity"] == 1).all()
    spare = prompts.filter(kind="spare")
    assert len(spare) > 5
    assert (spare["multiplicity"] == 0).all()
    assert (spare["exposures"] == 0).all()


def test_limits_keep_the_most_duplicated_and_a_mixture_of_the_others(out, run):
    prompts = list_prompts(out, run / "exposures.parquet", 2, 3)
    assert prompts["multiplicity"].to_list()[:3] == [5, 5, 2]
    assert len(prompts) == 6
    assert list_prompts(out, run / "none.parquet", 2, 3)["exposures"].null_count() == 6


def test_what_training_held_out_stands_nowhere(tmp_path):
    out = make_plain(tmp_path, [3, 1, 2, 1])
    rows = manifest.read(out)
    held = pl.col("caption") == "picture 0"
    exposures = rows.select("id", "cluster_id", "key", held_out=held, exposures=pl.when(held).then(0).otherwise(4))
    manifest.write_parquet(tmp_path / "exposures.parquet", exposures)
    given = dict(list_prompts(out, tmp_path / "exposures.parquet", 2, 10).select("prompt", "multiplicity").iter_rows())
    assert given == {"picture 0": 0, "picture 1": 1, "picture 2": 2, "picture 3": 1}
    assert (
        dict(list_prompts(out, tmp_path / "no", 2, 10).select("prompt", "multiplicity").iter_rows())["picture 0"] == 3
    )


def test_a_caption_of_many_pictures_counts_for_the_most_frequent(tmp_path):
    out = make_plain(tmp_path, [1, 4, 1], ["same", "same", None])
    prompts = list_prompts(out, tmp_path / "no", 2, 10)
    assert prompts.select("prompt", "multiplicity").rows() == [("same", 4)]


# The verb


def test_files_and_summary(out, run, monkeypatch):
    """A model that is its dataset knows canaries; what the summary says can be computed from the files."""
    rows = manifest.read(out).filter(pl.col("key").is_in(read_plant(out)["key"].drop_nulls().to_list()))
    pipeline = make_pipeline(load_pixels(out, rows, RESOLUTION), rows["caption"].to_list())
    monkeypatch.setattr("defense.model.load_pipeline", lambda folder, **_: pipeline)
    summary = detect(run, ["noise-magnitude", "agreement"], n=2, at_least=1)
    assert summary == json.loads((run / "detectors.json").read_text())
    table = pl.read_parquet(run / "scores-noise-magnitude.parquet")
    assert dict(table.schema) == DETECTIONS
    positive = (table["multiplicity"] >= 1).to_numpy()
    canary = (table["kind"] == "canary").to_numpy()
    assert summary["positives"] == positive.sum()
    assert summary["among"] == "canaries"
    assert summary["unseen"] == (table["exposures"] == 0).sum() > 0
    found = summary["detectors"]["noise-magnitude"]
    area = lambda some: auc(table["score"].to_numpy()[some], positive[some]).estimate  # noqa: E731
    assert found["auc"]["estimate"] == pytest.approx(area(canary), rel=1e-5)
    assert found["auc_all"]["estimate"] == pytest.approx(area(canary | True), rel=1e-5)
    assert found["tpr_at_fpr"]["0.01"]["tpr"]["estimate"] is None
    assert "needs 1,000" in found["tpr_at_fpr"]["0.01"]["reason"]
    before = (run / "scores-noise-magnitude.parquet").read_bytes()
    detect(run, ["noise-magnitude"], n=2, at_least=1)
    assert (run / "scores-noise-magnitude.parquet").read_bytes() == before


def test_the_command_prints_a_table_that_fits_a_terminal(run):
    done = CliRunner().invoke(app, ["detect", str(run), "-n", "2", "--limit", "20"])
    assert done.exit_code == 0, done.exception
    assert "4 captions of images that stand 2 times or more, 20 others" in done.stdout
    for name in (*DETECTORS, "caption-length"):
        assert f"\n{name} " in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()[:-1]) <= 100


def test_models_that_give_no_numbers_are_counted(run, monkeypatch):
    nothing = lambda pipeline, prompts, *_: {"one-step": np.full(len(prompts), math.nan)}  # noqa: E731
    monkeypatch.setattr(detectors, "score_prompts", nothing)
    summary = detect(run, ["one-step"], n=1)
    assert summary["detectors"]["one-step"]["nan"] == summary["positives"] + summary["negatives"]
    assert (
        pl.read_parquet(run / "scores-one-step.parquet")["score"].null_count()
        == summary["detectors"]["one-step"]["nan"]
    )


def test_one_kind_of_prompt_gives_scores_and_no_area(run):
    summary = detect(run, ["one-step"], n=1, at_least=100)
    assert "both kinds" in summary["reason"]
    assert (run / "scores-one-step.parquet").exists()


# Refusals


def test_what_cannot_be_asked_is_refused_in_one_line(run, small):
    with pytest.raises(DetectError, match="unknown detector 'magic': choose of noise-magnitude"):
        detect(run, ["magic"])
    with pytest.raises(DetectError, match="-n 2 or more"):
        detect(run, ["agreement"], n=1)
    with pytest.raises(DetectError, match="at least 1"):
        detect(run, n=0)
    shutil.rmtree(run / "model")
    with pytest.raises(ValueError, match="holds no pipeline"):
        detect(run)


def test_other_pipelines_are_refused_in_one_line(small):
    parts = {name: getattr(small, name) for name in ("unet", "text_encoder", "tokenizer", "scheduler")}
    wide = SimpleNamespace(config=SimpleNamespace(**{**small.unet.config, "in_channels": 9}))
    large = SimpleNamespace(
        config=SimpleNamespace(**{**small.unet.config, "addition_embed_type": "text_time"}), device="cpu"
    )
    flow = SimpleNamespace(config=SimpleNamespace(prediction_type="flow_prediction"), alphas_cumprod=torch.ones(3))
    for change, message in [
        ({"unet": None, "transformer": "a transformer"}, "no U-Net"),
        ({"text_encoder_2": "another"}, "no single text encoder"),
        ({"unet": wide}, "takes more than noise"),
        ({"unet": large}, "conditioned on more than text"),
        ({"scheduler": SimpleNamespace(config=SimpleNamespace(prediction_type="epsilon"))}, "discrete noise schedule"),
        ({"scheduler": flow}, "predicts 'flow_prediction'"),
    ]:
        with pytest.raises(DenoiserError, match=message) as caught:
            score_prompts(SimpleNamespace(**{**parts, **change}), ["a"], [[1]], ["one-step"])
        assert "\n" not in str(caught.value)
