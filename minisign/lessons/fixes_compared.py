"""Checkers of notebook 08."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from minisign.doctor.repair import reset_rows
from minisign.lessons import RIGHT, Verdict, ask, checker
from minisign.optim import AdamW, Hybrid, Tiger


@checker
def check_paired(answer: Callable[[np.ndarray, np.ndarray], tuple[float, float]]) -> Verdict:
    """``answer(a, b)`` → mean of b − a over runs [seeds] with the same seeds, and the standard error of
    that mean."""
    generator = np.random.RandomState(0)
    for runs in (3, 6, 40):
        shared = 5 * generator.normal(size=runs)  # what two runs of the same seed have in common
        a = shared + 0.1 * generator.normal(size=runs)
        b = shared + 0.3 + 0.1 * generator.normal(size=runs)
        mean, error = ask(answer, a, b)
        difference = b - a
        if not np.isclose(mean, difference.mean()):
            return Verdict(f"the mean of b − a is {difference.mean():.4f}, the answer is {mean:.4f}")
        expected = difference.std(ddof=1) / np.sqrt(runs)
        if np.isclose(error, np.hypot(a.std(ddof=1), b.std(ddof=1)) / np.sqrt(runs)):
            return Verdict(
                f"{error:.2f} is the error for runs that have nothing to do with each other; "
                f"these share their seeds, and it is {expected:.2f}"
            )
        if not np.isclose(error, expected):
            return Verdict(
                f"of {runs} runs the standard error is {expected:.4f}, the answer is {error:.4f}"
            )
    return RIGHT


@checker
def check_rescale(answer: Callable[[Tensor, Tensor], object]) -> Verdict:
    """``answer(weight, rows)``: scales the rows [V], boolean, of the embedding [V, D] to the median RMS of
    all others, in place."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator)
    rows = torch.zeros(50, dtype=torch.bool)
    rows[[3, 17, 40]] = True
    weight[rows] = 99 * weight[rows].sign()
    weight[5] *= 100  # large, yet not one of them: a mean would follow it, a median does not
    given, expected = weight.clone(), weight.clone()
    answer(given, rows)
    reset_rows(expected, rows, "rescale")
    if not torch.equal(given[~rows], weight[~rows]):
        return Verdict("a healthy row has changed")
    if not torch.equal(given[rows].sign(), weight[rows].sign()):
        return Verdict("a row has lost its pattern of signs")
    if not torch.allclose(given, expected):
        size, right = (float(w[3].square().mean().sqrt()) for w in (given, expected))
        return Verdict(f"row 3 has an RMS of {size:.3g} where the healthy rows' median is {right:.3g}")
    return RIGHT


@checker
def check_set_rates(answer: Callable[[torch.optim.Optimizer, float, float], object]) -> Verdict:
    """``answer(optimizer, lr, factor)``, called before each step: sets the rate of each group to ``factor``
    times what it was at the start; ``lr`` is Tiger's."""
    weights = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
    rest = [{"params": [weights[1]]}, {"params": [weights[2]], "lr": 0.001}]
    optimizer = Hybrid(AdamW([weights[0]], lr=0.003), Tiger(rest, lr=0.016))
    names: Sequence[str] = ("AdamW's group", "Tiger's group", "Tiger's second group")
    base = (0.003, 0.016, 0.001)
    for step, factor in enumerate((0.1, 0.5, 1.0, 1.0, 0.2)):
        answer(optimizer, 0.016, factor)
        for name, group, lr in zip(names, optimizer.param_groups, base, strict=True):
            if not np.isclose(group["lr"], factor * lr):
                return Verdict(
                    f"at step {step}, with a factor of {factor}, {name} has a rate of {group['lr']:.3g} "
                    f"and began with {lr}"
                )
    return RIGHT
