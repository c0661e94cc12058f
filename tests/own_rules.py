"""Optimizers of the tests' own, each with an oracle in NumPy float64 that was written from its paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisign import optimizer, rms

Array = np.ndarray[Any, np.dtype[np.float64]]
Oracle = Callable[[Array, Array, list[Array], int], None]  # p, g, buffers, the number of the step; in place


# --- Polyak, 1964 ---------------------------------------------------------------------------------


def heavy_ball(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g)
    p.add_(m, alpha=-lr)


def heavy_ball_oracle(p: Array, g: Array, buffers: list[Array], t: int) -> None:
    (m,) = buffers
    m[...] = 0.9 * m + g
    p -= 0.01 * m


# --- Nesterov, in the form of Sutskever et al., ICML 2013 -----------------------------------------


def nesterov(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float) -> None:
    m.mul_(beta).add_(g)
    p.add_(g.add(m, alpha=beta), alpha=-lr)


def nesterov_oracle(p: Array, g: Array, buffers: list[Array], t: int) -> None:
    (m,) = buffers
    m[...] = 0.9 * m + g
    p -= 0.01 * (g + 0.9 * m)


# --- Tieleman and Hinton, 2012 --------------------------------------------------------------------


def rms_prop(p: Tensor, g: Tensor, v: Tensor, *, lr: float, alpha: float, eps: float) -> None:
    v.mul_(alpha).addcmul_(g, g, value=1 - alpha)
    p.addcdiv_(g, v.sqrt().add_(eps), value=-lr)


def rms_prop_oracle(p: Array, g: Array, buffers: list[Array], t: int) -> None:
    (v,) = buffers
    v[...] = 0.95 * v + 0.05 * g**2
    p -= 0.01 * g / (np.sqrt(v) + 1e-6)


# --- Xie et al., arXiv 2208.06677; its last gradient begins at zero -------------------------------


def adan(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, n: Tensor, last: Tensor,
    *, step: float, lr: float, beta1: float, beta2: float, beta3: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    difference = g - last
    m.lerp_(g, 1 - beta1)
    v.lerp_(difference, 1 - beta2)
    ahead = g.add(difference, alpha=beta2)
    n.mul_(beta3).addcmul_(ahead, ahead, value=1 - beta3)
    correction = (1 - beta3**step) ** 0.5
    root = (n.sqrt() / correction).add_(eps)
    p.addcdiv_(m, root, value=-lr / (1 - beta1**step))
    p.addcdiv_(v, root, value=-lr * beta2 / (1 - beta2**step))
    p.div_(1 + lr * weight_decay)
    last.copy_(g)


def adan_oracle(p: Array, g: Array, buffers: list[Array], t: int) -> None:
    m, v, n, last = buffers
    m[...] = 0.98 * m + 0.02 * g
    v[...] = 0.92 * v + 0.08 * (g - last)
    n[...] = 0.99 * n + 0.01 * (g + 0.92 * (g - last)) ** 2
    eta = 0.01 / (np.sqrt(n / (1 - 0.99**t)) + 1e-8)
    p[...] = (p - eta * (m / (1 - 0.98**t) + 0.92 * v / (1 - 0.92**t))) / (1 + 0.01 * 0.02)
    last[...] = g


# --- Lion with a soft sign ------------------------------------------------------------------------


def soft_lion(
    p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta1: float, beta2: float, width: float
) -> None:
    update = (m.lerp(g, 1 - beta1) / width).tanh_()
    m.lerp_(g, 1 - beta2)
    p.add_(update, alpha=-lr)


def soft_lion_oracle(p: Array, g: Array, buffers: list[Array], t: int) -> None:
    (m,) = buffers
    p -= 0.01 * np.tanh((0.9 * m + 0.1 * g) / 0.3)
    m[...] = 0.99 * m + 0.01 * g


# --- Lion with cautious weight decay, arXiv 2510.12402 --------------------------------------------


def cautious_decay(
    p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta1: float, beta2: float, weight_decay: float
) -> None:
    update = m.lerp(g, 1 - beta1).sign_()
    m.lerp_(g, 1 - beta2)
    p.sub_(torch.where(update * p > 0, p * (lr * weight_decay), 0.0))
    p.add_(update, alpha=-lr)


def cautious_decay_oracle(p: Array, g: Array, buffers: list[Array], t: int) -> None:
    (m,) = buffers
    update = np.sign(0.9 * m + 0.1 * g)
    m[...] = 0.99 * m + 0.01 * g
    p -= 0.01 * (update + 0.1 * p * (update * p > 0))


# --- Lion under the cautious mask of arXiv 2411.16085, without its mean ---------------------------


def cautious_mask(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta1: float, beta2: float) -> None:
    update = m.lerp(g, 1 - beta1).sign_()
    m.lerp_(g, 1 - beta2)
    p.add_(update * (update * g > 0), alpha=-lr)


def cautious_mask_oracle(p: Array, g: Array, buffers: list[Array], t: int) -> None:
    (m,) = buffers
    update = np.sign(0.9 * m + 0.1 * g)
    m[...] = 0.99 * m + 0.01 * g
    p -= 0.01 * update * (update * g > 0)


# --- a heavy ball whose rate is relative to the size of the weights -------------------------------


def relative_ball(p: Tensor, g: Tensor, m: Tensor, *, lr: float, beta: float, over: str) -> None:
    eta = lr * rms(p, over)
    m.mul_(beta).add_(g)
    p.add_(m, alpha=-eta)


def relative_ball_oracle(p: Array, g: Array, buffers: list[Array], t: int) -> None:
    (m,) = buffers
    m[...] = 0.9 * m + g
    p -= 0.01 * (np.sqrt(np.mean(p**2)) or 1.0) * m


# --- signSGD, which keeps nothing ----------------------------------------------------------------


def bare_sign(p: Tensor, g: Tensor, *, lr: float) -> None:
    p.add_(g.sign(), alpha=-lr)


def bare_sign_oracle(p: Array, g: Array, buffers: list[Array], t: int) -> None:
    p -= 0.01 * np.sign(g)


MOMENTUM = ("momentum",)
HeavyBall = optimizer(heavy_ball, buffers=MOMENTUM, lr=0.01, beta=0.9)
Nesterov = optimizer(nesterov, buffers=MOMENTUM, lr=0.01, beta=0.9)
RmsProp = optimizer(rms_prop, buffers=("square",), lr=0.01, alpha=0.95, eps=1e-6)
Adan = optimizer(
    adan,
    buffers=("m", "v", "n", "last"),
    lr=0.01,
    beta1=0.98,
    beta2=0.92,
    beta3=0.99,
    eps=1e-8,
    weight_decay=0.02,
)
SoftLion = optimizer(
    soft_lion, buffers=MOMENTUM, bounds={"width": (1e-12, 1e12)}, lr=0.01, beta1=0.9, beta2=0.99, width=0.3
)
CautiousDecay = optimizer(
    cautious_decay, buffers=MOMENTUM, lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.1
)
CautiousMask = optimizer(cautious_mask, buffers=MOMENTUM, lr=0.01, beta1=0.9, beta2=0.99)
RelativeBall = optimizer(relative_ball, buffers=MOMENTUM, lr=0.01, beta=0.9, over="rms")
BareSign = optimizer(bare_sign, lr=0.01)
OWN: dict[Any, Oracle] = {
    HeavyBall: heavy_ball_oracle,
    Nesterov: nesterov_oracle,
    RmsProp: rms_prop_oracle,
    Adan: adan_oracle,
    SoftLion: soft_lion_oracle,
    CautiousDecay: cautious_decay_oracle,
    CautiousMask: cautious_mask_oracle,
    RelativeBall: relative_ball_oracle,
    BareSign: bare_sign_oracle,
}
# Bit for bit the plain step, on a CPU too: no root, quotient or tanh, of which torch's vector library has
# others.
SMOOTH = {RmsProp, Adan, SoftLion, RelativeBall}
