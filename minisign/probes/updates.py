"""The update ratio r of each weight: what an optimizer makes of a gradient before the learning rate.

    Adam           r = m̂ / (√v̂ + ε)        m̂ = m / (1 − β₁ᵗ),   v̂ = v / (1 − β₂ᵗ)
    sign methods   r = sign(c)             c the momentum, or Lion's β₁m + (1 − β₁)g

so that a step is θ ← θ − ηr, apart from the decay and Tiger's scale. Molybog et al. (arXiv 2304.09871)
watch r of Adam: a bell around zero as long as successive gradients are independent, two modes at ±1 when
they are not, which they see before the loss jumps. They write m/(√v + ε); with the bias corrections r is
what moves the weight from the first step on. Everything here sees r just *before* its step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from minisign.probes.blocks import Blocks
from minisign.probes.gradients import batch_gradients

Batch = TypeVar("Batch")
BEYOND = 0.8  # |r| from which an entry counts as one that moves by nearly the whole learning rate
SECOND = ("exp_avg_sq", "max_exp_avg_sq")
# They take betas and eps as Adam does and make another update of them.
_OTHERS = (torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam)


@dataclass(frozen=True)
class Update:
    """The step that an optimizer is about to make with one tensor, in some of its entries [n].

    Attributes:
        gradient: g as the optimizer sees it.
        ratio: r.
        size: √v̂, the gradient's size as Adam remembers it; None for sign methods.
        eps: ε; 0 for sign methods.
    """

    gradient: Tensor
    ratio: Tensor
    size: Tensor | None
    eps: float


def coming_update(optimizer: torch.optim.Optimizer, p: Tensor, entries: int | None = None) -> Update:
    """:func:`coming_updates` of one parameter."""
    return coming_updates(optimizer, {"": [p]}, entries)[""]  # type: ignore[list-item]


@torch.no_grad()
def coming_updates(
    optimizer: torch.optim.Optimizer, blocks: Blocks, entries: int | None = None
) -> dict[str, Update]:
    """What ``optimizer.step()`` would make of each block now, the entries of its tensors in order.

    Gradients and state are only read. Rows that a lazy optimizer leaves alone have r = 0, and so have
    parameters without a gradient.

    Args:
        optimizer: of a kind that :func:`update_kind` knows, in all blocks.
        blocks: from :func:`~minisign.probes.tensor_blocks` or :func:`~minisign.probes.layer_blocks`.
        entries: of each tensor at most, evenly spread; None for all.

    Raises:
        ValueError: an optimizer that has no such ratio, as SGD, or a parameter that it does not hold.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    # Tensors with the same rule go through it together: many small operations cost more than their work.
    together: dict[tuple[Any, ...], list[Any]] = {}
    for name, block in blocks.items():
        for p in block:
            if id(p) not in groups:
                raise ValueError(f"{name or 'the tensor'} is not among the optimizer's parameters")
            group, state = groups[id(p)], optimizer.state.get(p, {})
            t = float(state.get("step", group.get("step", 0)))
            names = tuple(name for name in ("exp_avg", "momentum", *SECOND) if name in state)
            rule = (id(group), _known_kind(optimizer, group, state), t, names, p.dtype, p.device)
            together.setdefault(rule, []).append(p)
    of: dict[int, Update] = {}
    for (_, kind, t, names, *_), ps in together.items():
        group = groups[id(ps[0])]
        strides = [_stride(p, entries) for p in ps]
        gradients = [_gradient(p, group, stride) for p, stride in zip(ps, strides, strict=True)]
        kept = {
            name: torch.cat([_some(optimizer.state[p][name], s) for p, s in zip(ps, strides, strict=True)])
            for name in names
        }
        ratio, size = _rule(kind, group, t, torch.cat(gradients), kept)
        lengths = [len(g) for g in gradients]
        ratios = ratio.split(lengths)
        sizes = [None] * len(ps) if size is None else size.split(lengths)
        for p, g, r, of_p, stride in zip(ps, gradients, ratios, sizes, strides, strict=True):
            if (touched := _touched(p, group, stride)) is not None:
                r = r * touched
            of[id(p)] = Update(g, r, of_p, group.get("eps", 0.0))
    return {name: _joined([of[id(p)] for p in block]) for name, block in blocks.items()}


