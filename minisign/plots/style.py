"""Colours, dashes and axes: what all figures have in common.

Colours are those of Okabe and Ito (2008), which readers with any colour sense tell apart, and every
line has its own dash as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
OPTIMIZERS = {
    "SGD": (BLUE, (0, (8, 2))),
    "SGD, momentum": (SKY, (0, (5, 1))),
    "signSGD": (PURPLE, "-."),
    "Signum": (GREEN, (0, (3, 1, 1, 1))),
    "Lion": STYLES["lion"],
    "Tiger": STYLES["tiger"],
    "AdamW": STYLES["adamw"],
}
# For what is neither a variant nor an optimizer.
CYCLE = ((BLUE, "-"), (RED, "--"), (GREEN, "-."), (PURPLE, ":"), (ORANGE, (0, (5, 1))))


def styles(labels: Iterable[str]) -> list[tuple[str, Any]]:
    """Colour and dash for each label: a variant's or an optimizer's own, for others those that none of them
    here has taken."""
    labels, own = list(labels), {**STYLES, **OPTIMIZERS}
    taken = {own[label][0] for label in labels if label in own}
    free = itertools.cycle([style for style in CYCLE if style[0] not in taken] or CYCLE)
    return [own[label] if label in own else next(free) for label in labels]


def new_figure(width: float = 7.0, height: float = 4.2, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure without a window behind it, with ``columns`` axes side by side; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for ax in axes:
        ax.grid(True, alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def small_multiples(
    names: Sequence[str], title: str, xlabel: str, ylabel: str, columns: int = 4
) -> tuple[Figure, list[Axes]]:
    """A figure with one small panel for each name, so many to a line, with common axes."""
    columns = min(columns, max(1, len(names)))
    lines = -(-len(names) // columns)
    figure = Figure(
        figsize=(max(5.0, 2.6 * columns + 0.4), max(3.2, 2.2 * lines + 0.8)), layout="constrained"
    )
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax in grid[len(names) :]:
        ax.set_visible(False)
    panels = grid[: len(names)].tolist()
    for i, (ax, name) in enumerate(zip(panels, names, strict=True)):
        ax.set_title(name, fontsize=9)
        ax.grid(True, alpha=0.25, linewidth=0.6)
        if i + columns >= len(names):  # the last of its column
            ax.set_xlabel(xlabel, fontsize=9)
            ax.tick_params(labelbottom=True)
    figure.supylabel(ylabel, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure, panels


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG at 150 dots an inch, the same bytes for the same figure."""
    with matplotlib.rc_context({"svg.hashsalt": "minisign"}):
        figure.savefig(path, dpi=150, format="png", metadata={"Software": None})
