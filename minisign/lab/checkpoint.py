"""Checkpoints of a run: whole or not there, checked before they are believed, for any number of processes.

    checkpoints/00000400/run.json       what is no tensor, and the SHA-256 of that and of every other file
    checkpoints/00000400/.metadata      which piece of which tensor is where
    checkpoints/00000400/__0_0.distcp   the pieces that the first process had; __1_0.distcp, …

The tensors are written and read by ``torch.distributed.checkpoint``, which fits what two processes wrote to
one or three. A folder gets its name when all in it is written, so a kill at any moment leaves the one
before. The last two are kept: if the newer is damaged, the older is used.
"""

from __future__ import annotations

import enum
import hashlib
import json
import logging
import pathlib
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_pieces
from torch.distributed.checkpoint.state_dict_saver import save as save_pieces

from minisign.lab.files import one_line, read_json, sync, write_json
from minisign.lab.parallel import ALONE, World

FOLDER, RECORD, METADATA = "checkpoints", "run.json", ".metadata"
FORMAT = "minisign checkpoint 2"
KEPT = 2
ANY = (Exception, CheckpointException)  # the latter is what torch wraps errors in, and is no Exception
logger = logging.getLogger(__name__)


class Damaged(ValueError):
    """A checkpoint that cannot be used."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read so far as to know that its files are what was written.

    Attributes:
        path: its folder.
        record: what is no tensor.
        shapes: of its tensors, by name.
        dtypes: of its tensors, by name.
    """

    path: Path
    record: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def load(self, tensors: Mapping[str, Tensor], world: World = ALONE) -> None:
        """Reads into ``tensors``, in place; whole ones, or the pieces of this process.

        Raises:
            Damaged: a tensor that is missing, or of another shape.
        """
        for name, tensor in tensors.items():
            if self.shapes.get(name) != tuple(tensor.shape):
                there = self.shapes.get(name, "none")
                raise Damaged(f"{self.path}: {name} is to be {list(tensor.shape)}, there is {there}")
        try:
            with _quiet():
                load_pieces(dict(tensors), storage_reader=_Reader(self.path), no_dist=world.engine is None)
        except ANY as error:  # what a damaged file raises depends on where the damage is
            raise Damaged(f"{self.path} cannot be read: {_reason(error)}") from None


def save(
    out: Path, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any], world: World = ALONE
) -> Path:
    """Writes ``out/checkpoints/STEP``, and removes all others but the one before.

    Args:
        tensors: whole ones, the same in all processes, or pieces of sharded ones.
        record: strict JSON.

    Raises:
        OSError: it could not be written; what was there before is there still.
    """
    folder = out / FOLDER
    final, partial = folder / f"{step:08d}", folder / f".{step:08d}.partial"
    problem = ""
    try:
        if world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".*.partial"):  # of runs that were killed
                shutil.rmtree(left)
            partial.mkdir()
    except OSError as error:
        problem = one_line(error)
    if problem := world.agree(problem):
        raise OSError(f"cannot write {final}: {problem}")
    try:
        try:
            writer = FileSystemWriter(partial, sync_files=True)
            with _quiet():
                save_pieces(dict(tensors), storage_writer=writer, no_dist=world.engine is None)
            if world.rank == 0:
                hashes = {f.name: _sha256(f) for f in sorted(partial.iterdir())}
                written = {**record, "format": FORMAT, "step": step, "sha256": hashes}
                write_json(partial / RECORD, {**written, "sha256": {RECORD: _digest(written), **hashes}})
                sync(partial / RECORD)
                if final.exists():  # a run that went back, or was begun anew, in the same folder
                    shutil.rmtree(final)
                partial.rename(final)
                sync(folder)
        except ANY as error:  # torch wraps what was raised, on whichever process
            problem = _reason(error)
        if problem := world.agree(problem):
            raise OSError(f"cannot write {final}: {problem}")
    finally:
        if world.rank == 0 and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
    if world.rank == 0:
        steps = steps_of(out)
        later = [s for s in steps if s > step]  # of another run in this folder, or of before it went back
        for old in later + steps[len(later) + KEPT :]:
            shutil.rmtree(folder / f"{old:08d}")
    return final


