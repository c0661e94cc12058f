"""From a program to C++: the part of a kernel that is the rule's own. The rest is in ``step.h``."""

from __future__ import annotations

import re

from minisign.kernels.program import Program, bare
from minisign.kernels.table import B, Form

TYPES = {"float32": "float", "bfloat16": "c10::BFloat16", "float16": "c10::Half"}
TEXT = """\
// Made from {origin}.
{narrow}#include "step.h"

struct Rule {{
  using P = {p};
  using G = {g};
  using B = {b};
  using Tensor = TensorOf<P, G, B, {buffers}, {own}>;
  static_assert(sizeof(Tensor) == 8 * {columns}, "table.py has another");
  static constexpr Size size = {size};
  static constexpr Rows rows = {rows};
  static constexpr bool sought = {sought}, guard = {guard}, rounded = {rounded};

  static void move(const Tensor& T, const Shared& S, int64_t start, int64_t g_start, int64_t N, double step,
                   float size, uint32_t key) {{
    const float unscale = S.unscale;
    {of_all}
    for (int64_t J = 0; J < N; J += BLOCK) {{
      fetch(N - J, {streams});
      for (int64_t I = J; I < std::min(J + BLOCK, N); I++) {{
        {of_each}
      }}
    }}
  }}
}};

extern "C" void minisign_step(const Shared* shared, const Rule::Tensor* tensors, int64_t count) {{
  run<Rule>(*shared, tensors, count);
}}
"""


def write(program: Program, form: Form) -> str:
    """The whole file."""
    places = {program.p: "P", program.g: "G", **{b: f"B{j}" for j, b in enumerate(program.buffers)}}
    used = {v: x for v, x in places.items() if program.reads(v) or program.writes(v)}
    sources = {"P": "T.p + start", "G": "T.g + g_start"} | {
        f"B{j}": f"T.b[{j}] + start" for j in range(len(places) - 2)
    }
    of_all = ["const float lr = S.lr;"] * ("lr" in program.trace.scalars)
    of_all += [f"const double {v.name} = T.own[{i}];" for i, v in enumerate(program.own)]
    of_all += [f"{'const ' * (x == 'G')}auto* __restrict {x} = {sources[x]};" for x in used.values()]
    of_each = [
        f"{'' if program.writes(v) else 'const '}float {v.name} = {x}[I]{' * unscale' * (x == 'G')};"
        for v, x in used.items()
    ]
    for line, text, comment in program.lines():
        code = f"{line.out.kind + ' ' if line.is_new else ''}{line.out.name} = {text};"
        if line.out.is_scalar:
            of_all.append(_said(code, comment))
        else:
            of_each.append(_said(code, comment, width=43))  # which stands four places further in
    for v, x in used.items():
        if program.writes(v):
            of_each.append(
                f"store<{'rounded' if x == 'P' else 'false'}>({x} + I, {v.name}, start + I, key);"
            )
    numbers = [
        _said(f"const {kind} {x}{i} = {f'float(S.d[{i}])' if x == 'k' else f'S.d[{i}]'};", bare(text))
        for text, i in program.trace.numbers.items()
        for x, kind in (("k", "float"), ("d", "double"))
        if re.search(rf"\b{x}{i}\b", "\n".join(of_all + of_each))
    ]
    return TEXT.format(
        origin=program.origin,
        narrow="" if form.types == ("float32",) * 3 else "#define NARROW\n",
        **{x: TYPES[t] for x, t in zip("pgb", form.types, strict=True)},
        columns=B + len(program.buffers) + max(1, len(program.own)),
        buffers=len(program.buffers),
        own=max(1, len(program.own)),
        size=f"OF_{program.size.upper()}" if program.size else "OF_NONE",
        rows=form.rows.upper() or "NONE",
        **{name: str(getattr(form, name)).lower() for name in ("sought", "guard", "rounded")},
        of_all="\n    ".join(numbers + of_all),
        of_each="\n        ".join(of_each),
        streams=", ".join(f"{x} + J" for x in used.values()),
    )


def _said(code: str, comment: str, width: int = 47) -> str:
    return f"{code:<{width}} // {comment}" if comment else code
