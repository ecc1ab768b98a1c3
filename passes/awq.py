"""AWQ as an Olive pass: activation-aware scales, weight clipping, Olive's quantized format.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
arXiv 2306.00978, section 3.2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from olive.common.hf.wrapper import LayerWrapper, ModelWrapper
from olive.common.quant.nn import QuantLinear
from olive.data.config import DataConfig
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler
from olive.model.config.hf_config import HfLoadKwargs
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from olive.passes.pytorch.quant_utils import (
    finalize,
    get_layer_inputs_for_calibration,
    get_quantizer_config,
    prepare_model,
)
from torch import Tensor, nn

from passes.folding import FOLDS, Fold, FoldScales, candidates, leaves_unchanged
from passes.rounding import clip, output_error, quantizer_of, relative_magnitude, rounded


@dataclass
class Activations:
    """What the calibration tokens say about the input of a linear."""

    gram: Tensor
    """Sum of x x^T, (in_features, in_features) float32."""
    magnitude: Tensor
    """Sum of |x|, (in_features,) float32."""
    tokens: int = 0
    turn: float = float("inf")
    """Its place in the order of the first calls; infinite for one that is never called."""

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        self.gram.addmm_(x.T, x)
        self.magnitude += x.abs().sum(0)
        self.tokens += len(x)

    def scale(self, s: Tensor) -> None:
        """The input is divided by s from now on."""
        self.gram /= s[:, None] * s
        self.magnitude /= s


Reader = tuple[list[nn.Linear], Activations]
"""Linears that read one input, and what is known of it."""


@dataclass
class Batches:
    """What a layer is called with: its hidden states, each (B, T, hidden) float32, and the rest."""

    states: list[Tensor]
    args: list[tuple]
    kwargs: list[dict]

    def calls(self, layer: nn.Module) -> Iterator[Tensor]:
        """Yield the layer's output for each batch."""
        for x, args, kwargs in zip(self.states, self.args, self.kwargs, strict=True):
            yield first(layer(x, *args, **kwargs))

    def through(self, layer: nn.Module) -> Batches:
        """The same for the next layer."""
        return Batches(list(self.calls(layer)), self.args, self.kwargs)


