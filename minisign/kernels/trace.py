"""A rule, called once on stand-ins that only remember what is done to them, becomes the lines of a kernel.

    p, g, m       stand for tensors: what is done to an entry of them is a :class:`Line`
    lr, beta      stand for numbers, which may be others at the next step: arithmetic on them is remembered
                  as an expression, and carried out on the host before each step

The stand-ins are ``torch.fx``'s proxies, which hand every method, sign and function of torch to
:meth:`Tracer.create_proxy`. The writers (cpp.py, triton.py) make a kernel of what is remembered.
"""

from __future__ import annotations

import inspect
import math
import operator
import re
import traceback
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
from torch import fx

from minisign.kernels.nodes import BOOL, DOUBLE, FLOAT, Line, Node, Number, Variable
from minisign.kernels.source import Place, assigned, frame_of_rule, here, is_written_in
from minisign.kernels.vocabulary import BOOLS, POWERS, RESERVED, SAME, SIGNS, TEXTS

DEFAULTS = {("alpha", "1.0"), ("value", "1.0")}
SIZES = {"rms", "row_rms"}
SHAPES = {"dim", "ndim", "numel", "size", "shape"}


class Untraceable(Exception):
    """A rule does something that the kernels do not know; the message has the line."""


class Forbidden(TypeError):
    """A rule does something that no rule may do; the message has the line."""


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


def _in_place(sign: str) -> Callable[[Any, Any], Any]:
    """p += … is p.add_(…), for which fx has no word; of a number it is another number."""

    def do(a: Any, b: Any) -> Any:
        if isinstance(a.node, Number) or a.node.kind == DOUBLE:
            return getattr(operator, f"__{sign}__")(a, b)
        return a.tracer.create_proxy("call_method", f"{SAME.get(sign, sign)}_", (a, b), {})

    return do


