"""What the probes of gradients, updates and curvature cost, and the guard, on the model of notebook 09.

``GradientWatch`` and ``UpdateWatch`` at every twentieth step: steps with and without them take turns every
twenty steps in one process, and the median ratio counts; the bar is 1.05. The Hessian probe of all tensors:
the bar is 20 seconds. What ``EmbeddingWatch`` does in a hundred steps, and in the look at the last of them,
against a hundred steps of the same model under Lion: the bar is 1 %, which is less than two runs differ by,
so that its own time is taken. Exits with 1 if one is missed. ``SpikeGuard``, which looks at every step, has
no bar.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

import torch

from minisign import EmbeddingWatch
from minisign.doctor.guard import SpikeGuard
from minisign.lab.build import load_tokens
from minisign.lab.train import Run, next_token_loss, train
from minisign.probes import GradientWatch, UpdateWatch, block_curvatures, ratios, take_turns, tensor_blocks
from minisign.studies.experiment import read_log
from minisign.studies.search import best_rate, search_base, search_config, start_batches

WATCH_BAR, HESSIAN_BAR, EMBEDDING_BAR, EVERY = 1.05, 20.0, 0.01, 20


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, default=60, help="of twenty steps each (default: 60)")
    args = parser.parse_args()
    base = search_base()
    tokens = load_tokens(base)
    config = search_config(base, "AdamW", best_rate(read_log("learning_rates"), "AdamW"))
    runs = {name: Run(config, tokens) for name in ("plain", "GradientWatch", "UpdateWatch", "SpikeGuard")}
    for watch in (GradientWatch, UpdateWatch):
        watched = runs[watch.__name__]
        watch(watched.model, watched.optimizer, every=EVERY)
    guarded = runs["SpikeGuard"]
    guard = SpikeGuard(guarded.model, guarded.optimizer)

    def turn(run: Run) -> None:
        end = run.step + EVERY
        if end > run.config.steps:  # begin again; only the time counts
            run.step, end = 0, EVERY
        check = guard.check if run is guarded else lambda loss: True
        train(run, every=EVERY, stop=lambda: run.step >= end, may_step=check)

    took = take_turns({name: lambda run=run: turn(run) for name, run in runs.items()}, args.turns)
    cost = ratios(took, to="plain", skip=8)  # the guard looks at ratios from its hundredth step on
    for name in ("GradientWatch", "UpdateWatch"):
        print(
            f"a training step with {name} at every {EVERY}th / without: {cost[name]:.3f} (bar {WATCH_BAR})"
        )
    print(f"with SpikeGuard at every step / without: {cost['SpikeGuard']:.3f}")

    lion = Run(dataclasses.replace(search_config(base, "Lion", 1e-3), steps=10**6), tokens)
    watch = EmbeddingWatch(lion.model, lion.optimizer)
    watch.remove()  # its hook is called by hand

    def steps() -> None:
        end = lion.step + watch.every
        train(lion, every=EVERY, stop=lambda: lion.step >= end)

    def watched() -> None:
        for _ in range(watch.every):
            watch._after_step()

    took = take_turns({"steps": steps, "watch": watched}, 10)
    share = float(ratios(took, to="steps", skip=1)["watch"])
    print(f"EmbeddingWatch, of a training step: {share:.2%} (bar {EMBEDDING_BAR:.0%})")

    model, [batch, *_] = runs["plain"].model, start_batches(base, tokens)
    products = []

    def hessian() -> None:
        found = block_curvatures(lambda: next_token_loss(model, batch), tensor_blocks(model))
        products.append(sum(curvature.products for curvature in found.values()))

    seconds = float(take_turns({"hessian": hessian}, 3)["hessian"].max())
    print(
        f"curvature of {len(tensor_blocks(model))} tensors, {torch.get_num_threads()} threads: "
        f"{seconds:.1f} s at most in three (bar {HESSIAN_BAR:.0f} s), {products[0]} products"
    )
    watches = max(cost["GradientWatch"], cost["UpdateWatch"])
    return int(watches > WATCH_BAR or seconds > HESSIAN_BAR or share > EMBEDDING_BAR)


if __name__ == "__main__":
    sys.exit(main())
