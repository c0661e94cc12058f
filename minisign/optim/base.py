"""What every optimizer of minisign shares, written once.

A parameter's gradient takes one of four roads to its update:

    dense          the update function sees the whole tensor
    foreach        the same, for a list of tensors in one call
    rows           lazy or sparse gradients: the touched rows are gathered, the update function
                   sees only those, and they are written back; every other row keeps its bits
    fused          all tensors of a group in one pass, by the kernels of minisign.kernels (fused.py)

Of a parameter that several processes hold in pieces (shards.py) each sees its own rows.

Arithmetic is float32 or float64: what is narrower is widened first, and rounded once at the end.

An optimizer adds its mathematics as a pure function on (parameter, gradient, buffers); this file
knows nothing of signs or moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias, TypedDict

import torch
from torch import Tensor

from minisign.kernels.rule import Rule
from minisign.optim.rounding import noise_of, places, round_at_random
from minisign.optim.rows import take_rows, unite_rows
from minisign.optim.shards import check_rows, local

Group: TypeAlias = dict[str, Any]
Params: TypeAlias = Iterable[Any]

LAZY = (False, "grad", "ids")
LAZY_MOMENTUM = ("freeze", "decay")
FUSED = (False, True, "cpu", "triton")
# Options that say how a step is computed and not what: a checkpoint from elsewhere leaves them alone.
HOW = ("foreach", "fused", "release_grads")
WIDE = {torch.float32, torch.float64}  # what arithmetic is done in
STATE_TYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ExactOptimizer(torch.optim.Optimizer):
    """``torch.optim.Optimizer`` with two rough edges taken off."""

    def add_param_group(self, param_group: Group) -> None:
        """As in torch, but the error about a parameter in two groups says which."""
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
        """As in torch, but a state tensor keeps its dtype, where torch casts it to the parameter's."""
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


