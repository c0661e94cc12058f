"""The command line: a file for each command, with its arguments and its messages, nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from minisign.cli import corpus, inspect, kernel, probe, repair, reproduce, train
from minisign.kernels.table import Unavailable
from minisign.lab.files import one_line
from minisign.lab.jitter import JITTER, natural_number

# Each has HELP and DESCRIPTION, `arguments`, which says what options there are, and `run`, which returns
# the exit code.
COMMANDS = (reproduce, train, probe, inspect, repair, corpus, kernel)

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
  minisign corpus --words 1000 --out sample.txt  the generated text
  minisign kernel lion --for cuda --lazy         the Triton kernel that is made of Lion's rule"""


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
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        own = commands.add_parser(name, help=command.HELP, description=command.DESCRIPTION)
        command.arguments(own)
        own.set_defaults(run=command.run)
    return parser


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
