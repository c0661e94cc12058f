"""A rule as an optimizer of torch: groups, state, and which road each tensor takes to the rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from minisign.engine import fused, halves, released, roads
from minisign.engine.contract import ExactOptimizer
from minisign.engine.options import HOW, Group, Options, check_group, defaults
from minisign.engine.roads import Guard, Rule, Work
from minisign.engine.rounding import Noise, noise_of
from minisign.engine.rows import moving_rows, rows_of_cycle, unite_rows
from minisign.engine.shards import ask_all, is_sharded, local
from minisign.engine.words import rms

Params: TypeAlias = Iterable[Any]


class Optimizer(ExactOptimizer):
    """A ``torch.optim.Optimizer`` of a rule; a subclass names the rule, its buffers and its numbers.

    Options of every parameter group, beside the rule's numbers:

    - ``lazy``: ``False``; ``"grad"``, rows whose gradient is all zero stay as they are, bit for bit,
      momentum too; ``"ids"``, the same for rows not recorded by :func:`minisign.track_rows` since
      the last step. Gradients of ``nn.Embedding(sparse=True)`` are lazy whatever this says.
    - ``lazy_momentum``: what the buffers of an absent row do. ``"freeze"`` (default): nothing, as
      in ``torch.optim.SparseAdam``. ``"decay"``: they decay while the row stays, the older meaning of
      a lazy optimizer (kexue.fm/archives/6869).
    - ``maximize``, ``foreach``, ``capturable``, ``differentiable``: as in ``torch.optim``. ``foreach``
      defaults to on where all parameters of a group are on a GPU; the result is the same.
    - ``fused``: all tensors of the group in one pass, by kernels made from the rule: Triton on a GPU, C++ on
      a CPU, compiled at first use; RuntimeError where Triton or a compiler is missing. float32, bfloat16
      and float16 in any mix, dense tensors of one memory order; others, and what the kernels cannot do,
      take the plain road. ``"cpu"`` or ``"triton"`` names the back end. A checkpoint of one goes on in any
      other: loading it leaves ``fused``, ``foreach`` and ``release_grads`` as they are.
    - ``state_dtype``: of the buffers, say ``torch.bfloat16``; ``None``: that of the parameter.
    - ``stochastic_rounding``: bfloat16 parameters are rounded at random (see rounding.py), so that steps
      far below their spacing count on average; ``seed`` says which randomness.

    For rules whose momentum is linear in the gradient (halves.py), and refused by others:

    - ``accumulate``: k ≥ 1 micro-batches a step, each with its own mean gradient. Moves exactly as one
      step on their mean, without a buffer. :meth:`step` is called after every micro-batch.
    - ``shrink``: s in [0, 1], the factor of the weights where the gradient is not finite. ``None``: the
      gradient is taken as it is, and not read once more to find out.
    - ``release_grads``: take each gradient into the momentum within ``backward``, and free it (released.py).
      The weights move as without, in :meth:`step`, which is called as often. Not with ``lazy`` rows or
      sparse gradients (their groups can say ``"release_grads": False``), ``capturable``, or a GradScaler.

    Attributes of a subclass:
        rule: one step in place, ``rule(p, g, *buffers, **numbers)``.
        buffers: what the state calls them.
        bounds: of each number, [low, below). ``betas`` are the rule's ``beta1``, ``beta2``, …
        own: numbers that :meth:`own_numbers` may give; the rule asks nothing of them (``if``).
    """

    rule: ClassVar[Rule]
    buffers: ClassVar[tuple[str, ...]] = ("momentum",)
    own: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[bool] = False
    bounds: ClassVar[Mapping[str, tuple[float, float]]]

    def __init_subclass__(cls) -> None:
        cls.counts = "step" in inspect.signature(cls.rule).parameters

    def __init__(self, params: Params, numbers: Group, options: Options) -> None:
        super().__init__(params, defaults(numbers, options))

    def own_numbers(self, p: Tensor, group: Group) -> Group:
        """Those of the rule's numbers that are others for this parameter."""
        return {}

    @classmethod
    def kernel(cls, device: str = "cpu", dtype: torch.dtype = torch.float32, **given: Any) -> str:
        """The kernel that ``fused=True`` makes of the rule: C++ for "cpu", Triton for "cuda".

        Args:
            dtype: of the parameter. given: arguments of the class.
        """
        optimizer = cls([torch.zeros(2, 2, dtype=dtype)], **given)  # type: ignore[call-arg, arg-type]
        return fused.text(optimizer, optimizer.param_groups[0], device)

    # --- torch.optim's contract -----------------------------------------------------------------

    def __setstate__(self, state: Group) -> None:
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint from before an option existed
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        for group, own in zip(self.param_groups, before, strict=False):
            group.update({name: own[name] for name in HOW if name in own})
        for number in range(len(self.param_groups)):
            released.hook(self, number)

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict) and self.param_groups:  # in step with the others
            param_group.setdefault("micro_step", self.param_groups[0]["micro_step"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(type(self).__name__, group, self.bounds, lambda: self._why_not_linear(group))
            if group["fused"]:
                fused.check(self, group)
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        released.hook(self, len(self.param_groups) - 1)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure``, if given, evaluates the model again; its loss is returned."""
        # Renamed in later versions of torch, where the old name warns.
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        (check or self._cuda_graph_capture_health_check)()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._leaves_out():
            return loss
        with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
            for group in self.param_groups:  # before anything moves
                if not fused.keeps_plan(self, group):
                    self._check_states(group)
            for group in self.param_groups:
                self._step_group(group)
                group["micro_step"] = (group["micro_step"] + 1) % group["accumulate"]
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # With True a GradScaler hands over its scale, and for released gradients comes to where it is refused.
        return any(group["fused"] or group["release_grads"] for group in self.param_groups)

    def _leaves_out(self) -> bool:
        """Whether a GradScaler has found an infinite gradient; the kernels on a GPU see to that by themselves."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return False
        if any(group["release_grads"] for group in self.param_groups):
            raise RuntimeError(
                "release_grads=True and a GradScaler exclude each other: gradients went into the momentum "
                "with a scale on them. Train in bfloat16, which needs no scale, or without release_grads"
            )
        in_kernels = (g["fused"] and g["accumulate"] == 1 and all(p.is_cuda for p in g["params"]) for g in self.param_groups)
        return not all(in_kernels) and bool(found_inf.item())

    # --- one group ------------------------------------------------------------------------------

    def _step_group(self, group: Group) -> None:
        if group["release_grads"]:
            return released.step(self, group)
        if group["lazy"] == "ids":
            for p in group["params"]:
                if p.grad is not None:
                    unite_rows(p)
        ask_all(self, group)
        params = fused.step(self, group) if group["fused"] else group["params"]
        numbers, dense = self.numbers(group), []
        for p in params:
            g = self.gradient(p, group)
            if g is None:
                continue
            work = self.work(p, g, group, numbers)
            if group["lazy"] or g.layout != torch.strided:
                self._step_rows(p, work, group)
            else:
                dense.append(work)
        # In a loop of its own: tensors push what Python needs out of the cache, so do the rest before.
        if self._use_foreach(group):
            roads.together(dense)
        else:
            for work in dense:
                roads.one(work)
        return None

    def _step_rows(self, p: Tensor, work: Work, group: Group) -> None:
        index, g = moving_rows(p, work.g, group)
        numbers = {name: rms(work.p) if x == "rms" else x for name, x in work.numbers.items()}  # of the whole
        left, decays = [1.0] * len(self.buffers), group["lazy_momentum"] == "decay"
        if group["accumulate"] > 1:
            keep, last = numbers["keep"], self.is_last(group)
            index, g, numbers["keep"] = rows_of_cycle(p, self.state[p], index, g, keep, last)
            left = [keep] if decays and last else left
        elif decays:
            left = halves.left(type(self).rule, len(self.buffers), numbers)
        roads.rows(work._replace(g=g, numbers=numbers), index, left)

    def work(self, p: Tensor, g: Tensor, group: Group, numbers: Group) -> Work:
        """What a plain road needs to know of a parameter, whose step is counted."""
        state = self.state_of(p, group)
        rule, numbers = self.part(p, group, numbers)
        if "step" in state:
            state["step"] += 1
        if self.counts:
            numbers = {**numbers, "step": state["step"] if group["capturable"] else state["step"].item()}
        noise = None
        if group["stochastic_rounding"] and p.dtype == torch.bfloat16:
            noise = Noise(p, noise_of(group["seed"], self.number(p)), int(state["step"].item()))
        buffers = [local(state[name]) for name in self.buffers]
        return Work(rule, local(p), g, buffers, numbers, noise, self.guard(group))

    def part(self, p: Tensor, group: Group, numbers: Group) -> tuple[Rule, Group]:
        """The rule, or the half of it that is due at this micro-batch, and all its numbers for one parameter."""
        rule, numbers = type(self).rule, {**numbers, **self.own_numbers(p, group)}
        if is_sharded(p):
            sizes = self.cache("whole rms")
            numbers = {name: sizes.get(p, x) if x == "rms" else x for name, x in numbers.items()}
        if group["accumulate"] == 1:
            return rule, numbers
        state, last = self.state[p], self.is_last(group)
        keep, weight = halves.keep_and_weight(rule, numbers)
        if not (group["lazy"] or (p.grad is not None and p.grad.is_sparse)):  # rows remember by themselves
            keep = 1.0 if state.get("taken") else keep
            state["taken"] = 0 if last else state.get("taken", 0) + 1
        half = {"keep": keep, "weight": weight / group["accumulate"]}
        return (halves.take_and_move(rule), {**half, **numbers}) if last else (halves.take, half)

    def numbers(self, group: Group) -> Group:
        """The rule's numbers that all parameters of a group share."""
        found = {name: group[name] for name in self.bounds if name != "betas"}
        found |= {f"beta{i}": beta for i, beta in enumerate(group.get("betas", ()), start=1)}
        lr = group["lr"]  # a number, unless a CUDA graph, a kernel or autograd has to see the tensor
        seen = group["capturable"] or group["differentiable"] or (group["fused"] and lr.is_cuda) if isinstance(lr, Tensor) else True
        if not seen:
            found["lr"] = lr.item()
        return found

    def _check_states(self, group: Group) -> None:
        """A shape is what the kernels trust an address for."""
        for i, p in enumerate(group["params"]):
            state = self.state.get(p, {})
            for name in self.buffers:
                b = state.get(name, p)
                if b.shape != p.shape or torch._debug_has_internal_overlap(local(b)) == 1:
                    called = group["param_names"][i] if "param_names" in group else f"parameter {i} of its group"
                    raise ValueError(
                        f"{called} has shape {tuple(p.shape)}, and its {name} in the state has shape "
                        f"{tuple(b.shape)} and strides {b.stride()}: a checkpoint of another model or "
                        "order of parameters, or a parameter that was replaced after a step; make the optimizer anew, "
                        "or take the parameter's entry out of its state"
                    )

    # --- what the roads ask for -----------------------------------------------------------------

    def gradient(self, p: Tensor, group: Group) -> Tensor | None:
        """What to descend along, on this process's rows; None leaves the parameter alone."""
        g = self.raw_gradient(p, group)
        if g is None:
            return None
        g, grad_scale = local(g), getattr(self, "grad_scale", None)
        if grad_scale is not None:
            g = g * (1 / grad_scale.to(g.device))
        return -g if group["maximize"] else g

    def raw_gradient(self, p: Tensor, group: Group) -> Tensor | None:
        """As autograd left it; zero where there was one earlier in a cycle of micro-batches that ends now."""
        if p.grad is None and group["accumulate"] > 1 and self.is_last(group):
            if self.state[p].get("taken"):
                return torch.zeros_like(p)
            if "taken_rows" in self.state[p] and self.state[p]["taken_rows"].any():
                none, empty = p.new_empty((1, 0), dtype=torch.int64), p.new_empty((0, *p.shape[1:]))
                return torch.sparse_coo_tensor(none, empty, p.shape, check_invariants=False)
        return p.grad

    def state_of(self, p: Tensor, group: Group) -> Group:
        state = self.state[p]
        if not state:
            for name in self.buffers:
                state[name] = torch.zeros_like(p, dtype=group["state_dtype"], memory_format=torch.preserve_format)
        if self.counts or group["stochastic_rounding"]:
            # On the device only where a CUDA graph or a kernel must see it: elsewhere reading would wait.
            device = p.device if group["capturable"] or group["fused"] else torch.device("cpu")
            step = state.get("step", 0.0)
            if not isinstance(step, Tensor) or step.device != device or step.dtype != torch.float32:
                state["step"] = torch.as_tensor(step, dtype=torch.float32, device=device).clone()
        return state

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

    def guard(self, group: Group) -> Guard | None:
        return None if group["shrink"] is None else Guard(group["shrink"], group["center"])

    def is_last(self, group: Group) -> bool:
        """Whether θ moves at this micro-batch."""
        return bool(group["micro_step"] + 1 >= group["accumulate"])

    def keep_and_weight(self, group: Group) -> tuple[float, float]:
        """Of the momentum, and of one micro-batch's gradient in it."""
        keep, weight = halves.keep_and_weight(type(self).rule, self.numbers(group))
        return keep, weight / group["accumulate"]

    def _why_not_linear(self, group: Group) -> str:
        numbers = self.numbers(group) | ({"step": 1.0} if self.counts else {})
        return halves.why_not_linear(type(self).rule, len(self.buffers), numbers)

    def _use_foreach(self, group: Group) -> bool:
        if group["capturable"] and group["shrink"] is not None:
            return False  # to learn on a list what is finite is to wait for the device, which a graph cannot
        if group["foreach"] is None:
            return not group["differentiable"] and all(p.is_cuda for p in group["params"])
        return bool(group["foreach"])
