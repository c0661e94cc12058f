"""Figures from plain numbers. Nothing here trains or measures.

Colours are those of Okabe and Ito (2008), which readers with any colour sense tell apart, and every
line has its own dash as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
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


def _styles(labels: Iterable[str]) -> list[tuple[str, Any]]:
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


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG at 150 dots an inch, the same bytes for the same figure."""
    with matplotlib.rc_context({"svg.hashsalt": "minisign"}):
        figure.savefig(path, dpi=150, format="png", metadata={"Software": None})


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
    for (label, (x, y)), (color, dash) in zip(measured.items(), _styles(measured), strict=True):
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
    figure, drawn = _small_multiples(list(lines), title, xlabel, ylabel, columns)
    labels = list(dict.fromkeys(label for panel in lines.values() for label in panel))
    style = dict(zip(labels, _styles(labels), strict=True))
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
    figure, axes = _small_multiples(list(panels), title, xlabel, "density", columns=5)
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
    figure, axes = _small_multiples(list(panels), title, "step", ylabel, columns=2)
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
    figure, axes = _small_multiples(list(panels), title, xlabel, ylabel, columns=2)
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
    for i, ((label, values), (color, _)) in enumerate(zip(shares.items(), _styles(shares), strict=True)):
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
    for (name, (steps, share)), (color, dash) in zip(curves.items(), _styles(curves), strict=True):
        ax.plot(steps, share, label=name, linewidth=1.8, color=color, linestyle=dash)
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


def distributions(rows: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str) -> Figure:
    """Histograms of the components of rare and of frequent tokens' embeddings, in units of the bound.

    Args:
        rows: by variant, components·λ of rare rows [n] and of frequent rows [m].
        title: what was run.
    """
    figure, panels = _small_multiples(list(rows), title, "component / bound (1/λ)", "share of components")
    bins = np.linspace(-1.05, 1.05, 43)
    for ax, (rare, frequent) in zip(panels, rows.values(), strict=True):
        for values, color, dash, label in (
            (np.asarray(frequent), BLUE, "--", "seen > 200 times"),
            (np.asarray(rare), RED, "-", "seen 1 to 3 times"),
        ):
            if values.size:
                share = np.histogram(values, bins)[0] / values.size
                ax.stairs(share, bins, color=color, linestyle=dash, linewidth=1.4, label=label)
        ax.set(yscale="log", ylim=(3e-6, 3))
    if panels[0].get_legend_handles_labels()[1]:
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
        )
    return figure


def rows_by_frequency(rows: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str) -> Figure:
    """RMS of each token's row against how often the token was seen.

    Args:
        rows: by variant, counts [V] and row RMS·λ [V].
        title: what was run.
    """
    figure, panels = _small_multiples(
        list(rows), title, "times seen in training + ½", "row RMS / bound (1/λ)"
    )
    for ax, (counts, sizes), (color, _) in zip(panels, rows.values(), _styles(rows), strict=True):
        ax.scatter(np.asarray(counts) + 0.5, sizes, s=3, color=color, alpha=0.35, linewidths=0)
        ax.axhline(1.0, color=GREY, linewidth=0.8)
        ax.set(xscale="log", yscale="log")
    return figure


