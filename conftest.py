"""How tests and notebooks share the workers of pytest-xdist, and which of them are slow."""

from __future__ import annotations

import os
from typing import Any

import pytest

# What begins so takes long; the longest first. Workers begin with it, in this order, so that none is left
# with a long one when the others are done; `make quick` leaves it out.
SLOW = ("tests/test_claims.py", "notebooks/")
GIBIBYTES = 2  # of memory for a worker, with the kernel of its notebook


def _place(item: pytest.Item) -> int:
    """Of the item among the slow ones; behind them, if it is quick."""
    return next((i for i, begin in enumerate(SLOW) if item.nodeid.startswith(begin)), len(SLOW))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _place(item) < len(SLOW):
            item.add_marker(pytest.mark.slow)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=_place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """As many as there are cores that this process may use, and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    return max(1, min(cores, memory // GIBIBYTES))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The next test goes to the worker that is free next; xdist's own hands tests out in advance. Cells of
    a notebook stay together, in order."""
    from xdist.scheduler import LoadScopeScheduling

    class OneByOne(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.endswith(".ipynb") else nodeid

    config.option.loadscopereorder = False  # keep the order of the items
    return OneByOne(config, log) if config.getvalue("dist") == "load" else None
