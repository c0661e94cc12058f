"""Every fix on the same budget, over seeds: losses, saturation, memory, fine-tuning, repair.

    python experiments/fixes.py

At two sizes: that of the lessons, and that of the main job without Lion. The vocabulary is learned from
text that holds both languages in equal parts, since the one that 1 % of the second language gives spells
its words with tokens of the first and leaves little to fine-tune. Notebook 08 reads the log and makes one
of the runs anew.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np

from minisign.experiment import Figures, Job, main
from minisign.finetune import fine_tune, second_language
from minisign.probes import loss_by_group, saturated_rows, state_bytes, token_losses
from minisign.repair import WAYS, reset_rows
from minisign.reproduce import base_config, lesson_config, run_variant, variant_config
from minisign.tokenizer import Tokens
from minisign.train import Config, Run, load_tokens, validation_loss

SIZES = {"lesson": (lesson_config, 6), "main": (base_config, 5)}  # and how many seeds
# By label: the variant, the form, and what else changes.
FIXES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tiger": ("tiger", "rms", {}),
    "lazy": ("lazy", "rms", {}),
    "tied": ("tied", "rms", {}),
    "half_swap": ("half_swap", "rms", {}),
    "half_swap, centered": ("half_swap", "rms", {"head": "centered"}),
    "hybrid": ("hybrid", "rms", {}),
    "adamw": ("adamw", "rms", {}),
    "lion": ("lion", "base", {}),
    "lion, lazy": ("lion", "base", {"lazy": "ids"}),
    "lion, half_swap, centered": ("lion", "base", {"tie": "half_swap", "head": "centered"}),
    "lion, hybrid": ("lion", "base", {"embedding_optimizer": "adamw"}),
    "from scratch": ("tiger", "rms", {}),  # fine-tuned without any training before
}


def fix_config(size: str, label: str, seed: int) -> Config:
    """The configuration of one of the runs."""
    variant, form, changes = FIXES[label]
    base, _ = SIZES[size]
    return dataclasses.replace(
        variant_config(base(seed=seed), variant, form), vocab_rare_share=0.5, **changes
    )


JOBS = [
    Job(f"{size}: {label}", fix_config(size, label, seed), {"fix": label})
    for size, (_, seeds) in SIZES.items()
    for label in FIXES
    if size == "lesson" or "lion" not in label
    for seed in range(seeds)
]


def by_frequency(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Which tokens were seen how often, as masks [V]."""
    edges = {"never": (0, 0), "1 to 3": (1, 3), "4 to 20": (4, 20), "21 to 200": (21, 200)}
    groups = {name: (counts >= low) & (counts <= high) for name, (low, high) in edges.items()}
    return {**groups, "more": counts > 200}


def losses(run: Run, tokens: Tokens, counts: np.ndarray) -> Figures:
    """Loss on a text's validation part: mean, by the token to predict, and by the token just read."""
    windows = tokens.windows(run.config.context, 1024)
    each, groups = token_losses(run.model, windows), by_frequency(counts)
    return {
        "mean": float(each.mean()),
        "to predict": finite(loss_by_group(each, windows[:, 1:], groups)),
        "just read": finite(loss_by_group(each, windows[:, :-1], groups)),
    }


def finite(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else value for name, value in figures.items()}


def tuning(run: Run, second: Tokens, counts: np.ndarray) -> Figures:
    """Losses on the second language before and after fine-tuning on it, and on the first after."""
    curve = []
    before = losses(run, second, counts)
    tuned = fine_tune(run, second, callback=lambda r: curve.append([r.step, r.train_loss]), every=20)
    # The fine-tuned run's text is the second language; the first is what the model was trained on.
    first = Run(run.config, run.tokens)
    first.model.load_state_dict(tuned.model.state_dict())
    return {
        "before": before,
        "after": losses(tuned, second, counts),
        "first after": validation_loss(first),
        "curve": curve,
    }


def measure(job: Job) -> Figures:
    config = job.config
    tokens = load_tokens(config)
    second = second_language(config, tokens)
    counts = tokens.counts(config.seed, config.steps, config.batch, config.context)
    if job.options["fix"] == "from scratch":
        return {"second": tuning(Run(config, tokens), second, counts)}
    found = run_variant(job.label, config, tokens, counts)
    run, bound = found.run, found.result["bound"]
    weight = run.model.embedding.weight
    rows = saturated_rows(weight, bound)
    figures = {
        **found.result,
        "state_bytes": state_bytes(run.optimizer),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "saturated_rows": int(rows.sum()),
        "losses": losses(run, tokens, counts),
        "second": tuning(run, second, counts),
        "repairs": {},
    }
    if job.options["fix"] in ("tiger", "lion"):
        for way in WAYS:
            repaired = copy.copy(run)
            repaired.model = copy.deepcopy(run.model)
            reset_rows(repaired.model.embedding.weight, rows, way, config.seed)
            figures["repairs"][way] = {
                "first": validation_loss(repaired),
                **tuning(repaired, second, counts),
            }
    return figures


if __name__ == "__main__":
    main(__file__, JOBS, measure)
