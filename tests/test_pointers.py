"""What is looked at before a kernel gets an address, and what torch is told of what it wrote.

Each on every road: where the plain step raises or gives a result, so do the kernels, and an error comes
before anything has moved.
"""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from minisign import AdamW, Lion, Signum, Tiger, optimizer, track_rows
from minisign.kernels.table import Unavailable

ROADS: dict[str, dict[str, Any]] = {"plain": {}, "foreach": {"foreach": True}, "cpu": {"fused": "cpu"}}
if os.environ["TRITON_INTERPRET"] == "1":
    ROADS["interpreted"] = {"fused": "triton"}
FUSED = [name for name in ROADS if "fused" in ROADS[name]]
each_road = pytest.mark.parametrize("road", ROADS)
each_kernel = pytest.mark.parametrize("road", FUSED)


def rows_of(index: Any, shape: tuple[int, int] = (6, 4)) -> torch.Tensor:
    index = torch.as_tensor(index)
    return torch.sparse_coo_tensor(
        index[None], torch.ones(len(index), shape[1]), shape, check_invariants=False
    )


@pytest.mark.parametrize("bad", [6, -1])
@each_road
def test_a_sparse_row_that_is_not_there(road: str, bad: int) -> None:
    first, p = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(6, 4))
    made = Lion([first, p], **ROADS[road])
    first.grad, p.grad = torch.ones(3), rows_of([1, bad])
    with pytest.raises(ValueError, match=rf"row {bad} .*parameter 1 .*\(6, 4\)"):
        made.step()
    assert (first == 1).all()
    assert (p == 1).all()


@each_road
def test_sparse_rows_in_every_second_place(road: str) -> None:
    p = nn.Parameter(torch.zeros(6, 4))
    made = Signum([p], lr=1.0, weight_decay=0.0, **ROADS[road])
    for _ in range(2):
        index = torch.tensor([[1, 0, 3, 0]])[:, ::2]
        p.grad = torch.sparse_coo_tensor(index, torch.ones(2, 4), (6, 4), is_coalesced=True)
        made.step()
    assert p[:, 0].tolist() == [0, -2, 0, -2, 0, 0]


@each_road
def test_a_record_of_another_number_of_rows(road: str) -> None:
    first, embedding = nn.Parameter(torch.ones(3)), nn.Embedding(8, 4)
    track_rows(embedding)
    p = embedding.weight
    made = Lion([{"params": [first]}, {"params": [p], "lazy": "ids"}], **ROADS[road])
    embedding(torch.tensor([7])).sum().backward()
    p.data, p.grad = p.data[:3].clone(), torch.ones(3, 4)
    first.grad, before = torch.ones(3), p.detach().clone()
    with pytest.raises(ValueError, match=r"8 rows .* shape \(3, 4\)"):
        made.step()
    assert (first == 1).all()
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    "count", [3, 3.0, torch.tensor(3), torch.tensor(3.0, dtype=torch.float64), torch.tensor(3.0).bfloat16()]
)
@each_road
def test_a_counter_of_a_rule_that_does_not_count(road: str, count: Any) -> None:
    p = nn.Parameter(torch.zeros(4))
    made = Lion([p], lr=1.0, weight_decay=0.0, **ROADS[road])
    for t in range(3):
        p.grad = torch.ones(4)
        made.step()
        if t == 0:
            made.state[p]["step"] = count.clone() if isinstance(count, torch.Tensor) else count
    assert made.state[p]["step"] == 5
    assert (p == -3).all()


@each_road
def test_a_gradient_without_memory(road: str) -> None:
    p = nn.Parameter(torch.ones(4))
    made = Lion([p], lr=0.5, weight_decay=1.0, **ROADS[road])
    for _ in range(2):
        p.grad = torch._efficientzerotensor(4)
        made.step()
    assert (p == 0.25).all()


@pytest.mark.parametrize("of", ["p", "buffer"])
@pytest.mark.parametrize("road", ["plain", *FUSED])  # torch's lists refuse it
def test_a_negative_bit(road: str, of: str) -> None:
    p = nn.Parameter(torch._neg_view(-torch.ones(4)) if of == "p" else torch.ones(4))
    made = Signum([p], lr=0.5, beta=0.5, weight_decay=0.0, **ROADS[road])
    p.grad = torch.ones(4)
    made.step()
    if of == "buffer":
        made.state[p]["momentum"] = torch._neg_view(-made.state[p]["momentum"])
    p.grad = torch.full((4,), -0.25)
    made.step()
    assert torch.equal(p.detach().resolve_neg(), torch.zeros(4))


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["tensor", "numpy"])
@each_road
def test_a_number_changed_in_place(road: str, make: Callable[[float], Any]) -> None:
    p, decay = nn.Parameter(torch.ones(4)), make(0.0)
    made = Tiger([p], lr=0.5, scale=1.0, weight_decay=0.0, **ROADS[road])
    made.param_groups[0]["weight_decay"] = decay
    for t in range(3):
        p.grad = torch.zeros(4)
        made.step()
        if t == 0:
            decay += 1.0
    assert (p == 0.25).all()


