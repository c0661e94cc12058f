"""The house: which room a module is in, which way the arrows point, and how large anything may be.

Imports are read from the source, those within functions and for type checkers too.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "minisign"
ENTRIES, FILE, CLASS = 12, 320, 200  # in the package's folder; lines
# A room may import from those below it and from the leaves; rooms on one floor do not know one another. On
# the floor of "minisign" are the names that `from minisign import …` gives.
FLOORS = (
    ("cli", "lessons"),
    ("studies",),
    ("minisign",),
    ("doctor",),
    ("lab",),
    ("optim",),
    ("engine",),
    ("kernels",),
)
LEAVES = ("theory", "probes", "plots")  # import nothing of the package but what is in their own room
HEAVY = ("matplotlib", "tiktoken", "triton", "transformers", "rustbpe", "rich")
# What may be larger, and why. What is here and need not be is a fault, too.
LARGE = {"theory.py": "every closed form, one after the other: the mathematics stands in one place"}
# Circles that are known, as their modules, and why.
CIRCLES: dict[tuple[str, ...], str] = {}
Graph = dict[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """The file of each module, by its dotted name."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(package: Path) -> Graph:
    """The package's own modules that each of them imports, wherever the statement stands."""
    files = modules(package)

    def named(tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"line {node.lineno}: write the module's whole name"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in files else str(node.module)

    return {name: set(named(ast.parse(file.read_text()))) & set(files) for name, file in files.items()}


def circles(graph: Graph) -> set[tuple[str, ...]]:
    """Modules each of which imports, over others, all of them."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    all_reached = {name: reached(name) for name in graph}
    return {
        tuple(sorted(other for other in found if name in all_reached[other]))
        for name, found in all_reached.items()
        if name in found
    }


def room(module: str) -> str:
    """``"lab"`` of ``minisign.lab.gpt``; ``"minisign"`` of the package itself."""
    return [*module.split("."), "minisign"][1]


def wrong_arrows(graph: Graph) -> list[str]:
    """Imports that lead upwards, from a leaf to the rest, or from or to a room that has no floor."""
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}

    def is_right(here: str, there: str) -> bool:
        if here == there:
            return True
        if here in LEAVES:
            return False
        return here in floor and (there in LEAVES or floor.get(there, -1) > floor[here])

    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if not is_right(room(module), room(other))
    ]


def too_large(package: Path) -> set[str]:
    """Files, and classes as ``file::Class``."""
    found = set()
    for file in package.rglob("*.py"):
        text, name = file.read_text(), file.relative_to(package).as_posix()
        if len(text.splitlines()) > FILE:
            found.add(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno >= CLASS:
                found.add(f"{name}::{node.name}")
    return found


def entries(package: Path) -> list[str]:
    return sorted(p.name for p in package.iterdir() if p.name != "__pycache__")


def unexplained(package: Path) -> list[str]:
    """Folders whose ``__init__.py`` does not say in its first line, a sentence, what they are for."""
    folders = [p for p in (package, *package.rglob("*")) if p.is_dir() and any(p.glob("*.py"))]
    found = []
    for folder in folders:
        file = folder / "__init__.py"
        doc = ast.get_docstring(ast.parse(file.read_text())) if file.is_file() else None
        line = (doc or "").partition("\n")[0]
        if len(line.split()) < 4 or not line.endswith("."):
            found.append(folder.name)
    return found


# --- the package ----------------------------------------------------------------------------------


def test_twelve_entries_are_what_a_newcomer_reads() -> None:
    assert len(entries(PACKAGE)) <= ENTRIES, entries(PACKAGE)


def test_every_room_is_on_a_floor_or_a_leaf() -> None:
    rooms = {room(module) for module in modules(PACKAGE)}
    assert rooms <= {*LEAVES, *(name for names in FLOORS for name in names)}


def test_every_folder_says_what_it_is_for() -> None:
    assert unexplained(PACKAGE) == []


def test_arrows_point_down() -> None:
    assert wrong_arrows(imports(PACKAGE)) == []


def test_no_module_imports_itself_over_others() -> None:
    assert circles(imports(PACKAGE)) == set(CIRCLES)


def test_files_and_classes_can_be_read_in_one_go() -> None:
    assert too_large(PACKAGE) == set(LARGE)


def test_importing_minisign_loads_nothing_heavy() -> None:
    names = "AdamW, EmbeddingWatch, Hybrid, Lion, Signum, Tiger, param_groups, track_rows"
    code = f"import sys; from minisign import {names}; print([x for x in {HEAVY} if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", ["guard", "hf", "repair"])
def test_where_readme_had_a_module_before_there_were_rooms(name: str) -> None:
    code = (
        f"import sys, minisign; assert 'minisign.doctor.{name}' not in sys.modules; "
        f"import minisign.{name} as old; from minisign.{name} import __name__ as called; "
        f"import minisign.doctor.{name} as new; assert old is new is minisign.{name}; "
        "print(called, new.__spec__.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"minisign.doctor.{name}"] * 2
    with pytest.raises(ModuleNotFoundError, match=r"minisign\.gard"):
        importlib.import_module("minisign.gard")


# --- houses in which something is wrong -----------------------------------------------------------


SOUND = {
    "theory.py": "",
    "optim/lion.py": "import torch\n\nfrom minisign import theory\n",
    "probes/blocks.py": "from minisign.probes import losses\n",
    "probes/losses.py": "",
    "lab/gpt.py": "from minisign.lab import loss\nfrom minisign.optim import lion\n",
    "lab/loss.py": "def f():\n    from minisign.probes.blocks import Blocks\n",
    "doctor/watch.py": "import minisign.lab.gpt\nfrom minisign.theory import bound\n",
}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small one in which nothing is wrong."""
    package = tmp_path / "minisign"
    for folder in ("", "doctor", "lab", "optim", "probes"):
        (package / folder).mkdir()
        (package / folder / "__init__.py").write_text('"""What is in this folder."""\n')
    for file, text in SOUND.items():
        (package / file).write_text(text)
    return package


def test_a_sound_house(house: Path) -> None:
    graph = imports(house)
    assert graph["minisign.lab.gpt"] == {"minisign.lab.loss", "minisign.optim.lion"}
    assert graph["minisign.doctor.watch"] == {"minisign.lab.gpt", "minisign.theory"}
    assert wrong_arrows(graph) == []
    assert circles(graph) == set()
    assert too_large(house) == set()
    assert unexplained(house) == []
    assert entries(house) == ["__init__.py", "doctor", "lab", "optim", "probes", "theory.py"]


@pytest.mark.parametrize(
    ("file", "line", "other"),
    [
        ("lab/loss.py", "from minisign.doctor.watch import Watch", "minisign.doctor.watch"),
        ("lab/loss.py", "def f():\n    import minisign.doctor.watch", "minisign.doctor.watch"),
        ("optim/lion.py", "if TYPE_CHECKING:\n    from minisign.lab import gpt", "minisign.lab.gpt"),
        ("probes/losses.py", "from minisign.optim.lion import Lion", "minisign.optim.lion"),
        ("theory.py", "from minisign.probes import losses", "minisign.probes.losses"),
        ("lab/loss.py", "from minisign import EmbeddingWatch", "minisign"),
    ],
)
def test_an_arrow_that_points_up(house: Path, file: str, line: str, other: str) -> None:
    (house / file).write_text(f"{line}\n")
    module = f"minisign.{file.removesuffix('.py').replace('/', '.')}"
    assert wrong_arrows(imports(house)) == [f"{module} imports {other}"]


def test_rooms_on_one_floor_and_rooms_without_one(house: Path) -> None:
    for name in ("cli", "lessons", "attic"):
        (house / name).mkdir()
        (house / name / "__init__.py").write_text("from minisign import cli, lab, theory\n")
    assert wrong_arrows(imports(house)) == [
        "minisign.attic imports minisign.cli",
        "minisign.attic imports minisign.lab",
        "minisign.attic imports minisign.theory",
        "minisign.lessons imports minisign.cli",
    ]


def test_a_circle_is_found_through_functions_and_within_a_room(house: Path) -> None:
    (house / "lab" / "text.py").write_text("def f():\n    from minisign.lab import gpt\n")
    (house / "lab" / "loss.py").write_text("if TYPE_CHECKING:\n    from minisign.lab.text import Text\n")
    assert circles(imports(house)) == {("minisign.lab.gpt", "minisign.lab.loss", "minisign.lab.text")}


def test_a_long_file_and_a_long_class(house: Path) -> None:
    (house / "lab" / "gpt.py").write_text("x = 1\n" * 320)
    (house / "lab" / "loss.py").write_text("class Loss:\n" + "    x = 1\n" * 199)
    assert too_large(house) == set()
    (house / "lab" / "gpt.py").write_text("x = 1\n" * 321)
    (house / "lab" / "loss.py").write_text("class Loss:\n" + "    x = 1\n" * 200)
    assert too_large(house) == {"lab/gpt.py", "lab/loss.py::Loss"}


def test_folders_that_do_not_say_what_they_are_for(house: Path) -> None:
    (house / "lab" / "__init__.py").write_text("")
    (house / "optim" / "__init__.py").write_text('"""Optimizers."""\n')
    (house / "probes" / "__init__.py").unlink()
    assert sorted(unexplained(house)) == ["lab", "optim", "probes"]
