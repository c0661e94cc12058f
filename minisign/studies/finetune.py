"""Fine-tuning on the corpus's second language: what rare tokens' embeddings are worth when they come to be
needed, the first of the two reasons that kexue.fm/archives/9736 gives for caring about them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from minisign.lab.config import Config
from minisign.lab.corpus import generate
from minisign.lab.tokenizer import Tokens, tokenize
from minisign.lab.train import Run, train

WORDS = 60_000


def second_language(config: Config, tokens: Tokens) -> Tokens:
    """Text in the rare language alone, in the vocabulary that ``config``'s text has given: the same words
    as in that text, since the lexicon follows from the corpus's seed, in other documents.

    Raises:
        ValueError: ``config`` trains on files, which have no second language that we know of.
    """
    if config.text:
        raise ValueError(f"the text {', '.join(config.text)} has no second language to fine-tune on")
    corpus = dataclasses.replace(config.corpus, words=WORDS, rare_share=1.0)
    return tokenize(generate(corpus), tokens.encoding, config.context)


def fine_tune(
    run: Run,
    tokens: Tokens,
    steps: int = 400,
    lr: float = 1e-3,
    callback: Callable[[Run], object] | None = None,
    every: int = 50,
) -> Run:
    """A copy of a trained model, trained on another text with AdamW without weight decay.

    AdamW for all, so that what differs is the model that it starts from. The rate rises over a tenth of
    the steps and falls linearly to 0 from there on.

    Args:
        run: whose model to start from; left as it is.
        tokens: the other text, in the same vocabulary.
        callback, every: as for :func:`minisign.lab.train.train`.

    Raises:
        ValueError: a vocabulary of another size.
    """
    if tokens.vocab_size != run.tokens.vocab_size:
        raise ValueError(
            f"the model has {run.tokens.vocab_size} tokens, the text to fine-tune on {tokens.vocab_size}"
        )
    adamw = Config(optimizer="adamw", lr=lr, weight_decay=0.0)
    same = {name: getattr(adamw, name) for name in OPTIMIZER_FIELDS}
    config = dataclasses.replace(run.config, **same, steps=steps, warmup=steps // 10, decay=0.9)
    tuned = Run(config, tokens, run.device)
    tuned.model.load_state_dict(run.model.state_dict())
    return train(tuned, callback, every)


# What in a Config belongs to the optimizer, and so is not the model's.
OPTIMIZER_FIELDS = (
    "optimizer",
    "lr",
    "weight_decay",
    "betas",
    "scale",
    "embedding_scale",
    "accumulate",
    "shrink",
    "lazy",
    "lazy_momentum",
    "embedding_optimizer",
)
