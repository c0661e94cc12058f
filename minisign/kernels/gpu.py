"""Launches what triton.py writes: the tables that the kernel of words.py reads, and what is compiled."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from array import array
from collections import OrderedDict
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from minisign.kernels import triton, words
from minisign.kernels.cache import folder, keep
from minisign.kernels.program import Program
from minisign.kernels.table import COUNT, SIZE, WIDTH, B, Call, Form, Launch, P

TABLES_KEPT = 16


class Table(NamedTuple):
    """On the device: who lies where, and which program is for whom."""

    columns: Tensor  # [n · width], int64
    owners: Tensor  # [programs], int32: the tensor
    firsts: Tensor  # [n], int64: the first program of a tensor
    squares: Tensor  # [n], float64: looks
    bad: Tensor  # [n], int32: looks


@functools.cache
def made(program: Program, form: Form) -> ModuleType:
    """The module with what is the rule's own. It is a file: Triton reads the source of what it compiles."""
    text = triton.write(program, form)
    name = f"made_{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    path = folder() / f"{name}.py"
    if not path.exists() or path.read_text() != text:
        keep(path, text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    found = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def step(program: Program, launch: Launch, call: Call, cache: dict[Any, Any]) -> None:
    """One launch for all tensors, or two where something must be known first, and as many again for those
    that do not begin at a multiple of 16 bytes. ``cache`` is kept by the caller from step to step."""
    if launch.steps:
        torch._foreach_add_(launch.steps, 1.0)
        if call.found_inf is not None:  # a step that is not made does not count
            found_inf = call.found_inf.reshape(()).to(launch.device)
            torch._foreach_sub_(launch.steps, [found_inf] * len(launch.steps))
    lines, width, buffers = launch.table, launch.width, len(program.buffers)
    addresses = [*range(P, B + buffers), *([WIDTH] if launch.form.rows else [])]
    odd = {i // width for c in addresses for i in range(c, len(lines), width) if lines[i] % 16}
    for aligned in (True, False):
        chosen = [i for i in range(launch.count) if (i not in odd) == aligned]
        if chosen:
            part = (
                array("q", [x for i in chosen for x in lines[i * width : (i + 1) * width]])
                if odd
                else lines
            )
            _launch(program, launch, part, aligned, call, cache)


def _launch(
    program: Program, launch: Launch, lines: array[int], aligned: bool, call: Call, cache: dict[Any, Any]
) -> None:
    device, form = launch.device, launch.form
    table = _table(launch, lines, cache)
    if ("none", device) not in cache:
        cache["none", device] = torch.tensor([[0.0], [1.0]], dtype=torch.float32, device=device)
    zero, one = cache["none", device]
    arguments = (
        *table,
        zero if call.found_inf is None else call.found_inf.float().to(device),
        one if call.grad_scale is None else call.grad_scale.float().to(device).reciprocal(),
        zero if call.lr is None else call.lr.reshape(1).float().to(device),
        numbers_of(call),
    )
    kernel = words.step[(len(table.owners),)]
    fixed = constants(program, form, launch.width, aligned)
    if not len(table.owners):
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if form.guard or (program.size == "tensor" and not form.rows):
            table.squares.zero_()
            table.bad.zero_()
            kernel(*arguments, **{**fixed, "BODY": words.look}, LOOK=True)
        kernel(*arguments, **fixed, LOOK=False)


def constants(program: Program, form: Form, columns: int, aligned: bool) -> dict[str, Any]:
    """What the kernel is compiled for."""
    p, g = (getattr(tl, name) for name in form.types[:2])
    shape = words.Shape(
        p, g, len(program.buffers), columns, program.size, form.guard, form.rows, form.sought, aligned,
        words.BLOCK,
    )  # fmt: skip
    # Triton's own default of fusing multiply-adds changes between versions.
    options = {} if words.INTERPRETED else {"num_warps": words.WARPS, "enable_fp_fusion": False}
    return {"BODY": made(program, form).move, "SHAPE": shape, **options}


def numbers_of(call: Call) -> words.Numbers:
    """What changes from step to step, as float32; the interpreter would keep float64."""
    k = tuple(float(np.float32(x)) for x in call.numbers)
    rest = tuple(float(np.float32(x - y)) for x, y in zip(call.numbers, k, strict=True))
    return words.Numbers(k, rest, *(float(np.float32(x)) for x in (call.sign, call.shrink, call.center)))


def _table(launch: Launch, lines: array[int], cache: dict[Any, Any]) -> Table:
    """These lines on the device; sent anew only where an address is another one."""
    device, width, rows = launch.device, launch.width, launch.form.rows
    tables: OrderedDict[Any, Table] = cache.setdefault("tables", OrderedDict())
    key = (rows, device, lines.tobytes())
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if key not in tables:
        if capturing:
            raise RuntimeError(
                "a CUDA graph cannot capture the first step on gradients at new addresses: make one step "
                "before the capture and keep the gradients, zero_grad(set_to_none=False)"
            )
        columns = torch.tensor(lines, dtype=torch.int64, device="cpu")
        sizes = columns[SIZE::width]
        counts = columns[COUNT::width] if rows else -(-sizes // words.BLOCK)
        n = len(counts)
        owners = torch.arange(n, dtype=torch.int32, device="cpu").repeat_interleave(counts)
        tables[key] = Table(
            columns=_send(columns, device),
            owners=_send(owners, device),
            firsts=_send(counts.cumsum(0) - counts, device),
            squares=torch.zeros(n, dtype=torch.float64, device=device),
            bad=torch.zeros(n, dtype=torch.int32, device=device),
        )
        if len(tables) > TABLES_KEPT:
            tables.popitem(last=False)
    tables.move_to_end(key)
    if capturing:  # the graph will read it whenever it runs
        cache.setdefault("captured", []).append(tables[key])
    return tables[key]


def _send(x: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for what it is at."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
