"""The processes of a run, whoever started them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``values`` over the processes, the same on all; collective."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values = values / self.world_size
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process; collective."""
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def broadcast(self, value: Any) -> Any:
        """``value`` of the main process; collective."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers (BatchNorm statistics) of the main one; collective."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


@contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """Join the process group that torchrun, submitit or Ray prepared; alone if there is none.

    A group that already exists (Ray Train) is used and left open; otherwise the environment
    variables RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* say where to meet (torchrun).
    """
    own_device = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
    existing = dist.is_available() and dist.is_initialized()
    join = not existing and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if join:
        dist.init_process_group("nccl" if own_device.type == "cuda" else "gloo")
    try:
        if existing or join:
            yield Processes(dist.get_rank(), dist.get_world_size(), own_device)
        else:
            yield Processes(0, 1, own_device)
    finally:
        if join:
            dist.destroy_process_group()


def choose_device(device: str, local_rank: int) -> torch.device:
    """Device of this process; "auto" and "cuda" give process n of a machine its n-th GPU.

    Raises:
        ValueError: there is no such device.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"the device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if chosen.index is None:
            chosen = torch.device("cuda", local_rank)
        count = torch.cuda.device_count()
        if chosen.index >= count:
            raise ValueError(
                f"execution.device {device!r} for local process {local_rank} needs GPU "
                f"{chosen.index}, this machine has {count}; start fewer processes or use 'cpu'"
            )
    return chosen
