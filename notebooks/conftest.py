"""How long each notebook took, as a table at the end of a run of nbval; and kernels that start in turn."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from filelock import FileLock

LIMIT = 75  # seconds that a notebook may take on two quiet cores
_times = pytest.StashKey[dict[str, tuple[float, float]]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    """A kernel looks for free ports before it takes them, so of two that start at once one may die. And it
    starts as for a reader, without what the tests beside it have set."""
    lock = FileLock(Path(tempfile.gettempdir()) / f"minisign-kernels-{getattr(os, 'getuid', int)()}.lock")
    with lock, mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        return (yield)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_times] = {}
    config.pluginmanager.register(Clock(config.stash[_times]))


class Clock:
    """Notes when the first cell of each file began and when the last one ended, on any process."""

    def __init__(self, times: dict[str, tuple[float, float]]) -> None:
        self.times = times

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.location[0]
        if name.endswith(".ipynb"):
            begin, end = self.times.get(name, (report.start, report.stop))
            self.times[name] = min(begin, report.start), max(end, report.stop)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    times = {name: end - begin for name, (begin, end) in sorted(config.stash[_times].items())}
    if not times:
        return
    terminalreporter.section("seconds for each notebook")
    width = max(map(len, times))
    for name, seconds in times.items():
        late = f"  more than {LIMIT}" if seconds > LIMIT else ""
        terminalreporter.write_line(f"{name:{width}} {seconds:6.1f}{late}", yellow=bool(late))
    terminalreporter.write_line(f"{f'{len(times)} files together':{width}} {sum(times.values()):6.1f}")
