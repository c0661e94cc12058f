"""Gradient norms, curvature and what follows from both, as one table of plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from minisign.probes.blocks import Blocks
from minisign.probes.curvature import block_curvatures, gradient_weighted, size_weighted
from minisign.probes.gradients import MEASURES, disparity, gradient_norms

Batch = TypeVar("Batch")


def heterogeneity(
    loss: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    blocks: Blocks,
    hessian_batches: int = 1,
    products: int = 100,
) -> dict[str, Any]:
    """How unequal a model's blocks are in gradient and curvature, at its present weights.

    Args:
        loss: mean loss of a batch, a scalar.
        batches: of equal size; the gradient is that of their mean.
        blocks: what to compare.
        hessian_batches: the curvature is that of the mean over the first so many batches; 0, none is
            measured.
        products: of the Hessian with a vector, at most, for each block.

    Returns:
        ``parameters``, ``norm`` and ``norm_l1`` of the full gradient; ``disparity``, by measure (``"gini
        per entry"`` is of the norms over √P_b, for instance); ``lambda_g`` and ``lambda_p`` (see
        :func:`~minisign.probes.gradient_weighted`); and ``blocks``: by name ``parameters``, ``norm``,
        ``norm_l1``, ``norm_by_batch`` (a list) and the fields of :class:`~minisign.probes.Curvature` under
        ``curvature``. Without a Hessian, ``curvature`` and the Λ are None. Loss in the units of ``loss``.

    Raises:
        ValueError: as :func:`~minisign.probes.gradient_norms` and
            :func:`~minisign.probes.block_curvatures`.
    """
    found = gradient_norms(loss, batches, blocks)
    curved = None
    if hessian_batches:
        few = batches[:hessian_batches]
        curved = block_curvatures(
            lambda: torch.stack([loss(batch) for batch in few]).mean(), blocks, products=products
        )
    norms = {name: c.norm for name, c in curved.items()} if curved else None
    return {
        "parameters": sum(found.sizes.values()),
        "norm": sum(norm**2 for norm in found.full.values()) ** 0.5,
        "norm_l1": sum(found.full_l1.values()),
        "disparity": {
            f"{measure}{of}": disparity(found.full, measure, sizes)
            for measure in MEASURES
            for of, sizes in (("", None), (" per entry", found.sizes))
        },
        "lambda_g": gradient_weighted(found.full, norms) if norms else None,
        "lambda_p": size_weighted(found.sizes, norms) if norms else None,
        "blocks": {
            name: {
                "parameters": found.sizes[name],
                "norm": found.full[name],
                "norm_l1": found.full_l1[name],
                "norm_by_batch": found.batch[name].tolist(),
                "curvature": vars(curved[name]) if curved else None,
            }
            for name in blocks
        },
    }
