"""Checkers of notebook 15."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minisign.lessons import RIGHT, Verdict, ask, checker


@checker
def check_accumulation(answer: Callable[[Tensor, Tensor, float], Tensor]) -> Verdict:
    """``answer(m, gradients, beta)``, m [n], gradients [k, n] → m [n] after the step."""
    generator = torch.Generator().manual_seed(0)
    for k in (1, 3):
        m, gradients = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5,), (k, 5)))
        beta = 0.9
        right = beta * m + (1 - beta) * gradients.mean(0)
        given = ask(answer, m.clone(), gradients.clone(), beta)
        if torch.allclose(given, right):
            continue
        each = m
        for g in gradients:
            each = beta * each + (1 - beta) / k * g
        if torch.allclose(given, each):
            return Verdict(f"with {k} micro-batches m decays {k} times")
        if torch.allclose(given, beta * m + (1 - beta) * gradients.sum(0)):
            return Verdict(f"each of {k} gradients has the weight of a whole one")
        return Verdict(f"with {k} micro-batches it is not the m of one step on the mean gradient")
    return RIGHT


@checker
def check_rounding(answer: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    """``answer(x, u)``, x [n] float32, u [n] uniform in [0, 1) → bfloat16 [n]."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.tensor([1.0, -2.0, 0.0, 0.15625])
    u = torch.rand(4, generator=generator)
    given = ask(answer, exact.clone(), u)
    if given.dtype != torch.bfloat16:
        return Verdict(f"the answer has the dtype {given.dtype}")
    if not torch.equal(given.float(), exact):
        return Verdict(f"{exact.tolist()} are numbers of bfloat16 and do not stay")
    n = 100_000
    for x in (1.0 + 0.3 * 2**-7, -(1.0 + 0.3 * 2**-7), 3.7e-5):
        value = torch.full((n,), x)
        u = torch.rand(n, generator=generator)
        given = ask(answer, value, u).double()
        spacing = 2.0 ** (torch.frexp(torch.tensor(abs(x)))[1].item() - 8)
        way = (given - value.double()) / spacing
        if way.abs().max() >= 1:
            return Verdict(f"{x:.6g} is rounded further than to its neighbours")
        if given.unique().numel() == 1:
            return Verdict(f"{x:.6g} is always rounded to {float(given[0]):.6g}")
        if abs(float(way.mean())) > 0.01:
            return Verdict(f"{x:.6g} is {float(way.mean()):+.2f} spacings off on average")
    return RIGHT


@checker
def check_hook(answer: Callable[[Tensor, Tensor, Tensor, int, int, float, float], None]) -> Verdict:
    """``answer(theta, m, g, t, k, lr, beta)`` changes θ [n] and m [n] in place."""
    generator = torch.Generator().manual_seed(0)
    k, lr, beta, n = 4, 0.1, 0.9, 6
    gradients = torch.randn(3 * k, n, generator=generator, dtype=torch.float64)
    theta, m = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    right_theta, right_m = theta.clone(), m.clone()
    for t, g in enumerate(gradients):
        answer(theta, m, g.clone(), t, k, lr, beta)
        if (t + 1) % k:
            if not torch.equal(theta, right_theta):
                return Verdict(f"θ moves at micro-batch {t}, which is not the last of {k}")
            continue
        right_m = beta * right_m + (1 - beta) * gradients[t + 1 - k : t + 1].mean(0)
        right_theta = right_theta - lr * right_m.sign()
        if not torch.allclose(m, right_m):
            return Verdict(f"after {t + 1} micro-batches m is not that of {(t + 1) // k} steps on the mean")
        if not torch.allclose(theta, right_theta):
            return Verdict(f"after {t + 1} micro-batches θ has not made {(t + 1) // k} steps")
    return RIGHT
