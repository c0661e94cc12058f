"""PyTorch's own expectations of an optimizer, run over ours.

``torch.testing._internal.common_optimizers`` ships the machinery of PyTorch's test suite: the record of
what an optimizer supports, the configurations that follow from it, the errors every optimizer must
raise, and a tracker for comparing runs step by step. The four optimizers are described in its terms and
put through what PyTorch asks of its own.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import re
import unittest
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    TensorTracker,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optim_error_inputs_func_adamw,
)

from minisign import AdamW, Lion, Signum, Tiger


def _inputs(own: list[dict[str, Any]], device: Any = None, dtype: Any = None) -> list[OptimizerInput]:
    common = [
        {},
        {"lr": 0.01},
        {"lr": torch.tensor(0.01)},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "capturable": True},
        {"lr": torch.tensor(0.01), "capturable": True},
    ]
    return [OptimizerInput(params=None, kwargs=kw, desc=str(kw)) for kw in [*common, *own]]


def _errors(own: list[tuple[dict[str, Any], str]], device: Any, dtype: Any) -> list[Any]:
    from torch.testing._internal.common_optimizers import ErrorOptimizerInput

    return get_error_inputs_for_all_optims(device, dtype) + [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=message),
            error_type=ValueError,
            error_regex=message,
        )
        for kwargs, message in own
    ]


def _info(cls: Any, own: list[dict[str, Any]], errors: list[tuple[dict[str, Any], str]]) -> OptimizerInfo:
    return OptimizerInfo(
        cls,
        optim_inputs_func=functools.partial(_inputs, own),
        optim_error_inputs_func=functools.partial(_errors, errors),
        scheduler_inputs=(
            [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
            [lambda opt: ReduceLROnPlateau(opt)],
        ),
        supported_impls=("foreach", "differentiable"),
        has_capturable_arg=True,
        supports_sparse=True,
        supports_complex=False,
    )


OUR_OPTIM_DB = [
    _info(Signum, [{"beta": 0.0}], [({"beta": 1.0}, "Invalid beta: 1.0")]),
    _info(
        Lion, [{"betas": (0.5, 0.5)}], [({"betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0")]
    ),
    _info(
        Tiger,
        [{"scale": 1.0}, {"scale": "row_rms"}, {"scale": 1.0, "accumulate": 2}],
        [({"beta": -0.1}, "Invalid beta: -0.1"), ({"scale": "std"}, "unknown scale 'std'")],
    ),
    _info(AdamW, [{"betas": (0.8, 0.9), "eps": 1e-6}], [({"eps": -1.0}, "Invalid epsilon value: -1.0")]),
]
infos = pytest.mark.parametrize("info", OUR_OPTIM_DB, ids=lambda info: info.name)
CPU = torch.device("cpu")


def configurations(info: OptimizerInfo) -> list[dict[str, Any]]:
    """Every configuration of an optimizer, with foreach, differentiable and fused off and on."""
    found = _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info)
    # torch lists foreach only for accelerators; ours works on the CPU as well.
    ours = [i.kwargs for i in info.optim_inputs_func(device=CPU)]
    return [
        *(i.kwargs for i in found),
        *({**kwargs, "foreach": True, "differentiable": False} for kwargs in ours),
        *({**kwargs, "fused": True, "foreach": False, "differentiable": False} for kwargs in ours),
    ]


def small_model() -> tuple[nn.Parameter, nn.Parameter, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn((10, 5), generator=generator))
    bias = nn.Parameter(torch.randn((10,), generator=generator))
    return weight, bias, torch.randn(5, generator=generator)


def loss_of(optimizer: Any, weight: Any, bias: Any, x: Any) -> Any:
    optimizer.zero_grad()
    loss = (weight.mv(x) + bias).pow(2).sum()
    if optimizer.defaults.get("maximize"):
        loss = -loss
    loss.backward()
    return loss


@infos
def test_errors(info: OptimizerInfo) -> None:
    params = [nn.Parameter(torch.randn(2, 3))]
    for case in info.optim_error_inputs_func(device=CPU, dtype=torch.float32):
        given = case.optimizer_error_input
        arguments = given.params if given.params is not None else params
        if issubclass(case.error_type, Warning):
            with pytest.warns(case.error_type, match=case.error_regex):
                info.optim_cls(arguments, **given.kwargs)
        else:
            with pytest.raises(case.error_type, match=case.error_regex):
                info.optim_cls(arguments, **given.kwargs)


def test_errors_of_torch_adamw() -> None:
    """What torch.optim.AdamW refuses, ours does too, the same way where the option exists."""
    for case in optim_error_inputs_func_adamw("cpu", torch.float32):
        given = case.optimizer_error_input
        if {"fused", "amsgrad"} & set(given.kwargs) or "lr as a Tensor" in case.error_regex:
            continue
        if given.params is not None or case.error_type is TypeError or "betas" in case.error_regex:
            continue  # covered above, and by our own TypeErrors
        with pytest.raises((ValueError, TypeError), match=re.escape(case.error_regex.split(":")[0])):
            AdamW([nn.Parameter(torch.randn(1, 1))], **given.kwargs)


@infos
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("with_scheduler", [True, False])
def test_goes_the_right_direction(info: OptimizerInfo, contiguous: bool, with_scheduler: bool) -> None:
    schedulers = info.scheduler_inputs if with_scheduler else [None]
    for schedule, options in itertools.product(schedulers, configurations(info)):
        weight, bias, x = small_model()
        if not contiguous:
            weight = nn.Parameter(torch.randn((10, 5, 2))[..., 0].detach())
            bias = nn.Parameter(torch.randn((10, 2))[..., 0].detach())
            assert not weight.is_contiguous()
        if options.get("differentiable"):
            weight, bias = weight.clone(), bias.clone()
            weight.retain_grad()
            bias.retain_grad()
            options = {**options, "differentiable": False}  # direction only; gradients are tested apart
        optimizer = info.optim_cls([weight, bias], **options)
        made = [make(optimizer) for make in schedule] if schedule else []
        first = loss_of(optimizer, weight, bias, x).item()
        for _ in range(20):
            loss = optimizer.step(functools.partial(loss_of, optimizer, weight, bias, x))
            for scheduler in made:
                scheduler.step(*([loss.detach()] if isinstance(scheduler, ReduceLROnPlateau) else []))
        last = loss_of(optimizer, weight, bias, x).item()
        assert (last > first) if options.get("maximize") else (last < first), options


@infos
def test_param_group_options(info: OptimizerInfo) -> None:
    for options in configurations(info):
        if options.get("differentiable") or isinstance(options.get("lr"), torch.Tensor):
            continue
        weight, bias, x = small_model()
        start = weight.detach().clone(), bias.detach().clone()
        groups = [{"params": [weight]}, {"params": [bias], "lr": 0.0}]
        optimizer = info.optim_cls(groups, **options)
        for _ in range(4):
            loss_of(optimizer, weight, bias, x)
            optimizer.step()
        assert torch.equal(bias, start[1])
        assert not torch.equal(weight, start[0])


@infos
@pytest.mark.parametrize("other", [{"foreach": True}, {"lr": "tensor"}, {"capturable": True}], ids=str)
def test_same_result_another_way(info: OptimizerInfo, other: dict[str, Any]) -> None:
    """foreach bit for bit; a tensor lr and capturable to a rounding of the rate."""
    for options in (i.kwargs for i in info.optim_inputs_func(device=CPU)):
        if "capturable" in options and "capturable" in other:
            continue
        if other.get("capturable") and options.get("accumulate", 1) > 1:
            continue
        if "lr" in other and "lr" in options:
            continue
        changes = {"lr": torch.tensor(1e-3)} if "lr" in other else other
        base = {"lr": 1e-3, **options} if "lr" in other else options
        exact = other == {"foreach": True}
        tracker = TensorTracker(None if not exact else {"rtol": 0, "atol": 0})
        for kwargs in (base, {**base, **changes}):
            weight, bias, x = small_model()
            empty, scalar = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.tensor(0.5))
            params = [weight, bias, empty, scalar]
            optimizer = info.optim_cls(params, **kwargs)
            for _ in range(7):
                loss_of(optimizer, weight, bias, x)
                empty.grad, scalar.grad = torch.empty(0, 3), torch.tensor(-1.0)
                optimizer.step()
                for p in params:
                    if kwargs is base:
                        tracker.add(p)
                    else:
                        tracker.pop_check_set(p, _Case())
        assert tracker.all_popped()


class _Case(unittest.TestCase):
    """torch's tracker compares through a test case; plain torch.testing says the same."""

    def assertEqual(self, first: Any, second: Any, **tolerance: Any) -> None:
        torch.testing.assert_close(first, second, **tolerance)


