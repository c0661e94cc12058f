"""The rules that every notebook of the course keeps, and that each of them can be broken."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_rules import MARKER, exercises, faults

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLUTIONS], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_notebooks_keep_the_rules(path: Path) -> None:
    assert faults(path) == []


def test_there_are_notebooks_and_each_has_its_solutions_and_its_module() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i:02d}" for i in range(len(NOTEBOOKS))]
    lessons = [path for path in NOTEBOOKS if not path.name.startswith("00_")]
    assert len(lessons) >= 8
    assert [path.name for path in lessons] == [path.name for path in SOLUTIONS]
    for notebook, solution in zip(lessons, SOLUTIONS, strict=True):
        assert exercises(notebook) == exercises(solution)
        assert importlib.import_module(f"minisign.lessons.{notebook.stem[3:]}").__doc__


def test_links_between_notebooks_lead_somewhere() -> None:
    for path in [*NOTEBOOKS, *SOLUTIONS]:
        text = "".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / target).is_file(), f"{path.name} links to {target}"


# --- a good notebook, and each way to spoil it ----------------------------------------------------


def shown(text: str) -> Any:
    return new_output("execute_result", {"text/plain": text}, execution_count=1)


KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
FIGURE = new_output("display_data", {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"})


def good() -> NotebookNode:
    """A notebook without a fault: start, claim, figure, assertion, two exercises."""
    cells = [
        new_markdown_cell("# 1 · A title\n\nWhat it is about."),
        new_code_cell(f"{MARKER}\n%matplotlib inline\nfrom minisign import lessons\n\nlessons.start()"),
        new_markdown_cell("## A part\n\n**Prediction.** It comes out as 0.5."),
        new_code_cell("half = 1 / 2", outputs=[FIGURE]),
        new_markdown_cell("The figure shows 0.5 and nothing else."),
        new_code_cell("assert half == 0.5"),
        new_markdown_cell("### Exercise 1: a step\n\nWrite it."),
        new_code_cell("def step():\n    raise NotImplementedError"),
        new_code_cell("check_step(step)", outputs=[shown("Not yet: the function is still empty.")]),
        new_markdown_cell("### Exercise 2: find the bug\n\nMend it."),
        new_code_cell("check_bug(step)", outputs=[shown("Not yet: it is a bug.")]),
    ]
    return numbered(new_notebook(cells=cells, metadata=KERNEL))


def good_solutions() -> NotebookNode:
    cells = [
        new_code_cell("from minisign import lessons\n\nlessons.start()"),
        new_markdown_cell("### Exercise 1: a step\n\nSo."),
        new_code_cell("verdict = check(1)\nassert verdict\nverdict", outputs=[shown("Right.")]),
    ]
    return numbered(new_notebook(cells=cells, metadata=KERNEL))


def numbered(notebook: NotebookNode) -> NotebookNode:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        cell.execution_count = number
    return notebook


def faults_of(notebook: NotebookNode, folder: Path, name: str = "01_a.ipynb") -> list[str]:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return faults(path)


def test_a_good_notebook_has_no_faults(tmp_path: Path) -> None:
    assert faults_of(good(), tmp_path) == []
    assert faults_of(good_solutions(), tmp_path, "solutions/01_a.ipynb") == []


def stderr(text: str) -> Any:
    return new_output("stream", name="stderr", text=text)


def insert(at: int, *cells: Any) -> Callable[[NotebookNode], object]:
    def spoil(notebook: NotebookNode) -> None:
        notebook.cells[at:at] = cells
        numbered(notebook)

    return spoil


def source(at: int, text: str) -> Callable[[NotebookNode], object]:
    return lambda notebook: notebook.cells[at].update(source=text)


def output(at: int, new: Any) -> Callable[[NotebookNode], object]:
    return lambda notebook: notebook.cells[at].outputs.append(new)


def ignored(notebook: NotebookNode) -> None:
    notebook.cells[3:3] = [new_code_cell(f"{MARKER}\nprint({i})") for i in range(3)]
    numbered(notebook)


SPOILED: dict[str, tuple[Callable[[NotebookNode], object], str]] = {
    "never executed": (lambda n: n.cells[5].update(execution_count=None), "code cell 3 was never executed"),
    "executed out of order": (lambda n: n.cells[5].update(execution_count=9), "was executed as number 9"),
    "stored error": (output(5, new_output("error", ename="ValueError")), "stores an error, ValueError"),
    "stderr": (output(3, stderr("Warning: x\n")), "writes to stderr: 'Warning: x'"),
    "foreign kernel": (
        lambda n: n.metadata.update(kernelspec={"name": "venv"}),
        "its kernelspec is 'venv'",
    ),
    "no kernel": (lambda n: n.metadata.clear(), "its kernelspec is None"),
    "marker without a space": (source(1, "#NBVAL_IGNORE_OUTPUT\nlessons.start()"), "malformed marker"),
    "marker misspelt": (source(1, "# NBVAL_IGNORE_OUTPUTS\nlessons.start()"), "malformed marker"),
    "marker not first": (source(1, f"lessons.start()\n{MARKER}"), "malformed marker"),
    "marker that skips": (source(5, "# NBVAL_SKIP\nassert half"), "malformed marker '# NBVAL_SKIP'"),
    "marker that wants an error": (source(5, "# NBVAL_RAISES_EXCEPTION\nassert half"), "malformed marker"),
    "marker as a tag": (lambda n: n.cells[5].metadata.update(tags=["nbval-skip"]), "metadata ['tags']"),
    "timing": (lambda n: n.cells[5].metadata.update(execution={"a": "b"}), "metadata ['execution']"),
    "too many ignored": (ignored, "4 cells are ignored, more than 3"),
    "bare claim": (source(5, "half"), "no assertion follows the claim “It comes out as 0.5.…”"),
    "claim after claim": (
        source(2, "**Claim.** First thing.\n\n**Claim.** Second thing."),
        "no assertion follows the claim “First thing.",
    ),
    "assertion after the heading": (
        insert(4, new_markdown_cell("It is 0.5.\n\n### Another matter")),
        "no assertion follows the claim",
    ),
    "claim at the end": (insert(11, new_markdown_cell("**Claim.** All is well.")), "“All is well."),
    "bold that is no claim": (source(2, "A **very** bold word."), "**very** is bold and neither"),
    "constant assertion": (source(5, "assert True"), "asserts a constant: 'assert True'"),
    "compared constants": (source(5, "assert 1 < 2, 'so it is'"), "asserts a constant"),
    "caught exception": (source(5, "try:\n    assert half\nexcept Exception:\n    pass"), "catches exce"),
    "not Python": (source(7, "def step(:"), "is not Python"),
    "long cell": (source(7, "x = 1\n" * 17), "has 17 lines, more than 16"),
    "torch first": (
        source(1, "from torch import nn\nfrom minisign import lessons\n\nlessons.start()"),
        "loads torch before minisign",
    ),
    "no start": (source(1, "import minisign"), "does not call lessons.start()"),
    "machine path": (output(3, shown("'/home/me/file'")), "belongs to one machine: '/home/'"),
    "address": (output(3, shown("<object at 0x7f3a12bc>")), "belongs to one machine: '0x7f3a12bc'"),
    "figure without a sentence": (source(4, "## Next part"), "no sentence follows the figure of cell 3"),
    "figure before code": (lambda n: n.cells.pop(4), "no sentence follows the figure of cell 3"),
    "figure with two sentences": (source(4, "One here. Two here."), "not one sentence: 'One here."),
    "one exercise": (lambda n: n.cells.__delitem__(slice(6, 9)), "the exercises ['2'], not two to four"),
    "no bug to find": (source(9, "### Exercise 2: a walk"), "0 exercises are called “find the bug”"),
    "accepted stub": (lambda n: n.cells[8].update(outputs=[shown("Right.")]), "stub of exercise 1, a step"),
}


@pytest.mark.parametrize(("spoil", "expected"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_notebook_is_rejected(
    spoil: Callable[[NotebookNode], object], expected: str, tmp_path: Path
) -> None:
    notebook = good()
    spoil(notebook)
    assert any(expected in fault for fault in faults_of(notebook, tmp_path)), faults_of(notebook, tmp_path)


@pytest.mark.parametrize(
    ("at", "change", "expected"),
    [
        (2, {"outputs": [shown("Not yet: no.")]}, "no checker accepts exercise 1, a step"),
        (2, {"source": "check(1)"}, "no assertion says that exercise 1, a step, is solved"),
    ],
)
def test_spoiled_solutions_are_rejected(
    at: int, change: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    notebook = good_solutions()
    notebook.cells[at].update(change)
    assert faults_of(notebook, tmp_path, "solutions/01_a.ipynb") == [expected]


def test_the_first_notebook_has_no_exercises(tmp_path: Path) -> None:
    assert faults_of(good(), tmp_path, "00_start.ipynb") == ["the first notebook has exercises"]
