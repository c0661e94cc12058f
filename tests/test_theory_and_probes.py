"""Closed forms against the optimizers themselves, probes against cases with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from minisign import Lion, Tiger, theory
from minisign.probes import extremes, row_rms, saturation


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_envelope_is_attained_by_a_constant_sign(weight_decay: float) -> None:
    p = nn.Parameter(torch.full((1, 1), 0.3, dtype=torch.float64))
    optimizer = Lion([p], lr=0.1, weight_decay=weight_decay)
    etas = [0.1 / (1 + t) for t in range(40)]
    found = []
    for eta in etas:
        optimizer.param_groups[0]["lr"] = eta
        p.grad = -torch.ones_like(p)
        optimizer.step()
        found.append(p.item())
    np.testing.assert_allclose(found, theory.envelope(etas, weight_decay, 0.3), rtol=1e-12)


def test_envelope_at_a_constant_step() -> None:
    t = np.arange(1, 1000)
    closed = 100 * (1 - (1 - 0.01 * 0.05) ** t)
    np.testing.assert_allclose(theory.envelope(np.full(999, 0.05), 0.01), closed, rtol=1e-12)


def test_logistic_growth_of_a_row_under_tigers_step() -> None:
    p = nn.Parameter(torch.full((1, 8), 0.02, dtype=torch.float64))
    optimizer = Tiger([p], lr=1e-3, weight_decay=0.01, scale="row_rms")
    found = []
    for _ in range(14_000):
        p.grad = -torch.ones_like(p)
        optimizer.step()
        found.append(p[0, 0].item())
    expected = theory.logistic_growth(np.full(14_000, 1e-3), 0.01, 0.02)
    np.testing.assert_allclose(found, expected, rtol=6e-3)  # the differential equation's error, O(α)
    assert found[-1] > 99


def test_bound() -> None:
    assert theory.bound(0.01) == 100
    assert theory.bound(0.0) == math.inf


def test_saturation_on_a_known_matrix() -> None:
    weight = torch.zeros(5, 4)
    weight[0] = torch.tensor([100.0, -100.0, 79.0, 81.0])  # seen twice: three of four near the bound
    weight[1] = 99.0  # never seen: does not count
    weight[2] = torch.tensor([0.0, 0.0, 0.0, 90.0])  # seen 300 times
    weight[3] = -95.0  # seen four times: neither rare nor frequent
    found = saturation(weight, np.array([2, 0, 300, 4, 3]), 100.0)
    assert found.embedding_max == 100.0
    assert found.embedding_min == -100.0
    assert found.rare_saturated == 3 / 8
    assert found.frequent_saturated == 1 / 4
    assert math.isnan(saturation(weight, np.zeros(5, dtype=int), 100.0).rare_saturated)


def test_small_probes() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, -1.0]])
    assert extremes(weight) == (-1.0, 4.0)
    np.testing.assert_allclose(row_rms(weight), [12.5**0.5, 0.5**0.5])
