"""Lion: the sign of an interpolation that leans more on the fresh gradient than the momentum does.

    c ← β₁ m + (1 − β₁) g
    θ ← θ − η (sign(c) + λ θ)                sign(0) = 0
    m ← β₂ m + (1 − β₂) g

Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675; code in google/automl.
β₁ = β₂ is Signum. Their advice against AdamW: lr 3 to 10 times smaller, λ 3 to 10 times larger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minisign.kernels.rule import LION, Rule
from minisign.optim.base import (
    Group,
    Params,
    RowOptimizer,
    SharedOptions,
    check_betas,
    descend,
    descend_foreach,
    learning_rate,
    with_shared,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


def lion_update(
    p: Tensor,  # θ, any shape
    g: Tensor,  # as p
    m: Tensor,  # as p
    *,
    lr: float | Tensor,  # η
    beta1: float,
    beta2: float,
    weight_decay: float,  # λ
) -> None:
    """One step of Lion on one tensor, in place."""
    update = m.lerp(g, 1 - beta1).sign_()
    m.lerp_(g, 1 - beta2)  # before θ moves: m and g are still in the cache
    descend(p, update, lr, weight_decay)


def lion_update_foreach(
    ps: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """:func:`lion_update` for a list of tensors."""
    cs = list(torch._foreach_lerp(ms, gs, 1 - beta1))
    torch._foreach_lerp_(ms, gs, 1 - beta2)
    torch._foreach_sign_(cs)
    descend_foreach(ps, cs, lr, weight_decay)


class Lion(RowOptimizer):
    """Lion, with decoupled weight decay.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: step η of every entry, in the parameter's own units; a number or a 1-element tensor.
        betas: (β₁ of the update, β₂ of the momentum), each in [0, 1).
        weight_decay: decoupled decay λ ≥ 0; keeps |θ| ≤ 1/λ.
        options: see :class:`~minisign.optim.base.RowOptimizer`.

    Raises:
        ValueError, TypeError: a bad value, named in the message.
    """

    update = staticmethod(lion_update)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(params, with_shared(options, lr=lr, betas=betas, weight_decay=weight_decay))

    def _check(self, group: Group) -> None:
        check_betas(group["betas"])

    def _hyper(self, group: Group) -> Group:
        beta1, beta2 = group["betas"]
        return dict(lr=learning_rate(group), beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"])

    def _rule(self, group: Group) -> Rule:
        beta1, beta2 = group["betas"]
        return Rule(
            LION,
            learning_rate(group),
            group["weight_decay"],
            keep=beta2,
            weight=1 - beta2,
            toward=1 - beta1,
            maximize=group["maximize"],
            rounded=group["stochastic_rounding"],
        )

    def _decay_rates(self, group: Group) -> tuple[float, ...]:
        return (group["betas"][1],)

    def _update_foreach(
        self, ps: list[Tensor], gs: list[Tensor], buffers: list[list[Tensor]], hypers: list[Group]
    ) -> None:
        lion_update_foreach(ps, gs, *buffers, **hypers[0])
