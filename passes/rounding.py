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


def corrected(w: Tensor, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The weights that give on inputs x' what w gives on x: argmin of |v x' - w x|^2.

    x' is x after the layers before were quantized. In closed form v = w + w (C - H) (H + λ)^-1,
    with λ = `ridge` times the mean of H's diagonal; Arai and Ichikawa, "Quantization Error
    Propagation", arXiv 2504.09629, where the strength of the correction is 1.

    Args:
        w: (out_features, in_features).
        gram: H, sum of x' x'^T, (in_features, in_features).
        cross: C, sum of x x'^T, (in_features, in_features).
        ridge: the larger, the nearer v stays to w.
    """
    return w + torch.linalg.solve(damped(gram, ridge), (w @ (cross - gram)).T).T


def damped(gram: Tensor, share: float) -> Tensor:
    """gram with `share` of the mean of its diagonal added to the diagonal."""
    return gram + share * gram.diag().mean().clamp(min=1e-12) * torch.eye(
        len(gram), device=gram.device
    )


def descend(
    w: Tensor, q: Tensor, qparams: tuple[Tensor, Tensor], gram: Tensor, quantizer: WeightQuantizer
) -> Tensor:
    """One sweep of coordinate descent on the output error of rounded weights.

    Column after column takes the grid's nearest value to the minimum of the error in that column,
    all others fixed, so the error never grows; Behdin et al., "QuantEase", arXiv 2309.01885.

    Args:
        w: the weights wanted, (out_features, in_features).
        q: the weights so far, all on the grid, likewise.
        qparams: scales and zero points, (out_features, groups) each.
        gram: sum of x x^T, (in_features, in_features), with a positive diagonal.
        quantizer: bits, symmetry and group size.

    Returns:
        The new weights, all on the grid.
    """
    q, n = q.clone(), w.shape[1]
    size = n // quantizer.get_num_groups(w.shape)
    slope = (q - w) @ gram  # half the error's gradient
    curvature = gram.diag().tolist()
    width = max(1, 128 // size) * size  # columns whose slopes are kept up to date
    for start in range(0, n, width):
        block = slice(start, min(start + width, n))
        before, local = q[:, block].clone(), gram[block, block]
        for j in range(before.shape[1]):
            i = start + j
            s, z = (t[:, i // size] for t in qparams)
            wanted = q[:, i] - slope[:, i] / curvature[i]
            code = ((wanted / s).round() + z).clamp(quantizer.minq, quantizer.maxq)
            new = (code - z) * s
            slope[:, block] += (new - q[:, i])[:, None] * local[j]
            q[:, i] = new
        slope[:, block.stop :] += (q[:, block] - before) @ gram[block, block.stop :]
    return q


def refit(
    w: Tensor, q: Tensor, scales: Tensor, gram: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The scales with the smallest output error for codes that stay; a row's only if they help.

    Least squares over the groups of each row: q = sum over g of s_g c_g, with c_g the codes less
    the zero point, and d/ds_g of (w - q) H (w - q)^T = 0.

    Args:
        w: the weights wanted, (out_features, in_features).
        q: the weights so far, all on the grid, likewise.
        scales: (out_features, groups).
        gram: H, sum of x x^T, (in_features, in_features).
        dtype: how scales will be stored.

    Returns:
        The new q and scales.
    """
    rows, groups = scales.shape
    codes = (q.reshape(rows, groups, -1) / scales[..., None]).round()
    target = (codes * (w @ gram).reshape_as(codes)).sum(-1)
    size = codes.shape[-1]
    normal = torch.stack(
        [
            ((codes[:, g] @ gram[g * size : (g + 1) * size]).reshape_as(codes) * codes).sum(-1)
            for g in range(groups)
        ],
        1,
    )
    diagonal = normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    normal += 1e-6 * diagonal[:, None, None] * torch.eye(groups, device=w.device)
    new = torch.linalg.solve(normal, target)
    new = torch.where((new > scales / 2) & (new < scales * 2), new, scales).to(dtype).float()
    fitted = (codes * new[..., None]).reshape_as(q)
    better = (output_error(fitted - w, gram) < output_error(q - w, gram))[:, None]
    return torch.where(better, fitted, q), torch.where(better, new, scales)
