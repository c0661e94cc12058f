"""How long one optimizer step takes, against published implementations and ``torch.optim``.

    make bench                                      or
    python benchmarks/optimizer_step.py --rounds 80

All optimizers step on tensors of the same shapes (10M parameters in 74 matrices by default), on one
thread, in one process, interleaved in random order, in fresh memory eight times over. What counts is
the median of the ratios within a round, since the speed of the machine drifts. Exits with 1 if our
Lion or Tiger (base form) is slower than the fastest published Lion.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lion_pytorch
import optimi
import pytorch_optimizer
import torch
from torch import nn

import minisign

PEERS = ("torch-optimi Lion", "torch-optimi Lion (loop)", "lion-pytorch Lion", "pytorch-optimizer Lion")
LAYOUTS = 8
OURS = ("minisign Lion", "minisign Tiger (base)")


def parameters(count: int, tensors: int) -> list[nn.Parameter]:
    """``tensors`` matrices with ``count`` entries in all, each with a gradient."""
    generator = torch.Generator().manual_seed(0)
    columns = 128
    rows = max(1, round(count / tensors / columns))
    ps = [nn.Parameter(0.02 * torch.randn(rows, columns, generator=generator)) for _ in range(tensors)]
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator)
    return ps


def contestants(weight_decay: float) -> dict[str, Callable[[list[nn.Parameter]], Any]]:
    decay: dict[str, Any] = {"weight_decay": weight_decay}
    return {
        "torch AdamW (fused)": lambda ps: torch.optim.AdamW(ps, fused=True, **decay),
        "torch AdamW": lambda ps: torch.optim.AdamW(ps, **decay),
        "torch-optimi Lion": lambda ps: optimi.Lion(ps, lr=1e-4, **decay),
        "torch-optimi Lion (loop)": lambda ps: optimi.Lion(ps, lr=1e-4, foreach=False, **decay),
        "lion-pytorch Lion": lambda ps: lion_pytorch.Lion(ps, **decay),
        "pytorch-optimizer Lion": lambda ps: pytorch_optimizer.Lion(ps, **decay),
        "minisign Lion": lambda ps: minisign.Lion(ps, **decay),
        "minisign Tiger (base)": lambda ps: minisign.Tiger(ps, scale=1.0, **decay),
        "minisign Signum": lambda ps: minisign.Signum(ps, **decay),
        "minisign Tiger (rms)": lambda ps: minisign.Tiger(ps, **decay),
        "minisign AdamW": lambda ps: minisign.AdamW(ps, **decay),
    }


def measure(count: int, tensors: int, weight_decay: float, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, by contestant."""
    makers = contestants(weight_decay)
    order = list(makers)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    # Where tensors happen to lie in memory moves a contestant by a few percent: draw lots anew, often.
    for _ in range(LAYOUTS):
        random.shuffle(order)
        optimizers = {name: makers[name](parameters(count, tensors)) for name in order}
        for r in range(2 + rounds // LAYOUTS):
            random.shuffle(order)
            for name in order:
                start = time.perf_counter()
                optimizers[name].step()
                if r >= 2:  # the first two make the state and warm up
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--tensors", type=int, default=74)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "parameters": args.parameters,
        "tensors": args.tensors,
        "rounds": args.rounds,
        "threads": args.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "results": [],
    }
    slower = False
    for weight_decay in (0.0, 0.1):
        seconds = measure(args.parameters, args.tensors, weight_decay, args.rounds)
        fastest = min(PEERS, key=lambda name: statistics.median(seconds[name]))
        print(f"\nweight decay {weight_decay}; the fastest published Lion is {fastest}")
        print(f"{'':26}{'ms':>8}{'/ AdamW (fused)':>17}{'/ fastest Lion':>16}")
        for name, times in seconds.items():
            to_adamw, to_fastest = (
                ratio(times, seconds["torch AdamW (fused)"]),
                ratio(times, seconds[fastest]),
            )
            milliseconds = 1e3 * statistics.median(times)
            print(f"{name:26}{milliseconds:8.2f}{to_adamw:17.2f}{to_fastest:16.2f}")
            report["results"].append(
                {
                    "weight_decay": weight_decay,
                    "name": name,
                    "milliseconds": milliseconds,
                    "ratio_to_fused_adamw": to_adamw,
                    "ratio_to_fastest_lion": to_fastest,
                }
            )
            slower |= name in OURS and to_fastest > 1.0
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
