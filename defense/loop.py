"""The training loop: one step after the other, told to whoever drives it.

In: a U-Net, its weights that are trained, examples, a noise schedule. Whatever chance decides in a step is a
function of the seed and the number of the step alone. Knows nothing of files.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from defense.checkpoint import Average, Weights
from defense.config import TrainConfig
from defense.data import Examples, draw_noise, draw_rows
from defense.processes import ALONE, Processes, add_up


class DivergedError(ValueError):
    """The loss or its gradient is no longer finite."""


@dataclass(frozen=True, slots=True)
class Step:
    """What the loop tells after every step."""

    step: int  # number of steps that are done
    loss: float
    images_per_second: float  # of this step


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
) -> Iterator[Step]:
    """Train `weights` of `unet` in place from step `start` on, keep `average` their moving average, tell every step.

    Denoising diffusion (Ho et al. 2020) to the target that the schedule names: epsilon, or v (Salimans & Ho
    2022). Raises DivergedError before a step that would spoil the weights.
    """
    n, total, size = len(examples.latents), schedule.config.num_train_timesteps, config.batch_size
    parameters = list(weights.values())
    trained, averaged = [p.detach() for p in parameters], [average[name] for name in weights]
    parts = torch.arange(size).split(size // config.accumulation // processes.size)
    unet.train()
    for step in range(start, config.steps):
        began = time.perf_counter()
        rows = torch.from_numpy(draw_rows(n, size, seed, step, examples.weights))  # (B,)
        noise, uniform, order = draw_noise(size, examples.latents.shape[1:], seed, step)
        # One timestep from each of B equal parts: less variance (Kingma et al. 2021, appendix I.1).
        timesteps = ((order + uniform[0]) / size * total).long().clamp(max=total - 1)  # (B,)
        captions = examples.draw_captions(rows, uniform[1]).masked_fill(uniform[2] < config.null_caption, 0)
        loss = torch.zeros((), device=processes.device)
        for part in parts[processes.rank :: processes.size]:
            drawn = (rows[part], noise[part], timesteps[part], captions[part])
            error = measure_error(unet, schedule, examples, *drawn, config.precision) / len(parts)
            error.backward()
            loss += error.detach()
        add_up([loss, *(weight.grad for weight in parameters if weight.grad is not None)], processes)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        told = loss.item()
        if not (math.isfinite(told) and math.isfinite(norm)):
            raise DivergedError(f"loss {told:.4g}, gradient {norm:.4g} at step {step + 1}: lower learning_rate")
        warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
        optimizer.param_groups[0]["lr"] = config.learning_rate * warmup
        optimizer.step()
        optimizer.zero_grad()
        # A young average forgets faster, so that the random initial weights do not linger in it.
        decay = min(config.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(averaged, trained, 1 - decay)
        yield Step(step + 1, told, size / (time.perf_counter() - began))


def measure_error(
    unet: nn.Module,
    schedule: DDPMScheduler,
    examples: Examples,
    rows: Tensor,  # (B,)
    noise: Tensor,  # (B, C, h, w)
    timesteps: Tensor,  # (B,)
    captions: Tensor,  # (B,) rows of the conditions
    precision: str,
) -> Tensor:
    """Mean squared error of the prediction, a scalar with a gradient."""
    device = next(unet.parameters()).device
    latents, noise, timesteps = (x.to(device) for x in (examples.latents[rows], noise, timesteps))
    noisy = schedule.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
    velocity = schedule.config.prediction_type == "v_prediction"
    target = schedule.get_velocity(latents, noise, timesteps) if velocity else noise
    conditions = examples.conditions.select(captions, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        prediction = unet(noisy, timesteps, **conditions, return_dict=False)[0]
    return F.mse_loss(prediction.float(), target)
