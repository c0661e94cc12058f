"""Gradients that go into a momentum within ``backward``, and are freed before the next one is made.

Then parameters, momentum and one gradient are alive, and no more. What ``p.register_hook`` does to a
gradient, each tensor by itself, comes before; what sees all gradients at once (clipping by a norm of all,
the mean over processes of ``DistributedDataParallel``, a GradScaler) comes too late.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from minisign.engine import roads, work
from minisign.engine.contract import RuleOptimizer
from minisign.engine.halves import is_last, move, shrink, take
from minisign.engine.tried import keep_and_weight
from minisign.engine.words import Group
from minisign.engine.work import Work, new_state, numbers_of

NO_SCALER = (
    "release_grads=True and a GradScaler exclude each other: gradients went into the momentum with a scale "
    "on them. Train in bfloat16, which needs no scale, or without release_grads"
)
# Who takes a parameter's gradients. Weak: a model that outlives its optimizer keeps them.
_OWNERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def hook(optimizer: RuleOptimizer, group: Group, anew: bool = True) -> None:
    """Has autograd hand over the gradients of a group as soon as they are there; ``anew``, also those that
    another optimizer has had so far."""
    if not group["release_grads"]:
        return
    for p in group["params"]:
        if p.requires_grad and (anew or p not in _OWNERS):
            if p not in _OWNERS:
                p.register_post_accumulate_grad_hook(_hand_over)
            _OWNERS[p] = weakref.ref(optimizer)


def _hand_over(p: Tensor) -> None:
    optimizer = _OWNERS[p]()
    if optimizer is not None and (group := optimizer.place_of(p)[0]).get("release_grads"):
        with torch.no_grad():
            _take_in(optimizer, p, group)


def look(optimizer: RuleOptimizer, group: Group) -> list[Work]:
    """The work that is left for a step: θ moves by m, or shrinks where a gradient was not finite.

    Raises:
        RuntimeError: another optimizer, made later, has the gradients.
    """
    hook(optimizer, group, anew=False)  # what was frozen before
    for p in group["params"]:
        if p in _OWNERS and _OWNERS[p]() not in (optimizer, None):
            raise RuntimeError(
                f"release_grads=True: the gradients of a parameter of shape {tuple(p.shape)} go to another "
                f"{type(_OWNERS[p]()).__name__}, which was made later; step with that one, or delete it"
            )
        _take_in(optimizer, p, group)  # a gradient that did not come by way of backward
    last, states = is_last(group), optimizer.state
    flags = {p: states[p].get("bad", False) for p in group["params"] if states.get(p)}
    is_bad = dict(zip(flags, _on_host(list(flags.values())), strict=True))
    # p in place of a gradient that is gone, and not read
    due = [(p, p.detach()) for p in flags if is_bad[p] or (last and states[p].get("taken"))]
    # A whole step, of which the first half is done.
    works = work.look(optimizer, {**group, "accumulate": 1}, due)
    taken = 0 if last else None
    return [
        x._replace(rule=shrink, numbers=x.guard._asdict(), guard=None, taken=taken)
        if x.guard and is_bad[x.parameter]
        else x._replace(rule=move(x.rule), guard=None, taken=taken)
        for x in works
    ]


def forget(optimizer: RuleOptimizer, group: Group, works: Sequence[Work]) -> None:
    """What was known of the gradients of a step that is made, of which these works are."""
    moved = {id(work.parameter) for work in works}
    for p in group["params"]:
        state = optimizer.state.get(p, {})
        # Noise counts micro-batches that do not move θ as well.
        if state.pop("bad", None) is not None and group["stochastic_rounding"] and id(p) not in moved:
            work.counter(optimizer, p, state, group).add_(1)


def _take_in(optimizer: RuleOptimizer, p: Tensor, group: Group) -> None:
    """m takes the gradient of ``p``, which is freed."""
    g = p.grad
    if g is None:
        return
    if g.layout != torch.strided:
        raise RuntimeError(
            f"release_grads=True takes dense gradients, got layout {g.layout} for a parameter of shape "
            f'{tuple(p.shape)}; give its group "release_grads": False'
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized() and _processes() > 1:
        raise RuntimeError(
            "release_grads=True is for one process: of several, each would take its own gradient before it "
            "is averaged, and their weights would part"
        )
    state = optimizer.state[p] or new_state(optimizer, p, group)
    (m,) = (state[name] for name in optimizer.buffers)
    if m.shape != p.shape:
        raise work.wrong(group, p, m, state)
    keep, weight = keep_and_weight(optimizer.rule, numbers_of(optimizer, group))
    keep = 1.0 if state.get("taken") else keep
    p.grad = None
    g = -g if group["maximize"] else g
    bad = take_and_free(m, g, keep, weight / group["accumulate"], group["shrink"] is not None)
    state["taken"] = state.get("taken", 0) + 1
    # θ shrinks in step(): here it may still be in use. Part of the state, which is loaded and copied.
    state["bad"] = bad | state.get("bad", False)


def _processes() -> int:
    return torch.distributed.get_world_size()


def take_and_free(m: Tensor, g: Tensor, keep: float, weight: float, check: bool) -> bool | Tensor:
    """m ← keep m + weight g, after which ``g`` may hold anything; m stays where ``g`` is not finite.

    Returns whether it was not, where ``check`` asks for that; on a GPU a 0-dim tensor, since to look
    would be to wait.
    """
    wide = torch.promote_types(torch.promote_types(m.dtype, g.dtype), torch.float32)
    target, g = m.to(wide), g.to(wide)
    bad: bool | Tensor = False
    if check and g.is_cpu:
        bad = not roads.all_finite(g, target)
    if check and not g.is_cpu and g.numel():
        least, most = torch.aminmax(g)  # NaN is both; and no mask of g's size is made
        finite = torch.isfinite(least) & torch.isfinite(most)
        bad = ~finite
        target.mul_(torch.where(finite, keep, 1.0).to(wide))
        target.add_(g.nan_to_num_(0.0, 0.0, 0.0).mul_(torch.where(finite, weight, 0.0).to(wide)))
    elif not bad:
        take(None, g, target, keep=keep, weight=weight)
    if target is not m:
        m.copy_(target)
    return bad


def _on_host(flags: Sequence[bool | Tensor]) -> list[bool]:
    """Waits for a device once."""
    tensors = [x for x in flags if isinstance(x, Tensor)]
    seen = iter(torch.stack([x.to(tensors[0].device) for x in tensors]).tolist() if tensors else [])
    return [bool(next(seen)) if isinstance(x, Tensor) else x for x in flags]
