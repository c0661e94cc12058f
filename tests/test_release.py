"""Tiger(release_grads=True): the same weights as a step on the mean gradient, and the memory it saves."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minisign import Signum, Tiger, param_groups
from minisign.doctor.guard import SpikeGuard
from minisign.lab.jitter import jittered
from minisign.probes.memory import PeakMemory

K = 8


def model(seed: int = 0, width: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    return jittered(
        nn.Sequential(
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.Tanh(),
            nn.Linear(width, 3 * width),
            nn.Linear(3 * width, 4),
        )
    )


def loss_of(net: nn.Module, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(5, net[0].in_features, generator=generator)  # type: ignore[union-attr,arg-type]
    return net(x).pow(2).mean()


def train(
    steps: int, release: bool, k: int = K, bad: Any = (), dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, Tiger]:
    net = model().to(dtype)
    tiger = Tiger(param_groups(net), lr=1e-2, accumulate=k, release_grads=release, **options)
    for t in range(steps * k):
        loss = (
            loss_of(net, t) if dtype == torch.float32 else net(torch.randn(5, 16).to(dtype)).pow(2).mean()
        )
        if t in bad:
            loss = loss * math.inf
        loss.backward()
        assert all((p.grad is None) == release for p in net.parameters())
        tiger.step()
        tiger.zero_grad()
    return net, tiger


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("fused", [False, "cpu", "triton"])
@pytest.mark.parametrize("scale", ["rms", "row_rms", 1.0])
@pytest.mark.parametrize("maximize", [False, True])
def test_bit_for_bit_what_accumulation_does(fused: Any, scale: Any, maximize: bool) -> None:
    """Also with gradients that are not finite, in the middle of a cycle and at its end."""
    options = dict(scale=scale, maximize=maximize, bad=(3, 2 * K - 1, 4 * K))
    plain, released = train(6, False, **options), train(6, True, fused=fused, **options)
    if fused and scale != 1.0:  # another order of adding up squares
        assert difference(plain[0], released[0]) < 1e-6
        return
    assert difference(plain[0], released[0]) == 0
    for p, q in zip(plain[0].parameters(), released[0].parameters(), strict=True):
        assert torch.equal(plain[1].state[p]["momentum"], released[1].state[q]["momentum"])


@pytest.mark.trained
def test_one_step_on_the_mean_gradient() -> None:
    """k micro-batches and one step on the mean of their gradients: the same weights to 1e-6, 20 times."""
    mean = model()
    tiger = Tiger(param_groups(mean), lr=1e-2)
    for step in range(20):
        tiger.zero_grad()
        (sum(loss_of(mean, step * K + i) for i in range(K)) / K).backward()  # type: ignore[union-attr]
        tiger.step()
    assert difference(mean, train(20, True)[0]) <= 1e-6
    assert difference(mean, model()) > 1e-2


@pytest.mark.trained
def test_two_backwards_before_a_step() -> None:
    """Their gradients add up, as in p.grad."""
    nets = []
    for release in (False, True):
        net = model()
        tiger = Tiger(net.parameters(), lr=1e-2, release_grads=release)
        for t in range(6):
            loss_of(net, 2 * t).backward()
            loss_of(net, 2 * t + 1).backward()
            tiger.step()
            tiger.zero_grad()
        nets.append(net)
    assert difference(*nets) < 1e-6


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("k", [1, K])
def test_narrow_parameters(k: int, fused: bool, state_dtype: Any) -> None:
    """m is rounded after each micro-batch, with or without: equal, rounding at random too."""
    options = dict(dtype=torch.bfloat16, state_dtype=state_dtype)
    for rounded, bad, scale in ((True, (), 1.0), (False, (1, 4), 1.0 if fused else "rms")):
        options |= dict(stochastic_rounding=rounded, bad=bad, scale=scale)
        plain, released = train(3, False, k, **options), train(3, True, k, fused=fused, **options)
        assert difference(plain[0], released[0]) == 0


def test_resume_and_copy_in_the_middle_of_a_cycle() -> None:
    unbroken, _ = train(3, True)
    net, tiger = train(1, True)
    for t in range(K, K + 3):
        loss_of(net, t).backward()
        tiger.step()
    other = model()
    other.load_state_dict(net.state_dict())
    resumed = Tiger(param_groups(other), lr=1e-2, accumulate=K, release_grads=True)
    resumed.load_state_dict(copy.deepcopy(tiger.state_dict()))
    twin, twin_tiger = copy.deepcopy((net, tiger))
    for n, o in ((net, tiger), (other, resumed), (twin, twin_tiger)):
        for t in range(K + 3, 3 * K):
            loss_of(n, t).backward()
            assert all(p.grad is None for p in n.parameters())
            o.step()
        assert difference(n, unbroken) == 0


def test_a_model_outlives_its_optimizer() -> None:
    net = model()
    tiger = Tiger(net.parameters(), release_grads=True)
    del tiger
    gc.collect()
    loss_of(net, 0).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_gradient_set_by_hand_counts() -> None:
    ps = [nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    optimizers = [Tiger([p], release_grads=release) for p, release in zip(ps, (False, True), strict=True)]
    for p, optimizer in zip(ps, optimizers, strict=True):
        p.grad = torch.ones(3, 3)
        optimizer.step()
    assert torch.equal(*ps)
    assert not torch.equal(ps[0], torch.ones(3, 3))


def test_what_it_refuses() -> None:
    matrix = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(
        ValueError, match=r"release_grads=True and lazy='grad' exclude.*\"release_grads\": False"
    ):
        Tiger([matrix], lazy="grad", release_grads=True)
    with pytest.raises(ValueError, match="release_grads=True and capturable=True"):
        Tiger([matrix], capturable=True, release_grads=True)
    with pytest.raises(TypeError, match="release_grads must be True or False, got 1"):
        Tiger([matrix], release_grads=1)  # type: ignore[arg-type]
    embedding = nn.Embedding(4, 2, sparse=True)
    tiger = Tiger(embedding.parameters(), release_grads=True)
    with pytest.raises(RuntimeError, match=r"takes dense gradients, got layout torch\.sparse_coo"):
        embedding(torch.tensor([1])).sum().backward()
    embedding = nn.Embedding(4, 2, sparse=True)
    tiger = Tiger([{"params": embedding.parameters(), "release_grads": False}], release_grads=True)
    embedding(torch.tensor([1])).sum().backward()
    tiger.step()


@pytest.mark.parametrize("fused", [False, True])
def test_it_refuses_a_grad_scaler(fused: bool) -> None:
    net = model()
    tiger = Tiger(net.parameters(), release_grads=True, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(net, 0)).backward()
    with pytest.raises(RuntimeError, match="release_grads=True and a GradScaler exclude each other"):
        scaler.step(tiger)


@pytest.mark.parametrize("fused", [False, True])
def test_peak_memory(fused: bool) -> None:
    """Parameters, momentum and the largest gradient, within 5 %; accumulating keeps them all."""
    width = 256
    net = model(width=width)
    size = {p: p.numel() * 4 for p in net.parameters()}
    total, largest = sum(size.values()), max(size.values())
    peaks = {}
    for release in (True, False):
        net = model(width=width)
        tiger = Tiger(net.parameters(), accumulate=K, release_grads=release, fused=fused)
        for t in range(K):  # the state is made
            loss_of(net, t).backward()
            tiger.step()
            if not release:
                tiger.zero_grad()
        with PeakMemory(net, tiger) as memory:
            for t in range(K):
                loss_of(net, t).backward()
                tiger.step()
                if not release:
                    tiger.zero_grad()
        peaks[release] = memory.peak
    assert abs(peaks[True] / (2 * total + largest) - 1) < 0.05
    assert peaks[False] > 2.9 * total


# --- who takes them -------------------------------------------------------------------------------


def ones(count: int = 1) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2)) for _ in range(count)]


def base(params: Any, **options: Any) -> Tiger:
    return Tiger(params, lr=0.1, scale=1.0, weight_decay=0.0, release_grads=True, **options)


def test_the_optimizer_that_was_made_last_trains() -> None:
    """As when the cell of a notebook that makes it is run again."""
    (p,) = ones()
    old, new = base([p]), base([p])
    p.sum().backward()
    assert p.grad is None
    with pytest.raises(RuntimeError, match=r"shape \(2, 2\) go to another Tiger, which was made later"):
        old.step()
    new.step()
    assert (p == 0.9).all()
    del new
    gc.collect()
    p.sum().backward()
    assert p.grad is not None  # nobody's
    old.step()
    assert (p < 0.9).all()


def test_what_was_frozen_is_released_once_it_is_not() -> None:
    p, q = ones(2)
    q.requires_grad_(False)
    made = base([p, q])
    (p.sum() + q.sum()).backward()
    made.step()
    q.requires_grad_(True)
    for t in range(3):
        (p.sum() + q.sum()).backward()
        assert (q.grad is None) == (t > 0)
        made.step()
    assert torch.allclose(q, torch.full_like(q, 0.7))


@pytest.mark.parametrize("change", ["taken out", "reversed", "moved"])
def test_gradients_follow_their_group(change: str) -> None:
    results = []
    for release in (False, True):
        p, q = ones(2)
        made = Signum([{"params": [p], "beta": 0.0}, {"params": [q], "beta": 0.9}], release_grads=release)
        (p.sum() + q.sum()).backward()
        made.step()
        made.zero_grad()
        if change == "taken out":
            made.param_groups.pop(0)
        elif change == "reversed":
            made.param_groups.reverse()
        else:
            made.param_groups[0]["params"].append(made.param_groups[1]["params"].pop())
        (3 * p.sum() + 3 * q.sum()).backward()
        assert (q.grad is None) == release
        made.step()
        results.append([made.state[q]["momentum"], made.state[p]["momentum"], p.detach(), q.detach()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["load", "copy", "pickle"])
def test_what_is_known_of_a_gradient_goes_where_the_state_goes(how: str) -> None:
    (p,) = ones()
    made = base([p])
    p.sum().backward()
    made.step()
    saved, before = copy.deepcopy(made.state_dict()), p.detach().clone()
    (p.sum() * torch.nan).backward()
    if how == "load":  # a roll back: the bad gradient is forgotten
        made.load_state_dict(saved)
        p.sum().backward()
        made.step()
        assert torch.allclose(p, before - 0.1)
        return
    copied = copy.deepcopy((p, made)) if how == "copy" else pickle.loads(pickle.dumps((p, made)))
    for x, own in ((p, made), copied):
        own.step()
        assert torch.allclose(x, 0.99 * before)
        x.sum().backward()
        assert x.grad is None


def test_between_steps_a_state_has_nothing_of_it() -> None:
    (p,) = ones()
    made = base([p])
    p.sum().backward()
    assert made.state[p]["bad"] is False
    made.step()
    assert "bad" not in made.state[p]


def test_an_error_within_backward_loses_no_gradient() -> None:
    (p,) = ones()
    made = base([("table", p)], beta=0.5)
    p.sum().backward()
    made.step()
    made.state[p]["momentum"] = torch.ones(5)
    with pytest.raises(ValueError, match=r"table has shape \(2, 2\), and its momentum shape \(5,\)"):
        p.sum().backward()
    assert torch.equal(p.grad, torch.ones(2, 2))  # type: ignore[arg-type]
    made.state[p]["momentum"] = torch.full((2, 2), 0.5)
    made.step()
    assert (made.state[p]["momentum"] == 0.75).all()


@pytest.mark.parametrize("action", ["skip", "back", "slow"])
def test_a_guard_comes_too_late(action: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    for name in ("on_loss", "on_ratio"):
        with pytest.raises(ValueError, match=f"{name}='{action}' is not for release_grads=True"):
            SpikeGuard(model, base(model.parameters()), folder=tmp_path, **{name: action})
    SpikeGuard(model, base(model.parameters()))
