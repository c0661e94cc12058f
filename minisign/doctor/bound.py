"""Whether rows of a stored matrix stand at a bound.

A sign optimizer with weight decay λ pushes a row whose gradients have ended to ±1/λ. What that leaves in a
matrix is a *spike*: rows in which many components have nearly the same size, the largest there is. Large
weights alone make none, since a bell, and what a bell was cut off from, becomes thinner towards its end. So
a matrix counts as saturated where

- some rows have more than a tenth of their components beyond 0.8 of a size s (a row *at the bound*), and
- in these rows components become more frequent towards s, clearly so: the share of those beyond 0.2, 0.5
  or 0.8 of s that are beyond 0.9 is at least 1.3 times that of a flat distribution, and a flat one would
  show it once in a million times at most.

The rows are chosen by their even columns and judged by their odd ones, and the other way round, or the
choice would make the spike. Columns that are much alike in all rows (a few outlier features, copies of one
row) count for less: the number of components is divided by how much more the columns' counts vary than
chance would have it. s is the largest entry, or, as strays may be larger, one of two lower sizes that many
rows reach. Where λ is known the bound itself is tried first; there it is enough that the rows are twice as
large as the others, and that components do not become clearly rarer towards the bound or the rows' RMS is
beyond 0.6 of it, more than that of a flat distribution up to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minisign import theory
from minisign.doctor.weights import Stored
from minisign.probes.saturation import NEAR, SHARE

TOP, BEYOND = 0.9, 1.1  # the spike lies in between, in units of s
LOWER = (0.2, 0.5, 0.8)  # where what it stands out from begins
RATIO = 1.3  # how much denser the spike must be at least
MILLION = math.log(1e6)
BINS = 160


@dataclass(frozen=True)
class Inspection:
    """What a matrix [V, D] looks like.

    Attributes:
        name, file, shape, dtype: of the matrix.
        saturated: whether rows stand at a bound.
        bound: ±this, in the parameter's units; None where the matrix is healthy and λ is not known.
        bound_is: ``"1/λ"``, ``"the spike"`` (estimated from it), or ``"unknown"``.
        smallest, largest: entries.
        plus, minus: share of all components beyond 0.8 of the bound, on either side, in [0, 1]; 0 without a
            bound.
        row_rms: of each row [V], float32.
        row_near: share of each row's components beyond 0.8 of the bound [V], float32; zeros without one.
        rows: which rows stand at the bound [V], boolean; none in a healthy matrix.
        typical: median RMS of the other rows.
        counts, counts_at_bound: how many components lie in each of ``BINS`` bins from −``reach`` to
            ``reach`` [BINS], of all rows and of those at the bound; int64.
        note: what else is to be said, or empty.
    """

    name: str
    file: Path
    shape: tuple[int, int]
    dtype: torch.dtype
    saturated: bool
    bound: float | None
    bound_is: str
    smallest: float
    largest: float
    plus: float
    minus: float
    row_rms: np.ndarray
    row_near: np.ndarray
    rows: np.ndarray
    typical: float
    counts: np.ndarray
    counts_at_bound: np.ndarray
    note: str = ""

    @property
    def reach(self) -> float:
        """How far the bins of ``counts`` go."""
        return _reach(self.bound, self.smallest, self.largest)

    def worst(self, count: int) -> np.ndarray:
        """The ``count`` rows with most components at the bound, or, in a healthy matrix, the largest."""
        order = np.lexsort((-self.row_rms, -self.row_near))
        return order[:count]

    @property
    def verdict(self) -> str:
        """In one line."""
        what = f"{self.name} [{self.shape[0]:,} × {self.shape[1]:,}]"
        largest = max(self.largest, -self.smallest)
        if not self.saturated or self.bound is None:
            bound = f", 1/λ is {self.bound:.4g}" if self.bound is not None else ""
            return f"healthy: no rows of {what} stand at a bound; largest |entry| {largest:.4g}{bound}"
        count, rows = int(self.rows.sum()), "rows stand"
        rows = "row stands" if count == 1 else rows
        sides = "±" if min(self.plus, self.minus) > 0 else "+" if self.plus > 0 else "−"
        how = f"1/λ = {self.bound:.4g}" if self.bound_is == "1/λ" else f"{self.bound:.4g}"
        return (
            f"saturated: {count:,} {rows} at {sides}{how} in {what}, {count / self.shape[0]:.1%} of them; "
            f"the others have an RMS of {self.typical:.3g}"
        )


@torch.no_grad()
def inspect_matrix(matrix: Stored, weight_decay: float | None = None) -> Inspection:
    """Whether rows of a matrix [V, D] stand at a bound; reads it three times, a few megabytes at a time.

    Args:
        weight_decay: λ that it was trained with, where it is known.

    Raises:
        ValueError: no matrix, damaged, entries that are not finite, or a λ that is not positive.
    """
    if weight_decay is not None and not 0 < weight_decay < math.inf:
        raise ValueError(f"weight decay must be positive and finite, got {weight_decay}")
    matrix.check_matrix()
    low, high, row_rms, row_max = _sizes(matrix)
    largest = max(high, -low)
    known = None if weight_decay is None else theory.bound(weight_decay)
    note = ""
    candidates: list[tuple[float, str]] = []
    learned = not _is_sinusoidal(matrix)
    if known is not None and largest > 1.02 * known:  # rounding, and no more
        note = (
            f"entries of {matrix.name} up to {largest:.4g} lie beyond 1/λ = {known:.4g}: no sign optimizer "
            "with this λ leads there"
        )
        known = None
    if known is not None and learned:
        candidates.append((known, "1/λ"))
    if learned:
        for trial in _sizes_to_try(row_max):
            if all(abs(trial / other - 1) > 0.02 for other, _ in candidates):
                candidates.append((trial, "the spike"))
    tallies = _tally(matrix, [trial for trial, _ in candidates], largest)
    saturated, size, kind = False, known, "unknown" if known is None else "1/λ"
    for (candidate, how), tally in zip(candidates, tallies, strict=True):
        if tally.is_spike() or (how == "1/λ" and tally.reaches(row_rms, candidate)):
            saturated, size, kind = True, candidate, how
            break
    near, (plus, minus), counts = _near(matrix, size, saturated, _reach(size, low, high))
    rows = near > SHARE if saturated else np.zeros(len(near), dtype=bool)
    if saturated and kind == "the spike" and known is not None:
        note = f"they are on their way: 1/λ = {known:.4g} is not reached yet"
    healthy = row_rms[~rows]
    return Inspection(
        name=matrix.name,
        file=matrix.file,
        shape=(matrix.shape[0], matrix.shape[1]),
        dtype=matrix.dtype,
        saturated=saturated,
        bound=size,
        bound_is=kind,
        smallest=low,
        largest=high,
        plus=plus,
        minus=minus,
        row_rms=row_rms,
        row_near=near,
        rows=rows,
        typical=float(np.median(healthy)) if len(healthy) else math.nan,
        counts=counts[0],
        counts_at_bound=counts[1],
        note=note,
    )


def _sizes(matrix: Stored) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Smallest and largest entry; RMS and largest |entry| of each row [V]."""
    # Written into arrays that are there before: small ones made between large blocks leave holes in memory.
    low, high, rms = (torch.empty(matrix.shape[0]) for _ in range(3))
    for start, block in matrix.blocks():
        at = slice(start, start + len(block))
        low[at], high[at] = block.amin(1), block.amax(1)
        bad = ~(torch.isfinite(low[at]) & torch.isfinite(high[at]))
        if bad.any():
            row = start + int(bad.nonzero()[0])
            raise ValueError(
                f"{matrix.name} in {matrix.file} has entries that are NaN or infinite, first in row {row}"
            )
        most = torch.maximum(high[at], -low[at])
        scale = most.clamp(min=torch.finfo(torch.float32).tiny)[:, None]  # so that squares do not overflow
        rms[at] = block.div_(scale).square_().mean(1).sqrt() * scale[:, 0]
    return float(low.min()), float(high.max()), rms.numpy(), torch.maximum(high, -low).numpy()


