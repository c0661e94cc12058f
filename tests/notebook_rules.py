"""What makes a notebook of the course one that cannot pass without checking anything.

:func:`faults` names everything that is wrong with one; no notebook is executed.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import nbformat

MARKER = "# NBVAL_IGNORE_OUTPUT"
IGNORED = 3  # cells at most
LINES = 16  # of a code cell at most
CLAIM = re.compile(r"\*\*(Prediction|Claim)( \([^)*]+\))?\.\*\*")
BOLD = re.compile(r"\*\*.+?\*\*|__.+?__")
EXERCISE = re.compile(r"^### Exercise (\d+): (.+)$", re.MULTILINE)
HEADING = re.compile(r"^#{1,3} ", re.MULTILINE)
MACHINE = re.compile(r"(?<![\w.])/(home|root|work|tmp|Users|usr)/|0x[0-9a-f]{6,}")
Cell = Any


def faults(path: Path) -> list[str]:
    """Everything that is wrong with a notebook, one sentence each; solutions are known by their folder."""
    notebook = nbformat.read(path, as_version=4)
    cells, found = notebook.cells, []
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        found.append(f"not a valid notebook: {str(error).splitlines()[0]}")
    if (kernel := notebook.metadata.get("kernelspec", {}).get("name")) != "python3":
        found.append(f"its kernelspec is {kernel!r}, not 'python3'")
    code = [cell for cell in cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        found += [f"code cell {number} {fault}" for fault in _of_a_code_cell(cell, number)]
    if (ignored := sum(MARKER in cell.source for cell in code)) > IGNORED:
        found.append(f"{ignored} cells are ignored, more than {IGNORED}")
    if not any("lessons.start()" in cell.source for cell in code[:1]):
        found.append("the first code cell does not call lessons.start()")
    if _loads_torch_first(code[:1]):
        found.append("the first code cell loads torch before minisign, which says how its threads wait")
    if "solutions" in path.parts:
        return found + _of_solutions(cells)
    return found + _of_claims(cells) + _of_figures(cells) + _of_exercises(cells, path.stem)


def _of_a_code_cell(cell: Cell, number: int) -> list[str]:
    found = []
    lines = cell.source.splitlines()
    if cell.execution_count is None:
        found.append("was never executed")
    elif cell.execution_count != number:
        found.append(f"was executed as number {cell.execution_count}")
    if len(lines) > LINES:
        found.append(f"has {len(lines)} lines, more than {LINES}")
    if cell.metadata:
        found.append(f"has metadata {sorted(cell.metadata)}")
    for i, line in enumerate(lines):
        if "nbval" in line.lower() and (line != MARKER or i):
            found.append(f"has a malformed marker {line!r}: {MARKER!r} on its first line is the only one")
    for output in cell.outputs:
        if output.output_type == "error":
            found.append(f"stores an error, {output.ename}")
        if output.output_type == "stream" and output.name == "stderr":
            found.append(f"writes to stderr: {output.text.splitlines()[0]!r}")
        if (text := _text(output)) and (match := MACHINE.search(text)):
            found.append(f"shows what belongs to one machine: {match.group()!r}")
    if (tree := _parse(cell)) is None:
        return [*found, "is not Python"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and not any(
            isinstance(x, (ast.Name, ast.Call)) for x in ast.walk(node.test)
        ):
            found.append(f"asserts a constant: {ast.unparse(node)!r}")
        if isinstance(node, ast.ExceptHandler):
            found.append("catches exceptions")
    return found


def _loads_torch_first(first: list[Cell]) -> bool:
    """Whether ``import torch`` or ``from torch… import …`` comes before minisign's."""
    names: list[str] = []
    for node in ast.walk((first and _parse(first[0])) or ast.Module([], [])):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    packages = [name.partition(".")[0] for name in names]
    return next((p for p in packages if p in ("minisign", "torch")), "") == "torch"


