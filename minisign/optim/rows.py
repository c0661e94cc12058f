"""Which rows of an embedding took part since the last step: what ``lazy="ids"`` reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

# weight → mask [V]: rows looked up since the optimizer's last step. Weak, so that a model that is
# gone leaves nothing behind; here and not on the parameter, so that copies and checkpoints of a model
# carry no bookkeeping.
_LOOKED_UP = WeakTensorKeyDictionary()


class TrackedRows:
    """Handle of :func:`track_rows`; :meth:`remove` ends the recording."""

    def __init__(self, embeddings: list[nn.Embedding | nn.EmbeddingBag]) -> None:
        self._embeddings = embeddings
        self._hooks = [e.register_forward_hook(_record) for e in embeddings]
        for e in embeddings:
            _mask(e.weight)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for e in self._embeddings:
            _LOOKED_UP.pop(e.weight, None)


def track_rows(module: nn.Module) -> TrackedRows:
    """Records which rows of an embedding the forward passes look up, for optimizers with ``lazy="ids"``.

    Rows add up over all forward passes that will be differentiated (so evaluation under
    ``torch.no_grad()`` records nothing) until an optimizer steps on the weight. The row of
    ``padding_idx`` never gets a gradient and is never recorded.

    Args:
        module: an ``nn.Embedding`` or ``nn.EmbeddingBag``, or a module that contains some: all are
            tracked.

    Raises:
        TypeError: ``module`` is not a module, or holds no embedding.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"track_rows needs an nn.Embedding or a module that has one, got {module!r}")
    embeddings = [m for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    if not embeddings:
        raise TypeError(f"track_rows found no nn.Embedding in {type(module).__name__}")
    return TrackedRows(embeddings)


def take_rows(weight: Tensor) -> Tensor:
    """Indices [U] of the rows of ``weight`` recorded since the last call, which it forgets."""
    mask = recorded_rows(weight)
    rows: Tensor = mask.nonzero().squeeze(1)
    mask.zero_()
    return rows


def forget_rows(weight: Tensor, unless: Tensor | None = None) -> None:
    """Ends the record of ``weight``; not where ``unless`` [1] is not 0 (a step that was not made)."""
    mask = recorded_rows(weight)
    if unless is None:
        mask.zero_()
    else:
        mask.logical_and_(unless != 0)


def recorded_rows(weight: Tensor) -> Tensor:
    """Mask [V] of the rows of ``weight`` recorded since a step, itself, not a copy."""
    mask: Tensor | None = _LOOKED_UP.get(weight)
    if mask is None:
        raise RuntimeError(
            f"lazy='ids' needs recorded rows, but nothing tracks the parameter of shape "
            f"{tuple(weight.shape)}: call minisign.track_rows(embedding) before training"
        )
    return mask


def _mask(weight: Tensor) -> Tensor:
    mask = _LOOKED_UP.get(weight)
    if mask is None or mask.device != weight.device or len(mask) != len(weight):
        mask = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        _LOOKED_UP[weight] = mask
    return mask


def _record(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
    if not output.requires_grad:
        return
    mask = _mask(module.weight)
    mask[args[0].detach().reshape(-1)] = True
    if module.padding_idx is not None:
        mask[module.padding_idx] = False
