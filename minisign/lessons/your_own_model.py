"""Checkers of notebook 16."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from minisign.lessons import RIGHT, Verdict, ask, checker


@checker
def check_envelope(answer: Callable[[float, Sequence[float], float], Sequence[float]]) -> Verdict:
    """``answer(start, rates, decay)`` → how far out an entry can be at most after each step."""
    cases = ((0.1, [0.01] * 40, 0.5), (0.0, [0.3, 0.0, 0.1], 2.0), (2.0, [0.1, 0.2], 0.0))
    for start, rates, decay in cases:
        given = [float(e) for e in ask(answer, start, rates, decay)]
        if len(given) != len(rates):
            return Verdict(f"after {len(rates)} steps there are {len(given)} values")
        e = start
        for step, (eta, value) in enumerate(zip(rates, given, strict=True), 1):
            e += eta * (1 - decay * e)
            if not math.isclose(value, e, rel_tol=1e-9, abs_tol=1e-12):
                return Verdict(
                    f"from {start} with rates {rates[:step][-3:]} and λ = {decay} it is {e:.6g} after step "
                    f"{step}, the answer is {value:.6g}"
                )
    return RIGHT


@checker
def check_steps_of_silence(answer: Callable[[float, float, float], int]) -> Verdict:
    """``answer(eta, decay, share)`` → after how many steps a silent row that starts at 0 is at least at
    ``share`` of 1/λ."""
    for eta, decay, share in ((0.5, 1.0, 0.75), (0.01, 0.2, 0.8), (1e-4, 0.1, 0.8), (1e-4, 1.0, 0.1)):
        given = int(ask(answer, eta, decay, share))
        right = math.ceil(math.log(1 - share) / math.log1p(-eta * decay) - 1e-9)
        if given != right:
            return Verdict(
                f"with η = {eta:g} and λ = {decay:g} a silent row is at {share:.0%} of the bound after "
                f"{right:,} steps, the answer is {given:,}"
            )
    return RIGHT


@checker
def check_groups(answer: Callable[[nn.Module, float], list[dict[str, Any]]]) -> Verdict:
    """``answer(model, weight_decay)`` → groups for an optimizer, in which biases and the weights of norms
    do not decay and all else does."""
    model = nn.ModuleDict(
        {
            "wte": nn.Embedding(5, 4),
            "LayerNorm": nn.LayerNorm(4),
            "unbiased": nn.Linear(4, 4, bias=False),
            "mlp": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
            "ln_f": nn.LayerNorm(4),
        }
    )
    decays: dict[int, list[float]] = {}
    for group in ask(answer, model, 0.25):
        for parameter in group["params"]:
            decays.setdefault(id(parameter), []).append(float(group.get("weight_decay", 0.0)))
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{module_name}.{name}"
            right = 0.0 if isinstance(module, nn.LayerNorm) or name == "bias" else 0.25
            found = decays.get(id(parameter), [])
            if len(found) != 1:
                return Verdict(f"{whole} is in {len(found)} groups")
            if found[0] != right:
                return Verdict(f"{whole} has a weight decay of {found[0]:g}, not {right:g}")
    return RIGHT
