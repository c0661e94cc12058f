"""What a step has to do to each parameter: looked at for all of them, before anything moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from minisign.engine import halves
from minisign.engine.contract import Owner
from minisign.engine.rounding import Noise, noise_of
from minisign.engine.shards import ask_all, is_sharded, local
from minisign.engine.tried import goes_by_rows
from minisign.engine.words import Rule

Group: TypeAlias = dict[str, Any]
_GRADIENT = attrgetter("grad")
_PLAIN = {float, int, str, bool}


class Guard(NamedTuple):
    """Where a gradient is not finite, buffers stay and θ ← (θ − center) shrink + center."""

    shrink: float
    center: float

    def shrunk(self, p: Tensor) -> Tensor:
        return (p - self.center).mul_(self.shrink).add_(self.center)


class Work(NamedTuple):
    """One parameter in a step, on this process."""

    rule: Rule  # or a half of it
    p: Tensor
    g: Tensor  # as p
    buffers: list[Tensor]  # as p
    numbers: Mapping[str, Any]
    noise: Noise | None  # None: what is widened is rounded to the nearest
    guard: Guard | None
    parameter: Tensor  # of which p is this process's piece
    state: dict[str, Any]
    taken: int | None  # how many micro-batches of a cycle will then be in the momentum


def look(
    optimizer: Owner, group: Group, given: Sequence[tuple[Tensor, Tensor]] | None = None
) -> list[Work]:
    """The work on the parameters of a group that have a gradient; or on ``given`` pairs.

    Raises:
        ValueError: a state that is not its parameter's.
    """
    sharded = not set(map(type, group["params"])) <= {Tensor, nn.Parameter} and any(
        map(is_sharded, group["params"])
    )
    if sharded:
        ask_all(optimizer, group)
    numbers, counts = numbers_of(optimizer, group), optimizer.counts or group["stochastic_rounding"]
    guard = None if group["shrink"] is None else Guard(group["shrink"], group["center"])
    names, own, overlaps = optimizer.buffers, optimizer.own, torch._debug_has_internal_overlap
    asks_whole = "rms" in optimizer.asks or not optimizer.is_known
    works = []
    if given is None:
        given = list(zip(group["params"], map(_GRADIENT, group["params"]), strict=True))
    for i, (p, g) in enumerate(given):
        if g is None and group["accumulate"] > 1:
            g = _missing(optimizer, p, group)
        if g is None:
            continue
        if asks_whole and (sharded or group["lazy"] or g.layout != torch.strided):
            _check_goes_by_rows(optimizer, numbers)
        state = optimizer.state[p] or new_state(optimizer, p, group)
        shape, x, buffers = p.shape, p, [state[name] for name in names]
        for b in (g, *buffers):
            if b.shape != shape:
                raise _wrong(group, i, p, b, state)
        if sharded:
            x, g, *buffers = map(local, (p, g, *buffers))
        for b in buffers:
            if overlaps(b) == 1:
                raise _wrong(group, i, p, b, state)
        rule, mine, taken, noise = optimizer.rule, numbers, None, None
        if sharded:
            sizes = optimizer.cache("whole rms")
            mine = mine | {name: sizes[p] for name, y in numbers.items() if y == "rms" and p in sizes}
        if own:
            mine = mine | optimizer.own_numbers(p, group)
        if counts:
            mine, noise = _counted(optimizer, p, state, group, mine)
        if group["accumulate"] > 1:
            rule, mine, taken = halves.due(rule, p, g, state, group, mine)
        works.append(Work(rule, x, g, buffers, mine, noise, guard, p, state, taken))
    return works


def numbers_of(optimizer: Owner, group: Group) -> Group:
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


def new_state(optimizer: Owner, p: Tensor, group: Group) -> dict[str, Any]:
    state: dict[str, Any] = optimizer.state[p]
    for name in optimizer.buffers:
        state[name] = torch.zeros_like(p, dtype=group["state_dtype"], memory_format=torch.preserve_format)
    return state


def _check_goes_by_rows(optimizer: Owner, numbers: Group) -> None:
    numbers = numbers | ({"step": 1.0} if optimizer.counts else {})
    if not goes_by_rows(optimizer.rule, len(optimizer.buffers), numbers):
        raise ValueError(
            f"{type(optimizer).__name__} cannot step on some rows only, as lazy and sparse gradients and "
            "sharded parameters ask: its rule makes a row depend on others (for an RMS of the whole tensor "
            'make the word an argument: scale="rms")'
        )


def _counted(
    optimizer: Owner, p: Tensor, state: dict[str, Any], group: Group, numbers: Group
) -> tuple[Group, Noise | None]:
    """The numbers with that of the step, if the rule has it; and the noise, which follows from it."""
    # On the device only where a CUDA graph or a kernel must see it: elsewhere reading would wait.
    device = p.device if group["capturable"] or group["fused"] else torch.device("cpu")
    step = state.get("step", 0.0)
    if not isinstance(step, Tensor) or step.device != device or step.dtype != torch.float32:
        step = state["step"] = torch.as_tensor(step, dtype=torch.float32, device=device).clone()
    noise = None
    if group["stochastic_rounding"] and p.dtype == torch.bfloat16 and not group["capturable"]:
        noise = Noise(p, noise_of(group["seed"], optimizer.number(p)), int(step.item()) + 1)
    if optimizer.counts:
        numbers = {**numbers, "step": step + 1 if group["capturable"] else step.item() + 1}
    return numbers, noise


def _missing(optimizer: Owner, p: Tensor, group: Group) -> Tensor | None:
    """Zero, if there was a gradient earlier in a cycle of micro-batches that ends now."""
    state = optimizer.state.get(p, {})
    if halves.is_last(group) and state.get("taken"):
        return torch.zeros_like(p)
    if halves.is_last(group) and "taken_rows" in state and state["taken_rows"].any():
        none, empty = p.new_empty((1, 0), dtype=torch.int64), p.new_empty((0, *p.shape[1:]))
        return torch.sparse_coo_tensor(none, empty, p.shape, check_invariants=False)
    return None


def _wrong(group: Group, i: int, p: Tensor, x: Tensor, state: Mapping[str, Any]) -> ValueError:
    name = next((name for name, b in state.items() if local(b) is local(x)), "gradient")
    called = group["param_names"][i] if "param_names" in group else f"parameter {i} of its group"
    return ValueError(
        f"{called} has shape {tuple(p.shape)}, and its {name} shape {tuple(x.shape)}, strides {x.stride()}:"
        " a checkpoint of another model or order of parameters, or a parameter that was replaced after a "
        "step; make the optimizer anew, or take the parameter's entry out of its state"
    )
