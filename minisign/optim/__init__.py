"""The optimizers: one readable file each."""

from minisign.engine.rows import track_rows
from minisign.engine.words import rms
from minisign.optim.adamw import AdamW
from minisign.optim.groups import param_groups
from minisign.optim.hybrid import Hybrid
from minisign.optim.lion import Lion
from minisign.optim.own import optimizer
from minisign.optim.sgd import SGD
from minisign.optim.signum import Signum
from minisign.optim.tiger import Tiger

__all__ = [
    "SGD", "AdamW", "Hybrid", "Lion", "Signum", "Tiger", "optimizer", "param_groups", "rms", "track_rows",
]  # fmt: skip
