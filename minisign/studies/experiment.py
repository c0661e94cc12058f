"""Experiments too long for a notebook: many runs, a process for each core, a line of JSON for each run.

A script in ``experiments/`` names its jobs and how to measure one, and calls :func:`main`; its log goes to
``experiments/logs/``. A notebook makes one of the runs itself and reads the others with :func:`read_log`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minisign.lab.config import Config
from minisign.lab.files import write_whole
from minisign.lab.jitter import JITTER, natural_number
from minisign.studies.processes import side_by_side

Figures = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run of an experiment.

    Args:
        label: which of the experiment's conditions it belongs to.
        config: of the run.
        options: what else :func:`main`'s ``measure`` has to know; JSON.
    """

    label: str
    config: Config
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        job = {"label": self.label, "config": self.config.to_json(), "options": self.options}
        return dict(json.loads(json.dumps(job)))  # as it will be read: tuples are lists

    @classmethod
    def from_json(cls, job: dict[str, Any]) -> Job:
        """The job of a log's line. Fields that ``Config`` had not yet got then take their defaults."""
        return cls(job["label"], Config.from_json(job["config"]), job["options"])

    @property
    def key(self) -> str:
        """The same for equal jobs."""
        return json.dumps(self.to_json(), sort_keys=True)


def main(script: str, jobs: Sequence[Job], measure: Callable[[Job], Figures]) -> None:
    """The command line of an experiment.

    Runs the jobs, two processes with one thread each unless told otherwise, and writes the log in the
    order of the jobs. A line that the log has already, from the same job and the same version of torch,
    is kept unless ``--fresh`` is given, so an interrupted experiment goes on where it was.

    Args:
        script: ``__file__`` of the script, whose name is the log's.
        jobs: what to run.
        measure: runs a job, gives its figures as plain numbers; a function at the top of its module.
    """
    name = Path(script).stem
    parser = argparse.ArgumentParser(
        prog=f"python experiments/{name}.py",
        description=f"{len(jobs)} runs; writes experiments/logs/{name}.jsonl.",
    )
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--fresh", action="store_true", help="make every run anew")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"--processes must be 1 or more, got {arguments.processes}")
    if jitter := natural_number(JITTER):
        parser.error(f"a log is of runs as they are, and {JITTER} is {jitter}: unset it")
    log = Path(script).parent / "logs" / f"{name}.jsonl"
    log.parent.mkdir(exist_ok=True)
    here = about()
    keys = [job.key for job in jobs]
    done: dict[str, dict[str, Any]] = {}
    if log.exists() and not arguments.fresh:
        for line in _lines(log):
            key = Job.from_json(line["job"]).key
            if key in keys and line["versions"]["torch"] == here["versions"]["torch"]:
                done[key] = line
    todo = [job for job in jobs if job.key not in done]
    print(f"{len(todo)} of {len(jobs)} runs to make")
    tasks = {job.key: (measure, job) for job in todo}
    with closing(side_by_side(_timed, tasks, arguments.processes)) as finished:
        for i, (key, (figures, seconds)) in enumerate(finished, 1):
            _, job = tasks[key]
            done[key] = {"job": job.to_json(), "figures": figures, "seconds": round(seconds, 1), **here}
            write_whole(log, lambda path: _write(path, [done[k] for k in keys if k in done]))
            print(f"{i}/{len(todo)} {job.label}, seed {job.config.seed}: {seconds:.0f} s", flush=True)


def _timed(measure: Callable[[Job], Figures], job: Job, tell: object) -> tuple[Figures, float]:
    start = time.perf_counter()
    return measure(job), time.perf_counter() - start


def _write(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def about(threads: int | None = 1) -> dict[str, dict[str, Any]]:
    """Versions and machine, for a log; ``threads`` of each process, ``None`` for as many as torch takes."""
    import torch

    from minisign import __version__

    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "minisign": __version__,
        },
        "machine": {
            "system": platform.system(),
            "processor": _processor(),
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "threads": threads,
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# --- what a notebook reads ------------------------------------------------------------------------


def read_log(name: str) -> list[dict[str, Any]]:
    """The lines of ``experiments/logs/NAME.jsonl``, found from the working directory upwards.

    Raises:
        ValueError: there is no such log.
    """
    for folder in (Path.cwd(), *Path.cwd().parents):
        log = folder / "experiments" / "logs" / f"{name}.jsonl"
        if log.is_file():
            return _lines(log)
    raise ValueError(f"no experiments/logs/{name}.jsonl in {Path.cwd()} or above")


def figures(lines: Sequence[dict[str, Any]], label: str, name: str) -> np.ndarray:
    """One figure of all runs of a condition [runs], in order; ``name`` may be a path: ``"loss/rare"``.

    Raises:
        ValueError: no run of that label.
    """
    found = []
    for line in lines:
        if line["job"]["label"] == label:
            value: Any = line["figures"]
            for part in name.split("/"):
                value = value[part]
            found.append(float("nan") if value is None else value)
    if not found:
        raise ValueError(f"no run with label {label!r}: {sorted({x['job']['label'] for x in lines})}")
    return np.array(found, dtype=np.float64)


def band(values: np.ndarray, margin: float = 2.0) -> tuple[float, float]:
    """Lowest and highest of some runs' figures, and ``margin`` of their distance more on either side: where
    another run of the same kind is expected. Of normal figures, six runs leave out two in seven without the
    margin, and one in five hundred with it."""
    low, high = float(np.min(values)), float(np.max(values))
    return low - margin * (high - low), high + margin * (high - low)


def in_band(lines: Sequence[dict[str, Any]], label: str, name: str, value: float) -> bool:
    """Whether a run's figure is in the :func:`band` of that figure over a condition's logged runs.

    Raises:
        ValueError: no run of that label.
    """
    low, high = band(figures(lines, label, name))
    return low <= value <= high


def saturated(lines: Sequence[dict[str, Any]], label: str) -> np.ndarray:
    """Share of entries beyond 0.8/λ among tokens never seen or among those seen 1 to 3 times, whichever is
    larger, of all runs of a condition [runs].

    Raises:
        ValueError: no run of that label.
    """
    unseen, rare = (figures(lines, label, f"{group}_saturated") for group in ("unseen", "rare"))
    return np.maximum(unseen, rare)
