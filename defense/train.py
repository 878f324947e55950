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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from tqdm import tqdm

from dedup import manifest
from dedup.engine import available_cpus
from dedup.options import lock
from dedup.subjects import CAUTION
from defense import lora, model
from defense.arms import count_steps
from defense.checkpoint import (
    CHECKPOINT,
    LOG,
    Average,
    Weights,
    count_dropped,
    load_checkpoint,
    open_log,
    save_checkpoint,
)
from defense.config import TrainConfig
from defense.data import (
    Examples,
    build_examples,
    count_exposures,
    read_material,
)
from defense.defences import check_defences, choose_noise, describe_privacy, prepare_rows
from defense.loop import DivergedError, Step, choose_layout, training_loop
from defense.private import PrivateGradient
from defense.processes import Processes, join_processes
from defense.tiny import AUTOENCODER, build_tiny, build_tiny_uncond
from defense.weights import NoiseThreshold

LIBRARIES = ("unmemorize", "torch", "diffusers", "transformers", "peft", "numpy", "safetensors", "opacus")
FROZEN = ("vae", "text_encoder", "text_encoder_2")  # parts of a pipeline that only prepare the data


class RunError(OSError):
    """RUN cannot be used: it is something else, or was made with other options. Or the machine is too small."""


def train(out: Path, arm: str, config: TrainConfig, run: Path, seed: int) -> None:
    """Train one arm of the dedup run OUT into RUN. Done already: returns at once. Interrupted: goes on.

    Raises ManifestError, ArmError, ModelError, LoraError, DataError, RunError, DivergedError or OSError.
    """
    out, run = out.resolve(), run.resolve()
    torch.set_num_threads(config.threads or available_cpus())
    processes = join_processes(config.device)
    if config.batch_size % (config.accumulation * processes.size):
        parts = f"accumulation = {config.accumulation} × {processes.size} processes"
        raise RunError(f"batch_size = {config.batch_size} is no multiple of {parts}")
    described = manifest.read_run(out)
    src = Path(described["src"])
    if described.get("medical"):
        print(f"Warning: {CAUTION}.", file=sys.stderr)
    rows, material = read_material(out, config.held_out)
    training = prepare_rows(arm, material, config, seed)
    steps = count_steps(arm, material, config.steps)
    pipeline, base = build_pipeline(config, seed)
    check_defences(pipeline, config, training, processes)
    record: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "config": _flatten(config),
        "out": str(out),
        "out_sha256": hashlib.sha256((out / "run.json").read_bytes()).hexdigest(),
        "steps_of_arm": steps,
        "rows": len(training),
        "rows_sha256": hashlib.sha256(training.write_ndjson().encode()).hexdigest(),
        "pipeline": type(pipeline).__name__,
        "initial_weights_sha256": model.digest_weights(pipeline),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    if config.private:
        record["noise_multiplier"] = choose_noise(config, len(training), steps)
    if processes.first:
        claim(run, record)
    with lock(run) if processes.first else nullcontext(), _explain_memory(run, config):
        if (run / "model").exists():  # written last
            return
        _move(pipeline, FROZEN, processes.device)
        examples = build_examples(training, src, pipeline, resolution=config.resolution)
        _move(pipeline, FROZEN if not config.caption_perturbation else ("vae",), torch.device("cpu"))

        def publish(folder: Path, step: int) -> None:
            """What is left of a run after so many steps: what was seen, what was spent, and the model, last."""
            dropped = count_dropped(run / LOG, len(training), step) if config.magnitude_percentile else None
            draws = (step, config.batch_size, seed)
            exposures = count_exposures(rows, training, *draws, poisson=config.private, dropped=dropped)
            manifest.write_parquet(folder / "exposures.parquet", exposures)
            if config.private:
                manifest.write_json(folder / "privacy.json", describe_privacy(record, training, config, step))
            if folder != run:
                manifest.write_json(folder / "config.json", record | {"steps_of_arm": step})
            if base is None:
                model.save_pipeline(pipeline, folder / "model")
            else:
                model.save_changed(pipeline, folder / "model", base)

        noise = record.get("noise_multiplier", 0.0)
        fit(run, pipeline, examples, replace(config, steps=steps), seed, processes, noise, publish)
        if processes.first:
            publish(run, steps)
            (run / CHECKPOINT).unlink()


