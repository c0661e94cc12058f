"""Experiments: which runs are made, what a log says, what a notebook reads of it; and the shipped logs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import HANG, wait_until

from minisign.lab.config import Config
from minisign.studies import processes
from minisign.studies.experiment import Figures, Job, band, figures, in_band, main, read_log, saturated
from minisign.studies.processes import ONE_THREAD
from minisign.studies.variants import VARIANTS, lesson_config, settled_config, variant_config

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
SCRIPTS = sorted(EXPERIMENTS.glob("*.py"))


def job(label: str, **options: Any) -> Job:
    return Job(label, Config(steps=1), options)


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def labels(log: Path) -> list[str]:
    return [line["job"]["label"] for line in lines(log)]


# --- jobs -----------------------------------------------------------------------------------------


def test_a_job_comes_back_from_its_line() -> None:
    config = Config(optimizer="lion", betas=(0.8, 0.9), text=("a.txt",), scale=0.5, seed=3)
    one = Job("lion", config, {"fix": "lion", "sizes": [1, 2]})
    line = json.loads(json.dumps(one.to_json()))
    assert Job.from_json(line) == one
    assert Job.from_json(line).key == one.key
    del line["config"]["head"]  # a log from before the field existed
    assert Job.from_json(line) == one


def test_the_key_tells_jobs_apart_and_knows_equal_ones() -> None:
    one = job("a", x=1, y=2)
    others = [job("b", x=1, y=2), job("a", x=1, y=3), Job("a", Config(steps=1, seed=1), {"x": 1, "y": 2})]
    assert len({one.key, *(other.key for other in others)}) == 4
    assert job("a", y=2, x=1).key == one.key


# --- the command line -----------------------------------------------------------------------------


class Bench:
    """An experiment in a folder of its own, with threads for processes, so that its runs can be watched."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script, self.patch = folder / "toy.py", monkeypatch
        self.log = folder / "logs" / "toy.jsonl"
        self.made: list[str] = []
        monkeypatch.setattr(processes, "ProcessPoolExecutor", lambda n, *_: ThreadPoolExecutor(n))

    def __call__(self, names: str, *argv: str, measure: Any = None) -> None:
        self.patch.setattr(sys, "argv", ["toy.py", *argv])
        self.made.clear()
        main(str(self.script), [job(name) for name in names], measure or self.measure)

    def measure(self, job: Job) -> Figures:
        self.made.append(job.label)
        return {"order": len(self.made)}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_only_missing_jobs_are_run_and_the_log_is_in_their_order(bench: Bench, capsys: Any) -> None:
    bench("cx")
    bench("abcd", "--processes", "1")
    assert bench.made == ["a", "b", "d"]
    assert labels(bench.log) == ["a", "b", "c", "d"]  # x is no job any more
    assert [line["figures"]["order"] for line in lines(bench.log)] == [1, 2, 1, 3]
    out = capsys.readouterr().out
    assert "3 of 4 runs to make" in out
    assert "3/3 d, seed 0: 0 s" in out
    bench("abcd", "--fresh", "--processes", "1")
    assert bench.made == ["a", "b", "c", "d"]


def test_the_log_is_in_order_whichever_run_ends_first(bench: Bench) -> None:
    def measure(job: Job) -> Figures:
        if job.label == "a":
            wait_until(lambda: bench.log.exists() and labels(bench.log) == ["b"])
        return {}

    bench("ab", measure=measure)
    assert labels(bench.log) == ["a", "b"]


def test_a_line_from_another_torch_is_made_anew(bench: Bench) -> None:
    bench("ab")
    first, second = lines(bench.log)
    first["versions"]["torch"] = "1.0"
    bench.log.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    bench("ab")
    assert bench.made == ["a"]
    assert {line["versions"]["torch"] for line in lines(bench.log)} == {torch.__version__}


def test_what_is_measured_before_a_failure_is_kept(bench: Bench) -> None:
    def measure(job: Job) -> Figures:
        if job.label == "b":
            raise FloatingPointError("the loss is nan at step 3")
        return {}

    with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
        bench("ab", "--processes", "1", measure=measure)
    assert labels(bench.log) == ["a"]
    bench("ab")
    assert bench.made == ["b"]


def test_bad_arguments(bench: Bench, capsys: Any) -> None:
    for argv, message in (
        (["--processes", "many"], "invalid int value: 'many'"),
        (["--processes", "0"], "--processes must be 1 or more, got 0"),
        (["--slow"], "--slow"),
    ):
        with pytest.raises(SystemExit) as exit_:
            bench("a", *argv)
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
    assert not bench.log.exists()


def test_no_log_of_jittered_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("MINISIGN_JITTER", "5")
    with pytest.raises(SystemExit):
        bench("a")
    assert "MINISIGN_JITTER is 5: unset it" in capsys.readouterr().err
    assert not bench.log.exists()


