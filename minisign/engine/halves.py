"""Rules whose momentum is linear in the gradient, and that use the gradient for nothing else.

    m ← keep m + weight g            first half: take
    θ moves by m                     second half: move

Of such a rule the halves can be done apart. So accumulation over k micro-batches needs no buffer: at the
first m keeps ``keep`` of itself, at the others all of it, each adds weight/k · g, and θ moves after the
k-th. A gradient can be taken, and freed, within ``backward``; and where one is not finite, it can be left
out: m stays, and θ shrinks, θ ← (θ − c) s + c (Jianlin Su, kexue.fm/archives/9512). If that one is the
first of k, m keeps all of itself for the whole cycle.

What keep and weight are is found by trying (tried.py); the second half is the rule on a momentum that
nothing changes in place. Each half is a rule again, and goes every road.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, wraps
from typing import Any

from torch import Tensor

from minisign.engine.lists import as_list
from minisign.engine.tried import keep_and_weight
from minisign.engine.words import Rule


def take(p: Any, g: Any, m: Any, *, keep: Any, weight: float) -> None:
    """The first half of every linear rule."""
    if isinstance(keep, Tensor) or keep + weight != 1:
        m.mul_(keep).add_(g, alpha=weight)
    else:
        m.lerp_(g, weight)


@cache
def move(rule: Rule) -> Rule:
    """The second half of a linear rule. The gradient is not read."""

    @wraps(rule)
    def half(p: Any, g: Any, m: Any, **numbers: Any) -> None:
        rule(as_list(p), as_list(g), as_list(m).fixed(), **numbers)

    return half


def shrink(p: Any, g: Any, m: Any, *, shrink: float, center: float) -> None:
    """In place of the second half, where a gradient was not finite."""
    p.sub_(center).mul_(shrink).add_(center)


@cache
def take_and_move(rule: Rule) -> Rule:
    """Both, as the last micro-batch has them."""

    @wraps(rule)
    def both(p: Any, g: Any, m: Any, *, keep: Any, weight: float, **numbers: Any) -> None:
        take(p, g, m, keep=keep, weight=weight)
        move(rule)(p, g, m, **numbers)

    return both


def is_last(group: Mapping[str, Any]) -> bool:
    """Whether θ moves at this micro-batch."""
    return bool(group["micro_step"] + 1 >= group["accumulate"])


def due(
    rule: Rule,
    p: Tensor,
    g: Tensor,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    numbers: Mapping[str, Any],
) -> tuple[Rule, dict[str, Any], int | None]:
    """What of a rule is due at this micro-batch, its numbers, and what the state will note as taken."""
    keep, weight = keep_and_weight(rule, numbers)
    last, taken, before = is_last(group), None, state.get("taken", 0)
    if not (group["lazy"] or g.is_sparse):  # rows remember by themselves
        keep, taken = 1.0 if before else keep, 0 if last else before + 1
    half = {"keep": keep, "weight": weight / group["accumulate"]}
    return (take_and_move(rule), {**half, **numbers}, taken) if last else (take, half, taken)
