"""What every part of the engine asks an optimizer for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from minisign.engine.exact import ExactOptimizer
from minisign.engine.words import Group, Rule

_NOWHERE: tuple[Group, int, int] = ({}, -1, -1)


class RuleOptimizer(ExactOptimizer):
    """An optimizer that carries out a rule. What it does at a step is in optimizer.py, which loads the
    other files; they know it as this.

    Attributes:
        rule: one step in place, ``rule(p, g, *buffers, **numbers)``.
        buffers: what the state calls them.
        bounds: of each number (options.py). ``betas`` are the rule's ``beta1`` and ``beta2``.
        per_tensor: numbers, not words, that :meth:`own_numbers` may give. A kernel reads them anew for each
            tensor, so the rule may not choose by them (``if``).
        asks: words of ``rms`` that stand in the rule itself, not among its numbers.
        has_step: the number of the step is an argument of the rule.
        is_traceable: it does nothing but what lists of tensors and the kernels know.
    """

    rule: ClassVar[Rule]
    buffers: ClassVar[tuple[str, ...]] = ("momentum",)
    bounds: ClassVar[Mapping[str, Any]]
    per_tensor: ClassVar[tuple[str, ...]] = ()
    asks: ClassVar[frozenset[str]] = frozenset()
    has_step: ClassVar[bool] = False
    is_traceable: ClassVar[bool] = True

    def own_numbers(self, p: Tensor, group: Group) -> Group:
        """Those of the rule's numbers that are others for this parameter."""
        return {}

    def place_of(self, p: Tensor) -> tuple[Group, int, int]:
        """The group of ``p``, its place there, and among all parameters; an empty group if it has none."""
        cache, groups = self.cache("places"), [(id(x), len(x["params"])) for x in self.param_groups]
        place: tuple[Group, int, int] = cache.get(id(p), _NOWHERE)
        if cache.get("groups") != groups or not place[0] or place[0]["params"][place[1]] is not p:
            places = [(x, i) for x in self.param_groups for i in range(len(x["params"]))]
            cache.clear()
            cache.update({id(x["params"][i]): (x, i, n) for n, (x, i) in enumerate(places)})
            cache["groups"] = groups
        place = cache.get(id(p), _NOWHERE)
        return place

    def cache(self, of: Any) -> dict[Any, Any]:
        """What can be made again at any time, and so is part of no copy and no checkpoint."""
        caches: dict[Any, dict[Any, Any]] = self.__dict__.setdefault("_caches", {})
        return caches.setdefault(of, {})
