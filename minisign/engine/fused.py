"""The road of the kernels: a group's tensors together, in one pass over the memory.

This file decides which tensors can go there and says in numbers what is to be done. What it leaves, the
plain roads take. From one step to the next mostly nothing changes but where the gradients lie, so a
:class:`Plan` is kept, and looked over instead of made anew: with many small tensors it is Python that takes
the time.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minisign import kernels
from minisign.engine.contract import Owner
from minisign.engine.halves import take
from minisign.engine.lazy import sparse_rows
from minisign.engine.rounding import noise_of
from minisign.engine.rows import forget_rows, recorded_rows
from minisign.engine.words import WORDS, Rule
from minisign.engine.work import Group, Work, look, numbers_of
from minisign.kernels import cpp, triton
from minisign.kernels.program import Program, program
from minisign.kernels.table import TYPES, Call, Item, Launch, launches
from minisign.kernels.trace import DOUBLE, FLOAT, Untraceable

_PROGRAMS: dict[Any, list[Program]] = {}


class Part(NamedTuple):
    """What tensors that go together have in common: a rule, its numbers, and the names of those that are
    each tensor's own."""

    rule: Rule
    numbers: tuple[tuple[str, Any], ...]
    own: tuple[str, ...]


def check(optimizer: Owner, group: Group) -> None:
    """Raises RuntimeError where a back end is not to be had, or the kernels do not know what the rule
    does."""
    for device in {p.device for p in group["params"]}:
        kernels.backend(group["fused"], device)
    part = Part(optimizer.rule, tuple(numbers_of(optimizer, group).items()), optimizer.own)
    try:
        program_of(part, optimizer.counts)
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
        if made.answers(**floats) == tuple(made.trace.conditions.values()):
            return made
    made = program(part.rule, floats | words, scalars)
    _PROGRAMS[key].append(made)
    return made


def text(optimizer: Owner, device: str) -> str:
    """The kernel of an optimizer that has one parameter.

    Raises:
        ValueError: no such kernels. Untraceable: the kernels do not know what the rule does.
    """
    (group,), ((p,),) = optimizer.param_groups, (group["params"] for group in optimizer.param_groups)
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
    return (cpp if device == "cpu" else triton).write(program_of(part, optimizer.counts), form)


def kept(optimizer: Owner, group: Group) -> Plan | None:
    """The plan of the last step, if all is as it was."""
    plan: Plan | None = optimizer.cache(id(group)).get("plan")
    return plan if plan is not None and plan.fits(optimizer, group) else None


def step(optimizer: Owner, group: Group, found: Plan | list[Work]) -> list[Work]:
    """One step on what the kernels can take; the others are returned."""
    cache, numbers = optimizer.cache(id(group)), numbers_of(optimizer, group)
    plan = found if isinstance(found, Plan) else _plan(optimizer, group, numbers, found)
    cache["plan"] = plan if plan.reusable else None
    found_inf = getattr(optimizer, "found_inf", None)
    for number, (part, launch, members) in enumerate(plan.jobs):
        if isinstance(found, Plan):  # the same tensors, at a rate that may be another
            part = part._replace(numbers=tuple((name, numbers.get(name, x)) for name, x in part.numbers))
        _run(optimizer, group, part, launch, cache.setdefault(number, {}))
        for work in members if not plan.reusable else ():
            if work.taken is not None:
                work.state["taken"] = work.taken
            if group["lazy"] == "ids":
                forget_rows(work.parameter, unless=found_inf)
    return [] if found_inf is not None and plan.left and found_inf.item() else plan.left


def _run(optimizer: Owner, group: Group, part: Part, launch: Launch, cache: dict[Any, Any]) -> None:
    made, numbers = program_of(part, optimizer.counts), dict(part.numbers)
    lr = numbers.get("lr")
    call = Call(
        made.evaluate(**{name: numbers[name] for name in made.names}),
        lr if isinstance(lr, Tensor) else None,
        sign=-1.0 if group["maximize"] else 1.0,
        shrink=1.0 if group["shrink"] is None else group["shrink"],
        center=group["center"],
        grad_scale=getattr(optimizer, "grad_scale", None),
        found_inf=getattr(optimizer, "found_inf", None),
    )
    if "module" not in cache:
        cache["module"] = kernels.backend(group["fused"], launch.device)
    cache["module"].step(made, launch, call, cache)
    launch.gradients.clear()


