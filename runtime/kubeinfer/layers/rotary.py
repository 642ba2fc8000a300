"""Rotary position embedding tables (Su et al. 2021) and the ways their base is stretched."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kubeinfer.model_config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, max_positions: int, trained_positions: int) -> Tensor:
    """Cosines and sines of every position: fp32 ``[max_positions, R]``, cosines in the first half of ``R``.

    ``R`` is the rotated part of a head. ``trained_positions`` is the checkpoint's max_position_embeddings.
    """
    rotary_dim = int(head_dim * rope.partial_rotary_factor)
    inv_freq, factor = _inverse_frequencies(rope, rotary_dim, max_positions, trained_positions)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inv_freq)
    return torch.cat((angles.cos() * factor, angles.sin() * factor), dim=-1)


def _plain(theta: float, dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _inverse_frequencies(
    rope: RopeConfig, dim: int, max_positions: int, trained: int
) -> tuple[Tensor, float]:
    scaling, kind = rope.scaling, rope.scaling["rope_type"]
    if kind == "linear":
        return _plain(rope.theta, dim) / float(scaling["factor"]), 1.0
    if kind == "dynamic":
        # NTK-aware: the base grows with the length to be served. It is fixed here for the engine's max_model_len, so that
        # cached keys stay valid; within the trained length it is the plain table.
        if max_positions <= trained:
            return _plain(rope.theta, dim), 1.0
        growth = float(scaling["factor"]) * max_positions / trained - (float(scaling["factor"]) - 1)
        return _plain(rope.theta * growth ** (dim / (dim - 2)), dim), 1.0
    if kind == "llama3":
        return _llama3(_plain(rope.theta, dim), scaling), 1.0
    if kind == "yarn":
        return _yarn(rope.theta, dim, scaling, trained)
    return _plain(rope.theta, dim), 1.0


def _llama3(inv_freq: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are divided by ``factor``, short ones kept, those between blended."""
    factor, trained = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    wavelength = 2 * math.pi / inv_freq
    blend = ((trained / wavelength - low) / (high - low)).clamp(0, 1)
    return inv_freq / factor * (1 - blend) + inv_freq * blend


def _yarn(theta: float, dim: int, scaling: dict[str, Any], trained: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): interpolate slow dimensions, keep fast ones, and scale the attention."""
    factor = float(scaling["factor"])
    trained = int(scaling.get("original_max_position_embeddings") or trained)
    beta_fast, beta_slow = float(scaling.get("beta_fast") or 32), float(scaling.get("beta_slow") or 1)

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        own, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = mscale(float(own)) / mscale(float(all_dim)) if own and all_dim else mscale(1.0)

    def dimension_of(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(beta_fast), dimension_of(beta_slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    plain = _plain(theta, dim)
    return plain / factor * ramp + plain * (1 - ramp), float(attention)
