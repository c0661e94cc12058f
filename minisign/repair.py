"""Resetting rows of an embedding that ran to the bound ±1/λ; :func:`minisign.probes.saturated_rows` finds
them."""

from __future__ import annotations

import torch
from torch import Tensor

WAYS = ("mean", "resample", "rescale", "zero")


@torch.no_grad()
def reset_rows(weight: Tensor, rows: Tensor, way: str, seed: int = 0) -> None:
    """Gives some rows values like those of the healthy ones, in place; the others keep their bits.

    ============ ===================================================================================
    mean         the mean of the healthy rows, the same for all: the model is undecided about them
    resample     normal numbers with the healthy rows' mean and standard deviation, by column
    rescale      the row itself, scaled to the healthy rows' median RMS: its pattern of signs is kept
    zero         zero
    ============ ===================================================================================

    Healthy rows are all those that are not reset.

    Args:
        weight: the embedding [V, D].
        rows: which rows to reset [V], boolean.
        way: one of the above.
        seed: of ``"resample"``.

    Raises:
        ValueError: an unknown way, a mask of another length, or no healthy row to go by.
    """
    if way not in WAYS:
        raise ValueError(f"unknown way {way!r}: choose from {', '.join(WAYS)}")
    if rows.shape != weight.shape[:1] or rows.dtype != torch.bool:
        raise ValueError(
            f"rows must be a boolean mask [{len(weight)}], got {rows.dtype} {list(rows.shape)}"
        )
    healthy = weight[~rows].float()
    if not len(healthy):
        raise ValueError("all rows are to be reset: no healthy row is left to go by")
    bad = weight[rows].float()
    if way == "mean":
        new = healthy.mean(0).expand_as(bad)
    elif way == "resample":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(bad.shape, generator=generator).to(weight.device)
        new = healthy.mean(0) + healthy.std(0, correction=0) * noise
    elif way == "rescale":
        size = healthy.square().mean(1).sqrt().median()
        new = bad * (size / bad.square().mean(1, keepdim=True).sqrt())
    else:
        new = torch.zeros_like(bad)
    weight[rows] = new.to(weight.dtype)
