"""What a kernel is made for, and the table from which it learns where tensors lie."""

from __future__ import annotations

import math
import platform
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Columns of the table, the last of the first buffer; after the buffers come the tensor's own numbers.
# TensorOf of step.h is a line of it.
STEP, SIZE, NOISE, WIDTH, COUNT, ROWS, KNOWN, P, G, B = range(10)
X86 = ("x86_64", "AMD64", "i686")
# Whether torch's interpolation on this CPU is a fused multiply-add: of x86 processors the oldest have none.
FMA_ON_CPU = torch.backends.cpu.get_cpu_capability() != "DEFAULT" or platform.machine() not in X86


class Unavailable(RuntimeError):
    """A back end that is not to be had here: no compiler, no Triton, another device."""


class Form(NamedTuple):
    """What a kernel is made for, beside its rule.

    Attributes:
        types: of p, g and the buffers.
        rows: it goes row by row, through "all" of them, those "listed" (the gradient has no others), or
            those that are "masked"; "": it does not.
        sought: rows whose gradient is all zero stay.
        guard: where a gradient is not finite, the parameter shrinks and no more.
        rounded: bfloat16 parameters are rounded at random.
    """

    types: tuple[str, str, str] = ("float32",) * 3
    rows: str = ""
    sought: bool = False
    guard: bool = False
    rounded: bool = False


class Item(NamedTuple):
    """One tensor of a launch."""

    p: Tensor
    g: Tensor  # as p, or the rows that are listed; p itself where the rule does not read it
    buffers: list[Tensor]
    step: Tensor | None = None  # float32, counts this step's predecessors
    noise: int = 0  # from which its roundings at random follow
    by_rows: bool = False
    rows: Tensor | None = None  # a list, int64; or a mask of all, bool
    sought: bool = False  # rows whose gradient is all zero stay
    known: float = math.nan  # its RMS, if it is not to be looked for
    own: tuple[float, ...] = ()  # numbers of the rule that are its own

    def form(self, guard: bool, rounded: bool) -> Form:
        p, g, b = (TYPES[x.dtype] for x in (self.p, self.g, *(self.buffers or [self.p])[:1]))
        kind = "all" if self.rows is None else "masked" if self.rows.dtype == torch.bool else "listed"
        kind = kind if self.by_rows else ""
        return Form((p, g, b), kind, self.sought, guard, rounded and p == "bfloat16")

    @property
    def width(self) -> int:
        """Of a row, which a tensor of fewer than two dimensions has one of; 0: not by rows."""
        return math.prod(self.p.shape[self.p.dim() > 1 :]) if self.by_rows else 0

    def columns(self) -> list[int]:
        """Its line."""
        rows = len(self.p) if self.p.dim() > 1 else 1
        count = (rows if self.rows is None else len(self.rows)) if self.by_rows else 0
        step, rows, *tensors = (
            0 if x is None else x.data_ptr() for x in (self.step, self.rows, self.p, self.g, *self.buffers)
        )
        known, *own = (
            struct.unpack("q", struct.pack("d", x))[0] for x in (self.known, *(self.own or (0,)))
        )
        return [step, self.p.numel(), self.noise, self.width, count, rows, known, *tensors, *own]


class Launch:
    """Tensors that step together, and their table."""

    def __init__(self, form: Form, items: Sequence[Item]) -> None:
        """``items``: one or more, all of this form and on one device."""
        self.form, self.device = form, items[0].p.device
        self.steps = [item.step for item in items if item.step is not None]
        lines = [item.columns() for item in items]
        self.count, self.width = len(lines), len(lines[0])
        self.table = array("q", [x for line in lines for x in line])
        self.params = [item.p for item in items]
        self.held = [(item.buffers, item.rows) for item in items]
        self.gradients = [item.g for item in items]  # until the step is made; then others own the memory

    def set_gradients(self, addresses: Sequence[int]) -> None:
        """The same tensors with other gradients."""
        self.table[G :: self.width] = array("q", addresses)


def launches(
    pairs: Sequence[tuple[Item, Any]], guard: bool, rounded: bool
) -> list[tuple[Launch, list[Any]]]:
    """Items by device and form, and what came with them; empty ones only where they count their steps."""
    kinds: dict[Any, list[tuple[Item, Any]]] = {}
    for item, other in pairs:
        if item.step is not None or (item.p.numel() and (item.rows is None or len(item.rows))):
            kinds.setdefault((item.form(guard, rounded), item.p.device), []).append((item, other))
    return [
        (Launch(form, [item for item, _ in members]), [other for _, other in members])
        for (form, _), members in kinds.items()
    ]


@dataclass(frozen=True)
class Call:
    """What a step adds to a launch.

    Attributes:
        numbers: what the program's expressions come to.
        lr: the rate, where it is a tensor.
        sign: −1 to maximize. shrink, center: of a guard.
        grad_scale: 1-element float32, by which gradients are divided.
        found_inf: 1-element float32; where it is not 0 nothing happens.
    """

    numbers: tuple[float, ...]
    lr: Tensor | None = None
    sign: float = 1.0
    shrink: float = 1.0
    center: float = 0.0
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
