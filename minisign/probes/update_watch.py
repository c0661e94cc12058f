"""Figures of the update ratio r, which :mod:`minisign.probes.updates` has, and a watch that notes them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minisign.probes.blocks import Blocks, default_blocks
from minisign.probes.updates import BEYOND, Update, coming_updates, seen_gradients

BINS, REACH = 61, 1.525
EDGES = np.linspace(-REACH, REACH, BINS + 1)  # 0.05 wide, zero in the middle of one


@dataclass(frozen=True)
class UpdateFigures:
    """The update of a block at one step.

    Attributes:
        counts: entries by r, in the bins of ``EDGES`` [BINS]; what is beyond them counts in the last ones.
        std: standard deviation of r.
        beyond: share with |r| > 0.8, in [0, 1].
        bimodality: (skewness² + 1) / kurtosis of r: ⅓ for a normal bell, 5/9 for a flat distribution, 1
            for two points (Sarle's coefficient; SAS/STAT, procedure CLUSTER). NaN if all r are equal.
        correlation: cosine of this gradient and the one before, in [−1, 1]: for entries of mean zero the
            correlation of successive gradients. NaN where there was none before.
        gradient: RMS of g, loss per unit of the parameter.
        over_eps: RMS of √v̂ over ε; infinite for ε = 0, NaN for sign methods.
        below_eps: share of the entries with √v̂ < ε, which hardly move, in [0, 1]; NaN for sign methods.
        descent: cosine of r and this gradient, in [−1, 1]; 1 is steepest descent.
    """

    counts: np.ndarray
    std: float
    beyond: float
    bimodality: float
    correlation: float
    gradient: float
    over_eps: float
    below_eps: float
    descent: float


@torch.no_grad()
def update_figures(update: Update, before: Tensor | None = None) -> UpdateFigures:
    """The figures of an update.

    Args:
        update: from :func:`~minisign.probes.coming_updates`.
        before: the gradient of the step before, in the same entries [n].
    """
    g, r = update.gradient.float(), update.ratio.float()
    std = r.std(correction=0)
    z = (r - r.mean()) / std  # scaled first: of a tiny r the sixth power would underflow
    z2 = z.square()
    nan = torch.full_like(std, torch.nan)
    counts = torch.histc(r.clamp(-1.5, 1.5), BINS, -REACH, REACH)
    if update.size is None:
        over = below = nan
    else:
        over = update.size.float().square().mean().sqrt() / update.eps
        below = (update.size < update.eps).float().mean()
    parts = [
        std,
        (r.abs() > BEYOND).float().mean(),
        ((z2 * z).mean().square() + 1) / z2.square().mean(),
        nan if before is None else torch.dot(g, before.float()) / (g.norm() * before.float().norm()),
        g.square().mean().sqrt(),
        over,
        below,
        torch.dot(g, r) / (g.norm() * r.norm()),
    ]
    numbers = torch.cat([torch.stack(parts), counts]).tolist()  # one wait for the device
    return UpdateFigures(np.array(numbers[len(parts) :], dtype=np.int64), *numbers[: len(parts)])


class UpdateWatch:
    """Notes the update ratio by block while any training loop runs.

        watch = UpdateWatch(model, optimizer)
        …train…
        watch.steps, watch.series("blocks.0", "std"), watch.histograms("blocks.0")

    It looks just before every ``every``-th ``optimizer.step()``, at the gradient that the optimizer sees.
    Time and memory are bounded: of a large tensor it takes ``entries`` evenly spread, and it forgets all
    but the last ``keep`` looks.

    Args:
        model: whose parameters.
        optimizer: of a kind that :func:`~minisign.probes.update_kind` knows: Adam or a sign method.
        every: steps between two looks; the first step is one.
        blocks: what to keep apart; layers by default, or tensors if the model has no list of them.
        entries: of each tensor at most.
        keep: looks.

    Attributes:
        steps: at which steps it looked, counted from 0 from here on.
        looks: what it saw there, :class:`UpdateFigures` by block.

    Raises:
        ValueError: ``every``, ``entries`` or ``keep`` below 1, or an optimizer without an update ratio.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        every: int = 20,
        blocks: Blocks | None = None,
        entries: int = 2**16,
        keep: int = 1000,
    ) -> None:
        for name, value in (("every", every), ("entries", entries), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self.optimizer, self.every, self.entries = optimizer, every, entries
        self.blocks = default_blocks(model) if blocks is None else blocks
        self.steps: deque[int] = deque(maxlen=keep)
        self.looks: deque[dict[str, UpdateFigures]] = deque(maxlen=keep)
        self._before: dict[str, Tensor] = {}
        self._step = 0
        coming_updates(optimizer, self.blocks, 1)  # says what is wrong, now
        self._handle = optimizer.register_step_pre_hook(self._look)

    @torch.no_grad()
    def _look(self, *_: Any) -> None:
        if self._step % self.every == 0:
            updates = coming_updates(self.optimizer, self.blocks, self.entries)
            self.steps.append(self._step)
            self.looks.append(
                {name: update_figures(u, self._before.get(name)) for name, u in updates.items()}
            )
            self._before = {}
        self._step += 1
        if self._step % self.every == 0:  # the next look compares its gradient with this one
            self._before = seen_gradients(self.optimizer, self.blocks, self.entries)

    def series(self, block: str, name: str) -> np.ndarray:
        """One figure of a block at each look [looks].

        Raises:
            ValueError: no such block or figure.
        """
        if name not in UpdateFigures.__dataclass_fields__:
            raise ValueError(
                f"unknown figure {name!r}: choose from {', '.join(UpdateFigures.__dataclass_fields__)}"
            )
        if block not in self.blocks:
            raise ValueError(f"unknown block {block!r}: choose from {', '.join(self.blocks)}")
        return np.array([getattr(look[block], name) for look in self.looks])

    def histograms(self, block: str) -> np.ndarray:
        """How many entries of a block have which r, at each look [looks, BINS].

        Raises:
            ValueError: no such block.
        """
        return self.series(block, "counts")

    def remove(self) -> None:
        """Looks no more."""
        self._handle.remove()