@each_road
def test_autograd_sees_that_its_tensors_were_written(road: str) -> None:
    p = nn.Parameter(torch.ones(4))
    made = AdamW([p], **ROADS[road])
    for _ in range(3):  # a plan that is kept, too
        loss = (p**2).sum()
        p.grad, before = torch.ones(4), p._version
        made.step()
        assert p._version > before
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("shrink", [None, 0.99])
@each_road
def test_autograd_may_go_on_where_no_weight_was_written(road: str, shrink: float | None) -> None:
    """Two forward passes before the first of two micro-batches is taken."""
    p = nn.Parameter(torch.ones(4))
    made = Signum([p], accumulate=2, shrink=shrink, **ROADS[road])
    for _ in range(2):
        losses = [(p**2).sum() for _ in range(2)]
        for loss in losses:
            loss.backward()
            made.step()
    assert not (p == 1).any()


@each_road
def test_inference_tensors_are_not_written_from_outside(road: str) -> None:
    with torch.inference_mode():
        p = torch.ones(4)
    made = Lion([p], lr=0.5, weight_decay=0.0, **ROADS[road])
    p.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="outside InferenceMode"):
        made.step()
    with torch.inference_mode():
        p.fill_(1.0)
        made.step()
    assert (p == 0.5).all()


@each_road
def test_a_state_that_was_replaced_is_let_go(road: str) -> None:
    p = nn.Parameter(torch.ones(4))
    made = Lion([p], **ROADS[road])
    for _ in range(3):
        p.grad = torch.ones(4)
        made.step()
        old = weakref.ref(made.state[p]["momentum"])
        made.load_state_dict(made.state_dict())
        made.state[p]["momentum"] = made.state[p]["momentum"].clone()
        gc.collect()
        assert old() is None


def cannot(p: torch.Tensor, g: torch.Tensor, *, lr: float) -> None:
    p.sub_(torch.special.bessel_j0(g) * lr)


