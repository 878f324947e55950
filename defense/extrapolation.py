"""Two U-Nets → one that goes from the first through the second and beyond: what the second learned comes out more.

In: two pipelines of one family, of which the second was fine-tuned from the first, or trained on other data. Out: a
pipeline to be sampled like any other. Knows nothing of files.
"""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn


class ExtrapolationError(ValueError):
    """Two models that have no line through them."""


class Extrapolated(nn.Module):
    """base + weight · (tuned - base), of what both U-Nets predict (FineXtract: Wu et al. 2025, model guidance).

    Weights 0 and 1 are the two U-Nets themselves; the authors take 3 (all weights fine-tuned) and 5 (LoRA). Whether
    they predict noise or v makes no difference, because the weights of both add up to 1. Both are told the same prompt.
    The authors' further term k · base (k = -0.02, where all weights are fine-tuned) is left out: it means
    nothing to a model that predicts v.
    """

    def __init__(self, tuned: nn.Module, base: nn.Module, weight: float) -> None:
        super().__init__()
        self.tuned, self.base, self.weight = tuned, base, weight
        self.config = tuned.config

    @property
    def device(self) -> Any:
        return self.tuned.device

    @property
    def dtype(self) -> Any:
        return self.tuned.dtype

    @property
    def mid_block(self) -> Any:
        return self.tuned.mid_block

    def forward(self, *arguments: Any, return_dict: bool = False, **told: Any) -> tuple[Tensor]:
        tuned, base = (unet(*arguments, **told, return_dict=False)[0] for unet in (self.tuned, self.base))
        return (base + self.weight * (tuned - base),)


def extrapolate(tuned: DiffusionPipeline, base: DiffusionPipeline, weight: float) -> DiffusionPipeline:
    """The pipeline `tuned` with a U-Net that is extrapolated. Raises ExtrapolationError.

    The two may differ in the weights of their U-Nets alone: what both are told, and what their noise means, is equal.
    """
    name = type(tuned).__name__
    if getattr(tuned, "unet", None) is None:
        raise ExtrapolationError(f"{name} has no U-Net: only those that have one can be extrapolated")
    problems = {f"classes ({name}, {type(base).__name__})": type(tuned) is not type(base)}
    for part in tuned.components.keys() & base.components.keys():
        left, right = tuned.components[part], base.components[part]
        if hasattr(left, "config") and part != "unet":
            problems[part] = _strip(left.config) != _strip(getattr(right, "config", {}))
        if isinstance(left, nn.Module) and isinstance(right, nn.Module):
            problems[f"weights of {part}"] = part != "unet" and not _equal(left, right)
    shapes = [{key: tensor.shape for key, tensor in pipeline.unet.state_dict().items()} for pipeline in (tuned, base)]
    problems["shapes of the U-Net"] = shapes[0] != shapes[1]
    if found := sorted(what for what, there in problems.items() if there):
        raise ExtrapolationError(
            f"two models that differ in {', '.join(found)} are not of one family: start both alike"
        )
    tuned.unet = Extrapolated(tuned.unet, base.unet, weight)
    return tuned


def _strip(config: Any) -> dict[str, Any]:
    """A configuration without notes of where it was read, and which version wrote it."""
    values = config if isinstance(config, dict) else config.to_dict()
    return {key: value for key, value in values.items() if not key.startswith("_") and key != "transformers_version"}


def _equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
