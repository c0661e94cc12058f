"""``minisign inspect``: whether rows of a checkpoint's embeddings stand at the bound."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minisign.cli import options, show

HELP = "whether rows of a checkpoint's embeddings stand at the bound ±1/λ"
DESCRIPTION = (
    "Reads the embedding-like matrices of a checkpoint, whoever trained it, and says of each whether rows "
    "stand at a bound. Prints a verdict and a table, leaves inspect.json and inspect.png in --out. Exit "
    "code: 0 healthy, 1 saturated, 2 error. Nothing is changed."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    options.checkpoint(parser)
    parser.add_argument(
        "--tokenizer",
        metavar="NAME|FILE",
        help="to show the tokens' text: a tiktoken encoding or file, or tokenizer.json; default: "
        "tokenizer.json of the checkpoint's folder, or a run's own vocabulary",
    )
    parser.add_argument(
        "--rows", type=int, default=10, metavar="N", help="worst rows to show (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/inspect"), metavar="DIR", help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    from minisign.doctor.inspection import as_json, inspect_checkpoint, token_texts_of, write_inspection
    from minisign.lab.files import prepare_out

    if args.rows < 0:
        raise ValueError(f"--rows must be 0 or more, got {args.rows}")
    text = token_texts_of(args.checkpoint, args.tokenizer)
    prepare_out(args.out)
    found = [m for _, m in inspect_checkpoint(args.checkpoint, args.tensor, args.weight_decay)]
    content = [as_json(m, args.rows, text) for m in found]
    files = write_inspection(args.out, found, content, str(args.checkpoint))
    _print_tables(content)
    print(f"\n{' and '.join(file.name for file in files)} are in {args.out}")
    return int(any(m.saturated for m in found))


def _print_tables(content: Sequence[dict[str, Any]]) -> None:
    for m in content:
        print(m["verdict"])
        if m["note"]:
            print(f"note: {m['note']}")
    print()
    matrices = show.table(
        "Matrices", "tensor", "rows", "columns", "type", "smallest", "largest", "bound", "near", "at bound"
    )
    for m in content:
        bound = "" if m["bound"] is None else f"{'' if m['bound_is'] == '1/λ' else '≈ '}{m['bound']:.4g}"
        matrices.add_row(
            m["tensor"],
            *(f"{n:,}" for n in m["shape"]),
            m["dtype"],
            f"{m['smallest']:.4g}",
            f"{m['largest']:.4g}",
            bound,
            show.percent(m["near"]) if bound else "",
            f"{m['rows_at_bound']:,}",
        )
    show.print_whole(matrices)
    for m in content:
        if m["saturated"] and m["worst_rows"]:
            rows = show.table(f"Worst rows of {m['tensor']}", "row", "near", "RMS", "text")
            for row in m["worst_rows"]:
                shown = "" if row["text"] is None else repr(row["text"])
                rows.add_row(f"{row['id']}", show.percent(row["near"]), f"{row['rms']:.4g}", shown)
            show.print_whole(rows)
    print(
        "bound: 1/λ, or ≈ estimated from the rows that stand there; near: share of the components beyond "
        "0.8 of it;\nat bound: rows with more than a tenth of theirs there."
    )
