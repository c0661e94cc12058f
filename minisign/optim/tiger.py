"""Tiger: one momentum, its sign, and a step in proportion to the size of the weights.

    m ← β m + (1 − β) g
    θ ← θ − η (sign(m) + λ θ)                sign(0) = 0

Jianlin Su, kexue.fm/archives/9512; code in bojone/tiger (TensorFlow). The base form takes η from the
user. The author's code takes α = ``lr`` from the user and sets η by the kind of the tensor:

    matrix                  η = α RMS(θ), over the whole tensor
    embedding               η = α RMS(θ_row), row by row
    bias and norm weight    η = α / 2, and λ = 0

Gradient accumulation over k micro-batches needs no buffer, since m is linear in g: at the first
micro-batch m decays by β, at the others by 1, each adds (1 − β)/k · g, and θ moves after the k-th.
A gradient that is not finite leaves m alone and shrinks the weights, θ ← (θ − c) s + c, with c = 1 for
the weight of a norm and 0 otherwise.

Since m is linear in g, a gradient can go into it as soon as autograd has it, and be freed before the next
one is made: ``release_grads``. Then parameters, momentum and one gradient are alive, and no more. Lion
cannot do this: what it takes the sign of holds the gradient with another weight than its momentum does.

Where this differs from the author's code:

    what                        there                       here, and why
    kind of a tensor            by its name                 by its module (``param_groups``), else by
                                                            its number of dimensions: a norm's weight
                                                            is called ``weight`` in PyTorch
    not finite                  NaN                         NaN and ±Inf: Inf poisons m as well
    RMS(θ) = 0                  η = 0, it never moves       η = α, as LAMB's trust ratio of 1
    absent rows of a sparse     m decays, the row moves     untouched (``lazy_momentum="decay"`` for a
    gradient                                                momentum that decays)
    no gradient (None) at some  TensorFlow gives zeros      a parameter without any in a cycle stays;
    micro-batches                                           else a missing one counts as zero
    learning rate schedule      inside, ``lr_schedule``     any of ``torch.optim.lr_scheduler``
"""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minisign.kernels.rule import MOMENTUM, NUMBER, RMS, ROW_RMS, Rule
from minisign.optim.base import (
    Group,
    Params,
    RowOptimizer,
    SharedOptions,
    check_number,
    descend,
    descend_foreach,
    learning_rate,
    nonzero_rows,
    with_shared,
)
from minisign.optim.shards import add_up, is_sharded, like_rows, local

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The author's rule, for groups that say what they hold (minisign.param_groups).
KINDS: dict[str, Group] = {
    "embedding": {"scale": "row_rms"},
    "bias": {"scale": 0.5, "weight_decay": 0.0},
    "norm": {"scale": 0.5, "weight_decay": 0.0, "center": 1.0},
}


def rms(p: Tensor, by_row: bool = False) -> Tensor:
    """√mean(θ²): a 0-dim tensor, or [V, 1, …] by row; 1 where that is 0. At least float32."""
    if torch.is_grad_enabled():
        p = p.clone()  # differentiable steps: θ is about to change, autograd must keep what it was
    dims = tuple(range(1, p.dim())) if by_row else tuple(range(p.dim()))
    dtype = torch.promote_types(p.dtype, torch.float32)
    norm = torch.linalg.vector_norm(p, dim=dims, keepdim=by_row, dtype=dtype)
    count = p[0].numel() if by_row and len(p) else p.numel()
    size = norm / max(count, 1) ** 0.5
    return size.masked_fill(size == 0, 1.0)


