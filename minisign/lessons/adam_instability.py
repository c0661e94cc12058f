"""Checkers of notebook 13."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from minisign.lessons import RIGHT, Verdict, ask, checker
from minisign.probes import coming_update
from minisign.studies.instability import worst_jump


@checker
def check_jump(answer: Callable[[Sequence[float], int], float]) -> Verdict:
    """``answer(losses, window)`` → the largest rise of the mean over ``window`` losses above an earlier
    mean."""
    rng = np.random.default_rng(0)
    falling = (5 - 0.01 * np.arange(120)).tolist()
    spiked = [3.0] * 30 + [4.0] * 20 + [2.0] * 30 + [2.5] * 20
    noisy = (3 + 0.3 * rng.standard_normal(100)).tolist()
    for losses, window in ((falling, 10), (spiked, 10), (spiked, 1), (noisy, 5)):
        given = float(ask(answer, list(losses), window))
        expected = worst_jump(losses, start=0, window=window).size
        if abs(given - expected) > 1e-9:
            if abs(given - (max(losses) - min(losses))) < 1e-9:
                return Verdict(
                    "what the loss was before it had fallen is no jump: the rise is from an earlier mean"
                )
            return Verdict(
                f"of {len(losses)} losses with a window of {window} the jump is {expected:.3f}, "
                f"the answer is {given:.3f}"
            )
    return RIGHT


@checker
def check_spike(answer: Callable[[Sequence[float], float, float], bool]) -> Verdict:
    """``answer(losses, new, limit)`` → whether ``new`` is more than ``limit`` robust standard deviations
    above the median of ``losses``."""
    rng = np.random.default_rng(1)
    losses = (3 + 0.1 * rng.standard_normal(100)).tolist()
    median = float(np.median(losses))
    spread = 1.4826 * float(np.median(np.abs(np.array(losses) - median)))
    for shift, expected in ((4.5, False), (8.0, True), (-20.0, False)):
        if bool(ask(answer, losses, median + shift * spread, 6.0)) != expected:
            what = "a spike" if expected else "no spike"
            return Verdict(f"a loss {shift} deviations above the median, with a limit of 6, is {what}")
    spoiled = [9.0] * 30 + losses[30:]  # spikes among the old losses must not hide a new one
    if not ask(answer, spoiled, 5.0, 6.0):
        return Verdict(
            "thirty old spikes among the hundred losses hide a new one: are mean and deviation robust?"
        )
    return RIGHT


Saved = Mapping[str, Any]
Restore = Callable[[nn.Module, torch.optim.Optimizer, Saved], torch.optim.Optimizer]


@checker
def check_going_back(answer: Restore) -> Verdict:
    """``answer(model, optimizer, saved)`` → the optimizer to go on with, after ``model`` and it have gone
    back to ``saved``, their state dictionaries ``"model"`` and ``"optimizer"``."""
    model = nn.Linear(20, 10)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(steps: int) -> None:
        for _ in range(steps):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    train(50)
    saved = {"model": copy.deepcopy(model.state_dict()), "optimizer": copy.deepcopy(optimizer.state_dict())}
    weight = model.weight.detach().clone()
    train(5)
    optimizer = ask(answer, model, optimizer, copy.deepcopy(saved))
    if not torch.equal(model.weight, weight):
        return Verdict("the weights are not those of the checkpoint")
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    share = float((coming_update(optimizer, model.weight).ratio.abs() > 0.8).float().mean())
    if share > 0.5:
        return Verdict(f"in the first step after going back {share:.0%} of the weights have |r| > 0.8")
    moments = saved["optimizer"]["state"][0]["exp_avg"]
    if not torch.equal(optimizer.state[model.weight]["exp_avg"], moments):
        return Verdict("the momentum is not that of the checkpoint")
    return RIGHT
