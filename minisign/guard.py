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
import json
import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minisign.files import MISFITS, one_line, prepare_out, read_checkpoint, write_json, write_whole
from minisign.probes import BEYOND, Blocks, coming_updates, default_blocks, update_kind

ACTIONS = ("warn", "skip", "slow", "back")
FORMAT = "minisign guard 1"
EVENTS = "events.json"
RECENT = 5
logger = logging.getLogger(__name__)


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
        ValueError, TypeError: a bad value, named; ``"back"`` without a folder; a folder that cannot be
            written.
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
        for name, action in (("on_loss", on_loss), ("on_ratio", on_ratio)):
            if action not in (None, *ACTIONS):
                raise ValueError(f"unknown {name} {action!r}: choose from {', '.join(ACTIONS)}, or None")
            if action == "back" and folder is None:
                raise ValueError(f"{name}='back' needs a folder for its checkpoints")
        whole = dict(window=window, entries=entries, slow_steps=slow_steps, save_every=save_every)
        for name, count in {**whole, "margin": margin, "patience": patience}.items():
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name} must be a whole number, got {count!r}")
            if count < 1:
                raise ValueError(f"{name} must be 1 or more, got {count}")
        for name, value in (("loss_limit", loss_limit), ("slow_factor", slow_factor)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 < ratio_limit <= 1:
            raise ValueError(f"ratio_limit must be in (0, 1], got {ratio_limit}")
        self.model, self.optimizer, self.also = model, optimizer, dict(also or {})
        self.on_loss, self.on_ratio = on_loss, on_ratio
        self.window, self.loss_limit, self.ratio_limit = window, loss_limit, ratio_limit
        self.blocks = default_blocks(model) if blocks is None else blocks
        self.entries, self.slow_factor, self.slow_steps = entries, slow_factor, slow_steps
        self.folder = None if folder is None else Path(folder)
        self.save_every, self.margin, self.patience = save_every, margin, patience
        if self.folder is not None:
            prepare_out(self.folder)
        self.step = 0
        self.events: list[Event] = []
        self._losses: deque[float] = deque(maxlen=window)  # without those that were spikes
        self._recent: deque[float] = deque(maxlen=RECENT)  # without those that were spikes alone
        self._in_a_row = 0  # events with fewer than `margin` quiet steps between them
        self._quiet = 0  # steps since the last event
        self._slow_left = 0
        self._rates: list[Any] | None = None  # of the groups, while they are lowered
        self._resumed = False
        optimizer.register_step_post_hook(lambda *_: self._restore_rates())

    # --- what a loop calls ------------------------------------------------------------------------

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
        self._restore_rates()  # if the loop left an update out on its own account
        if self.step == 0 and self.folder is not None and not self._resumed and self._saved():
            raise ValueError(f"{self.folder} has checkpoints of an earlier run: call resume(), or empty it")
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        event = self._look_at_loss(value) or self._look_at_ratio()
        if event is None:
            self._quiet += 1
            self._in_a_row = 0 if self._quiet >= self.margin else self._in_a_row
            self._save_if_due()
            update = True
        else:
            self._quiet, self._in_a_row = 0, self._in_a_row + 1
            update = self._act(event)
        if math.isfinite(value) and (update or (event is not None and event.cause == "ratio")):
            self._losses.append(value)
        self.step += 1
        if update and self._slow_left:
            self._slow_left -= 1
            self._lower_rates()
        return update

    def resume(self) -> int:
        """Restores model, optimizer, ``also`` and the guard itself from the newest checkpoint there is.

        Returns:
            How many steps are done, which is where the data have to go on; 0 if there is no checkpoint.

        Raises:
            ValueError: no folder, or a checkpoint that is damaged or does not fit.
        """
        if self.folder is None:
            raise ValueError("resume needs the folder that the checkpoints are in")
        for partial in self.folder.glob(".*.partial"):  # of a run that was killed while it wrote
            partial.unlink()
        if not (saved := self._saved()):
            return 0
        if (file := self.folder / EVENTS).exists():
            try:
                self.events = [Event(**event) for event in json.loads(file.read_bytes())]
            except (RecursionError, TypeError, ValueError) as error:
                raise ValueError(f"{file} is damaged: {one_line(error)}") from None
        own = self._load(saved[-1])
        try:
            for name, thing in self.also.items():
                if name not in own["also"]:
                    raise ValueError(f"it has no {name!r}, but {sorted(own['also'])}")
                thing.load_state_dict(own["also"][name])
            self.step, self._slow_left, self._resumed = own["step"], own["slow_left"], True
            self._in_a_row, self._quiet = own["in_a_row"], own["quiet"]
            self._losses.extend(own["losses"])
            self._recent.extend(own["recent"])
        except MISFITS as error:
            raise ValueError(f"{saved[-1]} does not fit: {one_line(error)}") from None
        return self.step

    # --- noticing ---------------------------------------------------------------------------------

    def _look_at_loss(self, value: float) -> Event | None:
        if self.on_loss is None:
            return None
        if not math.isfinite(value):
            action = "skip" if self.on_loss == "slow" else self.on_loss  # no rate is low enough for it
            return Event(self.step, "not finite", "", str(value), self.loss_limit, action)
        if len(self._losses) < self.window:
            return None
        median = float(np.median(self._losses))
        spread = 1.4826 * float(np.median(np.abs(np.array(self._losses) - median)))
        far = self.loss_limit * max(spread, 0.01 * abs(median))
        if value > median + far:
            return Event(self.step, "loss", "", value, median + far, self.on_loss)
        self._recent.append(value)
        mean, limit = float(np.mean(self._recent)), median + far / RECENT**0.5
        if len(self._recent) == RECENT and mean > limit:
            return Event(self.step, "mean loss", "", mean, limit, self.on_loss)
        return None

    @torch.no_grad()
    def _look_at_ratio(self) -> Event | None:
        if self.on_ratio is None or len(self._losses) < self.window:
            return None
        updates = coming_updates(self.optimizer, self._adam_blocks(), self.entries)
        if not updates:
            return None
        # Not "beyond", so that NaN counts.
        beyond = [1 - (update.ratio.abs() <= BEYOND).float().mean() for update in updates.values()]
        shares = dict(zip(updates, torch.stack(beyond).tolist(), strict=True))
        worst = max(shares, key=lambda name: shares[name])
        if shares[worst] <= self.ratio_limit:
            return None
        return Event(self.step, "ratio", worst, shares[worst], self.ratio_limit, self.on_ratio)

    def _adam_blocks(self) -> dict[str, list[nn.Parameter]]:
        """The blocks without what is not under Adam: the sign methods' ratio is ±1 at all times."""
        state = self.optimizer.state
        adam = {
            id(p)
            for group in self.optimizer.param_groups
            for p in group["params"]
            if update_kind(self.optimizer, group, state.get(p, {})) == "adam"
        }
        found = {name: [p for p in block if id(p) in adam] for name, block in self.blocks.items()}
        return {name: block for name, block in found.items() if block}

    # --- doing ------------------------------------------------------------------------------------

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
            self._losses.clear()
            self._recent.clear()
        if event.action == "slow":
            self._slow_left = self.slow_steps
        self._note(event)
        return event.action != "skip"

    def _note(self, event: Event) -> None:
        self.events.append(event)
        if event.action in ("skip", "back") or self._in_a_row == 1:
            logger.warning("%s", event)
        if self.folder is not None:
            events = [dataclasses.asdict(event) for event in self.events]
            write_whole(self.folder / EVENTS, lambda path: write_json(path, events))

    def _lower_rates(self) -> None:
        self._rates = []
        for group in self.optimizer.param_groups:
            lr = group["lr"]
            self._rates.append(lr.clone() if isinstance(lr, Tensor) else lr)
            _set_rate(group, lr * self.slow_factor)

    def _restore_rates(self) -> None:
        if self._rates is not None:
            for group, lr in zip(self.optimizer.param_groups, self._rates, strict=True):
                _set_rate(group, lr)
            self._rates = None

    # --- checkpoints ------------------------------------------------------------------------------

    def _saved(self) -> list[Path]:
        """The checkpoints, the newest last."""
        assert self.folder is not None
        return sorted(self.folder.glob("step-*.pt"))

    def _save_if_due(self) -> None:
        if self.folder is None:
            return
        steps = [_step(path) for path in self._saved()]
        rough = self._in_a_row and self._quiet < self.margin
        if not steps or (self.step - steps[-1] >= self.save_every and not rough):
            self._save(self.step)

    def _save(self, step: int) -> None:
        """Writes a checkpoint of now, after ``step`` batches, and removes those that are of no more use."""
        assert self.folder is not None
        checkpoint = {
            "format": FORMAT,
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "also": {name: thing.state_dict() for name, thing in self.also.items()},
            "losses": list(self._losses),
            "recent": list(self._recent),
            "in_a_row": self._in_a_row,
            "quiet": self._quiet,
            "slow_left": self._slow_left,
        }
        path = self.folder / f"step-{step:09d}.pt"
        write_whole(path, lambda path: torch.save(checkpoint, path))
        good = [path for path in self._saved() if _step(path) <= self.step - self.margin]
        for old in good[:-1]:
            old.unlink()

    def _go_back(self, event: Event) -> None:
        if self._in_a_row > self.patience:
            raise RuntimeError(
                f"{event.cause} at step {event.step} after going back {self.patience} times, fewer than "
                f"{self.margin} steps apart: lower the rate; the checkpoints are in {self.folder}"
            )
        saved = self._saved()
        if not saved:
            raise RuntimeError(
                f"{event.cause} at step {event.step}: there is no checkpoint to go back to yet"
            )
        good = [path for path in saved if _step(path) <= self.step - self.margin] or saved[:1]
        self._note(dataclasses.replace(event, to=_step(good[-1])))
        self._recent.clear()  # they were those of other weights
        # The doubtful ones go first: whoever is killed from here on finds a good one to resume from.
        for path in saved[saved.index(good[-1]) + 1 :]:
            path.unlink()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._load(good[-1])
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr  # the schedule goes on, only the weights go back
        self._save(self.step + 1)  # or a resumed run would meet the same batches again

    def _load(self, path: Path) -> dict[str, Any]:
        """Puts a checkpoint's weights and optimizer state in place and returns it."""
        saved = read_checkpoint(path, FORMAT)
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        except MISFITS as error:
            raise ValueError(f"{path} does not fit: {one_line(error)}") from None
        return saved


def _set_rate(group: dict[str, Any], lr: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(lr)  # a CUDA graph reads this very tensor
    else:
        group["lr"] = lr


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
