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

from minisign.engine import roads, work
from minisign.engine.contract import RuleOptimizer
from minisign.engine.halves import is_last, move, shrink, take
from minisign.engine.tried import keep_and_weight
from minisign.engine.words import Group
from minisign.engine.work import Work, new_state, numbers_of


def hook(optimizer: RuleOptimizer, number: int) -> None:
    """Has autograd hand over the gradients of a group as soon as they are there."""
    group, hooked = optimizer.param_groups[number], optimizer.cache("hooked")
    # Not the optimizer itself: a model that outlives it must keep its gradients.
    this = weakref.ref(optimizer)

    def take_in(p: Tensor) -> None:
        found = this()
        if found is not None and (own := found.param_groups[number])["release_grads"]:
            with torch.no_grad():
                _take_in(found, p, own)

    for p in group["params"]:
        if group["release_grads"] and p.requires_grad and p not in hooked:
            hooked[p] = p.register_post_accumulate_grad_hook(take_in)


def look(optimizer: RuleOptimizer, group: Group) -> list[Work]:
    """The work that is left for a step: θ moves by m, or shrinks where a gradient was not finite."""
    for p in group["params"]:
        _take_in(optimizer, p, group)  # a gradient that did not come by way of backward
    bad = optimizer.cache("bad")
    flags = {p: bad.get(p, []) for p in group["params"] if optimizer.state.get(p)}
    is_bad = dict(zip(flags, _any_of_each(list(flags.values())), strict=True))
    last = is_last(group)
    # p in place of a gradient that is gone, and not read
    due = [(p, p.detach()) for p in flags if is_bad[p] or (last and optimizer.state[p].get("taken"))]
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
    moved, bad = {id(work.parameter) for work in works}, optimizer.cache("bad")
    for p in group["params"]:
        # Noise counts micro-batches that do not move θ as well.
        if bad.pop(p, None) and group["stochastic_rounding"] and id(p) not in moved:
            work.counter(optimizer, p, optimizer.state[p], group).add_(1)


def _take_in(optimizer: RuleOptimizer, p: Tensor, group: Group) -> None:
    """m takes the gradient of ``p``, which is freed."""
    g, p.grad = p.grad, None
    if g is None:
        return
    if g.layout != torch.strided:
        p.grad = g
        raise RuntimeError(
            f"release_grads=True takes dense gradients, got layout {g.layout} for a parameter of shape "
            f'{tuple(p.shape)}; give its group "release_grads": False'
        )
    state = optimizer.state[p] or new_state(optimizer, p, group)
    keep, weight = keep_and_weight(optimizer.rule, numbers_of(optimizer, group))
    keep = 1.0 if state.get("taken") else keep
    state["taken"] = state.get("taken", 0) + 1
    (m,) = (state[name] for name in optimizer.buffers)
    g = -g if group["maximize"] else g
    bad = take_and_free(m, g, keep, weight / group["accumulate"], group["shrink"] is not None)
    # θ shrinks in step(): here it may still be in use.
    optimizer.cache("bad").setdefault(p, []).append(bad)


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


def _any_of_each(flags: list[list[bool | Tensor]]) -> list[bool]:
    """Whether there is one true in each list; waits for a device once."""
    tensors = [flag for found in flags for flag in found if isinstance(flag, Tensor)]
    seen = iter(torch.stack([x.to(tensors[0].device) for x in tensors]).tolist() if tensors else [])
    known = [[next(seen) if isinstance(flag, Tensor) else flag for flag in found] for found in flags]
    return [any(found) for found in known]
