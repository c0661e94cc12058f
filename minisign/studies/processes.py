"""Tasks side by side, each in a process of one thread.

A model as small as those here gains little from a second thread, and with one its bits depend neither on
the number of cores nor on what runs beside it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from minisign.engine.checks import check_counts

MEMORY = 0.8e9  # bytes; a process that trains the main job's model takes two thirds of it

# Where torch has MKL, that has a variable of its own, which wins.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Result = TypeVar("Result")


def default_jobs(memory: float = MEMORY) -> int:
    """As many as this process may use cores and has memory for, at least one; ``memory``: bytes of each."""
    return max(1, int(min(_cores(), _memory() / memory)))


def _cores() -> int:
    # By affinity where the system has it, and by the quota of a container.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(cores, max(1, int(quota) // int(period))) if quota.isdecimal() else cores


def _memory() -> float:
    """Bytes that are free, as far as the system says."""
    free = [float("inf")]
    if hasattr(os, "sysconf"):  # all that there is, where nothing says what is free
        free.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    if (limit := _read("/sys/fs/cgroup/memory.max")).isdecimal():
        free.append(float(limit))
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(1024 * float(line.split()[1]))
    return min(free)


def _read(path: str) -> str:
    """What a file of the system says; nothing where there is none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def side_by_side(
    work: Callable[..., Result],
    tasks: Mapping[str, tuple[Any, ...]],
    jobs: int,
    hear: Callable[..., object] = lambda name, *message: None,
) -> Generator[tuple[str, Result], None, None]:
    """Calls ``work(*arguments, tell)`` for each task, ``jobs`` at a time, and gives its name and result.

    Closed early, or left by Ctrl-C or an error of a task, it ends all processes within seconds. They end
    with this one, too, however it ends.

    Args:
        work: a function at the top of its module; processes are spawned, arguments and results pickled.
            ``tell(*message)`` has ``hear(name, *message)`` called in this process.
        tasks: by name, the arguments.

    Raises:
        ValueError, TypeError: no jobs. ChildProcessError: a process died. Whatever ``work``
            raises, after the results that are there.
    """
    check_counts(jobs=jobs)
    context = get_context("spawn")
    messages = context.SimpleQueue()  # whose messages are here when the result is
    lifeline, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(max(1, min(jobs, len(tasks))), context, _start, (messages, lifeline))
    waiting = {}
    try:
        with _one_thread(), _ctrl_c_is_for_the_parent():
            for name, arguments in tasks.items():
                waiting[pool.submit(_work, work, name, arguments)] = name
        while waiting:
            done, _ = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
            while not messages.empty():
                hear(*messages.get())
            # In the order of the tasks, and what failed last.
            for future in sorted(
                (x for x in waiting if x in done), key=lambda x: x.exception() is not None
            ):
                yield waiting.pop(future), future.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process died, perhaps for want of memory: fewer jobs at a time need less. If it could not "
            "begin: a script that asks for processes needs `if __name__ == '__main__'`"
        ) from None
    finally:
        if waiting:
            held.close()
        pool.shutdown(cancel_futures=True)
        held.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started now read it when they load torch."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


@contextmanager
def _ctrl_c_is_for_the_parent() -> Iterator[None]:
    """A terminal sends Ctrl-C to processes started now as well: they never see it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where :func:`_start` sees to it, a little later
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in the processes -----------------------------------------------------------------------------

_messages: Any = None
_working = False


def _start(messages: Any, lifeline: Any) -> None:
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Any) -> None:
    """Waits until the parent lets go of its end, or is no more."""
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    if not _working:
        time.sleep(1)  # a result may be on its way, and half of one would be waited for without end
    os._exit(1)


def _work(work: Callable[..., Result], name: str, arguments: tuple[Any, ...]) -> Result:
    global _working
    _working = True
    try:
        return work(*arguments, partial(_tell, name))
    finally:
        _working = False


def _tell(*message: Any) -> None:
    _messages.put(message)
