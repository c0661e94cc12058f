"""SpikeGuard: notices a spike of the loss, or of the update before it, and does what it is told.

    guard = SpikeGuard(model, optimizer, on_loss="back", on_ratio="skip", folder="runs/a/guard")
    for batch in batches:
        loss = …
        loss.backward()
        if guard.check(loss):  # False: leave this update out
            optimizer.step()
        optimizer.zero_grad()

Two things set it off. The *loss*: it, or the mean of the last five, stands far above the median of those
before, in units of their spread; or it is not finite. The *ratio*: in some block most entries of the update
that is about to be made have |r| > 0.8 (:mod:`minisign.probes.updates`), which no bell has; Molybog et al.
(arXiv 2304.09871) saw r leave its bell before their losses jumped. So it is caught before it has moved a
weight. What to do about each:

    "warn"   only note it
    "skip"   leave the update out
    "slow"   make it, and the next ones, at a lower rate (but skip it where the loss is not finite)
    "back"   go back to the last good checkpoint, and leave out the batches since (as in arXiv 2204.02311)
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minisign.doctor.alarm import ACTIONS, Event, UsualLosses, worst_ratio
from minisign.doctor.saves import Saves, step_of
from minisign.doctor.slow import SlowSpell
from minisign.engine.checks import check_counts
from minisign.lab.files import MISFITS, one_line
from minisign.probes import Blocks, default_blocks

logger = logging.getLogger(__name__)


class SpikeGuard:
    """Stands between ``backward`` and ``step`` of any training loop; the module says how.

    Works with any ``torch.optim.Optimizer``. The ratio is watched where it is Adam's; of parameters under
    another optimizer only the loss tells. ``check`` waits for the device, twice a step at most. Gradients
    must be those that the optimizer will see: after clipping, and unscaled if a scaler is used. Of several
    processes each must be given the same loss, their mean, or they would decide differently.

    Args:
        model: what is trained.
        optimizer: what trains it.
        on_loss, on_ratio: what to do, one of ``ACTIONS``; None, not to look.
        window: losses that a new one is compared with. Nothing but a loss that is not finite sets the guard
            off before so many are there.
        loss_limit: how far above their median it may be, in standard deviations, and the mean of ``RECENT``
            losses in standard errors. The former are 1.4826 times the median absolute deviation, but at
            least 1 % of the median.
        ratio_limit: share of a block's entries that may be beyond 0.8.
        blocks: whose ratios are told apart; by default layers, or tensors if the model has no list of them.
        entries: looked at of each tensor, evenly spread.
        slow_factor, slow_steps: what the rate is multiplied by, and for how many updates.
        folder: for checkpoints and ``events.json``; ``"back"`` needs it. Empty or new, or :meth:`resume` is
            called before the first ``check``.
        save_every: steps between checkpoints.
        margin: a checkpoint is good once so many steps have followed it without an event.
        patience: how many events with fewer than ``margin`` quiet steps between them are taken for spikes.
            Then the guard lets pass what it was told to skip and begins to learn the loss anew, or raises
            if it was told to go back.
        also: more to save in each checkpoint and to restore in :meth:`resume`, by name: schedulers,
            scalers, whatever has ``state_dict`` and ``load_state_dict``.

    Attributes:
        step: calls of ``check`` so far.
        events: what was noticed and done.

    Raises:
        ValueError, TypeError: a bad value, named; ``"back"`` without a folder that can be written; more
            than ``"warn"`` with ``release_grads``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        on_loss: str | None = "warn",
        on_ratio: str | None = "warn",
        *,
        window: int = 100,
        loss_limit: float = 6.0,
        ratio_limit: float = 0.5,
        blocks: Blocks | None = None,
        entries: int = 1024,
        slow_factor: float = 0.1,
        slow_steps: int = 100,
        folder: str | Path | None = None,
        save_every: int = 100,
        margin: int = 20,
        patience: int = 10,
        also: Mapping[str, Any] | None = None,
    ) -> None:
        _check(optimizer, on_loss, on_ratio, ratio_limit, folder)
        check_counts(entries=entries, patience=patience)
        self.optimizer, self.on_loss, self.on_ratio = optimizer, on_loss, on_ratio
        self.losses, self.ratio_limit = UsualLosses(window, loss_limit), ratio_limit
        self.blocks = default_blocks(model) if blocks is None else blocks
        self.entries, self.margin, self.patience = entries, margin, patience
        self.slow = SlowSpell(optimizer, slow_factor, slow_steps)
        self.saves = Saves(folder, model, optimizer, dict(also or {}), save_every, margin)
        self.step = 0
        self.events: list[Event] = []
        self._in_a_row = 0  # events with fewer than `margin` quiet steps between them
        self._quiet = 0  # steps since the last event
        self._resumed = False

    def check(self, loss: Tensor | float) -> bool:
        """Looks at the loss and the gradients that are there now, and does what is to be done.

        Args:
            loss: of this step, a scalar.

        Returns:
            Whether to make the update. False after ``"skip"`` and ``"back"``.

        Raises:
            RuntimeError: the guard has gone back ``patience`` times and the spike is still there, or it has
                skipped as often and the loss is still not finite.
            ValueError: the folder has checkpoints of an earlier run, and :meth:`resume` was not called.
        """
        self.slow.restore()  # if the loop left an update out on its own account
        if self.step == 0 and not self._resumed and self.saves.paths():
            raise ValueError(
                f"{self.saves.folder} has checkpoints of an earlier run: call resume(), or empty it"
            )
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        event = self._look_at_loss(value) or self._look_at_ratio()
        if event is None:
            self._quiet += 1
            self._in_a_row = 0 if self._quiet >= self.margin else self._in_a_row
            rough = self._in_a_row > 0 and self._quiet < self.margin
            if self.saves.is_due(self.step, rough):
                self._save(self.step)
            update = True
        else:
            self._quiet, self._in_a_row = 0, self._in_a_row + 1
            update = self._act(event)
        if math.isfinite(value) and (update or (event is not None and event.cause == "ratio")):
            self.losses.known.append(value)
        self.step += 1
        if update:
            self.slow.lower()
        return update

    def resume(self) -> int:
        """Restores model, optimizer, ``also`` and the guard itself from the newest checkpoint there is.

        Returns:
            How many steps are done, which is where the data have to go on; 0 if there is no checkpoint.

        Raises:
            ValueError: no folder, or a checkpoint that is damaged or does not fit.
        """
        if self.saves.folder is None:
            raise ValueError("resume needs the folder that the checkpoints are in")
        self.saves.remove_partial()
        if not (saved := self.saves.paths()):
            return 0
        self.events = self.saves.events()
        own = self.saves.load(saved[-1], with_also=True)
        try:
            self.step, self._in_a_row, self._quiet = own["step"], own["in_a_row"], own["quiet"]
            self.slow.left, self._resumed = own["slow_left"], True
            self.losses.known.extend(own["losses"])
            self.losses.recent.extend(own["recent"])
        except MISFITS as error:
            raise ValueError(f"{saved[-1]} does not fit: {one_line(error)}") from None
        return self.step

    def _look_at_loss(self, value: float) -> Event | None:
        if self.on_loss is None or (found := self.losses.look(value)) is None:
            return None
        cause, what, limit = found
        if cause == "not finite":
            action = "skip" if self.on_loss == "slow" else self.on_loss  # no rate is low enough for it
            return Event(self.step, cause, "", str(what), limit, action)
        return Event(self.step, cause, "", what, limit, self.on_loss)

    def _look_at_ratio(self) -> Event | None:
        if self.on_ratio is None or not self.losses.is_full:
            return None
        block, share = worst_ratio(self.optimizer, self.blocks, self.entries)
        if share <= self.ratio_limit:
            return None
        return Event(self.step, "ratio", block, share, self.ratio_limit, self.on_ratio)

    def _act(self, event: Event) -> bool:
        """Does it and returns whether the update is to be made."""
        if event.action == "back":
            self._go_back(event)
            return False
        if event.action == "skip" and self._in_a_row > self.patience:
            if event.cause == "not finite":
                raise RuntimeError(
                    f"the loss is {event.value} at step {event.step}, as in the steps before"
                )
            event = dataclasses.replace(event, action="let pass")
            self.losses.forget()
        if event.action == "slow":
            self.slow.begin()
        self._note(event)
        return event.action != "skip"

    def _note(self, event: Event) -> None:
        self.events.append(event)
        if event.action in ("skip", "back") or self._in_a_row == 1:
            logger.warning("%s", event)
        self.saves.note(self.events)

    def _save(self, step: int) -> None:
        own = {"in_a_row": self._in_a_row, "quiet": self._quiet, "slow_left": self.slow.left}
        losses = {"losses": list(self.losses.known), "recent": list(self.losses.recent)}
        self.saves.save(step, {**own, **losses})

    def _go_back(self, event: Event) -> None:
        if self._in_a_row > self.patience:
            raise RuntimeError(
                f"{event.cause} at step {event.step} after going back {self.patience} times, fewer than "
                f"{self.margin} steps apart: lower the rate; the checkpoints are in {self.saves.folder}"
            )
        good = self.saves.good(self.step)
        if not good:
            raise RuntimeError(
                f"{event.cause} at step {event.step}: there is no checkpoint to go back to yet"
            )
        self._note(dataclasses.replace(event, to=step_of(good[-1])))
        self.losses.recent.clear()  # they were those of other weights
        # The doubtful ones go first: whoever is killed from here on finds a good one to resume from.
        self.saves.remove_later(good[-1])
        with self.slow.kept_rates():  # the schedule goes on, only the weights go back
            self.saves.load(good[-1])
        self._save(self.step + 1)  # or a resumed run would meet the same batches again


def _check(
    optimizer: torch.optim.Optimizer,
    on_loss: str | None,
    on_ratio: str | None,
    ratio_limit: float,
    folder: str | Path | None,
) -> None:
    for name, action in (("on_loss", on_loss), ("on_ratio", on_ratio)):
        if action not in (None, *ACTIONS):
            raise ValueError(f"unknown {name} {action!r}: choose from {', '.join(ACTIONS)}, or None")
        if action not in (None, "warn") and any(x.get("release_grads") for x in optimizer.param_groups):
            raise ValueError(
                f"{name}={action!r} is not for release_grads=True: when the guard is asked, the batch "
                "is in the momentum; take 'warn', or an optimizer without release_grads"
            )
        if action == "back" and folder is None:
            raise ValueError(f"{name}='back' needs a folder for its checkpoints")
    if not 0 < ratio_limit <= 1:
        raise ValueError(f"ratio_limit must be in (0, 1], got {ratio_limit}")
