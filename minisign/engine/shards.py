"""Parameters that lie in pieces on several processes: ``fully_shard`` makes a DTensor of each.

A step is a matter of each entry, so each process takes it on its own rows. What a whole tensor must be
asked for (is its gradient finite, how large are its weights) is added up over the processes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a DTensor; looked at this way, torch.distributed need not be there."""
    return hasattr(x, "placements")


def local(x: Any) -> Tensor:
    """The rows of a tensor that this process has, sharing their memory; a tensor that is whole, itself."""
    piece: Tensor = x.to_local() if is_sharded(x) else x
    return piece


def whole(x: Any) -> Tensor:
    """A tensor put together from its pieces; all processes must ask for it."""
    tensor: Tensor = x.full_tensor() if is_sharded(x) else x
    return tensor


def check_rows(name: str, p: Any) -> None:
    """Raises:
    ValueError: a parameter that is cut otherwise than between rows, or more than once.
    """
    if is_sharded(p):
        cuts = [place for place in p.placements if not place.is_replicate()]
        if len(cuts) > 1 or any(type(place).__name__ != "Shard" or place.dim != 0 for place in cuts):
            raise ValueError(
                f"{name} of shape {tuple(p.shape)} is placed as {tuple(p.placements)}: sharded parameters "
                "must be cut between rows (Shard(0)), once, as fully_shard does"
            )


def is_made_by_zero() -> bool:
    """Whether an optimizer is being made for the part of the parameters that torch's
    ZeroRedundancyOptimizer gives to this process."""
    # Only its module is read: a look at its variables would keep them alive.
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") != ZERO:
        frame = frame.f_back
    return frame is not None


def first_row(p: Any) -> int:
    """The place of this process's first row in the whole tensor."""
    if not is_sharded(p):
        return 0
    for i, place in enumerate(p.placements):
        if place.is_shard():
            size = -(-p.shape[0] // p.device_mesh.size(i))
            return min(int(p.device_mesh.get_local_rank(i)) * size, int(p.shape[0]))
    return 0


def add_up(p: Any, values: Tensor, how: Any = None) -> None:
    """Adds numbers up over the processes that hold the pieces of ``p``, in place; or ``how`` of a
    ``torch.distributed.ReduceOp``."""
    how = torch.distributed.ReduceOp.SUM if how is None else how
    for i, place in enumerate(p.placements):
        if place.is_shard():
            torch.distributed.all_reduce(values, how, group=p.device_mesh.get_group(i))


def groups_of(p: Any) -> list[Any]:
    """The process groups over which a sharded parameter's gradient was averaged."""
    return list(p.device_mesh.get_all_groups())


def like_rows(p: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros of a ``shape`` with as many rows as ``p``, cut between the same rows."""
    whole = tuple(shape)
    if not is_sharded(p):
        return torch.zeros(whole, dtype=dtype, device=p.device)
    from torch.distributed.tensor import DTensor

    piece = torch.zeros((len(local(p)), *whole[1:]), dtype=dtype, device=p.device)
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(
        piece, p.device_mesh, p.placements, run_check=False, shape=torch.Size(whole), stride=stride
    )


def ask_all(optimizer: Any, group: dict[str, Any]) -> None:
    """Of parameters in pieces: is the whole gradient finite, and how large is the whole tensor; in one
    exchange for all of them."""
    params = [p for p in group["params"] if is_sharded(p) and p.grad is not None]
    sized = group["micro_step"] + 1 >= group["accumulate"] and "rms" in group.values()
    guarded = group["shrink"] is not None
    if not params or not (guarded or sized):
        return
    pieces = [(local(p), local(p.grad)) for p in params]
    found = torch.zeros(2, len(params), dtype=torch.float64, device=params[0].device)
    for i, (x, g) in enumerate(pieces):
        if guarded:
            found[0, i] = ~torch.isfinite(g).all()
        if sized:
            found[1, i] = torch.linalg.vector_norm(x, dtype=torch.float64).square()
    add_up(params[0], found)
    sizes = optimizer.cache("whole rms")
    for p, (_, g), is_bad, square in zip(params, pieces, *found.tolist(), strict=True):
        # Not finite elsewhere: then nor here, where it takes part in the step.
        if is_bad:
            g[g.ne(0).flatten(1).any(1) if group["lazy"] == "grad" else ...] = math.nan
        sizes[p] = math.sqrt(square / max(p.numel(), 1)) or 1.0
