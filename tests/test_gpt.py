"""The model: shapes, causality, tying, where the norms stand, output layer, start, and samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from minisign.lab.gpt import GPT, Center, GPTConfig

SMALL = dict(vocab_size=50, context=8, layers=2, heads=2, width=16)


def build(**options: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **options}))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("tie", ["none", "tied", "half_swap"])
def test_shapes_and_causality(norm: str, tie: str) -> None:
    model = build(norm=norm, tie=tie)
    ids = torch.randint(0, 50, (3, 8))
    logits = model(ids)
    assert logits.shape == (3, 8, 50)
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 50
    torch.testing.assert_close(model(changed)[:, :5], logits[:, :5])  # the future does not show
    assert not torch.allclose(model(changed)[:, 5:], logits[:, 5:])
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_every_position_and_order_matter() -> None:
    model = build()
    ids = torch.tensor([[1, 2, 3, 4]])
    assert not torch.allclose(model(ids)[0, -1], model(torch.tensor([[2, 1, 3, 4]]))[0, -1])


@pytest.mark.parametrize("tie", ["none", "tied", "half_swap"])
def test_tying(tie: str) -> None:
    model = build(tie=tie)
    assert (model.head.weight is model.embedding.weight) == (tie != "none")
    names = [n for n, _ in model.named_parameters()]
    assert ("head.weight" in names) == (tie == "none")
    x = model.features(torch.tensor([[1, 2, 3]]))
    if tie == "half_swap":
        plain = build(tie="tied").features(torch.tensor([[1, 2, 3]]))
        torch.testing.assert_close(x, torch.cat([plain[..., 8:], plain[..., :8]], dim=-1))


def test_initial_loss() -> None:
    """Near log V, but where tying lets each token predict itself."""
    ids = torch.randint(0, 2000, (8, 33))
    losses = {}
    for tie in ("none", "tied", "half_swap"):
        model = build(vocab_size=2000, context=32, width=64, tie=tie)
        losses[tie] = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert losses["none"] == pytest.approx(math.log(2000), abs=0.05)
    assert losses["half_swap"] == pytest.approx(math.log(2000), abs=0.05)


def test_norm_placement() -> None:
    """A block that adds nothing lets a hidden state pass if its norms are inside."""
    x = torch.randn(1, 3, 16) * 5 + 1
    for norm in ("pre", "post"):
        block = build(norm=norm).blocks[0]
        block.attention.out.weight.data.zero_()
        block.mlp.down.weight.data.zero_()
        expected = x if norm == "pre" else F.layer_norm(F.layer_norm(x, (16,)), (16,))
        torch.testing.assert_close(block(x), expected)


def test_start() -> None:
    model = build(vocab_size=4000, width=64, heads=4, embedding_std=0.2)
    assert model.embedding.weight.std().item() == pytest.approx(0.2, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.blocks[0].mlp.down.weight.std().item() == pytest.approx(0.01, rel=0.05)


# --- the output layer -----------------------------------------------------------------------------


def test_only_the_heads_with_a_bias_have_one_and_it_starts_at_zero() -> None:
    assert build().head.bias is None
    for head in ("bias", "centered"):
        model = build(head=head)
        assert torch.equal(model.head.bias, torch.zeros(50))
        model.head.bias.data[7] = 1e4
        assert (model(torch.tensor([[1, 2, 3]])).argmax(-1) == 7).all()


@pytest.mark.parametrize("tie", ["none", "half_swap"])
def test_the_centered_head_sees_no_direction_that_all_tokens_share(tie: str) -> None:
    ids = torch.randint(0, 50, (3, 8))
    plain, centered = (build(tie=tie, head=head).features(ids) for head in ("bias", "centered"))
    torch.testing.assert_close(centered, plain - plain.mean((0, 1)))


def test_center_remembers_a_running_mean() -> None:
    center, x = Center(2), torch.tensor([[[1.0, 5.0], [3.0, 5.0]]], requires_grad=True)
    for _ in range(3):
        y = center(x)
    assert torch.equal(y, torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]]))
    y[0, 0, 0].backward()  # the mean takes part in the gradient
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([[[0.5, 0.0], [-0.5, 0.0]]]))
    center.eval()
    seen = 1 - 0.9**3
    torch.testing.assert_close(center(x), x - torch.tensor([2.0, 5.0]) * seen)
    torch.testing.assert_close(center.mean, torch.tensor([2.0, 5.0]) * seen)  # not changed out of training


def test_the_running_mean_is_saved_and_keeps_the_future_out() -> None:
    model = build(head="centered")
    model(torch.randint(0, 50, (3, 8)))
    assert model.state_dict()["center.mean"].any()
    model.eval()
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    torch.testing.assert_close(model(ids)[:1, :2], model(ids[:1, :2]))


# --- samples --------------------------------------------------------------------------------------


def test_a_sample_goes_on_from_its_start_and_follows_from_the_seed() -> None:
    model, start = build(), torch.tensor([3, 1, 4])
    state = torch.get_rng_state()
    sample = model.sample(start, 20, seed=1)
    assert sample.shape == (23,)
    assert torch.equal(sample[:3], start)
    assert torch.equal(sample, model.sample(start, 20, seed=1))
    assert not torch.equal(sample, model.sample(start, 20, seed=2))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's randomness is touched
    assert torch.equal(model.sample(start, 0), start)


def test_a_sample_is_drawn_from_what_the_model_expects() -> None:
    model = build(head="bias")
    model.head.weight.data.zero_()
    model.head.bias.data.fill_(-math.inf)
    model.head.bias.data[[7, 9]] = torch.tensor([0.75, 0.25]).log()
    drawn = model.sample(torch.tensor([1]), 1000)[1:]
    assert set(drawn.tolist()) == {7, 9}
    assert (drawn == 7).float().mean().item() == pytest.approx(0.75, abs=0.05)


def test_a_sample_sees_the_last_tokens_that_fit() -> None:
    model, seen = build(), list[torch.Tensor]()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    sample = model.sample(torch.arange(6), 5)
    for length, ids in zip(range(6, 11), seen, strict=True):
        assert torch.equal(ids, sample[:length][-8:])


def test_sampling_leaves_the_model_as_it_is() -> None:
    model = build(head="centered")
    for training in (True, False):
        model.train(training)
        model.sample(torch.tensor([1]), 3)
        assert model.training == model.center.training == training
    assert not model.center.mean.any()  # nothing was learned from the samples


def test_a_sample_needs_a_start() -> None:
    with pytest.raises(ValueError, match="at least one token to start from, got none"):
        build().sample(torch.tensor([], dtype=torch.long), 3)


# --- what must fail clearly -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 15}, ValueError, "width 15 is not divisible by heads 2"),
        ({"layers": 0}, ValueError, "layers must be 1 or more, got 0"),
        ({"heads": 1.5}, TypeError, r"heads must be a whole number, got 1\.5"),
        ({"norm": "none"}, ValueError, "unknown norm 'none'"),
        ({"tie": "swap"}, ValueError, "unknown tie 'swap'"),
        ({"head": "tail"}, ValueError, "unknown head 'tail': choose from plain, bias, centered"),
        ({"tie": "half_swap", "width": 3, "heads": 1}, ValueError, "even width, got 3"),
        ({"embedding_std": 0.0}, ValueError, r"embedding_std must be positive, got 0\.0"),
    ],
)
def test_bad_shape(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        GPTConfig(**{**SMALL, **options})


def test_too_long() -> None:
    with pytest.raises(ValueError, match="9 tokens do not fit a context of 8"):
        build()(torch.zeros(1, 9, dtype=torch.long))


def test_xavier_matrices_keep_the_size_of_what_goes_through() -> None:
    model = build(init="xavier", width=64, heads=4)
    for name, p in model.named_parameters():
        p = p.detach()
        if p.dim() == 2 and name.startswith("blocks."):
            fan = {"qkv": (64, 64), "out": (64, 64), "up": (256, 64), "down": (64, 256)}[
                name.split(".")[-2]
            ]
            bound = (6 / sum(fan)) ** 0.5
            assert 0.95 * bound < float(p.abs().max()) <= bound
            assert float(p.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    gpt2 = build(init="gpt2", width=64, heads=4)
    assert float(gpt2.blocks[0].mlp.up.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    # Embeddings and head are those of the other initialization.
    for name in ("embedding", "position", "head"):
        assert float(getattr(model, name).weight.detach().std()) == pytest.approx(0.02, rel=0.1)
