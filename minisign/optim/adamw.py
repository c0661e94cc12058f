"""AdamW: the textbook loop, the yardstick for the others.

    θ ← θ − η λ θ
    m ← β₁ m + (1 − β₁) g
    v ← β₂ v + (1 − β₂) g²
    θ ← θ − η (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)         t = 1, 2, …

Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101. Equal to ``torch.optim.AdamW``. ε
stands outside the root. m/√v = sign(m) / √(1 + (v − m²)/m²): where the gradient hardly varies, this is a
sign optimizer too. With ``lazy`` or sparse gradients, m and v of an absent row stay and t goes on, as in
``torch.optim.SparseAdam``.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from minisign.engine.optimizer import Optimizer, Params
from minisign.engine.options import BETA, FROM_0, Bounds, Options


def adamw(
    p: Tensor,  # θ, any shape
    g: Tensor,  # as p
    m: Tensor,  # as p
    v: Tensor,  # as p
    *,
    step: float,  # t, from 1
    lr: float,  # η
    beta1: float,
    beta2: float,
    eps: float,  # ε
    weight_decay: float,  # λ
) -> None:
    """One step of AdamW, in place."""
    if weight_decay != 0:
        p.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    scale = (1 - beta2**step) ** 0.5
    denominator = (v.sqrt() / scale).add_(eps)
    step_size = lr / (1 - beta1**step)
    p.addcdiv_(m, denominator, value=-step_size)


class AdamW(Optimizer):
    """AdamW, readable; the same results as ``torch.optim.AdamW``.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: η, about the size of one entry's step; a number or a 1-element tensor.
        betas: (β₁ of the mean, β₂ of the mean square), each in [0, 1).
        eps: ε ≥ 0, in the units of the gradient.
        weight_decay: decoupled decay λ ≥ 0.
        options: see :class:`~minisign.engine.optimizer.Optimizer`.

    Raises:
        ValueError, TypeError: a bad value, named in the message.
    """

    rule = staticmethod(adamw)
    buffers = ("exp_avg", "exp_avg_sq")
    bounds: ClassVar[Bounds] = {"lr": FROM_0, "betas": BETA, "eps": FROM_0, "weight_decay": FROM_0}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), options)
