"""What the notebooks share: their first cell, and the checkers of their exercises, a module for each."""

from __future__ import annotations

import functools
import platform
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from minisign.lab.jitter import JITTER, natural_number

SEED = "MINISIGN_SEED"


def start() -> int:
    """The first cell of every notebook: prints versions, device and threads, returns the seed.

    The seed is 0, or that of the environment variable ``MINISIGN_SEED``, to see what depends on it. What
    depends on rounding alone is seen with ``MINISIGN_JITTER`` (:mod:`minisign.lab.jitter`).

    Raises:
        ValueError: a seed or a jitter that is no natural number.
    """
    seed, jitter = natural_number(SEED), natural_number(JITTER)
    threads = torch.get_num_threads()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, CPU, "
        f"{threads} thread{'s' * (threads > 1)}, seed {seed}" + f", jitter {jitter}" * (jitter > 0)
    )
    return seed


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


def own_part(kernel: str) -> str:
    """Of the text of a kernel (``Lion.kernel("cpu")``) the function that is the rule's own, without the
    numbers of the rule's lines: they are others as soon as somebody adds a line above."""
    start, end = ("  static void move", "\n};") if "struct Rule" in kernel else ("def move", "\n\n\n")
    text = kernel[kernel.index(start) :].partition(end)[0]
    text = re.sub(r"((?://|#) .*?) {2}# .*", r"\1", text)  # the rule's line may have a comment of its own
    return textwrap.dedent(re.sub(r"(//|#) \d+: ", r"\1 ", text)).rstrip()


def refusal(make: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The message of the error that ``make(*arguments, **options)`` ends with, without the names of files.

    Raises:
        AssertionError: it ends without one.
    """
    try:
        make(*arguments, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        return without_files(str(error))
    raise AssertionError("nothing was refused")


def without_files(message: str) -> str:
    """A message that names a line of a rule, without the file: that of a cell says nothing to a reader."""
    return re.sub(r" of [^`]*?\.py(?=[ ,])", "", message)


Check = TypeVar("Check", bound=Callable[..., Verdict])


class Unanswered(Exception):
    """An answer is missing; the message says how it looks."""


def ask(answer: Callable[..., Any], *arguments: Any) -> Any:
    """What an answer returns.

    Raises:
        Unanswered: nothing, or there is no function.
    """
    if not callable(answer):
        raise Unanswered(f"a function is expected, got {answer!r}")
    value = answer(*arguments)
    if value is None:
        raise Unanswered("the function returns nothing")
    return value


def numbers(given: Any, count: int = 1) -> tuple[float, ...]:
    """An answer of so many numbers, in whatever they come: a tuple, a list, an array; or, of one, a number.

    Raises:
        Unanswered: it is something else.
    """
    try:
        found = tuple(float(x) for x in (given if count > 1 else [given]) if not isinstance(x, str))
    except (TypeError, ValueError):
        found = ()
    if len(found) != count:
        expected = "a number is" if count == 1 else f"{count} numbers are"
        raise Unanswered(f"{expected} expected, got {given!r}")
    return found


def checker(check: Check) -> Check:
    """Makes a function that judges an answer say so if there is none yet: if the answer is a function that
    raises a bare ``NotImplementedError``, as the stubs do, or returns nothing where :func:`ask` asks it."""

    @functools.wraps(check)
    def judge(*answers: Any) -> Verdict:
        try:
            return check(*answers)
        except Unanswered as error:
            return Verdict(str(error))
        except NotImplementedError as error:
            if error.args:  # torch's own, say of an operation for another device
                raise
            return Verdict("the function is still empty")

    return cast(Check, judge)
