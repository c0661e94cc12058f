"""Behaviour of the optimizers that an oracle does not show: torch, published code, lazy rows,
accumulation, groups, Hybrid, bad input, and bugs that other implementations shipped."""

from __future__ import annotations

import copy
import gc
import re
from typing import Any

import lion_pytorch
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from minisign import AdamW, Hybrid, Lion, Signum, Tiger, param_groups, track_rows
from minisign.engine import tried
from minisign.engine.rows import _LOOKED_UP, recorded_rows

ALL = [Signum, Lion, Tiger, AdamW]
every = pytest.mark.parametrize("cls", ALL)


def run(cls: Any, params: list[nn.Parameter], grads: list[list[torch.Tensor]], **options: Any) -> Any:
    optimizer = cls(params, **options)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return optimizer


def twins(*shapes: tuple[int, ...], n: int = 2, dtype: Any = torch.float32) -> list[list[nn.Parameter]]:
    starts = [torch.randn(s, dtype=dtype) for s in shapes]
    return [[nn.Parameter(s.clone()) for s in starts] for _ in range(n)]


# --- against code by others -----------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_adamw_is_torch_adamw_bit_for_bit(foreach: bool, maximize: bool) -> None:
    ours, theirs = twins((6, 5), (7,), ())
    grads = [[torch.randn_like(p) for p in ours] for _ in range(50)]
    options = dict(
        lr=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, maximize=maximize, foreach=foreach
    )
    run(AdamW, ours, grads, **options)
    run(torch.optim.AdamW, theirs, grads, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_lion_is_a_published_lion() -> None:
    ours, theirs = twins((16, 8), (16,), dtype=torch.float64)
    grads = [[torch.randn_like(p) for p in ours] for _ in range(50)]
    run(Lion, ours, grads, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.3)
    run(lion_pytorch.Lion, theirs, grads, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_lion_with_equal_betas_is_signum_is_base_tiger() -> None:
    a, b, c = twins((6, 5), (7,), n=3)
    grads = [[torch.randn_like(p) for p in a] for _ in range(20)]
    shared = dict(lr=1e-2, weight_decay=0.1)
    run(Signum, a, grads, beta=0.9, **shared)
    run(Lion, b, grads, betas=(0.9, 0.9), **shared)
    run(Tiger, c, grads, beta=0.9, scale=1.0, **shared)
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(a, b, c, strict=True))


# --- lazy rows ------------------------------------------------------------------------------------


def embedding_run(cls: Any, how: str, steps: int = 12, micro: int = 1, **options: Any) -> torch.Tensor:
    """The final weight of an embedding trained lazily: by ids, by gradient, or by sparse gradients."""
    torch.manual_seed(3)
    embedding = nn.Embedding(20, 4, sparse=how == "sparse", padding_idx=0)
    lazy = {"ids": {"lazy": "ids"}, "grad": {"lazy": "grad"}, "sparse": {}}[how]
    if how == "ids":
        track_rows(embedding)
    optimizer = cls([embedding.weight], lr=0.05, weight_decay=0.1, **lazy, **options)
    target = torch.randn(4)
    for _ in range(steps):
        for _ in range(micro):
            ids = torch.randint(0, 20, (3,))
            ((embedding(ids) - target) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return embedding.weight.detach()


@every
@pytest.mark.parametrize("momentum", ["freeze", "decay"])
@pytest.mark.parametrize("micro", [1, 3])
def test_three_ways_to_be_lazy_agree_bit_for_bit(cls: Any, momentum: str, micro: int) -> None:
    ids, grad, sparse = (
        embedding_run(cls, how, micro=micro, lazy_momentum=momentum) for how in ("ids", "grad", "sparse")
    )
    assert torch.equal(ids, grad)
    assert torch.equal(grad, sparse)


@pytest.mark.parametrize("scale", ["rms", "row_rms", 1.0])
def test_lazy_agrees_under_accumulation(scale: Any) -> None:
    ids, grad, sparse = (
        embedding_run(Tiger, how, scale=scale, accumulate=4) for how in ("ids", "grad", "sparse")
    )
    assert torch.equal(ids, grad)
    assert torch.equal(grad, sparse)


@every
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_absent_rows_keep_every_bit(cls: Any, data: st.DataObject) -> None:
    p = nn.Parameter(torch.randn(6, 3))
    optimizer = cls([p], lr=0.1, weight_decay=0.5, lazy="grad")
    for rows in data.draw(st.lists(st.sets(st.integers(0, 5)), min_size=2, max_size=5)):
        before = p.detach().clone()
        momentum = {k: v.clone() for k, v in optimizer.state[p].items() if v.shape == p.shape}
        p.grad = torch.zeros(6, 3)
        p.grad[sorted(rows)] = torch.randn(len(rows), 3)
        optimizer.step()
        absent = sorted(set(range(6)) - rows)
        assert torch.equal(p[absent], before[absent])
        for name, value in momentum.items():
            assert torch.equal(optimizer.state[p][name][absent], value[absent])
        assert (p[sorted(rows)] != before[sorted(rows)]).any(1).all()


def test_without_lazy_the_absent_row_goes_on_for_ever() -> None:
    """The article's effect in three lines, and its end at exactly −1/λ."""
    p = nn.Parameter(torch.zeros(2, 1))
    optimizer = Tiger([p], lr=0.1, weight_decay=0.01, scale=1.0)
    p.grad = torch.tensor([[1.0], [0.0]])
    optimizer.step()
    p.grad = torch.zeros(2, 1)
    for _ in range(20000):
        optimizer.step()
    # float32 stops where a step is less than half a unit in the last place: 6e-8/(2ηλ) short of it.
    assert -100.0 <= p[0].item() <= -100.0 * (1 - 1e-4)
    assert p[1].item() == 0.0  # never seen: m = 0


@every
def test_two_meanings_of_lazy_differ_in_the_momentum_only(cls: Any) -> None:
    kept, decayed = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    freeze = cls([kept], lr=0.01, lazy="grad")
    decay = cls([decayed], lr=0.01, lazy="grad", lazy_momentum="decay")
    name = cls.buffers[0]
    for rows in ([0], [1], [1]):
        for p, optimizer in ((kept, freeze), (decayed, decay)):
            p.grad = torch.zeros(2, 3)
            p.grad[rows] = 1.0
            optimizer.step()
    assert torch.equal(kept, decayed)
    group = decay.param_groups[0]
    beta = group["beta"] if "beta" in group else group["betas"][-1 if cls is Lion else 0]
    ratio = decay.state[decayed][name][0] / freeze.state[kept][name][0]
    torch.testing.assert_close(ratio, torch.full((3,), beta**2))


def test_tracked_rows() -> None:
    embedding = nn.Embedding(10, 2, padding_idx=9)
    handle = track_rows(embedding)
    optimizer = Signum([embedding.weight], lr=0.1, beta=0.0, weight_decay=1.0, lazy="ids")
    start = embedding.weight.detach().clone()
    embedding(torch.tensor([[1, 2], [2, 9]])).sum().backward()
    with torch.no_grad():
        embedding(torch.tensor([5]))  # evaluation does not count
    embedding(torch.tensor(3)).sum().backward()  # a second micro-batch does
    optimizer.step()
    moved = (embedding.weight != start).any(1).nonzero().flatten().tolist()
    assert moved == [1, 2, 3]
    start = embedding.weight.detach().clone()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()  # nothing looked up since
    assert torch.equal(embedding.weight, start)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"nothing tracks the parameter of shape \(10, 2\)"):
        optimizer.step()


def test_tracking_follows_a_copy_and_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Embedding(5, 2))
    track_rows(model)
    twin = copy.deepcopy(model)
    optimizer = Lion(twin.parameters(), lr=0.1, lazy="ids")
    twin(torch.tensor([4])).sum().backward()
    optimizer.step()
    before = len(_LOOKED_UP)
    del model, twin, optimizer
    gc.collect()
    assert len(_LOOKED_UP) == before - 2


