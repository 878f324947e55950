"""The training loop: one step after the other, told to whoever drives it.

In: a U-Net, its weights that are trained, examples, a noise schedule. Whatever chance decides in a step is a
function of the seed and the number of the step alone. Four seams let defences in: which rows and which captions
(`batches`), which losses count (`NoiseThreshold`), and what becomes of the gradient (`PrivateGradient`). Knows nothing
of files.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from defense.batches import Batch, draw_batch
from defense.checkpoint import Average, Weights
from defense.config import TrainConfig
from defense.data import Examples
from defense.private import PrivateGradient, assert_changed
from defense.processes import ALONE, Processes, add_up
from defense.weights import NoiseThreshold


class DivergedError(ValueError):
    """The loss or its gradient is no longer finite."""


@dataclass(frozen=True, slots=True)
class Step:
    """What the loop tells after every step."""

    step: int  # number of steps that are done
    loss: float  # mean over all draws, those that do not count included; NaN for a batch without any
    images_per_second: float  # of this step
    dropped: tuple[int, ...] = ()  # rows of the examples whose loss did not count


def training_loop(
    unet: nn.Module,
    weights: Weights,
    average: Average,
    optimizer: torch.optim.Optimizer,
    schedule: DDPMScheduler,
    examples: Examples,
    config: TrainConfig,
    seed: int,
    start: int = 0,
    processes: Processes = ALONE,
    threshold: NoiseThreshold | None = None,
    private: PrivateGradient | None = None,
) -> Iterator[Step]:
    """Train `weights` of `unet` in place from step `start` on, keep `average` their moving average, tell every step.

    Denoising diffusion (Ho et al. 2020) to the target that the schedule names: epsilon, or v (Salimans & Ho
    2022). Raises DivergedError before a step that would spoil the weights.
    """
    total, device = schedule.config.num_train_timesteps, processes.device
    parameters = list(weights.values())
    averaged = [average[name] for name in weights]
    # Whole images, all draws of each; only batches of DP-SGD, which are of any size, may leave a smaller part.
    part = config.batch_size // config.accumulation // processes.size * config.noise_multiplicity
    unet.train()
    for step in range(start, config.steps):
        began = time.perf_counter()
        batch = draw_batch(examples, config, seed, step, total)
        size = len(batch.rows)
        limit = math.inf if threshold is None else threshold.get_limit(step)
        errors, magnitudes = torch.zeros(2, size, device=device)
        for places in torch.arange(size).split(part)[processes.rank :: processes.size] if size else ():
            noisy, target = pose(schedule, examples, batch, places, device, choose_layout(config))
            told = batch.told.select(places, device)
            prediction = predict(unet, noisy, batch.timesteps[places], told, config.precision)
            error = (prediction - target).square().flatten(1).mean(dim=1)  # (b,)
            errors[places] = error.detach()
            if private is not None:
                private.add(error)
                continue
            if threshold is not None:
                nothing = examples.conditions.select(torch.zeros_like(places), device)
                with torch.no_grad():
                    without = predict(unet, noisy, batch.timesteps[places], nothing, config.precision)
                magnitudes[places] = (prediction.detach() - without).flatten(1).norm(dim=1)
                error = error * (magnitudes[places] <= limit)
            (error.sum() / size).backward()
        gradients = [weight.grad for weight in parameters if weight.grad is not None]
        add_up([errors, magnitudes, *gradients], processes)
        dropped = (magnitudes > limit).cpu()
        if threshold is not None:
            threshold.record(step, magnitudes.cpu().where(batch.named, torch.nan))
            if 0 < dropped.sum() < size:  # the mean is that of the others
                torch._foreach_mul_(gradients, size / (size - int(dropped.sum())))
        if private is None:
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        else:
            private.finish(seed, step)
            norm = torch.nn.utils.get_total_norm(weight.grad for weight in parameters if weight.grad is not None).item()
        loss = errors.mean().item()
        if not (math.isfinite(norm) and (math.isfinite(loss) or not size)):
            raise DivergedError(f"loss {loss:.4g}, gradient {norm:.4g} at step {step + 1}: lower learning_rate")
        warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
        optimizer.param_groups[0]["lr"] = config.learning_rate * warmup
        watched = weights if private is not None and step == start else {}
        before = {name: weight.detach().clone() for name, weight in watched.items()}
        if not (size and dropped.all()):
            optimizer.step()
        assert_changed(before, weights)
        optimizer.zero_grad()
        # A young average forgets faster, so that the random initial weights do not linger in it.
        decay = min(config.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(averaged, [weight.detach() for weight in parameters], 1 - decay)
        seconds = time.perf_counter() - began
        yield Step(step + 1, loss, config.batch_size / seconds, tuple(batch.rows[dropped].tolist()))


def choose_layout(config: TrainConfig) -> torch.memory_format:
    """Of the weights and images: the faster one, but for Opacus, which needs the usual one."""
    return torch.contiguous_format if config.private else torch.channels_last


def pose(
    schedule: DDPMScheduler,
    examples: Examples,
    batch: Batch,
    places: Tensor,  # (b,) of the batch
    device: torch.device,
    layout: torch.memory_format,
) -> tuple[Tensor, Tensor]:
    """Noisy latents and what is to be predicted for them, both (b, C, h, w)."""
    drawn = (examples.latents[batch.rows[places]], batch.noise[places], batch.timesteps[places])
    latents, noise, timesteps = (tensor.to(device) for tensor in drawn)
    noisy = schedule.add_noise(latents, noise, timesteps).contiguous(memory_format=layout)
    velocity = schedule.config.prediction_type == "v_prediction"
    return noisy, schedule.get_velocity(latents, noise, timesteps) if velocity else noise


def predict(unet: nn.Module, noisy: Tensor, timesteps: Tensor, told: dict[str, Any], precision: str) -> Tensor:
    """float32 (b, C, h, w)."""
    device = noisy.device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return unet(noisy, timesteps.to(device), **told, return_dict=False)[0].float()
