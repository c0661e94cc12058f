"""What is compared: the variants of the main job, the fixes, and the lessons' smaller model of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from minisign.lab.config import Config

FORMS = ("rms", "base")

# What each form changes: nothing, Tiger by its author's rule; or one η for all. Where the bound is 1, the
# embedding starts small, so that nothing is near the bound at the start.
_FORM: dict[str, dict[str, Any]] = {
    "rms": {},
    "base": {"scale": 1.0, "lr": 3e-3, "weight_decay": 1.0, "embedding_std": 0.02},
}
# What each variant changes against plain Tiger. The rate, the decay and the initial embedding of another
# optimizer or tie are its own, not plain Tiger's.
VARIANTS: dict[str, dict[str, Any]] = {
    "tiger": {},
    "lion": {"optimizer": "lion", "lr": 3e-3, "weight_decay": 1.0, "embedding_std": 0.02},
    "lazy": {"lazy": "ids"},
    "tied": {"tie": "tied"},
    "half_swap": {"tie": "half_swap"},
    "hybrid": {"embedding_optimizer": "adamw"},
    "adamw": {"optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.01},
}
STEPS, DECAY = 1500, 0.5


def base_config(text: Sequence[str] = (), steps: int = STEPS, seed: int = 0) -> Config:
    """What all variants have in common. Not ``fused``: under Tiger and AdamW the last bit would depend on
    whether there is a compiler, and with it the table."""
    return Config(text=tuple(text), steps=steps, seed=seed, decay=DECAY)


def lesson_config(seed: int = 0) -> Config:
    """The main job's little sister: a model that a notebook trains in a quarter of a minute."""
    return Config(
        vocab_size=3072, width=32, context=16, steps=900, lr=1.6e-2, weight_decay=0.01, decay=0.4, seed=seed
    )


def settled_config(seed: int = 0) -> Config:
    """The lessons' model under Lion at a constant rate, for so long (Σηλ = 9) that rows have settled."""
    return dataclasses.replace(variant_config(lesson_config(seed), "lion", "base"), lr=1e-2, decay=0.0)


def variant_config(base: Config, variant: str, form: str = "rms") -> Config:
    """The configuration of a variant.

    Raises:
        ValueError: an unknown variant or form.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose from {', '.join(VARIANTS)}")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}: choose from {', '.join(FORMS)}")
    changes = {**_FORM[form], **VARIANTS[variant]}
    if {"optimizer", "tie"} & set(changes):
        changes = {"betas": None, "embedding_std": None, **changes}
    return dataclasses.replace(base, **changes)


# The fixes that `experiments/fixes.py` compares. By label: the variant, the form, and what else changes.
FIXES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tiger": ("tiger", "rms", {}),
    "lazy": ("lazy", "rms", {}),
    "tied": ("tied", "rms", {}),
    "half_swap": ("half_swap", "rms", {}),
    "half_swap, centered": ("half_swap", "rms", {"head": "centered"}),
    "hybrid": ("hybrid", "rms", {}),
    "adamw": ("adamw", "rms", {}),
    "lion": ("lion", "base", {}),
    "lion, lazy": ("lion", "base", {"lazy": "ids"}),
    "lion, half_swap, centered": ("lion", "base", {"tie": "half_swap", "head": "centered"}),
    "lion, hybrid": ("lion", "base", {"embedding_optimizer": "adamw"}),
}


def fix_config(base: Config, label: str) -> Config:
    """The configuration of a fix, with a vocabulary learned from both languages in equal parts: the one
    that 1 % of the second language gives spells its words with tokens of the first, and leaves little to
    fine-tune.

    Raises:
        ValueError: an unknown fix.
    """
    if label not in FIXES:
        raise ValueError(f"unknown fix {label!r}: choose from {', '.join(FIXES)}")
    variant, form, changes = FIXES[label]
    return dataclasses.replace(variant_config(base, variant, form), vocab_rare_share=0.5, **changes)
