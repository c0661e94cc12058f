"""What many tests need and takes long to make, made once for all of pytest-xdist's workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


class Once:
    """The fixture ``once``, of ``tests/conftest.py``; ``root`` is the folder that the workers share."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """A folder of that name, filled by ``make(folder)``; a worker that needs it while another makes it
        waits. If ``make`` fails, so does the test, and the next one tries again."""
        folder, made = self.root / name, self.root / f"{name}.made"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / f"{name}.lock"):
            if not made.exists():
                make(folder)
                made.touch()
        return folder
