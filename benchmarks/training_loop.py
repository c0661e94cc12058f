"""Training throughput of ``minisign.lab.train`` against a plain loop written out by hand.

The plain loop has the same model, optimizer and batches, and nothing else: no schedule, no measuring, no
callback. Both run in one process and take turns every twenty steps, since the speed of the machine
drifts; what counts is the median ratio of neighbouring turns. Exits with 1 if it is below 0.97.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from minisign.lab.build import build_model, build_optimizer, load_tokens
from minisign.lab.config import Config
from minisign.lab.tokenizer import Tokens
from minisign.lab.train import Run, train
from minisign.probes import extremes, ratios, take_turns

BAR, TURN = 0.97, 20


def plain(config: Config, tokens: Tokens) -> Iterator[None]:
    """The loop that one would write without the package, turn by turn."""
    model = build_model(config, tokens.vocab_size)
    optimizer = build_optimizer(config, model)
    for turn in range(config.steps // TURN):
        for step in range(turn * TURN, (turn + 1) * TURN):
            ids = torch.from_numpy(tokens.batch(config.seed, step, config.batch, config.context))
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        yield


def ours(config: Config, tokens: Tokens) -> Iterator[None]:
    """The package's loop turn by turn, measuring the embedding as the main job does."""
    run = Run(config, tokens)
    for turn in range(config.steps // TURN):
        end = (turn + 1) * TURN
        train(run, lambda run: extremes(run.model.embedding.weight), stop=lambda end=end: run.step >= end)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    failed = False
    for optimizer in ("tiger", "lion", "adamw"):
        config = Config(optimizer=optimizer, steps=args.steps)
        tokens = load_tokens(config)
        loops = {"ours": ours(config, tokens), "plain": plain(config, tokens)}
        took = take_turns({name: partial(next, loop) for name, loop in loops.items()}, config.steps // TURN)
        # The first turn makes the optimizer's state.
        ratio = ratios(took, to="ours")["plain"]
        rate = TURN * config.batch * config.context / float(np.median(took["ours"][1:]))
        print(
            f"{optimizer:6} throughput, minisign.lab.train / plain loop: {ratio:.3f}; {rate:,.0f} tokens/s"
        )
        failed |= ratio < BAR
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
