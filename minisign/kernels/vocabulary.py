"""The words that rules are written in, and what each is in a kernel.

A word is a method of tensors, or the function or sign of that name: ``x.add(y)``, ``torch.add(x, y)``,
``x + y``; with an underscore at its end it works in place. One text serves both languages: C++ and Triton
share infix signs, and what is called here stands under the same name in ``step.h`` and ``words.py``. A
fused multiply-add is where torch has one, and nowhere else. Arguments are names of variables, so nothing
needs brackets.
"""

from __future__ import annotations

from collections.abc import Callable

ONE = "1.0"


def _scaled(a: str, by: str) -> str:
    return a if by == ONE else f"{a} * {by}"


def _clamped(x: str, min: str = "", max: str = "") -> str:
    x = f"larger_of({x}, {min})" if min else x
    return f"smaller_of({x}, {max})" if max else x


TEXTS: dict[str, Callable[..., str]] = {
    "clone": lambda x: x,
    "to": lambda x: x,
    "copy": lambda x, other: other,
    "add": lambda x, y, alpha=ONE: f"{x} + {y}" if alpha == ONE else f"fma({y}, {alpha}, {x})",
    "sub": lambda x, y, alpha=ONE: f"{x} - {y}" if alpha == ONE else f"fma({y}, -{alpha}, {x})",
    "mul": lambda x, y: f"{x} * {y}",
    "div": lambda x, y: f"divided({x}, {y})",
    "pow": lambda x, y: f"power_of({x}, {y})",
    "neg": lambda x: f"-{x}",
    "abs": lambda x: f"abs_of({x})",
    "sign": lambda x: f"sign_of({x})",
    "square": lambda x: f"{x} * {x}",
    "sqrt": lambda x: f"sqrt_of({x})",
    "rsqrt": lambda x: f"inverse_of(sqrt_of({x}))",
    "reciprocal": lambda x: f"inverse_of({x})",
    "exp": lambda x: f"exp_of({x})",
    "log": lambda x: f"log_of({x})",
    "tanh": lambda x: f"tanh_of({x})",
    "lerp": lambda x, end, weight: f"lerp({x}, {end}, {weight})",
    "addcmul": lambda x, a, b, value=ONE: f"fma({_scaled(a, value)}, {b}, {x})",
    "addcdiv": lambda x, a, b, value=ONE: f"{x} + divided({_scaled(a, value)}, {b})",
    "maximum": lambda x, y: f"larger_of({x}, {y})",
    "minimum": lambda x, y: f"smaller_of({x}, {y})",
    "clamp": _clamped,
    "where": lambda mask, x, y: f"chosen({mask}, {x}, {y})",
    "gt": lambda x, y: f"{x} > {y}",
    "ge": lambda x, y: f"{x} >= {y}",
    "lt": lambda x, y: f"{x} < {y}",
    "le": lambda x, y: f"{x} <= {y}",
    "eq": lambda x, y: f"{x} == {y}",
    "ne": lambda x, y: f"{x} != {y}",
    "logical_and": lambda x, y: f"{x} & {y}",
    "logical_or": lambda x, y: f"{x} | {y}",
    "logical_not": lambda x: f"not_of({x})",
}
# Which of them come to true or false, and which take that (the first so many of their arguments).
BOOLS = {"gt", "ge", "lt", "le", "eq", "ne", "logical_and", "logical_or", "logical_not"}
MASKS = {"where": 1, "logical_and": 2, "logical_or": 2, "logical_not": 1}
# Other names of the same: those of Python's signs, in the module `operator`, and of functions.
SAME = {
    "truediv": "div",
    "clip": "clamp",
    "and": "logical_and",
    "or": "logical_or",
    "invert": "logical_not",
}
POWERS = {"2.0": "square", "0.5": "sqrt", "-0.5": "rsqrt"}  # of an entry, by exponent, as in torch
SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**"} | {
    "gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!=",
}  # fmt: skip
# No variable of a kernel is called so: what the writers and the languages need themselves.
RESERVED = frozenset(
    "abs_of chosen divided exp_of fetch float_of fma inverse_of larger_of lerp log_of mix not_of power_of "
    "sign_of smaller_of sqrt_of squares_of store tanh_of wide load look pointer own_number "
    "line i g_i key mask known move numbers lr size step tl triton unscale finite start g_start "
    "alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t char32_t class "
    "compl const const_cast constexpr continue decltype default delete do double dynamic_cast else enum "
    "explicit export extern false float for friend goto if inline int long mutable namespace new noexcept "
    "not not_eq nullptr operator or or_eq private protected public register reinterpret_cast return short "
    "signed sizeof static static_assert static_cast struct switch template this thread_local throw true "
    "try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor xor_eq std "
    "c10 False None True as assert async await def del elif except finally from global import in is lambda "
    "nonlocal pass raise with yield range min max".split()
)
