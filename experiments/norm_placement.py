"""Where the norm stands, at four and eight layers: gradients and curvature at the start, and what rates do.

    python experiments/norm_placement.py

Notebook 10 reads the log and makes some of the runs anew.
"""

from __future__ import annotations

import functools

from minisign.lab.build import load_tokens
from minisign.lab.tokenizer import Tokens
from minisign.studies.experiment import Figures, Job, main
from minisign.studies.search import SIDES, norm_config, norm_rates, search_config, search_run, start_figures

START_SEEDS, SEEDS = range(12), range(3)
JOBS = [
    Job(f"start, {init}: {norm}, {layers} layers", norm_config(norm, layers, seed, init), {"start": True})
    for init in ("xavier", "gpt2")
    for layers in (4, 8)
    for norm in SIDES
    for seed in START_SEEDS
] + [
    Job(f"{label}: {norm}, {layers} layers", search_config(norm_config(norm, layers, seed), label, rate))
    for layers in (4, 8)
    for norm in SIDES
    for label in ("SGD", "Signum")
    for rate in norm_rates(label)
    for seed in SEEDS
]


@functools.cache
def text() -> Tokens:
    """The text of all runs."""
    return load_tokens(norm_config("pre", 4))


def measure(job: Job) -> Figures:
    if job.options.get("start"):
        return start_figures(job.config, text())
    return search_run(job.config, text())[1]


if __name__ == "__main__":
    main(__file__, JOBS, measure)
