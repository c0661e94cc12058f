"""Models that need not have been trained here: a folder or file in, a model and its examples out.

Known are Hugging Face-style checkpoints of GPT-2 and RoBERTa (``config.json`` and safetensors, whole or in
shards), which need the extra ``hf``, and this package's own runs. Nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from minisign.doctor.weights import is_run, weight_files
from minisign.lab.build import load_tokens
from minisign.lab.config import Config
from minisign.lab.files import one_line, read_json
from minisign.lab.gpt import GPT
from minisign.lab.tokenizer import hugging_face_tokenizer
from minisign.lab.train import CONFIG

ARCHITECTURES = ("gpt2", "roberta")
MASKED = 0.15  # of the tokens, as RoBERTa was trained
IGNORED = -100  # a target that is not to be predicted

Example = tuple[Tensor, Tensor]  # inputs and targets, ids [B, T]


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, and how to ask it for a loss.

    Attributes:
        name: architecture and size, to be shown.
        model: in float32.
        logits: ids [B, T] → logits [B, T, V].
        embedding, head: the matrices [V, D]; the same tensor where they are tied.
        context: longest window, in tokens.
        encode: text → ids.
        masked: what a masked language model sees in place of a token, and what stands before and after a
            window; None for models that predict the next token.
        own_text, weight_decay: ids of the text that it is validated on and λ of its embedding, where they
            are known, as for a run of this package.
    """

    name: str
    model: nn.Module
    logits: Callable[[Tensor], Tensor]
    embedding: Tensor
    head: Tensor
    context: int
    encode: Callable[[str], list[int]]
    masked: tuple[int, int, int] | None = None
    own_text: np.ndarray | None = None
    weight_decay: float | None = None

    def losses(self, example: Example) -> Tensor:
        """Cross-entropy of each target in nats [B, T]; 0 where there is none to predict."""
        inputs, targets = example
        logits = self.logits(inputs).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=IGNORED).view_as(
            targets
        )

    def loss(self, example: Example) -> Tensor:
        """Their mean, a scalar."""
        return self.losses(example).sum() / (example[1] != IGNORED).sum()


