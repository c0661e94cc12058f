"""The training loop, and runs to go on from.

The main job, the command line, the notebooks and several processes all call :func:`train`; what differs is
a callback.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minisign.engine.shards import like_rows, whole
from minisign.lab import checkpoint
from minisign.lab.build import build_model, build_optimizer, load_tokens
from minisign.lab.checkpoint import Checkpoint
from minisign.lab.config import Config
from minisign.lab.files import MISFITS, one_line, write_json, write_whole
from minisign.lab.loss import cross_entropy
from minisign.lab.parallel import ALONE, World
from minisign.lab.tokenizer import Tokens
from minisign.probes import token_losses

MODEL, CONFIG = "model.safetensors", "config.json"


class Run:
    """A training run in the middle: model, optimizer, schedule, and how many steps are done.

    Args:
        config: the experiment.
        tokens: the text, from :func:`load_tokens`.
        device: where the model lives.
        world: the processes that train it together, from :func:`~minisign.lab.parallel.joined`.

    Raises:
        ValueError: what the processes cannot do together.
    """

    def __init__(
        self, config: Config, tokens: Tokens, device: str | torch.device = "cpu", world: World = ALONE
    ) -> None:
        if config.release_grads and world.engine is not None:
            raise ValueError(
                "release_grads takes each gradient before the processes have averaged it: leave it out, or "
                "train in one process"
            )
        if config.batch < world.size:
            raise ValueError(f"a batch of {config.batch} windows is too small for {world.size} processes")
        self.config, self.tokens, self.device, self.world = config, tokens, torch.device(device), world
        self.model = build_model(config, tokens.vocab_size).to(self.device)
        self.forward = world.wrap(self.model)
        self.optimizer = build_optimizer(
            config, self.model, torch.distributed.group.WORLD if world.engine == "ddp" else None
        )
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.step = 0
        self.losses: list[float] = []  # of each step, in nats per token
        self.seconds = 0.0  # spent in training

    @property
    def train_loss(self) -> float:
        """Mean loss of the last 100 steps, nats per token."""
        return float(np.mean(self.losses[-100:])) if self.losses else math.nan

    def save(self, out: Path) -> None:
        """Writes a checkpoint, weights and configuration; each appears whole or not at all.

        Raises:
            OSError: it could not be written; the checkpoint before is there still.
        """
        out.mkdir(parents=True, exist_ok=True)
        numbers: dict[str, dict[str, Any]] = {}
        weights = self._weights()
        tensors = {f"model.{name}": value for name, value in weights.items()}
        for name, state in self._optimizer_state().items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
                else:
                    numbers.setdefault(name, {})[key] = value
        record = {
            "config": self.config.to_json(),
            "text_sha256": self.tokens.sha256,
            "losses": self.losses,
            "seconds": self.seconds,
            "optimizer": numbers,
            "micro_steps": [group.get("micro_step", 0) for group in self.optimizer.param_groups],
        }
        checkpoint.save(out, self.step, tensors, record, self.world)
        weights = {name: whole(value).contiguous() for name, value in weights.items()}
        if self.world.rank == 0:
            write_whole(out / MODEL, lambda path: save_file(weights, path, {"format": "pt"}))
            write_whole(out / CONFIG, lambda path: write_json(path, self.config.to_json()))
        self.world.wait()

    @classmethod
    def resume(
        cls,
        directory: Path,
        device: str | torch.device = "cpu",
        steps: int | None = None,
        world: World = ALONE,
    ) -> Run:
        """The run whose checkpoint lies in ``directory``, ready to go on; it may have been saved by another
        number of processes.

        Args:
            steps: a new total of steps, for runs with a constant rate.

        Raises:
            ValueError: no checkpoint there, no sound one, a text that has changed, or ``steps`` that this
                run cannot have.
        """
        saved = checkpoint.newest(directory, world)
        path, record = saved.path, saved.record
        try:
            config = Config.from_json(record["config"])
            if steps is not None and steps != config.steps:
                if config.decay:
                    raise ValueError(
                        f"steps {steps} would change the decay of a run begun with {config.steps} steps"
                    )
                config = dataclasses.replace(config, steps=steps)
            if config.steps < record["step"]:
                raise ValueError(f"{path} is at step {record['step']} already, past {config.steps}")
            expected = record["text_sha256"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a checkpoint of minisign: {error!r}") from None
        tokens = load_tokens(config)
        if tokens.sha256 != expected:
            raise ValueError(
                f"the text is not the one {path} was trained on: SHA-256 {tokens.sha256[:12]}…, "
                f"expected {str(expected)[:12]}…"
            )
        run = cls(config, tokens, device, world)
        try:
            run._load(saved)
        except checkpoint.Damaged:
            raise
        except MISFITS as error:
            raise ValueError(f"{path} does not fit its own configuration: {one_line(error)}") from None
        return run

    def _load(self, saved: Checkpoint) -> None:
        record = saved.record
        parameters = dict(self.model.named_parameters())
        state: dict[str, dict[str, Any]] = {name: {} for name in parameters}
        for full, shape in saved.shapes.items():
            if full.startswith("optimizer."):
                name, key = full.removeprefix("optimizer.").rsplit(".", 1)
                state[name][key] = _like(parameters[name], shape, saved.dtypes[full])
        tensors = {f"model.{name}": value for name, value in self._weights().items()}
        for name, values in state.items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in values.items()}
        saved.load(tensors, self.world)
        for name, numbers in record["optimizer"].items():
            state[name] |= numbers
        for optimizer in getattr(self.optimizer, "optimizers", [self.optimizer]):
            mine = {p for group in optimizer.param_groups for p in group["params"]}
            for name, p in parameters.items():
                if p in mine and state[name]:
                    optimizer.state[p] = state[name]
        for group, micro_step in zip(self.optimizer.param_groups, record["micro_steps"], strict=True):
            if "micro_step" in group:
                group["micro_step"] = micro_step
        self.step, self.seconds = record["step"], float(record["seconds"])
        self.losses = [float(loss) for loss in record["losses"]]

    def _weights(self) -> dict[str, Tensor]:
        """Parameters, a shared one once, and buffers, by name."""
        found = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {name: value.detach() for name, value in found.items()}

    def _optimizer_state(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state of each parameter that has one, by name."""
        state = self.optimizer.state
        return {name: state[p] for name, p in self.model.named_parameters() if p in state}


