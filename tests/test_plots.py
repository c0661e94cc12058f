"""What the figures show: read back from matplotlib's own objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colors
from matplotlib.figure import Figure

from minisign import plots

X = np.array([1.0, 2.0, 3.0])


def drawn(figure: Figure) -> dict[str, Any]:
    """The lines of the first axes by label."""
    return {str(line.get_label()): line for line in figure.axes[0].lines}


def test_every_variant_has_its_own_colour_and_dash() -> None:
    for styles in (list(plots.STYLES.values()), list(plots.OPTIMIZERS.values()), list(plots.CYCLE)):
        assert len({color for color, _ in styles}) == len(styles)
        assert len({str(dash) for _, dash in styles}) == len(styles)


def test_no_two_colours_look_alike_without_red_or_without_green_cones() -> None:
    # From linear RGB to the cones' responses, and what is left of them: Viénot, Brettel and Mollon 1999.
    cones = np.array(
        [[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]]
    )
    without = {
        "red": np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]),
        "green": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
    }
    for styles in (plots.STYLES.values(), plots.OPTIMIZERS.values(), plots.CYCLE):
        linear = np.array([colors.to_rgb(color) for color, _ in styles]) ** 2.2
        for name, blind in without.items():
            seen = np.clip(linear @ (np.linalg.inv(cones) @ blind @ cones).T, 0, 1) ** (1 / 2.2)
            distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
            assert distances[~np.eye(len(seen), dtype=bool)].min() > 0.1, name


def test_curves_shows_what_it_is_given() -> None:
    figure = plots.curves(
        {"tiger": (X, X), "mine": (X, 2 * X)},
        {"theory": (X, 3 * X)},
        {"dots": (X, 4 * X)},
        {"range": (X, 0 * X, 5 * X)},
        xlabel="steps",
        yscale="log",
    )
    lines = drawn(figure)
    assert [list(lines[label].get_ydata()) for label in ("tiger", "mine", "theory", "dots")] == [
        [1, 2, 3],
        [2, 4, 6],
        [3, 6, 9],
        [4, 8, 12],
    ]
    (ax,) = figure.axes
    assert ax.get_xlabel() == "steps"
    assert ax.get_yscale() == "log"
    assert ax.collections[0].get_paths()[0].vertices[:, 1].max() == 15
    assert lines["tiger"].get_color() == plots.STYLES["tiger"][0]
    assert lines["dots"].get_linestyle() == "None"


def test_what_is_no_variant_takes_a_style_that_is_free() -> None:
    lines = drawn(plots.curves(dict.fromkeys(("hybrid", "a", "b", "lazy", "c"), (X, X))))
    used = [lines[name].get_color() for name in ("hybrid", "a", "b", "lazy", "c")]
    assert len(set(used)) == 5


def test_panels_share_axes_and_a_label_keeps_its_style() -> None:
    figure = plots.panels(
        {"left": {"SGD": (X, X), "mine": (X, 2 * X)}, "right": {"mine": (X, 3 * X, X, 5 * X)}},
        "what was run",
        "rate",
        "loss",
        xscale="log",
        ylim=(0, 9),
    )
    left, right = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["left", "right"]
    assert right.get_ylim() == left.get_ylim() == (0, 9)
    assert left.get_xscale() == "log"
    mine, again = left.lines[1], right.lines[0]
    assert list(again.get_ydata()) == [3, 6, 9]
    assert (mine.get_color(), mine.get_linestyle()) == (again.get_color(), again.get_linestyle())
    assert left.lines[0].get_color() == plots.OPTIMIZERS["SGD"][0] != mine.get_color()
    assert len(right.collections) == 1  # the band
    assert not left.collections
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SGD", "mine"]


@pytest.mark.parametrize("curved", [False, True])
def test_an_examination_shows_blocks_components_and_losses(curved: bool) -> None:
    blocks = {
        name: {
            "norm": 0.1,
            "norm_by_batch": [0.1, 0.2],
            "curvature": {"norm": 2.0, "converged": name == "head"} if curved else None,
        }
        for name in ("embedding", "head")
    }
    losses = {"0–50 %": 1.5, "50–100 %": None}
    figure = plots.examination(blocks, {"embedding": X / 3, "head": -X / 3}, losses, "a model")
    assert len(figure.axes) == 3 + curved
    norms, components, tenths = figure.axes[0], *figure.axes[-2:]
    assert [tick.get_text() for tick in norms.get_yticklabels()] == ["embedding", "head"]
    assert [list(line.get_xdata()) for line in norms.lines[:2]] == [[0.1, 0.2], [0.1, 0.2]]
    assert len(components.patches) == 2
    assert [list(x) for x in tenths.lines[0].get_data()] == [[0], [1.5]]
    assert [tick.get_text() for tick in tenths.get_xticklabels()] == list(
        losses
    )  # the empty one keeps its place
    assert norms.get_xlim() == pytest.approx((0.01, 1))  # whole decades
    if curved:
        hollow, full = figure.axes[1].lines
        assert (hollow.get_markerfacecolor(), full.get_markerfacecolor()) == ("none", plots.RED)
        assert [list(line.get_xdata()) for line in (hollow, full)] == [[2.0], [2.0]]


def test_components_beyond_the_bound_count_in_the_last_bin() -> None:
    blocks = {"head": {"norm": 0.1, "norm_by_batch": [0.1], "curvature": None}}
    figure = plots.examination(
        blocks, {"head": np.array([0.0, 5.0, -7.0, 9.0])}, {"0–100 %": 1.0}, "a model"
    )
    [stairs] = figure.axes[1].patches
    values = stairs.get_data().values
    assert (values[0], values[-1], values.sum()) == (0.25, 0.5, 1.0)


@pytest.mark.parametrize("horizontal", [False, True])
def test_bars_in_groups(horizontal: bool) -> None:
    figure = plots.bars({"a": [1, 2], "b": [3, 4]}, ["first", "second"], horizontal, title="T")
    (ax,) = figure.axes
    sizes = [patch.get_width() if horizontal else patch.get_height() for patch in ax.patches]
    assert sizes == [1, 2, 3, 4]
    labels = ax.get_yticklabels() if horizontal else ax.get_xticklabels()
    assert [label.get_text() for label in labels] == ["first", "second"]
    assert len({patch.get_hatch() for patch in ax.patches}) == 2
    assert ax.yaxis_inverted() == horizontal  # the first group on top
    assert ax.get_title() == "T"


def test_intervals_show_every_run_and_the_range() -> None:
    panels = {"loss": {"a": [1.0, 3.0, 2.0], "b": [4.0]}, "time": {"b": [7.0, 5.0]}}
    figure = plots.intervals(panels, "T", line=0.0)
    loss, time = figure.axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 3], [1, 3, 2], [4, 4], [4], [0, 0]]
    assert [list(line.get_xdata()) for line in time.lines] == [[5, 7], [7, 5], [0, 0]]
    assert [set(line.get_ydata()) for line in time.lines[:2]] == [{1}, {1}]  # beside b's name
    assert [label.get_text() for label in loss.get_yticklabels()] == ["a", "b"]
    assert [ax.get_xlabel() for ax in figure.axes] == ["loss", "time"]
    assert loss.yaxis_inverted()


def test_a_density_need_not_have_a_law() -> None:
    figure = plots.densities({"r": ([-1, 1], None)}, np.linspace(-2, 2, 5), "T", "r", top=7)
    (ax,) = figure.axes
    assert not ax.lines
    assert ax.get_ylim() == (0, 7)
    assert ax.get_xlabel() == "r"


def test_histograms_over_time_are_shares_in_their_columns() -> None:
    counts = [[1, 3], [0, 8], [5, 5]]
    figure = plots.histograms_over_time({"first": (X, counts)}, [-1, 0, 1], "T", "r", marks=[2])
    ax = figure.axes[0]
    (mesh,) = ax.collections
    assert np.allclose(mesh.get_array(), [[0.25, 1e-4, 0.5], [0.75, 1, 0.5]])
    assert ax.lines[0].get_xdata() == [2, 2]
    assert ax.get_title() == "first"


def test_phase_maps_write_every_number_in_its_cell() -> None:
    grid = [[0.1, 2.0], [np.inf, np.nan]]
    figure = plots.phase_maps({"post": grid}, ["a", "b"], ["1", "2"], "T", "rate", "ε", "jump", 1.0)
    ax = figure.axes[0]
    found = {text.get_position(): text.get_text() for text in ax.texts}
    assert found == {(0, 0): "0.10", (1, 0): "2.00", (0, 1): "inf", (1, 1): "–"}
    assert np.ma.filled(ax.images[0].get_array(), -1).tolist() == [[0.1, 1.0], [1.0, -1.0]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert not ax.yaxis_inverted()  # the first row at the bottom


def test_densities_are_histograms_with_a_law_over_them() -> None:
    bins = np.linspace(-1, 1, 5)
    figure = plots.densities({"κ = 1": ([-0.9, -0.9, 0.9, 0.9], [1, 2, 2, 1])}, bins, "T")
    ax = figure.axes[0]
    assert [patch.get_height() for patch in ax.patches] == [1, 0, 0, 1]
    assert list(ax.lines[0].get_xdata()) == [-0.75, -0.25, 0.25, 0.75]
    assert list(ax.lines[0].get_ydata()) == [1, 2, 2, 1]


def test_growth_and_its_bound() -> None:
    lines = drawn(plots.growth({"tiger": (X, X / 3)}, {"logistic": (X, X / 2)}, "T"))
    assert list(lines["tiger"].get_ydata()) == pytest.approx([1 / 3, 2 / 3, 1])
    assert list(lines["logistic"].get_ydata()) == [0.5, 1, 1.5]
    assert any(list(line.get_ydata()) == [1, 1] for line in lines.values())


def test_distributions_are_shares_of_the_components() -> None:
    figure = plots.distributions({"tiger": (np.array([0.0, 1.0, 1.0, -1.0]), np.array([0.0]))}, "T")
    stairs = {p.get_label(): p.get_data().values for p in figure.axes[0].patches}
    assert stairs["seen 1 to 3 times"].max() == 0.5
    assert stairs["seen > 200 times"].sum() == 1


def test_rows_by_frequency_has_room_for_tokens_never_seen() -> None:
    figure = plots.rows_by_frequency({"lazy": (np.array([0, 10]), np.array([0.5, 0.1]))}, "T")
    offsets = np.asarray(figure.axes[0].collections[0].get_offsets())
    assert offsets.tolist() == [[0.5, 0.5], [10.5, 0.1]]


def test_trajectories_begin_and_end_where_they_should() -> None:
    path = np.array([[1.0, 2.0], [0.5, 1.0], [0.0, 0.0]])
    figure = plots.trajectories({"SGD": path, "Lion": path / 2}, (1.0, 100.0), "T")
    assert [ax.get_title() for ax in figure.axes if ax.get_visible()] == ["SGD", "Lion"]
    line, start, goal = figure.axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), path)
    assert start.get_xydata().tolist() == [[1, 2]]
    assert goal.get_xydata().tolist() == [[0, 0]]


def test_a_saved_figure_has_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plots.save(plots.curves({"tiger": (X, X)}), tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
    assert first.startswith(b"\x89PNG")
