"""How long one optimizer step takes, against published implementations and ``torch.optim``.

    make bench                                                     or
    python benchmarks/optimizer_step.py --sizes 10m,small --rounds 80

Contestants step on tensors of the same shapes in one process, interleaved in random order, in fresh
memory several times over; what counts is the median of the ratios within a round, since the speed of a
machine drifts. Beside it stand P10 and P90; the bytes that a step must move over the time it took, as a
share of the copy bandwidth of the same run, and on a GPU of what its clock and bus allow; the time that
Python takes (the same step on tensors of one entry); and the most memory that the step needs beyond
parameters and gradients, in bytes for each entry. `lazy` times steps on an embedding after a forward and a
backward pass over 500 tokens, among the others and alone.

Results go to benchmarks/results/ as JSON and as a picture, one pair for each machine. Exits with 1 if a
fused Lion or Tiger (base form) is slower than the fastest published Lion.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import minisign
from minisign.probes import PeakMemory, state_bytes
from minisign.studies.experiment import about

RESULTS = Path(__file__).parent / "results"
F32, BF16 = torch.float32, torch.bfloat16
YARDSTICK = "torch AdamW (fused)"


def gpt2(layers: int, width: int) -> list[tuple[int, ...]]:
    """The shapes of a GPT-2."""
    block: list[tuple[int, ...]] = [
        *((width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)),
        *((width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)),
    ]
    return [(50257, width), (1024, width), *block * layers, (width,), (width,)]


SIZES: dict[str, list[tuple[int, ...]]] = {
    "tiny": [(8, 4)] * 3,
    "10m": [(1056, 128)] * 74,
    "small": [(1000,)] * 200,
    "124m": gpt2(12, 768),
    "350m": gpt2(24, 1024),
    "774m": gpt2(36, 1280),
}
TITLES = {
    "tiny": "3 matrices of 32 weights, to see that all runs",
    "10m": "10M weights in 74 matrices",
    "small": "200 tensors of 1,000 weights",
    "124m": "GPT-2, 124M weights",
    "350m": "GPT-2, 350M weights",
    "774m": "GPT-2, 774M weights",
    "lazy": "embedding of 50,000 × 768, 500 rows looked up",
}
LAZY = (50_000, 768, 500)  # rows, columns, rows looked up
DECAY: dict[str, Any] = {"weight_decay": 0.1}


class Contestant(NamedTuple):
    make: Callable[[list[nn.Parameter]], Any]
    bytes: int = 0  # that one entry must move, at least
    dtype: torch.dtype = F32


def ours(cls: Any, bytes: int, dtype: torch.dtype = F32, **options: Any) -> Contestant:
    return Contestant(lambda ps: cls(ps, **DECAY, **options), bytes, dtype)


def base(**options: Any) -> dict[str, Any]:
    return {"scale": 1.0, **options}


class CompiledLion:
    """Lion as one writes it by hand, a tensor at a time, through ``torch.compile``."""

    def __init__(self, ps: list[nn.Parameter], lr: float = 1e-4, weight_decay: float = 0.1) -> None:
        self.ps, self.state = ps, {p: {"momentum": torch.zeros_like(p)} for p in ps}
        self.data = [p.detach() for p in ps]  # of an nn.Parameter each new shape would be compiled anew
        self.lr, self.weight_decay = lr, weight_decay
        self.update = torch.compile(self._update, dynamic=True, fullgraph=True)

    @staticmethod
    def _update(p: Tensor, g: Tensor, m: Tensor, lr: float, weight_decay: float) -> None:
        p.mul_(1 - lr * weight_decay).sub_(lr * m.lerp(g, 0.1).sign_())
        m.lerp_(g, 0.01)

    @torch.no_grad()
    def step(self) -> None:
        for p, data in zip(self.ps, self.data, strict=True):
            self.update(data, p.grad, self.state[p]["momentum"], self.lr, self.weight_decay)


# Published implementations, by name: the package, the device it is for (None: any), and how it is made.
PEERS: dict[str, tuple[str, str | None, Callable[[Any, list[nn.Parameter]], Any]]] = {
    "torch-optimi Lion": ("optimi", None, lambda m, ps: m.Lion(ps, lr=1e-4, **DECAY)),
    "torch-optimi Lion (loop)": (
        *("optimi", None),
        lambda m, ps: m.Lion(ps, lr=1e-4, foreach=False, **DECAY),
    ),
    "torch-optimi Lion (Triton)": (
        *("optimi", "cuda"),
        lambda m, ps: m.Lion(ps, lr=1e-4, triton=True, **DECAY),
    ),
    "lion-pytorch Lion": ("lion_pytorch", None, lambda m, ps: m.Lion(ps, **DECAY)),
    "lion-pytorch Lion (Triton)": (
        *("lion_pytorch", "cuda"),
        lambda m, ps: m.Lion(ps, use_triton=True, **DECAY),
    ),
    "pytorch-optimizer Lion": ("pytorch_optimizer", None, lambda m, ps: m.Lion(ps, **DECAY)),
    "bitsandbytes Lion": ("bitsandbytes", "cuda", lambda m, ps: m.optim.Lion(ps, **DECAY)),
    "bitsandbytes Lion, 8 bits": ("bitsandbytes", "cuda", lambda m, ps: m.optim.Lion8bit(ps, **DECAY)),
    "bitsandbytes AdamW, 8 bits": ("bitsandbytes", "cuda", lambda m, ps: m.optim.AdamW8bit(ps, **DECAY)),
}


def published(device: str) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The peers that make a step on ``device`` here, and of the others by name what was in the way."""
    found, missing = {}, {}
    for name, (package, only, make) in PEERS.items():
        if only not in (None, device):
            continue
        try:
            module = importlib.import_module(package)
            make(module, parameters([(64,)], F32, device)).step()
        except Exception as error:  # somebody else's code: whatever it raises is told, in the table
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            found[name] = Contestant(lambda ps, make=make, module=module: make(module, ps))
    return found, missing


