"""Which of several things is faster, on a machine whose speed drifts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import numpy as np


def take_turns(actions: Mapping[str, Callable[[], object]], turns: int) -> dict[str, np.ndarray]:
    """Seconds that each action takes in each turn [turns], by name.

    In every turn each action runs once, in random order, so that neighbours can be compared: what counts is
    the median over the turns of the ratio of two actions. Python's global random generator is left alone.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    order, shuffle = list(actions), random.Random(0).shuffle
    for _ in range(turns):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            actions[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def ratios(seconds: Mapping[str, np.ndarray], to: str, skip: int = 1) -> dict[str, float]:
    """Median over the turns of each action's time over that of ``to`` in the same turn, by name.

    Args:
        seconds: from :func:`take_turns`.
        skip: so many turns at the start do not count, in which state is made and caches are filled.
    """
    base = seconds[to][skip:]
    return {name: float(np.median(taken[skip:] / base)) for name, taken in seconds.items()}
