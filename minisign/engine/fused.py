"""The road of the kernels: a group's tensors together, in one pass over the memory.

This file decides which tensors can go there and says in numbers what is to be done. What it leaves, the
plain roads take.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from minisign import kernels
from minisign.engine.contract import RuleOptimizer
from minisign.engine.halves import take
from minisign.engine.lazy import sparse_rows
from minisign.engine.plan import Kept, Part, Plan
from minisign.engine.rounding import noise_of
from minisign.engine.rows import forget_rows, recorded_rows
from minisign.engine.words import WORDS, Group
from minisign.engine.work import Work, look, numbers_of
from minisign.kernels import cpp, triton
from minisign.kernels.nodes import DOUBLE, FLOAT
from minisign.kernels.program import Program, program
from minisign.kernels.table import TYPES, Call, Item, Launch, launches
from minisign.kernels.trace import Untraceable

Look: TypeAlias = Callable[[RuleOptimizer, Group], list[Work]]
_PROGRAMS: dict[Any, list[Program]] = {}
_KEYS = torch._C._dispatch_keys  # what torch chooses a tensor's functions by


def check(optimizer: RuleOptimizer, group: Group) -> None:
    """Raises RuntimeError where there is no back end, or the kernels do not know what the rule does."""
    for device in {p.device for p in group["params"]}:
        kernels.backend(group["fused"], device)
    part = Part(optimizer.rule, tuple(numbers_of(optimizer, group).items()), optimizer.per_tensor)
    _traced(optimizer, group, part)


def _traced(optimizer: RuleOptimizer, group: Group, part: Part) -> Program:
    try:
        return program_of(part, optimizer.has_step)
    except Untraceable as error:
        raise RuntimeError(f"fused={group['fused']!r}: {error}") from error


def program_of(part: Part, counts: bool) -> Program:
    """Made once for a rule, its words, and what it asked of its numbers."""
    numbers = {name: x for name, x in part.numbers if name not in part.own}
    scalars = dict.fromkeys(part.own, DOUBLE) | ({"step": DOUBLE} if counts else {})
    scalars |= {name: FLOAT for name, x in numbers.items() if isinstance(x, Tensor)}
    floats = {name: float(x) for name, x in numbers.items() if isinstance(x, (int, float))}
    words = {name: x for name, x in numbers.items() if name not in floats and name not in scalars}
    key = (part.rule, *floats, *words.items(), *scalars.items())
    for made in _PROGRAMS.setdefault(key, []):
        if made.is_for(floats):
            return made
    made = program(part.rule, floats | words, scalars)
    _PROGRAMS[key].append(made)
    return made


def text(optimizer: RuleOptimizer, device: str) -> str:
    """The kernel of an optimizer that has one parameter.

    Raises:
        ValueError: no such kernels. Untraceable: the kernels do not know what the rule does.
    """
    (group,) = optimizer.param_groups
    (p,) = group["params"]
    (work,) = look(optimizer, group, [(p, p.clone())])
    found = _item(optimizer, group, numbers_of(optimizer, group), work)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"kernels are for 'cpu' and 'cuda', got {device!r}")
    if found is None:
        raise ValueError(
            f"{type(optimizer).__name__} takes the plain road here: float64, and lazy rows that wait for "
            "the RMS of the whole matrix or whose absent rows decay, are not the kernels' matter"
        )
    part, item = found
    form = item.form(group["shrink"] is not None, group["stochastic_rounding"])
    return (cpp if device == "cpu" else triton).write(program_of(part, optimizer.has_step), form)


def prepare(optimizer: RuleOptimizer, group: Group, look: Look) -> tuple[list[Work], Plan]:
    """What ``look`` finds, if not all is as it was at the last step; and what the kernels are told. Raises
    what ``check`` does."""
    cache, works = _cache(optimizer, group), list[Work]()
    kept: Kept | None = cache.get("kept")
    plan = None if kept is None else kept.again(optimizer, group)
    if plan is None:
        works = look(optimizer, group)
        plan = _plan(optimizer, group, works)
        cache["kept"] = Kept(plan, optimizer, group) if plan.states else None
    programs = [_traced(optimizer, group, part) for part, _, _ in plan.jobs]
    for made, (_, launch, _) in zip(programs, plan.jobs, strict=True):
        _back_end(group, launch, cache).made(made, launch.form)
    return works, plan._replace(programs=programs)


def _cache(optimizer: RuleOptimizer, group: Group) -> dict[Any, Any]:
    """Of a group, for as long as that is the optimizer's."""
    caches = optimizer.cache("fused")
    if len(caches) > len(optimizer.param_groups):
        for gone in set(caches) - set(map(id, optimizer.param_groups)):
            del caches[gone]
    cache: dict[Any, Any] = caches.setdefault(id(group), {})
    return cache


