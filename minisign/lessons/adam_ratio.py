"""Checkers of notebook 12."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minisign.lessons import RIGHT, Verdict, ask, checker
from minisign.theory import adam_ratio_std


def _ratio(
    gradients: Tensor, beta1: float, beta2: float, eps: float, corrected: bool = True, inside: bool = False
) -> Tensor:
    m, v = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    for g in gradients:
        m, v = m.lerp(g, 1 - beta1), v.lerp(g.square(), 1 - beta2)
    if corrected:
        m, v = m / (1 - beta1 ** len(gradients)), v / (1 - beta2 ** len(gradients))
    return m / ((v + eps).sqrt() if inside else v.sqrt() + eps)


@checker
def check_update_ratio(answer: Callable[[Tensor, float, float, float], Tensor]) -> Verdict:
    """``answer(gradients, beta1, beta2, eps)``, gradients [steps, n] → r [n] after the last."""
    gradients = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for given_gradients, eps in ((gradients, 0.1), (gradients[:1], 1e-8)):
        arguments = (0.9, 0.99, eps)
        given = ask(answer, given_gradients.clone(), *arguments)
        if torch.allclose(given, _ratio(given_gradients, *arguments)):
            continue
        if torch.allclose(given, _ratio(given_gradients, *arguments, corrected=False)):
            return Verdict("the averages start at zero and are not corrected for it")
        if torch.allclose(given, _ratio(given_gradients, *arguments, inside=True)):
            return Verdict("ε stands inside the root")
        if torch.allclose(given, _ratio(given_gradients.flip(0), *arguments)):
            return Verdict("the gradients are taken in the wrong order, the last one first")
        steps = len(given_gradients)
        return Verdict(f"after {steps} gradients r should be another: {steps} of them make t = {steps}")
    return RIGHT


@checker
def check_correlation(answer: Callable[[float, float], float]) -> Verdict:
    """``answer(std, beta1)`` → ρ that :func:`~minisign.theory.adam_ratio_std` gives this width for."""
    for beta1 in (0.5, 0.9):
        for rho in (0.0, 0.7, -0.4):
            std = float(adam_ratio_std(beta1, rho))
            given = float(ask(answer, std, beta1))
            if abs(given - rho) > 1e-6:
                return Verdict(
                    f"a width of {std:.3f} with β₁ = {beta1} means ρ = {rho}, the answer is {given:.3g}"
                )
    return RIGHT


@checker
def check_bias_correction(
    answer: Callable[[Tensor, Tensor, Tensor, int, float, float, float], Tensor],
) -> Verdict:
    """``answer(m, v, g, t, beta1, beta2, eps)`` → r of step t; keeps the averages m and v [n] in place."""
    m, v = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    g = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for t in range(1, 6):
        given = ask(answer, m, v, g, t, 0.9, 0.999, 0.0)
        if not torch.allclose(given, g.sign()):
            return Verdict(
                f"after {t} gradients that are all alike r is {float(given[0]):.3g} where g is 1"
            )
    if not torch.allclose(m, g * (1 - 0.9**5)):
        return Verdict(f"after 5 gradients of 1 the average is {float(m[0]):.3g}, not {1 - 0.9**5:.3g}")
    return RIGHT