for _sign in ("add", "sub", "mul", "truediv", "pow", "and", "or"):
    setattr(Value, f"__i{_sign}__", _in_place(_sign))


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
        in_place = name.endswith("_") and getattr(operator, name, None) is not target
        word = SAME.get(name.strip("_"), name.strip("_"))
        if word == "rms":
            return self._rms(*args)
        if word in SHAPES:
            raise Untraceable(f"{here()} asks for {word}: a kernel sees one entry")
        if kind == "call_method" and not hasattr(torch.Tensor, name):
            raise Forbidden(f"{here()} uses {name}, which tensors have not")
        target = args[0]
        if kind == "call_method" and word in ("where", "masked_fill"):  # this order is the method's
            x, mask, other = args
            word, args = "where", (mask, x, other) if word == "where" else (mask, other, x)
        if in_place and target.is_fixed:
            return target
        if word == "to":
            return self._to(*args, **kwargs)
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
                f"{here()} chooses by the number of the step, or an RMS, which a kernel learns while it "
                "runs: without fused=True this works; a schedule can be one of lr"
            )
        raise Forbidden(
            f"{here()} depends on a tensor's values; a rule may choose by torch.where, not by `if`"
        )

    # --- what becomes of it -----------------------------------------------------------------------

    def _node(self, x: Any) -> Node:
        if isinstance(x, Value):
            return x.node  # type: ignore[return-value]
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise Untraceable(f"{here()} has {x!r} where the kernels need a number")
        if not is_written_in(frame_of_rule(), x) or not math.isfinite(x):
            raise Untraceable(
                f"{here()} takes {x!r} from elsewhere, and a kernel would keep it for ever; make it an "
                "argument of the rule, or write it there"
            )
        return Number(x, f"({float(x)!r})" if x < 0 else repr(float(x)))

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
            power = getattr(nodes[-1], "text", "").strip("()")
            if power not in POWERS:
                raise Untraceable(f"{place} takes a power other than {', '.join(POWERS)}")
            word, nodes = POWERS[power], nodes[:1]
        if word == "div" and isinstance(nodes[0], Number) and not getattr(nodes[1], "is_scalar", True):
            inverse = self._record("reciprocal", nodes[1:], {}, None).node
            word, nodes = "mul", (inverse, nodes[0])  # as torch does it
        if word not in TEXTS:
            raise Untraceable(
                f"{place} uses {word}, which the kernels do not know (their words: vocabulary.py)"
            )
        try:
            inspect.signature(TEXTS[word]).bind(*nodes, **options)
        except TypeError as error:
            raise Untraceable(f"{place} uses {word} otherwise than the kernels know: {error}") from None
        if word == "where" and (isinstance(nodes[0], Number) or nodes[0].is_scalar):
            raise Forbidden(f"{place} gives torch.where a number for a mask: choose by `if`")
        if target is g:
            raise Forbidden(f"{place} changes the gradient, which a rule must leave as it is")
        used = [x for x in (*nodes, *options.values()) if isinstance(x, Variable)]
        kinds = {x.kind for x in used}
        if FLOAT not in kinds and all(x.is_scalar for x in used) and word not in (*SIGNS, "neg", "abs"):
            raise Forbidden(f"{place} uses {word} on numbers, as step is one; for them are + - * / **")
        tensors = {x.kind for x in used if not x.is_scalar}
        if tensors == {BOOL} and len(used) > 1 and word not in (*BOOLS, "where"):
            raise Untraceable(f"{place} uses {word} on two masks")
        if word.startswith("logical") and kinds != {BOOL}:
            raise Untraceable(f"{place} uses {word} on what is no mask")
        if isinstance(target, Variable) and target.is_scalar:
            raise Untraceable(f"{place} changes a number in place, an RMS or lr; give the result a name")
        if isinstance(target, Variable):
            out = target
        else:
            is_mask = word in BOOLS or (word == "clone" and kinds == {BOOL})
            kind = BOOL if is_mask else DOUBLE if kinds == {DOUBLE} else FLOAT
            out = Variable(kind=kind, is_scalar=all(x.is_scalar for x in used))
        options = {key: x for key, x in options.items() if (key, getattr(x, "text", "")) not in DEFAULTS}
        for x in (*nodes, *options.values()):
            if isinstance(x, Number):
                self.numbers.setdefault(x.text, len(self.numbers))
        self.lines.append(Line(out, target is None, word, nodes, options, place))
        return Value(out, self)  # type: ignore[arg-type]

    def _rms(self, proxy: Value, over: str = "rms") -> Value:
        asked: Any = proxy.node
        if asked is not self.inputs[0] or any(line.out is asked for line in self.lines):
            raise Untraceable(f"{here()} asks for another RMS than that of the parameter before it moves")
        if set(self.scalars) & (SIZES - {over}):
            raise Untraceable(f"{here()} asks for a second RMS, over other entries")
        return Value(self.scalars.setdefault(over, Variable("size", is_scalar=True)), self)  # type: ignore[arg-type]

    def _to(self, x: Value, dtype: Any = None, **given: Any) -> Value:
        """A kernel computes in float32, so what a rule widens or gives back its own type stays."""
        dtype = given.get("dtype", dtype)
        is_own = isinstance(dtype, fx.proxy.Attribute) and dtype.attr == "dtype"
        if not is_own and dtype is not torch.float32:
            raise Untraceable(f"{here()} changes the type of entries to {dtype}, in the middle of a step")
        node: Any = x.node
        return self._record("to", (node,), {}, None) if node.kind == BOOL else x


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
    names = [x.name for x in parameters if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
    made.inputs += [Variable(name) for name in names]
    made.scalars = {name: Variable(name, kind, is_scalar=True) for name, kind in scalars.items()}
    given = {
        name: Value(Number(x, name), made) if isinstance(x, float) else x  # type: ignore[arg-type]
        for name, x in numbers.items()
    }
    known = {name: Value(x, made) for name, x in made.scalars.items()}  # type: ignore[arg-type]
    try:
        rule(*(Value(x, made) for x in made.inputs), **given, **known)  # type: ignore[arg-type]
    except (Untraceable, Forbidden, NameError):
        raise
    except Exception as error:  # whatever it does that a stand-in cannot do
        frames = traceback.extract_tb(error.__traceback__)
        place = next(
            (x for x in reversed(frames) if x.filename == inspect.unwrap(rule).__code__.co_filename),
            frames[-1],
        )
        raise Untraceable(
            f"{Place(place.filename, place.lineno or 0)} cannot be traced: {error}"
        ) from error
    _name(made, rule)
    return made


def _name(made: Tracer, rule: Callable[..., None]) -> None:
    """Variables are called as the rule calls them, where it does."""
    targets = assigned(rule)
    kept = {line.place: line.out for line in made.lines if line.place.line in targets}
    wishes = {x: x.name for x in made.inputs}
    for line in made.lines:  # of several in a line of the rule, the last has its name
        if line.is_new:
            wishes[line.out] = (
                targets.get(line.place.line, "t") if kept.get(line.place) is line.out else "t"
            )
    taken = {*RESERVED, *(x.name for x in made.scalars.values())}
    for variable, wish in wishes.items():
        if wish in RESERVED or not re.fullmatch(r"(?![kd]\d*$)[^\W\dA-Z][^\WA-Z]*", wish):
            wish += "_"  # the numbers of a kernel are k0, d0, …, and macros have capital letters
        variable.name = next(
            x for i in count(1) if (x := wish if i == 1 else f"{wish}{i}") not in taken | RESERVED
        )
        taken.add(variable.name)
