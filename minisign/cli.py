"""The command line: arguments and messages, nothing else."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minisign.files import one_line
from minisign.jitter import JITTER, natural_number
from minisign.kernels.rule import Unavailable

if TYPE_CHECKING:
    import torch

    from minisign.parallel import World
    from minisign.reproduce import Progress
    from minisign.train import Config, Run

DESCRIPTION = """\
Sign-based optimizers to read, run and trust.

Sign optimizers (Tiger, Lion, Signum) move an embedding row for as long as its momentum has a sign, and
the sign does not decay: the rows of rare tokens run to exactly ±1/λ. `minisign reproduce` shows it
happen on a small GPT, with each cure beside it."""

EXAMPLES = """\
examples:
  minisign reproduce                             all variants, on two CPU cores in about four minutes
  minisign reproduce --text book.txt             the same on your own text
  minisign reproduce --variants tiger,lazy       two of them
  minisign train --optimizer lion --out runs/a   one run, with a checkpoint
  minisign train --resume runs/a --steps 3000    and on from there
  minisign probe --model runs/a                  gradient norms, saturation and head of a trained model
  minisign probe --model gpt2/ --text book.txt   of a GPT-2 or RoBERTa checkpoint
  minisign inspect model.safetensors             are rows of its embedding at ±1/λ? exit code 1 if so
  minisign repair model/ --out mended/           a copy with those rows scaled down
  minisign corpus --words 1000 --out sample.txt  the generated text"""


class Parser(argparse.ArgumentParser):
    """Errors are one line, and the exit code is 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> Parser:
    parser = Parser(
        prog="minisign",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _reproduce_arguments(
        commands.add_parser(
            "reproduce",
            help="train a small GPT with each variant and show the blow-up and its cures",
            description="Trains the same small GPT with a sign optimizer and with each cure, prints a "
            "table, and writes results.json and three pictures.",
        )
    )
    _train_arguments(
        commands.add_parser(
            "train",
            help="one run with any optimizer; leaves weights and a checkpoint to go on from",
            description="Trains one model. Leaves model.safetensors, config.json and the last two "
            "checkpoints in --out. Ctrl-C stops between two steps and saves. On several processes: "
            "torchrun --nproc-per-node N -m minisign train --parallel ddp …",
        )
    )
    _probe_arguments(
        commands.add_parser(
            "probe",
            help="measure a trained model: gradient norms by block, curvature, saturation, head",
            description="Measures a model that was trained here, or a GPT-2 or RoBERTa checkpoint "
            "(config.json and safetensors), on a text. Prints a table, leaves probe.json and probe.png in "
            "--out. Nothing is trained, changed or downloaded.",
        )
    )
    _inspect_arguments(
        commands.add_parser(
            "inspect",
            help="whether rows of a checkpoint's embeddings stand at the bound ±1/λ",
            description="Reads the embedding-like matrices of a checkpoint, whoever trained it, and says "
            "of each whether rows stand at a bound. Prints a verdict and a table, leaves inspect.json and "
            "inspect.png in --out. Exit code: 0 healthy, 1 saturated, 2 error. Nothing is changed.",
        )
    )
    _repair_arguments(
        commands.add_parser(
            "repair",
            help="a copy of a checkpoint with such rows scaled down",
            description="Writes a copy of a checkpoint in which the rows that stand at a bound have the "
            "median size of the others, and their pattern of signs; every other byte is as it was.",
        )
    )
    _corpus_arguments(
        commands.add_parser(
            "corpus",
            help="write the generated text in two invented languages",
            description="Writes the generated corpus and prints its SHA-256. The same options give the "
            "same text on every platform.",
        )
    )
    return parser


def _common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="train on this UTF-8 text (.gz too) instead of the generated one",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="auto|cpu|cuda",
        help="default: cpu; auto takes a GPU if there is one",
    )


def _reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    from minisign.reproduce import STEPS, VARIANTS

    parser.set_defaults(run=run_reproduce)
    _common_arguments(parser)
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


