"""The update ratio: that it is what the optimizers do, its figures, its watch, and the theory of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minisign import AdamW, Hybrid, Lion, Signum, Tiger, theory
from minisign.probes import (
    EDGES,
    Update,
    UpdateWatch,
    coming_update,
    coming_updates,
    descent_cosine,
    update_figures,
)

LR = 0.01
Build = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "torch Adam": lambda ps: torch.optim.Adam(ps, lr=LR, eps=1e-3),
    "torch Adam, coupled decay": lambda ps: torch.optim.Adam(ps, lr=LR, weight_decay=0.3),
    "torch AdamW, other betas": lambda ps: torch.optim.AdamW(ps, lr=LR, betas=(0.5, 0.9), weight_decay=0),
    "torch AdamW, amsgrad": lambda ps: torch.optim.AdamW(ps, lr=LR, amsgrad=True, weight_decay=0),
    "torch AdamW, maximize": lambda ps: torch.optim.AdamW(ps, lr=LR, maximize=True, weight_decay=0),
    "torch AdamW, foreach": lambda ps: torch.optim.AdamW(ps, lr=LR, foreach=True, weight_decay=0),
    "AdamW": lambda ps: AdamW(ps, lr=LR, eps=1e-3, weight_decay=0.0),
    "AdamW, lazy": lambda ps: AdamW(ps, lr=LR, weight_decay=0.0, lazy="grad"),
    "Lion": lambda ps: Lion(ps, lr=LR, betas=(0.6, 0.99)),
    "Tiger": lambda ps: Tiger(ps, lr=LR, beta=0.5, weight_decay=0.0, scale=1.0),
    "Signum": lambda ps: Signum(ps, lr=LR, beta=0.5),
    "Hybrid": lambda ps: Hybrid(AdamW(ps[:1], lr=LR, weight_decay=0.0), Lion(ps[1:], lr=LR)),
}


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 3), (4, 2))
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    found = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64) * 10.0**-step for p in parameters()
    ]
    found[0][step] = 0  # a row without a gradient, another one each time
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_coming_update_is_the_one_that_comes(name: str) -> None:
    ps = parameters()
    optimizer = OPTIMIZERS[name](ps)
    sign = -1.0 if "maximize" in name else 1.0
    for step in range(4):
        for p, g in zip(ps, gradients(step), strict=True):
            p.grad = g
        state = {id(p): {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()} for p in ps}
        updates = [coming_update(optimizer, p) for p in ps]
        for p in ps:
            for key, value in optimizer.state[p].items():
                assert torch.equal(torch.as_tensor(value), state[id(p)][key]), "the state was changed"
        before = [p.detach().clone() for p in ps]
        optimizer.step()
        for p, update, b, g in zip(ps, updates, before, gradients(step), strict=True):
            made = ((b - p.detach()) / LR).flatten()
            torch.testing.assert_close(update.ratio, made, rtol=1e-9, atol=1e-11)
            coupled = 0.3 * b if "coupled" in name else 0.0
            torch.testing.assert_close(update.gradient, (sign * g + coupled).flatten())


def test_sizes_are_those_of_the_second_moment() -> None:
    (p, _), beta2 = parameters(), 0.9
    optimizer = torch.optim.AdamW([p], lr=LR, betas=(0.5, beta2), eps=1e-4)
    for step in range(3):
        p.grad = gradients(step)[0]
        update = coming_update(optimizer, p)
        optimizer.step()
        expected = (optimizer.state[p]["exp_avg_sq"] / (1 - beta2 ** (step + 1))).sqrt().flatten()
        assert update.size is not None
        torch.testing.assert_close(update.size, expected)
        assert update.eps == 1e-4


def test_sparse_gradients_leave_absent_rows_alone() -> None:
    table = nn.Embedding(6, 2, sparse=True)
    optimizer = AdamW(table.parameters(), lr=LR, weight_decay=0.0)
    for ids in ([0, 3], [3, 3, 5], [0, 1]):
        table.zero_grad()
        table(torch.tensor(ids)).square().sum().backward()
        update, before = coming_update(optimizer, table.weight), table.weight.detach().clone()
        optimizer.step()
        made = ((before - table.weight.detach()) / LR).flatten()
        torch.testing.assert_close(update.ratio, made, rtol=1e-4, atol=1e-5)


def test_a_parameter_without_a_gradient_has_no_update() -> None:
    p, q = parameters()
    optimizer = AdamW([p, q], lr=LR)
    p.grad = gradients(0)[0]
    optimizer.step()
    p.grad = None
    assert not coming_update(optimizer, p).ratio.any()
    assert not coming_update(optimizer, q).ratio.any()


def test_of_a_large_tensor_some_entries_of_every_column() -> None:
    p = nn.Parameter(torch.zeros(100, 8))
    p.grad = torch.arange(800.0).view(100, 8)
    update = coming_update(AdamW([p], lr=LR), p, entries=100)
    assert 80 < len(update.gradient) <= 100
    assert len(set((update.gradient % 8).tolist())) == 8
    assert len(coming_update(AdamW([p], lr=LR), p, entries=800).gradient) == 800


def test_blocks_are_joined_in_order_and_groups_kept_apart() -> None:
    p, q = parameters()
    optimizer = torch.optim.AdamW([{"params": [p], "betas": (0.5, 0.9)}, {"params": [q]}], lr=LR)
    p.grad, q.grad = gradients(1)
    optimizer.step()
    p.grad, q.grad = gradients(2)
    joined = coming_updates(optimizer, {"both": [q, p]})["both"]
    expected = [coming_update(optimizer, x).ratio for x in (q, p)]
    assert torch.equal(joined.ratio, torch.cat(expected))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda ps: torch.optim.SGD(ps, lr=LR, momentum=0.9), r"SGD has no update ratio.*momentum=0.9"),
        (lambda ps: torch.optim.NAdam(ps), "NAdam has no update ratio"),
        (lambda ps: torch.optim.RMSprop(ps), "RMSprop has no update ratio"),
        (lambda ps: Tiger(ps, lr=LR, accumulate=2), r"Tiger has no update ratio.*accumulate=2"),
    ],
)
def test_optimizers_without_a_ratio_are_refused(build: Build, message: str) -> None:
    ps = parameters()
    optimizer = build(ps)
    with pytest.raises(ValueError, match=message):
        coming_update(optimizer, ps[0])
    with pytest.raises(ValueError, match=message):
        UpdateWatch(nn.ParameterList(ps), optimizer)


def test_a_tensor_of_another_model_is_refused() -> None:
    p, q = parameters()
    with pytest.raises(ValueError, match="the other is not among the optimizer's parameters"):
        coming_updates(AdamW([p]), {"the other": [q]})


# --- figures --------------------------------------------------------------------------------------


def update(
    ratio: Tensor, gradient: Tensor | None = None, size: Tensor | None = None, eps: float = 0
) -> Update:
    return Update(torch.ones_like(ratio) if gradient is None else gradient, ratio, size, eps)


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_figures_of_a_bell_and_of_two_modes() -> None:
    bell = update_figures(update(0.229 * normal(200_000)))
    assert bell.std == pytest.approx(0.229, rel=0.01)
    assert bell.bimodality == pytest.approx(1 / 3, rel=0.02)
    assert bell.beyond == pytest.approx(math.erfc(0.8 / 0.229 / 2**0.5), rel=0.3)
    flat = update_figures(update(torch.linspace(-1, 1, 10_001)))
    assert flat.bimodality == pytest.approx(5 / 9, rel=1e-3)
    assert flat.beyond == pytest.approx(0.2, abs=1e-3)
    modes = update_figures(update(normal(1000).sign()))
    assert modes.bimodality == pytest.approx(1.0)
    assert modes.beyond == 1.0


def test_bimodality_does_not_depend_on_the_scale_of_r() -> None:
    for scale in (1.0, 1e-8, 1e-15):
        assert update_figures(update(scale * normal(10_000).sign())).bimodality == pytest.approx(1.0)
    assert math.isnan(update_figures(update(torch.zeros(5))).bimodality)


def test_the_histogram_counts_every_entry_in_its_bin() -> None:
    values = torch.tensor([-9.0, -1.0, -0.02, 0.0, 0.02, 0.81, 1.3, 4.0])
    counts = update_figures(update(values)).counts
    assert counts.sum() == len(values)
    expected = np.histogram(values.clamp(-1.5, 1.5).numpy(), EDGES)[0]
    assert counts.tolist() == expected.tolist()
    assert (counts[0], counts[30], counts[-1]) == (1, 3, 1)


def test_figures_of_the_gradient() -> None:
    g, before = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([4.0, 3.0, 0.0])
    found = update_figures(update(2 * g, g, torch.tensor([0.1, 2.0, 0.3]), eps=0.5), before)
    assert found.correlation == pytest.approx(24 / 25)
    assert found.descent == pytest.approx(1.0)
    assert found.gradient == pytest.approx((25 / 3) ** 0.5)
    assert found.below_eps == pytest.approx(2 / 3)
    assert found.over_eps == pytest.approx(((0.01 + 4 + 0.09) / 3) ** 0.5 / 0.5)
    assert update_figures(update(-g, g)).descent == pytest.approx(-1.0)
    assert math.isnan(update_figures(update(g, g)).correlation)
    assert math.isnan(update_figures(update(g, g)).below_eps)
    assert update_figures(update(g, g, g, eps=0.0)).over_eps == math.inf


# --- the watch ------------------------------------------------------------------------------------


def trained(watch_every: int, steps: int, **options: Any) -> tuple[nn.Module, UpdateWatch, list[Tensor]]:
    """A layer after some steps of AdamW with normal gradients, and those of its weight."""
    torch.manual_seed(0)
    model = nn.Linear(30, 20)
    optimizer = AdamW(model.parameters(), lr=LR)
    watch = UpdateWatch(model, optimizer, every=watch_every, **options)
    given = []
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        given.append(model.weight.grad.clone())  # type: ignore[union-attr]
        optimizer.step()
    return model, watch, given


def test_a_watch_looks_at_its_interval_and_compares_with_the_step_before() -> None:
    _, watch, given = trained(3, 8)
    assert list(watch.steps) == [0, 3, 6]
    correlation = watch.series("weight", "correlation")
    assert math.isnan(correlation[0])
    expected = [torch.cosine_similarity(given[i].flatten(), given[i - 1].flatten(), 0) for i in (3, 6)]
    assert correlation[1:] == pytest.approx([float(x) for x in expected], abs=1e-6)
    assert watch.series("weight", "beyond")[0] == 1.0  # the first step of Adam is one of signs
    assert watch.histograms("weight").shape == (3, 61)
    assert watch.histograms("weight").sum(axis=1).tolist() == [600, 600, 600]


def test_a_watch_forgets_and_samples_so_that_its_memory_is_bounded() -> None:
    _, watch, _ = trained(1, 9, keep=4, entries=50)
    assert list(watch.steps) == [5, 6, 7, 8]
    assert len(watch.looks) == 4
    assert 30 < watch.histograms("weight").sum(axis=1).max() <= 50
    assert np.isfinite(watch.series("weight", "correlation")).all()


def test_a_watch_changes_nothing_and_can_be_removed() -> None:
    watched, plain = trained(1, 5)[0], trained(1000, 5)[0]
    for p, q in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    _, watch, _ = trained(1, 2)
    watch.remove()
    watch.optimizer.step()
    assert list(watch.steps) == [0, 1]


def test_a_watch_names_what_it_does_not_know() -> None:
    model, watch, _ = trained(1, 1)
    with pytest.raises(ValueError, match=r"unknown figure 'mean': choose from counts, std"):
        watch.series("weight", "mean")
    with pytest.raises(ValueError, match=r"unknown block 'head': choose from weight, bias"):
        watch.histograms("head")
    for option in ("every", "entries", "keep"):
        with pytest.raises(ValueError, match=f"{option} must be 1 or more, got 0"):
            UpdateWatch(model, watch.optimizer, **{option: 0})


# --- descent --------------------------------------------------------------------------------------


def test_descent_cosine_is_taken_with_the_gradient_of_other_batches() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0, 2.0]))
    optimizer = torch.optim.AdamW([p], lr=LR)
    p.grad = torch.tensor([5.0, -1.0, 0.0])  # of this batch: r is its sign
    batches = [torch.tensor([1.0, 0.0, 1.0]), torch.tensor([3.0, 0.0, 0.0])]
    found = descent_cosine(optimizer, lambda x: (p * x).sum(), batches, {"p": [p]})
    total = torch.tensor([4.0, 0.0, 1.0])
    expected = torch.cosine_similarity(torch.tensor([1.0, -1.0, 0.0]), total, 0)
    assert found["p"] == pytest.approx(float(expected), abs=1e-6)
    assert p.grad.tolist() == [5.0, -1.0, 0.0]
    with pytest.raises(ValueError, match="at least one batch"):
        descent_cosine(optimizer, lambda x: (p * x).sum(), [], {"p": [p]})


# --- theory ---------------------------------------------------------------------------------------


def simulated_std(beta1: float, gradient: Callable[[int, Tensor], Tensor], steps: int = 4000) -> float:
    """std of r after a long time, over 5,000 entries, with β₂ = 0.999."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(5_000))
    optimizer = torch.optim.AdamW([p], lr=0.0, betas=(beta1, 0.999), eps=0.0)
    g = torch.zeros_like(p)
    for step in range(steps):
        g = gradient(step, g)
        p.grad = g
        if step == steps - 1:
            return float(coming_update(optimizer, p).ratio.std())
        optimizer.step()
    raise AssertionError


