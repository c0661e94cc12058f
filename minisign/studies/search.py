"""Learning-rate searches with the same budget for every optimizer: nine rates, each twice the one before.

A comparison of optimizers at one rate each compares the rates. The scripts
``experiments/learning_rates.py`` and ``experiments/norm_placement.py`` run what :func:`search_config`
describes over seeds; :func:`losses_by_rate` reads the whole curve from their logs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisign.lab.build import build_model
from minisign.lab.config import Config
from minisign.lab.tokenizer import Tokens
from minisign.lab.train import Run, next_token_loss, train
from minisign.probes import (
    equal_share_groups,
    head_size,
    heterogeneity,
    layer_blocks,
    layer_names,
    loss_by_group,
    tensor_blocks,
    token_losses,
)
from minisign.studies.variants import lesson_config

RATES, FACTOR = 9, 2.0


@dataclass(frozen=True)
class Contender:
    """An optimizer in a search.

    Args:
        optimizer, betas: as in :class:`~minisign.lab.config.Config`.
        lowest: the first of its nine rates, chosen in a coarse run so that the best is neither the first
            nor the last.
    """

    optimizer: str
    betas: tuple[float, ...]
    lowest: float

    @property
    def rates(self) -> list[float]:
        return [self.lowest * FACTOR**i for i in range(RATES)]


CONTENDERS = {
    "SGD": Contender("sgd", (0.0,), 0.02),
    "SGD, momentum": Contender("sgd", (0.9,), 0.004),
    "signSGD": Contender("signum", (0.0,), 2e-4),
    "Signum": Contender("signum", (0.9,), 2e-4),
    "Lion": Contender("lion", (0.9, 0.99), 1e-4),
    "Tiger": Contender("tiger", (0.965,), 1e-3),
    "AdamW": Contender("adamw", (0.9, 0.999), 5e-4),
}


def search_base(seed: int = 0) -> Config:
    """What all runs of a search share: the lessons' model with GPT-2's initial weights, 400 steps, no
    weight decay."""
    return dataclasses.replace(
        lesson_config(seed), steps=400, decay=0.5, weight_decay=0.0, embedding_std=0.02
    )


def search_config(base: Config, label: str, rate: float) -> Config:
    """The configuration of one run.

    Raises:
        ValueError: an unknown contender.
    """
    if label not in CONTENDERS:
        raise ValueError(f"unknown contender {label!r}: choose from {', '.join(CONTENDERS)}")
    contender = CONTENDERS[label]
    return dataclasses.replace(base, optimizer=contender.optimizer, betas=contender.betas, lr=rate)


# --- where the norm stands ------------------------------------------------------------------------

SIDES = ("pre", "post")


def norm_config(norm: str, layers: int, seed: int = 0, init: str = "xavier") -> Config:
    """The model of the comparison of norms: that of the search, deeper, with matrices whose outputs are as
    large as their inputs."""
    return dataclasses.replace(search_base(seed), norm=norm, layers=layers, init=init)


def norm_rates(label: str) -> list[float]:
    """The nine rates of a contender there; the post-norm model needs lower ones of Signum."""
    lowest = {"SGD": 0.02, "Signum": 5e-5}
    return dataclasses.replace(CONTENDERS[label], lowest=lowest[label]).rates


def start_batches(config: Config, tokens: Tokens) -> list[Tensor]:
    """Four training batches, windows [batch, context + 1], that no run of a search has seen."""
    steps = range(config.steps, config.steps + 4)
    draw = partial(tokens.batch, config.seed, size=config.batch, context=config.context)
    return [torch.from_numpy(draw(step)) for step in steps]


def start_figures(config: Config, tokens: Tokens) -> dict[str, Any]:
    """Gradients and curvature of a model that is not trained yet.

    Returns:
        ``ratio``, the gradient norm of the last layer over that of the first; ``between layers`` (and the
        embeddings, the last norm and the head) and ``between tensors``, the disparity of the norms; Λ_G,
        Λ_P, ``norm`` and ``curvature`` of the former, and whether all of the curvatures ``converged``.
    """
    model = build_model(config, tokens.vocab_size)
    loss, batches = partial(next_token_loss, model), start_batches(config, tokens)
    layers = heterogeneity(loss, batches, layer_blocks(model))
    tensors = heterogeneity(loss, batches, tensor_blocks(model), hessian_batches=0)
    names, blocks = layer_names(model), layers["blocks"]
    return {
        "ratio": blocks[names[-1]]["norm"] / blocks[names[0]]["norm"],
        "between layers": layers["disparity"],
        "between tensors": tensors["disparity"],
        "lambda_g": layers["lambda_g"],
        "lambda_p": layers["lambda_p"],
        "norm": {name: block["norm"] for name, block in blocks.items()},
        "curvature": {name: block["curvature"]["norm"] for name, block in blocks.items()},
        "converged": all(block["curvature"]["converged"] for block in blocks.values()),
    }


# --- a run and what is read of many ---------------------------------------------------------------


def search_run(config: Config, tokens: Tokens) -> tuple[Run, dict[str, Any]]:
    """Trains a run of a search and measures it; a run that diverges has no figures but its curve.

    Returns:
        The run and its figures: ``diverged``, ``val_loss`` in nats, ``curve`` (the training loss, a mean
        over every twenty steps), ``groups`` (validation loss by tenths of the text, see
        :func:`~minisign.probes.equal_share_groups`, of the token to predict), and the head's ``head_norm``
        and ``head_common``.
    """
    run = Run(config, tokens)
    try:
        train(run)
    except FloatingPointError:
        return run, {"diverged": True, "val_loss": None, "curve": _curve(run.losses)}
    windows = tokens.windows(config.context, 512)
    each = token_losses(run.model, windows)
    if not np.isfinite(each).all():
        return run, {"diverged": True, "val_loss": None, "curve": _curve(run.losses)}
    head = head_size(run.model.head.weight)
    return run, {
        "diverged": False,
        "val_loss": float(each.mean()),
        "curve": _curve(run.losses),
        "groups": loss_by_group(each, windows[:, 1:], equal_share_groups(tokens.shares)),
        "head_norm": head["norm"],
        "head_common": head["common_mode"],
    }


def _curve(losses: Sequence[float]) -> list[float | None]:
    parts = [losses[i : i + 20] for i in range(0, len(losses), 20)]
    means = [float(np.mean(part)) for part in parts]
    return [round(x, 4) if np.isfinite(x) else None for x in means]


def losses_by_rate(
    lines: Sequence[dict[str, Any]], label: str, name: str = "val_loss"
) -> tuple[np.ndarray, np.ndarray]:
    """The rates [n] of a condition's runs and a figure of each run [n, seeds]; infinite where it diverged.

    Args:
        lines: of a log.
        label: of the jobs, which differ in rate and seed.

    Raises:
        ValueError: no run of that label, or more of them at one rate than at another.
    """
    found: dict[float, list[float]] = {}
    for line in lines:
        if line["job"]["label"] == label:
            value = line["figures"].get(name)
            found.setdefault(line["job"]["config"]["lr"], []).append(np.inf if value is None else value)
    if not found:
        raise ValueError(f"no run with label {label!r}: {sorted({x['job']['label'] for x in lines})}")
    rates, counts = sorted(found), sorted({len(values) for values in found.values()})
    if len(counts) > 1:
        raise ValueError(
            f"the rates of {label!r} have {counts[0]} to {counts[-1]} runs: is the log complete?"
        )
    return np.array(rates), np.array([found[rate] for rate in rates])


def rate_curve(
    lines: Sequence[dict[str, Any]], label: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """To be drawn: the rates [n] of a condition, and the mean, lowest and highest validation loss of its
    seeds [n] each, where a run that diverged counts as one of 20 nats."""
    rates, losses = losses_by_rate(lines, label)
    losses = np.minimum(losses, 20.0)
    return rates, losses.mean(axis=1), losses.min(axis=1), losses.max(axis=1)


def best_rate(lines: Sequence[dict[str, Any]], label: str) -> float:
    """The rate with the lowest mean validation loss over the seeds.

    Raises:
        ValueError: it is the first or the last that was tried, so the search has not ended; or no such run.
    """
    rates, losses = losses_by_rate(lines, label)
    at = int(losses.mean(axis=1).argmin())
    if at in (0, len(rates) - 1):
        raise ValueError(f"the best rate of {label!r}, {rates[at]:g}, is at the edge of the search")
    return float(rates[at])
