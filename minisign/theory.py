"""Closed forms: what the measurements are held against. Numbers in, numbers out.

Notation: θ parameter, λ weight decay, η effective step, α the user's learning rate, bound 1/λ.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def bound(weight_decay: float) -> float:
    """1/λ, where sign(m) + λθ = 0: no sign optimizer with decoupled decay leads beyond it."""
    return 1 / weight_decay if weight_decay > 0 else float("inf")


def envelope(etas: ArrayLike, weight_decay: float, start: float = 0.0) -> NDArray[np.float64]:
    """Largest |θ| that a sign optimizer can have reached after each step.

    |θ_t| ≤ 1/λ − (1/λ − |θ_0|) Π(1 − η_i λ), attained by an entry whose sign never changes; for a
    constant η it is 1/λ (1 − (1 − ηλ)ᵗ) from zero, the curve that kexue.fm/archives/9736 leaves to
    the reader.

    Args:
        etas: effective step η at each step [T].
        weight_decay: λ ≥ 0; 0 gives |θ_0| + Ση.
        start: |θ_0|.

    Returns:
        The envelope after each step [T], in the parameter's units.
    """
    steps = np.asarray(etas, dtype=np.float64)
    if weight_decay == 0:
        return np.asarray(start + np.cumsum(steps))
    limit = bound(weight_decay)
    return np.asarray(limit - (limit - start) * np.cumprod(1 - steps * weight_decay))


def logistic_growth(alphas: ArrayLike, weight_decay: float, start: float) -> NDArray[np.float64]:
    """RMS of a row whose entries all saturate together under Tiger's step η = α·RMS(row).

    dr/dt = αr(1 − λr), so r(t) = (1/λ) / (1 + (1/(λ r_0) − 1) e^{−Σα}): exponential at first, which
    is how a run at λ = 0.01 can reach ±100 at all.

    Args:
        alphas: learning rate α at each step [T].
        weight_decay: λ > 0.
        start: r_0 > 0, the row's RMS at the start.

    Returns:
        r after each step [T], in the parameter's units.
    """
    limit = bound(weight_decay)
    grown = np.exp(-np.cumsum(np.asarray(alphas, dtype=np.float64)))
    return limit / (1 + (limit / start - 1) * grown)


def steps_to_reach(share: float, eta: float, weight_decay: float) -> float:
    """Steps at a constant η in which an entry whose sign never changes comes from 0 to ``share`` of 1/λ.

    share = 1 − (1 − ηλ)ᵗ, the envelope turned around.
    """
    return math.log1p(-share) / math.log1p(-eta * weight_decay)


def logistic_steps_to_reach(share: float, alpha: float, weight_decay: float, start: float) -> float:
    """The same under Tiger's step η = α·RMS(row) for a row that begins at an RMS of ``start`` and saturates
    as a whole: (ln(share/(1 − share)) + ln(1/(λ start) − 1)) / α."""
    odds_to_come = bound(weight_decay) / start - 1
    return (math.log(share / (1 - share)) + math.log(odds_to_come)) / alpha


def logistic_delay(alpha: float) -> float:
    """Steps by which a row lags behind :func:`logistic_growth` if its start has nothing to do with the
    signs of its momentum: ln 2/α.

    θ = u·sign + θ_0 with θ_0 at right angles to the signs, so r² = u² + r_0² and du/dt = αr: then
    u = r_0 sinh αt, which soon is half of r_0 e^{αt}.
    """
    return math.log(2) / alpha


def right_sign(signal: float, memory: float) -> float:
    """Probability that the sign of a momentum is that of the mean gradient, for normal gradients.

    m is a sum of past gradients with weights 1, b, b², …: its mean over its standard deviation is
    √((1 + b)/(1 − b)) times that of one gradient, and the probability the normal distribution function of
    that.

    Args:
        signal: mean of the gradient over its standard deviation.
        memory: b in [0, 1), what is left of m from one gradient to the next: β in every-day training and
            for lazy rows whose momentum is frozen, β^τ where it decays over the τ steps in between.
    """
    better = signal * math.sqrt((1 + memory) / (1 - memory))
    return (1 + math.erf(better / math.sqrt(2))) / 2


def kappa(eta: float, weight_decay: float, gap: ArrayLike) -> NDArray[np.float64]:
    """κ = ηλτ: the mean gap τ between two appearances of a token, in units of the 1/(ηλ) steps that an
    entry takes to approach its bound. Beyond ½ the entries of :func:`stationary_density` pile up at ±1."""
    return np.asarray(eta * weight_decay * np.asarray(gap, dtype=np.float64))


def stationary_density(x: ArrayLike, kappa: float) -> NDArray[np.float64]:
    """Density of x = λθ on (−1, 1) for an entry whose sign is drawn afresh at each appearance.

    Both signs are equally likely, and the appearances come at random with a mean gap τ. Between two of
    them dx/dt = ηλ(s − x): a telegraph process that flips at a rate of 1/(2τ). Its stationary density is
    in proportion to (1 − x²)^(1/(2κ) − 1), κ = ηλτ, a Beta distribution stretched to (−1, 1): flat at
    κ = ½, a bell below, two peaks at ±1 above.

    Args:
        x: where, in units of the bound.
        kappa: κ > 0.

    Returns:
        The density at each x, which integrates to 1 over (−1, 1).
    """
    a = 1 / (2 * kappa)
    log_norm = 2 * math.lgamma(a) - math.lgamma(2 * a) + (2 * a - 1) * math.log(2)
    # (1 − x)(1 + x), since 1 − x² cancels near the ends where the mass is.
    inside = (1 - np.asarray(x, dtype=np.float64)) * (1 + np.asarray(x, dtype=np.float64))
    return np.asarray(np.exp((a - 1) * np.log(inside) - log_norm))


def stationary_rms(kappa: float) -> float:
    """RMS of x = λθ under :func:`stationary_density`: √(κ/(1 + κ))."""
    return math.sqrt(kappa / (1 + kappa))


def stationary_share(kappa: float, near: float = 0.8) -> float:
    """Share of the entries with |x| > ``near`` under :func:`stationary_density`.

    With x = tanh u the density becomes sech(u)^(1/κ), smooth on the whole line, where the midpoint rule is
    all but exact.
    """
    width = 0.5 * (40 * kappa + 2)  # sech(u)^(1/κ) < e^-20 beyond
    step = width / 200_000
    u = (np.arange(200_000) + 0.5) * step
    weight = np.exp(-(u + np.log1p(np.exp(-2 * u)) - math.log(2)) / kappa)
    return float(weight[u > math.atanh(near)].sum() / weight.sum())


def steps_to_underflow(start: float, beta: float, smallest: float = 2.0**-126) -> float:
    """Steps without a gradient until a momentum of ``start`` falls below the smallest number that the
    arithmetic keeps: ln(start/smallest)/(−ln β).

    Args:
        start: |m| after the last gradient.
        smallest: 2⁻¹²⁶, the smallest normal number of float32 and bfloat16, where subnormal ones are
            flushed to zero.
    """
    return math.log(start / smallest) / -math.log(beta)


def isolated_adamw_move(lr: float, beta1: float = 0.9, beta2: float = 0.999) -> float:
    """How far one gradient, alone among zeros, moves a weight under AdamW in all, whatever its size.

    lr Σ m_t/√v_t = lr (1 − β₁)/√(1 − β₂) / (1 − β₁/√β₂), once the bias corrections have worn off and as
    long as ε plays no part.
    """
    return lr * (1 - beta1) / math.sqrt(1 - beta2) / (1 - beta1 / math.sqrt(beta2))


def adam_ratio_std(beta1: float, correlation: ArrayLike = 0.0) -> NDArray[np.float64]:
    """Standard deviation of Adam's r = m̂/√v̂ for gradients of mean zero, if v hardly varies (β₂ near 1).

    √((1 − β₁)/(1 + β₁) · (1 + β₁ρ)/(1 − β₁ρ)): the variance of an average with weights (1 − β₁)β₁ʲ over
    that of one gradient, if two gradients j steps apart have a correlation of ρʲ. With ρ = 0 that of arXiv
    2304.09871.

    Args:
        beta1: β₁.
        correlation: ρ in (−1, 1] of successive gradients; any shape.
    """
    rho = np.asarray(correlation, dtype=np.float64)
    return np.asarray(np.sqrt((1 - beta1) / (1 + beta1) * (1 + beta1 * rho) / (1 - beta1 * rho)))


def adam_ratio_std_with_mean(beta1: float, correlation: ArrayLike) -> NDArray[np.float64]:
    """The same if successive gradients are alike since each has the same mean over time, and noise on it
    that is independent: √(ρ + (1 − ρ)(1 − β₁)/(1 + β₁)).

    An entry's mean μ and noise σ give a cosine of successive gradients of ρ = μ²/(μ² + σ²), of which an
    average over time keeps the mean whole. The standard deviation is that over entries, whose means have
    either sign.

    Args:
        beta1: β₁.
        correlation: ρ in [0, 1], the cosine of successive gradients; any shape.
    """
    rho = np.asarray(correlation, dtype=np.float64)
    return np.asarray(np.sqrt(rho + (1 - rho) * (1 - beta1) / (1 + beta1)))


def adam_largest_ratio(beta1: float, beta2: float, steps: float = math.inf) -> float:
    """Largest |r| that Adam can come to in so many steps, whatever the gradients.

    m̂ = (1 − β₁)/(1 − β₁ᵗ) Σ β₁ʲ g_j and v̂ likewise, so by Cauchy and Schwarz
    |r| ≤ (1 − β₁)/(1 − β₁ᵗ) · √((1 − β₂ᵗ)/(1 − β₂)) · √(Σ_{j<t} (β₁²/β₂)ʲ), attained by gradients in
    proportion to (β₁/β₂)ʲ, j steps back: a burst that grows. 1 for the first step.

    Args:
        beta1, beta2: with β₁² < β₂ unless ``steps`` is finite.
        steps: t.

    Raises:
        ValueError: β₁² ≥ β₂ and no end of steps: there is no bound.
    """
    q = beta1**2 / beta2
    if steps == math.inf:
        if q >= 1:
            raise ValueError(f"beta1 {beta1} and beta2 {beta2}: without β₁² < β₂ the ratio has no bound")
        return (1 - beta1) / math.sqrt((1 - beta2) * (1 - q))
    total = steps if q == 1 else (1 - q**steps) / (1 - q)
    corrections = math.sqrt((1 - beta2**steps) / (1 - beta2)) / (1 - beta1**steps)
    return (1 - beta1) * corrections * math.sqrt(total)


def box(weight_decay: float, largest_ratio: float = 1.0) -> float:
    """R/λ: no entry of θ ← θ − η(r + λθ) leaves ±R/λ if |r| ≤ R, ηλ ≤ 1 and it started inside.

    Since |θ'| ≤ (1 − ηλ)|θ| + ηR. For Lion and the other sign methods R = 1, and it is :func:`bound`. For
    AdamW R is :func:`adam_largest_ratio`; while v keeps up with the gradients |r| ≤ 1, so that AdamW too
    ends in ±1/λ (Xie and Li, arXiv 2404.04454).
    """
    return largest_ratio * bound(weight_decay)


def tied_initial_loss(vocab_size: int, width: int, std: float, position_std: float = 0.0) -> float:
    """Loss at the start, in nats, of a model whose output matrix is its embedding, without a half-swap.

    The final norm of a pre-norm model turns e + p into h = (e + p)/√(σ² + σ_p²), so a token's own logit is
    ⟨h, e⟩ ≈ Dσ²/√(σ² + σ_p²) (Dσ without positions) and the others are N(0, Dσ²): the loss of any other
    token is about log(e^own + (n − 1) e^(Dσ²/2)). After the half-swap, as without tying, no logit stands
    out and it is log n + Dσ²/2. kexue.fm/archives/9698, with the positions and the others' spread added.
    """
    own = width * std**2 / math.hypot(std, position_std)
    others = math.log(vocab_size - 1) + width * std**2 / 2
    return float(np.logaddexp(own, others))


def mean_gap(share: ArrayLike, draws: int) -> NDArray[np.float64]:
    """τ: mean number of steps from one batch with a token to the next, 1/(1 − (1 − p)ⁿ).

    Args:
        share: p, how large a share of the text the token is; any shape; 0 gives infinity.
        draws: n tokens in a batch, taken as independent.
    """
    with np.errstate(divide="ignore"):
        present = -np.expm1(draws * np.log1p(-np.asarray(share, dtype=np.float64)))
        return np.asarray(1 / present)


def expected_seen(probabilities: ArrayLike, draws: int, times: int) -> float:
    """Expected number of kinds that turn up exactly ``times`` times among ``draws`` independent draws:
    Σ_k e^{−n p_k} (n p_k)^j / j!, Poisson's approximation.

    Args:
        probabilities: p_k of each kind [n].
        draws: n.
        times: j.
    """
    rate = draws * np.asarray(probabilities, dtype=np.float64)
    log_factorial = math.lgamma(times + 1)
    with np.errstate(divide="ignore"):
        logs = times * np.log(rate) if times else np.zeros_like(rate)
    return float(np.exp(logs - rate - log_factorial).sum())


def gradient_descent_bound(lr: float, gradient_norm: float, curvature: float) -> float:
    """What a step of gradient descent changes the loss by, at most: −η‖g‖²(1 − ηΛ_G/2).

    From ΔL = −η gᵀg + ½η² gᵀHg with a block-diagonal Hessian, whose blocks give gᵀHg ≤ Σ_b ‖H_b‖‖g_b‖² =
    Λ_G‖g‖². Exact for quadratics; after arXiv 2502.00213, which has it for losses with a bounded third
    derivative.

    Args:
        lr: η.
        gradient_norm: ‖g‖, the 2-norm.
        curvature: Λ_G, :func:`minisign.probes.gradient_weighted`.
    """
    return -lr * gradient_norm**2 * (1 - lr * curvature / 2)


def sign_descent_bound(lr: float, gradient_l1: float, parameters: int, curvature: float) -> float:
    """What a step of sign descent changes the loss by, at most: −η‖g‖₁ + ½η²PΛ_P.

    As :func:`gradient_descent_bound`, with sign(g)ᵀH sign(g) ≤ Σ_b ‖H_b‖P_b = PΛ_P.

    Args:
        lr: η.
        gradient_l1: ‖g‖₁, the 1-norm.
        parameters: P, entries in all.
        curvature: Λ_P, :func:`minisign.probes.size_weighted`.
    """
    return -lr * gradient_l1 + lr**2 * parameters * curvature / 2


def best_gradient_step(gradient_norm: float, curvature: float) -> tuple[float, float]:
    """The rate at which :func:`gradient_descent_bound` is lowest, 1/Λ_G, and the bound there,
    −‖g‖²/2Λ_G."""
    return 1 / curvature, -(gradient_norm**2) / (2 * curvature)


def best_sign_step(gradient_l1: float, parameters: int, curvature: float) -> tuple[float, float]:
    """The rate at which :func:`sign_descent_bound` is lowest, ‖g‖₁/PΛ_P, and the bound there,
    −‖g‖₁²/2PΛ_P."""
    return gradient_l1 / (parameters * curvature), -(gradient_l1**2) / (2 * parameters * curvature)


def rare_class_gradient_descent(share: ArrayLike, classes: int, time: ArrayLike) -> NDArray[np.float64]:
    """Loss of a class under gradient flow on a softmax with one-hot inputs.

    Input k is always labelled k, and the weights start at zero. Then all other logits of input k are equal,
    and the margin z of the right one over them follows dz/dt = πc/(e^z + c − 1), so that

        e^z − 1 + (c − 1) z = πct,        ℓ = log(1 + (c − 1) e^−z),

    and for large t, ℓ → (1 − 1/c)/πt: a class ten times as rare takes ten times as long. That limit is from
    Kunstner et al., arXiv 2402.19449; the law itself is derived here.

    Args:
        share: π, how large a share of the samples the class has; any shape.
        classes: c ≥ 2.
        time: t, learning rate times steps; broadcast with ``share``.

    Returns:
        ℓ in nats.
    """
    target = classes * np.asarray(share, dtype=np.float64) * np.asarray(time, dtype=np.float64)
    # Left of the root the convex function would overshoot; from log(1 + target) Newton comes down to it.
    z = np.log1p(target)
    for _ in range(100):
        step = (np.expm1(z) + (classes - 1) * z - target) / (np.exp(z) + classes - 1)
        z = z - step
        if np.all(np.abs(step) <= 1e-12 * (1 + np.abs(z))):
            break
    return np.asarray(np.log1p((classes - 1) * np.exp(-z)))


def rare_class_sign_descent(classes: int, travelled: ArrayLike) -> NDArray[np.float64]:
    """The same under sign descent: ℓ = log(1 + (c − 1) e^−2s), whatever the share of the class.

    The right logit rises by η at each step and all others fall by it. After arXiv 2402.19449.

    Args:
        classes: c ≥ 2.
        travelled: s, the sum of the learning rates so far; any shape.

    Returns:
        ℓ in nats.
    """
    return np.asarray(np.log1p((classes - 1) * np.exp(-2 * np.asarray(travelled, dtype=np.float64))))