def _like(p: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room for a buffer of a parameter: as ``p``, by its rows, or a whole tensor of its own."""
    if shape == tuple(p.shape):
        return torch.zeros_like(p, dtype=dtype, requires_grad=False)
    if shape and shape[0] == p.shape[0]:
        return like_rows(p, shape, dtype)
    return torch.zeros(shape, dtype=dtype)


def train(
    run: Run,
    callback: Callable[[Run], object] | None = None,
    every: int = 10,
    stop: Callable[[], bool] = lambda: False,
    may_step: Callable[[Tensor], bool] = lambda loss: True,
) -> Run:
    """Trains until ``run.config.steps``.

    Args:
        run: a fresh or resumed run; changed in place and returned. callback: called after every ``every``
        steps and after the last. every: steps between calls; also how often the device is waited for. stop:
        asked before every step; True ends the training between two steps. Of several processes each is
            asked before every ``every`` steps, and one is enough.
        may_step: given the loss when its gradient is there; False leaves the update out. That of a
            :class:`~minisign.doctor.guard.SpikeGuard` is its ``check``.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    config, model, optimizer, world = run.config, run.model, run.optimizer, run.world
    waiting: list[Tensor] = []

    def stopping() -> bool:  # several processes must agree, and do not ask each other at every step
        if world.engine is None:
            return stop()
        return run.step % every == 0 and world.any(stop())

    model.train()
    start = time.perf_counter()
    try:
        while run.step < config.steps and not stopping():
            window = run.tokens.batch(config.seed, run.step, config.batch, config.context)
            part, weight = world.share(window)
            ids = torch.from_numpy(part).to(run.device)
            for group, lr in zip(optimizer.param_groups, run.base_lrs, strict=True):
                group["lr"] = lr * config.rate(run.step)
            loss = next_token_loss(run.forward, ids)
            if world.engine is None:
                loss.backward()
            else:
                loss = loss * weight
                loss.backward()
                loss = world.add_up(loss.detach().clone()) / world.size
            if config.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            if may_step(loss.detach()):
                optimizer.step()
            optimizer.zero_grad()
            run.step += 1
            waiting.append(loss.detach())
            if run.step % every == 0 or run.step == config.steps:
                run.losses += torch.stack(waiting).tolist()
                waiting.clear()
                if not math.isfinite(run.losses[-1]):
                    raise FloatingPointError(f"the loss is {run.losses[-1]} at step {run.step}")
                if callback is not None:
                    callback(run)
    finally:
        run.losses += torch.stack(waiting).tolist() if waiting else []
        run.seconds += time.perf_counter() - start
    return run


def training_step(run: Run) -> Callable[[], Tensor]:
    """A function that makes a step of ``run`` (forward, backward, update) whenever it is called, always on
    its first batch, and returns the loss before it: for timing, and to see what a fixed batch does."""
    config = run.config
    windows = torch.from_numpy(run.tokens.batch(config.seed, 0, config.batch, config.context))

    def step() -> Tensor:
        loss = next_token_loss(run.model, windows)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        return loss.detach()

    return step


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy, in nats per token, of windows [B, T + 1]."""
    logits = model(windows[:, :-1])
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def validation_loss(run: Run, limit: int = 512) -> float:
    """Mean loss in nats per token over the validation windows (``limit`` of them at most)."""
    return float(token_losses(run.model, run.tokens.windows(run.config.context, limit)).mean())
