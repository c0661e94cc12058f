"""Rules whose momentum is linear in the gradient, and that use the gradient for nothing else.

    m ← keep m + weight g            first half: take
    θ moves by m                     second half: move

Of such a rule the halves can be done apart. So accumulation over k micro-batches needs no buffer: at the
first m keeps ``keep`` of itself, at the others all of it, each adds weight/k · g, and θ moves after the
k-th. A gradient can be taken, and freed, within ``backward``; and where one is not finite, it can be left
out: m stays, and θ shrinks, θ ← (θ − c) s + c (Jianlin Su, kexue.fm/archives/9512).

The halves are found by trying: what a rule does to m = 1 and g = 0 is ``keep``, what it does to m = 0
and g = 1 is ``weight``, and the second half is the rule on a momentum that nothing changes in place. Each
half is a rule again, and goes every road.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from minisign.engine.lists import Tensors
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
        if isinstance(m, Tensor):
            p, g, m = Tensors([p]), Tensors([g]), Tensors([m])
        rule(p, g, m.fixed(), **numbers)

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


def keep_and_weight(rule: Rule, numbers: Mapping[str, Any]) -> tuple[float, float]:
    """What is left of a momentum, and the weight of the gradient in it."""
    return _tried(rule, tuple(_on_host(numbers).items()))


@lru_cache  # of a group's parameters all ask the same
def _tried(rule: Rule, numbers: tuple[tuple[str, Any], ...]) -> tuple[float, float]:
    g = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    m = 1 - g
    with torch.no_grad():
        rule(*(Tensors([x]) for x in (torch.zeros_like(g), g, m)), **dict(numbers))
    keep, weight = m.flatten().tolist()
    return keep, weight


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


def why_not_linear(rule: Rule, buffers: int, numbers: Mapping[str, Any]) -> str:
    """What a rule does that no linear one does; "" if there is nothing."""
    if buffers != 1 or "step" in numbers:
        return f"has {buffers} buffers{' and counts its steps' if 'step' in numbers else ''}"
    random = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-6, 6, 13, dtype=torch.float64).unsqueeze(1)
    p, g, m = (torch.randn(13, 16, dtype=torch.float64, generator=random) for _ in range(3))
    g, m, host = g * sizes, m * sizes.flip(0), _on_host(numbers)
    with torch.no_grad():
        keep, weight = keep_and_weight(rule, numbers)
        taken, moved, alone = m.clone(), p.clone(), p.clone()
        rule(*(Tensors([x]) for x in (moved, g, taken)), **host)
        if not torch.allclose(taken, keep * m + weight * g, rtol=1e-9, atol=1e-12):
            return "has a momentum that is not linear in the gradient"
        move(rule)(alone, torch.full_like(g, torch.nan), taken, **host)
    if torch.equal(moved, alone):
        return ""
    return "moves by more than the momentum: by the gradient, or an older momentum"


def left(rule: Rule, buffers: int, numbers: Mapping[str, Any]) -> list[float]:
    """What a step without a gradient leaves of each buffer of a rule, linear or not: each at 1, alone."""
    host = _on_host(numbers) | ({"step": 1.0} if "step" in numbers else {})
    eye = torch.eye(buffers, dtype=torch.float64).unsqueeze(-1)  # [buffers, the one at 1, 1]
    values = [Tensors([x.clone()]) for x in (torch.zeros_like(eye[0]), torch.zeros_like(eye[0]), *eye)]
    with torch.no_grad():
        rule(*values, **host)
    return [float(x.tensors[0][i]) for i, x in enumerate(values[2:])]


def _on_host(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float(x) if isinstance(x, Tensor) else x for name, x in numbers.items()}
