"""Compiles cpu.cpp, once for each source and processor, and calls it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisign.kernels.rule import FMA_ON_CPU, TYPES, Launch, Rule, Unavailable, lerp

SOURCE = Path(__file__).with_name("cpu.cpp")
COMPILERS = ("c++", "g++", "clang++")
# -ffp-contract=off: a multiply-add is fused where the source says so, and nowhere else.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}


class Shared(ctypes.Structure):
    """``Shared`` of cpu.cpp."""

    _fields_ = (
        [(name, ctypes.c_double) for name in ("lr", "beta1", "beta2")]
        + [
            (name, ctypes.c_float)
            for name in (
                "decay weight_decay keep weight memory toward beta2_float square eps shrink center unscale"
            ).split()
        ]
        + [
            (name, ctypes.c_int32)
            for name in (
                "kind scale memory_form toward_form rows guard move fold rounded p_type g_type m_type"
            ).split()
        ]
    )


@functools.cache
def library() -> Any:
    """The compiled step; the first call on a machine takes some seconds.

    Raises:
        Unavailable: no compiler, or one that fails; with what to do, or with what it says.
    """
    compiler = os.environ.get("CXX") or next((c for c in COMPILERS if shutil.which(c)), None)
    if compiler is None or shutil.which(compiler) is None:
        raise Unavailable(
            f"fused=True on a CPU needs a C++ compiler, and there is no {compiler or ', '.join(COMPILERS)} "
            "on PATH: install one (Debian: apt install g++; macOS: xcode-select --install), point CXX to "
            "it, or leave fused out"
        )
    threads = () if platform.system() == "Darwin" else ("-fopenmp",)  # Apple's compiler has no OpenMP
    contract = () if FMA_ON_CPU else ("-DNO_FMA",)
    flags = (*FLAGS, *threads, *contract, *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ()))
    key = repr((SOURCE.read_bytes(), compiler, flags, platform.machine(), platform.system()))
    target = _folder() / f"step-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        _compile([compiler, *flags, str(SOURCE)], target)
    return _load(target)


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "minisign"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
    except OSError:
        usable = False
    return folder if usable else Path(tempfile.mkdtemp(prefix="minisign-"))


def _compile(command: list[str], target: Path) -> None:
    # Under a name of its own first: another process may be compiling the same.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        result = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if result.returncode:
            raise Unavailable(
                f"fused=True: {command[0]} could not compile {SOURCE.name}; leave fused out, or set CXX to "
                f"another compiler. It says:\n{result.stderr.strip()}"
            )
        made.replace(target)


def _load(path: Path) -> Any:
    loaded = ctypes.CDLL(str(path))
    loaded.minisign_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    loaded.minisign_step.restype = None
    return loaded


def step(
    rule: Rule,
    launch: Launch,
    cache: dict[Any, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One call for all tensors; the arguments are those of :func:`minisign.kernels.step`."""
    if found_inf is not None and found_inf.item():
        return
    if cache.get("launch") is not launch or isinstance(rule.lr, Tensor) or cache["rule"] != rule:
        cache.update(launch=launch, rule=rule, shared=_shared(rule, launch))
    shared: Shared = cache["shared"]
    sign = -1.0 if rule.maximize else 1.0
    shared.unscale = sign if grad_scale is None else float(np.float32(sign) / np.float32(grad_scale.item()))
    library().minisign_step(
        ctypes.addressof(shared),
        launch.columns.buffer_info()[0],
        len(launch.items),
        torch.get_num_threads(),
    )


def _shared(rule: Rule, launch: Launch) -> Shared:
    lr = float(rule.lr)
    memory_form, memory = rule.memory
    toward_form, toward = lerp(rule.toward)
    beta1, beta2 = rule.betas
    return Shared(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        decay=rule.decay(lr),
        weight_decay=rule.weight_decay,
        keep=rule.keep,
        weight=rule.weight,
        memory=memory,
        toward=toward,
        beta2_float=beta2,
        square=1 - beta2,
        eps=rule.eps,
        shrink=rule.shrink,
        center=rule.center,
        kind=rule.kind,
        scale=rule.scale,
        memory_form=memory_form,
        toward_form=toward_form,
        rows=launch.which or 0,
        guard=rule.guard,
        move=rule.move,
        fold=rule.fold,
        rounded=rule.rounded,
        **{f"{x}_type": TYPES.index(t) for x, t in zip("pgm", launch.types, strict=True)},
    )
