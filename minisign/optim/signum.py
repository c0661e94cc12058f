"""Signum: the sign of a momentum. With β = 0, signSGD.

    m ← β m + (1 − β) g
    θ ← θ − η (sign(m) + λ θ)                sign(0) = 0

Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", arXiv 1802.04434.
The weight decay is decoupled, as in AdamW; the paper has none, and in other places (arXiv 2502.00213)
it stands inside the sign.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from minisign.engine.optimizer import Optimizer, Params
from minisign.engine.options import BETA, FROM_0, Bounds, Options


def signum(
    p: Tensor,  # θ, any shape
    g: Tensor,  # as p
    m: Tensor,  # as p
    *,
    lr: float,  # η
    beta: float,
    weight_decay: float,  # λ
) -> None:
    """One step of Signum, in place."""
    m.lerp_(g, 1 - beta)
    update = m.sign()  # before θ moves: m is still in the cache
    if weight_decay != 0:
        p.mul_(1 - lr * weight_decay)
    p.add_(update, alpha=-lr)


class Signum(Optimizer):
    """Signum, with decoupled weight decay.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: step η of every entry, in the parameter's own units; a number or a 1-element tensor.
        beta: momentum β in [0, 1).
        weight_decay: decoupled decay λ ≥ 0; keeps |θ| ≤ 1/λ.
        options: see :class:`~minisign.engine.optimizer.Optimizer`.

    Raises:
        ValueError, TypeError: a bad value, named in the message.
    """

    rule = staticmethod(signum)
    bounds: ClassVar[Bounds] = {"lr": FROM_0, "beta": BETA, "weight_decay": FROM_0}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, beta=beta, weight_decay=weight_decay), options)
