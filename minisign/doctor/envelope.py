"""How far a sign optimizer can have taken a matrix, and which of its rows are there.

A sign optimizer moves an entry by η at most, and decays it by ηλ. So no entry can be beyond the envelope

    e ← e (1 − ηλ) + η           from the largest entry at the start

and only one whose sign never changes stays on it: the row of a token that has stopped coming.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minisign.engine.shards import add_up, is_sharded, local
from minisign.optim.groups import EMBEDDINGS
from minisign.probes.saturation import NEAR, saturated_rows
from minisign.probes.updates import update_kind


@dataclass
class Watched:
    """A matrix [V, D] and its envelope, in two parts: what is left of the start, and the push from zero."""

    name: str
    parameter: Tensor
    group: int  # its place in the optimizer, which makes new dictionaries when it loads a state
    role: str  # "embedding", "tied" or "head"
    signs: bool  # whether its optimizer is one of signs
    start: float  # largest |entry|
    size: float  # RMS that a step of Tiger is in proportion to, as it was last measured, grown since
    seen: Tensor | None = None  # the push when each row of this process last had a gradient
    push: float = 0.0
    left: float = 1.0  # of the start

    @property
    def envelope(self) -> float:
        return self.start * self.left + self.push if self.signs else math.inf

    def advance(self, group: Mapping[str, Any]) -> None:
        """Takes the envelope one step further."""
        if not self.signs or group.get("micro_step", 0):  # between two micro-batches nothing moves
            return
        scale, eta = group.get("scale", 1.0), float(group["lr"])
        decay = float(group.get("weight_decay", 0.0))
        if isinstance(scale, str):
            eta *= self.size
            self.size += eta * (1 - decay * self.size)
        else:
            eta *= scale
        self.push += eta * (1 - decay * self.push)
        self.left *= 1 - eta * decay

    @torch.no_grad()
    def note_gradients(self) -> None:
        """Notes which rows have a gradient at this step."""
        gradient = self.parameter.grad
        if self.seen is None or gradient is None:
            return
        if gradient.is_sparse:
            self.seen[gradient._indices()[0]] = self.push
        else:  # a few components tell of the row, and reading them costs little
            some = local(gradient).flatten(1)[:, :4]
            self.seen.masked_fill_((some != 0).any(dim=1), self.push)


def find_watched(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Watched]:
    """The embeddings of a model and its output layer, as far as the optimizer trains them.

    Raises:
        ValueError: there is none.
    """
    groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    modules = list(model.named_modules())
    embeddings = {
        f"{name}.weight" if name else "weight": m.weight for name, m in modules if isinstance(m, EMBEDDINGS)
    }
    shapes, ids = {w.shape for w in embeddings.values()}, {id(w) for w in embeddings.values()}
    linear = {f"{name}.weight": m.weight for name, m in modules if isinstance(m, nn.Linear)}
    heads = {name: w for name, w in linear.items() if w.shape in shapes and id(w) not in ids}
    tied = {id(w) for w in linear.values()} & ids
    found: dict[int, Watched] = {}
    for name, weight in {**embeddings, **heads}.items():
        if id(weight) in found or id(weight) not in groups:
            continue
        place = groups[id(weight)]
        group = optimizer.param_groups[place]
        role = "head" if name in heads else "tied" if id(weight) in tied else "embedding"
        start, size, *_ = measure(weight, math.inf, group, None)
        watched = Watched(name, weight, place, role, _is_sign(optimizer, group), start, size)
        if watched.signs and role == "embedding" and not group.get("release_grads"):
            watched.seen = torch.zeros(len(local(weight)), device=weight.device)
        found[id(weight)] = watched
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no nn.Embedding that {type(optimizer).__name__} trains: there is "
            "nothing to watch"
        )
    return list(found.values())


def _is_sign(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    return "beta" in group or update_kind(optimizer, group, {}) == "lion"


def may_move_without(group: Mapping[str, Any]) -> bool:
    """Whether a step may move a parameter that has no gradient by then: Tiger may have taken it before."""
    return bool(group.get("release_grads")) or group.get("accumulate", 1) > 1


@torch.no_grad()
def measure(
    parameter: Tensor, level: float, group: Mapping[str, Any], quiet: Tensor | None
) -> tuple[float, float, int, int]:
    """Largest |entry| of a matrix, the RMS that Tiger's step is in proportion to (the largest of a
    row, or the whole matrix's), how many rows have more than a tenth of their components beyond
    0.8 of ``level``, and how many of these are ``quiet``."""
    weight = local(parameter.detach()).flatten(1)
    most = torch.linalg.vector_norm(weight, math.inf, dim=1)
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    counts = weight.new_zeros(2, dtype=torch.float64)
    for rows in (most > NEAR * level).nonzero().squeeze(1).split(max(1, 2**22 // weight.shape[1])):
        rows = rows[saturated_rows(weight[rows], level)]
        counts[0] += len(rows)
        counts[1] += 0 if quiet is None else quiet[rows].sum()
    highest = torch.stack([x.max().double() if len(x) else counts.new_zeros(()) for x in (most, norms)])
    sums = torch.cat([norms.double().square().sum()[None], counts])
    if is_sharded(parameter):
        add_up(parameter, sums)
        add_up(parameter, highest, torch.distributed.ReduceOp.MAX)
    largest, longest, squares, near, silent = *highest.tolist(), *sums.tolist()
    rms = math.sqrt(squares / parameter.numel())
    size = longest / weight.shape[1] ** 0.5 if group.get("scale") == "row_rms" else rms
    return largest, size, int(near), int(silent)
