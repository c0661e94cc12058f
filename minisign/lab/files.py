"""Files that appear whole or not at all, and errors that name them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

# What loading a state raises if it is of something else, or a damaged file gave it.
MISFITS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` on a temporary file beside ``path`` and moves it there once it is complete.

    Raises:
        OSError: it cannot be written, and what was there before is there still.
    """
    with _beside(path) as partial:
        write(partial)
        sync(partial)
        partial.replace(path)


def sync(path: Path) -> None:
    """Waits until a file, or which files a folder has, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_new(path: Path, write: Callable[[Path], object]) -> None:
    """The same for a file or a folder that must not be there yet.

    Raises:
        ValueError: it is there. OSError: it cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} is there already, and is not overwritten")
    with _beside(path) as partial:
        write(partial)
        partial.rename(path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Where to write what is to become ``path``; what is left there is removed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        _remove(partial)  # of one that was killed
        yield partial
    except (OSError, RuntimeError, SafetensorError) as error:  # of torch.save, and of save_file
        reason = (isinstance(error, OSError) and error.strerror) or one_line(error)
        raise OSError(f"cannot write {path}: {reason}") from error
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: missing, unreadable, or no JSON object, with the file's name.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path.name} in {path.parent}")
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no object but {type(fields).__name__}")
    return fields


def read_checkpoint(path: Path, format: str) -> dict[str, Any]:
    """A checkpoint: a dictionary that ``torch.save`` wrote, whose ``"format"`` says what it is.

    Raises:
        ValueError: missing, damaged or foreign, with the file's name.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path.name} in {path.parent}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # what a damaged file raises depends on where the damage is
        raise ValueError(f"{path} is damaged or not a checkpoint: torch cannot load it") from None
    if not isinstance(saved, dict) or saved.get("format") != format:
        raise ValueError(f"{path} is not a checkpoint of minisign ({format!r})")
    return saved


def prepare_out(out: Path) -> None:
    """Makes the folder, or says why it cannot be written, before anything is computed.

    Raises:
        ValueError: a file of that name, no permission, no space.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".minisign-write-test-{os.getpid()}"  # several processes may ask at once
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}") from None


def one_line(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
