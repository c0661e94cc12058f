"""AdamW: the textbook loop, the yardstick for the others.

    θ ← θ − η λ θ
    m ← β₁ m + (1 − β₁) g
    v ← β₂ v + (1 − β₂) g²
    θ ← θ − η (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)         t = 1, 2, …

Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101. Equal to
``torch.optim.AdamW``. ε stands outside the root. m/√v = sign(m) / √(1 + (v − m²)/m²): where the
gradient hardly varies, this is a sign optimizer too.

With ``lazy`` or sparse gradients, m and v of an absent row stay and t goes on, as in
``torch.optim.SparseAdam``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minisign.kernels.rule import ADAMW, Rule
from minisign.optim.base import (
    Group,
    Params,
    RowOptimizer,
    SharedOptions,
    check_betas,
    check_number,
    learning_rate,
    with_shared,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


def adamw_update(
    p: Tensor,  # θ, any shape
    g: Tensor,  # as p
    m: Tensor,  # as p
    v: Tensor,  # as p
    *,
    step: float | Tensor,  # t, from 1
    lr: float | Tensor,  # η
    beta1: float,
    beta2: float,
    eps: float,  # ε
    weight_decay: float,  # λ
) -> None:
    """One step of AdamW on one tensor, in place."""
    if weight_decay != 0:
        p.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    step_size = lr / (1 - beta1**step)
    denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    if isinstance(step_size, Tensor):
        p.sub_(m / denominator * step_size)
    else:
        p.addcdiv_(m, denominator, value=-step_size)


def adamw_update_foreach(
    ps: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    *,
    steps: list[Any],  # numbers or tensors
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """:func:`adamw_update` for a list of tensors."""
    if weight_decay != 0:
        torch._foreach_mul_(ps, 1 - lr * weight_decay)
    torch._foreach_lerp_(ms, gs, 1 - beta1)
    torch._foreach_mul_(vs, beta2)
    torch._foreach_addcmul_(vs, gs, gs, value=1 - beta2)
    step_sizes: list[Any] = [lr / (1 - beta1**step) for step in steps]
    denominators = list(torch._foreach_sqrt(vs))
    torch._foreach_div_(denominators, [(1 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(denominators, eps)
    if isinstance(step_sizes[0], Tensor):
        ratios = list(torch._foreach_div(ms, denominators))
        torch._foreach_mul_(ratios, step_sizes)
        torch._foreach_sub_(ps, ratios)
    else:
        torch._foreach_addcdiv_(ps, ms, denominators, [-s for s in step_sizes])


class AdamW(RowOptimizer):
    """AdamW, readable; the same results as ``torch.optim.AdamW``.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: η, about the size of one entry's step; a number or a 1-element tensor.
        betas: (β₁ of the mean, β₂ of the mean square), each in [0, 1).
        eps: ε ≥ 0, in the units of the gradient.
        weight_decay: decoupled decay λ ≥ 0.
        options: see :class:`~minisign.optim.base.RowOptimizer`.

    Raises:
        ValueError, TypeError: a bad value, named in the message.
    """

    buffers = ("exp_avg", "exp_avg_sq")
    counts = True
    update = staticmethod(adamw_update)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params, with_shared(options, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        )

    def _check(self, group: Group) -> None:
        check_betas(group["betas"])
        check_number("epsilon value", group["eps"], 0.0)

    def _hyper(self, group: Group) -> Group:
        beta1, beta2 = group["betas"]
        return dict(
            lr=learning_rate(group),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def _own_hyper(self, p: Tensor, state: Group, group: Group, hyper: Group) -> Group:
        return {**hyper, "step": state["step"] if group["capturable"] else state["step"].item()}

    def _rule(self, group: Group) -> Rule:
        beta1, beta2 = group["betas"]
        return Rule(
            ADAMW,
            learning_rate(group),
            group["weight_decay"],
            keep=beta1,
            weight=1 - beta1,
            betas=(beta1, beta2),
            eps=group["eps"],
            maximize=group["maximize"],
            rounded=group["stochastic_rounding"],
        )

    def _decay_rates(self, group: Group) -> tuple[float, ...]:
        return tuple(group["betas"])

    def _update_foreach(
        self, ps: list[Tensor], gs: list[Tensor], buffers: list[list[Tensor]], hypers: list[Group]
    ) -> None:
        shared = {name: value for name, value in hypers[0].items() if name != "step"}
        adamw_update_foreach(ps, gs, *buffers, steps=[h["step"] for h in hypers], **shared)
