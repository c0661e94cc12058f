"""Parameter groups by what a tensor is for, read from the module that owns it, never from its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
KINDS = ("embedding", "matrix", "bias", "norm", "head")


def param_groups(
    model: nn.Module, *, output: nn.Module | None = None, **options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The parameters of ``model`` in groups for any optimizer, each with its ``kind``.

    =========== ====================================================================================
    embedding   weights of ``nn.Embedding`` and ``nn.EmbeddingBag``; a matrix that the output layer
                shares (tied embeddings) is here, and only here
    head        the weight of the output layer
    norm        the weight of a normalization layer
    bias        biases, those of norms too, and every other tensor with fewer than two dimensions
    matrix      the rest
    =========== ====================================================================================

    Parameters that do not require a gradient are left out, and so are groups without parameters.

    Args:
        model: the model; its own normalization classes count if their class name ends in ``Norm``.
        output: the output layer. Without it, the last ``nn.Linear`` among the direct children of
            ``model``, where there is one.
        options: for a kind, the options of its group: ``embedding={"lazy": "grad"}``.

    Returns:
        A list of ``{"kind": …, "params": [(name, parameter), …], **options}``, in the order above.

    Raises:
        ValueError: an unknown kind. TypeError: options that are not a mapping.
    """
    for kind, given in options.items():
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}: choose from {', '.join(KINDS)}")
        if not isinstance(given, Mapping):
            raise TypeError(f"the options of {kind!r} must be a mapping, got {given!r}")
    if output is None:
        linear = [m for m in model.children() if isinstance(m, nn.Linear)]
        output = linear[-1] if linear else None

    members: dict[str, list[tuple[str, nn.Parameter]]] = {kind: [] for kind in KINDS}
    seen: set[int] = set()
    for name, parameter, module in sorted(_owned(model), key=lambda x: not isinstance(x[2], EMBEDDINGS)):
        if id(parameter) not in seen and parameter.requires_grad:
            members[_kind(name, parameter, module, output)].append((name, parameter))
        seen.add(id(parameter))
    return [
        {"kind": kind, "params": members[kind], **options.get(kind, {})}
        for kind in ("embedding", "head", "norm", "bias", "matrix")
        if members[kind]
    ]


def _owned(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            yield name, parameter, module


def _kind(name: str, parameter: nn.Parameter, module: nn.Module, output: nn.Module | None) -> str:
    if isinstance(module, EMBEDDINGS):
        return "embedding"
    if isinstance(module, NORMS) or type(module).__name__.endswith("Norm"):
        return "bias" if name.split(".")[-1] == "bias" else "norm"
    if parameter.dim() < 2:
        return "bias"
    return "head" if module is output else "matrix"
