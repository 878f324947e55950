"""What an example weighs: how often its row is drawn, and whether its loss counts. Filtering is weight 0.

In: rows of an arm with their clusters, or what a model just predicted for a batch. Out: weights. Knows nothing of
models, nor of the training loop.
"""

import polars as pl
import torch
from torch import Tensor


def reweigh(training: pl.DataFrame, power: float = 0.0, cap: int = 0) -> pl.DataFrame:
    """Rows of an arm (`arms.COLUMNS`) with new weights: a cluster of m rows weighs m^(1 - power), and at most `cap`.

    power: 0 leaves every row its weight of 1, 1 makes clusters weigh alike, 0.5 is between. cap: 0 is none; 1 makes
    clusters weigh alike. Copies share the weight of their cluster evenly and stand side by side, so that a pass over
    the data takes as many of them as they weigh together. A spare image is a cluster of its own.
    """
    if not power and not cap:
        return training
    size = pl.when(pl.col("cluster_id").is_null()).then(1).otherwise(pl.len().over("cluster_id"))
    total = size.cast(pl.Float64) ** (1 - power)
    capped = pl.min_horizontal(total, pl.lit(float(cap))) if cap else total
    return training.with_columns(weight=capped / size).sort("cluster_id", "id", nulls_last=True, maintain_order=True)


class NoiseThreshold:
    """Drops from the loss what the caption decides too much (Wen et al. 2024, arXiv 2407.21720, sec. 4.2).

    Memorised captions change the prediction by much: ‖prediction with the caption - prediction without‖, an ℓ2 norm
    over the latents. The authors drop a sample of Stable Diffusion 1.4 above 2. Norms of other models are others, so
    the threshold here is a percentile of the norms in `steps` steps from step `first` on, an early time at which
    nothing is memorised yet; nothing is dropped before their end.
    """

    def __init__(self, percentile: float, first: int, steps: int, batch_size: int) -> None:
        self.percentile, self.first = percentile, first
        # Norms of the steps of reference, NaN where there is none (yet).
        self.reference = torch.full((steps, batch_size), torch.nan)

    def record(self, step: int, magnitudes: Tensor) -> None:
        """Norms (B,) of a step, NaN for what was told no caption. Those of later steps change nothing."""
        if 0 <= step - self.first < len(self.reference):
            self.reference[step - self.first] = magnitudes

    def get_limit(self, step: int) -> float:
        """Norms above this are extreme in this step."""
        known = self.reference[~self.reference.isnan()]
        if step < self.first + len(self.reference) or not len(known):
            return float("inf")
        return float(known.double().quantile(self.percentile / 100))
