"""A linear layer of packed weights with a LoRA adapter, and what its training keeps in memory.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3; over
frozen quantized weights as in QLoRA, arXiv 2305.14314, equation 5.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from olive.common.quant.nn import QuantLinear
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from passes.packed import dequantize, weights

Weights = Callable[[Tensor], Tensor]  # W in the type of the tensor that it is given


class LoraQuantLinear(nn.Module, LoraLayer):
    """y = W x + b + (alpha / r) B A dropout(x), where W is quantized and frozen.

    A gradient flows to x, A and B only. A and B are float32 and computed with in the type of x, so
    that the backward pass has one x to keep. One adapter is active at a time.
    """

    def __init__(
        self,
        base_layer: QuantLinear,
        adapter_name: str,
        config: LoraConfig,
        r: int,
        lora_alpha: int,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.unpacked: Any = None  # W in floats
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.cols, module.rows  # PEFT asks, and knows only its own kinds of linear

    def unpack(self) -> None:
        """Keep W as floats, made once."""
        base: Any = self.get_base_layer()
        self.unpacked = dequantize(
            base.qweight, base.scales, base.qzeros, base.quantizer.bits, base.scales.dtype
        )

    def weights(self, like: Tensor) -> Tensor:
        """W, (out_features, in_features) in the type of `like`."""
        if self.unpacked is not None:
            return self.unpacked
        base: Any = self.get_base_layer()
        return weights(like, (base.qweight, base.scales, base.qzeros, base.quantizer.bits))

    def forward(self, x: Tensor) -> Tensor:
        bias: Any = self.get_base_layer().bias
        if self.disable_adapters:
            return linear(x, self.weights(x), bias)
        (name,) = self.active_adapters
        parts: list[Any] = [self.lora_A[name], self.lora_B[name]]
        a, b = (part.weight.to(x.dtype) for part in parts)
        dropout: Any = self.lora_dropout[name]
        dropped = None if isinstance(dropout, nn.Identity) else dropout(x)
        return AdaptedLinear.apply(x, dropped, a, b, bias, self.scaling[name], self.weights)


class AdaptedLinear(torch.autograd.Function):
    """y = x W^T + b + h B^T with h = s x' A^T, of which W and b are frozen; x' is x after dropout.

    With the gradient g of y and u = s g B:

        dx = g W    dx' = u A    dA = u^T x'    dB = g^T h

    Autograd would keep W, in floats, for the first of these; here it is unpacked again. Shapes: x
    and x' (..., in_features), where None for x' means x; A (r, in_features); B (out_features, r);
    y (..., out_features).
    """

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor,
        bias: Tensor | None, scaling: float, w: Weights,
    ) -> Tensor:  # fmt: skip
        source = (x if dropped is None else dropped).flatten(0, -2)
        h = (source @ a.T) * scaling

        def product() -> Tensor:
            y = linear(x.flatten(0, -2), w(x), bias)
            return y.addmm_(h, b.T).unflatten(0, x.shape[:-1])

        ctx.save_for_backward(source, h, a, b)
        ctx.whole, ctx.scaling, ctx.w = dropped is None, scaling, w
        return kept(product)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        source, h, a, b = ctx.saved_tensors
        shape = grads[0].shape[:-1]
        g = grads[0].flatten(0, -2)
        update = (g @ b) * ctx.scaling
        to_a = update.T @ source
        to_b = g.T @ h
        to_x = g @ ctx.w(g)
        if ctx.whole:
            to_x, to_dropped = to_x.addmm_(update, a), None
        else:
            to_dropped = (update @ a).unflatten(0, shape)
        return to_x.unflatten(0, shape), to_dropped, to_a, to_b, None, None, None


class Tape:
    """The results of a layer's products, in order: kept at first, given out when it runs again."""

    def __init__(self) -> None:
        self.results: deque[tuple[Tensor, int]] = deque()
        self.again = False

    def __call__(self, product: Callable[[], Tensor]) -> Tensor:
        if not self.again:
            y = product()
            self.results.append((y.detach(), y._version))
            return y
        y, version = self.results.popleft()
        if y._version != version:
            raise RuntimeError("a layer has written over the result of a product")
        return y


_tape: ContextVar[Tape | None] = ContextVar("tape", default=None)


def kept(product: Callable[[], Tensor]) -> Tensor:
    """The result of a product, from the tape if the layer runs again."""
    tape = _tape.get()
    return product() if tape is None else tape(product)


@contextmanager
def playing(tape: Tape, again: bool) -> Iterator[None]:
    tape.again = again
    before = _tape.set(tape)
    try:
        yield
    finally:
        _tape.reset(before)


def both_passes() -> tuple[AbstractContextManager, AbstractContextManager]:
    """What `torch.utils.checkpoint.checkpoint` runs a layer in, and runs it in again."""
    tape = Tape()
    return playing(tape, again=False), playing(tape, again=True)


def keep_products_alone(model: PeftModel) -> None:
    """Keep of each layer its input and the results of its products with packed weights.

    All else that a layer computes (norms, rotations, attention, activation functions) takes few
    operations for each byte that it writes: it is made again in the backward pass, while the
    products, nearly all of the arithmetic, are not. Gradients are the same to the bit. A model
    that transformers cannot checkpoint, or whose weights are not packed, keeps everything.
    """
    packed = any(isinstance(module, LoraQuantLinear) for module in model.modules())
    if packed and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": both_passes})
