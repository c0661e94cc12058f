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
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from minisign import kernels
from minisign.engine.halves import move
from minisign.engine.roads import Rule
from minisign.engine.rounding import noise_of
from minisign.engine.rows import forget_rows, recorded_rows, sparse_rows
from minisign.engine.shards import is_sharded, local
from minisign.engine.words import WORDS
from minisign.kernels import cpp, triton
from minisign.kernels.table import TYPES, Call, Item, Launch, launches
from minisign.kernels.trace import DOUBLE, FLOAT, Program, Untraceable, trace

if TYPE_CHECKING:
    from minisign.engine.optimizer import Group, Optimizer

_PROGRAMS: dict[Any, list[Program]] = {}


class Part(NamedTuple):
    """What tensors that go together have in common: a rule, its numbers, and the names of those that are each
    tensor's own."""

    rule: Rule
    numbers: tuple[tuple[str, Any], ...]
    own: tuple[str, ...]


def check(optimizer: Optimizer, group: Group) -> None:
    """Raises RuntimeError where a back end is not to be had, or the kernels do not know what the rule does."""
    for device in {p.device for p in group["params"]}:
        kernels.backend(group["fused"], device)
    numbers = optimizer.numbers(group)
    try:
        program_of(Part(type(optimizer).rule, tuple(numbers.items()), optimizer.own), optimizer.counts)
    except Untraceable as error:
        raise RuntimeError(f"fused={group['fused']!r}: {error}") from error


def program_of(part: Part, counts: bool) -> Program:
    """Made once for a rule, its words, and what it asked of its numbers."""
    numbers = {name: x for name, x in part.numbers if name not in part.own}
    scalars = {name: DOUBLE for name in part.own} | ({"step": DOUBLE} if counts else {})
    scalars |= {name: FLOAT for name, x in numbers.items() if isinstance(x, Tensor)}
    floats = {name: float(x) for name, x in numbers.items() if isinstance(x, (int, float))}
    words = {name: x for name, x in numbers.items() if name not in floats and name not in scalars}
    key = (part.rule, *floats, *words.items(), *scalars.items())
    for made in _PROGRAMS.setdefault(key, []):
        if made.answers(**floats) == tuple(made.trace.conditions.values()):
            return made
    made = trace(part.rule, floats | words, scalars)
    _PROGRAMS[key].append(made)
    return made


def text(optimizer: Optimizer, group: Group, device: str) -> str:
    """The kernel for a parameter of a group.

    Raises:
        ValueError: another device than "cpu" and "cuda". Untraceable: the kernels do not know what the rule does.
    """
    (p,) = group["params"]
    item = _item(optimizer, p, p.clone(), group)
    if item is None or device not in ("cpu", "cuda"):
        raise ValueError(f"there are kernels for 'cpu' and 'cuda', of float32, bfloat16 and float16; got {device!r}, {p.dtype}")
    numbers = optimizer.numbers(group)
    part, item = _part(optimizer, type(optimizer).rule, {**numbers, **optimizer.own_numbers(p, group)}, numbers, item)
    form = item.form(group["shrink"] is not None, group["stochastic_rounding"])
    return (cpp if device == "cpu" else triton).write(program_of(part, optimizer.counts), form)


def step(optimizer: Optimizer, group: Group) -> list[Tensor]:
    """One step on the parameters of a group that the kernels can take; the others are returned."""
    cache = optimizer.cache(id(group))
    numbers = optimizer.numbers(group)
    plan: Plan = cache.get("plan") or _plan(optimizer, group, numbers)
    cache["plan"] = plan
    found_inf = getattr(optimizer, "found_inf", None)
    for number, (part, launch, members) in enumerate(plan.jobs):
        if plan.reusable:  # the same tensors, at a rate that may be another
            part = part._replace(numbers=tuple((name, numbers.get(name, x)) for name, x in part.numbers))
        _run(optimizer, group, part, launch, cache.setdefault(number, {}))
        if group["lazy"] == "ids":
            for i in members:
                forget_rows(plan.params[i], unless=found_inf)
    if plan.left and found_inf is not None and found_inf.item():
        return []
    return plan.left


def keeps_plan(optimizer: Optimizer, group: Group) -> bool:
    """Whether all is as it was at the last step; else the plan for it is forgotten."""
    cache = optimizer.cache(id(group))
    plan: Plan | None = cache.get("plan") if group["fused"] else None
    if plan is not None and plan.fits(optimizer, group):
        return True
    cache.pop("plan", None)
    return False