def tiger_update(
    p: Tensor,  # θ, any shape
    g: Tensor,  # as p
    m: Tensor,  # as p
    *,
    eta: float | Tensor,  # η: a number, 0-dim, or one for each row [V, 1, …]
    keep: float | Tensor,  # what is left of m: β, or 1 after the first micro-batch
    weight: float,  # of the gradient: (1 − β)/k
    weight_decay: float,  # λ
    shrink: float | None,  # s; None: the gradient is taken as it is
    center: float,  # c
    move: bool,  # False until the last micro-batch
) -> None:
    """One micro-step of Tiger on one tensor, in place."""
    if p.is_cpu or shrink is None:
        if shrink is not None and not all_finite(g, m):
            p.sub_(center).mul_(shrink).add_(center)
            return
        take(m, g, keep, weight)
        if move:
            descend(p, m.sign(), eta, weight_decay)
    else:  # the same without waiting for the device to say whether g is finite
        finite = torch.isfinite(g).all()
        shrunk = (p - center).mul_(shrink).add_(center)
        before = m.clone()
        take(m, g, keep, weight)
        if move:
            descend(p, m.sign(), eta, weight_decay)
        m.copy_(torch.where(finite, m, before))
        p.copy_(torch.where(finite, p, shrunk))


def take(m: Tensor, g: Tensor, keep: float | Tensor, weight: float) -> None:
    """m ← keep · m + weight · g, in place."""
    if not isinstance(keep, Tensor) and keep + weight == 1:
        m.lerp_(g, weight)
    else:
        m.mul_(keep).add_(g, alpha=weight)


def take_and_free(m: Tensor, g: Tensor, keep: float, weight: float, check: bool) -> bool | Tensor:
    """:func:`take`, after which ``g`` may hold anything; m stays where ``g`` is not finite.

    Returns whether it was not, where ``check`` asks for that; on a GPU a 0-dim tensor, since to look
    would be to wait.
    """
    wide = torch.promote_types(torch.promote_types(m.dtype, g.dtype), torch.float32)
    target, g = m.to(wide), g.to(wide)
    bad: bool | Tensor = False
    if check and g.is_cpu:
        bad = not all_finite(g, target)
    if check and not g.is_cpu and g.numel():
        least, most = torch.aminmax(g)  # NaN is both; and no mask of g's size is made
        finite = torch.isfinite(least) & torch.isfinite(most)
        bad = ~finite
        target.mul_(torch.where(finite, keep, 1.0).to(wide))
        target.add_(g.nan_to_num_(0.0, 0.0, 0.0).mul_(torch.where(finite, weight, 0.0).to(wide)))
    elif not bad:
        take(target, g, keep, weight)
    if target is not m:
        m.copy_(target)
    return bad


def tiger_update_foreach(
    ps: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    *,
    etas: list[float] | list[Tensor],  # one kind for all
    keeps: list[float],
    weight: float,
    weight_decay: float,
    shrink: float | None,
    center: float,
    move: bool,
) -> None:
    """:func:`tiger_update` for a list of tensors; waits for the device once, to learn what is finite."""
    finite = [True] * len(gs)
    if shrink is not None:
        # A norm that is finite has finite parts; one that is not may merely have overflowed.
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(gs)]).tolist()
        finite = [math.isfinite(x) or bool(torch.isfinite(g).all()) for x, g in zip(norms, gs, strict=True)]
    for p, ok in zip(ps, finite, strict=True):
        if not ok and shrink is not None:
            p.sub_(center).mul_(shrink).add_(center)
    if not any(finite):
        return

    def kept(column: Any) -> list[Any]:
        return [x for x, ok in zip(column, finite, strict=True) if ok]

    ps, gs, ms, keeps = kept(ps), kept(gs), kept(ms), kept(keeps)
    if all(keep + weight == 1 for keep in keeps):
        torch._foreach_lerp_(ms, gs, weight)
    else:
        torch._foreach_mul_(ms, keeps)
        torch._foreach_add_(ms, gs, alpha=weight)
    if move:
        descend_foreach(ps, list(torch._foreach_sign(ms)), kept(etas), weight_decay)


def all_finite(g: Tensor, m: Tensor) -> bool:
    """Whether no entry of ``g`` is NaN or ±Inf, given that ``m`` is finite.

    Their inner product is finite only if g is. It costs a tenth of ``isfinite(g).all()`` and brings both
    into the cache for the update.
    """
    product = torch.dot(m.flatten(), g.flatten()).item()
    return math.isfinite(product) or bool(torch.isfinite(g).all())


