"""Records by how much each assertion of a notebook or a test holds, and goes on where one does not.

An assertion says only true or false. Here its comparisons are given numbers, as signal temporal logic does
(Fainekos and Pappas 2009: the robustness degree): ``a < b`` has the *slack* b − a, positive where it holds;
`and` and `all` have the least of their parts' slacks, `or` and `any` the largest, `not` turns the sign.

    python tests/claims.py NOTEBOOK RECORD              runs the notebook, writes what it claims as JSON
    MINISIGN_CLAIMS=RECORD PYTHONPATH=tests pytest -p claims -m trained FILE        the same of tests

:class:`Rewriter` changes the assertions, :class:`Recorder` is what they call then. ``tests/robust.py`` has
the runs made. What is compared by ``==``, `pytest.approx` too, is true or false here as well, so how far a
training may go is written ``abs(a - b) < …`` or ``allclose``. A comprehension within `all` or `any` is
evaluated to its end.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import math
import operator
import os
import sys
import textwrap
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from IPython.core.displayhook import CapturingDisplayHook
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from notebook_rules import MARKER

from minisign.studies import experiment

NAME = "__claims__"  # of the recorder, in the namespaces of rewritten code
RECORD = "MINISIGN_CLAIMS"  # where the plugin writes
ORDER = {"Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt, "GtE": operator.ge}
OPERATORS = {
    **ORDER,
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Is": operator.is_,
    "IsNot": operator.is_not,
    "In": lambda a, b: a in b,
    "NotIn": lambda a, b: a not in b,
}


@dataclass(frozen=True)
class Truth:
    """What a condition comes to.

    Attributes:
        holds: true or false, or an array of them.
        slack: by how much it holds, in the units of what is compared, an array like ``holds``; None where
            nothing is measured, as for equal or not.
        figure: what was compared (the first side that is not a constant), an array like ``holds``.
    """

    holds: Any
    slack: Any = None
    figure: Any = None


class Recorder:
    """What rewritten assertions call. ``claims`` has, for each assertion by place and text, a list for each
    time it was evaluated: whether it held, and, where something is measured, slack and figure."""

    def __init__(self) -> None:
        self.claims: dict[str, list[list[Any]]] = {}
        self.place = ""

    def note(self, truth: Truth, line: int, text: str) -> None:
        found: list[Any] = [bool(truth.holds)]
        if truth.slack is not None:
            found += [_short(truth.slack), _short(truth.figure)]
        self.claims.setdefault(f"{self.place}, line {line}: {text}", []).append(found)

    @staticmethod
    def plain(value: Any) -> Truth:
        return Truth(value)

    @staticmethod
    def compare(operators: Sequence[str], *operands: Any) -> Truth:
        """A comparison or a chain of them; constants come as they are, other operands as functions. Like
        Python's, a chain stops where it is broken."""
        found: list[Truth] = []
        left, constant = _value(operands[0])
        for name, operand in zip(operators, operands[1:], strict=True):
            right, right_constant = _value(operand)
            holds, slack = OPERATORS[name](left, right), None
            if name in ORDER and (x := _numbers(left)) is not None and (y := _numbers(right)) is not None:
                slack = _or_worst(y - x if name.startswith("L") else x - y)
                figure = np.broadcast_to(y if constant else x, slack.shape)
                found.append(Truth(holds, slack, figure))
            else:
                found.append(Truth(holds))
            if len(operators) > 1 and not holds:
                break
            left, constant = right, right_constant
        return Recorder.every(found)

    @staticmethod
    def every(parts: Iterable[Truth | Callable[[], Truth]]) -> Truth:
        """`and`, and `all` of a comprehension: the least slack. Functions are called until one is false."""
        return _gather(parts, holds=False)

    @staticmethod
    def some(parts: Iterable[Truth | Callable[[], Truth]]) -> Truth:
        """`or` and `any`: the largest slack."""
        return _gather(parts, holds=True)

    @staticmethod
    def negate(truth: Truth) -> Truth:
        slack = None if truth.slack is None else -truth.slack
        return Truth(not truth.holds, slack, truth.figure)

    @staticmethod
    def over(truth: Truth, of_all: bool) -> Truth:
        """`all` or `any` of an array's entries."""
        holds = np.asarray(truth.holds)
        whole = bool(holds.all() if of_all else holds.any())
        if truth.slack is None or not np.size(truth.slack):
            return Truth(whole)
        at = int(np.argmin(truth.slack) if of_all else np.argmax(truth.slack))
        return Truth(whole, np.ravel(truth.slack)[at], np.ravel(truth.figure)[at])

    @staticmethod
    def close(
        call: Callable[..., bool], a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, **options: Any
    ) -> Truth:
        """``allclose`` of NumPy or torch: what is left of the tolerance."""
        holds = call(a, b, rtol=rtol, atol=atol, **options)
        x, y = (np.asarray(_array(z), np.float64) for z in (a, b))
        slack = _or_worst(atol + rtol * np.abs(y) - np.abs(x - y))
        found = Recorder.over(Truth(slack >= 0, slack, np.broadcast_to(x, slack.shape)), of_all=True)
        return Truth(holds, found.slack, found.figure)

    @staticmethod
    def in_band(
        call: Callable[..., bool], lines: Sequence[dict[str, Any]], label: str, name: str, value: float
    ) -> Truth:
        """``minisign.studies.experiment.in_band``: the distance to the nearer edge of the band."""
        low, high = experiment.band(experiment.figures(lines, label, name))
        return Truth(call(lines, label, name, value), _or_worst(min(value - low, high - value)), value)


