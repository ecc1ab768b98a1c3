"""Floats from the packed codes of Olive's quantized linears: on a GPU in one kernel."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

TRITON = find_spec("triton") is not None  # comes with PyTorch for CUDA, but for Windows


def dequantize(
    qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    """The weights of an Olive `QuantLinear`, to the bit what its own unpacking gives.

    Args:
        qweight: (out_features, in_features * bits / 8) uint8, the first code in the lowest bits.
        scales: (out_features, groups), floating.
        qzeros: zero points, (out_features, groups * bits / 8 rounded up) uint8; None for the middle
            of the range.
        bits: of a code.
        dtype: of the result.

    Returns:
        (out_features, in_features).
    """
    rows, groups = scales.shape
    codes = unpack(qweight, bits).reshape(rows, groups, -1)
    if qzeros is None:
        zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.int16)
    else:
        zeros = unpack(qzeros, bits)[:, :groups]
    return ((codes - zeros[..., None]) * scales[..., None]).reshape(rows, -1).to(dtype)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """(rows, n) uint8 to (rows, n * 8 / bits) int16."""
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    codes = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.reshape(len(packed), -1).to(torch.int16)


def weights(like: Tensor, parts: tuple[Tensor, Tensor, Tensor | None, int]) -> Tensor:
    """`dequantize` on the device and in the type of `like`; parts are its first arguments."""
    if like.is_cuda and TRITON:
        from passes.packed_triton import dequantize as in_one_kernel

        return in_one_kernel(*parts, like.dtype)
    return dequantize(*parts, like.dtype)
