"""From text to token ids: rustbpe learns a byte-pair vocabulary, tiktoken applies it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from minisign.lab.files import one_line

SMALLEST_VOCABULARY = 256  # every byte is a token


def read_text(files: Iterable[str | Path]) -> str:
    """The files' text, one after the other. ``.gz`` is unpacked.

    Raises:
        ValueError: a file that is missing, unreadable, empty, or not UTF-8 text, with its name.
    """
    texts = []
    for name in files:
        try:
            raw = Path(name).read_bytes()
            if str(name).endswith(".gz"):
                raw = gzip.decompress(raw)
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from None
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"cannot read {name}: {reason}") from None
        if "\0" in text:
            raise ValueError(f"{name} is binary, not text: it has a zero byte")
        if not text.strip():
            raise ValueError(f"{name} is empty")
        texts.append(text.replace("\r\n", "\n"))
    return "\n".join(texts)


def train_encoding(text: str, vocab_size: int) -> tiktoken.Encoding:
    """A byte-pair vocabulary of ``vocab_size`` tokens (at most: a short text has fewer pairs).

    Raises:
        ValueError: ``vocab_size`` below 256, the bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size must be at least {SMALLEST_VOCABULARY}, got {vocab_size}")
    import rustbpe  # only learning needs it: benchmarks.gpu does without

    tokenizer = rustbpe.Tokenizer()
    most = SMALLEST_VOCABULARY + len(text.encode())  # each merge takes a byte at least
    tokenizer.train_from_iterator([text], min(vocab_size, most))
    return tiktoken.Encoding(
        "minisign",
        pat_str=tokenizer.get_pattern(),
        mergeable_ranks={bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()},
        special_tokens={},
    )


def vocabulary_lines(encoding: tiktoken.Encoding) -> str:
    """The vocabulary in tiktoken's file format: a token in base 64 and its rank on each line."""
    tokens = ((encoding.decode_single_token_bytes(i), i) for i in range(encoding.n_vocab))
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in tokens)


def token_texts(tokenizer: str) -> Callable[[int], str | None]:
    """A function that says how the token of an id is written; None for ids that the tokenizer does not
    know.

    Args:
        tokenizer: what :func:`hugging_face_tokenizer` reads, a file in
            tiktoken's format (a token in base 64 and its rank on each line), or the name of an encoding of
            tiktoken's, which fetches it unless it has it already.

    Raises:
        ValueError: nothing of that name, or a damaged file.
    """
    path = Path(tokenizer)
    if path.is_dir() or path.suffix == ".json":
        reader = hugging_face_tokenizer(path)
        return lambda i: reader.decode([i], skip_special_tokens=False) or reader.id_to_token(i)
    if path.is_file():
        known = _read_vocabulary(path)
        return lambda i: known[i].decode(errors="replace") if i in known else None
    if tokenizer not in tiktoken.list_encoding_names():
        raise ValueError(
            f"there is no file {tokenizer}, nor an encoding of that name in tiktoken "
            f"({', '.join(tiktoken.list_encoding_names())})"
        )
    try:
        encoding = tiktoken.get_encoding(tokenizer)
    except Exception as error:  # whatever the download raises
        raise ValueError(f"tiktoken cannot get {tokenizer}: {one_line(error)}") from None
    return lambda i: encoding.decode([i]) if 0 <= i < encoding.n_vocab else None


def hugging_face_tokenizer(path: Path) -> Any:
    """A tokenizer of the package ``tokenizers``, which comes with the extra ``hf``.

    Args:
        path: a ``tokenizer.json``, or a folder with it or with ``vocab.json`` and ``merges.txt``.

    Raises:
        ValueError: nothing there, the extra not installed, or a damaged file.
    """
    try:
        from tokenizers import Tokenizer
        from tokenizers.implementations import ByteLevelBPETokenizer  # type: ignore[attr-defined]
    except ImportError:
        raise ValueError(f"{path} is read with tokenizers: pip install 'minisign[hf]'") from None
    if not path.exists():
        raise ValueError(f"there is no {path.name} in {path.parent}")
    vocab, merges = path / "vocab.json", path / "merges.txt"
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        if vocab.is_file() and merges.is_file():
            file = vocab
            return ByteLevelBPETokenizer.from_file(str(vocab), str(merges))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{file} is not a tokenizer: {one_line(error)}") from None
    raise ValueError(
        f"{path} has no tokenizer.json, nor vocab.json and merges.txt: give one with --tokenizer"
    )


