"""Checkers of notebook 17."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minisign.kernels.trace import Untraceable, trace
from minisign.lessons import RIGHT, Verdict, ask, checker, numbers, without_files
from minisign.optim import optimizer

STEPS = 4
Rule = Callable[..., None]


def _one_step(rule: Rule, p: Tensor, g: Tensor, m: Tensor, **given: float) -> str:
    """Carries out a step; what is wrong with the way it is written, or ""."""
    before, kept = g.clone(), m.clone()
    try:
        rule(p, g, m, **given)
    except NotImplementedError:
        raise
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"the step ends with {type(error).__name__}: {error}"
    if not torch.equal(g, before):
        return f"the step changes the gradient: it was {float(before[0]):.4g} and is {float(g[0]):.4g} now"
    if torch.equal(m, kept):
        return (
            "the buffer m is still the same after the step: `m = …` makes another tensor, only a method "
            "that ends in an underscore writes to it"
        )
    return ""


def _judge(
    rule: Any,
    right: Rule,
    given: dict[str, Any],
    others: Sequence[tuple[Rule, str]],
) -> Verdict:
    """Of a rule with one buffer, in float64, against the ``right`` one; ``others``: wrong ones, and what is
    said to them."""
    if not callable(rule):
        return Verdict(f"a function is expected, got {rule!r}")
    try:
        inspect.signature(rule).bind(None, None, None, **given)
    except TypeError as error:
        return Verdict(
            f"it cannot be called as rule(p, g, m, {', '.join(f'{x}=…' for x in given)}): {error}"
        )
    random = torch.Generator().manual_seed(0)
    start = torch.randn(6, generator=random, dtype=torch.float64)
    gradients = torch.randn(STEPS, 6, generator=random, dtype=torch.float64)

    def path(step: Rule) -> list[Tensor]:
        p, m, found = start.clone(), torch.zeros_like(start), []
        for g in gradients:
            step(p, g.clone(), m, **given)
            found.append(p.clone())
        return found

    p, m, found = start.clone(), torch.zeros_like(start), []
    for t, g in enumerate(gradients, 1):
        if fault := _one_step(rule, p, g.clone(), m, **given):
            return Verdict(fault)
        if len(bad := p[~p.isfinite()]):
            return Verdict(f"θ is {float(bad[0])} after step {t}")
        found.append(p.clone())
    for t, (x, expected) in enumerate(zip(found, path(right), strict=True), 1):
        if not _close(x, expected):
            i = int((x - expected).abs().argmax())
            said = (
                f"after step {t} the weight p[{i}] is {float(x[i]):.6g}, expected {float(expected[i]):.6g}"
            )
            return Verdict(next((said for other, said in others if _close(p, path(other)[-1])), said))
    return _for_kernels(rule, given)


def _close(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x, y, rtol=1e-9, atol=1e-12)


def _for_kernels(rule: Rule, given: dict[str, Any]) -> Verdict:
    """Whether an optimizer can be made of it, with a kernel."""
    try:
        optimizer(rule, buffers=("momentum",), **given)
        trace(rule, given)
    except (TypeError, ValueError, Untraceable) as error:
        return Verdict(
            f"the weights are right, but no kernel can be made of it: {without_files(str(error))}"
        )
    return RIGHT


def _nesterov(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g)
    p.sub_(g + beta * m, alpha=lr)


def _heavy_ball(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g)
    p.sub_(m, alpha=lr)


def _without_beta(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g)
    p.sub_(g + m, alpha=lr)


@checker
def check_nesterov(answer: Rule) -> Verdict:
    """``answer(p, g, m, *, lr, beta)``, one step of Nesterov's momentum in place; p, g, m [n]."""
    heavy = "this is the heavy ball, of which the old g + βm is the step: expected g + βm with the new m"
    others = (
        (_heavy_ball, heavy),
        (_without_beta, "θ moves by g + m: expected g + βm"),
    )
    return _judge(answer, _nesterov, {"lr": 0.1, "beta": 0.9}, others)


@checker
def check_bytes_of_rule(answer: Callable[[list[tuple[str, list[str]]]], tuple[int, int]]) -> Verdict:
    """``answer(lines)``, each line (written, [read, …]) → bytes of an entry in float32: one operation after
    another, and in one pass. Tensors in memory are "p", "g", "m" and "v"; all others are intermediate."""
    rules: dict[str, list[tuple[str, list[str]]]] = {
        "SGD": [("p", ["p", "g"])],
        "the heavy ball": [("m", ["m"]), ("m", ["m", "g"]), ("p", ["p", "m"])],
        "Lion": [("t", ["m", "g"]), ("t", ["t"]), ("m", ["m", "g"]), ("p", ["p"]), ("p", ["p", "t"])],
        "RMSprop": [("v", ["v"]), ("v", ["v", "g"]), ("a", ["v"]), ("a", ["a"]), ("p", ["p", "g", "a"])],
    }
    for name, lines in rules.items():
        apart = 4 * sum(len(read) + 1 for _, read in lines)
        memory = set("pgmv")
        read = {x for _, names in lines for x in names} & memory
        written = {out for out, _ in lines} & memory
        together = 4 * (len(read) + len(written))
        with_own = 4 * (len({x for _, names in lines for x in names}) + len({out for out, _ in lines}))
        one, other = numbers(ask(answer, [(out, list(names)) for out, names in lines]), 2)
        if one * 4 == apart or other * 4 == together:
            return Verdict(
                f"of {name} these are numbers, not bytes: a float32 has 4, got {one:g} and {other:g}"
            )
        if one != apart:
            return Verdict(f"one after another, the lines of {name} move {apart} bytes, got {one:g}")
        if other == apart != together:
            return Verdict(
                f"one pass over {name} reads and writes each tensor once, {together} bytes, got {other:g}"
            )
        if other == with_own != together:
            return Verdict(
                f"in one pass what is intermediate in {name} never gets to memory: expected "
                f"{together} bytes, got {other:g}"
            )
        if other != together:
            return Verdict(f"one pass over {name} moves {together} bytes, got {other:g}")
    return RIGHT


def _coupled(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float, weight_decay: float) -> None:
    m.mul_(beta).add_(g + weight_decay * p)
    p.sub_(m, alpha=lr)


def _undecayed(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float, weight_decay: float) -> None:
    _heavy_ball(p, g, m, lr=lr, beta=beta)


def _decoupled(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float, weight_decay: float) -> None:
    p.mul_(1 - lr * weight_decay)
    _heavy_ball(p, g, m, lr=lr, beta=beta)


def _decayed_after(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float, weight_decay: float) -> None:
    m.mul_(beta).add_(g)
    p.sub_(m + weight_decay * p, alpha=lr)


@checker
def check_sgd(answer: Rule) -> Verdict:
    """``answer(p, g, m, *, lr, beta, weight_decay)``, a step of torch.optim.SGD in place, g left alone."""
    outside = "the decay goes past the momentum: expected m ← βm + g + λθ, as torch.optim.SGD has it"
    others = ((_undecayed, "the weight decay is gone"), (_decoupled, outside), (_decayed_after, outside))
    return _judge(answer, _coupled, {"lr": 0.1, "beta": 0.9, "weight_decay": 0.3}, others)
