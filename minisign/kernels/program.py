"""What a rule does, as lines that the two writers spell out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from minisign.kernels.nodes import BOOL, DOUBLE, Line, Node, Number, Variable
from minisign.kernels.source import Place
from minisign.kernels.trace import Tracer, trace
from minisign.kernels.vocabulary import BOOLS, MASKS, TEXTS

SIZES = {"rms": "tensor", "row_rms": "row"}  # whose RMS the words ask for


class Program:
    """A rule as lines, which the two writers spell out.

    Attributes:
        origin: where the rule stands.
        names: of its numbers.
        trace: what it does.
    """

    def __init__(self, origin: str, names: tuple[str, ...], trace: Tracer) -> None:
        self.origin, self.names, self.trace = origin, names, trace
        self.p, self.g, *self.buffers = trace.inputs

    @cached_property
    def evaluate(self) -> Callable[..., tuple[float, ...]]:
        """From the rule's numbers to those that lines take."""
        return self._function(self.trace.numbers)

    @cached_property
    def _asked(self) -> list[tuple[Callable[..., Any], bool]]:
        return [(self._function((text,)), answer) for text, answer in self.trace.conditions.items()]

    def is_for(self, numbers: Mapping[str, float]) -> bool:
        """Whether what the rule asks of its numbers has the answers that it had."""
        return all(bool(*asked(**numbers)) == answer for asked, answer in self._asked)

    def _function(self, expressions: Iterable[str]) -> Callable[..., Any]:
        made: Callable[..., Any] = eval(
            f"lambda {', '.join(self.names)}: ({''.join(f'{x}, ' for x in expressions)})"
        )
        return made

    @property
    def size(self) -> str:
        """Whose RMS is asked for: "tensor", "row" or ""."""
        return "".join(SIZES[name] for name in self.trace.scalars if name in SIZES)

    @property
    def own(self) -> list[Variable]:
        """The rule's numbers that are one tensor's own."""
        return [v for name, v in self.trace.scalars.items() if name not in ("step", "lr", *SIZES)]

    def reads(self, variable: Variable) -> bool:
        return any(variable is x for line in self.trace.lines for x in line.variables)

    def writes(self, variable: Variable) -> bool:
        return any(variable is line.out for line in self.trace.lines)

    def lines(self) -> Iterator[tuple[Line, str, str]]:
        """Each with its right side, and where it comes from if the one before comes from elsewhere."""
        before: dict[bool, Place] = {}
        for line in self.trace.lines:
            place, scalar = line.place, line.out.is_scalar
            yield (
                line,
                self._text(line),
                "" if place == before.get(scalar) or not place.code else f"{place.line}: {place.code}",
            )
            before[scalar] = place

    def _text(self, line: Line) -> str:
        """The i-th number is k{i} in float32 and d{i} in float64."""
        wide = all(x.kind == DOUBLE for x in line.variables)

        def spelled(x: Node, as_bool: bool) -> str:
            if isinstance(x, Number):
                return f"{'d' if wide else 'k'}{self.trace.numbers[x.text]}"
            if x.kind == BOOL and not as_bool:
                return f"float_of({x.name})"
            return f"float_of({x.name})" if x.kind == DOUBLE and not wide else x.name

        masks = 1 if line.word == "clone" and line.out.kind == BOOL else MASKS.get(line.word, 0)
        given = [spelled(x, i < masks) for i, x in enumerate(line.arguments)]
        text = TEXTS[line.word](*given, **{key: spelled(x, False) for key, x in line.options.items()})
        return f"float_of({text})" if line.word in BOOLS and line.out.kind != BOOL else text


def program(rule: Callable[..., None], numbers: Mapping[str, Any], scalars: Mapping[str, str]) -> Program:
    """Of a rule; arguments and errors are those of :func:`minisign.kernels.trace.trace`."""
    origin = f"{rule.__module__}.{rule.__name__}"
    names = tuple(name for name, x in numbers.items() if isinstance(x, float))
    return Program(origin, names, trace(rule, numbers, scalars))


def bare(expression: str) -> str:
    """For a comment: without the brackets around it, and 1 for 1.0."""
    inner = expression[1:-1] if expression.startswith("(") else expression
    return re.sub(r"\b(\d+)\.0\b", r"\1", inner)
