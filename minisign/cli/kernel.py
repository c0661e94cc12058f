"""``minisign kernel``: the kernel that ``fused=True`` makes of an optimizer's rule."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "show the kernel that is made of an optimizer's rule"
DESCRIPTION = (
    "Prints the C++ or the Triton that fused=True compiles of a rule, with the line that each statement "
    "comes from. What it includes or imports is in minisign/kernels: step.h, words.py. Neither a compiler "
    "nor Triton nor a GPU is needed to see it."
)
RULES = ("sgd", "signum", "lion", "tiger", "adamw")
TYPES = ("float32", "bfloat16", "float16")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "rule", metavar="RULE", help=f"{', '.join(RULES)}, or MODULE:CLASS of an optimizer of your own"
    )
    parser.add_argument("--for", dest="device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--lazy", action="store_true", help="row by row: gradients of embeddings")
    parser.add_argument(
        "--dtype", choices=TYPES, default="float32", help="of the weights; default: float32"
    )
    parser.add_argument("--stochastic-rounding", action="store_true", help="bfloat16 weights at random")
    parser.add_argument(
        "--weight-decay", type=float, metavar="λ", help="default: the optimizer's; 0 leaves the decay out"
    )


def run(args: argparse.Namespace) -> int:
    import torch

    given: dict[str, Any] = {"lazy": "grad"} if args.lazy else {}
    if args.lazy and args.rule == "tiger":
        given["scale"] = "row_rms"  # as its author has it for embeddings
    if args.stochastic_rounding:
        given["stochastic_rounding"] = True
    if args.weight_decay is not None:
        given["weight_decay"] = args.weight_decay
    print(_optimizer(args.rule).kernel(args.device, getattr(torch, args.dtype), **given), end="")
    return 0


def _optimizer(name: str) -> Any:
    import importlib
    import sys

    import minisign
    from minisign.engine.optimizer import Optimizer

    module, _, cls = name.partition(":")
    if name in RULES:
        return getattr(minisign, {"sgd": "SGD", "adamw": "AdamW"}.get(name, name.capitalize()))
    if not cls:
        raise ValueError(f"unknown rule {name!r}: choose from {', '.join(RULES)}, or give MODULE:CLASS")
    sys.path.insert(0, "")  # as `python -m` does: modules in the folder at hand
    try:
        found = getattr(importlib.import_module(module), cls, None)
    except ImportError as error:
        raise ValueError(f"{name}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(
            f"{name} is no optimizer of minisign, which minisign.optimizer(…) makes: {found!r}"
        )
    return found
