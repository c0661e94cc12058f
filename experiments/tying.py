"""When does tying cure the blow-up? One condition at a time, untied, tied and half-swapped, in both forms.

    python experiments/tying.py

Notebook 06 reads the log and makes two of the runs anew: those conditions have more seeds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from minisign.lab.build import load_tokens
from minisign.probes import common_mode
from minisign.studies.experiment import Figures, Job, main
from minisign.studies.reproduce import run_variant
from minisign.studies.variants import FORMS, lesson_config, variant_config

SEEDS, MORE_SEEDS = 3, 6
TIES = {"untied": "tiger", "tied": "tied", "half_swap": "half_swap"}  # and the variant that has it
# What each condition changes against the lessons' model.
CONDITIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "bias": {"head": "bias"},
    "centered": {"head": "centered"},
    "batch 4": {"batch": 4},
    "batch 64": {"batch": 64},
    "1800 steps": {"steps": 1800},
    "3600 steps": {"steps": 3600},
    "3600 steps, centered": {"steps": 3600, "head": "centered"},
    "1024 tokens": {"vocab_size": 1024},
    "8192 tokens": {"vocab_size": 8192},
    "tensor RMS": {"embedding_scale": "rms"},
    "3600 steps, tensor RMS": {"steps": 3600, "embedding_scale": "rms"},
    "batch 4, centered": {"batch": 4, "head": "centered"},
    "batch 64, centered": {"batch": 64, "head": "centered"},
    "1024 tokens, centered": {"vocab_size": 1024, "head": "centered"},
    "8192 tokens, centered": {"vocab_size": 8192, "head": "centered"},
}
JOBS = [
    Job(
        f"{tie}, {form}, {condition}",
        dataclasses.replace(variant_config(lesson_config(seed), variant, form), **changes),
    )
    for condition, changes in CONDITIONS.items()
    for form in FORMS
    for tie, variant in TIES.items()
    for seed in range(MORE_SEEDS if condition in ("as it is", "centered") else SEEDS)
    if form == "rms" or "embedding_scale" not in changes
]


def measure(job: Job) -> Figures:
    """The embedding against its bound, and how much of the final hidden states all tokens share."""
    config = job.config
    tokens = load_tokens(config)
    counts = tokens.counts(config.seed, config.steps, config.batch, config.context)
    found = run_variant(job.label, config, tokens, counts)
    model = found.run.model.eval()
    ids = torch.from_numpy(tokens.windows(config.context, 64)[:, :-1])
    with torch.no_grad():
        shared = common_mode(model.features(ids))
    return {
        **found.result,
        "largest": max(abs(found.result["embedding_max"]), abs(found.result["embedding_min"]))
        / found.result["bound"],
        "common_mode": shared,
        "unseen_tokens": int((counts == 0).sum()),
        "curve": {
            "steps": found.steps[:: len(found.steps) // 30],
            "share": [round(x, 4) for x in found.share[:: len(found.share) // 30]],
        },
    }


if __name__ == "__main__":
    main(__file__, JOBS, measure)
