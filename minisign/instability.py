"""Adam's instability at the size of a lesson: where it comes by itself, how to stage it, and remedies.

The model is the deep post-norm one of notebook 10 with large batches at a constant rate, which is where
Molybog et al. (arXiv 2304.09871) expect it. ``experiments/instability.py`` looks for jumps of the loss over
ε, learning rate, β₂, batch, depth and placement of the norm; notebook 13 makes some of the runs anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from minisign.probes import UpdateWatch, layer_blocks, layer_names
from minisign.search import norm_config, search_base
from minisign.tokenizer import Tokens
from minisign.train import Config, Run, train, validation_loss

LAYERS, EVERY = 6, 10
SETTLED = 50  # steps of warm-up, in which the loss may do what it likes


def deep_config(seed: int = 0, layers: int = LAYERS, norm: str = "post", **changes: Any) -> Config:
    """The run in which the loss jumps: six post-norm layers, batches of 64 windows, AdamW at 4e-3.

    Args:
        changes: any fields of :class:`~minisign.train.Config`.
    """
    own: dict[str, Any] = dict(optimizer="adamw", betas=(0.9, 0.999), lr=4e-3, batch=64, decay=0.0)
    return dataclasses.replace(norm_config(norm, layers, seed), **{**own, **changes})


@dataclass(frozen=True)
class Jump:
    """The largest rise of a training loss.

    Attributes:
        size: nats; 0 if the loss never rose, infinite if it was not finite at the end.
        low, high: the steps at the lowest loss before it and at its top.
    """

    size: float
    low: int
    high: int


def worst_jump(losses: Sequence[float], start: int = SETTLED, window: int = 10) -> Jump:
    """The largest rise of the loss, as a mean over ``window`` steps, above what it had been down to before.

    A mean over ten, since batches differ by more than small jumps; an undisturbed run still has one, that
    of its noise.

    Args:
        losses: of each step, nats.
        start: the first step that counts.

    Raises:
        ValueError: fewer losses than ``start + window``.
    """
    if len(losses) < start + window:
        raise ValueError(f"a jump needs {start + window} losses or more, got {len(losses)}")
    after = np.array(losses[start:], dtype=np.float64)
    if not np.isfinite(after).all():
        first = start + int(np.argmin(np.isfinite(after)))
        return Jump(float("inf"), first - 1, first)
    means = np.convolve(after, np.ones(window) / window, "valid")
    rise = means - np.minimum.accumulate(means)
    high = int(rise.argmax())
    middle = start + window // 2
    return Jump(float(rise[high]), middle + int(means[: high + 1].argmin()), middle + high)


def watched_run(config: Config, tokens: Tokens, every: int = EVERY) -> tuple[Run, UpdateWatch]:
    """Trains a run with an :class:`~minisign.probes.UpdateWatch` on its layers; one that diverges stops."""
    run = Run(config, tokens)
    watch = UpdateWatch(run.model, run.optimizer, every, layer_blocks(run.model))
    with contextlib.suppress(FloatingPointError):  # the losses say so
        train(run)
    return run, watch


def run_figures(config: Config, tokens: Tokens) -> dict[str, Any]:
    """What one run of the search is measured by.

    Returns:
        ``diverged``, ``jump`` (:class:`Jump`), ``val_loss``, ``curve`` (mean training loss of every
        ``EVERY`` steps), and the figures of :class:`~minisign.probes.UpdateFigures` at every ``EVERY``-th
        step, all of the ``first`` layer, and gradient and std of the ``last`` and the ``embedding``.
    """
    run, watch = watched_run(config, tokens)
    finite = bool(np.isfinite(run.losses).all())
    jump = worst_jump(run.losses) if finite else Jump(float("inf"), 0, len(run.losses))
    names = layer_names(run.model)
    traces = {
        "first": (
            names[0],
            ("gradient", "below_eps", "std", "beyond", "bimodality", "correlation", "descent"),
        ),
        "last": (names[-1], ("gradient", "std")),
        "embedding": ("embedding", ("gradient", "std")),
    }
    return {
        "diverged": not finite,
        "jump": {"size": jump.size if finite else None, "low": jump.low, "high": jump.high},
        "val_loss": validation_loss(run) if finite else None,
        "curve": [
            _short(float(np.mean(run.losses[i : i + EVERY]))) for i in range(0, len(run.losses), EVERY)
        ],
        **{
            label: {figure: [_short(x) for x in watch.series(block, figure)] for figure in wanted}
            for label, (block, wanted) in traces.items()
        },
    }


def _short(x: float) -> float | None:
    return float(f"{x:.3g}") if np.isfinite(x) else None


# --- staged ---------------------------------------------------------------------------------------


def stage_config(seed: int = 0, **changes: Any) -> Config:
    """The run in which a spike is staged: the two-layer pre-norm model of the searches, whose loss does not
    jump by itself, under AdamW at a constant rate.

    Args:
        changes: any fields of :class:`~minisign.train.Config`.
    """
    own: dict[str, Any] = dict(optimizer="adamw", betas=(0.9, 0.999), lr=4e-3, steps=320, decay=0.0)
    return dataclasses.replace(search_base(seed), **{**own, **changes})


@dataclass(frozen=True)
class Stage:
    """What is done to the first layer's gradients in a staged spike, the paper's chain in fast motion.

    Args:
        quiet: from this step on they are multiplied by ``hush``, down to the size of ε.
        burst: from this step on, for ``length`` steps, they are ``loud`` times the gradient of this step,
            the same each time.
    """

    quiet: int = 120
    hush: float = 1e-5
    burst: int = 200
    length: int = 10
    loud: float = 100.0

    def on(self, run: Run, check: Callable[[Tensor], bool] = lambda loss: True) -> Callable[[Tensor], bool]:
        """What to give :func:`~minisign.train.train` as ``may_step``.

        Args:
            check: asked afterwards, say that of a :class:`~minisign.guard.SpikeGuard`.
        """
        parameters = layer_blocks(run.model)[layer_names(run.model)[0]]
        held: list[Tensor] = []

        def may_step(loss: Tensor) -> bool:
            if self.quiet <= run.step < self.burst:
                for p in parameters:
                    if p.grad is not None:
                        p.grad.mul_(self.hush)
            elif self.burst <= run.step < self.burst + self.length:
                if not held:
                    held.extend(p.grad.clone() for p in parameters if p.grad is not None)
                for p, g in zip(parameters, held, strict=True):
                    p.grad = self.loud * g
            return check(loss)

        return may_step
