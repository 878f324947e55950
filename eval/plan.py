"""What an audit will cost and what it could show, before it starts: time, disk and power.

In: a recipe, and the dataset as far as it is known. Out: a text. Speed is measured for a moment on this machine.
"""

import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dedup.canaries import PlantError
from dedup.engine import available_cpus
from dedup.plant import assign_levels
from defense.config import TrainConfig
from eval import power
from eval.recipe import Planting, Recipe

STEPS = 6  # of training and of sampling that are timed, the fastest counts
DEDUP = 0.06  # processor seconds an image at copy level, docs/benchmarks.md
ATTACK = 0.004  # processor seconds a generation
BYTES = 3  # of a PNG, for every pixel: what is drawn compresses badly


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds on one core, or on the GPU; and how large a model is."""

    step: float  # of training
    image_step: float  # of one image in one denoising step
    parameters: int


@dataclass(frozen=True, slots=True)
class Plan:
    """None where it is not known yet."""

    rows: int | None  # of the dataset that is trained on
    prompts: int | None  # targets, controls among them
    clusters: int | None  # that stand twice or more, a seed
    seconds: dict[str, float]  # by stage, wall time
    disk: float  # bytes
    smallest_drop: float  # that is seen with 80 % power


def make_plan(recipe: Recipe, speed: Speed | None, rows: int | None, clusters: int | None, jobs: int) -> Plan:
    """rows, clusters: of a dataset that was deduplicated before; planted ones are known. Raises PlantError."""
    prompts = None
    if recipe.planted:
        rows, clusters, prompts = count_planted(recipe.plant, recipe.at_least)
        drop = power.smallest_assigned_drop(treated(recipe))
    else:
        drop = math.nan if clusters is None else power.stats.smallest_drop(clusters)
        prompts = None if rows is None else min(rows, recipe.generate.limit)
    runs = recipe.seeds * len(recipe.arms)
    seconds: dict[str, float] = {}
    images = (prompts or recipe.generate.limit) * recipe.generate.n
    images += recipe.generate.null + recipe.utility.images
    if rows is not None:
        seconds["deduplicate"] = (recipe.seeds if recipe.planted else 1) * rows * DEDUP / jobs
    if speed is not None:
        waves = math.ceil(runs / jobs)
        seconds["train"] = waves * recipe.train.steps * speed.step
        passes = 2 if recipe.generate.guidance_scale > 1 else 1
        seconds["generate"] = waves * images * recipe.generate.steps * passes * speed.image_step
        seconds["attack"] = waves * images * ATTACK
    weights = 0 if speed is None else 4 * speed.parameters
    disk = runs * (images * BYTES * recipe.train.resolution**2 + 5 * weights)  # model, averages, two moments
    return Plan(rows, prompts, clusters, seconds, disk, drop)


def count_planted(plant: Planting, at_least: int) -> tuple[int, int, int]:
    """Rows, canaries that stand `at_least` times, and targets of a planted dataset. Raises PlantError."""
    levels = plant.multiplicities
    if not levels or plant.canaries % len(levels):
        raise PlantError(f"canaries = {plant.canaries} is no multiple of the {len(levels)} multiplicities")
    each = plant.canaries // len(levels)
    repeated = each * sum(m >= at_least for m in levels)
    return each * sum(levels) + plant.fillers, repeated, plant.canaries + plant.controls


def treated(recipe: Recipe) -> np.ndarray:
    """bool (canaries, seeds): planted `at_least` times."""
    plant = recipe.plant
    dealt = (assign_levels(plant.canaries, plant.multiplicities, plant.edited, s) for s in range(recipe.seeds))
    return np.array([[m >= recipe.at_least for m, _ in levels] for levels in dealt]).T


def measure_speed(config: TrainConfig, guidance_scale: float) -> Speed | None:
    """A few steps of the model with random numbers; None when its base cannot be opened here."""
    import torch

    from defense import sampling
    from defense.conditions import embed_captions
    from defense.data import Examples, encode_latents
    from defense.loop import training_loop
    from defense.train import DDPMScheduler, build_pipeline

    torch.set_num_threads(config.threads or available_cpus())
    try:
        pipeline, _ = build_pipeline(config, 0)
    except (OSError, ValueError) as error:
        print(f"The time of training is not known: {error}", file=sys.stderr)
        return None
    n, side = 64, config.resolution
    latents = encode_latents(np.zeros((n, side, side, 3), np.uint8), pipeline)
    ids = torch.zeros(n, dtype=torch.int64)
    examples = Examples(latents, embed_captions(pipeline, ["a"]), ids[:1], ids, torch.ones_like(ids))
    unet = pipeline.unet.to(memory_format=torch.channels_last)
    weights = {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), 0.0)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    loop = training_loop(unet, weights, average, optimizer, schedule, examples, replace(config, steps=STEPS), 0)
    step = min(config.batch_size / done.images_per_second for done in loop)
    unet.eval()
    start = time.perf_counter()
    sampling.sample(pipeline, ["a"] * 16, list(range(16)), steps=STEPS, guidance_scale=guidance_scale, batch_size=16)
    image_step = (time.perf_counter() - start) / (16 * STEPS * (2 if guidance_scale > 1 else 1))
    return Speed(step, image_step, sum(parameter.numel() for parameter in unet.parameters()))


def describe(recipe: Recipe, plan: Plan, jobs: int) -> str:
    """The plan in words."""
    runs = f"{len(recipe.arms)} arms ({', '.join(recipe.arms)}) × {_count(recipe.seeds, 'seed')}"
    known = f"{plan.rows:,} rows, {_count(plan.prompts or 0, 'prompt')}" if plan.rows else "after deduplication"
    total = sum(plan.seconds.values())
    stages = ", ".join(f"{name} {say_time(value)}" for name, value in plan.seconds.items())
    lines = [
        f"runs     {runs}, {jobs} at a time, {recipe.train.steps:,} steps of {recipe.train.batch_size}",
        f"data     {known}",
        f"time     about {say_time(total)} ({stages})" if "train" in plan.seconds else "time     not known",
        f"disk     about {plan.disk / 1e6:,.0f} MB",
        f"declared {', '.join(f'raw - {arm}' for arm in recipe.primary) or 'nothing: one arm'}",
        f"power    {say_power(recipe, plan)}",
    ]
    return "\n".join(lines)


def say_power(recipe: Recipe, plan: Plan) -> str:
    if plan.clusters is None:
        return "known after deduplication, from the number of clusters"
    unit = f"{recipe.plant.canaries} canaries" if recipe.planted else f"{plan.clusters} clusters"
    many = f"{unit} and {_count(recipe.seeds, 'seed')}"
    if math.isnan(plan.smallest_drop):
        needed = power.clusters_needed(0.25)
        return f"with {many} no drop can be shown; a drop of 25 points takes {needed} images that stand twice or more"
    points = math.ceil(100 * plan.smallest_drop)
    if not recipe.planted:
        many = f"{unit}, one seed"
    return f"with {many} you can see a drop of {points} points (80 % power, 95 % interval)"


def say_time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def describe_dataset(out: Path, at_least: int) -> tuple[int, int]:
    """Readable rows of a finished dedup run, and clusters that stand `at_least` times."""
    from dedup import manifest

    rows = manifest.read(out, ["status", "keep", "represents"])
    kept = rows.filter("keep")
    return int((rows["status"] == "ok").sum()), int((kept["represents"] >= at_least).sum())
