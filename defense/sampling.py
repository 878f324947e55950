"""Prompts + seeds → images, with the scheduler of the pipeline.

The noise of an image depends on its own seed alone, so an image is the same (up to float rounding) whatever
else is in its batch. The classes in `KNOWN` are sampled in one short loop of our own, so that every step can be
watched or changed; given equal seeds the result equals diffusers' own `pipeline(...)`. Any other text-to-image
pipeline is a black box that is asked for images. Knows nothing of runs, attacks or defences.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from defense.conditions import Conditions, embed_captions
from defense.data import encode_latents, fit_chunk, number_texts

KNOWN = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "DDPMPipeline")
LARGE = 1024  # pixels a side that are reckoned with when a pipeline does not say how large its images are


@dataclass(frozen=True, slots=True)
class DenoisingStep:
    """One step of one batch, for whoever watches. The tensors are the sampler's: not to be changed.

    A black box shows its last step only: the finished images in [0, 1] as `latents`, and no predictions.
    """

    step: int  # 0 … steps - 1
    timestep: int
    first: int  # position in `prompts` of the first image of the batch
    latents: Tensor  # (B, C, h, w) after the step
    conditional: Tensor | None  # (B, C, h, w) prediction of the U-Net for the prompts
    unconditional: Tensor | None  # (B, C, h, w) for the empty prompt; None without guidance


Watcher = Callable[[DenoisingStep], None]
# How far the prompt moves each prediction: ℓ2 norm of conditional minus unconditional prediction, in whatever the model
# predicts. Scales with the size of the latents.
Measure = Callable[[Tensor], Tensor]  # embeddings (B, L, W) → (B,), at the first step, with a gradient
Adjust = Callable[[Measure, Tensor], Tensor]  # embeddings (B, L, W) of the prompts → those that are used instead
Guide = Callable[[int, Tensor], Tensor]  # timestep, norms (steps so far, B) → guidance scale (B,) of this step


def make_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator an image, on the CPU wherever the model is."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def sample(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    batch_size: int,
    on_step: Watcher | None = None,
    adjust: Adjust | None = None,
    guide: Guide | None = None,
) -> np.ndarray:
    """uint8 (N, H, W, 3), image i for prompts[i] with the noise of seeds[i].

    guidance_scale: of Ho & Salimans 2022 in diffusers' convention, where 1 means no guidance. batch_size: at
    most; large images go in smaller batches. A model without captions pays no heed to the prompts. adjust: what a
    defence puts in place of the embeddings, for pipelines with one text encoder. guide: guidance that changes from step
    to step, instead of guidance_scale; 0 = unconditional.
    An image whose latents are not finite comes out black; `on_step` sees the latents. Raises ValueError.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: there must be one seed a prompt")
    if guidance_scale < 1:
        raise ValueError(f"guidance_scale must be at least 1 (no guidance), not {guidance_scale}")
    check_prompted(pipeline)
    side = find_side(pipeline)
    if not prompts:
        return np.empty((0, side, side, 3), dtype=np.uint8)
    known = is_known(pipeline)
    distinct = number_texts(prompts)
    conditions = embed_captions(pipeline, list(distinct)) if known else Conditions()
    if known and conditions.tokens is None and guidance_scale > 1:
        raise ValueError(f"{type(pipeline).__name__} takes no prompts, so guidance_scale can only be 1")
    if (adjust or guide) and conditions.tokens is None:
        raise ValueError(f"{type(pipeline).__name__} cannot be steered: only {' and '.join(KNOWN[:2])} can")
    batch_size = min(batch_size, fit_chunk(side))
    batches = []
    for first in range(0, len(prompts), batch_size):
        texts, generators = prompts[first : first + batch_size], make_generators(seeds[first : first + batch_size])
        if known:
            rows = torch.tensor([distinct[text] + 1 for text in texts])
            batch = (pipeline, generators, conditions, rows, steps, guidance_scale, first)
            latents = _denoise(*batch, on_step, adjust, guide)
            batches.append(_decode(pipeline, latents))
        else:
            images = _ask(pipeline, texts, generators, steps, guidance_scale)
            if on_step is not None:
                on_step(DenoisingStep(steps - 1, 0, first, images, None, None))
            batches.append(images)
    pixels = torch.cat(batches).nan_to_num(0, 0, 0).clamp(0, 1)  # (N, 3, H, W)
    return (pixels.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


def is_known(pipeline: DiffusionPipeline) -> bool:
    """Whether `_denoise` does what the pipeline does: its class, and none of the additions to it."""
    if type(pipeline).__name__ not in KNOWN:
        return False
    vae = getattr(pipeline, "vae", None)
    distilled = pipeline.unet.config.get("time_cond_proj_dim") is not None  # told how strongly it is guided
    return not distilled and (vae is None or vae.config.get("latents_mean") is None)


def check_prompted(pipeline: DiffusionPipeline) -> None:
    """Raise ValueError unless the pipeline can be sampled."""
    accepted = inspect.signature(pipeline.__call__).parameters
    if not is_known(pipeline) and ("prompt" not in accepted or "image" in accepted):
        name = type(pipeline).__name__
        raise ValueError(f"{name} does not draw from a prompt alone: only text-to-image pipelines can be sampled")


def find_side(pipeline: DiffusionPipeline) -> int:
    """Pixels a side of the images, as far as the pipeline says."""
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    size = getattr(network, "config", {}).get("sample_size")
    return size * getattr(pipeline, "vae_scale_factor", 1) if isinstance(size, int) else LARGE


@torch.no_grad()
def measure_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, batch_size: int
) -> np.ndarray:
    """float32 (N,): how far each prompt moves the first prediction of its image. Of pipelines with one text encoder."""
    norms = []
    for first in range(0, len(prompts), batch_size):
        conditions = embed_captions(pipeline, prompts[first : first + batch_size])
        assert conditions.tokens is not None
        latents = _begin(pipeline, make_generators(seeds[first : first + batch_size]), steps)
        tokens = conditions.tokens.to(latents.device)
        norms.append(_measure_first(pipeline, latents, tokens[0])(tokens[1:]).cpu())
    return torch.cat(norms).numpy()


