"""From a rule to a kernel that takes one pass over the memory: C++ for a CPU, Triton for a GPU.

``minisign.engine`` loads this where ``fused`` asks for it, and nothing else does.

    vocabulary.py       the words that rules are written in
    trace.py            what a rule does, remembered: a program
    table.py            what a kernel is made for, and where its tensors lie
    cpp.py, step.h      the program as C++; what all such steps share      cpu.py    compiled and called
    triton.py, words.py the program as Triton; what all such share         gpu.py    launched
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch

from minisign.kernels.table import Unavailable


def backend(fused: bool | str, device: torch.device) -> Any:
    """The module whose ``step`` is meant by ``fused`` for parameters on ``device``, ready for use.

    Raises:
        Unavailable: no C++ compiler, no Triton, or no back end for the device; the message says what is
            missing.
    """
    name = fused if isinstance(fused, str) else {"cpu": "cpu", "cuda": "triton"}.get(device.type)
    if name == "cpu" and device.type == "cpu":
        from minisign.kernels import cpu

        cpu.compiler()
        return cpu
    if name == "triton" and device.type in ("cpu", "cuda"):
        try:
            import triton

            from minisign.kernels import gpu
            from minisign.kernels.words import INTERPRETED
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
        return gpu
    raise Unavailable(f"fused={fused!r} has no back end for parameters on {device.type!r}")


def release(package: ModuleType) -> tuple[int, ...]:
    """The first two numbers of its version."""
    return tuple(map(int, package.__version__.split(".")[:2]))
