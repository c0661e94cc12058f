"""SGD with momentum, the heavy ball: where the course starts from.

    m ← β m + g
    θ ← θ − η (m + λ θ)

Polyak, "Some methods of speeding up the convergence of iteration methods", 1964, in the form of
Sutskever et al., ICML 2013, as ``torch.optim.SGD`` has it. The weight decay is decoupled, as in the other
optimizers here; torch adds λθ to the gradient.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from minisign.engine.optimizer import Optimizer, Params
from minisign.engine.options import BETA, FROM_0, Bounds, Options


def sgd(
    p: Tensor,  # θ, any shape
    g: Tensor,  # as p
    m: Tensor,  # as p
    *,
    lr: float,  # η
    beta: float,
    weight_decay: float,  # λ
) -> None:
    """One step of SGD with momentum, in place."""
    m.mul_(beta).add_(g)
    if weight_decay != 0:
        p.mul_(1 - lr * weight_decay)
    p.add_(m, alpha=-lr)


class SGD(Optimizer):
    """SGD with momentum, and decoupled weight decay.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: η, in units of the parameter over those of the gradient; a number or a 1-element tensor.
        beta: momentum β in [0, 1).
        weight_decay: decoupled decay λ ≥ 0.
        options: see :class:`~minisign.engine.optimizer.Optimizer`.

    Raises:
        ValueError, TypeError: a bad value, named in the message.
    """

    rule = staticmethod(sgd)
    bounds: ClassVar[Bounds] = {"lr": FROM_0, "beta": BETA, "weight_decay": FROM_0}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, beta=beta, weight_decay=weight_decay), options)
