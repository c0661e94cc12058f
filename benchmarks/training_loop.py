"""Training throughput of ``minisign.train`` against a plain loop written out by hand.

The plain loop has the same model, optimizer, batches and number of steps, and nothing else: no schedule,
no measuring, no callback. Both run in turns in one process. Exits with 1 if the ratio of their
throughputs is below 0.97.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from torch.nn import functional as F

from minisign.probes import extremes
from minisign.train import Config, Run, build_model, build_optimizer, load_tokens, train

BAR = 0.97


def plain(config: Config, tokens: object, steps: int) -> float:
    """Seconds of the loop that one would write without the package."""
    run_tokens = tokens
    model = build_model(config, run_tokens.vocab_size)  # type: ignore[attr-defined]
    optimizer = build_optimizer(config, model)
    start = time.perf_counter()
    for step in range(steps):
        window = run_tokens.batch(config.seed, step, config.batch, config.context)  # type: ignore[attr-defined]
        ids = torch.from_numpy(window)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def ours(config: Config, tokens: object) -> float:
    """Seconds of the package's loop, measuring the embedding every ten steps as the main job does."""
    run = Run(config, tokens)  # type: ignore[arg-type]
    train(run, lambda run: extremes(run.model.embedding.weight))
    return run.seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    failed = False
    for optimizer in ("tiger", "lion", "adamw"):
        config = Config(optimizer=optimizer, steps=args.steps)
        tokens = load_tokens(config)
        plain(config, tokens, 10)
        ratios = []
        for r in range(args.rounds):
            if r % 2:
                a, b = plain(config, tokens, args.steps), ours(config, tokens)
            else:
                b, a = ours(config, tokens), plain(config, tokens, args.steps)
            ratios.append(a / b)
        ratio = statistics.median(ratios)
        rate = args.steps * config.batch * config.context / b
        print(
            f"{optimizer:6} throughput of minisign.train / plain loop: {ratio:.3f} "
            f"(from {min(ratios):.3f} to {max(ratios):.3f}); {rate:,.0f} tokens/s"
        )
        failed |= ratio < BAR
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