@each_kernel
def test_what_a_later_group_lacks_is_known_before_an_earlier_one_moves(
    road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = optimizer(cannot, buffers=(), lr=0.1)
    first, p = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    made = cls([{"params": [first]}, {"params": [p]}])
    first.grad, p.grad = torch.ones(3), torch.ones(3)
    made.param_groups[1].update(ROADS[road])
    with pytest.raises(RuntimeError, match="bessel_j0"):
        made.step()
    assert (first == 1).all()
    if road == "cpu":
        made = Lion([{"params": [first]}, {"params": [p]}])
        made.param_groups[1]["fused"] = True
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(Unavailable, match="no-such-compiler"):
            made.step()
        assert (first == 1).all()


@each_road
def test_a_look_that_fails_forgets_no_gradient(road: str) -> None:
    first, p = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    made = Signum(
        [{"params": [first], "release_grads": True, "shrink": 0.5}, {"params": [p]}], **ROADS[road]
    )
    (first.sum() * float("nan")).backward()
    p.grad = torch.ones(3)
    made.state[p]["momentum"] = torch.zeros(5)
    with pytest.raises(ValueError, match="shape"):
        made.step()
    made.state[p]["momentum"] = torch.zeros(3)
    made.step()
    assert (first == 0.5).all()


@pytest.mark.parametrize(
    "places",
    [
        (slice(0, 6), slice(4, 10), slice(6, 12)),  # the second with the first and the third
        (slice(0, 4), slice(4, 10, 2), slice(6, 12)),  # a second that no kernel takes, with the third
        (slice(0, 12), slice(1, 3), slice(6, 8)),  # the others within the first
    ],
    ids=str,
)
@each_kernel
def test_tensors_that_share_memory_step_in_their_order(road: str, places: Sequence[slice]) -> None:
    results = []
    for own in ({}, ROADS[road]):
        memory = torch.arange(1.0, 13.0)
        ps = [nn.Parameter(memory[place]) for place in places]
        made = Lion(ps, lr=0.5, weight_decay=1.0, **own)
        for _ in range(3):
            for i, p in enumerate(ps):
                p.grad = torch.full_like(p, (-1.0) ** i)
            made.step()
        results.append(memory)
    assert torch.equal(*results)


@each_road
def test_a_counter_that_two_share(road: str) -> None:
    results = []
    for own in ({}, ROADS[road]):
        ps = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        made = AdamW(ps, **own)
        for t in range(3):
            for p in ps:
                p.grad = torch.arange(3.0)
            made.step()
            if t == 0:
                made.state[ps[1]]["step"] = made.state[ps[0]]["step"]
        results.append([*ps, made.state[ps[0]]["step"]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@each_road
def test_a_sparse_gradient_of_a_vector(road: str) -> None:
    memory = torch.zeros(64)
    p = nn.Parameter(memory[:8])
    made = Signum([p], lr=1.0, beta=0.0, weight_decay=0.0, **ROADS[road])
    torch.gather(p, 0, torch.tensor([1, 2, 2]), sparse_grad=True).sum().backward()
    made.step()
    assert memory.tolist() == [0.0, -1.0, -1.0, *[0.0] * 61]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@each_road
def test_the_default_dtype_does_not_matter(road: str, dtype: torch.dtype) -> None:
    values = torch.randn(100), torch.randn(100)
    results = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            p = nn.Parameter(values[0].clone())
            made = AdamW([p], **ROADS[road])
            for _ in range(3):
                p.grad = values[1].clone()
                made.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(p)
    assert torch.equal(*results)


@each_kernel
def test_what_no_kernel_takes_is_not_rounded_to_the_nearest_in_a_graph(road: str) -> None:
    p = nn.Parameter(torch.ones(64, 64).bfloat16()[:, ::2])
    options = dict(stochastic_rounding=True, capturable=True, **ROADS[road])
    made = Signum([p], **options)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"draws anew .* shape \(64, 32\)"):
        made.step()


@each_kernel
def test_a_group_that_is_taken_out_is_let_go(road: str) -> None:
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    made = Signum([{"params": [p]}, {"params": [q]}], **ROADS[road])
    for t in range(4):
        for x in (p, q):
            x.grad = torch.ones(4)
        made.step()
        if t == 1:
            gone = weakref.ref(made.state.pop(p)["momentum"])
            made.param_groups.pop(0)
    gc.collect()
    assert gone() is None


@each_road
def test_an_expanded_parameter_is_refused(road: str) -> None:
    with pytest.raises(ValueError, match=r"table of shape \(4,\).* memory"):
        Lion([("table", nn.Parameter(torch.ones(1).expand(4)))], **ROADS[road])


@each_road
def test_a_vector_within_a_matrix_steps_in_its_place(road: str) -> None:
    if road == "foreach":
        road = "plain"
    memory = torch.arange(1.0, 13.0)
    ps = [nn.Parameter(memory[2:6]), nn.Parameter(memory.view(3, 4))]
    made = Tiger(ps, lr=0.5, scale="row_rms", weight_decay=0.5, shrink=None, **ROADS[road])
    wanted = memory.clone()
    for _ in range(3):
        ps[0].grad, ps[1].grad = torch.ones(4), -torch.ones(3, 4)
        made.step()
        wanted[2:6] -= 0.25  # a vector has half the rate and no decay
        rows = wanted.view(3, 4)
        eta = 0.5 * rows.square().mean(1, keepdim=True).sqrt()
        rows.mul_(1 - 0.5 * eta).add_(eta)
    torch.testing.assert_close(memory, wanted)


def test_noise_follows_the_place_of_a_parameter_now() -> None:
    """As a run does that goes on from the state dict."""
    ps = [nn.Parameter(torch.ones(64).bfloat16()) for _ in range(2)]
    made = Signum([{"params": [p]} for p in ps], lr=1e-3, stochastic_rounding=True)
    alone = nn.Parameter(torch.ones(64).bfloat16())
    other = Signum([alone], lr=1e-3, stochastic_rounding=True)
    for t in range(4):
        for p in (*ps, alone):
            p.grad = torch.ones(64).bfloat16()
        made.step()
        if t == 0:
            made.param_groups.pop(0)
            alone.data.copy_(ps[1].data)
            state = copy.deepcopy(made.state[ps[1]])
            other.load_state_dict({**other.state_dict(), "state": {0: state}})
        else:
            other.step()
    assert torch.equal(ps[1], alone)
