"""Do the instruments measure? A denoiser that is its dataset goes through generate, attack and detect."""

from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from test_eval_targets import RESOLUTION, make_planted, make_run

from dedup import manifest
from defense.conditions import embed_captions
from defense.tiny import build_scheduler, build_tiny
from eval.extraction import attack
from eval.generate import generate
from eval.reference import load_pixels
from eval.targets import load_targets


class DatasetDenoiser(torch.nn.Module):
    """The best denoiser of a finite dataset: it predicts the mean of its pictures, weighted by how likely each is.

    A caption that it knows leaves only the pictures of that caption; any other, the empty one too, leaves all. The
    closed form is in Gu et al. 2023 (arXiv 2310.02664, eq. 2).
    """

    def __init__(self, pictures: torch.Tensor, contexts: torch.Tensor, scheduler):
        super().__init__()
        self.pictures, self.contexts, self.scheduler = pictures, contexts, scheduler
        self.device = torch.device("cpu")
        channels, side = pictures.shape[1], pictures.shape[-1]
        self.config = FrozenDict(time_cond_proj_dim=None, in_channels=channels, out_channels=channels, sample_size=side)

    def forward(self, x, timestep, encoder_hidden_states, return_dict=False):
        alpha = self.scheduler.alphas_cumprod[int(timestep)]
        known = (encoder_hidden_states.flatten(1)[:, None] - self.contexts.flatten(1)).abs().amax(-1) < 1e-4  # (B, K)
        known |= ~known.any(dim=1, keepdim=True)
        squares = (x.flatten(1)[:, None] - alpha.sqrt() * self.pictures.flatten(1)).square().sum(-1)
        logits = (-squares / (2 * (1 - alpha))).masked_fill(~known, -torch.inf)
        clean = (logits.softmax(dim=1) @ self.pictures.flatten(1)).reshape(x.shape)
        noise = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        kinds = {"epsilon": noise, "sample": clean, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean}
        return (kinds[self.scheduler.config.prediction_type],)


class Pixels(torch.nn.Module):
    """An autoencoder whose latents are the pixels."""

    config = FrozenDict(scaling_factor=1.0)
    device = torch.device("cpu")

    def encode(self, pixels):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: pixels))

    def decode(self, latents):
        return SimpleNamespace(sample=latents)


def make_pipeline(pixels: np.ndarray, captions: list[str], prediction_type: str = "v_prediction"):
    """Pictures uint8 (K, R, R, 3), captions → a pipeline that knows nothing else; tokenizer and encoder are real."""
    pipeline = build_tiny(0, channels=(32, 64), text_width=32, text_layers=1, caption_tokens=12)
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    pipeline.scheduler = build_scheduler(prediction_type)
    pipeline.unet = DatasetDenoiser(pictures, embed_captions(pipeline, captions).tokens[1:], pipeline.scheduler)
    pipeline.vae, pipeline.vae_scale_factor = Pixels(), 1
    return pipeline


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("controls"), levels=(0, 1, 2, 5), canaries=8, edited=0.0)


@pytest.fixture
def run(out, tmp_path, monkeypatch):
    """A run whose model is the dataset of OUT, copies and all."""
    rows = manifest.read(out)
    pipeline = make_pipeline(load_pixels(out, rows, RESOLUTION), rows["caption"].to_list())
    monkeypatch.setattr("defense.model.load_pipeline", lambda folder, **_: pipeline)
    run = make_run(tmp_path, out)
    (run / "model").mkdir()
    exposures = rows.select("id", "cluster_id", "key", held_out=pl.lit(False), exposures=pl.lit(10))
    manifest.write_parquet(run / "exposures.parquet", exposures)
    return run


def test_a_model_that_is_its_dataset_gives_everything_back(run):
    """From noise to score: all that stands in the data at every multiplicity, and none of what stands nowhere."""
    generate(run, n=4, steps=8)
    scores = attack(run)
    member = scores.filter(prompt_kind="member")
    assert sorted(member["multiplicity"].unique()) == [1, 2, 5]
    assert (member["matches"] == 4).all()
    assert member["direct"].all()
    assert member["eidetic_k"].to_list() == member["multiplicity"].to_list()
    control = scores.filter(prompt_kind="control")
    assert len(control) == 2
    assert (control["matches"] == 0).all()
    assert (control["wrong_matches"] == 4).all()  # what it gives instead is another training picture


def test_without_prompts_a_dataset_gives_itself_back_in_proportion(out, run, tmp_path):
    """No prompt: each picture comes as often as it stands, and every generation is found to be a copy of something."""
    empty = tmp_path / "empty.csv"
    load_targets(out).select("target_id", prompt=pl.lit("")).write_csv(empty)
    made = generate(run, n=16, steps=8, prompts=empty)
    assert set(made["prompt"]) == {""}
    scores = attack(run, "adaptive")
    assert scores["given_back"].list.len().sum() == len(made) == 128
    assert scores["undefined"].sum() == 0
    rows = manifest.read(out)
    for m in (1, 2, 5):
        often = scores.filter(multiplicity=m)
        expected = m * len(often) / len(rows)
        share = often["from_any"].sum() / len(made)
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / len(made))
    assert scores.filter(multiplicity=5)["extracted"].all()
    assert scores.filter(multiplicity=0)["from_any"].sum() == 0
