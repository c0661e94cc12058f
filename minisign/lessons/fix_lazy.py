"""Checkers of notebook 05."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minisign.lessons import RIGHT, Verdict, ask, checker
from minisign.optim import Tiger

LazyStep = Callable[[Tensor, Tensor, Tensor, Tensor, float, float, float], object]
SparseStep = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], object]


@checker
def check_lazy_step(answer: LazyStep) -> Verdict:
    """``answer(w, m, g, rows, lr, beta, decay)``: a step of Tiger's base form, in place, on weights w
    [V, D] and momentum m [V, D] with the gradient g [V, D], on the given rows [U] alone."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    m, start = torch.zeros_like(w), w.clone()
    p = torch.nn.Parameter(w.clone())
    optimizer = Tiger([{"params": [p], "lazy": "grad"}], lr=0.1, beta=0.9, weight_decay=0.5, scale=1.0)
    for step in range(20):
        rows = torch.tensor([step % 5, 2]).unique()
        g = torch.zeros_like(w)
        g[rows] = torch.randn(len(rows), 3, generator=generator, dtype=torch.float64)
        answer(w, m, g, rows, 0.1, 0.9, 0.5)
        p.grad = g
        optimizer.step()
        if not torch.equal(w[5], start[5]):
            return Verdict("row 5, whose token never appears, has moved")
        if not torch.allclose(w, p.detach()):
            row = int((w - p.detach()).abs().sum(1).argmax())
            return Verdict(f"after {step + 1} steps row {row} is not where lazy Tiger has it")
    return RIGHT


@checker
def check_sparse_step(answer: SparseStep) -> Verdict:
    """``answer(w, m, rows, values, lr, beta)``: a step of signSGD with momentum, in place, for the
    gradients ``values`` [n, D] of ``rows`` [n], among which a row may stand more than once."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    m = torch.zeros_like(w)
    p = torch.nn.Parameter(w.clone())
    optimizer = Tiger([p], lr=0.1, beta=0.9, weight_decay=0.0, scale=1.0)
    for rows in (torch.tensor([0, 3]), torch.tensor([1, 1, 4]), torch.tensor([2, 0, 2, 2])):
        values = torch.randn(len(rows), 2, generator=generator, dtype=torch.float64)
        answer(w, m, rows, values, 0.1, 0.9)
        p.grad = torch.sparse_coo_tensor(rows[None], values, p.shape, check_invariants=False)
        optimizer.step()
        if not torch.allclose(w, p.detach()):
            return Verdict(f"with the rows {rows.tolist()} it goes elsewhere than the sum of the gradients")
    return RIGHT


@checker
def check_traffic(answer: Callable[[int, int, int], tuple[int, int]]) -> Verdict:
    """``answer(rows, touched, width)`` → bytes that a step of Tiger in float32 moves, dense and lazily."""
    for rows, touched, width in ((50_000, 500, 768), (10, 10, 4)):
        given = tuple(ask(answer, rows, touched, width))
        expected = (20 * rows * width, 20 * touched * width)
        if given != expected:
            return Verdict(
                f"with {rows:,} rows of {width} entries, {touched:,} of them touched, a step moves "
                f"{expected[0]:,} bytes, or {expected[1]:,}; the answer is {given[0]:,} and {given[1]:,}"
            )
    return RIGHT
