"""Losses token by token, and by how often a token was seen in training."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


@torch.no_grad()
def token_losses(model: nn.Module, windows: np.ndarray) -> np.ndarray:
    """Cross-entropy of each next token, in nats.

    Args:
        model: takes ids [B, T], gives logits [B, T, V]; left in the mode it was in.
        windows: token ids [n, T + 1].

    Returns:
        Losses [n, T], float64; the one at (i, t) is of predicting ``windows[i, t + 1]``.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    losses = []
    for part in np.array_split(windows, math.ceil(len(windows) / 64)):
        ids = torch.from_numpy(part).to(device)
        logits = model(ids[:, :-1])
        each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses.append(each.view(len(part), -1).double().cpu().numpy())
    model.train(training)
    return np.concatenate(losses)


def loss_by_group(
    losses: np.ndarray, tokens: np.ndarray, groups: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Mean loss over the positions whose token is in a group, by group; NaN where there are none.

    Args:
        losses: in nats [n, T], from :func:`token_losses`.
        tokens: which token stands for each loss [n, T]: ``windows[:, 1:]`` groups by what had to be
            predicted, ``windows[:, :-1]`` by what the model had just read.
        groups: by name, which tokens belong to it [V], boolean.
    """
    means = {}
    for name, members in groups.items():
        here = members[tokens]
        means[name] = float(losses[here].mean()) if here.any() else float("nan")
    return means


def unigram_loss(seen: np.ndarray, targets: np.ndarray) -> float:
    """Mean loss in nats of a model that knows how frequent each token is and nothing else.

    Args:
        seen: the ids that it knows the frequencies from, any shape; every token counts half more.
        targets: the ids to predict, any shape, at most as large as the largest seen.
    """
    counts = np.bincount(seen.ravel()) + 0.5
    return float(-np.log(counts[targets] / counts.sum()).mean())
