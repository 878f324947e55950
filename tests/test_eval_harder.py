"""The attacks that ask more of a model: extrapolation, residual probe, replication; and what `attack` says of them."""

import json
import shutil
from functools import partial

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats
from test_defense_data import build_small
from test_defense_model import build_ddpm, build_sd3, build_sd14, build_sdxl
from test_eval_controls import DatasetDenoiser, make_pipeline
from test_eval_extraction import disturb, fresh
from test_eval_targets import RESOLUTION, make_planted, make_run, paint, write_generations
from typer.testing import CliRunner

from dedup import manifest
from defense.adopt import extrapolate
from defense.conditions import embed_captions
from defense.data import encode_latents
from defense.distances import l2, scale
from defense.extrapolation import Extrapolated, ExtrapolationError
from defense.extrapolation import extrapolate as combine
from defense.model import ModelError, load_pipeline
from defense.sampling import sample
from defense.train import RunError
from eval import probe
from eval.cli import app
from eval.denoiser import DenoiserError, open_denoiser
from eval.extraction import SCHEMAS, attack
from eval.generate import derive_seed, generate, read_config
from eval.probe import PROBE, ProbeError, draw, find_tokens
from eval.reference import load_pixels
from eval.replication import ReplicationError, embed
from eval.summary import rate_difference
from eval.targets import load_targets

CAPTIONS = ["a red thing", "a blue thing", "something else"]
SETTINGS = {"steps": 6, "guidance_scale": 1.0, "batch_size": 8}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("harder"), levels=(0, 1, 2, 5), canaries=8, fillers=30, edited=0.0)


@pytest.fixture(scope="module")
def originals(out):
    targets = load_targets(out)
    return dict(zip(targets["target_id"], load_pixels(out, targets, RESOLUTION), strict=True))


@pytest.fixture
def run(out, tmp_path):
    return make_run(tmp_path, out)


# Extrapolation