@infos
def test_no_gradient_no_step(info: OptimizerInfo) -> None:
    for options in configurations(info):
        p = nn.Parameter(torch.randn(5, 3))
        start = p.detach().clone()
        optimizer = info.optim_cls([p], **{**options, "differentiable": False})
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
        assert torch.equal(p, start)
        assert not optimizer.state[p]


@infos
def test_zero_gradient_no_step(info: OptimizerInfo) -> None:
    for options in configurations(info):
        p = nn.Parameter(torch.randn(5, 3))
        start = p.detach().clone()
        optimizer = info.optim_cls([p], **{**options, "weight_decay": 0.0, "differentiable": False})
        for _ in range(4):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        assert torch.equal(p, start)


@infos
def test_gradients_are_not_written_to(info: OptimizerInfo) -> None:
    for options in configurations(info):
        p = nn.Parameter(torch.randn(5, 3))
        optimizer = info.optim_cls([p], **{**options, "differentiable": False})
        for _ in range(4):
            p.grad = torch.randn(5, 3)
            kept = p.grad.clone()
            optimizer.step()
            assert torch.equal(p.grad, kept)


@infos
@pytest.mark.parametrize("named", [False, True])
def test_resume_in_the_middle(info: OptimizerInfo, named: bool) -> None:
    """Seven steps are three, a checkpoint through torch.save and weights_only loading, and four more."""
    for options in configurations(info):
        if options.get("differentiable"):
            continue
        finals = []
        for broken in (False, True):
            weight, bias, x = small_model()
            pairs = [("weight", weight), ("bias", bias)]
            params = pairs if named else [weight, bias]
            optimizer = info.optim_cls(params, **copy.deepcopy(options))
            for t in range(7):
                if broken and t == 3:
                    file = io.BytesIO()
                    torch.save(optimizer.state_dict(), file)
                    file.seek(0)
                    optimizer = info.optim_cls(params, **copy.deepcopy({**options, "lr": 123.0}))
                    optimizer.load_state_dict(torch.load(file, weights_only=True))
                loss_of(optimizer, weight, bias, x)
                optimizer.step()
            if named:
                assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
            finals.append((weight, bias))
        assert torch.equal(finals[0][0], finals[1][0]), options
        assert torch.equal(finals[0][1], finals[1][1]), options


