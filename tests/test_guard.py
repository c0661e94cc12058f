"""SpikeGuard: what sets it off, what it does then, and that a kill at any moment of it loses nothing."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from processes import FORKS, HANG
from torch import Tensor, nn

from minisign import AdamW, Hybrid, Lion, Tiger
from minisign.doctor.guard import SpikeGuard
from minisign.lab.build import load_tokens
from minisign.lab.tokenizer import Tokens
from minisign.lab.train import Run, train, validation_loss
from minisign.studies.instability import Stage, stage_config

WINDOW = 20


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.getLogger("minisign.doctor.guard").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("minisign.doctor.guard").setLevel(logging.NOTSET)


class Loop:
    """A training loop around a guard whose losses and gradients a test dictates."""

    def __init__(self, optimizer: str = "adamw", lr: Any = 0.01, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(40, 30)
        ps = list(self.model.parameters())
        self.optimizer: torch.optim.Optimizer = {
            "adamw": lambda: AdamW(ps, lr=lr),
            "torch adamw": lambda: torch.optim.AdamW(ps, lr=lr),
            "sgd": lambda: torch.optim.SGD(ps, lr=lr, momentum=0.9),
            "lion": lambda: Lion(ps, lr=lr),
            "adagrad": lambda: torch.optim.Adagrad(ps, lr=lr),
            "hybrid": lambda: Hybrid(AdamW(ps[:1], lr=lr), Tiger(ps[1:], lr=lr)),
        }[optimizer]()
        self.guard = SpikeGuard(self.model, self.optimizer, **{"window": WINDOW, **options})
        self.generator = torch.Generator().manual_seed(1)

    def step(self, loss: float | None = None, loud: float | None = None) -> bool:
        """One step, of a loss about 3 and normal gradients unless told otherwise; whether it was made."""
        for p in self.model.parameters():
            noise = torch.randn(p.shape, generator=self.generator)
            p.grad = noise if loud is None else loud * torch.ones_like(p)
        usual = 3 + 0.1 * float(torch.randn((), generator=self.generator))
        made = self.guard.check(torch.tensor(usual if loss is None else loss))
        if made:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return made

    def run(self, steps: int) -> Loop:
        for _ in range(steps):
            assert self.step()
        return self

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def events(self) -> list[tuple[int, str, str]]:
        return [(event.step, event.cause, event.action) for event in self.guard.events]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- what sets it off -----------------------------------------------------------------------------


def test_noise_does_not_set_it_off_and_a_spike_does() -> None:
    loop = Loop().run(200)
    assert loop.events() == []
    assert loop.step(loss=4.5)  # only noted
    assert loop.events() == [(200, "loss", "warn")]
    (event,) = loop.guard.events
    assert event.value == 4.5
    assert 3.3 < event.limit < 4.2
    assert str(event).startswith("step 200: loss 4.5, above 3.")


def test_a_rise_too_small_for_one_loss_is_seen_in_the_mean_of_five() -> None:
    loop = Loop().run(60)
    limit = 3 + 6 * 0.1
    for _ in range(5):
        loop.step(loss=limit - 0.15)
    (event, *_) = loop.guard.events
    assert event.cause == "mean loss"
    assert 62 <= event.step <= 64


def test_nothing_sets_it_off_before_the_window_is_full_but_a_loss_that_is_not_finite() -> None:
    loop = Loop(on_loss="skip").run(WINDOW - 1)
    assert loop.step(loss=99.0)
    assert not loop.step(loss=float("nan"))
    assert not loop.step(loss=float("inf"))
    assert loop.events() == [(WINDOW, "not finite", "skip"), (WINDOW + 1, "not finite", "skip")]
    assert str(loop.guard.events[0]) == f"step {WINDOW}: loss nan; update left out"


def test_a_constant_loss_may_move_by_some_percent() -> None:
    loop = Loop()
    for _ in range(40):
        loop.step(loss=2.0)
    loop.step(loss=2.1)
    assert loop.events() == []
    loop.step(loss=2.2)
    assert loop.events() == [(41, "loss", "warn")]


@pytest.mark.parametrize("optimizer", ["adamw", "torch adamw", "hybrid"])
def test_a_burst_is_seen_before_it_moves_a_weight(optimizer: str) -> None:
    loop = Loop(optimizer, on_ratio="skip").run(150)
    assert loop.events() == []
    before = loop.weights()
    assert not loop.step(loud=100.0)
    assert equal(before, loop.weights())
    (event,) = loop.guard.events
    assert (event.step, event.cause, event.block) == (150, "ratio", "weight")
    assert event.value == 1.0
    assert str(event) == "step 150: 100% of the update of weight beyond 0.8; update left out"


@pytest.mark.parametrize("optimizer", ["sgd", "lion", "adagrad"])
def test_without_adam_the_loss_alone_is_watched(optimizer: str) -> None:
    loop = Loop(optimizer, on_loss="skip", on_ratio="skip").run(60)
    assert loop.step(loud=100.0)
    assert not loop.step(loss=9.0)
    assert loop.events() == [(61, "loss", "skip")]


def test_layers_are_told_apart_where_there_are_some() -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]), nn.Linear(2, 2))
    guard = SpikeGuard(model, AdamW(model.parameters()))
    assert list(guard.blocks) == ["0.0", "1"]
    assert list(SpikeGuard(nn.Linear(2, 2), AdamW(nn.Linear(2, 2).parameters())).blocks) == [
        "weight",
        "bias",
    ]


def test_it_can_be_told_not_to_look() -> None:
    loop = Loop(on_loss=None, on_ratio=None).run(60)
    assert loop.step(loss=99.0, loud=100.0)
    assert loop.step(loss=float("nan"))
    assert loop.events() == []


# --- what it does ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.01, "tensor"])
def test_slow_lowers_the_rate_for_a_while_and_gives_it_back(lr: Any) -> None:
    rate = torch.tensor(0.01) if lr == "tensor" else lr
    loop = Loop("torch adamw", rate, on_loss="slow", slow_factor=0.1, slow_steps=3).run(40)
    seen: list[float] = []
    loop.optimizer.register_step_pre_hook(lambda o, *_: seen.append(float(o.param_groups[0]["lr"])))
    assert loop.step(loss=9.0)
    loop.run(4)
    assert seen == pytest.approx([0.001, 0.001, 0.001, 0.01, 0.01])
    assert float(loop.optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)
    if lr == "tensor":
        assert loop.optimizer.param_groups[0]["lr"] is rate  # what a CUDA graph has captured


def test_the_rate_is_given_back_if_the_loop_leaves_the_update_out() -> None:
    loop = Loop(on_loss="slow").run(40)
    assert loop.guard.check(9.0)
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    loop.run(1)
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_schedule_is_undisturbed_by_a_slow_spell() -> None:
    rates = []
    for losses in ([], [45]):
        loop = Loop(on_loss="slow", slow_steps=5)
        schedule = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.99)
        for step in range(60):
            loop.step(loss=9.0 if step in losses else None)
            schedule.step()
        rates.append(loop.optimizer.param_groups[0]["lr"])
        assert len(loop.events()) == len(losses)
    assert rates[0] == rates[1]


def test_back_restores_weights_and_state_of_a_good_checkpoint(tmp_path: Path) -> None:
    loop = Loop(on_loss="back", folder=tmp_path, save_every=10, margin=5)
    at = {}
    for step in range(43):
        at[step] = (loop.weights(), [s["exp_avg"].clone() for s in loop.optimizer.state.values()])
        loop.step()
    loop.optimizer.param_groups[0]["lr"] = 0.005  # the schedule went on
    assert not loop.step(loss=9.0)  # at step 43: that of 40 is too young
    assert loop.guard.events[-1].to == 30
    assert equal(loop.weights(), at[30][0])
    assert equal([s["exp_avg"] for s in loop.optimizer.state.values()], at[30][1])
    assert loop.optimizer.param_groups[0]["lr"] == 0.005
    saved = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert saved == ["step-000000030.pt", "step-000000044.pt"]
    loop.run(10)
    events = json.loads((tmp_path / "events.json").read_text())
    assert [(e["step"], e["cause"], e["to"]) for e in events] == [(43, "loss", 30)]


def test_checkpoints_that_nothing_goes_back_to_are_removed(tmp_path: Path) -> None:
    Loop(on_loss="back", folder=tmp_path, save_every=10, margin=25).run(100)
    assert [path.name for path in sorted(tmp_path.glob("*.pt"))] == [
        f"step-{step:09d}.pt" for step in (60, 70, 80, 90)
    ]


def test_no_checkpoint_is_made_in_a_rough_time(tmp_path: Path) -> None:
    loop = Loop(on_loss="warn", folder=tmp_path, save_every=10, margin=5).run(38)
    loop.step(loss=9.0)
    loop.run(3)
    assert not (tmp_path / "step-000000040.pt").exists()
    loop.run(4)
    assert (tmp_path / "step-000000043.pt").exists()


def test_skipped_losses_do_not_become_the_usual_ones() -> None:
    loop = Loop(on_loss="skip", patience=1000).run(40)
    assert [loop.step(loss=9.0 + 0.1 * (i % 3)) for i in range(3 * WINDOW)] == [False] * 3 * WINDOW


def test_a_new_level_is_learned_after_so_many_skips() -> None:
    loop = Loop(on_loss="skip", patience=4).run(40)
    made = [loop.step(loss=9.0 + 0.1 * (i % 3)) for i in range(60)]
    assert made == [False] * 4 + [True] * 56
    assert [action for _, _, action in loop.events()] == ["skip"] * 4 + ["let pass"]
    assert not loop.step(loss=19.0)  # and it guards that level


def test_going_back_in_vain_ends_with_an_error(tmp_path: Path) -> None:
    loop = Loop(on_loss="back", folder=tmp_path, save_every=10, patience=3).run(45)
    for _ in range(3):
        assert not loop.step(loss=9.0)
    with pytest.raises(RuntimeError, match=r"loss at step 48 after going back 3 times.*lower the rate"):
        loop.step(loss=9.0)
    assert sorted(tmp_path.glob("*.pt"))


def test_a_loss_that_stays_nan_is_not_let_pass() -> None:
    loop = Loop(on_loss="skip", patience=3).run(40)
    assert [loop.step(loss=float("nan")) for _ in range(3)] == [False] * 3
    with pytest.raises(RuntimeError, match="the loss is nan at step 43, as in the steps before"):
        loop.step(loss=float("nan"))


def test_no_rate_is_low_enough_for_nan() -> None:
    loop = Loop(on_loss="slow").run(40)
    assert not loop.step(loss=float("nan"))
    assert loop.events() == [(40, "not finite", "skip")]


def test_gradients_that_are_not_finite_count_as_beyond() -> None:
    loop = Loop(on_ratio="skip").run(60)
    assert not loop.step(loud=float("nan"))
    assert loop.events() == [(60, "ratio", "skip")]
    assert all(torch.isfinite(weight).all() for weight in loop.weights())


def test_spikes_far_apart_do_not_try_its_patience(tmp_path: Path) -> None:
    loop = Loop(on_loss="back", folder=tmp_path, save_every=10, margin=5, patience=1).run(45)
    for _ in range(4):
        assert not loop.step(loss=9.0)
        loop.run(5)
    assert len(loop.events()) == 4


def test_it_logs_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("minisign.doctor.guard").setLevel(logging.NOTSET)
    loop = Loop(on_loss="skip").run(40)
    with caplog.at_level(logging.WARNING):
        loop.step(loss=9.0)
    assert [record.message for record in caplog.records] == [str(loop.guard.events[0])]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on_loss": "stop"}, ValueError, "unknown on_loss 'stop': choose from warn, skip, slow, back"),
        ({"on_ratio": 3}, ValueError, "unknown on_ratio 3"),
        ({"on_ratio": "back"}, ValueError, "on_ratio='back' needs a folder"),
        ({"window": 0}, ValueError, "window must be 1 or more, got 0"),
        ({"patience": 2.5}, TypeError, r"patience must be a whole number, got 2\.5"),
        ({"loss_limit": -1}, ValueError, "loss_limit must be positive, got -1"),
        ({"slow_factor": float("nan")}, ValueError, "slow_factor must be positive, got nan"),
        ({"ratio_limit": 1.5}, ValueError, r"ratio_limit must be in \(0, 1\], got 1\.5"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Loop(**options)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to"):
        Loop(on_loss="back", folder=tmp_path / "file")
    with pytest.raises(ValueError, match="resume needs the folder"):
        Loop().guard.resume()
    Loop(folder=tmp_path / "a").run(3)
    with pytest.raises(ValueError, match=r"has checkpoints of an earlier run: call resume\(\)"):
        Loop(folder=tmp_path / "a").run(1)
    (path,) = (tmp_path / "a").glob("*.pt")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        Loop(folder=tmp_path / "a").guard.resume()


def test_a_checkpoint_of_another_model_does_not_fit(tmp_path: Path) -> None:
    Loop(folder=tmp_path).run(3)
    other = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"step-000000000\.pt does not fit"):
        SpikeGuard(other, AdamW(other.parameters()), folder=tmp_path).resume()


# --- resuming -------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    whole = Loop(on_loss="skip", folder=tmp_path / "a", save_every=10).run(75)
    Loop(on_loss="skip", folder=tmp_path / "b", save_every=10).run(55)
    again = Loop(on_loss="skip", folder=tmp_path / "b", save_every=10)
    assert again.guard.resume() == 50
    fresh = Loop()
    for _ in range(50):  # the data go on where they were
        fresh.step()
    again.generator = fresh.generator
    again.run(25)
    assert equal(again.weights(), whole.weights())
    assert again.guard.losses.known == whole.guard.losses.known


def test_a_run_killed_before_its_second_checkpoint_begins_again(tmp_path: Path) -> None:
    Loop(folder=tmp_path).run(3)
    loop = Loop(folder=tmp_path)
    assert loop.guard.resume() == 0
    loop.run(3)


def test_resuming_restores_what_else_was_saved(tmp_path: Path) -> None:
    loop = Loop()
    schedule = torch.optim.lr_scheduler.StepLR(loop.optimizer, 10)
    guard = SpikeGuard(loop.model, loop.optimizer, folder=tmp_path, save_every=7, also={"lr": schedule})
    for _ in range(8):
        guard.check(1.0)
        loop.optimizer.step()
        schedule.step()
    other = Loop()
    schedule = torch.optim.lr_scheduler.StepLR(other.optimizer, 10)
    with pytest.raises(ValueError, match=r"has no 'scaler', but \['lr'\]"):
        SpikeGuard(other.model, other.optimizer, folder=tmp_path, also={"scaler": schedule}).resume()
    guard = SpikeGuard(other.model, other.optimizer, folder=tmp_path, also={"lr": schedule})
    assert guard.resume() == 7
    assert schedule.last_epoch == 7
    assert SpikeGuard(other.model, other.optimizer, folder=tmp_path / "new").resume() == 0


def killed(folder: Path, moment: str) -> None:
    """Goes back, and kills its process at a moment of it."""

    def die(*args: Any, **more: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(checkpoint: Any, path: Path) -> None:
        save(checkpoint, path)
        os.truncate(path, path.stat().st_size // 2)
        die()

    loop = Loop(on_loss="back", folder=folder, save_every=10, margin=5).run(43)
    save = torch.save
    owner, name, function = {
        "noting": (Path, "replace", die),
        "removing": (Path, "unlink", die),
        "removed": (torch, "load", die),
        "half loaded": (loop.optimizer, "load_state_dict", die),
        "saving": (torch, "save", half),
    }[moment]
    with mock.patch.object(owner, name, function):
        loop.step(loss=9.0)


@pytest.mark.parametrize("moment", ["noting", "removing", "removed", "half loaded", "saving"])
def test_a_run_killed_while_it_goes_back_resumes_from_an_intact_checkpoint(
    moment: str, tmp_path: Path
) -> None:
    process = FORKS.Process(target=killed, args=(tmp_path, moment))
    process.start()
    process.join(HANG)
    assert process.exitcode == -signal.SIGKILL
    unbroken = Loop()
    weights = {}
    for step in range(41):
        weights[step] = unbroken.weights()
        unbroken.step()
    loop = Loop(on_loss="back", folder=tmp_path, save_every=10, margin=5)
    step = loop.guard.resume()
    assert step == (
        40 if moment in ("noting", "removing") else 30
    )  # the doubtful one is still there or not
    assert equal(loop.weights(), weights[step])
    assert not list(tmp_path.glob(".*.partial"))
    loop.run(30)
    assert not loop.step(loss=9.0)


# --- on a model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    """Those of every seed: it draws weights and batches, not the text."""
    return load_tokens(stage_config())


@pytest.mark.trained
@pytest.mark.parametrize("seed", range(10))
def test_it_never_fires_in_an_undisturbed_run(seed: int, tokens: Tokens) -> None:
    config = stage_config(seed)
    run = Run(config, tokens)
    guard = SpikeGuard(run.model, run.optimizer)
    train(run, may_step=guard.check)
    assert guard.step == config.steps
    assert guard.events == []


@pytest.mark.trained
def test_a_staged_spike_is_brought_back_to_within_a_twentieth(tokens: Tokens, tmp_path: Path) -> None:
    config = stage_config()

    def final(staged: bool, **options: Any) -> tuple[float, float]:
        run = Run(config, tokens)
        guard = SpikeGuard(run.model, run.optimizer, **options)
        if staged:
            Stage().set_up(run)
        train(run, may_step=guard.check)
        return validation_loss(run), float(np.mean(run.losses[210:220]))

    undisturbed, staged = final(False), final(True)
    assert staged[1] > undisturbed[1] + 1
    guarded = final(True, on_loss="back", on_ratio="skip", folder=tmp_path)
    assert guarded[0] <= 1.05 * undisturbed[0]
    assert guarded[1] <= 1.05 * undisturbed[1]
