"""Files that are damaged on purpose, and a process that reads them and must not come to harm."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from processes import FORKS, HANG
from safetensors.torch import save_file

import minisign.lab.train
from minisign import Lion
from minisign.doctor.alarm import Event
from minisign.doctor.guard import SpikeGuard
from minisign.doctor.inspection import inspect_checkpoint, token_texts_of
from minisign.doctor.pretrained import load_subject
from minisign.doctor.saves import EVENTS
from minisign.lab.build import load_tokens
from minisign.lab.checkpoint import RECORD, _digest, newest
from minisign.lab.config import Config
from minisign.lab.corpus import CorpusConfig
from minisign.lab.files import write_json
from minisign.lab.tokenizer import token_texts, train_encoding, vocabulary_lines
from minisign.lab.train import Run, train

# What would run a program. Code of installed modules may run: errors import what they need late.
PROGRAMS = (
    "exec",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
)
GIBIBYTES = 3  # that the process may take beside what it has
CONFIG = Config(
    corpus=CorpusConfig(words=3000),
    vocab_size=300,
    context=8,
    batch=4,
    layers=1,
    heads=2,
    width=16,
    steps=4,
)


class Reader(NamedTuple):
    """What is fuzzed.

    Attributes:
        file: to be mutated. read: reads it; may raise ValueError. mend: called before, to make what
        stands elsewhere fit the mutation, so that it is not refused too early.
    """

    file: Path
    read: Callable[[], object]
    mend: Callable[[], object] = lambda: None


def resealed(path: Path, **changes: Any) -> None:
    """Changes a checkpoint's record, and makes its check sums fit what is there."""
    record = json.loads((path / RECORD).read_text()) | changes
    names = [name for name in record["sha256"] if name != RECORD]
    record["sha256"] = {n: hashlib.sha256((path / n).read_bytes()).hexdigest() for n in names}
    record["sha256"][RECORD] = _digest(record)
    (path / RECORD).write_text(json.dumps(record))


def mutated(good: bytes, rng: random.Random) -> bytes:
    """Some of: bits flipped; bytes overwritten, removed, doubled, put in; huge numbers; the end cut off."""
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # Half of the changes go where files say what is in them.
        at = rng.randrange(min(len(data), 600) if rng.random() < 0.5 else len(data)) if data else 0
        length = rng.choice((1, 2, 4, 8, 40))
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            data[at:at] = rng.randbytes(length)
        elif kind == 5:
            data[at : at + 8] = rng.choice((b"\xff" * 8, b"\x00" * 8, b"\xff" * 7 + b"\x7f"))
        elif kind == 6:
            digits = [i for i, byte in enumerate(data[: 1 << 16]) if chr(byte).isdigit()]
            if digits:
                at = rng.choice(digits)
                data[at : at + 1] = rng.choice((b"-1", b"99999999999", b"1e999", b"9" * 40))
        else:
            del data[at:]
    return bytes(data)


# --- what is read ---------------------------------------------------------------------------------


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(60, 8)
    weight[::9] = torch.where(weight[::9] > 0, 10.0, -10.0)
    return {"embed_tokens.weight": weight, "half.weight": torch.randn(8, 8).half(), "n": torch.arange(3)}


def _safetensors(folder: Path) -> Reader:
    file = folder / "m.safetensors"
    save_file(_tensors(), file)
    return Reader(file, lambda: inspect_checkpoint(file))


def _index(folder: Path) -> Reader:
    for name, tensor in _tensors().items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {name: f"{name}.safetensors" for name in _tensors()}}))
    return Reader(file, lambda: inspect_checkpoint(folder))


def _torch_file(folder: Path) -> Reader:
    file = folder / "m.pt"
    torch.save({"model": _tensors(), "step": 3, "names": ["a", "b"]}, file)
    return Reader(file, lambda: inspect_checkpoint(file))


def _old_torch_file(folder: Path) -> Reader:
    file = folder / "m.pt"
    torch.save(_tensors(), file, _use_new_zipfile_serialization=False)
    return Reader(file, lambda: inspect_checkpoint(file))


def _run(folder: Path) -> tuple[Run, Path]:
    run = train(Run(CONFIG, load_tokens(CONFIG)))
    run.save(folder)
    return run, folder / "checkpoints" / "00000004"


def _record(folder: Path) -> Reader:
    path = _run(folder)[1]
    return Reader(path / RECORD, lambda: newest(folder))


