"""Remedies against a staged spike, over seeds: what each costs without the spike and saves with it.

    python experiments/remedies.py

Notebook 13 reads the log and makes some of the runs anew.
"""

from __future__ import annotations

import functools

from minisign.lab.build import load_tokens
from minisign.lab.tokenizer import Tokens
from minisign.studies.experiment import Figures, Job, main
from minisign.studies.instability import REMEDIES, Stage, remedy_figures, remedy_run, stage_config

SEEDS = range(6)
JOBS = [
    Job(
        f"{label}, {'staged' if staged else 'undisturbed'}",
        stage_config(seed, **REMEDIES[label][0]),
        {"remedy": label, "staged": staged},
    )
    for label in REMEDIES
    for staged in (True, False)
    for seed in SEEDS
]


@functools.cache
def text() -> Tokens:
    """The text of all runs."""
    return load_tokens(stage_config())


def measure(job: Job) -> Figures:
    stage = Stage() if job.options["staged"] else None
    run, guard = remedy_run(job.options["remedy"], text(), job.config.seed, stage)
    return remedy_figures(run, guard, Stage())


if __name__ == "__main__":
    main(__file__, JOBS, measure)
