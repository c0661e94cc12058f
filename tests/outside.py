"""What the long checks outside ``make test`` share: pytest in a process of its own, and their reports."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from minisign.studies.experiment import about
from minisign.studies.processes import ONE_THREAD

ROOT = Path(__file__).parent.parent
NBVAL = ("--nbval-current-env", "--nbval-cell-timeout=900")  # and --nbval, or --nbval-lax


def run_pytest(
    root: Path, arguments: Sequence[str], python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """pytest in ``root``, with the package that lies there and one thread unless told otherwise.

    Its ``returncode`` is 0 if all passed and 1 if some failed; what it printed is in ``stdout``.
    """
    settings = {**ONE_THREAD, "PYTHONPATH": str(root), **environment}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command,
        cwd=root,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


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
