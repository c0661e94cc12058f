"""The training loop, what it needs to start, and checkpoints to go on from.

An experiment is a :class:`Config`: everything a run depends on, from which it can be made again. The
main job, the command line and the notebooks all run :func:`train`; what differs is a callback.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_model
from torch import Tensor
from torch.nn import functional as F

from minisign.corpus import DEFAULT as DEFAULT_CORPUS, CorpusConfig, generate
from minisign.files import read_checkpoint, write_json, write_whole
from minisign.gpt import GPT, GPTConfig
from minisign.optim import AdamW, Hybrid, Lion, Signum, Tiger, param_groups, track_rows
from minisign.optim.base import check_number
from minisign.probes import token_losses
from minisign.tokenizer import Tokens, read_text, tokenize, train_encoding

OPTIMIZERS = ("sgd", "signum", "lion", "tiger", "adamw")
CHECKPOINT, MODEL, CONFIG = "checkpoint.pt", "model.safetensors", "config.json"
FORMAT = "minisign checkpoint 1"

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
        for name, least in (("batch", 1), ("steps", 1), ("warmup", 0), ("seed", 0)):
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
        return GPT(config.gpt(vocab_size))


def build_optimizer(config: Config, model: GPT) -> torch.optim.Optimizer:
    """The optimizer that ``config`` describes, for ``model``."""
    options: dict[str, Any] = {"lazy": config.lazy, "lazy_momentum": config.lazy_momentum}
    if config.embedding_scale is not None:
        options["scale"] = config.embedding_scale
    if config.lazy == "ids":
        track_rows(model)
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
    """

    def __init__(self, config: Config, tokens: Tokens, device: str | torch.device = "cpu") -> None:
        self.config, self.tokens, self.device = config, tokens, torch.device(device)
        self.model = build_model(config, tokens.vocab_size).to(self.device)
        self.optimizer = build_optimizer(config, self.model)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.step = 0
        self.losses: list[float] = []  # of each step, in nats per token
        self.seconds = 0.0  # spent in training

    @property
    def train_loss(self) -> float:
        """Mean loss of the last 100 steps, nats per token."""
        return float(np.mean(self.losses[-100:])) if self.losses else math.nan

    def save(self, out: Path) -> None:
        """Writes checkpoint, weights and configuration; each file appears whole or not at all."""
        out.mkdir(parents=True, exist_ok=True)
        checkpoint = {
            "format": FORMAT,
            "config": json.dumps(self.config.to_json()),
            "text_sha256": self.tokens.sha256,
            "step": self.step,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        write_whole(out / MODEL, lambda path: save_model(self.model, str(path)))
        write_whole(out / CONFIG, lambda path: write_json(path, self.config.to_json()))
        write_whole(out / CHECKPOINT, lambda path: torch.save(checkpoint, path))

    @classmethod
    def resume(cls, directory: Path, device: str | torch.device = "cpu", steps: int | None = None) -> Run:
        """The run whose checkpoint lies in ``directory``, ready to go on.

        Args:
            steps: a new total of steps, for runs with a constant rate.

        Raises:
            ValueError: no checkpoint there, a damaged or foreign one, a text that has changed, or
                ``steps`` that the run cannot have.
        """
        path = directory / CHECKPOINT
        saved = read_checkpoint(path, FORMAT)
        try:
            config = Config.from_json(json.loads(saved["config"]))
            if steps is not None and steps != config.steps:
                if config.decay:
                    raise ValueError(
                        f"steps {steps} would change the decay of a run begun with {config.steps} steps"
                    )
                config = dataclasses.replace(config, steps=steps)
            if config.steps < saved["step"]:
                raise ValueError(f"{path} is at step {saved['step']} already, past {config.steps}")
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a checkpoint of minisign: {error!r}") from None
        tokens = load_tokens(config)
        if tokens.sha256 != saved["text_sha256"]:
            raise ValueError(
                f"the text is not the one {path} was trained on: SHA-256 {tokens.sha256[:12]}…, "
                f"expected {saved['text_sha256'][:12]}…"
            )
        run = cls(config, tokens, device)
        try:
            run.model.load_state_dict(saved["model"])
            run.optimizer.load_state_dict(saved["optimizer"])
            run.step, run.seconds = saved["step"], saved["seconds"]
            run.losses = saved["losses"].tolist()
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} does not fit its own configuration: {reason}") from None
        return run


def train(
    run: Run,
    callback: Callable[[Run], object] | None = None,
    every: int = 10,
    stop: Callable[[], bool] = lambda: False,
    may_step: Callable[[Tensor], bool] = lambda loss: True,
) -> Run:
    """Trains until ``run.config.steps``.

    Args:
        run: a fresh or resumed run; changed in place and returned.
        callback: called after every ``every`` steps and after the last.
        every: steps between calls; also how often the device is waited for.
        stop: asked before every step; True ends the training between two steps.
        may_step: given the loss when its gradient is there; False leaves the update out. That of a
            :class:`~minisign.guard.SpikeGuard` is its ``check``.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    config, model, optimizer = run.config, run.model, run.optimizer
    waiting: list[Tensor] = []
    model.train()
    start = time.perf_counter()
    try:
        while run.step < config.steps and not stop():
            window = run.tokens.batch(config.seed, run.step, config.batch, config.context)
            ids = torch.from_numpy(window).to(run.device)
            for group, lr in zip(optimizer.param_groups, run.base_lrs, strict=True):
                group["lr"] = lr * config.rate(run.step)
            loss = next_token_loss(model, ids)
            loss.backward()
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


def next_token_loss(model: GPT, windows: Tensor) -> Tensor:
    """Mean cross-entropy, in nats per token, of windows [B, T + 1]."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def validation_loss(run: Run, limit: int = 512) -> float:
    """Mean loss in nats per token over the validation windows (``limit`` of them at most)."""
    return float(token_losses(run.model, run.tokens.windows(run.config.context, limit)).mean())
