"""The state of a run on disk, so that it can go on where it was killed: weights, averages, moments, log.

In: the weights that are trained, by name, and their AdamW. Knows nothing of what is trained or how.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dedup import manifest

CHECKPOINT, LOG = "checkpoint.safetensors", "train.jsonl"
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter

Weights = dict[str, nn.Parameter]  # those that are trained
Average = dict[str, Tensor]  # their moving averages, under the same names


def save_checkpoint(
    path: Path,
    step: int,
    weights: Weights,
    average: Average,
    optimizer: torch.optim.Optimizer,
    others: Mapping[str, Tensor],
) -> None:
    """Everything that the next step depends on, in one file: on disk is either the old state or the new."""
    tensors = {f"others/{name}": tensor for name, tensor in others.items()}
    updates = 0  # steps that changed the weights
    for name, weight in weights.items():
        kept = {"unet": weight.detach(), "average": average[name]}
        kept |= {moment: optimizer.state[weight][moment] for moment in MOMENTS}
        tensors |= {f"{part}/{name}": tensor.contiguous() for part, tensor in kept.items()}
        updates = int(optimizer.state[weight]["step"])
    told = {"step": json.dumps([step, updates])}  # one entry: safetensors writes several in any order
    manifest.write_atomic(path, lambda temporary: save_file(tensors, temporary, told))


@torch.no_grad()
def load_checkpoint(
    path: Path,
    weights: Weights,
    average: Average,
    optimizer: torch.optim.Optimizer,
    others: Mapping[str, Tensor],
) -> int:
    """Put the saved state into place and return the number of steps done; 0 without a checkpoint."""
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as saved:
        step, updates = json.loads(saved.metadata()["step"])
        for name, tensor in others.items():
            tensor.copy_(saved.get_tensor(f"others/{name}"))
        for name, weight in weights.items():
            weight.copy_(saved.get_tensor(f"unet/{name}"))
            average[name].copy_(saved.get_tensor(f"average/{name}"))
            # In the weight's own memory format: the fused optimizer walks through both side by side.
            moments = {m: torch.empty_like(weight).copy_(saved.get_tensor(f"{m}/{name}")) for m in MOMENTS}
            count = torch.tensor(float(updates), device=weight.device)
            optimizer.state[weight] = {"step": count, **moments}
    return step


def open_log(path: Path, start: int) -> TextIO:
    """train.jsonl, one line a step, cut back to the steps that the checkpoint knows."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    manifest.write_text(path, "".join(lines[:start]))
    return path.open("a", encoding="utf-8")


def count_dropped(path: Path, rows: int, steps: int) -> np.ndarray:
    """int64 (N,): how often the loss of each row did not count in the first steps, by the log."""
    lines = path.read_text(encoding="utf-8").splitlines()[:steps]
    dropped = np.array([row for line in lines for row in json.loads(line)["dropped"]], dtype=np.int64)
    return np.bincount(dropped, minlength=rows)