def _begin(pipeline: DiffusionPipeline, generators: list[torch.Generator], steps: int) -> Tensor:
    """Noise (B, C, h, w) as the scheduler wants it, which is set to so many steps."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    size = unet.config.sample_size
    shape = (unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
    scheduler.set_timesteps(steps, device=unet.device)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return noise.to(unet.device) * scheduler.init_noise_sigma


def _measure_first(pipeline: DiffusionPipeline, latents: Tensor, empty: Tensor) -> Measure:
    """For latents (B, C, h, w) at the first step; empty: embedding (L, W) of the empty prompt."""
    timestep = pipeline.scheduler.timesteps[0]
    x = pipeline.scheduler.scale_model_input(torch.cat([latents, latents]), timestep)

    def measure(tokens: Tensor) -> Tensor:
        context = torch.cat([empty.expand_as(tokens), tokens])  # (2 B, L, W)
        prediction = pipeline.unet(x, timestep, encoder_hidden_states=context, return_dict=False)[0]
        return _norm(*prediction.chunk(2))

    return measure


def _norm(unconditional: Tensor, conditional: Tensor) -> Tensor:
    return (conditional - unconditional).flatten(1).norm(dim=1)  # (B,)


def _denoise(
    pipeline: DiffusionPipeline,
    generators: list[torch.Generator],
    conditions: Conditions,
    rows: Tensor,  # (B,) of the conditions
    steps: int,
    guidance_scale: float,
    first: int,
    on_step: Watcher | None,
    adjust: Adjust | None,
    guide: Guide | None,
) -> Tensor:
    """Noise → latents (B, C, h, w)."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    guided = guidance_scale > 1 or guide is not None
    context = conditions.select(torch.cat([torch.zeros_like(rows), rows]) if guided else rows, unet.device)
    chance = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents = _begin(pipeline, generators, steps)
    if adjust is not None and conditions.tokens is not None:
        told = context["encoder_hidden_states"]
        measure = _measure_first(pipeline, latents, conditions.tokens[0].to(unet.device))
        told[-len(rows) :] = adjust(measure, told[-len(rows) :])
    norms: list[Tensor] = []
    for step, timestep in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
        prediction = unet(x, timestep, **context, return_dict=False)[0]
        unconditional, conditional = prediction.chunk(2) if guided else (None, prediction)
        if unconditional is not None:
            scale: float | Tensor = guidance_scale
            if guide is not None:
                norms.append(_norm(unconditional, conditional))
                scale = guide(int(timestep), torch.stack(norms))[:, None, None, None]
            prediction = unconditional + scale * (conditional - unconditional)
        latents = scheduler.step(prediction, timestep, latents, **chance, return_dict=False)[0]
        if on_step is not None:
            on_step(DenoisingStep(step, int(timestep), first, latents, conditional, unconditional))
    return latents


def _decode(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Latents → float32 (B, 3, H, W), [0, 1] but for what the autoencoder overshoots."""
    vae = getattr(pipeline, "vae", None)
    images = latents if vae is None else vae.decode(latents / vae.config.scaling_factor).sample
    return images.cpu() / 2 + 0.5


@torch.inference_mode()
def measure_reconstruction(pipeline: DiffusionPipeline, pixels: np.ndarray) -> np.ndarray | None:
    """float64 (N,): normalised l2 (0 … 1) of uint8 (N, H, W, 3) to what the autoencoder makes of them.

    No image of the model can be nearer to them, but by chance. None for a model without an autoencoder, and for a
    black box.
    """
    if not is_known(pipeline) or getattr(pipeline, "vae", None) is None:
        return None
    errors = []
    for part in torch.from_numpy(pixels).split(fit_chunk(pixels.shape[1])):
        latents = encode_latents(part.numpy(), pipeline).to(pipeline.vae.device)
        decoded = _decode(pipeline, latents).clamp(0, 1)  # (B, 3, H, W)
        difference = decoded - part.permute(0, 3, 1, 2) / 255
        errors.append(difference.double().square().flatten(1).mean(dim=1).sqrt())
    return torch.cat(errors).numpy()


def _ask(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    generators: list[torch.Generator],
    steps: int,
    guidance_scale: float,
) -> Tensor:
    """What a black box draws: float32 (B, 3, H, W) in [0, 1]. Raises ValueError."""
    accepted = inspect.signature(pipeline.__call__).parameters
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    options = {option: value for option, value in options.items() if option in accepted}
    drawn = pipeline(prompt=list(prompts), generator=generators, output_type="np", **options)
    if not hasattr(drawn, "images"):
        raise ValueError(f"{type(pipeline).__name__} draws no images: only text-to-image pipelines can be sampled")
    return torch.from_numpy(np.asarray(drawn.images)).float().permute(0, 3, 1, 2)
