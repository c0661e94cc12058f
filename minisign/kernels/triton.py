"""From a program to Triton: the part of a kernel that is the rule's own. The rest is in ``words.py``."""

from __future__ import annotations

import re

from minisign.kernels.program import Program, bare
from minisign.kernels.table import Form, P

# Words that Triton has itself; its interpreter knows them by these names only.
WORDS = {"abs_of": "tl.abs", "exp_of": "tl.exp", "log_of": "tl.log", "chosen": "tl.where"}
TEXT = """\
# Made from {origin}.{rows}
from minisign.kernels.words import *


@triton.jit
def move(line, i, g_i, mask, known, SHAPE: tl.constexpr, MASKED: tl.constexpr):
    unscale, finite, key, step, size, lr, numbers = known
    {lines}
"""


def write(program: Program, form: Form) -> str:
    """The whole module."""
    p, g, names = program.p, program.g, ("P", "G", *(f"B{j}" for j in range(len(program.buffers))))
    places = dict(zip(program.trace.inputs, enumerate(names), strict=True))
    types = {
        v: f"tl.{t}" for v, t in zip(places, (*form.types, *form.types[2:] * len(names)), strict=False)
    }
    used = {v: x for v, x in places.items() if program.reads(v) or program.writes(v) or v is p}
    written = [v for v in used if program.writes(v)]
    own = [f"{v.name} = own_number(line, {i}, SHAPE)" for i, v in enumerate(program.own)]
    own += ["lr = tl.load(lr)"] * ("lr" in program.trace.scalars)
    loads = []
    for v, (column, x) in used.items():
        loads.append(f"{x} = pointer(line, {P + column}, {types[v]}, SHAPE)")
        loads.append(
            f"{v.name} = load({x}, {'g_i' if v is g else 'i'}, mask, MASKED){' * unscale' * (v is g)}"
        )
    statements: dict[bool, list[str]] = {True: [], False: []}
    for line, text, comment in program.lines():
        text = re.sub(r"\w+(?=\()", lambda word: WORDS.get(word[0], word[0]), text)
        statements[line.out.is_scalar].append(_said(f"{line.out.name} = {text}", comment))
    stores = [
        f"store({used[v][1]}, i, {v.name}, mask, key, {types[v]}, {form.rounded and v is p}, MASKED)"
        for v in written
    ]
    if form.guard:
        loads += [f"{v.name}_before = {v.name}" for v in {p: 0, **dict.fromkeys(written)}]
        shrunk = f"({p.name}_before - numbers.center) * numbers.shrink + numbers.center"
        kept = [f"{v.name} = tl.where(finite, {v.name}, {v.name}_before)" for v in written if v is not p]
        stores = [f"{p.name} = tl.where(finite, {p.name}, {shrunk})", *kept, *stores]
        if p not in written:
            stores += [
                f"store(P, i, {p.name}, mask & (finite == 0), key, {types[p]}, {form.rounded}, True)"
            ]
    body = [*own, *statements[True], *loads, *statements[False], *stores]
    numbers = [
        _said(f"{x}{i} = {text.format(i=i)}", bare(expression))
        for expression, i in program.trace.numbers.items()
        for x, text in (("k", "numbers.k[{i}]"), ("d", "wide(numbers.k[{i}], numbers.rest[{i}])"))
        if re.search(rf"\b{x}{i}\b", "\n".join(body))
    ]
    rows = f"\n# Row by row{', where one has a gradient' if form.sought else ''}: words.py sees to it."
    return TEXT.format(
        origin=program.origin, rows=rows if form.rows else "", lines="\n    ".join(numbers + body)
    )


def _said(code: str, comment: str) -> str:
    return f"{code:<44}  # {comment}" if comment else code
