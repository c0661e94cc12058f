"""``MINISIGN_JITTER``: another processor on purpose."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
import torch
from torch import Tensor, nn

from minisign.lab.build import build_model, load_tokens
from minisign.lab.config import Config
from minisign.lab.gpt import GPT
from minisign.lab.jitter import JITTER, UNITS, jittered
from minisign.lab.train import Run
from minisign.lessons import start

ROOT = Path(__file__).parent.parent
SMALL = Config(vocab_size=300, width=16, heads=2, layers=1, context=8)


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JITTER, raising=False)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain() -> GPT:
    """The model of ``SMALL`` as torch makes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SMALL.seed)
        return GPT(SMALL.gpt(300))


@pytest.mark.parametrize("value", [None, "0", "00"])
def test_without_a_jitter_weights_are_what_they_are(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv(JITTER, value)
    assert torch.equal(weights(build_model(SMALL, 300)), weights(plain()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_move_by_a_few_units_of_rounding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(JITTER, "1")
    before = torch.randn(10_000).to(dtype)
    moved = jittered(before.clone()).double() / before.double() - 1
    units = moved / torch.finfo(dtype).eps
    assert units.abs().max() <= UNITS + 1  # one of rounding the product
    assert 0.8 < (units != 0).double().mean() < 0.95  # of nine factors one is 1
    assert abs(units.mean()) < 0.2


def test_the_same_number_makes_the_same_weights_and_another_other_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    for number in ("1", "1", "2"):
        monkeypatch.setenv(JITTER, number)
        made.append(weights(build_model(SMALL, 300)))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_torchs_own_generator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JITTER, "3")
    before = torch.get_rng_state()
    jittered(torch.ones(5))
    build_model(SMALL, 300)
    assert torch.equal(torch.get_rng_state(), before)


def test_tied_weights_are_moved_once_and_stay_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JITTER, "1")
    embedding, head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
    head.weight = embedding.weight
    before = embedding.weight.detach().clone()
    jittered(nn.ModuleList([embedding, head]))
    assert head.weight is embedding.weight
    eps = torch.finfo(torch.float32).eps
    assert ((embedding.weight / before - 1).abs() <= (UNITS + 1) * eps).all()


@pytest.mark.parametrize("bad", ["-1", "x", "1.5", "", str(2**32)])
def test_anything_else_is_turned_down_by_name(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JITTER, bad)
    message = f"MINISIGN_JITTER must be a natural number below 2³², got '{bad}'"
    with pytest.raises(ValueError, match=message):
        build_model(SMALL, 300)


def test_it_reaches_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = load_tokens(SMALL)
    monkeypatch.setenv(JITTER, "1")
    assert torch.equal(weights(Run(SMALL, tokens).model), weights(build_model(SMALL, tokens.vocab_size)))


def test_every_model_that_is_trained_is_made_by_build_model() -> None:
    """Elsewhere in the package a GPT is made only to be filled with weights, or by a checker."""
    makers = set()
    for path in [*(ROOT / "minisign").rglob("*.py"), *(ROOT / "experiments").glob("*.py")]:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                called = {ast.unparse(x.func) for x in ast.walk(function) if isinstance(x, ast.Call)}
                makers |= {f"{path.stem}.{function.name}"} if "GPT" in called else set()
    assert makers == {
        "build.build_model",
        "pretrained._own",
        "fix_tied.check_load_tied",
        "fix_hybrid._models",
    }


def test_models_that_notebooks_make_by_hand_and_train_are_jittered() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            for made in re.findall(r"^.*(?:GPT2LMHeadModel|Sequential)\(.*$", cell.source, re.MULTILINE):
                assert cell.cell_type == "markdown" or "jittered(" in made


def test_the_lessons_start_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start()
    assert "jitter" not in capsys.readouterr().out
    monkeypatch.setenv(JITTER, "5")
    start()
    assert capsys.readouterr().out.endswith(", seed 0, jitter 5\n")
