"""How wide Adam's update ratio is, from batches of 2 windows to one fixed batch, over seeds.

    python experiments/update_ratio.py

Notebook 12 reads the log and makes some of the runs anew.
"""

from __future__ import annotations

import functools
from typing import Any

from minisign.lab.build import load_tokens
from minisign.lab.tokenizer import Tokens
from minisign.studies.experiment import Figures, Job, main
from minisign.studies.instability import BATCHES, bell_config, bell_figures, bell_run

SEEDS = range(6)
# By label: what is changed, and whether every step is on the first batch.
SETTINGS: dict[str, dict[str, Any]] = {
    "β2 0.95": {},
    "β2 0.999": {"betas": (0.9, 0.999)},
    "rate 1e-3": {"lr": 1e-3},
}
JOBS = [
    Job(
        f"{setting}: {batch}",
        bell_config(seed, **changes, **({} if fixed else {"batch": batch})),
        {"fixed": fixed},
    )
    for setting, changes in SETTINGS.items()
    for batch, fixed in (*((batch, False) for batch in BATCHES), ("fixed", True))
    for seed in SEEDS
]


@functools.cache
def text() -> Tokens:
    """The text of all runs."""
    return load_tokens(bell_config())


def measure(job: Job) -> Figures:
    return bell_figures(bell_run(job.config, text(), job.options["fixed"])[1])


if __name__ == "__main__":
    main(__file__, JOBS, measure)
