"""The fused back ends against the plain optimizers: the same numbers, whatever computes them.

Where a back end may differ from the plain step in float32, and why:

    RMS form of Tiger      the squares are added up in another order, so η differs by one unit in its last
                           place, and θ by at most one unit in the last place of the larger of θ and η (by
                           four where torch adds them up one by one, on the oldest x86 processors)
    AdamW                  torch takes roots by a vector library that errs by one such unit in a fifth of
                           all cases; the kernels round them properly

Everything else is equal bit for bit, and the C++ step and the interpreted Triton kernel always are.
"""

from __future__ import annotations

import copy
import gc
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from minisign import AdamW, Lion, Signum, Tiger, kernels, track_rows
from minisign.engine import fused as road
from minisign.engine.rows import recorded_rows
from minisign.kernels import cpu
from minisign.kernels.table import FMA_ON_CPU, Call, Form, Item, launches

ROOT = Path(__file__).resolve().parents[1]
STEPS = 50
BACKENDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "foreach": {"foreach": True},
    "cpu": {"fused": "cpu"},
}
ON_CPU = ["cpu"]
if os.environ["TRITON_INTERPRET"] == "1":
    BACKENDS["interpreted"] = {"fused": "triton"}
    ON_CPU.append("triton")
elif torch.cuda.is_available():
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
    return backend == "foreach" or (case not in ROUGH and backend != "cuda")


class Run:
    """Parameters and an optimizer, with gradients that follow from the number of the step alone."""

    def __init__(
        self, case: str, backend: str, dtype: torch.dtype, lazy: Any = False, **options: Any
    ) -> None:
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
            if t % 7 == 3 and g.numel() > 1 and self.optimizer.defaults.get("shrink") is not None:
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
        return [
            state[p][name].cpu().clone() for p in self.params for name in self.cls.buffers if p in state
        ]

    def become(self, other: Run) -> None:
        """Takes over the other's parameters and state, as a resumed run does."""
        with torch.no_grad():
            for p, q in zip(self.params, other.params, strict=True):
                p.copy_(q)
        file = io.BytesIO()
        torch.save(other.optimizer.state_dict(), file)
        file.seek(0)
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))