def _gather(parts: Iterable[Truth | Callable[[], Truth]], holds: bool) -> Truth:
    """The part that decides: for ``holds``, the one with the most slack, or else the one with the least."""
    found = []
    for part in parts:
        found.append(part() if callable(part) else part)
        if callable(part) and bool(found[-1].holds) is holds:
            break
    if len(found) == 1:
        return found[0]  # may be of arrays
    bare = [truth for truth in found if truth.slack is None]
    decided = any(bool(truth.holds) is holds for truth in found)
    if any(bool(truth.holds) is holds for truth in bare) or len(bare) == len(found):
        return Truth(decided is holds)  # decided by what is not measured
    measured = [truth for truth in found if truth.slack is not None]
    worst = (max if holds else min)(measured, key=lambda truth: np.asarray(truth.slack).item())
    return Truth(decided is holds, worst.slack, worst.figure)


def _value(operand: Any) -> tuple[Any, bool]:
    return (operand(), False) if callable(operand) else (operand, True)


def _numbers(x: Any) -> np.ndarray | None:
    """In double precision; None for what has no slack."""
    x = _array(x)
    if not isinstance(x, (int, float, np.generic, np.ndarray)) or np.asarray(x).dtype.kind not in "iuf":
        return None
    return np.asarray(x, np.float64)


def _array(x: Any) -> Any:
    """Of a tensor, whatever its type, an array."""
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach().cpu()
    return (x.double() if x.is_floating_point() else x).numpy()


def _or_worst(slack: Any) -> np.ndarray:
    """−∞ for what is no number: no comparison holds of it."""
    return np.where(np.isnan(slack), -np.inf, slack)


def _short(x: Any) -> float | str:
    """Six digits; as text where JSON has no number for it."""
    x = float(f"{np.asarray(x).item():.6g}")
    return x if math.isfinite(x) else str(x)


# --- rewriting ------------------------------------------------------------------------------------


class Rewriter(ast.NodeTransformer):
    """Turns each ``assert`` into a call of ``__claims__.note``. What is not known to have a slack is
    evaluated as it stands.

    Args:
        above: lines of the file above this piece of it.
    """

    def __init__(self, above: int = 0) -> None:
        self.above = above

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        place, text = ast.Constant(node.lineno + self.above), ast.Constant(ast.unparse(node.test))
        note = _call("note", self.truth(node.test), place, text)
        return ast.fix_missing_locations(ast.copy_location(ast.Expr(note), node))

    def truth(self, node: ast.expr) -> ast.expr:
        """An expression that gives the :class:`Truth` of another."""
        match node:
            case _ if any(isinstance(x, ast.NamedExpr) for x in ast.walk(node)):
                pass  # within a function it would name something else
            case ast.BoolOp(op, values):
                name = "every" if isinstance(op, ast.And) else "some"
                return _call(name, ast.List([_later(self.truth(v)) for v in values], ast.Load()))
            case ast.UnaryOp(ast.Not(), operand):
                return _call("negate", self.truth(operand))
            case ast.Compare(left, operators, others):
                names = ast.List([ast.Constant(type(op).__name__) for op in operators], ast.Load())
                return _call("compare", names, *(x if _constant(x) else _later(x) for x in (left, *others)))
            case ast.Call(ast.Name("all" | "any" as name), [ast.GeneratorExp() | ast.ListComp() as each]):
                each.elt = self.truth(each.elt)
                return _call("every" if name == "all" else "some", each)
            case ast.Call(ast.Name("in_band") as call, arguments, keywords):
                return _call("in_band", call, *arguments, keywords=keywords)
            case ast.Call(ast.Attribute(_, "allclose") as call, arguments, keywords):
                return _call("close", call, *arguments, keywords=keywords)
            case (
                ast.Call(ast.Name("all" | "any" as name), [ast.Compare() as of], [])
                | ast.Call(ast.Attribute(_, "all" | "any" as name), [ast.Compare() as of], [])
                | ast.Call(ast.Attribute(ast.Compare() as of, "all" | "any" as name), [], [])
            ):
                return _call("over", self.truth(of), ast.Constant(name == "all"))
        return _call("plain", node)


