"""One training run: OUT + arm + config + seed → RUN. Reads top to bottom; `train` is the recipe.

RUN is described in docs/architecture.md. Whatever chance decides in a step (rows, noise, timesteps, captions)
is a function of the seed and the number of the step alone. So a run that was killed and started again ends
with the same bits (on a CPU, with an equal number of threads), and arms with equally many rows share their
random numbers.

    unmemorize train OUT --arm raw --config configs/tiny.toml -o RUN --seed 0
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dedup import manifest
from dedup.engine import available_cpus
from dedup.options import lock
from dedup.subjects import CAUTION
from defense import lora, model
from defense.arms import count_steps, select_rows
from defense.checkpoint import CHECKPOINT, Average, Weights, load_checkpoint, open_log, save_checkpoint
from defense.config import TrainConfig
from defense.data import (
    Examples,
    build_examples,
    count_exposures,
    draw_noise,
    draw_rows,
    read_material,
)
from defense.tiny import AUTOENCODER, build_tiny

LIBRARIES = ("unmemorize", "torch", "diffusers", "transformers", "peft", "numpy", "safetensors")
FROZEN = ("vae", "text_encoder", "text_encoder_2")  # parts of a pipeline that only prepare the data


class RunError(OSError):
    """RUN cannot be used: it is something else, or was made with other options. Or the machine is too small."""


class DivergedError(ValueError):
    """The loss or its gradient is no longer finite."""


@dataclass(frozen=True, slots=True)
class Step:
    """What the loop tells after every step."""

    step: int  # number of steps that are done
    loss: float
    images_per_second: float  # of this step


def train(out: Path, arm: str, config: TrainConfig, run: Path, seed: int) -> None:
    """Train one arm of the dedup run OUT into RUN. Done already: returns at once. Interrupted: goes on.

    Raises ManifestError, ArmError, ModelError, LoraError, DataError, RunError, DivergedError or OSError.
    """
    out, run = out.resolve(), run.resolve()
    torch.set_num_threads(config.threads or available_cpus())
    device = model.pick_device(config.device)
    described = manifest.read_run(out)
    src = Path(described["src"])
    if described.get("medical"):
        print(f"Warning: {CAUTION}.", file=sys.stderr)
    rows, material = read_material(out, config.held_out)
    training = select_rows(arm, material, seed)
    steps = count_steps(arm, material, config.steps)
    pipeline, base = build_pipeline(config, seed)
    record = {
        "arm": arm,
        "seed": seed,
        "config": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config).items()},
        "out": str(out),
        "out_sha256": hashlib.sha256((out / "run.json").read_bytes()).hexdigest(),
        "steps_of_arm": steps,
        "rows": len(training),
        "rows_sha256": hashlib.sha256(training.write_ndjson().encode()).hexdigest(),
        "pipeline": type(pipeline).__name__,
        "initial_weights_sha256": model.digest_weights(pipeline),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    _claim(run, record)
    with lock(run), _explain_memory(run, config):
        if (run / "model").exists():  # written last
            return
        _move(pipeline, device)
        examples = build_examples(training, src, pipeline, resolution=config.resolution)
        _move(pipeline, torch.device("cpu"))
        fit(run, pipeline, examples, replace(config, steps=steps), seed)
        exposures = count_exposures(rows, training, steps, config.batch_size, seed)
        manifest.write_parquet(run / "exposures.parquet", exposures)
        if base is None:
            model.save_pipeline(pipeline, run / "model")
        else:
            model.save_changed(pipeline, run / "model", base)
        (run / CHECKPOINT).unlink()


def build_pipeline(config: TrainConfig, seed: int) -> tuple[DiffusionPipeline, dict[str, Any] | None]:
    """What is trained, with its initial weights, on the CPU; and for a LoRA what it will belong to.

    Parameters of its U-Net that are not trained need no gradient. Raises ModelError or LoraError.
    """
    if not config.base:
        return build_tiny(
            seed,
            resolution=config.resolution,
            autoencoder=Path(config.autoencoder) if config.autoencoder else AUTOENCODER,
            channels=config.channels,
            layers_per_block=config.layers_per_block,
            text_width=config.text_width,
            text_layers=config.text_layers,
            caption_tokens=config.caption_tokens,
            prediction_type=config.prediction_type,
        ), None
    pipeline = model.load_pipeline(config.base, pickled=config.pickled)
    model.check_trainable(pipeline, "LoRA" if config.lora_rank else "full")
    base = None
    if config.lora_rank:
        base = model.describe_base(pipeline, config.base, config.loras, config.pickled)
    for path in config.loras:
        lora.merge_lora(pipeline, Path(path))
    model.set_resolution(pipeline, config.resolution)
    pipeline.unet.requires_grad_(True)
    if config.lora_rank:
        lora.add_lora(pipeline.unet, config.lora_rank, config.lora_alpha, config.lora_targets, seed)
    return pipeline, base


def _claim(run: Path, record: dict) -> None:
    """Write RUN/config.json, or see that it says the same. Raises RunError."""
    path = run / "config.json"
    if path.exists():
        before = manifest.read_json(path)
        flat, flat_before = ({**r, **r["config"]} for r in (record, before))
        skip = ("config", "versions", "steps_of_arm")  # the last follows from others
        differing = [k for k in flat if k not in skip and flat_before.get(k) != flat[k]]
        if differing:
            what = ", ".join(f"{key} was {flat_before.get(key)!r}, is {flat[key]!r}" for key in differing)
            raise RunError(f"{run} was trained with other options ({what}): choose another -o or delete it")
    elif run.exists() and any(not path.name.startswith(".") for path in run.iterdir()):
        raise RunError(f"{run} is no training run and not empty: choose another -o")
    else:
        manifest.write_json(path, record)


@contextmanager
def _explain_memory(run: Path, config: TrainConfig) -> Iterator[None]:
    """Say which keys of the config need less memory, when there is too little."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        knobs = {
            "gradient_checkpointing = true": not config.gradient_checkpointing,
            f"accumulation = {config.batch_size}": config.accumulation < config.batch_size,
            "precision = 'bfloat16'": config.precision != "bfloat16",
            "lora_rank = 4": bool(config.base) and not config.lora_rank,
            "a smaller resolution": True,
        }
        less = ", ".join(knob for knob, helps in knobs.items() if helps)
        raise RunError(f"{run}: out of memory; less is needed with {less}") from error


