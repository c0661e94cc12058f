"""The step as Triton kernels: one launch for all tensors of a group.

A program takes one block of one tensor. Which, it reads from two tables: `owners` says whose block this
is, and that tensor's line in `table` where its parameter, gradient and momentum lie: addresses, which
become pointers here. So gradients stay where autograd left them, nothing is copied together, and nothing
is launched for each tensor.

    step_blocks      every entry of every tensor
    step_rows        a row for each program: lazy rows, and steps relative to the size of a row

Each has two phases. LOOK gathers what must be known of a whole tensor before one entry of it may move
(is its gradient finite, how large are the weights); it is launched only where a rule asks for that.

Under TRITON_INTERPRET=1 (set before this is imported) the same code runs on a CPU, program by program, in
NumPy. Arithmetic is float32, and equal to cpu.cpp to the last bit: fused multiply-adds are written, never
left to the compiler, and division and root are the rounded ones. There is no autotuning: it would apply
the step several times.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl

from minisign.kernels import rule

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Entries of a program, and its warps: 8 entries a thread, which are 16 bytes of bfloat16, are what an H200
# is fastest with (benchmarks/gpu.py, blocks).
BLOCK = 1024
ROW_BLOCK = 1024
WARPS = 4


class Form(NamedTuple):
    """What a kernel is compiled for."""

    look: bool
    kind: int
    scale: int
    rows: int
    memory: int
    toward: int
    guard: bool
    move: bool
    fold: bool
    rounded: bool
    unscale: bool
    lr_tensor: bool
    log2_beta1: float  # AdamW's; in float64, which an argument would not be
    log2_beta2: float
    p: Any
    g: Any
    m: Any
    aligned: bool
    block: int


class Numbers(NamedTuple):
    """What changes from step to step, as float32."""

    lr: float
    lr_rest: float  # what float32 leaves of it
    decay: float
    weight_decay: float
    keep: float
    weight: float
    memory: float
    toward: float
    beta2: float
    square: float
    eps: float
    shrink: float
    center: float
    sign: float  # −1 to maximize


# A kernel sees numbers from outside only as constexpr.
_LION, _ADAMW = tl.constexpr(rule.LION), tl.constexpr(rule.ADAMW)
_NUMBER, _RMS, _ROW_RMS = tl.constexpr(rule.NUMBER), tl.constexpr(rule.RMS), tl.constexpr(rule.ROW_RMS)
_FROM_M, _SUM = tl.constexpr(rule.FROM_M), tl.constexpr(rule.SUM)
_BY_GRADIENT, _MASK = tl.constexpr(rule.BY_GRADIENT), tl.constexpr(rule.MASK)
_LIST, _LIST_BY_GRADIENT = tl.constexpr(rule.LIST), tl.constexpr(rule.LIST_BY_GRADIENT)
_COLUMNS = tl.constexpr(rule.COLUMNS)
_INTERPRETED = tl.constexpr(INTERPRETED)
_FMA_ON_CPU = tl.constexpr(rule.FMA_ON_CPU)


# --- arithmetic -----------------------------------------------------------------------------------


@triton.jit
def _fma(a, b, c):
    if _INTERPRETED and _FMA_ON_CPU:  # NumPy has none: the product of two float32 is exact in float64
        return (a.to(tl.float64) * b + c).to(tl.float32)
    elif _INTERPRETED:
        return a * b + c
    else:
        return tl.fma(a, b, c)


@triton.jit
def _lerp(a, b, coefficient, FROM: tl.constexpr):
    start = b
    if FROM == _FROM_M:
        start = a
    return _fma(b - a, coefficient, start)


@triton.jit
def _sign(x):
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)  # 0 of 0 and of NaN


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _narrow(x, i, key, DTYPE: tl.constexpr, ROUNDED: tl.constexpr):
    """float32 as DTYPE: to the nearest, or at random (minisign/optim/rounding.py says how)."""
    if (ROUNDED or _INTERPRETED) and DTYPE == tl.bfloat16:  # noqa: SIM300, DTYPE varies
        bits = x.to(tl.uint32, bitcast=True)
        if ROUNDED:
            low, high = i.to(tl.uint32), (i >> 32).to(tl.uint32)
            up = _mix(low * 0x9E3779B1 + high * 0x85EBCA77 + key) >> 16
        else:  # the interpreter would cut off where a GPU rounds to nearest, ties to even
            up = ((bits >> 16) & 1) + 0x7FFF
        bits = tl.where(x == x, (bits + up) & 0xFFFF0000, 0x7FC00000)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(DTYPE)


# --- memory ---------------------------------------------------------------------------------------


@triton.jit
def _pointer(line, column: tl.constexpr, TYPE: tl.constexpr, FORM: tl.constexpr):
    pointer = tl.load(line + column).to(tl.pointer_type(TYPE))
    if FORM.aligned:  # the host has looked: loads and stores of 16 bytes
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer, i, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer + i, mask=mask, other=0).to(tl.float32)
    else:
        return tl.load(pointer + i).to(tl.float32)


@triton.jit
def _store(pointer, i, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + i, value, mask=mask)
    else:
        tl.store(pointer + i, value)


@triton.jit
def _some_not_finite(g):
    exponent = g.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.max((exponent == 0x7F800000).to(tl.int32), axis=0)


@triton.jit
def _squares(p):
    return tl.sum(p.to(tl.float64) * p.to(tl.float64), axis=0)


@triton.jit
def _look(line, i, mask, squares, bad, FORM: tl.constexpr, MASKED: tl.constexpr):
    if FORM.guard:
        tl.atomic_max(bad, _some_not_finite(_load(_pointer(line, 1, FORM.g, FORM), i, mask, MASKED)))
    if FORM.scale == _RMS:
        tl.atomic_add(squares, _squares(_load(_pointer(line, 0, FORM.p, FORM), i, mask, MASKED)))


@triton.jit
def _rms(squares, count):
    size = tl.sqrt(squares / count).to(tl.float32)
    return tl.where(size == 0, 1.0, size)


# --- one block ------------------------------------------------------------------------------------


@triton.jit
def _rates(line, numbers, lr_pointer, size, FORM: tl.constexpr):
    """What one tensor, or row, has for itself: η, 1 − ηλ, AdamW's two corrections, the key of the noise."""
    if FORM.lr_tensor:
        lr = tl.load(lr_pointer).to(tl.float64)
        eta = lr.to(tl.float32)
        decay = 1.0 - eta * numbers.weight_decay
    else:
        lr = tl.full([], numbers.lr, tl.float64) + tl.full([], numbers.lr_rest, tl.float64)
        eta = tl.full([], numbers.lr, tl.float32)
        decay = tl.full([], numbers.decay, tl.float32)
    if FORM.scale != _NUMBER:
        is_vector = tl.load(line + 7) != 0
        eta = eta * tl.where(is_vector, 0.5, size)
        decay = tl.where(is_vector, 1.0, 1.0 - eta * numbers.weight_decay)
    step_size, root, key = eta, eta, tl.full([], 0, tl.uint32)
    if FORM.kind == _ADAMW or FORM.rounded:
        count = tl.load(tl.load(line + 4).to(tl.pointer_type(tl.float32)))
        if FORM.kind == _ADAMW:
            one, t = tl.full([], 1.0, tl.float64), count.to(tl.float64)
            step_size = (lr / (one - tl.exp2(t * FORM.log2_beta1))).to(tl.float32)
            root = tl.sqrt(one - tl.exp2(t * FORM.log2_beta2)).to(tl.float32)
        if FORM.rounded:
            key = _mix(tl.load(line + 6).to(tl.uint32) + count.to(tl.uint32))
    return eta, decay, step_size, root, key


