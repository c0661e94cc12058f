"""What a step has to do to each parameter: looked at for all of them, before anything moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minisign.engine import halves
from minisign.engine.checks import OVERLAP, OVERLAPS
from minisign.engine.contract import RuleOptimizer
from minisign.engine.rounding import Noise, noise_of
from minisign.engine.shards import ask_all, is_sharded, local
from minisign.engine.tried import goes_by_rows
from minisign.engine.words import Group, Rule

_GRADIENT = attrgetter("grad")
_PLAIN = {float, int, str, bool}


class Guard(NamedTuple):
    """Where a gradient is not finite, buffers stay and θ ← (θ − center) shrink + center."""

    shrink: float
    center: float

    def shrunk(self, p: Tensor) -> Tensor:
        return (p - self.center).mul_(self.shrink).add_(self.center)


class Work(NamedTuple):
    """One parameter in a step: ``rule(p, g, *buffers, **numbers)`` is due."""

    rule: Rule  # or a half of it
    p: Tensor  # what this process has of the parameter
    g: Tensor  # as p
    buffers: list[Tensor]  # as p
    numbers: Mapping[str, Any]
    noise: Noise | None  # None: what is widened is rounded to the nearest
    guard: Guard | None
    parameter: Tensor
    state: dict[str, Any]
    taken: int | None  # how many micro-batches of a cycle will then be in the momentum


def look(
    optimizer: RuleOptimizer, group: Group, given: Sequence[tuple[Tensor, Tensor]] | None = None
) -> list[Work]:
    """The work on the parameters of a group that have a gradient; or on ``given`` pairs.

    Raises:
        ValueError: a state that is not its parameter's. RuntimeError: a gradient of an unknown layout.
    """
    params, names = group["params"], optimizer.buffers
    sharded = not set(map(type, params)) <= {Tensor, nn.Parameter} and any(map(is_sharded, params))
    if sharded:
        ask_all(optimizer, group)
    numbers = numbers_of(optimizer, group)
    guard = None if group["shrink"] is None else Guard(group["shrink"], group["center"])
    counted = optimizer.has_step or group["stochastic_rounding"]
    asks_whole = "rms" in optimizer.asks or not optimizer.is_traceable
    works = []
    if given is None:
        given = list(zip(params, map(_GRADIENT, params), strict=True))
    for p, g in given:
        if g is None and group["accumulate"] > 1:
            g = _missing(optimizer, p, group)
        if g is None:
            continue
        if g.layout != torch.strided:
            _check_sparse(_called(group, p), p, g)
        if asks_whole and (sharded or group["lazy"] or g.layout != torch.strided):
            _check_goes_by_rows(optimizer, numbers)
        state = optimizer.state[p] or new_state(optimizer, p, group)
        buffers, shape = [state[name] for name in names], p.shape
        for x in (g, *buffers):
            if x.shape != shape:
                raise wrong(group, p, x, state)
        piece, mine = p, numbers
        if sharded:
            piece, g, *buffers = map(local, (p, g, *buffers))
            sizes = optimizer.cache("whole rms")
            mine = mine | {name: sizes[p] for name, y in numbers.items() if y == "rms" and p in sizes}
        for x in buffers:
            if OVERLAP(x) == OVERLAPS:
                raise wrong(group, p, x, state)
        if optimizer.per_tensor and (own := optimizer.own_numbers(p, group)):
            mine = mine | own
        rule, noise, taken = optimizer.rule, None, None
        if counted or "step" in state:
            mine, noise = _counted(optimizer, p, state, group, mine)
        if group["accumulate"] > 1:
            rule, mine, taken = halves.due(rule, p, g, state, group, mine)
        works.append(Work(rule, piece, g, buffers, mine, noise, guard, p, state, taken))
    return works


def numbers_of(optimizer: RuleOptimizer, group: Group) -> Group:
    """The rule's numbers that all parameters of a group share."""
    found = {name: group[name] for name in optimizer.bounds if name != "betas"}
    found |= {f"beta{i}": beta for i, beta in enumerate(group.get("betas", ()), start=1)}
    for name, x in found.items():
        if type(x) not in _PLAIN:  # a tensor, or NumPy's, from a schedule
            found[name] = x if name == "lr" and isinstance(x, Tensor) and _is_seen(x, group) else x.item()
    return found