# name of the option → (field of Config, how to read it, metavar, help)
_TRAIN_OPTIONS: dict[str, tuple[str, Any, str, str]] = {
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
_TRAIN_SWITCHES = {
    "--fused": ("fused", "the optimizer's step in one pass; on a CPU it needs a C++ compiler"),
    "--release-grads": ("release_grads", "Tiger: each gradient is freed within the backward pass"),
}
_ALL_TRAIN_OPTIONS: dict[str, tuple[str, ...]] = {**_TRAIN_OPTIONS, **_TRAIN_SWITCHES}


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_train)
    _common_arguments(parser)
    for option, (field, kind, metavar, text) in _TRAIN_OPTIONS.items():
        more = {"nargs": "+", "type": float} if field == "betas" else {"type": kind or str}
        parser.add_argument(option, dest=field, metavar=metavar, help=text, **more)
    for option, (field, text) in _TRAIN_SWITCHES.items():
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


def _probe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_probe)
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR|FILE",
        help="a folder with config.json and model.safetensors (or shards), or a safetensors file with "
        "config.json beside it",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="what to measure it on, UTF-8 (.gz too); a model trained here has a text of its own",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR|FILE",
        help="tokenizer.json, or a folder with it or with vocab.json and merges.txt; default: the model's",
    )
    parser.add_argument(
        "--blocks",
        default="layers",
        metavar="layers|tensors",
        help="what to compare: whole layers, or every tensor (default: %(default)s)",
    )
    parser.add_argument(
        "--curvature",
        type=int,
        default=0,
        metavar="N",
        help="also the top Hessian eigenvalue of each block, and Λ, by at most N products each; a product "
        "takes about two backward passes (default: none)",
    )
    parser.add_argument(
        "--weight-decay",
        type=float,
        metavar="λ",
        help="that the model was trained with, for the bound 1/λ; default: that of a run made here, else "
        "unknown, and the largest entry takes the bound's place",
    )
    for option, default, what in (
        ("--batches", 4, "batches"),
        ("--batch", 8, "windows in a batch"),
        ("--length", None, "tokens in a window; default: 128, or the model's context if that is shorter"),
        ("--seed", 0, "of the masks, for RoBERTa"),
    ):
        shown = what if default is None else f"{what} (default: {default})"
        parser.add_argument(option, type=int, default=default, metavar="N", help=shown)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/probe"), metavar="DIR", help="default: %(default)s"
    )


def _checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a safetensors or torch file, an index of shards (….index.json), or a folder with them",
    )
    parser.add_argument(
        "--tensor",
        nargs="+",
        default=(),
        metavar="NAME",
        help="which matrices; default: those that are embeddings or output layers by name and shape",
    )
    parser.add_argument(
        "--weight-decay",
        type=float,
        metavar="λ",
        help="that the model was trained with; default: that of a run made here, else the bound is "
        "estimated from the rows that stand there",
    )


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_inspect)
    _checkpoint_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        metavar="NAME|FILE",
        help="to show the tokens' text: a tiktoken encoding or file, or tokenizer.json; default: "
        "tokenizer.json of the checkpoint's folder, or a run's own vocabulary",
    )
    parser.add_argument(
        "--rows", type=int, default=10, metavar="N", help="worst rows to show (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/inspect"), metavar="DIR", help="default: %(default)s"
    )


def _repair_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_repair)
    _checkpoint_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="NEW",
        help="file or folder to write, like CHECKPOINT; never overwritten",
    )


def _corpus_arguments(parser: argparse.ArgumentParser) -> None:
    from minisign.corpus import DEFAULT as default

    parser.set_defaults(run=run_corpus)
    parser.add_argument(
        "--words", type=int, default=default.words, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--exponent",
        type=float,
        default=default.exponent,
        metavar="S",
        help="of Zipf's law (default: %(default)s)",
    )
    parser.add_argument(
        "--rare-share",
        type=float,
        default=default.rare_share,
        metavar="X",
        help="share of the documents in the rare language (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=default.seed, metavar="S", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the text")


# --- the commands ---------------------------------------------------------------------------------


