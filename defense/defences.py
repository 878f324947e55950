"""Which defences go with which arm and model, and what DP-SGD says of the rows of an arm.

In: arm and config. Out: the rows as they are trained on; errors, before anything is computed, for what would have no
effect or no guarantee. Knows nothing of the training loop.
"""

from typing import Any

import polars as pl
from diffusers import DiffusionPipeline

from defense.arms import ArmError, Material, select_rows, tell_one_caption
from defense.config import TrainConfig
from defense.model import ModelError
from defense.private import PrivacyError, describe, find_noise_multiplier
from defense.processes import Processes
from defense.weights import reweigh


def prepare_rows(arm: str, material: Material, config: TrainConfig, seed: int) -> pl.DataFrame:
    """The rows of an arm, with the captions and weights that the config wants. Raises ArmError."""
    training = select_rows(arm, material, seed)
    keys = ("weight_power", "weight_cap", "dp_epsilon", "dp_noise_multiplier")
    if arm == "reweighted" and (given := [key for key in keys if getattr(config, key)]):
        raise ArmError(f"{given[0]} does not go with the arm reweighted, whose rows have weights: take raw")
    if config.captions == "one":
        training = tell_one_caption(training)
    return reweigh(training, config.weight_power, config.weight_cap)


def check_defences(
    pipeline: DiffusionPipeline, config: TrainConfig, training: pl.DataFrame, processes: Processes
) -> None:
    """Refuse what would have no effect on this model, or no guarantee. Raises ModelError or PrivacyError."""
    keys = ("caption_perturbation", "embedding_noise", "magnitude_percentile")
    if not hasattr(pipeline, "tokenizer") and (idle := [key for key in keys if getattr(config, key)]):
        raise ModelError(f"{idle[0]} would have no effect: {type(pipeline).__name__} takes no captions")
    if not config.private:
        return
    n = len(training)
    if processes.size > 1:
        raise PrivacyError("DP-SGD in several processes is not supported: start one")
    if config.batch_size > n:
        raise PrivacyError(f"DP-SGD: batch_size = {config.batch_size} is more than the {n} rows")
    if config.dp_delta * n >= 1:
        raise PrivacyError(f"dp_delta = {config.dp_delta} would publish one of {n} rows: take less than {1 / n:.1g}")


def choose_noise(config: TrainConfig, rows: int, steps: int) -> float:
    """The noise multiplier of DP-SGD, given or found for the ε wanted. Raises PrivacyError."""
    rate = config.batch_size / rows
    return config.dp_noise_multiplier or find_noise_multiplier(config.dp_epsilon, config.dp_delta, rate, steps)


def describe_privacy(record: dict[str, Any], training: pl.DataFrame, config: TrainConfig, step: int) -> dict[str, Any]:
    """RUN/privacy.json after so many steps."""
    size = pl.when(pl.col("cluster_id").is_null()).then(1).otherwise(pl.len().over("cluster_id"))
    clusters = training.group_by(copies=size).agg(clusters=pl.len() // size.first())
    return describe(
        noise_multiplier=record["noise_multiplier"],
        delta=config.dp_delta,
        rows=len(training),
        batch_size=config.batch_size,
        steps=step,
        max_grad_norm=config.max_grad_norm,
        multiplicity=config.noise_multiplicity,
        copies=dict(clusters.sort("copies").iter_rows()),
    )
