"""Which rows a lazy step moves: the same whatever tells of them, or an error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import HANG
from torch import nn
from torch.nn import functional as F

from minisign import AdamW, Lion, Signum, Tiger, track_rows
from minisign.lab.config import Config
from minisign.studies.processes import ONE_THREAD

ROADS: dict[str, dict[str, Any]] = {"plain": {}, "cpu": {"fused": "cpu"}}
if os.environ["TRITON_INTERPRET"] == "1":
    ROADS["interpreted"] = {"fused": "triton"}
each_road = pytest.mark.parametrize("road", ROADS)
ROW = torch.tensor([1])


def tied(e: nn.Embedding) -> torch.Tensor:
    head = nn.Linear(4, 6, bias=False)
    head.weight = e.weight
    return head(e(ROW)).square()


def two_modules(e: nn.Embedding) -> torch.Tensor:
    other = nn.Embedding(6, 4)
    other.weight = e.weight
    return e(ROW) + other(ROW + 1)


# --- ids: what did not come through the recorded call ---------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda e: F.embedding(ROW, e.weight),
        lambda e: e.weight[ROW],
        lambda e: F.one_hot(ROW, 6).float() @ e.weight,
        lambda e: e(ROW) + e.weight[3],
        lambda e: e(ROW) + e.weight.mean(0),
        tied,
        two_modules,
    ],
    ids=["functional", "index", "one-hot", "beside", "mean", "tied", "two modules"],
)
@each_road
def test_a_gradient_from_elsewhere_is_not_thrown_away(road: str, use: Callable[..., torch.Tensor]) -> None:
    first, e = nn.Parameter(torch.ones(3)), nn.Embedding(6, 4)
    track_rows(e)
    made = Lion([{"params": [first]}, {"params": [e.weight], "lazy": "ids"}], **ROADS[road])
    (use(e).sum() + first.sum()).backward()
    before = e.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"throw away the gradient of row \d .* shape \(6, 4\)"):
        made.step()
    assert torch.equal(e.weight, before)
    assert (first == 1).all()


@each_road
def test_a_gradient_from_elsewhere_is_seen_later_too(road: str) -> None:
    e = nn.Embedding(6, 4)
    track_rows(e)
    made = Lion(e.parameters(), lazy="ids", **ROADS[road])
    for t in range(1, 9):
        made.zero_grad()
        (e(ROW) if t < 8 else e(ROW) + e.weight[3]).sum().backward()
        if t == 8:
            with pytest.raises(RuntimeError, match="gradient of row 3 "):
                made.step()
        else:
            made.step()


def test_what_was_compiled_before_it_was_tracked() -> None:
    e = nn.Embedding(6, 4)
    model = torch.compile(nn.Sequential(e, nn.Linear(4, 1)), backend="eager")
    model(ROW).sum().backward()
    track_rows(e)
    model(ROW).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of row 1 .* compiled before track_rows"):
        Lion(e.parameters(), lazy="ids").step()


@each_road
def test_all_modules_of_a_weight_may_be_tracked(road: str) -> None:
    moved = []
    for lazy in ("grad", "ids"):
        torch.manual_seed(0)
        e = nn.Embedding(6, 4)
        twin = nn.Embedding(6, 4)
        twin.weight = e.weight
        track_rows(nn.ModuleList([e, twin]))
        made = Signum(e.parameters(), lazy=lazy, **ROADS[road])
        for t in range(4):
            made.zero_grad()
            (e(ROW) + twin(input=ROW + t)).sum().backward()
            made.step()
        moved.append(e.weight.detach())
    assert torch.equal(*moved)


@pytest.mark.parametrize("tie", ["tied", "half_swap"])
def test_the_main_job_refuses_ids_for_a_tied_matrix(tie: str) -> None:
    with pytest.raises(ValueError, match=rf"lazy 'ids' is not for tie '{tie}'"):
        Config(tie=tie, lazy="ids")
    Config(tie=tie, lazy="grad")


# --- absent: no gradient, or one that is all zero -------------------------------------------------


def run(how: str, cls: Any, road: str, programme: Sequence[Any], dtype: torch.dtype, **more: Any) -> Any:
    """An embedding after a programme of (ids, factor of the loss, whether the step is made)."""
    torch.manual_seed(0)
    e = nn.Embedding(6, 4, sparse=how == "sparse").to(dtype)
    track_rows(e)
    made = cls(e.parameters(), lr=0.1, lazy=False if how == "sparse" else how, **more, **ROADS[road])
    target = torch.randn(6, 4).to(dtype)
    for ids, factor, is_made in programme:
        made.zero_grad()
        rows = torch.tensor(ids)
        ((e(rows) - target[rows]).square() * torch.tensor(factor).to(dtype).view(-1, 1)).sum().backward()
        if is_made:
            made.step()
    state = made.state[e.weight]
    return [e.weight.detach(), *(state[name] for name in cls.buffers)]


PROGRAMMES = {
    "padding": [([0, 1], [1.0, 1.0], True), *[([0, 1], [1.0, 0.0], True)] * 5, ([1, 2], [0.0, 1.0], True)],
    "all masked": [([0, 1], [1.0, 1.0], True), ([0, 1], [0.0, 0.0], True), ([3, 3], [1.0, 0.0], True)],
    "left out": [([0, 1], [1.0, 1.0], True), ([0, 1, 2], [1.0] * 3, False), ([4, 5], [1.0, 1.0], True)],
    "duplicates": [([2, 2, 1, 2], [1.0, 0.3, 1.0, 0.7], True), ([2, 1, 2], [1.0, 1.0, 1.0], True)],
}


@pytest.mark.parametrize("programme", PROGRAMMES)
@pytest.mark.parametrize(
    ("cls", "more"),
    [
        (Signum, {}),
        (Lion, {}),
        (AdamW, {}),
        (Tiger, {"scale": "row_rms"}),
        (Tiger, {"scale": 1.0, "accumulate": 2}),
        (Signum, {"lazy_momentum": "decay"}),
        (Lion, {"stochastic_rounding": True}),
    ],
    ids=lambda x: getattr(x, "__name__", None) or ", ".join(map(str, x)),
)
@each_road
def test_absence_means_the_same(road: str, cls: Any, more: dict[str, Any], programme: str) -> None:
    dtype = torch.bfloat16 if "stochastic_rounding" in more else torch.float32
    if dtype == torch.bfloat16 and programme == "duplicates":
        programme = "padding"  # see below
    found = [run(how, cls, road, PROGRAMMES[programme], dtype, **more) for how in ("grad", "ids", "sparse")]
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert torch.equal(a, b)


@each_road
def test_duplicates_of_a_narrow_type_are_added_up_before_they_are_rounded(road: str) -> None:
    """1 − 1100/1024 is below 0; in bfloat16 each part would be lost, and it would stay at 1."""
    values = torch.tensor([[1.0], *[[-1.0 / 1024]] * 1100], dtype=torch.bfloat16)
    p = nn.Parameter(torch.zeros(2, 1, dtype=torch.bfloat16))
    p.grad = torch.sparse_coo_tensor(torch.zeros(1, 1101, dtype=torch.long), values, (2, 1))
    exact = values.double().sum().item()
    made = Signum([p], lr=1.0, beta=0.0, weight_decay=0.0, state_dtype=torch.float32, **ROADS[road])
    made.step()
    assert made.state[p]["momentum"][0].item() == pytest.approx(exact, abs=1e-6)


# --- several processes ----------------------------------------------------------------------------

WORKER = """
import sys, torch
from torch import nn
from minisign import Lion, Hybrid, AdamW, track_rows
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
found = {}
for lazy in ("grad", "ids"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 2))
    if lazy == "ids":
        track_rows(model)  # before it is wrapped, as a Trainer's user does
    model = nn.parallel.DistributedDataParallel(model)
    weight = model.module[0].weight
    made = Lion([{"params": [weight], "lazy": lazy}, {"params": [*model.module[1].parameters()]}], lr=0.1)
    for t in range(6):
        made.zero_grad()
        ids = torch.tensor([[0, 1], [2, 3]])[rank] + t % 2
        model(ids).square().sum().backward()
        made.step()
    found[lazy] = weight.detach()
