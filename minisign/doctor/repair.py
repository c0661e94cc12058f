"""Resetting rows of an embedding that ran to the bound ±1/λ.

In memory :func:`minisign.probes.saturated_rows` finds them, in a file :mod:`minisign.doctor.inspection`.
"""

from __future__ import annotations

import shutil
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from minisign.doctor.bound import Inspection
from minisign.doctor.weights import Stored
from minisign.lab.files import write_new

WAYS = ("mean", "resample", "rescale", "zero")


@torch.no_grad()
def reset_rows(weight: Tensor, rows: Tensor, way: str, seed: int = 0) -> None:
    """Gives some rows values like those of the healthy ones, in place; the others keep their bits.

    ============ ===================================================================================
    mean         the mean of the healthy rows, the same for all: the model is undecided about them
    resample     normal numbers with the healthy rows' mean and standard deviation, by column
    rescale      the row itself, scaled to the healthy rows' median RMS: its pattern of signs is kept
    zero         zero
    ============ ===================================================================================

    Healthy rows are all those that are not reset.

    Args:
        weight: the embedding [V, D].
        rows: which rows to reset [V], boolean.
        way: one of the above.
        seed: of ``"resample"``.

    Raises:
        ValueError: an unknown way, a mask of another length, or no healthy row to go by.
    """
    if way not in WAYS:
        raise ValueError(f"unknown way {way!r}: choose from {', '.join(WAYS)}")
    if rows.shape != weight.shape[:1] or rows.dtype != torch.bool:
        raise ValueError(
            f"rows must be a boolean mask [{len(weight)}], got {rows.dtype} {list(rows.shape)}"
        )
    healthy = weight[~rows].float()
    if not len(healthy):
        raise ValueError("all rows are to be reset: no healthy row is left to go by")
    bad = weight[rows].float()
    if way == "mean":
        new = healthy.mean(0).expand_as(bad)
    elif way == "resample":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(bad.shape, generator=generator).to(weight.device)
        new = healthy.mean(0) + healthy.std(0, correction=0) * noise
    elif way == "rescale":
        size = healthy.square().mean(1).sqrt().median()
        new = rescaled(bad, size)
    else:
        new = torch.zeros_like(bad)
    weight[rows] = new.to(weight.dtype)


def rescaled(rows: Tensor, size: float | Tensor) -> Tensor:
    """Rows [n, D] with an RMS of ``size`` each, and their pattern kept."""
    return rows * (size / rows.square().mean(1, keepdim=True).sqrt())


# --- in files -------------------------------------------------------------------------------------


def repair(path: Path, out: Path, matrices: Sequence[tuple[Stored, Inspection]]) -> None:
    """A copy of a checkpoint in which the rows at a bound are scaled down to the median RMS of the others.

    That is ``"rescale"`` above, the way that notebook 08 found best. Every other byte is as it was (and in
    torch's files, which are zip files, the check sums of what changed). The optimizer's state is not looked
    at.

    Args:
        path: a file or a folder.
        out: what to write, of the same kind; it appears whole or not at all.
        matrices: what is to be repaired, and what was found there.

    Raises:
        ValueError: ``out`` is there already, a matrix has no healthy row to go by, or its format does
            not allow it. OSError: it cannot be written.
    """
    for stored, found in matrices:
        if found.rows.all():
            raise ValueError(f"all rows of {found.name} stand at a bound: no healthy row is left to go by")
        if not found.typical > 0:
            raise ValueError(f"the healthy rows of {found.name} are zero: they give no size to scale to")
        if stored.offset is None:
            raise ValueError(
                f"{stored.file} is in torch's oldest format, in which nothing can be replaced: save it "
                "anew with torch.save"
            )

    def write(partial: Path) -> None:
        if path.is_dir():
            shutil.copytree(path, partial)
        else:
            shutil.copyfile(path, partial)
        for stored, found in matrices:
            inside = stored.file.relative_to(path) if path.is_dir() else Path()
            _replace_rows(partial / inside, stored, found)

    write_new(out, write)


@torch.no_grad()
def _replace_rows(file: Path, stored: Stored, found: Inspection) -> None:
    assert stored.offset is not None
    with file.open("r+b") as opened:
        for i in np.flatnonzero(found.rows):
            row = stored.rows(int(i), int(i) + 1)
            new = rescaled(row.float(), found.typical).to(row.dtype)
            opened.seek(stored.offset + int(i) * stored.row_bytes)
            opened.write(new.contiguous().view(torch.uint8).numpy().tobytes())
    if zipfile.is_zipfile(file):
        _mend_checksum(file, stored.offset)


def _mend_checksum(file: Path, offset: int) -> None:
    """Writes the CRC-32 of a zip file's uncompressed record that holds the byte at ``offset``, in all
    places."""
    with zipfile.ZipFile(file) as opened:
        directory, entries = opened.start_dir, opened.infolist()
    with file.open("r+b") as raw:
        for entry in entries:
            raw.seek(directory)
            name, extra, comment = struct.unpack("<28xHHH12x", raw.read(46))
            raw.seek(entry.header_offset)
            start = entry.header_offset + 30 + sum(struct.unpack("<26xHH", raw.read(30)))
            end = start + entry.file_size
            if start <= offset < end:
                old, new = struct.pack("<I", entry.CRC), struct.pack("<I", _checksum(raw, start, end))
                # Directory, header, and the descriptor behind the data, which may begin with a signature.
                for place in (directory + 16, entry.header_offset + 14, end, end + 4):
                    raw.seek(place)
                    if raw.read(4) == old:
                        raw.seek(place)
                        raw.write(new)
            directory += 46 + name + extra + comment


def _checksum(raw: BinaryIO, start: int, end: int) -> int:
    raw.seek(start)
    value = 0
    while (left := end - raw.tell()) and (piece := raw.read(min(left, 2**22))):
        value = zlib.crc32(piece, value)
    return value
