"""The main job: the embedding blow-up and each fix, side by side, on the same text and the same batches.

One function, :func:`reproduce`, trains the variants, several at a time if it is told to, measures, and
leaves a table, three pictures and ``results.json``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import platform
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minisign import theory
from minisign.engine.checks import check_counts
from minisign.lab.build import load_tokens
from minisign.lab.config import Config
from minisign.lab.files import prepare_out, write_json, write_whole
from minisign.lab.gpt import GPT
from minisign.lab.jitter import JITTER, natural_number
from minisign.lab.tokenizer import Tokens
from minisign.lab.train import Run, train, validation_loss
from minisign.probes import extremes, frequent_tokens, rare_tokens, row_rms, saturation
from minisign.studies.processes import side_by_side
from minisign.studies.variants import VARIANTS, base_config, variant_config


@dataclass
class Outcome:
    """What table and pictures need of a trained variant.

    Attributes:
        result: its entry in ``results.json``.
        steps, share: at intervals, the step and the largest |embedding entry| / bound.
        theory_label, theory: the closed form at those steps, where there is one.
        weight: the embedding [V, D] / bound.
    """

    config: Config
    result: dict[str, Any]
    steps: list[int]
    share: list[float]
    theory_label: str
    theory: np.ndarray | None
    weight: np.ndarray


@dataclass
class VariantRun(Outcome):
    """The same, and the trained model, its optimizer and its text."""

    run: Run


Progress = Callable[[int, float, float], object]  # steps done, the last one's loss, the largest entry


def train_variant(
    variant: str,
    run: Run,
    counts: np.ndarray,
    progress: Progress = lambda step, loss, largest: None,
) -> Outcome:
    """Trains one variant and measures its embedding.

    Args:
        variant: its name in the results.
        run: not yet begun; trained in place.
        counts: how often each token is a training input in this run [V].
        progress: called at the start, where there is no loss (NaN), and every ten steps.
    """
    config = run.config
    limit = theory.bound(config.embedding_decay)
    weight = run.model.embedding.weight
    start = max(map(abs, extremes(weight)))
    start_rms = float(row_rms(weight).mean())
    steps, share = [0], [start / limit]
    progress(0, math.nan, start)

    def measure(run: Run) -> None:
        largest = max(map(abs, extremes(weight)))
        steps.append(run.step)
        share.append(largest / limit)
        progress(run.step, run.losses[-1], largest)

    train(run, measure)
    found = saturation(weight, counts, limit)
    head = max(map(abs, extremes(run.model.head.weight)))
    label, curve = _theory(config, start, start_rms)
    result = {
        "variant": variant,
        "steps": run.step,
        "train_loss": run.train_loss,
        "val_loss": validation_loss(run),
        "bound": limit,
        **{k: None if math.isnan(v) else v for k, v in dataclasses.asdict(found).items()},
        "head_max": head,
        "weights_sha256": _sha256(run.model),
        "seconds": run.seconds,
    }
    in_bounds = (weight.detach().float() / limit).cpu().numpy()
    at = np.array(steps[1:]) - 1
    expected = None if curve is None else np.concatenate([share[:1], curve[at] / limit])
    return Outcome(config, result, steps, share, label, expected, in_bounds)


def run_variant(
    variant: str,
    config: Config,
    tokens: Tokens,
    counts: np.ndarray,
    device: torch.device | str = "cpu",
) -> VariantRun:
    """:func:`train_variant` from its configuration, with the trained model."""
    run = Run(config, tokens, device)
    return VariantRun(**vars(train_variant(variant, run, counts)), run=run)


def _sha256(model: GPT) -> str:
    """Of all weights, to tell whether two runs are equal to the last bit."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def _theory(config: Config, start: float, start_rms: float) -> tuple[str, np.ndarray | None]:
    """The curve that no embedding entry of this run should outgrow, after each step; in its units."""
    if config.optimizer == "adamw" or config.embedding_optimizer == "adamw":
        return "", None
    rates = np.array([config.rate(step) for step in range(config.steps)]) * (config.lr or 0.0)
    if isinstance(config.scale, str) and config.optimizer == "tiger":
        return "logistic growth", theory.logistic_growth(rates, config.embedding_decay, start)
    scale = config.scale if config.optimizer == "tiger" else 1.0
    return "envelope", theory.envelope(rates * float(scale), config.embedding_decay, start)


