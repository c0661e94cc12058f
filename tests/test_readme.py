"""The README's figures that come from committed logs are the logs'."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from mutants import MUTANTS

from minisign.experiment import figures, read_log, saturated

README = (Path(__file__).parent.parent / "README.md").read_text()
FIXES = {
    "none (Tiger)": "tiger",
    "lazy rows": "lazy",
    "tied": "tied",
    "half-swap": "half_swap",
    "half-swap, centered head": "half_swap, centered",
    "hybrid": "hybrid",
    "AdamW for all": "adamw",
}


@pytest.mark.parametrize("name", FIXES)
def test_table_of_fixes(name: str) -> None:
    log, label = read_log("fixes"), FIXES[name]

    def runs(size: str, figure: str) -> np.ndarray:
        return figures(log, f"{size}: {label}", figure)

    def near(size: str) -> str:
        share = saturated(log, f"{size}: {label}")
        percent = f"{share.mean():.0%}".replace("%", " %") if share.mean() > 0.001 else "< 0.1 %"
        return percent if share.max() > 0 else "0"

    def loss(size: str) -> str:
        values = runs(size, "val_loss")
        return f"{values.mean():.2f} ({values.min():.2f}–{values.max():.2f})"

    memory = runs("main", "state_bytes")[0] / figures(log, "main: tiger", "state_bytes")[0]
    cells = [name, f"{near('lesson')} / {near('main')}", loss("lesson"), loss("main"), f"{memory:.2f}"]
    assert f"| {' | '.join(cells)} |" in README.splitlines()


def test_figures_of_fine_tuning_and_repair() -> None:
    log = read_log("fixes")
    after = {
        name: figures(log, f"main: {name}", "second/after/mean").mean()
        for name in ("tiger", "from scratch", "hybrid", "adamw")
    }
    text = " ".join(README.split())
    assert (
        f"ends at {after['tiger']:.2f}, worse than an untrained one ({after['from scratch']:.2f})" in text
    )
    assert f"with the hybrid it ends at {after['hybrid']:.2f}, with AdamW at {after['adamw']:.2f}" in text


def test_figures_of_the_centered_head() -> None:
    log = read_log("tying")
    share: dict[bool, list[float]] = {True: [], False: []}
    for label in {line["job"]["label"] for line in log}:
        if re.match(r"(tied|half_swap), base", label):
            share["centered" in label] += saturated(log, label).tolist()
    text = " ".join(README.split())
    assert f"at most {max(share[True]):.0%} come near the bound".replace("%", " %") in text
    assert f"without, at least {min(share[False]):.0%} in the base form".replace("%", " %") in text


def test_number_of_mutants() -> None:
    assert f"`make mutants` plants {len(MUTANTS)} bugs" in README
