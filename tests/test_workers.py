"""How the tests share the workers: the longest first, and what is dear is made once."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest
from once import Once
from outside import ROOT, run_pytest

WITHOUT = ("-p", "no:nbval", "-p", "no:hypothesispytest")  # which take long to load
spec = importlib.util.spec_from_file_location("workers", ROOT / "conftest.py")
assert spec is not None
assert spec.loader is not None
workers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(workers)


@pytest.mark.parametrize("begin", workers.SLOW)
def test_what_is_slow_is_there(begin: str) -> None:
    place, _, test = begin.partition("::")
    assert (ROOT / place).exists()
    assert not test or f"def {test.partition('[')[0]}" in (ROOT / place).read_text()


def test_a_worker_takes_the_longest_first(tmp_path: Path) -> None:
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow:\n")
    for file in ("tests/test_claims.py", "tests/test_a.py", "tests/test_z.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("def test_b(): pass\ndef test_a(): pass\n")

    def ran(*arguments: str) -> list[str]:
        done = run_pytest(tmp_path, ["-vv", "-n", "1", *WITHOUT, *arguments])
        assert done.returncode == 0, done.stdout
        return re.findall(r"PASSED tests/test_(\S+)", done.stdout)

    quick = ["a.py::test_b", "a.py::test_a", "z.py::test_b", "z.py::test_a"]
    assert ran() == ["claims.py::test_b", "claims.py::test_a", *quick]
    assert ran("-m", "not slow") == quick


def test_there_is_a_worker_for_each_core_and_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, gibibytes, expected in ((2, 64, 2), (8, 4, 2), (64, 1, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)), raising=False)
        memory = {"SC_PHYS_PAGES": gibibytes << 20, "SC_PAGE_SIZE": 1024}
        monkeypatch.setattr(os, "sysconf", memory.__getitem__)
        monkeypatch.setattr("minisign.studies.processes._read", lambda path: "")
        assert workers.pytest_xdist_auto_num_workers() == expected


def test_once_is_once_and_a_failure_is_tried_again(tmp_path: Path) -> None:
    made: list[int] = []

    def make(folder: Path) -> None:
        made.append(len(made))
        if len(made) == 1:
            raise OSError("no space")
        (folder / "file").write_text("done")

    with pytest.raises(OSError, match="no space"):
        Once(tmp_path)("it", make)
    for worker in (Once(tmp_path), Once(tmp_path)):
        assert (worker("it", make) / "file").read_text() == "done"
    assert made == [0, 1]
