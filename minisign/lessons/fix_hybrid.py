"""Checkers of notebook 07."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from minisign import theory
from minisign.lab.gpt import GPT, GPTConfig
from minisign.lessons import RIGHT, Verdict, ask, checker
from minisign.optim import param_groups

Parameters = Sequence[nn.Parameter]


def _models() -> dict[str, nn.Module]:
    """Models to route, under names that say little: by what they are for the verdict."""

    class Oddly(nn.Module):
        """An embedding that is not called one, a linear layer that is, and a norm named for neither."""

        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(11, 8)
            self.embed_proj = nn.Linear(8, 8)
            self.ln_f = nn.LayerNorm(8)
            self.out = nn.Linear(8, 11, bias=False)

    shape = GPTConfig(vocab_size=11, context=4, layers=1, heads=1, width=8, head="bias")
    tied = GPTConfig(vocab_size=11, context=4, layers=1, heads=1, width=8, tie="tied")
    return {
        "a GPT": GPT(shape),
        "a GPT with tied embeddings": GPT(tied),
        "a model that calls its embedding `wte` and a linear layer `embed_proj`": Oddly(),
    }


@checker
def check_split(answer: Callable[[nn.Module], tuple[Parameters, Parameters]]) -> Verdict:
    """``answer(model)`` → the parameters of its embeddings, and all others."""
    for name, model in _models().items():
        embeddings, rest = map(list, ask(answer, model))
        names = {id(p): n for n, p in model.named_parameters()}
        expected = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        given = [id(p) for p in (*embeddings, *rest)]
        for key, parameter in names.items():
            if given.count(key) != 1:
                return Verdict(f"{name}: {parameter} is in the answer {given.count(key)} times")
        if wrong := {id(p) for p in embeddings} ^ expected:
            parameter = names[min(wrong, key=list(names).index)]
            side = "the rest" if expected & wrong else "the embeddings"
            return Verdict(f"{name}: {parameter} is with {side}")
    return RIGHT


@checker
def check_isolated_move(answer: Callable[[float, float, float], float]) -> Verdict:
    """``answer(lr, beta1, beta2)`` → how far AdamW moves a weight in all after one gradient among zeros,
    long after the start."""
    for lr, beta1, beta2 in ((1.0, 0.9, 0.999), (3e-3, 0.9, 0.95), (0.1, 0.95, 0.98)):
        given = ask(answer, lr, beta1, beta2)
        expected = theory.isolated_adamw_move(lr, beta1, beta2)
        if not math.isclose(given, expected, rel_tol=1e-3):
            setting = f"η = {lr}, β₁ = {beta1} and β₂ = {beta2}"
            return Verdict(f"with {setting} it is {expected:.4g}, the answer is {given:.4g}")
    return RIGHT


@checker
def check_decay_groups(answer: Callable[[nn.Module, float], list[dict[str, Any]]]) -> Verdict:
    """``answer(model, decay)`` → groups for an optimizer: norms and biases without weight decay, all other
    parameters with it."""
    for name, model in _models().items():
        groups = ask(answer, model, 0.1)
        names = {id(p): n for n, p in model.named_parameters()}
        try:
            optimizer = torch.optim.AdamW(groups, weight_decay=0.5)
        except (TypeError, ValueError) as error:
            return Verdict(f"{name}: an optimizer does not take these groups: {error}")
        decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        if missing := [n for key, n in names.items() if key not in decays]:
            return Verdict(f"{name}: {missing[0]} is in no group")
        for group in param_groups(model):
            expected = 0.0 if group["kind"] in ("norm", "bias") else 0.1
            for parameter, tensor in group["params"]:
                if decays[id(tensor)] != expected:
                    return Verdict(
                        f"{name}: {parameter} ({group['kind']}) decays at {decays[id(tensor)]:g}"
                    )
    return RIGHT