@infos
def test_older_state_dict(info: OptimizerInfo) -> None:
    """A checkpoint from before an option existed loads, and the option has its default."""
    p = nn.Parameter(torch.randn(4, 3))
    optimizer = info.optim_cls([p], lr=0.02)
    p.grad = torch.randn(4, 3)
    optimizer.step()
    saved = optimizer.state_dict()
    for flag in ("foreach", "differentiable", "maximize", "capturable", "lazy", "lazy_momentum"):
        del saved["param_groups"][0][flag]
    again = info.optim_cls([p])
    again.load_state_dict(saved)
    again.step()
    assert again.param_groups[0]["lr"] == 0.02
    assert again.param_groups[0]["lazy"] is False


@infos
def test_state_dict_is_repeatable(info: OptimizerInfo) -> None:
    weight, bias, x = small_model()
    optimizer = info.optim_cls([weight, bias], lr=0.01)
    loss_of(optimizer, weight, bias, x)
    optimizer.step()
    first, second = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(second)
    assert str(optimizer.state_dict()) == str(first)


@infos
def test_deepcopy(info: OptimizerInfo) -> None:
    weight, bias, x = small_model()
    optimizer = info.optim_cls([weight, bias], lr=0.01, weight_decay=0.1)
    loss_of(optimizer, weight, bias, x)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    public = {a for a in vars(optimizer) if not a.startswith("_")}
    assert public == {a for a in vars(twin) if not a.startswith("_")}
    (copied, _) = twin.param_groups[0]["params"]
    assert copied is not weight
    copied.grad = weight.grad.clone()
    loss_of(optimizer, weight, bias, x)
    copied.grad = weight.grad.clone()
    optimizer.step()
    twin.step()
    assert torch.equal(copied, weight)


