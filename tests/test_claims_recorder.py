"""What is recorded of each kind of assertion, and that nothing that fails is lost."""

from __future__ import annotations

import ast
import json
import math
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import robust
import torch
from claims import NAME, Recorder, Rewriter, rewritten
from nbformat import write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from outside import ROOT
from processes import HANG
from robust import SETTINGS, Claim, Log, claims_of, digest, files, page, settings_of

from minisign.studies.experiment import in_band
from minisign.studies.processes import ONE_THREAD


def recorded(source: str, **names: Any) -> list[list[Any]]:
    """What is noted of the assertions of a piece of Python, one after the other."""
    recorder = Recorder()
    tree = Rewriter().visit(ast.parse(source))
    exec(compile(tree, "piece", "exec"), {NAME: recorder, "np": np, "torch": torch, **names})
    return [found for times in recorder.claims.values() for found in times]


A, T = np.array([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0])
# By assertion: whether it holds, and slack and figure where they are measured.
KINDS: dict[str, list[Any]] = {
    "x < 3": [True, 1, 2],
    "x > 3": [False, -1, 2],
    "3 >= x": [True, 1, 2],
    "x < 2": [False, 0, 2],
    "x <= 2": [True, 0, 2],
    "0 < x < 2.5": [True, 0.5, 2],
    "0 < x < 1 < 0": [False, -1, 2],
    "len([1, 2]) < x + 1": [True, 1, 2],
    "x == 2": [True],
    "x != 2": [False],
    "x is not None": [True],
    "'a' in 'abc'": [True],
    "'a' < 'b'": [True],
    "flag": [True],
    "not flag": [False],
    "not x > 3": [True, 1, 2],
    "x > 1 and x < 2.25": [True, 0.25, 2],
    "x > 3 and x[0]": [False, -1, 2],  # as in Python the second is not evaluated
    "x == 3 and x > 1": [False],
    "x == 2 and x > 1": [True, 1, 2],
    "x > 3 or x > 1": [True, 1, 2],
    "x > 3 or x > 4": [False, -1, 2],
    "x > 3 or x == 2": [True],
    "all(y < 4 for y in a)": [True, 1, 3],
    "all([y < 2.5 for y in a])": [False, -0.5, 3],
    "any(y > 2.5 for y in a)": [True, 0.5, 3],
    "all(y < 4 and y > 0.5 for y in a)": [True, 0.5, 1],
    "all(y < 4 for y in ())": [True],
    "any(y < 4 for y in ())": [False],
    "(a < 4).all()": [True, 1, 3],
    "(t < 4).all()": [True, 1, 3],
    "all(a < 2.5)": [False, -0.5, 3],
    "np.all(a > 0)": [True, 1, 1],
    "torch.all(t > 0)": [True, 1, 1],
    "(a > 2.5).any()": [True, 0.5, 3],
    "(a == a).all()": [True],
    "a[:1] < 4": [True, 3, 1],
    "a[:1] < 4 and t[:1] < 2": [True, 1, 1],
    "all(a)": [True],
    "np.allclose(a, a + 0.1, rtol=0, atol=0.25)": [True, 0.15, 1],
    "np.allclose(2.0, 3.0, rtol=0.25)": [False, -0.25, 2],
    "torch.allclose(t, t, rtol=0, atol=0.5)": [True, 0.5, 1],
    "float('nan') < 1": [False, -math.inf, math.nan],
    "not float('nan') < 1": [True, math.inf, math.nan],
    "(y := x) > 1": [True],  # evaluated as it stands
    "x > 1, 'a message'": [True, 1, 2],
}


