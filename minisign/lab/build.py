"""From a :class:`~minisign.lab.config.Config` to what a run needs: its text, model and optimizer."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from minisign.engine.checks import check_number
from minisign.lab.config import Config
from minisign.lab.corpus import generate
from minisign.lab.gpt import GPT
from minisign.lab.jitter import jittered
from minisign.lab.tokenizer import Tokens, read_text, tokenize, train_encoding
from minisign.optim import AdamW, Hybrid, Lion, Signum, Tiger, param_groups, track_rows


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
