"""``minisign probe``: measures a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from minisign.cli import show

HELP = "measure a trained model: gradient norms by block, curvature, saturation, head"
DESCRIPTION = (
    "Measures a model that was trained here, or a GPT-2 or RoBERTa checkpoint (config.json and "
    "safetensors), on a text. Prints a table, leaves probe.json and probe.png in --out. Nothing is "
    "trained, changed or downloaded."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR|FILE",
        help="a folder with config.json and model.safetensors (or shards), or a safetensors file with "
        "config.json beside it",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="what to measure it on, UTF-8 (.gz too); a model trained here has a text of its own",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR|FILE",
        help="tokenizer.json, or a folder with it or with vocab.json and merges.txt; default: the model's",
    )
    parser.add_argument(
        "--blocks",
        default="layers",
        metavar="layers|tensors",
        help="what to compare: whole layers, or every tensor (default: %(default)s)",
    )
    parser.add_argument(
        "--curvature",
        type=int,
        default=0,
        metavar="N",
        help="also the top Hessian eigenvalue of each block, and Λ, by at most N products each; a product "
        "takes about two backward passes (default: none)",
    )
    parser.add_argument(
        "--weight-decay",
        type=float,
        metavar="λ",
        help="that the model was trained with, for the bound 1/λ; default: that of a run made here, else "
        "unknown, and the largest entry takes the bound's place",
    )
    for option, default, what in (
        ("--batches", 4, "batches"),
        ("--batch", 8, "windows in a batch"),
        ("--length", None, "tokens in a window; default: 128, or the model's context if that is shorter"),
        ("--seed", 0, "of the masks, for RoBERTa"),
    ):
        shown = what if default is None else f"{what} (default: {default})"
        parser.add_argument(option, type=int, default=default, metavar="N", help=shown)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/probe"), metavar="DIR", help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    from minisign.doctor.examine import examine, write_examination
    from minisign.doctor.pretrained import examples, load_subject
    from minisign.lab.files import prepare_out
    from minisign.lab.tokenizer import read_text

    subject = load_subject(args.model, args.tokenizer)
    prepare_out(args.out)
    if args.text:
        ids = subject.encode(read_text(args.text))
    elif subject.own_text is not None:
        ids = subject.own_text.tolist()
    else:
        raise ValueError(f"{args.model} brings no text: give one with --text")
    length = min(128, subject.context) if args.length is None else args.length
    batches = examples(subject, ids, args.batches, args.batch, length, args.seed)
    decay = subject.weight_decay if args.weight_decay is None else args.weight_decay
    found = examine(subject, batches, ids, args.blocks, args.curvature, decay)
    files = write_examination(args.out, found, subject, f"{args.model}: {subject.name}")
    _print_tables(found)
    print(f"\n{' and '.join(file.name for file in files)} are in {args.out}")
    return 0


def _print_tables(found: dict[str, Any]) -> None:
    unequal = found["heterogeneity"]
    print(
        f"{found['model']}, {found['parameters']:,} parameters; loss {found['loss']:.3f} nats over "
        f"{found['predicted']:,} tokens ({show.count(found['windows'], 'window')} in "
        f"{show.count(found['batches'], 'batch', 'es')})\n"
    )
    curved = unequal["lambda_g"] is not None
    blocks = show.table("Gradient by block", "block", "entries", "‖g‖", "per entry", "one batch")
    if curved:
        for name in ("‖H‖", "residual"):
            blocks.add_column(name, justify="right", no_wrap=True)
    first, *others = [name.split(".") for name in unequal["blocks"]]
    depth = 0  # of what all names begin with
    while others and all(name[depth : depth + 1] == first[depth : depth + 1] for name in others):
        depth += 1
    for name, block in unequal["blocks"].items():
        bend = block["curvature"]
        more = []
        if bend:
            more = [f"{bend['norm']:.3g}{'' if bend['converged'] else ' …'}", f"{bend['residual']:.2f}"]
        low, high = (f"{f(block['norm_by_batch']):.3g}" for f in (min, max))
        per_entry = block["norm"] / block["parameters"] ** 0.5
        blocks.add_row(
            ".".join(name.split(".")[depth:]),
            f"{block['parameters']:,}",
            f"{block['norm']:.3g}",
            f"{per_entry:.2g}",
            low if low == high else f"{low}–{high}",
            *more,
        )
    show.print_whole(blocks)
    of = {
        name: "infinite" if value is None else f"{value:.3g}"
        for name, value in unequal["disparity"].items()
    }
    print(
        f"‖g‖ of the blocks: largest over smallest {of['max over min']} "
        f"(per entry {of['max over min per entry']}), Gini {of['gini']} (per entry {of['gini per entry']})"
    )
    if curved:
        means = f"Λ_G {unequal['lambda_g']:.3g}, by entries Λ_P {unequal['lambda_p']:.3g}"
        print(f"mean ‖H‖ by squared gradient {means}")
        if not all(block["curvature"]["converged"] for block in unequal["blocks"].values()):
            print("… not converged: ‖H‖, and Λ, are too small; give --curvature more products")
    if still := sum(block["norm"] == 0 for block in unequal["blocks"].values()):
        print(f"{show.count(still, 'block')} without gradient: not used by the loss")
    print()
    matrices = show.table(
        "Embedding and head", "matrix", "smallest", "largest", "bound", "near", "rows", "‖W‖", "common"
    )
    for name, m in found["matrices"].items():
        matrices.add_row(
            name,
            f"{m['smallest']:.4g}",
            f"{m['largest']:.4g}",
            f"{m['bound']:.4g}",
            show.percent(m["near"]),
            f"{m['rows']:,}",
            f"{m['norm']:.4g}",
            f"{m['common_mode']:.2f}",
        )
    show.print_whole(matrices)
    losses = ["none" if v is None else f"{v:.2f}" for v in found["loss_by_frequency"].values()]
    print(f"loss by tenths of the text: {', '.join(losses)}")
    print(
        "\n‖g‖: gradient norm over all batches; per entry: over √entries; one batch: lowest and highest.\n"
        + ("‖H‖: size of the block's top Hessian eigenvalue; residual: how far from converged.\n" * curved)
        + f"bound: {m['bound_is']}; near: share of the components beyond 0.8 of it; rows: with more than a "
        "tenth of theirs there.\n"
        "common: how much of the rows is the same in all, 0 to 1. Tenths: the most frequent tokens first."
    )