def _call(name: str, *arguments: ast.expr, keywords: Sequence[ast.keyword] = ()) -> ast.Call:
    function = ast.Attribute(ast.Name(NAME, ast.Load()), name, ast.Load())
    return ast.Call(function, list(arguments), list(keywords))


def _later(node: ast.expr) -> ast.Lambda:
    nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    return ast.Lambda(nothing, node)


def _constant(node: ast.expr) -> bool:
    return not any(isinstance(x, (ast.Name, ast.Call, ast.Lambda)) for x in ast.walk(node))


def rewritten(function: FunctionType, recorder: Recorder) -> FunctionType:
    """A function with its assertions rewritten, and without its decorators.

    Raises:
        ValueError: it takes variables from another function around it.
    """
    if function.__code__.co_freevars:
        raise ValueError(f"{function.__qualname__} takes {function.__code__.co_freevars} from around it")
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    tree.body[0].decorator_list = []  # type: ignore[attr-defined]
    ast.increment_lineno(Rewriter(first - 1).visit(tree), first - 1)
    names: dict[str, Any] = {}
    source = function.__globals__ | {NAME: recorder}
    exec(compile(tree, inspect.getfile(function), "exec"), source, names)
    return names[function.__name__]


# --- a notebook -----------------------------------------------------------------------------------


class Shell(InteractiveShell):
    """IPython without a terminal or a kernel."""

    def enable_gui(self, gui: Any = None) -> None:
        """Nothing: figures are drawn into the outputs."""


def run_notebook(path: Path) -> dict[str, Any]:
    """Runs the code cells of a notebook in this process, which should be a fresh one, and in its folder.

    Returns:
        ``claims``, of :class:`Recorder`; ``errors``, what was raised, by the number of the code cell;
        ``differ``, the numbers of those whose output is another than the one saved, and not ignored.
    """
    recorder, shell = Recorder(), Shell.instance()
    shell.user_ns[NAME] = recorder
    shell.ast_transformers.append(rewriter := Rewriter())
    shell.display_pub = publisher = CapturingDisplayPublisher()
    shell.display_trap.hook = CapturingDisplayHook(shell=shell, outputs=publisher.outputs)
    errors: dict[str, str] = {}
    differ: list[int] = []
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    os.chdir(path.parent)
    for number, cell in enumerate(code, 1):
        recorder.place = f"cell {number}"
        publisher.outputs.clear()
        with redirect_stdout(io.StringIO()) as printed:
            result = shell.run_cell(cell.source, store_history=True)
        if isinstance(result.error_in_exec, KeyboardInterrupt):
            raise result.error_in_exec
        if error := result.error_before_exec or result.error_in_exec:
            errors[recorder.place] = f"{type(error).__name__}: {error}"
        shown = [output["data"].get("text/plain", "") for output in publisher.outputs]
        if not cell.source.startswith(MARKER) and (printed.getvalue(), shown) != saved_output(cell):
            differ.append(number)
    if rewriter not in shell.ast_transformers:
        raise RuntimeError(f"IPython has given up rewriting the assertions of {path.name}")
    return {"claims": recorder.claims, "errors": errors, "differ": differ}


def saved_output(cell: Any) -> tuple[str, list[str]]:
    """What a cell printed, and the text of what it showed."""
    printed = [o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"]
    shown = [o.data.get("text/plain", "") for o in cell.outputs if "data" in o]
    return "".join(printed), shown


# --- tests: a plugin of pytest --------------------------------------------------------------------


class Broken(AssertionError):
    """Claims of a test that do not hold."""


_recorder = Recorder()
_errors: dict[str, str] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("trained"):
            item.obj = rewritten(item.obj, _recorder)  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """A claim that does not hold is noted, and fails the test at its end."""
    _recorder.place = item.name
    before = {name: len(found) for name, found in _recorder.claims.items()}
    yield
    wrong = [
        name
        for name, found in _recorder.claims.items()
        if not all(holds for holds, *_ in found[before.get(name, 0) :])
    ]
    if wrong:
        raise Broken("; ".join(wrong))


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.excinfo and not call.excinfo.errisinstance(Broken):
        _errors[item.name] = call.excinfo.exconly()


def pytest_sessionfinish() -> None:
    record = {"claims": _recorder.claims, "errors": _errors, "differ": []}
    Path(os.environ[RECORD]).write_text(json.dumps(record))


def main() -> None:
    notebook, record = map(Path, sys.argv[1:])
    record = record.resolve()
    record.write_text(json.dumps(run_notebook(notebook.resolve())))


if __name__ == "__main__":
    main()
