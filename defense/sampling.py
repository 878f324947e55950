"""Prompts + seeds → images: classifier-free guidance with the scheduler of the pipeline, in one short loop.

The noise of an image depends on its own seed alone, so an image is the same (up to float rounding) whatever
else is in its batch. Given equal noise the result equals diffusers' own `pipeline(...)`. Knows nothing of
runs or attacks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from defense.data import embed_captions, number_texts


@dataclass(frozen=True, slots=True)
class DenoisingStep:
    """One step of one batch, for whoever watches. The tensors are the sampler's: not to be changed."""

    step: int  # 0 … steps - 1
    timestep: int
    first: int  # position in `prompts` of the first image of the batch
    latents: Tensor  # (B, C, h, w) after the step
    conditional: Tensor  # (B, C, h, w) prediction of the U-Net for the prompts
    unconditional: Tensor | None  # (B, C, h, w) for the empty prompt; None without guidance


def draw_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """float32 (N, *shape): standard normal noise, one generator an image."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


@torch.inference_mode()
def sample(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    batch_size: int,
    on_step: Callable[[DenoisingStep], None] | None = None,
) -> np.ndarray:
    """uint8 (N, H, W, 3), image i for prompts[i] with the noise of seeds[i].

    guidance_scale: of Ho & Salimans 2022 in diffusers' convention, where 1 means no guidance.
    An image whose latents are not finite comes out black; `on_step` sees the latents. Raises ValueError.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: there must be one seed a prompt")
    if guidance_scale < 1:
        raise ValueError(f"guidance_scale must be at least 1 (no guidance), not {guidance_scale}")
    unet, vae = pipeline.unet, pipeline.vae
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    distinct = number_texts(["", *prompts])
    embeddings = embed_captions(list(distinct), pipeline.tokenizer, pipeline.text_encoder)  # (D, L, W)
    batches = []
    for first in range(0, len(prompts), batch_size):
        rows = [distinct[text] for text in prompts[first : first + batch_size]]
        noise = draw_noise(seeds[first : first + batch_size], shape).to(unet.device)
        context = (embeddings[rows], embeddings[:1])
        latents = _denoise(pipeline, noise, *context, steps, guidance_scale, first, on_step)
        batches.append(vae.decode(latents / vae.config.scaling_factor).sample.cpu())
    if not batches:
        side = shape[1] * pipeline.vae_scale_factor
        return np.empty((0, side, side, 3), dtype=np.uint8)
    pixels = (torch.cat(batches) / 2 + 0.5).nan_to_num(0, 0, 0).clamp(0, 1)  # (N, 3, H, W)
    return (pixels.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


def _denoise(
    pipeline: StableDiffusionPipeline,
    noise: Tensor,  # (B, C, h, w)
    prompts: Tensor,  # (B, L, W)
    empty: Tensor,  # (1, L, W)
    steps: int,
    guidance_scale: float,
    first: int,
    on_step: Callable[[DenoisingStep], None] | None,
) -> Tensor:
    """Noise → latents (B, C, h, w)."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    guided = guidance_scale > 1
    context = torch.cat([empty.expand_as(prompts), prompts]) if guided else prompts
    scheduler.set_timesteps(steps, device=unet.device)
    latents = noise * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
        prediction = unet(x, timestep, encoder_hidden_states=context, return_dict=False)[0]
        unconditional, conditional = prediction.chunk(2) if guided else (None, prediction)
        if unconditional is not None:
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        if on_step is not None:
            on_step(DenoisingStep(step, int(timestep), first, latents, conditional, unconditional))
    return latents
