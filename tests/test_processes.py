"""How the package's threads wait, and tasks side by side in processes of one thread."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import HANG, wait_until

from minisign.studies import processes
from minisign.studies.processes import default_jobs, side_by_side

ASK = "import os, sys; print(os.environ.get('OMP_WAIT_POLICY', 'unset'), 'torch' in sys.modules)"


# --- threads that wait ----------------------------------------------------------------------------


def says(*command: str, **environment: str) -> str:
    """What a fresh process prints."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, *command],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_threads_that_wait_do_not_spin_unless_the_user_says_so() -> None:
    assert says("-c", f"import minisign; {ASK}") == "PASSIVE True"
    assert says("-c", f"import minisign; {ASK}", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE True"
    assert says("-c", f"import torch, minisign; {ASK}") == "unset True"  # too late: it would be a lie


@pytest.mark.parametrize(
    "command", [("-c", "from minisign import lessons"), ("-m", "minisign.cli", "--help")]
)
def test_notebooks_and_the_command_line_set_it_before_torch_is_loaded(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    # A torch that says what it finds when it is loaded, and is not there otherwise.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os; print('waiting:', os.environ.get('OMP_WAIT_POLICY'), flush=True); os._exit(0)"
    )
    assert says(*command, PYTHONPATH=str(tmp_path)) == "waiting: PASSIVE"


def test_the_tests_themselves_wait_so() -> None:
    assert "OMP_WAIT_POLICY" in os.environ  # which minisign leaves alone where torch was there before


# --- tasks side by side ---------------------------------------------------------------------------

LONG = 2 * HANG  # seconds that a task sleeps which is to be ended before


@pytest.fixture(autouse=True)
def _nothing_is_waited_for_that_long() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < HANG


def state(number: int, tell: Callable[..., object]) -> dict[str, Any]:
    tell("began", number)
    return {
        "number": number,
        "threads": torch.get_num_threads(),
        "process": os.getpid(),
        "waiting": os.environ["OMP_WAIT_POLICY"],
        "sees Ctrl-C": signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    }


def sleep(seconds: float, tell: Callable[..., object]) -> float:
    tell(os.getpid())
    time.sleep(seconds)
    return seconds


def fail_or_sleep(message: str, tell: Callable[..., object]) -> None:
    if message:
        raise FloatingPointError(message)
    time.sleep(LONG)


def fail_or_return(message: str, tell: Callable[..., object]) -> str:
    if message:
        raise FloatingPointError(message)
    return message


def die(tell: Callable[..., object]) -> None:
    os._exit(3)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_task_has_one_thread_and_its_messages_come_before_its_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    heard: list[tuple[Any, ...]] = []
    found = {}
    for name, result in side_by_side(
        state, {x: (i,) for i, x in enumerate("abc")}, 2, lambda *m: heard.append(m)
    ):
        assert (name, "began", result["number"]) in heard
        found[name] = result
    assert {name: result["number"] for name, result in found.items()} == {"a": 0, "b": 1, "c": 2}
    assert {result["threads"] for result in found.values()} == {1}
    assert {result["waiting"] for result in found.values()} == {os.environ["OMP_WAIT_POLICY"]}
    assert {result["sees Ctrl-C"] for result in found.values()} == {False}  # from its first moment on
    assert os.getpid() not in {result["process"] for result in found.values()}
    assert len({result["process"] for result in found.values()}) <= 2
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "2"


def test_what_is_done_first_comes_first() -> None:
    tasks = {"long": (LONG,), "short": (0.0,)}
    with closing(side_by_side(sleep, tasks, 2)) as coming:
        assert next(coming) == ("short", 0.0)


def test_closed_early_all_processes_end_at_once() -> None:
    running: list[int] = []
    tasks = {"long": (LONG,), "short": (0.0,), "never begun": (LONG,)}
    with closing(side_by_side(sleep, tasks, 2, lambda name, process: running.append(process))) as coming:
        next(coming)
    assert running
    assert not any(map(alive, running))


def test_an_error_is_the_tasks_own_and_ends_the_others() -> None:
    with pytest.raises(FloatingPointError, match="the loss is nan at step 10"):
        list(side_by_side(fail_or_sleep, {"a": ("",), "b": ("the loss is nan at step 10",)}, 2))


def test_results_that_are_there_come_before_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "wait", lambda futures, **options: concurrent.futures.wait(futures))
    coming = side_by_side(fail_or_return, {"a": ("the loss is nan",), "b": ("",)}, 2)
    assert next(coming) == ("b", "")
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        next(coming)


def test_no_jobs_are_an_error_and_more_than_there_are_tasks_are_not() -> None:
    with pytest.raises(ValueError, match="jobs must be 1 or more, got 0"):
        next(side_by_side(sleep, {"a": (0.0,)}, 0))
    for jobs in ("2", 1.5, True, None):
        with pytest.raises(TypeError, match=f"jobs must be a whole number, got {jobs!r}"):
            next(side_by_side(sleep, {"a": (0.0,)}, jobs))  # type: ignore[arg-type]
    assert list(side_by_side(sleep, {"a": (0.0,)}, 2**31)) == [("a", 0.0)]


def test_a_process_that_dies_is_a_clear_error() -> None:
    with pytest.raises(ChildProcessError, match="a process died, perhaps for want of memory"):
        list(side_by_side(die, {"a": ()}, 2))


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "from minisign.studies.processes import side_by_side\n"
        "def sleep(tell):\n"
        "    tell(os.getpid())\n"
        "    time.sleep(1e6)\n"
        "if __name__ == '__main__':\n"
        "    list(side_by_side(sleep, {'a': ()}, 2, lambda name, process: print(process, flush=True)))\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not alive(child))  # not our child, whom we could wait for


# --- how many -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "files", "expected"),
    [
        (4, {}, 4),
        (4, {"/sys/fs/cgroup/cpu.max": "max 100000"}, 4),
        (4, {"/sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
        (4, {"/sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        (4, {"/proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 2500000 kB"}, 3),
        (4, {"/proc/meminfo": "MemAvailable: 9000000 kB", "/sys/fs/cgroup/memory.max": "1700000000"}, 2),
        (4, {"/proc/meminfo": "MemAvailable: 100000 kB"}, 1),
        (4, {"/proc/meminfo": "MemAvailable: 9000000 kB", "/sys/fs/cgroup/memory.max": "max"}, 4),
    ],
)
def test_as_many_as_there_are_cores_and_memory_for(
    cores: int, files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 2**24, "SC_PAGE_SIZE": 4096}.__getitem__)
    monkeypatch.setattr(processes, "_read", lambda path: files.get(path, ""))
    assert default_jobs() == expected


def test_a_file_of_the_system_that_is_not_there_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert processes._read(str(tmp_path / "cpu.max")) == "max 100000"
    assert processes._read(str(tmp_path / "memory.max")) == ""
