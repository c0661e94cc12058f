"""``minisign inspect``: the embeddings and output layers of a checkpoint, and what each looks like.

Which matrices those are is told by name and shape, what is known of them by the ``config.json`` beside, and
whether their rows stand at a bound by :mod:`minisign.doctor.bound`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisign.doctor.bound import Inspection, inspect_matrix
from minisign.doctor.weights import Stored, is_run, stored_tensors
from minisign.lab.config import Config
from minisign.lab.files import one_line, read_json, write_json, write_whole

QUICK = 5_000_000  # words of a generated text that are made again for the texts of its tokens
NAMES = re.compile(
    r"(^|[._])(emb|embed|embeds|embedding|embeddings|embed_in|wte|wpe|embed_tokens|tok_embeddings|word_embeddings|"
    r"position|positions|embed_positions|shared|lm_head|head|output|embed_out|output_layer|decoder|"
    r"unembed|unembedding|proj_out|token_embedding|classifier)(\.(weight|modules_to_save.*))?$",
    re.IGNORECASE,
)
NOT_LEARNED = re.compile(r"(^|[._])(cos|sin|rotary|inv_freq|rope|mask|bias)([._]|$)", re.IGNORECASE)


def embedding_like(tensors: Mapping[str, Stored], vocab_size: int | None = None) -> list[Stored]:
    """The matrices that are embeddings or output layers, by name and shape.

    A matrix is one if its name says so, or if it has ``vocab_size`` rows; where there is no such, one with
    eight times as many rows as columns. Tables of sines and masks are left out.

    Args:
        tensors: by name.
        vocab_size: of the model, where it is known.

    Raises:
        ValueError: there is none; with the names of the matrices that have most rows.
    """
    matrices = [t for t in tensors.values() if len(t.shape) == 2 and t.shape[0] * t.shape[1]]
    learned = [t for t in matrices if not NOT_LEARNED.search(t.name) and t.shape[0] > 1]
    found = [t for t in learned if NAMES.search(t.name) or t.shape[0] == vocab_size]
    found = found or [t for t in learned if t.shape[0] >= 8 * t.shape[1]]
    if not found:
        most = sorted(matrices, key=lambda t: -t.shape[0])[:3]
        there = ", ".join(f"{t.name} {list(t.shape)}" for t in most) or "no matrices at all"
        raise ValueError(f"nothing here looks like an embedding; give --tensor NAME (there is {there})")
    return found


@dataclass(frozen=True)
class Origin:
    """What the ``config.json`` beside a checkpoint says of it.

    Attributes:
        vocab_size: where it is known.
        run: its configuration, if it is a run of this package.
    """

    vocab_size: int | None = None
    run: Config | None = None

    def weight_decay(self, name: str) -> float | None:
        """λ of a matrix, where it is known."""
        if self.run is None:
            return None
        of_embedding = name.startswith(("embedding.", "position."))
        return (self.run.embedding_decay if of_embedding else self.run.weight_decay) or None


def origin(path: Path) -> Origin:
    """Of a file or folder of weights.

    Raises:
        ValueError: a damaged ``config.json``.
    """
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file():
        return Origin()
    fields = read_json(config)
    if is_run(fields):
        try:
            return Origin(run=Config.from_json(fields))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{config} is not one of a run: {one_line(error)}") from None
    text = fields.get("text_config")
    size = fields.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return Origin(size if isinstance(size, int) and not isinstance(size, bool) else None)


def inspect_checkpoint(
    path: Path, names: Sequence[str] = (), weight_decay: float | None = None
) -> list[tuple[Stored, Inspection]]:
    """The embedding-like matrices of a checkpoint, or those with the ``names``, and what they look like.

    Args:
        path: a file, an index of shards, or a folder.
        weight_decay: λ that they were trained with; by default that of a run of this package, else unknown.

    Raises:
        ValueError: what :func:`~minisign.doctor.weights.stored_tensors`, :func:`embedding_like` and
            :func:`inspect_matrix` raise, or a name that is not there.
    """
    tensors = stored_tensors(path)
    known = origin(path)
    for name in names:
        if name not in tensors:
            close = difflib.get_close_matches(name, tensors, 3, 0.3) or sorted(tensors)[:3]
            raise ValueError(
                f"there is no tensor {name!r} in {path}; there is {', '.join(close) or 'none'}"
            )
    matrices = [tensors[name] for name in names] or embedding_like(tensors, known.vocab_size)
    return [
        (m, inspect_matrix(m, known.weight_decay(m.name) if weight_decay is None else weight_decay))
        for m in matrices
    ]


def token_texts_of(path: Path, tokenizer: str | None = None) -> Callable[[int], str | None]:
    """What says how the tokens of a checkpoint are written; always None where nothing says it.

    Args:
        tokenizer: see :func:`~minisign.lab.tokenizer.token_texts`; by default ``tokenizer.json`` beside the
            checkpoint, or the vocabulary of a run of this package, if its text is not one that takes
            minutes to generate again.

    Raises:
        ValueError: a tokenizer that is asked for and cannot be read.
    """
    from minisign.lab.tokenizer import token_texts

    if tokenizer is not None:
        return token_texts(tokenizer)
    beside = (path if path.is_dir() else path.parent) / "tokenizer.json"
    run = origin(path).run
    try:
        if run is not None and (run.text or run.corpus.words <= QUICK):
            from minisign.lab.build import load_tokens

            encoding = load_tokens(run).encoding
            return lambda i: encoding.decode([i]) if i < encoding.n_vocab else None
        if beside.is_file():
            return token_texts(str(beside))
    except ValueError:
        pass  # nobody asked for it: the text is gone, or the extra is not installed
    return lambda i: None


# --- as JSON and as a picture ---------------------------------------------------------------------


def as_json(found: Inspection, worst: int, text: Callable[[int], str | None]) -> dict[str, Any]:
    """The figures of an inspection, and of its ``worst`` rows with the ``text`` of each token; strict
    JSON. If there are tokens beyond the last row, rows are something else (positions) and have no text."""
    is_of_tokens = text(found.shape[0]) is None
    return {
        "tensor": found.name,
        "file": str(found.file),
        "shape": list(found.shape),
        "dtype": str(found.dtype)[6:],
        "verdict": found.verdict,
        "saturated": found.saturated,
        "bound": found.bound,
        "bound_is": found.bound_is,
        "smallest": found.smallest,
        "largest": found.largest,
        "near": found.plus + found.minus,
        "near_plus": found.plus,
        "near_minus": found.minus,
        "rows_at_bound": int(found.rows.sum()),
        "typical_rms": None if math.isnan(found.typical) else found.typical,
        "note": found.note,
        "worst_rows": [
            {
                "id": int(i),
                "text": text(int(i)) if is_of_tokens else None,
                "near": float(found.row_near[i]),
                "rms": float(found.row_rms[i]),
                "at_bound": bool(found.rows[i]),
            }
            for i in found.worst(worst)
        ],
    }


def write_inspection(out: Path, found: Sequence[Inspection], content: Any, title: str) -> list[Path]:
    """``inspect.json`` and ``inspect.png`` in ``out``; each appears whole or not at all."""
    from minisign import plots  # matplotlib takes a second to load

    files = [out / "inspect.json", out / "inspect.png"]
    write_whole(files[0], lambda path: write_json(path, content))
    figure = plots.inspections(found[:6], title)
    write_whole(files[1], lambda path: plots.save(figure, path))
    return files