def test_sparse_duplicates_are_added_before_the_sign() -> None:
    """A token twice in the batch, with gradients +3 and −1: the sign is that of the sum, once."""
    p = nn.Parameter(torch.zeros(2, 1))
    p.grad = torch.sparse_coo_tensor([[0, 0]], [[3.0], [-1.0]], (2, 1), check_invariants=False)
    Signum([p], lr=1.0, beta=0.0).step()
    assert p.tolist() == [[-1.0], [0.0]]


# --- Tiger ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["rms", "row_rms", 1.0])
def test_accumulation_is_one_step_on_the_mean(scale: Any) -> None:
    a, b = twins((6, 5), (5,), dtype=torch.float64)
    micro = [[torch.randn_like(p) for p in a] for _ in range(12)]
    means = [[sum(gs) / 4 for gs in zip(*micro[i : i + 4], strict=True)] for i in (0, 4, 8)]
    in_four = run(Tiger, a, micro, lr=0.1, scale=scale, accumulate=4).state
    at_once = run(Tiger, b, means, lr=0.1, scale=scale).state
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)
        # A sign does not tell how large a momentum is.
        torch.testing.assert_close(in_four[x]["momentum"], at_once[y]["momentum"], rtol=1e-13, atol=1e-13)


def test_accumulation_moves_only_at_the_end_of_a_cycle() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = Tiger([p], lr=0.1, accumulate=3)
    moved = []
    for _ in range(7):
        before = p.detach().clone()
        p.grad = torch.ones(2, 2)
        optimizer.step()
        moved.append(not torch.equal(p, before))
    assert moved == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("how", ["dense", "sparse"])