@pytest.mark.parametrize(("source", "expected"), KINDS.items(), ids=KINDS)
def test_each_kind_of_assertion(source: str, expected: list[Any]) -> None:
    (found,) = recorded(f"assert {source}", x=2, a=A, t=T, flag=True)
    assert found[0] is expected[0]
    assert [float(x) for x in found[1:]] == pytest.approx(expected[1:], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("source", KINDS)
def test_it_holds_where_the_assertion_itself_does(source: str) -> None:
    names = {"x": 2, "a": A, "t": T, "flag": True, "np": np, "torch": torch}
    try:
        exec(f"assert {source}", dict(names))
        holds = True
    except AssertionError:
        holds = False
    assert recorded(f"assert {source}", **names)[0][0] is holds


def test_a_band_has_the_distance_to_its_nearer_edge() -> None:
    lines = [{"job": {"label": "a"}, "figures": {"loss": loss}} for loss in (3.0, 4.0)]  # from 1 to 6
    source = "assert in_band(lines, 'a', 'loss', value)"
    assert recorded(source, in_band=in_band, lines=lines, value=5.5) == [[True, 0.5, 5.5]]
    assert recorded(source, in_band=in_band, lines=lines, value=0.75) == [[False, -0.25, 0.75]]


def test_a_claim_is_recorded_each_time_with_its_line_and_the_run_goes_on() -> None:
    recorder = Recorder()
    recorder.place = "cell 2"
    source = "for x in (1, 3):\n    assert x < 2  # so it is\nassert x == 3"
    exec(compile(Rewriter().visit(ast.parse(source)), "piece", "exec"), {NAME: recorder})
    assert recorder.claims == {
        "cell 2, line 2: x < 2": [[True, 1, 1], [False, -1, 3]],
        "cell 2, line 3: x == 3": [[True]],
    }


def test_what_raises_still_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        recorded("assert 1 / x < 2", x=0)


def test_a_function_around_which_nothing_is_taken_can_be_rewritten() -> None:
    recorder = Recorder()
    outside = 3

    def closure() -> None:
        assert outside == 3

    assert rewritten(claim_of_this_module, recorder)(3) == 6
    ((name, found),) = recorder.claims.items()
    line = claim_of_this_module.__code__.co_firstlineno + 1
    assert name == f", line {line}: factor * x < LIMIT"
    assert found == [[True, 4, 6]]
    with pytest.raises(ValueError, match=r"closure takes \('outside',\) from around it"):
        rewritten(closure, recorder)


LIMIT = 10


def claim_of_this_module(x: int, factor: int = 2) -> int:
    assert factor * x < LIMIT
    return factor * x


# --- processes ------------------------------------------------------------------------------------


def run(*arguments: str, record: Path) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    ended = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "MINISIGN_CLAIMS": str(record)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return json.loads(record.read_text()), ended


def test_a_notebook_is_run_to_its_end(tmp_path: Path) -> None:
    """A wrong claim, an error, an output that differs and one that is ignored."""
    cells = [
        new_code_cell("# NBVAL_IGNORE_OUTPUT\n%matplotlib inline\nx = 2\nprint('anything')"),
        new_code_cell("assert x > 3"),
        new_code_cell("1 / (x - 2)"),
        new_code_cell("print(x)\nx + 1", outputs=[stream("2\n"), result("3")]),
        new_code_cell("print(x)\nx + 1", outputs=[stream("2\n"), result("4")]),
        new_code_cell("assert x < 3"),
        new_code_cell(
            "import matplotlib.pyplot as plt\nplt.figure(figsize=(1, 1))\nplt.plot([1, 2])\nNone",
            outputs=[new_output("display_data", {"text/plain": "<Figure size 100x100 with 1 Axes>"})],
        ),
    ]
    path = tmp_path / "a.ipynb"
    write(new_notebook(cells=cells), path)
    record, ended = run("tests/claims.py", str(path), str(tmp_path / "out"), record=tmp_path / "out")
    assert ended.returncode == 0, ended.stdout
    assert record["claims"] == {
        "cell 2, line 1: x > 3": [[False, -1, 2]],
        "cell 6, line 1: x < 3": [[True, 1, 2]],
    }
    assert record["errors"] == {"cell 3": "ZeroDivisionError: division by zero"}
    assert record["differ"] == [3, 5]  # the traceback is printed


def stream(text: str) -> Any:
    return new_output("stream", name="stdout", text=text)


def result(text: str) -> Any:
    return new_output("execute_result", {"text/plain": text}, execution_count=1)


def test_of_tests_those_marked_are_recorded_and_fail_if_their_claims_do(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def two():\n    return 2\n"
        "@pytest.mark.trained\n"
        "@pytest.mark.parametrize('limit', [1, 3])\n"
        "def test_a(two, limit):\n    assert two < limit\n    assert two > 1\n"
        "@pytest.mark.trained\n"
        "def test_b():\n    raise KeyError('b')\n"
        "def test_c():\n    assert False\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    trained: of a trained figure\n")
    arguments = ("-m", "pytest", "-p", "claims", "-m", "trained", str(tmp_path), "-rf")
    record, ended = run(*arguments, record=tmp_path / "out")
    assert record["claims"] == {
        "test_a[1], line 8: two < limit": [[False, -1, 2]],
        "test_a[1], line 9: two > 1": [[True, 1, 2]],
        "test_a[3], line 8: two < limit": [[True, 1, 2]],
        "test_a[3], line 9: two > 1": [[True, 1, 2]],
    }
    assert record["errors"] == {"test_b": "KeyError: 'b'"}
    assert "2 failed, 1 passed, 1 deselected" in ended.stdout
    assert "Broken: test_a[1], line 8: two < limit" in ended.stdout


# --- the page -------------------------------------------------------------------------------------


def lines(*slacks: float, seed: float = 1.0, **more: Any) -> list[dict[str, Any]]:
    """Runs of a notebook with one claim of these slacks, and one with another seed."""
    settings = [*(f"jitter {n + 1}" for n in range(len(slacks))), "seed 3"]
    return [
        {
            "file": "notebooks/07_a.ipynb",
            "setting": setting,
            "claims": {
                "cell 5, line 2: x < 3": [[slack > 0, slack, 3 - slack]],
                "cell 6, line 1: y": [[True]],
            },
            "errors": {},
            "differ": [],
            "seconds": 36.0,
            "machine": "a machine",
            "versions": "Python 3, torch 2",
            **more,
        }
        for setting, slack in zip(settings, [*slacks, seed], strict=True)
    ]


def test_the_margin_is_the_mean_slack_in_spreads() -> None:
    measured, exact = claims_of("notebooks/07_a.ipynb", lines(9.0, 10.0, 11.0))
    assert (measured.margin, measured.spread, measured.figure) == (10, 1, -7)
    assert exact.margin == math.inf
    text, wrong = page(lines(9.0, 10.0, 11.0), expected={"notebooks/07_a.ipynb": 4})
    assert wrong == []
    assert "| 10.0 | notebooks/07, cell 5, line 2 | `x < 3` | -7 | 10 ± 1 | 9 | 1 |\n" in text
    assert "- notebooks/07: 1 of 2\n" in text
    assert "from 4 of 4 runs, which add up to 0.0 hours" in text
    assert page(lines(9.0, 10.0, 11.0), expected={"notebooks/07_a.ipynb": 4})[0] == text


def test_another_seed_may_print_something_else() -> None:
    made = lines(9.0, 10.0)
    made[-1]["differ"] = [4]
    assert page(made, expected={"notebooks/07_a.ipynb": 3})[1] == []


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (lines(1.0, 3.0), "notebooks/07, cell 5, line 2: x < 3: a margin of 1.4"),
        (lines(1.0, -1.0), "notebooks/07, cell 5, line 2: x < 3: fails in 1 runs"),
        (lines(9.0, 9.5, seed=-1.0), "notebooks/07, cell 5, line 2: x < 3: fails in 1 runs"),
        (lines(9.0, -math.inf), "notebooks/07, cell 5, line 2: x < 3: fails in 1 runs"),
        (lines(9.0), "notebooks/07: 1 of 3 runs are missing"),
        (lines(9.0, 9.5, errors={"cell 3": "KeyError: 1"}), "notebooks/07, jitter 1: cell 3: KeyError: 1"),
        (
            lines(9.0, 9.5, differ=[4]),
            "notebooks/07, jitter 2: the output is another than the saved one in cell 4",
        ),
    ],
)
def test_what_is_wrong_is_named(made: list[dict[str, Any]], fault: str) -> None:
    text, wrong = page(made, expected={"notebooks/07_a.ipynb": 3})
    assert fault in wrong
    assert f"- {fault}\n" in text
    assert ("| **" in text) == ("cell 5" in fault)


