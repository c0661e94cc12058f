"""What a guard notes in runs whose loss may jump by itself, and in sound ones, over seeds.

    python experiments/guarded.py

Notebook 13 reads the log.
"""

from __future__ import annotations

import functools
from typing import Any

from minisign.lab.build import load_tokens
from minisign.lab.tokenizer import Tokens
from minisign.studies.experiment import Figures, Job, main
from minisign.studies.instability import deep_config, guarded_figures

SEEDS = range(6)
RUNS: dict[str, dict[str, Any]] = {
    "post-norm": {},
    "half the rate": {"lr": 2e-3},
    "warm-up 200": {"warmup": 200},
    "pre-norm": {"norm": "pre"},
}
JOBS = [Job(label, deep_config(seed, **changes)) for label, changes in RUNS.items() for seed in SEEDS]


@functools.cache
def text() -> Tokens:
    """The text of all runs."""
    return load_tokens(deep_config())


def measure(job: Job) -> Figures:
    return guarded_figures(job.config, text())


if __name__ == "__main__":
    main(__file__, JOBS, measure)
