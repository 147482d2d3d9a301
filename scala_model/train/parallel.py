"""One process a GPU, started by ``torchrun``: each sees its share of every batch and all hold the same weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process's place among ``world``; the default is one that is alone."""

    rank: int = 0
    world: int = 1

    def average(self, tensors: list[Tensor]) -> list[Tensor]:
        """The mean over all processes of each tensor (of one type, same shapes everywhere), by one exchange.

        DistributedDataParallel would exchange in every backward pass; a step has four of them and needs one exchange.
        """
        if self.world == 1:
            return tensors
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = torch.split(flat / self.world, [tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


@contextmanager
def processes(device: str) -> Iterator[tuple[Processes, torch.device]]:
    """Join the others that ``torchrun`` started, if it did, and take this process's device of the given type."""
    if not dist.is_torchelastic_launched():
        yield Processes(), torch.device(device)
        return
    place = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()), place
    finally:
        dist.destroy_process_group()
