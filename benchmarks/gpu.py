"""Everything that only a CUDA card can tell, in one command and a few minutes.

    python -m benchmarks.gpu --minutes 8 --out DIR          or: make gpu

Five parts, each in a process of its own and with its own share of the time:

    kernels     tests/test_fused.py on the device: every rule and type, CUDA graphs, found_inf, two runs
    subnormal   what becomes of a silent momentum (notebook 04), on every road
    speed       the optimizers' steps at 350M and 124M weights, on small tensors and on an embedding's rows,
                against torch's AdamW, a torch.compile of Lion, and the published ones that can be imported
    blocks      how many entries a program of the kernels should have
    article     the embedding blow-up at the size of GPT-2: Tiger by its author's rule, and with lazy rows

It needs torch, NumPy, safetensors and tiktoken, and no network: what is not there of the rest is left out,
and named. Each part writes DIR/CARD/PART.json as it goes, so that a cut loses what is in hand and no more;
pictures are drawn at the end. `--parts speed,article` runs those alone; `--dry` runs all of them at toy
size on a CPU, as the tests do.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
import torch
from torch import nn

import minisign
from benchmarks import optimizer_step
from benchmarks.optimizer_step import RESULTS, Clock, CompiledLion, commit, slug
from minisign import theory
from minisign.lab.config import Config
from minisign.lab.corpus import CorpusConfig, generate
from minisign.lab.files import prepare_out, write_json, write_whole
from minisign.lab.tokenizer import Tokens, tokenize
from minisign.lab.train import Run, train, validation_loss
from minisign.probes import extremes
from minisign.studies.variants import variant_config

ROOT = Path(__file__).parents[1]
DONE, LEFT = "done", "left out"


class Task(NamedTuple):
    """What a part is told: when to end, whether at toy size on a CPU, and where its figures go."""

    deadline: float  # of time.monotonic
    dry: bool
    report: Callable[[dict[str, Any]], None]  # writes what has been found so far

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()


# --- kernels --------------------------------------------------------------------------------------


def kernels(task: Task) -> None:
    """The kernels' own tests on the device: how many passed, and what the others say."""
    if importlib.util.find_spec("pytest") is None:
        task.report({"left_out": "pytest is not installed"})
        return
    which = "same_step and interpreted and float32 and signum" if task.dry else "cuda or graph or gpu"
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_fused.py"]
        command += ["-k", which, f"--junit-xml={junit}"]
        if not task.dry and importlib.util.find_spec("xdist"):
            command += ["-p", "xdist.plugin", "-n", str(min(8, os.cpu_count() or 1))]
        environment = {
            **os.environ,
            "TRITON_INTERPRET": str(int(task.dry)),
            "PYTHONPATH": search_path(),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # others' warnings would be errors
        }
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if not junit.is_file():
            raise RuntimeError(f"pytest ended with {done.returncode} and without a report")
        cases = {str(case.get("name")): case for case in ET.parse(junit).iter("testcase")}
    failures = {
        name: bad.get("message", "")[:300]
        for name, case in cases.items()
        for bad in (*case.findall("failure"), *case.findall("error"))
    }
    task.report({"tests": len(cases), "passed": len(cases) - len(failures), "failures": failures})


# --- subnormal ------------------------------------------------------------------------------------

ROADS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "Tiger": lambda ps: minisign.Tiger(ps, lr=1e-3, scale=1.0),
    "Tiger (foreach)": lambda ps: minisign.Tiger(ps, lr=1e-3, scale=1.0, foreach=True),
    "Tiger (fused)": lambda ps: minisign.Tiger(ps, lr=1e-3, scale=1.0, fused=True),
    "Lion": minisign.Lion,
    "Lion (foreach)": lambda ps: minisign.Lion(ps, foreach=True),
    "Lion (fused)": lambda ps: minisign.Lion(ps, fused=True),
    "Lion by hand (torch.compile)": CompiledLion,
}


