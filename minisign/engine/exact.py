"""torch's optimizer, with two rough edges taken off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minisign.engine.words import Group


def check_new(group: Group, known: set[int]) -> None:
    """Raises ValueError where a parameter of a group is among those with these ids."""
    params, names = group["params"], group.get("param_names")
    for i, p in enumerate([params] if isinstance(params, Tensor) else params):
        name, p = p if isinstance(p, tuple) else (names[i] if names else "one", p)
        if id(p) in known:
            raise ValueError(
                f"some parameters appear in more than one parameter group: {name} of shape {tuple(p.shape)}"
            )


class ExactOptimizer(torch.optim.Optimizer):
    """``torch.optim.Optimizer``, but an error about a parameter in two groups says which, and a state
    tensor keeps its dtype when it is loaded, where torch casts it to the parameter's."""

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict) and not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])
        if isinstance(param_group, dict):
            check_new(param_group, {id(p) for group in self.param_groups for p in group["params"]})
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
