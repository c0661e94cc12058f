"""The fused back ends against the plain optimizers: the same numbers, whatever computes them.

Where a back end may differ from the plain step in float32, and why:

    RMS form of Tiger      the squares are added up in another order, so η differs by one unit in its last
                           place, and θ by at most one unit in the last place of the larger of θ and η
    AdamW                  torch takes roots by a vector library that errs by one such unit in a fifth of all
                           cases; the kernels round them properly
    processors without a   torch's interpolation rounds twice there
    fused multiply-add

Everything else is equal bit for bit, and the C++ step and the interpreted Triton kernel always are.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minisign import AdamW, Lion, Signum, Tiger, kernels, track_rows
from minisign.kernels import cpu
from minisign.kernels.rule import LION, Item, Launch, Rule
from minisign.optim.rows import recorded_rows

ROOT = Path(__file__).resolve().parents[1]
STEPS = 50
HAS_FMA = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
BACKENDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "foreach": {"foreach": True},
    "cpu": {"fused": "cpu"},
    "interpreted": {"fused": "triton"},
}
if torch.cuda.is_available():
    BACKENDS["cuda"] = {"fused": True}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "signum": (Signum, dict(lr=1e-2, beta=0.9, weight_decay=0.1)),
    "signsgd": (Signum, dict(lr=1e-2, beta=0.0, maximize=True)),
    "lion": (Lion, dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)),
    "lion, short": (Lion, dict(lr=1e-2, betas=(0.3, 0.4), weight_decay=0.5, maximize=True)),
    "tiger, base": (Tiger, dict(lr=1e-2, scale=1.0, shrink=0.9)),
    "tiger, no guard": (Tiger, dict(lr=1e-2, scale=0.3, shrink=None)),
    "tiger, micro-batches": (Tiger, dict(lr=1e-2, scale=1.0, accumulate=3)),
    "tiger": (Tiger, dict(lr=1e-2)),
    "tiger, rows": (Tiger, dict(lr=1e-2, scale="row_rms", beta=0.8)),
    "adamw": (AdamW, dict(lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1)),
}
LAZY = [name for name in CASES if name not in ("tiger", "tiger, micro-batches", "signsgd", "lion, short")]
ROUGH = {"tiger", "tiger, rows", "adamw"}
SHAPES = [(7, 5), (6,), (), (0, 3), (3, 2, 2)]


def exact(case: str, backend: str) -> bool:
    return backend == "foreach" or (case not in ROUGH and HAS_FMA and backend != "cuda")


class Run:
    """Parameters and an optimizer, with gradients that follow from the number of the step alone."""

    def __init__(self, case: str, backend: str, dtype: torch.dtype, lazy: Any = False, **options: Any) -> None:
        cls, own = CASES[case]
        self.device = "cuda" if backend == "cuda" else "cpu"
        generator = torch.Generator().manual_seed(1)
        shapes = SHAPES[:1] if lazy else SHAPES
        values = [torch.randn(shape, generator=generator).to(self.device, dtype) for shape in shapes]
        self.embedding = nn.Embedding.from_pretrained(values[0], freeze=False) if lazy else None
        self.params = [nn.Parameter(v) for v in values] if not lazy else [self.embedding.weight]  # type: ignore[union-attr]
        self.handle = track_rows(self.embedding) if lazy == "ids" else None  # type: ignore[arg-type]
        given = {} if lazy == "sparse" else {"lazy": lazy}
        self.optimizer = cls(self.params, **own, **given, **BACKENDS[backend], **options)
        self.lazy, self.cls = lazy, cls

    def step(self, t: int) -> None:
        generator = torch.Generator().manual_seed(100 + t)
        for p in self.params:
            g = torch.randn(p.shape, generator=generator)
            g = g * (torch.rand(p.shape, generator=generator) > 0.2)
            if self.lazy:
                rows = (torch.rand(len(p), generator=generator) > 0.5).nonzero().squeeze(1)
                g = torch.zeros_like(g).index_copy(0, rows, g[rows])
            if t % 7 == 3 and g.numel() > 1 and self.cls is Tiger and CASES_GUARD[self.optimizer]:
                g.view(-1)[g.numel() // 2] = math.nan if t % 2 else math.inf
            g = g.to(self.device, p.dtype)
            if self.lazy == "ids":
                recorded_rows(p)[g.ne(0).any(1)] = True
            if self.lazy == "sparse":
                rows = g.ne(0).any(1).nonzero().squeeze(1)
                twice = torch.cat([rows, rows])  # a token that is there twice
                g = torch.sparse_coo_tensor(
                    twice[None], torch.cat([g[rows] / 2, g[rows] / 2]), p.shape, check_invariants=False
                )
            p.grad = g
        self.optimizer.step()

    def values(self) -> list[torch.Tensor]:
        return [p.detach().cpu().clone() for p in self.params]

    def buffers(self) -> list[torch.Tensor]:
        state = self.optimizer.state
        return [state[p][name].cpu().clone() for p in self.params for name in self.cls.buffers if p in state]

    def become(self, other: Run) -> None:
        """Takes over the other's parameters and state, as a resumed run does."""
        with torch.no_grad():
            for p, q in zip(self.params, other.params, strict=True):
                p.copy_(q)
        self.optimizer.load_state_dict(saved(other.optimizer, self.optimizer))


class _Guard:
    """Whether an optimizer looks for NaN: without that there is no sense in giving it any."""

    def __getitem__(self, optimizer: Any) -> bool:
        return optimizer.defaults["shrink"] is not None


CASES_GUARD = _Guard()


def saved(optimizer: Any, target: Any) -> Any:
    """Its state_dict, by way of a file, for an optimizer whose back end is another."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for group, own in zip(state["param_groups"], target.param_groups, strict=True):
        group.update({name: own[name] for name in ("foreach", "fused")})
    return state


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_within_an_ulp(found: list[torch.Tensor], expected: list[torch.Tensor], step: float) -> None:
    """Of the larger of an entry and a step, in the entry's own dtype."""
    for a, b in zip(found, expected, strict=True):
        ulp = torch.finfo(a.dtype).eps * torch.maximum(b.float().abs(), torch.tensor(step))
        assert bool(((a.float() - b.float()).abs() <= ulp).all()), (a.float() - b.float()).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("case", "backend"), [x for x in itertools.product(CASES, BACKENDS) if x[1] != "plain"])
def test_the_same_step(case: str, backend: str, dtype: torch.dtype) -> None:
    plain, other = Run(case, "plain", dtype), Run(case, backend, dtype)
    for t in range(STEPS if backend != "interpreted" or dtype == torch.float32 else 12):
        plain.step(t)
        other.step(t)
        if exact(case, backend):
            assert_equal(other.values() + other.buffers(), plain.values() + plain.buffers())
        else:
            assert_within_an_ulp(other.values(), plain.values(), step=1e-2)
            other.become(plain)


@pytest.mark.parametrize("lazy", ["grad", "ids", "sparse"])
@pytest.mark.parametrize(
    ("case", "backend"), [x for x in itertools.product(LAZY, BACKENDS) if x[1] not in ("plain", "foreach")]
)
def test_the_same_rows(case: str, backend: str, lazy: str) -> None:
    plain, other = Run(case, "plain", torch.float32, lazy), Run(case, backend, torch.float32, lazy)
    for t in range(STEPS if backend != "interpreted" else 15):
        before = other.values() + other.buffers()
        plain.step(t)
        other.step(t)
        after = other.values() + other.buffers()
        if exact(case, backend):
            assert_equal(after, plain.values() + plain.buffers())
        else:
            assert_within_an_ulp(other.values(), plain.values(), step=1e-2)
        g = plain.params[0].grad
        absent = ~g.to_dense().ne(0).any(1)
        for a, b in zip(after, before, strict=False):
            assert torch.equal(a[absent], b[absent])
        if not exact(case, backend):
            other.become(plain)


@pytest.mark.parametrize("case", CASES)
def test_interpreted_is_compiled(case: str) -> None:
    """The two kernels hold the same arithmetic: equal to the last bit where both differ from torch."""
    one, two = Run(case, "cpu", torch.float32), Run(case, "interpreted", torch.float32)
    for t in range(12):
        one.step(t)
        two.step(t)
    assert_equal(one.values() + one.buffers(), two.values() + two.buffers())


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(BACKENDS, 2)))
@pytest.mark.parametrize("case", ["lion", "tiger, micro-batches", "adamw"])
def test_resume_in_another(case: str, first: str, second: str) -> None:
    through = Run(case, first, torch.float32)
    for t in range(10):
        through.step(t)
    resumed = Run(case, second, torch.float32)
    resumed.become(through)
    for t in range(10, 20):
        through.step(t)
        resumed.step(t)
    if exact(case, first) and exact(case, second):
        assert_equal(resumed.values() + resumed.buffers(), through.values() + through.buffers())
    else:
        for a, b in zip(resumed.values(), through.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert [type(v) for v in resumed.optimizer.state_dict()["state"][0].values()] == [
        type(v) for v in through.optimizer.state_dict()["state"][0].values()
    ]
