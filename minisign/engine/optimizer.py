"""A rule as an optimizer of torch: groups, state, and which road each tensor takes to the rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, TypeAlias

import torch

from minisign.engine import fused, released, roads, tried
from minisign.engine.contract import RuleOptimizer
from minisign.engine.lazy import step_rows
from minisign.engine.options import HOW, Options, check_group, defaults
from minisign.engine.rows import check_rows, unite_rows
from minisign.engine.words import Group
from minisign.engine.work import Work, look, numbers_of

Params: TypeAlias = Iterable[Any]


class Optimizer(RuleOptimizer):
    """A ``torch.optim.Optimizer`` of a rule; a subclass says what :class:`RuleOptimizer` asks for.

    Options of every parameter group, beside the rule's numbers:

    - ``lazy``: ``False``; ``"grad"``, rows whose gradient is all zero stay as they are, bit for bit,
      momentum too; ``"ids"``, the same for rows not recorded by :func:`minisign.track_rows` since
      the last step. Gradients of ``nn.Embedding(sparse=True)`` are lazy whatever this says.
    - ``lazy_momentum``: what the buffers of an absent row do. ``"freeze"`` (default): nothing, as
      in ``torch.optim.SparseAdam``. ``"decay"``: they decay while the row stays, the older meaning of
      a lazy optimizer (kexue.fm/archives/6869).
    - ``maximize``, ``foreach``, ``capturable``, ``differentiable``: as in ``torch.optim``. ``foreach``
      defaults to on where all parameters of a group are on a GPU; the result is the same.
    - ``fused``: all tensors of the group in one pass, by kernels made from the rule: Triton on a GPU,
      C++ on a CPU, compiled at first use; RuntimeError where Triton or a compiler is missing. float32,
      bfloat16 and float16 in any mix, dense tensors of one memory order; others, and what the kernels
      cannot do, take the plain road. ``"cpu"`` or ``"triton"`` names the back end. A gradient must not
      lie in the memory of a weight or a buffer. A checkpoint of one road goes on in any other: loading
      it leaves ``fused``, ``foreach`` and ``release_grads`` as they are.
    - ``state_dtype``: of the buffers, say ``torch.bfloat16``; ``None``: that of the parameter.
    - ``stochastic_rounding``: bfloat16 parameters are rounded at random (see rounding.py), so that steps
      far below their spacing count on average; ``seed`` says which randomness.

    For rules whose momentum is linear in the gradient (halves.py), and refused by others:

    - ``accumulate``: k ≥ 1 micro-batches a step, each with its own mean gradient. Moves exactly as one
      step on their mean, without a buffer. :meth:`step` is called after every micro-batch.
    - ``shrink``: s in [0, 1], the factor of the weights where the gradient is not finite. ``None``: the
      gradient is taken as it is, and not read once more to find out.
    - ``release_grads``: take each gradient into the momentum within ``backward``, and free it
      (released.py). The weights move as without, in :meth:`step`, which is called as often. Not with
      ``lazy`` rows or sparse gradients (their groups can say ``"release_grads": False``),
      ``capturable``, or a GradScaler.
    """

    def __init_subclass__(cls) -> None:
        cls.has_step = "step" in inspect.signature(cls.rule).parameters

    def __init__(self, params: Params, numbers: Group, options: Options) -> None:
        super().__init__(params, defaults(numbers, options))

    @classmethod
    def kernel(cls, device: str = "cpu", dtype: torch.dtype = torch.float32, **given: Any) -> str:
        """The kernel that ``fused=True`` makes of the rule: C++ for "cpu", Triton for "cuda".

        Args:
            dtype: of the parameter. given: arguments of the class.
        """
        return fused.text(cls([torch.zeros(2, 2, dtype=dtype)], **given), device)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure``, if given, evaluates the model again; its loss is returned."""
        # Renamed in later versions of torch, where the old name warns.
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        (check or self._cuda_graph_capture_health_check)()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if getattr(self, "found_inf", None) is not None and self._leaves_out():
            return loss
        with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
            for group in self.param_groups:
                if group["lazy"] == "ids":
                    moving = [p for p in group["params"] if p.grad is not None]
                    unite_rows(moving)
                    check_rows(moving)
            looked: list[tuple[list[Work], Any]] = []  # all, before anything moves
            for group in self.param_groups:
                find = released.look if group["release_grads"] else look
                looked.append(
                    fused.prepare(self, group, find) if group["fused"] else (find(self, group), None)
                )
            for group, (works, plan) in zip(self.param_groups, looked, strict=True):
                self._move(group, works if plan is None else fused.step(self, group, plan))
                if group["accumulate"] > 1 or group["release_grads"]:
                    for work in works:
                        if work.taken is not None:
                            work.state["taken"] = work.taken
                if group["release_grads"]:
                    released.forget(self, group, works)
                group["micro_step"] = (group["micro_step"] + 1) % group["accumulate"]
        return loss

    def _move(self, group: Group, works: Sequence[Work]) -> None:
        """Each tensor by itself, or those together that can be; of lazy and sparse ones some rows."""
        grad_scale, foreach = getattr(self, "grad_scale", None), group["foreach"]
        if foreach is None:
            foreach = not group["differentiable"] and all(map(attrgetter("is_cuda"), group["params"]))
        if not self.is_traceable:
            foreach = False  # lists may not know what the rule does
        if group["capturable"] and group["shrink"] is not None:
            foreach = False  # a list waits for the device to say what is finite, which a CUDA graph cannot
        dense = []
        for work in works:
            if "step" in work.state:
                work.state["step"] += 1
            if grad_scale is not None:
                work = work._replace(g=work.g * (1 / grad_scale.to(work.g.device)))
            if group["maximize"]:
                work = work._replace(g=-work.g)
            if group["lazy"] or work.g.layout != torch.strided:
                step_rows(work, group)
            else:
                dense.append(work)
        (roads.together if foreach else roads.apart)(dense)

    # --- torch.optim's contract -----------------------------------------------------------------

    def __setstate__(self, state: Group) -> None:
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        self.cache("fused").clear()  # plans hold the state that is gone
        for group in self.param_groups:  # a checkpoint from before an option existed
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        for group, own in zip(self.param_groups, before, strict=False):
            group.update({name: own[name] for name in HOW if name in own})
        for group in self.param_groups:
            released.hook(self, group)

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
        released.hook(self, group)

    def _why_not_linear(self, group: Group) -> str:
        numbers = numbers_of(self, group) | ({"step": 1.0} if self.has_step else {})
        return tried.why_not_linear(self.rule, len(self.buffers), numbers)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # With True a GradScaler hands over its scale, and for released gradients comes to where it is
        # refused.
        return any(group["fused"] or group["release_grads"] for group in self.param_groups)

    def _leaves_out(self) -> bool:
        """Whether a GradScaler has found an infinite gradient; the kernels on a GPU see to that by
        themselves."""
        if any(group["release_grads"] for group in self.param_groups):
            raise RuntimeError(released.NO_SCALER)
        in_kernels = (
            group["fused"] and group["accumulate"] == 1 and all(p.is_cuda for p in group["params"])
            for group in self.param_groups
        )  # fmt: skip
        return not all(in_kernels) and bool(self.found_inf.item())  # type: ignore[attr-defined]
