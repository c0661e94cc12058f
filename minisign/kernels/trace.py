"""A rule, called once on stand-ins that only remember what is done to them, becomes the lines of a kernel.

    p, g, m       stand for tensors: what is done to an entry of them is a :class:`Line`
    lr, beta      stand for numbers, which may be others at the next step: arithmetic on them is remembered
                  as an expression, and carried out on the host before each step

The stand-ins are ``torch.fx``'s proxies, which hand every method, sign and function of torch to
:meth:`Tracer.create_proxy`. The writers (cpp.py, triton.py) make a kernel of what is remembered.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import operator
import sys
import textwrap
from collections.abc import Callable, Mapping
from itertools import count
from types import FrameType
from typing import Any, NamedTuple, TypeAlias

from torch import fx

from minisign.kernels.vocabulary import BOOLS, POWERS, RESERVED, SAME, SIGNS, TEXTS

FLOAT, DOUBLE, BOOL = "float", "double", "bool"
DEFAULTS = {("alpha", "1.0"), ("value", "1.0")}
SHAPES = {"dim", "ndim", "numel", "size", "shape"}


class Untraceable(Exception):
    """A rule does something that the kernels do not know; the message has the line."""


class Place(NamedTuple):
    """A line of a rule."""

    file: str
    line: int

    @property
    def code(self) -> str:
        # Without its comment, and no backslash at the end, which would take the next line with it.
        return linecache.getline(self.file, self.line).partition(" # ")[0].strip().rstrip("\\").rstrip()

    def __str__(self) -> str:
        return f"line {self.line} of {self.file}, `{self.code}`"


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


class Value(fx.Proxy):
    """What a rule is given in place of a tensor or a number; ``node`` is which."""

    is_fixed = False

    def fixed(self) -> Value:
        """The same, but what would change it in place does nothing."""
        made = Value(self.node, self.tracer)
        made.is_fixed = True
        return made

    def __float__(self) -> float:
        if isinstance(self.node, Number):
            raise Untraceable(
                f"{here()} would keep today's value of a number for ever; write it in + - * / **"
            )
        raise Untraceable(
            f"{here()} takes a number that only a kernel knows (its step, an RMS) out of it; write it in "
            "+ - * / **, and a schedule in lr"
        )

    __int__ = __index__ = __float__

    def __setitem__(self, *_: Any) -> None:
        raise Untraceable(f"{here()} writes to some entries only, which the kernels do not know")


for _sign in ("add", "sub", "mul", "truediv"):  # p += … is p.add_(…); fx has no word for it
    _word = f"{SAME.get(_sign, _sign)}_"
    setattr(
        Value, f"__i{_sign}__", lambda a, b, w=_word: a.tracer.create_proxy("call_method", w, (a, b), {})
    )


class Tracer(fx.proxy.TracerBase):
    """Remembers what is done to the stand-ins that it gave out.

    Attributes:
        inputs: p, g and the buffers.
        scalars: what the kernel learns of a tensor by itself: its step, its RMS, its own numbers.
        lines: in order.
        numbers: the expressions that lines take, and the place of each.
        conditions: what the rule asked of its numbers, and the answers: another answer needs another trace.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()  # asked for names by fx; nothing is put into it
        self.inputs: list[Variable] = []
        self.scalars: dict[str, Variable] = {}
        self.lines: list[Line] = []
        self.numbers: dict[str, int] = {}
        self.conditions: dict[str, bool] = {}

    # --- what fx calls ----------------------------------------------------------------------------

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *_: Any, **__: Any) -> Any:
        name = target if isinstance(target, str) else target.__name__
        in_place = kind == "call_method" and name.endswith("_")
        word = SAME.get(name.strip("_"), name.strip("_"))
        if word == "rms":
            return self._rms(*args)
        if word in SHAPES:
            raise Untraceable(f"{here()} asks for {word}: a kernel sees one entry")
        target = args[0]
        if kind == "call_method" and word in ("where", "masked_fill"):  # this order is the method's
            x, mask, other = args
            word, args = "where", (mask, x, other) if word == "where" else (mask, other, x)
        if in_place and target.is_fixed:
            return target
        if word == "to":  # a kernel computes in float32, whatever it is given
            return args[0]
        nodes, options = tuple(map(self._node, args)), {key: self._node(x) for key, x in kwargs.items()}
        if all(isinstance(x, Number) for x in (*nodes, *options.values())):
            return Value(self._expression(word, *nodes), self)  # type: ignore[arg-type]
        return self._record(word, nodes, options, self._node(target) if in_place else None)

    def to_bool(self, proxy: Any) -> bool:
        if isinstance(proxy.node, Number):
            self.conditions[proxy.node.text] = bool(proxy.node.value)
            return bool(proxy.node.value)
        if proxy.node.is_scalar:
            raise Untraceable(
                f"{here()} chooses by what only a kernel knows (its step, an RMS); a schedule belongs in lr"
            )
        raise TypeError(
            f"{here()} depends on a tensor's values; a rule may choose by torch.where, not by `if`"
        )

    # --- what becomes of it -----------------------------------------------------------------------

    def _node(self, x: Any) -> Node:
        if isinstance(x, Value):
            return x.node  # type: ignore[return-value]
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise Untraceable(f"{here()} has {x!r} where the kernels need a number")
        if x not in _frame().f_code.co_consts:
            raise Untraceable(
                f"{here()} takes {x!r} from elsewhere, and a kernel would keep it for ever; make it an "
                "argument of the rule, or write it there"
            )
        return Number(x, repr(float(x)))

    def _expression(self, word: str, a: Number, b: Number | None = None) -> Number:
        if b is None and word in ("neg", "abs"):
            return Number(
                getattr(operator, word)(a.value), f"(-{a.text})" if word == "neg" else f"abs({a.text})"
            )
        if b is None or word not in SIGNS:
            raise Untraceable(
                f"{here()} does {word} to a number; the kernels know {' '.join(SIGNS.values())}"
            )
        text = f"({a.text} {SIGNS[word]} {b.text})"
        function = operator.truediv if word == "div" else getattr(operator, word)
        return Number(function(a.value, b.value), text)

    def _record(
        self, word: str, nodes: tuple[Node, ...], options: dict[str, Node], target: Node | None
    ) -> Any:
        place, (_, g, *_) = here(), self.inputs
        if word == "pow" and not all(isinstance(x, Number) or x.is_scalar for x in nodes):
            power = getattr(nodes[-1], "text", "")
            if power not in POWERS:
                raise Untraceable(f"{place} takes a power other than {', '.join(POWERS)}")
            word, nodes = POWERS[power], nodes[:1]
        if word not in TEXTS:
            raise Untraceable(
                f"{place} uses {word}, which the kernels do not know: they know {', '.join(TEXTS)}"
            )
        try:
            inspect.signature(TEXTS[word]).bind(*nodes, **options)
        except TypeError as error:
            raise Untraceable(f"{place} uses {word} otherwise than the kernels know: {error}") from None
        if target is g:
            raise TypeError(f"{place} changes the gradient, which a rule must leave as it is")
        used = [x for x in (*nodes, *options.values()) if isinstance(x, Variable)]
        kinds = {x.kind for x in used}
        if kinds == {DOUBLE} and word not in (*SIGNS, "neg", "abs"):
            raise TypeError(f"{place} uses {word} on numbers, as step is one; for them are + - * / **")
        if isinstance(target, Variable):
            out = target
        else:
            kind = BOOL if word in BOOLS else DOUBLE if kinds == {DOUBLE} else FLOAT
            out = Variable(kind=kind, is_scalar=all(x.is_scalar for x in used))
        options = {key: x for key, x in options.items() if (key, getattr(x, "text", "")) not in DEFAULTS}
        for x in (*nodes, *options.values()):
            if isinstance(x, Number):
                self.numbers.setdefault(x.text, len(self.numbers))
        self.lines.append(Line(out, target is None, word, nodes, options, place))
        return Value(out, self)  # type: ignore[arg-type]

    def _rms(self, proxy: Value, over: str) -> Value:
        asked: Any = proxy.node
        if asked is not self.inputs[0] or any(line.out is asked for line in self.lines):
            raise Untraceable(f"{here()} asks for another RMS than that of the parameter before it moves")
        return Value(self.scalars.setdefault(over, Variable("size", is_scalar=True)), self)  # type: ignore[arg-type]