def test_a_missing_gradient_counts_as_zero_within_a_cycle(how: str) -> None:
    a, b = twins((4, 3), (4, 3), n=2)
    for params, missing in ((a, None), (b, "zeros")):
        optimizer = Tiger(params, lr=0.1, accumulate=3)
        for t in range(6):
            g = torch.ones(4, 3) * (-1.0) ** t
            first = g if t % 3 == 0 else (None if missing is None else torch.zeros(4, 3))
            params[0].grad = first if first is None or how == "dense" else first.to_sparse(1)
            params[1].grad = g
            optimizer.step()
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    idle = nn.Parameter(torch.ones(3, 3))
    busy = nn.Parameter(torch.ones(3, 3))
    optimizer = Tiger([idle, busy], accumulate=2)
    for _ in range(4):
        busy.grad = torch.ones(3, 3)
        optimizer.step()
    assert torch.equal(idle, torch.ones(3, 3))


def test_a_zero_tensor_can_start() -> None:
    p, row = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    optimizer = Tiger([{"params": [p]}, {"params": [row], "scale": "row_rms"}], lr=0.1, weight_decay=0.0)
    p.grad, row.grad = torch.ones(3, 2), torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(p, torch.full((3, 2), -0.1))
    assert torch.equal(row[0], torch.full((2,), -0.1))
    torch.testing.assert_close(row[1], torch.tensor([3.0, 4.0]) - 0.1 * (12.5**0.5))