def _back_end(group: Group, launch: Launch, cache: dict[Any, Any]) -> Any:
    which = group["fused"], launch.device
    if which not in cache:
        cache[which] = kernels.backend(*which)
    return cache[which]


def step(optimizer: RuleOptimizer, group: Group, plan: Plan) -> list[Work]:
    """One step on what the kernels can take; the others are returned."""
    cache, found_inf = _cache(optimizer, group), getattr(optimizer, "found_inf", None)
    for number, (made, (part, launch, _)) in enumerate(zip(plan.programs, plan.jobs, strict=True)):
        numbers = dict(part.numbers)
        lr = numbers.get("lr")
        call = Call(
            made.evaluate(**{name: numbers[name] for name in made.names}),
            lr if isinstance(lr, Tensor) else None,
            sign=-1.0 if group["maximize"] else 1.0,
            shrink=1.0 if group["shrink"] is None else group["shrink"],
            center=group["center"],
            grad_scale=getattr(optimizer, "grad_scale", None),
            found_inf=found_inf,
        )
        _back_end(group, launch, cache).step(made, launch, call, cache.setdefault(number, {}))
        launch.gradients.clear()
        if made.writes(made.p):
            increment_version(launch.params)  # else autograd would take the new weights for those of a loss
    if group["lazy"] == "ids":
        left = {id(work.parameter) for work in plan.left}
        for p in group["params"]:
            if p.grad is not None and id(p) not in left:
                forget_rows(p, unless=found_inf)
    return [] if found_inf is not None and plan.left and found_inf.item() else plan.left


def _plan(optimizer: RuleOptimizer, group: Group, works: list[Work]) -> Plan:
    numbers = numbers_of(optimizer, group)
    params: list[Tensor] = list(group["params"])
    places = {id(p): i for i, p in enumerate(params)}
    left: list[Work] = []
    parts: dict[Part, list[tuple[Item, int]]] = {}
    spans: list[tuple[int, int]] = []
    for p in params:
        if p.is_cuda and p.grad is None and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph must see all gradients, and the parameter of shape {tuple(p.shape)} has none"
            )
    # Of micro-batches, what is left of a momentum is a tensor's own; and what autograd, or a user, gives
    # in another form than a parameter's lies elsewhere at each step.
    reusable = len(works) == len(params) and group["accumulate"] == 1 and not group["release_grads"]
    for work in works:
        step, found = work.state.get("step"), _item(optimizer, group, numbers, work)
        if _overlap((work.p, *work.buffers, *([] if step is None else [step])), spans) or found is None:
            left.append(work)
            if group["stochastic_rounding"] and group["capturable"] and work.p.dtype == torch.bfloat16:
                raise RuntimeError(
                    "of what rounds at random only a kernel draws anew each time a CUDA graph runs, and "
                    f"none takes the parameter of shape {tuple(work.p.shape)}, strides {work.p.stride()}"
                )
        else:
            parts.setdefault(found[0], []).append((found[1], places[id(work.parameter)]))
            reusable &= work.p is work.parameter and work.g.layout == torch.strided
    guard = bool(works) and works[0].guard is not None and getattr(optimizer, "found_inf", None) is None
    jobs = [
        (part, launch, members)
        for part, pairs in parts.items()
        for launch, members in launches(pairs, guard, group["stochastic_rounding"])
    ]
    return Plan(jobs, left, [optimizer.state[p] for p in params] if reusable and not left else [])


