"""Gradient norms by block, and how unequal they are.

Gradient heterogeneity is the disparity of gradient norms among parameter blocks (Tomihari and Sato,
arXiv 2502.00213, version 1). What their code stores (github tom4649/gradient-heterogeneity,
``hessian_per_param.py``) is, for some weight tensors that it names and for each mini-batch, the 2-norm of
the tensor's gradient, in evaluation mode. Here:

* blocks are what :mod:`minisign.probes.blocks` makes them, all tensors or whole layers;
* the norms of the mini-batches are theirs, and the norm of the full gradient, the mean over the batches,
  stands beside them: the former contain the noise, the latter does not;
* their code gives the norms and leaves the comparison to the reader. The measures of :func:`disparity`, and
  dividing by √P, are choices of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from minisign.probes.blocks import Blocks, tensor_blocks

Batch = TypeVar("Batch")
MEASURES = ("max over min", "gini")


@dataclass(frozen=True)
class GradientNorms:
    """What :func:`gradient_norms` found, by block.

    Attributes:
        sizes: P_b, entries of the block.
        full: 2-norm of the full gradient (the mean over the batches), loss per unit of the parameter.
        full_l1: its 1-norm.
        batch: 2-norm of each mini-batch's gradient [batches].
    """

    sizes: dict[str, int]
    full: dict[str, float]
    full_l1: dict[str, float]
    batch: dict[str, np.ndarray]


def gradient_norms(
    loss: Callable[[Batch], Tensor], batches: Iterable[Batch], blocks: Blocks
) -> GradientNorms:
    """Norms of the gradient in each block, of all batches together and of each one.

    ``.grad`` stays as it is. The model is used in the mode it is in.

    Args:
        loss: mean loss of a batch, a scalar.
        batches: of equal size.
        blocks: from :func:`~minisign.probes.tensor_blocks` or :func:`~minisign.probes.layer_blocks`.

    Raises:
        ValueError: no batches, or no blocks.
    """
    parameters = [p for block in blocks.values() for p in block]
    if not parameters:
        raise ValueError("gradient norms need at least one block with parameters, got none")
    total = [torch.zeros_like(p) for p in parameters]
    by_batch: dict[str, list[float]] = {name: [] for name in blocks}
    count = 0
    for grads in batch_gradients(loss, batches, parameters):
        torch._foreach_add_(total, grads)
        for name, norm in _by_block(blocks, grads, 2).items():
            by_batch[name].append(norm)
        count += 1
    torch._foreach_div_(total, count)
    return GradientNorms(
        {name: sum(p.numel() for p in block) for name, block in blocks.items()},
        _by_block(blocks, total, 2),
        _by_block(blocks, total, 1),
        {name: np.array(norms) for name, norms in by_batch.items()},
    )


def batch_gradients(
    loss: Callable[[Batch], Tensor], batches: Iterable[Batch], parameters: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """The gradient of each batch, a tensor for each parameter, zeros where it plays no part.

    ``.grad`` stays as it is.

    Raises:
        ValueError: no batches.
    """
    empty = True
    for batch in batches:
        empty = False
        yield torch.autograd.grad(loss(batch), parameters, allow_unused=True, materialize_grads=True)
    if empty:
        raise ValueError("gradients need at least one batch, got none")


@torch.no_grad()
def _by_block(
    blocks: Mapping[str, Sequence[Tensor]], tensors: Sequence[Tensor], order: int
) -> dict[str, float]:
    """Norm of the tensors of each block, which come in the blocks' order; one wait for the device."""
    each = torch.stack([norm.double() for norm in torch._foreach_norm(list(tensors), order)]).tolist()
    norms, at = {}, 0
    for name, block in blocks.items():
        norms[name] = float(np.linalg.norm(each[at : at + len(block)], order))
        at += len(block)
    return norms


def disparity(
    norms: Mapping[str, float], measure: str = "max over min", sizes: Mapping[str, int] | None = None
) -> float:
    """How unequal the blocks' norms are; none of these measures is from arXiv 2502.00213, which has no
    figure for it.

    Args:
        norms: by block.
        measure: ``"max over min"``, the largest over the smallest, from 1, infinite if a norm is zero (and
            without meaning if one is zero but for rounding, as that of an attention's key bias);
            ``"gini"``, Gini's coefficient Σ_ij |x_i − x_j| / 2n²x̄ (Gini 1912; as a measure of sparsity,
            Hurley and Rickard, arXiv 0811.4706), from 0 (all equal) to 1 − 1/n (one has it all).
        sizes: P_b. With it each norm is divided by √P_b, which makes it the RMS of the block's entries, so
            that a large block does not count as a steep one. Without it the norms are compared as they are.

    Raises:
        ValueError: an unknown measure, no blocks, or norms that are all zero or not finite.
    """
    if measure not in MEASURES:
        raise ValueError(f"unknown measure {measure!r}: choose from {', '.join(MEASURES)}")
    x = np.array([norm / (sizes[name] ** 0.5 if sizes else 1.0) for name, norm in norms.items()])
    if not (len(x) and np.isfinite(x).all() and x.any()):
        raise ValueError(f"norms must be finite and not all zero, got {dict(norms)}")
    if measure == "max over min":
        return float(x.max() / x.min()) if x.min() > 0 else float("inf")
    return float(np.abs(x[:, None] - x).sum() / (2 * len(x) ** 2 * x.mean()))


class GradientWatch:
    """Notes the gradient norms by block while any training loop runs.

        watch = GradientWatch(model, optimizer)
        …train…
        watch.steps, watch.norms["head.weight"]

    It looks at ``.grad`` just before every ``every``-th ``optimizer.step()``, so it sees what the optimizer
    sees (after clipping, summed over micro-batches), and costs one pass over the gradients each time.

    Args:
        model: whose gradients.
        optimizer: any ``torch.optim.Optimizer``.
        every: steps between two looks; the first step is one.
        blocks: what to keep apart; each tensor by default.

    Attributes:
        steps: at which steps it looked, counted from 0 from here on.
        norms: by block, the 2-norm at each of them; 0 where there was no gradient.

    Raises:
        ValueError: ``every`` below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        every: int = 20,
        blocks: Blocks | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be 1 or more, got {every}")
        self.every = every
        self.blocks = tensor_blocks(model) if blocks is None else blocks
        self.steps: list[int] = []
        self.norms: dict[str, list[float]] = {name: [] for name in self.blocks}
        self._step = 0
        self._handle = optimizer.register_step_pre_hook(self._look)

    def _look(self, *_: Any) -> None:
        if self._step % self.every == 0:
            self.steps.append(self._step)
            for name, norm in self.now().items():
                self.norms[name].append(norm)
        self._step += 1

    def now(self) -> dict[str, float]:
        """The norms of the gradients that the parameters hold at this moment, by block."""
        held = {
            name: [
                g.coalesce().values() if (g := p.grad).is_sparse else g for p in ps if p.grad is not None
            ]
            for name, ps in self.blocks.items()
        }
        full = {name: grads for name, grads in held.items() if grads}
        norms = _by_block(full, [g for grads in full.values() for g in grads], 2) if full else {}
        return {name: norms.get(name, 0.0) for name in self.blocks}

    def remove(self) -> None:
        """Looks no more."""
        self._handle.remove()
