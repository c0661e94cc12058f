"""What sets a :class:`~minisign.doctor.guard.SpikeGuard` off: a loss far above the usual ones, or a ratio
that has left its bell.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from minisign.engine.checks import check_counts
from minisign.probes import BEYOND, Blocks, coming_updates, update_kind

ACTIONS = ("warn", "skip", "slow", "back")
RECENT = 5


@dataclass(frozen=True)
class Event:
    """Something that the guard noticed.

    Attributes:
        step: at which call of ``check``, counted from 0.
        cause: ``"loss"``, ``"mean loss"`` (of the last five), ``"not finite"`` or ``"ratio"``.
        block: whose ratio; empty for a loss.
        value, limit: the loss in nats (as text if it is not finite) and what it may be; or the share of
            entries beyond 0.8.
        action: what was done; ``"let pass"`` when the guard has lost its patience.
        to: the step of the checkpoint gone back to, else None.
    """

    step: int
    cause: str
    block: str
    value: float | str
    limit: float
    action: str
    to: int | None = None

    def __str__(self) -> str:
        if self.cause == "ratio":
            what = f"{float(self.value):.0%} of the update of {self.block} beyond {BEYOND}"
        elif self.cause == "not finite":
            what = f"loss {self.value}"
        else:
            what = f"{self.cause} {float(self.value):.4g}, above {self.limit:.4g}"
        done = {
            "warn": "only noted",
            "skip": "update left out",
            "slow": "rate lowered",
            "back": f"back to the checkpoint of step {self.to}",
            "let pass": "let pass, after too many in a row for a spike",
        }
        return f"step {self.step}: {what}; {done[self.action]}"


class UsualLosses:
    """The losses so far that were no spikes, and what a new one may be.

    Args:
        window: how many are remembered. Before there are so many, only a loss that is not finite stands
            out.
        limit: how far above their median a loss may be, in standard deviations, and the mean of the last
            ``RECENT`` in standard errors. The former are 1.4826 times the median absolute deviation, but at
            least 1 % of the median.
    """

    def __init__(self, window: int, limit: float) -> None:
        check_counts(window=window)
        if not 0 < limit < math.inf:
            raise ValueError(f"loss_limit must be positive, got {limit}")
        self.limit = limit
        self.known: deque[float] = deque(maxlen=window)
        self.recent: deque[float] = deque(maxlen=RECENT)  # without those that were spikes alone

    @property
    def is_full(self) -> bool:
        return len(self.known) == self.known.maxlen

    def look(self, value: float) -> tuple[str, float, float] | None:
        """Why a loss stands out: ``"loss"``, ``"mean loss"`` or ``"not finite"``, the value that does and
        what it may be; None if it does not."""
        if not math.isfinite(value):
            return "not finite", value, self.limit
        if not self.is_full:
            return None
        median = float(np.median(self.known))
        spread = 1.4826 * float(np.median(np.abs(np.array(self.known) - median)))
        far = self.limit * max(spread, 0.01 * abs(median))
        if value > median + far:
            return "loss", value, median + far
        self.recent.append(value)
        mean, limit = float(np.mean(self.recent)), median + far / RECENT**0.5
        if len(self.recent) == RECENT and mean > limit:
            return "mean loss", mean, limit
        return None

    def forget(self) -> None:
        """What is usual is learned anew."""
        self.known.clear()
        self.recent.clear()


@torch.no_grad()
def worst_ratio(
    optimizer: torch.optim.Optimizer, blocks: Blocks, entries: int | None = None
) -> tuple[str, float]:
    """The block in which most entries of Adam's coming update are beyond 0.8, and their share; no block and
    0 where nothing is under Adam.

    Args:
        entries: looked at of each tensor, evenly spread; None for all.
    """
    updates = coming_updates(optimizer, _under_adam(optimizer, blocks), entries)
    if not updates:
        return "", 0.0
    # Not "beyond", so that NaN counts.
    beyond = [1 - (update.ratio.abs() <= BEYOND).float().mean() for update in updates.values()]
    shares = dict(zip(updates, torch.stack(beyond).tolist(), strict=True))
    worst = max(shares, key=lambda name: shares[name])
    return worst, shares[worst]


def _under_adam(optimizer: torch.optim.Optimizer, blocks: Blocks) -> dict[str, list[nn.Parameter]]:
    """The blocks without what is not under Adam: the sign methods' ratio is ±1 at all times."""
    adam = {
        id(p)
        for group in optimizer.param_groups
        for p in group["params"]
        if update_kind(optimizer, group, optimizer.state.get(p, {})) == "adam"
    }
    found = {name: [p for p in block if id(p) in adam] for name, block in blocks.items()}
    return {name: block for name, block in found.items() if block}
