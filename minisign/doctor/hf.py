"""The watch as a callback of the Trainer of transformers; needs the extra ``hf``.

    Trainer(
        model, arguments, train_dataset=data,
        optimizers=(Tiger(param_groups(model)), None),
        callbacks=[EmbeddingCallback()],
    )

What it counts, warns of and writes is :mod:`minisign.doctor.watch`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from minisign.doctor.watch import EmbeddingWatch


class EmbeddingCallback(TrainerCallback, ExportableState):
    """An :class:`~minisign.doctor.watch.EmbeddingWatch` from the beginning of a training to its end.

    A Trainer that resumes from a checkpoint goes on with the watch as it was.

    Args:
        every: steps of the optimizer between two looks; there is one more at the end.
        folder: for ``embedding_watch.jsonl`` and TensorBoard; None for the Trainer's ``output_dir``.

    Attributes:
        watch: the watch of the last training; None before one.
    """

    def __init__(self, every: int = 100, folder: str | Path | None = None) -> None:
        self.every, self.folder = every, folder
        self.watch: EmbeddingWatch | None = None
        self.saved: dict[str, Any] = {}  # the state of a watch to go on from; the Trainer may set it

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Begins to watch, or goes on.

        Raises:
            ValueError: see :class:`~minisign.doctor.watch.EmbeddingWatch`.
        """
        assert model is not None
        if self.watch is not None:  # of a training that an error ended
            self.watch.remove()
        while hasattr(optimizer, "optimizer"):  # accelerate and others wrap the one that has the hooks
            optimizer = optimizer.optimizer
        self.watch = EmbeddingWatch(model, optimizer, self.every, folder=self.folder or args.output_dir)
        if state.global_step:  # it resumes
            callbacks: Any = state.stateful_callbacks
            saved = callbacks.get(type(self).__name__, self.state())["attributes"]["saved"]
            if saved:
                self.watch.load_state_dict(saved)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Looks a last time."""
        assert self.watch is not None
        if self.watch.step % self.every:
            self.watch.look()
        self.watch.remove()

    def state(self) -> dict[str, Any]:
        """What the Trainer saves of this callback."""
        folder = None if self.folder is None else str(self.folder)
        saved = self.saved if self.watch is None else self.watch.state_dict()
        return {"args": {"every": self.every, "folder": folder}, "attributes": {"saved": saved}}
