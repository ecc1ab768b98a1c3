"""Rounding weights to a grid, and the error that it makes in a linear's output."""

from __future__ import annotations

import torch
from olive.common.quant.utils import WeightQuantizer
from torch import Tensor, nn


def quantizer_of(linear: nn.Linear) -> WeightQuantizer:
    """The bits, group size and symmetry that Olive's `prepare_model` gave a linear."""
    return linear.quant_info.quantizer  # type: ignore[union-attr, return-value]


def output_error(delta: Tensor, gram: Tensor) -> Tensor:
    """Squared error of each output of a linear, summed over the calibration tokens.

    Args:
        delta: change of the weights, (out_features, in_features).
        gram: sum of x x^T, (in_features, in_features).
    """
    return (delta @ gram * delta).sum(1)


def relative_magnitude(linear: nn.Linear) -> Tensor:
    """Mean over the rows of |w| over the largest |w| in its quantization group, (in_features,)."""
    w = linear.weight.data.abs()
    groups = w.reshape(len(w), quantizer_of(linear).get_num_groups(w.shape), -1)
    return (
        (groups / groups.amax(-1, keepdim=True).clamp(min=1e-6)).mean(0).flatten().clamp(min=1e-4)
    )


def clip(w: Tensor, gram: Tensor, quantizer: WeightQuantizer, grid: int) -> tuple[Tensor, Tensor]:
    """For each group, the scale and zero point of the range with the smallest output error.

    The range of a group's weights is shrunk in `grid` steps from all of it to half of it.

    Returns:
        scales float32 and zero points int32, both (out_features, groups).
    """
    n = quantizer.get_num_groups(w.shape)
    groups = w.reshape(len(w), n, -1)
    low, high = groups.amin(-1), groups.amax(-1)
    size = groups.shape[-1]
    grams = torch.stack([gram[i : i + size, i : i + size] for i in range(0, n * size, size)])
    scales, zero_points = find_qparams(low, high, quantizer)
    least = torch.full_like(scales, torch.inf)
    for shrink in torch.linspace(1, 0.5, grid + 1).tolist():
        s, z = find_qparams(low * shrink, high * shrink, quantizer)
        delta = (fake_quantize(groups, s, z, quantizer) - groups).transpose(0, 1)
        error = (delta @ grams * delta).sum(-1).T
        better = error < least
        scales, zero_points = torch.where(better, s, scales), torch.where(better, z, zero_points)
        least = torch.where(better, error, least)
    return scales, zero_points


def find_qparams(low: Tensor, high: Tensor, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """`WeightQuantizer.find_qparams`, from the least and largest weight of each group."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if quantizer.symmetric:
        high = torch.maximum(-low, high)
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
    scales = (high - low) / (quantizer.maxq - quantizer.minq)
    if quantizer.symmetric:
        return scales, torch.full_like(scales, quantizer.midq)
    return scales, (quantizer.minq - low / scales).round().clamp(quantizer.minq, quantizer.maxq)


def fake_quantize(
    groups: Tensor, scales: Tensor, zero_points: Tensor, quantizer: WeightQuantizer
) -> Tensor:
    """`WeightQuantizer.fake_quantize` in a third of the time, and the same bits."""
    s, z = scales[..., None], zero_points[..., None]
    return (groups / s).add_(z).round_().clamp_(quantizer.minq, quantizer.maxq).sub_(z).mul_(s)


def rounded(w: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """w rounded to nearest in the whole range of each group, (out_features, in_features)."""
    groups = w.reshape(len(w), quantizer.get_num_groups(w.shape), -1)
    qparams = find_qparams(groups.amin(-1), groups.amax(-1), quantizer)
    return fake_quantize(groups, *qparams, quantizer).reshape_as(w)