gathered = [torch.empty(8, 4) for _ in range(2)]
torch.distributed.all_gather(gathered, found["ids"])
assert torch.equal(*gathered), "replicas have parted"
assert torch.equal(found["ids"], found["grad"]), "other rows moved"
from torch.distributed.optim import ZeroRedundancyOptimizer
e = nn.Embedding(8, 4)
track_rows(e)
try:
    ZeroRedundancyOptimizer(e.parameters(), Lion, lr=0.1, lazy="ids")
except ValueError as error:
    assert "not for ZeroRedundancyOptimizer" in str(error), error
else:
    raise AssertionError("ids under ZeroRedundancyOptimizer")
made = ZeroRedundancyOptimizer(e.parameters(), Lion, lr=0.1, lazy="grad")
e(torch.tensor([rank])).sum().backward()
torch.distributed.all_reduce(e.weight.grad)
made.step()
e.weight.grad = None
e(torch.tensor([rank])).sum().backward()
torch.distributed.all_reduce(e.weight.grad)
try:  # gradients that were averaged by hand, and nobody said so
    Lion(e.parameters(), lazy="ids").step()
except RuntimeError as error:
    assert f"gradient of row {1 - rank} " in str(error), error
else:
    raise AssertionError("the other process's row was thrown away")
torch.distributed.destroy_process_group()
"""


def test_replicas_stay_one_though_the_bare_model_was_tracked(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "worker.py"],
        cwd=tmp_path,
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
