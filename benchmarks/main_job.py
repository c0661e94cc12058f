"""``minisign reproduce`` of one commit against that of another, in turns: how much of its time it takes.

Each commit is checked out beside the repository's folder for temporary files, and both run under this Python
and its packages. The commands run as a user would start them, with nothing set. With ``--busy`` a process counts
for ever on each core in the meantime. What counts is the median of the ratios of neighbouring runs.

    python benchmarks/main_job.py 2261659 HEAD --rounds 3 [--busy] [--steps 300]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from minisign.experiment import about
from minisign.files import write_json, write_whole

ROOT = Path(__file__).resolve().parent.parent
SET = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONPATH")  # what a user would not have set


@contextmanager
def checked_out(commit: str) -> Iterator[tuple[str, Path]]:
    """The full name of a commit, and a folder with its files."""
    name = git("rev-parse", "--verify", f"{commit}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        git("worktree", "add", "--detach", folder, name)
        try:
            yield name, Path(folder)
        finally:
            git("worktree", "remove", "--force", folder)


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def busy(cores: int) -> Iterator[None]:
    """So many processes that want a core each."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def run(folder: Path, steps: int, out: Path) -> tuple[float, list[dict[str, Any]]]:
    """Seconds that the command takes, and what it found."""
    environment = {name: value for name, value in os.environ.items() if name not in SET}
    command = [sys.executable, "-m", "minisign", "reproduce", "--steps", str(steps), "--out", str(out)]
    start = time.perf_counter()
    # -m looks in the working directory first: the commit's own package is run.
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    return seconds, json.loads((out / "results.json").read_text())["runs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", help="another")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1500, metavar="N", help="default: %(default)s")
    parser.add_argument("--busy", action="store_true", help="with a busy loop on each core")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write the JSON; default: nowhere"
    )
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {args.rounds}")
    cores = len(os.sched_getaffinity(0))
    seconds: dict[str, list[float]] = {"old": [], "new": []}
    found: dict[str, list[dict[str, Any]]] = {}
    with (
        checked_out(args.old) as (old, old_folder),
        checked_out(args.new) as (new, new_folder),
        tempfile.TemporaryDirectory() as out,
        busy(cores if args.busy else 0),
    ):
        for turn in range(args.rounds):
            for which, folder in (("old", old_folder), ("new", new_folder)):
                took, found[which] = run(folder, args.steps, Path(out) / which)
                seconds[which].append(round(took, 1))
                print(f"round {turn + 1}, {which}: {took:.0f} s", flush=True)
    ratios = np.array(seconds["new"]) / np.array(seconds["old"])
    print(f"new / old: {np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})")
    result = {
        "command": f"python benchmarks/main_job.py {args.old} {args.new} --rounds {args.rounds} "
        f"--steps {args.steps}{' --busy' * args.busy}",
        "old": old,
        "new": new,
        "cores": cores,
        "busy": args.busy,
        "steps": args.steps,
        "seconds": seconds,
        "ratio": round(float(np.median(ratios)), 3),
        "results": found,
        **about(),
    }
    if args.out is not None:
        write_whole(args.out, lambda path: write_json(path, result))


if __name__ == "__main__":
    main()