def _sizes_to_try(row_max: np.ndarray) -> list[float]:
    """The largest entry, and what one row in two thousand and one in four hundred reaches."""
    reached = np.sort(row_max)[::-1]
    trials = [float(reached[int(len(reached) * share)]) for share in (0.0, 0.0005, 0.0025)]
    return [trial for trial in trials if trial > 0]


@dataclass
class _Tally:
    """Components of the rows at a size, by column: [number of LOWER, D] beyond each of them and up to the
    end of the spike; [D] in the spike. Which rows [V] those are, by either half of the columns; and how
    many entries of the whole matrix are beyond the spike, which ends at ``end``."""

    lower: Tensor
    top: Tensor
    rows: Tensor
    end: float
    strays: int = 0

    def is_spike(self) -> bool:
        top = float(self.top.sum())
        if not top or self.strays > 0.1 * top:
            return False
        for lower, counts in zip(LOWER, self.lower, strict=True):
            total, flat = float(counts.sum()), (self.end - TOP) / (self.end - lower)
            # Columns that vary more than independent components would are worth fewer of them.
            spread = max(1.0, float(counts.var(correction=0) / counts.mean()))
            share = top / total
            if share >= RATIO * flat and total / spread * _divergence(share, flat) > MILLION:
                return True
        return False

    def reaches(self, row_rms: np.ndarray, size: float) -> bool:
        """Whether the rows are larger than the others, and flat or fuller towards the size."""
        top, beyond = float(self.top.sum()), float(self.lower[-1].sum())
        rows = self.rows.numpy()
        if rows.mean() > 0.5 or top < 3 or self.strays:
            return False
        of_rows, of_others = float(np.median(row_rms[rows])), float(np.median(row_rms[~rows]))
        full = of_rows > 0.6 * size or top + 0.5 >= 0.5 * (beyond - top + 0.5)
        return of_rows >= 2 * of_others and full


