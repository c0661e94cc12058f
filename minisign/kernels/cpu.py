"""Compiles what cpp.py writes, once for each text and processor, and calls it."""

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

from minisign.kernels import cpp
from minisign.kernels.cache import folder
from minisign.kernels.program import Program
from minisign.kernels.table import FMA_ON_CPU, Call, Form, Launch, Unavailable

HEADER = Path(__file__).with_name("step.h")
TORCH = Path(torch.__file__).parent / "include"  # bfloat16 and float16
COMPILERS = ("c++", "g++", "clang++")
# -ffp-contract=off: a multiply-add is fused where the source says so, and nowhere else.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}


class Shared(ctypes.Structure):
    """``Shared`` of step.h."""

    _fields_ = (
        ("d", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("lr", "unscale", "shrink", "center")),
        ("threads", ctypes.c_int32),
    )


def compiler() -> str:
    """Its name.

    Raises:
        Unavailable: there is none.
    """
    name = os.environ.get("CXX") or next((c for c in COMPILERS if shutil.which(c)), None)
    if name is None or shutil.which(name) is None:
        raise Unavailable(
            f"fused=True on a CPU needs a C++ compiler, and there is no {name or ', '.join(COMPILERS)} "
            "on PATH: install one (Debian: apt install g++; macOS: xcode-select --install), point CXX to "
            "it, or leave fused out"
        )
    return name


def step(program: Program, launch: Launch, call: Call, cache: object = None) -> None:
    """One call for all tensors. ``cache`` is the other back end's."""
    if call.found_inf is not None and call.found_inf.item():
        return
    sign = np.float32(call.sign)
    numbers = (ctypes.c_double * len(call.numbers))(*call.numbers)
    shared = Shared(
        d=ctypes.addressof(numbers),
        lr=0.0 if call.lr is None else call.lr.item(),
        unscale=sign if call.grad_scale is None else sign / np.float32(call.grad_scale.item()),
        shrink=call.shrink,
        center=call.center,
        threads=torch.get_num_threads(),
    )
    table = launch.table.buffer_info()[0]
    made(program, launch.form).minisign_step(ctypes.addressof(shared), table, launch.count)


@functools.cache
def made(program: Program, form: Form) -> Any:
    """The library with the compiled step; its first use on a machine takes a second or two.

    Raises:
        Unavailable: no compiler, or one that fails; with what to do, or with what it says.
    """
    text = cpp.write(program, form)
    threads = () if platform.system() == "Darwin" else ("-fopenmp",)  # Apple's compiler has no OpenMP
    contract = () if FMA_ON_CPU else ("-DNO_FMA",)
    capability = INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())
    command = (
        compiler(),
        *FLAGS,
        *threads,
        *contract,
        *capability,
        f"-DSHARED_BYTES={ctypes.sizeof(Shared)}",
        f"-I{HEADER.parent}",
        f"-I{TORCH}",
    )
    key = repr(
        (text, HEADER.read_text(), command, torch.__version__, platform.machine(), platform.system())
    )
    target = folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    if not _is_whole(target):
        _compile(text, command, target)
    loaded = ctypes.CDLL(str(target))
    loaded.minisign_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    loaded.minisign_step.restype = None
    return loaded


def _is_whole(path: Path) -> bool:
    """Whether a library ends with the check sum of what is before; a loader does not mind it."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


def _compile(text: str, command: tuple[str, ...], target: Path) -> None:
    # In a folder of its own first: another process may be compiling the same.
    with tempfile.TemporaryDirectory(dir=target.parent) as own:
        source, made = Path(own) / "step.cpp", Path(own) / target.name
        source.write_text(text)
        result = subprocess.run(
            [*command, str(source), "-o", str(made)], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise Unavailable(
                f"fused=True: {command[0]} could not compile a step; leave fused out, or set CXX to "
                f"another compiler. It says:\n{result.stderr.strip()}"
            )
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        made.replace(target)
