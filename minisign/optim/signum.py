"""Signum: the sign of a momentum. With β = 0, signSGD.

    m ← β m + (1 − β) g
    θ ← θ − η (sign(m) + λ θ)                sign(0) = 0

Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", arXiv 1802.04434.
The weight decay is decoupled, as in AdamW; the paper has none, and in other places (arXiv 2502.00213)
it stands inside the sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minisign.kernels.rule import MOMENTUM, Rule
from minisign.optim.base import (
    Group,
    Params,
    RowOptimizer,
    SharedOptions,
    check_number,
    descend,
    descend_foreach,
    learning_rate,
    with_shared,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


def signum_update(
    p: Tensor,  # θ, any shape
    g: Tensor,  # as p
    m: Tensor,  # as p
    *,
    lr: float | Tensor,  # η
    beta: float,
    weight_decay: float,  # λ
) -> None:
    """One step of Signum on one tensor, in place."""
    m.lerp_(g, 1 - beta)
    descend(p, m.sign(), lr, weight_decay)


def signum_update_foreach(
    ps: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    *,
    lr: float | Tensor,
    beta: float,
    weight_decay: float,
) -> None:
    """:func:`signum_update` for a list of tensors."""
    torch._foreach_lerp_(ms, gs, 1 - beta)
    descend_foreach(ps, list(torch._foreach_sign(ms)), lr, weight_decay)


class Signum(RowOptimizer):
    """Signum (and signSGD, with ``beta=0``): every entry moves by ``lr`` along −sign(momentum).

    Args:
        params: parameters, named parameters or parameter groups.
        lr: step η of every entry, in the parameter's own units; a number or a 1-element tensor.
        beta: momentum β in [0, 1).
        weight_decay: decoupled decay λ ≥ 0; keeps |θ| ≤ 1/λ.
        options: see :class:`~minisign.optim.base.RowOptimizer`.

    Raises:
        ValueError, TypeError: a bad value, named in the message.
    """

    update = staticmethod(signum_update)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(params, with_shared(options, lr=lr, beta=beta, weight_decay=weight_decay))

    def _check(self, group: Group) -> None:
        check_number("beta", group["beta"], 0.0, 1.0)

    def _hyper(self, group: Group) -> Group:
        return dict(lr=learning_rate(group), beta=group["beta"], weight_decay=group["weight_decay"])

    def _rule(self, group: Group) -> Rule:
        beta = group["beta"]
        return Rule(
            MOMENTUM,
            learning_rate(group),
            group["weight_decay"],
            keep=beta,
            weight=1 - beta,
            maximize=group["maximize"],
            rounded=group["stochastic_rounding"],
        )

    def _decay_rates(self, group: Group) -> tuple[float, ...]:
        return (group["beta"],)

    def _update_foreach(
        self, ps: list[Tensor], gs: list[Tensor], buffers: list[list[Tensor]], hypers: list[Group]
    ) -> None:
        signum_update_foreach(ps, gs, *buffers, **hypers[0])
