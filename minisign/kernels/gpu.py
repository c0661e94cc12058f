"""Launches the kernels of triton_step.py: the tables they read, and what they are compiled for."""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from minisign.kernels.rule import COLUMNS, RMS, Launch, Rule, lerp
from minisign.kernels.triton_step import (
    BLOCK,
    INTERPRETED,
    ROW_BLOCK,
    WARPS,
    Form,
    Numbers,
    step_blocks,
    step_rows,
)

TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TABLES_KEPT = 16


class Table(NamedTuple):
    """On the device: who lies where, and which program is for whom."""

    columns: Tensor  # [n · COLUMNS], int64
    owners: Tensor  # [programs], int32: the tensor
    firsts: Tensor  # [n], int64: the first program of a tensor
    squares: Tensor  # [n], float64, for LOOK
    bad: Tensor  # [n], int32, for LOOK


def step(
    rule: Rule,
    launch: Launch,
    cache: dict[Any, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One launch for all tensors, or two where the rule looks first, and as many again for those that do
    not begin at a multiple of 16 bytes; the arguments are those of :func:`minisign.kernels.step`."""
    if launch.steps:
        torch._foreach_add_(launch.steps, 1.0)
        if found_inf is not None:  # a step that is not made does not count
            torch._foreach_sub_(launch.steps, [found_inf.reshape(())] * len(launch.steps))
    lines = launch.columns
    odd = {i // COLUMNS for c in (0, 1, 2, 3, 8) for i in range(c, len(lines), COLUMNS) if lines[i] % 16}
    if not odd:
        _launch(rule, launch, lines, True, cache, grad_scale, found_inf)
        return
    for aligned in (True, False):
        chosen = [i for i in range(len(launch.items)) if (i not in odd) == aligned]
        if chosen:
            part = array("q", [x for i in chosen for x in lines[i * COLUMNS : (i + 1) * COLUMNS]])
            _launch(rule, launch, part, aligned, cache, grad_scale, found_inf)


def _launch(
    rule: Rule,
    launch: Launch,
    lines: array[int],
    aligned: bool,
    cache: dict[Any, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    device, by_rows = launch.device, launch.which is not None
    table = _table(lines, by_rows, cache, device)
    nothing = cache.get(device)
    if nothing is None:
        nothing = cache[device] = torch.zeros(1, device=device)
    form = form_of(rule, launch.which, launch.types, aligned, grad_scale is not None)
    lr = rule.lr.reshape(1).float() if isinstance(rule.lr, Tensor) else nothing
    arguments = (
        table.columns,
        table.owners,
        table.firsts,
        table.squares,
        table.bad,
        nothing if found_inf is None else found_inf,
        nothing if grad_scale is None else grad_scale,
        lr.to(device),
        numbers_of(rule),
    )
    kernel = (step_rows if by_rows else step_blocks)[(len(table.owners),)]
    options: dict[str, Any] = {} if INTERPRETED else options_of()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if form.guard or (rule.scale == RMS and rule.move and not by_rows):
            table.squares.zero_()
            table.bad.zero_()
            kernel(*arguments, FORM=form._replace(look=True), **options)
        kernel(*arguments, FORM=form, **options)


def form_of(
    rule: Rule, which: int | None, types: tuple[torch.dtype, ...], aligned: bool, unscale: bool = False
) -> Form:
    """What a kernel is compiled for."""
    p, g, m = (TRITON_TYPES[t] for t in types)
    return Form(
        look=False,
        kind=rule.kind,
        scale=rule.scale,
        rows=which or 0,
        memory=rule.memory[0],
        toward=lerp(rule.toward)[0],
        guard=rule.guard and rule.fold,
        move=rule.move,
        fold=rule.fold,
        rounded=rule.rounded,
        unscale=unscale,
        lr_tensor=isinstance(rule.lr, Tensor),
        log2_beta1=_log2(rule.betas[0]),
        log2_beta2=_log2(rule.betas[1]),
        p=p,
        g=g,
        m=m,
        aligned=aligned,
        block=BLOCK if which is None else ROW_BLOCK,
    )


def options_of() -> dict[str, Any]:
    """How a kernel is compiled. Triton's own default of fusing multiply-adds changes between versions."""
    return {"num_warps": WARPS, "enable_fp_fusion": False}


def numbers_of(rule: Rule) -> Numbers:
    """What changes from step to step."""
    lr = 0.0 if isinstance(rule.lr, Tensor) else rule.lr
    numbers = Numbers(
        lr=lr,
        lr_rest=lr - float(np.float32(lr)),
        decay=0.0 if isinstance(rule.lr, Tensor) else rule.decay(lr),
        weight_decay=rule.weight_decay,
        keep=rule.keep,
        weight=rule.weight,
        memory=rule.memory[1],
        toward=lerp(rule.toward)[1],
        beta2=rule.betas[1],
        square=1 - rule.betas[1],
        eps=rule.eps,
        shrink=rule.shrink,
        center=rule.center,
        sign=-1.0 if rule.maximize else 1.0,
    )
    return Numbers(*(float(np.float32(x)) for x in numbers))  # the interpreter would keep float64


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -1e9  # 0 to any power t ≥ 1 is 0


def _table(lines: array[int], by_rows: bool, cache: dict[Any, Any], device: torch.device) -> Table:
    """These lines on the device; sent anew only where an address is another one."""
    tables: OrderedDict[Any, Table] = cache.setdefault("tables", OrderedDict())
    key = (by_rows, device, lines.tobytes())
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if key not in tables:
        if capturing:
            raise RuntimeError(
                "a CUDA graph cannot capture the first step on gradients at new addresses: make one step "
                "before the capture and keep the gradients, zero_grad(set_to_none=False)"
            )
        columns = torch.tensor(lines, dtype=torch.int64)
        counts = columns[9::COLUMNS] if by_rows else -(-columns[5::COLUMNS] // BLOCK)
        n = len(counts)
        tables[key] = Table(
            columns=_send(columns, device),
            owners=_send(torch.arange(n, dtype=torch.int32).repeat_interleave(counts), device),
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