CONTESTANTS = {
    YARDSTICK: Contestant(lambda ps: torch.optim.AdamW(ps, fused=True, **DECAY), 28),
    "torch AdamW (foreach)": Contestant(lambda ps: torch.optim.AdamW(ps, foreach=True, **DECAY)),
    "Lion": ours(minisign.Lion, 0),
    "Lion (foreach)": ours(minisign.Lion, 0, foreach=True),
    "Tiger, base": ours(minisign.Tiger, 0, **base()),
    "Tiger, RMS": ours(minisign.Tiger, 0),
    "AdamW": ours(minisign.AdamW, 0),
    "Signum (fused)": ours(minisign.Signum, 20, fused=True),
    "Lion (fused)": ours(minisign.Lion, 20, fused=True),
    "Tiger, base (fused)": ours(minisign.Tiger, 20, **base(fused=True)),
    "Tiger, base (fused, no guard)": ours(minisign.Tiger, 20, **base(fused=True, shrink=None)),
    "Tiger, RMS (fused)": ours(minisign.Tiger, 20, fused=True),
    "AdamW (fused)": ours(minisign.AdamW, 28, fused=True),
}
COMPILED = {"Lion by hand (torch.compile, each tensor)": Contestant(CompiledLion)}
# Our fused ones with their state in bfloat16, and with everything in bfloat16.
FUSED: dict[str, tuple[Any, int, dict[str, Any]]] = {  # by name: class, buffers, options
    "Signum (fused)": (minisign.Signum, 1, {}),
    "Lion (fused)": (minisign.Lion, 1, {}),
    "Tiger, base (fused)": (minisign.Tiger, 1, base()),
    "Tiger, RMS (fused)": (minisign.Tiger, 1, {}),
    "AdamW (fused)": (minisign.AdamW, 2, {}),
}
HALF = {
    **{
        f"{name}, state bf16": ours(cls, 12 + 4 * n, fused=True, state_dtype=BF16, **options)
        for name, (cls, n, options) in FUSED.items()
    },
    "torch AdamW (fused), all bf16": Contestant(
        lambda ps: torch.optim.AdamW(ps, fused=True, **DECAY), 14, BF16
    ),
    **{
        f"{name}, all bf16": ours(cls, 6 + 4 * n, BF16, fused=True, **options)
        for name, (cls, n, options) in FUSED.items()
    },
    "Lion (fused), all bf16, rounded at random": ours(
        minisign.Lion, 10, BF16, fused=True, stochastic_rounding=True
    ),
}
# What is aimed at: (size, contestant): (against whom, at most), by kind of device.
BARS: dict[str, dict[tuple[str, str], tuple[str, float]]] = {
    "cpu": {
        **{("10m", name): (YARDSTICK, 0.72) for name in ("Lion (fused)", "Signum (fused)")},
        ("10m", "Tiger, base (fused)"): (YARDSTICK, 0.78),
        ("10m", "Tiger, RMS (fused)"): (YARDSTICK, 0.90),
        ("10m", "AdamW (fused)"): (YARDSTICK, 0.80),
        ("small", "Lion (fused)"): (YARDSTICK, 0.40),
        ("small", "AdamW (fused)"): (YARDSTICK, 0.55),
        ("lazy", "Lion (fused), lazy ids"): ("Lion (fused), dense", 0.03),
        ("lazy", "Lion (fused), sparse"): ("Lion (fused), dense", 0.03),
        ("lazy", "Lion (fused), lazy grad"): ("Lion (fused), dense", 0.40),
    },
    "cuda": {
        **{
            (size, name): (YARDSTICK, bar)
            for size in ("350m", "774m")
            for name, bar in (
                ("Lion (fused)", 0.75),
                ("Tiger, base (fused)", 0.75),
                ("Lion (fused), state bf16", 0.62),
                ("AdamW (fused)", 1.02),
            )
        },
        **{
            (size, "Lion (fused), all bf16"): ("torch AdamW (fused), all bf16", 0.76)
            for size in ("350m", "774m")
        },
        **{("small", name): (YARDSTICK, 0.60) for name in ("Lion (fused)", "Tiger, base (fused)")},
        **{
            ("lazy", name): ("Lion (fused), dense", 0.03)
            for name in ("Lion (fused), lazy ids", "Lion (fused), sparse")
        },
    },
}


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """Tensors of these shapes, each with a gradient."""
    torch.manual_seed(0)
    ps = [nn.Parameter(torch.randn(shape, device=device).mul_(0.02).to(dtype)) for shape in shapes]
    for p in ps:
        p.grad = torch.randn_like(p)
    return ps