class Tiger(RowOptimizer):
    """Tiger, "an extremely stingy optimizer": one buffer, also under gradient accumulation.

    ``Tiger(model.parameters())`` follows the author's rule as far as shapes tell: tensors with fewer
    than two dimensions get half the rate and no decay. ``Tiger(param_groups(model))`` follows it in
    full. Call :meth:`step` after every micro-batch.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: α; what it is relative to is ``scale``'s matter. A number or a 1-element tensor.
        beta: momentum β in [0, 1); the author uses 0.965 for text, 0.945 for images.
        weight_decay: decoupled decay λ ≥ 0; keeps |θ| ≤ 1/λ.
        scale: η/α: ``"rms"``, the RMS of the tensor; ``"row_rms"``, of each row, for embeddings; a
            number, taken as it is for every shape (1.0 is the base form of kexue.fm/archives/9736).
        accumulate: k ≥ 1 micro-batches a step, each with its own mean gradient. Moves exactly as one
            step on their mean.
        shrink: s in [0, 1], the factor of the weights where the gradient is not finite. ``None``: the
            gradient is taken as it is, and not read once more to find out.
        release_grads: take each gradient into the momentum within ``backward``, and free it. The weights
            move as without, in :meth:`step`, which is called as often. Not with ``lazy`` rows or sparse
            gradients (their groups can say ``"release_grads": False``), ``capturable``, or a
            ``GradScaler``, whose scale would stay in the momentum. Clipping by a norm of all gradients
            is not possible, since they are never there at once: ``clip_grad_norm_`` finds none and returns
            0. What ``p.register_hook`` does to a gradient, each tensor by itself, comes before; what
            ``DistributedDataParallel`` does, the mean over processes, comes too late.
        options: see :class:`~minisign.optim.base.RowOptimizer`. ``capturable`` excludes
            ``accumulate`` > 1, whose count a CUDA graph would freeze.

    A group may also have ``kind`` (set by :func:`minisign.param_groups`), from which follow the
    author's ``scale``, ``weight_decay`` and ``center`` (c in the module's text) where the group does
    not give them and the optimizer's ``scale`` is ``"rms"``.

    Raises:
        ValueError, TypeError: a bad value, named in the message.
    """

    update = staticmethod(tiger_update)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        beta: float = 0.965,
        weight_decay: float = 0.01,
        *,
        scale: str | float = "rms",
        accumulate: int = 1,
        shrink: float | None = 0.99,
        release_grads: bool = False,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            with_shared(
                options,
                lr=lr,
                beta=beta,
                weight_decay=weight_decay,
                scale=scale,
                accumulate=accumulate,
                shrink=shrink,
                release_grads=release_grads,
                center=0.0,
                micro_step=0,
            ),
        )

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict) and self.defaults["scale"] == "rms":
            for name, value in KINDS.get(param_group.get("kind", ""), {}).items():
                param_group.setdefault(name, value)
        if isinstance(param_group, dict) and self.param_groups:  # in step with the others
            param_group.setdefault("micro_step", self.param_groups[0]["micro_step"])
        super().add_param_group(param_group)
        self._hook_group(len(self.param_groups) - 1)

    def __setstate__(self, state: Group) -> None:
        super().__setstate__(state)
        for i in range(len(self.param_groups)):
            self._hook_group(i)

    def _check(self, group: Group) -> None:
        check_number("beta", group["beta"], 0.0, 1.0)
        if group["shrink"] is not None:
            check_number("shrink", group["shrink"], 0.0, math.nextafter(1.0, 2.0))
        check_number("center", group["center"], -math.inf)
        scale, k = group["scale"], group["accumulate"]
        if isinstance(scale, str):
            if scale not in ("rms", "row_rms"):
                raise ValueError(f"unknown scale {scale!r}: choose 'rms', 'row_rms' or a number")
        else:
            check_number("scale", scale, 0.0)
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"accumulate must be a whole number of micro-batches, got {k!r}")
        if k < 1:
            raise ValueError(f"Invalid accumulate: {k} (must be 1 or more micro-batches)")
        if not isinstance(group["release_grads"], bool):
            raise TypeError(f"release_grads must be True or False, got {group['release_grads']!r}")
        if group["release_grads"] and group["lazy"]:
            raise ValueError(
                f"release_grads=True and lazy={group['lazy']!r} exclude each other: which rows move "
                'is known with the whole gradient; give their group "release_grads": False'
            )
        if group["release_grads"] and any(is_sharded(p) for p in group["params"]):
            raise ValueError("release_grads=True is not for sharded parameters")
        if group["release_grads"] and group["capturable"]:
            raise ValueError("release_grads=True and capturable=True exclude each other")
        if k > 1 and group["capturable"]:
            raise ValueError(
                f"capturable=True needs accumulate=1, got {k}: a CUDA graph would freeze the count"
            )

    # --- one micro-step -------------------------------------------------------------------------

    def _step_group(self, group: Group) -> None:
        if group["release_grads"]:
            self._step_released(group)
        else:
            self._ask_all_shards(group)
            super()._step_group(group)
        group["micro_step"] = (group["micro_step"] + 1) % group["accumulate"]

    def _ask_all_shards(self, group: Group) -> None:
        """Of parameters in pieces: is the whole gradient finite, and how large is the whole tensor; in one
        exchange for all of them."""
        sizes = self._cache("whole rms")
        params = [p for p in group["params"] if is_sharded(p) and p.grad is not None]
        sized = _is_last(group) and group["scale"] == "rms"
        if not params or (group["shrink"] is None and not sized):
            return
        pieces = [(local(p), local(p.grad)) for p in params]
        found = torch.zeros(2, len(params), dtype=torch.float64, device=params[0].device)
        for i, (x, g) in enumerate(pieces):
            if group["shrink"] is not None:
                found[0, i] = ~torch.isfinite(g).all()
            if sized:
                found[1, i] = torch.linalg.vector_norm(x, dtype=torch.float64).square()
        add_up(params[0], found)
        for p, (_, g), is_bad, square in zip(params, pieces, *found.tolist(), strict=True):
            # Not finite elsewhere: then nor here, where it takes part in the step.
            if is_bad:
                g[nonzero_rows(g) if group["lazy"] == "grad" else ...] = math.nan
            sizes[p] = math.sqrt(square / max(p.numel(), 1)) or 1.0

    def _raw_gradient(self, p: Tensor, group: Group) -> Tensor | None:
        g = super()._raw_gradient(p, group)
        if g is None and group["accumulate"] > 1 and _is_last(group):
            # It had gradients earlier in this cycle: this one counts as zero, and it moves.
            if self.state[p].get("taken"):
                return torch.zeros_like(p)
            if "taken_rows" in self.state[p] and self.state[p]["taken_rows"].any():
                none, empty = p.new_empty((1, 0), dtype=torch.int64), p.new_empty((0, *p.shape[1:]))
                return torch.sparse_coo_tensor(none, empty, p.shape, check_invariants=False)
        return g

    def _hyper(self, group: Group) -> Group:
        lr, scale = learning_rate(group), group["scale"]
        return dict(
            eta=lr * (scale if isinstance(scale, (int, float)) else 1),
            keep=group["beta"],
            weight=_weight(group),
            weight_decay=group["weight_decay"],
            shrink=group["shrink"],
            center=group["center"],
            move=_is_last(group),
        )

    def _rule(self, group: Group) -> Rule:
        hyper, shrink = self._hyper(group), group["shrink"]
        return Rule(
            MOMENTUM,
            hyper["eta"],
            hyper["weight_decay"],
            keep=hyper["keep"],
            weight=hyper["weight"],
            scale={"rms": RMS, "row_rms": ROW_RMS}.get(group["scale"], NUMBER),
            guard=shrink is not None,
            shrink=1.0 if shrink is None else shrink,
            center=hyper["center"],
            move=hyper["move"],
            maximize=group["maximize"],
            rounded=group["stochastic_rounding"],
        )

    def _own_rule(self, p: Tensor, state: Group, group: Group, rule: Rule) -> Rule:
        if is_sharded(p) and rule.scale == RMS and rule.move and p.dim() >= 2:
            rule = replace(rule, scale=NUMBER, lr=rule.lr * self._cache("whole rms")[p])
        return replace(rule, keep=self._keep(state, group)) if group["accumulate"] > 1 else rule

    def _keep(self, state: Group, group: Group) -> float:
        """What is left of m at this micro-batch; notes that it has taken a gradient in this cycle."""
        keep = 1.0 if state.get("taken") else group["beta"]
        state["taken"] = 0 if _is_last(group) else state.get("taken", 0) + 1
        return keep

    def _own_hyper(self, p: Tensor, state: Group, group: Group, hyper: Group) -> Group:
        if hyper["move"] and not (group["scale"] == "row_rms" and self._by_rows(p, group)):
            eta, weight_decay = self._rate(p, group, hyper)
            hyper = {**hyper, "eta": eta, "weight_decay": weight_decay}
        if group["accumulate"] > 1 and not self._by_rows(p, group):
            hyper = {**hyper, "keep": self._keep(state, group)}
        return hyper

    def _rate(self, p: Tensor, group: Group, hyper: Group) -> tuple[float | Tensor, float]:
        """(η, λ) of a whole parameter."""
        eta, scale = hyper["eta"], group["scale"]
        if not isinstance(scale, str):
            return eta, hyper["weight_decay"]
        if p.dim() < 2:
            return eta * 0.5, 0.0
        if scale == "rms" and is_sharded(p):
            return eta * self._cache("whole rms")[p], hyper["weight_decay"]
        return eta * rms(local(p), by_row=scale == "row_rms"), hyper["weight_decay"]

    def _decay_rates(self, group: Group) -> tuple[float, ...]:
        return (group["beta"] if _is_last(group) else 1.0,)

    def _update_foreach(
        self, ps: list[Tensor], gs: list[Tensor], buffers: list[list[Tensor]], hypers: list[Group]
    ) -> None:
        (ms,) = buffers
        kinds: dict[Any, list[int]] = {}
        for i, hyper in enumerate(hypers):
            kinds.setdefault((isinstance(hyper["eta"], Tensor), hyper["weight_decay"]), []).append(i)
        for members in kinds.values():
            first = hypers[members[0]]
            tiger_update_foreach(
                *([column[i] for i in members] for column in (ps, gs, ms)),
                etas=[hypers[i]["eta"] for i in members],
                keeps=[hypers[i]["keep"] for i in members],
                **{name: first[name] for name in ("weight", "weight_decay", "shrink", "center", "move")},
            )

    def _update_rows(
        self,
        p: Tensor,
        g: Tensor,
        buffers: list[Tensor],
        rows: Tensor,
        hyper: Group,
        group: Group,
    ) -> None:
        if group["accumulate"] > 1:
            # A row's momentum decays when a cycle first touches it, and all rows of the cycle move at
            # its end. `rows` and `cycle` are sorted.
            if "taken_rows" not in self.state[p]:
                self.state[p]["taken_rows"] = like_rows(p, (len(p),), torch.bool)
            taken = local(self.state[p]["taken_rows"])
            before = taken.clone()
            taken[rows] = True
            if hyper["move"]:
                cycle = taken.nonzero().squeeze(1)
                sums = g.new_zeros((len(cycle), *p.shape[1:]))
                sums[torch.searchsorted(cycle, rows)] = g
                rows, g = cycle, sums
                taken.zero_()
            keep = local(p).new_full((len(rows),), group["beta"]).masked_fill(before[rows], 1.0)
            hyper = {**hyper, "keep": keep.view(-1, *[1] * (p.dim() - 1))}
        if group["scale"] == "row_rms" and hyper["move"]:
            hyper = {**hyper, "eta": hyper["eta"] * rms(local(p)[rows], by_row=True)}
        super()._update_rows(p, g, buffers, rows, hyper, group)

    # --- gradients that are taken and freed within backward -------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # With True a GradScaler comes to step(), which can say why not.
        return super()._step_supports_amp_scaling or any(g["release_grads"] for g in self.param_groups)

    def _is_overflow(self) -> bool:
        if any(g["release_grads"] for g in self.param_groups) and self._scaling() != (None, None):
            raise RuntimeError(
                "release_grads=True and a GradScaler exclude each other: gradients went into the momentum "
                "with a scale on them. Train in bfloat16, which needs no scale, or without release_grads"
            )
        return super()._is_overflow()

    def _hook_group(self, number: int) -> None:
        """Has autograd hand over the gradients of a group as soon as they are there."""
        own, hooked = self.param_groups[number], self._cache("hooked")
        # Not the optimizer itself: a model that outlives it must keep its gradients.
        this = weakref.ref(self)

        def take_in(p: Tensor) -> None:
            optimizer = this()
            if optimizer is not None and (group := optimizer.param_groups[number])["release_grads"]:
                with torch.no_grad():
                    optimizer._take_in(p, group)

        for p in own["params"]:
            if own["release_grads"] and p.requires_grad and p not in hooked:
                hooked[p] = p.register_post_accumulate_grad_hook(take_in)

    def _take_in(self, p: Tensor, group: Group) -> None:
        """m takes the gradient of ``p``, which is freed."""
        g, p.grad = p.grad, None
        if g is None:
            return
        if g.layout != torch.strided:
            p.grad = g
            raise RuntimeError(
                f"release_grads=True takes dense gradients, got layout {g.layout} for a parameter of shape "
                f'{tuple(p.shape)}; give its group "release_grads": False'
            )
        state = self._init_state(p, group)
        keep = 1.0 if state.get("taken") else group["beta"]
        weight = _weight(group)
        state["taken"] = state.get("taken", 0) + 1
        g = -g if group["maximize"] else g
        bad = take_and_free(state["momentum"], g, keep, weight, check=group["shrink"] is not None)
        # θ shrinks in step(): here it may still be in use.
        self._cache("bad").setdefault(p, []).append(bad)

    def _step_released(self, group: Group) -> None:
        """What is left for a step: θ moves by the sign of m, or shrinks."""
        for p in group["params"]:
            self._take_in(p, group)  # a gradient that did not come by way of backward
        cache, last = self._cache("bad"), _is_last(group)
        flags = {p: cache.pop(p, []) for p in group["params"]}
        moving = []
        for p, bad in zip(flags, _any_of_each(list(flags.values())), strict=True):
            if bad:
                wide = p.to(torch.promote_types(p.dtype, torch.float32))
                p.copy_((wide - group["center"]) * group["shrink"] + group["center"])
            elif last and self.state.get(p, {}).get("taken"):
                moving.append(p)
            if last and p in self.state:
                self.state[p]["taken"] = 0
        self._move(moving, group)

    def _move(self, params: list[Tensor], group: Group) -> None:
        """θ ← θ − η (sign(m) + λ θ) for parameters whose m is complete."""
        if group["fused"]:
            from minisign.optim import fused

            params = fused.move(self, params, group, self._cache(id(group)))
        shared = self._hyper(group)
        for p in params:
            state = self.state[p]
            if "step" in state:
                state["step"] += 1
            eta, weight_decay = self._rate(p, group, shared)
            wide = p.to(torch.promote_types(p.dtype, torch.float32))
            descend(wide, state["momentum"].to(wide.dtype).sign(), eta, weight_decay)
            if wide is not p:
                p.copy_(self._rounded(p, wide, group))

    def _use_foreach(self, group: Group) -> bool:
        # The multi-tensor form waits for the device, which a graph cannot.
        return not group["capturable"] and super()._use_foreach(group)

    def _by_rows(self, p: Tensor, group: Group) -> bool:
        return bool(group["lazy"]) or (p.grad is not None and p.grad.is_sparse)


def _any_of_each(flags: list[list[bool | Tensor]]) -> list[bool]:
    """Whether there is one true in each list; waits for a device once."""
    tensors = [flag for found in flags for flag in found if isinstance(flag, Tensor)]
    seen = iter(torch.stack(tensors).tolist() if tensors else [])
    known = [[next(seen) if isinstance(flag, Tensor) else flag for flag in found] for found in flags]
    return [any(found) for found in known]


def _weight(group: Group) -> float:
    """Of one micro-batch's gradient in m."""
    return (1 - group["beta"]) / group["accumulate"]


def _is_last(group: Group) -> bool:
    return bool(group["micro_step"] + 1 >= group["accumulate"])
