"""Processes that tests start and wait for, on a machine of any speed."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable

# Processes that need not import again what takes seconds. It finds installed modules only, and torch's
# optimizers load torch._dynamo at their first step.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "minisign.studies.reproduce",
        "minisign.doctor.guard",
        "minisign.doctor.inspection",
        "minisign.doctor.pretrained",
        "pytest",
        "safetensors.torch",
        "torch._dynamo",
    ]
)
HANG = 900  # seconds until what is waited for is taken to hang; no test is meant to come near it


def wait_until(happened: Callable[[], bool], is_running: Callable[[], bool] = lambda: True) -> None:
    """Waits for what a process, which must be running until then, is going to do."""
    end = time.monotonic() + HANG
    while not happened():
        assert is_running(), "it ended before"
        assert time.monotonic() < end, f"it has not happened in {HANG} seconds"
        time.sleep(0.002)
