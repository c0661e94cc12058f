"""An optimizer of one's own: from a function of a parameter, its gradient and its buffers to a class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from minisign.engine.lists import DependsOnValues, Tensors, on_lists
from minisign.engine.optimizer import Optimizer, Params
from minisign.engine.options import BETA, FROM_0, defaults
from minisign.engine.words import WORDS, Rule
from minisign.kernels.nodes import DOUBLE
from minisign.kernels.trace import Untraceable, trace

STEPS_TRIED = 20  # more than any rule that moves the weights only now and then will wait
# Names that are something else.
IN_A_STATE = {"step", "taken", "taken_rows", "bad"}
TAKEN = {*defaults({}, {}), "params", "betas"}


def optimizer(
    rule: Rule,
    *,
    buffers: tuple[str, ...] = (),
    bounds: Mapping[str, tuple[float, float]] | None = None,
    name: str | None = None,
    **numbers: Any,
) -> type[Optimizer]:
    """A class of optimizers that carry out ``rule``, with all that minisign's own have.

    Args:
        rule: one step in place, ``rule(p, g, *buffers, *, lr, …)``, in methods of tensors; it leaves ``g``
            as it is. A ``step`` among its arguments is the number of the step, from 1.
        buffers: what the state calls them, in the order of the rule's arguments.
        bounds: [low, below) of numbers that have some. Without: ``lr`` ≥ 0, and 0 ≤ β < 1 for what is
            called beta….
        name: of the class; without, the function's, so that ``heavy_ball`` becomes ``HeavyBall``.
        numbers: the rule's other arguments and their defaults. ``"rms"`` and ``"row_rms"`` are words that
            :func:`minisign.rms` knows.

    Raises:
        TypeError: buffers and numbers are not the rule's arguments; the rule changes its gradient, or
            chooses by the values of a tensor (``if``).
        ValueError: a default outside its bounds, when an optimizer is made.
    """
    named = _check_arguments(rule, buffers, bounds or {}, numbers)
    floats = {key: float(x) if isinstance(x, (int, float)) else x for key, x in numbers.items()}
    asks: frozenset[str] = frozenset()
    try:
        made, is_traceable = trace(rule, floats, {"step": DOUBLE} if "step" in named else {}), True
        asks = frozenset(WORDS) & made.scalars.keys() - set(numbers.values())
        p, _, *others = made.inputs
        written = {line.out for line in made.lines}
        for x in [p] if made.conditions else [p, *others]:  # with other numbers it may write to others
            if x not in written:
                raise _never_changes(rule, x.name)
        if "row_rms" in asks:
            rule = on_lists(rule)
    except Untraceable:  # fused=True will say which line; the plain road can do all that tensors can
        _check_tried(rule, len(buffers), floats, has_step="step" in named)
        rule, is_traceable = _watched(rule), False

    def init(self: Optimizer, params: Params, *values: Any, **given: Any) -> None:
        bound = signature.bind(self, params, *values, **given).arguments
        own = {key: bound.get(key, default) for key, default in numbers.items()}
        Optimizer.__init__(self, params, own, bound.get("options", {}))

    signature = _signature(numbers)
    init.__signature__ = signature  # type: ignore[attr-defined]

    known: dict[str, Any] = {"lr": FROM_0} | {x: BETA for x in numbers if x.startswith("beta")}
    known |= {key: bool for key, x in numbers.items() if isinstance(x, bool)}
    known |= bounds or {}
    body = dict(
        __doc__=rule.__doc__, __module__=rule.__module__, __init__=init, rule=staticmethod(rule),
        buffers=tuple(buffers), bounds={key: known.get(key) for key in numbers}, is_traceable=is_traceable,
        asks=asks,
    )  # fmt: skip
    return type(name or "".join(map(str.capitalize, rule.__name__.split("_"))), (Optimizer,), body)


def _check_arguments(
    rule: Any, buffers: Any, bounds: Mapping[str, Any], numbers: Mapping[str, Any]
) -> set[str]:
    """Refuses what no class can be made of; returns the names of what stands after the rule's star."""
    if not inspect.isfunction(rule) or rule.__name__ == "<lambda>":
        raise TypeError(f"a rule is a function made by def, got {rule!r}")
    if isinstance(buffers, str) or len({*buffers} - IN_A_STATE) < len(buffers):
        raise TypeError(
            f"buffers must be names in a tuple, each once and none of {sorted(IN_A_STATE)}, got {buffers!r}"
        )
    if reserved := sorted(set(numbers) & TAKEN):
        raise TypeError(f"every optimizer has {reserved[0]}: call the number of {rule.__name__} otherwise")
    if unknown := sorted(set(bounds) - set(numbers)):
        raise TypeError(f"bounds of {unknown[0]}, which is none of {', '.join(numbers)}")
    if "step" in numbers:
        raise TypeError(f"step is the number of the step: {rule.__name__} gets it without a default")
    if words := [x for x in numbers.values() if isinstance(x, str) and x not in WORDS]:
        raise TypeError(
            f"words among the numbers are those of minisign.rms, {' and '.join(map(repr, WORDS))}, got "
            f"{words[0]!r}; for a choice take True or False"
        )
    parameters = inspect.signature(rule).parameters.values()
    tensors = [x.name for x in parameters if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
    named = {x.name for x in parameters if x.kind is x.KEYWORD_ONLY}
    if len(tensors) != 2 + len(buffers):
        raise TypeError(
            f"{rule.__name__} has {', '.join(tensors) or 'nothing'} before its *, where p, g "
            f"and each name in buffers={buffers!r} have a place; numbers stand after the *"
        )
    if named - {"step"} != set(numbers):
        wrong = sorted((named - {"step"}) ^ set(numbers))[0]
        raise TypeError(
            f"{rule.__name__} has no argument {wrong}" if wrong in numbers
            else f"{rule.__name__} takes {wrong}: give its default as optimizer(…, {wrong}=…)"
        )  # fmt: skip
    return named


def _signature(numbers: Mapping[str, Any]) -> inspect.Signature:
    """(self, params, lr=…, …, **options)."""
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    given = [inspect.Parameter(x, place) for x in ("self", "params")]
    given += [inspect.Parameter(x, place, default=default) for x, default in numbers.items()]
    return inspect.Signature([*given, inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)])