def _divergence(share: float, flat: float) -> float:
    """Of two coins: n times this is minus the log of how likely n throws of the second look like the
    first."""
    rest = (1 - share) * math.log((1 - share) / (1 - flat)) if share < 1 else 0.0
    return share * math.log(share / flat) + rest


def _tally(matrix: Stored, sizes: list[float], largest: float) -> list[_Tally]:
    count, width = matrix.shape

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64)

    found = [
        _Tally(
            zeros(len(LOWER), width),
            zeros(width),
            torch.zeros(count, dtype=torch.bool),
            min(BEYOND, max(1.0, largest / size)),
        )
        for size in sizes
    ]
    if not sizes or width < 2:
        return found
    for start, block in matrix.blocks():
        block = block.abs_()
        for size, tally in zip(sizes, found, strict=True):
            near = block > NEAR * size
            for chosen, judged in ((0, 1), (1, 0)):
                rows = near[:, chosen::2].float().mean(1) > SHARE
                tally.rows[start : start + len(rows)] |= rows
                x = block[rows, judged::2] / size
                inside = x <= BEYOND
                tally.top[judged::2] += ((x > TOP) & inside).sum(0)
                for i, lower in enumerate(LOWER):
                    tally.lower[i, judged::2] += ((x > lower) & inside).sum(0)
            tally.strays += int((block > BEYOND * size).sum())
    return found


def _near(
    matrix: Stored, size: float | None, saturated: bool, reach: float
) -> tuple[np.ndarray, tuple[float, float], np.ndarray]:
    """Share of each row's components beyond 0.8 of a size [V], and of all components on either side; counts
    of all components and of those in rows at the bound [2, BINS]."""
    shares, plus, minus = torch.empty(matrix.shape[0]), 0, 0
    counts = torch.zeros(2, BINS, dtype=torch.float64)
    near = math.inf if size is None else NEAR * size
    for start, block in matrix.blocks():
        at = slice(start, start + len(block))
        above, below = block > near, block < -near
        plus, minus = plus + int(above.sum()), minus + int(below.sum())
        shares[at] = (above | below).float().mean(1)
        counts[0] += torch.histc(block, BINS, -reach, reach)
        if saturated:
            counts[1] += torch.histc(block[shares[at] > SHARE], BINS, -reach, reach)
    entries = matrix.shape[0] * matrix.shape[1]
    return shares.numpy(), (plus / entries, minus / entries), counts.long().numpy()


def _reach(bound: float | None, smallest: float, largest: float) -> float:
    return max(bound or 0.0, largest, -smallest) or 1.0


def _is_sinusoidal(matrix: Stored) -> bool:
    """Whether the rows are sines and cosines of one amplitude, as tables of positions that are not learned:
    pairs of components lie on a circle."""
    count, width = matrix.shape
    if width % 2:
        return False
    rows = torch.cat([matrix.rows(i, i + 1).float() for i in range(0, count, -(-count // 64))])
    radius = rows.abs().max()
    for pairs in (rows.unflatten(1, (2, -1)).movedim(1, -1), rows.unflatten(1, (-1, 2))):
        if ((pairs / radius).square().sum(-1) - 1).abs().max() < 0.02:
            return True
    return False