def _move(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Bring the frozen parts to a device; they are done when training begins."""
    for name in FROZEN:
        part = getattr(pipeline, name, None)
        if part is not None:
            part.to(device).requires_grad_(False)


def fit(run: Path, pipeline: DiffusionPipeline, examples: Examples, config: TrainConfig, seed: int) -> None:
    """Train the U-Net of the pipeline with log, checkpoints and progress; it ends with the averaged weights."""
    unet = _prepare(pipeline.unet, config)
    weights = {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    betas, decay = (0.9, config.beta2), config.weight_decay
    optimizer = torch.optim.AdamW(weights.values(), config.learning_rate, betas, weight_decay=decay, fused=True)
    start = load_checkpoint(run / CHECKPOINT, weights, average, optimizer)
    saved, began = start, time.perf_counter()
    size = config.batch_size
    seen = {"initial": start * size, "total": config.steps * size, "unit": " images", "unit_scale": True}
    bar = tqdm(desc=run.name, **seen, file=sys.stderr, disable=None)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    loop = training_loop(unet, weights, average, optimizer, schedule, examples, config, seed, start)
    with bar, open_log(run / "train.jsonl", start) as log:
        try:
            for done in loop:
                log.write(json.dumps({"step": done.step, "loss": done.loss}) + "\n")
                bar.set_postfix(loss=f"{done.loss:.4f}", refresh=False)
                bar.update(size)
                if done.step % config.checkpoint_every == 0 or done.step == config.steps:
                    log.flush()
                    save_checkpoint(run / CHECKPOINT, done.step, weights, average, optimizer)
                    saved = done.step
        except DivergedError as error:
            kept = f"step {saved} is kept in {run / CHECKPOINT}" if saved else "there is no checkpoint yet"
            raise DivergedError(f"{run}: {error}; {kept}") from error
    if saved > start:
        seconds = time.perf_counter() - began
        rate = (saved - start) * size / seconds
        timings = {"train": round(seconds, 3), "steps": saved - start, "images_per_second": round(rate, 1)}
        manifest.write_json(run / "timings.json", timings)
    for name, weight in weights.items():
        weight.detach().copy_(average[name])
    unet.to("cpu", memory_format=torch.contiguous_format).eval()


def _prepare(unet: Any, config: TrainConfig) -> Any:
    """The same U-Net on its device, ready to be trained."""
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.precision == "bfloat16":
        for weight in unet.parameters():
            if not weight.requires_grad:  # under a LoRA; what is trained needs all its bits
                weight.data = weight.data.to(torch.bfloat16)
    return unet.to(model.pick_device(config.device), memory_format=torch.channels_last)


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
) -> Iterator[Step]:
    """Train `weights` of `unet` in place from step `start` on, keep `average` their moving average, tell every step.

    Denoising diffusion (Ho et al. 2020) to the target that the schedule names: epsilon, or v (Salimans & Ho
    2022). Raises DivergedError before a step that would spoil the weights.
    """
    n, total, size = len(examples.latents), schedule.config.num_train_timesteps, config.batch_size
    parameters = list(weights.values())
    trained, averaged = [p.detach() for p in parameters], [average[name] for name in weights]
    unet.train()
    for step in range(start, config.steps):
        began = time.perf_counter()
        rows = torch.from_numpy(draw_rows(n, size, seed, step, examples.weights))  # (B,)
        noise, uniform, order = draw_noise(size, examples.latents.shape[1:], seed, step)
        # One timestep from each of B equal parts: less variance (Kingma et al. 2021, appendix I.1).
        timesteps = ((order + uniform[0]) / size * total).long().clamp(max=total - 1)  # (B,)
        captions = examples.draw_captions(rows, uniform[1]).masked_fill(uniform[2] < config.null_caption, 0)
        loss = 0.0
        for part in torch.arange(size).split(size // config.accumulation):
            drawn = (rows[part], noise[part], timesteps[part], captions[part])
            error = measure_error(unet, schedule, examples, *drawn, config.precision) / config.accumulation
            error.backward()
            loss += error.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(f"loss {loss:.4g}, gradient {norm:.4g} at step {step + 1}: lower learning_rate")
        warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
        optimizer.param_groups[0]["lr"] = config.learning_rate * warmup
        optimizer.step()
        optimizer.zero_grad()
        # A young average forgets faster, so that the random initial weights do not linger in it.
        decay = min(config.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(averaged, trained, 1 - decay)
        yield Step(step + 1, loss, size / (time.perf_counter() - began))


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