def _never_changes(rule: Rule, name: str) -> TypeError:
    return TypeError(
        f"{rule.__name__} never changes {name}: `{name} = …` makes another tensor, only a word that ends "
        "in an underscore writes to it"
    )


def _check_tried(rule: Rule, buffers: int, numbers: Mapping[str, Any], has_step: bool) -> None:
    """What can be said of a rule that was not traced to its end: by steps on small tensors."""
    p, *others = (Tensors([torch.ones(2, 2, device="cpu")]) for _ in range(2 + buffers))
    try:
        for step in range(1, STEPS_TRIED + 1):
            rule(p, *others, **numbers, **({"step": float(step)} if has_step else {}))
    except DependsOnValues as error:
        raise TypeError(f"{rule.__name__}: {error}") from error
    except Exception:  # it may need what these tensors are not; the first step will tell
        return
    if p.tensors[0]._version == 0:
        raise _never_changes(rule, next(iter(inspect.signature(rule).parameters)))


def _watched(rule: Rule) -> Rule:
    """A rule that was not traced to its end; it may yet change the gradient."""

    @wraps(rule)
    def watched(p: Any, g: Any, *buffers: Any, **numbers: Any) -> None:
        tensors = [g] if isinstance(g, Tensor) else g.tensors if isinstance(g, Tensors) else []
        before = [x._version for x in tensors]
        rule(p, g, *buffers, **numbers)
        if before != [x._version for x in tensors]:
            raise TypeError(f"{rule.__name__} changes the gradient, which a rule must leave as it is")

    return watched