def subnormal(task: Task) -> None:
    """One gradient of one, and none after it: does the momentum end at zero, and if not, where?

    In multiples n of 2⁻¹⁴⁹, the smallest float32: β m rounds back to m from n = ½ / (1 − β) down, 14 under
    Tiger and 50 under Lion.
    """
    steps = 60 if task.dry else 12_000
    lines: list[dict[str, Any]] = []
    for name, make in ROADS.items():
        if task.dry and "compile" in name:
            continue
        lines.append({"name": name, "device": task.device, "steps": steps, **silent(make, task, steps)})
        print(lines[-1], flush=True)
        task.report({"results": lines})


def silent(make: Callable[[list[nn.Parameter]], Any], task: Task, steps: int) -> dict[str, Any]:
    """What ``steps`` steps leave of a momentum that had one gradient, and whether and when it was zero."""
    weight = nn.Parameter(torch.zeros(64, device=task.device))
    optimizer = make([weight])
    weight.grad = torch.ones_like(weight)
    found: dict[str, Any] = {"zero_at_step": None}
    for step in range(1, steps + 1):
        optimizer.step()
        weight.grad.zero_()
        momentum = optimizer.state[weight]["momentum"]
        if step % 100 == 0 and found["zero_at_step"] is None and not momentum.any():
            found["zero_at_step"] = step
    ends = sorted({float(m) / 2.0**-149 for m in momentum.cpu()})
    return {**found, "end_in_smallest": ends, "still_moves": bool(momentum.sign().ne(0).all())}


# --- speed ----------------------------------------------------------------------------------------


def speed(task: Task) -> None:
    """A step of every optimizer, one size after the other, the most telling first."""
    peers, missing = optimizer_step.published(task.device)
    rounds = 16 if task.dry else 40
    found: dict[str, Any] = {"rounds": rounds, "left_out": missing, "results": []}
    for size in ("tiny",) if task.dry else ("350m", "small", "lazy", "124m"):
        if task.left < 0:
            missing[size] = "no time was left"
            continue
        if size == "lazy":
            lines = optimizer_step.measure_lazy(rounds // 2, task.device)
        else:
            layouts = 4 if size == "small" else 1
            lines = optimizer_step.measure(size, rounds, layouts, task.device, True, peers)
        optimizer_step.show(lines)
        found["results"] += lines
        task.report(found)


# --- blocks ---------------------------------------------------------------------------------------


# Entries and warps of a program.
BLOCKS = ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (4096, 16), (8192, 8), (8192, 16))


def blocks(task: Task) -> None:
    """How many entries a program of the kernels should have, and how many warps: a step at 350M weights for
    each, as a share of the copy bandwidth of the same run."""
    if task.dry:
        task.report({"left_out": "the interpreter has blocks of its own"})
        return
    from minisign.kernels import words

    ps = optimizer_step.parameters(optimizer_step.SIZES["350m"], torch.float32, "cuda")
    clock = Clock("cuda")
    entries = sum(p.numel() for p in ps)
    copy = optimizer_step.copy_bandwidth(entries, "cuda", clock)
    found: dict[str, Any] = {"copy_bandwidth": copy, "chosen": [words.BLOCK, words.WARPS], "results": []}
    for name in ("Lion (fused)", "AdamW (fused)", "Tiger, base (fused, no guard)"):
        contestant = optimizer_step.CONTESTANTS[name]
        for size, warps in BLOCKS:
            words.BLOCK, words.WARPS = size, warps
            optimizer = contestant.make(ps)
            median = statistics.median([clock(optimizer.step)[0] for _ in range(15)][3:])
            share = contestant.bytes * entries / median / copy
            line = {"name": name, "block": size, "warps": warps, "milliseconds": 1e3 * median}
            found["results"].append({**line, "share_of_copy_bandwidth": share})
            print(found["results"][-1], flush=True)
            del optimizer
        task.report(found)


# --- article --------------------------------------------------------------------------------------


