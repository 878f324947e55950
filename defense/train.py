"""One training run: OUT + arm + config + seed → RUN. Reads top to bottom; `train` is the recipe.

RUN is described in docs/architecture.md. Whatever chance decides in a step (rows, noise, timesteps, captions)
is a function of the seed and the number of the step alone. So a run that was killed and started again ends
with the same bits (on a CPU, with an equal number of threads), and arms with equally many rows share their
random numbers.

    unmemorize train OUT --arm raw --config configs/tiny.toml -o RUN --seed 0
"""

import hashlib
import json
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
from defense.arms import count_steps, select_rows
from defense.checkpoint import CHECKPOINT, load_checkpoint, open_log, save_checkpoint
from defense.config import TrainConfig
from defense.data import (
    Examples,
    build_examples,
    count_exposures,
    read_material,
)
from defense.loop import DivergedError, Step, training_loop
from defense.processes import Processes, join_processes
from defense.tiny import AUTOENCODER, build_tiny, build_tiny_uncond

LIBRARIES = ("unmemorize", "torch", "diffusers", "transformers", "peft", "numpy", "safetensors")
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
    if processes.first:
        claim(run, record)
    with lock(run) if processes.first else nullcontext(), _explain_memory(run, config):
        if (run / "model").exists():  # written last
            return
        _move(pipeline, processes.device)
        examples = build_examples(training, src, pipeline, resolution=config.resolution)
        _move(pipeline, torch.device("cpu"))
        fit(run, pipeline, examples, replace(config, steps=steps), seed, processes)
        if not processes.first:
            return
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


def fit(
    run: Path,
    pipeline: DiffusionPipeline,
    examples: Examples,
    config: TrainConfig,
    seed: int,
    processes: Processes,
) -> None:
    """Train the U-Net of the pipeline with log, checkpoints and progress; it ends with the averaged weights."""
    unet = _prepare(pipeline.unet, config, processes.device)
    weights = {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    betas, decay = (0.9, config.beta2), config.weight_decay
    optimizer = torch.optim.AdamW(weights.values(), config.learning_rate, betas, weight_decay=decay, fused=True)
    start = load_checkpoint(run / CHECKPOINT, weights, average, optimizer)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    loop = training_loop(unet, weights, average, optimizer, schedule, examples, config, seed, start, processes)
    if processes.first:
        _record(
            loop, run, start, config, lambda step: save_checkpoint(run / CHECKPOINT, step, weights, average, optimizer)
        )
    else:
        deque(loop, maxlen=0)
    for name, weight in weights.items():
        weight.detach().copy_(average[name])
    unet.to("cpu", memory_format=torch.contiguous_format).eval()


def _record(loop: Iterable[Step], run: Path, start: int, config: TrainConfig, save: Callable[[int], None]) -> None:
    """Run the loop from step `start` to its end: a line in the log for every step, progress, checkpoints, timings."""
    saved, size, began = start, config.batch_size, (time.perf_counter(), time.process_time())
    seen = {"initial": start * size, "total": config.steps * size, "unit": " images", "unit_scale": True}
    bar = tqdm(desc=run.name, **seen, file=sys.stderr, disable=None)
    with bar, open_log(run / "train.jsonl", start) as log:
        try:
            for done in loop:
                log.write(json.dumps({"step": done.step, "loss": done.loss}) + "\n")
                bar.set_postfix(loss=f"{done.loss:.4f}", refresh=False)
                bar.update(size)
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
    return unet.to(device, memory_format=torch.channels_last)
