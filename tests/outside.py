"""What the long checks outside ``make test`` share: pytest in a process of its own, and their reports."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minisign.experiment import about

ROOT = Path(__file__).parent.parent
NBVAL = ("--nbval", "--nbval-current-env", "--nbval-cell-timeout=300")


@dataclass(frozen=True)
class Outcome:
    """How a run of pytest ended: its exit status (0 all passed, 1 some failed), seconds, and output."""

    status: int
    seconds: float
    output: str


def run_pytest(root: Path, arguments: Sequence[str], **environment: str) -> Outcome:
    """pytest in ``root``, with the package that lies there and one thread unless told otherwise."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=root, env={**os.environ, **settings}, capture_output=True, text=True)
    return Outcome(done.returncode, time.perf_counter() - start, done.stdout + done.stderr)


def report(
    title: str, command: str, text: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
    """A page of Markdown: which command made it, on what, what it shows, and a table."""
    here = about()
    versions, machine = here["versions"], here["machine"]
    lines = [
        f"# {title}",
        "",
        f"Written by `{command}` with Python {versions['python']} and torch {versions['torch']}, "
        f"on {machine['processor']} ({machine['vectors']}).",
        "",
        text,
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"
