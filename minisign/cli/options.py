"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path


def text_and_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="train on this UTF-8 text (.gz too) instead of the generated one",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="auto|cpu|cuda",
        help="default: cpu; auto takes a GPU if there is one",
    )


def checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a safetensors or torch file, an index of shards (….index.json), or a folder with them",
    )
    parser.add_argument(
        "--tensor",
        nargs="+",
        default=(),
        metavar="NAME",
        help="which matrices; default: those that are embeddings or output layers by name and shape",
    )
    parser.add_argument(
        "--weight-decay",
        type=float,
        metavar="λ",
        help="that the model was trained with; default: that of a run made here, else the bound is "
        "estimated from the rows that stand there",
    )
