"""What a kernel has to compute, in numbers: the one language between the optimizers and the back ends.

A :class:`Rule` is what all tensors of a step share, an :class:`Item` what one of them has for itself, and a
:class:`Launch` a table of those that a kernel steps in one call.
"""

from __future__ import annotations

import math
import platform
from array import array
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

X86 = ("x86_64", "AMD64", "i686")

# These numbers stand in cpu.cpp too.
MOMENTUM, LION, ADAMW = range(3)
NUMBER, RMS, ROW_RMS = range(3)
FROM_M, FROM_G, SUM = range(3)
ALL, BY_GRADIENT, MASK, LIST, LIST_BY_GRADIENT = range(5)
TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whether torch's interpolation on this CPU is a fused multiply-add: of x86 processors the oldest have none.
FMA_ON_CPU = torch.backends.cpu.get_cpu_capability() != "DEFAULT" or platform.machine() not in X86
COLUMNS = 12  # of a table, int64 each: see Item.columns


class Unavailable(RuntimeError):
    """A back end that is not to be had here: no compiler, no Triton, another device."""


@dataclass(frozen=True)
class Rule:
    """One step of one optimizer, for all tensors of a launch.

    kind: MOMENTUM (Signum and Tiger), LION or ADAMW.
    lr: η, or α where ``scale`` is RMS (of the tensor) or ROW_RMS (of each row).
    keep, weight: m ← keep m + weight g.
    toward: Lion's weight 1 − β₁ of the gradient in what it takes the sign of.
    betas, eps: AdamW's.
    guard: look for NaN and Inf first; where they are, θ ← (θ − center) shrink + center and no more.
    move: False where θ stays (a micro-batch that is not the last).
    fold: False where m stays (its gradients are in it already); the gradient is not read then.
    rounded: bfloat16 parameters are rounded at random.
    """

    kind: int
    lr: float | Tensor
    weight_decay: float
    keep: float = 0.0
    weight: float = 0.0
    toward: float = 0.0
    betas: tuple[float, float] = (0.0, 0.0)
    eps: float = 0.0
    scale: int = NUMBER
    guard: bool = False
    shrink: float = 1.0
    center: float = 0.0
    move: bool = True
    fold: bool = True
    maximize: bool = False
    rounded: bool = False

    @property
    def memory(self) -> tuple[int, float]:
        """How m takes a gradient: which form, and its coefficient."""
        return lerp(self.weight) if self.keep + self.weight == 1 else (SUM, 0.0)

    def decay(self, lr: float) -> float:
        """1 − ηλ, rounded as torch does where the rate is a number and where it is a tensor."""
        if isinstance(self.lr, Tensor):
            return float(np.float32(1) - np.float32(lr) * np.float32(self.weight_decay))
        return 1 - lr * self.weight_decay


def lerp(weight: float) -> tuple[int, float]:
    """torch.lerp(a, b, w) is fma(coefficient, b − a, start): where it starts, and the coefficient."""
    w = np.float32(weight)
    return (FROM_M, float(w)) if abs(w) < 0.5 else (FROM_G, float(w - np.float32(1)))


class Item(NamedTuple):
    """One tensor of a launch."""

    p: Tensor
    g: Tensor | None  # rows [U, …] only where `which` says LIST; None where the rule does not fold
    buffers: list[Tensor]
    step: Tensor | None  # float32, counts this step's predecessors
    noise: int = 0  # of the parameter, from which its roundings at random follow
    is_vector: bool = False  # Tiger's rule for fewer than two dimensions: half the rate, no decay
    which: int | None = None  # of its rows move; None: not by rows
    rows: Tensor | None = None  # MASK: bool [V]; LIST: int64 [U]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the tensors of a launch have in common: device, which rows, dtypes of p, g and buffers."""
        g_type = self.p.dtype if self.g is None else self.g.dtype
        return self.p.device, self.which, self.p.dtype, g_type, self.buffers[0].dtype

    @property
    def row_count(self) -> int:
        """How many rows there are to look at; 0: not by rows."""
        if self.which is None:
            return 0
        return len(self.p if self.rows is None else self.rows)

    def columns(self) -> tuple[int, ...]:
        """What a kernel knows of it; the order is that of ``Tensor`` in cpu.cpp."""
        return (
            self.p.data_ptr(),
            0 if self.g is None else self.g.data_ptr(),
            self.buffers[0].data_ptr(),
            self.buffers[1].data_ptr() if len(self.buffers) > 1 else 0,
            0 if self.step is None else self.step.data_ptr(),
            self.p.numel(),
            self.noise,
            self.is_vector,
            0 if self.which is None else math.prod(self.p.shape[1:]),
            self.row_count,
            0 if self.rows is None else self.rows.data_ptr(),
            0,  # a line of the table has 96 bytes
        )


class Launch:
    """Tensors that step together, and the table that tells a kernel where they lie."""

    def __init__(self, items: list[Item]) -> None:
        """``items``: one or more, all of one :attr:`Item.kind`."""
        self.items = items
        self.device: torch.device = items[0].p.device
        self.which: int | None = items[0].which
        self.types: tuple[torch.dtype, ...] = items[0].kind[2:]
        self.steps = [item.step for item in items if item.step is not None]
        self.columns = array("q", [x for item in items for x in item.columns()])

    def set_gradients(self, addresses: list[int]) -> None:
        """The same tensors with other gradients."""
        self.columns[1::COLUMNS] = array("q", addresses)

    def forget_gradients(self) -> None:
        """Lets go of them after a step: whoever keeps the launch must not keep their memory."""
        self.items = [item._replace(g=None) for item in self.items]


def launches(items: list[Item]) -> list[Launch]:
    """``items`` by kind, without empty ones."""
    kinds: dict[Any, list[Item]] = {}
    for item in items:
        if item.p.numel() and (item.which is None or item.row_count):
            kinds.setdefault(item.kind, []).append(item)
    return [Launch(members) for members in kinds.values()]
