"""minisign: sign-based optimizers to read, run and trust.

``from minisign import Signum, Lion, Tiger, AdamW, Hybrid, param_groups, track_rows, EmbeddingWatch``.
Importing this loads torch and nothing else heavy; the model, the corpus and the main job are in modules of
their own.
"""

import os
import sys

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
