"""Measurements: they take a model or a tensor and return plain numbers."""

from minisign.probes.blocks import Blocks, default_blocks, layer_blocks, layer_names, tensor_blocks
from minisign.probes.curvature import Curvature, block_curvatures, gradient_weighted, size_weighted
from minisign.probes.frequency import (
    equal_share_groups,
    frequency_groups,
    frequent_tokens,
    longest_silence,
    mean_gaps,
    rank_frequency,
    rare_tokens,
    zipf_exponent,
)
from minisign.probes.gradients import GradientNorms, GradientWatch, disparity, gradient_norms
from minisign.probes.heterogeneity import heterogeneity
from minisign.probes.losses import loss_by_group, token_losses, unigram_loss
from minisign.probes.memory import PeakMemory, Traffic, state_bytes
from minisign.probes.saturation import (
    NEAR,
    Saturation,
    common_mode,
    extremes,
    head_size,
    largest_entries,
    row_rms,
    saturated_rows,
    saturation,
    size_by_kappa,
)
from minisign.probes.speed import ratios, take_turns
from minisign.probes.update_watch import EDGES, UpdateFigures, UpdateWatch, update_figures
from minisign.probes.updates import (
    BEYOND,
    Update,
    coming_update,
    coming_updates,
    descent_cosine,
    update_kind,
)

__all__ = [
    "BEYOND",
    "EDGES",
    "NEAR",
    "Blocks",
    "Curvature",
    "GradientNorms",
    "GradientWatch",
    "PeakMemory",
    "Saturation",
    "Traffic",
    "Update",
    "UpdateFigures",
    "UpdateWatch",
    "block_curvatures",
    "coming_update",
    "coming_updates",
    "common_mode",
    "default_blocks",
    "descent_cosine",
    "disparity",
    "equal_share_groups",
    "extremes",
    "frequency_groups",
    "frequent_tokens",
    "gradient_norms",
    "gradient_weighted",
    "head_size",
    "heterogeneity",
    "largest_entries",
    "layer_blocks",
    "layer_names",
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
    "size_weighted",
    "state_bytes",
    "take_turns",
    "tensor_blocks",
    "token_losses",
    "unigram_loss",
    "update_figures",
    "update_kind",
    "zipf_exponent",
]
