"""A list of tensors that acts as one: torch's words for lists, called as its methods are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from minisign.engine.words import Rule, rms

FACTORS = ("alpha", "value")


class DependsOnValues(TypeError):
    """An ``if`` on a tensor."""


class Tensors:
    """Tensors of one dtype and device; what is done to it is done to each.

    Beside what a tensor's methods take, a factor (``alpha``, ``value``) may be a tensor, as the rate is in
    a CUDA graph, or one for each.
    """

    def __init__(self, tensors: Sequence[Tensor], is_fixed: bool = False) -> None:
        """``is_fixed``: what would change them in place does nothing."""
        self.tensors, self.is_fixed = list(tensors), is_fixed

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    def fixed(self) -> Tensors:
        return Tensors(self.tensors, is_fixed=True)

    def rms(self, over: str) -> Tensors:
        return Tensors([rms(x, over) for x in self.tensors])

    def __getattr__(self, name: str) -> Callable[..., Tensors]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("shape", "ndim", "dim", "size", "numel", "device") and len(self.tensors) == 1:
            return getattr(self.tensors[0], name)
        return partial(self._do, name)

    def _do(self, name: str, *arguments: Any, **factors: Any) -> Tensors:
        in_place = name.endswith("_")
        if in_place and self.is_fixed:
            return self
        for word, factor in factors.items():
            if isinstance(factor, (Tensor, Tensors)) and word in FACTORS:
                return self._with_factor(name, factor, *arguments)
        if any(isinstance(x, (Tensor, Tensors)) for x in factors.values()):
            names, n = tuple(factors), len(arguments)

            def named(x: Tensor, *own: Any) -> Tensor:
                done: Tensor = getattr(x, name)(*own[:n], **dict(zip(names, own[n:], strict=True)))
                return done

            done = self._each(named, self, *arguments, *factors.values())
            return self if in_place else done
        together = getattr(torch, f"_foreach_{name}", None)
        shaped = any(isinstance(x, Tensor) or (factors and not isinstance(x, Tensors)) for x in arguments)
        if together is None or shaped or torch.is_grad_enabled():  # no such word for lists, or no gradient
            done = self._each(lambda x, *own: getattr(x, name)(*own, **factors), self, *arguments)
            return self if in_place else done
        lists = (x.tensors if isinstance(x, Tensors) else x for x in arguments)
        done = together(self.tensors, *lists, **factors)
        return self if in_place else Tensors(done)

    def _with_factor(self, name: str, factor: Any, y: Any, *z: Any) -> Tensors:
        """x + αy, x − αy, x + αyz, x + αy/z."""
        word, do = name.strip("_"), Tensor.addcmul_ if name.endswith("_") else Tensor.addcmul
        if z:
            y = y * z[0] if word == "addcmul" else y / z[0]
        done = self._each(do, self, y, -factor if word == "sub" else factor)
        return self if do is Tensor.addcmul_ else done

    @staticmethod
    def _each(function: Callable[..., Tensor], *arguments: Any) -> Tensors:
        """``function`` of the first, second, … of each list."""
        count = next(len(x.tensors) for x in arguments if isinstance(x, Tensors))
        columns = [x.tensors if isinstance(x, Tensors) else [x] * count for x in arguments]
        return Tensors([function(*own) for own in zip(*columns, strict=True)])

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Tensors:
        return cls._each(partial(function, **(options or {})), *arguments)

    def __bool__(self) -> bool:
        raise DependsOnValues(
            "a rule depends on a tensor's values; it may choose by torch.where, not by `if`"
        )


def as_list(x: Any) -> Any:
    """A tensor as a list of one, so that factors may be tensors."""
    return Tensors([x]) if isinstance(x, Tensor) else x


def on_lists(rule: Rule) -> Rule:
    """The same rule, with a factor for each row, which no tensor's ``alpha`` takes."""

    @wraps(rule)
    def carried_out(*tensors: Any, **numbers: Any) -> None:
        rule(*map(as_list, tensors), **numbers)

    return carried_out


def _signs() -> None:
    """Python's signs. Those that torch has no word for on lists are done to each by itself."""
    for name, word in {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow"}.items():
        setattr(Tensors, f"__{name}__", lambda a, b, w=word: a._do(w, b))
        setattr(Tensors, f"__i{name}__", lambda a, b, w=word: a._do(f"{w}_", b))
    single = "radd rsub rmul rtruediv rpow mod rmod floordiv rfloordiv lt le gt ge eq ne and or iand ior"
    for name in f"{single} neg abs invert".split():
        sign = f"__{name}__"
        setattr(Tensors, sign, lambda *xs, s=sign: Tensors._each(lambda x, *own: getattr(x, s)(*own), *xs))


_signs()