@pytest.mark.parametrize("beta1", [0.5, 0.9])
@pytest.mark.parametrize("rho", [0.0, 0.5, -0.5])
def test_std_of_r_for_correlated_gradients(beta1: float, rho: float) -> None:
    def gradient(step: int, before: Tensor) -> Tensor:
        return rho * before + (1 - rho**2) ** 0.5 * torch.randn_like(before)

    assert simulated_std(beta1, gradient) == pytest.approx(
        float(theory.adam_ratio_std(beta1, rho)), rel=0.05
    )


def test_std_of_r_for_gradients_with_a_mean_of_their_own() -> None:
    rho = 0.3
    means = normal(5_000, 5).sign() * rho**0.5

    def gradient(step: int, before: Tensor) -> Tensor:
        return means + (1 - rho) ** 0.5 * torch.randn_like(before)

    expected = float(theory.adam_ratio_std_with_mean(0.9, rho))
    assert simulated_std(0.9, gradient) == pytest.approx(expected, rel=0.05)
    assert float(theory.adam_ratio_std_with_mean(0.9, 0.0)) == float(theory.adam_ratio_std(0.9))
    assert float(theory.adam_ratio_std_with_mean(0.9, 1.0)) == 1.0


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.5, 0.9)])
@pytest.mark.parametrize("steps", [1, 7, 60])
def test_the_largest_ratio_is_attained_and_not_surpassed(betas: tuple[float, float], steps: int) -> None:
    beta1, beta2 = betas
    limit = theory.adam_largest_ratio(beta1, beta2, steps)

    def last_ratio(series: np.ndarray) -> float:
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.AdamW([p], lr=0.0, betas=betas, eps=0.0)
        for value in series:
            p.grad = torch.tensor([value])
            ratio = float(coming_update(optimizer, p).ratio)
            optimizer.step()
        return ratio

    back = np.arange(steps)[::-1]
    assert last_ratio((beta1 / beta2) ** back) == pytest.approx(limit, rel=1e-9)
    rng = np.random.default_rng(0)
    assert max(abs(last_ratio(rng.standard_normal(steps))) for _ in range(20)) <= limit * (1 + 1e-9)
    assert limit <= theory.adam_largest_ratio(beta1, beta2) * (1 + 1e-9)


