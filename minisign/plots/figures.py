"""Figures of whatever numbers: the notebooks'."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from minisign.plots.style import (
    BLACK,
    BLUE,
    CYCLE,
    GREY,
    ORANGE,
    RED,
    SKY,
    new_figure,
    small_multiples,
    styles,
)


def curves(
    measured: Mapping[str, tuple[ArrayLike, ArrayLike]],
    theory: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    points: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    bands: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]] | None = None,
    **axes: Any,
) -> Figure:
    """Lines over a common x, with closed forms as broad pale lines and bands beneath, single points above.

    Args:
        measured: by label, x [n] and y [n]; a variant's name gives it the variant's colour and dash.
        theory, points: likewise.
        bands: by label, x [n] and the lower and upper end [n].
        axes: ``title``, ``xlabel``, ``ylabel``, ``xscale`` and whatever else ``Axes.set`` takes.
    """
    figure, (ax,) = new_figure()
    for i, (label, (x, low, high)) in enumerate((bands or {}).items()):
        ax.fill_between(x, low, high, color=(SKY, ORANGE, GREY)[i % 3], alpha=0.4, linewidth=0, label=label)
    for i, (label, (x, y)) in enumerate((theory or {}).items()):
        ax.plot(x, y, color=(BLACK, ORANGE, SKY)[i % 3], linewidth=5, alpha=0.3, label=label, zorder=1)
    for (label, (x, y)), (color, dash) in zip(measured.items(), styles(measured), strict=True):
        ax.plot(x, y, color=color, linestyle=dash, linewidth=1.6, label=label)
    for i, (label, (x, y)) in enumerate((points or {}).items()):
        color = CYCLE[i % len(CYCLE)][0]
        ax.plot(x, y, "osD^v"[i % 5], color=color, markersize=5, label=label)
    ax.set(**axes)
    ax.legend(fontsize=9)
    return figure


def panels(
    lines: Mapping[str, Mapping[str, Sequence[ArrayLike]]],
    title: str,
    xlabel: str,
    ylabel: str,
    columns: int = 4,
    **axes: Any,
) -> Figure:
    """Lines in panels side by side with common axes, each with a band if it has one.

    Args:
        lines: by panel and label, x [n] and y [n], and perhaps the lower and upper end of a band [n] each;
            infinite y are left out. A label has the same colour and dash in every panel.
        title: what was run.
        columns: panels to a line.
        axes: ``xscale``, ``ylim`` and whatever else ``Axes.set`` takes.
    """
    figure, drawn = small_multiples(list(lines), title, xlabel, ylabel, columns)
    labels = list(dict.fromkeys(label for panel in lines.values() for label in panel))
    style = dict(zip(labels, styles(labels), strict=True))
    known = {}
    for ax, panel in zip(drawn, lines.values(), strict=True):
        for label, (x, y, *band) in panel.items():
            color, dash = style[label]
            (known[label],) = ax.plot(x, y, color=color, linestyle=dash, linewidth=1.6, label=label)
            if band:
                low, high = band
                ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        ax.set(**axes)
    figure.legend(
        list(known.values()), list(known), loc="outside lower center", ncols=min(5, len(known)), fontsize=8
    )
    return figure


def densities(
    panels: Mapping[str, tuple[ArrayLike, ArrayLike | None]],
    bins: ArrayLike,
    title: str,
    xlabel: str = "λθ",
    top: float = 3.0,
) -> Figure:
    """Histograms side by side, each with an expected density over it.

    Args:
        panels: by title, values [n] and the density expected in the middle of each bin [bins − 1], or None.
        bins: edges of the bins.
        title: what was run.
        xlabel: what the values are.
        top: of the density's axis.
    """
    edges = np.asarray(bins)
    figure, axes = small_multiples(list(panels), title, xlabel, "density", columns=5)
    for ax, (values, expected) in zip(axes, panels.values(), strict=True):
        ax.hist(np.asarray(values), edges.tolist(), density=True, color=SKY)
        if expected is not None:
            ax.plot((edges[1:] + edges[:-1]) / 2, np.asarray(expected), color=BLACK)
        ax.set(ylim=(0, top))
    return figure


def histograms_over_time(
    panels: Mapping[str, tuple[ArrayLike, ArrayLike]],
    bins: ArrayLike,
    title: str,
    ylabel: str,
    marks: Sequence[float] = (),
) -> Figure:
    """How a distribution changes during training, a column for each look, dark where much is.

    Args:
        panels: by title, steps [looks] and counts [looks, bins − 1].
        bins: edges of the bins.
        title: what was run.
        ylabel: what is counted.
        marks: steps at which to draw a line.
    """
    edges = np.asarray(bins)
    figure, axes = small_multiples(list(panels), title, "step", ylabel, columns=2)
    figure.set_size_inches(8.5, figure.get_size_inches()[1])
    middle = (edges[1:] + edges[:-1]) / 2
    for ax, (steps, counts) in zip(axes, panels.values(), strict=True):
        share = np.asarray(counts) / np.asarray(counts).sum(axis=1, keepdims=True)
        drawn = ax.pcolormesh(
            np.asarray(steps), middle, share.T.clip(1e-4), norm=LogNorm(1e-4, 1), cmap="Blues"
        )
        for mark in marks:
            ax.axvline(mark, color=RED, linestyle="--", linewidth=0.9)
        ax.grid(False)
    figure.colorbar(drawn, ax=axes, label="share of entries")
    return figure


def phase_maps(
    panels: Mapping[str, ArrayLike],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    xlabel: str,
    ylabel: str,
    label: str,
    top: float,
) -> Figure:
    """Numbers on a grid, each written in its cell, darker where it is larger.

    Args:
        panels: by title, numbers [rows, columns]; NaN, written as a dash, where nothing was run.
        rows, columns: what they are, the first row at the bottom.
        title: what was run.
        label: of the numbers.
        top: the number from which on cells are darkest.
    """
    figure, axes = small_multiples(list(panels), title, xlabel, ylabel, columns=2)
    figure.set_size_inches(8.5, figure.get_size_inches()[1])
    for ax, grid in zip(axes, map(np.asarray, panels.values()), strict=True):
        drawn = ax.imshow(grid.clip(max=top), cmap="Blues", vmin=0, vmax=top, origin="lower", aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            text = "–" if np.isnan(value) else f"{value:.2f}"
            color = "white" if value > 0.55 * top else "black"
            ax.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
        ax.set_xticks(range(len(columns)), columns, fontsize=8)
        ax.set_yticks(range(len(rows)), rows, fontsize=8)
        ax.grid(False)
    figure.colorbar(drawn, ax=axes, label=label)
    return figure


def bars(
    shares: Mapping[str, Sequence[float]], groups: Sequence[str], horizontal: bool = False, **axes: Any
) -> Figure:
    """Bars in groups, told apart by colour and hatching.

    Args:
        shares: by label, a value for each group.
        groups: their names.
        horizontal: for long names.
        axes: as for :func:`curves`; the values' axis is y, or x if horizontal.
    """
    line = 0.14 * (len(shares) + 1)  # inches for a group
    figure, (ax,) = new_figure(height=1.3 + line * len(groups) if horizontal else 4.2)
    width = 0.8 / len(shares)
    for i, ((label, values), (color, _)) in enumerate(zip(shares.items(), styles(shares), strict=True)):
        at = np.arange(len(groups)) + width * (i - (len(shares) - 1) / 2)
        hatch = ("", "//", "..", "xx", "--")[i % 5]
        if horizontal:
            ax.barh(at, values, 0.92 * width, label=label, color=color, edgecolor="white", hatch=hatch)
        else:
            ax.bar(at, values, 0.92 * width, label=label, color=color, edgecolor="white", hatch=hatch)
    (ax.set_yticks if horizontal else ax.set_xticks)(range(len(groups)), groups)
    ax.set(**axes)
    if horizontal:
        ax.invert_yaxis()  # the first group on top
        figure.legend(loc="outside lower center", ncols=len(shares), fontsize=9)
    else:
        ax.legend(fontsize=9)
    return figure


def intervals(
    panels: Mapping[str, Mapping[str, ArrayLike]], title: str, line: float | None = None
) -> Figure:
    """Runs as dots, with a bar from the lowest to the highest: a panel for each figure, side by side with a
    common list of conditions.

    Args:
        panels: by what is measured, the runs [seeds] of each condition; the conditions are those of the
            first panel, and one that another panel has not got stays empty there.
        title: what was run.
        line: where to draw a vertical line, say at no change.
    """
    names = list(next(iter(panels.values())))
    figure, axes = new_figure(2.0 + 2.6 * len(panels), 1.4 + 0.27 * len(names), columns=len(panels))
    for i, (ax, (label, conditions)) in enumerate(zip(axes, panels.items(), strict=True)):
        for at, name in enumerate(names):
            if name in conditions:
                runs = np.asarray(conditions[name])
                ax.plot([runs.min(), runs.max()], [at, at], color=SKY, linewidth=7, solid_capstyle="butt")
                ax.plot(runs, [at] * len(runs), ".", color=BLACK, markersize=4)
        if line is not None:
            ax.axvline(line, color=GREY, linestyle=":")
        ax.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))  # the first condition on top
        ax.set_yticks(range(len(names)), names if i == 0 else [""] * len(names))
    figure.suptitle(title, fontsize=10)
    return figure


def trajectories(
    paths: Mapping[str, ArrayLike], curvature: tuple[float, float], title: str, turn: float = 0.0
) -> Figure:
    """Paths on the quadratic bowl ½(a u² + b v²), over its contours, one panel each.

    Args:
        paths: by name, points [n, 2].
        curvature: a and b.
        title: what was run.
        turn: angle in radians from the axes x, y to the axes u, v of the bowl.
    """
    figure, panels = small_multiples(list(paths), title, "x", "y", columns=5)
    reach = 1.1 * max(float(np.abs(np.asarray(path)).max()) for path in paths.values())
    x, y = np.meshgrid(*(np.linspace(-reach, reach, 201),) * 2)
    u = math.cos(turn) * x + math.sin(turn) * y
    v = math.cos(turn) * y - math.sin(turn) * x
    heights = (curvature[0] * u**2 + curvature[1] * v**2) / 2
    for ax, path in zip(panels, map(np.asarray, paths.values()), strict=True):
        ax.contour(
            x, y, heights, levels=heights.max() * np.geomspace(1e-4, 1, 9), colors=GREY, linewidths=0.4
        )
        ax.plot(*path.T, color=BLUE, linewidth=0.9, marker=".", markersize=3)
        ax.plot(*path[0], "o", color=ORANGE)
        ax.plot(0, 0, "+", color=BLACK)
    return figure
