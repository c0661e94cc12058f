"""A spell of lower rates: what :class:`~minisign.doctor.guard.SpikeGuard` does under ``"slow"``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from minisign.engine.checks import check_counts


class SlowSpell:
    """Lowers an optimizer's rates before each of some updates, and gives them back after it, so that a
    schedule never sees them lowered.

    Args:
        factor: what they are multiplied by.
        steps: for how many updates.

    Attributes:
        left: updates still to come at the lower rates.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: float, steps: int) -> None:
        if not 0 < factor < math.inf:
            raise ValueError(f"slow_factor must be positive, got {factor}")
        check_counts(slow_steps=steps)
        self.optimizer, self.factor, self.steps, self.left = optimizer, factor, steps, 0
        self._rates: list[Any] | None = None  # of the groups, while they are lowered
        optimizer.register_step_post_hook(lambda *_: self.restore())

    def begin(self) -> None:
        self.left = self.steps

    def lower(self) -> None:
        """For the update to come, if the spell lasts."""
        if not self.left:
            return
        self.left -= 1
        self._rates = []
        for group in self.optimizer.param_groups:
            lr = group["lr"]
            self._rates.append(lr.clone() if isinstance(lr, Tensor) else lr)
            _set_rate(group, lr * self.factor)

    def restore(self) -> None:
        if self._rates is not None:
            for group, lr in zip(self.optimizer.param_groups, self._rates, strict=True):
                _set_rate(group, lr)
            self._rates = None

    @contextmanager
    def kept_rates(self) -> Iterator[None]:
        """The rates are as they were, whatever is loaded into the optimizer meanwhile."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        yield
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr


def _set_rate(group: dict[str, Any], lr: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(lr)  # a CUDA graph reads this very tensor
    else:
        group["lr"] = lr