@triton.jit
def _of_all(bad, grad_scale, numbers, FORM: tl.constexpr):
    """What gradients are multiplied by, and whether all of this tensor's are finite."""
    unscale, finite = numbers.sign, True
    if FORM.unscale:
        unscale = tl.div_rn(numbers.sign, tl.load(grad_scale))
    if FORM.guard:
        finite = tl.load(bad) == 0
    return unscale, finite


@triton.jit
def _step(line, i, g_i, mask, unscale, finite, rates, numbers, FORM: tl.constexpr, MASKED: tl.constexpr):
    """Entries i of parameter and momentum, and g_i of the gradient, are read, moved and written."""
    eta, decay, step_size, root, key = rates
    p_pointer, m_pointer = _pointer(line, 0, FORM.p, FORM), _pointer(line, 2, FORM.m, FORM)
    p = _load(p_pointer, i, mask, MASKED)
    m = _load(m_pointer, i, mask, MASKED)
    before, moved, direction = m, p, m
    if FORM.fold:
        g = _load(_pointer(line, 1, FORM.g, FORM), g_i, mask, MASKED) * unscale
        if FORM.kind == _LION:
            direction = _lerp(m, g, numbers.toward, FORM.toward)
        if FORM.memory == _SUM:
            m = _fma(g, numbers.weight, m * numbers.keep)
        else:
            m = _lerp(m, g, numbers.memory, FORM.memory)
        if FORM.kind == _ADAMW:
            v_pointer = _pointer(line, 3, FORM.m, FORM)
            v = _fma(g * numbers.square, g, _load(v_pointer, i, mask, MASKED) * numbers.beta2)
            # Before Triton 3.6 these take subnormal numbers for zero; ε and p beside them are much larger.
            moved = p * decay + tl.div_rn(m * -step_size, tl.div_rn(tl.sqrt_rn(v), root) + numbers.eps)
            _store(v_pointer, i, _narrow(v, i, key, FORM.m, False), mask, MASKED)
        elif FORM.kind != _LION:
            direction = m
    if FORM.kind != _ADAMW and FORM.move:
        moved = p * decay - _sign(direction) * eta
    if FORM.guard:
        moved = tl.where(finite, moved, (p - numbers.center) * numbers.shrink + numbers.center)
        m = tl.where(finite, m, before)
    if FORM.fold:
        _store(m_pointer, i, _narrow(m, i, key, FORM.m, False), mask, MASKED)
    if FORM.move:
        _store(p_pointer, i, _narrow(moved, i, key, FORM.p, FORM.rounded), mask, MASKED)
    elif FORM.guard:  # it stays, unless it shrinks
        _store(p_pointer, i, _narrow(moved, i, key, FORM.p, FORM.rounded), mask & (finite == 0), True)


