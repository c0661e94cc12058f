"""Fused back ends: one pass over the memory for all tensors of a group.

``minisign.optim`` loads this where ``fused`` asks for it, and nothing else does.

    rule.py            what is to be computed, in numbers
    triton_step.py     the kernels for GPUs, which also run under Triton's interpreter on a CPU
    gpu.py             their launch: tables of addresses, and which variant is compiled
    cpu.cpp, cpu.py    the same step for CPUs, in C++, compiled at first use
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisign.kernels.rule import TYPES, Launch, Rule, Unavailable


def backend(fused: bool | str, device: torch.device) -> str:
    """Which back end ``fused`` means for parameters on ``device``, ready for use.

    Raises:
        Unavailable: no C++ compiler, no Triton, or no back end for the device; the message says what is
            missing.
    """
    name = fused if isinstance(fused, str) else {"cpu": "cpu", "cuda": "triton"}.get(device.type)
    if name == "cpu" and device.type == "cpu":
        from minisign.kernels import cpu

        cpu.library()
        return name
    if name == "triton" and device.type in ("cpu", "cuda"):
        try:
            import triton

            from minisign.kernels.triton_step import INTERPRETED
        except ImportError as error:
            raise Unavailable(
                f"fused={fused!r} on {device.type} needs Triton, which cannot be loaded ({error}); "
                "PyTorch's CUDA builds bring it, elsewhere: pip install triton"
            ) from error
        if device.type == "cuda" and INTERPRETED:
            raise Unavailable(
                "TRITON_INTERPRET=1 is set, which runs kernels on the CPU: unset it to step on a GPU"
            )
        if device.type == "cpu" and not INTERPRETED:
            raise Unavailable(
                "fused='triton' on CPU tensors runs in Triton's interpreter only, for tests and lessons: "
                "set TRITON_INTERPRET=1 before the first import, or take fused=True"
            )
        if INTERPRETED and release(triton) < (3, 7) and release(np) >= (2, 4):
            raise Unavailable(
                f"the interpreter of Triton {triton.__version__} stops at loops under NumPy "
                f"{np.__version__}: pip install 'numpy<2.4', or a PyTorch with Triton 3.7"
            )
        return name
    raise Unavailable(f"fused={fused!r} has no back end for parameters on {device.type!r}")


def release(package: ModuleType) -> tuple[int, ...]:
    """The first two numbers of its version."""
    return tuple(map(int, package.__version__.split(".")[:2]))


def takes(p: Tensor, g: Tensor, buffers: Sequence[Tensor], by_rows: bool) -> bool:
    """Whether the kernels can step on these: dense, of one memory order, float32, bfloat16 or float16."""
    if p.dtype not in TYPES or g.dtype not in TYPES or g.device != p.device:
        return False
    kind = buffers[0].dtype
    if any(b.dtype != kind or b.device != p.device for b in buffers) or kind not in TYPES:
        return False
    if p.is_contiguous():
        return g.is_contiguous() and all(b.is_contiguous() for b in buffers)
    if by_rows or not torch.ops.aten.is_non_overlapping_and_dense(p):
        return False
    return all(x.stride() == p.stride() and x.shape == p.shape for x in (g, *buffers))


def step(
    name: str,
    rule: Rule,
    launch: Launch,
    cache: dict[Any, Any],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step on tensors that :func:`takes` accepts.

    Args:
        name: from :func:`backend`.
        cache: the caller keeps it from step to step; what is in it is the back end's matter.
        grad_scale: 1-element float32, by which gradients are divided. found_inf: 1-element float32; where
            it is not 0 nothing happens.
    """
    if name == "cpu":
        from minisign.kernels import cpu as module
    else:
        from minisign.kernels import gpu as module  # type: ignore[no-redef]
    module.step(rule, launch, cache, grad_scale, found_inf)
