"""An experiment is a value: one :class:`Config`, from which a run can be made again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from minisign.engine.checks import check_number
from minisign.lab.corpus import DEFAULT as DEFAULT_CORPUS, CorpusConfig
from minisign.lab.gpt import GPTConfig

OPTIMIZERS = ("sgd", "signum", "lion", "tiger", "adamw")

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
        layers, heads, width, norm, tie, head, init, embedding_std: see :class:`minisign.lab.gpt.GPTConfig`;
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
        if self.tie != "none" and self.lazy == "ids":
            raise ValueError(
                f"lazy 'ids' is not for tie {self.tie!r}: the output layer has a gradient for every row of "
                "a tied matrix, looked up or not, and would lose it"
            )
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
