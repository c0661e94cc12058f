"""Several optimizers behind one face, as schedulers, scalers, hooks and copies see it."""

from __future__ import annotations

import collections
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from minisign import AdamW, Hybrid, Lion, Signum, Tiger, param_groups


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.inner = nn.Embedding(4, 2), nn.LayerNorm(2), nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.output = nn.Linear(2, 4)


def hybrid(model: nn.Module) -> Hybrid:
    groups = param_groups(model)
    return Hybrid(
        AdamW([g for g in groups if g["kind"] == "embedding"], lr=0.1),
        Lion([g for g in groups if g["kind"] != "embedding"], lr=0.01),
    )


def fill(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_hybrid_is_its_parts() -> None:
    one, two = Zoo(), Zoo()
    two.load_state_dict(one.state_dict())
    together, apart = hybrid(one), hybrid(two).optimizers
    for seed in range(5):
        fill(one, seed)
        fill(two, seed)
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    together.zero_grad()
    assert all(p.grad is None for p in one.parameters() if p.requires_grad)


def test_schedulers_reach_every_member() -> None:
    optimizer = hybrid(Zoo())
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for o in optimizer.optimizers for g in o.param_groups][:2] == [0.05, 0.005]


def test_hybrid_resumes_and_copies(tmp_path: Any) -> None:
    model = Zoo()
    optimizer = hybrid(model)
    CosineAnnealingLR(optimizer, 10)
    for seed in range(3):
        fill(model, seed)
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x")
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    saved = torch.load(tmp_path / "x", weights_only=True)
    other = Zoo()
    other_optimizer = hybrid(other)
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    for o in (optimizer, twin_optimizer, other_optimizer):
        assert all(
            g is h
            for g, h in zip(o.param_groups, (g for m in o.optimizers for g in m.param_groups), strict=True)
        )
    for seed in range(3, 6):
        for m, o in ((model, optimizer), (twin, twin_optimizer), (other, other_optimizer)):
            fill(m, seed)
            o.step()
    for a, b, c in zip(model.parameters(), twin.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_hybrid_closure_runs_once() -> None:
    model = Zoo()
    optimizer = hybrid(model)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        fill(model, 0)
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert calls == [True]


def test_hybrid_takes_any_torch_optimizer_and_refuses_the_rest() -> None:
    a, b = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    Hybrid([torch.optim.SGD([a], lr=0.1), Tiger([b])])
    with pytest.raises(ValueError, match="more than one parameter group"):
        Hybrid(Lion([a]), Tiger([a, b]))
    with pytest.raises(TypeError, match=r"takes torch\.optim\.Optimizer, got 3"):
        Hybrid(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        Hybrid()
    with pytest.raises(ValueError, match="cannot tell which of its optimizers"):
        Hybrid(Lion([a]), Tiger([b])).add_param_group({"params": [nn.Parameter(torch.ones(2))]})


# --- its state is the members' --------------------------------------------------------------------


def two(**options: Any) -> tuple[nn.Parameter, nn.Parameter, Hybrid]:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    made = Hybrid(AdamW([a], lr=0.1, **options), Lion([b], lr=0.1, **options))
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    return a, b, made


def test_its_state_can_be_cleared_assigned_and_taken_out() -> None:
    a, b, made = two()
    made.step()
    assert len(made.state) == 2
    assert a in made.state
    assert nn.Parameter(torch.ones(2)) not in made.state
    del made.state[a]
    assert a not in made.optimizers[0].state
    made.state.pop(b)
    assert len(made.state) == len(made.optimizers[1].state) == 0
    assert made.state.get(a) is None
    assert a not in made.state
    made.step()
    saved = dict(made.state)
    made.state = collections.defaultdict(dict)
    assert len(made.state) == 0
    made.state = saved
    assert made.optimizers[1].state[b] is saved[b]
    made.state[a] = {"step": 3}
    assert made.optimizers[0].state[a] == {"step": 3}
    made.state.clear()
    assert not made.optimizers[0].state


def test_a_parameter_that_is_replaced_takes_its_state_along() -> None:
    """As 3D Gaussian splatting does when it adds points."""
    a, _, made = two()
    made.step()
    (group,) = made.optimizers[0].param_groups
    state = made.state.get(a, None)
    del made.state[a]
    grown = nn.Parameter(torch.cat([a.detach(), torch.ones(3)]))
    state["exp_avg"] = torch.cat([state["exp_avg"], torch.zeros(3)])
    state["exp_avg_sq"] = torch.cat([state["exp_avg_sq"], torch.zeros(3)])
    group["params"][0] = grown
    made.state[grown] = state
    grown.grad = torch.ones(5)
    made.step()
    assert made.optimizers[0].state[grown]["step"] == 2
    with pytest.raises(KeyError):
        made.state[nn.Parameter(torch.ones(1))]


def test_a_member_that_loads_its_own_state_still_gets_the_schedule() -> None:
    _, _, made = two()
    scheduler = ExponentialLR(made, 0.1)
    made.step()
    member = made.optimizers[1]
    member.load_state_dict(member.state_dict())
    assert any(group is member.param_groups[0] for group in made.param_groups)
    scheduler.step()
    assert [round(group["lr"], 6) for group in made.param_groups] == [0.01, 0.01]


def test_a_member_may_get_another_group() -> None:
    _, _, made = two()
    made.optimizers[0].add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(made.param_groups) == 3
    assert len(made.state_dict()["param_groups"]) == 3


def test_its_defaults_are_what_all_members_have() -> None:
    _, _, made = two()
    assert made.defaults["betas"] == (0.9, 0.999)
    assert "eps" not in made.defaults
    scheduler = OneCycleLR(made, max_lr=1.0, total_steps=10, base_momentum=0.5, max_momentum=0.8)
    made.step()
    scheduler.step()
    assert all(0.5 < group["betas"][0] < 0.8 for group in made.param_groups)
    parts = Hybrid(AdamW([nn.Parameter(torch.ones(2))]), Signum([nn.Parameter(torch.ones(2))]))
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        OneCycleLR(parts, max_lr=1.0, total_steps=10)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_the_same_defaults_and_hooks_of_its_own(copied: Any) -> None:
    _, _, made = two()
    made.step()
    other = copied(made)
    assert other.defaults == made.defaults
    assert len(other.state) == 2
    assert not set(map(id, other.state)) & set(map(id, made.state))
    called: list[Any] = []
    made.register_step_post_hook(lambda *given: called.append(given[0]))
    other.step()
    assert called == []


# --- who is told of a step ------------------------------------------------------------------------


def test_hooks_of_all_optimizers_are_called_once() -> None:
    _, _, made = two()
    seen: list[Any] = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: seen.append(("before", o))),
        register_optimizer_step_post_hook(lambda o, *_: seen.append(("after", o))),
    ]
    try:
        for own in (made, made.optimizers[0]):
            own.register_step_post_hook(lambda o, *_: seen.append(("own", o)))
        made.step()
    finally:
        for handle in handles:
            handle.remove()
    first = made.optimizers[0]
    assert seen == [("before", made), ("own", first), ("own", made), ("after", made)]


def test_hooks_of_all_optimizers_are_there_after_an_error() -> None:
    _, b, made = two()
    handle = register_optimizer_step_pre_hook(lambda o, *_: seen.append(o))
    seen: list[Any] = []
    try:
        made.step()
        made.optimizers[1].state[b]["momentum"] = torch.ones(3)
        with pytest.raises(ValueError, match="shape"):
            made.step()
        made.optimizers[1].state.clear()
        made.step()
    finally:
        handle.remove()
    assert seen == [made] * 3


def test_a_grad_scaler_sees_through_it() -> None:
    a, b, made = two()
    for t in range(3):
        made.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = a.detach().clone()
        scaler.scale((a.sum() + b.sum()) * (torch.inf if t == 1 else 1.0)).backward()
        scaler.step(made)
        scaler.update()
        assert torch.equal(a, before) == (t == 1)
    assert made.optimizers[0].state[a]["exp_avg"].abs().max() < 1


def test_released_gradients_and_a_grad_scaler_exclude_each_other_within_it_too() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    made = Hybrid(AdamW([a]), Tiger([b], release_grads=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(a.sum() + b.sum()).backward()
    with pytest.raises(RuntimeError, match="release_grads=True and a GradScaler"):
        scaler.step(made)
