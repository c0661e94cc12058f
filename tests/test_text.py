"""The corpus is the same everywhere and Zipf-like; the tokenizer is tiktoken's; any text works."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minisign.lab.config import Config
from minisign.lab.corpus import (
    COMMON,
    DEFAULT,
    CorpusConfig,
    _Writer,
    generate,
    is_rare_language,
    sha256,
    zipf_weights,
)
from minisign.lab.tokenizer import read_text, tokenize, train_encoding, vocabulary_lines

DATA = Path(__file__).parent.parent / "data"
HASHES = json.loads((DATA / "hashes.json").read_text())
CONFIGS = {
    "default": DEFAULT,
    "small": CorpusConfig(words=10_000, seed=1),
    "uniform": CorpusConfig(words=10_000, exponent=0.0, seed=2),
    "half rare": CorpusConfig(words=10_000, rare_share=0.5, seed=3),
}


@pytest.fixture(scope="module")
def text() -> str:
    return generate()


@pytest.mark.parametrize("name", CONFIGS)
def test_same_text_everywhere(name: str) -> None:
    assert sha256(generate(CONFIGS[name])) == HASHES["texts"][name]


def test_the_shipped_files_are_what_is_generated(text: str) -> None:
    vocabulary = (DATA / "vocabulary.tiktoken").read_text()
    assert hashlib.sha256(vocabulary.encode()).hexdigest() == HASHES["vocabulary"]
    assert vocabulary == vocabulary_lines(train_encoding(text, Config().vocab_size))
    documents = (DATA / "sample.txt").read_text(encoding="utf-8").strip().split("\n\n")
    assert all(document in text for document in documents)
    assert [is_rare_language(d) for d in documents].count(True) == 3


def test_the_text_has_the_words_that_were_asked_for(text: str) -> None:
    assert 800_000 <= len(text.split()) <= 810_000


def test_rare_language(text: str) -> None:
    documents = text.strip().split("\n\n")
    share = sum(map(is_rare_language, documents)) / len(documents)
    assert share == pytest.approx(0.01, abs=0.002)
    common = set(re.findall(r"\w+", " ".join(d for d in documents if not is_rare_language(d))))
    rare = set(re.findall(r"\w+", " ".join(d for d in documents if is_rare_language(d))))
    assert not common & rare


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.3])
def test_zipf(exponent: float) -> None:
    """The slope of log frequency over log rank, of nouns of rank 20 to 400, is −s."""
    config = CorpusConfig(words=400_000, exponent=exponent, rare_share=0.0)
    found = Counter(re.findall(r"\w+", generate(config)))
    lexicon = _Writer(COMMON, exponent, np.random.RandomState(0)).nouns
    ranks = np.arange(20, 400)
    # Topics shuffle neighbours: average over a dozen.
    counts = np.array([sum(found[w] for w in lexicon[k : k + 12]) / 12 for k in ranks])
    slope = np.polyfit(np.log(ranks + 6), np.log(counts), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.1)


def test_agreement(text: str) -> None:
    """What there is to learn: an article's gender and number is that of the noun it stands before."""
    writer = _Writer(COMMON, DEFAULT.exponent, np.random.RandomState(DEFAULT.seed))
    gender = {noun: i % 3 for i, noun in enumerate(writer.nouns)}
    articles = {a: g for g, pair in enumerate(writer.articles) for a in pair}
    words = re.findall(r"\w+", text)[:20_000]
    pairs = [(a, b) for a, b in pairwise(words) if a in articles and b in gender]
    assert len(pairs) > 2000
    assert all(articles[a] == gender[b] for a, b in pairs)