def word_vocabulary(text: str, size: int) -> tiktoken.Encoding:
    """A vocabulary of ``size`` tokens: the 256 bytes and the most frequent words. Counted, not learned, so
    that no rustbpe is needed."""
    pattern = r" ?\w+|[^\w\s]|\s+"
    words = Counter(word.encode() for word in re.findall(pattern, text))
    singles = [bytes([i]) for i in range(256)]
    longer = [word for word, _ in words.most_common() if len(word) > 1][: size - 256]
    ranks = {token: rank for rank, token in enumerate([*singles, *longer])}
    return tiktoken.Encoding("words", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def article(task: Task) -> None:
    """The embedding blow-up in a GPT-2 of 12 layers, and what lazy rows make of it.

    Both train for as many steps as the time allows, at a rate whose sum over the steps is 16: by the
    logistic law a row that nothing stops comes from 0.02 to 99 % of ±100 while Σα grows by 13.1, and ln 2
    later if its start is random.
    """
    size: dict[str, Any] = dict(vocab_size=32_768, context=512, layers=12, heads=12, width=768, batch=16)
    corpus, warmup = CorpusConfig(words=6_000_000, lexicon=6), 100
    if task.dry:
        size = dict(vocab_size=512, context=16, layers=1, heads=2, width=32, batch=8)
        corpus, warmup = CorpusConfig(words=60_000), 20
    config = Config(
        corpus=corpus,
        **size,
        embedding_std=0.02,
        weight_decay=0.01,
        fused=True,
        steps=120,
        warmup=warmup,
        decay=0.3,
    )
    text = generate(corpus)
    tokens = tokenize(text, word_vocabulary(text, config.vocab_size), config.context)
    steps = 200 if task.dry else steps_for(task, config, tokens)
    config = replace(config, steps=steps, lr=1.0)
    rate = 16 / sum(map(config.rate, range(steps)))
    config = replace(config, lr=rate)
    # The law of notebook 04: random signs pile up at the bound from κ = ηλτ = ½ on, and there η = α/λ.
    seldom = 2 * rate * steps
    found: dict[str, Any] = {
        "config": config.to_json(),
        "tokens": len(tokens.train),
        "tokens_that_occur": int((tokens.shares > 0).sum()),
        "rare": f"seen, but less than {seldom:.0f} times in {steps} steps",
        "runs": [],
    }
    for variant in ("tiger", "lazy"):
        found["runs"].append(blow_up(variant, config, tokens, task.device, seldom))
        task.report(found)
        hidden = ("series", "by_appearances")
        print({k: v for k, v in found["runs"][-1].items() if k not in hidden}, flush=True)


def steps_for(task: Task, config: Config, tokens: Tokens) -> int:
    """How many steps there is time for, in two runs; from the second half of a short third one."""
    start = time.monotonic()
    run = Run(config, tokens, task.device)
    made = time.monotonic() - start
    with torch.autocast(task.device, torch.bfloat16):
        train(run, lambda run: None, stop=lambda: 2 * run.step >= config.steps)
        half = run.seconds
        train(run, lambda run: None)
    each = (run.seconds - half) / (config.steps / 2)
    steps = int((task.left - 10 - 2 * made - 100 * each) / 2 / each)  # less what is measured at the end
    print(f"{made:.1f} s for a model, {1e3 * each:.1f} ms for a step: time for {steps} steps", flush=True)
    if steps < 200:
        raise RuntimeError(f"there is time for {steps} steps, and 200 are the least: give it more minutes")
    return steps


def blow_up(variant: str, config: Config, tokens: Tokens, device: str, seldom: float) -> dict[str, Any]:
    """One run and what it did to the embedding; tokens seen less than ``seldom`` times are called rare."""
    run = Run(variant_config(config, variant), tokens, device)
    weight, bound = run.model.embedding.weight, theory.bound(run.config.embedding_decay)
    start = max(map(abs, extremes(weight)))
    rates = [(config.lr or 0.0) * config.rate(step) for step in range(config.steps)]
    law = theory.logistic_growth(rates, run.config.embedding_decay, start)
    series: list[dict[str, float]] = []

    def look(run: Run) -> None:
        if run.step % 20 == 0 or run.step == config.steps:
            low, high = extremes(weight)
            now = {"step": run.step, "smallest": low, "largest": high, "logistic": float(law[run.step - 1])}
            series.append({**now, "loss": float(np.mean(run.losses[-20:]))})

    with torch.autocast(device, torch.bfloat16):
        train(run, look)
        loss = validation_loss(run)
    counts = tokens.counts(config.seed, config.steps, config.batch, config.context)
    rows = weight.detach().float().cpu().numpy() / bound
    rare = (counts > 0) & (counts < seldom)
    return {
        "variant": variant,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "steps": run.step,
        "seconds": run.seconds,
        "tokens_per_second": run.step * config.batch * config.context / run.seconds,
        "train_loss": run.train_loss,
        "val_loss": loss,
        "bound": bound,
        "embedding_max": series[-1]["largest"],
        "embedding_min": series[-1]["smallest"],
        "rare_tokens": int(rare.sum()),
        "rare_saturated": share_near(rows[rare]),
        "other_saturated": share_near(rows[counts >= seldom]),
        "unseen_saturated": share_near(rows[counts == 0]),
        "by_appearances": by_appearances(rows, counts),
        "series": series,
    }


def share_near(rows: np.ndarray) -> float | None:
    """Share of the components [n, D] beyond 0.8, in units of the bound; None of no rows."""
    return float((np.abs(rows) > 0.8).mean()) if rows.size else None


def by_appearances(rows: np.ndarray, counts: np.ndarray) -> list[dict[str, Any]]:
    """Rows [V, D] in units of the bound, by octaves of how often their tokens were seen [V]."""
    octave = np.floor(np.log2(np.maximum(counts, 0.5))).astype(int)
    return [
        {
            "seen": [0, 0] if j < 0 else [2 ** int(j), 2 ** int(j + 1) - 1],
            "tokens": int((octave == j).sum()),
            "rms": float(np.sqrt((rows[octave == j] ** 2).mean(axis=1)).mean()),
            "near": share_near(rows[octave == j]),
        }
        for j in np.unique(octave)
    ]


# --- all of them ----------------------------------------------------------------------------------

# By name: what it does, and its share of the time; of what a part leaves, the later ones have more.
PARTS: dict[str, tuple[Callable[[Task], None], float]] = {
    "kernels": (kernels, 0.2),
    "subnormal": (subnormal, 0.05),
    "speed": (speed, 0.3),
    "blocks": (blocks, 0.05),
    "article": (article, 0.45),
}


GRACE = 45.0  # seconds that a part may take beyond its share: to start, and to end what it is at


def search_path() -> str:
    """For child processes: this checkout before all else."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def about(dry: bool) -> dict[str, Any]:
    """Card, driver, versions and commit."""
    here: dict[str, Any] = {
        "card": optimizer_step.machine("cpu" if dry else "cuda", torch.get_num_threads()),
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for package in ("triton", "numpy"):
        if importlib.util.find_spec(package):
            here[package] = importlib.import_module(package).__version__
    if not dry:
        card = torch.cuda.get_device_properties(0)
        here |= {"capability": f"{card.major}.{card.minor}", "gigabytes": round(card.total_memory / 1e9, 1)}
        here |= {"multiprocessors": card.multi_processor_count, "cuda": torch.version.cuda}
        here["nominal_bandwidth"] = optimizer_step.nominal_bandwidth()
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
            here["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return here


def run_part(name: str, seconds: float, dry: bool, folder: Path) -> None:
    """One part, in this process."""
    start = time.monotonic()
    here = about(dry)

    def report(found: dict[str, Any], complete: bool = False) -> None:
        spent = round(time.monotonic() - start, 1)
        state = {"part": name, "dry": dry, **here, "complete": complete, "seconds": spent, **found}
        latest.update(found)
        write_whole(folder / f"{name}.json", lambda path: write_json(path, state))

    latest: dict[str, Any] = {}
    PARTS[name][0](Task(start + seconds, dry, report))
    report(latest, complete=True)


def start_part(name: str, seconds: float, limit: float, arguments: list[str]) -> str:
    """One part, in a process of its own; what became of it, in a few words."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--seconds", f"{seconds:.1f}"]
    command += arguments
    child = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": search_path()}, start_new_session=True
    )
    try:
        code = child.wait(limit)
    except subprocess.TimeoutExpired:
        return "cut, out of time"
    finally:
        if child.poll() is None:  # out of time, or Ctrl-C: with all that it has started
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return DONE if code == 0 else f"failed with {code}"


