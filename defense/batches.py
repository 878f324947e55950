"""Seed and number of a step → its batch: which rows, with which noise and timesteps, and what the model is told.

The first two seams of the loop, the row and the caption, are decided here. In: examples in memory. Knows nothing of
networks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from defense.captions import PERTURBATIONS
from defense.conditions import Conditions
from defense.config import TrainConfig
from defense.data import Examples, derive_seed, draw_noise, draw_poisson, draw_rows


@dataclass(frozen=True, slots=True)
class Batch:
    """B draws; with noise multiplicity K those of one image stand side by side."""

    rows: Tensor  # (B,) int64, of the examples
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) int64
    told: Conditions  # B rows
    named: Tensor  # (B,) bool: was told a caption


def draw_batch(examples: Examples, config: TrainConfig, seed: int, step: int, timesteps: int) -> Batch:
    """The batch of a step, counted from 0, of a noise schedule with so many timesteps."""
    n, size = len(examples.latents), config.batch_size
    if config.private:
        drawn = draw_poisson(n, size, seed, step).repeat(config.noise_multiplicity)
    else:
        drawn = draw_rows(n, size, seed, step, examples.weights)
    rows = torch.from_numpy(drawn)  # (B,)
    noise, uniform, order = draw_noise(len(rows), examples.latents.shape[1:], seed, step)
    # One timestep from each of B equal parts: less variance (Kingma et al. 2021, appendix I.1). But where images are to
    # be private, nothing about one may depend on which others are there.
    moments = uniform[0] if config.private else (order + uniform[0]) / size
    captions = examples.draw_captions(rows, uniform[1]).masked_fill(uniform[2] < config.null_caption, 0)
    return Batch(
        rows,
        noise,
        (moments * timesteps).long().clamp(max=timesteps - 1),
        tell(examples, captions, config, seed, step),
        captions > 0,
    )


def tell(examples: Examples, captions: Tensor, config: TrainConfig, seed: int, step: int) -> Conditions:
    """What the U-Net is told for captions (B,) int64: them, perturbed or blurred. The empty caption stays as it is.

    Perturbations are drawn anew for every step, as Somepalli et al. 2023 do, so they are embedded on the way: one call
    of the text encoder a step. Gaussian noise (their GN, `rand_noise_lam`) goes on the embedding of every token.
    """
    told, named = examples.conditions.pick(captions), captions > 0
    if config.caption_perturbation and examples.embed is not None:
        rng = np.random.default_rng([seed, 3, step])
        chosen = torch.from_numpy(rng.random(len(captions)) < config.perturbation_share) & named
        perturb = PERTURBATIONS[config.caption_perturbation]
        if texts := [perturb(rng, examples.texts[caption]) for caption in captions[chosen].tolist()]:
            told = told.put(chosen, examples.embed(texts))
    if config.embedding_noise:
        told = told.add_noise(named, config.embedding_noise, torch.Generator().manual_seed(derive_seed(seed, 4, step)))
    return told