class Clock:
    """Seconds that an action takes, and until Python goes on.

    On a GPU Python runs ahead of the device in a training: a large matrix product gives it a lead of about
    a millisecond, and what counts is the time on the device, or Python's where that is longer.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            self.lead = torch.randn(8192, 8192, device=device, dtype=BF16)
            self.room = torch.empty_like(self.lead)

    def __call__(self, action: Callable[[], Any]) -> tuple[float, float]:
        if self.cuda:
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.mm(self.lead, self.lead, out=self.room)
            begin.record()
        start = time.perf_counter()
        action()
        host = time.perf_counter() - start
        if not self.cuda:
            return host, host
        end.record()
        torch.cuda.synchronize()
        return max(begin.elapsed_time(end) / 1e3, host), host


def interleaved(
    actions: dict[str, Callable[[], Any]], rounds: int, clock: Clock, before: dict[str, Any] | None = None
) -> dict[str, list[tuple[float, float]]]:
    """Each action in each round, in random order, after what must come before and is not timed."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    order = list(actions)
    for r in range(2 + rounds):
        random.shuffle(order)
        for name in order:
            if before:
                before[name]()
            taken = clock(actions[name])
            if r >= 2:  # the first two make the state and warm up
                seconds[name].append(taken)
    return seconds


def ratio(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    return statistics.median(x[0] / y[0] for x, y in zip(a, b, strict=True))


def copy_bandwidth(entries: int, device: str, clock: Clock) -> float:
    """Bytes read and written per second in copying this many float32, the best of ten."""
    x = torch.randn(entries, device=device)
    y = torch.empty_like(x)
    return 8 * entries / min(clock(lambda: y.copy_(x))[0] for _ in range(10))


def nominal_bandwidth() -> float | None:
    """Bytes per second between a card and its memory, by its clock and the width of its bus; None where
    this version of torch does not tell."""
    card = torch.cuda.get_device_properties(0)
    clock, width = (getattr(card, name, None) for name in ("memory_clock_rate", "memory_bus_width"))
    return 2e3 * clock * width / 8 if clock and width else None  # kHz, both edges; bits


def measure(
    size: str,
    rounds: int,
    layouts: int,
    device: str,
    half: bool,
    peers: dict[str, Contestant],
) -> list[dict[str, Any]]:
    """One line for each contestant."""
    shapes, clock = SIZES[size], Clock(device)
    entries = sum(math.prod(s) for s in shapes)
    compiled = COMPILED if device == "cuda" else {}  # on a CPU it takes a minute to compile
    chosen = {**CONTESTANTS, **peers, **compiled, **(HALF if half else {})}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    # Where tensors happen to lie in memory moves a contestant by a few percent: draw lots anew, often.
    for _ in range(layouts):
        names = list(chosen)
        random.shuffle(names)
        shared: dict[torch.dtype, list[nn.Parameter]] = {}
        optimizers = {}
        for name in names:
            dtype = chosen[name].dtype
            if entries > 50_000_000:  # one set for all, or memory would not do
                ps = shared[dtype] = shared.get(dtype) or parameters(shapes, dtype, device)
            else:
                ps = parameters(shapes, dtype, device)
            optimizers[name] = chosen[name].make(ps)
        taken = interleaved({name: o.step for name, o in optimizers.items()}, rounds // layouts, clock)
        for name, values in taken.items():
            seconds[name] += values
        del optimizers, shared, ps
        gc.collect()
    bandwidth = copy_bandwidth(max(entries, 1 << 24), device, clock)
    nominal = nominal_bandwidth() if device == "cuda" else None
    lines = []
    for name, values in seconds.items():
        low, median, high = percentiles(values)
        must = chosen[name].bytes * entries / median
        lines.append(
            {
                "size": size,
                "name": name,
                "milliseconds": 1e3 * median,
                "milliseconds_p10": 1e3 * low,
                "milliseconds_p90": 1e3 * high,
                "ratio_to_fused_adamw": ratio(values, seconds[YARDSTICK]),
                "share_of_copy_bandwidth": must / bandwidth if must else None,
                "share_of_nominal_bandwidth": must / nominal if must and nominal else None,
                "host_milliseconds": 1e3 * host_time(chosen[name], len(shapes), device),
                "bytes_beyond_gradients": memory_beyond(chosen[name], shapes, device) / entries,
            }
        )
    return with_bars(lines, seconds, device)


def percentiles(values: list[tuple[float, float]]) -> tuple[float, float, float]:
    """P10, P50 and P90 of the time on the device."""
    tenths = statistics.quantiles((v[0] for v in values), n=10, method="inclusive")
    return tenths[0], tenths[4], tenths[8]


def with_bars(lines: list[dict[str, Any]], seconds: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """The lines, with what is aimed at and what was found where there is an aim."""
    for line in lines:
        if bar := BARS[device].get((line["size"], line["name"])):
            against, most = bar
            found = ratio(seconds[line["name"]], seconds[against])
            line["bar"] = {"against": against, "at_most": most, "found": found}
    return lines


def host_time(contestant: Contestant, tensors: int, device: str) -> float:
    """What Python takes for a step on so many tensors, seconds."""
    optimizer = contestant.make(parameters([(1,)] * tensors, contestant.dtype, device))
    clock = Clock(device)
    return statistics.median(clock(optimizer.step)[1] for _ in range(25))


def memory_beyond(contestant: Contestant, shapes: list[tuple[int, ...]], device: str) -> float:
    """Bytes alive at once in a step, at most, beyond parameters and gradients."""
    ps = parameters(shapes, contestant.dtype, device)
    optimizer = contestant.make(ps)
    own = sum(2 * p.numel() * p.element_size() for p in ps)
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
        others = torch.cuda.memory_allocated() - own - state_bytes(optimizer)
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        return float(torch.cuda.max_memory_allocated() - others - own)
    with PeakMemory(nn.ParameterList(ps), optimizer) as memory:
        optimizer.step()
    return memory.peak - own


def measure_lazy(rounds: int, device: str) -> list[dict[str, Any]]:
    """Steps on an embedding of which few rows were looked up; the passes before them are not timed."""
    rows, width, looked_up = LAZY
    makers: dict[str, tuple[bool, Callable[[Any], Any]]] = {
        YARDSTICK: (False, lambda ps: torch.optim.AdamW(ps, fused=True, **DECAY)),
        "torch SparseAdam": (True, torch.optim.SparseAdam),
        "Lion (fused), dense": (False, lambda ps: minisign.Lion(ps, fused=True, **DECAY)),
        "Lion (fused), lazy ids": (False, lambda ps: minisign.Lion(ps, fused=True, lazy="ids", **DECAY)),
        "Lion (fused), sparse": (True, lambda ps: minisign.Lion(ps, fused=True, **DECAY)),
        "Lion (fused), lazy grad": (False, lambda ps: minisign.Lion(ps, fused=True, lazy="grad", **DECAY)),
        "Lion, lazy ids": (False, lambda ps: minisign.Lion(ps, lazy="ids", **DECAY)),
    }
    actions, before, alone = {}, {}, {}
    for name, (sparse, make) in makers.items():
        embedding = nn.Embedding(rows, width, sparse=sparse, device=device)
        if "ids" in name:
            minisign.track_rows(embedding)
        optimizer = make(list(embedding.parameters()))

        def pass_over(embedding: Any = embedding, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            ids = torch.randint(rows, (looked_up,), device=device)
            (embedding(ids) * torch.randn(looked_up, width, device=device)).sum().backward()

        actions[name], before[name] = optimizer.step, pass_over
    clock = Clock(device)
    seconds = interleaved(actions, rounds, clock, before)
    for name in actions:  # again without the others between, which push everything out of the caches
        alone[name] = interleaved({name: actions[name]}, rounds, clock, before)[name]
    lines = []
    dense = "Lion (fused), dense"
    for name, values in seconds.items():
        low, median, high = percentiles(values)
        lines.append(
            {
                "size": "lazy",
                "name": name,
                "milliseconds": 1e3 * median,
                "milliseconds_p10": 1e3 * low,
                "milliseconds_p90": 1e3 * high,
                "ratio_to_fused_adamw": ratio(values, seconds[YARDSTICK]),
                "ratio_to_dense": ratio(values, seconds[dense]),
                "ratio_to_dense_alone": ratio(alone[name], alone[dense]),
            }
        )
    return with_bars(lines, seconds, device)


def show(lines: list[dict[str, Any]]) -> None:
    unsaid = {c for c in lines[0] if all(line[c] is None for line in lines)}
    columns = [c for c in lines[0] if c not in {"size", "name", "bar", *unsaid}]
    titles = {
        "milliseconds": "ms",
        "milliseconds_p10": "P10",
        "milliseconds_p90": "P90",
        "ratio_to_fused_adamw": "/ AdamW",
        "share_of_copy_bandwidth": "/ copy",
        "share_of_nominal_bandwidth": "/ nominal",
        "host_milliseconds": "host ms",
        "bytes_beyond_gradients": "bytes",
        "ratio_to_dense": "/ dense",
        "ratio_to_dense_alone": "alone",
    }
    print(f"\n{TITLES[lines[0]['size']]:48}" + "".join(f"{titles[c]:>11}" for c in columns) + "  aim")
    for line in lines:
        figures = ("" if line[c] is None else f"{line[c]:.3f}" for c in columns)
        aim = line.get("bar")
        held = (
            ""
            if aim is None
            else f"  ≤ {aim['at_most']:g}: {'held' if aim['found'] <= aim['at_most'] else 'missed'}"
        )
        print(f"{line['name']:48}" + "".join(f"{x:>11}" for x in figures) + held)


def draw(lines: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes = list(dict.fromkeys(line["size"] for line in lines))
    counts = [sum(line["size"] == s for line in lines) for s in sizes]
    figure, axes = plt.subplots(
        len(sizes), 1, figsize=(9, 0.25 * sum(counts) + len(sizes)), height_ratios=counts, squeeze=False
    )
    for ax, size in zip(axes[:, 0], sizes, strict=True):
        chosen = sorted((x for x in lines if x["size"] == size), key=lambda x: -x["ratio_to_fused_adamw"])
        colors = [
            "#d95f02" if "(fused" in x["name"] and "torch" not in x["name"] else "#9aa0a6" for x in chosen
        ]
        values = [x["ratio_to_fused_adamw"] for x in chosen]
        bars = ax.barh([x["name"] for x in chosen], values, color=colors)
        labels = [f"{v:.2f}" if v >= 0.1 else f"{v:.3f}" for v in values]
        # White behind, so that no number is crossed out by the line at 1.
        ax.bar_label(bars, labels, padding=2, fontsize=8, bbox={"facecolor": "white", "pad": 1, "lw": 0})
        ax.axvline(1, color="black", linewidth=0.8, zorder=0)
        ax.margins(y=0.01)
        ax.set_xlim(0, 1.12 * max(values))
        ax.set_title(TITLES[size], loc="left", fontsize=10)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("time of a step over that of torch.optim.AdamW(fused=True)")
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.savefig(path, dpi=110)


def slug(name: str) -> str:
    """What a machine's files are called."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).replace("--", "-")


def machine(device: str, threads: int) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = about()["machine"]["processor"]
    return f"{model}, {threads} thread" + ("s" if threads > 1 else "")


def commit() -> str:
    """What $MINISIGN_COMMIT says, for a copy of the files, or the commit that is checked out."""
    given = os.environ.get("MINISIGN_COMMIT", "")
    if given or not shutil.which("git"):
        return given or "unknown"
    command = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cuda = torch.cuda.is_available()
    default = "124m,350m,small,lazy" if cuda else "10m,small,lazy"
    parser.add_argument(
        "--sizes", default=default, help=f"of {', '.join([*SIZES, 'lazy'])} (default: {default})"
    )
    parser.add_argument("--rounds", type=int, default=80, help="steps of each that count (default: 80)")
    parser.add_argument(
        "--layouts", type=int, default=8, help="times that memory is made anew (default: 8)"
    )
    parser.add_argument("--threads", type=int, default=1, help="on a CPU (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--half", action="store_true", help="bfloat16 as well; always on a GPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder (default: {RESULTS.name})")
    args = parser.parse_args()
    sizes = args.sizes.split(",")
    if unknown := [s for s in sizes if s not in (*SIZES, "lazy")]:
        parser.error(f"unknown size {unknown[0]!r}: choose from {', '.join([*SIZES, 'lazy'])}")
    torch.set_num_threads(args.threads)
    name = machine(args.device, args.threads)
    print(f"{name}, torch {torch.__version__}; medians over {args.rounds} steps, ratios to {YARDSTICK}")
    peers, missing = published(args.device)
    for peer, why in missing.items():
        print(f"left out: {peer}, {why}")
    lines: list[dict[str, Any]] = []
    for size in sizes:
        if size == "lazy":
            found = measure_lazy(max(args.rounds // 4, 5), args.device)
        else:
            layouts = 1 if sum(map(math.prod, SIZES[size])) > 50_000_000 else args.layouts
            half = args.half or args.device == "cuda"
            found = measure(size, args.rounds, layouts, args.device, half, peers)
        show(found)
        lines += found
    args.out.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": name,
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": "python benchmarks/optimizer_step.py " + " ".join(sys.argv[1:]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rounds": args.rounds,
        "left_out": missing,
        "results": lines,
    }
    (args.out / f"{slug(name)}.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(lines, f"{name}, torch {torch.__version__}", args.out / f"{slug(name)}.png")
    print(f"\nwritten to {args.out / slug(name)}.json and .png")
    ms = {(x["size"], x["name"]): x["milliseconds"] for x in lines}
    alike = [peer for peer in peers if "bits" not in peer]  # with the same state
    return int(
        any(
            ms[size, fused] > min(ms[size, peer] for peer in alike)
            for size in sizes
            if size != "lazy" and alike
            for fused in ("Lion (fused)", "Tiger, base (fused)")
        )
    )


if __name__ == "__main__":
    sys.exit(main())
