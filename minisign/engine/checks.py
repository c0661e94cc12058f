"""What is refused: every message names the value."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

OVERLAP, OVERLAPS = torch._debug_has_internal_overlap, 1  # torch's answer where entries share memory


def check_number(name: str, value: Any, low: float = -math.inf, below: float = math.inf) -> None:
    """``low`` ≤ value < ``below``, and finite."""
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (low <= value < below) or math.isinf(value):
        raise ValueError(f"Invalid {name}: {value} (must be in [{low:g}, {below:g}))")


def check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")


def check_counts(**counts: Any) -> None:
    """Of each: a whole number, 1 or more."""
    for name, count in counts.items():
        check_whole(name, count)
        if count < 1:
            raise ValueError(f"{name} must be 1 or more, got {count}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    # `is` for False: 0 == False, and a typo should not pass as one.
    if not any(value is c if isinstance(c, bool) else value == c for c in choices):
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(map(repr, choices))}")


def check_rate(lr: Any) -> None:
    """A learning rate: a number, or a tensor of one entry."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        lr = lr.item()
    check_number("learning rate", lr, 0.0)
