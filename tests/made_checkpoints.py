"""Matrices as a model might hold them, healthy and saturated, each made from a number: what ``minisign
inspect`` is tried on. The detector was written with those of the families in DEVELOPMENT at hand; the tests
judge it on other numbers and on all families.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Made:
    """A matrix [V, D], which of its rows were put at a bound, and λ (None where there is none to know)."""

    family: str
    weight: Tensor
    rows: Tensor  # [V], boolean
    weight_decay: float | None


Healthy = Callable[[np.random.Generator, int, int], Tensor]
HEALTHY: dict[str, Healthy] = {}
DEVELOPMENT = (
    *(
        "normal",
        "unequal rows",
        "heavy tails",
        "uniform",
        "outlier columns",
        "padded",
        "truncated",
        "sines",
    ),
)


def family(name: str) -> Callable[[Healthy], Healthy]:
    def enter(make: Healthy) -> Healthy:
        HEALTHY[name] = make
        return make

    return enter


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


@family("normal")
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    return normal(rng, v, d)


@family("unequal rows")  # as Adam leaves them: some rows ten times as large as others
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    return normal(rng, v, d) * torch.exp(normal(rng, v, 1) * rng.uniform(0.1, 1.0))


@family("heavy tails")
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    return torch.from_numpy(rng.standard_t(rng.uniform(2.5, 6), (v, d)).astype(np.float32))


@family("uniform")
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    return torch.from_numpy(rng.uniform(-1, 1, (v, d)).astype(np.float32))


@family("outlier columns")  # RoBERTa's and GPT-2's: a few features that are large in all rows
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    w = normal(rng, v, d)
    for j in rng.choice(d, size=max(1, d // 50) + int(rng.integers(3)), replace=False):
        w[:, j] = w[:, j] * rng.uniform(0.2, 2) + rng.choice([-1, 1]) * rng.uniform(5, 20)
    return w


@family("padded")  # rows that were never used: zero, or all alike
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    w = normal(rng, v, d)
    w[int(v * 0.9) :] = 0 if rng.random() < 0.5 else w[:1] + 0.01 * normal(rng, v - int(v * 0.9), d)
    return w


@family("truncated")
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    end = rng.uniform(1.5, 3)
    return torch.nn.init.trunc_normal_(
        torch.empty(v, d), a=-end, b=end, generator=torch.Generator().manual_seed(int(rng.integers(2**31)))
    )


@family("sines")
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    d += d % 2
    angle = torch.arange(v)[:, None] * 10000 ** (-torch.arange(0, d, 2) / d)
    parts = (angle.sin(), angle.cos())
    return torch.cat(parts, 1) if rng.random() < 0.5 else torch.stack(parts, 2).flatten(1)


@family("Laplace")
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    return torch.from_numpy(rng.laplace(size=(v, d)).astype(np.float32))


@family("low rank")
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    rank = int(rng.integers(1, 8))
    return normal(rng, v, rank) @ normal(rng, rank, d) + 0.05 * normal(rng, v, d)


@family("orthogonal columns")
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    return torch.linalg.qr(normal(rng, max(v, d), d))[0]


@family("rows of length one")
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    return F.normalize(normal(rng, v, d))


@family("common mode")  # every row is one row and a little of its own
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    return normal(rng, 1, d) * rng.uniform(1, 5) + normal(rng, v, d) * rng.uniform(0.1, 1)


@family("copies")  # tokens that were hardly ever seen share a row, here a large one
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    w = normal(rng, v, d)
    count = int(v * rng.uniform(0.01, 0.3))
    w[rng.choice(v, count, replace=False)] = normal(rng, 1, d) * rng.uniform(0.5, 8)
    return w + 0.001 * normal(rng, v, d)


@family("eight bits")
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    w = normal(rng, v, d) * torch.exp(normal(rng, v, 1) * 0.3)
    scale = w.abs().amax(1, keepdim=True) if rng.random() < 0.5 else w.abs().max()
    return torch.round(w / scale * 127) / 127 * scale


@family("helix")  # learned positions
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    w = 0.05 * normal(rng, v, d)
    angle = torch.arange(v) / v * rng.uniform(2, 30)
    for j in range(0, max(2, d // 40), 2):
        w[:, j], w[:, j + 1] = angle.sin() * (j + 1), angle.cos() * (j + 1)
    return w


@family("one large row")
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    w = normal(rng, v, d)
    w[int(rng.integers(v))] *= rng.uniform(3, 30)
    return w


@family("mostly zero")
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    return normal(rng, v, d) * (normal(rng, v, d) > 1)


@family("new tokens")  # a vocabulary that was extended by rows of another, flat start
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    w = normal(rng, v, d)
    count = int(v * rng.uniform(0.005, 0.2)) + 1
    w[-count:] = torch.from_numpy(rng.uniform(-1, 1, (count, d)).astype(np.float32)) * rng.uniform(1, 20)
    return w


@family("trained with Adam")  # a bigram model on words by Zipf's law
def _(rng: np.random.Generator, v: int, d: int) -> Tensor:
    v, d = min(v, 1000), min(d, 64)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    share = 1 / torch.arange(1, v + 1)
    inner = torch.nn.Parameter(torch.randn(v, d, generator=generator) * 0.02)
    outer = torch.nn.Parameter(torch.randn(v, d, generator=generator) * 0.02)
    successor = torch.randperm(v, generator=generator)
    optimizer = torch.optim.AdamW([inner, outer], lr=rng.choice([1e-3, 1e-2]), weight_decay=0.1)
    for _ in range(150):
        ids = torch.multinomial(share, 256, replacement=True, generator=generator)
        loss = F.cross_entropy(inner[ids] @ outer.T, successor[ids])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (inner if rng.random() < 0.5 else outer).detach()


def shape(rng: np.random.Generator) -> tuple[int, int]:
    return int(2 ** rng.uniform(8, 12.5)), int(rng.choice([16, 32, 48, 64, 100, 128, 256, 512]))


def healthy(number: int, families: tuple[str, ...] = ()) -> Made:
    """A matrix without rows at a bound."""
    rng = np.random.default_rng([1, number])
    names = families or tuple(HEALTHY)
    name = names[number % len(names)]
    w = HEALTHY[name](rng, *shape(rng))
    w = w * 10 ** rng.uniform(-2.5, 1)
    dtype = DTYPES[int(rng.integers(3))]
    return Made(name, w.to(dtype).contiguous(), torch.zeros(len(w), dtype=torch.bool), None)


def saturated(number: int, families: tuple[str, ...] = ()) -> Made:
    """A healthy matrix in which half a percent of the rows or more were put at ±1/λ."""
    rng = np.random.default_rng([2, number])
    names = [n for n in families or tuple(HEALTHY) if n != "sines"]
    name = names[number % len(names)]
    w = HEALTHY[name](rng, *shape(rng))
    v, d = w.shape
    weight_decay = float(10 ** rng.uniform(-2, 0))
    bound = 1 / weight_decay
    w = w / w.abs().max() * bound * rng.uniform(0.005, 0.7)
    count = max(math.ceil(0.005 * v), int(v * rng.choice([0.005, 0.01, 0.05, 0.3, 1.0])))
    rows = torch.zeros(v, dtype=torch.bool)
    rows[rng.choice(v, count, replace=False)] = True
    signs = torch.where(normal(rng, count, d) > 0, 1.0, -1.0)
    kind = ("all", "part", "one sign", "alike", "stationary")[int(rng.integers(5))]
    arrived = bound * (
        1 - rng.uniform(0, 0.05) * torch.from_numpy(rng.random((count, d), dtype=np.float32))
    )
    if kind == "alike":
        signs = signs[:1].expand(count, d)
    if kind == "one sign":
        signs = torch.full_like(signs, rng.choice([-1.0, 1.0]))
    new = signs * arrived
    if kind in ("part", "one sign"):  # the other components are as they were
        part = torch.from_numpy(rng.random((count, d)) < rng.uniform(0.2, 1.0))
        part[:, : math.ceil(0.15 * d)] |= part.float().mean(1, keepdim=True) < 0.15
        new = torch.where(part, new, w[rows])
    if kind == "stationary":
        a = 1 / (2 * rng.uniform(1.5, 20))
        new = bound * (2 * torch.from_numpy(rng.beta(a, a, (count, d)).astype(np.float32)) - 1)
    w[rows] = new
    dtype = DTYPES[int(rng.integers(3))]
    return Made(f"{name}, {kind}", w.to(dtype).contiguous(), rows, weight_decay)
