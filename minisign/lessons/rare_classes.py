"""Checkers of notebook 11."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from minisign import theory
from minisign.lessons import RIGHT, Verdict, ask, checker
from minisign.probes import common_mode


@checker
def check_steps_to(answer: Callable[[float, float, int, float], float]) -> Verdict:
    """``answer(loss, share, classes, rate)`` → steps of gradient descent from zero weights to that loss."""
    for loss, share, classes, rate in ((0.1, 0.2, 2, 1.0), (1.0, 0.01, 500, 10.0), (5.0, 1e-4, 500, 3.0)):
        steps = float(ask(answer, loss, share, classes, rate))
        reached = float(theory.rare_class_gradient_descent(share, classes, rate * max(steps, 0.0)))
        # Steps may be rounded to whole ones.
        after = float(theory.rare_class_gradient_descent(share, classes, rate * (max(steps, 0.0) + 1)))
        if not abs(reached - loss) <= max(0.01 * loss, reached - after):
            return Verdict(
                f"a class with a share of {share:g} among {classes} has {reached:.3g} nats after "
                f"{steps:.0f} steps at the rate {rate:g}, not {loss:g}"
            )
    return RIGHT


@checker
def check_remove_common_mode(answer: Callable[[Tensor], object]) -> Verdict:
    """``answer(weight)``: subtracts the mean row from weights [classes, D], in place."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64) + 3
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    before = (x @ weight.T).softmax(-1)
    answer(weight)
    if not torch.allclose((x @ weight.T).softmax(-1), before):
        return Verdict("the predictions have changed")
    if not common_mode(weight) < 1e-12:
        return Verdict(f"{common_mode(weight):.0%} of the squared norm are still in the mean row")
    return RIGHT


@checker
def check_mean_loss(answer: Callable[[Sequence[np.ndarray]], float]) -> Verdict:
    """``answer(batches)``, losses [tokens] of each batch → mean over all tokens."""
    generator = np.random.RandomState(0)
    for sizes in ((3, 3), (1, 9), (5, 2, 40)):
        batches = [generator.exponential(size=size) for size in sizes]
        given, expected = float(ask(answer, batches)), float(np.concatenate(batches).mean())
        if not np.isclose(given, expected):
            return Verdict(
                f"with {' and '.join(map(str, sizes))} tokens the mean over all is {expected:.4f}, "
                f"the answer is {given:.4f}"
            )
    return RIGHT