def _resumed(folder: Path) -> tuple[Callable[[], object], Path]:
    """What resumes a run, of a text that is in memory already, and the run's checkpoint."""
    run, path = _run(folder)

    def the_same(config: Config) -> Any:
        if dataclasses.replace(config, steps=4, seed=0) != CONFIG:
            raise ValueError("another configuration")
        return run.tokens

    def resume() -> None:
        with mock.patch.object(minisign.lab.train, "load_tokens", the_same):
            Run.resume(folder)

    return resume, path


def _resealed_record(folder: Path) -> Reader:
    resume, path = _resumed(folder)

    def seal() -> None:
        with contextlib.suppress(Exception):  # no JSON any more: it stays as it is
            resealed(path)

    return Reader(path / RECORD, resume, seal)


def _metadata(folder: Path) -> Reader:
    resume, path = _resumed(folder)
    return Reader(path / ".metadata", resume, lambda: resealed(path))


def _pieces(folder: Path) -> Reader:
    resume, path = _resumed(folder)
    (file,) = path.glob("*.distcp")
    return Reader(file, resume, lambda: resealed(path))


def _guard(folder: Path) -> Reader:
    model = torch.nn.Embedding(9, 4)
    optimizer = Lion(model.parameters(), lr=0.1)
    guard = SpikeGuard(model, optimizer, on_ratio=None, folder=folder, save_every=1)
    for _ in range(2):
        model(torch.arange(9)).sum().backward()
        if guard.check(torch.tensor(1.0)):
            optimizer.step()
    return Reader(sorted(folder.glob("*.pt"))[-1], guard.resume)


def _guard_events(folder: Path) -> Reader:
    reader = _guard(folder)
    event = Event(3, "loss", "", "9.5", 6.0, "warn")
    write_json(folder / EVENTS, [dataclasses.asdict(event)])
    return Reader(folder / EVENTS, reader.read)


def _tiktoken(folder: Path) -> Reader:
    file = folder / "v.tiktoken"
    file.write_text(vocabulary_lines(train_encoding("a few words, and a few more of the same " * 20, 300)))
    return Reader(file, lambda: token_texts(str(file))(270))


def _tokenizer(folder: Path) -> Reader:
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a few words, and a few more " * 20], 280, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return Reader(folder / "tokenizer.json", lambda: token_texts(str(folder / "tokenizer.json"))(70))


def _own_config(folder: Path) -> Reader:
    _run(folder)

    def read() -> None:
        inspect_checkpoint(folder)
        token_texts_of(folder)(70)

    return Reader(folder / "config.json", read)


def _pretrained(folder: Path) -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    sizes = dict(vocab_size=300, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, eos_token_id=2)).save_pretrained(folder)
    _tokenizer(folder)


def _pretrained_config(folder: Path) -> Reader:
    _pretrained(folder)
    return Reader(folder / "config.json", lambda: load_subject(folder))


def _pretrained_weights(folder: Path) -> Reader:
    _pretrained(folder)
    return Reader(folder / "model.safetensors", lambda: load_subject(folder))


READERS: dict[str, tuple[Callable[[Path], Reader], int]] = {  # and how many files of each
    "safetensors": (_safetensors, 1500),
    "index": (_index, 800),
    "torch": (_torch_file, 1500),
    "old torch": (_old_torch_file, 1200),
    "record": (_record, 500),
    "resealed record": (_resealed_record, 700),
    "metadata": (_metadata, 1200),
    "pieces": (_pieces, 1000),
    "guard": (_guard, 800),
    "guard events": (_guard_events, 300),
    "tiktoken": (_tiktoken, 400),
    "tokenizer": (_tokenizer, 400),
    "own config": (_own_config, 400),
    "pretrained config": (_pretrained_config, 150),
    "pretrained weights": (_pretrained_weights, 150),
}


def _harmful(harm: Callable[[bytes], object]) -> Callable[[Path], Reader]:
    def made(folder: Path) -> Reader:
        file = folder / "m"
        good = pickle.dumps(7)
        file.write_bytes(good)
        return Reader(file, lambda: file.read_bytes() == good or harm(file.read_bytes()))

    return made


def _two_lines(_: bytes) -> None:
    raise ValueError("two\nlines")


