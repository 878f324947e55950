"""defense.sampling: equal to diffusers, independent of the batch, watched step by step."""

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from test_defense_data import build_small
from test_defense_model import build_ddpm, build_sd14, build_sdxl, save_base

from defense.model import load_pipeline
from defense.sampling import make_generators, measure_reconstruction, sample

PROMPTS = ["a red fox", "", "two hats"]
SEEDS = [3, 1, 2**40]
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling")
    build_small(folder).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def plain(saved):
    """Opened as somebody would who has never heard of this package."""
    pipeline = StableDiffusionPipeline.from_pretrained(saved)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_equals_diffusers_given_the_same_noise(saved, plain, guidance_scale, steps):
    last = []
    ours = sample(
        plain,
        PROMPTS,
        SEEDS,
        steps=steps,
        guidance_scale=guidance_scale,
        batch_size=3,
        on_step=lambda seen: last.append(seen.latents),
    )
    options = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "generator": make_generators(SEEDS),
    }
    latents = plain(PROMPTS, output_type="latent", **options).images
    torch.testing.assert_close(last[-1], latents, atol=1e-4, rtol=0)
    options["generator"] = make_generators(SEEDS)
    theirs = plain(PROMPTS, output_type="np", **options).images  # (N, H, W, 3) in [0, 1]
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape == (3, 32, 32, 3)
    np.testing.assert_allclose(ours / 255, theirs, atol=0.5 / 255 + 1e-4)
    assert ours.std() > 5


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (build_sd14, {"guidance_scale": 3.0}),
        (build_sd14, {"guidance_scale": 1.0}),
        (build_sdxl, {"guidance_scale": 3.0}),
        (build_sdxl, {"guidance_scale": 1.0}),
    ],
)
@pytest.mark.parametrize("scheduler", [None, EulerAncestralDiscreteScheduler])
def test_equals_stable_diffusion_given_the_same_seeds(build, options, scheduler):
    pipeline = build()
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:  # draws new noise at every step
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    last = []
    ours = sample(
        pipeline, PROMPTS, SEEDS, steps=5, batch_size=3, on_step=lambda seen: last.append(seen.latents), **options
    )
    generators = make_generators(SEEDS)
    theirs = pipeline(PROMPTS, num_inference_steps=5, generator=generators, output_type="latent", **options).images
    torch.testing.assert_close(last[-1], theirs, atol=1e-4, rtol=1e-4)
    assert ours.shape == (3, 16, 16, 3)


def test_equals_ddpm_given_the_same_seeds():
    pipeline = build_ddpm()
    pipeline.set_progress_bar_config(disable=True)
    ours = sample(pipeline, PROMPTS, SEEDS, steps=5, batch_size=3, guidance_scale=1.0)
    theirs = pipeline(3, make_generators(SEEDS), num_inference_steps=5, output_type="np").images
    np.testing.assert_allclose(ours / 255, theirs, atol=0.5 / 255 + 1e-4)
    again = sample(pipeline, ["other", "prompts", "altogether"], SEEDS, steps=5, batch_size=2, guidance_scale=1.0)
    assert np.abs(again.astype(int) - ours).max() <= 1
    with pytest.raises(ValueError, match="takes no prompts, so guidance_scale can only be 1"):
        sample(pipeline, PROMPTS, SEEDS, steps=5, batch_size=3, guidance_scale=2.0)


def test_a_flow_matching_transformer_is_a_black_box(tmp_path):
    save_base("sd3", tmp_path)
    pipeline = load_pipeline(tmp_path / "sd3")
    seen, options = [], {"steps": 3, "guidance_scale": 3.0}
    ours = sample(pipeline, PROMPTS, SEEDS, batch_size=2, on_step=seen.append, **options)
    assert [(s.first, s.step, s.latents.shape) for s in seen] == [(0, 2, (2, 3, 16, 16)), (2, 2, (1, 3, 16, 16))]
    assert seen[0].conditional is seen[0].unconditional is None
    alone = sample(pipeline, PROMPTS[2:], SEEDS[2:], batch_size=1, **options)
    assert np.abs(ours[2:].astype(int) - alone).max() <= 1
    assert np.abs(ours[0].astype(int) - ours[1]).max() > 10
    with torch.no_grad():
        pipeline.transformer.proj_out.bias.fill_(float("nan"))
    assert not sample(pipeline, ["a"], [0], batch_size=1, on_step=seen.append, **options).any()
    assert not seen[-1].latents.isfinite().any()


