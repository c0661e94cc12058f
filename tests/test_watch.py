"""EmbeddingWatch: its envelope, what it warns of and what not, and what it writes."""

from __future__ import annotations

import copy
import json
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minisign import AdamW, EmbeddingWatch, Hybrid, Lion, Signum, Tiger, param_groups
from minisign.doctor.watch import LOG, EmbeddingWarning
from minisign.lab.jitter import jittered

V, D = 400, 16
STOPS = 40  # from this step on only half the tokens come


class Bag(nn.Module):
    """Predicts a number from each of a few tokens: the smallest model with an embedding and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V, D)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head = nn.Linear(D, V, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tokens(ids))
        return logits


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, each: Any = None) -> None:
    """Predicts the following id, which a third are not; after ``STOPS`` steps the upper half of the tokens
    stops coming."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        ids = torch.randint(V if step < STOPS else V // 2, (256,), generator=generator)
        targets = torch.where(torch.rand(256, generator=generator) < 1 / 3, ids[0], ids + 1) % V
        loss = nn.functional.cross_entropy(model(ids), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if each is not None:
            each(step)


def always_the_same(model: Bag, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The same gradient at every step, with the sign of each entry: pushes every entry outwards."""
    push = -torch.where(model.tokens.weight >= 0, 1.0, -1.0)
    for _ in range(steps):
        model.tokens.weight.grad = push.clone()
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "tiger": lambda p: Tiger(p, lr=0.05, weight_decay=0.5),
    "row": lambda p: Tiger(p, lr=0.05, weight_decay=0.5, scale="row_rms"),
    "base": lambda p: Tiger(p, lr=0.02, weight_decay=0.5, scale=1.0),
    "lion": lambda p: Lion(p, lr=0.02, weight_decay=0.5),
    "signum": lambda p: Signum(p, lr=0.02, weight_decay=0.5),
    "free": lambda p: Lion(p, lr=0.02, weight_decay=0.0),
}


# --- the envelope ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_entry_whose_sign_never_changes_stays_on_the_envelope(name: str) -> None:
    model = Bag()
    # All of one size: then each row has the RMS of the matrix, and the largest entry that of its row.
    with torch.no_grad():
        model.tokens.weight.copy_(torch.where(model.tokens.weight >= 0, 0.02, -0.02))
    optimizer = OPTIMIZERS[name]([model.tokens.weight])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 20, gamma=0.7)
    watch = EmbeddingWatch(model, optimizer, every=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmbeddingWarning)
        for _ in range(100):
            always_the_same(model, optimizer, 1)
            schedule.step()
    looks = watch.looks["tokens.weight"]
    assert [look.step for look in looks] == list(range(10, 101, 10))
    for look in looks:
        assert look.largest == pytest.approx(look.envelope, rel=2e-6)
        assert look.push < look.envelope
        assert look.bound == (math.inf if name == "free" else 2.0)
    assert looks[-1].rows == V


def test_nothing_is_beyond_the_envelope() -> None:
    for make in OPTIMIZERS.values():
        torch.manual_seed(0)
        model = Bag()
        optimizer = make(model.parameters())
        watch = EmbeddingWatch(model, optimizer, every=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EmbeddingWarning)
            fit(model, optimizer, 60)
        # Tiger's RMS is measured at a look and taken on from there as if every entry went outwards.
        for looks in watch.looks.values():
            assert len(looks) == 60
            for look in looks:
                assert look.largest <= look.envelope * (1 + 1e-6)


def test_the_envelope_between_two_looks_is_an_upper_one() -> None:
    model = Bag()
    optimizer = OPTIMIZERS["tiger"](model.parameters())
    watch = EmbeddingWatch(model, optimizer, every=60)
    fit(model, optimizer, 60)
    assert [look.largest <= look.envelope for look in watch.look()] == [True, True]


def test_micro_batches_make_no_step() -> None:
    model = Bag()
    optimizer = Tiger([model.tokens.weight], lr=0.01, weight_decay=0.5, scale=1.0, accumulate=4)
    watch = EmbeddingWatch(model, optimizer, every=1)
    always_the_same(model, optimizer, 8)
    push = [look.push for look in watch.looks["tokens.weight"]]
    assert push == [0.0] * 3 + [0.01] * 4 + [pytest.approx(0.01 + 0.01 * (1 - 0.005))]
    look = watch.looks["tokens.weight"][-1]
    assert look.largest == pytest.approx(look.envelope, rel=1e-6)


def test_without_a_gradient_nothing_moves() -> None:
    model = Bag()
    optimizer = OPTIMIZERS["lion"]([model.tokens.weight, model.head.weight])
    watch = EmbeddingWatch(model, optimizer, every=1)
    always_the_same(model, optimizer, 2)
    assert [watch.looks[name][-1].push > 0 for name in ("tokens.weight", "head.weight")] == [True, False]
    # But for one that was taken within the backward pass.
    model = Bag()
    optimizer = Tiger(model.parameters(), lr=0.01, scale=1.0, release_grads=True)
    watch = EmbeddingWatch(model, optimizer, every=1)
    fit(model, optimizer, 2)
    assert model.tokens.weight.grad is None
    assert watch.looks["tokens.weight"][-1].push == pytest.approx(0.02, rel=0.01)


def test_sparse_gradients_are_gradients() -> None:
    table = nn.Embedding(V, D, sparse=True)
    optimizer = Lion(table.parameters(), lr=0.5, weight_decay=0.1)
    watch = EmbeddingWatch(table, optimizer, every=1)
    for _ in range(30):
        table(torch.arange(5).repeat(2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    look = watch.looks["weight"][-1]
    assert (look.rows, look.silent) == (5, 0)  # pushed, by a gradient at every step


def test_follows_a_loaded_state(tmp_path: Path) -> None:
    """``load_state_dict`` of an optimizer makes new groups; the rate of the old ones no longer changes."""
    model = Bag()
    optimizer = OPTIMIZERS["lion"]([model.tokens.weight])
    watch = EmbeddingWatch(model, optimizer, every=1)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.001
    optimizer.load_state_dict(state)
    always_the_same(model, optimizer, 1)
    assert watch.looks["tokens.weight"][-1].push == 0.001


def test_a_closure_and_a_hybrid_count_one_step() -> None:
    model = Bag()
    optimizer = Hybrid(AdamW([model.tokens.weight]), Lion([model.head.weight], lr=0.01))
    watch = EmbeddingWatch(model, optimizer, every=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.arange(9)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert watch.step == 1
    assert [w[-1].envelope < math.inf for w in watch.looks.values()] == [False, True]


# --- what it warns of -----------------------------------------------------------------------------


def warnings_of(
    optimizer: Callable[[Bag], torch.optim.Optimizer], tied: bool = False, steps: int = 500, **options: Any
) -> tuple[list[str], EmbeddingWatch]:
    torch.manual_seed(0)
    model = jittered(Bag(tied))
    made = optimizer(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = EmbeddingWatch(model, made, every=10, **options)
        fit(model, made, steps)
    assert all(x.category is EmbeddingWarning for x in caught)
    assert all(x.filename == __file__ for x in caught)  # the loop's line, not one of torch or the watch
    return [str(x.message) for x in caught], watch


SIGNS: dict[str, Any] = {
    "tiger": lambda **k: lambda m: Tiger(param_groups(m, **k), lr=0.02, weight_decay=0.25),
    "base": lambda **k: lambda m: Tiger(param_groups(m, **k), lr=0.01, weight_decay=0.25, scale=1.0),
    "lion": lambda **k: lambda m: Lion(param_groups(m, **k), lr=0.01, weight_decay=0.25),
    "signum": lambda **k: lambda m: Signum(param_groups(m, **k), lr=0.01, weight_decay=0.25),
}


@pytest.mark.trained
@pytest.mark.parametrize("name", SIGNS)
def test_warns_once_of_rows_that_no_longer_come(name: str) -> None:
    messages, watch = warnings_of(SIGNS[name]())
    # The output layer too, whose rows of those tokens are only ever pushed away.
    assert len(messages) == len(watch.warned)
    (message,) = (x for x in messages if "rows of tokens.weight" in x)
    first = next(x for x in watch.looks["tokens.weight"] if f"step {x.step}:" in message)
    assert STOPS < first.step <= 200, message
    assert first.push < 0.5 * first.bound
    assert f"{first.silent} of 400 rows of tokens.weight stand at ±{first.push:.4g}" in message
    assert f"on their way to ±1/λ = ±{first.bound:.4g}" in message
    assert "param_groups(model, embedding={'lazy': 'grad'})" in message
    last = watch.looks["tokens.weight"][-1]
    # Half of the tokens stopped; of the others, each is in half of the batches.
    assert last.rows >= V // 2 - 5
    assert abs(last.largest / last.bound - 1) < 0.02 or last.push < 0.9 * last.bound


@pytest.mark.trained
@pytest.mark.parametrize("name", SIGNS)
def test_the_cures_are_quiet(name: str) -> None:
    messages, watch = warnings_of(SIGNS[name](embedding={"lazy": "grad"}))
    assert not [x for x in messages if "rows of tokens.weight" in x]
    assert watch.looks["tokens.weight"][-1].rows == 0


def test_adam_has_no_envelope_and_no_warning() -> None:
    for make in (
        lambda m: AdamW(m.parameters(), lr=0.01),
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
        lambda m: torch.optim.SGD(m.parameters(), lr=1.0),
        lambda m: Hybrid(AdamW([m.tokens.weight], lr=0.01), Lion([m.head.weight], lr=1e-4)),
    ):
        messages, watch = warnings_of(make)
        assert not messages
        look = watch.looks["tokens.weight"][-1]
        assert look.envelope == math.inf
        assert math.isnan(look.push)


@pytest.mark.trained
def test_says_what_helps_where_lazy_rows_do_not() -> None:
    (message,), watch = warnings_of(SIGNS["lion"](), tied=True)
    assert list(watch.looks) == ["tokens.weight"]
    assert "Lazy rows do not help, as the output layer shares it" in message
    # An output layer whose every logit has the same gradient for ever.
    model = Bag()
    optimizer = Lion([model.head.weight], lr=0.01, weight_decay=1.0)
    watch = EmbeddingWatch(model, optimizer, every=10)

    def outwards() -> None:
        for _ in range(200):
            model.head.weight.grad = -torch.ones_like(model.head.weight)
            optimizer.step()

    with pytest.warns(EmbeddingWarning, match="Lazy rows do not help an output layer, whose every row"):
        outwards()
    assert watch.warned == {"head.weight"}
    # Pushed from the start, it is warned of only when near to the bound.
    assert sum(look.rows == V for look in watch.looks["head.weight"]) > sum(
        look.push > 0.5 for look in watch.looks["head.weight"]
    )


@pytest.mark.trained
def test_without_decay_there_is_no_end() -> None:
    (message,), _ = warnings_of(lambda m: Lion(m.parameters(), lr=0.01, weight_decay=0.0))
    assert "without end at λ = 0" in message


@pytest.mark.trained
def test_released_gradients_are_warned_of_late() -> None:
    options = dict(lr=0.01, weight_decay=0.25, scale=1.0, release_grads=True)
    messages, watch = warnings_of(lambda m: Tiger(m.parameters(), **options))
    (message,) = (x for x in messages if "rows of tokens.weight" in x)
    first = next(x for x in watch.looks["tokens.weight"] if f"step {x.step}:" in message)
    assert 0.5 * first.bound <= first.push < 0.6 * first.bound


def test_a_matrix_that_is_saturated_already() -> None:
    model = Bag()
    with torch.no_grad():
        model.tokens.weight[:9] = torch.where(model.tokens.weight[:9] > 0, 10.0, -10.0)
    watch = EmbeddingWatch(model, Lion(model.parameters(), lr=1e-4, weight_decay=0.1))
    with pytest.warns(EmbeddingWarning, match="9 of 400 rows"):
        watch.look()


# --- resuming, files, errors ----------------------------------------------------------------------


def test_resumes() -> None:
    torch.manual_seed(0)
    model = Bag()
    optimizer = Lion(model.parameters(), lr=0.01, weight_decay=1.0)
    whole = EmbeddingWatch(model, optimizer, every=10)
    first = EmbeddingWatch(model, optimizer, every=10)
    second: list[EmbeddingWatch] = []

    def exchange(step: int) -> None:
        if step == 57:
            state = json.loads(json.dumps(first.state_dict(), sort_keys=True))
            first.remove()
            second.append(EmbeddingWatch(model, optimizer, every=10))
            second[0].load_state_dict(state)

    with pytest.warns(EmbeddingWarning):
        fit(model, optimizer, 300, exchange)
    looks = [*first.looks["tokens.weight"], *second[0].looks["tokens.weight"]]
    # Which rows were silent is noted anew.
    whole_looks = [replace(x, silent=0) for x in whole.looks["tokens.weight"]]
    assert [replace(x, silent=0) for x in looks] == whole_looks
    assert second[0].warned == whole.warned
    assert len(first.looks["tokens.weight"]) == 5
    other = Bag(tied=True)
    with pytest.raises(ValueError, match=r"is of a watch of \['head.weight', 'tokens.weight'\], this one"):
        EmbeddingWatch(other, Lion(other.parameters())).load_state_dict(whole.state_dict())


def test_writes_lines_and_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, watch = warnings_of(SIGNS["lion"](), steps=60, folder=tmp_path / "log")
    watch.remove()
    lines = [json.loads(line) for line in (tmp_path / "log" / LOG).read_text().splitlines()]
    assert [(x["step"], x["name"]) for x in lines[:4]] == [
        (10, "tokens.weight"), (10, "head.weight"), (20, "tokens.weight"), (20, "head.weight"),
    ]  # fmt: skip
    assert [x["largest"] for x in lines if x["name"] == "head.weight"] == [
        look.largest for look in watch.looks["head.weight"]
    ]
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    scalars = events.Scalars("embedding/tokens.weight/envelope")
    assert [x.step for x in scalars] == [10, 20, 30, 40, 50, 60]
    assert scalars[-1].value == pytest.approx(watch.looks["tokens.weight"][-1].envelope)


def test_writes_no_number_that_json_has_not(tmp_path: Path) -> None:
    model = Bag()
    watch = EmbeddingWatch(model, AdamW(model.parameters()), folder=tmp_path)
    watch.look()
    line = json.loads((tmp_path / LOG).read_text().splitlines()[0])
    assert line["envelope"] is None
    assert line["push"] is None


def test_without_tensorboard_there_are_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    warnings_of(SIGNS["lion"](), steps=20, folder=tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == [LOG]


def test_removed_it_looks_no_more() -> None:
    model = Bag()
    optimizer = Lion(model.parameters(), lr=0.01)
    watch = EmbeddingWatch(model, optimizer, every=1)
    fit(model, optimizer, 3)
    watch.remove()
    fit(model, optimizer, 3)
    assert watch.step == len(watch.looks["tokens.weight"]) == 3


def test_changes_nothing() -> None:
    model = Bag()
    other = copy.deepcopy(model)
    optimizers = [Tiger(param_groups(m), lr=0.02, weight_decay=0.5) for m in (model, other)]
    EmbeddingWatch(model, optimizers[0], every=1)
    for m, optimizer in zip((model, other), optimizers, strict=True):
        torch.manual_seed(1)
        fit(m, optimizer, 20)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bad_arguments(tmp_path: Path) -> None:
    model = Bag()
    optimizer = Lion(model.parameters())
    with pytest.raises(ValueError, match="every must be 1 or more, got 0"):
        EmbeddingWatch(model, optimizer, every=0)
    with pytest.raises(TypeError, match="keep must be a whole number, got True"):
        EmbeddingWatch(model, optimizer, keep=True)
    with pytest.raises(ValueError, match=r"Linear has no nn\.Embedding that Lion trains"):
        EmbeddingWatch(nn.Linear(2, 2), optimizer)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file"):
        EmbeddingWatch(model, optimizer, folder=tmp_path / "file")
