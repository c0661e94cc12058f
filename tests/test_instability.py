"""The runs of notebooks 12 and 13: their configurations, the jump, the stage and the remedies."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from minisign.lab.build import load_tokens
from minisign.lab.config import Config
from minisign.lab.tokenizer import Tokens
from minisign.lab.train import Run, train
from minisign.probes import layer_blocks
from minisign.studies.instability import (
    REMEDIES,
    Stage,
    bell_config,
    bell_figures,
    bell_run,
    deep_config,
    guarded_figures,
    remedy_figures,
    remedy_run,
    run_figures,
    stage_config,
    watched_run,
    worst_jump,
)

FEW = {"layers": 2, "width": 16, "batch": 4, "vocab_size": 300}


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return load_tokens(small())


def small(**changes: object) -> Config:
    return dataclasses.replace(stage_config(), **{**FEW, "steps": 90, **changes})  # type: ignore[arg-type]


def test_a_jump_is_the_largest_rise_above_an_earlier_mean() -> None:
    losses = [9.0] * 50 + [3.5] * 20 + [3.0] * 20 + [4.0] * 20 + [2.0] * 30 + [2.5] * 30
    jump = worst_jump(losses)
    assert jump.size == pytest.approx(1.0)
    assert 70 <= jump.low < 90 <= jump.high < 110
    assert worst_jump(np.linspace(5, 3, 200).tolist()).size == 0
    assert worst_jump(losses, window=1).size == pytest.approx(1.0)


def test_a_loss_that_is_not_finite_is_an_infinite_jump() -> None:
    jump = worst_jump([3.0] * 70 + [math.nan] + [3.0] * 20)
    assert (jump.size, jump.low, jump.high) == (math.inf, 69, 70)


def test_a_jump_needs_enough_losses() -> None:
    with pytest.raises(ValueError, match="a jump needs 60 losses or more, got 59"):
        worst_jump([1.0] * 59)


def test_the_runs_are_what_their_labels_say() -> None:
    assert (deep_config().norm, deep_config().layers, deep_config().batch) == ("post", 6, 64)
    assert deep_config(3, norm="pre", lr=0.5).lr == 0.5
    assert deep_config(3).seed == 3
    assert bell_config(betas=(0.9, 0.999)).betas == (0.9, 0.999)
    for label, (changes, _) in REMEDIES.items():
        assert stage_config(**changes).steps == 320, label


@pytest.mark.trained
def test_figures_of_a_run(tokens: Tokens) -> None:
    figures = run_figures(small(), tokens)
    assert not figures["diverged"]
    assert len(figures["curve"]) == 9
    assert set(figures["first"]) >= {"std", "correlation", "gradient", "below_eps", "descent"}
    assert all(len(series) == 9 for series in figures["first"].values())
    assert figures["jump"]["low"] < figures["jump"]["high"]
    assert figures["val_loss"] < figures["curve"][0]


def test_a_run_that_diverges_has_no_figures_but_its_curve(tokens: Tokens) -> None:
    figures = run_figures(small(optimizer="adamw", lr=1e30, warmup=0), tokens)
    assert figures["diverged"]
    assert figures["jump"]["size"] is None
    assert figures["val_loss"] is None


def test_the_stage_is_quiet_then_loud_in_the_first_layer_only(tokens: Tokens) -> None:
    stage = Stage(quiet=3, hush=1e-3, burst=5, length=2, loud=100.0)
    gradients: dict[str, list[torch.Tensor]] = {"blocks.0": [], "blocks.1": []}
    run = Run(small(steps=9, lr=1e-9), tokens)  # the weights all but stay

    def note(loss: torch.Tensor) -> bool:
        for name, found in gradients.items():
            grads = [p.grad.flatten() for p in layer_blocks(run.model)[name] if p.grad is not None]
            found.append(torch.cat(grads).clone())
        return True

    stage.set_up(run)
    train(run, may_step=note)
    sizes = {name: [float(g.norm()) for g in found] for name, found in gradients.items()}
    usual = np.mean(sizes["blocks.0"][:3] + sizes["blocks.0"][7:])
    assert sizes["blocks.0"][3:5] == pytest.approx([usual * 1e-3] * 2, rel=0.5)
    assert sizes["blocks.0"][5:7] == pytest.approx([usual * 100] * 2, rel=0.5)
    assert torch.equal(gradients["blocks.0"][5], gradients["blocks.0"][6])
    assert max(sizes["blocks.1"]) < 2 * min(sizes["blocks.1"])


def test_clipping_comes_after_the_stage(tokens: Tokens) -> None:
    run = Run(small(steps=6, clip=0.25, warmup=0), tokens)
    Stage(quiet=2, burst=3, length=2).set_up(run)
    norms = []

    def note(loss: torch.Tensor) -> bool:
        norms.append(float(torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm()))  # type: ignore[union-attr]
        return True

    train(run, may_step=note)
    assert max(norms) == pytest.approx(0.25, rel=1e-3)


def test_a_fixed_batch_is_always_the_same(tokens: Tokens) -> None:
    config = small(lr=1e-9, steps=20)
    fixed, drawn = (bell_figures(bell_run(config, tokens, fixed)[1]) for fixed in (True, False))
    assert fixed["blocks.0"]["correlation"] > 0.999
    assert drawn["blocks.0"]["correlation"] < 0.9


def test_a_remedy_is_called_by_its_name(tokens: Tokens) -> None:
    with pytest.raises(ValueError, match="unknown remedy 'prayer': choose from none"):
        remedy_run("prayer", tokens)


@pytest.mark.trained
def test_figures_of_a_remedy(monkeypatch: pytest.MonkeyPatch, tokens: Tokens) -> None:
    monkeypatch.setattr(
        "minisign.studies.instability.stage_config", lambda seed, **changes: small(steps=200, seed=seed)
    )
    stage = Stage(quiet=120, burst=150, length=3)
    (none, _), (skipped, guard) = (remedy_run(label, tokens, 0, stage) for label in ("none", "ratio: skip"))
    assert guard is not None
    found = remedy_figures(skipped, guard, stage)
    assert (found["first"], found["events"]) == (150, 3)
    assert {event.action for event in guard.events} == {"skip"}
    assert remedy_figures(none, None, stage)["events"] == 0
    assert found["after"] == pytest.approx(np.mean(skipped.losses[153:183]))


def test_a_watched_run_is_the_run(tokens: Tokens) -> None:
    run, watch = watched_run(small(steps=60), tokens)
    assert list(watch.steps) == [0, 10, 20, 30, 40, 50]
    assert run.losses == train(Run(small(steps=60), tokens)).losses


@pytest.mark.trained
def test_what_a_guard_notes_in_a_run_in_which_nothing_happens(tokens: Tokens) -> None:
    config = small(steps=130)
    found = guarded_figures(config, tokens)
    losses = train(Run(config, tokens)).losses
    assert found["top"] == max(losses[100:])
    assert losses[found["top_step"]] == found["top"]
    assert (found["ratio"], found["loss"], found["events"]) == (None, None, 0)