# --- the two kernels ------------------------------------------------------------------------------


@triton.jit
def step_blocks(
    table, owners, firsts, squares, bad, found_inf, grad_scale, lr, numbers, FORM: tl.constexpr
):  # fmt: skip
    """A block for each program; the last one of a tensor has a mask, which costs it wide loads."""
    block = tl.program_id(0)
    owner = tl.load(owners + block)
    line = table + owner * _COLUMNS
    size = tl.load(line + 5)
    start = (block - tl.load(firsts + owner)).to(tl.int64) * FORM.block  # beyond 2³¹ entries too
    i = start + tl.arange(0, FORM.block)
    mask = i < size
    if tl.load(found_inf) == 0:
        if FORM.look:
            if start + FORM.block <= size:
                _look(line, i, mask, squares + owner, bad + owner, FORM, False)
            else:
                _look(line, i, mask, squares + owner, bad + owner, FORM, True)
        else:
            unscale, finite = _of_all(bad + owner, grad_scale, numbers, FORM)
            rms = numbers.lr
            if FORM.scale == _RMS:
                rms = _rms(tl.load(squares + owner), size)
            rates = _rates(line, numbers, lr, rms, FORM)
            if start + FORM.block <= size:
                _step(line, i, i, mask, unscale, finite, rates, numbers, FORM, False)
            else:
                _step(line, i, i, mask, unscale, finite, rates, numbers, FORM, True)


@triton.jit
def step_rows(
    table, owners, firsts, squares, bad, found_inf, grad_scale, lr, numbers, FORM: tl.constexpr
):  # fmt: skip
    """A row for each program. One that nothing touched costs its flag, or its gradient, and no more."""
    block = tl.program_id(0)
    owner = tl.load(owners + block)
    line = table + owner * _COLUMNS
    width = tl.load(line + 8)
    if FORM.aligned:
        width = tl.multiple_of(width, 16)
    row = (block - tl.load(firsts + owner)).to(tl.int64)
    g_start = row * width
    moves = tl.load(found_inf) == 0
    if FORM.rows == _LIST or FORM.rows == _LIST_BY_GRADIENT:
        row = tl.load(tl.load(line + 10).to(tl.pointer_type(tl.int64)) + row)
    elif FORM.rows == _MASK:
        moves = moves & (tl.load(tl.load(line + 10).to(tl.pointer_type(tl.int8)) + row) != 0)
    start = row * width
    if FORM.rows == _BY_GRADIENT or FORM.rows == _LIST_BY_GRADIENT:
        some = tl.full([], 0, tl.int32)
        for first in range(0, width, FORM.block):
            k = first + tl.arange(0, FORM.block)
            g = _load(_pointer(line, 1, FORM.g, FORM), g_start + k, k < width, True)
            some = tl.maximum(some, tl.max((g != 0).to(tl.int32), axis=0))
        moves = moves & (some != 0)
    if moves:
        if FORM.look:
            for first in range(0, width, FORM.block):
                k = first + tl.arange(0, FORM.block)
                g = _load(_pointer(line, 1, FORM.g, FORM), g_start + k, k < width, True)
                tl.atomic_max(bad + owner, _some_not_finite(g))
        else:
            unscale, finite = _of_all(bad + owner, grad_scale, numbers, FORM)
            rms = numbers.lr
            if FORM.scale == _ROW_RMS:
                squared = tl.full([], 0.0, tl.float64)
                for first in range(0, width, FORM.block):
                    k = first + tl.arange(0, FORM.block)
                    squared += _squares(_load(_pointer(line, 0, FORM.p, FORM), start + k, k < width, True))
                rms = _rms(squared, width)
            rates = _rates(line, numbers, lr, rms, FORM)
            for first in range(0, width, FORM.block):
                k = first + tl.arange(0, FORM.block)
                _step(line, start + k, g_start + k, k < width, unscale, finite, rates, numbers, FORM, True)
