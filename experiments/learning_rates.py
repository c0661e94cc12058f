"""Seven optimizers, nine learning rates each, five seeds: the lessons' model with equal budgets of search.

    python experiments/learning_rates.py

Notebooks 09 and 11 read the log; each makes one of the runs anew.
"""

from __future__ import annotations

import functools

from minisign.lab.build import load_tokens
from minisign.lab.tokenizer import Tokens
from minisign.studies.experiment import Figures, Job, main
from minisign.studies.search import CONTENDERS, search_base, search_config, search_run

SEEDS = range(5)
JOBS = [
    Job(label, search_config(search_base(seed), label, rate))
    for label, contender in CONTENDERS.items()
    for rate in contender.rates
    for seed in SEEDS
]


@functools.cache
def text() -> Tokens:
    """The text of all runs."""
    return load_tokens(search_base())


def measure(job: Job) -> Figures:
    return search_run(job.config, text())[1]


if __name__ == "__main__":
    main(__file__, JOBS, measure)
