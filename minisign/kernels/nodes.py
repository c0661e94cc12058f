"""What is remembered of a rule: numbers, variables, and the lines that make one of others."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from minisign.kernels.source import Place

FLOAT, DOUBLE, BOOL = "float", "double", "bool"


class Number:
    """A number of a rule: its value now, as in Python, and the expression that gives it at any step."""

    def __init__(self, value: float, text: str) -> None:
        self.value, self.text = value, text


class Variable:
    """Of a kernel.

    Attributes:
        kind: of an entry. is_scalar: it is one for a whole tensor (the number of its step, its RMS), and so
            is what follows from such.
    """

    def __init__(self, name: str = "", kind: str = FLOAT, is_scalar: bool = False) -> None:
        self.name, self.kind, self.is_scalar = name, kind, is_scalar


Node: TypeAlias = Number | Variable


class Line(NamedTuple):
    """``out`` becomes ``word(*arguments, **options)``."""

    out: Variable
    is_new: bool
    word: str
    arguments: tuple[Node, ...]
    options: dict[str, Node]
    place: Place

    @property
    def variables(self) -> list[Variable]:
        return [x for x in (*self.arguments, *self.options.values()) if isinstance(x, Variable)]
