"""minisign: sign-based optimizers to read, run and trust.

``from minisign import Signum, Lion, Tiger, AdamW, Hybrid, param_groups, track_rows, EmbeddingWatch``.
Importing this loads torch and nothing else heavy; the model, the corpus and the main job are in modules of
their own.
"""

import importlib
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

# Threads that wait for one another give their core away: spinning, they would slow one another down many
# times where the machine has other work. OpenMP reads this once, when torch loads it.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from minisign.doctor.watch import EmbeddingWatch
from minisign.optim import (
    SGD,
    AdamW,
    Hybrid,
    Lion,
    Signum,
    Tiger,
    optimizer,
    param_groups,
    rms,
    track_rows,
)

__version__ = "0.1.0"

# Where these were before there were rooms. Programs that name them go on.
IN_DOCTOR = "examine", "guard", "hf", "inspection", "pretrained", "repair", "watch", "weights"


class _Moved(MetaPathFinder, Loader):
    """``minisign.guard`` is ``minisign.doctor.guard``, and so on: the same module, loaded when named."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        package, _, module = name.rpartition(".")
        return spec_from_loader(name, self) if package == __name__ and module in IN_DOCTOR else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.removeprefix(f"{__name__}.")
        sys.modules[module.__name__] = importlib.import_module(f"{__name__}.doctor.{name}")


sys.meta_path.append(_Moved())

__all__ = [
    "SGD",
    "AdamW",
    "EmbeddingWatch",
    "Hybrid",
    "Lion",
    "Signum",
    "Tiger",
    "optimizer",
    "param_groups",
    "rms",
    "track_rows",
]
