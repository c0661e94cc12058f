"""An optimizer of one's own: from a function of a parameter, its gradient and its buffers to a class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from minisign.engine.optimizer import Optimizer, Params
from minisign.engine.options import BETA, FROM_0
from minisign.engine.words import Rule
from minisign.kernels.trace import DOUBLE, Untraceable, trace


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
    if not inspect.isfunction(rule):
        raise TypeError(f"a rule is a function made by def, got {rule!r}")
    parameters = inspect.signature(rule).parameters.values()
    tensors = [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]
    named = {x.name for x in parameters if x.kind is x.KEYWORD_ONLY}
    if len(tensors) != 2 + len(buffers):
        raise TypeError(
            f"{rule.__name__}({', '.join(tensors)}, *, …) has {len(tensors) - 2} buffers after p, g, and "
            f"buffers={buffers!r} names {len(buffers)}"
        )
    if named - {"step"} != set(numbers):
        wrong = sorted((named - {"step"}) ^ set(numbers))[0]
        raise TypeError(
            f"{rule.__name__} has no argument {wrong}" if wrong in numbers
            else f"{rule.__name__} takes {wrong}, which has no default: optimizer(…, {wrong}=…)"
        )  # fmt: skip
    floats = {key: float(x) if isinstance(x, (int, float)) else x for key, x in numbers.items()}
    try:
        trace(rule, floats, {"step": DOUBLE} if "step" in named else {})
        is_known = True
    except Untraceable:  # fused=True will say which line; the plain road can do all that tensors can
        is_known = False

    def init(self: Optimizer, params: Params, **given: Any) -> None:
        own = {key: given.pop(key, default) for key, default in numbers.items()}
        Optimizer.__init__(self, params, own, given)  # type: ignore[arg-type]

    known = {"lr": FROM_0} | {x: BETA for x in numbers if x.startswith("beta")}
    known |= bounds or {}
    body = dict(
        __doc__=rule.__doc__, __module__=rule.__module__, __init__=init, rule=staticmethod(rule),
        buffers=tuple(buffers), bounds={key: known.get(key) for key in numbers}, is_known=is_known,
    )  # fmt: skip
    return type(name or "".join(map(str.capitalize, rule.__name__.split("_"))), (Optimizer,), body)
