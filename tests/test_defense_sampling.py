"""defense.sampling: equal to diffusers, independent of the batch, watched step by step."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from test_defense_data import build_small

from defense.sampling import draw_noise, sample

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
        "latents": draw_noise(SEEDS, SHAPE),
    }
    latents = plain(PROMPTS, output_type="latent", **options).images
    torch.testing.assert_close(last[-1], latents, atol=1e-4, rtol=0)
    theirs = plain(PROMPTS, output_type="np", **options).images  # (N, H, W, 3) in [0, 1]
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape == (3, 32, 32, 3)
    np.testing.assert_allclose(ours / 255, theirs, atol=0.5 / 255 + 1e-4)
    assert ours.std() > 5


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