@dataclass
class Plan:
    """The launches of a group, and what they were made from."""

    jobs: list[tuple[Part, Launch, Any]]  # the last: the works; of a reusable plan, which parameters
    left: list[Work]
    params: list[Tensor]
    reusable: bool  # without gradients of its own in it, for the next step
    made_for: tuple[Any, ...]
    state: list[Group]  # of all parameters of the optimizer
    own: list[Group]  # of the group's
    tensors: list[Any]  # what they hold
    places: list[Any]
    shapes: list[torch.Size]

    def fits(self, optimizer: Owner, group: Group) -> bool:
        """Whether nothing but gradients has moved; where they are now is in the launches then."""
        params, state = group["params"], optimizer.state
        if not self.reusable or self.made_for != _made_for(optimizer, group):
            return False
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        if len(state) != len(self.state) or not all(map(is_, state.values(), self.state)):
            return False
        tensors = _tensors(optimizer, self.own)
        if not all(map(is_, tensors, self.tensors)) or self.places != _places(params, tensors):
            return False
        gs = list(map(_GRADIENT, params))
        if type(None) in set(map(type, gs)) or set(map(_LAYOUT, gs)) != {torch.strided}:
            return False
        if self.shapes != list(map(_SHAPE, gs)) or not all(map(_CONTIGUOUS, gs)):
            return False
        for _, launch, members in self.jobs:
            mine = gs if len(members) == len(gs) else [gs[i] for i in members]
            if {TYPES.get(dtype) for dtype in set(map(_DTYPE, mine))} != {launch.form.types[1]}:
                return False
            launch.set_gradients(list(map(_PLACE, mine)))
        return True


# In C: of many small tensors, asking takes longer than moving.
_GRADIENT, _SHAPE, _LAYOUT, _DTYPE = map(attrgetter, ("grad", "shape", "layout", "dtype"))
_PLACE, _SIZE, _CONTIGUOUS = Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous


def _made_for(optimizer: Owner, group: Group) -> tuple[Any, ...]:
    """What decides who goes where, beside the tensors."""
    options = ("lazy", "lazy_momentum", "fused", "seed", "stochastic_rounding", "accumulate")
    words = (group[name] for name in optimizer.bounds if isinstance(group[name], (str, Tensor)))
    guard = group["shrink"] is not None, getattr(optimizer, "found_inf", None) is None
    return (*(group[name] for name in options), *words, *guard)


def _tensors(optimizer: Owner, states: list[Group]) -> list[Any]:
    """What the states hold, in the same order as long as they hold the same."""
    names = (*optimizer.buffers, "step") if "step" in states[0] else optimizer.buffers
    return [x for name in names for x in map(dict.get, states, repeat(name))]


def _places(params: list[Tensor], tensors: list[Any]) -> list[Any]:
    """Where they lie, and how large and in one piece those are that a user may replace in place."""
    if not all(issubclass(kind, Tensor) for kind in set(map(type, tensors))):
        return []  # a counter may be a plain number, until it is looked at
    return [*map(_PLACE, params), *map(_SIZE, params), *map(_CONTIGUOUS, params), *map(_PLACE, tensors)]


