"""Several processes that train one model: started by torchrun, held together by torch's own engines.

    torchrun --nproc-per-node 2 -m minisign.cli train --parallel ddp …

Each process takes its part of every batch. ``ddp`` (DistributedDataParallel) keeps the whole model on each
and averages the gradients; ``fsdp`` (fully_shard) gives each process its rows of every tensor, and so of
the optimizer's state. Either way a step is the one that a single process would make on the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

ENGINES = ("ddp", "fsdp")
PATIENCE = timedelta(minutes=10)  # how long a process waits for the others before it gives up


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Attributes:
        engine: ``"ddp"``, ``"fsdp"``, or None for a single process.
        rank, size: which of how many processes this is.
    """

    engine: str | None = None
    rank: int = 0
    size: int = 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """What the forward pass is to be called on; with ``"fsdp"`` the model itself, whose parameters are
        pieces from now on."""
        if self.engine == "ddp":
            device = next(model.parameters()).device
            ids = [device.index] if device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(model, device_ids=ids)
        if self.engine == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(next(model.parameters()).device.type, (self.size,))
            for block in getattr(model, "blocks", ()):
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model

    def share(self, windows: np.ndarray) -> tuple[np.ndarray, float]:
        """This process's part of a batch [B, …], and what its mean loss counts for.

        Gradients are averaged over processes, so a process with more windows than others counts for more:
        by its share of the batch times the number of processes.
        """
        part = np.array_split(windows, self.size)[self.rank]
        return part, len(part) * self.size / len(windows)

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.engine is not None:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is true on one process."""
        return (
            flag if self.engine is None else bool(self.add_up(torch.tensor(float(flag), device=_device())))
        )

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)

    def agree(self, value: Any) -> Any:
        """What the first process says."""
        said = [value]
        if self.engine is not None:
            dist.broadcast_object_list(said)
        return said[0]


ALONE = World()


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def pick_device(name: str) -> torch.device:
    """``"auto"`` is the GPU if there is one.

    Raises:
        ValueError: ``"cuda"`` where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: choose from auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no CUDA GPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def joined(engine: str | None, device: str) -> Iterator[tuple[World, torch.device]]:
    """The processes that torchrun started, as long as the context lasts, and this one's device.

    Args:
        engine: one of ``ENGINES``; None for a process that is alone.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``; of several GPUs each process takes its own.

    Raises:
        ValueError: an unknown engine or device, an engine without torchrun, or the other way round.
    """
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"unknown parallel {engine!r}: choose from {', '.join(ENGINES)}")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if engine is None:
        if size > 1:
            raise ValueError(
                f"{size} processes were started: say how they work together, --parallel ddp or fsdp"
            )
        yield ALONE, pick_device(device)
        return
    if "RANK" not in os.environ:
        raise ValueError(
            f"--parallel {engine} needs torchrun: torchrun --nproc-per-node 2 -m minisign.cli train "
            f"--parallel {engine} …"
        )
    mine = pick_device(device)
    if mine.type == "cuda":
        mine = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(mine)
    dist.init_process_group("nccl" if mine.type == "cuda" else "gloo", timeout=PATIENCE)
    yield World(engine, dist.get_rank(), dist.get_world_size()), mine
    # Not after an error: it would wait for the others, who wait for this one. They see it end.
    dist.destroy_process_group()


def mean_over_processes(x: Tensor) -> Tensor:
    """Mean of rows [n, D] over all of them on all processes that train together [D], differentiable."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x.mean(0)
    total: Tensor = _Sum.apply(x.sum(0))
    count = x.new_tensor(float(len(x)))
    dist.all_reduce(count)
    return total / count


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total