def move_all(optimizer: Optimizer, params: Sequence[Tensor], group: Group) -> list[Tensor]:
    """θ moves by a momentum that has its gradients already; returns what is left to do."""
    numbers, cache = optimizer.numbers(group), optimizer.cache(("move", id(group)))
    left, parts = [], {}
    for p in params:
        item = _item(optimizer, p, p.detach(), group)  # p in place of a gradient that is gone, and not read
        if item is None:
            left.append(p)
        else:
            mine = {**numbers, **optimizer.own_numbers(p, group)}
            part, item = _part(optimizer, move(type(optimizer).rule), mine, numbers, item)
            parts.setdefault(part, []).append(item)
    for part, items in parts.items():
        for number, (launch, _) in enumerate(launches(items, False, group["stochastic_rounding"])):
            _run(optimizer, group, part, launch, cache.setdefault((part, number), {}))
    return left


def _run(optimizer: Optimizer, group: Group, part: Part, launch: Launch, cache: dict[Any, Any]) -> None:
    program = program_of(part, optimizer.counts)
    numbers = dict(part.numbers)
    lr = numbers.get("lr")
    guard = optimizer.guard(group)
    call = Call(
        program.evaluate(**{name: numbers[name] for name in program.names}),
        lr if isinstance(lr, Tensor) else None,
        sign=-1.0 if group["maximize"] else 1.0,
        shrink=1.0 if guard is None else guard.shrink,
        center=group["center"],
        grad_scale=getattr(optimizer, "grad_scale", None),
        found_inf=getattr(optimizer, "found_inf", None),
    )
    kernels.backend(group["fused"], launch.device).step(program, launch, call, cache)
    launch.gradients.clear()


@dataclass
class Plan:
    """The launches of a group, and what they were made from."""

    jobs: list[tuple[Part, Launch, list[int]]]  # the last: which of the group's parameters
    left: list[Tensor]
    params: list[Tensor]
    sharded: bool
    reusable: bool
    made_for: tuple[Any, ...]
    state: list[Any]
    places: list[Any]

    def fits(self, optimizer: Optimizer, group: Group) -> bool:
        """Whether nothing but gradients has moved; where they are now is in the launches then."""
        params, state = group["params"], optimizer.state
        if not self.reusable or self.made_for != _made_for(optimizer, group):
            return False
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        if len(state) != len(self.state) or not all(map(is_, state.values(), self.state)):
            return False
        if self.places != _places(optimizer, group):
            return False
        for _, launch, members in self.jobs:
            gs = [params[i].grad for i in members]
            if self.sharded:
                gs = [g if g is None else local(g) for g in gs]
            for g, (p, *_) in zip(gs, launch.held, strict=True):
                if g is None or g.is_sparse or not g.is_contiguous() or TYPES.get(g.dtype) != launch.form.types[1] or g.shape != p.shape:
                    return False
            launch.set_gradients([g.data_ptr() for g in gs if g is not None])
        return True


def _made_for(optimizer: Optimizer, group: Group) -> tuple[Any, ...]:
    """What decides who goes where, beside the tensors."""
    options = ("lazy", "lazy_momentum", "fused", "seed", "stochastic_rounding", "accumulate")
    words = (group[name] for name in optimizer.bounds if isinstance(group[name], (str, Tensor)))
    guard = group["shrink"] is not None, getattr(optimizer, "found_inf", None) is None
    return (*(group[name] for name in options), *words, *guard)


def _places(optimizer: Optimizer, group: Group) -> list[Any]:
    """Where parameters, what belongs to them, and their records of rows lie, and of which shape they are."""
    params = group["params"]
    states = [optimizer.state[p] for p in params]
    names = [name for name in (*optimizer.buffers, "step") if name in states[0]]
    found: list[Any] = []
    for tensors in (params, *([s[name] for s in states] for name in names)):
        found += [*map(Tensor.data_ptr, tensors), *map(Tensor.is_contiguous, tensors)]
        found += [(x.shape, x.dtype) for x in tensors]
    return found


