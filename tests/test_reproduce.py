"""The main job: the same table, files and bits however many variants are trained at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minisign.lab.build import load_tokens
from minisign.lab.config import Config
from minisign.lab.corpus import CorpusConfig
from minisign.studies import reproduce as module
from minisign.studies.reproduce import Outcome, Progress, reproduce, run_variant

PICTURES = ["distribution.png", "growth.png", "rows.png"]
SMALL = Config(
    corpus=CorpusConfig(words=4000),
    vocab_size=300,
    context=8,
    batch=4,
    layers=1,
    heads=2,
    width=16,
    steps=20,
)


def results(out: Path) -> dict[str, Any]:
    """``results.json`` but for the times."""
    found = json.loads((out / "results.json").read_text())
    for run in found["runs"]:
        assert run.pop("seconds") > 0
    return dict(found)


def names(outcomes: list[Outcome]) -> list[str]:
    return [outcome.result["variant"] for outcome in outcomes]


def test_the_number_of_jobs_changes_no_bit(tmp_path: Path) -> None:
    variants = ["tiger", "adamw", "hybrid"]
    heard: dict[int, dict[str, list[tuple[int, float]]]] = {1: {}, 2: {}}
    for jobs in (1, 2):

        def progress(variant: str, config: Config, jobs: int = jobs) -> Progress:
            told = heard[jobs][variant] = []
            return lambda step, loss, largest: told.append((step, largest))

        found = reproduce(variants, base=SMALL, out=tmp_path / str(jobs), progress=progress, jobs=jobs)
        assert names(found) == variants
    assert heard[1] == heard[2]
    assert [[step for step, _ in told] for told in heard[2].values()] == [[0, 10, 20]] * 3
    assert results(tmp_path / "1") == results(tmp_path / "2")  # with the check sums of all weights
    assert results(tmp_path / "2")["config"]["threads"] == torch.get_num_threads() == 1
    for name in ("distribution.png", "growth.png", "rows.png"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_the_order_is_that_of_the_names_whatever_finishes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.side_by_side

    def backwards(*arguments: Any) -> Any:
        yield from sorted(real(*arguments), reverse=True)

    monkeypatch.setattr(module, "side_by_side", backwards)
    written: list[list[str]] = []
    write = module.write_results

    def write_and_note(out: Path, about: Any, outcomes: list[Outcome]) -> None:
        write(out, about, outcomes)
        written.append([run["variant"] for run in results(out)["runs"]])

    monkeypatch.setattr(module, "write_results", write_and_note)
    came: dict[str, Outcome] = {}
    found = reproduce(("lion", "tiger"), base=SMALL, out=tmp_path, jobs=2, outcomes=came)
    assert list(came) == ["tiger", "lion"]
    assert written == [["tiger"], ["lion", "tiger"]]
    assert names(found) == ["lion", "tiger"]


def test_ctrl_c_before_a_result_is_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module.write_results
    asked: list[int] = []

    def interrupted(*arguments: Any) -> None:
        asked.append(1)
        if len(asked) == 1:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(module, "write_results", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce(("lion", "tiger"), base=SMALL, out=tmp_path)
    assert [run["variant"] for run in results(tmp_path)["runs"]] == ["lion"]
    assert (tmp_path / "growth.png").exists()


def test_check_sums_tell_weights_apart() -> None:
    tokens = load_tokens(SMALL)
    counts = tokens.counts(0, SMALL.steps, SMALL.batch, SMALL.context)
    run = run_variant("a", SMALL, tokens, counts)
    digest = run.result["weights_sha256"]
    assert run_variant("b", SMALL, tokens, counts).result["weights_sha256"] == digest
    assert module._sha256(run.run.model) == digest
    with torch.no_grad():
        last = list(run.run.model.parameters())[-1].view(-1)
        last[-1] = torch.nextafter(last[-1], torch.tensor(9.0))
    assert module._sha256(run.run.model) != digest