HARMFUL: dict[str, Callable[[Path], Reader]] = {  # what has to be noticed
    "code was executed": _harmful(pickle.loads),
    "exec <code": _harmful(lambda _: exec("1")),
    "died with -14": _harmful(lambda _: signal.pause()),
    "died with -11": _harmful(lambda _: os.kill(os.getpid(), signal.SIGSEGV)),
    "MemoryError": _harmful(lambda _: bytearray(5 << 30)),
    "of no or several lines": _harmful(_two_lines),
    "KeyError": _harmful(lambda _: {}["x"]),
}


# --- the process that reads -----------------------------------------------------------------------


class Evil:
    """Unpickled without care, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def _read_all(name: str, folder: Path, count: int, seed: int, log: Path, seconds: int) -> None:
    harm: list[str] = []
    reading = False

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if reading and event in PROGRAMS and not (event == "exec" and _is_installed(arguments[0])):
            harm.append(f"{event} {arguments[0]!r}"[:300])

    reader = (READERS[name][0] if name in READERS else HARMFUL[name])(folder)
    good, rng = reader.file.read_bytes(), random.Random(f"{name} {seed}")
    outcomes = {"read": 0, "refused": 0}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        reader.read()  # imports what it needs
        repr(torch.zeros(1))  # and so does a tensor in the text of an error
        sys.addaudithook(audit)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + (GIBIBYTES << 30),) * 2)
        for i in range(count):
            bad = mutated(good, rng) if i else _evil(good, folder / "executed")
            reader.file.write_bytes(bad)
            reader.mend()
            log.write_text(json.dumps({"file": i, **outcomes}))  # what is left if the process dies
            signal.alarm(seconds)
            reading = True
            try:
                reader.read()
                outcomes["read"] += 1
            except ValueError as error:
                outcomes["refused"] += 1
                if not str(error) or "\n" in str(error):
                    harm.append(f"an error of no or several lines: {error!r}"[:500])
            except BaseException as error:
                harm.append(f"{type(error).__name__}: {error}"[:500])
            reading = False
            signal.alarm(0)
            if (folder / "executed").exists():
                harm.append("code was executed")
            if harm:
                kept = log.with_suffix(reader.file.suffix + ".bad")
                kept.write_bytes(bad)
                log.write_text(json.dumps({"file": i, "kept": str(kept), "harm": harm}))
                return
    log.write_text(json.dumps({"file": count, **outcomes}))


def _evil(good: bytes, mark: Path) -> bytes:
    """A pickle that would run code, in the clothes of what it is put in the place of."""
    if good.startswith(b"PK"):
        file = io.BytesIO()
        torch.save({"format": Evil(mark), "embed.weight": torch.ones(9, 9)}, file)
        return file.getvalue()
    if good.startswith(pickle.dumps(0x1950A86A20F9469CFC6C, 2)):  # torch's older files
        file = io.BytesIO()
        torch.save({"embed.weight": Evil(mark)}, file, _use_new_zipfile_serialization=False)
        return file.getvalue()
    return pickle.dumps(Evil(mark))


def _is_installed(code: Any) -> bool:
    name = getattr(code, "co_filename", "")
    return name.startswith("<frozen ") or Path(name).is_file()


def fuzz(
    name: str, folder: Path, count: int | None = None, seed: int = 0, seconds: int = HANG
) -> dict[str, Any]:
    """Reads mutations of a file with ``READERS[name]``, in a process of its own.

    Only ValueError of one line may come of it: no other error, no crash, no file that takes more than 3 GiB
    or, as it hangs, more than ``seconds``; no code executed.

    Returns:
        how many were ``"read"`` and how many ``"refused"``.
    """
    log = folder / "log.json"
    (folder / "files").mkdir()
    count = READERS[name][1] if count is None else count
    process = FORKS.Process(target=_read_all, args=(name, folder / "files", count, seed, log, seconds))
    process.start()
    process.join()
    assert log.exists(), f"died with {process.exitcode} before it read anything"
    result: dict[str, Any] = json.loads(log.read_text())
    assert process.exitcode == 0, f"died with {process.exitcode} at {result}"
    assert "harm" not in result, result
    return result


if __name__ == "__main__":  # python tests/fuzzing.py FOLDER SEED [COUNT [NAME …]]
    for each in sys.argv[4:] or READERS:
        place = Path(sys.argv[1]) / each.replace(" ", "-")
        place.mkdir(parents=True)
        try:
            print(each, fuzz(each, place, int(sys.argv[3]) if sys.argv[3:] else None, int(sys.argv[2])))
        except AssertionError as error:
            print(each, "FAILED", error)
