"""The table of cosines and sines that ``kvcache_ops.rotary_embedding`` reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import LlamaConfig, RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """fp32 ``[head_dim / 2]``, radians a position.

    ``linear`` divides all of them by the factor (position interpolation, arXiv:2306.15595).
    ``llama3`` divides those whose wavelength is beyond the context of the first training, leaves
    the short ones, and blends in between (the Llama 3.1 release).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling.rope_type == "default":
        return frequencies
    slowed = frequencies / scaling.factor
    if scaling.rope_type == "linear":
        return slowed
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return torch.lerp(slowed, frequencies, keep)


def cos_sin_table(config: LlamaConfig, length: int, device: torch.device) -> Tensor:
    """fp32 ``[length, head_dim]``: the cosines of a position, then its sines."""
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