def run_reproduce(args: argparse.Namespace) -> int:
    from minisign.processes import default_jobs
    from minisign.reproduce import Outcome, base_config, reproduce
    from minisign.train import pick_device

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
        reproduce(variants, args.form, base, device, args.out, partial(_progress, bars), jobs, finished)
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


def run_train(args: argparse.Namespace) -> int:
    from minisign.parallel import joined

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
    from minisign.files import prepare_out
    from minisign.train import Config, Run, load_tokens, train, validation_loss

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

    bar = _bar("train", run.config.steps, run.step, is_shown=world.rank == 0)

    def after(run: Run) -> None:
        _advance(bar, run.step, loss=f"{run.losses[-1]:.3f}")
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


def run_probe(args: argparse.Namespace) -> int:
    from minisign.examine import examine, write_examination
    from minisign.files import prepare_out
    from minisign.pretrained import examples, load_subject
    from minisign.tokenizer import read_text

    subject = load_subject(args.model, args.tokenizer)
    prepare_out(args.out)
    if args.text:
        ids = subject.encode(read_text(args.text))
    elif subject.own_text is not None:
        ids = subject.own_text.tolist()
    else:
        raise ValueError(f"{args.model} brings no text: give one with --text")
    length = min(128, subject.context) if args.length is None else args.length
    batches = examples(subject, ids, args.batches, args.batch, length, args.seed)
    decay = subject.weight_decay if args.weight_decay is None else args.weight_decay
    found = examine(subject, batches, ids, args.blocks, args.curvature, decay)
    files = write_examination(args.out, found, subject, f"{args.model}: {subject.name}")
    _print_examination(found)
    print(f"\n{' and '.join(file.name for file in files)} are in {args.out}")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    from minisign.files import prepare_out
    from minisign.inspection import as_json, inspect_checkpoint, token_texts_of, write_inspection

    if args.rows < 0:
        raise ValueError(f"--rows must be 0 or more, got {args.rows}")
    text = token_texts_of(args.checkpoint, args.tokenizer)
    prepare_out(args.out)
    found = [m for _, m in inspect_checkpoint(args.checkpoint, args.tensor, args.weight_decay)]
    content = [as_json(m, args.rows, text) for m in found]
    files = write_inspection(args.out, found, content, str(args.checkpoint))
    _print_inspection(content)
    print(f"\n{' and '.join(file.name for file in files)} are in {args.out}")
    return int(any(m.saturated for m in found))


def run_repair(args: argparse.Namespace) -> int:
    from minisign.checkpoint import FOLDER
    from minisign.inspection import inspect_checkpoint
    from minisign.repair import repair

    found = inspect_checkpoint(args.checkpoint, args.tensor, args.weight_decay)
    bad = [(stored, m) for stored, m in found if m.saturated]
    if not bad:
        print(f"healthy: no rows stand at a bound in {args.checkpoint}; nothing was written")
        return 0
    repair(args.checkpoint, args.out, bad)
    for _, m in bad:
        print(f"{m.name}: {_count(int(m.rows.sum()), 'row')} scaled to an RMS of {m.typical:.3g}")
    print(f"repaired copy in {args.out}")
    if (args.out / FOLDER).is_dir():
        print("its checkpoints are as they were: --resume goes on from the rows of before")
    return 0


def run_corpus(args: argparse.Namespace) -> int:
    from minisign.corpus import CorpusConfig, generate, sha256
    from minisign.files import prepare_out, write_whole

    config = CorpusConfig(args.words, args.exponent, args.rare_share, args.seed)
    prepare_out(args.out.parent)
    text = generate(config)
    write_whole(args.out, lambda path: path.write_bytes(text.encode()))
    print(f"{sha256(text)}  {args.out}")
    return 0


# --- small things ---------------------------------------------------------------------------------


