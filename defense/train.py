"""One training run from scratch: OUT + arm + config + seed → RUN. Reads top to bottom; `train` is the recipe.

RUN is described in docs/architecture.md. Whatever chance decides in a step (rows, noise, timesteps, captions)
is a function of the seed and the number of the step alone. So a run that was killed and started again ends
with the same bits (on a CPU, with an equal number of threads), and arms with equally many rows share their
random numbers.

    unmemorize train OUT --arm raw --config configs/tiny.toml -o RUN --seed 0
"""

import copy
import difflib
import hashlib
import json
import math
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO, get_origin, get_type_hints

import polars as pl
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dedup import manifest
from dedup.engine import available_cpus
from dedup.pipeline import lock
from dedup.subjects import CAUTION
from defense import model
from defense.arms import select_rows
from defense.data import (
    Examples,
    build_examples,
    count_exposures,
    draw_noise,
    draw_rows,
    hold_out,
    read_canary_keys,
    read_spare,
)

LIBRARIES = ("unmemorize", "torch", "diffusers", "transformers", "numpy", "safetensors")
CHECKPOINT = "checkpoint.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


class ConfigError(ValueError):
    """A config file that cannot be used: which key, and what it may be."""


class RunError(OSError):
    """RUN cannot be used: it is something else, or was made with other options."""


class DivergedError(ValueError):
    """The loss or its gradient is no longer finite."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What decides a run beside arm and seed. TOML files have these keys, configs/tiny.toml these values."""

    # data
    resolution: int = 32  # pixels a side
    held_out: float = 0.0  # share of components that no arm trains on
    null_caption: float = 0.1  # share of examples trained with the empty caption (classifier-free guidance)
    # model
    autoencoder: str = ""  # folder of an AutoencoderKL; "" is the one that comes with the package
    channels: tuple[int, ...] = (64, 128)  # of the U-Net, one a resolution
    layers_per_block: int = 1
    text_width: int = 64
    text_layers: int = 2
    caption_tokens: int = 16  # longer captions are cut
    prediction_type: str = "v_prediction"  # or "epsilon"
    # optimisation
    steps: int = 1600
    batch_size: int = 16
    learning_rate: float = 1e-3  # constant after the warmup
    warmup_steps: int = 100
    weight_decay: float = 0.01
    beta2: float = 0.99  # of AdamW
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99  # of the averaged weights, which are the ones saved
    # machine
    threads: int = 1  # 0 = one per processor; other numbers may round differently
    checkpoint_every: int = 500  # steps

    def __post_init__(self) -> None:
        shares = ("held_out", "null_caption", "beta2", "ema_decay")
        positive = (
            *("resolution", "layers_per_block", "text_width", "text_layers", "steps", "batch_size"),
            *("learning_rate", "max_grad_norm", "checkpoint_every"),
        )
        limits = {name: 0 <= getattr(self, name) < 1 for name in shares}
        limits |= {name: getattr(self, name) > 0 for name in positive}
        limits |= {name: getattr(self, name) >= 0 for name in ("warmup_steps", "weight_decay", "threads")}
        limits["caption_tokens"] = self.caption_tokens > 2
        limits["channels"] = len(self.channels) > 1 and min(self.channels) > 0
        limits["prediction_type"] = self.prediction_type in ("v_prediction", "epsilon")
        for name, holds in limits.items():
            if not holds:
                raise ConfigError(f"{name} = {getattr(self, name)!r} is out of range")


@dataclass(frozen=True, slots=True)
class Step:
    """What the loop tells after every step."""

    step: int  # number of steps that are done
    loss: float
    images_per_second: float  # of this step


