"""Closed forms against the optimizers themselves, probes against cases with known answers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minisign import AdamW, Hybrid, Lion, Signum, Tiger, theory
from minisign.lab.gpt import GPT, GPTConfig
from minisign.probes import (
    Traffic,
    common_mode,
    extremes,
    frequency_groups,
    head_size,
    largest_entries,
    longest_silence,
    loss_by_group,
    mean_gaps,
    rank_frequency,
    ratios,
    row_rms,
    saturated_rows,
    saturation,
    size_by_kappa,
    speed,
    state_bytes,
    take_turns,
    token_losses,
    unigram_loss,
    zipf_exponent,
)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_envelope_is_attained_by_a_constant_sign(weight_decay: float) -> None:
    p = nn.Parameter(torch.full((1, 1), 0.3, dtype=torch.float64))
    optimizer = Lion([p], lr=0.1, weight_decay=weight_decay)
    etas = [0.1 / (1 + t) for t in range(40)]
    found = []
    for eta in etas:
        optimizer.param_groups[0]["lr"] = eta
        p.grad = -torch.ones_like(p)
        optimizer.step()
        found.append(p.item())
    np.testing.assert_allclose(found, theory.envelope(etas, weight_decay, 0.3), rtol=1e-12)


def test_envelope_at_a_constant_step() -> None:
    t = np.arange(1, 1000)
    closed = 100 * (1 - (1 - 0.01 * 0.05) ** t)
    np.testing.assert_allclose(theory.envelope(np.full(999, 0.05), 0.01), closed, rtol=1e-12)


def test_logistic_growth_of_a_row_under_tigers_step() -> None:
    p = nn.Parameter(torch.full((1, 8), 0.02, dtype=torch.float64))
    optimizer = Tiger([p], lr=1e-3, weight_decay=0.01, scale="row_rms")
    found = []
    for _ in range(14_000):
        p.grad = -torch.ones_like(p)
        optimizer.step()
        found.append(p[0, 0].item())
    expected = theory.logistic_growth(np.full(14_000, 1e-3), 0.01, 0.02)
    np.testing.assert_allclose(found, expected, rtol=6e-3)  # the differential equation's error, O(α)
    assert found[-1] > 99


def test_bound() -> None:
    assert theory.bound(0.01) == 100
    assert theory.bound(0.0) == math.inf


def steps_of(optimizer: Any, weight: nn.Parameter, steps: int) -> np.ndarray:
    """The weight after each step of a gradient of −1 everywhere [steps, …]."""
    found = []
    for _ in range(steps):
        weight.grad = -torch.ones_like(weight)
        optimizer.step()
        found.append(weight.detach().numpy().copy())
    return np.array(found)


def test_steps_to_reach_is_when_lion_gets_there() -> None:
    p = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    path = steps_of(Lion([p], lr=0.01, weight_decay=2.0), p, 400)[:, 0, 0]
    for share in (0.1, 0.5, 0.99, 0.999):
        first = int((path >= share / 2.0).argmax()) + 1
        assert math.ceil(theory.steps_to_reach(share, 0.01, 2.0)) == first


def test_a_row_under_tigers_step_arrives_when_it_should_and_later_from_a_random_start() -> None:
    """A second row starts as large, but at right angles to the signs: half of it is in the way."""
    alpha, start = 2e-3, 0.02
    aligned = torch.full((8,), start, dtype=torch.float64)
    p = nn.Parameter(torch.stack([aligned, aligned * torch.tensor([1, -1] * 4)]))
    path = steps_of(Tiger([p], lr=alpha, weight_decay=0.5, scale="row_rms"), p, 6000)
    sizes = np.sqrt((path**2).mean(axis=2)) / 2.0  # in units of the bound
    for share in (0.1, 0.5, 0.9):
        direct, late = (int((sizes[:, row] >= share).argmax()) + 1 for row in (0, 1))
        assert direct == pytest.approx(theory.logistic_steps_to_reach(share, alpha, 0.5, start), rel=2e-3)
        assert late - direct == pytest.approx(theory.logistic_delay(alpha), rel=0.02)


@pytest.mark.parametrize(("signal", "gap"), [(0.2, 1), (-0.4, 1), (0.5, 8)])
def test_right_sign_is_how_often_signums_momentum_has_it(signal: float, gap: int) -> None:
    p = nn.Parameter(torch.zeros(20_000))
    optimizer = Signum([p], beta=0.9)
    for step in range(80):
        p.grad = signal + torch.randn_like(p) if (step + 1) % gap == 0 else torch.zeros_like(p)
        optimizer.step()
    found = (optimizer.state[p]["momentum"] > 0).float().mean().item()
    assert found == pytest.approx(theory.right_sign(signal, 0.9**gap), abs=0.012)  # 3.5 deviations


def test_the_stationary_law_is_what_signs_drawn_afresh_lead_to() -> None:
    eta, decay, gaps = 0.02, 0.5, torch.tensor([20.0, 100.0, 300.0])[:, None]
    p = nn.Parameter(torch.zeros(3, 6000, dtype=torch.float64))  # float32 would lose the momentum
    optimizer = Signum([p], lr=eta, beta=0.6, weight_decay=decay)
    for _ in range(1600):
        p.grad = torch.randn_like(p) * (torch.rand_like(p) < 1 / gaps)
        optimizer.step()
    x = p.detach().numpy() * decay
    kappas = theory.kappa(eta, decay, gaps[:, 0].numpy())
    np.testing.assert_allclose(kappas, [0.2, 1.0, 3.0], rtol=1e-6)
    bins = np.linspace(-1, 1, 9)
    for entries, kappa in zip(x, kappas, strict=True):
        assert theory.stationary_rms(kappa) == pytest.approx(np.sqrt((entries**2).mean()), rel=0.05)
        share = float((np.abs(entries) > 0.8).mean())
        assert theory.stationary_share(kappa) == pytest.approx(share, abs=0.03)
        within = np.histogram(entries, bins)[0][1:-1] / len(entries)
        fine = np.linspace(-0.75, 0.75, 6 * 100 + 1)
        middle = theory.stationary_density((fine[1:] + fine[:-1]) / 2, kappa).reshape(6, 100).mean(axis=1)
        np.testing.assert_allclose(middle * 0.25, within, atol=0.02)


@pytest.mark.parametrize(
    ("kappa", "density", "beyond", "square"),
    [
        (0.25, lambda x: 0.75 * (1 - x**2), lambda a: 1 - 1.5 * a + 0.5 * a**3, 1 / 5),  # a parabola
        (0.5, lambda x: 0 * x + 0.5, lambda a: 1 - a, 1 / 3),  # flat
        (1.0, lambda x: 1 / (np.pi * np.sqrt(1 - x**2)), lambda a: 1 - 2 * np.arcsin(a) / np.pi, 1 / 2),
    ],
    ids=["parabola", "flat", "arcsine"],
)
def test_the_stationary_law_where_it_is_a_well_known_one(
    kappa: float, density: Any, beyond: Any, square: float
) -> None:
    x = np.linspace(-0.999, 0.999, 101)
    np.testing.assert_allclose(theory.stationary_density(x, kappa), density(x), rtol=1e-12)
    for near in (0.0, 0.3, 0.8, 0.99):
        assert theory.stationary_share(kappa, near) == pytest.approx(beyond(near), abs=2e-4)
    assert theory.stationary_rms(kappa) == pytest.approx(math.sqrt(square))


def test_steps_to_underflow_is_when_a_momentum_is_lost() -> None:
    p = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    optimizer = Signum([p], beta=0.9)
    p.grad = torch.ones_like(p)
    optimizer.step()
    start, steps = optimizer.state[p]["momentum"].item(), 0
    while optimizer.state[p]["momentum"].item() >= 1e-9:
        p.grad = torch.zeros_like(p)
        optimizer.step()
        steps += 1
    assert math.ceil(theory.steps_to_underflow(start, 0.9, smallest=1e-9)) == steps
    smallest = float(np.finfo(np.float32).smallest_normal)
    assert theory.steps_to_underflow(0.1, 0.5) == theory.steps_to_underflow(0.1, 0.5, smallest)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
@pytest.mark.parametrize("gradient", [-3.0, 1e4])
def test_one_gradient_moves_adamw_as_far_whatever_its_size(
    betas: tuple[float, float], gradient: float
) -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdamW([p], lr=0.1, betas=betas, eps=1e-30, weight_decay=0.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["step"] += 1e6  # the bias corrections have worn off
    for step in range(500):
        p.grad = torch.full_like(p, gradient if step == 0 else 0.0)
        optimizer.step()
    expected = -math.copysign(theory.isolated_adamw_move(0.1, *betas), gradient)
    assert p.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("width", "std", "position"), [(64, 0.1, 0.02), (64, 0.2, 0.2), (256, 0.1, 0.1)])
def test_tied_initial_loss_is_that_of_a_model_whose_blocks_add_nothing(
    width: int, std: float, position: float
) -> None:
    model = GPT(GPTConfig(2000, 32, 1, 1, width, tie="tied", embedding_std=std))
    model.position.weight.data.mul_(position / 0.02)
    model.blocks[0].attention.out.weight.data.zero_()
    model.blocks[0].mlp.down.weight.data.zero_()
    ids = torch.randint(0, 2000, (32, 33))
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert theory.tied_initial_loss(2000, width, std, position) == pytest.approx(loss, rel=0.01)


def test_mean_gap_is_how_long_a_token_stays_away() -> None:
    shares = np.array([0.3, 0.05, 0.002, 0.0])
    batches = np.random.RandomState(0).random_sample((20_000, 10))
    edges = np.cumsum(shares)
    seen = np.stack(
        [((batches < b) & (batches >= b - p)).any(1) for b, p in zip(edges, shares, strict=True)]
    )
    np.testing.assert_allclose(theory.mean_gap(shares, 10), mean_gaps(seen.T), rtol=0.1)
    assert theory.mean_gap(1.0, 5) == 1
    assert theory.mean_gap(1e-18, 256) == pytest.approx(1e18 / 256, rel=1e-12)  # nothing cancels


def test_expected_seen_is_the_mean_over_many_texts() -> None:
    shares = 1 / np.arange(1, 301) ** 1.3
    shares = np.append(shares / shares.sum(), 0.0)
    times = np.random.RandomState(0).multinomial(500, shares, size=400)
    for j in range(4):
        assert theory.expected_seen(shares, 500, j) == pytest.approx((times == j).sum(1).mean(), rel=0.02)


# --- probes ---------------------------------------------------------------------------------------


def test_saturation_on_a_known_matrix() -> None:
    weight = torch.zeros(5, 4)
    weight[0] = torch.tensor([100.0, -100.0, 79.0, 81.0])  # seen twice: three of four near the bound
    weight[1] = 99.0  # never seen: does not count
    weight[2] = torch.tensor([0.0, 0.0, 0.0, 90.0])  # seen 300 times
    weight[3] = -95.0  # seen four times: neither rare nor frequent
    found = saturation(weight, np.array([2, 0, 300, 4, 3]), 100.0)
    assert found.embedding_max == 100.0
    assert found.embedding_min == -100.0
    assert found.unseen_saturated == 1
    assert found.rare_saturated == 3 / 8
    assert found.frequent_saturated == 1 / 4
    assert math.isnan(saturation(weight, np.zeros(5, dtype=int), 100.0).rare_saturated)


def test_small_probes() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, -1.0]])
    assert extremes(weight) == (-1.0, 4.0)
    np.testing.assert_allclose(row_rms(weight), [12.5**0.5, 0.5**0.5])


def test_saturated_rows_have_more_than_a_share_near_the_bound() -> None:
    weight = torch.zeros(4, 10, requires_grad=True)
    weight.data[1, 0] = 9.0  # one in ten: not more than 0.1
    weight.data[2, :2] = torch.tensor([8.1, -8.1])
    weight.data[3] = 7.9
    assert saturated_rows(weight, 10.0).tolist() == [False, False, True, False]
    assert saturated_rows(weight, 10.0, share=0.05).tolist() == [False, True, True, False]
    assert saturated_rows(weight, 9.0).tolist() == [False, False, True, True]


def test_size_by_kappa_sorts_rows_into_octaves() -> None:
    kappa = np.array([0.25] * 10 + [0.4] * 10 + [1.0] * 19 + [3.0] * 20)
    weight = np.zeros((59, 4))
    weight[:10] = 0.2
    weight[10:20] = -0.4
    weight[39:, 0] = 0.9
    found = size_by_kappa(weight, kappa)
    assert list(found) == ["0.25", "2"]  # nineteen rows are too few
    assert found["0.25"] == pytest.approx({"kappa": 0.325, "rms": 0.3, "share": 0.0})
    assert found["2"] == pytest.approx({"kappa": 3.0, "rms": 0.45, "share": 0.25})


def test_largest_entries_name_a_shared_weight_once() -> None:
    model = GPT(GPTConfig(50, 8, 1, 1, 16, tie="tied"))
    model.embedding.weight.data[3, 4] = -7.0
    found = largest_entries(model)
    assert found["embedding.weight"] == 7.0
    assert found["norm.weight"] == 1.0
    assert list(found) == [name for name, _ in model.named_parameters()]


def test_common_mode_is_what_all_vectors_share() -> None:
    shared, own = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([[0.0, 4.0, 0.0], [0.0, -4.0, 0.0]])
    assert common_mode(own) == 0
    assert common_mode(shared.expand(2, 5, 3)) == 1
    assert common_mode((shared + own)[None]) == pytest.approx(9 / 25)


def test_head_size_is_the_norm_and_what_all_rows_share() -> None:
    weight = torch.tensor([[3.0, 1.0], [3.0, -1.0]])
    assert head_size(weight) == pytest.approx({"norm": 20**0.5, "common_mode": 0.9})


def test_rank_frequency_leaves_out_what_never_occurs() -> None:
    ranks, shares = rank_frequency(np.array([1, 0, 6, 3, 0]))
    assert ranks.tolist() == [1, 2, 3]
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1])


def test_zipf_exponent_weighs_octaves_alike() -> None:
    ranks = np.arange(1, 2001)
    assert zipf_exponent(1e9 * ranks**-1.3) == pytest.approx(1.3)
    broken = np.where(ranks < 100, ranks**-1.0, 100.0 * ranks**-2.0)  # slope −1, then −2
    x, y, w = np.log(ranks[9:1000]), np.log(broken[9:1000]), 1 / ranks[9:1000]
    dx, dy = x - np.average(x, weights=w), y - np.average(y, weights=w)
    assert zipf_exponent(broken, (10, 1000)) == pytest.approx(-(w * dx * dy).sum() / (w * dx * dx).sum())
    with pytest.raises(ValueError, match=r"ranks \(3000, 4000\) hold 0 tokens: a slope needs two"):
        zipf_exponent(broken, (3000, 4000))


def test_gaps_and_silences() -> None:
    seen = np.array([[0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0]], dtype=bool)
    assert mean_gaps(seen).tolist() == [2.5, 2.5, 1.0, math.inf]
    assert longest_silence(seen).tolist() == [2, 2, 0, 0]  # what comes before the first is no silence


def test_frequency_groups_hold_each_token_once() -> None:
    counts = np.array([0, 1, 3, 4, 20, 21, 200, 201, 10**9])
    groups = frequency_groups(counts)
    found = {name: counts[members].tolist() for name, members in groups.items()}
    assert list(found.values()) == [[0], [1, 3], [4, 20], [21, 200], [201, 10**9]]
    assert list(found) == ["never", "1 to 3", "4 to 20", "21 to 200", "more"]


class Guess(nn.Module):
    """Expects the token after ``id`` to be ``id + 1`` modulo 4, by odds of 9 to each of the others' 1; in
    training, nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(math.log(9) * torch.eye(4).roll(1, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids] * (not self.training)


def test_token_losses_are_of_the_next_token_each() -> None:
    model = Guess()
    windows = np.array([[0, 1, 3], [3, 0, 1]] * 50)  # more than are computed at once
    for training in (True, False):
        model.train(training)
        losses = token_losses(model, windows)
        assert model.training == training
        right, wrong = math.log(12 / 9), math.log(12)
        np.testing.assert_allclose(losses, [[right, wrong], [right, right]] * 50, rtol=1e-6)


def test_loss_by_group_goes_by_the_tokens_it_is_given() -> None:
    losses = np.array([[1.0, 2.0], [3.0, 6.0]])
    windows = np.array([[0, 1, 2], [1, 0, 2]])
    groups = {"zero": np.array([True, False, False]), "low": np.array([True, True, False])}
    groups["none"] = np.zeros(3, dtype=bool)
    predicted = loss_by_group(losses, windows[:, 1:], groups)
    assert [predicted["zero"], predicted["low"]] == [3.0, 2.0]
    assert math.isnan(predicted["none"])
    read = loss_by_group(losses, windows[:, :-1], groups)
    assert [read["zero"], read["low"]] == [3.5, 3.0]


def test_unigram_loss_is_the_cross_entropy_of_the_frequencies() -> None:
    seen, targets = np.array([0, 0, 0, 1, 3]), np.array([[0, 1], [2, 0]])
    shares = np.array([3.5, 1.5, 0.5, 1.5]) / 7
    assert unigram_loss(seen, targets) == pytest.approx(-np.log(shares[targets]).mean())


def test_traffic_counts_arguments_and_results() -> None:
    x, y, narrow = torch.ones(10), torch.ones(10), torch.ones(10, dtype=torch.bfloat16)
    with Traffic() as traffic:
        x.add_(y)
        assert traffic.moved == 3 * 40
        torch.where(x > 0, x, y)
        assert traffic.moved == (3 + 1 + 3) * 40 + 2 * 10  # a mask has a byte for each entry
        x.copy_(narrow)
    assert traffic.moved == (7 + 2) * 40 + 20 + 20
    x.add_(y)
    assert traffic.moved == 400


def test_state_bytes_are_those_of_the_buffers() -> None:
    a, b = nn.Parameter(torch.zeros(10, 3)), nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    optimizers = {"tiger": Tiger([a, b]), "adamw": AdamW([a, b]), "hybrid": Hybrid(AdamW([a]), Tiger([b]))}
    found = {}
    for name, optimizer in optimizers.items():
        assert state_bytes(optimizer) == 0  # before the first step there is nothing
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        optimizer.step()
        found[name] = state_bytes(optimizer)
    assert found == {"tiger": 130, "adamw": 260, "hybrid": 250}


def test_actions_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    now = [0.0]
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def action(name: str, seconds: float) -> Callable[[], None]:
        def act() -> None:
            order.append(name)
            now[0] += seconds

        return act

    state = random.getstate()
    found = take_turns({"slow": action("slow", 2.0), "fast": action("fast", 0.5)}, 12)
    turns = [tuple(order[i : i + 2]) for i in range(0, 24, 2)]
    assert set(turns) == {("slow", "fast"), ("fast", "slow")}  # each once a turn, not always the same first
    assert {name: seconds.tolist() for name, seconds in found.items()} == {
        "slow": [2.0] * 12,
        "fast": [0.5] * 12,
    }
    assert random.getstate() == state


def test_ratios_compare_within_a_turn_and_leave_out_the_first() -> None:
    seconds = {"a": np.array([9.0, 1.0, 2.0, 10.0]), "b": np.array([1.0, 2.0, 4.0, 5.0])}
    assert ratios(seconds, to="a") == {"a": 1.0, "b": 2.0}
    assert ratios(seconds, to="b", skip=2) == {"a": 1.25, "b": 1.0}
