"""How far every claim is from failing on another processor: runs all of them under other circumstances.

    make robust
    python tests/robust.py --only 03_embedding_blowup --setting "jitter 1"

Every notebook, its solutions, and every test marked `trained` is run under each of SETTINGS, with the slack
of each assertion recorded (``tests/claims.py``). docs/robustness.jsonl has a line for each run; what it has
already, of a file whose code is the same, is kept, so that an interrupted call goes on where it was.
docs/robustness.md is made from these lines alone. Exits with 1 if a run is missing, a claim fails or is
less than three spreads from failing, or an output that is compared differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import nbformat
from outside import ROOT

from minisign.lab.files import write_whole
from minisign.studies.experiment import about
from minisign.studies.processes import ONE_THREAD

LOG, PAGE = ROOT / "docs" / "robustness.jsonl", ROOT / "docs" / "robustness.md"
JITTERS, ENOUGH, WIDE = 12, 3.0, 90
TEXT = f"""\
Sign optimizers amplify rounding, so a training ends elsewhere on another processor. Every assertion of the
notebooks, their solutions and the tests of trainings is run again and again, each time with one change that
does no more than round otherwise: {JITTERS} *jitters* (`MINISIGN_JITTER`: initial weights a few units of
rounding away), two other sets of vector instructions (`ATEN_CPU_CAPABILITY` default and avx2), two threads;
and once without a change. Solutions, which train nothing, have one jitter.

- *figure*: what is compared, the mean over these runs.
- *slack*: by how much the assertion holds, mean ± *spread* (standard deviation). `x < 3` with x = 2.5 has a
  slack of 0.5. Several conditions in one (`and`, `all`, an array) have the smallest of theirs, and an
  assertion in a loop stands here with the time when it came closest to failing.
- *least*: the smallest slack of all these runs.
- *margin*: mean slack divided by spread. Three are asked for: with less, some processor would see it fail.
- *other seeds*: the smallest slack with the seeds 3 and 7, other experiments, where it has to hold as well.

Cells are counted from 1, and only those with code."""
COLUMNS = ("margin", "where", "assertion", "figure", "slack", "least", "other seeds")
BASE = "base"
# By name: what of the environment differs from one thread, seed 0 and this processor's own instructions.
# First those that give an idea of every spread.
SETTINGS: dict[str, dict[str, str]] = {
    **{f"jitter {n}": {"MINISIGN_JITTER": str(n)} for n in range(1, 5)},
    BASE: {},
    "default": {"ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "2 threads": dict.fromkeys(ONE_THREAD, "2"),
    "seed 3": {"MINISIGN_SEED": "3"},
    "seed 7": {"MINISIGN_SEED": "7"},
    **{f"jitter {n}": {"MINISIGN_JITTER": str(n)} for n in range(5, JITTERS + 1)},
}
Line = dict[str, Any]


def files() -> list[Path]:
    """What makes claims: notebooks, solutions, and tests with the marker `trained`."""
    marked = re.compile(r"^(pytestmark = |@)pytest\.mark\.trained", re.MULTILINE)
    tests = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if marked.search(p.read_text())]
    return [*sorted((ROOT / "notebooks").glob("**/[0-9]*.ipynb")), *tests]


def settings_of(path: Path) -> list[str]:
    """Tests have no seed of their own to be given another. Solutions train nothing, so one jitter tells as
    much as twelve."""
    if path.suffix == ".py":
        return [name for name in SETTINGS if not name.startswith("seed")]
    if path.parent.name == "solutions":
        return [name for name in SETTINGS if not name.startswith("jitter") or name == "jitter 1"]
    return list(SETTINGS)


def digest(path: Path) -> str:
    """Of what a file runs: a notebook's code cells, or the whole of a test."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\0".join(cell.source for cell in cells if cell.cell_type == "code")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run(path: Path, setting: str) -> Line:
    """One line of the log.

    Raises:
        RuntimeError: the process did not come to its end.
    """
    here, name = about(), str(path.relative_to(ROOT))
    code, start = digest(path), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, "tests/claims.py", name, str(record)]
        if path.suffix == ".py":
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "claims"]
            command += ["-m", "trained", name]
        own = {**ONE_THREAD, "OMP_WAIT_POLICY": "PASSIVE", "MPLCONFIGDIR": folder}
        paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "MINISIGN_CLAIMS": str(record)}
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **own, **paths, **SETTINGS[setting]},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not record.is_file() or ended.returncode not in (0, 1):  # 1: a test failed; it is in the record
            raise RuntimeError(f"{name}, {setting}: ended with {ended.returncode}\n{ended.stdout[-2000:]}")
        found = json.loads(record.read_text())
    machine = here["machine"]
    return {
        "file": name,
        "code": code,
        "setting": setting,
        **found,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": f"{machine['processor']} ({machine['vectors']})",
        "versions": f"Python {here['versions']['python']}, torch {here['versions']['torch']}",
    }


