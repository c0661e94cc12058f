"""Optimizers of one's own: each against its oracle, and on every road."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_rules import (
    MOMENTUM,
    OWN,
    SMOOTH,
    Adan,
    CautiousDecay,
    HeavyBall,
    Nesterov,
    RelativeBall,
    RmsProp,
    heavy_ball,
)
from torch import Tensor, nn

from minisign import AdamW, Lion, Signum, Tiger, optimizer, param_groups, rms, track_rows
from minisign.engine import fused as fused_road
from minisign.kernels import cpu
from minisign.kernels.table import FMA_ON_CPU
from minisign.kernels.vocabulary import BOOLS, TEXTS

ROOT = Path(__file__).parent.parent
PACKAGE = Path(optimizer.__code__.co_filename).parents[1]
CLASSES = pytest.mark.parametrize("cls", OWN, ids=lambda cls: cls.__name__)
ROADS: dict[str, dict[str, Any]] = {"foreach": {"foreach": True}, "cpu": {"fused": "cpu"}}
if os.environ["TRITON_INTERPRET"] == "1":
    ROADS["interpreted"] = {"fused": "triton"}
SHAPES = [(7, 5), (6,), (), (0, 3), (3, 2, 2), (1023,), (1025,), (33, 32)]


def parameters(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def gradients(t: int, shapes: Any = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + t)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [g * (torch.rand(g.shape, generator=generator) > 0.2) for g in found]


def train(
    cls: Any, steps: int, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, list[Tensor]]:
    ps = parameters(dtype)
    made = cls(ps, **options)
    for t in range(steps):
        for p, g in zip(ps, gradients(t), strict=True):
            p.grad = g.to(dtype)
        made.step()
    return made, [p.detach() for p in ps]


def assert_close(cls: Any, found: list[Tensor], expected: list[Tensor], ulps: float) -> None:
    for a, b in zip(found, expected, strict=True):
        if cls in SMOOTH:
            allowed = ulps * torch.finfo(a.dtype).eps * torch.maximum(b.float().abs(), torch.tensor(0.01))
            assert bool(((a.float() - b.float()).abs() <= allowed).all()), (
                (a.float() - b.float()).abs().max()
            )
        else:
            assert torch.equal(a, b)


@CLASSES
@pytest.mark.parametrize("foreach", [False, True])
def test_what_its_paper_says(cls: Any, foreach: bool) -> None:
    made, found = train(cls, 20, torch.float64, foreach=foreach)
    for i, (p, own) in enumerate(zip(parameters(torch.float64), found, strict=True)):
        value = p.detach().numpy().copy()
        buffers = [np.zeros_like(value) for _ in made.buffers]
        if value.size:
            for t in range(20):
                OWN[cls](value, gradients(t)[i].numpy(), buffers, t + 1)
        np.testing.assert_allclose(own.numpy(), value, rtol=1e-12, atol=1e-12)


@CLASSES
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_road(cls: Any, road: str, dtype: torch.dtype) -> None:
    steps = 6 if road == "interpreted" else 30
    _, plain = train(cls, steps, dtype)
    _, other = train(cls, steps, dtype, **ROADS[road])
    assert_close(cls if road != "foreach" else None, other, plain, 8 * steps if FMA_ON_CPU else 64 * steps)


@CLASSES
@pytest.mark.skipif("interpreted" not in ROADS, reason="needs Triton's interpreter")
def test_both_languages_say_the_same(cls: Any) -> None:
    _, one = train(cls, 6, fused="cpu")
    _, other = train(cls, 6, fused="triton")
    if cls.__name__ == "SoftLion":  # tanh is the C library's there
        return assert_close(cls, other, one, 64)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@CLASSES
@pytest.mark.parametrize("road", ["plain", *ROADS])
@pytest.mark.parametrize("lazy", ["grad", "ids", "sparse"])
def test_rows(cls: Any, road: str, lazy: str) -> None:
    """Rows that take part move as the oracle says, alone; the others keep their bits."""
    if cls is RelativeBall:
        cls = lambda ps, **own: RelativeBall(ps, over="row_rms", **own)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    embedding = nn.Embedding(9, 4, sparse=lazy == "sparse", dtype=torch.float32)
    plain = nn.Embedding.from_pretrained(embedding.weight.detach().clone(), freeze=False)
    if lazy == "ids":
        track_rows(embedding)
    given = {} if lazy == "sparse" else {"lazy": lazy}
    made, dense = cls([embedding.weight], **given, **ROADS.get(road, {})), cls([plain.weight])
    buffers = made.buffers
    for _ in range(5):
        ids = torch.randint(0, 9, (6,), generator=generator)
        weights = torch.randn(6, 4, generator=generator)
        for e in (embedding, plain):
            e.zero_grad()
            (e(ids) * weights).sum().backward()
        before = [
            embedding.weight.detach().clone(),
            *(made.state[embedding.weight].get(b) for b in buffers),
        ]
        kept = plain.weight.detach().clone(), {b: x.clone() for b, x in dense.state[plain.weight].items()}
        made.step()
        dense.step()
        absent = torch.ones(9, dtype=torch.bool).index_fill(0, ids, False)
        with torch.no_grad():  # what a step on the whole matrix did to absent rows is undone
            plain.weight[absent] = kept[0][absent]
            for b in buffers:
                dense.state[plain.weight][b][absent] = kept[1].get(b, torch.zeros(9, 4))[absent]
        after = [embedding.weight.detach(), *(made.state[embedding.weight][b] for b in buffers)]
        for old, new in zip(before, after, strict=True):
            assert torch.equal((torch.zeros(9, 4) if old is None else old)[absent], new[absent])
        torch.testing.assert_close(embedding.weight, plain.weight, rtol=1e-5, atol=1e-6)


@CLASSES
def test_resumed_and_copied(cls: Any) -> None:
    _, unbroken = train(cls, 8, fused=True)
    half, values = train(cls, 4)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    for copied in (False, True):
        ps = [nn.Parameter(v.clone()) for v in values]
        resumed = cls(ps, fused=True)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        file.seek(0)
        if copied:
            resumed, ps = copy.deepcopy((resumed, ps))
        for t in range(4, 8):
            for p, g in zip(ps, gradients(t), strict=True):
                p.grad = g.float()
            resumed.step()
        assert_close(cls, [p.detach() for p in ps], unbroken, 64)


def test_it_is_an_optimizer_class() -> None:
    assert HeavyBall.__name__ == "HeavyBall"
    assert HeavyBall.__module__ == "own_rules"
    ps = parameters()
    made = pickle.loads(pickle.dumps(HeavyBall(ps, lr=0.5, lazy=False)))
    assert isinstance(made, torch.optim.Optimizer)
    assert made.param_groups[0]["lr"] == 0.5
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    groups = HeavyBall(param_groups(model, embedding={"lazy": "grad", "lr": 0.1}), fused=True).param_groups
    assert (groups[0]["kind"], groups[0]["lazy"], groups[0]["lr"]) == ("embedding", "grad", 0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"Invalid learning rate: -1\.0"),
        ({"beta": 1.0}, ValueError, r"Invalid beta: 1\.0 \(must be in \[0, 1\)\)"),
        ({"beta": "rms "}, ValueError, "unknown beta 'rms '"),
        ({"beta": None}, TypeError, "beta must be a number, got None"),
        ({"gamma": 1.0}, TypeError, "unknown option 'gamma': choose from lr, beta, lazy"),
    ],
)
def test_bad_numbers(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HeavyBall(parameters(), **options)


def test_bounds_of_ones_own() -> None:
    made = optimizer(heavy_ball, buffers=MOMENTUM, bounds={"beta": (0.0, 2.0)}, lr=0.1, beta=1.5)
    made(parameters())
    with pytest.raises(ValueError, match=r"Invalid beta: 2\.5 \(must be in \[0, 2\)\)"):
        made(parameters(), beta=2.5)


# --- what a rule may not do -----------------------------------------------------------------------


def unknown(p: Tensor, g: Tensor, *, lr: float) -> None:
    p.sub_(g.erf(), alpha=lr)


def branching(p: Tensor, g: Tensor, *, lr: float) -> None:
    if g.abs() > 1:
        p.sub_(g, alpha=lr)


def greedy(p: Tensor, g: Tensor, *, lr: float) -> None:
    g.sign_()
    p.sub_(g, alpha=lr)


def test_what_the_kernels_do_not_know_runs_on_the_plain_roads() -> None:
    cls = optimizer(unknown, lr=0.1)
    for road in ({}, {"foreach": True}):
        _, (p, *_) = train(cls, 1, **road)
        expected = parameters()[0] - 0.1 * torch.erf(gradients(0)[0].float())
        torch.testing.assert_close(p, expected.detach())
    with pytest.raises(
        RuntimeError, match=r"line \d+ of .*test_own\.py, `p\.sub_\(g\.erf\(\), alpha=lr\)` uses erf"
    ):
        cls(parameters(), fused=True)


def backslash(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    # fmt: off
    m.mul_(beta) \
     .add_(g)
    # fmt: on
    p.add_(m, alpha=-lr)


def filled(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g)
    m.masked_fill_(m.abs() < 0.5, 0.0)
    p.add_(m.where(m > 0, -m), alpha=-lr)


def wide_mask(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g)
    p.sub_((m > 0).to(m.dtype) * lr)


def named_like_a_constant(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    k = g.abs()
    k = k + 1
    d0 = k * 2
    m.mul_(beta).add_(g)
    p.add_(m / d0, alpha=-lr)


def named_like_a_macro(p: Tensor, g: Tensor, xor: Tensor, *, lr: float, beta: float) -> None:
    B = g * 2
    NAN = B + xor
    load = NAN * beta
    xor.copy_(load)
    p.add_(load, alpha=-lr)


def powers_in_place(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g)
    size = m.clone()
    size **= 2
    torch.sqrt_(size)
    torch.neg_(size)
    p.add_(size, alpha=lr)


def masks(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g)
    mask = g > 0
    same = mask
    same |= p > 0
    kept = mask.clone()
    same &= m > 0
    weight = (m * g > 0).to(g.dtype)
    weight.mul_(2.0)
    ones = g.clone()
    ones.gt_(0)
    ones += ones
    p.sub_(weight * kept + mask * ones, alpha=lr)


def clipped(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g.clamp(-0.5, 1.0))
    p.sub_(m.clamp(max=1.0).clip(min=-beta), alpha=lr)


def a_number_over_entries(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g)
    p.sub_(0.3 / (m.abs() + 1), alpha=lr)
    p.sub_((m.square() + 1) ** -0.5, alpha=lr)


def clipped_by_entries(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g.clamp(max=m.abs() + 1))
    p.sub_(m, alpha=lr)


def numbers_in_place(p: Tensor, g: Tensor, m: Tensor, *, step: float, lr: float, beta: float) -> None:
    m.add_(g * step)
    rate = step
    rate *= 3
    rate += 1
    beta *= 0.5
    m.mul_(beta)
    p.add_(m * (rate / step), alpha=lr * (-1) ** step * (-2.0) ** beta)


@pytest.mark.parametrize(
    "rule",
    [
        backslash,
        filled,
        wide_mask,
        named_like_a_constant,
        named_like_a_macro,
        powers_in_place,
        masks,
        clipped,
        a_number_over_entries,
        clipped_by_entries,
    ],
)
def test_the_same_on_every_road(rule: Any) -> None:
    cls = optimizer(rule, buffers=MOMENTUM, lr=0.1, beta=0.9)
    _, plain = train(cls, 3)
    for road in ROADS.values():
        for a, b in zip(train(cls, 3, **road)[1], plain, strict=True):
            assert torch.equal(a, b)


def test_a_number_that_is_changed_in_place_is_another_number() -> None:
    cls = optimizer(numbers_in_place, buffers=MOMENTUM, lr=0.1, beta=2.0, bounds={"beta": (0.0, 9.0)})
    _, plain = train(cls, 3)
    for road in ROADS.values():
        for a, b in zip(train(cls, 3, **road)[1], plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def of_the_whole(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    size = rms(p)
    m.mul_(beta).add_(g)
    p.sub_(m * (size * lr))


def of_the_row(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    size = rms(p, "row_rms")
    m.mul_(beta).add_(g)
    p.add_(m, alpha=-lr * size)


@pytest.mark.parametrize("rule", [of_the_whole, of_the_row])
@pytest.mark.parametrize("road", ["plain", *ROADS])
def test_a_word_that_stands_in_the_rule(rule: Any, road: str) -> None:
    """As the same word among its numbers; a tensor of fewer than two dimensions is one row."""
    cls = optimizer(rule, buffers=MOMENTUM, lr=0.1, beta=0.9)
    _, found = train(cls, 3, **ROADS.get(road, {}))
    word = "rms" if rule is of_the_whole else "row_rms"
    _, expected = train(lambda ps: RelativeBall(ps, lr=0.1, beta=0.9, over=word), 3)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def centred(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g - g.mean())
    p.sub_(m, alpha=lr)


@pytest.mark.parametrize("rule", [of_the_whole, centred])
@pytest.mark.parametrize("sparse", [False, True])
def test_rows_that_depend_on_others_do_not_move_alone(rule: Any, sparse: bool) -> None:
    embedding = nn.Embedding(5, 3, sparse=sparse)
    made = optimizer(rule, buffers=MOMENTUM, lr=0.1, beta=0.9)(
        embedding.parameters(), lazy=False if sparse else "grad"
    )
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match="cannot step on some rows only"):
        made.step()
    assert torch.equal(embedding.weight, before)


def test_a_row_may_do_what_the_kernels_do_not_know() -> None:
    embedding = nn.Embedding(5, 3)
    made = optimizer(unknown, lr=0.1)(embedding.parameters(), lazy="grad")
    embedding(torch.tensor([1])).sum().backward()
    made.step()


OUTSIDE = 0.5


def outside(p: Tensor, g: Tensor, *, lr: float) -> None:
    p.sub_(g * OUTSIDE, alpha=lr)


def rooted(p: Tensor, g: Tensor, *, lr: float) -> None:
    p.sub_(g, alpha=math.sqrt(lr))


def shaped(p: Tensor, g: Tensor, *, lr: float) -> None:
    p.sub_(g, alpha=lr / max(p.numel(), 1) if p.dim() > 1 else lr)


def early(p: Tensor, g: Tensor, *, step: float, lr: float) -> None:
    if step < 3:
        p.sub_(g, alpha=lr)


def powered(p: Tensor, g: Tensor, *, lr: float) -> None:
    p.sub_(g.abs() ** 1.5, alpha=lr)


def picked(p: Tensor, g: Tensor, *, lr: float) -> None:
    p[..., :1] = 0.0


def two_masks(p: Tensor, g: Tensor, *, lr: float) -> None:
    p.sub_(g * ((g > 0) * (p > 0)), alpha=lr)


def coarse(p: Tensor, g: Tensor, *, lr: float) -> None:
    p.sub_(g.to(torch.bfloat16).to(torch.float32), alpha=lr)


def no_mask(p: Tensor, g: Tensor, *, lr: float) -> None:
    p.sub_(torch.logical_and(g, p) * g, alpha=lr)


def halved(p: Tensor, g: Tensor, *, lr: float) -> None:
    size = rms(p)
    size *= 0.5
    p.sub_(g * size, alpha=lr)


def like_a_literal(p: Tensor, g: Tensor, *, lr: float) -> None:
    p.sub_(g * OUTSIDE + 0.5, alpha=lr)


def counted(p: Tensor, g: Tensor, *, lr: float) -> None:
    p.sub_(g, alpha=lr * len(p.shape))


def explicit(p: Tensor, g: Tensor, *, lr: float) -> None:
    torch.Tensor.sub_(p, g, alpha=lr)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (outside, r"`p\.sub_\(g \* OUTSIDE, alpha=lr\)` takes 0\.5 from elsewhere"),
        (rooted, r"`p\.sub_\(g, alpha=math\.sqrt\(lr\)\)` would keep today's value"),
        (shaped, r"asks for dim: a kernel sees one entry"),
        (early, r"`if step < 3:` chooses by the number of the step"),
        (powered, r"takes a power other than 2\.0, 0\.5, -0\.5"),
        (picked, r"`p\[\.\.\., :1\] = 0\.0` writes to some entries only"),
        (two_masks, "uses mul on two masks"),
        (coarse, r"changes the type of entries to torch\.bfloat16"),
        (no_mask, "uses logical_and on what is no mask"),
        (halved, r"`size \*= 0\.5` changes a number in place"),
        (like_a_literal, r"takes 0\.5 from elsewhere"),
        (counted, r"`p\.sub_\(g, alpha=lr \* len\(p\.shape\)\)` cannot be traced"),
        (explicit, "cannot be traced"),
    ],
)
def test_what_only_plain_roads_can_do(rule: Any, message: str) -> None:
    cls = optimizer(rule, lr=0.1)
    shapes = [(3, 4), (2, 2)]
    results = []
    for road in ({}, {"foreach": True}):
        ps = parameters(shapes=shapes)
        made = cls(ps, **road)
        for p, g in zip(ps, gradients(0, shapes), strict=True):
            p.grad = g.float()
        made.step()
        results.append([p.detach() for p in ps])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match=message):
        cls(parameters(shapes=shapes), fused=True)


def rateless(p: Tensor, g: Tensor, *, rate: float) -> None:
    p.sub_(g, alpha=rate)


def test_a_rule_needs_no_lr() -> None:
    _, plain = train(optimizer(rateless, rate=0.1), 2)
    _, fused = train(optimizer(rateless, rate=0.1), 2, fused=True)
    for a, b in zip(plain, fused, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(TypeError, match="a rule is a function made by def, got functools"):
        optimizer(functools.partial(rateless, rate=0.1))


def now_and_then(p: Tensor, g: Tensor, m: Tensor, *, step: float, lr: float) -> None:
    m.add_(g / g.norm())
    if step % 6 == 0:
        p.sub_(m, alpha=lr)


def branch_of_a_number(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    if beta:
        m.mul_(beta).add_(g)
        g = m
    p.sub_(g, alpha=lr)


def test_a_rule_may_write_at_some_steps_or_with_some_numbers_only() -> None:
    p = nn.Parameter(torch.ones(4))
    made = optimizer(now_and_then, buffers=MOMENTUM, lr=0.1)([p])
    moved = []
    for _ in range(6):
        p.grad, before = torch.ones(4), p.detach().clone()
        made.step()
        moved.append(not torch.equal(p, before))
    assert moved == [False] * 5 + [True]
    optimizer(branch_of_a_number, buffers=MOMENTUM, lr=0.1, beta=0.0)


def test_numbers_may_be_given_by_their_place() -> None:
    (group,) = HeavyBall(parameters()[:1], 0.05, 0.5, lazy="grad").param_groups
    assert (group["lr"], group["beta"], group["lazy"]) == (0.05, 0.5, "grad")
    assert str(inspect.signature(HeavyBall)) == "(params, lr=0.01, beta=0.9, **options)"
    with pytest.raises(TypeError, match="too many positional arguments"):
        HeavyBall(parameters(), 0.05, 0.5, 0.1)


@pytest.mark.parametrize(("given", "meant"), [("lasy", "lazy"), ("wight_decay", "weight_decay")])
def test_a_groups_option_that_is_misspelt(given: str, meant: str) -> None:
    made = Lion([{"params": parameters(), "name": "all", "initial_lr": 0.1, "lr_scale": 2.0}])
    with pytest.raises(TypeError, match=f"unknown option '{given}' of a group: .*'{meant}'"):
        made.add_param_group({"params": [nn.Parameter(torch.ones(2))], given: "grad"})


def test_choosing_by_a_tensors_values_is_an_error() -> None:
    with pytest.raises(
        TypeError, match=r"`if g\.abs\(\) > 1:` depends on a tensor's values; .* torch\.where"
    ):
        optimizer(branching, lr=0.1)


def test_the_gradient_is_left_as_it_is() -> None:
    with pytest.raises(TypeError, match=r"`g\.sign_\(\)` changes the gradient"):
        optimizer(greedy, lr=0.1)
    made, p = optimizer(sly, lr=0.1)([nn.Parameter(torch.ones(2))]), nn.Parameter(torch.ones(2))
    made.add_param_group({"params": [p]})
    p.grad = torch.ones(2)
    with pytest.raises(TypeError, match="sly changes the gradient"):
        made.step()


def sly(p: Tensor, g: Tensor, *, lr: float) -> None:
    p.sub_(g.erf(), alpha=lr)
    g[0] = 0.0


def idle(p: Tensor, g: Tensor, *, lr: float) -> None:
    p = p - lr * g


def stepwise(p: Tensor, g: Tensor, *, step: float, lr: float) -> None:
    p.sub_(g * torch.where(step < 3, step / 3, 1.0), alpha=lr)  # type: ignore[call-overload]


def forgetful(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    m = beta * m + g
    p.sub_(m, alpha=lr)


def idle_by_other_words(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g / (g.norm() + 1e-8))
    p = p - lr * m


def branching_by_other_words(p: Tensor, g: Tensor, *, lr: float) -> None:
    p.sub_(g if g.norm() > 1 else g * 2, alpha=lr)


def misspelt(p: Tensor, g: Tensor, *, lr: float) -> None:
    p.subb_(g, alpha=lr)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("rule", "given", "message"),
    [
        (forgetful, dict(buffers=MOMENTUM, lr=0.1, beta=0.9), "forgetful never changes m: `m = …` makes"),
        (idle_by_other_words, dict(buffers=MOMENTUM, lr=0.1, beta=0.9), "words never changes p: `p = …`"),
        (branching_by_other_words, dict(lr=0.1), r"words: a rule depends on .* torch\.where, not by `if`"),
        (misspelt, dict(lr=0.1), r"`p\.subb_\(g, alpha=lr\).*` uses subb_, which tensors have not"),
        (stepwise, dict(lr=0.1, step=1.0), "stepwise gets it without a default"),
        (heavy_ball, dict(buffers=MOMENTUM, lr=0.1, beta="sign"), "'rms' and 'row_rms', got 'sign'; for a"),
        (idle, dict(lr=0.1), "idle never changes p: `p = …` makes another tensor"),
        (stepwise, dict(lr=0.1), "gives torch.where a number for a mask: choose by `if`"),
        (heavy_ball, dict(buffers="momentum", lr=0.1, beta=0.9), "buffers must be names in a tuple"),
        (
            heavy_ball,
            dict(buffers=("step",), lr=0.1, beta=0.9),
            "buffers must be names in a tuple, each once",
        ),
        (unknown, dict(lr=0.1, seed=1), "every optimizer has seed: call the number of unknown otherwise"),
        (unknown, dict(lr=0.1, bounds={"rate": (0, 1)}), "bounds of rate, which is none of lr"),
        (lambda p, g, *, lr: p.sub_(g, alpha=lr), dict(lr=0.1), "a rule is a function made by def"),
    ],
)
def test_what_no_rule_may_do(rule: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        optimizer(rule, **given)


def chosen(p: Tensor, g: Tensor, *, lr: float, backwards: bool) -> None:
    p.sub_(-g if backwards else g, alpha=lr)


@pytest.mark.parametrize("road", ["plain", *ROADS])
def test_true_or_false_is_a_number_too(road: str) -> None:
    cls = optimizer(chosen, lr=0.1, backwards=False)
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    made = cls([{"params": [p]}, {"params": [q], "backwards": True}], **ROADS.get(road, {}))
    p.grad = q.grad = torch.ones(2)
    made.step()
    assert (p < 1).all()
    assert (q > 1).all()
    with pytest.raises(TypeError, match="backwards must be True or False, got 1"):
        cls([p], backwards=1)


def gated(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float, decay: float) -> None:
    m.mul_(beta).add_(g)
    if decay:
        m.add_(p, alpha=decay)
    if decay != 0 and lr / decay > 100:
        m.mul_(0.5)
    p.sub_(m, alpha=lr)


def test_numbers_that_change() -> None:
    """A rule asks them anew, makes nothing twice, and stays linear or says that it does not."""
    cls = optimizer(gated, buffers=MOMENTUM, lr=0.1, beta=0.9, decay=0.0)
    results = []
    for road in ({}, {"fused": True}):
        ps = parameters(shapes=[(3, 2)])
        made = cls(ps, **road)
        for t in range(6):
            made.param_groups[0]["decay"] = np.float32([0.0, 0.5, 1e-4, 0.0, 0.25, 0.5][t])
            ps[0].grad = torch.ones(3, 2)
            made.step()
        results.append(ps[0].detach())
    assert torch.equal(*results)
    assert sum(len(made) for key, made in fused_road._PROGRAMS.items() if key[0] is gated) == 3
    halves = cls(parameters(shapes=[(3, 2)]), accumulate=2)
    halves.param_groups[0]["decay"] = 0.5
    halves.param_groups[0]["params"][0].grad = torch.ones(3, 2)
    with pytest.raises(ValueError, match="gated cannot be taken in halves: it has a momentum"):
        halves.step()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            dict(buffers=(), lr=1.0, beta=0.9),
            r"has p, g, m before its \*, where p, g and each name",
        ),
        (dict(buffers=MOMENTUM, lr=1.0), r"takes beta: give its default as optimizer\(…, beta=…\)"),
        (dict(buffers=MOMENTUM, lr=1.0, beta=0.9, eps=1.0), "has no argument eps"),
    ],
)
def test_arguments_must_be_those_of_the_rule(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        optimizer(heavy_ball, **given)


def test_a_rule_that_asks_its_numbers_is_asked_anew() -> None:
    """λ = 0 leaves the decay out of a kernel; a schedule that lifts it must get another kernel."""
    results = []
    for road in ({}, {"fused": True}):
        p = nn.Parameter(torch.ones(3))
        made = Lion([p], lr=0.1, **road)
        for t in range(4):
            made.param_groups[0]["weight_decay"] = 0.5 if t % 2 else 0.0
            p.grad = torch.ones(3)
            made.step()
        results.append(p.detach())
    assert torch.equal(*results)
    assert "weight_decay" not in Lion.kernel("cpu")
    assert "1 - (lr * weight_decay)" in Lion.kernel("cpu", weight_decay=0.5)


def test_a_schedule_compiles_nothing_anew() -> None:
    p = nn.Parameter(torch.ones(3))
    made = HeavyBall([p], fused=True)
    for t in range(3):
        made.param_groups[0]["lr"] = 0.1 / (t + 1)
        p.grad = torch.ones(3)
        made.step()
        if t == 0:
            before = cpu.made.cache_info().currsize
    assert cpu.made.cache_info().currsize == before


def test_two_processes_may_make_the_same_kernel_at_once(tmp_path: Path) -> None:
    code = (
        "import torch, minisign\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "minisign.Lion([p], lr=0.5, fused=True).step(); print(p.tolist())"
    )
    own = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=own, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate()[0] for process in started] == ["[0.5, 0.5, 0.5]\n"] * 3
    assert [path.suffix for path in (tmp_path / "minisign").iterdir()] == [".so"]


def test_a_plain_step_enters_few_functions() -> None:
    """Whoever reads it can follow: nine for the first tensor, comprehensions apart."""
    p = nn.Parameter(torch.ones(4, 4))
    made = Tiger([p])
    p.grad = torch.ones(4, 4)
    made.step()
    entered: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            entered.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        made.step()
    finally:
        sys.setprofile(None)
    names = [name for name in dict.fromkeys(entered) if not name.startswith("<")]
    assert names == [
        "step", "look", "numbers_of", "own_numbers", "_move", "apart", "all_finite", "tiger", "rms"
    ]  # fmt: skip


# --- halves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("road", ["plain", *ROADS])
@pytest.mark.parametrize("cls", [HeavyBall, Signum], ids=lambda cls: cls.__name__)
def test_micro_batches_without_a_buffer(cls: Any, road: str) -> None:
    """Three micro-batches are one step on their mean; one that is not finite shrinks the weights."""
    ps, qs = parameters(), parameters()
    one, other = cls(ps, lr=0.01), cls(qs, lr=0.01, accumulate=3, shrink=0.9, **ROADS.get(road, {}))
    for t in range(4):
        gs = [gradients(3 * t + i) for i in range(3)]
        for i in range(3):
            for q, g in zip(qs, gs[i], strict=True):
                q.grad = g.float()
            other.step()
        for j, p in enumerate(ps):
            p.grad = (sum(g[j] for g in gs) / 3).float()
        one.step()
    tolerance = 1e-6 if cls is HeavyBall else 0.021  # a sign may turn where the mean is almost zero
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)
    before = [q.detach().clone() for q in qs]
    for q in qs:
        q.grad = torch.full_like(q, math.nan)
    other.step()
    for b, q in zip(before, qs, strict=True):
        torch.testing.assert_close(q.detach(), 0.9 * b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_released_gradients(fused: bool) -> None:
    nets = [nn.Linear(4, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    made = [HeavyBall(n.parameters(), release_grads=i == 1, fused=fused) for i, n in enumerate(nets)]
    for t in range(5):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(t))
        for net, opt in zip(nets, made, strict=True):
            net(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
        assert all(p.grad is None for p in nets[1].parameters())
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Lion, "moves by more than the momentum"),
        (Nesterov, "moves by more than the momentum"),
        (RmsProp, "has a momentum that is not linear in the gradient"),
        (AdamW, "has 2 buffers"),
        (Adan, "has 4 buffers"),
        (CautiousDecay, "moves by more than the momentum"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("option", [{"accumulate": 2}, {"shrink": 0.9}, {"release_grads": True}], ids=str)
def test_who_cannot_refuses_with_the_reason(cls: Any, reason: str, option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{cls.__name__} takes no {name}={value}: its rule {reason}"):
        cls(parameters(), **option)


# --- shapes before pointers -----------------------------------------------------------------------


def of_another_vocabulary(p: nn.Parameter, made: Any) -> None:
    made.state[p]["momentum"] = torch.zeros(12, 4)


def replaced(p: nn.Parameter, made: Any) -> None:
    p.data = torch.zeros(64, 4)
    p.grad = torch.ones(64, 4)


def smaller_at_the_same_place(p: nn.Parameter, made: Any) -> None:
    p.data = p.data[:3]
    p.grad = torch.ones(3, 4)


def of_another_order(p: nn.Parameter, made: Any) -> None:
    made.state[p]["momentum"] = made.state[p]["momentum"].view(4, 8)


def expanded(p: nn.Parameter, made: Any) -> None:
    made.state[p]["momentum"] = torch.zeros(1, 4).expand(8, 4)


@pytest.mark.parametrize(
    "wrong", [of_another_vocabulary, replaced, smaller_at_the_same_place, of_another_order, expanded]
)
@pytest.mark.parametrize("road", ["plain", *ROADS])
@pytest.mark.parametrize("lazy", [False, "grad"])
def test_shapes_are_checked_before_anything_moves(wrong: Any, road: str, lazy: Any) -> None:
    first, p = nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(8, 4))
    made = Tiger(
        [{"params": [("first", first)]}, {"params": [("table", p)], "lazy": lazy}],
        scale=1.0,
        **ROADS.get(road, {}),
    )
    for _ in range(2):
        for x in (first, p):
            x.grad = torch.ones_like(x)
        made.step()
    wrong(p, made)
    before = [x.detach().clone() for x in (first, p)]
    with pytest.raises(ValueError, match=r"table has shape \(\d+, 4\), and its momentum shape"):
        made.step()
    for x, old in zip((first, p), before, strict=True):
        assert torch.equal(x, old)


@pytest.mark.parametrize("road", ["plain", *ROADS])
def test_other_strides_and_dtypes_of_a_state_and_shared_memory_are_seen(road: str) -> None:
    results = []
    for own in ({}, ROADS.get(road, {})):
        memory = torch.ones(2, 6, 4)
        ps = [nn.Parameter(memory[0, :4]), nn.Parameter(memory[0, 2:]), nn.Parameter(torch.ones(4, 4))]
        made = Lion(ps, lr=0.1, **own)
        for t in range(8):
            for i, p in enumerate(ps):
                p.grad = torch.full_like(p, (-1.0) ** (t + i)) * torch.arange(4.0)
            if t == 3:
                made.state[ps[2]]["momentum"] = torch.arange(16.0).view(4, 4).t()
            if t == 5:
                made.state[ps[2]]["momentum"] = made.state[ps[2]]["momentum"].contiguous().bfloat16()
            made.step()
        results.append([p.detach().clone() for p in ps])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("road", ["plain", *ROADS])
@pytest.mark.parametrize(
    "step",
    [7, 7.0, torch.tensor(7), torch.tensor(7, dtype=torch.int32), torch.tensor(7.0, dtype=torch.float64)],
)
def test_a_counter_of_any_kind_is_read_rightly(road: str, step: Any) -> None:
    made, ps = [], []
    for counter in (torch.tensor(7.0), step):
        p = nn.Parameter(torch.ones(3, 3))
        made.append(AdamW([p], **ROADS.get(road, {})))
        p.grad = torch.ones(3, 3)
        made[-1].step()
        made[-1].state[p]["step"] = counter if isinstance(counter, (int, float)) else counter.clone()
        made[-1].step()
        ps.append(p)
        assert made[-1].state[p]["step"] == 8
    assert torch.equal(*ps)


# --- what the pages say ---------------------------------------------------------------------------


def test_the_pages_examples_do_the_same_on_every_road() -> None:
    text = (ROOT / "docs/optimizers.md").read_text()
    (page,) = re.findall(r"```python\n(import torch\n.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(page, names)
    results = [train(names["RelativeAdam"], 3, **road)[1] for road in ({}, *ROADS.values())]
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_page_has_the_words_of_the_kernels() -> None:
    text = (ROOT / "docs/optimizers.md").read_text()
    (said,) = re.findall(r"They know `([^`]*)`", text)
    assert set(said.split()) == {x for x in TEXTS if x not in BOOLS} - {"to"}
