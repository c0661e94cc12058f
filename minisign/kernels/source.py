"""Where the lines of a rule stand, and what they say."""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
import textwrap
import tokenize
from collections.abc import Callable
from types import FrameType
from typing import NamedTuple


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


def assigned(rule: Callable[..., None]) -> dict[int, str]:
    """The variable to which a line of a rule assigns, by its number; none where there is no source."""
    rule = inspect.unwrap(rule)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(rule)))
    except (OSError, SyntaxError, tokenize.TokenError):  # typed in, made by exec, or a part of something
        return {}
    first = rule.__code__.co_firstlineno - 1
    return {
        number + first: node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def here() -> Place:
    """The line of a rule that is being carried out."""
    frame = frame_of_rule()
    return Place(frame.f_code.co_filename, frame.f_lineno)


def is_written_in(frame: FrameType, x: float) -> bool:
    """Whether a number is one of a function's own; not if a variable from outside has the same value."""
    code = frame.f_code
    outside = {**frame.f_globals, **frame.f_locals}
    names = (outside.get(name) for name in (*code.co_names, *code.co_freevars))
    consts = [y for const in code.co_consts for y in (const if isinstance(const, tuple) else (const,))]
    return x in consts and not any(isinstance(y, (int, float)) and y == x for y in names)


def frame_of_rule() -> FrameType:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame):
        frame = frame.f_back
    assert frame is not None
    return frame


def _is_ours(frame: FrameType) -> bool:
    """Whether it stands between a rule and what is remembered of it."""
    name = frame.f_globals.get("__name__", "")
    return name in ("minisign.kernels.trace", "minisign.engine.words", __name__, "torch", "inspect") or (
        name.startswith("torch.")
    )