def _small_multiples(
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
    figure, panels = _small_multiples(list(paths), title, "x", "y", columns=5)
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


def examination(
    blocks: Mapping[str, Mapping[str, Any]],
    components: Mapping[str, ArrayLike],
    losses: Mapping[str, float | None],
    title: str,
) -> Figure:
    """What ``minisign probe`` found: norms by block, the matrices' components, losses by frequency.

    Args:
        blocks: by name, ``norm``, ``norm_by_batch`` and perhaps ``curvature`` with its ``norm`` and whether
            it has ``converged``; a norm of zero is not drawn.
        components: by matrix, entries over its bound [n].
        losses: by tenth of the text, in nats; None where there was nothing to predict.
        title: what was measured.
    """
    names = list(blocks)
    curved = any(block["curvature"] for block in blocks.values())
    height = min(16.0, max(3.6, 1.3 + 0.2 * len(names)))
    figure, axes = new_figure(13.5, height, columns=4 if curved else 3)
    at = np.arange(len(names))
    norms = axes[0]
    for i, block in enumerate(blocks.values()):
        norms.plot(block["norm_by_batch"], [i] * len(block["norm_by_batch"]), ".", color=SKY, markersize=4)
    norms.plot([block["norm"] for block in blocks.values()], at, "o", color=BLUE, markersize=4)
    norms.set(xlabel="gradient norm (pale: single batches)", xscale="log")
    norms.set_yticks(at, names, fontsize=min(7.0, 60 * height / len(names)))
    norms.invert_yaxis()  # the input on top
    every = [norm for block in blocks.values() for norm in (block["norm"], *block["norm_by_batch"])]
    if drawn := [math.log10(norm) for norm in every if norm]:  # whole decades, so that ticks have labels
        norms.set_xlim(10.0 ** math.floor(min(drawn) - 0.05), 10.0 ** math.ceil(max(drawn) + 0.05))
    norms.xaxis.set_minor_formatter(NullFormatter())
    if curved:
        for i, block in enumerate(blocks.values()):
            fill = RED if block["curvature"]["converged"] else "none"
            axes[1].plot(block["curvature"]["norm"], i, "s", color=RED, markerfacecolor=fill, markersize=4)
        axes[1].set(xlabel="curvature ‖H‖ (hollow: not converged)", xscale="log", ylim=norms.get_ylim())
        axes[1].set_yticks(at, [""] * len(names))
    sizes, tenths = axes[-2:]
    edges = np.linspace(-1.05, 1.05, 43)
    for (name, values), (color, dash) in zip(components.items(), CYCLE, strict=False):
        inside = np.clip(np.asarray(values), edges[0], edges[-1])  # what is beyond counts in the last bin
        share = np.histogram(inside, edges)[0] / inside.size
        sizes.stairs(share, edges, color=color, linestyle=dash, label=name)
    sizes.set(xlabel="component / bound", ylabel="share of components", yscale="log", ylim=(1e-6, 2))
    sizes.legend(fontsize=8)
    shown = {i: value for i, value in enumerate(losses.values()) if value is not None}
    tenths.plot(list(shown), list(shown.values()), "D", color=GREEN, markersize=5)
    tenths.set_xticks(range(len(losses)), list(losses), rotation=60, fontsize=7)
    tenths.set(xlabel="tenth of the text, rarest last", ylabel="loss, nats")
    for ax in axes:
        ax.xaxis.label.set_fontsize(8)
    figure.suptitle(title, fontsize=10)
    return figure


def inspections(found: Sequence[Any], title: str) -> Figure:
    """What ``minisign inspect`` found: for each matrix its components, and the RMS of its rows by token id.

    Args:
        found: at most six :class:`~minisign.inspection.Inspection`.
        title: what was inspected.
    """
    figure = Figure(figsize=(11, 0.6 + 2.9 * len(found)), layout="constrained")
    for (left, right), one in zip(figure.subplots(len(found), 2, squeeze=False), found, strict=True):
        edges = np.linspace(-one.reach, one.reach, len(one.counts) + 1)
        left.stairs(one.counts, edges, color=BLUE, label="all rows")
        if one.saturated:
            left.stairs(one.counts_at_bound, edges, color=RED, linestyle="--", label="rows at the bound")
        if one.bound is not None:
            how = "1/λ" if one.bound_is == "1/λ" else "the spike"
            for sign in (-1, 1):
                label = f"±{one.bound:.4g}, {how}" if sign > 0 else None
                left.axvline(sign * one.bound, color=BLACK, linestyle=":", linewidth=1, label=label)
        left.set(yscale="log", ylim=(0.7, None), xlabel="component", ylabel="how many")
        left.legend(fontsize=7, loc="lower center")
        ids = np.arange(len(one.row_rms))
        for rows, color, marker, label in (
            (~one.rows, BLUE, ".", "healthy"),
            (one.rows, RED, "x", "at the bound"),
        ):
            if rows.any():
                size = float(np.clip(3e4 / len(ids), 1, 6))
                right.plot(ids[rows], one.row_rms[rows], marker, color=color, markersize=size, label=label)
                right.lines[-1].set_rasterized(True)
        if (one.row_rms > 0).any():
            right.set(yscale="log")
        right.set(xlabel="row (token id)", ylabel="RMS of the row")
        right.legend(fontsize=7)
        left.set_title(f"{one.name} [{one.shape[0]:,} × {one.shape[1]:,}]", fontsize=9)
        right.set_title("saturated" if one.saturated else "healthy", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure
