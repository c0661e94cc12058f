"""bfloat16 parameters, rounded at random so that small steps are not lost.

A bfloat16 has 8 bits for its leading digits: a step of less than 1/512 of a weight's size is rounded away,
at every step anew, and the weight stalls. Rounded up with the probability of what is cut off, it moves by
the right amount on average.

The noise is a hash of (seed, parameter, step, entry), the finalizer of MurmurHash3 (Appleby, public
domain). So it needs no generator state, a resumed run draws what the unbroken one would have drawn, and
the kernels draw the same numbers as this file.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minisign.engine.shards import first_row, is_sharded, local

ALL_BITS = 0xFFFFFFFF


class Noise(NamedTuple):
    """What the roundings of one parameter at one step follow from."""

    p: Tensor  # the parameter, whole
    seed: int  # from :func:`noise_of`
    step: Tensor  # the state's counter, which is read when something is rounded

    def rounded(self, new: Tensor, rows: Tensor | None) -> Tensor:
        """New values of the parameter's entries on this process, or of these rows of them."""
        index = places(self.p) if rows is None else places(self.p)[rows]
        return round_at_random(new.float(), index, self.seed, int(self.step.item()))


def mix(x: Any) -> Any:
    """The finalizer of MurmurHash3 on 32 bits: of a number, or of each in an int64 tensor."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & ALL_BITS
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & ALL_BITS
    return x ^ (x >> 16)


def noise_of(seed: int, number: int) -> int:
    """What all roundings of an optimizer's parameter with this number follow from, 32 bits."""
    return int(mix((seed + 0x9E3779B9 * number) & ALL_BITS))


def round_at_random(x: Tensor, index: Tensor, noise: int, step: int) -> Tensor:
    """``x`` as bfloat16: one of its two neighbours, so that the mean is ``x``.

    Args:
        x: float32, any shape. index: int64, as x; the place of each entry in its parameter.
        noise: from :func:`noise_of`. step: of the parameter, from 1.
    """
    key = mix((noise + step) & ALL_BITS)
    h = ((index & ALL_BITS) * 0x9E3779B1 + (index >> 32) * 0x85EBCA77 + key) & ALL_BITS
    up = (mix(h) >> 16).to(torch.int32)
    rounded = ((x.contiguous().view(torch.int32) + up) & -0x10000).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


def places(p: Tensor) -> Tensor:
    """The place of each entry of ``p`` in memory order, or in reading order where p has holes; of a sharded
    one, that of this process's entries in the whole."""
    if is_sharded(p):
        return places(local(p)) + first_row(p) * math.prod(p.shape[1:])
    order = torch.arange(p.numel(), device=p.device)
    if not p.is_contiguous() and torch.ops.aten.is_non_overlapping_and_dense(p):
        return order.as_strided(p.shape, p.stride())
    return order.view(p.shape)
