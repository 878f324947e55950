"""Several processes that train one model, as `accelerate launch` or `torchrun` start them. Usually there is one.

All of them read the same data and draw the same random numbers. Each computes its share of every batch, and the
gradients are added up, so that all keep equal weights. Only the first one writes. Knows nothing of what is trained.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from defense.model import pick_device

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Processes:
    """How many there are, and which of them this one is."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        return self.rank == 0


ALONE = Processes()


def join_processes(device: str) -> Processes:
    """Find the others, if there are any. Raises ModelError."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(device=pick_device(device))
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    return Processes(state.process_index, state.num_processes, state.device)


def add_up(tensors: Iterable[Tensor], processes: Processes) -> None:
    """Replace each tensor by the sum over all processes."""
    if processes.size == 1:
        return
    for tensor in tensors:
        whole = tensor.contiguous()  # in channels_last it is not
        torch.distributed.all_reduce(whole)
        tensor.copy_(whole)
