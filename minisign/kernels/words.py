"""What all made Triton kernels share: the words that rules use, memory, and the kernel around a rule.

A program takes a span of one tensor: 1024 entries, or a row. Which, it reads from two tables: `owners` says
whose span this is, and that tensor's line in `table` (table.py) where its parameter, gradient and buffers
lie: addresses, which become pointers here. So gradients stay where autograd left them, nothing is copied
together, and nothing is launched for each tensor. Where something must be known of a whole tensor before
one entry of it moves (is its gradient finite, how large are the weights), a launch with LOOK goes before.

Under TRITON_INTERPRET=1 (set before this is imported) the same code runs on a CPU, program by program, in
NumPy. Arithmetic is float32, and equal to step.h to the last bit: fused multiply-adds are written, never
left to the compiler, and division and root are the rounded ones. There is no autotuning: it would apply the
step several times.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import triton
import triton.language as tl

from minisign.kernels.table import FMA_ON_CPU, KNOWN, NOISE, ROWS, SIZE, STEP, WIDTH, B, G, P

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Entries of a program, and its warps: 8 entries a thread, which are 16 bytes of bfloat16, are what an H200
# is fastest with (benchmarks/gpu.py, blocks).
BLOCK = 1024
WARPS = 4


class Numbers(NamedTuple):
    """What changes from step to step, as float32."""

    k: tuple[float, ...]  # the program's numbers
    rest: tuple[float, ...]  # what float32 leaves of them
    sign: float  # −1 to maximize
    shrink: float
    center: float


class Shape(NamedTuple):
    """What the kernel must know of a rule and its table."""

    p: tl.dtype
    g: tl.dtype
    buffers: int
    columns: int  # of a line
    size: str  # whose RMS is asked for: "tensor", "row" or ""
    guard: bool
    rows: str  # as in a Form
    sought: bool
    aligned: bool  # the host has looked: loads and stores of 16 bytes
    block: int


# A kernel sees what is outside only as constexpr.
_INTERPRETED, _FMA_ON_CPU = tl.constexpr(INTERPRETED), tl.constexpr(FMA_ON_CPU)
_STEP, _SIZE, _NOISE, _WIDTH, _ROWS, _KNOWN, _P, _G, _B = map(
    tl.constexpr, (STEP, SIZE, NOISE, WIDTH, ROWS, KNOWN, P, G, B)
)


# --- words ----------------------------------------------------------------------------------------


@triton.jit
def fma(a, b, c):
    if _INTERPRETED and _FMA_ON_CPU:  # NumPy has none: the product of two float32 is exact in float64
        return (a.to(tl.float64) * b + c).to(tl.float32)
    elif _INTERPRETED:
        return a * b + c
    else:
        return tl.fma(a, b, c)


@triton.jit
def lerp(a, b, w):
    near = tl.abs(w) < 0.5  # from the nearer end, as torch does
    return fma(b - a, tl.where(near, w, w - 1.0), tl.where(near, a, b))


@triton.jit
def sign_of(x):
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)  # 0 of 0 and of NaN


@triton.jit
def divided(a, b):
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)  # the rounded one, which is of float32 only


@triton.jit
def inverse_of(x):
    return divided(tl.full(x.shape, 1.0, x.dtype), x)


@triton.jit
def sqrt_of(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def tanh_of(x):
    e = tl.exp(-2.0 * tl.abs(x))
    size = tl.div_rn(1.0 - e, 1.0 + e)
    return tl.where(x < 0, -size, size)


@triton.jit
def larger_of(a, b):
    return tl.where((a > b) | (a != a), a, b)  # NaN stays NaN


@triton.jit
def smaller_of(a, b):
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def power_of(a, b):
    size = tl.where(b == 0, 1.0, tl.exp2(b * tl.log2(tl.abs(a))))
    is_odd = tl.floor(b * 0.5) * 2 != b  # of a whole b; of another, a negative a has no power
    return tl.where((a < 0) & is_odd, -size, size)


@triton.jit
def float_of(x):
    return x.to(tl.float32)


@triton.jit
def not_of(mask):
    return mask == 0


@triton.jit
def wide(x, rest):
    """float64, of which a kernel gets two parts."""
    return tl.full([], x, tl.float64) + tl.full([], rest, tl.float64)


# --- memory ---------------------------------------------------------------------------------------


@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def pointer(line, column: tl.constexpr, TYPE: tl.constexpr, SHAPE: tl.constexpr):
    found = tl.load(line + column).to(tl.pointer_type(TYPE))
    if SHAPE.aligned:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def load(P, i, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(P + i, mask=mask, other=0).to(tl.float32)
    else:
        return tl.load(P + i).to(tl.float32)


@triton.jit
def store(P, i, x, mask, key, TYPE: tl.constexpr, ROUNDED: tl.constexpr, MASKED: tl.constexpr):
    """float32 as TYPE: to the nearest, or at random (minisign/engine/rounding.py says how)."""
    if (ROUNDED or _INTERPRETED) and TYPE == tl.bfloat16:  # noqa: SIM300, TYPE varies
        bits = x.to(tl.uint32, bitcast=True)
        if ROUNDED:
            low, high = i.to(tl.uint32), (i >> 32).to(tl.uint32)
            up = mix(low * 0x9E3779B1 + high * 0x85EBCA77 + key) >> 16
        else:  # the interpreter would cut off where a GPU rounds to nearest, ties to even
            up = ((bits >> 16) & 1) + 0x7FFF
        bits = tl.where(x == x, (bits + up) & 0xFFFF0000, 0x7FC00000)
        x = bits.to(tl.float32, bitcast=True)
    if MASKED:
        tl.store(P + i, x.to(TYPE), mask=mask)
    else:
        tl.store(P + i, x.to(TYPE))


# --- looks ----------------------------------------------------------------------------------------


@triton.jit
def squares_of(p):
    return tl.sum(p.to(tl.float64) * p.to(tl.float64), axis=0)


@triton.jit
def look(line, i, g_i, mask, known, SHAPE: tl.constexpr, MASKED: tl.constexpr):
    squares, bad = known
    if SHAPE.guard:
        g = load(pointer(line, _G, SHAPE.g, SHAPE), g_i, mask, MASKED)
        exponent = g.to(tl.int32, bitcast=True) & 0x7F800000
        tl.atomic_max(bad, tl.max((exponent == 0x7F800000).to(tl.int32), axis=0))
    if SHAPE.size == "tensor":
        tl.atomic_add(squares, squares_of(load(pointer(line, _P, SHAPE.p, SHAPE), i, mask, MASKED)))


@triton.jit
def squares_of_row(line, start, n, SHAPE: tl.constexpr):
    found = tl.full([], 0.0, tl.float64)
    for first in range(0, n, SHAPE.block):
        k = first + tl.arange(0, SHAPE.block)
        found += squares_of(load(pointer(line, _P, SHAPE.p, SHAPE), start + k, k < n, True))
    return found


@triton.jit
def some_not_zero(line, start, n, SHAPE: tl.constexpr):
    found = tl.full([], 0, tl.int32)
    for first in range(0, n, SHAPE.block):
        k = first + tl.arange(0, SHAPE.block)
        g = load(pointer(line, _G, SHAPE.g, SHAPE), start + k, k < n, True)
        found |= tl.max((g != 0).to(tl.int32), axis=0)  # NaN is not
    return found != 0


@triton.jit
def size_of(squares, count, line):
    """The RMS, or what the table says in its place."""
    known = tl.load(line + _KNOWN).to(tl.float64, bitcast=True)
    found = tl.sqrt(squares / count)
    return tl.where(known == known, known, tl.where(found == 0, 1.0, found)).to(tl.float32)


@triton.jit
def own_number(line, i: tl.constexpr, SHAPE: tl.constexpr):
    return tl.load(line + _B + SHAPE.buffers + i).to(tl.float64, bitcast=True)


@triton.jit
def number_of_step(line):
    counter = tl.load(line + _STEP)
    number = tl.full([], 0.0, tl.float64)
    if counter != 0:
        number = tl.load(counter.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return number


# --- the kernel -----------------------------------------------------------------------------------


@triton.jit
def step(
    table, owners, firsts, squares, bad, found_inf, inverse_scale, lr, numbers,
    BODY: tl.constexpr, SHAPE: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """``BODY``: the rule, made by triton.py; or `look`, where LOOK is true."""
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    line = table + owner * SHAPE.columns
    size = tl.load(line + _SIZE)
    place = (program - tl.load(firsts + owner)).to(tl.int64)  # beyond 2³¹ entries too
    moves = tl.load(found_inf) == 0
    if SHAPE.rows != "":
        n = tl.load(line + _WIDTH)
        if SHAPE.aligned:
            n = tl.multiple_of(n, 16)
        start, g_start = place * n, place * n
        if SHAPE.rows == "listed":
            start = n * tl.load(tl.load(line + _ROWS).to(tl.pointer_type(tl.int64)) + place)
        if SHAPE.rows == "masked":
            moves &= tl.load(tl.load(line + _ROWS).to(tl.pointer_type(tl.int8)) + place) != 0
        if SHAPE.sought:  # noqa: SIM102 (the one when it is compiled, the other when it runs)
            if moves:
                moves = some_not_zero(line, g_start, n, SHAPE)
    else:
        start, g_start = place * SHAPE.block, place * SHAPE.block
        n = tl.minimum(size - start, SHAPE.block)
    if moves:
        if LOOK:
            known = (squares + owner, bad + owner)
        else:
            found, count = tl.load(squares + owner), size
            if SHAPE.size == "row":
                found, count = squares_of_row(line, start, n, SHAPE), n
            number = number_of_step(line)
            key = mix(tl.load(line + _NOISE).to(tl.uint32) + number.to(tl.uint32))
            unscale = numbers.sign * tl.load(inverse_scale)
            rms, finite = size_of(found, count, line), tl.load(bad + owner) == 0
            known = (unscale, finite, key, number, rms, lr, numbers)
        for first in range(0, n, SHAPE.block):
            k = first + tl.arange(0, SHAPE.block)
            if n - first >= SHAPE.block:
                BODY(line, start + k, g_start + k, k < n, known, SHAPE, False)
            else:
                BODY(line, start + k, g_start + k, k < n, known, SHAPE, True)
