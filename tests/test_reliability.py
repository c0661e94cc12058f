"""``minisign train`` is killed, runs out of disk, and finds its files damaged: nothing is lost."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import resource
import shutil
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import HARMFUL, READERS, fuzz
from processes import FORKS, HANG, wait_until
from safetensors.torch import save_file

from minisign.lab.checkpoint import steps_of
from minisign.lab.corpus import CorpusConfig, generate
from minisign.lab.files import write_json, write_whole

KILLS = 30


def _child(arguments: list[str], said: Connection, largest_file: int | None) -> None:
    from minisign.cli import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        if largest_file is not None:  # as a full disk does, to every file that gets so large
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        code = main(arguments)
    said.send(output.getvalue())
    sys.exit(code)


def started(*arguments: Any, largest_file: int | None = None) -> tuple[BaseProcess, Connection]:
    """``minisign`` in a process of its own, and what it will say."""
    reading, writing = FORKS.Pipe(duplex=False)
    arguments_of_child = ([str(x) for x in arguments], writing, largest_file)
    # A test that fails leaves none behind.
    process = FORKS.Process(target=_child, args=arguments_of_child, daemon=True)
    process.start()
    writing.close()
    return process, reading


def minisign(*arguments: Any, largest_file: int | None = None) -> tuple[int | None, str]:
    """What ``minisign`` returns and says."""
    process, reading = started(*arguments, largest_file=largest_file)
    said = reading.recv()
    process.join()
    return process.exitcode, said


def sizes(text: Path) -> list[Any]:
    small = "--vocab-size 300 --context 8 --batch 4 --layers 1 --heads 2 --width 16".split()
    return ["--text", text, *small, "--optimizer", "lion", "--lazy", "ids", "--warmup", "20"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(generate(CorpusConfig(words=4000, rare_share=0.1)))
    return file


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def state(out: Path) -> tuple[dict[str, Any], bytes]:
    """All that a run goes on from: the newest checkpoint's record, but for the time it took and the check
    sums, which depend on it, and its tensors, to the bit."""
    folder = out / "checkpoints" / f"{steps_of(out)[0]:08d}"
    record: dict[str, Any] = json.loads((folder / "run.json").read_text())
    (tensors,) = folder.glob("*.distcp")
    return {k: v for k, v in record.items() if k not in ("seconds", "sha256")}, tensors.read_bytes()


def wait_for_a_save(process: BaseProcess, out: Path) -> None:
    before = steps_of(out)
    wait_until(lambda: steps_of(out) != before, process.is_alive)


def partial(out: Path) -> list[Path]:
    """What a save has written that is under way, or that was killed."""
    return list((out / "checkpoints").glob(".*.partial"))


def test_killed_at_random_moments_it_ends_at_the_same_bits(text: Path, tmp_path: Path) -> None:
    rng, out, whole = random.Random(7), tmp_path / "killed", tmp_path / "whole"
    begin = ["train", *sizes(text), "--steps", 100_000, "--save-every", 5, "--out", out]
    minisign("train", *sizes(text), "--steps", 1, "--out", whole)  # has everything imported
    before = time.monotonic()
    process, _ = started(*begin)
    wait_for_a_save(process, out)
    until_saved = time.monotonic() - before
    process.kill()
    process.join()
    shutil.rmtree(out)

    moments = ["on the way", "saved", "writing"] * (KILLS // 3)
    rng.shuffle(moments)
    reached, left_behind = [], 0
    while moments or not left_behind:  # some must be killed while they write
        assert len(reached) < 10 * KILLS
        moment = moments.pop() if moments else "writing"
        if partial(out) and moment == "writing":  # which could not be told from what is left behind
            moment = "saved"
        again = ["train", "--resume", out, "--save-every", 5]
        process, _ = started(*(again if steps_of(out) else begin))
        if moment == "on the way":  # to its first checkpoint
            process.join(rng.random() * until_saved)
        elif moment == "saved":
            wait_for_a_save(process, out)
            process.join(0.3 * rng.random() * until_saved)
        else:
            wait_until(lambda: bool(partial(out)), process.is_alive)
        assert process.is_alive()
        process.kill()  # SIGKILL
        process.join()
        reached.append(max(steps_of(out), default=0))
        left_behind += bool(partial(out))
    assert reached == sorted(reached)  # nothing is lost
    assert len(set(reached)) > KILLS / 4
    last = reached[-1] + 7
    assert minisign("train", "--resume", out, "--steps", last)[0] == 0
    assert minisign("train", *sizes(text), "--steps", last, "--out", whole)[0] == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert state(out) == state(whole)
    assert not [name for name in files(out) if "partial" in name or "write-test" in name]


@pytest.mark.parametrize("largest", [1, 500, 3_000, 20_000, 100_000])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(
    largest: int, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert minisign("train", *sizes(text), "--steps", 6, "--out", out)[0] == 0
    before = {name: (out / name).read_bytes() for name in files(out)}
    code, said = minisign("train", "--resume", out, "--steps", 12, largest_file=largest)
    assert code == 2, said
    *_, bar, line = said.splitlines()
    assert "train" in bar
    assert re.fullmatch(rf"minisign train: error: cannot write .*{out}.*: File too large", line)
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    assert minisign("train", "--resume", out, "--steps", 12)[0] == 0
    assert minisign("train", *sizes(text), "--steps", 12, "--out", tmp_path / "whole")[0] == 0
    assert state(out) == state(tmp_path / "whole")


def _write(path: Path, way: str, said: Connection) -> None:
    writes: dict[str, Any] = {
        "json": lambda path: write_json(path, ["long"] * 1000),
        "safetensors": lambda path: save_file({"x": torch.zeros(9000)}, path),
        "torch": lambda path: torch.save(torch.zeros(9000), path),
    }
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        write_whole(path, writes[way])
    except OSError as error:
        said.send(str(error))


@pytest.mark.parametrize("way", ["json", "safetensors", "torch"])
def test_every_way_to_write_a_file_says_that_the_disk_is_full(way: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    reading, writing = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_write, args=(tmp_path / "file", way, writing))
    process.start()
    writing.close()
    assert reading.recv().startswith(f"cannot write {tmp_path / 'file'}: ")
    process.join()
    assert (tmp_path / "file").read_text() == "old"
    assert files(tmp_path) == {"file"}


@pytest.mark.parametrize("name", READERS)
def test_mutated_files_are_refused_or_read(name: str, tmp_path: Path) -> None:
    found = fuzz(name, tmp_path)
    assert found["refused"] > found["file"] / 2
    assert found["read"] + found["refused"] == found["file"]


def test_ten_thousand_files_are_mutated() -> None:
    assert sum(count for _, count in READERS.values()) >= 10_000


@pytest.mark.parametrize("harm", HARMFUL)
def test_harm_would_be_noticed(harm: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=harm):
        fuzz(harm, tmp_path, 3, seconds=1 if harm == "died with -14" else HANG)
