"""Checkers of notebook 01, and its comparison of a step written by hand with the package's optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from minisign.lessons import RIGHT, Verdict, ask, checker
from minisign.optim import AdamW, Lion, Signum

Step = Callable[[Tensor, Tensor, Any], object]  # (w, g, s): moves w in place, keeps what it needs in s
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def farthest(step: Step, make: Make, steps: int = 100, **options: float) -> float:
    """Largest distance between the weights of a hand-written step and those of an optimizer, after the same
    gradients.

    The gradients are normal numbers, of which every tenth row is zero for good: a sign has three values.

    Args:
        step: called as ``step(w, g, s)`` with weights and gradients [20, 5] in float64 and a namespace
            that starts with ``options``, m = 0, v = 0 and t = 0.
        make: builds the optimizer from a list of one parameter.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    p = torch.nn.Parameter(w.clone())
    optimizer, s = make([p]), SimpleNamespace(m=0.0, v=0.0, t=0, **options)
    distance = 0.0
    for _ in range(steps):
        g = torch.randn(20, 5, generator=generator, dtype=torch.float64)
        g[::10] = 0
        step(w, g, s)
        p.grad = g
        optimizer.step()
        distance = max(distance, float((w - p.detach()).abs().max()))
    return distance


@checker
def check_steps(answer: Callable[[float, float], float]) -> Verdict:
    """``answer(distance, lr)`` → steps of signSGD to come within lr of a minimum."""
    for distance, lr in ((1.0, 0.1), (3.0, 0.01), (0.05, 0.1), (7.3, 0.5)):
        x, n = distance, 0
        while abs(x) > lr * (1 + 1e-9):
            x -= math.copysign(lr, x)
            n += 1
        given = ask(answer, distance, lr)
        if abs(given - n) > 1:
            return Verdict(
                f"from a distance of {distance} with lr = {lr} it takes {n} steps, the answer is {given}"
            )
    return RIGHT


@checker
def check_adam_options(options: dict[str, Any]) -> Verdict:
    """Options under which AdamW does what signSGD does."""
    if not options:
        return Verdict("no options are given yet")

    def sign_step(w: Tensor, g: Tensor, s: Any) -> None:
        w -= 0.01 * torch.sign(g)

    try:
        distance = farthest(sign_step, lambda p: AdamW(p, lr=0.01, weight_decay=0.0, **options))
    except (TypeError, ValueError) as error:
        return Verdict(f"AdamW does not take them: {error}")
    if not distance < 1e-6:
        return Verdict(f"after 100 steps AdamW is {distance:.2g} away from signSGD")
    return RIGHT


@checker
def check_lion_step(step: Step) -> Verdict:
    """A step of Lion that leaves alone what never had a gradient."""

    generator = torch.Generator().manual_seed(1)
    w = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    start, g = w.clone(), torch.zeros_like(w)
    s = SimpleNamespace(m=0.0, v=0.0, t=0, lr=0.01, beta1=0.9, beta2=0.99, decay=0.0)
    step(w, g, s)
    if not torch.equal(w, start):
        moved = float((w - start).abs().max())
        return Verdict(f"a weight whose gradient was never anything but 0 has moved by {moved:g}")
    distance = farthest(
        step,
        lambda p: Lion(p, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1),
        lr=0.01,
        beta1=0.9,
        beta2=0.99,
        decay=0.1,
    )
    if not distance < 1e-12:
        return Verdict(f"after 100 steps it is {distance:.2g} away from Lion")
    return RIGHT


@checker
def check_signum_betas(answer: Callable[[float], tuple[float, float]]) -> Verdict:
    """``answer(beta)`` → Lion's betas under which it is Signum with that β."""

    for beta in (0.0, 0.5, 0.965):
        betas = ask(answer, beta)
        p, q = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
        try:
            lion, signum = Lion([p], lr=0.1, betas=betas), Signum([q], lr=0.1, beta=beta)
        except (TypeError, ValueError) as error:
            return Verdict(f"for β = {beta}, Lion does not take {betas}: {error}")
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):
            p.grad = torch.randn(3, generator=generator, dtype=torch.float64)
            q.grad = p.grad.clone()
            lion.step()
            signum.step()
        if not torch.allclose(p, q):
            return Verdict(f"for β = {beta}, Lion with betas {betas} goes elsewhere than Signum")
    return RIGHT
