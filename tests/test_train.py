"""Runs: the same for the same configuration, resumed to the same bits, checkpoints that fail clearly."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import resealed
from safetensors.torch import load_file, load_model
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from minisign import Hybrid
from minisign.lab.build import build_model, build_optimizer, load_tokens
from minisign.lab.checkpoint import steps_of
from minisign.lab.config import Config
from minisign.lab.corpus import CorpusConfig, generate
from minisign.lab.files import write_whole
from minisign.lab.gpt import GPT, Center
from minisign.lab.parallel import pick_device
from minisign.lab.train import Run, train, training_step, validation_loss

SMALL: dict[str, Any] = dict(
    corpus=CorpusConfig(words=4000, rare_share=0.1),
    vocab_size=300,
    context=8,
    batch=4,
    layers=1,
    heads=2,
    width=16,
    warmup=3,
)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "init": "xavier", "norm": "post"},
    "signum": {"optimizer": "signum"},
    "lion": {"optimizer": "lion"},
    "tiger": {},
    "base": {"scale": 1.0, "lr": 1e-3},
    "accumulating": {"accumulate": 3, "lazy": "grad"},
    "lazy": {"lazy": "ids", "lazy_momentum": "decay"},
    "hybrid": {"embedding_optimizer": "adamw"},
    "adamw": {"optimizer": "adamw", "tie": "half_swap"},
    "centered": {"head": "centered", "tie": "half_swap", "embedding_scale": "rms", "vocab_rare_share": 0.5},
}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(generate(SMALL["corpus"]))
    return path


def small(**options: Any) -> Config:
    return Config(**{**SMALL, "steps": 12, **options})


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_run_ends_at_the_same_weights(name: str, tmp_path: Path) -> None:
    config = small(**OPTIMIZERS[name])
    whole = train(Run(config, load_tokens(config)))
    part = Run(dataclasses.replace(config, steps=5), load_tokens(config))
    train(part).save(tmp_path)
    resumed = train(Run.resume(tmp_path, steps=12))
    assert same(weights(whole), weights(resumed))
    assert whole.losses == resumed.losses
    assert validation_loss(whole) == validation_loss(resumed)
    assert same(weights(whole), weights(train(Run(config, load_tokens(config)))))


def test_stopped_run_resumes_with_its_decay(tmp_path: Path) -> None:
    config = small(decay=0.5)
    whole = train(Run(config, load_tokens(config)))
    broken = Run(config, load_tokens(config))
    train(broken, stop=lambda: broken.step == 7)
    assert broken.step == 7
    broken.save(tmp_path)
    assert same(weights(whole), weights(train(Run.resume(tmp_path))))
    with pytest.raises(ValueError, match="steps 20 would change the decay of a run begun with 12 steps"):
        Run.resume(tmp_path, steps=20)
    constant = dataclasses.replace(config, decay=0.0)
    run = Run(constant, load_tokens(config))
    train(run, stop=lambda: run.step == 7).save(tmp_path)
    with pytest.raises(ValueError, match="at step 7 already, past 6"):
        Run.resume(tmp_path, steps=6)


def test_seed_and_config_decide(tmp_path: Path) -> None:
    tokens = load_tokens(small())
    a, b, c = (train(Run(small(seed=s), tokens)) for s in (0, 0, 1))
    assert same(weights(a), weights(b))
    assert not same(weights(a), weights(c))
    state = torch.get_rng_state()
    build_model(small(), 300)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's randomness is touched


def test_what_is_saved(tmp_path: Path) -> None:
    for tie in ("none", "tied"):
        config = small(tie=tie, lr=0.02, betas=(0.9,))
        run = train(Run(config, load_tokens(config)))
        run.save(tmp_path)
        again = GPT(config.gpt(run.tokens.vocab_size))
        load_model(again, tmp_path / "model.safetensors")
        assert same(weights(run), again.state_dict())
        assert Config.from_json(json.loads((tmp_path / "config.json").read_text())) == config
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "checkpoints",
            "config.json",
            "model.safetensors",
        ]
    assert "head.weight" not in load_file(tmp_path / "model.safetensors") or tie == "none"


@pytest.mark.trained
def test_training_learns_and_measures() -> None:
    config = small(steps=320, decay=0.5)
    run = Run(config, load_tokens(config))
    before = validation_loss(run)
    assert abs(before - math.log(run.tokens.vocab_size)) < 0.1
    seen: list[int] = []
    train(run, lambda r: seen.append(r.step), every=50)
    assert seen == [50, 100, 150, 200, 250, 300, 320]
    assert len(run.losses) == 320
    assert validation_loss(run) < before - 1
    assert run.train_loss == pytest.approx(np.mean(run.losses[-100:]))


@pytest.mark.trained
def test_a_training_step_for_timing_is_that_of_a_run() -> None:
    config = small(warmup=0)
    tokens = load_tokens(config)
    step, run = training_step(Run(config, tokens)), Run(config, tokens)
    losses = [step().item() for _ in range(40)]
    assert losses[0] == pytest.approx(train(run, stop=lambda: run.step == 1).losses[0])
    assert losses[-1] < losses[0] - 0.1  # the same batch again and again


@pytest.mark.trained
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "signum", "betas": None, "lr": None, "fused": True},
        {"optimizer": "lion", "betas": None, "lr": None, "fused": True, "lazy": "ids"},
        {"fused": True, "scale": 1.0},
        {"release_grads": True, "accumulate": 3},
        {"release_grads": True, "fused": True, "scale": 1.0},
    ],
    ids=str,
)
def test_fused_and_released_training_ends_where_the_plain_one_does(options: dict[str, Any]) -> None:
    config = small(**options)
    tokens = load_tokens(config)
    found = train(Run(config, tokens)).model
    plain = train(Run(dataclasses.replace(config, fused=False, release_grads=False), tokens)).model
    for a, b in zip(found.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_does_not_go_with_fused_and_release_grads() -> None:
    for options, message in (
        ({"release_grads": True, "clip": 1.0}, "release_grads and clip 1.0 exclude each other: the norm"),
        (
            {"release_grads": True, "optimizer": "lion", "betas": None},
            "release_grads is for tiger, got lion",
        ),
        ({"fused": True, "optimizer": "sgd", "betas": None}, "fused is not for sgd"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**options)
    with pytest.raises(TypeError, match="fused must be True or False, got 1"):
        small(fused=1)


def test_eps_reaches_adamw_and_a_bad_one_is_named() -> None:
    config = small(optimizer="adamw", betas=None, lr=None, eps=0.5)
    tokens = load_tokens(config)
    assert {group["eps"] for group in Run(config, tokens).optimizer.param_groups} == {0.5}
    with pytest.raises(ValueError, match="Invalid eps: -1"):
        small(eps=-1)


def test_gradients_are_clipped_before_the_update() -> None:
    config = small(optimizer="sgd", betas=(0.0,), lr=1.0, clip=1e-3, warmup=0, steps=1)
    run = Run(config, load_tokens(config))
    before = torch.cat([p.detach().flatten().clone() for p in run.model.parameters()])
    train(run)
    moved = torch.cat([p.detach().flatten() for p in run.model.parameters()]) - before
    assert float(moved.norm()) == pytest.approx(1e-3, rel=0.01)
    with pytest.raises(ValueError, match="clip must be positive, got 0"):
        small(clip=0)
    with pytest.raises(TypeError, match="clip must be a number, got 'a lot'"):
        small(clip="a lot")


def test_an_update_may_be_left_out() -> None:
    config = small(steps=6)
    run, skipped = Run(config, load_tokens(config)), []

    def may_step(loss: torch.Tensor) -> bool:
        skipped.append(float(loss))
        return False

    before = [p.detach().clone() for p in run.model.parameters()]
    train(run, may_step=may_step)
    assert run.step == 6
    assert skipped == pytest.approx(run.losses)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_rate() -> None:
    config = small(steps=100, warmup=10, decay=0.5)
    assert [config.rate(t) for t in (0, 4, 9, 10, 49, 50, 75, 99)] == pytest.approx(
        [0.1, 0.5, 1, 1, 1, 1, 0.5, 0.02]
    )
    constant = small(steps=100, warmup=0)
    assert {constant.rate(t) for t in range(200)} == {1.0}


def test_the_rate_reaches_every_group() -> None:
    config = small(embedding_optimizer="adamw", steps=2, warmup=4, lr=0.5)
    run = train(Run(config, load_tokens(config)))
    assert {round(g["lr"], 9) for g in run.optimizer.param_groups} == {3e-3 * 0.5, 0.5 * 0.5}


def test_build_optimizer() -> None:
    config = small(embedding_optimizer="adamw", lr=0.5, betas=(0.7,))
    optimizer = build_optimizer(config, build_model(config, 300))
    assert isinstance(optimizer, Hybrid)
    names = [type(o).__name__ for o in optimizer.optimizers]
    assert names == ["AdamW", "Tiger"]
    embedding = optimizer.optimizers[0].param_groups[0]
    assert embedding["kind"] == "embedding"
    assert embedding["betas"] == (0.9, 0.999)
    assert config.embedding_decay == 0.01
    lion = small(optimizer="lion", lazy="grad")
    groups = build_optimizer(lion, build_model(lion, 300)).param_groups
    assert [g["lazy"] for g in groups if g["kind"] == "embedding"] == ["grad"]
    assert {g["lazy"] for g in groups if g["kind"] != "embedding"} == {False}


def test_head_reaches_the_model() -> None:
    config = small(head="centered")
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert isinstance(build_model(config, 300).center, Center)
    assert build_model(small(), 300).head.bias is None


def test_embedding_scale_is_for_the_embeddings_alone() -> None:
    def scales(**options: Any) -> dict[str, Any]:
        config = small(**options)
        return {
            g["kind"]: g["scale"] for g in build_optimizer(config, build_model(config, 300)).param_groups
        }

    plain = scales()
    assert plain["embedding"] == "row_rms"
    assert scales(embedding_scale="rms") == {**plain, "embedding": "rms"}
    assert scales(embedding_scale=0.25) == {**plain, "embedding": 0.25}
    assert scales(scale=1.0, embedding_scale="row_rms")["embedding"] == "row_rms"


def test_a_vocabulary_from_more_of_the_rare_language_spells_it_with_fewer_tokens() -> None:
    plain, shared = load_tokens(small()), load_tokens(small(vocab_rare_share=0.5))
    assert shared.sha256 == plain.sha256  # the run's own text is the same
    text = generate(SMALL["corpus"])
    assert shared.encoding.decode(shared.train) == text[: len(text) * 9 // 10]
    lengths = {}
    for share in (0.0, 1.0):
        text = generate(dataclasses.replace(SMALL["corpus"], rare_share=share))
        lengths[share] = [len(tokens.encoding.encode_ordinary(text)) for tokens in (plain, shared)]
    assert lengths[1.0][1] < 0.9 * lengths[1.0][0]
    assert lengths[0.0][1] > lengths[0.0][0]


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    run = Run(small(), load_tokens(small()))
    run.model.head.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 10"):
        train(run)


# --- what must fail clearly -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "sdg"}, ValueError, "unknown optimizer 'sdg'"),
        ({"optimizer": "sgd", "lazy": "grad"}, ValueError, "lazy 'grad' is not for sgd"),
        ({"steps": 0}, ValueError, "steps must be 1 or more, got 0"),
        ({"steps": 1.5}, TypeError, r"steps must be a whole number, got 1\.5"),
        ({"batch": 0}, ValueError, "batch must be 1 or more, got 0"),
        ({"seed": -1}, ValueError, "seed must be 0 or more, got -1"),
        ({"decay": 1.5}, ValueError, r"decay must be in \[0, 1\], got 1\.5"),
        ({"betas": (0.9, 0.9)}, ValueError, r"tiger takes 1 beta\(s\), got \(0\.9, 0\.9\)"),
        ({"embedding_optimizer": "lion"}, ValueError, "unknown embedding_optimizer 'lion'"),
        ({"width": 15}, ValueError, "width 15 is not divisible"),
        ({"head": "tail"}, ValueError, "unknown head 'tail'"),
        (
            {"embedding_scale": 0.5, "optimizer": "lion"},
            ValueError,
            r"embedding_scale 0\.5 is for .* tiger",
        ),
        (
            {"embedding_scale": "rms", "embedding_optimizer": "adamw"},
            ValueError,
            "embedding_scale 'rms' is for embeddings under tiger",
        ),
        (
            {"vocab_rare_share": 0.5, "text": ("book.txt",)},
            ValueError,
            r"vocab_rare_share 0\.5 is for the generated text only",
        ),
        ({"text": "book.txt"}, TypeError, r"tuple of file names, got 'book\.txt'"),
    ],
)
def test_bad_config(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        small(**options)


def test_bad_config_that_shows_when_it_is_used() -> None:
    config = small(embedding_scale="big")
    with pytest.raises(ValueError, match="unknown scale 'big'"):
        build_optimizer(config, build_model(config, 300))
    with pytest.raises(ValueError, match=r"rare_share must be in \[0, 1\], got 1\.5"):
        load_tokens(small(vocab_rare_share=1.5))


def test_bad_checkpoints(tmp_path: Path, text_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        Run.resume(tmp_path)
    config = small(text=(str(text_file),))
    run = Run(config, load_tokens(config))
    train(run, lambda r: r.save(tmp_path), every=4)
    assert steps_of(tmp_path) == [12, 8]  # the last two
    newest = tmp_path / "checkpoints" / "00000012"
    for file in sorted(newest.iterdir()):
        good = file.read_bytes()
        middle = len(good) // 2
        flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
        for bad in (b"", b"hello", b"{}", good[:middle], flipped):
            file.write_bytes(bad)
            caplog.clear()
            assert Run.resume(tmp_path).step == 8
            (record,) = [r for r in caplog.records if r.name == "minisign.lab.checkpoint"]
            assert record.getMessage().endswith("; going on from step 8")
            assert str(newest) in record.getMessage()
        file.unlink()
        assert Run.resume(tmp_path).step == 8
        file.write_bytes(good)
    assert Run.resume(tmp_path).step == 12
    for step in ("00000008", "00000012"):
        (tmp_path / "checkpoints" / step / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match=r"00000012/\.metadata is damaged: it is not what was written"):
        Run.resume(tmp_path)


def test_a_new_run_in_the_folder_of_a_longer_one_is_the_one_to_resume(tmp_path: Path) -> None:
    longer, new = small(), small(steps=6, seed=1)
    train(Run(longer, load_tokens(longer)), lambda r: r.save(tmp_path), every=4)
    run = train(Run(new, load_tokens(new)))
    run.save(tmp_path)
    assert steps_of(tmp_path) == [6]
    assert same(weights(Run.resume(tmp_path)), weights(run))


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    config = small()
    train(Run(config, load_tokens(config))).save(tmp_path)
    path = tmp_path / "checkpoints" / "00000012"
    resealed(path, config={**config.to_json(), "width": 8})
    with pytest.raises(ValueError, match=r"embedding\.weight is to be"):
        Run.resume(tmp_path)
    resealed(path, config={"nonsense": 1})
    with pytest.raises(ValueError, match="is not a checkpoint of minisign: KeyError"):
        Run.resume(tmp_path)
    resealed(path, config=config.to_json(), micro_steps=[])
    with pytest.raises(ValueError, match="does not fit its own configuration"):
        Run.resume(tmp_path)
    resealed(path, format="another")
    with pytest.raises(ValueError, match="is not a checkpoint of minisign"):
        Run.resume(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((exec, ("raise SystemExit('executed')",)), r"builtins\.exec is no part of a checkpoint"),
        ((getattr, (torch.Size, "numel")), r"<class 'torch\.Size'> has no member 'numel'"),
        ((getattr, (_MEM_FORMAT_ENCODING, "mro")), r"has no member 'mro'"),
    ],
)
def test_a_checkpoint_cannot_run_code(call: Any, message: str, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return call

    config = small()
    train(Run(config, load_tokens(config))).save(tmp_path)
    path = tmp_path / "checkpoints" / "00000012"
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    resealed(path)
    with pytest.raises(ValueError, match=message):
        Run.resume(tmp_path)


def test_a_checkpoint_of_python_3_11_2_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small()
    run = train(Run(config, load_tokens(config)))
    with monkeypatch.context() as older:  # there a member of an enum is written by its name
        by_name = lambda member, protocol: (getattr, (type(member), member.name))  # noqa: E731
        older.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
        run.save(tmp_path)
    assert b"getattr" in (tmp_path / "checkpoints" / "00000012" / ".metadata").read_bytes()
    assert same(weights(Run.resume(tmp_path)), weights(run))


def test_a_changed_text_is_noticed(tmp_path: Path, text_file: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text(text_file.read_text())
    config = small(text=(str(mine),))
    train(Run(config, load_tokens(config))).save(tmp_path)
    mine.write_text(text_file.read_text() + "!")
    with pytest.raises(ValueError, match=r"the text is not the one .* was trained on"):
        Run.resume(tmp_path, steps=20)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(target: Path) -> None:
        target.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'cuda' was asked for"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        pick_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