def reproduce(
    variants: Iterable[str] = tuple(VARIANTS),
    form: str = "rms",
    base: Config | None = None,
    device: torch.device | str = "cpu",
    out: Path | None = None,
    progress: Callable[[str, Config], Progress] = lambda variant, config: lambda step, loss, largest: None,
    jobs: int = 1,
    outcomes: dict[str, Outcome] | None = None,
) -> list[Outcome]:
    """Trains the variants and writes what is found.

    Args:
        variants: names from ``VARIANTS``; one named twice is run once.
        form: ``"rms"``, Tiger as its author ships it; ``"base"``, the article's equation.
        base: what the variants share, from :func:`base_config`.
        out: a folder for ``results.json`` and the pictures; written anew after each variant, so that
            an interruption loses only those that it hits.
        progress: given a variant that begins and its configuration, returns what :func:`train_variant` is
            to call.
        jobs: how many variants at a time. 1, one after the other in this process, with as many threads as
            torch has; more, in processes of one thread each, which are spawned: a script that asks for them
            needs ``if __name__ == "__main__"``. At the same number of threads the bits are the same.
        outcomes: takes each by its variant's name as soon as it is measured. What is in it when this is
            interrupted is written as well.

    Returns:
        The outcomes, in the order of the variants.

    Raises:
        ValueError: an unknown variant or form, a text that cannot be used, a folder that cannot be
            written, no jobs; before anything is trained.
        ChildProcessError: a process died.
    """
    base = base or base_config()
    configs = {name: variant_config(base, name, form) for name in variants}
    if not configs:
        raise ValueError(f"no variants: choose from {', '.join(VARIANTS)}")
    check_counts(jobs=jobs)
    tokens = load_tokens(base)
    if out is not None:
        prepare_out(out)
    counts = tokens.counts(base.seed, base.steps, base.batch, base.context)
    about = {
        **base.to_json(),
        "form": form,
        "variants": {name: _differences(base, config) for name, config in configs.items()},
        "text_sha256": tokens.sha256,
        "tokens": len(tokens.train),
        "vocab_size": tokens.vocab_size,
        "rare_tokens": int(rare_tokens(counts).sum()),
        "frequent_tokens": int(frequent_tokens(counts).sum()),
        "device": str(device),
        "threads": 1 if jobs > 1 else torch.get_num_threads(),
        "jitter": natural_number(JITTER),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    shown: dict[str, Progress] = {}

    def hear(name: str, step: int, loss: float, largest: float) -> None:
        if name not in shown:
            shown[name] = progress(name, configs[name])
        shown[name](step, loss, largest)

    def one_by_one() -> Generator[tuple[str, Outcome], None, None]:
        for name, task in tasks.items():
            yield name, _outcome(*task, partial(hear, name))

    tasks = {name: (name, config, tokens, counts, device) for name, config in configs.items()}
    outcomes = {} if outcomes is None else outcomes
    pictures = out  # where to
    try:
        with closing(side_by_side(_outcome, tasks, jobs, hear) if jobs > 1 else one_by_one()) as coming:
            for name, outcome in coming:
                outcomes[name] = outcome
                if out is not None:
                    write_results(out, about, _in_order(outcomes, configs))
    except KeyboardInterrupt:  # the last outcome may not have been written yet
        if out is not None and outcomes:
            write_results(out, about, _in_order(outcomes, configs))
        raise
    except OSError as error:  # a folder that takes no results takes no pictures
        if not isinstance(error, ChildProcessError):
            pictures = None
        raise
    finally:
        if pictures is not None and outcomes:
            write_pictures(pictures, _in_order(outcomes, configs), counts, form)
    return _in_order(outcomes, configs)


def _outcome(
    variant: str,
    config: Config,
    tokens: Tokens,
    counts: np.ndarray,
    device: torch.device | str,
    progress: Progress,
) -> Outcome:
    return train_variant(variant, Run(config, tokens, device), counts, progress)


def _in_order(outcomes: dict[str, Outcome], names: Iterable[str]) -> list[Outcome]:
    return [outcomes[name] for name in names if name in outcomes]


def _differences(base: Config, config: Config) -> dict[str, Any]:
    mine, theirs = config.to_json(), base.to_json()
    return {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        **{name: value for name, value in mine.items() if value != theirs[name]},
    }


def write_results(out: Path, about: dict[str, Any], runs: Sequence[Outcome]) -> None:
    """``results.json``: the configuration, and each run's figures."""
    results = {"config": about, "runs": [run.result for run in runs]}
    write_whole(out / "results.json", lambda path: write_json(path, results))


def write_pictures(out: Path, runs: Sequence[Outcome], counts: np.ndarray, form: str) -> list[Path]:
    """The three pictures of the runs; ``counts`` is how often each token was seen [V]."""
    from minisign import plots  # matplotlib takes a second to load

    steps = max(run.result["steps"] for run in runs)
    what = f"{form} form, {steps} steps"
    names = [run.result["variant"] for run in runs]
    rare, frequent = rare_tokens(counts), frequent_tokens(counts)
    expected: dict[tuple[str, float], Outcome] = {}
    for run in runs:
        if run.theory is not None:
            expected.setdefault((run.theory_label, run.config.lr or 0.0), run)
    figures = {
        "growth.png": plots.growth(
            {name: (run.steps, run.share) for name, run in zip(names, runs, strict=True)},
            {
                f"theory: {label} ({run.result['variant']})": (run.steps, run.theory)
                for (label, _), run in expected.items()
                if run.theory is not None
            },
            f"Largest embedding entry ({what})",
        ),
        "distribution.png": plots.distributions(
            {
                name: (run.weight[rare].ravel(), run.weight[frequent].ravel())
                for name, run in zip(names, runs, strict=True)
            },
            f"Components of rare and frequent tokens' embeddings ({what})",
        ),
        "rows.png": plots.rows_by_frequency(
            {
                name: (counts, np.sqrt((run.weight**2).mean(axis=1)))
                for name, run in zip(names, runs, strict=True)
            },
            f"Row size against token frequency ({what})",
        ),
    }
    for name, figure in figures.items():
        write_whole(out / name, partial(plots.save, figure))
    return [out / name for name in figures]
