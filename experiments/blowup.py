"""The blow-up and its controls at the lessons' size, over seeds.

    python experiments/blowup.py

Notebooks 00, 03, 04 and 05 read the log and make some of the runs anew.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from minisign import theory
from minisign.lab.build import load_tokens
from minisign.probes import largest_entries, rare_tokens, saturated_rows, size_by_kappa
from minisign.studies.experiment import Figures, Job, main
from minisign.studies.reproduce import run_variant
from minisign.studies.variants import lesson_config, settled_config, variant_config

VARIANTS = {"tiger": "rms", "lion": "base", "lazy": "rms", "adamw": "rms"}  # and the form
SEEDS = range(6)
JOBS = [
    Job(variant, variant_config(lesson_config(seed), variant, form))
    for variant, form in VARIANTS.items()
    for seed in SEEDS
]
JOBS += [Job("settled", settled_config(seed)) for seed in SEEDS]
JOBS += [
    Job(
        "lazy, decaying momentum",
        dataclasses.replace(variant_config(lesson_config(seed), "lazy"), lazy_momentum="decay"),
    )
    for seed in SEEDS
]


def measure(job: Job) -> Figures:
    """What the article observes, as figures; of the settled run, the size of the rows."""
    config = job.config
    tokens = load_tokens(config)
    counts = tokens.counts(config.seed, config.steps, config.batch, config.context)
    found = run_variant(job.label, config, tokens, counts)
    if job.label == "settled":
        gaps = theory.mean_gap(tokens.shares, config.batch * config.context)
        kappa = theory.kappa(config.lr or 0.0, config.weight_decay or 0.0, gaps[counts > 0])
        return {**found.result, **size_by_kappa(found.weight[counts > 0], kappa)}
    bound, rare = found.result["bound"], rare_tokens(counts)
    rows = saturated_rows(found.run.model.embedding.weight, bound).numpy()
    components = np.abs(found.weight[rare])
    return {
        **found.result,
        "rows": int(rows.sum()),
        "median_count": float(np.median(counts[rows])) if rows.any() else None,
        "largest_count": int(counts[rows].max()) if rows.any() else None,
        "at_the_bound": float((components > 0.95).mean()),
        "on_the_way": float(((components > 0.3) & (components <= 0.95)).mean()),
        "largest": {name: x / bound for name, x in largest_entries(found.run.model).items()},
    }


if __name__ == "__main__":
    main(__file__, JOBS, measure)
