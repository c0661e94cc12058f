"""Every optimizer, option and form against NumPy in float64: 50 steps with λ > 0, gradients that change
sign, exact zeros, all-zero rows, 0-dim, empty and non-contiguous tensors, NaN and Inf micro-batches."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle
from torch import nn

from minisign import AdamW, Lion, Signum, Tiger, track_rows

STEPS = 50
CASES: list[tuple[str, type, dict[str, Any]]] = [
    ("signum", Signum, dict(lr=1e-2, beta=0.9, weight_decay=0.1)),
    ("signum", Signum, dict(lr=1e-2, beta=0.0, weight_decay=0.1)),
    ("signum", Signum, dict(lr=1e-2, beta=0.3, weight_decay=0.0, maximize=True)),
    ("lion", Lion, dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.5)),
    ("lion", Lion, dict(lr=1e-2, betas=(0.0, 0.5), weight_decay=0.1, maximize=True)),
    ("adamw", AdamW, dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)),
    ("adamw", AdamW, dict(lr=1e-2, betas=(0.0, 0.9), eps=1e-3, weight_decay=0.0, maximize=True)),
    *(
        ("tiger", Tiger, dict(lr=1e-2, beta=b, weight_decay=0.1, scale=scale, accumulate=k, maximize=up))
        for scale, (b, k, up) in itertools.product(
            ("rms", "row_rms", 1.0, 0.3), ((0.965, 1, False), (0.9, 3, True), (0.0, 2, False))
        )
    ),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in o.items() if k not in ('lr',))}" for name, _, o in CASES]
SHAPES = [(7, 5), (4, 3, 2), (6,), (), (0, 3), (5, 0)]


def full(name: str, options: dict[str, Any]) -> dict[str, Any]:
    tiger = dict(accumulate=1, shrink=0.99, center=0.0) if name == "tiger" else {}
    return {**tiger, **options}


def gradients(shape: tuple[int, ...], seed: int, bad: bool = False) -> list[np.ndarray]:
    """50 gradients of both signs, with exact zeros and all-zero rows; ``bad`` ones hold NaN or Inf."""
    random = np.random.RandomState(seed)
    out = []
    for t in range(STEPS):
        g = random.randn(*shape) if shape else np.array(random.randn())
        g = np.where(random.rand(*shape) < 0.2, 0.0, g)
        if len(shape) >= 2 and g.size:
            g[random.rand(shape[0]) < 0.5] = 0.0
        if bad and g.size and t % 7 in (2, 5):
            g = np.array(g)
            g.reshape(-1)[random.randint(g.size)] = (np.nan, np.inf, -np.inf)[t % 3]
        out.append(g)
    return out


def parameter(array: np.ndarray, dtype: torch.dtype, strided: bool = False) -> nn.Parameter:
    tensor = torch.tensor(array, dtype=dtype)
    if strided and tensor.dim() >= 2:
        tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        assert tensor.numel() == 0 or not tensor.is_contiguous()
    return nn.Parameter(tensor)


def compare(p: torch.Tensor, oracle: Oracle) -> None:
    found = p.detach().double().numpy()
    if p.dtype == torch.float64:
        np.testing.assert_allclose(found, oracle.theta, rtol=1e-12, atol=1e-12)
        return
    sure = ~oracle.doubtful
    assert (~sure).sum() <= 1e-3 * max(sure.size, 1)  # counted apart, and next to none
    np.testing.assert_allclose(found[sure], oracle.theta[sure], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("name", "cls", "options"), CASES, ids=IDS)
def test_all_shapes(name: str, cls: Any, options: Any, dtype: torch.dtype, foreach: bool) -> None:
    random = np.random.RandomState(1)
    starts = [0.5 * random.randn(*shape) for shape in SHAPES] + [np.zeros((3, 4))]
    shapes = [*SHAPES, (3, 4)]
    ps = [parameter(np.asarray(s), dtype, strided=i == 0) for i, s in enumerate(starts)]
    oracles = [Oracle(name, p.detach().numpy(), **full(name, options)) for p in ps]
    optimizer = cls(ps, **options, foreach=foreach)
    steps = [gradients(shape, seed) for seed, shape in enumerate(shapes)]
    for t in range(STEPS):
        for p, oracle, gs in zip(ps, oracles, steps, strict=True):
            p.grad = torch.tensor(gs[t], dtype=dtype)
            oracle.step(p.grad.double().numpy())
        optimizer.step()
        for p, oracle in zip(ps, oracles, strict=True):
            compare(p, oracle)
    assert all(
        (p.detach() != torch.tensor(s, dtype=dtype)).any() or not p.numel()
        for p, s in zip(ps, starts, strict=True)
    )


@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("scale", ["rms", "row_rms", 1.0])
@pytest.mark.parametrize("center", [0.0, 1.0])
def test_tiger_not_finite(
    scale: Any, accumulate: int, center: float, dtype: torch.dtype, foreach: bool
) -> None:
    options = dict(
        lr=1e-2, beta=0.9, weight_decay=0.1, scale=scale, accumulate=accumulate, shrink=0.9, center=center
    )
    start = np.random.RandomState(2).randn(7, 5)
    p = parameter(start, dtype)
    oracle = Oracle("tiger", p.detach().numpy(), **options)
    group = {"params": [p], "center": options.pop("center")}
    optimizer = Tiger([group], **options, foreach=foreach)
    for g in gradients((7, 5), 3, bad=True):
        p.grad = torch.tensor(g, dtype=dtype)
        oracle.step(p.grad.double().numpy())
        optimizer.step()
        assert torch.isfinite(p).all()
        compare(p, oracle)


@pytest.mark.parametrize("momentum", ["freeze", "decay"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("lazy", ["grad", "ids"])
@pytest.mark.parametrize(("name", "cls", "options"), CASES, ids=IDS)
def test_lazy(name: str, cls: Any, options: Any, lazy: str, dtype: torch.dtype, momentum: str) -> None:
    embedding = nn.Embedding(7, 5, dtype=dtype)
    p = embedding.weight
    options = {**options, "lazy": lazy, "lazy_momentum": momentum}
    oracle = Oracle(name, p.detach().numpy(), **full(name, options))
    handle = track_rows(embedding)
    optimizer = cls([p], **options)
    random = np.random.RandomState(5)
    for g in gradients((7, 5), 4):
        rows = random.choice(7, 3, replace=False)
        embedding(torch.from_numpy(rows))
        if lazy == "ids":  # of rows that were looked up, some have a gradient of zero
            g[np.setdiff1d(np.arange(7), rows)] = 0.0
        p.grad = torch.tensor(g, dtype=dtype)
        oracle.step(p.grad.double().numpy())
        optimizer.step()
        compare(p, oracle)
        m = optimizer.state[p][cls.buffers[0]].double().numpy()
        near = 1e-12 if dtype == torch.float64 else 1e-6
        np.testing.assert_allclose(m, oracle.m, rtol=near, atol=near)
    handle.remove()