def trace(
    rule: Callable[..., None],
    numbers: Mapping[str, Any],
    scalars: Mapping[str, str] = {},
) -> Tracer:
    """What ``rule(p, g, *buffers, **numbers)`` does.

    Args:
        numbers: by name. What is no number (a word, None) becomes part of what is remembered.
        scalars: names of those that only the kernel knows, and their kinds.

    Raises:
        Untraceable: something that the kernels do not know. TypeError: something that no rule may do.
    """
    made = Tracer()
    parameters = inspect.signature(rule).parameters.values()
    names = [x.name for x in parameters if x.kind == x.POSITIONAL_OR_KEYWORD]
    made.inputs += [Variable(name) for name in names]
    made.scalars = {name: Variable(name, kind, is_scalar=True) for name, kind in scalars.items()}
    given = {
        name: Value(Number(x, name), made) if isinstance(x, float) else x  # type: ignore[arg-type]
        for name, x in numbers.items()
    }
    known = {name: Value(x, made) for name, x in made.scalars.items()}  # type: ignore[arg-type]
    rule(*(Value(x, made) for x in made.inputs), **given, **known)  # type: ignore[arg-type]
    _name(made, rule)
    return made


def _name(made: Tracer, rule: Callable[..., None]) -> None:
    """Variables are called as the rule calls them, where it does."""
    rule = inspect.unwrap(rule)
    try:
        source = textwrap.dedent(inspect.getsource(rule))
    except OSError:  # typed in, or made by exec
        source = ""
    tree, first = ast.parse(source), rule.__code__.co_firstlineno - 1
    targets = {
        number + first: node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    kept = {line.place: line.out for line in made.lines if line.place.file == rule.__code__.co_filename}
    wishes = {x: x.name for x in made.inputs}
    for line in made.lines:  # of several in a line of the rule, the last has its name
        if line.is_new:
            wishes[line.out] = (
                targets.get(line.place.line, "t") if kept.get(line.place) is line.out else "t"
            )
    taken = {*RESERVED, *(x.name for x in made.scalars.values())}
    for variable, wish in wishes.items():
        variable.name = next(x for i in count(1) if (x := wish if i == 1 else f"{wish}{i}") not in taken)
        taken.add(variable.name)


def here() -> Place:
    """The line of a rule that is being carried out."""
    frame = _frame()
    return Place(frame.f_code.co_filename, frame.f_lineno)


def _frame() -> FrameType:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals["__name__"] in (
        __name__,
        "torch.fx.proxy",
        "minisign.engine.words",
    ):
        frame = frame.f_back
    assert frame is not None
    return frame
