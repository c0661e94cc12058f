"""That `make mutants` can plant its bugs, and that its committed table is about them."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import MUTANTS, ROOT, TABLE, Mutant, guards, main, plant, row


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_bug_can_be_planted_and_its_guards_exist(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    file, _, test = mutant.test.partition("::")
    assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text()
    for guard in guards(mutant)[1:]:
        assert (ROOT / guard).is_file()


def test_there_are_enough_bugs_of_many_kinds() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
    assert sum(bool(mutant.notebook) for mutant in MUTANTS) >= 12
    assert {mutant.notebook[:2] for mutant in MUTANTS} >= {f"{n:02d}" for n in range(17)} - {"02"}


def test_the_committed_table_is_of_these_bugs_and_none_survived() -> None:
    lines = TABLE.read_text().splitlines()
    for mutant in MUTANTS:
        expected = " | ".join(row(mutant, ["red"] * len(guards(mutant))))
        assert f"| {expected} |" in lines
    assert len(lines) == 8 + len(MUTANTS)


def test_planting_changes_the_copy_alone(tmp_path: Path) -> None:
    mutant = MUTANTS[0]
    before = (ROOT / mutant.file).read_text()
    plant(mutant, tmp_path)
    assert (ROOT / mutant.file).read_text() == before
    assert (tmp_path / mutant.file).read_text() == before.replace(mutant.old, mutant.new)
    lost = Mutant("lost", mutant.file, "no such text", "", mutant.test)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="lost: 'no such text' is 0 times in"):
        plant(lost, tmp_path / "other")


def test_a_survivor_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harmless = Mutant(
        "harmless",
        "minisign/theory.py",
        '"""Closed forms',
        '"""Closed  forms',
        "tests/test_mutants.py::test_good",
    )
    monkeypatch.setattr("mutants.MUTANTS", (harmless,))
    monkeypatch.setattr("mutants.sound", lambda names: True)
    monkeypatch.setattr("mutants.verdicts", lambda mutant: ["SURVIVED"])
    monkeypatch.setattr("sys.argv", ["mutants.py", "--only", "harmless"])
    assert main() == 1
    assert "0 of 1 bugs noticed" in capsys.readouterr().out
