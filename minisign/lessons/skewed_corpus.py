"""Checkers of notebook 02."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from minisign import theory
from minisign.lessons import RIGHT, Verdict, ask, checker


@checker
def check_gap(answer: Callable[[float, int], float]) -> Verdict:
    """``answer(share, draws)`` → mean number of steps from one batch with a token to the next."""
    for share, draws in ((0.1, 10), (1e-5, 256), (0.5, 256)):
        given = ask(answer, share, draws)
        expected = float(theory.mean_gap(share, draws))
        if not np.isclose(given, expected, rtol=1e-3):
            return Verdict(
                f"a token that is {share:g} of the text is in one of {expected:.4g} batches of {draws} "
                f"tokens, the answer is {given:.4g}"
            )
    return RIGHT


@checker
def check_never(answer: Callable[[np.ndarray, int], float]) -> Verdict:
    """``answer(shares, draws)`` → expected number of tokens that do not turn up."""
    for shares, draws in (
        (np.array([0.5, 0.5]), 1),
        (np.array([0.9, 0.09, 0.01]), 50),
        (1 / np.arange(1, 1001) / (1 / np.arange(1, 1001)).sum(), 3000),
    ):
        given = ask(answer, shares, draws)
        expected = float(((1 - shares) ** draws).sum())
        if not np.isclose(given, expected, rtol=2e-2):
            return Verdict(
                f"of {len(shares)} tokens {expected:.4g} are expected to stay away from {draws} draws, "
                f"the answer is {given:.4g}"
            )
    return RIGHT


@checker
def check_packing(
    pack: Callable[[Sequence[int]], bytes], unpack: Callable[[bytes], Sequence[int]]
) -> Verdict:
    """Token ids to bytes and back, for any vocabulary that is in use, in four bytes a token at most."""
    for largest in (255, 50_256, 65_536, 119_546, 262_143):
        ids = [0, 1, largest // 2, largest]
        try:
            data = ask(pack, ids)
            back = [int(i) for i in ask(unpack, data)]
        except (OverflowError, ValueError) as error:
            return Verdict(f"with a vocabulary of {largest + 1} tokens: {error}")
        if back != ids:
            return Verdict(f"with a vocabulary of {largest + 1} tokens, {ids} come back as {back}")
        if len(data) > 4 * len(ids):
            return Verdict(f"{len(ids)} tokens take {len(data)} bytes, more than four each")
    return RIGHT