def build_pipeline(config: TrainConfig, seed: int) -> tuple[DiffusionPipeline, dict[str, Any] | None]:
    """What is trained, with its initial weights, on the CPU; and for a LoRA what it will belong to.

    Parameters of its U-Net that are not trained need no gradient. Raises ModelError or LoraError.
    """
    if not config.base and config.model == "tiny-uncond":
        return build_tiny_uncond(
            seed,
            resolution=config.resolution,
            channels=config.channels,
            layers_per_block=config.layers_per_block,
            prediction_type=config.prediction_type,
        ), None
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


def claim(run: Path, record: dict) -> None:
    """Write RUN/config.json, or see that it says the same. Raises RunError."""
    path = run / "config.json"
    if path.exists():
        before, defaults = manifest.read_json(path), _flatten(TrainConfig())
        # A key that there was not yet had the value that changes nothing.
        flat, flat_before = ({**defaults, **r, **r["config"]} for r in (record, before))
        skip = ("config", "versions", "steps_of_arm")  # the last follows from others
        differing = [k for k in flat if k not in skip and flat_before.get(k) != flat[k]]
        if differing:
            what = ", ".join(f"{key} was {flat_before.get(key)!r}, is {flat[key]!r}" for key in differing)
            raise RunError(f"{run} was trained with other options ({what}): choose another -o or delete it")
    elif run.exists() and any(not path.name.startswith(".") for path in run.iterdir()):
        raise RunError(f"{run} is no training run and not empty: choose another -o")
    else:
        manifest.write_json(path, record)


def _flatten(config: TrainConfig) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


