"""The loss of training against torch's, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minisign.lab.loss import cross_entropy
from minisign.probes.memory import PeakMemory

SHAPES = [(1, 1), (7, 5), (500, 4096), (333, 3001)]  # the last two in several parts, and not of equal size


def example(n: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits of a hidden state that needs a gradient, as a model gives them, and targets."""
    return (3 * torch.randn(n, v)).to(dtype).requires_grad_(), torch.randint(0, v, (n,))


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(1.7 * loss, x)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_are_torchs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, targets = example(*shape, dtype)
    expected, found = F.cross_entropy(x, targets), cross_entropy(x.clone(), targets)
    assert torch.equal(found, expected)
    assert torch.equal(gradient(found, x), gradient(expected, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_logits_are_widened_and_their_gradient_rounded_once(dtype: torch.dtype) -> None:
    x, targets = example(64, 300, dtype)
    before = x.detach().clone()
    expected, found = F.cross_entropy(x.float(), targets), cross_entropy(x, targets)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(gradient(found, x), gradient(expected, x))
    assert torch.equal(x, before)


def test_under_autocast_it_is_torchs() -> None:
    weight, (hidden, targets) = torch.randn(300, 16, requires_grad=True), example(64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (f(hidden @ weight.T, targets) for f in (F.cross_entropy, cross_entropy))
    assert torch.equal(found, expected)
    assert torch.equal(gradient(found, weight), gradient(expected, weight))


def test_rows_may_lie_in_any_order() -> None:
    x, targets = example(700, 900)
    columns = x.T.contiguous().T  # the entries of a row are 700 apart
    assert not columns.is_contiguous()
    assert torch.equal(
        gradient(cross_entropy(columns, targets), x), gradient(F.cross_entropy(x, targets), x)
    )


def test_no_array_as_large_as_the_logits_is_made() -> None:
    x, targets = example(512, 8192)
    nothing = torch.nn.Identity()
    with PeakMemory(nothing, torch.optim.SGD([x])) as memory:
        logits = x.clone()
        before = memory.now
        (grad,) = torch.autograd.grad(cross_entropy(logits, targets), logits)
    assert grad.data_ptr() == logits.data_ptr()
    assert memory.peak - before < logits.nbytes / 4
    assert memory.peak == max(memory.history) > before  # it has seen what is made


def test_an_id_that_is_no_row_is_an_error() -> None:
    for wrong in (-100, -1, 5):  # torch leaves out -100, unless told otherwise
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            cross_entropy(torch.randn(2, 5), torch.tensor([0, wrong]))


def test_curvature_is_torchs() -> None:
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    hidden, targets, v = torch.randn(6, 4).double(), torch.randint(0, 11, (6,)), torch.randn(11, 4).double()

    def products(loss: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        twice = [torch.autograd.grad(grad, weight, v, retain_graph=True)[0] for _ in range(2)]
        return torch.stack([grad, *twice])

    found, expected = (products(f(hidden @ weight.T, targets)) for f in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(found, expected)


def test_without_gradients() -> None:
    x, targets = example(20, 30)
    with torch.no_grad():
        assert torch.equal(cross_entropy(x.clone(), targets), F.cross_entropy(x, targets))


def test_what_needs_the_logits_again_is_refused() -> None:
    x, targets = example(20, 30)
    loss = cross_entropy(x.clone(), targets)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]
    logits = x.exp()  # whose own gradient needs what it gave
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(logits, targets).backward()  # type: ignore[no-untyped-call]
