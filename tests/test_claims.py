"""The main job at full size: what the README says it shows. A minute for each variant, on one core."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from once import Once

from minisign.studies.reproduce import reproduce

pytestmark = pytest.mark.trained


def result(variant: str, once: Once) -> dict[str, Any]:
    """The figures of a variant, and the largest share of the bound that an entry had at any step."""

    def make(folder: Path) -> None:
        (run,) = reproduce((variant,))
        (folder / "result.json").write_text(json.dumps({**run.result, "highest": max(run.share)}))

    return json.loads((once(f"reproduce {variant}", make) / "result.json").read_text())


def test_tiger_runs_to_the_bound_and_not_beyond(once: Once) -> None:
    tiger = result("tiger", once)
    assert tiger["bound"] == 100
    assert 95 <= tiger["embedding_max"] <= 100
    assert -100 <= tiger["embedding_min"] <= -95
    assert tiger["highest"] <= 1  # at no step
    assert tiger["rare_saturated"] >= 0.15
    assert tiger["frequent_saturated"] < 0.01


def test_lion_reaches_its_own_bound(once: Once) -> None:
    lion = result("lion", once)
    assert 0.9 * lion["bound"] <= lion["embedding_max"] <= lion["bound"]
    assert lion["highest"] <= 1


@pytest.mark.parametrize("cure", ["lazy", "hybrid", "adamw"])
def test_cures_leave_nothing_near_the_bound(cure: str, once: Once) -> None:
    found = result(cure, once)
    assert found["rare_saturated"] == 0
    assert found["frequent_saturated"] == 0


def test_the_loss_does_not_tell(once: Once) -> None:
    """The run that blew up has the better one. (By 0.12 with a spread of 0.035 over rounding, so that how
    much better is not claimed.)"""
    assert result("tiger", once)["val_loss"] < result("lazy", once)["val_loss"]
