"""What the kernels are told at a step, kept for the next.

From one step to the next mostly nothing changes but where the gradients lie, and with many small tensors it
is Python that takes the time: so what was found out is looked over instead of found out anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards  # what torch.compile knows its inputs by, all in one call

from minisign.engine.contract import RuleOptimizer
from minisign.engine.rows import recorded_rows
from minisign.engine.words import Group, Rule
from minisign.engine.work import Work, numbers_of
from minisign.kernels.program import Program
from minisign.kernels.table import Launch

_OPTIONS = (
    "lazy", "lazy_momentum", "fused", "seed", "stochastic_rounding", "accumulate", "release_grads"
)  # fmt: skip
_GRADIENT, _PLACE = attrgetter("grad"), Tensor.data_ptr


class Part(NamedTuple):
    """What tensors that go together have in common: a rule, its numbers, and the names of those that are
    each tensor's own."""

    rule: Rule
    numbers: tuple[tuple[str, Any], ...]
    own: tuple[str, ...]


class Plan(NamedTuple):
    """The launches of a group.

    Attributes:
        jobs: what tensors have in common, their launch, and their places in the group.
        left: what the kernels cannot take.
        programs: of the jobs, at this step.
        states: of the group's parameters, in its order; none: the plan is not for another step.
    """

    jobs: list[tuple[Part, Launch, list[int]]]
    left: list[Work]
    states: list[Group]
    programs: Sequence[Program] = ()


class Kept:
    """A plan, and all that its launches follow from but the gradients: those come anew at each step."""

    def __init__(self, plan: Plan, optimizer: RuleOptimizer, group: Group) -> None:
        self.plan, self.said = plan, _said(optimizer, group, numbers_of(optimizer, group))
        tensors, gs = self._tensors(optimizer, group), map(_GRADIENT, group["params"])
        self.places, self.held = list(map(_PLACE, tensors)), [*tensors, *optimizer.state.values()]
        self.alike = TensorGuards(*tensors, *gs, dynamic_dims_sizes=[], dynamic_dims_strides=[])

    def again(self, optimizer: RuleOptimizer, group: Group) -> Plan | None:
        """The plan with the gradients and numbers of this step, if nothing else has moved."""
        numbers = numbers_of(optimizer, group)
        if self.said != _said(optimizer, group, numbers):
            return None
        tensors, gs = self._tensors(optimizer, group), list(map(_GRADIENT, group["params"]))
        held = [*tensors, *optimizer.state.values()]
        if len(held) != len(self.held) or not all(map(is_, held, self.held)):
            return None
        if not self.alike.check(*tensors, *gs) or list(map(_PLACE, tensors)) != self.places:
            return None
        jobs, places = [], list(map(_PLACE, gs))
        for part, launch, members in self.plan.jobs:
            launch.set_gradients([places[i] for i in members] if len(members) < len(gs) else places)
            shared = tuple((name, numbers.get(name, x)) for name, x in part.numbers)
            jobs.append((part._replace(numbers=shared), launch, members))
        return self.plan._replace(jobs=jobs)

    def _tensors(self, optimizer: RuleOptimizer, group: Group) -> list[Any]:
        """Parameters, buffers, counters, rows recorded."""
        params, names = group["params"], (*optimizer.buffers, "step")
        own = (x for name in names for x in map(dict.get, self.plan.states, repeat(name)))
        masks = map(recorded_rows, params) if group["lazy"] == "ids" else ()
        return [*params, *(x for x in own if x is not None), *masks]


def _said(optimizer: RuleOptimizer, group: Group, numbers: Group) -> list[Any]:
    """The options and words of a group; numbers that its tensors share may be others at each step."""
    return [
        *(group[name] for name in _OPTIONS), *(numbers[name] for name in optimizer.per_tensor),
        *(x if isinstance(x, str) else isinstance(x, Tensor) for x in numbers.values()),
        group["shrink"] is None, getattr(optimizer, "found_inf", None) is None,
    ]  # fmt: skip
