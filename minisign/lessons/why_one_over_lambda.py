"""Checkers of notebook 04."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from minisign import theory
from minisign.lessons import RIGHT, Verdict, ask, checker
from minisign.lessons.sign_descent import Step, farthest
from minisign.optim import Lion


@checker
def check_steps(answer: Callable[[float, float, float], float]) -> Verdict:
    """``answer(share, eta, weight_decay)`` → steps of a constant sign from 0 to that share of 1/λ."""
    for share, eta, decay in ((0.5, 0.1, 0.1), (0.99, 1e-3, 0.01), (0.9, 3e-3, 1.0)):
        given = ask(answer, share, eta, decay)
        expected = theory.steps_to_reach(share, eta, decay)
        if not np.isclose(given, expected, rtol=1e-2, atol=1):
            return Verdict(
                f"with η = {eta} and λ = {decay} it takes {expected:,.0f} steps to {share:.0%} of the "
                f"bound, the answer is {given:,.0f}"
            )
    return RIGHT


@checker
def check_decay(answer: Callable[[float, float], float]) -> Verdict:
    """``answer(eta, gap)`` → the largest λ under which rows with that gap do not pile up at the bound."""
    for eta, gap in ((1e-3, 500.0), (3e-4, 1e5), (0.01, 2.0)):
        given = ask(answer, eta, gap)
        kappa = float(theory.kappa(eta, given, gap))
        if not np.isclose(kappa, 0.5):
            more = "bimodal: too large" if kappa > 0.5 else "not yet at the threshold of ½"
            return Verdict(f"η = {eta}, τ = {gap:g} and λ = {given:.3g} make κ = {kappa:.3g}, {more}")
    return RIGHT


@checker
def check_lion_step(step: Step) -> Verdict:
    """A step of Lion whose weight decay is decoupled."""

    def distance(decay: float) -> float:
        def lion(p: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
            return Lion(p, lr=0.01, betas=(0.9, 0.99), weight_decay=decay)

        return farthest(step, lion, lr=0.01, beta1=0.9, beta2=0.99, decay=decay)

    if not distance(0.0) < 1e-12:
        return Verdict("without weight decay it is no longer Lion")
    if not distance(0.5) < 1e-12:
        return Verdict(f"with λ = 0.5 it is {distance(0.5):.2g} away from Lion after 100 steps")
    return RIGHT
