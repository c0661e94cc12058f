"""Figures of one thing each: what ``minisign reproduce``, ``probe`` and ``inspect`` leave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import ArrayLike

from minisign.plots.style import (
    BLACK,
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    RED,
    SKY,
    new_figure,
    small_multiples,
    styles,
)


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
    for (name, (steps, share)), (color, dash) in zip(curves.items(), styles(curves), strict=True):
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
    figure, panels = small_multiples(list(rows), title, "component / bound (1/λ)", "share of components")
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
    figure, panels = small_multiples(
        list(rows), title, "times seen in training + ½", "row RMS / bound (1/λ)"
    )
    for ax, (counts, sizes), (color, _) in zip(panels, rows.values(), styles(rows), strict=True):
        ax.scatter(np.asarray(counts) + 0.5, sizes, s=3, color=color, alpha=0.35, linewidths=0)
        ax.axhline(1.0, color=GREY, linewidth=0.8)
        ax.set(xscale="log", yscale="log")
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
        found: at most six :class:`~minisign.doctor.bound.Inspection`.
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
