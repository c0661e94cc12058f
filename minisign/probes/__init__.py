"""Measurements: they take a model or a tensor and return plain numbers."""

from minisign.probes.frequency import (
    frequency_groups,
    frequent_tokens,
    longest_silence,
    mean_gaps,
    rank_frequency,
    rare_tokens,
    zipf_exponent,
)
from minisign.probes.losses import loss_by_group, token_losses
from minisign.probes.memory import state_bytes
from minisign.probes.saturation import (
    NEAR,
    Saturation,
    common_mode,
    extremes,
    largest_entries,
    row_rms,
    saturated_rows,
    saturation,
    size_by_kappa,
)
from minisign.probes.speed import ratios, take_turns

__all__ = [
    "NEAR",
    "Saturation",
    "common_mode",
    "extremes",
    "frequency_groups",
    "frequent_tokens",
    "largest_entries",
    "longest_silence",
    "loss_by_group",
    "mean_gaps",
    "rank_frequency",
    "rare_tokens",
    "ratios",
    "row_rms",
    "saturated_rows",
    "saturation",
    "size_by_kappa",
    "state_bytes",
    "take_turns",
    "token_losses",
    "zipf_exponent",
]