def _parsed(path: Path, number: int, text: str) -> Line:
    try:
        line: Line = json.loads(text)
    except ValueError as error:
        raise SystemExit(f"{path}, line {number} is no JSON: {error}") from None
    return line


class Log:
    """The runs that are made, by file and setting; those of files that have changed since are dropped."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Lock()
        now = {str(p.relative_to(ROOT)): digest(p) for p in files()}
        text = path.read_text() if path.exists() else ""
        lines = [_parsed(path, number, line) for number, line in enumerate(text.splitlines(), 1)]
        self.lines = {
            (line["file"], line["setting"]): line
            for line in lines
            if now.get(line["file"]) == line["code"] and line["setting"] in settings_of(ROOT / line["file"])
        }

    def add(self, line: Line) -> None:
        with self.lock:
            self.lines[line["file"], line["setting"]] = line
            write_whole(self.path, self._write)

    def ordered(self) -> list[Line]:
        """The lines, by file and setting, in whatever order they were made."""
        order = list(SETTINGS)
        return sorted(self.lines.values(), key=lambda line: (line["file"], order.index(line["setting"])))

    def _write(self, path: Path) -> None:
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.ordered()))


# --- the page -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """An assertion, at one of the times that it was evaluated.

    Args:
        file: where it stands.
        name: cell or test, line, and its text.
        found: of each run with seed 0, whether it held, and slack and figure if it has them.
        seeds: the same of runs with another seed.
    """

    file: str
    name: str
    found: list[list[Any]]
    seeds: list[list[Any]]

    @property
    def fails(self) -> int:
        """Under how many settings it does not hold."""
        return sum(not holds for holds, *_ in (*self.found, *self.seeds))

    @property
    def slacks(self) -> list[float]:
        return [float(slack) for _, slack, _ in (x for x in self.found if len(x) > 1)]

    @property
    def figure(self) -> float:
        """Mean of what is compared."""
        return statistics.fmean(float(figure) for _, _, figure in (x for x in self.found if len(x) > 1))

    @property
    def spread(self) -> float:
        """Standard deviation of the slack over the runs with seed 0."""
        finite = len(self.slacks) > 1 and all(map(math.isfinite, self.slacks))
        return statistics.stdev(self.slacks) if finite else 0.0

    @property
    def margin(self) -> float:
        """Mean slack in spreads; infinite where rounding does not reach: a spread below a thousandth."""
        if not self.slacks or self.spread <= 1e-3 * abs(statistics.fmean(self.slacks)):
            return math.inf
        return statistics.fmean(self.slacks) / self.spread

    @property
    def key(self) -> tuple[Any, ...]:
        """To sort by: the worst first."""
        return -self.fails, self.margin, self.file, self.name

    def row(self) -> str:
        """Its line of the table."""
        where, _, text = self.name.partition(": ")
        margin = f"fails in {self.fails}" if self.fails else f"{self.margin:.1f}"
        bold = "**" if self.fails or self.margin < ENOUGH else ""
        numbers = ["", "", ""]
        if self.slacks:
            numbers = [f"{self.figure:.4g}", f"{statistics.fmean(self.slacks):.3g} ± {self.spread:.2g}"]
            numbers.append(f"{min(self.slacks):.3g}")
        seeds = [float(x[1]) for x in self.seeds if len(x) > 1]
        text = text if len(text) <= WIDE else f"{text[: WIDE - 1]}…"
        cells = [f"{bold}{margin}{bold}", f"{short(self.file)}, {where}", f"`{text}`".replace("|", "\\|")]
        return f"| {' | '.join([*cells, *numbers, f'{min(seeds):.3g}' if seeds else ''])} |"


def claims_of(file: str, lines: Sequence[Line]) -> Iterator[Claim]:
    """The claims of a file, each at the time when it was closest to failing."""
    for name in {name: None for line in lines for name in line["claims"]}:
        # By the time that it was evaluated, what became of it with seed 0 and with another.
        times: dict[int, tuple[list[Any], list[Any]]] = {}
        for line in lines:
            for i, found in enumerate(line["claims"].get(name, ())):
                times.setdefault(i, ([], []))[line["setting"].startswith("seed")].append(found)
        yield min((Claim(file, name, *time) for time in times.values()), key=lambda claim: claim.key)


def page(lines: Sequence[Line], expected: Mapping[str, int]) -> tuple[str, list[str]]:
    """The report of all runs, and all that is wrong, a sentence each.

    Args:
        expected: how many runs there should be, by file.
    """
    of = {name: [x for x in lines if x["file"] == name] for name in sorted({x["file"] for x in lines})}
    claims = {name: sorted(claims_of(name, own), key=lambda claim: claim.key) for name, own in of.items()}
    every = sorted((claim for own in claims.values() for claim in own), key=lambda claim: claim.key)
    wrong = [
        f"{short(name)}: {count - len(of.get(name, ()))} of {count} runs are missing"
        for name, count in expected.items()
        if len(of.get(name, ())) < count
    ]
    so_far = " so far" if wrong else ""
    for line in lines:
        where = f"{short(line['file'])}, {line['setting']}"
        wrong += [f"{where}: {place}: {error}" for place, error in line["errors"].items()]
        if line["differ"] and not line["setting"].startswith("seed"):
            cells = ", ".join(map(str, line["differ"]))
            wrong.append(f"{where}: the output is another than the saved one in cell {cells}")
    failing = [claim for claim in every if claim.fails]
    weak = [claim for claim in every if not claim.fails and claim.margin < ENOUGH]
    wrong += [f"{short(claim.file)}, {claim.name}: fails in {claim.fails} runs" for claim in failing]
    wrong += [f"{short(claim.file)}, {claim.name}: a margin of {claim.margin:.1f}" for claim in weak]
    hours = sum(line["seconds"] for line in lines) / 3600
    text = [
        "# How far every claim is from failing",
        "",
        f"Written by `make robust` from {len(lines)} of {sum(expected.values())} runs, which add up to "
        f"{hours:.1f} hours, with "
        f"{joined(line['versions'] for line in lines)}, on {joined(line['machine'] for line in lines)}.",
        "",
        TEXT,
        "",
        f"{len(every)} assertions{so_far}: {len(failing)} fail somewhere, {len(weak)} more have a margin "
        f"below {ENOUGH:g}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(claim.row() for claim in every if claim.fails or claim.margin < math.inf),
        "",
        "## What rounding does not reach",
        "",
        "How many assertions of each file have the same slack in all runs, to a thousandth, or none, as "
        "`a == b`.",
        "",
        *(
            f"- {short(name)}: {sum(c.margin == math.inf and not c.fails for c in own)} of {len(own)}"
            for name, own in claims.items()
        ),
        "",
        "## What is wrong",
        "",
        *(
            [f"- {fault}" for fault in wrong]
            or ["Nothing: no run failed, and printed outputs are the saved ones."]
        ),
    ]
    return "\n".join(text) + "\n", wrong


def short(file: str) -> str:
    """A file's name as the page has it: ``notebooks/03`` or ``solutions/03`` or ``test_claims``."""
    path = Path(file)
    return f"{path.parent.name}/{path.name[:2]}" if path.suffix == ".ipynb" else path.stem


