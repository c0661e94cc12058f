"""What an optimizer of torch must do, with two rough edges taken off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from minisign.engine.words import Rule

Group: TypeAlias = dict[str, Any]


class ExactOptimizer(torch.optim.Optimizer):
    """``torch.optim.Optimizer``, but an error about a parameter in two groups says which, and a state
    tensor keeps its dtype when it is loaded, where torch casts it to the parameter's."""

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict) and not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])
        if isinstance(param_group, dict):
            known = {id(p) for group in self.param_groups for p in group["params"]}
            params = param_group["params"]
            names = param_group.get("param_names")
            for i, p in enumerate([params] if isinstance(params, Tensor) else params):
                name, p = p if isinstance(p, tuple) else (names[i] if names else "one", p)
                if id(p) in known:
                    raise ValueError(
                        "some parameters appear in more than one parameter group: "
                        f"{name} of shape {tuple(p.shape)}"
                    )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        loaded: list[Mapping[str, Any]] = []
        # The last of the pre-hooks sees what is really loaded.
        handle = self.register_load_state_dict_pre_hook(lambda _, s: loaded.append(s))
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            handle.remove()
        (saved,) = loaded
        index = [i for group in saved["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        state = self.state
        for i, p in zip(index, params, strict=True):
            for name, value in saved["state"].get(i, {}).items():
                current = state[p].get(name)
                if isinstance(current, Tensor) and current.dtype != value.dtype:
                    state[p][name] = value.detach().to(current.device, copy=True)


class Owner(ExactOptimizer):
    """What the roads ask an optimizer for.

    Attributes:
        rule: one step in place, ``rule(p, g, *buffers, **numbers)``.
        buffers: what the state calls them.
        bounds: of each number (options.py). ``betas`` are the rule's ``beta1``,
            ``beta2``, …
        own: numbers that :meth:`own_numbers` may give; the rule asks nothing of them (``if``).
        asks: words of ``rms`` that stand in the rule itself, not among its numbers.
        counts: the rule has the number of its step.
        is_known: it does nothing but what lists of tensors and the kernels know.
    """

    rule: ClassVar[Rule]
    buffers: ClassVar[tuple[str, ...]] = ("momentum",)
    bounds: ClassVar[Mapping[str, Any]]
    own: ClassVar[tuple[str, ...]] = ()
    asks: ClassVar[frozenset[str]] = frozenset()
    counts: ClassVar[bool] = False
    is_known: ClassVar[bool] = True

    def own_numbers(self, p: Tensor, group: Group) -> Group:
        """Those of the rule's numbers that are others for this parameter."""
        return {}

    def number(self, p: Tensor) -> int:
        """The place of ``p`` among the optimizer's parameters."""
        cache = self.cache("numbers")
        if id(p) not in cache:
            cache.clear()
            params = (q for group in self.param_groups for q in group["params"])
            cache.update({id(q): i for i, q in enumerate(params)})
        return int(cache[id(p)])

    def cache(self, of: Any) -> dict[Any, Any]:
        """What can be made again at any time, and so is part of no copy and no checkpoint."""
        caches: dict[Any, dict[Any, Any]] = self.__dict__.setdefault("_caches", {})
        return caches.setdefault(of, {})