def step_lion(fused: str, item: Item, **numbers: float) -> None:
    """One step of the kernel, on a line of a table that the test has made."""
    program = road.program_of(road.Part(Lion.rule, tuple(numbers.items()), ()), counts=False)
    ((launch, _),) = launches([(item, None)], guard=False, rounded=False)
    back_end = kernels.backend(fused, item.p.device)
    back_end.step(program, launch, Call(program.evaluate(**numbers)), {})


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_within_an_ulp(found: list[torch.Tensor], expected: list[torch.Tensor], step: float) -> None:
    """Of the larger of an entry and a step, in the entry's own dtype."""
    for a, b in zip(found, expected, strict=True):
        ulp = torch.finfo(a.dtype).eps * torch.maximum(b.float().abs(), torch.tensor(step))
        ulp = ulp if FMA_ON_CPU else 4 * ulp
        assert bool(((a.float() - b.float()).abs() <= ulp).all()), (a.float() - b.float()).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("case", "backend"), [x for x in itertools.product(CASES, BACKENDS) if x[1] != "plain"]
)
def test_the_same_step(case: str, backend: str, dtype: torch.dtype) -> None:
    plain, other = Run(case, "plain", dtype), Run(case, backend, dtype)
    # The interpreter is slow: NaN or inf at each of the three micro-batches, and in half precision at one.
    # Longer, it is compared with the C++, which is compared with the plain step.
    for t in range(STEPS if backend != "interpreted" else 21 if dtype == torch.float32 else 8):
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
    for t in range(STEPS if backend != "interpreted" else 8):
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
    one, two = Run(case, "cpu", torch.float32), Run(case, list(BACKENDS)[-1], torch.float32)
    for t in range(12):
        one.step(t)
        two.step(t)
    assert_equal(one.values() + one.buffers(), two.values() + two.buffers())


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(BACKENDS, 2)))
@pytest.mark.parametrize("case", ["lion", "tiger, micro-batches", "adamw"])
def test_resume_in_another(case: str, first: str, second: str) -> None:
    through = Run(case, first, torch.float32)
    for t in range(8):  # in the midst of Tiger's micro-batches
        through.step(t)
    resumed = Run(case, second, torch.float32)
    resumed.become(through)
    for t in range(8, 13):  # with a gradient that is not finite, and the ends of two accumulations
        through.step(t)
        resumed.step(t)
    if exact(case, first) and exact(case, second):
        assert_equal(resumed.values() + resumed.buffers(), through.values() + through.buffers())
    else:
        for a, b in zip(resumed.values(), through.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    own = {name: BACKENDS[second].get(name) for name in ("fused", "foreach")}
    group = resumed.optimizer.param_groups[0]
    assert {
        name: group[name] or None for name in own
    } == own  # the back end is its own, not the checkpoint's
    assert [type(v) for v in resumed.optimizer.state_dict()["state"][0].values()] == [
        type(v) for v in through.optimizer.state_dict()["state"][0].values()
    ]


# --- types ----------------------------------------------------------------------------------------

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", ON_CPU)
def test_any_mix_of_types(name: str) -> None:
    """Parameter, gradient and momentum of three types each, against the same in float32, rounded once."""
    n = 70
    for p_type, g_type, m_type in itertools.product(TYPES, repeat=3):
        p, g, m = torch.randn(n).to(p_type), torch.randn(n).to(g_type), torch.randn(n).to(m_type)
        expected = nn.Parameter(p.float().clone())
        plain = Lion([expected], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
        expected.grad = g.float()
        plain.state[expected]["momentum"] = m.float().clone()
        plain.step()
        step_lion(name, Item(p, g, [m]), lr=1e-2, beta1=0.9, beta2=0.99, weight_decay=0.1)
        assert torch.equal(p, expected.detach().to(p_type))
        assert torch.equal(m, plain.state[expected]["momentum"].to(m_type))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_narrow_number(dtype: torch.dtype) -> None:
    """Widened and narrowed again each comes back; and what lies between two rounds as torch does."""
    everything = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    p = everything.clone()
    zero = torch.zeros_like(p)
    step_lion("cpu", Item(p, zero, [zero.clone()]), lr=0.0, beta1=0.5, beta2=1.0, weight_decay=0.0)
    assert torch.equal(p.isnan(), everything.isnan())
    number = ~everything.isnan()
    assert torch.equal(p.view(torch.int16)[number], everything.view(torch.int16)[number])
    # A momentum that forgets everything is the gradient, rounded.
    g = torch.cat([torch.randn(20000) * 10.0**k for k in range(-9, 6)] + [torch.tensor([0.0, -0.0])])
    g = torch.cat([g, everything[number & everything.isfinite()].float() * (1 + 2**-9)])
    m = torch.zeros(len(g), dtype=dtype)
    step_lion("cpu", Item(torch.zeros(len(g)), g, [m]), lr=0.0, beta1=0.5, beta2=0.0, weight_decay=0.0)
    assert torch.equal(m, g.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["lion", "adamw", "tiger, base"])
def test_state_dtype(case: str, backend: str) -> None:
    """Buffers in bfloat16: half the memory, kept so in a checkpoint, and the same in every back end."""
    plain = Run(case, "plain", torch.float32, state_dtype=torch.bfloat16)
    other = Run(case, backend, torch.float32, state_dtype=torch.bfloat16)
    for t in range(8):
        plain.step(t)
        other.step(t)
        if exact(case, backend):
            assert_equal(other.values() + other.buffers(), plain.values() + plain.buffers())
        other.become(plain)
    assert {b.dtype for b in other.buffers()} == {torch.bfloat16}
    assert {p.dtype for p in other.values()} == {torch.float32}


# --- rounding at random ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cuda"])
def test_rounding_at_random_is_unbiased(backend: str) -> None:
    """A step of a tenth of a bfloat16's spacing is lost to the nearest, and counts on average at random."""
    n, lr = 40000, 0.1 * 2**-8  # from 1 down the spacing is 2⁻⁸
    moved = {}
    for rounded in (False, True):
        p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
        optimizer = Signum([p], lr=lr, stochastic_rounding=rounded, **BACKENDS[backend])
        for _ in range(5):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[rounded] = (1 - p.detach().double()) / 2**-8
    assert not moved[False].any()
    # Five draws with probability 0.1: mean 0.5, variance 5 · 0.1 · 0.9. Five standard errors.
    assert abs(moved[True].mean().item() - 0.5) < 5 * math.sqrt(0.45 / n)
    assert abs(moved[True].var().item() - 0.45) < 0.03


@pytest.mark.parametrize("lazy", [False, "grad"])
@pytest.mark.parametrize("case", ["signum", "lion", "adamw", "tiger, rows"])
def test_the_same_noise_everywhere(case: str, lazy: Any) -> None:
    """Also after a resumption; and another with another seed, step or parameter."""
    runs = {
        name: Run(case, name, torch.bfloat16, lazy, stochastic_rounding=True, state_dtype=torch.float32)
        for name in BACKENDS
    }
    for t in range(6):
        for run in runs.values():
            run.step(t)
        if t == 3:
            for name, run in runs.items():
                if name != "cpu":
                    run.become(runs["cpu"])
    for name, run in runs.items():
        if name in ("cpu", "interpreted") or (case not in ROUGH and exact(case, name)):
            assert_equal(run.values(), runs["cpu"].values())
    another = Run(case, "cpu", torch.bfloat16, lazy, stochastic_rounding=True, seed=1)
    for t in range(6):
        another.step(t)
    assert not torch.equal(another.values()[0], runs["cpu"].values()[0])


def test_parameters_draw_noise_of_their_own() -> None:
    ps = [nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = Signum(ps, lr=0.5 * 2**-8, stochastic_rounding=True, fused=True)
    seen = []
    for _ in range(2):
        for p in ps:
            with torch.no_grad():
                p.fill_(1)
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen += [p.detach().clone() for p in ps]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


# --- tensors the kernels do not take --------------------------------------------------------------


def odd_tensors() -> dict[str, torch.Tensor]:
    base = torch.randn(40)
    return {
        "not at a multiple of 16 bytes": base[1:25].view(4, 6),
        "another memory order": torch.randn(6, 4).t(),
        "with holes": torch.randn(8, 6)[::2],
        "float64": torch.randn(4, 6, dtype=torch.float64),
        "empty": torch.randn(0, 6),
    }


@pytest.mark.parametrize("fused", ON_CPU)
@pytest.mark.parametrize("case", ["lion", "tiger", "tiger, rows", "adamw"])
def test_odd_tensors(case: str, fused: str) -> None:
    """All of them beside an ordinary one, gradients in any memory order: as the plain step does it."""
    cls, options = CASES[case]
    results = []
    for own in ({}, {"fused": fused}):
        torch.manual_seed(0)
        ps = [nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in odd_tensors().values()]
        ps = [nn.Parameter(t) for t in odd_tensors().values()] + ps[:1]
        optimizer = cls(ps, **options, **own)
        for _ in range(4):
            for i, p in enumerate(ps):
                p.grad = torch.randn(p.shape, dtype=p.dtype)
                if i == 1:
                    p.grad = torch.randn(p.t().shape).t()
                if i == 5:
                    p.grad = torch.ones(()).expand(p.shape)  # what .sum().backward() leaves
            optimizer.step()
        results.append([p.detach().clone() for p in ps])
    for a, b in zip(*results, strict=True):
        if case in ROUGH:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ON_CPU)
def test_beyond_two_to_the_31(name: str) -> None:
    """DeepSpeed #7640: offsets of 32 bits, and silently no update past 2³¹ entries."""
    width, row = 1024, 2**21 + 5
    # NumPy's zeros take no memory where nobody writes to them; torch's are written.
    p, m = (torch.from_numpy(np.zeros((row + 1, width), np.int16)).view(torch.bfloat16) for _ in range(2))
    rows = torch.tensor([3, row])
    item = Item(p, torch.ones(2, width, dtype=torch.bfloat16), [m], by_rows=True, rows=rows)
    step_lion(name, item, lr=1.0, beta1=0.5, beta2=0.5, weight_decay=0.0)
    assert (p[rows] == -1).all()
    assert (m[rows] == 0.5).all()
    assert not p[row - 2**21].any()


def test_a_plan_is_remade_when_anything_moves() -> None:
    """Gradients that vanish, data and state that are replaced, options that change, groups that grow."""

    def train(**own: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        ps, before = [nn.Parameter(torch.randn(5, 4)) for _ in range(4)], []
        optimizer = Lion(ps, lr=1e-2, **own)
        for t in range(20):
            for p in ps:
                p.grad = torch.randn(p.shape)
            if t == 3:
                ps[1].grad = None
            if t == 5:
                before.append(ps[2].data)  # which stays, so that a step on it would do no other harm
                ps[2].data = ps[2].data.clone()
            if t == 7:
                optimizer.state[ps[0]]["momentum"] = torch.ones(5, 4)
            if t == 9:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if t == 11:
                optimizer.param_groups[0]["lr"] = 0.1
            if t == 13:
                ps.append(nn.Parameter(torch.randn(5, 4)))
                optimizer.param_groups[0]["params"].append(ps[-1])
                ps[-1].grad = torch.randn(5, 4)
            if t == 15:
                optimizer.param_groups[0]["lazy"] = "grad"
                ps[0].grad[2] = 0.0
            if t == 17:
                ps[3].grad = torch.randn(4, 5).t()
            if t == 18:
                optimizer = copy.deepcopy((optimizer, ps))
                optimizer, ps = optimizer
            optimizer.step()
        return [p.detach() for p in ps]

    assert_equal(train(fused=True), train())


def test_a_plan_follows_tigers_own_decay_and_types_at_the_same_place() -> None:
    def train(**own: Any) -> torch.Tensor:
        p = nn.Parameter(torch.ones(4, 2))
        optimizer = Tiger([p], lr=0.1, weight_decay=0.0, scale=1.0, **own)
        for t in range(6):
            p.grad = torch.full_like(p, 1.0 + t)
            optimizer.param_groups[0]["weight_decay"] = 0.5 * (t % 2)
            if t == 4:
                m = optimizer.state[p]["momentum"]
                m.data = m.data.view(torch.bfloat16)[:, :2].contiguous().zero_()
            optimizer.step()
        return p.detach()

    assert_equal([train(fused=True)], [train()])
    p = nn.Parameter(torch.ones(16))
    optimizer, memory = Lion([p], fused=True), torch.zeros(16)
    p.grad = torch.ones(16)
    optimizer.step()
    optimizer.state[p]["momentum"].data = memory
    optimizer.step()
    behind = memory.view(torch.bfloat16)[16:].clone()
    optimizer.state[p]["momentum"].data = memory.view(torch.bfloat16)[:16]
    optimizer.step()
    assert torch.equal(memory.view(torch.bfloat16)[16:], behind)


@pytest.mark.parametrize("fused", ON_CPU)
def test_a_step_without_rows_counts(fused: str) -> None:
    def train(**own: Any) -> torch.Tensor:
        torch.manual_seed(0)
        embedding = nn.Embedding(6, 4, sparse=True)
        optimizer = AdamW(embedding.parameters(), lr=0.1, **own)
        for ids in ([1, 2], [], [], [1, 3]):
            optimizer.zero_grad()
            embedding(torch.tensor(ids, dtype=torch.long)).square().sum().backward()
            optimizer.step()
        assert optimizer.state[embedding.weight]["step"] == 4
        return embedding.weight.detach()

    torch.testing.assert_close(train(fused=fused), train(), rtol=1e-6, atol=1e-6)


def test_a_gradient_with_the_negative_bit() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = Signum([p], lr=0.1, fused=True)
    for _ in range(2):
        p.grad = torch._neg_view(torch.ones(4))
        optimizer.step()
    assert (p > 0).all()


@pytest.mark.parametrize(
    "other",
    [torch._neg_view, lambda g: g.t().contiguous().t(), lambda g: g.to_sparse(1), nn.Parameter],
    ids=["negative bit", "strides", "sparse", "type"],
)
def test_a_plan_sees_gradients_of_another_kind(other: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def train(**own: Any) -> torch.Tensor:
        p = nn.Parameter(torch.zeros(3, 2))
        optimizer, g = AdamW([p], lr=0.1, **own), torch.arange(1.0, 7.0).view(3, 2)
        for kind in (torch.clone, other, torch.clone, other):
            p.grad = kind(g)
            optimizer.step()
        return p.detach()

    torch.testing.assert_close(train(fused=True), train(), rtol=1e-6, atol=1e-7)


def test_another_back_end_in_mid_course() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = Signum([p], lr=0.1, fused="cpu")
    for back_end in ON_CPU:
        optimizer.param_groups[0]["fused"] = back_end
        p.grad = torch.ones(4)
        optimizer.step()
        cache = optimizer.cache("fused")[id(optimizer.param_groups[0])]
        assert (back_end, p.device) in cache


@pytest.mark.parametrize("fused", ON_CPU)
@pytest.mark.parametrize("lazy", ["grad", "ids"])
def test_a_plan_of_lazy_rows_follows_them(lazy: str, fused: str) -> None:
    """Other rows at each step, data and records that are replaced."""

    def train(**own: Any) -> torch.Tensor:
        torch.manual_seed(0)
        embedding = nn.Embedding(9, 5)
        tracked = track_rows(embedding)
        optimizer = Lion(embedding.parameters(), lr=1e-2, lazy=lazy, **own)
        for t in range(8):
            if t == 3:
                embedding.weight.data = embedding.weight.data.clone()
            if t == 5 and lazy == "ids":
                tracked.remove()
                with pytest.raises(RuntimeError, match="nothing tracks"):
                    optimizer.step()
                track_rows(embedding)
            optimizer.zero_grad()
            embedding(torch.randint(9, (3,))).square().sum().backward()
            optimizer.step()
        return embedding.weight.detach()

    assert_equal([train(fused=fused)], [train()])


def test_a_plan_sees_that_gradients_are_to_be_released() -> None:
    def train(**own: Any) -> list[torch.Tensor]:
        p = nn.Parameter(torch.zeros(3, 2))
        optimizer = Signum([p], lr=0.1, **own)
        for t in range(4):
            optimizer.param_groups[0]["release_grads"] = t > 1
            p.grad = torch.arange(-2.0 + t, 4.0 + t).view(3, 2)
            optimizer.step()
        return [p.detach(), optimizer.state[p]["momentum"]]

    assert_equal(train(fused=True), train())


def test_a_plan_sees_a_counter_that_was_not_there() -> None:
    def train(**own: Any) -> list[torch.Tensor]:
        ps = [nn.Parameter(torch.zeros(3, 2)) for _ in range(2)]
        optimizer = Signum(ps, lr=0.1, **own)
        for t in range(3):
            for p in ps:
                p.grad = torch.ones(3, 2)
            if t == 1:
                optimizer.state[ps[1]]["step"] = torch.tensor(5.0)
            optimizer.step()
        return [optimizer.state[ps[1]]["step"]]

    assert_equal(train(fused=True), train())


@pytest.mark.parametrize("lazy", [False, "grad", "ids"])
@pytest.mark.parametrize("cls", [Signum, Lion, Tiger, AdamW])
def test_a_plan_is_kept(cls: Any, lazy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = nn.Embedding(6, 4)
    track_rows(embedding)
    options = {"scale": "row_rms"} if cls is Tiger else {}
    optimizer, made, plan = cls(embedding.parameters(), lazy=lazy, fused=True, **options), [], road._plan
    monkeypatch.setattr(road, "_plan", lambda *given: made.append(1) or plan(*given))
    for t in range(5):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + t)
        optimizer.zero_grad()
        embedding(torch.tensor([t, 1])).sum().backward()
        optimizer.step()
    assert len(made) == 1


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("fused", ON_CPU)
def test_no_gradient_is_kept(fused: str, sparse: bool) -> None:
    """The plan of the next step must not hold the memory of this one's gradients."""
    embedding = nn.Embedding(6, 4, sparse=sparse)
    optimizer = Lion(embedding.parameters(), fused=fused)
    for _ in range(3):
        embedding(torch.tensor([1, 2])).sum().backward()
        g = embedding.weight.grad
        gone = weakref.ref((g._values() if sparse else g).untyped_storage())  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        del g
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("case", ["lion", "tiger", "tiger, rows", "adamw"])
@pytest.mark.parametrize("lazy", [False, "grad"])
def test_threads_change_nothing(case: str, lazy: Any) -> None:
    if lazy and case == "tiger":
        lazy = False  # the RMS of the whole matrix is not for rows
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        cls, options = CASES[case]
        p = nn.Parameter(torch.randn(700, 130))
        optimizer = cls([p], **options, lazy=lazy, fused="cpu")
        for _ in range(3):
            p.grad = torch.randn(700, 130) * (torch.rand(700, 1) > 0.3)
            optimizer.step()
        torch.set_num_threads(before)
        results.append(p.detach())
    assert torch.equal(*results)


# --- amp, lr in a tensor --------------------------------------------------------------------------


@pytest.mark.parametrize("fused", ON_CPU)
@pytest.mark.parametrize("case", ["lion", "tiger, base", "tiger, micro-batches", "adamw"])
def test_grad_scaler(case: str, fused: str) -> None:
    """Scaled gradients are divided in the kernel, and a step with an infinite one is not made."""
    cls, options = CASES[case]
    results = []
    for own in ({}, {"fused": fused}):
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3, dtype=torch.float64))]
        optimizer = cls(ps, **options, **own)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        for t in range(9):
            optimizer.zero_grad()
            for p in ps:
                x = torch.randn(4, 3)
                scaler.scale((p * x * (math.inf if t == 4 else 1)).sum()).backward()
            if t == 6:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        state = [optimizer.state[p][name] for p in ps for name in cls.buffers]
        results.append([*(p.detach() for p in ps), *state])
        if case == "adamw":
            assert all(optimizer.state[p]["step"] == 8 for p in ps)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-6 if case in ROUGH else 0, atol=1e-8 if case in ROUGH else 0
        )


@pytest.mark.parametrize("fused", ON_CPU)
@pytest.mark.parametrize("case", ["signum", "lion", "tiger, base", "tiger", "adamw"])
def test_capturable_with_lr_in_a_tensor(case: str, fused: str) -> None:
    cls, options = CASES[case]
    results = []
    for own in ({}, {"fused": fused}):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(4, 3))
        lr = torch.tensor(1e-2)
        optimizer = cls([p], **{**options, "lr": lr}, capturable=True, **own)
        for t in range(6):
            lr.fill_(1e-2 / (t + 1))  # what a schedule does inside a graph
            p.grad = torch.randn(4, 3)
            optimizer.step()
        results.append(p.detach())
    tolerance = 1e-6 if case in ROUGH else 0
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


# --- what is missing is said ----------------------------------------------------------------------


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu.made.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler, and there is no c\+\+, g\+\+, clang"):
        Lion([nn.Parameter(torch.ones(2))], fused=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="there is no no-such-compiler on PATH"):
        Lion([nn.Parameter(torch.ones(2))], fused=True)
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'step.cpp:1: it hurts' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"could not compile a step.*\n.*it hurts"):
        Lion([p], fused=True).step()
    assert not [f for f in (tmp_path / "minisign").iterdir() if f.suffix == ".so"]
    cpu.made.cache_clear()


def test_the_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    compile_it = cpu._compile
    monkeypatch.setattr(cpu, "_compile", lambda *a: (calls.append(a), compile_it(*a)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    numbers = dict(lr=1.0, beta1=0.5, beta2=0.5, weight_decay=0.0)
    program = road.program_of(road.Part(Lion.rule, tuple(numbers.items()), ()), counts=False)
    for _ in range(2):
        cpu.made.cache_clear()
        cpu.made(program, Form())
    assert len(calls) == 1
    (made,) = (tmp_path / "minisign").glob("*.so")
    good = made.read_bytes()
    for content in (b"", good[:-1], b"x" + good):  # cut off, or of somebody else
        made.unlink()  # which a process that has it loaded does not mind
        made.write_bytes(content)
        cpu.made.cache_clear()
        cpu.made(program, Form())
    assert len(calls) == 4
    cpu.made.cache_clear()


def test_triton_on_a_cpu_needs_the_interpreter() -> None:
    code = "import torch, minisign; minisign.Lion([torch.nn.Parameter(torch.ones(2))], fused='triton')"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "set TRITON_INTERPRET=1 before the first import, or take fused=True" in result.stderr


def test_an_interpreter_that_stops_at_loops_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for triton, numpy, runs in (
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.7.1", "2.10.0", True),
    ):
        monkeypatch.setattr("triton.__version__", triton)
        monkeypatch.setattr("numpy.__version__", numpy)
        if runs:
            assert kernels.backend("triton", torch.device("cpu")).__name__ == "minisign.kernels.gpu"
        else:
            with pytest.raises(
                kernels.Unavailable, match=r"Triton 3\.6\.0 stops at loops under NumPy 2\.4\.0: pip"
            ):
                kernels.backend("triton", torch.device("cpu"))


def test_a_group_without_a_back_end_is_not_added() -> None:
    optimizer = Lion([nn.Parameter(torch.ones(2))], fused=True)
    with pytest.raises(RuntimeError, match="no back end for parameters on 'meta'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, device="meta"))]})
    assert len(optimizer.param_groups) == 1


def test_no_back_end() -> None:
    with pytest.raises(RuntimeError, match="fused=True has no back end for parameters on 'meta'"):
        Lion([nn.Parameter(torch.ones(2, device="meta"))], fused=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fused": "cuda"}, ValueError, "unknown fused 'cuda'"),
        ({"fused": 1}, ValueError, "unknown fused 1"),
        ({"fused": True, "foreach": True}, ValueError, "fused=True and foreach=True exclude each other"),
        ({"fused": True, "differentiable": True}, ValueError, "fused=True and differentiable=True"),
        ({"state_dtype": "bfloat16"}, ValueError, "unknown state_dtype 'bfloat16'"),
        ({"state_dtype": torch.int8}, ValueError, r"unknown state_dtype torch\.int8"),
        ({"seed": 0.5}, TypeError, r"seed must be a whole number, got 0\.5"),
        ({"stochastic_rounding": True, "capturable": True}, ValueError, "needs fused=True"),
        ({"stochastic_rounding": 1}, TypeError, "stochastic_rounding must be True or False, got 1"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Lion([nn.Parameter(torch.ones(2, 2))], **options)


def test_rounding_at_random_is_for_bfloat16() -> None:
    with pytest.raises(
        ValueError, match=r"for bfloat16 parameters, got bias of shape \(3,\), torch\.float16"
    ):
        Lion([("bias", nn.Parameter(torch.ones(3, dtype=torch.float16)))], stochastic_rounding=True)


# --- without a GPU: what the compiler makes of the kernels ----------------------------------------

PTX = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minisign import AdamW, Lion, Tiger
from minisign.engine.fused import Part, program_of
from minisign.kernels import gpu, words
from minisign.kernels.table import Form

types = dict(f="float32", b="bfloat16", h="float16")
own = dict(lr=0.1, weight_decay=0.1)
rules = dict(
    lion=(Lion, dict(own, beta1=0.9, beta2=0.99), {}),
    sought=(Lion, dict(own, beta1=0.9, beta2=0.99), dict(sought=True)),
    tiger=(Tiger, dict(own, beta=0.9, scale="rms"), dict(guard=True)),
    rows=(Tiger, dict(own, beta=0.9, scale="row_rms"), dict(guard=True)),
    adamw=(AdamW, dict(own, beta1=0.9, beta2=0.999, eps=1e-8), dict(rounded=True)),
)
out = []
for name, kinds, which, aligned, look in json.loads(sys.argv[1]):
    cls, numbers, form = rules[name]
    program = program_of(Part(cls.rule, tuple(numbers.items()), cls.per_tensor), cls.has_step)
    form = Form(tuple(types[k] for k in kinds), which, **form)
    made = gpu.constants(program, form, 20, aligned)
    options = {x: made.pop(x) for x in ("num_warps", "enable_fp_fusion")}
    made = {**made, "LOOK": look} | ({"BODY": words.look} if look else {})
    n = ("fp32",) * len(program.trace.numbers)
    signature = dict(table="*i64", owners="*i32", firsts="*i64", squares="*fp64", bad="*i32",
    found_inf="*fp32",
                     inverse_scale="*fp32", lr="*fp32", numbers=words.Numbers(n, n, *["fp32"] * 3),
                     **dict.fromkeys(made, "constexpr"))
    source = ASTSource(words.step, signature, made)
    out.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
print(json.dumps(out))
"""
VARIANTS = [
    ("lion", "fff", "", True, False),
    ("lion", "fff", "", False, False),
    ("lion", "bbb", "", True, False),
    ("lion", "fhb", "", True, False),
    ("tiger", "fff", "", True, False),
    ("tiger", "fff", "", True, True),
    ("adamw", "bbf", "", True, False),
    ("rows", "fff", "all", True, False),
    ("rows", "bbb", "masked", True, False),
    ("adamw", "fff", "listed", True, False),
    ("sought", "ffb", "all", True, False),
]


@pytest.fixture(scope="module")
def ptx() -> dict[Any, str]:
    """Each variant of the kernels, compiled for an H100."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PTX, json.dumps(VARIANTS)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return dict(zip(VARIANTS, json.loads(result.stdout), strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_ptx_reads_and_writes_16_bytes(ptx: dict[Any, str], variant: Any) -> None:
    code, look = ptx[variant], variant[4]
    wide = ("ld.global.v4.b32" in code, look or "st.global.v4.b32" in code)
    assert wide == ((True, True) if variant[3] else (False, False))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_ptx_arithmetic(ptx: dict[Any, str], variant: Any) -> None:
    """Rounding to nearest; division and root rounded, not approximated; no multiply-add but the written.

    And subnormal numbers stay (no .ftz): a momentum without gradients keeps its sign, as on a CPU.
    (But for division and root before Triton 3.6, which comes with torch 2.10: AdamW's, beside an ε.)
    """
    code, kinds, look = ptx[variant], variant[1], variant[4]
    assert ("cvt.rn.bf16" in code) == ("b" in kinds[0] + kinds[2] and not look)
    flushed = set(re.findall(r"(add|sub|mul|fma|mad|div|sqrt)\S*\.ftz", code))
    import triton

    flushes = variant[0] == "adamw" and kernels.release(triton) < (3, 6)
    assert flushed == ({"div", "sqrt"} if flushes else set())
    assert "div.full" not in code
    assert "div.approx" not in code
    assert "sqrt.approx" not in code
    assert not [x for x in code.splitlines() if ".bf16" in x and "cvt.rz" in x]
    if variant == ("lion", "fff", "", True, False):
        # 8 entries a thread, full and masked block, two interpolations and a step each, and nothing else.
        assert code.count("fma.rn.f32") == 3 * 2 * 8


def test_ptx_addresses_have_64_bits(ptx: dict[Any, str]) -> None:
    """Where a block starts, or a row, is worked out in 64 bits."""
    for (_, _, which, _, _), code in ptx.items():
        assert re.search(r"shl\.b64 \t%rd\d+, %rd\d+, 10;" if not which else r"mul\.lo\.s64", code)


# --- with one (TRITON_INTERPRET=0 pytest tests/test_fused.py) -------------------------------------

if "cuda" in BACKENDS:

    @pytest.mark.parametrize("case", ["signum", "lion", "tiger, base", "tiger", "tiger, rows", "adamw"])
    def test_a_graph_makes_the_same_steps(case: str) -> None:
        """Captured once and run with other gradients and rates, against eager steps."""
        cls, options = CASES[case]
        starts = [torch.randn(shape, device="cuda") for shape in ((40, 8), (6,))]
        eager, graphed = ([nn.Parameter(s.clone()) for s in starts] for _ in range(2))
        rates = [torch.tensor(0.0, device="cuda") for _ in range(2)]
        optimizers = [
            cls(ps, **{**options, "lr": lr}, capturable=True, fused=True)
            for ps, lr in zip((eager, graphed), rates, strict=True)
        ]
        for p in (*eager, *graphed):
            p.grad = torch.zeros_like(p)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for optimizer in optimizers:
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            optimizers[1].step()
        for t in range(20):
            for lr in rates:
                lr.fill_(1e-2 / (t + 1))
            for p, q in zip(eager, graphed, strict=True):
                q.grad.copy_(p.grad.normal_())  # type: ignore[union-attr]
            optimizers[0].step()
            graph.replay()
        assert_equal([q.detach() for q in graphed], [p.detach() for p in eager])

    def test_a_graph_refuses_what_it_cannot_hold() -> None:
        ps = [nn.Parameter(torch.ones(8, device="cuda")) for _ in range(2)]
        optimizer = Lion(ps, capturable=True, fused=True)
        ps[0].grad = torch.ones_like(ps[0])
        with (
            pytest.raises(RuntimeError, match=r"shape \(8,\) has none"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            optimizer.step()

    @contextmanager
    def waiting_is_an_error() -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("case", ["lion", "tiger, base", "adamw"])
    def test_found_inf_on_a_gpu_needs_no_waiting(case: str) -> None:
        cls, options = CASES[case]
        p = nn.Parameter(torch.ones(8, 4, device="cuda"))
        optimizer = cls([p], **options, fused=True)
        optimizer.grad_scale = torch.full((1,), 4.0, device="cuda")
        for found, moves in ((1.0, False), (0.0, True)):
            p.grad = torch.full_like(p, 4.0)
            optimizer.found_inf = torch.full((1,), found, device="cuda")
            with waiting_is_an_error():
                optimizer.step()
            assert bool((p != 1).all()) == moves

    @pytest.mark.parametrize("case", ["lion", "tiger", "tiger, rows", "adamw"])
    def test_two_runs_on_cuda_agree_to_the_bit(case: str) -> None:
        """Blocks come in any order, and the squares of Tiger's RMS form are added up by atomics."""
        cls, options = CASES[case]
        ends = []
        for _ in range(2):
            generator = torch.Generator("cuda").manual_seed(0)
            p = nn.Parameter(torch.randn(3001, 1024, device="cuda", generator=generator))
            optimizer = cls([p], **options, fused=True)
            for _ in range(20):
                p.grad = torch.randn(p.shape, device="cuda", generator=generator)
                optimizer.step()
            ends.append(p.detach())
        assert torch.equal(*ends)
