"""Checkers of notebook 09."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from minisign.lessons import RIGHT, Verdict, ask, checker


@checker
def check_weighted(
    answer: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[float, float]],
) -> Verdict:
    """``answer(norms, sizes, curvature)``, arrays [blocks] of ‖g_b‖, P_b and ‖H_b‖ → (Λ_G, Λ_P)."""
    generator = np.random.RandomState(0)
    for blocks in (1, 4, 9):
        norms, curvature = generator.exponential(size=(2, blocks))
        sizes = generator.randint(1, 1000, blocks)
        given = ask(answer, norms, sizes, curvature)
        expected = tuple(float(np.average(curvature, weights=w)) for w in (norms**2, sizes))
        for name, value, right in zip(("Λ_G", "Λ_P"), given, expected, strict=True):
            if not np.isclose(value, right):
                if name == "Λ_G" and np.isclose(value, np.average(curvature, weights=norms)):
                    return Verdict("Λ_G weighs with the squares of the norms, the answer with the norms")
                return Verdict(f"of {blocks} blocks {name} is {right:.4f}, the answer is {value:.4f}")
    return RIGHT


@checker
def check_power_iteration(answer: Callable[[Callable[[Tensor], Tensor], Tensor, int], float]) -> Verdict:
    """``answer(product, v, times)`` → ‖H‖ after so many products of H with a vector, which ``product``
    forms; ``v`` [n] is what to start from."""
    generator = torch.Generator().manual_seed(0)
    for top in (3.0, -3.0, 1e-3):
        q = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0]
        h = q @ torch.diag(torch.tensor([top, *(top * 0.8 ** torch.arange(1, 12)).tolist()]).double()) @ q.T
        calls = 0

        def product(v: Tensor, h: Tensor = h) -> Tensor:
            nonlocal calls
            calls += 1
            return h @ v

        v = torch.randn(12, generator=generator, dtype=torch.float64)
        given = float(ask(answer, product, 1e3 * v, 100))
        if not calls:
            return Verdict("it never asks for a product")
        if not np.isfinite(given):
            return Verdict(f"the answer is {given}: a vector that is multiplied on and on has to be scaled")
        if calls > 101:
            return Verdict(f"100 products were asked for, it takes {calls}")
        if not np.isclose(given, abs(top), rtol=1e-3):
            return Verdict(f"the eigenvalue of the largest magnitude is {top:g}, the answer is {given:.4g}")
    return RIGHT


@checker
def check_norms(answer: Callable[[Sequence[Tensor]], Sequence[float]]) -> Verdict:
    """``answer(grads)`` → the 2-norm of each gradient."""
    generator = torch.Generator().manual_seed(0)
    grads = [10.0**k * torch.randn(5, 2 * k + 1, generator=generator) for k in range(3)]
    given, expected = ask(answer, grads), [float(g.norm()) for g in grads]
    if len(given) != len(expected):
        return Verdict(f"of {len(expected)} gradients it gives {len(given)} norms")
    for value, right in zip(given, expected, strict=True):
        if not np.isclose(float(value), right, rtol=1e-5):
            return Verdict(f"a gradient with the norm {right:.4g} is given as {float(value):.4g}")
    return RIGHT