def test_what_draws_from_no_prompt_alone_is_refused():
    parts = build_sd14().components
    inpainting = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ValueError, match="StableDiffusionInpaintPipeline does not draw from a prompt alone"):
        sample(inpainting, ["a"], [1], steps=1, guidance_scale=1.0, batch_size=1)


def test_an_image_does_not_depend_on_its_batch(plain):
    options = {"steps": 5, "guidance_scale": 2.0}
    together = sample(plain, PROMPTS, SEEDS, batch_size=3, **options).astype(int)
    alone = [sample(plain, [p], [s], batch_size=8, **options)[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert np.abs(together - np.stack(alone)).max() <= 1
    split = sample(plain, PROMPTS[::-1], SEEDS[::-1], batch_size=2, **options)[::-1]
    assert np.abs(together - split).max() <= 1


def test_seed_and_prompt_both_matter(plain):
    images = sample(plain, ["a", "a", "b"], [1, 2, 1], steps=5, guidance_scale=3.0, batch_size=3).astype(int)
    assert np.abs(images[0] - images[1]).max() > 10
    assert np.abs(images[0] - images[2]).max() > 0


def test_the_watcher_sees_every_step_of_every_batch(plain):
    seen = []
    sample(plain, PROMPTS, SEEDS, steps=4, guidance_scale=3.0, batch_size=2, on_step=seen.append)
    assert [(s.first, s.step) for s in seen] == [(first, step) for first in (0, 2) for step in range(4)]
    assert [s.timestep for s in seen[:4]] == [999, 749, 499, 249]
    assert [len(s.latents) for s in seen] == [2] * 4 + [1] * 4
    assert seen[0].conditional.shape == seen[0].unconditional.shape == (2, *SHAPE)
    # The prompt of image 1 is the empty one: there the two predictions agree, elsewhere they do not.
    difference = (seen[0].conditional - seen[0].unconditional).abs().amax((1, 2, 3))
    assert difference[1] < 1e-5 < difference[0]
    seen.clear()
    sample(plain, PROMPTS, SEEDS, steps=1, guidance_scale=1.0, batch_size=3, on_step=seen.append)
    assert seen[0].unconditional is None


def test_latents_that_are_not_finite_come_out_black(saved):
    pipeline = StableDiffusionPipeline.from_pretrained(saved)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    seen = []
    images = sample(pipeline, ["a"], [0], steps=2, guidance_scale=1.0, batch_size=1, on_step=seen.append)
    assert not images.any()
    assert not seen[-1].latents.isfinite().any()


def test_nothing_asked_nothing_given(plain):
    assert sample(plain, [], [], steps=2, guidance_scale=1.0, batch_size=4).shape == (0, 32, 32, 3)


def test_wrong_arguments(plain):
    with pytest.raises(ValueError, match="one seed a prompt"):
        sample(plain, ["a"], [1, 2], steps=1, guidance_scale=1.0, batch_size=1)
    with pytest.raises(ValueError, match="guidance_scale"):
        sample(plain, ["a"], [1], steps=1, guidance_scale=0.5, batch_size=1)


def test_the_reconstruction_is_that_of_the_autoencoder(plain):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        y = plain.vae.decode(plain.vae.encode(x * 2 - 1).latent_dist.mean).sample
    expected = ((y / 2 + 0.5).clamp(0, 1) - x).square().flatten(1).mean(1).sqrt()
    np.testing.assert_allclose(measure_reconstruction(plain, pixels), expected, rtol=1e-4)


def test_without_an_autoencoder_there_is_no_reconstruction():
    assert measure_reconstruction(build_ddpm(), np.zeros((1, 16, 16, 3), np.uint8)) is None
