"""The training loop, what it needs to start, and checkpoints to go on from.

An experiment is a :class:`Config`: everything a run depends on, from which it can be made again. The
main job, the command line and the notebooks all run :func:`train`; what differs is a callback.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minisign import checkpoint
from minisign.checkpoint import Checkpoint
from minisign.corpus import DEFAULT as DEFAULT_CORPUS, CorpusConfig, generate
from minisign.files import MISFITS, one_line, write_json, write_whole
from minisign.gpt import GPT, GPTConfig
from minisign.jitter import jittered
from minisign.loss import cross_entropy
from minisign.optim import AdamW, Hybrid, Lion, Signum, Tiger, param_groups, track_rows
from minisign.engine.checks import check_number
from minisign.engine.shards import like_rows, whole
from minisign.parallel import ALONE, World
from minisign.probes import token_losses
from minisign.tokenizer import Tokens, read_text, tokenize, train_encoding

OPTIMIZERS = ("sgd", "signum", "lion", "tiger", "adamw")
MODEL, CONFIG = "model.safetensors", "config.json"

# What each optimizer starts from at this model's size, where the configuration leaves it open.
DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 1.0, "weight_decay": 0.0, "betas": (0.9,)},
    "signum": {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9,)},
    "lion": {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.99)},
    "tiger": {"lr": 1.1e-2, "weight_decay": 0.01, "betas": (0.965,)},
    "adamw": {"lr": 3e-3, "weight_decay": 0.01, "betas": (0.9, 0.999)},
}


@dataclass(frozen=True)
class Config:
    """One training run.

    Args:
        text: files to train on; none of them, the generated corpus of ``corpus``.
        corpus: the generated corpus.
        vocab_size: tokens of the byte-pair vocabulary learned from the text.
        vocab_rare_share: share of the rare language in the generated text that the vocabulary is learned
            from, as multilingual vocabularies are learned from more of the small languages than models are
            trained on; ``None``, from the text of the run itself.
        context, batch: tokens in a window, windows in a batch.
        layers, heads, width, norm, tie, head, init, embedding_std: see :class:`minisign.gpt.GPTConfig`;
            ``None`` for the last is 0.02 with tied embeddings and 0.2 without, where a wide start lets
            rows that are seldom updated stand out from the positions.
        optimizer: ``"sgd"`` (torch's, for comparison), ``"signum"``, ``"lion"``, ``"tiger"`` or
            ``"adamw"``.
        lr, weight_decay, betas: of the optimizer; ``None``, the figure of ``DEFAULTS``.
        eps: ε of AdamW, in the units of the gradient.
        clip: largest 2-norm of the whole gradient, to which a larger one is scaled down; ``None`` for none.
        scale, accumulate, shrink, release_grads: of Tiger.
        fused: the optimizer's step in one pass, by compiled kernels.
        embedding_scale: Tiger's ``scale`` on the embeddings; ``None``, by its author's rule.
        lazy, lazy_momentum: of the embeddings' group.
        embedding_optimizer: ``"adamw"`` puts AdamW (with its defaults) on the embeddings and
            ``optimizer`` on the rest.
        steps: optimizer steps; with ``accumulate`` each is one micro-batch.
        warmup: steps over which the rate rises linearly from 0.
        decay: share of the steps, at the end, over which the rate falls linearly to 0; 0 for none.
        seed: of the initial weights and of the batches.
    """

    text: tuple[str, ...] = ()
    corpus: CorpusConfig = DEFAULT_CORPUS
    vocab_size: int = 4096
    vocab_rare_share: float | None = None
    context: int = 32
    batch: int = 16
    layers: int = 2
    heads: int = 4
    width: int = 64
    norm: str = "pre"
    tie: str = "none"
    head: str = "plain"
    init: str = "gpt2"
    embedding_std: float | None = None
    optimizer: str = "tiger"
    lr: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, ...] | None = None
    eps: float = 1e-8
    clip: float | None = None
    scale: str | float = "rms"
    embedding_scale: str | float | None = None
    accumulate: int = 1
    shrink: float = 0.99
    release_grads: bool = False
    fused: bool = False
    lazy: bool | str = False
    lazy_momentum: str = "freeze"
    embedding_optimizer: str | None = None
    steps: int = 1500
    warmup: int = 50
    decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}: choose from {', '.join(OPTIMIZERS)}")
        if self.embedding_optimizer not in (None, "adamw"):
            raise ValueError(
                f"unknown embedding_optimizer {self.embedding_optimizer!r}: choose 'adamw' or None"
            )
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {self.decay}")
        check_number("eps", self.eps, 0.0)
        if self.clip is not None:
            check_number("clip", self.clip, 0.0)
            if not self.clip:
                raise ValueError("clip must be positive, got 0: it would stop the training")
        for name, least in (("vocab_size", 1), ("batch", 1), ("steps", 1), ("warmup", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        given = {"lr": self.lr, "weight_decay": self.weight_decay, "betas": self.betas}
        for name, value in {**DEFAULTS[self.optimizer], **_given(given)}.items():
            object.__setattr__(self, name, value)
        if len(self.betas or ()) != (n := len(DEFAULTS[self.optimizer]["betas"])):
            raise ValueError(f"{self.optimizer} takes {n} beta(s), got {self.betas}")
        if self.embedding_std is None:
            object.__setattr__(self, "embedding_std", 0.2 if self.tie == "none" else 0.02)
        if self.vocab_rare_share is not None and self.text:
            raise ValueError(f"vocab_rare_share {self.vocab_rare_share} is for the generated text only")
        if isinstance(self.text, str):
            raise TypeError(f"text must be a tuple of file names, got {self.text!r}")
        if self.optimizer == "sgd" and self.lazy and self.embedding_optimizer is None:
            raise ValueError(f"lazy {self.lazy!r} is not for sgd: torch.optim.SGD has no lazy rows")
        if self.embedding_scale is not None and (
            self.optimizer != "tiger" or self.embedding_optimizer is not None
        ):
            raise ValueError(f"embedding_scale {self.embedding_scale!r} is for embeddings under tiger")
        for name in ("fused", "release_grads"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.fused and self.optimizer == "sgd":
            raise ValueError("fused is not for sgd, which is torch's here")
        if self.release_grads and self.optimizer != "tiger":
            raise ValueError(f"release_grads is for tiger, got {self.optimizer}")
        if self.release_grads and self.clip is not None:
            raise ValueError(
                f"release_grads and clip {self.clip} exclude each other: the norm of the whole gradient is "
                "known when all of it is there, and with release_grads it never is"
            )
        self.gpt(256)  # says what is wrong with the model's shape

    def gpt(self, vocab_size: int) -> GPTConfig:
        return GPTConfig(
            vocab_size,
            self.context,
            self.layers,
            self.heads,
            self.width,
            self.norm,
            self.tie,
            self.embedding_std or 0.0,
            self.head,
            self.init,
        )

    @property
    def embedding_decay(self) -> float:
        """λ of the optimizer that holds the token embedding."""
        if self.embedding_optimizer is not None:
            return float(DEFAULTS[self.embedding_optimizer]["weight_decay"])
        return float(self.weight_decay or 0.0)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Config:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**{**fields, "corpus": CorpusConfig(**fields["corpus"])})

    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step, counted from 0."""
        rise = (step + 1) / self.warmup if self.warmup else 1.0
        fall = (self.steps - step) / (self.steps * self.decay) if self.decay else 1.0
        return min(1.0, rise, fall)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def load_tokens(config: Config) -> Tokens:
    """The run's text, from its files or generated, and tokenized."""
    text = read_text(config.text) if config.text else generate(config.corpus)
    if config.vocab_rare_share is None:
        return tokenize(text, config.vocab_size, config.context)
    other = generate(dataclasses.replace(config.corpus, rare_share=config.vocab_rare_share))
    return tokenize(text, train_encoding(other, config.vocab_size), config.context)


def build_model(config: Config, vocab_size: int) -> GPT:
    """The model with the initial weights of ``config.seed``; leaves torch's global generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return jittered(GPT(config.gpt(vocab_size)))


def build_optimizer(config: Config, model: GPT, process_group: Any = None) -> torch.optim.Optimizer:
    """The optimizer that ``config`` describes, for ``model``, which the processes of a group train
    together."""
    options: dict[str, Any] = {"lazy": config.lazy, "lazy_momentum": config.lazy_momentum}
    if config.embedding_scale is not None:
        options["scale"] = config.embedding_scale
    if config.lazy == "ids":
        track_rows(model, process_group)
    groups = param_groups(model, embedding=options)
    if config.embedding_optimizer is None:
        return _optimizer(config.optimizer, groups, config)
    embeddings = [group for group in groups if group["kind"] == "embedding"]
    rest = [group for group in groups if group["kind"] != "embedding"]
    own = dataclasses.replace(
        config, optimizer=config.embedding_optimizer, lr=None, weight_decay=None, betas=None
    )
    return Hybrid(
        _optimizer(config.embedding_optimizer, embeddings, own),
        _optimizer(config.optimizer, rest, config),
    )


def _optimizer(name: str, groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    lr, decay, betas = config.lr or 0.0, config.weight_decay or 0.0, config.betas or ()
    if name == "sgd":
        check_number("beta", betas[0], 0.0, 1.0)
        return torch.optim.SGD(groups, lr, betas[0], weight_decay=decay)
    if name == "signum":
        return Signum(groups, lr, betas[0], decay, fused=config.fused)
    if name == "lion":
        return Lion(groups, lr, (betas[0], betas[1]), decay, fused=config.fused)
    if name == "adamw":
        return AdamW(groups, lr, (betas[0], betas[1]), config.eps, decay, fused=config.fused)
    return Tiger(
        groups,
        lr,
        betas[0],
        decay,
        scale=config.scale,
        accumulate=config.accumulate,
        shrink=config.shrink,
        release_grads=config.release_grads,
        fused=config.fused,
    )


def pick_device(name: str) -> torch.device:
    """``"auto"`` is the GPU if there is one.

    Raises:
        ValueError: ``"cuda"`` where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: choose from auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no CUDA GPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


# --- the loop -------------------------------------------------------------------------------------


class Run:
    """A training run in the middle: model, optimizer, schedule, and how many steps are done.

    Args:
        config: the experiment.
        tokens: the text, from :func:`load_tokens`.
        device: where the model lives.
        world: the processes that train it together, from :func:`~minisign.parallel.joined`.

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
            :class:`~minisign.guard.SpikeGuard` is its ``check``.

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
