"""``minisign probe``: gradients, curvature, saturation and head of a model, as numbers and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisign import theory
from minisign.doctor.pretrained import IGNORED, Example, Subject
from minisign.lab.files import write_json, write_whole
from minisign.probes import (
    NEAR,
    equal_share_groups,
    extremes,
    head_size,
    heterogeneity,
    layer_blocks,
    loss_by_group,
    saturated_rows,
    tensor_blocks,
)

BLOCKS = {"layers": layer_blocks, "tensors": tensor_blocks}


def examine(
    subject: Subject,
    batches: Sequence[Example],
    ids: Sequence[int],
    blocks: str = "layers",
    products: int = 0,
    weight_decay: float | None = None,
) -> dict[str, Any]:
    """Measures a model on some batches.

    Args:
        subject: the model.
        batches: from :func:`~minisign.doctor.pretrained.examples`.
        ids: the whole text, for how frequent each token is.
        blocks: ``"layers"`` or ``"tensors"``.
        products: Hessian-vector products for each block, at most; 0 measures no curvature.
        weight_decay: λ that the model was trained with, where it is known.

    Returns:
        ``model``, ``parameters``, ``loss`` in nats, ``loss_by_frequency`` (tenths of the text, the most
        frequent tokens first), ``heterogeneity`` (see :func:`~minisign.probes.heterogeneity`; the curvature
        is that of the first batch) and ``matrices``, see :func:`matrix`, of the embedding and, unless they
        are one, of the head. Strict JSON: None for what cannot be said.

    Raises:
        ValueError: unknown blocks, a λ that is not positive, or a loss that is not finite.
    """
    if blocks not in BLOCKS:
        raise ValueError(f"unknown blocks {blocks!r}: choose from {', '.join(BLOCKS)}")
    if products < 0:
        raise ValueError(f"curvature takes 0 products or more, got {products}")
    if weight_decay is not None and not 0 < weight_decay < np.inf:
        raise ValueError(f"weight decay must be positive and finite, got {weight_decay}")
    with torch.no_grad():
        losses = torch.cat([subject.losses(batch) for batch in batches])
    targets = torch.cat([target for _, target in batches])
    at = (targets != IGNORED).numpy()
    each = losses.double().numpy()[at]
    if not np.isfinite(each).all():
        raise ValueError(f"the model's loss is {each.mean()} on this text")
    shares = np.bincount(ids, minlength=len(subject.embedding)) / len(ids)
    by_frequency = loss_by_group(each, targets.numpy()[at], equal_share_groups(shares))
    tied = subject.head is subject.embedding
    matrices = {"embedding = head" if tied else "embedding": subject.embedding}
    if not tied:
        matrices["head"] = subject.head
    found = heterogeneity(
        subject.loss,
        batches,
        BLOCKS[blocks](subject.model),
        hessian_batches=1 if products else 0,
        products=max(products, 1),
    )
    return {
        "model": subject.name,
        "parameters": found["parameters"],
        "batches": len(batches),
        "windows": len(targets),
        "predicted": int(at.sum()),
        "loss": float(each.mean()),
        "loss_by_frequency": {k: None if np.isnan(v) else v for k, v in by_frequency.items()},
        "heterogeneity": {
            **found,
            "disparity": {k: v if np.isfinite(v) else None for k, v in found["disparity"].items()},
        },
        "matrices": {name: matrix(weight, weight_decay) for name, weight in matrices.items()},
    }


@torch.no_grad()
def matrix(weight: Tensor, weight_decay: float | None = None) -> dict[str, Any]:
    """How large a matrix [V, D] is, how much of it is near its bound, and how much its rows have in common.

    Returns:
        ``smallest`` and ``largest`` entry, ``rms``; ``bound``, 1/λ, or, where λ is not known, the largest
        |entry|, which ``bound_is`` tells; ``near``, the share of the components beyond 0.8 of it, and
        ``rows``, how many rows have more than a tenth of theirs there; ``norm``, Frobenius;
        ``common_mode``, from 0 to 1.

    Raises:
        ValueError: entries that are not finite, or all zero.
    """
    low, high = extremes(weight)
    largest = max(-low, high)
    if not (np.isfinite(largest) and largest > 0):
        raise ValueError(f"a matrix with entries from {low} to {high} cannot be measured")
    bound = largest if weight_decay is None else theory.bound(weight_decay)
    return {
        "smallest": low,
        "largest": high,
        "rms": float(weight.float().square().mean().sqrt()),
        "bound": bound,
        "bound_is": "the largest entry" if weight_decay is None else "1/λ",
        "near": float((weight.abs() > NEAR * bound).double().mean()),
        "rows": int(saturated_rows(weight, bound).sum()),
        **head_size(weight),
    }


def write_examination(out: Path, found: dict[str, Any], subject: Subject, title: str) -> list[Path]:
    """``probe.json`` and ``probe.png`` in ``out``; each appears whole or not at all."""
    from minisign import plots  # matplotlib takes a second to load

    components = {
        name: (weight.detach() / found["matrices"][name]["bound"]).float().numpy().ravel()
        for name, weight in zip(found["matrices"], (subject.embedding, subject.head), strict=False)
    }
    figure = plots.examination(
        found["heterogeneity"]["blocks"], components, found["loss_by_frequency"], title
    )
    files = [out / "probe.json", out / "probe.png"]
    write_whole(files[0], lambda path: write_json(path, found))
    write_whole(files[1], lambda path: plots.save(figure, path))
    return files
