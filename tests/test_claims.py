"""The main job at full size: what the README says it shows. Three to six minutes on two cores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minisign.reproduce import reproduce


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    torch.set_num_threads(2)
    runs = reproduce(("tiger", "lion", "lazy", "hybrid", "adamw"))
    torch.set_num_threads(1)
    return {run.result["variant"]: {**run.result, "highest": max(run.share)} for run in runs}


def test_tiger_runs_to_the_bound_and_not_beyond(results: dict[str, Any]) -> None:
    tiger = results["tiger"]
    assert tiger["bound"] == 100
    assert 95 <= tiger["embedding_max"] <= 100
    assert -100 <= tiger["embedding_min"] <= -95
    assert tiger["highest"] <= 1  # at no step
    assert tiger["rare_saturated"] >= 0.15
    assert tiger["frequent_saturated"] < 0.01


def test_lion_reaches_its_own_bound(results: dict[str, Any]) -> None:
    lion = results["lion"]
    assert 0.9 * lion["bound"] <= lion["embedding_max"] <= lion["bound"]
    assert lion["highest"] <= 1


@pytest.mark.parametrize("cure", ["lazy", "hybrid", "adamw"])
def test_cures_leave_nothing_near_the_bound(results: dict[str, Any], cure: str) -> None:
    assert results[cure]["rare_saturated"] == 0
    assert results[cure]["frequent_saturated"] == 0


def test_the_loss_does_not_tell(results: dict[str, Any]) -> None:
    assert abs(results["tiger"]["val_loss"] - results["lazy"]["val_loss"]) <= 0.2