def _plan(optimizer: Owner, group: Group, numbers: Group, works: list[Work]) -> Plan:
    params: list[Tensor] = list(group["params"])
    left: list[Work] = []
    parts: dict[Part, list[tuple[Item, Work]]] = {}
    taken: list[tuple[int, int]] = []
    for p in params:
        if p.is_cuda and p.grad is None and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph must see all gradients, and the parameter of shape {tuple(p.shape)} has none"
            )
    for work in works:
        found = _item(optimizer, group, numbers, work)
        if found is None or _overlaps(found[1], taken):
            left.append(work)
        else:
            parts.setdefault(found[0], []).append((found[1], work))
    guard = bool(works) and works[0].guard is not None and getattr(optimizer, "found_inf", None) is None
    jobs: list[tuple[Part, Launch, Any]] = [
        (part, launch, members)
        for part, pairs in parts.items()
        for launch, members in launches(pairs, guard, group["stochastic_rounding"])
    ]
    # Of micro-batches, what is left of a momentum is a tensor's own; of lazy steps, the rows are.
    reusable = bool(params) and len(works) == len(params) and not left and group["accumulate"] == 1
    reusable = reusable and not group["release_grads"] and all(
        work.p is work.parameter and work.p.is_contiguous() and not item.by_rows
        for pairs in parts.values() for item, work in pairs
    )  # fmt: skip
    if not reusable:
        return Plan(jobs, left, params, False, (), [], [], [], [], [])
    index = {id(p): i for i, p in enumerate(params)}
    jobs = [(part, launch, [index[id(work.p)] for work in members]) for part, launch, members in jobs]
    own = [optimizer.state[p] for p in params]
    tensors, states = _tensors(optimizer, own), list(optimizer.state.values())
    places, shapes = _places(params, tensors), list(map(_SHAPE, params))
    return Plan(jobs, left, params, True, _made_for(optimizer, group), states, own, tensors, places, shapes)


def _item(optimizer: Owner, group: Group, numbers: Group, work: Work) -> tuple[Part, Item] | None:
    """What a kernel needs for a parameter: what it has in common with others, and its line of a table; None
    where the kernels cannot take it."""
    p, g, parameter = work.p, work.g, work.parameter
    lazy = g.layout != torch.strided or bool(group["lazy"])
    words = {x for x in numbers.values() if x in WORDS}
    if lazy and (group["lazy_momentum"] != "freeze" or group["accumulate"] > 1 or "rms" in words):
        # Every row's momentum decays; rows of a cycle are remembered; rows would wait for the matrix.
        return None
    by_rows, rows = lazy or ("row_rms" in words and p.dim() >= 2 and work.rule is not take), None
    if g.layout != torch.strided:
        rows, g = sparse_rows(p, g)
        if group["lazy"] == "grad":
            rows = torch.where(_moves(g), rows, -1)
    elif lazy:
        mask = recorded_rows(parameter) if group["lazy"] == "ids" else _moves(g)
        if mask.is_cpu:
            rows = mask.nonzero()[:, 0]
        else:  # without waiting for the device to say how many there are
            rows = torch.where(mask, torch.arange(len(mask), device=mask.device), -1)
    rounded = group["stochastic_rounding"] and p.dtype == torch.bfloat16
    if not _takes(p, g, work.buffers, by_rows) or (p is not parameter and rounded):
        return None  # a kernel's noise follows from the place in what it is given
    # What is the tensor's own goes into its line; the program has a word where that is a number.
    own = tuple(name for name in optimizer.own if name in work.numbers)
    shared = {name: numbers.get(name, x) for name, x in work.numbers.items() if name not in (*own, "step")}
    known = [work.numbers[x] for x in shared if shared[x] in WORDS and work.numbers[x] not in WORDS]
    return Part(work.rule, tuple(shared.items()), own), Item(
        p, g, work.buffers, work.state.get("step"),
        noise_of(group["seed"], optimizer.number(parameter)) if rounded else 0, by_rows, rows,
        known=known[0] if known else math.nan, own=tuple(float(work.numbers[name]) for name in own),
    )  # fmt: skip


def _overlaps(item: Item, taken: list[tuple[int, int]]) -> bool:
    """Whether what the item writes is also another's, of those before; notes what it writes."""
    own = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in (item.p, *item.buffers)]
    for start, end in own:
        i = bisect(taken, (start, end))
        if (i and taken[i - 1][1] > start) or (i < len(taken) and taken[i][0] < end):
            return True
        taken.insert(i, (start, end))
    return False


def _moves(g: Tensor) -> Tensor:
    """Mask [V] of the rows with an entry that is not zero (NaN is not)."""
    return torch.linalg.vector_norm(g, torch.inf, dim=tuple(range(1, g.dim()))) != 0


def _takes(p: Tensor, g: Tensor, buffers: Sequence[Tensor], by_rows: bool) -> bool:
    """Whether the kernels can step on these: dense, of one memory order, float32, bfloat16 or float16."""
    if p.dtype not in TYPES or g.dtype not in TYPES or g.device != p.device:
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