def test_vectors_take_half_the_rate_and_no_decay() -> None:
    vector, scalar, matrix = (nn.Parameter(torch.full(s, 2.0)) for s in ((3,), (), (2, 2)))
    optimizer = Tiger([vector, scalar, matrix], lr=0.1, weight_decay=0.5)
    for p in (vector, scalar, matrix):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(vector, torch.full((3,), 1.95))
    assert torch.equal(scalar, torch.tensor(1.95))
    torch.testing.assert_close(matrix, torch.full((2, 2), 2 - 0.2 * (1 + 0.5 * 2)))
    literal = nn.Parameter(torch.full((3,), 2.0))  # a number is taken as it is, for every shape
    literal.grad = torch.ones(3)
    Tiger([literal], lr=0.1, weight_decay=0.5, scale=1.0).step()
    torch.testing.assert_close(literal, torch.full((3,), 2 - 0.1 * (1 + 0.5 * 2)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_gradient_that_is_not_finite_shrinks_its_own_tensor(bad: float, foreach: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = Tiger(param_groups(model), lr=0.1, shrink=0.9, foreach=foreach)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    momenta = {n: optimizer.state[p]["momentum"].clone() for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = torch.ones_like(p)
        if name in ("0.weight", "1.weight"):
            p.grad.view(-1)[1] = bad
    optimizer.step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * 0.9)
    torch.testing.assert_close(after["1.weight"], (before["1.weight"] - 1) * 0.9 + 1)  # towards one
    assert torch.equal(optimizer.state[after["0.weight"]]["momentum"], momenta["0.weight"])
    assert (after["0.bias"] < before["0.bias"]).all()  # the others go on


def test_huge_but_finite_gradients_are_not_mistaken_for_infinite_ones() -> None:
    for foreach in (False, True):
        p = nn.Parameter(torch.ones(4, 4))
        # Neither their norm nor, from the second step on, their product with the momentum is finite.
        run(Tiger, [p], [[torch.full((4, 4), 3e38)]] * 2, lr=0.1, weight_decay=0.0, foreach=foreach)
        torch.testing.assert_close(p, torch.full((4, 4), 0.81))


def test_scale_is_the_rms_not_the_standard_deviation() -> None:
    p = nn.Parameter(torch.full((3, 3), 2.0))  # standard deviation 0, RMS 2
    p.grad = torch.ones(3, 3)
    Tiger([p], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(p, torch.full((3, 3), 1.8))


def test_the_authors_rule_in_full() -> None:
    model = nn.ModuleDict(dict(table=nn.Embedding(4, 2), linear=nn.Linear(2, 2), gain=nn.LayerNorm(2)))
    optimizer = Tiger(param_groups(model))
    rule = {g["kind"]: (g["scale"], g["weight_decay"], g["center"]) for g in optimizer.param_groups}
    assert rule == {
        "embedding": ("row_rms", 0.01, 0.0),
        "head": ("rms", 0.01, 0.0),
        "norm": (0.5, 0.0, 1.0),
        "bias": (0.5, 0.0, 0.0),
    }
    chosen = Tiger(param_groups(model, embedding={"scale": "rms", "weight_decay": 0.5}))
    assert (chosen.param_groups[0]["scale"], chosen.param_groups[0]["weight_decay"]) == ("rms", 0.5)
    base = Tiger(param_groups(model), scale=1.0)  # the base form is one rule for all
    assert {(g["scale"], g["weight_decay"]) for g in base.param_groups} == {(1.0, 0.01)}


def test_a_group_added_in_the_middle_of_a_cycle_is_in_step() -> None:
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Tiger([a], accumulate=3)
    a.grad = torch.ones(2, 2)
    optimizer.step()
    optimizer.add_param_group({"params": [b]})
    b.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(b, torch.ones(2, 2))
    optimizer.step()
    assert not torch.equal(a, torch.ones(2, 2))
    assert not torch.equal(b, torch.ones(2, 2))


# --- groups ---------------------------------------------------------------------------------------


class MyNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))


class Zoo(nn.Module):
    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.head = nn.Linear(2, 4)  # before the embedding: the order must not matter
        self.words = nn.Embedding(4, 2)
        self.norm, self.mine = nn.LayerNorm(2), MyNorm()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.free = nn.Parameter(torch.ones(3, 3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.output = nn.Linear(2, 4)
        if tie:
            self.output.weight = self.words.weight


def kinds(groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {g["kind"]: [name for name, _ in g["params"]] for g in groups}


def test_routing_by_module() -> None:
    assert kinds(param_groups(Zoo(tie=False))) == {
        "embedding": ["words.weight"],
        "head": ["output.weight"],
        "norm": ["norm.weight", "mine.gain", "inner.1.weight"],
        "bias": ["head.bias", "norm.bias", "inner.0.bias", "inner.1.bias", "output.bias"],
        "matrix": ["free", "head.weight", "inner.0.weight"],
    }


def test_a_tied_matrix_goes_once_and_is_an_embedding() -> None:
    found = kinds(param_groups(Zoo(tie=True)))
    assert found["embedding"] == ["words.weight"]
    assert "head" not in found
    assert not any("output.weight" in names for names in found.values())


def test_the_output_layer_can_be_named() -> None:
    model = Zoo(tie=False)
    assert kinds(param_groups(model, output=model.head))["head"] == ["head.weight"]
    optimizer = Lion(param_groups(model, head={"lr": 0.5}, bias={"weight_decay": 0.0}), weight_decay=0.1)
    rates = {g["kind"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert rates["head"] == (0.5, 0.1)
    assert rates["bias"] == (1e-4, 0.0)
    torch.optim.AdamW(param_groups(model))  # and torch's own take the groups too


def test_bad_groups() -> None:
    with pytest.raises(ValueError, match="unknown kind 'embeddings'"):
        param_groups(Zoo(tie=False), embeddings={})
    with pytest.raises(TypeError, match=r"options of 'head' must be a mapping, got 0\.1"):
        param_groups(Zoo(tie=False), head=0.1)  # type: ignore[arg-type]


# --- bad input ------------------------------------------------------------------------------------

BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    *((cls, {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0") for cls in ALL),
    *((cls, {"lr": float("nan")}, ValueError, "Invalid learning rate: nan") for cls in ALL),
    *((cls, {"lr": float("inf")}, ValueError, "Invalid learning rate: inf") for cls in ALL),
    *((cls, {"lr": "0.1"}, TypeError, "learning rate must be a number, got '0.1'") for cls in ALL),
    *((cls, {"weight_decay": -0.1}, ValueError, "Invalid weight_decay value: -0.1") for cls in ALL),
    *((cls, {"weight_decay": float("nan")}, ValueError, "weight_decay value: nan") for cls in ALL),
    *((cls, {"lazy": "rows"}, ValueError, "unknown lazy 'rows'") for cls in ALL),
    *((cls, {"lazy": True}, ValueError, "unknown lazy True") for cls in ALL),
    *((cls, {"lazy_momentum": "keep"}, ValueError, "unknown lazy_momentum 'keep'") for cls in ALL),
    *((cls, {"lazi": "grad"}, TypeError, "unknown option 'lazi'") for cls in ALL),
    *((cls, {"foreach": True, "differentiable": True}, ValueError, "exclude each other") for cls in ALL),
    (Signum, {"beta": 1.0}, ValueError, "Invalid beta: 1.0"),
    (Signum, {"beta": None}, TypeError, "beta must be a number, got None"),
    (Lion, {"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1: 1.0"),
    (Lion, {"betas": (float("nan"), 0.9)}, ValueError, "index 0: nan"),
    (Lion, {"betas": 0.9}, TypeError, "betas must be a pair of numbers, got 0.9"),
    (Lion, {"betas": (0.9,)}, TypeError, "betas must be a pair of numbers, got (0.9,)"),
    (AdamW, {"betas": (0.9, 0.99, 0.999)}, TypeError, "must be a pair of numbers, got (0.9, 0.99, 0.999)"),
    *(
        (cls, {name: "no"}, TypeError, f"{name} must be True or False, got 'no'")
        for name in ("maximize", "capturable", "differentiable")
        for cls in ALL
    ),
    *(
        (cls, {"foreach": 1}, ValueError, "unknown foreach 1: choose one of None, True, False")
        for cls in ALL
    ),
    (AdamW, {"eps": float("nan")}, ValueError, "Invalid epsilon value: nan"),
    (Tiger, {"beta": -0.1}, ValueError, "Invalid beta: -0.1"),
    (Tiger, {"scale": "std"}, ValueError, "unknown scale 'std'"),
    (Tiger, {"scale": -1.0}, ValueError, "Invalid scale: -1.0"),
    (Tiger, {"scale": None}, TypeError, "scale must be a number, got None"),
    (Tiger, {"accumulate": 0}, ValueError, "Invalid accumulate: 0"),
    (Tiger, {"accumulate": 2.0}, TypeError, "whole number of micro-batches, got 2.0"),
    (Tiger, {"accumulate": 2, "capturable": True}, ValueError, "needs accumulate=1, got 2"),
    (Tiger, {"shrink": 1.5}, ValueError, "Invalid shrink: 1.5"),
]


@pytest.mark.parametrize(("cls", "options", "error", "message"), BAD)
def test_bad_options(cls: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        cls([nn.Parameter(torch.ones(2, 2))], **options)
    if message.startswith(("unknown option", "exclude")):
        return
    optimizer = cls([nn.Parameter(torch.ones(2, 2))])  # and the same in a group added later
    with pytest.raises(error, match=re.escape(message)):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], **options})
    assert len(optimizer.param_groups) == 1


@every
def test_a_gradient_that_no_road_takes_moves_nothing(cls: Any) -> None:
    dense, other = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = cls([{"params": [dense]}, {"params": [other]}])
    dense.grad, other.grad = torch.ones(2, 2), torch.ones(2, 2).to_sparse(2)
    with pytest.raises(RuntimeError, match=r"sparse_coo for a parameter of shape \(2, 2\)"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2, 2))


@every
@pytest.mark.parametrize("fused", [False, "cpu", "triton"])
def test_where_tensors_are_made_by_default_does_not_matter(cls: Any, fused: Any) -> None:
    def train() -> list[torch.Tensor]:
        ps = [nn.Parameter(torch.ones(3, 2, device="cpu", dtype=torch.bfloat16)) for _ in range(4)]
        options: list[dict[str, Any]] = [{}, {"lazy": "grad"}, {"lazy": "grad", "lazy_momentum": "decay"}]
        options += [{"accumulate": 2}] if cls in (Signum, Tiger) else [{}]
        groups = [{"params": [p], **own} for p, own in zip(ps, options, strict=True)]
        optimizer = cls(groups, lr=0.1, stochastic_rounding=True, fused=fused)
        for _ in range(2):
            for p in ps:
                p.grad = torch.tensor([[1.0, -2.0], [0.0, 0.0], [3.0, 0.5]], device="cpu").to(p.dtype)
            optimizer.step()
        return [p.detach() for p in ps]

    usual = train()
    for cached in (tried._halves, tried._goes_by_rows):
        cached.cache_clear()
    with torch.device("meta"):
        assert all(map(torch.equal, train(), usual))


@every
def test_bad_parameters(cls: Any) -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"lazy='grad' needs parameters with rows .* shape \(3,\)"):
        cls([matrix, vector], lazy="grad")
    with pytest.raises(ValueError, match=r"bias of shape \(3,\)"):
        cls([("weight", matrix), ("bias", vector)], lazy="ids")
    with pytest.raises(ValueError, match=r"more than one parameter group: the_weight of shape \(2, 2\)"):
        cls([{"params": [("a", matrix)]}, {"params": [("the_weight", matrix)]}])
    with pytest.raises(ValueError, match=r"real floating-point parameters.*complex64"):
        cls([torch.ones(2, 2, dtype=torch.complex64)])
    two_dims = torch.sparse_coo_tensor([[0], [1]], [1.0], (2, 2), check_invariants=False)
    optimizer = cls([matrix])
    matrix.grad = two_dims
    with pytest.raises(RuntimeError, match=r"nn\.Embedding\(sparse=True\)"):
        optimizer.step()


def test_tracking_something_else() -> None:
    with pytest.raises(TypeError, match=r"found no nn\.Embedding in Linear"):
        track_rows(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got 3"):
        track_rows(3)  # type: ignore[arg-type]


# --- bugs that others shipped ---------------------------------------------------------------------


@every
def test_sign_of_zero_is_zero(cls: Any) -> None:
    """DeepSpeed's FusedLion, a Triton port of Tiger: rows without a gradient drifted."""
    p = nn.Parameter(torch.ones(4, 4))
    run(cls, [p], [[torch.zeros(4, 4)]] * 5, weight_decay=0.0)
    assert torch.equal(p, torch.ones(4, 4))


@every
def test_momentum_is_written_back(cls: Any) -> None:
    """Two ports of Tiger were silently memoryless."""
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = run(cls, [p], [[torch.ones(2, 2)]])
    before = p.detach().clone()
    p.grad = torch.zeros(2, 2)
    optimizer.step()
    assert (p < before - 1e-6).all()


@every
def test_the_group_has_the_last_word(cls: Any) -> None:
    """The constructor's rate used where the group's was meant breaks schedulers and resuming; a rate
    multiplied in place compounds over parameters."""
    ps = [nn.Parameter(torch.ones(2, 2)) for _ in range(6)]
    optimizer = cls(ps, lr=0.1, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.025
    for p in ps:
        p.grad = torch.ones(2, 2)
    optimizer.step()
    for p in ps:
        torch.testing.assert_close(p, torch.full((2, 2), 0.975))
    assert optimizer.param_groups[0]["lr"] == 0.025


@every
def test_decay_is_decoupled(cls: Any) -> None:
    """bitsandbytes #1992: coupled decay in Lion, unseen because the tests had λ = 0. Decoupled, a
    weight with a zero gradient shrinks by 1 − ηλ and its momentum stays zero."""
    p = nn.Parameter(torch.full((2, 2), 3.0))
    options = {"scale": 1.0} if cls is Tiger else {}
    optimizer = run(cls, [p], [[torch.zeros(2, 2)]], lr=0.1, weight_decay=0.5, **options)
    torch.testing.assert_close(p, torch.full((2, 2), 3.0 * 0.95))
    assert not optimizer.state[p][cls.buffers[0]].any()


@every
def test_state_keeps_its_dtype_on_load(cls: Any) -> None:
    """torch casts a float32 state to a bfloat16 parameter's dtype; here a resumed run goes on as it was."""
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = run(cls, [p], [[torch.ones(2, 2, dtype=torch.bfloat16)]])
    saved = copy.deepcopy(optimizer.state_dict())
    name = cls.buffers[0]
    saved["state"][0][name] = torch.full((2, 2), 1 / 3)  # no bfloat16 has this value
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[p][name], torch.full((2, 2), 1 / 3))
    other = Hybrid(cls([p]))
    other.load_state_dict(saved)
    assert other.state[p][name].dtype == torch.float32


def test_rows_are_recorded_however_an_embedding_is_called_and_whoever_pads() -> None:
    weight = nn.Parameter(torch.ones(4, 2))
    plain, padded = nn.Embedding(4, 2), nn.Embedding(4, 2, padding_idx=0)
    plain.weight = padded.weight = weight
    track_rows(nn.ModuleList([plain, padded]))
    plain(torch.tensor([0, 1]))
    padded(input=torch.tensor([0, 2]))
    assert recorded_rows(weight).tolist() == [True, True, True, False]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_on_a_sparse_gradient_ends_the_record(fused: bool) -> None:
    embedding = nn.Embedding(4, 2)
    track_rows(embedding)
    optimizer = Lion(embedding.parameters(), lr=0.1, lazy="ids", fused=fused)
    embedding(torch.tensor([0])).sum().backward()
    embedding.weight.grad = embedding.weight.grad.to_sparse(1)
    optimizer.step()
    assert not recorded_rows(embedding.weight).any()


@pytest.mark.trained
def test_a_model_trains_with_each() -> None:
    """A linear regression: each optimizer brings the loss down tenfold."""
    x = torch.randn(64, 5)
    y = x @ torch.randn(5, 3)
    for make in (
        lambda p: Signum(p, lr=0.02),
        lambda p: Lion(p, lr=0.02),
        lambda p: Tiger(p, lr=0.02, scale=1.0),
        lambda p: Tiger(p, lr=0.05),
        lambda p: AdamW(p, lr=0.02),
    ):
        model = nn.Linear(5, 3)
        optimizer = make(model.parameters())
        first = F.mse_loss(model(x), y).item()
        for _ in range(200):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        assert F.mse_loss(model(x), y).item() < first / 10