def test_weights_are_whole_and_positive() -> None:
    weights = zipf_weights(5000, 4.0)
    assert weights.dtype == np.int64
    assert weights.min() == 1
    assert weights[0] == 2**24


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"words": 0}, ValueError, "words must be 1 to 100,000,000, got 0"),
        ({"words": 1.5}, TypeError, "got 1.5"),
        ({"exponent": -1}, ValueError, r"exponent must be in \[0, 4\], got -1"),
        ({"exponent": float("nan")}, ValueError, "got nan"),
        ({"rare_share": 2.0}, ValueError, "got 2.0"),
        ({"seed": -1}, ValueError, "got -1"),
    ],
)
def test_bad_corpus(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        CorpusConfig(**options)


# --- tokenizer ------------------------------------------------------------------------------------


def test_any_text_goes_through_and_comes_back() -> None:
    text = generate(CorpusConfig(words=3000)) + "naïve 漢字 🙂 <|endoftext|>\n\ttabs  and   spaces"
    encoding = train_encoding(text, 400)
    assert encoding.n_vocab == 400
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    unseen = "Ünseen — ελληνικά \x01"
    assert encoding.decode(encoding.encode_ordinary(unseen)) == unseen


def test_vocabulary_file_is_tiktokens_format(tmp_path: Path) -> None:
    from tiktoken.load import load_tiktoken_bpe

    encoding = train_encoding("some words, some more words, and words again " * 50, 300)
    (tmp_path / "v.tiktoken").write_text(vocabulary_lines(encoding))
    ranks = load_tiktoken_bpe(str(tmp_path / "v.tiktoken"))
    assert ranks == {encoding.decode_single_token_bytes(i): i for i in range(encoding.n_vocab)}
    first = vocabulary_lines(encoding).split(" ", 1)[0]
    assert base64.b64decode(first) == encoding.decode_single_token_bytes(0)


def test_batches_follow_from_seed_and_step() -> None:
    tokens = tokenize(generate(CorpusConfig(words=3000)), 300, 16)
    a, b = tokens.batch(0, 7, 4, 16), tokens.batch(0, 7, 4, 16)
    assert a.shape == (4, 17)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, tokens.batch(0, 8, 4, 16))
    assert not np.array_equal(a, tokens.batch(1, 7, 4, 16))
    assert tokens.counts(0, 5, 4, 16).sum() == 5 * 4 * 16
    joined = " ".join(map(str, tokens.train))
    assert all(" ".join(map(str, row)) in joined for row in a)


def test_shares_are_those_of_the_training_text() -> None:
    tokens = tokenize("aab" * 300 + "c" * 100, 256, 4)  # the c are held out
    letters = [tokens.encoding.encode_single_token(x) for x in "abc"]
    np.testing.assert_allclose(tokens.shares[letters], [2 / 3, 1 / 3, 0])
    assert tokens.shares.shape == (256,)
    assert tokens.shares.sum() == pytest.approx(1)


def test_appearances_are_the_inputs_of_each_batch() -> None:
    tokens = tokenize(generate(CorpusConfig(words=3000)), 300, 16)
    seen = tokens.appearances(7, 5, 4, 16)
    assert seen.shape == (5, 300)
    for step, row in enumerate(seen):
        inputs = tokens.batch(7, step, 4, 16)[:, :-1]
        assert np.flatnonzero(row).tolist() == np.unique(inputs).tolist()
    assert np.array_equal(seen.any(axis=0), tokens.counts(7, 5, 4, 16) > 0)


def test_a_vocabulary_can_be_brought_along() -> None:
    texts = [generate(CorpusConfig(words=3000, rare_share=share)) for share in (0.0, 1.0)]
    own = tokenize(texts[0], 300, 16)
    brought = tokenize(texts[1], own.encoding, 16)
    assert brought.encoding is own.encoding
    cut = len(texts[1]) * 9 // 10
    assert brought.encoding.decode(brought.train.tolist()) == texts[1][:cut]
    assert brought.encoding.decode(brought.val.tolist()) == texts[1][cut:]
    with pytest.raises(ValueError, match="a context of 32 needs 33"):
        tokenize("to be or not", own.encoding, 32)


def test_validation_windows_lie_in_the_held_out_tenth() -> None:
    tokens = tokenize(generate(CorpusConfig(words=3000)), 300, 16)
    windows = tokens.windows(16, 10**6)
    assert np.array_equal(windows[:, :-1].ravel(), tokens.val[: windows[:, :-1].size])
    assert len(tokens.windows(16, 5)) == 5


def test_files(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    plain.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    packed.write_bytes(gzip.compress("drüben".encode()))
    assert read_text([plain, packed]) == "one\ntwo\ndrüben"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot read .*missing.txt: No such file"),
        ("empty.txt", b"", "empty.txt is empty"),
        ("blank.txt", b" \n ", "blank.txt is empty"),
        ("binary.txt", b"\x89PNG\x0d\xff\xfe", "binary.txt is not UTF-8 text: .* at byte 0"),
        ("zero.txt", b"abc\0def", "zero.txt is binary"),
        ("cut.txt.gz", gzip.compress(b"hello" * 100, mtime=0)[:20], "cannot read .*cut.txt.gz"),
        ("no.gz", b"not packed", "cannot read .*no.gz: Not a gzipped file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text([tmp_path / name])


def test_too_short() -> None:
    with pytest.raises(ValueError, match="too short: a tenth of it is 2 tokens, a context of 32 needs 33"):
        tokenize("to be or not", 256, 32)
    with pytest.raises(ValueError, match="vocab_size must be at least 256, got 10"):
        tokenize("to be or not" * 100, 10, 32)
