"""Figures from plain numbers. Nothing here trains or measures.

Colours are those of Okabe and Ito (2008), which readers with any colour sense tell apart, and every
line has its own dash as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
STYLES = {
    "tiger": (RED, "-"),
    "lion": (ORANGE, "--"),
    "lazy": (BLUE, "-."),
    "tied": (GREEN, (0, (5, 1))),
    "half_swap": (SKY, (0, (3, 1, 1, 1))),
    "hybrid": (PURPLE, ":"),
    "adamw": (BLACK, (0, (1, 1))),
}


def _style(name: str) -> dict[str, Any]:
    color, dash = STYLES.get(name, (GREY, "-"))
    return {"color": color, "linestyle": dash}


def new_figure(width: float = 7.0, height: float = 4.2, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure without a window behind it, with ``columns`` axes side by side; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for ax in axes:
        ax.grid(True, alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG at 150 dots an inch, the same bytes for the same figure."""
    with matplotlib.rc_context({"svg.hashsalt": "minisign"}):
        figure.savefig(path, dpi=150, format="png", metadata={"Software": None})


def growth(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    theory: Mapping[str, tuple[ArrayLike, ArrayLike]],
    title: str,
) -> Figure:
    """Largest embedding entry over the steps, as a share of the bound 1/λ, with the theory over it.

    Args:
        curves: by variant, steps [n] and largest |entry|·λ [n].
        theory: by label, the same for closed forms.
        title: what was run.
    """
    figure, (ax,) = new_figure()
    for name, (steps, share) in curves.items():
        ax.plot(steps, share, label=name, linewidth=1.8, **_style(name))
    for label, (steps, share) in theory.items():
        ax.plot(steps, share, color=BLACK, linewidth=3.5, alpha=0.25, label=label, zorder=1)
    ax.axhline(1.0, color=GREY, linewidth=0.8)
    ax.set(
        title=title,
        xlabel="step",
        ylabel="largest embedding entry / bound (1/λ)",
        yscale="log",
        ylim=(1e-4, 1.6),
    )
    ax.legend(fontsize=8, loc="lower right", ncols=2)
    return figure


def distributions(
    rows: Mapping[str, tuple[ArrayLike, ArrayLike]],
    title: str,
) -> Figure:
    """Histograms of the components of rare and of frequent tokens' embeddings, in units of the bound.

    Args:
        rows: by variant, components·λ of rare rows [n] and of frequent rows [m].
        title: what was run.
    """
    columns = min(4, max(1, len(rows)))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.4, 2.2 * lines + 0.6), layout="constrained")
    bins = np.linspace(-1.05, 1.05, 43)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for ax in grid.ravel()[len(rows) :]:
        ax.set_visible(False)
    for ax, (name, (rare, frequent)) in zip(grid.ravel(), rows.items(), strict=False):
        for values, color, dash, label in (
            (np.asarray(frequent), BLUE, "--", "seen > 200 times"),
            (np.asarray(rare), RED, "-", "seen 1 to 3 times"),
        ):
            if values.size:
                share, _ = np.histogram(values, bins)
                ax.stairs(
                    share / values.size, bins, color=color, linestyle=dash, linewidth=1.4, label=label
                )
        ax.set_title(name, fontsize=9)
        ax.set_yscale("log")
        ax.grid(True, alpha=0.25, linewidth=0.6)
    grid[0, 0].legend(fontsize=7, loc="upper right")
    figure.supxlabel("component / bound (1/λ)", fontsize=9)
    figure.supylabel("share of components", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def rows_by_frequency(
    rows: Mapping[str, tuple[ArrayLike, ArrayLike]],
    title: str,
) -> Figure:
    """RMS of each token's row against how often the token was seen.

    Args:
        rows: by variant, counts [V] and row RMS·λ [V].
        title: what was run.
    """
    columns = min(4, max(1, len(rows)))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.4, 2.2 * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for ax in grid.ravel()[len(rows) :]:
        ax.set_visible(False)
    for ax, (name, (counts, sizes)) in zip(grid.ravel(), rows.items(), strict=False):
        color, _ = STYLES.get(name, (GREY, "-"))
        ax.scatter(np.asarray(counts) + 0.5, sizes, s=3, color=color, alpha=0.35, linewidths=0)
        ax.axhline(1.0, color=GREY, linewidth=0.8)
        ax.set(xscale="log", yscale="log")
        ax.set_title(name, fontsize=9)
        ax.grid(True, alpha=0.25, linewidth=0.6)
    figure.supxlabel("times seen in training + ½", fontsize=9)
    figure.supylabel("row RMS / bound (1/λ)", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure
