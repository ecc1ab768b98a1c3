"""y = x W^T with Olive's packed W, which is made when it is needed and kept neither time.

A linear layer whose weights are frozen needs W in the backward pass too, and autograd would keep
the one of the forward pass: as many bytes as the model has in floats. Here both passes unpack it.
On a GPU the unpacking is one kernel. The product is an operator of PyTorch's
(https://docs.pytorch.org/docs/stable/library.html), so that a compiled model may call it too.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

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


def weight(x: Tensor, parts: tuple[Tensor, Tensor, Tensor | None, int]) -> Tensor:
    """W, in the type of x."""
    if x.is_cuda and TRITON:
        from passes.packed_triton import dequantize as in_one_kernel

        return in_one_kernel(*parts, x.dtype)
    return dequantize(*parts, x.dtype)


@torch.library.custom_op("olivepress::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bits: int
) -> Tensor:
    """x (..., in_features) to (..., out_features) in the type of x; the rest as `dequantize`."""
    return linear(x, weight(x, (qweight, scales, qzeros, bits)))


@packed_linear.register_fake
def _(x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@torch.library.custom_op("olivepress::packed_linear_grad", mutates_args=())
def packed_linear_grad(
    grad: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bits: int
) -> Tensor:
    """The gradient of x from that of y."""
    return grad @ weight(grad, (qweight, scales, qzeros, bits))


@packed_linear_grad.register_fake
def _(grad: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bits: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], qweight.shape[1] * 8 // bits)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, qweight, scales, qzeros, bits = inputs
    ctx.save_for_backward(qweight, scales, qzeros)
    ctx.bits = bits


def _backward(ctx: Any, grad: Tensor) -> tuple:
    return packed_linear_grad(grad, *ctx.saved_tensors, ctx.bits), None, None, None, None


packed_linear.register_autograd(_backward, setup_context=_keep)
