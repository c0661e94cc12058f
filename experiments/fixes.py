"""Every fix on the same budget, over seeds: losses, saturation, memory, fine-tuning, repair.

    python experiments/fixes.py

At two sizes: that of the lessons, and that of the main job without Lion. Notebooks 07 and 08 read the log
and make some of the runs anew.
"""

from __future__ import annotations

import copy

import numpy as np

from minisign.doctor.repair import WAYS, reset_rows
from minisign.lab.build import load_tokens
from minisign.lab.tokenizer import Tokens
from minisign.lab.train import Run, validation_loss
from minisign.probes import frequency_groups, loss_by_group, saturated_rows, state_bytes, token_losses
from minisign.studies.experiment import Figures, Job, main
from minisign.studies.finetune import fine_tune, second_language
from minisign.studies.reproduce import run_variant
from minisign.studies.variants import FIXES, base_config, fix_config, lesson_config

SIZES = {"lesson": (lesson_config, 6), "main": (base_config, 5)}  # and how many seeds
FROM_SCRATCH = "from scratch"  # fine-tuned without any training before


def job(size: str, label: str, seed: int) -> Job:
    base = SIZES[size][0](seed=seed)
    return Job(
        f"{size}: {label}", fix_config(base, "tiger" if label == FROM_SCRATCH else label), {"fix": label}
    )


JOBS = [
    job(size, label, seed)
    for size, (_, seeds) in SIZES.items()
    for label in (*FIXES, FROM_SCRATCH)
    if size == "lesson" or "lion" not in label
    for seed in range(seeds)
]


def losses(run: Run, tokens: Tokens, counts: np.ndarray) -> Figures:
    """Loss on a text's validation part: mean, by the token to predict, and by the token just read."""
    windows = tokens.windows(run.config.context, 1024)
    each, groups = token_losses(run.model, windows), frequency_groups(counts)
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
    if job.options["fix"] == FROM_SCRATCH:
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
