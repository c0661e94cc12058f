"""What commands show: progress bars, tables, numbers in words."""

from __future__ import annotations

import sys
from typing import Any


def bar(name: str, total: int, done: int = 0, is_shown: bool = True) -> Any:
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


def advance(bar: Any, step: int, **shown: str) -> None:
    bar.set_postfix(shown, refresh=False)
    bar.update(step - bar.n)


def table(title: str, first: str, *columns: str) -> Any:
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


def count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural * (number != 1)}"


def print_whole(table: Any) -> None:
    """Prints a table as wide as it is: what a terminal cannot hold is wrapped, never left out."""
    from rich.console import Console
    from rich.measure import Measurement

    wide = Console(width=1000)
    Console(width=Measurement.get(wide, wide.options, table).maximum).print(table)


def percent(share: float | None) -> str:
    return "none" if share is None else "0" if share == 0 else f"{100 * share:.1f} %"
