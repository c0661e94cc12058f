"""What an optimizer keeps."""

from __future__ import annotations

import torch
from torch import Tensor


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state, counters of one entry left out."""
    tensors = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors if x.numel() > 1)
