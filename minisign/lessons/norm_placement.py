"""Checkers of notebook 10."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minisign.lessons import RIGHT, Verdict, ask, checker

Function = Callable[[Tensor], Tensor]


def _attention(x: Tensor) -> Tensor:
    return x.roll(1, dims=-1) * 2


def _mlp(x: Tensor) -> Tensor:
    return x.square() - 1


def _norm1(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _norm2(x: Tensor) -> Tensor:
    return 3 * F.layer_norm(x, x.shape[-1:]) + 1


@checker
def check_post_norm_block(
    answer: Callable[[Tensor, Function, Function, Function, Function], Tensor],
) -> Verdict:
    """``answer(x, attention, mlp, norm1, norm2)`` → what a post-norm block makes of x [B, T, D]."""
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    given = ask(answer, x.clone(), _attention, _mlp, _norm1, _norm2)
    middle = _norm1(x + _attention(x))
    if torch.allclose(given, _norm2(middle + _mlp(middle)), atol=1e-5):
        return RIGHT
    before = x + _attention(_norm1(x))
    if torch.allclose(given, before + _mlp(_norm2(before)), atol=1e-5):
        return Verdict("this is a pre-norm block: the norms stand before attention and MLP")
    if torch.allclose(given, _norm2(middle + _mlp(x)), atol=1e-5):
        return Verdict("the MLP sees what came into the block, not what attention has made of it")
    return Verdict("a norm after each of the two sums, and nowhere else, gives another result")


@checker
def check_safe_rates(answer: Callable[[np.ndarray, float], int]) -> Verdict:
    """``answer(losses, margin)``, losses [rates, seeds] → rates at which every seed is within ``margin`` of
    the mean of the best rate."""
    losses = np.array([[5.0, 5.2], [4.0, 4.2], [4.2, 4.4], [4.1, 5.5], [4.0, np.inf], [np.inf, np.inf]])
    for margin, expected in ((0.05, 0), (0.15, 1), (0.35, 2), (1.5, 4)):
        given = ask(answer, losses, margin)
        if given != expected:
            return Verdict(
                f"of the rates with the losses {losses.tolist()}, {expected} are within {margin} nats of "
                f"4.1, the answer is {given}"
            )
    return RIGHT


@checker
def check_pre_norm(answer: Callable[[Tensor, Function, Function], Tensor]) -> Verdict:
    """``answer(x, attention, norm)`` → x and what attention makes of the normalized x."""
    x = 5 * torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    given = ask(answer, x.clone(), _attention, _norm1)
    if not torch.allclose(given, x + _attention(_norm1(x)), atol=1e-5):
        if torch.allclose(given - _attention(_norm1(x)), _norm1(x), atol=1e-5):
            size = float((given - _attention(_norm1(x))).square().mean().sqrt())
            return Verdict(
                f"a stream with an RMS of {float(x.square().mean().sqrt()):.1f} goes on with {size:.1f}"
            )
        return Verdict("the result is not x + attention(norm(x))")
    return RIGHT
