"""Several optimizers behind one face: say AdamW for the embeddings and Lion for the rest.

The cure that the author of Lion gave for the embedding blow-up, as kexue.fm/archives/9736 tells.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from minisign.engine.exact import ExactOptimizer


class Hybrid(ExactOptimizer):
    """One ``step``, one ``zero_grad``, one ``state_dict`` for several optimizers of disjoint parameters.

    ``param_groups`` are those of the members, one after the other, and the very same dictionaries, so
    that learning rate schedulers reach every member.

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
        super().__init__([group for o in self.optimizers for group in o.param_groups], {})

    # torch.optim.Optimizer keeps its state in this attribute; ours is that of the members.
    @property
    def state(self) -> defaultdict[Tensor, Any]:
        return defaultdict(dict, {p: s for o in self.optimizers for p, s in o.state.items()})

    @state.setter
    def state(self, value: dict[Tensor, Any]) -> None:
        if value:
            raise AttributeError("the state of a Hybrid is that of its optimizers: set it there")

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "optimizers" in state:  # pickle and deepcopy
            self.optimizers = state["optimizers"]
            self.defaults = state["defaults"]
            self.param_groups = []
            super().__setstate__({})
        else:  # the end of load_state_dict: one state and one list of groups, to be dealt out
            groups = iter(state["param_groups"])
            for o in self.optimizers:
                own = [next(groups) for _ in o.param_groups]
                members = [p for group in own for p in group["params"]]
                of_own = {p: state["state"][p] for p in members if p in state["state"]}
                o.__setstate__({"state": defaultdict(dict, of_own), "param_groups": own})
        self.param_groups = [group for o in self.optimizers for group in o.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not for a Hybrid: it could not tell which optimizer is meant."""
        if not any(param_group is group for o in self.optimizers for group in o.param_groups):
            raise ValueError(
                "a Hybrid cannot tell which of its optimizers a new group is for: "
                "add it to one of hybrid.optimizers and build the Hybrid anew"
            )
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each member, in order; ``closure`` is called once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss
