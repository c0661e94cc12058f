"""Checkers of notebook 14."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minisign.lessons import RIGHT, Verdict, ask, checker, numbers


@checker
def check_bytes(answer: Callable[[int, int, int, int], int]) -> Verdict:
    """``answer(parameter, gradient, buffer, buffers)`` → bytes for each weight; the first three are of one
    number."""
    cases = {
        (4, 4, 4, 1): "Lion in float32",
        (4, 4, 4, 2): "AdamW in float32",
        (4, 4, 2, 1): "Lion with a momentum in bfloat16",
        (2, 2, 2, 1): "Lion in bfloat16",
        (2, 2, 2, 2): "AdamW in bfloat16",
        (4, 2, 4, 0): "SGD with a gradient in bfloat16",
    }
    for case, name in cases.items():
        parameter, gradient, buffer, buffers = case
        right = 2 * parameter + gradient + 2 * buffer * buffers
        (given,) = numbers(ask(answer, *case))
        if given == right + gradient:
            return Verdict(f"{name} only reads the gradient: expected {right} bytes, got {given:g}")
        if given == parameter + gradient + buffer * buffers:
            return Verdict(f"{name} writes as well: expected {right} bytes, got {given:g}")
        if given != right:
            return Verdict(f"{name} moves {right} bytes, got {given:g}")
    return RIGHT


@checker
def check_work(answer: Callable[[int, list[int], int], tuple[int, int, int]]) -> Verdict:
    """``answer(program, sizes, block)`` → (tensor, start, end)."""
    for sizes, block in (([5, 8, 3], 4), ([4, 0, 4], 4), ([1, 9], 3)):
        program = 0
        for tensor, size in enumerate(sizes):
            for start in range(0, size, block):
                right = (tensor, start, min(start + block, size))
                given = numbers(ask(answer, program, list(sizes), block), 3)
                said = ", ".join(f"{x:g}" for x in given)
                if given != right and given == (*right[:2], start + block):
                    return Verdict(f"program {program} of {sizes} goes beyond the end, to {start + block}")
                if given != right:
                    return Verdict(
                        f"program {program} of {sizes} in blocks of {block}: expected {right}, got ({said})"
                    )
                program += 1
    return RIGHT


@checker
def check_autotune(answer: Callable[..., Any]) -> Verdict:
    """``answer(update, p, m, configurations, clock)`` → the fastest; p and m [n] have moved once."""
    time = [0.0]

    def update(p: Tensor, m: Tensor, configuration: int) -> None:
        m.add_(1)
        p.sub_(m)
        time[0] += {1: 3.0, 2: 1.0, 4: 2.0}[configuration]

    p, m = torch.ones(3), torch.zeros(3)
    fastest = ask(answer, update, p, m, [1, 2, 4], lambda: time[0])
    steps = float(m[0])
    if steps != 1:
        return Verdict(f"the first step moves the weights {steps:g} times")
    if not torch.equal(p, torch.zeros(3)):
        return Verdict(
            f"the momentum moved once and the weights did not go with it: expected 0, got {float(p[0]):g}"
        )
    if fastest != 2:
        return Verdict(f"the fastest configuration is 2, got {fastest}")
    return RIGHT
