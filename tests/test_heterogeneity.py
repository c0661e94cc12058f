"""Gradient norms, curvature and Λ against cases with known answers; the bounds and the rare-class law."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisign import AdamW, Hybrid, Lion, Signum, theory
from minisign.lab.build import build_model, load_tokens
from minisign.lab.gpt import GPT, GPTConfig
from minisign.lab.train import next_token_loss
from minisign.probes import (
    GradientWatch,
    block_curvatures,
    disparity,
    equal_share_groups,
    gradient_norms,
    gradient_weighted,
    heterogeneity,
    layer_blocks,
    layer_names,
    size_weighted,
    tensor_blocks,
)
from minisign.studies.search import search_base, search_config

EIGENVALUES = {"a": [5.0, 2.0, 1.0], "b": [-0.5, 0.25], "c": [3.0, -3.0, 1.0, 0.5]}


def gpt(layers: int = 3, **options: Any) -> GPT:
    return GPT(GPTConfig(vocab_size=50, context=8, layers=layers, heads=2, width=16, **options))


class Quadratic(nn.Module):
    """½ Σ_b w_bᵀ H_b w_b, coupled between blocks by ``coupling``, with chosen eigenvalues in each block."""

    def __init__(self, coupling: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.hessians, self.coupling = {}, coupling
        for name, values in EIGENVALUES.items():
            n = len(values)
            q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
            self.hessians[name] = q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T
            self.register_parameter(
                name, nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64))
            )

    def forward(self) -> Tensor:
        terms = [w @ self.hessians[name] @ w / 2 for name, w in self.named_parameters()]
        sums = [w.sum() for w in self.parameters()]
        return sum(terms) + self.coupling * sums[0] * sums[1] * sums[2]


# --- blocks ---------------------------------------------------------------------------------------


def test_tensor_blocks_are_the_trained_tensors_each_once() -> None:
    model = gpt(tie="tied")
    model.position.weight.requires_grad_(False)
    blocks = tensor_blocks(model)
    assert "position.weight" not in blocks
    assert "head.weight" not in blocks  # it is the embedding
    assert all(len(block) == 1 for block in blocks.values())
    assert sum(p.numel() for [p] in blocks.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_layer_blocks_keep_order_and_hold_everything_once() -> None:
    model = gpt(layers=3)
    blocks = layer_blocks(model)
    assert list(blocks) == ["embedding", "position", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    assert layer_names(model) == ["blocks.0", "blocks.1", "blocks.2"]
    held = [p for block in blocks.values() for p in block]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len(list(model.parameters()))
    assert {id(p) for p in blocks["blocks.1"]} == {id(p) for p in model.blocks[1].parameters()}


def test_ten_layers_are_told_apart() -> None:
    names = layer_names(gpt(layers=11))
    assert names[-1] == "blocks.10"
    assert len(layer_blocks(gpt(layers=11))["blocks.1"]) == len(layer_blocks(gpt(layers=11))["blocks.10"])


def test_the_longest_list_of_modules_holds_the_layers() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.few = nn.ModuleList([nn.Linear(2, 2)])
            self.many = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]) for _ in range(3)])
            self.scale = nn.Parameter(torch.ones(1))

    assert layer_names(Nested()) == ["many.0", "many.1", "many.2"]
    assert list(layer_blocks(Nested())) == ["scale", "few.0", "many.0", "many.1", "many.2"]
    with pytest.raises(ValueError, match=r"Linear has no nn\.ModuleList"):
        layer_blocks(nn.Linear(2, 2))


# --- gradient norms -------------------------------------------------------------------------------


def test_norms_of_the_mean_gradient_and_of_each_batch() -> None:
    w, v = (nn.Parameter(torch.zeros(n)) for n in (2, 1))
    w.grad = torch.full((2,), 7.0)
    batches = [(torch.tensor([3.0, 4.0]), 1.0), (torch.tensor([3.0, -4.0]), 3.0)]

    def loss(batch: tuple[Tensor, float]) -> Tensor:
        return (batch[0] * w).sum() + batch[1] * v.sum()

    found = gradient_norms(loss, batches, {"w": [w], "v": [v], "both": [w, v][:0]})
    assert found.sizes == {"w": 2, "v": 1, "both": 0}
    assert found.full == pytest.approx({"w": 3.0, "v": 2.0, "both": 0.0})  # the fours cancel
    assert found.full_l1 == pytest.approx({"w": 3.0, "v": 2.0, "both": 0.0})
    assert found.batch["w"].tolist() == pytest.approx([5, 5])
    assert found.batch["v"].tolist() == pytest.approx([1, 3])
    assert w.grad.tolist() == [7, 7]  # as it was
    assert v.grad is None


def test_a_block_of_several_tensors_has_the_norm_of_all_its_entries() -> None:
    model = gpt()
    ids = torch.randint(50, (4, 9))
    found = gradient_norms(partial(next_token_loss, model), [ids], layer_blocks(model))
    next_token_loss(model, ids).backward()
    for name, block in layer_blocks(model).items():
        flat = torch.cat([p.grad.flatten() for p in block if p.grad is not None]).double()
        assert found.full[name] == pytest.approx(float(flat.norm()), rel=1e-5)
        assert found.full_l1[name] == pytest.approx(float(flat.abs().sum()), rel=1e-5)
        assert found.sizes[name] == len(flat)


def test_what_the_loss_does_not_use_has_no_gradient() -> None:
    w, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    found = gradient_norms(lambda _: w.sum(), [None], {"w": [w], "unused": [unused]})
    assert found.full == pytest.approx({"w": 2**0.5, "unused": 0.0})


def test_norms_need_batches_and_blocks() -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="at least one batch"):
        gradient_norms(lambda _: w.sum(), [], {"w": [w]})
    with pytest.raises(ValueError, match="at least one block"):
        gradient_norms(lambda _: w.sum(), [None], {})


@pytest.mark.parametrize(
    ("norms", "ratio", "gini"),
    [([2.0, 2.0, 2.0], 1.0, 0.0), ([1.0, 3.0], 3.0, 0.25), ([0.0, 0.0, 0.0, 8.0], np.inf, 0.75)],
)
def test_disparity_of_known_norms(norms: list[float], ratio: float, gini: float) -> None:
    by_block = {str(i): x for i, x in enumerate(norms)}
    assert disparity(by_block) == ratio
    assert disparity(by_block, "gini") == pytest.approx(gini)
    # As norms of blocks with four entries each they are twice the RMS, of which neither measure knows.
    assert disparity(by_block, "gini", dict.fromkeys(by_block, 4)) == pytest.approx(gini)


def test_disparity_per_entry_divides_by_the_root_of_the_size() -> None:
    norms, sizes = {"large": 6.0, "small": 2.0}, {"large": 9, "small": 1}
    assert disparity(norms) == 3
    assert disparity(norms, sizes=sizes) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"a": 1.0}, "range"), "unknown measure 'range': choose from max over min, gini"),
        (({},), "finite and not all zero"),
        (({"a": 0.0, "b": 0.0}, "gini"), r"not all zero, got \{'a': 0.0, 'b': 0.0\}"),
        (({"a": float("nan"), "b": 1.0},), "must be finite"),
    ],
)
def test_disparity_says_what_is_wrong(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        disparity(*arguments)


# --- watching -------------------------------------------------------------------------------------


def test_a_watch_sees_what_the_optimizer_sees_at_its_interval() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = Signum(model.parameters(), lr=0.1)
    watch = GradientWatch(model, optimizer, every=3)
    for step in range(7):
        model.weight.grad = torch.tensor([[3.0 * step, 4.0 * step]])
        optimizer.step()
        model.weight.grad = None
    assert watch.steps == [0, 3, 6]
    assert watch.norms["weight"] == pytest.approx([0, 15, 30])
    watch.remove()
    optimizer.step()
    assert watch.steps == [0, 3, 6]


def test_a_watch_works_with_a_hybrid_with_sparse_gradients_and_with_none() -> None:
    table, rest = nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1)
    model = nn.ModuleDict({"table": table, "rest": rest})
    optimizer = Hybrid(AdamW(table.parameters(), lr=0.1), Lion(rest.parameters(), lr=0.1))
    watch = GradientWatch(model, optimizer, every=1, blocks={"all": list(model.parameters())})
    table(torch.tensor([1, 1, 3])).sum().backward()
    optimizer.step()
    assert watch.norms["all"] == pytest.approx([(4 + 4 + 1 + 1) ** 0.5])  # row 1 twice, added up
    assert GradientWatch(model, optimizer, every=1).now()["rest.weight"] == 0.0


def test_a_watch_has_an_interval() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="every must be 1 or more, got 0"):
        GradientWatch(model, Signum(model.parameters()), every=0)


# --- curvature ------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", [0.0, 0.3])
def test_curvature_of_a_quadratic_with_chosen_eigenvalues(coupling: float) -> None:
    model = Quadratic(coupling)
    if coupling:  # a product of three sums bends no block by itself
        expected = {"a": 5.0, "b": -0.5}
    else:
        expected = {"a": 5.0, "b": -0.5, "c": None}
    found = block_curvatures(model, tensor_blocks(model), tolerance=1e-9, products=500)
    for name, eigenvalue in expected.items():
        curvature = found[name]
        assert curvature.converged
        if eigenvalue is None:
            # Two of the same size and other sign: the norm is right, the sign is anybody's guess.
            assert curvature.norm == pytest.approx(3.0, rel=1e-6)
            assert -3 <= curvature.eigenvalue <= 3
            assert curvature.residual > 0.1
        else:
            assert curvature.norm == pytest.approx(abs(eigenvalue), rel=1e-6)
            assert curvature.eigenvalue == pytest.approx(eigenvalue, rel=1e-6)
            assert curvature.residual < 1e-3


def test_curvature_is_reported_as_far_as_it_has_converged() -> None:
    model = Quadratic()
    norms = []
    for products in (1, 2, 4, 8):
        found = block_curvatures(model, tensor_blocks(model), tolerance=1e-12, products=products)["a"]
        assert found.products == products
        assert not found.converged
        norms.append(found.norm)
    assert norms == sorted(norms)  # from below
    assert norms[0] < 4.9 < 4.99 < norms[-1] <= 5 + 1e-12


def test_curvature_of_a_softmax_with_one_hot_inputs() -> None:
    # With one input e_0 and W = 0 the Hessian of the column W_0 is diag(p) − ppᵀ, p = 1/n: eigenvalue 1/n.
    weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    x, y = torch.eye(4, dtype=torch.float64)[:1], torch.tensor([2])
    found = block_curvatures(lambda: F.cross_entropy(x @ weight.T, y), {"w": [weight]}, products=200)["w"]
    assert found.eigenvalue == pytest.approx(1 / 6, rel=1e-6)


def test_a_linear_loss_and_an_unused_block_have_no_curvature() -> None:
    w, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    v = nn.Parameter(torch.ones(3))
    blocks = {"w": [w], "v": [v], "unused": [unused]}
    found = block_curvatures(lambda: w.sum() + v.square().sum(), blocks)
    assert found["v"].norm == pytest.approx(2)
    assert (found["w"].norm, found["w"].converged) == (0.0, True)
    assert (found["unused"].norm, found["unused"].products) == (0.0, 1)


def test_curvature_of_a_gpt_is_that_of_its_whole_hessian() -> None:
    model = gpt(layers=1).double().eval()
    ids = torch.randint(50, (3, 9))
    name, p = "blocks.0.attention.qkv.weight", model.blocks[0].attention.qkv.weight
    before = torch.random.get_rng_state()
    loss, blocks = partial(next_token_loss, model, ids), tensor_blocks(model)
    found = block_curvatures(loss, {name: blocks[name]}, tolerance=1e-9, products=2000)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(q.grad is None for q in model.parameters())

    def of(weight: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, {name: weight}, (ids[:, :-1],))
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(of, p.detach()).reshape(p.numel(), p.numel())
    top = torch.linalg.eigvalsh(hessian).abs().max()
    assert found[name].norm == pytest.approx(float(top), rel=1e-3)


def test_curvature_says_what_is_wrong() -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        block_curvatures(lambda: w.square().sum(), {"w": [w]}, tolerance=0)
    with pytest.raises(ValueError, match="products must be 1 or more, got 0"):
        block_curvatures(lambda: w.square().sum(), {"w": [w]}, products=0)
    with pytest.raises(ValueError, match="the Hessian of w is not finite"):
        block_curvatures(lambda: (w * float("inf")).square().sum(), {"w": [w]})


def test_every_curvature_of_the_notebooks_gpt_converges() -> None:
    config = search_config(search_base(), "AdamW", 0.004)
    tokens = load_tokens(config)
    model = build_model(config, tokens.vocab_size)
    ids = torch.from_numpy(tokens.batch(0, 0, 16, 16))
    found = block_curvatures(lambda: next_token_loss(model, ids), tensor_blocks(model))
    assert len(found) == 21
    assert all(curvature.converged for curvature in found.values())


# --- Λ and the bounds -----------------------------------------------------------------------------


def test_the_two_means_of_the_curvature() -> None:
    curvature = {"steep": 10.0, "flat": 1.0}
    assert gradient_weighted({"steep": 3.0, "flat": 1.0}, curvature) == pytest.approx(9.1)
    assert size_weighted({"steep": 1, "flat": 3}, curvature) == pytest.approx(3.25)
    with pytest.raises(ValueError, match=r"weights of the blocks \['a'\], curvature of \['b'\]"):
        gradient_weighted({"a": 1.0}, {"b": 1.0})
    with pytest.raises(ValueError, match="not be all zero"):
        gradient_weighted({"a": 0.0}, {"a": 1.0})


def test_heterogeneity_of_a_quadratic() -> None:
    model = Quadratic()
    grads = {name: model.hessians[name] @ p.detach() for name, p in model.named_parameters()}
    found = heterogeneity(lambda _: model(), [None, None], tensor_blocks(model), products=1000)
    assert found["parameters"] == 9
    every = torch.cat(list(grads.values()))
    assert found["norm"] == pytest.approx(float(every.norm()))
    assert found["norm_l1"] == pytest.approx(float(every.abs().sum()))
    tops = {"a": 5.0, "b": 0.5, "c": 3.0}
    squares = {name: float(g.square().sum()) for name, g in grads.items()}
    assert found["lambda_p"] == pytest.approx((3 * 5 + 2 * 0.5 + 4 * 3) / 9, rel=2e-3)
    expected = sum(squares[n] * tops[n] for n in tops) / sum(squares.values())
    assert found["lambda_g"] == pytest.approx(expected, rel=2e-3)
    assert found["blocks"]["b"]["norm_by_batch"] == pytest.approx([squares["b"] ** 0.5] * 2)
    assert set(found["disparity"]) == {
        "max over min",
        "max over min per entry",
        "gini",
        "gini per entry",
    }
    without = heterogeneity(lambda _: model(), [None], tensor_blocks(model), hessian_batches=0)
    assert without["lambda_g"] is without["lambda_p"] is without["blocks"]["a"]["curvature"] is None
    assert without["disparity"] == pytest.approx(found["disparity"])


@pytest.mark.parametrize("seed", range(5))
def test_no_step_on_random_blocks_does_worse_than_its_bound(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    hessians = [torch.randn(n, n, **options) for n in (1, 4, 7)]
    hessians = [10.0**k * (h + h.T) for k, h in zip((-1, 0, 1), hessians, strict=True)]
    grads = [torch.randn(len(h), **options) for h in hessians]
    norms = {str(i): float(torch.linalg.matrix_norm(h, 2)) for i, h in enumerate(hessians)}
    g, h = torch.cat(grads), torch.block_diag(*hessians)
    lambda_g = gradient_weighted({str(i): float(x.norm()) for i, x in enumerate(grads)}, norms)
    lambda_p = size_weighted({str(i): len(x) for i, x in enumerate(grads)}, norms)
    for lr in np.geomspace(1e-4, 1, 9):
        for d, bound in (
            (-lr * g, theory.gradient_descent_bound(lr, float(g.norm()), lambda_g)),
            (-lr * g.sign(), theory.sign_descent_bound(lr, float(g.abs().sum()), len(g), lambda_p)),
        ):
            assert float(g @ d + d @ h @ d / 2) <= bound + 1e-12


def test_the_bounds_are_met_where_a_blocks_curvature_is_the_same_all_round() -> None:
    g, bend = torch.tensor([3.0, -1.0, 2.0]), torch.tensor([2.0, 2.0, 5.0])  # blocks of two and one
    norms, curvature = {"a": 10**0.5, "b": 2.0}, {"a": 2.0, "b": 5.0}
    lambda_g, lambda_p = gradient_weighted(norms, curvature), size_weighted({"a": 2, "b": 1}, curvature)
    for lr in (0.01, 0.5):
        exact = float(-lr * g.square().sum() + lr**2 / 2 * (bend * g.square()).sum())
        assert theory.gradient_descent_bound(lr, float(g.norm()), lambda_g) == pytest.approx(exact)
        exact = float(-lr * g.abs().sum() + lr**2 / 2 * bend.sum())
        assert theory.sign_descent_bound(lr, 6.0, 3, lambda_p) == pytest.approx(exact)


def test_the_best_steps_are_where_the_bounds_are_lowest() -> None:
    rates = np.geomspace(1e-3, 10, 4001)
    for (best, low), bounds in (
        (theory.best_gradient_step(2.0, 3.0), [theory.gradient_descent_bound(r, 2.0, 3.0) for r in rates]),
        (theory.best_sign_step(5.0, 7, 0.5), [theory.sign_descent_bound(r, 5.0, 7, 0.5) for r in rates]),
    ):
        assert rates[np.argmin(bounds)] == pytest.approx(best, rel=0.01)
        assert min(bounds) == pytest.approx(low, rel=1e-4)
        assert min(bounds) >= low


# --- rare classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 30])
def test_the_rare_class_law_is_what_gradient_descent_does(classes: int) -> None:
    shares = torch.arange(1, classes + 1, dtype=torch.float64).reciprocal()
    shares /= shares.sum()
    weight = torch.zeros(classes, classes, dtype=torch.float64)  # a row for each input
    for step in range(1, 2001):
        weight -= 0.05 * shares[:, None] * (weight.softmax(1) - torch.eye(classes))
        if step in (1, 100, 2000):
            losses = -weight.log_softmax(1).diagonal().numpy()
            law = theory.rare_class_gradient_descent(shares.numpy(), classes, 0.05 * step)
            np.testing.assert_allclose(losses, law, rtol=0.01)
    assert theory.rare_class_gradient_descent(0.3, classes, 0.0) == pytest.approx(np.log(classes))


def test_the_rare_class_law_has_the_papers_limit() -> None:
    for share, time in ((0.1, 1e7), (1e-3, 1e10), (1e-9, 1e16)):
        assert theory.rare_class_gradient_descent(share, 500, time) * share * time == pytest.approx(
            1, rel=1e-2
        )
    everywhere = theory.rare_class_gradient_descent(
        np.geomspace(1e-12, 1, 50), 500, np.geomspace(1e-9, 1e12, 50)
    )
    assert np.isfinite(everywhere).all()


def test_sign_descent_is_as_fast_for_every_class() -> None:
    shares = torch.tensor([0.9, 0.09, 0.01], dtype=torch.float64)
    weight = torch.zeros(3, 3, dtype=torch.float64)
    for step in range(1, 41):
        weight -= 0.05 * (shares[:, None] * (weight.softmax(1) - torch.eye(3))).sign()
        losses = -weight.log_softmax(1).diagonal().numpy()
        np.testing.assert_allclose(losses, theory.rare_class_sign_descent(3, 0.05 * step), rtol=1e-12)


def test_groups_of_equal_shares_by_frequency() -> None:
    shares = np.array([0.05, 0.5, 0.0, 0.25, 0.2])
    groups = equal_share_groups(shares, 2)
    assert list(groups) == ["0–50 %", "50–100 %"]
    assert groups["0–50 %"].tolist() == [False, True, False, False, False]
    assert groups["50–100 %"].tolist() == [True, False, True, True, True]


def test_groups_hold_each_token_once_and_are_as_equal_as_can_be() -> None:
    shares = 1 / np.arange(1, 3001)
    shares /= shares.sum()
    groups = equal_share_groups(np.random.RandomState(0).permutation(shares))
    assert len(groups) == 10
    assert (np.sum(list(groups.values()), axis=0) == 1).all()
    parts = np.array([equal_share_groups(shares)[name] @ shares for name in groups])
    assert np.abs(parts - 0.1).max() < shares[0]
    assert np.abs(parts[3:] - 0.1).max() < 0.02
    assert [list(equal_share_groups(shares)).index(n) for n in groups] == list(range(10))


def test_groups_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="groups must be 2 or more, got 1"):
        equal_share_groups(np.ones(3), 1)
    with pytest.raises(ValueError, match="all zero"):
        equal_share_groups(np.zeros(3))