def _of_claims(cells: list[Cell]) -> list[str]:
    """A claim in bold needs an assertion before the next claim or heading; nothing else is bold."""
    found, open_claim = [], ""
    for cell in cells:
        if cell.cell_type == "code":
            tree = _parse(cell)
            if tree and any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
                open_claim = ""
            continue
        for bold in BOLD.findall(cell.source):
            if not CLAIM.fullmatch(bold):
                found.append(f"{bold} is bold and neither a prediction nor a claim")
        places = sorted(
            [(m.start(), "") for m in HEADING.finditer(cell.source)]
            + [(m.end(), cell.source[m.end() :].strip()[:50]) for m in CLAIM.finditer(cell.source)]
        )
        for _, claim in places:
            if open_claim:
                found.append(f"no assertion follows the claim “{open_claim}…”")
            open_claim = claim
    if open_claim:
        found.append(f"no assertion follows the claim “{open_claim}…”")
    return found


def _of_figures(cells: list[Cell]) -> list[str]:
    found = []
    for i, cell in enumerate(cells):
        if cell.cell_type == "code" and any("image/png" in o.get("data", {}) for o in cell.outputs):
            after = cells[i + 1] if i + 1 < len(cells) else None
            text = after.source.split("\n\n")[0] if after and after.cell_type == "markdown" else ""
            if not text or HEADING.match(text) or CLAIM.match(text):
                found.append(f"no sentence follows the figure of cell {i}")
            elif len(re.findall(r"[.!?](?=\s|$)", text)) != 1:
                found.append(f"what follows the figure of cell {i} is not one sentence: {text[:50]!r}")
    return found


def _of_exercises(cells: list[Cell], name: str) -> list[str]:
    """Two to four, one of them to find a bug, each with a stub that its checker turns down."""
    headings = _headings(cells)
    if name.startswith("00_"):
        return ["the first notebook has exercises"] if headings else []
    found = []
    if not 2 <= len(headings) <= 4 or [int(n) for n, _ in headings] != list(range(1, len(headings) + 1)):
        found.append(f"it has the exercises {[n for n, _ in headings]}, not two to four in order")
    if (bugs := sum(title == "find the bug" for _, title in headings)) != 1:
        found.append(f"{bugs} exercises are called “find the bug”, not one")
    for number, title, after in _under_exercises(cells):
        if not any(_text(output).startswith("Not yet: ") for cell in after for output in cell.outputs):
            found.append(f"no checker turns down the stub of exercise {number}, {title}")
    return found


def _of_solutions(cells: list[Cell]) -> list[str]:
    found = []
    for number, title, after in _under_exercises(cells):
        if not any("assert verdict" in cell.source for cell in after):
            found.append(f"no assertion says that exercise {number}, {title}, is solved")
        if not any(_text(output) == "Right." for cell in after for output in cell.outputs):
            found.append(f"no checker accepts exercise {number}, {title}")
    return found


def exercises(path: Path) -> list[tuple[str, str]]:
    """Number and title of each exercise."""
    return _headings(nbformat.read(path, as_version=4).cells)


def _headings(cells: list[Cell]) -> list[tuple[str, str]]:
    return [m for cell in cells if cell.cell_type == "markdown" for m in EXERCISE.findall(cell.source)]


def _under_exercises(cells: list[Cell]) -> list[tuple[str, str, list[Cell]]]:
    """Number, title and code cells of each exercise."""
    found: list[tuple[str, str, list[Cell]]] = []
    for cell in cells:
        if cell.cell_type == "code" and found:
            found[-1][2].append(cell)
        elif cell.cell_type == "markdown" and (match := EXERCISE.search(cell.source)):
            found.append((match[1], match[2], []))
    return found


def _parse(cell: Cell) -> ast.Module | None:
    """The cell's Python, with magics as comments; None if it is not Python."""
    try:
        return ast.parse(re.sub(r"^%", "#%", cell.source, flags=re.MULTILINE))
    except SyntaxError:
        return None


def _text(output: Any) -> str:
    """What an output shows as text."""
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    return str(text)
