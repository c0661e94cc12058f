"""``minisign repair``: a copy of a checkpoint whose rows are of one size again."""

from __future__ import annotations

import argparse
from pathlib import Path

from minisign.cli import options, show

HELP = "a copy of a checkpoint with such rows scaled down"
DESCRIPTION = (
    "Writes a copy of a checkpoint in which the rows that stand at a bound have the median size "
    "of the others, and their pattern of signs; every other byte is as it was."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    options.checkpoint(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="NEW",
        help="file or folder to write, like CHECKPOINT; never overwritten",
    )


def run(args: argparse.Namespace) -> int:
    from minisign.doctor.inspection import inspect_checkpoint
    from minisign.doctor.repair import repair
    from minisign.lab.checkpoint import FOLDER

    found = inspect_checkpoint(args.checkpoint, args.tensor, args.weight_decay)
    bad = [(stored, m) for stored, m in found if m.saturated]
    if not bad:
        print(f"healthy: no rows stand at a bound in {args.checkpoint}; nothing was written")
        return 0
    repair(args.checkpoint, args.out, bad)
    for _, m in bad:
        print(f"{m.name}: {show.count(int(m.rows.sum()), 'row')} scaled to an RMS of {m.typical:.3g}")
    print(f"repaired copy in {args.out}")
    if (args.out / FOLDER).is_dir():
        print("its checkpoints are as they were: --resume goes on from the rows of before")
    return 0