@pytest.mark.parametrize("build", [build_sd14, build_sdxl, build_ddpm])
def test_weights_nought_and_one_are_the_models_themselves(build):
    """Classes of Stable Diffusion 1.4, XL and DDPM: the sampler cannot tell."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuned, base = build(), build()
    prompts = [""] * 2 if build is build_ddpm else CAPTIONS[:2]
    networks = tuned.unet, base.unet
    for weight, unet in ((1.0, networks[0]), (0.0, networks[1])):
        tuned.unet = unet
        expected = sample(tuned, prompts, [1, 2], **SETTINGS)
        tuned.unet = Extrapolated(*networks, weight)
        np.testing.assert_array_equal(sample(tuned, prompts, [1, 2], **SETTINGS), expected)


def test_extrapolated_noise_is_that_of_the_paper_whatever_is_predicted():
    """ε = ε_base + w (ε_tuned - ε_base), from v, from the image and from noise."""
    x, a, b = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    for kind in ("epsilon", "v_prediction", "sample"):
        pipeline = make_pipeline(np.stack([paint(0, 8)]), ["a"], kind)
        nets = [torch.nn.Module() for _ in range(2)]
        for net, answer in zip(nets, (a, b), strict=True):
            net.config, net.device = pipeline.unet.config, "cpu"
            net.forward = lambda *_, answer=answer, **__: (answer,)
        told = []
        for unet in (*nets, Extrapolated(*nets, 3.0)):
            pipeline.unet = unet
            told.append(open_denoiser(pipeline).predict(x, 400, {}))
        torch.testing.assert_close(told[2], told[1] + 3 * (told[0] - told[1]), rtol=1e-4, atol=1e-4)


def test_what_fine_tuning_added_comes_out():
    """A model whose score is one third that of a new picture and two thirds its base's, as the paper assumes of one.

    Alone it gives the new picture back seldom, three times as far from the base always.
    """
    pixels = np.stack([paint(number, 16) for number in range(9)])
    base, new = make_pipeline(pixels[:8], ["one"] * 8), make_pipeline(pixels[8:], ["one"])
    tuned = Extrapolated(new.unet, base.unet, 1 / 3)
    shares = []
    for weight in (1.0, 3.0):
        base.unet, unet = Extrapolated(tuned, base.unet, weight), base.unet
        made = sample(base, ["one"] * 32, range(32), **SETTINGS | {"steps": 12})
        shares.append((l2(scale(made), scale(pixels[8:])) < 0.1).mean())
        base.unet = unet
    assert shares[0] < 0.5
    assert shares[1] == 1


def test_models_of_two_families_are_refused(tmp_path):
    small = [build_small(tmp_path, seed=seed) for seed in (0, 1)]
    with pytest.raises(ExtrapolationError, match="differ in weights of text_encoder are not of one family"):
        combine(*small, 3.0)
    other = build_small(tmp_path, prediction_type="epsilon")
    with pytest.raises(ExtrapolationError, match="differ in scheduler are"):
        combine(small[0], other, 3.0)
    with torch.random.fork_rng():
        black_box, plain = build_sd3(), build_ddpm()
    with pytest.raises(ExtrapolationError, match="StableDiffusion3Pipeline has no U-Net"):
        combine(black_box, black_box, 3.0)
    with pytest.raises(ExtrapolationError, match=r"classes .StableDiffusionPipeline, DDPMPipeline"):
        combine(small[0], plain, 3.0)


@pytest.fixture
def pair(out, run, tmp_path):
    """A run, and one that it was tuned from."""
    base = make_run(tmp_path, out, "refill")
    pipeline = build_small(tmp_path, resolution=RESOLUTION)
    pipeline.save_pretrained(base / "model")
    with torch.no_grad():
        for weight in pipeline.unet.parameters():
            weight.add_(0.01)
    pipeline.save_pretrained(run / "model")
    manifest.write_parquet(run / "exposures.parquet", pl.DataFrame({"key": ["a"]}))
    return run, base


def test_a_line_through_two_models_is_a_run(pair, tmp_path):
    run, base = pair
    new = tmp_path / "new"
    command = ["extrapolate", str(run), str(base), "-o", str(new), "--weight", "2"]
    for _ in range(2):  # the second time it is there
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.exception
    assert read_config(new)["arm"] == "raw, extrapolated"
    assert (new / "exposures.parquet").exists()
    drawn = {where.name: generate(where, n=4, steps=2) for where in (run, base, new)}
    tables = list(drawn.values())
    assert all(table.select("prompt_id", "seed").equals(tables[0].select("prompt_id", "seed")) for table in tables)
    assert len({table["digest"][0] for table in tables}) == 3
    assert len(attack(new)) == 8
    tuned, far = load_pipeline(run / "model"), load_pipeline(new / "model")
    combine(tuned, load_pipeline(base / "model"), 2.0)
    expected = sample(tuned, CAPTIONS, [1, 2, 3], **SETTINGS)
    np.testing.assert_array_equal(sample(far, CAPTIONS, [1, 2, 3], **SETTINGS), expected)
    with pytest.raises(RunError, match=r"weight was 2.0, is 3.0"):
        extrapolate(run, str(base), new, 3.0)


def test_a_line_through_other_weights_is_refused(pair, tmp_path):
    run, base = pair
    extrapolate(run, str(base / "model"), tmp_path / "new", 3.0)
    shutil.copytree(run / "model", base / "model", dirs_exist_ok=True)
    with pytest.raises(ModelError, match="no longer the model that"):
        load_pipeline(tmp_path / "new" / "model")


# Residual probe


def hiding(pixels: np.ndarray, captions: list[str]):
    """A model that is its pictures, softly addressed: the nearer the tokens to a caption, the likelier its picture."""
    pipeline = make_pipeline(pixels, captions)

    class Soft(DatasetDenoiser):
        def forward(self, x, timestep, encoder_hidden_states, return_dict=False):
            alpha = self.scheduler.alphas_cumprod[timestep].reshape(-1, 1, 1)
            gaps = (encoder_hidden_states.flatten(1)[:, None] - self.contexts.flatten(1)).square().mean(-1)  # (B, K)
            clean = ((-20 * gaps).softmax(dim=1) @ self.pictures.flatten(1)).reshape(x.shape)
            alpha = alpha[..., None]
            noise = (x - alpha.sqrt() * clean) / (1 - alpha).clamp(min=1e-6).sqrt()
            return (alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,)

    soft = Soft(pipeline.unet.pictures, pipeline.unet.contexts, pipeline.scheduler)
    pipeline.unet = soft
    return pipeline


@pytest.mark.parametrize("start", probe.STARTS)
def test_a_hidden_picture_is_found_and_an_unknown_one_is_not(start):
    """Asked by another caption the model says nothing of picture 0; the probe gets it, and no picture it never saw."""
    pixels = np.stack([paint(number, 16) for number in range(12)])
    pipeline = hiding(pixels[:10], [f"picture number {number}" for number in range(10)])
    latents = encode_latents(pixels, SimplePixels())
    asked = "picture number 5"
    plain = scale(sample(pipeline, [asked] * 4, list(range(4)), **SETTINGS))
    assert (l2(plain, scale(pixels[:1])) > 0.15).all()
    weights = pipeline.unet.pictures.clone()
    found = scale(draw(pipeline, find_tokens(pipeline, latents[0], asked, start, [1], 150), asked, [0, 1, 2, 3], 6))
    assert (l2(found, scale(pixels[:1])) < 0.12).all()
    unknown = scale(draw(pipeline, find_tokens(pipeline, latents[11], asked, start, [1], 150), asked, [0, 1, 2, 3], 6))
    assert (l2(unknown, scale(pixels[11:])) > 0.15).all()
    assert torch.equal(pipeline.unet.pictures, weights)


class SimplePixels:
    """No autoencoder: latents are pixels."""


@pytest.mark.parametrize("build", [build_sd14, build_sdxl])
def test_probing_lowers_the_loss_and_leaves_the_model_alone(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = build()
    before = {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}
    latents = encode_latents(paint(0, 16)[None], pipeline)[0]
    state = torch.random.get_rng_state()
    few, many = (find_tokens(pipeline, latents, "a", "caption", [3], steps=steps) for steps in (0, 40))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.allclose(few, embed_captions(pipeline, ["a"]).tokens[1], atol=1e-5)
    assert torch.equal(many, find_tokens(pipeline, latents, "a", "caption", [3], steps=40))
    assert all(torch.equal(before[name], weight) for name, weight in pipeline.unet.state_dict().items())
    assert all(weight.grad is None for weight in pipeline.unet.parameters())

    def loss(tokens):
        denoiser, noise = open_denoiser(pipeline), torch.randn(32, *latents.shape)
        told = embed_captions(pipeline, ["a"]).select(torch.ones(32, dtype=torch.int64), "cpu")
        told["encoder_hidden_states"] = tokens.expand(32, *tokens.shape)
        with torch.no_grad():
            x = denoiser.add_noise(latents.expand(32, *latents.shape), noise, 500)
            return (denoiser.predict(x, 500, told) - noise).square().mean().item()

    with torch.random.fork_rng():
        losses = []
        for tokens in (few, many):
            torch.manual_seed(9)
            losses.append(loss(tokens))
    assert losses[1] < losses[0]
    assert draw(pipeline, many, "a", [1, 2], 3).shape == (2, 16, 16, 3)


def test_models_without_captions_cannot_be_probed():
    with torch.random.fork_rng():
        pipeline = build_ddpm()
    with pytest.raises(DenoiserError, match="takes no captions"):
        find_tokens(pipeline, torch.zeros(3, 16, 16), "", "caption", [1])
    with pytest.raises(DenoiserError, match="has no U-Net"):
        find_tokens(build_sd3(), torch.zeros(4, 8, 8), "", "caption", [1])


def test_the_verb_probes_every_target_and_goes_on(out, run, tmp_path, monkeypatch):
    build_small(tmp_path, resolution=RESOLUTION).save_pretrained(run / "model")
    monkeypatch.setattr(probe, "find_tokens", partial(find_tokens, steps=2))
    done = CliRunner().invoke(app, ["probe", str(run), "--steps", "2", "--start", "random"])
    assert done.exit_code == 0, done.exception
    assert "per generation" in done.stdout
    table = pl.read_parquet(run / "scores-probe.parquet")
    assert dict(table.schema) == PROBE
    assert len(table) == 8
    assert set(table["caption_kind"]) == {"probe"}
    assert (table["n_generations"] == 4).all()
    assert json.loads((run / "attack-probe.json").read_text())["by_caption_kind"].keys() == {"probe"}
    pictures = sorted((run / "probe").rglob("*.png"))
    assert len(pictures) == 32
    lost = next(path for path in pictures if path.name.endswith("003.png"))
    content, times = lost.read_bytes(), {path: path.stat().st_mtime_ns for path in pictures}
    lost.unlink()
    assert probe.probe(run, start="random", steps=2).equals(table)
    assert lost.read_bytes() == content
    assert sum(path.stat().st_mtime_ns != before for path, before in times.items()) == 4
    few = probe.probe(run, start="random", steps=2, limit=1)
    assert few["multiplicity"].to_list() == [5, 0]
    assert (
        table.filter(pl.col("target_id").is_in(few["target_id"].to_list()))
        .sort("target_id")
        .equals(few.sort("target_id"))
    )
    for wrong in ({"start": "magic"}, {"n": 3}):
        with pytest.raises(ProbeError, match="starts from caption or random, and draws 4 images or more"):
            probe.probe(run, **wrong)


# Replication


def test_copies_are_alike_and_other_pictures_are_not(out, originals, run):
    """Three copies with noise and five pictures that stand nowhere for each prompt."""
    write_generations(run, out, lambda t, j: disturb(originals[t["target_id"]], 0.02, j) if j < 3 else fresh(j))
    scores = attack(run, "replication")
    assert dict(scores.schema) == SCHEMAS["replication"]
    assert (scores["matches"] == 3).all()
    assert scores["extracted"].all()
    assert (scores["best_similarity"] > 0.9).all()
    assert scores["encoder"].str.contains(r"^sscd-distilled [0-9a-f]{8}, 32 → 224 pixels$").all()
    values = np.stack(scores["similarity"].to_numpy())  # (T, 8)
    assert values[:, :3].min() > scores["similarity_cut"][0] > values[:, 3:].mean()
    summary = json.loads((run / "attack-replication.json").read_text())
    figures = summary["similarity"]
    assert figures.keys() == {"members", "controls", "training"}
    members = np.concatenate(scores.filter(prompt_kind="member")["similarity"].to_list())
    assert figures["members"]["p90"] == pytest.approx(np.quantile(members, 0.9), rel=1e-5)
    assert figures["members"]["share_above_0.5"] == pytest.approx((members > 0.5).mean())
    assert figures["training"]["mean"] < figures["members"]["mean"]


def test_templates_are_alike_among_themselves(out, run):
    write_generations(run, out, lambda t, j: disturb(fresh(1), 0.02, j))
    scores = attack(run, "replication")
    assert (scores["pairwise_similarity"] > 0.9).all()
    assert not scores["extracted"].any()


def test_an_encoder_for_something_else_is_refused(out, run):
    write_generations(run, out, lambda t, j: None)
    for name in ("local", "clip"):
        with pytest.raises(ReplicationError, match="not trained to tell copies: choose sscd-distilled or sscd"):
            attack(run, "replication", encoder=name)
    scores = attack(run, "replication")
    assert scores["best_similarity"].null_count() == len(scores)
    vectors, _ = embed(np.stack([paint(0, 32)]), "sscd-distilled")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-3)


# What is said


def test_the_summary_counts_what_the_table_has(out, originals, run):
    """Canaries of 5 copies come back every time, those of 2 once, the others never."""

    def answer(target, j):
        often = {5: 8, 2: 1}.get(target["multiplicity"], 0)
        return disturb(originals[target["target_id"]], 0.01, j) if j < often else fresh(derive_seed("", j) % 999)

    write_generations(run, out, answer)
    attack(run)
    summary = json.loads((run / "attack-clique.json").read_text())
    members, controls = summary["members"], summary["controls"]
    assert (members["prompts"], members["generations"], members["extracted"]) == (6, 48, 4)
    assert (members["direct"], members["near"]) == (2, 2)
    assert members["per_generation"]["count"] == 2 * 8 + 2
    assert members["per_generation"]["low"] < 18 / 48 < members["per_generation"]["high"]
    assert (controls["prompts"], controls["extracted"]) == (2, 0)
    assert controls["per_prompt"]["high"] == pytest.approx(1 - 0.025 ** (1 / 2), rel=1e-4)
    assert controls["per_generation"]["estimate"] == 0
    assert controls["per_generation"]["high"] == controls["per_prompt"]["high"]  # what two prompts allow
    assert summary["difference"]["estimate"] == pytest.approx(4 / 6, rel=1e-5)
    assert summary["literature"]["direct"] == 94


def test_the_verb_prints_rates_with_those_of_the_controls(out, originals, run):
    write_generations(run, out, lambda t, j: originals[t["target_id"]] if t["multiplicity"] else fresh(j))
    done = CliRunner().invoke(app, ["attack", str(run)])
    assert done.exit_code == 0, done.exception
    assert "per prompt           100.00% (54.07% … 100.00%)   0.00% (0.00% … 84.19%)" in done.stdout
    assert "94 direct, 109 with near ones, of 350,000 prompts and 175,000,000 generations" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()[:-1]) <= 130


def test_the_difference_is_newcombes():
    """Newcombe 1998 (Stat. Med. 17:873), table II, method 10: 56/70 - 48/80, 9/10 - 3/10, 10/10 - 0/20."""
    for (a, n, b, m), expected in [
        ((56, 70, 48, 80), (0.0524, 0.3339)),
        ((9, 10, 3, 10), (0.1705, 0.8090)),
        ((10, 10, 0, 20), (0.6791, 1.0)),
    ]:
        found = rate_difference(a, n, b, m)
        assert (found.low, found.high) == pytest.approx(expected, abs=1e-4)
        assert found.p_value == stats.fisher_exact([[a, n - a], [b, m - b]]).pvalue
    assert rate_difference(1, 2, 0, 0) is None
