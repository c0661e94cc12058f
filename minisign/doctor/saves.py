"""Checkpoints of any training, of which the older ones have proved good; and what happened in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minisign.doctor.alarm import Event
from minisign.engine.checks import check_counts
from minisign.lab.files import MISFITS, one_line, prepare_out, read_checkpoint, write_json, write_whole

FORMAT = "minisign guard 1"
EVENTS = "events.json"


class Saves:
    """The checkpoints in a folder; each appears whole or not at all.

    Args:
        folder: for ``step-….pt`` and ``events.json``, made if it is not there; None, and nothing is saved.
        model, optimizer, also: what is saved; ``also`` by name, whatever has ``state_dict`` and
            ``load_state_dict``.
        every: steps from one checkpoint to the next.
        margin: a checkpoint is good once so many steps have followed it.

    Raises:
        ValueError: a folder that cannot be written.
    """

    def __init__(
        self,
        folder: str | Path | None,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        also: Mapping[str, Any],
        every: int,
        margin: int,
    ) -> None:
        check_counts(save_every=every, margin=margin)
        self.folder = None if folder is None else Path(folder)
        self.model, self.optimizer, self.also = model, optimizer, also
        self.every, self.margin = every, margin
        if self.folder is not None:
            prepare_out(self.folder)

    def paths(self) -> list[Path]:
        """The newest last."""
        return [] if self.folder is None else sorted(self.folder.glob("step-*.pt"))

    def is_due(self, step: int, rough: bool) -> bool:
        """Whether to save at a step; in a rough time only if there is no checkpoint at all."""
        saved = self.paths()
        if not saved:
            return self.folder is not None
        return step - step_of(saved[-1]) >= self.every and not rough

    def good(self, step: int) -> list[Path]:
        """Those that are good at a step, the newest last; the oldest of all if none is."""
        saved = self.paths()
        return [path for path in saved if step_of(path) <= step - self.margin] or saved[:1]

    def save(self, step: int, own: Mapping[str, Any]) -> None:
        """Writes a checkpoint of now, after ``step`` steps, and removes those that are of no more use.

        Args:
            own: what else to save in it.
        """
        assert self.folder is not None
        checkpoint = {
            "format": FORMAT,
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "also": {name: thing.state_dict() for name, thing in self.also.items()},
            **own,
        }
        write_whole(self.folder / f"step-{step:09d}.pt", lambda path: torch.save(checkpoint, path))
        for old in self.good(step)[:-1]:
            old.unlink()

    def load(self, path: Path, with_also: bool = False) -> dict[str, Any]:
        """Puts a checkpoint's weights and optimizer state in place and returns it.

        Args:
            with_also: ``also`` too.

        Raises:
            ValueError: it is damaged or does not fit.
        """
        saved = read_checkpoint(path, FORMAT)
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            for name, thing in self.also.items() if with_also else ():
                if name not in saved["also"]:
                    raise ValueError(f"it has no {name!r}, but {sorted(saved['also'])}")
                thing.load_state_dict(saved["also"][name])
        except MISFITS as error:
            raise ValueError(f"{path} does not fit: {one_line(error)}") from None
        return saved

    def remove_later(self, path: Path) -> None:
        """Those that are newer than ``path``."""
        saved = self.paths()
        for later in saved[saved.index(path) + 1 :]:
            later.unlink()

    def remove_partial(self) -> None:
        """What a run left that was killed while it wrote."""
        for partial in [] if self.folder is None else self.folder.glob(".*.partial"):
            partial.unlink()

    def note(self, events: Sequence[Event]) -> None:
        """Writes ``events.json`` anew."""
        if self.folder is not None:
            found = [dataclasses.asdict(event) for event in events]
            write_whole(self.folder / EVENTS, lambda path: write_json(path, found))

    def events(self) -> list[Event]:
        """Those that :meth:`note` has written.

        Raises:
            ValueError: the file is damaged.
        """
        if self.folder is None or not (file := self.folder / EVENTS).exists():
            return []
        try:
            return [Event(**event) for event in json.loads(file.read_bytes())]
        except (RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged: {one_line(error)}") from None


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