def load_config(path: Path) -> TrainConfig:
    """A flat TOML file → TrainConfig; absent keys keep their defaults. Raises ConfigError or OSError."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no valid TOML ({error})") from error
    types = get_type_hints(TrainConfig)
    for key in (key for key in values if key not in types):
        near = difflib.get_close_matches(key, types, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(types)}"
        raise ConfigError(f"{path}: unknown key {key!r}: {hint}")
    try:
        return TrainConfig(**{key: _convert(key, value, types[key]) for key, value in values.items()})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _convert(key: str, value: Any, kind: Any) -> Any:
    """A TOML value as the type of its field: a whole number may stand for a float, nothing else may."""
    if get_origin(kind) is tuple:
        if isinstance(value, list) and all(type(v) is int for v in value):
            return tuple(value)
        raise ConfigError(f"{key} = {value!r} must be a list of whole numbers")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{key} = {value!r} must be of type {kind.__name__}")
    return value


def train(out: Path, arm: str, config: TrainConfig, run: Path, seed: int) -> None:
    """Train one arm of the dedup run OUT into RUN. Done already: returns at once. Interrupted: goes on.

    Raises ManifestError, ArmError, ModelError, DataError, RunError, DivergedError or OSError.
    """
    out, run = out.resolve(), run.resolve()
    torch.set_num_threads(config.threads or available_cpus())
    rows = manifest.read(out)
    described = manifest.read_run(out)
    src = Path(described["src"])
    if described.get("medical"):
        print(f"Warning: {CAUTION}.", file=sys.stderr)
    rows = rows.with_columns(hold_out(rows, config.held_out, read_canary_keys(out)))
    training = select_rows(arm, rows.filter(~pl.col("held_out")), read_spare(src), seed)
    pipeline = model.build_tiny(
        seed,
        resolution=config.resolution,
        autoencoder=Path(config.autoencoder) if config.autoencoder else model.AUTOENCODER,
        channels=config.channels,
        layers_per_block=config.layers_per_block,
        text_width=config.text_width,
        text_layers=config.text_layers,
        caption_tokens=config.caption_tokens,
        prediction_type=config.prediction_type,
    )
    record = {
        "arm": arm,
        "seed": seed,
        "config": asdict(config) | {"channels": list(config.channels)},
        "out": str(out),
        "out_sha256": hashlib.sha256((out / "run.json").read_bytes()).hexdigest(),
        "rows": len(training),
        "rows_sha256": hashlib.sha256(training.write_ndjson().encode()).hexdigest(),
        "initial_weights_sha256": model.digest_weights(pipeline),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    _claim(run, record)
    with lock(run):
        if (run / "model").exists():  # written last
            return
        examples = build_examples(
            training,
            src,
            resolution=config.resolution,
            autoencoder=pipeline.vae,
            tokenizer=pipeline.tokenizer,
            text_encoder=pipeline.text_encoder,
        )
        pipeline.unet = fit(run, pipeline, examples, config, seed)
        exposures = count_exposures(rows, training, config.steps, config.batch_size, seed)
        manifest.write_parquet(run / "exposures.parquet", exposures)
        model.save_pipeline(pipeline, run / "model")
        (run / CHECKPOINT).unlink()


def _claim(run: Path, record: dict) -> None:
    """Write RUN/config.json, or see that it says the same. Raises RunError."""
    path = run / "config.json"
    if path.exists():
        before = manifest.read_json(path)
        flat, flat_before = ({**r, **r["config"]} for r in (record, before))
        skip = ("config", "versions")
        differing = [k for k in flat if k not in skip and flat_before.get(k) != flat[k]]
        if differing:
            what = ", ".join(f"{key} was {flat_before.get(key)!r}, is {flat[key]!r}" for key in differing)
            raise RunError(f"{run} was trained with other options ({what}): choose another -o or delete it")
    elif run.exists() and any(not path.name.startswith(".") for path in run.iterdir()):
        raise RunError(f"{run} is no training run and not empty: choose another -o")
    else:
        manifest.write_json(path, record)


def fit(
    run: Path, pipeline: StableDiffusionPipeline, examples: Examples, config: TrainConfig, seed: int
) -> UNet2DConditionModel:
    """Train a copy of the U-Net with log, checkpoints and progress; returns the averaged weights."""
    unet = copy.deepcopy(pipeline.unet).to(memory_format=torch.channels_last)
    average = copy.deepcopy(unet).requires_grad_(False)
    betas, decay = (0.9, config.beta2), config.weight_decay
    optimizer = torch.optim.AdamW(unet.parameters(), config.learning_rate, betas, weight_decay=decay, fused=True)
    start = load_checkpoint(run / CHECKPOINT, unet, average, optimizer)
    saved, began = start, time.perf_counter()
    size = config.batch_size
    seen = {"initial": start * size, "total": config.steps * size, "unit": " images", "unit_scale": True}
    bar = tqdm(desc=run.name, **seen, file=sys.stderr, disable=None)
    loop = training_loop(unet, average, optimizer, pipeline.scheduler, examples, config, seed, start)
    with bar, _open_log(run / "train.jsonl", start) as log:
        try:
            for done in loop:
                log.write(json.dumps({"step": done.step, "loss": done.loss}) + "\n")
                bar.set_postfix(loss=f"{done.loss:.4f}", refresh=False)
                bar.update(size)
                if done.step % config.checkpoint_every == 0 or done.step == config.steps:
                    log.flush()
                    save_checkpoint(run / CHECKPOINT, done.step, unet, average, optimizer)
                    saved = done.step
        except DivergedError as error:
            kept = f"step {saved} is kept in {run / CHECKPOINT}" if saved else "there is no checkpoint yet"
            raise DivergedError(f"{run}: {error}; {kept}") from error
    if saved > start:
        seconds = time.perf_counter() - began
        rate = (saved - start) * size / seconds
        timings = {"train": round(seconds, 3), "steps": saved - start, "images_per_second": round(rate, 1)}
        manifest.write_json(run / "timings.json", timings)
    return average.to(memory_format=torch.contiguous_format).eval()


def training_loop(
    unet: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: DDIMScheduler,
    examples: Examples,
    config: TrainConfig,
    seed: int,
    start: int = 0,
) -> Iterator[Step]:
    """Train `unet` in place from step `start` on, keep `average` its moving average, and tell of every step.

    Denoising diffusion (Ho et al. 2020) to the target that the scheduler names: epsilon, or v (Salimans & Ho
    2022). Raises DivergedError before a step that would spoil the weights.
    """
    n, total = len(examples.latents), scheduler.config.num_train_timesteps
    velocity = scheduler.config.prediction_type == "v_prediction"
    parameters = list(unet.parameters())
    weights, averaged = [p.detach() for p in parameters], [p.detach() for p in average.parameters()]
    unet.train()
    for step in range(start, config.steps):
        began = time.perf_counter()
        rows = torch.from_numpy(draw_rows(n, config.batch_size, seed, step))  # (B,)
        noise, uniform, order = draw_noise(config.batch_size, examples.latents.shape[1:], seed, step)
        # One timestep from each of B equal parts: less variance (Kingma et al. 2021, appendix I.1).
        timesteps = ((order + uniform[0]) / config.batch_size * total).long().clamp(max=total - 1)  # (B,)
        captions = examples.draw_captions(rows, uniform[1]).masked_fill(uniform[2] < config.null_caption, 0)

        latents = examples.latents[rows]  # (B, C, h, w)
        noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        prediction = unet(noisy, timesteps, examples.embeddings[captions], return_dict=False)[0]
        loss = F.mse_loss(prediction, target)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise DivergedError(
                f"loss {loss.item():.4g}, gradient {norm.item():.4g} at step {step + 1}: lower learning_rate"
            )
        warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
        optimizer.param_groups[0]["lr"] = config.learning_rate * warmup
        optimizer.step()
        optimizer.zero_grad()
        # A young average forgets faster, so that the random initial weights do not linger in it.
        decay = min(config.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(averaged, weights, 1 - decay)
        yield Step(step + 1, loss.item(), config.batch_size / (time.perf_counter() - began))


def save_checkpoint(
    path: Path, step: int, unet: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Everything that the next step depends on, in one file: on disk is either the old state or the new."""
    tensors: dict[str, Tensor] = {}
    for name, weight in unet.named_parameters():
        kept = {"unet": weight.detach(), "average": average.get_parameter(name)}
        kept |= {moment: optimizer.state[weight][moment] for moment in MOMENTS}
        tensors |= {f"{part}/{name}": tensor.contiguous() for part, tensor in kept.items()}
    manifest.write_atomic(path, lambda temporary: save_file(tensors, temporary, {"step": str(step)}))


@torch.no_grad()
def load_checkpoint(path: Path, unet: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put the saved state into place and return the number of steps done; 0 without a checkpoint."""
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as saved:
        step = int(saved.metadata()["step"])
        for name, weight in unet.named_parameters():
            weight.copy_(saved.get_tensor(f"unet/{name}"))
            average.get_parameter(name).copy_(saved.get_tensor(f"average/{name}"))
            # In the weight's own memory format: the fused optimizer walks through both side by side.
            moments = {m: torch.empty_like(weight).copy_(saved.get_tensor(f"{m}/{name}")) for m in MOMENTS}
            optimizer.state[weight] = {"step": torch.tensor(float(step)), **moments}
    return step


def _open_log(path: Path, start: int) -> TextIO:
    """train.jsonl, one line a step, cut back to the steps that the checkpoint knows."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    manifest.write_text(path, "".join(lines[:start]))
    return path.open("a", encoding="utf-8")
