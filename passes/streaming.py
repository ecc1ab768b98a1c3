"""Olive's ModelBuilder, one weight at a time: read, converted and written when its turn comes."""

from __future__ import annotations

import copy
import gc
import importlib
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from olive.model import ONNXModelHandler
from olive.passes.onnx.model_builder import ModelBuilder
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype, to_torch_dtype
from torch import Tensor


class StreamingModelBuilder(ModelBuilder):
    """Writes the same bytes as Olive's pass, and holds the largest weight instead of all of them.

    Olive maps the checkpoint's files into memory and onnxruntime-genai's builder describes the
    graph before it writes. Between the two, three of the builder's methods copy weights and keep
    the copies; these are replaced here, where Olive replaces others. So is a fourth, which writes
    weights that are wrong.
    """

    @staticmethod
    def maybe_patch_quant() -> None:
        ModelBuilder.maybe_patch_quant()
        builder = importlib.import_module("onnxruntime_genai.models.builder").Model
        builder.make_initializer = make_initializer
        builder.make_packed_matmul_int4 = make_packed_matmul_int4
        if builder.to_int4 is not to_int4:
            builder.to_int4_of_all, builder.to_int4 = builder.to_int4, to_int4
            builder.make_dequantize_linear_of_signed = builder.make_dequantize_linear
            builder.make_dequantize_linear = make_dequantize_linear

    def _run_for_config(self, *args: Any) -> ONNXModelHandler:
        model = super()._run_for_config(*args)
        gc.collect()  # the builder's graph refers to itself: 0.7 GB at 3.8e9 weights
        return model


@dataclass
class Rows:
    """Tensors one below the other, put together only when they are written."""

    parts: list[Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(len(part) for part in self.parts), *self.parts[0].shape[1:])

    def to(self, dtype: torch.dtype, **kwargs: Any) -> Tensor:
        return torch.cat(self.parts).to(dtype, **kwargs)


def make_initializer(self: Any, tensor: Any, /, name: str, to: ir.DataType | None = None) -> None:
    """Add a weight that is converted when it is written; the builder's own keeps what it made."""
    weight: ir.TensorProtocol
    if isinstance(tensor, Tensor | Rows):
        weight = lazy(tensor, name, to)
    else:
        weight = ir.tensor(tensor, name=name)
    value = self.make_value(name, weight.dtype, weight.shape)
    value.const_value = weight
    self.model.graph.register_initializer(value)


def lazy(tensor: Tensor | Rows, name: str, to: ir.DataType | None) -> ir.LazyTensor:
    """A weight of the graph that is made anew each time it is asked for."""
    dtype = tensor.dtype if to is None else to_torch_dtype(to)

    def make() -> TorchTensor:
        return TorchTensor(tensor.to(dtype, memory_format=torch.contiguous_format), name=name)

    return ir.LazyTensor(make, from_torch_dtype(dtype), ir.Shape(tensor.shape), name=name)


def make_packed_matmul_int4(self: Any, q: Any, k: Any, v: Any, *names: str, **kwargs: Any) -> str:
    """One MatMulNBits for q, k and v; Olive's own copies their weights."""
    if not hasattr(q, "qweight"):
        return self.make_packed_matmul_float(q, k, v, *names, **kwargs)
    if len({(part.bits, part.group_size) for part in (q, k, v)}) > 1:
        raise ValueError(f"{names[0]}: q, k and v differ in bits or group size")
    packed = copy.copy(q)
    packed.out_features = q.out_features + k.out_features + v.out_features
    for kind in ("qweight", "scales", "qzeros"):
        if getattr(q, kind) is not None:
            setattr(packed, kind, Rows([getattr(part, kind) for part in (q, k, v)]))
    return self.make_matmul_int4(packed, *names, **kwargs)


def make_dequantize_linear(self: Any, name: str, op: Any) -> str:
    """Weights for DequantizeLinear: INT4, which is signed.

    Olive's checkpoints hold numbers from 0 to 15, around 8 or a zero point, as MatMulNBits reads
    them; the builder writes the bits as they are. Less 8 is the highest bit flipped.
    """
    signed = copy.copy(op)
    for kind in ("qweight", "qzeros"):
        if getattr(op, kind, None) is not None:
            setattr(signed, kind, getattr(op, kind) ^ 0x88)  # two numbers in a byte
    return self.make_dequantize_linear_of_signed(name, signed)


def to_int4(self: Any) -> ir.Model:
    """Quantize what is left to quantize, which is the head or nothing.

    The quantizer reads and returns the whole model as one message. It gets the place of a weight
    instead of the weight, but for those that it quantizes.
    """
    exclude = self.quant_attrs["int4"]["nodes_to_exclude"]
    quantized = {
        node.inputs[1].name
        for node in self.model.graph
        if node.op_type == "MatMul" and node.name not in exclude
    }
    weights = {
        name: value.const_value
        for name, value in self.model.graph.initializers.items()
        if name not in quantized
    }
    for name, weight in weights.items():
        self.model.graph.initializers[name].const_value = ir.ExternalTensor(
            "", 0, weight.nbytes, weight.dtype, shape=weight.shape, name=name
        )
    model = self.to_int4_of_all()
    for name, value in model.graph.initializers.items():
        if name in weights:
            value.const_value = weights[name]
    return model
