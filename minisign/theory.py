"""Closed forms: what the measurements are held against. Numbers in, numbers out.

Notation: θ parameter, λ weight decay, η effective step, α the user's learning rate, bound 1/λ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def bound(weight_decay: float) -> float:
    """1/λ, where sign(m) + λθ = 0: no sign optimizer with decoupled decay leads beyond it."""
    return 1 / weight_decay if weight_decay > 0 else float("inf")


def envelope(etas: ArrayLike, weight_decay: float, start: float = 0.0) -> NDArray[np.float64]:
    """Largest |θ| that a sign optimizer can have reached after each step.

    |θ_t| ≤ 1/λ − (1/λ − |θ_0|) Π(1 − η_i λ), attained by an entry whose sign never changes; for a
    constant η it is 1/λ (1 − (1 − ηλ)ᵗ) from zero, the curve that kexue.fm/archives/9736 leaves to
    the reader.

    Args:
        etas: effective step η at each step [T].
        weight_decay: λ ≥ 0; 0 gives |θ_0| + Ση.
        start: |θ_0|.

    Returns:
        The envelope after each step [T], in the parameter's units.
    """
    steps = np.asarray(etas, dtype=np.float64)
    if weight_decay == 0:
        return np.asarray(start + np.cumsum(steps))
    limit = bound(weight_decay)
    return np.asarray(limit - (limit - start) * np.cumprod(1 - steps * weight_decay))


def logistic_growth(alphas: ArrayLike, weight_decay: float, start: float) -> NDArray[np.float64]:
    """RMS of a row whose entries all saturate together under Tiger's step η = α·RMS(row).

    dr/dt = αr(1 − λr), so r(t) = (1/λ) / (1 + (1/(λ r_0) − 1) e^{−Σα}): exponential at first, which
    is how a run at λ = 0.01 can reach ±100 at all.

    Args:
        alphas: learning rate α at each step [T].
        weight_decay: λ > 0.
        start: r_0 > 0, the row's RMS at the start.

    Returns:
        r after each step [T], in the parameter's units.
    """
    limit = bound(weight_decay)
    grown = np.exp(-np.cumsum(np.asarray(alphas, dtype=np.float64)))
    return limit / (1 + (limit / start - 1) * grown)
