"""``minisign reproduce``: the main job, its table and its pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisign.cli import options, show
from minisign.lab.config import Config
from minisign.studies.variants import STEPS, VARIANTS, base_config

if TYPE_CHECKING:
    from minisign.studies.reproduce import Progress

HELP = "train a small GPT with each variant and show the blow-up and its cures"
DESCRIPTION = (
    "Trains the same small GPT with a sign optimizer and with each cure, prints a table, and writes "
    "results.json and three pictures."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    options.text_and_device(parser)
    parser.add_argument(
        "--variants",
        default=",".join(VARIANTS),
        metavar="A,B,…",
        help="which to train, in this order; default: %(default)s",
    )
    parser.add_argument(
        "--form",
        default="rms",
        metavar="rms|base",
        help="Tiger's step: rms, α times the RMS of the weights, as its author ships it; base, one η for "
        "all (default: rms)",
    )
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="variants at a time, each in a process of one thread; 1, in one process with all of torch's "
        "threads; default: by cores and memory, on a GPU 1",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    from minisign.lab.parallel import pick_device
    from minisign.studies.processes import default_jobs
    from minisign.studies.reproduce import Outcome, reproduce

    device = pick_device(args.device)
    variants = [name.strip() for name in args.variants.split(",") if name.strip()]
    base = base_config(args.text or (), args.steps, args.seed)
    jobs = args.jobs
    if jobs is None:
        jobs = default_jobs() if device.type == "cpu" else 1
    finished: dict[str, Outcome] = {}
    bars: list[Any] = []
    stopped: BaseException | None = None
    try:
        progress = partial(_progress, bars)
        reproduce(variants, args.form, base, device, args.out, progress, jobs=jobs, outcomes=finished)
    except (KeyboardInterrupt, FloatingPointError, OSError) as error:
        stopped = error
    finally:
        for bar in bars:
            bar.close()
    if finished:
        _print_table([finished[name] for name in dict.fromkeys(variants) if name in finished])
    if stopped is not None:
        kept = f"{len(finished)} of {len(variants)} variants finished, see {args.out}"
        print(f"\ninterrupted: {kept if finished else 'nothing to keep'}", file=sys.stderr)
        if isinstance(stopped, KeyboardInterrupt):
            return 130
        raise stopped
    print(f"\nresults.json and the pictures are in {args.out}")
    return 0


def _progress(bars: list[Any], variant: str, config: Config) -> Progress:
    bar = show.bar(variant, config.steps)
    bars.append(bar)

    def on_step(step: int, loss: float, largest: float) -> None:
        if step:
            show.advance(bar, step, loss=f"{loss:.3f}", largest=f"{largest:.3g}")
        if step == config.steps:
            bar.close()

    return on_step


def _print_table(runs: Sequence[Any]) -> None:
    from rich.console import Console

    if not runs:
        return
    columns = ("train", "val", "1/λ", "largest", "smallest", "rare", "frequent", "s")
    table = show.table("The embedding against its bound ±1/λ", "variant", *columns)
    for run in runs:
        r = run.result
        table.add_row(
            r["variant"],
            f"{r['train_loss']:.2f}",
            f"{r['val_loss']:.2f}",
            f"{r['bound']:g}",
            f"{r['embedding_max']:.4g}",
            f"{r['embedding_min']:.4g}",
            show.percent(r["rare_saturated"]),
            show.percent(r["frequent_saturated"]),
            f"{r['seconds']:.0f}",
        )
    Console().print(table)
    print(
        "train, val: loss in nats per token. largest, smallest: entries of the embedding.\n"
        "rare, frequent: share of the components beyond 0.8/λ among tokens seen 1 to 3 times, and more "
        "than 200 times."
    )
