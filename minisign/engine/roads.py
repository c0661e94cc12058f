"""How a rule gets to a tensor: each of the roads ends at the same function of p, g and the buffers.

    one          a tensor
    together     a list that acts as a tensor, for each device and dtype
    rows         lazy or sparse gradients: the rows that take part are gathered, and written back; every other
                 row keeps its bits

Arithmetic is float32 or float64: what is narrower is widened first, and rounded once at the end. The road of the
kernels is in fused.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from minisign.engine.lists import Tensors
from minisign.engine.rounding import Noise

Rule: TypeAlias = Callable[..., None]
WIDE = {torch.float32, torch.float64}  # what arithmetic is done in


class Guard(NamedTuple):
    """Where a gradient is not finite, buffers stay and θ ← (θ − center) shrink + center."""

    shrink: float
    center: float

    def shrunk(self, p: Tensor) -> Tensor:
        return (p - self.center).mul_(self.shrink).add_(self.center)


class Work(NamedTuple):
    """One parameter in a step, on this process."""

    rule: Rule
    p: Tensor
    g: Tensor  # as p, or as its rows that are given
    buffers: list[Tensor]  # as p
    numbers: Mapping[str, Any]
    noise: Noise | None  # None: what is widened is rounded to the nearest
    guard: Guard | None


def one(work: Work) -> None:
    tensors = [work.p, work.g, *work.buffers]
    wide = _wide(tensors)
    if all(x.dtype == wide for x in tensors):
        _carry_out(work, tensors)
    else:
        values = [x.to(wide) for x in tensors]
        _carry_out(work, values)
        _write_back(work, values)


def together(works: Sequence[Work]) -> None:
    """All at once; torch's multi-tensor kernels want one device and dtype each, and a rule one set of numbers."""
    kinds: dict[Any, list[Work]] = {}
    for work in _without_bad(works):
        dtypes = (x.dtype for x in (work.p, work.g, *work.buffers))
        numbers = tuple(id(x) if isinstance(x, Tensor) else x for x in work.numbers.values())
        kinds.setdefault((work.rule, work.p.device, *dtypes, numbers), []).append(work)
    for members in kinds.values():
        columns = list(zip(*([x.p, x.g, *x.buffers] for x in members), strict=True))
        wide = _wide([column[0] for column in columns])
        values = [Tensors([x.to(wide) for x in column]) for column in columns]  # themselves, if they are wide
        members[0].rule(*values, **members[0].numbers)
        for i, work in enumerate(members):
            _write_back(work, [x.tensors[i] for x in values])


def rows(work: Work, index: Tensor, left: Sequence[float]) -> None:
    """Those at ``index`` [U] only, each once; of the others' buffers so much is ``left``."""
    wide = _wide([work.p, work.g, *work.buffers])
    mine = [x[index].to(wide) for x in (work.p, *work.buffers)]
    _carry_out(work, [mine[0], work.g.to(wide), *mine[1:]])
    for b, rate in zip(work.buffers, left, strict=True):
        if rate != 1:
            b.mul_(rate)
    for x, new in zip((work.p, *work.buffers), mine, strict=True):
        rounded = work.noise.rounded(new, index) if work.noise and x is work.p else new.to(x.dtype)
        x.index_copy_(0, index, rounded)


def _carry_out(work: Work, tensors: list[Tensor]) -> None:
    """The rule on tensors that are all float32 or all float64."""
    p, g, *buffers = tensors
    before: list[Tensor] = []
    if work.guard is not None:
        if p.is_cpu and not all_finite(g, buffers[0]):
            p.copy_(work.guard.shrunk(p))
            return
        if not p.is_cpu:  # the same without waiting for the device to say whether g is finite
            before = [work.guard.shrunk(p), *(b.clone() for b in buffers)]
    if any(isinstance(x, Tensor) or x == "row_rms" or (x == "rms" and not p.is_cpu) for x in work.numbers.values()):
        work.rule(*(Tensors([x]) for x in tensors), **work.numbers)
    else:
        work.rule(*tensors, **work.numbers)
    if before:
        finite = torch.isfinite(g).all()
        for x, old in zip((p, *buffers), before, strict=True):
            x.copy_(torch.where(finite, x, old))


def _write_back(work: Work, values: Sequence[Tensor]) -> None:
    """Where they are not the tensors themselves."""
    for x, value in zip((work.p, work.g, *work.buffers), values, strict=True):
        if x is not value and x is not work.g:
            x.copy_(work.noise.rounded(value, None) if work.noise and x is work.p else value)


def _without_bad(works: Sequence[Work]) -> Sequence[Work]:
    """Shrinks where a guard finds no finite gradient; waits for the device once. The others."""
    guarded = [work for work in works if work.guard is not None]
    if not guarded:
        return works
    # A norm that is finite has finite parts; one that is not may merely have overflowed.
    norms = torch.stack([norm.double() for norm in torch._foreach_norm([x.g for x in guarded])]).tolist()
    bad = {
        id(work)
        for work, norm in zip(guarded, norms, strict=True)
        if not math.isfinite(norm) and not torch.isfinite(work.g).all()
    }
    for work in guarded:
        if id(work) in bad and work.guard is not None:
            wide = work.p.to(_wide([work.p]))
            _write_back(work, [work.guard.shrunk(wide), work.g, *work.buffers])
    return [work for work in works if id(work) not in bad]


def all_finite(g: Tensor, m: Tensor) -> bool:
    """Whether no entry of ``g`` is NaN or ±Inf, given that ``m`` is finite.

    Their inner product is finite only if g is. It costs a tenth of ``isfinite(g).all()`` and brings both
    into the cache for the rule.
    """
    return math.isfinite(torch.dot(m.flatten(), g.flatten()).item()) or bool(torch.isfinite(g).all())


def _wide(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