@torch.no_grad()
def seen_gradients(
    optimizer: torch.optim.Optimizer, blocks: Blocks, entries: int | None = None
) -> dict[str, Tensor]:
    """The gradient of each block as the optimizer's moments see it, in the entries [n] of
    :func:`coming_updates`."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {
        name: torch.cat([_gradient(p, groups[id(p)], _stride(p, entries)) for p in block])
        for name, block in blocks.items()
    }


def _rule(
    kind: str, group: Mapping[str, Any], t: float, g: Tensor, state: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """r and √v̂ [n] of the step after the t-th, from the gradient [n] and the state before it [n]."""

    def after(name: str, new: Tensor, beta: float) -> Tensor:
        return state[name].lerp(new, 1 - beta) if name in state else new * (1 - beta)

    first = "momentum" if "momentum" in state else "exp_avg"
    if kind != "adam":
        return after(first, g, group["betas"][0] if kind == "lion" else group["beta"]).sign_(), None
    beta1, beta2 = group["betas"]
    v = after("exp_avg_sq", g.square(), beta2)
    if "max_exp_avg_sq" in state:
        v = torch.maximum(v, state["max_exp_avg_sq"])
    size = v.div_(1 - beta2 ** (t + 1)).sqrt_()
    return after(first, g, beta1).div_(1 - beta1 ** (t + 1)).div_(size + group["eps"]), size


def _gradient(p: Tensor, group: Mapping[str, Any], stride: int) -> Tensor:
    """g as the moments see it, in some entries."""
    if p.grad is None:
        return torch.zeros_like(_some(p, stride))
    g = _some(_dense(p.grad), stride)
    if group.get("maximize"):
        g = -g
    if group.get("decoupled_weight_decay") is False and group["weight_decay"]:
        g = g + group["weight_decay"] * _some(p, stride)  # torch.optim.Adam's
    return g


def _touched(p: Tensor, group: Mapping[str, Any], stride: int) -> Tensor | None:
    """1 where the step moves the entry and 0 where it leaves it alone; None if it moves all."""
    if p.grad is None:
        return torch.zeros_like(_some(p, stride))
    if not group.get("lazy") and p.grad.layout == torch.strided:
        return None
    full = _dense(p.grad)
    rows = full.ne(0).flatten(1).any(1, keepdim=True).expand(-1, full[0].numel())
    return _some(rows, stride).to(p.dtype)


def _dense(g: Tensor) -> Tensor:
    return g if g.layout == torch.strided else g.to_dense()


def _stride(p: Tensor, entries: int | None) -> int:
    # Odd, lest it pick the same few columns of every row.
    return 1 if entries is None or p.numel() <= entries else -(-p.numel() // entries) | 1


def _some(x: Tensor, stride: int) -> Tensor:
    flat = x.reshape(-1)
    return flat if stride == 1 else flat[::stride]


def _joined(updates: list[Update]) -> Update:
    sizes = [update.size for update in updates if update.size is not None]
    return Update(
        torch.cat([update.gradient for update in updates]),
        torch.cat([update.ratio for update in updates]),
        torch.cat(sizes) if len(sizes) == len(updates) else None,
        max(update.eps for update in updates),
    )


def update_kind(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]
) -> str | None:
    """What r of a parameter is: ``"adam"``, ``"lion"``, ``"sign"`` (of the momentum), or None.

    Known are ``torch.optim.Adam`` and ``AdamW``, those of this package, and others that call their options
    and state as these do (``betas``, ``eps``; ``exp_avg``, ``exp_avg_sq``, ``step``); Lion likewise
    (``betas`` and no ``eps``; ``momentum`` or ``exp_avg``); this package's Tiger and Signum. Tiger with
    ``accumulate`` above 1 has none: a micro-batch makes no step of its own.

    Args:
        group: the parameter's group.
        state: the parameter's state; empty before the first step.
    """
    if isinstance(optimizer, _OTHERS) or group.get("accumulate", 1) > 1:
        return None
    if state and not {"exp_avg", "momentum"} & set(state):
        return None
    if "betas" not in group:
        return "sign" if "beta" in group else None
    if "eps" in group:
        return "adam" if not state or "exp_avg_sq" in state else None
    return "lion" if "exp_avg_sq" not in state else None


def _known_kind(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]
) -> str:
    kind = update_kind(optimizer, group, state)
    if kind is None:
        options = ", ".join(f"{k}={v!r}" for k, v in group.items() if k not in ("params", "param_names"))
        raise ValueError(f"{type(optimizer).__name__} has no update ratio that is known here ({options})")
    return kind


def descent_cosine(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    blocks: Blocks,
) -> dict[str, float]:
    """Cosine of the coming update r and the gradient on *other* batches, by block: how far the step is one
    of descent on the loss, and not on the noise of the batch that it was computed from.

    Args:
        optimizer: of a kind that :func:`update_kind` knows, with gradients in place; they stay.
        loss: mean loss of a batch, a scalar.
        batches: of equal size; their gradients are added up.
        blocks: as in :func:`coming_updates`.

    Raises:
        ValueError: no batches.
    """
    parameters = [p for block in blocks.values() for p in block]
    total = [torch.zeros_like(p) for p in parameters]
    for grads in batch_gradients(loss, batches, parameters):
        torch._foreach_add_(total, grads)
    by_id = {id(p): g for p, g in zip(parameters, total, strict=True)}
    found = {}
    for name, update in coming_updates(optimizer, blocks).items():
        g = torch.cat([by_id[id(p)].reshape(-1) for p in blocks[name]])
        found[name] = float(torch.dot(g, update.ratio) / (g.norm() * update.ratio.norm()))
    return found
