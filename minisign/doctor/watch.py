"""EmbeddingWatch: notices, in any training loop, that rows of an embedding run to the bound.

    optimizer = Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
    watch = EmbeddingWatch(model, optimizer, folder="runs/a")

It follows the envelope beyond which no entry can be (:mod:`minisign.doctor.envelope`) with the rates that
the optimizer really takes, notes which rows have a gradient, and every ``every`` steps counts the rows that
are on the envelope and had no gradient for half of their way.
In the Trainer of transformers it is a callback, :mod:`minisign.doctor.hf`.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minisign import theory
from minisign.doctor.envelope import Watched, find_watched, may_move_without, measure
from minisign.engine.checks import check_counts
from minisign.lab.files import prepare_out

LOG = "embedding_watch.jsonl"
GROWN = 3.0  # times what is left of the largest entry at the start: so far the push must be to stand out
ROWS = 3, 0.001  # so many rows, and such a share of them, must be pushed for a warning
SILENT = 0.5  # of the push: a row that has got no gradient for so much of it moved by its old sign alone
# Where every row has a gradient, all are pushed for a while and most come back: they count only when the
# push is this near to the bound.
LATE = 0.5


class EmbeddingWarning(UserWarning):
    """Rows of an embedding run to the bound."""


@dataclass(frozen=True)
class Look:
    """A matrix [V, D] after a step.

    Attributes:
        step: counted from 1, from where the watch began.
        name: of the parameter.
        largest: largest |entry|, in the parameter's units.
        envelope: what it can be at most; infinite for optimizers that have none (SGD, Adam).
        push: what a sign that never changed would have made of zero; NaN where there is no envelope.
        bound: 1/λ, where all this ends; infinite for λ = 0.
        rows: how many rows have more than a tenth of their components beyond 0.8 of the push, once that is
            three times what is left of the largest entry at the start; before, and without an envelope,
            beyond 0.8 of the bound.
        silent: how many of these went half of that way without a gradient; 0 where every row has one (in an
            output layer), or it is freed before the step (``release_grads``).
    """

    step: int
    name: str
    largest: float
    envelope: float
    push: float
    bound: float
    rows: int
    silent: int


class EmbeddingWatch:
    """Watches the embeddings of a model, and the output layer, while an optimizer trains them.

    Args:
        model: with ``nn.Embedding`` or ``nn.EmbeddingBag`` modules. An ``nn.Linear`` with a weight of the
            same shape as one of theirs is taken for the output layer.
        optimizer: any ``torch.optim.Optimizer``. Those of this package, and others that call their options
            as they do (``lr``, ``weight_decay``; ``betas`` without ``eps`` for Lion), have an envelope.
        every: steps between two looks.
        folder: where to write ``embedding_watch.jsonl``, a line of JSON for every matrix and look, and, if
            the package ``tensorboard`` is installed, the same as scalars; None for neither.
        keep: looks at each matrix to remember.

    Attributes:
        step: steps since the watch began.
        looks: of each matrix, by name, the last :class:`Look` s.
        warned: names of the matrices that a warning was given for.

    Raises:
        ValueError: a model without embeddings in the optimizer, ``every`` or ``keep`` below 1, or a folder
            that cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        every: int = 100,
        *,
        folder: str | Path | None = None,
        keep: int = 1000,
    ) -> None:
        check_counts(every=every, keep=keep)
        self.optimizer, self.every, self.step = optimizer, every, 0
        self._watched = find_watched(model, optimizer)
        self.looks: dict[str, deque[Look]] = {w.name: deque(maxlen=keep) for w in self._watched}
        self.warned: set[str] = set()
        self.folder = None if folder is None else Path(folder)
        self._writer: Any = None
        if self.folder is not None and _is_first():
            prepare_out(self.folder)
            self._writer = _tensorboard(self.folder)
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Looks no more, and closes its files."""
        self._handle.remove()
        if self._writer is not None:
            self._writer.close()

    @torch.no_grad()
    def look(self) -> list[Look]:
        """Looks now, and warns if it has to."""
        found = []
        for watched in self._watched:
            group = self.optimizer.param_groups[watched.group]
            bound = theory.bound(float(group.get("weight_decay", 0.0)))
            stands_out = watched.signs and watched.push >= GROWN * watched.start * watched.left
            level = watched.push if stands_out else bound
            quiet = None if watched.seen is None else watched.seen < SILENT * watched.push
            largest, watched.size, rows, silent = measure(watched.parameter, level, group, quiet)
            push = watched.push if watched.signs else math.nan
            look = Look(self.step, watched.name, largest, watched.envelope, push, bound, rows, silent)
            self.looks[watched.name].append(look)
            found.append(look)
            if watched.seen is not None:
                running = silent if stands_out else rows
            else:
                running = rows if level >= LATE * bound else 0
            enough = running >= max(ROWS[0], ROWS[1] * len(watched.parameter))
            if watched.signs and enough and watched.name not in self.warned:
                self.warned.add(watched.name)
                if _is_first():
                    warnings.warn(_advice(look, watched, running), EmbeddingWarning, _line_of_the_loop())
        self._write(found)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on from here: plain numbers, for JSON or ``torch.save``."""
        numbers = ("start", "size", "push", "left")
        return {
            "step": self.step,
            "warned": sorted(self.warned),
            "watched": {w.name: {n: getattr(w, n) for n in numbers} for w in self._watched},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another watch was; without it, a resumed run takes what it finds for the start.

        Which rows had no gradient is noted anew.

        Raises:
            ValueError: the other watched other matrices.
        """
        names, others = sorted(w.name for w in self._watched), sorted(state["watched"])
        if names != others:
            raise ValueError(f"the state is of a watch of {others}, this one watches {names}")
        for watched in self._watched:
            for name, value in state["watched"][watched.name].items():
                setattr(watched, name, value)
            if watched.seen is not None:
                watched.seen.fill_(watched.push)
        self.step, self.warned = state["step"], set(state["warned"])

    def _after_step(self, *_: Any) -> None:
        self.step += 1
        for watched in self._watched:
            group = self.optimizer.param_groups[watched.group]
            if watched.parameter.grad is None and not may_move_without(group):
                continue
            watched.advance(group)
            watched.note_gradients()
        if self.step % self.every == 0:
            self.look()

    def _write(self, looks: list[Look]) -> None:
        if self.folder is not None and _is_first():
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                for look in looks:
                    finite = {
                        k: None if isinstance(v, float) and not math.isfinite(v) else v
                        for k, v in asdict(look).items()
                    }
                    file.write(json.dumps(finite, allow_nan=False) + "\n")
        if self._writer is not None:
            for look in looks:
                for name in ("largest", "envelope", "push", "rows", "silent"):
                    self._writer.add_scalar(f"embedding/{look.name}/{name}", getattr(look, name), look.step)


def _is_first() -> bool:
    """Whether this process, of those that train together, is the one that warns and writes."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def _line_of_the_loop() -> int:
    """How many calls up the training loop is: the first that is neither torch's nor this package's."""
    level, frame = 0, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "minisign"):
        level, frame = level + 1, frame.f_back
    return level


def _advice(look: Look, watched: Watched, running: int) -> str:
    cure = {
        "embedding": "Make its rows lazy (param_groups(model, embedding={'lazy': 'grad'})) or give it to "
        "AdamW (minisign.Hybrid)",
        "tied": "Lazy rows do not help, as the output layer shares it and gives every row a gradient: give "
        "it to AdamW (minisign.Hybrid), or untie it and make its rows lazy",
        "head": "Lazy rows do not help an output layer, whose every row has a gradient: give it to AdamW "
        "(minisign.Hybrid)",
    }[watched.role]
    end = (
        f", on their way to ±1/λ = ±{look.bound:.4g}" if look.bound < math.inf else ", without end at λ = 0"
    )
    return (
        f"step {look.step}: {running:,} of {len(watched.parameter):,} rows of {look.name} stand at "
        f"±{look.push:.4g}, as far as the sign optimizer can have taken them{end}. {cure}; "
        "minisign.doctor.repair.reset_rows, or `minisign repair` on a checkpoint, mends the rows that are "
        "there."
    )


def _tensorboard(folder: Path) -> Any:
    """A writer, if TensorBoard is there."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    make: Callable[..., Any] = SummaryWriter
    return make(str(folder))
