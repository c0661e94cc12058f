"""How tests and notebooks share the workers of pytest-xdist, and which of them are slow."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

PARALLEL, GUARD, FUSED = "tests/test_parallel.py::", "tests/test_guard.py::", "tests/test_fused.py::"
INSPECT, CLI, RECORDER = "tests/test_inspect.py::", "tests/test_cli.py::", "tests/test_claims_recorder.py::"
# What begins so takes long; the longest first. Workers begin with it, in this order, so that none is left
# with a long one when the others are done; `make quick` leaves it out.
SLOW = (
    "tests/test_claims.py::",
    f"{PARALLEL}test_two_processes_with_half_the_batch_are_one",  # makes what the others of them read
    f"{PARALLEL}test_resumed_on_three_and_by_the_other_engine",
    f"{PARALLEL}test_train_at_the_shell",
    "notebooks/",
    f"{PARALLEL}test_a_killed_process_ends_the_others_and_leaves_the_checkpoint",
    f"{PARALLEL}test_a_watch_sees_the_whole_matrix",
    f"{PARALLEL}test_nan_on_one_process_has_the_same_effect_on_all",
    f"{PARALLEL}test_saved_on_two_and_resumed_on_one",
    "tests/test_reliability.py::",
    "tests/test_gpu_day.py::",
    f"{GUARD}test_a_staged_spike_is_brought_back_to_within_a_twentieth",
    f"{INSPECT}test_large_matrices_are_read_in_slices",
    f"{INSPECT}test_none_missed_in_200_saturated_matrices",
    f"{INSPECT}test_no_false_alarm_in_200_healthy_matrices",
    f"{GUARD}test_it_never_fires_in_an_undisturbed_run",
    f"{CLI}test_reproduce_writes_what_it_promises",
    f"{CLI}test_ctrl_c",
    f"{CLI}test_reproduce_takes_tiny_packed_and_several_texts",
    f"{CLI}test_a_loss_that_is_not_finite[2]",
    "tests/test_reproduce.py::",
    "tests/test_processes.py::",
    "tests/test_workers.py::test_a_worker_takes_the_longest_first",
    "tests/test_experiment.py::test_a_script_runs_in_processes_of_one_thread_each",
    f"{INSPECT}test_a_run_of_this_package_says_its_weight_decay",
    f"{RECORDER}test_of_tests_those_marked_are_recorded",
    f"{RECORDER}test_a_notebook_is_run_to_its_end",
    f"{GUARD}test_a_run_killed_while_it_goes_back_resumes_from_an_intact_checkpoint",
    "tests/test_hf.py::test_the_trainer",
    "tests/test_hf.py::test_a_trainer_that_resumes",
    f"{FUSED}test_the_same_step",
    f"{FUSED}test_the_same_noise_everywhere",
    f"{FUSED}test_state_dtype",
    f"{FUSED}test_no_gradient_is_kept",
    f"{FUSED}test_ptx",
    f"{FUSED}test_resume_in_another",
    f"{FUSED}test_interpreted_is_compiled",
    f"{FUSED}test_triton_on_a_cpu_needs_the_interpreter",
    "tests/test_heterogeneity.py::test_every_curvature_of_the_notebooks_gpt_converges",
    "tests/test_heterogeneity.py::test_curvature_of_a_gpt_is_that_of_its_whole_hessian",
    "tests/test_release.py::test_bit_for_bit_what_accumulation_does",
)
# A shell that starts `make test &` has it ignore Ctrl-C, and with it all that it starts; tests send it to
# what they start, and to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
MEMORY = 2**31  # bytes of a worker, with the kernel of its notebook


def _place(item: pytest.Item) -> int:
    """Of the item among the slow ones; behind them, if it is quick."""
    return next((i for i, begin in enumerate(SLOW) if item.nodeid.startswith(begin)), len(SLOW))


@pytest.hookimpl(tryfirst=True)  # before pytest picks by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _place(item) < len(SLOW):
            item.add_marker(pytest.mark.slow)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=_place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """As many as there are cores that this process may use, and memory."""
    from minisign.studies.processes import default_jobs  # loads torch: only the one that asks needs it yet

    return default_jobs(MEMORY)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The next test goes to the worker that is free next; xdist's own hands tests out in advance. Cells of
    a notebook stay together, in order."""
    from xdist.scheduler import LoadScopeScheduling

    class OneByOne(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.endswith(".ipynb") else nodeid

    config.option.loadscopereorder = False  # keep the order of the items
    return OneByOne(config, log) if config.getvalue("dist") == "load" else None
