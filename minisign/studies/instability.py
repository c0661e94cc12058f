"""Adam's instability at the size of a lesson: the ratio's bell, where the loss jumps, how to stage it.

The model is the deep post-norm one of notebook 10 with large batches at a constant rate, which is where
Molybog et al. (arXiv 2304.09871) expect it. ``experiments/instability.py`` looks for jumps of the loss over
ε, learning rate, β₂, batch, depth and placement of the norm; notebook 13 makes some of the runs anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from minisign.doctor.guard import SpikeGuard
from minisign.lab.config import Config
from minisign.lab.tokenizer import Tokens
from minisign.lab.train import Run, train, training_step, validation_loss
from minisign.probes import UpdateWatch, layer_blocks, layer_names
from minisign.studies.search import norm_config, search_base

LAYERS, EVERY = 6, 10
SETTLED = 50  # steps of warm-up, in which the loss may do what it likes


def deep_config(seed: int = 0, layers: int = LAYERS, norm: str = "post", **changes: Any) -> Config:
    """The run in which the loss jumps: six post-norm layers, batches of 64 windows, AdamW at 4e-3.

    Args:
        changes: any fields of :class:`~minisign.lab.config.Config`.
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


# --- the ratio's bell -----------------------------------------------------------------------------

BATCHES = (2, 8, 32, 128)


def bell_config(seed: int = 0, **changes: Any) -> Config:
    """The run in which the update ratio is measured: the two-layer model of the searches, 200 steps of
    AdamW at a rate so low that the weights drift rather than swing.

    Args:
        changes: any fields of :class:`~minisign.lab.config.Config`.
    """
    own: dict[str, Any] = dict(
        optimizer="adamw", betas=(0.9, 0.95), lr=1e-4, steps=200, decay=0.0, batch=32
    )
    return dataclasses.replace(search_base(seed), **{**own, **changes})


def bell_run(config: Config, tokens: Tokens, fixed: bool = False) -> tuple[Run, UpdateWatch]:
    """Trains it with an :class:`~minisign.probes.UpdateWatch` on its layers at every fifth step.

    Args:
        fixed: every step on the first batch, so that gradients differ by what the weights moved alone.
    """
    run = Run(config, tokens)
    watch = UpdateWatch(run.model, run.optimizer, 5, layer_blocks(run.model))
    if fixed:
        step = training_step(run)
        for _ in range(config.steps):
            step()
    else:
        train(run)
    return run, watch


def bell_figures(watch: UpdateWatch) -> dict[str, dict[str, float]]:
    """By block, the means of r's std, bimodality and share beyond 0.8 and of the correlation of successive
    gradients, over the second half of the looks."""
    names = ("std", "correlation", "bimodality", "beyond")
    half = len(watch.looks) // 2
    return {
        block: {name: float(np.mean(watch.series(block, name)[half:])) for name in names}
        for block in watch.blocks
    }


# --- staged ---------------------------------------------------------------------------------------


def stage_config(seed: int = 0, **changes: Any) -> Config:
    """The run in which a spike is staged: the two-layer pre-norm model of the searches, whose loss does not
    jump by itself, under AdamW at a constant rate.

    Args:
        changes: any fields of :class:`~minisign.lab.config.Config`.
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

    def set_up(self, run: Run) -> None:
        """Has it happen to a run, in its backward passes, so that clipping comes after it."""
        held: dict[Tensor, Tensor] = {}

        def meddle(p: Tensor) -> None:
            assert p.grad is not None
            if self.quiet <= run.step < self.burst:
                p.grad.mul_(self.hush)
            elif self.burst <= run.step < self.burst + self.length:
                p.grad = held.setdefault(p, self.loud * p.grad).clone()

        for p in layer_blocks(run.model)[layer_names(run.model)[0]]:
            p.register_post_accumulate_grad_hook(meddle)


# What is tried against the staged spike, by label: changes of the configuration, and options of a guard.
REMEDIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "ε 1e-12": ({"eps": 1e-12}, {}),
    "ε 1e-4": ({"eps": 1e-4}, {}),
    "rate 1e-3": ({"lr": 1e-3}, {}),
    "batch 4": ({"batch": 4}, {}),
    "β2 0.95": ({"betas": (0.9, 0.95)}, {}),
    "clip 1": ({"clip": 1.0}, {}),
    "clip 0.25": ({"clip": 0.25}, {}),
    "loss: skip": ({}, {"on_loss": "skip", "on_ratio": None}),
    "loss: back": ({}, {"on_loss": "back", "on_ratio": None}),
    "ratio: slow": ({}, {"on_ratio": "slow"}),
    "ratio: back": ({}, {"on_ratio": "back"}),
    "ratio: skip": ({}, {"on_ratio": "skip"}),
    "both": ({}, {"on_loss": "back", "on_ratio": "skip"}),
}


def remedy_run(
    label: str, tokens: Tokens, seed: int = 0, stage: Stage | None = None
) -> tuple[Run, SpikeGuard | None]:
    """Trains the run of :func:`stage_config` with a remedy. A guard saves every 25 steps.

    Args:
        label: of ``REMEDIES``.
        stage: the spike; None, an undisturbed run.

    Raises:
        ValueError: an unknown remedy.
    """
    if label not in REMEDIES:
        raise ValueError(f"unknown remedy {label!r}: choose from {', '.join(REMEDIES)}")
    changes, options = REMEDIES[label]
    run, guard = Run(stage_config(seed, **changes), tokens), None
    if stage is not None:
        stage.set_up(run)
    with tempfile.TemporaryDirectory() as folder:
        if options:
            guard = SpikeGuard(run.model, run.optimizer, **options, folder=folder, save_every=25)
            train(run, may_step=guard.check)
        else:
            train(run)
    return run, guard


def remedy_figures(run: Run, guard: SpikeGuard | None, stage: Stage) -> dict[str, Any]:
    """``val_loss``; ``after``, the mean training loss of the thirty steps from the burst's end on;
    ``jump``; and how many ``events`` the guard noted, the ``first`` of them at which step."""
    end = stage.burst + stage.length
    return {
        "val_loss": validation_loss(run),
        "after": float(np.mean(run.losses[end : end + 30])),
        "jump": worst_jump(run.losses).size,
        "events": len(guard.events) if guard else 0,
        "first": guard.events[0].step if guard and guard.events else None,
    }


def guarded_figures(config: Config, tokens: Tokens) -> dict[str, Any]:
    """What a guard that only warns notes in a run.

    Returns:
        ``top``, the largest loss of a step after the warm-up, in nats, and ``top_step``; ``ratio`` and
        ``loss``, the steps of the first event of each kind (None without one), and how many ``events``.
    """
    run = Run(config, tokens)
    guard = SpikeGuard(run.model, run.optimizer)
    train(run, may_step=guard.check)
    after = np.array(run.losses[2 * SETTLED :])  # the guard's window
    ratio = [event.step for event in guard.events if event.cause == "ratio"]
    loss = [event.step for event in guard.events if event.cause != "ratio"]
    return {
        "top": float(after.max()),
        "top_step": 2 * SETTLED + int(after.argmax()),
        "ratio": ratio[0] if ratio else None,
        "loss": loss[0] if loss else None,
        "events": len(guard.events),
    }
