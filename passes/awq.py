"""AWQ as an Olive pass: activation-aware scales, weight clipping, Olive's quantized format.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
arXiv 2306.00978, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from olive.common.hf.wrapper import LayerWrapper, ModelWrapper
from olive.common.quant.nn import QuantLinear
from olive.data.config import DataConfig
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from olive.passes.pytorch.quant_utils import (
    finalize,
    get_layer_inputs_for_calibration,
    get_quantizer_config,
    prepare_model,
    run_layer,
)
from torch import Tensor, nn

from passes.folding import Fold, candidates, leaves_unchanged, query_key_rows, restored
from passes.rounding import clip, output_error, quantizer_of, relative_magnitude, rounded


@dataclass
class Activations:
    """What the calibration tokens say about the input of a linear."""

    gram: Tensor
    """Sum of x x^T, (in_features, in_features) float32."""
    magnitude: Tensor
    """Sum of |x|, (in_features,) float32."""
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        self.gram.addmm_(x.T, x)
        self.magnitude += x.abs().sum(0)
        self.tokens += len(x)

    def scale(self, s: Tensor) -> None:
        """The input is divided by s from now on."""
        self.gram /= s[:, None] * s
        self.magnitude /= s


@dataclass
class Calls:
    """The first calls of a block, to be made again with other weights."""

    max_tokens: int
    inputs: list[tuple[tuple, dict]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    def add(self, args: tuple, kwargs: dict, output: Any) -> None:
        if self.tokens < self.max_tokens:
            self.inputs.append((args, kwargs))
            self.outputs.append(first(output))
            self.tokens += self.outputs[-1][..., 0].numel()

    def error(self, block: nn.Module) -> float:
        """Sum of squared differences from the recorded outputs."""
        calls = zip(self.inputs, self.outputs, strict=True)
        return sum(float((first(block(*a, **k)) - y).square().sum()) for (a, k), y in calls)


def first(output: Any) -> Tensor:
    """The hidden states among what a block returns."""
    return output[0] if isinstance(output, tuple) else output


class Awq(Pass):
    """Activation-aware weight quantization of the blocks' linear layers to `QuantLinear`.

    Works on any decoder that Olive's ModelWrapper knows, on CPU and CUDA, a layer at a time, and is
    deterministic. Set `progress` to be called as progress(layers done, layers, note).
    """

    progress: Callable[[int, int, str], None] = staticmethod(lambda done, total, note: None)

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        def param(type_: Any, default: Any, description: str) -> PassConfigParam:
            return PassConfigParam(type_=type_, default_value=default, description=description)

        return {
            **get_quantizer_config(),
            "data_config": PassConfigParam(
                type_=DataConfig | dict, required=True, description="Calibration tokens."
            ),
            "grid": param(int, 10, "Steps of alpha in s = s_X^alpha, from 0 to 1."),
            "duo": param(bool, True, "Also try s = s_X^alpha / s_W^(1 - alpha)."),
            "clip_grid": param(int, 10, "Steps of the weight range, from all of it to half."),
            "search_tokens": param(int, 512, "Calibration tokens on which a block is compared."),
        }

    @torch.no_grad()
    def _run_for_config(
        self, model: HfModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> HfModelHandler:
        """Quantize `model` and write it.

        Raises:
            ValueError: the model is already quantized, or the calibration data is empty.
        """
        wrapper, qcfg, _ = prepare_model(model, config)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        wrapper.model.config.use_cache, use_cache = False, wrapper.model.config.use_cache
        states, args, kwargs = get_layer_inputs_for_calibration(
            model, wrapper, config.data_config, device
        )
        if not states:
            raise ValueError("no calibration tokens")
        states, args, kwargs = in_float32((states, args, kwargs))
        layers = wrapper.get_layer_wrappers()
        for done, layer in enumerate(layers):
            self.progress(done, len(layers), "layers quantized")
            states = self._quantize_layer(wrapper, layer, states, args, kwargs)
        self.progress(len(layers), len(layers), "layers quantized")
        wrapper.model.config.use_cache = use_cache
        # Olive would load every embedding but the tokens' as a quantized one.
        qcfg.modules_to_not_convert = [
            name
            for name, module in wrapper.model.named_modules()
            if isinstance(module, nn.Embedding)
            and module is not wrapper.model.get_input_embeddings()
        ] or None
        return finalize(model, output_model_path, wrapper, qcfg, device)

    def _quantize_layer(
        self,
        wrapper: ModelWrapper,
        layer: LayerWrapper,
        states: list[Tensor],
        args: list[tuple],
        kwargs: list[dict],
    ) -> list[Tensor]:
        """Replace the layer's linears by QuantLinear; return the outputs it had before."""
        module = layer.layer
        dtype = next(module.parameters()).dtype
        module.float().to(states[0].device)
        linears = {n: m for n, m in module.named_modules() if hasattr(m, "quant_info")}

        def run() -> Tensor:
            return first(module(states[0], *args[0], **kwargs[0]))

        folds = []
        expected = run()
        for choices in candidates(wrapper, layer):
            folds += [f for f in choices if leaves_unchanged(f, expected, run, dtype)][:1]
        together = {linear for f in folds for linear in f.linears}
        readers = [f.linears for f in folds] + [[m] for m in linears.values() if m not in together]
        blocks = {f.block for f in folds} - set(linears.values())
        with watched(readers, blocks, self.config.search_tokens) as (inputs, calls):
            outputs = run_layer(module, states, args, kwargs, return_output=True)
        module.to(states[0].device)
        for fold in folds:
            x = inputs[fold.linears[0]]
            x.scale(fold.apply(self._search_scale(fold, x, calls.get(fold.block)), dtype))
        unclipped = query_key_rows(wrapper, layer)
        for name, linear in linears.items():
            keep = unclipped.get(linear, slice(0))
            module.set_submodule(name, self._round(linear, inputs[linear], keep, dtype))
        module.to("cpu", dtype)
        return outputs

    def _search_scale(self, fold: Fold, x: Activations, calls: Calls | None) -> Tensor:
        """The s with the smallest error of the block's output (equation 4); ones if none helps."""
        weights = [linear.weight.data.clone() for linear in fold.linears]
        s_x = fold.tie(x.magnitude / x.tokens).clamp(min=1e-4)
        s_w = fold.tie(torch.stack([relative_magnitude(m) for m in fold.linears]).mean(0))
        alphas = torch.linspace(0, 1, self.config.grid + 1).tolist()
        choices = [torch.ones_like(s_x), *(s_x**a for a in alphas[1:])]
        if self.config.duo:
            choices += [s_x**a / s_w ** (1 - a) for a in alphas]
        choices = [s / (s.max() * s.min()).sqrt() for s in choices]
        best, least = choices[0], torch.inf
        with restored(fold.linears):
            for s in choices:
                for linear, w in zip(fold.linears, weights, strict=True):
                    linear.weight.data = rounded(w * s, quantizer_of(linear)) / s
                if calls is not None:
                    error = calls.error(fold.block)
                else:
                    delta = fold.linears[0].weight.data - weights[0]
                    error = float(output_error(delta, x.gram).sum())
                if error < least:
                    best, least = s, error
        return best

    def _round(
        self, linear: nn.Linear, x: Activations, unclipped: slice, dtype: torch.dtype
    ) -> QuantLinear:
        """Round the weights in the ranges that give the linear the smallest output error."""
        quantizer = quantizer_of(linear)
        w = linear.weight.data
        plain = quantizer.find_qparams(w)
        clipped = clip(w, x.gram, quantizer, self.config.clip_grid)
        # Codes are chosen for the scales as they will be stored.
        plain, clipped = ((s.to(dtype).float(), z) for s, z in (plain, clipped))
        errors = [
            output_error(quantizer.fake_quantize(w, *q) - w, x.gram) for q in (plain, clipped)
        ]
        better = errors[1] < errors[0]
        better[unclipped] = False
        scales, zero_points = (
            torch.where(better[:, None], c, p) for p, c in zip(plain, clipped, strict=True)
        )
        return QuantLinear.from_module(
            linear,
            bits=quantizer.bits,
            symmetric=quantizer.symmetric,
            group_size=quantizer.group_size,
            scales=scales,
            zero_points=zero_points,
        )


@contextmanager
def watched(
    readers: list[list[nn.Linear]], blocks: set[nn.Module], search_tokens: int
) -> Iterator[tuple[dict[nn.Linear, Activations], dict[nn.Module, Calls]]]:
    """Record the inputs of linears, shared by those that read the same, and calls of blocks."""
    calls = {block: Calls(search_tokens) for block in blocks}
    inputs: dict[nn.Linear, Activations] = {}
    hooks = []
    for linears in readers:
        n, device = linears[0].in_features, linears[0].weight.device
        x = Activations(torch.zeros(n, n, device=device), torch.zeros(n, device=device))
        inputs |= dict.fromkeys(linears, x)
        hooks.append(linears[0].register_forward_pre_hook(lambda _, args, x=x: x.add(args[0])))
    for block, record in calls.items():
        hooks.append(
            block.register_forward_hook(
                lambda _, args, kwargs, output, record=record: record.add(args, kwargs, output),
                with_kwargs=True,
            )
        )
    try:
        yield inputs, calls
    finally:
        for hook in hooks:
            hook.remove()


def in_float32(value: Any) -> Any:
    """The same lists, tuples and dicts, with every floating tensor in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: in_float32(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(in_float32(v) for v in value)
    return value