@contextmanager
def _explain_memory(run: Path, config: TrainConfig) -> Iterator[None]:
    """Say which keys of the config need less memory, when there is too little."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        knobs = {
            "gradient_checkpointing = true": not (config.gradient_checkpointing or config.private),
            f"accumulation = {config.batch_size}": config.accumulation < config.batch_size,
            "precision = 'bfloat16'": not (config.precision == "bfloat16" or config.private),
            "lora_rank = 4": bool(config.base) and not config.lora_rank,
            "a smaller resolution": True,
        }
        less = ", ".join(knob for knob, helps in knobs.items() if helps)
        raise RunError(f"{run}: out of memory; less is needed with {less}") from error


def _move(pipeline: DiffusionPipeline, names: Iterable[str], device: torch.device) -> None:
    """Bring frozen parts to a device; most are done when training begins."""
    for name in names:
        part = getattr(pipeline, name, None)
        if part is not None:
            part.to(device).requires_grad_(False)


def fit(
    run: Path,
    pipeline: DiffusionPipeline,
    examples: Examples,
    config: TrainConfig,
    seed: int,
    processes: Processes,
    noise_multiplier: float,
    publish: Callable[[Path, int], None],
) -> None:
    """Train the U-Net of the pipeline with log, checkpoints and progress; it ends with the averaged weights.

    publish: writes the model as it is after so many steps to a folder; called for those of `save_steps`.
    """
    unet = _prepare(pipeline.unet, config, processes.device)
    weights = {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    betas, decay = (0.9, config.beta2), config.weight_decay
    optimizer = torch.optim.AdamW(weights.values(), config.learning_rate, betas, weight_decay=decay, fused=True)
    threshold, private = None, None
    others: dict[str, torch.Tensor] = {}  # further state
    if config.magnitude_percentile:
        size, window = config.batch_size, (config.warmup_steps, config.magnitude_steps)
        threshold = NoiseThreshold(config.magnitude_percentile, *window, size)
        others = {"magnitudes": threshold.reference}
    state = (weights, average, optimizer)
    start = load_checkpoint(run / CHECKPOINT, *state, others)
    if config.private:
        private = PrivateGradient(
            unet,
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=config.max_grad_norm,
            batch_size=config.batch_size,
            multiplicity=config.noise_multiplicity,
        )
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    loop = training_loop(unet, *state, schedule, examples, config, seed, start, processes, threshold, private)

    def save(step: int) -> None:
        save_checkpoint(run / CHECKPOINT, step, *state, others)

    def keep(step: int) -> None:
        folder = run / "steps" / str(step)
        if not (folder / "model").exists():
            with _averaged(unet, weights, average, choose_layout(config)):
                publish(folder, step)

    if processes.first:
        _record(loop, run, start, config, save, keep)
    else:
        deque(loop, maxlen=0)
    if private is not None:
        private.close()
    for name, weight in weights.items():
        weight.detach().copy_(average[name])
    unet.to("cpu", memory_format=torch.contiguous_format).eval()


@contextmanager
def _averaged(unet: Any, weights: Weights, average: Average, layout: torch.memory_format) -> Iterator[None]:
    """The averaged weights in the place of the trained ones, on the CPU, as they are saved."""
    device = unet.device
    trained = {name: weight.detach().clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.detach().copy_(average[name])
    unet.to("cpu", memory_format=torch.contiguous_format)
    yield
    unet.to(device, memory_format=layout)
    for name, weight in weights.items():
        weight.detach().copy_(trained[name])


def _record(
    loop: Iterable[Step],
    run: Path,
    start: int,
    config: TrainConfig,
    save: Callable[[int], None],
    keep: Callable[[int], None],
) -> None:
    """Run the loop from step `start` to its end: a line in the log for every step, progress, checkpoints, timings.

    save: the state after a step. keep: the model after a step of `save_steps`.
    """
    saved, size, began = start, config.batch_size, (time.perf_counter(), time.process_time())
    seen = {"initial": start * size, "total": config.steps * size, "unit": " images", "unit_scale": True}
    bar = tqdm(desc=run.name, **seen, file=sys.stderr, disable=None)
    with bar, open_log(run / LOG, start) as log:
        try:
            for done in loop:
                told = {"step": done.step, "loss": done.loss if math.isfinite(done.loss) else None}
                log.write(json.dumps(told | ({"dropped": done.dropped} if config.magnitude_percentile else {})) + "\n")
                bar.set_postfix(loss=f"{done.loss:.4f}", refresh=False)
                bar.update(size)
                if done.step in config.save_steps:
                    log.flush()
                    keep(done.step)
                if done.step % config.checkpoint_every == 0 or done.step == config.steps:
                    log.flush()
                    save(done.step)
                    saved = done.step
        except DivergedError as error:
            kept = f"step {saved} is kept in {run / CHECKPOINT}" if saved else "there is no checkpoint yet"
            raise DivergedError(f"{run}: {error}; {kept}") from error
    if saved > start:
        seconds, busy = time.perf_counter() - began[0], time.process_time() - began[1]
        rate = (saved - start) * size / seconds
        timings = {"train": round(seconds, 3), "processor": round(busy, 3)}
        timings |= {"steps": saved - start, "images_per_second": round(rate, 1)}
        manifest.write_json(run / "timings.json", timings)


def _prepare(unet: Any, config: TrainConfig, device: torch.device) -> Any:
    """The same U-Net on a device, ready to be trained."""
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.precision == "bfloat16":
        for weight in unet.parameters():
            if not weight.requires_grad:  # under a LoRA; what is trained needs all its bits
                weight.data = weight.data.to(torch.bfloat16)
    return unet.to(device, memory_format=choose_layout(config))
