"""The fourth road to an update: a group's tensors together, through the kernels of ``minisign.kernels``.

This file decides which tensors can go there and says in numbers what is to be done. What it leaves, the
plain roads of base.py take. From one step to the next mostly nothing changes but where the gradients lie,
so a :class:`Plan` is kept, and looked over instead of made anew: with many small tensors it is Python that
takes the time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minisign import kernels
from minisign.kernels.rule import (
    ALL,
    BY_GRADIENT,
    LIST,
    LIST_BY_GRADIENT,
    MASK,
    RMS,
    ROW_RMS,
    Item,
    Launch,
    Rule,
    launches,
)
from minisign.optim.rounding import noise_of
from minisign.optim.rows import forget_rows, recorded_rows
from minisign.optim.shards import is_sharded, local

if TYPE_CHECKING:
    from minisign.optim.base import Group, RowOptimizer
    from minisign.optim.tiger import Tiger


def check(fused: bool | str, device: torch.device) -> None:
    """Raises RuntimeError where the back end for ``device`` is not to be had."""
    kernels.backend(fused, device)


def step(optimizer: RowOptimizer, group: Group, cache: dict[Any, Any]) -> list[Tensor]:
    """One step on the parameters of a group that the kernels can take; the others are returned.

    ``cache`` is kept from step to step.
    """
    rule = optimizer._rule(group)
    grad_scale, found_inf = optimizer._scaling()
    if found_inf is not None:  # then gradients have been looked at already
        rule = replace(rule, guard=False)
    plan: Plan | None = cache.get("plan")
    fresh = plan is None or not plan.fits(optimizer, group, rule)
    if fresh:
        plan = cache["plan"] = _plan(optimizer, group, rule)
    assert plan is not None
    for number, ((own, launch), members) in enumerate(zip(plan.launches, plan.members, strict=True)):
        name = kernels.backend(group["fused"], launch.device)
        kernels.step(
            name, rule if own is None else own, launch, cache.setdefault(number, {}), grad_scale, found_inf
        )
        if fresh:
            launch.forget_gradients()
        if launch.which == MASK:
            for i in members:
                forget_rows(plan.params[i], unless=found_inf)
    if plan.left and found_inf is not None and found_inf.item():
        return []
    return plan.left


def move(optimizer: Tiger, params: list[Tensor], group: Group, cache: dict[Any, Any]) -> list[Tensor]:
    """θ moves by the sign of a momentum that has its gradients already; returns what is left to do."""
    rule = replace(optimizer._rule(group), fold=False, guard=False)
    left, items = [], []
    for p in params:
        item = _item(optimizer, p, p, group, rule)  # p in place of a gradient that is gone, and not read
        if item is None:
            left.append(p)
        else:
            items.append(item._replace(g=None))
    for number, launch in enumerate(launches(items)):
        name = kernels.backend(group["fused"], launch.device)
        kernels.step(name, rule, launch, cache.setdefault(("move", number), {}))
    return left


@dataclass
class Plan:
    """The launches of a group, and what they were made from."""

    launches: list[tuple[Rule | None, Launch]]  # with a rule of its own, where it has one
    members: list[list[int]]  # for each launch, which of the group's parameters
    left: list[Tensor]
    params: list[Tensor]
    sharded: bool
    reusable: bool
    made_for: tuple[Any, ...]
    state: list[Any]
    addresses: list[int]

    def fits(self, optimizer: RowOptimizer, group: Group, rule: Rule) -> bool:
        """Whether nothing but gradients has moved; where they are now is in the launches then."""
        params, state = group["params"], optimizer.state
        if not self.reusable or self.made_for != _made_for(group, rule):
            return False
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        if len(state) != len(self.state) or not all(map(is_, state.values(), self.state)):
            return False
        if self.addresses != _addresses(optimizer, group):
            return False
        for (_, launch), members in zip(self.launches, self.members, strict=True):
            dtype = launch.types[1]
            gs = [params[i].grad for i in members]
            if self.sharded:
                gs = [g if g is None else local(g) for g in gs]
            for g in gs:
                if g is None or g.dtype is not dtype or g.is_sparse or not g.is_contiguous():
                    return False
            launch.set_gradients([g.data_ptr() for g in gs if g is not None])
        return True


def _made_for(group: Group, rule: Rule) -> tuple[Any, ...]:
    """What decides who goes where, beside the tensors."""
    return (group["lazy"], group["lazy_momentum"], group["fused"], group["seed"], rule.scale, rule.rounded)


def _addresses(optimizer: RowOptimizer, group: Group) -> list[int]:
    """Where parameters, what belongs to them, and their records of rows lie."""
    params = group["params"]
    states = [optimizer.state[p] for p in params]
    found = [local(p).data_ptr() for p in params]
    for name in (*optimizer.buffers, "step"):
        if name in states[0]:
            found += [local(s[name]).data_ptr() for s in states]
    if group["lazy"] == "ids":
        found += [recorded_rows(p).data_ptr() for p in params]
    return found


def _plan(optimizer: RowOptimizer, group: Group, rule: Rule) -> Plan:
    params: list[Tensor] = list(group["params"])
    left: list[Tensor] = []
    rules: dict[Rule | None, list[Item]] = {}
    # Micro-batches: what is left of a momentum is a tensor's own.
    reusable = group.get("accumulate", 1) == 1
    index: dict[int, int] = {}
    for i, p in enumerate(params):
        g = optimizer._raw_gradient(p, group)
        item = None if g is None else _item(optimizer, p, local(g), group, rule)
        if g is None:
            _refuse_capture_without(p)
        elif item is None:
            left.append(p)
        else:
            own = optimizer._own_rule(p, optimizer.state[p], group, rule)
            rules.setdefault(None if own is rule else own, []).append(item)
            index[id(item.p)] = i
            reusable &= own is rule
        reusable &= item is not None and p.is_contiguous() and item.which not in (LIST, LIST_BY_GRADIENT)
    found = [(own, launch) for own, items in rules.items() for launch in launches(items)]
    return Plan(
        launches=found,
        members=[[index[id(item.p)] for item in launch.items] for _, launch in found],
        left=left,
        params=params,
        sharded=any(map(is_sharded, params)),
        reusable=reusable and bool(params),
        made_for=_made_for(group, rule),
        state=list(optimizer.state.values()),
        addresses=_addresses(optimizer, group) if reusable and params else [],
    )


def _item(optimizer: RowOptimizer, p: Tensor, g: Tensor, group: Group, rule: Rule) -> Item | None:
    """The line of ``p`` in a table; None where the kernels cannot take it."""
    sparse = g.layout != torch.strided
    lazy = sparse or bool(group["lazy"])
    if lazy and not _lazy_in_kernel(group, rule):
        return None
    which, rows = None, None
    if sparse:
        rows, g = optimizer._sparse_rows(p, g)
        which = LIST_BY_GRADIENT if group["lazy"] == "grad" else LIST
    elif group["lazy"] == "ids":
        which, rows = MASK, recorded_rows(p)
    elif lazy:
        which = BY_GRADIENT
    elif rule.scale == ROW_RMS and rule.move and p.dim() >= 2:
        which = ALL
    state = optimizer._init_state(p, group)
    buffers = [local(state[name]) for name in optimizer.buffers]
    mine = local(p)
    if not kernels.takes(mine, g, buffers, by_rows=which is not None) or (mine is not p and rule.rounded):
        return None  # a kernel's noise follows from the place in what it is given
    return Item(
        mine,
        g,
        buffers,
        state.get("step"),
        noise=noise_of(group["seed"], optimizer._number(p)) if rule.rounded else 0,
        is_vector=rule.scale in (RMS, ROW_RMS) and p.dim() < 2,
        which=which,
        rows=rows,
    )


def _lazy_in_kernel(group: Group, rule: Rule) -> bool:
    return (
        group["lazy_momentum"] == "freeze"  # else every row's momentum decays
        and group.get("accumulate", 1) == 1  # else rows of a cycle are remembered
        and rule.scale != RMS  # of the whole matrix, of which the rows would have to wait
    )


def _refuse_capture_without(p: Tensor) -> None:
    if p.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a CUDA graph must see every gradient, and the parameter of shape {tuple(p.shape)} has none"
        )
