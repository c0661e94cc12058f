"""Checkers of notebook 06."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from minisign.lab.gpt import GPT, GPTConfig
from minisign.lessons import RIGHT, Verdict, ask, checker


@checker
def check_half_swap(answer: Callable[[Tensor], Tensor]) -> Verdict:
    """``answer(h)`` → h [..., D] with its second half before its first."""
    for shape in ((6,), (2, 5, 8)):
        h = torch.arange(float(torch.Size(shape).numel())).view(shape)
        given = ask(answer, h.clone())
        if given.shape != h.shape:
            return Verdict(f"of a tensor {list(shape)} it makes one of shape {list(given.shape)}")
        half = shape[-1] // 2
        if not torch.equal(given, h.roll(half, dims=-1)):
            end = h.flatten(0, -2)[-1] if h.dim() > 1 else h
            made = given.flatten(0, -2)[-1] if h.dim() > 1 else given
            return Verdict(f"of {end.tolist()} it makes {made.tolist()}")
    return RIGHT


@checker
def check_absent_gradient(answer: Callable[[Tensor, Tensor, int], Tensor]) -> Verdict:
    """``answer(hidden, logits, absent)`` → gradient [D] of the mean cross-entropy over the T tokens of
    ``hidden`` [T, D], whose ``logits`` are [T, V], for the output row of the token ``absent``."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 4, generator=generator, dtype=torch.float64) + 1
    output = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    logits = hidden @ output.T
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1, 2, 0])).backward()
    assert output.grad is not None
    for absent in (3, 4):
        given = ask(answer, hidden, logits.detach(), absent)
        expected = output.grad[absent]
        if given.shape != expected.shape:
            return Verdict(f"the gradient has shape {list(expected.shape)}, not {list(given.shape)}")
        if not torch.allclose(given, expected):
            off = float((given - expected).abs().max())
            return Verdict(f"autograd has another gradient for row {absent}, by up to {off:.2g}")
    return RIGHT


@checker
def check_load_tied(answer: Callable[[GPT, Mapping[str, Tensor]], object]) -> Verdict:
    """``answer(model, checkpoint)``: gives a model with tied embeddings the matrix under
    ``"embedding.weight"``, and leaves it a model with tied embeddings."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=11, context=4, layers=1, heads=1, width=8, tie="tied")
    model, saved = GPT(config), GPT(config).state_dict()
    answer(model, saved)
    if not torch.equal(model.embedding.weight, saved["embedding.weight"]):
        return Verdict("the embedding is not that of the checkpoint")
    if not torch.equal(model.head.weight, saved["embedding.weight"]):
        return Verdict("the output matrix is not that of the checkpoint")
    if model.embedding.weight.data_ptr() == saved["embedding.weight"].data_ptr():
        return Verdict("training the model would change the checkpoint too: copy it")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    optimizer.step()
    if not torch.equal(model.embedding.weight, model.head.weight):
        return Verdict("after one step of training the embedding and the output matrix differ")
    return RIGHT
