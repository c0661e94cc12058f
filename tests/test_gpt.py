"""The model: shapes, causality, tying, where the norms stand, and its start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from minisign.gpt import GPT, GPTConfig

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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 15}, ValueError, "width 15 is not divisible by heads 2"),
        ({"layers": 0}, ValueError, "layers must be 1 or more, got 0"),
        ({"heads": 1.5}, TypeError, r"heads must be a whole number, got 1\.5"),
        ({"norm": "none"}, ValueError, "unknown norm 'none'"),
        ({"tie": "swap"}, ValueError, "unknown tie 'swap'"),
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
