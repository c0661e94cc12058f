"""``minisign reproduce`` of one commit against that of another, in turns: time, and whether figures differ.

Both run under this Python and its packages, from a copy of their files, as a user would start them: with
nothing set but what the options say. What counts is the median ratio of neighbouring runs. Figures of two
commits can only be compared at the same number of threads, as sums depend on it.

    python benchmarks/main_job.py 2261659 HEAD [--rounds 3] [--steps 1500] [--busy] [--out FILE]
    python benchmarks/main_job.py 2261659 HEAD --rounds 1 --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from minisign.lab.files import prepare_out, write_json, write_whole
from minisign.studies.experiment import about

ROOT = Path(__file__).resolve().parent.parent
# What a user would not have set: these, and all that begins with MINISIGN_.
SET = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "ATEN_CPU_CAPABILITY", "PYTHONPATH")


def full_name(commit: str) -> str:
    """Its hash.

    Raises:
        argparse.ArgumentTypeError: there is no such commit.
    """
    command = ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        raise argparse.ArgumentTypeError(f"no commit is called {commit!r} {found.stderr.strip()}".strip())
    return found.stdout.strip()


def check_out(commit: str, folder: Path) -> None:
    """Puts the files of a commit into a folder."""
    packed = folder.with_suffix(".tar")
    subprocess.run(["git", "archive", "-o", packed, commit], cwd=ROOT, check=True)
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")


@contextmanager
def busy(cores: int) -> Iterator[None]:
    """So many processes that want a core each."""
    loop = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with this process
    loops = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(cores)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def run(folder: Path, steps: int, threads: int | None, out: Path) -> tuple[float, list[dict[str, Any]]]:
    """Seconds that the command takes, and what it found."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in SET and not name.startswith("MINISIGN_")
    }
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "minisign.cli", "reproduce", "--steps", str(steps), "--out", str(out)]
    start = time.perf_counter()
    # -m looks in the working directory first: it is the commit's own package that runs.
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    return seconds, json.loads((out / "results.json").read_text())["runs"]


def differing(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    """Of which variants a figure that both commits give is not the same, to the last bit."""
    return [
        a["variant"]
        for a, b in zip(old, new, strict=True)
        if any(a[name] != b[name] for name in (a.keys() & b.keys()) - {"seconds"})
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("old", type=full_name, metavar="OLD", help="the commit to compare with")
    parser.add_argument("new", type=full_name, metavar="NEW", help="the commit in question, such as HEAD")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1500, metavar="N", help="default: %(default)s")
    parser.add_argument("--busy", action="store_true", help="with a busy loop on each core")
    parser.add_argument("--threads", type=int, metavar="N", help="OMP_NUM_THREADS; default: not set")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write the JSON; default: nowhere"
    )
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {args.rounds}")
    if args.steps < 1:
        parser.error(f"--steps must be 1 or more, got {args.steps}")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be 1 or more, got {args.threads}")
    if args.out is not None:
        try:  # before an hour is spent
            prepare_out(args.out.parent)
            if args.out.is_dir():
                raise ValueError(f"cannot write to {args.out}: it is a folder, and has to be a file")
        except ValueError as error:
            parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # subprocess.run ends what it started
    cores = os.cpu_count() or 1
    commits = {"old": args.old, "new": args.new}
    seconds: dict[str, list[float]] = {which: [] for which in commits}
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name, busy(cores if args.busy else 0):
        folder = Path(name)
        for which, commit in commits.items():
            check_out(commit, folder / which)
        for turn in range(args.rounds):
            for which in commits:
                took, found[which] = run(folder / which, args.steps, args.threads, folder / f"{which}-out")
                seconds[which].append(round(took, 1))
                print(f"round {turn + 1}, {which}: {took:.0f} s", flush=True)
    ratios = np.array(seconds["new"]) / np.array(seconds["old"])
    print(f"new / old: median {np.median(ratios):.3f}, from {ratios.min():.3f} to {ratios.max():.3f}")
    unlike = differing(found["old"], found["new"])
    print(f"figures that differ: {', '.join(unlike) or 'none'}")
    if args.out is not None:
        result = {
            "date": date.today().isoformat(),
            "commits": commits,
            "rounds": args.rounds,
            "steps": args.steps,
            "busy": args.busy,
            "threads": args.threads,
            "cores": cores,
            "ratio": round(float(np.median(ratios)), 3),
            "seconds": seconds,
            "differ": unlike,
            "found": found,
            **about(threads=args.threads),
        }
        write_whole(args.out, lambda path: write_json(path, result))


if __name__ == "__main__":
    main()