def test_the_worst_stand_on_top_and_a_loop_at_its_worst() -> None:
    every = lines(9.0, 10.0, 11.0)
    for line, slack in zip(every, (4.0, 5.0, 6.0, 1.0), strict=True):
        line["claims"]["cell 9, line 1: z < 3"] = [[True, 100 * slack, 1.0], [True, slack, 1.0]]
    rows = [
        row
        for row in page(every, expected={"notebooks/07_a.ipynb": 4})[0].splitlines()
        if row.startswith("| ")
    ][1:]
    assert [row.split(" | ")[0] for row in rows] == ["| 5.0", "| 10.0"]
    assert isinstance(next(claims_of("a", every)), Claim)


# --- the runs -------------------------------------------------------------------------------------


def test_everything_is_run_under_enough_settings() -> None:
    every, notebooks = files(), {path for path in files() if path.suffix == ".ipynb"}
    assert notebooks == {
        *(ROOT / "notebooks").glob("*.ipynb"),
        *(ROOT / "notebooks/solutions").glob("*.ipynb"),
    }
    tests = {path.name for path in every} - {path.name for path in notebooks}
    assert {"test_guard.py", "test_train.py"} <= tests
    assert Path(__file__).name not in tests  # where the marker is in a text
    environments = [{**environment} for environment in SETTINGS.values()]
    assert len({str(sorted(x.items())) for x in environments}) == len(SETTINGS)
    assert {x["MINISIGN_JITTER"] for x in environments if "MINISIGN_JITTER" in x} == {
        str(n) for n in range(1, 13)
    }
    assert all(len(x) <= 1 or x.keys() == ONE_THREAD.keys() for x in environments)  # one thing at a time
    paths = ("a.ipynb", "test_a.py", "solutions/a.ipynb")
    notebook, test, solution = (len(settings_of(ROOT / name)) for name in paths)
    assert notebook - 2 == test >= 16
    assert notebook - 11 == solution  # which has one jitter of the twelve


