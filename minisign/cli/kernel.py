"""``minisign kernel``: the kernel that ``fused=True`` makes of an optimizer's rule."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
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
        "rule",
        metavar="RULE",
        help=f"{', '.join(RULES)}, or FILE.py:CLASS or MODULE:CLASS of an optimizer of your own",
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
    from minisign.kernels.trace import Untraceable

    try:
        print(_optimizer(args.rule).kernel(args.device, getattr(torch, args.dtype), **given), end="")
    except Untraceable as error:
        raise ValueError(f"{args.rule}: {error}") from None
    return 0


def _optimizer(name: str) -> Any:
    import minisign
    from minisign.engine.optimizer import Optimizer

    where, _, cls = name.rpartition(":")
    if name.lower() in RULES:
        return getattr(minisign, {"sgd": "SGD", "adamw": "AdamW"}.get(name.lower(), name.capitalize()))
    if not where or not cls:
        raise ValueError(
            f"unknown rule {name!r}: choose from {', '.join(RULES)}, or give FILE.py:CLASS or MODULE:CLASS"
        )
    try:
        module = _module(where)
    except Exception as error:  # whatever the user's file does; the message has where
        raise ValueError(f"{where} cannot be loaded: {_said(error)}") from None
    if not hasattr(module, cls):
        raise ValueError(f"{where} has no {cls}")
    found = getattr(module, cls)
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"{name} is no optimizer that minisign.optimizer(…) makes: {found!r}")
    return found


def _module(where: str) -> ModuleType:
    """A file, or a module that can be imported from the folder at hand."""
    if not where.endswith(".py"):
        sys.path.insert(0, "")  # as `python -m` does
        return importlib.import_module(where)
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _said(error: Exception) -> str:
    """What an exception says, and the last line of which file it is about."""
    frames = traceback.extract_tb(error.__traceback__)
    place = (
        ""
        if isinstance(error, (SyntaxError, ImportError, OSError))
        else f", line {frames[-1].lineno} of {frames[-1].filename}"
    )
    return f"{type(error).__name__}: {error}{place}"
