"""Where made kernels are kept, by their content; several processes may make the same at once."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path


def folder() -> Path:
    """Where made kernels are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    found = Path(base) / "minisign"
    try:
        found.mkdir(parents=True, exist_ok=True)
        usable = os.access(found, os.W_OK)
    except OSError:
        usable = False
    return found if usable else _temporary()


@functools.cache
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="minisign-"))


def keep(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as own:
        part = Path(own) / path.name
        part.write_text(text)
        part.replace(path)