def _given_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a Config that the command line gives, read as the Config wants them."""
    given = {field: getattr(args, field) for field, *_ in _ALL_TRAIN_OPTIONS.values()}
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
            option = next((o for o, (f, *_) in _ALL_TRAIN_OPTIONS.items() if f == field), f"--{field}")
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


def _bar(name: str, total: int, done: int = 0, is_shown: bool = True) -> Any:
    from tqdm import tqdm

    # In a log file, a line every half minute is enough, and bars cannot stand one below the other.
    pause, position = (0.1, None) if sys.stderr.isatty() else (30.0, 0)
    return tqdm(
        total=total,
        initial=done,
        desc=f"{name:9}",
        unit="step",
        dynamic_ncols=True,
        mininterval=pause,
        position=position,
        disable=not is_shown,
    )


def _advance(bar: Any, step: int, **shown: str) -> None:
    bar.set_postfix(shown, refresh=False)
    bar.update(step - bar.n)


def _progress(bars: list[Any], variant: str, config: Config) -> Progress:
    bar = _bar(variant, config.steps)
    bars.append(bar)

    def on_step(step: int, loss: float, largest: float) -> None:
        if step:
            _advance(bar, step, loss=f"{loss:.3f}", largest=f"{largest:.3g}")
        if step == config.steps:
            bar.close()

    return on_step


def _print_table(runs: Sequence[Any]) -> None:
    from rich.console import Console

    if not runs:
        return
    columns = ("train", "val", "1/λ", "largest", "smallest", "rare", "frequent", "s")
    table = _table("The embedding against its bound ±1/λ", "variant", *columns)
    for run in runs:
        r = run.result
        table.add_row(
            r["variant"],
            f"{r['train_loss']:.2f}",
            f"{r['val_loss']:.2f}",
            f"{r['bound']:g}",
            f"{r['embedding_max']:.4g}",
            f"{r['embedding_min']:.4g}",
            _percent(r["rare_saturated"]),
            _percent(r["frequent_saturated"]),
            f"{r['seconds']:.0f}",
        )
    Console().print(table)
    print(
        "train, val: loss in nats per token. largest, smallest: entries of the embedding.\n"
        "rare, frequent: share of the components beyond 0.8/λ among tokens seen 1 to 3 times, and more "
        "than 200 times."
    )


def _print_examination(found: dict[str, Any]) -> None:
    unequal = found["heterogeneity"]
    print(
        f"{found['model']}, {found['parameters']:,} parameters; loss {found['loss']:.3f} nats over "
        f"{found['predicted']:,} tokens ({_count(found['windows'], 'window')} in "
        f"{_count(found['batches'], 'batch', 'es')})\n"
    )
    curved = unequal["lambda_g"] is not None
    blocks = _table("Gradient by block", "block", "entries", "‖g‖", "per entry", "one batch")
    if curved:
        for name in ("‖H‖", "residual"):
            blocks.add_column(name, justify="right", no_wrap=True)
    first, *others = [name.split(".") for name in unequal["blocks"]]
    depth = 0  # of what all names begin with
    while others and all(name[depth : depth + 1] == first[depth : depth + 1] for name in others):
        depth += 1
    for name, block in unequal["blocks"].items():
        bend = block["curvature"]
        more = []
        if bend:
            more = [f"{bend['norm']:.3g}{'' if bend['converged'] else ' …'}", f"{bend['residual']:.2f}"]
        low, high = (f"{f(block['norm_by_batch']):.3g}" for f in (min, max))
        per_entry = block["norm"] / block["parameters"] ** 0.5
        blocks.add_row(
            ".".join(name.split(".")[depth:]),
            f"{block['parameters']:,}",
            f"{block['norm']:.3g}",
            f"{per_entry:.2g}",
            low if low == high else f"{low}–{high}",
            *more,
        )
    _print_whole(blocks)
    of = {
        name: "infinite" if value is None else f"{value:.3g}"
        for name, value in unequal["disparity"].items()
    }
    print(
        f"‖g‖ of the blocks: largest over smallest {of['max over min']} "
        f"(per entry {of['max over min per entry']}), Gini {of['gini']} (per entry {of['gini per entry']})"
    )
    if curved:
        means = f"Λ_G {unequal['lambda_g']:.3g}, by entries Λ_P {unequal['lambda_p']:.3g}"
        print(f"mean ‖H‖ by squared gradient {means}")
        if not all(block["curvature"]["converged"] for block in unequal["blocks"].values()):
            print("… not converged: ‖H‖, and Λ, are too small; give --curvature more products")
    if still := sum(block["norm"] == 0 for block in unequal["blocks"].values()):
        print(f"{_count(still, 'block')} without gradient: not used by the loss")
    print()
    matrices = _table(
        "Embedding and head", "matrix", "smallest", "largest", "bound", "near", "rows", "‖W‖", "common"
    )
    for name, m in found["matrices"].items():
        matrices.add_row(
            name,
            f"{m['smallest']:.4g}",
            f"{m['largest']:.4g}",
            f"{m['bound']:.4g}",
            _percent(m["near"]),
            f"{m['rows']:,}",
            f"{m['norm']:.4g}",
            f"{m['common_mode']:.2f}",
        )
    _print_whole(matrices)
    losses = ["none" if v is None else f"{v:.2f}" for v in found["loss_by_frequency"].values()]
    print(f"loss by tenths of the text: {', '.join(losses)}")
    print(
        "\n‖g‖: gradient norm over all batches; per entry: over √entries; one batch: lowest and highest.\n"
        + ("‖H‖: size of the block's top Hessian eigenvalue; residual: how far from converged.\n" * curved)
        + f"bound: {m['bound_is']}; near: share of the components beyond 0.8 of it; rows: with more than a "
        "tenth of theirs there.\n"
        "common: how much of the rows is the same in all, 0 to 1. Tenths: the most frequent tokens first."
    )


def _print_inspection(content: Sequence[dict[str, Any]]) -> None:
    for m in content:
        print(m["verdict"])
        if m["note"]:
            print(f"note: {m['note']}")
    print()
    matrices = _table(
        "Matrices", "tensor", "rows", "columns", "type", "smallest", "largest", "bound", "near", "at bound"
    )
    for m in content:
        bound = "" if m["bound"] is None else f"{'' if m['bound_is'] == '1/λ' else '≈ '}{m['bound']:.4g}"
        matrices.add_row(
            m["tensor"],
            *(f"{n:,}" for n in m["shape"]),
            m["dtype"],
            f"{m['smallest']:.4g}",
            f"{m['largest']:.4g}",
            bound,
            _percent(m["near"]) if bound else "",
            f"{m['rows_at_bound']:,}",
        )
    _print_whole(matrices)
    for m in content:
        if m["saturated"] and m["worst_rows"]:
            rows = _table(f"Worst rows of {m['tensor']}", "row", "near", "RMS", "text")
            for row in m["worst_rows"]:
                shown = "" if row["text"] is None else repr(row["text"])
                rows.add_row(f"{row['id']}", _percent(row["near"]), f"{row['rms']:.4g}", shown)
            _print_whole(rows)
    print(
        "bound: 1/λ, or ≈ estimated from the rows that stand there; near: share of the components beyond "
        "0.8 of it;\nat bound: rows with more than a tenth of theirs there."
    )


def _table(title: str, first: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=title,
        title_justify="left",
        title_style="bold",
        min_width=len(title),  # or a longer title would be wrapped
    )
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural * (number != 1)}"


def _print_whole(table: Any) -> None:
    """Prints a table as wide as it is: what a terminal cannot hold is wrapped, never left out."""
    from rich.console import Console
    from rich.measure import Measurement

    wide = Console(width=1000)
    Console(width=Measurement.get(wide, wide.options, table).maximum).print(table)


def _percent(share: float | None) -> str:
    return "none" if share is None else "0" if share == 0 else f"{100 * share:.1f} %"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    command = f"{parser.prog} {args.command}"
    try:
        if args.command in ("reproduce", "train") and (jitter := natural_number(JITTER)):
            print(
                f"{command}: {JITTER} is {jitter}: initial weights are changed by a few units of rounding",
                file=sys.stderr,
            )
        code: int = args.run(args)
        return code
    except (ValueError, TypeError, OSError, FloatingPointError, Unavailable) as error:
        # What is wrong with the arguments, every process of torchrun finds out; the first one says it.
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, (ValueError, TypeError)):
            print(f"{command}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
