"""Searches of learning rates: equal budgets, what a run leaves, and what is read of many."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from minisign.lab.build import load_tokens
from minisign.lab.config import Config
from minisign.lab.corpus import CorpusConfig
from minisign.lab.tokenizer import Tokens
from minisign.lab.train import validation_loss
from minisign.probes import common_mode
from minisign.studies.search import (
    CONTENDERS,
    best_rate,
    losses_by_rate,
    norm_config,
    norm_rates,
    rate_curve,
    search_base,
    search_config,
    search_run,
    start_batches,
    start_figures,
)

SMALL: dict[str, Any] = dict(
    corpus=CorpusConfig(words=4000),
    vocab_size=300,
    context=8,
    batch=4,
    layers=2,
    heads=2,
    width=16,
    steps=45,
    warmup=3,
)


@pytest.fixture(scope="module")
def base() -> Config:
    return dataclasses.replace(search_base(), **SMALL)


@pytest.fixture(scope="module")
def tokens(base: Config) -> Tokens:
    return load_tokens(base)


def line(label: str, lr: float, val_loss: float | None) -> dict[str, Any]:
    return {"job": {"label": label, "config": {"lr": lr}}, "figures": {"val_loss": val_loss}}


def test_every_contender_has_the_same_budget() -> None:
    for contender in CONTENDERS.values():
        rates = contender.rates
        assert len(rates) == 9
        assert np.allclose(np.diff(np.log2(rates)), 1)
    for label in ("SGD", "Signum"):
        assert len(norm_rates(label)) == 9
        assert np.allclose(np.diff(np.log2(norm_rates(label))), 1)


def test_contenders_differ_in_the_optimizer_alone() -> None:
    base = search_base(seed=3)
    for label, contender in CONTENDERS.items():
        config = search_config(base, label, 0.5)
        assert (config.lr, config.betas, config.weight_decay, config.seed) == (0.5, contender.betas, 0.0, 3)
        differ = {k for k, v in config.to_json().items() if v != base.to_json()[k]}
        assert differ <= {"lr", "betas", "optimizer"}
    with pytest.raises(ValueError, match=r"unknown contender 'adam': choose from SGD, SGD, momentum"):
        search_config(base, "adam", 0.5)


def test_a_run_is_measured(base: Config, tokens: Tokens) -> None:
    config = search_config(base, "Signum", 1e-3)
    run, found = search_run(config, tokens)
    assert not found["diverged"]
    assert found["val_loss"] == pytest.approx(validation_loss(run))
    assert len(found["curve"]) == 3  # 45 steps by twenties
    assert found["curve"][2] == pytest.approx(np.mean(run.losses[40:]), abs=1e-4)
    assert len(found["groups"]) == 10
    weights = run.model.head.weight
    assert found["head_norm"] == pytest.approx(float(weights.norm().item()))
    assert found["head_common"] == pytest.approx(common_mode(weights))


def test_a_run_that_diverges_is_told_and_not_lost(base: Config, tokens: Tokens) -> None:
    _, found = search_run(search_config(base, "SGD", 1e6), tokens)
    assert found["diverged"]
    assert found["val_loss"] is None
    assert found["curve"][-1] is None or math.isfinite(found["curve"][-1])


def test_losses_are_sorted_by_rate_with_seeds_side_by_side() -> None:
    log = [
        line("a", 0.2, 3.0),
        line("a", 0.1, 4.0),
        line("b", 0.1, 9.0),
        line("a", 0.2, None),
        line("a", 0.1, 5.0),
    ]
    rates, losses = losses_by_rate(log, "a")
    assert rates.tolist() == [0.1, 0.2]
    assert losses.tolist() == [[4, 5], [3, np.inf]]
    rates, mean, low, high = rate_curve(log, "a")
    assert (mean.tolist(), low.tolist(), high.tolist()) == ([4.5, 11.5], [4, 3], [5, 20])
    with pytest.raises(ValueError, match=r"no run with label 'c': \['a', 'b'\]"):
        losses_by_rate(log, "c")


def test_the_best_rate_lies_inside_the_search() -> None:
    log = [line("a", lr, loss) for lr, loss in ((1.0, 5.0), (2.0, 3.0), (4.0, 4.0), (8.0, None))]
    assert best_rate(log, "a") == 2
    for edge in (0.5, 16.0):
        with pytest.raises(ValueError, match=f"best rate of 'a', {edge:g}, is at the edge of the search"):
            best_rate([*log, line("a", edge, 1.0)], "a")
    # A rate at which one seed diverges is not the best.
    second = [line("a", lr, loss) for lr, loss in ((1.0, 5.0), (2.0, None), (4.0, 4.2), (8.0, None))]
    assert best_rate([*log, *second], "a") == 4
    with pytest.raises(ValueError, match="the rates of 'a' have 1 to 2 runs: is the log complete"):
        best_rate([*log, *second[:3]], "a")


def test_batches_for_the_start_are_none_of_the_runs(base: Config, tokens: Tokens) -> None:
    batches = start_batches(base, tokens)
    assert [tuple(b.shape) for b in batches] == [(4, 9)] * 4
    assert np.array_equal(batches[1].numpy(), tokens.batch(base.seed, 46, 4, 8))


def test_figures_of_the_start(tokens: Tokens) -> None:
    config = dataclasses.replace(norm_config("post", 4, seed=1), **SMALL, init="xavier")
    assert (config.norm, norm_config("post", 4).layers, norm_config("post", 4).init) == (
        "post",
        4,
        "xavier",
    )
    found = start_figures(config, tokens)
    assert list(found["norm"]) == ["embedding", "position", "blocks.0", "blocks.1", "head"]
    assert found["ratio"] == pytest.approx(found["norm"]["blocks.1"] / found["norm"]["blocks.0"])
    assert found["curvature"].keys() == found["norm"].keys()
    squares = {name: norm**2 for name, norm in found["norm"].items()}
    expected = sum(squares[n] * found["curvature"][n] for n in squares) / sum(squares.values())
    assert found["lambda_g"] == pytest.approx(expected)
    assert found["between layers"] != found["between tensors"]
