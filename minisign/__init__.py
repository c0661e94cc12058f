"""minisign: sign-based optimizers to read, run and trust.

``from minisign import Signum, Lion, Tiger, AdamW, Hybrid, param_groups, track_rows, EmbeddingWatch``.
Importing this loads torch and nothing else heavy; the model, the corpus and the main job are in modules of
their own.
"""

from minisign.optim import (
    AdamW,
    Hybrid,
    Lion,
    Signum,
    Tiger,
    param_groups,
    track_rows,
)
from minisign.watch import EmbeddingWatch

__version__ = "0.1.0"

__all__ = ["AdamW", "EmbeddingWatch", "Hybrid", "Lion", "Signum", "Tiger", "param_groups", "track_rows"]
