"""A lazy step: rows that take part move as the rule says, the others keep their bits.

Which take part: those whose gradient is not all zero. A sparse gradient lists some, and where it is known
which were looked up (rows.py), the others are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minisign.engine import halves, roads, tried
from minisign.engine.rows import forget_rows, take_rows
from minisign.engine.shards import like_rows, local
from minisign.engine.words import rms
from minisign.engine.work import Work


def step_rows(work: Work, group: Mapping[str, Any]) -> None:
    """Moves the rows that take part."""
    index, g = moving_rows(work.parameter, work.g, group)
    words = ("rms",) if work.p.dim() > 1 else ("rms", "row_rms")  # of the whole; a vector is one row
    numbers = {name: rms(work.p) if x in words else x for name, x in work.numbers.items()}
    left, decays = [1.0] * len(work.buffers), group["lazy_momentum"] == "decay"
    if group["accumulate"] > 1:
        keep, last = numbers["keep"], halves.is_last(group)
        index, g, numbers["keep"] = rows_of_cycle(work.parameter, work.state, index, g, keep, last)
        left = [keep] if decays and last else left
    elif decays:
        left = tried.left_of_buffers(work.rule, len(work.buffers), numbers)
    roads.rows(work._replace(g=g, numbers=numbers), index, left)


def moving_rows(p: Tensor, g: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Indices [U], sorted, of the rows that a lazy or sparse step moves, and their gradient [U, …]."""
    if g.layout != torch.strided:
        if group["lazy"] == "ids":
            forget_rows(p)
        rows, values = sparse_rows(g)
    elif group["lazy"] == "ids":
        rows = take_rows(p)
        values = g[rows]
    else:
        rows = nonzero_rows(g)
        return rows, g[rows]
    keep = nonzero_rows(values)
    return rows[keep], values[keep]


def sparse_rows(g: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [U] of a sparse gradient, each once, and their values [U, …]."""
    # Duplicates must be added up before the sign: sign(a) + sign(b) is not sign(a + b). And in float32.
    if not g.is_coalesced() and g.dtype in (torch.bfloat16, torch.float16):
        g = g.float()
    g = g.coalesce()
    return g.indices()[0].contiguous(), g.values()


def nonzero_rows(g: Tensor) -> Tensor:
    """Indices of the rows of ``g`` [V, …] with an entry that is not zero (NaN is not zero)."""
    found = g.ne(0)
    return (found.flatten(1).any(1) if g.dim() > 1 else found).nonzero().squeeze(1)


def rows_of_cycle(
    p: Tensor, state: dict[str, Any], rows: Tensor, g: Tensor, keep: float, is_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their gradient, and what their momentum keeps at one of several micro-batches.

    A row's momentum decays when a cycle first touches it, and all rows of the cycle move at its end.
    """
    if "taken_rows" not in state:
        state["taken_rows"] = like_rows(p, (len(p),), torch.bool)
    taken = local(state["taken_rows"])
    before = taken.clone()
    taken[rows] = True
    if is_last:  # `rows` and `cycle` are sorted
        cycle = taken.nonzero().squeeze(1)
        sums = g.new_zeros((len(cycle), *p.shape[1:]))
        sums[torch.searchsorted(cycle, rows)] = g
        rows, g = cycle, sums
        taken.zero_()
    kept = torch.full((len(rows),), keep, dtype=g.dtype, device=g.device).masked_fill(before[rows], 1.0)
    return rows, g, kept.view(-1, *[1] * (p.dim() - 1))
