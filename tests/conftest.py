"""What all tests share."""

from __future__ import annotations

import os

# Tiny tensors: a second thread only waits. Set before torch is loaded, and for child processes.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# Triton reads it when a kernel's module is loaded: then kernels run on a CPU, in NumPy. With 0, on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import minisign  # noqa: F401  # before torch: it says how threads wait

# isort: split

import pytest
import torch
from once import Once


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Once:
    """``once(name, make)`` → a folder that ``make(folder)`` has filled, once for all workers."""
    own = tmp_path_factory.getbasetemp()
    return Once((own if worker_id == "master" else own.parent) / "once")