def examples(
    subject: Subject, ids: Sequence[int], batches: int, size: int, length: int, seed: int = 0
) -> list[Example]:
    """Windows of a text, evenly spread over it, as batches of equal size.

    A model of the next token predicts every token of a window but the first; a masked one predicts 15 % of
    them, at random, all replaced by the mask (in its training one in ten was left as it was and one in ten
    exchanged).

    Args:
        ids: the text.
        batches, size: how many batches of how many windows; fewer windows where the text is short.
        length: tokens to predict from in each window, what is put around them included.

    Raises:
        ValueError: a length that does not fit, or a text with fewer windows than batches.
    """
    extra = 0 if subject.masked is None else 2
    if not extra + 1 < length <= subject.context:
        raise ValueError(f"length must be {extra + 2} to {subject.context} tokens here, got {length}")
    for name, value in (("batches", batches), ("batch", size)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    take = length - extra + (subject.masked is None)  # the last input of a window has a target too
    vocab_size = len(subject.embedding)
    text = np.asarray(ids, dtype=np.int64)
    if len(text) and not 0 <= text.min() <= text.max() < vocab_size:
        raise ValueError(f"the tokenizer gives the id {text.max()}, the model has {vocab_size} tokens")
    found = len(text) // take
    if found < batches:
        raise ValueError(
            f"the text has {len(text)} tokens, too few for {batches} batches of one window of {take} or "
            "more: give more text, or a smaller --length or --batches"
        )
    count = batches * min(size, found // batches)
    starts = np.linspace(0, found - 1, count).astype(np.int64) * take
    windows = torch.from_numpy(text[starts[:, None] + np.arange(take)])
    if subject.masked is None:
        inputs, targets = windows[:, :-1], windows[:, 1:]
    else:
        mask, begin, end = subject.masked
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.rand(windows.shape, generator=generator) < MASKED
        hidden[~hidden.any(1), 0] = True  # every window has something to predict
        inputs = F.pad(F.pad(windows.where(~hidden, mask), (1, 0), value=begin), (0, 1), value=end)
        targets = F.pad(windows.where(hidden, IGNORED), (1, 1), value=IGNORED)
    return list(zip(inputs.chunk(batches), targets.chunk(batches), strict=True))


# --- reading --------------------------------------------------------------------------------------


def load_subject(path: Path, tokenizer: Path | None = None) -> Subject:
    """The model in a folder, or in a safetensors file that has its ``config.json`` beside it.

    Args:
        tokenizer: for Hugging Face-style checkpoints, a folder or ``tokenizer.json``; without it, that of
            the checkpoint's folder.

    Raises:
        ValueError: nothing there, an unknown architecture, the extra ``hf`` not installed, a damaged file,
            weights that do not fit, no tokenizer.
    """
    for given in (path, tokenizer):
        if given is not None and not given.exists():
            raise ValueError(f"there is no {given}")
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / CONFIG)
    if is_run(config):
        return _own(path, config)
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"the architecture of {folder / CONFIG} is {architecture!r}: known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    return _hugging_face(path, folder, architecture, tokenizer or folder)


def _own(path: Path, fields: dict[str, Any]) -> Subject:
    """A run of this package: its text is read or generated again, for the vocabulary that it gave."""
    weights = _weights(path)
    try:
        config = Config.from_json(fields)
        tokens = load_tokens(config)
        model = GPT(config.gpt(tokens.vocab_size)).eval()
        # A tied matrix is in the file once.
        model.load_state_dict(weights, strict=False)
        missing = [name for name, _ in model.named_parameters() if name not in weights]
        if set(missing) - {"head.weight", "embedding.weight"} or len(missing) > (config.tie != "none"):
            raise ValueError(f"it has no {missing[0]}")
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit its configuration: {one_line(error)}") from None
    return Subject(
        f"minisign's GPT, {config.layers} layers, {config.norm}-norm",
        model,
        model,
        model.embedding.weight,
        model.head.weight,
        config.context,
        tokens.encoding.encode_ordinary,
        own_text=tokens.val,
        weight_decay=config.embedding_decay or None,
    )


def _hugging_face(path: Path, folder: Path, architecture: str, tokenizer: Path) -> Subject:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"a {architecture} checkpoint is read with transformers: pip install 'minisign[hf]' ({error})"
        ) from None
    classes: dict[str, Any] = {
        "gpt2": transformers.GPT2LMHeadModel,
        "roberta": transformers.RobertaForMaskedLM,
    }
    weights = _weights(path)
    with _taken_by(transformers, folder / CONFIG):
        config = transformers.AutoConfig.for_model(**read_json(folder / CONFIG))
    # Before so many are built.
    layers = {match[1] for name in weights if (match := re.search(r"(?:^|\.)(?:h|layer)\.(\d+)\.", name))}
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"{path} has {len(layers)} layers, {config.num_hidden_layers} by {folder / CONFIG}"
        )
    with _taken_by(transformers, folder / CONFIG):
        model, report = classes[architecture].from_pretrained(
            None,
            config=config,
            state_dict=weights,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
        )
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"{path} does not fit {folder / CONFIG}: {name} is {list(found)}, by the configuration "
            f"{list(expected)}"
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{path} has no {missing[0]} ({len(missing)} tensors are missing): it is no whole language "
            "model (of a checkpoint in shards, give the folder)"
        )
    model = model.float().eval()
    reader = hugging_face_tokenizer(tokenizer)
    masked, context = None, int(getattr(config, "max_position_embeddings", 0))
    if architecture == "roberta":
        mask = reader.token_to_id("<mask>")
        if mask is None:
            raise ValueError(f"the tokenizer of {tokenizer} has no <mask>, which a masked model needs")
        masked = (mask, config.bos_token_id, config.eos_token_id)
        for what, value in zip(("<mask>", "bos_token_id", "eos_token_id"), masked, strict=True):
            if not isinstance(value, int) or not 0 <= value < config.vocab_size:
                raise ValueError(f"{what} is {value}, not one of the model's {config.vocab_size} tokens")
        context -= (config.pad_token_id or 0) + 1  # positions are counted from there
    return Subject(
        f"{architecture}, {config.num_hidden_layers} layers",
        model,
        lambda ids: model(input_ids=ids).logits,
        model.get_input_embeddings().weight,
        model.get_output_embeddings().weight,
        context,
        lambda text: reader.encode(text, add_special_tokens=False).ids,
        masked,
    )


def _weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, of a folder's ``model.safetensors``, or of its shards, in float32."""
    tensors: dict[str, Tensor] = {}
    for file in [path] if path.is_file() else weight_files(path, (".safetensors",)):
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or not a safetensors file: {one_line(error)}") from None
    return {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}


@contextmanager
def _taken_by(transformers: Any, config: Path) -> Iterator[None]:
    """No log lines or bars of transformers: what is wrong is said in one line, as an error."""
    logs = transformers.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity(logs.CRITICAL)
    logs.disable_progress_bar()
    try:
        yield
    except Exception as error:  # what a bad config raises depends on which field is bad
        raise ValueError(f"{config} is not one that transformers takes: {one_line(error)}") from None
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()
