"""Repairing rows that ran to the bound, and fine-tuning on the second language: by hand and small."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from minisign.doctor.repair import WAYS, reset_rows
from minisign.lab.build import load_tokens
from minisign.lab.config import Config
from minisign.lab.corpus import CorpusConfig, is_rare_language
from minisign.lab.train import Run, train, validation_loss
from minisign.studies.finetune import fine_tune, second_language

# --- repair ---------------------------------------------------------------------------------------

BAD = torch.tensor([False, True, False, False, True])


def matrix() -> torch.Tensor:
    """Rows 1 and 4 are at a bound of 100; the others have an RMS of 1, 3 and 5."""
    return torch.tensor([[1.0, 1.0], [100.0, -100.0], [3.0, -3.0], [5.0, 5.0], [-100.0, -100.0]])


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("mean", [[3.0, 1.0], [3.0, 1.0]]),
        ("rescale", [[3.0, -3.0], [-3.0, -3.0]]),
        ("zero", [[0.0, 0.0], [0.0, 0.0]]),
    ],
)
def test_reset_rows_by_hand(way: str, expected: Any) -> None:
    weight = torch.nn.Parameter(matrix())
    reset_rows(weight, BAD, way)
    torch.testing.assert_close(weight[BAD].detach(), torch.tensor(expected))


def test_resampled_rows_have_the_healthy_rows_mean_and_spread() -> None:
    weight = torch.cat(
        [torch.randn(2000, 3) * torch.tensor([1.0, 2.0, 0.5]) + 4, torch.full((2000, 3), 9e3)]
    )
    rows = torch.arange(4000) >= 2000
    healthy, state = weight[~rows], torch.get_rng_state()
    again, other = weight.clone(), weight.clone()
    reset_rows(weight, rows, "resample", seed=3)
    torch.testing.assert_close(weight[rows].mean(0), healthy.mean(0), atol=0.2, rtol=0)
    torch.testing.assert_close(weight[rows].std(0), healthy.std(0), atol=0, rtol=0.08)
    assert len(weight[rows].unique(dim=0)) == 2000  # each row is its own
    reset_rows(again, rows, "resample", seed=3)
    reset_rows(other, rows, "resample", seed=4)
    assert torch.equal(weight, again)
    assert not torch.equal(weight, other)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's randomness is touched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_the_other_rows_keep_their_bits(way: str, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 7).to(dtype)
    before = weight.clone()
    reset_rows(weight, BAD, way)
    assert torch.equal(weight[~BAD], before[~BAD])
    assert (weight[BAD] != before[BAD]).any(dim=1).all()
    assert weight.isfinite().all()
    reset_rows(before, torch.zeros(5, dtype=torch.bool), way)  # nothing to do
    assert torch.equal(before[~BAD], weight[~BAD])


@pytest.mark.parametrize(
    ("rows", "way", "message"),
    [
        (BAD, "median", "unknown way 'median': choose from mean, resample, rescale, zero"),
        (BAD[:3], "zero", r"rows must be a boolean mask \[5\], got torch\.bool \[3\]"),
        (torch.tensor([1, 4, 0, 0, 0]), "zero", r"a boolean mask \[5\], got torch\.int64 \[5\]"),
        (torch.ones(5, dtype=torch.bool), "zero", "no healthy row is left to go by"),
    ],
)
def test_bad_resets_change_nothing(rows: torch.Tensor, way: str, message: str) -> None:
    weight = matrix()
    with pytest.raises(ValueError, match=message):
        reset_rows(weight, rows, way)
    assert torch.equal(weight, matrix())


# --- fine-tuning ----------------------------------------------------------------------------------

SMALL = Config(
    corpus=CorpusConfig(words=20_000, rare_share=0.1),
    vocab_size=300,
    context=8,
    layers=1,
    heads=2,
    width=16,
    warmup=3,
    steps=150,
)


@pytest.fixture(scope="module")
def trained() -> Run:
    return train(Run(SMALL, load_tokens(SMALL)))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def same(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


def test_the_second_language_is_that_of_the_text_alone(trained: Run) -> None:
    second = second_language(SMALL, trained.tokens)
    assert second.encoding is trained.tokens.encoding
    documents, known = (t.encoding.decode(t.train.tolist()).split("\n\n") for t in (second, trained.tokens))
    assert all(map(is_rare_language, documents))
    assert not set(documents) & set(known)
    # Its most frequent words are those that the text has, since the lexicon is the same.
    words = {w for d in documents for w in d.split()}
    in_text = {w for d in known[1:-1] if is_rare_language(d) for w in d.split()}
    assert len(in_text - words) < 0.1 * len(in_text)


@pytest.mark.trained
def test_fine_tuning_learns_the_second_language_and_forgets_the_first(trained: Run) -> None:
    second, before = second_language(SMALL, trained.tokens), weights(trained)
    rested = Run(SMALL, second)
    rested.model.load_state_dict(trained.model.state_dict())
    steps: list[int] = []
    tuned = fine_tune(trained, second, 80, callback=lambda run: steps.append(run.step), every=30)
    assert steps == [30, 60, 80]
    assert validation_loss(tuned) < validation_loss(rested) - 0.3
    assert all(torch.equal(value, before[name]) for name, value in weights(trained).items())
    first = Run(SMALL, trained.tokens)
    first.model.load_state_dict(tuned.model.state_dict())
    assert validation_loss(first) > validation_loss(trained)
    assert same(tuned, fine_tune(trained, second, 80))


def test_only_the_model_that_fine_tuning_starts_from_counts(trained: Run) -> None:
    """Whatever trained the model, AdamW goes on with it, at its own rate and without weight decay."""
    second = second_language(SMALL, trained.tokens)
    expected = fine_tune(trained, second, 10)
    others: list[dict[str, Any]] = [
        {"optimizer": "lion", "lazy": "ids", "lazy_momentum": "decay", "decay": 0.5, "warmup": 7},
        {"scale": 1.0, "lr": 0.5, "weight_decay": 2.0, "betas": (0.5,), "accumulate": 3, "shrink": 0.5},
        {"embedding_optimizer": "adamw"},
        {"embedding_scale": "rms"},
    ]
    for options in others:
        other = Run(dataclasses.replace(SMALL, **{"betas": None, **options}), trained.tokens)
        other.model.load_state_dict(trained.model.state_dict())
        assert same(fine_tune(other, second, 10), expected)
    config = fine_tune(trained, second, 100, lr=0.01).config
    assert (config.optimizer, config.lr, config.weight_decay) == ("adamw", 0.01, 0.0)
    assert [config.rate(t) for t in (0, 9, 10, 55, 99)] == pytest.approx([0.1, 1, 1, 0.5, 1 / 90])


def test_fine_tuning_needs_the_second_language_and_the_same_vocabulary(trained: Run) -> None:
    config = dataclasses.replace(SMALL, text=("book.txt",))
    with pytest.raises(ValueError, match=r"the text book\.txt has no second language"):
        second_language(config, trained.tokens)
    larger = load_tokens(dataclasses.replace(SMALL, vocab_size=301))
    with pytest.raises(ValueError, match="the model has 300 tokens, the text to fine-tune on 301"):
        fine_tune(trained, larger)
