"""Which rows of an embedding took part since the last step: what ``lazy="ids"`` reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from minisign.engine.shards import first_row, groups_of, is_sharded, local


@dataclass
class _Record:
    mask: Tensor  # [V]: rows looked up since the optimizer's last step, on this process
    groups: list[Any]  # process groups over which it is united before a step
    steps: int = 0  # that have read it

    def is_of(self, weight: Tensor) -> bool:
        """Whether it is, still: a weight may get other data."""
        return len(self.mask) == len(weight) and self.mask.device == weight.device


# Weak, so that a model that is gone leaves nothing behind; here and not on the parameter, so that copies
# and checkpoints of a model carry no bookkeeping.
_LOOKED_UP = WeakTensorKeyDictionary()
# Within a forward pass a sharded module has a whole weight, which is not the optimizer's parameter.
_SHARDED: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


class TrackedRows:
    """Handle of :func:`track_rows`; :meth:`remove` ends the recording."""

    def __init__(self, embeddings: list[nn.Embedding | nn.EmbeddingBag], process_group: Any) -> None:
        self._weights = {e: e.weight for e in embeddings}
        self._hooks = [e.register_forward_hook(_record, with_kwargs=True) for e in embeddings]
        for e in embeddings:
            record = _record_of(e.weight)
            if is_sharded(e.weight):
                _SHARDED[e] = e.weight
                record.groups = groups_of(e.weight)
            elif process_group is not None:
                record.groups = [process_group]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for e, weight in self._weights.items():
            _SHARDED.pop(e, None)
            _LOOKED_UP.pop(weight, None)


def track_rows(module: nn.Module, process_group: Any = None) -> TrackedRows:
    """Records which rows of an embedding the forward passes look up, for optimizers with ``lazy="ids"``.

    Rows add up over all forward passes that will be differentiated (so evaluation under
    ``torch.no_grad()`` records nothing) until an optimizer steps on the weight. The row of
    ``padding_idx`` never gets a gradient and is never recorded.

    Where several processes train one model, a row counts that one of them looked up. That is known of
    ``DistributedDataParallel``, whether it was there before or not, and of what ``fully_shard`` has sharded
    before. A step is refused on a gradient of rows that were not recorded: the weight of a tied head has
    others, and so has one that something else reads (``F.embedding``, ``weight[ids]``).

    Args:
        module: an ``nn.Embedding`` or ``nn.EmbeddingBag``, or a module that contains some: all are
            tracked.
        process_group: of processes that average their gradients otherwise.

    Raises:
        TypeError: ``module`` is not a module, or holds no embedding.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"track_rows needs an nn.Embedding or a module that has one, got {module!r}")
    embeddings = [m for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    if not embeddings:
        raise TypeError(f"track_rows found no nn.Embedding in {type(module).__name__}")
    if isinstance(module, nn.parallel.DistributedDataParallel):
        process_group = process_group or module.process_group
    return TrackedRows(embeddings, process_group)


def take_rows(weight: Tensor) -> Tensor:
    """Indices [U] of the rows of ``weight`` recorded since the last call, which it forgets; of the rows of
    this process, where they are shared out."""
    rows: Tensor = recorded_rows(weight).nonzero().squeeze(1)
    _tracked(weight).mask.zero_()
    return rows


def forget_rows(weight: Tensor, unless: Tensor | None = None) -> None:
    """Ends the record of ``weight``; not where ``unless`` [1] is not 0 (a step that was not made)."""
    mask = _tracked(weight).mask
    if unless is None:
        mask.zero_()
    else:
        mask.logical_and_(unless.to(mask.device) != 0)


def recorded_rows(weight: Tensor) -> Tensor:
    """Mask [V] of the rows of ``weight`` recorded since a step, itself, not a copy; of a sharded one, its
    part for this process's rows."""
    mask = _tracked(weight).mask
    if not is_sharded(weight):
        return mask
    start = first_row(weight)
    return mask[start : start + len(local(weight))]


def unite_rows(weights: Iterable[Tensor]) -> None:
    """Counts what other processes have recorded as well."""
    for record in map(_tracked, weights):
        for group in record.groups:
            torch.distributed.all_reduce(
                record.mask.view(torch.uint8), torch.distributed.ReduceOp.MAX, group=group
            )


def check_rows(weights: Iterable[Tensor]) -> None:
    """Whether gradients are of recorded rows only. To look at all rows takes as long as a step on them, so
    that is done at the first steps, and then at ever fewer: the 1st, 2nd, 4th, 8th, …

    Raises:
        RuntimeError: a row outside the record has a gradient, which the step would throw away.
    """
    for weight in weights:
        record, g = _tracked(weight), weight.grad
        record.steps += 1
        if g is None or g.layout != torch.strided or record.steps & (record.steps - 1):
            continue
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            continue
        lost = (local(g).ne(0).flatten(1).any(1) & ~recorded_rows(weight)).nonzero()
        if len(lost):
            raise RuntimeError(
                f"lazy='ids' would throw away the gradient of row {int(lost[0]) + first_row(weight)} of a "
                f"parameter of shape {tuple(weight.shape)}: no tracked embedding looked it up since the "
                "last step. What else the weight is used for, a tied head or F.embedding, is not recorded, "
                "nor what a model compiled before track_rows does, nor what other processes look up that "
                "average gradients without DistributedDataParallel (process_group=). lazy='grad' takes all"
            )


def _tracked(weight: Tensor) -> _Record:
    record: _Record | None = _LOOKED_UP.get(weight)
    if record is None:
        raise RuntimeError(
            f"lazy='ids' needs recorded rows, but nothing tracks the parameter of shape "
            f"{tuple(weight.shape)}: call minisign.track_rows(embedding) before training"
        )
    if not record.is_of(weight):
        raise ValueError(
            f"rows were recorded of {len(record.mask)} rows on {record.mask.device}, and the parameter has "
            f"shape {tuple(weight.shape)} on {weight.device} now: make a forward pass before the step"
        )
    return record


def _record_of(weight: Tensor) -> _Record:
    record: _Record | None = _LOOKED_UP.get(weight)
    if record is None or not record.is_of(weight):
        mask = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        record = _LOOKED_UP[weight] = _Record(mask, [] if record is None else record.groups)
    return record


def _active_parallel() -> Any:
    """The DistributedDataParallel whose forward pass this is, if any."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return nn.parallel.DistributedDataParallel._get_active_ddp_module()


def _record(module: Any, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
    if not output.requires_grad:
        return
    record = _record_of(_SHARDED.get(module, module.weight))
    mask = record.mask
    if not record.groups and (parallel := _active_parallel()) is not None:
        record.groups = [parallel.process_group]
    padding = slice(0) if module.padding_idx is None else module.padding_idx
    before = mask[padding].clone()
    mask[(args[0] if args else named["input"]).detach().reshape(-1)] = True
    mask[padding] = before
