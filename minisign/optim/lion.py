"""Lion: the sign of an interpolation that leans more on the fresh gradient than the momentum does.

    c ← β₁ m + (1 − β₁) g
    θ ← θ − η (sign(c) + λ θ)                sign(0) = 0
    m ← β₂ m + (1 − β₂) g

Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675; code in google/automl.
β₁ = β₂ is Signum. Their advice against AdamW: lr 3 to 10 times smaller, λ 3 to 10 times larger.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from minisign.engine.optimizer import Optimizer, Params
from minisign.engine.options import BETA, FROM_0, Bounds, Options


def lion(
    p: Tensor,  # θ, any shape
    g: Tensor,  # as p
    m: Tensor,  # as p
    *,
    lr: float,  # η
    beta1: float,
    beta2: float,
    weight_decay: float,  # λ
) -> None:
    """One step of Lion, in place."""
    update = m.lerp(g, 1 - beta1).sign_()
    m.lerp_(g, 1 - beta2)  # before θ moves: m and g are still in the cache
    if weight_decay != 0:
        p.mul_(1 - lr * weight_decay)
    p.add_(update, alpha=-lr)


class Lion(Optimizer):
    """Lion, with decoupled weight decay.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: step η of every entry, in the parameter's own units; a number or a 1-element tensor.
        betas: (β₁ of the update, β₂ of the momentum), each in [0, 1).
        weight_decay: decoupled decay λ ≥ 0; keeps |θ| ≤ 1/λ.
        options: see :class:`~minisign.engine.optimizer.Optimizer`.

    Raises:
        ValueError, TypeError: a bad value, named in the message.
    """

    rule = staticmethod(lion)
    bounds: ClassVar[Bounds] = {"lr": FROM_0, "betas": BETA, "weight_decay": FROM_0}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay), options)
