"""What each process of a test does; started by torchrun with the name of a file of jobs (see
test_parallel.py)."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from minisign import EmbeddingWatch
from minisign.lab.build import load_tokens
from minisign.lab.config import Config
from minisign.lab.parallel import World, joined
from minisign.lab.train import Run, train


def poison(run: Run, step: int, first: int) -> None:
    """Makes a gradient NaN at a step, from the window ``first`` of this process's part on: in a matrix the
    last row alone, and everything before that layer."""

    def fill(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[first:, :, -1] = torch.nan
        return gradient

    def after_forward(module: Any, args: Any, output: torch.Tensor) -> None:
        if run.step == step and output.requires_grad:
            output.register_hook(fill)

    run.model.blocks[0].mlp.up.register_forward_hook(after_forward)


def work(job: dict[str, Any], world: World) -> None:
    world = dataclasses.replace(world, engine=job["engine"])
    out = Path(job["out"])
    if "resume" in job:
        run = Run.resume(Path(job["resume"]), steps=job["steps"], world=world)
    else:
        config = Config.from_json(job["config"])
        run = Run(config, load_tokens(config), world=world)
    watch = EmbeddingWatch(run.model, run.optimizer, every=4, folder=out) if job.get("watched") else None
    if job.get("nan_step") is not None and world.rank == 1:
        poison(run, job["nan_step"], 0)
    if "die_at" in job:

        def die(run: Run) -> None:
            if run.step == job["die_at"] and world.rank == 1:
                (out / "dying").touch()
                signal.pause()  # until the test kills it

        run.save(out)
        train(run, die, every=1)
    train(run, every=5)
    run.save(out)
    if watch is not None:
        watch.remove()


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with joined("ddp", "cpu") as (world, _):
        for job in jobs:
            work(job, world)


if __name__ == "__main__":
    main()
