"""The optimizers again, in NumPy and float64, written from the papers' equations.

Nothing of minisign is imported here, and the form is another one: every step works on whole arrays and
puts untouched rows back afterwards, averages micro-batches before anything else where it can, and
spells β m + (1 − β) g out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray


def rms(x: Array, axes: tuple[int, ...] | None = None) -> Array:
    if x.size == 0:
        return np.array(1.0)
    size = np.sqrt(np.mean(x * x, axis=axes, keepdims=axes is not None))
    return np.where(size == 0, 1.0, size)


class Oracle:
    """One parameter array and its history. ``step(g)`` takes a gradient."""

    def __init__(self, name: str, theta: Array, **options: Any) -> None:
        self.name, self.o = name, options
        self.theta = np.array(theta, dtype=np.float64)
        self.m = np.zeros_like(self.theta)
        self.v = np.zeros_like(self.theta)
        self.t = 0
        self.touched = np.zeros(len(self.theta) if self.theta.ndim else 0, dtype=bool)
        # Entries whose sign hung on rounding at some step; in float32 they are counted apart.
        self.doubtful = np.zeros(self.theta.shape, dtype=bool)

    def step(self, g: Array) -> None:
        g = np.array(g, dtype=np.float64)
        if self.o.get("maximize"):
            g = -g
        before = self.theta.copy(), self.m.copy(), self.v.copy()
        lazy = self.o.get("lazy", False)
        acting = None
        if lazy:
            acting = np.zeros(len(g), dtype=bool)
            acting[[i for i in range(len(g)) if (g[i] != 0).any()]] = True
        getattr(self, self.name)(g, acting)
        if lazy:
            last = self.name != "tiger" or (self.t + 1) % self.o["accumulate"] == 0
            everyone = acting | self.touched if self.name == "tiger" and last else acting
            self.theta[~everyone] = before[0][~everyone]
            if self.o.get("lazy_momentum", "freeze") == "freeze":
                self.m[~everyone] = before[1][~everyone]
                self.v[~everyone] = before[2][~everyone]
            elif not last:
                self.m[~everyone] = before[1][~everyone]
            self.touched = (self.touched | acting) & (not last)
        self.t += 1

    def _sign(self, x: Array, *parts: Array) -> Array:
        scale = np.maximum.reduce([np.abs(p) for p in parts])
        self.doubtful |= (x != 0) & (np.abs(x) < 1e-6 * scale)
        return np.sign(x)

    def signum(self, g: Array, acting: Array | None) -> None:
        b, lr, wd = self.o["beta"], self.o["lr"], self.o["weight_decay"]
        parts = b * self.m, (1 - b) * g
        self.m = parts[0] + parts[1]
        self.theta = self.theta - lr * (self._sign(self.m, *parts) + wd * self.theta)

    def lion(self, g: Array, acting: Array | None) -> None:
        (b1, b2), lr, wd = self.o["betas"], self.o["lr"], self.o["weight_decay"]
        parts = b1 * self.m, (1 - b1) * g
        update = self._sign(parts[0] + parts[1], *parts)
        self.theta = self.theta - lr * (update + wd * self.theta)
        self.m = b2 * self.m + (1 - b2) * g

    def adamw(self, g: Array, acting: Array | None) -> None:
        (b1, b2), lr, wd = self.o["betas"], self.o["lr"], self.o["weight_decay"]
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        n = self.t + 1
        m_hat, v_hat = self.m / (1 - b1**n), self.v / (1 - b2**n)
        self.theta = self.theta - lr * wd * self.theta
        self.theta = self.theta - lr * m_hat / (np.sqrt(v_hat) + self.o["eps"])

    def tiger(self, g: Array, acting: Array | None) -> None:
        b, k, s, c = (self.o[x] for x in ("beta", "accumulate", "shrink", "center"))
        seen = g if acting is None else g[acting]
        last = (self.t + 1) % k == 0
        if not np.isfinite(seen).all():
            self.theta = (self.theta - c) * s + c
            return
        if acting is None:
            decay = b if self.t % k == 0 else 1.0
        else:  # the first micro-batch of the cycle that touches a row decays it
            first = (acting | last) & ~self.touched
            decay = np.where(first, b, 1.0).reshape(-1, *[1] * (g.ndim - 1))
        parts = decay * self.m, (1 - b) / k * np.nan_to_num(g)
        self.m = parts[0] + parts[1]
        if not last:
            return
        scale, wd = self.o["scale"], self.o["weight_decay"]
        if isinstance(scale, str) and self.theta.ndim < 2:
            scale, wd = 0.5, 0.0
        elif scale == "rms":
            scale = rms(self.theta)
        elif scale == "row_rms":
            scale = rms(self.theta, tuple(range(1, self.theta.ndim)))
        eta = self.o["lr"] * scale
        self.theta = self.theta - eta * (self._sign(self.m, *parts) + wd * self.theta)