def _is_seen(lr: Tensor, group: Group) -> bool:
    """Whether a CUDA graph, a kernel or autograd has to see the tensor, and not the number in it."""
    return bool(group["capturable"] or group["differentiable"] or (group["fused"] and lr.is_cuda))


def new_state(optimizer: RuleOptimizer, p: Tensor, group: Group) -> dict[str, Any]:
    state: dict[str, Any] = optimizer.state[p]
    for name in optimizer.buffers:
        state[name] = torch.zeros_like(p, dtype=group["state_dtype"], memory_format=torch.preserve_format)
    return state


def _check_goes_by_rows(optimizer: RuleOptimizer, numbers: Group) -> None:
    numbers = numbers | ({"step": 1.0} if optimizer.has_step else {})
    if not goes_by_rows(optimizer.rule, len(optimizer.buffers), numbers):
        raise ValueError(
            f"{type(optimizer).__name__} cannot step on some rows only, as lazy and sparse gradients and "
            "sharded parameters ask: its rule makes a row depend on others (for an RMS of the whole tensor "
            'make the word an argument: scale="rms")'
        )


def counter(optimizer: RuleOptimizer, p: Tensor, state: dict[str, Any], group: Group) -> Tensor:
    """How many steps a parameter has taken, float32; one that a checkpoint has otherwise is made anew."""
    # On the device only where a CUDA graph or a kernel must see it: elsewhere reading would wait.
    device = p.device if group["capturable"] or group["fused"] else torch.device("cpu")
    step = state.get("step", 0.0)
    if not isinstance(step, Tensor) or step.device != device or step.dtype != torch.float32:
        step = state["step"] = torch.as_tensor(step, dtype=torch.float32, device=device).clone()
    return step


def _counted(
    optimizer: RuleOptimizer, p: Tensor, state: dict[str, Any], group: Group, numbers: Group
) -> tuple[Group, Noise | None]:
    """The numbers with that of the step, if the rule has it; and the noise, which follows from it."""
    step, noise = counter(optimizer, p, state, group), None
    if group["stochastic_rounding"] and p.dtype == torch.bfloat16 and not group["capturable"]:
        noise = Noise(p, noise_of(group["seed"], optimizer.place_of(p)[2]), step)
    if optimizer.has_step:
        numbers = {**numbers, "step": step.item() + 1 if step.is_cpu else step + 1}
    return numbers, noise


def _missing(optimizer: RuleOptimizer, p: Tensor, group: Group) -> Tensor | None:
    """Zero, if there was a gradient earlier in a cycle of micro-batches that ends now."""
    state = optimizer.state.get(p, {})
    if halves.is_last(group) and state.get("taken"):
        return torch.zeros_like(p)
    if halves.is_last(group) and "taken_rows" in state and local(state["taken_rows"]).any():
        here = local(p)
        none, empty = here.new_empty((1, 0), dtype=torch.int64), here.new_empty((0, *p.shape[1:]))
        return torch.sparse_coo_tensor(none, empty, p.shape, check_invariants=False)
    return None


def _check_sparse(called: str, p: Tensor, g: Tensor) -> None:
    if g.layout != torch.sparse_coo or g.sparse_dim() != 1:
        raise RuntimeError(
            "minisign takes dense gradients and those of nn.Embedding(sparse=True), "
            f"got layout {g.layout} for a parameter of shape {tuple(p.shape)}"
        )
    rows = g._indices()
    if rows.numel():
        least, most = (int(x) for x in rows.aminmax())
        if least < 0 or most >= len(p):
            raise ValueError(
                f"a sparse gradient has row {least if least < 0 else most} for {called}, of shape "
                f"{tuple(p.shape)}"
            )


def _called(group: Group, p: Tensor) -> str:
    i = [id(q) for q in group["params"]].index(id(p))
    return group["param_names"][i] if "param_names" in group else f"parameter {i} of its group"


def wrong(group: Group, p: Tensor, x: Tensor, state: Mapping[str, Any]) -> ValueError:
    """``x``, its gradient or of its state, is not of the parameter's shape, or shares memory within it."""
    name = next((name for name, b in state.items() if local(b) is local(x)), "gradient")
    return ValueError(
        f"{_called(group, p)} has shape {tuple(p.shape)}, and its {name} shape {tuple(x.shape)}, strides "
        f"{x.stride()}: a checkpoint of another model or order of parameters, or a parameter that was "
        "replaced after a step; make the optimizer anew, or take the parameter's entry out of its state"
    )
