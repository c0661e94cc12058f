"""Several optimizers behind one face: say AdamW for the embeddings and Lion for the rest.

The cure that the author of Lion gave for the embedding blow-up, as kexue.fm/archives/9736 tells.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torchs

from minisign.engine.exact import ExactOptimizer, check_new
from minisign.engine.released import NO_SCALER


class Hybrid(ExactOptimizer):
    """One ``step``, one ``zero_grad``, one ``state_dict`` for several optimizers of disjoint parameters.

    ``param_groups`` are those of the members, one after the other, and the very same dictionaries, so
    that learning rate schedulers reach every member. ``state`` is what the members keep, and ``defaults``
    what all of them have.

        Hybrid(AdamW(embeddings), Lion(the_rest))

    Args:
        optimizers: two or more ``torch.optim.Optimizer``, or one list of them.

    Raises:
        TypeError: something that is no optimizer. ValueError: no optimizers, or a parameter in two.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer]) -> None:
        if len(optimizers) == 1 and isinstance(optimizers[0], (list, tuple)):
            optimizers = tuple(optimizers[0])
        if not optimizers:
            raise ValueError("Hybrid needs at least one optimizer, got none")
        for optimizer in optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(f"Hybrid takes torch.optim.Optimizer, got {optimizer!r}")
        self.optimizers: tuple[torch.optim.Optimizer, ...] = optimizers  # type: ignore[assignment]
        seen: set[int] = set()
        for group in self.param_groups:
            check_new(group, seen)
            seen |= {id(p) for p in group["params"]}
        torch.optim.Optimizer.__setstate__(self, {"defaults": self._common()})

    def _common(self) -> dict[str, Any]:
        first, *others = (o.defaults for o in self.optimizers)
        return {name: x for name, x in first.items() if all(name in other for other in others)}

    # What torch.optim.Optimizer keeps in these attributes is the members'.
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for o in self.optimizers for group in o.param_groups]

    @property  # type: ignore[override]
    def state(self) -> MutableMapping[Tensor, Any]:
        return _States(self.optimizers)

    @state.setter
    def state(self, value: MutableMapping[Tensor, Any]) -> None:
        states, value = self.state, dict(value)
        states.clear()
        states.update(value)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "optimizers" in state:  # pickle and deepcopy
            self.optimizers = state["optimizers"]
            super().__setstate__({"defaults": self._common()})
        else:  # the end of load_state_dict: one state and one list of groups, to be dealt out
            groups = iter(state["param_groups"])
            for o in self.optimizers:
                own = [next(groups) for _ in o.param_groups]
                members = [p for group in own for p in group["params"]]
                of_own = {p: state["state"][p] for p in members if p in state["state"]}
                o.__setstate__({"state": defaultdict(dict, of_own), "param_groups": own})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not for a Hybrid: it could not tell which optimizer is meant."""
        raise ValueError(
            "a Hybrid cannot tell which of its optimizers a new group is for: "
            "add it to one of hybrid.optimizers"
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each member, in order; ``closure`` is called once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._step_supports_amp_scaling and getattr(self, "found_inf", None) is not None:
            raise RuntimeError(NO_SCALER)
        with _no_hooks_of_all_optimizers():
            for optimizer in self.optimizers:
                optimizer.step()
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A GradScaler then asks the step, which refuses it; else it divides the gradients before the step.
        return any(group.get("release_grads") for group in self.param_groups)


class _States(MutableMapping[Tensor, Any]):
    """What optimizers keep of their parameters: theirs, not a copy."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers

    def _of(self, p: Tensor) -> MutableMapping[Tensor, Any]:
        """The state in which ``p`` is, or is to be."""
        for o in self._optimizers:
            if p in o.state or any(p is q for group in o.param_groups for q in group["params"]):
                return o.state
        raise KeyError(p)

    def __getitem__(self, p: Tensor) -> Any:
        return self._of(p)[p]  # which makes one that is missing

    def __setitem__(self, p: Tensor, value: Any) -> None:
        self._of(p)[p] = value

    def __delitem__(self, p: Tensor) -> None:
        del self._of(p)[p]

    def __contains__(self, p: object) -> bool:
        return any(p in o.state for o in self._optimizers)

    def get(self, p: Tensor, default: Any = None) -> Any:
        return self._of(p)[p] if p in self else default

    def __iter__(self) -> Iterator[Tensor]:
        return (p for o in self._optimizers for p in o.state)

    def __len__(self) -> int:
        return sum(len(o.state) for o in self._optimizers)

    def __repr__(self) -> str:
        return repr(dict(self))


@contextmanager
def _no_hooks_of_all_optimizers() -> Iterator[None]:
    """They have been called for the whole, and would be for each member again."""
    hooks: list[dict[int, Any]] = [torchs._global_optimizer_pre_hooks, torchs._global_optimizer_post_hooks]
    before = [dict(x) for x in hooks]
    for x in hooks:
        x.clear()
    try:
        yield
    finally:
        for x, old in zip(hooks, before, strict=True):
            x.update(old)