def test_a_script_runs_in_processes_of_one_thread_each(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text(
        "import os, torch\n"
        "from minisign.studies.experiment import Job, main\n"
        "from minisign.lab.config import Config\n"
        "def measure(job):\n"
        "    λ = job.config.weight_decay\n"
        "    return {'threads': torch.get_num_threads(), 'process': os.getpid(), 'λ': λ}\n"
        "if __name__ == '__main__':\n"
        "    main(__file__, [Job('toy', Config(steps=1))], measure)\n"
    )
    two_threads = {**os.environ, **dict.fromkeys(ONE_THREAD, "2")}
    process = subprocess.Popen([sys.executable, script], env=two_threads)
    assert process.wait(HANG) == 0
    (line,) = lines(tmp_path / "logs" / "toy.jsonl")
    assert line["figures"] == {"threads": 1, "process": line["figures"]["process"], "λ": 0.01}
    assert line["figures"]["process"] != process.pid
    assert [p.name for p in (tmp_path / "logs").iterdir()] == ["toy.jsonl"]


# --- what a notebook reads ------------------------------------------------------------------------


def test_a_log_is_found_from_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiments" / "logs").mkdir(parents=True)
    (tmp_path / "experiments" / "logs" / "toy.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    below = tmp_path / "notebooks" / "solutions"
    below.mkdir(parents=True)
    for folder in (tmp_path, below):
        monkeypatch.chdir(folder)
        assert read_log("toy") == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match=r"no experiments/logs/other\.jsonl in .*solutions or above"):
        read_log("other")


def test_figures_of_one_condition() -> None:
    log = [
        {"job": {"label": "a"}, "figures": {"x": 1, "loss": {"rare": 2.5}}},
        {"job": {"label": "b"}, "figures": {"x": 7}},
        {"job": {"label": "a"}, "figures": {"x": 3, "loss": {"rare": None}}},
    ]
    assert figures(log, "a", "x").tolist() == [1, 3]
    np.testing.assert_array_equal(figures(log, "a", "loss/rare"), [2.5, np.nan])
    with pytest.raises(ValueError, match=r"no run with label 'c': \['a', 'b'\]"):
        figures(log, "c", "x")


def test_band_is_the_range_and_room_on_either_side() -> None:
    values = np.array([3.0, 1.0, 2.0])
    assert band(values) == (-3.0, 7.0)
    assert band(values, margin=0.5) == (0.0, 4.0)


def test_a_figure_is_held_against_the_band_of_its_condition() -> None:
    log = [{"job": {"label": "a"}, "figures": {"loss": {"rare": x}}} for x in (1.0, 2.0, 3.0)]
    log.append({"job": {"label": "b"}, "figures": {"loss": {"rare": 100.0}}})
    expected = {-3.1: False, -3.0: True, 7.0: True, 7.1: False}
    assert {x: in_band(log, "a", "loss/rare", x) for x in expected} == expected
    assert not in_band(log, "a", "loss/rare", float("nan"))


def test_saturated_is_the_larger_of_unseen_and_rare_run_by_run() -> None:
    shares = [(0.1, 0.3), (0.5, 0.2)]
    log = [
        {"job": {"label": "a"}, "figures": {"unseen_saturated": unseen, "rare_saturated": rare}}
        for unseen, rare in shares
    ]
    assert saturated(log, "a").tolist() == [0.3, 0.5]


@pytest.mark.parametrize(("margin", "share"), [(0.0, 2 / 7), (2.0, 1 / 500)])
def test_how_often_a_seventh_run_falls_outside_the_band_of_six(margin: float, share: float) -> None:
    runs = np.random.RandomState(0).normal(size=(20_000, 7))
    bands = [band(six, margin) for *six, _ in runs]
    outside = [not low <= seventh <= high for (low, high), seventh in zip(bands, runs[:, 6], strict=True)]
    assert np.mean(outside) == pytest.approx(share, rel=0.3)


# --- the configurations that experiments are made of ----------------------------------------------


def test_variants_of_another_base_change_what_they_name() -> None:
    base = lesson_config(seed=5)
    for variant, changes in VARIANTS.items():
        config = variant_config(base, variant)
        differ = {name for name, value in config.to_json().items() if value != base.to_json()[name]}
        follows = {"betas", "embedding_std"} if {"optimizer", "tie"} & set(changes) else set()
        assert differ <= {*changes, *follows}
        assert all(getattr(config, name) == value for name, value in changes.items())
    # The lessons' rate is Tiger's; the initial embedding is that of the tie or of the form.
    assert variant_config(base, "half_swap").lr == base.lr != variant_config(base, "adamw").lr
    assert [variant_config(base, v).embedding_std for v in ("lazy", "tied", "lion")] == [0.2, 0.02, 0.02]
    assert [variant_config(base, v, "base").embedding_std for v in ("lazy", "hybrid")] == [0.02, 0.02]


def test_the_settled_run_goes_on_for_nine_times_its_memory() -> None:
    config = settled_config(seed=2)
    assert config.seed == 2
    travelled = config.lr * config.weight_decay * np.array([config.rate(t) for t in range(config.steps)])
    assert travelled.sum() == pytest.approx(9, rel=0.05)
    assert set(travelled[config.warmup :]) == {config.lr * config.weight_decay}  # a constant rate


# --- the shipped logs -----------------------------------------------------------------------------


def test_every_log_has_its_script() -> None:
    logs = {path.stem for path in (EXPERIMENTS / "logs").iterdir()}
    assert logs == {path.stem for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_log_has_the_runs_that_its_script_makes_and_no_others(script: Path) -> None:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    log = lines(EXPERIMENTS / "logs" / f"{script.stem}.jsonl")
    assert [Job.from_json(line["job"]).key for line in log] == [job.key for job in module.JOBS]
    assert len({job.key for job in module.JOBS}) == len(module.JOBS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_line_says_what_was_run_and_where(script: Path) -> None:
    text = (EXPERIMENTS / "logs" / f"{script.stem}.jsonl").read_text()
    assert "NaN" not in text  # strict JSON
    assert "Infinity" not in text
    for line in map(json.loads, text.splitlines()):
        assert list(line) == ["job", "figures", "seconds", "versions", "machine"]
        assert list(line["job"]) == ["label", "config", "options"]
        assert list(line["versions"]) == ["python", "torch", "numpy", "minisign"]
        assert list(line["machine"]) == ["system", "processor", "vectors", "threads"]
        assert line["figures"]
        assert all([*line["versions"].values(), *line["machine"].values()])
        assert line["machine"]["threads"] == 1
        assert line["seconds"] > 0