def test_the_largest_ratio_needs_a_longer_memory_of_squares() -> None:
    assert theory.adam_largest_ratio(0.9, 0.999) == pytest.approx(7.27, abs=0.01)
    with pytest.raises(ValueError, match=r"beta1 0\.9 and beta2 0\.8"):
        theory.adam_largest_ratio(0.9, 0.8)
    assert theory.adam_largest_ratio(0.9, 0.81, 10) > 1


def test_adamw_and_lion_stay_in_their_box() -> None:
    torch.manual_seed(0)
    decay, betas = 0.5, (0.9, 0.999)
    limits = {
        "adamw": theory.box(decay, theory.adam_largest_ratio(*betas)),
        "lion": theory.box(decay),
    }
    for name, limit in limits.items():
        p = nn.Parameter(torch.zeros(500))
        optimizer = (AdamW if name == "adamw" else Lion)([p], lr=0.1, betas=betas, weight_decay=decay)
        largest = 0.0
        for step in range(400):
            # Long quiet, then a burst that grows: what drives Adam's ratio beyond 1.
            loud = 10.0 ** min(0, (step % 200 - 195) / 2)
            p.grad = loud * (1 + 0.1 * torch.randn_like(p)) * (1 if step < 200 else -1)
            optimizer.step()
            largest = max(largest, float(p.detach().abs().max()))
        assert largest <= limit * (1 + 1e-6)
        if name == "adamw":
            assert largest > theory.box(decay)  # the plain 1/λ does not hold for it


def test_adam_is_a_sign_method_with_a_factor() -> None:
    m, v = normal(1000).double(), normal(1000, 1).double().square() + normal(1000).double().square()
    expected = m.sign() / (1 + (v - m**2) / m**2).sqrt()
    torch.testing.assert_close(m / v.sqrt(), expected)