def test_a_log_keeps_what_is_of_the_same_code_and_is_the_same_in_any_order(tmp_path: Path) -> None:
    path = ROOT / "notebooks" / "00_start_here.ipynb"
    line = {"file": "notebooks/00_start_here.ipynb", "code": digest(path)}
    one, other = {**line, "setting": "avx2"}, {**line, "setting": "base"}
    texts = []
    for i, order in enumerate([(one, other), (other, one)]):
        log = Log(tmp_path / f"{i}.jsonl")
        for each in order:
            log.add(each)
        texts.append(log.path.read_text())
        stale = {**line, "setting": "jitter 1", "code": "0" * 12}
        unknown = {**line, "setting": "full moon"}
        with log.path.open("a") as file:
            file.writelines(json.dumps(x) + "\n" for x in (stale, unknown))
        assert Log(log.path).ordered() == [other, one]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("code", [0, 1, 2, 5, -9])
def test_a_run_that_ended_early_leaves_no_line(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pytest ends with where a test fails, 1, is in the record; where it is interrupted, 2, or
    collects none, 5, is not."""

    def ended(command: Any, env: dict[str, str], **options: Any) -> Any:
        Path(env["MINISIGN_CLAIMS"]).write_text('{"claims": {}, "errors": {}, "differ": []}')
        return subprocess.CompletedProcess(command, code, "what it said")

    monkeypatch.setattr(subprocess, "run", ended)
    if code in (0, 1):
        assert robust.run(ROOT / "tests" / "test_guard.py", "base")["errors"] == {}
    else:
        with pytest.raises(RuntimeError, match=f"ended with {code}\nwhat it said"):
            robust.run(ROOT / "tests" / "test_guard.py", "base")


def test_ctrl_c_ends_a_notebook_and_leaves_no_record(tmp_path: Path) -> None:
    cells = [new_code_cell("raise KeyboardInterrupt"), new_code_cell("assert True")]
    write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    command = [sys.executable, "tests/claims.py", str(tmp_path / "a.ipynb"), str(tmp_path / "record")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.endswith("KeyboardInterrupt\n")
    assert not (tmp_path / "record").exists()


def test_ctrl_c_ends_all_and_keeps_what_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Path] = []
    cancelled = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            cancelled.set()
            super().shutdown(wait=wait)

    def run(path: Path, setting: str) -> dict[str, Any]:
        if made:
            os.kill(os.getpid(), signal.SIGINT)
            assert cancelled.wait(HANG)
            raise RuntimeError("it was ended by the same signal")
        made.append(path)
        nothing: dict[str, Any] = {"claims": {}, "errors": {}, "differ": [], "seconds": 1}
        return {"file": str(path.relative_to(ROOT)), "code": digest(path), "setting": setting, **nothing}

    monkeypatch.setattr(robust, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(robust, "run", run)
    monkeypatch.setattr(robust, "LOG", tmp_path / "log.jsonl")
    monkeypatch.setattr(robust, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["robust.py", "--jobs", "1"])
    assert robust.main() == 130
    assert capsys.readouterr().err == "interrupted: log.jsonl has what was made\n"
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "page.md").exists()


def test_a_log_that_is_cut_off_is_named(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"file": "a", "code": "b"}\n{"file":')
    with pytest.raises(SystemExit, match=r"log\.jsonl, line 2 is no JSON: Expecting value"):
        Log(log)


def test_a_notebooks_code_counts_and_nothing_else(tmp_path: Path) -> None:
    def made(source: str, output: str, text: str) -> str:
        path = tmp_path / "a.ipynb"
        write(
            new_notebook(cells=[new_markdown_cell(text), new_code_cell(source, outputs=[stream(output)])]),
            path,
        )
        return digest(path)

    assert made("x", "1", "a") == made("x", "2", "b") != made("y", "1", "a")
