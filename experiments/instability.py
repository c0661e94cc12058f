"""Where Adam's loss jumps by itself: ε against the rate; β₂, batch, depth, norm and clipping, over seeds.

    python experiments/instability.py

Notebook 13 reads the log and makes some of the runs anew.
"""

from __future__ import annotations

import functools
from typing import Any

from minisign.lab.build import load_tokens
from minisign.lab.tokenizer import Tokens
from minisign.studies.experiment import Figures, Job, main
from minisign.studies.instability import deep_config, run_figures

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
EPSILONS = (1e-12, 1e-10, 1e-8, 1e-6, 1e-4)
SEEDS, BASE_SEEDS = range(4), range(6)
# One thing changed at a time, from six post-norm layers, rate 4e-3, ε 1e-8, β₂ 0.999, 64 windows.
CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "pre-norm": {"norm": "pre"},
    **{f"β2 {beta2}": {"betas": (0.9, beta2)} for beta2 in (0.95, 0.99)},
    **{f"{layers} layers": {"layers": layers} for layers in (2, 4, 8)},
    **{f"rate {rate:g}": {"lr": rate} for rate in (1e-3, 2e-3, 2.8e-3)},
    **{f"ε {eps:g}": {"eps": eps} for eps in (1e-12, 1e-6, 1e-4)},
    **{f"clip {clip}": {"clip": clip} for clip in (1.0, 0.25)},
    "warm-up 200": {"warmup": 200},
    **{f"batch {batch}": {"batch": batch} for batch in (16, 128)},
    **{f"pre-norm, batch {batch}": {"norm": "pre", "batch": batch} for batch in (16, 128)},
}
JOBS = [
    Job(label, deep_config(seed, **changes))
    for label, changes in CHANGES.items()
    for seed in (BASE_SEEDS if label == "base" else SEEDS)
]
JOBS += [
    Job(f"map: {norm}", deep_config(norm=norm, eps=eps, lr=rate))
    for norm, epsilons in (("post", EPSILONS), ("pre", EPSILONS[::2]))
    for eps in epsilons
    for rate in RATES
]


@functools.cache
def text() -> Tokens:
    """The text of all runs."""
    return load_tokens(deep_config())


def measure(job: Job) -> Figures:
    return run_figures(job.config, text())


if __name__ == "__main__":
    main(__file__, JOBS, measure)
