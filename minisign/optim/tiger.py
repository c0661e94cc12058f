"""Tiger: one momentum, its sign, and a step in proportion to the size of the weights.

    m ← β m + (1 − β) g
    θ ← θ − η (sign(m) + λ θ)                sign(0) = 0

Jianlin Su, kexue.fm/archives/9512; code in bojone/tiger (TensorFlow). The base form takes η from the
user. The author's code takes α = ``lr`` from the user and sets η by the kind of the tensor:

    matrix                  η = α RMS(θ), over the whole tensor
    embedding               η = α RMS(θ_row), row by row
    bias and norm weight    η = α / 2, and λ = 0

m is linear in g, so gradient accumulation needs no buffer; a gradient that is not finite leaves m alone and
shrinks the weights, θ ← (θ − c) s + c, with c = 1 for the weight of a norm and 0 otherwise: both are
written once for all such rules, in minisign/engine/halves.py.

Where this differs from the author's code:

    what                        there                       here, and why
    kind of a tensor            by its name                 by its module (``param_groups``), else by
                                                            its number of dimensions: a norm's weight
                                                            is called ``weight`` in PyTorch
    not finite                  NaN                         NaN and ±Inf: Inf poisons m as well
    RMS(θ) = 0                  η = 0, it never moves       η = α, as LAMB's trust ratio of 1
    absent rows of a sparse     m decays, the row moves     untouched (``lazy_momentum="decay"`` for a
    gradient                                                momentum that decays)
    no gradient (None) at some  TensorFlow gives zeros      a parameter without any in a cycle stays;
    micro-batches                                           else a missing one counts as zero
    learning rate schedule      inside, ``lr_schedule``     any of ``torch.optim.lr_scheduler``
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from minisign.engine.optimizer import Optimizer, Params
from minisign.engine.options import BETA, FROM_0, Bounds, Options
from minisign.engine.words import Group, rms

# The author's rule, for groups that say what they hold (minisign.param_groups).
KINDS: dict[str, Group] = {
    "embedding": {"scale": "row_rms"},
    "bias": {"scale": 0.5, "weight_decay": 0.0},
    "norm": {"scale": 0.5, "weight_decay": 0.0, "center": 1.0},
}


def tiger(
    p: Tensor,  # θ, any shape
    g: Tensor,  # as p
    m: Tensor,  # as p
    *,
    lr: float,  # α
    beta: float,
    weight_decay: float,  # λ
    scale: str | float,  # η/α
) -> None:
    """One step of Tiger, in place."""
    eta = lr * rms(p, scale)
    m.lerp_(g, 1 - beta)
    update = m.sign()  # before θ moves: m is still in the cache
    p.mul_(1 - eta * weight_decay)
    p.add_(update, alpha=-eta)


class Tiger(Optimizer):
    """Tiger, "an extremely stingy optimizer": one buffer, also under gradient accumulation.

    ``Tiger(model.parameters())`` follows the author's rule as far as shapes tell: tensors with fewer
    than two dimensions get half the rate and no decay. ``Tiger(param_groups(model))`` follows it in
    full. Call :meth:`step` after every micro-batch.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: α; what it is relative to is ``scale``'s matter. A number or a 1-element tensor.
        beta: momentum β in [0, 1); the author uses 0.965 for text, 0.945 for images.
        weight_decay: decoupled decay λ ≥ 0; keeps |θ| ≤ 1/λ.
        scale: η/α: ``"rms"``, the RMS of the tensor; ``"row_rms"``, of each row, for embeddings; a
            number, taken as it is for every shape (1.0 is the base form of kexue.fm/archives/9736).
        options: see :class:`~minisign.engine.optimizer.Optimizer`; ``shrink`` is 0.99 here by default.

    A group may also have ``kind`` (set by :func:`minisign.param_groups`), from which follow the
    author's ``scale``, ``weight_decay`` and ``center`` (c in the module's text) where the group does
    not give them and the optimizer's ``scale`` is ``"rms"``.

    Raises:
        ValueError, TypeError: a bad value, named in the message.
    """

    rule = staticmethod(tiger)
    bounds: ClassVar[Bounds] = {"lr": FROM_0, "beta": BETA, "weight_decay": FROM_0, "scale": FROM_0}
    per_tensor = ("weight_decay",)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        beta: float = 0.965,
        weight_decay: float = 0.01,
        *,
        scale: str | float = "rms",
        **options: Unpack[Options],
    ) -> None:
        numbers = dict(lr=lr, beta=beta, weight_decay=weight_decay, scale=scale)
        super().__init__(params, numbers, {"shrink": 0.99, **options})

    def own_numbers(self, p: Tensor, group: Group) -> Group:
        """Of tensors with fewer than two dimensions, whose kind no group says."""
        vector = isinstance(group["scale"], str) and p.dim() < 2
        return {"scale": 0.5, "weight_decay": 0.0} if vector else {}

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict) and self.defaults["scale"] == "rms":
            for name, value in KINDS.get(param_group.get("kind", ""), {}).items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)
