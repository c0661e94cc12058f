"""The options that every optimizer has, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, TypeAlias, TypedDict

import torch

from minisign.engine.checks import (
    OVERLAP,
    OVERLAPS,
    check_bool,
    check_choice,
    check_number,
    check_rate,
    check_whole,
)
from minisign.engine.shards import check_rows, is_made_by_zero, is_sharded, local
from minisign.engine.words import WORDS, Group

# Of a number, [low, below); None: any. bool: it is True or False.
Bounds: TypeAlias = Mapping[str, tuple[float, float] | type[bool] | None]
FROM_0, BETA = (0.0, math.inf), (0.0, 1.0)
STATE_TYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Options that say how a step is computed and not what: a checkpoint from elsewhere leaves them alone.
HOW = ("foreach", "fused", "release_grads")


class Options(TypedDict, total=False):
    """See :class:`minisign.engine.optimizer.Optimizer`."""

    lazy: bool | str
    lazy_momentum: str
    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | str
    state_dtype: torch.dtype | None
    stochastic_rounding: bool
    seed: int
    accumulate: int
    shrink: float | None
    release_grads: bool


DEFAULTS: Options = {
    "lazy": False,
    "lazy_momentum": "freeze",
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": False,
    "state_dtype": None,
    "stochastic_rounding": False,
    "seed": 0,
    "accumulate": 1,
    "shrink": None,
    "release_grads": False,
}
# Pairs that exclude each other, and why where it is not plain.
EXCLUDE = (
    ("foreach", "differentiable", ""),
    ("fused", "differentiable", ""),
    ("fused", "foreach", ""),
    ("release_grads", "capturable", ""),
    ("release_grads", "lazy", ': which rows move is known late; give their group "release_grads": False'),
)


def defaults(numbers: Mapping[str, Any], options: Mapping[str, Any]) -> Group:
    """Of an optimizer: its numbers, and the options that are not given.

    Raises:
        TypeError: an unknown option.
    """
    if unknown := sorted(set(options) - set(DEFAULTS)):
        known = ", ".join([*numbers, *DEFAULTS])
        raise TypeError(f"unknown option {unknown[0]!r}: choose from {known}")
    return {**numbers, **DEFAULTS, "center": 0.0, "micro_step": 0, **options}


def check_group(
    owner: str, group: Group, numbers: Mapping[str, Any], why_not_linear: Callable[[], str]
) -> None:
    """Refuses what a group of the optimizer called ``owner`` must not have.

    Args:
        numbers: the bounds of each.
        why_not_linear: of the rule; "" if it is.

    Raises:
        ValueError, TypeError: a bad value, named in the message.
    """
    for name in group.keys() - {*numbers, *DEFAULTS}:  # others may have options of their own
        if meant := get_close_matches(name, [*numbers, *DEFAULTS], n=1, cutoff=0.75):
            raise TypeError(f"unknown option {name!r} of a group: it is called {meant[0]!r}")
    for name, bounds in numbers.items():
        if bounds is bool:
            check_bool(name, group[name])
        else:
            _check(name, group[name], *(bounds or ()))
    check_choice("lazy", group["lazy"], (False, "grad", "ids"))
    check_choice("lazy_momentum", group["lazy_momentum"], ("freeze", "decay"))
    check_choice("fused", group["fused"], (False, True, "cpu", "triton"))
    check_choice("state_dtype", group["state_dtype"], STATE_TYPES)
    check_whole("seed", group["seed"])
    check_choice("foreach", group["foreach"], (None, True, False))
    for name in ("maximize", "capturable", "differentiable", "stochastic_rounding", "release_grads"):
        check_bool(name, group[name])
    _check_halves(owner, group, why_not_linear)
    for one, other, why in EXCLUDE:
        if group[one] and group[other]:
            raise ValueError(f"{one}={group[one]!r} and {other}={group[other]!r} exclude each other{why}")
    if group["stochastic_rounding"] and group["capturable"] and not group["fused"]:
        raise ValueError(
            "stochastic_rounding=True with capturable=True needs fused=True: only a kernel draws anew "
            "each time a CUDA graph runs"
        )
    if group["lazy"] == "ids" and is_made_by_zero():
        raise ValueError(
            "lazy='ids' is not for ZeroRedundancyOptimizer: processes would have to unite their rows at a "
            "step that each of them makes on other parameters; take lazy='grad'"
        )
    names = group.get("param_names") or ["a parameter"] * len(group["params"])
    for name, p in zip(names, group["params"], strict=True):
        _check_parameter(owner, name, p, group)


def _check(name: str, value: Any, low: float = -math.inf, below: float = math.inf) -> None:
    """A number of the rule: lr, a pair of betas, a word for what it is relative to, or any other."""
    if name == "lr":
        check_rate(value)
    elif name == "betas":
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise TypeError(f"betas must be a pair of numbers, got {value!r}")
        for i, beta in enumerate(value):
            check_number(f"beta parameter at index {i}", beta, low, below)
    elif isinstance(value, str):
        if value not in WORDS:
            raise ValueError(f"unknown {name} {value!r}: choose {', '.join(map(repr, WORDS))} or a number")
    else:
        called = {"eps": "epsilon value", "weight_decay": "weight_decay value"}.get(name, name)
        check_number(called, value, low, below)


def _check_halves(owner: str, group: Group, why_not_linear: Callable[[], str]) -> None:
    """Of rules whose momentum is linear in the gradient."""
    k, shrink = group["accumulate"], group["shrink"]
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"accumulate must be a whole number of micro-batches, got {k!r}")
    if k < 1:
        raise ValueError(f"Invalid accumulate: {k} (must be 1 or more micro-batches)")
    if shrink is not None:
        check_number("shrink", shrink, 0.0, math.nextafter(1.0, 2.0))
    check_number("center", group["center"])
    if k > 1 and group["capturable"]:
        raise ValueError(
            f"capturable=True needs accumulate=1, got {k}: a CUDA graph would freeze the count"
        )
    asked = [x for x in ("accumulate", "shrink", "release_grads") if group[x] != DEFAULTS[x]]
    if asked and (why := why_not_linear()):
        raise ValueError(f"{owner} takes no {asked[0]}={group[asked[0]]!r}: its rule {why}")


def _check_parameter(owner: str, name: str, p: Any, group: Group) -> None:
    shape = tuple(p.shape)
    if p.layout != torch.strided or not p.is_floating_point():
        raise ValueError(
            f"{owner} requires dense real floating-point parameters, got {name} of shape {shape}, "
            f"{p.dtype}, {p.layout}"
        )
    if OVERLAP(local(p)) == OVERLAPS:
        raise ValueError(
            f"{name} of shape {shape} has entries that share memory (as after expand): make it contiguous"
        )
    if group["lazy"] and p.dim() < 2:
        raise ValueError(
            f"lazy={group['lazy']!r} needs parameters with rows (two or more dimensions), got {name} of "
            f"shape {shape}"
        )
    check_rows(name, p)
    if group["release_grads"] and is_sharded(p):
        raise ValueError("release_grads=True is not for sharded parameters")
    if group["stochastic_rounding"] and p.dtype == torch.float16:
        raise ValueError(
            f"stochastic_rounding=True is for bfloat16 parameters, got {name} of shape {shape}, {p.dtype}"
        )
