"""How a rule gets to a tensor: each of the roads ends at the same function of p, g and the buffers.

    apart, one   a tensor
    together     a list that acts as a tensor, for each device and dtype
    rows         lazy or sparse gradients: the rows that take part are gathered and written back, the
                 others keep their bits

Arithmetic is float32 or float64: what is narrower is widened first, and rounded once at the end. The road
of the kernels is in fused.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from minisign.engine.lists import Tensors
from minisign.engine.work import Work

WIDE = {torch.float32, torch.float64}  # what arithmetic is done in
NUMBERS = {float, int}
_DTYPE = attrgetter("dtype")


def apart(works: Iterable[Work]) -> None:
    """Each by itself."""
    due, before, are_scalars = [], None, False
    for work in works:
        if work.numbers is not before:  # the same for all that have none of their own
            before, values = work.numbers, work.numbers.values()
            are_scalars = Tensor not in set(map(type, values)) and "row_rms" not in values
        p, tensors = work.p, (work.p, work.g, *work.buffers)
        is_usual = are_scalars and p.is_cpu and p.dtype in WIDE and len(set(map(_DTYPE, tensors))) == 1
        due.append((work, tensors if is_usual else ()))
    # As ``one`` does it, and nothing else: tensors push what Python needs out of the cache.
    for work, tensors in due:
        if not tensors:
            one(work)
        elif work.guard is None or all_finite(*tensors[1:]):  # who has a guard has one buffer (halves.py)
            work.rule(*tensors, **work.numbers)
        else:
            work.p.copy_(work.guard.shrunk(work.p))


def one(work: Work, index: Tensor | None = None) -> None:
    """``index`` [U]: of a work on rows that were gathered, which they are."""
    rule, p, g, buffers, numbers, guard = work.rule, work.p, work.g, work.buffers, work.numbers, work.guard
    narrow = len(set(map(_DTYPE, (p, g, *buffers)))) > 1 or p.dtype not in WIDE
    if narrow:
        wide = _wide((p, g, *buffers))
        p, g, *buffers = (x.to(wide) for x in (p, g, *buffers))
    before: list[Tensor] = []
    if guard is not None and p.is_cpu and not all_finite(g, buffers[0]):
        p.copy_(guard.shrunk(p))
    else:
        if guard is not None and not p.is_cpu:  # without waiting for the device to say what g is
            before = [guard.shrunk(p), *(b.clone() for b in buffers)]
        if _has_a_tensor_for_a_factor(numbers, p):
            rule(*(Tensors([x]) for x in (p, g, *buffers)), **numbers)
        else:
            rule(p, g, *buffers, **numbers)
    if before:
        finite = torch.isfinite(g).all()
        for x, old in zip((p, *buffers), before, strict=True):
            x.copy_(torch.where(finite, x, old))
    if narrow:
        _write_back(work, [p, *buffers], index)


def _has_a_tensor_for_a_factor(numbers: Mapping[str, Any], p: Tensor) -> bool:
    """Whether a rule's ``alpha=`` will be one, which lists take; a tensor's methods read it as a number,
    for which a GPU has to be waited for."""
    kinds = set(map(type, numbers.values()))
    return not kinds <= NUMBERS and (Tensor in kinds or "row_rms" in numbers.values() or not p.is_cpu)


def together(works: Sequence[Work]) -> None:
    """All at once, those of one device, dtype and set of numbers each."""
    kinds: dict[Any, list[Work]] = {}
    for work in _without_bad(works):
        dtypes = map(_DTYPE, (work.p, work.g, *work.buffers))
        numbers = tuple(id(x) if isinstance(x, Tensor) else x for x in work.numbers.values())
        kinds.setdefault((work.rule, work.p.device, *dtypes, numbers), []).append(work)
    for members in kinds.values():
        columns = list(zip(*([x.p, x.g, *x.buffers] for x in members), strict=True))
        wide = _wide([column[0] for column in columns])
        values = [Tensors([x.to(wide) for x in column]) for column in columns]  # they, if they are wide
        members[0].rule(*values, **members[0].numbers)
        for i, work in enumerate(members):
            _write_back(work, [x.tensors[i] for j, x in enumerate(values) if j != 1], None)


def rows(work: Work, index: Tensor, left: Sequence[float]) -> None:
    """Those at ``index`` [U] only, each once, with ``work.g`` [U, …]; ``left``: of the others' buffers."""
    mine = [x[index] for x in (work.p, *work.buffers)]
    for b, rate in zip(work.buffers, left, strict=True):
        if rate != 1:
            b.mul_(rate)
    one(work._replace(p=mine[0], buffers=mine[1:]), index)
    for x, new in zip((work.p, *work.buffers), mine, strict=True):
        x.index_copy_(0, index, new)


def _write_back(work: Work, values: Sequence[Tensor], index: Tensor | None) -> None:
    """What was computed with wider tensors."""
    for x, value in zip((work.p, *work.buffers), values, strict=True):
        if x is not value:
            x.copy_(work.noise.rounded(value, index) if work.noise and x is work.p else value)


def _without_bad(works: Sequence[Work]) -> Sequence[Work]:
    """Shrinks where a guard finds no finite gradient; waits for the device once. The others."""
    guarded = [work for work in works if work.guard is not None]
    if not guarded:
        return works
    # A norm that is finite has finite parts; one that is not may merely have overflowed.
    norms = torch._foreach_norm([work.g for work in guarded])
    device = norms[0].device
    sizes = torch.stack([norm.to(device, torch.float64) for norm in norms]).tolist()
    bad = {
        id(work)
        for work, size in zip(guarded, sizes, strict=True)
        if not math.isfinite(size) and not torch.isfinite(work.g).all()
    }
    for work in guarded:
        if id(work) in bad and work.guard is not None:
            wide = work.p.to(_wide([work.p]))
            _write_back(work, [work.guard.shrunk(wide), *work.buffers], None)
    return [work for work in works if id(work) not in bad]


def all_finite(g: Tensor, m: Tensor) -> bool:
    """Whether no entry of ``g`` is NaN or ±Inf, given that ``m`` is finite.

    Their inner product is finite only if g is. It costs a tenth of ``isfinite(g).all()`` and brings both
    into the cache for the rule.
    """
    return math.isfinite(torch.dot(m.flatten(), g.flatten()).item()) or bool(torch.isfinite(g).all())


def _wide(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