def _item(optimizer: RuleOptimizer, group: Group, numbers: Group, work: Work) -> tuple[Part, Item] | None:
    """What a kernel needs for a parameter: what it has in common with others, and its line of a table; None
    where the kernels cannot take it."""
    p, g, parameter = work.p, work.g, work.parameter
    lazy = g.layout != torch.strided or bool(group["lazy"])
    words = {*optimizer.asks, *(x for x in numbers.values() if x in WORDS)}
    if lazy and (group["lazy_momentum"] != "freeze" or group["accumulate"] > 1 or "rms" in words):
        # Every row's momentum decays; rows of a cycle are remembered; rows would wait for the matrix.
        return None
    if g.layout != torch.strided and p.dim() < 2:
        return None  # its entries are listed, and it is one row
    by_rows, rows = lazy or ("row_rms" in words and work.rule is not take), None
    if g.layout != torch.strided:
        rows, g = sparse_rows(g)
    elif group["lazy"] == "ids":
        rows = recorded_rows(parameter)
    rounded = group["stochastic_rounding"] and p.dtype == torch.bfloat16
    if not _takes(p, g, work.buffers, by_rows) or (p is not parameter and rounded):
        return None  # a kernel's noise follows from the place in what it is given
    # What is the tensor's own goes into its line; the program has a word where that is a number.
    own = tuple(name for name in optimizer.per_tensor if name in work.numbers)
    shared = {name: numbers.get(name, x) for name, x in work.numbers.items() if name not in (*own, "step")}
    known = [work.numbers[x] for x in shared if shared[x] in WORDS and work.numbers[x] not in WORDS]
    return Part(work.rule, tuple(shared.items()), own), Item(
        p, g, work.buffers, work.state.get("step"),
        noise_of(group["seed"], optimizer.place_of(parameter)[2]) if rounded else 0, by_rows, rows,
        sought=lazy,
        known=known[0] if known else math.nan, own=tuple(float(work.numbers[name]) for name in own),
    )  # fmt: skip


def _overlap(written: Iterable[Tensor], spans: list[tuple[int, int]]) -> bool:
    """Whether memory that is to be written is also another tensor's, of those before: whoever comes later
    must step later. Adds it to ``spans``, which are in order and apart."""
    found = False
    for x in written:
        if x.numel():
            entries = 1 + sum((n - 1) * d for n, d in zip(x.shape, x.stride(), strict=True))
            start = x.data_ptr()
            end = start + entries * x.element_size()
            i, j = bisect_right(spans, start, key=itemgetter(1)), bisect_left(spans, end, key=itemgetter(0))
            if i < j:
                found, start, end = True, min(start, spans[i][0]), max(end, spans[j - 1][1])
            spans[i:j] = [(start, end)]
    return found


def _takes(p: Tensor, g: Tensor, buffers: Sequence[Tensor], by_rows: bool) -> bool:
    """Whether the kernels can step on these: dense, of one memory order, float32, bfloat16 or float16."""
    if p.dtype not in TYPES or g.dtype not in TYPES or g.device != p.device:
        return False
    # What is more than numbers in memory (a sign that is put off, zeros that are nowhere, a subclass).
    usual = _KEYS(torch.empty(0, device=p.device))
    if any(_KEYS(x) != usual for x in (p, g, *buffers)):
        return False
    if len({b.dtype for b in buffers}) > 1 or any(
        b.dtype not in TYPES or b.device != p.device for b in buffers
    ):
        return False
    if p.is_contiguous():
        return g.is_contiguous() and all(b.is_contiguous() for b in buffers)
    if by_rows or not torch.ops.aten.is_non_overlapping_and_dense(p):
        return False
    return all(x.stride() == p.stride() and x.shape == p.shape for x in (g, *buffers))