def first(output: Any) -> Tensor:
    """The hidden states among what a block returns."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """Let a GPU round the factors of matrix products to 11 bits, at several times the speed.

    On the CPU it changes nothing.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Awq(Pass):
    """Activation-aware weight quantization of the blocks' linear layers to `QuantLinear`.

    Works on any decoder that Olive's ModelWrapper knows, on CPU and CUDA, a layer at a time, and is
    deterministic. Set `progress` to be called as progress(layers done, layers, note).
    """

    progress: Callable[[int, int, str], None] = staticmethod(lambda done, total, note: None)
    products: Callable[[], AbstractContextManager] = staticmethod(tensor_float_32)
    """The context of all matrix products: what is summed is compared, and not solved for."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        def param(type_: Any, default: Any, description: str) -> PassConfigParam:
            return PassConfigParam(type_=type_, default_value=default, description=description)

        return {
            **get_quantizer_config(),
            "data_config": PassConfigParam(
                type_=DataConfig | dict, required=True, description="Calibration tokens."
            ),
            "grid": param(int, 20, "Steps of alpha in s = s_X^alpha, from 0 to 1."),
            "duo": param(bool, True, "Also try s = s_X^alpha / s_W^(1 - alpha)."),
            "clip_grid": param(int, 20, "Steps of the weight range, from all of it to half."),
        }

    @torch.no_grad()
    def _run_for_config(
        self, model: HfModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> HfModelHandler:
        """Quantize `model` and write it.

        Raises:
            ValueError: the model is already quantized, or the calibration data is empty.
        """
        with self.products():
            return self._quantize(model, config, output_model_path)

    def _quantize(
        self, model: HfModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> HfModelHandler:
        wrapper, qcfg, _ = prepare_model(on_host(model), config)
        names = WeakKeyDictionary({m: name for name, m in wrapper.model.named_modules()})
        self._folds = FoldScales(names)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        wrapper.model.config.use_cache, use_cache = False, wrapper.model.config.use_cache
        batches = Batches(
            *in_float32(
                get_layer_inputs_for_calibration(model, wrapper, config.data_config, device)
            )
        )
        if not batches.states:
            raise ValueError("no calibration tokens")
        layers = wrapper.get_layer_wrappers()
        for done, layer in enumerate(layers):
            self.progress(done, len(layers), "layers quantized")
            batches = self._quantize_layer(wrapper, layer, batches)
        self.progress(len(layers), len(layers), "layers quantized")
        wrapper.model.config.use_cache = use_cache
        # Olive would load every embedding but the tokens' as a quantized one.
        qcfg.modules_to_not_convert = [
            name
            for name, module in wrapper.model.named_modules()
            if isinstance(module, nn.Embedding)
            and module is not wrapper.model.get_input_embeddings()
        ] or None
        quantized = finalize(model, output_model_path, wrapper, qcfg, device)
        self._folds.save(Path(output_model_path) / FOLDS)
        return quantized

    def _quantize_layer(
        self, wrapper: ModelWrapper, layer: LayerWrapper, batches: Batches
    ) -> Batches:
        """Replace the layer's linears by QuantLinear; return what it gave before."""
        module = layer.layer
        dtype = next(module.parameters()).dtype
        module.to(batches.states[0].device).float()
        outputs, readers = self._fold_layer(wrapper, layer, batches, dtype)
        self._round_layer(module, readers, batches, dtype)
        module.to("cpu", dtype)
        return outputs

    def _round_layer(
        self, module: nn.Module, readers: list[Reader], batches: Batches, dtype: torch.dtype
    ) -> None:
        """Replace the linears of a folded layer, whose inputs are `batches`."""
        for linears, seen in readers:
            for linear in linears:
                self._replace(module, linear, self._ranges(linear, seen.gram, dtype))

    def _fold_layer(
        self, wrapper: ModelWrapper, layer: LayerWrapper, batches: Batches, dtype: torch.dtype
    ) -> tuple[Batches, list[Reader]]:
        """Move the best scales from what makes the linears' inputs into the linears.

        Returns:
            The layer's outputs, and the linears to quantize in the order in which they are called,
            those that read one input together, with the activations of that input.
        """
        module = layer.layer
        linears = [m for m in module.modules() if hasattr(m, "quant_info")]

        def run() -> Tensor:
            return next(batches.calls(module))

        folds: list[Fold] = []
        expected = run()
        for choices in candidates(wrapper, layer):
            folds += [f for f in choices if leaves_unchanged(f, expected, run, dtype)][:1]
        together = {linear for f in folds for linear in f.linears}
        groups = [f.linears for f in folds] + [[m] for m in linears if m not in together]
        with watched(groups) as readers:
            outputs = batches.through(module)
        inputs = {linears[0]: seen for linears, seen in readers}
        for fold in folds:
            seen = inputs[fold.linears[0]]
            s = fold.apply(self._search_scale(fold, seen), dtype)
            seen.scale(s)
            self._folds.add(fold, s)
        return outputs, sorted(readers, key=lambda reader: reader[1].turn)

    def _search_scale(self, fold: Fold, x: Activations) -> Tensor:
        """The s with the smallest error of the linears' outputs (equation 4); or ones."""
        s_x = fold.tie(x.magnitude / max(x.tokens, 1)).clamp(min=1e-4)
        s_w = fold.tie(torch.stack([relative_magnitude(m) for m in fold.linears]).mean(0))
        alphas = torch.linspace(0, 1, self.config.grid + 1).tolist()
        choices = [torch.ones_like(s_x), *(s_x**a for a in alphas[1:])]
        if self.config.duo:
            choices += [s_x**a / s_w ** (1 - a) for a in alphas]
        best, least = choices[0], torch.inf
        for choice in choices:
            s = choice / (choice.max() * choice.min()).sqrt()
            error = 0.0
            for linear in fold.linears:
                w = linear.weight.data
                delta = rounded(w * s, quantizer_of(linear)) / s - w
                error += float(output_error(delta, x.gram).sum())
            if error < least:
                best, least = s, error
        return best

    def _ranges(self, linear: nn.Linear, gram: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales and zero points with the smallest output error, clipped or whole, row by row.

        Both are (out_features, groups): float32 as they will be stored, and whole numbers.
        """
        quantizer, w = quantizer_of(linear), linear.weight.data
        choices = [quantizer.find_qparams(w), clip(w, gram, quantizer, self.config.clip_grid)]
        choices = [(s.to(dtype).float(), z) for s, z in choices]
        plain, clipped = (output_error(quantizer.fake_quantize(w, *q) - w, gram) for q in choices)
        better = (clipped < plain)[:, None]
        (s, z), (clipped_s, clipped_z) = choices
        return torch.where(better, clipped_s, s), torch.where(better, clipped_z, z)

    def _replace(
        self, module: nn.Module, linear: nn.Linear, qparams: tuple[Tensor, Tensor]
    ) -> None:
        """Put a QuantLinear of the linear's weights, rounded, in its place in `module`."""
        quantizer = quantizer_of(linear)
        name = next(name for name, found in module.named_modules() if found is linear)
        quantized = QuantLinear.from_module(
            linear,
            bits=quantizer.bits,
            symmetric=quantizer.symmetric,
            group_size=quantizer.group_size,
            scales=qparams[0],
            zero_points=qparams[1],
        )
        module.set_submodule(name, quantized)


@contextmanager
def watched(
    groups: list[list[nn.Linear]],
) -> Iterator[list[Reader]]:
    """Record the inputs of linears, once for those that read the same."""
    readers, hooks = [], []
    turns = count()
    for linears in groups:
        n, device = linears[0].in_features, linears[0].weight.device
        seen = Activations(torch.zeros(n, n, device=device), torch.zeros(n, device=device))
        readers.append((linears, seen))

        def record(_: nn.Module, args: tuple, seen: Activations = seen) -> None:
            if not seen.tokens:
                seen.turn = next(turns)
            seen.add(args[0])

        hooks.append(linears[0].register_forward_pre_hook(record))
    try:
        yield readers
    finally:
        for hook in hooks:
            hook.remove()


def on_host(model: HfModelHandler) -> HfModelHandler:
    """The same model, to be loaded into the host's memory: layers go to a GPU one at a time."""
    given = model.load_kwargs.model_dump() if model.load_kwargs else {}
    host = copy.deepcopy(model)
    host.load_kwargs = HfLoadKwargs(**given | {"device_map": "cpu"})
    return host


def in_float32(value: Any) -> Any:
    """The same lists, tuples and dicts, with every floating tensor in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: in_float32(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(in_float32(v) for v in value)
    return value
