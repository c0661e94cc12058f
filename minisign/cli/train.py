"""``minisign train``: one run with any optimizer, and on from its checkpoint."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisign.cli import options, show
from minisign.lab.config import Config

if TYPE_CHECKING:
    import torch

    from minisign.lab.parallel import World
    from minisign.lab.train import Run

HELP = "one run with any optimizer; leaves weights and a checkpoint to go on from"
DESCRIPTION = (
    "Trains one model. Leaves model.safetensors, config.json and the last two checkpoints in --out. Ctrl-C "
    "stops between two steps and saves. On several processes: torchrun --nproc-per-node N -m minisign.cli "
    "train --parallel ddp …"
)

# name of the option → (field of Config, how to read it, metavar, help)
OPTIONS: dict[str, tuple[str, Any, str, str]] = {
    "--optimizer": ("optimizer", str, "NAME", "sgd, signum, lion, tiger or adamw (default: tiger)"),
    "--lr": ("lr", float, "X", "learning rate; default: one that suits the optimizer here"),
    "--weight-decay": ("weight_decay", float, "λ", "decoupled weight decay; default: likewise"),
    "--betas": ("betas", None, "β", "one for sgd, signum and tiger, two for lion and adamw"),
    "--eps": ("eps", float, "ε", "of adamw, in the gradient's units (default: 1e-8)"),
    "--clip": ("clip", float, "X", "largest norm of the whole gradient (default: any)"),
    "--scale": ("scale", None, "S", "Tiger's step: rms, row_rms or a number (default: rms)"),
    "--embedding-scale": ("embedding_scale", None, "S", "the same on the embeddings (default: row_rms)"),
    "--accumulate": ("accumulate", int, "K", "Tiger: micro-batches to a step (default: 1)"),
    "--shrink": ("shrink", float, "X", "Tiger: factor of the weights at a NaN (default: 0.99)"),
    "--lazy": ("lazy", None, "HOW", "lazy embeddings: none, grad or ids (default: none)"),
    "--lazy-momentum": ("lazy_momentum", str, "HOW", "of absent rows: freeze or decay (default: freeze)"),
    "--embedding-optimizer": ("embedding_optimizer", None, "NAME", "adamw, or none (default: none)"),
    "--steps": ("steps", int, "N", "in all, those before --resume too (default: 1500)"),
    "--batch": ("batch", int, "N", "windows in a batch (default: 16)"),
    "--context": ("context", int, "N", "tokens in a window (default: 32)"),
    "--warmup": ("warmup", int, "N", "steps of rising rate (default: 50)"),
    "--decay": ("decay", float, "X", "share of the steps of falling rate, at the end (default: 0)"),
    "--layers": ("layers", int, "N", "blocks (default: 2)"),
    "--heads": ("heads", int, "N", "attention heads (default: 4)"),
    "--width": ("width", int, "N", "entries of a hidden state (default: 64)"),
    "--norm": ("norm", str, "WHERE", "pre or post (default: pre)"),
    "--tie": ("tie", str, "HOW", "none, tied or half_swap (default: none)"),
    "--head": ("head", str, "HOW", "output layer: plain, bias or centered (default: plain)"),
    "--init": ("init", str, "HOW", "of the blocks' matrices: gpt2 or xavier (default: gpt2)"),
    "--embedding-std": (
        "embedding_std",
        float,
        "X",
        "of the embedding at the start (default: 0.2; tied: 0.02)",
    ),
    "--vocab-size": ("vocab_size", int, "N", "byte-pair tokens (default: 4096)"),
    "--vocab-rare-share": (
        "vocab_rare_share",
        float,
        "X",
        "of the rare language in the text the vocabulary comes from (default: the run's own text)",
    ),
    "--seed": ("seed", int, "S", "of weights and batches (default: 0)"),
}
SWITCHES = {
    "--fused": ("fused", "the optimizer's step in one pass; on a CPU it needs a C++ compiler"),
    "--release-grads": ("release_grads", "Tiger: each gradient is freed within the backward pass"),
}
# Both: the option and, first, the field.
FIELDS: dict[str, tuple[str, ...]] = {**OPTIONS, **SWITCHES}


def arguments(parser: argparse.ArgumentParser) -> None:
    options.text_and_device(parser)
    for option, (field, kind, metavar, text) in OPTIONS.items():
        more = {"nargs": "+", "type": float} if field == "betas" else {"type": kind or str}
        parser.add_argument(option, dest=field, metavar=metavar, help=text, **more)
    for option, (field, text) in SWITCHES.items():
        parser.add_argument(option, dest=field, action="store_true", default=None, help=text)
    parser.add_argument(
        "--parallel",
        metavar="ddp|fsdp",
        help="several processes, started by torchrun: each has the whole model, or its rows of each tensor",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to save; required without --resume")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on from the checkpoint in DIR")
    parser.add_argument(
        "--save-every",
        type=int,
        metavar="N",
        help="also save after every N steps; default: at the end only",
    )


def run(args: argparse.Namespace) -> int:
    from minisign.lab.parallel import joined

    if args.out is None and args.resume is None:
        raise ValueError("train needs --out DIR, or --resume DIR to go on from")
    if args.save_every is not None and args.save_every < 1:
        raise ValueError(f"--save-every must be 1 or more, got {args.save_every}")
    with joined(args.parallel, args.device) as (world, device):
        try:
            return _train(args, world, device)
        except RuntimeError as error:
            if world.engine is None:
                raise
            kept = f"go on with --resume {args.out or args.resume}"
            raise ConnectionError(f"process {world.rank} lost the others ({error}): {kept}") from None


def _train(args: argparse.Namespace, world: World, device: torch.device) -> int:
    from minisign.lab.build import load_tokens
    from minisign.lab.files import prepare_out
    from minisign.lab.train import Run, train, validation_loss

    given = _given_fields(args)
    if args.resume is not None:
        run = Run.resume(args.resume, device, given.get("steps"), world)
        _refuse_changes(run.config, given)
        if run.step == run.config.steps:
            raise ValueError(f"{args.resume} is at step {run.step}, its last: give more --steps to go on")
    else:
        config = Config(**given)
        run = Run(config, load_tokens(config), device, world)
    out = args.out or args.resume
    prepare_out(out)

    bar = show.bar("train", run.config.steps, run.step, is_shown=world.rank == 0)

    def after(run: Run) -> None:
        show.advance(bar, run.step, loss=f"{run.losses[-1]:.3f}")
        if args.save_every and run.step % args.save_every == 0 and run.step < run.config.steps:
            run.save(out)

    with _stop_on_interrupt() as stopping:
        train(run, after, every=math.gcd(10, args.save_every or 10), stop=lambda: bool(stopping))
        bar.close()
        run.save(out)
    if run.step < run.config.steps:
        if world.rank == 0:
            print(
                f"interrupted at step {run.step}: go on with minisign train --resume {out}", file=sys.stderr
            )
        return 130
    validation = validation_loss(run)
    if world.rank == 0:
        print(
            f"step {run.step}: training loss {run.train_loss:.3f}, validation loss {validation:.3f} "
            f"nats per token, {run.seconds:.0f} s; saved in {out}"
        )
    return 0


def _given_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a Config that the command line gives, read as the Config wants them."""
    given = {field: getattr(args, field) for field, *_ in FIELDS.values()}
    given["text"] = args.text
    given = {field: value for field, value in given.items() if value is not None}
    for field in ("text", "betas"):
        if field in given:
            given[field] = tuple(given[field])
    if given.get("lazy") == "none":
        given["lazy"] = False
    if given.get("embedding_optimizer") == "none":
        given["embedding_optimizer"] = None
    for field in ("scale", "embedding_scale"):
        if field in given and given[field] not in ("rms", "row_rms"):
            option, value = f"--{field.replace('_', '-')}", given[field]
            try:
                given[field] = float(value)
            except ValueError:
                raise ValueError(f"{option} must be rms, row_rms or a number, got {value}") from None
    return given


def _refuse_changes(config: Config, given: dict[str, Any]) -> None:
    for field, value in given.items():
        saved = getattr(config, field)
        if value != saved and field != "steps":
            option = next((o for o, (f, *_) in FIELDS.items() if f == field), f"--{field}")
            raise ValueError(f"{option} {value} is not what the run to resume has: {saved}")


@contextmanager
def _stop_on_interrupt() -> Iterator[list[int]]:
    """A list that Ctrl-C fills, to end training between two steps; a second Ctrl-C ends it at once."""
    seen: list[int] = []

    def on_interrupt(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