def _read_vocabulary(path: Path) -> dict[int, bytes]:
    known = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            known[int(rank)] = base64.b64decode(token, validate=True)
        except ValueError:
            raise ValueError(
                f"{path} is not in tiktoken's format: line {number} is not a token in base 64 and its rank"
            ) from None
    return known


@dataclass(frozen=True)
class Tokens:
    """A tokenized text: what a model trains on.

    Attributes:
        encoding: the vocabulary.
        train, val: token ids, int64: the first 90 % of the text and the rest.
        sha256: of the text as UTF-8, to tell it again.
    """

    encoding: tiktoken.Encoding
    train: np.ndarray
    val: np.ndarray
    sha256: str

    @property
    def vocab_size(self) -> int:
        return self.encoding.n_vocab

    @property
    def shares(self) -> np.ndarray:
        """How large a share of the training text each token is [V]."""
        shares: np.ndarray = np.bincount(self.train, minlength=self.vocab_size) / len(self.train)
        return shares

    def batch(self, seed: int, step: int, size: int, context: int) -> np.ndarray:
        """Training windows [size, context + 1], at random places that follow from (seed, step) alone,
        so that a resumed run sees what an unbroken one would have seen."""
        bits = np.random.MT19937(np.random.SeedSequence([seed, step]))
        starts = np.random.RandomState(bits).randint(0, len(self.train) - context, size)
        windows: np.ndarray = self.train[starts[:, None] + np.arange(context + 1)]
        return windows

    def counts(self, seed: int, steps: int, size: int, context: int) -> np.ndarray:
        """How often each token [V] was a model's input during ``steps`` batches."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for step in range(steps):
            ids = self.batch(seed, step, size, context)[:, :-1]
            counts += np.bincount(ids.ravel(), minlength=self.vocab_size)
        return counts

    def appearances(self, seed: int, steps: int, size: int, context: int) -> np.ndarray:
        """Whether each token was a model's input at each step [steps, V], boolean."""
        seen = np.zeros((steps, self.vocab_size), dtype=bool)
        for step in range(steps):
            seen[step, self.batch(seed, step, size, context)[:, :-1].ravel()] = True
        return seen

    def windows(self, context: int, limit: int) -> np.ndarray:
        """Validation windows [n ≤ limit, context + 1], side by side, evenly spread over ``val``."""
        n = (len(self.val) - 1) // context
        starts = np.unique(np.linspace(0, n - 1, min(n, limit)).astype(np.int64)) * context
        windows: np.ndarray = self.val[starts[:, None] + np.arange(context + 1)]
        return windows


def tokenize(text: str, vocabulary: int | tiktoken.Encoding, context: int) -> Tokens:
    """Splits the text nine to one and encodes both parts.

    Args:
        vocabulary: how many tokens to learn from ``text``, or an encoding to use as it is.
        context: tokens of the windows to come.

    Raises:
        ValueError: a text too short for one window of ``context`` + 1 tokens in each part.
    """
    encoding = train_encoding(text, vocabulary) if isinstance(vocabulary, int) else vocabulary
    cut = len(text) * 9 // 10
    train, val = (
        np.array(encoding.encode_ordinary(part), dtype=np.int64) for part in (text[:cut], text[cut:])
    )
    shorter = min(len(train), len(val))
    if shorter < context + 1:
        raise ValueError(
            f"the text is too short: a tenth of it is {shorter} tokens, "
            f"a context of {context} needs {context + 1}"
        )
    return Tokens(encoding, train, val, hashlib.sha256(text.encode()).hexdigest())
