"""Tensors that lie in files: where each is, read by rows, without loading the file.

Known are safetensors, in one file or in shards with an index, and what ``torch.save`` writes, likewise. No
code in a file is ever run: torch's files are read with ``weights_only``.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minisign.lab.files import one_line, read_json

SAFETENSORS = ".safetensors"
TORCH = (".bin", ".pt", ".pth", ".ckpt")
# What a folder is searched for, in this order.
USUAL = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Stored:
    """A floating-point tensor in a file.

    Attributes:
        name: in a torch file with dictionaries in dictionaries, their keys with dots between.
        file: where it is.
        dtype, shape, stride: of the tensor; strides in entries.
        offset: byte of the file at which its first entry is; None for the oldest format of ``torch.save``,
            which can only be loaded as a whole.
        loaded: then the tensor itself.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int | None
    loaded: Tensor | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes from one row to the next."""
        return self.stride[0] * self.dtype.itemsize

    def check_matrix(self) -> None:
        """Raises:
        ValueError: it is no matrix with entries, or one that does not lie row after row.
        """
        if len(self.shape) != 2 or not math.prod(self.shape):
            raise ValueError(f"{self.name} in {self.file} is {list(self.shape)}, no matrix with rows")
        if self.stride[1] != 1 or self.stride[0] < self.shape[1]:
            raise ValueError(
                f"{self.name} in {self.file} is stored with strides {self.stride}, not row after row: save "
                "a contiguous copy"
            )

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` [stop − start, D] of a matrix, as they are stored.

        Raises:
            ValueError: the file is shorter than it should be, or cannot be read.
        """
        if self.loaded is not None:
            return self.loaded[start:stop]
        assert self.offset is not None
        wide, entries = self.stride[0], (stop - start - 1) * self.stride[0] + self.shape[1]
        data = bytearray(entries * self.dtype.itemsize)
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset + start * self.row_bytes)
                view, done = memoryview(data), 0
                while done < len(data) and (n := file.readinto(view[done:])):
                    done += n
        except OSError as error:
            raise ValueError(f"cannot read {self.file}: {error.strerror}") from None
        if done < len(data):
            raise ValueError(f"{self.file} is truncated: it ends within {self.name}")
        flat = torch.frombuffer(data, dtype=self.dtype)
        return flat.as_strided((stop - start, self.shape[1]), (wide, 1))

    def blocks(self, entries: int = 2**20) -> Iterator[tuple[int, Tensor]]:
        """All rows in float32, some at a time: (first row, rows [n, D]) with about ``entries`` entries,
        that may be overwritten."""
        size = max(1, entries // self.shape[1])
        for start in range(0, self.shape[0], size):
            rows = self.rows(start, min(start + size, self.shape[0]))
            yield start, rows.float() if self.loaded is None else rows.to(torch.float32, copy=True)


def is_run(config: Mapping[str, Any]) -> bool:
    """Whether what a ``config.json`` holds is the configuration of a run of this package."""
    return {"corpus", "optimizer"} <= config.keys()


# --- which files ----------------------------------------------------------------------------------


def weight_files(folder: Path, kinds: Sequence[str] = (SAFETENSORS, *TORCH)) -> list[Path]:
    """The files of a folder that hold a model's weights: one, or the shards of an index.

    Looked for are ``model.safetensors`` and ``pytorch_model.bin``, whole or with an index; else the only
    file of these kinds in it.

    Args:
        kinds: endings of the files to consider.

    Raises:
        ValueError: none, several without an index, or an index that is damaged or names a missing file.
    """
    for name in USUAL:
        if not name.endswith(tuple(kinds)):
            continue
        if (folder / (name + INDEX)).is_file():
            return shards(folder / (name + INDEX))
        if (folder / name).is_file():
            return [folder / name]
    try:
        found = sorted(f for f in folder.iterdir() if f.suffix in kinds and f.is_file())
    except OSError as error:
        raise ValueError(f"cannot read {folder}: {error.strerror}") from None
    if not found:
        raise ValueError(
            f"there is no model.safetensors in {folder}, nor another file of weights ({', '.join(kinds)})"
        )
    if len(found) > 1:
        raise ValueError(f"{folder} holds {', '.join(f.name for f in found)}: give one of them")
    return found


def shards(index: Path) -> list[Path]:
    """The files that an index (``….index.json``) names, all beside it."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    files = []
    for name in sorted(set(names.values())):
        if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:  # noqa: PTH119
            raise ValueError(f"{index} names {name!r}, which is no file beside it")
        if not (index.parent / name).is_file():
            raise ValueError(f"there is no {name} in {index.parent}, which {index.name} names")
        files.append(index.parent / name)
    if not files:
        raise ValueError(f"{index} names no files")
    return files


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The floating-point tensors of a file, of an index, or of a folder (:func:`weight_files`), by name.

    Raises:
        ValueError: nothing there, damaged, foreign, or more than tensors in it; with the file's name.
    """
    if path.is_dir():
        files = weight_files(path)
    elif not path.is_file():
        raise ValueError(f"there is no {path}")
    elif path.name.endswith(INDEX):
        files = shards(path)
    else:
        files = [path]
    found: dict[str, Stored] = {}
    for file in files:
        for tensor in _tensors_of(file):
            if tensor.name in found:
                raise ValueError(f"{tensor.name} is in {found[tensor.name].file.name} and in {file.name}")
            found[tensor.name] = tensor
    return found


def _tensors_of(file: Path) -> list[Stored]:
    try:
        with file.open("rb") as opened:
            start = opened.read(9)
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None
    if file.suffix == SAFETENSORS or start[8:] == b"{":
        return _of_safetensors(file)
    return _of_torch(file)


def _of_safetensors(file: Path) -> list[Stored]:
    try:
        with safe_open(file, "pt"):  # checks that sizes, places and the file's length agree
            pass
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {one_line(error)}") from None
    found = []
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in DTYPES:
            continue
        shape = tuple(entry["shape"])
        offset = 8 + length + entry["data_offsets"][0]
        found.append(Stored(name, file, DTYPES[entry["dtype"]], shape, _strides(shape), offset))
    return found


def _of_torch(file: Path) -> list[Stored]:
    try:
        whole = not zipfile.is_zipfile(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats of old
            if whole:
                content = torch.load(file, map_location="cpu", weights_only=True)
                records = {}
            else:
                records = zip_records(file)
                with FakeTensorMode():
                    content = torch.load(file, weights_only=True)
            tensors = list(_flat(content))
    except pickle.UnpicklingError:  # torch's advice, to load it all the same, is bad advice here
        raise ValueError(
            f"{file} holds more than tensors, or is damaged: torch.load refuses it with weights_only"
        ) from None
    except Exception:  # what a damaged file raises depends on where the damage is
        raise ValueError(f"{file} is damaged or neither safetensors nor torch's") from None
    found = []
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            continue
        offset = None
        if not whole:
            start = getattr(tensor.untyped_storage(), "_checkpoint_offset", -1)
            # Not by the size of the storage, which torch 2.7 takes for many times what it is.
            if records.get(start, -1) < _end(tensor):
                raise ValueError(f"{file} is damaged: {name} is not where its directory says")
            offset = start + int(tensor.storage_offset()) * tensor.dtype.itemsize
        found.append(
            Stored(
                name,
                file,
                tensor.dtype,
                tuple(tensor.shape),
                tuple(tensor.stride()),
                offset,
                tensor if whole else None,
            )
        )
    return found


def _end(tensor: Tensor) -> int:
    """Bytes of its storage up to its last entry."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + last + 1) * tensor.dtype.itemsize


def zip_records(file: Path) -> dict[int, int]:
    """Size of each uncompressed record of a zip file, by the byte at which its content starts."""
    found = {}
    with zipfile.ZipFile(file) as opened, file.open("rb") as raw:
        for entry in opened.infolist():
            raw.seek(entry.header_offset + 26)
            name, extra = struct.unpack("<HH", raw.read(4))
            if entry.compress_type == zipfile.ZIP_STORED:
                found[entry.header_offset + 30 + name + extra] = entry.file_size
    return found


def _flat(content: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix or "tensor", content
        return
    if depth > 50:
        raise ValueError("its dictionaries are nested without end")
    if isinstance(content, dict):
        items: Iterator[tuple[Any, Any]] = iter(content.items())
    elif isinstance(content, (list, tuple)):
        items = enumerate(content)
    else:
        return
    for key, value in items:
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
