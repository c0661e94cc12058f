"""Several processes train as one: real processes on this machine, started by torchrun."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from once import Once
from parallel_worker import poison
from processes import HANG, wait_until
from safetensors.torch import load_file

from minisign import EmbeddingWatch, Tiger, track_rows
from minisign.doctor.watch import LOG
from minisign.engine.shards import check_rows, first_row, local
from minisign.lab.build import load_tokens
from minisign.lab.checkpoint import newest, steps_of
from minisign.lab.config import Config
from minisign.lab.corpus import CorpusConfig, generate
from minisign.lab.parallel import ALONE, World, joined
from minisign.lab.train import MODEL, Run, train
from minisign.studies.processes import ONE_THREAD

HERE = Path(__file__).parent
ENGINES = ("ddp", "fsdp")
STEPS = 20
BASE: dict[str, Any] = dict(
    corpus=CorpusConfig(words=20_000, rare_share=0.1),
    vocab_size=600,
    context=8,
    batch=12,
    layers=2,
    heads=2,
    width=16,
    warmup=3,
    steps=STEPS,
)
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "signum": {"optimizer": "signum"},
    "lion": {"optimizer": "lion"},
    "tiger": {},
    "base": {"scale": 1.0, "lr": 1e-3},
    "adamw": {"optimizer": "adamw"},
    "hybrid": {"embedding_optimizer": "adamw"},
    "lazy ids": {"lazy": "ids"},
    "lazy grad": {"lazy": "grad", "optimizer": "lion"},
    "decaying": {"lazy": "ids", "lazy_momentum": "decay"},
    "accumulating": {"accumulate": 4, "lazy": "grad"},
    "tensor RMS": {"embedding_scale": "rms", "lazy": "ids"},
    "clipped": {"clip": 0.5, "optimizer": "lion", "tie": "half_swap"},
    "centered": {"head": "centered", "tie": "tied"},
    "post": {"norm": "post", "tie": "half_swap", "head": "bias"},
    "fused": {"fused": True, "lazy": "ids"},
    "fused Lion": {"fused": True, "optimizer": "lion"},
    "uneven": {"batch": 7, "optimizer": "lion"},
    "pushed": {"optimizer": "lion", "lr": 0.03, "embedding_std": 0.02},
}
RESUMED = ("tiger", "hybrid", "accumulating", "fused", "sgd")
WATCHED = ("tiger", "pushed", "lazy grad", "hybrid", "accumulating")
NANS = ("tiger", "base", "lazy grad", "lazy ids", "fused", "accumulating")


def config(name: str, **more: Any) -> Config:
    return Config(**{**BASE, **CASES[name], **more})


def torchrun(
    processes: int, *command: str, check: bool = True, **options: Any
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            *command,
        ],
        env={**os.environ, **ONE_THREAD},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=HANG,
        **options,
    )
    assert not check or done.returncode == 0, done.stdout[-3000:]
    return done


def run_jobs(processes: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    (folder / f"jobs-{processes}.json").write_text(json.dumps(jobs))
    torchrun(processes, str(HERE / "parallel_worker.py"), str(folder / f"jobs-{processes}.json"))


@pytest.fixture
def two(once: Once) -> Path:
    """A folder with what two processes made: engine/case, engine/case NaN and engine/case half."""
    return once("two", lambda folder: run_jobs(2, jobs_of_two(folder), folder))


def jobs_of_two(folder: Path) -> list[dict[str, Any]]:
    jobs = [
        {
            "engine": engine,
            "config": config(name).to_json(),
            "out": str(folder / engine / name),
            "watched": name in WATCHED,
        }
        for engine in ENGINES
        for name in CASES
    ]
    jobs += [
        {
            "engine": engine,
            "config": config(name, steps=9).to_json(),
            "out": str(folder / engine / f"{name} NaN"),
            "nan_step": 5,
        }
        for engine in ENGINES
        for name in NANS
    ]
    jobs += [  # to be resumed
        {
            "engine": engine,
            "config": config(name, steps=9).to_json(),
            "out": str(folder / engine / f"{name} half"),
        }
        for engine in ENGINES
        for name in RESUMED
    ]
    return jobs


def alone(name: str, **more: Any) -> Run:
    c = config(name, **more)
    return Run(c, load_tokens(c))


def different(run: Run, folder: Path, tolerance: float = 1e-5) -> float:
    """Share of the weights that are not those of the run."""
    found = load_file(folder / MODEL)
    own = {name: p.detach() for name, p in run.model.named_parameters()}
    assert own.keys() <= found.keys()
    count = sum(int(((found[name] - p).abs() > tolerance).sum()) for name, p in own.items())
    return count / sum(p.numel() for p in own.values())


@pytest.mark.trained
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_with_half_the_batch_are_one(name: str, engine: str, two: Path) -> None:
    run = train(alone(name))
    folder = two / engine / name
    if name == "sgd":
        assert different(run, folder, 1e-6) == 0
    elif name == "centered":  # the gradient of an absent token is what rounding leaves of a difference
        assert different(run, folder) < 2e-3
    else:
        assert different(run, folder) < 1e-3
    start = alone(name)
    assert different(start, folder) > 0.1  # it moved at all
    losses = newest(folder).record["losses"]
    assert np.allclose(losses, run.losses, rtol=1e-4, atol=0)


@pytest.mark.trained
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.filterwarnings("ignore::minisign.doctor.watch.EmbeddingWarning")
def test_a_watch_sees_the_whole_matrix(name: str, engine: str, two: Path, tmp_path: Path) -> None:
    run = alone(name)
    watch = EmbeddingWatch(run.model, run.optimizer, every=4, folder=tmp_path)
    train(run)
    watch.remove()
    lines = [
        [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
        for folder in (tmp_path, two / engine / name)
    ]
    assert len(lines[0]) == len(lines[1]) == 5 * len(watch.looks)  # of one process, not of each
    assert any(line["largest"] > 0.5 for line in lines[0])
    for one, other in zip(*lines, strict=True):
        counts = {key: (one.pop(key), other.pop(key)) for key in ("rows", "silent")}
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, float) and key != "bound":
                assert np.allclose(other[key], value, rtol=1e-4, atol=0), key
            else:
                assert other[key] == value, key
        assert all(abs(a - b) <= 1 for a, b in counts.values())
    if name == "pushed":
        assert max(look.silent for look in watch.looks["embedding.weight"]) > 5


@pytest.mark.trained
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NANS)
def test_nan_on_one_process_has_the_same_effect_on_all(name: str, engine: str, two: Path) -> None:
    run = alone(name, steps=9)
    poison(run, 5, 6)  # the windows that the second process has
    train(run)
    assert different(run, two / engine / f"{name} NaN") < 1e-3
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert different(train(alone(name, steps=9)), two / engine / f"{name} NaN") > 0.05  # NaN did something


@pytest.mark.trained
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", RESUMED)
def test_saved_on_two_and_resumed_on_one(name: str, engine: str, two: Path) -> None:
    run = Run.resume(two / engine / f"{name} half", steps=STEPS)
    assert run.step == 9
    assert different(train(run), two / engine / name) < 1e-3
    assert different(train(alone(name)), two / engine / name) < 1e-3


@pytest.mark.trained
def test_resumed_on_three_and_by_the_other_engine(two: Path, tmp_path: Path) -> None:
    jobs = [
        {
            "engine": other,
            "config": config(name).to_json(),
            "resume": str(two / engine / f"{name} half"),
            "steps": STEPS,
            "out": str(tmp_path / engine / name),
        }
        for engine, other in (("ddp", "fsdp"), ("fsdp", "fsdp"), ("fsdp", "ddp"))
        for name in RESUMED
    ]
    run_jobs(3, jobs, tmp_path)
    for name in RESUMED:
        run = train(alone(name))
        for engine in ENGINES:
            assert different(run, tmp_path / engine / name) < 1e-3, (name, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_process_ends_the_others_and_leaves_the_checkpoint(engine: str, tmp_path: Path) -> None:
    job = {"engine": engine, "config": config("tiger").to_json(), "out": str(tmp_path), "die_at": 3}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    started = subprocess.Popen(
        [*command, str(HERE / "parallel_worker.py"), str(tmp_path / "jobs.json")],
        env={**os.environ, **ONE_THREAD},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until((tmp_path / "dying").exists, lambda: started.poll() is None)
        children = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    environment = (entry / "environ").read_bytes().split(b"\0")
                    parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    if parent == started.pid:
                        children.update({x: int(entry.name) for x in environment if x.startswith(b"RANK=")})
        os.kill(children[b"RANK=1"], signal.SIGKILL)
        output, _ = started.communicate(timeout=HANG)
    finally:
        started.kill()
    assert started.returncode != 0
    assert "closed by peer" in output or "SIGTERM" in output or "exitcode" in output
    assert steps_of(tmp_path) == [0]
    assert newest(tmp_path).record["step"] == 0
    assert different(alone("tiger"), tmp_path) == 0


def test_train_at_the_shell(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(generate(BASE["corpus"]))
    small = "--batch 6 --context 8 --width 16 --vocab-size 500 --layers 1".split()
    common = ["-m", "minisign.cli", "train", "--text", str(tmp_path / "text"), *small]
    done = torchrun(2, *common, "--steps", "6", "--parallel", "fsdp", "--out", str(tmp_path / "a"))
    assert done.stdout.count("step 6: training loss") == 1
    more = ["--steps", "9", "--parallel", "ddp", "--resume", str(tmp_path / "a")]
    done = torchrun(2, "-m", "minisign.cli", "train", *more)
    assert done.stdout.count("step 9: training loss") == 1
    wrong = torchrun(2, *common, "--parallel", "ddp", "--lr", "-1", "--out", str(tmp_path), check=False)
    assert wrong.returncode != 0
    assert wrong.stdout.count("minisign train: error: Invalid learning rate: -1.0") == 1


@pytest.mark.parametrize(
    ("engine", "environment", "message"),
    [
        ("dpp", {}, "unknown parallel 'dpp': choose from ddp, fsdp"),
        ("ddp", {}, "--parallel ddp needs torchrun: torchrun --nproc-per-node 2"),
        (None, {"WORLD_SIZE": "2", "RANK": "0"}, "2 processes were started: say how they work together"),
    ],
)
def test_what_does_not_fit_together(
    engine: str | None, environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), joined(engine, "cpu"):
        pass


def test_runs_that_several_processes_cannot_share() -> None:
    pair = World("ddp", 0, 2)
    for options, message in (
        (
            {"release_grads": True},
            "release_grads takes each gradient before the processes have averaged it",
        ),
        ({"batch": 1}, "a batch of 1 windows is too small for 2 processes"),
    ):
        c = Config(**{**BASE, **options})
        with pytest.raises(ValueError, match=message):
            Run(c, load_tokens(c), world=pair)


def test_shares_of_a_batch() -> None:
    import numpy as np

    windows = np.arange(14).reshape(7, 2)
    parts = [World("ddp", rank, 3).share(windows) for rank in range(3)]
    assert np.array_equal(np.concatenate([part for part, _ in parts]), windows)
    assert [weight for _, weight in parts] == [9 / 7, 6 / 7, 6 / 7]
    assert ALONE.share(windows)[1] == 1


class Piece(torch.Tensor):
    """As much of a DTensor as these functions ask for."""

    placements: Any
    device_mesh: Any


def piece(rows: int, size: int, rank: int, dim: int = 0) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    class Mesh:
        def size(self, i: int) -> int:
            return [4, size][i]

        def get_local_rank(self, i: int) -> int:
            return [3, rank][i]

    p = torch.empty(rows, 2).as_subclass(Piece)
    p.placements, p.device_mesh = (Replicate(), Shard(dim)), Mesh()
    return p


def test_where_a_piece_begins() -> None:
    for rows in (1, 5, 6, 7):
        parts = torch.arange(rows).chunk(3)
        for rank in range(3):
            expected = int(parts[rank][0]) if rank < len(parts) else rows
            assert first_row(piece(rows, 3, rank)) == expected
    assert first_row(torch.ones(3)) == 0
    assert local(w := torch.ones(3)) is w


def test_only_cuts_between_rows() -> None:
    check_rows("w", torch.ones(2))
    check_rows("w", piece(6, 3, 0))
    with pytest.raises(ValueError, match=r"w of shape \(6, 2\) is placed as .*must be cut between rows"):
        check_rows("w", piece(6, 3, 0, dim=1))


def test_track_rows_knows_its_processes() -> None:
    e = torch.nn.Embedding(4, 2)
    handle = track_rows(e, process_group=None)
    e(torch.tensor([1])).sum().backward()
    optimizer = Tiger([{"params": [e.weight], "lazy": "ids"}])
    before = e.weight.detach().clone()
    optimizer.step()
    assert (e.weight != before).any(1).tolist() == [False, True, False, False]
    handle.remove()
    with pytest.raises(RuntimeError, match="nothing tracks the parameter"):
        optimizer.step()


def test_the_config_does_not_know_how_many_processes() -> None:
    names = {field.name for field in dataclasses.fields(Config)}
    assert not names & {"parallel", "world", "engine"}
