"""Being another processor on purpose: ``MINISIGN_JITTER=n`` moves initial weights by units of rounding.

A processor with wider vectors adds in another order and so rounds otherwise, by a unit in the last place at
each sum. A sign makes a whole step of it wherever a momentum is near zero, and two processors soon train
different models: as different as two runs whose starts were rounded differently. Such runs are what the
jitter makes, for as many n as one likes, on one machine. Nobody could call them other experiments, and
every claim about a trained figure has to survive them (``make robust``).
"""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from torch import Tensor, nn

JITTER = "MINISIGN_JITTER"
UNITS = 4  # of rounding at most

Start = TypeVar("Start", bound=Tensor | nn.Module)


def natural_number(variable: str) -> int:
    """The natural number in an environment variable, a seed; 0 if it is not set.

    Raises:
        ValueError: anything else, or 2³² and more.
    """
    given = os.environ.get(variable, "0")
    if not given.isdecimal() or len(given) > 10 or int(given) >= 2**32:
        raise ValueError(f"{variable} must be a natural number below 2³², got {given!r}")
    return int(given)


def jittered(start: Start) -> Start:
    """What a training starts from, a model or a tensor, with each number multiplied, in place, by 1 + k·ε:
    k at random from −4 to 4, from n = ``MINISIGN_JITTER``, and ε the distance from 1 to the next number of
    its type. Nothing changes if n is 0 or not set. Leaves torch's global generator alone.

    Raises:
        ValueError: n is no natural number.
    """
    if n := natural_number(JITTER):
        generator = torch.Generator().manual_seed(n)
        with torch.no_grad():
            for x in [start] if isinstance(start, Tensor) else start.parameters():
                units = torch.randint(-UNITS, UNITS + 1, x.shape, generator=generator)
                x.mul_(1 + units.to(x) * torch.finfo(x.dtype).eps)
    return start