def joined(names: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, metavar="N", default=2, help="runs at a time (default: 2)")
    parser.add_argument(
        "--only",
        metavar="NAME",
        nargs="+",
        default=[""],
        help="files with this in their name, such as 03 or test_watch",
    )
    parser.add_argument(
        "--setting",
        metavar="NAME",
        choices=SETTINGS,
        help="one of: base, default, avx2 (ATEN_CPU_CAPABILITY), 2 threads, seed 3, seed 7, jitter 1 to "
        f"jitter {JITTERS}",
    )
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs must be 1 or more, got {arguments.jobs}")
    chosen = [path for path in files() if any(name in path.name for name in arguments.only)]
    if not chosen:
        parser.error(f"no file has {' or '.join(map(repr, arguments.only))} in its name")
    log = Log(LOG)
    todo = [
        (path, setting)
        for setting in SETTINGS
        for path in chosen
        if setting in settings_of(path)
        and arguments.setting in (None, setting)
        and (str(path.relative_to(ROOT)), setting) not in log.lines
    ]
    todo.sort(key=lambda task: "solutions" in task[0].parts)  # which train nothing: last
    print(f"{len(todo)} runs to make")

    def make(task: tuple[Path, str]) -> None:
        line = run(*task)
        log.add(line)
        wrong = [name for name, found in line["claims"].items() if not all(x[0] for x in found)]
        print(
            f"{short(line['file'])}, {task[1]}: {line['seconds']:.0f} s",
            wrong,
            line["errors"],
            line["differ"],
            flush=True,
        )

    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            for task in [pool.submit(make, task) for task in todo]:
                if error := task.exception():
                    print(error, file=sys.stderr, flush=True)
        except KeyboardInterrupt:  # which a terminal sends to the runs at hand, too
            pool.shutdown(wait=False, cancel_futures=True)
            print(f"interrupted: {LOG.name} has what was made", file=sys.stderr)
            return 130
    wanted = {str(path.relative_to(ROOT)): len(settings_of(path)) for path in files()}
    text, wrong = page(log.ordered(), wanted)
    write_whole(PAGE, lambda path: path.write_text(text))
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