@infos
def test_hooks(info: OptimizerInfo) -> None:
    seen: list[str] = []
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    optimizer = info.optim_cls([p])
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda opt, state: seen.append("saved"))

    def halve(opt: Any, state: Any) -> Any:
        seen.append("loading")
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.5
        return state

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saved", "loading", "loaded"]
    assert optimizer.param_groups[0]["lr"] == 0.5


@infos
def test_sparse_gradients(info: OptimizerInfo) -> None:
    """A sparse gradient steps as the lazy optimizer does on the dense one, duplicates added up first."""
    for options in configurations(info):
        options = {**options, "differentiable": False, "weight_decay": 0.1}
        start = torch.randn(6, 4)
        sparse, dense = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        of_sparse = info.optim_cls([sparse], **options)
        of_dense = info.optim_cls([dense], **{**options, "lazy": "grad"})
        for _ in range(6):
            ids = torch.randint(0, 6, (1, 5))
            sparse.grad = torch.sparse_coo_tensor(ids, torch.randn(5, 4), (6, 4), check_invariants=False)
            dense.grad = sparse.grad.to_dense()
            of_sparse.step()
            of_dense.step()
            torch.testing.assert_close(sparse, dense, rtol=0, atol=0)


@infos
def test_differentiable(info: OptimizerInfo) -> None:
    """d θ_3 / d lr by autograd, with lr a tensor that requires it, against a difference quotient."""
    x = torch.randn(4, 3, dtype=torch.float64)
    grads = torch.randn(3, 4, 3, dtype=torch.float64)

    def final(lr: torch.Tensor) -> torch.Tensor:
        p = x.clone().requires_grad_(True) * 1.0
        optimizer = info.optim_cls([p], lr=lr, weight_decay=0.1, differentiable=True)
        for g in grads:
            p.grad = g
            optimizer.step()
        return (p * x).sum()

    with warnings.catch_warnings():
        # Reading .grad of a tensor that is no leaf warns; differentiable optimizers must.
        warnings.simplefilter("ignore")
        lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
        final(lr).backward()
        with torch.no_grad():
            step = 1e-6
        up = final(torch.tensor(0.01 + step, dtype=torch.float64)).item()
        down = final(torch.tensor(0.01 - step, dtype=torch.float64)).item()
    assert lr.grad is not None
    assert lr.grad.item() == pytest.approx((up - down) / (2 * step), rel=1e-6)


@infos
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mixed_dtypes(info: OptimizerInfo, dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.ones(4, 4, dtype=d)) for d in (dtype, torch.float32)]
    for foreach in (False, True):
        optimizer = info.optim_cls(params, lr=0.1, foreach=foreach)
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        assert all((p < b).all() for p, b in zip(params, before, strict=True))
        assert [p.dtype for p in params] == [dtype, torch.float32]
