"""Packed weights: Olive's numbers."""

import pytest
import torch
from olive.common.quant.nn import QuantLinear
from torch import nn

from passes.packed import dequantize, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def packed(bits: int, symmetric: bool, dtype: torch.dtype, in_features: int = 96) -> QuantLinear:
    torch.manual_seed(0)
    float_linear = nn.Linear(in_features, 40, bias=False, dtype=dtype)
    return QuantLinear.from_module(float_linear, bits=bits, symmetric=symmetric, group_size=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_olives_to_the_bit(bits, symmetric, dtype):
    layer = packed(bits, symmetric, dtype)  # 3 groups: the last byte of zero points is not full
    expected = layer.unpack_and_dequantize(layer.qweight, layer.scales, layer.qzeros)
    found = dequantize(layer.qweight, layer.scales, layer.qzeros, bits, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the kernel is for a GPU, and there is none"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_kernel_gives_the_same_bits(bits, symmetric, dtype):
    layer = packed(bits, symmetric, dtype, in_features=1056).to("cuda")  # more than one block
    parts = (layer.qweight, layer.scales, layer.qzeros, bits)
    assert torch.equal(weights(layer.scales, parts), dequantize(*parts, dtype))