def read(path: Path) -> dict[str, Any]:
    """What a part has written; nothing if it has not."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def outcome_of(report: dict[str, Any]) -> str:
    """Of a part that went through: what it says of itself."""
    if report.get("failures"):
        return f"{len(report['failures'])} of {report['tests']} tests failed"
    left = report.get("left_out", ())  # a reason, if it is all; or what, by name
    return f"{LEFT}: {left if isinstance(left, str) else ', '.join(left)}" if left else DONE


def draw(folder: Path) -> None:
    """Pictures of the speed and of the article's run, from what lies in the folder."""
    from minisign import plots

    speed, article = (read(folder / f"{part}.json") for part in ("speed", "article"))
    if speed.get("results"):
        title = f"{speed['card']}, torch {speed['torch']}"
        optimizer_step.draw(speed["results"], title, folder / "speed.png")
    if runs := article.get("runs"):
        measured = {run["variant"]: curve(run, "largest", "smallest") for run in runs}
        law = {"theory: logistic growth": curve(runs[0], "logistic")}
        title = (
            f"Largest embedding entry, {runs[0]['parameters'] / 1e6:.0f}M parameters ({article['card']})"
        )
        plots.save(plots.growth(measured, law, title), folder / "article.png")


def curve(run: dict[str, Any], *names: str) -> tuple[list[float], list[float]]:
    """Steps, and the largest absolute value of some figures over the bound."""
    series = run["series"]
    return [x["step"] for x in series], [max(abs(x[n]) for n in names) / run["bound"] for x in series]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, metavar="N", help="for all of it (default: 8)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results of this copy"
    )
    parser.add_argument(
        "--parts",
        default=",".join(PARTS),
        metavar="A,B,…",
        help="which, in this order (default: %(default)s)",
    )
    parser.add_argument("--dry", action="store_true", help="at toy size, on a CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what a child is called with
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    chosen = args.parts.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    if not args.minutes > 0:
        parser.error(f"--minutes must be positive, got {args.minutes:g}")
    if not args.dry and not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        parser.error(
            f"no CUDA card is found by torch {torch.__version__}, which is built {built}; "
            "--dry runs at toy size on a CPU"
        )
    here = about(args.dry)
    folder = args.out.absolute() / slug(here["card"])
    try:
        prepare_out(folder)
    except ValueError as error:
        parser.error(str(error))
    own = ["--out", str(args.out.absolute()), *(["--dry"] if args.dry else [])]
    if args.part:
        run_part(args.part, args.seconds, args.dry, folder)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a part must not be left with the card
    end = time.monotonic() + 60 * args.minutes
    print(", ".join(f"{name} {value}" for name, value in here.items() if value), flush=True)
    outcomes = {}
    for i, name in enumerate(chosen):
        left = end - time.monotonic()
        seconds = left * PARTS[name][1] / sum(PARTS[later][1] for later in chosen[i:])
        print(f"\n=== {name}, {seconds:.0f} s ===", flush=True)
        outcomes[name] = start_part(name, seconds, min(seconds + GRACE, left), own)
        if outcomes[name] == DONE:
            outcomes[name] = outcome_of(read(folder / f"{name}.json"))
    if importlib.util.find_spec("matplotlib"):
        draw(folder)
    else:
        outcomes["pictures"] = f"{LEFT}: matplotlib is not installed"
    print(f"\n{folder}")
    for name, outcome in outcomes.items():
        print(f"  {name:10} {outcome}")
    return int(not all(outcomes[name].startswith((DONE, LEFT)) for name in chosen))


if __name__ == "__main__":
    sys.exit(main())
