"""benchmarks/gpu.py at toy size on a CPU, so that the day with a card brings no surprise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("rustbpe", "tqdm", "rich", "matplotlib", "optimi", "lion_pytorch", "pytorch_optimizer")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": gpu.search_path()}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def reports(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*/*.json")}


def test_all_parts_at_toy_size(tmp_path: Path) -> None:
    done = python("-m", "benchmarks.gpu", "--dry", "--minutes", "15", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout
    found = reports(tmp_path)
    assert set(found) == set(gpu.PARTS)
    for name, report in found.items():
        assert report["part"] == name
        assert report["complete"] is report["dry"] is True
        assert {"card", "commit", "torch", "python", "date", "seconds"} <= set(report)
        assert f"\n  {name:10} {gpu.outcome_of(report)}\n" in done.stdout
    assert {name for name, report in found.items() if gpu.outcome_of(report) == "done"} >= {
        "kernels",
        "subnormal",
        "article",
    }
    assert gpu.outcome_of(found["blocks"]) == "left out: the interpreter has blocks of its own"
    assert found["kernels"]["passed"] == found["kernels"]["tests"] >= 1
    assert {x["name"] for x in found["subnormal"]["results"]} == {
        n for n in gpu.ROADS if "compile" not in n
    }
    assert all(x["still_moves"] for x in found["subnormal"]["results"])
    timed = {x["name"]: x for x in found["speed"]["results"]}
    assert {"Lion (fused)", "AdamW (fused), all bf16", "torch AdamW (fused)"} <= set(timed)
    for line in timed.values():
        assert line["milliseconds_p10"] <= line["milliseconds"] <= line["milliseconds_p90"]
    tiger, lazy = found["article"]["runs"]
    assert (tiger["variant"], lazy["variant"]) == ("tiger", "lazy")
    assert tiger["series"][-1]["step"] == tiger["steps"] == 200
    assert 0 < tiger["series"][-1]["logistic"] <= tiger["bound"] == 100
    assert sum(x["tokens"] for x in lazy["by_appearances"]) == found["article"]["config"]["vocab_size"]
    assert {path.name for path in tmp_path.glob("*/*.png")} == {"speed.png", "article.png"}


LACKING = """
import sys
for name in {packages!r}:
    sys.modules[name] = None
sys.argv = ["gpu", "--dry", "--part", {part!r}, "--seconds", "600", "--out", {out!r}]
from benchmarks.gpu import main
sys.exit(main())
"""


@pytest.mark.parametrize("part", ["speed", "article"])
def test_what_is_not_installed_is_left_out_by_name(part: str, tmp_path: Path) -> None:
    code = LACKING.format(packages=OPTIONAL, part=part, out=str(tmp_path))
    done = python("-c", code)
    assert done.returncode == 0, done.stdout
    found = reports(tmp_path)[part]
    assert found["complete"]
    if part == "speed":
        assert {"torch-optimi Lion", "lion-pytorch Lion", "pytorch-optimizer Lion"} <= set(
            found["left_out"]
        )
        assert "Lion (fused)" in {x["name"] for x in found["results"]}


def test_a_part_out_of_time_ends_with_all_it_started(tmp_path: Path) -> None:
    """And what it had written is there still."""
    folder = tmp_path / "card"
    folder.mkdir()
    written = folder / "article.json"
    written.write_text("{}")
    outcome = gpu.start_part("article", 600, 0.2, ["--dry", "--out", str(tmp_path)])
    assert outcome == "cut, out of time"
    assert written.read_text() == "{}"


def test_what_a_part_says_of_itself(tmp_path: Path) -> None:
    failed = {"tests": 84, "passed": 81, "failures": {"a": "", "b": "", "c": ""}}
    assert gpu.outcome_of(failed) == "3 of 84 tests failed"
    assert gpu.outcome_of({"left_out": "pytest is not installed"}) == "left out: pytest is not installed"
    assert gpu.outcome_of({"left_out": {"a": "no module", "b": "no module"}}) == "left out: a, b"
    assert gpu.outcome_of({**failed, "failures": {}}) == gpu.outcome_of({}) == "done"
    for part in ("speed", "article"):  # out of time before the first figure
        (tmp_path / f"{part}.json").write_text('{"card": "a card", "torch": "2.11.0", "complete": true}')
    gpu.draw(tmp_path)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"no CUDA card is found by torch {torch.__version__}, which is built "),
        (["--dry", "--out", "/dev/null/day"], "cannot write to /dev/null/day/"),
        (["--dry", "--parts", "kernels,speeed"], "unknown part 'speeed': choose from kernels,"),
        (["--dry", "--minutes", "0"], "--minutes must be positive, got 0"),
    ],
)
def test_what_cannot_be_is_said(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu", *arguments])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
