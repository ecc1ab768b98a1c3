"""`passes.packed.dequantize` as one Triton kernel: bytes are read once, weights written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # weights of a row that a program makes


def dequantize(
    qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    """The same arguments, and the same bits."""
    rows, groups = scales.shape
    columns = qweight.shape[1] * 8 // bits
    out = torch.empty(rows, columns, device=qweight.device, dtype=dtype)
    zeros = qweight if qzeros is None else qzeros
    grid = (rows, triton.cdiv(columns, BLOCK))
    _kernel[grid](
        qweight, scales, zeros, out, columns, groups, zeros.shape[1],
        qzeros is not None, bits, columns // groups, BLOCK,
    )  # fmt: skip
    return out


@triton.jit
def _kernel(  # noqa: PLR0917
    qweight, scales, qzeros, out, columns, groups, zeros_stride,
    HAS_ZEROS: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    per_byte: tl.constexpr = 8 // BITS
    most: tl.constexpr = (1 << BITS) - 1
    byte = tl.load(qweight + row * (columns // per_byte) + column // per_byte, inside, 0)
    code = (byte.to(tl.int32) >> (column % per_byte * BITS)) & most
    group = column // SIZE
    scale = tl.load(scales + row * groups + group, inside, 0)
    zero = 1 << (BITS - 1)
    if HAS_ZEROS:
        byte = tl.load(qzeros + row * zeros_stride + group // per_byte, inside, 0)
        zero = (byte.to(tl.int32) >> (group % per_byte * BITS)) & most
    # Rounded to the scales' type first, as the product of two tensors is.
    value = ((code - zero).to(tl.float32) * scale.to(tl.float32)).to(scale.dtype)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), inside)
