"""What a rule may ask of a whole tensor before it moves: words that torch has no method for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Rule: TypeAlias = Callable[..., None]  # rule(p, g, *buffers, **numbers): one step in place
Group: TypeAlias = dict[str, Any]  # a parameter group of torch.optim: parameters, numbers, options
WORDS = ("rms", "row_rms")


def rms(p: Any, over: Any = "rms") -> Any:
    """√mean(θ²), at least float32; 1 where it is 0, so that what is relative to it moves at all.

    Args:
        p: the parameter, before anything has changed it.
        over: "rms", one number for the tensor; "row_rms", one for each row, [V, 1, …], and for a tensor of
            fewer than two dimensions, which is one row; a number, itself.
    """
    if not isinstance(over, str):
        return over
    if not isinstance(p, Tensor):  # a list of them, or what stands for one in a kernel
        return p.rms(over)
    if torch.is_grad_enabled():
        p = p.clone()  # differentiable steps: θ is about to change, autograd must keep what it was
    by_row = over == "row_rms" and p.dim() > 1
    dims = tuple(range(int(by_row), p.dim()))
    dtype = torch.promote_types(p.dtype, torch.float32)
    norm = torch.linalg.vector_norm(p, dim=dims, keepdim=by_row, dtype=dtype)
    count = p[0].numel() if by_row and len(p) else p.numel()
    size = norm / max(count, 1) ** 0.5
    return size.masked_fill(size == 0, 1.0)
