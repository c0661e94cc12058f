"""Checkers of notebook 03."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minisign.lessons import RIGHT, Verdict, ask, checker
from minisign.lessons.sign_descent import Step, farthest
from minisign.optim import Tiger


@checker
def check_share(answer: Callable[[np.ndarray, np.ndarray, float], float]) -> Verdict:
    """``answer(weight, counts, bound)`` → share of the components of tokens seen one to three times that
    are beyond 0.8 of the bound."""
    weight = np.array([[90.0, -95.0], [-85.0, 3.0], [99.0, 99.0], [1.0, -2.0], [88.0, 0.0]])
    cases = {
        "of a small matrix": (weight, np.array([1, 3, 0, 2, 500]), 100.0, 3 / 6),
        "of one with another bound": (weight / 10, np.array([1, 3, 0, 2, 500]), 10.0, 3 / 6),
        "of the same with other counts": (weight, np.array([4, 1, 1, 0, 2]), 100.0, 4 / 6),
    }
    for name, (values, counts, bound, expected) in cases.items():
        given = ask(answer, values, counts, bound)
        if not np.isclose(given, expected):
            return Verdict(f"{name}, the share is {expected:.3f}, the answer is {given:.3f}")
    return RIGHT


@checker
def check_sound(answer: Callable[[Tensor, float], bool]) -> Verdict:
    """``answer(weight, weight_decay)`` → whether an embedding is free of entries near ±1/λ."""
    generator = torch.Generator().manual_seed(0)
    healthy = torch.randn(500, 16, generator=generator)
    one_row = healthy.clone()
    one_row[7] = 99.0 * torch.sign(one_row[7])
    low = healthy.clone()
    low[3, 4] = -9.7
    cases = (
        ("entries around 1 with λ = 0.01", healthy, 0.01, True),
        ("one row of 500 at ±99 with λ = 0.01", one_row, 0.01, False),
        ("a single entry of −9.7 with λ = 0.1", low, 0.1, False),
        ("entries up to 99 with λ = 0.001", one_row, 0.001, True),
        ("entries up to 99 with λ = 0, where nothing is bounded", one_row, 0.0, True),
    )
    for name, weight, decay, expected in cases:
        try:
            given = ask(answer, weight, decay)
        except ZeroDivisionError:
            return Verdict(f"{name}: it divides by zero")
        if bool(given) is not expected:
            return Verdict(f"{name}: that is {'sound' if expected else 'not sound'}")
    return RIGHT


@checker
def check_tiger_step(step: Step) -> Verdict:
    """A step of Tiger's base form whose momentum lasts."""
    distance = farthest(
        step,
        lambda p: Tiger(p, lr=0.01, beta=0.965, weight_decay=0.1, scale=1.0),
        lr=0.01,
        beta=0.965,
        decay=0.1,
    )
    if not distance < 1e-12:
        return Verdict(f"after 100 steps it is {distance:.2g} away from Tiger")
    return RIGHT