def steps_of(out: Path) -> list[int]:
    """Steps of the checkpoints in ``out``, the newest first."""
    folder = out / FOLDER
    names = [f.name for f in folder.iterdir() if f.is_dir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def newest(out: Path, world: World = ALONE) -> Checkpoint:
    """The newest checkpoint in ``out`` that is sound; what is wrong with a newer one is logged.

    Raises:
        ValueError: none there, or none that is sound.
    """
    steps = steps_of(out)
    if not steps:
        raise ValueError(f"there is no checkpoint in {out / FOLDER}")
    reasons: list[str] = []
    found: Checkpoint | None = None
    for step in steps if world.rank == 0 else ():
        try:
            found = read(out / FOLDER / f"{step:08d}")
            break
        except Damaged as error:
            reasons.append(str(error))
    found, reasons = world.agree((found, reasons))
    if found is None:
        raise ValueError(reasons[0])
    if world.rank == 0:
        for reason in reasons:
            logger.warning("%s; going on from step %d", reason, found.record["step"])
    return found


def read(path: Path) -> Checkpoint:
    """A checkpoint whose files are what was written, without its tensors.

    Raises:
        Damaged: a file is missing, truncated or altered, or it is none of this package.
    """
    try:
        record = read_json(path / RECORD)
    except ValueError as error:
        raise Damaged(str(error)) from None
    hashes = record.get("sha256")
    if record.get("format") != FORMAT or not isinstance(hashes, dict) or METADATA not in hashes:
        raise Damaged(f"{path} is not a checkpoint of minisign ({FORMAT!r})")
    own = hashes.pop(RECORD, None)
    if own != _digest(record):
        raise Damaged(f"{path / RECORD} is damaged: it is not what was written")
    if record.get("step") != int(path.name):
        raise Damaged(f"{path} is damaged: {RECORD} is of step {record.get('step')}")
    for name, expected in hashes.items():
        if pathlib.PurePath(name).name != name or not (path / name).is_file():
            raise Damaged(f"{path} is damaged: there is no {name}")
        try:
            is_right = _sha256(path / name) == expected
        except OSError as error:
            raise Damaged(f"cannot read {path / name}: {error.strerror}") from None
        if not is_right:
            raise Damaged(f"{path / name} is damaged: it is not what was written")
    try:
        metadata = _Reader(path).read_metadata()
        entries = metadata.state_dict_metadata
        tensors = {name: x for name, x in entries.items() if isinstance(x, TensorStorageMetadata)}
        if len(tensors) < len(entries):
            raise ValueError("there is more than tensors in it")
        if not {place.relative_path for place in metadata.storage_data.values()} <= hashes.keys():
            raise ValueError("its tensors are elsewhere")
        shapes = {name: tuple(entry.size) for name, entry in tensors.items()}
        dtypes = {name: entry.properties.dtype for name, entry in tensors.items()}
    except Exception as error:  # what a damaged pickle raises depends on where the damage is
        raise Damaged(f"{path / METADATA} is damaged: {one_line(error)}") from None
    return Checkpoint(path, record, shapes, dtypes)


class _Reader(FileSystemReader):
    """torch's reader, but for the file that torch unpickles: here it can make nothing but metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata) or metadata.storage_meta is None:
            raise ValueError("it is no metadata")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    NAMES = frozenset(
        {
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "Metadata",
                    "TensorStorageMetadata",
                    "TensorProperties",
                    "ChunkStorageMetadata",
                    "MetadataIndex",
                    "StorageMeta",
                    "_MEM_FORMAT_ENCODING",
                )
            ),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module.split(".")[0] == "pathlib" and name.endswith("Path"):
            return pathlib.PurePath  # where it was written; not needed
        if (module, name) == ("builtins", "getattr"):  # Python 3.11.0 to 3.11.3 write members of an enum so
            return _member
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint")


def _member(kind: Any, name: str) -> enum.Enum:
    """Of an enum, and nothing else."""
    if not (isinstance(kind, enum.EnumMeta) and name in kind.__members__):
        raise pickle.UnpicklingError(f"{kind!r} has no member {name!r}")
    return kind.__members__[name]


def _digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record, however its JSON is laid out."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    """The innermost reason of what torch raises, in one line."""
    failures = getattr(error, "failures", None)  # of the processes, each with its traceback
    if failures:
        error = next(iter(failures.values()))[0]
    while isinstance(error, BaseException) and (inner := error.__cause__ or error.__context__):
        error = inner
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warning that a process is alone: it is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
