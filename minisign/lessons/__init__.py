"""What the notebooks share: their first cell, and the checkers of their exercises, a module for each."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

SEED = "MINISIGN_SEED"


def start() -> int:
    """The first cell of every notebook: prints versions, device and threads, returns the seed.

    The seed is 0, or that of the environment variable ``MINISIGN_SEED``, to see what depends on it.

    Raises:
        ValueError: a seed that is no natural number.
    """
    given = os.environ.get(SEED, "0")
    if not given.isdecimal():
        raise ValueError(f"{SEED} must be a natural number, got {given!r}")
    threads = torch.get_num_threads()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, CPU, "
        f"{threads} thread{'s' * (threads > 1)}, seed {given}"
    )
    return int(given)


@dataclass(frozen=True)
class Verdict:
    """What a checker says of an answer: true if it is right, and shown as a sentence.

    Args:
        fault: what is wrong with the answer; empty if nothing is.
    """

    fault: str = ""

    def __bool__(self) -> bool:
        return not self.fault

    def __repr__(self) -> str:
        return f"Not yet: {self.fault}." if self.fault else "Right."


RIGHT = Verdict()