def _plan(optimizer: Optimizer, group: Group, numbers: Group) -> Plan:
    params: list[Tensor] = list(group["params"])
    left: list[Tensor] = []
    parts: dict[Part, list[Item]] = {}
    # Micro-batches: what is left of a momentum is a tensor's own. Rows: they are others at every step.
    reusable = group["accumulate"] == 1 and not group["lazy"] and bool(params)
    index: dict[int, int] = {}
    taken: list[tuple[int, int]] = []
    for i, p in enumerate(params):
        g = optimizer.raw_gradient(p, group)
        if g is None:
            _refuse_capture_without(p)
            reusable = False
            continue
        item = _item(optimizer, p, local(g), group)
        if item is None or _overlaps(item, taken):
            left.append(p)
            reusable = False
            continue
        rule, mine = optimizer.part(p, group, numbers)
        part, item = _part(optimizer, rule, mine, numbers, item)
        parts.setdefault(part, []).append(item)
        index[id(item.p)] = i
        reusable &= p.is_contiguous() and not item.by_rows and not is_sharded(p)
    guard = group["shrink"] is not None and getattr(optimizer, "found_inf", None) is None
    jobs = [
        (part, launch, [index[id(item.p)] for item in members])
        for part, items in parts.items()
        for launch, members in launches(items, guard, group["stochastic_rounding"])
    ]
    return Plan(
        jobs, left, params, any(map(is_sharded, params)), reusable,
        made_for=_made_for(optimizer, group), state=list(optimizer.state.values()),
        places=_places(optimizer, group) if reusable else [],
    )  # fmt: skip


def _part(optimizer: Optimizer, rule: Rule, mine: Group, shared: Group, item: Item) -> tuple[Part, Item]:
    """What is the tensor's own goes into its line of the table."""
    own = tuple(name for name in optimizer.own if name in mine)
    numbers = {name: shared.get(name, x) for name, x in mine.items() if name not in own}
    known = [mine[name] for name, x in numbers.items() if x in WORDS and mine[name] not in WORDS]
    item = item._replace(own=tuple(float(mine[name]) for name in own), known=known[0] if known else math.nan)
    return Part(rule, tuple(numbers.items()), own), item


def _item(optimizer: Optimizer, p: Tensor, g: Tensor, group: Group) -> Item | None:
    """The line of ``p`` in a table; None where the kernels cannot take it."""
    lazy = g.layout != torch.strided or bool(group["lazy"])
    whole = {group[name] for name in optimizer.bounds if group[name] in WORDS}
    if lazy and (group["lazy_momentum"] != "freeze" or group["accumulate"] > 1 or "rms" in whole):
        return None  # every row's momentum decays; rows of a cycle are remembered; rows would wait for the matrix
    by_rows, rows = lazy or ("row_rms" in whole and p.dim() >= 2 and optimizer.is_last(group)), None
    if g.layout != torch.strided:
        rows, g = sparse_rows(p, g)
        if group["lazy"] == "grad":
            rows = torch.where(moves(g), rows, -1)
    elif lazy:
        mask = recorded_rows(p) if group["lazy"] == "ids" else moves(g)
        rows = mask.nonzero().squeeze(1) if mask.is_cpu else torch.where(mask, torch.arange(len(mask), device=mask.device), -1)
    state = optimizer.state_of(p, group)
    buffers, mine = [local(state[name]) for name in optimizer.buffers], local(p)
    rounded = group["stochastic_rounding"] and p.dtype == torch.bfloat16
    if not _takes(mine, g, buffers, by_rows) or (mine is not p and rounded):
        return None  # a kernel's noise follows from the place in what it is given
    noise = noise_of(group["seed"], optimizer.number(p)) if rounded else 0
    return Item(mine, g, buffers, state.get("step"), noise, by_rows, rows)


def _overlaps(item: Item, taken: list[tuple[int, int]]) -> bool:
    """Whether what the item writes is also another's, of those before; notes what it writes."""
    own = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in (item.p, *item.buffers)]
    for start, end in own:
        i = bisect(taken, (start, end))
        if (i and taken[i - 1][1] > start) or (i < len(taken) and taken[i][0] < end):
            return True
        taken.insert(i, (start, end))
    return False


def moves(g: Tensor) -> Tensor:
    """Mask [V] of the rows with an entry that is not zero (NaN is not)."""
    return torch.linalg.vector_norm(g, torch.inf, dim=tuple(range(1, g.dim()))) != 0


def _takes(p: Tensor, g: Tensor, buffers: Sequence[Tensor], by_rows: bool) -> bool:
    """Whether the kernels can step on these: dense, of one memory order, float32, bfloat16 or float16."""
    if p.dtype not in TYPES or g.dtype not in TYPES or g.device != p.device:
        return False
    kind = buffers[0].dtype
    if any(b.dtype != kind or b.device != p.device for b in buffers) or kind not in TYPES:
        return False
    if p.is_contiguous():
        return g.is_contiguous() and all(b.is_contiguous() for b in buffers)
    if by_rows or not torch.ops.aten.is_non_overlapping_and_dense(p):
        return False
    return all(x.stride() == p.stride() and x.shape == p.shape for x in (g, *buffers))


def _refuse_capture_without(p: Tensor) -> None:
    if p.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a CUDA graph must see every gradient, and the parameter of shape {tuple(p.shape)} has none"
        )
