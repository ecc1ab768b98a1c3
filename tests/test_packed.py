"""Packed weights: Olive's numbers, and a gradient without a copy of them kept."""

import pytest
import torch
from olive.common.quant.nn import QuantLinear
from torch import nn

from passes.packed import dequantize, packed_linear

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


def test_operator_obeys_the_rules_of_pytorch():
    layer = packed(4, False, torch.float32)
    x = torch.randn(2, 5, 96, requires_grad=True)
    torch.library.opcheck(packed_linear, (x, layer.qweight, layer.scales, layer.qzeros, 4))


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradient_is_that_of_the_float_layer_and_no_weight_is_kept(symmetric):
    layer = packed(4, symmetric, torch.float32)
    w = layer.unpack_and_dequantize(layer.qweight, layer.scales, layer.qzeros)
    x = torch.randn(7, 96, requires_grad=True)
    kept: list[tuple[int, torch.dtype]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append((tensor.numel(), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = packed_linear(x, layer.qweight, layer.scales, layer.qzeros, 4)
    torch.testing.assert_close(y, x @ w.T)
    weights = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(gradient, weights @ w)
    assert kept, "the operator must keep what it needs"
    assert all(size < w.numel() for size, _ in kept)
