"""How close an embedding is to the bound ±1/λ. Plain numbers; nothing is drawn or changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from minisign.probes.frequency import frequent_tokens, rare_tokens

NEAR = 0.8  # of the bound: beyond it a component counts as saturated
SHARE = 0.1  # of a row's components: with more of them saturated, the row is


@dataclass(frozen=True)
class Saturation:
    """Extremes of an embedding, and the share of its components beyond 0.8 of the bound.

    Attributes:
        embedding_max, embedding_min: largest and smallest entry, in the parameter's units.
        unseen_saturated: share in [0, 1] among tokens never seen; NaN if there are none.
        rare_saturated: the same among tokens seen 1 to 3 times.
        frequent_saturated: the same among tokens seen more than 200 times.
    """

    embedding_max: float
    embedding_min: float
    unseen_saturated: float
    rare_saturated: float
    frequent_saturated: float


@torch.no_grad()
def saturation(weight: Tensor, counts: np.ndarray, bound: float) -> Saturation:
    """Measures an embedding.

    Args:
        weight: the embedding [V, D].
        counts: how often each token was a training input [V].
        bound: 1/λ.
    """
    low, high = extremes(weight)
    near = (weight.detach().abs().float() > NEAR * bound).float().mean(dim=1).cpu().numpy()

    def share(tokens: np.ndarray) -> float:
        return float(near[tokens].mean()) if tokens.any() else float("nan")

    groups = (counts == 0, rare_tokens(counts), frequent_tokens(counts))
    return Saturation(high, low, *map(share, groups))


def saturated_rows(weight: Tensor, bound: float, share: float = SHARE) -> Tensor:
    """Which rows [V] have more than ``share`` of their components beyond 0.8 of the bound; boolean.

    Args:
        weight: the embedding [V, D].
        bound: 1/λ.
    """
    return (weight.detach().abs() > NEAR * bound).float().mean(dim=1) > share


@torch.no_grad()
def extremes(weight: Tensor) -> tuple[float, float]:
    """Smallest and largest entry."""
    low, high = torch.aminmax(weight.detach())
    return float(low), float(high)


@torch.no_grad()
def largest_entries(model: nn.Module) -> dict[str, float]:
    """Largest |entry| of each parameter, by name; a shared one once."""
    return {name: float(p.detach().abs().max()) for name, p in model.named_parameters()}


def common_mode(vectors: Tensor) -> float:
    """How much of some vectors is the same in all: ‖mean‖² / mean ‖·‖², from 0 (none) to 1 (all equal).

    Args:
        vectors: [n, D] or [..., D], over whose leading dimensions the mean goes; not all zero.
    """
    rows = vectors.detach().double().flatten(0, -2)
    return float(rows.mean(0).square().sum() / rows.square().sum(1).mean())


@torch.no_grad()
def head_size(weight: Tensor) -> dict[str, float]:
    """How large an output matrix [V, D] is, and how much of that softmax does not see.

    Returns:
        ``norm``, Frobenius, in the parameter's units; ``common_mode``, the share of its square that is in
        the mean row, from 0 to 1: what is the same in every row adds the same to all logits.
    """
    return {"norm": float(weight.detach().float().norm()), "common_mode": common_mode(weight)}


@torch.no_grad()
def row_rms(weight: Tensor) -> np.ndarray:
    """RMS of each row [V], in the parameter's units."""
    rms: np.ndarray = weight.detach().float().square().mean(dim=1).sqrt().cpu().numpy()
    return rms


def size_by_kappa(weight: np.ndarray, kappa: np.ndarray) -> dict[str, dict[str, float]]:
    """Rows sorted into octaves of κ = ηλτ, with the mean of their RMS and of their saturated shares.

    Args:
        weight: rows in units of the bound [n, D].
        kappa: of each row [n], finite.

    Returns:
        For every octave [2ʲ, 2ʲ⁺¹) that holds 20 rows or more, under its lower edge as a string:
        ``"kappa"``, ``"rms"`` and ``"share"``, means over its rows.
    """
    octave = np.floor(np.log2(kappa)).astype(int)
    rms, share = np.sqrt((weight**2).mean(axis=1)), (np.abs(weight) > NEAR).mean(axis=1)
    found = {}
    for j in np.unique(octave):
        rows = octave == j
        if rows.sum() >= 20:
            figures = {"kappa": kappa[rows], "rms": rms[rows], "share": share[rows]}
            found[f"{2.0**j:g}"] = {name: float(values.mean()) for name, values in figures.items()}
    return found
