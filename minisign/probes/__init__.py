"""Measurements: they take a model or a tensor and return plain numbers."""

from minisign.probes.saturation import (
    Saturation,
    extremes,
    frequent_tokens,
    rare_tokens,
    row_rms,
    saturation,
)

__all__ = [
    "Saturation",
    "extremes",
    "frequent_tokens",
    "rare_tokens",
    "row_rms",
    "saturation",
]
