"""The optimizers: one readable file each."""

from minisign.optim.adamw import AdamW
from minisign.optim.groups import param_groups
from minisign.optim.hybrid import Hybrid
from minisign.optim.lion import Lion
from minisign.optim.rows import track_rows
from minisign.optim.signum import Signum
from minisign.optim.tiger import Tiger

__all__ = ["AdamW", "Hybrid", "Lion", "Signum", "Tiger", "param_groups", "track_rows"]