class RowOptimizer(ExactOptimizer):
    """A ``torch.optim.Optimizer`` that can also step on some rows of a parameter only.

    Options of every parameter group, beside the optimizer's own:

    - ``lazy``: ``False``; ``"grad"``, rows whose gradient is all zero stay as they are, bit for bit,
      momentum too; ``"ids"``, the same for rows not recorded by :func:`minisign.track_rows` since
      the last step. Gradients of ``nn.Embedding(sparse=True)`` are lazy whatever this says.
    - ``lazy_momentum``: what the momentum of an absent row does. ``"freeze"`` (default): nothing, as
      in ``torch.optim.SparseAdam``. ``"decay"``: it decays while the row stays, the older meaning of
      a lazy optimizer (kexue.fm/archives/6869).
    - ``maximize``, ``foreach``, ``capturable``, ``differentiable``: as in ``torch.optim``. ``foreach``
      defaults to on where all parameters of a group are on a GPU; the result is the same.
    - ``fused``: all tensors of the group in one pass, by Triton kernels on a GPU and by C++ on a CPU,
      compiled at first use; RuntimeError where Triton or a compiler is missing. float32, bfloat16 and
      float16 in any mix, dense tensors of one memory order; others, and lazy rows with
      ``lazy_momentum="decay"``, Tiger's ``accumulate`` or ``scale="rms"``, take the plain road.
      ``"cpu"`` or ``"triton"`` names the back end. A checkpoint of one goes on in any other: loading it
      leaves ``fused``, ``foreach`` and ``release_grads`` as they are.
    - ``state_dtype``: of the buffers, say ``torch.bfloat16``; ``None``: that of the parameter.
    - ``stochastic_rounding``: bfloat16 parameters are rounded at random (see rounding.py), so that steps
      far below their spacing count on average; ``seed`` says which randomness.

    A subclass sets ``buffers``, ``counts`` (whether it needs the number of a step) and ``update``, its pure
    function, and implements ``_hyper``, ``_decay_rates``, ``_update_foreach`` and ``_rule``.
    """

    buffers: ClassVar[tuple[str, ...]] = ("momentum",)
    counts: ClassVar[bool] = False
    # One step in place: update(p, g, *buffers, **hyper), on a tensor or on gathered rows of it.
    update: ClassVar[Callable[..., None]]

    # --- what a subclass says -------------------------------------------------------------------

    def _check(self, group: Group) -> None:
        """Raises on a bad value among the subclass's own options of a group."""

    def _hyper(self, group: Group) -> Group:
        """The keyword arguments of the update function that all parameters of a group share."""
        raise NotImplementedError

    def _own_hyper(self, p: Tensor, state: Group, group: Group, hyper: Group) -> Group:
        """The same with what is one (whole) parameter's own."""
        return hyper

    def _decay_rates(self, group: Group) -> tuple[float, ...]:
        """How much of each buffer is left after a step without a gradient."""
        raise NotImplementedError

    def _update_foreach(
        self, ps: list[Tensor], gs: list[Tensor], buffers: list[list[Tensor]], hypers: list[Group]
    ) -> None:
        """One step on a list of tensors, in place; the same result as ``update`` on each."""
        raise NotImplementedError

    def _rule(self, group: Group) -> Rule:
        """The step of a group in numbers, for the kernels."""
        raise NotImplementedError

    def _own_rule(self, p: Tensor, state: Group, group: Group, rule: Rule) -> Rule:
        """The same with what is one (whole) parameter's own."""
        return rule

    # --- torch.optim's contract -----------------------------------------------------------------

    def __setstate__(self, state: Group) -> None:
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint from before an option existed
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        for group, own in zip(self.param_groups, before, strict=False):
            group.update({name: own[name] for name in HOW if name in own})

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure``, if given, evaluates the model again; its loss is returned."""
        self._refuse_unsafe_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_overflow():
            return loss
        with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
            for group in self.param_groups:
                if group["lazy"] == "ids":
                    for p in group["params"]:
                        if p.grad is not None:
                            unite_rows(p)
                self._step_group(group)
        return loss

    # --- torch.amp.GradScaler: it hands its scale to optimizers that say so -----------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return any(group["fused"] for group in self.param_groups)

    def _scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """(scale of the gradients, whether one of them is not finite), where a GradScaler steps."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _is_overflow(self) -> bool:
        """Whether this step is left out for an infinite gradient; the kernels see to that by themselves."""
        found_inf = self._scaling()[1]
        if found_inf is None:
            return False
        in_kernels = all(
            group["fused"] and group.get("accumulate", 1) == 1 and all(p.is_cuda for p in group["params"])
            for group in self.param_groups
        )
        return not in_kernels and bool(found_inf.item())

    # --- the four roads -------------------------------------------------------------------------

    def _step_group(self, group: Group) -> None:
        params = group["params"]
        if group["fused"]:
            from minisign.optim import fused

            params = fused.step(self, group, self._cache(id(group)))
            if not params:
                return
        shared = self._hyper(group)
        dense: list[tuple[Tensor, Tensor, list[Tensor], Group]] = []
        for p in params:
            g = self._gradient(p, group)
            if g is None:
                continue
            state = self._init_state(p, group)
            if "step" in state:
                state["step"] += 1
            hyper = self._own_hyper(p, state, group, shared)
            buffers = [local(state[name]) for name in self.buffers]
            if group["lazy"] or g.layout != torch.strided:
                rows, g = self._touched_rows(p, g, group)
                self._update_rows(p, g, buffers, rows, hyper, group)
            else:
                dense.append((p, g, buffers, hyper))
        # In a loop of its own: tensors push what Python needs out of the cache, so do the rest before.
        if self._use_foreach(group):
            self._update_together(dense, group)
        else:
            for p, g, buffers, hyper in dense:
                if p.dtype in WIDE and p.dtype == g.dtype == buffers[0].dtype:
                    self.update(local(p), g, *buffers, **hyper)
                else:
                    self._update_narrow([p], [g], [[b] for b in buffers], [hyper], group)

    def _update_together(
        self, items: list[tuple[Tensor, Tensor, list[Tensor], Group]], group: Group
    ) -> None:
        """``_update_foreach`` for each device and dtype: torch's multi-tensor kernels want one of each."""
        kinds: dict[Any, list[tuple[Tensor, Tensor, list[Tensor], Group]]] = {}
        for item in items:
            dtypes = (x.dtype for x in (*item[:2], *item[2]))
            kinds.setdefault((item[0].device, *dtypes), []).append(item)
        for (_, *dtypes), kind in kinds.items():
            ps, gs, rest, hypers = (list(column) for column in zip(*kind, strict=True))
            buffers = [list(b) for b in zip(*rest, strict=True)]
            if set(dtypes) <= WIDE and len(set(dtypes)) == 1:
                self._update_foreach([local(p) for p in ps], gs, buffers, hypers)
            else:
                self._update_narrow(ps, gs, buffers, hypers, group, foreach=True)

    def _update_narrow(
        self,
        ps: list[Tensor],
        gs: list[Tensor],
        buffers: list[list[Tensor]],
        hypers: list[Group],
        group: Group,
        foreach: bool = False,
    ) -> None:
        """The update of tensors that are not all float32 or all float64: widened, and rounded once."""
        wide = _wide(ps[0], gs[0], *(b[0] for b in buffers))
        wide_ps, wide_gs, *wide_buffers = (
            [local(x).to(wide) for x in column] for column in (ps, gs, *buffers)
        )
        if foreach:
            self._update_foreach(wide_ps, wide_gs, wide_buffers, hypers)
        else:
            self.update(wide_ps[0], wide_gs[0], *(b[0] for b in wide_buffers), **hypers[0])
        for p, wide_p in zip(ps, wide_ps, strict=True):
            local(p).copy_(self._rounded(p, wide_p, group))
        for column, wide_column in zip(buffers, wide_buffers, strict=True):
            for b, wide_b in zip(column, wide_column, strict=True):
                b.copy_(wide_b)

    def _rounded(self, p: Tensor, wide: Tensor, group: Group, rows: Tensor | None = None) -> Tensor:
        """New values of ``p``, or of its ``rows`` on this process, as ``p`` can hold them."""
        if not (group["stochastic_rounding"] and p.dtype == torch.bfloat16):
            return wide.to(p.dtype)
        index = places(p) if rows is None else places(p)[rows]
        noise = noise_of(group["seed"], self._number(p))
        return round_at_random(wide.float(), index, noise, int(self.state[p]["step"].item()))

    def _update_rows(
        self,
        p: Tensor,  # [V, ...]
        g: Tensor,  # [len(rows), ...]
        buffers: list[Tensor],  # each [V, ...]
        rows: Tensor,  # [len(rows)], int64, each once
        hyper: Group,
        group: Group,
    ) -> None:
        wide, mine = _wide(p, g, *buffers), local(p)
        p_rows, rows_of_buffers = mine[rows].to(wide), [b[rows].to(wide) for b in buffers]
        self.update(p_rows, g.to(wide), *rows_of_buffers, **hyper)
        if group["lazy_momentum"] == "decay":
            for b, rate in zip(buffers, self._decay_rates(group), strict=True):
                b.mul_(rate)
        mine.index_copy_(0, rows, self._rounded(p, p_rows, group, rows))
        for b, b_rows in zip(buffers, rows_of_buffers, strict=True):
            b.index_copy_(0, rows, b_rows.to(b.dtype))

    def _touched_rows(self, p: Tensor, g: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """The rows a lazy step moves, and their gradient."""
        if g.layout != torch.strided:
            rows, values = self._sparse_rows(p, g)
            if group["lazy"] == "grad":
                keep = nonzero_rows(values)
                rows, values = rows[keep], values[keep]
            return rows, values
        rows = take_rows(p) if group["lazy"] == "ids" else nonzero_rows(g)
        return rows, g[rows]

    def _sparse_rows(self, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [U] of a sparse gradient, each once, and their values [U, …]."""
        if g.layout != torch.sparse_coo or g.sparse_dim() != 1:
            raise RuntimeError(
                f"{self._name} takes dense gradients and those of nn.Embedding(sparse=True), "
                f"got layout {g.layout} for a parameter of shape {tuple(p.shape)}"
            )
        # Duplicates must be added up before the sign: sign(a) + sign(b) is not sign(a + b).
        g = g.coalesce()
        return g.indices()[0], g.values()

    def _gradient(self, p: Tensor, group: Group) -> Tensor | None:
        """What to descend along, on this process's rows; None leaves the parameter alone."""
        g = self._raw_gradient(p, group)
        if g is None:
            return None
        g, grad_scale = local(g), self._scaling()[0]
        if grad_scale is not None:
            g = g * (1 / grad_scale.to(g.device))
        return -g if group["maximize"] else g

    def _raw_gradient(self, p: Tensor, group: Group) -> Tensor | None:
        """The gradient as autograd left it."""
        return p.grad

    # --- small things ---------------------------------------------------------------------------

    def _init_state(self, p: Tensor, group: Group) -> Group:
        state = self.state[p]
        if not state:
            for name in self.buffers:
                state[name] = torch.zeros_like(
                    p, dtype=group["state_dtype"], memory_format=torch.preserve_format
                )
        if self.counts or group["stochastic_rounding"]:
            # On the device only where a CUDA graph or a kernel must see it: elsewhere reading would wait.
            device = p.device if group["capturable"] or group["fused"] else torch.device("cpu")
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            elif state["step"].device != device:
                state["step"] = state["step"].to(device)
        return state

    def _number(self, p: Tensor) -> int:
        """The place of ``p`` among the optimizer's parameters."""
        cache = self._cache("numbers")
        if id(p) not in cache:
            cache.clear()
            params = (q for group in self.param_groups for q in group["params"])
            cache.update({id(q): i for i, q in enumerate(params)})
        return int(cache[id(p)])

    def _cache(self, of: Any) -> dict[Any, Any]:
        """What can be made again at any time, and so is part of no copy and no checkpoint."""
        caches: dict[Any, dict[Any, Any]] = self.__dict__.setdefault("_caches", {})
        return caches.setdefault(of, {})

    def _use_foreach(self, group: Group) -> bool:
        if group["foreach"] is None:
            return not group["differentiable"] and all(p.is_cuda for p in group["params"])
        return bool(group["foreach"])

    def _refuse_unsafe_capture(self) -> None:
        # Renamed in later versions of torch, where the old name warns.
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        (check or self._cuda_graph_capture_health_check)()

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_group(self, group: Group) -> None:
        check_lr(group["lr"])
        check_number("weight_decay value", group["weight_decay"], 0.0)
        self._check(group)
        check_choice("lazy", group["lazy"], LAZY)
        check_choice("lazy_momentum", group["lazy_momentum"], LAZY_MOMENTUM)
        check_choice("fused", group["fused"], FUSED)
        check_choice("state_dtype", group["state_dtype"], STATE_TYPES)
        check_whole("seed", group["seed"])
        if not isinstance(group["stochastic_rounding"], bool):
            raise TypeError(
                f"stochastic_rounding must be True or False, got {group['stochastic_rounding']!r}"
            )
        for one, other in (
            ("foreach", "differentiable"),
            ("fused", "differentiable"),
            ("fused", "foreach"),
        ):
            if group[one] and group[other]:
                raise ValueError(f"{one}=True and {other}=True exclude each other")
        if group["stochastic_rounding"] and group["capturable"] and not group["fused"]:
            raise ValueError(
                "stochastic_rounding=True with capturable=True needs fused=True: only a kernel draws anew "
                "each time a CUDA graph runs"
            )
        names = group.get("param_names") or ["a parameter"] * len(group["params"])
        for name, p in zip(names, group["params"], strict=True):
            if p.layout != torch.strided or not p.is_floating_point():
                raise ValueError(
                    f"{self._name} requires dense real floating-point parameters, got {name} "
                    f"of shape {tuple(p.shape)}, {p.dtype}, {p.layout}"
                )
            if group["lazy"] and p.dim() < 2:
                raise ValueError(
                    f"lazy={group['lazy']!r} needs parameters with rows (two or more dimensions), "
                    f"got {name} of shape {tuple(p.shape)}"
                )
            check_rows(name, p)
            if group["stochastic_rounding"] and p.dtype == torch.float16:
                raise ValueError(
                    f"stochastic_rounding=True is for bfloat16 parameters, got {name} of shape "
                    f"{tuple(p.shape)}, {p.dtype}"
                )
        if group["fused"]:
            from minisign.optim import fused

            for device in {p.device for p in group["params"]}:
                fused.check(group["fused"], device)


class SharedOptions(TypedDict, total=False):
    """The options that all optimizers share; what they mean is said at :class:`RowOptimizer`."""

    lazy: bool | str
    lazy_momentum: str
    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | str
    state_dtype: torch.dtype | None
    stochastic_rounding: bool
    seed: int


def with_shared(options: SharedOptions, **own: Any) -> Group:
    """An optimizer's defaults: its own and those of the shared options that are not given."""
    shared: SharedOptions = {
        "lazy": False,
        "lazy_momentum": "freeze",
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": False,
        "state_dtype": None,
        "stochastic_rounding": False,
        "seed": 0,
    }
    if unknown := sorted(set(options) - set(shared)):
        raise TypeError(f"unknown option {unknown[0]!r}: choose from {', '.join([*own, *shared])}")
    return {**own, **shared, **options}


def learning_rate(group: Group) -> float | Tensor:
    """The group's rate: a number, unless a CUDA graph, a kernel or autograd has to see the tensor."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and not (
        group["capturable"] or group["differentiable"] or (group["fused"] and lr.is_cuda)
    ):
        return float(lr)
    return lr


def _wide(*tensors: Tensor) -> torch.dtype:
    """What arithmetic on these is done in."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def nonzero_rows(g: Tensor) -> Tensor:
    """Indices of the rows of ``g`` [V, ...] with an entry that is not zero (NaN is not zero)."""
    return g.ne(0).flatten(1).any(1).nonzero().squeeze(1)


def descend(p: Tensor, direction: Tensor, eta: float | Tensor, weight_decay: float) -> None:
    """θ ← θ − η(u + λθ), in place; overwrites ``direction`` u where η is a tensor."""
    if weight_decay != 0:
        p.mul_(1 - eta * weight_decay)
    if isinstance(eta, Tensor):
        p.sub_(direction.mul_(eta))
    else:
        p.add_(direction, alpha=-eta)


def descend_foreach(
    ps: list[Tensor], directions: list[Tensor], eta: float | Tensor | list[Any], weight_decay: float
) -> None:
    """:func:`descend` for lists, with one η or a list of them."""
    if weight_decay != 0:
        factor: Any = (
            [1 - e * weight_decay for e in eta] if isinstance(eta, list) else 1 - eta * weight_decay
        )
        torch._foreach_mul_(ps, factor)
    if isinstance(eta, (Tensor, list)):
        torch._foreach_mul_(directions, eta)
        torch._foreach_sub_(ps, directions)
    else:
        torch._foreach_add_(ps, directions, alpha=-eta)


# --- validation: every message names the value ----------------------------------------------------


def check_number(name: str, value: Any, low: float, below: float = math.inf) -> None:
    """``low`` ≤ value < ``below``, and finite."""
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (low <= value < below):
        raise ValueError(f"Invalid {name}: {value} (must be in [{low:g}, {below:g}))")


def check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")


def check_counts(**counts: Any) -> None:
    """Of each: a whole number, 1 or more."""
    for name, count in counts.items():
        check_whole(name, count)
        if count < 1:
            raise ValueError(f"{name} must be 1 or more, got {count}")


def check_lr(lr: Any) -> None:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        lr = lr.item()
    check_number("learning rate", lr, 0.0)


def check_betas(betas: Any) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        check_number(f"beta parameter at index {i}", beta, 0.0, 1.0)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    # `is` for False: 0 == False, and a typo should not pass as one.
    if not any(value is c if isinstance(c, bool) else value == c for c in choices):
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(map(repr, choices))}")
