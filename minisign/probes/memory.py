"""What an optimizer keeps, what a training step needs at most, and what operations read and write."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state, counters of one entry left out."""
    return sum(x.numel() * x.element_size() for x in _state(optimizer) if x.numel() > 1)


def _state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor))


class PeakMemory(TorchDispatchMode):
    """Bytes of tensors alive at once, at most, while it is entered; the same on every machine.

        with PeakMemory(model, optimizer) as memory:
            model(x).sum().backward()
            optimizer.step()
        memory.peak, memory.history  # and what was alive after each operation

    What the model, its gradients and the optimizer's state hold counts from the start, and everything that
    an operation of torch returns, as long as something refers to it. What an operation uses within itself
    does not count. On a GPU, ``torch.cuda.max_memory_allocated`` says it with what the allocator adds.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self._model, self._optimizer = model, optimizer
        self._alive: dict[int, int] = {}  # storages, by address, and their bytes
        self.now = 0
        self.peak = 0
        self.history: list[int] = []

    def __enter__(self) -> PeakMemory:
        own = [*self._model.parameters(), *self._model.buffers()]
        for x in (*own, *(p.grad for p in own if p.grad is not None), *_state(self._optimizer)):
            self._count(x)
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x)
        self.history.append(self.now)
        return out

    def _count(self, x: Tensor) -> None:
        if x.layout != torch.strided:
            self._count(x._indices())
            self._count(x._values())
            return
        storage = x.untyped_storage()
        key = storage.data_ptr()
        if key and key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key)


class Traffic(TorchDispatchMode):
    """Bytes that torch's operations read and write while it is entered: ``with Traffic() as traffic: …``.

    Each tensor that an operation is given counts once, and so does each that it returns. What is in a cache
    already counts as well.

    Attributes:
        moved: bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        self.moved += sum(x.numel() * x.element_size() for x in tensors)
        return out
