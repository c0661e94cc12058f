"""What the probes of gradients and curvature cost, on the model of notebook 09.

``GradientWatch`` at every twentieth step: steps with and without it take turns every twenty steps in one
process, and the median ratio counts; the bar is 1.05. The Hessian probe of all tensors: the bar is 20
seconds. Exits with 1 if either is missed.
"""

from __future__ import annotations

import argparse
import sys

import torch

from minisign.experiment import read_log
from minisign.probes import GradientWatch, block_curvatures, ratios, take_turns, tensor_blocks
from minisign.search import best_rate, search_base, search_config, start_batches
from minisign.train import Run, load_tokens, next_token_loss, train

WATCH_BAR, HESSIAN_BAR, EVERY = 1.05, 20.0, 20


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, default=60, help="of twenty steps each (default: 60)")
    args = parser.parse_args()
    base = search_base()
    tokens = load_tokens(base)
    config = search_config(base, "AdamW", best_rate(read_log("learning_rates"), "AdamW"))
    runs = {"plain": Run(config, tokens), "watched": Run(config, tokens)}
    GradientWatch(runs["watched"].model, runs["watched"].optimizer, every=EVERY)

    def turn(run: Run) -> None:
        end = run.step + EVERY
        if end > run.config.steps:  # begin again; only the time counts
            run.step, end = 0, EVERY
        train(run, every=EVERY, stop=lambda: run.step >= end)

    took = take_turns({name: lambda run=run: turn(run) for name, run in runs.items()}, args.turns)
    ratio = ratios(took, to="plain", skip=2)["watched"]
    print(f"a training step, watched every {EVERY}th / not: {ratio:.3f} (bar {WATCH_BAR})")

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
    return int(ratio > WATCH_BAR or seconds > HESSIAN_BAR)


if __name__ == "__main__":
    sys.exit(main())
