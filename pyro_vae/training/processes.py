"""Messages between the processes of a training, if torch.distributed runs several of them."""

from typing import Any

import torch
from torch import distributed


def count() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if _are_several() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return distributed.get_rank() if _are_several() else 0


def gathered(value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    values = [value] * count()
    if _are_several():
        distributed.all_gather_object(values, value)
    return values


def any_of(value: bool) -> bool:
    """Return whether a value is true in any process."""
    if not _are_several():
        return value
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    flag = torch.tensor(int(value), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


def _are_several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
