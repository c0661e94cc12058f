"""The mean cross-entropy of training, with one array of logits where torch has four.

``F.cross_entropy`` keeps the log-probabilities beside the logits, then makes an array of zeros for the
targets and another for the gradient, each as large. Here all of it happens in the memory of the logits, and
every bit of loss and gradient is torch's (of types narrower than float32, that of the loss in float32).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PART = 2**18  # entries that a core's cache holds beside what belongs to them
PARTS = 8  # at most, so that a GPU has enough to do with each
NO_ID = torch.iinfo(torch.int64).min  # for torch, which otherwise leaves out targets of -100


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats.

    Args:
        logits: [N, V], which nobody else needs: they are overwritten. Of types narrower than float32, and
            of rows that do not lie one after the other, a copy is.
        targets: ids [N], int64.

    Returns:
        A number, float32 or wider. Its gradient can be taken once (torch raises a RuntimeError the second
        time), or any number of times under ``create_graph=True``.
    """
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    loss: Tensor = _CrossEntropy.apply(wide.contiguous(), targets)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        own = logits.detach()
        torch.log_softmax(own, -1, out=own)
        ctx.save_for_backward(logits, targets)
        return F.nll_loss(own, targets, ignore_index=NO_ID)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors  # the first is log-probabilities by now
        towards = -grad / len(targets)  # of the loss by the log-probability of each target
        if (
            torch.is_grad_enabled()
        ):  # create_graph: the softmax of both is the same, and so is its derivative
            rows = F.one_hot(targets, logits.shape[-1]).to(logits)
            return towards * (rows - logits.softmax(-1)), None
        parts = min(PARTS, 1 + logits.numel() // PART)
        zeros = logits.new_zeros(-(-len(logits) // parts), logits.shape[-1])
        for part, ids in zip(logits.chunk(parts), targets.chunk(parts), strict=True):
            rows, at = zeros[: len(part)], ids[:, None]
            rows.scatter_(-1, at, towards.expand_as(at))
            torch._log_softmax_backward_data(rows, part, -1, part.dtype, out=part)
            rows.scatter_(-1, at, 0)
        return logits, None
