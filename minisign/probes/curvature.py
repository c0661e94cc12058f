"""The loss's curvature in each block, and Λ: the mean of it by gradient and by number of parameters.

Tomihari and Sato (arXiv 2502.00213) bound what a step can gain by the blocks' Hessians H_b. Their code
takes PyHessian's power iteration (100 products at most, until the eigenvalue changes by less than a
thousandth) on one mini-batch, in evaluation mode, and keeps the first *positive* eigenvalue that it meets.
The bounds ask for the spectral norm ‖H_b‖, so what is kept here is the eigenvalue of the largest magnitude,
with its sign told and how well it has converged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minisign.probes.blocks import Blocks


@dataclass(frozen=True)
class Curvature:
    """A block's Hessian, as far as power iteration knows it.

    Attributes:
        norm: ‖H_b‖, the largest |eigenvalue|, from below: ‖Hv‖ of the last unit vector v, which no product
            makes smaller. Loss per squared unit of the parameter.
        eigenvalue: vᵀHv, which has its sign. Where the largest positive and negative eigenvalues are about
            as large it may be anything between them.
        residual: ‖Hv − (vᵀHv)v‖ / ‖Hv‖: there is an eigenvalue within this share of ``norm`` of
            ``eigenvalue``.
        products: how many Hessian-vector products were formed.
        converged: whether the last one changed the norm by less than the tolerance.
    """

    norm: float
    eigenvalue: float
    residual: float
    products: int
    converged: bool


def block_curvatures(
    loss: Callable[[], Tensor],
    blocks: Blocks,
    tolerance: float = 1e-3,
    products: int = 100,
    seed: int = 0,
) -> dict[str, Curvature]:
    """The top eigenvalue of the Hessian in each block, by power iteration on Hessian-vector products.

    The Hessian is never formed; one product costs about two backward passes. ``.grad`` and torch's global
    generators stay as they are, the model is used in the mode it is in. Attention is computed by its plain
    formula meanwhile, since fused kernels have no second derivative.

    Args:
        loss: a scalar; called once.
        blocks: from :func:`~minisign.probes.tensor_blocks` or :func:`~minisign.probes.layer_blocks`.
        tolerance: relative change of the norm below which a block is done.
        products: at most so many for each block.
        seed: of the vectors to start from.

    Raises:
        ValueError: a tolerance that is not positive, fewer than one product, or a Hessian that is not
            finite, with the block's name.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    if products < 1:
        raise ValueError(f"products must be 1 or more, got {products}")
    parameters = [p for block in blocks.values() for p in block]
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        grads = torch.autograd.grad(
            loss(), parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        found, at = {}, 0
        for name, block in blocks.items():
            own = grads[at : at + len(block)]
            found[name] = _power_iteration(name, own, list(block), tolerance, products, seed)
            at += len(block)
    return found


def _power_iteration(
    name: str,
    grads: tuple[Tensor, ...],  # of the block, with their graph
    block: list[torch.nn.Parameter],
    tolerance: float,
    products: int,
    seed: int,
) -> Curvature:
    generator = torch.Generator().manual_seed(seed)
    v = [torch.randn(p.shape, generator=generator).to(p) for p in block]
    torch._foreach_div_(v, _norm(v))
    curved = any(g.requires_grad for g in grads)  # else the loss is linear in the block
    before = 0.0
    for product in range(1, products + 1):
        hv = list(
            torch.autograd.grad(
                grads, block, v, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            if curved
            else [torch.zeros_like(p) for p in block]
        )
        norm = _norm(hv)
        if not np.isfinite(norm):
            raise ValueError(f"the Hessian of {name} is not finite")
        if norm == 0:
            return Curvature(0.0, 0.0, 0.0, product, True)
        eigenvalue = float(sum((a.double() * b).sum() for a, b in zip(v, hv, strict=True)))
        # ‖Hv − μv‖² = ‖Hv‖² − μ² for a unit vector v and μ = vᵀHv
        residual = max(0.0, 1 - (eigenvalue / norm) ** 2) ** 0.5
        converged = abs(norm - before) < tolerance * norm
        if converged:
            break
        before = norm
        v = list(torch._foreach_div(hv, norm))
    return Curvature(norm, eigenvalue, residual, product, converged)


def _norm(tensors: list[Tensor]) -> float:
    # Detached: zeros that autograd makes for an unused block ask for a gradient.
    return float(torch.stack([n.detach().double() for n in torch._foreach_norm(tensors)]).norm())


def gradient_weighted(norms: Mapping[str, float], curvature: Mapping[str, float]) -> float:
    """Λ_G = Σ_b (‖g_b‖²/‖g‖²)‖H_b‖: the curvature where the gradient is, which limits gradient descent.

    Args:
        norms: ‖g_b‖ of the full gradient by block, not all zero.
        curvature: ‖H_b‖ by block.

    Raises:
        ValueError: other blocks in one than in the other, or no gradient at all.
    """
    return _weighted({name: norm**2 for name, norm in norms.items()}, curvature)


def size_weighted(sizes: Mapping[str, int], curvature: Mapping[str, float]) -> float:
    """Λ_P = Σ_b (P_b/P)‖H_b‖: the curvature where the parameters are; P·Λ_P limits sign descent.

    Args:
        sizes: P_b, entries of each block.
        curvature: ‖H_b‖ by block.

    Raises:
        ValueError: other blocks in one than in the other.
    """
    return _weighted(sizes, curvature)


def _weighted(weights: Mapping[str, float], curvature: Mapping[str, float]) -> float:
    if weights.keys() != curvature.keys():
        raise ValueError(f"weights of the blocks {list(weights)}, curvature of {list(curvature)}")
    total = sum(weights.values())
    if not total > 0:
        raise ValueError(f"the weights of the blocks must not be all zero, got {dict(weights)}")
    return float(sum(weight * curvature[name] for name, weight in weights.items()) / total)
