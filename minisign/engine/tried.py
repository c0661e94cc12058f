"""What is true of a rule, found by trying it on small tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from minisign.engine.lists import Tensors
from minisign.engine.words import Rule

CPU = torch.device("cpu")  # whatever a user has made the default


def keep_and_weight(rule: Rule, numbers: Mapping[str, Any]) -> tuple[float, float]:
    """What a step keeps of a momentum, and the weight of the gradient in it.

    Raises:
        ValueError: with these numbers the rule is not linear.
    """
    keep, weight, why_not = _halves(rule, tuple(_on_host(numbers).items()))
    if why_not:
        raise ValueError(f"{rule.__name__} cannot be taken in halves: it {why_not}")
    return keep, weight


def why_not_linear(rule: Rule, buffers: int, numbers: Mapping[str, Any]) -> str:
    """What a rule does that keeps it from being taken in halves (halves.py); "" if there is nothing."""
    if buffers != 1:
        return f"has {buffers} buffers"
    if "step" in numbers:
        return "counts its steps"
    return _halves(rule, tuple(_on_host(numbers).items()))[2]


@lru_cache  # of a group's parameters all ask the same
def _halves(rule: Rule, numbers: tuple[tuple[str, Any], ...]) -> tuple[float, float, str]:
    one = torch.ones(1, 1, dtype=torch.float64, device=CPU)
    kept, weighted = one.clone(), one * 0
    _try(rule, (one * 0, one * 0, kept), dict(numbers))
    _try(rule, (one * 0, one, weighted), dict(numbers))
    keep, weight = kept.item(), weighted.item()
    p, g, m = _random(3)
    sizes = torch.logspace(-6, 6, len(g), dtype=torch.float64, device=CPU).unsqueeze(1)
    g, m = g * sizes, m * sizes.flip(0)
    taken, moved, alone = m.clone(), p.clone(), p.clone()
    _try(rule, (moved, g, taken), dict(numbers))
    if not torch.allclose(taken, keep * m + weight * g, rtol=1e-9, atol=1e-12):
        return keep, weight, "has a momentum that is not linear in the gradient"
    _try(rule, (alone, torch.full_like(g, torch.nan), taken), dict(numbers), is_fixed=True)
    by_more = "moves by more than the momentum: by the gradient, or an older momentum"
    return keep, weight, "" if torch.equal(moved, alone) else by_more


def left_of_buffers(rule: Rule, buffers: int, numbers: Mapping[str, Any]) -> list[float]:
    """What a step without a gradient leaves of each buffer of a rule, linear or not: each at 1, alone."""
    eye = torch.eye(buffers, dtype=torch.float64, device=CPU).unsqueeze(-1)  # [buffers, the one at 1, 1]
    values = [x.clone() for x in eye]
    _try(rule, (torch.zeros_like(eye[0]), torch.zeros_like(eye[0]), *values), numbers)
    return [float(x[i]) for i, x in enumerate(values)]


def goes_by_rows(rule: Rule, buffers: int, numbers: Mapping[str, Any]) -> bool:
    """Whether a row moves in the same way when the others are not there."""
    return _goes_by_rows(rule, buffers, tuple(_on_host(numbers).items()))


@lru_cache
def _goes_by_rows(rule: Rule, buffers: int, numbers: tuple[tuple[str, Any], ...]) -> bool:
    p, g, *given = _random(2 + buffers)
    whole = [p, g, *(b.abs() for b in given)]  # a mean square is one
    rows, own = [x[::3].clone() for x in whole], {name: 1.0 if x == "rms" else x for name, x in numbers}
    with torch.no_grad():
        rule(*whole, **own)
        rule(*rows, **own)
    return all(torch.allclose(x[::3], y, equal_nan=True) for x, y in zip(whole, rows, strict=True))


def _random(count: int) -> list[Tensor]:
    random = torch.Generator(CPU).manual_seed(0)
    return [torch.randn(13, 16, dtype=torch.float64, device=CPU, generator=random) for _ in range(count)]


def _try(rule: Rule, tensors: Sequence[Tensor], numbers: Mapping[str, Any], is_fixed: bool = False) -> None:
    """A step; ``is_fixed``: the buffers stay."""
    host = _on_host(numbers)
    p, g, *buffers = (Tensors([x]) for x in tensors)
    with torch.no_grad():
        rule(p, g, *(b.fixed() if is_fixed else b for b in buffers), **host)


def _on_host(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float(x) if isinstance(x, Tensor) else x for name, x in numbers.items()}
